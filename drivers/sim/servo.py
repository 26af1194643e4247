"""A servo motor's physics: inertia, limits, heat. Stepped by an explicit dt; knows no protocol and no clock."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from math import copysign, isfinite, pi, sin, sqrt

from drivers.sim.trace import Trace

Motion = Callable[[float], float]
"""A path in time: seconds since its start -> rad."""


def wave(amplitude_rad: float, period_s: float, phase_rad: float, centre_rad: float = 0.0) -> Motion:
    """A sine, for motors that should be seen to move."""
    return lambda t_s: centre_rad + amplitude_rad * sin(2 * pi * t_s / period_s + phase_rad)


@dataclass(frozen=True, slots=True)
class ServoLimits:
    """What the mechanics can do; defaults resemble a small geared arm joint."""

    position_rad: tuple[float, float] = (-pi, pi)  # mechanical end stops
    velocity_rad_s: float = 5.0
    acceleration_rad_s2: float = 60.0  # peak torque over inertia
    inertia_kg_m2: float = 0.02
    friction_nm: float = 0.2
    nm_per_a: float = 0.5
    ambient_c: float = 25.0
    heating_c_per_a2_s: float = 0.6  # of the winding
    cooling_per_s: float = 0.02
    brownout_v: float = 5.0  # with less than this its electronics are off


class Drive(Enum):
    """What the servo's loop follows."""

    POSITION = auto()
    VELOCITY = auto()
    TORQUE = auto()


