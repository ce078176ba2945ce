"""The options of `ckptless forecast`, in groups. Apart from the command, because together they are longer than it.

None means that an option was not given: its value then comes from the YAML file, the run, or the defaults of the
forecast, in this order.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lightning_ckptless.protocol.forecast.presets import PRESETS


class FailureDomain(StrEnum):
    """Where replicas of a shard may not be together."""

    NODE = "node"
    RACK = "rack"


_JOB, _OPTIONS, _FAILURES = "Job", "Options under examination", "Failures (one of --preset, --rate, --trace, --from)"
_RECOVERY, _SIMULATION, _FILES = "Duration of recoveries", "Simulation", "Input and output"
_SECONDS, _HOURS = "SECONDS", "HOURS"

Nodes = Annotated[int | None, typer.Option(metavar="N", help="Nodes of the job.", rich_help_panel=_JOB)]
RanksPerNode = Annotated[
    int | None, typer.Option(metavar="N", help="Ranks on each node (default: 8).", rich_help_panel=_JOB)
]
MinNodes = Annotated[
    int | None,
    typer.Option(metavar="N", help="Fewest nodes of an elastic job (default: not elastic).", rich_help_panel=_JOB),
]
RackNodes = Annotated[
    int | None,
    typer.Option(metavar="N", help="Nodes that share a rack, power or a switch (default: 4).", rich_help_panel=_JOB),
]
StepS = Annotated[
    float | None, typer.Option(metavar=_SECONDS, help="Duration of a step without mirroring.", rich_help_panel=_JOB)
]
DataWaitS = Annotated[
    float | None,
    typer.Option(metavar=_SECONDS, help="How long a step waits for its data (default: 0).", rich_help_panel=_JOB),
]
VersionS = Annotated[
    float | None,
    typer.Option(
        metavar=_SECONDS, help="How much longer a mirrored step takes (default: 1 % of it).", rich_help_panel=_JOB
    ),
]
StateBytes = Annotated[
    float | None,
    typer.Option(metavar="BYTES", help="Size of the training state: shows the memory of copies.", rich_help_panel=_JOB),
]
Price = Annotated[
    float | None, typer.Option(metavar="MONEY", help="Price of one rank for one hour.", rich_help_panel=_JOB)
]

MirrorEveryNSteps = Annotated[
    str | None,
    typer.Option(metavar="N", help="As the strategy option: a number, or auto (default).", rich_help_panel=_OPTIONS),
]
MirrorBudget = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="As the strategy option, with auto (default: 0.01).", rich_help_panel=_OPTIONS),
]
Copies = Annotated[
    int | None, typer.Option(metavar="N", help="As the strategy option (default: 1).", rich_help_panel=_OPTIONS)
]
Domain = Annotated[
    FailureDomain | None,
    typer.Option("--failure-domain", help="As the strategy option: node (default) or rack.", rich_help_panel=_OPTIONS),
]
InPlace = Annotated[
    bool | None,
    typer.Option("--in-place/--no-in-place", help="As the strategy option (default: on).", rich_help_panel=_OPTIONS),
]
Standbys = Annotated[
    int | None, typer.Option(metavar="N", help="As the strategy option (default: 0).", rich_help_panel=_OPTIONS)
]
Spares = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Spare nodes, or auto (default): enough for 99 % of the time.",
        rich_help_panel=_OPTIONS,
    ),
]
DurableEveryS = Annotated[
    float | None,
    typer.Option(
        metavar=_SECONDS, help="As the strategy option; 0 for none (default: 3600).", rich_help_panel=_OPTIONS
    ),
]

PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help=f"Published failure rate: {', '.join(known.name for known in PRESETS)}.",
        rich_help_panel=_FAILURES,
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(metavar="X", help="Failures per 1,000 node-days.", rich_help_panel=_FAILURES),
]
Trace = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Recorded failures: lines of start,node,kind,repair.", rich_help_panel=_FAILURES),
]
TraceNodes = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Nodes of the recorded cluster (default: those in the trace).", rich_help_panel=_FAILURES
    ),
]
TraceDays = Annotated[
    float | None,
    typer.Option(
        metavar="DAYS", help="Recorded days (default: from the first to the last failure).", rich_help_panel=_FAILURES
    ),
]
ProcessShare = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of failures that end a process but not its node (default: 0).",
        rich_help_panel=_FAILURES,
    ),
]
WeibullShape = Annotated[
    float | None,
    typer.Option(
        metavar="K",
        help="Weibull shape of the gaps; 1: exponential; less: clustered (default: the preset's, or 1).",
        rich_help_panel=_FAILURES,
    ),
]
BurstShare = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of node failures that also take neighbours; 0: none (default: 0.034).",
        rich_help_panel=_FAILURES,
    ),
]
BurstNodes = Annotated[
    int | None,
    typer.Option(metavar="N", help="Nodes that are lost in a burst (default: 2).", rich_help_panel=_FAILURES),
]
RepairMedianH = Annotated[
    float | None,
    typer.Option(metavar=_HOURS, help="Median repair time of a node (default: 20.4).", rich_help_panel=_FAILURES),
]
RepairMeanH = Annotated[
    float | None,
    typer.Option(metavar=_HOURS, help="Mean repair time of a node (default: 133).", rich_help_panel=_FAILURES),
]

InPlaceS = Annotated[
    float | None,
    typer.Option(
        metavar=_SECONDS, help="Recovery in place from the loss of a process (default: 0.3).", rich_help_panel=_RECOVERY
    ),
]
StandbyS = Annotated[
    float | None,
    typer.Option(metavar=_SECONDS, help="The same with a standby (default: 0.25).", rich_help_panel=_RECOVERY),
]
RelaunchS = Annotated[
    float | None,
    typer.Option(
        metavar=_SECONDS, help="Recovery by a relaunch of all workers (default: 8.5).", rich_help_panel=_RECOVERY
    ),
]
JoinS = Annotated[
    float | None,
    typer.Option(
        metavar=_SECONDS, help="Recovery in which a spare replaces a node (default: 14).", rich_help_panel=_RECOVERY
    ),
]
ShrinkS = Annotated[
    float | None,
    typer.Option(
        metavar=_SECONDS, help="Recovery in which an elastic job shrinks (default: 9).", rich_help_panel=_RECOVERY
    ),
]
GrowS = Annotated[
    float | None,
    typer.Option(
        metavar=_SECONDS, help="Pause when a repaired node rejoins (default: 0.3).", rich_help_panel=_RECOVERY
    ),
]
DurableRestoreS = Annotated[
    float | None,
    typer.Option(
        metavar=_SECONDS,
        help="Reading a durable state, in addition to a relaunch (default: 104).",
        rich_help_panel=_RECOVERY,
    ),
]
DurableStallS = Annotated[
    float | None,
    typer.Option(metavar=_SECONDS, help="Delay of training per durable state (default: 1).", rich_help_panel=_RECOVERY),
]

Days = Annotated[
    float | None, typer.Option(metavar="DAYS", help="Duration of the job (default: 30).", rich_help_panel=_SIMULATION)
]
Trials = Annotated[
    int | None,
    typer.Option(metavar="N", help="Number of simulated jobs (default: 100).", rich_help_panel=_SIMULATION),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Seed of the random numbers (default: 0).", rich_help_panel=_SIMULATION)
]
Alternatives = Annotated[
    bool,
    typer.Option("--alternatives/--no-alternatives", help="Whether to recommend options.", rich_help_panel=_SIMULATION),
]

Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML file with these options, with _ in place of -.", rich_help_panel=_FILES),
]
FromRun = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="RUN", help="Take measured values from the ledger of this run.", rich_help_panel=_FILES
    ),
]
RunRoot = Annotated[
    Path | None,
    typer.Option(help="Folder of all runs (default: CKPTLESS_RUN_ROOT, or ./ckptless).", rich_help_panel=_FILES),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_FILES)]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Draw goodput over the size of the cluster (.png or .svg).", rich_help_panel=_FILES
    ),
]
