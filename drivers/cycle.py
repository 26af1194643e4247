"""The cycle of one bus: poll every motor that is there, then use what is left of the period for everything else.

    |<--------------------------- period --------------------------->|
    | drain | poll: one exchange a family | orders, then background  |  (sleep)
                                            \\__ one exchange at a time, each with a deadline

Background is: connecting motors that are not there, and reading what changes slowly. A motor that keeps silent
costs the others nothing: the wait for it is bounded (``_allowance``), after ``offline_after_ns`` it leaves the
poll, and from then on it is looked for in the slack. No reply, no sample: a value is never repeated or invented.

Orders are in ``drivers.orders``, what both are made of in ``drivers.turns``.

Blocking; knows no processes, no queues to elsewhere. ``BusError`` passes through: whoever opened the bus reopens it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from drivers.bus import Bus
from drivers.clock import MS, MonotonicNs, after, monotonic_ns
from drivers.errors import MotorRefused
from drivers.family import Exchange, Family, W
from drivers.motor import SAMPLE, MotorInfo
from drivers.notices import AnyNotice, MotorCounts, MotorLate, MotorOffline, MotorOnline
from drivers.orders import ALL, Orders, Ticket
from drivers.turns import RETRY_FIRST_NS, STEP_LEAST_NS, Job, Timing, Tracked, Turns

__all__ = ["ALL", "Cycle", "Ticket", "Timing"]

RETRY_MOST_NS = 500 * MS
LATE_REPLY_NS = 20 * MS  # adapters hold replies back for up to 16 ms
MOST_REST = 8  # polls
DOUBT_NS = 1 * MS  # that a reply may take longer than twice the usual, and still be prompt
STARVED_CYCLES = 50  # a bus without slack still looks after its background this often


@dataclass(slots=True, kw_only=True, eq=False)
class _Background(Job):
    """Something to do in the slack."""

    connects: bool = False


class Cycle(Generic[W]):
    """All motors of one bus. ``poll`` once a period, ``work`` with the rest of it, ``take_notices`` when convenient.

    Begins without a bus: ``attach`` one before polling, and another when that one is gone.
    """

    def __init__(self, families: Sequence[Family[W, Any]], timing: Timing) -> None:
        self._families: Sequence[Family[W, Any]] = families
        self._timing = timing
        self._notices: list[AnyNotice] = []
        self._turns: Turns[W] = Turns(families, timing, self._reconnect)
        self._tracked = self._turns.tracked
        self._orders: Orders[W] = Orders(self._turns, self._notices)
        self._by_family = [
            {t.motor.bus_id: t for t in self._tracked.values() if t.family is family} for family in families
        ]
        self._polls: list[Exchange[W, Any] | None] = [None] * len(families)
        self._background: deque[_Background] = deque()
        self._turns.queues.append(self._background)
        self._starved = 0

    # -- what the owner calls ------------------------------------------------------------------------------------

    def attach(self, bus: Bus[W]) -> None:
        """Work on ``bus`` from now on; every motor has to be found anew."""
        self._turns.attach(bus)

    def poll(self, start: MonotonicNs) -> NDArray[np.void]:
        """Ask every motor that is online; its samples, dtype SAMPLE, one a motor at most."""
        period_ns = self._timing.period_ns
        end = after(start, period_ns - min(STEP_LEAST_NS // 2, period_ns // 10))
        self._orders.fire(after(monotonic_ns(), sum(self._turns.typical_ns.values())))  # what is due before its end
        self._turns.drain()
        rows: list[tuple[Any, ...]] = []
        for number, (family, tracked) in enumerate(zip(self._families, self._by_family, strict=True)):
            if exchange := self._next_poll(number, family, tracked):
                rows += self._poll_family(family, exchange, tracked, end)
        return np.array(rows, dtype=SAMPLE)

    def work(self, until: MonotonicNs, between: Callable[[], None] = lambda: None) -> None:
        """Perform exchanges of orders and background until ``until``, or until there is nothing to do.

        ``between`` is called after each exchange: it may submit what cannot wait for the end.
        """
        self._orders.check_setpoints()
        self._plan_background()
        while self._orders.step(until) or self._step_background(until):
            between()

    def submit(self, ticket: Ticket) -> None:
        """Queue an order. Whatever becomes of it, exactly one OrderDone or OrderFailed follows."""
        self._orders.submit(ticket)

    def leave(self, until: MonotonicNs) -> None:
        """Stop what a velocity or torque drives: from now on nobody tells it anything."""
        self._orders.leave()
        self.work(until)

    def take_notices(self) -> list[AnyNotice]:
        """Everything worth telling since the last call."""
        notices = list(self._notices)
        self._notices.clear()
        return notices

    @property
    def latched(self) -> frozenset[int]:
        """Motors that an emergency stop has stopped, until it is reset; kept whatever becomes of the bus."""
        return frozenset(index for index, tracked in self._tracked.items() if tracked.latched)

    @property
    def strays(self) -> int:
        """Packets that belonged to no request: late replies, other masters, noise."""
        return self._turns.strays

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
        self._orders.give_up(reason)
        self._background.clear()

    # -- polling -------------------------------------------------------------------------------------------------

    def _next_poll(
        self, number: int, family: Family[W, Any], tracked: Mapping[int, Tracked]
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
        family: Family[W, Any],
        exchange: Exchange[W, Any],
        tracked: Mapping[int, Tracked],
        end: MonotonicNs,
    ) -> list[tuple[Any, ...]]:
        sent_ns = monotonic_ns()
        typical_ns = self._turns.typical_ns[id(family)]
        # a late start, or a silent motor of the family before, must not leave it no time at all
        least_ns = sent_ns + 2 * typical_ns
        deadline = MonotonicNs(max(least_ns, min(end, sent_ns + self._allowance(typical_ns))))
        rows = []
        missing = set(exchange.expects)
        # whatever a reply takes here, the next one is on the wire meanwhile
        for bus_id, feedback, at_ns in self._turns.perform(family, exchange, deadline):
            one = tracked[bus_id]
            if family.asks_all and self._is_doubtful(one, tracked.values(), at_ns - sent_ns):
                continue
            missing.remove(bus_id)
            one.heard_ns, one.misses_in_a_row, one.late, one.sampled = at_ns, 0, False, True
            self._orders.watch(one, feedback)
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
            self._turns.typical_ns[id(family)] += (monotonic_ns() - sent_ns - typical_ns) // 16
        for bus_id, one in tracked.items():
            one.polls += bus_id in exchange.expects
            if bus_id in missing:
                self._missed(one)
        return rows

    def _is_doubtful(self, one: Tracked, family: Iterable[Tracked], took_ns: int) -> bool:
        """Whether a reply may be one to an earlier poll, where a motor cannot be left out of a poll to find out.

        So it is if the motor has just missed one, or is new, and its reply takes much longer than replies usually do.
        (One that is late by about a whole period cannot be told from a prompt one.)
        """
        usual_ns = one.usual_ns or min((other.usual_ns for other in family if other.usual_ns), default=0)
        if usual_ns and (one.misses_in_a_row or not one.sampled) and took_ns > 2 * usual_ns + DOUBT_NS:
            one.doubtful_ns = took_ns
            self._turns.strays += 1
            return True
        one.usual_ns = one.usual_ns + (took_ns - one.usual_ns) // 16 if one.usual_ns else took_ns
        one.doubtful_ns = 0
        return False

    def _allowance(self, typical_ns: int) -> int:
        """How long a poll may wait: most of the period, or more where complete polls are seen to take that long."""
        return max(self._timing.period_ns * 7 // 10, 3 * typical_ns)

    def _missed(self, tracked: Tracked) -> None:
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

    def _offline(self, tracked: Tracked, reason: str) -> None:
        self._notices.append(MotorOffline(tracked.motor.index, tracked.heard_ns, tracked.misses_in_a_row, reason))
        tracked.online = False
        tracked.late = False
        if tracked.sampled:  # else it was found in vain: patience
            tracked.retry_ns = RETRY_FIRST_NS
        tracked.sampled = False
        tracked.due_ns = monotonic_ns() + tracked.retry_ns
        self._forget_polls()
        self._orders.went_offline(tracked)

    def _reconnect(self, tracked: Tracked, reason: str) -> None:
        """A motor says that it has to be connected anew."""
        self._offline(tracked, reason)
        tracked.due_ns = monotonic_ns()

    def _forget_polls(self) -> None:
        self._polls = [None] * len(self._families)

    # -- background ----------------------------------------------------------------------------------------------

    def _plan_background(self) -> None:
        now = monotonic_ns()
        for tracked in self._tracked.values():
            if tracked.due_ns > now or tracked.connecting:
                continue
            bus_id = tracked.motor.bus_id
            if not tracked.online:
                tracked.connecting = True
                self._background.append(_Background(tracked, tracked.family.connect(bus_id), connects=True))
            else:
                tracked.due_ns = now + tracked.family.refresh_ns
                if procedure := tracked.family.refresh(bus_id):
                    self._background.append(_Background(tracked, procedure))

    def _step_background(self, until: MonotonicNs) -> bool:
        if not self._background:
            self._starved = 0
            return False
        if self._background[0].waits:
            self._turns.drain()
            if self._background[0].waits:
                return False
        least_ns = self._turns.least(self._background[0].tracked.family)
        if until - monotonic_ns() < least_ns:
            self._starved += 1
            if self._starved < STARVED_CYCLES:
                return False
            until = after(monotonic_ns(), 2 * least_ns)
        self._starved = 0
        job = self._background[0]
        try:
            ended, result = self._turns.step(job, until)
        except MotorRefused as refusal:
            ended, result = True, refusal
        if ended:
            self._background.popleft()
            if job.connects:
                self._connected(job.tracked, result)
        return True

    def _connected(self, tracked: Tracked, result: MotorInfo | MotorRefused | None) -> None:
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
            self._orders.came_online(tracked, driven=result.driven)
            return
        tracked.due_ns = now + tracked.retry_ns
        tracked.retry_ns = min(2 * tracked.retry_ns, RETRY_MOST_NS)
        if isinstance(result, MotorRefused) and tracked.refusal != str(result):  # it is there, and unfit: say so once
            tracked.refusal = str(result)
            self._notices.append(MotorOffline(tracked.motor.index, tracked.heard_ns, 0, tracked.refusal))
