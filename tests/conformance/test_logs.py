"""The log's places, the journal and Kafka, give a reader the same, and so does a recording as far as it can.

One suite over all, the broker being real.
"""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, closing, contextmanager
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.records_to_delete import RecordsToDelete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway import telemetry
from gateway.aside import set_aside
from gateway.config import Config
from gateway.journal import Batch, Changes, Journal, StoredEntry
from gateway.journal_reader import JournalFile, JournalLog
from gateway.kafka_reader import KafkaLog
from gateway.log_reader import (
    Entries,
    Key,
    LogError,
    LogReader,
    Missed,
    Part,
    Position,
    Samples,
    Seq,
    Start,
    Time,
    Topic,
    records,
)
from gateway.recordings.reader import RecordingLog
from gateway.recordings.recorder import Recorder
from gateway.state_dir import StateDir
from tests.conftest import Kafka
from tests.gateway_parts import DEADLINE_S, KAFKA, MOTORS, Numbering, make_config

BOTH: tuple[Topic, ...] = ("telemetry", "events")


class Place(ABC):
    """Where the log is kept, from the writer's side."""

    stream: int

    @abstractmethod
    async def samples(self, *partitions: int) -> None:
        """Append a sample of each; the time of each is its number."""

    @abstractmethod
    async def event(self, partition: int, at_ns: int) -> None:
        """Append an event."""

    @abstractmethod
    async def drop(self, topic: Topic, partition: int, offset: int) -> None:
        """Forget a partition's records before ``offset``."""

    @abstractmethod
    def reader(
        self, topics: Sequence[Topic] = ("telemetry",), start: Start = "end", *, follow: bool, name: str | None = None
    ) -> LogReader:
        """A reader of this place."""

    def position(self, offset: int) -> Position:
        """As this place writes it."""
        return Position(0 if isinstance(self, InKafka) else self.stream, offset)


class InJournal(Place):
    def __init__(self, directory: Path) -> None:
        self.state = StateDir(directory)
        self.state.make()
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.state.journal, "arm1", MOTORS, 1 << 30)
        self.stream = self.journal.stream
        self._numbering = Numbering(self.stream)
        self.row = self._entry = 0
        self._seqs: dict[int, int] = defaultdict(int)

    async def samples(self, *partitions: int) -> None:
        self.row += 1
        self.journal.commit(Changes(batch=Batch(self.row, self._numbering.records(sorted(partitions)))))

    async def event(self, partition: int, at_ns: int) -> None:
        self._entry += 1
        self._seqs[partition] += 1
        value = msgspec.json.encode({"type": "test", "at_ns": at_ns})
        entry = StoredEntry(self._entry, "events", partition, self._seqs[partition], at_ns, MOTORS[partition], value)
        self.journal.commit(Changes(entries=[entry]))

    async def drop(self, topic: Topic, partition: int, offset: int) -> None:
        if topic == "events":
            self.journal.db.execute("DELETE FROM entries WHERE partition = ? AND seq <= ?", (partition, offset))
            return
        for row, blob in self.journal.db.execute("SELECT id, records FROM telemetry").fetchall():
            of = np.frombuffer(blob, telemetry.RECORD)
            if (of[of["partition"] == partition]["seq"] <= offset).any():
                self.journal.db.execute("DELETE FROM telemetry WHERE id = ?", (row,))

    def aside(self, number: int) -> Path:
        return self.state.journal.with_suffix(f".aside-{number}")

    def set_aside(self) -> None:
        """Begin a new journal, as the gateway does with one that it cannot go on with."""
        self.journal.db.close()
        set_aside(self.state.journal, "test")
        self.open()

    def damage(self, row: int) -> None:
        self.journal.db.execute("UPDATE telemetry SET crc = crc + 1 WHERE id = ?", (row,))

    def reader(
        self, topics: Sequence[Topic] = ("telemetry",), start: Start = "end", *, follow: bool, name: str | None = None
    ) -> LogReader:
        return JournalLog(self.state, topics, start, follow=follow, name=name)


