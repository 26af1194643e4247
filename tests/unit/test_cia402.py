"""CiA 402: CANopen's frames, the gateway's decisions, the simulated drives' dictionary and state machine."""

from collections.abc import Sequence
from math import isnan, pi, tau
from struct import pack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers import protocols
from drivers.clock import MS
from drivers.errors import MotorRefused
from drivers.family import CanFrame, Overheard, run_with_replies
from drivers.motor import Feedback, Kind, Motor, Order, Status
from drivers.protocols._canopen import (
    INVALID,
    Aborted,
    Mapped,
    Nmt,
    Object,
    Pdo,
    decode,
    encode,
    make_abort,
    make_download,
    make_nmt,
    make_upload,
    make_upload_segment,
    upload,
)
from drivers.protocols._cia402 import (
    ABORT_CONNECTION,
    CONTROLWORD,
    HEARTBEAT_TIME,
    MODE_DISPLAY,
    POSITION,
    STATUSWORD,
    SUPPORTED_MODES,
    TARGET_POSITION,
    TORQUE,
    VELOCITY,
    Options,
    State,
    state_of,
)
from drivers.protocols._cia402_drive import SimulatedCia402
from drivers.protocols.cia402 import Cia402
from drivers.sim.build import SimulationSettings
from gateway.config import ConfigError, loads
from tests.memory_loop import STILL, Loop

PLAIN = Options(36_000)
ENABLE, STOP = Order(Kind.ENABLE), Order(Kind.STOP)

# canopen library, test/test_sdo.py (node 2)
GOLDEN_REQUESTS = [
    (make_upload(2, (0x1018, 1)), "602#4018100100000000"),
    (make_upload(2, (0x1400, 2)), "602#4000140200000000"),
    (make_download(2, (0x1017, 0), encode("uint16", 4000)), "602#2B171000A00F0000"),
    (make_upload_segment(2, 0), "602#6000000000000000"),
    (make_upload_segment(2, 1), "602#7000000000000000"),
    (make_abort(2, (0x1008, 0), 0x05040000), "602#8008100000000405"),
    (make_nmt(Nmt.START, 2), "000#0102"),
    (make_nmt(Nmt.PRE_OPERATIONAL, 0), "000#8000"),
]
# canopen library, test/test_sdo.py: a device's name in segments
NAME_REPLIES = [
    "41 08 10 00 1A 00 00 00",
    "00 54 69 6E 79 20 4E 6F",
    "10 64 65 20 2D 20 4D 65",
    "00 67 61 20 44 6F 6D 61",
    "15 69 6E 73 20 21 00 00",
]
# candump of a drive: 201 [2] 02 00 answered by 181 [2] 17 16, then 40 06, 40 02
GOLDEN_STATES = [(0x1617, State.QUICK_STOP), (0x0640, State.SWITCH_ON_DISABLED), (0x0240, State.SWITCH_ON_DISABLED)]
frames = st.builds(CanFrame, st.integers(0, 0x7FF), st.binary(max_size=8), st.booleans())


def make_loop(options: Options = PLAIN, settings: SimulationSettings = STILL, bus_id: int = 3) -> Loop:
    """One drive, connected."""
    loop = Loop([Motor(0, "joint", "cia402", bus_id, options)], settings)
    assert loop.connect(bus_id) is not None
    loop.sent.clear()
    return loop


def sdo_reply(node: int, hexadecimal: str) -> CanFrame:
    return CanFrame(0x580 + node, bytes.fromhex(hexadecimal))


def answer(procedure: Any, *replies: CanFrame) -> Any:
    """Drive a procedure by frames: each is given to the exchange that waits, and answers it if it matches."""
    exchange = next(procedure)
    try:
        for frame in replies:
            if (reply := exchange.match(frame)) is not None:
                exchange = procedure.send(dict([reply]))
        while True:
            exchange = procedure.send({})
    except StopIteration as end:
        return end.value


def ask(loop: Loop, frame: CanFrame) -> list[CanFrame]:
    """What the simulated drives reply to a frame."""
    return [reply for _, reply in loop.bus.respond(frame, loop.now)]


def run_but(loop: Loop, procedure: Any, wanted: Object, value: int) -> None:
    """Run a procedure with a drive that tells ``value`` in one of its objects, whatever it does."""
    asked, told = make_upload(3, wanted.key), b"\x43" + make_upload(3, wanted.key).data[1:4] + encode("uint32", value)
    exchange = next(procedure)
    while True:
        replies = loop.exchange(exchange)
        exchange = procedure.send({3: told} if asked in exchange.requests else replies)


def read(loop: Loop, wanted: Object, node: int = 3) -> Any:
    return decode(wanted.kind, loop.run(upload(node, wanted.key)))


def write(loop: Loop, wanted: Object, value: float, node: int = 3) -> str:
    """The drive's answer to a write: its command byte, or the abort code."""
    reply, *_ = ask(loop, make_download(node, wanted.key, encode(wanted.kind, value)))
    return reply.data[:1].hex() if reply.data[0] != 0x80 else reply.data[:3:-1].hex()


def controls(loop: Loop) -> list[int]:
    """The controlwords that were sent."""
    sent = []
    for frame in loop.sent:
        if frame.can_id == 0x603 and frame.data[:4] == bytes.fromhex("2B406000"):
            sent.append(int.from_bytes(frame.data[4:6], "little"))
        if frame.can_id == 0x203:
            sent.append(int.from_bytes(frame.data, "little"))
    return sent


