"""Real notebooks: cells run in a Jupyter kernel, started by nbconvert or by a client as in an editor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra `notebook` is not installed")
jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")
pytestmark = [pytest.mark.slow, pytest.mark.long]

REPOSITORY = Path(__file__).parents[2]
DEFINITIONS = """
import os
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader, TensorDataset

class CellModel(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        loss = self.layers(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

def begin():
    torch.manual_seed(3)
    return CellModel(), DataLoader(TensorDataset(torch.randn(48, 4)), batch_size=4, shuffle=True)

def trainer(strategy, **options):
    settings = dict(accelerator="cpu", devices=2, max_epochs=2, logger=False, enable_checkpointing=False)
    return Trainer(strategy=strategy, **(settings | options))

# Typical work before training. It starts threads, which a fork does not inherit.
torch.set_num_threads(4)
torch.randn(1500, 1500) @ torch.randn(1500, 1500)
torch.nn.Linear(3, 3)(torch.randn(1, 3)).sum().backward()
"""
UNDISTURBED = """
os.environ["OMP_NUM_THREADS"] = "1"
model, loader = begin()
trainer("ddp_notebook").fit(model, loader)
expected = [parameter.clone() for parameter in model.parameters()]
del os.environ["OMP_NUM_THREADS"]
"""
KILLED = """
os.environ["CKPTLESS_FAULTS"] = "kill:rank=1:step=5"
again, loader = begin()
ours = trainer("ckptless", callbacks=[TQDMProgressBar()])
ours.fit(again, loader)
del os.environ["CKPTLESS_FAULTS"]
"""
COMPARED = """
import psutil
assert ours.global_step == 12
assert ours.callback_metrics["loss"] < 10
assert all(torch.equal(one, other) for one, other in zip(expected, again.parameters()))
print("children:", psutil.Process().children(recursive=True))
print("identical weights")
"""


def environment() -> dict[str, str]:
    """Return the environment of a kernel, without PYTEST_CURRENT_TEST, which would reduce its output."""
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    known = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return known | {"PYTHONPATH": os.pathsep.join(path), "JUPYTER_PLATFORM_DIRS": "1"}


def text_of(outputs: list[Any]) -> str:
    """Return the output of a cell as text."""
    shown = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "".join(shown)


def test_nbconvert_executes_a_notebook_with_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("nbconvert")
    cells = [nbformat.v4.new_code_cell(source) for source in (DEFINITIONS, UNDISTURBED, KILLED, COMPARED)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "train.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output", "done", "train.ipynb"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(tmp_path / "done.ipynb", as_version=4)
    killed, compared = (text_of(cell.outputs) for cell in executed.cells[2:])
    assert "died by SIGKILL; recovering in place: 1 of 2 ranks survived, replacing rank 1" in killed
    assert "recovered in place" in killed
    assert "Epoch 1" in killed
    assert compared == "children: []\nidentical weights\n"


class Kernel:
    """A kernel that runs one cell after another.

    Args:
        folder: its working directory.
    """

    def __init__(self, folder: Path) -> None:
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder), env=environment())
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, source: str, *, stop_at: str = "") -> tuple[str, str]:
        """Run a cell.

        Args:
            source: source code of the cell.
            stop_at: interrupt the kernel once the cell has printed this text; empty to let it run.

        Returns:
            The printed text, and the name of the exception or an empty string.
        """
        request, printed, error = self.client.execute(source), "", ""
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != request:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                printed += content["text"]
                if stop_at and stop_at in printed:
                    stop_at = ""
                    self.manager.interrupt_kernel()
            elif message["msg_type"] == "error":
                error = content["ename"]
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return printed, error

    def close(self) -> None:
        """Shut the kernel down."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel that has run the definitions; the last test kills it."""
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    try:
        assert kernel.run(DEFINITIONS) == ("", "")
        yield kernel
    finally:
        kernel.close()


def test_an_interrupt_ends_only_the_cell(kernel: Kernel) -> None:
    begin = """
import time
class Slow(CellModel):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        print(f"at batch {batch_idx}")
        return super().training_step(batch, batch_idx)
torch.manual_seed(3)
slow, ours = Slow(), trainer("ckptless_notebook", max_epochs=10_000)
ours.fit(slow, begin()[1])
"""
    _, error = kernel.run(begin, stop_at="at batch 5")
    assert error in ("SystemExit", "KeyboardInterrupt")
    printed, error = kernel.run("import psutil; print(ours.global_step > 3, psutil.Process().children(recursive=True))")
    assert (printed, error) == ("True []\n", "")
    printed, error = kernel.run("ours = trainer('ckptless'); ours.fit(*begin()); print(ours.global_step)")
    assert (printed.splitlines()[-1], error) == ("12", "")


def test_an_exception_is_raised_in_the_cell(kernel: Kernel) -> None:
    cell = """
class NoSuchBatchError(Exception):
    pass
class Failing(CellModel):
    def training_step(self, batch, batch_idx):
        if self.global_step == 4:
            raise NoSuchBatchError(batch_idx)
        return super().training_step(batch, batch_idx)
trainer("ckptless").fit(Failing(), begin()[1])
"""
    assert kernel.run(cell)[1] == "NoSuchBatchError"


def test_workers_exit_with_their_kernel(kernel: Kernel, tmp_path: Path) -> None:
    # The arena of a killed kernel remains, like that of any agent.
    cell = f"""
os.environ["CKPTLESS_ARENA_DIR"] = {str(tmp_path)!r}
class Endless(CellModel):
    def on_train_start(self):
        print("trains")
trainer("ckptless", max_epochs=10**6).fit(Endless(), begin()[1])
"""
    request, printed = kernel.client.execute(cell), ""
    while "trains" not in printed:
        message = kernel.client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") == request and message["msg_type"] == "stream":
            printed += message["content"]["text"]
    process = psutil.Process(kernel.manager.provisioner.pid)
    forks = process.children(recursive=True)
    # The fork server and two workers.
    assert len(forks) >= 3
    process.kill()
    _, alive = psutil.wait_procs(forks, timeout=10)
    assert not alive
