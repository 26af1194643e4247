"""What every Kafka client of the gateway shares: settings, the arm's topics, and the ends of their partitions."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, ProducerClosed, TopicAlreadyExistsError, for_code
from aiokafka.helpers import create_ssl_context

from gateway.config import Config, ConfigError, Fault, Kafka, Topic, topic_name

log = logging.getLogger(__name__)

STOP_S = 0.5  # a client's stop() can hang while its broker is down; the gateway has five seconds for all of its own
ANSWER_S = 10.0
RETRY_S = 0.1
SEQ_HEADER = "servo-seq"  # stream and seq of a record whose value has no place for them
REPLAYED_HEADER = "servo-replayed"  # the arm of whose log a record is a replay


class TopicMismatch(Exception):
    """A topic exists and does not fit the arm; somebody has to change one of them."""


def client_options(kafka: Kafka) -> dict[str, Any]:
    """Keyword arguments for any aiokafka client. Raises ConfigError where a secret cannot be had."""
    options: dict[str, Any] = {
        "bootstrap_servers": list(kafka.bootstrap_servers),
        "security_protocol": kafka.security_protocol,
    }
    if "SSL" in kafka.security_protocol:
        options["ssl_context"] = _ssl_context(kafka)
    if kafka.sasl_mechanism:
        options["sasl_mechanism"] = kafka.sasl_mechanism
        options["sasl_plain_username"] = kafka.sasl_username
        options["sasl_plain_password"] = kafka.sasl_password()
    return options


def _ssl_context(kafka: Kafka) -> ssl.SSLContext:
    files = {name: getattr(kafka, name) for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile")}
    password = kafka.ssl_keyfile_password()
    try:
        context: ssl.SSLContext = create_ssl_context(
            password=password, **{name.removeprefix("ssl_"): str(path) for name, path in files.items() if path}
        )
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        named = ", ".join(f"{name} {path}" for name, path in files.items() if path)
        raise ConfigError("kafka", [Fault("kafka", None, f"TLS cannot be set up with {named}: {error}")]) from error
    return context


def is_cancelled() -> bool:
    """Whether this task is to end: aiokafka lets cancellations of its own tasks out."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def stop(client: Any) -> None:
    """Stop an aiokafka client, however its broker is; nothing of it sends any more afterwards."""
    if await _ended(client.stop()):
        return
    # a producer waits for its last batches, for ever (aiokafka#1101), and its sender for answers
    sender = getattr(client, "_sender", None)
    if sender and sender.sender_task:
        client._message_accumulator.fail_all(ProducerClosed())
        sender.sender_task.cancel()
    await _ended((client.client if sender else client._client).close())
    if sender and sender.sender_task:
        await asyncio.wait([sender.sender_task], timeout=STOP_S)


async def _ended(closing: Coroutine[Any, Any, None]) -> bool:
    """Whether a client's closing came to an end in time. A cancellation of its own making is one, too."""
    task = asyncio.ensure_future(closing)
    try:
        await asyncio.wait([task], timeout=STOP_S)
    finally:
        task.cancel()
    if not task.done():
        return False
    if not task.cancelled() and (error := task.exception()):
        if not isinstance(error, KafkaError | OSError | TimeoutError):
            raise error
        log.debug("stopping a Kafka client: %s", error)
    return True


@contextlib.asynccontextmanager
async def running(client: Any) -> AsyncIterator[Any]:
    """The client, started; stopped afterwards in bounded time."""
    try:
        await client.start()
        yield client
    finally:
        await stop(client)


@contextlib.asynccontextmanager
async def admin(kafka: Kafka) -> AsyncIterator[AIOKafkaAdminClient]:
    """An admin client, started; closed afterwards in bounded time."""
    client = AIOKafkaAdminClient(**client_options(kafka))
    try:
        await client.start()
        yield client
    finally:
        with contextlib.suppress(TimeoutError, KafkaError, OSError):
            await _ended(client.close())


