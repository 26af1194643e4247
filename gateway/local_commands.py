"""Commands without Kafka: an SQLite file of its own beside the journal, written by any process on this machine.

Its own file, so that a program that is stopped while it writes never holds the journal's lock. The gateway only reads
it, and keeps how far in its journal.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from gateway.auth import LOCAL
from gateway.commander import Incoming

log = logging.getLogger(__name__)

SOURCE = LOCAL
POLL_S = 0.002  # a look costs some ten microseconds
KEPT = 10_000


def append(path: Path, *raws: bytes) -> int:
    """Put commands in at once; the last one's offset. Raises sqlite3.Error. Only the newest 10,000 are kept."""
    db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    try:
        _prepare(db)
        db.execute("PRAGMA synchronous = NORMAL")  # what a power cut takes would be stale afterwards
        offset: int | None = None
        db.execute("BEGIN IMMEDIATE")
        for raw in raws:
            offset = db.execute("INSERT INTO commands (value) VALUES (?)", (raw,)).lastrowid
        db.execute("DELETE FROM commands WHERE id <= ?", ((offset or 0) - KEPT,))
        db.execute("COMMIT")
    finally:
        db.close()
    return offset or 0


def _prepare(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE IF NOT EXISTS commands (id INTEGER PRIMARY KEY AUTOINCREMENT, value BLOB NOT NULL)")


def _newest(db: sqlite3.Connection) -> int:
    """The highest offset that was ever given, whether or not that command is still there."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'commands'").fetchone()
    newest: int = row[0] if row else 0
    return newest


def _incoming(offset: int, value: bytes, backlog: int) -> Incoming:
    """``backlog``: the newest offset that was there before anything was read."""
    return Incoming(value, SOURCE, 0, offset + 1, live=offset > backlog)


async def follow(path: Path, start: int, handle: Callable[[Sequence[Incoming]], Awaitable[None]]) -> None:
    """Hand every command from offset ``start`` on to ``handle``, until cancelled.

    Looks every few milliseconds whether another process has committed.
    """
    db = sqlite3.connect(path, isolation_level=None, timeout=2.0)
    try:
        _prepare(db)
        if start > (backlog := _newest(db)) + 1:
            log.warning("%s: is a new file: read from its beginning", path)
            start = 1
        version = -1
        while True:
            try:
                newest = db.execute("PRAGMA data_version").fetchone()[0]
                if newest != version:
                    sql = "SELECT id, value FROM commands WHERE id >= ? ORDER BY id LIMIT 100"
                    rows = db.execute(sql, (start,)).fetchall()
                    version = version if rows else newest
                    if rows:
                        start = rows[-1][0] + 1
                        await handle([_incoming(number, bytes(value), backlog) for number, value in rows])
                        continue
            except sqlite3.Error as error:
                log.warning("%s: %s", path, error)
                await asyncio.sleep(1.0)
            await asyncio.sleep(POLL_S)
    finally:
        db.close()
