"""Collects the inputs of a forecast: from the command line, a YAML file, a trace, and the ledger of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_ckptless.cli.forecast_measured import measured_in
from lightning_ckptless.cli.runs import find_run
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.forecast.failure_trace import FailureTrace, TraceLine, read_trace
from lightning_ckptless.protocol.forecast.inputs import (
    OF_A_RATE,
    REASONS,
    Forecastable,
    Inputs,
    forecastable,
    inputs_from,
    require_consistent,
)

_SOURCES_OF_FAILURES = ("preset", "rate", "trace")


def collect(
    given: Mapping[str, Any], config: Path | None, trace: Path | None, from_run: str | None, run_root: Path | None
) -> tuple[Forecastable, list[str]]:
    """Collect and check all inputs.

    What was given on the command line comes first, then the YAML file, then the run.

    Args:
        given: inputs from the command line, by name.
        config: YAML file.
        trace: trace file from the command line.
        from_run: run id or run folder.
        run_root: folder of all runs.

    Returns:
        The inputs, and what was assumed or measured, one line each.

    Raises:
        OptionsError: a file cannot be read, or an input is missing or out of range.
    """
    values = {**_from_yaml(config), **{name: _plain(value) for name, value in given.items()}}
    if trace is not None:
        values["trace"] = str(trace)
    sources = [name for name in _SOURCES_OF_FAILURES if name in values]
    require_consistent(values, trace="trace" in values)
    measured: dict[str, tuple[Any, str]] = {}
    if from_run is not None:
        found = measured_in(find_run(from_run, run_root))
        measured = {name: fact for name, fact in found.items() if name not in values}
        if sources:
            measured.pop("rate", None)
        if "trace" in values:
            measured.pop("process_share", None)
        values = {name: value for name, (value, _) in measured.items()} | values
    path = values.pop("trace", None)
    lines = None if path is None else _lines(Path(path))
    inputs = inputs_from(values)
    what = forecastable(inputs, lines)
    return what, [
        *(f"{name} = {_shown(value)}: {how}" for name, (value, how) in measured.items()),
        *_assumed(what, values),
    ]


def _assumed(what: Forecastable, values: Mapping[str, Any]) -> list[str]:
    derived = {"version_s": what.job.costs.version_s, "spares": what.job.choices.spares, "min_nodes": what.inputs.nodes}
    return [
        f"{name} = {_shown(derived.get(name, getattr(what.inputs, name)))}: {reason}"
        for name, reason in REASONS.items()
        if name not in values and not (name in OF_A_RATE and isinstance(what.failures, FailureTrace))
    ]


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """A number where the command line takes a number or `auto`, and text for a choice."""
    if not isinstance(value, str):
        return value
    return int(value) if value.isdecimal() else str(value)


def _from_yaml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ModuleNotFoundError as error:
        raise OptionsError(f"--config requires omegaconf: pip install lightning-ckptless[cli] ({error})") from error
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise OptionsError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise OptionsError(f"{path}: expected a mapping, e.g. 'nodes: 128'")
    known = {field.name for field in fields(Inputs)} | {"trace"}
    if unknown := [str(name) for name in values if name not in known]:
        raise OptionsError(f"{path}: unknown input {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return {str(name): value for name, value in values.items() if value is not None}


def _lines(path: Path) -> list[TraceLine]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionsError(f"{path}: the trace cannot be read: {error}") from error
    return read_trace(text.splitlines(), str(path))
