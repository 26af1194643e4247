"""A replay into a journal: one that is marked as a replay, in a state directory where no gateway runs.

A journal holds one stream. Where the recorded stream ends, its journal is set aside, as a gateway does, and the next
begins: readers go on from one to the other as they always do.
"""

import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path

import numpy as np

from drivers.clock import epoch_ns
from gateway.aside import set_aside
from gateway.journal import Batch, Changes, Journal, Replayed, StoredEntry
from gateway.journal_reader import JournalFile, journal_files
from gateway.log_reader import Key, LogError, Samples
from gateway.recordings.replay import OpenTarget, Run, Tail, Target, check_arm
from gateway.state_dir import StateDir
from gateway.telemetry import RECORD

MAX_BYTES = 1 << 62  # nothing is ever trimmed
HEADS_ROWS = 256  # the next start reads no more rows than these to know where it was


def into_journal(state: StateDir, arm: str) -> OpenTarget:
    """Replay into the journal of ``arm`` in ``state``."""

    @contextlib.asynccontextmanager
    async def opened(source: str, keys: Collection[Key]) -> AsyncIterator[Target]:  # noqa: ARG001
        check_arm(arm, source)
        with state.locked(), contextlib.closing(_JournalTarget(state.journal, arm, source)) as target:
            yield target

    return opened


class _JournalTarget(Target):
    def __init__(self, path: Path, arm: str, source: str) -> None:
        self._path = path
        self._arm = arm
        self._source = source
        self._journal: Journal | None = None
        self._left: set[int] = set()
        self._held: int | None = None  # the stream of the journal at ``path``
        self._newest: int | None = None  # that, or of the one that was set aside last
        self._tails: dict[Key, int] = {}  # of the newest stream
        files = [file for file in journal_files(path) if file.exists()]
        if files:
            with contextlib.closing(JournalFile(files[-1])) as newest:
                self._check(newest)
                ends = newest.ends()
            self._newest, self._tails = ends.stream, ends.offsets
            self._held = ends.stream if files[-1] == path else None

    def _check(self, file: JournalFile) -> None:
        if (file.arm, file.replayed) != (self._arm, self._source):
            what = f"a replay of arm {file.replayed!r}" if file.replayed else "that of a gateway"
            raise LogError(
                f"journal {self._path}: is {what}, as arm {file.arm!r}: a replay of {self._source!r} as {self._arm!r} "
                "needs another --state-dir"
            )

    def tail(self, key: Key) -> Tail | None:
        return None if self._newest is None else Tail(self._newest, self._tails.get(key, 0))

    async def write(self, runs: Sequence[Run]) -> None:
        for stream in dict.fromkeys(run.stream for run in runs):
            self._write(self._turn_to(stream), [run for run in runs if run.stream == stream])

    def _turn_to(self, stream: int) -> Journal:
        """The journal of this stream."""
        if self._journal is None or self._journal.stream != stream:
            if stream in self._left:
                raise LogError(f"stream {stream} of the source comes back after another: it is not in order")
            if self._held is not None and self._held != stream:
                self.close()
                set_aside(self._path, "the recorded stream ended")
                self._left.add(self._held)
            replayed = Replayed(stream, self._source, epoch_ns())
            self._journal = Journal(self._path, self._arm, {}, MAX_BYTES, replayed)
            self._held = stream
        return self._journal

    @staticmethod
    def _write(journal: Journal, runs: Sequence[Run]) -> None:
        names: dict[int, str] = {}
        blobs: list[bytes] = []
        entries: list[StoredEntry] = []
        for _, part in sorted(runs, key=lambda run: run.part.partition):
            if isinstance(part, Samples):
                names[part.partition] = part.motor
                blobs.append(part.records.tobytes())
                continue
            for entry in part.entries:
                number = journal.entry + 1 + len(entries)
                entries.append(
                    StoredEntry(number, part.topic, part.partition, entry.seq, entry.at_ns, entry.key, entry.value)
                )
        if not names.items() <= journal.motors.items():
            journal.add_motors(names)
        changes = Changes(entries=entries)
        if blobs:
            changes.batch = Batch(journal.row + 1, np.frombuffer(b"".join(blobs), RECORD))
            changes.save_heads = changes.batch.id % HEADS_ROWS == 0
        journal.commit(changes)

    def close(self) -> None:
        if self._journal:
            self._journal.close()
