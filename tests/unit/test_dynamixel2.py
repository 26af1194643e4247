"""Dynamixel 2.0: packets on the wire, the gateway's decisions, the simulated servos' registers."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf, isnan, nan, pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import MS, MonotonicNs
from drivers.errors import MotorRefused
from drivers.family import Exchange, run_with_replies
from drivers.motor import Feedback, Kind, Motor, MotorInfo, Order, Status
from drivers.protocols._dynamixel2 import (
    ALERT,
    BROADCAST,
    CONTROL,
    FEEDBACK,
    GOALS,
    IDENTITY,
    LONGEST,
    RAD_S,
    STATE,
    Decoder,
    Error,
    HardwareError,
    Instruction,
    OperatingMode,
    Options,
    Packet,
    Register,
    ampere_of,
    compute_crc,
    decode_position,
    encode_packet,
    encode_position,
    encode_profile_velocity,
    knows_fast_sync_read,
    make_ping,
    make_sync_read,
    make_sync_write,
)
from drivers.protocols.dynamixel2 import TRUSTED, Dynamixel2
from drivers.sim.build import SimulationSettings
from tests.memory_loop import STILL, Loop

# ROBOTIS e-Manual, Protocol 2.0, examples of each instruction; CRCs recomputed
GOLDEN = [
    ("ping", Packet(1, Instruction.PING), "FFFFFD00 01 0300 01 194E"),
    ("ping reply", Packet(1, Instruction.STATUS, b"\x06\x04\x26"), "FFFFFD00 01 0700 55 00 060426 655D"),
    ("read", Packet(1, Instruction.READ, b"\x84\x00\x04\x00"), "FFFFFD00 01 0700 02 84000400 1D15"),
    ("read reply", Packet(1, Instruction.STATUS, b"\xa6\x00\x00\x00"), "FFFFFD00 01 0800 55 00 A6000000 8CC0"),
    ("write", Packet(1, Instruction.WRITE, b"\x74\x00\x00\x02\x00\x00"), "FFFFFD00 01 0900 03 740000020000 CA89"),
]
SYNC_READ = "FFFFFD00 FE 0900 82 84000400 0102 CEFA"
SYNC_WRITE = "FFFFFD00 FE 1100 83 74000400 0196000000 02AA000000 8287"
FAST_SYNC_READ = "FFFFFD00 FE 0A00 8A 84000400 030704 20F2"
FAST_REPLY = "FFFFFD00 FE 1900 55 00 03 A6000000 8408 00 07 1F080000 16CA 00 04 FF030000 D19E"
FAST_BLOCKS = [
    Packet(3, Instruction.STATUS, b"\xa6\x00\x00\x00"),
    Packet(7, Instruction.STATUS, b"\x1f\x08\x00\x00"),
    Packet(4, Instruction.STATUS, b"\xff\x03\x00\x00"),
]

# parameters as if made to be stuffed
params = st.lists(st.sampled_from([b"\xff", b"\xfd", b"\xff\xff\xfd", b"\xff\xff\xfd\x00", b"\x00", b"\x55"])).map(
    b"".join
)
packets = st.one_of(
    st.builds(Packet, st.integers(0, 252), st.just(Instruction.STATUS), params, st.integers(0, 0xFF)),
    st.builds(
        Packet,
        st.integers(0, BROADCAST),
        st.sampled_from([1, 2, 3, 0x82, 0x83]),
        params | st.binary(max_size=99),
        st.just(0),
    ),
)


@pytest.mark.parametrize(("packet", "wire"), [row[1:] for row in GOLDEN], ids=[row[0] for row in GOLDEN])
def test_packets_are_those_of_the_manual(packet: Packet, wire: str) -> None:
    assert encode_packet(packet) == bytes.fromhex(wire)
    assert Decoder().feed(bytes.fromhex(wire)) == [packet]


def test_sync_packets_are_those_of_the_manual() -> None:
    assert make_sync_read([1, 2], 132, 4) == bytes.fromhex(SYNC_READ)
    assert make_sync_read([3, 7, 4], 132, 4, fast=True) == bytes.fromhex(FAST_SYNC_READ)
    assert make_sync_write(116, {1: b"\x96\0\0\0", 2: b"\xaa\0\0\0"}) == bytes.fromhex(SYNC_WRITE)


@given(st.lists(st.integers(0, len(bytes.fromhex(FAST_REPLY)))))
def test_fast_reply_of_the_manual_is_one_packet_a_servo_however_it_is_cut(cuts: list[int]) -> None:
    assert feed_in_pieces(Decoder(block=4), bytes.fromhex(FAST_REPLY), cuts) == FAST_BLOCKS


def test_crc_is_that_of_the_polynomial_bit_by_bit() -> None:
    def by_bits(data: bytes) -> int:
        crc = 0
        for byte in data:
            crc ^= byte << 8
            for _ in range(8):
                crc = (crc << 1 ^ (0x8005 if crc & 0x8000 else 0)) & 0xFFFF
        return crc

    for data in (b"", b"\x01", bytes(range(256)), b"\xff" * 33, bytes.fromhex(FAST_REPLY)):
        assert compute_crc(data) == by_bits(data)


def feed_in_pieces(decoder: Decoder, wire: bytes, cuts: Sequence[int]) -> list[Packet]:
    places = [0, *sorted(cuts), len(wire)]
    return [packet for start, end in pairwise(places) for packet in decoder.feed(wire[start:end])]


@given(st.lists(packets, max_size=5), st.lists(st.integers(0, 500)))
def test_any_packets_survive_the_wire_however_it_is_cut(sent: list[Packet], cuts: list[int]) -> None:
    decoder = Decoder()
    assert feed_in_pieces(decoder, b"".join(map(encode_packet, sent)), cuts) == sent
    assert decoder.garbage == 0


@given(packets)
def test_no_header_is_ever_seen_inside_a_packet(packet: Packet) -> None:
    assert encode_packet(packet).rfind(b"\xff\xff\xfd\x00") == 0


def test_stuffed_byte_counts_in_length_and_crc() -> None:
    wire = encode_packet(Packet(1, Instruction.STATUS, b"\xff\xff\xfd\x00"))
    assert wire[5:-2] == bytes.fromhex("0900 55 00 FFFFFDFD00")
    assert Decoder().feed(wire) == [Packet(1, Instruction.STATUS, b"\xff\xff\xfd\x00")]


@given(st.lists(st.binary(max_size=300) | st.just(b"\xff\xff\xfd\x00\xfe\x80\x00\x55")), st.sampled_from([0, 21]))
def test_no_packet_is_invented_and_no_memory_kept(chunks: list[bytes], block: int) -> None:
    decoder = Decoder(block=block)
    for chunk in chunks:
        decoder.feed(chunk)
        assert len(decoder._rest) < 7 + LONGEST


@given(st.binary(max_size=400))
def test_good_packets_are_found_again_after_any_garbage(garbage: bytes) -> None:
    good = Packet(3, Instruction.STATUS, bytes(range(FEEDBACK.size)))
    assert Decoder(longest=100).feed(garbage + 10 * encode_packet(good))[-1] == good


@given(st.binary(max_size=50).filter(lambda data: b"\xff" not in data))
def test_garbage_is_counted_byte_by_byte(garbage: bytes) -> None:
    decoder = Decoder()
    decoder.feed(garbage + make_ping(1) + garbage)
    assert decoder.garbage == 2 * len(garbage)


def test_packet_that_lost_its_end_does_not_take_the_next_one_with_it() -> None:
    wire = encode_packet(Packet(1, Instruction.STATUS, bytes(FEEDBACK.size)))
    good = Packet(2, Instruction.STATUS, bytes(FEEDBACK.size))
    assert Decoder().feed(wire[:-3] + encode_packet(good)) == [good]


def test_damaged_length_holds_up_no_more_than_the_family_ever_reads() -> None:
    family = make_family(1)
    reply = Packet(1, Instruction.STATUS, bytes(FEEDBACK.size))
    assert list(family.unpack(bytes.fromhex("FFFFFD00 01 FF03 55 00") + encode_packet(reply))) == [reply]


def test_reset_forgets_half_a_packet_and_half_a_fast_reply() -> None:
    for wire in (encode_packet(FAST_BLOCKS[0]), bytes.fromhex(FAST_REPLY)):
        decoder = Decoder(block=4)
        decoder.feed(wire[:9])
        decoder.reset()
        assert decoder.feed(wire[9:]) == []
        assert decoder.feed(encode_packet(FAST_BLOCKS[1])) == [FAST_BLOCKS[1]]


# --- fast replies of which something is wrong -------------------------------------------------------------------------


def make_fast_reply() -> bytes:
    loop = make_loop(1, 2, 3, 4, options=Options(fast_sync=True))
    return b"".join(reply for _, reply in loop.bus.respond(make_sync_read([1, 2, 3, 4], 126, 21, fast=True), loop.now))


def ids_in(wire: bytes) -> list[int]:
    return [packet.bus_id for packet in Decoder(block=FEEDBACK.size).feed(wire)]


@pytest.mark.parametrize("at", range(25))
def test_damaged_block_costs_itself_and_at_most_the_next(at: int) -> None:
    wire = bytearray(make_fast_reply())
    wire[8 + 25 + at] ^= 0x10
    in_crc = at >= 23
    assert ids_in(bytes(wire)) == ([1, 4] if in_crc else [1, 3, 4])


def test_fast_reply_that_ends_early_gives_what_was_there() -> None:
    wire = make_fast_reply()
    assert ids_in(wire[: 8 + 2 * 25]) == [1, 2]
    assert ids_in(wire[: 8 + 3 * 25 - 1]) == [1, 2]


def test_block_that_was_lost_on_the_way_is_not_replaced_by_another() -> None:
    wire = make_fast_reply()
    assert ids_in(wire[: 8 + 25] + wire[8 + 50 :]) == [1, 4]  # 3 went on from the CRC of 2, which nobody has


def test_one_silent_servo_is_asked_with_the_others_plainly_until_it_is_trusted_again() -> None:
    loop = make_loop(1, 2, 3, options=Options(fast_sync=True))
    poll = loop.family.poll([1, 2, 3])

    def turn() -> tuple[int, list[int]]:
        loop.sent.clear()
        replied = sorted(loop.exchange(poll))
        (request,) = Decoder().feed(loop.sent[0])
        return request.instruction, replied

    assert turn() == (Instruction.FAST_SYNC_READ, [1, 2, 3])
    loop.simulated(2).faults.silent = True
    assert turn() == (Instruction.FAST_SYNC_READ, [1, 3])
    assert turn() == (Instruction.SYNC_READ, [1, 3])
    loop.simulated(2).faults.silent = False
    assert [turn() for _ in range(TRUSTED)] == [(Instruction.SYNC_READ, [1, 2, 3])] * TRUSTED
    assert turn() == (Instruction.FAST_SYNC_READ, [1, 2, 3])


@pytest.mark.parametrize(
    ("model", "firmware", "knows"),
    [
        ("XM430-W350", 44, False),
        ("XM430-W350", 45, True),
        ("XW540-T260", 45, True),
        ("XL330-M288", 45, False),
        ("XL330-M288", 46, True),
        ("2XL430-W250", 50, False),
        ("model 9999", 50, False),
    ],
)
def test_fast_sync_read_is_used_from_the_firmware_on_that_knows_it(model: str, firmware: int, knows: bool) -> None:
    assert knows_fast_sync_read(model, firmware) is knows


def test_one_old_servo_makes_all_be_asked_plainly() -> None:
    family = make_family(1, 2, options=Options(fast_sync=True))
    for bus_id, firmware in ((1, 45), (2, 44)):
        info = connect(family, bus_id, firmware=firmware)
        assert info.details["fast_sync"] == (bus_id == 1)
    assert [request_of(family.poll(ids)) for ids in ([1], [1, 2])] == [
        Instruction.FAST_SYNC_READ,
        Instruction.SYNC_READ,
    ]


# --- units ------------------------------------------------------------------------------------------------------------


@given(st.integers(-1_048_575, 1_048_575))
def test_every_step_survives_the_way_through_rad(step: int) -> None:
    assert encode_position(decode_position(step)) == step


@given(st.floats(0, 30))
def test_approach_is_never_faster_than_asked_and_never_unlimited(velocity_rad_s: float) -> None:
    speed = encode_profile_velocity(velocity_rad_s)
    assert speed >= 1
    assert speed == 1 or speed * RAD_S <= velocity_rad_s + 1e-9


def test_unit_of_velocity_is_what_the_manual_rounds() -> None:
    assert round(RAD_S * 60 / (2 * pi), 3) == 0.229


@pytest.mark.parametrize(
    ("model", "ampere"),
    [("XM430-W350", 0.00269), ("XH430-V350", 0.00134), ("XL330-M288", 0.001), ("XL430-W250", None), ("model 1", None)],
)
def test_unit_of_current_is_the_models_own(model: str, ampere: float | None) -> None:
    assert ampere_of(model) == ampere


def test_feedback_is_in_si_units() -> None:
    family = make_family(1, options=Options(nm_per_a=2.0))
    connect(family, 1, torque_enable=1)
    told = poll_reply(family, FEEDBACK.layout.pack(-100, -20, -2048, 121, 30))
    assert told.current_a == pytest.approx(-0.269)
    assert told.torque_nm == pytest.approx(-0.538)
    assert told.velocity_rad_s == pytest.approx(-20 * 0.0239691227)
    assert told.position_rad == pytest.approx(-2 * pi)
    assert told.voltage_v == pytest.approx(12.1)
    assert told.temperature_c == 30
    assert told.status == Status.ENABLED | Status.MOVING
    assert told.vendor_error == 0


def test_what_a_model_does_not_tell_is_nan() -> None:
    family = make_family(1)
    connect(family, 1, model=1060)  # XL430-W250, which has its load where others have the current
    told = poll_reply(family, FEEDBACK.layout.pack(500, 10, 2048, 121, 30))
    assert isnan(told.current_a)
    assert isnan(told.torque_nm)
    assert not told.status & Status.MOVING  # not above the moving threshold


@pytest.mark.parametrize(
    "values", [{"mode": "pwm"}, {"mode": "fast"}, {"nm_per_a": 0.0}, {"nm_per_a": nan}, {"nm_per_a": inf}]
)
def test_option_that_cannot_be_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Options(**values)  # type: ignore[arg-type]  # that is the point


def test_current_mode_without_a_torque_constant_is_reported() -> None:
    motors = [Motor(0, "joint1", "dynamixel2", 1, Options(mode="current"))]
    assert [(motor.name, key) for motor, key, _ in Dynamixel2.clashes(motors)] == [("joint1", "nm_per_a")]
    assert Kind.TORQUE not in Dynamixel2.kinds_of(motors[0])


# --- the gateway's side -----------------------------------------------------------------------------------------------


def make_motors(*bus_ids: int, options: Options) -> list[Motor]:
    return [Motor(index, f"joint{bus_id}", "dynamixel2", bus_id, options) for index, bus_id in enumerate(bus_ids)]


def make_family(*bus_ids: int, options: Options = Options()) -> Dynamixel2:  # noqa: B008  frozen
    return Dynamixel2(make_motors(*bus_ids, options=options))


def make_loop(
    *bus_ids: int,
    options: Options = Options(),  # noqa: B008  frozen
    settings: SimulationSettings = STILL,
) -> Loop:
    loop = Loop(make_motors(*bus_ids, options=options), settings)
    for bus_id in bus_ids:
        assert loop.connect(bus_id) is not None
    return loop


def make_state(torque_enable: int = 0, drive_mode: int = 0) -> Packet:
    settings = (250, drive_mode, OperatingMode.POSITION, 10, 1193, 350, 4095, 0, torque_enable, 2, 0)
    return Packet(1, Instruction.STATUS, STATE.layout.pack(*settings, 0, 2048))


def connect(
    family: Dynamixel2, bus_id: int, model: int = 1020, firmware: int = 48, torque_enable: int = 0
) -> MotorInfo:
    identity = Packet(bus_id, Instruction.STATUS, IDENTITY.pack(model, firmware))
    state = make_state(torque_enable=torque_enable)
    info = run_with_replies(family.connect(bus_id), [{bus_id: identity}, {bus_id: state}])
    assert info is not None
    return info


def request_of(exchange: Exchange[bytes, Packet]) -> int:
    (packet,) = Decoder().feed(b"".join(exchange.requests))
    return packet.instruction


def poll_reply(family: Dynamixel2, data: bytes, error: int = 0) -> Feedback:
    reply = family.poll([1]).match(Packet(1, Instruction.STATUS, data, error))
    assert reply is not None
    feedback: Feedback = reply[1]
    return feedback


def ask(loop: Loop, *requests: Packet) -> list[Packet]:
    """Another master's requests, and what was answered."""
    arrived = [reply for request in requests for _, reply in loop.bus.respond(encode_packet(request), loop.now)]
    return Decoder().feed(b"".join(arrived))


