"""Schemas for the events of a ledger: the fields that readers rely on. Events may have additional fields."""

from __future__ import annotations

import re
import zlib
from typing import Any

from lightning_ckptless.formats.schema import (
    BYTES,
    LARGEST,
    MOST_RANKS,
    PID,
    RANK,
    STEP,
    Check,
    SchemaError,
    boolean,
    integer,
    number,
    one_of,
    optional,
    record,
    sequence,
    table,
    text,
)
from lightning_ckptless.formats.sealed import parse

FORMAT = 2
_SUFFIX = re.compile(rb', "format": (\d+), "crc": "([0-9a-f]{8})"}')
_SUFFIX_BYTES = len(b', "format": 1, "crc": "00000000"}')
_RANKS = sequence(RANK, most=MOST_RANKS)
_BY_RANK = text(r"\d{1,6}")
_COUNT = integer()
_MOST_FAILURES = 1_000_000
"""The confidence interval of more takes long to compute, and no run has them."""
_WORDS = text(longest=1 << 16)
_AFTER = {"after_step": integer(-1), "after_tail": boolean}


def _worker(value: Any, path: str) -> None:
    if type(value) is not list or len(value) != 2:
        raise SchemaError(f"{path}: expected a process id and a string")
    PID(value[0], path)
    _WORDS(value[1], path)


_CHECKPOINT: dict[str, dict[str, Check]] = {
    "save": {"path": text(), "existed": boolean, **_AFTER},
    "remove": {"path": text(), "existed": boolean, **_AFTER},
    "rewind": _AFTER,
    "written": {"path": text(), "bytes": BYTES},
    "begin": {"new_run": boolean},
}
_EVENTS: dict[str, dict[str, Check]] = {
    "checkpoint": {"action": one_of(*_CHECKPOINT), "fit": _COUNT},
    "committed": {"step": STEP, "of": optional(STEP)},
    "divergence": {"step": STEP, "committed": integer(-1), "wrong": _RANKS, "consequence": text()},
    "drain": {
        "node": text(), "drained_rank": optional(RANK), "action": text(), "cause": _WORDS, "reason": _WORDS,
    },
    "drain_given_up": {"node": text(), "drained_rank": RANK},
    "drained": {"node": text(), "drained_rank": RANK, "step": STEP},
    "durable_failed": {"step": STEP, "cause": optional(_WORDS)},
    "durable_written": {"step": STEP, "path": text()},
    "fault": {
        "restart": optional(_COUNT), "signal_name": optional(_WORDS), "exit_code": optional(integer(-LARGEST)),
        "died_at": optional(number()), "detected_at": optional(number()), "stopped_at": optional(number()),
        "node": optional(text()), "pid": optional(PID), "kind": optional(text()), "hung": optional(_WORDS),
        "out_of_memory": optional(_WORDS),
    },
    "in_place": {"new": table(_BY_RANK, _worker)},
    "node_drained": {"node": text()},
    "node_lost": {"node": optional(text()), "reason": _WORDS},
    "placement": {
        "kind": text(), "copies": integer(0, MOST_RANKS), "holders": sequence(_RANKS), "nodes": sequence(text()),
        "domains": sequence(text()), "sizes_bytes": sequence(BYTES),
    },
    "recovery": {
        "rung": text(), "kind": text(), "culprit_rank": optional(RANK), "cause": _WORDS, "version": text(),
        "steps_replayed": _COUNT, "phases": table(text(), number()), "total_s": number(),
        "sources": optional(table(text(), _COUNT)), "moved_bytes": optional(BYTES),
    },
    "raised": {"cause": _WORDS, "final": boolean},
    "restored": {"version": text()},
    "run_ended": {"goodput": optional(number(0, 1)), "recoveries": optional(_COUNT)},
    "run_started": {
        "world_size": optional(integer(1, MOST_RANKS)), "placement": optional(_WORDS), "arena": text(),
    },
    "standbys": {"ready": _COUNT, "wanted": _COUNT},
    "rank_time": {"data_wait_s": number(), "own_s": number(), "batches": _COUNT},
    "time_spent": {
        "began_at": number(), "until": number(), "seconds": table(text(r"\w+"), number()), "is_over": boolean,
        "failures": integer(0, _MOST_FAILURES), "steps_replayed": _COUNT, "step": STEP, "versions": _COUNT,
    },
    "workers_spawned": {
        "pids": table(_BY_RANK, PID), "node": text(), "host": text(), "agent": PID, "folder": text(r"[^\0]+"),
    },
}  # fmt: skip
_HEAD: dict[str, Check] = {
    "event": text(r"\w+"), "at": number(), "generation": optional(integer(0, 1 << 40)), "rank": optional(RANK),
}  # fmt: skip
_OF_ANY = record(extra=True, **_HEAD)
_OF_EVENT = {event: record(extra=True, **fields) for event, fields in _EVENTS.items()}
_OF_ACTION = {action: record(extra=True, **fields) for action, fields in _CHECKPOINT.items()}


def seal_line(line: bytes) -> bytes:
    """Append format and checksum to a line of a ledger, as the last two keys.

    Args:
        line: event as a JSON object.
    """
    return line[:-1] + b', "format": %d, "crc": "%08x"}' % (FORMAT, zlib.crc32(line))


def read_line(line: bytes) -> dict[str, Any]:
    """Read and verify a line of a ledger.

    Raises:
        SchemaError: the line is damaged, or does not match the schema of its event.
    """
    body, suffix = line[:-_SUFFIX_BYTES] + b"}", _SUFFIX.fullmatch(line[-_SUFFIX_BYTES:])
    if suffix is None or int(suffix[1]) != FORMAT or int(suffix[2], 16) != zlib.crc32(body):
        raise SchemaError("damaged: its checksum does not match")
    fields: dict[str, Any] = parse(body)
    event = _OF_ANY(fields, "")["event"]
    if event in _OF_EVENT:
        _OF_EVENT[event](fields, event)
    if event == "checkpoint":
        _OF_ACTION[fields["action"]](fields, event)
    if event == "placement":
        _require_one_per_rank(fields)
    return fields


def _require_one_per_rank(fields: dict[str, Any]) -> None:
    count = len(fields["holders"])
    if {len(fields[name]) for name in ("nodes", "domains", "sizes_bytes")} != {count}:
        raise SchemaError(f"placement: expected {count} nodes, domains and sizes, one per rank")
    if any(rank >= count for others in fields["holders"] for rank in others):
        raise SchemaError(f"placement.holders: expected ranks below {count}")
