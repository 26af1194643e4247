"""The simulated wire: bits of a frame, and whose turn it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import SECOND, MonotonicNs
from drivers.family import CAN_FRAME_BITS, CanFrame, W
from drivers.motor import Motor
from drivers.sim.responder import SimulatedMotor
from drivers.sim.servo import Servo
from drivers.sim.wire import Wire, can_frame_bits, crc15, wire_bits

MBIT = 1_000_000
US = 1000
MOTOR = SimulatedMotor(Motor(0, "joint1", "damiao", 1), Servo())
NOW = MonotonicNs(SECOND)

# --- bits -------------------------------------------------------------------------------------------------------------

frames = st.builds(
    lambda extended, can_id, data: CanFrame(can_id if extended else can_id & 0x7FF, data, extended),
    st.booleans(),
    st.integers(0, (1 << 29) - 1) | st.sampled_from([0, (1 << 29) - 1]),
    st.binary(max_size=8) | st.integers(0, 8).map(bytes),
)


def on_the_wire(frame: CanFrame) -> str:
    """The stuffed bits up to the CRC's end, one by one as the specification tells it (Bosch CAN 2.0, 3.1 and 5)."""
    length = f"{len(frame.data):04b}"
    if frame.extended:
        head = f"0{frame.can_id >> 18:011b}11{frame.can_id & 0x3FFFF:018b}000{length}"
    else:
        head = f"0{frame.can_id:011b}000{length}"
    content = head + "".join(f"{byte:08b}" for byte in frame.data)
    crc = 0
    for bit in content:
        overflow = int(bit) ^ crc >> 14
        crc = crc << 1 & 0x7FFF
        if overflow:
            crc ^= 0x4599
    sent = ""
    for bit in content + f"{crc:015b}":
        sent += bit
        if sent.endswith(("00000", "11111")):
            sent += "1" if bit == "0" else "0"
    return sent


def test_crc_is_that_of_can() -> None:
    digits = b"123456789"
    nibbles = bytes(nibble for byte in digits for nibble in (byte >> 4, byte & 0xF))
    assert crc15(nibbles) == 0x059E  # catalogue of parametrised CRC algorithms (reveng), CRC-15/CAN


@given(frames)
def test_frame_takes_the_bits_that_the_specification_counts_one_by_one(frame: CanFrame) -> None:
    assert can_frame_bits(frame) == len(on_the_wire(frame)) + 13


@given(st.integers(0, 0x7FF), st.binary(min_size=8, max_size=8))
def test_standard_frame_of_eight_bytes_takes_111_to_135_bits(can_id: int, data: bytes) -> None:
    assert CAN_FRAME_BITS <= can_frame_bits(CanFrame(can_id, data)) <= 135


def test_frame_of_zeros_is_mostly_stuffed() -> None:
    assert can_frame_bits(CanFrame(0x7F, bytes.fromhex("55AA55AA55AA55AA"))) < can_frame_bits(CanFrame(0, bytes(8)))


def test_serial_byte_is_ten_bits() -> None:
    assert wire_bits(b"123") == 30


# --- turns ------------------------------------------------------------------------------------------------------------


