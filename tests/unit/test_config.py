# ruff: noqa: E501  the tables are read a fault a line
"""The configuration: what is accepted, and how everything else is reported: all at once, each with its place."""

import os
import pickle
import string
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers import motor as driven
from drivers import protocols
from drivers.family import CanId
from drivers.protocols import damiao
from gateway.config import CanBus, Config, ConfigError, Motor, Rs485, SerialBus, load, loads, with_kafka

GOOD = """\
[arm]
name = "arm1"

[[bus]]
name = "can0"
type = "can"
interface = "virtual"
channel = "can0"
rate_hz = 100

[[bus]]
name = "serial0"
type = "serial"
port = "/dev/ttyUSB0"
rate_hz = 200.5

[[motor]]
name = "joint1"
partition = 0
bus = "can0"
protocol = "damiao"
id = 1
position_rad = [-1, 1.5]
velocity_rad_s = 5.0
temperature_c = 80.0

[[motor]]
name = "joint2"
partition = 1
bus = "serial0"
protocol = "feetech_sts"
id = 2
position_rad = [-1.0, 1.0]
velocity_rad_s = 5.0
temperature_c = 80.0
"""
LAST = GOOD.count("\n")  # what a test appends begins on the line after it
KAFKA = '[kafka]\nbootstrap_servers = ["broker:9092"]\n'
NAME = 'must be 1 to 100 letters, digits, "_", "-" or ".", and begin with a letter, a digit or "_"'


def changed(*changes: tuple[str, str], append: str = "") -> str:
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return text + append


