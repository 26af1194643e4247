"""The cycle of one bus: poll every motor that is there, then use what is left of the period for everything else.

    |<--------------------------- period --------------------------->|
    | drain | poll: one exchange a family | orders, then background  |  (sleep)
                                            \\__ one exchange at a time, each with a deadline

Background is: connecting motors that are not there, and reading what changes slowly. A motor that keeps silent
costs the others nothing: the wait for it is bounded (``_allowance``), after ``offline_after_ns`` it leaves the
poll, and from then on it is looked for in the slack. No reply, no sample: a value is never repeated or invented.

Two things are stopped here, where it takes no other process: a motor that was told a velocity or a torque and is told
nothing more for ``setpoint_ns``, and one that such a setpoint drives out of the range that came with it.

Blocking; knows no processes, no queues to elsewhere. ``BusError`` passes through: whoever opened the bus reopens it.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from drivers.bus import Bus
from drivers.clock import MS, MonotonicNs, after, monotonic_ns
from drivers.errors import MotorRefused
from drivers.family import Exchange, Family, Procedure, W
from drivers.motor import DRIVES, ENDS_MOTION, OVERTAKES, SAMPLE, SETPOINTS, Feedback, Kind, Motor, MotorInfo, Order
from drivers.notices import (
    AnyNotice,
    MotorCounts,
    MotorLate,
    MotorOffline,
    MotorOnline,
    MotorStopped,
    OrderDone,
    OrderFailed,
)

RETRY_FIRST_NS = 50 * MS
RETRY_MOST_NS = 500 * MS
STEP_LEAST_NS = 1 * MS  # less than this is no time for an exchange, on any bus
OWN = 0  # the number of the tickets that the cycle gives itself
SEND_NS = 100 * MS  # a bus that has not taken a request by then is broken, not slow
LATE_REPLY_NS = 20 * MS  # adapters hold replies back for up to 16 ms
MOST_REST = 8  # polls
DOUBT_NS = 1 * MS  # that a reply may take longer than twice the usual, and still be prompt
STARVED_CYCLES = 50  # a bus without slack still looks after its background this often
STARVED_ORDER_CYCLES = 2  # and after its orders this often
ORDERS_PER_MOTOR = 8
ORDER_TRIES = 3  # of an order that nobody acknowledged: said again it asks for nothing else


@dataclass(frozen=True, slots=True)
class Timing:
    """Periods and limits of a bus, nanoseconds."""

    period_ns: int
    late_after_ns: int = 50 * MS
    offline_after_ns: int = 300 * MS
    setpoint_ns: int = 500 * MS  # a velocity or torque is good for this long


@dataclass(frozen=True, slots=True)
class Ticket:
    """An order on its way to a motor; not started any more after ``expires_ns`` (monotonic)."""

    number: int
    motor: int
    order: Order
    expires_ns: int


@dataclass(slots=True)
class _Tracked:
    """What the cycle knows of one motor."""

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
    within_rad: tuple[float, float] = (-inf, inf)  # while it is driven
    stopping: bool = False  # a stop of our own is not acknowledged yet


@dataclass(slots=True)
class _Job:
    """A procedure under way, one exchange at a time."""

    tracked: _Tracked
    procedure: Procedure[Any, Any, Any]
    exchange: Exchange[Any, Any] | None = None  # the next one to perform
    ticket: Ticket | None = None
    connects: bool = False
    sent_ns: int = 0  # when the exchange's requests were written; 0: not yet
    replies: dict[int, Any] = field(default_factory=dict)
    tries: int = 1

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


class Cycle(Generic[W]):
    """All motors of one bus. ``poll`` once a period, ``work`` with the rest of it, ``take_notices`` when convenient.

    Begins without a bus: ``attach`` one before polling, and another when that one is gone.
    """

    _bus: Bus[W]

    def __init__(self, families: Sequence[Family[W, Any]], timing: Timing) -> None:
        self._families: Sequence[Family[W, Any]] = families
        self._timing = timing
        self._tracked = {
            motor.index: _Tracked(motor, family) for family in families for motor in family.motors.values()
        }
        self._by_family = [
            {t.motor.bus_id: t for t in self._tracked.values() if t.family is family} for family in families
        ]
        self._by_address = {(t.family.name, t.motor.bus_id): t for t in self._tracked.values()}
        self._listeners: list[Family[W, Any]] = [
            family for family in families if type(family).overhear is not Family.overhear
        ]
        self._polls: list[Exchange[W, Any] | None] = [None] * len(families)
        self._typical_ns = [timing.period_ns // 4] * len(families)
        self._orders: deque[Ticket] = deque()
        self._order_jobs: list[_Job] = []  # under way, one a motor at most
        self._background: deque[_Job] = deque()
        self._starved = 0
        self._starved_orders = 0
        self._notices: list[AnyNotice] = []
        self.strays = 0

    # -- what the owner calls ------------------------------------------------------------------------------------

    def attach(self, bus: Bus[W]) -> None:
        """Work on ``bus`` from now on; every motor has to be found anew."""
        self._bus = bus
        for family in self._families:
            family.reset()

    def poll(self, start: MonotonicNs) -> NDArray[np.void]:
        """Ask every motor that is online; its samples, dtype SAMPLE, one a motor at most."""
        period_ns = self._timing.period_ns
        end = after(start, period_ns - min(STEP_LEAST_NS // 2, period_ns // 10))
        self._drain()
        rows: list[tuple[Any, ...]] = []
        for number, (family, tracked) in enumerate(zip(self._families, self._by_family, strict=True)):
            if exchange := self._next_poll(number, family, tracked):
                rows += self._poll_family(number, family, exchange, tracked, end)
        return np.array(rows, dtype=SAMPLE)

    def work(self, until: MonotonicNs) -> None:
        """Perform exchanges of orders and background until ``until``, or until there is nothing to do."""
        self._check_setpoints()
        self._plan_background()
        while self._step_order(until) or self._step_background(until):
            pass

    def submit(self, ticket: Ticket) -> None:
        """Queue an order. Whatever becomes of it, exactly one OrderDone or OrderFailed follows.

        A setpoint, or what ends a motion, takes the place of setpoints of its motor that still wait.
        """
        if ticket.order.kind in OVERTAKES:
            for older in [t for t in self._orders if t.motor == ticket.motor and t.order.kind in SETPOINTS]:
                self._orders.remove(older)
                self._fail(older, "newer_command", "overtaken before the bus got to it")
        if ticket.order.kind in ENDS_MOTION:
            self._overrule(ticket.motor)
        waiting = [t for t in self._orders if t.motor == ticket.motor]
        if ticket.motor not in self._tracked:
            self._fail(ticket, "unknown_motor", f"this bus has no motor {ticket.motor}")
        elif len(waiting) >= ORDERS_PER_MOTOR and ticket.order.kind not in ENDS_MOTION:
            self._fail(ticket, "overloaded", f"{len(waiting)} orders are waiting already")
        else:
            self._orders.append(ticket)

    def take_notices(self) -> list[AnyNotice]:
        """Everything worth telling since the last call."""
        notices, self._notices = self._notices, []
        return notices

    @property
    def garbage(self) -> int:
        """Bytes, or frames, that were no valid packet to the family that they were meant for."""
        return sum(family.garbage for family in self._families)

    def counts(self) -> tuple[MotorCounts, ...]:
        """Polls and misses of each motor."""
        return tuple(MotorCounts(t.motor.index, t.polls, t.misses) for t in self._tracked.values())

    def give_up(self, reason: str) -> None:
        """The bus is gone: every motor is offline, every order failed."""
        for tracked in self._tracked.values():
            if tracked.online:
                self._offline(tracked, reason)
            tracked.connecting = False
        for job in self._order_jobs:
            if job.ticket:
                self._fail(job.ticket, "interrupted", f"{reason}; its effect is unknown")
        for ticket in self._orders:
            self._fail(ticket, "motor_offline", reason)
        self._order_jobs.clear()
        self._orders.clear()
        self._background.clear()

    # -- polling -------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Drop what arrived outside an exchange: a late reply must not pass for the next one."""
        late = False
        end = after(monotonic_ns(), self._timing.period_ns // 4)  # a flooded bus is never empty
        while (received := self._bus.receive(MonotonicNs(0))) and monotonic_ns() < end:
            late = True
            for family in self._families:
                for packet in family.unpack(received.unit):
                    self._hear(family, packet)
        if late:
            for family in self._families:
                family.reset()

    def _hear(self, family: Family[W, Any], packet: Any) -> None:
        """A packet that is no reply to what is being asked: of a job that waits, or told by a motor itself."""
        for job in (*self._order_jobs, *list(self._background)[:1]):
            if job.tracked.family is family and job.waits and self._take(job, packet):
                return
        heard = family.overhear(packet)
        if heard is None:
            self.strays += 1
            return
        tracked = self._by_address.get((family.name, heard.bus_id))
        if tracked and heard.reconnect and tracked.online:
            self._offline(tracked, heard.reconnect)
            tracked.due_ns = monotonic_ns()

    @staticmethod
    def _take(job: _Job, packet: Any) -> bool:
        assert job.exchange is not None  # noqa: S101  it was sent
        reply = job.exchange.match(packet)
        if reply is None or reply[0] not in job.exchange.expects or reply[0] in job.replies:
            return False
        job.replies[reply[0]] = reply[1]
        return True

    def _next_poll(
        self, number: int, family: Family[W, Any], tracked: Mapping[int, _Tracked]
    ) -> Exchange[W, Any] | None:
        """The exchange with all motors that are online, but for those that rest after a miss."""
        exchange = self._polls[number]
        if exchange is None:
            bus_ids = [bus_id for bus_id, t in tracked.items() if t.online and not t.rest]
            exchange = family.poll(bus_ids) if bus_ids else None
        resting = [t for t in tracked.values() if t.rest]
        for one in resting:
            one.rest -= 1
        self._polls[number] = None if resting else exchange
        return exchange

    def _poll_family(
        self,
        number: int,
        family: Family[W, Any],
        exchange: Exchange[W, Any],
        tracked: Mapping[int, _Tracked],
        end: MonotonicNs,
    ) -> list[tuple[Any, ...]]:
        sent_ns = monotonic_ns()
        # a late start, or a silent motor of the family before, must not leave it no time at all
        least_ns = sent_ns + 2 * self._typical_ns[number]
        deadline = MonotonicNs(max(least_ns, min(end, sent_ns + self._allowance(number))))
        rows = []
        missing = set(exchange.expects)
        # whatever a reply takes here, the next one is on the wire meanwhile
        for bus_id, feedback, at_ns in self._perform(family, exchange, deadline):
            one = tracked[bus_id]
            if family.asks_all and self._is_doubtful(one, tracked.values(), at_ns - sent_ns):
                continue
            missing.remove(bus_id)
            one.heard_ns, one.misses_in_a_row, one.late, one.sampled = at_ns, 0, False, True
            if one.driven_until_ns:
                self._check_range(one, feedback)
            rows.append(
                (
                    one.motor.index,
                    at_ns,
                    feedback.position_rad,
                    feedback.velocity_rad_s,
                    feedback.temperature_c,
                    feedback.voltage_v,
                    feedback.current_a,
                    feedback.torque_nm,
                    feedback.status,
                    feedback.vendor_error,
                    (at_ns - sent_ns) / 1000,
                )
            )
        if not missing:
            self._typical_ns[number] += (monotonic_ns() - sent_ns - self._typical_ns[number]) // 16
        for bus_id, one in tracked.items():
            one.polls += bus_id in exchange.expects
            if bus_id in missing:
                self._missed(one)
        return rows

    def _is_doubtful(self, one: _Tracked, family: Iterable[_Tracked], took_ns: int) -> bool:
        """Whether a reply may be one to an earlier poll, where a motor cannot be left out of a poll to find out.

        So it is if the motor has just missed one, or is new, and its reply takes much longer than replies usually do.
        (One that is late by about a whole period cannot be told from a prompt one.)
        """
        usual_ns = one.usual_ns or min((other.usual_ns for other in family if other.usual_ns), default=0)
        if usual_ns and (one.misses_in_a_row or not one.sampled) and took_ns > 2 * usual_ns + DOUBT_NS:
            one.doubtful_ns = took_ns
            self.strays += 1
            return True
        one.usual_ns = one.usual_ns + (took_ns - one.usual_ns) // 16 if one.usual_ns else took_ns
        one.doubtful_ns = 0
        return False

    def _allowance(self, number: int) -> int:
        """How long a poll may wait: most of the period, or more where complete polls are seen to take that long."""
        return max(self._timing.period_ns * 7 // 10, 3 * self._typical_ns[number])

    def _missed(self, tracked: _Tracked) -> None:
        tracked.misses += 1
        tracked.misses_in_a_row += 1
        # replies carry no number: one that comes late must not find a poll that it could pass for an answer to
        most = max(1, min(LATE_REPLY_NS // self._timing.period_ns, MOST_REST))
        tracked.rest = min(1 << tracked.misses_in_a_row - 1, most)
        self._forget_polls()
        silent_ns = monotonic_ns() - tracked.heard_ns
        if silent_ns > self._timing.offline_after_ns:
            doubt = f"; what came {tracked.doubtful_ns / MS:.1f} ms after a poll may be to one before"
            self._offline(tracked, f"no reply for {silent_ns / MS:.0f} ms{doubt if tracked.doubtful_ns else ''}")
        elif silent_ns > self._timing.late_after_ns and not tracked.late:
            tracked.late = True
            self._notices.append(MotorLate(tracked.motor.index, tracked.heard_ns, tracked.misses_in_a_row))

    def _offline(self, tracked: _Tracked, reason: str) -> None:
        self._notices.append(MotorOffline(tracked.motor.index, tracked.heard_ns, tracked.misses_in_a_row, reason))
        tracked.online = False
        tracked.late = False
        if tracked.sampled:  # else it was found in vain: patience
            tracked.retry_ns = RETRY_FIRST_NS
        tracked.sampled = False
        tracked.due_ns = monotonic_ns() + tracked.retry_ns
        self._forget_polls()

    def _forget_polls(self) -> None:
        self._polls = [None] * len(self._families)

    # -- exchanges -----------------------------------------------------------------------------------------------

    def _perform(
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

    def _least(self, tracked: _Tracked) -> int:
        """Less than this is no time for an exchange: what polls of this family are seen to take."""
        return max(STEP_LEAST_NS, self._typical_ns[self._families.index(tracked.family)])

    def _step(self, job: _Job, deadline: MonotonicNs) -> tuple[bool, Any]:
        """Perform the job's next exchange. (True, result) when its procedure has ended."""
        try:
            if job.exchange is None:
                job.exchange = next(job.procedure)
            self._drain()
            if not job.sent_ns:
                job.sent_ns = monotonic_ns()
                for bus_id, value, _ in self._perform(job.tracked.family, job.exchange, deadline):
                    job.replies[bus_id] = value
            if not job.waits:
                replied, job.replies, job.sent_ns = job.replies, {}, 0
                job.exchange = job.procedure.send(replied)
        except StopIteration as end:
            return True, end.value
        return False, None

    # -- orders --------------------------------------------------------------------------------------------------

    def _step_order(self, until: MonotonicNs) -> bool:
        """Perform an exchange of one order. Motors do not wait for each other's orders, only for their exchanges."""
        if any(job.waits for job in self._order_jobs):
            self._drain()
        job = self._next_order()
        if job is None:
            self._starved_orders = 0
            return False
        least_ns = self._least(job.tracked)
        if until - monotonic_ns() < least_ns:
            self._starved_orders += 1
            if self._starved_orders < STARVED_ORDER_CYCLES:
                return False
        self._starved_orders = 0
        until = MonotonicNs(max(until, monotonic_ns() + 2 * least_ns))  # a reply that is on its way is waited for
        ticket = job.ticket
        assert ticket is not None  # noqa: S101  order jobs are made in _start only
        self._order_jobs.remove(job)
        if job.exchange is None:  # not begun, or to be said again
            if (over_ns := monotonic_ns() - ticket.expires_ns) > 0:
                reason = "stale" if job.tries == 1 else "no_reply"
                self._fail(ticket, reason, f"was due {over_ns / MS:.1f} ms before the bus got to it, try {job.tries}")
                return True
            if ticket.order.kind in DRIVES:
                self._drive(job.tracked, ticket.order)
        try:
            ended, detail = self._step(job, until)
            if not ended:
                self._order_jobs.append(job)  # behind the others
                return True
            if ticket.order.kind in OVERTAKES - DRIVES:
                job.tracked.driven_until_ns, job.tracked.stopping = 0, False
            if ticket.number != OWN:
                self._notices.append(OrderDone(ticket.number, ticket.motor, detail))
        except MotorRefused as refusal:
            if refusal.reason == "no_reply" and job.tries < ORDER_TRIES and monotonic_ns() < ticket.expires_ns:
                again = job.tracked.family.order(job.tracked.motor.bus_id, ticket.order)
                self._order_jobs.append(_Job(job.tracked, again, ticket=ticket, tries=job.tries + 1))
            else:
                self._fail(ticket, refusal.reason, refusal.detail)
        return True

    def _next_order(self) -> _Job | None:
        """What ends a motion goes first, then what is under way; then what waits, and whose motor is free."""
        busy = {job.tracked.motor.index for job in self._order_jobs}
        ready = [job for job in self._order_jobs if not job.waits]
        ending = [job for job in ready if job.ticket and job.ticket.order.kind in ENDS_MOTION]
        free = [ticket for ticket in self._orders if ticket.motor not in busy]
        free.sort(key=lambda ticket: ticket.order.kind not in ENDS_MOTION)
        if ending or (ready and not (free and free[0].order.kind in ENDS_MOTION)):
            return (ending or ready)[0]
        for ticket in free:
            self._orders.remove(ticket)
            if job := self._start(ticket):
                return job
        return None

    def _start(self, ticket: Ticket) -> _Job | None:
        tracked = self._tracked[ticket.motor]
        if not tracked.online:
            self._fail(ticket, "motor_offline", f"{tracked.motor.name} does not answer")
            return None
        job = _Job(tracked, tracked.family.order(tracked.motor.bus_id, ticket.order), ticket=ticket)
        self._order_jobs.append(job)
        return job

    def _overrule(self, motor: int) -> None:
        """Break off what this motor is being told: it is to stop."""
        for job in [job for job in self._order_jobs if job.tracked.motor.index == motor]:
            if job.ticket and job.ticket.order.kind not in ENDS_MOTION:
                self._order_jobs.remove(job)
                self._fail(job.ticket, "newer_command", "overtaken on its way; its effect is unknown")

    def _drive(self, tracked: _Tracked, order: Order) -> None:
        """From now on, whether or not the motor acknowledges it: it may have heard."""
        tracked.driven_until_ns = monotonic_ns() + self._timing.setpoint_ns
        tracked.within_rad = order.within_rad
        tracked.stopping = False

    def _check_range(self, tracked: _Tracked, feedback: Feedback) -> None:
        """Stop a motor that a velocity or torque drives out of its range; one that comes back in may go on."""
        low, high = tracked.within_rad
        position, velocity = feedback.position_rad, feedback.velocity_rad_s
        if (position > high and velocity > 0) or (position < low and velocity < 0):
            self._stop(tracked, f"left {low:g}..{high:g} rad at {position:.4f} rad")

    def _check_setpoints(self) -> None:
        now = monotonic_ns()
        for tracked in self._tracked.values():
            if tracked.driven_until_ns and now > tracked.driven_until_ns:
                self._stop(tracked, f"no fresh setpoint for {self._timing.setpoint_ns / MS:g} ms")

    def _stop(self, tracked: _Tracked, reason: str) -> None:
        """Ahead of every order that waits; tried again for as long as the motor does not acknowledge it."""
        if any(t.number == OWN and t.motor == tracked.motor.index for t in self._orders):
            return
        tracked.driven_until_ns = monotonic_ns() + self._timing.setpoint_ns
        expires_ns = after(monotonic_ns(), self._timing.setpoint_ns)
        self._overrule(tracked.motor.index)
        self._orders.appendleft(Ticket(OWN, tracked.motor.index, Order(Kind.STOP), expires_ns))
        if not tracked.stopping:
            tracked.stopping = True
            self._notices.append(MotorStopped(tracked.motor.index, reason))

    def _fail(self, ticket: Ticket, reason: str, detail: str) -> None:
        if ticket.number != OWN:
            self._notices.append(OrderFailed(ticket.number, ticket.motor, reason, detail))

    # -- background ----------------------------------------------------------------------------------------------

    def _plan_background(self) -> None:
        now = monotonic_ns()
        for tracked in self._tracked.values():
            if tracked.due_ns > now or tracked.connecting:
                continue
            bus_id = tracked.motor.bus_id
            if not tracked.online:
                tracked.connecting = True
                self._background.append(_Job(tracked, tracked.family.connect(bus_id), connects=True))
            else:
                tracked.due_ns = now + tracked.family.refresh_ns
                if procedure := tracked.family.refresh(bus_id):
                    self._background.append(_Job(tracked, procedure))

    def _step_background(self, until: MonotonicNs) -> bool:
        if not self._background:
            self._starved = 0
            return False
        if self._background[0].waits:
            self._drain()
            if self._background[0].waits:
                return False
        least_ns = self._least(self._background[0].tracked)
        if until - monotonic_ns() < least_ns:
            self._starved += 1
            if self._starved < STARVED_CYCLES:
                return False
            until = after(monotonic_ns(), 2 * least_ns)
        self._starved = 0
        job = self._background[0]
        try:
            ended, result = self._step(job, until)
        except MotorRefused as refusal:
            ended, result = True, refusal
        if ended:
            self._background.popleft()
            if job.connects:
                self._connected(job.tracked, result)
        return True

    def _connected(self, tracked: _Tracked, result: MotorInfo | MotorRefused | None) -> None:
        now = monotonic_ns()
        tracked.connecting = False
        if isinstance(result, MotorInfo):
            self._notices.append(MotorOnline(tracked.motor.index, result.model, result.firmware))
            tracked.online = True
            tracked.heard_ns = now
            tracked.misses_in_a_row = tracked.rest = 0
            tracked.due_ns = now + tracked.family.refresh_ns
            self._forget_polls()
            tracked.refusal = ""
            return
        tracked.due_ns = now + tracked.retry_ns
        tracked.retry_ns = min(2 * tracked.retry_ns, RETRY_MOST_NS)
        if isinstance(result, MotorRefused) and tracked.refusal != str(result):  # it is there, and unfit: say so once
            tracked.refusal = str(result)
            self._notices.append(MotorOffline(tracked.motor.index, tracked.heard_ns, 0, tracked.refusal))
