"""Feetech STS: packets on the wire, the gateway's decisions, the simulated servos' registers."""

from itertools import pairwise
from math import pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import MonotonicNs
from drivers.errors import MotorRefused
from drivers.family import run_with_replies
from drivers.motor import Kind, Order, Status
from drivers.protocols.feetech_sts import (
    BROADCAST,
    FEEDBACK,
    RAD_PER_STEP,
    SIGN_BIT,
    STATE,
    Decoder,
    Fault,
    FeetechSts,
    Instruction,
    Known,
    Mode,
    Packet,
    Register,
    SimulatedSts,
    decode_feedback,
    decode_position,
    decode_sign_magnitude,
    encode_approach_speed,
    encode_packet,
    encode_position,
    encode_sign_magnitude,
    make_sync_read,
    make_sync_write,
)
from drivers.sim.build import SimulationSettings
from tests.memory_loop import Loop, make_motor

# Feetech communication protocol manual, examples of each instruction; checksums recomputed
GOLDEN = [
    ("ping", Packet(1, Instruction.PING), "FF FF 01 02 01 FB"),
    ("ping reply", Packet(1, 0), "FF FF 01 02 00 FC"),
    ("read", Packet(1, Instruction.READ, b"\x38\x02"), "FF FF 01 04 02 38 02 BE"),
    ("read reply, 1304", Packet(1, 0, b"\x18\x05"), "FF FF 01 04 00 18 05 DD"),
    (
        "write",
        Packet(1, Instruction.WRITE, bytes.fromhex("2A 00 08 00 00 E8 03")),
        "FF FF 01 09 03 2A 00 08 00 00 E8 03 D5",
    ),
    ("sync read", Packet(BROADCAST, Instruction.SYNC_READ, b"\x38\x08\x01\x02"), "FF FF FE 06 82 38 08 01 02 36"),
    (
        "sync read reply 1",
        Packet(1, 0, bytes.fromhex("00 08 00 00 00 00 79 1E")),
        "FF FF 01 0A 00 00 08 00 00 00 00 79 1E 55",
    ),
    (
        "sync read reply 2",
        Packet(2, 0, bytes.fromhex("FF 07 00 00 00 00 77 23")),
        "FF FF 02 0A 00 FF 07 00 00 00 00 77 23 53",
    ),
]
packets = st.builds(Packet, st.integers(0, BROADCAST), st.integers(0, 0xFF), st.binary(max_size=0xFF - 2))


@pytest.mark.parametrize(("packet", "wire"), [row[1:] for row in GOLDEN], ids=[row[0] for row in GOLDEN])
def test_packets_are_those_of_the_manual(packet: Packet, wire: str) -> None:
    assert encode_packet(packet) == bytes.fromhex(wire)
    assert Decoder().feed(bytes.fromhex(wire)) == [packet]


def test_sync_packets_are_those_of_the_manual() -> None:
    block = bytes.fromhex("00 08 00 00 E8 03")
    wire = "FF FF FE 20 83 2A 06" + "".join(f"{bus_id:02X} 00 08 00 00 E8 03" for bus_id in (1, 2, 3, 4)) + "58"
    assert make_sync_write(Register.GOAL_POSITION, dict.fromkeys((1, 2, 3, 4), block)) == bytes.fromhex(wire)
    six = bytes.fromhex("FF FF FE 0A 82 38 0F 01 02 03 04 05 06 19")  # computed
    assert make_sync_read([1, 2, 3, 4, 5, 6], FEEDBACK.address, FEEDBACK.layout.size) == six


@given(st.lists(packets, max_size=5), st.lists(st.integers(0, 1500)))
def test_any_packets_survive_the_wire_however_it_is_cut(sent: list[Packet], cuts: list[int]) -> None:
    wire = b"".join(map(encode_packet, sent))
    places = [0, *sorted(cuts), len(wire)]
    decoder = Decoder()
    received = [packet for start, end in pairwise(places) for packet in decoder.feed(wire[start:end])]
    assert received == sent


@given(st.lists(st.one_of(st.binary(max_size=9), packets.map(encode_packet)), max_size=9), st.integers(1, 40))
def test_every_byte_is_in_a_packet_or_skipped_or_kept(parts: list[bytes], size: int) -> None:
    decoder = Decoder()
    wire = b"".join(parts)
    received = [p for at in range(0, len(wire), size) for p in decoder.feed(wire[at : at + size])]
    assert len(wire) == sum(len(encode_packet(p)) for p in received) + decoder.skipped + len(decoder._rest)


