"""The newest part of the log, in memory: what was just committed, and all that the disk does not take.

    writer --committed, saved, forgotten--> Recent <--reads first-- publisher (and, for what is older, the journal)

On a healthy disk it is a short memory that saves reading back what was just written. While the disk is full, away or
slow, it is the only place that holds the newest records: those stay until they are saved or the writer, at its bound,
drops them and tells so. Used on the event loop's thread only.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from itertools import takewhile

from gateway.journal import Batch, StoredEntry
from gateway.telemetry import Split

ROWS_KEPT = 1024  # saved ones; about three seconds
ENTRIES_KEPT = 256  # saved ones, of each topic and partition


class Recent:
    """Rows of telemetry and entries, newest last, without a hole from the oldest that is kept to the newest."""

    def __init__(self, row: int, entry: int) -> None:
        """``row`` and ``entry``: ids of the newest that the journal held when this began; 0 for none."""
        self.row = row
        self.saved_row = row
        self.saved_entry = entry
        self._rows: deque[tuple[int, Split]] = deque()
        self._entries: dict[tuple[str, int], deque[StoredEntry]] = defaultdict(deque)

    def append(self, batch: Batch | None, entries: Sequence[StoredEntry]) -> None:
        """What was numbered just now, saved or not."""
        if batch is not None:
            self._rows.append((batch.id, batch.split))
            self.row = batch.id
        for entry in entries:
            self._entries[entry.topic, entry.partition].append(entry)

    def saved(self, row: int, entry: int) -> None:
        """The journal holds everything up to these ids."""
        self.saved_row, self.saved_entry = row, entry
        while len(self._rows) > ROWS_KEPT and self._rows[0][0] <= row:
            self._rows.popleft()
        for kept in self._entries.values():
            while len(kept) > ENTRIES_KEPT and kept[0].id <= entry:
                kept.popleft()

    def forget(self, rows: Collection[int], entries: Collection[int]) -> None:
        """Unsaved rows and entries with these ids were given up, to bound the memory."""
        self._rows = deque(kept for kept in self._rows if kept[0] not in rows)
        for at, kept in self._entries.items():
            self._entries[at] = deque(entry for entry in kept if entry.id not in entries)

    def rows(self, after: int) -> list[tuple[int, Split]] | None:
        """Rows behind row ``after``, oldest first; None if older ones than these are to be read from the journal."""
        if after >= self.row:
            return []
        if after < self.saved_row and (not self._rows or self._rows[0][0] > after + 1):
            return None
        return list(takewhile(lambda kept: kept[0] > after, reversed(self._rows)))[::-1]

    def entries(self, topic: str, partition: int, after_seq: int, limit: int) -> list[StoredEntry] | None:
        """Entries of one partition behind ``after_seq``; None if they are to be read from the journal."""
        kept = self._entries.get((topic, partition))
        if not kept or kept[0].seq > after_seq + 1:
            return None
        return [entry for entry in kept if entry.seq > after_seq][:limit]
