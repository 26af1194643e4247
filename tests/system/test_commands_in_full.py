"""Commands in full against a running gateway: emergency stop, several motors in one, streams, bad records."""

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from drivers.clock import SECOND, epoch_ns
from gateway import local_commands
from gateway.journal import JournalReader
from gateway.kafka import running
from hil.arm import MOTORS, SAMPLE_CONFIG, Arm
from hil.kafka import Broker
from tests.conftest import Kafka
from tests.system.conftest import MakeArm
from tests.system.rig import create_topic, pass_time, produce, put_on_links, see

pytestmark = pytest.mark.at_full_rate

SPEED_RAD_S = 0.2
STILL_RAD_S = 0.02
STILL_RAD = 0.01  # an encoder's step and a motor's settling
TOLERANCE_RAD = 0.02  # the configuration's
ON_CAN = MOTORS[:3]
DONE = ("done", None, ANY)
MOST = 20 << 20  # bytes of a record that this broker takes


@pytest.fixture
def patient(tmp_path: Path) -> Path:
    """The sample, in which a velocity is good for a minute."""
    path = tmp_path / "patient.toml"
    path.write_text(patiently(SAMPLE_CONFIG.read_text()))
    return path


def patiently(text: str) -> str:
    return text.replace('name = "sim-arm"\n', 'name = "sim-arm"\nsetpoint_timeout_ms = 60_000\n', 1)


def give(arm: Arm, command_id: str, motor: str, kind: str, **fields: Any) -> None:
    """Put in a command on this machine; it is good for half a minute."""
    local_commands.append(arm.state / "commands.db", record(command_id, motor, kind, **fields))


def record(command_id: str, motor: str, kind: str, **fields: Any) -> bytes:
    good = {"id": command_id, "motor": motor, "kind": kind, "ttl_ms": 30_000, "issued_at_ns": epoch_ns()}
    return json.dumps(good | fields).encode()


def kept(arm: Arm, topic: str) -> list[dict[str, Any]]:
    """Records of a JSON topic in the journal."""
    with closing(JournalReader(arm.state / "journal.db")) as reader:
        return [json.loads(entry.value) for entry in reader.entries(0, 100_000, topic)]


def finals(arm: Arm) -> dict[str, dict[str, Any]]:
    """{command: its final outcome}; there is never more than one."""
    found: dict[str, dict[str, Any]] = {}
    for outcome in kept(arm, "outcomes"):
        if outcome["state"] != "accepted":
            assert outcome["command_id"] not in found, (outcome, found[outcome["command_id"]])
            found[outcome["command_id"]] = outcome
    return found


def final(arm: Arm, command_id: str) -> tuple[str, str | None, str]:
    """State, reason and detail of a command's final outcome, once it is there."""
    arm.wait(lambda: command_id in finals(arm), f"the outcome of {command_id}")
    outcome = finals(arm)[command_id]
    return outcome["state"], outcome["reason"], outcome["detail"]


def speeds(status: dict[str, Any]) -> dict[str, float]:
    return {motor["motor"]: abs(motor["velocity_rad_s"]) for motor in status["motors"]}


def run_all(arm: Arm, prefix: str = "run") -> None:
    """Let every motor run at a speed, and return when all do."""
    for motor in MOTORS:
        give(arm, f"{prefix}-{motor}", motor, "velocity", value=SPEED_RAD_S)
    for motor in MOTORS:
        assert final(arm, f"{prefix}-{motor}") == DONE
    arm.wait_status(lambda status: min(speeds(status).values()) > SPEED_RAD_S / 2, "all motors run")


def wait_all_still(arm: Arm) -> None:
    arm.wait_status(lambda status: max(speeds(status).values()) < STILL_RAD_S, "all motors stand")


# --- emergency stop ---------------------------------------------------------------------------------------------------


