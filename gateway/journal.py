"""The journal: the embedded log of one arm, an SQLite file in WAL mode. Storage only; no threads, no clocks.

    telemetry   one row a batch: records of all motors as they were stamped (dtype RECORD), with a checksum
    entries     events and outcomes: one row a record, numbered per topic and partition
    commands    the memory of command ids and what became of each
    heads       newest record of each motor, as of some row; what follows that row is read again at the start
    published   how far the broker has acknowledged
    producer    who the gateway is to the broker, and bases: where each partition's Kafka sequence numbers begin
    damaged     rows of telemetry that cannot be read any more, and whose loss was told
    sizes       the first row, the bytes of entries, and whether the marker of a whole journal was made

One process writes (the gateway, held to it by ``gateway.state_dir``), any number read. All numbers (row and entry ids,
sequence numbers) are given before (``gateway.stamp``); a commit only writes them down. A telemetry record's offset in
its partition is ``seq - 1``: a journal holds one stream, and its identity is the stream's.
"""

import contextlib
import functools
import logging
import secrets
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from gateway.stamp import Head
from gateway.telemetry import RECORD, Records, Split, by_partition
from gateway.wal import holders, wal_path

log = logging.getLogger(__name__)

APPLICATION_ID = 0x53475731  # "SGW1"
VERSION = 3
_TRIM_ROWS = 5_000  # a second's worth and more, so that trimming once a second keeps up
_TRIM_ENTRIES = 2_000  # likewise
ENTRIES_SHARE = 4  # events and outcomes take a fourth of the size at most: they outlive the telemetry around them
IDS_SHARE = 16  # command ids a sixteenth
ID_BYTES = 160  # of a command's row and its index, about
ENTRY_BYTES = 64  # of an entry's row and its index, beside its value and key
WAL_SHARE = 4  # of the size: what the WAL counts for, at most
BUSY_S = 2.0  # how long a statement waits for somebody else's lock

_SCHEMA = """
CREATE TABLE stream    (id INTEGER PRIMARY KEY CHECK (id = 0), stream BLOB NOT NULL, arm TEXT NOT NULL);
CREATE TABLE motors    (partition INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE telemetry (id INTEGER PRIMARY KEY, crc INTEGER NOT NULL, records BLOB NOT NULL);
CREATE TABLE entries   (id INTEGER PRIMARY KEY, topic TEXT NOT NULL, partition INTEGER NOT NULL,
                        seq INTEGER NOT NULL, at_ns INTEGER NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
                        UNIQUE (topic, partition, seq));
CREATE TABLE commands  (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, final INTEGER NOT NULL,
                        at_ns INTEGER NOT NULL, motor TEXT NOT NULL);
CREATE INDEX unfinished ON commands (final) WHERE final = 0;
CREATE TABLE inbox     (source TEXT NOT NULL, partition INTEGER NOT NULL, next INTEGER NOT NULL,
                        PRIMARY KEY (source, partition)) WITHOUT ROWID;
CREATE TABLE heads     (partition INTEGER PRIMARY KEY, seq INTEGER NOT NULL, sampled_at_ns INTEGER NOT NULL,
                        telemetry_id INTEGER NOT NULL);
CREATE TABLE published (topic TEXT NOT NULL, partition INTEGER NOT NULL, seq INTEGER NOT NULL, id INTEGER NOT NULL,
                        PRIMARY KEY (topic, partition)) WITHOUT ROWID;
"""
_SINCE_2 = """
CREATE TABLE producer  (id INTEGER PRIMARY KEY CHECK (id = 0), cluster TEXT NOT NULL, pid INTEGER NOT NULL,
                        epoch INTEGER NOT NULL);
CREATE TABLE bases     (topic TEXT NOT NULL, partition INTEGER NOT NULL, base INTEGER NOT NULL,
                        PRIMARY KEY (topic, partition)) WITHOUT ROWID;
CREATE TABLE damaged   (first INTEGER PRIMARY KEY, last INTEGER NOT NULL);
CREATE TABLE sizes     (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE VIEW older AS SELECT id, topic, partition, seq, length(CAST(key AS BLOB)) + length(value) + 64 AS bytes
                       FROM entries WHERE seq < (SELECT max(seq) FROM entries AS newest
                       WHERE newest.topic = entries.topic AND newest.partition = entries.partition);
INSERT INTO sizes SELECT 'first row', coalesce(min(id), 1) FROM telemetry;
INSERT INTO sizes SELECT 'entries', coalesce(sum(length(CAST(key AS BLOB)) + length(value) + 64), 0) FROM entries;
"""
_SINCE_3 = "ALTER TABLE entries ADD COLUMN crc INTEGER;"  # NULL: written before; or TOLD
TOLD = -1  # in place of an entry's checksum: it is damaged, and that is told


