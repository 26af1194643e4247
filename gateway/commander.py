"""Commands: at most once, never stale, within limits; one final outcome each.

    record -> checks -> written down (committed) -> order to the worker -> acknowledged -> position reached -> done

The order of the checks: readable, authorized (``gateway.auth``), known motor and kind, not seen before, not older than
its ttl, clock not skewed (but for ``UNTIMED``), nothing latched, motor online, within limits. What was written down but
whose effect is unknown (a crash in between) ends as ``failed/interrupted`` at the next start and is not sent again.
While the disk takes nothing, what cannot be written down within its ttl ends as ``failed/not_recorded``; what ends a
motion is sent all the same, and waits for nothing.

An emergency stop goes to every bus before anything else is done about it. It is done when each bus has said so and the
latch is on the disk; until ``reset_estop``, also over restarts, only what stops motors is taken.
"""

import asyncio
import itertools
import logging
import sqlite3
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from drivers import protocols
from drivers.clock import MS, SECOND, after, epoch_ns, monotonic_ns
from drivers.cycle import ALL, Ticket
from drivers.motor import ENDS_MOTION, OVERTAKES, SETPOINTS, Kind, Order, Status
from drivers.notices import OrderDone, OrderFailed
from gateway.auth import Authority
from gateway.board import Board, MotorView
from gateway.commands import Command, Outcome, Reason, State, Unreadable, decode_command
from gateway.config import Config
from gateway.event_time import EventTime, wall_age_ms
from gateway.events import ARM, EventType, make_event
from gateway.journal import CommandState, JournalReader
from gateway.latches import Latch, Latches
from gateway.writer import LogWriter

log = logging.getLogger(__name__)

SKEW_MS = 500.0
"""How far in the future ``issued_at_ns`` may lie: clocks of two machines are never equal."""
ARRIVAL_MARGIN_S = 1.0
"""A position may take twice the time of the way at its speed, and this much more."""
RECENT_IDS = 4096  # more than ever wait for one commit
RECORDINGS = 16
"""A source that is further ahead of the disk than this waits for it, but for a moment only: a stop may follow."""
MOMENT_S = 0.02
GROUP_LEAD_NS = 20 * MS
"""Motors of several buses begin this long after they are told: a few cycles, in which each bus prepares its own."""
STOPS = ENDS_MOTION | {Kind.ESTOP}
"""Kinds that are taken whatever is latched, and whatever the journal says: harmless if repeated."""
UNRECORDED = "the journal took nothing until its time was up; it was not sent"
UNTIMED = frozenset({Kind.STOP, Kind.ESTOP})
"""Kinds that are taken whatever the sender's clock says, if they are read live: they hold an arm, and drop nothing."""
FORGOTTEN = frozenset({Reason.UNAUTHORIZED, Reason.MALFORMED})
"""Why a command may end and its id be used again: else anybody could use up the ids of those who may command, and what
is corrected would need another."""
ARM_WIDE = frozenset({Kind.ESTOP, Kind.RESET_ESTOP})


class Incoming(NamedTuple):
    """A record of the commands topic, and where to go on reading once it is written down.

    ``live``: it came after the gateway began to read this source; else it may be a backlog.
    """

    raw: bytes
    source: str
    partition: int
    next: int
    live: bool = True

    @property
    def inbox(self) -> tuple[str, int, int]:
        """For the log writer."""
        return self.source, self.partition, self.next


@dataclass(slots=True, eq=False)
class _Active:
    """A command that was accepted and has no final outcome yet."""

    command: Command
    read_at_ns: int  # monotonic
    values: dict[int, float]  # partition -> value; NaN: the kind takes none
    sent: bool = False  # else it is being written down
    tickets: dict[int, frozenset[int]] = field(default_factory=dict)  # not answered: number -> partitions
    details: list[str] = field(default_factory=list)
    took: set[int] = field(default_factory=set)  # partitions that have done what they were told
    failures: list[tuple[Reason, str]] = field(default_factory=list)
    under_way: set[int] = field(default_factory=set)  # partitions whose position is not reached
    arrive_by_ns: int = 0


