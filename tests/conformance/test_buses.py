"""What every bus does, whatever carries it: memory, a pseudo-terminal, python-can's virtual bus, slcan.

SERVO_GATEWAY_TEST_CAN=INTERFACE:CHANNEL, such as socketcan:vcan0, adds another interface of python-can's that two
programs can be on. Nothing else may be on that channel.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

import can
import pytest

from drivers.bus import Bus, Trouble
from drivers.buses import CanSpec, SerialSpec, open_bus
from drivers.buses.memory import MemoryBus
from drivers.clock import MS, SECOND, MonotonicNs, after, monotonic_ns
from drivers.errors import BusError, BusMisconfigured
from drivers.family import CanFrame
from drivers.protocols import damiao, feetech_sts
from drivers.sim.build import build_bus
from drivers.sim.bus import SimulatedBus
from drivers.sim.hosts import CanHost, PtySerialHost, SlcanHost
from tests.gateway_parts import wait_for
from tests.memory_loop import STILL, make_motor

KINDS = ["memory", "serial", "serial, echoing", "can, virtual", "can on slcan"]
CAN = ["can, virtual"]
if given := os.environ.get("SERVO_GATEWAY_TEST_CAN"):
    KINDS.append(f"can, {given}")
    CAN.append(f"can, {given}")

_numbers = count()
LONG_NS = 60 * SECOND  # for what comes sooner


@dataclass
class Rig:
    """An open bus with motors 1 and 2 on it. ``asks`` motor 1 or 2; each answers with exactly ``answers``."""

    bus: Bus[Any]
    simulated: SimulatedBus[Any]
    asks: tuple[Any, Any]
    answers: tuple[Any, Any]
    vanish: Callable[[], None] | None  # take the adapter away
    troubles: frozenset[Trouble] = frozenset()  # those that this bus has when all is well

    def read(self, units: int) -> list[Any]:
        """So many replies, however they were cut into pieces."""
        pieces: list[Any] = []
        deadline = after(monotonic_ns(), LONG_NS)
        while len(joined(pieces)) < units * size_of(self.answers[0]):
            received = self.bus.receive(deadline)
            assert received is not None, pieces
            pieces.append(received.unit)
        return pieces


class EchoingHost(PtySerialHost):
    """A half-duplex adapter that hears itself."""

    def _receive(self, timeout_s: float) -> Iterable[bytes]:
        for data in super()._receive(timeout_s):
            self._pty.write(data)
            yield data


def size_of(unit: Any) -> int:
    return len(unit) if isinstance(unit, bytes) else 1


def joined(pieces: list[Any]) -> Any:
    """Serial chunks in one piece; frames as they are."""
    return b"".join(pieces) if pieces and isinstance(pieces[0], bytes) else pieces


def make_rig(kind: str, stack: ExitStack) -> Rig:
    family = "damiao" if "can" in kind else "feetech_sts"
    simulated = build_bus([make_motor(family, bus_id, bus_id - 1) for bus_id in (1, 2)], STILL, monotonic_ns())
    asks: tuple[Any, Any]
    first: Any
    second: Any
    if family == "damiao":
        asks = (damiao.make_refresh(1), damiao.make_refresh(2))
        first, second = (simulated.respond(ask, monotonic_ns())[0][1] for ask in asks)
    else:
        one, two = (feetech_sts.Packet(bus_id, feetech_sts.Instruction.PING) for bus_id in (1, 2))
        asks = (feetech_sts.encode_packet(one), feetech_sts.encode_packet(two))
        first, second = (feetech_sts.encode_packet(feetech_sts.Packet(bus_id, 0)) for bus_id in (1, 2))
    answers = (first, second)
    vanish: Callable[[], None] | None = None
    bus: Bus[Any]
    if kind == "memory":
        bus = memory = MemoryBus(simulated)
        vanish = memory.unplug
    elif kind.startswith("serial"):
        host = stack.enter_context((EchoingHost if "echoing" in kind else PtySerialHost)(simulated))
        bus, vanish = open_bus(SerialSpec("bus", host.port, 1_000_000)), host.stop
    elif kind == "can on slcan":
        adapter = stack.enter_context(SlcanHost(simulated))
        bus = open_bus(CanSpec("bus", "slcan", adapter.port, 1_000_000, {"sleep_after_open": 0}))
        vanish = adapter.stop
    else:
        interface, _, channel = kind.removeprefix("can, ").partition(":")
        channel = channel or f"conformance{next(_numbers)}"
        stack.enter_context(CanHost(simulated, channel, interface=interface))
        bus = open_bus(CanSpec("bus", interface, channel, 1_000_000))
    stack.callback(bus.close)
    return Rig(bus, simulated, asks, answers, vanish, frozenset({Trouble.ECHO} if "echoing" in kind else {}))


@pytest.fixture(params=KINDS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with ExitStack() as stack:
        yield make_rig(request.param, stack)


def soon() -> MonotonicNs:
    return after(monotonic_ns(), LONG_NS)


def test_what_is_sent_arrives_and_the_reply_with_the_time_of_its_arrival(rig: Rig) -> None:
    before = monotonic_ns()
    rig.bus.send([rig.asks[0]], soon())
    received = rig.bus.receive(soon())
    assert received is not None
    assert before <= received.at_ns <= monotonic_ns()
    rest = rig.read(1) if size_of(received.unit) < size_of(rig.answers[0]) else []
    assert joined([received.unit, *rest]) == joined([rig.answers[0]])


def test_many_units_in_one_call_arrive_in_their_order(rig: Rig) -> None:
    order = [0, 1, 1, 0, 0, 1, 0, 1] * 4
    rig.bus.send([rig.asks[number] for number in order], soon())
    assert joined(rig.read(len(order))) == joined([rig.answers[number] for number in order])


def test_nothing_to_send_is_sent_at_once(rig: Rig) -> None:
    rig.bus.send([], MonotonicNs(0))
    assert rig.bus.receive(MonotonicNs(0)) is None


def test_receive_waits_until_its_deadline_and_not_for_long_after_it(rig: Rig) -> None:
    deadline = after(monotonic_ns(), 30 * MS)
    assert rig.bus.receive(deadline) is None
    assert deadline <= monotonic_ns() < deadline + 10 * SECOND


def test_receive_does_not_wait_longer_than_for_the_reply(rig: Rig) -> None:
    rig.bus.send([rig.asks[0]], soon())
    rig.read(1)
    assert monotonic_ns() < soon() - LONG_NS // 2


def test_passed_deadline_brings_what_has_arrived_and_waits_for_nothing(rig: Rig) -> None:
    assert rig.bus.receive(MonotonicNs(0)) is None
    rig.bus.send([rig.asks[0], rig.asks[1], rig.asks[0]], soon())
    pieces: list[Any] = []

    def drain() -> bool:
        while received := rig.bus.receive(MonotonicNs(0)):
            pieces.append(received.unit)
        return len(joined(pieces)) >= 3 * size_of(rig.answers[0])

    wait_for(drain)
    assert joined(pieces) == joined([rig.answers[0], rig.answers[1], rig.answers[0]])


def test_late_reply_is_there_to_be_drained(rig: Rig) -> None:
    rig.simulated.motors[0].faults.delay_ms = 20
    rig.bus.send([rig.asks[0]], soon())
    wait_for(lambda: rig.bus.receive(MonotonicNs(0)) is not None)


def test_undisturbed_bus_has_no_troubles(rig: Rig) -> None:
    for _ in range(10):
        rig.bus.send(rig.asks, soon())
        rig.read(2)
    assert rig.bus.troubles.keys() == rig.bus.trouble_details.keys() == rig.troubles


def test_closed_bus_is_a_bus_error_from_every_call_and_may_be_closed_again(rig: Rig) -> None:
    rig.bus.close()
    for _ in range(2):
        with pytest.raises(BusError):
            rig.bus.receive(MonotonicNs(0))
        with pytest.raises(BusError):
            rig.bus.send([rig.asks[0]], soon())
        rig.bus.close()


@pytest.fixture(params=["memory", "serial", "can on slcan"])
def frail(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Buses whose adapter can go; python-can's virtual one cannot."""
    with ExitStack() as stack:
        yield make_rig(request.param, stack)


