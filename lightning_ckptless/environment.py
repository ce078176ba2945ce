"""The environment variables that lightning_ckptless reads and sets: one name each, in one place.

Set by the user:

| Variable | Meaning |
|---|---|
| `CKPTLESS_RUN_ROOT` | folder that receives one sub-folder per run with its ledger (default `./ckptless`) |
| `CKPTLESS_ARENA_DIR` | folder of the shared memory, where the strategy names none (default `/dev/shm`) |
| `CKPTLESS_FAULTS` | fault script for the run, e.g. `kill:rank=1:step=7` (several: separated by commas) |
| `CKPTLESS_TRACE_DIR` | folder that receives a digest of every step of every rank |
| `CKPTLESS_LIGHTNING` | `lightning.pytorch` or `pytorch_lightning`: what is preloaded (default: as the script) |
| `CKPTLESS_RDZV_ENDPOINT` | `host:port` of the rendezvous, for `python train.py` on several nodes |
| `CKPTLESS_NNODES` | number of nodes, or `MIN:MAX`; ours sets it for its workers, under torchrun it is yours to set |
| `CKPTLESS_FAILURE_DOMAIN` | where this node is, for a `failure_domain` of your own: `rack7`, or `rack=rack7,row=b` |
| `CKPTLESS_FAILURE_DOMAINS_FILE` | the same from a file with a line `host rack7` for every host |
| `CKPTLESS_DURABLE_EVERY_N_STEPS` | optimizer steps between two durable states, in the place of the strategy's option |
| `CKPTLESS_DURABLE_EVERY_S` | seconds between two durable states, in the place of the strategy's option |
| `CKPTLESS_DURABLE_DIR` | folder of the durable states, in the place of the strategy's option |
| `CKPTLESS_UNTESTED_VERSIONS` | `1`: no warning of versions newer than those tested; `warned` where it was given |

Set by the agent for its workers:

| Variable | Meaning |
|---|---|
| `CKPTLESS_AGENT` | process id of our agent; absent under torchrun |
| `CKPTLESS_NODE` | name of this node, unique in the run, stable while its agent lives |
| `CKPTLESS_FAULT_REPORT` | JSON: why this generation exists (`FaultReport`); absent in the first one |
| `CKPTLESS_AGENT_DIR` | folder in which a worker says that it must not be started again, and keeps records of calls |
| `CKPTLESS_SPAWNED_AT` | wall clock (seconds since the epoch) at which this worker was requested |
| `CKPTLESS_GENERATION` | number of the membership that this worker has joined; set by the worker for itself |
| `CKPTLESS_FIT_INDEX` | how many times this worker has entered `fit`; set by the worker for itself |
| `CKPTLESS_MAIN_AT` | wall clock at which this worker entered the user's script |
| `CKPTLESS_LINE` | file descriptor of the line to the agent; taken out when the strategy has opened it |
| `CKPTLESS_STANDBY` | set for a worker that has no rank yet |
| `CKPTLESS_REGROUPING` | number under which this worker meets survivors of a fault; absent where all start together |
| `CKPTLESS_OUTPUT_FILE` | file for what this worker prints until it has joined the others |
| `CKPTLESS_HIDDEN_STREAMS` | file descriptors of its real stdout and stderr until then |
| `CKPTLESS_HYDRA` | the folder that Hydra made for the run, `run=FOLDER` or `sweep=FOLDER`; taken out at once |
| `CKPTLESS_IMPORTS` | how far the agent was with importing what the program imports when it started this worker |
| `CKPTLESS_CALLS` | how often this worker has used its trainer; set by the worker for itself |
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lightning_ckptless.system.private_files import require_private

RUN_ROOT = "CKPTLESS_RUN_ROOT"
ARENA_DIR = "CKPTLESS_ARENA_DIR"
FAULTS = "CKPTLESS_FAULTS"
TRACE_DIR = "CKPTLESS_TRACE_DIR"
LIGHTNING = "CKPTLESS_LIGHTNING"
RDZV_ENDPOINT = "CKPTLESS_RDZV_ENDPOINT"
NNODES = "CKPTLESS_NNODES"
FAILURE_DOMAIN = "CKPTLESS_FAILURE_DOMAIN"
FAILURE_DOMAINS_FILE = "CKPTLESS_FAILURE_DOMAINS_FILE"
DURABLE_EVERY_N_STEPS = "CKPTLESS_DURABLE_EVERY_N_STEPS"
DURABLE_EVERY_S = "CKPTLESS_DURABLE_EVERY_S"
DURABLE_DIR = "CKPTLESS_DURABLE_DIR"
UNTESTED_VERSIONS = "CKPTLESS_UNTESTED_VERSIONS"

AGENT = "CKPTLESS_AGENT"
NODE = "CKPTLESS_NODE"
FAULT_REPORT = "CKPTLESS_FAULT_REPORT"
AGENT_DIR = "CKPTLESS_AGENT_DIR"
SPAWNED_AT = "CKPTLESS_SPAWNED_AT"
GENERATION = "CKPTLESS_GENERATION"
FIT_INDEX = "CKPTLESS_FIT_INDEX"
MAIN_AT = "CKPTLESS_MAIN_AT"
LINE = "CKPTLESS_LINE"
STANDBY = "CKPTLESS_STANDBY"
REGROUPING = "CKPTLESS_REGROUPING"
CALLS = "CKPTLESS_CALLS"
OUTPUT_FILE = "CKPTLESS_OUTPUT_FILE"
HIDDEN_STREAMS = "CKPTLESS_HIDDEN_STREAMS"
HYDRA = "CKPTLESS_HYDRA"
IMPORTS = "CKPTLESS_IMPORTS"


def run_root(env: Mapping[str, str] = os.environ) -> Path:
    """The folder of all runs, where no option names one: as the environment says, or `./ckptless`."""
    return Path(env.get(RUN_ROOT) or "ckptless")


def _kept_in(run_folder: Path) -> Path:
    return run_folder / "variables-of-rank-0.json"


def keep_for_rank_zero(run_folder: Path, variables: Mapping[str, str]) -> None:
    """Keep variables for the next process that is rank 0, by which libraries continue what the last one began.

    Args:
        run_folder: of the run.
        variables: beside those of every worker.

    Raises:
        OSError: the folder cannot be written.
    """
    path = _kept_in(run_folder)
    path.unlink(missing_ok=True)
    # A member of a group that may write to the folder must not have a say in what a process is started with.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        json.dump(dict(variables), file)


def kept_for_rank_zero(run_folder: Path) -> dict[str, str]:
    """The variables that `keep_for_rank_zero` has kept; none where another user may have written them."""
    with suppress(OSError, ValueError):
        require_private(_kept_in(run_folder))
        kept = json.loads(_kept_in(run_folder).read_text())
        if isinstance(kept, dict):
            return {str(name): str(value) for name, value in kept.items()}
    return {}
