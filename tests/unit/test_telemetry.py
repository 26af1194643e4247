"""The telemetry record is, byte for byte, the message of config/telemetry.proto, and nothing else passes for one."""

import re
import struct
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from drivers.motor import Status
from gateway import telemetry
from gateway.telemetry import FIELD_NAMES, MESSAGE_SIZE, as_mapping, blank, decode, messages

PROTO = Path(__file__).parents[2] / "config" / "telemetry.proto"

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
F32 = st.floats(width=32)
VALUES = st.fixed_dictionaries(
    {
        "stream": U64, "seq": U64, "sampled_at_ns": st.integers(-(2**63), 2**63 - 1), "position_rad": st.floats(),
        "velocity_rad_s": F32, "temperature_c": F32, "voltage_v": F32, "current_a": F32, "torque_nm": F32,
        "status": U32, "vendor_error": U32, "round_trip_us": F32,
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def message_type(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``servo.Telemetry`` as any protobuf program has it, compiled from the contract just now."""
    from grpc_tools import protoc

    compiled = tmp_path_factory.mktemp("proto") / "telemetry.binpb"
    assert protoc.main(["protoc", f"-I{PROTO.parent}", f"--descriptor_set_out={compiled}", str(PROTO)]) == 0
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("servo.Telemetry"))


def make_record(values: dict[str, Any], partition: int = 0) -> telemetry.Records:
    records = blank(1)
    records["partition"] = partition
    for name, value in values.items():
        records[name] = value
    return records


def bits(values: dict[str, Any]) -> dict[str, Any]:
    """Values that compare as they are stored: NaN equals NaN (payloads aside), and -0.0 is not 0.0."""
    floats = {name: struct.pack("<d", nan if isnan(v) else v) for name, v in values.items() if isinstance(v, float)}
    return values | floats


def test_fields_have_the_names_and_numbers_of_the_contract(message_type: Any) -> None:
    fields = sorted(message_type.DESCRIPTOR.fields, key=lambda field: field.number)
    assert tuple(field.name for field in fields) == FIELD_NAMES
    assert [field.number for field in fields] == list(range(1, len(FIELD_NAMES) + 1))


@given(values=VALUES, partition=st.integers(0, 65535))
def test_any_protobuf_program_reads_what_the_gateway_writes(
    message_type: Any, values: dict[str, Any], partition: int
) -> None:
    (raw,) = messages(make_record(values, partition))
    assert len(raw) == MESSAGE_SIZE
    read = message_type.FromString(raw)
    assert bits({name: getattr(read, name) for name in FIELD_NAMES}) == bits(values)


@given(values=VALUES)
def test_the_gateway_writes_the_very_bytes_of_protobuf(message_type: Any, values: dict[str, Any]) -> None:
    written = message_type(**values).SerializeToString(deterministic=True)
    (ours,) = messages(make_record(values))
    # protobuf leaves out fields that are zero; the gateway never does
    kept = b""
    at = 0
    for _, kind in telemetry._FIELDS:
        size = 1 + np.dtype(kind).itemsize
        field = ours[at : at + size]
        at += size
        kept += field if field[1:] != bytes(size - 1) else b""
    assert written == kept
    assert at == len(ours)


@given(batch=st.lists(VALUES, max_size=5), partition=st.integers(0, 65535))
def test_messages_come_back_as_the_same_records(batch: list[dict[str, Any]], partition: int) -> None:
    records = np.concatenate([make_record(values, partition) for values in batch]) if batch else blank(0)
    assert decode(messages(records), partition).tobytes() == records.tobytes()


@given(st.one_of(st.binary(max_size=2 * MESSAGE_SIZE), st.binary(min_size=MESSAGE_SIZE, max_size=MESSAGE_SIZE)))
def test_bytes_that_are_no_message_are_refused(raw: bytes) -> None:
    try:
        records = decode([raw], 3)
    except ValueError:
        return
    assert messages(records) == [raw]


@pytest.mark.parametrize("number", range(len(FIELD_NAMES)))
def test_message_with_one_wrong_tag_is_refused_naming_the_field(number: int) -> None:
    name = FIELD_NAMES[number]
    raw = bytearray(messages(blank(1))[0])
    fields = telemetry.MESSAGE.fields
    assert fields is not None
    raw[fields[f"{name}_tag"][1]] ^= 0x80
    with pytest.raises(ValueError, match=f"field {name} "):
        decode([bytes(raw)], 0)


@pytest.mark.parametrize("size", [0, 1, MESSAGE_SIZE - 1, MESSAGE_SIZE + 1])
def test_message_of_another_size_is_refused_with_both_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"{MESSAGE_SIZE} bytes, this one {size}"):
        decode([bytes(size)], 0)


def test_status_bits_in_the_contract_are_the_drivers() -> None:
    comment = dict(re.findall(r"(0x[0-9A-F]{4}) (?:fault: )?(\w+)", PROTO.read_text()))
    told = {int(bit, 16): word for bit, word in comment.items()}
    assert told.pop(int(Status.faults())) == "any"
    assert told == {int(flag): str(flag.name).lower().removeprefix("fault_") for flag in Status}


@given(VALUES)
def test_json_names_and_values_come_back_except_that_nan_is_null(values: dict[str, Any]) -> None:
    (record,) = make_record(values, 3)
    mapping = as_mapping(record, "joint1")
    assert list(mapping) == ["motor", *FIELD_NAMES]
    assert {name for name in FIELD_NAMES if mapping[name] is None} == {k for k, v in values.items() if isnan(v)}
    assert {name: mapping[name] for name in FIELD_NAMES if mapping[name] is not None} == {
        name: value for name, value in values.items() if not isnan(value)
    }


def test_json_of_a_silent_sensor_is_null() -> None:
    record = make_record({"torque_nm": nan, "seq": 5})
    (raw,) = telemetry.json_messages(record, "joint1")
    assert b'"motor":"joint1"' in raw
    assert b'"seq":5' in raw
    assert b'"torque_nm":null' in raw