async def ensure_topics(config: Config) -> str:
    """Create the arm's topics where they are missing; the cluster's id.

    Raises TopicMismatch if a topic has too few partitions.
    """
    assert config.kafka is not None  # noqa: S101  callers have a broker
    topics: tuple[Topic, ...] = ("telemetry", "events", "outcomes", "commands")
    needed = 1 + max(motor.partition for motor in config.motors)
    return await ensure_partitions(config.kafka, config.arm.name, topics, needed)


async def ensure_partitions(settings: Kafka, arm: str, topics: Sequence[Topic], needed: int) -> str:
    """As ``ensure_topics``, for some topics of an arm that need so many partitions."""
    names = [topic_name(arm, topic) for topic in topics]
    async with admin(settings) as client:
        missing = set(names) - set(await client.list_topics())
        if missing:
            # an empty assignment makes aiokafka pass on -1, the broker's own default, which it refuses otherwise
            factor = settings.replication_factor
            new = [NewTopic(name, needed, factor, {} if factor == -1 else None) for name in sorted(missing)]
            for name, code, *message in (await client.create_topics(new)).topic_errors:
                if code and for_code(code) is not TopicAlreadyExistsError:
                    raise for_code(code)(f"creating topic {name}: {message[0] if message else ''}")
            log.info("created topics %s with %d partitions", ", ".join(sorted(missing)), needed)
        for topic in await client.describe_topics(names):
            if (found := len(topic["partitions"])) and found < needed:
                raise TopicMismatch(
                    f"topic {topic['topic']} has {found} partitions, but the motors of arm {arm!r} use "
                    f"0..{needed - 1}: add partitions (kafka-topics --alter --topic {topic['topic']} "
                    f"--partitions {needed}) or give the motors partitions below {found}"
                )
        return str((await client.describe_cluster())["cluster_id"])


async def assign(consumer: AIOKafkaConsumer, positions: Mapping[TopicPartition, int]) -> None:
    """Assign partitions and stand at the given offsets; -1: where ``auto_offset_reset`` puts it.

    A seek right after an assignment loses against the reset that the assignment has set going (aiokafka 0.14), so
    that one is awaited first.
    """
    consumer.assign(list(positions))
    for tp, offset in positions.items():
        await consumer.position(tp)
        if offset >= 0:
            consumer.seek(tp, offset)


async def partitions_of(kafka: Kafka, topic: str) -> list[TopicPartition]:
    """All partitions of a topic, in order. Raises TopicMismatch if there is no such topic, and does not create it."""
    async with admin(kafka) as client:
        if topic in await client.list_topics():
            described = await client.describe_topics([topic])
            return [TopicPartition(topic, number) for number in range(len(described[0]["partitions"]))]
    raise TopicMismatch(f"there is no topic {topic} (has the gateway been connected to this broker?)")


async def committed_metadata(client: AIOKafkaAdminClient, group: str, tp: TopicPartition) -> str:
    """What was committed with an offset of this group; empty: nothing. Raises TimeoutError."""
    async with asyncio.timeout(ANSWER_S):
        while True:
            try:
                found = await client.list_consumer_group_offsets(group, partitions=[tp])
                if tp in found:  # else the group's coordinator is on its way to another broker
                    return found[tp].metadata or ""
            except KafkaError as error:
                if not error.retriable:
                    raise
            await asyncio.sleep(RETRY_S)


async def last_records(
    consumer: AIOKafkaConsumer, partitions: Iterable[TopicPartition]
) -> dict[TopicPartition, tuple[int, ConsumerRecord | None]]:
    """{partition: (end offset, its last record)}; None where it holds no record (empty, or all expired).

    Raises TimeoutError if the broker does not bring them in time.
    """
    partitions = list(partitions)
    async with asyncio.timeout(ANSWER_S):
        first = await consumer.beginning_offsets(partitions)
        end = await consumer.end_offsets(partitions)
        last: dict[TopicPartition, tuple[int, ConsumerRecord | None]] = {tp: (end[tp], None) for tp in partitions}
        waiting = {tp for tp in partitions if end[tp] > first[tp]}
        if waiting:
            await assign(consumer, {tp: end[tp] - 1 for tp in waiting})
        while waiting:
            for tp, records in (await consumer.getmany(timeout_ms=1000)).items():
                last[tp] = (end[tp], records[-1])
                waiting.discard(tp)
    return last
