"""The seam between a simulated bus and a family's simulated motors: units in, replies out, no I/O, no clock."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic

from drivers.family import W
from drivers.motor import Motor
from drivers.sim.servo import Servo


@dataclass(slots=True)
class Faults:
    """What is wrong with a simulated motor just now; may be changed while it runs."""

    silent: bool = False  # takes requests, answers none: a broken reply line
    delay_ms: float = 0.0  # every reply comes this much later


@dataclass(slots=True)
class SimulatedMotor:
    """One motor on a simulated bus: its address, its physics, its faults."""

    motor: Motor
    servo: Servo
    faults: Faults = field(default_factory=Faults)


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


def as_byte(value: float) -> int:
    """A quantity as a register of one unsigned byte can tell it."""
    return min(max(round(value), 0), 0xFF)
