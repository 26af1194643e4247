"""RMD-X: frames on the wire, samples put together from two, who may move it, the simulated motors' commands."""

from dataclasses import replace
from math import isnan, nan, radians

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import MS, MonotonicNs
from drivers.errors import MotorRefused
from drivers.family import CAN_FRAME_BITS, CanFrame, Overheard, run_with_replies
from drivers.motor import Feedback, Kind, Motor, Order, Status, common_faults
from drivers.protocols.rmd_x import (
    ALL_MOTORS_ID,
    COMMAND_ID,
    COMMON,
    REPLY_ID,
    Command,
    Error,
    Loop,
    Options,
    RmdX,
    Status1,
    Status2,
    decode_long,
    decode_model,
    decode_status_1,
    decode_status_2,
    encode_fixed,
    encode_long,
    encode_max_speed,
    encode_status_1,
    encode_status_2,
    make_command,
    make_position,
    make_speed,
    make_torque,
)
from tests.memory_loop import Loop as MemoryLoop
from tests.memory_loop import make_motor

# MyActuator Motor Motion Protocol V4.2, the communication example of each command; 2b-t/myactuator_rmd test/protocol
GOLDEN_COMMANDS = [
    (make_command(1, Command.STATUS_2), "141#9C00000000000000"),
    (make_command(1, Command.STATUS_1), "141#9A00000000000000"),
    (make_command(1, Command.MULTI_TURN_ANGLE), "141#9200000000000000"),
    (make_command(1, Command.OPERATING_MODE), "141#7000000000000000"),
    (make_command(1, Command.RESET), "141#7600000000000000"),
    (make_command(1, Command.VERSION_DATE), "141#B200000000000000"),
    (make_command(1, Command.MODEL), "141#B500000000000000"),
    (make_torque(1, 100), "141#A100000064000000"),
    (make_torque(1, -100), "141#A10000009CFF0000"),
    (make_speed(1, 10000), "141#A200000010270000"),
    (make_speed(1, -10000), "141#A2000000F0D8FFFF"),
    (make_position(1, 500, 36000), "141#A400F401A08C0000"),
    (make_position(1, 500, -36000), "141#A400F4016073FFFF"),
]
GOLDEN_STATUS_2 = [
    ("9C 32 64 00 F4 01 2D 00", Status2(50, 1.0, radians(500), radians(45))),
    ("A1 32 64 00 F4 01 2D 00", Status2(50, 1.0, radians(500), radians(45))),
    ("A2 32 9C FF 0C FE D3 FF", Status2(50, -1.0, radians(-500), radians(-45))),
    ("A4 32 9C FF 0C FE D3 FF", Status2(50, -1.0, radians(-500), radians(-45))),
]
frames = st.builds(
    CanFrame,
    st.sampled_from([COMMAND_ID + 1, REPLY_ID + 1, REPLY_ID + 2, ALL_MOTORS_ID]) | st.integers(0, 0x7FF),
    st.builds(lambda code, rest: bytes((code,)) + rest, st.sampled_from(Command), st.binary(min_size=7, max_size=7))
    | st.binary(max_size=8),
    st.booleans(),
)


@pytest.mark.parametrize(("frame", "text"), GOLDEN_COMMANDS)
def test_commands_are_those_of_the_manual(frame: CanFrame, text: str) -> None:
    assert str(frame) == text


@pytest.mark.parametrize(("wire", "told"), GOLDEN_STATUS_2)
def test_status_2_is_what_the_manual_reads(wire: str, told: Status2) -> None:
    data = bytes.fromhex(wire)
    assert decode_status_2(data) == pytest.approx(told)
    assert encode_status_2(data[0], told) == data


def test_status_1_is_what_the_manual_reads() -> None:
    data = bytes.fromhex("9A 32 00 01 E5 01 04 00")
    told = decode_status_1(data)
    assert told._replace(voltage_v=round(told.voltage_v, 6)) == Status1(50, True, 48.5, Error.LOW_VOLTAGE)
    assert encode_status_1(told) == data


