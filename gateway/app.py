"""The composition root: one arm's gateway, put together here and nowhere else.

    workers ==link==> writer (stamp, journal) ==> publisher ==> Kafka
    workers <==link== commander (checks)      <== Kafka, local commands

Everything runs on one asyncio loop but the writer's thread and the child processes.
"""

import asyncio
import contextlib
import logging
import shutil
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from drivers.clock import monotonic_ns
from drivers.cycle import Ticket
from drivers.motor import Status
from drivers.notices import (
    AnyNotice,
    BusDown,
    BusTrouble,
    BusUp,
    CycleStats,
    MotorLate,
    MotorOffline,
    MotorOnline,
    MotorStopped,
    OrderDone,
    OrderFailed,
    SamplesLost,
)
from gateway import kafka_commands, local_commands, plans
from gateway.aside import Left, set_aside, set_aside_before, without_successor
from gateway.board import Board, MotorView
from gateway.commander import Commander
from gateway.commands import decode_outcome
from gateway.config import Config
from gateway.event_time import EventTime
from gateway.events import ARM, EventType, make_event
from gateway.evidence import read_evidence, why_behind
from gateway.journal import (
    Changes,
    Journal,
    JournalBroken,
    JournalError,
    JournalReader,
    Lost,
    ProducerState,
    is_broken,
)
from gateway.kafka import TopicMismatch
from gateway.latches import Latches
from gateway.publisher import JournalBehind, Publisher
from gateway.recent import Recent
from gateway.simulator import SimulatorPlan
from gateway.state_dir import StateDir
from gateway.wal import commits_cut_off
from gateway.workers import Worker, keep_running
from gateway.writer import Committed, LogWriter

log = logging.getLogger(__name__)

TICK_S = 0.1
STATUS_TICKS = 10
# together with the workers' and Kafka's own, even if everything hangs: a stop takes five seconds at most
DRAIN_S = 1.0
WRITER_STOP_S = 1.0
CANCEL_AGAIN_S = 1.0  # a library may take a cancellation for its own
REMEMBER_S = 1.0
SWITCH_S = 0.0005  # event loop and writer wait no longer for each other to let go of the interpreter; usual are 5 ms
READER_BUSY_S = 0.1  # the event loop waits for nobody's lock


