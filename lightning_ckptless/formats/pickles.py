"""Verifies pickles from disk or network by the names that they refer to.

Reading a pickle calls the classes and functions that it names. A pickle from disk or from a socket is first read here,
with inert objects in place of everything that it names. It is admitted if all its names are known to be safe or were
opted in. This admits plain data: numbers, text, arrays, tensors, containers, enumerations, states of random generators,
and our own records of these.

The check does not depend on what a name refers to: names must be literal text in the pickle, and a computed name (the
result of a call) is refused.
"""

from __future__ import annotations

import enum
import io
import pickle
import pickletools
import re
import sys
from abc import ABC
from collections.abc import Collection
from dataclasses import is_dataclass
from typing import Any, Generic, Self

from lightning_ckptless.formats.schema import SchemaError


class Packed(bytes):
    """A pickle that this process or another one of the run has written and that was admitted if necessary.

    Only values of this type are unpickled. They may be nested.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, (bytes(self),)


class UntrustedError(SchemaError):
    """A pickle refers to a name that is not allowed, or is damaged.

    Args:
        name: dotted name; empty if the pickle is damaged.
        text: error message.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


_BUILTINS = (
    "bool bytearray bytes complex dict enumerate float frozenset int iter list range reversed set slice str tuple zip"
)
_NAMES = {
    "builtins": _BUILTINS,
    "array": "_array_reconstructor array",
    "collections": "ChainMap Counter OrderedDict UserDict UserList UserString defaultdict deque",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID SafeUUID",
    "itertools": "count",
    "types": "SimpleNamespace",
    "argparse": "Namespace",
    "random": "Random",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "copyreg": "_reconstructor",
    "_codecs": "encode",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
    "numpy.random._mt19937": "MT19937",
    "numpy.random._pcg64": "PCG64 PCG64DXSM",
    "numpy.random._philox": "Philox",
    "numpy.random._sfc64": "SFC64",
    "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
    "torch": (
        "Size Tensor device per_channel_affine per_channel_affine_float_qparams per_channel_symmetric "
        "per_tensor_affine per_tensor_symmetric"
    ),
    "torch._tensor": "_rebuild_from_type_v2",
    "torch._utils": (
        "_rebuild_device_tensor_from_numpy _rebuild_parameter _rebuild_parameter_with_state _rebuild_qtensor "
        "_rebuild_sparse_tensor _rebuild_tensor_v2 _rebuild_tensor_v3"
    ),
    "torch.nn.parameter": "Buffer Parameter",
    "torch.serialization": "_get_layout",
    "lightning_ckptless.durable.recipe": "Recipe",
    "lightning_ckptless.formats.packing": "rebuild_storage rebuild_tensor",
    "lightning_ckptless.protocol.versions": "Version",
    "lightning_ckptless.trainer.data.first_fetch": "Fetches",
    "lightning_ckptless.trainer.data.loader": "LoaderPosition",
    "lightning_ckptless.trainer.state.rng": "RngState",
}
_SAFE = frozenset(f"{module}.{name}" for module, names in _NAMES.items() for name in names.split())
_SAFE_KINDS = re.compile(
    r"torch\.(bool|bfloat16|float(16|32|64)|float[48]_\w+|complex(32|64|128)|q?u?int\d+(x\d+)?)"
    r"|torch\.optim\.(lr_scheduler\.[A-Z]\w*|swa_utils\.SWALR(\.\w+)?)"
)
"""Names of dtypes and of torch's own schedulers."""

PACKED = f"{Packed.__module__}.{Packed.__qualname__}"
_INSTRUCTIONS = """
    PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 SHORT_BINUNICODE BINUNICODE BINUNICODE8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS
    FROZENSET MEMOIZE BINGET LONG_BINGET STACK_GLOBAL REDUCE BUILD NEWOBJ NEWOBJ_EX BINPERSID POP POP_MARK
"""
_OPCODES = frozenset(_INSTRUCTIONS.split())
DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError,
    RuntimeError, AssertionError, ImportError,
)  # fmt: skip
"""Errors that reading a damaged pickle can raise."""
PART = "lightning_ckptless.formats.packing.open_part"
MEMBER = "lightning_ckptless.formats.packing.member"
BUNDLE = "lightning_ckptless.trainer.state.device_pickle.open_bundle"


def is_safe(name: str) -> bool:
    """Return whether a pickle may call the object with this dotted name with arbitrary arguments."""
    return name in _SAFE or _SAFE_KINDS.fullmatch(name) is not None


