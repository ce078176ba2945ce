"""`make demo`: train the small GPT on two CPU ranks, kill ranks, and show that the results are identical.

The same script runs twice, undisturbed and with faults. One of the faults only flips a bit in a rank's memory. Then
every step of every rank is compared bit for bit, and a timeline of the run with faults is drawn. Finally one rank gets
a bad batch: the loss jumps, all ranks are rewound to the step before it, and the batch is skipped.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

from lightning_ckptless.cli.drill import run_and_report
from lightning_ckptless.cli.runs import find_run
from lightning_ckptless.cli.timeline import write_timeline
from lightning_ckptless.testing.drill import run_variant

SCRIPT = Path(__file__).parent / "char_gpt" / "train.py"
SIZES = ["--steps", "120", "--layers", "2", "--width", "96", "--batch-size", "8", "--failure-domain", "rank"]
FAULTS = {
    "kill:rank=1:step=20": "rank 1 is killed in the forward pass",
    "kill:rank=0:step=45:at=backward": "rank 0 is killed in the backward pass",
    "kill:rank=1:step=60:at=validation": "rank 1 is killed in the validation after step 60",
    "raise:rank=0:step=75:at=optimizer_step": "rank 0 raises an exception in the optimizer step",
    "flip:rank=1:step=90:tensor=optimizer/0/head.weight/exp_avg:element=100:bit=22": "a bit flips in memory on rank 1",
    "kill:rank=all:step=100": "both ranks are killed at once",
}
BAD_BATCH_AT = 40
OUTPUT = Path("demo_output")


def main() -> int:
    console = Console()
    console.print("[bold]Training a GPT of 230,000 parameters on Python's standard library, on two ranks.[/bold]")
    for description in FAULTS.values():
        console.print(f"  - {description}")
    console.print()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    report = run_and_report([str(SCRIPT), *SIZES], list(FAULTS), OUTPUT, nproc=2, isolate=True)
    pictures = [OUTPUT / "timeline.png", OUTPUT / "timeline.html"]
    write_timeline(find_run(None, report.faulted.folder / "runs"), report.faulted.trace, pictures)
    console.print()
    for event in report.faulted.events:
        if event.event == "divergence":
            where = ", ".join(event.fields["tensors"])
            console.print(f"The flipped bit was found in {where}: all ranks went back to the step before it.")
    console.print("\nTimeline of the run with faults:")
    for picture in pictures:
        console.print(f"  {picture.absolute()}", soft_wrap=True)
    return 0 if report.identical and show_rewind(console) else 1


def show_rewind(console: Console) -> bool:
    """Train once more with a bad batch; return whether the run was rewound and has skipped it."""
    console.print(f"\n[bold]Rank 1 gets a batch with random targets in step {BAD_BATCH_AT}.[/bold]")
    command = [str(SCRIPT), *SIZES, "--bad-batch-at", str(BAD_BATCH_AT)]
    run = run_variant(command, OUTPUT / "rewound", nproc=2, isolate=True)
    rewinds = [event.fields for event in run.events if event.event == "rewind"]
    for rewind in rewinds:
        console.print(f"  rewound {rewind['reason']}", soft_wrap=True)
        console.print(f"  {rewind['skipped_batches']} batch of each rank skipped; {rewind['took_s']:.2f} s")
    return run.exit_code == 0 and len(rewinds) == 1


if __name__ == "__main__":
    sys.exit(main())
