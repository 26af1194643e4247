"""The commands beside ``run``: check, status, tail, and simulate with what others wrote at its other end."""

import json
import signal
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import scservo_sdk
from damiao_motor import DaMiaoController

from drivers.clock import SECOND, after, left_s, monotonic_ns, sleep_until
from hil.arm import COMMAND, Arm
from tests.conftest import Kafka
from tests.system.conftest import MakeArm
from tests.system.rig import put_on_links

WITHIN_S = 30


# --- simulate ---------------------------------------------------------------------------------------------------------


class _Port(scservo_sdk.PortHandler):  # type: ignore[misc]  # published without types
    """Its port, with patience: a busy machine may not give a simulated servo its turn within the usual 34 ms."""

    def setPacketTimeout(self, packet_length: int) -> None:  # noqa: N802  its name
        self.setPacketTimeoutMillis(1000 + packet_length)


def test_feetech_sdk_reads_the_servos_at_the_link(links: Path) -> None:
    port = _Port(str(links / "serial0"))
    assert port.openPort()
    try:
        assert port.setBaudRate(1_000_000)
        reader = scservo_sdk.GroupSyncRead(port, scservo_sdk.PacketHandler(0), 56, 15)
        for bus_id in (4, 5, 6):
            assert reader.addParam(bus_id)
        assert reader.txRxPacket() == scservo_sdk.COMM_SUCCESS
        for bus_id in (4, 5, 6):
            assert reader.getData(bus_id, 56, 2) == 2048
            assert 20 <= reader.getData(bus_id, 63, 1) <= 30
    finally:
        port.closePort()


# damiao-motor 1.0.6 opens its bus by a name that python-can has renamed
@pytest.mark.filterwarnings("ignore:The 'bustype' argument is deprecated:DeprecationWarning")
def test_damiao_motor_reads_the_motors_at_the_link(links: Path) -> None:
    controller = DaMiaoController(channel=str(links / "can0"), bustype="slcan")
    try:
        for bus_id in (1, 2, 3):
            motor = controller.add_motor(motor_id=bus_id, feedback_id=0x10 + bus_id, motor_type="4310")
            assert motor.get_register(21) == 12.5
            motor.request_motor_feedback()
        deadline = after(monotonic_ns(), WITHIN_S * SECOND)
        while not all(motor.get_states() for motor in controller.all_motors()):
            assert left_s(deadline)
            sleep_until(after(monotonic_ns(), SECOND // 50))
        assert [m.get_states()["pos"] for m in controller.all_motors()] == pytest.approx([0, 0, 0], abs=0.001)
    finally:
        controller.shutdown()


def test_gateway_without_simulation_runs_on_the_links_as_on_real_adapters(links: Path, make_arm: MakeArm) -> None:
    arm = make_arm()
    put_on_links(arm, links)
    arm.start()
    assert {motor["model"] for motor in arm.status()["motors"]} == {"Damiao", "STS3215"}
    moved = arm.order("joint4", "position", "0.4")
    assert (moved.returncode, "done at 0.3" in moved.stdout or "done at 0.4" in moved.stdout) == (0, True), moved
    assert arm.stop()[0] == 0


# --- scan -------------------------------------------------------------------------------------------------------------

PATIENCE = ("--wait", "1000")  # a busy machine may not give a simulated motor its turn any sooner


def scan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "scan", *PATIENCE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_scan_finds_the_motors_at_the_links(links: Path) -> None:
    serial = scan("--serial", str(links / "serial0"), "--protocol", "feetech_sts", "--ids", "4-6", "--json")
    found = json.loads(serial.stdout)
    assert [(motor["protocol"], motor["id"], motor["model"]) for motor in found["motors"]] == [
        ("feetech_sts", bus_id, "STS3215") for bus_id in (4, 5, 6)
    ]
    assert found["motors"][0]["details"]["min_position_rad"] == pytest.approx(-2.8, abs=0.01)
    channel = f"slcan:{links / 'can0'}"
    can = scan("--can", channel, "--option", "sleep_after_open=0", "--protocol", "damiao", "--ids", "1-3", "--json")
    assert [(motor["protocol"], motor["id"]) for motor in json.loads(can.stdout)["motors"]] == [
        ("damiao", bus_id) for bus_id in (1, 2, 3)
    ]


def test_scan_writes_a_configuration_that_passes_the_check(links: Path, tmp_path: Path) -> None:
    config = tmp_path / "found.toml"
    arguments = ("--serial", str(links / "serial0"), "--protocol", "feetech_sts", "--ids", "4-6", "--output")
    found = scan(*arguments, str(config))
    assert (found.returncode, "found feetech_sts id 5" in found.stderr, "STS3215" in found.stdout) == (0, True, True), (
        found
    )
    assert subprocess.run([*COMMAND, "check", str(config)], check=False).returncode == 0
    config.write_text("mine")
    refused = scan(*arguments, str(config))
    assert (refused.returncode, "--force" in refused.stderr, config.read_text()) == (2, True, "mine")
    assert scan(*arguments, str(config), "--force").returncode == 0
    assert "[[motor]]" in config.read_text()
    assert list(tmp_path.glob(".*")) == []


def test_scan_that_is_interrupted_tells_what_it_found_and_writes_nothing(links: Path, tmp_path: Path) -> None:
    config = tmp_path / "found.toml"
    where = ("--serial", str(links / "serial0"), "--protocol", "feetech_sts", "--ids", "4-7", "--output", str(config))
    with subprocess.Popen(
        [*COMMAND, "scan", *where, "--wait", "600000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        while "id 6" not in process.stderr.readline():  # id 7 is not there: from here on it waits
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        told, why = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, told.count("STS3215"), "stopped" in why) == (130, 3, True)
    assert not config.exists()


def test_scan_of_a_port_that_a_gateway_has_says_so(running: Arm) -> None:
    found = running.cli("scan", "--serial", str(running.state / "sim" / "serial0"), "--ids", "4")
    assert (found.returncode, "a gateway that runs" in found.stderr, found.stdout) == (1, True, ""), found
    assert "Traceback" not in found.stderr


def test_scan_that_finds_nobody_says_what_to_look_at(links: Path) -> None:
    found = scan("--serial", str(links / "serial0"), "--ids", "9", "--wait", "1", "--protocol", "feetech_sts")
    assert (found.returncode, "power" in found.stderr, found.stdout) == (1, True, "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--serial", "/dev/x", "--can", "socketcan:can0"), "one bus at a time"),
        (("--can", "can0"), "socketcan:can0"),
        (("--can", "socketcan:can0", "--baudrate", "9600"), "--bitrate"),
        (("--can", "socketcan:can0", "--option", "fast"), "KEY=VALUE"),
        (("--serial", "/dev/x", "--option", "a=1"), "--can"),
        (("--serial", "/dev/x", "--protocol", "damiao"), "feetech_sts"),
        (("--serial", "/dev/x", "--ids", "1-x"), "1-10,15"),
        (("--serial", "/dev/x", "--ids", "300"), "0-253"),
    ],
)
def test_scan_refuses_what_it_does_not_know(arguments: tuple[str, ...], named: str) -> None:
    found = scan(*arguments)
    assert (found.returncode, named in " ".join(found.stderr.split())) == (2, True), found.stderr