# --- SDO --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frame", "text"), GOLDEN_REQUESTS)
def test_requests_are_those_of_another_library(frame: CanFrame, text: str) -> None:
    assert str(frame) == text


@pytest.mark.parametrize(
    ("key", "reply", "value"),
    [
        ((0x1018, 1), "43 18 10 01 04 00 00 00", 4),
        ((0x1400, 2), "4F 00 14 02 FE", 0xFE),  # five bytes, as some drives send
        ((0x1400, 2), "4F 00 14 02 FE 00 00 00", 0xFE),
        ((0x1400, 2), "42 00 14 02 FE 00 00 00", 0xFE),  # expedited, its size not told
    ],
)
def test_short_objects_are_read_in_one_exchange(key: tuple[int, int], reply: str, value: int) -> None:
    assert decode("uint32", answer(upload(2, key), sdo_reply(2, reply))) == value


def test_name_is_read_in_segments() -> None:
    replies = [sdo_reply(2, reply) for reply in NAME_REPLIES]
    assert decode("string", answer(upload(2, (0x1008, 0)), *replies)) == "Tiny Node - Mega Domains !"


def test_segment_that_comes_twice_counts_once() -> None:
    replies = [sdo_reply(2, reply) for reply in (*NAME_REPLIES[:2], NAME_REPLIES[1], *NAME_REPLIES[2:])]
    assert answer(upload(2, (0x1008, 0)), *replies) == b"Tiny Node - Mega Domains !"


def test_late_segment_is_not_taken_for_the_beginning_of_another_transfer() -> None:
    late = [sdo_reply(2, reply) for reply in NAME_REPLIES[1:3]]
    fresh = sdo_reply(2, "43 0A 10 00 31 2E 30 00")
    assert decode("string", answer(upload(2, (0x100A, 0)), *late, fresh)) == "1.0"


def test_transfer_that_breaks_off_is_aborted_and_refused() -> None:
    procedure = upload(2, (0x1008, 0))
    next(procedure)
    procedure.send({2: sdo_reply(2, NAME_REPLIES[0]).data})
    aborting = procedure.send({})
    assert [str(frame) for frame in aborting.requests] == ["602#8008100000000405"]
    with pytest.raises(MotorRefused, match=r"no_reply.*1008:0"):
        procedure.send({})


def test_endless_object_is_given_up() -> None:
    segments = [sdo_reply(2, f"{toggle * 16:02X}" + "41" * 7) for toggle in (0, 1)] * 100
    with pytest.raises(Aborted, match="out of memory"):
        answer(upload(2, (0x1008, 0)), sdo_reply(2, "41 08 10 00 FF FF 00 00"), *segments)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("00 00 02 06", "no such object"),
        ("11 00 09 06", "no such subindex"),
        ("02 00 01 06", "read only"),
        ("30 00 09 06", "out of range"),
        ("99 99 99 99", "unknown reason"),
    ],
)
def test_abort_is_told_in_words_with_its_code(code: str, words: str) -> None:
    number = bytes.fromhex(code)[::-1].hex().upper()
    with pytest.raises(Aborted, match=f"{words}.*{number}"):
        answer(upload(2, (0x1018, 1)), sdo_reply(2, f"80 18 10 01 {code}"))


@pytest.mark.parametrize(
    "frame",
    [
        sdo_reply(2, "43 18 10 02 04 00 00 00"),  # another subindex
        sdo_reply(2, "43 17 10 01 04 00 00 00"),  # another object
        sdo_reply(3, "43 18 10 01 04 00 00 00"),  # another node
        sdo_reply(2, "60 18 10 01 00 00 00 00"),  # to a write
        sdo_reply(2, "43 18 10"),
        CanFrame(0x602, bytes.fromhex("4018100100000000")),  # our own
    ],
)
def test_reply_to_something_else_is_none(frame: CanFrame) -> None:
    assert next(upload(2, (0x1018, 1))).match(frame) is None


@given(kind=st.sampled_from(["int8", "uint8", "int16", "uint16", "int32", "uint32"]), data=st.data())
def test_value_survives_its_type(kind: Any, data: st.DataObject) -> None:
    bits = int(kind.lstrip("uint"))
    low, high = (0, (1 << bits) - 1) if kind[0] == "u" else (-(1 << bits - 1), (1 << bits - 1) - 1)
    value = data.draw(st.integers(low, high))
    assert decode(kind, encode(kind, value)) == value


# --- PDO --------------------------------------------------------------------------------------------------------------


def test_mapping_words_are_those_of_the_standard() -> None:
    assert POSITION.mapped.word() == 0x60640020  # CiA 301, PDO mapping: index, subindex, bits
    assert Mapped.of_word(0x200D0120) == Mapped(0x200D, 1, 32)


@given(st.lists(st.tuples(st.integers(1, 32), st.integers(0, 2**32 - 1)), min_size=1, max_size=64))
def test_pdo_survives_the_wire_whatever_its_bits(entries: list[tuple[int, int]]) -> None:
    entries = entries[: next((n for n in range(len(entries)) if sum(b for b, _ in entries[: n + 1]) > 64), None)]
    mapping = tuple(Mapped(0x2000, number, bits) for number, (bits, _) in enumerate(entries))
    values = [value & (1 << bits) - 1 for bits, value in entries]
    pdo = Pdo(0x181, 1, mapping)
    data = pdo.pack(value.to_bytes(4, "little") for value in values)
    assert len(data) == pdo.size <= 8
    assert [int.from_bytes(raw, "little") for raw in pdo.unpack(data).values()] == values


