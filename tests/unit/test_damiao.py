"""Damiao: frames on the wire, the gateway's decisions, the simulated motors' registers and modes."""

from dataclasses import replace
from math import inf, isnan
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import MS
from drivers.errors import MotorRefused
from drivers.family import CanFrame, run_with_replies
from drivers.motor import Kind, Order, Status
from drivers.protocols import damiao
from drivers.protocols.damiao import (
    KD_MAX,
    KP_MAX,
    REQUEST_ID,
    Command,
    Damiao,
    Mit,
    Mode,
    Options,
    RawFeedback,
    Rid,
    Scale,
    State,
    System,
    decode_feedback,
    decode_mit,
    decode_value,
    encode_feedback,
    encode_mit,
    encode_value,
    is_register_reply,
    make_pos_vel,
    make_refresh,
    make_register,
    make_system,
    make_torque,
    make_vel,
)
from tests.memory_loop import Loop, make_motor

DM4310 = Scale(12.5, 30.0, 10.0)

# damiao-motor damiao_motor/core/motor.py and LeRobot motors/damiao give the same bytes, with the DM4310's scaling
GOLDEN_MIT = [
    (Mit(0, 0, 0, 0, 0), "7F FF 7F F0 00 00 07 FF"),
    (Mit(1.25, -2, 40, 1.5, 0.5), "8C CC 77 71 47 4C C8 65"),
    (Mit(-0.6, 0, 100, 2, 0), "79 DA 7F F3 33 66 67 FF"),
]
# python-damiao-driver docs, communication protocol
GOLDEN_FRAMES = [
    (make_system(1, System.ENABLE), "001#FFFFFFFFFFFFFFFC"),
    (make_system(2, System.DISABLE), "002#FFFFFFFFFFFFFFFD"),
    (make_system(3, System.SET_ZERO), "003#FFFFFFFFFFFFFFFE"),
    (make_system(15, System.CLEAR_ERROR), "00F#FFFFFFFFFFFFFFFB"),
    (make_refresh(1), "7FF#0100CC0000000000"),
    (make_register(1, Command.READ, Rid.PMAX), "7FF#0100331500000000"),
    (make_register(1, Command.WRITE, Rid.CTRL_MODE, encode_value(Rid.CTRL_MODE, 2)), "7FF#0100550A02000000"),
    (make_register(1, Command.SAVE, 1), "7FF#0100AA0100000000"),
    (make_pos_vel(1, 1.0, -2.0), "101#0000803F000000C0"),
    (make_vel(1, 1.0), "201#0000803F00000000"),
]
frames = st.builds(CanFrame, st.integers(0, 0x7FF), st.binary(max_size=8), st.booleans())


@pytest.mark.parametrize(("command", "wire"), GOLDEN_MIT)
def test_mit_commands_are_those_of_two_libraries(command: Mit, wire: str) -> None:
    assert encode_mit(command, DM4310) == bytes.fromhex(wire)
    assert decode_mit(bytes.fromhex(wire), DM4310) == pytest.approx(command, abs=0.13)


@pytest.mark.parametrize(("frame", "text"), GOLDEN_FRAMES)
def test_frames_are_those_of_the_protocol(frame: CanFrame, text: str) -> None:
    assert str(frame) == text


def test_feedback_is_what_two_libraries_read() -> None:
    data = bytes.fromhex("11 7F FF 7F F7 FF 23 28")
    told = decode_feedback(data, DM4310)
    assert (told.nibble, told.state, told.mos_c, told.rotor_c) == (1, State.ENABLED, 35, 40)
    assert told.position_rad == pytest.approx(-1.9e-4, abs=1e-5)
    assert told.velocity_rad_s == pytest.approx(-0.0073, abs=1e-4)
    assert told.torque_nm == pytest.approx(-0.0024, abs=1e-4)


@given(
    st.builds(
        Mit,
        st.floats(-12.5, 12.5),
        st.floats(-30, 30),
        st.floats(0, KP_MAX),
        st.floats(0, KD_MAX),
        st.floats(-10, 10),
    )
)
def test_mit_command_comes_back_within_one_step_of_each_field(command: Mit) -> None:
    back = decode_mit(encode_mit(command, DM4310), DM4310)
    steps = (25 / 65535, 60 / 4095, KP_MAX / 4095, KD_MAX / 4095, 20 / 4095)
    for sent, received, step in zip(command, back, steps, strict=True):
        assert abs(sent - received) <= step * 1.001


