"""The main job with real processes and a real broker: every sample, once, in order, whatever happens around it.

``python -m hil.acceptance`` runs the same scenarios for longer.
"""

import os
import signal
from math import pi

import numpy as np
import pytest

from drivers import protocols
from drivers.clock import SECOND
from drivers.sim.build import SimulationSettings, make_servo
from gateway import config
from hil import families
from hil.acceptance import MOMENTS, Phase, kills, outage, proof, rate_hz, steady
from hil.arm import MOTORS, Arm
from hil.judge import Sample
from hil.kafka import Broker
from tests.conftest import Kafka
from tests.system.conftest import MakeArm
from tests.system.rig import events, pass_time, wait_event

pytestmark = pytest.mark.at_full_rate

RATE_KEPT = 0.8  # of the undisturbed rate of the same run
STS = ("joint4", "joint5", "joint6")
CAN = ("joint1", "joint2", "joint3")


@pytest.mark.parametrize(("encoding", "seconds"), [("protobuf", 8), ("json", 3)])
def test_a_run_is_complete_and_shows_the_motion(kafka: Kafka, make_arm: MakeArm, encoding: str, seconds: float) -> None:
    arm = make_arm(kafka.bootstrap, encoding=encoding)
    proven = steady(arm, seconds)
    assert not proven.faults
    motors = [(partition.partition, partition.motor) for partition in proven.verdict.partitions]
    assert motors == list(enumerate(MOTORS))
    for motor, samples in proven.samples.items():
        _follows_the_wave(arm, motor, samples)


def test_all_families_at_once_are_complete_and_show_the_motion(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap, sample=families.CONFIG)
    proven = steady(arm, 5)
    assert not proven.faults
    assert {arm.families[motor] for motor in proven.samples} == set(protocols.family_names())
    for motor, samples in proven.samples.items():
        _follows_the_wave(arm, motor, samples)


def _follows_the_wave(arm: Arm, motor: str, samples: list[Sample]) -> None:
    """Positions lie on the joint's sine, whenever it began; velocities are their derivative."""
    joint = next(joint for joint in config.load(arm.config).motors if joint.name == motor)
    index, low_high = joint.partition, joint.position_rad
    settings = SimulationSettings("wave", True, {index: low_high}, {index: joint.velocity_rad_s})
    motion = make_servo(index, settings).motion
    assert callable(motion)
    path = [motion(at_s) for at_s in np.arange(0, 10, 0.01)]
    amplitude_rad = (max(path) - min(path)) / 2
    turn_rad_s = 2 * pi / (4.0 + 0.7 * index)

    at_s = np.array([sample.sampled_at_ns - samples[0].sampled_at_ns for sample in samples]) / SECOND
    position_rad = np.array([sample.position_rad for sample in samples])
    velocity_rad_s = np.array([sample.velocity_rad_s for sample in samples])
    waves = np.stack([np.sin(turn_rad_s * at_s), np.cos(turn_rad_s * at_s), np.ones_like(at_s)], axis=1)
    (sine, cosine, centre_rad), *_ = np.linalg.lstsq(waves, position_rad)
    assert np.hypot(sine, cosine) == pytest.approx(amplitude_rad, rel=0.1)
    assert centre_rad == pytest.approx(sum(low_high) / 2, abs=0.1)
    off_rad = np.abs(position_rad - waves @ [sine, cosine, centre_rad])
    assert np.quantile(off_rad, 0.95) < 0.05, f"{motor} does not follow its wave"

    span = 10  # samples to both sides; single steps are of the size of an encoder's
    slope_rad_s = (position_rad[2 * span :] - position_rad[: -2 * span]) / (at_s[2 * span :] - at_s[: -2 * span])
    wrong_rad_s = np.abs(slope_rad_s - velocity_rad_s[span:-span])
    assert np.quantile(wrong_rad_s, 0.95) < 0.15, f"{motor}: velocity is not the derivative of position"


def test_a_broker_that_comes_later_gets_everything(own_broker: Broker, make_arm: MakeArm) -> None:
    own_broker.stop()
    arm = make_arm(own_broker.bootstrap)
    arm.start()
    _, began_at_ns = pass_time(2)
    own_broker.start()
    arm.wait_caught_up()
    arm.stop()
    proven = proof("late broker", arm, {})
    assert not proven.faults
    for motor in MOTORS:
        assert proven.samples[motor][0].sampled_at_ns < began_at_ns, "what came before the broker is there"


def test_an_outage_of_the_broker_costs_no_sample_and_no_rate(own_broker: Broker, make_arm: MakeArm) -> None:
    proven = outage(make_arm(own_broker.bootstrap), own_broker, before_s=2, down_s=5, after_s=3)
    assert not proven.faults
    assert set(proven.rates_hz) == {"before", "during", "after"}


def test_a_gateway_that_is_killed_again_and_again_goes_on_without_gap_or_repeat(
    own_broker: Broker, make_arm: MakeArm
) -> None:
    proven = kills(make_arm(own_broker.bootstrap), own_broker, MOMENTS, seed=20)
    assert not proven.faults
    assert proven.verdict.streams == 1


def test_a_silent_motor_is_told_and_delays_nobody(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap)
    arm.start()
    before = Phase(*pass_time(2))
    arm.silence("joint5")
    offline = wait_event(arm, "motor.offline", "joint5")
    silent = Phase(*pass_time(2))
    arm.silence()
    wait_event(arm, "motor.online", "joint5", count=2)
    again = Phase(*pass_time(1))
    arm.stop()
    proven = proof("silent motor", arm, {})
    assert not proven.faults, "its sequence numbers go on without a gap"
    last_heard_ns = max(s.sampled_at_ns for s in proven.samples["joint5"] if s.sampled_at_ns < silent.from_ns)
    assert offline["last_sampled_at_ns"] == last_heard_ns
    assert offline["at_ns"] - last_heard_ns <= SECOND
    assert rate_hz(proven.samples["joint5"], silent) == 0
    assert rate_hz(proven.samples["joint5"], again) > 0
    for motor in set(MOTORS) - {"joint5"}:
        assert rate_hz(proven.samples[motor], silent) >= RATE_KEPT * rate_hz(proven.samples[motor], before), motor
        assert not events(arm, "motor.offline", motor)


def test_a_killed_bus_worker_is_replaced_and_the_other_bus_goes_on(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap)
    arm.start()
    before = Phase(*pass_time(2))
    killed = arm.worker_of("serial0")
    os.kill(killed, signal.SIGKILL)
    offline = {motor: wait_event(arm, "motor.offline", motor) for motor in STS}
    online = {motor: wait_event(arm, "motor.online", motor, count=2) for motor in STS}
    assert arm.worker_of("serial0") != killed
    after_kill = Phase(before.to_ns, pass_time(1)[1])
    arm.stop()
    proven = proof("killed worker", arm, {})
    assert not proven.faults
    for motor in CAN:
        samples = proven.samples[motor]
        assert rate_hz(samples, after_kill) >= RATE_KEPT * rate_hz(samples, before), motor
        assert not events(arm, "motor.offline", motor)
    for motor in STS:
        times = [sample.sampled_at_ns for sample in proven.samples[motor]]
        assert times[-1] > online[motor]["at_ns"] > offline[motor]["at_ns"] >= offline[motor]["last_sampled_at_ns"]
