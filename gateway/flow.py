"""Lanes -> broker: the records of one journal, every one once and in order.

Each lane has one batch in flight at most, so a partition whose leader is away holds up no other. All are sent as the
producer that the journal knows (``gateway.producer``): what a killed gateway still has on its way competes for the same
places in the partition, and the broker gives each away once.
"""

import asyncio
import contextlib
import functools
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from aiokafka.errors import InvalidTimestampError, OutOfOrderSequenceNumber, ProducerFenced, UnknownProducerId
from aiokafka.structs import RecordMetadata

from drivers.clock import MS, SECOND, after, monotonic_ns
from gateway import kafka
from gateway.journal import Lost, ProducerState, is_broken
from gateway.lanes import Item, Lane
from gateway.producer import ContinuedProducer, NoPlace, begins_epoch, next_epoch

log = logging.getLogger(__name__)

SICK_NS = SECOND  # how long a lane waits before it asks a disk again that could not be read
UNDATED_NS = 10 * SECOND  # how long a lane sends records without a time after the broker refused theirs
NO_TIMESTAMP = -1  # which the broker takes, whatever its limits
# A record that the leader has is hidden from readers until its followers have it, or are given up (30 s by default).
# Only then does a refusal behind an unmoved tail mean that broker and gateway disagree for good.
HIDDEN_NS = 45 * SECOND


class Ear(NamedTuple):
    """Who is told of trouble: that somebody else seems to write, and which topic refuses the time of records."""

    doubt: Callable[[], None]
    refused_time: Callable[[str], None]


class Flow:
    """One journal's lanes on their way to the broker."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        identity: ProducerState | None,
        bookmark: Callable[[str, int, int, int], None],
        remember: Callable[[ProducerState], Awaitable[None]],
        ear: Ear,
        past: Callable[[Lost], Awaitable[None]],
    ) -> None:
        """``identity``: who the journal's records are sent as; None: as a fresh producer.

        ``bookmark`` is called with (topic, partition, seq, row) as the broker acknowledges. ``remember`` writes down
        who we are to the broker, before that is used. ``past`` is told what the journal lacks, before the broker gets
        what comes behind: afterwards nobody finds it again.
        """
        self.lanes = lanes
        self._past = past
        self._identity = identity
        self._bookmark = bookmark
        self._remember = remember
        self._ear = ear
        self._identity_refused = False
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._drain = False
        self._to_lane = {(lane.name, lane.partition): lane for lane in lanes}

    def lane(self, topic: str, partition: int) -> Lane | None:
        """The one of a topic (telemetry, events, outcomes) and partition."""
        return self._to_lane.get((topic, partition))

    def wake(self) -> None:
        """There may be more to send."""
        self._wake.set()

    def fail(self, error: BaseException | None) -> None:
        """Make ``run`` raise this, or the first of several."""
        self._failure = self._failure or error
        self._wake.set()

    def known_to(self, cluster: str) -> bool:
        """Whether this was published, if anywhere, to this cluster."""
        return self._identity is None or self._identity.cluster == cluster

    async def run(self, cluster: str, options: Mapping[str, Any], started: Callable[[], None], *, drain: bool) -> None:
        """Send what the lanes have, until cancelled; with ``drain`` until they have no more.

        The lanes stand behind what the partitions hold. Raises what the broker says, and NoPlace.
        """
        known = self._identity if self.known_to(cluster) and not self._identity_refused else None
        identity = (known.pid, known.epoch) if known else None
        self._failure = None
        self._drain = drain
        async with kafka.running(ContinuedProducer(identity, **options, request_timeout_ms=10_000)) as producer:
            pid, epoch = producer.identity
            self._identity = known or ProducerState(cluster, pid, epoch, {})
            self._identity_refused = False
            await self._place_lanes()
            started()
            await self._publish(producer)

    # -- who we are to the broker --------------------------------------------------------------------------------

    async def _place_lanes(self) -> None:
        """See to it that every lane has a base, and that it is written down."""
        assert self._identity is not None  # noqa: S101  ``run`` has set it
        bases = self._identity.bases
        fresh = {at: lane.seq + 1 for at, lane in self._to_lane.items() if at not in bases}
        if fresh:
            await self._rebase(fresh)

    async def _rebase(self, bases: Mapping[tuple[str, int], int]) -> None:
        assert self._identity is not None  # noqa: S101  ``run`` has set it
        self._identity = self._identity._replace(bases={**self._identity.bases, **bases})
        await self._remember(self._identity)

    def _position(self, lane: Lane, seq: int) -> int:
        """The place of a lane's record in the sequence that the broker checks."""
        assert self._identity is not None  # noqa: S101  ``run`` has set it
        return seq - self._identity.bases[lane.name, lane.partition]

    def _begin_anew(self) -> None:
        """Take a fresh identity in the next run."""
        log.warning("the broker does not know our place any more: going on as a new producer")
        self._identity_refused = True

    # -- the flow ------------------------------------------------------------------------------------------------

    async def _publish(self, producer: ContinuedProducer) -> None:
        while True:
            self._wake.clear()
            for lane in self.lanes:
                if self._failure:  # nothing is sent in doubt
                    raise self._failure
                if not lane.busy and lane.pending() and (not lane.sick_until or monotonic_ns() >= lane.sick_until):
                    await self._send(producer, lane)
            if self._drain and not any(lane.busy or lane.pending() for lane in self.lanes):
                return
            sick = any(lane.sick_until for lane in self.lanes)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), SICK_NS / SECOND if sick else None)

    async def _send(self, producer: ContinuedProducer, lane: Lane) -> None:
        items = self._take(lane)
        if not items:
            return
        first = items[0].seq
        position = self._position(lane, first)
        if first != lane.seq + 1:
            await self._past(Lost(lane.partition, lane.seq + 1, first - 1, lane.name))
            if not begins_epoch(position):  # it does if a run got as far and was not heard
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

    def _take(self, lane: Lane) -> Sequence[Item]:
        try:
            items = lane.take()
        except sqlite3.Error as error:
            if self._drain and is_broken(error):  # nobody writes there any more: it stays so
                log.error("%s-%d: the journal cannot be read: %s", lane.topic, lane.partition, error)
                lane.give_up()
                return ()
            if not lane.sick_until:  # what is not in memory waits until the disk can be read again
                log.warning("%s-%d: the journal cannot be read: %s", lane.topic, lane.partition, error)
            lane.sick_until = after(monotonic_ns(), SICK_NS)
            return ()
        lane.sick_until = 0
        return items

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
            self._ear.doubt()
        lane.next_offset += count
        lane.acknowledged(last.seq, last.row)
        self._bookmark(lane.name, lane.partition, lane.seq, lane.row)
        if self._drain or lane.pending():  # else the next commit wakes us: a wake costs more than a record
            self._wake.set()

    def _refused(self, lane: Lane, error: BaseException) -> None:
        if isinstance(error, InvalidTimestampError) and monotonic_ns() >= lane.undated_until:
            lane.undated_until = after(monotonic_ns(), UNDATED_NS)
            self._ear.refused_time(lane.topic)
            lane.acknowledged(lane.seq, lane.row)  # nothing more: what was taken is taken again
            self._wake.set()
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
        self.fail(error)