@given(
    st.builds(
        RawFeedback,
        st.integers(0, 15),
        st.integers(0, 15),
        st.floats(-12.5, 12.5),
        st.floats(-30, 30),
        st.floats(-10, 10),
        st.integers(0, 255),
        st.integers(0, 255),
    )
)
def test_feedback_comes_back_within_one_step_of_each_field(feedback: RawFeedback) -> None:
    back = decode_feedback(encode_feedback(feedback, DM4310), DM4310)
    steps = (0, 0, 25 / 65535, 60 / 4095, 20 / 4095, 0, 0)
    for sent, received, step in zip(feedback, back, steps, strict=True):
        assert abs(sent - received) <= step * 1.001


@given(st.sampled_from(Rid), st.integers(0, 2**24))
def test_register_values_come_back(rid: Rid, value: int) -> None:
    assert decode_value(rid, encode_value(rid, value)) == value


# --- the gateway's side -----------------------------------------------------------------------------------------------


def make_loop(*bus_ids: int) -> Loop:
    loop = Loop([make_motor("damiao", bus_id, index) for index, bus_id in enumerate(bus_ids)])
    for bus_id in bus_ids:
        assert loop.connect(bus_id) is not None
    return loop


def ask(loop: Loop, frame: CanFrame) -> list[CanFrame]:
    return [reply for _, reply in loop.bus.respond(frame, loop.now)]


def write(loop: Loop, bus_id: int, rid: Rid, value: float) -> list[CanFrame]:
    return ask(loop, make_register(bus_id, Command.WRITE, rid, encode_value(rid, value)))


def matches(loop: Loop, frame: CanFrame) -> bool:
    """Whether a poll would take this frame for a sample."""
    exchange = loop.family.poll(list(loop.family.motors))
    return any(exchange.match(packet) is not None for packet in loop.family.unpack(frame))


def test_scaling_is_the_motors_own() -> None:
    loop = Loop([make_motor("damiao", 1)])
    write(loop, 1, Rid.PMAX, 3.0)
    info = loop.connect(1)
    assert info.details == {"PMAX": 3.0, "VMAX": 30.0, "TMAX": 10.0, "CTRL_MODE": 1.0}
    loop.servo(1).position_rad = 1.5
    assert loop.poll(1)[1].position_rad == pytest.approx(1.5, abs=1e-3)


def test_nothing_is_decoded_before_the_scaling_is_known() -> None:
    loop = Loop([make_motor("damiao", 1)])
    assert loop.poll(1) == {}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_absurd_scaling_is_refused_by_name_and_value(value: float) -> None:
    family = Damiao([make_motor("damiao", 1)])
    good = {
        rid: {1: (0x11, encode_value(rid, 5))} for rid in (Rid.MST_ID, Rid.PMAX, Rid.TMAX, Rid.CTRL_MODE, Rid.SW_VER)
    }
    replies = [
        good[Rid.MST_ID], good[Rid.PMAX], {1: (0x11, pack("<f", value))}, good[Rid.TMAX],
        good[Rid.CTRL_MODE], good[Rid.SW_VER],
    ]  # fmt: skip
    with pytest.raises(MotorRefused, match=f"VMAX is {value}"):
        run_with_replies(family.connect(1), replies)


@pytest.mark.parametrize("limits", [(-1.0, 12.6), (-12.5, 12.5), (-13.0, 1.0)])
def test_motor_that_may_go_where_its_positions_wrap_is_refused_with_both(limits: tuple[float, float]) -> None:
    loop = Loop([replace(make_motor("damiao", 1), position_rad=limits)])
    told = f"position_rad is {limits[0]:g} to {limits[1]:g}, and its positions wrap at 12.5"
    with pytest.raises(MotorRefused, match=told):
        loop.connect(1)
    assert loop.poll(1) == {}


@pytest.mark.parametrize("limits", [(-12.4, 12.4), (-inf, inf)])
def test_motor_that_stays_within_pmax_or_whose_range_nobody_knows_is_connected(limits: tuple[float, float]) -> None:
    assert Loop([replace(make_motor("damiao", 1), position_rad=limits)]).connect(1)


def test_replies_with_another_identifier_are_refused_with_what_to_set() -> None:
    loop = Loop([make_motor("damiao", 1)])
    write(loop, 1, Rid.MST_ID, 0)
    with pytest.raises(MotorRefused, match=r"identifier 0x0, expected 0x11: set master_id = 0x0"):
        loop.connect(1)


