"""A simulated bus: brings the physics up to date, asks the motors, and applies their faults to the replies."""

from collections.abc import Sequence
from typing import Generic

from drivers.clock import MS, SECOND, MonotonicNs
from drivers.family import W
from drivers.sim.responder import Responder, SimulatedMotor

_INSTANT_NS = 200_000  # requests of one cycle, closer together than this, see the same instant


class SimulatedBus(Generic[W]):
    """Motors of one or several families behind one bus. Not thread safe: one host drives it."""

    def __init__(self, responders: Sequence[Responder[W]], now: MonotonicNs) -> None:
        self._responders: Sequence[Responder[W]] = responders
        self._now = now

    @property
    def motors(self) -> list[SimulatedMotor]:
        """All motors on this bus."""
        return [motor for responder in self._responders for motor in responder.motors.values()]

    def reboot(self, simulated: SimulatedMotor) -> None:
        """Take the motor's power away and give it back."""
        for responder in self._responders:
            if simulated in responder.motors.values():
                responder.reboot(simulated)

    def respond(self, unit: W, now: MonotonicNs) -> list[tuple[MonotonicNs, W]]:
        """Replies to ``unit`` that arrived at ``now``, each with the time at which it leaves its motor."""
        return self.advance(now) + [
            (MonotonicNs(now + int(simulated.faults.delay_ms * MS)), reply)
            for responder in self._responders
            for simulated, reply in responder.respond(unit)
            if not simulated.faults.silent
        ]

    def advance(self, now: MonotonicNs) -> list[tuple[MonotonicNs, W]]:
        """Bring the physics up to ``now``; what motors send by themselves, as ``respond`` does with replies.

        Hosts call it while nobody talks: no request then waits for it.
        """
        if now - self._now < _INSTANT_NS:
            return []
        # a bus that nobody talked to for long need not be computed slice by slice
        dt_s = min((now - self._now) / SECOND, 2.0)
        self._now = now
        for simulated in self.motors:
            simulated.servo.step(dt_s)
        return [
            (now, unit)
            for responder in self._responders
            for simulated, unit in responder.tick(now)
            if not simulated.faults.silent
        ]
