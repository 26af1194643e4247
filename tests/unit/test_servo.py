"""The physics of a simulated servo."""

from collections.abc import Callable
from math import pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.sim.servo import Servo, ServoLimits, wave


def run(servo: Servo, seconds: float, dt_s: float = 0.01) -> list[Servo]:
    """Step for a while; the servo's states on the way."""
    states = []
    for _ in range(round(seconds / dt_s)):
        servo.step(dt_s)
        states.append(Servo(position_rad=servo.position_rad, velocity_rad_s=servo.velocity_rad_s))
    return states


@given(goal_rad=st.floats(-3, 3), velocity_rad_s=st.floats(0.5, 10))
def test_goal_is_reached_without_overshoot_and_never_faster_than_allowed(
    goal_rad: float, velocity_rad_s: float
) -> None:
    servo = Servo(enabled=True)
    servo.move_to(goal_rad, velocity_rad_s)
    states = run(servo, 3 / min(velocity_rad_s, 5) + 1)
    allowed = min(velocity_rad_s, servo.limits.velocity_rad_s)
    assert servo.position_rad == pytest.approx(goal_rad, abs=0.001)
    assert max(abs(state.velocity_rad_s) for state in states) <= allowed + 1e-9
    assert max(abs(state.position_rad) for state in states) <= abs(goal_rad) + 0.005


def test_goal_beyond_the_end_stop_ends_there() -> None:
    servo = Servo(ServoLimits(position_rad=(-1, 1)), enabled=True)
    servo.move_to(2, 5)
    assert max(state.position_rad for state in run(servo, 2)) <= 1
    assert servo.position_rad == pytest.approx(1, abs=0.001)


def test_goal_without_torque_moves_nothing() -> None:
    servo = Servo()
    servo.move_to(1, 5)
    run(servo, 1)
    assert servo.position_rad == 0


def test_torque_that_comes_on_holds_the_present_position() -> None:
    servo = Servo(position_rad=0.5, goal_rad=2.0)
    servo.enable()
    run(servo, 1)
    assert servo.position_rad == pytest.approx(0.5, abs=0.001)


def test_torque_that_goes_off_lets_friction_stop_the_shaft() -> None:
    servo = Servo(enabled=True)
    servo.move_to(3, 5)
    run(servo, 0.3)
    assert servo.velocity_rad_s > 4
    servo.disable()
    run(servo, 3)
    assert servo.velocity_rad_s == pytest.approx(0, abs=1e-6)
    assert servo.torque_nm == 0


def test_current_heats_and_rest_cools() -> None:
    servo = Servo(enabled=True)
    for turn in range(20):
        servo.move_to(2 if turn % 2 else -2, 5)
        run(servo, 0.5)
    hot = servo.temperature_c
    assert hot > servo.limits.ambient_c + 0.2
    run(servo, 60, dt_s=0.05)
    assert servo.limits.ambient_c < servo.temperature_c < hot


def test_motion_is_followed_until_somebody_takes_over() -> None:
    path = wave(0.5, 4.0, 0.0, centre_rad=0.2)
    servo = Servo(motion=path, enabled=True, position_rad=0.2)
    run(servo, 3.1)
    assert servo.position_rad == pytest.approx(path(servo.time_s), abs=0.02)
    here = servo.position_rad
    servo.take_over()
    run(servo, 2)
    assert servo.motion is None
    assert servo.position_rad == pytest.approx(here, abs=0.02)


def test_result_does_not_depend_on_how_often_it_is_stepped() -> None:
    often, seldom = Servo(enabled=True), Servo(enabled=True)
    for servo, dt_s in ((often, 0.001), (seldom, 0.1)):
        servo.move_to(pi / 2, 2)
        run(servo, 0.6, dt_s)
    assert often.position_rad == pytest.approx(seldom.position_rad, abs=1e-6)


@pytest.mark.parametrize("velocity_rad_s", [2.0, -2.0])
def test_velocity_is_reached_and_kept(velocity_rad_s: float) -> None:
    servo = Servo(ServoLimits(position_rad=(-100, 100)), enabled=True)
    servo.turn_at(velocity_rad_s)
    states = run(servo, 3)
    assert servo.velocity_rad_s == pytest.approx(velocity_rad_s)
    assert servo.position_rad == pytest.approx(3 * velocity_rad_s, abs=0.1)
    assert max(abs(state.velocity_rad_s) for state in states) <= 2.0


def test_velocity_beyond_the_mechanics_is_what_the_mechanics_can_do() -> None:
    servo = Servo(ServoLimits(position_rad=(-100, 100), velocity_rad_s=5), enabled=True)
    servo.turn_at(1000)
    run(servo, 1)
    assert servo.velocity_rad_s == pytest.approx(5)


def test_torque_accelerates_with_what_friction_leaves_of_it() -> None:
    limits = ServoLimits(position_rad=(-100, 100), inertia_kg_m2=0.02, friction_nm=0.2)
    servo = Servo(limits, enabled=True)
    servo.push(-0.4)
    run(servo, 0.2)
    assert servo.velocity_rad_s == pytest.approx(-0.2 / 0.02 * 0.2)
    assert servo.torque_nm == pytest.approx(-0.4, abs=0.01)


@pytest.mark.parametrize("start_rad_s", [0.0, 3.0])
def test_torque_below_friction_moves_nothing_and_lets_the_shaft_come_to_rest(start_rad_s: float) -> None:
    servo = Servo(ServoLimits(position_rad=(-100, 100), friction_nm=0.2), enabled=True, velocity_rad_s=start_rad_s)
    servo.push(0.1)
    run(servo, 2)
    assert servo.velocity_rad_s == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("drive", [lambda servo: servo.turn_at(2.0), lambda servo: servo.push(1.0)])
def test_drive_without_torque_or_into_the_end_stop_moves_nothing(drive: Callable[[Servo], None]) -> None:
    limp, stopped = Servo(), Servo(ServoLimits(position_rad=(-1, 1)), enabled=True, position_rad=1.0)
    for servo in (limp, stopped):
        before = servo.position_rad
        drive(servo)
        run(servo, 1)
        assert servo.position_rad == before


def test_hold_ends_a_drive_where_the_shaft_can_stop() -> None:
    servo = Servo(enabled=True)
    servo.turn_at(2.0)
    run(servo, 0.5)
    here = servo.position_rad
    servo.hold()
    run(servo, 1)
    assert servo.velocity_rad_s == pytest.approx(0, abs=1e-3)
    assert servo.position_rad == pytest.approx(here, abs=0.1)


def test_stuck_encoder_tells_its_old_position_while_the_shaft_moves_on() -> None:
    servo = Servo(enabled=True)
    assert servo.measured_rad == servo.position_rad
    servo.stuck_rad = servo.position_rad
    servo.move_to(1, 5)
    run(servo, 1)
    assert servo.measured_rad == 0
    assert servo.position_rad == pytest.approx(1, abs=0.001)
