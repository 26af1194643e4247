"""Every motor family, driven against its own simulated motors. A family added as a file is taken up by itself.

Each test runs once for each of the family's ``examples``: "name#1" is the family with its second set of options.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf, isfinite, nan
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from drivers import protocols
from drivers.clock import SECOND
from drivers.errors import MotorRefused
from drivers.family import CAN_FRAME_BITS, CanFrame, Family, Ready
from drivers.motor import DRIVES, SETPOINTS, Feedback, Kind, Motor, Order, Status
from drivers.sim.build import SimulationSettings
from drivers.sim.servo import Servo
from tests.memory_loop import Loop, make_motor

NAMES = [
    name if number == 0 else f"{name}#{number}"
    for name in protocols.family_names()
    for number in range(len(protocols.load(name).examples))
]

NEAR_RAD = 0.01  # coarser than any family's resolution


def load(name: str) -> type[Family[Any, Any]]:
    return protocols.load(name.partition("#")[0])


def make(name: str, bus_id: int, index: int = 0) -> Motor:
    family, _, number = name.partition("#")
    return make_motor(family, bus_id, index, int(number or 0))


def make_loop(name: str, settings: SimulationSettings | None = None, connected: bool = True) -> tuple[Loop, list[int]]:
    """Three motors of a family, connected."""
    bus_ids = list(load(name).bus_ids[:3])
    motors = [make(name, bus_id, index) for index, bus_id in enumerate(bus_ids)]
    loop = Loop(motors, settings) if settings else Loop(motors)
    if connected:
        for bus_id in bus_ids:
            assert loop.connect(bus_id) is not None
    return loop, bus_ids


def taking(*kinds: Kind) -> pytest.MarkDecorator:
    """The families, with the options, whose motors take orders of these kinds; without any, all of them."""
    return pytest.mark.parametrize("name", [name for name in NAMES if {*kinds} <= kinds_of(name)])


def kinds_of(name: str) -> frozenset[Kind]:
    return load(name).kinds_of(make(name, load(name).bus_ids[0]))


driven = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in NAMES for kind in sorted(DRIVES & kinds_of(name))]
)


@taking()
def test_family_says_what_it_is(name: str) -> None:
    family = load(name)
    assert family.name == name.partition("#")[0]
    assert family.kinds_of(make(name, family.bus_ids[0])) <= family.kinds
    assert family.medium in {"can", "serial"}
    assert len(family.bus_ids) >= 6
    assert {Kind.ENABLE, Kind.DISABLE, Kind.STOP} <= family.kinds


@taking()
def test_motor_that_is_there_is_connected(name: str) -> None:
    loop, (first, *_) = make_loop(name, connected=False)
    info = loop.connect(first)
    assert info is not None
    assert info.model
    assert all(isfinite(value) for value in info.details.values())


@taking()
def test_motor_that_is_not_there_is_not_connected(name: str) -> None:
    first, second = load(name).bus_ids[:2]
    loop = Loop([make(name, first), make(name, second, 1)], absent=[second])
    assert loop.connect(second) is None
    assert loop.connect(first) is not None


@taking()
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


@taking()
def test_poll_takes_the_bits_on_the_wire_that_it_is_said_to_take(name: str) -> None:
    loop, bus_ids = make_loop(name)
    requests = loop.family.poll(bus_ids).requests
    units = [*requests, *(reply for unit in requests for _, reply in loop.bus.respond(unit, loop.now))]
    bits = sum(CAN_FRAME_BITS if isinstance(unit, CanFrame) else 10 * len(unit) for unit in units)
    assert loop.family.poll_bits(list(loop.family.motors.values())) == bits


@taking()
def test_silent_motor_is_the_only_one_missing(name: str) -> None:
    loop, bus_ids = make_loop(name)
    loop.simulated(bus_ids[1]).faults.silent = True
    assert sorted(loop.poll(*bus_ids)) == [bus_ids[0], bus_ids[2]]


@taking()
def test_poll_asks_only_whom_it_was_told_to(name: str) -> None:
    loop, bus_ids = make_loop(name)
    assert list(loop.poll(bus_ids[2])) == [bus_ids[2]]


@taking()
def test_own_requests_are_no_replies(name: str) -> None:
    loop, bus_ids = make_loop(name)
    exchange = loop.family.poll(bus_ids)
    connect = next(loop.family.connect(bus_ids[0]))
    for request in [*exchange.requests, *connect.requests]:
        for packet in loop.family.unpack(request):
            assert exchange.match(packet) is None


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).medium == "can"])
def test_every_identifier_on_the_bus_is_among_those_that_the_motors_are_said_to_use(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.poll(first)
    for kind in kinds_of(name) - {Kind.ENABLE}:
        loop.order(first, Order(Kind.ENABLE))
        loop.order(first, Order(kind, 0.1, 0.1))
    heard = [reply for unit in list(loop.sent) for _, reply in loop.bus.respond(unit, loop.now)]
    stated = {use.can_id for motor in loop.family.motors.values() for use in loop.family.can_ids(motor)}
    assert {frame.can_id for frame in (*loop.sent, *heard)} <= stated


@given(units=st.lists(st.tuples(st.integers(0, 0x7FF), st.binary(max_size=64))))
@taking()
def test_noise_never_raises_on_either_side(name: str, units: list[tuple[int, bytes]]) -> None:
    loop, bus_ids = make_loop(name, connected=False)
    exchange = loop.family.poll(bus_ids)
    for can_id, data in units:
        unit = CanFrame(can_id, data[:8]) if loop.family.medium == "can" else data
        for packet in loop.family.unpack(unit):
            exchange.match(packet)
        list(loop.bus.respond(unit, loop.now))
    loop.family.reset()


@taking()
def test_enabled_motor_holds_where_it_is(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.servo(first).position_rad = 0.4
    assert not loop.poll(first)[first].status & Status.ENABLED
    loop.order(first, Order(Kind.ENABLE))
    loop.wait(2)
    told = loop.poll(first)[first]
    assert told.status & Status.ENABLED
    assert told.position_rad == pytest.approx(0.4, abs=NEAR_RAD)


@taking(Kind.POSITION)
def test_position_is_reached_at_the_speed_that_was_asked_for(name: str) -> None:
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


@taking(Kind.POSITION)
def test_position_without_torque_is_refused_and_moves_nothing(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.poll(first)
    assert loop.refusal(first, Order(Kind.POSITION, 1.0, velocity_rad_s=1.0)).reason == "not_enabled"
    loop.order(first, Order(Kind.ENABLE))
    loop.wait(1)
    assert loop.servo(first).position_rad == pytest.approx(0, abs=NEAR_RAD)


@pytest.mark.parametrize(
    ("value", "velocity_rad_s"),
    [(nan, 1.0), (inf, 1.0), (0.5, nan), (0.5, -1.0), (1e6, 1.0)],
)
@taking(Kind.POSITION)
def test_position_that_makes_no_sense_moves_nothing(name: str, value: float, velocity_rad_s: float) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    refusal = loop.refusal(first, Order(Kind.POSITION, value, velocity_rad_s))
    assert refusal.reason in {"malformed", "out_of_limits"}
    assert str(value) in refusal.detail
    loop.wait(1)
    assert loop.servo(first).position_rad == pytest.approx(0, abs=NEAR_RAD)


@taking(Kind.POSITION)
def test_stopped_motor_stays_where_it_was_told(name: str) -> None:
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


@taking()
def test_stop_of_a_motor_without_torque_succeeds_and_switches_nothing_on(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.STOP))
    assert not loop.servo(first).enabled


@taking()
def test_disabled_motor_says_so(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    loop.order(first, Order(Kind.DISABLE))
    assert not loop.servo(first).enabled
    assert not loop.poll(first)[first].status & Status.ENABLED


@taking()
def test_order_of_a_kind_that_the_family_lacks_is_refused_and_sends_nothing(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.sent.clear()
    for kind in set(Kind) - loop.family.kinds_of(loop.family.motors[first]):
        assert loop.refusal(first, Order(kind, 0.0, 0.0)).reason == "unsupported"
    assert loop.sent == []


@taking()
def test_order_to_a_motor_that_keeps_silent_is_refused(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    loop.simulated(first).faults.silent = True
    for kind in loop.family.kinds_of(loop.family.motors[first]):
        assert loop.refusal(first, Order(kind, 0.1, 0.1)).reason == "no_reply"


@taking()
def test_refresh_ends_whether_or_not_the_motor_answers(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    for silent in (False, True):
        loop.simulated(first).faults.silent = silent
        if procedure := loop.family.refresh(first):
            loop.run(procedure)


# --- velocity and torque ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("velocity_rad_s", [0.5, -0.5])
@taking(Kind.VELOCITY)
def test_velocity_is_kept_until_stop(name: str, velocity_rad_s: float) -> None:
    loop, (first, second, _) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    loop.order(first, Order(Kind.VELOCITY, velocity_rad_s))
    loop.wait(2)
    told = loop.poll(first, second)
    assert told[first].velocity_rad_s == pytest.approx(velocity_rad_s, abs=0.05)
    assert told[first].position_rad == pytest.approx(2 * velocity_rad_s, abs=0.1)
    assert told[second].position_rad == pytest.approx(0.0, abs=NEAR_RAD)
    loop.order(first, Order(Kind.STOP))
    loop.wait(1)
    stopped_rad = loop.servo(first).position_rad
    loop.wait(1)
    assert loop.servo(first).position_rad == pytest.approx(stopped_rad, abs=NEAR_RAD)
    assert loop.poll(first)[first].status & Status.ENABLED


@taking(Kind.VELOCITY, Kind.POSITION)
def test_position_after_velocity_is_reached(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    loop.order(first, Order(Kind.VELOCITY, 0.5))
    loop.wait(1)
    loop.order(first, Order(Kind.POSITION, -0.2, velocity_rad_s=1.0))
    loop.wait(2)
    assert loop.poll(first)[first].position_rad == pytest.approx(-0.2, abs=NEAR_RAD)


@pytest.mark.parametrize("torque_nm", [0.5, -0.5])
@taking(Kind.TORQUE)
def test_torque_pushes_its_way(name: str, torque_nm: float) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    loop.order(first, Order(Kind.TORQUE, torque_nm))
    loop.wait(0.2)
    assert loop.servo(first).position_rad * torque_nm > 0.05
    loop.order(first, Order(Kind.STOP))
    loop.wait(1)
    assert loop.poll(first)[first].velocity_rad_s == pytest.approx(0, abs=0.05)


@driven
def test_drive_without_torque_is_refused_and_moves_nothing(name: str, kind: Kind) -> None:
    loop, (first, *_) = make_loop(name)
    loop.poll(first)
    assert loop.refusal(first, Order(kind, 0.5)).reason == "not_enabled"
    loop.wait(1)
    assert loop.servo(first).position_rad == pytest.approx(0, abs=NEAR_RAD)


@driven
@pytest.mark.parametrize("value", [nan, inf, -inf, 1e9])
def test_drive_that_makes_no_sense_moves_nothing(name: str, kind: Kind, value: float) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    refusal = loop.refusal(first, Order(kind, value))
    assert refusal.reason in {"malformed", "out_of_limits"}
    assert str(value) in refusal.detail
    loop.wait(1)
    assert loop.servo(first).position_rad == pytest.approx(0, abs=NEAR_RAD)


# --- watchdogs --------------------------------------------------------------------------------------------------------

WATCHDOG_S = 0.5

guarded = pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in NAMES if load(name).watchdog for kind in sorted(SETPOINTS & kinds_of(name))],
)


def make_guarded_loop(name: str, watchdog_s: float = WATCHDOG_S) -> tuple[Loop, int]:
    """A motor whose watchdog may be armed, connected."""
    bus_id = load(name).bus_ids[0]
    loop = Loop([replace(make(name, bus_id), watchdog_ns=round(watchdog_s * SECOND))])
    assert loop.connect(bus_id) is not None
    loop.poll(bus_id)
    servo = loop.servo(bus_id)
    servo.limits = replace(servo.limits, position_rad=(-100, 100))  # a torque goes far
    return loop, bus_id


def keep_polling(loop: Loop, bus_id: int, seconds: float) -> None:
    for _ in range(round(seconds / 0.1)):
        loop.wait(0.1)
        loop.poll(bus_id)
        if procedure := loop.family.refresh(bus_id):
            loop.run(procedure)


def fall_silent(loop: Loop, seconds: float) -> None:
    for _ in range(round(seconds / 0.02)):
        loop.wait(0.02)


def come_back(loop: Loop, bus_id: int) -> Feedback:
    """What the motor tells once the gateway polls it again, or has connected it anew."""
    for _ in range(3):
        if bus_id not in loop.poll(bus_id):
            assert loop.connect(bus_id) is not None
    return poll_after_refresh(loop, bus_id)


def is_stopped(loop: Loop, bus_id: int) -> bool:
    before_rad = loop.servo(bus_id).position_rad
    fall_silent(loop, 0.5)
    return loop.servo(bus_id).position_rad == pytest.approx(before_rad, abs=NEAR_RAD)


@guarded
def test_motor_stops_by_itself_when_the_gateway_falls_silent_and_not_before(name: str, kind: Kind) -> None:
    loop, bus_id = make_guarded_loop(name)
    loop.order(bus_id, Order(Kind.ENABLE))
    loop.order(bus_id, Order(kind, -2.5 if kind == Kind.POSITION else 0.4, 0.3))
    keep_polling(loop, bus_id, 2)
    assert abs(loop.servo(bus_id).velocity_rad_s) > 0.1
    fall_silent(loop, WATCHDOG_S + 0.7)
    assert is_stopped(loop, bus_id)
    told = come_back(loop, bus_id)
    assert told.status & Status.FAULT_COMMUNICATION
    assert is_stopped(loop, bus_id)


@guarded
def test_motor_that_its_watchdog_has_stopped_can_be_used_again(name: str, kind: Kind) -> None:
    loop, bus_id = make_guarded_loop(name)
    loop.order(bus_id, Order(Kind.ENABLE))
    loop.order(bus_id, Order(kind, 0.4, 0.3))
    fall_silent(loop, 1)
    come_back(loop, bus_id)
    assert loop.refusal(bus_id, Order(kind, 0.4, 0.3)).reason in {"not_enabled", "refused"}
    if Kind.CLEAR_FAULT in kinds_of(name):
        loop.order(bus_id, Order(Kind.CLEAR_FAULT))
        loop.poll(bus_id)
    loop.order(bus_id, Order(Kind.ENABLE))
    told = poll_after_refresh(loop, bus_id)
    assert told.status & Status.ENABLED
    assert not told.status & Status.faults()
    loop.order(bus_id, Order(kind, -2.5 if kind == Kind.POSITION else -0.4, 0.3))
    keep_polling(loop, bus_id, 1)
    assert loop.servo(bus_id).velocity_rad_s < -0.1
    fall_silent(loop, 1)
    assert is_stopped(loop, bus_id)


@guarded
def test_watchdog_is_armed_by_the_first_setpoint_where_another_master_has_enabled_the_motor(
    name: str, kind: Kind
) -> None:
    loop, bus_id = make_guarded_loop(name)
    loop.order(bus_id, Order(Kind.ENABLE))
    loop.connect(bus_id)
    loop.poll(bus_id)
    with suppress(MotorRefused):  # some have to be enabled from here
        loop.order(bus_id, Order(kind, -2.5 if kind == Kind.POSITION else 0.4, 0.3))
    keep_polling(loop, bus_id, 1)
    fall_silent(loop, 1)
    assert is_stopped(loop, bus_id)


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).watchdog])
def test_monitoring_arms_no_watchdog(name: str) -> None:
    bus_id = load(name).bus_ids[0]
    motor = replace(make(name, bus_id), watchdog_ns=SECOND // 2)
    loop = Loop([motor], SimulationSettings(motion="still", enabled=True))
    assert loop.run(loop.family.identify(bus_id)) is not None
    assert loop.connect(bus_id) is not None
    keep_polling(loop, bus_id, 1)
    fall_silent(loop, 2)
    assert loop.servo(bus_id).enabled
    assert not come_back(loop, bus_id).status & Status.faults()


@guarded
def test_watchdog_that_is_not_configured_is_not_armed(name: str, kind: Kind) -> None:
    loop, bus_id = make_guarded_loop(name, watchdog_s=0)
    loop.order(bus_id, Order(Kind.ENABLE))
    loop.order(bus_id, Order(kind, -2.5 if kind == Kind.POSITION else 0.4, 0.3))
    fall_silent(loop, 2)
    assert abs(loop.servo(bus_id).velocity_rad_s) > 0.1


# --- several motors at once -------------------------------------------------------------------------------------------


def goal_of(servo: Servo) -> tuple[object, ...]:
    return servo.drive, servo.goal_rad, servo.goal_velocity_rad_s, servo.goal_torque_nm


setting = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in NAMES for kind in sorted(SETPOINTS & kinds_of(name))]
)


def prepare(loop: Loop, bus_ids: Sequence[int], kind: Kind) -> dict[int, Ready]:
    for bus_id in bus_ids:
        loop.order(bus_id, Order(Kind.ENABLE))
    orders = {bus_id: Order(kind, 0.2 + 0.1 * number, 0.3) for number, bus_id in enumerate(bus_ids)}
    return {bus_id: loop.run(loop.family.prepare(bus_id, order)) for bus_id, order in orders.items()}


@setting
def test_motors_that_are_fired_together_take_their_goals_in_the_same_step(name: str, kind: Kind) -> None:
    loop, bus_ids = make_loop(name)
    ready = prepare(loop, bus_ids, kind)
    loop.wait(0.5)
    assert all(loop.servo(bus_id).position_rad == pytest.approx(0, abs=NEAR_RAD) for bus_id in bus_ids)
    before = [goal_of(loop.servo(bus_id)) for bus_id in bus_ids]
    replies = loop.exchange(loop.family.fire(ready))
    after = [goal_of(loop.servo(bus_id)) for bus_id in bus_ids]
    assert all(one != other for one, other in zip(before, after, strict=True))
    for bus_id, one in ready.items():
        assert loop.run(loop.family.confirm(bus_id, one, replies.get(bus_id))) == one.told
    assert [goal_of(loop.servo(bus_id)) for bus_id in bus_ids] == after


@setting
def test_motor_that_is_prepared_refuses_without_moving_any(name: str, kind: Kind) -> None:
    loop, (first, second, _) = make_loop(name)
    loop.poll(second)
    prepare(loop, [first], kind)
    with pytest.raises(MotorRefused) as refusal:
        loop.run(loop.family.prepare(second, Order(kind, 0.1, 0.3)))
    assert refusal.value.reason == "not_enabled"
    loop.wait(1)
    assert loop.servo(first).position_rad == pytest.approx(0, abs=NEAR_RAD)


@setting
def test_halt_stops_all_motors_in_one_exchange(name: str, kind: Kind) -> None:
    loop, bus_ids = make_loop(name)
    loop.exchange(loop.family.fire(prepare(loop, bus_ids, kind)))
    if kind != Kind.POSITION:
        for bus_id in bus_ids:
            loop.order(bus_id, Order(kind, 0.4, 0.3))
    loop.wait(0.3)
    loop.poll(*bus_ids)
    loop.exchange(loop.family.halt(bus_ids))
    loop.wait(0.5)
    stopped = [loop.servo(bus_id).position_rad for bus_id in bus_ids]
    loop.wait(1)
    assert [loop.servo(bus_id).position_rad for bus_id in bus_ids] == pytest.approx(stopped, abs=NEAR_RAD)
    for bus_id in bus_ids:
        loop.order(bus_id, Order(Kind.STOP))


@taking()
def test_halt_switches_no_torque_on(name: str) -> None:
    loop, bus_ids = make_loop(name)
    loop.poll(*bus_ids)
    loop.exchange(loop.family.halt(bus_ids))
    assert not any(loop.servo(bus_id).enabled for bus_id in bus_ids)


# --- identity, faults -------------------------------------------------------------------------------------------------


@taking()
def test_identify_tells_who_answers_and_touches_nothing(name: str) -> None:
    loop, (first, second, _) = make_loop(name, SimulationSettings(motion="still", enabled=True), connected=False)
    info = loop.run(loop.family.identify(first))
    assert info is not None
    assert info.model
    assert load(name).Options is not None or not info.options
    loop.simulated(second).faults.silent = True
    assert loop.run(loop.family.identify(second)) is None
    loop.wait(1)
    assert loop.servo(first).enabled
    assert loop.servo(first).position_rad == pytest.approx(0, abs=NEAR_RAD)


@taking()
def test_explains_every_error_in_words(name: str) -> None:
    family = load(name)
    assert list(family.explain(0)) == []
    for bit in range(16):
        assert all(family.explain(1 << bit)), bit
        assert len(family.explain(1 << bit)) >= 1


def poll_after_refresh(loop: Loop, bus_id: int) -> Feedback:
    """What the motor tells, after what its family reads slowly has been read."""
    loop.poll(bus_id)
    if procedure := loop.family.refresh(bus_id):
        loop.run(procedure)
    return loop.poll(bus_id)[bus_id]


@taking()
def test_overheated_motor_says_so_in_its_own_word_and_in_the_common_one(name: str) -> None:
    loop, (first, second, _) = make_loop(name)
    loop.servo(first).temperature_c = 150.0
    told = poll_after_refresh(loop, first)
    assert told.temperature_c > 100
    assert told.status & Status.FAULT_TEMPERATURE
    assert told.vendor_error
    assert load(name).explain(told.vendor_error)
    assert not poll_after_refresh(loop, second).status & Status.faults()


@taking(Kind.CLEAR_FAULT)
def test_cleared_fault_is_gone_if_its_cause_is(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.servo(first).temperature_c = 150.0
    assert poll_after_refresh(loop, first).status & Status.faults()
    loop.servo(first).temperature_c = 25.0
    loop.order(first, Order(Kind.CLEAR_FAULT))
    loop.wait(2)  # some motors restart
    if first not in loop.poll(first):
        assert loop.connect(first) is not None
    told = poll_after_refresh(loop, first)
    assert not told.status & Status.faults()
    assert told.vendor_error == 0


@taking()
def test_rebooted_motor_has_no_torque_and_can_be_enabled_again(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    loop.bus.reboot(loop.simulated(first))
    loop.wait(1)
    assert not loop.servo(first).enabled
    assert loop.connect(first) is not None
    assert not loop.poll(first)[first].status & Status.ENABLED
    loop.order(first, Order(Kind.ENABLE))
    assert loop.poll(first)[first].status & Status.ENABLED


@taking()
def test_stuck_encoder_tells_the_same_position(name: str) -> None:
    loop, (first, *_) = make_loop(name)
    loop.order(first, Order(Kind.ENABLE))
    loop.servo(first).stuck_rad = 0.25
    loop.servo(first).position_rad = 0.75
    assert loop.poll(first)[first].position_rad == pytest.approx(0.25, abs=NEAR_RAD)


@taking()
def test_reply_under_a_wrong_address_is_nobodys_sample(name: str) -> None:
    loop, (first, second, third) = make_loop(name)
    loop.simulated(second).faults.wrong_id = load(name).bus_ids[4]
    assert sorted(loop.poll(first, second, third)) == [first, third]


def replies_to_a_poll(loop: Loop, bus_ids: Sequence[int]) -> list[bytes]:
    requests = loop.family.poll(bus_ids).requests
    return [reply for unit in requests for _, reply in loop.bus.respond(unit, loop.now)]


def read(loop: Loop, bus_ids: Sequence[int], stream: Sequence[bytes]) -> dict[int, Feedback]:
    exchange = loop.family.poll(bus_ids)
    exchange.begin()
    replies: dict[int, Feedback] = {}
    for unit in stream:
        for packet in loop.family.unpack(unit):
            if reply := exchange.match(packet):
                replies.setdefault(*reply)
    return replies


WEAK = {"feetech_sts"}  # one byte of checksum: of 256 packets that noise makes, one is right


def packets_of_sts(stream: bytes | bytearray) -> set[bytes]:
    """Everything that is an STS packet by its header, length and checksum, wherever it begins."""
    found = (
        bytes(stream[at : at + 4 + length])
        for at, length in enumerate(stream[3:])
        if stream[at : at + 2] == b"\xff\xff"
    )
    return {packet for packet in found if len(packet) > 5 and ~sum(packet[2:-1]) & 0xFF == packet[-1]}


@given(data=st.data())
@pytest.mark.parametrize("name", [name for name in NAMES if load(name).medium == "serial"])
def test_damaged_stream_invents_nothing_and_the_next_replies_are_read(name: str, data: st.DataObject) -> None:
    """Serial: any bit wrong, any byte missing or too many, cut into any chunks. (CAN has its CRC in the hardware.)"""
    loop, bus_ids = make_loop(name)
    good = replies_to_a_poll(loop, bus_ids)
    truth = read(loop, bus_ids, good)
    assert sorted(truth) == bus_ids
    stream = bytearray(b"".join(good))
    at = data.draw(st.integers(0, len(stream) - 1))
    match data.draw(st.sampled_from(["bit", "missing", "extra", "cut"])):
        case "bit":
            stream[at] ^= 1 << data.draw(st.integers(0, 7))
        case "missing":
            del stream[at]
        case "extra":
            stream.insert(at, data.draw(st.integers(0, 255)))
        case "cut":
            del stream[at:]
    if name in WEAK:
        assume(packets_of_sts(stream) <= packets_of_sts(b"".join(good)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    chunks = [bytes(stream[a:b]) for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    for bus_id, feedback in read(loop, bus_ids, chunks).items():
        assert feedback == truth[bus_id]
    read(loop, bus_ids, good)  # whose beginning may still belong to what was damaged
    assert read(loop, bus_ids, good) == truth