class Gateway:
    """Runs one arm. ``board`` is there to be looked at; ``run`` returns when ``stop`` was called."""

    def __init__(
        self, config: Config, state: StateDir, left: Left | None = None, stop: asyncio.Event | None = None
    ) -> None:
        """Opens the journal: raises JournalError if it does not fit, JournalBroken if it cannot be read.

        The state directory must be locked. ``left`` is known of the journal that this one succeeds; ``stop``,
        when it is set, is a call of ``stop``.
        """
        self._config = config
        self._state = state
        journal, self._left = _open_journal(config, state, left)
        newest_ns = max(head.sampled_at_ns for head in journal.heads.values())
        self._time = EventTime(max(newest_ns, self._left.newest_ns if self._left else 0))
        published = config.kafka is not None
        self._writer = LogWriter(journal, self._time, config.journal.flush_ms, state.whole, published=published)
        self._reader = JournalReader(state.journal, READER_BUSY_S, self._writer.check)
        self._recent = Recent(journal.row, journal.entry)
        self.stream = journal.stream
        self.board = Board(config, self._time, journal.path, journal.stream)
        latches = Latches(state.latches)
        self.board.latches = latches.held
        self._commander = Commander(config, self._reader, self._writer, self.board, self._time, latches, self._send)
        worker_plans = plans.worker_plans(config, state.simulated)
        self._workers = {bus.name: Worker(bus.name, worker_plans[bus.name], self) for bus in config.buses}
        self._publisher = (
            Publisher(
                config,
                self._reader,
                dict(journal.heads),
                self._recent,
                set_aside_before(state.journal),
                state.owner(),
                bookmark=self._writer.published,
                changed=self._kafka_changed,
                event=self._event,
                damage_told=self._damage_told,
                lost=self._tell_lost,
                remember=self._remember_producer,
            )
            if config.kafka
            else None
        )
        self._stop = stop or asyncio.Event()

    def stop(self) -> None:
        """Make ``run`` return: polling ends, what was accepted is kept, and Kafka gets what it takes in time."""
        self._stop.set()

    def leave(self, why: str) -> Left:
        """Set the journal aside, when ``run`` has ended; what is known of it, from here where that is more."""
        left = set_aside(self._state.journal, why)
        left.stream = self.stream
        left.seqs |= self._writer.seqs()
        left.inbox |= self._writer.inbox()
        left.newest_ns = max(left.newest_ns, self._time.now())
        left.commands |= {state.id: state for state in self._commander.memory()}
        told: set[str] = set()
        if self._publisher:
            left.acknowledged |= {at: self._publisher.acknowledged(at) for at in self.board.motors}
            outcomes = [entry for entry in self._writer.unsaved_entries() if entry.topic == "outcomes"]
            told = {decode_outcome(entry.value).command_id for entry in outcomes
                    if entry.seq <= self._publisher.acknowledged(entry.partition, "outcomes")}  # fmt: skip
        # what became of these was never told, but for some: the successor ends them
        left.commands |= {state.id: state._replace(final=state.id in told) for state in self._writer.unsaved_commands()}
        return left

    async def run(self) -> None:
        """Run until ``stop``. Raises TopicMismatch if the broker is there and its topics do not fit the arm.

        Raises JournalBroken or JournalBehind if a new stream has to begin.
        """
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writer.start(self, asyncio.get_running_loop())
        self._event(EventType.GATEWAY_STARTED, stream=self.stream, motors=len(self._config.motors))
        if self._left:
            self._tell_left(self._left)
        try:
            self._commander.finish_interrupted()
            self._commander.tell_latched()
            async with self._tasks() as (polling, others):
                stopped = asyncio.create_task(self._stop.wait())
                parts: set[asyncio.Future[Any]] = {stopped, self._failed, *polling, *others}
                ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
                stopped.cancel()
                self._commander.interrupt_all()
                self._event(EventType.GATEWAY_STOPPING)
                await _cancel(polling)  # before the drain: what they bring from here on would stay behind
                await self._drain()
                for task in ended - {stopped}:
                    task.result()  # a part that must not end did: say why
        finally:
            self._reader.close()  # first: the last connection to close folds the WAL into the file
            if not await asyncio.to_thread(self._writer.stop, WRITER_STOP_S):
                log.error("journal: the disk did not take the last records in %g s", WRITER_STOP_S)

    def _tell_left(self, left: Left) -> None:
        """The journal before this one was set aside: what of it does nobody have?"""
        self._event(EventType.JOURNAL_SET_ASIDE, path=str(left.path), reason=left.why, stream=left.stream)
        for (source, partition), upto in left.inbox.items():
            self._writer.read_upto(None, (source, partition, upto))
        lost = left.lost(published=self._publisher is not None)
        self._writer.lost_before(left.stream, lost, f"its journal was set aside: {left.why}")

    async def _drain(self) -> None:
        """Give the broker what it takes in time, from memory if the disk is sick."""
        if self._publisher:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    self._writer.relieve()
                    if not self._writer.failing:
                        await self._writer.durable()
                    await self._publisher.drained(DRAIN_S)

    def _inbox(self, source: str) -> dict[int, int]:
        """{partition: where to go on reading} of a source of commands."""
        left = self._left.inbox if self._left else {}
        return {at: upto for (of, at), upto in left.items() if of == source} | self._reader.inbox(source)

    @contextlib.asynccontextmanager
    async def _tasks(self) -> AsyncIterator[tuple[list[asyncio.Task[None]], list[asyncio.Task[None]]]]:
        """Every part that runs by itself; all are stopped together, but simulated motors after those who poll them."""
        handle = self._commander.handle
        local_start = self._inbox(local_commands.SOURCE).get(0, 1)
        parts = [self._tick(), local_commands.follow(self._state.commands, local_start, handle)]
        if self._publisher:
            starts = self._inbox(kafka_commands.SOURCE)
            ours, ended = self._publisher.claim.ours, self._commander.ended_before
            parts += [self._publisher.run(), kafka_commands.follow(self._config, starts, handle, ours, ended)]
        # links of a killed run lead to terminals that may be somebody else's by now
        shutil.rmtree(self._state.simulated, ignore_errors=True)
        simulated = plans.simulated_buses(self._config, self._state.simulated, everything=False)
        links = [plan.link for plan in simulated if plan.link]
        polling = [asyncio.create_task(_run_when_there(worker, links)) for worker in self._workers.values()]
        tasks = [asyncio.create_task(part) for part in parts]
        motors = []
        if simulated:
            plan = SimulatorPlan(simulated, self._config.arm.realtime)
            motors.append(asyncio.create_task(keep_running("gateway.simulator", plan, log.error)))
        try:
            yield polling, [*tasks, *motors]
        finally:
            await _cancel([*polling, *tasks])
            await _cancel(motors)

    async def _tick(self) -> None:
        """What is due a few times a second."""
        count = 0
        writing: asyncio.Future[None] | None = None
        while True:
            await asyncio.sleep(TICK_S)
            count += 1
            self._writer.relieve()
            self.board.note_rates()
            self._commander.check_deadlines()
            if self._publisher:
                self.board.set_aside = self._publisher.before
                for view in self.board.motors.values():
                    view.acknowledged_seq = self._publisher.acknowledged(view.config.partition)
            if count % STATUS_TICKS == 0 and (writing is None or writing.done()):  # a sick disk holds up nothing else
                writing = asyncio.ensure_future(asyncio.to_thread(self._write_status, self.board.snapshot()))

    def _write_status(self, status: dict[str, Any]) -> None:
        try:
            self._state.write_status(status)
        except OSError as error:
            log.warning("status file: %s", error)

    def _send(self, bus: str, ticket: Ticket) -> bool:
        return self._workers[bus].send(ticket)

    def _event(self, kind: EventType, view: MotorView | None = None, **details: Any) -> None:
        motor, partition = (view.config.name, view.config.partition) if view else (ARM, 0)
        self._writer.entry(make_event(kind, self._time.now(), motor, partition, **details))

    # -- what workers tell (gateway.workers.Ear) -----------------------------------------------------------------

    def heard_samples(self, bus: str, samples: NDArray[Any]) -> None:  # noqa: ARG002  the motor says it all
        """One cycle's samples."""
        self._writer.samples(samples)

    def heard_notice(self, bus: str, notice: AnyNotice) -> None:
        """Everything that is not a sample."""
        views = self.board.motors
        match notice:
            case CycleStats():
                self.board.take_stats(bus, notice)
            case OrderDone():
                self._commander.order_done(notice)
            case OrderFailed():
                self._commander.order_failed(notice)
            case MotorOnline(motor, model, firmware):
                self._online(views[motor], model, firmware)
            case MotorLate(motor, heard_ns, misses):
                self._late(views[motor], heard_ns, misses)
            case MotorOffline(motor, _, misses, reason):
                self._offline(views[motor], reason, misses)
            case MotorStopped(motor, reason):
                log.warning("motor %s: stopped: %s", views[motor].config.name, reason)
                self._event(EventType.MOTOR_STOPPED, views[motor], reason=reason)
            case BusUp():
                log.info("bus %s: up", bus)
                self.board.buses[bus].up, self.board.buses[bus].detail = True, ""
                self.board.buses[bus].troubles = {}
                self._event(EventType.BUS_UP, bus=bus)
            case BusTrouble(what, count, detail):
                log.warning("bus %s: %s, %d times: %s", bus, what, count, detail)
                self.board.buses[bus].troubles[what] = count
                self._event(EventType.BUS_TROUBLE, bus=bus, what=what, count=count, detail=detail)
            case BusDown(reason, retriable):
                self._bus_down(bus, reason, retriable=retriable)
            case SamplesLost(motor, count):
                self._writer.lost_samples(motor, count, "the gateway took no samples")

    def worker_started(self, bus: str, starts: int) -> None:
        """A process was started for a bus."""
        self.board.buses[bus].worker_starts = starts

    def worker_gone(self, bus: str, reason: str) -> None:
        """A worker died: its motors are offline until another finds them."""
        here = [view for view in self.board.motors.values() if view.config.bus == bus]
        for view in here:
            if view.online:
                self._offline(view, reason, 0)
        self._bus_down(bus, reason, retriable=True)
        self._commander.worker_gone([view.config.partition for view in here])

    def _bus_down(self, bus: str, reason: str, *, retriable: bool) -> None:
        log.error("bus %s: down: %s", bus, reason)
        self.board.buses[bus].up, self.board.buses[bus].detail = False, reason
        self._event(EventType.BUS_DOWN, bus=bus, reason=reason, retriable=retriable)

    def _online(self, view: MotorView, model: str, firmware: str) -> None:
        log.info("motor %s: online (%s, firmware %s)", view.config.name, model, firmware)
        view.online, view.late, view.model, view.firmware = True, False, model, firmware
        silent_ms = {"silent_ms": round(self.board.age_ms(view), 1)} if view.sampled_at_ns else {}
        self._event(EventType.MOTOR_ONLINE, view, model=model, firmware=firmware, **silent_ms)

    def _late(self, view: MotorView, heard_ns: int, misses: int) -> None:
        silent_ms = (monotonic_ns() - heard_ns) / 1e6
        log.warning("motor %s: late, no reply for %.0f ms", view.config.name, silent_ms)
        view.late = True
        self._event(
            EventType.MOTOR_LATE, view, silent_ms=round(silent_ms, 1), misses=misses, last_seq=view.seq,
            last_sampled_at_ns=view.sampled_at_ns,
        )  # fmt: skip

    def _offline(self, view: MotorView, reason: str, misses: int) -> None:
        log.error("motor %s: offline: %s", view.config.name, reason)
        view.online = view.late = False
        self._event(
            EventType.MOTOR_OFFLINE, view, reason=reason, misses=misses, last_seq=view.seq,
            last_sampled_at_ns=view.sampled_at_ns,
        )  # fmt: skip

    # -- what the log tells (gateway.writer.Listener) ------------------------------------------------------------

    def committed(self, committed: Committed) -> None:
        """More is in the log: readers may go on."""
        self._recent.append(committed.batch, committed.entries)
        if committed.saved:
            self._recent.saved(
                committed.batch.id if committed.batch else self._recent.saved_row,
                committed.entries[-1].id if committed.entries else self._recent.saved_entry,
            )
        if committed.batch is not None:
            views = self.board.update(committed.batch.split)
            for view in views:
                self._check_health(view)
            self._commander.moved(views)
        if self._publisher:
            self._publisher.committed(committed.entries)

    def saved(self, row: int, entry: int) -> None:
        """The disk has what it did not take before."""
        self._recent.saved(row, entry)
        if self._publisher:
            self._publisher.committed(())  # outcomes wait for this

    def forgotten(self, rows: Collection[int], entries: Collection[int]) -> None:
        """Memory was full of what the disk does not take."""
        self._recent.forget(rows, entries)

    def _check_health(self, view: MotorView) -> None:
        """Tell what changed for the worse or the better since the last sample."""
        faults, told = view.status & Status.faults(), view.told_faults
        view.told_faults = faults
        if faults and faults != told:
            names = [flag.name for flag in faults]
            log.error("motor %s: fault: %s", view.config.name, view.fault)
            self._event(
                EventType.MOTOR_FAULT, view, faults=names, vendor_error=view.vendor_error, detail=view.fault,
                seq=view.seq,
            )  # fmt: skip
        elif told and not faults:
            self._event(EventType.MOTOR_FAULT_CLEARED, view, seq=view.seq)
        limit_c = view.config.temperature_c
        # two degrees of hysteresis: sensors flicker by one
        was_hot = view.hot
        view.hot = view.temperature_c > limit_c or (was_hot and view.temperature_c > limit_c - 2)
        if view.hot and not was_hot:
            log.error("motor %s: %.0f C, limit %.0f C", view.config.name, view.temperature_c, limit_c)
            self._event(
                EventType.MOTOR_OVER_TEMPERATURE, view, temperature_c=view.temperature_c, limit_c=limit_c, seq=view.seq
            )
            if "over_temperature" in view.config.stop_on:
                self._commander.latch(view, f"{view.temperature_c:.0f} C, limit {limit_c:.0f} C")
        # on the way out only: it must be possible to drive it back
        (low, high), margin = view.config.position_rad, view.config.position_tolerance_rad
        was_outside = view.outside
        view.outside = view.position_rad < low - margin or view.position_rad > high + margin
        if view.outside and not was_outside and "position_limits" in view.config.stop_on:
            self._commander.latch(view, f"at {view.position_rad:.4f} rad, limits {low:g} to {high:g} rad")

    def clock_stepped(self, step_ns: int) -> None:
        """The wall clock stepped."""
        log.warning("wall clock stepped by %+.3f s", step_ns / 1e9)

    def disk_failed(self, error: str) -> None:
        """A commit failed; polling goes on."""
        self.board.journal_detail = error
        self._event(EventType.JOURNAL_FAILED, detail=error)

    def disk_recovered(self) -> None:
        """Commits succeed again."""
        self.board.journal_detail = ""
        self._event(EventType.JOURNAL_RECOVERED)

    def journal_broken(self, error: str) -> None:
        """A new stream has to begin."""
        self._failed.set_exception(JournalBroken(error))

    def writer_died(self, error: Exception) -> None:
        """A gateway that writes nothing down must not look as if it worked."""
        self._failed.set_exception(error)

    def _kafka_changed(self, state: str, detail: str) -> None:
        self.board.kafka, self.board.kafka_detail = state, detail
        (log.info if state == "up" else log.error)("kafka: %s %s", state, detail)
        self._event(EventType(f"kafka.{state}"), detail=detail)

    async def _remember_producer(self, state: ProducerState) -> None:
        """Who we are to the broker, written down before it is used."""
        self._writer.producer(state)
        await _written(self._writer.durable())

    async def _tell_lost(self, stream: int, lost: Sequence[Lost], why: str) -> None:
        """What is lost of a stream before, written down before anything behind it is published."""
        self._writer.lost_before(stream, lost, why)
        await _written(self._writer.durable())

    async def _damage_told(self, lost: Lost) -> None:  # noqa: ARG002  the writer finds out itself
        """The loss of damaged rows is written down before anything behind them is published."""
        await _written(self._writer.looked())


