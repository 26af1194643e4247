"""Damage in the journal costs the rows it hits, and exactly their sequence numbers are told, once."""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import SECOND
from gateway import damage as module
from gateway import telemetry
from gateway import writer as writer_module
from gateway.damage import Damage, DamagedEntry, Scrubber, find_damage
from gateway.event_time import EventTime
from gateway.journal import Changes, Journal, JournalReader, Lost, StoredEntry, Table
from gateway.stamp import Head
from gateway.writer import LogWriter
from tests.gateway_parts import MOTORS, Numbering, make_samples, until
from tests.unit.test_writer import Heard

ROOMY = 1 << 30
THREE = {0: "a", 1: "b", 2: "c"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


def open_journal(path: Path) -> Journal:
    return Journal(path, "arm1", MOTORS, ROOMY)


def spoil(path: Path, found: bytes, at: int = 20, bit: int = 1) -> None:
    """Flip a bit behind the place where the file holds ``found``."""
    data = bytearray(path.read_bytes())
    data[data.index(found) + at] ^= bit
    path.write_bytes(data)


def write(path: Path, rows: Sequence[Sequence[int]]) -> list[telemetry.Records]:
    numbering = Numbering()
    written = []
    with closing(open_journal(path)) as journal:
        for partitions in rows:
            batch = numbering.batch(partitions)
            written.append(batch.records)
            journal.commit(Changes(batch=batch))
    return written


def spoil_page(path: Path, found: bytes) -> None:
    """Overwrite the page that holds ``found``."""
    data = bytearray(path.read_bytes())
    page = data.index(found) // 4096 * 4096
    data[page : page + 4096] = b"\xa5" * 4096
    path.write_bytes(data)


# --- what is lost -----------------------------------------------------------------------------------------------------

ROWS = st.lists(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=5), min_size=1, max_size=20)


@given(ROWS, st.data())
def test_exactly_the_numbers_in_damaged_rows_are_found_once(rows: list[list[int]], data: st.DataObject) -> None:
    damaged = data.draw(st.sets(st.integers(1, len(rows))))
    numbering = Numbering(partitions=[0, 1, 2])
    expected: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    with closing(Journal(Path(":memory:"), "arm1", THREE, ROOMY)) as journal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS", data.draw(st.integers(1, 5)))
        for partitions in rows:
            batch = numbering.batch(partitions)
            journal.commit(Changes(batch=batch))
            if batch.id in damaged:
                for partition, seq in zip(partitions, batch.records["seq"].tolist(), strict=True):
                    expected[partition].add(seq)
        for row in damaged:
            journal.db.execute("UPDATE telemetry SET crc = crc + 1 WHERE id = ?", (row,))
        scrubber = Scrubber(journal)
        found = scrubber.look(data.draw(st.permutations(sorted(damaged))))
        told = [(lost.partition, seq) for one in found for lost in one.lost for seq in range(lost[1], lost[2] + 1)]
        assert len(told) == len(set(told))
        assert {p: {seq for at, seq in told if at == p} for p in expected} == expected
        assert all(any(one.first <= row <= one.last for one in found) for row in damaged)
        assert scrubber.look(damaged) == []


def test_row_that_can_be_read_after_all_is_no_damage(path: Path) -> None:
    write(path, [[0], [0]])
    with closing(open_journal(path)) as journal:
        assert find_damage(journal, 1) is None
        assert find_damage(journal, 7) is None


def test_damage_at_the_beginning_of_a_trimmed_journal_costs_no_more_than_its_rows_may_hold(path: Path) -> None:
    rows = write(path, [[0, 1], [0, 0, 1], [0], [0, 1]])
    spoil(path, telemetry.messages(rows[1])[0])
    with closing(open_journal(path)) as journal:
        journal.db.execute("DELETE FROM telemetry WHERE id = 1")
        assert find_damage(journal, 2) == Damage(2, 2, [Lost(0, 1, 3), Lost(1, 1, 2)])


# --- events and outcomes ----------------------------------------------------------------------------------------------


def write_entries(path: Path) -> list[StoredEntry]:
    """Three events and an outcome."""
    numbering = Numbering()
    entries = [numbering.entry(value=f"value {n}".encode(), key=f"motor{n}") for n in range(1, 4)]
    entries = [entry._replace(at_ns=10**18 + entry.id) for entry in [*entries, numbering.entry("outcomes")]]
    with closing(open_journal(path)) as journal:
        journal.commit(Changes(entries=entries))
    return entries


SPOILT = {
    "value": (b"value 2", 1),
    "key": (b"motor2", 1),
    "no UTF-8": (b"motor2", 128),
    "time": ((10**18 + 2).to_bytes(8, "big"), 1),
}


