"""Playing files of raw traffic: onto virtual buses, in their order, and onto nothing else."""

import os
import select
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import can
import pytest
import serial

from drivers.buses import CanSpec
from drivers.buses.can import CanBus
from drivers.clock import MS, SECOND, after, monotonic_ns, sleep_until
from drivers.traffic import Mark, Traffic
from gateway.recordings.bus_file import BusFile, BusFileError, Writer
from gateway.recordings.bus_replay import Player
from gateway.recordings.pace import Pace
from gateway.recordings.vcan import link_kind
from gateway.recordings.virtual_bus import CanChannel, NotVirtual, VirtualBus, open_virtual
from tests.gateway_parts import DEADLINE_S, wait_for

AT_NS = 1_763_740_000 * SECOND
MAX = None
_channels = count()


def frame(number: int, marks: int = 0, at_ns: int = AT_NS) -> Traffic:
    return Traffic(at_ns + number * MS, marks, number, bytes((number,)), 1)


def write(path: Path, units: list[Traffic]) -> Path:
    writer = Writer(path, "serial" if path.suffix == ".serial" else "can", "can0")
    for unit in units:
        writer.write(unit)
    writer.close()
    return path


class Kept(VirtualBus):
    """A bus that keeps what is put onto it."""

    where = "memory"

    def __init__(self) -> None:
        self.units: list[Traffic] = []
        self.room = 10**9
        self.served: Callable[[int], None] = lambda _: None

    def put(self, unit: Traffic) -> bool:
        if len(self.units) < self.room:
            self.units.append(unit)
            return True
        return False

    def serve(self, deadline: int) -> None:
        self.served(deadline)
        sleep_until(deadline)

    def close(self) -> None:
        return


@pytest.fixture
def playing() -> Iterator[Callable[[Player], threading.Thread]]:
    """Runs players in threads of their own, and ends them."""
    players: list[tuple[Player, threading.Thread]] = []

    def start(player: Player) -> threading.Thread:
        thread = threading.Thread(target=player.run)
        players.append((player, thread))
        thread.start()
        return thread

    yield start
    for player, thread in players:
        player.stop()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def play(path: Path, **choices: object) -> Player:
    """All of it at once, onto a bus that keeps it."""
    player = Player(BusFile(path), Kept(), Pace(MAX), **choices)  # type: ignore[arg-type]
    player.run()
    return player


def ids(player: Player) -> list[int]:
    assert isinstance(player._bus, Kept)
    return [unit.can_id for unit in player._bus.units]


# --- what is played ---------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "traffic.log", [frame(number, number % 2) for number in range(10)])


def test_everything_is_played_in_its_order(path: Path) -> None:
    player = play(path)
    assert ids(player) == list(range(10))
    assert (player.played, player.lost, player.left_out) == (10, 0, 0)


def test_span_is_from_a_moment_to_before_another(path: Path) -> None:
    assert ids(play(path, start=lambda first: first + 3 * MS, end=lambda first: first + 6 * MS)) == [3, 4, 5]
    assert ids(play(path, start=lambda _: AT_NS + 8 * MS)) == [8, 9]


def test_only_what_was_sent_or_heard(path: Path) -> None:
    assert ids(play(path, way=1)) == [1, 3, 5, 7, 9]
    assert ids(play(path, way=0)) == [0, 2, 4, 6, 8]


def test_frames_that_no_wire_carries_are_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "odd.log"
    path.write_text("(1.0) can0 001#\n(1.1) can0 FFF#\n(1.2) can0 002#112233445566778899\n(1.3) can0 003#\n")
    player = play(path)
    assert ids(player) == [1, 3]
    assert (player.left_out, player.first_left_out) == (2, "FFF: identifier 0xfff is too large")


def test_frame_that_finds_no_room_is_lost_and_counted_and_those_behind_it_keep_their_time(path: Path) -> None:
    bus = Kept()
    bus.room = 4
    player = Player(BusFile(path), bus, Pace(1000.0))
    player.run()
    assert (player.played, player.lost) == (4, 6)