def poke(loop: Loop, bus_id: int, register: Register, data: bytes) -> list[Packet]:
    return ask(loop, Packet(bus_id, Instruction.WRITE, register.to_bytes(2, "little") + data))


def peek(loop: Loop, bus_id: int, register: Register, size: int) -> int:
    (reply,) = ask(loop, Packet(bus_id, Instruction.READ, bytes((register, 0, size, 0))))
    return int.from_bytes(reply.params, "little", signed=True)


def i32(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


def refresh(loop: Loop, bus_id: int) -> bool:
    """One turn of refresh; whether there was anything to do."""
    procedure = loop.family.refresh(bus_id)
    if procedure is not None:
        loop.run(procedure)
    return procedure is not None


def test_every_block_that_is_read_has_a_length_of_its_own() -> None:
    sizes = [IDENTITY.size, CONTROL.size, FEEDBACK.size, GOALS.size, STATE.size, 0]
    assert sizes == [3, 35, 21, 22, 127, 0]
    assert [str(block) for block in (CONTROL, FEEDBACK, GOALS, STATE)] == [
        "registers 64..98",
        "registers 126..146",
        "registers 98..119",
        "registers 9..135",
    ]


def test_servo_is_introduced_with_model_firmware_and_its_own_limits() -> None:
    info = Loop(make_motors(1, options=Options())).connect(1)
    assert (info.model, info.firmware) == ("XM430-W350", "48")
    assert info.details["mode"] == OperatingMode.POSITION
    assert info.details["min_position_rad"] == pytest.approx(-pi)
    assert info.details["max_position_rad"] == pytest.approx(pi, abs=0.01)
    assert info.options == {}


def test_mode_of_a_found_servo_is_told_for_its_configuration() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.OPERATING_MODE, bytes((OperatingMode.VELOCITY,)))
    info = loop.run(loop.family.identify(1))
    assert info is not None
    assert info.options == {"mode": "velocity"}


