"""The tap on a bus: what the worker hands over, what it keeps back, and what it never waits for."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.bus import Bus, Received
from drivers.clock import MonotonicNs
from drivers.traffic import Mark, Traffic
from gateway.tap import Listener, Tap, TapError
from tests.gateway_parts import wait_for

RECORDER = """\
import pathlib, signal, sys
from gateway.tap import Listener
with Listener(pathlib.Path(sys.argv[1])):
    signal.pause()
"""
UNITS = st.builds(
    Traffic,
    st.integers(0, 2**62),
    st.integers(0, 127),
    st.integers(0, 2**29 - 1),
    st.binary(max_size=4096),
    st.integers(0, 15),
)


class Silent(Bus[bytes]):
    """A bus whose traffic is what a test tells its tap."""

    def send(self, units: Sequence[bytes], deadline: MonotonicNs) -> None:
        raise NotImplementedError

    def receive(self, deadline: MonotonicNs) -> Received[bytes] | None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def tell(self, *units: Traffic) -> None:
        for unit in units:
            if self.tap:
                self.tap(unit)


def numbered(count: int, size: int = 100) -> list[Traffic]:
    return [Traffic(number, Mark.SENT, number, bytes(size)) for number in range(count)]


def hear_all(listener: Listener) -> list[Traffic]:
    heard: list[Traffic] = []
    while units := listener.receive(MonotonicNs(0)):
        heard += units
    return heard


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "taps" / "can0"


@pytest.fixture
def listener(place: Path) -> Iterator[Listener]:
    with Listener(place) as open_one:
        yield open_one


Tapped = Callable[[Path | None], tuple[Silent, Tap]]


@pytest.fixture
def tapped() -> Iterator[Tapped]:
    """A bus with a tap that looks for its recorder there."""
    with ExitStack() as stack:

        def make(place: Path | None) -> tuple[Silent, Tap]:
            bus, tap = Silent(), Tap(place)
            stack.callback(tap.close)
            tap.attach(bus)
            return bus, tap

        yield make


@given(units=st.lists(UNITS, min_size=1, max_size=30))
def test_every_unit_arrives_as_it_was_and_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, units: list[Traffic]
) -> None:
    place = tmp_path_factory.mktemp("state") / "taps" / "can0"
    with Listener(place) as listener, closing(Tap(place)) as tap:
        bus = Silent()
        tap.attach(bus)
        bus.tell(*units)
        tap.flush()
        assert hear_all(listener) == units
        assert listener.missed == 0


@pytest.mark.parametrize("place", [None, Path("/nonexistent/taps/can0")])
def test_without_a_recorder_the_bus_has_no_tap(tapped: Tapped, place: Path | None) -> None:
    bus, tap = tapped(place)
    tap.look()
    tap.flush()
    assert bus.tap is None


def test_recorder_that_comes_later_is_found_and_hears_from_then_on(tapped: Tapped, place: Path) -> None:
    bus, tap = tapped(place)
    bus.tell(*numbered(5))
    with Listener(place) as listener:
        tap.look()
        bus.tell(*numbered(3))
        tap.flush()
        assert hear_all(listener) == numbered(3)
        assert (listener.workers, listener.missed) == (1, 0)


def test_recorder_that_reads_nothing_delays_nobody_and_learns_how_many_units_it_missed(
    tapped: Tapped, place: Path, listener: Listener
) -> None:
    bus, tap = tapped(place)
    told = numbered(100_000)
    for unit in told:
        bus.tell(unit)
        tap.flush()  # returns, though nobody reads
    heard: list[Traffic] = []
    while units := hear_all(listener):
        heard += units
        tap.flush()
    assert listener.missed > 0
    assert len(heard) + listener.missed == len(told)
    assert heard == sorted(heard)  # the order is whole, and nothing came twice
    assert (heard[0], heard[-1]) == (told[0], told[-1])


def test_backlog_is_bounded_whatever_is_told(tapped: Tapped, place: Path, listener: Listener) -> None:
    bus, tap = tapped(place)
    bus.tell(*numbered(100_000))
    assert sum(map(len, tap._waiting)) + len(tap._open) < 2 << 20


def test_recorder_that_is_gone_is_let_go_and_the_next_begins_with_a_clean_count(tapped: Tapped, place: Path) -> None:
    with Listener(place):
        bus, tap = tapped(place)
        bus.tell(*numbered(4))
    tap.flush()
    assert bus.tap is None
    with Listener(place) as again:
        tap.look()
        bus.tell(*numbered(2))
        tap.flush()
        assert hear_all(again) == numbered(2)
        assert again.missed == 0


def test_bus_that_is_opened_anew_is_heard_in_the_same_count(tapped: Tapped, place: Path, listener: Listener) -> None:
    first, tap = tapped(place)
    first.tell(*numbered(2))
    second = Silent()
    tap.attach(second)
    second.tell(*numbered(2))
    tap.flush()
    assert hear_all(listener) == numbered(2) * 2
    assert (listener.workers, listener.missed) == (1, 0)


def test_new_worker_is_counted_and_its_units_are_none_that_were_missed(
    tapped: Tapped, place: Path, listener: Listener
) -> None:
    for _ in range(2):
        bus, tap = tapped(place)
        bus.tell(*numbered(3))
        tap.flush()
        assert hear_all(listener) == numbered(3)
    assert (listener.workers, listener.missed) == (2, 0)


def test_bus_has_one_recorder_and_the_second_is_refused(place: Path, listener: Listener) -> None:
    with pytest.raises(TapError, match="another recorder has this bus"), Listener(place):
        pass
    assert place.exists()


def test_socket_that_a_killed_recorder_left_is_taken_over(tapped: Tapped, place: Path) -> None:
    place.parent.mkdir()
    process = subprocess.Popen([sys.executable, "-c", RECORDER, place])
    try:
        wait_for(place.exists)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    bus, tap = tapped(place)
    assert bus.tap is None
    with Listener(place) as listener:
        tap.look()
        bus.tell(*numbered(1))
        tap.flush()
        assert hear_all(listener) == numbered(1)


def test_place_may_have_a_longer_path_than_a_socket_address(tapped: Tapped, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120) / "taps" / "can0"
    deep.parent.parent.mkdir()
    with Listener(deep) as listener:
        bus, tap = tapped(deep)
        bus.tell(*numbered(1))
        tap.flush()
        assert hear_all(listener) == numbered(1)
