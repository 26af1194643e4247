"""The recorder of one bus: the order of the wire, event times, and what went past it."""

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from drivers.clock import MS, SECOND, epoch_ns, monotonic_ns
from drivers.traffic import Mark, Traffic
from gateway.recordings.bus_file import BusFile, Writer
from gateway.recordings.bus_log import BusRecorder
from gateway.tap import Listener, Tap
from tests.gateway_parts import DEADLINE_S, wait_for
from tests.unit.test_tap import Silent


class Rig:
    """A recorder in a thread of its own, and the bus that it records."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "traffic.serial"
        self.listener = Listener(directory / "taps" / "serial0")
        self.tap = Tap(directory / "taps" / "serial0")
        self.bus = Silent()

    def begin(self) -> None:
        self.writer = Writer(self.path, "serial", "serial0")
        self.recorder = BusRecorder(self.listener, self.writer)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.recorder.run, args=(self._stop,))
        self._thread.start()

    def end(self) -> list[Traffic]:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self.writer.close()
        return list(BusFile(self.path))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    with made.listener, closing(made.tap):
        made.tap.attach(made.bus)
        yield made


def test_units_are_written_in_the_order_of_the_wire(rig: Rig) -> None:
    """A frame is read, and so told, after a later one was sent."""
    now = monotonic_ns()
    rig.begin()
    for number in (0, 2, 1, 5, 4, 3):
        rig.bus.tell(Traffic(now + number * MS, 0, 0, bytes((number,))))
        rig.tap.flush()
    assert [unit.data[0] for unit in rig.end()] == [0, 1, 2, 3, 4, 5]


def test_times_are_those_of_the_wall_clock_with_their_distances_kept(rig: Rig) -> None:
    wall, now = epoch_ns(), monotonic_ns()
    rig.begin()
    rig.bus.tell(*(Traffic(now + number, Mark.SENT, 0, b"\0") for number in (0, 7, 1000)))
    rig.tap.flush()
    units = rig.end()
    assert [unit.at_ns - units[0].at_ns for unit in units] == [0, 7, 1000]
    assert abs(units[0].at_ns - wall) < SECOND


def test_what_went_past_the_recorder_is_noted_where_it_was(rig: Rig) -> None:
    for number in range(50_000):  # more than is kept for a recorder that does not read
        rig.bus.tell(Traffic(number, 0, 0, bytes(100)))
    rig.tap.flush()
    rig.begin()
    wait_for(lambda: rig.listener.missed > 0)
    rig.tap.flush()
    units = rig.end()
    assert units
    assert f"# {rig.listener.missed} units went past the recorder before this\n" in rig.path.read_text()
