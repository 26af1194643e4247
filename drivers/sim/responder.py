"""The seam between a simulated bus and a family's simulated motors: units in, replies out, no I/O, no clock.

What may be wrong with a motor of any family is told in ``Faults`` and played by ``drivers.sim.bus``; a responder
takes part in three of them: it answers under ``SimulatedMotor.reply_id``, tells ``Servo.measured_rad``, and can
``reboot`` a motor.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic

from drivers.clock import MonotonicNs
from drivers.family import W
from drivers.motor import Motor
from drivers.sim.servo import Servo


@dataclass(slots=True)
class Faults:
    """What is wrong with a simulated motor just now; may be changed while it runs."""

    silent: bool = False  # takes requests, answers none: a broken reply line
    delay_ms: float = 0.0  # every reply comes this much later
    drop: float = 0.0  # share of replies that are lost on the way
    corrupt: float = 0.0  # share of replies in which a bit is wrong
    wrong_id: int | None = None  # the address that it answers under
    stuck_encoder: bool = False  # the position that it tells stays as it is
    temperature_c: float | None = None  # of the motor, whatever it does: overheating
    voltage_v: float | None = None  # of its supply; below ``ServoLimits.brownout_v`` it is off, and reboots when back
    reboot: bool = False  # once, when this becomes true


@dataclass(slots=True)
class SimulatedMotor:
    """One motor on a simulated bus: its address, its physics, its faults."""

    motor: Motor
    servo: Servo
    faults: Faults = field(default_factory=Faults)

    @property
    def reply_id(self) -> int:
        """The address that its replies bear: its own, unless that is its fault."""
        return self.motor.bus_id if self.faults.wrong_id is None else self.faults.wrong_id


class Responder(ABC, Generic[W]):
    """The simulated motors of one family on one bus: registers, object dictionaries, modes."""

    def __init__(self, motors: Sequence[SimulatedMotor]) -> None:
        self.motors = {simulated.motor.bus_id: simulated for simulated in motors}

    @abstractmethod
    def respond(self, unit: W) -> Iterable[tuple[SimulatedMotor, W]]:
        """Replies to ``unit``, in the order in which they leave the motors, each with the motor that sends it.

        A serial responder keeps half a packet for the next call and skips garbage. The physics has been stepped
        to the present before the call; a responder reads ``servo`` and sets its goals, never its state.
        """

    @abstractmethod
    def reboot(self, simulated: SimulatedMotor) -> None:
        """The motor's power was gone and is back: what it keeps in RAM is as at power-up, its torque is off."""

    def tick(self, now: MonotonicNs) -> Iterable[tuple[SimulatedMotor, W]]:  # noqa: ARG002  for those that override it
        """What motors send by themselves, such as heartbeats; called about every 20 ms, and before each request."""
        return ()

    def return_delay_ns(self, simulated: SimulatedMotor) -> int:  # noqa: ARG002  for those that override it
        """How long this motor waits before it replies, as its registers are set; used where wire time is simulated."""
        return 0


def as_byte(value: float) -> int:
    """A quantity as a register of one unsigned byte can tell it."""
    return min(max(round(value), 0), 0xFF)