@given(st.lists(st.binary(max_size=300)))
def test_no_packet_is_invented_and_no_memory_kept(chunks: list[bytes]) -> None:
    decoder = Decoder()
    stream = b""
    for chunk in chunks:
        stream += chunk
        for packet in decoder.feed(chunk):
            assert encode_packet(packet) in stream
        assert len(decoder._rest) < 4 + 0xFF


@given(st.binary(max_size=600))
def test_good_packets_are_found_again_after_any_garbage(garbage: bytes) -> None:
    good = Packet(3, 0, bytes(range(15)))
    received = Decoder().feed(garbage + 20 * encode_packet(good))
    assert received[-1] == good


def test_damaged_length_holds_up_no_more_than_the_family_ever_reads() -> None:
    family = FeetechSts([make_motor("feetech_sts", 1)])
    damaged = bytes.fromhex("FF FF 01 F0 00")
    reply = Packet(1, 0, bytes(15))
    assert list(family.unpack(damaged + encode_packet(reply))) == [reply]


def test_reset_forgets_half_a_packet() -> None:
    decoder = Decoder()
    wire = encode_packet(Packet(1, 0, bytes(15)))
    decoder.feed(wire[:9])
    decoder.reset()
    assert decoder.feed(wire[9:]) == []


@given(
    st.sampled_from([10, 11, SIGN_BIT]).flatmap(
        lambda bit: st.tuples(st.just(bit), st.integers(1 - 2**bit, 2**bit - 1))
    )
)
def test_sign_magnitude_goes_both_ways(case: tuple[int, int]) -> None:
    bit, value = case
    assert decode_sign_magnitude(encode_sign_magnitude(value, bit), bit) == value


@pytest.mark.parametrize("value", [2**15, -(2**15), 10**6])
def test_what_does_not_fit_below_the_sign_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=str(value)):
        encode_sign_magnitude(value, SIGN_BIT)


def test_sign_magnitude_is_what_lerobot_reads() -> None:
    assert encode_sign_magnitude(-1, SIGN_BIT) == 0x8001  # LeRobot motors/encoding_utils.py
    assert decode_sign_magnitude(0x8000, SIGN_BIT) == 0


@given(st.integers(-2048, 2047))
def test_every_step_survives_the_way_through_rad(step: int) -> None:
    position_rad = step * 2 * pi / 4096
    assert decode_position(encode_position(position_rad)) == pytest.approx(position_rad)


@given(st.floats(0, 30))
def test_approach_is_never_faster_than_asked_and_never_unlimited(velocity_rad_s: float) -> None:
    speed = encode_approach_speed(velocity_rad_s)
    assert speed >= 1
    assert speed == 1 or speed * 2 * pi / 4096 <= velocity_rad_s + 1e-9


def test_feedback_is_in_si_units() -> None:
    # position 1024, speed -100, load 0, 12.1 V, 30 C, overload, moving, current -200
    params = bytes.fromhex("00 04 64 80 00 00 79 1E 00 20 01 00 00 C8 80")
    told = decode_feedback(params, Fault.TEMPERATURE, Known(enabled=True))
    assert told.position_rad == pytest.approx(-pi / 2)
    assert told.velocity_rad_s == pytest.approx(-100 * 2 * pi / 4096)
    assert told.voltage_v == pytest.approx(12.1)
    assert told.temperature_c == 30
    assert told.current_a == pytest.approx(-1.3)
    assert told.torque_nm != told.torque_nm
    assert told.vendor_error == Fault.OVERLOAD | Fault.TEMPERATURE
    assert told.status == (Status.ENABLED | Status.MOVING | Status.FAULT_OVERLOAD | Status.FAULT_TEMPERATURE)


# --- the gateway's side -----------------------------------------------------------------------------------------------


def make_loop(*bus_ids: int, settings: SimulationSettings | None = None) -> Loop:
    motors = [make_motor("feetech_sts", bus_id, index) for index, bus_id in enumerate(bus_ids)]
    loop = Loop(motors, settings) if settings else Loop(motors)
    for bus_id in bus_ids:
        assert loop.connect(bus_id) is not None
    return loop


