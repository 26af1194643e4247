"""A replay into Kafka: topics of an arm of its own, where nobody else writes.

Every record bears the header ``servo-replayed``, whose value is the recorded arm. As the topics are the replay's alone,
a record's place in the producer's sequence (``gateway.producer``) is its offset: what a killed replay still had on its
way and what the next one sends compete for the same place, and the broker gives each away once. For that both must be
one producer to the broker: its id is kept as the metadata of an offset committed by group ``servo-replay.<arm>``.

Kafka's timestamp of a record is when it was replayed, the event time stands in its value. A broker forgets a producer
whose newest timestamp is older than a day (``producer.id.expiration.ms``) when it starts or looks for such, and would
take a batch twice; and ``retention.ms`` would remove at once what was recorded long ago.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from typing import NamedTuple

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.structs import OffsetAndMetadata

from drivers.clock import MS, epoch_ns
from gateway import kafka, telemetry
from gateway.config import Kafka, topic_name
from gateway.log_reader import Key, LogError, Samples
from gateway.producer import ContinuedProducer, next_epoch
from gateway.recordings.replay import WRITTEN, OpenTarget, Run, Tail, Target, check_arm

QUEUED = 32  # runs of a partition that wait while a batch is on its way


class _Identity(msgspec.Struct):
    pid: int
    epoch: int


class _Item(NamedTuple):
    """One record on its way."""

    key: bytes
    value: bytes
    headers: Sequence[tuple[str, bytes]]


def into_kafka(settings: Kafka, arm: str) -> OpenTarget:
    """Replay into the topics of ``arm``."""

    @contextlib.asynccontextmanager
    async def opened(source: str, keys: Collection[Key]) -> AsyncIterator[Target]:
        check_arm(arm, source)
        written = [key for key in keys if key[0] in WRITTEN]
        await kafka.ensure_partitions(settings, arm, WRITTEN, 1 + max((at for _, at in written), default=0))
        options = kafka.client_options(settings)
        group = f"servo-replay.{arm}"
        async with (
            kafka.running(AIOKafkaConsumer(**options, group_id=group, enable_auto_commit=False)) as consumer,
            kafka.running(ContinuedProducer(await _known(settings, group, arm), **options)) as producer,
        ):
            await _remember(consumer, producer, arm)
            lanes = await _lanes(consumer, producer, arm, source, written)
            try:
                async with asyncio.TaskGroup() as tasks:
                    sending = [tasks.create_task(lane.send()) for lane in lanes.values()]
                    yield _KafkaTarget(lanes)
                    await asyncio.gather(*(lane.queue.join() for lane in lanes.values()))
                    for task in sending:
                        task.cancel()
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None

    return opened


class _KafkaTarget(Target):
    def __init__(self, lanes: dict[Key, "_Lane"]) -> None:
        self._lanes = lanes

    def tail(self, key: Key) -> Tail | None:
        if key not in self._lanes:  # a recording that others made tells its partitions when they come
            raise LogError(
                f"{key[0]}, partition {key[1]}: comes unannounced: replay into a journal, and that into Kafka"
            )
        return self._lanes[key].tail

    async def write(self, runs: Sequence[Run]) -> None:
        for run in runs:
            await self._lanes[run.part.topic, run.part.partition].queue.put(run)


class _Lane:
    """One partition, with one batch on its way."""

    def __init__(
        self, producer: ContinuedProducer, tp: TopicPartition, source: str, end: int, tail: Tail | None
    ) -> None:
        self.tail = tail
        self.queue: asyncio.Queue[Run] = asyncio.Queue(QUEUED)
        self._producer = producer
        self._tp = tp
        self._mark = (kafka.REPLAYED_HEADER, source.encode())
        self._end = end

    async def send(self) -> None:
        """Send what is queued, until cancelled. Raises KafkaError."""
        while True:
            runs = [await self.queue.get()]
            while not self.queue.empty():
                runs.append(self.queue.get_nowait())
            items = [item for run in runs for item in self._items(run)]
            at = 0
            while at < len(items):
                at += await self._send(items[at : at + next_epoch(self._end) - self._end])
            for _ in runs:
                self.queue.task_done()

    async def _send(self, items: Sequence[_Item]) -> int:
        """Send as many as a batch holds; how many."""
        batch = self._producer.place_batch(self._end)
        now_ms = epoch_ns() // MS
        for item in items:
            if batch.append(timestamp=now_ms, key=item.key, value=item.value, headers=list(item.headers)) is None:
                break
        count: int = batch.record_count()
        await (await self._producer.send_batch(batch, self._tp.topic, partition=self._tp.partition))
        self._end += count
        return count

    def _items(self, run: Run) -> list[_Item]:
        part, mark = run.part, [self._mark]
        if isinstance(part, Samples):
            key = part.motor.encode()
            return [_Item(key, value, mark) for value in telemetry.messages(part.records)]
        return [
            _Item(entry.key.encode(), entry.value, [(kafka.SEQ_HEADER, f"{run.stream}/{entry.seq}".encode()), *mark])
            for entry in part.entries
        ]


async def _lanes(
    consumer: AIOKafkaConsumer, producer: ContinuedProducer, arm: str, source: str, keys: Collection[Key]
) -> dict[Key, _Lane]:
    """Every partition behind what it holds. Raises LogError if anything there is no replay of ``source``."""
    keys_of = {TopicPartition(topic_name(arm, topic), partition): (topic, partition) for topic, partition in keys}
    lanes = {}
    for tp, (end, record) in (await kafka.last_records(consumer, keys_of)).items():
        lanes[keys_of[tp]] = _Lane(producer, tp, source, end, _tail(keys_of[tp], record, source) if record else None)
    return lanes


def _tail(key: Key, record: ConsumerRecord, source: str) -> Tail:
    headers = dict(record.headers)
    replayed = headers.get(kafka.REPLAYED_HEADER)
    if replayed != source.encode():
        what = f"a replay of arm {replayed.decode(errors='replace')!r}" if replayed else "no replay"
        raise LogError(
            f"topic {record.topic}, partition {record.partition}, offset {record.offset}: is {what}; a replay of "
            f"{source!r} needs an arm name whose topics hold nothing else"
        )
    if key[0] != "telemetry":
        stream, _, seq = headers[kafka.SEQ_HEADER].decode().partition("/")
        return Tail(int(stream), int(seq))
    sample = telemetry.decode([record.value], record.partition)[0]
    return Tail(int(sample["stream"]), int(sample["seq"]))


# --- who we are to the broker ---------------------------------------------------------------------------------------


async def _known(settings: Kafka, group: str, arm: str) -> tuple[int, int] | None:
    """(producer id, epoch) of the replay before this one; None: there was none."""
    tp = TopicPartition(topic_name(arm, "telemetry"), 0)
    async with kafka.admin(settings) as admin:
        found = await kafka.committed_metadata(admin, group, tp)
    try:
        identity = msgspec.json.decode(found, type=_Identity)
    except msgspec.DecodeError:
        return None
    return identity.pid, identity.epoch


async def _remember(consumer: AIOKafkaConsumer, producer: ContinuedProducer, arm: str) -> None:
    """Keep who we are before that is used."""
    tp = TopicPartition(topic_name(arm, "telemetry"), 0)
    text = msgspec.json.encode(_Identity(*producer.identity)).decode()
    consumer.assign([tp])
    consumer.pause(tp)
    await consumer.commit({tp: OffsetAndMetadata(0, text)})
