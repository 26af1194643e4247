"""One gateway for an arm, whatever machine it runs on: a claim in Kafka, renewed while it publishes.

    committed offset of group servo.<arm>.gateway, partition 0 of the commands topic:
        offset    counter, one more at each renewal
        metadata  {"owner": whose, "stream": ..., "counter": ..., "host": where}

Of two gateways with the arm's name the second sees the first one's counter go on, and stays away. A claim that stands
still for LAPSE_S may be taken over; its holder stops by itself before that (``ours``), and yields when it finds
another's claim in place of its own. Time is each gateway's own monotonic clock. It is a lease, not a fence: what a
gateway had already sent when it lost the claim still arrives.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupAuthorizationFailedError, KafkaError
from aiokafka.structs import OffsetAndMetadata

from drivers.clock import SECOND, after, left_s, monotonic_ns
from gateway import kafka
from gateway.config import Config

log = logging.getLogger(__name__)

RENEW_S = 2.0
LAPSE_S = 10.0  # without a renewal a claim may be taken over
TRUST_S = 7.0  # without a renewal its holder stops; the rest is for closing what is under way
SETTLE_S = 0.3  # of two that find no claim at the same moment the one that wrote last has it


class ClaimLost(Exception):
    """Another gateway publishes for this arm; the message names it."""


class ClaimLapsed(Exception):
    """The claim could not be renewed in time; somebody else may have it by now."""


class _Holder(msgspec.Struct, frozen=True):
    owner: str
    stream: int
    counter: int
    host: str


class Clients(NamedTuple):
    """What a claim is read and written with."""

    admin: AIOKafkaAdminClient
    consumer: AIOKafkaConsumer


class Claim:
    """This gateway's claim to publish for the arm and to take its commands."""

    def __init__(self, config: Config, owner: str, stream: int) -> None:
        """``owner`` outlives streams: a journal that was set aside leaves its claim to the next one."""
        assert config.kafka is not None  # noqa: S101  callers have a broker
        self._arm = config.arm.name
        self._settings = config.kafka
        self._group = f"servo.{config.arm.name}.gateway"
        self._tp = TopicPartition(config.topic("commands"), 0)
        self._mine = _Holder(owner, stream, 0, socket.gethostname())
        self._trusted_until = 0
        self._granted = True  # by the broker's access rules
        self._hurry = asyncio.Event()

    def ours(self) -> bool:
        """Whether the claim is held and was renewed lately."""
        return not self._granted or monotonic_ns() < self._trusted_until

    def check_now(self) -> None:
        """There is reason to doubt: look at once whether the claim is still there."""
        self._hurry.set()

    @contextlib.asynccontextmanager
    async def held(self, contested: Callable[[str], None]) -> AsyncIterator["asyncio.Task[None]"]:
        """Wait until the claim is ours; hold it meanwhile, and give it up if the body is cancelled.

        ``contested`` is told, once, that another gateway publishes for this arm. The task that is given ends only
        with ClaimLost or ClaimLapsed. Raises KafkaError or TimeoutError if the broker does not answer.
        """
        consumer = AIOKafkaConsumer(
            **kafka.client_options(self._settings), group_id=self._group, enable_auto_commit=False
        )
        async with kafka.running(consumer), kafka.admin(self._settings) as admin:
            consumer.assign([self._tp])
            consumer.pause(self._tp)  # it is here for the commits alone
            self._clients = Clients(admin, consumer)
            await self._take(contested)
            keeping = asyncio.create_task(self._keep())
            try:
                yield keeping
            except asyncio.CancelledError:
                keeping.cancel()
                await self.give_up()
                raise
            finally:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)

    async def _take(self, contested: Callable[[str], None]) -> None:
        try:
            seen: _Holder | None = None
            seen_ns, told = monotonic_ns(), False
            while True:
                found = await self._read()
                if found and found.owner == self._mine.owner:
                    return await self._write()
                if found is None or (found == seen and monotonic_ns() - seen_ns > LAPSE_S * SECOND):
                    await self._write()
                    self._trusted_until = 0
                    await asyncio.sleep(SETTLE_S)
                    if await self._read() == self._mine:
                        return await self._write()
                elif found != seen:
                    if seen and not told:
                        told = True
                        contested(self._words(found))
                    seen, seen_ns = found, monotonic_ns()
                await asyncio.sleep(RENEW_S / 2)
        except GroupAuthorizationFailedError:
            self._granted = False
            log.warning("kafka: no right to group %s: a second gateway for this arm would not be noticed", self._group)

    async def _keep(self) -> None:
        if not self._granted:
            await asyncio.Event().wait()  # for ever
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), RENEW_S)
            self._hurry.clear()
            try:
                async with asyncio.timeout(left_s(self._trusted_until)):
                    found = await self._read()
                    if found and found != self._mine:
                        self._trusted_until = 0
                        raise ClaimLost(self._words(found))
                    await self._write()
            except TimeoutError:
                raise ClaimLapsed(f"no answer from the broker for {TRUST_S:g} s") from None

    async def give_up(self) -> None:
        """While it is held: let whoever comes next begin at once."""
        if self._granted and self.ours():
            self._trusted_until = 0
            with contextlib.suppress(KafkaError, OSError, TimeoutError):
                await asyncio.wait_for(
                    self._clients.consumer.commit({self._tp: OffsetAndMetadata(0, "")}), kafka.STOP_S
                )

    async def _read(self) -> _Holder | None:
        """Who has the claim; None: nobody. Raises TimeoutError."""
        return _holder(await kafka.committed_metadata(self._clients.admin, self._group, self._tp))

    async def _write(self) -> None:
        began = monotonic_ns()
        self._mine = msgspec.structs.replace(self._mine, counter=self._mine.counter + 1)
        text = msgspec.json.encode(self._mine).decode()
        async with asyncio.timeout(kafka.ANSWER_S):
            await self._clients.consumer.commit({self._tp: OffsetAndMetadata(self._mine.counter, text)})
        self._trusted_until = after(began, int(TRUST_S * SECOND))

    def _words(self, other: _Holder) -> str:
        return (
            f"another gateway publishes for arm {self._arm!r}: stream {other.stream} on host {other.host!r}; "
            f"this one is stream {self._mine.stream} on {self._mine.host!r}"
        )


def _holder(metadata: str) -> _Holder | None:
    try:
        return msgspec.json.decode(metadata, type=_Holder)
    except msgspec.DecodeError:  # nobody, or given up
        return None