def poke(loop: Loop, bus_id: int, register: Register, data: bytes) -> list[Packet]:
    """Another master writes, plainly; what the servo answered."""
    return ask(loop, Packet(bus_id, Instruction.WRITE, bytes((register,)) + data))


def ask(loop: Loop, *requests: Packet) -> list[Packet]:
    arrived = [reply for request in requests for _, reply in loop.bus.respond(encode_packet(request), loop.now)]
    return Decoder().feed(b"".join(arrived))


def read(loop: Loop, bus_id: int, register: Register, size: int) -> int:
    (reply,) = ask(loop, Packet(bus_id, Instruction.READ, bytes((register, size))))
    return int.from_bytes(reply.params, "little")


def sync_writes(loop: Loop) -> list[bytes]:
    """Parameters of the sync writes that the gateway sent."""
    return [p.params for unit in loop.sent for p in Decoder().feed(unit) if p.code == Instruction.SYNC_WRITE]


def test_servo_is_introduced_with_model_firmware_and_its_own_limits() -> None:
    loop = Loop([make_motor("feetech_sts", 1)])
    info = loop.connect(1)
    assert (info.model, info.firmware) == ("STS3215", "3.10")
    assert info.details["mode"] == 0
    assert info.details["min_position_rad"] == pytest.approx(-pi)
    assert info.details["max_position_rad"] == pytest.approx(pi, abs=0.01)


def test_every_request_is_addressed_to_all_so_that_its_echo_is_nobodys_reply() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 0.1, 0.1))
    loop.order(1, Order(Kind.STOP))
    loop.poll(1)
    assert {packet.bus_id for unit in loop.sent for packet in Decoder().feed(unit)} == {BROADCAST}


def test_replies_between_garbage_and_echoes_are_found() -> None:
    loop = make_loop(1)
    exchange = loop.family.poll([1])
    (request,) = exchange.requests
    ((_, reply),) = loop.bus.respond(request, loop.now)
    found = [exchange.match(packet) for packet in loop.family.unpack(b"\xff\x00" + request + b"\xff" + reply)]
    assert [reply[0] for reply in found if reply] == [1]


def test_goal_is_at_the_present_position_before_the_torque_comes_on() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.GOAL_POSITION, encode_position(1.5).to_bytes(2, "little"))
    loop.sent.clear()
    loop.order(1, Order(Kind.ENABLE))
    writes = sync_writes(loop)
    assert writes == [bytes((42, 6, 1, 0x00, 0x08, 0, 0, 0x8B, 0x02)), bytes((40, 1, 1, 1))]
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(0, abs=0.002)


def test_orders_work_with_a_servo_that_acknowledges_nothing() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.RESPONSE_STATUS_LEVEL, b"\x00")
    loop.order(1, Order(Kind.ENABLE))
    assert loop.order(1, Order(Kind.POSITION, 1.0, 2.0)) == "going to 1.0002 rad at 1.9988 rad/s"
    loop.wait(2)
    assert loop.servo(1).position_rad == pytest.approx(1.0, abs=0.002)


def test_creeping_velocity_creeps() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 1.0, velocity_rad_s=0.0001))
    assert read(loop, 1, Register.GOAL_VELOCITY, 2) == 1
    loop.wait(1)
    assert loop.servo(1).position_rad < 0.003


@pytest.mark.parametrize("kind", [Kind.ENABLE, Kind.POSITION, Kind.VELOCITY, Kind.STOP])
@pytest.mark.parametrize("mode", [Mode.PWM, Mode.STEP])
def test_servo_in_a_mode_where_goals_mean_something_else_is_given_none(kind: Kind, mode: Mode) -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.OPERATING_MODE, bytes((mode,)))
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x01")
    refusal = loop.refusal(1, Order(kind, 0.1, 0.1))
    assert refusal.reason == "refused"
    assert f"register 33) is {mode:d}" in refusal.detail
    assert sync_writes(loop) == []


