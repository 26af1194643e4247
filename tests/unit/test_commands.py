"""Records of the commands topic: a good one is understood, anything else is Unreadable and says why."""

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.motor import Kind
from gateway.commands import (
    MOST_BYTES,
    MOST_ID,
    MOST_TTL_MS,
    Command,
    Outcome,
    Reason,
    State,
    Unreadable,
    decode_command,
    decode_outcome,
    encode_command,
)

GOOD: dict[str, Any] = {
    "id": "c1",
    "motor": "joint1",
    "kind": "position",
    "value": 1.0,
    "ttl_ms": 100,
    "issued_at_ns": 5,
}


def encode(**changes: Any) -> bytes:
    """The good record with other values; ``...`` leaves a field out."""
    fields = {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}
    return json.dumps(fields).encode()


def unreadable(raw: bytes) -> Unreadable:
    with pytest.raises(Unreadable) as caught:
        decode_command(raw)
    return caught.value


def test_good_record_is_understood() -> None:
    assert decode_command(encode()) == Command("c1", "joint1", Kind.POSITION, 100.0, 5, 1.0)


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=MOST_ID)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        Command,
        id=TEXT,
        motor=TEXT,
        kind=st.sampled_from(Kind),
        ttl_ms=st.floats(1e-3, MOST_TTL_MS),
        issued_at_ns=st.integers(-(2**62), 2**62),
        value=st.none() | NUMBER,
        velocity_rad_s=st.none() | NUMBER,
        issuer=st.none() | TEXT,
    )
)
def test_encoded_command_comes_back_unless_its_value_does_not_fit_its_kind(command: Command) -> None:
    takes_value = command.kind in {Kind.POSITION, Kind.VELOCITY, Kind.TORQUE}
    if (command.value is not None) is takes_value:
        assert decode_command(encode_command(command)) == command
    else:
        assert "value" in unreadable(encode_command(command)).detail


BAD = [  # (record, what is said, the id that is made out)
    (b"", "not JSON", None),
    (b" ", "not JSON", None),
    (b"{", "not JSON", None),
    (b"not json", "not JSON", None),
    (encode()[:-1], "not JSON", None),
    (encode() + b"x", "not JSON", None),
    (b"[]", "must be a JSON object, is list", None),
    (b"null", "must be a JSON object, is NoneType", None),
    (b'"text"', "must be a JSON object, is str", None),
    (b"7", "must be a JSON object, is int", None),
    (b"\xff\xfe\x00", "not JSON", None),
    (b'{"id": "\xff"}', "not JSON", None),
    (b'{"id": "a", "kind": "\xc3("}', "not JSON", None),
    (b'{"id": "\\ud800"}', "not JSON", None),
    (b"[" * 60_000, "not JSON", None),
    (b'{"a":' * 10_000, "not JSON", None),
    (b'{"id": "' + b"x" * MOST_BYTES + b'"}', f"at most {MOST_BYTES}", None),
    (encode(id=...), "missing required field `id`", None),
    (encode(id=7), "Expected `str`, got `int` - at `$.id`", None),
    (encode(id=None), "$.id", None),
    (encode(id=""), "id has 0 characters", None),
    (encode(id="x" * (MOST_ID + 1)), f"id has {MOST_ID + 1} characters", None),
    (encode(motor=...), "missing required field `motor`", "c1"),
    (encode(motor=["joint1"]), "$.motor", "c1"),
    (encode(kind=...), "missing required field `kind`", "c1"),
    (encode(kind="explode"), "Invalid enum value 'explode'", "c1"),
    (encode(kind="POSITION"), "Invalid enum value", "c1"),
    (encode(ttl_ms=...), "missing required field `ttl_ms`", "c1"),
    (encode(ttl_ms=0), "ttl_ms = 0: must be above 0", "c1"),
    (encode(ttl_ms=-1), "ttl_ms = -1: must be above 0", "c1"),
    (encode(ttl_ms=MOST_TTL_MS + 1), f"at most {MOST_TTL_MS}", "c1"),
    (encode(ttl_ms="100"), "$.ttl_ms", "c1"),
    (encode(ttl_ms=True), "$.ttl_ms", "c1"),
    (encode(issued_at_ns=...), "missing required field `issued_at_ns`", "c1"),
    (encode(issued_at_ns=1.5), "$.issued_at_ns", "c1"),
    (encode(issued_at_ns=2**63), "issued_at_ns", "c1"),
    (encode(issued_at_ns=-(2**63)), "issued_at_ns", "c1"),
    (encode(issued_at_ns=-(10**400)), "issued_at_ns", "c1"),
    (encode(issued_at_ns=10**400), "issued_at_ns", "c1"),
    (encode(issued_at_ns=True), "$.issued_at_ns", "c1"),
    (encode(value=...), "kind position needs a value", "c1"),
    (encode(value=None), "kind position needs a value", "c1"),
    (encode(value="1"), "$.value", "c1"),
    (encode(value=True), "$.value", "c1"),
    (encode(value=10**400), "$.value", "c1"),
    (encode(value=float("nan")), "not JSON", None),
    (encode(value=float("inf")), "not JSON", None),
    (encode().replace(b"1.0", b"1e999"), "not JSON", None),
    (encode(kind="stop"), "kind stop takes no value, got 1", "c1"),
    (encode(kind="enable"), "kind enable takes no value", "c1"),
    (encode(velocity_rad_s="fast"), "$.velocity_rad_s", "c1"),
    (encode(targets={"joint1": "x"}), "$.targets", "c1"),
    (encode(targets=[1]), "$.targets", "c1"),
    (encode(issuer=5), "$.issuer", "c1"),
    (encode(surprise=1), "unknown field `surprise`", "c1"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "said", "command_id"), BAD, ids=lambda value: str(value)[:40])
