"""The files in config/: what a user edits or hands to another tool stays true to the code."""

import configparser
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from drivers.motor import SAMPLE, Status
from gateway.config import (
    Arm,
    CanBus,
    CommandKey,
    Commands,
    Journal,
    Kafka,
    Motor,
    SerialBus,
    Simulation,
    Table,
    load,
)  # fmt: skip
from gateway.config_schema import schema_text

CONFIG = Path(__file__).parents[2] / "config"


def test_the_simulated_arm_has_six_motors_on_two_buses_and_needs_nothing_else() -> None:
    config = load(CONFIG / "simulated-arm.toml")
    assert config.arm.name == "sim-arm"
    assert config.kafka is None
    assert config.simulation is not None
    assert config.simulation.motion == "wave"
    assert [(bus.name, bus.type, bus.rate_hz) for bus in config.buses] == [
        ("can0", "can", 200),
        ("serial0", "serial", 200),
    ]
    assert [motor.id for motor in config.motors_on("can0")] == [1, 2, 3]
    assert [motor.id for motor in config.motors_on("serial0")] == [4, 5, 6]
    assert [motor.partition for motor in config.motors] == [0, 1, 2, 3, 4, 5]


def test_the_real_arm_is_real() -> None:
    config = load(CONFIG / "real-arm.toml")
    assert config.simulation is None
    assert config.kafka is not None
    assert len(config.motors) == 6


@pytest.mark.parametrize("table", [Arm, Kafka, Journal, Commands, CommandKey, CanBus, SerialBus, Motor, Simulation])
def test_the_real_arm_shows_every_key(table: type[Table]) -> None:
    shown = re.findall(r"^(?:# )?([a-z0-9_]+) = ", (CONFIG / "real-arm.toml").read_text(), re.MULTILINE)
    assert set(table.model_fields) - {"options", "keys"} <= set(shown)


def test_the_schema_in_the_file_is_the_codes() -> None:
    assert (CONFIG / "servo-gateway.schema.json").read_text() == schema_text()


def test_the_schema_is_written_by_running_its_module() -> None:
    run = subprocess.run([sys.executable, "-m", "gateway.config_schema"], capture_output=True, text=True, check=True)
    assert run.stdout == schema_text()


def test_the_schema_has_the_files_tables_and_says_what_each_key_is() -> None:
    schema = json.loads(schema_text())
    assert set(schema["properties"]) == {"arm", "kafka", "journal", "commands", "bus", "motor", "simulation"}
    for name, table in schema["$defs"].items():
        for key, field in table["properties"].items():
            assert field.get("description") or field == {}, f"{name}.{key}"
    rules = schema["$defs"]["Motor"]["allOf"]
    by_family = {rule["if"]["properties"]["protocol"]["const"]: rule["then"]["properties"] for rule in rules}
    assert by_family["damiao"]["master_id"]["type"] == "integer"
    assert by_family["feetech_sts"] == {"id": {"minimum": 0, "maximum": 253}}


TELEMETRY = [
    "fixed64 stream", "fixed64 seq", "sfixed64 sampled_at_ns", "double position_rad", "float velocity_rad_s",
    "float temperature_c", "float voltage_v", "float current_a", "float torque_nm", "fixed32 status",
    "fixed32 vendor_error", "float round_trip_us",
]  # fmt: skip


def test_the_telemetry_message_keeps_its_fields_and_numbers(tmp_path: Path) -> None:
    from grpc_tools import protoc

    compiled = tmp_path / "telemetry.binpb"
    include = str(files("grpc_tools") / "_proto")
    arguments = ["protoc", f"-I{CONFIG}", f"-I{include}", f"--descriptor_set_out={compiled}", "telemetry.proto"]
    assert protoc.main(arguments) == 0
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file
    assert (file.package, file.syntax) == ("servo", "proto3")
    (message,) = file.message_type
    types = descriptor_pb2.FieldDescriptorProto.Type
    found = [f"{types.Name(field.type).removeprefix('TYPE_').lower()} {field.name}" for field in message.field]
    assert message.name == "Telemetry"
    assert found == TELEMETRY
    assert [field.number for field in message.field] == list(range(1, 13))
    assert [field.name for field in message.field][2:] == list(SAMPLE.names or ())[1:]


def test_the_telemetry_message_explains_every_status_bit() -> None:
    told = dict(re.findall(r"(0x[0-9A-F]{4}) (fault: [a-z]+|[a-z]+)", (CONFIG / "telemetry.proto").read_text()))
    names = {f"0x{bit:04X}": str(bit.name).lower().replace("_", ": ") for bit in Status}
    assert told == {**names, f"0x{Status.faults():04X}": "any"}


def test_the_service_is_restarted_stopped_in_time_and_may_be_real_time() -> None:
    unit = configparser.RawConfigParser(strict=False, comment_prefixes="#")
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # typeshed's way to keep the case of keys
    unit.read(CONFIG / "servo-gateway.service")
    service = dict(unit["Service"])
    assert service["ExecStart"].endswith("servo-gateway run /etc/servo-gateway/arm.toml")
    expected = {"Restart": "always", "TimeoutStopSec": "10", "KillSignal": "SIGTERM", "StateDirectory": "servo-gateway"}
    assert expected.items() <= service.items()
    assert int(service["LimitRTPRIO"]) > 0
    assert service["RestartPreventExitStatus"] == "2"
    assert "AF_CAN" in service["RestrictAddressFamilies"]
