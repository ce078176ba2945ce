"""What `import torch` calls when it ends, by the entry point `torch.backends` of this package.

An exception from here would make `import torch` fail for everybody in the environment. So this file needs nothing but
the standard library, imports the rest where it can catch what goes wrong, and only ever leaves a line in the log.
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` keeps torch from calling it.
"""

from __future__ import annotations

import logging


def autoload() -> None:
    """Make `Trainer(strategy="ckptless")` known, now or when Lightning is imported. Never raises."""
    try:
        from lightning_ckptless._registration.names import register_everywhere

        register_everywhere(autoload)
    except Exception:
        logging.getLogger(__name__).warning('strategy="ckptless" is not available', exc_info=True)
