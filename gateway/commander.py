"""Commands: at most once, never stale, within limits; one final outcome each.

    record -> checks -> written down (committed) -> order to the worker -> acknowledged -> position reached -> done

The order of the checks: readable, known motor and kind, not seen before, not older than its ttl, clock not skewed,
motor online, within limits. What was written down but whose effect is unknown (a crash in between) ends as
``failed/interrupted`` at the next start and is not sent again. While the disk takes nothing, what cannot be written
down within its ttl ends as ``failed/not_recorded``; what ends a motion is sent all the same, and waits for nothing.
"""

import asyncio
import itertools
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from drivers import protocols
from drivers.clock import MS, SECOND, after, epoch_ns, monotonic_ns
from drivers.cycle import Ticket
from drivers.motor import ENDS_MOTION, OVERTAKES, SETPOINTS, Kind, Order, Status
from drivers.notices import OrderDone, OrderFailed
from gateway.board import Board, MotorView
from gateway.commands import Command, Outcome, Reason, State, Unreadable, decode_command
from gateway.config import Config
from gateway.event_time import EventTime, wall_age_ms
from gateway.events import ARM, EventType, make_event
from gateway.journal import CommandState, JournalReader
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


class Incoming(NamedTuple):
    """A record of the commands topic, and where to go on reading once it is written down."""

    raw: bytes
    source: str
    partition: int
    next: int

    @property
    def inbox(self) -> tuple[str, int, int]:
        """For the log writer."""
        return self.source, self.partition, self.next


@dataclass(slots=True, eq=False)
class _Active:
    """A command that was accepted and has no final outcome yet."""

    command: Command
    read_at_ns: int  # monotonic
    waiting: set[int]  # partitions whose worker has not answered
    tickets: dict[int, int] = field(default_factory=dict)  # ticket -> partition
    details: list[str] = field(default_factory=list)
    failures: list[tuple[Reason, str]] = field(default_factory=list)
    arrive_by_ns: int = 0  # a position under way; 0: not under way


