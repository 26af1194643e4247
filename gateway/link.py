"""The link between the gateway and one bus worker: a SOCK_SEQPACKET socket pair, one datagram a message.

    worker -> gateway    'S' samples of one cycle (dtype SAMPLE) | 'N' a notice (drivers.notices, msgpack)
    gateway -> worker    'T' a ticket (drivers.cycle.Ticket, msgpack)

The worker's end never blocks: what the gateway does not take waits in a bounded queue, and beyond its bound the
oldest samples are dropped and counted, so that a stuck gateway costs no cycle. An end that is closed is ``None`` on
receipt: a worker without a gateway stops, a gateway without a worker starts another.
"""

import socket
from collections import Counter, deque

import msgspec
import numpy as np
from numpy.typing import NDArray

from drivers.cycle import Ticket
from drivers.motor import SAMPLE
from drivers.notices import AnyNotice, SamplesLost

_MOST = 1 << 16  # bytes of one datagram
_QUEUE_BYTES = 8 << 20

_encode = msgspec.msgpack.Encoder().encode
_notices: msgspec.msgpack.Decoder[AnyNotice] = msgspec.msgpack.Decoder(AnyNotice)
_decode_ticket = msgspec.msgpack.Decoder(Ticket).decode

Samples = NDArray[np.void]


def pair() -> tuple[socket.socket, socket.socket]:
    """The gateway's end and the worker's end, both non-blocking."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST * 16)
    return ends


class GatewayEnd:
    """What the gateway does with a link."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        """For the event loop."""
        return self._end.fileno()

    def send(self, ticket: Ticket) -> bool:
        """Hand an order to the worker; False if it takes none any more (hung, or gone)."""
        try:
            self._end.send(_encode(ticket))
        except OSError:
            return False
        return True

    def receive(self) -> Samples | AnyNotice | None:
        """The next message. None: the worker is gone. Raises BlockingIOError if there is none now."""
        try:
            datagram = self._end.recv(_MOST)
        except ConnectionError:
            return None
        if not datagram:
            return None
        if datagram[:1] == b"S":
            return np.frombuffer(datagram, SAMPLE, offset=1)
        return _notices.decode(memoryview(datagram)[1:])

    def close(self) -> None:
        """Close this end; the worker notices."""
        self._end.close()


class WorkerEnd:
    """What a worker does with a link."""

    def __init__(self, end: socket.socket, queue_bytes: int = _QUEUE_BYTES) -> None:
        self._end = end
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._queue_bytes = queue_bytes
        self._lost: Counter[int] = Counter()

    def fileno(self) -> int:
        """For select."""
        return self._end.fileno()

    def send_samples(self, samples: Samples) -> None:
        """Send one cycle's samples, or queue them."""
        if len(samples):
            self._send(b"S" + samples.tobytes())

    def send_notice(self, notice: AnyNotice) -> None:
        """Send a notice, or queue it; notices are never dropped."""
        self._send(b"N" + _encode(notice))

    def receive(self) -> Ticket | None:
        """The next order. None: the gateway is gone. Raises BlockingIOError if there is none now."""
        try:
            datagram = self._end.recv(_MOST)
        except ConnectionError:
            return None
        return _decode_ticket(datagram) if datagram else None

    def _send(self, datagram: bytes) -> None:
        self._waiting.append(datagram)
        self._waiting_bytes += len(datagram)
        try:
            while self._waiting:
                self._end.send(self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
                if not self._waiting and self._lost:
                    self._tell_lost()
        except BlockingIOError:
            if self._waiting_bytes > self._queue_bytes:
                self._drop()
        except OSError:  # the gateway is gone: receive() says so
            self._waiting.clear()
            self._waiting_bytes = 0

    def _drop(self) -> None:
        """Drop the oldest samples down to three quarters of the bound; keep every notice."""
        kept: deque[bytes] = deque()
        for datagram in self._waiting:
            if self._waiting_bytes > self._queue_bytes * 3 // 4 and datagram[:1] == b"S":
                self._waiting_bytes -= len(datagram)
                self._lost.update(np.frombuffer(datagram, SAMPLE, offset=1)["motor"].tolist())
            else:
                kept.append(datagram)
        self._waiting = kept

    def _tell_lost(self) -> None:
        lost, self._lost = self._lost, Counter()
        for motor, count in lost.items():
            datagram = b"N" + _encode(SamplesLost(motor, count))
            self._waiting.append(datagram)
            self._waiting_bytes += len(datagram)
