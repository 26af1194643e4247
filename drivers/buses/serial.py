"""Serial buses through pyserial: it opens and configures the port; bytes are read and written on its descriptor."""

import contextlib
import errno
import logging
import os
import select
import termios
from collections.abc import Sequence
from pathlib import Path

import serial
from serial.rs485 import RS485Settings

from drivers.bus import Bus, Received, Trouble
from drivers.buses import Rs485, SerialSpec
from drivers.buses.echo import EchoFilter
from drivers.clock import MonotonicNs, left_s, monotonic_ns
from drivers.errors import BusError, BusMisconfigured
from drivers.traffic import Mark, Traffic

log = logging.getLogger(__name__)

USB_SERIAL = Path("/sys/bus/usb-serial/devices")
_CHUNK = 4096


class SerialBus(Bus[bytes]):
    """One open port, exclusively ours. What the adapter gives back of our own bytes is not passed on."""

    def __init__(self, spec: SerialSpec) -> None:
        super().__init__()
        self._name = f"serial bus {spec.name} ({spec.port})"
        try:
            self._port = serial.Serial(spec.port, spec.baudrate, timeout=0, write_timeout=0, exclusive=True)
        except ValueError as error:
            raise BusMisconfigured(f"{self._name}: {error}") from error
        except (serial.SerialException, OSError, termios.error) as error:
            raise BusError(f"{self._name}: cannot open: {error}") from error
        if spec.rs485:
            self._set_rs485(spec.rs485)
        # USB adapters hold bytes back for up to 16 ms otherwise; ports that lack the call (ptys) do not need it
        with contextlib.suppress(AttributeError, OSError, ValueError, NotImplementedError):
            self._port.set_low_latency_mode(True)
        if hint := latency_hint(spec.port):
            log.warning("%s: %s", self._name, hint)
        self._fd = self._port.fileno()
        self._echo = EchoFilter()
        self._closed = False

    def _set_rs485(self, rs485: Rs485) -> None:
        try:
            self._port.rs485_mode = RS485Settings(
                rs485.rts_level_for_tx,
                rs485.rts_level_for_rx,
                delay_before_tx=rs485.delay_before_tx_ms / 1000,
                delay_before_rx=rs485.delay_before_rx_ms / 1000,
            )
        except (ValueError, OSError) as error:
            self._port.close()
            raise BusMisconfigured(
                f"{self._name}: rs485: {error}; this port has no RS-485 mode. "
                f"Leave rs485 out where the adapter turns the line around by itself"
            ) from error

    def send(self, units: Sequence[bytes], deadline: MonotonicNs) -> None:
        self._check()
        written = b"".join(units)
        now = monotonic_ns()
        self._echo.sent(written, now)
        if self.tap:
            self.tap(Traffic(now, Mark.SENT, 0, written))
        data = memoryview(written)
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                if not select.select([], [self._fd], [], left_s(deadline))[1]:
                    raise BusError(f"{self._name}: {len(data)} bytes were not taken in time") from None
            except OSError as error:
                raise BusError(f"{self._name}: {os.strerror(error.errno or errno.EIO)}") from error

    def receive(self, deadline: MonotonicNs) -> Received[bytes] | None:
        self._check()
        while chunk := self._read(deadline):
            at_ns = monotonic_ns()
            before = self._echo.echoes
            heard = self._echo.received(chunk)
            if times := self._echo.echoes - before:
                self.note(Trouble.ECHO, "the adapter gives back what is sent; it is taken off", times)
            if heard:
                if self.tap:
                    self.tap(Traffic(at_ns, 0, 0, heard))
                return Received(heard, at_ns)
        return None

    def _read(self, deadline: MonotonicNs) -> bytes:
        """What has arrived, as soon as anything has; nothing at ``deadline``."""
        try:
            if not select.select([self._fd], [], [], left_s(deadline))[0]:
                return b""
            chunk = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise BusError(f"{self._name}: {os.strerror(error.errno or errno.EIO)}") from error
        if not chunk:
            raise BusError(f"{self._name}: the port is gone")
        return chunk

    def _check(self) -> None:
        """The descriptor's number may be somebody else's file once the port is closed."""
        if self._closed:
            raise BusError(f"{self._name}: closed")

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError, serial.SerialException):
            self._port.close()


def latency_hint(port: str, devices: Path | None = None) -> str | None:
    """How to make an FTDI adapter pass bytes on at once; None where it does, or is none.

    Its chip collects bytes for ``latency_timer`` milliseconds (16 unless told otherwise) before it sends a short
    packet. Source: FTDI AN232B-04; the kernel's ``drivers/usb/serial/ftdi_sio.c``.
    """
    timer = (devices or USB_SERIAL) / Path(port).resolve().name / "latency_timer"
    try:
        held_ms = int(timer.read_text())
    except (OSError, ValueError):
        return None
    return f"the adapter holds bytes back for {held_ms} ms; `echo 1 > {timer}` ends that" if held_ms > 1 else None
