"""The adapter's side of Lawicel ASCII ("slcan"): characters in, frames and answers out. No I/O.

    tiiildd..  Tiiiiiiiildd..  data frame, standard and extended: answered z, Z
    riiil      Riiiiiiiil      remote frame
    O  L  C                    open, listen only, close
    Sn sxxyy   M..  m..  Zn    bit rate by number or by register, acceptance code and mask, time stamps
    V  N  F                    version, serial number, status flags

Each command ends with CR; the answer is CR (after a letter or data, where there is any), or BEL for "no". Bit rate and
acceptance filter are taken and make no difference: there is no wire. Source: Lawicel CANUSB manual, ASCII commands.
"""

from collections.abc import Iterator
from typing import Final

from drivers.clock import MS, MonotonicNs
from drivers.family import CanFrame

CR: Final = b"\r"
BEL: Final = b"\a"
_LONGEST = 32  # a command; "T", 8, 1 and 16 digits, and some
_STAMP_PERIOD_MS = 60_000


class SlcanAdapter:
    """State of one adapter: whether its channel is open, and what is half received."""

    def __init__(self) -> None:
        self.is_open = False
        self.bus_off = False  # its CAN controller has switched itself off
        self._listen_only = False
        self._stamps = False
        self._line = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, CanFrame | None]]:
        """(answer, frame that went onto the bus) for each command completed by ``data``. Never raises."""
        for byte in data:
            if byte == CR[0]:
                line, self._line = bytes(self._line), bytearray()
                yield self._execute(line) if len(line) <= _LONGEST else (BEL, None)
            elif len(self._line) <= _LONGEST:  # what is longer is refused when it ends
                self._line.append(byte)

    def encode_received(self, frame: CanFrame, now: MonotonicNs) -> bytes:
        """A frame from the bus as the host program reads it; nothing while the channel is closed."""
        if not self.is_open:
            return b""
        head = f"T{frame.can_id:08X}" if frame.extended else f"t{frame.can_id:03X}"
        stamp = f"{now // MS % _STAMP_PERIOD_MS:04X}" if self._stamps else ""
        return f"{head}{len(frame.data)}{frame.data.hex().upper()}{stamp}".encode() + CR

    def _execute(self, line: bytes) -> tuple[bytes, CanFrame | None]:
        command, rest = line[:1], line[1:]
        done = False
        match command:
            case b"":  # an empty command, as programs send to clear the line
                return CR, None
            case b"t" | b"T" | b"r" | b"R":
                return self._transmit(command, rest)
            case b"O" | b"L":
                done = not rest and not self.is_open
                if done:
                    self.is_open, self._listen_only = True, command == b"L"
            case b"C":
                done = not rest and self.is_open
                self.is_open = self.is_open and bool(rest)
            case b"S":
                done = not self.is_open and len(rest) == 1 and rest.isdigit()
            case b"s":
                done = not self.is_open and len(rest) == 4 and _is_hex(rest)
            case b"M" | b"m":
                done = not self.is_open and len(rest) == 8 and _is_hex(rest)
            case b"Z":
                done = not self.is_open and rest in {b"0", b"1"}
                self._stamps = rest == b"1" if done else self._stamps
            case b"V" if not rest:
                return b"V1013" + CR, None
            case b"N" if not rest:
                return b"NSIM1" + CR, None
            case b"F" if not rest and self.is_open:
                return (b"F80" if self.bus_off else b"F00") + CR, None  # bit 7: bus error
        return CR if done else BEL, None

    def _transmit(self, command: bytes, rest: bytes) -> tuple[bytes, CanFrame | None]:
        extended = command.isupper()
        digits = 8 if extended else 3
        number, length, data = rest[:digits], rest[digits : digits + 1], rest[digits + 1 :]
        expected = 2 * int(length) if length.isdigit() and command in b"tT" else 0
        good = (
            self.is_open
            and not self._listen_only
            and not self.bus_off
            and len(number) == digits
            and b"0" <= length <= b"8"
            and len(data) == expected
            and _is_hex(number + data)
            and int(number, 16) < (1 << 29 if extended else 1 << 11)
        )
        if not good:
            return BEL, None
        answer = (b"Z" if extended else b"z") + CR
        if command in b"rR":  # nobody on a simulated bus answers a remote frame
            return answer, None
        return answer, CanFrame(int(number, 16), bytes.fromhex(data.decode()), extended)


def _is_hex(text: bytes) -> bool:
    return all(byte in b"0123456789abcdefABCDEF" for byte in text)
