"""How far apart simulated motors take goals that were meant for one moment, by the arrival of units on the wire."""

from typing import Any

from drivers.clock import MonotonicNs
from drivers.sim.bus import SimulatedBus
from drivers.sim.servo import Servo


class GoalTimes:
    """When each motor of a bus has last taken a new goal: ``at_ns`` by the motor's index, since ``clear``."""

    def __init__(self, bus: SimulatedBus[Any]) -> None:
        self.at_ns: dict[int, MonotonicNs] = {}
        self._servos = {simulated.motor.index: simulated.servo for simulated in bus.motors}
        self._goals = {index: _goal(servo) for index, servo in self._servos.items()}
        bus.watch = self._note

    def clear(self) -> None:
        """Forget what was taken so far."""
        self.at_ns.clear()

    @property
    def spread_ns(self) -> int:
        """From the first motor to the last; 0 for fewer than two."""
        return max(self.at_ns.values(), default=0) - min(self.at_ns.values(), default=0)

    def _note(self, arrived: MonotonicNs) -> None:
        for index, servo in self._servos.items():
            if (goal := _goal(servo)) != self._goals[index]:
                self._goals[index], self.at_ns[index] = goal, arrived


def _goal(servo: Servo) -> tuple[object, ...]:
    return servo.drive, servo.goal_rad, servo.goal_velocity_rad_s, servo.goal_torque_nm