def test_servo_that_answers_pings_alone_is_refused_with_the_register_to_change() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.STATUS_RETURN_LEVEL, b"\x00")
    with pytest.raises(MotorRefused, match="register 68"):
        loop.connect(1)


def test_echoes_are_no_replies() -> None:
    loop = make_loop(1)
    loop.sent.clear()
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 0.1, 0.1))
    assert loop.sent
    assert [packet for unit in loop.sent for packet in loop.family.unpack(unit)] == []
    assert loop.family.garbage == 0


def test_goal_is_at_the_present_position_before_the_torque_comes_on() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.GOAL_POSITION, i32(3000))
    loop.sent.clear()
    loop.order(1, Order(Kind.ENABLE))
    writes = [p.params for unit in loop.sent for p in Decoder().feed(unit) if p.instruction == Instruction.SYNC_WRITE]
    assert writes == [bytes((116, 0, 4, 0, 1)) + i32(2048), bytes((64, 0, 1, 0, 1, 1))]
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(0, abs=0.002)


def test_orders_work_with_a_servo_that_acknowledges_only_reads() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.STATUS_RETURN_LEVEL, b"\x01")
    loop.order(1, Order(Kind.ENABLE))
    assert loop.order(1, Order(Kind.POSITION, 1.0, 2.0)) == "going to 1.0002 rad at 1.9894 rad/s"
    loop.wait(2)
    assert loop.servo(1).position_rad == pytest.approx(1.0, abs=0.002)


