"""The log writer: durable when it says so, nothing lost or repeated by a sick disk, and every drop counted."""

import asyncio
import contextlib
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from drivers.clock import SECOND
from gateway import writer as module
from gateway.event_time import EventTime
from gateway.journal import Changes, CommandState, Entry, Journal, JournalReader, Lost
from gateway.writer import Committed, LogWriter
from tests.gateway_parts import DEADLINE_S, MOTORS, make_samples, until


class Disk(Journal):
    """A journal on a disk that can be full for some commits, or take its time."""

    full_for = 0
    tries = 0

    def __init__(self, path: Path, max_bytes: int = 1 << 30) -> None:
        super().__init__(path, "arm1", MOTORS, max_bytes)
        self.free = threading.Event()
        self.free.set()

    def commit(self, changes: Changes) -> int | None:
        self.tries += 1
        self.free.wait(DEADLINE_S)
        if self.full_for:
            self.full_for -= 1
            raise sqlite3.OperationalError("database or disk is full")
        return super().commit(changes)


class Heard:
    """What the writer told."""

    def __init__(self) -> None:
        self.commits: list[Committed] = []
        self.steps: list[int] = []
        self.dropped: Counter[int] = Counter()
        self.lost: list[Lost] = []
        self.disk: list[str] = []
        self.died: list[Exception] = []

    def committed(self, committed: Committed) -> None:
        self.commits.append(committed)

    def clock_stepped(self, step_ns: int) -> None:
        self.steps.append(step_ns)

    def samples_dropped(self, counts: dict[int, int]) -> None:
        self.dropped.update(counts)

    def records_lost(self, lost: list[Lost]) -> None:
        self.lost += lost

    def disk_failed(self, error: str) -> None:
        self.disk.append(error)

    def disk_recovered(self) -> None:
        self.disk.append("recovered")

    def writer_died(self, error: Exception) -> None:
        self.died.append(error)

    def seqs(self, partition: int) -> list[int]:
        batches = [committed.batch.records for committed in self.commits if committed.batch]
        return [seq for records in batches for seq in records["seq"][records["partition"] == partition].tolist()]


class Rig:
    def __init__(self, path: Path, flush_ms: float = 1.0, max_bytes: int = 1 << 30, *, published: bool = False) -> None:
        self.path = path / "journal.db"
        self.disk = Disk(self.path, max_bytes)
        self.wall_step_ns = 0
        time = EventTime(wall=lambda: 10**18 + self.wall_step_ns, monotonic=lambda: 10**9)
        self.writer = LogWriter(self.disk, time, flush_ms, published=published)
        self.heard = Heard()

    def stored(self, partition: int = 0) -> list[int]:
        with closing(JournalReader(self.path)) as reader:
            batches = reader.batches(0, 1_000_000)
            return [s for _, records in batches for s in records["seq"][records["partition"] == partition].tolist()]


@contextlib.asynccontextmanager
async def writing(rig: Rig) -> AsyncIterator[Rig]:
    rig.writer.start(rig.heard, asyncio.get_running_loop())
    try:
        yield rig
    finally:
        rig.disk.free.set()
        assert await asyncio.to_thread(rig.writer.stop, DEADLINE_S)


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.001)


async def test_what_is_durable_is_in_the_file(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path, flush_ms=1000)) as rig:
        rig.writer.samples(make_samples([0, 1, 0]))
        rig.writer.entry(Entry("events", 0, "*", b"{}", 1))
        outcome = Entry("outcomes", 1, "joint2", b"{}", 1)
        rig.writer.command(CommandState("c", False, 1, "joint2"), outcome, ("local", 0, 9))
        rig.writer.published("telemetry", 0, 1, 1)
        await rig.writer.durable()
        with closing(JournalReader(rig.path)) as reader:
            assert rig.stored(0) == [1, 2]
            assert rig.stored(1) == [1]
            assert [entry.topic for entry in reader.entries(0, 10)] == ["events", "outcomes"]
            assert reader.command("c") == CommandState("c", False, 1, "joint2")
            assert reader.inbox("local") == {0: 9}
    with closing(JournalReader(rig.path)) as reader:  # the bookmark is only a help: it may come later
        assert reader.published() == {("telemetry", 0): (1, 1)}


async def test_everything_is_committed_without_anybody_waiting(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.writer.samples(make_samples([0]))
        await until(lambda: rig.heard.seqs(0) == [1])
        rig.writer.read_upto(Entry("outcomes", 0, "*", b"{}", 1), None)
        await until(lambda: ("outcomes", 0) in [at for c in rig.heard.commits for at in c.entries])


async def test_listener_hears_every_commit_in_order(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path, flush_ms=0.1)) as rig:
        for number in range(200):
            rig.writer.samples(make_samples([0, 1], number))
            if number % 20 == 0:
                await rig.writer.durable()
        await rig.writer.durable()
        await until(lambda: len(rig.heard.seqs(1)) == 200)
    ids = [committed.batch.id for committed in rig.heard.commits if committed.batch]
    assert ids == list(range(1, len(ids) + 1))
    assert rig.heard.seqs(0) == list(range(1, 201))


