"""Running one node's part of a run: one agent with its fork server and workers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from lightning_ckptless.errors import LaunchError, OptionsError
from lightning_ckptless.internals import torch_names
from lightning_ckptless.membership.agent.notices import SigtermNotice
from lightning_ckptless.membership.agent.signals import AskedToEnd, noting_sigterm, raising_on_signals
from lightning_ckptless.membership.events import Announcement, EventSink
from lightning_ckptless.membership.forkserver.client import ForkServer
from lightning_ckptless.membership.launch.command_line import parse_command_line, split_run_arguments
from lightning_ckptless.membership.launch.config import DEFAULT_PRELOAD, LaunchConfig, Outcome, usual_modules
from lightning_ckptless.membership.worker.program import script_path

_CANNOT_START_EXIT_CODE = 2


def _no_record(event: str, **fields: Any) -> None:
    """Discard an event."""


def run(
    config: LaunchConfig,
    *,
    parent: ForkServer | None = None,
    record: Callable[..., None] = _no_record,
    sigterm: SigtermNotice | None = None,
) -> Outcome:
    """Run this node's workers until they succeed, or fail for good.

    Installs no signal handlers and can be called in any thread. An exception raised by a signal handler of the caller
    stops the workers and propagates.

    Args:
        config: what to run.
        parent: a fork server that outlives the run; None to start one for the run.
        record: receives events as `record(event, **fields)`, see `events.py`.
        sigterm: set by the caller's signal handler to drain this node; None if nothing sets it.

    Raises:
        LaunchError: the workers cannot be started, or the rendezvous of the nodes fails.
        OptionsError: `preemption_notice` names no function.
        AskedToEnd: this node was to be drained, and nothing could take its work: the workers have ended as on SIGTERM.
        TimeLimitError: the run exceeded its time limit.
        VersionError: this version of torch lacks names that are used.
    """
    with nullcontext(parent) if parent is not None else make_parent(config) as forker:
        # Imports torch here while the fork server imports it too.
        torch_names.require(torch_names.AGENT)
        from lightning_ckptless.membership.launch.node import run_node  # noqa: PLC0415

        return run_node(config, forker, EventSink(record), sigterm or SigtermNotice())


def make_parent(config: LaunchConfig) -> ForkServer:
    """Return the fork server for a configuration, not yet started."""
    usual = config.preload == DEFAULT_PRELOAD
    modules = usual_modules([config.program.target]) if usual else config.preload
    modules = () if config.fresh else modules
    return ForkServer(modules, path=script_path(config.program, config.working_dir), flags=config.program.flags)


def main(
    argv: Sequence[str],
    *,
    record_for: Callable[[LaunchConfig], Callable[..., None]] = lambda _config: _no_record,
    ended: Callable[[LaunchConfig, Outcome | None], str] = lambda _config, _outcome: "",
) -> int:
    """Run as a separate process: options come from the command line, and termination signals also stop the workers.

    Args:
        argv: options of `ckptless run`, script and its arguments.
        record_for: returns the receiver of events for a configuration.
        ended: called when the run is over and its workers have exited, without an outcome where it was interrupted;
            returns the last line for the user.

    Returns:
        Exit code: the workers', 128 + number for a signal, 2 where the run cannot be started.
    """
    # The fork server starts before torch is imported here, so that both import at the same time.
    given = split_run_arguments(argv)
    modules = () if "--no-preload" in given.options else usual_modules(given.script)
    flags, last_words, events = parse_command_line(sys.orig_argv).flags, "", EventSink(_no_record)
    try:
        with raising_on_signals(), ForkServer(modules, flags=flags) as parent:
            from lightning_ckptless.membership.launch.torchrun import config_from_torchrun_args  # noqa: PLC0415

            config, outcome = config_from_torchrun_args(argv), None
            if not config.fresh:
                more = [name for name in config.preload if name not in modules]
                parent.preload(more, path=script_path(config.program, config.working_dir))
            sigterm = SigtermNotice()
            noting = noting_sigterm(sigterm.give) if config.on_sigterm == "drain" else nullcontext()
            try:
                with noting:
                    outcome = run(config, parent=parent, record=record_for(config), sigterm=sigterm)
            except LaunchError:
                # Not the script's fault: the state allows another start.
                outcome = Outcome(_CANNOT_START_EXIT_CODE, 0, (), has_given_up=True)
                raise
            finally:
                last_words = ended(config, outcome)
            exit_code = outcome.exit_code
    except AskedToEnd as request:
        last_words = "; ".join(filter(None, [f"{request}; all workers have exited", last_words]))
        exit_code = 128 + request.number
    except (LaunchError, OptionsError) as error:
        events.report(Announcement(str(error)))
        exit_code = _CANNOT_START_EXIT_CODE
    if last_words:
        events.report(Announcement(last_words))
    return exit_code
