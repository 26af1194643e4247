"""The log's only writer: numbers what comes in, commits everything that is pending in one step, and tells of it.

    samples, events, outcomes, command ids --> pending --numbers--> unsaved --(every flush_ms, or at once)--> one commit

A group commit: whatever gathered since the last one becomes one transaction. A disk that is full, away, slow or locked
delays this thread and nobody else: what has its numbers is told as unsaved, so that publishing and the live view go on
from memory, and one commit of all of it, in order, heals that as soon as the disk takes it. Memory is bounded; what is
given up beyond the bound is named exactly.
"""

import asyncio
import contextlib
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from drivers.clock import MS, SECOND, after, left_s, monotonic_ns
from drivers.motor import SAMPLE
from gateway.damage import Damage, DamagedEntry, Scrubber
from gateway.event_time import EventTime
from gateway.events import EventType, make_event
from gateway.folding import Folder
from gateway.journal import (
    Batch,
    Changes,
    CommandState,
    Entry,
    Journal,
    Lost,
    ProducerState,
    StoredEntry,
    Table,
    is_broken,
    ranges,
)
from gateway.stamp import Stamp

log = logging.getLogger(__name__)

UNSAVED_MOST = 64 << 20  # bytes of telemetry that wait for the disk
UNSAVED_ENTRIES_MOST = 16 << 20  # bytes of events and outcomes that do
ROW_BYTES = 2 << 10  # what a row costs in memory beside its records
DAMAGED = "not in the journal: its rows are damaged"
HOUSEKEEPING_NS = SECOND
HANG_NS = SECOND  # a commit that takes longer hangs
RETRY_NS = SECOND // 4
UNMARK_S = 0.05  # how long is waited for the marker to go; on a disk that hangs it may take any time
SICK_FLUSH_S = 0.02  # how long rows gather while the disk does not take them


class Committed(NamedTuple):
    """What was added to the log, in order; ``saved``: whether the disk has it already."""

    batch: Batch | None
    entries: tuple[StoredEntry, ...]
    saved: bool = True


class Listener(Protocol):
    """Who wants to know. Called on the event loop's thread, in order."""

    def committed(self, committed: Committed) -> None:
        """Readers may go on."""

    def saved(self, row: int, entry: int) -> None:
        """The journal holds everything up to these ids, also what was told as not saved."""

    def forgotten(self, rows: Collection[int], entries: Collection[int]) -> None:
        """Unsaved rows and entries with these ids were given up, and their loss is told."""

    def clock_stepped(self, step_ns: int) -> None:
        """The wall clock stepped."""

    def disk_failed(self, error: str) -> None:
        """A commit failed or hangs; from now on everything goes on from memory."""

    def disk_recovered(self) -> None:
        """Commits succeed again."""

    def journal_broken(self, error: str) -> None:
        """The file is damaged beyond what can be left out: nothing will be written to it any more."""

    def writer_died(self, error: Exception) -> None:
        """Nothing is written any more: a fault in the program; the gateway has to start anew."""


@dataclass(slots=True, eq=False)
class _Piece:
    """What was numbered together, and who waits for it to be saved."""

    changes: Changes = field(default_factory=Changes)
    durable: list[Callable[[], None]] = field(default_factory=list)
    told: bool = False

    def telemetry_bytes(self) -> int:
        batch = self.changes.batch
        return 0 if batch is None else batch.records.nbytes + ROW_BYTES

    def entry_bytes(self) -> int:
        return sum(len(entry.value) + 256 for entry in self.changes.entries)