def test_angle_version_and_model_are_what_the_manual_reads() -> None:
    assert decode_long(bytes.fromhex("92 00 00 00 A0 8C 00 00")) == 36000
    assert decode_long(bytes.fromhex("B2 00 00 00 2E 89 34 01")) == 20220206
    assert decode_model(bytes.fromhex("B5 58 38 53 32 56 31 30")) == "X8S2V10"


@given(st.floats(-1e6, 1e6), st.sampled_from([radians(0.01), 0.01]), st.sampled_from([16, 32]))
def test_number_comes_back_within_half_a_unit_or_is_refused(value: float, unit: float, bits: int) -> None:
    try:
        raw = encode_fixed(value, unit, bits)
    except ValueError:
        assert abs(value) / unit > (1 << bits - 1) - 1
    else:
        assert abs(raw * unit - value) <= unit * 0.500001
        assert decode_long(encode_long(Command.SPEED, raw)) == raw


@given(st.floats(0, 1e9))
def test_max_speed_is_never_zero_and_never_faster_than_asked(velocity_rad_s: float) -> None:
    speed = encode_max_speed(velocity_rad_s)
    assert 1 <= speed <= 0xFFFF
    assert speed == 1 or radians(speed) <= velocity_rad_s * 1.000001


def test_identifiers_of_all_motors_are_apart() -> None:
    commands = {COMMAND_ID + bus_id for bus_id in RmdX.bus_ids}
    replies = {REPLY_ID + bus_id for bus_id in RmdX.bus_ids}
    assert len(commands | replies | {ALL_MOTORS_ID}) == 2 * len(RmdX.bus_ids) + 1


# --- the gateway's side -----------------------------------------------------------------------------------------------


def make(bus_id: int, options: Options | None = None) -> Motor:
    motor = make_motor("rmd_x", bus_id, bus_id)
    return replace(motor, options=options) if options else motor


def make_loop(*motors: Motor) -> MemoryLoop:
    loop = MemoryLoop(motors or [make(1)])
    for bus_id in loop.family.motors:
        assert loop.connect(bus_id) is not None
    return loop


def ask(loop: MemoryLoop, frame: CanFrame) -> list[CanFrame]:
    return [reply for _, reply in loop.bus.respond(frame, loop.now)]


def refresh(loop: MemoryLoop) -> None:
    procedure = loop.family.refresh(1)
    assert procedure is not None
    loop.run(procedure)


def reply(bus_id: int, wire: str) -> CanFrame:
    return CanFrame(REPLY_ID + bus_id, bytes.fromhex(wire))


def read(loop: MemoryLoop, *stream: CanFrame) -> dict[int, Feedback]:
    """What a poll of all motors makes of these frames."""
    exchange = loop.family.poll(list(loop.family.motors))
    exchange.begin()
    samples: dict[int, Feedback] = {}
    for frame in stream:
        for packet in loop.family.unpack(frame):
            if found := exchange.match(packet):
                samples.setdefault(*found)
    return samples


STATUS_2 = "9C 32 64 00 F4 01 2D 00"
ANGLE = "92 00 00 00 94 11 00 00"  # 45.00 deg


def test_connecting_reads_model_version_and_state() -> None:
    info = make_loop().connect(1)
    assert (info.model, info.firmware) == ("RMD-X8S2V10", "20220206")
    assert info.details == {"operating_mode": Loop.NONE, "brake_released": 0}


def test_motor_that_does_not_know_its_model_is_connected() -> None:
    replies: list[dict[int, bytes]] = [
        {1: bytes.fromhex("B2 00 00 00 2E 89 34 01")},
        {},
        {1: bytes.fromhex("70 00 00 00 00 00 00 03")},
        {1: bytes.fromhex("9A 32 00 01 E5 01 00 00")},
    ]
    info = run_with_replies(RmdX([make(1)]).connect(1), replies)
    assert info is not None
    assert (info.model, info.details["operating_mode"]) == ("RMD-X", Loop.POSITION)