@pytest.mark.parametrize(("master_id", "options"), [(0x11, {}), (0x05, {"master_id": 0x05})])
def test_identify_tells_the_master_id_that_a_configuration_needs(master_id: int, options: dict[str, int]) -> None:
    loop = Loop([make_motor("damiao", 1)])
    write(loop, 1, Rid.MST_ID, master_id)
    info = loop.run(loop.family.identify(1))
    assert info is not None
    assert info.options == options
    assert {frame.data[2] for frame in loop.sent} == {Command.READ}


def test_motors_that_share_a_master_id_are_told_apart() -> None:
    motors = [replace(make_motor("damiao", bus_id), options=Options(master_id=0)) for bus_id in (1, 2)]
    loop = Loop(motors)
    for bus_id in (1, 2):
        assert loop.connect(bus_id) is not None
    loop.servo(2).position_rad = 1.0
    told = loop.poll(1, 2)
    assert [round(told[bus_id].position_rad, 2) for bus_id in (1, 2)] == [0, 1]


@pytest.mark.parametrize("master_id", [-1, 0x7FF, 0x800])
def test_master_id_that_cannot_be_is_refused(master_id: int) -> None:
    with pytest.raises(ValueError, match="master_id"):
        Options(master_id=master_id)


def test_another_process_polling_is_no_sample() -> None:
    loop = make_loop(1)
    assert not matches(loop, make_refresh(1))  # would read as -12.42 rad
    assert not matches(loop, make_register(1, Command.READ, Rid.PMAX))


def test_late_register_reply_is_no_sample() -> None:
    loop = make_loop(1)
    (reply,) = ask(loop, make_register(1, Command.READ, Rid.PMAX))
    assert reply.can_id == 0x11
    assert is_register_reply(reply.data, 1)
    assert not matches(loop, reply)


def test_feedback_on_a_foreign_identifier_or_of_a_foreign_motor_is_no_sample() -> None:
    loop = make_loop(1)
    (feedback,) = ask(loop, make_refresh(1))
    assert matches(loop, feedback)
    assert not matches(loop, replace(feedback, can_id=0x12))
    assert not matches(loop, replace(feedback, data=b"\x02" + feedback.data[1:]))
    assert not matches(loop, replace(feedback, data=feedback.data[:7]))
    assert not matches(loop, replace(feedback, extended=True))


def test_frames_that_are_too_short_count_as_garbage_if_they_bear_a_motors_identifier() -> None:
    family = make_loop(1).family
    for frame in (CanFrame(0x11, bytes(7)), CanFrame(0x11, b""), CanFrame(0x11, bytes(7), True), CanFrame(0x55, b"")):
        assert list(family.unpack(frame)) == []
    assert family.garbage == 2


@pytest.mark.parametrize(
    ("error", "words"), [(0, []), (0x8, ["over voltage (8)"]), (0xE, ["overload (E)"]), (0x5, ["an unknown state (5)"])]
)
def test_error_is_the_state_in_words(error: int, words: list[str]) -> None:
    assert list(Damiao.explain(error)) == words


@given(frames)
def test_no_frame_raises_and_only_eight_bytes_from_a_known_sender_are_a_sample(frame: CanFrame) -> None:
    loop = make_loop(1, 2)
    if matches(loop, frame):
        assert (frame.can_id, frame.data[0] & 0xF) in {(0x11, 1), (0x12, 2)}
        assert len(frame.data) == 8
        assert not frame.extended
    list(loop.bus.respond(frame, loop.now))
    assert matches(loop, ask(loop, make_refresh(2))[0]) or frame.can_id == REQUEST_ID


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (State.DISABLED, Status(0)),
        (State.ENABLED, Status.ENABLED),
        (State.OVER_VOLTAGE, Status.FAULT_VOLTAGE),
        (State.ROTOR_OVER_TEMPERATURE, Status.FAULT_TEMPERATURE),
        (State.COMMUNICATION_LOST, Status.FAULT_COMMUNICATION),
        (State.OVERLOAD, Status.FAULT_OVERLOAD),
        (0x5, Status.FAULT_OTHER),
    ],
)
def test_state_becomes_common_status_and_only_a_fault_an_error(state: int, status: Status) -> None:
    loop = make_loop(1)
    data = encode_feedback(RawFeedback(1, state, 0.5, 0, 2.5, 35, 40), DM4310)
    reply = loop.family.poll([1]).match(CanFrame(0x11, data))
    assert reply is not None
    bus_id, told = reply
    assert bus_id == 1
    assert (told.status, told.vendor_error) == (status, 0 if state in (0, 1) else state)
    assert told.torque_nm == pytest.approx(2.5, abs=0.01)
    assert told.temperature_c == 40  # the rotor's
    assert isnan(told.voltage_v)
    assert isnan(told.current_a)


