"""Journal -> Kafka: every record once, in order, and no further than the journal holds.

    journal --pages--> lane per (topic, partition) --one batch in flight--> broker
                            ^-- acknowledged: the lane moves on

A lane knows the sequence number that the broker has acknowledged. It has one batch in flight at most, so a partition
whose leader is away holds up no other. After any doubt (start, a failed producer) a session begins anew, asks every
partition for its last record, and goes on behind it, as the same producer (``gateway.producer``): what a killed gateway
still has on its way competes for the same places in the partition, and the broker gives each away once. The newest
records come from memory (``gateway.recent``), so that a sick disk stops nothing.
"""

import asyncio
import functools
import logging
import sqlite3
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    InvalidTimestampError,
    KafkaError,
    OutOfOrderSequenceNumber,
    ProducerFenced,
    UnknownProducerId,
)
from aiokafka.structs import RecordMetadata

from drivers.clock import MS, SECOND, after, left_s, monotonic_ns
from gateway import kafka, telemetry
from gateway.claim import Claim, ClaimLapsed, ClaimLost
from gateway.commands import State, decode_outcome
from gateway.config import Config
from gateway.events import EventType
from gateway.journal import JournalReader, ProducerState, StoredEntry
from gateway.producer import ContinuedProducer, NoPlace, begins_epoch, next_epoch
from gateway.recent import Recent, Split
from gateway.stamp import Head
from gateway.telemetry import Records, by_partition

log = logging.getLogger(__name__)

BATCH_RECORDS = 2048  # bounds how long the event loop is away while a backlog drains
RETRY_FIRST_S, RETRY_MOST_S = 0.2, 5.0
SICK_NS = SECOND  # how long a lane waits before it asks a disk again that could not be read
UNDATED_NS = 10 * SECOND  # how long a lane sends records without a time after the broker refused theirs
NO_TIMESTAMP = -1  # which the broker takes, whatever its limits
# A record that the leader has is hidden from readers until its followers have it, or are given up (30 s by default).
# Only then does a refusal behind an unmoved tail mean that broker and gateway disagree for good.
HIDDEN_NS = 45 * SECOND


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
        self.refused: tuple[int, int] | None = None  # (next_offset, monotonic) at the first refusal as out of order
        self.sick_until = 0  # monotonic
        self.undated_until = 0  # monotonic

    @abstractmethod
    def pending(self) -> bool:
        """Whether ``take`` would find something."""

    @abstractmethod
    def take(self) -> Sequence[Item]:
        """The records behind ``seq``, oldest first; always the same until acknowledged. Raises sqlite3.Error."""

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

    def __init__(self, reader: JournalReader, recent: Recent) -> None:
        self._reader = reader
        self._recent = recent
        self._pages: OrderedDict[int, list[tuple[int, Split]]] = OrderedDict()

    @property
    def end(self) -> int:
        """The newest row."""
        return self._recent.row

    def behind(self, row: int) -> list[tuple[int, Split]]:
        """Some rows behind ``row``, oldest first; empty only where the log ends. Raises sqlite3.Error."""
        while (rows := self._recent.rows(row)) is None:
            number = (row + 1) // self.ROWS
            if rows := [entry for entry in self._page(number) if entry[0] > row]:
                return rows
            row = (number + 1) * self.ROWS - 1  # a page that was trimmed away
        return rows

    def _page(self, number: int) -> list[tuple[int, Split]]:
        page = self._pages.get(number)
        if page is None:
            first = number * self.ROWS
            batches = self._reader.batches(first - 1, self.ROWS)
            page = [(batch.id, dict(by_partition(batch.records))) for batch in batches if batch.id < first + self.ROWS]
            if first + self.ROWS <= self._recent.saved_row:  # a page that still grows is not kept
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
    """One partition of events or outcomes.

    What an accepted command becomes is not published from memory: if the gateway were killed before the journal has
    it, the next run would know nothing of the command, or end it a second time.
    """

    def __init__(self, name: str, topic: str, partition: int, reader: JournalReader, recent: Recent) -> None:
        super().__init__(name, topic, partition)
        self._reader = reader
        self._recent = recent
        self._stream = reader.stream
        self._dirty = True

    def appended(self) -> None:
        """Something was committed for this lane."""
        self._dirty = True

    def pending(self) -> bool:
        return self._dirty

    def take(self) -> Sequence[Item]:
        entries = self._recent.entries(self.name, self.partition, self.seq, BATCH_RECORDS)
        if entries is None:
            entries = self._reader.partition_entries(self.name, self.partition, self.seq, BATCH_RECORDS)
        ready = list(takewhile(self._ready, entries))
        self._dirty = len(entries) == BATCH_RECORDS or len(ready) < len(entries)
        return [self._item(entry) for entry in ready]

    def _ready(self, entry: StoredEntry) -> bool:
        if self.name != "outcomes" or entry.id <= self._recent.saved_entry:
            return True
        return decode_outcome(entry.value).state in {State.REJECTED, State.EXPIRED}  # never accepted

    def _item(self, entry: StoredEntry) -> Item:
        header = (kafka.SEQ_HEADER, f"{self._stream}/{entry.seq}".encode())
        return Item(entry.seq, entry.id, entry.at_ns, entry.key.encode(), entry.value, (header,))

    def acknowledged(self, seq: int, row: int) -> None:
        super().acknowledged(seq, row)
        self._dirty = True  # what was committed while the batch was away

    def seq_of(self, record: ConsumerRecord) -> tuple[int, int]:
        try:
            stream, _, seq = dict(record.headers)[kafka.SEQ_HEADER].decode().partition("/")
            return int(stream), int(seq)
        except (KeyError, ValueError, UnicodeDecodeError) as error:
            raise ForeignRecord(
                f"topic {self.topic}, partition {self.partition}, offset {record.offset}: the newest record has no "
                f"header {kafka.SEQ_HEADER}, so the gateway did not write it; only the gateway may write to this topic"
            ) from error


