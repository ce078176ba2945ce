"""The public classes for `pytorch_lightning`; `lightning_pytorch.py` has those for the other distribution.

Their behaviour is in mixins. Here the mixins are combined with the classes of one distribution, and with what `trainer`
cannot import. Apart from the mixins, because importing it imports one distribution of Lightning.
"""

from lightning_ckptless._registration.libraries import require_libraries

require_libraries("pytorch_lightning")

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from pytorch_lightning.strategies.launchers.launcher import _Launcher

from lightning_ckptless.runner import run_job
from lightning_ckptless.testing.fault_injector import FaultInjectorMixin
from lightning_ckptless.testing.trace import StepTraceMixin
from lightning_ckptless.trainer.rewind.callbacks import RewindOnNonFiniteMixin, RewindOnSpikeMixin
from lightning_ckptless.trainer.strategy.data_parallel import DataParallelMixin
from lightning_ckptless.trainer.strategy.launcher import LauncherMixin
from lightning_ckptless.trainer.strategy.model_parallel import ModelParallelMixin
from lightning_ckptless.trainer.strategy.recoverable import Parts


class FaultInjector(FaultInjectorMixin, Callback):
    """Callback that injects faults into training, each once per run."""

    __module__ = "lightning_ckptless"


class RewindOnNonFinite(RewindOnNonFiniteMixin, Callback):
    """Callback that rewinds all ranks when a value is NaN or infinite on any of them."""

    __module__ = "lightning_ckptless"


class RewindOnSpike(RewindOnSpikeMixin, Callback):
    """Callback that rewinds all ranks when a value jumps on any of them."""

    __module__ = "lightning_ckptless"


class StepTrace(StepTraceMixin, Callback):
    """Callback that writes a digest of every step."""


class CkptlessLauncher(LauncherMixin, _Launcher):
    """Launcher of our strategies."""


# The trace comes first, so that a step is recorded before a fault is injected.
PARTS = Parts(__name__, CkptlessLauncher, (StepTrace.from_environment, FaultInjector.from_environment), run_job)


class CkptlessStrategy(DataParallelMixin, DDPStrategy):
    """Data parallelism that survives the loss of any rank.

    Lightning's `DDPStrategy` with the options of `CkptlessOptions`.
    """

    __module__ = "lightning_ckptless"
    parts = PARTS


class CkptlessModelParallelStrategy(ModelParallelMixin, ModelParallelStrategy):
    """Sharded models that survive the loss of any rank: FSDP2 (`fully_shard`), tensor parallelism, and both.

    Lightning's `ModelParallelStrategy` with the options of `CkptlessOptions`.
    """

    __module__ = "lightning_ckptless"
    parts = PARTS