def test_motor_that_falls_silent_while_it_is_connected_is_not_there() -> None:
    version = bytes.fromhex("B2 00 00 00 2E 89 34 01")
    assert run_with_replies(RmdX([make(1)]).connect(1), [{1: version}, {}, {}]) is None


@pytest.mark.parametrize("order", [(STATUS_2, ANGLE), (ANGLE, STATUS_2)])
def test_sample_is_put_together_from_both_halves_in_either_order(order: tuple[str, str]) -> None:
    told = read(make_loop(), *(reply(1, wire) for wire in order))[1]
    assert told.position_rad == pytest.approx(radians(45))
    assert told.velocity_rad_s == pytest.approx(radians(500))
    assert (told.temperature_c, told.current_a) == (50, 1.0)
    assert isnan(told.torque_nm)


def test_half_a_sample_is_none() -> None:
    loop = make_loop(make(1), make(2))
    assert read(loop, reply(1, STATUS_2), reply(2, ANGLE)) == {}


def test_halves_of_two_turns_are_not_put_together() -> None:
    loop = make_loop()
    exchange = loop.family.poll([1])
    exchange.begin()
    assert exchange.match(reply(1, STATUS_2)) is None
    exchange.begin()
    assert exchange.match(reply(1, ANGLE)) is None
    assert exchange.match(reply(1, STATUS_2)) is not None


def test_replies_to_orders_are_no_samples() -> None:
    stream = [reply(1, wire) for wire in (ANGLE, *(wire for wire, _ in GOLDEN_STATUS_2[1:]))]
    assert read(make_loop(), *stream) == {}


def test_reply_of_another_length_or_format_is_no_packet_and_a_short_one_of_a_motor_is_counted() -> None:
    loop = make_loop()
    good = reply(1, STATUS_2)
    assert list(loop.family.unpack(good)) == [good]
    for frame in (
        replace(good, data=good.data[:7]),
        replace(good, extended=True),
        replace(good, can_id=REPLY_ID + 2, data=b""),
        replace(good, can_id=REPLY_ID + 33),
    ):
        assert list(loop.family.unpack(frame)) == []
    assert loop.family.garbage == 1


def test_turns_are_counted() -> None:
    loop = make_loop()
    assert read(loop, reply(1, STATUS_2), reply(1, "92 00 00 00 60 73 FF FF"))[1].position_rad == pytest.approx(
        radians(-360)
    )


def test_coarse_position_takes_half_the_frames_and_is_to_a_degree() -> None:
    loop = make_loop(make(1, Options(fine_position=False)), make(2))
    motors = list(loop.family.motors.values())
    assert RmdX.poll_bits(motors) == (2 + 4) * CAN_FRAME_BITS
    assert [str(frame) for frame in loop.family.poll([1]).requests] == ["141#9C00000000000000"]
    loop.servo(1).position_rad = loop.servo(2).position_rad = radians(30.4)
    told = loop.poll(1, 2)
    assert told[1].position_rad == pytest.approx(radians(30))
    assert told[2].position_rad == pytest.approx(radians(30.4))


def test_half_that_a_poll_keeps_is_no_stray_and_a_late_one_is() -> None:
    loop = make_loop()
    exchange = loop.family.poll([1])
    exchange.begin()
    kept, late = reply(1, STATUS_2), reply(1, STATUS_2)
    assert exchange.match(kept) is None
    assert loop.family.overhear(kept) is not None
    assert loop.family.overhear(late) is None


