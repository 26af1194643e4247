"""Finding motors: every family on its own simulated motors, what may be wrong on the way, and the configuration."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from drivers import protocols
from drivers.bus import Bus, Received, Trouble
from drivers.buses import BusSpec, CanSpec, SerialSpec, adapters, open_bus
from drivers.buses.memory import MemoryBus
from drivers.clock import MS, SECOND, MonotonicNs, monotonic_ns
from drivers.errors import BusError, BusMisconfigured, MotorRefused
from drivers.family import Procedure
from drivers.motor import MotorInfo
from drivers.protocols.damiao import Damiao, Options
from drivers.scan import Answer, make_family, scan
from drivers.sim.build import SimulationSettings, build_bus
from drivers.sim.hosts import PtySerialHost, SlcanHost
from gateway import scan as scanning
from gateway.config import Config, ConfigError, loads
from gateway.draft import Found, draft
from gateway.scan import Findings, Round, plan
from tests.memory_loop import make_motor

NAMES = protocols.family_names()
SERIAL = SerialSpec("serial0", "/dev/ttyUSB0", 0)
CAN = CanSpec("can0", "socketcan", "can0", 1_000_000)
WAIT_NS = SECOND  # where another thread has to answer; a reply ends the wait


def spec_for(name: str) -> BusSpec:
    return CAN if protocols.load(name).medium == "can" else SERIAL


def make_bus(name: str, bus_ids: Sequence[int]) -> MemoryBus[Any]:
    """Motors that follow a path of their own until anybody orders anything."""
    motors = [make_motor(name, bus_id, index) for index, bus_id in enumerate(bus_ids)]
    return MemoryBus(build_bus(motors, SimulationSettings(motion="wave", enabled=True), monotonic_ns()))


def ask(bus: Bus[Any], name: str, bus_ids: Sequence[int]) -> list[Answer]:
    return list(scan(bus, make_family(protocols.load(name), bus_ids), 1_000_000, wait_ns=MS))


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_motors_that_are_there_are_found_and_only_those(name: str) -> None:
    first, second, third, fourth = protocols.load(name).bus_ids[:4]
    answers = ask(make_bus(name, [first, third]), name, [first, second, third, fourth])
    assert {answer.bus_id: answer.info is not None for answer in answers} == {
        first: True, second: False, third: True, fourth: False
    }  # fmt: skip
    assert all(answer.info.model for answer in answers if answer.info)
    assert not any(answer.trouble for answer in answers)


@pytest.mark.parametrize("name", NAMES)
def test_scan_changes_nothing_in_a_motor(name: str) -> None:
    bus_ids = protocols.load(name).bus_ids[:3]
    bus = make_bus(name, bus_ids)
    paths = [simulated.servo.motion for simulated in bus.simulated.motors]
    ask(bus, name, bus_ids)
    assert [simulated.servo.motion for simulated in bus.simulated.motors] == paths  # the first order would end it
    assert all(simulated.servo.enabled for simulated in bus.simulated.motors)


class LossyBus(MemoryBus[Any]):
    """Loses the first request to each address; counts what it was given."""

    lost = 0

    def send(self, units: Sequence[Any], deadline: MonotonicNs) -> None:
        self.lost += 1
        if self.lost > 1:
            super().send(units, deadline)


@pytest.mark.parametrize("name", NAMES)
def test_motor_that_misses_one_request_is_found(name: str) -> None:
    bus_id = protocols.load(name).bus_ids[1]
    bus = LossyBus(make_bus(name, [bus_id]).simulated)
    (answer,) = ask(bus, name, [bus_id])
    assert answer.info is not None


class DamagedBus(MemoryBus[bytes]):
    """One bit of each chunk is wrong on the way back."""

    def receive(self, deadline: MonotonicNs) -> Received[bytes] | None:
        received = super().receive(deadline)
        return received and Received(received.unit[:-1] + bytes((received.unit[-1] ^ 1,)), received.at_ns)


@pytest.mark.parametrize("name", [name for name in NAMES if protocols.load(name).medium == "serial"])
def test_damaged_reply_is_told_and_so_is_its_likely_cause(name: str) -> None:
    bus = DamagedBus(make_bus(name, [3]).simulated)
    silent, damaged = ask(bus, name, [2, 3])
    assert silent == Answer(name, 2)
    assert damaged.info is None
    assert "two motors with this id" in damaged.trouble


class RefusedDamiao(Damiao):
    """A motor with a register that makes no sense."""

    def identify(self, bus_id: int) -> Procedure[Any, Any, MotorInfo | None]:
        yield from super().identify(bus_id)
        raise MotorRefused("refused", "PMAX is 0.0")


def test_motor_that_answers_and_is_unfit_is_told() -> None:
    (answer,) = scan(make_bus("damiao", [3]), make_family(RefusedDamiao, [3]), 1_000_000, wait_ns=MS)
    assert (answer.info, answer.trouble) == (None, "answers, but: PMAX is 0.0")


class HastyDamiao(Damiao):
    """Asks once, and says nothing of how long a reply may take."""

    patience_ns = 0

    def identify(self, bus_id: int) -> Procedure[Any, Any, MotorInfo | None]:
        replies = yield replace(next(super().identify(bus_id)), patience_ns=self.patience_ns)
        return MotorInfo("Damiao", "") if replies else None


class PatientDamiao(HastyDamiao):
    """A reply may take long."""

    patience_ns = 60 * SECOND


@pytest.mark.parametrize(("family", "is_found"), [(HastyDamiao, False), (PatientDamiao, True)])
def test_reply_is_waited_for_as_long_as_its_exchange_says(family: type[Damiao], is_found: bool) -> None:
    bus = make_bus("damiao", [3])
    bus.simulated.motors[0].faults.delay_ms = 1000
    (answer,) = scan(bus, make_family(family, [3]), 1_000_000, wait_ns=0)
    assert (answer.info is not None) == is_found


def test_id_of_replies_that_is_not_the_usual_one_is_found() -> None:
    motor = replace(make_motor("damiao", 5), options=Options(master_id=0x66))
    bus: MemoryBus[Any] = MemoryBus(build_bus([motor], SimulationSettings(), monotonic_ns()))
    (answer,) = ask(bus, "damiao", [5])
    assert answer.info is not None
    assert answer.info.options == {"master_id": 0x66}


# --- where to look ----------------------------------------------------------------------------------------------------


def test_usual_bit_rates_come_first_and_each_is_opened_once() -> None:
    serial = [name for name in NAMES if protocols.load(name).medium == "serial"]
    rates = [one.bit_rate for one in plan(serial, [], None)]
    usual = {protocols.load(name).bit_rates[0] for name in serial}
    assert set(rates[: len(usual)]) <= usual
    assert len(list(dict.fromkeys(rates))) == sum(a != b for a, b in zip([0, *rates], rates, strict=False))
    assert set(rates) == {rate for name in serial for rate in protocols.load(name).bit_rates}


def test_only_the_rates_and_ids_that_were_asked_for() -> None:
    assert plan(["feetech_sts"], [500_000], {1, 2, 999}) == [Round(500_000, "feetech_sts", (1, 2))]
    assert plan(["damiao"], [1_000_000], {200}) == []


# --- on pseudo-terminals ----------------------------------------------------------------------------------------------


def look(spec: BusSpec, rounds: Sequence[Round]) -> tuple[Findings, str]:
    findings, told = Findings(), io.StringIO()
    scanning.watch(Console(file=told, width=200), spec, rounds, findings, WAIT_NS)
    return findings, told.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_motors_behind_an_adapter_are_found_once_and_their_configuration_is_valid(name: str, tmp_path: Path) -> None:
    family = protocols.load(name)
    bus_ids = family.bus_ids[1:4]
    simulated = make_bus(name, bus_ids).simulated
    paths = [motor.servo.motion for motor in simulated.motors]
    with (PtySerialHost if family.medium == "serial" else SlcanHost)(simulated) as host:
        can = CanSpec("can0", "slcan", host.port, 1_000_000, {"sleep_after_open": 0})
        spec = can if family.medium == "can" else SerialSpec("serial0", host.port, 0)
        rates = [1_000_000] if family.medium == "can" else [1_000_000, 500_000]
        findings, told = look(spec, plan([name], rates, bus_ids))
    assert [(motor.bus_id, motor.bit_rate) for motor in findings.found] == [(n, 1_000_000) for n in bus_ids]
    assert findings.troubles == []
    assert told.count("found") == 3
    assert [motor.servo.motion for motor in simulated.motors] == paths
    config = load(draft(spec, findings.found))
    assert [(motor.name, motor.partition, motor.id) for motor in config.motors] == [
        (f"joint{n + 1}", n, bus_id) for n, bus_id in enumerate(bus_ids)
    ]
    assert {motor.protocol for motor in config.motors} == {name}


def test_port_that_a_gateway_has_is_told_with_what_to_do() -> None:
    simulated = make_bus("feetech_sts", [1]).simulated
    with PtySerialHost(simulated) as host:
        spec = SerialSpec("serial0", host.port, 1_000_000)
        owner = open_bus(spec)
        with pytest.raises(BusError, match="a gateway that runs"):
            look(spec, plan(["feetech_sts"], [1_000_000], {1}))
        owner.close()


def test_bit_rate_that_the_adapter_cannot_do_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(spec: SerialSpec) -> Bus[Any]:
        if spec.baudrate == 1_000_000:
            raise BusMisconfigured("no such rate")
        return make_bus("feetech_sts", [1])

    monkeypatch.setattr(scanning, "open_bus", opened)
    findings, told = look(SERIAL, plan(["feetech_sts"], [1_000_000, 500_000], {1}))
    assert [motor.bit_rate for motor in findings.found] == [500_000]
    assert findings.troubles == ["1000000 bit/s: no such rate"]
    assert "no such rate" in told
    with pytest.raises(BusMisconfigured):
        look(SERIAL, plan(["feetech_sts"], [1_000_000], {1}))


def test_troubles_of_the_bus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = make_bus("damiao", [1])
    bus.troubles[Trouble.ERROR_FRAME], bus.trouble_details[Trouble.ERROR_FRAME] = 3, "no acknowledgement"
    monkeypatch.setattr(scanning, "open_bus", lambda _: bus)
    findings, told = look(CAN, plan(["damiao"], [1_000_000], {1}))
    assert findings.troubles == ["1000000 bit/s: error_frame 3 times: no acknowledgement"]
    assert findings.troubles[0] in told


def test_what_was_found_before_the_bus_was_gone_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    bus = make_bus("feetech_sts", [1, 2])
    monkeypatch.setattr(scanning, "open_bus", lambda _: bus)
    findings = Findings()
    searching = scanning.search(SERIAL, plan(["feetech_sts"], [1_000_000], {1, 2}), findings, WAIT_NS)
    next(searching)
    bus.unplug()
    with pytest.raises(BusError):
        next(searching)
    assert [motor.bus_id for motor in findings.found] == [1]


# --- the configuration ------------------------------------------------------------------------------------------------


def found(name: str, bus_id: int, bit_rate: int = 1_000_000, **details: float) -> Found:
    return Found(name, bus_id, bit_rate, MotorInfo("model", "1.0", details))


def load(text: str) -> Config:
    """As a person leaves it who has set what had to be set."""
    text = re.sub("^# (.* # SET THIS.*)$", r"\1", text, flags=re.MULTILINE)
    return loads(text, "arm.toml")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bit_rate", [9_600, 125_000, 1_000_000])
def test_configuration_is_valid_whatever_the_bit_rate_and_the_number_of_motors(name: str, bit_rate: int) -> None:
    for count in (1, 6, 12):
        bus_ids = protocols.load(name).bus_ids[1 : 1 + count]
        config = load(draft(spec_for(name), [found(name, bus_id, bit_rate) for bus_id in bus_ids]))
        assert [motor.id for motor in config.motors] == list(bus_ids)


def test_limits_are_the_motors_own_and_never_wider() -> None:
    low, high = -1.23456, 2.34567
    text = draft(
        SERIAL, [found("feetech_sts", 1, min_position_rad=low, max_position_rad=high), found("feetech_sts", 2)]
    )
    told, guessed = load(text).motors
    assert told.position_rad == (-1.234, 2.345)
    assert guessed.position_rad == (-3.14, 3.14)
    assert text.count("# REVIEW") == 1 + 2 * 3


def test_limits_that_make_no_sense_are_not_taken_over() -> None:
    for low, high in [(1.0, 1.0), (2.0, 1.0), (0.0001, 0.0002), (float("-inf"), float("inf")), (float("nan"), 1.0)]:
        text = draft(SERIAL, [found("feetech_sts", 1, min_position_rad=low, max_position_rad=high)])
        assert load(text).motors[0].position_rad == (-3.14, 3.14)


def test_what_a_motor_told_of_its_options_is_in_the_configuration() -> None:
    motor = Found("damiao", 3, 1_000_000, MotorInfo("Damiao", "1", options={"master_id": 0x66}))
    assert load(draft(CAN, [motor])).motors[0].options == Options(master_id=0x66)


@dataclass(frozen=True, slots=True)
class NeedsOptions:
    units_per_turn: float
    label: str = ""


def test_key_that_a_family_needs_and_no_motor_tells_has_to_be_set_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Damiao, "Options", NeedsOptions)
    monkeypatch.setattr(Damiao, "examples", (NeedsOptions(360.0),))
    text = draft(CAN, [found("damiao", 3)])
    (line,) = [line for line in text.splitlines() if line.startswith("# units_per_turn = 360.0")]
    assert "SET THIS" in line
    assert "label" not in text
    with pytest.raises(ConfigError, match="units_per_turn"):
        loads(text, "arm.toml")


def test_motors_that_fit_no_bus_together_are_left_out_and_named() -> None:
    motors = [found("feetech_sts", 1), found("feetech_sts", 2), found("feetech_sts", 3, 500_000)]
    text = draft(SERIAL, motors)
    assert [motor.id for motor in load(text).motors] == [1, 2]
    assert "#   feetech_sts id 3 (model) answers at 500000 bit/s: set it to 1000000" in text


def test_motors_of_two_families_with_one_id_are_not_configured_both() -> None:
    text = draft(CAN, [found("damiao", 1), found("rmd_x", 1)])
    assert [motor.protocol for motor in load(text).motors] == ["damiao"]
    assert "#   rmd_x id 1 (model) has the id of the damiao" in text


@given(
    port=st.text(st.characters(codec="utf-8"), min_size=1),
    model=st.text(),
    options=st.dictionaries(
        st.from_regex("[a-z]{1,9}_", fullmatch=True), st.integers(0, 99) | st.booleans() | st.text()
    ),
)
def test_any_text_is_written_so_that_it_is_read_back(port: str, model: str, options: dict[str, Any]) -> None:
    motor = Found("damiao", 1, 1_000_000, MotorInfo(model, "1"))
    options = {key: value for key, value in options.items() if isinstance(value, int) or value.isprintable()}
    spec = replace(CAN, interface="slcan", channel=port, options=options)
    bus = load(draft(spec, [motor])).buses[0]
    assert (bus.type, bus.type == "can" and (bus.channel, bus.options)) == ("can", (port, options))


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_can_links_of_the_kernel_are_listed_with_their_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind, state in (("can0", "280", "down"), ("vcan0", "280", "unknown"), ("eth0", "1", "up")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(f"{kind}\n")
        (tmp_path / name / "operstate").write_text(f"{state}\n")
    monkeypatch.setattr("can.detect_available_configs", lambda _: [{"interface": "pcan", "channel": "USB1"}])
    told = [(channel.name, channel.detail) for channel in adapters.can_channels(tmp_path)]
    assert told == [("socketcan:can0", "down"), ("socketcan:vcan0", "up"), ("pcan:USB1", "")]
