"""The log in Kafka: the arm's topics, partitions assigned by hand. A name's positions are the offsets of its group."""

import asyncio
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from drivers.clock import MS
from gateway import kafka, telemetry
from gateway.config import Config
from gateway.log_reader import (
    Entries,
    Key,
    LogEntry,
    LogError,
    LogReader,
    Missed,
    Part,
    Position,
    Positions,
    Samples,
    Seq,
    Start,
    Time,
    Topic,
)

POLL_MS = 500
READ_RECORDS = 8192
PROBE_BYTES = 16 << 10
GONE = "expired in Kafka"


class _At(msgspec.Struct):
    at_ns: int


_AT = msgspec.json.Decoder(_At)


class KafkaLog(LogReader):
    """Reads the arm's topics; positions are kept by the group ``servo.<arm>.<name>``.

    Kafka does not hold a name for one reader: two of the same name overwrite each other's positions. While the broker
    is away reading waits, and so does ``commit``. Entering may raise TopicMismatch and aiokafka's errors, too.
    """

    def __init__(
        self, config: Config, topics: Sequence[Topic], start: Start = "end", *, follow: bool, name: str | None = None
    ) -> None:
        """``config`` must have a broker. Raises LogError for a name that cannot be one."""
        super().__init__(topics, start, follow=follow, name=name)
        assert config.kafka is not None  # noqa: S101  callers have a broker
        self._settings = config.kafka
        self.arm = config.arm.name
        self._names = {config.topic(topic): topic for topic in topics}
        self._group = f"servo.{config.arm.name}.{name}" if name is not None else None
        self._floor: dict[TopicPartition, int] = {}  # a sequence number asked for that is still to come
        self._end: dict[TopicPartition, int] = {}  # where reading does not follow
        self._fetched: deque[tuple[TopicPartition, Sequence[ConsumerRecord]]] = deque()

    def _key(self, tp: TopicPartition) -> Key:
        return self._names[tp.topic], tp.partition

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as undo:
            partitions = [tp for name in self._names for tp in await kafka.partitions_of(self._settings, name)]
            self._consumer = await undo.enter_async_context(kafka.running(self._make_consumer(self._group)))
            begins = await self._consumer.beginning_offsets(partitions)
            ends = await self._consumer.end_offsets(partitions)
            wanted = await self._begin(partitions, begins, ends)
            positions = {
                tp: offset if begins[tp] <= offset <= ends[tp] else begins[tp] for tp, offset in wanted.items()
            }
            await kafka.assign(self._consumer, positions)
            if not self._follow:
                self._end = ends
                self._ends = {self._key(tp): end for tp, end in ends.items()}
            self._undo = undo.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._undo.aclose()

    def _make_consumer(self, group: str | None, **options: object) -> AIOKafkaConsumer:
        settings = kafka.client_options(self._settings)
        return AIOKafkaConsumer(
            **settings, group_id=group, enable_auto_commit=False, auto_offset_reset="earliest", **options
        )

    async def commit(self, positions: Positions | None = None) -> None:
        if self._group is None:
            raise LogError("a reader without a name keeps no positions")
        at = self._position | dict(positions or {})
        tps = {topic: name for name, topic in self._names.items()}
        await self._consumer.commit({TopicPartition(tps[topic], p): to.offset for (topic, p), to in at.items()})

    # -- where to begin ------------------------------------------------------------------------------------------

    async def _begin(
        self,
        partitions: Sequence[TopicPartition],
        begins: Mapping[TopicPartition, int],
        ends: Mapping[TopicPartition, int],
    ) -> dict[TopicPartition, int]:
        """The offset at which each partition begins; one that the partition has not any more stands for its oldest."""
        given = await self._given(partitions)
        if given:
            offsets = {tp: given.get(tp, begins[tp]) for tp in partitions}
            self._due = {self._key(tp) for tp in given}
        elif self._start == "end":
            offsets = dict(ends)
            self._due = {self._key(tp) for tp in partitions}
        elif isinstance(self._start, Seq | Time):
            offsets = await self._search(self._start, partitions, begins)
        else:
            offsets = dict(begins)
        self._position = {self._key(tp): Position(0, offset) for tp, offset in offsets.items()}
        return offsets

    async def _given(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """Offsets to go on from: the caller's, or those that this name has left."""
        if not isinstance(self._start, str | Seq | Time):
            start = self._start
            return {tp: start[self._key(tp)].offset for tp in partitions if self._key(tp) in start}
        if self._group is None:
            return {}
        left = {tp: await self._consumer.committed(tp) for tp in partitions}
        return {tp: offset for tp, offset in left.items() if offset is not None}

    async def _search(
        self, start: Seq | Time, partitions: Sequence[TopicPartition], begins: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        """Where the number or time begins in each partition, by halving it: a small read for each step."""
        offsets = {}
        async with kafka.running(self._make_consumer(None, max_partition_fetch_bytes=PROBE_BYTES)) as consumer:
            for tp, (end, last) in (await kafka.last_records(consumer, partitions)).items():
                offsets[tp] = end
                mark = _mark(self._names[tp.topic], last) if last else None
                if isinstance(start, Time):
                    search = functools.partial(_is_late, start.at_ns)
                elif last is None or mark is None:
                    self._floor[tp] = end or start.seq - 1
                    continue
                elif mark.seq < start.seq:
                    self._floor[tp] = last.offset + start.seq - mark.seq
                    continue
                else:
                    search = functools.partial(_is_at, mark.stream, start.seq)
                if begins[tp] < end:
                    await kafka.assign(consumer, {tp: begins[tp]})
                    offsets[tp] = await self._first(consumer, tp, begins[tp], end, search)
        return offsets

    async def _first(
        self, consumer: AIOKafkaConsumer, tp: TopicPartition, begin: int, end: int, is_it: Callable[["_Mark"], bool]
    ) -> int:
        """The first offset in begin..end from which on ``is_it`` holds."""
        while begin < end:
            middle = (begin + end) // 2
            consumer.seek(tp, middle)
            found = await self._next_mark(consumer, tp, end)
            if found is None or is_it(found):
                end = middle
            else:
                begin = found.offset + 1
        return begin

    async def _next_mark(self, consumer: AIOKafkaConsumer, tp: TopicPartition, end: int) -> "_Mark | None":
        """The next readable record before ``end``."""
        async with asyncio.timeout(kafka.ANSWER_S):
            while await consumer.position(tp) < end:
                for record in (await consumer.getmany(tp, timeout_ms=POLL_MS, max_records=1)).get(tp, ()):
                    if record.offset < end and (mark := _mark(self._names[tp.topic], record)):
                        return mark
        return None

    # -- reading -------------------------------------------------------------------------------------------------

    async def _read(self) -> Sequence[Part]:
        while True:
            while self._fetched:
                tp, records = self._fetched[0]
                parts = await self._parts_of(tp, records)
                self._fetched.popleft()
                if parts:
                    return parts
            if self._end and await self._is_at_end():
                if lost := [missed for tp, end in self._end.items() if (missed := await self._gone(tp, end))]:
                    return lost
                raise StopAsyncIteration
            found = await self._consumer.getmany(timeout_ms=POLL_MS, max_records=READ_RECORDS)
            self._fetched.extend(found.items())  # kept until they are handed on: a read may be cancelled

    async def _is_at_end(self) -> bool:
        return all([await self._consumer.position(tp) >= end for tp, end in self._end.items()])

    async def _parts_of(self, tp: TopicPartition, records: Sequence[ConsumerRecord]) -> list[Part]:
        parts: list[Part] = []
        if missed := await self._gone(tp, records[0].offset):
            parts.append(missed)
        floor, end = self._floor.get(tp, 0), self._end.get(tp, records[-1].offset + 1)
        if records := [record for record in records if floor <= record.offset < end]:
            self._floor.pop(tp, None)
            parts += _decode(self._names[tp.topic], tp.partition, records)
        return parts

    async def _gone(self, tp: TopicPartition, found: int) -> Missed | None:
        """What was due before offset ``found`` and is not there any more."""
        key = self._key(tp)
        due = self._position[key].offset
        if key not in self._due or found == due:
            return None
        if found < due:
            return Missed(*key, 0, due, None, "the topic began anew", Position(0, found))
        # offsets without a record are no loss: a transaction's end, or compaction
        begins = min(found, (await self._consumer.beginning_offsets([tp]))[tp])
        return Missed(*key, 0, due, begins - 1, GONE, Position(0, begins)) if begins > due else None


class _Mark(NamedTuple):
    """What places a record in its log."""

    offset: int
    stream: int
    seq: int
    at_ns: int


def _is_at(stream: int, seq: int, mark: _Mark) -> bool:
    return mark.stream == stream and mark.seq >= seq


def _is_late(at_ns: int, mark: _Mark) -> bool:
    return mark.at_ns >= at_ns


def _mark(topic: Topic, record: ConsumerRecord) -> _Mark | None:
    """None for a record that is not what its topic holds."""
    match next(_decode(topic, record.partition, [record])):
        case Samples(records=rows):
            row = rows[0]
            return _Mark(record.offset, int(row["stream"]), int(row["seq"]), int(row["sampled_at_ns"]))
        case Entries(entries=[entry]):
            return _Mark(*entry[:4])
    return None


def _decode(topic: Topic, partition: int, records: Sequence[ConsumerRecord]) -> Iterator[Part]:
    """Records as parts; one of telemetry that cannot be read becomes a Missed."""
    after = Position(0, records[-1].offset + 1)
    if topic != "telemetry":
        yield Entries(topic, partition, [_entry(topic, record) for record in records], after)
        return
    values = [record.value or b"" for record in records]
    decode = telemetry.decode_json if values[0].startswith(b"{") else telemetry.decode
    try:
        rows = decode(values, partition)
    except ValueError as error:
        if len(records) > 1:  # the others are good
            half = len(records) // 2
            yield from _decode(topic, partition, records[:half])
            yield from _decode(topic, partition, records[half:])
        else:
            yield Missed(topic, partition, 0, records[0].offset, records[0].offset, f"unreadable: {error}", after)
        return
    offsets = np.fromiter((record.offset for record in records), np.int64, len(records))
    yield Samples(partition, (records[0].key or b"").decode(errors="replace"), offsets, rows, after)


def _entry(topic: Topic, record: ConsumerRecord) -> LogEntry:
    value = record.value or b""
    at_ns = record.timestamp * MS
    stream = seq = 0
    if topic != "commands":
        with suppress(ValueError):  # the exact time; Kafka's has milliseconds
            at_ns = _AT.decode(value).at_ns
        with suppress(ValueError):
            stream, seq = map(int, dict(record.headers).get(kafka.SEQ_HEADER, b"").split(b"/"))
    return LogEntry(record.offset, stream, seq, at_ns, (record.key or b"").decode(errors="replace"), value)