def test_pdos_are_written_in_the_order_that_the_standard_wants() -> None:
    loop = Loop([Motor(0, "joint", "cia402", 3, Options(36_000, rated_torque_nm=10))])
    loop.connect(3)
    writes = [str(frame) for frame in loop.sent if frame.can_id == 0 or frame.data[0] >> 5 == 1]
    assert writes == [
        "000#8003",  # pre-operational
        "603#2300180183010080",  # TPDO1: not valid
        "603#2F001A0000000000",  # nothing mapped
        "603#23001A0110004160",  # 6041, 16 bits
        "603#23001A0220006460",  # 6064, 32
        "603#23001A0310007760",  # 6077, 16
        "603#2F001A0003000000",
        "603#2F00180201000000",  # at each SYNC
        "603#2300180183010000",
        "603#2301180183020080",
        "603#2F011A0000000000",
        "603#23011A0120006C60",  # 606C, 32
        "603#2F011A0001000000",
        "603#2F01180201000000",
        "603#2301180183020000",
        "603#2300140103020080",  # RPDO1: not valid
        "603#2F00160000000000",
        "603#2300160110004060",  # 6040, 16
        "603#2F00160001000000",
        "603#2F00140201000000",
        "603#2300140103020000",
        "603#2B17100064000000",  # heartbeat, 100 ms
        "000#0103",  # start
    ]


def test_drive_that_is_set_up_already_is_not_touched() -> None:
    loop = make_loop()
    loop.connect(3)
    assert [str(frame) for frame in loop.sent if frame.can_id == 0 or frame.data[0] >> 5 == 1] == ["000#0103"]


def test_mapping_that_the_drive_refuses_is_told_with_the_way_out() -> None:
    loop = Loop([Motor(0, "joint", "cia402", 3, PLAIN)])  # a drive that tells no temperature
    family = Cia402([Motor(0, "joint", "cia402", 3, Options(36_000, temperature="0x200D:1", temperature_pdo=True))])
    with pytest.raises(MotorRefused, match=r'cannot be mapped.*06040041.*pdo = "read"'):
        loop.run(family.connect(3))


def stored(options: Options, *tpdos: Sequence[Object], transmission: int = 1) -> Loop:
    """A drive that somebody has set up to send these."""
    loop = Loop([Motor(0, "joint", "cia402", 3, options)])
    for number in range(4):
        at, mapping = 0x1800 + number, 0x1A00 + number
        cob_id = 0x183 + 0x100 * number
        ask(loop, make_download(3, (at, 1), encode("uint32", cob_id | INVALID)))
        ask(loop, make_download(3, (mapping, 0), b"\0"))
        if number >= len(tpdos):
            continue
        for sub, one in enumerate(tpdos[number], 1):
            ask(loop, make_download(3, (mapping, sub), encode("uint32", one.mapped.word())))
        ask(loop, make_download(3, (mapping, 0), bytes((len(tpdos[number]),))))
        ask(loop, make_download(3, (at, 2), bytes((transmission,))))
        ask(loop, make_download(3, (at, 1), encode("uint32", cob_id)))
    return loop


def test_mapping_that_is_read_is_used_as_it_is() -> None:
    options = Options(36_000, rated_torque_nm=10, pdo="read")
    loop = stored(options, (MODE_DISPLAY, VELOCITY, TORQUE), (MODE_DISPLAY,), (POSITION, STATUSWORD))
    loop.connect(3)
    loop.servo(3).position_rad = 0.5
    told = loop.poll(3)[3]
    assert told.position_rad == pytest.approx(0.5, abs=0.001)
    assert told.torque_nm == pytest.approx(loop.servo(3).torque_nm, abs=0.01)
    assert [frame for frame in loop.sent if frame.data[0:1] == b"\x23"] == []


@pytest.mark.parametrize(
    ("tpdos", "transmission", "missing"),
    [
        ([(STATUSWORD, POSITION)], 1, "606C"),
        ([(STATUSWORD, VELOCITY)], 1, "6064"),
        ([(POSITION, VELOCITY)], 1, "6041"),
        ([(STATUSWORD, POSITION), (VELOCITY,)], 2, "6041.*6064.*606C"),  # not at each SYNC
    ],
)
def test_mapping_that_lacks_something_is_refused_by_name(
    tpdos: list[Sequence[Object]], transmission: int, missing: str
) -> None:
    loop = stored(Options(36_000, pdo="read"), *tpdos, transmission=transmission)
    with pytest.raises(MotorRefused, match=f'{missing}.*at each SYNC.*pdo = "write"'):
        loop.connect(3)


# --- polling ----------------------------------------------------------------------------------------------------------


def test_sample_is_read_in_the_configured_units() -> None:
    options = Options(4_000, 60, rated_torque_nm=20, temperature="0x200D:1", temperature_pdo=True)
    loop = make_loop(options)
    exchange = loop.family.poll([3])
    exchange.begin()
    assert [str(frame) for frame in exchange.requests] == ["080#"]
    assert exchange.match(CanFrame(0x183, pack("<Hih", 0x1637, -1000, -250))) is None
    assert exchange.match(CanFrame(0x283, pack("<if", 30, 41.5))) == (
        3,
        Feedback(-pi / 2, pi, 41.5, torque_nm=-5.0, status=Status.ENABLED),
    )