class InKafka(Place):
    """Writes as the publisher does."""

    def __init__(self, config: Config, producer: AIOKafkaProducer, admin: AIOKafkaAdminClient) -> None:
        self.config = config
        self.producer = producer
        self.admin = admin
        self.encoding = telemetry.messages
        self.new_stream(7)

    def new_stream(self, stream: int) -> None:
        self.stream = stream
        self._numbering = Numbering(stream)
        self._seqs: dict[int, int] = defaultdict(int)

    async def samples(self, *partitions: int) -> None:
        for partition, mine in telemetry.by_partition(self._numbering.records(sorted(partitions))):
            for value in self.encoding(mine):
                await self._send("telemetry", partition, value, 1)

    async def event(self, partition: int, at_ns: int) -> None:
        self._seqs[partition] += 1
        value = msgspec.json.encode({"type": "test", "at_ns": at_ns})
        header = ("servo-seq", f"{self.stream}/{self._seqs[partition]}".encode())
        await self._send("events", partition, value, at_ns // 1_000_000, header)

    async def _send(self, topic: Topic, partition: int, value: bytes, at_ms: int, *headers: tuple[str, bytes]) -> None:
        name, key = self.config.topic(topic), MOTORS[partition].encode()
        await self.producer.send_and_wait(name, value, key, partition, at_ms, list(headers))

    async def drop(self, topic: Topic, partition: int, offset: int) -> None:
        tp = TopicPartition(self.config.topic(topic), partition)
        await self.admin.delete_records({tp: RecordsToDelete(before_offset=offset)})

    def reader(
        self, topics: Sequence[Topic] = ("telemetry",), start: Start = "end", *, follow: bool, name: str | None = None
    ) -> LogReader:
        return KafkaLog(self.config, topics, start, follow=follow, name=name)


class InRecording(InJournal):
    """Records the journal before each reading, from where it was."""

    def reader(
        self, topics: Sequence[Topic] = ("telemetry",), start: Start = "end", *, follow: bool, name: str | None = None
    ) -> LogReader:
        return RecordedLog(self.state, topics, start, follow=follow, name=name)


class RecordedLog(RecordingLog):
    def __init__(
        self, state: StateDir, topics: Sequence[Topic], start: Start, *, follow: bool, name: str | None
    ) -> None:
        super().__init__(state.path / "recording", topics, start, follow=follow, name=name)
        self._state = state

    async def __aenter__(self) -> Self:
        with Recorder(self._path, rotate_bytes=4000) as recorder:
            await recorder.record(lambda start: JournalLog(self._state, BOTH, start, follow=False), "beginning")
        return await super().__aenter__()


@pytest.fixture
def in_journal(tmp_path: Path) -> Iterator[InJournal]:
    place = InJournal(tmp_path / "state")
    yield place
    place.journal.db.close()


@pytest.fixture
async def in_kafka(tmp_path: Path, kafka: Kafka, arm_name: str) -> AsyncIterator[InKafka]:
    config = make_config(tmp_path, KAFKA.replace("broker:9092", kafka.bootstrap))
    config = config.model_copy(update={"arm": config.arm.model_copy(update={"name": arm_name})})
    async with AsyncExitStack() as undo:
        producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, acks="all")
        await producer.start()
        undo.push_async_callback(producer.stop)
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
        await admin.start()
        undo.push_async_callback(admin.close)
        names = [config.topic(topic) for topic in ("telemetry", "events", "commands")]
        await admin.create_topics([NewTopic(name, len(MOTORS), 1) for name in names])
        yield InKafka(config, producer, admin)


@pytest.fixture
def in_recording(tmp_path: Path) -> Iterator[InRecording]:
    place = InRecording(tmp_path / "state")
    yield place
    place.journal.db.close()


