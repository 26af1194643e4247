"""A tap on a bus: copies of its raw traffic, from the worker that owns it to a recorder in another process.

    recorder: binds the Unix datagram socket <state_dir>/taps/<bus>     worker: looks for it once a second

    datagram   life u64, number u64, units   life: which worker; number: of the first unit, counted from 0
    unit       at_ns i64 (monotonic), id u32, marks u8 (Mark), dlc u8, length u16, data     little-endian

Law 1 holds: the worker never waits. What the recorder does not take stays in a bounded backlog, whose oldest units go
first; the numbers tell the recorder how many it missed. Nobody listening costs an ``if`` a unit.
"""

import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from drivers.bus import Bus
from drivers.clock import left_s, monotonic_ns
from drivers.traffic import Traffic

_HEAD: Final = struct.Struct("<QQ")
_UNIT: Final = struct.Struct("<qIBBH")
_FULL: Final = 32 << 10  # bytes of a datagram that is closed; one more unit fits below any system's limit
_BACKLOG: Final = 32  # such datagrams


class TapError(Exception):
    """The bus cannot be recorded; the message says why."""


class Tap:
    """The worker's end. ``attach`` each bus that is opened, ``look`` once a second, ``flush`` once a cycle."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._bus: Bus[Any] | None = None
        self._socket: socket.socket | None = None

    def attach(self, bus: Bus[Any]) -> None:
        """Tell of this bus from now on."""
        self._bus = bus
        bus.tap = self._take if self._socket else None
        self.look()

    def look(self) -> None:
        """See whether there is a recorder, if there is none yet."""
        if self._socket is not None or self._path is None or not self._path.exists():
            return
        fresh = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        fresh.setblocking(False)
        try:
            with _reachable(self._path) as address:
                fresh.connect(address)
        except OSError:  # a recorder that is gone has left it there
            fresh.close()
            return
        self._socket = fresh
        self._waiting: deque[bytes] = deque(maxlen=_BACKLOG)
        self._number = 0
        self._life = monotonic_ns()
        self._begin()
        if self._bus:
            self._bus.tap = self._take

    def flush(self) -> None:
        """Hand over what the recorder takes now."""
        if self._socket is None:
            return
        try:
            while self._waiting:
                self._socket.send(self._waiting[0])
                self._waiting.popleft()
            if len(self._open) > _HEAD.size:
                self._socket.send(self._open)
                self._begin()
        except BlockingIOError:
            return
        except OSError:  # it is gone
            self.close()

    def close(self) -> None:
        """Let the recorder go; another may be found."""
        if self._socket:
            self._socket.close()
        self._socket = None
        if self._bus:
            self._bus.tap = None

    def _begin(self) -> None:
        self._open = bytearray(_HEAD.pack(self._life, self._number))

    def _take(self, unit: Traffic) -> None:
        self._open += _UNIT.pack(unit.at_ns, unit.can_id, unit.marks, unit.dlc, len(unit.data)) + unit.data
        self._number += 1
        if len(self._open) > _FULL:
            self._waiting.append(bytes(self._open))  # the oldest falls out
            self._begin()


class Listener:
    """The recorder's end, a context manager: there is one for a bus. ``missed`` counts the units that went past it.

    ``workers``: how many there were; what a new one heard before it found the socket is in no count.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._life = self._next = 0
        self.workers = 0
        self.missed = 0

    def __enter__(self) -> Self:
        """Raises TapError if the bus is being recorded already, OSError if the place cannot be used."""
        self._path.parent.mkdir(exist_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        with _reachable(self._path) as address:
            try:
                self._socket.connect(address)
            except OSError:
                self._path.unlink(missing_ok=True)  # of a recorder that was killed
            else:
                self._socket.close()
                raise TapError(f"{self._path}: another recorder has this bus; stop it first")
            self._socket.bind(address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
        self._socket.close()

    def receive(self, deadline: int) -> list[Traffic]:
        """The units of the next datagram; none at ``deadline``."""
        if not select.select([self._socket], [], [], left_s(deadline))[0]:
            return []
        datagram = self._socket.recv(_FULL * 4)
        life, number = _HEAD.unpack_from(datagram)
        if life != self._life:
            self._life, self._next = life, 0
            self.workers += 1
        units = list(_units(datagram))
        self.missed += number - self._next
        self._next = number + len(units)
        return units


def _units(datagram: bytes) -> Iterator[Traffic]:
    place = _HEAD.size
    while place < len(datagram):
        at_ns, can_id, marks, dlc, length = _UNIT.unpack_from(datagram, place)
        place += _UNIT.size + length
        yield Traffic(at_ns, marks, can_id, datagram[place - length : place], dlc)


@contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """The socket's address, by way of its directory's descriptor: an address holds no more than 107 bytes."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
