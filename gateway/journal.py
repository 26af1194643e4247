"""The journal: the embedded log of one arm, an SQLite file in WAL mode. Storage only; no threads, no clocks.

    telemetry   one row a batch: records of all motors as they were stamped (dtype RECORD), with a checksum
    entries     events and outcomes: one row a record, numbered per topic and partition
    commands    the memory of command ids and what became of each
    heads       newest record of each motor, as of some row; what follows that row is read again at the start
    published   how far the broker has acknowledged

One process writes (the gateway, held to it by ``gateway.state_dir``), any number read. A telemetry record's offset in
its partition is ``seq - 1``: a journal holds one stream, and its identity is the stream's.
"""

import contextlib
import logging
import secrets
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gateway.stamp import Head
from gateway.telemetry import RECORD, Records, by_partition

log = logging.getLogger(__name__)

APPLICATION_ID = 0x53475731  # "SGW1"
VERSION = 1
_TRIM_ROWS = 5_000  # a second's worth and more, so that trimming once a second keeps up
IDS_KEPT = 1_000_000  # command ids; about 100 MB, and a repeated id is known as long
ENTRIES_KEPT = 100_000  # per topic and partition; events outlive the telemetry around them

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


class JournalError(Exception):
    """The journal does not fit the configuration, or is none."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A record of the events or outcomes topic; ``key`` is the motor's name or ``*``."""

    topic: str
    partition: int
    key: str
    value: bytes
    at_ns: int


class StoredEntry(NamedTuple):
    """An entry as the journal holds it: ``seq`` counts 1, 2, 3, ... per topic and partition."""

    id: int
    topic: str
    partition: int
    seq: int
    at_ns: int
    key: str
    value: bytes


class Batch(NamedTuple):
    """One row of telemetry."""

    id: int
    records: Records


class CommandState(NamedTuple):
    """What is remembered of a command id."""

    id: str
    final: bool
    at_ns: int
    motor: str


@dataclass(slots=True)
class Changes:
    """Everything that one commit writes."""

    telemetry: Records | None = None
    entries: list[Entry] = field(default_factory=list)
    commands: list[CommandState] = field(default_factory=list)
    inbox: dict[tuple[str, int], int] = field(default_factory=dict)  # (source, partition) -> next to read
    published: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # (topic, partition) -> seq, id


class Lost(NamedTuple):
    """Records removed before anybody acknowledged them: sequence numbers from..to of a partition."""

    partition: int
    from_seq: int
    to_seq: int


