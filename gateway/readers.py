"""Reading the log from outside the gateway: the journal of this machine or the topics in Kafka, in one shape."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Literal, NamedTuple

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord

from gateway import kafka, telemetry
from gateway.config import Config
from gateway.journal import JournalReader
from gateway.state_dir import StateDir

Topic = Literal["telemetry", "events", "outcomes"]
TOPICS: tuple[Topic, ...] = ("telemetry", "events", "outcomes")
POLL_S = 0.02
ROWS = 256

Start = int | Literal["beginning", "latest"]
"""Where to begin: a sequence number (telemetry), the beginning, or what comes from now on."""


class Record(NamedTuple):
    """One record of a topic; ``value`` has the field names of the JSON format."""

    topic: Topic
    partition: int
    motor: str
    value: dict[str, Any]


async def read_journal(state: StateDir, topic: Topic, start: Start, *, follow: bool) -> AsyncGenerator[Record, None]:
    """Records of the journal in the order of their commits; with ``follow`` never ends. Raises JournalError."""
    reader = JournalReader(state.journal)
    try:
        at = 0
        if start == "latest":
            newest = reader.ends()
            at = newest[0] if topic == "telemetry" else newest[1]
        first_seq = start if isinstance(start, int) else 0
        while True:
            found = list(_telemetry(reader, at) if topic == "telemetry" else _entries(reader, topic, at))
            for row, record in found:
                at = row
                if record and record.value.get("seq", first_seq) >= first_seq:
                    yield record
            if not found:
                if not follow:
                    return
                await asyncio.sleep(POLL_S)
    finally:
        reader.close()


def _telemetry(reader: JournalReader, after: int) -> Iterator[tuple[int, Record | None]]:
    names = reader.motors()
    for batch in reader.batches(after, ROWS):
        for row in batch.records:
            partition = int(row["partition"])
            motor = names.get(partition, str(partition))
            yield batch.id, Record("telemetry", partition, motor, telemetry.as_mapping(row, motor))


def _entries(reader: JournalReader, topic: Topic, after: int) -> Iterator[tuple[int, Record | None]]:
    for entry in reader.entries(after, ROWS, topic):
        yield entry.id, Record(topic, entry.partition, entry.key, msgspec.json.decode(entry.value))


async def read_kafka(config: Config, topic: Topic, start: Start, *, follow: bool) -> AsyncGenerator[Record, None]:
    """Records of the arm's topic, in order within each partition; with ``follow`` never ends."""
    assert config.kafka is not None  # noqa: S101  the command line sees to it
    name = config.topic(topic)
    partitions = await kafka.partitions_of(config.kafka, name)
    reset = "latest" if start == "latest" else "earliest"
    consumer = AIOKafkaConsumer(**kafka.client_options(config.kafka), enable_auto_commit=False, auto_offset_reset=reset)
    async with kafka.running(consumer):
        ends = await consumer.end_offsets(partitions)
        await kafka.assign(consumer, dict.fromkeys(partitions, -1))
        first_seq = start if isinstance(start, int) else 0
        while follow or [tp for tp in partitions if await consumer.position(tp) < ends[tp]]:
            for tp, records in (await consumer.getmany(timeout_ms=500)).items():
                for record in records:
                    value = decode(topic, record)
                    if value.get("seq", first_seq) >= first_seq:
                        yield Record(topic, tp.partition, (record.key or b"").decode(), value)


def decode(topic: Topic, record: ConsumerRecord) -> dict[str, Any]:
    """The value of a record in Kafka, whichever format telemetry has."""
    if topic == "telemetry" and not record.value.startswith(b"{"):
        row = telemetry.decode([record.value], record.partition)[0]
        return telemetry.as_mapping(row, record.key.decode())
    values: dict[str, Any] = msgspec.json.decode(record.value)
    return values