def test_mode_changes_with_the_goals_of_both_modes_harmless_and_the_eeprom_locked() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.LOCK, b"\x00")
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 2.0, 2.0))
    loop.wait(0.5)
    loop.sent.clear()
    loop.order(1, Order(Kind.VELOCITY, -0.5))
    lock, harmless, mode, speed = sync_writes(loop)
    assert lock == bytes((55, 1, 1, 1))
    assert harmless[:3] == bytes((42, 6, 1))
    assert abs(int.from_bytes(harmless[3:5], "little") - encode_position(loop.servo(1).position_rad)) < 30
    assert harmless[5:] == bytes((0, 0, 1, 0))
    assert mode == bytes((33, 1, 1, Mode.VELOCITY))
    assert speed == bytes((46, 2, 1)) + (0x8000 | 325).to_bytes(2, "little")
    loop.sent.clear()
    loop.order(1, Order(Kind.VELOCITY, 0.5))
    assert sync_writes(loop) == [bytes((46, 2, 1)) + (325).to_bytes(2, "little")]


def test_velocity_mode_is_gone_after_a_restart() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.LOCK, b"\x00")
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.VELOCITY, 0.5))
    ask(loop, Packet(1, Instruction.RESTART))
    assert read(loop, 1, Register.OPERATING_MODE, 1) == Mode.POSITION


def test_enabling_a_servo_that_was_left_in_velocity_mode_holds_it() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.OPERATING_MODE, b"\x01")
    poke(loop, 1, Register.GOAL_VELOCITY, (1000).to_bytes(2, "little"))
    loop.order(1, Order(Kind.ENABLE))
    loop.wait(1)
    assert read(loop, 1, Register.OPERATING_MODE, 1) == Mode.POSITION
    assert loop.servo(1).position_rad == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize("offset", [300, -1200])
def test_homing_offset_shifts_positions_alike_in_both_modes(offset: int) -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.HOMING_OFFSET, encode_sign_magnitude(offset, 11).to_bytes(2, "little"))
    loop.order(1, Order(Kind.ENABLE))
    before = loop.poll(1)[1].position_rad
    assert before == pytest.approx(-offset * 2 * pi / 4096, abs=0.002)
    loop.order(1, Order(Kind.VELOCITY, 0.5))
    assert loop.poll(1)[1].position_rad == pytest.approx(before, abs=0.005)
    loop.wait(1)
    turning = loop.poll(1)[1].position_rad
    assert turning == pytest.approx(before + 0.5, abs=0.05)
    loop.order(1, Order(Kind.STOP))
    loop.wait(1)
    assert loop.poll(1)[1].position_rad == pytest.approx(turning, abs=0.02)
    assert loop.servo(1).position_rad == pytest.approx(0.5, abs=0.05)


def test_position_is_not_told_while_the_mode_is_in_doubt() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    change = loop.family.order(1, Order(Kind.VELOCITY, 0.5))
    exchange = next(change)
    while exchange.requests[0] != make_sync_write(Register.OPERATING_MODE, {1: b"\x01"}):
        exchange = change.send(loop.exchange(exchange))
    loop.exchange(exchange)
    with pytest.raises(MotorRefused, match="no reply"):
        change.send({})
    assert loop.poll(1) == {}
    refresh = loop.family.refresh(1)
    assert refresh is not None
    loop.run(refresh)
    assert list(loop.poll(1)) == [1]


def test_velocity_beyond_the_register_is_refused_with_both() -> None:
    loop = make_loop(1)
    refusal = loop.refusal(1, Order(Kind.VELOCITY, -51.0))
    assert refusal.reason == "out_of_limits"
    assert refusal.detail == "-51.0 rad/s is -33246 step/s; the servo takes 32767"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (0, Status(0), []),
        (Fault.VOLTAGE | Fault.OVERLOAD, Status.FAULT_VOLTAGE | Status.FAULT_OVERLOAD, ["voltage", "overload"]),
        (0x40, Status.FAULT_OTHER, ["bit 6"]),
        (0x11, Status.FAULT_VOLTAGE | Status.FAULT_OTHER, ["voltage", "bit 4"]),
    ],
)
def test_every_error_bit_has_a_common_one_and_a_word(error: int, status: Status, words: list[str]) -> None:
    told = decode_feedback(bytes(FEEDBACK.size), error, Known())
    assert (told.status, told.vendor_error) == (status, error)
    assert list(FeetechSts.explain(error)) == words


def test_bytes_in_no_packet_count_as_garbage() -> None:
    loop = make_loop(1)
    (request,) = loop.family.poll([1]).requests
    ((_, reply),) = loop.bus.respond(request, loop.now)
    damaged = reply[:-1] + bytes((reply[-1] ^ 1,))
    for unit in (reply, b"\x00\xff", reply, damaged, reply[:5], reply[5:]):
        list(loop.family.unpack(unit))
    assert loop.family.garbage == 2 + len(damaged)


