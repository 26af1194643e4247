"""Where a named reader of the journal left off: a small file of its own, so that a stopped reader holds up nobody.

cursors/NAME.json   {"telemetry": {"0": [123, 4711]}}    by topic and partition: stream, next offset to read
cursors/NAME.lock   held by the reader of that name; a second one is refused
"""

import contextlib
import fcntl
import os
from pathlib import Path

import msgspec

from gateway.log_reader import LogError, Position, Positions, Topic

_Saved = dict[Topic, dict[int, Position]]


class Cursor:
    """The remembered positions of one reader, held by this process until ``close``."""

    def __init__(self, directory: Path, name: str) -> None:
        """Raises LogError if another reader has this name now, or the directory cannot be used."""
        self._path = directory / f"{name}.json"
        self._saved: _Saved = {}
        with contextlib.ExitStack() as undo:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._lock = undo.enter_context((directory / f"{name}.lock").open("a+"))
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.seek(0)
                holder = self._lock.read().strip() or "unknown"
                raise LogError(f"reader {name!r} reads already (process {holder}); use another name") from None
            except OSError as error:
                raise LogError(f"reader {name!r}: {error}") from error
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()}\n")
            self._lock.flush()
            undo.pop_all()

    def load(self) -> dict[tuple[Topic, int], Position]:
        """What was saved last; empty for a new name. Raises LogError if the file is not one of these."""
        try:
            saved = msgspec.json.decode(self._path.read_bytes(), type=_Saved)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            raise LogError(f"cursor {self._path}: {error}; remove it to begin anew") from error
        self._saved = saved
        return {(topic, partition): at for topic, those in saved.items() for partition, at in those.items()}

    def save(self, positions: Positions) -> None:
        """Remember positions, besides those of other topics; durable when it returns. Raises OSError."""
        for (topic, partition), position in positions.items():
            self._saved.setdefault(topic, {})[partition] = position
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as file:
            file.write(msgspec.json.encode(self._saved))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Let go of the name."""
        self._lock.close()