def test_bad_record_is_unreadable_and_says_why(raw: bytes, said: str, command_id: str | None) -> None:
    error = unreadable(raw)
    assert said in error.detail
    assert error.command_id == command_id


def test_motor_is_made_out_where_it_can_be() -> None:
    assert unreadable(encode(ttl_ms=0)).motor == "joint1"
    assert unreadable(encode(id="")).motor == "joint1"
    assert unreadable(encode(motor=5)).motor is None


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_unreadable(raw: bytes) -> None:
    unreadable(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
FIELD = st.sampled_from([*Command.__struct_fields__, "other"])


@given(st.dictionaries(FIELD, JSON | st.integers(-(10**30), 10**30)))
def test_arbitrary_fields_give_a_command_or_unreadable(changes: dict[str, Any]) -> None:
    with contextlib.suppress(Unreadable):
        command = decode_command(encode(**changes))
        assert 0 < len(command.id) <= MOST_ID
        assert 0 < command.ttl_ms <= MOST_TTL_MS


@given(
    st.builds(
        Outcome,
        command_id=TEXT,
        motor=TEXT,
        state=st.sampled_from(State),
        at_ns=st.integers(0, 2**62),
        latency_us=st.integers(0, 2**40),
        reason=st.none() | st.sampled_from(Reason),
        detail=st.text(st.characters(codec="utf-8")),
    ),
    st.integers(0, 99),
)
def test_outcome_comes_back_from_its_entry(outcome: Outcome, partition: int) -> None:
    entry = outcome.entry(partition)
    assert (entry.topic, entry.partition, entry.key) == ("outcomes", partition, outcome.motor)
    assert decode_outcome(entry.value) == outcome


def test_only_accepted_is_not_the_end() -> None:
    assert [state for state in State if not Outcome("a", "m", state, 0, 0).final] == [State.ACCEPTED]


def test_record_that_is_no_outcome_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_outcome(b'{"command_id": "a"}')
