"""Brings the journal's WAL into its file beside the writer, so that no commit waits until the disk has taken it.

Left to itself, SQLite does that within the commit that makes the WAL longer than its bound. Such a commit takes two
syncs and all writes between them: milliseconds on a good disk, tenths of a second on a slow card, and every command
that is being written down waits with it. Here commits go on meanwhile, and a power cut takes no more than what came
since the last time.
"""

import contextlib
import sqlite3
import threading

from gateway.journal import Journal

EVERY_S = 1.0
LONG = 2048  # pages: as commits go on, the end of a WAL is never quite reached, and it would not begin anew
BACKSTOP = 2 * LONG  # pages, beyond which a commit does it after all


class Folder:
    """A thread with a connection of its own, from ``start`` to ``stop``. What goes wrong, the writer finds out."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-folder", daemon=True)

    def start(self) -> None:
        """Begin; the journal's commits leave it to this thread."""
        self._journal.db.execute(f"PRAGMA wal_autocheckpoint = {BACKSTOP}")
        self._thread.start()

    def stop(self) -> None:
        """Begin to end the thread and its connection."""
        self._stopping.set()

    def ended(self, timeout_s: float) -> bool:
        """Wait for that; False if the disk did not let it within ``timeout_s``."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.closing(sqlite3.connect(f"file:{self._journal.path}?mode=rw", uri=True, timeout=0)) as db:
            while not self._stopping.wait(EVERY_S):
                with self._journal.folding, contextlib.suppress(sqlite3.Error):
                    _, pages, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                    if pages > LONG:  # hardly anything is left to do: writers wait for that only
                        db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
