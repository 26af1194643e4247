"""Commands from the arm's commands topic in Kafka.

The gateway keeps how far it has read in its own journal, in the same commit as what it did about a record, so no
command is read twice or passed over across restarts. A journal that knows nothing yet begins at the topic's
beginning: what is old expires, with an outcome.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from gateway import kafka
from gateway.commander import Incoming
from gateway.config import Config

log = logging.getLogger(__name__)

SOURCE = "kafka"
RETRY_S = 1.0
MOST_RECORDS = 200


async def follow(
    config: Config, starts: Mapping[int, int], handle: Callable[[Sequence[Incoming]], Awaitable[None]]
) -> None:
    """Hand every command behind ``starts`` ({partition: offset}) on to ``handle``, until cancelled."""
    assert config.kafka is not None  # noqa: S101  the composition root follows no topic otherwise
    positions = dict(starts)
    told = False
    while True:
        try:
            async with kafka.running(_consumer(config)) as consumer:
                await _assign(consumer, config.topic("commands"), positions)
                told = False
                while True:
                    found = await consumer.getmany(timeout_ms=1000, max_records=MOST_RECORDS)
                    records = [record for records in found.values() for record in records]
                    if records:
                        await handle([_incoming(record) for record in records])
                        positions.update({record.partition: record.offset + 1 for record in records})
        except (KafkaError, OSError, TimeoutError) as error:
            if not told:
                log.warning("commands from Kafka: %s: %s; trying again", type(error).__name__, error)
                told = True
        await asyncio.sleep(RETRY_S)


def _consumer(config: Config) -> AIOKafkaConsumer:
    assert config.kafka is not None  # noqa: S101  see follow
    return AIOKafkaConsumer(
        **kafka.client_options(config.kafka), enable_auto_commit=False, auto_offset_reset="earliest"
    )


async def _assign(consumer: AIOKafkaConsumer, topic: str, positions: Mapping[int, int]) -> None:
    async with asyncio.timeout(kafka.ANSWER_S):
        numbers = None
        while not numbers:  # the topic may be on its way to being created
            await consumer.topics()
            numbers = consumer.partitions_for_topic(topic)
            await asyncio.sleep(0 if numbers else 0.2)
        starts = {TopicPartition(topic, number): positions.get(number, -1) for number in sorted(numbers)}
        await kafka.assign(consumer, starts)


def _incoming(record: ConsumerRecord) -> Incoming:
    return Incoming(record.value or b"", SOURCE, record.partition, record.offset + 1)
