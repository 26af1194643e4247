"""Half-duplex adapters that hear themselves: what was sent comes back ahead of the reply, and is taken off again.

Nobody has to configure it. Until an echo was seen, only what comes first after a request can be one: bytes that begin
like the request are held back, and passed on untouched as soon as they differ. An adapter that was seen to echo will
echo the next request, too: it is looked for behind whatever is still arriving, a late reply for example. An adapter
that gave back none of ``_NEVER`` requests in a row does not echo, and nothing is looked at any more.
"""

from collections import deque
from typing import Final, NamedTuple

from drivers.clock import MS, MonotonicNs

_LATEST_NS: Final = 100 * MS  # adapters hold bytes back for up to 16 ms
_NEVER: Final = 8


class _Sent(NamedTuple):
    data: bytes
    at_ns: MonotonicNs


class EchoFilter:
    """What was sent and may still come back. ``echoes`` counts the requests that did."""

    def __init__(self) -> None:
        self.echoes = 0
        self._awaited: deque[_Sent] = deque()
        self._held = b""
        self._missing = 0  # requests in a row that did not come back

    def sent(self, data: bytes, now: MonotonicNs) -> None:
        """Note what is written to the port, before any of it can come back."""
        while self._awaited and now - self._awaited[0].at_ns > _LATEST_NS:
            self._awaited.popleft()
            self._missing += 1
        if data and self._missing < _NEVER:
            self._awaited.append(_Sent(data, now))

    def received(self, chunk: bytes) -> bytes:
        """What is left of ``chunk`` and of what was held back before, without the echo."""
        data, self._held = self._held + chunk, b""
        passed = b""
        if not self.echoes and self._awaited and not self._begins(data):
            self._awaited.clear()
            self._missing += 1
        while self._awaited:
            place, number = min((self._find(data, sent.data), number) for number, sent in enumerate(self._awaited))
            end = place + len(self._awaited[number].data)
            passed += data[:place]
            if end > len(data):  # half of it, or nothing
                self._held = data[place:]
                return passed
            data = data[end:]
            self.echoes += 1
            self._missing = 0
            for _ in range(number + 1):  # those before it were lost
                self._awaited.popleft()
        return passed + data

    def _begins(self, data: bytes) -> bool:
        awaited = self._awaited[0].data
        return data.startswith(awaited) or awaited.startswith(data)

    @staticmethod
    def _find(data: bytes, awaited: bytes) -> int:
        """Where ``awaited`` begins in ``data``, all of it or as much as there is room for; its length if nowhere."""
        place = data.find(awaited)
        if place >= 0:
            return place
        first = max(0, len(data) - len(awaited) + 1)
        return next((at for at in range(first, len(data)) if awaited.startswith(data[at:])), len(data))