def test_emergency_stop_stops_all_motors_and_holds_over_kill_and_restart_until_it_is_reset(
    make_arm: MakeArm, patient: Path
) -> None:
    arm = make_arm(motion="still", sample=patient)
    arm.start()
    run_all(arm)
    stop = arm.order("*", "estop")
    assert (stop.returncode, stop.stderr) == (0, ""), stop.stdout
    wait_all_still(arm)
    arm.kill()
    arm.start()
    assert arm.status()["estop"]["why"].startswith("command ")
    assert "EMERGENCY STOP since " in arm.cli("status", str(arm.config)).stdout
    assert json.loads(arm.cli("status", str(arm.config), "--json").stdout)["estop"]["by"] == "local"
    give(arm, "refused", "joint6", "velocity", value=SPEED_RAD_S)
    state, reason, detail = final(arm, "refused")
    assert (state, reason) == ("rejected", "estop_latched")
    assert "reset_estop" in detail
    assert arm.order("*", "reset_estop").returncode == 0
    assert arm.order("*", "enable").returncode == 0
    run_all(arm, "again")
    assert arm.status()["estop"] is None
    told = [event["type"] for event in kept(arm, "events") if event["type"].startswith("estop.")]
    assert told == ["estop.latched", "estop.latched", "estop.reset"]  # the next run tells what it found


def test_emergency_stop_is_given_on_this_machine_while_kafka_is_away(make_arm: MakeArm, own_broker: Broker) -> None:
    arm = make_arm(own_broker.bootstrap, motion="still")
    arm.start()
    arm.wait_status(lambda status: status["kafka"]["state"] == "up", "kafka is there")
    own_broker.kill()
    stop = arm.order("*", "estop")
    assert (stop.returncode, stop.stderr) == (0, ""), stop.stdout
    arm.wait_status(lambda status: status["estop"] is not None, "it is latched")


def test_emergency_stop_by_a_wrong_clock_expires_as_a_backlog_and_is_done_when_it_is_read_live(
    make_arm: MakeArm, kafka: Kafka
) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    asyncio.run(create_topic(kafka.bootstrap, f"servo.{arm.name}.commands", len(MOTORS)))
    an_hour_ago = epoch_ns() - 3600 * SECOND
    produce(arm, "commands", 0, [record("backlog", "*", "estop", issued_at_ns=an_hour_ago)])
    arm.start()
    assert final(arm, "backlog")[:2] == ("expired", "stale")
    produce(arm, "commands", 0, [record("live", "*", "estop", issued_at_ns=an_hour_ago)])
    assert final(arm, "live") == ("done", None, "latched; 6 stopped")


@pytest.mark.parametrize("comes_back", [True, False])
def test_emergency_stop_reaches_the_other_buses_while_one_worker_hangs_and_that_one_when_it_can(
    make_arm: MakeArm, patient: Path, comes_back: bool
) -> None:
    arm = make_arm(motion="still", sample=patient)
    arm.start()
    run_all(arm)
    hung = arm.worker_of("serial0")
    os.kill(hung, signal.SIGSTOP)
    try:
        give(arm, "e", "*", "estop")
        arm.wait(lambda: max(speeds(arm.status())[name] for name in ON_CAN) < STILL_RAD_S, "the other bus stands")
        assert "e" not in finals(arm) or not comes_back
    finally:
        if comes_back:
            os.kill(hung, signal.SIGCONT)
    wait_all_still(arm)
    state, reason, _ = final(arm, "e")
    if comes_back and (state, reason) != ("failed", "interrupted"):  # replaced before it was let go on
        assert state == "done"
    arm.wait_status(lambda status: all(motor["state"] == "online" for motor in status["motors"]), "all online again")
    wait_all_still(arm)


# --- motors that stop themselves --------------------------------------------------------------------------------------


def test_motor_that_gets_too_hot_stops_by_itself_until_its_fault_is_cleared(make_arm: MakeArm, tmp_path: Path) -> None:
    sample = tmp_path / "careful.toml"
    text = patiently(SAMPLE_CONFIG.read_text())
    sample.write_text(text.replace("temperature_c", 'stop_on = ["over_temperature"]\ntemperature_c'))
    arm = make_arm(motion="still", sample=sample)
    arm.start()
    run_all(arm)
    arm.play({"joint6": "temperature_c = 67"})
    arm.wait_status(lambda status: speeds(status)["joint6"] < STILL_RAD_S, "the hot one stands")
    assert speeds(arm.status())["joint5"] > STILL_RAD_S
    assert arm.status()["motors"][5]["latched"]["why"] == "67 C, limit 65 C"
    shown = " ".join(arm.cli("status", str(arm.config)).stdout.split())  # it may be wrapped
    assert re.search("joint6 stopped since .* by gateway: 67 C, limit 65 C; until: command joint6 clear_fault", shown)
    give(arm, "hot", "joint6", "clear_fault")
    assert final(arm, "hot")[:2] == ("rejected", "motor_latched")
    arm.play({"joint6": "temperature_c = 30"})
    arm.wait_status(lambda status: status["motors"][5]["temperature_c"] < 40, "it cools down")
    give(arm, "before", "joint6", "velocity", value=SPEED_RAD_S)
    assert final(arm, "before")[:2] == ("rejected", "motor_latched")
    give(arm, "clear", "joint6", "clear_fault")
    assert final(arm, "clear") == DONE
    give(arm, "after", "joint6", "velocity", value=SPEED_RAD_S)
    assert final(arm, "after") == DONE
    told = [event["type"] for event in kept(arm, "events") if event["type"] in ("motor.latched", "motor.released")]
    assert told == ["motor.latched", "motor.released"]