class Commander:
    """Takes records from every source of commands and sees each through. All calls on the event loop's thread."""

    def __init__(
        self,
        config: Config,
        journal: JournalReader,
        writer: LogWriter,
        board: Board,
        time: EventTime,
        latches: Latches,
        send: Callable[[str, Ticket], bool],
        started_at_ns: int | None = None,
    ) -> None:
        """``send`` hands a ticket to the worker of a bus; False if it takes none.

        ``started_at_ns`` (wall clock; now, if not given) tells a backlog from a command.
        """
        self._journal = journal
        self._writer = writer
        self._board = board
        self._started_at_ns = epoch_ns() if started_at_ns is None else started_at_ns
        self._time = time
        self._authority = Authority(config)
        self._latches = latches
        self._send = send
        self._buses = {bus.name: frozenset(m.partition for m in config.motors_on(bus.name)) for bus in config.buses}
        self._partitions = {motor.name: motor.partition for motor in config.motors}
        self._kinds = {
            motor.partition: protocols.load(motor.protocol).kinds_of(motor.driven()) for motor in config.motors
        }
        self._recent: OrderedDict[str, CommandState] = OrderedDict()  # perhaps not committed yet
        self._ended: dict[str, Outcome] = {}  # by an earlier run; perhaps not in the journal
        self._active: list[_Active] = []
        self._recording: set[asyncio.Future[None]] = set()
        self._saving: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)

    # -- in ------------------------------------------------------------------------------------------------------

    def finish_interrupted(self) -> None:
        """End what an earlier run left unfinished; call once, before anything else."""
        for state in self._journal.unfinished_commands():
            detail = "the gateway stopped before the effect was known; not sent again"
            outcome = Outcome(state.id, state.motor, State.FAILED, self._time.now(), 0, Reason.INTERRUPTED, detail)
            self._conclude(outcome, None)

    def ended_before(self, outcomes: Iterable[Outcome]) -> None:
        """What the log knows of commands that have ended, also if the journal does not: a backlog repeats none."""
        self._ended |= {outcome.command_id: outcome for outcome in outcomes}

    def memory(self) -> list[CommandState]:
        """The newest ids that were used, oldest first; perhaps not in the journal yet."""
        return list(self._recent.values())

    def tell_latched(self) -> None:
        """Tell every bus what an earlier run left latched; call before any worker is started."""
        for name, latch in self._latches.held.items():
            detail = f"still latched, since {latch.at_ns} ns"
            if name == ARM:
                self._event(EventType.ESTOP_LATCHED, ARM, by=latch.by, why=latch.why, detail=detail)
                self._tell_all(Kind.ESTOP)
            elif name in self._partitions:
                self._event(EventType.MOTOR_LATCHED, name, why=latch.why, detail=detail)
                self._tell_one(self._partitions[name], Kind.ESTOP)

    async def handle(self, records: Sequence[Incoming]) -> None:
        """Check records in their order, and write down the accepted ones with one commit; then they are sent on."""
        waiting = []
        for record in records:
            if active := self._admit(record):
                if active.command.kind is Kind.ESTOP:
                    self._stop_all(active, record.source)
                elif active.command.kind in ENDS_MOTION:
                    self._dispatch(active)  # ends a motion: harmless if repeated, and must not wait for a sick disk
                else:
                    waiting.append(active)
        if waiting:
            self._record(waiting)
        if len(self._recording) > RECORDINGS:
            await asyncio.wait(self._recording, timeout=MOMENT_S, return_when=asyncio.FIRST_COMPLETED)

    def _record(self, waiting: Sequence[_Active]) -> None:
        """Send commands once they are written down, each behind those before it."""
        recording = asyncio.get_running_loop().create_future()
        self._recording.add(recording)

        def recorded() -> None:
            self._recording.discard(recording)
            if not recording.done():
                recording.set_result(None)
            for active in waiting:
                self._dispatch(active)

        self._writer.when_durable(recorded)

    def _admit(self, record: Incoming) -> _Active | None:
        """Check one record. Either it is written down as accepted, or it has its final outcome."""
        read_at_ns = monotonic_ns()
        try:
            command = decode_command(record.raw)
        except Unreadable as error:
            if not self._is_repeated(record, error.command_id):
                self._unreadable(record, error, read_at_ns)
            return None
        if self._is_repeated(record, command.id):
            return None
        if unauthorized := self._authority.refusal(command, record.source):
            outcome = self._outcome(command, State.REJECTED, read_at_ns, Reason.UNAUTHORIZED, unauthorized)
            self._writer.read_upto(outcome.entry(self._partition(command.motor)), record.inbox)
            return None
        if refusal := self._refusal(command, live=record.live):
            state, reason, detail = refusal
            outcome = self._outcome(command, state, read_at_ns, reason, detail)
            if self._may_be_known(command.id):  # what is remembered of the id stays as it is
                self._writer.read_upto(outcome.entry(self._partition(command.motor)), record.inbox)
            else:
                self._conclude(outcome, record)
            return None
        active = _Active(command, read_at_ns, self._values(command))
        self._supersede(active)
        remembered = CommandState(command.id, False, self._time.now(), command.motor)
        outcome = self._outcome(command, State.ACCEPTED, read_at_ns)
        self._remember(remembered, outcome, record)
        return active

    def _is_repeated(self, record: Incoming, command_id: str | None) -> bool:
        """Whether a backlog holds what an earlier run has ended, and the journal has forgotten: then it is passed over.

        What the journal remembers is an id that was used twice, and is refused as such.
        """
        outcome = None if record.live or command_id is None else self._ended.get(command_id)
        if outcome is None or self._may_be_known(outcome.command_id):
            return False
        if outcome.reason in FORGOTTEN:
            self._writer.read_upto(None, record.inbox)
        else:
            self._remember(CommandState(outcome.command_id, True, outcome.at_ns, outcome.motor), None, record)
        return True

    def _unreadable(self, record: Incoming, error: Unreadable, read_at_ns: int) -> None:
        if error.command_id is None:
            event = make_event(
                EventType.COMMAND_UNREADABLE,
                self._time.now(),
                source=record.source,
                source_partition=record.partition,
                source_offset=record.next - 1,
                detail=error.detail,
            )
            self._writer.read_upto(event, record.inbox)
            return
        motor = error.motor or ARM
        outcome = Outcome(
            error.command_id, motor, State.REJECTED, self._time.now(), _since_us(read_at_ns), Reason.MALFORMED,
            error.detail,
        )  # fmt: skip
        self._writer.read_upto(outcome.entry(self._partition(motor)), record.inbox)

    def _refusal(self, command: Command, *, live: bool) -> tuple[State, Reason, str] | None:
        """Why this command is not accepted; None if it is."""
        named = [command.motor] if command.motor != ARM else command.targets or ()
        if unknown := ", ".join(repr(name) for name in named if name not in self._partitions):
            known = ", ".join(self._partitions)
            return State.REJECTED, Reason.UNKNOWN_MOTOR, f"no motor {unknown} on this arm; there are {known}"
        values = self._values(command)
        addressed = list(values)
        if unsupported := self._unsupported(command, addressed):
            return State.REJECTED, Reason.UNSUPPORTED, unsupported
        try:
            seen = self._seen(command.id)
        except sqlite3.Error as error:
            if command.kind not in STOPS:
                return State.REJECTED, Reason.NOT_RECORDED, f"the journal cannot say whether it is new: {error}"
            seen = None  # harmless if repeated
        if seen:
            return State.REJECTED, Reason.DUPLICATE, f"id {command.id!r} was used before, at {seen.at_ns} ns"
        if not (live and command.kind in UNTIMED) and (untimely := self._untimely(command)):
            return untimely
        views = [self._board.motors[partition] for partition in addressed]
        if latched := self._latched(command.kind, views):
            return latched
        silent = [view for view in views if not view.online and command.kind not in ARM_WIDE]
        if silent and (command.targets or len(silent) == len(views)):  # a motion of several is one of all or of none
            names = ", ".join(view.config.name for view in silent)
            return State.REJECTED, Reason.MOTOR_OFFLINE, f"{names}: no answer on bus {silent[0].config.bus!r}"
        beyond = [refusal for view in views if (refusal := _beyond(command, values[view.config.partition], view))]
        if beyond:
            reason = beyond[0][0]
            return State.REJECTED, reason, "; ".join(detail for of, detail in beyond if of is reason)
        return None

    def _untimely(self, command: Command) -> tuple[State, Reason, str] | None:
        """Whether it comes too late, or from a clock that cannot be right."""
        age_ms = wall_age_ms(command.issued_at_ns)
        if age_ms > command.ttl_ms:
            detail = f"issued {age_ms:.0f} ms ago, was good for {command.ttl_ms:g} ms"
            return State.EXPIRED, Reason.STALE, detail
        if command.issued_at_ns < self._started_at_ns:
            return State.EXPIRED, Reason.STALE, "issued before this run of the gateway began: a backlog moves nothing"
        if age_ms < -SKEW_MS:
            detail = f"issued {-age_ms:.0f} ms in the future (at most {SKEW_MS:.0f} ms): set the sender's clock"
            return State.REJECTED, Reason.CLOCK_SKEW, detail
        return None

    def _latched(self, kind: Kind, views: Sequence[MotorView]) -> tuple[State, Reason, str] | None:
        """Whether something is latched that keeps a command from being taken."""
        if kind in STOPS or kind is Kind.RESET_ESTOP:
            return None
        if (estop := self._latches.estop) and not self._is_coming(Kind.RESET_ESTOP):
            detail = f"emergency stop by {estop.by}: {estop.why}; send reset_estop for * first"
            return State.REJECTED, Reason.ESTOP_LATCHED, detail
        for view in views:
            latch = self._latches.held.get(view.config.name)
            hot = view.hot and "over_temperature" in view.config.stop_on
            cleared = kind is Kind.CLEAR_FAULT or self._is_coming(Kind.CLEAR_FAULT, view.config.partition)
            if latch and (hot or not cleared):
                remedy = "let it cool down first" if hot else "send clear_fault first"
                return State.REJECTED, Reason.MOTOR_LATCHED, f"{view.config.name} was stopped: {latch.why}; {remedy}"
        return None

    def _is_coming(self, kind: Kind, partition: int | None = None) -> bool:
        """Whether a command of this kind is being written down: what follows it is meant for afterwards."""
        waiting = [active for active in self._active if active.command.kind is kind and not active.sent]
        return any(partition is None or partition in active.values for active in waiting)

    def _seen(self, command_id: str) -> CommandState | None:
        return self._recent.get(command_id) or self._journal.command(command_id)

    def _may_be_known(self, command_id: str) -> bool:
        try:
            return self._seen(command_id) is not None
        except sqlite3.Error:
            return True

    def _unsupported(self, command: Command, addressed: Sequence[int]) -> str | None:
        if command.kind in ARM_WIDE:
            return None if command.motor == ARM else f'{command.kind} is for the whole arm: motor = "{ARM}"'
        if command.kind in SETPOINTS and command.motor == ARM and command.targets is None:
            return f"{command.kind} for all motors: name one motor, or targets"
        for partition in addressed:
            if command.kind is Kind.CLEAR_FAULT and self._name(partition) in self._latches.held:
                continue  # a fault of the gateway's own finding
            if command.kind not in self._kinds[partition]:
                kinds = ", ".join(sorted(self._kinds[partition]))
                return f"{self._board.motors[partition].config.name} does not take {command.kind}; it takes {kinds}"
            if command.kind is Kind.TORQUE and self._board.motors[partition].config.torque_nm is None:
                return f"{self._board.motors[partition].config.name} has no torque_nm, the limit of its torque; set it"
        return None

    def _values(self, command: Command) -> dict[int, float]:
        """{partition: value} of the motors that a command is for."""
        if command.targets is not None:
            return {self._partitions[name]: value for name, value in command.targets.items()}
        value = float("nan") if command.value is None else command.value
        addressed = self._board.motors if command.motor == ARM else [self._partitions[command.motor]]
        return dict.fromkeys(addressed, value)

    def _partition(self, motor: str) -> int:
        return self._partitions.get(motor, 0)

    # -- on the way ----------------------------------------------------------------------------------------------

    def _supersede(self, newer: _Active) -> None:
        """A setpoint under way gives way to a newer one, and to anything that ends the motion.

        What ends a motion is sent ahead of what is being written down: an ``enable`` there must not follow a disable.
        """
        by = f"by {newer.command.id!r}"
        if newer.command.kind in OVERTAKES:
            self._end_setpoints(newer.values, State.SUPERSEDED, Reason.NEWER_COMMAND, by)
        if newer.command.kind is Kind.DISABLE:
            for older in [a for a in self._active if a.command.kind is Kind.ENABLE and not a.sent]:
                if not newer.values.keys().isdisjoint(older.values):
                    self._end(older, State.SUPERSEDED, Reason.NEWER_COMMAND, by)
        self._active.append(newer)

    def _end_setpoints(self, motors: Iterable[int], state: State, reason: Reason, detail: str) -> None:
        """A motion of several motors ends as a whole."""
        motors = frozenset(motors)
        for older in [a for a in self._active if a.command.kind in SETPOINTS]:
            if not motors.isdisjoint(older.values):
                self._end(older, state, reason, detail)

    def _dispatch(self, active: _Active) -> None:
        if active not in self._active:  # overtaken while it was written down
            return
        active.sent = True
        if active.command.kind not in STOPS and _left_ms(active) < 0:
            self._end(active, State.FAILED, Reason.NOT_RECORDED, UNRECORDED)
            return
        if active.command.kind is Kind.RESET_ESTOP:
            self._reset_all(active)
            return
        if latched := self._latched(active.command.kind, [self._board.motors[p] for p in active.values]):  # meanwhile
            _, reason, detail = latched
            self._end(active, State.FAILED, reason, detail)
            return
        if active.command.kind is Kind.CLEAR_FAULT:
            self._release(active)
        takes = [partition for partition in sorted(active.values) if active.command.kind in self._kinds[partition]]
        online = [partition for partition in takes if self._board.motors[partition].online]
        for partition in takes:
            if partition not in online:
                active.failures.append((Reason.MOTOR_OFFLINE, f"{self._name(partition)} does not answer"))
        tickets = self._tickets(active, online)
        active.tickets = {ticket.number: frozenset({ticket.motor}) for ticket in tickets}
        for ticket in tickets:
            bus = self._board.motors[ticket.motor].config.bus
            if not self._send(bus, ticket):
                self._failed(active, ticket.number, Reason.OVERLOADED, f"bus {bus!r} takes no orders now")
        if not tickets:
            self._settle(active)

    def _tickets(self, active: _Active, online: Sequence[int]) -> list[Ticket]:
        command = active.command
        now = monotonic_ns()
        expires_ns = after(now, int(_left_ms(active) * MS))
        sizes = Counter(self._board.motors[partition].config.bus for partition in online)
        group = next(self._numbers) if command.targets and len(online) > 1 else 0
        not_before_ns = after(now, GROUP_LEAD_NS) if len(sizes) > 1 else 0
        tickets = []
        for partition in online:
            config = self._board.motors[partition].config
            speed = command.velocity_rad_s if command.velocity_rad_s is not None else config.velocity_rad_s
            order = Order(command.kind, active.values[partition], speed)
            ticket = Ticket(next(self._numbers), partition, order, expires_ns)
            if group:
                ticket = replace(ticket, group=group, size=sizes[config.bus], not_before_ns=not_before_ns)
            tickets.append(ticket)
        return tickets

    def order_done(self, notice: OrderDone) -> None:
        """A motor acknowledged an order, or a bus an emergency stop."""
        if active := self._of(notice.ticket):
            if active.command.kind is Kind.ENABLE:  # the next command need not wait for a sample that says so
                self._board.motors[notice.motor].status |= Status.ENABLED
            elif active.command.kind is Kind.DISABLE:
                self._board.motors[notice.motor].status &= ~Status.ENABLED
            active.took |= {p for p in active.tickets[notice.ticket] if self._board.motors[p].online}
            self._answered(active, notice.ticket, None, "" if active.command.kind is Kind.ESTOP else notice.detail)

    def order_failed(self, notice: OrderFailed) -> None:
        """A motor, or its worker, refused an order."""
        if active := self._of(notice.ticket):
            self._failed(active, notice.ticket, _reason(notice.reason), notice.detail)

    def worker_gone(self, partitions: Sequence[int]) -> None:
        """The worker of these motors died; what it had been told has an unknown effect."""
        for active in list(self._active):
            for number in [n for n, motors in active.tickets.items() if not motors.isdisjoint(partitions)]:
                self._failed(active, number, Reason.INTERRUPTED, "the bus worker died; the effect is unknown")

    def moved(self, views: Sequence[MotorView]) -> None:
        """New samples of these motors: has one arrived?"""
        for active in [a for a in self._active if a.under_way]:
            for view in views:
                if view.config.partition in active.under_way:
                    self._check_arrival(active, view)
            self._settle(active)

    def check_deadlines(self) -> None:
        """Fail what is not written down in time, and positions that take too long; call several times a second."""
        for active in [a for a in self._active if not a.sent and _left_ms(a) < 0]:
            self._end(active, State.FAILED, Reason.NOT_RECORDED, UNRECORDED)
        for active in [a for a in self._active if a.under_way]:
            late = monotonic_ns() > active.arrive_by_ns
            for partition in sorted(active.under_way):
                view = self._board.motors[partition]
                if not view.online:
                    self._arrived(active, view, Reason.MOTOR_OFFLINE, "went silent on the way")
                elif late:
                    detail = (
                        f"stands at {view.position_rad:.4f} rad, not at {active.values[partition]:.4f} rad, in time"
                    )
                    self._arrived(active, view, Reason.NOT_REACHED, detail)
            self._settle(active)

    def interrupt_all(self) -> None:
        """The gateway stops: nothing is seen through any more."""
        for recording in self._recording:
            recording.cancel()
        for active in list(self._active):
            self._end(active, State.FAILED, Reason.INTERRUPTED, "the gateway was stopped")

    def _of(self, ticket: int) -> _Active | None:
        return next((a for a in self._active if ticket in a.tickets), None)

    def _failed(self, active: _Active, number: int, reason: Reason, detail: str) -> None:
        """A ticket has failed; of several, it is told whose."""
        named = [self._name(partition) for partition in sorted(active.tickets[number])]
        told = f"{named[0]}: {detail}" if len(active.values) > 1 and len(named) == 1 else detail
        self._answered(active, number, (reason, told))

    def _answered(self, active: _Active, number: int, failure: tuple[Reason, str] | None, detail: str = "") -> None:
        del active.tickets[number]
        if failure:
            active.failures.append(failure)
        else:
            active.details.append(detail)
        if active.command.kind is Kind.POSITION and not active.tickets and not active.failures:
            self._await_arrival(active)
        else:
            self._settle(active)

    def _settle(self, active: _Active) -> None:
        """End a command that waits for nothing any more."""
        if active.tickets or active.under_way:
            return
        if not active.failures:
            details = [self._stopped(active)] if active.command.kind is Kind.ESTOP else active.details
            self._end(active, State.DONE, None, "; ".join(dict.fromkeys(filter(None, details))))
            return
        told = [detail for _, detail in active.failures]
        if len(active.values) > 1:  # the others do as they were told, or have done so
            taken = ", ".join(self._name(partition) for partition in sorted(active.took))
            told += [f"taken by {taken}"] if taken else active.details
        self._end(active, State.FAILED, active.failures[0][0], "; ".join(dict.fromkeys(told)))

    def _stopped(self, active: _Active) -> str:
        offline = [self._name(partition) for partition in sorted(active.values.keys() - active.took)]
        return f"latched; {len(active.took)} stopped" + (f"; offline: {', '.join(offline)}" if offline else "")

    def _await_arrival(self, active: _Active) -> None:
        active.details.clear()  # that they have begun is nothing to tell when they have arrived
        active.took.clear()
        active.under_way = set(active.values)
        ways_s = []
        for partition, value in active.values.items():
            view = self._board.motors[partition]
            speed = active.command.velocity_rad_s or view.config.velocity_rad_s
            ways_s.append(abs(value - view.position_rad) / speed)
        active.arrive_by_ns = after(monotonic_ns(), int((2 * max(ways_s) + ARRIVAL_MARGIN_S) * SECOND))

    def _check_arrival(self, active: _Active, view: MotorView) -> None:
        off_rad = view.position_rad - active.values[view.config.partition]
        if abs(off_rad) <= view.config.position_tolerance_rad:
            self._arrived(active, view, None, f"at {view.position_rad:.4f} rad")
        elif not view.status & Status.ENABLED:
            self._arrived(active, view, Reason.NOT_ENABLED, f"lost its torque at {view.position_rad:.4f} rad")

    def _arrived(self, active: _Active, view: MotorView, reason: Reason | None, detail: str) -> None:
        """The way of one motor has ended, there or elsewhere."""
        active.under_way.discard(view.config.partition)
        told = f"{view.config.name} {detail}" if active.command.targets else detail
        if reason:
            active.failures.append((reason, told))
        else:
            active.details.append(told)

    # -- latches -------------------------------------------------------------------------------------------------

    def _stop_all(self, active: _Active, source: str) -> None:
        """Every bus is told at once, and nothing is waited for: a worker that hangs delays no other."""
        command, held, active.sent = active.command, self._latches.held, True
        latch = Latch(self._time.now(), command.issuer or source, f"command {command.id!r}")
        told = self._tell_all(Kind.ESTOP, active)
        first, held[ARM] = ARM not in held, held.get(ARM, latch)
        for older in [a for a in self._active if a.command.kind not in STOPS]:
            self._end(older, State.FAILED, Reason.ESTOP_LATCHED, f"emergency stop by {command.id!r}")
        if first:
            self._event(EventType.ESTOP_LATCHED, ARM, by=latch.by, why=latch.why, source=source)
        for number, bus in told:
            detail = f"bus {bus!r} has no worker that listens; the next one is told before anything else"
            self._answered(active, number, (Reason.OVERLOADED, detail))
        self._save(active)

    def _reset_all(self, active: _Active) -> None:
        command = active.command
        latch = self._latches.held.pop(ARM, None)
        unheard = self._tell_all(Kind.RESET_ESTOP, active)
        for name in self._latches.held.keys() & self._partitions:  # what stopped by itself is another matter
            self._tell_one(self._partitions[name], Kind.ESTOP)
        if latch:
            since_ns = latch.at_ns
            self._event(
                EventType.ESTOP_RESET, ARM, by=command.issuer or "", why=f"command {command.id!r}", since_ns=since_ns
            )
        for number, _ in unheard:  # whoever works there next is not told of a stop
            self._answered(active, number, None, "reset")
        self._save(active)

    def latch(self, view: MotorView, why: str) -> None:
        """Stop one motor, and move it no more until its fault is cleared."""
        name, partition = view.config.name, view.config.partition
        if name in self._latches.held:
            return
        self._tell_one(partition, Kind.ESTOP)
        self._latches.held[name] = Latch(self._time.now(), "gateway", why)
        self._end_setpoints([partition], State.FAILED, Reason.MOTOR_LATCHED, f"{name} was stopped: {why}")
        self._event(EventType.MOTOR_LATCHED, name, why=why)
        self._save()

    def _release(self, active: _Active) -> None:
        """Motors that stopped by themselves may move again."""
        released = [p for p in active.values if self._latches.held.pop(self._name(p), None)]
        for partition in released:
            self._tell_one(partition, Kind.RESET_ESTOP)
            self._event(EventType.MOTOR_RELEASED, self._name(partition), why=f"command {active.command.id!r}")
            active.details.append("released")
        if released:
            self._save()

    def _tell_all(self, kind: Kind, active: _Active | None = None) -> list[tuple[int, str]]:
        """An order to every bus as a whole; the tickets and buses of those whose worker took none."""
        untold = []
        for bus, partitions in self._buses.items():
            ticket = Ticket(next(self._numbers), ALL, Order(kind), monotonic_ns())
            if active:
                active.tickets[ticket.number] = partitions
            if not self._send(bus, ticket):
                untold.append((ticket.number, bus))
        return untold

    def _tell_one(self, partition: int, kind: Kind) -> None:
        """An order that no command waits for."""
        ticket = Ticket(next(self._numbers), partition, Order(kind), monotonic_ns())
        self._send(self._board.motors[partition].config.bus, ticket)

    def _save(self, active: _Active | None = None) -> None:
        """Write down what is latched; a command is not done before."""
        number = next(self._numbers)
        if active:
            active.tickets[number] = frozenset()
        saving = asyncio.create_task(self._save_and_tell(number))
        self._saving.add(saving)
        saving.add_done_callback(self._saving.discard)

    async def _save_and_tell(self, number: int) -> None:
        failure = None
        try:
            await self._latches.save()
        except OSError as error:
            log.error("what is latched could not be written down: %s", error)
            failure = (Reason.NOT_RECORDED, f"in force, but not on the disk, and so not after a restart: {error}")
        if active := self._of(number):
            self._answered(active, number, failure)

    def _event(self, kind: EventType, motor: str, **details: Any) -> None:
        self._writer.entry(make_event(kind, self._time.now(), motor, self._partition(motor), **details))

    def _name(self, partition: int) -> str:
        return self._board.motors[partition].config.name

    # -- out -----------------------------------------------------------------------------------------------------

    def _end(self, active: _Active, state: State, reason: Reason | None, detail: str) -> None:
        self._active.remove(active)
        self._conclude(self._outcome(active.command, state, active.read_at_ns, reason, detail), None)

    def _conclude(self, outcome: Outcome, record: Incoming | None) -> None:
        """Write down a final outcome, and that the id is used up."""
        self._remember(CommandState(outcome.command_id, True, outcome.at_ns, outcome.motor), outcome, record)

    def _remember(self, state: CommandState, outcome: Outcome | None, record: Incoming | None) -> None:
        self._recent[state.id] = state
        if len(self._recent) > RECENT_IDS:
            self._recent.popitem(last=False)
        entry = outcome.entry(self._partition(outcome.motor)) if outcome else None
        self._writer.command(state, entry, record.inbox if record else None)

    def _outcome(
        self, command: Command, state: State, read_at_ns: int, reason: Reason | None = None, detail: str = ""
    ) -> Outcome:
        return Outcome(command.id, command.motor, state, self._time.now(), _since_us(read_at_ns), reason, detail)