class LogWriter:
    """Owns the journal from ``start`` to ``stop``. All methods may be called from any thread."""

    def __init__(self, journal: Journal, time: EventTime, flush_ms: float, whole: Path, *, published: bool) -> None:
        """``whole``: the marker of a journal that holds everything (``gateway.evidence``), made by who opened it.

        ``published``: whether there is a broker that records are given to, perhaps before the disk has them.
        """
        self._journal = journal
        self._whole = whole
        self._marked = True
        self._unmarking: threading.Thread | None = None
        self._time = time
        self._stamp = Stamp(
            journal.stream, journal.heads, time, journal.row, journal.entry, journal.entry_heads
        )  # fmt: skip
        self._scrubber = Scrubber(journal)
        self._folder = Folder(journal)
        self._flush_ns = int(flush_ms * MS)
        self._acknowledged = dict(journal.published) if published else None
        self._wake = threading.Condition()
        self._samples: list[NDArray[np.void]] = []
        self._entries: list[Entry] = []
        self._gathering = _Piece()  # what has no number yet waits in the two above
        self._unsaved: deque[_Piece] = deque()
        self._unsaved_bytes = self._unsaved_entry_bytes = 0
        self._in_flight = 0  # of the unsaved, oldest first: on their way to the disk
        self._inbox = dict(journal.inbox)
        self._published_upto: dict[tuple[str, int], tuple[int, int]] = {}
        # rows that somebody could not read
        self._suspects: set[tuple[Table, int]] = {("telemetry", row) for row in journal.damaged_at_start}
        self._looking: list[Callable[[], None]] = []  # called when their loss is told, and that is committed
        self._idle = False  # the thread waits for something to do
        self._stopping = False
        self._failing = False
        self._busy_since = 0  # when the thread turned to the disk; 0: it did not
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)

    def start(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to commit; ``listener`` is called on ``loop``."""
        self._listener = listener
        self._loop = loop
        self._folder.start()
        self._thread.start()

    # -- in ------------------------------------------------------------------------------------------------------

    def samples(self, samples: NDArray[np.void]) -> None:
        """Append samples (dtype SAMPLE), in the order of their arrival."""
        with self._wake:
            self._samples.append(samples)
            self._notify()

    def entry(self, entry: Entry) -> None:
        """Append an event or an outcome."""
        with self._wake:
            self._entries.append(entry)
            self._notify()

    def lost_samples(self, partition: int, count: int, reason: str) -> None:
        """``count`` samples of a motor were lost before they came here: they get numbers, and an event names these."""
        with self._wake:
            self._number()  # those that came before
            first, last = self._stamp.skip(partition, count)
            self._gathering.changes.skipped[partition] = last
            self._tell_lost([Lost(partition, first, last)], reason)
            self._notify()

    def lost_before(self, stream: int | None, lost: Sequence[Lost], reason: str) -> None:
        """Records of an earlier stream are gone; if nobody knows which (None), there are no numbers to tell."""
        if stream is None:
            return
        with self._wake:
            self._tell_lost(lost, reason, stream)
            self._notify()

    def command(self, state: CommandState, outcome: Entry | None, inbox: tuple[str, int, int] | None) -> None:
        """Remember a command's state, its outcome record, and how far (source, partition, next) the inbox is read."""
        with self._wake:
            self._gathering.changes.commands.append(state)
            self._add(outcome, inbox)

    def read_upto(self, outcome: Entry | None, inbox: tuple[str, int, int] | None) -> None:
        """As ``command``, for a record that is not remembered by id."""
        with self._wake:
            self._add(outcome, inbox)

    def _add(self, outcome: Entry | None, inbox: tuple[str, int, int] | None) -> None:
        if outcome:
            self._entries.append(outcome)
        if inbox:
            self._gathering.changes.inbox[inbox[:2]] = self._inbox[inbox[:2]] = inbox[2]
        self._notify()

    def producer(self, state: ProducerState) -> None:
        """Remember who the gateway is to the broker."""
        with self._wake:
            self._gathering.changes.producer = state
            self._notify()

    def published(self, topic: str, partition: int, seq: int, row: int) -> None:
        """Remember how far the broker has acknowledged; written about once a second, and before anything is trimmed."""
        with self._wake:
            self._published_upto[topic, partition] = (seq, row)

    def check(self, table: Table, row: int) -> None:
        """A row could not be read: if it is damaged, its loss is told, once."""
        with self._wake:
            self._suspects.add((table, row))
            self._notify()

    def _notify(self) -> None:
        """Wake the thread if it waits for work; while it waits for company, a wake would cost and change nothing."""
        if self._idle:
            self._wake.notify()

    def when_durable(self, call: Callable[[], None]) -> None:
        """Have ``call`` called on the event loop when everything appended so far is committed, in the order of asking.

        It is committed without waiting for the flush interval.
        """
        with self._wake:
            self._gathering.durable.append(call)
            self._wake.notify()

    async def durable(self) -> None:
        """Return when everything appended so far is committed."""
        await self._called(self.when_durable)

    async def looked(self) -> None:
        """Return when the loss of all rows that ``check`` was called with is told, and that is committed."""
        await self._called(self._when_looked)

    def _when_looked(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._looking.append(call)
            self._wake.notify()

    async def _called(self, ask: Callable[[Callable[[], None]], None]) -> None:
        """Return when what is given to ``ask`` is called, on the event loop."""
        done = self._loop.create_future()
        ask(lambda: None if done.done() else done.set_result(None))
        await done

    def relieve(self) -> None:
        """Call several times a second: while the disk is sick, what is pending gets its numbers and is told unsaved."""
        if not (self._failing or self._hangs()):
            return
        with self._wake:
            if self._hangs():
                self._fail(f"a write has not come back for {HANG_NS / SECOND:g} s")
            if self._failing:
                self._number()
                self._tell_unsaved()

    @property
    def failing(self) -> bool:
        """Whether the disk takes nothing just now."""
        return self._failing

    def _hangs(self) -> bool:
        return 0 < self._busy_since < monotonic_ns() - HANG_NS

    def seqs(self) -> dict[int, int]:
        """{partition: the newest sequence number that was given}."""
        with self._wake:
            return {partition: self._stamp.seq(partition) for partition in self._journal.heads}

    def inbox(self) -> dict[tuple[str, int], int]:
        """{(source, partition): next to read} of every source of commands."""
        with self._wake:
            return dict(self._inbox)

    def unsaved_commands(self) -> list[CommandState]:
        """Command ids whose state no commit has taken yet."""
        with self._wake:
            return [state for piece in (*self._unsaved, self._gathering) for state in piece.changes.commands]

    def unsaved_entries(self) -> list[StoredEntry]:
        """Events and outcomes that have their numbers, and that no commit has taken yet."""
        with self._wake:
            return [entry for piece in self._unsaved for entry in piece.changes.entries]

    def stop(self, timeout_s: float) -> bool:
        """Commit what is pending and end the thread. False if the disk did not let it within ``timeout_s``."""
        deadline = after(monotonic_ns(), int(timeout_s * SECOND))
        self._folder.stop()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return self._folder.ended(left_s(deadline)) and not self._thread.is_alive()

    # -- numbers (the lock is held) ------------------------------------------------------------------------------

    def _pending(self) -> bool:
        piece = self._gathering
        return bool(
            self._samples or self._entries or piece.durable or piece.changes.commands or piece.changes.producer
            or piece.changes.save_heads
        )  # fmt: skip

    def _number(self) -> None:
        """Everything that is pending gets its numbers, and is unsaved from now on."""
        if not self._pending():
            return
        if step_ns := self._time.check():
            self._entries.append(make_event(EventType.CLOCK_STEPPED, self._time.now(), step_ns=step_ns))
            self._tell(self._listener.clock_stepped, step_ns)
        piece, self._gathering = self._gathering, _Piece()
        if self._samples:
            arrived = np.frombuffer(b"".join(map(bytes, self._samples)), SAMPLE)
            piece.changes.batch = Batch(self._stamp.row(), self._stamp.stamp(arrived))
            self._samples.clear()
        if self._entries:
            piece.changes.entries = [self._numbered(entry) for entry in self._entries]
            self._entries.clear()
        self._unsaved.append(piece)
        self._weigh(piece, 1)

    def _numbered(self, entry: Entry) -> StoredEntry:
        number, seq = self._stamp.entry(entry.topic, entry.partition)
        return StoredEntry(number, entry.topic, entry.partition, seq, entry.at_ns, entry.key, entry.value)

    def _weigh(self, piece: _Piece, sign: int) -> None:
        self._unsaved_bytes += sign * piece.telemetry_bytes()
        self._unsaved_entry_bytes += sign * piece.entry_bytes()

    def _tell_unsaved(self) -> None:
        """Nobody waits for a sick disk; and what it does not take is bounded."""
        untold = list(takewhile(lambda piece: not piece.told, reversed(self._unsaved)))
        for piece in reversed(untold):
            piece.told = True
            self._tell_piece(piece, saved=False)
        if self._unsaved_bytes > UNSAVED_MOST or self._unsaved_entry_bytes > UNSAVED_ENTRIES_MOST:
            self._give_up()

    def _tell_piece(self, piece: _Piece, *, saved: bool) -> None:
        changes = piece.changes
        self._tell(self._listener.committed, Committed(changes.batch, tuple(changes.entries), saved))

    def _give_up(self) -> None:
        """Beyond the bounds the oldest goes, an eighth at a time; what is on its way to the disk is not counted."""
        waiting = list(islice(self._unsaved, self._in_flight, None))
        rows, lost = self._give_up_telemetry(waiting)
        entries, lost_entries = self._give_up_entries(waiting)
        if rows or entries:
            self._tell(self._listener.forgotten, rows, entries)
            self._tell_lost(lost + lost_entries, "not in the journal: the disk takes nothing, and memory is full")

    def _give_up_telemetry(self, waiting: Sequence[_Piece]) -> tuple[range, list[Lost]]:
        surplus = sum(piece.telemetry_bytes() for piece in waiting) - UNSAVED_MOST
        if surplus <= 0:
            return range(0), []
        surplus += UNSAVED_MOST // 8
        gone: list[Batch] = []
        for piece in waiting:
            if surplus <= 0:
                break
            if piece.changes.batch is not None:
                surplus -= piece.telemetry_bytes()
                gone.append(piece.changes.batch)
                self._weigh(piece, -1)
                for last in ranges([piece.changes.batch.records], {}):  # no later run gives these numbers again
                    piece.changes.skipped[last.partition] = last.to_seq
                piece.changes.batch = None
                self._weigh(piece, 1)
        return range(gone[0].id, gone[-1].id + 1), ranges((batch.records for batch in gone), {})

    def _give_up_entries(self, waiting: Sequence[_Piece]) -> tuple[Collection[int], list[Lost]]:
        surplus = sum(piece.entry_bytes() for piece in waiting) - UNSAVED_ENTRIES_MOST
        if surplus <= 0:
            return (), []
        surplus += UNSAVED_ENTRIES_MOST // 8
        gone: list[StoredEntry] = []
        for piece in waiting:
            if surplus <= 0:
                break
            self._weigh(piece, -1)
            surplus -= piece.entry_bytes()
            gone += [entry for entry in piece.changes.entries if not _names_a_loss(entry)]
            piece.changes.entries = [entry for entry in piece.changes.entries if _names_a_loss(entry)]
            surplus += piece.entry_bytes()
            self._weigh(piece, 1)
        return {entry.id for entry in gone}, _entry_ranges(gone)

    def _tell_lost(self, lost: Iterable[Lost], reason: str, stream: int | None = None) -> None:
        """An event for each range of telemetry that is gone, and one for what went of the other topics."""
        stream = self._journal.stream if stream is None else stream
        others = []
        for gone in lost:
            count = gone.to_seq - gone.from_seq + 1
            span = {"from_seq": gone.from_seq, "to_seq": gone.to_seq, "count": count}
            if gone.topic == "telemetry":
                motor = self._journal.motors.get(gone.partition, str(gone.partition))
                details = {"stream": stream, **span, "reason": reason}
                self._entries.append(
                    make_event(EventType.TELEMETRY_GAP, self._time.now(), motor, gone.partition, **details)
                )
            else:
                others.append({"topic": gone.topic, "partition": gone.partition, **span})
        if others:
            self._tell_full(removed=others, reason=reason)

    def _tell_full(self, **details: Any) -> None:
        max_mb = self._journal.max_bytes >> 20
        self._entries.append(make_event(EventType.JOURNAL_FULL, self._time.now(), max_mb=max_mb, **details))

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._commit_until_stopped()
        except Exception as error:
            with contextlib.suppress(sqlite3.Error):
                self._journal.db.close()
            with self._wake:
                self._failing, self._in_flight, self._busy_since = True, 0, 0
                self._unmark()
                self._number()
                self._tell_unsaved()
            if isinstance(error, sqlite3.Error) and is_broken(error):
                log.error("journal %s: %s", self._journal.path, error)
                self._tell(self._listener.journal_broken, str(error))
            else:
                log.exception("the log's writer died")
                self._tell(self._listener.writer_died, error)

    def _commit_until_stopped(self) -> None:
        flushed_at = housekeeping_at = tried_at = monotonic_ns()
        while True:
            with self._wake:
                self._wait(flushed_at)
                self._number()
                now = monotonic_ns()
                if self._failing:
                    self._tell_unsaved()
                due = not self._failing or now - tried_at > RETRY_NS
                work = list(self._unsaved) if due else []
                self._in_flight, self._busy_since = len(work), now if work else 0
                stopping = self._stopping
            flushed_at = now
            if work:
                tried_at = now
                self._commit(work)
                if not self._marked:
                    self._mark()
            look = self._suspects or self._looking
            if not (self._failing or stopping) and (look or now - housekeeping_at > HOUSEKEEPING_NS):
                housekeeping_at = now
                self._keep_house()
            if stopping and not self._unsaved and not self._pending():
                self._journal.close(Changes(published=self._published_upto))
                return

    def _wait(self, flushed_at: int) -> None:
        if self._failing:
            self._wake.wait(SICK_FLUSH_S)
            return
        self._idle = True
        while not (self._pending() or self._unsaved or self._suspects or self._looking or self._stopping):
            self._wake.wait()
        self._idle = False
        linger_ns = flushed_at + self._flush_ns - monotonic_ns()
        while linger_ns > 0 and not self._gathering.durable and not self._stopping:
            self._wake.wait(linger_ns / SECOND)
            linger_ns = flushed_at + self._flush_ns - monotonic_ns()

    def _commit(self, work: Sequence[_Piece]) -> None:
        try:
            if self._failing:
                self._journal.fold()  # makes room in the WAL, if anything does
            self._journal.commit(*(piece.changes for piece in work))
        except sqlite3.OperationalError as error:
            with self._wake:
                self._in_flight = self._busy_since = 0
                self._fail(str(error))
            return
        with self._wake:
            self._in_flight = self._busy_since = 0
            for piece in work:
                self._weigh(self._unsaved.popleft(), -1)
                if not piece.told:
                    self._tell_piece(piece, saved=True)
            if work[0].told:
                self._tell(self._listener.saved, self._journal.row, self._journal.entry)
            if self._failing:
                self._failing = False
                log.warning("journal %s: writable again", self._journal.path)
                self._tell(self._listener.disk_recovered)
        for piece in work:
            for call in piece.durable:  # after the listener: who waits finds it told
                self._tell(call)

    def _fail(self, error: str) -> None:
        """From now on everything is told unsaved. The lock is held."""
        if not self._failing:
            self._failing = True
            log.error("journal %s: %s; going on from memory", self._journal.path, error)
            self._tell(self._listener.disk_failed, error)
            self._unmark()
        self._tell_unsaved()

    def _unmark(self) -> None:
        """From here on the broker may have what the journal has not. The lock is held."""
        if self._acknowledged is None or not self._marked:
            return
        self._marked = False
        self._unmarking = threading.Thread(target=self._remove_marker, name="log-unmark", daemon=True)
        self._unmarking.start()
        self._unmarking.join(UNMARK_S)

    def _remove_marker(self) -> None:
        try:
            self._whole.unlink(missing_ok=True)
        except OSError as error:
            log.error("%s: cannot be removed: %s", self._whole, error)

    def _mark(self) -> None:
        """The journal holds everything again. On the writer's thread; only without a sign of a sick disk."""
        with self._wake:
            if self._failing or any(piece.told for piece in self._unsaved):
                return
            self._busy_since = monotonic_ns()
        if self._unmarking:
            self._unmarking.join()
        made = False
        with contextlib.suppress(OSError):  # tried again behind the next commit
            self._whole.touch()
            made = True
        with self._wake:
            self._busy_since = 0
            self._marked = made
            if self.failing:  # meanwhile: it took too long
                self._unmark()

    def _keep_house(self) -> None:
        """What the next commit writes beside what has come in: bookmarks, heads, losses that were found, a trim."""
        with self._wake:
            self._busy_since = monotonic_ns()
            published, self._published_upto = self._published_upto, {}
            suspects, self._suspects = self._suspects, set()
            looking, self._looking = self._looking, []
        if self._acknowledged is not None:
            self._acknowledged |= published
        damaged: list[Damage] = []
        entries: list[DamagedEntry] = []
        trim, removed, failed = None, list[Lost](), ""
        try:
            damaged = self._scrubber.look(row for table, row in suspects if table == "telemetry")
            entries = self._scrubber.look_at_entries(row for table, row in suspects if table == "entries")
            if self._journal.wal_bytes() > self._journal.wal_bound:
                self._journal.fold()
            trim, removed = self._journal.plan_trim(self._acknowledged)
        except sqlite3.OperationalError as error:
            failed = str(error)
        with self._wake:
            self._busy_since = 0
            changes = self._gathering.changes
            changes.published |= published
            changes.save_heads = True
            changes.trim = trim
            for damage in damaged:
                changes.damaged.append((damage.first, damage.last))
                self._tell_lost(damage.lost, DAMAGED)
            changes.damaged_entries += [entry.id for entry in entries]
            self._tell_lost([entry.lost for entry in entries], DAMAGED)
            if removed:
                if any(lost.topic == "telemetry" for lost in removed):
                    self._tell_full()
                self._tell_lost(removed, "journal full")
            if failed:
                self._suspects |= suspects
                self._looking += looking
                self._fail(failed)
            else:
                self._gathering.durable += looking

    def _tell(self, call: Callable[..., None], *values: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *values)


def _names_a_loss(entry: StoredEntry) -> bool:
    return any(f'"{kind}"'.encode() in entry.value for kind in (EventType.TELEMETRY_GAP, EventType.JOURNAL_FULL))


def _entry_ranges(entries: Iterable[StoredEntry]) -> list[Lost]:
    """The runs of sequence numbers that ``entries`` make up."""
    runs: list[Lost] = []
    for _, topic, partition, seq, *_ in sorted(entries, key=lambda entry: entry[1:4]):
        if runs and runs[-1] == (partition, runs[-1].from_seq, seq - 1, topic):
            runs[-1] = runs[-1]._replace(to_seq=seq)
        else:
            runs.append(Lost(partition, seq, seq, topic))
    return runs
