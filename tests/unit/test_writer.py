"""The log writer: durable when it says so, nothing lost or repeated by a sick disk, and every loss named exactly."""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from drivers.clock import SECOND
from gateway import folding
from gateway import journal as journal_module
from gateway import writer as module
from gateway.event_time import EventTime
from gateway.journal import Changes, CommandState, Entry, Journal, JournalReader, Lost, ProducerState, StoredEntry
from gateway.wal import holders, wal_path
from gateway.writer import Committed, LogWriter
from tests.gateway_parts import DEADLINE_S, MOTORS, Numbering, make_samples, until, wait_for

READER_INSIDE_A_TRANSACTION = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN")
print(db.execute("SELECT count(*) FROM telemetry").fetchone()[0], flush=True)
sys.stdin.read()
"""


class Heard:
    """What the writer told."""

    def __init__(self) -> None:
        self.told: list[Committed] = []
        self.saved_upto = (0, 0)
        self.forgotten_rows: list[int] = []
        self.forgotten_entries: list[int] = []
        self.steps: list[int] = []
        self.disk: list[str] = []
        self.broken: list[str] = []
        self.died: list[Exception] = []

    def committed(self, committed: Committed) -> None:
        self.told.append(committed)

    def saved(self, row: int, entry: int) -> None:
        self.saved_upto = (row, entry)

    def forgotten(self, rows: Collection[int], entries: Collection[int]) -> None:
        self.forgotten_rows += rows
        self.forgotten_entries += entries

    def clock_stepped(self, step_ns: int) -> None:
        self.steps.append(step_ns)

    def disk_failed(self, error: str) -> None:
        self.disk.append(error)

    def disk_recovered(self) -> None:
        self.disk.append("recovered")

    def journal_broken(self, error: str) -> None:
        self.broken.append(error)

    def writer_died(self, error: Exception) -> None:
        self.died.append(error)

    def seqs(self, partition: int, *, saved: tuple[bool, ...] = (True, False)) -> list[int]:
        batches = [told.batch.records for told in self.told if told.batch and told.saved in saved]
        return [seq for records in batches for seq in records["seq"][records["partition"] == partition].tolist()]

    def entries(self) -> list[StoredEntry]:
        return [entry for told in self.told for entry in told.entries]


class Rig:
    def __init__(self, path: Path, flush_ms: float = 1.0, max_bytes: int = 1 << 30, *, published: bool = False) -> None:
        self.path = path / "journal.db"
        self.whole = path / "journal.whole"
        self.journal = Journal(self.path, "arm1", MOTORS, max_bytes)
        self.wall_step_ns = 0
        time = EventTime(wall=lambda: 10**18 + self.wall_step_ns, monotonic=lambda: 10**9)
        self.writer = LogWriter(self.journal, time, flush_ms, self.whole, published=published)
        self.heard = Heard()

    def stored(self, partition: int = 0) -> list[int]:
        with closing(JournalReader(self.path)) as reader:
            batches = reader.batches(0, 1_000_000)
            return [
                seq for batch in batches if partition in batch.split for seq in batch.split[partition]["seq"].tolist()
            ]

    def gaps(self, partition: int = 0) -> list[tuple[int, int]]:
        """from..to of every gap of a motor that the events tell."""
        events = [(entry.partition, json.loads(entry.value)) for entry in self.events()]
        mine = [event for at, event in events if at == partition and event["type"] == "telemetry.gap"]
        assert all(event["count"] == event["to_seq"] - event["from_seq"] + 1 for event in mine)
        assert all(event["motor"] == MOTORS[partition] and event["stream"] == self.journal.stream for event in mine)
        return [(event["from_seq"], event["to_seq"]) for event in mine]

    def events(self) -> list[StoredEntry]:
        with closing(JournalReader(self.path)) as reader:
            return reader.entries(0, 100_000, "events")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Somebody else is in the middle of a write."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield

    @contextlib.contextmanager
    def removed(self) -> Iterator[None]:
        """The directory is not there: its disk was taken away."""
        away = self.path.parent.rename(self.path.parent.with_name("away"))
        yield
        away.rename(self.path.parent)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """SQLite may not make the file any larger: the same to it as a full disk."""
        pages = self.journal.db.execute("PRAGMA page_count").fetchone()[0]
        self.journal.db.execute(f"PRAGMA max_page_count = {pages}")
        self.writer.samples(make_samples([0] * 1000))
        yield
        self.journal.db.execute("PRAGMA max_page_count = 1000000")


@contextlib.asynccontextmanager
async def writing(rig: Rig) -> AsyncIterator[Rig]:
    rig.writer.start(rig.heard, asyncio.get_running_loop())
    try:
        yield rig
    finally:
        assert await asyncio.to_thread(rig.writer.stop, DEADLINE_S)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that gives up waiting for a lock at once, and tries again at once."""
    monkeypatch.setattr(module, "RETRY_NS", 10**6)
    monkeypatch.setattr(module, "SICK_FLUSH_S", 0.001)
    monkeypatch.setattr(journal_module, "BUSY_S", 0.01)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that waits for a lock hangs, and is found to."""
    monkeypatch.setattr(journal_module, "BUSY_S", DEADLINE_S)
    monkeypatch.setattr(module, "HANG_NS", 10**6)


# --- a healthy disk ---------------------------------------------------------------------------------------------------


async def test_what_is_durable_is_in_the_file(tmp_path: Path) -> None:
    identity = ProducerState("cluster", 1, 0, {("telemetry", 0): 1})
    async with writing(Rig(tmp_path, flush_ms=1000)) as rig:
        rig.writer.samples(make_samples([0, 1, 0]))
        rig.writer.entry(Entry("events", 0, "*", b"{}", 1))
        outcome = Entry("outcomes", 1, "joint2", b"{}", 1)
        rig.writer.command(CommandState("c", False, 1, "joint2"), outcome, ("local", 0, 9))
        rig.writer.published("telemetry", 0, 1, 1)
        rig.writer.producer(identity)
        await rig.writer.durable()
        with closing(JournalReader(rig.path)) as reader:
            assert rig.stored(0) == [1, 2]
            assert rig.stored(1) == [1]
            assert [entry.topic for entry in reader.entries(0, 10)] == ["events", "outcomes"]
            assert reader.command("c") == CommandState("c", False, 1, "joint2")
            assert reader.inbox("local") == {0: 9}
            assert reader.producer() == identity
    with closing(JournalReader(rig.path)) as reader:  # the bookmark is only a help: it may come later
        assert reader.published() == {("telemetry", 0): (1, 1)}


async def test_everything_is_committed_without_anybody_waiting(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.writer.samples(make_samples([0]))
        await until(lambda: rig.heard.seqs(0) == [1])
        rig.writer.read_upto(Entry("outcomes", 0, "*", b"{}", 1), None)
        await until(lambda: [entry.topic for entry in rig.heard.entries()] == ["outcomes"])
        assert all(told.saved for told in rig.heard.told)


async def test_listener_hears_every_commit_in_order_as_the_journal_has_it(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path, flush_ms=0.1)) as rig:
        for number in range(200):
            rig.writer.samples(make_samples([0, 1], number))
            rig.writer.entry(Entry("events", number % 3, "*", b"%d" % number, number))
            if number % 20 == 0:
                await rig.writer.durable()
        await rig.writer.durable()
        await until(lambda: len(rig.heard.seqs(1)) == 200)
    ids = [told.batch.id for told in rig.heard.told if told.batch]
    assert ids == list(range(1, len(ids) + 1))
    assert rig.heard.seqs(0) == list(range(1, 201))
    assert rig.heard.entries() == rig.events()


async def test_numbers_go_on_in_the_next_run(tmp_path: Path) -> None:
    for run in range(3):
        rig = Rig(tmp_path)
        async with writing(rig):
            rig.writer.samples(make_samples([0, 0]))
            rig.writer.entry(Entry("events", 1, "*", b"{}", 1))
        assert rig.stored() == list(range(1, 2 * run + 3))
        assert [entry.seq for entry in rig.events()] == list(range(1, run + 2))


async def test_samples_that_never_came_get_numbers_which_a_gap_names(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.writer.samples(make_samples([0, 0, 1]))
        rig.writer.lost_samples(0, 5, "the gateway took no samples")
        rig.writer.samples(make_samples([0, 1]))
        await rig.writer.durable()
        assert rig.stored(0) == [1, 2, 8]
        assert rig.stored(1) == [1, 2]
        assert rig.gaps(0) == [(3, 7)]
        rig.writer.lost_samples(0, 2, "the gateway took no samples")
    rig = Rig(tmp_path)
    async with writing(rig):
        rig.writer.samples(make_samples([0]))
    assert rig.stored(0) == [1, 2, 8, 11]
    assert rig.gaps(0) == [(3, 7), (9, 10)]


async def test_step_of_the_wall_clock_is_told(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.writer.samples(make_samples([0]))
        await rig.writer.durable()
        rig.wall_step_ns = -3600 * SECOND
        rig.writer.samples(make_samples([0]))
        await rig.writer.durable()
        await until(lambda: bool(rig.heard.steps))
    assert rig.heard.steps == [-3600 * SECOND]
    (told,) = [json.loads(entry.value) for entry in rig.heard.entries()]
    assert (told["type"], told["step_ns"]) == ("clock.stepped", -3600 * SECOND)


async def test_stop_commits_what_is_pending(tmp_path: Path) -> None:
    rig = Rig(tmp_path, flush_ms=1000)
    async with writing(rig):
        await rig.writer.durable()
        for number in range(50):
            rig.writer.samples(make_samples([0, 1], number))
        rig.writer.entry(Entry("events", 0, "*", b"{}", 1))
    assert rig.stored() == list(range(1, 51))
    assert len(rig.events()) == 1


# --- a sick disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sick", ["locked", "full", "removed"])
async def test_sick_disk_delays_nobody_loses_and_repeats_nothing_and_is_told_once(tmp_path: Path, sick: str) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.writer.samples(make_samples([0, 1]))
        await rig.writer.durable()
        with getattr(rig, sick)():
            for number in range(20):
                rig.writer.samples(make_samples([1], number))
                rig.writer.entry(Entry("events", 0, "*", b"%d" % number, number))
                await asyncio.sleep(0.001)
            await until(lambda: rig.heard.seqs(1, saved=(False,)) == list(range(2, 22)))
            assert [entry.seq for entry in rig.heard.entries()] == list(range(1, 21))
            assert rig.journal.row == 1
        await rig.writer.durable()
        assert rig.stored(1) == list(range(1, 22))
        assert [entry.value for entry in rig.events()] == [b"%d" % number for number in range(20)]
        await until(lambda: rig.heard.saved_upto == (rig.journal.row, rig.journal.entry))
    assert rig.heard.seqs(1) == list(range(1, 22))  # each told once
    assert rig.heard.entries() == rig.events()
    message = {
        "locked": "database is locked",
        "full": "database or disk is full",
        "removed": "the journal was removed or replaced",
    }[sick]
    assert rig.heard.disk == [message, "recovered"]


@pytest.mark.usefixtures("patient")
async def test_write_that_hangs_is_relieved_from_the_loop_and_told_once(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path, published=True)) as rig:
        rig.whole.touch()
        with rig.locked():
            rig.writer.samples(make_samples([0]))
            await until(rig.writer._hangs)
            for number in range(10):
                rig.writer.samples(make_samples([0, 1], number))
                rig.writer.entry(Entry("events", 0, "*", b"{}", number))
                rig.writer.relieve()
            await until(lambda: rig.heard.seqs(0, saved=(False,)) == list(range(1, 12)))
            assert len(rig.heard.entries()) == 10
            assert rig.stored() == []
            assert not rig.whole.exists()
        await rig.writer.durable()
        await until(lambda: len(rig.heard.disk) == 2)
    assert rig.stored() == rig.heard.seqs(0) == list(range(1, 12))
    assert rig.heard.disk[0].startswith("a write has not come back for")
    assert rig.heard.disk[1] == "recovered"


async def test_marker_is_there_while_the_journal_holds_everything_that_was_told(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path, published=True)) as rig:
        rig.whole.touch()
        rig.writer.samples(make_samples([0]))
        await rig.writer.durable()
        assert rig.whole.exists()
        with rig.locked():
            rig.writer.samples(make_samples([0]))
            await until(lambda: rig.heard.seqs(0, saved=(False,)) == [2])
            assert not rig.whole.exists()
        await until(rig.whole.exists)
        assert rig.stored() == [1, 2]


async def test_without_a_broker_nothing_is_given_out_that_the_journal_lacks(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.whole.touch()
        with rig.locked():
            rig.writer.samples(make_samples([0]))
            await until(lambda: rig.heard.seqs(0, saved=(False,)) == [1])
            assert rig.whole.exists()


async def test_numbers_of_a_stream_that_nobody_knows_are_not_told(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path, published=True)) as rig:
        rig.writer.lost_before(None, [Lost(0, 1, 5)], "for a test")
        rig.writer.lost_before(7, [Lost(0, 6, 9)], "for a test")
        await rig.writer.durable()
        told = [json.loads(entry.value) for entry in rig.events()]
        assert [(event["stream"], event["from_seq"], event["to_seq"]) for event in told] == [(7, 6, 9)]


async def test_nothing_is_durable_while_the_disk_takes_nothing(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        with rig.locked():
            rig.writer.samples(make_samples([0]))
            waiting = asyncio.create_task(rig.writer.durable())
            await until(lambda: rig.heard.seqs(0) == [1])
            assert not waiting.done()
        await waiting
        assert rig.stored() == [1]


async def test_second_failure_is_told_again(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        for number in range(2):
            with rig.locked():
                rig.writer.samples(make_samples([0]))
                await until(lambda: len(rig.heard.disk) == 2 * number + 1)  # noqa: B023  awaited here
            await rig.writer.durable()
        await until(lambda: len(rig.heard.disk) == 4)


async def test_who_gives_up_waiting_for_the_disk_stops_nobody_else(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        with rig.locked():
            rig.writer.samples(make_samples([0]))
            waiting = asyncio.create_task(rig.writer.durable())
            await until(lambda: bool(rig.heard.disk))
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        rig.writer.samples(make_samples([0]))
        async with asyncio.timeout(DEADLINE_S):
            await rig.writer.durable()
        assert rig.stored() == [1, 2]


async def test_stop_says_if_the_disk_did_not_take_it(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        with rig.locked():
            rig.writer.samples(make_samples([0]))
            assert not await asyncio.to_thread(rig.writer.stop, 0.05)
    assert rig.stored() == [1]


async def test_beyond_the_bound_the_oldest_is_given_up_and_named_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNSAVED_MOST", 40 * module.ROW_BYTES)
    async with writing(Rig(tmp_path)) as rig:
        rig.writer.samples(make_samples([0, 1, 1]))
        await rig.writer.durable()
        with rig.locked():
            for number in range(200):
                rig.writer.samples(make_samples([0, 1, 1], number))
                await asyncio.sleep(0.001)
            await until(lambda: len(rig.heard.seqs(0)) == 201)
        await rig.writer.durable()
        await until(lambda: len(rig.heard.disk) == 2)
        await rig.writer.durable()
        for partition, most in ((0, 201), (1, 402)):
            told = [seq for first, last in rig.gaps(partition) for seq in range(first, last + 1)]
            assert told
            assert sorted(told + rig.stored(partition)) == list(range(1, most + 1))
        with closing(JournalReader(rig.path)) as reader:
            rows = {batch.id for batch in reader.batches(0, 1000)}
        assert sorted(rows | set(rig.heard.forgotten_rows)) == list(range(1, rig.journal.row + 1))
        assert rows.isdisjoint(rig.heard.forgotten_rows)


async def test_events_beyond_the_bound_are_given_up_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNSAVED_ENTRIES_MOST", 20_000)
    async with writing(Rig(tmp_path)) as rig:
        with rig.locked():
            for number in range(100):
                rig.writer.entry(Entry("outcomes", 1, "joint2", b"x" * 1000, number))
                await asyncio.sleep(0.001)
            await until(lambda: bool(rig.heard.forgotten_entries))
        await rig.writer.durable()
        await rig.writer.durable()
        with closing(JournalReader(rig.path)) as reader:
            kept = [entry.seq for entry in reader.entries(0, 1000, "outcomes")]
    removed = [gone for event in rig.events() for gone in json.loads(event.value)["removed"]]
    told = [seq for gone in removed for seq in range(gone["from_seq"], gone["to_seq"] + 1)]
    assert {(gone["topic"], gone["partition"]) for gone in removed} == {("outcomes", 1)}
    assert sorted(told + kept) == list(range(1, 101))


async def test_numbers_that_were_given_up_are_not_given_again_in_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNSAVED_MOST", 0)
    rig = Rig(tmp_path)
    async with writing(rig):
        with rig.locked():
            rig.writer.samples(make_samples([0] * 10))
            await until(lambda: rig.heard.forgotten_rows == [1])
    assert rig.stored() == []
    rig = Rig(tmp_path)
    async with writing(rig):
        rig.writer.samples(make_samples([0]))
    assert rig.stored() == [11]
    assert rig.gaps() == [(1, 10)]


async def test_writer_that_dies_of_a_fault_in_the_program_is_told(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.writer.entry(Entry("events", 0, "*", b"{}", 2**70))  # more than a column holds
        await until(lambda: [type(error) for error in rig.heard.died] == [OverflowError])


# --- the bound of the journal -----------------------------------------------------------------------------------------


async def test_full_journal_tells_what_the_broker_never_had_in_the_commit_that_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HOUSEKEEPING_NS", 0)
    async with writing(Rig(tmp_path, flush_ms=0.1, max_bytes=400_000, published=True)) as rig:
        for number in range(100):
            rig.writer.samples(make_samples([0, 1] * 100, number))
            await rig.writer.durable()
            with closing(sqlite3.connect(rig.path, isolation_level=None)) as db:  # one state of the file
                db.execute("BEGIN")
                kept = db.execute("SELECT min(id) FROM telemetry").fetchone()[0]
                events = [json.loads(value) for (value,) in db.execute("SELECT value FROM entries WHERE partition = 0")]
                gone = [e["count"] for e in events if e["type"] == "telemetry.gap"]
                assert sum(gone) == 100 * (kept - 1)
    assert kept > 50
    left = rig.stored()
    for partition in (0, 1):
        gone = [seq for first, last in rig.gaps(partition) for seq in range(first, last + 1)]
        assert gone == list(range(1, left[0]))
    assert "journal.full" in [json.loads(event.value)["type"] for event in rig.events()]


# --- a WAL that is held -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped_reader(path: Path) -> Iterator[int]:
    """A process that is stopped in the middle of a read transaction; its number."""
    command = [sys.executable, "-c", READER_INSIDE_A_TRANSACTION, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        reader.send_signal(signal.SIGSTOP)
        try:
            yield reader.pid
        finally:
            reader.send_signal(signal.SIGCONT)
            reader.kill()


async def test_reader_that_holds_the_wal_is_named_and_everything_goes_on_and_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HOUSEKEEPING_NS", 0)
    monkeypatch.setattr(Journal, "wal_bound", 500_000)
    async with writing(Rig(tmp_path)) as rig:
        rig.writer.samples(make_samples([0]))
        await rig.writer.durable()
        with stopped_reader(rig.path) as pid:
            count = 1
            while not rig.heard.disk:
                count += 1000
                rig.writer.samples(make_samples([0] * 1000))
                await asyncio.sleep(0.005)
            size = rig.journal.wal_bytes()
            for number in range(20):
                count += 1000
                rig.writer.samples(make_samples([0] * 1000, number))
                await asyncio.sleep(0.002)
            await until(lambda: len(rig.heard.seqs(0)) == count)
            assert rig.journal.wal_bytes() == size
            assert f"a reader holds the WAL (0 MB): process {pid} (python" in rig.heard.disk[0]
        await rig.writer.durable()
        assert rig.heard.disk[-1] == "recovered"  # perhaps not at the first try: the reader is only just gone
        assert rig.stored() == list(range(1, count + 1))


async def test_wal_is_folded_beside_the_commits_and_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "EVERY_S", 0.01)
    monkeypatch.setattr(folding, "LONG", 64)
    monkeypatch.setattr(folding, "BACKSTOP", 1 << 30)
    rig = Rig(tmp_path)
    async with writing(rig):
        count = 0
        salts: set[bytes] = set()
        while len(salts) < 3:
            assert wal_path(rig.path).stat().st_size < 50_000_000
            for _ in range(20):  # one commit after the other: nobody waits for them
                count += 100
                rig.writer.samples(make_samples([0] * 100))
                rig.writer.when_durable(lambda: None)
                await asyncio.sleep(0.001)
            salts.add(wal_path(rig.path).read_bytes()[16:24])  # others each time it begins anew
        await rig.writer.durable()
        assert rig.stored() == list(range(1, count + 1))
    assert not wal_path(rig.path).exists()


def test_nobody_who_reads_no_longer_is_named(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / "journal.db", "arm1", MOTORS, 1 << 30)) as journal:
        journal.commit(Changes(batch=Numbering().batch([0])))
        assert holders(journal.path) == ""
        with stopped_reader(journal.path) as pid:
            wait_for(lambda: str(pid) in holders(journal.path))
        assert holders(journal.path) == ""


# --- a journal that breaks --------------------------------------------------------------------------------------------


async def test_who_waits_for_damage_to_be_told_finds_it_on_the_disk(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        for number in range(3):
            rig.writer.samples(make_samples([0], number))
            await rig.writer.durable()
        with closing(sqlite3.connect(rig.path)) as db, db:
            db.execute("UPDATE telemetry SET crc = crc + 1 WHERE id = 2")
        rig.writer.check("telemetry", 2)
        await rig.writer.looked()
        (event,) = (json.loads(entry.value) for entry in rig.events())
        assert (event["type"], event["from_seq"], event["to_seq"]) == ("telemetry.gap", 2, 2)


async def test_journal_that_breaks_is_told_and_what_it_did_not_take_goes_on_from_memory(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.writer.samples(make_samples([0]))
        await rig.writer.durable()
        rig.journal.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with rig.path.open("r+b") as file:
            file.write(b"\xa5" * rig.path.stat().st_size)
        rig.journal.db.execute("PRAGMA shrink_memory")
        rig.writer.samples(make_samples([0]))
        await until(lambda: bool(rig.heard.broken))
        assert rig.heard.seqs(0, saved=(False,)) == [2]
        rig.writer.samples(make_samples([0]))
        rig.writer.relieve()
        await until(lambda: rig.heard.seqs(0) == [1, 2, 3])
        assert rig.writer.seqs()[0] == 3


# --- a real full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root's rights")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


async def test_full_disk_heals_when_somebody_makes_room(small_disk: Path) -> None:
    async with writing(Rig(small_disk)) as rig:
        rig.writer.samples(make_samples([0]))
        await rig.writer.durable()
        with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        count = 1
        while not rig.heard.disk:
            count += 500
            rig.writer.samples(make_samples([0] * 500))
            await asyncio.sleep(0.001)
        rig.writer.samples(make_samples([1]))
        await until(lambda: rig.heard.seqs(1) == [1])
        os.truncate(small_disk / "ballast", 0)
        await rig.writer.durable()
        assert rig.stored() == list(range(1, count + 1))
        assert rig.stored(1) == [1]
