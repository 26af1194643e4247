"""The serial bus on a pseudo-terminal: what the conformance suite cannot bring about."""

import os
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivers.buses import SerialSpec
from drivers.buses.serial import SerialBus
from drivers.clock import MS, SECOND, MonotonicNs, after, monotonic_ns
from drivers.errors import BusError, BusMisconfigured
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
    os.write(line.fd, every)
    back = b""
    while len(back) < 256:
        received = bus.receive(after(monotonic_ns(), 60 * SECOND))
        assert received is not None
        back += received.unit
    assert back == every


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


@pytest.mark.parametrize("baudrate", [-1, -9600])
def test_bit_rate_that_cannot_be_is_a_misconfiguration(line: Line, baudrate: int) -> None:
    with pytest.raises(BusMisconfigured, match="arm"):
        SerialBus(SerialSpec("arm", line.port, baudrate))


def test_file_that_is_no_terminal_is_a_bus_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(BusError, match="arm"):
        SerialBus(SerialSpec("arm", str(path), 1_000_000))
