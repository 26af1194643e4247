"""CAN through python-can where an adapter misbehaves: an slcan device at the other end of a pseudo-terminal."""

import os
import select
import tty
from collections.abc import Iterator

import can
import pytest

from drivers.buses import CanSpec
from drivers.buses import can as module
from drivers.buses.can import CanBus
from drivers.clock import MS, SECOND, MonotonicNs, after, monotonic_ns
from drivers.errors import BusError, BusMisconfigured
from drivers.family import CanFrame

SPEC = {"sleep_after_open": 0}


class Adapter:
    """The adapter's end of the line."""

    def __init__(self) -> None:
        self.fd, self.held = os.openpty()
        tty.setraw(self.held)
        self.port = os.ttyname(self.held)

    def write(self, data: bytes) -> None:
        """Have ``data`` arrive at the bus as one piece."""
        assert os.write(self.fd, data) == len(data)
        assert select.select([self.held], [], [], 60)[0]

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.held)


@pytest.fixture
def adapter() -> Iterator[Adapter]:
    opened = Adapter()
    yield opened
    opened.close()


@pytest.fixture
def bus(adapter: Adapter) -> Iterator[CanBus]:
    opened = CanBus(CanSpec("can0", "slcan", adapter.port, 1_000_000, SPEC))
    yield opened
    opened.close()


def test_frame_behind_acknowledgements_is_there_although_the_deadline_has_passed(adapter: Adapter, bus: CanBus) -> None:
    adapter.write(b"z\rz\r\rt0112AABB\rz\rT000000111CC\r")
    frames = [bus.receive(MonotonicNs(0)) for _ in range(3)]
    assert [received and received.unit for received in frames] == [
        CanFrame(0x011, b"\xaa\xbb"), CanFrame(0x11, b"\xcc", extended=True), None,
    ]  # fmt: skip


GARBLED = [
    b"t\r",
    b"tXYZ2AABB\r",
    b"t011\r",
    b"t0119\r",
    b"t0112AAG0\r",
    b"T\r",
    b"Tzzzzzzzz0\r",
    b"\xff\xfe\r",
    b"d0\r",
]


@pytest.mark.parametrize("garbled", GARBLED)
def test_garbled_line_is_passed_over(adapter: Adapter, bus: CanBus, garbled: bytes) -> None:
    adapter.write(garbled + b"t0111AA\r")
    for _ in range(2):
        received = bus.receive(after(monotonic_ns(), 60 * SECOND))
        assert received is not None
        if received.unit.can_id == 0x011 and received.unit.data == b"\xaa":
            return
    raise AssertionError(received)


def test_remote_frames_are_not_passed_on(adapter: Adapter, bus: CanBus) -> None:
    adapter.write(b"r0112\rR000000112\rt0111AA\r")
    received = bus.receive(after(monotonic_ns(), 60 * SECOND))
    assert received is not None
    assert received.unit == CanFrame(0x011, b"\xaa")


def test_half_a_line_waits_for_its_other_half(adapter: Adapter, bus: CanBus) -> None:
    adapter.write(b"t0112A")
    assert bus.receive(after(monotonic_ns(), 5 * MS)) is None
    adapter.write(b"ABB\r")
    received = bus.receive(after(monotonic_ns(), 60 * SECOND))
    assert received is not None
    assert received.unit == CanFrame(0x011, b"\xaa\xbb")


def test_deadline_is_not_stretched_by_a_wall_clock_that_steps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """python-can's own ``recv`` would wait an hour here."""
    bus = CanBus(CanSpec("can0", "virtual", "stepping", 1_000_000))
    wall = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(can.bus, "time", lambda: float(next(wall)))
    assert bus.receive(after(monotonic_ns(), 5 * MS)) is None
    bus.close()


def test_bit_rate_that_the_adapter_does_not_know_can_never_work(adapter: Adapter) -> None:
    with pytest.raises(BusMisconfigured, match=r"can0.*choose one of"):
        CanBus(CanSpec("can0", "slcan", adapter.port, 123_456, SPEC))


def test_option_that_makes_no_sense_can_never_work(adapter: Adapter) -> None:
    with pytest.raises(BusMisconfigured, match="can0"):
        CanBus(CanSpec("can0", "slcan", adapter.port, 1_000_000, {**SPEC, "tty_baudrate": "fast"}))


def test_adapter_that_takes_nothing_is_a_bus_error_in_the_end(bus: CanBus) -> None:
    frames = [CanFrame(1, bytes(8))] * 2_000  # far beyond what the terminal holds
    with pytest.raises(BusError, match=r"can0.*sending"):
        bus.send(frames, after(monotonic_ns(), 20 * MS))


class Kernel(can.BusABC):
    """A bus whose frames bear a time of the kernel's, as SocketCAN's do."""

    stamps: list[float]

    def __init__(self) -> None:
        super().__init__("vcan0")

    def _recv_internal(self, timeout: float | None) -> tuple[can.Message | None, bool]:
        return can.Message(timestamp=self.stamps.pop(), arbitration_id=1), False

    def send(self, msg: can.Message, timeout: float | None = None) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("age_ms", "kept"), [(0.0, True), (5.0, True), (999.0, True), (1001.0, False), (-1.0, False)])
def test_kernels_time_counts_unless_the_wall_clock_stepped_in_between(
    monkeypatch: pytest.MonkeyPatch, age_ms: float, kept: bool
) -> None:
    monkeypatch.setattr(can, "Bus", lambda **_: Kernel())
    monkeypatch.setattr(module, "monotonic_ns", lambda: MonotonicNs(50 * SECOND))
    monkeypatch.setattr(module, "epoch_ns", lambda: 1000 * SECOND)
    bus = CanBus(CanSpec("can0", "socketcan", "vcan0", 1_000_000))
    Kernel.stamps = [1000 - age_ms / 1000]
    received = bus.receive(MonotonicNs(0))
    assert received is not None
    assert received.at_ns == pytest.approx(50 * SECOND - (age_ms * MS if kept else 0), abs=1000)
    bus.close()
