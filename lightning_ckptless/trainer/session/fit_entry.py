"""How a process enters `fit`: together with all other ranks, or alone as the replacement of a lost one."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ckptless.protocol.checkpoint_history import BEGINNING
from lightning_ckptless.protocol.startup import StartAction, StartPlan
from lightning_ckptless.protocol.versions import Complete
from lightning_ckptless.trainer.data.virtual_ranks import VirtualRanks
from lightning_ckptless.trainer.outputs.loggers import Positions
from lightning_ckptless.trainer.recovery.restoration import Restoration
from lightning_ckptless.trainer.recovery.version_fetch import fetch_version
from lightning_ckptless.trainer.session.session import Session
from lightning_ckptless.trainer.session.startup import Sources, decide_start


@dataclass(frozen=True, slots=True)
class Entry:
    """What this process starts from.

    Args:
        plan: how the generation starts.
        restoration: version to put into the trainer; None if the fit starts from its beginning or a checkpoint file.
    """

    plan: StartPlan
    restoration: Restoration | None = None


def enter_together(
    session: Session, virtual_ranks: VirtualRanks, ckpt_path: str | None, first_positions: Positions | None
) -> Entry:
    """Open the arena, form the member set and decide what this generation starts from. All ranks call it together.

    Args:
        session: session of this rank.
        virtual_ranks: the virtual ranks that this rank runs.
        ckpt_path: checkpoint file that the script passed to `fit`.
        first_positions: positions of the log files when `fit` was first entered; None if they were empty.

    Raises:
        LaunchError: the limit on recoveries has been reached.
        StateMissingError: no complete version is left and the options say to stop.
        WorldSizeError: another number of ranks wrote the state, and these cannot continue from it.
        OptionsError: the checkpoint path and a live arena disagree, or replicas cannot be placed.
    """
    session.open(ckpt_path)
    transport, nodes = session.connect()
    relaunched, states = session.generation > 1, session.durable.states(transport)
    members = session.begin_generation(
        transport, nodes, after=max((state.snapshot.generation for state in states), default=0)
    )
    session.folders.adopt(members.noted.folders, session.rank)
    session.durable.assign_writer(members)
    saved = members.noted.logger_identities
    session.loggers.hold(session.arena.path)
    session.loggers.identify(saved)
    if saved is None and session.trainer.is_global_zero:
        session.loggers.warn_of_unknown_loggers()
    sources = Sources(session.durable, states, ckpt_path, saved is not None)
    plan, found = decide_start(session.trainer, members, session.options, sources, relaunched=relaunched)
    session.report.take_over(members.noted.counts)
    had_ended = plan.action is StartAction.RESTORE and relaunched and members.noted.finished
    session.report.started(
        session.identity,
        plan,
        members.placement,
        session.arena.path,
        fit_index=session.fit_index,
        had_ended=had_ended,
        is_followed=had_ended and any(has for (has,) in members.gather([session.has_versions_of_next_fit()])),
    )
    if plan.action is StartAction.REFUSE:
        assert plan.error is not None
        raise plan.error(plan.reason)
    if plan.enters_midway:
        assert isinstance(found, Complete)
        return Entry(plan, _enter_midway(session, virtual_ranks, plan, found))
    virtual_ranks.require()
    logs = None if saved is None else first_positions or session.loggers.at_first
    _start_over(session, plan.action, logs, relaunched=relaunched)
    return Entry(plan)


def enter_alone(session: Session) -> Entry:
    """Prepare to join the others inside `fit`, as far as that is possible without them."""
    session.open_alone()
    notes = session.arena.notes()
    session.folders.adopt(notes.folders, session.rank)
    session.loggers.hold(session.arena.path)
    session.loggers.identify_alone(notes)
    session.loggers.keep()
    return Entry(StartPlan(StartAction.RESTORE, "replaces a lost rank"))


def _enter_midway(session: Session, virtual_ranks: VirtualRanks, plan: StartPlan, found: Complete) -> Restoration:
    if plan.state is not None:
        session.loggers.identify(session.durable.logger_identities(plan.state))
    restoration = fetch_version(session, virtual_ranks, found, found)
    # The data is set up later, for the virtual ranks of the version.
    virtual_ranks.opened_for = virtual_ranks.count
    if (logs := restoration.logs) is not None:
        session.loggers.cut(logs)
    return restoration


def _start_over(session: Session, action: StartAction, logs: Positions | None, *, relaunched: bool) -> None:
    members = session.members
    if session.trainer.is_global_zero and relaunched and action is StartAction.FRESH:
        session.files.roll_back(BEGINNING)
    elif session.trainer.is_global_zero:
        session.files.begin(new_run=action is StartAction.FRESH)
    members.transport.agree(True)
    if members.is_node_leader:
        members.arena.clear()
    session.loggers.start_over()
    if action is StartAction.DURABLE:
        session.loggers.start_new_runs()
    elif logs is not None:
        session.loggers.cut_to(logs)
