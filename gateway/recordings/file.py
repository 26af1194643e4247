"""One file of a recording: found out what it holds, also if it is torn, damaged or foreign; and written."""

import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, Self

import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import (
    Channel,
    Chunk,
    ChunkIndex,
    DataEnd,
    Footer,
    Header,
    McapRecord,
    Metadata,
    MetadataIndex,
    Schema,
    Statistics,
    SummaryOffset,
)
from mcap.stream_reader import get_chunk_data_stream

from gateway.log_reader import LogError, Positions
from gateway.recordings.recording import (
    INDEX_HEAD,
    LIBRARY,
    MAGIC,
    MARK,
    MARK_BYTES,
    RECORD_HEAD,
    Channels,
    Mark,
    Packed,
    decode_mark,
    encode_header,
    encode_index,
    encode_mark,
    encode_records,
    make_mark,
)

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 30  # of what is read at once, packed or not: more is damage
PLAIN_BYTES = 4 << 20  # of messages without a chunk, read at once
SEARCH_BYTES = 1 << 20
MOST_TAIL = 64 << 20  # a recorder that was killed leaves less behind the last mark

_CHUNK = struct.Struct("<QQQII")  # start and end time, size, CRC, length of the compression's name
_ENTRY_BYTES = 16
_CRC = struct.Struct("<I")
_HEAD_BYTES = RECORD_HEAD.size + _CHUNK.size
_MOST_NAME = 16  # of a compression

BROKEN = (ValueError, struct.error, McapError, zstandard.ZstdError, RuntimeError, MemoryError)
"""What the libraries raise for records and chunks that are not what they should be (lz4: RuntimeError)."""


class Group(NamedTuple):
    """A chunk with its message index and mark; either may be missing."""

    chunk: ChunkIndex | None
    counts: dict[int, int]
    """Messages of each channel."""
    mark: MetadataIndex | None = None
    plain: tuple[int, int] | None = None
    """Of a foreign file: messages without a chunk, from byte to byte."""

    def __str__(self) -> str:
        if self.plain:
            return f"byte {self.plain[0]}"
        return f"chunk at byte {self.chunk.chunk_start_offset}" if self.chunk else "a chunk that cannot be found"


