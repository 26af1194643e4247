"""What a recording is made of: MCAP (https://mcap.dev/spec), of which this module knows chunks, channels and marks.

    magic, Header
    mark                              where reading began: positions, no parts
    Schema, Channel                   of what comes in the next chunk for the first time
    Chunk, MessageIndex of each channel, mark
    ...
    DataEnd, summary, Footer, magic   once the file is finished

A message of telemetry is the 76 bytes of ``servo.Telemetry``, one of the JSON topics the JSON itself. What MCAP has no
place for stands in the mark behind a chunk (a Metadata record): of which parts of the log it consists. A mark that can
be read says that everything before it is on the disk. ``docs/recordings.md`` is the contract for other programs.
"""

import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import zstandard
from mcap.data_stream import RecordBuilder
from mcap.opcode import Opcode
from mcap.records import Channel, Chunk, Header, McapRecord, Metadata, Schema
from numpy.typing import NDArray

from gateway.config import shipped
from gateway.log_reader import Entries, Key, LogEntry, Missed, Part, Position, Positions, Samples, Topic
from gateway.telemetry import MESSAGE_SIZE, RECORD, Records

MAGIC = b"\x89MCAP0\r\n"
LIBRARY = "servo-gateway"
MARK = "servo.mark"
MARK_BYTES = struct.pack("<I", len(MARK)) + MARK.encode()
"""How the content of a mark begins, whatever is before it."""
RECORD_HEAD = struct.Struct("<BQ")
"""Opcode and length of the content."""

_MESSAGE_HEAD = struct.Struct("<BQHIQQ")
"""Opcode, length, channel, sequence, log time, publish time."""
_MESSAGE_CONTENT = _MESSAGE_HEAD.size - RECORD_HEAD.size
SAMPLE_MESSAGE = np.dtype(
    [
        ("opcode", "u1"),
        ("length", "<u8"),
        ("channel", "<u2"),
        ("sequence", "<u4"),
        ("log_time", "<u8"),
        ("publish_time", "<u8"),
        ("data", f"V{MESSAGE_SIZE}"),
    ]
)
"""A Message record of telemetry."""
_WHOLE = np.dtype([("partition", "<u2"), ("data", f"V{MESSAGE_SIZE}")])
"""A RECORD whose message is one field."""
INDEX_HEAD = struct.Struct("<HI")
"""Of a MessageIndex: channel, and size of the entries."""
_SEQUENCES = 1 << 32
_NUMBERS = 1 << 64  # that others give in Kafka may be any

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST_CHANNELS = 4096  # anybody may write any key into a topic


def encode_records(records: Iterable[McapRecord]) -> bytes:
    builder = RecordBuilder()
    for record in records:
        record.write(builder)
    return bytes(builder.end())


# --- marks ------------------------------------------------------------------------------------------------------------


class Run(msgspec.Struct, array_like=True, tag="run"):
    """``count`` consecutive messages of one motor and topic. Offset and ``seq`` are the first's, and count up."""

    topic: Topic
    partition: int
    key: str
    position_stream: int  # that of its Position
    offset: int
    stream: int
    seq: int  # 0, as ``stream``, where nobody gives numbers
    count: int

    @property
    def next(self) -> Position:
        return Position(self.position_stream, self.offset + self.count)

    def join(self, other: "Run") -> bool:
        """Take the run ``other`` in if it goes on where this one ends."""
        ahead = self.count
        fits = other == Run(
            self.topic,
            self.partition,
            self.key,
            self.position_stream,
            self.offset + ahead,
            self.stream,
            self.seq + ahead if self.seq else 0,
            other.count,
        )
        if fits:
            self.count += other.count
        return fits


class Hole(msgspec.Struct, array_like=True, tag="missed"):
    """A ``Missed`` of the log that was recorded."""

    topic: Topic
    partition: int
    stream: int
    from_offset: int
    to_offset: int | None
    reason: str
    next: Position

    def missed(self) -> Missed:
        return Missed(self.topic, self.partition, self.stream, self.from_offset, self.to_offset, self.reason, self.next)


