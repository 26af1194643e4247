"""The records as any program may read them: config/telemetry.proto, and the JSON of events and outcomes.

Nothing here comes from the gateway. A message of telemetry has a fixed size and layout, which is worked out from the
compiled .proto: many at once are read as one NumPy array, and some of each many by google.protobuf too, which has to
find the same. What does not fit that layout goes to google.protobuf alone, one by one.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from grpc_tools import protoc
from numpy.typing import NDArray

PROTO = Path(__file__).parent.parent / "config" / "telemetry.proto"
_FIELD = descriptor_pb2.FieldDescriptorProto
_KINDS = {  # type in the .proto -> (wire type, NumPy's name of the same bytes)
    _FIELD.TYPE_FIXED64: (1, "<u8"),
    _FIELD.TYPE_SFIXED64: (1, "<i8"),
    _FIELD.TYPE_DOUBLE: (1, "<f8"),
    _FIELD.TYPE_FIXED32: (5, "<u4"),
    _FIELD.TYPE_SFIXED32: (5, "<i4"),
    _FIELD.TYPE_FLOAT: (5, "<f4"),
}


class JudgeError(Exception):
    """There is nothing to judge, or what holds it does not answer."""


class Unreadable(Exception):
    """A record that is not what its topic holds; the message says why."""


class Sample(NamedTuple):
    """A record of telemetry. ``offset`` is the record's in Kafka, the row's id in a journal."""

    partition: int
    offset: int
    motor: str
    stream: int
    seq: int
    sampled_at_ns: int
    position_rad: float
    velocity_rad_s: float
    temperature_c: float
    status: int
    vendor_error: int


class Block(NamedTuple):
    """Records of one motor that follow each other in its partition. ``values`` has the message's fields."""

    partition: int
    offsets: NDArray[np.int64]
    motor: str
    values: NDArray[np.void]

    def samples(self) -> Iterator[Sample]:
        """One by one."""
        columns = [self.offsets.tolist(), *(self.values[name].tolist() for name in Sample._fields[3:])]
        for offset, *values in zip(*columns, strict=True):
            yield Sample(self.partition, offset, self.motor, *values)


class Entry(NamedTuple):
    """A record of events or outcomes. ``offset`` is the record's in Kafka, the entry's id in a journal."""

    partition: int
    offset: int
    key: str
    stream: int
    seq: int
    value: dict[str, Any]


@cache
def telemetry_class() -> Any:
    """The class of message ``servo.Telemetry``, compiled from config/telemetry.proto."""
    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(directory, "telemetry.pb")
        arguments = ["protoc", f"--proto_path={PROTO.parent}", f"--descriptor_set_out={compiled}", PROTO.name]
        if status := protoc.main(arguments):
            raise JudgeError(f"protoc does not take {PROTO}: exit status {status}")
        files = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("servo.Telemetry"))


@cache
def field_names() -> tuple[str, ...]:
    """Names of the message's fields, which are those of the JSON format."""
    return tuple(field.name for field in telemetry_class().DESCRIPTOR.fields)


@cache
def layout(*before: tuple[str, str]) -> "np.dtype[np.void]":
    """A message as it lies in memory, every field behind its tag of a byte; ``before``: what stands in front of it."""
    fields = list(before)
    for field in telemetry_class().DESCRIPTOR.fields:
        fields += [(f"tag {field.name}", "u1"), (field.name, _KINDS[field.type][1])]
    return np.dtype(fields)


def fits(values: NDArray[np.void]) -> bool:
    """Whether every tag is where it belongs, and every record is numbered; google.protobuf checks the first and last.

    Raises JudgeError if that one finds other values.
    """
    for field in telemetry_class().DESCRIPTOR.fields:
        if (values[f"tag {field.name}"] != field.number << 3 | _KINDS[field.type][0]).any():
            return False
    if not (values["stream"].all() and values["seq"].all()):
        return False
    plain = layout()
    first = values.dtype.itemsize - plain.itemsize
    for value in (values[0], values[-1]):
        message = telemetry_class().FromString(value.tobytes()[first:])
        for name in field_names():
            told, found = getattr(message, name), value[name].item()
            if told != found and not (math.isnan(told) and math.isnan(found)):
                raise JudgeError(f"google.protobuf reads {name} as {told!r}, NumPy as {found!r}")
    return True


def read_block(partition: int, first_offset: int, key: bytes, values: Sequence[bytes]) -> Block | None:
    """Messages of one motor with offsets that count up; None if any does not fit, or is in the JSON format."""
    size = layout().itemsize
    if any(len(value) != size for value in values):
        return None
    records = np.frombuffer(b"".join(values), layout())
    try:
        motor = key.decode()
    except ValueError:
        return None
    offsets = np.arange(first_offset, first_offset + len(values), dtype=np.int64)
    return Block(partition, offsets, motor, records) if fits(records) else None


def read_sample(partition: int, offset: int, key: bytes | None, value: bytes | None) -> Sample:
    """The sample in one record, in either format. Raises Unreadable."""
    value = value or b""
    try:
        motor = (key or b"").decode()
        values = _from_json(value, motor) if value.startswith(b"{") else _from_protobuf(value)
    except (DecodeError, ValueError) as error:
        raise Unreadable(str(error)) from error
    if values["stream"] <= 0 or values["seq"] <= 0:
        raise Unreadable(f"stream {values['stream']}, seq {values['seq']}: both count from 1")
    return Sample(partition, offset, motor, *(values[name] for name in Sample._fields[3:]))


def _from_protobuf(value: bytes) -> dict[str, Any]:
    if len(value) != layout().itemsize:
        raise Unreadable(f"{len(value)} bytes, servo.Telemetry has {layout().itemsize}")
    message = telemetry_class().FromString(value)
    return {name: getattr(message, name) for name in field_names()}


def _from_json(value: bytes, motor: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(value)
    if values.keys() != {"motor", *field_names()}:
        odd = ", ".join(sorted(values.keys() ^ {"motor", *field_names()}))
        raise Unreadable(f"JSON with names missing or unknown: {odd}")
    if values["motor"] != motor:
        raise Unreadable(f"motor {values['motor']!r} under the key {motor!r}")
    for name in ("stream", "seq", "sampled_at_ns"):
        if type(values[name]) is not int:
            raise Unreadable(f"{name} is {values[name]!r}, no integer")
    return {name: math.nan if number is None else number for name, number in values.items()}


def read_value(value: bytes | None) -> dict[str, Any]:
    """The object in a record of events or outcomes. Raises Unreadable."""
    try:
        found = json.loads(value or b"")
    except ValueError as error:
        raise Unreadable(str(error)) from error
    if not isinstance(found, dict) or not isinstance(found.get("motor"), str) or type(found.get("at_ns")) is not int:
        raise Unreadable("no JSON object with motor and at_ns")
    return found
