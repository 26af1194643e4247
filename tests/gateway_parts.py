"""What tests of the gateway's parts share: an arm of two motors, samples and records of it, and waiting with an end."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from drivers.clock import SECOND, after, monotonic_ns
from drivers.motor import SAMPLE
from gateway import telemetry
from gateway.config import Config, loads
from gateway.journal import Batch, StoredEntry

ARM = """\
[arm]
name = "arm1"
state_dir = "state"

[[bus]]
name = "serial0"
type = "serial"
port = "/dev/ttyUSB0"
rate_hz = 100

[[motor]]
name = "joint1"
partition = 0
bus = "serial0"
protocol = "feetech_sts"
id = 1
position_rad = [-1.0, 1.5]
velocity_rad_s = 5.0
temperature_c = 60.0

[[motor]]
name = "joint2"
partition = 1
bus = "serial0"
protocol = "feetech_sts"
id = 2
position_rad = [-1.0, 1.0]
velocity_rad_s = 4.0
temperature_c = 60.0
"""
KAFKA = '[kafka]\nbootstrap_servers = ["broker:9092"]\n'
MOTORS = {0: "joint1", 1: "joint2"}
DEADLINE_S = 60


def make_config(directory: Path, extra: str = "") -> Config:
    """The arm above, with its state below ``directory``."""
    return loads(ARM + extra, directory / "arm.toml")


def make_samples(motors: Sequence[int], at_ns: int = 1, **values: float) -> NDArray[np.void]:
    """One sample of each of ``motors``, in this order, one nanosecond apart."""
    samples = np.zeros(len(motors), SAMPLE)
    samples["motor"] = motors
    samples["sampled_at_ns"] = at_ns + np.arange(len(motors))
    for name, value in values.items():
        samples[name] = value
    return samples


class Numbering:
    """Records, rows and entries numbered as a stream's, without clocks."""

    def __init__(self, stream: int = 7, partitions: Sequence[int] = (0, 1)) -> None:
        self._stream = stream
        self._seq = dict.fromkeys(partitions, 0)
        self._row = self._entry = 0
        self._entry_seq: Counter[tuple[str, int]] = Counter()

    def records(self, partitions: Sequence[int]) -> telemetry.Records:
        """One record for each of ``partitions``, in this order; its time is its number."""
        records = telemetry.blank(len(partitions))
        records["partition"] = partitions
        records["stream"] = self._stream
        for number, partition in enumerate(partitions):
            self._seq[partition] += 1
            records[number]["seq"] = records[number]["sampled_at_ns"] = self._seq[partition]
        return records

    def batch(self, partitions: Sequence[int]) -> Batch:
        """The next row of telemetry, of such records."""
        self._row += 1
        return Batch(self._row, self.records(partitions))

    def entry(self, topic: str = "events", partition: int = 0, value: bytes = b"{}", key: str = "*") -> StoredEntry:
        """The next event or outcome; its time is its number."""
        self._entry += 1
        self._entry_seq[topic, partition] += 1
        return StoredEntry(self._entry, topic, partition, self._entry_seq[topic, partition], self._entry, key, value)


def wait_for(seen: Callable[[], bool]) -> None:
    """Return when ``seen()``; fail if that does not come."""
    deadline = after(monotonic_ns(), DEADLINE_S * SECOND)
    while not seen():
        assert monotonic_ns() < deadline
        time.sleep(0.002)


async def until(seen: Callable[[], bool]) -> None:
    """As ``wait_for``, while the event loop goes on."""
    async with asyncio.timeout(DEADLINE_S):
        while not seen():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.002)
