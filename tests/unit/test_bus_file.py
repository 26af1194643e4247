"""Files of raw bus traffic: what is written is read again, what others wrote too, and what is broken is told."""

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import can
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import MS, SECOND
from drivers.traffic import Mark, Traffic, from_message
from gateway.recordings.bus_file import BusFile, BusFileError, Writer, fault, to_message

AT_NS = 1_763_740_000 * SECOND
SERIAL_HEAD = "# bytes of serial bus serial0: seconds since 1970 UTC, > sent or < heard, hexadecimal\n"

DATA = st.binary(max_size=8)
IDS = st.one_of(
    st.tuples(st.just(0), st.integers(0, 0x7FF)), st.tuples(st.just(int(Mark.EXTENDED)), st.integers(0, 2**29 - 1))
)


@st.composite
def frames(draw: st.DrawFn) -> Traffic:
    """A data frame as a tap tells it."""
    extended, can_id = draw(IDS)
    data = draw(DATA)
    sent = draw(st.sampled_from((0, int(Mark.SENT))))
    return Traffic(AT_NS + draw(st.integers(0, 10**6)) * MS, extended | sent, can_id, data, len(data))


def frame(number: int, at_ns: int = AT_NS) -> Traffic:
    return Traffic(at_ns + number * MS, 0, number % 0x800, number.to_bytes(8, "big"), 8)


def write(path: Path, units: list[Traffic]) -> Path:
    writer = Writer(
        path, "serial" if path.suffix == ".serial" else "can", "serial0" if path.suffix == ".serial" else "can0"
    )
    for unit in units:
        writer.write(unit)
    writer.close()
    return path


def near(units: list[Traffic]) -> list[Traffic]:
    """With times in microseconds, which is what the formats of python-can keep."""
    return [unit._replace(at_ns=round(unit.at_ns / 1000)) for unit in units]


# --- what is written is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".log", ".asc", ".blf"])
@given(units=st.lists(frames(), min_size=1, max_size=20))
def test_frames_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, units: list[Traffic]
) -> None:
    units.sort(key=lambda unit: unit.at_ns)
    path = write(tmp_path_factory.mktemp("bus") / f"traffic{suffix}", units)
    assert near(list(BusFile(path))) == near(units)


@given(
    units=st.lists(
        st.builds(
            Traffic, st.integers(0, 2**62), st.sampled_from((0, 1)), st.just(0), st.binary(min_size=1), st.just(0)
        ),
        min_size=1,
    )
)
def test_bytes_are_read_as_they_were_written_to_the_nanosecond(
    tmp_path_factory: pytest.TempPathFactory, units: list[Traffic]
) -> None:
    path = write(tmp_path_factory.mktemp("bus") / "traffic.serial", units)
    assert list(BusFile(path)) == units


def test_serial_form_is_text_for_people(tmp_path: Path) -> None:
    sent, heard = Traffic(AT_NS + 5, Mark.SENT, 0, b"\xff\xff\x01"), Traffic(AT_NS + SECOND, 0, 0, b"\x00\x9a")
    path = write(tmp_path / "traffic.serial", [sent, heard])
    assert path.read_text() == SERIAL_HEAD + "1763740000.000000005 > FFFF01\n1763740001.000000000 < 009A\n"


@given(unit=frames())
def test_frame_is_the_same_by_way_of_python_can(unit: Traffic) -> None:
    assert from_message(to_message(unit), unit.at_ns) == unit


@pytest.mark.parametrize(
    "unit",
    [
        Traffic(AT_NS, Mark.REMOTE, 0x123, b"", 4),
        Traffic(AT_NS, Mark.FD | Mark.BRS, 0x123, bytes(64), 64),
        Traffic(AT_NS, Mark.FD | Mark.ESI | Mark.EXTENDED, 0x123, bytes(12), 12),
        Traffic(AT_NS, Mark.ERROR, 0x40, bytes(8), 8),
    ],
)
@pytest.mark.parametrize("suffix", [".log", ".asc", ".blf"])
def test_other_frames_keep_their_kind(tmp_path: Path, suffix: str, unit: Traffic) -> None:
    kind = Mark.REMOTE | Mark.FD | Mark.ERROR
    (read,) = BusFile(write(tmp_path / f"traffic{suffix}", [unit]))
    assert read.marks & kind == unit.marks & kind
    assert read.data == unit.data or unit.marks & Mark.ERROR


def test_note_is_in_the_file_and_is_no_traffic(tmp_path: Path) -> None:
    for suffix, medium in ((".log", "can"), (".asc", "can"), (".blf", "can"), (".serial", "serial")):
        writer = Writer(tmp_path / f"traffic{suffix}", medium, "bus")  # type: ignore[arg-type]
        writer.write(frame(1))
        writer.note("7 units went past", AT_NS)
        writer.write(frame(2))
        writer.close()
        read = BusFile(tmp_path / f"traffic{suffix}")
        assert len(list(read)) == 2
        assert read.broken == 0


