"""From a configuration to the plans of the child processes."""

import pickle
from pathlib import Path

import pytest

from drivers.buses import CanSpec, Rs485, SerialSpec
from drivers.clock import MS
from drivers.cycle import Timing
from drivers.motor import Motor
from gateway.config import Config, loads
from gateway.plans import simulated_buses, worker_plans

ARM = """\
[arm]
name = "arm1"
late_after_ms = 20.5
offline_after_ms = 100
motor_watchdog_ms = 250
realtime = false

[[bus]]
name = "usb"
type = "can"
interface = "slcan"
channel = "/dev/ttyACM0"
bitrate = 500_000
rate_hz = 250
options = {sleep_after_open = 0.1}

[[bus]]
name = "inside"
type = "can"
interface = "virtual"
channel = "chan"
rate_hz = 100

[[bus]]
name = "serial0"
type = "serial"
port = "/dev/ttyUSB0"
baudrate = 500_000
rate_hz = 333
"""
MOTOR = """
[[motor]]
name = "joint{0}"
partition = {0}
bus = "{1}"
protocol = "{2}"
id = {0}
position_rad = [-1.0, {0}.5]
velocity_rad_s = {0}.0
temperature_c = 60.0
"""
MOTORS = (
    MOTOR.format(1, "usb", "damiao") + MOTOR.format(2, "inside", "damiao") + MOTOR.format(3, "serial0", "feetech_sts")
)
LINKS = Path("links")


def make_config(extra: str = "") -> Config:
    return loads(ARM + MOTORS + extra, "arm.toml")


def test_real_buses_are_opened_as_they_are_configured() -> None:
    plans = worker_plans(make_config(), LINKS)
    assert plans["usb"].bus == CanSpec("usb", "slcan", "/dev/ttyACM0", 500_000, {"sleep_after_open": 0.1})
    assert plans["serial0"].bus == SerialSpec("serial0", "/dev/ttyUSB0", 500_000)
    assert [plan.simulation for plan in plans.values()] == [None] * 3


def test_can_fd_and_rs485_are_handed_on_to_real_buses_and_to_no_pseudo_terminal() -> None:
    text = ARM.replace("bitrate = 500_000", "bitrate = 500_000\nfd = true\ndata_bitrate = 2_000_000", 1)
    text = text.replace("baudrate = 500_000", "baudrate = 500_000\nrs485 = { delay_before_rx_ms = 1 }")
    plans = worker_plans(loads(text + MOTORS, "arm.toml"), LINKS)
    options = {"sleep_after_open": 0.1}
    assert plans["usb"].bus == CanSpec("usb", "slcan", "/dev/ttyACM0", 500_000, options, True, 2_000_000)
    assert plans["serial0"].bus == SerialSpec("serial0", "/dev/ttyUSB0", 500_000, Rs485(delay_before_rx_ms=1))
    simulated = worker_plans(loads(text + MOTORS + "[simulation]\n", "arm.toml"), LINKS)
    assert simulated["usb"].bus == CanSpec("usb", "slcan", "links/usb", 500_000, {"sleep_after_open": 0})
    assert simulated["serial0"].bus == SerialSpec("serial0", "links/serial0", 500_000)


def test_timing_and_motors_are_those_of_the_bus() -> None:
    plans = worker_plans(make_config(), LINKS)
    assert plans["usb"].timing == Timing(4 * MS, 20_500_000, 100 * MS)
    assert plans["serial0"].timing.period_ns == 3_003_003
    assert plans["serial0"].motors == (Motor(3, "joint3", "feetech_sts", 3, None, (-1.0, 3.5), 250 * MS),)
    assert not plans["usb"].realtime


def test_simulated_buses_lead_to_pseudo_terminals_except_inside_a_process() -> None:
    plans = worker_plans(make_config("[simulation]\n"), LINKS)
    assert plans["serial0"].bus == SerialSpec("serial0", "links/serial0", 500_000)
    assert plans["usb"].bus == CanSpec("usb", "slcan", "links/usb", 500_000, {"sleep_after_open": 0})
    assert plans["inside"].bus == CanSpec("inside", "virtual", "chan", 1_000_000, {})
    assert plans["usb"].simulation is None
    hosted = plans["inside"].simulation
    assert hosted is not None
    assert (hosted.host, hosted.where) == ("virtual", "chan")
    assert [motor.name for motor in hosted.motors] == ["joint2"]