def drain(wire: Wire[W], now: int = 1 << 62) -> list[tuple[int, W]]:
    """(microseconds behind NOW, unit) of everything that starts by ``now``."""
    passed = []
    while turn := wire.carry(MonotonicNs(now)):
        passed.append(((turn[0] - NOW) // US, turn[1].unit))
    return passed


def test_units_follow_each_other_as_the_wire_gets_free() -> None:
    wire: Wire[bytes] = Wire(MBIT)
    for unit in (b"abc", b"de", b"f"):
        wire.request(unit, NOW)
    assert drain(wire) == [(30, b"abc"), (50, b"de"), (60, b"f")]


def test_reply_waits_for_its_delay_and_for_the_wire() -> None:
    wire: Wire[bytes] = Wire(MBIT)
    wire.reply(b"late", MOTOR, NOW + 100 * US)
    wire.reply(b"soon", MOTOR, NOW + 10 * US)
    wire.reply(b"next", MOTOR, NOW + 20 * US)
    assert drain(wire) == [(50, b"soon"), (90, b"next"), (140, b"late")]


def test_serial_reply_goes_ahead_of_a_request_that_waits() -> None:
    wire: Wire[bytes] = Wire(MBIT)
    wire.request(b"first", NOW)
    wire.request(b"second", NOW)
    assert wire.carry(NOW) is not None
    wire.reply(b"reply", MOTOR, NOW + 50 * US)
    assert drain(wire) == [(100, b"reply"), (160, b"second")]


def test_lowest_identifier_wins_the_arbitration_and_a_standard_one_over_its_like() -> None:
    wire: Wire[CanFrame] = Wire(MBIT)
    low, high = CanFrame(0x100, b""), CanFrame(0x101, b"")
    like_low = CanFrame(0x100 << 18, b"", extended=True)
    for frame in (high, like_low, low):
        wire.reply(frame, MOTOR, NOW)
    assert [unit for _, unit in drain(wire)] == [low, like_low, high]


def test_frame_that_has_begun_is_not_interrupted() -> None:
    wire: Wire[CanFrame] = Wire(MBIT)
    low, high = CanFrame(1, b""), CanFrame(0x700, b"")
    wire.request(high, NOW)
    assert [unit for _, unit in drain(wire, NOW)] == [high]
    wire.reply(low, MOTOR, NOW + US)
    ended = NOW + can_frame_bits(high) * US
    assert wire.next_ns == ended
    assert drain(wire, ended - 1) == []
    assert [unit for _, unit in drain(wire, ended)] == [low]


def test_requests_leave_in_their_order_whatever_their_identifiers() -> None:
    wire: Wire[CanFrame] = Wire(MBIT)
    requests = [CanFrame(can_id, b"") for can_id in (0x300, 0x100, 0x200)]
    for frame in requests:
        wire.request(frame, NOW)
    wire.reply(CanFrame(0x180, b""), MOTOR, NOW)
    assert [unit for _, unit in drain(wire)] == [CanFrame(0x180, b""), *requests]


def test_wire_without_a_bit_rate_takes_no_time_and_keeps_the_order() -> None:
    wire: Wire[CanFrame] = Wire()
    sent = [CanFrame(can_id, bytes(8)) for can_id in (3, 1, 2)]
    for frame in sent:
        wire.reply(frame, MOTOR, NOW)
    assert drain(wire) == [(0, frame) for frame in sent]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 2000), st.binary(min_size=1, max_size=8)), min_size=1),
    st.lists(st.integers(1, 300), min_size=1),
)
def test_nothing_overlaps_is_early_or_disappears_however_often_it_is_looked_at(
    offers: list[tuple[bool, int, bytes]], steps_us: list[int]
) -> None:
    wire: Wire[bytes] = Wire(MBIT)
    ready = {}
    for number, (request, at_us, some) in enumerate(sorted(offers, key=lambda offer: offer[1])):
        at = MonotonicNs(NOW + at_us * US)
        unit = some + number.to_bytes(2, "big")
        ready[unit] = at
        wire.request(unit, at) if request else wire.reply(unit, MOTOR, at)
    free, now, seen = 0, int(NOW), []
    for number in range(10_000):
        while passed := wire.carry(MonotonicNs(now)):
            ended, turn = passed
            start = ended - wire_bits(turn.unit) * US
            assert start >= max(free, ready[turn.unit])
            assert start <= now
            free = ended
            seen.append(turn.unit)
        if len(seen) == len(offers):
            break
        now += steps_us[number % len(steps_us)] * US
    assert sorted(seen) == sorted(ready)
    assert wire.next_ns is None


def test_flood_is_bounded() -> None:
    wire: Wire[bytes] = Wire(MBIT)
    for _ in range(20_000):
        wire.request(b"x", NOW)
        wire.reply(b"y", MOTOR, NOW)
    assert len(drain(wire)) <= 20_001


@pytest.mark.parametrize("bits_per_s", [0, MBIT])
def test_cleared_wire_carries_nothing_and_then_what_is_new(bits_per_s: int) -> None:
    wire: Wire[bytes] = Wire(bits_per_s)
    for unit in (b"a", b"b"):
        wire.request(unit, NOW)
        wire.reply(unit, MOTOR, NOW)
    wire.clear()
    assert drain(wire) == []
    wire.request(b"c", NOW)
    assert [unit for _, unit in drain(wire)] == [b"c"]