def test_voltage_and_errors_come_with_a_refresh_and_an_unread_voltage_is_not_repeated() -> None:
    loop = make_loop()
    loop.servo(1).voltage_v = 8.0
    assert loop.poll(1)[1].voltage_v == pytest.approx(12.0)
    refresh(loop)
    told = loop.poll(1)[1]
    assert told.voltage_v == pytest.approx(8.0)
    assert (told.status, told.vendor_error) == (Status.FAULT_VOLTAGE, Error.LOW_VOLTAGE)
    loop.simulated(1).faults.silent = True
    refresh(loop)
    loop.simulated(1).faults.silent = False
    told = loop.poll(1)[1]
    assert isnan(told.voltage_v)
    assert told.vendor_error == Error.LOW_VOLTAGE  # the motor has not taken it back


def test_error_that_a_motor_sends_by_itself_is_in_the_next_sample() -> None:
    loop = make_loop()
    heard = loop.family.overhear(reply(1, "9A 32 00 00 E5 01 02 00"))
    assert heard is not None
    assert heard.reconnect == ""
    told = loop.poll(1)[1]
    assert (told.status, told.vendor_error) == (Status.FAULT_OVERLOAD, Error.MOTOR_STALL)
    assert told.voltage_v == pytest.approx(48.5)
    assert loop.family.overhear(reply(1, STATUS_2)) is None
    assert loop.family.overhear(reply(2, "9A 32 00 00 E5 01 02 00")) is None


@pytest.mark.parametrize(
    ("errors", "status", "words"),
    [
        (0x0016, Status.FAULT_OVERLOAD | Status.FAULT_VOLTAGE | Status.FAULT_CURRENT,
         ["motor stall (0002)", "low voltage (0004)", "over current (0010)"]),
        (0x1800, Status.FAULT_TEMPERATURE,
         ["component over temperature (0800)", "motor over temperature (1000)"]),
        (0x6000, Status.FAULT_ENCODER, ["encoder calibration (2000)", "encoder data (4000)"]),
        (0x0180, Status.FAULT_OTHER, ["calibration writing (0080)", "overspeed (0100)"]),
        (0x8001, Status.FAULT_OTHER, ["unlisted error (0001)", "unlisted error (8000)"]),
        (0, Status(0), []),
    ],
)  # fmt: skip
def test_errors_have_a_common_bit_and_words(errors: int, status: Status, words: list[str]) -> None:
    assert common_faults(errors, COMMON) == status
    assert list(RmdX.explain(errors)) == words


def test_torque_is_told_and_taken_by_the_configured_constant() -> None:
    loop = make_loop(make(1, Options(nm_per_a=2.0)))
    assert read(loop, reply(1, STATUS_2), reply(1, ANGLE))[1].torque_nm == pytest.approx(2.0)
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.TORQUE, -0.5))
    assert str(loop.sent[-1]) == "141#A1000000E7FF0000"  # -0.25 A
    assert loop.servo(1).goal_torque_nm == pytest.approx(-0.5)


@pytest.mark.parametrize("nm_per_a", [0.0, -1.0, nan, float("inf")])
def test_torque_constant_that_cannot_be_is_refused(nm_per_a: float) -> None:
    with pytest.raises(ValueError, match="nm_per_a"):
        Options(nm_per_a=nm_per_a)


def test_enabling_holds_before_it_opens_the_brake() -> None:
    loop = make_loop()
    loop.servo(1).position_rad = 0.5
    loop.sent.clear()
    assert loop.order(1, Order(Kind.ENABLE)) == "enabled, holding 0.5000 rad"
    codes = [frame.data[0] for frame in loop.sent]
    assert codes.index(Command.POSITION) < codes.index(Command.BRAKE_RELEASE)


def test_disabling_shuts_down_before_it_locks_the_brake() -> None:
    loop = make_loop()
    loop.order(1, Order(Kind.ENABLE))
    loop.sent.clear()
    loop.order(1, Order(Kind.DISABLE))
    assert [frame.data[0] for frame in loop.sent] == [Command.SHUTDOWN, Command.BRAKE_LOCK]


