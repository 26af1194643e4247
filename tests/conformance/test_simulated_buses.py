"""What simulated motors do wherever they are hosted: in memory, on pseudo-terminals, on interfaces of python-can."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

from drivers.bus import Bus
from drivers.buses import CanSpec, SerialSpec, open_bus
from drivers.buses.memory import MemoryBus
from drivers.clock import SECOND, after, monotonic_ns
from drivers.errors import BusError
from drivers.family import CanFrame
from drivers.motor import Motor
from drivers.protocols import damiao, feetech_sts
from drivers.sim.build import SimulationSettings, build_bus
from drivers.sim.bus import SimulatedBus
from drivers.sim.hosts import CanHost, PtySerialHost, SlcanHost
from drivers.sim.wire import wire_bits
from tests.memory_loop import make_motor

_numbers = count()
LONG_NS = 60 * SECOND  # for what comes sooner
STILL = SimulationSettings(motion="still", enabled=False)
SLOW_BITS_PER_S = 50_000


@dataclass
class Rig:
    """An open bus with motors 1 and 2 behind a host."""

    bus: Bus[Any]
    simulated: SimulatedBus[Any]
    frames: bool

    def ask(self, bus_id: int) -> Any:
        """A request that the motor answers."""
        if self.frames:
            return damiao.make_refresh(bus_id)
        return feetech_sts.encode_packet(feetech_sts.Packet(bus_id, feetech_sts.Instruction.PING))

    def send(self, *bus_ids: int) -> None:
        """Ask motors, all at once."""
        self.bus.send([self.ask(bus_id) for bus_id in bus_ids], after(monotonic_ns(), LONG_NS))

    def heard(self, replies: int) -> list[int]:
        """Who answers, in the order of so many replies; and nobody else does before they are all there."""
        deadline = after(monotonic_ns(), LONG_NS)
        decoder = feetech_sts.Decoder()
        found: list[int] = []
        while len(found) < replies:
            received = self.bus.receive(deadline)
            assert received is not None, found
            if not self.frames:
                found += [packet.bus_id for packet in decoder.feed(received.unit)]
            elif received.unit not in (self.ask(1), self.ask(2)):  # some interfaces give back what one sends
                found.append(received.unit.data[0] & 0xF)
        return found


def open_rig(kind: str, stack: ExitStack, settings: SimulationSettings = STILL, options: Any = None) -> Rig:
    frames = "can" in kind
    family = "damiao" if frames else "feetech_sts"
    motors = [Motor(0, "joint1", family, 1, options), make_motor(family, 2, 1)]
    simulated = build_bus(motors, settings, monotonic_ns(), "bus")
    bus: Bus[Any]
    if "memory" in kind:
        bus = MemoryBus(simulated)
    elif kind == "serial":
        bus = open_bus(SerialSpec("bus", stack.enter_context(PtySerialHost(simulated)).port, 1_000_000))
    elif kind == "can on slcan":
        port = stack.enter_context(SlcanHost(simulated)).port
        bus = open_bus(CanSpec("bus", "slcan", port, 1_000_000, {"sleep_after_open": 0}))
    else:
        interface = kind.removeprefix("can, ")
        channel, extra = f"simulated{next(_numbers)}", {}
        if interface == "udp_multicast":
            pytest.importorskip("msgpack")
            channel, extra = "239.74.163.2", {"hop_limit": 0, "port": 43200 + next(_numbers)}
        try:
            stack.enter_context(CanHost(simulated, channel, interface=interface, options=extra))
            bus = open_bus(CanSpec("bus", interface, channel, 1_000_000, extra))
        except (OSError, BusError) as error:
            pytest.skip(f"no {interface} here: {error}")
    stack.callback(bus.close)
    return Rig(bus, simulated, frames)


CAN_KINDS = ["can, memory", "can on slcan", "can, virtual", "can, udp_multicast"]
KINDS = ["memory", "serial", *CAN_KINDS]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_arrives_before_its_bits_have_passed(kind: str, stack: ExitStack) -> None:
    rig = open_rig(kind, stack, SimulationSettings(motion="still", enabled=False, bits_per_s=SLOW_BITS_PER_S))
    sent = monotonic_ns()
    rig.send(1, 2)
    rig.heard(2)
    reply = CanFrame(0x11, bytes(8)) if rig.frames else feetech_sts.encode_packet(feetech_sts.Packet(1, 0))
    bits = wire_bits(rig.ask(1)) + wire_bits(rig.ask(2)) + (2 * 111 if rig.frames else 2 * wire_bits(reply))
    assert monotonic_ns() - sent >= bits * SECOND // SLOW_BITS_PER_S


@pytest.mark.parametrize("kind", KINDS)
def test_motor_that_answers_late_lets_the_others_go_first(kind: str, stack: ExitStack) -> None:
    rig = open_rig(kind, stack)
    rig.simulated.motors[0].faults.delay_ms = 200
    rig.send(1, 2)
    assert rig.heard(2) == [2, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_silent_motor_is_heard_again_when_it_is_healed(kind: str, stack: ExitStack) -> None:
    rig = open_rig(kind, stack)
    rig.simulated.motors[0].faults.silent = True
    rig.send(1, 2)
    assert rig.heard(1) == [2]
    rig.simulated.motors[0].faults.silent = False
    rig.send(1, 2)
    assert rig.heard(2) == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_replies_that_are_lost_are_not_heard_and_those_after_them_are(kind: str, stack: ExitStack) -> None:
    rig = open_rig(kind, stack)
    rig.simulated.motors[0].faults.drop = 1.0
    rig.send(1, 1, 1, 2)
    assert rig.heard(1) == [2]


@pytest.mark.parametrize("kind", CAN_KINDS)
def test_reply_is_no_request_to_another_motor(kind: str, stack: ExitStack) -> None:
    rig = open_rig(kind, stack, options=damiao.Options(master_id=2))  # where motor 2 takes commands, and answers them
    rig.send(1)
    assert rig.heard(1) == [1]
    rig.send(2, 1)
    assert rig.heard(2) == [2, 1]