class JournalError(Exception):
    """The journal does not fit the configuration, or is none."""


class JournalBroken(Exception):
    """SQLite cannot make sense of the file any more: it has to be set aside, and a new stream begins."""


class WalHeld(sqlite3.OperationalError):
    """The WAL is above its bound, and somebody who reads an old state of the journal keeps it from being folded."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A record of the events or outcomes topic; ``key`` is the motor's name or ``*``."""

    topic: str
    partition: int
    key: str
    value: bytes
    at_ns: int


Table: TypeAlias = Literal["telemetry", "entries"]
"""Where a damaged row is."""


class StoredEntry(NamedTuple):
    """An entry as the journal holds it: ``seq`` counts 1, 2, 3, ... per topic and partition."""

    id: int
    topic: str
    partition: int
    seq: int
    at_ns: int
    key: str
    value: bytes


@dataclass(frozen=True, eq=False)
class Batch:
    """One row of telemetry: ``records`` (dtype RECORD) sorted by partition."""

    id: int
    records: Records

    @functools.cached_property
    def split(self) -> Split:
        """The records of each partition: made once for all who ask."""
        return dict(by_partition(self.records))


class CommandState(NamedTuple):
    """What is remembered of a command id."""

    id: str
    final: bool
    at_ns: int
    motor: str


class ProducerState(NamedTuple):
    """The identity that makes a repeated produce request known as one: Kafka numbers batches per producer id."""

    cluster: str
    pid: int
    epoch: int
    bases: dict[tuple[str, int], int]
    """{(topic, partition): seq of the record at position 0}; negative where numbers were left out: a position counts
    epochs, too (``gateway.producer``)."""


@dataclass(slots=True)
class Changes:
    """What a commit writes; everything in it has its numbers."""

    batch: Batch | None = None
    entries: list[StoredEntry] = field(default_factory=list)
    commands: list[CommandState] = field(default_factory=list)
    inbox: dict[tuple[str, int], int] = field(default_factory=dict)  # (source, partition) -> next to read
    published: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # (topic, partition) -> seq, id
    producer: ProducerState | None = None
    skipped: dict[int, int] = field(default_factory=dict)  # partition -> seq up to which no record comes any more
    damaged: list[tuple[int, int]] = field(default_factory=list)  # telemetry rows first..last whose loss is told here
    damaged_entries: list[int] = field(default_factory=list)  # likewise
    trim: "Trim | None" = None
    save_heads: bool = False


class Replayed(NamedTuple):
    """What marks a journal as a replay: the stream that it repeats, whose it was, and when the replay began."""

    stream: int
    source: str
    at_ns: int


class Lost(NamedTuple):
    """Records that are gone: sequence numbers from..to of a partition."""

    partition: int
    from_seq: int
    to_seq: int
    topic: str = "telemetry"


Published = Mapping[tuple[str, int], tuple[int, int]]
"""{(topic, partition): (seq, row or entry id)} that the broker has acknowledged."""


class Trim(NamedTuple):
    """What goes to hold the bound: telemetry rows, entries and command numbers up to these; 0: none."""

    row: int = 0
    entry: int = 0
    entry_bytes: int = 0
    command: int = 0