def _open_journal(config: Config, state: StateDir, left: Left | None) -> tuple[Journal, Left | None]:
    """The journal, a new one in place of one that lost records, and what is left of the one before if it is new.

    ``left``: as given to ``Gateway``; what is known of it goes over.
    """

    def opened() -> Journal:
        return Journal(state.journal, config.arm.name, motors, config.journal.max_mb << 20)

    motors = {motor.partition: motor.name for motor in config.motors}
    evidence = read_evidence(state.status)
    commits = 0
    with contextlib.suppress(OSError):  # SQLite says better what is wrong
        commits = commits_cut_off(state.journal)
    if commits:  # SQLite has not opened it yet, and forgotten them
        left = set_aside(state.journal, f"lost its newest records: {commits} commits lie behind damage in its WAL")
    journal = opened()
    if why := why_behind(journal, state.whole, evidence):
        journal.db.close()
        left = set_aside(state.journal, why)
        journal = opened()
    if not left and not journal.row and not journal.entry:
        left = without_successor(state.journal)
    if left:
        left.learn(evidence)
        try:
            journal.commit(Changes(commands=list(left.commands.values()), inbox=left.inbox))
        except sqlite3.OperationalError as error:  # the next start tries again: nothing is in it yet
            journal.db.close()
            raise JournalError(f"journal {state.journal}: {error}") from error
        left.commands.clear()
    if not journal.marked:
        with contextlib.suppress(OSError, sqlite3.OperationalError):  # a sick disk: not marked in this run
            state.whole.touch()
            journal.mark()
    return journal, left


