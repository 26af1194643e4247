"""A journal that cannot go on is set aside, never deleted: what can still be read of it goes over to its successor.

The successor begins a new stream. It tells which records of the old one are gone, dates its own behind them, goes on
reading commands where the old one stopped, remembers their ids, and ends those that the old one left unfinished.
"""

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from gateway.evidence import Evidence
from gateway.journal import CommandState, JournalError, JournalReader, Lost, ProducerState, read_rows
from gateway.telemetry import by_partition
from gateway.wal import mend, wal_path

log = logging.getLogger(__name__)

IDS_MOST = 100_000  # of commands, the newest
_IDS_AT_ONCE = 500  # what damage takes with it

T = TypeVar("T")


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
        self.newest_ns = max(self.newest_ns, evidence.newest_ns)
        for known, more in (self.seqs, evidence.seqs), (self.acknowledged, evidence.acknowledged):
            known |= {at: max(seq, known.get(at, 0)) for at, seq in more.items() if seq}

    def lost(self, *, published: bool) -> list[Lost]:
        """What cannot be read of the journal, and is not with the broker either, as far as is known.

        What lies before the newest that can be read, and is damaged, is told when it is published or read.
        """
        known = (self.held, self.acknowledged) if published else (self.held,)
        reached = {at: max(seqs.get(at, 0) for seqs in known) for at in self.seqs}
        spans = [Lost(at, reached[at] + 1, newest) for at, newest in sorted(self.seqs.items())]
        return [span for span in spans if span.from_seq <= span.to_seq]


def set_aside(path: Path, why: str) -> Left:
    """Rename a journal (and its WAL) to a name that is free, and read what can be read of it.

    Raises JournalError if it cannot be renamed.
    """
    aside = path.with_suffix(f".aside-{max(_numbers(path), default=0) + 1}")
    try:
        # the index of the WAL stays with who has it open: theirs may end where the damage begins, ours is made anew
        path.with_name(path.name + "-shm").unlink(missing_ok=True)
        for suffix in ("-wal", ""):  # the file last: whoever is killed in between finds it in its place
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
    before = set_aside_before(path)
    return _read_aside(before[-1], "its successor could not begin at once") if before else None


def set_aside_before(path: Path) -> list[Path]:
    """The journals that stood at ``path`` and were set aside, oldest first."""
    return [path.with_suffix(f".aside-{number}") for number in _numbers(path)]


class Aside(NamedTuple):
    """A journal that was set aside, as far as it can be read; what cannot is as if it were not there.

    ``held``: its newest sequence numbers, and ``published``: (seq, row) that the broker had, by topic and partition.
    """

    path: Path
    stream: int
    motors: dict[int, str]
    held: dict[tuple[str, int], int]
    published: dict[tuple[str, int], tuple[int, int]]
    producer: ProducerState | None
    ends: tuple[int, int]
    reader: JournalReader


def open_aside(path: Path) -> Aside | None:
    """Open a journal that was set aside; None if nothing of it can be read."""
    left = Left(path, "")
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(_uri(path), uri=True)) as db:
        _salvage(db, left, (_identity, _heads, _newest))
    try:
        reader = JournalReader(path, uri=_uri(path))
    except JournalError as error:
        log.warning("%s", error)
        return None
    held = {("telemetry", at): seq for at, seq in left.held.items()}
    return Aside(
        path,
        reader.stream,
        left.motors,
        held | (_read(reader.newest_entries) or {}),
        _read(reader.published) or {},
        _read(reader.producer),
        _read(reader.ends) or (0, 0),
        reader,
    )


def _read(what: Callable[[], T]) -> T | None:
    try:
        return what()
    except sqlite3.Error as error:
        log.warning("a journal that was set aside: %s", error)
        return None


def _uri(aside: Path) -> str:
    # without a WAL, SQLite need not make one to read it
    return f"file:{aside}?mode=ro" if wal_path(aside).exists() else f"file:{aside}?mode=ro&immutable=1"


def _numbers(path: Path) -> list[int]:
    numbers = [file.suffix.removeprefix(".aside-") for file in path.parent.glob(f"{path.stem}.aside-*")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def _read_aside(aside: Path, why: str) -> Left:
    left = Left(aside, why)
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(_uri(aside), uri=True)) as db:
        _salvage(db, left, (_identity, _heads, _acknowledged, _inbox, _newest, _commands))
    return left


def _salvage(db: sqlite3.Connection, left: Left, looks: Iterable[Callable[[sqlite3.Connection, Left], None]]) -> None:
    for look in looks:
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
