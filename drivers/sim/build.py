"""Simulated motors from a description of real ones: a bus of them, and their faults from a file."""

import logging
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import pi
from pathlib import Path
from typing import Any, Literal

from drivers import protocols
from drivers.clock import MonotonicNs
from drivers.motor import Motor
from drivers.sim.bus import SimulatedBus
from drivers.sim.responder import Faults, SimulatedMotor
from drivers.sim.servo import Servo, ServoLimits, wave

log = logging.getLogger(__name__)

MOST_DELAY_MS = 10_000.0


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """How simulated motors behave until somebody orders otherwise. Limits by ``Motor.index``; others get defaults."""

    motion: Literal["wave", "still"] = "wave"
    enabled: bool = True
    position_rad: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    velocity_rad_s: Mapping[int, float] = field(default_factory=dict)


def build_bus(motors: Sequence[Motor], settings: SimulationSettings, now: MonotonicNs) -> SimulatedBus[Any]:
    """One bus with ``motors`` on it. Raises ValueError if they cannot share one."""
    media = {motor.name: protocols.load(motor.family).medium for motor in motors}
    if len(set(media.values())) > 1:
        raise ValueError(f"motors of one bus need one medium: {media}")
    by_family: dict[str, list[SimulatedMotor]] = {}
    for motor in motors:
        by_family.setdefault(motor.family, []).append(SimulatedMotor(motor, make_servo(motor.index, settings)))
    return SimulatedBus([protocols.load_responder(name)(members) for name, members in by_family.items()], now)


def make_servo(index: int, settings: SimulationSettings) -> Servo:
    """The servo of the ``index``-th joint: waves of all joints differ in period and phase, and stay within limits."""
    low, high = settings.position_rad.get(index, (-pi, pi))
    velocity_rad_s = settings.velocity_rad_s.get(index, 5.0)
    servo = Servo(ServoLimits(position_rad=(low, high), velocity_rad_s=velocity_rad_s), enabled=settings.enabled)
    servo.position_rad = servo.goal_rad = min(max(0.0, low), high)
    if settings.motion == "wave":
        period_s = 4.0 + 0.7 * index
        fastest_rad = 0.5 * velocity_rad_s * period_s / (2 * pi)  # half the speed that the joint may have
        amplitude_rad = min(0.4 * (high - low), 0.8, fastest_rad)
        servo.motion = wave(amplitude_rad, period_s, index * pi / 3, centre_rad=(low + high) / 2)
        servo.position_rad = servo.motion(0.0)
    return servo


def apply_faults(motors: Iterable[SimulatedMotor], faults: Mapping[str, Any], elsewhere: Collection[str] = ()) -> None:
    """Give each motor exactly the faults that ``faults`` lists: ``{"joint3": {"silent": True, "delay_ms": 5}}``.

    ``elsewhere`` are names of motors on other buses, to be passed over. Raises ValueError naming all that is wrong,
    and then changes nothing.
    """
    by_name = {simulated.motor.name: simulated for simulated in motors}
    wrong: list[str] = []
    wanted = {name: _parse(name, faults.get(name, {}), wrong) for name in by_name}
    wrong += [
        f"{name}: no such motor, known are {', '.join(sorted({*by_name, *elsewhere}))}"
        for name in faults
        if name not in by_name and name not in elsewhere
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    for name, simulated in by_name.items():
        simulated.faults = wanted[name]


def _parse(name: str, entry: object, wrong: list[str]) -> Faults:
    faults = Faults()
    if not isinstance(entry, Mapping):
        wrong.append(f"{name} is {entry!r}; it must be a table of silent and delay_ms")
        return faults
    for key, value in entry.items():
        match key, value:
            case "silent", bool():
                faults.silent = value
            case "delay_ms", int() | float() if not isinstance(value, bool) and 0 <= value <= MOST_DELAY_MS:
                faults.delay_ms = float(value)
            case "silent", _:
                wrong.append(f"{name}.silent is {value!r}; it must be true or false")
            case "delay_ms", _:
                wrong.append(f"{name}.delay_ms is {value!r}; it must be a number from 0 to {MOST_DELAY_MS:.0f}")
            case _:
                wrong.append(f"{name}.{key}: no such fault, known are silent, delay_ms")
    return faults


class FaultsFile:
    """Faults of simulated motors in a TOML file that may be written, changed and deleted while they run.

        [joint3]
        delay_ms = 5

    ``poll`` is for a host's ``housekeeping``: it looks at the file and rereads it only when it has changed. Without
    the file there are no faults; a file that cannot be used changes nothing, and is logged once.
    """

    def __init__(self, path: Path, motors: Sequence[SimulatedMotor], elsewhere: Collection[str] = ()) -> None:
        self._path = path
        self._motors = motors
        self._elsewhere = elsewhere
        self._seen: tuple[int, int, int] | None = None

    def poll(self) -> None:
        """Take up the file as it is now."""
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            faults = tomllib.loads(self._path.read_text(encoding="utf-8")) if seen else {}
            apply_faults(self._motors, faults, self._elsewhere)
        except (OSError, ValueError) as error:  # tomllib's and UnicodeDecodeError are ValueErrors
            log.warning("%s: %s; the faults stay as they are", self._path, error)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size  # a second write within one tick of mtime shows in these
