"""`ckptless timeline`: draws a run over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning_ckptless.cli.flags import RunRoot

if TYPE_CHECKING:
    from lightning_ckptless.cli.runs import Run
    from lightning_ckptless.cli.view.timeline import Step


def timeline(
    run: Annotated[str | None, typer.Argument(help="Run id or run folder (default: the newest run).")] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", help=".png, .svg or .html file; may be given several times (default: timeline.html)."
        ),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Folder of the run's trace, to show every step.")] = None,
    run_root: RunRoot = None,
) -> None:
    """Draw a run: steps, faults, recoveries with their phases, and goodput over time.

    * `ckptless timeline -o run.png -o run.html`
    * `CKPTLESS_TRACE_DIR=trace python train.py`, then `ckptless timeline --trace trace`
    """
    from lightning_ckptless.cli.runs import find_run

    targets = output or [Path("timeline.html")]
    write_timeline(find_run(run, run_root), trace, targets)
    for target in targets:
        typer.echo(str(target))


def write_timeline(run: Run, trace: Path | None, targets: Sequence[Path]) -> None:
    """Draw a run into files.

    Args:
        run: the run and its ledger.
        trace: folder of its trace; None to use the ledger only.
        targets: `.png`, `.svg` or `.html` files.

    Raises:
        OptionsError: a file has another suffix, the ledger is empty, there is no trace, or matplotlib is missing.
    """
    from lightning_ckptless.cli.view.drawing import draw
    from lightning_ckptless.cli.view.timeline import timeline_of
    from lightning_ckptless.cli.view.timeline_page import timeline_page
    from lightning_ckptless.errors import OptionsError

    for target in targets:
        if target.suffix not in {".png", ".svg", ".html"}:
            raise OptionsError(f"{target}: expected a .png, .svg or .html file")
    if not run.events:
        raise OptionsError(f"{run.folder}: the ledger has no events yet")
    drawn = timeline_of(run.run_id, run.events, steps_of_trace(trace) if trace is not None else ())
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".html":
            target.write_text(timeline_page(drawn))
        else:
            draw(drawn, target, target.suffix[1:])


def steps_of_trace(folder: Path) -> list[Step]:
    """Return the optimizer steps of the lowest rank in a trace, with times in seconds since the epoch.

    Args:
        folder: folder of the trace.

    Raises:
        OptionsError: the folder has no trace.
    """
    from lightning_ckptless.cli.view.timeline import Step
    from lightning_ckptless.errors import OptionsError
    from lightning_ckptless.testing.trace_reader import read_traces

    traces = read_traces(folder)
    if not traces:
        raise OptionsError(f"{folder}: no trace found; a run writes one if CKPTLESS_TRACE_DIR is set")
    steps: list[Step] = []
    for line in traces[min(traces)].lines:
        found = Step(line.at, line.point.step, line.generation)
        # A batch whose gradients are accumulated has the step number of the batch before.
        if line.point.kind == "batch" and (not steps or (found.step, found.generation) != _last(steps)):
            steps.append(found)
    return steps


def _last(steps: list[Step]) -> tuple[int, int]:
    return steps[-1].step, steps[-1].generation