def test_target_beyond_the_servos_own_limits_is_refused_with_both() -> None:
    loop = make_loop(1, settings=SimulationSettings(motion="still", position_rad={0: (-1.0, 1.0)}))
    refusal = loop.refusal(1, Order(Kind.POSITION, 1.2, 1.0))
    assert refusal.reason == "out_of_limits"
    assert refusal.detail == "1.2 rad is 2830 step; the servo allows 1396..2700"


def make_state(goal: int, torque_enable: int = 1) -> bytes:
    return STATE.layout.pack(0, Mode.POSITION, torque_enable, goal, 0, 100, 1, 2048, 0, 0, 120, 25, 0, 0, 0)


def test_write_that_did_not_take_is_refused_with_what_was_sent_and_read() -> None:
    family = FeetechSts([make_motor("feetech_sts", 1)])
    order = family.order(1, Order(Kind.POSITION, 0.0, 1.0))
    with pytest.raises(Exception, match="sent 2048 step at 651 step/s, read 7 step at 100 step/s"):
        run_with_replies(order, [{1: make_state(5)}, {}, {1: make_state(7)}])


def test_torque_that_another_master_switched_off_is_noticed_by_refresh() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x00")
    refresh = loop.family.refresh(1)
    assert refresh is not None
    loop.run(refresh)
    assert not loop.poll(1)[1].status & Status.ENABLED


def test_group_is_fired_by_the_manuals_sync_write() -> None:
    """Goals of four servos, byte for byte (Feetech communication protocol manual)."""
    loop = make_loop(1, 2, 3, 4)
    ready = {}
    for bus_id in (1, 2, 3, 4):
        loop.order(bus_id, Order(Kind.ENABLE))
        order = Order(Kind.POSITION, 0.0, velocity_rad_s=1000.5 * RAD_PER_STEP)
        ready[bus_id] = loop.run(loop.family.prepare(bus_id, order))
    exchange = loop.family.fire(ready)
    goals = b"".join(bytes((bus_id,)) + bytes.fromhex("00080000E803") for bus_id in (1, 2, 3, 4))
    assert list(exchange.requests) == [bytes.fromhex("FFFFFE20832A06") + goals + b"\x58"]


def test_halt_of_a_servo_whose_mode_is_in_doubt_makes_it_creep_at_most() -> None:
    loop = Loop([make_motor("feetech_sts", 1)])
    loop.connect(1)
    loop.order(1, Order(Kind.ENABLE))
    turn = loop.family.order(1, Order(Kind.VELOCITY, 0.5))
    exchange = next(turn)
    while make_sync_write(Register.OPERATING_MODE, {1: bytes((Mode.VELOCITY,))}) not in exchange.requests:
        exchange = turn.send(loop.exchange(exchange))
    loop.exchange(exchange)  # the servo took it, and nobody heard of that
    with pytest.raises(MotorRefused):
        turn.send({})
    loop.exchange(loop.family.halt([1]))
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(0, abs=2 * RAD_PER_STEP)


def test_halt_holds_in_position_mode_and_takes_the_speed_away_in_the_other_all_in_one_packet() -> None:
    loop = make_loop(1, 2, 3)
    for bus_id, kind in ((1, Kind.POSITION), (2, Kind.VELOCITY)):
        loop.order(bus_id, Order(Kind.ENABLE))
        loop.order(bus_id, Order(kind, 0.5, 0.5))
    loop.wait(0.5)
    loop.poll(1, 2, 3)
    (request,) = loop.family.halt([1, 2, 3]).requests  # nothing for the third: its torque is off
    (packet,) = Decoder().feed(request)
    assert packet.params[:2] == bytes((Register.GOAL_POSITION, 6))
    first, second = packet.params[2:9], packet.params[9:]
    assert (first[0], second[0]) == (1, 2)
    assert int.from_bytes(first[1:3], "little") == encode_position(loop.servo(1).position_rad)
    assert first[5:] != b"\0\0" == second[5:]


# --- the servos' side -------------------------------------------------------------------------------------------------


