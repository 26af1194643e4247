"""When recorded times are due. Deadlines are compared with each other, never with how long a test took."""

import asyncio
import os
import pty
import signal
import sys
import termios
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.clock import MS, SECOND, monotonic_ns
from gateway.recordings.pace import Pace, controlled
from tests.gateway_parts import until

FIRST_NS = 1_790_000_000_000_000_000


@given(speed=st.floats(0.1, 100), steps=st.lists(st.integers(0, 10 * SECOND), min_size=1, max_size=50))
def test_deadlines_are_absolute_so_that_no_error_adds_up(speed: float, steps: list[int]) -> None:
    pace = Pace(speed)
    began, at_ns = pace.due(FIRST_NS), FIRST_NS
    for step in steps:
        at_ns += step
        assert pace.due(at_ns) == began + round((at_ns - FIRST_NS) / speed)


async def test_nothing_is_released_before_it_is_due() -> None:
    pace = Pace(10.0)
    for at_ns in range(FIRST_NS, FIRST_NS + 500 * MS, 25 * MS):
        late_ns = await pace.wait(at_ns)
        assert late_ns >= 0
        assert monotonic_ns() >= pace.due(at_ns)


async def test_at_full_speed_the_end_is_due_at_once() -> None:
    pace = Pace(None)
    assert pace.due(FIRST_NS) == pace.due(FIRST_NS + 3600 * SECOND)
    await pace.wait(FIRST_NS + 3600 * SECOND)


async def test_a_pause_holds_back_what_was_due_and_moves_what_follows_by_its_length() -> None:
    pace = Pace(1.0)
    due_before = pace.due(FIRST_NS + SECOND)
    pace.due(FIRST_NS)
    pace.toggle()
    began = monotonic_ns()
    waiting = asyncio.create_task(pace.wait(FIRST_NS))  # long due
    await until(lambda: monotonic_ns() > began + 60 * MS)
    assert not waiting.done()
    pace.toggle()
    assert pace.due(FIRST_NS + SECOND) - due_before >= 60 * MS
    await waiting


async def test_a_pause_before_the_beginning_holds_it_back() -> None:
    pace = Pace(None)
    pace.toggle()
    waiting = asyncio.create_task(pace.wait(FIRST_NS))
    await asyncio.sleep(0)
    assert not waiting.done()
    pace.toggle()
    await waiting


async def test_a_signal_and_the_space_bar_toggle_and_the_terminal_is_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user, theirs = pty.openpty()
    with os.fdopen(theirs, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        before, handler = settings(terminal), signal.getsignal(signal.SIGUSR1)
        toggled: list[bool] = []
        with controlled(lambda: toggled.append(True)):
            assert settings(terminal) != before
            os.write(user, b"x ")
            await until(lambda: len(toggled) == 1)
            signal.raise_signal(signal.SIGUSR1)
            await until(lambda: len(toggled) == 2)
        assert (settings(terminal), signal.getsignal(signal.SIGUSR1)) == (before, handler)
    os.close(user)


def settings(terminal: TextIO) -> object:
    return termios.tcgetattr(terminal)
