"""Sequence numbers without gaps or repeats, event times that never fall, for any batching and any clock."""

from collections import defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import SECOND
from drivers.motor import SAMPLE
from gateway.event_time import EventTime
from gateway.stamp import Head, Stamp
from gateway.telemetry import messages
from tests.gateway_parts import make_samples

STREAM = 2**53 - 1
HEADS = {0: Head(0, 0), 1: Head(41, 5), 7: Head(2**40, 0)}
BATCHES = st.lists(st.lists(st.sampled_from(sorted(HEADS)), max_size=12), max_size=12)


def still(wall_ns: int = 1000 * SECOND) -> EventTime:
    return EventTime(0, lambda: 0, lambda: wall_ns)


@given(BATCHES)
def test_numbers_go_on_behind_the_heads_without_gap_or_repeat(batches: list[list[int]]) -> None:
    stamp = Stamp(STREAM, HEADS, still())
    seqs: dict[int, list[int]] = defaultdict(list)
    for motors in batches:
        records = stamp.stamp(make_samples(motors))
        assert records["partition"].tolist() == sorted(motors)
        assert set(records["stream"].tolist()) <= {STREAM}
        for partition, seq in zip(sorted(motors), records["seq"].tolist(), strict=True):
            seqs[partition].append(seq)
    for partition, found in seqs.items():
        assert found == list(range(HEADS[partition].seq + 1, HEADS[partition].seq + 1 + len(found)))


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(-(10**12), 10**12), st.integers(0, 10**9)), max_size=40))
def test_event_times_of_a_motor_never_fall_whatever_the_clock_does(moves: list[tuple[int, int, int]]) -> None:
    clock = {"monotonic": 0, "wall": 10**15}
    time = EventTime(0, lambda: clock["monotonic"], lambda: clock["wall"])
    stamp = Stamp(1, {0: Head(0, 0), 1: Head(0, 0)}, time)
    last = {0: 0, 1: 0}
    for motor, step_ns, pass_ns in moves:
        clock["monotonic"] += pass_ns
        clock["wall"] += pass_ns + step_ns
        record = stamp.stamp(make_samples([motor], clock["monotonic"]))[0]
        assert record["sampled_at_ns"] >= last[motor]
        last[motor] = record["sampled_at_ns"]
        time.check()


def test_times_stay_behind_those_of_the_run_before() -> None:
    stamp = Stamp(1, {0: Head(3, 5000 * SECOND)}, still())
    assert stamp.stamp(make_samples([0]))[0]["sampled_at_ns"] == 5000 * SECOND


def test_values_are_copied_as_they_are() -> None:
    samples = np.zeros(2, SAMPLE)
    names = [name for name in SAMPLE.names or () if name not in {"motor", "sampled_at_ns"}]
    for number, name in enumerate(names):
        samples[name] = [number + 0.5, np.nan] if samples[name].dtype.kind == "f" else [number, 2**32 - 1]
    records = Stamp(1, {0: Head(0, 0)}, still()).stamp(samples)
    for name in names:
        np.testing.assert_array_equal(records[name], samples[name])


def test_no_samples_are_no_records() -> None:
    assert messages(Stamp(1, {0: Head(0, 0)}, still()).stamp(make_samples([]))) == []


def test_rows_and_entries_go_on_behind_the_newest_that_the_journal_holds() -> None:
    stamp = Stamp(7, {0: Head(0, 0)}, EventTime(), row=4, entry=10, entry_heads={("events", 1): 3})
    assert [stamp.row(), stamp.row()] == [5, 6]
    assert [stamp.entry(*at) for at in (("events", 1), ("outcomes", 1), ("events", 1), ("events", 0))] == [
        (11, 4), (12, 1), (13, 5), (14, 1),
    ]  # fmt: skip


def test_numbers_that_are_skipped_are_given_to_no_sample() -> None:
    stamp = Stamp(7, {0: Head(5, 100), 1: Head(0, 0)}, EventTime())
    assert stamp.skip(0, 3) == (6, 8)
    assert stamp.stamp(make_samples([0, 1]))["seq"].tolist() == [9, 1]
    assert (stamp.seq(0), stamp.seq(1)) == (9, 1)
