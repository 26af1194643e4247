"""The commander, with a real log and workers that are told what to answer: one final outcome a command, never stale."""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from drivers.clock import MS, SECOND, epoch_ns, monotonic_ns
from drivers.cycle import ALL, Ticket
from drivers.motor import Kind, Order, Status
from drivers.notices import OrderDone, OrderFailed
from gateway import commander as module
from gateway.board import Board
from gateway.commander import Commander, Incoming
from gateway.commands import Outcome, Reason, State, decode_outcome
from gateway.config import loads
from gateway.event_time import EventTime
from gateway.journal import CommandState, Journal, JournalReader
from gateway.latches import Latches
from gateway.telemetry import by_partition
from gateway.writer import Committed, LogWriter
from tests.gateway_parts import ARM, DEADLINE_S, MOTORS, Numbering, until


class Deaf:
    """A listener that the commander's tests need nothing of."""

    def committed(self, committed: Committed) -> None: ...
    def clock_stepped(self, step_ns: int) -> None: ...
    def saved(self, row: int, entry: int) -> None: ...
    def forgotten(self, rows: Collection[int], entries: Collection[int]) -> None: ...
    def journal_broken(self, error: str) -> None: ...
    def disk_failed(self, error: str) -> None: ...
    def disk_recovered(self) -> None: ...
    def writer_died(self, error: Exception) -> None: ...


class Rig:
    """An arm of two motors, a log in a file, and workers that remember what they were sent."""

    def __init__(self, directory: Path, up_for_ns: int, text: str) -> None:
        directory.mkdir(exist_ok=True)
        config = loads(text, directory / "arm.toml")
        self.path = path = directory / "journal.db"
        time = EventTime()
        self.writer = LogWriter(
            Journal(path, "arm1", MOTORS, 1 << 30), time, 1.0, path.with_suffix(".whole"), published=False
        )
        self.reader = JournalReader(path)
        self.memory = JournalReader(path)  # the commander's own
        self.board = Board(config, time, path)
        self.latches = Latches(directory / "estop.json")
        self.commander = Commander(
            config, self.memory, self.writer, self.board, time, self.latches, self._send, epoch_ns() - up_for_ns
        )
        self.sent: list[Ticket] = []
        self.buses: list[str] = []  # of those
        self.known_when_sent: list[bool] = []  # whether the file knew an unfinished command at that moment
        self.takes_orders = True
        self._numbering = Numbering()
        self._offset = 0
        for view in self.board.motors.values():
            view.online = True
        self.told({0: 0.0, 1: 0.0})

    def _send(self, bus: str, ticket: Ticket) -> bool:
        self.buses.append(bus)
        self.known_when_sent.append(bool(self.reader.unfinished_commands()))
        if self.takes_orders:
            self.sent.append(ticket)
        return self.takes_orders

    def told(self, positions_rad: dict[int, float], status: Status = Status.ENABLED) -> None:
        """Motors tell where they are, and the log has it."""
        records = self._numbering.records(list(positions_rad))
        records["position_rad"] = list(positions_rad.values())
        records["status"] = status
        self.commander.moved(self.board.update(dict(by_partition(records))))

    def record(self, command_id: str, motor: str = "joint1", kind: str = "position", **fields: Any) -> Incoming:
        """A good command, but for ``fields``; None leaves one out."""
        if kind == "position":
            fields.setdefault("value", 1.0)
        good = {"id": command_id, "motor": motor, "kind": kind, "ttl_ms": 60_000, "issued_at_ns": epoch_ns(), **fields}
        self._offset += 1
        raw = json.dumps({name: value for name, value in good.items() if value is not None}).encode()
        return Incoming(raw, "local", 0, self._offset + 1)

    def newest(self) -> Kind:
        """The kind of the order that was sent last."""
        return self.sent[-1].order.kind

    async def give(self, command_id: str, *args: Any, **fields: Any) -> None:
        await self.handle([self.record(command_id, *args, **fields)])

    async def handle(self, records: Sequence[Incoming]) -> None:
        """Hand them over, and wait until they are sent, or never will be."""
        await self.commander.handle(records)
        if self.commander._recording:
            await asyncio.wait(self.commander._recording)

    def done(self, number: int = -1, detail: str = "ok") -> None:
        """The worker says that the motor took this ticket."""
        self.commander.order_done(OrderDone(self.sent[number].number, self.sent[number].motor, detail))

    def failed(self, number: int = -1, reason: str = "no_reply", detail: str = "silent") -> None:
        self.commander.order_failed(OrderFailed(self.sent[number].number, self.sent[number].motor, reason, detail))

    async def outcomes(self, command_id: str) -> list[Outcome]:
        """All that the log says of a command. At most one of it is final."""
        await self.writer.durable()
        every = [decode_outcome(entry.value) for entry in self.reader.entries(0, 1000, "outcomes")]
        mine = [outcome for outcome in every if outcome.command_id == command_id]
        assert sum(outcome.final for outcome in mine) <= 1, mine
        assert not any(outcome.final for outcome in mine[:-1]), mine
        return mine

    async def final(self, command_id: str) -> tuple[State, Reason | None, str]:
        last = (await self.outcomes(command_id))[-1]
        assert last.final
        return last.state, last.reason, last.detail

    async def states(self, command_id: str) -> list[State]:
        return [outcome.state for outcome in await self.outcomes(command_id)]