def test_creeping_velocity_creeps() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 1.0, velocity_rad_s=0.0001))
    assert peek(loop, 1, Register.PROFILE_VELOCITY, 4) == 1


def test_approach_is_no_faster_than_the_servos_velocity_limit() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 1.0, velocity_rad_s=20.0))
    assert peek(loop, 1, Register.PROFILE_VELOCITY, 4) == 350


def test_time_based_profile_is_refused() -> None:
    family = make_family(1)
    order = family.order(1, Order(Kind.POSITION, 0.5, 1.0))
    with pytest.raises(MotorRefused, match=r"register 10\) is 0x4.*clear its bit 2"):
        run_with_replies(order, [{1: make_state(torque_enable=1, drive_mode=4)}])


def test_target_beyond_the_servos_own_limits_is_refused_with_both() -> None:
    loop = make_loop(1, settings=SimulationSettings(motion="still", position_rad={0: (-1.0, 1.0)}))
    refusal = loop.refusal(1, Order(Kind.POSITION, 1.2, 1.0))
    assert refusal.reason == "out_of_limits"
    assert refusal.detail == "1.2 rad is 2830 step; the servo allows 1396..2700"


def test_write_that_did_not_take_is_refused_with_what_was_sent_and_read() -> None:
    family = make_family(1)
    order = family.order(1, Order(Kind.POSITION, 0.0, 1.0))
    goals = Packet(1, Instruction.STATUS, GOALS.layout.pack(0, 885, 1193, 0, 0, 7, 9))
    with pytest.raises(MotorRefused, match=r"profile_velocity \(register 112\): sent 41 and 2048, read 7 and 9"):
        run_with_replies(order, [{1: make_state(torque_enable=1)}, {}, {1: goals}])


