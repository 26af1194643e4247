"""Several logs as one: slices of event time, each with what all partitions hold in it, whatever order they came in.

    log of telemetry --parts--> read ahead --+
    log of events    --parts--> read ahead --+--> slice [t, t + 5 ms) --> slice --> ...

What a slice holds is certain once every partition has shown what comes behind it. A partition that shows nothing for so
long that ``AHEAD_BYTES`` of others lie waiting is not waited for; in its own order its records come in any case.
"""

from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gateway.log_reader import Entries, Key, Missed, Part, Samples

AHEAD_BYTES = 16 << 20
ENTRY_BYTES = 200  # of an entry beside its value


class Slice(NamedTuple):
    """Consecutive records of several partitions; ``at_ns`` is the event time of the first."""

    at_ns: int
    parts: Sequence[Samples | Entries]


def piece(part: Samples | Entries, span: slice) -> Samples | Entries:
    """Some of a part's records; ``next`` stays that of the whole."""
    if isinstance(part, Samples):
        return replace(part, offsets=part.offsets[span], records=part.records[span])
    return replace(part, entries=part.entries[span])


async def slices(
    logs: Sequence[tuple[AsyncIterator[Part], Collection[Key]]], length_ns: int, missed: Callable[[Missed], None]
) -> AsyncIterator[Slice]:
    """Slices of ``length_ns`` or less. ``logs``: the parts of each, and its partitions. ``missed`` is told of holes."""
    readers = [_Ahead(parts, keys, missed) for parts, keys in logs]
    while True:
        reach_ns = [reach for reader in readers if (reach := await reader.reach_ns()) is not None]
        waiting = [part for reader in readers for part in reader.heads()]
        if not waiting:
            return
        first_ns = min(int(part.times[0]) for part in waiting)
        end_ns = min([first_ns + length_ns, *(reach + 1 for reach in reach_ns)])
        yield Slice(first_ns, [part for reader in readers for part in reader.take(end_ns)])


@dataclass(slots=True)
class _Waiting:
    """A part that was read, or what is left of it. ``times`` never fall in a partition."""

    part: Samples | Entries
    times: NDArray[np.int64]

    @property
    def bytes(self) -> int:
        if isinstance(self.part, Samples):
            return self.part.records.nbytes
        return sum(len(entry.value) + ENTRY_BYTES for entry in self.part.entries)

    def split(self, count: int) -> tuple["_Waiting", "_Waiting"]:
        """The first ``count`` records, and the others."""
        first, others = slice(0, count), slice(count, None)
        return (
            _Waiting(piece(self.part, first), self.times[first]),
            _Waiting(piece(self.part, others), self.times[others]),
        )


class _Ahead:
    """One log, read ahead until every partition has shown what comes next."""

    def __init__(self, parts: AsyncIterator[Part], keys: Collection[Key], missed: Callable[[Missed], None]) -> None:
        self._parts = parts
        self._missed = missed
        self._waiting: dict[Key, deque[_Waiting]] = {key: deque() for key in keys}
        self._newest_ns: dict[Key, int] = {}
        self._bytes = 0
        self._ended = False

    def heads(self) -> list[_Waiting]:
        """The oldest part of each partition that has any."""
        return [parts[0] for parts in self._waiting.values() if parts]

    async def reach_ns(self) -> int | None:
        """The event time up to which all is here that is waited for; None: the log has ended."""
        while not self._ended and self._bytes < AHEAD_BYTES and not (self._waiting and all(self._waiting.values())):
            await self._read()
        if self._ended:
            return None
        return min(int(parts[-1].times[-1]) for parts in self._waiting.values() if parts)

    async def _read(self) -> None:
        part = await anext(self._parts, None)
        if part is None:
            self._ended = True
        elif isinstance(part, Missed):
            self._missed(part)
        else:
            key = (part.topic, part.partition)
            if isinstance(part, Samples):
                times = part.records["sampled_at_ns"]
            else:
                times = np.array([entry.at_ns for entry in part.entries], np.int64)
            times = np.maximum.accumulate(np.maximum(times, self._newest_ns.get(key, 0)))
            self._newest_ns[key] = int(times[-1])
            self._waiting.setdefault(key, deque()).append(waiting := _Waiting(part, times))
            self._bytes += waiting.bytes

    def take(self, end_ns: int) -> list[Samples | Entries]:
        """What is older than ``end_ns``."""
        taken: list[Samples | Entries] = []
        for parts in self._waiting.values():
            while parts and (count := int(np.searchsorted(parts[0].times, end_ns))):
                old, left = parts.popleft().split(count)
                self._bytes -= old.bytes
                taken.append(old.part)
                if len(left.times):
                    parts.appendleft(left)
                    break
        return taken