class Journal:
    """The writer's side."""

    def __init__(self, path: Path, arm: str, motors: Mapping[int, str], max_bytes: int) -> None:
        """Open or create. Raises JournalError if it belongs to another arm or its motors sit on other partitions.

        A file that SQLite cannot read is set aside under a new name, never deleted, and a new stream begins.
        """
        self._max_bytes = max_bytes
        self.path = path
        try:
            self._recover(path, arm, motors)
        except sqlite3.OperationalError as error:
            raise JournalError(f"journal {path}: {error}") from error
        except sqlite3.DatabaseError as error:
            set_aside(path, f"cannot be read ({error})")
            self._recover(path, arm, motors)

    def _recover(self, path: Path, arm: str, motors: Mapping[int, str]) -> None:
        self._db = self._open(path, arm)
        with contextlib.ExitStack() as undo:
            undo.callback(self._db.close)
            self.stream = int.from_bytes(self._one("SELECT stream FROM stream"), "little")
            self._check_motors(motors)
            self.heads = self._recover_heads(motors)
            undo.pop_all()

    def _open(self, path: Path, arm: str) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2.0)
        with contextlib.ExitStack() as undo:
            undo.callback(db.close)
            db.execute("PRAGMA journal_mode = WAL")
            # survives a killed process with every commit, a power cut up to the last checkpoint
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(f"PRAGMA journal_size_limit = {64 << 20}")
            if not db.execute("PRAGMA user_version").fetchone()[0]:
                self._create(db, arm)
            found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
            if found != [APPLICATION_ID, VERSION]:
                raise JournalError(f"journal {path}: not a journal of this version (found {found})")
            holder = db.execute("SELECT arm FROM stream").fetchone()[0]
            if holder != arm:
                raise JournalError(f"journal {path}: belongs to arm {holder!r}, not {arm!r}: use another state_dir")
            undo.pop_all()
        return db

    @staticmethod
    def _create(db: sqlite3.Connection, arm: str) -> None:
        stream = secrets.randbits(53).to_bytes(8, "little")  # 53 bits: whole in every JSON reader
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}")
        db.execute("INSERT INTO stream VALUES (0, ?, ?)", (stream, arm))
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")

    def _one(self, sql: str, *values: object) -> bytes:
        row: bytes = self._db.execute(sql, values).fetchone()[0]
        return row

    def _check_motors(self, motors: Mapping[int, str]) -> None:
        known: dict[int, str] = dict(self._db.execute("SELECT partition, name FROM motors"))
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
        self._db.executemany("INSERT OR IGNORE INTO motors VALUES (?, ?)", motors.items())

    def _recover_heads(self, motors: Mapping[int, str]) -> dict[int, Head]:
        heads = {partition: Head(0, 0) for partition in motors}
        since = 0
        for partition, seq, at_ns, row in self._db.execute("SELECT * FROM heads"):
            heads[partition] = Head(seq, at_ns)
            since = max(since, row)
        for batch in batches_after(self._db, since):
            _advance(heads, batch.records)
        return heads

    def commit(self, changes: Changes) -> int | None:
        """Write ``changes`` in one transaction; the id of the telemetry row, if there was one.

        Raises sqlite3.Error and has written nothing: try again, the same changes are still good.
        """
        with self._transaction():
            row = self._write(changes)
        if changes.telemetry is not None:
            _advance(self.heads, changes.telemetry)
        return row

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _write(self, changes: Changes) -> int | None:
        execute, many = self._db.execute, self._db.executemany
        row = None
        if changes.telemetry is not None:
            blob = changes.telemetry.tobytes()
            row = execute("INSERT INTO telemetry (crc, records) VALUES (?, ?)", (zlib.crc32(blob), blob)).lastrowid
        for entry in changes.entries:
            execute(
                "INSERT INTO entries (topic, partition, seq, at_ns, key, value) SELECT ?1, ?2, "
                "coalesce((SELECT max(seq) FROM entries WHERE topic = ?1 AND partition = ?2), 0) + 1, ?3, ?4, ?5",
                (entry.topic, entry.partition, entry.at_ns, entry.key, entry.value),
            )
        if changes.commands:
            many("INSERT OR REPLACE INTO commands (id, final, at_ns, motor) VALUES (?, ?, ?, ?)", changes.commands)
        if changes.inbox:
            many("INSERT OR REPLACE INTO inbox VALUES (?, ?, ?)", [(*at, n) for at, n in changes.inbox.items()])
        if changes.published:
            rows = [(*at, *upto) for at, upto in changes.published.items()]
            many("INSERT OR REPLACE INTO published VALUES (?, ?, ?, ?)", rows)
        return row

    def save_heads(self) -> None:
        """Write down the heads, so that the next start reads only what comes after: once a second is enough.

        Forgets the oldest command ids beyond IDS_KEPT, too.
        """
        newest = self._db.execute("SELECT max(id) FROM telemetry").fetchone()[0] or 0
        rows = [(partition, *head, newest) for partition, head in self.heads.items()]
        with self._transaction():  # all or none: the start reads on behind the newest of these rows
            self._db.executemany("INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?)", rows)
            self._db.execute(
                "DELETE FROM commands WHERE final = 1 AND number <= (SELECT max(number) FROM commands) - ?", (IDS_KEPT,)
            )

    def trim(self, *, published: bool) -> list[Lost]:
        """Hold the size: remove the oldest batches when it nears the bound, acknowledged or not.

        ``published``: whether batches have to be acknowledged by a broker at all. Returns what was removed without.
        """
        used_bytes = self._used_bytes()
        if used_bytes <= self._max_bytes:
            return []
        first, last = self._db.execute("SELECT min(id), max(id) FROM telemetry").fetchone()
        if first == last:  # the newest row stays: ids go on from it
            return []
        surplus = 1 - 0.98 * self._max_bytes / used_bytes
        upto = min(first + round((last - first) * surplus), first + _TRIM_ROWS, last - 1)
        lost = self._unacknowledged(first - 1, upto) if published else []
        self._db.execute("DELETE FROM telemetry WHERE id <= ?", (upto,))
        self._db.execute(
            "DELETE FROM entries WHERE EXISTS (SELECT 1 FROM entries AS newer WHERE newer.topic = entries.topic"
            " AND newer.partition = entries.partition AND newer.seq = entries.seq + ?)",
            (ENTRIES_KEPT,),
        )
        return lost

    def _unacknowledged(self, after: int, upto: int) -> list[Lost]:
        """What the rows in (after, upto] hold that the broker has not acknowledged."""
        sql = "SELECT partition, seq, id FROM published WHERE topic = 'telemetry'"
        published = {partition: (seq, row) for partition, seq, row in self._db.execute(sql)}
        behind = [
            published.get(partition, (0, 0))
            for partition, head in self.heads.items()
            if published.get(partition, (0, 0))[0] < head.seq
        ]
        if not behind:
            return []
        seqs = {partition: seq for partition, (seq, _) in published.items()}
        after = max(after, min(row for _, row in behind))
        return _ranges((batch.records for batch in batches_after(self._db, after, upto)), seqs)

    def _used_bytes(self) -> int:
        pages, free, page_size = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        used: int = (pages - free) * page_size
        return used

    def close(self) -> None:
        """Save the heads, fold the WAL into the file, close."""
        with contextlib.suppress(sqlite3.Error):
            self.save_heads()
        self._db.close()


