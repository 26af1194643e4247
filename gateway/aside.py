"""A journal that cannot go on is set aside, never deleted: what can still be read of it goes over to its successor.

The successor begins a new stream. It tells which records of the old one are gone, dates its own behind them, goes on
reading commands where the old one stopped, remembers their ids, and ends those that the old one left unfinished.
"""

import contextlib
import logging
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

from gateway.evidence import Evidence
from gateway.journal import CommandState, JournalError, Lost, read_rows
from gateway.telemetry import by_partition
from gateway.wal import mend, wal_path

log = logging.getLogger(__name__)

IDS_MOST = 100_000  # of commands, the newest
_IDS_AT_ONCE = 500  # what damage takes with it


@dataclass(slots=True)
class Left:
    """What is known of a journal that was set aside."""

    path: Path
    why: str
    stream: int | None = None
    motors: dict[int, str] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)  # partition -> newest that can be read
    seqs: dict[int, int] = field(default_factory=dict)  # partition -> newest that is known of
    acknowledged: dict[int, int] = field(default_factory=dict)  # partition -> newest that the broker has
    inbox: dict[tuple[str, int], int] = field(default_factory=dict)  # (source, partition) -> next to read
    newest_ns: int = 0  # event time
    commands: dict[str, CommandState] = field(default_factory=dict)  # by id, oldest first

    def learn(self, evidence: Evidence | None) -> None:
        """Take over what the status file knows, if it is of this stream or the journal cannot say which is its own."""
        if evidence is None or (self.stream is not None and self.stream != evidence.stream):
            return
        self.stream = evidence.stream
        self.newest_ns = max(self.newest_ns, evidence.at_ns)
        for known, more in (self.seqs, evidence.seqs), (self.acknowledged, evidence.acknowledged):
            known |= {at: max(seq, known.get(at, 0)) for at, seq in more.items() if seq}

    def lost(self, *, published: bool) -> list[Lost]:
        """What the broker does not have; or, where nothing is published, what cannot be read of the journal."""
        reached = self.acknowledged if published else self.held
        spans = [Lost(at, reached.get(at, 0) + 1, newest) for at, newest in sorted(self.seqs.items())]
        return [span for span in spans if span.from_seq <= span.to_seq]


def set_aside(path: Path, why: str) -> Left:
    """Rename a journal (and its WAL files) to a name that is free, and read what can be read of it.

    Raises JournalError if it cannot be renamed.
    """
    aside = path.with_suffix(f".aside-{_newest_number(path) + 1}")
    try:
        for suffix in ("-shm", "-wal", ""):  # the file last: whoever is killed in between finds it in its place
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
    except OSError as error:
        raise JournalError(f"journal {path}: {why}, and cannot be set aside: {error}") from error
    log.error("journal %s: %s: set aside as %s, a new stream begins", path, why, aside)
    with contextlib.suppress(OSError):  # then what is cut off stays so
        mend(aside)
    return _read_aside(aside, why)


def without_successor(path: Path) -> Left | None:
    """The journal that was set aside last, for a new one at ``path`` that holds nothing yet; None if there is none.

    It was set aside by a run that ended before its successor could begin: it was killed, or the disk was full.
    """
    if not (number := _newest_number(path)):
        return None
    return _read_aside(path.with_suffix(f".aside-{number}"), "its successor could not begin at once")


def _newest_number(path: Path) -> int:
    numbers = [file.suffix.removeprefix(".aside-") for file in path.parent.glob(f"{path.stem}.aside-*")]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _read_aside(aside: Path, why: str) -> Left:
    left = Left(aside, why)
    # without a WAL, SQLite need not make one to read it
    how = "mode=ro" if wal_path(aside).exists() else "mode=ro&immutable=1"
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(f"file:{aside}?{how}", uri=True)) as db:
        _salvage(db, left)
    return left


def _salvage(db: sqlite3.Connection, left: Left) -> None:
    for look in (_identity, _heads, _acknowledged, _inbox, _newest, _commands):
        with contextlib.suppress(sqlite3.Error, TypeError, ValueError):  # what cannot be read stays unknown
            look(db, left)
    left.held = dict(left.seqs)


def _identity(db: sqlite3.Connection, left: Left) -> None:
    left.stream = int.from_bytes(db.execute("SELECT stream FROM stream").fetchone()[0], "little")
    left.motors = dict(db.execute("SELECT partition, name FROM motors"))


def _heads(db: sqlite3.Connection, left: Left) -> None:
    left.seqs = dict(db.execute("SELECT partition, seq FROM heads"))
    left.newest_ns = db.execute("SELECT coalesce(max(sampled_at_ns), 0) FROM heads").fetchone()[0]


def _acknowledged(db: sqlite3.Connection, left: Left) -> None:
    left.acknowledged = dict(db.execute("SELECT partition, seq FROM published WHERE topic = 'telemetry'"))


def _inbox(db: sqlite3.Connection, left: Left) -> None:
    left.inbox = {(source, at): n for source, at, n in db.execute("SELECT source, partition, next FROM inbox")}


def _newest(db: sqlite3.Connection, left: Left) -> None:
    since = db.execute("SELECT coalesce(max(telemetry_id), 0) FROM heads").fetchone()[0]
    for row in read_rows(db, since):
        for partition, mine in by_partition(row.records) if row.records is not None else ():
            left.seqs[partition] = int(mine["seq"][-1])
            left.newest_ns = max(left.newest_ns, int(mine["sampled_at_ns"][-1]))


def _commands(db: sqlite3.Connection, left: Left) -> None:
    last = db.execute("SELECT coalesce(max(number), 0) FROM commands").fetchone()[0]
    for first in range(max(0, last - IDS_MOST), last, _IDS_AT_ONCE):
        span = (first, first + _IDS_AT_ONCE)
        sql = "SELECT id, final, at_ns, motor FROM commands WHERE number > ? AND number <= ? ORDER BY number"
        with contextlib.suppress(sqlite3.Error):
            for name, final, at_ns, motor in db.execute(sql, span):
                left.commands[name] = CommandState(name, bool(final), at_ns, motor)
