"""The state directory of an arm: what lies where, who may write, and the status file for other processes.

lock          held by the one gateway that runs this arm
journal.db    the log (gateway.journal), written by that gateway only
journal.whole is there while the journal holds everything that was given out (gateway.evidence)
cursors/      where named readers of the journal left off (gateway.cursor)
commands.db   commands put in on this machine (gateway.local_commands)
estop.json    what is latched (gateway.latches)
status.json   rewritten every second
reserve       a little of the disk, given back when a new journal has to begin while the rest is full
owner         who this is to gateways on other machines (gateway.claim)
sim/          links to the pseudo-terminals of simulated motors
motion/       what simulated motors live through (gateway.recordings.motion)
taps/         sockets of those who record raw traffic, by bus (gateway.tap)
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

RESERVE_BYTES = 4 << 20  # a journal, its WAL and the WAL's index, with the ids that go over from the one before


class StateDirError(Exception):
    """The directory cannot be used, or another gateway uses it."""


class StateDir:
    """Paths in the directory; made if it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "journal.db"
        self.commands = path / "commands.db"
        self.whole = path / "journal.whole"
        self.latches = path / "estop.json"
        self.status = path / "status.json"
        self.simulated = path / "sim"
        self.motion = path / "motion"
        self.taps = path / "taps"
        self._lock = path / "lock"
        self._reserve = path / "reserve"

    def make(self) -> None:
        """Create the directory. Raises StateDirError if that cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise PermissionError("not writable for this user")
        except OSError as error:
            raise StateDirError(f"state_dir {self.path}: {error}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock. Raises StateDirError, naming the process that has it."""
        self.make()
        with self._lock.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise StateDirError(
                    f"state_dir {self.path}: a gateway runs this arm already (process {holder}); stop it, or use "
                    "another state_dir"
                ) from None
            with contextlib.suppress(OSError):  # a full disk: the lock holds, nobody can read whose it is
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
            yield

    def keep_reserve(self) -> None:
        """Keep a little of the disk back, if there is that much left."""
        if self._reserve.exists():
            return
        try:
            with self._reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
        except OSError:
            self.release_reserve()

    def release_reserve(self) -> bool:
        """Give it back to the disk; False if there is none."""
        try:
            self._reserve.unlink()
        except OSError:
            return False
        return True

    def owner(self) -> str:
        """Who the gateway of this directory is to other machines: made once, kept for as long as the directory."""
        path = self.path / "owner"
        with contextlib.suppress(FileNotFoundError):
            if found := path.read_text().strip():
                return found
        made = secrets.token_hex(8)
        try:
            path.write_text(f"{made}\n")
        except OSError as error:
            raise StateDirError(f"{path}: {error}") from error
        return made

    def running_pid(self) -> int | None:
        """The process of the gateway that holds the lock; None if there is none."""
        try:
            with self._lock.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read().strip() or 0)
        except (OSError, ValueError):
            return None
        return None

    def write_status(self, status: dict[str, Any]) -> None:
        """Replace the status file in one step, so that a reader never sees half of it. Raises OSError."""
        fresh = self.status.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(status))
        fresh.replace(self.status)

    def read_status(self) -> dict[str, Any]:
        """The newest status. Raises StateDirError if there is none."""
        try:
            status: dict[str, Any] = msgspec.json.decode(self.status.read_bytes())
        except (OSError, msgspec.DecodeError) as error:
            raise StateDirError(f"{self.status}: {error}; has the gateway run with this state_dir?") from error
        return status
