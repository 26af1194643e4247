"""Journal -> Kafka: every record once, in order, and no further than the journal holds.

    journal --pages--> lane per (topic, partition) --one batch in flight--> broker
                            ^-- acknowledged: the lane moves on

A lane knows the sequence number that the broker has acknowledged. It has one batch in flight at most, so a partition
whose leader is away holds up no other. Idempotence makes a retry inside one producer harmless; after any other doubt
(start, a failed producer) a session begins anew, asks every partition for its last record, and goes on behind it.
"""

import asyncio
import functools
import itertools
import logging
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.structs import RecordMetadata

from drivers.clock import MS, SECOND, after, left_s, monotonic_ns
from gateway import kafka, telemetry
from gateway.config import Config
from gateway.journal import Batch, JournalReader, StoredEntry
from gateway.stamp import Head
from gateway.telemetry import Records, by_partition

log = logging.getLogger(__name__)

BATCH_BYTES = 512 << 10  # well below the broker's default limit of 1 MiB
BATCH_RECORDS = 2048  # bounds how long the event loop is away while a backlog drains
RETRY_FIRST_S, RETRY_MOST_S = 0.2, 5.0
SEQ_HEADER = "servo-seq"  # stream and seq of a record whose value has no place for them


class ForeignRecord(Exception):
    """Somebody else writes to the arm's partitions."""


class JournalBehind(Exception):
    """The broker holds more of our stream than the journal: the journal lost its newest records, as in a power cut.

    Numbers would be given twice; a new stream has to begin.
    """


class Item(NamedTuple):
    """One record on its way."""

    seq: int
    row: int  # of the journal: everything up to it is done with this record
    at_ns: int
    key: bytes
    value: bytes
    headers: Sequence[tuple[str, bytes]] = ()


class Lane(ABC):
    """What one partition has acknowledged, and what comes next."""

    def __init__(self, name: str, topic: str, partition: int) -> None:
        self.name = name  # within the arm: telemetry, events, outcomes
        self.topic = topic
        self.partition = partition
        self.seq = 0  # acknowledged
        self.row = 0  # of the journal; everything up to it is acknowledged or not ours
        self.busy = False
        self.next_offset = 0  # where the broker puts the next record, if nobody else writes

    @abstractmethod
    def pending(self) -> bool:
        """Whether ``take`` would find something."""

    @abstractmethod
    def take(self) -> Sequence[Item]:
        """The records behind ``seq``, oldest first, at most BATCH_RECORDS; always the same until acknowledged."""

    @abstractmethod
    def seq_of(self, record: ConsumerRecord) -> tuple[int, int]:
        """(stream, seq) of a record that the partition holds. Raises ForeignRecord for what we did not write."""

    def acknowledged(self, seq: int, row: int) -> None:
        """The broker has everything up to ``seq``, which stands in ``row``."""
        self.seq, self.row = seq, row


class Pages:
    """Telemetry rows split by partition, shared by all lanes: the newest from memory, older ones page by page."""

    ROWS = 256
    KEPT = 8

    def __init__(self, reader: JournalReader) -> None:
        self._reader = reader
        self._pages: OrderedDict[int, list[tuple[int, dict[int, Records]]]] = OrderedDict()
        self._recent: deque[tuple[int, dict[int, Records]]] = deque(maxlen=4 * self.ROWS)
        self.end = reader.ends()[0]

    def append(self, row: int, records: Records) -> None:
        """A row that was just committed."""
        self._recent.append((row, dict(by_partition(records))))
        self.end = row

    def behind(self, row: int) -> list[tuple[int, dict[int, Records]]]:
        """Some rows behind ``row``, oldest first; empty only where the log ends."""
        if self._recent and self._recent[0][0] <= row + 1:
            newest_first = itertools.takewhile(lambda entry: entry[0] > row, reversed(self._recent))
            return list(newest_first)[::-1]
        while row < self.end:
            number = (row + 1) // self.ROWS
            if rows := [entry for entry in self._page(number) if entry[0] > row]:
                return rows
            row = (number + 1) * self.ROWS - 1  # a page that was trimmed away
        return []

    def _page(self, number: int) -> list[tuple[int, dict[int, Records]]]:
        page = self._pages.get(number)
        if page is None:
            first = number * self.ROWS
            batches = self._reader.batches(first - 1, self.ROWS)
            page = [(batch.id, dict(by_partition(batch.records))) for batch in batches if batch.id < first + self.ROWS]
            if first + self.ROWS <= self.end:  # a page that still grows is not kept
                self._pages[number] = page
                if len(self._pages) > self.KEPT:
                    self._pages.popitem(last=False)
        return page