def test_half_of_an_earlier_sample_is_forgotten() -> None:
    loop = make_loop()
    exchange = loop.family.poll([3])
    exchange.begin()
    assert exchange.match(CanFrame(0x283, pack("<i", 30))) is None
    exchange.begin()
    assert exchange.match(CanFrame(0x183, pack("<Hi", 0x237, 1000))) is None
    assert exchange.match(CanFrame(0x283, pack("<i", 0))) is not None


@pytest.mark.parametrize(
    "frame",
    [CanFrame(0x283, b"\0\0\0"), CanFrame(0x284, bytes(4)), CanFrame(0x283, bytes(4), extended=True)],
)
def test_tpdo_that_is_short_or_foreign_completes_nothing(frame: CanFrame) -> None:
    loop = make_loop()
    exchange = loop.family.poll([3])
    exchange.begin()
    exchange.match(CanFrame(0x183, pack("<Hi", 0x237, 1000)))
    assert [exchange.match(packet) for packet in loop.family.unpack(frame)] in ([], [None])


def test_temperature_that_is_not_read_again_is_not_repeated() -> None:
    loop = make_loop(Options(36_000, temperature="0x200D:1"))
    assert loop.poll(3)[3].temperature_c == pytest.approx(25, abs=1)
    refresh = loop.family.refresh(3)
    assert refresh is not None
    run_with_replies(refresh, [{}])
    assert isnan(loop.poll(3)[3].temperature_c)


def test_sample_between_request_and_reply_of_a_temperature_keeps_the_one_before() -> None:
    loop = make_loop(Options(36_000, temperature="0x200D:1"))
    refresh = loop.family.refresh(3)
    assert refresh is not None
    next(refresh)
    assert loop.poll(3)[3].temperature_c == pytest.approx(25, abs=1)


@given(frames=st.lists(frames))
def test_frames_of_any_kind_raise_nothing_and_end_no_sample(frames: list[CanFrame]) -> None:
    loop = make_loop()
    exchange = loop.family.poll([3])
    for frame in frames:
        for packet in loop.family.unpack(frame):
            exchange.match(packet)
            loop.family.overhear(packet)
        ask(loop, frame)


# --- emergencies, heartbeats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (0x2310, Status.FAULT_CURRENT, "continuous over-current"),
        (0x2315, Status.FAULT_CURRENT, "continuous over-current"),
        (0x2380, Status.FAULT_CURRENT, "current at the output"),
        (0x2350, Status.FAULT_OVERLOAD, "I2t"),
        (0x3210, Status.FAULT_VOLTAGE, "DC link over-voltage"),
        (0x3FFF, Status.FAULT_VOLTAGE, "voltage"),
        (0x4310, Status.FAULT_TEMPERATURE, "drive too hot"),
        (0x7305, Status.FAULT_ENCODER, "sensor"),
        (0x8130, Status.FAULT_COMMUNICATION, "heartbeat"),
        (0x8611, Status.FAULT_OVERLOAD, "following error"),
        (0xFF01, Status.FAULT_OTHER, "specific to the device"),
        (0x0001, Status.FAULT_OTHER, "no class"),
    ],
)
def test_emergency_is_in_the_next_sample_until_it_is_taken_back(code: int, status: Status, words: str) -> None:
    loop = make_loop()
    (text,) = loop.family.explain(code)
    assert text.startswith(f"{code:04X}: ")
    assert words in text
    assert loop.family.overhear(CanFrame(0x083, pack("<HB5x", code, 1))) == Overheard(3)
    told = loop.poll(3)[3]
    assert (told.status & Status.faults(), told.vendor_error) == (status, code)
    loop.family.overhear(CanFrame(0x083, bytes(8)))
    told = loop.poll(3)[3]
    assert (told.status & Status.faults(), told.vendor_error) == (0, 0)


def test_fault_without_an_emergency_is_told_and_its_code_is_looked_up() -> None:
    loop = make_loop()
    loop.servo(3).voltage_v = 7.0
    loop.wait(1)  # nobody hears the emergency message
    told = loop.poll(3)[3]
    assert (told.status & Status.faults(), told.vendor_error) == (Status.FAULT_OTHER, 0)
    refresh = loop.family.refresh(3)
    assert refresh is not None
    loop.run(refresh)
    told = loop.poll(3)[3]
    assert (told.status & Status.faults(), told.vendor_error) == (Status.FAULT_VOLTAGE, 0x3220)


def test_fault_that_somebody_else_has_reset_takes_its_code_along() -> None:
    loop = make_loop()
    loop.servo(3).voltage_v = 7.0
    assert loop.poll(3)[3].vendor_error == 0x3220
    loop.servo(3).voltage_v = 12.0
    write(loop, CONTROLWORD, 0x80)
    assert loop.poll(3)[3].vendor_error == 0


@pytest.mark.parametrize(
    ("data", "why"), [("00", "boot-up"), ("7F", "pre operational"), ("04", "stopped"), ("55", "unknown")]
)
def test_drive_that_restarted_is_to_be_connected_anew(data: str, why: str) -> None:
    heard = make_loop().family.overhear(CanFrame(0x703, bytes.fromhex(data)))
    assert heard is not None
    assert heard.bus_id == 3
    assert why in heard.reconnect


