"""The grammar of fault scripts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.fault_script import GRAMMAR, Fault, FaultKind, Moment, parse_faults

faults = st.builds(
    Fault,
    kind=st.sampled_from(sorted(set(FaultKind) - {FaultKind.REWIND, FaultKind.FLIP, FaultKind.WRONG})),
    rank=st.just("all") | st.integers(0, 10**6),
    step=st.integers(1, 10**9),
    at=st.sampled_from(Moment),
    times=st.integers(1, 100),
)

rewinds = st.builds(
    lambda rank, to, more, skip, times: Fault(FaultKind.REWIND, rank, to + more, Moment.COMMIT, times, to, skip),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(1, 10**3),
    st.integers(0, 10**3),
    st.integers(1, 9),
)

flips = st.builds(
    lambda rank, step, at, times, tensor, element, bit: Fault(
        FaultKind.FLIP, rank, step, at, times, tensor=tensor, element=element, bit=bit
    ),
    st.just("all") | st.integers(0, 10**6),
    st.integers(1, 10**9),
    st.sampled_from(Moment),
    st.integers(1, 100),
    st.from_regex(r"[a-z]+/[\w./#]+", fullmatch=True),
    st.integers(0, 10**9),
    st.integers(0, 63),
)

wrongs = st.builds(
    lambda rank, step, times: Fault(FaultKind.WRONG, rank, step, times=times),
    st.just("all") | st.integers(0, 10**6),
    st.integers(1, 10**9),
    st.integers(1, 100),
)


@given(st.lists(faults | rewinds | flips | wrongs, max_size=5))
def test_a_script_is_parsed_back_from_its_text(script: list[Fault]) -> None:
    assert parse_faults(",".join(str(fault) for fault in script)) == tuple(script)


@given(st.text(max_size=40) | st.text("kilrankstep=:,0123456789", max_size=40))
def test_any_text_is_parsed_or_refused_with_the_grammar(text: str) -> None:
    problem = None
    try:
        read = parse_faults(text)
    except OptionsError as error:
        read, problem = (), str(error)
    assert problem is None or GRAMMAR in problem
    assert parse_faults(",".join(map(str, read))) == read


def test_omitted_parts_have_defaults() -> None:
    assert parse_faults("kill:rank=1:step=7") == (Fault(FaultKind.KILL, 1, 7, Moment.TRAINING_STEP, 1),)
    assert str(Fault(FaultKind.KILL, 1, 7)) == "kill:rank=1:step=7"


def test_a_flip_needs_a_tensor_and_defaults_to_the_first_bit_after_the_step() -> None:
    assert parse_faults("flip:rank=1:step=7:tensor=parameter/fc.bias") == (
        Fault(FaultKind.FLIP, 1, 7, Moment.COMMIT, tensor="parameter/fc.bias"),
    )
    for text in ("flip:rank=1:step=7", "flip:rank=1:step=7:tensor="):
        with pytest.raises(OptionsError, match="tensor missing"):
            parse_faults(text)


def test_wrong_products_have_no_moment() -> None:
    assert parse_faults("wrong:rank=1:step=7") == (Fault(FaultKind.WRONG, 1, 7),)
    with pytest.raises(OptionsError, match="unknown part 'at=backward'"):
        parse_faults("wrong:rank=1:step=7:at=backward")


def test_several_faults_with_surrounding_blanks() -> None:
    script = " raise:rank=all:step=3:at=backward , exit:times=2:step=9:rank=0 "
    assert parse_faults(script) == (
        Fault(FaultKind.RAISE, "all", 3, Moment.BACKWARD),
        Fault(FaultKind.EXIT, 0, 9, times=2),
    )
    assert parse_faults("  ") == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kil:rank=1:step=7", "unknown kind 'kil', did you mean 'kill'?"),
        ("kill:rank=1:setp=7", "unknown part 'setp=7', did you mean 'step'?"),
        ("kill:rank=1:step=7:at=bakward", "unknown moment 'bakward', did you mean 'backward'?"),
        ("kill:rank=1:step=7:zzz", "unknown part 'zzz'\n"),
        ("kill:rank=1:step", "'step' has no value"),
        ("kill:rank=1:rank=2:step=7", "'rank=2' is given twice"),
        ("kill:step=7", "rank missing"),
        ("kill", "rank and step missing"),
        ("kill:rank=-1:step=7", "rank='-1': expected a whole number of at least 0 or 'all'"),
        ("kill:rank=1:step=0", "step='0': expected a whole number of at least 1\n"),
        ("kill:rank=1:step=7:times=0", "times='0': expected a whole number of at least 1\n"),
        ("kill:rank=1:step=7,", "fault '': unknown kind ''"),
        ("kill:rank=1:step=7:to=3", "unknown part 'to=3'"),
        ("rewind:step=7", "to missing"),
        ("rewind:step=7:to=7", "to=7: expected a step before 7"),
        ("rewind:step=7:to=3:at=commit", "unknown part 'at=commit'"),
        ("rewind:step=7:to=3:rank=all", "rank='all': expected a whole number of at least 0"),
    ],
)
def test_the_error_shows_the_invalid_part(text: str, problem: str) -> None:
    with pytest.raises(OptionsError) as caught:
        parse_faults(text)
    assert problem in str(caught.value)


def test_a_fault_concerns_its_rank_step_and_moment() -> None:
    fault = Fault(FaultKind.KILL, 1, 7, Moment.COMMIT)
    assert fault.concerns(1, 7, Moment.COMMIT)
    assert not fault.concerns(0, 7, Moment.COMMIT)
    assert not fault.concerns(1, 8, Moment.COMMIT)
    assert not fault.concerns(1, 7, Moment.MIRROR)
    assert Fault(FaultKind.KILL, "all", 7, Moment.COMMIT).concerns(3, 7, Moment.COMMIT)
