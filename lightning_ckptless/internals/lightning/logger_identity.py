"""The run that a logger writes to, transferred from one process to the logger of a later one.

Lightning's loggers keep it in private attributes, listed here by class. A custom logger provides it with the two
methods of `LoggerWithIdentity`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, Protocol

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.internals.lightning.distribution import is_a

Identity = dict[str, Any]
"""Plain data that JSON can represent."""

_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "CSVLogger": ("_name", "_root_dir", "_save_dir", "_version"),
    "TensorBoardLogger": ("_name", "_root_dir", "_sub_dir", "_version"),
    "MLFlowLogger": ("_run_id", "_experiment_id"),
    "CometLogger": ("_experiment_key", "_project_name"),
    "LitLogger": ("_name", "_root_dir", "_version"),
    "WandbLogger": ("_id", "_project", "_name", "_save_dir"),
}
_WANDB_INIT = {"_id": "id", "_project": "project", "_name": "name", "_save_dir": "dir"}
"""Arguments of `wandb.init` by the attributes with the same values."""

_WANDB_FLUSH = "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL"

_VARIABLES: dict[str, tuple[str, dict[str, str | None]]] = {
    "WandbLogger": ("_id", {"WANDB_RUN_ID": None, "WANDB_RESUME": "allow"}),
    "CometLogger": ("_experiment_key", {"COMET_EXPERIMENT_KEY": None}),
}


class LoggerWithIdentity(Protocol):
    """A logger whose run a new process can continue.

    Both methods are called on every rank: the first when the loggers are open, the second before the first access to
    `experiment`.
    """

    def ckptless_identity(self) -> dict[str, Any]:
        """Return the run that this logger writes to.

        Returns:
            Plain data that JSON can represent, e.g. `{"run_id": "4f1c"}`.
        """

    def set_ckptless_identity(self, identity: dict[str, Any]) -> None:
        """Continue the run of the logger of an earlier process.

        Args:
            identity: result of its `ckptless_identity`.
        """


def private_attributes() -> dict[str, tuple[str, ...]]:
    """Return the private attributes of Lightning's loggers that are used here, by class."""
    more = {
        "WandbLogger": ("_wandb_init", "_experiment"),
        "CometLogger": ("_experiment",),
        "MLFlowLogger": ("_initialized", "_mlflow_client"),
    }
    return {kind: names + more.get(kind, ()) for kind, names in _ATTRIBUTES.items()}


def is_dummy(logger: Any) -> bool:
    """Return whether a logger is Lightning's dummy logger, which writes nothing and has attributes of any name."""
    return is_a(logger, "loggers.logger", "DummyLogger")


def _has_own(logger: Any) -> bool:
    # Checked on the class, as an instance may have attributes of any name.
    return hasattr(type(logger), "ckptless_identity") and hasattr(type(logger), "set_ckptless_identity")


def _kind(logger: Any) -> str | None:
    return next((kind for kind in _ATTRIBUTES if is_a(logger, "loggers", kind)), None)


def can_be_continued(logger: Any) -> bool:
    """Return whether a new process can continue the run of a logger, or there is none."""
    return is_dummy(logger) or _has_own(logger) or _kind(logger) is not None


def identity_of(logger: Any) -> Identity:
    """Return the run that a logger writes to; empty if it is unknown or not chosen yet.

    Raises:
        OptionsError: a custom logger returns data that JSON cannot represent.
    """
    if _has_own(logger):
        return _checked(logger, logger.ckptless_identity())
    kind = _kind(logger)
    if kind is None:
        return {}
    found = {name: getattr(logger, name, None) for name in _ATTRIBUTES[kind]}
    if kind == "WandbLogger" and logger.version is not None:
        # If no id was given, the run has chosen one.
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
    """Make a logger continue a run, before the first access to its `experiment`.

    Args:
        logger: logger of the same class as the one that the identity is from.
        identity: result of `identity_of` in this or an earlier process.
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
    """Terminate a run that the script opened before `fit` although an earlier process has opened one."""
    stray = logger._run_id
    if logger._initialized and stray != identity.get("_run_id", stray):
        logger._mlflow_client.set_terminated(stray, "KILLED")
        logger._initialized = False


def forget_identity(logger: Any) -> None:
    """Make a logger choose a new run."""
    kind = _kind(logger)
    for name in ("_version", "_run_id", "_experiment_key", "_id"):
        if kind is not None and name in _ATTRIBUTES[kind]:
            setattr(logger, name, None)
    if kind == "WandbLogger":
        logger._wandb_init["id"] = None


def writes_elsewhere(logger: Any, identity: Identity) -> bool:
    """Return whether a logger writes to another run than it should, because the script opened it before `fit`."""
    kind = _kind(logger)
    if kind not in _VARIABLES or (experiment := logger._experiment) is None:
        return False
    name, _ = _VARIABLES[kind]
    found = experiment.id if kind == "WandbLogger" else experiment.get_key()
    return name in identity and found != identity[name]


def keeps_rows_until_it_ends(logger: Any) -> bool:
    """Return whether the rows of a logger are lost if its process is killed, as with Comet in offline mode.

    It writes to a temporary folder and creates an archive when the process exits.
    """
    experiment = logger._experiment if _kind(logger) == "CometLogger" else None
    return experiment is not None and "Offline" in type(experiment).__name__


def begin_after(logger: Any, rows: int) -> None:
    """Make a continued run count its rows from where the previous process stopped.

    W&B gets the count from its server. Offline it would start from 0 again, and refuse the rows as old steps when the
    files are uploaded.

    Args:
        logger: open logger.
        rows: number of rows of the run.
    """
    if _kind(logger) == "WandbLogger" and (run := logger._experiment) is not None and run.offline and run.step < rows:
        run.log({}, step=rows, commit=False)


def write_soon(loggers: list[Any]) -> Callable[[], object]:
    """Make W&B write rows to its file at once; by default its service buffers them for 15 s and loses them if killed.

    Versions of W&B without this variable ignore it.

    Returns:
        A function that removes the variable from the environment.
    """
    if _WANDB_FLUSH in os.environ or all(_kind(logger) != "WandbLogger" for logger in loggers):
        return lambda: None
    os.environ[_WANDB_FLUSH] = "0.01"
    return lambda: os.environ.pop(_WANDB_FLUSH, None)


def variables_of(loggers: list[Any]) -> dict[str, str]:
    """Return environment variables that make the libraries themselves continue a run that is opened before `fit`.

    They name one run per library, so there are none for a library with two loggers.
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
