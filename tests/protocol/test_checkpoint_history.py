"""What a rollback does with checkpoint files, decided from notes per fit."""

from __future__ import annotations

import pytest

from lightning_ckptless.protocol.checkpoint_history import (
    BEGINNING,
    Action,
    FileOperation,
    Found,
    Move,
    moves_to_return,
    moves_to_settle,
    note_of,
    note_of_begin,
    note_of_rewind,
    read_history,
)
from lightning_ckptless.protocol.versions import Version

Note = dict[str, object]


def after_validation(step: int) -> Version:
    return Version(step, validation_done=True)


def before_validation(step: int) -> Version:
    return Version(step, validation_done=False)


def save(path: str, step: int, *, fit: int = 0, existed: bool = False) -> Note:
    return note_of(FileOperation(path, Action.SAVE, after_validation(step), existed), fit)


def remove(path: str, step: int, *, fit: int = 0) -> Note:
    return note_of(FileOperation(path, Action.REMOVE, after_validation(step), True), fit)


@pytest.mark.parametrize(
    ("after", "restored", "is_later"),
    [
        (BEGINNING, after_validation(0), False),
        (after_validation(3), after_validation(4), False),
        (after_validation(3), after_validation(3), True),
        (after_validation(3), after_validation(2), True),
        # Saved during the validation of step 3: the version after that validation includes it, the one before does not.
        (before_validation(3), after_validation(3), False),
        (before_validation(3), before_validation(3), True),
        (BEGINNING, BEGINNING, True),
    ],
)
def test_operations_that_a_version_does_not_include(after: Version, restored: Version, is_later: bool) -> None:
    operation = FileOperation("/a.ckpt", Action.SAVE, after, False)
    history = read_history([note_of(operation, 0)], 0)
    assert history.first_after(restored) == ({"/a.ckpt": operation} if is_later else {})


def test_the_histories_of_fits_are_independent() -> None:
    notes = [
        save("/one.ckpt", 16),
        note_of_begin(1, new_run=True),
        save("/two.ckpt", 8, fit=1),
        note_of_rewind(after_validation(4), 1),
    ]
    assert read_history(notes, 0).paths == ["/one.ckpt"]
    assert read_history(notes, 0).present() == {"/one.ckpt"}
    assert read_history(notes, 1).paths == ["/two.ckpt"]
    assert read_history(notes, 1).present() == frozenset()


def test_an_undone_operation_does_not_count_as_later() -> None:
    notes = [save("/a", 9), remove("/a", 11), note_of_rewind(after_validation(9), 0), save("/a", 9)]
    history = read_history(notes, 0)
    assert [operation.action for operation in history.live] == [Action.SAVE]
    assert history.first_after(after_validation(10)) == {"/a": history.undone[1]}
    assert history.present() == {"/a"}


def test_a_new_run_with_the_same_id_has_no_history() -> None:
    notes = [save("/a", 9), save("/b", 3, fit=1), note_of_begin(0, new_run=True), save("/c", 1)]
    assert read_history(notes, 0).paths == ["/c"]
    assert read_history(notes, 0).of_later_fits == frozenset()
    assert read_history(notes, 1).paths == []


def test_a_fit_that_starts_from_a_checkpoint_file_keeps_the_history_of_later_fits() -> None:
    notes = [save("/a", 9), save("/b", 3, fit=1), note_of_begin(0, new_run=False)]
    assert read_history(notes, 0).paths == []
    assert read_history(notes, 0).of_later_fits == {"/b"}
    assert read_history(notes, 1).paths == ["/b"]


def test_a_file_belongs_to_the_last_fit_that_wrote_it() -> None:
    notes = [save("/a", 9), save("/b", 9), save("/a", 3, fit=1, existed=True), save("/a", 9)]
    assert read_history(notes, 0).of_later_fits == {"/a"}
    assert read_history(notes, 1).of_later_fits == frozenset()


WRITTEN = FileOperation("/a", Action.SAVE, after_validation(9), existed=False)
WRITTEN_OVER = FileOperation("/a", Action.SAVE, after_validation(9), existed=True)
REMOVED = FileOperation("/a", Action.REMOVE, after_validation(9), existed=True)


@pytest.mark.parametrize(
    ("first", "found", "of_later_fit", "moves"),
    [
        (WRITTEN, Found(exists=True), False, [Move.SET_ASIDE]),
        (WRITTEN, Found(exists=False), False, []),
        (WRITTEN, Found(exists=False, held=True), False, []),
        # The replay was interrupted by another fault.
        (WRITTEN, Found(exists=True, aside=True), False, [Move.DELETE]),
        (WRITTEN, Found(exists=False, aside=True), False, []),
        (WRITTEN_OVER, Found(exists=True), False, []),
        (WRITTEN_OVER, Found(exists=True), True, [Move.SET_ASIDE]),
        (REMOVED, Found(exists=False, held=True), False, [Move.PUT_HELD_BACK]),
        (REMOVED, Found(exists=True, held=True), False, [Move.SET_ASIDE, Move.PUT_HELD_BACK]),
        # The removal was committed, but then an older version was restored.
        (REMOVED, Found(exists=False), False, []),
    ],
)
def test_a_path_is_restored_to_a_version(
    first: FileOperation, found: Found, of_later_fit: bool, moves: list[Move]
) -> None:
    assert moves_to_return(first, found, of_later_fit=of_later_fit) == moves


@pytest.mark.parametrize(
    ("found", "rewritten", "of_later_fit", "moves"),
    [
        (Found(exists=True, aside=True), True, False, [Move.DROP_ASIDE]),
        (Found(exists=False, aside=True), True, False, [Move.DROP_ASIDE]),
        # Saved by time, for example: the replay did not save it again.
        (Found(exists=False, aside=True), False, False, [Move.PUT_ASIDE_BACK]),
        (Found(exists=True, aside=True), True, True, [Move.PUT_ASIDE_BACK]),
        (Found(exists=True), True, False, []),
    ],
)
def test_copies_are_resolved_once_the_run_has_passed_their_step(
    found: Found, rewritten: bool, of_later_fit: bool, moves: list[Move]
) -> None:
    assert moves_to_settle(found, rewritten=rewritten, of_later_fit=of_later_fit) == moves