def faults(text: str) -> list[str]:
    """The lines of the error for ``text``, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        loads(text, "arm.toml")
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.faults)
    assert all(line.startswith("arm.toml:") for line in lines)
    return [line.removeprefix("arm.toml:") for line in lines]


# --- what is accepted -----------------------------------------------------------------------------------------


def test_a_good_file_becomes_a_config() -> None:
    config = loads(GOOD, "arm.toml")
    assert config.kafka is None
    assert config.simulation is None
    assert (config.journal.max_mb, config.journal.flush_ms) == (2048, 3.0)
    assert (config.arm.late_after_ms, config.arm.offline_after_ms, config.arm.realtime) == (50, 300, True)
    can, serial = config.buses
    assert isinstance(can, CanBus)
    assert (can.interface, can.channel, can.bitrate, can.rate_hz) == ("virtual", "can0", 1_000_000, 100)
    assert isinstance(serial, SerialBus)
    assert (serial.port, serial.baudrate, serial.rate_hz) == ("/dev/ttyUSB0", 1_000_000, 200.5)
    assert [motor.position_rad for motor in config.motors] == [(-1, 1.5), (-1, 1)]


def test_motors_are_found_by_bus_and_become_the_drivers_motors() -> None:
    config = loads(changed(("id = 1\n", "id = 1\nmaster_id = 0x20\n")), "arm.toml")
    (joint1,) = config.motors_on("can0")
    assert joint1.driven() == driven.Motor(0, "joint1", "damiao", 1, damiao.Options(master_id=0x20), (-1, 1.5))
    (joint2,) = config.motors_on("serial0")
    assert joint2.driven() == driven.Motor(1, "joint2", "feetech_sts", 2, position_rad=(-1, 1))
    assert config.motors_on("elsewhere") == ()


def test_a_family_with_options_gets_its_defaults() -> None:
    assert loads(GOOD, "arm.toml").motors[0].options == damiao.Options()


def test_topics_carry_the_arms_name() -> None:
    assert loads(GOOD, "arm.toml").topic("telemetry") == "servo.arm1.telemetry"


def test_a_config_travels_to_another_process() -> None:
    config = loads(changed(append=KAFKA), "arm.toml")
    assert pickle.loads(pickle.dumps(config)) == config


def test_with_simulation_port_and_channel_may_be_left_out() -> None:
    text = changed(('port = "/dev/ttyUSB0"\n', ""), ('channel = "can0"\n', ""), append="[simulation]\n")
    config = loads(text, "arm.toml")
    assert config.simulation is not None
    assert (config.simulation.motion, config.simulation.enabled, config.simulation.faults) == ("wave", True, None)
    assert [getattr(bus, "port", None) or getattr(bus, "channel", None) for bus in config.buses] == [None, None]


def test_simulated_motors_may_answer_on_vcan() -> None:
    loads(changed(('"virtual"\nchannel = "can0"', '"socketcan"\nchannel = "vcan0"'), append="[simulation]\n"), "x")


def test_paths_are_relative_to_the_file_and_know_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    tls = 'security_protocol = "SSL"\nssl_cafile = "~/ca.pem"\nssl_certfile = "tls/me.pem"\nssl_keyfile = "/k.pem"\n'
    simulation = '[simulation]\nfaults = "faults.toml"\n'
    text = changed(('"arm1"', '"arm1"\nstate_dir = "state"'), append=KAFKA + tls + simulation)
    config = loads(text, "/etc/arms/arm.toml")
    assert config.arm.state_dir == Path("/etc/arms/state")
    assert config.kafka is not None
    assert config.kafka.ssl_cafile == Path("/home/ada/ca.pem")
    assert config.kafka.ssl_certfile == Path("/etc/arms/tls/me.pem")
    assert config.kafka.ssl_keyfile == Path("/k.pem")
    assert config.simulation is not None
    assert config.simulation.faults == Path("/etc/arms/faults.toml")


@pytest.mark.parametrize(
    ("xdg", "expected"),
    [
        (None, "/home/ada/.local/state/servo-gateway/arm1"),
        ("/var/x", "/var/x/servo-gateway/arm1"),
        ("not/absolute", "/home/ada/.local/state/servo-gateway/arm1"),
    ],
)
def test_the_default_state_dir_is_the_xdg_one(monkeypatch: pytest.MonkeyPatch, xdg: str | None, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_STATE_HOME", xdg)
    assert loads(GOOD, "/etc/arms/arm.toml").arm.state_dir == Path(expected)


def test_with_kafka_replaces_the_servers_and_keeps_the_rest() -> None:
    bare = loads(GOOD, "arm.toml")
    added = with_kafka(bare, ["a:1", "[::1]:2"])
    assert added.kafka is not None
    assert added.kafka.bootstrap_servers == ("a:1", "[::1]:2")
    assert bare.kafka is None
    configured = loads(changed(append=KAFKA + 'format = "json"\n'), "arm.toml")
    replaced = with_kafka(configured, ["a:1"])
    assert replaced.kafka is not None
    assert (replaced.kafka.bootstrap_servers, replaced.kafka.format) == (("a:1",), "json")


def test_with_kafka_refuses_what_is_no_server() -> None:
    with pytest.raises(ConfigError, match=r'--kafka: kafka.bootstrap_servers\[0\] = "a": must be "host:port"'):
        with_kafka(loads(GOOD, "arm.toml"), ["a"])


# --- secrets --------------------------------------------------------------------------------------------------

SASL = KAFKA + 'security_protocol = "SASL_SSL"\nsasl_mechanism = "SCRAM-SHA-512"\nsasl_username = "me"\n'


def test_the_password_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    kafka = loads(changed(append=SASL + 'sasl_password_env = "SERVO_TEST_PW"\n'), "arm.toml").kafka
    assert kafka is not None
    monkeypatch.setenv("SERVO_TEST_PW", "hunter2")
    assert kafka.sasl_password() == "hunter2"
    assert "hunter2" not in repr(kafka)
    monkeypatch.delenv("SERVO_TEST_PW")
    with pytest.raises(ConfigError, match=r'kafka.sasl_password_env = "SERVO_TEST_PW": no such variable'):
        kafka.sasl_password()


def test_the_password_comes_from_a_file(tmp_path: Path) -> None:
    text = changed(append=SASL + 'sasl_password_file = "pw"\n')
    kafka = loads(text, tmp_path / "arm.toml").kafka
    assert kafka is not None
    with pytest.raises(ConfigError, match=r"pw: kafka.sasl_password_file: cannot be read: No such file"):
        kafka.sasl_password()
    (tmp_path / "pw").write_text("hunter2\n")
    assert kafka.sasl_password() == "hunter2"
    (tmp_path / "pw").write_text("\n")
    with pytest.raises(ConfigError, match=r"is empty"):
        kafka.sasl_password()
    (tmp_path / "pw").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"not UTF-8"):
        kafka.sasl_password()


def test_without_sasl_there_is_no_password() -> None:
    kafka = loads(changed(append=KAFKA), "arm.toml").kafka
    assert kafka is not None
    assert kafka.sasl_password() is None
    assert kafka.ssl_keyfile_password() is None


def test_a_password_is_never_printed() -> None:
    text = changed(append=KAFKA + 'sasl_password = "hunter2"\nsasl_password_env = "hunter2!"\npasword = "hunter2"\n')
    assert "hunter2" not in "\n".join(faults(text))


# --- faults: the table ----------------------------------------------------------------------------------------

SHAPE = [
    (("id = 1\n", "id = true\n"), '22: motor[0] "joint1" id = true: must be a whole number'),
    (("id = 1\n", 'id = "1"\n'), '22: motor[0] "joint1" id = "1": must be a whole number'),
    (("id = 1\n", "id = 1.0\n"), '22: motor[0] "joint1" id = 1.0: must be a whole number'),
    (("id = 1\n", "id = -1\n"), '22: motor[0] "joint1" id = -1: must be at least 0'),
    (("id = 1\n", ""), '17: motor[0] "joint1" id: is missing: its address on the bus'),
    (("rate_hz = 100", "rate_hz = inf"), '9: bus[0] "can0" rate_hz = inf: must be a finite number'),
    (("rate_hz = 100", "rate_hz = nan"), '9: bus[0] "can0" rate_hz = nan: must be a finite number'),
    (("rate_hz = 100", "rate_hz = 0"), '9: bus[0] "can0" rate_hz = 0: must be more than 0'),
    (("rate_hz = 100", "rate_hz = 2000.5"), '9: bus[0] "can0" rate_hz = 2000.5: must be at most 2000'),
    (("rate_hz = 100", "rate_hz = false"), '9: bus[0] "can0" rate_hz = false: must be a number'),
    (("rate_hz = 100", "rate_hz = 1979-05-27"), '9: bus[0] "can0" rate_hz = 1979-05-27: must be a number'),
    (("rate_hz = 100", "rate_hz = { a = 3 }"), '9: bus[0] "can0" rate_hz = {...}: must be a number'),
    (("rate_hz = 100", "bitrate = 5_000_000\nrate_hz = 100"), '9: bus[0] "can0" bitrate = 5000000: must be at most 1000000'),
    (("[-1, 1.5]", "[1, 1]"), '23: motor[0] "joint1" position_rad = [1, 1]: must be [lowest, highest], the lowest first'),
    (("[-1, 1.5]", "[1]"), '23: motor[0] "joint1" position_rad[1]: is missing'),
    (("[-1, 1.5]", "[1, 2, 3]"), '23: motor[0] "joint1" position_rad = [1, 2, 3]: must have 2 items'),
    (("[-1, 1.5]", "3"), '23: motor[0] "joint1" position_rad = 3: must be a list: [..., ...]'),
    (("[-1, 1.5]", "[-inf, 1]"), '23: motor[0] "joint1" position_rad[0] = -inf: must be a finite number'),
    (('"can"', '"cann"'), '6: bus[0] "can0" type = "cann": must be "can" or "serial"'),
    (('type = "can"\n', ""), '4: bus[0] "can0" type: is missing: must be "can" or "serial"'),
    (('"joint1"', "3"), "18: motor[0] name = 3: must be text, in quotes"),
    (('"joint1"', '"*"'), f'18: motor[0] "*" name = "*": {NAME}'),
    (('"arm1"', '".."'), f'2: arm.name = "..": {NAME}'),
    (('"arm1"', '"arm 1"'), f'2: arm.name = "arm 1": {NAME}'),
    (('"arm1"', '"arm1"\nnmae = 1'), '3: arm.nmae: unknown; did you mean "name"?'),
    (('"arm1"', '"arm1"\nrealtime = 1'), "3: arm.realtime = 1: must be true or false"),
    (('"arm1"', '"arm1"\nstate_dir = ""'), '3: arm.state_dir = "": must be a path, as text in quotes'),
    (('"arm1"', '"arm1"\nstate_dir = "~nobody-at-all/x"'), '3: arm.state_dir = "~nobody-at-all/x": names the home directory of a user who has none; write the path in full'),
    (("partition = 0", "partition = 0x1" + "0" * 5000), '19: motor[0] "joint1" partition = 0x1' + "0" * 74 + "...: must be at most 9999"),
    (('"arm1"', '"arm1"\noffline_after_ms = 50'), "3: arm.offline_after_ms = 50: must be more than late_after_ms, which is 50"),
    (("[arm]", "[[arm]]"), "1: arm = [{...}]: must be a table: [arm]"),
]  # fmt: skip

RELATIONS = [
    (("id = 1\n", "id = 300\n"), '22: motor[0] "joint1" id = 300: must be 1..15 for damiao'),
    (("id = 2\n", "id = 254\n"), '32: motor[1] "joint2" id = 254: must be 0..253 for feetech_sts'),
    (("joint2", "joint1"), '28: motor[1] "joint1" name = "joint1": is also the name of motor[0] "joint1"; each needs its own'),
    (("= 1\nbus", "= 0\nbus"), '29: motor[1] "joint2" partition = 0: is also the partition of motor[0] "joint1"; each needs its own'),
    (('bus = "can0"', 'bus = "cam0"'), '20: motor[0] "joint1" bus = "cam0": no [[bus]] has this name; did you mean "can0"?'),
    (('"damiao"', '"damio"'), '21: motor[0] "joint1" protocol = "damio": no such protocol; did you mean "damiao"?'),
    (('"virtual"', '"virtua"'), '7: bus[0] "can0" interface = "virtua": python-can has no such interface; did you mean "virtual"?'),
    (('channel = "can0"\n', ""), '4: bus[0] "can0" channel: is missing: without [simulation] a CAN bus needs its channel'),
    (('port = "/dev/ttyUSB0"\n', ""), '11: bus[1] "serial0" port: is missing: without [simulation] a serial bus needs its device'),
    (("rate_hz = 100", 'rate_hz = 100\noptions = { channel = "can1" }'), '10: bus[0] "can0" options.channel = "can1": is a key of the bus itself; set it there'),
    (("rate_hz = 100", 'rate_hz = 100\nport = "x"'), '10: bus[0] "can0" port: unknown; known: bitrate, channel, data_bitrate, fd, interface, name, options, rate_hz, type'),
    (("id = 1\n", "id = 1\nmaster_id = true\n"), '23: motor[0] "joint1" master_id = true: must be a whole number'),
    (("id = 1\n", "id = 1\nmaster_id = 0x101\n"), '23: motor[0] "joint1" master_id = 257: puts its replies on CAN identifier 0x101, where motor[0] "joint1" has its POS_VEL commands; choose another master_id'),
    (("id = 1\n", "id = 1\nwheels = 4\n"), '23: motor[0] "joint1" wheels: unknown; known: bus, id, master_id, name, partition, position_rad, position_tolerance_rad, protocol, stop_on, temperature_c, torque_nm, velocity_rad_s'),
    (("id = 2\n", "id = 2\nmaster_id = 17\n"), '33: motor[1] "joint2" master_id: unknown; known: bus, id, name, partition, position_rad, position_tolerance_rad, protocol, stop_on, temperature_c, torque_nm, velocity_rad_s'),
    (("temperature_c", "temprature_c = 1\ntemperature_c"), '25: motor[0] "joint1" temprature_c: unknown; did you mean "temperature_c"?'),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), SHAPE + RELATIONS)
def test_a_fault_is_reported_with_its_line_place_value_and_remedy(change: tuple[str, str], expected: str) -> None:
    assert faults(changed(change)) == [expected]


@pytest.mark.parametrize(
    ("append", "expected"),
    [
        (
            '[[bus]]\nname = "can7"\ntype = "serial"\nport = "x"\nrate_hz = 100\n',
            [f'{LAST + 2}: bus[2] "can7" name = "can7": no [[motor]] is on this bus; add one, or remove the bus'],
        ),
        ("[kafak]\n", [f'{LAST + 1}: kafak: unknown; did you mean "kafka"?']),
        ("[journal]\nmax_mb = 1\n", [f"{LAST + 2}: journal.max_mb = 1: must be at least 16"]),
        ("[journal]\nflush_ms = 0\n", [f"{LAST + 2}: journal.flush_ms = 0: must be more than 0"]),
        ('[simulation]\nmotion = "wavy"\n', [f'{LAST + 2}: simulation.motion = "wavy": must be "wave" or "still"']),
        (
            '[kafka]\nbootstrap_servers = [\n  "a:1",\n  "b",\n  "c:0",\n]\nformat = "avro"\n',
            [
                f'{LAST + 2}: kafka.bootstrap_servers[1] = "b": must be "host:port", for example "127.0.0.1:9092"',
                f'{LAST + 2}: kafka.bootstrap_servers[2] = "c:0": must be "host:port", for example "127.0.0.1:9092"',
                f'{LAST + 7}: kafka.format = "avro": must be "protobuf" or "json"',
            ],
        ),
        (
            KAFKA + 'security_protocol = "ssl"\n',
            [
                f'{LAST + 3}: kafka.security_protocol = "ssl": '
                'must be "PLAINTEXT", "SSL", "SASL_PLAINTEXT" or "SASL_SSL"'
            ],
        ),
        ("[kafka]\nbootstrap_servers = []\n", [f"{LAST + 2}: kafka.bootstrap_servers = []: must not be empty"]),
        (
            KAFKA + "replication_factor = 0\n",
            [f"{LAST + 3}: kafka.replication_factor = 0: must be at least 1, or -1 for the broker's default"],
        ),
        (
            KAFKA + 'sasl_username = "me"\nssl_cafile = "ca.pem"\n',
            [
                f'{LAST + 3}: kafka.sasl_username = "me": is not used with PLAINTEXT; remove it, or use SASL_SSL',
                f'{LAST + 4}: kafka.ssl_cafile = "ca.pem": is not used with PLAINTEXT; remove it, or use SASL_SSL',
            ],
        ),
        (
            KAFKA + 'security_protocol = "SASL_SSL"\n',
            [
                f"{LAST + 1}: kafka.sasl_mechanism: is missing: SASL_SSL needs one, best SCRAM-SHA-512",
                f"{LAST + 1}: kafka.sasl_username: is missing: SASL_SSL needs it",
                f"{LAST + 1}: kafka.sasl_password_env: is missing: SASL_SSL needs it, or sasl_password_file",
            ],
        ),
        (
            SASL + 'sasl_password = "hunter2"\n',
            [
                f"{LAST + 6}: kafka.sasl_password: must not be in a file that is copied and shown around; "
                "use sasl_password_env or sasl_password_file"
            ],
        ),
        (
            SASL + 'sasl_password_env = "A"\nsasl_password_file = "b"\nssl_keyfile = "k"\n',
            [
                f"{LAST + 1}: kafka.ssl_certfile: is missing: the key needs its certificate",
                f"{LAST + 7}: kafka.sasl_password_file: stands beside sasl_password_env; one of the two must go",
            ],
        ),
        (
            KAFKA + 'security_protocol = "SASL_SSL"\nsasl_mechanism = "GSSAPI"\nsasl_password_env = "A"\n',
            [f"{LAST + 5}: kafka.sasl_password_env: is not used with GSSAPI, which takes a Kerberos ticket; remove it"],
        ),
    ],
)
def test_faults_in_optional_tables_are_reported(append: str, expected: list[str]) -> None:
    assert faults(changed(append=append)) == expected


@pytest.mark.parametrize("channel", ['channel = "can0"\n', 'channel = "xvcan0"\n', ""])
def test_simulated_motors_never_answer_on_a_real_bus(channel: str) -> None:
    change = ('interface = "virtual"\nchannel = "can0"\n', f'interface = "socketcan"\n{channel}')
    assert any(
        "simulated motors must never answer" in line for line in faults(changed(change, append="[simulation]\n"))
    )


@pytest.mark.parametrize("brackets", ["a = " + "[" * 5000, "a = " + "9" * 5000])
def test_what_python_cannot_hold_is_no_configuration(brackets: str) -> None:
    assert faults(brackets)[0].startswith(" not TOML: ")


def test_a_family_on_the_wrong_kind_of_bus_is_reported() -> None:
    text = changed(('bus = "can0"', 'bus = "serial0"'))
    assert '21: motor[0] "joint1" protocol = "damiao": needs a can bus, and "serial0" is a serial bus' in faults(text)


def test_two_motors_with_one_id_on_one_bus_are_reported() -> None:
    text = changed(('"serial0"\nprotocol = "feetech_sts"\nid = 2', '"can0"\nprotocol = "damiao"\nid = 1'))
    message = 'is also the id of motor[0] "joint1"; each on this bus needs its own'
    assert f'32: motor[1] "joint2" id = 1: {message}' in faults(text)


def test_a_clash_between_motors_is_reported_beside_other_faults_of_theirs() -> None:
    found = faults(changed(("id = 1\n", "id = 1\nmaster_id = 1\n"), ("temperature_c = 80.0", "temperature_c = 800")))
    assert [line.split(":")[0] for line in found] == ["23", "26"]
    assert 'CAN identifier 0x1, where motor[0] "joint1" has its MIT commands' in found[0]


CANOPEN = 'protocol = "cia402"\nunits_per_turn = 36000\n'
DAMIAO = 'protocol = "damiao"\n'
RMD_X = 'protocol = "rmd_x"\n'


def two_on_can(first: str, second: str) -> str:
    """The keys, protocol to id, of two motors on one bus."""
    return changed(
        ('protocol = "damiao"\nid = 1', first),
        ('bus = "serial0"\nprotocol = "feetech_sts"\nid = 2', f'bus = "can0"\n{second}'),
        ('[[bus]]\nname = "serial0"\ntype = "serial"\nport = "/dev/ttyUSB0"\nrate_hz = 200.5\n', ""),
    )


@pytest.mark.parametrize(
    ("first", "second", "place", "clash"),
    [
        (DAMIAO + "id = 1", DAMIAO + "id = 2\nmaster_id = 0x201",
         'motor[1] "joint2" master_id = 513', 'replies on CAN identifier 0x201, where motor[0] "joint1" has its VEL commands'),
        (DAMIAO + "id = 2\nmaster_id = 0x301", DAMIAO + "id = 1",
         'motor[0] "joint1" master_id = 769', 'replies on CAN identifier 0x301, where motor[1] "joint2" has its FORCE_POS commands'),
        (DAMIAO + "id = 1\nmaster_id = 0", CANOPEN + "id = 2",
         'motor[0] "joint1" master_id = 0', 'replies on CAN identifier 0x0, where motor[1] "joint2" has its NMT'),
        (CANOPEN + "id = 2", DAMIAO + "id = 1\nmaster_id = 0x80",
         'motor[1] "joint2" master_id = 128', 'replies on CAN identifier 0x80, where motor[0] "joint1" has its SYNC'),
        (RMD_X + "id = 3", DAMIAO + "id = 1\nmaster_id = 0x143",
         'motor[1] "joint2" master_id = 323', 'replies on CAN identifier 0x143, where motor[0] "joint1" has its commands'),
        (DAMIAO + "id = 1\nmaster_id = 0x280", RMD_X + "id = 3",
         'motor[0] "joint1" master_id = 640', 'replies on CAN identifier 0x280, where motor[1] "joint2" has its commands to all'),
        (RMD_X + "id = 1", CANOPEN + "id = 65",
         'motor[1] "joint2" id = 65', 'RPDO1 on CAN identifier 0x241, where motor[0] "joint1" has its replies'),
        (CANOPEN + "id = 96", RMD_X + "id = 32",
         'motor[1] "joint2" id = 32', 'replies on CAN identifier 0x260, where motor[0] "joint1" has its RPDO1'),
    ],
)  # fmt: skip
def test_a_can_identifier_with_two_meanings_is_reported(first: str, second: str, place: str, clash: str) -> None:
    (found,) = faults(two_on_can(first, second))
    key = place.split()[2]
    assert found.partition(": ")[2] == f"{place}: puts its {clash}; choose another {key}"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (DAMIAO + "id = 1\nmaster_id = 0", DAMIAO + "id = 2\nmaster_id = 0"),
        (CANOPEN + "id = 1", CANOPEN + "id = 126"),
        (RMD_X + "id = 1", RMD_X + "id = 32"),
        (RMD_X + "id = 1", CANOPEN + "id = 64"),
        (DAMIAO + "id = 1", CANOPEN + "id = 2"),
        (DAMIAO + "id = 15", RMD_X + "id = 16"),
    ],
)
def test_motors_that_cannot_be_mistaken_may_share_a_can_bus(first: str, second: str) -> None:
    assert len(loads(two_on_can(first, second), "arm.toml").motors_on("can0")) == 2


def test_motors_of_two_families_with_one_id_are_told_so_and_no_more() -> None:
    assert len(faults(two_on_can(DAMIAO + "id = 1", CANOPEN + "id = 1"))) == 1


def test_an_option_that_the_family_itself_refuses_is_reported_at_its_key() -> None:
    assert faults(changed(("id = 1\n", "id = 1\nmaster_id = 0x900\n")))[0].startswith(
        '23: motor[0] "joint1" master_id = 2304: '
    )


def test_an_option_misspelt_hides_no_other() -> None:
    found = faults(changed(("id = 1\n", "id = 1\nmastr_id = 1\nmaster_id = 0x900\n")))
    assert [line.split(":")[0] for line in found] == ["23", "24"]


def test_a_bus_is_named_as_a_file_may_be() -> None:
    text = changed(('name = "can0"', 'name = "a/b"'), ('bus = "can0"', 'bus = "a/b"'))
    assert faults(text) == [f'5: bus[0] "a/b" name = "a/b": {NAME}']


def test_two_buses_of_one_name_are_reported() -> None:
    assert '12: bus[1] "can0" name = "can0": is also the name of bus[0] "can0"; each needs its own' in faults(
        changed(('"serial0"', '"can0"'))
    )


def test_all_faults_come_at_once_in_the_order_of_the_lines() -> None:
    changes = [(old, new) for (old, new), _ in SHAPE[:1] + RELATIONS[1:3] + RELATIONS[6:7]]
    found = faults(changed(*changes, ('"arm1"', "1"), ("[-1.0, 1.0]", "[1.0, -1.0]"), append="[journal]\nmax_mb = 1\n"))
    assert [line.split(":")[0] for line in found] == ["2", "7", "22", "28", "32", "33", f"{LAST + 2}"]


def test_faults_carry_their_parts() -> None:
    with pytest.raises(ConfigError) as caught:
        loads(changed(("id = 1\n", "id = 300\n")), "arm.toml")
    (fault,) = caught.value.faults
    assert (fault.place, fault.value, fault.line) == ('motor[0] "joint1" id', 300, 22)
    assert caught.value.where == "arm.toml"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# --- rates ------------------------------------------------------------------------------------------------------------

MOTOR = GOOD[GOOD.rindex("[[motor]]") :]


def arm(bus: str, motors: int, protocol: str) -> str:
    """One bus named b (its table begins in line 3) and so many motors."""
    one = MOTOR.replace("serial0", "b").replace("feetech_sts", protocol)
    numbered = [
        one.replace("joint2", f"j{n}").replace("= 1\nbus", f"= {n}\nbus").replace("id = 2", f"id = {n}")
        for n in range(1, motors + 1)
    ]
    return f'[arm]\nname = "a"\n[[bus]]\nname = "b"\n{bus}\n{"".join(numbered)}'


STS = 'type = "serial"\nport = "x"\nrate_hz = '
CAN = 'type = "can"\nchannel = "x"\ninterface = "slcan"\nrate_hz = '


@pytest.mark.parametrize(
    ("bus", "motors", "protocol", "most"),  # six: 1400 bits of 10 a byte; 12 frames of 111 bits
    [
        (STS + "%d", 6, "feetech_sts", 714),
        (STS + "%d\nbaudrate = 500_000", 6, "feetech_sts", 357),
        (CAN + "%d", 6, "damiao", 750),
        (CAN + "%d\nbitrate = 500_000", 6, "damiao", 375),
    ],
)
def test_a_rate_that_the_wire_cannot_carry_is_refused_and_what_it_can_is_not(
    bus: str, motors: int, protocol: str, most: int
) -> None:
    loads(arm(bus % most, motors, protocol), "arm.toml")
    (fault,) = faults(arm(bus % (most + 1), motors, protocol))
    assert f"at most {most} Hz" in fault


def test_a_rate_is_refused_with_the_figures() -> None:
    assert faults(arm(STS + "900", 6, "feetech_sts")) == [
        '7: bus[0] "b" rate_hz = 900: to poll 6 feetech_sts takes 1400 us on the wire at 1000000 baud: at most 714 Hz'
    ]


def test_simulated_motors_on_the_virtual_bus_have_no_wire() -> None:
    loads(arm(CAN.replace("slcan", "virtual") + "2000", 6, "damiao"), "arm.toml")


def test_wire_time_gives_the_virtual_bus_one() -> None:
    text = arm(CAN.replace("slcan", "virtual") + "2000", 6, "damiao") + "[simulation]\nwire_time = true\n"
    (fault,) = faults(text)
    assert "to poll 6 damiao takes 1332 us on the wire" in fault


def test_several_families_on_a_bus_share_its_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(damiao.Damiao):
        name = "other"

        @classmethod
        def poll_bits(cls, motors: Sequence[driven.Motor]) -> int:
            return 1000 * len(motors)

        @classmethod
        def can_ids(cls, motor: driven.Motor) -> Sequence[CanId]:
            return ()

    real = protocols.load
    monkeypatch.setattr(protocols, "family_names", lambda: ("damiao", "other"))
    monkeypatch.setattr(protocols, "load", lambda name: Other if name == "other" else real(name))
    text = arm(CAN + "1000", 2, "damiao").replace('"damiao"', '"other"', 1)
    (fault,) = faults(text)
    assert "to poll 1 other and 1 damiao takes 1222 us on the wire at 1000000 bit/s: at most 818 Hz" in fault


@pytest.mark.parametrize("append", ["", "late_after_ms = 50\n"])
def test_a_motor_must_not_be_late_before_its_next_reply_is_due(append: str) -> None:
    text = changed(('name = "arm1"\n', f'name = "arm1"\n{append}'), ("rate_hz = 100", "rate_hz = 10"))
    assert faults(text) == [
        f'{9 + bool(append)}: bus[0] "can0" rate_hz = 10: a motor replies every 100 ms, and arm.late_after_ms is 50; '
        "set that above 100, or rate_hz above 20"
    ]


def test_a_slow_bus_is_good_with_patience() -> None:
    loads(changed(('"arm1"', '"arm1"\nlate_after_ms = 100.1'), ("rate_hz = 100", "rate_hz = 10")), "arm.toml")


def test_a_motors_watchdog_must_outlast_three_periods_of_its_bus() -> None:
    arm = '"arm1"\nlate_after_ms = 400\noffline_after_ms = 900'
    slow = changed(('"arm1"', arm), ("rate_hz = 100", "rate_hz = 5"))
    assert faults(slow) == [
        '11: bus[0] "can0" rate_hz = 5: 3 periods are 600 ms, and arm.motor_watchdog_ms is 500; '
        "set that above 600 (0: none), or rate_hz above 6: damiao would stop by themselves"
    ]
    for value in (0, 601):
        loads(slow.replace('"arm1"', f'"arm1"\nmotor_watchdog_ms = {value}'), "arm.toml")


def test_a_bus_without_watchdogs_may_be_as_slow_as_it_likes() -> None:
    slow = ("rate_hz = 200.5", "rate_hz = 5")
    loads(changed(('"arm1"', '"arm1"\nlate_after_ms = 400\noffline_after_ms = 900'), slow), "arm.toml")


# --- files that are no configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[arm\n", ["1: not TOML: Expected ']' at the end of a table declaration (at line 1, column 5)"]),
        ("\n[arm]\nname = arm1\n", ["3: not TOML: Invalid value (at line 3, column 8)"]),
        ('[arm]\nname = """\n', [" not TOML: Unterminated string (at end of document)"]),
        (
            "# nothing\n",
            [
                " arm: is missing: [arm] with at least the arm's name",
                " bus: is missing: one [[bus]] for each bus",
                " motor: is missing: one [[motor]] for each motor",
            ],
        ),
        (
            "arm = 1\nbus = 2\nkafka = []\njournal = true\n[motor]\n[simulation]\n",
            [
                "1: arm = 1: must be a table: [arm]",
                "2: bus = 2: must be written [[bus]], once for each bus",
                "3: kafka = []: must be a table: [kafka]",
                "4: journal = true: must be a table: [journal]",
                "5: motor = {...}: must be written [[motor]], once for each motor",
            ],
        ),
    ],
)
def test_what_is_no_configuration_is_said_plainly(text: str, expected: list[str]) -> None:
    assert faults(text) == expected


