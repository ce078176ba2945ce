"""Entering the fit loop in the middle of an epoch.

Lightning can restart from a checkpoint file with its own `restarting` flags. Depending on the moment, these skip
validations, train a batch twice or shift the loggers' steps. A restored run therefore drives the rest of its first
epoch itself, from the exact counters, by the same public methods of the loops in the same order, and leaves all later
epochs to Lightning.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_ckptless.internals.lightning.loops import FitLoops
from lightning_ckptless.protocol.versions import Version


def run_restored(loops: FitLoops, restore: Callable[[Callable[[], None]], Version]) -> None:
    """Run the fit loop of a new process from a restored version to its end.

    Args:
        loops: the loops of a trainer that is set up for `fit`.
        restore: called with a function that runs the hooks of a starting fit. Calls it once, restores the version, and
            returns it.
    """
    fit = loops.fit
    fit.setup_data()
    fit.reset()
    version = restore(fit.on_run_start)
    continue_fit(loops, validation_done=version.validation_done)


def continue_fit(loops: FitLoops, *, validation_done: bool) -> None:
    """Run from a restored position in the middle of an epoch to the end of `fit`.

    Args:
        loops: the loops, with everything restored.
        validation_done: whether the restored state includes the validation phase after its step.
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