def removed(path: Path) -> list[dict[str, object]]:
    with reading(path) as reader:
        told = [json.loads(entry.value) for entry in reader.entries(4, 1000) if b"removed" in entry.value]
    return [lost for event in told for lost in event["removed"]]


@pytest.mark.parametrize(("found", "bit"), SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("met", [True, False], ids=["a reader met it", "the scrubber finds it"])
async def test_flipped_bit_in_an_entry_costs_that_entry_and_is_told_once(
    path: Path, found: bytes, bit: int, *, met: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, third, outcome = write_entries(path)
    spoil(path, found, 0, bit)
    if met:
        monkeypatch.setattr(module, "SCRUB_ENTRIES", 0)
    suspects: list[tuple[Table, int]] = []
    for _ in range(3):
        with closing(JournalReader(path, damaged=lambda *row: suspects.append(row))) as reader:
            assert reader.entries(0, 3) == [first, third, outcome]
            assert reader.partition_entries("events", 0, 0, 2) == [first, third]
        await run_writer(path, suspects if met else (), told=lambda: len(removed(path)) >= 1)
        assert removed(path) == [{"topic": "events", "partition": 0, "from_seq": 2, "to_seq": 2, "count": 1}]


async def test_numbers_go_on_behind_a_damaged_newest_entry(path: Path) -> None:
    *_, third, _ = write_entries(path)
    spoil(path, third.value, 0)
    await run_writer(path, told=lambda: len(removed(path)) >= 1)
    with reading(path) as reader:
        assert [entry.seq for entry in reader.partition_entries("events", 0, 0, 10)] == [1, 2, 4]


def test_scrubber_reads_entries_to_the_end_and_then_rests(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entries(path)
    now = [SECOND]
    monkeypatch.setattr(module, "monotonic_ns", lambda: now[0])
    monkeypatch.setattr(module, "SCRUB_ENTRIES", 1)
    with closing(open_journal(path)) as journal:
        journal.db.execute("UPDATE entries SET value = x'00' WHERE id IN (1, 4)")
        scrubber = Scrubber(journal)
        steps = [scrubber.look_at_entries(()) for _ in range(6)]
        assert [[entry.id for entry in step] for step in steps] == [[1], [], [], [4], [], []]
        now[0] += module.PASS_NS + SECOND
        assert scrubber.look_at_entries(()) == [DamagedEntry(1, Lost(0, 1, 1, "events"))]


def test_many_damaged_entries_in_a_row_are_no_end_of_the_log(path: Path) -> None:
    *_, outcome = write_entries(path)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE entries SET at_ns = 0 WHERE id < 4")
    with reading(path) as reader:
        assert reader.entries(0, 1) == [outcome]


# --- an unreadable page -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoiled", [1, 101])
def test_unreadable_page_costs_the_rows_on_it_only(path: Path, spoiled: int) -> None:
    rows = write(path, [[0, 0, 1]] * 300)
    spoil_page(path, telemetry.messages(rows[spoiled - 1])[0])
    met: list[int] = []
    with closing(JournalReader(path, damaged=lambda _, row: met.append(row))) as reader:
        read = {batch.id for batch in reader.batches(0, 1000)}
        after, paged = 0, set()
        while batches := reader.batches(after, 7):
            paged |= {batch.id for batch in batches}
            after = batches[-1].id
    gone = set(range(1, 301)) - read
    assert paged == read
    assert spoiled in gone
    assert 5 < len(gone) < 20
    assert set(met) == gone
    with closing(open_journal(path)) as journal:
        damage = find_damage(journal, spoiled)
        assert damage == Damage(
            min(gone), max(gone), [Lost(0, 2 * min(gone) - 1, 2 * max(gone)), Lost(1, min(gone), max(gone))]
        )


def test_many_damaged_rows_in_a_row_are_no_end_of_the_log(path: Path) -> None:
    write(path, [[0]] * 20)
    with closing(open_journal(path)) as journal:
        journal.db.execute("UPDATE telemetry SET crc = 0 WHERE id BETWEEN 3 AND 17")
    with closing(JournalReader(path)) as reader:
        assert [batch.id for batch in reader.batches(2, 4)] == [18]


# --- a damaged end ----------------------------------------------------------------------------------------------------


def test_numbers_that_a_damaged_newest_row_may_hold_are_never_given_again(path: Path) -> None:
    numbering = Numbering()
    with closing(open_journal(path)) as journal:
        journal.commit(Changes(batch=numbering.batch([0, 1]), save_heads=True))
        last = numbering.batch([0, 0, 1])
        journal.commit(Changes(batch=last))
        journal.db.execute("UPDATE telemetry SET crc = 0 WHERE id = 2")
        with closing(open_journal(path)) as found:
            assert found.damaged_at_start == [2]
            assert found.heads == {0: Head(4, 1), 1: Head(4, 1)}
            assert find_damage(found, 2) == Damage(2, 2, [Lost(0, 2, 4), Lost(1, 2, 4)])


# --- told by the writer -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def tidy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "HOUSEKEEPING_NS", 0)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[JournalReader]:
    with closing(JournalReader(path)) as reader:
        yield reader


def gaps(path: Path) -> list[tuple[str, int, int]]:
    with reading(path) as reader:
        events = [json.loads(entry.value) for entry in reader.entries(0, 1000, "events")]
    return [(event["motor"], event["from_seq"], event["to_seq"]) for event in events]


async def run_writer(
    path: Path, suspects: Sequence[tuple[Table, int]] = (), told: Callable[[], bool] = lambda: True
) -> None:
    """One run of the gateway's writer over the journal, until ``told``."""
    journal = open_journal(path)
    writer = LogWriter(journal, EventTime(), 0.1, path.with_suffix(".whole"), published=False)
    writer.start(Heard(), asyncio.get_running_loop())
    for table, row in suspects:
        writer.check(table, row)
    for _ in range(5):
        writer.samples(make_samples([0, 1]))
        await writer.durable()
    await until(told)
    assert await asyncio.to_thread(writer.stop, 60)


@pytest.mark.parametrize("suspects", [(), (3,)], ids=["the scrubber finds it", "a reader met it"])
async def test_loss_is_told_once_over_restarts(
    path: Path, suspects: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write(path, [[0, 0, 1]] * 5)
    spoil(path, telemetry.messages(rows[2])[1])
    if suspects:
        monkeypatch.setattr(module, "SCRUB_BYTES", 0)
    expected = [("joint1", 5, 6), ("joint2", 3, 3)]
    for _ in range(3):
        await run_writer(path, [("telemetry", row) for row in suspects], told=lambda: len(gaps(path)) >= 2)
        assert gaps(path) == expected
    with reading(path) as reader:
        assert [batch.id for batch in reader.batches(0, 6)] == [1, 2, 4, 5, 6]
    with closing(sqlite3.connect(path)) as db:  # what is left of the row is still there
        assert db.execute("SELECT count(*) FROM telemetry WHERE id = 3").fetchone() == (1,)


async def test_damaged_newest_row_is_told_at_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCRUB_BYTES", 0)
    rows = write(path, [[0, 1]] * 2)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE telemetry SET crc = 0 WHERE id = 2")
        db.execute("UPDATE heads SET seq = 1, telemetry_id = 1")
    assert len(rows) == 2
    await run_writer(path, told=lambda: len(gaps(path)) >= 2)
    assert gaps(path) == [("joint1", 2, 3), ("joint2", 2, 3)]  # three: two records may both have been one motor's
    with reading(path) as reader:
        assert [batch.records["seq"].tolist() for batch in reader.batches(2, 1)] == [[4, 4]]


def test_scrubber_reads_slowly_to_the_end_and_then_rests(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, [[0]] * 10)
    now = [SECOND]
    monkeypatch.setattr(module, "monotonic_ns", lambda: now[0])
    monkeypatch.setattr(module, "_ROWS", 2)
    monkeypatch.setattr(module, "SCRUB_BYTES", 300)  # a little more than two rows
    with closing(open_journal(path)) as journal:
        journal.db.execute("UPDATE telemetry SET crc = 0 WHERE id IN (2, 10)")
        scrubber = Scrubber(journal)
        steps = [[damage.first for damage in scrubber.look(())] for _ in range(6)]
        assert [row for step in steps for row in step] == [2, 10]
        assert len([step for step in steps if step]) == 2
        journal.db.execute("UPDATE telemetry SET crc = 0 WHERE id = 5")
        assert all(not scrubber.look(()) for _ in range(6))
        now[0] += module.PASS_NS + SECOND
        assert [damage.first for _ in range(6) for damage in scrubber.look(())] == [5]


def test_row_behind_a_damaged_one_says_how_far_the_numbers_went(path: Path) -> None:
    numbering = Numbering()
    with closing(open_journal(path)) as journal:
        journal.commit(Changes(batch=numbering.batch([0, 1]), save_heads=True))
        for _ in range(2):
            journal.commit(Changes(batch=numbering.batch([0])))
        journal.db.execute("UPDATE telemetry SET crc = 0 WHERE id = 2")
        with closing(open_journal(path)) as found:
            assert found.heads == {0: Head(3, 3), 1: Head(2, 1)}
            assert find_damage(found, 2) == Damage(2, 2, [Lost(0, 2, 2), Lost(1, 2, 2)])