async def run_gateway(
    config: Config,
    ready: Callable[[Gateway], Coroutine[Any, Any, None]] | None = None,
    prepare: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Lock the state directory and run the arm's gateway until SIGINT or SIGTERM; ``ready`` runs beside it.

    ``prepare`` runs before, when the directory is locked. Raises StateDirError, JournalError, ConfigError or
    TopicMismatch for what only its user can mend.
    """
    sys.setswitchinterval(SWITCH_S)
    state = StateDir(config.arm.state_dir)
    with state.locked():
        left = None
        if prepare:
            await prepare()
        stop = _stop_signal()
        while not stop.is_set():
            try:
                gateway = Gateway(config, state, left, stop)
            except JournalBroken as error:
                left = set_aside(state.journal, f"cannot be read: {error}")
                continue
            except JournalError as error:
                if not state.release_reserve():
                    raise
                log.warning("%s; trying again with what was kept back of the disk", error)
                continue
            state.keep_reserve()
            try:
                await _run_once(gateway, ready)
                return
            except JournalBehind as error:
                left = gateway.leave(f"lost its newest records: {error}")
            except (JournalBroken, sqlite3.DatabaseError) as error:
                if isinstance(error, sqlite3.Error) and not is_broken(error):
                    raise
                left = gateway.leave(f"broke: {error}")


async def _written(done: Coroutine[Any, Any, None]) -> None:
    """Wait for the disk, but a sick one does not keep us from publishing."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(done, REMEMBER_S)


def _stop_signal() -> asyncio.Event:
    """Set by SIGINT or SIGTERM, whatever gateway runs by then."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # not loop.add_signal_handler: it loses a signal while the loop's pipe is full of the writer's wakes
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    return stop


async def _run_once(gateway: Gateway, ready: Callable[[Gateway], Coroutine[Any, Any, None]] | None) -> None:
    beside = asyncio.create_task(ready(gateway)) if ready else None
    try:
        await gateway.run()
    finally:
        if beside:
            await _cancel([beside])


async def _run_when_there(worker: Worker, links: Sequence[Path]) -> None:
    """Run a worker once the simulated motors are there, if it is one of theirs."""
    mine = [link for link in links if link.name == worker.bus]
    while not all(link.exists() for link in mine):  # noqa: ASYNC110  another process makes it
        await asyncio.sleep(0.02)
    await worker.run()


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception) and not isinstance(result, TopicMismatch | JournalBehind | JournalBroken):
            log.error("while stopping: %s", result)
