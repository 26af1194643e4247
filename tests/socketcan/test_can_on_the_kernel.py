"""CanBus on SocketCAN: the kernel's times, its queues, its error frames, and links that go."""

import subprocess
from collections.abc import Iterator

import pytest
from damiao_motor import DaMiaoController

from drivers.bus import Trouble
from drivers.buses import CanSpec
from drivers.buses.can import CanBus
from drivers.clock import MS, SECOND, MonotonicNs, after, monotonic_ns
from drivers.errors import BusError
from drivers.family import CanFrame
from drivers.sim.build import build_bus
from drivers.sim.hosts import CanHost
from tests.gateway_parts import wait_for
from tests.memory_loop import STILL, make_motor
from tests.socketcan.links import ERROR_FLAG, cansend, ip

FRAME = CanFrame(0x123, b"\x01\x02")
TX_TIMEOUT, BUS_OFF = 0x001, 0x040  # classes of error frames (linux/can/error.h)


def soon() -> MonotonicNs:
    return after(monotonic_ns(), 60 * SECOND)


def open_can(channel: str) -> CanBus:
    return CanBus(CanSpec("arm", "socketcan", channel, 1_000_000))


@pytest.fixture
def bus(channel: str) -> Iterator[CanBus]:
    opened = open_can(channel)
    yield opened
    opened.close()


@pytest.fixture
def other(channel: str) -> Iterator[CanBus]:
    """Another node on the same link."""
    opened = open_can(channel)
    yield opened
    opened.close()


def unit_of(bus: CanBus) -> CanFrame:
    received = bus.receive(soon())
    assert received is not None
    return received.unit


def test_frame_bears_the_time_at_which_it_came_however_late_it_is_read(bus: CanBus, other: CanBus) -> None:
    sent = []
    for number in range(100):
        before = monotonic_ns()
        other.send([CanFrame(number, b"")], soon())
        sent.append((before, monotonic_ns()))
    read_from = monotonic_ns()
    for number, (before, behind) in enumerate(sent):
        received = bus.receive(soon())
        assert received is not None
        assert received.unit.can_id == number
        assert before <= received.at_ns <= read_from
        assert received.at_ns - behind < 50 * MS  # a processor's turn, should it lie between kernel and us


def test_own_frames_do_not_come_back(bus: CanBus, other: CanBus) -> None:
    bus.send([FRAME], soon())
    other.send([CanFrame(0x124, b"")], soon())
    assert unit_of(bus) == CanFrame(0x124, b"")


def test_full_transmit_queue_is_waited_for(channel: str, bus: CanBus, other: CanBus) -> None:
    limit_queue(channel, "64kbit")  # 500 frames a second
    frames = [CanFrame(number, bytes(8)) for number in range(60)]
    bus.send(frames, soon())
    assert [unit_of(other) for _ in frames] == frames
    assert bus.troubles[Trouble.TX_FULL] > 0


def test_transmit_queue_that_stays_full_is_a_bus_error_in_the_end(channel: str, bus: CanBus) -> None:
    limit_queue(channel, "1kbit")
    with pytest.raises(BusError, match=r"arm.*queue"):
        bus.send([FRAME] * 1000, after(monotonic_ns(), 50 * MS))


def limit_queue(channel: str, rate: str) -> None:
    """A virtual link takes everything at once; let it take frames (16 bytes each) at a rate, with ten in its queue."""
    limit = ["tbf", "rate", rate, "burst", "72", "limit", "160"]
    subprocess.run(["tc", "qdisc", "add", "dev", channel, "root", *limit], check=True)


def test_error_frame_is_counted_in_words_and_disturbs_nobody(channel: str, bus: CanBus) -> None:
    cansend(channel, f"{ERROR_FLAG | TX_TIMEOUT:08X}#0000000000000000")
    cansend(channel, "123#0102")
    assert unit_of(bus) == FRAME
    assert bus.troubles[Trouble.ERROR_FRAME] == 1
    assert "transmit timeout" in bus.trouble_details[Trouble.ERROR_FRAME]


def test_bus_off_is_a_bus_error_that_names_the_link_and_the_remedy(channel: str, bus: CanBus) -> None:
    cansend(channel, f"{ERROR_FLAG | BUS_OFF:08X}#0000000000000000")
    with pytest.raises(BusError, match=rf"arm.*{channel}.*bus-off.*restart"):
        bus.receive(soon())


def test_link_that_goes_down_is_a_bus_error_and_works_again_when_it_is_up(channel: str, bus: CanBus) -> None:
    ip("link", "set", channel, "down")
    with pytest.raises(BusError, match=rf"arm.*{channel}.*down"):
        bus.receive(soon())
    with pytest.raises(BusError, match=rf"arm.*{channel}.*down"):
        bus.send([FRAME], soon())
    with pytest.raises(BusError, match=rf"arm.*{channel}.*ip link set {channel} up"):
        open_can(channel)
    ip("link", "set", channel, "up")
    again = open_can(channel)
    cansend(channel, "123#0102")
    assert unit_of(again) == FRAME
    again.close()


def test_link_that_is_taken_away_is_a_bus_error(channel: str, bus: CanBus) -> None:
    ip("link", "delete", channel)
    with pytest.raises(BusError, match=rf"arm.*{channel}"):
        bus.receive(soon())
    with pytest.raises(BusError, match=rf"arm.*{channel}"):
        bus.send([FRAME], soon())


@pytest.mark.filterwarnings(
    # damiao-motor 1.0.6 opens its bus by a name that python-can has renamed
    "ignore:The 'bustype' argument is deprecated:DeprecationWarning",
)
def test_damiao_motor_talks_to_simulated_motors_on_the_link(channel: str) -> None:
    motors = [make_motor("damiao", bus_id, bus_id - 1) for bus_id in (1, 2)]
    with CanHost(build_bus(motors, STILL, monotonic_ns()), channel, interface="socketcan"):
        controller = DaMiaoController(channel=channel, bustype="socketcan")
        for bus_id in (1, 2):
            motor = controller.add_motor(motor_id=bus_id, feedback_id=0x10 + bus_id, motor_type="4310")
            assert motor.get_register(7) == 0x10 + bus_id
            motor.request_motor_feedback()
            wait_for(motor.get_states)
        controller.shutdown()