@pytest.fixture(params=["in_journal", "in_kafka", "in_recording"])
def any_place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["in_journal", "in_kafka"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


async def read(log: LogReader, count: int | None = None) -> list[Part]:
    """Parts until they hold ``count`` records, or to the end."""
    parts: list[Part] = []
    async with asyncio.timeout(DEADLINE_S):
        async for part in log:
            parts.append(part)
            if count is not None and len(offsets(parts)) >= count:
                break
    return parts


async def read_all(log: LogReader) -> list[Part]:
    async with log:
        return await read(log)


def offsets(parts: Sequence[Part]) -> list[tuple[str, int, int]]:
    """(topic, partition, offset) of every record, the partitions in order."""
    found = []
    for part in parts:
        if not isinstance(part, Missed):
            found += [(part.topic, part.partition, record.next.offset - 1) for record in records(part)]
    return sorted(found, key=lambda at: at[:2])


def telemetry_of(partition: int, first: int, end: int) -> list[tuple[str, int, int]]:
    return [("telemetry", partition, offset) for offset in range(first, end)]


def events_of(partition: int, first: int, end: int) -> list[tuple[str, int, int]]:
    return [("events", partition, offset) for offset in range(first, end)]


def holes(parts: Sequence[Part]) -> list[tuple[str, int, int, int | None]]:
    return [(p.topic, p.partition, p.from_offset, p.to_offset) for p in parts if isinstance(p, Missed)]


# --- all places ------------------------------------------------------------------------------------------------------


async def test_from_the_beginning_comes_every_record_once_with_its_offset_number_and_time(any_place: Place) -> None:
    for _ in range(5):
        await any_place.samples(0, 1, 0)
    await any_place.event(0, 100)
    await any_place.event(1, 200)
    await any_place.event(0, 300)
    parts = await read_all(any_place.reader(BOTH, "beginning", follow=False))
    assert offsets(parts) == [*events_of(0, 0, 2), *events_of(1, 0, 1), *telemetry_of(0, 0, 10), *telemetry_of(1, 0, 5)]
    samples = [part for part in parts if isinstance(part, Samples)]
    for part in samples:
        assert part.motor == MOTORS[part.partition]
        assert (part.records["seq"] == part.offsets + 1).all()
        assert (part.records["stream"] == any_place.stream).all()
        assert (part.records["partition"] == part.partition).all()
        assert (part.records["sampled_at_ns"] == part.records["seq"]).all()
    entries = [entry for part in parts if isinstance(part, Entries) for entry in part.entries if part.partition == 0]
    assert [(e.offset, e.stream, e.seq, e.at_ns, e.key) for e in entries] == [
        (0, any_place.stream, 1, 100, "joint1"),
        (1, any_place.stream, 2, 300, "joint1"),
    ]
    assert msgspec.json.decode(entries[1].value) == {"type": "test", "at_ns": 300}


async def test_without_follow_it_ends_at_what_was_there_when_it_began(any_place: Place) -> None:
    await any_place.samples(0, 1)
    async with any_place.reader(start="beginning", follow=False) as log:
        await any_place.samples(0, 1)
        assert offsets(await read(log)) == [*telemetry_of(0, 0, 1), *telemetry_of(1, 0, 1)]
        with pytest.raises(StopAsyncIteration):
            await anext(log)


async def test_empty_log_ends_at_once(any_place: Place) -> None:
    assert await read_all(any_place.reader(BOTH, "beginning", follow=False)) == []


async def test_from_the_end_nothing_old_comes_and_nothing_new_is_missed(place: Place) -> None:
    for _ in range(3):
        await place.samples(0, 1)
    await place.event(0, 100)
    async with place.reader(BOTH, "end", follow=True) as log:
        await place.samples(0)  # before the first read
        await place.event(0, 200)
        assert offsets(await read(log, 2)) == [*events_of(0, 1, 2), *telemetry_of(0, 3, 4)]
        await place.samples(1)
        assert offsets(await read(log, 1)) == telemetry_of(1, 3, 4)


@pytest.mark.parametrize("seq", [1, 2, 7, 12, 13])
async def test_from_a_number_each_partition_begins_there(any_place: Place, seq: int) -> None:
    for _ in range(6):
        await any_place.samples(0, 1, 0)
        await any_place.event(1, 50)
    parts = await read_all(any_place.reader(BOTH, Seq(seq), follow=False))
    first = seq - 1
    assert offsets(parts) == [*events_of(1, first, 6), *telemetry_of(0, first, 12), *telemetry_of(1, first, 6)]


async def test_number_that_is_still_to_come_is_waited_for(place: Place) -> None:
    await place.samples(0)
    async with place.reader(start=Seq(4), follow=True) as log:
        for _ in range(4):
            await place.samples(0)
        assert offsets(await read(log, 2)) == telemetry_of(0, 3, 5)


async def test_number_that_is_gone_stands_for_the_oldest(any_place: Place) -> None:
    for _ in range(9):
        await any_place.samples(0)
    await any_place.drop("telemetry", 0, 4)
    parts = await read_all(any_place.reader(start=Seq(2), follow=False))
    assert (offsets(parts), holes(parts)) == (telemetry_of(0, 4, 9), [])


@pytest.mark.parametrize("at_ns", [1, 4, 6, 7])
async def test_from_a_time_each_partition_begins_at_its_first_record_of_then_or_later(
    any_place: Place, at_ns: int
) -> None:
    for number in range(1, 7):
        await any_place.samples(0)
        await any_place.event(1, number * 10)
    assert offsets(await read_all(any_place.reader(start=Time(at_ns), follow=False))) == telemetry_of(0, at_ns - 1, 6)
    found = await read_all(any_place.reader(["events"], Time(at_ns * 10 - 5), follow=False))
    assert offsets(found) == events_of(1, at_ns - 1, 6)


async def test_reader_with_a_name_goes_on_where_it_said_it_was(place: Place) -> None:
    for _ in range(4):
        await place.samples(0, 1)
    await place.event(1, 10)
    first = place.reader(BOTH, "beginning", follow=True, name="recorder")
    async with first as log:
        assert len(offsets(await read(log, 9))) == 9
        await log.commit()
        await place.samples(0)
        assert offsets(await read(log, 1)) == telemetry_of(0, 4, 5)  # not committed: as if it had been killed
    await place.event(1, 20)
    assert offsets(await read_all(place.reader(BOTH, "end", follow=False, name="recorder"))) == [
        *events_of(1, 1, 2),
        *telemetry_of(0, 4, 5),
    ]
    other = await read_all(place.reader(BOTH, "beginning", follow=False, name="exporter"))
    assert len(offsets(other)) == 11


async def test_reader_that_begins_at_the_end_and_says_so_misses_nothing_while_it_is_away(place: Place) -> None:
    await place.samples(0, 1)
    async with place.reader(BOTH, "end", follow=True, name="late") as log:
        await log.commit()
    await place.samples(0, 1)
    await place.event(0, 10)
    found = await read_all(place.reader(BOTH, "end", follow=False, name="late"))
    assert offsets(found) == [*events_of(0, 0, 1), *telemetry_of(0, 1, 2), *telemetry_of(1, 1, 2)]


async def test_one_name_has_a_position_in_each_topic_that_it_ever_read(place: Place) -> None:
    for topic in BOTH:
        await place.samples(0)
        await place.event(0, 10)
        async with place.reader([topic], "beginning", follow=False, name="both") as log:
            await read(log)
            await log.commit()
    found = await read_all(place.reader(BOTH, "beginning", follow=False, name="both"))
    assert offsets(found) == telemetry_of(0, 1, 2)


async def test_commit_of_given_positions_leaves_the_rest_where_it_is(place: Place) -> None:
    for _ in range(4):
        await place.samples(0, 1)
    async with place.reader(start="beginning", follow=False, name="half") as log:
        await read(log)
        await log.commit({("telemetry", 0): place.position(1)})
    found = await read_all(place.reader(follow=False, name="half"))
    assert offsets(found) == telemetry_of(0, 1, 4)


async def test_reader_can_keep_its_positions_itself(place: Place) -> None:
    for _ in range(4):
        await place.samples(0, 1)
    async with place.reader(start="beginning", follow=True) as log:
        await read(log, 8)
        kept = log.positions()
    assert kept == {("telemetry", 0): place.position(4), ("telemetry", 1): place.position(4)}
    await place.samples(0, 1)
    kept["telemetry", 1] = place.position(2)
    found = await read_all(place.reader(start=kept, follow=False))
    assert offsets(found) == [*telemetry_of(0, 4, 5), *telemetry_of(1, 2, 5)]
    del kept["telemetry", 0]
    assert offsets(await read_all(place.reader(start=kept, follow=False)))[:5] == telemetry_of(0, 0, 5)


async def test_what_is_gone_when_a_reader_comes_back_is_told_exactly(any_place: Place) -> None:
    for number in range(8):
        await any_place.samples(0)
        await any_place.event(1, number)
    away: dict[Key, Position] = {("telemetry", 0): any_place.position(2), ("events", 1): any_place.position(1)}
    await any_place.drop("telemetry", 0, 5)
    await any_place.drop("events", 1, 3)
    parts = await read_all(any_place.reader(BOTH, away, follow=False))
    assert sorted(holes(parts)) == [("events", 1, 1, 2), ("telemetry", 0, 2, 4)]
    assert offsets(parts) == [*events_of(1, 3, 8), *telemetry_of(0, 5, 8)]
    from_beginning = await read_all(any_place.reader(BOTH, "beginning", follow=False))
    assert (holes(from_beginning), len(offsets(from_beginning))) == ([], 8)


async def test_reading_that_is_cancelled_loses_nothing(place: Place) -> None:
    async with place.reader(start="beginning", follow=True) as log:
        for _ in range(20):
            waiting = asyncio.ensure_future(anext(log))
            await place.samples(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            if not waiting.cancelled():
                waiting.result()
        had = log.positions()["telemetry", 0].offset
        if had < 20:
            assert offsets(await read(log, 20 - had)) == telemetry_of(0, had, 20)


def test_name_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    for name in ("", "../x", "gateway", "x" * 65):
        with pytest.raises(LogError, match="64 letters"):
            JournalLog(StateDir(tmp_path), ["events"], follow=False, name=name)


async def test_reader_without_a_name_has_nothing_to_commit(any_place: Place) -> None:
    async with any_place.reader(follow=False) as log:
        with pytest.raises(LogError, match="without a name"):
            await log.commit()


# --- the journal ------------------------------------------------------------------------------------------------------


async def test_damaged_row_is_told_as_the_offsets_that_it_held(in_journal: InJournal) -> None:
    for _ in range(4):
        await in_journal.samples(0, 0, 1)
    in_journal.journal.commit(Changes(save_heads=True))  # else nobody can know what the newest row held
    in_journal.damage(2)
    in_journal.damage(4)
    start: dict[Key, Position] = {("telemetry", partition): in_journal.position(0) for partition in (0, 1)}
    parts = await read_all(in_journal.reader(start=start, follow=False))
    assert sorted(holes(parts)) == [
        ("telemetry", 0, 2, 3),
        ("telemetry", 0, 6, 7),
        ("telemetry", 1, 1, 1),
        ("telemetry", 1, 3, 3),
    ]
    assert offsets(parts) == [
        *telemetry_of(0, 0, 2),
        *telemetry_of(0, 4, 6),
        *telemetry_of(1, 0, 1),
        *telemetry_of(1, 2, 3),
    ]


async def test_damaged_event_is_a_hole(in_journal: InJournal) -> None:
    for at_ns in range(4):
        await in_journal.event(0, at_ns)
    in_journal.journal.db.execute("UPDATE entries SET value = replace(value, 'test', 'best') WHERE seq = 3")
    parts = await read_all(in_journal.reader(["events"], "beginning", follow=False))
    assert (offsets(parts), holes(parts)) == ([*events_of(0, 0, 2), *events_of(0, 3, 4)], [("events", 0, 2, 2)])


# the directory that examples share is told apart by their number
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=3), max_size=30),
    damaged=st.sets(st.integers(1, 30), max_size=6),
    trimmed=st.integers(0, 5),
    least=st.integers(1, 40),
)
def test_any_number_or_time_is_found_among_damaged_and_missing_rows(
    tmp_path: Path, rows: list[list[int]], damaged: set[int], trimmed: int, least: int
) -> None:
    place = InJournal(tmp_path / f"{len(list(tmp_path.iterdir()))}")

    trimmed = min(trimmed, max(0, len(rows) - 1))  # the newest row stays

    async def look() -> None:
        there = []
        numbering = Numbering()
        for number, partitions in enumerate(rows, 1):
            await place.samples(*partitions)
            held = numbering.records(sorted(partitions))
            if number > trimmed and number not in damaged:
                there += [("telemetry", int(of["partition"]), int(of["seq"]) - 1) for of in held if of["seq"] >= least]
        for number in damaged:
            place.damage(number)
        place.journal.db.execute("DELETE FROM telemetry WHERE id <= ?", (trimmed,))
        there.sort(key=lambda at: at[:2])
        for start in (Seq(least), Time(least)):
            assert offsets(await read_all(place.reader(start=start, follow=False))) == there

    try:
        asyncio.run(look())
    finally:
        place.journal.db.close()


