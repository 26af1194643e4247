"""What a client makes of outcomes, and which setpoints of a stream it sends."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from drivers.motor import Kind
from gateway.client import UNDER_WAY, CommandError, Sent, Stream
from gateway.commands import Command, Outcome, State
from tests.gateway_parts import DEADLINE_S, until


def make_sent(value: float = 0.0, motor: str = "joint1", on_final: Callable[[Outcome], None] | None = None) -> Sent:
    return Sent(Command("a1", motor, Kind.POSITION, 500.0, 0, value), on_final)


def outcome(state: State) -> Outcome:
    return Outcome("a1", "joint1", state, 0, 0)


class Way:
    """Takes what is put; holds every put up while it is closed."""

    def __init__(self) -> None:
        self.puts: list[list[Sent]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def put(self, sents: Sequence[Sent]) -> None:
        self.puts.append(list(sents))
        await self.open.wait()

    def values(self) -> list[dict[str, float | None]]:
        return [{sent.command.motor: sent.command.value for sent in put} for put in self.puts]


def make_stream(way: Way, period_s: float = 0.0) -> Stream:
    return Stream(lambda motor, value, on_final: make_sent(value, motor, on_final), way.put, period_s)


# --- outcomes ---------------------------------------------------------------------------------------------------------


async def test_outcomes_come_up_to_the_final_one_also_to_who_asks_late() -> None:
    sent = make_sent()
    sent.hear(outcome(State.ACCEPTED))
    asked = asyncio.create_task(sent.outcome(DEADLINE_S))
    assert sent.final is None
    sent.hear(outcome(State.DONE))
    assert (await asked).state is State.DONE
    assert [heard.state async for heard in sent.outcomes(0)] == [State.ACCEPTED, State.DONE]


async def test_an_outcome_that_comes_while_one_is_looked_at_is_not_passed_over() -> None:
    sent = make_sent()
    sent.hear(outcome(State.ACCEPTED))
    looked_at = []
    async for heard in sent.outcomes(DEADLINE_S):
        looked_at.append(heard.state)
        sent.hear(outcome(State.DONE))
    assert looked_at == [State.ACCEPTED, State.DONE]


async def test_what_becomes_of_a_copy_of_an_accepted_command_is_not_its_outcome() -> None:
    sent = make_sent()
    for state in (State.ACCEPTED, State.REJECTED, State.DONE, State.FAILED):
        sent.hear(outcome(state))
    assert (await sent.outcome(0)).state is State.DONE


async def test_a_command_of_which_nothing_is_heard_in_time_is_told_with_its_id() -> None:
    sent = make_sent()
    sent.hear(outcome(State.ACCEPTED))
    with pytest.raises(CommandError, match="command a1: no final outcome within 0 s"):
        await sent.outcome(0)


async def test_who_waits_is_told_that_nothing_can_be_heard_any_more() -> None:
    sent = make_sent()
    waiting = asyncio.create_task(sent.outcome(DEADLINE_S))
    await asyncio.sleep(0)
    sent.go_deaf("the disk is gone")
    with pytest.raises(CommandError, match="the disk is gone"):
        await waiting


# --- streams ----------------------------------------------------------------------------------------------------------


async def test_only_the_newest_setpoint_of_each_motor_is_sent() -> None:
    way = Way()
    async with make_stream(way) as stream:
        way.open.clear()
        stream.set({"joint1": 0.0, "joint2": 1.0})
        await until(lambda: len(way.puts) == 1)
        for number in range(100):
            stream.set({"joint1": float(number)})
        stream.set({"joint2": 2.0})
        way.open.set()
    assert way.values() == [{"joint1": 0.0, "joint2": 1.0}, {"joint1": 99.0, "joint2": 2.0}]


async def test_what_was_set_is_sent_before_the_stream_is_left_but_not_after_an_error() -> None:
    left, broken = Way(), Way()
    async with make_stream(left, period_s=3600) as stream:
        stream.set({"joint1": 1.0})
    assert left.values() == [{"joint1": 1.0}]
    with pytest.raises(ZeroDivisionError):
        async with make_stream(broken) as stream:
            stream.set({"joint1": 1.0 / 0})
    assert broken.puts == []


async def test_what_keeps_setpoints_from_being_sent_reaches_who_sets_them() -> None:
    async def refuse(_: Sequence[Sent]) -> None:
        raise CommandError("no gateway")

    stream = Stream(lambda motor, value, on_final: make_sent(value, motor, on_final), refuse, 0.0)

    async def use() -> None:
        async with stream:
            stream.set({"joint1": 1.0})
            await until(stream._sending.done)
            stream.set({"joint1": 1.0})
            pytest.fail("nobody told")

    with pytest.raises(CommandError, match="no gateway"):
        await use()


async def test_outcomes_of_a_stream_are_counted_and_its_newest_trouble_is_kept() -> None:
    way = Way()
    async with make_stream(way) as stream:
        for number, state in enumerate((State.SUPERSEDED, State.EXPIRED, State.DONE)):
            stream.set({"joint1": 1.0})
            await until(lambda sent=number: len(way.puts) > sent)  # type: ignore[misc]  # each its own number
            way.puts[-1][0].hear(outcome(state))
        assert {motor: last.state for motor, last in (await stream.settle(0)).items()} == {"joint1": State.DONE}
    assert stream.counts == {State.SUPERSEDED: 1, State.EXPIRED: 1, State.DONE: 1}
    assert stream.trouble is not None
    assert stream.trouble.state is State.EXPIRED


async def test_a_stream_that_hears_nothing_does_not_grow() -> None:
    way = Way()
    async with make_stream(way) as stream:
        for number in range(UNDER_WAY + 10):
            stream.set({f"joint{number}": 0.0})
        await until(lambda: bool(way.puts))
        assert len(stream._under_way) == UNDER_WAY
