"""Messages between agent and worker survive the wire, and damaged ones are refused."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import ProtocolError
from lightning_ckptless.protocol import messages
from lightning_ckptless.protocol.messages import (
    AGENT_MESSAGES,
    SIDECAR_MESSAGES,
    WORKER_MESSAGES,
    EnteredLoop,
    Message,
    Regroup,
    Regrouped,
    decode,
    encode,
)
from lightning_ckptless.protocol.uneven_steps import WhyEnded

ALL = (*WORKER_MESSAGES, *SIDECAR_MESSAGES, *AGENT_MESSAGES)
FAULT = {"rank": 1, "signal_name": "SIGKILL", "died_at": 1.5, "earlier": [[1.0, "rank 0 died"]], "hung": ""}
SAMPLES: dict[object, st.SearchStrategy[Any]] = {
    dict[str, Any]: st.just(FAULT),
    float | None: st.none() | st.floats(0, 1e9),
}


def sample(message: type[Message]) -> st.SearchStrategy[Message]:
    """Any message of a class."""
    hints = get_type_hints(message)
    values = {name: SAMPLES[hint] if hint in SAMPLES else st.from_type(hint) for name, hint in hints.items()}
    return st.builds(message, **values)


@given(st.one_of([sample(message) for message in ALL]))
def test_every_message_survives_the_wire(message: Message) -> None:
    assert decode(json.loads(json.dumps(encode(message)))) == message


def test_every_message_class_is_in_the_table() -> None:
    defined = {found for found in vars(messages).values() if isinstance(found, type) and issubclass(found, Message)}
    assert defined - {Message} == set(ALL)
    assert len(ALL) == len(set(ALL))


def test_an_enum_member_is_sent_as_its_text() -> None:
    wire = json.loads(json.dumps(encode(messages.AskToLeave(0, 3, WhyEnded.NO_DATA))))
    assert decode(wire) == messages.AskToLeave(0, 3, "ran out of training data")


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (None, "expected an object, found None"),
        (["kind"], "expected an object, found a list"),
        ({}, "unknown kind None; both must run the same version"),
        ({"kind": "Message"}, "unknown kind 'Message'"),
        ({"kind": ["Regrouped"]}, "unknown kind a list"),
        ({"kind": "Regrouped"}, "Regrouped lacks field 'number'; its fields: number"),
        ({"kind": "StandbyReady", "rank": 1}, "StandbyReady has the unexpected field 'rank'; its fields: none"),
        ({"kind": "Regrouped", "number": "1"}, "Regrouped, field 'number': expected int, found '1'"),
        ({"kind": "Regrouped", "number": True}, "Regrouped, field 'number': expected int, found True"),
        ({"kind": "Regrouped", "number": None}, "Regrouped, field 'number': expected int, found None"),
        ({"kind": "Regroup", "number": 1, "fault": {}, "env": {"A": 1}}, r"'env': expected dict\[str, str\], found a"),
        ({"kind": "HoldMemory", "paths": ["a", 1], "reason": ""}, r"'paths': expected list\[str\], found a list"),
        ({"kind": "MemoryHeld", "refusal": 61 * "9"}, None),
        ({"kind": "MemoryHeld", "refusal": int(61 * "9")}, r"'refusal': expected str, found 9{60}\.\.\.$"),
    ],
)
def test_damaged_messages_are_refused(wire: object, reason: str | None) -> None:
    if reason is None:
        decode(wire)
        return
    with pytest.raises(ProtocolError, match=reason):
        decode(wire)


def test_a_number_of_seconds_may_be_whole() -> None:
    entered = EnteredLoop(
        in_place=True,
        standbys=0,
        preload_imports=True,
        hang_timeout_s=30,
        max_recoveries_without_progress=3,
        max_recoveries_per_hour=1,
        obstacle=None,
        bar="none",
        fixed_world="",
        straggler_factor=1.5,
        drain_stragglers_after_s=None,
    )
    assert decode(encode(entered)) == entered


def test_a_message_with_a_wrong_field_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="Regrouped, field 'number': expected int, found 'one'"):
        encode(Regrouped("one"))  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="Regroup, field 'env'"):
        encode(Regroup(1, {}, {"RANK": 1}))  # type: ignore[dict-item]
    with pytest.raises(ProtocolError, match="Message is not a message between agent and worker"):
        encode(Message())
