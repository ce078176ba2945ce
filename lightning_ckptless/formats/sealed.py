"""Sealed records: JSON that says its kind and format, and has a digest of all that it says.

The digest tells damage from what was written. It is no signature: who may write to the file may write another digest.
So the fields are checked by a schema all the same.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lightning_ckptless.formats.schema import Check, SchemaError

LONGEST_BYTES = 1 << 30


class FormatError(SchemaError):
    """A record is of another format, which another release of this package reads."""


def seal(kind: str, number: int, fields: dict[str, Any]) -> bytes:
    """A record as bytes.

    Args:
        kind: of the record, such as `arena`.
        number: of the format of that kind.
        fields: the record, of values that JSON has.
    """
    whole = {"format": number, "kind": kind, **fields}
    return json.dumps(whole | {"digest": _digest(whole)}, indent=1).encode()


def unseal(data: bytes, kind: str, number: int, schema: Check) -> Any:
    """The record in some bytes.

    Args:
        data: what `seal` returned.
        kind: of the record.
        number: of its format.
        schema: of its fields.

    Raises:
        FormatError: it is of another format.
        SchemaError: it is damaged, of another kind, or not what the schema says.
    """
    fields = parse(data)
    if type(fields) is not dict:
        raise SchemaError("the record: expected an object")
    found, said = fields.get("format"), fields.pop("digest", None)
    # Another format may have another way to say its digest.
    if fields.get("kind") == kind and type(found) is int and found != number:
        raise FormatError(f"{kind} format {found}, expected {number}")
    if said != _digest(fields):
        raise SchemaError("damaged: its digest does not match")
    if fields.pop("kind", None) != kind or fields.pop("format", None) != number:
        raise SchemaError(f"expected {kind} format {number}")
    return schema(fields, "")


def parse(data: bytes | str) -> Any:
    """What some bytes say in JSON.

    Raises:
        SchemaError: they are no JSON.
    """
    if len(data) > LONGEST_BYTES:
        raise SchemaError(f"the record: {len(data)} bytes, expected at most {LONGEST_BYTES}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"the record: no JSON: {error}") from error


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