def test_as_fast_as_can_be_a_slow_bus_is_waited_for(path: Path) -> None:
    bus = Kept()
    bus.room = 0

    def make_room(_: int) -> None:
        bus.room += 1

    bus.served = make_room
    player = Player(BusFile(path), bus, Pace(MAX))
    player.run()
    assert (player.played, player.lost) == (10, 0)


# --- when it is played ------------------------------------------------------------------------------------------------


class Due(Pace):
    """A pace that notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__(1000.0)
        self.asked: list[int] = []

    def due(self, at_ns: int) -> int:  # type: ignore[override]
        if at_ns not in self.asked:
            self.asked.append(at_ns)
        return super().due(at_ns)


def test_times_between_frames_are_those_of_the_recording(path: Path) -> None:
    pace = Due()
    Player(BusFile(path), Kept(), pace).run()
    assert pace.asked == [AT_NS + number * MS for number in range(10)]


class Timed(Kept):
    """It notes when each unit is put onto it."""

    def __init__(self) -> None:
        super().__init__()
        self.at_ns: list[int] = []

    def put(self, unit: Traffic) -> bool:
        self.at_ns.append(monotonic_ns())
        return super().put(unit)


def test_no_frame_is_before_its_time(path: Path) -> None:
    bus, pace = Timed(), Pace(0.5)
    Player(BusFile(path), bus, pace).run()
    due = [pace.due(AT_NS + number * MS) for number in range(10)]
    assert due == [due[0] + 2 * MS * number for number in range(10)]
    assert all(at_ns >= due_ns for at_ns, due_ns in zip(bus.at_ns, due, strict=True))


def test_file_whose_times_begin_again_goes_on_without_a_rush_or_a_wait(tmp_path: Path) -> None:
    units = [frame(number) for number in range(3)] + [frame(number, at_ns=AT_NS - 3600 * SECOND) for number in range(3)]
    path = tmp_path / "two.log"
    path.write_text("".join(f"({unit.at_ns / SECOND:.3f}) can0 {unit.can_id:03X}#\n" for unit in units))
    pace = Due()
    Player(BusFile(path), Kept(), pace).run()
    assert pace.asked == [AT_NS + number * MS for number in (0, 1, 2, 3, 4)]


def test_pause_holds_every_frame_back_until_it_ends(path: Path, playing: Callable[[Player], threading.Thread]) -> None:
    bus, pace = Kept(), Pace(1.0)
    looks: list[int] = []
    bus.served = looks.append
    pace.toggle()
    player = Player(BusFile(path), bus, pace)
    thread = playing(player)
    wait_for(lambda: len(looks) > 20)
    assert bus.units == []
    pace.toggle()
    thread.join(DEADLINE_S)
    assert len(bus.units) == 10


def test_broken_file_is_told_before_anybody_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "foreign.log"
    path.write_text("no candump\n")
    with open_virtual("can") as bus, pytest.raises(BusFileError, match="line 1: must be as candump"):
        Player(BusFile(path), bus, Pace(MAX)).run()


# --- where it is played -----------------------------------------------------------------------------------------------


def test_slcan_terminal_begins_when_its_channel_is_opened_and_loses_nothing(
    tmp_path: Path, playing: Callable[[Player], threading.Thread]
) -> None:
    path = write(tmp_path / "long.log", [frame(number % 256, at_ns=AT_NS + number * SECOND) for number in range(2000)])
    link = tmp_path / "can0"
    with open_virtual("can", None, link) as bus:
        thread = playing(Player(BusFile(path), bus, Pace(MAX)))
        client = CanBus(CanSpec("can0", "slcan", str(link), 1_000_000, {"sleep_after_open": 0}))
        try:
            heard: list[int] = []
            while len(heard) < 2000:
                received = client.receive(after(monotonic_ns(), DEADLINE_S * SECOND))
                assert received, len(heard)
                heard.append(received.unit.can_id)
            thread.join(DEADLINE_S)
        finally:
            client.close()
        assert heard == [number % 256 for number in range(2000)]
    assert not link.is_symlink()


def test_serial_terminal_begins_when_it_is_opened_and_loses_nothing(
    tmp_path: Path, playing: Callable[[Player], threading.Thread]
) -> None:
    units = [Traffic(AT_NS + number, number % 2, 0, bytes(range(256))) for number in range(100)]
    path = write(tmp_path / "traffic.serial", units)
    with open_virtual("serial", None, tmp_path / "serial0") as bus:
        thread = playing(Player(BusFile(path), bus, Pace(MAX)))
        with serial.Serial(str(tmp_path / "serial0"), 1_000_000, timeout=DEADLINE_S) as port:
            assert port.read(100 * 256) == bytes(range(256)) * 100
        thread.join(DEADLINE_S)


def test_program_that_knows_nothing_of_terminals_reads_the_bytes_as_they_are(
    tmp_path: Path, playing: Callable[[Player], threading.Thread]
) -> None:
    path = write(tmp_path / "traffic.serial", [Traffic(AT_NS, 0, 0, b"\x03\x04\x0d\x11\xff")])
    with open_virtual("serial", None, tmp_path / "serial0") as bus:
        thread = playing(Player(BusFile(path), bus, Pace(MAX)))
        fd = os.open(tmp_path / "serial0", os.O_RDONLY | os.O_NOCTTY)
        try:
            assert select.select([fd], [], [], DEADLINE_S)[0]
            assert os.read(fd, 100) == b"\x03\x04\x0d\x11\xff"
            thread.join(DEADLINE_S)
        finally:
            os.close(fd)


def test_python_can_on_a_virtual_channel_hears_every_kind_of_frame(tmp_path: Path) -> None:
    kinds = [0, Mark.EXTENDED, Mark.REMOTE, Mark.FD | Mark.BRS]
    units = [Traffic(AT_NS, int(marks), 1, b"" if marks & Mark.REMOTE else b"\1", 1) for marks in kinds]
    path = write(tmp_path / "traffic.asc", units)
    where = f"virtual:replay{next(_channels)}"
    with open_virtual("can", where) as bus, can.Bus(interface="virtual", channel=where[8:]) as listener:
        Player(BusFile(path), bus, Pace(MAX)).run()
        heard = [listener.recv(DEADLINE_S) for _ in units]
        listener.send(can.Message())
        bus.serve(0)  # what others send is taken, and heeded by nobody
        assert isinstance(bus, CanChannel)
        assert bus._bus.recv(0) is None
    assert [message and (message.is_extended_id, message.is_remote_frame, message.is_fd) for message in heard] == [
        (False, False, False), (True, False, False), (False, True, False), (False, False, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("medium", "where", "told"),
    [
        ("can", "slcan:/dev/ttyACM0", "opens no physical bus; frames are played onto virtual:CHANNEL"),
        ("can", "pcan:PCAN_USBBUS1", "opens no physical bus"),
        ("can", "gs_usb:0", "opens no physical bus"),
        ("can", "serial:/dev/ttyUSB0", "opens no physical bus"),
        ("can", "can0", "opens no physical bus"),
        ("can", "virtual:", "opens no physical bus"),
        ("can", "socketcan:lo", "the kernel says that it is a physical link; a replay opens a vcan only"),
        ("can", "socketcan:nosuchlink", "there is no such link; a replay opens a vcan only"),
        ("can", f"socketcan:{'vcan' * 10}", "there is no such link"),
        ("serial", "/dev/ttyUSB0", "opens no physical bus; bytes are played onto a pseudo-terminal"),
        ("serial", "virtual:can0", "bytes are played onto a pseudo-terminal"),
    ],
)
def test_whatever_could_lead_to_a_motor_is_refused(medium: str, where: str, told: str) -> None:
    with pytest.raises(NotVirtual, match=told):
        open_virtual(medium, where)  # type: ignore[arg-type]


def test_link_leads_nowhere_else_than_where_nothing_was(tmp_path: Path) -> None:
    (tmp_path / "ttyUSB0").write_text("a device, or a file")
    with pytest.raises(FileExistsError):
        open_virtual("serial", None, tmp_path / "ttyUSB0")


def test_kernel_tells_the_kind_of_a_link() -> None:
    assert link_kind("lo") == ""
    assert link_kind("nosuchlink") is None
    assert link_kind("more than 15 characters") is None
