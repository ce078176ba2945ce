"""The messages between an agent and its workers, with their encoder and decoder.

Each message is a frozen dataclass. On the wire it is a JSON object: `kind` holds the class name, the other keys are the
fields. `membership/channel/agent_channel.py` sends and receives them; file descriptors are sent alongside a message,
not in it.

| Message | From | Sent when |
|---|---|---|
| `ReachedTrainer` | worker | the script calls its trainer for the first time; carries Hydra's run folder, if any |
| `ReachedFit` | worker | the script calls `fit` |
| `FitReturned` | worker | that call has returned or raised; what the script raises from here on is its own error |
| `EnteredLoop` | worker | it is about to train; carries the recovery options of its strategy |
| `StepCommitted` | worker | its generation has committed its first step |
| `ProgramImported` | worker | training begins; carries what the script has imported; sent once per node |
| `AskToLeave` | worker | it has completed its last step and asks whether it may leave the training loop |
| `LeftLoop` | worker | it has left the training loop: its exit is no fault from here on |
| `WaitingAtLoop` | worker | it has reached the training loop on its own and waits there for the other ranks |
| `ReleasedGroups` | worker | it has released the process groups that it shared with the lost ranks |
| `CreatedGroup` | worker | it has created one more process group in this regrouping |
| `Regrouped` | worker | it has completed this regrouping with the other ranks |
| `StuckCollective` | worker | it cannot release its process groups; carries the reason, its threads and its sockets |
| `Blocked` | worker | in answer to `QueryBlocked`: whether its main thread waits for other ranks |
| `CannotRecover` | worker | it cannot recover in place; carries the reason |
| `StartSidecar` | worker | it needs a sidecar that runs this module with this argument |
| `HoldMemory` | worker | it needs files of anonymous memory at these paths; carries a socket for the answer |
| `StandbyReady` | worker | a standby has reached `fit` and waits for a rank |
| `RewindDecided` | worker | all ranks have decided on a `Rewind`; carries whether they go back, and why |
| `HandedOver` | worker | all ranks have stopped at a committed step, and it exits to hand its rank over |
| `NodeUnfit` | sidecar | the node has failed its health check; carries what is wrong with it |
| `Regroup` | agent | a fault, or a world change: regroup under this number |
| `AwaitRegroup` | agent | the nodes are re-rendezvousing: wait for the next `Regroup`, however long it takes |
| `AssignRank` | agent | a standby takes a rank: as `Regroup`, and carries the rank's stdout and stderr |
| `QueryBlocked` | agent | no worker makes progress: does the worker wait for other ranks? |
| `MayLeave` | agent | every rank has completed its last step: the worker may leave the training loop |
| `Rewind` | agent | another terminal has requested that all ranks go back to an earlier step |
| `Finish` | agent | the run must end: commit the current step, save and leave |
| `HandOver` | agent | another process is ready to take this rank: exit after a step that all ranks have committed |
| `TrainingFailed` | agent | training cannot continue on any rank; carries the reason, which every worker raises |
| `RunOver` | agent | the run has ended with a fault: no recovery follows |
| `MemoryHeld` | agent | in answer to `HoldMemory`, on the socket that came with it: done, or why not |

Only the newest `Regroup` counts: a worker that was busy during several reads the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from lightning_ckptless.errors import ProtocolError

Wire = dict[str, Any]
"""A message as JSON has it."""

_KIND = "kind"
_UNION = get_origin(int | None)
_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages."""


# ---------------------------------------------------------------- from a worker


@dataclass(frozen=True, slots=True)
class ReachedTrainer(Message):
    """Sent by a worker when its script calls the trainer for the first time.

    Args:
        hydra: run folder that Hydra has made for it, as `hydra.folder_of_run` writes it; empty without Hydra.
    """

    hydra: str


@dataclass(frozen=True, slots=True)
class ReachedFit(Message):
    """Sent by a worker when its script calls `fit`."""


@dataclass(frozen=True, slots=True)
class FitReturned(Message):
    """Sent by a worker when `fit` has returned or raised: later errors are the script's own."""


