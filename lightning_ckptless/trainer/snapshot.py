"""The small state: everything of a run that is not a big tensor, captured at a commit point and put back exactly.

It is one dictionary of plain data per rank: loop counters, data position, generators, running metrics, schedulers,
callbacks, scaler, hyper-parameters of the optimizers, and the plain attributes that users keep on their modules.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.trainer.buckets import BucketWatch, restore_buckets
from lightning_ckptless.trainer.data import data_position
from lightning_ckptless.trainer.host import loggers as host_loggers
from lightning_ckptless.trainer.host.flavour import flavour_of, is_a, module
from lightning_ckptless.trainer.host.loops import FitLoops
from lightning_ckptless.trainer.host.metrics import dump_metric, load_metric, metrics_of
from lightning_ckptless.trainer.host.results import dump_results, load_results
from lightning_ckptless.trainer.inner import InnerState
from lightning_ckptless.trainer.plain import heavy_attributes, plain_attributes, set_plain_attributes
from lightning_ckptless.trainer.rng import capture_rng, owned_generators, set_owned_generators
from lightning_ckptless.trainer.state import optimizer_facts, set_optimizer_facts

log = logging.getLogger(__name__)

HEAVY_BYTES = 8_000_000
_PROCESS_BOUND = (("callbacks", "ProgressBar"), ("callbacks", "Timer"), ("callbacks", "DeviceStatsMonitor"))


class SmallState:
    """Captures and applies the small state of one trainer.

    Args:
        trainer: in `fit`, with its model attached and its data set up.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.loops = FitLoops(trainer)
        self.module = trainer.lightning_module
        named = list(self.module.named_modules())
        self._modules = [m for _, m in named]
        # Those that inject faults or write traces are no part of the run: the next start may have others.
        self._callbacks = [c for c in trainer.callbacks if not type(c).__module__.startswith("lightning_ckptless")]
        self._metrics = metrics_of(named)
        self._heavy_names: dict[int, frozenset[str]] = {}
        self._buckets = BucketWatch()
        self._inner = InnerState(self.module)
        self._extra_state = {name: m for name, m in named if type(m).get_extra_state is not nn.Module.get_extra_state}
        flavour = module(flavour_of(trainer))
        self._module_baseline = frozenset(vars(flavour.LightningModule()))
        self._data_baseline = frozenset(vars(flavour.LightningDataModule()))
        self._savers = [owner for owner in (self.module, *self._callbacks) if _saves_extras(owner)]

    @property
    def callbacks(self) -> list[Any]:
        """Those whose state is a part of it, in its order."""
        return self._callbacks

    def _heavy(self, owner: Any) -> frozenset[str]:
        """Attributes that are left out for their size, looked for once and named."""
        if id(owner) not in self._heavy_names:
            names = heavy_attributes(owner, HEAVY_BYTES)
            self._heavy_names[id(owner)] = frozenset(names)
            for name in names:
                log.warning(
                    "ckptless: %s.%s is larger than %d MB and is not taken along with every step: if training changes "
                    "it, put it into state_dict()", type(owner).__name__, name, HEAVY_BYTES // 1_000_000
                )  # fmt: skip
        return self._heavy_names[id(owner)]

    # ------------------------------------------------------------------ capture

    def capture(self, data: dict[str, Any] | None = None) -> dict[str, Any]:
        """The state now. It refers to live objects: pack it before training goes on.

        Args:
            data: where the training data is; None to find out.
        """
        trainer = self.trainer
        return {
            "counters": self.loops.counters(),
            "data": data_position(self.loops) if data is None else data,
            "results": dump_results(trainer),
            "metrics": {name: dump_metric(metric) for name, metric in self._metrics.items()},
            "optimizers": optimizer_facts(trainer),
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "callbacks": [self._callback(callback) for callback in self._callbacks],
            "module": self._module(),
            "datamodule": self._datamodule(),
            "extras": self._extras(),
            "training": [m.training for m in self._modules],
            "should_stop": trainer.should_stop,
            "buffers_are_due": self._buffers_are_due(),
            "buckets": self._buckets.settled(trainer.strategy.model),
            "logs": host_loggers.log_positions(trainer.loggers) if trainer.is_global_zero else None,
            "rng": capture_rng(),
        }

    def _buffers_are_due(self) -> bool | None:
        """Whether DDP broadcasts buffers at the next forward: it does so once per process where its flag says no."""
        model = self.trainer.strategy.model
        return model.require_forward_param_sync if isinstance(model, DistributedDataParallel) else None

    def _callback(self, callback: Any) -> dict[str, Any]:
        bound = any(is_a(callback, *kind) for kind in _PROCESS_BOUND)
        return {
            "class": type(callback).__name__,
            "state": callback.state_dict(),
            "plain": {} if bound else plain_attributes(callback, leave=self._heavy(callback)),
            "generators": {} if bound else owned_generators(callback),
        }

    def _module(self) -> dict[str, Any]:
        return {
            "plain": plain_attributes(self.module, leave=self._module_baseline | self._heavy(self.module)),
            "generators": owned_generators(self.module),
            "extra_state": {name: m.get_extra_state() for name, m in self._extra_state.items()},
            "inner": self._inner.capture(),
        }

    def _datamodule(self) -> dict[str, Any] | None:
        if (datamodule := self.trainer.datamodule) is None:
            return None
        return {
            "state": datamodule.state_dict(),
            "plain": plain_attributes(datamodule, leave=self._data_baseline | self._heavy(datamodule)),
            "generators": owned_generators(datamodule),
        }

    def _extras(self) -> dict[str, Any]:
        """What users put into a checkpoint by `on_save_checkpoint`: their own word for what is state."""
        extras: dict[str, Any] = {"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "callbacks": {}}
        for owner in self._savers:
            _hook(owner, "on_save_checkpoint", self.trainer, extras)
        return extras if self._savers else {}

    # ------------------------------------------------------------------ what dataloader hooks see

    def shown(self) -> dict[str, Any]:
        """What the user's dataloader hooks may look at, beside the counters; it refers to live objects."""
        return {
            "module": plain_attributes(self.module, leave=self._module_baseline | self._heavy(self.module)),
            "datamodule": self._datamodule(),
            "callbacks": [self._callback(callback)["plain"] for callback in self._callbacks],
        }

    def show(self, saved: dict[str, Any]) -> None:
        """Put back what `shown` took, for the time of a hook."""
        set_plain_attributes(self.module, saved["module"])
        self._apply_datamodule(saved["datamodule"])
        for callback, plain in zip(self._callbacks, saved["callbacks"], strict=True):
            set_plain_attributes(callback, plain)

    # ------------------------------------------------------------------ apply

    def apply(self, saved: dict[str, Any]) -> None:
        """Put everything back but the data position and the generators, which come last.

        Raises:
            LayoutMismatchError: the relaunched script has other callbacks, optimizers or schedulers.
        """
        trainer = self.trainer
        self._check(saved)
        for callback, state in zip(self._callbacks, saved["callbacks"], strict=True):
            if state["state"]:
                callback.load_state_dict(copy.deepcopy(state["state"]))
            set_plain_attributes(callback, copy.deepcopy(state["plain"]))
            set_owned_generators(callback, state["generators"])
        for config, state in zip(trainer.lr_scheduler_configs, saved["schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        set_optimizer_facts(trainer, copy.deepcopy(saved["optimizers"]))
        if saved["precision"]:
            trainer.precision_plugin.load_state_dict(copy.deepcopy(saved["precision"]))
        self._apply_datamodule(saved["datamodule"])
        self._apply_module(saved)
        for owner in self._savers:
            _hook(owner, "on_load_checkpoint", trainer, copy.deepcopy(saved["extras"]))
        self.loops.set_counters(saved["counters"])
        load_results(trainer, saved["results"])
        for name, state in saved["metrics"].items():
            load_metric(self._metrics[name], copy.deepcopy(state))
        for m, training in zip(self._modules, saved["training"], strict=True):
            m.training = training
        trainer.should_stop = saved["should_stop"]
        if saved["buffers_are_due"] is not None:
            trainer.strategy.model.require_forward_param_sync = saved["buffers_are_due"]
        restore_buckets(trainer.strategy.model, saved["buckets"])

    def _apply_module(self, saved: dict[str, Any]) -> None:
        set_plain_attributes(self.module, copy.deepcopy(saved["module"]["plain"]))
        set_owned_generators(self.module, saved["module"]["generators"])
        for name, state in saved["module"]["extra_state"].items():
            self._extra_state[name].set_extra_state(copy.deepcopy(state))
        self._inner.apply(copy.deepcopy(saved["module"]["inner"]))

    def _apply_datamodule(self, saved: dict[str, Any] | None) -> None:
        if saved is None:
            return
        datamodule = self.trainer.datamodule
        if saved["state"]:
            datamodule.load_state_dict(copy.deepcopy(saved["state"]))
        set_plain_attributes(datamodule, copy.deepcopy(saved["plain"]))
        set_owned_generators(datamodule, saved["generators"])

    def _check(self, saved: dict[str, Any]) -> None:
        pairs: tuple[tuple[str, list[str], list[str]], ...] = (
            (
                "callbacks",
                [c["class"] for c in saved["callbacks"]],
                [type(c).__name__ for c in self._callbacks],
            ),
            ("modules", [str(len(saved["training"]))], [str(len(self._modules))]),
            ("schedulers", [str(len(saved["schedulers"]))], [str(len(self.trainer.lr_scheduler_configs))]),
            ("metrics", sorted(saved["metrics"]), sorted(self._metrics)),
        )
        for kind, expected, found in pairs:
            if expected != found:
                raise LayoutMismatchError(
                    f"the mirrored run has {kind} {', '.join(expected)}; the relaunched script made "
                    f"{', '.join(found)}: it must build the same trainer and model at every start"
                )


def _saves_extras(owner: Any) -> bool:
    hook: Callable[..., Any] | None = getattr(type(owner), "on_save_checkpoint", None)
    return hook is not None and not hook.__module__.startswith(
        ("lightning.", "pytorch_lightning", "lightning_ckptless")
    )


def _hook(owner: Any, name: str, trainer: Any, checkpoint: dict[str, Any]) -> None:
    if is_a(owner, "callbacks", "Callback"):
        getattr(owner, name)(trainer, trainer.lightning_module, checkpoint)
    else:
        getattr(owner, name)(checkpoint)
