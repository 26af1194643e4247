"""The serial bus on a pseudo-terminal: what the conformance suite cannot bring about."""

import errno
import os
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
import serial
from serial.rs485 import RS485Settings

from drivers.bus import Trouble
from drivers.buses import Rs485, SerialSpec
from drivers.buses import serial as module
from drivers.buses.serial import SerialBus
from drivers.clock import MS, SECOND, MonotonicNs, after, monotonic_ns
from drivers.errors import BusError, BusMisconfigured
from drivers.traffic import Mark, Traffic
from tests.gateway_parts import wait_for


class Line:
    """The motors' end of the line."""

    def __init__(self) -> None:
        self.fd, self._held = os.openpty()
        tty.setraw(self._held)
        self.port = os.ttyname(self._held)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._held)


@pytest.fixture
def line() -> Iterator[Line]:
    opened = Line()
    yield opened
    opened.close()


@pytest.fixture
def bus(line: Line) -> Iterator[SerialBus]:
    opened = SerialBus(SerialSpec("arm", line.port, 1_000_000))
    yield opened
    opened.close()


def test_every_byte_value_passes_both_ways(line: Line, bus: SerialBus) -> None:
    every = bytes(range(256))
    bus.send([every[:100], every[100:]], after(monotonic_ns(), 60 * SECOND))
    got = b""
    while len(got) < 256:
        got += os.read(line.fd, 4096)
    assert got == every
    os.write(line.fd, every[::-1])  # the same bytes again would be an echo
    back = b""
    while len(back) < 256:
        received = bus.receive(after(monotonic_ns(), 60 * SECOND))
        assert received is not None
        back += received.unit
    assert back == every[::-1]


def test_line_that_takes_nothing_is_a_bus_error_at_the_deadline(bus: SerialBus) -> None:
    before = monotonic_ns()
    with pytest.raises(BusError, match=r"arm.*bytes were not taken in time"):
        bus.send([bytes(1 << 20)], after(before, 20 * MS))
    assert monotonic_ns() >= before + 20 * MS


def test_second_program_is_kept_off_the_port(line: Line, bus: SerialBus) -> None:
    with pytest.raises(BusError, match=rf"arm.*{line.port}"):
        SerialBus(SerialSpec("other arm", line.port, 1_000_000))


def test_closed_bus_does_not_read_the_file_that_has_its_descriptor_now(bus: SerialBus, tmp_path: Path) -> None:
    fd = bus._fd
    bus.close()
    reading, writing = os.pipe()
    if reading != fd:
        os.dup2(reading, fd)
    os.write(writing, b"somebody else's")
    with pytest.raises(BusError, match="closed"):
        bus.receive(MonotonicNs(0))
    with pytest.raises(BusError, match="closed"):
        bus.send([b"x"], after(monotonic_ns(), SECOND))
    for each in {reading, writing, fd}:
        os.close(each)


def test_port_that_hangs_up_is_gone_even_while_nothing_was_asked(line: Line, bus: SerialBus) -> None:
    os.close(line.fd)
    with pytest.raises(BusError):
        wait_for(lambda: bus.receive(MonotonicNs(0)) is None and False)
    line.fd = os.dup(0)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENXIO, errno.ENODEV])
def test_adapter_that_was_pulled_out_is_a_bus_error_in_the_systems_words(
    monkeypatch: pytest.MonkeyPatch, line: Line, bus: SerialBus, number: int
) -> None:
    def pulled_out(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    os.write(line.fd, b"x")
    monkeypatch.setattr(os, "read", pulled_out)
    monkeypatch.setattr(os, "write", pulled_out)
    with pytest.raises(BusError, match=rf"arm.*{os.strerror(number)}"):
        bus.receive(after(monotonic_ns(), 60 * SECOND))
    with pytest.raises(BusError, match=rf"arm.*{os.strerror(number)}"):
        bus.send([b"x"], after(monotonic_ns(), 60 * SECOND))


def test_echo_is_taken_off_and_counted_and_the_reply_stays(line: Line, bus: SerialBus) -> None:
    for _ in range(3):
        bus.send([b"ask", b"ed"], after(monotonic_ns(), 60 * SECOND))
        os.write(line.fd, os.read(line.fd, 4096) + b"told")
        received = bus.receive(after(monotonic_ns(), 60 * SECOND))
        assert received is not None
        assert received.unit == b"told"
    assert bus.troubles == {Trouble.ECHO: 3}


def test_echo_without_a_reply_is_nothing_at_the_deadline(line: Line, bus: SerialBus) -> None:
    bus.send([b"asked"], after(monotonic_ns(), 60 * SECOND))
    os.write(line.fd, b"asked")
    assert bus.receive(after(monotonic_ns(), 5 * MS)) is None
    wait_for(lambda: bus.receive(MonotonicNs(0)) is None and bus.troubles == {Trouble.ECHO: 1})


def test_port_without_an_rs485_mode_is_a_misconfiguration_and_is_let_go(line: Line) -> None:
    with pytest.raises(BusMisconfigured, match=r"arm.*no RS-485 mode"):
        SerialBus(SerialSpec("arm", line.port, 1_000_000, Rs485()))
    SerialBus(SerialSpec("arm", line.port, 1_000_000)).close()


def test_rs485_settings_reach_the_driver_as_they_are_configured(monkeypatch: pytest.MonkeyPatch, line: Line) -> None:
    given: list[RS485Settings] = []
    monkeypatch.setattr(serial.Serial, "_set_rs485_mode", lambda _, settings: given.append(settings))
    SerialBus(SerialSpec("arm", line.port, 1_000_000, Rs485(False, True, 3, 100))).close()
    told = given[-1]
    assert (told.rts_level_for_tx, told.rts_level_for_rx) == (False, True)
    assert told.delay_before_tx is not None
    assert told.delay_before_rx is not None
    assert (int(told.delay_before_tx * 1000), int(told.delay_before_rx * 1000)) == (3, 100)


def test_adapter_that_holds_bytes_back_is_told_with_what_ends_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, line: Line, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "USB_SERIAL", tmp_path)
    timer = tmp_path / Path(line.port).name / "latency_timer"
    timer.parent.mkdir()
    for held_ms, hinted in (("1", False), ("16", True)):
        timer.write_text(f"{held_ms}\n")
        SerialBus(SerialSpec("arm", line.port, 1_000_000)).close()
        assert (f"holds bytes back for 16 ms; `echo 1 > {timer}`" in caplog.text) == hinted


@pytest.mark.parametrize("baudrate", [-1, -9600])
def test_bit_rate_that_cannot_be_is_a_misconfiguration(line: Line, baudrate: int) -> None:
    with pytest.raises(BusMisconfigured, match="arm"):
        SerialBus(SerialSpec("arm", line.port, baudrate))


def test_file_that_is_no_terminal_is_a_bus_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(BusError, match="arm"):
        SerialBus(SerialSpec("arm", str(path), 1_000_000))


def test_tap_is_told_of_what_is_written_and_read_without_what_the_adapter_gives_back(
    line: Line, bus: SerialBus
) -> None:
    told: list[Traffic] = []
    bus.tap = told.append
    bus.send([b"\xff\xff", b"\1"], after(monotonic_ns(), 60 * SECOND))
    os.write(line.fd, b"\xff\xff\1answer")
    received = bus.receive(after(monotonic_ns(), 60 * SECOND))
    assert received
    assert [(unit.marks, unit.data) for unit in told] == [(Mark.SENT, b"\xff\xff\1"), (0, b"answer")]
    assert told[1].at_ns == received.at_ns > told[0].at_ns