class Mark(msgspec.Struct):
    """What a chunk holds, in its order, and the positions of the log's reader before it."""

    arm: str
    before: dict[Topic, dict[int, Position]]
    parts: list[Run | Hole] = []
    moved: dict[Topic, dict[int, Position]] = {}
    """Positions behind the chunk that its parts do not tell: a new journal began."""
    back: int = 0
    """How many bytes before the mark its chunk begins, should the way there be damaged; 0: it has none."""

    def positions_before(self) -> dict[Key, Position]:
        return _flat(self.before)

    def positions(self) -> dict[Key, Position]:
        """Positions of the reader behind the chunk: from there the recording goes on."""
        read = {(part.topic, part.partition): part.next for part in self.parts}
        return self.positions_before() | read | _flat(self.moved)


def make_mark(arm: str, before: Positions, parts: list[Run | Hole], after: Positions, back: int) -> Mark:
    """The mark of a chunk that was read from ``before`` to ``after``."""
    mark = Mark(arm, _nested(before), parts, back=back)
    told = mark.positions()
    mark.moved = _nested({key: at for key, at in after.items() if told.get(key) != at})
    return mark


def encode_mark(mark: Mark) -> bytes:
    text = msgspec.json.encode(mark)
    return encode_records([Metadata(MARK, {"crc": f"{zlib.crc32(text):08x}", "json": text.decode()})])


def decode_mark(metadata: Metadata) -> Mark | None:
    """None for a metadata record that is no mark. Raises ValueError for one that is damaged."""
    if metadata.name != MARK:
        return None
    text = metadata.metadata.get("json", "").encode()
    if metadata.metadata.get("crc") != f"{zlib.crc32(text):08x}":
        raise ValueError("this mark is damaged")
    return msgspec.json.decode(text, type=Mark)


def _nested(positions: Positions) -> dict[Topic, dict[int, Position]]:
    nested: dict[Topic, dict[int, Position]] = {}
    for (topic, partition), at in positions.items():
        nested.setdefault(topic, {})[partition] = at
    return nested


def _flat(nested: Mapping[Topic, Mapping[int, Position]]) -> dict[Key, Position]:
    return {(topic, partition): at for topic, those in nested.items() for partition, at in those.items()}


# --- schemas and channels ---------------------------------------------------------------------------------------------

_PROPERTIES: dict[Topic, dict[str, str]] = {  # what every one has; a command may hold anything
    "events": {"type": "string", "motor": "string", "at_ns": "integer"},
    "outcomes": {"command_id": "string", "motor": "string", "state": "string", "at_ns": "integer"},
    "commands": {},
}
SCHEMA_TOPICS: dict[str, Topic] = {
    "servo.Telemetry": "telemetry",
    "servo.Event": "events",
    "servo.Outcome": "outcomes",
    "servo.Command": "commands",
}


def _schemas() -> dict[Topic, Schema]:
    """The schema of each topic."""
    made: dict[Topic, Schema] = {}
    for number, (name, topic) in enumerate(SCHEMA_TOPICS.items(), 1):
        if topic == "telemetry":
            made[topic] = Schema(number, shipped("telemetry.binpb").read_bytes(), "protobuf", name)
        else:
            properties = {field: {"type": kind} for field, kind in _PROPERTIES[topic].items()}
            data = msgspec.json.encode({"type": "object", "title": name, "properties": properties})
            made[topic] = Schema(number, data, "jsonschema", name)
    return made


