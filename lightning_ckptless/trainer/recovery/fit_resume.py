"""The fit loop, entered in the middle of an epoch.

Lightning can restart from a checkpoint file by its own `restarting` flags; they skip validations, train a batch twice
or shift the loggers' steps, depending on the moment. A restored run therefore takes its first epoch by hand, from the
exact counters, with the same public steps of the loops in the same order, and leaves the epochs after it to Lightning.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_ckptless.internals.lightning.loops import FitLoops


def run_restored(
    loops: FitLoops, *, validation_done: bool, restore: Callable[[], None], settle: Callable[[], None]
) -> None:
    """Run the fit loop from a restored state to its end.

    Args:
        loops: the loops of a trainer that is set up for `fit`.
        validation_done: whether validation and the rest behind the restored step are part of the state.
        restore: puts everything back: tensors and host state.
        settle: called when the hooks of a starting fit have run: puts the host state back again, moves the data to
            its position and sets the generators.
    """
    fit = loops.fit
    fit.setup_data()
    fit.reset()
    restore()
    fit.on_run_start()
    settle()
    go_on(loops, validation_done=validation_done)


def run_joined(loops: FitLoops, join: Callable[[], bool]) -> None:
    """Run the fit loop of a process that takes the place of a lost rank.

    The hooks of a starting fit run alone, without a process group: the survivors do not run them again.

    Args:
        loops: the loops of a trainer that is set up for `fit`.
        join: meets the survivors and puts everything back; returns what `go_on` is to be told.
    """
    fit = loops.fit
    fit.setup_data()
    fit.reset()
    fit.on_run_start()
    go_on(loops, validation_done=join())


def go_on(loops: FitLoops, *, validation_done: bool) -> None:
    """Run from a position in the middle of an epoch, where everything is in place, to the end.

    Args:
        loops: the loops.
        validation_done: whether validation and the rest behind the last step is part of what is in place.
    """
    fit = loops.fit
    try:
        with loops.show_model_to_profiler():
            _finish_epoch(loops, validation_done=validation_done)
        fit.on_advance_end()
    except StopIteration:
        loops.finish_fit()
        return
    finally:
        fit.on_iteration_done()
    _run_on(loops)


def _finish_epoch(loops: FitLoops, *, validation_done: bool) -> None:
    epoch, fetcher = loops.epoch, loops.fetcher
    if not validation_done:
        try:
            epoch.on_advance_end(fetcher)
        finally:
            epoch.on_iteration_done()
    while not epoch.done:
        try:
            epoch.advance(fetcher)
            epoch.on_advance_end(fetcher)
        except StopIteration:
            break
        finally:
            epoch.on_iteration_done()


def _run_on(loops: FitLoops) -> None:
    fit = loops.fit
    while not fit.done:
        try:
            fit.on_advance_start()
            fit.advance()
            fit.on_advance_end()
        except StopIteration:
            break
        finally:
            fit.on_iteration_done()
    loops.finish_fit()
