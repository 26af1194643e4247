"""Serial buses through pyserial: it opens and configures the port; bytes are read and written on its descriptor."""

import contextlib
import errno
import os
import select
import termios
from collections.abc import Sequence

import serial

from drivers.bus import Bus, Received
from drivers.buses import SerialSpec
from drivers.clock import MonotonicNs, left_s, monotonic_ns
from drivers.errors import BusError, BusMisconfigured

_CHUNK = 4096


class SerialBus(Bus[bytes]):
    """One open port, exclusively ours."""

    def __init__(self, spec: SerialSpec) -> None:
        super().__init__()
        self._name = f"serial bus {spec.name} ({spec.port})"
        try:
            self._port = serial.Serial(spec.port, spec.baudrate, timeout=0, write_timeout=0, exclusive=True)
        except ValueError as error:
            raise BusMisconfigured(f"{self._name}: {error}") from error
        except (serial.SerialException, OSError, termios.error) as error:
            raise BusError(f"{self._name}: cannot open: {error}") from error
        # USB adapters hold bytes back for up to 16 ms otherwise; ports that lack the call (ptys) do not need it
        with contextlib.suppress(AttributeError, OSError, ValueError, NotImplementedError):
            self._port.set_low_latency_mode(True)
        self._fd = self._port.fileno()
        self._closed = False

    def send(self, units: Sequence[bytes], deadline: MonotonicNs) -> None:
        self._check()
        data = memoryview(b"".join(units))
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
        try:
            if not select.select([self._fd], [], [], left_s(deadline))[0]:
                return None
            chunk = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return None
        except OSError as error:
            raise BusError(f"{self._name}: {os.strerror(error.errno or errno.EIO)}") from error
        if not chunk:
            raise BusError(f"{self._name}: the port is gone")
        return Received(chunk, monotonic_ns())

    def _check(self) -> None:
        """The descriptor's number may be somebody else's file once the port is closed."""
        if self._closed:
            raise BusError(f"{self._name}: closed")

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError, serial.SerialException):
            self._port.close()
