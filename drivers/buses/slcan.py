"""Lines of an slcan adapter: python-can decodes those that are frames; what is none is told, not passed over.

    t/T frame  r/R remote frame  d/D b/B CAN FD     z Z CR  taken     BEL  refused

python-can's own reading takes a byte a call, polls by the millisecond, ends at an acknowledgement although frames
stand behind it, and takes a line for a frame that has fewer data than it announces, or digits that are none.
Source: Lawicel CANUSB manual, ASCII commands.
"""

import errno
import os
import re
import select
from collections import deque
from typing import TYPE_CHECKING, Final

import can

from drivers.clock import MonotonicNs, left_s

if TYPE_CHECKING:
    from can.interfaces.slcan import slcanBus

_CHUNK: Final = 4096
_LONGEST: Final = 160  # characters; "B" with an identifier, a length, 64 bytes of data, a time stamp, and some
_BEHIND_A_LINE: Final = re.compile(r"(?<=[\r\a])")
# number, length, pairs of digits (the data, and a time stamp if the adapter gives any), end
_FRAME: Final = re.compile(
    r"(?: (?:[tr][0-7]H{2} | [TR][01]H{7}) [0-8] | (?:[db][0-7]H{2} | [DB][01]H{7}) H ) (?:H{2})* \r".replace(
        "H", "[0-9A-Fa-f]"
    ),
    re.VERBOSE,
)
_ANSWERS: Final = frozenset({"\r", "z\r", "Z\r", "\a"})  # BEL answers the closing of a channel that is not open, too


class SlcanReader:
    """What arrives on an open slcan bus of python-can. Raises NotImplementedError for a port without descriptor."""

    def __init__(self, bus: "slcanBus") -> None:
        self._bus = bus
        self._fd = bus.fileno()
        self._lines: deque[str] = deque()
        self._begun = ""  # a line whose end has not come yet

    def next(self, deadline: MonotonicNs) -> can.Message | str | None:
        """The next frame, or words about garbage; None at ``deadline``. Raises OSError when the adapter is gone."""
        while True:
            while self._lines:
                line = self._lines.popleft()
                if line not in _ANSWERS:
                    return self._decode(line) or f"no line of slcan: {line!r}"
            if not select.select([self._fd], [], [], left_s(deadline))[0]:
                return None
            self._read()

    def _read(self) -> None:
        """Take what has arrived, cut into lines."""
        chunk = os.read(self._fd, _CHUNK)
        if not chunk:
            raise OSError(errno.EIO, "the adapter is gone, or another program reads from it")
        # Latin-1 knows every byte; those that are not ASCII are garbage in any case
        *lines, self._begun = _BEHIND_A_LINE.split(self._begun + chunk.decode("latin-1"))
        self._lines += lines
        if len(self._begun) > _LONGEST:
            self._lines.append(self._begun)
            self._begun = ""

    def _decode(self, line: str) -> can.Message | None:
        if not _FRAME.fullmatch(line):
            return None
        self._bus._queue.put_nowait(line)
        message, _ = self._bus._recv_internal(0.0)
        return message if message and (message.is_remote_frame or len(message.data) == message.dlc) else None