# --- several motors in one command ------------------------------------------------------------------------------------

TARGETS = {motor: 0.1 * number for number, motor in enumerate(MOTORS, start=1)}


def test_targets_move_six_motors_on_two_buses_and_are_done_when_all_are_there(make_arm: MakeArm) -> None:
    arm = make_arm(motion="still")
    arm.start()
    give(arm, "all", "*", "position", targets=TARGETS, velocity_rad_s=1.0)
    state, _, detail = final(arm, "all")
    assert state == "done", detail
    assert all(f"{motor} at " in detail for motor in MOTORS)
    arm.wait_status(
        lambda status: all(
            abs(motor["position_rad"] - TARGETS[motor["motor"]]) <= TOLERANCE_RAD for motor in status["motors"]
        ),
        "all motors there",
    )
    give(arm, "beyond", "*", "position", targets=TARGETS | {"joint2": 9.0})
    assert final(arm, "beyond")[:2] == ("rejected", "out_of_limits")
    assert final(arm, "beyond")[2].startswith("position 9 rad: joint2 may go")


# --- streams ----------------------------------------------------------------------------------------------------------


def test_stream_of_setpoints_is_followed_with_the_newest_and_each_has_one_end(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    arm.start()
    for step in range(1, 101):
        for motor in MOTORS:
            give(arm, f"{motor}-{step}", motor, "position", value=0.005 * step)
        pass_time(0.01)
    for motor in MOTORS:
        assert final(arm, f"{motor}-100") == DONE
    ends = finals(arm)
    assert len(ends) == 100 * len(MOTORS)
    states = [ends[f"{motor}-{step}"]["state"] for motor in MOTORS for step in range(1, 101)]
    assert set(states) == {"done", "superseded"}, [end for end in ends.values() if end["state"] == "failed"]
    arm.wait_status(
        lambda status: all(abs(motor["position_rad"] - 0.5) <= TOLERANCE_RAD for motor in status["motors"]), "all there"
    )


def test_stream_of_velocities_that_ends_leaves_the_motors_stopped(make_arm: MakeArm) -> None:
    arm = make_arm(motion="still")
    arm.start()
    for motor in MOTORS:
        give(arm, motor, motor, "velocity", value=SPEED_RAD_S)

    def stopped() -> list[str]:
        return sorted(event["motor"] for event in kept(arm, "events") if event["type"] == "motor.stopped")

    arm.wait(lambda: stopped() == sorted(MOTORS), "every motor is stopped")
    wait_all_still(arm)
    assert min(motor["position_rad"] for motor in arm.status()["motors"]) > STILL_RAD


def stops_told(arm: Arm, motor: str) -> list[str]:
    return [
        event["reason"] for event in kept(arm, "events") if (event["type"], event["motor"]) == ("motor.stopped", motor)
    ]


@pytest.mark.parametrize("killed", ["worker", "gateway", "both"])
def test_motor_without_a_watchdog_does_not_run_on_when_what_commands_it_is_killed(
    make_arm: MakeArm, patient: Path, links: Path, killed: str
) -> None:
    arm = make_arm(sample=patient)
    put_on_links(arm, links)
    arm.start()
    give(arm, "run", "joint4", "velocity", value=SPEED_RAD_S)
    assert final(arm, "run") == DONE
    arm.wait_status(lambda status: speeds(status)["joint4"] > SPEED_RAD_S / 2, "it runs")
    worker = arm.worker_of("serial0", links)
    if killed != "gateway":
        os.kill(worker, signal.SIGSTOP if killed == "both" else signal.SIGKILL)
    if killed != "worker":
        arm.kill()
        if killed == "both":
            os.kill(worker, signal.SIGKILL)
        arm.start()
    found_running = killed != "gateway"  # a worker that outlives its gateway stops what it drove
    arm.wait(lambda: len(stops_told(arm, "joint4")) == found_running, "told that it is stopped")
    assert all("found running" in reason for reason in stops_told(arm, "joint4"))
    arm.wait_status(lambda status: speeds(status)["joint4"] < STILL_RAD_S, "it stands")
    assert [motor for motor in MOTORS if motor != "joint4" and stops_told(arm, motor)] == []


# --- records that are no commands -------------------------------------------------------------------------------------


def bad_records(prefix: str) -> Iterator[tuple[str | None, bytes]]:
    """(id if it can be made out, record) of each kind of bad record."""
    good = record("ID", "joint2", "position", value=0.5)
    for number, (field, value) in enumerate(
        [
            ("value", b'"1"'), ("value", b"true"), ("value", b"null"), ("value", b"[0.5]"), ("value", b"1e308"),
            ("value", b"1" + b"0" * 400), ("ttl_ms", b"-1"), ("ttl_ms", b"1e300"), ("ttl_ms", b"{}"),
            ("issued_at_ns", b"1.5"), ("issued_at_ns", b"9" * 30), ("issued_at_ns", b"-1"),
            ("kind", b'"explode"'), ("kind", b"7"), ("motor", b'"elbow"'), ("motor", b"null"), ("surprise", b"1"),
            ("targets", b"{}"), ("targets", b'{"joint2": "x"}'), ("velocity_rad_s", b'"fast"'),
        ]
    ):  # fmt: skip
        command_id = f"{prefix} {number}"
        fields = {name: json.dumps(found).encode() for name, found in json.loads(good).items()}
        fields |= {"id": json.dumps(command_id).encode(), field: value}
        yield (
            command_id,
            b"{" + b", ".join(b'"' + name.encode() + b'": ' + found for name, found in fields.items()) + b"}",
        )
    for infinite in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        yield None, good.replace(b"0.5", infinite)
    yield None, good.replace(b'"ID"', b"5")
    yield None, good.replace(b'"ID"', b'"\xff"')
    yield None, good.replace(b'"id": "ID", ', b"")
    yield None, b'{"a":' * 10_000
    yield None, b"[" * 60_000
    yield None, b"\xff\xfe\x00"
    yield None, b""
    yield None, b'{"id": "' + b"x" * (10 << 20) + b'"}'


async def create_topic_of_large_records(bootstrap: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, len(MOTORS), 1, topic_configs={"max.message.bytes": str(MOST)})])
    finally:
        await admin.close()


