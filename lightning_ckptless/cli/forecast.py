"""`ckptless forecast`: which goodput to expect, and which options to choose."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lightning_ckptless.cli import forecast_options as options

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_ckptless.protocol.forecast.forecast import Forecast, Tick
    from lightning_ckptless.protocol.forecast.inputs import Forecastable

_SHOWN_AFTER_S = 1.0
_COMMAND = ("config", "from_run", "run_root", "trace", "alternatives", "as_json", "plot")
_PLOT_SUFFIXES = (".png", ".svg")


def forecast(
    nodes: options.Nodes = None,
    ranks_per_node: options.RanksPerNode = None,
    min_nodes: options.MinNodes = None,
    rack_nodes: options.RackNodes = None,
    step_s: options.StepS = None,
    data_wait_s: options.DataWaitS = None,
    version_s: options.VersionS = None,
    state_bytes: options.StateBytes = None,
    price: options.Price = None,
    mirror_every_n_steps: options.MirrorEveryNSteps = None,
    mirror_budget: options.MirrorBudget = None,
    copies: options.Copies = None,
    failure_domain: options.Domain = None,
    in_place: options.InPlace = None,
    standbys: options.Standbys = None,
    spares: options.Spares = None,
    durable_every_s: options.DurableEveryS = None,
    preset: options.PresetName = None,
    rate: options.Rate = None,
    trace: options.Trace = None,
    trace_nodes: options.TraceNodes = None,
    trace_days: options.TraceDays = None,
    process_share: options.ProcessShare = None,
    weibull_shape: options.WeibullShape = None,
    burst_share: options.BurstShare = None,
    burst_nodes: options.BurstNodes = None,
    repair_median_h: options.RepairMedianH = None,
    repair_mean_h: options.RepairMeanH = None,
    in_place_s: options.InPlaceS = None,
    standby_s: options.StandbyS = None,
    relaunch_s: options.RelaunchS = None,
    join_s: options.JoinS = None,
    shrink_s: options.ShrinkS = None,
    grow_s: options.GrowS = None,
    durable_restore_s: options.DurableRestoreS = None,
    durable_stall_s: options.DurableStallS = None,
    days: options.Days = None,
    trials: options.Trials = None,
    seed: options.Seed = None,
    alternatives: options.Alternatives = True,
    config: options.Config = None,
    from_run: options.FromRun = None,
    run_root: options.RunRoot = None,
    as_json: options.AsJson = False,
    plot: options.Plot = None,
) -> None:
    """Forecast the goodput of a job, and recommend options: simulates failures by the rules of the protocol.

    * `ckptless forecast --nodes 128 --step-s 10 --preset rsc-1`: a job of 1,024 ranks at a published failure rate
    * `ckptless forecast --from RUN --nodes 64`: what a run has measured, on 64 nodes
    * `ckptless forecast --nodes 128 --step-s 10 --rate 6.5 --min-nodes 120 --spares 0`: elastic, without spares
    * `ckptless forecast --nodes 400 --step-s 10 --trace faults.csv --trace-days 345`: replay recorded failures
    * `ckptless forecast --config job.yaml --price 2.5 --plot ettr.png`: in money, and as a curve over cluster sizes

    A failure takes a node unless `--process-share` says otherwise. A lost node is replaced by a spare, or the job waits
    for a repair, or continues on fewer nodes (`--min-nodes`). If a provider replaces nodes quickly, give that time as
    `--repair-median-h` and `--repair-mean-h`, with `--spares 0`. Every value that is assumed is printed.

    Nothing is trained, and no GPU is needed.
    """
    given = {name: value for name, value in locals().items() if name not in _COMMAND and value is not None}
    from lightning_ckptless.cli.forecast_inputs import collect

    check_plot(plot)
    what, assumed = collect(given, config, trace, from_run, run_root)
    report(simulate(what, alternatives=alternatives), what, assumed, as_json=as_json, plot=plot)


def report(found: Forecast, what: Forecastable, assumed: Sequence[str], *, as_json: bool, plot: Path | None) -> None:
    """Print a forecast, as tables or JSON, and draw it if asked to."""
    from lightning_ckptless.cli.view.forecast import show_forecast

    if plot is not None:
        from lightning_ckptless.cli.view.forecast_plot import draw_comparison

        draw_comparison(found, what, plot)
    if as_json:
        typer.echo(json.dumps(as_dict(found, what, assumed), indent=1))
    else:
        show_forecast(found, what, assumed)


def simulate(what: Forecastable, *, alternatives: bool) -> Forecast:
    """Forecast a job, with a progress bar on stderr.

    Args:
        what: checked inputs.
        alternatives: whether to recommend options.
    """
    import numpy as np
    from rich.console import Console

    from lightning_ckptless.protocol.forecast.forecast import forecast as run_forecast

    with progress(Console(stderr=True)) as tick:
        return run_forecast(what, np.random.default_rng(what.inputs.seed), tick, alternatives=alternatives)


def as_dict(found: Forecast, what: Forecastable, assumed: Sequence[str]) -> dict[str, Any]:
    """The forecast as plain values, for JSON."""
    from lightning_ckptless.protocol.forecast.price import arena_bytes_per_node, lost_money

    inputs = what.inputs
    return {
        "inputs": asdict(inputs),
        "assumed": list(assumed),
        "failures": what.failures_text,
        "arena_bytes_per_node": arena_bytes_per_node(found.job, inputs.state_bytes),
        "lost_money": lost_money(found.expected, found.job, inputs.price),
        **asdict(found),
    }


def check_plot(target: Path | None) -> None:
    """Check the name of the picture and that it can be drawn, before anything is simulated.

    Raises:
        OptionsError: the suffix is not known, or matplotlib is not installed.
    """
    from importlib.util import find_spec

    from lightning_ckptless.errors import OptionsError

    if target is None:
        return
    if target.suffix not in _PLOT_SUFFIXES:
        raise OptionsError(f"{target}: expected a {' or '.join(_PLOT_SUFFIXES)} file")
    if find_spec("matplotlib") is None:
        raise OptionsError("drawing a forecast requires matplotlib: pip install matplotlib")


@contextmanager
def progress(console: Console, clock: Callable[[], float] = time.monotonic) -> Iterator[Tick]:
    """A progress bar that appears if the simulation takes longer than a second.

    Args:
        console: terminal to draw on; nothing is drawn if it is none.
        clock: returns the time in seconds.

    Yields:
        A function to be called after each piece of the simulation.
    """
    from rich.progress import Progress, TaskID

    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    began_at, tasks = clock(), dict[str, TaskID]()

    def tick(of: str, total: int | None) -> None:
        if of not in tasks:
            tasks[of] = bar.add_task(f"simulating {of}", total=total)
        bar.advance(tasks[of])
        if not bar.live.is_started and clock() - began_at > _SHOWN_AFTER_S:
            bar.start()

    try:
        yield tick
    finally:
        bar.stop()
