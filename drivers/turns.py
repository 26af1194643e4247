"""Turns on one bus: exchanges and procedures with deadlines, and what is heard outside of them.

The floor that polling (``drivers.cycle``) and orders (``drivers.orders``) stand on: whoever is next performs one
exchange of a ``Job``, and everything that arrives meanwhile goes to the job, or the family, that it is meant for.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from drivers.bus import Bus
from drivers.clock import MS, MonotonicNs, after, monotonic_ns
from drivers.family import Exchange, Family, Procedure, W
from drivers.motor import Motor

RETRY_FIRST_NS = 50 * MS
STEP_LEAST_NS = 1 * MS  # less than this is no time for an exchange, on any bus
SEND_NS = 100 * MS  # a bus that has not taken a request by then is broken, not slow


@dataclass(frozen=True, slots=True)
class Timing:
    """Periods and limits of a bus, nanoseconds."""

    period_ns: int
    late_after_ns: int = 50 * MS
    offline_after_ns: int = 300 * MS
    setpoint_ns: int = 500 * MS  # a velocity or torque is good for this long


@dataclass(slots=True)
class Tracked:
    """What is known of one motor."""

    motor: Motor
    family: Family[Any, Any]
    online: bool = False
    connecting: bool = False
    late: bool = False
    heard_ns: int = 0  # 0: never
    sampled: bool = False  # since it came online
    usual_ns: int = 0  # its replies take, from the poll on; 0: not known
    doubtful_ns: int = 0  # took a reply that may have been to an earlier poll; 0: there was none
    misses_in_a_row: int = 0
    polls: int = 0
    misses: int = 0
    rest: int = 0  # polls that it is left out of
    due_ns: int = 0  # next connect while offline, next refresh while online
    retry_ns: int = RETRY_FIRST_NS
    refusal: str = ""  # why it was not connected, as last told
    driven_until_ns: int = 0  # by a velocity or torque; 0: it is not
    stopping: bool = False  # a stop of our own is not acknowledged yet
    latched: bool = False  # by an emergency stop


@dataclass(slots=True, eq=False)
class Job:
    """A procedure under way, one exchange at a time."""

    tracked: Tracked
    procedure: Procedure[Any, Any, Any]
    exchange: Exchange[Any, Any] | None = None  # the next one to perform
    sent_ns: int = 0  # when the exchange's requests were written; 0: not yet
    replies: dict[int, Any] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        """Whether replies are still to come that may take longer than the slack of a cycle."""
        exchange = self.exchange
        return (
            exchange is not None
            and self.sent_ns != 0
            and len(self.replies) < len(exchange.expects)
            and monotonic_ns() < self.sent_ns + exchange.patience_ns
        )

    def take(self, packet: Any) -> bool:
        """Whether the packet is a reply that the job waits for."""
        assert self.exchange is not None  # noqa: S101  it was sent
        reply = self.exchange.match(packet)
        if reply is None or reply[0] not in self.exchange.expects or reply[0] in self.replies:
            return False
        self.replies[reply[0]] = reply[1]
        return True


class Turns(Generic[W]):
    """The bus, one exchange after the other. ``reconnect`` is called for a motor that says it has restarted."""

    _bus: Bus[W]

    def __init__(
        self, families: Sequence[Family[W, Any]], timing: Timing, reconnect: Callable[[Tracked, str], None]
    ) -> None:
        self.families: Sequence[Family[W, Any]] = families
        self.timing = timing
        self.tracked = {motor.index: Tracked(motor, family) for family in families for motor in family.motors.values()}
        self.typical_ns = {id(family): timing.period_ns // 4 for family in families}  # that a complete poll takes
        self.queues: list[Iterable[Job]] = []
        """Where jobs are that may wait for replies."""
        self.strays = 0
        self._reconnect = reconnect
        self._by_address = {(t.family.name, t.motor.bus_id): t for t in self.tracked.values()}
        self._listeners: list[Family[W, Any]] = [
            family for family in families if type(family).overhear is not Family.overhear
        ]

    def attach(self, bus: Bus[W]) -> None:
        """Work on ``bus`` from now on."""
        self._bus = bus
        for family in self.families:
            family.reset()

    def perform(
        self, family: Family[W, Any], exchange: Exchange[W, Any], deadline: MonotonicNs
    ) -> Iterator[tuple[int, Any, MonotonicNs]]:
        """One turn on the bus: (bus_id, value, arrived at) of each motor that replies in time, as it does."""
        exchange.begin()
        self._bus.send(exchange.requests, after(monotonic_ns(), SEND_NS))
        missing = set(exchange.expects)
        while missing:
            received = self._bus.receive(deadline)
            if received is None:
                break
            for packet in family.unpack(received.unit):
                reply = exchange.match(packet)
                if reply is None or reply[0] not in missing:
                    self._hear(family, packet)
                else:
                    missing.remove(reply[0])
                    yield reply[0], reply[1], received.at_ns
            for other in self._listeners:
                if other is not family:
                    for packet in other.unpack(received.unit):
                        self._hear(other, packet)

    def step(self, job: Job, deadline: MonotonicNs) -> tuple[bool, Any]:
        """Perform the job's next exchange. (True, result) when its procedure has ended."""
        try:
            if job.exchange is None:
                job.exchange = next(job.procedure)
            self.drain()
            if not job.sent_ns:
                job.sent_ns = monotonic_ns()
                for bus_id, value, _ in self.perform(job.tracked.family, job.exchange, deadline):
                    job.replies[bus_id] = value
            if not job.waits:
                replied, job.replies, job.sent_ns = job.replies, {}, 0
                job.exchange = job.procedure.send(replied)
        except StopIteration as end:
            return True, end.value
        return False, None

    def drain(self, until: MonotonicNs = MonotonicNs(0)) -> None:  # noqa: B008  immutable
        """Drop what arrived outside an exchange, or arrives ``until`` then: it must not pass for the next reply."""
        late = False
        end = max(until, after(monotonic_ns(), self.timing.period_ns // 4))  # a flooded bus is never empty
        while (received := self._bus.receive(until)) and monotonic_ns() < end:
            late = True
            for family in self.families:
                for packet in family.unpack(received.unit):
                    self._hear(family, packet)
        if late:
            for family in self.families:
                family.reset()

    def least(self, family: Family[Any, Any]) -> int:
        """Less than this is no time for an exchange: what polls of this family are seen to take."""
        return max(STEP_LEAST_NS, self.typical_ns[id(family)])

    def _hear(self, family: Family[W, Any], packet: Any) -> None:
        """A packet that is no reply to what is being asked: of a job that waits, or told by a motor itself."""
        for queue in self.queues:
            for job in list(queue):
                if job.tracked.family is family and job.waits and job.take(packet):
                    return
        heard = family.overhear(packet)
        if heard is None:
            self.strays += 1
            return
        tracked = self._by_address.get((family.name, heard.bus_id))
        if tracked and heard.reconnect and tracked.online:
            self._reconnect(tracked, heard.reconnect)