async def test_number_is_found_with_a_few_reads_of_single_rows(in_journal: InJournal) -> None:
    for _ in range(2000):
        await in_journal.samples(0)
    statements: list[str] = []
    with closing(JournalFile(in_journal.state.journal)) as file:
        file._db.set_trace_callback(statements.append)
        assert file.locate(0, "seq", 1500, 2000) == (1500, 1499)
    assert len(statements) < 20


async def test_journal_that_is_set_aside_is_finished_and_its_successor_follows(in_journal: InJournal) -> None:
    await in_journal.samples(0, 1)
    async with in_journal.reader(BOTH, "beginning", follow=True, name="recorder") as log:
        assert len(offsets(await read(log, 2))) == 2
        await in_journal.samples(0)
        old = in_journal.stream
        in_journal.set_aside()
        for _ in range(3):
            await in_journal.samples(0, 1)
        await in_journal.event(0, 5)
        assert offsets(await read(log, 1)) == telemetry_of(0, 1, 2)
        parts = await read(log, 7)
        assert offsets(parts) == [*events_of(0, 0, 1), *telemetry_of(0, 0, 3), *telemetry_of(1, 0, 3)]
        assert {part.next.stream for part in parts} == {in_journal.stream} != {old}
        assert holes(parts) == []
        await log.commit()
    await in_journal.samples(1)
    assert offsets(await read_all(in_journal.reader(BOTH, follow=False, name="recorder"))) == telemetry_of(1, 3, 4)