def test_heartbeat_of_a_drive_that_runs_says_nothing_new() -> None:
    loop = make_loop()
    assert loop.family.overhear(CanFrame(0x703, b"\x05")) == Overheard(3)
    assert loop.family.overhear(CanFrame(0x704, b"\x00")) is None


def test_rebooted_drive_says_so() -> None:
    loop = make_loop()
    loop.bus.reboot(loop.simulated(3))
    loop.exchange(loop.family.poll([3]))
    assert [heard.bus_id for heard in loop.overheard if "boot-up" in heard.reconnect] == [3]


def test_heartbeat_is_sent_as_often_as_configured() -> None:
    loop = make_loop(Options(36_000, heartbeat_ms=250))
    assert read(loop, HEARTBEAT_TIME) == 250
    beats = 0
    for _ in range(100):
        loop.now += 20_000_000  # type: ignore[assignment]
        beats += sum(frame == CanFrame(0x703, b"\x05") for _, frame in loop.bus.advance(loop.now))
    assert beats == pytest.approx(2 / 0.26, abs=1)


# --- orders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("statusword", "state"), GOLDEN_STATES)
def test_states_are_those_that_a_real_drive_told(statusword: int, state: State) -> None:
    assert state_of(statusword) == state


@given(st.integers(0, 0xFFFF))
def test_every_statusword_has_a_state_or_none(statusword: int) -> None:
    state = state_of(statusword)
    mask = 0x4F if state in (0x00, 0x40, 0x0F, 0x08) else 0x6F
    assert state is None or statusword & mask == state


def test_enable_climbs_the_states_and_holds() -> None:
    loop = make_loop()
    loop.servo(3).position_rad = 0.5
    assert loop.order(3, ENABLE) == "enabled, holding near 0.5000 rad"
    assert controls(loop) == [0x06, 0x07, 0x0F]
    assert read(loop, TARGET_POSITION) == pytest.approx(0.5 / tau * 36_000, abs=1)
    assert read(loop, MODE_DISPLAY) == 1


def test_csp_is_enabled_where_the_joint_is() -> None:
    loop = make_loop(Options(36_000, mode="csp"))
    loop.servo(3).position_rad = 0.4
    loop.order(3, ENABLE)
    loop.poll(3)
    loop.wait(1)
    told = loop.poll(3)[3]
    assert told.position_rad == pytest.approx(0.4, abs=0.001)
    assert not told.status & Status.faults()


def test_simulated_csp_drive_does_not_take_a_step() -> None:
    loop = make_loop(Options(36_000, mode="csp"))
    loop.order(3, ENABLE)
    write(loop, TARGET_POSITION, 10_000)
    assert loop.poll(3)[3].status & Status.FAULT_OVERLOAD
    assert loop.poll(3)[3].vendor_error == 0x8611


def test_fault_is_named_where_it_keeps_from_enabling() -> None:
    loop = make_loop()
    loop.servo(3).temperature_c = 120
    loop.poll(3)
    refusal = loop.refusal(3, ENABLE)
    assert refusal.reason == "refused"
    assert "4310: drive too hot" in refusal.detail


def test_drive_in_quick_stop_is_enabled() -> None:
    loop = make_loop()
    loop.order(3, ENABLE)
    write(loop, CONTROLWORD, 0x02)
    assert state_of(read(loop, STATUSWORD)) == State.QUICK_STOP
    loop.order(3, ENABLE)
    assert loop.poll(3)[3].status & Status.ENABLED


def test_setpoints_are_handed_over_by_the_edge_of_bit_4() -> None:
    loop = make_loop()
    loop.order(3, ENABLE)
    for target in (0.5, -0.5):
        loop.sent.clear()
        loop.order(3, Order(Kind.POSITION, target, 1.0))
        assert controls(loop) == [0x3F, 0x0F]
        loop.wait(2)
        assert loop.poll(3)[3].position_rad == pytest.approx(target, abs=0.001)


def test_halt_is_only_cleared_by_the_next_setpoint() -> None:
    loop = make_loop()
    loop.order(3, ENABLE)
    loop.order(3, Order(Kind.POSITION, 2.0, 1.0))
    loop.wait(0.5)
    loop.sent.clear()
    loop.order(3, STOP)
    assert controls(loop) == [0x10F]
    loop.order(3, ENABLE)
    loop.wait(2)
    assert loop.poll(3)[3].position_rad < 1
    loop.sent.clear()
    loop.order(3, Order(Kind.POSITION, 0.0, 1.0))
    assert controls(loop) == [0x3F, 0x0F]
    loop.wait(2)
    assert loop.poll(3)[3].position_rad == pytest.approx(0, abs=0.001)


def test_handshake_that_was_cut_off_is_taken_up_again() -> None:
    loop = make_loop()
    loop.order(3, ENABLE)
    write(loop, CONTROLWORD, 0x3F)
    loop.sent.clear()
    loop.order(3, Order(Kind.POSITION, 0.5, 1.0))
    assert controls(loop) == [0x0F, 0x3F, 0x0F]
    loop.wait(2)
    assert loop.poll(3)[3].position_rad == pytest.approx(0.5, abs=0.001)


def test_target_beyond_the_drives_own_limits_is_refused() -> None:
    loop = make_loop()  # 607D is +-18000 units, half a turn
    loop.order(3, ENABLE)
    refusal = loop.refusal(3, Order(Kind.POSITION, 3.2, 1.0))
    assert refusal.reason == "out_of_limits"
    assert "-18000 to 18000" in refusal.detail