def test_motor_that_somebody_else_enabled_says_so_and_takes_no_setpoint() -> None:
    loop = make_loop()
    ask(loop, make_position(1, 10, 0))
    refresh(loop)
    assert loop.poll(1)[1].status == Status.ENABLED
    loop.sent.clear()
    refusal = loop.refusal(1, Order(Kind.POSITION, 1.0, 1.0))
    assert refusal.reason == "not_enabled"
    assert "not enabled from here" in refusal.detail
    assert [frame.data[0] for frame in loop.sent] == [Command.OPERATING_MODE]


def test_motor_that_somebody_else_shut_down_takes_no_setpoint_until_it_is_enabled_again() -> None:
    loop = make_loop()
    loop.order(1, Order(Kind.ENABLE))
    ask(loop, make_command(1, Command.SHUTDOWN))
    assert "operating mode (70) is 0" in loop.refusal(1, Order(Kind.POSITION, 1.0, 1.0)).detail
    ask(loop, make_position(1, 10, 0))  # and on again, by that somebody
    assert loop.refusal(1, Order(Kind.POSITION, 1.0, 1.0)).reason == "not_enabled"
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 1.0, 1.0))


def test_motor_in_error_is_not_enabled_and_has_to_be_enabled_after_it() -> None:
    loop = make_loop()
    loop.order(1, Order(Kind.ENABLE))
    loop.servo(1).temperature_c = 90
    refresh(loop)
    for kind in (Kind.ENABLE, Kind.POSITION, Kind.VELOCITY):
        assert "motor over temperature (1000)" in loop.refusal(1, Order(kind, 0.5, 0.5)).detail
    loop.servo(1).temperature_c = 50
    refresh(loop)
    assert loop.refusal(1, Order(Kind.POSITION, 0.5, 0.5)).reason == "not_enabled"
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 0.5, 0.5))


@pytest.mark.parametrize(
    ("order", "raw"),
    [
        (Order(Kind.POSITION, 400_000.0, 1.0), 2291831181),
        (Order(Kind.VELOCITY, -400_000.0), -2291831181),
        (Order(Kind.TORQUE, 400.0), 40000),
    ],
)
def test_value_that_the_wire_cannot_hold_is_refused_with_both(order: Order, raw: int) -> None:
    loop = make_loop(make(1, Options(nm_per_a=1.0)))
    loop.order(1, Order(Kind.ENABLE))
    refusal = loop.refusal(1, order)
    assert refusal.reason == "out_of_limits"
    assert f"{order.kind} {order.value}: {raw} does not fit" in refusal.detail


def test_acknowledgement_of_another_shape_is_refused_with_both() -> None:
    family = make_loop().family
    with pytest.raises(MotorRefused, match=r"sent 141#8000000000000000, .* 8000000000000001"):
        run_with_replies(family.order(1, Order(Kind.DISABLE)), [{1: bytes.fromhex("8000000000000001")}])


def test_motor_in_a_loop_that_no_page_lists_is_stopped_and_takes_no_setpoint() -> None:
    family = make_loop().family
    unlisted, stopped = bytes.fromhex("70 00 00 00 00 00 00 07"), make_command(1, Command.STOP).data
    assert run_with_replies(family.order(1, Order(Kind.STOP)), [{1: unlisted}, {1: stopped}]) == "stopped, holding"
    with pytest.raises(MotorRefused, match=r"operating mode \(70\) is 7"):
        run_with_replies(family.order(1, Order(Kind.VELOCITY, 0.5)), [{1: unlisted}])


def test_motor_that_closes_no_position_loop_is_not_enabled() -> None:
    family = make_loop().family
    replies = [
        {1: bytes.fromhex(wire)}
        for wire in (
            "9A 32 00 00 E5 01 00 00", ANGLE, "A4 32 00 00 00 00 2D 00", "77 00 00 00 00 00 00 00",
            "70 00 00 00 00 00 00 02",
        )
    ]  # fmt: skip
    with pytest.raises(MotorRefused, match=r"operating mode \(70\) is 2 after A4, not 3"):
        run_with_replies(family.order(1, Order(Kind.ENABLE)), replies)