async def test_recording_goes_on_over_a_journal_that_was_set_aside(in_recording: InRecording) -> None:
    await in_recording.samples(0, 1)
    await read_all(in_recording.reader(follow=False))
    await in_recording.samples(0)
    old = in_recording.stream
    in_recording.set_aside()
    await in_recording.samples(0)
    for _ in range(2):  # there is nothing new the second time
        parts = await read_all(in_recording.reader(start="beginning", follow=False))
        assert holes(parts) == []
        found = [(p.partition, p.next.stream, int(at)) for p in parts if isinstance(p, Samples) for at in p.offsets]
        new = in_recording.stream
        assert sorted(found, key=lambda at: at[0]) == [(0, old, 0), (0, old, 1), (0, new, 0), (1, old, 0)]


async def test_reader_that_was_away_while_journals_were_set_aside_reads_them_all(in_journal: InJournal) -> None:
    for _ in range(3):
        await in_journal.samples(0)
    position: dict[Key, Position] = {("telemetry", 0): in_journal.position(1)}
    for _ in range(2):
        in_journal.set_aside()
        await in_journal.samples(0, 1)
    parts = await read_all(in_journal.reader(start=position, follow=False))
    assert holes(parts) == []
    assert [(part.partition, part.next.offset) for part in parts] == [(0, 3), (0, 1), (1, 1), (0, 1), (1, 1)]
    in_journal.aside(1).unlink()
    parts = await read_all(in_journal.reader(start=position, follow=False))
    assert holes(parts) == [("telemetry", 0, 1, None)]
    assert offsets(parts) == [*telemetry_of(0, 0, 1), *telemetry_of(1, 0, 1)]