async def test_full_disk_loses_and_repeats_nothing_and_is_told_once(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.writer.samples(make_samples([0, 1]))
        await rig.writer.durable()
        rig.disk.full_for = 5
        for number in range(20):
            rig.writer.samples(make_samples([0], number))
            rig.writer.entry(Entry("events", 0, "*", b"%d" % number, number))
            await asyncio.sleep(0.001)
        await rig.writer.durable()
        assert rig.disk.full_for == 0
        assert rig.stored() == list(range(1, 22))
        with closing(JournalReader(rig.path)) as reader:
            assert [entry.value for entry in reader.entries(0, 100)] == [b"%d" % number for number in range(20)]
        await until(lambda: len(rig.heard.seqs(0)) == 21)
    assert rig.heard.seqs(0) == list(range(1, 22))
    assert rig.heard.disk == ["database or disk is full", "recovered"]


async def test_nothing_is_durable_while_the_disk_is_full(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.disk.full_for = 10**9
        rig.writer.samples(make_samples([0]))
        waiting = asyncio.create_task(rig.writer.durable())
        await until(lambda: rig.disk.tries > 3)
        assert not waiting.done()
        rig.disk.full_for = 0
        await waiting
        assert rig.stored() == [1]


async def test_second_failure_is_told_again(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        for _ in range(2):
            rig.disk.full_for = 2
            rig.writer.samples(make_samples([0]))
            await rig.writer.durable()
        await until(lambda: len(rig.heard.disk) == 4)


async def test_beyond_the_bound_the_oldest_samples_go_before_they_are_numbered_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PENDING_MOST", 100)
    async with writing(Rig(tmp_path)) as rig:
        rig.disk.free.clear()
        rig.writer.samples(make_samples([0], 0))
        await until(lambda: rig.disk.tries == 1)  # this one is on its way to the disk
        for number in range(1, 301):
            rig.writer.samples(make_samples([0, 1, 1], number * 10, position_rad=number))
        rig.disk.free.set()
        await rig.writer.durable()
        await until(lambda: bool(rig.heard.dropped))
        kept = len(rig.stored(0)) - 1
        assert 0 < 3 * kept <= 100
        assert rig.heard.dropped == {0: 300 - kept, 1: 2 * (300 - kept)}
        assert rig.stored(0) == list(range(1, kept + 2))
        assert rig.stored(1) == list(range(1, 2 * kept + 1))
        with closing(JournalReader(rig.path)) as reader:
            positions = [p for _, records in reader.batches(1, 100) for p in records["position_rad"].tolist()]
        assert sorted(set(positions)) == list(range(301 - kept, 301))


async def test_stop_commits_what_is_pending(tmp_path: Path) -> None:
    rig = Rig(tmp_path, flush_ms=1000)
    async with writing(rig):
        await rig.writer.durable()
        for number in range(50):
            rig.writer.samples(make_samples([0, 1], number))
        rig.writer.entry(Entry("events", 0, "*", b"{}", 1))
    assert rig.stored() == list(range(1, 51))
    with closing(JournalReader(rig.path)) as reader:
        assert len(reader.entries(0, 10)) == 1


async def test_stop_says_if_the_disk_did_not_take_it(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.disk.full_for = 10**9
        rig.writer.samples(make_samples([0]))
        assert not await asyncio.to_thread(rig.writer.stop, 0.05)
        rig.disk.full_for = 0
    assert rig.stored() == [1]


async def test_who_gives_up_waiting_for_the_disk_stops_nobody_else(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.disk.free.clear()
        rig.writer.samples(make_samples([0]))
        waiting = asyncio.create_task(rig.writer.durable())
        await until(lambda: rig.disk.tries == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        rig.disk.free.set()
        rig.writer.samples(make_samples([0]))
        async with asyncio.timeout(DEADLINE_S):
            await rig.writer.durable()
        assert rig.stored() == [1, 2]


async def test_numbers_go_on_in_the_next_run(tmp_path: Path) -> None:
    for run in range(3):
        rig = Rig(tmp_path)
        async with writing(rig):
            rig.writer.samples(make_samples([0, 0]))
        assert rig.stored() == list(range(1, 2 * run + 3))


async def test_step_of_the_wall_clock_is_told(tmp_path: Path) -> None:
    async with writing(Rig(tmp_path)) as rig:
        rig.writer.samples(make_samples([0]))
        await rig.writer.durable()
        rig.wall_step_ns = -3600 * SECOND
        rig.writer.samples(make_samples([0]))
        await rig.writer.durable()
        await until(lambda: bool(rig.heard.steps))
    assert rig.heard.steps == [-3600 * SECOND]


async def test_full_journal_tells_what_the_broker_never_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOUSEKEEPING_NS", 0)
    async with writing(Rig(tmp_path, flush_ms=0.1, max_bytes=1, published=True)) as rig:
        for number in range(20):
            rig.writer.samples(make_samples([0, 1], number))
            await rig.writer.durable()
        await until(lambda: bool(rig.heard.lost))
    left = rig.stored()
    for partition in (0, 1):
        told = [lost for lost in rig.heard.lost if lost.partition == partition]
        gone = [seq for lost in told for seq in range(lost.from_seq, lost.to_seq + 1)]
        assert gone == list(range(1, left[0]))


async def test_writer_that_dies_of_a_fault_in_the_program_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    fault = RuntimeError("a fault in the program")

    def broken(changes: Changes) -> int | None:
        raise fault

    monkeypatch.setattr(rig.disk, "commit", broken)
    async with writing(rig):
        rig.writer.samples(make_samples([0]))
        await until(lambda: rig.heard.died == [fault])
