"""CAN through python-can where an adapter misbehaves: an slcan device at the other end of a pseudo-terminal."""

import errno
import os
import select
import tty
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import can
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.bus import Trouble
from drivers.buses import CanSpec, can_link
from drivers.buses import can as module
from drivers.buses.can import CanBus
from drivers.clock import MS, SECOND, MonotonicNs, after, monotonic_ns
from drivers.errors import BusError, BusMisconfigured
from drivers.family import CanFrame
from drivers.sim.slcan import SlcanAdapter
from drivers.traffic import Mark, Traffic

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
    b"noise\r",
    b"t0112AA\r",
    b"tXYZ2AABB\r",
    b"t011\r",
    b"t0119\r",
    b"t0112AAG0\r",
    b"T\r",
    b"Tzzzzzzzz0\r",
    b"\xff\xfe\r",
    b"d0\r",
    b"t0112AABB\a",
    b"t0112A ABB\r",
    b"t01_2AABB\r",
    b"t8112AABB\r",
    b"T200000112AABB\r",
    b"t0112AAt0112BBCC\r",
]


def unit_of(bus: CanBus) -> CanFrame:
    """The next frame."""
    received = bus.receive(after(monotonic_ns(), 60 * SECOND))
    assert received is not None
    return received.unit


@pytest.mark.parametrize("garbled", GARBLED)
def test_garbled_line_is_passed_over(adapter: Adapter, bus: CanBus, garbled: bytes) -> None:
    adapter.write(garbled + b"t0111AA\r")
    assert unit_of(bus) == CanFrame(0x011, b"\xaa")
    assert bus.troubles == {Trouble.GARBAGE: 1}
    assert "no line of slcan: " in bus.trouble_details[Trouble.GARBAGE]


def test_answers_of_the_adapter_are_no_garbage(adapter: Adapter, bus: CanBus) -> None:
    adapter.write(b"\r\az\rZ\r\a")
    assert bus.receive(MonotonicNs(0)) is None
    assert bus.troubles == {}


def test_line_that_does_not_end_is_told_and_the_lines_behind_it_are_read(adapter: Adapter, bus: CanBus) -> None:
    adapter.write(b"t" * 3000)
    while not bus.troubles:
        assert bus.receive(after(monotonic_ns(), 5 * MS)) is None
    adapter.write(b"\rt0111AA\r")
    assert unit_of(bus) == CanFrame(0x011, b"\xaa")


def test_time_stamp_behind_the_data_is_no_data(adapter: Adapter, bus: CanBus) -> None:
    adapter.write(b"t0112AABB1234\rT000000110EA5F\r")
    assert [unit_of(bus) for _ in range(2)] == [CanFrame(0x011, b"\xaa\xbb"), CanFrame(0x11, b"", extended=True)]


def test_noise_without_end_does_not_hold_up_a_call_whose_deadline_has_passed(adapter: Adapter, bus: CanBus) -> None:
    adapter.write(b"?\r" * 1500)
    assert bus.receive(MonotonicNs(0)) is None
    assert bus.troubles == {Trouble.GARBAGE: 1000}


def test_remote_frames_are_not_passed_on(adapter: Adapter, bus: CanBus) -> None:
    adapter.write(b"r0112\rR000000112\rt0111AA\r")
    assert unit_of(bus) == CanFrame(0x011, b"\xaa")


@given(st.lists(st.integers(0, 100), max_size=5))
def test_frames_are_the_same_however_the_line_is_cut_into_pieces(cuts: list[int]) -> None:
    frames = [CanFrame(number, bytes(range(number)), extended=number % 2 == 1) for number in range(9)]
    asked = SlcanAdapter()
    asked.is_open = True
    line = b"z\r\a".join(asked.encode_received(frame, MonotonicNs(0)) for frame in frames)
    at = [0, *sorted(cuts), len(line)]
    adapter, received = Adapter(), []
    bus = CanBus(CanSpec("can0", "slcan", adapter.port, 1_000_000, SPEC))
    for start, end in pairwise(at):
        if start < end:
            adapter.write(line[start:end])
        while found := bus.receive(MonotonicNs(0)):
            received.append(found.unit)
    received += [unit_of(bus) for _ in range(len(frames) - len(received))]
    bus.close()
    adapter.close()
    assert received == frames
    assert bus.troubles == {}


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