def test_read_that_the_servo_refuses_is_told_with_its_error() -> None:
    family = make_family(1)
    order = family.order(1, Order(Kind.STOP))
    exchange = next(order)
    reply = exchange.match(Packet(1, Instruction.STATUS, b"", Error.ACCESS))
    assert reply is not None
    with pytest.raises(MotorRefused, match=r"read of registers 9\.\.135: access error"):
        order.send(dict([reply]))


# modes


def test_enable_sets_the_configured_mode_while_the_torque_is_off() -> None:
    loop = make_loop(1, options=Options(mode="extended_position"))
    loop.order(1, Order(Kind.ENABLE))
    assert peek(loop, 1, Register.OPERATING_MODE, 1) == OperatingMode.EXTENDED_POSITION
    assert loop.servo(1).enabled


def test_several_turns_are_a_matter_of_the_mode() -> None:
    settings = SimulationSettings(motion="still", enabled=False, position_rad={0: (-20.0, 20.0)})
    loop = make_loop(1, options=Options(mode="extended_position"), settings=settings)
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 10.0, 5.0))
    loop.wait(5)
    assert loop.poll(1)[1].position_rad == pytest.approx(10.0, abs=0.002)
    single = make_loop(1, options=Options(mode="position"), settings=settings)
    single.order(1, Order(Kind.ENABLE))
    assert single.refusal(1, Order(Kind.POSITION, 10.0, 5.0)).reason == "out_of_limits"


def test_mode_is_not_changed_under_torque() -> None:
    loop = make_loop(1, options=Options(mode="velocity"))
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x01")
    refusal = loop.refusal(1, Order(Kind.ENABLE))
    assert "register 11) is 3 (position), not 1 (velocity)" in refusal.detail
    assert "disable first" in refusal.detail
    assert loop.servo(1).enabled


@pytest.mark.parametrize("mode", [OperatingMode.VELOCITY, OperatingMode.CURRENT, OperatingMode.PWM])
def test_position_in_a_mode_that_takes_none_is_refused_with_what_to_configure(mode: OperatingMode) -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.OPERATING_MODE, bytes((mode,)))
    loop.order(1, Order(Kind.ENABLE))
    refusal = loop.refusal(1, Order(Kind.POSITION, 0.1, 0.1))
    assert f"register 11) is {mode:d} ({mode.name.lower()}), which takes no position" in refusal.detail
    assert "configure mode = position or extended_position or current_position" in refusal.detail
    loop.order(1, Order(Kind.STOP))
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(0, abs=0.002)


def test_velocity_that_another_master_ordered_is_stopped() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.OPERATING_MODE, bytes((OperatingMode.VELOCITY,)))
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x01")
    poke(loop, 1, Register.GOAL_VELOCITY, i32(-50))
    loop.wait(1)
    assert loop.servo(1).velocity_rad_s == pytest.approx(-50 * RAD_S)
    assert loop.order(1, Order(Kind.STOP)) == "goal velocity is 0"
    loop.wait(1)
    assert loop.servo(1).velocity_rad_s == 0


def test_velocity_beyond_the_servos_limit_is_refused() -> None:
    loop = make_loop(1, options=Options(mode="velocity"))
    loop.order(1, Order(Kind.ENABLE))
    refusal = loop.refusal(1, Order(Kind.VELOCITY, -9.0))
    assert refusal.detail == "-9.0 rad/s; the servo's velocity limit (register 44) is 8.3892 rad/s"


def test_torque_is_a_current_by_the_configured_constant() -> None:
    loop = make_loop(1, options=Options(mode="current", nm_per_a=2.0))
    loop.order(1, Order(Kind.ENABLE))
    assert loop.order(1, Order(Kind.TORQUE, -0.538)) == "pushing with -0.5380 N m"
    assert peek(loop, 1, Register.GOAL_CURRENT, 2) == -100
    assert loop.refusal(1, Order(Kind.TORQUE, 6.5)).detail.endswith("(register 38) allows 6.4183 N m")


def test_torque_of_a_model_whose_current_has_no_known_unit_is_refused() -> None:
    family = make_family(1, options=Options(mode="current", nm_per_a=1.0))
    connect(family, 1, model=1060)
    with pytest.raises(MotorRefused, match="unit of this model's current is not known"):
        run_with_replies(family.order(1, Order(Kind.TORQUE, 0.1)), [])


