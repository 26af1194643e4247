"""The log's only writer: one thread that stamps samples, commits everything that is pending, and tells of it.

    samples of the links, events, outcomes, command ids --> pending --(every flush_ms, or at once)--> one commit

A group commit: whatever gathered since the last one becomes one transaction. A slow or full disk delays this thread and
nobody else; what gathers meanwhile is bounded, and beyond the bound the oldest samples are dropped before they are
numbered, counted, and told as a gap.
"""

import asyncio
import logging
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from time import sleep
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from drivers.clock import MS, SECOND, monotonic_ns
from drivers.motor import SAMPLE
from gateway.event_time import EventTime
from gateway.journal import Batch, Changes, CommandState, Entry, Journal, Lost
from gateway.stamp import Stamp

log = logging.getLogger(__name__)

PENDING_MOST = (64 << 20) // SAMPLE.itemsize  # samples that wait for the disk
HOUSEKEEPING_NS = SECOND
RETRY_S = 0.25


@dataclass(frozen=True, slots=True)
class Committed:
    """What the newest commit added to the log."""

    batch: Batch | None
    entries: tuple[tuple[str, int], ...]  # (topic, partition) of each


class Listener(Protocol):
    """Who wants to know. Called on the event loop's thread, in order."""

    def committed(self, committed: Committed) -> None:
        """Readers may go on."""

    def clock_stepped(self, step_ns: int) -> None:
        """The wall clock stepped."""

    def samples_dropped(self, counts: dict[int, int]) -> None:
        """Samples were dropped before they got numbers: {partition: how many}."""

    def records_lost(self, lost: list[Lost]) -> None:
        """The journal was full: numbered records were removed before the broker had them."""

    def disk_failed(self, error: str) -> None:
        """A commit failed, and is tried again from now on."""

    def disk_recovered(self) -> None:
        """Commits succeed again."""

    def writer_died(self, error: Exception) -> None:
        """Nothing is written any more: a fault in the program; the gateway has to start anew."""


