"""Records a log into a directory: from where the recording there ends, in files of a bounded size.

    log --parts--> Collector --a chunk a second--> file, fsync --positions--> the next chunk, or the next recorder

How far it has come is in the recording alone, and the log keeps no positions: a recorder that was killed leaves at most
the beginning of a chunk that was never reported; the next one cuts it off and reads on from the last mark.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from gateway.journal_reader import JournalLog
from gateway.kafka_reader import KafkaLog
from gateway.log_reader import Key, LogError, LogReader, Missed, Position, Positions, Start
from gateway.recordings.file import RecordingFile, RecordingWriter
from gateway.recordings.reader import number_of, recordings
from gateway.recordings.recording import Collector

log = logging.getLogger(__name__)

FLUSH_S = 1.0
CHUNK_BYTES = 4 << 20  # unpacked
LEVEL = 3  # of zstd
RETRY_S = 1.0
FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class Recorder:
    """The one recorder of a directory: ``with Recorder(...) as recorder``, then ``record``."""

    def __init__(self, directory: Path, *, rotate_bytes: int, rotate_ns: int | None = None) -> None:
        """A file ends when it has ``rotate_bytes``, or spans ``rotate_ns`` of event time."""
        self.directory = directory
        self.records = self.bytes = 0
        """Written by this recorder."""
        self.newest_ns = 0
        """Event time of the newest record."""
        self._rotate_bytes = rotate_bytes
        self._rotate_ns = rotate_ns
        self._arm: str | None = None
        self._positions: dict[Key, Position] | None = None  # where the recording ends, if there is one
        self._file: RecordingWriter | None = None
        self._number = 0  # of the newest file
        self._stopping = False

    # -- what was recorded before --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Raises LogError if another recorder is at work here, or the directory cannot be used."""
        with contextlib.ExitStack() as undo:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                lock = undo.enter_context((self.directory / ".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._resume()
            except BlockingIOError:
                raise LogError(f"{self.directory}: another process records into this directory already") from None
            except OSError as error:
                raise LogError(f"{self.directory}: {error}") from error
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._undo:
            if self._file:
                self._file.close()

    def _resume(self) -> None:
        for path in reversed(recordings(self.directory)):
            number = number_of(path)
            self._number = max(self._number, number or 0)
            if number is None or self._positions is not None:
                continue
            with contextlib.ExitStack() as undo:
                try:
                    file = RecordingFile(path)
                except LogError:
                    _set_aside(path)
                    continue
                undo.callback(file.close)
                file.drop_half_written()
                if not file.groups:
                    _set_aside(path)
                elif file.own:
                    last = file.mark(file.groups[-1])
                    self._arm, self._positions = last.arm, last.positions()
                    if file.can_be_resumed():
                        self._file = RecordingWriter.resume(file)

    # -- recording -----------------------------------------------------------------------------------------------

    async def record(self, open_log: Callable[[Start], LogReader], start: Start) -> None:
        """Record until ``stop`` or the end of the log, from ``start`` or where the recording ends.

        Raises LogError, OSError.
        """
        reader = open_log(start if self._positions is None else self._positions)
        self._check_place(reader)
        async with reader:
            if self._arm not in {None, reader.arm}:
                raise LogError(f"{self.directory}: holds a recording of arm {self._arm}, not of {reader.arm}")
            self._arm = reader.arm
            if self._positions is None:  # where it begins outlives a kill, too
                self._positions = reader.positions()
                self._file = await self._create()
            await self._copy(reader)
            if self._file:
                await self._patiently(self._file.finish)
                self._file = None

    def stop(self) -> None:
        """Make ``record`` write what it has, finish the file and return, within about FLUSH_S."""
        self._stopping = True

    def _check_place(self, reader: LogReader) -> None:
        streams = {at.stream for at in (self._positions or {}).values()}
        if (isinstance(reader, KafkaLog) and streams - {0}) or (isinstance(reader, JournalLog) and 0 in streams):
            found = "journal" if streams - {0} else "topics in Kafka"
            raise LogError(f"{self.directory}: holds a recording of the {found}; use another directory for this one")

    async def _copy(self, reader: LogReader) -> None:
        now = asyncio.get_running_loop().time
        more = True
        while more:
            collector, due = Collector(), now() + FLUSH_S
            while more and collector.size < CHUNK_BYTES and now() < due:
                wait = asyncio.timeout_at(due)
                try:
                    async with wait:
                        part = await anext(reader)
                except TimeoutError:
                    if not wait.expired():
                        raise
                except StopAsyncIteration:
                    more = False
                else:
                    collector.add(part)
                    if isinstance(part, Missed):
                        log.warning("%s", part)
                more = more and not self._stopping
            await self._write(collector, reader.positions())

    async def _write(self, collector: Collector, after: Positions) -> None:
        assert self._positions is not None  # noqa: S101  set when it began
        if not collector and all(self._positions.get(key) == at for key, at in after.items()):
            return
        file = self._file = self._file or await self._create()
        packed = await asyncio.to_thread(collector.pack, file.channels, LEVEL)
        size = file.size
        await self._patiently(lambda: file.append(packed, after))
        self._positions = file.positions
        self.bytes += file.size - size
        self.records += sum(len(index) for index in packed.messages.values())
        self.newest_ns = max(self.newest_ns, packed.chunk.message_end_time)
        if file.size >= self._rotate_bytes or (self._rotate_ns and file.span_ns >= self._rotate_ns):
            await self._patiently(file.finish)
            self._file = None

    async def _create(self) -> RecordingWriter:
        self._number += 1
        path = self.directory / f"{self._arm}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{self._number}.mcap"
        return await self._patiently(lambda: RecordingWriter(path, str(self._arm), self._positions or {}))

    async def _patiently(self, call: Callable[[], T]) -> T:
        """What ``call`` returns, when the disk has room for it. Raises OSError for anything else."""
        told = False
        while True:
            try:
                return await asyncio.to_thread(call)
            except OSError as error:
                if error.errno not in FULL or self._stopping:
                    raise OSError(
                        error.errno, f"{error.strerror}; what was reported can be read", str(self.directory)
                    ) from error
                if not told:
                    log.error("%s: %s; recording goes on when there is room", self.directory, error.strerror)
                told = True
                await asyncio.sleep(RETRY_S)


def _set_aside(path: Path) -> None:
    """Nothing in it was ever reported written; whatever it is, it is kept."""
    log.warning("recording %s: holds nothing that can be read, and is set aside as %s.torn", path, path.name)
    path.rename(path.with_name(f"{path.name}.torn"))