async def send_large(bootstrap: str, topic: str, values: Sequence[bytes]) -> None:
    async with running(AIOKafkaProducer(bootstrap_servers=bootstrap, max_request_size=MOST, acks="all")) as producer:
        for value in values:
            await producer.send_and_wait(topic, value, b"joint2", 1)


def test_every_bad_record_has_one_end_moves_nothing_and_holds_up_nobody(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    ways = {source: list(bad_records(source)) for source in ("kafka", "local")}
    topic = f"servo.{arm.name}.commands"
    asyncio.run(create_topic_of_large_records(kafka.bootstrap, topic))
    arm.start()
    asyncio.run(send_large(kafka.bootstrap, topic, [raw for _, raw in ways["kafka"]]))
    produce(arm, "commands", 1, [record("good", "joint3", "position", value=0.2)])
    for _, raw in ways["local"]:
        local_commands.append(arm.state / "commands.db", raw)
    give(arm, "good too", "joint4", "position", value=0.2)
    assert final(arm, "good") == DONE
    assert final(arm, "good too") == DONE
    ends = finals(arm)
    unreadable = [event["source"] for event in kept(arm, "events") if event["type"] == "command.unreadable"]
    for source, bad in ways.items():
        for command_id, raw in bad:
            assert command_id is None or ends[command_id]["state"] in ("rejected", "expired"), raw
        assert unreadable.count(source) == len([raw for command_id, raw in bad if command_id is None])
    arm.stop()
    positions = [sample.position_rad for sample in see(arm).of["joint2"]]
    assert max(positions) - min(positions) < STILL_RAD
