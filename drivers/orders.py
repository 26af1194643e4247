"""Orders on one bus: who is told what, in which order, and what becomes of it.

    submit -> waiting -> under way (a procedure, an exchange at a time) -> OrderDone | OrderFailed
                         not acknowledged: again, as soon as the motor is heard
    group:    waiting until it is complete -> prepared, each motor for itself -> fired at one moment -> confirmed
    estop:    halt (one exchange) -> a stop for each motor, until it acknowledges it or is offline; latched

What ends a motion goes first, an emergency stop before everything, whatever time there is. A velocity or torque has no
end of its own, so a motor that one drives is stopped from here: when nothing more is told for ``setpoint_ns``, when it
leaves its range, when it is found so by a process that told it nothing, and when there is nobody left to tell it more.
A position has an end, and is left to get there.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic

from drivers.clock import MS, MonotonicNs, after, monotonic_ns
from drivers.errors import MotorRefused
from drivers.family import Exchange, Procedure, Ready, W
from drivers.motor import DRIVES, ENDS_MOTION, OVERTAKES, SETPOINTS, Feedback, Kind, Order
from drivers.notices import AnyNotice, MotorStopped, OrderDone, OrderFailed
from drivers.turns import Job, Tracked, Turns

ALL: Final = -1
"""``Ticket.motor`` of an emergency stop, or its reset, that means every motor of the bus."""
OWN = 0  # the number of the tickets that are given here
STARVED_CYCLES = 2  # a bus without slack still looks after its orders this often
ORDERS_PER_MOTOR = 8
ORDER_TRIES = 10  # of an order that nobody acknowledges: said again it asks for nothing else
STOPS_AT_ONCE = 3  # tries of what ends a motion that wait for nothing
FIRE_WAIT_NS = 20 * MS  # nothing else is done for this long, so that a group is fired on time
LATCHED_KINDS = ENDS_MOTION | {Kind.ESTOP, Kind.RESET_ESTOP}


@dataclass(frozen=True, slots=True)
class Ticket:
    """An order on its way to a motor; not started any more after ``expires_ns`` (monotonic).

    Setpoints with the same ``group``, ``size`` of them on this bus, take effect together: if one cannot, none does.
    They are fired as soon as all are prepared, but not before ``not_before_ns`` (monotonic): several buses fire at one
    moment. An emergency stop never expires, and may be for ``ALL``.
    """

    number: int
    motor: int
    order: Order
    expires_ns: int
    group: int = 0  # 0: alone
    size: int = 1
    not_before_ns: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class _Told(Job):
    """An order under way."""

    ticket: Ticket
    tries: int = 1
    refusal: str = ""  # what the try before this one met
    refused_ns: int = 0
    begun: bool = False
    ready: Ready | None = None  # of a group: prepared, and waits for the others
    fired: bool = False

    @property
    def rests(self) -> bool:
        """Whether it is to be said again, but not before its motor is heard.

        Who is away for a moment would miss several tries. What ends a motion waits for nothing, at first.
        """
        if self.begun or not self.refused_ns or monotonic_ns() > self.ticket.expires_ns:
            return False
        if self.ticket.order.kind in ENDS_MOTION and self.tries <= STOPS_AT_ONCE:
            return False
        return self.tracked.heard_ns <= self.refused_ns


@dataclass(slots=True, kw_only=True, eq=False)
class _Firing(Job):
    """The trigger of those motors of a group that are of one family, by bus id."""

    members: Mapping[int, _Told]


@dataclass(slots=True, eq=False)
class _Stopping:
    """An emergency stop that not every motor has acknowledged."""

    ticket: Ticket
    motors: set[int] = field(default_factory=set)


class Orders(Generic[W]):
    """All orders of one bus. ``step`` performs one exchange of them at a time."""

    def __init__(self, turns: Turns[W], notices: list[AnyNotice]) -> None:
        self._turns: Turns[W] = turns
        self._tracked = turns.tracked
        self._notices = notices
        self._waiting: deque[Ticket] = deque()
        self._jobs: list[_Told | _Firing] = []  # under way, one a motor at most
        self._starved = 0
        self._to_halt: set[int] = set()  # until each has acknowledged a stop, or is offline
        self._unheard: set[int] = set()  # to be halted once, whether or not they answer
        self._halted_ns = 0
        self._stops: list[_Stopping] = []
        turns.queues.append(self._jobs)

    # -- what the cycle calls ------------------------------------------------------------------------------------

    def submit(self, ticket: Ticket) -> None:
        """Queue an order. Whatever becomes of it, exactly one OrderDone or OrderFailed follows.

        A setpoint, or what ends a motion, takes the place of setpoints of its motor that still wait, also to be said
        again; a disable, which goes ahead of them, that of enables, too.
        """
        kind = ticket.order.kind
        if kind in (Kind.ESTOP, Kind.RESET_ESTOP):
            self._latch(ticket)
            return
        if kind in OVERTAKES:
            gives_way = SETPOINTS | {Kind.ENABLE} if kind == Kind.DISABLE else SETPOINTS
            for older in [t for t in self._waiting if t.motor == ticket.motor and t.order.kind in gives_way]:
                self._drop(older, "newer_command", "overtaken before the bus got to it")
            for job in [job for job in self._told(ticket.motor) if job.rests and job.ticket.order.kind in gives_way]:
                self._break_off(job, "newer_command", f"overtaken before it was said again: {job.refusal}")
        if kind in ENDS_MOTION:
            self._overrule(ticket.motor)
        waiting = [t for t in self._waiting if t.motor == ticket.motor]
        if ticket.motor not in self._tracked:
            self._drop(ticket, "unknown_motor", f"this bus has no motor {ticket.motor}")
        elif self._tracked[ticket.motor].latched and kind not in LATCHED_KINDS:
            self._drop(ticket, "estop_latched", f"{self._name(ticket.motor)} is stopped until the stop is reset")
        elif len(waiting) >= ORDERS_PER_MOTOR and kind not in ENDS_MOTION:
            self._drop(ticket, "overloaded", f"{len(waiting)} orders are waiting already")
        elif ticket.group and kind not in SETPOINTS:
            self._drop(ticket, "unsupported", f"a group takes setpoints, and {kind} is none")
        else:
            self._waiting.append(ticket)

    def step(self, until: MonotonicNs) -> bool:
        """Perform an exchange of one order. Motors do not wait for each other's orders, only for their exchanges."""
        if self._halt(until):
            return True
        if any(job.waits for job in self._jobs):
            self._turns.drain()
        if self.fire(until):
            return True
        job = self._next()
        if job is None:
            self._starved = 0
            return False
        least_ns = self._turns.least(job.tracked.family)
        if until - monotonic_ns() < least_ns:
            self._starved += 1
            if self._starved < STARVED_CYCLES:
                return False
        self._starved = 0
        until = MonotonicNs(max(until, monotonic_ns() + 2 * least_ns))  # a reply that is on its way is waited for
        self._jobs.remove(job)
        self._jobs.append(job)  # behind the others
        if isinstance(job, _Firing):
            self._step_firing(job, until)
        else:
            self._step_told(job, until)
        return True

    def fire(self, until: MonotonicNs) -> bool:
        """Trigger a group that is prepared, if that is due ``until`` then: wait for its moment, if it is near."""
        self._expire_groups()
        groups: dict[int, list[_Told]] = {}
        for job in self._jobs:
            if isinstance(job, _Told) and job.ready and not job.fired:
                groups.setdefault(job.ticket.group, []).append(job)
        for members in groups.values():
            ticket = members[0].ticket
            near_ns = min(until, monotonic_ns() + FIRE_WAIT_NS)
            if len(members) == ticket.size and ticket.not_before_ns <= max(near_ns, monotonic_ns()):
                self._turns.drain(MonotonicNs(ticket.not_before_ns))
                self._fire(members, until)
                return True
        return False

    def watch(self, tracked: Tracked, feedback: Feedback) -> None:
        """Stop a motor that a velocity or torque drives out of its range; one that comes back in may go on."""
        if not tracked.driven_until_ns:
            return
        low, high = tracked.motor.position_rad
        position, velocity = feedback.position_rad, feedback.velocity_rad_s
        if (position > high and velocity > 0) or (position < low and velocity < 0):
            self._stop(tracked, f"left {low:g}..{high:g} rad at {position:.4f} rad")

    def check_setpoints(self) -> None:
        """Stop motors that are driven and have got no fresh setpoint."""
        now = monotonic_ns()
        setpoint_ns = self._turns.timing.setpoint_ns
        for tracked in self._tracked.values():
            if tracked.driven_until_ns and now > tracked.driven_until_ns:
                self._stop(tracked, f"no fresh setpoint for {setpoint_ns / MS:g} ms")

    def leave(self) -> None:
        """Nobody tells motors anything from now on: stop what a velocity or torque drives, and begin nothing."""
        why = "the gateway is gone"
        self._call_off(self._tracked, "interrupted", f"{why}; its effect is unknown", why)
        for tracked in self._tracked.values():
            if tracked.driven_until_ns:
                self._stop(tracked, why)

    def came_online(self, tracked: Tracked, *, driven: bool) -> None:
        """A motor is there (again): one that is latched is stopped, and one that is ``driven``, but not from here."""
        if tracked.latched:
            self._to_halt.add(tracked.motor.index)
            self._unheard.add(tracked.motor.index)
        elif driven and (tracked.stopping or not tracked.driven_until_ns):
            self._stop(tracked, "found running at a velocity or torque that nobody renews")

    def went_offline(self, tracked: Tracked) -> None:
        """A motor is gone: an emergency stop does not wait for it, nor does what would be said again."""
        for job in [job for job in self._told(tracked.motor.index) if job.rests]:
            self._break_off(job, "no_reply", job.refusal)
        self._has_stopped(tracked.motor.index)

    def give_up(self, reason: str) -> None:
        """The bus is gone: every order has failed; what is latched stays so."""
        for job in self._jobs:
            if isinstance(job, _Told):
                self._fail(job.ticket, "interrupted", f"{reason}; its effect is unknown")
        for ticket in self._waiting:
            self._fail(ticket, "motor_offline", reason)
        self._jobs.clear()
        self._waiting.clear()
        for motor in list(self._to_halt):
            self._has_stopped(motor)

    # -- one order -----------------------------------------------------------------------------------------------

    def _next(self) -> _Told | _Firing | None:
        """What ends a motion goes first, then what is under way; then what waits, and whose motor is free."""
        busy = {job.tracked.motor.index for job in self._jobs if isinstance(job, _Told)}
        jobs = [job for job in self._jobs if not job.waits]
        ready = [job for job in jobs if isinstance(job, _Firing) or (job.ready is None and not job.rests)]
        ending = [job for job in ready if isinstance(job, _Told) and job.ticket.order.kind in ENDS_MOTION]
        free = [ticket for ticket in self._waiting if ticket.motor not in busy and self._is_complete(ticket, busy)]
        free.sort(key=lambda ticket: ticket.order.kind not in ENDS_MOTION)
        if ending or (ready and not (free and free[0].order.kind in ENDS_MOTION)):
            return (ending or ready)[0]
        for ticket in free:
            if ticket in self._waiting and (job := self._start(ticket)):
                return job
        return None

    def _start(self, ticket: Ticket) -> _Told | None:
        """Begin an order, or with it all orders of its group."""
        tickets = self._members(ticket)
        for one in tickets:
            if not self._tracked[one.motor].online:
                self._drop(one, "motor_offline", f"{self._name(one.motor)} does not answer")
                return None
        for one in tickets:
            self._waiting.remove(one)
        jobs = [
            _Told(self._tracked[one.motor], self._procedure(one, alone=not one.group), ticket=one) for one in tickets
        ]
        self._jobs += jobs
        return jobs[0]

    def _procedure(self, ticket: Ticket, *, alone: bool) -> Procedure[Any, Any, Any]:
        tracked = self._tracked[ticket.motor]
        tell = tracked.family.order if alone else tracked.family.prepare
        return tell(tracked.motor.bus_id, ticket.order)

    def _step_told(self, job: _Told, until: MonotonicNs) -> None:
        ticket, tracked = job.ticket, job.tracked
        if not job.begun:  # or to be said again
            if (over_ns := monotonic_ns() - ticket.expires_ns) > 0:
                if job.refusal:
                    self._break_off(job, "no_reply", job.refusal)
                else:
                    self._break_off(job, "stale", f"was due {over_ns / MS:.1f} ms before the bus got to it")
                return
            job.begun = True
            if ticket.order.kind in DRIVES and not ticket.group:
                self._drive(tracked)
        try:
            ended, result = self._turns.step(job, until)
        except MotorRefused as refusal:
            if self._may_say_again(job, refusal):
                alone = job.fired or not ticket.group  # the others of its group have begun
                again = _Told(tracked, self._procedure(ticket, alone=alone), ticket=ticket, fired=job.fired)
                again.tries, again.refusal, again.refused_ns = job.tries + 1, refusal.detail, monotonic_ns()
                self._jobs.remove(job)
                self._jobs.append(again)
            else:
                self._break_off(job, refusal.reason, refusal.detail)
            return
        if ended and ticket.group and not job.fired:
            job.ready = result
        elif ended:
            self._jobs.remove(job)
            self._done(job, result)

    def _may_say_again(self, job: _Told, refusal: MotorRefused) -> bool:
        if refusal.reason != "no_reply" or not job.tracked.online or monotonic_ns() > job.ticket.expires_ns:
            return False
        return job.tries < ORDER_TRIES or job.ticket.order.kind in ENDS_MOTION

    def _done(self, job: _Told, detail: str) -> None:
        ticket, kind = job.ticket, job.ticket.order.kind
        if kind in OVERTAKES - DRIVES:
            job.tracked.driven_until_ns, job.tracked.stopping = 0, False
        if ticket.number != OWN:
            self._notices.append(OrderDone(ticket.number, ticket.motor, detail))
        if kind in ENDS_MOTION:
            self._has_stopped(ticket.motor)

    def _fail(self, ticket: Ticket, reason: str, detail: str) -> None:
        if ticket.number != OWN:
            self._notices.append(OrderFailed(ticket.number, ticket.motor, reason, detail))

    def _drop(self, ticket: Ticket, reason: str, detail: str) -> None:
        """An order has failed that had no effect; if it belongs to a group, so have the others."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        self._fail(ticket, reason, detail)
        if not ticket.group:
            return
        told = f"{self._name(ticket.motor)} of its group: {detail}"
        for other in [t for t in self._waiting if t.group == ticket.group]:
            self._waiting.remove(other)
            self._fail(other, reason, told)
        for job in list(self._jobs):
            if isinstance(job, _Told) and job.ticket.group == ticket.group and not job.fired and job.ticket != ticket:
                self._jobs.remove(job)
                self._fail(job.ticket, reason, told)

    def _overrule(self, motor: int) -> None:
        """Break off what this motor is being told: it is to stop."""
        for job in self._told(motor):
            if job.ticket.order.kind not in ENDS_MOTION:
                self._break_off(job, "newer_command", "overtaken on its way; its effect is unknown")

    def _told(self, motor: int) -> list[_Told]:
        """What a motor is being told."""
        return [job for job in self._jobs if isinstance(job, _Told) and job.ticket.motor == motor]

    def _break_off(self, job: _Told, reason: str, detail: str) -> None:
        if job not in self._jobs:
            return  # with another of its group
        self._jobs.remove(job)
        if job.fired:
            self._fail(job.ticket, reason, detail)
        else:
            self._drop(job.ticket, reason, detail)

    def _call_off(self, motors: Collection[int], reason: str, begun: str, waiting: str) -> None:
        """End all that these motors are being told or are to be told, but for what ends a motion."""
        for job in list(self._jobs):
            if isinstance(job, _Told) and job.ticket.motor in motors and job.ticket.order.kind not in ENDS_MOTION:
                self._break_off(job, reason, begun)
        for ticket in [t for t in self._waiting if t.motor in motors and t.order.kind not in ENDS_MOTION]:
            if ticket in self._waiting:
                self._drop(ticket, reason, waiting)

    def _name(self, motor: int) -> str:
        return self._tracked[motor].motor.name if motor in self._tracked else f"motor {motor}"

    # -- groups --------------------------------------------------------------------------------------------------

    def _members(self, ticket: Ticket) -> list[Ticket]:
        return [t for t in self._waiting if t.group == ticket.group] if ticket.group else [ticket]

    def _is_complete(self, ticket: Ticket, busy: Iterable[int]) -> bool:
        """Whether the whole of an order's group is here, and its motors are free."""
        members = self._members(ticket)
        return not ticket.group or (len(members) == ticket.size and not any(one.motor in busy for one in members))

    def _expire_groups(self) -> None:
        """What waits for the rest of its group, or for its moment, does not wait for ever."""
        now = monotonic_ns()
        prepared = [job for job in self._jobs if isinstance(job, _Told) and job.ready and not job.fired]
        for job in prepared:
            if now > job.ticket.expires_ns:
                self._break_off(job, "stale", "its group was not complete, or not due, in time")
        for ticket in [t for t in self._waiting if t.group and now > t.expires_ns]:
            if ticket in self._waiting:
                self._drop(ticket, "stale", "its group was not complete, or its motors not free, in time")

    def _fire(self, members: Iterable[_Told], until: MonotonicNs) -> None:
        families: dict[int, dict[int, _Told]] = {}
        for job in members:
            families.setdefault(id(job.tracked.family), {})[job.tracked.motor.bus_id] = job
            job.fired = True
            if job.ticket.order.kind in DRIVES:
                self._drive(job.tracked)
        for jobs in families.values():
            first = next(iter(jobs.values())).tracked
            ready = {bus_id: job.ready for bus_id, job in jobs.items() if job.ready}
            firing = _Firing(first, _perform(first.family.fire(ready)), members=jobs)
            self._jobs.append(firing)
            least_ns = self._turns.least(first.family)
            self._step_firing(firing, MonotonicNs(max(until, monotonic_ns() + 2 * least_ns)))

    def _step_firing(self, firing: _Firing, until: MonotonicNs) -> None:
        ended, replies = self._turns.step(firing, until)
        if not ended:
            return
        self._jobs.remove(firing)
        for bus_id, job in firing.members.items():
            if job.ready:
                job.procedure = job.tracked.family.confirm(bus_id, job.ready, replies.get(bus_id))
                job.exchange, job.ready = None, None

    # -- deadman -------------------------------------------------------------------------------------------------

    def _drive(self, tracked: Tracked) -> None:
        """From now on, whether or not the motor acknowledges it: it may have heard."""
        tracked.driven_until_ns = monotonic_ns() + self._turns.timing.setpoint_ns
        tracked.stopping = False

    def _stop(self, tracked: Tracked, reason: str) -> None:
        """Ahead of every order that waits; tried again for as long as the motor does not acknowledge it."""
        if not self._stop_alone(tracked.motor.index):
            return
        tracked.driven_until_ns = monotonic_ns() + self._turns.timing.setpoint_ns
        if not tracked.stopping:
            tracked.stopping = True
            self._notices.append(MotorStopped(tracked.motor.index, reason))

    def _stop_alone(self, motor: int) -> bool:
        """Queue a stop of our own; False if there is one."""
        under_way: list[Ticket] = [job.ticket for job in self._told(motor)]
        if any(t.number == OWN and t.motor == motor for t in (*self._waiting, *under_way)):
            return False
        expires_ns = after(monotonic_ns(), self._turns.timing.setpoint_ns)
        self._overrule(motor)
        self._waiting.appendleft(Ticket(OWN, motor, Order(Kind.STOP), expires_ns))
        return True

    # -- emergency stop ------------------------------------------------------------------------------------------

    def _latch(self, ticket: Ticket) -> None:
        """Stop motors, and refuse all that could move them; or take that back."""
        motors: list[int] = [*self._tracked] if ticket.motor == ALL else [ticket.motor]
        if ticket.motor not in (ALL, *self._tracked):
            self._drop(ticket, "unknown_motor", f"this bus has no motor {ticket.motor}")
            return
        stop = ticket.order.kind == Kind.ESTOP
        for motor in motors:
            self._tracked[motor].latched = stop
        if not stop:
            self._reset(motors)
            self._notices.append(OrderDone(ticket.number, ticket.motor, "reset"))
            return
        begun = "an emergency stop came in between; its effect is unknown"
        self._call_off(motors, "estop_latched", begun, "an emergency stop came before")
        online = {motor for motor in motors if self._tracked[motor].online}
        self._stops.append(_Stopping(ticket, set(online)))
        self._to_halt |= online
        self._unheard.update(motors)
        self._tell_stops()

    def _reset(self, motors: Iterable[int]) -> None:
        self._to_halt.difference_update(motors)
        self._unheard.difference_update(motors)
        for stop in [stop for stop in self._stops if not stop.motors.isdisjoint(motors)]:
            self._stops.remove(stop)
            self._fail(stop.ticket, "newer_command", "reset before every motor had acknowledged it")

    def _halt(self, until: MonotonicNs) -> bool:
        """The quickest stop there is: at once, and then once a period until each motor has acknowledged a stop."""
        now = monotonic_ns()
        again = self._to_halt and now < until and now - self._halted_ns >= self._turns.timing.period_ns
        if not self._unheard and not again:
            return False
        self._halted_ns = now
        motors: list[int] = sorted(self._to_halt | self._unheard)
        self._unheard.clear()
        self._turns.drain()
        for family in self._turns.families:
            here = [tracked for motor in motors if (tracked := self._tracked[motor]).family is family]
            exchange = family.halt([tracked.motor.bus_id for tracked in here])
            if exchange.requests:
                deadline = after(monotonic_ns(), 2 * self._turns.least(family))
                for _ in self._turns.perform(family, exchange, deadline):
                    pass
        for motor in self._to_halt:
            self._stop_alone(motor)
        return True

    def _has_stopped(self, motor: int) -> None:
        self._to_halt.discard(motor)
        for stop in self._stops:
            stop.motors.discard(motor)
        self._tell_stops()

    def _tell_stops(self) -> None:
        for stop in [stop for stop in self._stops if not stop.motors]:
            self._stops.remove(stop)
            motors = [*self._tracked] if stop.ticket.motor == ALL else [stop.ticket.motor]
            offline = [self._name(motor) for motor in motors if not self._tracked[motor].online]
            detail = f"latched; {len(motors) - len(offline)} stopped"
            detail += f"; offline: {', '.join(offline)}" if offline else ""
            self._notices.append(OrderDone(stop.ticket.number, stop.ticket.motor, detail))


def _perform(exchange: Exchange[Any, Any]) -> Procedure[Any, Any, Mapping[int, Any]]:
    """An exchange as a procedure: its replies."""
    return (yield exchange)
