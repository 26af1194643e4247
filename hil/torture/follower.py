"""A reader of an arm's telemetry as it comes, and an issuer of commands once a second; a thread of its own.

Both reach the cluster past the proxies: what disturbs the gateway does not disturb them.
"""

import asyncio
import contextlib
import json
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from drivers.clock import SECOND, monotonic_ns
from hil.contract import Unreadable, read_sample

LIVE_NS = 1 * SECOND
BACKLOG = 1.6  # times the rate of the bus: a motor that is faster catches up
COMMANDS_EVERY_S = 1.0
TTL_MS = 1000
REQUEST_MS = 3000  # a broker that is stopped is asked again soon after it goes on


class Tail(NamedTuple):
    """The newest record of a motor, and when it was read."""

    seen_ns: int
    seq: int
    sampled_at_ns: int


class Follower:
    """Follows from ``start`` to ``close``. ``wall`` is the clock of the gateway's machine, ns since 1970."""

    def __init__(
        self,
        bootstrap: str,
        arm: str,
        partitions: Mapping[str, int],
        rate_hz: float,
        wall: Callable[[], int],
        seed: str,
    ) -> None:
        self._bootstrap = bootstrap
        self._arm = arm
        self._partitions = dict(partitions)
        self._rate_hz = rate_hz
        self._wall = wall
        self._chance = random.Random(seed)
        self._tails: dict[str, deque[Tail]] = {motor: deque() for motor in partitions}
        self._stop = threading.Event()
        self._quiet = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="follower", daemon=True)
        self.issued: list[str] = []  # ids of commands that the broker has taken

    def start(self) -> None:
        """The topics must be there."""
        self._thread.start()

    def no_more_commands(self) -> None:
        """Issue no more."""
        self._quiet.set()

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def seq(self, motor: str) -> int:
        """The newest that was seen; 0: none."""
        return max((tail.seq for tail in tuple(self._tails[motor])), default=0)

    def not_live(self, since_ns: int, without: Collection[str] = ()) -> list[str]:
        """The motors, ``without`` some, that do not come to the topic as they are sampled, or drain a backlog.

        What was seen before monotonic ``since_ns`` says nothing.
        """
        since, wall = max(since_ns, monotonic_ns() - LIVE_NS), self._wall()
        watched = {motor: tails for motor, tails in self._tails.items() if motor not in without}
        return [motor for motor, tails in watched.items() if not self._is_live(tails, since, wall)]

    def _is_live(self, tails: deque[Tail], since: int, wall: int) -> bool:
        recent = [tail for tail in tuple(tails) if tail.seen_ns > since]
        if len(recent) < 2 or wall - recent[-1].sampled_at_ns > LIVE_NS:
            return False
        # event time may be ahead after a step back, so that its age says nothing: then the pace does
        span_s = max((recent[-1].seen_ns - recent[0].seen_ns) / SECOND, 0.1)
        return (recent[-1].seq - recent[0].seq) / span_s < BACKLOG * self._rate_hz

    # -- the thread ----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        commands = asyncio.create_task(self._again_and_again(self._issue))
        follow = asyncio.create_task(self._again_and_again(self._follow))
        await asyncio.to_thread(self._stop.wait)
        for task in (commands, follow):
            task.cancel()
        await asyncio.gather(commands, follow, return_exceptions=True)

    async def _again_and_again(self, part: Callable[[], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(KafkaError, OSError, TimeoutError):
                await part()
            await asyncio.sleep(0.2)

    async def _follow(self) -> None:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            enable_auto_commit=False,
            auto_offset_reset="latest",
            request_timeout_ms=REQUEST_MS,
        )
        names = {partition: motor for motor, partition in self._partitions.items()}
        try:
            await consumer.start()
            consumer.assign([TopicPartition(f"servo.{self._arm}.telemetry", number) for number in names])
            while True:
                found = await consumer.getmany(timeout_ms=100)
                now = monotonic_ns()
                for tp, records in found.items():
                    with contextlib.suppress(Unreadable):
                        newest = records[-1]
                        sample = read_sample(tp.partition, newest.offset, newest.key, newest.value)
                        tails = self._tails[names[tp.partition]]
                        tails.append(Tail(now, sample.seq, sample.sampled_at_ns))
                        while now - tails[0].seen_ns > 2 * LIVE_NS:
                            tails.popleft()
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(consumer.stop(), 2)

    async def _issue(self) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=self._bootstrap, acks="all", enable_idempotence=True)
        try:
            await producer.start()
            while not self._quiet.is_set():
                motor = self._chance.choice(list(self._partitions))
                name = f"{self._arm}-{self._chance.getrandbits(48):012x}"
                kind = self._chance.choice(("enable", "position"))
                command: dict[str, object] = {"id": name, "motor": motor, "kind": kind, "ttl_ms": TTL_MS}
                if kind == "position":
                    command["value"] = round(self._chance.uniform(-1, 1), 3)
                command["issued_at_ns"] = self._wall()
                topic, value = f"servo.{self._arm}.commands", json.dumps(command).encode()
                await producer.send_and_wait(topic, value, motor.encode(), self._partitions[motor])
                self.issued.append(name)
                await asyncio.sleep(COMMANDS_EVERY_S)
            await asyncio.Event().wait()
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(producer.stop(), 2)
