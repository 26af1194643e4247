"""Every motor family, driven against its own simulated motors. A family added as a file is taken up by itself."""

from math import isfinite, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers import protocols
from drivers.family import CAN_FRAME_BITS, CanFrame
from drivers.motor import Kind, Order, Status
from drivers.sim.build import SimulationSettings
from tests.memory_loop import Loop, make_motor

pytestmark = pytest.mark.parametrize("name", protocols.family_names())

NEAR_RAD = 0.01  # coarser than any family's resolution


def make_loop(name: str, settings: SimulationSettings | None = None, connected: bool = True) -> tuple[Loop, list[int]]:
    """Three motors of a family, connected."""
    bus_ids = list(protocols.load(name).bus_ids[:3])
    motors = [make_motor(name, bus_id, index) for index, bus_id in enumerate(bus_ids)]
    loop = Loop(motors, settings) if settings else Loop(motors)
    if connected:
        for bus_id in bus_ids:
            assert loop.connect(bus_id) is not None
    return loop, bus_ids


def needs(name: str, *kinds: Kind) -> None:
    if missing := set(kinds) - protocols.load(name).kinds:
        pytest.skip(f"{name} has no order {', '.join(missing)}")


def test_family_says_what_it_is(name: str) -> None:
    family = protocols.load(name)
    assert family.name == name
    assert family.medium in {"can", "serial"}
    assert len(family.bus_ids) >= 6
    assert {Kind.ENABLE, Kind.DISABLE, Kind.STOP} <= family.kinds


def test_motor_that_is_there_is_connected(name: str) -> None:
    loop, (first, *_) = make_loop(name, connected=False)
    info = loop.connect(first)
    assert info is not None
    assert info.model
    assert all(isfinite(value) for value in info.details.values())


def test_motor_that_is_not_there_is_not_connected(name: str) -> None:
    first, second = protocols.load(name).bus_ids[:2]
    loop = Loop([make_motor(name, first), make_motor(name, second, 1)], absent=[second])
    assert loop.connect(second) is None
    assert loop.connect(first) is not None


def test_poll_brings_what_the_physics_holds(name: str) -> None:
    loop, bus_ids = make_loop(name, SimulationSettings(motion="wave", enabled=True))
    loop.wait(0.7)
    feedback = loop.poll(*bus_ids)
    assert sorted(feedback) == bus_ids
    for bus_id, told in feedback.items():
        servo = loop.servo(bus_id)
        assert told.position_rad == pytest.approx(servo.position_rad, abs=NEAR_RAD)
        assert told.velocity_rad_s == pytest.approx(servo.velocity_rad_s, abs=0.05)
        assert told.temperature_c == pytest.approx(servo.temperature_c, abs=1)
        assert told.status & Status.ENABLED
        assert not told.status & Status.faults()


def test_poll_takes_the_bits_on_the_wire_that_it_is_said_to_take(name: str) -> None:
    loop, bus_ids = make_loop(name)
    requests = loop.family.poll(bus_ids).requests
    units = [*requests, *(reply for unit in requests for _, reply in loop.bus.respond(unit, loop.now))]
    bits = sum(CAN_FRAME_BITS if isinstance(unit, CanFrame) else 10 * len(unit) for unit in units)
    assert loop.family.poll_bits(len(bus_ids)) == bits


def test_silent_motor_is_the_only_one_missing(name: str) -> None:
    loop, bus_ids = make_loop(name)
    loop.simulated(bus_ids[1]).faults.silent = True
    assert sorted(loop.poll(*bus_ids)) == [bus_ids[0], bus_ids[2]]


def test_poll_asks_only_whom_it_was_told_to(name: str) -> None:
    loop, bus_ids = make_loop(name)
    assert list(loop.poll(bus_ids[2])) == [bus_ids[2]]


def test_own_requests_are_no_replies(name: str) -> None:
    loop, bus_ids = make_loop(name)
    exchange = loop.family.poll(bus_ids)
    connect = next(loop.family.connect(bus_ids[0]))
    for request in [*exchange.requests, *connect.requests]:
        for packet in loop.family.unpack(request):
            assert exchange.match(packet) is None


