"""A whole gateway with six simulated motors on a virtual link, seen by can-utils from outside."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from drivers.clock import MS, SECOND, after, epoch_ns, monotonic_ns, sleep_until
from drivers.protocols import damiao
from gateway.journal import JournalReader
from gateway.telemetry import Records
from hil.arm import MOTORS, Arm
from tests.socketcan.links import ERROR_FLAG, Seen, candump, cansend, ip, read_candump, virtual_link, wait_until_heard

ARM = """\
[arm]
name = "sim-arm"
late_after_ms = 1000
offline_after_ms = 3000

[simulation]
motion = "wave"

[[bus]]
name = "can0"
type = "can"
interface = "socketcan"
channel = "{channel}"
rate_hz = {rate_hz}
"""
MOTOR = """
[[motor]]
name = "joint{number}"
partition = {partition}
bus = "can0"
protocol = "damiao"
id = {number}
position_rad = [-3.0, 3.0]
velocity_rad_s = 5.0
temperature_c = 80.0
"""
RATE_HZ = 20  # an emulated processor has time left at this
STEADY_S = 20
SCALE = damiao.Scale(12.5, 30.0, 10.0)  # of the simulated motors, which are DM4310
SAME_NS = 40 * MS  # between two readings of clocks that a busy machine may tear apart; less than a cycle


class Running(NamedTuple):
    """A gateway whose six motors are online, its link, and what candump writes down of it."""

    arm: Arm
    channel: str
    log: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One for all tests: a slow machine takes long to start it."""
    directory = tmp_path_factory.mktemp("running")
    sample, log = directory / "sample.toml", directory / "candump.log"
    with virtual_link() as channel, candump(channel, log):
        motors = "".join(MOTOR.format(number=number, partition=number - 1) for number in range(1, 7))
        sample.write_text(ARM.format(channel=channel, rate_hz=RATE_HZ) + motors)
        arm = Arm("vcan", directory / "arm", sample=sample)
        # first reads of a machine that has just booted are slow, and a worker is given 15 s to open its bus
        assert arm.cli("check", str(arm.config)).returncode == 0
        try:
            arm.start()
            yield Running(arm, channel, log)
        finally:
            assert not arm.close()


def telemetry_of(arm: Arm) -> dict[str, Records]:
    """{motor: everything that the journal holds of it}, which is proved to be complete and in order."""
    reader = JournalReader(arm.state / "journal.db")
    try:
        records = np.concatenate([batch.records for batch in reader.batches(0, -1)])
        of = {name: records[records["partition"] == partition] for partition, name in reader.motors().items()}
    finally:
        reader.close()
    for motor, mine in of.items():
        assert mine["seq"].tolist() == list(range(1, len(mine) + 1)), motor
        assert np.all(np.diff(mine["sampled_at_ns"]) >= 0), motor
        assert np.all(np.isfinite(mine["position_rad"])), motor
    assert len(set(records["stream"].tolist())) == 1
    return of


def events_of(arm: Arm, since_ns: int = 0) -> list[dict[str, Any]]:
    reader = JournalReader(arm.state / "journal.db")
    try:
        events = [json.loads(entry.value) for entry in reader.entries(0, -1, "events")]
    finally:
        reader.close()
    return [event for event in events if event["at_ns"] >= since_ns]


def told(arm: Arm, since_ns: int, kind: str) -> list[dict[str, Any]]:
    return [event for event in events_of(arm, since_ns) if event["type"] == kind]


def misses_until_now(arm: Arm) -> dict[str, int]:
    """{motor: replies that did not come in time}, as the gateway tells it."""
    wait_for_counts(arm)  # what comes first may be from before
    wait_for_counts(arm)
    return {motor["motor"]: motor["misses"] for motor in arm.status()["motors"]}


def wait_for_counts(arm: Arm) -> None:
    """Until the worker has sent its counts once more, as it does every second."""
    known = arm.status()["buses"][0]["cycles"]
    arm.wait_status(lambda status: bool(status["buses"][0]["cycles"] > known), "fresh counts")


# --- from outside -----------------------------------------------------------------------------------------------------


def replies_of(seen: list[Seen], bus_id: int) -> list[Seen]:
    """The feedback frames of one motor."""
    return [
        one
        for one in seen
        if one.frame.can_id == 0x10 + bus_id and not damiao.is_register_reply(one.frame.data, bus_id)
    ]


def polls_of(seen: list[Seen], bus_id: int) -> list[int]:
    """When one motor was asked for feedback."""
    return [one.at_ns for one in seen if one.frame == damiao.make_refresh(bus_id)]


