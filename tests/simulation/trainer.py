"""The strategy and the loops of a simulated trainer, as far as a recovery uses them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from lightning_ckptless.protocol.uneven_steps import AtEnd, WhyEnded

if TYPE_CHECKING:
    from tests.simulation.worker import Worker


class Strategy:
    """The strategy of the trainer, as far as a recovery uses it.

    Args:
        worker: the worker.
    """

    obstacle_of_calls = None

    def __init__(self, worker: Worker) -> None:
        self.world = worker.groups
        self._worker = worker

    def obstacle_in_place(self) -> None:
        """There is none."""

    def obstacle_to_another_world(self) -> str:
        """There is none."""
        return ""

    def set_world_ranks(self) -> None:
        """The environment is read when it is used."""

    def place_among_virtual_ranks(self) -> tuple[int, int, int]:
        """See `CkptlessMixin.place_among_virtual_ranks`."""
        return self._worker.trainer.global_rank, self._worker.trainer.world_size, 1

    def rejoin(self, regrouping: int, is_over: Callable[[], bool], when_joined: Callable[[], None]) -> None:
        """See `CkptlessMixin.rejoin`."""
        self.world.open(regrouping, is_over, when_joined)


class Loops:
    """The loops of the trainer: one epoch. Fit loop, epoch loop and fetcher are this one object.

    Args:
        worker: the worker.
    """

    fetcher = None

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    @property
    def fit(self) -> Loops:
        """The fit loop."""
        return self

    @property
    def epoch(self) -> Loops:
        """The epoch loop."""
        return self

    @property
    def done(self) -> bool:
        """Whether the last step has been made."""
        return self._worker.trainer.global_step >= self._worker.world.steps

    @property
    def at_end(self) -> AtEnd:
        """Where training has ended."""
        return AtEnd(self._worker.trainer.global_step, WhyEnded.NO_DATA)

    def show_model_to_profiler(self) -> nullcontext[None]:
        """There is no profiler."""
        return nullcontext()

    def setup_data(self) -> None:
        """There is no data."""

    reset = tidy_up = on_iteration_done = setup_data

    def on_run_start(self) -> None:
        """Run the start hooks."""
        self._worker.running.has_started = True

    def advance(self, _: object = None) -> None:
        """Make a step."""
        self._worker.train()

    def on_advance_end(self, *of_epoch: object) -> None:
        """Called at the end of each step, with the fetcher, and of the epoch."""
        if of_epoch:
            self._worker.commit()

    def finish_fit(self) -> None:
        """End the fit loop."""
        self._worker.loop.ask_to_leave()
