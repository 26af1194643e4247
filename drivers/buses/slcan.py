"""Lines of an slcan adapter: python-can decodes those that are frames; what is none is told, not passed over.

    t/T frame  r/R remote frame  d/D b/B CAN FD     z Z CR  taken     BEL  refused

python-can's own waiting polls by the millisecond, ends at an acknowledgement although frames stand behind it, and
takes a line with fewer data than it announces for a frame. Source: Lawicel CANUSB manual, ASCII commands.
"""

import contextlib
import select
from typing import TYPE_CHECKING, Final

import can

from drivers.clock import MonotonicNs, left_s

if TYPE_CHECKING:
    from can.interfaces.slcan import slcanBus

_FRAMES: Final = frozenset("tTrRdDbB")
_ANSWERS: Final = frozenset({"\r", "z\r", "Z\r", "\a"})  # BEL answers the closing of a channel that is not open, too


class SlcanReader:
    """What arrives on an open slcan bus of python-can."""

    def __init__(self, bus: "slcanBus") -> None:
        self._bus = bus
        self._fd = bus.fileno()

    def next(self, deadline: MonotonicNs) -> can.Message | str | None:
        """The next frame, or words about garbage; None at ``deadline``. Raises python-can's errors."""
        while select.select([self._fd], [], [], left_s(deadline))[0]:
            try:
                line = self._bus._read(0.0)
            except can.CanError as error:
                if not isinstance(error.__cause__, UnicodeDecodeError):
                    raise
                line = self._bus._buffer.decode("latin-1")
                self._bus._buffer.clear()  # it would stumble over it for ever
            if line is not None and line not in _ANSWERS:
                return self._decode(line) or f"no line of slcan: {line!r}"
        return None

    def _decode(self, line: str) -> can.Message | None:
        if line[0] not in _FRAMES:
            return None
        self._bus._queue.put_nowait(line)
        with contextlib.suppress(ValueError, IndexError):
            message, _ = self._bus._recv_internal(0.0)
            if message and (message.is_remote_frame or len(message.data) == message.dlc):
                return message
        return None