@contextlib.asynccontextmanager
async def running(directory: Path, up_for_ns: int = 60 * SECOND, text: str = ARM) -> AsyncIterator[Rig]:
    rig = Rig(directory, up_for_ns, text)
    rig.writer.start(Deaf(), asyncio.get_running_loop())
    try:
        yield rig
    finally:
        assert await asyncio.to_thread(rig.writer.stop, DEADLINE_S)
        rig.reader.close()
        rig.memory.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path) as opened:
        yield opened


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions have no time at all to be reached."""
    monkeypatch.setattr(module, "ARRIVAL_MARGIN_S", -1000.0)


# --- the way of a good command ----------------------------------------------------------------------------------------


async def test_position_is_accepted_then_done_when_the_motor_is_there(rig: Rig) -> None:
    await rig.give("a", value=1.0, velocity_rad_s=2.0)
    (ticket,) = rig.sent
    assert (ticket.motor, ticket.order) == (0, Order(Kind.POSITION, 1.0, 2.0))
    rig.done()
    assert await rig.states("a") == [State.ACCEPTED]
    rig.told({0: 0.97, 1: 1.0})
    assert await rig.states("a") == [State.ACCEPTED]
    rig.told({0: 0.99})
    assert await rig.final("a") == (State.DONE, None, "at 0.9900 rad")


async def test_position_without_a_speed_goes_at_the_motors_limit(rig: Rig) -> None:
    await rig.give("a", "joint2")
    assert rig.sent[0].order.velocity_rad_s == 4.0


async def test_enable_is_done_when_the_motor_says_so(rig: Rig) -> None:
    await rig.give("a", kind="enable")
    assert await rig.states("a") == [State.ACCEPTED]
    rig.done(detail="torque is on")
    assert await rig.final("a") == (State.DONE, None, "torque is on")


async def test_backlog_moves_nothing_however_fresh_it_claims_to_be(tmp_path: Path) -> None:
    async with running(tmp_path, up_for_ns=0) as rig:
        await rig.give("a", ttl_ms=60_000, issued_at_ns=epoch_ns() - 2 * SECOND)
        state, reason, detail = await rig.final("a")
    assert (state, reason) == ("expired", "stale")
    assert "backlog" in detail
    assert rig.sent == []


async def test_ticket_is_good_no_longer_than_the_command(rig: Rig) -> None:
    before = monotonic_ns()
    await rig.give("a", ttl_ms=5000, issued_at_ns=epoch_ns() - 2000 * MS)
    assert rig.sent[0].expires_ns <= monotonic_ns() + 3000 * MS
    await rig.give("b", "joint2", ttl_ms=5000, issued_at_ns=epoch_ns() + 400 * MS)  # a clock that is a little fast
    assert before <= rig.sent[1].expires_ns <= monotonic_ns() + 5000 * MS


async def test_nothing_that_begins_a_motion_is_sent_before_it_is_written_down(rig: Rig) -> None:
    await rig.give("a", kind="enable")
    await rig.give("b", "joint2")
    assert rig.known_when_sent == [True, True]


# --- a sick disk ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(rig: Rig) -> Iterator[None]:
    """Somebody else holds the journal's lock: nothing is written."""
    with contextlib.closing(sqlite3.connect(rig.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


async def test_sick_disk_holds_up_motions_but_not_what_ends_them(rig: Rig) -> None:
    with locked(rig):
        await rig.commander.handle([rig.record("move")])
        await rig.commander.handle([rig.record("stop", "joint2", kind="stop")])
        assert [ticket.order.kind for ticket in rig.sent] == [Kind.STOP]
    await until(lambda: len(rig.sent) == 2)
    assert rig.sent[1].order.kind == Kind.POSITION


def commander_ends(rig: Rig, command_id: str) -> bool:
    """Whether a command has ended, as the gateway looks several times a second."""
    rig.commander.check_deadlines()
    return command_id not in [active.command.id for active in rig.commander._active]


async def test_motion_that_is_not_written_down_within_its_ttl_is_never_sent(rig: Rig) -> None:
    with locked(rig):
        await rig.commander.handle([rig.record("move", ttl_ms=200), rig.record("stop", "joint2", kind="stop")])
        await until(lambda: commander_ends(rig, "move"))
        assert [ticket.order.kind for ticket in rig.sent] == [Kind.STOP]
    assert (await rig.final("move"))[:2] == (State.FAILED, Reason.NOT_RECORDED)
    assert len(rig.sent) == 1


async def test_source_is_never_held_up_by_a_sick_disk(rig: Rig) -> None:
    with locked(rig):
        for number in range(2 * module.RECORDINGS):
            await rig.commander.handle([rig.record(f"move{number}")])
        await rig.commander.handle([rig.record("stop", kind="stop")])
        assert [ticket.order.kind for ticket in rig.sent] == [Kind.STOP]
    assert await rig.final("move0") == (State.SUPERSEDED, Reason.NEWER_COMMAND, "by 'move1'")


async def test_without_the_memory_of_ids_nothing_begins_a_motion_but_everything_ends_one(rig: Rig) -> None:
    rig.memory.close()
    await rig.give("move")
    await rig.give("stop", kind="stop")
    assert [ticket.order.kind for ticket in rig.sent] == [Kind.STOP]
    rig.commander._journal = rig.reader  # the disk is back
    state, reason, detail = await rig.final("move")
    assert (state, reason) == (State.REJECTED, Reason.NOT_RECORDED)
    assert "cannot say whether it is new" in detail
    assert await rig.states("stop") == [State.ACCEPTED]
    await rig.give("move")  # the id was not used up
    assert rig.newest() == Kind.POSITION


async def test_commands_that_wait_for_the_disk_end_with_the_gateway(rig: Rig) -> None:
    with locked(rig):
        await rig.commander.handle([rig.record("move")])
        rig.commander.interrupt_all()
    assert (await rig.final("move"))[:2] == (State.FAILED, Reason.INTERRUPTED)
    assert not rig.sent


async def test_motion_that_is_stopped_while_it_is_written_down_is_never_sent(rig: Rig) -> None:
    await rig.handle([rig.record("move"), rig.record("stop", kind="stop")])
    assert [ticket.order.kind for ticket in rig.sent] == [Kind.STOP]
    assert await rig.final("move") == (State.SUPERSEDED, Reason.NEWER_COMMAND, "by 'stop'")


async def test_inbox_is_written_down_with_every_record_good_or_bad(rig: Rig) -> None:
    bad = Incoming(b"junk", "local", 0, 3)
    await rig.handle([rig.record("a"), bad])
    await rig.writer.durable()
    assert rig.reader.inbox("local") == {0: 3}
    await rig.give("a")  # a duplicate
    await rig.writer.durable()
    assert rig.reader.inbox("local") == {0: 3}


# --- refusals ---------------------------------------------------------------------------------------------------------

HOUR_NS = 3600 * 1000 * MS

REFUSALS = [  # (fields, state, reason, what the detail names)
    ({"ttl_ms": 0}, State.REJECTED, Reason.MALFORMED, ["ttl_ms = 0"]),
    ({"value": None}, State.REJECTED, Reason.MALFORMED, ["needs a value"]),
    ({"issued_at_ns": -(10**300)}, State.REJECTED, Reason.MALFORMED, ["issued_at_ns"]),
    ({"motor": "elbow"}, State.REJECTED, Reason.UNKNOWN_MOTOR, ["'elbow'", "joint1, joint2"]),
    ({"kind": "torque", "value": 1.0}, State.REJECTED, Reason.UNSUPPORTED, ["joint1", "torque"]),
    ({"kind": "velocity", "value": 0.1, "motor": "*"}, State.REJECTED, Reason.UNSUPPORTED, ["velocity for all motors"]),
    ({"kind": "velocity", "value": 5.1}, State.REJECTED, Reason.OUT_OF_LIMITS, ["5.1 rad/s", "at most 5 rad/s"]),
    ({"kind": "velocity", "value": -5.1}, State.REJECTED, Reason.OUT_OF_LIMITS, ["-5.1 rad/s", "either way"]),
    ({"kind": "velocity", "value": None}, State.REJECTED, Reason.MALFORMED, ["needs a value"]),
    ({"motor": "*"}, State.REJECTED, Reason.UNSUPPORTED, ["position for all motors"]),
    ({"issued_at_ns": 0}, State.EXPIRED, Reason.STALE, ["was good for 60000 ms"]),
    ({"issued_at_ns": 2**62}, State.REJECTED, Reason.CLOCK_SKEW, ["in the future", "at most 500 ms"]),
    ({"value": 1.6}, State.REJECTED, Reason.OUT_OF_LIMITS, ["1.6 rad", "joint1", "-1 to 1.5 rad"]),
    ({"value": -1.001}, State.REJECTED, Reason.OUT_OF_LIMITS, ["-1.001 rad", "-1 to 1.5 rad"]),
    ({"velocity_rad_s": 5.5}, State.REJECTED, Reason.OUT_OF_LIMITS, ["5.5 rad/s", "at most 5 rad/s", "joint1"]),
    ({"velocity_rad_s": 0}, State.REJECTED, Reason.OUT_OF_LIMITS, ["above 0"]),
    ({"velocity_rad_s": -1}, State.REJECTED, Reason.OUT_OF_LIMITS, ["above 0"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "state", "reason", "named"), REFUSALS)
async def test_refusal_says_what_is_wrong_and_what_would_be_right(
    rig: Rig, fields: dict[str, Any], state: State, reason: Reason, named: list[str]
) -> None:
    await rig.give("a", **fields)
    found_state, found_reason, detail = await rig.final("a")
    assert (found_state, found_reason) == (state, reason)
    for word in named:
        assert word in detail
    assert rig.sent == []
    assert await rig.states("a") == [state]


@pytest.mark.parametrize("kind", [Kind.ESTOP, Kind.STOP])
@pytest.mark.parametrize("off_ns", [-1000 * HOUR_NS, -HOUR_NS, HOUR_NS])
async def test_what_holds_an_arm_is_taken_live_whatever_the_senders_clock_says(
    rig: Rig, kind: Kind, off_ns: int
) -> None:
    record = rig.record("e", "*", kind=kind, issued_at_ns=epoch_ns() + off_ns, ttl_ms=1000)
    await rig.handle([record])
    assert rig.newest() == kind
    if kind is Kind.STOP:
        assert rig.sent[-1].expires_ns > monotonic_ns()  # the worker is to take it, too
    await rig.handle([record])
    await rig.writer.durable()
    assert [outcome.reason for outcome in await duplicates(rig, "e")] == [Reason.DUPLICATE]


@pytest.mark.parametrize("kind", [Kind.ESTOP, Kind.STOP])
@pytest.mark.parametrize("off_ns", [-HOUR_NS, HOUR_NS])
async def test_what_holds_an_arm_is_refused_as_a_backlog_like_any_other(rig: Rig, kind: Kind, off_ns: int) -> None:
    record = rig.record("e", "*", kind=kind, issued_at_ns=epoch_ns() + off_ns)
    await rig.handle([record._replace(live=False)])
    assert (await rig.final("e"))[1] in (Reason.STALE, Reason.CLOCK_SKEW)
    assert rig.sent == []


async def test_backlog_repeats_no_outcome_that_only_the_log_remembers(rig: Rig) -> None:
    ends = {"a": None, "b": Reason.STALE, "c": Reason.UNAUTHORIZED}
    rig.commander.ended_before(Outcome(name, "joint1", State.FAILED, 5, 1, why) for name, why in ends.items())
    backlog = [rig.record(name)._replace(live=False) for name in ends]
    await rig.handle(backlog)
    await rig.writer.durable()
    assert [await rig.outcomes(name) for name in ends] == [[], [], []]
    assert rig.sent == []
    assert rig.writer.inbox() == {("local", 0): backlog[-1].next}
    await rig.handle([rig.record(name) for name in ends])
    await rig.writer.durable()
    assert [[o.reason for o in await duplicates(rig, name)] for name in ("a", "b")] == [[Reason.DUPLICATE]] * 2
    assert await rig.states("c") == [State.ACCEPTED]


async def test_disable_is_no_hold_and_is_never_taken_late(rig: Rig) -> None:
    await rig.give("a", kind="disable", issued_at_ns=epoch_ns() - HOUR_NS)
    assert (await rig.final("a"))[1] is Reason.STALE


async def test_velocity_goes_to_the_worker_and_is_done_when_the_motor_took_it(rig: Rig) -> None:
    await rig.give("a", kind="velocity", value=-5.0)
    assert rig.sent[0].order == Order(Kind.VELOCITY, -5.0, 5.0)
    rig.done(detail="turning")
    assert await rig.final("a") == (State.DONE, None, "turning")


@pytest.mark.parametrize(("position_rad", "value", "good"), [(1.5, 0.1, False), (1.5, -0.1, True), (-1.0, -0.1, False)])
async def test_motor_at_the_end_of_its_range_is_driven_back_only(
    rig: Rig, position_rad: float, value: float, good: bool
) -> None:
    rig.told({0: position_rad})
    await rig.give("a", kind="velocity", value=value)
    assert len(rig.sent) == good
    if not good:
        state, reason, detail = await rig.final("a")
        assert (state, reason) == (State.REJECTED, Reason.OUT_OF_LIMITS)
        assert f"stands at {position_rad:.4f} rad" in detail


TORQUE_ARM = ARM.replace(
    '"feetech_sts"\nid = 2', '"dynamixel2"\nid = 2\nmode = "current"\nnm_per_a = 1.0\ntorque_nm = 2.0'
)


@pytest.mark.parametrize(("torque_nm", "good"), [(2.0, True), (-2.0, True), (2.1, False), (-2.1, False)])
async def test_torque_keeps_to_the_motors_limit(tmp_path: Path, torque_nm: float, good: bool) -> None:
    async with running(tmp_path / "arm", text=TORQUE_ARM) as rig:
        await rig.give("a", "joint2", "torque", value=torque_nm)
        assert [ticket.order.value for ticket in rig.sent] == [torque_nm] * good
        if not good:
            state, reason, detail = await rig.final("a")
            assert (state, reason) == (State.REJECTED, Reason.OUT_OF_LIMITS)
            assert f"{torque_nm} N m: at most 2 N m" in detail


async def test_torque_without_a_limit_is_unsupported(tmp_path: Path) -> None:
    async with running(tmp_path / "arm", text=TORQUE_ARM.replace("torque_nm", "# torque_nm")) as rig:
        await rig.give("a", "joint2", "torque", value=0.1)
        state, reason, detail = await rig.final("a")
        assert (state, reason) == (State.REJECTED, Reason.UNSUPPORTED)
        assert "torque_nm" in detail
        assert rig.sent == []


async def test_motor_without_torque_is_not_driven(rig: Rig) -> None:
    rig.told({0: 0.0}, status=Status(0))
    await rig.give("a", kind="velocity", value=0.5)
    assert (await rig.final("a"))[:2] == (State.REJECTED, Reason.NOT_ENABLED)
    assert rig.sent == []


@pytest.mark.parametrize("value", [-1.0, 1.5])
async def test_the_limits_themselves_are_allowed(rig: Rig, value: float) -> None:
    await rig.give("a", value=value, velocity_rad_s=5.0)
    assert len(rig.sent) == 1


async def test_motor_that_is_offline_is_named(rig: Rig) -> None:
    rig.board.motors[0].online = False
    await rig.give("a")
    assert await rig.final("a") == (State.REJECTED, Reason.MOTOR_OFFLINE, "joint1: no answer on bus 'serial0'")


async def test_motor_without_torque_takes_no_position(rig: Rig) -> None:
    rig.told({0: 0.0}, Status(0))
    await rig.give("a")
    state, reason, detail = await rig.final("a")
    assert (state, reason) == (State.REJECTED, Reason.NOT_ENABLED)
    assert "joint1" in detail


async def test_clock_that_is_a_little_fast_is_no_skew(rig: Rig) -> None:
    await rig.give("a", issued_at_ns=epoch_ns() + 300 * MS)
    assert len(rig.sent) == 1


@pytest.mark.parametrize("raw", [b"", b"junk", b"\xff\xfe", b"[" * 60_000, b'{"motor": "joint1"}', b'{"id": 5}'])
async def test_record_without_an_id_becomes_an_event_with_its_place(rig: Rig, raw: bytes) -> None:
    await rig.handle([Incoming(raw, "local", 0, 8)])
    await rig.writer.durable()
    (entry,) = rig.reader.entries(0, 10)
    event = json.loads(entry.value)
    assert (entry.topic, event["type"], event["source_offset"]) == ("events", "command.unreadable", 7)
    assert event["detail"]


async def test_id_of_a_malformed_command_may_be_used_again(rig: Rig) -> None:
    await rig.give("a", ttl_ms=0)
    await rig.give("a")
    assert len(rig.sent) == 1


CHAIN: list[tuple[Reason, dict[str, Any]]] = [  # each lacks one thing more than the one before it is checked for
    (Reason.MALFORMED, {"ttl_ms": 0}),
    (Reason.UNKNOWN_MOTOR, {"motor": "elbow"}),
    (Reason.UNSUPPORTED, {"kind": "torque"}),
    (Reason.STALE, {"issued_at_ns": 0}),
    (Reason.OUT_OF_LIMITS, {"value": 9.0}),
]


@pytest.mark.parametrize("first", range(len(CHAIN)))
async def test_what_is_checked_first_is_told(rig: Rig, first: int) -> None:
    fields: dict[str, Any] = {}
    for _, wrong in reversed(CHAIN[first:]):
        fields |= wrong
    rig.told({0: 0.0}, Status(0))
    await rig.give("a", **fields)
    assert (await rig.final("a"))[1] is CHAIN[first][0]


async def test_offline_is_told_before_limits_and_after_staleness(rig: Rig) -> None:
    rig.board.motors[0].online = False
    await rig.give("a", value=9.0)
    assert (await rig.final("a"))[1] is Reason.MOTOR_OFFLINE
    await rig.give("b", issued_at_ns=0)
    assert (await rig.final("b"))[1] is Reason.STALE


# --- several motors in one command ------------------------------------------------------------------------------------


BOTH = {"joint1": 1.0, "joint2": 0.5}


async def test_targets_become_one_group_and_are_done_when_all_are_there(rig: Rig) -> None:
    await rig.give("a", "*", value=None, targets=BOTH, velocity_rad_s=2.0)
    first, second = rig.sent
    assert (first.motor, first.order.value, second.motor, second.order.value) == (0, 1.0, 1, 0.5)
    assert first.group == second.group != 0
    assert (first.size, second.size) == (2, 2)
    assert first.order.velocity_rad_s == second.order.velocity_rad_s == 2.0
    rig.done(0)
    rig.done(1)
    rig.told({0: 1.0, 1: 0.0})
    assert await rig.states("a") == [State.ACCEPTED]
    rig.told({0: 1.2, 1: 0.5})  # that it was there counts
    assert await rig.final("a") == (State.DONE, None, "joint1 at 1.0000 rad; joint2 at 0.5000 rad")


async def test_motors_on_several_buses_begin_at_one_moment_with_as_many_as_each_bus_has(tmp_path: Path) -> None:
    bus = '[[bus]]\nname = "serial0"\ntype = "serial"\nport = "/dev/ttyUSB0"\nrate_hz = 100\n'
    text = ARM.replace(bus, bus + bus.replace("serial0", "serial1").replace("USB0", "USB1"))
    parts = text.rsplit('bus = "serial0"', 1)
    async with running(tmp_path, text='bus = "serial1"'.join(parts)) as rig:
        before = monotonic_ns()
        await rig.give("a", "*", value=None, targets=BOTH)
        assert rig.buses == ["serial0", "serial1"]
        first, second = rig.sent
        assert (first.size, second.size) == (1, 1)
        assert first.group == second.group
        assert first.not_before_ns == second.not_before_ns > before


WRONG_TARGETS: list[tuple[dict[str, Any], Reason, list[str]]] = [
    ({"targets": BOTH | {"elbow": 0.1, "knee": 0.1}}, Reason.UNKNOWN_MOTOR, ["'elbow', 'knee'", "there are joint1"]),
    ({"targets": {"joint1": 9.0, "joint2": 8.0}}, Reason.OUT_OF_LIMITS, ["joint1", "9 rad", "joint2", "8 rad"]),
    ({"targets": {}}, Reason.MALFORMED, ["one motor at least"]),
    ({"targets": BOTH, "value": 1.0}, Reason.MALFORMED, ["one too many"]),
    ({"targets": BOTH, "kind": "enable"}, Reason.MALFORMED, ["takes no targets"]),
    ({"targets": BOTH, "motor": "joint1"}, Reason.MALFORMED, ['must be "*"']),
]


@pytest.mark.parametrize(("fields", "reason", "named"), WRONG_TARGETS)
async def test_targets_are_taken_all_or_none(
    rig: Rig, fields: dict[str, Any], reason: Reason, named: list[str]
) -> None:
    await rig.give("a", **{"motor": "*", "value": None, **fields})
    state, found, detail = await rig.final("a")
    assert (state, found) == (State.REJECTED, reason)
    for word in named:
        assert word in detail
    assert rig.sent == []


async def test_targets_need_all_their_motors(rig: Rig) -> None:
    rig.board.motors[1].online = False
    await rig.give("a", "*", value=None, targets=BOTH)
    assert await rig.final("a") == (State.REJECTED, Reason.MOTOR_OFFLINE, "joint2: no answer on bus 'serial0'")
    assert rig.sent == []


async def test_targets_that_fail_on_one_bus_say_who_goes_on(rig: Rig) -> None:
    await rig.give("a", "*", value=None, targets=BOTH)
    rig.done(0)
    rig.failed(1, "no_reply", "kept silent when it was fired")
    detail = "joint2: kept silent when it was fired; taken by joint1"
    assert await rig.final("a") == (State.FAILED, Reason.NO_REPLY, detail)


async def test_emergency_stop_counts_the_motors_of_all_buses_and_names_who_is_not_there(tmp_path: Path) -> None:
    bus = '[[bus]]\nname = "serial0"\ntype = "serial"\nport = "/dev/ttyUSB0"\nrate_hz = 100\n'
    text = ARM.replace(bus, bus + bus.replace("serial0", "serial1").replace("USB0", "USB1"))
    async with running(tmp_path, text='bus = "serial1"'.join(text.rsplit('bus = "serial0"', 1))) as rig:
        for online, detail in [(True, "latched; 2 stopped"), (False, "latched; 1 stopped; offline: joint2")]:
            rig.board.motors[1].online = online
            await rig.give(f"e{online}", "*", kind="estop")
            await saved(rig)
            for ticket in rig.sent[-2:]:
                rig.commander.order_done(OrderDone(ticket.number, ALL, "latched; 1 stopped"))
            assert await rig.final(f"e{online}") == (State.DONE, None, detail)


async def test_targets_that_are_not_all_reached_say_which(rig: Rig, late: None) -> None:
    await rig.give("a", "*", value=None, targets=BOTH)
    rig.done(0)
    rig.done(1)
    rig.told({0: 1.0, 1: 0.1})
    rig.commander.check_deadlines()
    detail = "joint2 stands at 0.1000 rad, not at 0.5000 rad, in time; joint1 at 1.0000 rad"
    assert await rig.final("a") == (State.FAILED, Reason.NOT_REACHED, detail)


@pytest.mark.parametrize("kind", ["position", "stop"])
async def test_motion_of_several_ends_when_one_of_them_is_told_otherwise(rig: Rig, kind: str) -> None:
    await rig.give("a", "*", value=None, targets=BOTH)
    await rig.give("b", "joint2", kind=kind)
    assert await rig.final("a") == (State.SUPERSEDED, Reason.NEWER_COMMAND, "by 'b'")


# --- latches ----------------------------------------------------------------------------------------------------------


async def latched(rig: Rig) -> list[dict[str, Any]]:
    """Events of latches."""
    await rig.writer.durable()
    every = [json.loads(entry.value) for entry in rig.reader.entries(0, 1000, "events")]
    return [event for event in every if event["type"].split(".")[1] in ("latched", "reset", "released")]


async def saved(rig: Rig) -> None:
    await asyncio.gather(*rig.commander._saving)


async def test_emergency_stop_goes_to_the_bus_at_once_ends_everything_and_is_done_when_it_is_on_the_disk(
    rig: Rig,
) -> None:
    with locked(rig):  # also while the disk is sick
        await rig.commander.handle([rig.record("move"), rig.record("on", "joint2", "enable")])
        await rig.commander.handle([rig.record("e", "*", "estop", issuer="cell1")])
        (ticket,) = rig.sent
        assert (ticket.motor, ticket.order.kind) == (ALL, Kind.ESTOP)
    for command_id in ("move", "on"):
        assert (await rig.final(command_id))[:2] == (State.FAILED, Reason.ESTOP_LATCHED)
    rig.commander.order_done(OrderDone(ticket.number, ALL, "latched; 2 stopped"))
    await saved(rig)
    assert await rig.final("e") == (State.DONE, None, "latched; 2 stopped")
    assert Latches(rig.latches._path).held["*"].by == "cell1"
    (event,) = await latched(rig)
    assert (event["type"], event["motor"], event["by"], event["why"]) == ("estop.latched", "*", "cell1", "command 'e'")
    assert len(rig.sent) == 1  # what waited for the disk was not sent afterwards


@pytest.mark.parametrize("kind", ["position", "enable", "velocity"])
async def test_what_is_latched_takes_nothing_that_moves(rig: Rig, kind: str) -> None:
    await rig.give("e", "*", kind="estop")
    await rig.give("a", kind=kind, value=1.0 if kind in ("position", "velocity") else None)
    state, reason, detail = await rig.final("a")
    assert (state, reason) == (State.REJECTED, Reason.ESTOP_LATCHED)
    assert "send reset_estop" in detail


@pytest.mark.parametrize("kind", ["stop", "disable", "estop"])
async def test_what_is_latched_takes_what_stops(rig: Rig, kind: str) -> None:
    await rig.give("e", "*", kind="estop")
    await rig.give("a", "*", kind=kind)
    assert rig.newest() == kind


async def test_emergency_stop_outlives_the_process_and_its_journal_until_it_is_reset(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.give("e", "*", kind="estop")
        await saved(rig)
    for name in ("journal.db", "journal.db-wal", "journal.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    async with running(tmp_path) as rig:
        rig.commander.tell_latched()
        assert [(t.motor, t.order.kind) for t in rig.sent] == [(ALL, Kind.ESTOP)]
        assert [event["type"] for event in await latched(rig)] == ["estop.latched"]
        await rig.give("a")
        assert (await rig.final("a"))[1] is Reason.ESTOP_LATCHED
        await rig.give("r", "*", kind="reset_estop")
        assert rig.newest() == Kind.RESET_ESTOP
        await saved(rig)
        assert await rig.states("r") == [State.ACCEPTED]
        rig.commander.order_done(OrderDone(rig.sent[-1].number, ALL, "reset"))
        assert (await rig.final("r"))[0] is State.DONE
        assert [event["type"] for event in await latched(rig)] == ["estop.latched", "estop.reset"]
        await rig.give("b")
        assert rig.newest() == Kind.POSITION
    async with running(tmp_path) as rig:
        rig.commander.tell_latched()
        assert rig.sent == []


async def test_what_follows_a_reset_at_once_is_meant_for_afterwards(rig: Rig) -> None:
    await rig.give("e", "*", kind="estop")
    await rig.handle([rig.record("r", "*", kind="reset_estop"), rig.record("a"), rig.record("b", "joint2")])
    assert [ticket.order.kind for ticket in rig.sent[1:]] == [Kind.RESET_ESTOP, Kind.POSITION, Kind.POSITION]


async def test_what_follows_a_reset_that_an_emergency_stop_overtook_is_not_carried_out(rig: Rig) -> None:
    await rig.give("e", "*", kind="estop")
    stop = rig.record("f", "*", kind="estop")
    await rig.handle([rig.record("r", "*", kind="reset_estop"), rig.record("a", kind="enable"), stop])
    assert (await rig.final("a"))[:2] == (State.FAILED, Reason.ESTOP_LATCHED)
    assert [ticket.order.kind for ticket in rig.sent] == [Kind.ESTOP, Kind.ESTOP]


async def test_commands_are_sent_in_the_order_in_which_they_came(rig: Rig) -> None:
    batches = [
        [rig.record(f"{batch}-{n}", f"joint{1 + n % 2}", kind="enable") for n in range(9 - batch)] for batch in range(9)
    ]
    for batch in batches:
        await rig.commander.handle(batch)
    await asyncio.wait(rig.commander._recording)
    await rig.writer.durable()
    assert [ticket.motor for ticket in rig.sent] == [n % 2 for batch in range(9) for n in range(9 - batch)]
    under_way = {number: active.command.id for active in rig.commander._active for number in active.tickets}
    given = [json.loads(record.raw)["id"] for batch in batches for record in batch]
    assert [under_way[ticket.number] for ticket in rig.sent] == given


async def test_enable_that_is_being_written_down_gives_way_to_a_disable(rig: Rig) -> None:
    await rig.handle([rig.record("on", kind="enable"), rig.record("off", kind="disable")])
    assert await rig.final("on") == (State.SUPERSEDED, Reason.NEWER_COMMAND, "by 'off'")
    assert [ticket.order.kind for ticket in rig.sent] == [Kind.DISABLE]


async def test_reset_that_is_overtaken_by_an_emergency_stop_resets_nothing(rig: Rig) -> None:
    await rig.give("e", "*", kind="estop")
    await rig.handle([rig.record("r", "*", kind="reset_estop"), rig.record("f", "*", kind="estop")])
    assert (await rig.final("r"))[:2] == (State.FAILED, Reason.ESTOP_LATCHED)
    assert [ticket.order.kind for ticket in rig.sent] == [Kind.ESTOP, Kind.ESTOP]
    assert rig.latches.estop


async def test_emergency_stop_needs_no_motor_to_be_online_and_is_for_the_whole_arm(rig: Rig) -> None:
    for view in rig.board.motors.values():
        view.online = False
    await rig.give("a", kind="estop")
    assert (await rig.final("a"))[:2] == (State.REJECTED, Reason.UNSUPPORTED)
    await rig.give("b", "*", kind="estop")
    assert len(rig.sent) == 1


async def test_emergency_stop_that_a_bus_does_not_take_fails_and_stays_latched(rig: Rig) -> None:
    rig.takes_orders = False
    await rig.give("e", "*", kind="estop")
    await saved(rig)
    state, reason, detail = await rig.final("e")
    assert (state, reason) == (State.FAILED, Reason.OVERLOADED)
    assert "'serial0'" in detail
    assert rig.latches.estop


async def test_emergency_stop_waits_for_a_bus_that_hangs_for_longer_than_its_ttl(rig: Rig) -> None:
    await rig.give("e", "*", kind="estop", ttl_ms=1)
    await saved(rig)
    rig.commander._active[0].read_at_ns -= SECOND
    rig.commander.check_deadlines()
    assert await rig.states("e") == [State.ACCEPTED]
    rig.commander.order_done(OrderDone(rig.sent[0].number, ALL, ""))
    assert (await rig.final("e"))[0] is State.DONE


async def test_emergency_stop_that_cannot_be_written_down_says_so(rig: Rig) -> None:
    rig.latches._path.with_suffix(".new").mkdir()
    await rig.give("e", "*", kind="estop")
    rig.commander.order_done(OrderDone(rig.sent[0].number, ALL, "latched"))
    await saved(rig)
    state, reason, detail = await rig.final("e")
    assert (state, reason) == (State.FAILED, Reason.NOT_RECORDED)
    assert "not after a restart" in detail
    assert rig.latches.estop


async def test_worker_that_dies_ends_the_emergency_stop_of_its_bus(rig: Rig) -> None:
    await rig.give("e", "*", kind="estop")
    await saved(rig)
    rig.commander.worker_gone([0, 1])
    assert (await rig.final("e"))[:2] == (State.FAILED, Reason.INTERRUPTED)


def test_file_of_latches_that_cannot_be_read_counts_as_an_emergency_stop(tmp_path: Path) -> None:
    path = tmp_path / "estop.json"
    assert Latches(path).estop is None
    path.write_bytes(b"{")
    latch = Latches(path).estop
    assert latch
    assert "cannot be read" in latch.why


STOPS_ITSELF = ARM.replace("temperature_c", 'stop_on = ["over_temperature", "position_limits"]\ntemperature_c', 1)


async def test_motor_that_stopped_itself_is_moved_again_after_clear_fault(tmp_path: Path) -> None:
    async with running(tmp_path, text=STOPS_ITSELF) as rig:
        await rig.give("a")
        view = rig.board.motors[0]
        view.hot = True
        rig.commander.latch(view, "81 C, limit 60 C")
        rig.commander.latch(view, "82 C, limit 60 C")
        assert [(t.motor, t.order.kind) for t in rig.sent[1:]] == [(0, Kind.ESTOP)]
        assert await rig.final("a") == (State.FAILED, Reason.MOTOR_LATCHED, "joint1 was stopped: 81 C, limit 60 C")
        await rig.give("b")
        assert (await rig.final("b"))[1] is Reason.MOTOR_LATCHED
        await rig.give("other", "joint2")
        assert rig.sent[-1].motor == 1
        await rig.give("c", kind="clear_fault")
        state, reason, detail = await rig.final("c")
        assert (state, reason) == (State.REJECTED, Reason.MOTOR_LATCHED)
        assert "cool down" in detail
        view.hot = False
        await rig.give("d", kind="clear_fault")
        assert rig.newest() == Kind.RESET_ESTOP
        assert await rig.final("d") == (State.DONE, None, "released")  # its family knows no such order
        await rig.give("e")
        assert rig.newest() == Kind.POSITION
        assert [event["type"] for event in await latched(rig)] == ["motor.latched", "motor.released"]


async def test_reset_of_the_arm_does_not_release_a_motor_that_stopped_itself(tmp_path: Path) -> None:
    async with running(tmp_path, text=STOPS_ITSELF) as rig:
        rig.commander.latch(rig.board.motors[0], "at 1.6 rad")
        await rig.give("e", "*", kind="estop")
        await rig.give("r", "*", kind="reset_estop")
        assert [(t.motor, t.order.kind) for t in rig.sent[-2:]] == [(ALL, Kind.RESET_ESTOP), (0, Kind.ESTOP)]
        await rig.give("a")
        assert (await rig.final("a"))[1] is Reason.MOTOR_LATCHED


# --- duplicates -------------------------------------------------------------------------------------------------------


async def duplicates(rig: Rig, command_id: str) -> list[Outcome]:
    await rig.writer.durable()
    every = [decode_outcome(entry.value) for entry in rig.reader.entries(0, 1000, "outcomes")]
    return [o for o in every if o.command_id == command_id and o.reason is Reason.DUPLICATE]


async def test_id_is_good_once_in_a_batch_later_and_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.handle([rig.record("a", kind="enable"), rig.record("a", kind="enable")])
        await rig.give("a", kind="enable")
        assert len(rig.sent) == 1
        assert len(await duplicates(rig, "a")) == 2
        rig.done()
        await rig.give("a", kind="enable")
    async with running(tmp_path) as rig:
        await rig.give("a", kind="enable")
        assert rig.sent == []
        assert len(await duplicates(rig, "a")) == 4


@pytest.mark.parametrize("fields", [{"motor": "elbow"}, {"kind": "torque", "value": 1.0}])
async def test_refused_record_with_the_id_of_a_running_command_does_not_touch_it(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    async with running(tmp_path) as rig:
        await rig.give("a")
        await rig.give("a", **fields)
        await rig.writer.durable()
        assert [state.id for state in rig.reader.unfinished_commands()] == ["a"]
    async with running(tmp_path) as rig:
        rig.commander.finish_interrupted()
        await rig.writer.durable()
        last = decode_outcome(rig.reader.entries(0, 1000, "outcomes")[-1].value)
        assert (last.command_id, last.state, last.reason) == ("a", State.FAILED, Reason.INTERRUPTED)


async def test_rejected_id_is_used_up(rig: Rig) -> None:
    await rig.give("a", value=9.0)
    await rig.give("a", value=1.0)
    assert rig.sent == []
    assert len(await duplicates(rig, "a")) == 1


# --- what becomes of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "told"),
    [("no_reply", Reason.NO_REPLY), ("stale", Reason.STALE), ("motor_offline", Reason.MOTOR_OFFLINE),
     ("overloaded", Reason.OVERLOADED), ("a word of its own", Reason.REFUSED)],
)  # fmt: skip
async def test_workers_refusal_is_the_end(rig: Rig, reason: str, told: Reason) -> None:
    await rig.give("a")
    rig.failed(reason=reason, detail="said why")
    assert await rig.final("a") == (State.FAILED, told, "said why")


async def test_bus_that_takes_no_orders_fails_the_command(rig: Rig) -> None:
    rig.takes_orders = False
    await rig.give("a")
    assert await rig.final("a") == (State.FAILED, Reason.OVERLOADED, "bus 'serial0' takes no orders now")


async def test_position_that_is_not_reached_in_time_says_where_it_stands(rig: Rig, late: None) -> None:
    await rig.give("a", value=1.0)
    rig.commander.check_deadlines()
    rig.done()
    rig.told({0: 0.25})
    rig.commander.check_deadlines()
    state, reason, detail = await rig.final("a")
    assert (state, reason) == (State.FAILED, Reason.NOT_REACHED)
    assert "0.2500 rad" in detail
    assert "1.0000 rad" in detail


async def test_position_under_way_has_twice_the_time_of_its_way(rig: Rig) -> None:
    await rig.give("a", value=1.0, velocity_rad_s=0.001)
    rig.done()
    rig.commander.check_deadlines()
    assert await rig.states("a") == [State.ACCEPTED]


async def test_motor_that_goes_silent_on_the_way_fails_the_command(rig: Rig) -> None:
    await rig.give("a")
    rig.done()
    rig.board.motors[0].online = False
    rig.commander.check_deadlines()
    assert (await rig.final("a"))[:2] == (State.FAILED, Reason.MOTOR_OFFLINE)


async def test_motor_that_loses_its_torque_on_the_way_fails_the_command(rig: Rig) -> None:
    await rig.give("a")
    rig.done()
    rig.told({0: 0.5}, Status(0))
    assert (await rig.final("a"))[:2] == (State.FAILED, Reason.NOT_ENABLED)


@pytest.mark.parametrize("kind", ["position", "stop", "disable"])
@pytest.mark.parametrize("under_way", [False, True])
async def test_setpoint_gives_way_to_a_newer_one_and_to_what_ends_the_motion(
    rig: Rig, kind: str, under_way: bool
) -> None:
    await rig.give("a")
    if under_way:
        rig.done()
    await rig.give("b", kind=kind)
    assert await rig.final("a") == (State.SUPERSEDED, Reason.NEWER_COMMAND, "by 'b'")
    rig.commander.order_done(OrderDone(rig.sent[0].number, 0, "late"))
    rig.told({0: 1.0})
    assert await rig.states("a") == [State.ACCEPTED, State.SUPERSEDED]


async def test_setpoint_of_one_motor_does_not_end_that_of_another(rig: Rig) -> None:
    await rig.give("a")
    await rig.give("b", "joint2")
    await rig.give("c", kind="enable")
    assert await rig.states("a") == [State.ACCEPTED]


async def test_refused_setpoint_ends_nothing(rig: Rig) -> None:
    await rig.give("a")
    await rig.give("b", value=9.0)
    assert await rig.states("a") == [State.ACCEPTED]


async def test_command_for_all_is_done_when_all_are(rig: Rig) -> None:
    await rig.give("a", "*", kind="stop")
    assert [ticket.motor for ticket in rig.sent] == [0, 1]
    rig.done(0, "holding")
    assert await rig.states("a") == [State.ACCEPTED]
    rig.done(1, "holding")
    assert await rig.final("a") == (State.DONE, None, "holding")


async def test_command_for_all_fails_if_one_does_and_says_which(rig: Rig) -> None:
    await rig.give("a", "*", kind="stop")
    rig.failed(1, "no_reply", "kept silent")
    rig.done(0)
    assert await rig.final("a") == (State.FAILED, Reason.NO_REPLY, "joint2: kept silent; taken by joint1")


async def test_command_for_all_reaches_those_that_are_there(rig: Rig) -> None:
    rig.board.motors[0].online = False
    await rig.give("a", "*", kind="stop")
    assert [ticket.motor for ticket in rig.sent] == [1]
    rig.done()
    assert await rig.final("a") == (State.FAILED, Reason.MOTOR_OFFLINE, "joint1 does not answer; taken by joint2")


async def test_stop_for_all_ends_every_motion(rig: Rig) -> None:
    await rig.give("a")
    await rig.give("b", "joint2")
    await rig.give("c", "*", kind="stop")
    for command_id in ("a", "b"):
        assert (await rig.final(command_id))[0] is State.SUPERSEDED


async def test_answer_to_nothing_is_ignored(rig: Rig) -> None:
    rig.commander.order_done(OrderDone(99, 0, ""))
    rig.commander.order_failed(OrderFailed(99, 0, "stale", ""))
    await rig.give("a", kind="enable")
    rig.done()
    rig.done()
    rig.failed()
    assert await rig.states("a") == [State.ACCEPTED, State.DONE]


async def test_dead_worker_interrupts_what_it_had_not_answered_and_only_that(rig: Rig) -> None:
    await rig.give("a", kind="enable")
    await rig.give("b", "joint2", kind="enable")
    rig.commander.worker_gone([0])
    assert (await rig.final("a"))[:2] == (State.FAILED, Reason.INTERRUPTED)
    assert await rig.states("b") == [State.ACCEPTED]
    rig.commander.worker_gone([0, 1])
    assert (await rig.final("b"))[:2] == (State.FAILED, Reason.INTERRUPTED)


async def test_dead_worker_interrupts_a_command_for_all_once(rig: Rig) -> None:
    await rig.give("a", "*", kind="stop")
    rig.done(0)
    rig.commander.worker_gone([0, 1])
    assert (await rig.final("a"))[:2] == (State.FAILED, Reason.INTERRUPTED)


async def test_stopped_gateway_ends_everything_and_the_next_run_nothing_twice(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.give("a")
        await rig.give("b", "joint2")
        rig.done()
        rig.commander.interrupt_all()
    async with running(tmp_path) as rig:
        rig.commander.finish_interrupted()
        for command_id in ("a", "b"):
            assert await rig.states(command_id) == [State.ACCEPTED, State.FAILED]
            assert (await rig.final(command_id))[1] is Reason.INTERRUPTED


async def test_what_a_crash_left_is_ended_once_and_not_sent_again(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.give("a")
        await rig.give("b", "joint2", kind="enable")
        rig.done()
        await rig.outcomes("b")
    for _ in range(2):
        async with running(tmp_path) as rig:
            rig.commander.finish_interrupted()
            assert await rig.states("a") == [State.ACCEPTED, State.FAILED]
            assert (await rig.final("a"))[1] is Reason.INTERRUPTED
            assert await rig.states("b") == [State.ACCEPTED, State.DONE]
            assert rig.sent == []
            assert rig.reader.unfinished_commands() == []


async def test_final_state_is_remembered(rig: Rig) -> None:
    await rig.give("a", kind="enable")
    rig.done()
    await rig.writer.durable()
    state = rig.reader.command("a")
    assert isinstance(state, CommandState)
    assert (state.final, state.motor) == (True, "joint1")