# faults


def test_alert_shows_in_the_very_next_sample_and_by_name_after_the_next_refresh() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    assert refresh(loop, 1)
    assert not refresh(loop, 1)  # nothing to look into
    loop.servo(1).temperature_c = 90.0
    told = loop.poll(1)[1]
    assert told.status & Status.faults() == Status.FAULT_OTHER
    assert told.vendor_error == ALERT
    assert refresh(loop, 1)
    told = loop.poll(1)[1]
    assert told.status & Status.faults() == Status.FAULT_TEMPERATURE
    assert told.vendor_error == HardwareError.OVERHEATING
    assert not told.status & Status.ENABLED
    assert not refresh(loop, 1)


def test_every_bit_of_the_hardware_error_has_its_common_one() -> None:
    family = make_family(1)
    connect(family, 1)
    for bit, common in [
        (0x01, Status.FAULT_VOLTAGE),
        (0x04, Status.FAULT_TEMPERATURE),
        (0x08, Status.FAULT_ENCODER),
        (0x10, Status.FAULT_CURRENT),
        (0x20, Status.FAULT_OVERLOAD),
        (0x40, Status.FAULT_OTHER),
        (0x21, Status.FAULT_VOLTAGE | Status.FAULT_OVERLOAD),
        (0x41, Status.FAULT_VOLTAGE | Status.FAULT_OTHER),
    ]:
        poll_reply(family, bytes(FEEDBACK.size), error=ALERT)
        read = family.refresh(1)
        assert read is not None
        run_with_replies(read, [{1: Packet(1, Instruction.STATUS, CONTROL.layout.pack(0, bit, 0), ALERT)}])
        told = poll_reply(family, bytes(FEEDBACK.size), error=ALERT)
        assert (told.status & Status.faults(), told.vendor_error) == (common, bit)
        assert poll_reply(family, bytes(FEEDBACK.size)).status == 0


def test_errors_are_explained_in_the_manuals_words() -> None:
    assert Dynamixel2.explain(0x25) == ["input voltage error", "overheating error", "overload error"]


def test_latched_fault_outlives_its_cause_and_keeps_the_torque_off_until_it_is_cleared() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    loop.servo(1).temperature_c = 90.0
    loop.wait(0.1)
    loop.servo(1).temperature_c = 25.0
    refusal = loop.refusal(1, Order(Kind.ENABLE))
    assert refusal.detail == "hardware error status (register 70): overheating error; clear the fault first"
    assert "overheating" in loop.refusal(1, Order(Kind.POSITION, 0.1, 1.0)).detail
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x01")
    assert not loop.servo(1).enabled
    assert loop.order(1, Order(Kind.CLEAR_FAULT)) == "rebooted, no fault, torque is off"
    loop.order(1, Order(Kind.ENABLE))


def test_clearing_without_a_fault_reboots_nothing() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    assert loop.order(1, Order(Kind.CLEAR_FAULT)) == "no fault"
    assert loop.servo(1).enabled


def test_fault_whose_cause_is_still_there_is_not_cleared() -> None:
    loop = make_loop(1)
    loop.servo(1).temperature_c = 90.0
    assert "after the reboot" in loop.refusal(1, Order(Kind.CLEAR_FAULT)).detail


def test_servo_that_stays_away_after_its_reboot_is_done_if_it_acknowledged() -> None:
    error = Packet(1, Instruction.STATUS, CONTROL.layout.pack(0, 4, 0), ALERT)
    acknowledgement = Packet(1, Instruction.STATUS, b"", ALERT)
    family = make_family(1)
    done = run_with_replies(family.order(1, Order(Kind.CLEAR_FAULT)), [{1: error}, {1: acknowledgement}, *[{}] * 20])
    assert "as it has acknowledged" in done
    with pytest.raises(MotorRefused, match="no_reply"):
        run_with_replies(family.order(1, Order(Kind.CLEAR_FAULT)), [{1: error}, {}, *[{}] * 20])


def test_voltage_beyond_its_limits_is_told_and_does_not_switch_the_torque_off() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    loop.servo(1).voltage_v = 9.0
    loop.poll(1)
    assert refresh(loop, 1)
    assert loop.poll(1)[1].status & (Status.faults() | Status.ENABLED) == Status.FAULT_VOLTAGE | Status.ENABLED


def test_expired_watchdog_is_named_where_goals_would_fail() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 2.0, 1.0))
    poke(loop, 1, Register.BUS_WATCHDOG, b"\x05")  # 100 ms
    loop.wait(0.5)
    stopped_rad = loop.servo(1).position_rad
    assert stopped_rad < 1
    assert "bus watchdog (register 98) has expired" in loop.refusal(1, Order(Kind.POSITION, 0.1, 1.0)).detail
    assert loop.order(1, Order(Kind.STOP)) == "its bus watchdog has stopped it already"
    (reply,) = poke(loop, 1, Register.GOAL_POSITION, i32(2048))
    assert reply.error == Error.RANGE
    assert refresh(loop, 1)
    assert loop.poll(1)[1].status & Status.FAULT_COMMUNICATION
    stopped_rad = loop.servo(1).position_rad
    loop.order(1, Order(Kind.ENABLE))
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(stopped_rad, abs=0.002)
    loop.order(1, Order(Kind.POSITION, 0.1, 5.0))
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(0.1, abs=0.002)


