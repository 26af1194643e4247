"""A servo motor's physics: inertia, limits, heat. Stepped by an explicit dt; knows no protocol and no clock."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import copysign, pi, sin, sqrt

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


@dataclass(slots=True)
class Servo:
    """State and goals of one servo. A client's order sets ``enabled`` and ``goal_rad``; ``step`` does the rest.

    Until its first order it may follow ``motion``, as if another master had set it going, so that a demonstration
    has something to show. ``take_over`` ends that.
    """

    limits: ServoLimits = field(default_factory=ServoLimits)
    motion: Motion | None = None
    enabled: bool = False
    position_rad: float = 0.0
    velocity_rad_s: float = 0.0
    torque_nm: float = 0.0
    temperature_c: float = 25.0
    voltage_v: float = 12.0
    goal_rad: float = 0.0
    goal_velocity_rad_s: float = 5.0  # speed of the approach; the mechanical limit still holds
    time_s: float = 0.0

    @property
    def current_a(self) -> float:
        """Motor current, signed like the torque."""
        return self.torque_nm / self.limits.nm_per_a

    @property
    def moving(self) -> bool:
        """Whether the shaft turns noticeably."""
        return abs(self.velocity_rad_s) > 0.01  # slower is standing still

    def take_over(self) -> None:
        """A client commands this motor from now on: hold where it is, unless told otherwise."""
        if self.motion is not None:
            self.motion = None
            self.goal_rad = self.position_rad

    def enable(self) -> None:
        """Switch the torque on, holding the present position."""
        self.take_over()
        if not self.enabled:
            self.enabled = True
            self.goal_rad = self.position_rad

    def disable(self) -> None:
        """Switch the torque off; friction brings the shaft to rest."""
        self.take_over()
        self.enabled = False

    def move_to(self, goal_rad: float, velocity_rad_s: float) -> None:
        """Set the goal of the position loop; has an effect only while enabled."""
        self.take_over()
        self.goal_rad = goal_rad
        self.goal_velocity_rad_s = abs(velocity_rad_s)

    def step(self, dt_s: float) -> None:
        """Advance by ``dt_s``, in slices of at most a millisecond."""
        slices = max(1, round(dt_s / 0.001))
        for _ in range(slices):
            self._slice(dt_s / slices)

    def _slice(self, dt_s: float) -> None:
        limits = self.limits
        self.time_s += dt_s
        goal, speed_limit = self.goal_rad, min(limits.velocity_rad_s, self.goal_velocity_rad_s)
        if self.motion is not None:
            goal, speed_limit = self.motion(self.time_s), limits.velocity_rad_s
        low, high = limits.position_rad
        driven = self.enabled or self.motion is not None
        if driven:
            error = min(max(goal, low), high) - self.position_rad
            # the highest speed from which half the acceleration brakes in time, and never past the goal in a slice
            wanted = copysign(min(speed_limit, sqrt(abs(error) * limits.acceleration_rad_s2), abs(error) / dt_s), error)
            most = limits.acceleration_rad_s2
        else:
            wanted, most = 0.0, limits.friction_nm / limits.inertia_kg_m2
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