def _reason(word: str) -> Reason:
    """A family's word, if it is one of ours."""
    return Reason(word) if word in Reason.__members__.values() else Reason.REFUSED


def _left_ms(active: _Active) -> float:
    """How long a command is still good; its sender's clock may be ahead, or not count (``UNTIMED``)."""
    command = active.command
    if command.kind in UNTIMED:
        return command.ttl_ms - _since_us(active.read_at_ns) / 1000
    return min(command.ttl_ms - wall_age_ms(command.issued_at_ns), command.ttl_ms)


def _since_us(at_ns: int) -> int:
    return (monotonic_ns() - at_ns) // 1000


def _beyond(command: Command, value: float, view: MotorView) -> tuple[Reason, str] | None:
    """Whether a setpoint lies outside the motor's limits, or the motor is not ready for one."""
    if command.kind not in SETPOINTS:
        return None
    if beyond := _beyond_limits(command.kind, value, command.velocity_rad_s, view):
        return Reason.OUT_OF_LIMITS, beyond
    if not view.status & Status.ENABLED:
        return Reason.NOT_ENABLED, f"{view.config.name} has no torque; send enable first"
    return None


def _beyond_limits(kind: Kind, value: float, speed: float | None, view: MotorView) -> str | None:
    """What is wrong with a setpoint: in rad, rad/s or N m, by kind."""
    name, (low, high), fastest = view.config.name, view.config.position_rad, view.config.velocity_rad_s
    if kind is Kind.POSITION:
        if not low <= value <= high:
            return f"position {value:g} rad: {name} may go from {low:g} to {high:g} rad"
        if speed is not None and not 0 < speed <= fastest:
            return f"velocity_rad_s {speed:g} rad/s: must be above 0 and at most {fastest:g} rad/s for {name}"
        return None
    most, unit = (fastest, "rad/s") if kind is Kind.VELOCITY else (view.config.torque_nm or 0.0, "N m")
    if abs(value) > most:
        return f"{kind} {value:g} {unit}: at most {most:g} {unit} either way for {name}"
    at = view.position_rad
    if (value > 0 and at >= high) or (value < 0 and at <= low):
        return f"{kind} {value:g} {unit}: {name} stands at {at:.4f} rad and may not go beyond {low:g} to {high:g} rad"
    return None