def test_port_without_a_descriptor_can_never_work() -> None:
    with pytest.raises(BusMisconfigured, match=r"can0.*fileno"):
        CanBus(CanSpec("can0", "slcan", "loop://", 1_000_000, SPEC))


def test_option_that_makes_no_sense_can_never_work(adapter: Adapter) -> None:
    with pytest.raises(BusMisconfigured, match="can0"):
        CanBus(CanSpec("can0", "slcan", adapter.port, 1_000_000, {**SPEC, "tty_baudrate": "fast"}))


def test_adapter_that_takes_nothing_is_a_bus_error_in_the_end(bus: CanBus) -> None:
    frames = [CanFrame(1, bytes(8))] * 2_000  # far beyond what the terminal holds
    with pytest.raises(BusError, match=r"can0.*sending"):
        bus.send(frames, after(monotonic_ns(), 20 * MS))


# --- error frames and long frames, on python-can's virtual bus --------------------------------------------------


class Wire:
    """The other end of a virtual bus."""

    def __init__(self, channel: str) -> None:
        self._can = can.Bus(interface="virtual", channel=channel)

    def report(self, classes: int, data: bytes = bytes(8)) -> None:
        self._can.send(can.Message(arbitration_id=classes, data=data, is_error_frame=True))

    def send(self, can_id: int, data: bytes, *, fd: bool = False) -> None:
        self._can.send(can.Message(arbitration_id=can_id, data=data, is_fd=fd, is_extended_id=False))

    def close(self) -> None:
        self._can.shutdown()


@pytest.fixture
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    opened = Wire(request.node.name)
    yield opened
    opened.close()


@pytest.fixture
def virtual(request: pytest.FixtureRequest, wire: Wire) -> Iterator[CanBus]:
    opened = CanBus(CanSpec("can0", "virtual", request.node.name, 1_000_000, fd=True))
    yield opened
    opened.close()


def test_error_frames_are_counted_in_words_and_the_frames_around_them_pass(wire: Wire, virtual: CanBus) -> None:
    wire.send(1, b"\x01")
    wire.report(0x04, bytes([0, 0x08, 0, 0, 0, 0, 0, 0]))
    wire.report(0x04, bytes([0, 0x20, 0, 0, 0, 0, 0, 0]))
    wire.send(2, b"\x02")
    frames = [virtual.receive(MonotonicNs(0)) for _ in range(3)]
    assert [received and received.unit.can_id for received in frames] == [1, 2, None]
    assert virtual.troubles == {Trouble.ERROR_FRAME: 2}
    assert virtual.trouble_details[Trouble.ERROR_FRAME] == "controller: transmit passive"


def test_bus_off_is_a_bus_error(wire: Wire, virtual: CanBus) -> None:
    wire.report(0x40)
    with pytest.raises(BusError, match=r"can0.*bus-off"):
        virtual.receive(after(monotonic_ns(), 60 * SECOND))
    assert virtual.troubles == {Trouble.ERROR_FRAME: 1}


def test_error_frames_of_interfaces_with_numbers_of_their_own_are_told_as_they_are(
    monkeypatch: pytest.MonkeyPatch, wire: Wire, virtual: CanBus
) -> None:
    monkeypatch.setattr(module, "LINUX", frozenset())
    wire.report(0x40, b"\x01\x02")
    assert virtual.receive(MonotonicNs(0)) is None
    assert virtual.trouble_details == {Trouble.ERROR_FRAME: "virtual error 0x40 0102"}