class Journal:
    """The writer's side."""

    def __init__(
        self, path: Path, arm: str, motors: Mapping[int, str], max_bytes: int, replayed: Replayed | None = None
    ) -> None:
        """Open or create. Raises JournalError if it belongs to another arm or its motors sit on other partitions, and
        if it is a replay's and ``replayed`` is None, or the other way round.

        Raises JournalBroken for a file that SQLite cannot make sense of; the file is left as it is.
        """
        self.max_bytes = max_bytes
        self.path = path
        self.folding = threading.Lock()  # held by who brings the WAL into the file
        self._held = False  # by a reader: the WAL
        try:
            self.db = self._open(path, arm, replayed)
            self._identity = identity(path)
            with contextlib.ExitStack() as undo:
                undo.callback(self.db.close)
                self.stream = int.from_bytes(self._one("SELECT stream FROM stream"), "little")
                self.add_motors(motors)
                self._recover(motors)
                undo.pop_all()
        except sqlite3.Error as error:
            if is_broken(error):
                raise JournalBroken(str(error)) from error
            raise JournalError(f"journal {path}: {error}") from error

    def _open(self, path: Path, arm: str, replayed: Replayed | None) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_S)
        with contextlib.ExitStack() as undo:
            undo.callback(db.close)
            db.execute("PRAGMA journal_mode = WAL")
            # survives a killed process with every commit, a power cut up to the last checkpoint
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(f"PRAGMA journal_size_limit = {16 << 20}")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if not version:
                self._create(db, arm, replayed)
            elif version in (1, 2):
                steps = (_SINCE_2, _SINCE_3)[version - 1 :]
                db.executescript(f"BEGIN IMMEDIATE; {''.join(steps)} PRAGMA user_version = {VERSION}; COMMIT")
            found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
            if found != [APPLICATION_ID, VERSION]:
                raise JournalError(f"journal {path}: not a journal of this version (found {found})")
            holder = db.execute("SELECT arm FROM stream").fetchone()[0]
            if holder != arm:
                raise JournalError(f"journal {path}: belongs to arm {holder!r}, not {arm!r}: use another state_dir")
            if (replayed_from(db) is None) != (replayed is None):
                what = "that of a gateway" if replayed else "a replay, which no gateway goes on with"
                raise JournalError(f"journal {path}: is {what}: use another state_dir")
            undo.pop_all()
        return db

    @staticmethod
    def _create(db: sqlite3.Connection, arm: str, replayed: Replayed | None) -> None:
        stream = replayed.stream if replayed else secrets.randbits(53)  # 53 bits: whole in every JSON reader
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}{_SINCE_2}{_SINCE_3}")
        db.execute("INSERT INTO stream VALUES (0, ?, ?)", (stream.to_bytes(8, "little"), arm))
        if replayed:
            db.execute("CREATE TABLE replayed (source TEXT NOT NULL, at_ns INTEGER NOT NULL)")
            db.execute("INSERT INTO replayed VALUES (?, ?)", replayed[1:])
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")

    def _one(self, sql: str, *values: object) -> Any:
        return self.db.execute(sql, values).fetchone()[0]

    def add_motors(self, motors: Mapping[int, str]) -> None:
        """Know these motors too, {partition: name}. Raises JournalError if one sits elsewhere already."""
        known: dict[int, str] = dict(self.db.execute("SELECT partition, name FROM motors"))
        moved = [
            f"partition {partition} belongs to {known[partition]!r}, not {name!r}"
            for partition, name in motors.items()
            if known.get(partition, name) != name
        ] + [
            f"{name!r} sits on partition {partition}, not {motors_partition}"
            for motors_partition, name in motors.items()
            for partition, known_name in known.items()
            if known_name == name and partition != motors_partition
        ]
        if moved:
            raise JournalError(
                f"journal {self.path}: {'; '.join(moved)}. A motor keeps its partition for life: give a new motor a "
                "new one, or move the journal away to begin a new stream"
            )
        if fresh := {partition: name for partition, name in motors.items() if partition not in known}:
            self.db.executemany("INSERT INTO motors VALUES (?, ?)", fresh.items())
        self.motors = known | fresh

    def _recover(self, motors: Mapping[int, str]) -> None:
        """Where the numbers go on: of rows, of entries, of each motor, of each (topic, partition)."""
        self.row: int = self._one("SELECT max(id) FROM telemetry") or 0
        self.entry: int = self._one("SELECT max(id) FROM entries") or 0
        self.entry_heads = newest_entries(self.db)
        self.published = {
            (topic, partition): (seq, row)
            for topic, partition, seq, row in self.db.execute("SELECT topic, partition, seq, id FROM published")
        }
        positions = self.db.execute("SELECT source, partition, next FROM inbox")
        self.inbox = {(source, partition): upto for source, partition, upto in positions}
        self._entry_bytes: int = self._one("SELECT value FROM sizes WHERE name = 'entries'")
        self.marked = bool(self._one("SELECT count(*) FROM sizes WHERE name = 'marked'"))
        self.heads = {partition: Head(0, 0) for partition in motors}
        since = 0
        for partition, seq, at_ns, row in self.db.execute("SELECT * FROM heads"):
            self.heads[partition] = Head(seq, at_ns)
            since = max(since, row)
        self.damaged_at_start: list[int] = []
        for row in read_rows(self.db, since):
            if row.records is None:
                self.damaged_at_start.append(row.id)
                # numbers that it may hold are never given again; that they are missing is told
                self.heads = {at: Head(head.seq + row.most, head.sampled_at_ns) for at, head in self.heads.items()}
            else:
                _advance(self.heads, dict(by_partition(row.records)))

    def mark(self) -> None:
        """From now on the marker of a whole journal is missed (``gateway.evidence``). Raises sqlite3.Error."""
        self.db.execute("INSERT OR REPLACE INTO sizes VALUES ('marked', 1)")
        self.marked = True

    def commit(self, *changes: Changes) -> None:
        """Write ``changes`` in one transaction.

        Raises sqlite3.Error and has written nothing: try again, the same changes are still good. A file that its path
        does not lead to any more (a disk that was taken away, a directory that was removed) takes nothing.
        """
        if identity(self.path) != self._identity:
            raise sqlite3.OperationalError("the journal was removed or replaced")
        heads = dict(self.heads)
        self.db.execute("BEGIN IMMEDIATE")
        try:
            for change in changes:
                self._write(change, heads)
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise
        self.heads = heads
        for change in changes:
            self._written(change)

    def _write(self, change: Changes, heads: dict[int, Head]) -> None:
        execute, many = self.db.execute, self.db.executemany
        if change.batch is not None:
            blob = change.batch.records.tobytes()
            execute("INSERT INTO telemetry VALUES (?, ?, ?)", (change.batch.id, zlib.crc32(blob), blob))
            _advance(heads, change.batch.split)
        for partition, seq in change.skipped.items():
            heads[partition] = Head(max(seq, heads[partition].seq), heads[partition].sampled_at_ns)
        if change.entries:
            many("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [(*e, _entry_crc(*e)) for e in change.entries])
        if change.commands:
            many("INSERT OR REPLACE INTO commands (id, final, at_ns, motor) VALUES (?, ?, ?, ?)", change.commands)
        if change.inbox:
            many("INSERT OR REPLACE INTO inbox VALUES (?, ?, ?)", [(*at, n) for at, n in change.inbox.items()])
        if change.published:
            rows = [(*at, *upto) for at, upto in change.published.items()]
            many("INSERT OR REPLACE INTO published VALUES (?, ?, ?, ?)", rows)
        if change.producer:
            cluster, pid, epoch, bases = change.producer
            execute("INSERT OR REPLACE INTO producer VALUES (0, ?, ?, ?)", (cluster, pid, epoch))
            execute("DELETE FROM bases")
            many("INSERT INTO bases VALUES (?, ?, ?)", [(*at, base) for at, base in bases.items()])
        if change.damaged:
            many("INSERT OR IGNORE INTO damaged VALUES (?, ?)", change.damaged)
        if change.damaged_entries:
            many("UPDATE entries SET crc = ? WHERE id = ?", [(TOLD, number) for number in change.damaged_entries])
        if change.trim:
            self._remove(change.trim)
        if change.save_heads or change.skipped:
            row = self._one("SELECT max(id) FROM telemetry") or 0  # the start reads on behind it
            many("INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?)", [(at, *head, row) for at, head in heads.items()])
            execute("UPDATE sizes SET value = ? WHERE name = 'entries'", (self._entry_bytes,))

    def _written(self, change: Changes) -> None:
        if change.batch is not None:
            self.row = change.batch.id
        for entry in change.entries:
            self.entry = entry.id
            self.entry_heads[entry.topic, entry.partition] = entry.seq
            self._entry_bytes += _entry_bytes(entry)
        if change.trim:
            self._entry_bytes -= change.trim.entry_bytes

    # -- the bound -----------------------------------------------------------------------------------------------

    def plan_trim(self, published: Published | None) -> tuple[Trim | None, list[Lost]]:
        """What to remove to hold the size, oldest first, acknowledged or not; None if nothing.

        ``published``: what the broker has acknowledged; None: there is none that has to. Also returns what is removed
        without being acknowledged.
        """
        lost: list[Lost] = []
        row = entry = entry_bytes = 0
        used_bytes = self._used_bytes()
        if used_bytes > self.max_bytes:
            first, last = ends(self.db)
            if first < last:  # the newest row stays: ids go on from it
                surplus = 1 - 0.98 * self.max_bytes / used_bytes
                row = min(first + round((last - first) * surplus), first + _TRIM_ROWS, last - 1)
                lost = [] if published is None else self._unacknowledged(published, first - 1, row)
        if (surplus_bytes := self._entry_bytes - self.max_bytes // ENTRIES_SHARE) > 0:
            entry, entry_bytes = self._oldest_entries(surplus_bytes + self.max_bytes // ENTRIES_SHARE // 50)
            lost += [] if published is None else self._unacknowledged_entries(published, entry)
        kept = self.max_bytes // IDS_SHARE // ID_BYTES
        first_id = self._one("SELECT min(number) FROM commands WHERE final = 1") or 0
        last_id = self._one("SELECT max(number) FROM commands") or 0
        command = last_id - kept if last_id - first_id > 1.02 * kept else 0
        if not (row or entry or command):
            return None, []
        return Trim(row, entry, entry_bytes, command), lost

    def _remove(self, trim: Trim) -> None:
        execute = self.db.execute
        if trim.row:
            execute("DELETE FROM telemetry WHERE id <= ?", (trim.row,))
            execute("DELETE FROM damaged WHERE last <= ?", (trim.row,))
            execute("UPDATE sizes SET value = ? WHERE name = 'first row'", (trim.row + 1,))
        if trim.entry:
            execute("DELETE FROM entries WHERE id IN (SELECT id FROM older WHERE id <= ?)", (trim.entry,))
        if trim.command:
            execute("DELETE FROM commands WHERE final = 1 AND number <= ?", (trim.command,))

    def _unacknowledged(self, published: Published, after: int, upto: int) -> list[Lost]:
        """What the rows in (after, upto] hold that the broker has not acknowledged."""
        acknowledged = {partition: published.get(("telemetry", partition), (0, 0)) for partition in self.heads}
        behind = [
            acknowledged[partition] for partition, head in self.heads.items() if acknowledged[partition][0] < head.seq
        ]
        if not behind:
            return []
        seqs = {partition: seq for partition, (seq, _) in acknowledged.items()}
        after = max(after, min(row for _, row in behind))
        return ranges((batch.records for batch in batches_after(self.db, after, upto)), seqs)

    def _oldest_entries(self, surplus_bytes: int) -> tuple[int, int]:
        """The id up to which entries go, and their bytes. The newest of each partition stays: numbers go on from it."""
        oldest = self.db.execute("SELECT id, bytes FROM older ORDER BY id LIMIT ?", (_TRIM_ENTRIES,))
        upto = gone_bytes = 0
        for number, entry_bytes in oldest:
            if gone_bytes >= surplus_bytes:
                break
            upto, gone_bytes = number, gone_bytes + entry_bytes
        return upto, gone_bytes

    def _unacknowledged_entries(self, published: Published, upto: int) -> list[Lost]:
        sql = "SELECT topic, partition, min(seq), max(seq) FROM older WHERE id <= ? GROUP BY 1, 2"
        found = [
            Lost(partition, max(first, published.get((topic, partition), (0, 0))[0] + 1), last, topic)
            for topic, partition, first, last in self.db.execute(sql, (upto,))
        ]
        return [lost for lost in found if lost.from_seq <= lost.to_seq]

    def _used_bytes(self) -> int:
        pages, free, page_size = (self._one(f"PRAGMA {name}") for name in ("page_count", "freelist_count", "page_size"))
        used: int = (pages - free) * page_size
        return used + min(self.wal_bytes(), self.max_bytes // WAL_SHARE)

    # -- the WAL -------------------------------------------------------------------------------------------------

    def wal_bytes(self) -> int:
        """The size of the WAL."""
        try:
            return wal_path(self.path).stat().st_size
        except OSError:
            return 0

    def fold(self) -> None:
        """Bring the WAL into the file as far as that can be, so that it begins anew; waits for nobody.

        Raises WalHeld if it is above its bound and a reader still needs it.
        """
        if self.folding.acquire(blocking=False):  # else it is folded just now, which looks as if a reader held it
            try:
                self.db.execute("PRAGMA busy_timeout = 0")
                with contextlib.suppress(sqlite3.OperationalError):  # the next commit says what is wrong
                    self._held = bool(self._one("PRAGMA wal_checkpoint(RESTART)"))
                self.db.execute(f"PRAGMA busy_timeout = {round(BUSY_S * 1000)}")
            finally:
                self.folding.release()
        if self._held and self.wal_bytes() > self.wal_bound:
            raise WalHeld(f"a reader holds the WAL ({self.wal_bytes() >> 20} MB){holders(self.path)}")

    @property
    def wal_bound(self) -> int:
        """Bytes above which the WAL has to be folded before anything more is written."""
        return max(64 << 20, min(256 << 20, self.max_bytes // WAL_SHARE))

    def damaged(self) -> list[tuple[int, int]]:
        """Rows first..last of telemetry whose damage was told."""
        return self.db.execute("SELECT first, last FROM damaged").fetchall()

    def close(self, changes: Changes | None = None) -> None:
        """Write the last ``changes`` and the heads, fold the WAL into the file, close."""
        with contextlib.suppress(sqlite3.Error):
            self.commit(changes or Changes(), Changes(save_heads=True))
        self.db.close()


class JournalReader:
    """A reader's side: a connection of its own, read-only. Short transactions: it never holds the writer up."""

    def __init__(
        self, path: Path, busy_s: float = BUSY_S, damaged: Callable[[Table, int], None] | None = None, *, uri: str = ""
    ) -> None:
        """Raises JournalError if there is no journal at ``path``.

        ``busy_s``: how long a call waits for somebody's lock. ``damaged`` is called with table and id of each
        row that turns out to be unreadable. ``uri``: how SQLite is to open it, if not read-only as any other.
        """
        if not path.exists():
            raise JournalError(f"journal {path}: there is none (has the gateway run with this state_dir?)")
        self._damaged = damaged
        try:
            where = uri or f"file:{path}?mode=ro"
            self._db = sqlite3.connect(where, uri=True, check_same_thread=False, timeout=busy_s)
            row = self._db.execute("SELECT stream, arm FROM stream").fetchone()
        except sqlite3.Error as error:
            raise JournalError(f"journal {path}: {error}") from error
        self.stream = int.from_bytes(row[0], "little")
        self.arm: str = row[1]

    def motors(self) -> dict[int, str]:
        """{partition: name} of every motor that the journal has known."""
        return dict(self._db.execute("SELECT partition, name FROM motors"))

    def ends(self) -> tuple[int, int]:
        """Ids of the newest telemetry row and the newest entry; 0 where there is none."""
        telemetry, entries = (
            self._db.execute(sql).fetchone()[0] or 0
            for sql in ("SELECT max(id) FROM telemetry", "SELECT max(id) FROM entries")
        )
        return telemetry, entries

    def batches(self, after: int, limit: int) -> list[Batch]:
        """Up to ``limit`` telemetry rows behind row ``after``, oldest first. A damaged row is left out, and logged."""
        return list(batches_after(self._db, after, limit=limit, damaged=self._damaged))

    def entries(self, after: int, limit: int, topic: str | None = None) -> list[StoredEntry]:
        """Up to ``limit`` events and outcomes behind entry ``after``, oldest first. A damaged one is left out."""
        where = "id > ?1 AND (?2 IS NULL OR topic = ?2) ORDER BY id"
        return read_entries(self._db, where, (after, topic), limit, self._damaged)

    def partition_entries(self, topic: str, partition: int, after_seq: int, limit: int) -> list[StoredEntry]:
        """Up to ``limit`` entries of one partition behind ``after_seq``, oldest first. A damaged one is left out."""
        where = "topic = ? AND partition = ? AND seq > ? ORDER BY seq"
        return read_entries(self._db, where, (topic, partition, after_seq), limit, self._damaged)

    def command(self, command_id: str) -> CommandState | None:
        """What is remembered of this id."""
        row = self._db.execute("SELECT id, final, at_ns, motor FROM commands WHERE id = ?", (command_id,)).fetchone()
        return CommandState(row[0], bool(row[1]), row[2], row[3]) if row else None

    def unfinished_commands(self) -> list[CommandState]:
        """Commands that were written down and have no final outcome."""
        rows = self._db.execute("SELECT id, final, at_ns, motor FROM commands WHERE final = 0")
        return [CommandState(row[0], bool(row[1]), row[2], row[3]) for row in rows]

    def inbox(self, source: str) -> dict[int, int]:
        """{partition: next offset to read} of a source of commands."""
        return dict(self._db.execute("SELECT partition, next FROM inbox WHERE source = ?", (source,)))

    def newest_entries(self) -> dict[tuple[str, int], int]:
        """{(topic, partition): newest seq} of events and outcomes."""
        return newest_entries(self._db)

    def producer(self) -> ProducerState | None:
        """The producer's identity that was written down last."""
        bases = self._db.execute("SELECT topic, partition, base FROM bases").fetchall()
        for cluster, pid, epoch in self._db.execute("SELECT cluster, pid, epoch FROM producer"):
            return ProducerState(cluster, pid, epoch, {(topic, partition): base for topic, partition, base in bases})
        return None

    def published(self) -> dict[tuple[str, int], tuple[int, int]]:
        """{(topic, partition): (seq, row id)} that the broker has acknowledged."""
        rows = self._db.execute("SELECT topic, partition, seq, id FROM published").fetchall()
        return {(topic, partition): (seq, row) for topic, partition, seq, row in rows}

    def close(self) -> None:
        """Close the connection."""
        self._db.close()


def identity(path: Path) -> tuple[int, int] | None:
    """Which file a path leads to; None for none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def ends(db: sqlite3.Connection) -> tuple[int, int]:
    """Where the rows of telemetry begin (the first may be damaged), and the newest."""
    first = db.execute("SELECT value FROM sizes WHERE name = 'first row'").fetchone()[0]
    return first, db.execute("SELECT max(id) FROM telemetry").fetchone()[0] or 0


class Row(NamedTuple):
    """One row of telemetry, damaged (``records`` is None) or not. ``most``: how many records it may have held."""

    id: int
    records: Records | None
    most: int


UNKNOWN_MOST = 100_000  # a row that nothing is known of; far more than one commit holds


def read_rows(db: sqlite3.Connection, after: int, upto: int = 2**62, *, limit: int = -1) -> list[Row]:
    """Telemetry rows with ids in (after, upto], oldest first, ``limit`` at most (-1: all).

    Where SQLite cannot read a page of them, they are read one by one: only those that it hits count as damaged.
    """
    sql = "SELECT id, crc, records FROM telemetry WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"
    try:
        return [_row(*found) for found in db.execute(sql, (after, upto, limit)).fetchall()]
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
    first, last = ends(db)
    rows: list[Row] = []
    for number in range(max(after + 1, first), min(upto, last) + 1):
        try:
            found = db.execute("SELECT id, crc, records FROM telemetry WHERE id = ?", (number,)).fetchone()
            rows += [_row(*found)] if found else []
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            rows.append(Row(number, None, UNKNOWN_MOST))
        if len(rows) == limit:
            break
    return rows


def _row(number: int, crc: int, blob: object) -> Row:
    if not isinstance(blob, bytes):
        return Row(number, None, UNKNOWN_MOST)
    whole = zlib.crc32(blob) == crc and len(blob) % RECORD.itemsize == 0
    return Row(number, np.frombuffer(blob, RECORD) if whole else None, -(-len(blob) // RECORD.itemsize))


def batches_after(
    db: sqlite3.Connection,
    after: int,
    upto: int = 2**62,
    *,
    limit: int = -1,
    damaged: Callable[[Table, int], None] | None = None,
) -> Iterator[Batch]:
    """As ``read_rows``, without the damaged ones, which are logged. Empty only where there is nothing more to read."""
    found = False
    while not found and (rows := read_rows(db, after, upto, limit=limit)):
        for row in rows:
            if row.records is not None:
                found = True
                yield Batch(row.id, row.records)
                continue
            log.error("journal: telemetry row %d is damaged and left out", row.id)
            if damaged:
                damaged("telemetry", row.id)
        after = rows[-1].id


def read_entries(
    db: sqlite3.Connection,
    where: str,
    values: Sequence[object],
    limit: int,
    damaged: Callable[[Table, int], None] | None = None,
) -> list[StoredEntry]:
    """Up to ``limit`` (-1: all) of the entries ``where`` SQL says, without the damaged ones, which are logged."""
    crc = "crc" if db.execute("PRAGMA user_version").fetchone()[0] >= 3 else "NULL"
    columns = f"id, CAST(topic AS BLOB), partition, seq, at_ns, CAST(key AS BLOB), value, {crc}"
    found: list[StoredEntry] = []
    with contextlib.closing(db.execute(f"SELECT {columns} FROM entries WHERE {where}", values)) as rows:  # noqa: S608
        for *row, check in rows:
            if entry := _entry(row, check):
                found.append(entry)
                if len(found) == limit:
                    break
            elif check != TOLD:
                log.error("journal: entry %d is damaged and left out", row[0])
                if damaged:
                    damaged("entries", row[0])
    return found


def _entry(row: Sequence[Any], crc: object) -> StoredEntry | None:
    """An entry as it was read, topic and key as bytes; None if it is not what was written."""
    number, topic, partition, seq, at_ns, key, value = row
    try:
        entry = StoredEntry(number, topic.decode(), partition, seq, at_ns, key.decode(), value)
        return entry if crc is None or crc == _entry_crc(*entry) else None
    except (AttributeError, TypeError, UnicodeDecodeError):
        return None


def _entry_crc(number: int, topic: str, partition: int, seq: int, at_ns: int, key: str, value: bytes) -> int:
    return zlib.crc32(b"%d %s %d %d %d %s %b" % (number, topic.encode(), partition, seq, at_ns, key.encode(), value))


def newest_entries(db: sqlite3.Connection) -> dict[tuple[str, int], int]:
    """{(topic, partition): newest seq}, from one look into the index for each, however many entries there are."""
    found: dict[tuple[str, int], int] = {}
    topic = _first(db, "SELECT min(topic) FROM entries")
    while topic is not None:
        partition = _first(db, "SELECT min(partition) FROM entries WHERE topic = ?", topic)
        while partition is not None:
            at = (topic, partition)
            found[at] = _first(db, "SELECT max(seq) FROM entries WHERE topic = ? AND partition = ?", *at)
            partition = _first(db, "SELECT min(partition) FROM entries WHERE topic = ? AND partition > ?", *at)
        topic = _first(db, "SELECT min(topic) FROM entries WHERE topic > ?", topic)
    return found


def replayed_from(db: sqlite3.Connection) -> str | None:
    """The arm whose log this journal repeats; None for that of a gateway."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'replayed'").fetchone():
        return None
    return str(db.execute("SELECT source FROM replayed").fetchone()[0])


def _first(db: sqlite3.Connection, sql: str, *values: object) -> Any:
    return db.execute(sql, values).fetchone()[0]


def is_broken(error: sqlite3.Error) -> bool:
    """Whether SQLite says that the file is malformed or no database, which no later try heals."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def is_damage(error: sqlite3.Error) -> bool:
    """Whether what was read is damaged: the page makes no sense, or the disk cannot read it."""
    unreadable = {sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS}
    return is_broken(error) or getattr(error, "sqlite_errorcode", 0) in unreadable


def _entry_bytes(entry: StoredEntry) -> int:
    return len(entry.key.encode()) + len(entry.value) + ENTRY_BYTES


def _advance(heads: dict[int, Head], split: Split) -> None:
    for partition, mine in split.items():
        heads[partition] = Head(int(mine["seq"][-1]), int(mine["sampled_at_ns"][-1]))


def ranges(batches: Iterable[Records], behind: Mapping[int, int]) -> list[Lost]:
    """First and last sequence number of each partition in ``batches`` behind that of ``behind``."""
    ranges: dict[int, tuple[int, int]] = {}
    for records in batches:
        for partition, mine in by_partition(records):
            seqs = mine["seq"][mine["seq"] > behind.get(partition, 0)].tolist()
            if seqs:
                ranges[partition] = (ranges.get(partition, (seqs[0], 0))[0], seqs[-1])
    return [Lost(partition, *span) for partition, span in ranges.items()]