@pytest.mark.parametrize("kind", [Kind.POSITION, Kind.VELOCITY])
def test_drive_that_somebody_put_into_another_mode_is_not_moved(kind: Kind) -> None:
    loop = make_loop(Options(36_000, mode="pp" if kind == Kind.POSITION else "pv"))
    loop.order(3, ENABLE)
    write(loop, Object(0x6060, 0, "int8", "mode"), 8)
    refusal = loop.refusal(3, Order(kind, 0.5, 1.0))
    assert refusal.reason == "not_enabled"
    assert "enable sets it" in refusal.detail
    loop.order(3, ENABLE)
    loop.order(3, Order(kind, 0.5, 1.0))


def test_stop_overrules_another_mode() -> None:
    loop = make_loop()
    loop.order(3, ENABLE)
    write(loop, Object(0x60FF, 0, "int32", "target velocity"), 3_600)
    write(loop, Object(0x6060, 0, "int8", "mode"), 3)
    loop.wait(0.5)
    assert loop.poll(3)[3].velocity_rad_s > 0.5
    loop.order(3, STOP)
    loop.wait(1)
    told = loop.poll(3)[3]
    assert told.velocity_rad_s == pytest.approx(0, abs=0.01)
    assert told.status & Status.ENABLED


def test_abort_of_an_order_is_its_refusal() -> None:
    loop = make_loop()
    reply = {3: bytes.fromhex("80 41 60 00 22 00 00 08")}
    with pytest.raises(MotorRefused, match=r"statusword.*present state.*08000022"):
        run_with_replies(loop.family.order(3, ENABLE), [reply])


def test_request_is_repeated_once_before_it_is_given_up() -> None:
    loop = make_loop()
    loop.simulated(3).faults.silent = True
    assert loop.refusal(3, STOP).reason == "no_reply"
    assert [str(frame) for frame in loop.sent] == ["603#4041600000000000"] * 2


def test_state_that_does_not_come_is_refused_with_the_one_that_is() -> None:
    loop = make_loop()
    with pytest.raises(MotorRefused, match="sent controlword 06; the drive is switch on disabled"):
        run_but(loop, loop.family.order(3, ENABLE), STATUSWORD, 0x0240)


# --- connecting -------------------------------------------------------------------------------------------------------


def test_device_that_is_no_drive_is_refused_and_found_by_no_scan() -> None:
    loop = make_loop()
    reply = {3: bytes.fromhex("43 00 10 00 91 01 00 00")}  # CiA 401: inputs and outputs
    with pytest.raises(MotorRefused, match="0x00000191"):
        run_with_replies(loop.family.connect(3), [reply])
    assert run_with_replies(loop.family.identify(3), [reply]) is None


def test_identify_needs_no_options() -> None:
    loop = Loop([Motor(0, "joint", "cia402", 3)])
    info = loop.run(loop.family.identify(3))
    assert info is not None
    assert (info.model, info.firmware, info.options) == ("Simulated servo drive", "1.0", {})
    assert all(frame.data[0] >> 5 in (2, 3) for frame in loop.sent)  # uploads and their segments
    with pytest.raises(MotorRefused, match="units_per_turn"):
        loop.connect(3)


def test_mode_that_the_drive_lacks_is_refused() -> None:
    loop = Loop([Motor(0, "joint", "cia402", 3, Options(36_000, mode="csp"))])
    with pytest.raises(MotorRefused, match="no mode csp: 6502 is 0x5"):
        run_but(loop, loop.family.connect(3), SUPPORTED_MODES, 0b101)


CONFIG = """
[arm]
name = "arm1"
[[bus]]
name = "can0"
type = "can"
interface = "virtual"
channel = "c"
rate_hz = 100
[[motor]]
name = "joint1"
partition = 0
bus = "can0"
protocol = "cia402"
id = 3
position_rad = [-3.14, 3.14]
velocity_rad_s = 5.0
temperature_c = 80.0
"""


