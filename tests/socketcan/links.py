"""Virtual CAN links, and can-utils as outsiders on them."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from drivers.family import CanFrame
from tests.gateway_parts import wait_for

MARKER = "7EE#00"  # a frame that nobody minds: no motor's, and no reply's
ERROR_FLAG = 0x20000000  # of an identifier (linux/can.h)
_numbers = count(1)


def ip(*arguments: str) -> None:
    """Run iproute2's ``ip``."""
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def virtual_link() -> Iterator[str]:
    """The name of a fresh link, which is up; it may be gone by the end."""
    name = f"vcan{next(_numbers)}"
    ip("link", "add", name, "type", "vcan")
    ip("link", "set", name, "up")
    try:
        yield name
    finally:
        with suppress(subprocess.CalledProcessError):
            ip("link", "delete", name)


def cansend(channel: str, frame: str) -> None:
    """Send one frame as can-utils writes it, such as ``5A1#11.22``; an error frame has ERROR_FLAG in its identifier."""
    subprocess.run(["cansend", channel, frame], check=True)


class Seen(NamedTuple):
    """A frame that passed, and when it did by the kernel's clock (epoch, whole microseconds)."""

    at_ns: int
    frame: CanFrame


@contextmanager
def candump(channel: str, log: Path) -> Iterator[None]:
    """Write down every frame on ``channel`` from now on, also over a link that goes down."""
    with (
        log.open("wb") as file,
        subprocess.Popen(["candump", "-L", "-D", channel], stdout=file, stdin=subprocess.DEVNULL) as process,
    ):
        try:
            wait_until_heard(channel, log)
            yield
        finally:
            process.terminate()


def wait_until_heard(channel: str, log: Path) -> None:
    """Send one marker after another, until one is in the log."""
    heard = log.read_text().count(MARKER)

    def ask() -> bool:
        cansend(channel, MARKER)
        return log.read_text().count(MARKER) > heard

    wait_for(ask)


def read_candump(log: Path) -> list[Seen]:
    """The data frames in a log: ``(1700000000.123456) vcan1 7FF#0100CC0000000000``."""
    seen = []
    for line in log.read_text().splitlines():
        stamp, _, frame = line.split()
        can_id, data = frame.split("#")
        if frame != MARKER:
            seconds, microseconds = stamp.strip("()").split(".")
            at_ns = int(seconds) * 1_000_000_000 + int(microseconds) * 1000
            seen.append(Seen(at_ns, CanFrame(int(can_id, 16), bytes.fromhex(data), len(can_id) == 8)))
    return seen
