"""`ckptless timeline`: a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lightning_ckptless.cli.runs import Run
    from lightning_ckptless.cli.view.story import Step


def timeline(
    run: Annotated[str | None, typer.Argument(help="Id or folder of the run; the newest if left out.")] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="A .png or .html file; several are allowed (default: timeline.html)."),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Folder of the run's trace: shows every step.")] = None,
    run_root: Annotated[
        Path | None, typer.Option(help="Folder of all runs (default: CKPTLESS_RUN_ROOT, or ./ckptless).")
    ] = None,
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
        run: with its ledger.
        trace: folder of its trace; None for what the ledger alone tells.
        targets: files that end with `.png` or `.html`.

    Raises:
        OptionsError: another kind of file, an empty ledger, no trace, or no matplotlib.
    """
    from lightning_ckptless.cli.view.drawing import draw
    from lightning_ckptless.cli.view.page import page
    from lightning_ckptless.cli.view.story import story_of
    from lightning_ckptless.errors import OptionsError

    for target in targets:
        if target.suffix not in {".png", ".html"}:
            raise OptionsError(f"{target}: expected a file that ends with .png or .html")
    if not run.events:
        raise OptionsError(f"{run.folder}: its ledger holds no events yet")
    story = story_of(run.run_id, run.events, steps_of_trace(trace) if trace is not None else ())
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".png":
            draw(story, target, "png")
        else:
            target.write_text(page(story))


def steps_of_trace(folder: Path) -> list[Step]:
    """The optimizer steps of the first rank in a trace, with their instants in seconds since the epoch.

    Args:
        folder: of the trace.

    Raises:
        OptionsError: there is no trace in it.
    """
    from lightning_ckptless.cli.view.story import Step
    from lightning_ckptless.errors import OptionsError
    from lightning_ckptless.testing.traces import read_traces

    traces = read_traces(folder)
    if not traces:
        raise OptionsError(f"{folder}: no trace in it; a run writes one where CKPTLESS_TRACE_DIR says")
    steps: list[Step] = []
    for line in traces[min(traces)].lines:
        found = Step(line.at, line.point.step, line.generation)
        # Batches whose gradients are accumulated finish no step.
        if line.point.kind == "batch" and (not steps or (found.step, found.generation) != _last(steps)):
            steps.append(found)
    return steps


def _last(steps: list[Step]) -> tuple[int, int]:
    return steps[-1].step, steps[-1].generation