def test_vanished_adapter_is_a_bus_error_from_receive(frail: Rig) -> None:
    assert frail.vanish is not None
    frail.vanish()
    with pytest.raises(BusError):
        frail.bus.receive(soon())


def test_vanished_adapter_is_a_bus_error_from_send(frail: Rig) -> None:
    assert frail.vanish is not None
    frail.vanish()
    with pytest.raises(BusError):
        frail.bus.send([frail.asks[0]], soon())


MISSING = [
    SerialSpec("arm", "/dev/none", 1_000_000),
    CanSpec("arm", "slcan", "/dev/none", 1_000_000),
    CanSpec("arm", "socketcan", "nocan7", 1_000_000),
]


@pytest.mark.parametrize("spec", MISSING, ids=str)
def test_adapter_that_is_not_there_is_a_bus_error_naming_it(spec: Any) -> None:
    with pytest.raises(BusError, match=rf"arm.*{spec.port if isinstance(spec, SerialSpec) else spec.channel}"):
        open_bus(spec)


@pytest.mark.parametrize("kind", CAN)
def test_frames_may_be_of_either_format_and_any_length(kind: str) -> None:
    with ExitStack() as stack:
        rig = make_rig(kind, stack)
        other = open_bus(vars(rig.bus)["_spec"])
        stack.callback(other.close)
        frames = [CanFrame(0x7F0 + size, bytes(range(size))) for size in range(9)]
        frames += [CanFrame(0x1FFFFFF0 + size, bytes(size), extended=True) for size in range(9)]
        rig.bus.send(frames, soon())
        assert [received.unit for _ in frames if (received := other.receive(soon()))] == frames


