"""The log in the journal of this machine, read as ``docs/log.md`` says: read-only, in short reads, by a thread apart.

A journal that was set aside while it was read is finished first, then its successor is read from the beginning; the
same where a reader comes back after that. A slow or hanging disk delays this reader's thread only.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gateway.aside import set_aside_before
from gateway.cursor import Cursor
from gateway.journal import BUSY_S, identity, is_broken, newest_entries, read_entries, read_rows, replayed_from
from gateway.log_reader import (
    Entries,
    Key,
    LogEntry,
    LogError,
    LogReader,
    Missed,
    Part,
    Position,
    Positions,
    Samples,
    Seq,
    Start,
    Time,
    Topic,
)
from gateway.state_dir import StateDir
from gateway.telemetry import RECORD, Records, by_partition

POLL_S = 0.01
READ_BYTES = 1 << 20  # of telemetry in one read, or little more
READ_ROWS = 256  # in one transaction, at most
READ_ENTRIES = 1000
GONE = "not in the journal, or not any more"

T = TypeVar("T")


class Ends(NamedTuple):
    """What a journal held at some moment: its newest ids, and each partition's next offset."""

    stream: int
    row: int
    entry: int
    offsets: dict[Key, int]


class JournalFile:
    """One journal file, open for reading; each call is one short read and holds nothing afterwards."""

    def __init__(self, path: Path) -> None:
        """Raises LogError if there is no journal at ``path``."""
        self._limit = 1  # rows in one transaction: as many as make READ_BYTES
        self.identity = identity(path)
        if self.identity is None:
            raise LogError(f"journal {path}: there is none (has the gateway run with this state_dir?)")
        with ExitStack() as undo:
            try:
                self._db = sqlite3.connect(
                    f"file:{path}?mode=ro", uri=True, check_same_thread=False, timeout=BUSY_S, isolation_level=None
                )
                undo.callback(self._db.close)
                stream, self.arm = self._db.execute("SELECT stream, arm FROM stream").fetchone()
                self.stream = int.from_bytes(stream, "little")
                self.replayed = replayed_from(self._db)
                self.read_motors()
            except sqlite3.Error as error:
                raise LogError(f"journal {path}: {error}") from error
            undo.pop_all()

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """One state of the journal for several reads."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    def read_motors(self) -> dict[int, str]:
        """{partition: name} of every motor that the journal has known; a new one may come any time."""
        self.motors: dict[int, str] = dict(self._db.execute("SELECT partition, name FROM motors"))
        return self.motors

    def newest(self) -> tuple[int, int]:
        """Ids of the newest row of telemetry and the newest entry; 0 where there is none."""
        sql = "SELECT coalesce((SELECT max(id) FROM telemetry), 0), coalesce((SELECT max(id) FROM entries), 0)"
        row, entry = self._db.execute(sql).fetchone()
        return row, entry

    def ends(self) -> Ends:
        """Where the log ends. The heads that the writer saves now and then spare reading it all."""
        with self._snapshot():
            row, entry = self.newest()
            offsets: dict[Key, int] = {("telemetry", partition): 0 for partition in self.motors}
            since = 0
            for partition, seq, at in self._db.execute("SELECT partition, seq, telemetry_id FROM heads"):
                offsets["telemetry", partition] = seq
                since = max(since, at)
            while since < row:
                since, records = self.telemetry(since, row)
                for partition, mine in by_partition(records):
                    offsets["telemetry", partition] = int(mine["seq"][-1])
            offsets |= cast(dict[Key, int], newest_entries(self._db))
        return Ends(self.stream, row, entry, offsets)

    def telemetry(self, after: int, upto: int) -> tuple[int, Records]:
        """Records of the rows in (after, upto], about READ_BYTES of them, and the last row; without damaged rows."""
        blobs: list[memoryview] = []
        size = 0
        while size < READ_BYTES and (rows := read_rows(self._db, after, upto, limit=self._limit)):
            after = rows[-1].id
            found = [row.records.data for row in rows if row.records is not None]
            read = sum(blob.nbytes for blob in found)
            self._limit = max(1, min(READ_ROWS, READ_BYTES * len(rows) // (read + 1)))  # rows as large as these
            blobs += found
            size += read
        # np.concatenate would compare the fields of every array first, and take a hundred times as long
        return after if size >= READ_BYTES else upto, np.frombuffer(b"".join(blobs), RECORD)

    def locate(self, partition: int, field: Literal["seq", "sampled_at_ns"], least: int, upto: int) -> tuple[int, int]:
        """(row, offset) of a partition's first record whose ``field`` is ``least`` or more; row ``upto`` + 1 for none.

        Halves the rows up to ``upto``; where the motor has no samples, it looks on at the next that has.
        """
        first = self._db.execute("SELECT min(id) FROM telemetry").fetchone()[0] or 1
        end = upto + 1
        while first < end:
            middle = (first + end) // 2
            found = self._first_of(partition, middle - 1, end - 1)
            if found is None or found[1][field][-1] >= least:
                end = middle
            else:
                first = found[0] + 1
        found = self._first_of(partition, first - 1, upto)
        if found is None:
            return upto + 1, 0
        row, mine = found
        return row, int(mine["seq"][np.argmax(mine[field] >= least)]) - 1

    def _first_of(self, partition: int, after: int, upto: int) -> tuple[int, Records] | None:
        """The first row in (after, upto] that has samples of ``partition``, and these."""
        limit = 1  # mostly the first has
        while rows := read_rows(self._db, after, upto, limit=limit):
            for row, records, _ in rows:
                if records is not None and len(mine := records[records["partition"] == partition]):
                    return row, mine
            after, limit = rows[-1].id, min(4 * limit, 256)
        return None

    def entries(self, topics: Sequence[Topic], after: int, upto: int) -> list[tuple[int, Topic, int, LogEntry]]:
        """Up to READ_ENTRIES in (after, upto]: id, topic, partition, and the entry itself."""
        where = f"id > ? AND id <= ? AND topic IN ({', '.join('?' * len(topics))}) ORDER BY id"
        return [
            (row, cast(Topic, topic), partition, LogEntry(seq - 1, self.stream, seq, at_ns, key, value))
            for row, topic, partition, seq, at_ns, key, value in read_entries(
                self._db, where, (after, upto, *topics), READ_ENTRIES
            )
        ]

    def entry_at(self, topic: Topic, partition: int, offset: int) -> int:
        """The id of a partition's first entry at ``offset`` or behind it; there must be one."""
        sql = "SELECT id FROM entries WHERE topic = ? AND partition = ? AND seq > ? ORDER BY seq LIMIT 1"
        row: int = self._db.execute(sql, (topic, partition, offset)).fetchone()[0]
        return row

    def offset_at(self, key: Key, at_ns: int, upto: int) -> int | None:
        """The offset of a partition's first record of this time or later; telemetry in rows up to ``upto``."""
        topic, partition = key
        if topic == "telemetry":
            row, offset = self.locate(partition, "sampled_at_ns", at_ns, upto)
            return offset if row <= upto else None
        sql = "SELECT seq FROM entries WHERE topic = ? AND partition = ? AND at_ns >= ? ORDER BY seq LIMIT 1"
        found = self._db.execute(sql, (topic, partition, at_ns)).fetchone()
        return found[0] - 1 if found else None

    def close(self) -> None:
        """Close it."""
        self._db.close()


