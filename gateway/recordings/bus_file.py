"""Files of raw bus traffic: CAN frames in the formats that python-can has, serial bytes in a text form of our own.

    .log          candump -L                      (seconds.micros) channel id#data R|T
    .asc .trc     Vector and PEAK text; .trc is only read
    .blf .mf4     Vector and ASAM binary; .mf4 needs asammdf
    .serial                                       seconds.nanos > hex        > sent, < heard

Times count from 1970 UTC. Reading gives what is whole and tells what is not, with its place; memory stays flat.
candump's lines are read here: python-can takes most error frames of others for data frames. Sources: can-utils
``lib.h``, python-can's ``can/io``.
"""

import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import can
from can.io.blf import BLFParseError
from can.io.generic import FileIOMessageWriter

from drivers.clock import SECOND
from drivers.family import Medium
from drivers.traffic import Mark, Traffic, from_message

SERIAL: Final = ".serial"
WRITTEN: Final = (".log", ".asc", ".blf", ".mf4")
READ: Final = (*WRITTEN, ".trc")

_LONGEST: Final = 1 << 18  # characters of a line
_MOST_OBJECT: Final = 64 << 20  # bytes of a BLF object; a container of frames usually has 128 KiB
_CHUNK: Final = 1 << 16
_FOREIGN: Final = (
    ArithmeticError, AttributeError, BLFParseError, LookupError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
"""What python-can's readers raise at what they cannot read."""

_SERIAL_LINE: Final = re.compile(r"(\d+)\.(\d{9}) ([<>]) ((?:[0-9A-F]{2})+)")
_CANDUMP_LINE: Final = re.compile(
    r"""\( (?P<s>\d+) \. (?P<frac>\d{1,9}) \) \s+ (?P<channel>\S+) \s+
        (?P<id> [0-9A-F]{3} | [0-9A-F]{8} ) \#
        (?: (?P<remote>R) (?P<dlc>[0-9A-F]?) | (?:\#(?P<fd>[0-9A-F]))? (?P<data>(?:[0-9A-F]{2})*) )
        (?:_[0-9A-F])? (?:\s+(?P<way>[RT]))?""",  # _: a raw DLC above 8
    re.VERBOSE | re.IGNORECASE,
)
_HALF_A_BYTE: Final = re.compile(rb"\s[0-9A-Fa-f]{2}\s[0-9A-Fa-f]$")
_EXTENDED_DIGITS: Final = 8
_ERROR_FLAG: Final = 0x20000000  # in the identifier (linux/can.h)


class BusFileError(Exception):
    """The file cannot be read or written; the message names it, and what would be right."""


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """A new file for the traffic of one bus. OSError passes through; what was flushed before stays readable."""

    def __init__(self, path: Path, medium: Medium, bus: str) -> None:
        suffix = path.suffix.lower()
        fitting = (SERIAL,) if medium == "serial" else WRITTEN
        if suffix not in fitting:
            raise BusFileError(f"{path}: bus {bus} is a {medium} bus; the file must end in {' or '.join(fitting)}")
        if path.exists():
            raise BusFileError(f"{path}: exists already; name a new file")
        self._bus = bus
        self._can: FileIOMessageWriter[Any] | None = None
        if medium == "serial":
            self._text = path.open("x", encoding="ascii", errors="replace")
            self._text.write(f"# bytes of serial bus {bus}: seconds since 1970 UTC, > sent or < heard, hexadecimal\n")
            return
        try:
            made = _AscWriter(path) if suffix == ".asc" else can.Logger(path)
            self._can = cast("FileIOMessageWriter[Any]", made)
        except NotImplementedError as error:
            raise BusFileError(f"{path}: {suffix} needs asammdf: pip install asammdf; or use .log") from error

    def write(self, unit: Traffic) -> None:
        """Add a unit; its time is epoch nanoseconds."""
        if self._can:
            self._can.on_message_received(to_message(unit, self._bus))
            return
        seconds, nanos = divmod(unit.at_ns, SECOND)
        way = ">" if unit.marks & Mark.SENT else "<"
        self._text.write(f"{seconds}.{nanos:09} {way} {unit.data.hex().upper()}\n")

    def note(self, words: str, at_ns: int) -> None:
        """Add words of our own, where the format has a place for them."""
        if isinstance(self._can, can.ASCWriter | can.BLFWriter):
            self._can.log_event(f"// {words}", at_ns / SECOND)
        elif not self._can:
            self._text.write(f"# {words}\n")

    def flush(self) -> None:
        """Hand over to the system what the format writes piece by piece: all but .blf and .mf4."""
        if not self._can:
            self._text.flush()
        elif isinstance(self._can, can.CanutilsLogWriter | can.ASCWriter):
            self._can.file.flush()

    def close(self) -> None:
        """Finish the file."""
        (self._can.stop if self._can else self._text.close)()


class _AscWriter(can.ASCWriter):
    """One whose date holds: python-can writes 7 ms as ".7"."""

    FORMAT_DATE = "%a %b %d %H:%M:%S.{:03} %Y"


def to_message(unit: Traffic, channel: str | None = None) -> can.Message:
    """A frame as python-can has it."""
    marks = unit.marks
    return can.Message(
        timestamp=unit.at_ns / SECOND,
        arbitration_id=unit.can_id,
        is_extended_id=bool(marks & Mark.EXTENDED),
        is_remote_frame=bool(marks & Mark.REMOTE),
        is_error_frame=bool(marks & Mark.ERROR),
        channel=channel,
        dlc=unit.dlc if marks & Mark.REMOTE else len(unit.data),
        data=unit.data,
        is_fd=bool(marks & Mark.FD),
        is_rx=not marks & Mark.SENT,
        bitrate_switch=bool(marks & Mark.BRS),
        error_state_indicator=bool(marks & Mark.ESI),
    )


# --- reading ----------------------------------------------------------------------------------------------------------


class BusFile:
    """A file of traffic: iterate over it once. Times are epoch nanoseconds, or count from 0 where there is no date.

    ``channel``: of several in the file, only this one. Raises OSError or BusFileError, for a file without any traffic.
    """

    def __init__(self, path: Path, channel: str | None = None) -> None:
        self._suffix = path.suffix.lower()
        if self._suffix not in (*READ, SERIAL):
            raise BusFileError(f"{path}: must end in {', '.join(READ)} (CAN frames) or {SERIAL} (bytes)")
        self._path = path
        self._channel = channel
        self._file: BinaryIO = path.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size
        if not self._size:
            self._file.close()
            raise BusFileError(f"{path}: is empty")
        self.medium: Medium = "serial" if self._suffix == SERIAL else "can"
        self.channels: set[str] = set()
        """Met so far."""
        self.broken = 0
        """Lines or frames that could not be read, so far."""
        self.first_broken = ""
        """The first of them: its place and what is wrong."""

    @property
    def fraction(self) -> float:
        """How much of the file has been read."""
        return 1.0 if self._file.closed else self._file.tell() / self._size

    def __iter__(self) -> Iterator[Traffic]:
        given = 0
        with self._file:
            for unit, channel in self._units():
                self.channels.add(channel)
                if channel == (self._channel or channel):
                    given += 1
                    yield unit
        if not given:
            of = f" of channel {self._channel}; there are {sorted(self.channels)}" if self.channels else ""
            raise BusFileError(f"{self._path}: holds no {self.medium} traffic{of}. {self.first_broken}".rstrip(" ."))

    def _units(self) -> Iterator[tuple[Traffic, str]]:
        self._lines = _Lines(self._file, self._tell, ended=self._suffix in (".log", SERIAL))
        self._objects = _Objects(self._file, self._tell)
        try:
            match self._suffix:
                case ".serial":
                    return self._parsed(_parse_serial)
                case ".log":
                    return self._parsed(_parse_candump)
                case ".asc":
                    return self._decoded(_AscReader(cast("Any", self._lines), relative_timestamp=False))
                case ".trc":
                    return self._decoded(can.TRCReader(cast("Any", self._lines)))
                case ".blf":
                    return self._decoded(_BlfReader(cast("Any", self._objects)))
                case _:
                    return self._decoded(self._mf4_reader(), again=False)
        except _FOREIGN as error:
            raise BusFileError(f"{self._path}: is no {self._suffix} file: {error}") from error

    def _mf4_reader(self) -> can.MF4Reader:
        try:
            return can.MF4Reader(self._path)
        except NotImplementedError as error:
            raise BusFileError(f"{self._path}: {self._suffix} needs asammdf: pip install asammdf") from error
        except Exception as error:  # asammdf's own, which can be named only where it is installed
            raise ValueError(str(error)) from error

    def _parsed(self, parse: Callable[[str], tuple[Traffic, str]]) -> Iterator[tuple[Traffic, str]]:
        for line in self._lines:
            if line.strip() and not line.startswith("#"):
                try:
                    yield parse(line)
                except ValueError as error:
                    self._tell(str(error))

    def _decoded(self, reader: can.io.generic.MessageReader, *, again: bool = True) -> Iterator[tuple[Traffic, str]]:
        messages = iter(reader)
        while True:
            try:
                message = next(messages)
            except StopIteration:
                return
            except _FOREIGN as error:
                self._tell(f"{type(error).__name__}: {error}")
                if not again:
                    return
                messages = iter(reader)  # which goes on behind it
                continue
            unit = from_message(message, round(message.timestamp * SECOND))
            if not unit.marks & (Mark.REMOTE | Mark.FD) and len(unit.data) < min(unit.dlc, 8):
                self._tell(f"a frame of {unit.dlc} bytes of which {len(unit.data)} are there")
                continue
            yield unit, str(message.channel)

    def _tell(self, what: str) -> None:
        self.broken += 1
        if not self.first_broken:
            line = self._lines.number
            self.first_broken = f"{f'line {line}' if line else f'byte {self._file.tell()}'}: {what}"


def fault(frame: Traffic) -> str:
    """Why no wire can carry it, in words; nothing if one can. Files hold such things too."""
    if frame.can_id >= (1 << 29 if frame.marks & Mark.EXTENDED else 1 << 11):
        return f"identifier {frame.can_id:#x} is too large"
    if len(frame.data) > (64 if frame.marks & Mark.FD else 8):
        return f"{len(frame.data)} bytes are too many"
    return ""


def _parse_serial(line: str) -> tuple[Traffic, str]:
    found = _SERIAL_LINE.fullmatch(line.rstrip())
    if not found:
        raise ValueError(f"must be SECONDS.NANOS > HEX, or < for what was heard: {line[:60]!r}")
    at_ns = int(found[1]) * SECOND + int(found[2])
    return Traffic(at_ns, Mark.SENT if found[3] == ">" else 0, 0, bytes.fromhex(found[4])), ""


def _parse_candump(line: str) -> tuple[Traffic, str]:
    found = _CANDUMP_LINE.fullmatch(line.strip())
    if not found:
        raise ValueError(f"must be as candump -L writes it, (SECONDS.MICROS) CHANNEL ID#DATA: {line[:60]!r}")
    can_id = int(found["id"], 16)
    marks = Mark.SENT if found["way"] in ("T", "t") else 0
    if can_id & _ERROR_FLAG:
        marks |= Mark.ERROR
    elif len(found["id"]) == _EXTENDED_DIGITS:
        marks |= Mark.EXTENDED
    if found["remote"]:
        marks |= Mark.REMOTE
    if found["fd"]:
        flags = int(found["fd"], 16)
        marks |= Mark.FD | (Mark.BRS if flags & 1 else 0) | (Mark.ESI if flags & 2 else 0)
    data = bytes.fromhex(found["data"] or "")
    at_ns = int(found["s"]) * SECOND + int(found["frac"].ljust(9, "0"))
    dlc = int(found["dlc"] or "0", 16) if found["remote"] else len(data)
    return Traffic(at_ns, int(marks), can_id & ~_ERROR_FLAG, data, dlc), found["channel"]


class _Lines:
    """The lines of a text file, counted; python-can's readers take it for a file. What is cut off is told.

    ``ended``: the last line has an end too, or is cut off; that of PEAK and Vector needs none.
    """

    def __init__(self, file: BinaryIO, tell: Callable[[str], None], *, ended: bool) -> None:
        self._file = file
        self._tell = tell
        self._ended = ended
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(_LONGEST):
            self.number += 1
            if line.endswith(b"\n") or not (self._ended or _HALF_A_BYTE.search(line)):
                yield line.decode(errors="replace")
            else:
                self._tell("cut off" if len(line) < _LONGEST else f"longer than {_LONGEST} bytes")
            while len(line) == _LONGEST and not line.endswith(b"\n"):
                line = self._file.readline(_LONGEST)

    def close(self) -> None:
        """The file belongs to somebody else."""


class _Objects:
    """A binary file for python-can's BLF reader, which believes every length. What is cut off is told."""

    def __init__(self, file: BinaryIO, tell: Callable[[str], None]) -> None:
        self._file = file
        self._tell = tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MOST_OBJECT:
            raise ValueError(f"an object of {size} bytes")
        data = self._file.read(size)
        if 0 < len(data) < size:
            self._tell(f"cut off, {size - len(data)} bytes are missing")
        return data

    def seek_object(self) -> None:
        """Go to the next mark of an object, or the end."""
        while chunk := self._file.read(_CHUNK):
            if (place := chunk.find(b"LOBJ")) >= 0:
                self._file.seek(place - len(chunk), os.SEEK_CUR)
                return
            if len(chunk) == _CHUNK:
                self._file.seek(-3, os.SEEK_CUR)  # the mark may begin there

    def close(self) -> None:
        """The file belongs to somebody else."""


class _AscReader(can.ASCReader):
    """One that can be iterated again to go on, and to which a date in words that it does not know is none."""

    _begun = False

    def _extract_header(self) -> None:
        if not self._begun:
            self._begun = True
            super()._extract_header()

    @staticmethod
    def _datetime_to_timestamp(datetime_string: str) -> float:
        try:
            return can.ASCReader._datetime_to_timestamp(datetime_string)
        except ValueError:
            return 0.0


class _BlfReader(can.BLFReader):
    """One that can be iterated again to go on: with the first frame that begins in the next container."""

    _begun = _torn = False

    def __iter__(self) -> Any:
        if self._begun:
            self._tail, self._torn = b"", True
            cast("_Objects", self.file).seek_object()
        self._begun = True
        return super().__iter__()

    def _parse_container(self, data: bytes) -> Any:
        if self._torn:
            self._torn = False
            data = data[max(0, data.find(b"LOBJ")) :]
        return super()._parse_container(data)