async def test_second_reader_of_a_name_is_refused_until_the_first_is_gone(in_journal: InJournal) -> None:
    await in_journal.samples(0)
    async with in_journal.reader(follow=True, name="recorder") as log:
        with pytest.raises(LogError, match=f"'recorder' reads already .process {os.getpid()}."):
            await read_all(in_journal.reader(follow=False, name="recorder"))
        await read_all(in_journal.reader(follow=False, name="exporter"))
        await log.commit()
    assert await read_all(in_journal.reader(follow=False, name="recorder")) == []


async def test_positions_that_cannot_be_read_are_named(in_journal: InJournal) -> None:
    async with in_journal.reader(follow=True, name="recorder") as log:
        await log.commit()
    file = in_journal.state.path / "cursors" / "recorder.json"
    file.write_text("{")
    with pytest.raises(LogError, match=str(file)):
        await read_all(in_journal.reader(follow=False, name="recorder"))


async def test_missing_journal_and_its_commands_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="has the gateway run"):
        await read_all(JournalLog(StateDir(tmp_path), ["events"], follow=False))
    with pytest.raises(LogError, match="Kafka"):
        JournalLog(StateDir(tmp_path), ["commands"], follow=False)


WRITER = """
import sys
from pathlib import Path
from gateway.journal import Batch, Changes, Journal
from tests.gateway_parts import MOTORS, Numbering
journal = Journal(Path(sys.argv[1]), "arm1", MOTORS, 1 << 30)
numbering = Numbering(journal.stream)
for row in range(1, 1_000_000):
    journal.commit(Changes(batch=Batch(row, numbering.records([0, 0, 1]))))
    print(row, flush=True)
"""
READER = """
import asyncio, sys
from pathlib import Path
from gateway.journal_reader import JournalFile, JournalLog
from gateway.state_dir import StateDir
async def read(state, name):
    async with JournalLog(StateDir(Path(state)), ["telemetry"], "beginning", follow=True, name=name) as log:
        async for part in log:
            await log.commit()
            print(flush=True)
            if not sys.stdin.readline():
                return
asyncio.run(read(*sys.argv[1:]))
"""


