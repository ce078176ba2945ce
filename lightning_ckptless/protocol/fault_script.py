"""Fault scripts: which fault to inject, on which rank, at which step and moment.

    kind:rank=R:step=S[:at=MOMENT][:times=N]        several faults are separated by commas
    rewind:step=S:to=T[:skip=B][:rank=R][:times=N]
    flip:rank=R:step=S:tensor=NAME[:element=E][:bit=K][:at=MOMENT][:times=N]
    wrong:rank=R:step=S[:times=N]

    kill:rank=1:step=7                              SIGKILL to rank 1 during optimizer step 7
    raise:rank=all:step=3:at=backward               an exception on every rank, in the backward pass
    exit:rank=0:step=9:at=commit:times=2            rank 0 exits at step 9, and again when the step is replayed
    rewind:step=20:to=12                            rank 0 requests after step 20 that all ranks go back to step 12
    flip:rank=1:step=7:tensor=parameter/fc.bias:bit=30
                                                    a bit of a parameter on rank 1 changes after step 7
    wrong:rank=1:step=7                             from step 7 on, matrix products of rank 1 are wrong, until its
                                                    process ends

Tensors are named like `parameter/fc.weight`, `buffer/norm.running_mean` and `optimizer/0/fc.weight/exp_avg`. Steps are
counted from 1: `step=7` is the one after which `global_step` is 7.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Literal, TypeVar

from lightning_ckptless.errors import OptionsError

GRAMMAR = "kind:rank=R:step=S[:at=MOMENT][:times=N]"
GRAMMAR_OF_REWIND = "rewind:step=S:to=T[:skip=B][:rank=R][:times=N]"
GRAMMAR_OF_FLIP = "flip:rank=R:step=S:tensor=NAME[:element=E][:bit=K][:at=MOMENT][:times=N]"
GRAMMAR_OF_WRONG = "wrong:rank=R:step=S[:times=N]"

ALL: Literal["all"] = "all"
"""Every rank."""


class FaultKind(StrEnum):
    """The kind of a fault."""

    KILL = "kill"
    RAISE = "raise"
    HANG = "hang"
    EXIT = "exit"
    LEAVE = "leave"
    STOP = "stop"
    CRASH = "crash"
    NODE = "node"
    REWIND = "rewind"
    FLIP = "flip"
    WRONG = "wrong"


class Moment(StrEnum):
    """The moment of a step at which a fault is injected."""

    TRAINING_STEP = "training_step"
    BACKWARD = "backward"
    OPTIMIZER_STEP = "optimizer_step"
    COMMIT = "commit"
    MIRROR = "mirror"
    ACCUMULATION = "accumulation"
    VALIDATION = "validation"
    EPOCH_END = "epoch_end"
    REGROUP = "regroup"
    CONNECT = "connect"
    RESTORE = "restore"
    REWIND = "rewind"
    GO_BACK = "go_back"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault to inject. `str` returns the form that `parse_faults` reads.

    Args:
        kind: kind of fault.
        rank: rank to inject it on; `all` for every rank.
        step: optimizer step in progress, counted from 1.
        at: moment of the step.
        times: number of injections, counted over all replays of the step.
        to: for a rewind, the step to return to; 0 otherwise.
        skip: for a rewind, the number of batches of each rank to skip.
        tensor: for a flip, the name of the tensor; empty otherwise.
        element: for a flip, the index of the element in the flattened tensor of the rank.
        bit: for a flip, the index of the bit in the element; 0 is the least significant one.
    """

    kind: FaultKind
    rank: int | Literal["all"]
    step: int
    at: Moment = Moment.TRAINING_STEP
    times: int = 1
    to: int = 0
    skip: int = 0
    tensor: str = ""
    element: int = 0
    bit: int = 0

    def __str__(self) -> str:
        times = "" if self.times == 1 else f":times={self.times}"
        if self.kind is FaultKind.REWIND:
            skip = f":skip={self.skip}" if self.skip else ""
            return f"{self.kind}:step={self.step}:to={self.to}{skip}:rank={self.rank}{times}"
        at = "" if self.at is _usual_moment(self.kind) else f":at={self.at}"
        where = f":tensor={self.tensor}:element={self.element}:bit={self.bit}" if self.kind is FaultKind.FLIP else ""
        return f"{self.kind}:rank={self.rank}:step={self.step}{where}{at}{times}"

    def concerns(self, rank: int, step: int, at: Moment) -> bool:
        """Whether the fault is due on a rank at a moment of a step."""
        return self.rank in (ALL, rank) and self.step == step and self.at is at


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Parse a fault script.

    Args:
        text: faults in the grammar of this module, separated by commas; blank for none.

    Raises:
        OptionsError: the text does not match the grammar; the message shows the part, the closest match and the
            grammar.
    """
    return tuple(_parse_fault(part.strip()) for part in text.split(",")) if text.strip() else ()


def _parse_fault(text: str) -> Fault:
    kind_name, *settings = text.split(":")
    kind = _one_of(FaultKind, kind_name, "kind", text)
    given: dict[str, str] = {}
    required, names = _NAMES.get(kind, _USUAL_NAMES)
    for setting in settings:
        name, equals, value = setting.partition("=")
        if name not in names:
            raise _error(text, f"unknown part {setting!r}{_nearest(name, names)}")
        if not equals or name in given:
            raise _error(text, f"{setting!r} {'is given twice' if equals else 'has no value'}")
        given[name] = value
    if missing := [name for name in names[:required] if not given.get(name)]:
        raise _error(text, f"{' and '.join(missing)} missing")
    times = _number("times", given.get("times", "1"), 1, text)
    if kind is FaultKind.REWIND:
        step, to, skip = (_number(name, given.get(name, "0"), 0, text) for name in ("step", "to", "skip"))
        if to >= step:
            raise _error(text, f"to={to}: expected a step before {step}")
        rank = _number("rank", given.get("rank", "0"), 0, text)
        return Fault(kind, rank, step, Moment.COMMIT, times, to, skip)
    return Fault(
        kind,
        ALL if given["rank"] == ALL else _number("rank", given["rank"], 0, text),
        _number("step", given["step"], 1, text),
        _one_of(Moment, given.get("at", _usual_moment(kind)), "moment", text),
        times,
        tensor=given.get("tensor", ""),
        element=_number("element", given.get("element", "0"), 0, text),
        bit=_number("bit", given.get("bit", "0"), 0, text),
    )


def _usual_moment(kind: FaultKind) -> Moment:
    """The moment of a fault that does not name one."""
    return Moment.COMMIT if kind is FaultKind.FLIP else Moment.TRAINING_STEP


_USUAL_NAMES = 2, ("rank", "step", "at", "times")
_NAMES = {
    FaultKind.REWIND: (2, ("step", "to", "skip", "rank", "times")),
    FaultKind.FLIP: (3, ("rank", "step", "tensor", "element", "bit", "at", "times")),
    FaultKind.WRONG: (2, ("rank", "step", "times")),
}
"""Number of required parts, which come first, and all parts."""
_Word = TypeVar("_Word", bound=StrEnum)


def _one_of(words: type[_Word], found: str, what: str, text: str) -> _Word:
    by_name = {str(word): word for word in words}
    if found not in by_name:
        raise _error(text, f"unknown {what} {found!r}{_nearest(found, by_name)}")
    return by_name[found]


def _number(name: str, value: str, least: int, text: str) -> int:
    if not (value.isascii() and value.isdigit()) or int(value) < least:
        words = f" or {ALL!r}" if name == "rank" else ""
        raise _error(text, f"{name}={value!r}: expected a whole number of at least {least}{words}")
    return int(value)


def _nearest(found: str, words: Iterable[str]) -> str:
    near = get_close_matches(found, list(words), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _error(text: str, problem: str) -> OptionsError:
    return OptionsError(
        f"fault {text!r}: {problem}\n"
        f"expected {GRAMMAR}\n"
        f"      or {GRAMMAR_OF_REWIND}\n"
        f"      or {GRAMMAR_OF_FLIP}\n"
        f"      or {GRAMMAR_OF_WRONG}\n"
        f"  kind    {', '.join(FaultKind)}\n"
        f"  R       a rank or {ALL!r}\n"
        f"  S       an optimizer step, counted from 1\n"
        f"  MOMENT  {', '.join(Moment)}\n"
        f"  T       the step to return to, before S\n"
        f"  B       the number of batches of each rank to skip\n"
        f"  NAME    a tensor, e.g. parameter/fc.weight or optimizer/0/fc.weight/exp_avg\n"
        f"  E, K    an element of the flattened tensor, and a bit of it, counted from 0"
    )
