"""All uses of private torch names for the rendezvous of several nodes.

Where a node waits for others, torch's rendezvous sleeps for a second at a time, reads its state once a second, and
waits for a last call even if no further node can come. The classes here replace these three waits; what the nodes
write and decide otherwise is torch's.

Each name has a test in `tests/membership/rendezvous` that fails if a new version lacks it.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from typing import Any, TypeVar

from torch.distributed.elastic.rendezvous import RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousSettings,
    _Action,
    _BackendRendezvousStateHolder,
    _DistributedRendezvousOpExecutor,
    _NodeDesc,
    _remove_participant_epilogue,
    _RendezvousContext,
    _RendezvousExitOp,
    _RendezvousJoinOp,
    _RendezvousState,
)

_T = TypeVar("_T")
_LEAVE_S = 10.0
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.05

Node = _NodeDesc
"""A node of a rendezvous: one handler in one process."""


class _Unrecorded:
    """Records none of torch's own events: for each of them torch walks the stack and reads the sources on it."""

    def _record(self, *_: object, **__: object) -> None:
        pass


class _SharedState(_Unrecorded, _BackendRendezvousStateHolder):
    """The state of a rendezvous, re-read when another node has changed it."""

    def sync(self) -> bool | None:
        """Write the state where it was changed here, or read it where it was changed elsewhere; see base class."""
        backend: Any = self._backend
        if backend.has_changed():
            self._last_sync_time = -1
        return super().sync()


class _Executor(_Unrecorded, _DistributedRendezvousOpExecutor):
    """Executes torch's operations, and continues when the state has changed.

    Args:
        node: this node.
        state: state of the rendezvous.
        settings: settings of the rendezvous.
        have_all_come: whether no further node can join the round that is being completed, given its participants.
    """

    def __init__(
        self,
        node: _NodeDesc,
        state: _SharedState,
        settings: RendezvousSettings,
        have_all_come: Callable[[Collection[Node]], bool],
    ) -> None:
        super().__init__(node, state, settings)
        self._have_all_come = have_all_come

    def run(
        self,
        state_handler: Callable[[_RendezvousContext, float], _Action],
        deadline: float,
        update_deadline: Callable[[timedelta], float] | None = None,
    ) -> None:
        """Execute an operation; see base class."""

        def next_action(context: _RendezvousContext, deadline: float) -> _Action:
            pause_s = _FIRST_PAUSE_S
            while (action := state_handler(context, deadline)) is _Action.SYNC:
                if isinstance(state_handler, _RendezvousJoinOp) and self._needs_no_last_call(context):
                    return _Action.MARK_RENDEZVOUS_COMPLETE
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                self._state_holder.sync()
                self._state = context.state = self._state_holder.state
            return action

        super().run(next_action, deadline, update_deadline)

    def _needs_no_last_call(self, context: _RendezvousContext) -> bool:
        state = context.state
        return (
            not state.complete
            and context.node in state.participants
            and len(state.participants) >= context.settings.min_nodes
            and not state.wait_list
            and not state.redundancy_list
            and self._have_all_come(state.participants)
        )


class _ExpelOp:
    """Removes nodes from a complete round.

    Args:
        number: number of the round.
        nodes: to remove.
    """

    def __init__(self, number: int, nodes: Collection[Node]) -> None:
        self._number = number
        self._nodes = nodes

    def __call__(self, context: _RendezvousContext, deadline: float) -> _Action:
        state = context.state
        found = [node for node in self._nodes if node in state.participants]
        if not found or not state.complete or state.round != self._number:
            return _Action.FINISH
        if time.monotonic() > deadline:
            return _Action.ERROR_TIMEOUT
        for node in found:
            del state.participants[node]
            state.last_heartbeats.pop(node, None)
        _remove_participant_epilogue(state, context.settings)
        # Any action that writes the state.
        return _Action.KEEP_ALIVE


