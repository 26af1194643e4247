"""Commands from outside to a simulated motor and back: through Kafka, and through the state directory."""

import asyncio
import json
from typing import Any

import pytest

from gateway import local_commands
from hil.arm import MOTORS, Arm
from hil.judge import Sample
from tests.conftest import Kafka
from tests.system.conftest import MakeArm
from tests.system.rig import (
    ASK_S,
    command_record,
    create_topic,
    events,
    outcomes,
    pass_time,
    produce,
    records,
    see,
    wait_outcome,
)

STILL_RAD = 0.01  # an encoder's step and a motor's settling
TOLERANCE_RAD = 0.02  # the configuration's


def moved(samples: list[Sample]) -> bool:
    return max(sample.position_rad for sample in samples) - min(sample.position_rad for sample in samples) > STILL_RAD


def kept(arm: Arm, topic: str) -> list[dict[str, Any]]:
    """Records of a topic in the journal."""
    done = arm.cli("tail", str(arm.config), "--topic", topic, "--from", "beginning", "--no-follow", "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def kept_positions(arm: Arm, motor: str) -> list[float]:
    return [value["position_rad"] for value in kept(arm, "telemetry") if value["motor"] == motor]


def test_a_position_is_reached_and_told(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    arm.start()
    done = arm.order("joint2", "position", "0.5", "--ttl", "500")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["joint2", "accepted"], ["joint2", "done"]]
    pass_time(0.5)
    arm.stop()
    seen = see(arm)
    assert seen.verdict.ok, seen.verdict
    assert seen.of["joint2"][-1].position_rad == pytest.approx(0.5, abs=TOLERANCE_RAD)
    assert [motor for motor in MOTORS if moved(seen.of[motor])] == ["joint2"]


def test_a_position_beyond_the_limits_is_rejected_and_moves_nothing(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    arm.start()
    done = arm.order("joint2", "position", "2.5")
    assert done.returncode == 1
    assert "rejected (out_of_limits) position 2.5 rad: joint2 may go from -1.8 to 1.8 rad" in done.stdout
    pass_time(0.5)
    arm.stop()
    assert not moved(see(arm).of["joint2"])


def test_a_command_older_than_its_ttl_expires_and_moves_nothing(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    arm.start()
    produce(arm, "commands", 1, [command_record("old", "joint2", 0.5, ttl_ms=500, age_ms=2000)])
    outcome = wait_outcome(arm, "old")
    assert (outcome["state"], outcome["reason"], outcome["motor"]) == ("expired", "stale", "joint2")
    pass_time(0.5)
    arm.stop()
    assert len(outcomes(arm, "old")) == 1
    assert not moved(see(arm).of["joint2"])


def test_the_same_command_twice_is_carried_out_once(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    arm.start()
    record = command_record("twice", "joint5", 0.3, ttl_ms=20_000, age_ms=0)
    produce(arm, "commands", 4, [record])
    outcome = wait_outcome(arm, "twice")
    assert outcome["state"] == "done", outcome
    produce(arm, "commands", 4, [record])
    arm.wait(lambda: len(outcomes(arm, "twice")) == 3, "an outcome of the repeat", every_s=ASK_S)
    arm.kill()
    arm.start()  # the memory of ids is not the process's
    produce(arm, "commands", 4, [record])
    arm.wait(lambda: len(outcomes(arm, "twice")) == 4, "an outcome of the second repeat", every_s=ASK_S)
    arm.stop()
    told = [(outcome["state"], outcome["reason"]) for outcome in outcomes(arm, "twice")]
    assert told == [("accepted", None), ("done", None), ("rejected", "duplicate"), ("rejected", "duplicate")]


def test_journal_that_is_gone_ends_no_command_a_second_time(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    arm.start()
    once = command_record("once", "joint5", 0.3, ttl_ms=20_000, age_ms=0)
    refused = command_record("refused", "joint5", 30.0, ttl_ms=20_000, age_ms=0)
    unreadable = b'{"id": "unreadable", "motor": "joint5"}'
    produce(arm, "commands", 4, [once, refused, unreadable])
    ends = {name: wait_outcome(arm, name) for name in ("once", "refused", "unreadable")}
    arm.kill()
    for file in arm.state.glob("journal.db*"):
        file.unlink()
    produce(arm, "commands", 4, [command_record("backlog", "joint5", 0.1, ttl_ms=20_000, age_ms=0)])
    arm.start()
    assert wait_outcome(arm, "backlog")["state"] == "expired"
    produce(arm, "commands", 4, [once, command_record("next", "joint5", 0.2, ttl_ms=20_000, age_ms=0)])
    assert wait_outcome(arm, "next")["state"] == "done"
    arm.stop()
    for name, end in ends.items():
        assert end in outcomes(arm, name)[-2:]
    assert [(o["state"], o["reason"]) for o in outcomes(arm, "once")] == [
        ("accepted", None), ("done", None), ("rejected", "duplicate"),
    ]  # fmt: skip
    assert [o["reason"] for name in ("refused", "unreadable") for o in outcomes(arm, name)] == [
        "out_of_limits", "malformed",
    ]  # fmt: skip


def test_backlog_from_before_the_first_start_moves_nothing(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    asyncio.run(create_topic(kafka.bootstrap, f"servo.{arm.name}.commands", 6))
    for partition, motor in enumerate(MOTORS):
        backlog = [
            command_record(f"{motor}-{n}", motor, 0.5, ttl_ms=500, age_ms=1000 * n) for n in range(3, 0, -1)
        ]  # fmt: skip
        produce(arm, "commands", partition, backlog)
    arm.start()
    for motor in MOTORS:
        for number in range(3, 0, -1):
            assert wait_outcome(arm, f"{motor}-{number}")["state"] == "expired"
    pass_time(0.5)
    arm.stop()
    assert len(records(arm, "outcomes")) == 3 * len(MOTORS)
    seen = see(arm)
    assert not [motor for motor in MOTORS if moved(seen.of[motor])]


def test_records_that_are_no_commands_are_told_and_passed_over(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap, motion="still")
    arm.start()
    unreadable = [b"{not json", b"\xff\xfe", b"", b"[1, 2]"]
    good = command_record("good", "joint2", 0.2, ttl_ms=20_000, age_ms=0)
    produce(arm, "commands", 1, [*unreadable, good])
    outcome = wait_outcome(arm, "good")
    assert outcome["state"] == "done", outcome
    told = events(arm, "command.unreadable")
    places = [(event["source"], event["source_partition"], event["source_offset"]) for event in told]
    assert places == [("kafka", 1, offset) for offset in range(len(unreadable))]
    assert all(event["detail"] for event in told)


def test_without_kafka_a_position_is_reached_and_told(make_arm: MakeArm) -> None:
    arm = make_arm(motion="still")
    arm.start()
    done = arm.order("joint2", "position", "0.5", "--ttl", "500")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["joint2", "accepted"], ["joint2", "done"]]
    pass_time(0.5)
    arm.stop()
    assert kept_positions(arm, "joint2")[-1] == pytest.approx(0.5, abs=TOLERANCE_RAD)


def test_without_kafka_what_may_not_be_is_refused_and_moves_nothing(make_arm: MakeArm) -> None:
    arm = make_arm(motion="still")
    arm.start()
    done = arm.order("joint2", "position", "-2.5")
    assert done.returncode == 1
    assert "rejected (out_of_limits) position -2.5 rad: joint2 may go from -1.8 to 1.8 rad" in done.stdout
    local_commands.append(
        arm.state / "commands.db", command_record("old", "joint2", 0.5, ttl_ms=500, age_ms=2000)
    )  # fmt: skip
    local_commands.append(arm.state / "commands.db", b"{not json")
    arm.wait(
        lambda: "command.unreadable" in [event["type"] for event in kept(arm, "events")],
        "an event of it",
        every_s=ASK_S,
    )
    pass_time(0.5)
    arm.stop()
    states = {outcome["command_id"]: outcome["state"] for outcome in kept(arm, "outcomes")}
    assert states.pop("old") == "expired"
    assert list(states.values()) == ["rejected"]
    assert max(map(abs, kept_positions(arm, "joint2"))) < STILL_RAD


def test_a_command_without_a_gateway_fails_and_is_not_kept(make_arm: MakeArm) -> None:
    arm = make_arm(motion="still")
    done = arm.order("joint2", "position", "0.5")
    assert done.returncode == 1
    assert f"no gateway runs on state_dir {arm.state}" in done.stderr
    arm.start()
    pass_time(0.5)
    arm.stop()
    assert kept(arm, "outcomes") == []