def test_what_was_flushed_can_be_read_before_the_file_is_closed(tmp_path: Path) -> None:
    for suffix, medium in ((".log", "can"), (".asc", "can"), (".serial", "serial")):
        writer = Writer(tmp_path / f"traffic{suffix}", medium, "bus")  # type: ignore[arg-type]
        writer.write(frame(1))
        writer.flush()
        assert len(list(BusFile(tmp_path / f"traffic{suffix}"))) == 1
        writer.close()


@pytest.mark.parametrize(
    ("name", "medium", "told"),
    [
        ("traffic.serial", "can", "is a can bus; the file must end in .log or .asc or .blf or .mf4"),
        ("traffic.log", "serial", "is a serial bus; the file must end in .serial"),
        ("traffic.txt", "can", "must end in .log"),
        ("traffic.mf4", "can", "pip install asammdf"),
    ],
)
def test_file_that_cannot_be_written_is_refused_with_what_would_be_right(
    tmp_path: Path, name: str, medium: str, told: str
) -> None:
    with pytest.raises(BusFileError, match=told):
        Writer(tmp_path / name, medium, "bus1")  # type: ignore[arg-type]


def test_recording_never_overwrites(tmp_path: Path) -> None:
    path = write(tmp_path / "traffic.log", [frame(1)])
    before = path.read_bytes()
    with pytest.raises(BusFileError, match="exists already"):
        write(path, [frame(2)])
    assert path.read_bytes() == before


# --- what others wrote ------------------------------------------------------------------------------------------------

CANDUMP = [  # as can-utils' lib.c (sprint_canframe) writes them
    ("(1436509052.249713) vcan0 044#2A366C2BBA", 0, 0x44, "2A366C2BBA", 5),
    ("(1436509052.249713) vcan0 00000044#2A R", Mark.EXTENDED, 0x44, "2A", 1),
    ("(1436509052.249713) can1 7FF# T", Mark.SENT, 0x7FF, "", 0),
    ("(1436509052.249713) can1 123#R", Mark.REMOTE, 0x123, "", 0),
    ("(1436509052.249713) can1 123#R5", Mark.REMOTE, 0x123, "", 5),
    ("(1436509052.249713) can1 123##311223344", Mark.FD | Mark.BRS | Mark.ESI, 0x123, "11223344", 4),
    ("(1436509052.249713) can1 123#1122334455667788_E", 0, 0x123, "1122334455667788", 8),
    ("(1436509052.249713) can1 20000004#0020000000006000", Mark.ERROR, 0x4, "0020000000006000", 8),
]


@pytest.mark.parametrize(("line", "marks", "can_id", "data", "dlc"), CANDUMP)
def test_lines_of_candump(tmp_path: Path, line: str, marks: int, can_id: int, data: str, dlc: int) -> None:
    path = tmp_path / "candump-2015-07-10.log"
    path.write_text(line + "\n")
    read = BusFile(path)
    expected = Traffic(1436509052 * SECOND + 249_713_000, int(marks), can_id, bytes.fromhex(data), dlc)
    assert list(read) == [expected]
    assert read.channels == {line.split()[1]}


@pytest.mark.skipif(not shutil.which("log2asc"), reason="can-utils is not installed")
def test_asc_that_can_utils_made_of_our_recording_holds_the_same_frames(tmp_path: Path) -> None:
    units = [frame(number) for number in range(100)]
    path = write(tmp_path / "traffic.log", units)
    made = tmp_path / "traffic.asc"
    subprocess.run(["log2asc", "-I", path, "-O", made, "can0"], check=True)
    read = list(BusFile(made))
    assert [(unit.can_id, unit.data) for unit in read] == [(unit.can_id, unit.data) for unit in units]
    assert {later.at_ns - earlier.at_ns for earlier, later in pairwise(near(read))} == {1000}


def test_asc_of_vector_in_german_is_read_and_one_with_an_unknown_date_counts_from_0(tmp_path: Path) -> None:
    for date, known in (("Mit Okt 1 10:00:00.000 2025", True), ("Mi okt. 1 10.00 2025", False)):
        path = tmp_path / f"{known}.asc"
        text = f"date {date}\nbase hex  timestamps absolute\nno internal events logged\nBegin Triggerblock {date}\n"
        path.write_text(text + "   1.500000 1  123             Rx   d 2 0A FF\nEnd TriggerBlock\n")
        (unit,) = BusFile(path)
        assert (unit.can_id, unit.data) == (0x123, b"\x0a\xff")
        assert (unit.at_ns == 1_500_000_000) is not known


def test_trc_of_peak_is_read_also_without_an_end_of_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "traffic.trc"
    with can.TRCWriter(path) as writer:
        for number in range(3):
            writer.on_message_received(to_message(frame(number)))
    path.write_bytes(path.read_bytes().rstrip(b"\r\n"))
    read = BusFile(path)
    assert [unit.data for unit in read] == [frame(number).data for number in range(3)]
    assert read.broken == 0