def test_scan_without_a_bus_lists_what_there_is() -> None:
    assert scan().returncode == 0
    listed = json.loads(scan("--json").stdout)
    assert set(listed) == {"serial", "can"}


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_tells_every_fault_with_its_line(make_arm: MakeArm) -> None:
    arm = make_arm()
    good = arm.cli("check", str(arm.config))
    assert (good.returncode, good.stderr) == (0, "")
    assert "6 motors on 2 buses, simulated" in good.stdout
    text = arm.config.read_text().replace("id = 6", "id = 300").replace('protocol = "damiao"\nid = 1', "id = 1")
    arm.config.write_text(text)
    bad = arm.cli("check", str(arm.config))
    lines = bad.stderr.splitlines()
    assert bad.returncode == 2
    assert any("protocol" in line and "joint1" in line for line in lines), lines
    number = text.splitlines().index("id = 300") + 1
    assert any(f"arm.toml:{number}: " in line and "300" in line and "0..253" in line for line in lines), lines
    as_json = arm.cli("check", str(arm.config), "--json")
    assert as_json.returncode == 2
    assert {fault["line"] for fault in json.loads(as_json.stdout)["faults"]} >= {number}


def test_configuration_that_is_not_there_is_named(tmp_path: Path, make_arm: MakeArm) -> None:
    missing = str(tmp_path / "missing.toml")
    for command in ("check", "run", "status", "tail"):
        found = make_arm().cli(command, missing)
        assert (found.returncode, missing in found.stderr) == (2, True)
        assert "Traceback" not in found.stderr


# --- status and tail --------------------------------------------------------------------------------------------------


@pytest.fixture
def running(make_arm: MakeArm) -> Arm:
    arm = make_arm()
    arm.start()
    return arm


