"""A log played again into the log of another arm: the same records, bit for bit, at the pace that they had.

    source --slices of event time--> pace --> what the target has not got yet --> journal (replay_journal)
                                                                              --> Kafka   (replay_kafka)

The target itself tells how far an earlier replay came, so one that was killed is started again and goes on. Commands
are never written: nothing that is replayed can move a motor.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from aiokafka.errors import KafkaError, OutOfOrderSequenceNumber, ProducerFenced
from numpy.typing import NDArray

from drivers.clock import MS, SECOND
from gateway.kafka import TopicMismatch
from gateway.log_reader import TOPICS, Entries, Key, LogError, LogReader, Missed, Samples, Topic
from gateway.recordings.pace import Pace
from gateway.recordings.slices import piece, slices
from gateway.span import cut

WRITTEN: tuple[Topic, ...] = ("telemetry", "events", "outcomes")
SLICE_NS = 5 * MS  # of event time: what lies in it is released together
UNPACED_SLICE_NS = SECOND
RETRY_S = 1.0


class Tail(NamedTuple):
    """The newest record that a partition of the target holds."""

    stream: int
    seq: int


class Run(NamedTuple):
    """Records of one stream and partition."""

    stream: int
    part: Samples | Entries


class Target(ABC):
    """A log that takes a replay, open."""

    @abstractmethod
    def tail(self, key: Key) -> Tail | None:
        """How far an earlier replay came in a partition; None: it holds nothing."""

    @abstractmethod
    async def write(self, runs: Sequence[Run]) -> None:
        """Append. Streams come one after the other."""


OpenTarget = Callable[[str, Collection[Key]], AbstractAsyncContextManager[Target]]
"""Opens the target for the log of an arm with these partitions. Raises LogError for one that cannot take it."""


def check_arm(arm: str, source: str) -> None:
    """Raises LogError for a replay of an arm into its own log."""
    if arm == source:
        raise LogError(f"arm {arm!r}: is the one that was recorded; a replay needs another name")


@dataclass(slots=True)
class Played:
    """What has been replayed so far, and what was not."""

    whole: int | None = None  # records of the source, as far as it tells
    taken: int = 0  # of them, written, left out, or there already
    at_ns: int = 0
    records: dict[Topic, int] = field(default_factory=lambda: dict.fromkeys(WRITTEN, 0))  # handed over, also again
    commands: int = 0  # left out
    unnumbered: int = 0  # left out: nobody can tell whether the target has them
    missed: list[Missed] = field(default_factory=list)  # holes of the source
    late_ns: int = 0  # of the newest slice


async def replay(
    source: Callable[[Topic], LogReader],
    target: OpenTarget,
    pace: Pace,
    played: Played,
    *,
    until_ns: int | None = None,
    failed: Callable[[Exception], None] = lambda error: None,  # noqa: ARG005
) -> None:
    """Replay ``source`` (makes a reader of one topic) into ``target``, and keep ``played`` up to date.

    A broker that goes away is told to ``failed`` and asked again. Raises LogError where source or target do not fit.
    """
    while True:
        try:
            return await _replay(source, target, pace, played, until_ns)
        except (KafkaError, TimeoutError) as error:
            again = isinstance(error, OutOfOrderSequenceNumber | ProducerFenced | TimeoutError) or error.retriable
            if not (played.at_ns and again):
                raise
            failed(error)
            await asyncio.sleep(RETRY_S)


async def _replay(
    source: Callable[[Topic], LogReader], target: OpenTarget, pace: Pace, played: Played, until_ns: int | None
) -> None:
    async with AsyncExitStack() as stack:
        logs = [log async for log in _entered(source, stack)]
        arm = logs[0].arm
        keys = set[Key]().union(*(log.partitions() for log in logs))
        behind = _Behind(await stack.enter_async_context(target(arm, keys)))
        played.whole, played.taken = _whole(logs), 0
        parts = [(cut(log, until_ns=until_ns), log.partitions()) for log in logs]
        length_ns = SLICE_NS if pace.paced else UNPACED_SLICE_NS
        async for at_ns, some in slices(parts, length_ns, played.missed.append):
            if runs := behind.runs(some, played):
                played.late_ns = await pace.wait(at_ns)
                await behind.target.write(runs)
                played.at_ns = at_ns
                for run in runs:
                    played.records[run.part.topic] += len(_seqs(run.part))
        behind.check(keys)


async def _entered(source: Callable[[Topic], LogReader], stack: AsyncExitStack) -> AsyncIterator[LogReader]:
    """A reader for each topic, so that none runs far ahead of the others."""
    for topic in TOPICS:
        try:
            yield await stack.enter_async_context(source(topic))
        except (LogError, TopicMismatch):
            if topic in WRITTEN:  # commands are only counted, where there are any
                raise


def _whole(logs: Sequence[LogReader]) -> int | None:
    left = [log.left() for log in logs]
    return None if None in left else sum(count for count in left if count)


class _Behind:
    """Lets through what the target does not hold yet, split by streams.

    Streams follow each other in the same order in every partition; of a partition's tail and a record, that is behind
    the other whose stream began later in the source, or whose number is higher.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._began: dict[int, int] = {}  # stream -> its place among the source's

    def runs(self, parts: Iterable[Samples | Entries], played: Played) -> list[Run]:
        """What of a slice is to be written, one stream after the other."""
        found: list[Run] = []
        for part in parts:
            played.taken += len(_seqs(part))
            if part.topic == "commands":
                played.commands += len(_seqs(part))
            else:
                found += _by_stream(part)
        first_ns: dict[int, int] = {}
        for run in found:
            first_ns[run.stream] = min(_first_ns(run), first_ns.get(run.stream, 1 << 63))
        runs = [self._fresh(run) for run in sorted(found, key=lambda run: first_ns[run.stream]) if run.stream]
        played.unnumbered += sum(len(_seqs(run.part)) for run in found if not run.stream)
        return [run for run in runs if run]

    def _fresh(self, run: Run) -> Run | None:
        """What of a run the target has not got."""
        place = self._began.setdefault(run.stream, len(self._began))
        tail = self.target.tail((run.part.topic, run.part.partition))
        if tail is None or self._began.get(tail.stream, place) < place:
            return run
        if tail.stream != run.stream:
            return None
        seqs = _seqs(run.part)
        known = int(np.searchsorted(seqs, tail.seq, "right"))
        return Run(run.stream, piece(run.part, slice(known, None))) if known < len(seqs) else None

    def check(self, keys: Collection[Key]) -> None:
        """At the end: raises LogError if the target holds what the source does not have."""
        for key in keys:
            tail = self.target.tail(key) if key[0] != "commands" else None
            if tail and tail.stream not in self._began:
                raise LogError(
                    f"{key[0]}, partition {key[1]}: the target holds stream {tail.stream}, which the source has not: "
                    "replay into an arm that holds nothing else"
                )


def _by_stream(part: Samples | Entries) -> list[Run]:
    if isinstance(part, Samples):
        streams = part.records["stream"]
    else:
        streams = np.array([entry.stream for entry in part.entries], np.uint64)
    edges = [0, *(np.flatnonzero(streams[1:] != streams[:-1]) + 1).tolist(), len(streams)]
    return [Run(int(streams[first]), piece(part, slice(first, end))) for first, end in pairwise(edges)]


def _first_ns(run: Run) -> int:
    part = run.part
    return int(part.records["sampled_at_ns"][0]) if isinstance(part, Samples) else part.entries[0].at_ns


def _seqs(part: Samples | Entries) -> NDArray[np.uint64]:
    if isinstance(part, Samples):
        seqs: NDArray[np.uint64] = part.records["seq"]
        return seqs
    return np.array([entry.seq for entry in part.entries], np.uint64)
