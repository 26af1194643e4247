"""Event time: never backwards, in the end the wall clock's, whatever the wall clock does."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import MS, SECOND
from gateway.event_time import STEP_NS, EventTime, wall_age_ms

HOUR = 3600 * SECOND
START = 1_700_000_000 * SECOND


class Clocks:
    """A monotonic clock and a wall clock that may drift and step."""

    def __init__(self) -> None:
        self.monotonic_ns = 1000 * SECOND
        self.wall_ns = START

    def pass_time(self, ns: int, drift_ppm: int = 0) -> None:
        self.monotonic_ns += ns
        self.wall_ns += ns + ns * drift_ppm // 1_000_000

    def event_time(self, not_before: int = 0) -> EventTime:
        return EventTime(not_before, lambda: self.monotonic_ns, lambda: self.wall_ns)


PASSING = st.tuples(st.just("pass"), st.integers(0, 10 * SECOND), st.integers(-500, 500))
STEPPING = st.tuples(st.just("step"), st.integers(-5 * HOUR, 5 * HOUR), st.just(0))
CHECKING = st.tuples(st.just("check"), st.just(0), st.just(0))
HISTORY = st.lists(st.one_of(PASSING, PASSING, CHECKING, STEPPING), max_size=40)


def play(clocks: Clocks, time: EventTime, what: str, ns: int, drift_ppm: int) -> None:
    if what == "pass":
        clocks.pass_time(ns, drift_ppm)
    elif what == "step":
        clocks.wall_ns += ns
    else:
        time.check()


@given(HISTORY)
def test_never_runs_backwards(history: list[tuple[str, int, int]]) -> None:
    clocks = Clocks()
    time = clocks.event_time()
    last = time.now()
    for event in history:
        play(clocks, time, *event)
        assert time.now() >= last
        last = time.now()


@given(HISTORY)
def test_is_the_wall_clock_once_that_has_caught_up(history: list[tuple[str, int, int]]) -> None:
    clocks = Clocks()
    time = clocks.event_time()
    for event in history:
        play(clocks, time, *event)
    time.check()
    ahead_ns = time.now() - clocks.wall_ns
    assert ahead_ns >= 0
    clocks.pass_time(2 * ahead_ns)
    time.check()
    assert abs(time.now() - clocks.wall_ns) <= 1


@given(HISTORY, st.integers(0, 24 * HOUR))
def test_never_falls_behind_the_wall_clock_however_rarely_it_is_checked(
    history: list[tuple[str, int, int]], idle_ns: int
) -> None:
    clocks = Clocks()
    time = clocks.event_time()
    for event in history:
        play(clocks, time, *event)
    time.check()
    clocks.pass_time(idle_ns)
    assert time.now() >= clocks.wall_ns


def test_gateway_that_idles_after_a_small_drift_back_stays_on_time() -> None:
    clocks = Clocks()
    time = clocks.event_time()
    clocks.pass_time(SECOND, drift_ppm=-1)
    time.check()
    clocks.pass_time(HOUR)
    assert time.now() - clocks.wall_ns < MS


@given(st.integers(STEP_NS + 1, 5 * HOUR), st.sampled_from([-1, 1]))
def test_step_is_told_once_with_its_size(size_ns: int, sign: int) -> None:
    clocks = Clocks()
    time = clocks.event_time()
    clocks.pass_time(SECOND)
    assert time.check() == 0
    clocks.wall_ns += sign * size_ns
    assert time.check() == sign * size_ns
    assert time.check() == 0


def test_drift_is_no_step_and_is_followed() -> None:
    clocks = Clocks()
    time = clocks.event_time()
    for _ in range(1000):
        clocks.pass_time(SECOND, drift_ppm=50)
        assert time.check() == 0
    assert time.now() == clocks.wall_ns > START + 1000 * SECOND


def test_step_forward_is_followed_at_once() -> None:
    clocks = Clocks()
    time = clocks.event_time()
    clocks.wall_ns += HOUR
    time.check()
    assert time.now() == START + HOUR


def test_step_back_slows_time_to_half_until_the_wall_clock_is_there() -> None:
    clocks = Clocks()
    time = clocks.event_time()
    clocks.wall_ns -= 10 * SECOND
    time.check()
    for passed_s in range(1, 20):
        clocks.pass_time(SECOND)
        assert time.now() == START + passed_s * SECOND // 2
        if passed_s % 3 == 0:
            time.check()
    clocks.pass_time(5 * SECOND)
    assert time.now() == clocks.wall_ns


@given(st.lists(st.integers(0, 100), min_size=2, max_size=20).map(sorted), st.integers(-HOUR, HOUR))
def test_order_and_spacing_of_samples_survive(offsets_ms: list[int], step_ns: int) -> None:
    clocks = Clocks()
    time = clocks.event_time()
    clocks.wall_ns += step_ns
    time.check()
    at = np.array([clocks.monotonic_ns + offset * MS for offset in offsets_ms])
    gaps = np.diff(time.of(at))
    assert (gaps >= np.diff(at) // 2).all()
    assert (gaps <= np.diff(at)).all()


class Busy:
    """Clocks of a process that loses the CPU for ``away_ns`` after some readings of either clock."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.away_ns: list[int] = []
        self.stepped_ns = 0

    def monotonic(self) -> int:
        return self._passing()

    def wall(self) -> int:
        return START + self.stepped_ns + self._passing()

    def _passing(self) -> int:
        at = self.now_ns
        self.now_ns += self.away_ns.pop(0) if self.away_ns else 1000
        return at


@given(st.lists(st.sampled_from([1000, 200 * MS, SECOND]), max_size=40), st.integers(1, 20))
def test_process_that_loses_the_cpu_between_the_clocks_sees_no_step(away_ns: list[int], checks: int) -> None:
    clocks = Busy()
    time = EventTime(0, clocks.monotonic, clocks.wall)
    clocks.away_ns = list(away_ns)
    last = time.now()
    for _ in range(checks):
        assert time.check() == 0
        assert time.now() >= last
        last = time.now()


def test_step_is_seen_in_spite_of_a_busy_cpu_with_its_size() -> None:
    clocks = Busy()
    time = EventTime(0, clocks.monotonic, clocks.wall)
    clocks.stepped_ns = SECOND
    clocks.away_ns = [200 * MS, 1000, 1000, 1000, 200 * MS]
    assert abs(time.check() - SECOND) < MS
    clocks.stepped_ns = 2 * SECOND
    clocks.away_ns = [200 * MS] * 12
    assert time.check() == 0  # no reading says anything
    assert abs(time.check() - SECOND) < MS


def test_goes_on_behind_the_run_before() -> None:
    clocks = Clocks()
    time = clocks.event_time(not_before=START + HOUR)
    assert time.now() == START + HOUR
    clocks.pass_time(2 * HOUR)
    time.check()
    assert time.now() == clocks.wall_ns


def test_age_is_negative_for_what_lies_in_the_future() -> None:
    assert wall_age_ms(START, START + 5 * MS) == 5
    assert wall_age_ms(START + 5 * MS, START) == -5