@given(st.lists(frames, max_size=8))
def test_no_frame_raises_and_only_two_replies_of_one_motor_are_a_sample(stream: list[CanFrame]) -> None:
    loop = make_loop(make(1), make(2))
    for bus_id in read(loop, *stream):
        own = [frame for frame in stream if frame.can_id == REPLY_ID + bus_id and not frame.extended]
        assert {Command.STATUS_2, Command.MULTI_TURN_ANGLE} <= {frame.data[0] for frame in own if len(frame.data) == 8}
    for frame in stream:
        for packet in loop.family.unpack(frame):
            loop.family.overhear(packet)
        for answer in ask(loop, frame):
            assert answer.can_id in {REPLY_ID + 1, REPLY_ID + 2}
            assert len(answer.data) == 8
    assert sorted(loop.poll(1, 2)) == [1, 2]


# --- the motors' side -------------------------------------------------------------------------------------------------


def test_frames_for_others_and_short_ones_are_not_answered() -> None:
    loop = make_loop()
    good = make_command(1, Command.STATUS_2)
    assert ask(loop, good)
    for frame in (
        make_command(2, Command.STATUS_2),
        replace(good, data=good.data[:4]),
        replace(good, extended=True),
        replace(good, data=bytes(8)),
        replace(good, can_id=REPLY_ID + 1),
    ):
        assert ask(loop, frame) == []


def test_command_to_all_is_answered_by_each_under_its_own_identifier() -> None:
    loop = make_loop(make(1), make(2), make(3))
    shutdown = make_command(1, Command.SHUTDOWN).data
    assert ask(loop, CanFrame(ALL_MOTORS_ID, shutdown)) == [CanFrame(REPLY_ID + n, shutdown) for n in (1, 2, 3)]


def test_position_moves_a_motor_that_was_off_and_opens_its_brake() -> None:
    loop = make_loop()
    ask(loop, make_position(1, 0, 5730))
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(1.0, abs=0.001)  # 0 deg/s is no limit
    assert decode_status_1(ask(loop, make_command(1, Command.STATUS_1))[0].data).brake_released


def test_torque_opens_no_brake() -> None:
    loop = make_loop()
    ask(loop, make_torque(1, 500))
    loop.wait(0.2)
    assert loop.servo(1).position_rad == 0
    ask(loop, make_command(1, Command.BRAKE_RELEASE))
    ask(loop, make_torque(1, 500))
    loop.wait(0.2)
    assert loop.servo(1).position_rad > 0.05


@pytest.mark.parametrize(
    ("frame", "loop_closed"),
    [
        (make_speed(1, 100), Loop.SPEED),
        (make_torque(1, 100), Loop.CURRENT),
        (make_position(1, 10, 0), Loop.POSITION),
        (make_command(1, Command.STOP), Loop.POSITION),
        (make_command(1, Command.BRAKE_LOCK), Loop.NONE),
        (make_command(1, Command.SHUTDOWN), Loop.NONE),
        (make_command(1, Command.RESET), Loop.NONE),
    ],
)
def test_operating_mode_is_the_loop_that_was_closed_last(frame: CanFrame, loop_closed: Loop) -> None:
    loop = make_loop()
    loop.order(1, Order(Kind.ENABLE))
    ask(loop, frame)
    (told,) = ask(loop, make_command(1, Command.OPERATING_MODE))
    assert told.data[7] == loop_closed


def test_restart_is_not_answered() -> None:
    assert ask(make_loop(), make_command(1, Command.RESET)) == []