class Channels:
    """The channels of a file, one for each (topic, partition, key). Those given are in the file already."""

    def __init__(self, arm: str, known: Iterable[Channel] = ()) -> None:
        self._arm = arm
        self._schemas = _schemas()
        self.all: dict[int, Channel] = {channel.id: channel for channel in known}
        self._ids = {self._label(channel): channel.id for channel in self.all.values()}

    def id_of(self, run: Run) -> int:
        """The channel of a run; a key that can be no motor's goes into that of the whole arm."""
        key = run.key if _NAME.fullmatch(run.key) else "*"
        label = (run.topic, str(run.partition), key)
        if label not in self._ids and len(self.all) >= _MOST_CHANNELS:
            key, label = "*", (run.topic, str(run.partition), "*")
        if (found := self._ids.get(label)) is None:
            found = self._ids[label] = max(self.all, default=0) + 1
            encoding = "protobuf" if run.topic == "telemetry" else "json"
            name = "/".join(["", self._arm, *([key] if key != "*" else []), run.topic])
            metadata = {"arm": self._arm, "topic": run.topic, "partition": str(run.partition), "motor": key}
            self.all[found] = Channel(found, name, encoding, metadata, self._schemas[run.topic].id)
        return found

    def encode(self, ids: Iterable[int]) -> bytes:
        """Records of these channels, with every schema that they need before them."""
        wanted = [self.all[number] for number in ids]
        return encode_records([*self.schemas_of(wanted), *wanted])

    def schemas_of(self, channels: Iterable[Channel]) -> list[Schema]:
        wanted = {channel.schema_id for channel in channels}
        return [schema for schema in self._schemas.values() if schema.id in wanted]

    @staticmethod
    def _label(channel: Channel) -> tuple[str, str, str]:
        topic, partition, motor = (channel.metadata.get(name, "") for name in ("topic", "partition", "motor"))
        return topic, partition, motor


# --- chunks -----------------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """A chunk ready to be written: its record, and of each channel the (log time, offset) of its messages."""

    chunk: Chunk
    messages: dict[int, NDArray[np.uint64]]
    parts: list[Run | Hole]


class Collector:
    """Parts of the log on their way into a chunk."""

    def __init__(self) -> None:
        self._parts: dict[Key, list[Part]] = {}
        self.size = 0
        """Bytes of the messages so far."""

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, part: Part) -> None:
        self._parts.setdefault((part.topic, part.partition), []).append(part)
        match part:
            case Samples():
                self.size += len(part.records) * SAMPLE_MESSAGE.itemsize
            case Entries():
                self.size += sum(len(entry.value) + _MESSAGE_HEAD.size for entry in part.entries)

    def pack(self, channels: Channels, level: int) -> Packed:
        """All that was added, each partition for itself: what lies together compresses best."""
        told: list[Run | Hole] = []
        data = bytearray()
        index: dict[int, list[NDArray[np.uint64]]] = {}
        for part in (part for parts in self._parts.values() for part in parts):
            if isinstance(part, Missed):
                told.append(_hole(part))
                continue
            for run, piece in _runs(part):
                channel = channels.id_of(run)
                encoded, times, offsets = (
                    _encode_samples(channel, part.records[piece])
                    if isinstance(part, Samples)
                    else _encode_entries(channel, part.entries[piece])
                )
                index.setdefault(channel, []).append(np.stack([times, offsets + np.uint64(len(data))], axis=1))
                data += encoded
                if not (told and isinstance(last := told[-1], Run) and last.join(run)):
                    told.append(run)
        joined = {channel: np.concatenate(pieces) for channel, pieces in index.items()}
        times = np.concatenate([pieces[:, 0] for pieces in joined.values()]) if joined else np.zeros(1, np.uint64)
        packed = zstandard.ZstdCompressor(level=level).compress(bytes(data))
        chunk = Chunk("zstd", packed, int(times.max()), int(times.min()), zlib.crc32(data), len(data))
        return Packed(chunk, joined, told)


