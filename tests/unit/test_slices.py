"""Several logs as one, slice by slice of event time."""

from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import telemetry
from gateway.log_reader import Entries, Key, LogEntry, Missed, Part, Position, Samples
from gateway.recordings import slices as slicing
from gateway.recordings.slices import Slice, slices

LENGTH_NS = 5
NEXT = Position(1, 0)


def samples(partition: int, first: int, times: Sequence[int]) -> Samples:
    """Samples of a motor, numbered from ``first``."""
    records = telemetry.blank(len(times))
    records["partition"], records["seq"] = partition, first + np.arange(len(times))
    records["sampled_at_ns"] = times
    return Samples(partition, f"joint{partition}", np.arange(first, first + len(times)), records, NEXT)


def entries(partition: int, first: int, times: Sequence[int]) -> Entries:
    """Events of a motor, likewise."""
    found = [LogEntry(first + at, 1, first + at, at_ns, "*", b"{}") for at, at_ns in enumerate(times)]
    return Entries("events", partition, found, NEXT)


def records_of(part: Samples | Entries) -> list[tuple[str, int, int, int]]:
    """(topic, partition, number, time) of each record."""
    if isinstance(part, Samples):
        columns = zip(part.records["seq"].tolist(), part.records["sampled_at_ns"].tolist(), strict=True)
        return [("telemetry", part.partition, seq, at_ns) for seq, at_ns in columns]
    return [("events", part.partition, entry.seq, entry.at_ns) for entry in part.entries]


async def collect(logs: Sequence[Sequence[Part]]) -> list[Slice]:
    async def read(parts: Sequence[Part]) -> AsyncIterator[Part]:
        for part in parts:
            yield part

    def keys(parts: Sequence[Part]) -> set[Key]:
        return {(part.topic, part.partition) for part in parts}

    return [found async for found in slices([(read(parts), keys(parts)) for parts in logs], LENGTH_NS, lambda _: None)]


Cuts = st.lists(st.integers(1, 6), max_size=8)
Times = st.lists(st.integers(0, 100), max_size=30).map(sorted)


def cut(make: object, partition: int, times: Sequence[int], cuts: Sequence[int]) -> list[Part]:
    parts: list[Part] = []
    at = 0
    for size in [*cuts, len(times)]:
        if some := times[at : at + size]:
            parts.append(make(partition, at, some))  # type: ignore[operator]
        at += size
    return parts


@given(
    telemetry_times=st.lists(st.tuples(Times, Cuts), min_size=1, max_size=4),
    event_times=st.lists(st.tuples(Times, Cuts), max_size=2),
    order=st.randoms(use_true_random=False),
)
async def test_every_record_once_in_its_partitions_order_and_in_the_slice_of_its_time(
    telemetry_times: list[tuple[list[int], list[int]]], event_times: list[tuple[list[int], list[int]]], order: object
) -> None:
    logs = []
    for make, of in (samples, telemetry_times), (entries, event_times):
        queues = [cut(make, partition, *one) for partition, one in enumerate(of)]
        log: list[Part] = []
        while queues := [queue for queue in queues if queue]:
            log.append(order.choice(queues).pop(0))  # type: ignore[attr-defined]  # random.Random
        logs.append(log)
    found = await collect(logs)

    given_records = [record for log in logs for part in log for record in records_of(part)]  # type: ignore[arg-type]
    came = [record for one in found for part in one.parts for record in records_of(part)]
    for key in {record[:2] for record in given_records}:
        assert [r for r in came if r[:2] == key] == [r for r in given_records if r[:2] == key]
    assert len(came) == len(given_records)
    for one in found:
        for part in one.parts:
            assert all(one.at_ns <= at_ns < one.at_ns + LENGTH_NS for *_, at_ns in records_of(part))
    assert [one.at_ns for one in found] == sorted(one.at_ns for one in found)


async def test_a_partition_that_is_silent_for_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "AHEAD_BYTES", 1000)
    log = [*(samples(0, 10 * at, range(10 * at, 10 * at + 10)) for at in range(100)), samples(1, 0, [1, 2])]
    taken = 0

    async def read() -> AsyncIterator[Part]:
        nonlocal taken
        for part in log:
            taken += 1
            yield part

    found = slices([(read(), [("telemetry", 0), ("telemetry", 1)])], LENGTH_NS, lambda _: None)
    assert (await anext(found)).at_ns == 0
    assert taken < 5
    late = [part async for one in found for part in one.parts if part.partition == 1]
    assert [record for part in late for record in records_of(part)] == records_of(log[-1])


async def test_times_that_fall_keep_the_partitions_order() -> None:
    found = await collect([[entries(0, 0, [3]), entries(0, 1, [1, 2])]])
    assert [record[2] for one in found for part in one.parts for record in records_of(part)] == [0, 1, 2]


async def test_holes_of_a_log_are_told() -> None:
    hole = Missed("telemetry", 0, 1, 5, 6, "gone", NEXT)

    async def read() -> AsyncIterator[Part]:
        yield samples(0, 0, [1])
        yield hole

    told: list[Missed] = []
    assert len([one async for one in slices([(read(), [("telemetry", 0)])], LENGTH_NS, told.append)]) == 1
    assert told == [hole]
