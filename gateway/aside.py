"""A journal that cannot go on is set aside, never deleted: what can still be read of it goes over to its successor.

The successor begins a new stream. It tells which records of the old one nobody acknowledged, and goes on reading
commands where the old one stopped.
"""

import contextlib
import logging
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

from gateway.journal import JournalError, Lost, read_rows
from gateway.telemetry import by_partition
from gateway.wal import wal_path

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Left:
    """What is known of a journal that was set aside."""

    path: Path
    why: str
    stream: int | None = None
    motors: dict[int, str] = field(default_factory=dict)
    seqs: dict[int, int] = field(default_factory=dict)  # partition -> newest
    acknowledged: dict[int, int] = field(default_factory=dict)  # partition -> newest that the broker has
    inbox: dict[tuple[str, int], int] = field(default_factory=dict)  # (source, partition) -> next to read

    def unacknowledged(self) -> list[Lost]:
        """What the broker does not have."""
        spans = [Lost(at, self.acknowledged.get(at, 0) + 1, newest) for at, newest in sorted(self.seqs.items())]
        return [span for span in spans if span.from_seq <= span.to_seq]


def set_aside(path: Path, why: str) -> Left:
    """Rename a journal (and its WAL files) to a name that is free, and read what can be read of it.

    Raises JournalError if it cannot be renamed.
    """
    number = next(n for n in range(1, 10_000) if not path.with_suffix(f".aside-{n}").exists())
    aside = path.with_suffix(f".aside-{number}")
    try:
        for suffix in ("-shm", "-wal", ""):  # the file last: whoever is killed in between finds it in its place
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
    except OSError as error:
        raise JournalError(f"journal {path}: {why}, and cannot be set aside: {error}") from error
    log.error("journal %s: %s: set aside as %s, a new stream begins", path, why, aside)
    left = Left(aside, why)
    # without a WAL, SQLite need not make one to read it
    how = "mode=ro" if wal_path(aside).exists() else "mode=ro&immutable=1"
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(f"file:{aside}?{how}", uri=True)) as db:
        _salvage(db, left)
    return left


def _salvage(db: sqlite3.Connection, left: Left) -> None:
    for look in (_identity, _heads, _acknowledged, _inbox, _newest):
        with contextlib.suppress(sqlite3.Error, TypeError, ValueError):  # what cannot be read stays unknown
            look(db, left)


def _identity(db: sqlite3.Connection, left: Left) -> None:
    left.stream = int.from_bytes(db.execute("SELECT stream FROM stream").fetchone()[0], "little")
    left.motors = dict(db.execute("SELECT partition, name FROM motors"))


def _heads(db: sqlite3.Connection, left: Left) -> None:
    left.seqs = dict(db.execute("SELECT partition, seq FROM heads"))


def _acknowledged(db: sqlite3.Connection, left: Left) -> None:
    left.acknowledged = dict(db.execute("SELECT partition, seq FROM published WHERE topic = 'telemetry'"))


def _inbox(db: sqlite3.Connection, left: Left) -> None:
    left.inbox = {(source, at): n for source, at, n in db.execute("SELECT source, partition, next FROM inbox")}


def _newest(db: sqlite3.Connection, left: Left) -> None:
    since = db.execute("SELECT coalesce(max(telemetry_id), 0) FROM heads").fetchone()[0]
    for row in read_rows(db, since):
        for partition, mine in by_partition(row.records) if row.records is not None else ():
            left.seqs[partition] = int(mine["seq"][-1])
