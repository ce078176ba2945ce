"""All environment variables that lightning_ckptless reads and sets."""

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
AGENT_STARTED_AT = "CKPTLESS_AGENT_STARTED_AT"
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

SET_BY_USER = {
    RUN_ROOT: "folder with one sub-folder per run, which holds its ledger (default: `ckptless` in the trainer's "
    "`default_root_dir`; with `ckptless run`, in the working directory)",
    ARENA_DIR: "folder of the arenas, if the strategy names none (default: `/dev/shm`)",
    FAULTS: "faults to inject, e.g. `kill:rank=1:step=7`; several are separated by commas",
    TRACE_DIR: "folder for a digest of every step of every rank; set by `ckptless drill`",
    LIGHTNING: "distribution of Lightning that workers find imported, `lightning.pytorch` or `pytorch_lightning` "
    "(default: the one that the script imports)",
    RDZV_ENDPOINT: "`host:port` of the rendezvous, for `python train.py` on several nodes",
    NNODES: "number of nodes, or `min:max`, for `python train.py` on several nodes; under torchrun it allows fewer "
    "nodes; `ckptless run` sets it for its workers",
    FAILURE_DOMAIN: "location of this node, for a custom `failure_domain`: `rack7`, or `rack=rack7,row=b`",
    FAILURE_DOMAINS_FILE: "file with the locations of all nodes, one line `host rack7` per host",
    UNTESTED_VERSIONS: "`1` suppresses the warning about untested versions; the package sets it to `warned` after it "
    "has warned",
}
"""Variables that users set, with their meaning. Those that override an option are described in `options.py`."""

SET_BY_AGENT = {
    AGENT: "process id of our agent; absent under torchrun",
    NODE: "name of this node, unique in the run, unchanged while its agent lives",
    FAULT_REPORT: "the fault that led to this generation, in JSON (`FaultReport`); absent in the first generation",
    AGENT_DIR: "folder for exit reports, which can prevent a relaunch, and for records of finished trainer calls",
    AGENT_STARTED_AT: "wall-clock time, in seconds, at which the agent was started",
    SPAWNED_AT: "wall-clock time, in seconds, at which this worker was requested",
    GENERATION: "number of the generation that this worker has joined; set by the worker for itself",
    FIT_INDEX: "how many times this worker has entered `fit`; set by the worker for itself",
    MAIN_AT: "wall-clock time, in seconds, at which this worker entered the script",
    CHANNEL: "file descriptor of the channel to the agent; removed when the strategy has opened it",
    STANDBY: "set for a standby, which has no rank yet",
    REGROUPING: "number of the rendezvous with the survivors of a fault; absent if all workers start together",
    OUTPUT_FILE: "file for what this worker prints until it has joined the other ranks",
    HIDDEN_STREAMS: "file descriptors of its real stdout and stderr until then",
    HYDRA: "Hydra's output folder for the run, `run=FOLDER` or `sweep=FOLDER`; moved to the worker's command line and "
    "removed",
    IMPORTS: "progress of the agent in importing the script's modules when it started this worker",
    CALLS: "how many calls of its trainers other than `fit` this worker has made; set by the worker for itself",
}
"""Variables that the agent sets for its workers, with their meaning."""


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
