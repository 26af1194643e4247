"""The judge refuses what must be refused: every fault is written into a real topic and found at its exact place."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from hil.judge import Fault, FaultKind, JudgeError, Verdict, judge, telemetry_class
from tests.conftest import Kafka
from tests.system.rig import create_topic, send

STREAM = 7
NAN = float("nan")


def message(seq: int, **values: Any) -> bytes:
    """A sample as the contract has it: every field is written, so none may be zero here."""
    fields = {"stream": STREAM, "seq": seq, "sampled_at_ns": 1000 + seq, "position_rad": 0.5, "velocity_rad_s": 0.1}
    rest = dict.fromkeys(("temperature_c", "voltage_v", "current_a", "torque_nm"), NAN)
    flags = {"status": 1, "vendor_error": 1, "round_trip_us": 100.0}
    encoded: bytes = telemetry_class()(**{**fields, **rest, **flags, **values}).SerializeToString()
    return encoded


def in_json(seq: int, motor: str = "joint1", **values: Any) -> bytes:
    fields = {"stream": STREAM, "seq": seq, "sampled_at_ns": 1000 + seq, "position_rad": 0.5, "velocity_rad_s": 0.1}
    rest = dict.fromkeys(("temperature_c", "voltage_v", "current_a", "torque_nm"), None)
    flags = {"status": 1, "vendor_error": 1, "round_trip_us": 100.0}
    return json.dumps({"motor": motor, **fields, **rest, **flags, **values}).encode()


Batch = Sequence[tuple[int, bytes | None, bytes]]


async def judged(kafka: Kafka, arm: str, batch: Batch) -> Verdict:
    await create_topic(kafka.bootstrap, f"servo.{arm}.telemetry", 2)
    await send(kafka.bootstrap, f"servo.{arm}.telemetry", batch)
    return await judge(kafka.bootstrap, arm)


def motor1(*values: bytes) -> Batch:
    return [(0, b"joint1", value) for value in values]


@pytest.mark.parametrize("encode", [message, in_json])
async def test_a_complete_topic_is_fine(kafka: Kafka, arm_name: str, encode: Any) -> None:
    verdict = await judged(kafka, arm_name, motor1(*(encode(seq) for seq in range(1, 6))))
    assert verdict.ok, verdict
    assert (verdict.records, verdict.streams) == (5, 1)
    (partition,) = verdict.partitions
    assert (partition.motor, partition.last_seq, partition.span_s) == ("joint1", 5, 4e-9)
    assert partition.rate_hz == pytest.approx(1e9)


async def test_a_new_stream_begins_at_one_again(kafka: Kafka, arm_name: str) -> None:
    verdict = await judged(kafka, arm_name, motor1(message(1), message(2), message(1, stream=8, sampled_at_ns=2000)))
    assert verdict.ok, verdict
    assert verdict.streams == 2


@pytest.mark.parametrize(
    ("batch", "fault"),
    [
        pytest.param(
            motor1(message(1), message(4)), Fault(FaultKind.GAP, 0, 1, "seq 2", "seq 4"), id="a gap"
        ),
        pytest.param(motor1(message(2)), Fault(FaultKind.GAP, 0, 0, "seq 1", "seq 2"), id="a gap at the beginning"),
        pytest.param(
            motor1(message(1), message(2), message(2)), Fault(FaultKind.REPEAT, 0, 2, "seq 3", "seq 2"), id="a repeat"
        ),
        pytest.param(
            motor1(message(1), message(3), message(2, sampled_at_ns=1003)),
            Fault(FaultKind.DISORDER, 0, 2, "seq 4", "seq 2"),
            id="disorder",
        ),
        pytest.param(
            motor1(message(1), message(1, stream=8), message(2)),
            Fault(FaultKind.DISORDER, 0, 2, "stream 8", "stream 7 again"),
            id="a stream that comes back",
        ),
        pytest.param(
            motor1(message(1, sampled_at_ns=500), message(2, sampled_at_ns=499)),
            Fault(FaultKind.TIME, 0, 1, "sampled_at_ns 500 or later", "499"),
            id="falling time",
        ),
        pytest.param(
            [(0, b"joint1", message(1)), (0, b"joint2", message(1))],
            Fault(FaultKind.KEY, 0, 1, "key 'joint1'", "key 'joint2'"),
            id="two motors in a partition",
        ),
        pytest.param(
            [(0, b"joint1", message(1)), (1, b"joint1", message(1))],
            Fault(FaultKind.KEY, 1, 0, "'joint1' in partition 0 alone", "it here too"),
            id="a motor in two partitions",
        ),
        pytest.param(
            [(0, None, message(1))], Fault(FaultKind.KEY, 0, 0, "the motor's name", "no key"), id="no key"
        ),
        pytest.param(
            motor1(message(1, position_rad=NAN)),
            Fault(FaultKind.POSITION, 0, 0, "a finite position_rad", "nan"),
            id="a position that is no number",
        ),
        pytest.param(
            motor1(in_json(1, position_rad=None)),
            Fault(FaultKind.POSITION, 0, 0, "a finite position_rad", "nan"),
            id="no position",
        ),
    ],
)  # fmt: skip
async def test_a_fault_is_found_at_its_place(kafka: Kafka, arm_name: str, batch: Batch, fault: Fault) -> None:
    verdict = await judged(kafka, arm_name, batch)
    assert not verdict.ok
    assert verdict.faults == (fault,)
    assert f"partition {fault.partition}, offset {fault.offset}: {fault.kind}" in str(verdict)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"hello", id="text"),
        pytest.param(b"", id="nothing"),
        pytest.param(bytes(76), id="zeros of the right length"),
        pytest.param(b"\xff" * 76, id="noise of the right length"),
        pytest.param(message(2)[:-1], id="half a message"),
        pytest.param(message(2) + b"\x6d\0\0\0\0", id="a message with more behind it"),
        pytest.param(b"{", id="half an object"),
        pytest.param(b'{"seq": 2}', id="an object without the names"),
        pytest.param(in_json(2, motor="joint2"), id="another motor than the key says"),
        pytest.param(in_json(2, sampled_at_ns="2"), id="text for a number"),
    ],
)
async def test_foreign_bytes_are_found_and_break_nothing(kafka: Kafka, arm_name: str, value: bytes) -> None:
    verdict = await judged(kafka, arm_name, motor1(message(1), value, message(2)))
    assert [(fault.kind, fault.offset) for fault in verdict.faults] == [(FaultKind.FOREIGN, 1)]
    assert verdict.partitions[0].last_seq == 2


async def test_a_gap_that_an_event_tells_is_counted_apart(kafka: Kafka, arm_name: str) -> None:
    async def tell(from_seq: int, to_seq: int) -> None:
        event = {"type": "telemetry.gap", "motor": "joint1", "stream": str(STREAM), "at_ns": 1}
        value = json.dumps({**event, "from_seq": from_seq, "to_seq": to_seq}).encode()
        await send(kafka.bootstrap, f"servo.{arm_name}.events", [(0, b"joint1", value)])

    await create_topic(kafka.bootstrap, f"servo.{arm_name}.events", 2)
    await tell(2, 3)
    half = await judged(kafka, arm_name, motor1(message(1), message(6)))
    assert (half.ok, half.partitions[0].gaps, half.partitions[0].told_gaps) == (False, 2, 2)
    assert [str(fault) for fault in half.faults] == ["partition 0, offset 1: gap: expected seq 4, found seq 6"]
    await tell(4, 5)
    whole = await judge(kafka.bootstrap, arm_name)
    assert (whole.ok, whole.partitions[0].gaps, whole.partitions[0].told_gaps) == (True, 0, 4)


async def test_many_faults_are_all_counted_and_some_shown(kafka: Kafka, arm_name: str) -> None:
    verdict = await judged(kafka, arm_name, motor1(*[message(1)] * 101))
    assert verdict.fault_count == 100
    assert len(verdict.faults) == 50
    assert "... and 50 more" in str(verdict)


async def test_no_topic_is_no_proof(kafka: Kafka, arm_name: str) -> None:
    with pytest.raises(JudgeError, match=f"no topic servo.{arm_name}.telemetry"):
        await judge(kafka.bootstrap, arm_name)


async def test_an_empty_topic_is_no_proof(kafka: Kafka, arm_name: str) -> None:
    verdict = await judged(kafka, arm_name, [])
    assert [fault.kind for fault in verdict.faults] == [FaultKind.EMPTY]


def run(kafka: Kafka, arm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hil.judge", "--bootstrap", kafka.bootstrap, "--arm", arm, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


async def test_the_command_prints_faults_and_fails(kafka: Kafka, arm_name: str) -> None:
    await judged(kafka, arm_name, motor1(message(1), message(3)))
    done = run(kafka, arm_name)
    assert done.returncode == 1
    assert "partition 0, offset 1: gap: expected seq 2, found seq 3" in done.stdout
    told = json.loads(run(kafka, arm_name, "--json").stdout)
    assert (told["ok"], told["fault_count"], told["partitions"][0]["gaps"]) == (False, 1, 1)


async def test_the_command_succeeds_where_nothing_is_wrong(kafka: Kafka, arm_name: str) -> None:
    await judged(kafka, arm_name, motor1(message(1)))
    done = run(kafka, arm_name)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_says_why_there_is_nothing_to_judge(kafka: Kafka, arm_name: str) -> None:
    done = run(kafka, arm_name)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"no topic servo.{arm_name}.telemetry" in done.stderr


def test_the_judge_imports_nothing_of_the_gateway() -> None:
    code = "import sys, hil.judge; print([m for m in sys.modules if m.split('.')[0] in ('gateway', 'drivers')])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.strip() == "[]"
