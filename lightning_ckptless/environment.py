"""All environment variables that lightning_ckptless reads and sets.

Set by the user:

| Variable | Meaning |
|---|---|
| `CKPTLESS_RUN_ROOT` | folder with one sub-folder per run, which holds its ledger (default `./ckptless`) |
| `CKPTLESS_ARENA_DIR` | folder for shared memory, if the strategy does not set one (default `/dev/shm`) |
| `CKPTLESS_FAULTS` | fault script for the run, e.g. `kill:rank=1:step=7` (separate several with commas) |
| `CKPTLESS_TRACE_DIR` | folder that receives a digest of every step of every rank |
| `CKPTLESS_LIGHTNING` | distribution to preload: `lightning.pytorch` or `pytorch_lightning` (default: the script's) |
| `CKPTLESS_RDZV_ENDPOINT` | `host:port` of the rendezvous, for `python train.py` on several nodes |
| `CKPTLESS_NNODES` | number of nodes, or `MIN:MAX`; set by our agent for its workers; set it yourself under torchrun |
| `CKPTLESS_FAILURE_DOMAIN` | location of this node for a custom `failure_domain`: `rack7`, or `rack=rack7,row=b` |
| `CKPTLESS_FAILURE_DOMAINS_FILE` | file with the locations of all nodes, one line `host rack7` per host |
| `CKPTLESS_DURABLE_EVERY_N_STEPS` | optimizer steps between two durable states; overrides the strategy's option |
| `CKPTLESS_DURABLE_EVERY_S` | seconds between two durable states; overrides the strategy's option |
| `CKPTLESS_DURABLE_DIR` | folder of the durable states; overrides the strategy's option |
| `CKPTLESS_UNTESTED_VERSIONS` | `1` silences the warning about untested versions; set to `warned` once it was shown |

Set by the agent for its workers:

| Variable | Meaning |
|---|---|
| `CKPTLESS_AGENT` | process id of our agent; absent under torchrun |
| `CKPTLESS_NODE` | name of this node, unique within the run and stable for the life of its agent |
| `CKPTLESS_FAULT_REPORT` | JSON: the fault that led to this generation (`FaultReport`); absent in the first |
| `CKPTLESS_AGENT_DIR` | folder for exit reports, which can forbid a relaunch, and for records of trainer calls |
| `CKPTLESS_SPAWNED_AT` | wall clock (seconds since the epoch) at which this worker was requested |
| `CKPTLESS_GENERATION` | number of the generation that this worker has joined; set by the worker for itself |
| `CKPTLESS_FIT_INDEX` | how many times this worker has entered `fit`; set by the worker for itself |
| `CKPTLESS_MAIN_AT` | wall clock (seconds since the epoch) at which this worker entered the user's script |
| `CKPTLESS_CHANNEL` | file descriptor of the channel to the agent; removed once the strategy has opened it |
| `CKPTLESS_STANDBY` | set for a worker that has no rank yet |
| `CKPTLESS_REGROUPING` | number of the rendezvous with the survivors of a fault; absent if all workers start together |
| `CKPTLESS_OUTPUT_FILE` | file that receives this worker's output until it has joined the others |
| `CKPTLESS_HIDDEN_STREAMS` | file descriptors of its real stdout and stderr until then |
| `CKPTLESS_HYDRA` | Hydra's output folder for the run, `run=FOLDER` or `sweep=FOLDER`; removed at once |
| `CKPTLESS_IMPORTS` | whether the agent had preloaded the script's imports when it started this worker |
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
CHANNEL = "CKPTLESS_CHANNEL"
STANDBY = "CKPTLESS_STANDBY"
REGROUPING = "CKPTLESS_REGROUPING"
CALLS = "CKPTLESS_CALLS"
OUTPUT_FILE = "CKPTLESS_OUTPUT_FILE"
HIDDEN_STREAMS = "CKPTLESS_HIDDEN_STREAMS"
HYDRA = "CKPTLESS_HYDRA"
IMPORTS = "CKPTLESS_IMPORTS"


def run_root(env: Mapping[str, str] = os.environ) -> Path:
    """The default folder of all runs: the one set in the environment, or `./ckptless`."""
    return Path(env.get(RUN_ROOT) or "ckptless")


def _kept_in(run_folder: Path) -> Path:
    return run_folder / "variables-of-rank-0.json"


def keep_for_rank_zero(run_folder: Path, variables: Mapping[str, str]) -> None:
    """Save variables that let libraries in the next rank 0 process continue what the previous one began.

    Args:
        run_folder: folder of the run.
        variables: variables in addition to those of every worker.

    Raises:
        OSError: the folder is not writable.
    """
    path = _kept_in(run_folder)
    path.unlink(missing_ok=True)
    # Other users with write access to the folder must not control the environment of a new process.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        json.dump(dict(variables), file)


def kept_for_rank_zero(run_folder: Path) -> dict[str, str]:
    """Return the variables saved by `keep_for_rank_zero`; none if another user could have written them."""
    with suppress(OSError, ValueError):
        require_private(_kept_in(run_folder))
        kept = json.loads(_kept_in(run_folder).read_text())
        if isinstance(kept, dict):
            return {str(name): str(value) for name, value in kept.items()}
    return {}
