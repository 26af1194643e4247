"""The newest part of the log in memory: without a hole that was not told, and no larger than it has to be."""

from collections.abc import Sequence

import pytest

from gateway import recent as module
from gateway.recent import Recent
from tests.gateway_parts import Numbering


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_KEPT", 3)
    monkeypatch.setattr(module, "ENTRIES_KEPT", 3)


def filled(rows: int = 0, entries: int = 0) -> Recent:
    """A memory behind row 0 and entry 0, nothing of it saved."""
    numbering, recent = Numbering(), Recent(0, 0)
    for _ in range(rows):
        recent.append(numbering.batch([0, 1]), ())
    recent.append(None, [numbering.entry() for _ in range(entries)])
    return recent


def rows(recent: Recent, after: int) -> Sequence[int] | None:
    found = recent.rows(after)
    return None if found is None else [row for row, _ in found]


def seqs(recent: Recent, after: int, limit: int = 100) -> Sequence[int] | None:
    found = recent.entries("events", 0, after, limit)
    return None if found is None else [entry.seq for entry in found]


def test_what_is_not_saved_stays_however_much_it_is() -> None:
    recent = filled(rows=10, entries=10)
    assert rows(recent, 0) == list(range(1, 11))
    assert rows(recent, 7) == [8, 9, 10]
    assert rows(recent, 10) == []
    assert seqs(recent, 4, limit=3) == [5, 6, 7]


def test_of_what_is_saved_only_the_newest_stays_and_older_is_to_be_read_from_the_journal() -> None:
    recent = filled(rows=10, entries=10)
    recent.saved(9, 9)
    assert rows(recent, 0) is None
    assert rows(recent, 7) == [8, 9, 10]
    assert seqs(recent, 0) is None
    assert seqs(recent, 7) == [8, 9, 10]


def test_row_is_split_by_motor() -> None:
    found = filled(rows=1).rows(0)
    assert found is not None
    assert {at: records["seq"].tolist() for at, records in found[0][1].items()} == {0: [1], 1: [1]}


def test_what_was_given_up_is_skipped_and_nothing_else() -> None:
    recent = filled(rows=10, entries=10)
    recent.forget(range(3, 6), {2, 4})
    assert rows(recent, 0) == [1, 2, 6, 7, 8, 9, 10]
    assert rows(recent, 3) == [6, 7, 8, 9, 10]
    assert seqs(recent, 0) == [1, 3, 5, 6, 7, 8, 9, 10]


def test_partition_without_a_memory_is_to_be_read_from_the_journal() -> None:
    assert filled(rows=1).entries("outcomes", 1, 0, 10) is None
