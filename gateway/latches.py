"""What is latched: an emergency stop of the arm, or the stop of one motor, until somebody takes it back.

Kept in a file of the state directory, so that it outlives the process and a journal that is set aside. A file that
cannot be read counts as an emergency stop: nobody knows that there is none.
"""

import asyncio
import os
from pathlib import Path

import msgspec

from gateway.events import ARM


class Latch(msgspec.Struct, frozen=True):
    """Who stopped it, when and why."""

    at_ns: int
    by: str
    why: str


_decode = msgspec.json.Decoder(dict[str, Latch]).decode


class Latches:
    """``held``: {motor, or * for the whole arm: its latch}. Change it, tell the motors, and ``save``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saving = asyncio.Lock()
        self.held: dict[str, Latch] = {}
        try:
            self.held.update(_decode(path.read_bytes()))
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError) as error:
            self.held[ARM] = Latch(0, "gateway", f"{path} cannot be read, perhaps there was an emergency stop: {error}")

    @property
    def estop(self) -> Latch | None:
        """The emergency stop, if it is latched."""
        return self.held.get(ARM)

    async def save(self) -> None:
        """Return when what is held is on the disk. Raises OSError."""
        async with self._saving:
            await asyncio.to_thread(_replace, self._path, msgspec.json.encode(self.held))


def _replace(path: Path, content: bytes) -> None:
    """In one step, and to stay: a reader finds the old content or the new, also after the power failed."""
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