class RecordingFile:
    """A file open for reading: every record's head has been looked at, every mark checked."""

    def __init__(self, path: Path) -> None:
        """Raises LogError if it is no MCAP file, OSError."""
        self.path = path
        self.library = ""
        self.schemas: dict[int, Schema] = {}
        self.channels: dict[int, Channel] = {}
        self.groups: list[Group] = []
        self.finished = False
        self.damage: list[str] = []
        """What cannot be read, in words."""
        self.torn = False
        """The file ends in the middle of a record."""
        self._chunk: ChunkIndex | None = None  # that no mark has come to yet
        self._counts: dict[int, int] = {}
        self._fd = os.open(path, os.O_RDONLY)
        try:
            self._size = os.fstat(self._fd).st_size
            if (magic := os.pread(self._fd, len(MAGIC), 0)) != MAGIC:
                raise LogError(f"recording {path}: {f'begins with {magic!r}: no MCAP' if magic else 'is empty'}")
            self._scan()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._fd)

    @property
    def own(self) -> bool:
        """Whether it has marks; a tool that writes it anew puts its own name there."""
        return self.library.startswith(LIBRARY)

    @property
    def whole(self) -> int:
        """Where the last mark ends."""
        mark = self.groups[-1].mark if self.groups else None
        return mark.offset + mark.length if mark else 0

    def drop_half_written(self) -> None:
        """Leave out groups at the end of which a power cut kept only the mark."""
        while self.groups and self.groups[-1].chunk:
            try:
                self.messages(self.groups[-1])
                return
            except BROKEN as error:
                log.warning("recording %s, %s: %s; it was not reported written", self.path, self.groups.pop(), error)
                self.torn = True

    def can_be_resumed(self) -> bool:
        """Whether it was not finished, and only its end, of no more than a chunk or two, has to be cut off."""
        damaged = len(self.damage) > self.torn
        return not self.finished and not damaged and self._size - self.whole <= MOST_TAIL

    # -- what it holds -------------------------------------------------------------------------------------------

    def mark(self, group: Group) -> Mark:
        """The mark of a group that has one. Raises LogError if it changed since it was looked at."""
        assert group.mark  # noqa: S101
        with suppress(*BROKEN):
            if found := decode_mark(Metadata.read(self._content(group.mark.offset, group.mark.length))):
                return found
        raise LogError(f"recording {self.path}: byte {group.mark.offset}: the mark cannot be read any more")

    def messages(self, group: Group) -> bytes:
        """The unpacked records of a chunk, or of messages without one. Raises one of BROKEN."""
        if group.plain:
            return os.pread(self._fd, group.plain[1] - group.plain[0], group.plain[0])
        if group.chunk is None:
            raise ValueError("its head is damaged")
        chunk = Chunk.read(self._content(group.chunk.chunk_start_offset, group.chunk.chunk_length))
        size = chunk.uncompressed_size
        if chunk.compression == "zstd":
            size = max(size, zstandard.frame_content_size(chunk.data))
        if size > MOST_BYTES:
            raise ValueError(f"says that it holds {size} bytes")
        stream, length = get_chunk_data_stream(chunk, validate_crc=True)
        return stream.read(length)

    def _content(self, at: int, length: int) -> ReadDataStream:
        if length > MOST_BYTES:
            raise ValueError(f"has {length} bytes")
        return ReadDataStream(BytesIO(os.pread(self._fd, length - RECORD_HEAD.size, at + RECORD_HEAD.size)))

    # -- looking through it --------------------------------------------------------------------------------------

    def _scan(self) -> None:
        at = len(MAGIC)
        while at < self._size and not self.finished:
            head = os.pread(self._fd, _HEAD_BYTES + _MOST_NAME, at)
            opcode, length = RECORD_HEAD.unpack(head[: RECORD_HEAD.size].ljust(RECORD_HEAD.size, b"\0"))
            end = at + RECORD_HEAD.size + length
            try:
                if opcode == 0 or end > self._size:
                    raise ValueError("the file ends in the middle of it")
                self._take(opcode, at, end, head)
            except BROKEN as error:
                if self.own:
                    end = self._find_mark(at + 1)
                elif opcode == 0:
                    end = self._size + 1
                self.torn = end > self._size
                to = f"; goes on at byte {end}" if not self.torn else ""
                self.damage.append(f"record at byte {at}: {error}{to}")
                self._chunk = None
            at = end
        if self._chunk and not self.own:
            self.groups.append(Group(self._chunk, self._counts))

    def _take(self, opcode: int, at: int, end: int, head: bytes) -> None:
        """Keep what a record says. Raises one of BROKEN."""
        match opcode:
            case Opcode.CHUNK:
                if self._chunk and not self.own:
                    self.groups.append(Group(self._chunk, self._counts))
                self._chunk, self._counts = _chunk_index(head, at, end - at), {}
            case Opcode.MESSAGE_INDEX:
                channel, size = INDEX_HEAD.unpack_from(head, RECORD_HEAD.size)
                if size != end - at - RECORD_HEAD.size - INDEX_HEAD.size:
                    raise ValueError("its length is not that of its entries")
                if self._chunk:
                    self._chunk.message_index_offsets[channel] = at
                    self._chunk.message_index_length += end - at
                    self._counts[channel] = size // _ENTRY_BYTES
            case Opcode.METADATA if self.own:
                metadata = Metadata.read(self._content(at, end - at))
                if mark := decode_mark(metadata):
                    if self._chunk is None:
                        self._chunk, self._counts = self._chunk_before(at, mark), {}
                    self.groups.append(Group(self._chunk, self._counts, MetadataIndex(at, end - at, MARK)))
                    self._chunk = None
            case Opcode.MESSAGE if not self.own:
                self._add_plain(at, end)
            case Opcode.FOOTER:
                self.finished = os.pread(self._fd, len(MAGIC), end) == MAGIC
            case Opcode.HEADER | Opcode.SCHEMA | Opcode.CHANNEL:
                self.note(opcode, self._content(at, end - at))
            case _ if self.own:
                Opcode(opcode)

    def _chunk_before(self, at: int, mark: Mark) -> ChunkIndex | None:
        """The chunk of a mark, where the way to it is damaged; None if itself is, or there is none."""
        begin = at - mark.back
        with suppress(*BROKEN):
            head = os.pread(self._fd, _HEAD_BYTES + _MOST_NAME, begin)
            opcode, length = RECORD_HEAD.unpack_from(head)
            end = begin + RECORD_HEAD.size + length
            if opcode == Opcode.CHUNK and end <= at:
                return _chunk_index(head, begin, end - begin)
        return None

    def note(self, opcode: int, content: ReadDataStream) -> None:
        """Keep what a Header, Schema or Channel record says."""
        match opcode:
            case Opcode.HEADER:
                self.library = Header.read(content).library
            case Opcode.SCHEMA:
                schema = Schema.read(content)
                self.schemas[schema.id] = schema
            case Opcode.CHANNEL:
                channel = Channel.read(content)
                self.channels[channel.id] = channel

    def _add_plain(self, at: int, end: int) -> None:
        last = self.groups[-1].plain if self.groups else None
        if last and last[1] == at and end - last[0] <= PLAIN_BYTES:
            self.groups[-1] = Group(None, {}, plain=(last[0], end))
        else:
            self.groups.append(Group(None, {}, plain=(at, end)))

    def _find_mark(self, at: int) -> int:
        """Where the next mark behind byte ``at`` begins; if none does, behind the end."""
        ahead = RECORD_HEAD.size
        limit = min(self._size, at + MOST_BYTES)
        while at < limit:
            block = os.pread(self._fd, SEARCH_BYTES + ahead + len(MARK_BYTES), at)
            found = block.find(MARK_BYTES, ahead)
            if found >= 0 and block[found - ahead] == Opcode.METADATA:
                return at + found - ahead
            at += SEARCH_BYTES if found < 0 else found - ahead + 1
        return self._size + 1


