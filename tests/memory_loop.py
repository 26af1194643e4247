"""A family against its own simulated motors, without a clock: time passes when the test says so."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from drivers import protocols
from drivers.clock import MS, SECOND, MonotonicNs
from drivers.errors import MotorRefused
from drivers.family import Exchange, Family, Overheard, Procedure
from drivers.motor import Feedback, Motor, Order
from drivers.sim.build import SimulationSettings, build_bus
from drivers.sim.responder import SimulatedMotor
from drivers.sim.servo import Servo

T = TypeVar("T")

STILL = SimulationSettings(motion="still", enabled=False)


def make_motor(family: str, bus_id: int, index: int = 0, example: int = 0) -> Motor:
    """A motor with one of its family's example options."""
    return Motor(index, f"joint{bus_id}", family, bus_id, protocols.load(family).examples[example])


class Loop:
    """What a bus cycle does to a family, exchange by exchange, in memory."""

    def __init__(
        self,
        motors: Sequence[Motor],
        settings: SimulationSettings = STILL,
        absent: Iterable[int] = (),
    ) -> None:
        self.now = MonotonicNs(0)
        self.family: Family[Any, Any] = protocols.load(motors[0].family)(motors)
        self.bus = build_bus([motor for motor in motors if motor.bus_id not in set(absent)], settings, self.now)
        self.sent: list[Any] = []
        self.overheard: list[Overheard] = []

    def simulated(self, bus_id: int) -> SimulatedMotor:
        return next(motor for motor in self.bus.motors if motor.motor.bus_id == bus_id)

    def servo(self, bus_id: int) -> Servo:
        return self.simulated(bus_id).servo

    def wait(self, seconds: float) -> None:
        end = self.now + round(seconds * SECOND)
        while self.now < end:
            self.now = MonotonicNs(min(end, self.now + SECOND))
            self.bus.advance(self.now)

    def exchange(self, exchange: Exchange[Any, Any]) -> dict[int, Any]:
        exchange.begin()
        self.sent += exchange.requests
        self.now = MonotonicNs(self.now + MS)
        replies: dict[int, Any] = {}
        arrived = [reply for unit in exchange.requests for _, reply in self.bus.respond(unit, self.now)]
        for unit in arrived:
            for packet in self.family.unpack(unit):
                reply = exchange.match(packet)
                if reply is not None and reply[0] in exchange.expects:
                    replies.setdefault(*reply)
                elif reply is None and (heard := self.family.overhear(packet)):
                    self.overheard.append(heard)
        return replies

    def run(self, procedure: Procedure[Any, Any, T]) -> T:
        replies: Mapping[int, Any] | None = None
        try:
            while True:
                step = next(procedure) if replies is None else procedure.send(replies)
                replies = self.exchange(step)
        except StopIteration as end:
            result: T = end.value
            return result

    def connect(self, bus_id: int) -> Any:
        return self.run(self.family.connect(bus_id))

    def order(self, bus_id: int, order: Order) -> str:
        return self.run(self.family.order(bus_id, order))

    def refusal(self, bus_id: int, order: Order) -> MotorRefused:
        """The refusal that this order meets; fails if it is carried out."""
        try:
            detail = self.order(bus_id, order)
        except MotorRefused as refusal:
            return refusal
        raise AssertionError(f"{order} was carried out: {detail}")

    def poll(self, *bus_ids: int) -> dict[int, Feedback]:
        return self.exchange(self.family.poll(bus_ids))
