"""Called at the end of `import torch`, through this package's entry point in the group `torch.backends`.

An exception here would make `import torch` fail for every user of the environment. Therefore this module imports only
the standard library, catches all errors, and at most logs a warning. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` prevents the
call. Apart from `names`, because an error while `names` is imported is caught here too.
"""

from __future__ import annotations

import logging


def autoload() -> None:
    """Register `Trainer(strategy="ckptless")`, now or when Lightning is imported. Never raises."""
    try:
        from lightning_ckptless._registration.names import register_everywhere

        register_everywhere(autoload)
    except Exception:
        logging.getLogger(__name__).warning('strategy="ckptless" is not available', exc_info=True)