@dataclass(slots=True)
class Servo:
    """State and goals of one servo. A client's order sets ``enabled`` and a goal; ``step`` does the rest.

    Until its first order it may follow ``motion``, as if another master had set it going, so that a demonstration
    has something to show; or a trace, which leaves nothing to its physics. ``take_over`` ends that.
    """

    limits: ServoLimits = field(default_factory=ServoLimits)
    motion: Motion | Trace | None = None
    enabled: bool = False
    position_rad: float = 0.0
    velocity_rad_s: float = 0.0
    torque_nm: float = 0.0
    temperature_c: float = 25.0
    voltage_v: float = 12.0
    drive: Drive = Drive.POSITION
    goal_rad: float = 0.0
    goal_velocity_rad_s: float = 5.0  # of the approach (positive), or to turn at; the mechanical limit still holds
    goal_torque_nm: float = 0.0
    time_s: float = 0.0
    stuck_rad: float | None = None  # what a stuck encoder goes on telling

    @property
    def current_a(self) -> float:
        """Motor current, signed like the torque."""
        return self.torque_nm / self.limits.nm_per_a

    @property
    def measured_rad(self) -> float:
        """The position that its encoder tells."""
        return self.position_rad if self.stuck_rad is None else self.stuck_rad

    @property
    def moving(self) -> bool:
        """Whether the shaft turns noticeably."""
        return abs(self.velocity_rad_s) > 0.01  # slower is standing still

    def take_over(self) -> None:
        """A client commands this motor from now on: hold where it is, unless told otherwise."""
        if self.motion is not None:
            self.motion = None
            self.hold()

    def hold(self) -> None:
        """Stay where it is."""
        self.move_to(self.position_rad, self.limits.velocity_rad_s)

    def enable(self) -> None:
        """Switch the torque on, holding the present position."""
        self.take_over()
        if not self.enabled:
            self.enabled = True
            self.hold()

    def disable(self) -> None:
        """Switch the torque off; friction brings the shaft to rest."""
        self.take_over()
        self.enabled = False

    def move_to(self, goal_rad: float, velocity_rad_s: float) -> None:
        """Set the goal of the position loop; has an effect only while enabled."""
        self.take_over()
        self.drive = Drive.POSITION
        self.goal_rad = goal_rad
        self.goal_velocity_rad_s = abs(velocity_rad_s)

    def turn_at(self, velocity_rad_s: float) -> None:
        """Turn at this velocity, until told otherwise; has an effect only while enabled."""
        self.take_over()
        self.drive = Drive.VELOCITY
        self.goal_velocity_rad_s = velocity_rad_s

    def push(self, torque_nm: float) -> None:
        """Push with this torque, until told otherwise; has an effect only while enabled."""
        self.take_over()
        self.drive = Drive.TORQUE
        self.goal_torque_nm = torque_nm

    def step(self, dt_s: float) -> None:
        """Advance by ``dt_s``, in slices of at most a millisecond. A trace brings a time of its own."""
        if isinstance(self.motion, Trace):
            self._live_through(self.motion)
            return
        slices = max(1, round(dt_s / 0.001))
        for _ in range(slices):
            self._slice(dt_s / slices)

    def _live_through(self, trace: Trace) -> None:
        _, self.position_rad, self.velocity_rad_s, temperature_c, voltage_v, current_a, torque_nm = trace.now().item()
        if not isfinite(torque_nm):  # a motor tells its current or its torque
            torque_nm = current_a * self.limits.nm_per_a
        self.torque_nm = torque_nm if isfinite(torque_nm) else 0.0
        self.temperature_c = temperature_c if isfinite(temperature_c) else self.temperature_c
        self.voltage_v = voltage_v if isfinite(voltage_v) else self.voltage_v

    def _slice(self, dt_s: float) -> None:
        limits = self.limits
        self.time_s += dt_s
        low, high = limits.position_rad
        driven = self.enabled or self.motion is not None
        wanted, most = self._wanted(dt_s) if driven else (0.0, limits.friction_nm / limits.inertia_kg_m2)
        change = min(max(wanted - self.velocity_rad_s, -most * dt_s), most * dt_s)
        self.velocity_rad_s += change
        self.position_rad += self.velocity_rad_s * dt_s
        if not low <= self.position_rad <= high:
            self.position_rad = min(max(self.position_rad, low), high)
            self.velocity_rad_s = 0.0
        friction = copysign(limits.friction_nm, self.velocity_rad_s) if self.moving else 0.0
        self.torque_nm = limits.inertia_kg_m2 * change / dt_s + friction if driven else 0.0
        self.temperature_c += dt_s * (
            limits.heating_c_per_a2_s * self.current_a**2
            - limits.cooling_per_s * (self.temperature_c - limits.ambient_c)
        )

    def _wanted(self, dt_s: float) -> tuple[float, float]:
        """The velocity that the loop wants now (rad/s), and how fast it may change (rad/s2)."""
        limits = self.limits
        fastest = limits.velocity_rad_s
        if self.motion is not None and not isinstance(self.motion, Trace):
            return self._approach(self.motion(self.time_s), fastest, dt_s), limits.acceleration_rad_s2
        match self.drive:
            case Drive.POSITION:
                speed = min(fastest, self.goal_velocity_rad_s)
                return self._approach(self.goal_rad, speed, dt_s), limits.acceleration_rad_s2
            case Drive.VELOCITY:
                return min(max(self.goal_velocity_rad_s, -fastest), fastest), limits.acceleration_rad_s2
            case Drive.TORQUE:
                left_nm = abs(self.goal_torque_nm) - limits.friction_nm  # what is left to accelerate
                if left_nm > 0:
                    return copysign(fastest, self.goal_torque_nm), left_nm / limits.inertia_kg_m2
                return 0.0, -left_nm / limits.inertia_kg_m2

    def _approach(self, goal_rad: float, speed_rad_s: float, dt_s: float) -> float:
        """The highest speed from which half the acceleration brakes in time, and never past the goal in a slice."""
        low, high = self.limits.position_rad
        error = min(max(goal_rad, low), high) - self.position_rad
        braking = sqrt(abs(error) * self.limits.acceleration_rad_s2)
        return copysign(min(speed_rad_s, braking, abs(error) / dt_s), error)