def test_enabling_selects_pos_vel_in_memory_only_and_holds_at_once() -> None:
    loop = make_loop(1)
    loop.servo(1).position_rad = 0.5
    loop.sent.clear()
    loop.order(1, Order(Kind.ENABLE))
    texts = [str(frame) for frame in loop.sent]
    assert "7FF#0100550A02000000" in texts
    assert not any("AA" in text[8:10] for text in texts)
    at = texts.index("001#FFFFFFFFFFFFFFFC")
    assert texts[at + 1].startswith("101#")
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(0.5, abs=0.002)


def test_mode_that_another_master_changed_is_set_back_by_the_next_order() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    write(loop, 1, Rid.CTRL_MODE, Mode.VEL)
    refresh = loop.family.refresh(1)
    assert refresh is not None
    loop.run(refresh)
    loop.order(1, Order(Kind.POSITION, 0.5, 1.0))
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize(
    ("order", "mode", "setpoint"),
    [
        (Order(Kind.VELOCITY, 1.0), Mode.VEL, "201#0000803F00000000"),
        (Order(Kind.TORQUE, 0.5), Mode.MIT, f"001#{encode_mit(Mit(0, 0, 0, 0, 0.5), DM4310).hex().upper()}"),
    ],
)
def test_first_setpoint_travels_right_behind_the_change_of_mode_and_again_when_it_was_read_back(
    order: Order, mode: Mode, setpoint: str
) -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    loop.sent.clear()
    loop.order(1, order)
    read = "7FF#0100330A00000000"
    assert [str(frame) for frame in loop.sent] == [read, f"7FF#0100550A0{mode:d}000000", setpoint, read, setpoint]
    loop.sent.clear()
    loop.order(1, order)
    assert [str(frame) for frame in loop.sent] == [setpoint]


def test_motor_that_turns_stands_still_before_its_mode_changes_to_hold() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.VELOCITY, 2.0))
    loop.wait(0.5)
    loop.sent.clear()
    loop.order(1, Order(Kind.STOP))
    texts = [str(frame) for frame in loop.sent]
    assert texts.index("201#0000000000000000") < texts.index("7FF#0100550A02000000")
    assert texts[-1].startswith("101#")


def test_enabling_a_motor_that_turns_holds_it() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.VELOCITY, 0.5))
    loop.wait(0.5)
    loop.order(1, Order(Kind.ENABLE))
    loop.wait(1)
    assert loop.servo(1).velocity_rad_s == 0
    assert loop.servo(1).position_rad == pytest.approx(0.25, abs=0.05)


def test_mode_whose_change_was_not_confirmed_is_set_again_by_the_next_order() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    change = loop.family.order(1, Order(Kind.VELOCITY, 0.5))
    change.send({1: loop.exchange(next(change))[1]})
    change.send({})  # neither the change of mode nor the setpoint behind it is answered
    with pytest.raises(MotorRefused, match="no reply to a read of CTRL_MODE"):
        change.send({})
    loop.sent.clear()
    loop.order(1, Order(Kind.POSITION, 0.5, 1.0))
    assert "7FF#0100330A00000000" in [str(frame) for frame in loop.sent]


def make_guarded() -> Loop:
    loop = Loop([replace(make_motor("damiao", 1), watchdog_ns=500 * MS)])
    assert loop.connect(1) is not None
    loop.sent.clear()
    return loop


def test_timeout_is_written_in_units_of_50_us_and_never_saved() -> None:
    loop = make_guarded()
    loop.order(1, Order(Kind.ENABLE))
    sent = [str(frame) for frame in loop.sent]
    assert "7FF#0100550910270000" in sent
    assert not any(frame.startswith("7FF#0100AA") for frame in sent)
    assert sent.index("7FF#0100550910270000") < sent.index("001#FFFFFFFFFFFFFFFC")


def test_motor_whose_timeout_cannot_be_set_is_not_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_guarded()
    monkeypatch.setattr(damiao, "_READ_ONLY", damiao._READ_ONLY | {Rid.TIMEOUT})
    refusal = loop.refusal(1, Order(Kind.ENABLE))
    assert refusal.detail == "its watchdog cannot be armed, TIMEOUT (register 9): sent 10000, read 0"
    assert not loop.servo(1).enabled