@contextmanager
def running(code: str, *arguments: object) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def heard(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout
    line = process.stdout.readline()
    assert line, "it ended"
    return line


async def test_readers_that_come_go_stop_and_die_cost_the_writer_nothing(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    with running(WRITER, state.journal) as writer:
        heard(writer)
        with running(READER, tmp_path, "stopped") as stopped, running(READER, tmp_path, "killed") as killed:
            heard(stopped)
            stopped.send_signal(signal.SIGSTOP)
            heard(killed)
            killed.kill()
            for number in range(10):
                async with JournalLog(state, ["telemetry"], Seq(5), follow=True, name=f"reader{number}") as log:
                    assert isinstance(await anext(log), Samples)
            row = int(heard(writer))
            while int(heard(writer)) < row + 2000:
                pass
            writer.kill()
            writer.wait()
            with closing(sqlite3.connect(state.journal)) as db:  # succeeds only if nobody reads an old state
                assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
    async with JournalLog(state, ["telemetry"], follow=False, name="killed") as log:
        while (part := await anext(log)).partition != 0:  # the partition whose samples it had committed
            pass
        assert isinstance(part, Samples)
        assert part.offsets[0] > 0


# --- Kafka ------------------------------------------------------------------------------------------------------------


async def test_json_telemetry_gives_the_same_records(in_kafka: InKafka) -> None:
    of = Numbering(7).records([0, 0, 1])
    of["position_rad"], of["torque_nm"], of["velocity_rad_s"] = 0.1, np.nan, np.float32(0.1)
    for partition, mine in telemetry.by_partition(of):
        for value in (*telemetry.json_messages(mine, MOTORS[partition]), *telemetry.messages(mine)):
            await in_kafka._send("telemetry", partition, value, 1)
    parts = await read_all(in_kafka.reader(start="beginning", follow=False))
    for partition, mine in telemetry.by_partition(of):
        found = [part.records for part in parts if isinstance(part, Samples) and part.partition == partition]
        assert np.concatenate(found).tobytes() == mine.tobytes() * 2


async def test_what_is_no_sample_is_told_and_the_samples_around_it_come(in_kafka: InKafka) -> None:
    await in_kafka.samples(0, 0)
    for value in (b"no sample", b'{"seq": 3}', b""):
        await in_kafka._send("telemetry", 0, value, 1)
    await in_kafka.samples(0)
    parts = await read_all(in_kafka.reader(start="beginning", follow=False))
    assert offsets(parts) == [*telemetry_of(0, 0, 2), *telemetry_of(0, 5, 6)]
    assert holes(parts) == [("telemetry", 0, offset, offset) for offset in (2, 3, 4)]
    assert offsets(await read_all(in_kafka.reader(start=Seq(2), follow=False)))[0] == ("telemetry", 0, 1)


async def test_number_is_that_of_the_newest_stream(in_kafka: InKafka) -> None:
    await in_kafka.samples(*[0] * 6)
    in_kafka.new_stream(5)
    await in_kafka.samples(*[0] * 6)
    assert offsets(await read_all(in_kafka.reader(start=Seq(3), follow=False))) == telemetry_of(0, 8, 12)


async def test_commands_are_there_to_read_whatever_they_hold(in_kafka: InKafka) -> None:
    for value in (b'{"id": "a1"}', b"\xff"):
        await in_kafka._send("commands", 1, value, 4)
    (part,) = await read_all(in_kafka.reader(["commands"], "beginning", follow=False))
    assert isinstance(part, Entries)
    assert [entry.value for entry in part.entries] == [b'{"id": "a1"}', b"\xff"]
    assert [record.value for record in records(part)] == [{"id": "a1"}, {"unreadable": "\ufffd"}]
    assert {(entry.at_ns, entry.key, entry.seq) for entry in part.entries} == {(4_000_000, "joint2", 0)}


async def test_topic_that_began_anew_is_told(in_kafka: InKafka) -> None:
    await in_kafka.samples(0, 0)
    parts = await read_all(in_kafka.reader(start={("telemetry", 0): Position(0, 5)}, follow=False))
    assert holes(parts) == [("telemetry", 0, 5, None)]
    assert offsets(parts) == telemetry_of(0, 0, 2)
