"""What an adapter gives back of our own bytes is taken off, and nothing else ever is."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.buses.echo import EchoFilter
from drivers.clock import MS, MonotonicNs

PING = bytes.fromhex("FFFF010201FB")
PONG = bytes.fromhex("FFFF010200FC")
OTHER = bytes.fromhex("FFFF0204023802BD")
NOW = MonotonicNs(0)


def sent(*requests: bytes) -> EchoFilter:
    echo = EchoFilter()
    for request in requests:
        echo.sent(request, NOW)
    return echo


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """``data`` in chunks; a place beyond its end is none."""
    edges = [0, *sorted({place for place in places if 0 < place < len(data)}), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def heard(echo: EchoFilter, chunks: Sequence[bytes]) -> bytes:
    return b"".join(echo.received(chunk) for chunk in chunks)


places = st.lists(st.integers(1, 60), max_size=8)
# a request begins as no reply does, so that it is plain which bytes are which
requests = st.binary(min_size=1, max_size=12).map(lambda data: b"\xff\xff" + data.replace(b"\xff", b"\xfe"))
replies = st.binary(min_size=1, max_size=12).map(lambda data: data.replace(b"\xff", b"\xfe"))


@given(requests, replies, places)
def test_echo_in_any_pieces_is_taken_off_and_the_reply_is_not(request: bytes, reply: bytes, at: list[int]) -> None:
    echo = sent(request)
    assert heard(echo, cut(request + reply, at)) == reply
    assert echo.echoes == 1


@given(st.lists(st.tuples(requests, replies, st.booleans()), min_size=1, max_size=6), places)
def test_requests_in_flight_come_back_in_their_order_around_the_replies(
    turns: list[tuple[bytes, bytes, bool]], at: list[int]
) -> None:
    """Each reply is heard right behind its request, or only behind the echo of all."""
    echo = sent(*(request for request, _, _ in turns))
    wire, late = b"", b""
    for request, reply, waits in turns:
        wire += request + (b"" if waits else reply)
        late += reply if waits else b""
    expected = b"".join(reply for _, reply, waits in turns if not waits) + late
    assert heard(echo, cut(wire + late, at)) == expected
    assert echo.echoes == len(turns)


@given(st.binary(min_size=1, max_size=12), st.lists(st.binary(min_size=1, max_size=24), min_size=1, max_size=4), places)
def test_without_an_echo_every_reply_that_is_not_the_request_passes_untouched_and_at_once(
    request: bytes, answers: list[bytes], at: list[int]
) -> None:
    reply = b"".join(answers)
    if reply.startswith(request) or request.startswith(reply):
        return  # to the byte what an echo would be
    chunks = cut(reply, at)
    echo = sent(request)
    got = b""
    arrived = b""
    for chunk in chunks:
        got += echo.received(chunk)
        arrived += chunk
        if not request.startswith(arrived):
            assert got == arrived
    assert echo.echoes == 0


def test_reply_that_begins_like_the_request_is_held_until_it_differs() -> None:
    echo = sent(PING)
    assert echo.received(PONG[:4]) == b""
    assert echo.received(PONG[4:5]) == PONG[:5]
    assert echo.received(PONG[5:]) == PONG[5:]


def test_late_reply_ahead_of_the_echo_is_passed_on_once_the_adapter_is_known() -> None:
    echo = sent(PING)
    assert echo.received(PING) == b""
    echo.sent(OTHER, NOW)
    assert echo.received(PONG + OTHER + b"\x01") == PONG + b"\x01"


def test_echo_that_was_lost_does_not_hide_the_next() -> None:
    echo = sent(PING)
    assert echo.received(PING) == b""
    echo.sent(OTHER, NOW)
    echo.sent(PING, NOW)
    assert echo.received(PING + PONG) == PONG
    echo.sent(PING, NOW)
    assert echo.received(PING) == b""


def test_nothing_is_expected_for_ever() -> None:
    echo = sent(PING)
    assert echo.received(PING + PONG) == PONG
    echo.sent(PING, NOW)
    echo.sent(OTHER, MonotonicNs(101 * MS))
    assert echo.received(PING) == PING
    assert echo.received(OTHER) == b""


@pytest.mark.parametrize("answer", [PONG, b""], ids=["answered", "unanswered"])
def test_adapter_that_gave_back_none_of_eight_requests_is_taken_at_its_word(answer: bytes) -> None:
    """Then even a reply that equals the request is passed on: a servo's pong with an error may."""
    echo = EchoFilter()
    for turn in range(9):
        echo.sent(PING, MonotonicNs(turn * 200 * MS))
        assert echo.received(answer) == answer
    assert echo.received(PING[:3]) == PING[:3]
    assert echo.echoes == 0


def test_what_nobody_asked_for_passes_at_once() -> None:
    assert EchoFilter().received(PING) == PING
