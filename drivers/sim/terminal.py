"""A pseudo-terminal that stands for a serial port, or for an adapter that speaks slcan."""

import fcntl
import os
import select
import struct
import termios
import tty
from contextlib import suppress
from pathlib import Path

from drivers.clock import MS, after, monotonic_ns, sleep_until

_CHUNK = 4096
_PASSED_ON_NS = 5 * MS  # the kernel passes on what was written a little later


class Terminal:
    """A raw pseudo-terminal that stays while clients come and go, under a symbolic link if one is wanted."""

    def __init__(self, link: Path | None) -> None:
        # the client's end is held open here too: otherwise the terminal hangs up when a client closes it
        self._fd, self._held = os.openpty()
        tty.setraw(self._held)
        os.set_blocking(self._fd, False)
        self.name = os.ttyname(self._held)
        self._link = link
        self._rest = b""  # of a write that the terminal took in part
        if link is not None:
            try:
                _replace_link(link, self.name)
            except OSError:
                self.close()
                raise

    def close(self) -> None:
        """Remove the link, unless it is another host's by now, and hang up."""
        if self._link is not None:
            with suppress(OSError):
                if self._link.readlink() == Path(self.name):
                    self._link.unlink()
        os.close(self._fd)
        if self._held >= 0:
            os.close(self._held)

    def read(self, timeout_s: float) -> bytes:
        """What clients wrote, as soon as there is any; nothing after ``timeout_s``."""
        readable, writable, _ = select.select([self._fd], [self._fd] if self._rest else [], [], timeout_s)
        if writable:
            rest, self._rest = self._rest, b""
            self.write(rest)
        with suppress(BlockingIOError):
            return os.read(self._fd, _CHUNK) if readable else b""
        return b""

    def write(self, unit: bytes) -> bool:
        """Write all of a unit, or lose all of it (False): half a line would spoil the next one too."""
        if self._rest:
            return False
        try:
            self._rest = unit[os.write(self._fd, unit) :]
        except BlockingIOError:
            return False
        return True

    def holds_unread(self) -> bool:
        """Whether clients have something left to read."""
        if self._rest:
            return True
        sleep_until(after(monotonic_ns(), _PASSED_ON_NS))
        return self._held >= 0 and struct.unpack("i", fcntl.ioctl(self._held, termios.FIONREAD, bytes(4)))[0] > 0

    def let_go(self) -> None:
        """Hold the client's end no longer, so that ``is_taken`` can see one come."""
        os.close(self._held)
        self._held = -1

    def is_taken(self) -> bool:
        """Whether a client has opened it since ``let_go``; from then on it is held again."""
        if self._held < 0 and not self._is_hung_up():
            self._held = os.open(self.name, os.O_RDWR | os.O_NOCTTY)
            tty.setraw(self._held)  # without anybody there, the terminal forgot that it is raw
        return self._held >= 0

    def _is_hung_up(self) -> bool:
        polled = select.poll()
        polled.register(self._fd, 0)
        return bool(polled.poll(0))


def _replace_link(link: Path, target: str) -> None:
    """Make ``link`` lead to ``target`` in one step, whatever link was there before."""
    if link.exists() and not link.is_symlink():
        raise FileExistsError(f"{link} exists and is no symbolic link")
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)
