"""The telemetry record: one NumPy row that is, byte for byte, a protobuf message ``servo.Telemetry``.

Every field of the message has a fixed width and is always written, so its encoding has a fixed size and layout:
tags and values alternate at known offsets. A batch is therefore encoded by copying columns, and any protobuf reader
understands each record (config/telemetry.proto is the contract; tests hold this file to it).

    partition u2 | 09 stream u8 | 11 seq u8 | 19 sampled_at_ns i8 | 21 position_rad f8 | 2D velocity_rad_s f4 | ...
    (journal only) |<------------------------------ the message, 76 bytes ------------------------------------->|
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

Records = NDArray[np.void]
"""Stamped samples, dtype RECORD."""
Split: TypeAlias = dict[int, Records]
"""Records by partition."""

_FIELDS = (  # in the order of their field numbers, which count from 1
    ("stream", "<u8"),
    ("seq", "<u8"),
    ("sampled_at_ns", "<i8"),
    ("position_rad", "<f8"),
    ("velocity_rad_s", "<f4"),
    ("temperature_c", "<f4"),
    ("voltage_v", "<f4"),
    ("current_a", "<f4"),
    ("torque_nm", "<f4"),
    ("status", "<u4"),
    ("vendor_error", "<u4"),
    ("round_trip_us", "<f4"),
)
FIELD_NAMES = tuple(name for name, _ in _FIELDS)
UNITS = {
    "sampled_at_ns": "ns",
    "position_rad": "rad",
    "velocity_rad_s": "rad/s",
    "temperature_c": "°C",
    "voltage_v": "V",
    "current_a": "A",
    "torque_nm": "N m",
    "round_trip_us": "µs",
}

_WIRE_TYPE = {8: 1, 4: 5}  # protobuf wire types I64 and I32
_TAGS = {
    name: number << 3 | _WIRE_TYPE[np.dtype(kind).itemsize] for number, (name, kind) in enumerate(_FIELDS, start=1)
}


def _layout(first: Sequence[tuple[str, str]]) -> "np.dtype[np.void]":
    fields = list(first)
    for name, kind in _FIELDS:
        fields += [(f"{name}_tag", "u1"), (name, kind)]
    return np.dtype(fields)


MESSAGE = _layout([])
"""One message, as Kafka holds it."""
RECORD = _layout([("partition", "<u2")])
"""One message with its partition in front, as the journal holds it."""
MESSAGE_SIZE = MESSAGE.itemsize
_MESSAGE_OFFSET = RECORD.itemsize - MESSAGE_SIZE

_TEMPLATE = np.zeros((), RECORD)
for _name, _tag in _TAGS.items():
    _TEMPLATE[f"{_name}_tag"] = _tag


def blank(count: int) -> Records:
    """``count`` records with their tags in place and all values zero."""
    return np.full(count, _TEMPLATE, RECORD)


def by_partition(records: Records) -> list[tuple[int, Records]]:
    """The records of each partition, in their order; views where ``records`` are sorted by partition, as stamped."""
    partitions = records["partition"]
    if (partitions[1:] < partitions[:-1]).any():
        whole = records.view(f"V{RECORD.itemsize}")  # records as a whole are moved faster than their fields
        records = whole[np.argsort(partitions, kind="stable")].view(RECORD)
        partitions = records["partition"]
    edges = [0, *(np.flatnonzero(partitions[1:] != partitions[:-1]) + 1).tolist(), len(records)]
    return [(int(partitions[first]), records[first:end]) for first, end in pairwise(edges) if end > first]


def messages(records: Records) -> list[bytes]:
    """The protobuf message of each record."""
    whole = records.tobytes()
    step = RECORD.itemsize
    return [whole[at + _MESSAGE_OFFSET : at + step] for at in range(0, len(whole), step)]


def decode(values: Sequence[bytes], partition: int) -> Records:
    """Records from messages that this module encoded. Raises ValueError for any other."""
    for value in values:
        if len(value) != MESSAGE_SIZE:
            raise ValueError(f"a telemetry message has {MESSAGE_SIZE} bytes, this one {len(value)}")
    found = np.frombuffer(b"".join(values), MESSAGE)
    for name, tag in _TAGS.items():
        if (wrong := found[f"{name}_tag"][found[f"{name}_tag"] != tag]).size:
            raise ValueError(f"field {name} begins with {wrong[0]:#04x} instead of {tag:#04x}")
    records = np.empty(len(values), RECORD)
    records["partition"] = partition
    records.view("u1").reshape(-1, RECORD.itemsize)[:, _MESSAGE_OFFSET:] = found.view("u1").reshape(-1, MESSAGE_SIZE)
    return records


def decode_json(values: Sequence[bytes], partition: int) -> Records:
    """As ``decode``, from the JSON format."""
    records = blank(len(values))
    records["partition"] = partition
    for number, value in enumerate(values):
        fields = msgspec.json.decode(value, type=dict[str, Any])
        try:
            for name in FIELD_NAMES:
                records[number][name] = np.nan if fields[name] is None else fields[name]
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not the JSON of a sample: {type(error).__name__} {error}") from error
    return records


def as_mapping(record: np.void, motor: str) -> dict[str, Any]:
    """One record with the names of the JSON format; what the motor does not tell (NaN) is None."""
    values: dict[str, Any] = {"motor": motor}
    for name in FIELD_NAMES:
        value = record[name].item()
        values[name] = None if value != value else value  # noqa: PLR0124  NaN is the value that differs from itself
    return values


def json_messages(records: Records, motor: str) -> list[bytes]:
    """The JSON format of each record."""
    encode = msgspec.json.Encoder().encode
    return [encode(as_mapping(record, motor)) for record in records]