class JournalReader:
    """A reader's side: a connection of its own, read-only. Short transactions: it never holds the writer up."""

    def __init__(self, path: Path) -> None:
        """Raises JournalError if there is no journal at ``path``."""
        if not path.exists():
            raise JournalError(f"journal {path}: there is none (has the gateway run with this state_dir?)")
        try:
            self._db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False, timeout=2.0)
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
        return list(batches_after(self._db, after, limit=limit))

    def entries(self, after: int, limit: int, topic: str | None = None) -> list[StoredEntry]:
        """Up to ``limit`` events and outcomes behind entry ``after``, oldest first."""
        rows = self._db.execute(
            "SELECT id, topic, partition, seq, at_ns, key, value FROM entries WHERE id > ?1 AND (?2 IS NULL"
            " OR topic = ?2) ORDER BY id LIMIT ?3",
            (after, topic, limit),
        ).fetchall()
        return [StoredEntry(*row) for row in rows]

    def partition_entries(self, topic: str, partition: int, after_seq: int, limit: int) -> list[StoredEntry]:
        """Up to ``limit`` entries of one partition behind ``after_seq``, oldest first."""
        rows = self._db.execute(
            "SELECT id, topic, partition, seq, at_ns, key, value FROM entries WHERE topic = ? AND partition = ?"
            " AND seq > ? ORDER BY seq LIMIT ?",
            (topic, partition, after_seq, limit),
        ).fetchall()
        return [StoredEntry(*row) for row in rows]

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
        rows = self._db.execute("SELECT topic, partition, max(seq) FROM entries GROUP BY topic, partition").fetchall()
        return {(topic, partition): seq for topic, partition, seq in rows}

    def published(self) -> dict[tuple[str, int], tuple[int, int]]:
        """{(topic, partition): (seq, row id)} that the broker has acknowledged."""
        rows = self._db.execute("SELECT topic, partition, seq, id FROM published").fetchall()
        return {(topic, partition): (seq, row) for topic, partition, seq, row in rows}

    def close(self) -> None:
        """Close the connection."""
        self._db.close()


def batches_after(db: sqlite3.Connection, after: int, upto: int = 2**62, *, limit: int = -1) -> Iterator[Batch]:
    """Telemetry rows with ids in (after, upto], decoded; rows whose checksum is wrong are logged and left out."""
    sql = "SELECT id, crc, records FROM telemetry WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"
    for row, crc, blob in db.execute(sql, (after, upto, limit)).fetchall():
        if zlib.crc32(blob) != crc or len(blob) % RECORD.itemsize:
            log.error("journal: telemetry row %d is damaged and left out", row)
        else:
            yield Batch(row, np.frombuffer(blob, RECORD))


def _advance(heads: dict[int, Head], records: Records) -> None:
    for partition, mine in by_partition(records):
        heads[partition] = Head(int(mine["seq"][-1]), int(mine["sampled_at_ns"][-1]))


def _ranges(batches: Iterable[Records], behind: Mapping[int, int]) -> list[Lost]:
    """First and last sequence number of each partition in ``batches`` behind that of ``behind``."""
    ranges: dict[int, tuple[int, int]] = {}
    for records in batches:
        for partition, mine in by_partition(records):
            seqs = mine["seq"][mine["seq"] > behind.get(partition, 0)].tolist()
            if seqs:
                ranges[partition] = (ranges.get(partition, (seqs[0], 0))[0], seqs[-1])
    return [Lost(partition, *span) for partition, span in ranges.items()]


def set_aside(path: Path, why: str) -> Path:
    """Rename a journal (and its WAL files) to a name that is free, so that a new stream begins. Never deletes one."""
    number = next(n for n in range(1, 10_000) if not path.with_suffix(f".aside-{n}").exists())
    aside = path.with_suffix(f".aside-{number}")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    log.error("journal %s %s: set aside as %s, a new stream begins", path, why, aside)
    return aside