def _chunk_index(head: bytes, at: int, length: int) -> ChunkIndex:
    start, end, size, _, name = _CHUNK.unpack_from(head, RECORD_HEAD.size)
    packed = length - _HEAD_BYTES - name - 8  # behind the name: how long the data is
    return ChunkIndex(length, at, head[_HEAD_BYTES : _HEAD_BYTES + name].decode(), packed, end, 0, {}, start, size)


# --- writing ----------------------------------------------------------------------------------------------------------


class RecordingWriter:
    """A file of a recording that grows. What ``append`` has returned from is on the disk."""

    def __init__(self, path: Path, arm: str, positions: Positions) -> None:
        """A new file that begins at ``positions``. Raises OSError, FileExistsError among them."""
        self._open(path, os.O_CREAT | os.O_EXCL, arm, positions)
        mark = encode_mark(make_mark(arm, positions, [], positions, 0))
        header = encode_header()
        try:
            self._put(header + mark)
        except OSError:
            self.close()
            path.unlink()
            raise
        self._groups.append(Group(None, {}, MetadataIndex(len(header), len(mark), MARK)))
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @classmethod
    def resume(cls, file: RecordingFile) -> Self:
        """Go on behind the last whole mark of a file that was not finished; what is behind that is cut off."""
        mark = file.mark(file.groups[-1])
        writer = cls.__new__(cls)
        writer._open(file.path, 0, mark.arm, mark.positions())
        writer._channels = Channels(mark.arm, file.channels.values())
        writer._groups = list(file.groups)
        for group in file.groups:
            writer._note_times(group.chunk)
        writer.size = file.whole
        os.ftruncate(writer._fd, writer.size)
        return writer

    def _open(self, path: Path, flags: int, arm: str, positions: Positions) -> None:
        self.path = path
        self.arm = arm
        self.positions = dict(positions)
        """Of the reader: behind what the file holds."""
        self.size = 0
        self._channels = Channels(arm)
        self._written: set[int] = set()  # channels; after a resumption once more: their records may have been cut off
        self._groups: list[Group] = []
        self._times: tuple[int, int] | None = None  # of the first and the last message
        self._fd = os.open(path, os.O_WRONLY | flags, 0o644)

    @property
    def channels(self) -> Channels:
        return self._channels

    @property
    def span_ns(self) -> int:
        """Event time between the first and the last message."""
        return self._times[1] - self._times[0] if self._times else 0

    def _note_times(self, chunk: ChunkIndex | None) -> None:
        if chunk:
            first, last = self._times or (chunk.message_start_time, chunk.message_end_time)
            self._times = min(first, chunk.message_start_time), max(last, chunk.message_end_time)

    def append(self, packed: Packed, after: Positions) -> None:
        """Write a chunk and its mark; ``after``: the reader's positions behind it. Raises OSError: nothing changed."""
        new = [channel for channel in packed.messages if channel not in self._written]
        head = self._channels.encode(new)
        chunk = encode_records([packed.chunk]) if packed.messages else b""
        at = self.size + len(head)
        index_at = at + len(chunk)
        offsets = {}
        records = [head, chunk]
        for channel, index in packed.messages.items():
            offsets[channel] = index_at
            records.append(encode_index(channel, index))
            index_at += len(records[-1])
        told = make_mark(self.arm, self.positions, packed.parts, after, index_at - at if chunk else 0)
        mark = encode_mark(told)
        self._put(b"".join([*records, mark]))
        made = packed.chunk
        entry = ChunkIndex(
            chunk_length=len(chunk),
            chunk_start_offset=at,
            compression=made.compression,
            compressed_size=len(made.data),
            message_end_time=made.message_end_time,
            message_index_length=index_at - at - len(chunk),
            message_index_offsets=offsets,
            message_start_time=made.message_start_time,
            uncompressed_size=made.uncompressed_size,
        )
        counts = {channel: len(index) for channel, index in packed.messages.items()}
        self._note_times(entry if chunk else None)
        self._groups.append(Group(entry if chunk else None, counts, MetadataIndex(index_at, len(mark), MARK)))
        self._written.update(new)
        self.positions = told.positions()

    def _put(self, data: bytes) -> None:
        """Append, and wait until it is on the disk; all of it or nothing."""
        try:
            view, at = memoryview(data), self.size
            while view:
                count = os.pwrite(self._fd, view, at)
                view, at = view[count:], at + count
            os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        self.size += len(data)

    def close(self) -> None:
        """Leave it as it is: it can be read, and gone on with."""
        os.close(self._fd)

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write what lets other tools find their way in it quickly, and close it. Raises OSError: it is still open."""
        end = encode_records([DataEnd(0)])  # no CRC of the whole: it would have to be read again after a resumption
        self._put(end + self._summary(self.size + len(end)))
        self.close()

    def _summary(self, at: int) -> bytes:
        """Summary section, footer and magic, from byte ``at`` on."""
        counts: Counter[int] = Counter()
        for group in self._groups:
            counts.update(group.counts)
        chunks = [group.chunk for group in self._groups if group.chunk]
        marks = [group.mark for group in self._groups if group.mark]
        channels = [channel for channel in self._channels.all.values() if counts[channel.id]]
        schemas = self._channels.schemas_of(channels)
        start, end = self._times or (0, 0)
        statistics = Statistics(
            attachment_count=0,
            channel_count=len(channels),
            channel_message_counts=dict(counts),
            chunk_count=len(chunks),
            message_count=counts.total(),
            message_end_time=end,
            message_start_time=start,
            metadata_count=len(marks),
            schema_count=len(schemas),
        )
        sections: Sequence[tuple[Opcode, Sequence[McapRecord]]] = (
            (Opcode.SCHEMA, schemas),
            (Opcode.CHANNEL, channels),
            (Opcode.STATISTICS, [statistics]),
            (Opcode.CHUNK_INDEX, chunks),
            (Opcode.METADATA_INDEX, marks),
        )
        summary = b""
        offsets = []
        for opcode, records in sections:
            if section := encode_records(records):
                offsets.append(SummaryOffset(opcode, at + len(summary), len(section)))
                summary += section
        offsets_at = at + len(summary)
        summary += encode_records(offsets)
        unsigned = encode_records([Footer(at, offsets_at, 0)])[: -_CRC.size]
        return summary + unsigned + _CRC.pack(zlib.crc32(summary + unsigned)) + MAGIC