def test_one_channel_of_several_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "two.log"
    path.write_text("(1.0) can0 001#\n(1.1) can1 002#\n(1.2) can0 003#\n")
    read = BusFile(path, "can0")
    assert [unit.can_id for unit in read] == [1, 3]
    assert read.channels == {"can0", "can1"}
    with pytest.raises(BusFileError, match=r"channel can7; there are \['can0', 'can1'\]"):
        list(BusFile(path, "can7"))


# --- what is broken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".log", ".asc", ".blf", ".trc", ".serial", ".mf4", ".csv"])
@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\x89PNG\r\n\x1a\n" * 100, b"LOGG", b"LOGG" + bytes(500), b"x" * 600_000]
)
def test_file_without_traffic_is_told_by_its_name(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(content)
    with pytest.raises(BusFileError, match=f"foreign{suffix}"):
        list(BusFile(path))


@pytest.mark.parametrize("suffix", [".log", ".asc", ".blf", ".serial"])
def test_file_cut_off_anywhere_gives_what_is_whole(tmp_path: Path, suffix: str) -> None:
    units = [frame(number)._replace(can_id=0 if suffix == ".serial" else number) for number in range(12)]
    whole = write(tmp_path / f"whole{suffix}", units).read_bytes()
    expected = list(BusFile(tmp_path / f"whole{suffix}"))
    counts = set()
    for length in range(1, len(whole)):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(whole[:length])
        try:
            read = list(BusFile(path))
        except BusFileError:
            read = []
        if read != expected[: len(read)]:  # a header that a BLF file gets at its end
            read = [unit._replace(at_ns=other.at_ns) for unit, other in zip(read, expected, strict=False)]
        assert read == expected[: len(read)]
        counts.add(len(read))
    assert counts >= ({0, 12} if suffix == ".blf" else set(range(12)))


@pytest.mark.parametrize(("suffix", "line"), [(".log", 3), (".asc", 8), (".serial", 4)])
def test_broken_line_is_told_with_its_number_and_the_rest_is_read(tmp_path: Path, suffix: str, line: int) -> None:
    path = write(tmp_path / f"traffic{suffix}", [frame(number) for number in range(5)])
    lines = path.read_text().splitlines(keepends=True)
    assert "00 00 02" in lines[line - 1] or "000002" in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace("0000000000000002", "000000000000002").replace("00 02", "00 zz")
    path.write_text("".join(lines))
    read = BusFile(path)
    assert [unit.data[-1] for unit in read] == [0, 1, 3, 4]
    assert read.broken == 1
    assert read.first_broken.startswith(f"line {line}: ")


def test_broken_container_of_blf_is_told_and_later_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "traffic.blf"
    with can.BLFWriter(path, max_container_size=4096) as writer:
        for number in range(1000):
            writer.on_message_received(to_message(frame(number)))
    content = bytearray(path.read_bytes())
    third = [place for place in range(len(content)) if content.startswith(b"LOBJ", place)][2]
    content[third + 32 : third + 60] = bytes(28)
    path.write_bytes(content)
    read = BusFile(path)
    numbers = [int.from_bytes(unit.data, "big") for unit in read]
    assert numbers == sorted(set(numbers))
    missing = set(range(1000)) - set(numbers)
    assert missing
    assert len(missing) < 2 * 4096 / 48 + 2  # that container, and what reached into it
    assert numbers[-1] == 999
    assert read.broken
    assert read.first_broken.startswith("byte ")


def test_blf_that_announces_a_huge_object_takes_no_memory_for_it(tmp_path: Path) -> None:
    path = write(tmp_path / "traffic.blf", [frame(1)])
    content = bytearray(path.read_bytes())
    content[144 + 8 : 144 + 12] = (0xFFFFFFF0).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(BusFileError, match="an object of 4294967264 bytes"):
        list(BusFile(path))


def test_line_without_end_is_passed_over_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "traffic.log"
    path.write_bytes(b"(1.0) can0 001#\n" + b"x" * 1_000_000 + b"\n(1.1) can0 002#\n")
    read = BusFile(path)
    assert [unit.can_id for unit in read] == [1, 2]
    assert read.first_broken == "line 2: longer than 262144 bytes"


@pytest.mark.parametrize(
    ("unit", "why"),
    [
        (frame(1), ""),
        (Traffic(0, 0, 0x800, b""), "identifier 0x800 is too large"),
        (Traffic(0, Mark.EXTENDED, 2**29, b""), "identifier 0x20000000 is too large"),
        (Traffic(0, 0, 1, bytes(9)), "9 bytes are too many"),
        (Traffic(0, Mark.FD, 1, bytes(64)), ""),
    ],
)
def test_frames_that_no_wire_carries(unit: Traffic, why: str) -> None:
    assert fault(unit) == why
