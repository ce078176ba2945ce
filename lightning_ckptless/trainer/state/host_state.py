"""The host state: everything in a run that is not a large tensor, captured at a commit point and restored exactly.

It is one dictionary of plain data per rank: loop counters, data position, random number generators, running metrics,
schedulers, callbacks, gradient scaler, optimizer hyper-parameters, and the plain attributes users keep on modules.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_ckptless.errors import LayoutMismatchError
from lightning_ckptless.formats.packing import PartCache, pack, unpack
from lightning_ckptless.internals.lightning.averaging import join_scheduler, steps_with_old_gradients
from lightning_ckptless.internals.lightning.clocks import ages_of, set_ages
from lightning_ckptless.internals.lightning.distribution import distribution_of, module
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.metrics import dump_metric, load_metric, metrics_of
from lightning_ckptless.internals.lightning.results import dump_results, load_results
from lightning_ckptless.options import CkptlessOptions
from lightning_ckptless.trainer.data.position import data_position
from lightning_ckptless.trainer.state.added_modules import AddedModules
from lightning_ckptless.trainer.state.attribute_reader import AttributeReader
from lightning_ckptless.trainer.state.checkpoint_hooks import CheckpointHooks
from lightning_ckptless.trainer.state.gradient_buckets import BucketWatch, restore_buckets
from lightning_ckptless.trainer.state.kept_gradients import KeptGradients
from lightning_ckptless.trainer.state.module_attributes import ModuleAttributes
from lightning_ckptless.trainer.state.own_state import OwnState, hyperparameters, is_observer, set_hyperparameters
from lightning_ckptless.trainer.state.parameter_groups import GroupNames, require_same_groups
from lightning_ckptless.trainer.state.plain_values import (
    HEAVY_BYTES,
    heavy_attributes,
    is_same,
    set_plain_attributes,
)
from lightning_ckptless.trainer.state.rng import capture_rng, owned_generators, set_owned_generators
from lightning_ckptless.trainer.state.surroundings import Surroundings
from lightning_ckptless.trainer.state.tensors import (
    StateIndex,
    callback_modules,
    optimizer_facts,
    set_optimizer_facts,
    trained_alone,
)
from lightning_ckptless.trainer.state.watch import Watch, Watched
from lightning_ckptless.trainer.strategy.compatibility import names_of_class

log = logging.getLogger(__name__)

_TRAINING = attrgetter("training")


class HostState:
    """Captures and applies the host state of one trainer.

    Args:
        trainer: in `fit`, with its model attached and its data set up.
        options: the user's settings; None for the defaults.
        surroundings: the trainer's surroundings, watched since the fit was set up; None to watch them from now on.
    """

    def __init__(
        self, trainer: Any, options: CkptlessOptions | None = None, surroundings: Surroundings | None = None
    ) -> None:
        options = options or CkptlessOptions()
        self.trainer = trainer
        self._surroundings = surroundings or Surroundings(trainer)
        self.loops = FitLoops(trainer)
        self.module = trainer.lightning_module
        named = list(self.module.named_modules())
        self._modules = [m for _, m in named]
        # Fault injectors and trace writers are not part of the run: the next start may have different ones.
        self._callbacks = [c for c in trainer.callbacks if not is_observer(c)]
        extra = (
            (f"{prefix}.{path}", m) for prefix, held in callback_modules(trainer) for path, m in held.named_modules()
        )
        self._metrics = metrics_of([*named, *extra])
        self._groups = GroupNames(trainer)
        self._added_modules = AddedModules(trainer)
        self._heavy_names: dict[int, frozenset[str]] = {}
        self._own_states: dict[int, OwnState] = {}
        self._parts: defaultdict[str, PartCache] = defaultdict(PartCache)
        self._watch = Watch(self._watched)
        self._buckets = BucketWatch()
        tell = partial(self._surroundings.note_loss, type(self.module).__name__, "parameters().grad")
        self._kept_gradients = KeptGradients(self.module, trainer.optimizers, tell)
        self._submodules = ModuleAttributes(self.module, self._tell_of_submodule)
        self._extra_state = {name: m for name, m in named if type(m).get_extra_state is not nn.Module.get_extra_state}
        distribution = module(distribution_of(trainer))
        self._module_baseline = frozenset(vars(distribution.LightningModule()))
        self._data_baseline = frozenset(vars(distribution.LightningDataModule()))
        self._stateless = frozenset(options.stateless_callbacks)
        self.hooks = CheckpointHooks(
            trainer, self._callbacks, every_version=options.checkpoint_hooks == "every_version"
        )

    @property
    def callbacks(self) -> list[Any]:
        """The callbacks whose state is part of the host state, in order."""
        return self._callbacks

    @cached_property
    def _attributes(self) -> AttributeReader:
        """Reads the attributes of the model."""
        tell = partial(self._surroundings.note_loss, type(self.module).__name__)
        return AttributeReader(self.module, self._module_baseline | self._heavy(self.module), tell)

    def _tell_of_submodule(self, path: str, name: str) -> None:
        self._surroundings.note_loss(f"{type(self.module).__name__}.{path}", name)

    def _heavy(self, owner: Any) -> frozenset[str]:
        """Return the names of attributes excluded for their size; searched for and logged once per owner."""
        if id(owner) not in self._heavy_names:
            leave = {id(self.module): self._module_baseline, id(self.trainer.datamodule): self._data_baseline}
            names = heavy_attributes(owner, HEAVY_BYTES, leave=leave.get(id(owner), ()))
            self._heavy_names[id(owner)] = frozenset(names)
            for name in names:
                log.warning(
                    "ckptless: %s.%s is larger than %d MB and is not mirrored with every step: if training changes it, "
                    "put it into state_dict()", type(owner).__name__, name, HEAVY_BYTES // 1_000_000
                )  # fmt: skip
        return self._heavy_names[id(owner)]

    # ------------------------------------------------------------------ capture

    def capture(
        self, position: Callable[[], dict[str, Any]] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """Return the current state. It refers to live objects: pack it before training continues.

        Args:
            position: returns the position of the training data; None to look it up.
            tensors: the tensors that are part of the version anyway, by name, so that the rest may refer to them.
        """
        trainer, groups = self.trainer, self._groups.now()
        owners = [self._own_state(owner) for owner in self._owners]
        # These call functions of the script, which may change attributes.
        states = [owner.state() for owner in owners]
        of_script = {
            "checkpoint": self.hooks.capture(tensors or {}),
            "added_modules": self._added_modules.capture(),
            "counters": self.loops.counters(),
            "metrics": {name: dump_metric(metric) for name, metric in self._metrics.items()},
            "schedulers": self._surroundings.schedulers.capture(),
            "precision": trainer.precision_plugin.state_dict(),
        }
        extra_state = {name: m.get_extra_state() for name, m in self._extra_state.items()}
        self._watch.begin()
        try:
            captured = {
                **of_script,
                **self._of_owners([owner.capture(state) for owner, state in zip(owners, states, strict=True)]),
                "ages": ages_of(trainer),
                "results": dump_results(trainer),
                "optimizers": optimizer_facts(trainer),
                "first_groups": self._parts["first_groups"].part(0, self._surroundings.first_groups),
                "groups": self._parts["groups"].part(self._groups.changes, groups),
                "trained_alone": sorted(trained_alone(trainer)),
                "first_schedulers": self._surroundings.schedulers.first,
                "module": self._module(extra_state),
                "surroundings": self._surroundings.capture(),
                "training": list(map(_TRAINING, self._modules)),
                "should_stop": trainer.should_stop,
                "gradients": self._gradients(),
                "buffers_are_due": self._buffers_are_due(),
                "buckets": self._buckets.settled(trainer.strategy.model),
                # Last, as it may call code of a dataloader.
                "data": data_position(self.loops) if position is None else position(),
                "rng": capture_rng(),
            }
        finally:
            self._watch.end()
        self._surroundings.report_training_data()
        return captured

    @property
    def _owners(self) -> list[Any]:
        """The callbacks, then the datamodule if there is one."""
        datamodule = self.trainer.datamodule
        return self._callbacks if datamodule is None else [*self._callbacks, datamodule]

    def _of_owners(self, captured: list[dict[str, Any]]) -> dict[str, Any]:
        of_callbacks, others = captured[: len(self._callbacks)], captured[len(self._callbacks) :]
        kinds = [type(callback).__name__ for callback in self._callbacks]
        return {
            "callbacks": [{"class": kind, **state} for kind, state in zip(kinds, of_callbacks, strict=True)],
            "datamodule": others[0] if others else None,
        }

    def _watched(self) -> Iterator[Watched]:
        yield self._attributes
        yield from self._submodules.readers
        yield from (owner.reader for owner in self._own_states.values())
        yield from self._surroundings.watched()

    def before_backward(self) -> None:
        """Observe which gradients the backward pass is about to add to."""
        self._kept_gradients.before_backward()

    def _gradients(self) -> dict[str, Any] | None:
        """Return the last step's gradients if the next step may use them, else None."""
        kept = self._kept_gradients.capture()
        if not steps_with_old_gradients(self._callbacks, self.trainer):
            return kept
        return {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}

    def _apply_gradients(self, saved: dict[str, Any]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.grad = saved[name].to(parameter.device) if name in saved else None

    def _buffers_are_due(self) -> bool | None:
        """Return whether DDP syncs buffers in the next forward, which a new process does once; None without DDP."""
        model = self.trainer.strategy.model
        return model.require_forward_param_sync if isinstance(model, DistributedDataParallel) else None

    def _own_state(self, owner: Any) -> OwnState:
        """Return what reads and restores a callback or the datamodule."""
        if id(owner) not in self._own_states:
            leave, is_stateless = self._heavy(owner), bool(names_of_class(type(owner)) & self._stateless)
            if owner is self.trainer.datamodule:
                leave, is_stateless = leave | self._data_baseline, False
            tell = partial(self._surroundings.note_loss, self._path_of(owner))
            self._own_states[id(owner)] = OwnState(owner, leave, calls_state_dict=not is_stateless, tell=tell)
        return self._own_states[id(owner)]

    def _path_of(self, owner: Any) -> str:
        kind = type(owner).__name__
        places = (f"callback {place} ({kind})" for place, it in enumerate(self.trainer.callbacks) if it is owner)
        return next(places, kind)

    def _module(self, extra_state: dict[str, Any]) -> dict[str, Any]:
        plain, submodules = self._attributes.plain(), self._submodules.capture()
        return {
            "plain": self._parts["plain"].part(self._attributes.changes, plain),
            "held": self._attributes.held,
            "others": self._attributes.others,
            "generators": self._attributes.generators(),
            "extra_state": extra_state,
            "submodules": self._parts["submodules"].part(self._submodules.changes, submodules),
            "hyperparameters": hyperparameters(self.module),
        }

    # ------------------------------------------------------------------ what dataloader hooks see

    def shown(self) -> dict[str, Any]:
        """Return what the user's dataloader hooks may read besides the counters. It refers to live objects."""
        of_owners = self._of_owners([self._own_state(owner).capture() for owner in self._owners])
        return {
            "module": self._attributes.plain(),
            "submodules": self._submodules.capture(),
            "datamodule": of_owners["datamodule"],
            "callbacks": [of_callback["plain"] for of_callback in of_owners["callbacks"]],
            "generators": [owned_generators(owner) for owner in (self.module, *self._callbacks)],
        }

    def show(self, saved: dict[str, Any]) -> None:
        """Restore what `shown` returned, for the duration of a hook."""
        set_plain_attributes(self.module, saved["module"])
        self._submodules.apply(saved["submodules"])
        self._apply_datamodule(saved["datamodule"])
        for callback, plain in zip(self._callbacks, saved["callbacks"], strict=True):
            set_plain_attributes(callback, plain)
        for owner, generators in zip((self.module, *self._callbacks), saved["generators"], strict=True):
            set_owned_generators(owner, generators)

    # ------------------------------------------------------------------ what a training step may change

    def of_step(self) -> dict[str, Any]:
        """Return what a training step may change besides tensors, metrics and logs. It refers to live objects."""
        return {
            "extra_state": {name: m.get_extra_state() for name, m in self._extra_state.items()},
            "plain": self._attributes.plain(),
            "generators": self._attributes.generators(),
            "submodules": self._submodules.capture(),
            "objects": self._surroundings.objects(),
            "training": list(map(_TRAINING, self._modules)),
        }

    def put_back(self, saved: dict[str, Any]) -> None:
        """Restore what `of_step` returned, here or on another rank; the values then belong to this trainer."""
        set_plain_attributes(self.module, saved["plain"])
        set_owned_generators(self.module, saved["generators"])
        self._submodules.apply(saved["submodules"])
        self._apply_extra_state(saved["extra_state"])
        self._surroundings.put_back_objects(saved["objects"])
        self._apply_modes(saved["training"])

    # ------------------------------------------------------------------ apply

    def apply(self, saved: dict[str, Any], *, with_settings: bool = True) -> None:
        """Restore everything except the data position and the global generators, which are restored last.

        Args:
            saved: the result of `capture`.
            with_settings: whether to restore trainer settings that hooks have changed. False before the start hooks of
                a fit, which may require the original settings.

        Raises:
            LayoutMismatchError: the relaunched script has different callbacks, optimizers or schedulers.
        """
        trainer = self.trainer
        self._check(saved)
        self._added_modules.apply(saved["added_modules"])
        for callback, state in zip(self._callbacks, saved["callbacks"], strict=True):
            self._own_state(callback).put(state)
        self._surroundings.schedulers.apply(saved["schedulers"])
        join_scheduler(self._callbacks, trainer)
        set_optimizer_facts(trainer, copy.deepcopy(saved["optimizers"]))
        if saved["precision"]:
            trainer.precision_plugin.load_state_dict(copy.deepcopy(saved["precision"]))
        self._apply_datamodule(saved["datamodule"])
        self._apply_module(saved)
        self._surroundings.apply(saved["surroundings"], with_settings=with_settings)
        if saved["checkpoint"] is not None:
            self.hooks.apply(saved["checkpoint"], StateIndex(trainer).read())
        self.loops.set_counters(saved["counters"])
        set_ages(trainer, saved["ages"])
        load_results(trainer, saved["results"])
        for name, state in saved["metrics"].items():
            load_metric(self._metrics[name], copy.deepcopy(state))
        self._apply_modes(saved["training"])
        trainer.should_stop = saved["should_stop"]
        if saved["gradients"] is not None:
            self._apply_gradients(saved["gradients"])
        if saved["buffers_are_due"] is not None:
            trainer.strategy.model.require_forward_param_sync = saved["buffers_are_due"]
        restore_buckets(trainer.strategy.model, saved["buckets"])

    def _apply_module(self, saved: dict[str, Any]) -> None:
        of_module = saved["module"]
        self._attributes.put(unpack(pack(of_module["plain"])), of_module["held"], of_module["others"])
        set_hyperparameters(self.module, copy.deepcopy(saved["module"]["hyperparameters"]))
        set_owned_generators(self.module, saved["module"]["generators"])
        self._apply_extra_state(saved["module"]["extra_state"])
        self._submodules.apply(unpack(pack(saved["module"]["submodules"])))

    def _apply_extra_state(self, saved: dict[str, Any]) -> None:
        for name, state in saved.items():
            if not is_same(self._extra_state[name].get_extra_state(), state):
                self._extra_state[name].set_extra_state(copy.deepcopy(state))

    def _apply_modes(self, saved: list[bool]) -> None:
        for m, training in zip(self._modules, saved, strict=True):
            m.training = training

    def _apply_datamodule(self, saved: dict[str, Any] | None) -> None:
        if saved is None:
            return
        self._own_state(self.trainer.datamodule).put(saved)

    def _check(self, saved: dict[str, Any]) -> None:
        callbacks = [c["class"] for c in saved["callbacks"]], [type(c).__name__ for c in self._callbacks]
        _require_same("callbacks", *callbacks)
        _require_same("modules", [str(len(saved["training"]))], [str(len(self._modules))])
        _require_same("metrics", sorted(saved["metrics"]), sorted(self._metrics))
        require_same_groups(saved["first_groups"], self._surroundings.first_groups)
        _require_same("schedulers", saved["first_schedulers"], self._surroundings.schedulers.first)


def _require_same(kind: str, expected: list[str], found: list[str]) -> None:
    if expected != found:
        raise LayoutMismatchError(
            f"the mirrored run has {kind} {', '.join(expected)}; the relaunched script created "
            f"{', '.join(found)}: it must build the same trainer and model at every start"
        )
