"""Whatever is seen of a course of values in few bins: none of its extremes is lost, and none is made up."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gateway.recordings.envelope import Envelope, column_of

VALUES = st.lists(st.tuples(st.integers(0, 10**12), st.floats(-1e6, 1e6)), min_size=1, max_size=300)


@given(values=VALUES, most=st.integers(2, 40), pieces=st.integers(1, 7))
def test_lowest_and_highest_survive_in_as_few_bins_as_asked_for(
    values: list[tuple[int, float]], most: int, pieces: int
) -> None:
    envelope = Envelope(1, most)
    at_ns = np.array([at for at, _ in values])
    course = np.array([[value] for _, value in values])
    for some in np.array_split(np.arange(len(values)), min(pieces, len(values))):
        envelope.add(at_ns[some], course[some])
    assert 1 <= len(envelope.at_ns) <= most
    assert (np.diff(envelope.at_ns) >= envelope.width_ns).all()
    for at, low, high in zip(envelope.at_ns, envelope.low[:, 0], envelope.high[:, 0], strict=True):
        inside = course[abs(at_ns - at) <= envelope.width_ns // 2, 0]
        assert inside.min() <= low <= high <= inside.max()
    lows, highs = envelope.columns(int(at_ns.min()), int(at_ns.max()) + 1, 5)
    for extreme in (envelope.low.min(), np.nanmin(lows)):
        assert extreme == course.min()
    for extreme in (envelope.high.max(), np.nanmax(highs)):
        assert extreme == course.max()


def test_one_late_sample_in_a_million_is_seen_in_its_place() -> None:
    envelope = Envelope(1)
    at_ns = 1_790_000_000_000_000_000 + 5_000_000 * np.arange(1_000_000)
    course = np.zeros((1_000_000, 1))
    course[654_321] = 1
    for first in range(0, len(at_ns), 10_000):
        envelope.add(at_ns[first : first + 10_000], course[first : first + 10_000])
    spikes = envelope.at_ns[envelope.high[:, 0] == 1]
    assert abs(spikes - at_ns[654_321]).tolist() == [abs(int(spikes[0]) - int(at_ns[654_321]))]
    assert abs(spikes[0] - at_ns[654_321]) <= envelope.width_ns // 2
    assert envelope.width_ns < (at_ns[-1] - at_ns[0]) / 1024


def test_nan_is_no_value() -> None:
    envelope = Envelope(2, most=1)
    envelope.add(np.array([1, 2, 3]), np.array([[np.nan, np.nan], [5, np.nan], [np.nan, np.nan]]))
    assert (envelope.low[0, 0], envelope.high[0, 0]) == (5, 5)
    assert np.isnan(envelope.low[0, 1])


def test_columns_cover_the_span_evenly_and_a_century_too() -> None:
    begin, end = 0, 100 * 365 * 86_400 * 10**9
    times = np.linspace(begin, end, 1001).astype(np.int64)
    assert np.bincount(column_of(times, begin, end, 10)).tolist() == [100] * 9 + [101]