class TelemetryLane(Lane):
    """One motor's samples."""

    def __init__(self, topic: str, partition: int, motor: str, pages: Pages, encoding: str) -> None:
        super().__init__("telemetry", topic, partition)
        self._key = motor.encode()
        self._motor = motor
        self._pages = pages
        self._json = encoding == "json"

    def pending(self) -> bool:
        return self.row < self._pages.end

    def take(self) -> Sequence[Item]:
        items: list[Item] = []
        while not items and (rows := self._pages.behind(self.row)):
            for row, split in rows:
                mine = split.get(self.partition)
                if mine is not None and mine["seq"][-1] > self.seq:
                    items += self._items(row, mine[mine["seq"] > self.seq])
                if len(items) >= BATCH_RECORDS:
                    break
            if not items:
                self.row = rows[-1][0]  # nothing of ours in there
        if not items:  # a damaged row at the very end would be looked for again and again
            self.row = max(self.row, self._pages.end)
        return items

    def _items(self, row: int, records: Records) -> list[Item]:
        values = telemetry.json_messages(records, self._motor) if self._json else telemetry.messages(records)
        rows = [row - 1] * (len(records) - 1) + [row]
        columns = zip(records["seq"].tolist(), rows, records["sampled_at_ns"].tolist(), values, strict=True)
        return [Item(seq, done, at_ns, self._key, value) for seq, done, at_ns, value in columns]

    def seq_of(self, record: ConsumerRecord) -> tuple[int, int]:
        try:
            if self._json:
                values = msgspec.json.decode(record.value, type=dict[str, Any])
                return int(values["stream"]), int(values["seq"])
            found = telemetry.decode([record.value], self.partition)[0]
            return int(found["stream"]), int(found["seq"])
        except (ValueError, KeyError, TypeError) as error:
            raise ForeignRecord(
                f"topic {self.topic}, partition {self.partition}, offset {record.offset}: the newest record is not "
                f"ours ({error}); was kafka.format changed? Publish under another arm name, or begin a new topic"
            ) from error


class EntryLane(Lane):
    """One partition of events or outcomes."""

    def __init__(self, name: str, topic: str, partition: int, reader: JournalReader) -> None:
        super().__init__(name, topic, partition)
        self._reader = reader
        self._stream = reader.stream
        self._dirty = True

    def appended(self) -> None:
        """Something was committed for this lane."""
        self._dirty = True

    def pending(self) -> bool:
        return self._dirty

    def take(self) -> Sequence[Item]:
        entries = self._reader.partition_entries(self.name, self.partition, self.seq, BATCH_RECORDS)
        self._dirty = len(entries) == BATCH_RECORDS
        return [self._item(entry) for entry in entries]

    def _item(self, entry: StoredEntry) -> Item:
        header = (SEQ_HEADER, f"{self._stream}/{entry.seq}".encode())
        return Item(entry.seq, entry.id, entry.at_ns, entry.key.encode(), entry.value, (header,))

    def acknowledged(self, seq: int, row: int) -> None:
        super().acknowledged(seq, row)
        self._dirty = True  # what was committed while the batch was away

    def seq_of(self, record: ConsumerRecord) -> tuple[int, int]:
        try:
            stream, _, seq = dict(record.headers)[SEQ_HEADER].decode().partition("/")
            return int(stream), int(seq)
        except (KeyError, ValueError, UnicodeDecodeError) as error:
            raise ForeignRecord(
                f"topic {self.topic}, partition {self.partition}, offset {record.offset}: the newest record has no "
                f"header {SEQ_HEADER}, so the gateway did not write it; only the gateway may write to this topic"
            ) from error