def test_halt_is_one_burst_that_suits_each_motors_mode() -> None:
    loop = make_loop(1, 2, 3, 4)
    for bus_id, kind in ((1, Kind.POSITION), (2, Kind.VELOCITY), (3, Kind.TORQUE)):
        loop.order(bus_id, Order(Kind.ENABLE))
        loop.order(bus_id, Order(kind, 0.0, 0.0))
    loop.poll(1, 2, 3, 4)
    assert [frame.can_id for frame in loop.family.halt([1, 2, 3, 4]).requests] == [0x101, 0x202, 0x7FF, 0x103]


@pytest.mark.parametrize(
    ("order", "detail"),
    [
        (Order(Kind.VELOCITY, -30.1), "-30.1 rad/s; the motor's VMAX is 30.0 rad/s"),
        (Order(Kind.TORQUE, 10.1), "10.1 N m; the motor's TMAX is 10.0 N m"),
    ],
)
def test_setpoint_beyond_the_motors_own_range_is_refused_with_both(order: Order, detail: str) -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    refusal = loop.refusal(1, order)
    assert (refusal.reason, refusal.detail) == ("out_of_limits", detail)


def test_stop_overrules_whoever_runs_the_motor_in_another_mode() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    write(loop, 1, Rid.CTRL_MODE, Mode.VEL)
    loop.connect(1)
    ask(loop, make_vel(1, 0.5))
    loop.wait(1)
    loop.order(1, Order(Kind.STOP))
    loop.wait(1)
    told = loop.poll(1)[1]
    assert told.velocity_rad_s == pytest.approx(0, abs=0.01)
    assert told.status == Status.ENABLED


def test_mode_that_cannot_be_set_is_refused_with_what_was_sent_and_read() -> None:
    family = make_loop(1).family
    present = {1: RawFeedback(1, State.DISABLED, 0, 0, 0, 25, 25)}
    mit = {1: (0x11, encode_value(Rid.CTRL_MODE, Mode.MIT))}
    with pytest.raises(MotorRefused, match=r"sent 2, read 1"):
        run_with_replies(family.order(1, Order(Kind.ENABLE)), [present, mit, mit, mit])


def test_target_beyond_pmax_is_refused_with_both() -> None:
    loop = make_loop(1)
    loop.order(1, Order(Kind.ENABLE))
    refusal = loop.refusal(1, Order(Kind.POSITION, 12.6, 1.0))
    assert (refusal.reason, refusal.detail) == ("out_of_limits", "12.6 rad; the motor's PMAX is 12.5 rad")


def test_order_before_the_motor_was_connected_is_refused() -> None:
    loop = Loop([make_motor("damiao", 1)])
    assert loop.refusal(1, Order(Kind.ENABLE)).reason == "motor_offline"


def test_hot_motor_cannot_be_enabled_until_its_fault_is_cleared() -> None:
    loop = make_loop(1)
    loop.servo(1).temperature_c = 101
    assert loop.poll(1)[1].vendor_error == State.ROTOR_OVER_TEMPERATURE
    assert "rotor over temperature" in loop.refusal(1, Order(Kind.CLEAR_FAULT)).detail
    loop.servo(1).temperature_c = 50
    assert "clear the fault first" in loop.refusal(1, Order(Kind.ENABLE)).detail
    loop.order(1, Order(Kind.CLEAR_FAULT))
    loop.order(1, Order(Kind.ENABLE))
    assert loop.poll(1)[1].status == Status.ENABLED


# --- the motors' side -------------------------------------------------------------------------------------------------


def test_frames_for_others_are_not_answered() -> None:
    loop = make_loop(1)
    for frame in (
        make_refresh(2),
        make_system(3, System.ENABLE),
        CanFrame(0x11, bytes(8)),
        CanFrame(1, bytes(8), True),
    ):
        assert ask(loop, frame) == []


def test_command_of_another_mode_neither_moves_nor_answers() -> None:
    loop = make_loop(1)
    ask(loop, make_system(1, System.ENABLE))
    assert ask(loop, make_pos_vel(1, 1.0, 1.0)) == []
    loop.wait(1)
    assert loop.servo(1).position_rad == 0