def test_broadcast_ping_is_answered_by_all_one_after_the_other() -> None:
    loop = make_loop(3, 1, 2)
    assert ask(loop, Packet(BROADCAST, Instruction.PING)) == [Packet(3, 0), Packet(1, 0), Packet(2, 0)]


def test_sync_read_is_answered_in_the_order_asked_for() -> None:
    loop = make_loop(1, 2, 3)
    replies = ask(loop, Packet(BROADCAST, Instruction.SYNC_READ, bytes((Register.ID, 1, 3, 9, 1))))
    assert replies == [Packet(3, 0, b"\x03"), Packet(1, 0, b"\x01")]


def test_request_with_a_wrong_checksum_is_ignored() -> None:
    loop = make_loop(1)
    wire = bytearray(encode_packet(Packet(1, Instruction.PING)))
    wire[-1] ^= 1
    assert loop.bus.respond(bytes(wire), loop.now) == []


def test_goal_written_without_torque_moves_nothing_until_the_torque_comes_on() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.GOAL_POSITION, encode_position(1.0).to_bytes(2, "little"))
    loop.wait(2)
    assert loop.servo(1).position_rad == 0
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x01")
    loop.wait(2)
    assert loop.servo(1).position_rad == pytest.approx(1.0, abs=0.002)


def test_registered_write_waits_for_its_action() -> None:
    loop = make_loop(1, 2)
    write = bytes((Register.TORQUE_LIMIT, 0xF4, 0x01))
    replies = ask(loop, *(Packet(bus_id, Instruction.REG_WRITE, write) for bus_id in (1, 2)))
    assert replies == [Packet(1, 0), Packet(2, 0)]
    assert read(loop, 1, Register.TORQUE_LIMIT, 2) == 1000
    assert ask(loop, Packet(BROADCAST, Instruction.ACTION)) == []
    assert [read(loop, bus_id, Register.TORQUE_LIMIT, 2) for bus_id in (1, 2)] == [500, 500]


@pytest.mark.parametrize(
    ("register", "data"),
    [
        (Register.OPERATING_MODE, b"\x04"),
        (Register.PRESENT_POSITION, b"\x00\x00"),
        (Register.MODEL_NUMBER, b"\x01"),
        (Register.TORQUE_LIMIT, b"\xff\xff"),
        (Register.LOCK, b"\x01\x00\x00"),
    ],
)
def test_write_out_of_range_changes_nothing_and_says_so(register: Register, data: bytes) -> None:
    loop = make_loop(1)
    before = read(loop, 1, Register.FIRMWARE_MAJOR_VERSION, 70)
    (reply,) = poke(loop, 1, register, data)
    assert reply.code != 0
    assert read(loop, 1, Register.FIRMWARE_MAJOR_VERSION, 70) == before


def test_address_beyond_the_memory_is_answered_with_an_error() -> None:
    loop = make_loop(1)
    (reply,) = ask(loop, Packet(1, Instruction.READ, b"\xf0\x20"))
    assert reply.code != 0
    assert reply.params == b""


def test_servo_at_response_level_0_answers_only_reads_and_pings() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.RESPONSE_STATUS_LEVEL, b"\x00")
    assert poke(loop, 1, Register.ACCELERATION, b"\x10") == []
    assert read(loop, 1, Register.ACCELERATION, 1) == 16
    assert ask(loop, Packet(1, Instruction.PING)) == [Packet(1, 0)]


def test_locked_eeprom_forgets_at_restart_and_unlocked_does_not() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.BAUD_RATE, b"\x02")
    ask(loop, Packet(1, Instruction.RESTART))
    assert read(loop, 1, Register.BAUD_RATE, 1) == 0
    poke(loop, 1, Register.LOCK, b"\x00")
    poke(loop, 1, Register.BAUD_RATE, b"\x02")
    assert ask(loop, Packet(1, Instruction.RESTART)) == []
    assert read(loop, 1, Register.BAUD_RATE, 1) == 2


def test_restart_loads_the_ram_anew() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.ACCELERATION, b"\x10")
    poke(loop, 1, Register.LOCK, b"\x00")
    poke(loop, 1, Register.MAX_TORQUE_LIMIT, (500).to_bytes(2, "little"))
    loop.bus.reboot(loop.simulated(1))
    assert read(loop, 1, Register.ACCELERATION, 1) == 0
    assert read(loop, 1, Register.TORQUE_LIMIT, 2) == 500
    assert read(loop, 1, Register.LOCK, 1) == 1