def test_simulator_hosts_what_workers_do_not() -> None:
    plans = simulated_buses(make_config("[simulation]\n"), LINKS, everything=False)
    assert [(plan.host, plan.where) for plan in plans] == [("slcan", "links/usb"), ("serial", "links/serial0")]


def test_without_simulation_nothing_is_hosted_unless_all_is_asked_for() -> None:
    assert simulated_buses(make_config(), LINKS, everything=False) == ()
    plans = simulated_buses(make_config(), LINKS, everything=True)
    assert [(plan.host, plan.where) for plan in plans] == [
        ("slcan", "links/usb"), ("slcan", "links/inside"), ("serial", "links/serial0"),
    ]  # fmt: skip


def test_simulated_motors_keep_to_the_limits_and_know_the_others() -> None:
    config = make_config('[simulation]\nmotion = "still"\nenabled = false\nfaults = "faults.toml"\n')
    plan = simulated_buses(config, LINKS, everything=False)[1]
    assert (plan.settings.motion, plan.settings.enabled) == ("still", False)
    assert plan.settings.position_rad == {3: (-1.0, 3.5)}
    assert plan.settings.velocity_rad_s == {3: 3.0}
    assert plan.name == "serial0"
    assert plan.elsewhere == ("usb", "inside", "joint1", "joint2")
    assert plan.faults is not None
    assert plan.faults.name == "faults.toml"


def test_wire_has_the_bit_rate_of_its_bus_if_its_time_is_wanted() -> None:
    wanted = make_config("[simulation]\nwire_time = true\nturnaround_us = 12.5\nseed = 3\n")
    settings = [plan.settings for plan in simulated_buses(wanted, LINKS, everything=False)]
    assert [(s.bits_per_s, s.turnaround_ns, s.seed) for s in settings] == [(500_000, 12_500, 3)] * 2
    assert [plan.settings.bits_per_s for plan in simulated_buses(make_config(), LINKS, everything=True)] == [0] * 3


@pytest.mark.parametrize(
    ("interface", "channel", "where"),
    [
        ("socketcan", 'channel = "vcan0"', "vcan0"),
        ("udp_multicast", 'channel = "239.1.2.3"', "239.1.2.3"),
        ("udp_multicast", "", "239.74.163.2"),
    ],
)
def test_interface_that_other_processes_reach_is_used_by_the_motors_too(
    interface: str, channel: str, where: str
) -> None:
    text = ARM.replace('interface = "slcan"\nchannel = "/dev/ttyACM0"', f'interface = "{interface}"\n{channel}')
    text = text.replace("sleep_after_open = 0.1", "key = 1")
    config = loads(text + MOTORS + "[simulation]\n", "arm.toml")
    assert worker_plans(config, LINKS)["usb"].bus == CanSpec("usb", interface, where, 500_000, {"key": 1})
    plan = simulated_buses(config, LINKS, everything=False)[0]
    assert (plan.host, plan.where, plan.options, plan.link) == (interface, where, {"key": 1}, None)
    with_links = simulated_buses(config, LINKS, everything=True)[0]
    assert (with_links.host, with_links.link) == ("slcan", LINKS / "usb")


def test_faults_on_the_command_line_take_the_place_of_the_configured() -> None:
    config = make_config('[simulation]\nfaults = "faults.toml"\n')
    plans = simulated_buses(config, LINKS, everything=True, faults=Path("other.toml"))
    assert {plan.faults for plan in plans} == {Path("other.toml")}


@pytest.mark.parametrize("extra", ["", "[simulation]\n"])
def test_plans_survive_the_way_to_the_child(extra: str) -> None:
    plans = worker_plans(make_config(extra), LINKS)
    assert pickle.loads(pickle.dumps(plans)) == plans