@dataclass(frozen=True, slots=True)
class EnteredLoop(Message):
    """Sent by a worker that is about to train; carries what its strategy asks of the agent.

    Args:
        in_place: whether survivors may recover in place.
        standbys: how many processes wait for a rank.
        preload_imports: whether new processes preload what the script imports.
        hang_timeout_s: silence in seconds after which ranks that lag are killed; None to learn it, 0 to disable.
        max_recoveries_without_progress: recoveries in a row without a new committed step after which the run gives up.
        max_recoveries_per_hour: recoveries within an hour after which the run gives up.
        obstacle: why this worker cannot recover in place; None if it can.
        bar: the progress bar that it draws, as `console.Bar` names it.
        fixed_world: why the workers cannot train with another world size; empty if they can.
        straggler_factor: multiple of the other ranks' time per step from which a rank is a straggler.
        drain_stragglers_after_s: how long a rank must be one until its process is replaced; None for never.
    """

    in_place: bool
    standbys: int
    preload_imports: bool
    hang_timeout_s: float | None
    max_recoveries_without_progress: int
    max_recoveries_per_hour: int
    obstacle: str | None
    bar: str
    fixed_world: str
    straggler_factor: float
    drain_stragglers_after_s: float | None


@dataclass(frozen=True, slots=True)
class StepCommitted(Message):
    """Sent by a worker when its generation has committed its first step.

    Args:
        sole_shards: shards that no other node has a copy of.
    """

    sole_shards: list[int]


@dataclass(frozen=True, slots=True)
class ProgramImported(Message):
    """Sent by the first worker of a node when training begins: what its script has imported.

    Args:
        modules: file of each installed module, by name, in import order.
        variables: environment variables that have changed since the process started; None for a removed one.
        path: the module search path.
    """

    modules: dict[str, str]
    variables: dict[str, str | None]
    path: list[str]


@dataclass(frozen=True, slots=True)
class AskToLeave(Message):
    """Sent by a worker that has completed its last step and asks whether it may leave the training loop.

    Args:
        number: regrouping that it belongs to.
        step: its last optimizer step.
        why: why there is no further one (`uneven_steps.WhyEnded`).
    """

    number: int
    step: int
    why: str


@dataclass(frozen=True, slots=True)
class LeftLoop(Message):
    """Sent by a worker that has left the training loop: its exit is no fault, and no peer waits for it."""


@dataclass(frozen=True, slots=True)
class WaitingAtLoop(Message):
    """Sent by a worker that has reached the training loop on its own and waits there for the other ranks."""


@dataclass(frozen=True, slots=True)
class ReleasedGroups(Message):
    """Sent by a survivor that has released the process groups it shared with the lost ranks."""


@dataclass(frozen=True, slots=True)
class CreatedGroup(Message):
    """Sent by a worker that has created a process group after a fault: it is connected with all other ranks.

    Args:
        number: regrouping for which it was created.
        created: how many groups it has created for it.
    """

    number: int
    created: int


@dataclass(frozen=True, slots=True)
class Regrouped(Message):
    """Sent by a worker that has regrouped with the other ranks after a fault.

    Args:
        number: the completed regrouping.
    """

    number: int


@dataclass(frozen=True, slots=True)
class StuckCollective(Message):
    """Sent by a survivor that cannot release its process groups: one of its threads is stuck in a collective.

    Args:
        reason: how that was determined.
        threads: its threads, one line each.
        sockets: its TCP sockets, one line each.
    """

    reason: str
    threads: list[str]
    sockets: list[str]


@dataclass(frozen=True, slots=True)
class Blocked(Message):
    """Sent by a worker in answer to `QueryBlocked`.

    Args:
        waits: whether its main thread waits for other ranks.
    """

    waits: bool


@dataclass(frozen=True, slots=True)
class CannotRecover(Message):
    """Sent by a worker that cannot recover in place.

    Args:
        reason: why.
        lasting: whether no worker of this run will be able to.
    """

    reason: str
    lasting: bool