@pytest.mark.parametrize("kind", CAN)
def test_what_the_controller_reports_is_counted_and_the_frames_around_it_pass(kind: str) -> None:
    with ExitStack() as stack:
        rig = make_rig(kind, stack)
        spec = vars(rig.bus)["_spec"]
        controller = stack.enter_context(can.Bus(interface=spec.interface, channel=spec.channel))
        overflow = bytes([0, 1, 0, 0, 0, 0, 0, 0])
        controller.send(can.Message(arbitration_id=4, data=overflow, is_error_frame=True, is_extended_id=False))
        rig.bus.send([rig.asks[0]], soon())
        assert rig.read(1) == [rig.answers[0]]
        assert rig.bus.troubles == {Trouble.ERROR_FRAME: 1}
        assert rig.bus.trouble_details == {Trouble.ERROR_FRAME: "controller: receive overflow"}


@pytest.mark.parametrize("kind", CAN)
def test_bus_off_is_a_bus_error_and_the_bus_can_be_opened_again(kind: str) -> None:
    with ExitStack() as stack:
        rig = make_rig(kind, stack)
        spec = vars(rig.bus)["_spec"]
        controller = stack.enter_context(can.Bus(interface=spec.interface, channel=spec.channel))
        controller.send(can.Message(arbitration_id=0x40, data=bytes(8), is_error_frame=True, is_extended_id=False))
        with pytest.raises(BusError, match="bus-off"):
            rig.bus.receive(soon())
        rig.bus.close()
        rig.bus = open_bus(spec)
        stack.callback(rig.bus.close)
        rig.bus.send([rig.asks[0]], soon())
        assert rig.read(1) == [rig.answers[0]]


@pytest.mark.parametrize(
    "spec",
    [
        CanSpec("arm", "no_such_interface", "can0", 1_000_000),
        CanSpec("arm", "slcan", "", 1_000_000),
        SerialSpec("arm", "/dev/ptmx", -9600),
    ],
    ids=str,
)
def test_what_can_never_work_is_told_apart_from_what_is_not_there_now(spec: Any) -> None:
    with pytest.raises(BusMisconfigured, match="arm"):
        open_bus(spec)