def test_options_are_keys_of_the_configuration() -> None:
    text = 'units_per_turn = 36000\nmode = "pv"\ntemperature = "0x200D:1"\ntemperature_pdo = true\npdo = "read"\n'
    options = loads(CONFIG + text, "arm.toml").motors[0].options
    assert options == Options(36_000, mode="pv", temperature="0x200D:1", temperature_pdo=True, pdo="read")


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ("", "units_per_turn"),
        ("units_per_turn = 0", "units_per_turn is 0"),
        ("units_per_turn = -1.5", "units_per_turn is -1.5"),
        ('units_per_turn = 1\nmode = "pt"', "mode"),
        ('units_per_turn = 1\ntemperature = "200D"', "0x200D:1"),
        ("units_per_turn = 1\ntemperature_pdo = true", "temperature_pdo"),
        ("units_per_turn = 1\nheartbeat_ms = 70000", "heartbeat_ms is 70000"),
        ("units_per_turn = 1\ntemperature_scale = 0", "temperature_scale is 0"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(keys: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        loads(CONFIG + keys, "arm.toml")


# --- the simulated drive ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "value", "answered"),
    [
        (Object(0x6060, 0, "int8", "mode"), 3, "60"),
        (Object(0x6060, 0, "int8", "mode"), 4, "06090030"),
        (Object(0x607A, 0, "int32", "target"), 18_001, "06090031"),
        (Object(0x607A, 0, "int32", "target"), -18_001, "06090032"),
        (Object(0x607A, 0, "int16", "target"), 0, "06070010"),
        (Object(0x6041, 0, "uint16", "statusword"), 0, "06010002"),
        (Object(0x5FFF, 0, "uint8", "nothing"), 0, "06020000"),
        (Object(0x1018, 9, "uint8", "nothing"), 0, "06090011"),
        (Object(0x1A00, 0, "uint8", "mapping"), 1, "06010000"),  # while the PDO is valid
        (Object(0x1800, 2, "uint8", "transmission"), 1, "08000022"),  # while operational
    ],
)
def test_simulated_drive_takes_or_aborts_a_write(wanted: Object, value: int, answered: str) -> None:
    assert write(make_loop(), wanted, value) == answered


@pytest.mark.parametrize(
    ("words", "answered"),
    [
        ([0x60640020, 0x606C0020, 0x60770010], "06040042"),  # ten bytes
        ([0x60640010], "06040041"),  # not its length
        ([0x10080008], "06040041"),  # not mappable
        ([0x5FFF0008], "06040041"),
    ],
)
def test_simulated_drive_refuses_a_mapping_that_cannot_be(words: list[int], answered: str) -> None:
    loop = stored(PLAIN)
    mapped = [write(loop, Object(0x1A00, sub, "uint32", ""), word) for sub, word in enumerate(words, 1)]
    assert answered in (*mapped, write(loop, Object(0x1A00, 0, "uint8", ""), len(words)))


@pytest.mark.parametrize("request_hex", ["6000000000000000", "0000000000000000", "E000000000000000"])
def test_simulated_drive_aborts_a_segment_that_nothing_began(request_hex: str) -> None:
    (reply,) = ask(make_loop(), CanFrame(0x603, bytes.fromhex(request_hex)))
    assert reply.data[0] == 0x80
    assert reply.data[4:] == bytes.fromhex("01000405")


def test_simulated_drive_aborts_a_segment_with_the_wrong_toggle() -> None:
    loop = make_loop()
    ask(loop, make_upload(3, (0x1008, 0)))
    (reply,) = ask(loop, make_upload_segment(3, 1))
    assert reply.data == bytes.fromhex("80 08 10 00 00 00 03 05")


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (b"shoulder of the left arm", Object(0x2000, 0, "string", "place")),
        (b"", Object(0x2000, 0, "string", "place")),
    ],
)
def test_text_is_written_in_segments_and_read_back(text: bytes, asked: Object) -> None:
    loop = make_loop()
    requests = [CanFrame(0x603, pack("<BHBI", 0x21, *asked.key, len(text)))]
    for number in range(0, max(len(text), 1), 7):
        part = text[number : number + 7]
        head = number // 7 % 2 << 4 | (7 - len(part)) << 1 | (number + 7 >= len(text))
        requests.append(CanFrame(0x603, bytes((head,)) + part.ljust(7, b"\0")))
    for request in requests:
        assert ask(loop, request)[0].data[0] in (0x60, 0x20, 0x30)
    assert loop.run(upload(3, asked.key)) == text


@pytest.mark.parametrize(
    ("command", "state"), [(Nmt.START, 5), (Nmt.STOP, 4), (Nmt.PRE_OPERATIONAL, 0x7F), (Nmt.RESET_COMMUNICATION, 0)]
)
def test_simulated_drive_obeys_its_network_master(command: Nmt, state: int) -> None:
    loop = make_loop()
    heard = ask(loop, make_nmt(command, 3))
    loop.now += 1_000_000_000  # type: ignore[assignment]
    heard += [frame for _, frame in loop.bus.advance(loop.now)]
    assert CanFrame(0x703, bytes((state,))) in heard
    assert bool(ask(loop, make_upload(3, (0x1000, 0)))) == (command != Nmt.STOP)
    assert bool(ask(loop, CanFrame(0x080, b""))) == (command == Nmt.START)


def test_reset_of_the_node_takes_the_torque_away() -> None:
    loop = make_loop()
    loop.order(3, ENABLE)
    ask(loop, make_nmt(Nmt.RESET_NODE, 0))
    assert not loop.servo(3).enabled


def test_fault_is_told_by_emergency_message_register_and_history() -> None:
    loop = make_loop()
    loop.servo(3).temperature_c = 120
    sent = ask(loop, CanFrame(0x080, b""))
    assert sent[0] == CanFrame(0x083, pack("<HB5x", 0x4310, 0x09))
    assert [frame.can_id for frame in sent] == [0x083, 0x183, 0x283]
    assert read(loop, Object(0x1001, 0, "uint8", "")) == 0x09
    assert read(loop, Object(0x1003, 1, "uint32", "")) == 0x4310
    assert write(loop, CONTROLWORD, 0x80) == "60"
    assert state_of(read(loop, STATUSWORD)) == State.FAULT  # it is as hot as before


@pytest.mark.parametrize(
    ("transmission", "answers"),
    [(1, [True, True, True, True]), (2, [False, True, False, True])],
)
def test_synchronous_tpdos_come_at_every_nth_sync(transmission: int, answers: list[bool]) -> None:
    loop = stored(PLAIN, (STATUSWORD, POSITION), transmission=transmission)
    ask(loop, make_nmt(Nmt.START, 3))
    assert [bool(ask(loop, CanFrame(0x080, b""))) for _ in range(4)] == answers


