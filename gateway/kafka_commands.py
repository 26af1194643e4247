"""Commands from the arm's commands topic in Kafka.

The gateway keeps how far it has read in its own journal, in the same commit as what it did about a record, so no
command is read twice or passed over across restarts. A journal that knows nothing yet begins at the topic's
beginning: what is old expires, with an outcome. Only the gateway that holds the arm's claim (``gateway.claim``) takes
commands; another leaves them where they are.

A journal may have lost what it knew: its disk failed, or took nothing before the gateway was killed. So a backlog is
not taken before the outcomes topic has been asked which commands have come to an end.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from aiokafka.errors import KafkaError

from gateway import kafka
from gateway.commander import Incoming
from gateway.commands import Outcome, decode_outcome
from gateway.config import Config, Kafka

log = logging.getLogger(__name__)

SOURCE = "kafka"
RETRY_S = 1.0
CLAIM_S = 0.1
MOST_RECORDS = 200
OUTCOMES_MOST = 2000  # of each partition, the newest


async def follow(
    config: Config,
    starts: Mapping[int, int],
    handle: Callable[[Sequence[Incoming]], Awaitable[None]],
    ours: Callable[[], bool],
    ended: Callable[[Collection[Outcome]], None],
) -> None:
    """Hand every command behind ``starts`` ({partition: offset}) on to ``handle`` while ``ours()``, until cancelled.

    If there is a backlog, ``ended`` is called first with the final outcomes that the broker has.
    """
    assert config.kafka is not None  # noqa: S101  the composition root follows no topic otherwise
    positions = dict(starts)
    ends: dict[int, int] = {}
    told = False
    while True:
        while not ours():  # noqa: ASYNC110  the claim lapses by the clock
            await asyncio.sleep(CLAIM_S)
        try:
            partitions = await kafka.partitions_of(config.kafka, config.topic("commands"))
            async with kafka.running(_consumer(config.kafka)) as consumer:
                await kafka.assign(consumer, {tp: positions.get(tp.partition, -1) for tp in partitions})
                unknown = [tp for tp in partitions if tp.partition not in ends]
                found_ends = await consumer.end_offsets(unknown)
                if any([await consumer.position(tp) < end for tp, end in found_ends.items()]):
                    ended(await _ended(config))
                ends |= {tp.partition: end for tp, end in found_ends.items()}
                told = False
                while True:
                    found = await consumer.getmany(timeout_ms=1000, max_records=MOST_RECORDS)
                    if not ours():
                        ends.clear()  # another gateway takes what comes meanwhile
                        break
                    records = [record for records in found.values() for record in records]
                    if records:
                        await handle([_incoming(record, ends) for record in records])
                        positions.update({record.partition: record.offset + 1 for record in records})
        except kafka.TopicMismatch:
            log.debug("the commands topic is not there yet; the publisher makes it")
        except asyncio.CancelledError:
            if kafka.is_cancelled():
                raise
        except Exception as error:
            if not told:
                told = True
                expected = isinstance(error, KafkaError | OSError | TimeoutError)
                log.warning("commands from Kafka: %s: %s", type(error).__name__, error, exc_info=not expected)
        await asyncio.sleep(RETRY_S)


def _consumer(settings: Kafka) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(**kafka.client_options(settings), enable_auto_commit=False, auto_offset_reset="earliest")


async def _ended(config: Config) -> list[Outcome]:
    """The final outcomes that the broker has, the newest of each partition."""
    assert config.kafka is not None  # noqa: S101  ``follow`` has seen to it
    partitions = await kafka.partitions_of(config.kafka, config.topic("outcomes"))
    found = []
    async with kafka.running(_consumer(config.kafka)) as consumer, asyncio.timeout(kafka.ANSWER_S):
        first, end = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
        left = {tp for tp in partitions if first[tp] < end[tp]}
        await kafka.assign(consumer, {tp: max(first[tp], end[tp] - OUTCOMES_MOST) for tp in left})
        while left := {tp for tp in left if await consumer.position(tp) < end[tp]}:
            for records in (await consumer.getmany(*left, timeout_ms=1000, max_records=MOST_RECORDS)).values():
                for record in records:
                    with contextlib.suppress(msgspec.DecodeError):
                        if (outcome := decode_outcome(record.value or b"")).final:
                            found.append(outcome)
    return found


def _incoming(record: ConsumerRecord, ends: Mapping[int, int]) -> Incoming:
    """``ends``: {partition: its end when this gateway began to take commands}."""
    live = record.offset >= ends.get(record.partition, 0)
    return Incoming(record.value or b"", SOURCE, record.partition, record.offset + 1, live)
