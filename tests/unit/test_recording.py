"""Recordings: what was reported written is read, whatever became of the rest; other programs read it, and we theirs."""

import asyncio
import errno
import io
import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap.records import Channel, Message, Schema, Statistics
from mcap.stream_reader import StreamReader
from mcap.writer import CompressionType, Writer
from mcap_protobuf.decoder import DecoderFactory

from gateway import telemetry
from gateway.config import shipped
from gateway.log_reader import (
    TOPICS,
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
from gateway.recordings import recorder
from gateway.recordings.file import RecordingFile, RecordingWriter
from gateway.recordings.reader import RecordingLog
from gateway.recordings.recorder import Recorder
from gateway.recordings.recording import MAGIC, RECORD_HEAD, Collector
from gateway.telemetry import FIELD_NAMES
from tests.gateway_parts import MOTORS

STREAM = 7
FIRST_NS = 1_790_000_000_000_000_000
STEP_NS = 5_000_000
NAME = "arm1-20261121T150405Z-1.mcap"

Held = dict[Key, list[tuple[object, ...]]]
"""{(topic, partition): every record as (stream, offset, the rest)}"""


def samples_at(numbers: Sequence[int], partition: int) -> Samples:
    """Samples with these numbers; every bit of their values is made from the number."""
    records = telemetry.blank(len(numbers))
    for field, name in enumerate(FIELD_NAMES[3:]):
        values = np.random.default_rng(field).integers(0, 2**32, 1 + max(numbers), np.uint64)[list(numbers)]
        records[name] = values if records[name].dtype.kind == "u" else values / 2**20
    records["torque_nm"] = np.nan
    records["partition"], records["stream"], records["seq"] = partition, STREAM, numbers
    records["sampled_at_ns"] = FIRST_NS + STEP_NS * np.array(numbers) + partition
    offsets = np.array(numbers, np.int64) - 1
    return Samples(partition, MOTORS[partition], offsets, records, Position(STREAM, numbers[-1]))


def entries_at(topic: Topic, numbers: Sequence[int], partition: int = 0, stream: int = STREAM) -> Entries:
    """Records of a JSON topic; those of partition 0 are by turns of the whole arm and of its motor."""
    entries = []
    for number in numbers:
        at_ns, key = FIRST_NS + STEP_NS * number, "*" if number % 2 else MOTORS[partition]
        value = msgspec.json.encode({"type": "test", "motor": key, "at_ns": at_ns, "of": number})
        entries.append(LogEntry(number - 1, stream, number, at_ns, key, value))
    return Entries(topic, partition, entries, Position(stream, numbers[-1]))


def chunks_of(count: int, *, rows: int = 4) -> list[list[Part]]:
    """Parts of a log by the chunks that they come in: of both motors, and events."""
    found: list[list[Part]] = []
    for number in range(count):
        numbers = range(rows * number + 1, rows * (number + 1) + 1)
        chunk: list[Part] = [samples_at(numbers, partition) for partition in MOTORS]
        found.append([*chunk, entries_at("events", [2 * number + 1, 2 * number + 2])])
    return found


BEGIN: Positions = {
    ("telemetry", 0): Position(STREAM, 0),
    ("telemetry", 1): Position(STREAM, 0),
    ("events", 0): Position(STREAM, 0),
}


def write(path: Path, chunks: Sequence[Sequence[Part]], *, finish: bool = True, arm: str = "arm1") -> Path:
    """A file of these chunks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = RecordingWriter(path, arm, BEGIN)
    at = dict(BEGIN)
    for chunk in chunks:
        collector = Collector()
        for part in chunk:
            collector.add(part)
            at[part.topic, part.partition] = part.next
        writer.append(collector.pack(writer.channels, 1), at)
    writer.finish() if finish else writer.close()
    return path


def look(path: Path) -> RecordingFile:
    """What a file holds; closed."""
    with closing(RecordingFile(path)) as file:
        return file


def held(parts: Sequence[Part]) -> Held:
    """All records of these parts, in their order."""
    found: Held = defaultdict(list)
    for part in parts:
        if isinstance(part, Samples):
            rows = [row.tobytes() for row in part.records]
            found[part.topic, part.partition] += [
                (part.next.stream, offset, part.motor, row)
                for offset, row in zip(part.offsets.tolist(), rows, strict=True)
            ]
        elif isinstance(part, Entries):
            found[part.topic, part.partition] += [(part.next.stream, *entry) for entry in part.entries]
    return dict(found)


def missed(parts: Sequence[Part]) -> set[tuple[str, int, int]]:
    """(topic, partition, offset) of everything that is told as missed."""
    return {
        (part.topic, part.partition, offset)
        for part in parts
        if isinstance(part, Missed)
        for offset in range(part.from_offset, (part.from_offset if part.to_offset is None else part.to_offset) + 1)
    }


async def read_async(path: Path, topics: Sequence[Topic] = TOPICS, start: Start = "beginning") -> list[Part]:
    async with RecordingLog(path, topics, start) as log:
        return [part async for part in log]


def read(path: Path, topics: Sequence[Topic] = TOPICS, start: Start = "beginning") -> list[Part]:
    return asyncio.run(read_async(path, topics, start))


def flat(chunks: Sequence[Sequence[Part]]) -> list[Part]:
    return [part for chunk in chunks for part in chunk]


class Fixed(LogReader):
    """A log that is what it is, from positions on."""

    arm = "arm1"

    def __init__(self, parts: Sequence[Part], start: Start) -> None:
        super().__init__(TOPICS, start, follow=False, name=None)
        self._all = list(parts)

    async def __aenter__(self) -> "Fixed":
        assert not isinstance(self._start, Seq | Time)
        given = {} if isinstance(self._start, str) else dict(self._start)
        mine = {(part.topic, part.partition) for part in self._all}
        self._position = {key: at for key, at in (dict(BEGIN) | given).items() if key in mine}
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def commit(self, positions: Positions | None = None) -> None: ...

    async def _read(self) -> list[Part]:
        while self._all:
            part = self._all.pop(0)
            if part.next.offset > self._position[part.topic, part.partition].offset:
                return [part]
        raise StopAsyncIteration


def record(
    directory: Path, parts: Sequence[Part], *, rotate_bytes: int = 1 << 30, rotate_ns: int | None = None
) -> None:
    """Record a log to its end."""
    with Recorder(directory, rotate_bytes=rotate_bytes, rotate_ns=rotate_ns) as at_work:
        asyncio.run(at_work.record(lambda start: Fixed(parts, start), "beginning"))


# --- what was written is read -----------------------------------------------------------------------------------------


def test_a_recording_gives_what_was_recorded_bit_for_bit_in_its_order(tmp_path: Path) -> None:
    chunks = chunks_of(5)
    parts = read(write(tmp_path / NAME, chunks))
    assert held(parts) == held(flat(chunks))
    assert missed(parts) == set()


@st.composite
def logs(draw: st.DrawFn) -> list[list[Part]]:
    """Any log, by chunks: partitions by turns, numbers that are missing, told or not, streams that end."""
    at = {partition: [1, 1] for partition in MOTORS}  # stream, number
    chunks: list[list[Part]] = [[]]
    for _ in range(draw(st.integers(0, 25))):
        partition, count = draw(st.sampled_from([0, 1])), draw(st.integers(1, 5))
        stream, number = at[partition]
        match draw(st.sampled_from(["samples", "samples", "entries", "gap", "missed", "stream", "chunk"])):
            case "samples":
                part = samples_at(range(number, number + count), partition)
                part.records["stream"] = stream
                chunks[-1].append(replace(part, next=Position(stream, number + count - 1)))
                at[partition][1] += count
            case "entries":
                chunks[-1].append(entries_at("outcomes", range(number, number + count), partition, stream))
            case "gap":
                at[partition][1] += count
            case "missed":
                after = Position(stream, number + count - 1)
                chunks[-1].append(Missed("telemetry", partition, stream, number - 1, number + count - 2, "x", after))
                at[partition][1] += count
            case "stream":
                at[partition] = [stream + 1, 1]
            case "chunk":
                chunks.append([])
    return chunks


# the directory that examples share is told apart by their number
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=logs(), finish=st.booleans())
def test_any_log_comes_back_as_it_was(tmp_path: Path, chunks: list[list[Part]], finish: bool) -> None:
    path = write(tmp_path / str(len(list(tmp_path.iterdir()))) / NAME, chunks, finish=finish)
    parts = read(path)
    assert held(parts) == held(flat(chunks))
    told = [sorted((p for p in of if isinstance(p, Missed)), key=lambda p: p.partition) for of in (parts, flat(chunks))]
    assert told[0] == told[1]


def test_parts_that_do_not_go_on_keep_their_offsets_streams_and_what_was_missed(tmp_path: Path) -> None:
    def missing(stream: int, first: int, last: int | None, after: Position) -> Missed:
        return Missed("telemetry", 0, stream, first, last, "expired", after)

    kafka = Position(0, 41)  # offsets of Kafka outlive a stream
    chunk: list[Part] = [
        samples_at([1, 2, 5], 0),
        missing(STREAM, 5, 8, Position(STREAM, 9)),
        samples_at([10], 0),
        missing(STREAM, 10, None, Position(8, 0)),
        Entries("commands", 1, [LogEntry(40, 0, 0, FIRST_NS, "any key at all / \x00", b"\xff no JSON")], kafka),
        Entries("commands", 1, [LogEntry(41, 0, 0, FIRST_NS, "joint2", b"")], kafka._replace(offset=42)),
    ]
    parts = read(write(tmp_path / NAME, [chunk]))
    assert held(parts) == held(chunk)
    assert [part for part in parts if isinstance(part, Missed)] == [chunk[1], chunk[3]]


async def test_reading_can_begin_at_a_position_a_number_or_a_time(tmp_path: Path) -> None:
    chunks = chunks_of(6)
    path = write(tmp_path / NAME, chunks)
    everything = held(flat(chunks))
    for number in (1, 4, 5, 13, 24, 25):
        at_ns = FIRST_NS + STEP_NS * number
        positions: Positions = {("telemetry", 0): Position(STREAM, number - 1)}
        starts: tuple[Start, ...] = (Seq(number), Time(at_ns), positions)
        for start in starts:
            found = held(await read_async(path, ["telemetry"], start))
            assert found.get(("telemetry", 0), []) == everything["telemetry", 0][number - 1 :]
    assert await read_async(path, TOPICS, "end") == []


def test_number_is_that_of_the_newest_stream_and_positions_reach_over_streams(tmp_path: Path) -> None:
    old, new = entries_at("events", range(1, 6)), entries_at("events", range(1, 4), stream=8)
    path = write(tmp_path / NAME, [[old], [new]])
    assert held(read(path, start=Seq(2))) == {("events", 0): [(8, *entry) for entry in new.entries[1:]]}
    assert held(read(path, start={("events", 0): Position(STREAM, 4)})) == {
        ("events", 0): [(STREAM, *old.entries[4]), *((8, *entry) for entry in new.entries)]
    }
    behind = held(read(path, start={("events", 0): Position(STREAM, 5)}))
    assert behind == {("events", 0): [(8, *entry) for entry in new.entries]}
    gone = read(path, start={("events", 0): Position(99, 4)})
    assert [(m.stream, m.from_offset, m.to_offset) for m in gone if isinstance(m, Missed)] == [(99, 4, None)]
    assert len(held(gone)["events", 0]) == 8


def test_only_the_topics_that_are_asked_for_come(tmp_path: Path) -> None:
    path = write(tmp_path / NAME, chunks_of(2))
    assert {part.topic for part in read(path, ["events"])} == {"events"}
    assert read(path, ["outcomes"]) == []


def check_sound(path: Path) -> None:
    """Another program that reads a file from its beginning finds what it needs in time, and all CRCs right."""
    assert look(path).finished
    schemas, channels, messages = set(), set(), 0
    with path.open("rb") as file:
        for record in StreamReader(file, validate_crcs=True).records:
            match record:
                case Schema():
                    schemas.add(record.id)
                case Channel():
                    assert record.schema_id in schemas
                    channels.add(record.id)
                case Message():
                    assert record.channel_id in channels
                    messages += 1
                case Statistics():
                    assert record.message_count == messages


# --- a recorder that was killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("finish", [False, True], ids=["unfinished", "finished"])
def test_a_recording_that_ends_at_any_byte_is_gone_on_with_without_gap_or_repeat(tmp_path: Path, finish: bool) -> None:
    chunks = chunks_of(3)
    whole = write(tmp_path / NAME, chunks, finish=finish).read_bytes()
    everything = held(flat(chunks))
    for size in range(0, len(whole) + 1, 41):
        directory = tmp_path / str(size)
        directory.mkdir()
        (directory / NAME).write_bytes(whole[:size])
        record(directory, flat(chunks))
        parts = read(directory)
        assert (held(parts), missed(parts)) == (everything, set()), size
        for path in directory.glob("*.mcap"):
            check_sound(path)


def test_what_is_behind_the_last_mark_is_cut_off(tmp_path: Path) -> None:
    chunks = chunks_of(3)
    whole = write(tmp_path / "sound" / NAME, chunks).read_bytes()
    for tail in (bytes(5000), b"\x06" + struct.pack("<Q", 4000) + bytes(5001)):
        path = write(tmp_path / str(len(tail)) / NAME, chunks, finish=False)
        path.write_bytes(path.read_bytes() + tail)
        record(path.parent, flat(chunks))
        assert path.read_bytes() == whole


def test_a_recording_that_ends_at_any_byte_gives_what_was_reported_written(tmp_path: Path) -> None:
    chunks = chunks_of(3)
    path = write(tmp_path / NAME, chunks, finish=False)
    whole = path.read_bytes()
    ends = [group.mark.offset + group.mark.length for group in look(path).groups if group.mark]
    for size in range(ends[0], len(whole) + 1, 23):
        path.write_bytes(whole[:size])
        reported = sum(end <= size for end in ends[1:])
        assert held(read(path)) == held(flat(chunks[:reported])), size


def test_marks_that_reached_the_disk_before_their_chunk_are_not_believed(tmp_path: Path) -> None:
    chunks = chunks_of(3)
    path = write(tmp_path / NAME, chunks, finish=False)
    content = bytearray(path.read_bytes())
    for group in look(path).groups[-2:]:
        assert group.chunk
        begin = group.chunk.chunk_start_offset + 60
        content[begin : begin + 100] = bytes(100)
    path.write_bytes(content)
    record(tmp_path, flat(chunks))
    parts = read(tmp_path)
    assert (held(parts), missed(parts)) == (held(flat(chunks)), set())


def test_file_of_which_much_could_be_lost_is_left_as_it_is_and_another_begun(tmp_path: Path) -> None:
    chunks = chunks_of(4)
    path = write(tmp_path / NAME, chunks, finish=False)
    content = bytearray(path.read_bytes())
    (damaged,) = [group.chunk for group in look(path).groups[2:3]]
    assert damaged
    content[damaged.chunk_start_offset + 1 : damaged.chunk_start_offset + 9] = struct.pack("<Q", 2**62)
    path.write_bytes(content)
    record(tmp_path, [*flat(chunks), entries_at("events", [9, 10])])
    assert path.read_bytes() == content
    assert sorted(found.stem[-1] for found in tmp_path.glob("*.mcap")) == ["1", "2"]
    parts = read(tmp_path)
    assert missed(parts) == {("telemetry", p, n) for p in MOTORS for n in range(4, 8)} | {
        ("events", 0, n) for n in (2, 3)
    }
    assert held(parts)["events", 0][-2:] == held([entries_at("events", [9, 10])])["events", 0]


# --- damage -----------------------------------------------------------------------------------------------------------


def check_damaged(path: Path, chunks: Sequence[Sequence[Part]], note: object) -> None:
    """What is read is right, what is not read is told, and of the chunks at most one is lost."""
    try:
        parts = read(path)
    except LogError as error:
        assert str(path) in str(error)  # noqa: PT017  it need not come
        return
    everything = held(flat(chunks))
    found = held(parts)
    for key, rows in found.items():
        ours = [row for row in rows if row in everything.get(key, [])]
        foreign = len(ours) < len(rows)  # the header is damaged: without marks, entries have no stream
        assert not foreign or key[0] == "events", note
    lost = {(*key, row[1]) for key, rows in everything.items() for row in rows if row not in found.get(key, [])}
    assert len(lost) <= 10 or not look(path).own, note
    assert lost <= missed(parts) or not look(path).own, note


def test_any_damaged_byte_costs_one_chunk_at_most_and_is_told(tmp_path: Path) -> None:
    chunks = chunks_of(4)
    path = write(tmp_path / NAME, chunks)
    whole = path.read_bytes()
    last = look(path).groups[-1].mark
    assert last
    for at in range(len(MAGIC), last.offset - 200, 29):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (0x55 if at % 2 else 0x01)]) + whole[at + 1 :])
        check_damaged(path, chunks, at)


def record_heads(path: Path) -> Iterator[int]:
    """Where each record of a file begins."""
    content, at = path.read_bytes(), len(MAGIC)
    while at < len(content) - len(MAGIC):
        yield at
        at += RECORD_HEAD.size + RECORD_HEAD.unpack_from(content, at)[1]


@pytest.mark.parametrize("length", [0, 2**31, 2**40, 2**63, 2**64 - 1])
def test_any_record_may_claim_any_length(tmp_path: Path, length: int) -> None:
    chunks = chunks_of(4)
    path = write(tmp_path / NAME, chunks)
    whole = path.read_bytes()
    last = look(path).groups[-2].mark
    assert last
    for at in record_heads(path):
        if at > last.offset:
            break
        path.write_bytes(whole[: at + 1] + struct.pack("<Q", length) + whole[at + 9 :])
        check_damaged(path, chunks, at)
        path.write_bytes(whole)


def test_chunk_that_claims_to_hold_more_than_memory_is_not_unpacked(tmp_path: Path) -> None:
    chunks = chunks_of(3)
    path = write(tmp_path / NAME, chunks)
    content = bytearray(path.read_bytes())
    chunk = look(path).groups[2].chunk
    assert chunk
    content[chunk.chunk_start_offset + 25 : chunk.chunk_start_offset + 33] = struct.pack("<Q", 2**50)
    path.write_bytes(content)
    parts = read(path)
    reasons = {part.reason for part in parts if isinstance(part, Missed)}
    assert reasons == {f"{path}, chunk at byte {chunk.chunk_start_offset}: says that it holds {2**50} bytes"}
    assert held(parts)["events", 0] == [row for row in held(flat(chunks))["events", 0] if row[1] not in (2, 3)]


def test_file_that_is_gone_from_the_middle_is_told_exactly(tmp_path: Path) -> None:
    chunks = chunks_of(3)
    for chunk in range(3):
        record(tmp_path, flat(chunks[: chunk + 1]))
    files = sorted(tmp_path.glob("*.mcap"))
    assert [file.stem.rpartition("-")[2] for file in files] == ["1", "2", "3"]
    files[1].unlink()
    parts = read(tmp_path)
    assert held(parts) == held(flat([chunks[0], chunks[2]]))
    assert missed(parts) == {("telemetry", p, n) for p in MOTORS for n in range(4, 8)} | {
        ("events", 0, 2),
        ("events", 0, 3),
    }


# --- the recorder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [{"rotate_bytes": 1}, {"rotate_ns": 2 * STEP_NS}], ids=["size", "time"])
def test_files_are_bounded_and_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: dict[str, int]
) -> None:
    monkeypatch.setattr(recorder, "CHUNK_BYTES", 1)
    parts = [samples_at(range(3 * n + 1, 3 * n + 4), 0) for n in range(12)]  # each spans two periods
    for count in (1, 5, 12, 12):  # the last time there is nothing new
        record(tmp_path, parts[:count], **bound)
    assert len(list(tmp_path.glob("*.mcap"))) == 12
    assert (held(read(tmp_path)), missed(read(tmp_path))) == (held(parts), set())


def test_topics_that_are_left_out_for_a_while_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "CHUNK_BYTES", 1)
    chunks = chunks_of(3)
    record(tmp_path, flat(chunks[:1]))
    record(tmp_path, [part for part in flat(chunks[:2]) if part.topic == "telemetry"])
    record(tmp_path, flat(chunks))
    parts = read(tmp_path)
    assert (held(parts), missed(parts)) == (held(flat(chunks)), set())


def test_numbers_of_any_size_that_others_wrote_are_recorded(tmp_path: Path) -> None:
    entry = LogEntry(0, 2**70, 2**65 + 1, 2**80, "*", b"{}")
    path = write(tmp_path / NAME, [[Entries("events", 0, [entry], Position(0, 1))]])
    assert [part.entries for part in read(path) if isinstance(part, Entries)] == [
        [entry._replace(stream=0, seq=1, at_ns=2**64 - 1)]
    ]


def test_keys_of_any_kind_and_number_are_kept_though_channels_are_few(tmp_path: Path) -> None:
    keys = ["*", "joint1", "../x", "", "\n", *(f"id{number}" for number in range(5000)), "joint1"]
    entries = [LogEntry(number, 0, 0, FIRST_NS, key, b"{}") for number, key in enumerate(keys)]
    path = write(tmp_path / NAME, [[Entries("commands", 0, entries, Position(0, len(entries)))]])
    assert [entry.key for part in read(path) if isinstance(part, Entries) for entry in part.entries] == keys
    assert len(look(path).channels) == 4096


def test_directory_has_one_recorder_and_one_arm(tmp_path: Path) -> None:
    with (
        Recorder(tmp_path, rotate_bytes=1),
        pytest.raises(LogError, match="another process"),
        Recorder(tmp_path, rotate_bytes=1),
    ):
        pass
    write(tmp_path / "arm2-20261121T150405Z-1.mcap", chunks_of(1), arm="arm2")
    with pytest.raises(LogError, match="arm arm2, not of arm1"):
        record(tmp_path, flat(chunks_of(1)))


def test_full_disk_is_waited_for_and_what_was_written_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, left = os.pwrite, iter([0, 100, 100, 0])
    readable = []

    def pwrite(fd: int, data: bytes, at: int) -> int:
        """Writes a little and then says that the disk is full, until there is room."""
        if (room := next(left, None)) is None or at < 500:
            return written(fd, data, at)
        written(fd, data[:room], at)
        readable.append(held(read(tmp_path)))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recorder, "RETRY_S", 0)
    monkeypatch.setattr(os, "pwrite", pwrite)
    chunks = chunks_of(2)
    record(tmp_path, flat(chunks[:1]))
    record(tmp_path, flat(chunks))
    assert next(left, None) is None
    assert readable[-1] == held(flat(chunks[:1]))
    assert held(read(tmp_path)) == held(flat(chunks))


def test_recorder_that_is_stopped_on_a_full_disk_says_so_and_the_next_goes_on(tmp_path: Path) -> None:
    chunks = chunks_of(2)
    path = write(tmp_path / NAME, chunks[:1], finish=False)
    written, size = os.pwrite, path.stat().st_size

    def pwrite(fd: int, data: bytes, at: int) -> int:
        if at > size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(fd, data[:100], at)

    with pytest.MonkeyPatch.context() as patch, Recorder(tmp_path, rotate_bytes=1 << 30) as at_work:
        patch.setattr(os, "pwrite", pwrite)
        at_work.stop()
        with pytest.raises(OSError, match="No space left on device; what was reported can be read"):
            asyncio.run(at_work.record(lambda start: Fixed(flat(chunks), start), "beginning"))
    assert look(path).damage == []
    record(tmp_path, flat(chunks))
    assert held(read(tmp_path)) == held(flat(chunks))


# --- other programs ---------------------------------------------------------------------------------------------------


def test_other_programs_read_every_value_and_find_the_file_sound(tmp_path: Path) -> None:
    chunks = chunks_of(3)
    path = write(tmp_path / NAME, chunks)
    check_sound(path)
    records = np.concatenate(
        [part.records for part in flat(chunks) if isinstance(part, Samples) and part.partition == 1]
    )
    with path.open("rb") as file:
        reader = make_reader(file, validate_crcs=True, decoder_factories=[DecoderFactory()])
        summary = reader.get_summary()
        assert summary
        assert summary.statistics
        counts = {summary.channels[n].topic: c for n, c in summary.statistics.channel_message_counts.items()}
        assert counts == {
            "/arm1/joint1/telemetry": 12,
            "/arm1/joint2/telemetry": 12,
            "/arm1/events": 3,
            "/arm1/joint1/events": 3,
        }
        assert (summary.statistics.chunk_count, summary.statistics.metadata_count) == (3, 4)
        decoded = list(reader.iter_decoded_messages(topics=["/arm1/joint2/telemetry"]))
        for name in FIELD_NAMES:
            np.testing.assert_array_equal([getattr(found[3], name) for found in decoded], records[name], name)
        assert [found[2].log_time for found in decoded] == records["sampled_at_ns"].tolist()
        assert [found[2].sequence for found in decoded] == records["seq"].tolist()
        (event, *_) = [m for _, c, m in reader.iter_messages(topics=["/arm1/events"])]
        assert msgspec.json.decode(event.data) == {"type": "test", "motor": "*", "at_ns": event.log_time, "of": 1}
        late = list(reader.iter_messages(starting_at=FIRST_NS + 9 * STEP_NS, topics=["/arm1/joint1/telemetry"]))
        assert [m.sequence for _, _, m in late] == [9, 10, 11, 12]
        metadata = {name: value for channel in summary.channels.values() for name, value in channel.metadata.items()}
        assert metadata.keys() == {"arm", "topic", "partition", "motor"}


def copy(path: Path, to: Path, **options: Any) -> None:
    """The messages of a recording as another program writes them."""
    with path.open("rb") as file, to.open("wb") as out:
        writer = Writer(out, **options)
        writer.start()
        ids: dict[int, int] = {}
        for schema, channel, message in make_reader(file).iter_messages(log_time_order=True):
            assert schema
            if channel.id not in ids:
                number = writer.register_schema(schema.name, schema.encoding, schema.data)
                ids[channel.id] = writer.register_channel(
                    channel.topic, channel.message_encoding, number, channel.metadata
                )
            writer.add_message(ids[channel.id], message.log_time, message.data, message.publish_time, message.sequence)
        writer.finish()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": CompressionType.LZ4, "chunk_size": 500},
        {"compression": CompressionType.NONE},
        {"use_chunking": False},
    ],
    ids=["zstd", "lz4", "unpacked", "no chunks"],
)
def test_recording_that_another_program_wrote_anew_gives_the_same_samples_and_entries(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    chunks = chunks_of(4)
    other = tmp_path / "other.mcap"
    copy(write(tmp_path / NAME, chunks), other, **options)
    parts = read(other)
    found, everything = held(parts), held(flat(chunks))
    for partition in MOTORS:
        assert found["telemetry", partition] == everything["telemetry", partition]
    assert sorted(row[4:] for row in found["events", 0]) == sorted(row[4:] for row in everything["events", 0])
    assert {row[3] for row in found["events", 0]} == {row[3] for row in everything["events", 0]}
    late = held(read(other, ["telemetry"], Time(FIRST_NS + 9 * STEP_NS)))
    assert late["telemetry", 0] == everything["telemetry", 0][8:]
    whole = other.read_bytes()
    for size in range(len(MAGIC), len(whole), 97):
        other.write_bytes(whole[:size])
        try:
            some = held(read(other, ["telemetry"]))
        except LogError as error:
            assert "no channel" in str(error)  # noqa: PT017
            continue
        assert all(rows == everything[key][: len(rows)] for key, rows in some.items())


def test_files_that_are_no_recording_are_named_with_what_they_are(tmp_path: Path) -> None:
    def refused(content: bytes) -> str:
        path = tmp_path / "other.mcap"
        path.write_bytes(content)
        with pytest.raises(LogError) as found:
            read(path)
        assert str(path) in str(found.value)
        return str(found.value)

    assert "is empty" in refused(b"")
    assert "begins with b'SQLite f'" in refused(b"SQLite format 3\0 and more")
    assert "no channel has a schema" in refused(MAGIC)
    assert "no channel has a schema" in refused(MAGIC + bytes(100))
    out = io.BytesIO()
    writer = Writer(out)
    writer.start()
    channel = writer.register_channel("/camera", "json", writer.register_schema("sensor.Image", "jsonschema", b"{}"))
    writer.add_message(channel, 1, b"{}", 1)
    writer.finish()
    assert "there are /camera (sensor.Image)" in refused(out.getvalue())
    with pytest.raises(LogError, match="no MCAP file"):
        read(tmp_path / "..")


def test_recording_is_neither_followed_nor_read_under_a_name(tmp_path: Path) -> None:
    for options in ({"follow": True}, {"name": "x"}):
        with pytest.raises(LogError, match="does not grow for a reader"):
            RecordingLog(tmp_path, TOPICS, **options)


def test_the_schema_of_telemetry_is_that_of_the_contract(tmp_path: Path) -> None:
    from grpc_tools import protoc

    compiled = tmp_path / "telemetry.binpb"
    proto = shipped("telemetry.proto")
    assert protoc.main(["protoc", f"-I{proto.parent}", f"--descriptor_set_out={compiled}", proto.name]) == 0
    given, now = (
        descriptor_pb2.FileDescriptorSet.FromString(p.read_bytes()) for p in (shipped("telemetry.binpb"), compiled)
    )
    assert given == now, "protoc -Iconfig --descriptor_set_out=config/telemetry.binpb telemetry.proto"