@dataclass(frozen=True, slots=True)
class StartSidecar(Message):
    """Sent by a worker that needs a sidecar; repeated requests for the same argument start one process.

    Args:
        module: module that the sidecar runs.
        argument: argument of its command line.
    """

    module: str
    argument: str


@dataclass(frozen=True, slots=True)
class HoldMemory(Message):
    """Sent by a worker that needs files of anonymous memory; one file descriptor, a socket for the answer, goes along.

    Args:
        paths: absolute paths of the links to the files.
        reason: why regular files cannot be used, for the user.
    """

    paths: list[str]
    reason: str


@dataclass(frozen=True, slots=True)
class StandbyReady(Message):
    """Sent by a standby that has reached `fit` and waits for a rank."""


@dataclass(frozen=True, slots=True)
class RewindDecided(Message):
    """Sent by a worker when all ranks have decided on a `Rewind`.

    Args:
        number: number of the request.
        accepted: whether all ranks go back.
        reason: the target and why, or why not.
    """

    number: int
    accepted: bool
    reason: str


@dataclass(frozen=True, slots=True)
class HandedOver(Message):
    """Sent by a worker that exits to hand its rank over; all ranks have stopped at a committed step.

    Args:
        step: the step.
        reason: why, as the agent gave it.
    """

    step: int
    reason: str


# ---------------------------------------------------------------- from a sidecar


@dataclass(frozen=True, slots=True)
class NodeUnfit(Message):
    """Sent by the sidecar that checks the health of a node, each time that the node fails.

    Args:
        finding: what is wrong with it.
    """

    finding: str


# ---------------------------------------------------------------- from the agent


@dataclass(frozen=True, slots=True)
class Regroup(Message):
    """Sent by an agent to its workers after a fault, or when nodes join: regroup with the other ranks.

    Args:
        number: number of the regrouping; grows over a run.
        fault: fields of the `FaultReport`.
        env: environment variables that define the worker's rank from now on.
    """

    number: int
    fault: dict[str, Any]
    env: dict[str, str]


@dataclass(frozen=True, slots=True)
class AwaitRegroup(Message):
    """Sent by an agent to its workers while the nodes are re-rendezvousing: wait for the next `Regroup`."""


@dataclass(frozen=True, slots=True)
class AssignRank(Message):
    """Sent by an agent to a standby that takes a lost rank; two file descriptors, its stdout and stderr, go along.

    Args:
        number: number of the regrouping.
        fault: fields of the `FaultReport`.
        env: environment variables that define the standby's rank.
    """

    number: int
    fault: dict[str, Any]
    env: dict[str, str]


@dataclass(frozen=True, slots=True)
class QueryBlocked(Message):
    """Sent by an agent while no worker makes progress: does the worker wait for other ranks?"""


@dataclass(frozen=True, slots=True)
class MayLeave(Message):
    """Sent by an agent in answer to `AskToLeave`, once every rank has completed its last step.

    Args:
        number: regrouping in which the worker asked.
    """

    number: int


@dataclass(frozen=True, slots=True)
class Rewind(Message):
    """Sent by an agent on request from another terminal: go back to an earlier step.

    Args:
        number: number of the request; grows over a run.
        to_step: optimizer step to return to; None to count from the newest one.
        steps: number of optimizer steps to go back; None if `to_step` is given.
        skip_batches: batches of each rank to skip from there on.
    """

    number: int
    to_step: int | None
    steps: int | None
    skip_batches: int


@dataclass(frozen=True, slots=True)
class Finish(Message):
    """Sent by an agent that must end (SIGTERM): commit the current step, save and leave."""


@dataclass(frozen=True, slots=True)
class HandOver(Message):
    """Sent by an agent to a worker whose rank another process is ready to take.

    Args:
        reason: why the rank is drained.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class TrainingFailed(Message):
    """Sent by an agent when training cannot continue on any rank.

    Args:
        reason: why; every worker raises it.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class RunOver(Message):
    """Sent by an agent when the run has ended with a fault: no recovery follows."""


