"""The options of `ckptless run`: torchrun's, and our own."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.run import determine_local_world_size, get_args_parser

from lightning_ckptless import environment
from lightning_ckptless.configuration.flags import add_flags, given_flags
from lightning_ckptless.errors import OptionsError
from lightning_ckptless.membership.launch.command_line import parse_command_line
from lightning_ckptless.membership.launch.config import (
    DEFAULT_STOP_GRACE_S,
    LaunchConfig,
    new_run_id,
    usual_modules,
)
from lightning_ckptless.membership.worker.program import Kind, Program

_UNSUPPORTED: dict[str, object] = {
    "numa_binding": None,
    "logs_specs": None,
    "virtual_local_rank": False,
    "duplicate_stdout_filters": [],
    "duplicate_stderr_filters": [],
}
_DEFAULT_MASTER_PORT = 29500


def options_parser() -> ArgumentParser:
    """Build the parser of the options; the script and its arguments follow them."""
    parser = get_args_parser()
    parser.prog = "ckptless run"
    parser.description = "Run a training script on several ranks that survive the loss of any of them."
    ours = parser.add_argument_group("ckptless")
    add_flags(ours, LaunchConfig)
    _add_shutdown_timeout(ours)
    if "PET_MAX_RESTARTS" not in os.environ:
        parser.set_defaults(max_restarts=None)
    return parser


def _add_shutdown_timeout(ours: Any) -> None:
    """Add the option where torchrun lacks it: before torch 2.12."""
    with suppress(ArgumentError):
        ours.add_argument("--shutdown-timeout", type=int, metavar="SECONDS", help="time for workers to exit")


def config_from_torchrun_args(argv: Sequence[str]) -> LaunchConfig:
    """Read a configuration from a torchrun command line.

    Args:
        argv: options, script and its arguments, e.g. `["--nproc-per-node", "2", "train.py", "--lr", "0.1"]`.

    Raises:
        OptionsError: an option that is not supported, or has an invalid value.
        SystemExit: the command line cannot be parsed, or asks for help.
    """
    args = options_parser().parse_args(argv)
    for name, unset in _UNSUPPORTED.items():
        # Some versions of torchrun lack some of these options.
        if getattr(args, name, unset) != unset:
            raise OptionsError(
                f"--{name.replace('_', '-')} is not supported by ckptless run; use torchrun if you need it"
            )
    if args.rdzv_backend not in ("static", "c10d"):
        raise OptionsError(f"--rdzv-backend {args.rdzv_backend}: expected c10d")
    endpoint, conf = _rendezvous(args)
    is_named = args.rdzv_id not in ("", "none")
    given = given_flags(args, LaunchConfig)
    script = [args.training_script, *args.training_script_args]
    return LaunchConfig(
        **{
            **given,
            "preload": (*usual_modules(script), *given.get("preload", ())),
            "run_root": given.get("run_root") or environment.run_root(),
        },
        program=_program(args),
        nproc=determine_local_world_size(args.nproc_per_node),
        nnodes="1" if args.standalone else args.nnodes,
        rdzv_endpoint=endpoint,
        rdzv_conf=conf,
        run_id=args.rdzv_id if is_named else _run_id(endpoint),
        is_named=is_named,
        max_restarts=args.max_restarts,
        local_addr=args.local_addr,
        log_dir=None if args.log_dir is None else Path(args.log_dir),
        redirects=args.redirects,
        tee=args.tee,
        local_ranks_filter=tuple(int(rank) for rank in args.local_ranks_filter.split(",") if rank),
        log_line_prefix=os.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"),
        role=args.role,
        stop_grace_s=DEFAULT_STOP_GRACE_S if args.shutdown_timeout is None else args.shutdown_timeout,
    )


def _program(args: Namespace) -> Program:
    kind: Kind = "module" if args.module else "executable" if args.no_python else "script"
    flags = parse_command_line(sys.orig_argv).flags
    return Program(kind, args.training_script, tuple(args.training_script_args), flags)


def _rendezvous(args: Namespace) -> tuple[str, dict[str, str | int]]:
    """Return where the nodes rendezvous, and the settings of the rendezvous."""
    conf: dict[str, str | int] = {}
    for pair in filter(None, args.rdzv_conf.split(",")):
        key, separator, value = pair.partition("=")
        if not separator:
            raise OptionsError(f"--rdzv-conf {args.rdzv_conf!r}: expected KEY=VALUE,...; found {pair!r}")
        conf[key.strip()] = value.strip()
    if args.standalone:
        return "", conf
    if args.rdzv_endpoint or args.nnodes in ("1", "1:1"):
        return args.rdzv_endpoint, conf
    if args.rdzv_backend == "static":
        # torchrun's older form: the first node hosts the rendezvous.
        conf.setdefault("is_host", int(args.node_rank == 0))
        return f"{args.master_addr}:{args.master_port or _DEFAULT_MASTER_PORT}", conf
    return "", conf


def _run_id(endpoint: str) -> str:
    """Return a name for a run without one, the same on all nodes."""
    return "at-" + re.sub(r"[^A-Za-z0-9.]+", "-", endpoint) if endpoint else new_run_id()