def test_torque_that_another_master_switched_off_is_noticed_by_refresh() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x00")
    assert refresh(loop, 1)
    assert not loop.poll(1)[1].status & Status.ENABLED


def test_halt_is_the_manuals_sync_write() -> None:
    """Goals of two servos, byte for byte (ROBOTIS e-Manual, Protocol 2.0, sync write)."""
    loop = make_loop(1, 2)
    for bus_id, raw in ((1, 150), (2, 170)):
        loop.servo(bus_id).position_rad = loop.servo(bus_id).goal_rad = decode_position(raw)
        loop.order(bus_id, Order(Kind.ENABLE))
    loop.poll(1, 2)
    golden = bytes.fromhex("FFFFFD00 FE 1100 83 74000400 0196000000 02AA000000 8287")
    assert list(loop.family.halt([1, 2]).requests) == [golden]


@pytest.mark.parametrize(("watchdog_ms", "raw"), [(1, 1), (500, 25), (501, 26), (2500, 125), (5000, 127)])
def test_bus_watchdog_is_armed_by_enable_rounded_up_to_20_ms(watchdog_ms: int, raw: int) -> None:
    (motor,) = make_motors(1, options=Options())
    loop = Loop([replace(motor, watchdog_ns=watchdog_ms * MS)], STILL)
    loop.connect(1)
    assert peek(loop, 1, Register.BUS_WATCHDOG, 1) == 0
    loop.order(1, Order(Kind.ENABLE))
    assert peek(loop, 1, Register.BUS_WATCHDOG, 1) == raw


def test_clear_fault_takes_an_expired_watchdog_back_and_holds() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 2.0, 1.0))
    poke(loop, 1, Register.BUS_WATCHDOG, b"\x05")
    loop.wait(0.5)
    stopped_rad = loop.servo(1).position_rad
    assert loop.order(1, Order(Kind.CLEAR_FAULT)).startswith("no fault, holding")
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(stopped_rad, abs=0.02)
    assert not loop.poll(1)[1].status & Status.faults()


# --- the servos' side -------------------------------------------------------------------------------------------------


def test_broadcast_ping_is_answered_by_all_in_the_order_of_their_ids() -> None:
    loop = make_loop(3, 1, 2)
    replies = ask(loop, Packet(BROADCAST, Instruction.PING))
    assert replies == [Packet(bus_id, Instruction.STATUS, IDENTITY.pack(1020, 48)) for bus_id in (1, 2, 3)]


def test_reads_of_several_are_answered_in_the_order_asked_for() -> None:
    loop = make_loop(1, 2, 3)
    status = Instruction.STATUS
    sync = Packet(BROADCAST, Instruction.SYNC_READ, bytes((Register.ID, 0, 1, 0, 3, 9, 1)))
    assert ask(loop, sync) == [Packet(3, status, b"\x03"), Packet(1, status, b"\x01")]
    bulk = bytes((3, Register.ID, 0, 1, 0, 1, Register.MODEL_NUMBER, 0, 2, 0))
    assert ask(loop, Packet(BROADCAST, Instruction.BULK_READ, bulk)) == [
        Packet(3, status, b"\x03"),
        Packet(1, status, b"\xfc\x03"),
    ]


def test_fast_bulk_reply_has_the_length_and_crcs_of_all_its_blocks() -> None:
    loop = make_loop(1, 2)
    bulk = bytes((2, Register.ID, 0, 1, 0, 1, Register.MODEL_NUMBER, 0, 2, 0))
    request = encode_packet(Packet(BROADCAST, Instruction.FAST_BULK_READ, bulk))
    wire = b"".join(reply for _, reply in loop.bus.respond(request, loop.now))
    assert wire[:11] == bytes.fromhex("FFFFFD00 FE 0C00 55 00 02 02")
    assert len(wire) == 7 + 0x0C
    assert wire[13:17] == bytes.fromhex("00 01 FC03")
    for end in (11, 17):
        assert int.from_bytes(wire[end : end + 2], "little") == compute_crc(wire[:end])


def test_bulk_write_reaches_each_servo_with_its_own_register() -> None:
    loop = make_loop(1, 2)
    data = bytes((1, Register.LED, 0, 1, 0, 1)) + bytes((2, Register.PROFILE_VELOCITY, 0, 4, 0)) + i32(77)
    assert ask(loop, Packet(BROADCAST, Instruction.BULK_WRITE, data)) == []
    assert [peek(loop, 1, Register.LED, 1), peek(loop, 2, Register.PROFILE_VELOCITY, 4)] == [1, 77]


def test_registered_write_waits_for_its_action() -> None:
    loop = make_loop(1, 2)
    write = bytes((Register.LED, 0, 1))
    replies = ask(loop, *(Packet(bus_id, Instruction.REG_WRITE, write) for bus_id in (1, 2)))
    assert replies == [Packet(bus_id, Instruction.STATUS) for bus_id in (1, 2)]
    assert peek(loop, 1, Register.LED, 1) == 0
    assert ask(loop, Packet(BROADCAST, Instruction.ACTION)) == []
    assert [peek(loop, bus_id, Register.LED, 1) for bus_id in (1, 2)] == [1, 1]
    (reply,) = ask(loop, Packet(1, Instruction.ACTION))
    assert reply.error == Error.INSTRUCTION