def test_a_file_that_cannot_be_read_is_said_plainly(tmp_path: Path) -> None:
    missing, latin = tmp_path / "no.toml", tmp_path / "latin.toml"
    latin.write_bytes("[arm]\nname = 'Zoë'\n".encode("latin-1"))
    for path, message in [
        (missing, f"{missing}: cannot be read: No such file or directory"),
        (tmp_path, f"{tmp_path}: cannot be read: Is a directory"),
        (
            latin,
            f"{latin}: cannot be read: 'utf-8' codec can't decode byte 0xeb in position 16: invalid continuation byte",
        ),
        (latin / "x", f"{latin / 'x'}: cannot be read: Not a directory"),
        (Path("\0"), "\0: cannot be read: embedded null byte"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(caught.value) == message


def test_a_byte_order_mark_and_foreign_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "arm.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load(path).arm.name == "arm1"


# --- lines ----------------------------------------------------------------------------------------------------


def test_lines_are_right_behind_what_looks_like_tables() -> None:
    head = """\
# [arm] "\'\' don't
[arm]   # "
name = "arm1"
 [ "journal" ]  # [
max_mb = 2048 # = 3
"flush_ms" = 2.0
"""
    text = head + GOOD.removeprefix('[arm]\nname = "arm1"\n') + 'x.y = [ # [\n "]", { z = "[" },\n]\nw = 1\n'
    line = head.count("\n") + LAST - 2
    known = f"known: {', '.join(sorted(set(Motor.model_fields) - {'options'}))}"
    assert faults(text) == [
        f'{line + 1}: motor[1] "joint2" x: unknown; {known}',
        f'{line + 4}: motor[1] "joint2" w: unknown; {known}',
    ]


def test_dotted_keys_and_inline_tables_have_the_line_they_stand_on() -> None:
    text = changed(('[arm]\nname = "arm1"', 'arm.name = "a b"\njournal = { max_mb = 1 }'))
    assert faults(text) == [f'1: arm.name = "a b": {NAME}', "2: journal.max_mb = 1: must be at least 16"]


# --- nothing but a Config or a ConfigError ----------------------------------------------------------------------


def outcome(text: str) -> Config | ConfigError:
    try:
        return loads(text, "arm.toml")
    except ConfigError as error:
        result = error
    assert result.faults
    assert str(result)
    return result


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        plain = string.ascii_letters + string.digits + " _-./:*"
        return '"' + "".join(char if char in plain else f"\\U{ord(char):08X}" for char in value) + '"'
    return str(value).lower()


characters = st.characters(exclude_categories=["Cs"])
keys = st.sampled_from(
    ["arm", "bus", "motor", "kafka", "name", "type", "can", "serial", "id", "options", "protocol", "channel", "port"]
)
words = st.text(characters, max_size=5) | st.sampled_from(
    ["can", "serial", "damiao", "feetech_sts", "can0", "joint1", "socketcan"]
)
values = st.recursive(
    words | st.booleans() | st.integers() | st.integers(0, 3) | st.floats() | st.just("\0"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(keys | st.text(characters, max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.text(characters))
def test_any_text_gives_a_config_or_a_config_error(text: str) -> None:
    outcome(text)


@given(st.dictionaries(keys, values, max_size=5))
def test_any_toml_gives_a_config_or_a_config_error(tables: dict[str, Any]) -> None:
    text = "".join(f"{toml(key)} = {toml(value)}\n" for key, value in tables.items())
    assert set(tomllib.loads(text)) == set(tables)
    outcome(text)


@given(st.integers(0, LAST - 1), values, st.booleans())
def test_any_value_in_any_line_gives_a_config_or_faults_with_lines(line: int, value: Any, repeat: bool) -> None:
    lines = GOOD.splitlines()
    key, equals, _ = lines[line].partition(" = ")
    if equals:
        lines[line] = f"{key} = {toml(value)}"
    elif repeat:
        lines.insert(line, lines[line])
    else:
        del lines[line]
    result = outcome(os.linesep.join(lines))
    if equals and isinstance(result, ConfigError):
        assert all(fault.line for fault in result.faults)


# --- what a bus is opened with ----------------------------------------------------------------------------------


def bus_with(key: str, bus: str = "serial0") -> str:
    rate = {"can0": "rate_hz = 100\n", "serial0": "rate_hz = 200.5\n"}[bus]
    return changed((rate, f"{rate}{key}\n"))


@pytest.mark.parametrize(
    ("key", "rs485"),
    [
        ("rs485 = true", Rs485()),
        ("rs485 = false", None),
        ("", None),
        (
            "rs485 = { rts_level_for_tx = false, rts_level_for_rx = true, delay_before_tx_ms = 1 }",
            Rs485(rts_level_for_tx=False, rts_level_for_rx=True, delay_before_tx_ms=1),
        ),
    ],
)
def test_rs485_is_true_or_a_table(key: str, rs485: Rs485 | None) -> None:
    _, serial = loads(bus_with(key), "arm.toml").buses
    assert isinstance(serial, SerialBus)
    assert serial.rs485 == rs485


def test_can_fd_has_a_rate_of_its_own() -> None:
    can, _ = loads(bus_with("fd = true\ndata_bitrate = 5_000_000", "can0"), "arm.toml").buses
    assert isinstance(can, CanBus)
    assert (can.fd, can.data_bitrate) == (True, 5_000_000)


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("rs485 = 3", '16: bus[1] "serial0" rs485 = 3: must be true, false or a table'),
        (
            "rs485 = { delay_before_rx_ms = 101 }",
            '16: bus[1] "serial0" rs485.delay_before_rx_ms = 101: must be at most 100',
        ),
        (
            "rs485 = { delay_before_tx = 1 }",
            '16: bus[1] "serial0" rs485.delay_before_tx: unknown; did you mean "delay_before_tx_ms"?',
        ),
    ],
)
def test_wrong_rs485_is_told_with_what_would_be_right(key: str, fault: str) -> None:
    assert faults(bus_with(key)) == [fault]


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        (
            "data_bitrate = 5_000_000",
            '10: bus[0] "can0" data_bitrate = 5000000: is used with CAN FD only; remove it, or set fd = true',
        ),
        ("fd = 1", '10: bus[0] "can0" fd = 1: must be true or false'),
        ("fd = true\ndata_bitrate = 9_000_000", '11: bus[0] "can0" data_bitrate = 9000000: must be at most 8000000'),
        ("options = { fd = true }", '10: bus[0] "can0" options.fd = true: is a key of the bus itself; set it there'),
    ],
)
def test_wrong_can_fd_is_told_with_what_would_be_right(key: str, fault: str) -> None:
    assert faults(bus_with(key, "can0")) == [fault]


# --- who may command --------------------------------------------------------------------------------------------------

KEY = '[[commands.key]]\nissuer = "cell1"\nsecret_env = "CELL1_SECRET"\n'


@pytest.mark.parametrize(
    ("append", "expected"),
    [
        ("[commands]\nissuers = []\n", ["2: commands.issuers = []: must not be empty"]),
        ('[commands]\nissuers = ["a", 3]\n', ["2: commands.issuers[1] = 3: must be text, in quotes"]),
        ("[commands]\nissuers = 3\n", ["2: commands.issuers = 3: must be a list: [..., ...]"]),
        ('[commands]\nlocal = "sigend"\n', ['2: commands.local = "sigend": must be "unsigned" or "signed"']),
        ('[commands]\nlocal = "signed"\n', ['2: commands.local = "signed": there is no [[commands.key]] to sign with; add one']),
        ('[commands]\nissuer = "a"\n', ['2: commands.issuer: unknown; did you mean "issuers"?']),
        ("[commands.key]\n", ["1: commands.key = {...}: must be written [[commands.key]], once for each key"]),
        ("[commands]\nkey = [1]\n", ["2: commands.key[0] = 1: must be a table: [[commands.key]]"]),
        ("[[commands.key]]\nsecret_env = \"A\"\n", ["1: commands.key[0].issuer: is missing: who signs with it: the issuer that its commands name"]),
        ('[[commands.key]]\nissuer = "cell1"\n', ["1: commands.key[0].secret_env: is missing: the key needs its secret, or secret_file"]),
        (KEY + 'secret_file = "x"\n', ["4: commands.key[0].secret_file: stands beside secret_env; one of the two must go"]),
        (KEY.replace("_env", ""), ["3: commands.key[0].secret: must not be in a file that is copied and shown around; use secret_env or secret_file"]),
        (KEY.replace("CELL1_SECRET", "hunter 2"), ["3: commands.key[0].secret_env: must be the name of an environment variable: letters, digits and _"]),
        (KEY + KEY, ['5: commands.key[1].issuer = "cell1": is also the issuer of commands.key[0]; each needs its own']),
        ('[commands]\nissuers = ["cell2"]\n' + KEY, [
            '2: commands.issuers[0] = "cell2": has no [[commands.key]]; where one issuer signs, all must, or its name would let anybody in',
            '4: commands.key[0].issuer = "cell1": is not among commands.issuers, so that nothing of it is taken; add it',
        ]),
    ],
)  # fmt: skip
def test_a_fault_in_who_may_command_is_told_with_its_line(append: str, expected: list[str]) -> None:
    first = GOOD.count("\n")
    placed = [f"{first + int(line)}:{rest}" for line, _, rest in (fault.partition(":") for fault in expected)]
    assert faults(GOOD + append) == placed


def test_who_may_command_is_read_as_it_stands() -> None:
    config = loads(GOOD + '[commands]\nissuers = ["cell1"]\nlocal = "signed"\n' + KEY, "arm.toml")
    assert (config.commands.issuers, config.commands.local) == (("cell1",), "signed")
    assert [(key.issuer, key.secret_env) for key in config.commands.keys] == [("cell1", "CELL1_SECRET")]
    assert loads(GOOD, "arm.toml").commands.keys == ()
