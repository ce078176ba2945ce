"""Environment variables that decide whether a run recovers: NCCL's, torch's and ours."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from lightning_ckptless import environment
from lightning_ckptless.cli.checks.check import Check, Status
from lightning_ckptless.membership.worker.nccl import ENDS_THE_PROCESS

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_TORCHS_PREFIX = "TORCH_"
_OUR_PREFIX = "CKPTLESS_"
_OURS = frozenset(value for name, value in vars(environment).items() if name.isupper() and isinstance(value, str))


def check_nccl(env: Mapping[str, str]) -> Check:
    """Whether NCCL leaves a worker alive whose peer has died.

    Torch knows some of them by an older name as well, which counts where the newer one is unset; workers set the newer.
    """
    name, expected = "NCCL variables", f"{', '.join(ENDS_THE_PROCESS)} unset or 0"
    wrong = [f"{variable}={env[variable]}" for variable in ENDS_THE_PROCESS if env.get(variable, "0") != "0"]
    if wrong:
        fix = (
            f"unset {' '.join(text.partition('=')[0] for text in wrong)}: survivors of a fault are relaunched, not kept"
        )
        return Check(name, Status.WARNING, ", ".join(wrong), expected, fix)
    older = [old for variable in ENDS_THE_PROCESS if (old := variable.removeprefix(_TORCHS_PREFIX)) in env]
    found = f"{', '.join(older)} set, without effect in workers" if older else "none is set otherwise"
    return Check(name, Status.OK, found, expected)


def check_autoload(env: Mapping[str, str]) -> Check:
    """Whether torch makes the strategy known when it is imported."""
    expected = f"{_AUTOLOAD} unset or 1, for strategy='ckptless' in scripts that do not import this package"
    if env.get(_AUTOLOAD, "1") == "1":
        return Check("autoload", Status.OK, f"{_AUTOLOAD} {'is 1' if _AUTOLOAD in env else 'is unset'}", expected)
    fix = f"unset {_AUTOLOAD}, or write `import lightning_ckptless` at the head of the script"
    return Check("autoload", Status.WARNING, f"{_AUTOLOAD}={env[_AUTOLOAD]}", expected, fix)


def check_ours(env: Mapping[str, str]) -> Check:
    """Whether variables of this package are spelt right, and no fault is asked for."""
    name, expected = "our variables", "names that are documented, and no faults"
    if faults := env.get(environment.FAULTS):
        fix = f"unset {environment.FAULTS}, unless the run is to try a fault"
        return Check(name, Status.WARNING, f"{environment.FAULTS}={faults}", expected, fix)
    unknown = sorted(variable for variable in env if variable.startswith(_OUR_PREFIX) and variable not in _OURS)
    if unknown:
        near = get_close_matches(unknown[0], _OURS, 1)
        fix = f"unset {' '.join(unknown)}{f'; did you mean {near[0]}?' if near else ''}"
        return Check(name, Status.WARNING, f"unknown: {', '.join(unknown)}", expected, fix)
    known = sorted(variable for variable in env if variable in _OURS)
    return Check(name, Status.OK, ", ".join(f"{variable}={env[variable]}" for variable in known) or "none", expected)


def check_variables(env: Mapping[str, str]) -> list[Check]:
    """All checks of variables."""
    return [check_nccl(env), check_autoload(env), check_ours(env)]
