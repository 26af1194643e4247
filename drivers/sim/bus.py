"""A simulated bus: brings the physics up to date, passes requests to the motors, and plays what is wrong with them.

client -> Wire -> Responder (every family on the bus) -> faults -> Wire -> client

Time is what the caller says. A host asks ``advance`` again at ``next_ns``: until a unit starts, another that is offered
in between may still go ahead of it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from random import Random
from typing import Final, Generic

from drivers.clock import MS, SECOND, MonotonicNs
from drivers.family import CanFrame, W
from drivers.sim.responder import Responder, SimulatedMotor
from drivers.sim.wire import Wire

BOOT_NS: Final = 300 * MS  # a motor whose power comes back answers nothing for so long
_INSTANT_NS = 200_000  # requests of one cycle, closer together than this, see the same instant
_MOST_ERRORS = 100


class CanError(IntFlag):
    """What a CAN controller reports of the bus: classes of error frames (linux/can/error.h)."""

    PROTOCOL = 0x008
    BUS_OFF = 0x040
    BUS_ERROR = 0x080
    RESTARTED = 0x100


@dataclass(slots=True)
class BusFaults:
    """What is wrong with a simulated bus as a whole just now."""

    bus_off: bool = False  # CAN: the client's controller has switched itself off, and nothing passes


@dataclass(slots=True)
class _Played:
    """What the faults of one motor have done to it, to be undone when they end."""

    off: bool = False
    boot_ns: int = 0  # when it is up after a reboot
    reboot: bool = False
    stuck: bool = False
    supply_v: float | None = None  # what it had before


class SimulatedBus(Generic[W]):
    """Motors of one or several families behind one bus. Not thread safe: one host drives it.

    ``turnaround_ns`` is added to each motor's own return delay; ``seed`` makes the faults that strike at random
    strike again the same way.
    """

    def __init__(
        self,
        responders: Sequence[Responder[W]],
        now: MonotonicNs,
        *,
        name: str = "",
        bits_per_s: int = 0,
        turnaround_ns: int = 0,
        seed: int = 0,
    ) -> None:
        self._responders: Sequence[Responder[W]] = responders
        self._now = now
        self.name = name
        self.faults = BusFaults()
        self.errors: deque[CanError] = deque(maxlen=_MOST_ERRORS)
        """What the client's CAN controller would report, for the host to pass on."""
        self.watch: Callable[[MonotonicNs], None] | None = None
        """Called with the arrival of each request, when all motors have taken it: for measurements."""
        self._wire: Wire[W] = Wire(bits_per_s)
        self.timed = bits_per_s > 0
        self._turnaround_ns = turnaround_ns
        self._random = Random(f"{seed} {name}")  # noqa: S311  faults, not secrets
        self._members: list[tuple[Responder[W], SimulatedMotor]] = [
            (responder, motor) for responder in responders for motor in responder.motors.values()
        ]
        self._played = {id(motor): _Played() for _, motor in self._members}
        self._bus_is_off = False

    @property
    def motors(self) -> list[SimulatedMotor]:
        """All motors on this bus."""
        return [motor for _, motor in self._members]

    def reboot(self, simulated: SimulatedMotor) -> None:
        """Take the motor's power away and give it back."""
        for responder, motor in self._members:
            if motor is simulated:
                responder.reboot(simulated)

    def respond(self, unit: W, now: MonotonicNs) -> list[tuple[MonotonicNs, W]]:
        """The client sends ``unit``; what ``advance`` then brings."""
        if not self.faults.bus_off:
            self._wire.request(unit, now)
        return self.advance(now)

    def advance(self, now: MonotonicNs) -> list[tuple[MonotonicNs, W]]:
        """Bring everything up to ``now``: what motors have begun to send by then, and when it arrives.

        Hosts call it while nobody talks, too: no request then waits for the physics.
        """
        arriving = self._carry(now)
        if self._step(now):
            arriving += self._carry(now)  # what motors send by themselves
        return arriving

    @property
    def next_ns(self) -> MonotonicNs | None:
        """When ``advance`` has something to bring, unless somebody sends something until then; None: nothing."""
        return self._wire.next_ns

    # -- the wire ------------------------------------------------------------------------------------------------

    def _carry(self, now: MonotonicNs) -> list[tuple[MonotonicNs, W]]:
        arriving: list[tuple[MonotonicNs, W]] = []
        while passed := self._wire.carry(now):
            arrived, turn = passed
            if turn.sender is None:
                self._step(arrived)
                for responder in self._responders:
                    for sender, unit in responder.respond(turn.unit):
                        delay_ns = responder.return_delay_ns(sender) + self._turnaround_ns if self.timed else 0
                        self._send(sender, unit, arrived + delay_ns)
                if self.watch:
                    self.watch(arrived)
            elif not turn.lost:
                arriving.append((arrived, turn.unit))
        return arriving

    def _send(self, sender: SimulatedMotor, unit: W, ready: int) -> None:
        """A motor's unit, with the faults that strike it on the way."""
        faults = sender.faults
        if faults.silent or self._played[id(sender)].off or self.faults.bus_off:
            return
        lost = self._strikes(faults.drop)
        if self._strikes(faults.corrupt):
            unit, destroyed = self._damage(unit)
            lost = lost or destroyed
        self._wire.reply(unit, sender, ready + round(faults.delay_ms * MS), lost=lost)

    def _strikes(self, share: float) -> bool:
        return share > 0 and self._random.random() < share

    def _damage(self, unit: W) -> tuple[W, bool]:
        """The unit as it arrives, and whether it does: a CAN controller drops what its CRC finds wrong, and says so."""
        if isinstance(unit, CanFrame):
            self.errors.append(CanError.PROTOCOL | CanError.BUS_ERROR)
            return unit, True
        at = self._random.randrange(len(unit))
        if self._random.random() < 0.5:
            return unit[:at], not at
        bit = 1 << self._random.randrange(8)
        return unit[:at] + bytes((unit[at] ^ bit,)) + unit[at + 1 :], False

    # -- physics and faults --------------------------------------------------------------------------------------

    def _step(self, now: MonotonicNs) -> bool:
        """Physics, faults, and what motors say by themselves, up to ``now``; False if that is the present already."""
        if now - self._now < _INSTANT_NS:
            return False
        # a bus that nobody talked to for long need not be computed slice by slice
        dt_s = min((now - self._now) / SECOND, 2.0)
        self._now = now
        for responder, simulated in self._members:
            simulated.servo.step(dt_s)
            self._play(responder, simulated, now)
        self._play_bus()
        for responder in self._responders:
            for simulated, unit in responder.tick(now):
                self._send(simulated, unit, now)
        return True

    def _play(self, responder: Responder[W], simulated: SimulatedMotor, now: MonotonicNs) -> None:
        faults, servo, played = simulated.faults, simulated.servo, self._played[id(simulated)]
        if faults.stuck_encoder != played.stuck:
            played.stuck = faults.stuck_encoder
            servo.stuck_rad = servo.position_rad if played.stuck else None
        if faults.temperature_c is not None:
            servo.temperature_c = faults.temperature_c
        if faults.voltage_v is not None:
            played.supply_v = servo.voltage_v if played.supply_v is None else played.supply_v
            servo.voltage_v = faults.voltage_v
        elif played.supply_v is not None:
            servo.voltage_v, played.supply_v = played.supply_v, None
        if faults.reboot and not played.reboot:
            played.boot_ns = now + BOOT_NS
        played.reboot = faults.reboot
        self._play_power(responder, simulated, played, now)

    @staticmethod
    def _play_power(responder: Responder[W], simulated: SimulatedMotor, played: _Played, now: MonotonicNs) -> None:
        if simulated.servo.voltage_v < simulated.servo.limits.brownout_v:
            played.boot_ns = now + BOOT_NS
        if now < played.boot_ns:
            played.off = True
            simulated.servo.disable()  # again and again: whatever it is told meanwhile, it does not hear
        elif played.off:
            played.off = False
            responder.reboot(simulated)

    def _play_bus(self) -> None:
        if self.faults.bus_off == self._bus_is_off:
            return
        self._bus_is_off = self.faults.bus_off
        self.errors.append(CanError.BUS_OFF if self._bus_is_off else CanError.RESTARTED)
        self._wire.clear()
