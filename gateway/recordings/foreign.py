"""MCAP files that other programs wrote, or wrote anew: those channels are read that have schemas of ours.

They have no marks: telemetry is numbered as it says itself, entries by their sequence in MCAP.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import pairwise

import numpy as np
from mcap.data_stream import ReadDataStream
from mcap.opcode import Opcode
from mcap.records import Channel, Message

from gateway import telemetry
from gateway.log_reader import Entries, LogEntry, LogError, Missed, Part, Position, Samples, Topic
from gateway.recordings.file import BROKEN, Group, RecordingFile
from gateway.recordings.recording import RECORD_HEAD, SCHEMA_TOPICS


def arm_of(file: RecordingFile) -> str:
    """Whose recording it is. Raises LogError if nothing in it can be read as the log."""
    if not file.channels and file.groups:  # they are within the chunks
        list(parts_of(file, file.groups[0]))
    ours = [channel for channel in file.channels.values() if _topic(file, channel)]
    if not ours:
        held = [f"{channel.topic} ({_schema(file, channel)})" for channel in file.channels.values()]
        raise LogError(
            f"recording {file.path}: no channel has a schema of {', '.join(SCHEMA_TOPICS)}; "
            f"there are {', '.join(held) or 'none'}"
        )
    return ours[0].metadata.get("arm") or ours[0].topic.strip("/").split("/")[0]


def parts_of(file: RecordingFile, group: Group) -> Iterator[Part]:
    """What of ours a chunk holds; of one that cannot be read nobody can tell what is missed."""
    messages: dict[int, list[Message]] = defaultdict(list)
    why = ""
    try:
        for message in _walk(file, file.messages(group)):
            messages[message.channel_id].append(message)
    except BROKEN as error:
        why = f"{file.path}, {group}: {error}"
    for channel in file.channels.values():
        if topic := _topic(file, channel):
            found = messages[channel.id]
            partition = channel.metadata.get("partition", "")
            at = int(partition) if partition.isdecimal() else channel.id
            motor = channel.metadata.get("motor") or channel.topic.strip("/").split("/")[-2:][0]
            if found and topic == "telemetry":
                yield from _samples(found, at, motor, str(file.path))
            elif found:
                entries = [LogEntry(max(m.sequence - 1, 0), 0, m.sequence, m.log_time, motor, m.data) for m in found]
                yield Entries(topic, at, entries, Position(0, entries[-1].offset + 1))
            if why:
                yield Missed(topic, at, 0, 0, None, why, Position(0, 0))


def _schema(file: RecordingFile, channel: Channel) -> str:
    schema = file.schemas.get(channel.schema_id)
    return schema.name if schema else "no schema"


def _topic(file: RecordingFile, channel: Channel) -> Topic | None:
    return SCHEMA_TOPICS.get(_schema(file, channel))


def _walk(file: RecordingFile, data: bytes) -> Iterator[Message]:
    """The messages among records; what these say of channels is noted."""
    at = 0
    while at < len(data):
        opcode, length = RECORD_HEAD.unpack_from(data, at)
        begin, at = at + RECORD_HEAD.size, at + RECORD_HEAD.size + length
        if at > len(data):
            raise ValueError(f"a record of {length} bytes, where {len(data) - begin} are left")
        content = ReadDataStream(BytesIO(data[begin:at]))
        if opcode == Opcode.MESSAGE:
            yield Message.read(content, length)
        elif opcode in {Opcode.SCHEMA, Opcode.CHANNEL}:
            file.note(opcode, content)


def _samples(messages: Sequence[Message], partition: int, motor: str, where: str) -> Iterator[Part]:
    """Samples of one motor, a part for each stream; a message that is none becomes a Missed."""
    try:
        records = telemetry.decode([message.data for message in messages], partition)
    except ValueError as error:
        if len(messages) > 1:  # the others are good
            half = len(messages) // 2
            yield from _samples(messages[:half], partition, motor, where)
            yield from _samples(messages[half:], partition, motor, where)
        else:
            offset = max(messages[0].sequence - 1, 0)
            why = f"{where}: unreadable: {error}"
            yield Missed("telemetry", partition, 0, offset, offset, why, Position(0, offset + 1))
        return
    streams = records["stream"]
    for first, end in pairwise([0, *(np.flatnonzero(streams[1:] != streams[:-1]) + 1).tolist(), len(records)]):
        offsets = records["seq"][first:end].astype(np.int64) - 1
        after = Position(int(streams[first]), int(offsets[-1]) + 1)
        yield Samples(partition, motor, offsets, records[first:end], after)
