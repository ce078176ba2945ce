"""Checks environment variables that affect recovery: those of NCCL, torch and lightning_ckptless.

Apart from the other checks, because each subject has its own file.
"""

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
    """Check that NCCL does not end a worker whose peer has died.

    Torch also reads some of these variables by an older name if the newer one is unset; workers always set the newer.
    """
    name, expected = "NCCL variables", f"{', '.join(ENDS_THE_PROCESS)} unset or 0"
    wrong = [f"{variable}={env[variable]}" for variable in ENDS_THE_PROCESS if env.get(variable, "0") != "0"]
    if wrong:
        fix = f"unset {' '.join(text.partition('=')[0] for text in wrong)}: with it, a fault relaunches the survivors"
        return Check(name, Status.WARNING, ", ".join(wrong), expected, fix)
    older = [old for variable in ENDS_THE_PROCESS if (old := variable.removeprefix(_TORCHS_PREFIX)) in env]
    found = f"{', '.join(older)} set, no effect in workers" if older else "unset or 0"
    return Check(name, Status.OK, found, expected)


def check_autoload(env: Mapping[str, str]) -> Check:
    """Check that importing torch registers the strategy."""
    expected = f"{_AUTOLOAD} unset or 1, for strategy='ckptless' in scripts that do not import this package"
    if env.get(_AUTOLOAD, "1") == "1":
        return Check("autoload", Status.OK, f"{_AUTOLOAD} {'is 1' if _AUTOLOAD in env else 'is unset'}", expected)
    fix = f"unset {_AUTOLOAD}, or add `import lightning_ckptless` to the top of the script"
    return Check("autoload", Status.WARNING, f"{_AUTOLOAD}={env[_AUTOLOAD]}", expected, fix)


def check_ours(env: Mapping[str, str]) -> Check:
    """Check that variables of this package are spelled correctly, and that no fault is requested."""
    name, expected = "our variables", "documented names, and no faults"
    if faults := env.get(environment.FAULTS):
        fix = f"unset {environment.FAULTS}, unless the run is meant to inject a fault"
        return Check(name, Status.WARNING, f"{environment.FAULTS}={faults}", expected, fix)
    unknown = sorted(variable for variable in env if variable.startswith(_OUR_PREFIX) and variable not in _OURS)
    if unknown:
        near = get_close_matches(unknown[0], _OURS, 1)
        fix = f"unset {' '.join(unknown)}{f'; did you mean {near[0]}?' if near else ''}"
        return Check(name, Status.WARNING, f"unknown: {', '.join(unknown)}", expected, fix)
    known = sorted(variable for variable in env if variable in _OURS)
    return Check(name, Status.OK, ", ".join(f"{variable}={env[variable]}" for variable in known) or "none", expected)


def check_variables(env: Mapping[str, str]) -> list[Check]:
    """Run all checks of environment variables."""
    return [check_nccl(env), check_autoload(env), check_ours(env)]
