"""The log -> Kafka: every record once, in order, and no further than the journal holds.

    journals that were set aside --flow--> broker        first, and only what the broker lacks of them
    journal of this run --lanes--> flow --> broker       then, for as long as the gateway runs

After any doubt (start, a failed producer) a session begins anew: it claims the arm (``gateway.claim``), asks every
partition for its last record, and goes on behind it. What becomes of a batch is told in ``gateway.flow``, where records
come from in ``gateway.lanes``.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from drivers.clock import SECOND, after, left_s, monotonic_ns
from gateway import kafka
from gateway.claim import Claim, ClaimLapsed, ClaimLost
from gateway.config import Config
from gateway.earlier import Earlier
from gateway.events import EventType
from gateway.flow import Ear, Flow
from gateway.journal import JournalReader, Lost, ProducerState, StoredEntry
from gateway.lanes import EntryLane, ForeignRecord, Tails, lanes_of
from gateway.producer import NoPlace
from gateway.recent import Recent
from gateway.stamp import Head

log = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_MOST_S = 0.2, 5.0


class JournalBehind(Exception):
    """The broker holds more of our stream than the journal: the journal lost its newest records, as in a power cut.

    Numbers would be given twice; a new stream has to begin.
    """


class Publisher:
    """Keeps the arm's telemetry, events and outcomes flowing to the broker.

    ``heads`` are the newest records that the journal held when this run began; ``recent`` holds what has come since;
    ``before`` are journals that were set aside, oldest first; ``owner`` is who claims the arm (``StateDir.owner``).
    ``bookmark`` is called with (topic, partition, seq, row) as the broker acknowledges; ``changed`` with the state
    (``up``, ``down``, ``refused``, ``contested``) and what is wrong, when that changes; ``event`` with what else is
    worth telling. ``damage_told`` returns when the loss of a range of this journal is written down; ``lost`` writes
    down (stream, what, why) of records of a journal before that are nowhere, ``remember`` who we are to the broker.
    """

    def __init__(
        self,
        config: Config,
        reader: JournalReader,
        heads: Mapping[int, Head],
        recent: Recent,
        before: Sequence[Path],
        owner: str,
        *,
        bookmark: Callable[[str, int, int, int], None],
        changed: Callable[[str, str], None],
        event: Callable[..., None],
        lost: Callable[[int, Sequence[Lost], str], Awaitable[None]],
        damage_told: Callable[[Lost], Awaitable[None]],
        remember: Callable[[ProducerState], Awaitable[None]],
    ) -> None:
        assert config.kafka is not None  # noqa: S101  the composition root makes no publisher otherwise
        self._config = config
        self._options = kafka.client_options(config.kafka)  # raises ConfigError for a secret that is not there
        self._stream = reader.stream
        self._bookmark = bookmark
        self._changed = changed
        self._event = event
        self.claim = Claim(config, owner, reader.stream)
        self._told_timestamps = False
        ear = Ear(self.claim.check_now, self._refused_time)
        motors = {motor.partition: motor.name for motor in config.motors}
        lanes = lanes_of(config, reader, recent, motors)
        self._flow = Flow(lanes, reader.producer(), self._acknowledged, remember, ear, damage_told)
        self._earlier = Earlier(config, before, reader.stream, lost, ear)
        self._running = self._flow  # or one of the earlier
        self._held_at_start = {("telemetry", p): head.seq for p, head in heads.items()} | reader.newest_entries()
        self._bookmarks = reader.published()  # read once: later the disk may not answer
        self._went_behind_tails = False
        self.state = ""  # nothing is known yet: also the first failure is told

    # -- what the log tells --------------------------------------------------------------------------------------

    def committed(self, entries: Sequence[StoredEntry]) -> None:
        """``recent`` has more: telemetry, and these entries."""
        for entry in entries:
            if isinstance(lane := self._flow.lane(entry.topic, entry.partition), EntryLane):
                lane.appended()
        self._flow.wake()

    def acknowledged(self, partition: int, topic: str = "telemetry") -> int:
        """The newest sequence number of a motor that the broker has."""
        lane = self._flow.lane(topic, partition)
        return lane.seq if lane else 0

    @property
    def before(self) -> Mapping[Path, bool]:
        """The journals that were set aside, and whether all that can be read of them is with the broker."""
        return self._earlier.done_with

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
        while any(lane.busy or lane.pending() for lane in self._flow.lanes):
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
        self._told_timestamps = False
        async with self.claim.held(lambda other: self._tell("contested", other)) as keeping:
            keeping.add_done_callback(self._claim_ended)
            tails = await self._ask_tails()
            while flow := await self._earlier.begin(tails):
                await self._run(flow, cluster, keeping, drain=True)
                await self._earlier.done()
                tails = await self._ask_tails()
            if not self._flow.known_to(cluster):
                self._bookmarks.clear()  # of the cluster before
            try:
                self._go_behind(tails)
            except JournalBehind:
                await self.claim.give_up()  # the stream that begins next is another
                raise
            await self._run(self._flow, cluster, keeping, drain=False)

    async def _run(self, flow: Flow, cluster: str, keeping: "asyncio.Task[None]", *, drain: bool) -> None:
        self._running = flow
        if keeping.done():  # meanwhile, and nobody was told
            await keeping
        await flow.run(cluster, self._options, lambda: self._tell("up", ""), drain=drain)

    def _claim_ended(self, keeping: "asyncio.Task[None]") -> None:
        if not keeping.cancelled():
            self._running.fail(keeping.exception())

    # -- where to go on ------------------------------------------------------------------------------------------

    async def _ask_tails(self) -> Tails:
        """What every partition holds."""
        partitions = [TopicPartition(lane.topic, lane.partition) for lane in self._flow.lanes]
        async with kafka.running(AIOKafkaConsumer(**self._options, enable_auto_commit=False)) as consumer:
            return await kafka.last_records(consumer, partitions)

    def _go_behind(self, tails: Tails) -> None:
        """Set each lane of this run behind what its partition holds. Raises JournalBehind."""
        for lane in self._flow.lanes:
            end, record = tails[TopicPartition(lane.topic, lane.partition)]
            lane.busy = False
            lane.next_offset = end
            seq, row = self._bookmarks.get((lane.name, lane.partition), (0, 0))
            stream, tail_seq = lane.seq_of(record) if record is not None else (0, 0)
            if stream == self._stream:
                held = self._held_at_start.get((lane.name, lane.partition), 0)
                if not self._went_behind_tails and tail_seq > held:
                    raise JournalBehind(
                        f"topic {lane.topic}, partition {lane.partition} holds seq {tail_seq} of stream {stream}, the "
                        f"journal began this run at {held}"
                    )
                if tail_seq < seq:  # the broker forgot what it had acknowledged, or is another one
                    log.warning(
                        "%s-%d: ends at seq %d, was acknowledged up to %d: sent again",
                        lane.topic, lane.partition, tail_seq, seq,
                    )  # fmt: skip
                    row = 0
                lane.acknowledged(tail_seq, row)
            elif end == 0:  # a new topic: all that the journal holds
                lane.acknowledged(0, 0)
            else:  # everything has expired there, or another gateway published meanwhile
                lane.acknowledged(seq, row)
        self._went_behind_tails = True

    # -- what a flow tells ---------------------------------------------------------------------------------------

    def _acknowledged(self, topic: str, partition: int, seq: int, row: int) -> None:
        self._bookmarks[topic, partition] = (seq, row)
        self._bookmark(topic, partition, seq, row)

    def _refused_time(self, topic: str) -> None:
        if self._told_timestamps:
            return
        self._told_timestamps = True
        detail = (
            f"topic {topic} refuses the time of our records, which are sent without it (their values have it): allow "
            "older and newer ones with message.timestamp.before.max.ms and .after.max.ms, or set the clocks of the "
            "broker and this machine"
        )
        log.warning("kafka: %s", detail)
        self._event(EventType.KAFKA_TIMESTAMP_REFUSED, topic=topic, detail=detail)
