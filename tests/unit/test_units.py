"""Values with units: what people write becomes SI, and a unit of something else is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.motor import SETPOINTS, Kind
from gateway.units import parse, parse_target

numbers = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("text", "kind", "si"),
    [
        ("45deg", Kind.POSITION, math.pi / 4),
        ("-45 deg", Kind.POSITION, -math.pi / 4),
        ("0.5rad", Kind.POSITION, 0.5),
        ("250mrad", Kind.POSITION, 0.25),
        (".25turn", Kind.POSITION, math.pi / 2),
        ("+1e-1", Kind.POSITION, 0.1),
        ("10rpm", Kind.VELOCITY, math.pi / 3),
        ("20deg/s", Kind.VELOCITY, math.pi / 9),
        ("1.rad/s", Kind.VELOCITY, 1.0),
        ("-1turn/s", Kind.VELOCITY, -2 * math.pi),
        ("0.3Nm", Kind.TORQUE, 0.3),
        ("5e2mNm", Kind.TORQUE, 0.5),
    ],
)
def test_a_value_becomes_si(text: str, kind: Kind, si: float) -> None:
    assert parse(text, kind) == pytest.approx(si, rel=1e-15)


@given(numbers, st.sampled_from(sorted(SETPOINTS)))
def test_a_plain_number_is_si_to_the_last_bit(number: float, kind: Kind) -> None:
    assert parse(repr(number), kind) == number


@pytest.mark.parametrize(
    ("text", "kind", "fault"),
    [
        ("45deg", Kind.VELOCITY, "45deg: a velocity is in rad/s, deg/s, rpm or turn/s, not in deg"),
        ("10rpm", Kind.POSITION, "10rpm: a position is in rad, mrad, deg or turn, not in rpm"),
        ("1N", Kind.TORQUE, "1N: a torque is in Nm or mNm, not in N"),
        ("1 nm", Kind.TORQUE, "not in nm"),
        ("fast", Kind.VELOCITY, "fast: must be a number, in rad/s"),
        ("", Kind.POSITION, "must be a number"),
        ("1,5deg", Kind.POSITION, "must be a number"),
        ("٣", Kind.POSITION, "must be a number"),
        ("nan", Kind.POSITION, "must be a number"),
        ("inf", Kind.POSITION, "must be a number"),
        ("1e999", Kind.POSITION, "must be a finite number"),
        ("1", Kind.ENABLE, "enable takes no value"),
    ],
)
def test_what_is_no_such_value_is_told(text: str, kind: Kind, fault: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is looked at
        parse(text, kind)
    assert fault in str(caught.value)


def test_a_target_names_its_motor() -> None:
    assert parse_target("joint1=90deg", Kind.POSITION) == ("joint1", math.pi / 2)


@pytest.mark.parametrize("text", ["joint1", "=1", "joint1=", "joint1=90rpm"])
def test_what_is_no_target_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|not in"):
        parse_target(text, Kind.POSITION)
