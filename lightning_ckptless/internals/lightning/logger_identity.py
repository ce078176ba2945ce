"""Which run of its store a logger writes to, read from one process and given to the logger of a later one.

Lightning's loggers keep it in private attributes, listed here by class. A logger of the user's own says it by two
methods, `LoggerWithIdentity`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, Protocol

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.distribution import is_a

Identity = dict[str, Any]
"""Plain data that JSON can hold."""

_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "CSVLogger": ("_name", "_root_dir", "_save_dir", "_version"),
    "TensorBoardLogger": ("_name", "_root_dir", "_sub_dir", "_version"),
    "MLFlowLogger": ("_run_id", "_experiment_id"),
    "CometLogger": ("_experiment_key", "_project_name"),
    "LitLogger": ("_name", "_root_dir", "_version"),
    "WandbLogger": ("_id", "_project", "_name", "_save_dir"),
}
_WANDB_INIT = {"_id": "id", "_project": "project", "_name": "name", "_save_dir": "dir"}
"""What `wandb.init` is called with, by the attribute that holds the same."""

_WANDB_FLUSH = "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL"

_VARIABLES: dict[str, tuple[str, dict[str, str | None]]] = {
    "WandbLogger": ("_id", {"WANDB_RUN_ID": None, "WANDB_RESUME": "allow"}),
    "CometLogger": ("_experiment_key", {"COMET_EXPERIMENT_KEY": None}),
}


class LoggerWithIdentity(Protocol):
    """A logger whose run a new process can continue.

    Both methods are called on every rank: the first when the loggers are open, the second before anything asks for
    `experiment`.
    """

    def ckptless_identity(self) -> dict[str, Any]:
        """Name the run that this logger writes to.

        Returns:
            Plain data that JSON can hold, e.g. `{"run_id": "4f1c"}`.
        """

    def set_ckptless_identity(self, identity: dict[str, Any]) -> None:
        """Write to the run that the logger of an earlier process has named.

        Args:
            identity: what its `ckptless_identity` returned.
        """


def private_attributes() -> dict[str, tuple[str, ...]]:
    """The private attributes of Lightning's loggers that are touched here, by class."""
    more = {
        "WandbLogger": ("_wandb_init", "_experiment"),
        "CometLogger": ("_experiment",),
        "MLFlowLogger": ("_initialized", "_mlflow_client"),
    }
    return {kind: names + more.get(kind, ()) for kind, names in _ATTRIBUTES.items()}


def is_dummy(logger: Any) -> bool:
    """Whether a logger is Lightning's stand-in, which writes nothing and has an attribute of any name."""
    return is_a(logger, "loggers.logger", "DummyLogger")


def _has_own(logger: Any) -> bool:
    # On the class: an instance may answer to any name.
    return hasattr(type(logger), "ckptless_identity") and hasattr(type(logger), "set_ckptless_identity")


def _kind(logger: Any) -> str | None:
    return next((kind for kind in _ATTRIBUTES if is_a(logger, "loggers", kind)), None)


def can_be_continued(logger: Any) -> bool:
    """Whether a new process can be given the run of a logger, or there is none to give."""
    return is_dummy(logger) or _has_own(logger) or _kind(logger) is not None


def identity_of(logger: Any) -> Identity:
    """The run that a logger writes to; empty where it cannot be said or is not chosen yet.

    Raises:
        OptionsError: a logger of the user's own returns what JSON cannot hold.
    """
    if _has_own(logger):
        return _checked(logger, logger.ckptless_identity())
    kind = _kind(logger)
    if kind is None:
        return {}
    found = {name: getattr(logger, name, None) for name in _ATTRIBUTES[kind]}
    if kind == "WandbLogger" and logger.version is not None:
        # The run chooses its own where none was given.
        found["_id"] = logger.version
    return {name: value if isinstance(value, int) else str(value) for name, value in found.items() if value is not None}


def _checked(logger: Any, identity: Any) -> Identity:
    try:
        copy = json.loads(json.dumps(identity))
    except (TypeError, ValueError) as error:
        raise OptionsError(f"{type(logger).__name__}.ckptless_identity() must return plain data: {error}") from error
    if not isinstance(copy, dict):
        raise OptionsError(f"{type(logger).__name__}.ckptless_identity() must return a dict, not {copy!r}")
    return copy