@pytest.mark.parametrize(
    ("register", "data", "error"),
    [
        (Register.OPERATING_MODE, b"\x02", Error.RANGE),
        (Register.LED, b"\x02", Error.RANGE),
        (Register.GOAL_POSITION, b"\x00\x10\x00\x00", Error.LIMIT),
        (Register.GOAL_VELOCITY, b"\x5f\x01\x00\x00", Error.LIMIT),
        (Register.GOAL_CURRENT, b"\x01", Error.LENGTH),
        (Register.PRESENT_POSITION, b"\x00\x00\x00\x00", Error.ACCESS),
        (Register.MODEL_NUMBER, b"\x01\x00", Error.ACCESS),
        (Register.LED, b"\x01\x00", Error.ACCESS),
    ],
)
def test_write_that_cannot_be_changes_nothing_and_says_why(register: Register, data: bytes, error: Error) -> None:
    loop = make_loop(1)
    before = peek(loop, 1, Register.MODEL_NUMBER, 147)
    assert poke(loop, 1, register, data) == [Packet(1, Instruction.STATUS, b"", error)]
    assert peek(loop, 1, Register.MODEL_NUMBER, 147) == before


def test_eeprom_is_locked_while_the_torque_is_on_and_survives_a_reboot() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.MOVING_THRESHOLD, i32(7))
    poke(loop, 1, Register.PROFILE_VELOCITY, i32(7))
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x01")
    (reply,) = poke(loop, 1, Register.MOVING_THRESHOLD, i32(8))
    assert reply.error == Error.ACCESS
    assert ask(loop, Packet(1, Instruction.REBOOT)) == [Packet(1, Instruction.STATUS)]
    assert not loop.servo(1).enabled
    assert peek(loop, 1, Register.MOVING_THRESHOLD, 4) == 7
    assert peek(loop, 1, Register.PROFILE_VELOCITY, 4) == 0


def test_factory_reset_is_refused() -> None:
    (reply,) = ask(make_loop(1), Packet(1, Instruction.FACTORY_RESET, b"\x02"))
    assert reply.error == Error.RESULT


def test_address_beyond_the_memory_is_answered_with_an_error() -> None:
    loop = make_loop(1)
    assert ask(loop, Packet(1, Instruction.READ, b"\x90\x00\x20\x00")) == [
        Packet(1, Instruction.STATUS, b"", Error.ACCESS)
    ]


def test_status_return_level_says_what_is_answered() -> None:
    loop = make_loop(1)
    read = Packet(1, Instruction.READ, bytes((Register.LED, 0, 1, 0)))
    poke(loop, 1, Register.STATUS_RETURN_LEVEL, b"\x01")
    assert poke(loop, 1, Register.LED, b"\x01") == []
    assert ask(loop, read) == [Packet(1, Instruction.STATUS, b"\x01")]
    poke(loop, 1, Register.STATUS_RETURN_LEVEL, b"\x00")
    assert ask(loop, read) == []
    assert len(ask(loop, Packet(1, Instruction.PING))) == 1


def test_servo_answers_to_the_id_that_was_written_last() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.ID, b"\x07")
    assert [reply.bus_id for reply in ask(loop, Packet(1, Instruction.PING), Packet(7, Instruction.PING))] == [7]


def test_alert_is_in_every_reply_while_a_hardware_error_is_latched() -> None:
    loop = make_loop(1)
    loop.servo(1).temperature_c = 90.0
    assert [reply.error for reply in ask(loop, Packet(1, Instruction.PING))] == [ALERT]
    assert [reply.error for reply in poke(loop, 1, Register.LED, b"\x02")] == [ALERT | Error.RANGE]


def test_homing_offset_moves_the_numbers_and_not_the_servo() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.HOMING_OFFSET, i32(-100))
    assert peek(loop, 1, Register.PRESENT_POSITION, 4) == 1948
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 0.0, 5.0))
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(100 * 2 * pi / 4096, abs=0.001)
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x00")
    poke(loop, 1, Register.HOMING_OFFSET, i32(1025))  # too much for the position mode: ignored
    assert peek(loop, 1, Register.PRESENT_POSITION, 4) == 2148


def test_return_delay_is_that_of_the_register() -> None:
    loop = make_loop(1)
    responder = loop.bus._responders[0]
    assert responder.return_delay_ns(loop.simulated(1)) == 0
    poke(loop, 1, Register.RETURN_DELAY_TIME, b"\xfa")
    assert responder.return_delay_ns(loop.simulated(1)) == 500_000


def test_goal_written_without_torque_moves_nothing_until_the_torque_comes_on() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.GOAL_POSITION, i32(encode_position(1.0)))
    loop.wait(2)
    assert loop.servo(1).position_rad == 0
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x01")
    loop.wait(2)
    assert loop.servo(1).position_rad == pytest.approx(1.0, abs=0.002)


def test_motion_of_the_demonstration_ends_at_the_first_order() -> None:
    loop = make_loop(1, settings=SimulationSettings(motion="wave", enabled=True))
    loop.now = MonotonicNs(loop.now + 700_000_000)
    loop.bus.advance(loop.now)
    loop.order(1, Order(Kind.ENABLE))
    held_rad = loop.servo(1).position_rad
    loop.wait(2)
    assert loop.servo(1).position_rad == pytest.approx(held_rad, abs=0.1)