class LogWriter:
    """Owns the journal from ``start`` to ``stop``. All methods may be called from any thread."""

    def __init__(self, journal: Journal, time: EventTime, flush_ms: float, *, published: bool) -> None:
        self._journal = journal
        self._time = time
        self._stamp = Stamp(journal.stream, journal.heads, time)
        self._flush_ns = int(flush_ms * MS)
        self._published = published
        self._wake = threading.Condition()
        self._samples: deque[NDArray[np.void]] = deque()
        self._samples_count = 0
        self._dropped: Counter[int] = Counter()
        self._changes = Changes()
        self._published_upto: dict[tuple[str, int], tuple[int, int]] = {}
        self._durable: list[Future[None]] = []
        self._idle = False  # the thread waits for something to do
        self._stopping = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)

    def start(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to commit; ``listener`` is called on ``loop``."""
        self._listener = listener
        self._loop = loop
        self._thread.start()

    def samples(self, samples: NDArray[np.void]) -> None:
        """Append samples (dtype SAMPLE), in the order of their arrival."""
        with self._wake:
            self._samples.append(samples)
            self._samples_count += len(samples)
            while self._samples_count > PENDING_MOST:
                oldest = self._samples.popleft()
                self._samples_count -= len(oldest)
                self._dropped.update(oldest["motor"].tolist())
            self._notify()

    def entry(self, entry: Entry) -> None:
        """Append an event or an outcome."""
        with self._wake:
            self._changes.entries.append(entry)
            self._notify()

    def command(self, state: CommandState, outcome: Entry | None, inbox: tuple[str, int, int] | None) -> None:
        """Remember a command's state, its outcome record, and how far (source, partition, next) the inbox is read."""
        with self._wake:
            self._changes.commands.append(state)
            self._add(outcome, inbox)

    def read_upto(self, outcome: Entry | None, inbox: tuple[str, int, int] | None) -> None:
        """As ``command``, for a record that is not remembered by id."""
        with self._wake:
            self._add(outcome, inbox)

    def _add(self, outcome: Entry | None, inbox: tuple[str, int, int] | None) -> None:
        if outcome:
            self._changes.entries.append(outcome)
        if inbox:
            self._changes.inbox[inbox[:2]] = inbox[2]
        self._notify()

    def _notify(self) -> None:
        """Wake the thread if it waits for work; while it waits for company, a wake would cost and change nothing."""
        if self._idle:
            self._wake.notify()

    def published(self, topic: str, partition: int, seq: int, row: int) -> None:
        """Remember how far the broker has acknowledged; written about once a second, and before anything is trimmed."""
        with self._wake:
            self._published_upto[topic, partition] = (seq, row)

    async def durable(self) -> None:
        """Return when everything appended so far is committed; it is, without waiting for the flush interval."""
        done: Future[None] = Future()
        with self._wake:
            self._durable.append(done)
            self._wake.notify()
        await asyncio.wrap_future(done)

    def stop(self, timeout_s: float) -> bool:
        """Commit what is pending and end the thread. False if the disk did not let it within ``timeout_s``."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._commit_until_stopped()
        except Exception as error:
            log.exception("the log's writer died")
            self._tell(self._listener.writer_died, error)

    def _commit_until_stopped(self) -> None:
        carried: tuple[Changes, list[Future[None]]] | None = None
        flushed_at = housekeeping_at = monotonic_ns()
        while True:
            with self._wake:
                self._idle = True
                while not (self._pending() or self._stopping or carried):
                    self._wake.wait()
                self._idle = False
                linger_ns = flushed_at + self._flush_ns - monotonic_ns()
                while linger_ns > 0 and not self._durable and not self._stopping:
                    self._wake.wait(linger_ns / SECOND)
                    linger_ns = flushed_at + self._flush_ns - monotonic_ns()
                stopping = self._stopping
                work = carried or self._take()
                if self._dropped and not carried:
                    dropped, self._dropped = self._dropped, Counter()
                    self._tell(self._listener.samples_dropped, dict(dropped))
            flushed_at = monotonic_ns()
            carried = None if self._commit(*work) else work
            if carried:
                sleep(RETRY_S)
            elif flushed_at - housekeeping_at > HOUSEKEEPING_NS:
                housekeeping_at = flushed_at
                self._keep_house()
            if stopping and not carried and not self._pending():
                self._keep_house()
                self._journal.close()
                return

    def _pending(self) -> bool:
        return bool(self._samples or self._changes.entries or self._changes.commands or self._durable)

    def _take(self) -> tuple[Changes, list[Future[None]]]:
        """Everything pending, stamped. Called with the lock held."""
        if step_ns := self._time.check():
            self._tell(self._listener.clock_stepped, step_ns)
        changes, self._changes = self._changes, Changes()
        durable, self._durable = self._durable, []
        if self._samples:
            changes.telemetry = self._stamp.stamp(np.frombuffer(b"".join(map(bytes, self._samples)), SAMPLE))
            self._samples.clear()
            self._samples_count = 0
        return changes, durable

    def _commit(self, changes: Changes, durable: list[Future[None]]) -> bool:
        try:
            row = self._journal.commit(changes)
        except sqlite3.Error as error:
            if not self._failing:
                self._failing = True
                log.error("journal %s: %s; trying again", self._journal.path, error)
                self._tell(self._listener.disk_failed, str(error))
            return False
        if self._failing:
            self._failing = False
            log.warning("journal %s: writable again", self._journal.path)
            self._tell(self._listener.disk_recovered)
        batch = None if changes.telemetry is None or row is None else Batch(row, changes.telemetry)
        entries = tuple((entry.topic, entry.partition) for entry in changes.entries)
        self._tell(self._listener.committed, Committed(batch, entries))
        for done in durable:  # after the listener: who waits finds it told
            if done.set_running_or_notify_cancel():  # else nobody waits any more
                done.set_result(None)
        return True

    def _keep_house(self) -> None:
        with self._wake:
            published, self._published_upto = self._published_upto, {}
        try:
            if published:
                self._journal.commit(Changes(published=published))
            self._journal.save_heads()
            if lost := self._journal.trim(published=self._published):
                self._tell(self._listener.records_lost, lost)
        except sqlite3.Error as error:
            log.warning("journal %s: housekeeping: %s", self._journal.path, error)

    def _tell(self, call: Callable[..., None], *values: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *values)