def set_identity(logger: Any, identity: Identity) -> None:
    """Have a logger write to a run, before anything asks for its `experiment`.

    Args:
        logger: of the class that the identity is of.
        identity: what `identity_of` returned, in this process or an earlier one.
    """
    if _has_own(logger):
        if identity:
            logger.set_ckptless_identity(dict(identity))
        return
    kind = _kind(logger)
    if kind == "MLFlowLogger":
        _leave_stray_run(logger, identity)
    for name in _ATTRIBUTES[kind] if kind is not None else ():
        if name in identity:
            setattr(logger, name, identity[name])
            if kind == "WandbLogger":
                logger._wandb_init[_WANDB_INIT[name]] = identity[name]
    if kind == "WandbLogger" and "_id" in identity:
        logger._wandb_init["resume"] = "allow"


def _leave_stray_run(logger: Any, identity: Identity) -> None:
    """End a run that the program opened before `fit`, which an earlier process had opened too."""
    stray = logger._run_id
    if logger._initialized and stray != identity.get("_run_id", stray):
        logger._mlflow_client.set_terminated(stray, "KILLED")
        logger._initialized = False


def forget_identity(logger: Any) -> None:
    """Have a logger choose a run of its own."""
    kind = _kind(logger)
    for name in ("_version", "_run_id", "_experiment_key", "_id"):
        if kind is not None and name in _ATTRIBUTES[kind]:
            setattr(logger, name, None)
    if kind == "WandbLogger":
        logger._wandb_init["id"] = None


def writes_elsewhere(logger: Any, identity: Identity) -> bool:
    """Whether a logger writes to another run than the one it was given: the program opened that before `fit`."""
    kind = _kind(logger)
    if kind not in _VARIABLES or (experiment := logger._experiment) is None:
        return False
    name, _ = _VARIABLES[kind]
    found = experiment.id if kind == "WandbLogger" else experiment.get_key()
    return name in identity and found != identity[name]


def keeps_rows_until_it_ends(logger: Any) -> bool:
    """Whether what a logger is given is out of reach once its process is killed: so Comet works offline.

    It writes into a temporary folder, and makes that an archive when the process ends.
    """
    experiment = logger._experiment if _kind(logger) == "CometLogger" else None
    return experiment is not None and "Offline" in type(experiment).__name__


def begin_after(logger: Any, rows: int) -> None:
    """Have a run that a new process continues count its rows from where the last one stopped.

    W&B knows how many there are from its server; offline it would number them from 0 again, and refuse them as steps
    that lie behind when the files are uploaded.

    Args:
        logger: open.
        rows: that the run has.
    """
    if _kind(logger) == "WandbLogger" and (run := logger._experiment) is not None and run.offline and run.step < rows:
        run.log({}, step=rows, commit=False)


def write_soon(loggers: list[Any]) -> Callable[[], object]:
    """Have W&B write rows to its file at once: by default its service keeps them for 15 s, and loses them in a kill.

    A version of W&B that does not know the variable ignores it.

    Returns:
        What takes the variable out of the environment again.
    """
    if _WANDB_FLUSH in os.environ or all(_kind(logger) != "WandbLogger" for logger in loggers):
        return lambda: None
    os.environ[_WANDB_FLUSH] = "0.01"
    return lambda: os.environ.pop(_WANDB_FLUSH, None)


def variables_of(loggers: list[Any]) -> dict[str, str]:
    """Environment variables by which the libraries themselves continue a run that is opened before `fit`.

    They name one run per library: where there are two loggers of a kind, there are none for it.
    """
    found: dict[str, str] = {}
    kinds = [kind for logger in loggers if (kind := _kind(logger)) in _VARIABLES]
    for logger in loggers:
        kind = _kind(logger)
        if kind is None or kinds.count(kind) != 1:
            continue
        name, variables = _VARIABLES[kind]
        if (value := identity_of(logger).get(name)) is not None:
            found |= {variable: value if fixed is None else fixed for variable, fixed in variables.items()}
    return found
