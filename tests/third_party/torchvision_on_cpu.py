"""Patches the installed torchvision so that it can be imported with a CPU build of torch.

The package index has CUDA builds of torchvision only. With a CPU build of torch, its compiled operators cannot be
loaded, and the import fails because it registers two operators that were never declared. The patch declares them. They
still raise torchvision's own error when they are called; the rest of the package is Python and works.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DECLARATION = """

if not _has_ops():  # declared by tests/third_party/torchvision_on_cpu.py
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    if _works():
        return
    found = [path for folder in sys.path if (path := Path(folder, "torchvision", "extension.py")).exists()]
    if not found:
        sys.exit("torchvision is not installed")
    found[0].write_text(found[0].read_text() + DECLARATION)
    if not _works():
        sys.exit(f"{found[0].parent} cannot be imported, even with the operators declared")


def _works() -> bool:
    return not subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False).returncode


if __name__ == "__main__":
    main()
