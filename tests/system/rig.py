"""What system tests do around a gateway: read and write its topics, look for events, watch a terminal."""

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from drivers.clock import MS, SECOND, after, epoch_ns, left_s, monotonic_ns, sleep_until
from hil.arm import Arm, ArmError
from hil.judge import NoTopic, Sample, Verdict, judge, read

WITHIN_S = 60
ASK_S = 0.2  # each look into a topic takes clients of its own, and the processor from the gateway


@dataclass(slots=True)
class Seen:
    """An arm's telemetry, judged."""

    verdict: Verdict
    of: dict[str, list[Sample]] = field(default_factory=dict)  # motor -> samples


def see(arm: Arm) -> Seen:
    """Judge the arm's telemetry and keep the samples."""
    assert arm.bootstrap
    found: dict[str, list[Sample]] = {}
    verdict = asyncio.run(
        judge(arm.bootstrap, arm.name, lambda sample: found.setdefault(sample.motor, []).append(sample))
    )
    return Seen(verdict, found)


def records(arm: Arm, topic: str) -> list[dict[str, Any]]:
    """Values of a JSON topic of the arm in Kafka (events, outcomes); none if there is no such topic yet."""
    assert arm.bootstrap

    async def values() -> list[dict[str, Any]]:
        with suppress(NoTopic):
            return [json.loads(r.value) async for r in read(str(arm.bootstrap), f"servo.{arm.name}.{topic}")]
        return []

    return asyncio.run(values())


def events(arm: Arm, kind: str, motor: str = "*") -> list[dict[str, Any]]:
    """Events of one type and motor in Kafka."""
    return [event for event in records(arm, "events") if (event["type"], event["motor"]) == (kind, motor)]


def put_on_links(arm: Arm, links: Path) -> None:
    """Let the arm run on what ``servo-gateway simulate`` hosts at these links, as on real adapters."""
    text = arm.config.read_text()
    head, tail = text.split("[simulation]", 1)
    text = head + tail[tail.index("[[bus]]") :]
    text = text.replace('interface = "virtual"\nchannel = "can0"', f'interface = "slcan"\nchannel = "{links / "can0"}"')
    text = text.replace('type = "serial"', f'type = "serial"\nport = "{links / "serial0"}"')
    arm.config.write_text(text)


def wait_event(arm: Arm, kind: str, motor: str = "*", count: int = 1) -> dict[str, Any]:
    """The ``count``-th event of this type and motor, once it is in Kafka."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = events(arm, kind, motor)
        return len(found) >= count

    arm.wait(there, f"{count} events {kind} of {motor}", every_s=ASK_S)
    return found[count - 1]


def outcomes(arm: Arm, command_id: str) -> list[dict[str, Any]]:
    """Outcomes of one command in Kafka."""
    return [outcome for outcome in records(arm, "outcomes") if outcome["command_id"] == command_id]


def wait_outcome(arm: Arm, command_id: str) -> dict[str, Any]:
    """The final outcome of a command, once it is in Kafka."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = [outcome for outcome in outcomes(arm, command_id) if outcome["state"] != "accepted"]
        return bool(found)

    arm.wait(there, f"the outcome of {command_id}", every_s=ASK_S)
    return found[0]


def command_record(command_id: str, motor: str, value: float, *, ttl_ms: float, age_ms: float) -> bytes:
    """A position command as any program writes it, issued ``age_ms`` ago."""
    issued_at_ns = epoch_ns() - int(age_ms * MS)
    fields = {"id": command_id, "motor": motor, "kind": "position", "value": value}
    return json.dumps({**fields, "ttl_ms": ttl_ms, "issued_at_ns": issued_at_ns}).encode()


def produce(arm: Arm, topic: str, partition: int, values: Iterable[bytes], key: bytes = b"*") -> None:
    """Write records into a topic of the arm."""
    assert arm.bootstrap
    asyncio.run(send(arm.bootstrap, f"servo.{arm.name}.{topic}", [(partition, key, value) for value in values]))


async def send(bootstrap: str, topic: str, batch: Sequence[tuple[int, bytes | None, bytes]]) -> None:
    """Write (partition, key, value), one after the other."""
    async with asyncio.timeout(WITHIN_S), _producer(bootstrap) as producer:
        for partition, key, value in batch:
            await producer.send_and_wait(topic, value, key, partition)


@asynccontextmanager
async def _producer(bootstrap: str) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def create_topic(bootstrap: str, topic: str, partitions: int) -> None:
    """Create a topic with so many partitions."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, partitions, 1)])
    finally:
        await admin.close()


def pass_time(seconds: float) -> tuple[int, int]:
    """Let time go by; from when to when, in epoch nanoseconds."""
    began = epoch_ns()
    sleep_until(after(monotonic_ns(), int(seconds * SECOND)))
    return began, epoch_ns()


class Terminal:
    """A program that has a terminal of its own, and what it wrote there."""

    # the program becomes the terminal's owner, so that Ctrl-C reaches it as a signal
    _TAKE = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, command: Sequence[str], environment: dict[str, str], cwd: Path) -> None:
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self._TAKE, *command],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                cwd=cwd,
                env={**environment, "TERM": "xterm-256color"},
            )
        finally:
            os.close(theirs)
        self.text = ""

    def read(self, timeout_s: float = 0.1) -> None:
        """Take what it wrote meanwhile."""
        while select.select([self._fd], [], [], timeout_s)[0]:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # its end is closed
                return
            self.text += data.decode(errors="replace")
            timeout_s = 0

    @property
    def lines(self) -> list[str]:
        """Everything that it wrote, without control sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text).replace("\r", "\n").splitlines()

    def wait(self, holds: Callable[[list[str]], bool], what: str) -> None:
        """Return when ``holds`` of the lines."""
        deadline = after(monotonic_ns(), WITHIN_S * SECOND)
        while not holds(self.lines):
            if self.process.poll() is not None or not left_s(deadline):
                raise ArmError(f"{what} was not seen:\n" + "\n".join(self.lines[-40:]))
            self.read()

    def press_ctrl_c(self) -> int:
        """Press Ctrl-C; the exit status of the program."""
        os.write(self._fd, b"\x03")
        deadline = after(monotonic_ns(), WITHIN_S * SECOND)
        while self.process.poll() is None and left_s(deadline):
            self.read()  # a program that may not write does not end
        return self.process.wait(0)

    def close(self) -> None:
        """Kill the program if it still runs."""
        self.process.kill()
        self.process.wait()
        os.close(self._fd)