def match(samples: Records, replies: list[Seen]) -> list[int]:
    """For each sample the number of the reply that it was made of: same position, same time. In their order."""
    found, at = [], 0
    for sample in samples:
        for number in range(at, len(replies)):
            reply = replies[number]
            position = damiao.decode_feedback(reply.frame.data, SCALE).position_rad
            if position == sample["position_rad"] and abs(reply.at_ns - int(sample["sampled_at_ns"])) < SAME_NS:
                found.append(number)
                at = number + 1
                break
        else:
            raise AssertionError(f"no reply on the bus for sample {sample['seq']}")
    return found


def test_every_sample_is_a_reply_that_candump_saw_at_that_time_and_every_reply_in_time_a_sample(
    running: Running, findings: list[str]
) -> None:
    arm, channel, log = running
    from_ns = epoch_ns()
    sleep_until(after(monotonic_ns(), STEADY_S * SECOND))
    to_ns = epoch_ns()
    misses = misses_until_now(arm)
    telemetry = telemetry_of(arm)
    wait_until_heard(channel, log)  # and with it every reply before
    seen = read_candump(log)
    assert set(telemetry) == set(MOTORS)
    for bus_id, motor in enumerate(MOTORS, start=1):
        samples, replies, polls = telemetry[motor], replies_of(seen, bus_id), polls_of(seen, bus_id)
        matched = match(samples, replies)
        replied = np.array([replies[number].at_ns for number in matched])
        asked = np.array(polls)[np.searchsorted(polls, replied) - 1]
        assert np.all(np.diff(asked) > 0)  # one reply to a poll
        sent = samples["sampled_at_ns"] - samples["round_trip_us"].astype(float) * 1000
        assert np.all(sent < asked + SAME_NS)  # before its poll passed, the round trip had begun
        off_ns = samples["sampled_at_ns"] - replied
        used = set(matched)
        unused = sum(from_ns < one.at_ns < to_ns for number, one in enumerate(replies) if number not in used)
        findings.append(
            f"{motor}: {len(polls)} polls, {len(replies)} replies on the bus, {len(samples)} samples, {misses[motor]} "
            f"misses told, {unused} replies unused; sampled_at_ns off candump's time by "
            f"{np.median(off_ns) / 1000:.1f} us in the median, {np.abs(off_ns).max() / 1000:.1f} us at most"
        )
        assert len(samples) > STEADY_S * RATE_HZ / 2  # far fewer would prove little
        assert unused <= misses[motor]


# --- what an outsider does to it --------------------------------------------------------------------------------------


def test_foreign_frame_is_counted_as_a_stray_and_disturbs_nobody(running: Running) -> None:
    arm, channel, _ = running
    since = epoch_ns()
    before = arm.status()["buses"][0]["stray_packets"]
    for _ in range(10):
        cansend(channel, "5A1#1122334455667788")
    arm.wait_status(lambda status: status["buses"][0]["stray_packets"] >= before + 10, "ten strays")
    assert not [event for event in events_of(arm, since) if event["type"] in ("bus.down", "motor.offline")]
    telemetry_of(arm)


def test_bus_off_is_told_and_overcome(running: Running) -> None:
    arm, channel, _ = running
    since = epoch_ns()
    cansend(channel, f"{ERROR_FLAG | 0x040:08X}#0000000000000000")
    arm.wait(lambda: len(told(arm, since, "motor.online")) == len(MOTORS), "all motors online again")
    (down,) = told(arm, since, "bus.down")
    assert "bus-off" in json.dumps(down)
    assert len(told(arm, since, "bus.up")) == 1
    assert {event["motor"] for event in told(arm, since, "motor.offline")} == set(MOTORS)
    telemetry_of(arm)


def test_link_that_is_down_for_a_while_is_told_once_and_nothing_of_the_order_is_lost(running: Running) -> None:
    arm, channel, _ = running
    since = epoch_ns()
    ip("link", "set", channel, "down")
    arm.wait(lambda: bool(told(arm, since, "bus.down")), "bus.down")
    sleep_until(after(monotonic_ns(), 1 * SECOND))  # several attempts to open it
    assert not told(arm, since, "bus.up")
    ip("link", "set", channel, "up")
    arm.wait(lambda: len(told(arm, since, "motor.online")) == len(MOTORS), "all motors online again")
    (down,) = told(arm, since, "bus.down")
    assert f"ip link set {channel} up" in json.dumps(down)
    assert {event["motor"] for event in told(arm, since, "motor.offline")} == set(MOTORS)
    ends = {motor: len(records) for motor, records in telemetry_of(arm).items()}
    arm.wait(lambda: all(seq > ends[motor] for motor, seq in arm.journal_ends().items()), "samples of each motor")
    telemetry_of(arm)
