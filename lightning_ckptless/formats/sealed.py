"""Sealed records: JSON with its kind, its format number and a digest of the contents.

The digest detects damage. It is not a signature, as anyone with write access can write another digest, so the fields
are always checked against a schema as well.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lightning_ckptless.formats.schema import Check, SchemaError

LONGEST_BYTES = 1 << 30


class FormatError(SchemaError):
    """A record has another format, which another release of this package reads."""


def seal(kind: str, number: int, fields: dict[str, Any]) -> bytes:
    """Serialize a record.

    Args:
        kind: kind of record, e.g. `arena`.
        number: format number of that kind.
        fields: JSON values of the record.
    """
    contents = {"format": number, "kind": kind, **fields}
    return json.dumps(contents | {"digest": _digest(contents)}, indent=1).encode()


def unseal(data: bytes, kind: str, number: int, schema: Check) -> Any:
    """Verify and read a record.

    Args:
        data: result of `seal`.
        kind: expected kind of record.
        number: expected format number.
        schema: schema of the fields.

    Raises:
        FormatError: the record has another format.
        SchemaError: the record is damaged, has another kind, or does not match the schema.
    """
    fields = parse(data)
    if type(fields) is not dict:
        raise SchemaError("the record: expected an object")
    found, digest = fields.get("format"), fields.pop("digest", None)
    # Checked before the digest, which another format may compute differently.
    if fields.get("kind") == kind and type(found) is int and found != number:
        raise FormatError(f"{kind} format {found}, expected {number}")
    if digest != _digest(fields):
        raise SchemaError("damaged: its digest does not match")
    if fields.pop("kind", None) != kind or fields.pop("format", None) != number:
        raise SchemaError(f"expected {kind} format {number}")
    return schema(fields, "")


def parse(data: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        SchemaError: the data is too long or not valid JSON.
    """
    if len(data) > LONGEST_BYTES:
        raise SchemaError(f"the record: {len(data)} bytes, expected at most {LONGEST_BYTES}")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"the record: invalid JSON: {error}") from error


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
