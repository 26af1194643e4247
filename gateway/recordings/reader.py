"""The log in a recording: a file or a directory of them, also torn, damaged, or written by another program.

A recording gives the same parts, offsets and positions as the log that was recorded. It does not grow for its readers:
what is there when it is entered is read. Of a foreign file those channels are read that have schemas of ours.
"""

import asyncio
import logging
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from gateway.log_reader import (
    Entries,
    Key,
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
from gateway.recordings import foreign
from gateway.recordings.file import BROKEN, Group, RecordingFile
from gateway.recordings.recording import LIBRARY, MAGIC, Hole, Mark, Run, decode_run

log = logging.getLogger(__name__)

GONE = "not in the recording"

_NUMBERED = re.compile(r"-[0-9]{8}T[0-9]{6}Z-([0-9]+)$")

T = TypeVar("T")


def recordings(directory: Path) -> list[Path]:
    """The files of a directory, in the order in which they were recorded (``<arm>-<UTC time>-<n>.mcap``)."""
    return sorted(directory.glob("*.mcap"), key=lambda path: (path.stem.rsplit("-", 2)[0], number_of(path) or 0, path))


def number_of(path: Path) -> int | None:
    """Which file of a recording it is, by its name; None for another name."""
    found = _NUMBERED.search(path.stem)
    return int(found[1]) if found else None


class RecordingLog(LogReader):
    """Reads a recording. It cannot be followed, and keeps no positions for a name."""

    def __init__(
        self,
        path: Path,
        topics: Sequence[Topic],
        start: Start = "beginning",
        *,
        follow: bool = False,
        name: str | None = None,
    ) -> None:
        """Raises LogError for ``follow`` and for a name."""
        super().__init__(topics, start, follow=follow, name=name)
        if follow or name is not None:
            raise LogError(
                f"recording {path}: does not grow for a reader (--no-follow), and keeps no positions for a name"
            )
        self._path = path
        # alone uses the files, also after a read was cancelled
        self._thread = ThreadPoolExecutor(1, "recording-reader")
        self._ahead: deque[Path | RecordingFile] = deque()  # behind the open file
        self._file: RecordingFile | None = None
        self._at = 0  # the next of its groups
        self._link: dict[Key, Position] = {}  # of the recorder, behind what was read
        self._begun: set[Key] = set()  # what comes of these is wanted
        self._seen: set[Key] = set()  # the stream of the given position has come
        self._newest: dict[Key, int] = {}  # the stream in which a number is looked for

    async def _do(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def __aenter__(self) -> Self:
        try:
            await self._do(self._begin)
        except BaseException:
            await self._do(self._close)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._do(self._close)

    def _close(self) -> None:
        for file in (self._file, *self._ahead):
            if isinstance(file, RecordingFile):
                file.close()
        self._thread.shutdown(wait=False)

    async def commit(self, positions: Positions | None = None) -> None:  # noqa: ARG002  there are no names
        """Raises LogError."""
        raise LogError("a reader without a name keeps no positions")

    # -- where to begin ------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        try:
            paths = [path for path in recordings(self._path) if _is_mcap(path)] if self._path.is_dir() else [self._path]
            if not paths:
                raise LogError(f"recording {self._path}: there is no MCAP file in this directory")
            newest = RecordingFile(paths[-1])  # it may grow: what it holds now is read
            if len(paths) > 1 and not newest.groups:  # just begun
                newest.close()
                newest = RecordingFile(paths[-2])
                paths.pop()
            self._ahead.extend([*paths[:-1], newest])
            oldest = self._open_next()
        except OSError as error:
            raise LogError(f"recording {self._path}: {error}") from error
        self.arm = _arm(oldest)
        if self.arm != _arm(newest):
            raise LogError(f"recording {self._path}: of arms {self.arm} and {_arm(newest)}: name one file")
        ends = self._mine(newest.mark(newest.groups[-1]).positions()) if newest.own else {}
        self._ends = {key: at.offset for key, at in ends.items()}
        match self._start:
            case "beginning" | Time():
                self._position = self._mine(oldest.mark(oldest.groups[0]).positions_before()) if oldest.own else {}
            case "end":
                self._position = ends
                oldest.groups.clear()
                newest.groups.clear()
                self._ahead = deque({newest} - {oldest})
            case _:
                self._look_through(paths)

    def _mine(self, positions: Positions) -> dict[Key, Position]:
        """Those of the topics that are read."""
        return {key: at for key, at in positions.items() if key[0] in self._topics}

    def _look_through(self, paths: Sequence[Path]) -> None:
        """Find the streams that a number or positions are about. Raises LogError for a foreign file."""
        streams: dict[Key, list[int]] = defaultdict(list)
        for mark in _marks(paths):
            for key, at in self._mine(mark.positions_before()).items():
                streams[key].append(at.stream)
            for part in mark.parts:
                if isinstance(part, Run) and part.topic in self._topics:
                    self._newest[part.topic, part.partition] = part.stream
                    streams[part.topic, part.partition].append(part.position_stream)
        if isinstance(self._start, Seq):
            return
        assert not isinstance(self._start, str | Time)  # noqa: S101  positions
        for key, at in self._mine(self._start).items():
            if at.stream in streams[key]:
                self._position[key] = at
            elif streams[key]:
                self._parts.append(Missed(*key, at.stream, at.offset, None, GONE, Position(streams[key][0], 0)))
        self._begun = streams.keys() - self._position.keys()

    # -- reading -------------------------------------------------------------------------------------------------

    async def _read(self) -> Sequence[Part]:
        while True:
            found = await self._do(self._next)
            if found is None:
                raise StopAsyncIteration
            parts, mark = found
            self._at += 1
            if mark:
                self._link = mark.positions()
                self._seen |= {
                    key
                    for key, at in mark.positions_before().items()
                    if at.stream == self._position.get(key, at).stream
                }
            if cut := [piece for part in parts if part.topic in self._topics for piece in self._cut(part)]:
                return cut

    def _next(self) -> tuple[list[Part], Mark | None] | None:
        """The parts of the next group, and its mark. Changes nothing but which file is open; None at the end."""
        while self._file is None or self._at >= len(self._file.groups):
            if not self._ahead:
                return None
            self._open_next()
        file, group = self._file, self._file.groups[self._at]
        if not file.own:
            return list(foreign.parts_of(file, group)), None
        mark = file.mark(group)
        parts: list[Part] = [
            Missed(*key, at.stream, at.offset, _last_before(at, before), f"{GONE}: before {file.path}, {group}", before)
            for key, before in mark.positions_before().items()
            if (at := self._link.get(key, before)) != before
        ]
        return [*parts, *self._parts_of(file, group, mark)], mark

    def _open_next(self) -> RecordingFile:
        ahead = self._ahead.popleft()
        file = ahead if isinstance(ahead, RecordingFile) else RecordingFile(ahead)
        if self._file:
            self._file.close()
        self._file, self._at = file, 0
        for place in file.damage:
            log.warning("recording %s: %s", file.path, place)
        return file

    def _parts_of(self, file: RecordingFile, group: Group, mark: Mark) -> Iterator[Part]:
        """What a mark tells of, as far as it can be wanted; all that its chunk holds is missed if that is broken."""
        data, why, at = b"", "", 0
        if any(isinstance(part, Run) and self._may_begin(part, group) for part in mark.parts):
            try:
                data = file.messages(group)
            except BROKEN as error:
                why = f"{file.path}, {group}: {error}"
        for part in mark.parts:
            if isinstance(part, Hole):
                yield part.missed()
            elif data:
                found, at = decode_run(data, at, part)
                yield found
            elif why:
                key, (stream, end) = (part.topic, part.partition), part.next
                yield Missed(*key, stream, part.offset, end - 1, why, part.next)

    def _may_begin(self, run: Run, group: Group) -> bool:
        """Whether a run may hold anything that is wanted: if no run of a chunk does, it need not be unpacked."""
        key = (run.topic, run.partition)
        if run.topic not in self._topics:
            return False
        if key in self._begun:
            return True
        match self._start:
            case Time(at_ns):
                return group.chunk is None or group.chunk.message_end_time >= at_ns
            case Seq(seq):
                return run.stream == self._newest[key] and run.seq + run.count > seq
            case "beginning" | "end":
                return True
        wanted = self._position[key]
        return run.next.offset > wanted.offset if run.position_stream == wanted.stream else key in self._seen

    def _cut(self, part: Part) -> list[Part]:
        """What of a part lies behind where its partition begins."""
        key = (part.topic, part.partition)
        if self._start == "beginning" or key in self._begun:
            return [part]
        missed: list[Part] = []
        if isinstance(part, Missed):
            wanted = self._position.get(key)
            if wanted is None or isinstance(self._start, Seq | Time) or wanted.stream != part.stream:
                return []
            if part.to_offset is not None and part.to_offset < wanted.offset:
                return []
            self._begun.add(key)
            return [replace(part, from_offset=max(part.from_offset, wanted.offset))]
        match self._start:
            case Time(at_ns):
                late = _column(part, "at_ns") >= at_ns
            case Seq(seq):
                late = (_column(part, "stream") == self._newest.get(key)) & (_column(part, "seq") >= seq)
            case _:
                wanted = self._position[key]
                offsets = _column(part, "offset")
                if part.next.stream == wanted.stream:
                    late = offsets >= wanted.offset
                    if (first := int(offsets[0])) > wanted.offset:
                        missed = [
                            Missed(*key, wanted.stream, wanted.offset, first - 1, GONE, wanted._replace(offset=first))
                        ]
                else:
                    late = np.full(len(offsets), key in self._seen)
        if not late.any():
            return []
        self._begun.add(key)
        first = int(np.argmax(late))
        if isinstance(part, Samples):
            return [*missed, replace(part, offsets=part.offsets[first:], records=part.records[first:])]
        return [*missed, replace(part, entries=part.entries[first:])]


def _is_mcap(path: Path) -> bool:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return True
    log.warning("recording %s: is empty or no MCAP, and left out", path)
    return False


def _marks(paths: Iterable[Path]) -> Iterator[Mark]:
    """All marks. Raises LogError for a foreign file, which has none."""
    for path in paths:
        with closing(RecordingFile(path)) as file:
            if not file.own:
                raise LogError(
                    f"recording {path}: was not written by {LIBRARY}: only a time tells where to begin in it"
                )
            yield from (file.mark(group) for group in file.groups if group.mark)


def _last_before(at: Position, found: Position) -> int | None:
    return found.offset - 1 if at.stream == found.stream and at.offset < found.offset else None


def _column(part: Samples | Entries, name: str) -> NDArray[Any]:
    if isinstance(part, Entries):
        return np.array([getattr(entry, name) for entry in part.entries])
    return part.offsets if name == "offset" else part.records["sampled_at_ns" if name == "at_ns" else name]


def _arm(file: RecordingFile) -> str:
    """Whose recording a file is. Raises LogError if nothing in it can be read as the log."""
    if not file.own:
        return foreign.arm_of(file)
    if not file.groups:
        raise LogError(f"recording {file.path}: {'; '.join(file.damage) or 'nothing was recorded'}")
    return file.mark(file.groups[0]).arm
