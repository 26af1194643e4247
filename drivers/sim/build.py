"""Simulated motors from a description of real ones: a bus of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import pi
from pathlib import Path
from typing import Any, Literal

from drivers import protocols
from drivers.clock import MonotonicNs
from drivers.motor import Motor
from drivers.sim.bus import SimulatedBus
from drivers.sim.responder import SimulatedMotor
from drivers.sim.servo import Servo, ServoLimits, wave
from drivers.sim.trace import Playhead, Trace


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """How a bus of simulated motors behaves until somebody orders otherwise.

    Limits and traces by ``Motor.index``; others get defaults. ``traces``: files that these motors live through, at the
    time that ``playhead`` tells. ``bits_per_s``: of the wire, whose time is simulated; 0: whatever is
    sent arrives at once. ``turnaround_ns``: from a request's last bit to the reply's first, beside the motor's own
    return delay; counts on a wire with time only. ``seed``: of the faults that strike at random.
    """

    motion: Literal["wave", "still"] = "wave"
    enabled: bool = True
    position_rad: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    velocity_rad_s: Mapping[int, float] = field(default_factory=dict)
    traces: Mapping[int, Path] = field(default_factory=dict)
    playhead: Path | None = None
    bits_per_s: int = 0
    turnaround_ns: int = 0
    seed: int = 0


def build_bus(
    motors: Sequence[Motor], settings: SimulationSettings, now: MonotonicNs, name: str = ""
) -> SimulatedBus[Any]:
    """One bus with ``motors`` on it. Raises ValueError if they cannot share one."""
    media = {motor.name: protocols.load(motor.family).medium for motor in motors}
    if len(set(media.values())) > 1:
        raise ValueError(f"motors of one bus need one medium: {media}")
    by_family: dict[str, list[SimulatedMotor]] = {}
    for motor in motors:
        by_family.setdefault(motor.family, []).append(SimulatedMotor(motor, make_servo(motor.index, settings)))
    return SimulatedBus(
        [protocols.load_responder(family)(members) for family, members in by_family.items()],
        now,
        name=name,
        bits_per_s=settings.bits_per_s,
        turnaround_ns=settings.turnaround_ns,
        seed=settings.seed,
    )


def make_servo(index: int, settings: SimulationSettings) -> Servo:
    """The servo of the ``index``-th joint: waves of all joints differ in period and phase, and stay within limits."""
    low, high = settings.position_rad.get(index, (-pi, pi))
    velocity_rad_s = settings.velocity_rad_s.get(index, 5.0)
    servo = Servo(ServoLimits(position_rad=(low, high), velocity_rad_s=velocity_rad_s), enabled=settings.enabled)
    servo.position_rad = servo.goal_rad = min(max(0.0, low), high)
    if settings.playhead and index in settings.traces:
        servo.motion = Trace.load(settings.traces[index], Playhead(settings.playhead))
        servo.step(0.0)
    elif settings.motion == "wave":
        period_s = 4.0 + 0.7 * index
        fastest_rad = 0.5 * velocity_rad_s * period_s / (2 * pi)  # half the speed that the joint may have
        amplitude_rad = min(0.4 * (high - low), 0.8, fastest_rad)
        servo.motion = wave(amplitude_rad, period_s, index * pi / 3, centre_rad=(low + high) / 2)
        servo.position_rad = servo.motion(0.0)
    return servo
