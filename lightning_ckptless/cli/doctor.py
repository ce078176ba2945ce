"""`ckptless doctor`: checks before training whether this node can run it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightning_ckptless.cli.flags import DEFAULT_COPIES, DEFAULT_FAILURE_DOMAIN, ArenaDir, Copies, FailureDomain

if TYPE_CHECKING:
    from lightning_ckptless.cli.checks.check import Check, Job
    from lightning_ckptless.cli.checks.imports import Target

DEFAULT_RANKS = 2
_SIZES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def doctor(
    script: Annotated[
        str | None, typer.Argument(help="Training script, or module name with -m, whose imports are checked.")
    ] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module, as in python -m.")] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ranks on this node (default: one per GPU, or 2).")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Number of nodes, all with the same ranks.")] = 1,
    parameters: Annotated[
        str | None, typer.Option(metavar="N", help="Parameters of the model, e.g. 7e9, 300M or 1.5B.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="Expression that creates the script's model: Net or 'Net(width=64)'."),
    ] = None,
    optimizer_states: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Optimizer tensors per parameter: 2 for Adam, 0 for SGD."),
    ] = 2,
    sharded: Annotated[bool, typer.Option("--sharded", help="The model is sharded (ckptless_model_parallel).")] = False,
    copies: Copies = DEFAULT_COPIES,
    failure_domain: FailureDomain = DEFAULT_FAILURE_DOMAIN,
    arena_dir: ArenaDir = None,
    durable_dir: Annotated[
        Path | None, typer.Option(help="Folder for durable states, if the run is to write any.")
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, metavar="SECONDS", help="Time limit for the script's imports.")
    ] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check whether this node can train: versions, memory, limits, network, clock and a script's imports.

    * `ckptless doctor`: check this node
    * `ckptless doctor train.py --ranks 4`: also check the imports of a script, in a separate process
    * `ckptless doctor train.py --model Net`: also check whether its model fits, without training it
    * `ckptless doctor --parameters 7e9 --ranks 8 --nodes 4 --json`: check whether such a model fits on four nodes

    Only the script's imports are executed, and with `--model` its definitions. Run it where training will run, e.g. in
    the container.

    Exit code: 0 if training will work (warnings allowed), 1 if it will not, 2 if the command line is invalid.
    """
    from lightning_ckptless.errors import OptionsError

    if model is not None and (script is None or parameters is not None):
        raise OptionsError(
            "--model needs a script and excludes --parameters: use `ckptless doctor train.py --model Net`"
        )
    from lightning_ckptless.cli.checks.check import Job, State, failed
    from lightning_ckptless.cli.checks.imports import Target
    from lightning_ckptless.cli.view.doctor import show_checks

    gpus = visible_gpus(os.environ)
    state = None if parameters is None else State.of_parameters(parse_count(parameters), optimizer_states)
    job = Job(ranks or gpus or DEFAULT_RANKS, nodes, copies, failure_domain, state, gpus > 0, sharded)
    target = None if script is None else Target.of(script, is_module=module)
    checks = examine(
        job,
        target,
        model=model or "",
        optimizer_states=optimizer_states,
        arena_dir=arena_dir,
        durable_dir=durable_dir,
        timeout_s=timeout_s,
    )
    if as_json:
        typer.echo(json.dumps({"works": not failed(checks), "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        show_checks(checks)
    raise typer.Exit(1 if failed(checks) else 0)


def examine(
    job: Job,
    target: Target | None,
    *,
    model: str = "",
    optimizer_states: int = 2,
    arena_dir: Path | None = None,
    durable_dir: Path | None = None,
    timeout_s: float = 300.0,
) -> list[Check]:
    """Run all checks.

    Args:
        job: job to be trained; its state is used if no model is given.
        target: script whose imports are checked; None for none.
        model: expression that creates the script's model; empty for none.
        optimizer_states: optimizer tensors per parameter.
        arena_dir: folder of the arenas; None for the default.
        durable_dir: folder of the durable states; None for none.
        timeout_s: time limit for the script's imports, in seconds.

    Raises:
        OptionsError: the script cannot be read.
    """
    from lightning_ckptless.cli.checks.clock import Instant, check_clock
    from lightning_ckptless.cli.checks.imports import check_script, probe
    from lightning_ckptless.cli.checks.limits import check_limits
    from lightning_ckptless.cli.checks.network import check_network
    from lightning_ckptless.cli.checks.processes import check_processes_of_others
    from lightning_ckptless.cli.checks.space import check_space, inspect_folder
    from lightning_ckptless.cli.checks.variables import check_variables
    from lightning_ckptless.cli.checks.versions import check_versions
    from lightning_ckptless.membership.launch.config import usual_modules

    began = Instant.now()
    of_script: list[Check] = []
    if target is not None:
        probed = probe(target, preload=usual_modules([str(target.path)]), model=model, timeout_s=timeout_s)
        of_script = check_script(probed, model)
        job = replace(job, state=probed.state(optimizer_states) or job.state)
    arena_folder = inspect_folder(arena_dir)
    return [
        *check_versions(),
        *check_space(job, arena_folder, durable_dir),
        *check_limits(job, arenas_in_memory=arena_folder.in_memory),
        *check_processes_of_others(),
        *check_network(job, os.environ),
        *check_variables(os.environ),
        *of_script,
        *check_clock(job, began),
    ]


def parse_count(text: str) -> int:
    """Parse a number of parameters such as `7e9`, `300M` or `1.5B`.

    Args:
        text: digits with an optional fraction, exponent, and suffix K, M, B (billions) or T.

    Raises:
        OptionsError: the text is not a number.
    """
    from lightning_ckptless.errors import OptionsError

    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?)([KMBT]?)", text.strip(), re.IGNORECASE)
    if found is None:
        raise OptionsError(f"--parameters {text!r}: expected a number, e.g. 7e9, 300M or 1.5B")
    return round(float(found[1]) * _SIZES[found[2].upper()])


def visible_gpus(env: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """Count the GPUs visible to a process, without importing torch.

    Args:
        env: environment, which may restrict them (`CUDA_VISIBLE_DEVICES`).
        devices: folder of the device files.
    """
    gpus = [path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    if (chosen := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        return min(len(gpus), len([name for name in chosen.split(",") if name.strip() not in {"", "-1"}]))
    return len(gpus)