def test_mit_command_with_stiffness_goes_to_its_position() -> None:
    loop = make_loop(1)
    ask(loop, make_system(1, System.ENABLE))
    assert ask(loop, CanFrame(1, encode_mit(Mit(1.0, 0, 10, 1, 0), DM4310)))
    loop.wait(2)
    assert loop.servo(1).position_rad == pytest.approx(1.0, abs=0.001)


@pytest.mark.parametrize(
    ("mode", "command"),
    [
        (Mode.VEL, make_vel(1, -0.5)),
        (Mode.MIT, CanFrame(1, encode_mit(Mit(0, -0.5, 0, 1, 0), DM4310))),
        (Mode.MIT, CanFrame(1, encode_mit(Mit(0, 0.5, 0, 2, -2), DM4310))),  # kd (v - v') + t = 0
    ],
)
def test_velocity_command_turns_the_motor_at_that_velocity(mode: Mode, command: CanFrame) -> None:
    loop = make_loop(1)
    write(loop, 1, Rid.CTRL_MODE, mode)
    ask(loop, make_system(1, System.ENABLE))
    assert ask(loop, command)
    loop.wait(1)
    assert loop.servo(1).velocity_rad_s == pytest.approx(-0.5, abs=0.01)


@pytest.mark.parametrize(("torque_nm", "moves"), [(0.0, False), (0.15, False), (0.5, True)])
def test_torque_moves_the_motor_if_it_overcomes_friction(torque_nm: float, moves: bool) -> None:
    loop = make_loop(1)
    ask(loop, make_system(1, System.ENABLE))
    ask(loop, make_torque(1, torque_nm, DM4310))
    loop.wait(0.2)
    assert (loop.servo(1).position_rad > 0.05) == moves


def test_zero_is_where_it_was_set() -> None:
    loop = make_loop(1)
    loop.servo(1).position_rad = 0.7
    ask(loop, make_system(1, System.SET_ZERO))
    assert loop.poll(1)[1].position_rad == pytest.approx(0, abs=0.001)
    loop.order(1, Order(Kind.ENABLE))
    loop.order(1, Order(Kind.POSITION, 0.1, 1.0))
    loop.wait(1)
    assert loop.servo(1).position_rad == pytest.approx(0.8, abs=0.001)


def test_position_wraps_at_pmax() -> None:
    loop = Loop([make_motor("damiao", 1)])
    write(loop, 1, Rid.PMAX, 3.0)
    loop.connect(1)
    loop.servo(1).position_rad = 3.1
    assert loop.poll(1)[1].position_rad == pytest.approx(-2.9, abs=0.001)


@pytest.mark.parametrize(
    ("rid", "value"), [(Rid.CTRL_MODE, 7), (Rid.SW_VER, 1), (Rid.PMAX, -1.0), (Rid.VMAX, float("nan"))]
)
def test_register_that_cannot_be_so_keeps_its_value(rid: Rid, value: float) -> None:
    loop = make_loop(1)
    (before,) = ask(loop, make_register(1, Command.READ, rid))
    (reply,) = write(loop, 1, rid, value)
    assert reply.data[4:] == before.data[4:]


def test_unknown_register_is_not_answered() -> None:
    assert ask(make_loop(1), make_register(1, Command.READ, 77)) == []


def test_reboot_forgets_what_was_not_saved() -> None:
    loop = make_loop(1)
    write(loop, 1, Rid.TIMEOUT, 100)
    ask(loop, make_register(1, Command.SAVE, 1))
    write(loop, 1, Rid.CTRL_MODE, Mode.VEL)
    ask(loop, make_system(1, System.ENABLE))
    loop.bus.reboot(loop.simulated(1))
    assert not loop.servo(1).enabled
    held = {rid: ask(loop, make_register(1, Command.READ, rid))[0].data[4] for rid in (Rid.TIMEOUT, Rid.CTRL_MODE)}
    assert held == {Rid.TIMEOUT: 100, Rid.CTRL_MODE: Mode.MIT}


def test_motor_with_a_wrong_address_says_so_in_feedback_and_registers_until_it_is_healed() -> None:
    loop = make_loop(1)
    requests = make_refresh(1), make_register(1, Command.READ, Rid.PMAX)
    loop.simulated(1).faults.wrong_id = 5
    assert [ask(loop, request)[0].data[0] & 0xF for request in requests] == [5, 5]
    loop.simulated(1).faults.wrong_id = None
    assert [ask(loop, request)[0].data[0] & 0xF for request in requests] == [1, 1]