def test_unlocking_saves_only_what_is_written_from_then_on() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.OPERATING_MODE, b"\x01")
    poke(loop, 1, Register.LOCK, b"\x00")
    poke(loop, 1, Register.PHASE, b"\x08")
    ask(loop, Packet(1, Instruction.RESTART))
    assert read(loop, 1, Register.OPERATING_MODE, 1) == Mode.POSITION
    assert read(loop, 1, Register.PHASE, 1) == 8


@pytest.mark.parametrize(("speed", "velocity_rad_s"), [(1000, 1.534), (0x8000 | 1000, -1.534), (0, 0.0)])
def test_servo_in_velocity_mode_turns_at_its_goal_speed(speed: int, velocity_rad_s: float) -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x01")
    poke(loop, 1, Register.OPERATING_MODE, b"\x01")
    poke(loop, 1, Register.GOAL_VELOCITY, speed.to_bytes(2, "little"))
    loop.wait(0.5)
    assert loop.servo(1).velocity_rad_s == pytest.approx(velocity_rad_s, abs=0.001)


def test_servo_takes_up_an_old_goal_when_it_is_back_in_position_mode() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.TORQUE_ENABLE, b"\x01")
    poke(loop, 1, Register.OPERATING_MODE, b"\x01")
    poke(loop, 1, Register.GOAL_POSITION, encode_position(1.0).to_bytes(2, "little"))
    loop.wait(1)
    assert loop.servo(1).position_rad == 0
    poke(loop, 1, Register.OPERATING_MODE, b"\x00")
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(1.0, abs=0.002)


@pytest.mark.parametrize("units", [0, 250])
def test_reply_waits_as_long_as_register_7_says(units: int) -> None:
    loop = Loop([make_motor("feetech_sts", 1)])
    responder = SimulatedSts([loop.simulated(1)])
    list(responder.respond(encode_packet(Packet(1, Instruction.WRITE, bytes((Register.RETURN_DELAY_TIME, units))))))
    assert responder.return_delay_ns(loop.simulated(1)) == units * 2000


def test_servo_answers_to_the_id_that_was_written_last() -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.ID, b"\x07")
    assert ask(loop, Packet(1, Instruction.PING), Packet(7, Instruction.PING)) == [Packet(7, 0)]


def test_hot_servo_says_so_in_every_reply() -> None:
    loop = make_loop(1)
    loop.servo(1).temperature_c = 75
    told = loop.poll(1)[1]
    assert told.vendor_error == Fault.TEMPERATURE
    assert told.status & Status.FAULT_TEMPERATURE
    assert ask(loop, Packet(1, Instruction.PING)) == [Packet(1, Fault.TEMPERATURE)]


@pytest.mark.parametrize(("condition", "unloads"), [(Fault.TEMPERATURE, True), (Fault.OVERLOAD, False)])
def test_hot_servo_lets_go_if_its_unloading_condition_says_so(condition: Fault, unloads: bool) -> None:
    loop = make_loop(1)
    poke(loop, 1, Register.UNLOADING_CONDITION, bytes((condition,)))
    loop.order(1, Order(Kind.ENABLE))
    loop.servo(1).temperature_c = 75
    loop.poll(1)
    assert loop.servo(1).enabled != unloads


def test_hot_servo_cannot_be_enabled_until_it_is_cooler() -> None:
    loop = make_loop(1)
    loop.servo(1).temperature_c = 75
    refusal = loop.refusal(1, Order(Kind.ENABLE))
    assert refusal.detail == "torque enable (register 40): sent 1, read 0"
    loop.servo(1).temperature_c = 60
    loop.order(1, Order(Kind.ENABLE))
    assert loop.servo(1).enabled


@given(st.lists(st.binary(max_size=40), max_size=20), st.lists(packets, max_size=5))
def test_servos_answer_again_after_anything(noise: list[bytes], requests: list[Packet]) -> None:
    loop = make_loop(1)
    for unit in [*noise, *map(encode_packet, requests)]:
        list(loop.bus.respond(unit, MonotonicNs(loop.now)))
    pings = b"".join(encode_packet(Packet(bus_id, Instruction.PING)) for bus_id in range(254))
    assert loop.bus.respond(pings, loop.now)