@given(units=st.lists(st.tuples(st.integers(0, 0x7FF), st.binary(max_size=64))))
def test_noise_never_raises_on_either_side(name: str, units: list[tuple[int, bytes]]) -> None:
    loop, bus_ids = make_loop(name, connected=False)
    exchange = loop.family.poll(bus_ids)
    for can_id, data in units:
        unit = CanFrame(can_id, data[:8]) if loop.family.medium == "can" else data
        for packet in loop.family.unpack(unit):
            exchange.match(packet)
        list(loop.bus.respond(unit, loop.now))
    loop.family.reset()


def test_enabled_motor_holds_where_it_is(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.servo(first).position_rad = 0.4
    assert not loop.poll(first)[first].status & Status.ENABLED
    loop.order(first, Order(Kind.ENABLE))
    loop.wait(2)
    told = loop.poll(first)[first]
    assert told.status & Status.ENABLED
    assert told.position_rad == pytest.approx(0.4, abs=NEAR_RAD)


def test_position_is_reached_at_the_speed_that_was_asked_for(name: str) -> None:
    needs(name, Kind.POSITION)
    loop, (first, second, _) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    loop.order(first, Order(Kind.POSITION, 1.0, velocity_rad_s=0.5))
    loop.wait(1)
    halfway = loop.poll(first)[first]
    assert halfway.velocity_rad_s == pytest.approx(0.5, abs=0.05)
    loop.wait(2)
    arrived = loop.poll(first, second)
    assert arrived[first].position_rad == pytest.approx(1.0, abs=NEAR_RAD)
    assert arrived[second].position_rad == pytest.approx(0.0, abs=NEAR_RAD)


def test_position_without_torque_is_refused_and_moves_nothing(name: str) -> None:
    needs(name, Kind.POSITION)
    loop, (first, *_) = make_loop(name)
    loop.poll(first)
    assert loop.refusal(first, Order(Kind.POSITION, 1.0, velocity_rad_s=1.0)).reason == "not_enabled"
    loop.order(first, Order(Kind.ENABLE))
    loop.wait(1)
    assert loop.servo(first).position_rad == pytest.approx(0, abs=NEAR_RAD)


@pytest.mark.parametrize(
    ("value", "velocity_rad_s"),
    [(nan, 1.0), (float("inf"), 1.0), (0.5, nan), (0.5, -1.0), (1e6, 1.0)],
)
def test_position_that_makes_no_sense_moves_nothing(name: str, value: float, velocity_rad_s: float) -> None:
    needs(name, Kind.POSITION)
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    refusal = loop.refusal(first, Order(Kind.POSITION, value, velocity_rad_s))
    assert refusal.reason in {"malformed", "out_of_limits"}
    assert str(value) in refusal.detail
    loop.wait(1)
    assert loop.servo(first).position_rad == pytest.approx(0, abs=NEAR_RAD)


def test_stopped_motor_stays_where_it_was_told(name: str) -> None:
    needs(name, Kind.POSITION)
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    loop.order(first, Order(Kind.POSITION, 2.0, velocity_rad_s=1.0))
    loop.wait(0.5)
    before = loop.servo(first).position_rad
    loop.order(first, Order(Kind.STOP))
    loop.wait(2)
    told = loop.poll(first)[first]
    assert 0.1 < before < 1
    assert told.position_rad == pytest.approx(before, abs=0.1)
    assert told.velocity_rad_s == pytest.approx(0, abs=0.01)
    assert told.status & Status.ENABLED


def test_stop_of_a_motor_without_torque_succeeds_and_switches_nothing_on(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.STOP))
    assert not loop.servo(first).enabled


def test_disabled_motor_says_so(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    loop.order(first, Order(Kind.DISABLE))
    assert not loop.servo(first).enabled
    assert not loop.poll(first)[first].status & Status.ENABLED


def test_order_of_a_kind_that_the_family_lacks_is_refused_and_sends_nothing(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.sent.clear()
    for kind in set(Kind) - loop.family.kinds:
        assert loop.refusal(first, Order(kind, 0.0, 0.0)).reason == "unsupported"
    assert loop.sent == []


def test_order_to_a_motor_that_keeps_silent_is_refused(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    loop.simulated(first).faults.silent = True
    for kind in loop.family.kinds:
        assert loop.refusal(first, Order(kind, 0.1, 0.1)).reason == "no_reply"


def test_refresh_ends_whether_or_not_the_motor_answers(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    for silent in (False, True):
        loop.simulated(first).faults.silent = silent
        if procedure := loop.family.refresh(first):
            loop.run(procedure)
