"""How a gateway begins and ends: what it refuses, and what it leaves."""

import asyncio
import signal
from collections.abc import Callable

import pytest

from hil.acceptance import proof
from hil.kafka import Broker
from tests.conftest import Kafka
from tests.system.conftest import MakeArm
from tests.system.rig import create_topic, events, pass_time, see

pytestmark = pytest.mark.at_full_rate

STOPS_WITHIN_S = 5.0  # the requirement


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_everything_published(kafka: Kafka, make_arm: MakeArm, number: signal.Signals) -> None:
    arm = make_arm(kafka.bootstrap)
    arm.start()
    arm.wait_caught_up()
    pass_time(1)
    status, took_s = arm.stop(number)
    assert status == 0
    assert took_s <= STOPS_WITHIN_S
    proven = proof("stopped", arm, {})
    assert not proven.faults
    assert len(events(arm, "gateway.stopping")) == 1


@pytest.mark.parametrize(
    ("leave", "come_back"),
    [
        pytest.param(Broker.stop, Broker.start, id="gone"),
        pytest.param(Broker.pause, Broker.resume, id="hung"),
    ],
)
def test_it_ends_in_time_without_its_broker_and_publishes_the_rest_next_time(
    own_broker: Broker, make_arm: MakeArm, leave: Callable[[Broker], None], come_back: Callable[[Broker], None]
) -> None:
    arm = make_arm(own_broker.bootstrap)
    arm.start()
    pass_time(1)
    leave(own_broker)
    pass_time(1)
    status, took_s = arm.stop()
    assert status == 0
    assert took_s <= STOPS_WITHIN_S
    accepted = arm.journal_ends()
    come_back(own_broker)
    arm.start()
    arm.wait_caught_up()
    arm.stop()
    proven = proof("broker away at the end", arm, {})
    assert not proven.faults
    assert all(partition.last_seq > accepted[partition.motor] for partition in proven.verdict.partitions)


def test_a_topic_with_too_few_partitions_is_refused(kafka: Kafka, make_arm: MakeArm) -> None:
    arm = make_arm(kafka.bootstrap)
    topic = f"servo.{arm.name}.events"
    asyncio.run(create_topic(kafka.bootstrap, topic, 3))
    done = arm.cli("run", str(arm.config))
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert f"topic {topic} has 3 partitions" in last
    assert "--partitions 6" in last


def test_a_second_gateway_on_the_same_state_is_refused(make_arm: MakeArm) -> None:
    arm = make_arm()
    arm.start()
    done = arm.cli("run", str(arm.config))
    assert done.returncode == 1
    assert f"process {arm.pid}" in done.stderr
    assert str(arm.state) in done.stderr
    status, _ = arm.stop()
    assert status == 0


def test_a_killed_gateway_leaves_no_process_behind(make_arm: MakeArm) -> None:
    arm = make_arm()
    arm.start()
    assert len(arm.processes()) >= 3  # the gateway and a worker for each bus
    arm.kill()
    assert arm.close() == []


def test_a_journal_that_fell_behind_its_topics_is_set_aside_and_a_new_stream_begins(
    kafka: Kafka, make_arm: MakeArm
) -> None:
    """As after a power cut: the broker holds numbers that the journal would give again."""
    arm = make_arm(kafka.bootstrap)
    arm.start()
    arm.stop()
    journal = arm.state / "journal.db"
    former = journal.read_bytes()
    arm.start()
    arm.wait_caught_up()
    arm.stop()
    journal.write_bytes(former)
    for rest in ("-wal", "-shm"):
        journal.with_name(journal.name + rest).unlink(missing_ok=True)
    arm.start()
    arm.wait_status(lambda status: status["kafka"]["state"] == "up", "Kafka up")
    assert arm.stop()[0] == 0
    assert [path.name for path in arm.state.glob("journal.aside-*")] == ["journal.aside-1"]
    verdict = see(arm).verdict
    assert not verdict.faults
    assert verdict.streams == 2
