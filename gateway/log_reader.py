"""Reading the log: one interface over its two places, the journal of this machine and the topics in Kafka.

    async with JournalLog(state, ["telemetry"], "beginning", follow=True) as log:   # or KafkaLog(config, ...)
        async for part in log:
            match part:
                case Samples():  ...   # of one motor: NumPy records and their offsets
                case Entries():  ...   # of one partition of a JSON topic: raw values
                case Missed():   ...   # offsets that were due and cannot be read any more
            await log.commit()         # a reader with a name goes on here the next time

Both places have topics, partitions and offsets; parts of a partition come in its order, those of several partitions in
any. A reader holds up nobody: neither the gateway, nor another reader, however slow it is, stopped or dead.
``docs/log.md`` is the same contract for programs without this code.
"""

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from gateway import telemetry
from gateway.telemetry import Records

Topic = Literal["telemetry", "events", "outcomes", "commands"]
TOPICS: tuple[Topic, ...] = ("telemetry", "events", "outcomes", "commands")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = {"gateway"}  # the gateway's own consumer group


class LogError(Exception):
    """The log cannot be read as asked; the message says why."""


class Seq(NamedTuple):
    """Begin each partition at this sequence number of its newest stream; at the oldest there is if that is gone."""

    seq: int


class Time(NamedTuple):
    """Begin each partition at its first record of this event time (ns since 1970) or later, or else at its end."""

    at_ns: int


class Position(NamedTuple):
    """The next offset to read. In the journal it counts within ``stream``; in Kafka offsets outlive streams: 0."""

    stream: int
    offset: int


Key: TypeAlias = tuple[Topic, int]
"""Topic and partition."""
Positions: TypeAlias = Mapping[Key, Position]
Start: TypeAlias = Literal["beginning", "end"] | Seq | Time | Positions
"""Where to begin. With positions: partitions that they do not name begin at their beginning."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Consecutive samples of one motor: ``records`` (dtype RECORD) and the offset of each."""

    partition: int
    motor: str
    offsets: NDArray[np.int64]
    records: Records
    next: Position
    topic: Topic = "telemetry"


class LogEntry(NamedTuple):
    """A record of a JSON topic. ``stream`` and ``seq`` are 0 in the commands topic, where nobody gives numbers."""

    offset: int
    stream: int
    seq: int
    at_ns: int
    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Entries:
    """Consecutive records of one partition of a JSON topic."""

    topic: Topic
    partition: int
    entries: Sequence[LogEntry]
    next: Position


@dataclass(frozen=True, slots=True)
class Missed:
    """Offsets ``from_offset``..``to_offset`` that were due and are gone or unreadable; reading goes on behind them.

    ``to_offset`` None: the log ended, nobody can tell where, and began anew. ``stream`` as in ``Position``.
    """

    topic: Topic
    partition: int
    stream: int
    from_offset: int
    to_offset: int | None
    reason: str
    next: Position

    def __str__(self) -> str:
        to = "?" if self.to_offset is None else self.to_offset
        return f"{self.topic}, partition {self.partition}: missed offsets {self.from_offset}..{to}: {self.reason}"


Part: TypeAlias = Samples | Entries | Missed


class LogReader(ABC):
    """Reads ``topics`` from ``start``; a reader whose ``name`` has left a position behind goes on there instead.

    Positions given as ``start`` come before those that the name left. Without ``follow`` it ends at what was there
    when it was entered. Entering raises LogError.
    """

    arm: str
    """Whose log it is; known once the reader is entered."""

    def __init__(self, topics: Sequence[Topic], start: Start, *, follow: bool, name: str | None) -> None:
        if name is not None and (not _NAME.fullmatch(name) or name in _RESERVED):
            raise LogError(f"reader {name!r}: must be 1 to 64 letters, digits, '.', '_' or '-', and not 'gateway'")
        self._topics = tuple(topics)
        self._start = start
        self._follow = follow
        self._name = name
        self._parts: deque[Part] = deque()
        self._position: dict[Key, Position] = {}
        self._ends: dict[Key, int] = {}  # the next offset of each partition, where reading does not follow
        self._due: set[Key] = (
            set()
        )  # what does not come at its position was missed; elsewhere it begins with what is there

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Find where to begin: what is appended from here on is not missed."""

    @abstractmethod
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of everything. Commits nothing."""

    @abstractmethod
    async def _read(self) -> Sequence[Part]:
        """Some parts, as soon as there are any. Raises StopAsyncIteration at the end; may be cancelled."""

    @abstractmethod
    async def commit(self, positions: Positions | None = None) -> None:
        """Remember for this name that everything handed out so far, or up to ``positions``, is done with.

        Raises LogError for a reader without a name.
        """

    def positions(self) -> dict[Key, Position]:
        """Behind what was handed out so far; kept beside a reader's own output, they are a ``start``."""
        return dict(self._position)

    def partitions(self) -> set[Key]:
        """Those that are known to have records; of a recording that others made, none until they come."""
        return {*self._position, *self._ends}

    def left(self) -> int | None:
        """About how many records are still to come; None where nobody can tell."""
        at = {key: position.offset for key, position in self._position.items()}
        return sum(max(0, end - at.get(key, 0)) for key, end in self._ends.items()) if self._ends else None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Part:
        while not self._parts:
            self._parts.extend(await self._read())
        part = self._parts.popleft()
        key = (part.topic, part.partition)
        self._position[key] = part.next
        self._due.add(key)
        return part


class Record(NamedTuple):
    """One record; ``value`` has the field names of the JSON formats."""

    topic: Topic
    partition: int
    motor: str
    at_ns: int
    value: dict[str, Any]
    next: Position


def records(part: Samples | Entries) -> Iterator[Record]:
    """The records of a part, one by one."""
    if isinstance(part, Samples):
        for offset, row in zip(part.offsets.tolist(), part.records, strict=True):
            value = telemetry.as_mapping(row, part.motor)
            position = part.next._replace(offset=offset + 1)
            yield Record("telemetry", part.partition, part.motor, value["sampled_at_ns"], value, position)
    else:
        for entry in part.entries:
            position = part.next._replace(offset=entry.offset + 1)
            yield Record(part.topic, part.partition, entry.key, entry.at_ns, _object(entry.value), position)


def _object(raw: bytes) -> dict[str, Any]:
    """A JSON object; what is none (anybody may write a command) under the name ``unreadable``."""
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except (ValueError, RecursionError):
        return {"unreadable": raw.decode(errors="replace")}
