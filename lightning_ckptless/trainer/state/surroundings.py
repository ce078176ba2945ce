"""State that hooks change outside module, callbacks and datamodule: settings, validation data, objects those hold.

Changes in training dataloaders are part of the data position, since the sample order depends on them. Validation
dataloaders may be created long after a version is restored: their state is kept until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from torch.utils.data import DataLoader

from lightning_ckptless.internals.lightning.combined_loader import stand_ins
from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.internals.lightning.settings import kept_elsewhere, optimizer_wrappers, settings_of
from lightning_ckptless.trainer.data.dataset_generators import LoaderGenerators
from lightning_ckptless.trainer.data.loader import LoaderTracker, holders, tracker_of, watch_attributes
from lightning_ckptless.trainer.state.changes import SETTINGS, Changed, Changes
from lightning_ckptless.trainer.state.parameter_groups import names_in_groups
from lightning_ckptless.trainer.state.schedulers import Schedulers
from lightning_ckptless.trainer.state.user_objects import UserObjects, watch_before_start
from lightning_ckptless.trainer.state.watch import Watched

_VALIDATION = "trainer.fit_loop.epoch_loop.val_loop"


class Surroundings:
    """Watches this state from the setup of a fit on, before its first training hook.

    Args:
        trainer: its strategy is set up.
        tell: called once with the name of each attribute whose change would be lost with the process.

    Attributes:
        schedulers: the schedulers that the trainer started with, and later ones.
        first_groups: parameter names in the groups that the optimizers started with.
    """

    def __init__(self, trainer: Any, tell: Callable[[str], None] = lambda _: None) -> None:
        self._trainer = trainer
        self._loops = FitLoops(trainer)
        self._tell = tell
        self._told: set[str] = set()
        self.schedulers = Schedulers(trainer)
        self.first_groups = names_in_groups(trainer)
        settings = [*settings_of(trainer), *optimizer_wrappers(trainer)]
        self._settings = Changes(settings, kept_elsewhere(trainer), policy=SETTINGS)
        self._validation: list[Changes] = []
        self._generators: list[LoaderGenerators] = []
        self._waiting_generators: list[Any] = []
        self._validation_data: Any = None
        self._waiting: list[Changed] = []
        self._waiting_settings: Changed = {}
        self._earlier = watch_before_start(trainer)
        self._objects: UserObjects | None = None

    def watch_objects(self) -> None:
        """Start watching the user's objects: the start hooks of the fit have created them."""
        known = {identity for tracker in self._trackers() for identity in tracker.attributes.identities()}
        self._objects = UserObjects(self._trainer, known, self._earlier)

    def unreadable(self) -> list[str]:
        """Return the user's objects whose state cannot be read."""
        return [] if self._objects is None else self._objects.unreadable()

    def note_loss(self, path: str, name: str = "") -> None:
        """Report, once, an attribute whose change would be lost with the process."""
        whole = f"{path}.{name}" if name else path
        if whole not in self._told:
            self._told.add(whole)
            self._tell(whole)

    def watched(self) -> Iterator[Watched]:
        """Yield the objects that are watched now."""
        # To read the position of a dataloader that keeps it by itself calls code that may change attributes.
        of_data = [tracker.attributes for tracker in self._trackers() if not tracker.states_itself]
        objects = () if self._objects is None else self._objects.changes
        return chain.from_iterable(each.watched for each in (self._settings, *self._validation, *of_data, *objects))

    def capture(self) -> dict[str, Any]:
        """Return what has changed so far."""
        self._look_for_validation_data()
        state = {
            "settings": self._settings.capture(),
            "validation": self._waiting or [changes.capture() for changes in self._validation],
            "validation_generators": self._waiting_generators or [each.capture() for each in self._generators],
            "objects": self.objects(),
        }
        for name in () if self._objects is None else self._objects.lost():
            self.note_loss(name)
        self._report("val", self._validation)
        return state

    def report_training_data(self) -> None:
        """Report what has changed in the training data and cannot be captured. Called when its position was read."""
        self._report("train", [tracker.attributes for tracker in self._trackers()])

    def _report(self, stage: str, watched: Iterable[Changes]) -> None:
        for index, changes in enumerate(watched):
            for name in changes.lost():
                self._tell(f"{stage} dataloader {index}: {name}")

    def objects(self) -> dict[str, Any]:
        """Return what has changed in the user's objects."""
        return {} if self._objects is None else self._objects.capture()

    def put_back_objects(self, saved: dict[str, Any]) -> None:
        """Restore what `objects` returned."""
        if self._objects is not None and saved:
            self._objects.apply(saved)

    def apply(self, saved: dict[str, Any], *, with_settings: bool = True) -> None:
        """Restore what was captured; validation dataloaders as soon as they exist.

        Args:
            saved: the result of `capture`.
            with_settings: whether to restore the trainer's settings too.
        """
        if with_settings:
            self._settings.apply(saved["settings"])
        self.put_back_objects(saved["objects"])
        self._look_for_validation_data()
        self._waiting, self._waiting_settings = saved["validation"], saved["settings"]
        self._waiting_generators = saved["validation_generators"]
        if self._validation_data is not None:
            self._fill_validation_data()

    def on_validation_data(self) -> None:
        """Start watching new validation dataloaders, and restore pending state into them."""
        is_new = self._look_for_validation_data()
        if is_new and self._waiting:
            self._fill_validation_data()
            # Setup derived their lengths from settings that the saved state may override.
            self._settings.apply(self._waiting_settings, only=_VALIDATION)

    def _fill_validation_data(self) -> None:
        for changes, saved in zip(self._validation, self._waiting, strict=False):
            changes.apply(saved)
        for generators, states in zip(self._generators, self._waiting_generators, strict=False):
            generators.apply(states)
        self._waiting, self._waiting_generators = [], []

    def _look_for_validation_data(self) -> bool:
        combined = self._loops.validation_loader
        if combined is self._validation_data:
            return False
        self._validation_data = combined
        found = [] if combined is None else combined.flattened
        loaders = [loader for loader in found if isinstance(loader, DataLoader)]
        self._validation = [watch_attributes(loader) for loader in loaders]
        self._generators = [LoaderGenerators(loader, holders(loader)) for loader in loaders]
        return True

    def _trackers(self) -> list[LoaderTracker]:
        combined = self._loops.combined_loader
        loaders = [] if combined is None else stand_ins(combined)
        return [tracker for loader in loaders if (tracker := tracker_of(loader)) is not None]