class Commander:
    """Takes records from every source of commands and sees each through. All calls on the event loop's thread."""

    def __init__(
        self,
        config: Config,
        journal: JournalReader,
        writer: LogWriter,
        board: Board,
        time: EventTime,
        send: Callable[[int, Ticket], bool],
        started_at_ns: int | None = None,
    ) -> None:
        """``send`` hands a ticket to the worker that owns the motor's bus; False if it takes none.

        ``started_at_ns`` (wall clock; now, if not given) tells a backlog from a command.
        """
        self._journal = journal
        self._writer = writer
        self._board = board
        self._started_at_ns = epoch_ns() if started_at_ns is None else started_at_ns
        self._time = time
        self._send = send
        self._partitions = {motor.name: motor.partition for motor in config.motors}
        self._kinds = {
            motor.partition: protocols.load(motor.protocol).kinds_of(motor.driven()) for motor in config.motors
        }
        self._recent: OrderedDict[str, CommandState] = OrderedDict()  # perhaps not committed yet
        self._active: list[_Active] = []
        self._recording: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count(1)

    # -- in ------------------------------------------------------------------------------------------------------

    def finish_interrupted(self) -> None:
        """End what an earlier run left unfinished; call once, before anything else."""
        for state in self._journal.unfinished_commands():
            detail = "the gateway stopped before the effect was known; not sent again"
            outcome = Outcome(state.id, state.motor, State.FAILED, self._time.now(), 0, Reason.INTERRUPTED, detail)
            self._conclude(outcome, None)

    def memory(self) -> list[CommandState]:
        """The newest ids that were used, oldest first; perhaps not in the journal yet."""
        return list(self._recent.values())

    async def handle(self, records: Sequence[Incoming]) -> None:
        """Check records in their order, and write down the accepted ones with one commit; then they are sent on."""
        waiting = []
        for record in records:
            if active := self._admit(record):
                if active.command.kind in ENDS_MOTION:
                    self._dispatch(active)  # ends a motion: harmless if repeated, and must not wait for a sick disk
                else:
                    waiting.append(active)
        if waiting:
            recording = asyncio.create_task(self._dispatch_when_recorded(waiting))
            self._recording.add(recording)
            recording.add_done_callback(self._recording.discard)
        if len(self._recording) > RECORDINGS:
            await asyncio.wait(self._recording, timeout=MOMENT_S, return_when=asyncio.FIRST_COMPLETED)

    async def _dispatch_when_recorded(self, waiting: Sequence[_Active]) -> None:
        """Send commands once they are written down; those whose time is up before that are never sent."""
        recorded = asyncio.create_task(self._writer.durable())
        try:
            for active in sorted(waiting, key=_left_ms):
                await asyncio.wait({recorded}, timeout=max(0.0, _left_ms(active) / 1000))
                if not recorded.done() and active in self._active:
                    detail = "the journal took nothing until its time was up; it was not sent"
                    self._end(active, State.FAILED, Reason.NOT_RECORDED, detail)
        finally:
            recorded.cancel()
        for active in waiting:
            self._dispatch(active)

    def _admit(self, record: Incoming) -> _Active | None:
        """Check one record. Either it is written down as accepted, or it has its final outcome."""
        read_at_ns = monotonic_ns()
        try:
            command = decode_command(record.raw)
        except Unreadable as error:
            self._unreadable(record, error, read_at_ns)
            return None
        if refusal := self._refusal(command):
            state, reason, detail = refusal
            outcome = self._outcome(command, state, read_at_ns, reason, detail)
            if self._may_be_known(command.id):  # what is remembered of the id stays as it is
                self._writer.read_upto(outcome.entry(self._partition(command.motor)), record.inbox)
            else:
                self._conclude(outcome, record)
            return None
        targets = [self._board.motors[p] for p in self._addressed(command)]
        active = _Active(command, read_at_ns, {view.config.partition for view in targets if view.online})
        active.failures = [
            (Reason.MOTOR_OFFLINE, f"{view.config.name} does not answer") for view in targets if not view.online
        ]
        self._supersede(active)
        remembered = CommandState(command.id, False, self._time.now(), command.motor)
        outcome = self._outcome(command, State.ACCEPTED, read_at_ns)
        self._remember(remembered, outcome, record)
        return active

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
        # the id is not remembered: nothing was asked for that a corrected record could repeat
        self._writer.read_upto(outcome.entry(self._partition(motor)), record.inbox)

    def _refusal(self, command: Command) -> tuple[State, Reason, str] | None:
        """Why this command is not accepted; None if it is."""
        if command.motor != ARM and command.motor not in self._partitions:
            known = ", ".join(self._partitions)
            return State.REJECTED, Reason.UNKNOWN_MOTOR, f"no motor {command.motor!r} on this arm; there are {known}"
        addressed = self._addressed(command)
        if unsupported := self._unsupported(command, addressed):
            return State.REJECTED, Reason.UNSUPPORTED, unsupported
        try:
            seen = self._seen(command.id)
        except sqlite3.Error as error:
            if command.kind not in ENDS_MOTION:
                return State.REJECTED, Reason.NOT_RECORDED, f"the journal cannot say whether it is new: {error}"
            seen = None  # harmless if repeated
        if seen:
            return State.REJECTED, Reason.DUPLICATE, f"id {command.id!r} was used before, at {seen.at_ns} ns"
        age_ms = wall_age_ms(command.issued_at_ns)
        if age_ms > command.ttl_ms:
            detail = f"issued {age_ms:.0f} ms ago, was good for {command.ttl_ms:g} ms"
            return State.EXPIRED, Reason.STALE, detail
        if command.issued_at_ns < self._started_at_ns:
            return State.EXPIRED, Reason.STALE, "issued before this run of the gateway began: a backlog moves nothing"
        if age_ms < -SKEW_MS:
            detail = f"issued {-age_ms:.0f} ms in the future (at most {SKEW_MS:.0f} ms): set the sender's clock"
            return State.REJECTED, Reason.CLOCK_SKEW, detail
        views = [self._board.motors[partition] for partition in addressed]
        if not any(view.online for view in views):
            silent = ", ".join(view.config.name for view in views)
            return State.REJECTED, Reason.MOTOR_OFFLINE, f"{silent}: no answer on bus {views[0].config.bus!r}"
        for view in views:
            if refusal := _beyond(command, view):
                return refusal
        return None

    def _seen(self, command_id: str) -> CommandState | None:
        return self._recent.get(command_id) or self._journal.command(command_id)

    def _may_be_known(self, command_id: str) -> bool:
        try:
            return self._seen(command_id) is not None
        except sqlite3.Error:
            return True

    def _unsupported(self, command: Command, addressed: Sequence[int]) -> str | None:
        if command.targets is not None:
            return "targets: several motors in one command are not supported yet; send one command a motor"
        if command.kind in SETPOINTS and command.motor == ARM:
            return f"{command.kind} for all motors: name one motor"
        for partition in addressed:
            if command.kind not in self._kinds[partition]:
                kinds = ", ".join(sorted(self._kinds[partition]))
                return f"{self._board.motors[partition].config.name} does not take {command.kind}; it takes {kinds}"
            if command.kind is Kind.TORQUE and self._board.motors[partition].config.torque_nm is None:
                return f"{self._board.motors[partition].config.name} has no torque_nm, the limit of its torque; set it"
        return None

    def _addressed(self, command: Command) -> list[int]:
        return list(self._board.motors) if command.motor == ARM else [self._partitions[command.motor]]

    def _partition(self, motor: str) -> int:
        return self._partitions.get(motor, 0)

    # -- on the way ----------------------------------------------------------------------------------------------

    def _supersede(self, newer: _Active) -> None:
        """A setpoint under way gives way to a newer one, and to anything that ends the motion."""
        if newer.command.kind in OVERTAKES:
            addressed = set(self._addressed(newer.command))
            for older in [a for a in self._active if a.command.kind in SETPOINTS]:
                if addressed.issuperset(self._addressed(older.command)):
                    self._end(older, State.SUPERSEDED, Reason.NEWER_COMMAND, f"by {newer.command.id!r}")
        self._active.append(newer)

    def _dispatch(self, active: _Active) -> None:
        if active not in self._active:  # overtaken while it was written down
            return
        command = active.command
        expires_ns = after(monotonic_ns(), int(_left_ms(active) * MS))
        for partition in sorted(active.waiting):
            config = self._board.motors[partition].config
            order = Order(
                command.kind,
                command.value if command.value is not None else float("nan"),
                command.velocity_rad_s if command.velocity_rad_s is not None else config.velocity_rad_s,
                config.position_rad,
            )
            ticket = Ticket(next(self._numbers), partition, order, expires_ns)
            active.tickets[ticket.number] = partition
            if not self._send(partition, ticket):
                self._answered(active, partition, (Reason.OVERLOADED, f"bus {config.bus!r} takes no orders now"), "")

    def order_done(self, notice: OrderDone) -> None:
        """A motor acknowledged an order."""
        if active := self._of(notice.ticket):
            view = self._board.motors[notice.motor]
            if active.command.kind is Kind.ENABLE:  # the next command need not wait for a sample that says so
                view.status |= Status.ENABLED
            elif active.command.kind is Kind.DISABLE:
                view.status &= ~Status.ENABLED
            self._answered(active, notice.motor, None, notice.detail)

    def order_failed(self, notice: OrderFailed) -> None:
        """A motor, or its worker, refused an order."""
        if active := self._of(notice.ticket):
            self._answered(active, notice.motor, (_reason(notice.reason), notice.detail), "")

    def worker_gone(self, partitions: Sequence[int]) -> None:
        """The worker of these motors died; what it had been told has an unknown effect."""
        for active in list(self._active):
            for partition in active.waiting.intersection(partitions):
                failure = (Reason.INTERRUPTED, "the bus worker died; the effect is unknown")
                self._answered(active, partition, failure, "")

    def moved(self, views: Sequence[MotorView]) -> None:
        """New samples of these motors: has one arrived?"""
        for active in [a for a in self._active if a.arrive_by_ns]:
            view = self._board.motors[self._partitions[active.command.motor]]
            if view in views:
                self._check_arrival(active, view)

    def check_deadlines(self) -> None:
        """Fail positions that take too long; call several times a second."""
        for active in [a for a in self._active if a.arrive_by_ns]:
            view = self._board.motors[self._partitions[active.command.motor]]
            if not view.online:
                self._end(active, State.FAILED, Reason.MOTOR_OFFLINE, "went silent on the way")
            elif monotonic_ns() > active.arrive_by_ns:
                detail = f"stands at {view.position_rad:.4f} rad, not at {active.command.value:.4f} rad, in time"
                self._end(active, State.FAILED, Reason.NOT_REACHED, detail)

    def interrupt_all(self) -> None:
        """The gateway stops: nothing is seen through any more."""
        for recording in self._recording:
            recording.cancel()
        for active in list(self._active):
            self._end(active, State.FAILED, Reason.INTERRUPTED, "the gateway was stopped")

    def _of(self, ticket: int) -> _Active | None:
        return next((a for a in self._active if ticket in a.tickets), None)

    def _answered(self, active: _Active, partition: int, failure: tuple[Reason, str] | None, detail: str) -> None:
        active.waiting.discard(partition)
        if failure:
            active.failures.append(failure)
        else:
            active.details.append(detail)
        if active.waiting:
            return
        if active.failures:
            reason = active.failures[0][0]
            self._end(active, State.FAILED, reason, "; ".join(detail for _, detail in active.failures))
        elif active.command.kind is Kind.POSITION:
            self._await_arrival(active)
        else:
            self._end(active, State.DONE, None, "; ".join(dict.fromkeys(active.details)))

    def _await_arrival(self, active: _Active) -> None:
        view = self._board.motors[self._partitions[active.command.motor]]
        assert active.command.value is not None  # noqa: S101  decode_command sees to it
        speed = active.command.velocity_rad_s or view.config.velocity_rad_s
        way_s = 2 * abs(active.command.value - view.position_rad) / speed + ARRIVAL_MARGIN_S
        active.arrive_by_ns = after(monotonic_ns(), int(way_s * SECOND))

    def _check_arrival(self, active: _Active, view: MotorView) -> None:
        assert active.command.value is not None  # noqa: S101  decode_command sees to it
        off_rad = view.position_rad - active.command.value
        if abs(off_rad) <= view.config.position_tolerance_rad:
            self._end(active, State.DONE, None, f"at {view.position_rad:.4f} rad")
        elif not view.status & Status.ENABLED:
            self._end(active, State.FAILED, Reason.NOT_ENABLED, f"lost its torque at {view.position_rad:.4f} rad")

    # -- out -----------------------------------------------------------------------------------------------------

    def _end(self, active: _Active, state: State, reason: Reason | None, detail: str) -> None:
        self._active.remove(active)
        self._conclude(self._outcome(active.command, state, active.read_at_ns, reason, detail), None)

    def _conclude(self, outcome: Outcome, record: Incoming | None) -> None:
        """Write down a final outcome, and that the id is used up."""
        self._remember(CommandState(outcome.command_id, True, outcome.at_ns, outcome.motor), outcome, record)

    def _remember(self, state: CommandState, outcome: Outcome, record: Incoming | None) -> None:
        self._recent[state.id] = state
        if len(self._recent) > RECENT_IDS:
            self._recent.popitem(last=False)
        entry = outcome.entry(self._partition(outcome.motor))
        self._writer.command(state, entry, record.inbox if record else None)

    def _outcome(
        self, command: Command, state: State, read_at_ns: int, reason: Reason | None = None, detail: str = ""
    ) -> Outcome:
        return Outcome(command.id, command.motor, state, self._time.now(), _since_us(read_at_ns), reason, detail)


def _reason(word: str) -> Reason:
    """A family's word, if it is one of ours."""
    return Reason(word) if word in Reason.__members__.values() else Reason.REFUSED


def _left_ms(active: _Active) -> float:
    """How long a command is still good; its sender's clock may be ahead."""
    command = active.command
    return min(command.ttl_ms - wall_age_ms(command.issued_at_ns), command.ttl_ms)


def _since_us(at_ns: int) -> int:
    return (monotonic_ns() - at_ns) // 1000


def _beyond(command: Command, view: MotorView) -> tuple[State, Reason, str] | None:
    """Whether a setpoint lies outside the motor's limits, or the motor is not ready for one."""
    if command.kind not in SETPOINTS or command.value is None:
        return None
    if beyond := _beyond_limits(command.kind, command.value, command.velocity_rad_s, view):
        return State.REJECTED, Reason.OUT_OF_LIMITS, beyond
    if not view.status & Status.ENABLED:
        return State.REJECTED, Reason.NOT_ENABLED, f"{view.config.name} has no torque; send enable first"
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