class PromptRendezvous(_Unrecorded, DynamicRendezvousHandler):
    """torch elastic's rendezvous, in which a node that waits for others continues as soon as it can.

    Its backend has a method `has_changed`: whether another node has changed the state since it was read last.
    """

    def __init__(
        self, node: _NodeDesc, settings: RendezvousSettings, backend_name: str, store: Any, state_holder: Any
    ) -> None:
        state = _SharedState(state_holder._backend, settings)
        super().__init__(node, settings, backend_name, store, state)
        self._op_executor = _Executor(node, state, settings, self._have_all_come)

    @property
    def this_node(self) -> Node:
        """This node."""
        return self._this_node

    @property
    def address(self) -> str:
        """Host name or address under which other nodes reach this one."""
        return str(self._this_node.addr)

    def spare_nodes(self) -> int:
        """How many nodes wait for a place, as of the last synchronization."""
        state = self._state_holder.state
        return len(state.wait_list) + len(state.redundancy_list)

    def waiting_nodes(self) -> set[Node]:
        """The nodes that wait for the next round, as of the last synchronization."""
        return set(self._state_holder.state.wait_list)

    def leave(self) -> None:
        """Leave the round, so that the other nodes can complete the next one without this node."""
        self._stop_heartbeats()
        self._op_executor.run(_RendezvousExitOp(), time.monotonic() + _LEAVE_S)

    def next_rendezvous(self) -> RendezvousInfo:
        """Rendezvous with the other nodes; see `RendezvousHandler`.

        A new store is created for the workers of every round. torch uses the same one for all rounds: it still has keys
        of dead workers, and an agent that joins later waits for an address that is not published again.
        """
        self._bootstrap_store_info = None
        self._shared_tcp_store_server = None
        return super().next_rendezvous()

    def current_round(self) -> tuple[int, dict[Node, int]]:
        """Return the number of the current round, and its nodes with their places."""
        state = self._state_holder.state
        return state.round, dict(state.participants)

    def _have_all_come(self, participants: Collection[Node]) -> bool:
        """Whether no further node can join a round, given its participants so far."""
        raise NotImplementedError

    def remove(self, number: int, nodes: Collection[Node]) -> None:
        """Remove nodes from a complete round, unless the next one has begun."""
        with self._heartbeat_lock:
            self._op_executor.run(_ExpelOp(number, nodes), time.monotonic() + _LEAVE_S)


def rendezvous_state_to_json(pickled: bytes) -> bytes:
    """Convert the state of an elastic rendezvous to JSON.

    Args:
        pickled: state pickled by torch elastic in this process; never data from elsewhere.
    """
    state: _RendezvousState = pickle.loads(pickled)
    fields = {
        "round": state.round,
        "complete": state.complete,
        "deadline": None if state.deadline is None else state.deadline.isoformat(),
        "closed": state.closed,
        "participants": [[_node_fields(node), rank] for node, rank in state.participants.items()],
        "wait_list": [_node_fields(node) for node in sorted(state.wait_list)],
        "redundancy_list": [_node_fields(node) for node in sorted(state.redundancy_list)],
        "last_heartbeats": [[_node_fields(node), at.isoformat()] for node, at in state.last_heartbeats.items()],
    }
    assert fields.keys() == vars(state).keys(), f"a rendezvous state with the fields {sorted(vars(state))}"
    return json.dumps(fields).encode()


def _node_fields(node: _NodeDesc) -> list[Any]:
    return [node.addr, node.pid, node.local_id]


def rendezvous_state_from_json(text: bytes) -> bytes:
    """Convert untrusted JSON to the pickled state that torch elastic expects.

    Raises:
        ValueError: the JSON is not a valid state.
    """
    try:
        fields = json.loads(text)
        state = _RendezvousState()
        state.round = _of_type(int, fields["round"])
        state.complete = _of_type(bool, fields["complete"])
        state.closed = _of_type(bool, fields["closed"])
        state.deadline = None if fields["deadline"] is None else _time(fields["deadline"])
        state.participants = {_node_of(node): _of_type(int, rank) for node, rank in fields["participants"]}
        state.wait_list = {_node_of(node) for node in fields["wait_list"]}
        state.redundancy_list = {_node_of(node) for node in fields["redundancy_list"]}
        state.last_heartbeats = {_node_of(node): _time(at) for node, at in fields["last_heartbeats"]}
    except (TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"invalid rendezvous state: {error!r}") from error
    return pickle.dumps(state)


def _node_of(fields: Any) -> _NodeDesc:
    addr, pid, local_id = fields
    return _NodeDesc(_of_type(str, addr), _of_type(int, pid), _of_type(int, local_id))


def _time(text: Any) -> datetime:
    at = datetime.fromisoformat(_of_type(str, text))
    if at.tzinfo is None:
        raise ValueError(f"a time without a time zone: {text!r}")
    return at


def _of_type(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value