def test_hot_motor_obeys_again_only_when_it_is_well_below_its_limit() -> None:
    loop = make_loop()

    def errors() -> int:
        return decode_status_1(ask(loop, make_command(1, Command.STATUS_1))[0].data).errors

    told = []
    for temperature_c in (84, 86, 84, 76, 74):
        loop.servo(1).temperature_c = temperature_c
        told.append(errors())
    hot = Error.MOTOR_OVER_TEMPERATURE
    assert told == [0, hot, hot, hot, 0]
    loop.servo(1).temperature_c = 90
    ask(loop, make_position(1, 10, 100))
    assert not loop.servo(1).enabled


def test_supply_beyond_its_limits_is_an_error_for_as_long_as_it_lasts() -> None:
    loop = make_loop()
    for voltage_v, error in ((70.0, Error.OVER_VOLTAGE), (8.0, Error.LOW_VOLTAGE), (24.0, Error(0))):
        loop.servo(1).voltage_v = voltage_v
        told = decode_status_1(ask(loop, make_command(1, Command.STATUS_1))[0].data)
        assert told._replace(voltage_v=round(told.voltage_v, 6)) == Status1(25, False, voltage_v, error)


# --- the timeout ------------------------------------------------------------------------------------------------------


def make_guarded() -> MemoryLoop:
    loop = make_loop(replace(make(1), watchdog_ns=500 * MS))
    loop.sent.clear()
    return loop


def test_timeout_is_written_once_a_connection_and_not_by_monitoring() -> None:
    loop = make_guarded()
    loop.poll(1)
    refresh(loop)
    for _ in range(3):
        loop.order(1, Order(Kind.ENABLE))
        loop.order(1, Order(Kind.DISABLE))
    assert [str(frame) for frame in loop.sent].count("141#B3000000F4010000") == 1


def test_first_command_after_the_timeout_is_sent_back_and_no_sample() -> None:
    loop = make_guarded()
    loop.order(1, Order(Kind.ENABLE))
    loop.wait(0.4)
    assert 1 in loop.poll(1)
    loop.wait(0.6)
    assert loop.poll(1) == {}
    told = loop.poll(1)[1]
    assert told.status & Status.FAULT_COMMUNICATION
    assert not told.status & Status.ENABLED
    assert told.temperature_c > 0


def test_motor_says_once_a_second_that_its_timeout_has_stopped_it() -> None:
    loop = make_guarded()
    loop.order(1, Order(Kind.ENABLE))
    said = [frame for _ in range(280) for _, frame in loop.bus.advance(after_10_ms(loop))]
    assert [str(frame) for frame in said] == ["241#F100000000000000"] * 3
    assert loop.family.overhear(said[0]) == Overheard(1)


def after_10_ms(loop: MemoryLoop) -> MonotonicNs:
    loop.now = MonotonicNs(loop.now + 10 * MS)
    return loop.now


def test_enable_after_the_timeout_is_obeyed() -> None:
    loop = make_guarded()
    loop.order(1, Order(Kind.ENABLE))
    loop.wait(1)
    loop.order(1, Order(Kind.ENABLE))
    assert loop.servo(1).enabled
    assert loop.poll(1)[1].status & (Status.faults() | Status.ENABLED) == Status.ENABLED


def test_motor_at_rest_at_0_degrees_and_0_c_is_polled_all_the_same() -> None:
    loop = make_loop()
    loop.servo(1).temperature_c = 0.0
    assert [sorted(loop.poll(1)) for _ in range(3)] == [[], [1], [1]]


def test_halt_is_one_frame_to_all_unless_one_of_them_is_off() -> None:
    loop = make_loop(make(1), make(2))
    loop.order(1, Order(Kind.ENABLE))
    assert [str(frame) for frame in loop.family.halt([1, 2]).requests] == ["141#8100000000000000"]
    loop.order(2, Order(Kind.ENABLE))
    halt = loop.family.halt([1, 2])
    assert [str(frame) for frame in halt.requests] == ["280#8100000000000000"]
    assert sorted(loop.exchange(halt)) == [1, 2]