def test_tpdo_on_events_comes_when_something_changes() -> None:
    loop = stored(PLAIN, (MODE_DISPLAY,), transmission=255)
    ask(loop, make_nmt(Nmt.START, 3))

    def told() -> list[CanFrame]:
        loop.now += 1_000_000_000  # type: ignore[assignment]
        return [frame for _, frame in loop.bus.advance(loop.now)]

    assert told() == [CanFrame(0x183, b"\0")]
    assert told() == []
    write(loop, Object(0x6060, 0, "int8", "mode"), 3)
    assert told() == [CanFrame(0x183, b"\3")]


def test_rpdos_drive_it_too() -> None:
    loop = make_loop()
    for control in (0x06, 0x07, 0x0F):
        ask(loop, CanFrame(0x203, pack("<H", control)))  # as it was set up: at a SYNC
        ask(loop, CanFrame(0x080, b""))
    ask(loop, CanFrame(0x303, pack("<Hb", 0x0F, 3)))
    ask(loop, CanFrame(0x503, pack("<Hi", 0x0F, 3_600)))
    loop.wait(1)
    assert loop.poll(3)[3].velocity_rad_s == pytest.approx(0.1 * tau, abs=0.01)


def test_simulated_drives_that_are_configured_otherwise_tell_their_temperature_there() -> None:
    for options in protocols.load("cia402").examples:
        loop = make_loop(options)
        loop.servo(3).temperature_c = 47.0
        refresh = loop.family.refresh(3)
        assert refresh is not None
        loop.run(refresh)
        assert loop.poll(3)[3].temperature_c == pytest.approx(47.0, abs=0.1)


# --- the gateway's heartbeat ------------------------------------------------------------------------------------------


def make_guarded(options: Options = PLAIN) -> Loop:
    loop = Loop([Motor(0, "joint", "cia402", 3, options, watchdog_ns=500 * MS)], STILL)
    assert loop.connect(3) is not None
    loop.sent.clear()
    return loop


def objects_of(loop: Loop) -> dict[Any, Any]:
    (responder,) = loop.bus._responders
    assert isinstance(responder, SimulatedCia402)
    return responder._drives[3].node._objects


def test_drive_is_told_to_consume_the_heartbeat_of_node_127_and_each_poll_brings_one() -> None:
    loop = make_guarded()
    assert [str(frame) for frame in loop.family.poll([3]).requests] == ["77F#05", "080#"]
    loop.order(3, ENABLE)
    assert "603#23161001F4017F00" in [str(frame) for frame in loop.sent]
    loop.sent.clear()
    loop.order(3, Order(Kind.POSITION, 0.5, 1.0))
    assert all(frame.can_id != 0x77F for frame in loop.sent)


@pytest.mark.parametrize("key", [(0x1016, 1), (0x6007, 0)])
def test_drive_that_cannot_consume_a_heartbeat_is_not_enabled(key: tuple[int, int]) -> None:
    loop = make_guarded()
    objects_of(loop)[key].writable = False
    objects_of(loop)[key].value = 0
    refusal = loop.refusal(3, ENABLE)
    assert refusal.reason == "refused"
    assert refusal.detail.startswith("its watchdog cannot be armed: ")
    assert f"{key[0]:04X}" in refusal.detail
    assert "read only" in refusal.detail
    assert not loop.servo(3).enabled


@pytest.mark.parametrize(
    ("option", "kept", "state"),
    [(0, 3, State.QUICK_STOP), (1, 1, State.FAULT), (2, 2, State.SWITCH_ON_DISABLED), (3, 3, State.QUICK_STOP)],
)
def test_drive_that_misses_the_heartbeat_does_what_its_option_says_and_one_without_is_given_one(
    option: int, kept: int, state: State
) -> None:
    loop = make_guarded()
    write(loop, ABORT_CONNECTION, option)
    loop.order(3, ENABLE)
    assert read(loop, ABORT_CONNECTION) == kept
    loop.wait(0.6)
    assert state_of(read(loop, STATUSWORD)) == state
    assert loop.poll(3) == {}  # it is no longer operational
    assert loop.connect(3) is not None
    loop.order(3, Order(Kind.CLEAR_FAULT))
    loop.order(3, ENABLE)
    assert loop.poll(3)[3].status & (Status.faults() | Status.ENABLED) == Status.ENABLED


def test_drive_without_an_rpdo_gets_its_trigger_by_sdo() -> None:
    options = Options(36_000, pdo="read")
    loop = Loop([Motor(0, "joint", "cia402", 3, options)], STILL)
    objects_of(loop)[0x1400, 1].value |= INVALID
    assert loop.connect(3) is not None
    loop.order(3, ENABLE)
    loop.sent.clear()
    loop.order(3, Order(Kind.POSITION, 0.5, 1.0))
    assert not any(frame.can_id == 0x203 for frame in loop.sent)
    assert controls(loop) == [0x3F, 0x0F]
    loop.wait(2)
    assert loop.poll(3)[3].position_rad == pytest.approx(0.5, abs=0.001)


def test_halt_is_the_quick_stop_of_all_at_one_sync() -> None:
    loop = make_loop()
    loop.order(3, ENABLE)
    exchange = loop.family.halt([3])
    assert [str(frame) for frame in exchange.requests] == ["203#0200", "080#"]
    loop.exchange(exchange)
    assert state_of(read(loop, STATUSWORD)) == State.QUICK_STOP