class JournalLog(LogReader):
    """Reads the journal in a state directory; positions are kept in its ``cursors/``. Or one journal file alone."""

    def __init__(
        self,
        place: StateDir | Path,
        topics: Sequence[Topic],
        start: Start = "end",
        *,
        follow: bool,
        name: str | None = None,
    ) -> None:
        """Raises LogError for the commands topic, which the journal has not, and for a name that cannot be one."""
        super().__init__(topics, start, follow=follow, name=name)
        if "commands" in topics:
            raise LogError("the journal keeps no commands: read them from Kafka")
        self._alone = isinstance(place, Path)
        if isinstance(place, Path) and name is not None:
            raise LogError(f"reader {name!r}: a journal file alone keeps no positions; name the arm's configuration")
        self._path = place if isinstance(place, Path) else place.journal
        self._cursors = self._path.parent / "cursors"
        self._cursor: Cursor | None = None
        # alone uses the file, also after a read was cancelled
        self._thread = ThreadPoolExecutor(1, "journal-reader")
        self._file: JournalFile | None = None
        self._row = self._entry = 0  # read up to here
        self._end: Ends | None = None  # of the file, where reading does not follow

    async def _do(self, call: Callable[..., T], *values: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *values)

    async def __aenter__(self) -> Self:
        try:
            await self._do(self._begin)
        except BaseException as error:
            await self._do(self._close)
            if isinstance(error, sqlite3.Error):
                raise LogError(f"journal {self._path}: {error}") from error
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._do(self._close)

    def _close(self) -> None:
        if self._file:
            self._file.close()
        if self._cursor:
            self._cursor.close()
        self._thread.shutdown(wait=False)

    async def commit(self, positions: Positions | None = None) -> None:
        if self._cursor is None:
            raise LogError("a reader without a name keeps no positions")
        await self._do(self._cursor.save, self._position | dict(positions or {}))

    # -- where to begin ------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        given = self._given()
        journals = [self._path] if self._alone else journal_files(self._path)
        self._file, gone = _open_first(journals, {position.stream for position in given.values()})
        file = self._file
        self._position = {key: at for key, at in given.items() if at.stream not in gone}
        self._due = set(self._position)
        ends = file.ends()
        keys = [key for key in ends.offsets if key[0] in self._topics and key not in self._position]
        for key in keys:
            self._position[key] = Position(file.stream, 0 if given else self._offset(file, key, ends))
        if self._start == "end" and not given:
            self._due |= set(keys)
        self._enter(file, ends)
        self._tell_gone(
            {key: at for key, at in given.items() if at.stream in gone}, "the journal of that stream is gone"
        )

    def _given(self) -> dict[Key, Position]:
        """Positions to go on from: the caller's, or those that this name has left."""
        given: Positions = {}
        if self._name is not None:
            self._cursor = Cursor(self._cursors, self._name)
            given = self._cursor.load()
        if not isinstance(self._start, str | Seq | Time):
            given = self._start
        return {key: position for key, position in given.items() if key[0] in self._topics}

    def _offset(self, file: JournalFile, key: Key, ends: Ends) -> int:
        """Where a partition begins."""
        match self._start:
            case Seq(seq):
                return seq - 1
            case Time(at_ns):
                found = file.offset_at(key, at_ns, ends.row)
                return ends.offsets[key] if found is None else found
            case "end":
                return ends.offsets[key]
        return 0

    def _enter(self, file: JournalFile, ends: Ends) -> None:
        """Go on in ``file``, at the first of what the positions ask for."""
        rows, entries = [ends.row], [ends.entry]
        for (topic, partition), at in self._position.items():
            if at.stream == file.stream and at.offset < ends.offsets.get((topic, partition), 0):
                if topic == "telemetry":
                    rows.append(file.locate(partition, "seq", at.offset + 1, ends.row)[0] - 1)
                else:
                    entries.append(file.entry_at(topic, partition, at.offset) - 1)
        if self._file and self._file is not file:
            self._file.close()
        self._file, self._row, self._entry = file, min(rows), min(entries)
        self.arm = file.arm
        self._end = None if self._follow else ends
        self._ends = {} if self._follow else {key: at for key, at in ends.offsets.items() if key[0] in self._topics}

    # -- reading -------------------------------------------------------------------------------------------------

    async def _read(self) -> Sequence[Part]:
        while True:
            parts, self._row, self._entry, more = await self._do(self._read_some)
            if parts or self._parts:
                return parts
            if not more:
                if not self._follow:
                    raise StopAsyncIteration
                await asyncio.sleep(POLL_S)

    def _read_some(self) -> tuple[list[Part], int, int, bool]:
        """Parts, the row and entry that they reach, and whether there is more to read at once.

        Changes nothing unless it goes over to another file, so that a read which was cancelled does no harm.
        """
        file, row, entry = self._file, self._row, self._entry
        assert file  # noqa: S101  entered
        aside = self._successor(file)  # before the last look: what is aside does not grow
        parts: list[Part] = []
        try:
            upto = (self._end.row, self._end.entry) if self._end else file.newest()
            if "telemetry" in self._topics and row < upto[0]:
                row, records = file.telemetry(row, upto[0])
                parts += self._samples(file, records)
            if (topics := [topic for topic in self._topics if topic != "telemetry"]) and entry < upto[1]:
                found = file.entries(topics, entry, upto[1])
                entry = found[-1][0] if len(found) == READ_ENTRIES else upto[1]
                parts += self._entries(file, found)
        except sqlite3.Error as error:
            if not (aside and is_broken(error)):
                raise LogError(f"journal {self._path}: {error}") from error
            unread = dict(self._position)
            if more := self._go_over(aside):
                self._tell_gone(unread, str(error))
            return [], self._row, self._entry, more
        more = (row, entry) != (self._row, self._entry)
        if not (more or parts) and self._end:
            parts = self._never_came(self._end)
        if not (more or parts) and aside:
            more = self._go_over(aside)
            return [], self._row, self._entry, more
        return parts, row, entry, more

    def _samples(self, file: JournalFile, records: Records) -> Iterator[Part]:
        for partition, mine in by_partition(records):
            offsets = mine["seq"].astype(np.int64) - 1
            motor = file.motors.get(partition) or file.read_motors().get(partition, str(partition))
            for part in self._runs(file, ("telemetry", partition), offsets):
                if isinstance(part, Missed):
                    yield part
                else:
                    after = Position(file.stream, int(offsets[part.stop - 1]) + 1)
                    yield Samples(partition, motor, offsets[part], mine[part], after)

    def _entries(self, file: JournalFile, found: Sequence[tuple[int, Topic, int, LogEntry]]) -> Iterator[Part]:
        split: dict[Key, list[LogEntry]] = {}
        for _, topic, partition, entry in found:
            split.setdefault((topic, partition), []).append(entry)
        for key, entries in split.items():
            for part in self._runs(file, key, np.array([entry.offset for entry in entries], np.int64)):
                if isinstance(part, Missed):
                    yield part
                else:
                    yield Entries(*key, entries[part], Position(file.stream, entries[part.stop - 1].offset + 1))

    def _runs(self, file: JournalFile, key: Key, offsets: NDArray[np.int64]) -> Iterator[slice | Missed]:
        """What of ascending ``offsets`` this reader has not had: runs without a hole, and the holes."""
        at = self._position.get(key, Position(file.stream, 0))
        first = int(np.searchsorted(offsets, at.offset))
        if at.stream != file.stream or first == len(offsets):
            return
        due = at.offset if key in self._due else int(offsets[first])
        edges = [first, *(np.flatnonzero(np.diff(offsets[first:]) > 1) + first + 1).tolist(), len(offsets)]
        for start, stop in pairwise(edges):
            if (found := int(offsets[start])) > due:
                yield Missed(*key, file.stream, due, found - 1, GONE, Position(file.stream, found))
            yield slice(start, stop)
            due = int(offsets[stop - 1]) + 1

    def _never_came(self, end: Ends) -> list[Part]:
        """What was there when the reading began, is due, and has nothing behind it that would show the hole."""
        return [
            Missed(*key, at.stream, at.offset, end.offsets[key] - 1, GONE, at._replace(offset=end.offsets[key]))
            for key, at in self._position.items()
            if key in self._due and at.stream == end.stream and at.offset < end.offsets.get(key, 0)
        ]

    # -- a journal that was set aside ----------------------------------------------------------------------------

    def _successor(self, file: JournalFile) -> list[Path]:
        """Where the log goes on if ``file`` was set aside: the next that can be read is the one."""
        if self._alone or identity(self._path) in {file.identity, None}:
            return []
        journals = journal_files(self._path)
        identities = [identity(path) for path in journals]
        return journals[identities.index(file.identity) + 1 :] if file.identity in identities else [self._path]

    def _go_over(self, paths: Sequence[Path]) -> bool:
        """Go on in the first of ``paths`` that can be read, from its beginning; False if none can yet."""
        for path in paths:
            with suppress(LogError, sqlite3.Error):
                file = JournalFile(path)
                ends = file.ends()
                for key in {*self._position, *(key for key in ends.offsets if key[0] in self._topics)}:
                    if key not in self._position or self._position[key].stream != file.stream:
                        self._position[key] = Position(file.stream, 0)
                self._due |= self._position.keys()
                self._enter(file, ends)
                return True
        return False

    def _tell_gone(self, unread: Positions, why: str) -> None:
        assert self._file  # noqa: S101  entered
        began = Position(self._file.stream, 0)
        for key, at in unread.items():
            if at.stream != self._file.stream:
                self._parts.append(Missed(*key, at.stream, at.offset, None, why, began))


def journal_files(path: Path) -> list[Path]:
    """The journal and those set aside before it, oldest first."""
    return [*set_aside_before(path), path]


def _open_first(paths: Sequence[Path], streams: Collection[int]) -> tuple[JournalFile, set[int]]:
    """The first journal that has one of ``streams``, else the last of all, and those of ``streams`` that none has.

    Raises LogError if the last cannot be opened.
    """
    first = None
    gone = set(streams)
    for path in paths[:-1] if gone else ():
        with suppress(LogError):
            file = JournalFile(path)
            if file.stream in gone and first is None:
                first = file
            else:
                file.close()
            gone.discard(file.stream)
    last = JournalFile(paths[-1])
    gone.discard(last.stream)
    if first is None:
        return last, gone
    last.close()
    return first, gone
