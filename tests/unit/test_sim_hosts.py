"""Hosts of simulated motors, the slcan adapter, what builds a simulated bus, and faults from a file."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from math import pi
from pathlib import Path

import can
import pytest
import serial
from hypothesis import given
from hypothesis import strategies as st

from drivers import protocols
from drivers.clock import MS, SECOND, MonotonicNs, after, monotonic_ns
from drivers.family import CanFrame
from drivers.motor import Motor
from drivers.protocols import damiao, feetech_sts
from drivers.sim.build import SimulationSettings, build_bus, make_servo
from drivers.sim.faults import FaultsFile, apply_faults
from drivers.sim.hosts import CanHost, Host, PtySerialHost, SlcanHost
from drivers.sim.responder import Faults, Responder
from drivers.sim.slcan import SlcanAdapter
from tests.memory_loop import STILL, make_motor

STS = [make_motor("feetech_sts", bus_id, bus_id - 1) for bus_id in (1, 2)]
DAMIAO = [make_motor("damiao", bus_id, bus_id - 1) for bus_id in (1, 2)]
PING = feetech_sts.encode_packet(feetech_sts.Packet(1, feetech_sts.Instruction.PING))
PONG = feetech_sts.encode_packet(feetech_sts.Packet(1, 0))
REFRESH = b"t7FF80100CC0000000000\r"


def open_port(port: str) -> serial.Serial:
    return serial.Serial(port, 1_000_000, timeout=2)


def read_line(port: serial.Serial) -> bytes:
    return port.read_until(b"\r")


def wait_for(seen: Callable[[], bool]) -> None:
    deadline = after(monotonic_ns(), 5 * SECOND)
    while not seen():
        assert monotonic_ns() < deadline
        time.sleep(0.002)


@pytest.fixture
def sts() -> Iterator[PtySerialHost]:
    with PtySerialHost(build_bus(STS, STILL, monotonic_ns())) as host:
        yield host


@pytest.fixture
def slcan() -> Iterator[SlcanHost]:
    with SlcanHost(build_bus(DAMIAO, STILL, monotonic_ns())) as host:
        yield host


# --- pseudo-terminals -------------------------------------------------------------------------------------------------


def test_clients_may_come_and_go(sts: PtySerialHost) -> None:
    for _ in range(3):
        with open_port(sts.port) as port:
            port.write(PING)
            assert port.read(len(PONG)) == PONG


def test_every_byte_value_passes_the_terminal_unchanged(sts: PtySerialHost) -> None:
    write = feetech_sts.Packet(1, feetech_sts.Instruction.WRITE, bytes((42, 0x03, 0x11, 0x13, 0x0A, 0x0D, 0x04)))
    read = feetech_sts.Packet(1, feetech_sts.Instruction.READ, bytes((42, 6)))
    with open_port(sts.port) as port:
        port.write(feetech_sts.encode_packet(write))
        assert port.read(6) == PONG
        port.write(feetech_sts.encode_packet(read))
        assert port.read(12)[5:11] == write.params[1:]


def test_client_that_never_reads_delays_nobody(sts: PtySerialHost) -> None:
    with open_port(sts.port) as port:
        for _ in range(200):
            port.write(20 * PING)
    ping_other = feetech_sts.encode_packet(feetech_sts.Packet(2, feetech_sts.Instruction.PING))
    decoder = feetech_sts.Decoder()
    with open_port(sts.port) as port:
        port.write(ping_other)
        wait_for(lambda: feetech_sts.Packet(2, 0) in decoder.feed(port.read(max(1, port.in_waiting))))


def test_late_motor_is_late_and_the_other_is_not() -> None:
    bus = build_bus(STS, STILL, monotonic_ns())
    apply_faults(bus, {"joint1": {"delay_ms": 50}})
    ask = feetech_sts.make_sync_read([1, 2], 5, 1)
    with PtySerialHost(bus) as host, open_port(host.port) as port:
        sent = monotonic_ns()
        port.write(ask)
        replies = feetech_sts.Decoder().feed(port.read(14))
        assert [packet.bus_id for packet in replies] == [2, 1]
        assert monotonic_ns() - sent >= 50 * MS


def test_link_leads_to_the_terminal_while_the_host_runs(tmp_path: Path) -> None:
    link = tmp_path / "can0"
    link.symlink_to("left by a run that was killed")
    host = SlcanHost(build_bus(DAMIAO, STILL, monotonic_ns()), link)
    with host:
        assert link.readlink() == Path(host.port)
        assert [path.name for path in tmp_path.iterdir()] == ["can0"]
    assert list(tmp_path.iterdir()) == []


def test_link_of_another_host_is_left_alone(tmp_path: Path) -> None:
    link = tmp_path / "bus"
    with PtySerialHost(build_bus(STS, STILL, monotonic_ns()), link):
        link.unlink()
        link.symlink_to("another")
    assert link.readlink() == Path("another")


def test_file_is_not_replaced_by_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "bus"
    precious.write_text("data")
    host = PtySerialHost(build_bus(STS, STILL, monotonic_ns()), precious)
    with pytest.raises(FileExistsError, match="no symbolic link"):
        host.start()
    host.stop()
    assert precious.read_text() == "data"


def test_host_that_runs_is_not_started_twice(sts: PtySerialHost) -> None:
    with pytest.raises(RuntimeError, match="runs already"):
        sts.start()


def test_host_can_be_started_again() -> None:
    host = PtySerialHost(build_bus(STS, STILL, monotonic_ns()))
    for _ in range(2):
        with host, open_port(host.port) as port:
            port.write(PING)
            assert port.read(len(PONG)) == PONG
        host.stop()  # twice is no fault


def test_physics_goes_on_while_nobody_talks() -> None:
    bus = build_bus(STS, SimulationSettings(), monotonic_ns())
    servo = bus.motors[0].servo
    with PtySerialHost(bus):
        wait_for(lambda: servo.time_s > 0.1)


def test_housekeeping_is_done_also_while_somebody_talks() -> None:
    calls: list[int] = []
    with PtySerialHost(build_bus(STS, STILL, monotonic_ns()), housekeeping=lambda: calls.append(1)) as host:
        wait_for(lambda: len(calls) > 2)
        calls.clear()
        with open_port(host.port) as port:
            while len(calls) < 3:
                port.write(PING)
                assert port.read(len(PONG)) == PONG


# --- slcan ------------------------------------------------------------------------------------------------------------

# (channel open before, command, answer); Lawicel CANUSB manual, ASCII commands
LAWICEL = [
    (False, "O", "\r"),
    (True, "O", "\a"),
    (False, "L", "\r"),
    (True, "C", "\r"),
    (False, "C", "\a"),
    (False, "S8", "\r"),
    (True, "S8", "\a"),
    (False, "SX", "\a"),
    (False, "s031C", "\r"),
    (False, "s03", "\a"),
    (False, "V", "V1013\r"),
    (False, "N", "NSIM1\r"),
    (True, "F", "F00\r"),
    (False, "F", "\a"),
    (False, "M00000000", "\r"),
    (False, "mFFFFFFFF", "\r"),
    (False, "m1", "\a"),
    (False, "Z1", "\r"),
    (True, "Z1", "\a"),
    (True, "t10021133", "z\r"),
    (False, "t10021133", "\a"),
    (True, "T0000010021133", "Z\r"),
    (True, "r1002", "z\r"),
    (True, "R000001002", "Z\r"),
    (True, "t1002113", "\a"),
    (True, "t1009112233445566778899", "\a"),
    (True, "t8000", "\a"),
    (True, "T200000000", "\a"),
    (True, "t1001+1", "\a"),
    (True, "t", "\a"),
    (True, "?", "\a"),
    (True, "", "\r"),
    (True, "t" + 100 * "0", "\a"),
]


@pytest.mark.parametrize(("is_open", "command", "answer"), LAWICEL)
def test_commands_are_answered_as_the_manual_says(is_open: bool, command: str, answer: str) -> None:
    adapter = SlcanAdapter()
    adapter.is_open = is_open
    ((given_answer, _),) = adapter.feed(command.encode() + b"\r")
    assert given_answer == answer.encode()


def test_channel_that_only_listens_sends_nothing() -> None:
    answers = list(SlcanAdapter().feed(b"L\rt10021133\r"))
    assert answers == [(b"\r", None), (b"\a", None)]


@given(st.integers(0, 0x7FF), st.binary(max_size=8), st.booleans(), st.integers(1, 40))
def test_frames_survive_the_line_both_ways_however_it_is_cut(
    can_id: int, data: bytes, extended: bool, size: int
) -> None:
    frame = CanFrame(can_id, data, extended)
    adapter = SlcanAdapter()
    adapter.is_open = True
    line = adapter.encode_received(frame, MonotonicNs(0))
    chunks = [line[at : at + size] for at in range(0, len(line), size)]
    assert [frame for chunk in chunks for _, frame in adapter.feed(chunk)] == [frame]


@given(st.binary(max_size=300))
def test_adapter_understands_again_after_any_noise(noise: bytes) -> None:
    adapter = SlcanAdapter()
    list(adapter.feed(noise + b"\r"))
    list(adapter.feed(b"C\rO\r"))
    assert list(adapter.feed(b"t0010\r")) == [(b"z\r", CanFrame(1, b""))]


def test_time_stamps_are_milliseconds_of_the_minute() -> None:
    adapter = SlcanAdapter()
    list(adapter.feed(b"Z1\rO\r"))
    line = adapter.encode_received(CanFrame(1, b"\xab"), MonotonicNs(61_234 * MS))
    assert line == b"t0011AB" + f"{1234:04X}".encode() + b"\r"


def test_motor_behind_slcan_answers_after_the_adapter(slcan: SlcanHost) -> None:
    with open_port(slcan.port) as port:
        port.write(REFRESH)
        assert port.read(1) == b"\a"  # closed
        port.write(b"O\r" + REFRESH)
        assert read_line(port) == b"\r"
        assert read_line(port) == b"z\r"
        assert read_line(port).startswith(b"t011801")
        port.write(b"C\r" + REFRESH)
        assert port.read(2) == b"\r\a"


def test_client_that_reads_late_loses_whole_lines_only(slcan: SlcanHost) -> None:
    with open_port(slcan.port) as port:
        for _ in range(300):
            port.write(100 * b"V\r")
        port.write(b"N\r")
        port.timeout = 0.2
        lines = port.read(1_000_000).split(b"\r")
    assert set(lines) - {b"NSIM1"} == {b"V1013", b""}
    assert 100 < len(lines) < 30_000


def test_adapter_whose_controller_is_off_takes_no_frames(slcan: SlcanHost) -> None:
    with open_port(slcan.port) as port:
        port.write(b"O\r" + REFRESH)
        assert port.read(3) == b"\rz\r"
        assert read_line(port).startswith(b"t0118")
        vars(slcan)["_bus"].faults.bus_off = True
        port.write(REFRESH + b"F\r")
        assert port.read(5) == b"\aF80\r"


# --- python-can's interfaces ------------------------------------------------------------------------------------------


def ask(client: can.BusABC, bus_id: int) -> None:
    request = damiao.make_refresh(bus_id)
    client.send(can.Message(arbitration_id=request.can_id, data=request.data, is_extended_id=False))


def test_motors_answer_on_the_virtual_bus() -> None:
    bus = build_bus(DAMIAO, STILL, monotonic_ns())
    with CanHost(bus, "test_sim_hosts"), can.Bus(interface="virtual", channel="test_sim_hosts") as client:
        for bus_id in (1, 2):
            ask(client, bus_id)
            reply = client.recv(2)
            assert reply is not None
            assert reply.arbitration_id == 0x10 + bus_id


def test_controller_that_goes_off_and_comes_back_says_so_in_error_frames() -> None:
    bus = build_bus(DAMIAO, STILL, monotonic_ns())
    with CanHost(bus, "test_error_frames"), can.Bus(interface="virtual", channel="test_error_frames") as client:
        for bus_off, error_class in ((True, 0x40), (False, 0x100)):
            bus.faults.bus_off = bus_off
            told = client.recv(5)
            assert told is not None
            assert told.is_error_frame
            assert told.arbitration_id == error_class
        ask(client, 1)
        assert (reply := client.recv(2)) is not None
        assert not reply.is_error_frame


def test_damaged_frame_is_told_as_a_protocol_error_in_its_crc() -> None:
    bus = build_bus(DAMIAO, STILL, monotonic_ns())
    bus.motors[0].faults.corrupt = 1.0
    with CanHost(bus, "test_protocol_error"), can.Bus(interface="virtual", channel="test_protocol_error") as client:
        ask(client, 1)
        told = client.recv(5)
        assert told is not None
        assert told.is_error_frame
        assert (told.arbitration_id, told.data[3]) == (0x088, 0x08)  # linux/can/error.h


def test_interface_that_cannot_be_opened_is_an_os_error() -> None:
    host = CanHost(build_bus(DAMIAO, STILL, monotonic_ns()), "nocan7", interface="socketcan")
    with pytest.raises(OSError, match="nocan7"):
        host.start()
    host.stop()


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", protocols.family_names())
def test_every_family_has_a_simulated_side(name: str) -> None:
    assert issubclass(protocols.load_responder(name), Responder)


def test_unknown_family_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="nonesuch"):
        protocols.load_responder("nonesuch")


def test_motors_of_one_medium_only_share_a_bus() -> None:
    with pytest.raises(ValueError, match="'joint1': 'serial'"):
        build_bus([STS[0], Motor(1, "wrist", "damiao", 1)], STILL, monotonic_ns())


@given(
    index=st.integers(0, 31),
    low=st.floats(-pi, pi),
    span=st.floats(0.01, 2 * pi),
    velocity_rad_s=st.floats(0.05, 20),
)
def test_waves_stay_within_every_joints_limits(index: int, low: float, span: float, velocity_rad_s: float) -> None:
    limits = {index: (low, low + span)}
    servo = make_servo(index, SimulationSettings(position_rad=limits, velocity_rad_s={index: velocity_rad_s}))
    assert callable(servo.motion)
    path = [servo.motion(step * 0.02) for step in range(500)]
    assert low < min(path) <= max(path) < low + span
    fastest = max(abs(b - a) / 0.02 for a, b in pairwise(path))
    assert fastest <= 0.51 * velocity_rad_s


def test_waves_of_the_joints_differ() -> None:
    servos = [make_servo(index, SimulationSettings()) for index in range(6)]
    for servo in servos:
        servo.step(1.0)
    assert len({round(servo.position_rad, 3) for servo in servos}) == 6


def test_still_motor_stands_within_its_limits_without_torque() -> None:
    servo = make_servo(0, SimulationSettings("still", enabled=False, position_rad={0: (0.5, 1.0)}))
    servo.step(1.0)
    assert servo.position_rad == 0.5
    assert not servo.enabled


# --- faults -----------------------------------------------------------------------------------------------------------


def test_faults_are_exactly_those_listed() -> None:
    bus = build_bus(STS, STILL, monotonic_ns())
    motors = bus.motors
    apply_faults(bus, {"joint1": {"silent": True, "delay_ms": 5}, "elbow": {}}, elsewhere=["elbow"])
    assert (motors[0].faults.silent, motors[0].faults.delay_ms) == (True, 5.0)
    apply_faults(bus, {"joint2": {"delay_ms": 1.5}})
    assert (motors[0].faults.silent, motors[0].faults.delay_ms) == (False, 0.0)
    assert motors[1].faults.delay_ms == 1.5


@pytest.mark.parametrize(
    ("faults", "named"),
    [
        ({"joint9": {"silent": True}}, "joint9: no such motor or bus, known are elbow, joint1, joint2, serial0"),
        ({"joint1": {"slow": 1}}, "joint1.slow: no such fault, known are silent, delay_ms, drop, "),
        ({"joint1": {"silent": 1}}, "joint1.silent is 1; it must be true or false"),
        ({"joint1": {"reboot": "now"}}, "joint1.reboot is 'now'; it must be true or false"),
        ({"joint1": {"delay_ms": -1}}, "joint1.delay_ms is -1; it must be a number from 0 to 10000"),
        ({"joint1": {"delay_ms": True}}, "joint1.delay_ms is True"),
        ({"joint1": {"delay_ms": float("nan")}}, "joint1.delay_ms is nan"),
        ({"joint1": {"drop": 1.5}}, "joint1.drop is 1.5; it must be a number from 0 to 1"),
        ({"joint1": {"wrong_id": 254}}, "joint1.wrong_id is 254; it must be an address of feetech_sts, from 0 to 253"),
        ({"joint1": {"wrong_id": 1.0}}, "joint1.wrong_id is 1.0"),
        ({"joint1": {"temperature_c": "hot"}}, "joint1.temperature_c is 'hot'; it must be a number from -50 to 300"),
        ({"joint1": 3}, "joint1 is 3; it must be a table of faults, known are silent"),
        ({"serial0": {"bus_off": True}}, "serial0.bus_off: no such fault, known are none on a serial bus"),
    ],
)
def test_wrong_fault_is_named_and_changes_nothing(faults: dict[str, object], named: str) -> None:
    bus = build_bus(STS, STILL, monotonic_ns(), "serial0")
    with pytest.raises(ValueError, match="ghost") as raised:
        apply_faults(bus, {"joint2": {"silent": True}, **faults, "ghost": {}}, elsewhere=["elbow"])
    assert named in str(raised.value)
    assert not bus.motors[1].faults.silent


def test_every_fault_of_a_motor_can_be_asked_for() -> None:
    wanted = Faults(
        silent=True,
        delay_ms=1.5,
        drop=0.25,
        corrupt=1,
        wrong_id=7,
        stuck_encoder=True,
        temperature_c=90,
        voltage_v=4.5,
        reboot=True,
    )
    bus = build_bus(STS, STILL, monotonic_ns())
    apply_faults(bus, {"joint2": asdict(wanted)})
    assert [simulated.faults for simulated in bus.motors] == [Faults(), wanted]


def test_fault_of_a_bus_stands_under_its_name() -> None:
    bus = build_bus(DAMIAO, STILL, monotonic_ns(), "can0")
    for here in (True, False):
        apply_faults(bus, {"can0": {"bus_off": here}, "can1": {"bus_off": True}}, elsewhere=["can1"])
        assert bus.faults.bus_off == here
    with pytest.raises(ValueError, match=r"can0.bus_off is 1; it must be true or false"):
        apply_faults(bus, {"can0": {"bus_off": 1}})


def test_faults_follow_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bus = build_bus(STS, STILL, monotonic_ns())
    path = tmp_path / "faults.toml"
    file = FaultsFile(path, bus)

    def faults() -> list[tuple[bool, float]]:
        file.poll()
        return [(motor.faults.silent, motor.faults.delay_ms) for motor in bus.motors]

    assert faults() == [(False, 0), (False, 0)]
    path.write_text("[joint1]\nsilent = true\n")
    assert faults() == [(True, 0), (False, 0)]
    path.write_text("[joint1\nsilent = false\n")
    with caplog.at_level(logging.WARNING):
        assert faults() == faults() == [(True, 0), (False, 0)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    path.write_text("[joint2]\ndelay_ms = 3\n")
    assert faults() == [(False, 0), (False, 3)]
    path.unlink()
    assert faults() == [(False, 0), (False, 0)]


def test_silent_motor_behind_a_host_answers_again_when_its_file_is_gone(tmp_path: Path) -> None:
    bus = build_bus(STS, STILL, monotonic_ns())
    path = tmp_path / "faults.toml"
    path.write_text("joint1.silent = true")
    file = FaultsFile(path, bus)
    host: Host[bytes]
    with PtySerialHost(bus, housekeeping=file.poll) as host, open_port(host.port) as port:
        wait_for(lambda: bus.motors[0].faults.silent)
        port.timeout = 0.05
        port.write(PING)
        assert port.read(len(PONG)) == b""
        path.unlink()
        wait_for(lambda: not bus.motors[0].faults.silent)
        port.timeout = 2
        port.write(PING)
        assert port.read(len(PONG)) == PONG