@dataclass(frozen=True, slots=True)
class MemoryHeld(Message):
    """Sent by an agent in answer to `HoldMemory`, on the socket that came with it.

    Args:
        refusal: why it cannot hold the memory; empty if it does.
    """

    refusal: str


WORKER_MESSAGES: tuple[type[Message], ...] = (
    ReachedTrainer,
    ReachedFit,
    FitReturned,
    EnteredLoop,
    StepCommitted,
    ProgramImported,
    AskToLeave,
    LeftLoop,
    WaitingAtLoop,
    ReleasedGroups,
    CreatedGroup,
    Regrouped,
    StuckCollective,
    Blocked,
    CannotRecover,
    StartSidecar,
    HoldMemory,
    StandbyReady,
    RewindDecided,
    HandedOver,
)
"""Messages that workers send to their agent."""
SIDECAR_MESSAGES: tuple[type[Message], ...] = (NodeUnfit,)
"""Messages that sidecars send to their agent."""
AGENT_MESSAGES: tuple[type[Message], ...] = (
    Regroup,
    AwaitRegroup,
    AssignRank,
    QueryBlocked,
    MayLeave,
    Rewind,
    Finish,
    HandOver,
    TrainingFailed,
    RunOver,
    MemoryHeld,
)
"""Messages that agents send to their workers."""
_BY_KIND = {message.__name__: message for message in (*WORKER_MESSAGES, *SIDECAR_MESSAGES, *AGENT_MESSAGES)}
_TYPES = {message: get_type_hints(message) for message in _BY_KIND.values()}


def encode(message: Message) -> Wire:
    """Encode a message as a JSON object.

    Raises:
        ProtocolError: it is not in the table, or a field has the wrong type.
    """
    kind = type(message).__name__
    if _BY_KIND.get(kind) is not type(message):
        raise ProtocolError(f"{kind} is not a message between agent and worker")
    wire = {each.name: getattr(message, each.name) for each in fields(message)}
    _check(type(message), wire)
    return {_KIND: kind, **wire}


def decode(wire: object) -> Message:
    """Decode what `encode` returned.

    Args:
        wire: any JSON value.

    Raises:
        ProtocolError: the kind is unknown, a field is missing or unexpected, or a field has the wrong type.
    """
    if not isinstance(wire, dict):
        raise ProtocolError(f"a message between agent and worker: expected an object, found {_shown(wire)}")
    kind = wire.get(_KIND)
    found = _BY_KIND.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise ProtocolError(
            f"a message between agent and worker: unknown kind {_shown(kind)}; both must run the same version of "
            "lightning_ckptless"
        )
    values = {name: value for name, value in wire.items() if name != _KIND}
    _check(found, values)
    return found(**values)


def _check(message: type[Message], values: Mapping[str, Any]) -> None:
    """Raise where the names or types of values are not those of a message's fields."""
    kind, types = message.__name__, _TYPES[message]
    for verb, names in (("lacks", types.keys() - values.keys()), ("has the unexpected", values.keys() - types.keys())):
        if names:
            raise ProtocolError(f"message {kind} {verb} field {min(names)!r}; its fields: {', '.join(types) or 'none'}")
    for name, value in values.items():
        if not _fits(value, types[name]):
            expected = getattr(types[name], "__name__", None) if not get_args(types[name]) else str(types[name])
            raise ProtocolError(f"message {kind}, field {name!r}: expected {expected}, found {_shown(value)}")


def _fits(value: object, expected: Any) -> bool:
    """Whether a value has a field's type; a bool is no int, and an int is a float."""
    origin, inner = get_origin(expected), get_args(expected)
    if expected is Any:
        return True
    if origin is _UNION:
        return any(_fits(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if expected is float:
        return type(value) in (int, float)
    if expected is str:
        return isinstance(value, str)
    return type(value) is expected


def _shown(value: object) -> str:
    shown = repr(value) if isinstance(value, bool | int | float | str | None) else f"a {type(value).__name__}"
    return shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}..."