class Publisher:
    """Keeps the arm's telemetry, events and outcomes flowing to the broker.

    ``heads`` are the newest records that the journal held when this run began. ``bookmark`` is called with (topic,
    partition, seq, row) as the broker acknowledges; ``changed`` with the state (``up``, ``down``, ``refused``) and what
    is wrong, when that changes.
    """

    def __init__(
        self,
        config: Config,
        reader: JournalReader,
        heads: Mapping[int, Head],
        bookmark: Callable[[str, int, int, int], None],
        changed: Callable[[str, str], None],
    ) -> None:
        assert config.kafka is not None  # noqa: S101  the composition root makes no publisher otherwise
        self._config = config
        self._options = kafka.client_options(config.kafka)  # raises ConfigError for a secret that is not there
        self._reader = reader
        self._bookmark = bookmark
        self._changed = changed
        self._pages = Pages(reader)
        encoding = config.kafka.format
        self._entry_lanes = {
            (name, partition): EntryLane(name, config.topic(name), partition, reader)
            for name in ("events", "outcomes")
            for partition in sorted({0, *(motor.partition for motor in config.motors)})
        }
        self._telemetry_lanes = {
            motor.partition: TelemetryLane(
                config.topic("telemetry"), motor.partition, motor.name, self._pages, encoding
            )
            for motor in config.motors
        }
        self._lanes: list[Lane] = [*self._telemetry_lanes.values(), *self._entry_lanes.values()]
        self._held_at_start = {("telemetry", p): head.seq for p, head in heads.items()} | reader.newest_entries()
        self._went_behind_tails = False
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self.state = "down"

    # -- what the log tells --------------------------------------------------------------------------------------

    def committed(self, batch: Batch | None, entries: Sequence[tuple[str, int]]) -> None:
        """A commit added this telemetry row and entries for these (topic, partition)."""
        if batch is not None:
            self._pages.append(batch.id, batch.records)
        for at in entries:
            if lane := self._entry_lanes.get(at):
                lane.appended()
        self._wake.set()

    def acknowledged(self, partition: int) -> int:
        """The newest sequence number of a motor that the broker has."""
        return self._telemetry_lanes[partition].seq

    # -- sessions ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Publish until cancelled.

        Raises TopicMismatch if the broker's first answer is that the topics do not fit, and JournalBehind.
        """
        retry_s = RETRY_FIRST_S
        first = True
        while True:
            began = monotonic_ns()
            try:
                await self._session()
            except kafka.TopicMismatch as error:
                if first:
                    raise
                self._tell("refused", str(error))
            except JournalBehind:
                raise
            except ForeignRecord as error:
                self._tell("refused", str(error))
            except (KafkaError, OSError, TimeoutError) as error:
                self._tell("down", f"{type(error).__name__}: {error}")
            except Exception as error:
                log.exception("publishing failed; trying again")
                self._tell("down", f"{type(error).__name__}: {error}")
            if monotonic_ns() - began > RETRY_MOST_S * SECOND:
                retry_s = RETRY_FIRST_S
            first = False
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_MOST_S)

    async def drained(self, timeout_s: float) -> bool:
        """Wait until the broker has everything, at most ``timeout_s``."""
        deadline = after(monotonic_ns(), int(timeout_s * SECOND))
        while any(lane.busy or lane.pending() for lane in self._lanes):
            if self.state != "up" or not left_s(deadline):
                return False
            await asyncio.sleep(0.01)
        return True

    def _tell(self, state: str, detail: str) -> None:
        if state != self.state:
            self.state = state
            self._changed(state, detail)

    async def _session(self) -> None:
        await kafka.ensure_topics(self._config)
        async with kafka.running(
            AIOKafkaProducer(
                **self._options,
                enable_idempotence=True,
                acks="all",
                max_batch_size=BATCH_BYTES,
                request_timeout_ms=10_000,
            )
        ) as producer:
            await self._go_behind_tails()
            self._failure = None
            self._tell("up", "")
            await self._publish(producer)

    async def _go_behind_tails(self) -> None:
        """Ask every partition what it holds, and set each lane behind that."""
        bookmarks = self._reader.published()
        lanes = {TopicPartition(lane.topic, lane.partition): lane for lane in self._lanes}
        async with kafka.running(AIOKafkaConsumer(**self._options, enable_auto_commit=False)) as consumer:
            tails = await kafka.last_records(consumer, lanes)
        for tp, (end, record) in tails.items():
            lane = lanes[tp]
            lane.busy = False
            lane.next_offset = end
            seq, row = bookmarks.get((lane.name, lane.partition), (0, 0))
            if record is not None:
                stream, tail_seq = lane.seq_of(record)
                if stream != self._reader.stream:
                    tail_seq = 0
                held = self._held_at_start.get((lane.name, lane.partition), 0)
                if not self._went_behind_tails and tail_seq > held:
                    raise JournalBehind(
                        f"topic {tp.topic}, partition {tp.partition} holds seq {tail_seq} of stream {stream}, the "
                        f"journal began this run at {held}"
                    )
                if tail_seq < seq:  # the broker forgot what it had acknowledged, or is another one
                    log.warning("%s: ends at seq %d, was acknowledged up to %d: sent again", tp, tail_seq, seq)
                    row = 0
                lane.acknowledged(tail_seq, row)
            elif end == 0:  # a new topic: all that the journal holds
                lane.acknowledged(0, 0)
            else:  # everything has expired there
                lane.acknowledged(seq, row)
        self._went_behind_tails = True

    # -- the flow ------------------------------------------------------------------------------------------------

    async def _publish(self, producer: AIOKafkaProducer) -> None:
        while True:
            self._wake.clear()
            for lane in self._lanes:
                if not lane.busy and lane.pending():
                    await self._send(producer, lane)
            if self._failure:
                raise self._failure
            await self._wake.wait()

    async def _send(self, producer: AIOKafkaProducer, lane: Lane) -> None:
        batch = producer.create_batch()
        append = batch.append
        last = None
        for item in lane.take():
            headers = list(item.headers)
            if append(timestamp=item.at_ns // MS, key=item.key, value=item.value, headers=headers) is None:
                break
            last = item
        if last is None:
            return
        lane.busy = True
        future = await producer.send_batch(batch, lane.topic, partition=lane.partition)
        future.add_done_callback(functools.partial(self._acknowledged, lane, last, batch.record_count()))

    def _acknowledged(self, lane: Lane, last: Item, count: int, future: "asyncio.Future[RecordMetadata]") -> None:
        lane.busy = False
        if future.cancelled():
            return
        if error := future.exception():
            self._failure = error
            self._wake.set()
            return
        offset = future.result().offset  # -1: the broker had it already, from a try whose answer was lost
        if offset not in {-1, lane.next_offset}:
            log.error(
                "%s-%d: our batch is at offset %d instead of %d: somebody else writes to this partition",
                lane.topic, lane.partition, offset, lane.next_offset,
            )  # fmt: skip
            lane.next_offset = offset
        lane.next_offset += count
        lane.acknowledged(last.seq, last.row)
        self._bookmark(lane.name, lane.partition, lane.seq, lane.row)
        if lane.pending():  # else the next commit wakes us: a wake costs more than a record
            self._wake.set()