def admit(data: bytes, trusted: Collection[str] = ()) -> Packed:
    """Verify a pickle from disk or network without executing it.

    Args:
        data: the pickle.
        trusted: dotted names of classes and functions that are opted in.

    Returns:
        The same bytes, which may now be unpacked.

    Raises:
        UntrustedError: the pickle refers to another name, or is damaged.
    """
    try:
        require_usual(data)
        _Reader(data, trusted).load()
    except UntrustedError:
        raise
    except DAMAGED as error:
        raise UntrustedError("", f"a damaged pickle: {error!r}") from error
    return Packed(data)


def require_usual(data: bytes) -> None:
    """Refuse a pickle with opcodes that we never write, since some allocate as much memory as the file requests.

    Raises:
        UntrustedError: the pickle has such an opcode.
        ValueError: the data is not a pickle.
    """
    for opcode, _, at in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise UntrustedError("", f"a damaged pickle: {opcode.name} at byte {at}")


class _Inert:
    """Replaces every object that a pickle creates."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        """Accept any arguments."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> _Inert:
        return self

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Accept an entry."""

    def __setstate__(self, _state: Any) -> None:
        """Accept attributes."""

    def append(self, _item: Any) -> None:
        """Accept an item."""

    def extend(self, _items: Any) -> None:
        """Accept items."""

    def add(self, _item: Any) -> None:
        """Accept a member."""


class _Reader(pickle.Unpickler):
    """Reads a pickle and checks only the names that it refers to.

    Args:
        data: the pickle.
        trusted: dotted names that are opted in.
    """

    def __init__(self, data: bytes, trusted: Collection[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._trusted = trusted

    def persistent_load(self, _place: Any) -> _Inert:
        """Replace a tensor or optimizer that is stored outside of the pickle."""
        return _Inert()

    def find_class(self, module: str, name: str) -> Any:
        """Return an inert replacement for a class or function.

        Raises:
            UntrustedError: the name is not allowed.
        """
        full_name = f"{module}.{name}"
        if full_name in (PACKED, PART):
            return self._inner
        if full_name == BUNDLE:
            return self._bundle
        if full_name == MEMBER:
            return self._member
        is_opted_in = full_name in self._trusted
        if is_safe(full_name) or is_opted_in or is_record_class(found_in_program(module, name)):
            return _Inert
        raise UntrustedError(full_name, f"it has a {full_name}, which is neither plain data nor opted in")

    def _inner(self, data: bytes) -> _Inert:
        admit(data, self._trusted)
        return _Inert()

    def _bundle(self, body: bytes, *_parts: Any) -> _Inert:
        return self._inner(body)

    def _member(self, module: str, name: str, _value: Any) -> _Inert:
        """Replace a member of an enumeration that the script has loaded."""
        full_name = f"{module}.{name}"
        if full_name not in self._trusted and not is_enumeration(found_in_program(module, name)):
            raise UntrustedError(full_name, f"it has a {full_name}, which is not an enumeration of the script")
        return _Inert()


def found_in_program(module: str, name: str) -> Any:
    """Return the object with this name in a loaded module; None if there is none. Imports nothing."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def is_enumeration(found: Any) -> bool:
    """Return whether an object is an enumeration class."""
    return isinstance(found, type) and issubclass(found, enum.Enum)


_CODE_OF_RECORDS = (
    "__post_init__",
    "__del__",
    "__new__",
    "__getstate__",
    "__setstate__",
    "__reduce__",
    "__reduce_ex__",
)


def is_record_class(found: Any) -> bool:
    """Return whether an object is a class of named tuples, or a dataclass that runs no code of its own when created."""
    if not isinstance(found, type):
        return False
    if issubclass(found, tuple):
        return found.__bases__ == (tuple,) and hasattr(found, "__match_args__") and _is_text(found.__new__)
    bases = [base for base in found.__mro__ if base not in (object, Generic, ABC)]
    return bool(bases) and all(is_dataclass(base) and _is_generated(base) for base in bases)


def _is_generated(cls: type) -> bool:
    defined = vars(cls)
    codes = [defined[name] for name in _CODE_OF_RECORDS if name in defined]
    return _is_text(defined.get("__init__")) and all(code.__module__ == "dataclasses" for code in codes)


def _is_text(function: Any) -> bool:
    """Return whether a function was made from text, as the standard library makes those of records."""
    return getattr(getattr(function, "__code__", None), "co_filename", "") == "<string>"