class Publisher:
    """Keeps the arm's telemetry, events and outcomes flowing to the broker.

    ``heads`` are the newest records that the journal held when this run began; ``recent`` holds what has come since;
    ``owner`` is who claims the arm (``StateDir.owner``).
    ``bookmark`` is called with (topic, partition, seq, row) as the broker acknowledges; ``changed`` with the state
    (``up``, ``down``, ``refused``, ``contested``) and what is wrong, when that changes; ``event`` with what else is
    worth telling. ``remember`` writes down who we are to the broker, before that is used.
    """

    def __init__(
        self,
        config: Config,
        reader: JournalReader,
        heads: Mapping[int, Head],
        recent: Recent,
        owner: str,
        *,
        bookmark: Callable[[str, int, int, int], None],
        changed: Callable[[str, str], None],
        event: Callable[..., None],
        remember: Callable[[ProducerState], Awaitable[None]],
    ) -> None:
        assert config.kafka is not None  # noqa: S101  the composition root makes no publisher otherwise
        self._config = config
        self._options = kafka.client_options(config.kafka)  # raises ConfigError for a secret that is not there
        self._stream = reader.stream
        self._bookmark = bookmark
        self._changed = changed
        self._event = event
        self._remember = remember
        pages = Pages(reader, recent)
        encoding = config.kafka.format
        self._entry_lanes = {
            (name, partition): EntryLane(name, config.topic(name), partition, reader, recent)
            for name in ("events", "outcomes")
            for partition in sorted({0, *(motor.partition for motor in config.motors)})
        }
        self._telemetry_lanes = {
            motor.partition: TelemetryLane(config.topic("telemetry"), motor.partition, motor.name, pages, encoding)
            for motor in config.motors
        }
        self._lanes: list[Lane] = [*self._telemetry_lanes.values(), *self._entry_lanes.values()]
        self._held_at_start = {("telemetry", p): head.seq for p, head in heads.items()} | reader.newest_entries()
        self._bookmarks = reader.published()  # read once: later the disk may not answer
        self._identity = reader.producer()
        self._identity_refused = False
        self._went_behind_tails = False
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._told_timestamps = False
        self.claim = Claim(config, owner, reader.stream)
        self.state = "down"

    # -- what the log tells --------------------------------------------------------------------------------------

    def committed(self, entries: Sequence[StoredEntry]) -> None:
        """``recent`` has more: telemetry, and these entries."""
        for entry in entries:
            if lane := self._entry_lanes.get((entry.topic, entry.partition)):
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
            except ClaimLost as error:
                self._tell("contested", str(error))
            except (KafkaError, OSError, TimeoutError, ClaimLapsed, NoPlace) as error:
                self._tell("down", f"{type(error).__name__}: {error}")
            except asyncio.CancelledError:
                if kafka.is_cancelled():
                    raise
                self._tell("down", "a client of ours was cancelled by its own library")
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
            if self.state in {"refused", "contested"} or not left_s(deadline):
                return False
            await asyncio.sleep(0.01)
        return True

    def _tell(self, state: str, detail: str) -> None:
        if state != self.state:
            self.state = state
            self._changed(state, detail)

    async def _session(self) -> None:
        cluster = await kafka.ensure_topics(self._config)
        self._failure = None
        async with self.claim.held(lambda other: self._tell("contested", other)) as keeping:
            keeping.add_done_callback(self._claim_ended)
            try:
                await self._as_one_producer(cluster)
            except JournalBehind:
                await self.claim.give_up()  # the stream that begins next is another
                raise

    async def _as_one_producer(self, cluster: str) -> None:
        known = self._identity
        if known and known.cluster != cluster:
            self._bookmarks.clear()  # of the cluster before
            known = None
        if self._identity_refused:
            known = None
        identity = (known.pid, known.epoch) if known else None
        async with kafka.running(ContinuedProducer(identity, **self._options, request_timeout_ms=10_000)) as producer:
            pid, epoch = producer.identity
            self._identity = known or ProducerState(cluster, pid, epoch, {})
            self._identity_refused = False
            await self._go_behind_tails()
            await self._place_lanes()
            self._told_timestamps = False
            self._tell("up", "")
            await self._publish(producer)

    def _claim_ended(self, keeping: "asyncio.Task[None]") -> None:
        if not keeping.cancelled():
            self._fail(keeping.exception())

    def _fail(self, error: BaseException | None) -> None:
        self._failure = self._failure or error
        self._wake.set()

    async def _go_behind_tails(self) -> None:
        """Ask every partition what it holds, and set each lane behind that."""
        lanes = {TopicPartition(lane.topic, lane.partition): lane for lane in self._lanes}
        async with kafka.running(AIOKafkaConsumer(**self._options, enable_auto_commit=False)) as consumer:
            tails = await kafka.last_records(consumer, lanes)
        for tp, (end, record) in tails.items():
            lane = lanes[tp]
            lane.busy = False
            lane.next_offset = end
            seq, row = self._bookmarks.get((lane.name, lane.partition), (0, 0))
            stream, tail_seq = lane.seq_of(record) if record is not None else (0, 0)
            if stream == self._stream:
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
            else:  # everything has expired there, or another gateway published meanwhile
                lane.acknowledged(seq, row)
        self._went_behind_tails = True

    # -- who we are to the broker --------------------------------------------------------------------------------

    async def _place_lanes(self) -> None:
        """See to it that every lane has a base, and that it is written down."""
        assert self._identity is not None  # noqa: S101  the session has set it
        bases = self._identity.bases
        fresh = {
            (lane.name, lane.partition): lane.seq + 1
            for lane in self._lanes
            if (lane.name, lane.partition) not in bases
        }
        if fresh:
            await self._rebase(fresh)

    async def _rebase(self, bases: Mapping[tuple[str, int], int]) -> None:
        assert self._identity is not None  # noqa: S101  the session has set it
        self._identity = self._identity._replace(bases={**self._identity.bases, **bases})
        await self._remember(self._identity)

    def _position(self, lane: Lane, seq: int) -> int:
        """The place of a lane's record in the sequence that the broker checks."""
        assert self._identity is not None  # noqa: S101  the session has set it
        return seq - self._identity.bases[lane.name, lane.partition]

    def _begin_anew(self) -> None:
        """Take a fresh identity in the next session."""
        log.warning("the broker does not know our place any more: going on as a new producer")
        self._identity_refused = True

    # -- the flow ------------------------------------------------------------------------------------------------

    async def _publish(self, producer: ContinuedProducer) -> None:
        while True:
            self._wake.clear()
            for lane in self._lanes:
                if not lane.busy and lane.pending() and (not lane.sick_until or monotonic_ns() >= lane.sick_until):
                    await self._send(producer, lane)
            if self._failure:
                raise self._failure
            await self._wake.wait()

    async def _send(self, producer: ContinuedProducer, lane: Lane) -> None:
        try:
            items = lane.take()
        except sqlite3.Error as error:  # what is not in memory waits until the disk can be read again
            if not lane.sick_until:
                log.warning("%s-%d: the journal cannot be read: %s", lane.topic, lane.partition, error)
            lane.sick_until = after(monotonic_ns(), SICK_NS)
            return
        lane.sick_until = 0
        if not items:
            return
        first = items[0].seq
        position = self._position(lane, first)
        if first != lane.seq + 1 and not begins_epoch(position):  # it does if a session got as far and was not heard
            position = next_epoch(position)
            await self._rebase({(lane.name, lane.partition): first - position})
        try:
            batch = producer.place_batch(position)
        except NoPlace:
            self._begin_anew()
            raise
        append = batch.append
        undated = lane.undated_until and monotonic_ns() < lane.undated_until
        behind = first + next_epoch(position) - position  # the seq that begins another epoch
        last = None
        for seq, item in zip(range(first, behind), items, strict=False):
            if item.seq != seq:
                break
            timestamp = NO_TIMESTAMP if undated else item.at_ns // MS
            if append(timestamp=timestamp, key=item.key, value=item.value, headers=list(item.headers)) is None:
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
            self._refused(lane, error)
            return
        lane.refused = None
        offset = future.result().offset  # -1: the broker had it already, from a try whose answer was lost
        if offset not in {-1, lane.next_offset}:
            log.error(
                "%s-%d: our batch is at offset %d instead of %d: somebody else writes to this partition",
                lane.topic, lane.partition, offset, lane.next_offset,
            )  # fmt: skip
            lane.next_offset = offset
            self.claim.check_now()
        lane.next_offset += count
        lane.acknowledged(last.seq, last.row)
        self._bookmarks[lane.name, lane.partition] = (lane.seq, lane.row)
        self._bookmark(lane.name, lane.partition, lane.seq, lane.row)
        if lane.pending():  # else the next commit wakes us: a wake costs more than a record
            self._wake.set()

    def _refused(self, lane: Lane, error: BaseException) -> None:
        if isinstance(error, InvalidTimestampError) and monotonic_ns() >= lane.undated_until:
            self._refused_timestamps(lane)
            return
        if isinstance(error, OutOfOrderSequenceNumber | UnknownProducerId):
            offset, since = lane.refused or (-1, 0)
            if offset != lane.next_offset:  # something of ours was there first; the tail will tell what
                lane.refused = (lane.next_offset, monotonic_ns())
            elif monotonic_ns() - since > HIDDEN_NS:
                lane.refused = None
                self._begin_anew()
        elif isinstance(error, ProducerFenced):
            self._begin_anew()
        self._fail(error)

    def _refused_timestamps(self, lane: Lane) -> None:
        lane.undated_until = after(monotonic_ns(), UNDATED_NS)
        if not self._told_timestamps:
            self._told_timestamps = True
            detail = (
                f"topic {lane.topic} refuses the time of our records, which are sent without it (their values have "
                "it): allow older and newer ones with message.timestamp.before.max.ms and .after.max.ms, or set the "
                "clocks of the broker and this machine"
            )
            log.warning("kafka: %s", detail)
            self._event(EventType.KAFKA_TIMESTAMP_REFUSED, topic=lane.topic, detail=detail)
        self._wake.set()
