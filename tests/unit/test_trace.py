"""Simulated motors that live through a recording."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import MS, SECOND
from drivers.motor import Motor
from drivers.sim.build import SimulationSettings, build_bus, make_servo
from drivers.sim.servo import Servo
from drivers.sim.trace import TRACE, Playhead, Trace


def rows(*at_ns: int) -> "np.ndarray[tuple[int], np.dtype[np.void]]":
    """Rows whose position is their number."""
    found = np.zeros(len(at_ns), TRACE)
    found["at_ns"], found["position_rad"] = at_ns, np.arange(len(at_ns))
    found["temperature_c"], found["voltage_v"] = 40 + np.arange(len(at_ns)), 11.5
    return found


@given(times=st.lists(st.integers(0, 1000), min_size=1, max_size=30).map(sorted), now_ns=st.integers(-10, 1010))
def test_a_row_holds_until_the_next_and_the_first_and_last_beyond(times: list[int], now_ns: int) -> None:
    trace = Trace(rows(*times), lambda: now_ns)
    past = [number for number, at_ns in enumerate(times) if at_ns <= now_ns]
    assert trace.now()["position_rad"] == (past[-1] if past else 0)


def test_a_servo_tells_the_row_whatever_its_physics_could_do() -> None:
    now_ns = [0]
    found = rows(0, 10)
    found["velocity_rad_s"] = (0.5, -0.25)
    found["current_a"], found["torque_nm"] = (1.0, 1.0), (np.nan, 0.75)
    servo = Servo(motion=Trace(found, lambda: now_ns[0]))
    servo.step(0.001)
    assert (servo.measured_rad, servo.velocity_rad_s, servo.temperature_c) == (0.0, 0.5, 40.0)
    assert (servo.voltage_v, servo.current_a) == (11.5, 1.0)
    now_ns[0] = 10
    servo.step(0.001)
    assert (servo.measured_rad, servo.velocity_rad_s, servo.torque_nm) == (1.0, -0.25, 0.75)


def test_what_a_motor_did_not_tell_stays_as_it_is() -> None:
    found = rows(0)
    for name in ("temperature_c", "voltage_v", "current_a", "torque_nm"):
        found[name] = np.nan
    servo = Servo(motion=Trace(found, lambda: 0))
    before = (servo.temperature_c, servo.voltage_v)
    servo.step(0.001)
    assert (servo.temperature_c, servo.voltage_v, servo.torque_nm) == (*before, 0.0)


def test_the_first_order_ends_the_trace_and_holds_where_it_is() -> None:
    servo = Servo(enabled=True, motion=Trace(rows(0, 10), lambda: 10))
    servo.step(0.001)
    servo.take_over()
    servo.step(1.0)
    assert servo.position_rad == pytest.approx(1.0)


def test_one_playhead_leads_all_who_share_it(tmp_path: Path) -> None:
    ours = Playhead.make(tmp_path / "playhead", 1000, 2.0)
    theirs = Playhead(tmp_path / "playhead")
    stood = [theirs.stands]
    assert theirs.now_ns() == ours.now_ns() == 1000
    ours.toggle()
    stood.append(theirs.stands)
    assert stood == [True, False]
    before = ours.now_ns()
    assert before <= theirs.now_ns() <= ours.now_ns()
    ours.toggle()
    at_ns = ours.now_ns()
    assert theirs.now_ns() == at_ns >= before
    ours.toggle()
    assert theirs.now_ns() >= at_ns


def test_motors_with_a_trace_follow_it_and_others_stand_still(tmp_path: Path) -> None:
    rows(5 * SECOND, 6 * SECOND).tofile(tmp_path / "0.trace")
    Playhead.make(tmp_path / "playhead", 6 * SECOND, 1.0)
    settings = SimulationSettings(motion="still", traces={0: tmp_path / "0.trace"}, playhead=tmp_path / "playhead")
    assert make_servo(0, settings).position_rad == 1.0
    assert make_servo(1, settings).motion is None


@pytest.mark.parametrize("family", ["feetech_sts", "dynamixel2", "damiao", "rmd_x"])
def test_a_trace_leads_the_motors_of_a_bus(family: str, tmp_path: Path) -> None:
    rows(0, 10 * MS).tofile(tmp_path / "0.trace")
    playhead = Playhead.make(tmp_path / "playhead", 0, 1e9)
    settings = SimulationSettings(traces={0: tmp_path / "0.trace"}, playhead=tmp_path / "playhead")
    bus = build_bus([Motor(0, "joint1", family, 1)], settings, now=0)  # type: ignore[arg-type]  # a MonotonicNs
    assert bus.motors[0].servo.measured_rad == 0.0
    playhead.toggle()  # and so fast that it is behind the last row at once
    bus.advance(SECOND)  # type: ignore[arg-type]
    assert bus.motors[0].servo.measured_rad == 1.0
