"""Raw traffic on vcan: what a replay may open there, and that candump sees the same frames as the tap."""

from pathlib import Path

import pytest

from drivers.bus import Bus
from drivers.buses import CanSpec
from drivers.buses.can import CanBus
from drivers.clock import MS, SECOND, after, epoch_ns, monotonic_ns
from drivers.family import CanFrame
from drivers.traffic import Mark, Traffic
from gateway.recordings.bus_file import BusFile
from gateway.recordings.bus_replay import Player
from gateway.recordings.pace import Pace
from gateway.recordings.vcan import link_kind
from gateway.recordings.virtual_bus import NotVirtual, open_virtual
from tests.socketcan.links import candump, ip, read_candump, wait_until_heard

RECORDED = """\
(1436509052.000000) can0 123#0102
(1436509052.010000) can0 00000123#03
(1436509052.020000) can0 7FF#R4
(1436509052.030000) can0 20000004#0020000000000000
(1436509052.040000) can0 124#
"""


def test_candump_sees_what_is_played_onto_a_vcan(channel: str, tmp_path: Path) -> None:
    path, log = tmp_path / "recorded.log", tmp_path / "seen.log"
    path.write_text(RECORDED)
    with candump(channel, log):
        with open_virtual("can", f"socketcan:{channel}") as bus:
            Player(BusFile(path), bus, Pace()).run()
        wait_until_heard(channel, log)
    units = [unit for unit in BusFile(log) if unit.can_id != 0x7EE]
    recorded = [unit for unit in BusFile(path) if not unit.marks & Mark.ERROR]  # which candump does not ask for
    kind = Mark.EXTENDED | Mark.REMOTE | Mark.ERROR
    assert [(unit.marks & kind, unit.can_id, unit.data, unit.dlc) for unit in units] == [
        (unit.marks & kind, unit.can_id, unit.data, unit.dlc) for unit in recorded
    ]


def test_only_the_kernels_word_makes_a_vcan_whatever_it_is_called(channel: str) -> None:
    assert link_kind(channel) == "vcan"
    ip("link", "set", channel, "down")
    ip("link", "set", channel, "name", "can77")
    try:
        assert (link_kind(channel), link_kind("can77")) == (None, "vcan")
        with pytest.raises(NotVirtual, match="there is no such link"):
            open_virtual("can", f"socketcan:{channel}")
        open_virtual("can", "socketcan:can77").close()
    finally:
        ip("link", "delete", "can77")


def test_tap_tells_the_frames_that_candump_saw_at_the_kernels_times(channel: str, tmp_path: Path) -> None:
    log = tmp_path / "seen.log"
    told: list[Traffic] = []
    bus: Bus[CanFrame] = CanBus(CanSpec("can0", "socketcan", channel, 1_000_000))
    other = CanBus(CanSpec("can0", "socketcan", channel, 1_000_000))
    with candump(channel, log):
        while bus.receive(after(monotonic_ns(), 100 * MS)):
            pass
        bus.tap = told.append
        offset_ns = epoch_ns() - monotonic_ns()
        for number in range(50):
            (bus if number % 2 else other).send([CanFrame(number, bytes((number,)))], after(monotonic_ns(), SECOND))
        while bus.receive(after(monotonic_ns(), 100 * MS)):
            pass
        wait_until_heard(channel, log)
    bus.close()
    other.close()
    seen = read_candump(log)
    in_order = sorted(told, key=lambda unit: unit.at_ns)
    assert [CanFrame(unit.can_id, unit.data) for unit in in_order] == [passed.frame for passed in seen]
    heard = [(unit, passed) for unit, passed in zip(in_order, seen, strict=True) if not unit.marks & Mark.SENT]
    assert max(abs(unit.at_ns + offset_ns - passed.at_ns) for unit, passed in heard) < 5 * MS