def _runs(part: Samples | Entries) -> Iterator[tuple[Run, slice]]:
    """A part cut where offset, number, stream or key do not go on."""
    if isinstance(part, Samples):
        offsets, streams, seqs = part.offsets, part.records["stream"], part.records["seq"]
        breaks = (np.diff(offsets) != 1) | (np.diff(streams) != 0) | (np.diff(seqs) != 1)
        for first, end in pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), len(offsets)]):
            numbers = (int(offsets[first]), int(streams[first]), int(seqs[first]), end - first)
            yield Run("telemetry", part.partition, part.motor, part.next.stream, *numbers), slice(first, end)
    else:
        singles = [
            Run(part.topic, part.partition, key, part.next.stream, offset, stream % _NUMBERS, seq % _NUMBERS, 1)
            for offset, stream, seq, _, key, _ in part.entries
        ]
        first = 0
        while first < len(singles):
            end = first + 1
            while end < len(singles) and singles[first].join(singles[end]):
                end += 1
            yield singles[first], slice(first, end)
            first = end


def _hole(part: Missed) -> Hole:
    return Hole(part.topic, part.partition, part.stream, part.from_offset, part.to_offset, part.reason, part.next)


_Encoded = tuple[bytes, NDArray[np.uint64], NDArray[np.uint64]]  # messages, their log times, their offsets


def _encode_samples(channel: int, records: Records) -> _Encoded:
    messages = np.empty(len(records), SAMPLE_MESSAGE)
    messages["opcode"] = Opcode.MESSAGE
    messages["length"] = _MESSAGE_CONTENT + MESSAGE_SIZE
    messages["channel"] = channel
    messages["sequence"] = records["seq"] % _SEQUENCES
    messages["log_time"] = messages["publish_time"] = np.maximum(records["sampled_at_ns"], 0)
    messages["data"] = records.view(_WHOLE)["data"]
    offsets = np.arange(len(records), dtype=np.uint64) * SAMPLE_MESSAGE.itemsize
    return messages.tobytes(), messages["log_time"], offsets


def _encode_entries(channel: int, entries: Iterable[LogEntry]) -> _Encoded:
    data, times, offsets = bytearray(), [], []
    for entry in entries:
        offsets.append(len(data))
        times.append(min(max(entry.at_ns, 0), _NUMBERS - 1))
        length = _MESSAGE_CONTENT + len(entry.value)
        data += _MESSAGE_HEAD.pack(Opcode.MESSAGE, length, channel, entry.seq % _SEQUENCES, times[-1], times[-1])
        data += entry.value
    return bytes(data), np.array(times, np.uint64), np.array(offsets, np.uint64)


def encode_header() -> bytes:
    return MAGIC + encode_records([Header("", LIBRARY)])


def encode_index(channel: int, index: NDArray[np.uint64]) -> bytes:
    """A MessageIndex record."""
    entries = index.astype("<u8").tobytes()
    content = INDEX_HEAD.pack(channel, len(entries)) + entries
    return RECORD_HEAD.pack(Opcode.MESSAGE_INDEX, len(content)) + content


def decode_run(data: bytes, at: int, run: Run) -> tuple[Samples | Entries, int]:
    """The messages of a run that begins at byte ``at`` of a chunk, and where they end. Raises ValueError."""
    key = (run.topic, run.partition)
    if run.topic == "telemetry":
        end = at + run.count * SAMPLE_MESSAGE.itemsize
        if end > len(data):
            raise ValueError(f"holds {len(data)} bytes, too few for {run.count} samples at {at}")
        offsets = np.arange(run.offset, run.offset + run.count, dtype=np.int64)
        records = np.empty(run.count, _WHOLE)
        records["partition"] = run.partition
        records["data"] = np.frombuffer(data, SAMPLE_MESSAGE, run.count, at)["data"]
        return Samples(run.partition, run.key, offsets, records.view(RECORD), run.next), end
    entries = []
    for number in range(run.count):
        try:
            _, length, _, _, at_ns, _ = _MESSAGE_HEAD.unpack_from(data, at)
        except struct.error as error:
            raise ValueError(f"message at {at}: {error}") from error
        value = data[at + _MESSAGE_HEAD.size : (at := at + RECORD_HEAD.size + length)]
        seq = run.seq + number if run.seq else 0
        entries.append(LogEntry(run.offset + number, run.stream, seq, at_ns, run.key, value))
    return Entries(*key, entries, run.next), at
