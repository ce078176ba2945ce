"""The loops of `Trainer.fit`: their counters, their data, and where a step begins and ends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning_ckptless.internals.lightning.combined_loader import (
    iterate_directly,
    iterate_through,
    iterators_of,
    place_of,
    set_place,
)
from lightning_ckptless.internals.lightning.counters import LoopCounters
from lightning_ckptless.internals.lightning.distribution import distribution_of, fabric_module, is_a, module
from lightning_ckptless.internals.lightning.override import Override, remove_overrides
from lightning_ckptless.internals.lightning.versions import validates_by_clock
from lightning_ckptless.protocol.uneven_steps import AtEnd, WhyEnded


class FitLoops:
    """Access to the private parts of the fit loop and its epoch loop.

    Args:
        trainer: a `Trainer` of either distribution.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.fit: Any = trainer.fit_loop
        self.epoch: Any = trainer.fit_loop.epoch_loop
        self.validation: Any = trainer.fit_loop.epoch_loop.val_loop
        self._strategy: Any = trainer.strategy
        self._counters = LoopCounters(self.fit, distribution_of(trainer))

    # ------------------------------------------------------------------ position in the run

    def step_done(self) -> bool:
        """Return whether the last batch ended an optimizer step, and did not just accumulate gradients."""
        return not self.epoch._should_accumulate()

    @property
    def begins_step(self) -> bool:
        """Whether the batch that has just begun is the first of an optimizer step."""
        return (int(self.epoch.batch_progress.current.ready) - 1) % int(self.trainer.accumulate_grad_batches) == 0

    @property
    def ranks_agree_on_validation(self) -> bool:
        """Whether validation follows the same batches on all ranks; with a time-based interval, each has its clock."""
        return not validates_by_clock(self.trainer)

    def validation_may_follow(self, fetcher: Any) -> bool:
        """Return whether this rank may run validation after the last batch; time-based validation always may."""
        if not self.ranks_agree_on_validation:
            return True
        return bool(self.epoch._should_check_val_fx(fetcher)) and not self.epoch._skip_next_val

    @property
    def batches_that_stepped(self) -> int:
        """The step number of the next row for the loggers."""
        return int(self.epoch._batches_that_stepped)

    @property
    def step(self) -> int:
        """The number of optimizer steps so far: `trainer.global_step`, in half the calls."""
        epoch, module = self.epoch, self._strategy.lightning_module
        if module is None or module.automatic_optimization:
            return int(epoch.automatic_optimization.optim_progress.optimizer.step.total.completed)
        return int(epoch.manual_optimization.optim_step_progress.total.completed)

    @property
    def is_out_of_data(self) -> bool:
        """Whether the last batch was the last of its epoch."""
        return bool(self.epoch.batch_progress.is_last_batch)

    @property
    def epoch_ends(self) -> bool:
        """Whether no further batch of this epoch follows, since its data or the training has ended."""
        return self.is_out_of_data or bool(self.epoch.done)

    @property
    def at_end(self) -> AtEnd:
        """The step at which training has ended, and why."""
        why = WhyEnded.ASKED if self.trainer.should_stop else WhyEnded.NO_DATA
        return AtEnd(int(self.trainer.global_step), why)

    @property
    def is_at_beginning(self) -> bool:
        """Whether no training step has been made yet."""
        return not self.trainer.global_step and not self.trainer.current_epoch

    # ------------------------------------------------------------------ counters

    def counters(self) -> dict[str, Any]:
        """Return all progress counters and flags of the loops, as plain data."""
        return {
            "fit_loop": self._counters.read(),
            "skip_next_validation": self.epoch._skip_next_val,
            "validation_has_run": self.validation._has_run,
            "train_data_epoch": self.fit._last_train_dl_reload_epoch,
            "validation_data_epoch": self.validation._last_val_dl_reload_epoch,
        }

    def set_counters(self, saved: dict[str, Any]) -> None:
        """Restore the counters, without Lightning's own restart logic."""
        self.fit.load_state_dict(copy.deepcopy(saved["fit_loop"]))
        for loop in self._all(self.fit):
            loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
            if hasattr(loop, "_restart_stage"):
                loop.reset_restart_stage()
        self.fit._combined_loader_states_to_load = []
        self.epoch._skip_next_val = saved["skip_next_validation"]
        self.validation._has_run = saved["validation_has_run"]
        self.fit._last_train_dl_reload_epoch = saved["train_data_epoch"]
        self.validation._last_val_dl_reload_epoch = saved["validation_data_epoch"]

    def _all(self, loop: Any) -> Iterator[Any]:
        base = module(distribution_of(self.trainer), "loops.loop")._Loop
        yield loop
        for value in vars(loop).values():
            if isinstance(value, base):
                yield from self._all(value)

    # ------------------------------------------------------------------ data

    @property
    def combined_loader(self) -> Any:
        """The training data: one or more dataloaders in one iterator."""
        return self.fit._combined_loader

    def wrap_data_source(self, loop: str, around: Callable[[Callable[[], Any]], Any]) -> None:
        """Wrap the call that returns the user's dataloaders.

        Args:
            loop: `train` or `validation`.
            around: called with the original function.
        """
        override = Override(self._data_sources[loop], "dataloader", lambda: around(override.original))

    @property
    def _data_sources(self) -> dict[str, Any]:
        return {"train": self.fit._data_source, "validation": self.validation._data_source}

    def iterate_data_through(self, stand_in: Callable[[Any], Any]) -> None:
        """Make training iterate over stand-ins of its dataloaders.

        Args:
            stand_in: creates the stand-in of a dataloader.
        """
        combined_class = module(distribution_of(self.trainer), "utilities.combined_loader").CombinedLoader

        def combined(own: Callable[[], Any]) -> Any:
            made = own()
            whole = made if isinstance(made, combined_class) else combined_class(made, "max_size_cycle")
            return iterate_through(whole, stand_in)

        self.wrap_data_source("train", combined)

    def make_data_again(self, loop: str) -> None:
        """Request the dataloaders of a loop from the script again.

        Args:
            loop: `train` or `validation`.
        """
        if loop == "train":
            if self.combined_loader is not None:
                self.combined_loader.reset()
            self.forget_training_data()
            self.fit.setup_data()
            return
        self.forget_validation_data()
        self.trainer.validating = True
        try:
            self.validation.setup_data()
        finally:
            self.trainer.training = True

    @property
    def fetcher(self) -> Any:
        """The fetcher, which passes batches from the combined loader to the epoch loop."""
        return self.fit._data_fetcher

    def data_position(self) -> dict[str, Any]:
        """Return the position of the fetcher and the combined loader."""
        return {
            "fetched": self.fetcher.fetched,
            "buffered": len(getattr(self.fetcher, "batches", ())),
            **place_of(self.combined_loader),
        }

    def reopen_data(self, saved: dict[str, Any], before_buffer: Callable[[], None], unaware: Sequence[int]) -> None:
        """Create new iterators at a saved position; the positions of the loaders must be set already.

        Args:
            saved: result of `data_position`.
            before_buffer: called before prefetched batches are fetched again.
            unaware: indices of iterables without a position, whose batches are read again and dropped.
        """
        fetcher, loader = self.fetcher, self.combined_loader
        loader.reset()
        read = saved["index"] - saved["buffered"]
        if is_a(fetcher, "loops.fetchers", "_PrefetchDataFetcher"):
            plain = module(distribution_of(self.trainer), "loops.fetchers")._DataFetcher
            plain.__iter__(fetcher)
            self._read_again(unaware, read)
            if saved["buffered"]:
                before_buffer()
            for _ in range(saved["buffered"]):
                fetcher.batches.append(plain.__next__(fetcher))
        else:
            iter(fetcher)
            self._read_again(unaware, read)
        set_place(loader, saved["index"], saved["consumed"])
        fetcher.fetched = saved["fetched"]
        if fetcher.length is not None:
            fetcher.done = fetcher.fetched >= fetcher.length
        elif hasattr(fetcher, "batches"):
            fetcher.done = not fetcher.batches
        fetcher._start_profiler = self.epoch._on_before_fetch
        fetcher._stop_profiler = self.epoch._on_after_fetch

    def _read_again(self, unaware: Sequence[int], batches: int) -> None:
        for index in unaware:
            for _ in range(batches):
                next(iterators_of(self.combined_loader)[index])

    def set_sampler_epochs(self, combined_loader: Any = None) -> None:
        """Set the epoch of every sampler of the training data.

        Args:
            combined_loader: the dataloaders; None for those of the fit loop.
        """
        set_epoch = fabric_module(distribution_of(self.trainer), "utilities.data")._set_sampler_epoch
        combined = self.combined_loader if combined_loader is None else combined_loader
        for loader in combined.flattened:
            set_epoch(loader, self.fit.epoch_progress.current.processed)

    @property
    def length(self) -> int:
        """Number of batches of this epoch; 0 if unknown."""
        most = self.fit.max_batches
        return int(most) if most != float("inf") else 0

    @property
    def batches_done(self) -> int:
        """Number of batches of this epoch that have run."""
        return int(self.epoch.batch_progress.current.ready)

    def set_length(self, most: int) -> None:
        """Set the number of batches of this epoch."""
        if most == self.fit.max_batches:
            return
        self.fit.max_batches = most
        # The attribute does not exist with a time-based validation interval.
        interval = vars(self.trainer).get("val_check_interval")
        if isinstance(interval, float) and self.trainer.val_check_batch is not None:
            self.trainer.val_check_batch = max(1, int(most * interval))

    @property
    def batches_begun(self) -> int:
        """Number of batches that were begun since the start of the run."""
        return int(self.epoch.batch_progress.total.ready)

    def batches_in(self, counters: dict[str, Any]) -> tuple[int, int]:
        """Return the batches done since the start of the run, and in the epoch, according to saved counters."""
        progress = counters["fit_loop"]["epoch_loop.batch_progress"]
        return int(progress["total"]["ready"]), int(progress["current"]["ready"])

    def limited(self, length: int) -> int:
        """Return how many batches of an epoch are used, given the length of its data."""
        distribution = distribution_of(self.trainer)
        stage = module(distribution, "trainer.states").RunningStage.TRAINING
        parse = module(distribution, "trainer.connectors.data_connector")._parse_num_batches
        return int(parse(stage, length, self.trainer.limit_train_batches))

    def limit_batches(self, most: int) -> None:
        """Set the number of batches of the iteration that is about to begin."""
        self.combined_loader.limits = [most]
        self.set_length(most)

    @property
    def validation_loader(self) -> Any:
        """The validation data; None before it is set up."""
        return self.validation._combined_loader

    def after_setup_of_validation_data(self, do: Callable[[], None]) -> None:
        """Call a function whenever the validation loop has set up its data or kept existing data."""

        def both() -> None:
            override.original()
            do()

        override = Override(self.validation, "setup_data", both)

    def around_setup_of_data(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call functions whenever the fit loop sets up its training data or keeps existing data.

        Args:
            before: called before that.
            after: called after it; in an epoch other than the first, the data is not iterated over before.
        """

        def all_three() -> None:
            before()
            override.original()
            after()

        override = Override(self.fit, "setup_data", all_three)

    def before_end_of_run(self, do: Callable[[], None]) -> None:
        """Call a function after the last epoch, before the hooks for the end of the run."""
        self._precede("on_run_end", do)

    def _precede(self, name: str, do: Callable[[], None]) -> None:
        def both() -> None:
            do()
            override.original()

        override = Override(self.fit, name, both)

    def forget_training_data(self) -> None:
        """Make the fit loop set up its training data again."""
        self.fit._combined_loader = None

    def replace_training_data(self, combined_loader: Any) -> None:
        """Train on other dataloaders with the same number of batches, to be opened by `reopen_data`."""
        self.combined_loader.reset()
        self.fit._combined_loader = combined_loader
        self.fetcher.setup(combined_loader)

    def forget_validation_data(self) -> None:
        """Make the next validation set up its dataloaders again."""
        self.validation._combined_loader = None

    # ------------------------------------------------------------------ after a fault

    def tidy_up(self) -> None:
        """Reset the state that an exception leaves in the trainer and model when it interrupts a step or validation."""
        self.trainer.training = True
        module_ = self.trainer.lightning_module
        module_._current_fx_name = None
        _put_back_forward(module_)
        for parameter in module_.parameters():
            parameter.grad = None

    def around_fetches(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """Call functions before and after each fetch of a training batch by Lightning's fetcher."""

        def before() -> None:
            begun.original()
            begin()

        def after() -> None:
            end()
            ended.original()

        begun = Override(self.epoch, "_on_before_fetch", before)
        ended = Override(self.epoch, "_on_after_fetch", after)

    def around_validation(self, span: Callable[[], AbstractContextManager[None]]) -> None:
        """Run each validation inside a context."""

        def inside() -> Any:
            with span():
                return override.original()

        override = Override(self.validation, "run", inside)

    def run_by(self, run: Callable[[Callable[[], None]], None]) -> None:
        """Wrap the run of the fit loop.

        Args:
            run: called with the original function.
        """
        override = Override(self.fit, "run", lambda: run(override.original))

    @contextmanager
    def without_overrides(self) -> Iterator[None]:
        """Context without our overrides of the loops; their dataloaders stay wrapped."""
        replaced: dict[Any, tuple[str, ...]] = {
            self.fit: ("run", "setup_data", "on_run_end"),
            self.epoch: ("advance", "on_advance_end", "_on_before_fetch", "_on_after_fetch"),
            self.validation: ("run", "setup_data"),
        }
        found = [(loop, name, vars(loop).get(name)) for loop, names in replaced.items() for name in names]
        overrides = [(loop, name, override) for loop, name, override in found if isinstance(override, Override)]
        for loop, name, _ in overrides:
            remove_overrides(loop, name)
        try:
            yield
        finally:
            for loop, name, override in overrides:
                setattr(loop, name, override)

    def give_back(self) -> None:
        """Restore the original methods and dataloaders of the loops."""
        remove_overrides(self.fit, "run", "setup_data", "on_run_end")
        remove_overrides(self.epoch, "_on_before_fetch", "_on_after_fetch")
        remove_overrides(self.validation, "run", "setup_data")
        for source in self._data_sources.values():
            remove_overrides(source, "dataloader")
        if self.combined_loader is not None:
            iterate_directly(self.combined_loader)

    # ------------------------------------------------------------------ running

    def finish_fit(self) -> None:
        """Run what the fit loop does after its last epoch."""
        self.fit._restarting = False
        self.fit.on_run_end()

    def show_model_to_profiler(self) -> Any:
        """Return the profiler's span of an epoch, as opened by the fit loop."""
        return self.trainer.profiler.profile("run_training_epoch")


def _put_back_forward(module_: Any) -> None:
    """Restore `forward`, which the strategy replaces during the forward pass of a wrapped model."""
    forward = vars(module_).get("forward")
    if getattr(forward, "__name__", "") == "wrapped_forward":
        inside = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))
        module_.forward = inside["original_forward"].cell_contents