def test_status_tells_whether_the_gateway_runs(running: Arm) -> None:
    found = running.cli("status", str(running.config), "--json")
    status = json.loads(found.stdout)
    assert (found.returncode, status["running"], status["pid"]) == (0, True, running.pid)
    assert [motor["motor"] for motor in status["motors"]] == [f"joint{n}" for n in range(1, 7)]
    people = running.cli("status", str(running.config))
    assert f"process {running.pid}" in people.stdout
    assert "joint6" in people.stdout
    running.stop()
    stopped = running.cli("status", str(running.config))
    assert (stopped.returncode, "does not run" in stopped.stdout) == (1, True)


def test_status_explains_faults_in_words(running: Arm) -> None:
    def fault(status: dict[str, Any]) -> str:
        return next(str(motor["fault"]) for motor in status["motors"] if motor["motor"] == "joint4")

    running.faults.write_text("[joint4]\ntemperature_c = 120\n")
    running.wait_status(lambda status: bool(fault(status)), "joint4 tells its fault")
    words = fault(running.status())
    assert words.startswith("temperature (feetech_sts: ")
    people = running.cli("status", str(running.config), "--verbose").stdout
    assert f"joint4 fault: {words}" in people
    assert "joint5: feetech_sts STS3215" in people
    assert max(map(len, people.splitlines())) <= 80
    events = running.cli("tail", str(running.config), "--topic", "events", "--from", "beginning", "--no-follow")
    assert f"detail={words}" in next(line for line in events.stdout.splitlines() if "motor.fault" in line)


def test_status_of_an_arm_that_never_ran_says_so(make_arm: MakeArm) -> None:
    arm = make_arm()
    found = arm.cli("status", str(arm.config))
    assert (found.returncode, "status.json" in found.stderr) == (1, True)


def test_tail_reads_the_journal_from_anywhere(running: Arm) -> None:
    def tail(*arguments: str) -> list[dict[str, object]]:
        found = running.cli("tail", str(running.config), "--json", *arguments)
        assert found.returncode == 0, found.stderr
        return [json.loads(line) for line in found.stdout.splitlines()]

    first = tail("--motor", "joint5", "--from", "beginning", "--count", "5")
    assert [(record["motor"], record["seq"]) for record in first] == [("joint5", n) for n in range(1, 6)]
    assert [record["seq"] for record in tail("--motor", "joint5", "--from", "3", "--count", "2")] == [3, 4]
    (newest,) = tail("--motor", "joint5", "--count", "1")
    assert int(str(newest["seq"])) > 5
    events = tail("--topic", "events", "--from", "beginning", "--no-follow")
    assert {event["motor"] for event in events if event["type"] == "motor.online"} == {f"joint{n}" for n in range(1, 7)}
    text = running.cli("tail", str(running.config), "--from", "beginning", "--count", "1").stdout
    assert "position_rad=" in text


def test_tail_begins_at_a_time_and_a_reader_goes_on_where_it_stopped(running: Arm) -> None:
    def tail(*arguments: str) -> list[dict[str, Any]]:
        found = running.cli("tail", str(running.config), "--json", "--motor", "joint5", "--count", "3", *arguments)
        assert found.returncode == 0, found.stderr
        return [json.loads(line) for line in found.stdout.splitlines()]

    third = tail("--from", "beginning")[2]
    at = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=third["sampled_at_ns"] // 1000)
    assert tail("--from", at.isoformat())[0] == third
    first = tail("--from", "beginning", "--reader", "me")
    again = tail("--from", "beginning", "--reader", "me")
    assert [record["seq"] for record in (*first, *again)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--topic", "telemetri"), "telemetri"),
        (("--motor", "joint9"), "joint9"),
        (("--from", "yesterday"), "yesterday"),
        (("--from-kafka",), "--kafka"),
    ],
)
def test_tail_refuses_what_it_does_not_know(make_arm: MakeArm, arguments: tuple[str, ...], named: str) -> None:
    arm = make_arm()
    found = arm.cli("tail", str(arm.config), *arguments)
    assert (found.returncode, named in found.stderr) == (2, True), found.stderr


def test_tail_reads_the_topics_in_kafka(kafka_arm: Arm) -> None:
    whole = ("tail", str(kafka_arm.config), "--from-kafka", "--from", "beginning")
    found = kafka_arm.cli(*whole, "--motor", "joint2", "--count", "3", "--json")
    assert [json.loads(line)["seq"] for line in found.stdout.splitlines()] == [1, 2, 3]
    events = kafka_arm.cli(*whole, "--topic", "events", "--no-follow")
    assert "motor.online" in events.stdout
    assert "gateway.started" in events.stdout


@pytest.fixture
def kafka_arm(make_arm: MakeArm, kafka: Kafka) -> Arm:
    arm = make_arm(kafka.bootstrap)
    arm.start()
    arm.wait_status(lambda status: status["kafka"]["state"] == "up", "Kafka up")
    return arm