def test_fd_frames_of_up_to_eight_bytes_are_frames_and_longer_ones_are_counted(wire: Wire, virtual: CanBus) -> None:
    wire.send(1, bytes(8), fd=True)
    wire.send(2, bytes(12), fd=True)
    wire.send(3, b"", fd=True)
    frames = [virtual.receive(MonotonicNs(0)) for _ in range(3)]
    assert [received and received.unit for received in frames] == [CanFrame(1, bytes(8)), CanFrame(3, b""), None]
    assert virtual.troubles == {Trouble.LONG_FRAME: 1}
    assert virtual.trouble_details[Trouble.LONG_FRAME] == "002 with 12 bytes"


def test_own_frames_that_come_back_are_passed_over_and_the_same_from_others_are_not(
    request: pytest.FixtureRequest, wire: Wire
) -> None:
    bus = CanBus(CanSpec("can0", "virtual", request.node.name, 1_000_000, {"receive_own_messages": True}))
    bus.send([CanFrame(1, b"\x01")] * 2, after(monotonic_ns(), 60 * SECOND))
    wire.send(1, b"\x01")
    wire.send(2, b"")
    frames = [bus.receive(MonotonicNs(0)) for _ in range(3)]
    assert [received and received.unit for received in frames] == [CanFrame(1, b"\x01"), CanFrame(2, b""), None]
    assert bus.troubles == {Trouble.ECHO: 2}
    bus.close()


@pytest.mark.parametrize("interface", ["virtual", "slcan", "udp_multicast"])
def test_option_that_the_interface_has_not_is_a_misconfiguration(interface: str) -> None:
    with pytest.raises(BusMisconfigured, match=r"can0.*no option tty_baud; known: "):
        CanBus(CanSpec("can0", interface, "channel", 1_000_000, {"tty_baud": 1}))


# --- what only a kernel does ------------------------------------------------------------------------------------


class Kernel(can.BusABC):
    """A bus whose frames bear a time of the kernel's, as SocketCAN's do."""

    stamps: list[float]

    def __init__(self, refusals: list[int] | None = None) -> None:
        super().__init__("vcan0")
        self.refusals = refusals or []  # numbers of the errors of the next calls of send
        self.sent: list[int] = []

    def _recv_internal(self, timeout: float | None) -> tuple[can.Message | None, bool]:
        return can.Message(timestamp=self.stamps.pop(), arbitration_id=1), False

    def send(self, msg: can.Message, timeout: float | None = None) -> None:
        if self.refusals:
            number = self.refusals.pop(0)
            raise can.CanOperationError(f"Failed to transmit: {os.strerror(number)}", number)
        self.sent.append(msg.arbitration_id)


def on_kernel(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, net: Path = Path("no such directory")) -> CanBus:
    """A bus on ``kernel``, whose links ``net`` shows."""
    monkeypatch.setattr(can, "Bus", lambda **_: kernel)
    monkeypatch.setattr(can_link, "NET", net)
    return CanBus(CanSpec("can0", "socketcan", "vcan0", 1_000_000))


def test_full_transmit_queue_is_waited_for_and_counted_once_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel([errno.ENOBUFS] * 3)
    bus = on_kernel(monkeypatch, kernel)
    bus.send([CanFrame(1, b""), CanFrame(2, b"")], after(monotonic_ns(), 60 * SECOND))
    assert kernel.sent == [1, 2]
    assert bus.troubles == {Trouble.TX_FULL: 1}
    bus.close()


def test_transmit_queue_that_stays_full_is_a_bus_error_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel([errno.ENOBUFS] * 10_000)
    bus = on_kernel(monkeypatch, kernel)
    deadline = after(monotonic_ns(), 5 * MS)
    with pytest.raises(BusError, match=r"can0.*1 of 1 frames.*queue stays full"):
        bus.send([CanFrame(1, b"")], deadline)
    assert monotonic_ns() >= deadline
    bus.close()


