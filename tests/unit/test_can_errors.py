"""Error frames in words; the frames are as ``linux/can/error.h`` lays them out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.buses.can_errors import describe_error


@pytest.mark.parametrize(
    ("classes", "data", "words"),
    [
        (0x001, "", "transmit timeout"),
        (0x002, "0500000000000000", "lost arbitration at bit 5"),
        (0x002, "0000000000000000", "lost arbitration"),
        (0x004, "0001000000000000", "controller: receive overflow"),
        (0x004, "000C000000000000", "controller: receive warning, transmit warning"),
        (0x004, "0030000000000000", "controller: receive passive, transmit passive"),
        (0x004, "0040000000000000", "controller: active again"),
        (0x004, "", "controller: unspecified"),
        (0x008, "0000840A00000000", "protocol violation: bit stuffing, while sending, at 0x0a"),
        (0x010, "0000000004000000", "transceiver 0x04"),
        (0x040, "", "bus-off"),
        (0x080, "", "bus error"),
        (0x100, "", "controller restarted"),
        (0x204, "0020000000008000", "controller: transmit passive; error counters: transmit 128, receive 0"),
        (0x000, "", "error frame 0x0"),
        (0x400, "", "error frame 0x400"),
    ],
)
def test_error_frame_in_words(classes: int, data: str, words: str) -> None:
    assert describe_error(classes, bytes.fromhex(data)) == words


def test_missing_acknowledgement_says_what_to_look_for() -> None:
    assert "nobody else is on the bus" in describe_error(0x20, b"")


@given(st.integers(0, 2**29 - 1), st.binary(max_size=64))
def test_every_error_frame_has_words(classes: int, data: bytes) -> None:
    assert describe_error(classes, data)
