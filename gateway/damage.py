"""Damage in the journal: found before anybody misses the records, and told as the sequence numbers that are gone.

A row of telemetry whose checksum is wrong, or whose page SQLite cannot read, cannot say what it held. The rows before
and behind it can: for each motor, what lies between its newest number before and its first one behind is lost. What a
damaged entry was, event or outcome, and its number are in the index.
"""

import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

from drivers.clock import SECOND, monotonic_ns
from gateway.journal import Journal, Lost, Row, ends, read_entries, read_rows
from gateway.telemetry import by_partition

SCRUB_BYTES = 2 << 20  # looked at in one step, of which there is one a second
SCRUB_ENTRIES = 500  # likewise
PASS_NS = 3600 * SECOND  # from the beginning of one pass over the journal to that of the next
NEAR_BYTES = 4 << 20  # how far back a motor's newest number is looked for, before looking further forward
_ROWS = 256  # read at once


class Damage(NamedTuple):
    """Rows first..last hold at least one damaged row at either end, and this is what went with them."""

    first: int
    last: int
    lost: list[Lost]


class DamagedEntry(NamedTuple):
    """An event or outcome that is not what was written, and its place in the log."""

    id: int
    lost: Lost


class Scrubber:
    """Reads the journal slowly from its oldest row to its newest, over and over. On the writer's thread."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._told = journal.damaged()
        self._at = self._entry_at = 0
        self._pass_at = self._entry_pass_at = 0  # when this pass began, or the next one is due

    def look(self, suspects: Iterable[int]) -> list[Damage]:
        """Damage that is not told yet, of ``suspects`` and in the next two megabytes. Raises sqlite3.Error."""
        found = []
        for row in sorted({*suspects, *self._scrub()}):
            if not self._is_told(row) and (damage := find_damage(self._journal, row)):
                self._told.append((damage.first, damage.last))
                found.append(damage)
        return found

    def look_at_entries(self, suspects: Iterable[int]) -> list[DamagedEntry]:
        """Damaged entries that are not told yet, of ``suspects`` and the next few hundred. Raises sqlite3.Error."""
        db = self._journal.db
        damaged = self._scrub_entries()
        for number in suspects:
            damaged += _damaged_entries(db, number - 1, number)
        return [DamagedEntry(number, lost) for number in sorted({*damaged}) for lost in _lost_with(db, number)]

    def _scrub_entries(self) -> list[int]:
        now = monotonic_ns()
        if now < self._entry_pass_at:
            return []
        after = self._entry_at
        sql = "SELECT max(id) FROM (SELECT id FROM entries WHERE id > ? ORDER BY id LIMIT ?)"
        upto = self._journal.db.execute(sql, (after, SCRUB_ENTRIES)).fetchone()[0]
        if upto is None:
            self._entry_at, self._entry_pass_at = 0, now + PASS_NS
            return []
        self._entry_at = upto
        return _damaged_entries(self._journal.db, after, upto)

    def _is_told(self, row: int) -> bool:
        return any(first <= row <= last for first, last in self._told)

    def _scrub(self) -> list[int]:
        damaged: list[int] = []
        now = monotonic_ns()
        if now < self._pass_at:
            return damaged
        size = 0
        while size < SCRUB_BYTES:
            rows = read_rows(self._journal.db, self._at, limit=_ROWS)
            if not rows:
                self._at, self._pass_at = 0, now + PASS_NS
                break
            self._at = rows[-1].id
            damaged += [row.id for row in rows if row.records is None]
            size += _bytes(rows)
        return damaged


def find_damage(journal: Journal, row: int) -> Damage | None:
    """What is lost with telemetry row ``row`` and the damaged rows around it; None if it can be read, or is gone."""
    db = journal.db
    first = row
    while _is_damaged(db, first - 1):
        first -= 1
    if not _is_damaged(db, row):
        return None
    before = _newest_before(db, first, set(journal.heads), NEAR_BYTES)
    known = dict(before)
    away = {partition for partition, head in journal.heads.items() if head.seq == before.get(partition, 0)}
    open_, last, most = set(journal.heads) - away, row, 0
    spans: list[tuple[int, int | None, int]] = []  # partition, newest before (None: not known yet), last that is lost
    after = first - 1
    while open_ and (rows := read_rows(db, after, limit=_ROWS)):
        for found in rows:
            if found.records is None:
                last, most = found.id, most + found.most
                open_ = set(journal.heads) - away
                continue
            for partition, mine in by_partition(found.records):
                if partition in open_:
                    open_.discard(partition)
                    spans.append((partition, before.get(partition), int(mine["seq"][0]) - 1))
                before[partition] = int(mine["seq"][-1])
            if not open_:
                break
        after = rows[-1].id
    spans += [(partition, before.get(partition), journal.heads[partition].seq) for partition in open_]
    unknown = {partition for partition, newest, upto in spans if newest is None and upto > 0}
    known |= _newest_before(db, first, unknown)
    lost = []
    for partition, newest, upto in spans:
        # nowhere before: the journal begins with the damage, as far as this motor goes
        behind = known.get(partition, max(0, upto - most)) if newest is None else newest
        if behind < upto:
            lost.append(Lost(partition, behind + 1, upto))
    return Damage(first, last, sorted(lost))


def _damaged_entries(db: sqlite3.Connection, after: int, upto: int) -> list[int]:
    """Damaged entries with ids in (after, upto] that are not told yet."""
    found: list[int] = []
    read_entries(db, "id > ? AND id <= ?", (after, upto), -1, lambda _, number: found.append(number))
    return found


def _lost_with(db: sqlite3.Connection, entry: int) -> list[Lost]:
    """What entry ``entry`` was; nothing if the index does not know it."""
    sql = "SELECT topic, partition, seq FROM entries INDEXED BY sqlite_autoindex_entries_1 WHERE +id = ?"
    return [Lost(partition, seq, seq, topic) for topic, partition, seq in db.execute(sql, (entry,))]


def _is_damaged(db: sqlite3.Connection, row: int) -> bool:
    return any(found.records is None for found in read_rows(db, row - 1, row))


def _newest_before(db: sqlite3.Connection, row: int, partitions: set[int], most_bytes: int = 1 << 62) -> dict[int, int]:
    """{partition: newest sequence number before ``row``}, of those that are found within ``most_bytes``."""
    found: dict[int, int] = {}
    oldest, _ = ends(db)
    upto, size = row - 1, 0
    while upto >= oldest and size < most_bytes and not found.keys() >= partitions:
        rows = read_rows(db, upto - _ROWS, upto)
        for one in reversed(rows):
            for partition, mine in by_partition(one.records) if one.records is not None else ():
                found.setdefault(partition, int(mine["seq"][-1]))
        size += _bytes(rows)
        upto -= _ROWS
    return found


def _bytes(rows: Iterable[Row]) -> int:
    return sum(row.records.nbytes + 64 for row in rows if row.records is not None)