def test_link_that_goes_down_is_a_bus_error_that_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    link = tmp_path / "vcan0"
    link.mkdir()
    (link / "flags").write_text("0x1\n")
    (link / "carrier").write_text("1\n")
    bus = on_kernel(monkeypatch, Kernel([errno.ENETDOWN]), tmp_path)
    (link / "flags").write_text("0x0\n")
    with pytest.raises(BusError, match=r"can0.*Network is down.*`ip link set vcan0 up`"):
        bus.send([CanFrame(1, b"")], after(monotonic_ns(), 60 * SECOND))
    bus.close()


def test_link_that_is_down_is_not_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vcan0").mkdir()
    (tmp_path / "vcan0" / "flags").write_text("0x0\n")
    with pytest.raises(BusError, match=r"can0.*the link is down"):
        on_kernel(monkeypatch, Kernel(), tmp_path)


@pytest.mark.parametrize(("age_ms", "kept"), [(0.0, True), (5.0, True), (999.0, True), (1001.0, False), (-1.0, False)])
def test_kernels_time_counts_unless_the_wall_clock_stepped_in_between(
    monkeypatch: pytest.MonkeyPatch, age_ms: float, kept: bool
) -> None:
    monkeypatch.setattr(module, "monotonic_ns", lambda: MonotonicNs(50 * SECOND))
    monkeypatch.setattr(module, "epoch_ns", lambda: 1000 * SECOND)
    bus = on_kernel(monkeypatch, Kernel())
    Kernel.stamps = [1000 - age_ms / 1000]
    received = bus.receive(MonotonicNs(0))
    assert received is not None
    assert received.at_ns == pytest.approx(50 * SECOND - (age_ms * MS if kept else 0), abs=1000)
    bus.close()


def tapped(bus: CanBus) -> list[Traffic]:
    told: list[Traffic] = []
    bus.tap = told.append
    return told


def test_tap_is_told_of_every_frame_also_of_those_that_no_family_is_shown() -> None:
    bus = CanBus(CanSpec("can0", "virtual", "tapped", 1_000_000))
    told = tapped(bus)
    with can.Bus(interface="virtual", channel="tapped") as other:
        bus.send([CanFrame(0x12, b"\1"), CanFrame(0x345678, b"", extended=True)], after(monotonic_ns(), SECOND))
        for message in (
            can.Message(arbitration_id=1, is_extended_id=False, is_remote_frame=True, dlc=3),
            can.Message(arbitration_id=2, is_extended_id=False, is_fd=True, bitrate_switch=True, data=bytes(12)),
            can.Message(arbitration_id=4, is_extended_id=False, is_error_frame=True, data=bytes(8)),
            can.Message(arbitration_id=3, is_extended_id=True, data=b"\3"),
        ):
            other.send(message)
        received = bus.receive(after(monotonic_ns(), SECOND))
    bus.close()
    assert received
    assert [unit._replace(at_ns=0) for unit in told] == [
        Traffic(0, Mark.SENT, 0x12, b"\1"),
        Traffic(0, Mark.SENT | Mark.EXTENDED, 0x345678, b""),
        Traffic(0, Mark.REMOTE, 1, b"", 3),
        Traffic(0, Mark.FD | Mark.BRS, 2, bytes(12), 12),
        Traffic(0, Mark.ERROR, 4, bytes(8), 8),
        Traffic(0, Mark.EXTENDED, 3, b"\3", 1),
    ]
    assert told[-1].at_ns == received.at_ns
    assert [unit.at_ns for unit in told] == sorted(unit.at_ns for unit in told)


def test_tap_is_told_once_of_a_frame_that_the_interface_gives_back() -> None:
    bus = CanBus(CanSpec("can0", "virtual", "echoing", 1_000_000, {"receive_own_messages": True}))
    told = tapped(bus)
    bus.send([CanFrame(0x12, b"\1")], after(monotonic_ns(), SECOND))
    assert bus.receive(MonotonicNs(0)) is None
    bus.close()
    assert [unit.marks for unit in told] == [Mark.SENT]
