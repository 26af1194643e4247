"""A bus worker as the real child process: it is heard, it is replaced, and it never outlives its gateway."""

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

from drivers.bus import Bus, Received, Trouble
from drivers.buses import CanSpec, SerialSpec
from drivers.clock import MS, SECOND, MonotonicNs, after, monotonic_ns
from drivers.cycle import ALL, Ticket, Timing
from drivers.motor import Kind, Order
from drivers.notices import (
    AnyNotice,
    BusDown,
    BusTrouble,
    BusUp,
    CycleStats,
    MotorOffline,
    MotorOnline,
    OrderDone,
    OrderFailed,
)
from drivers.sim.build import build_bus
from drivers.sim.hosts import PtySerialHost
from drivers.sim.servo import Drive
from gateway.simulator import SimulatedBusPlan
from gateway.worker import Plan, Troubles
from gateway.workers import Child, Worker, keep_running
from tests.gateway_parts import DEADLINE_S, until
from tests.memory_loop import STILL, make_motor

MOTORS = tuple(make_motor("feetech_sts", bus_id, bus_id - 1) for bus_id in (1, 2))
TIMING = Timing(10 * MS, 200 * MS, 1000 * MS)  # generous: the machine may be busy


class Ear:
    """Everything that a worker said."""

    def __init__(self) -> None:
        self.samples: Counter[int] = Counter()
        self.notices: list[AnyNotice] = []
        self.starts: list[int] = []
        self.gone: list[str] = []

    def heard_samples(self, bus: str, samples: NDArray[Any]) -> None:
        self.samples.update(samples["motor"].tolist())

    def heard_notice(self, bus: str, notice: AnyNotice) -> None:
        self.notices.append(notice)

    def worker_started(self, bus: str, starts: int) -> None:
        self.starts.append(starts)

    def worker_gone(self, bus: str, reason: str) -> None:
        self.gone.append(reason)
        self.samples.clear()

    def of(self, kind: type[AnyNotice]) -> list[Any]:
        return [notice for notice in self.notices if isinstance(notice, kind)]

    def hears_all(self) -> bool:
        return len([motor for motor, count in self.samples.items() if count > 3]) == len(MOTORS)


class Rig:
    def __init__(self, plan: Plan) -> None:
        self.ear = Ear()
        self.worker = Worker("serial0", plan, self.ear)

    @property
    def pid(self) -> int:
        assert self.worker._child is not None
        return self.worker._child.pid

    def give(self, number: int, kind: Kind, expires_in_ms: int) -> bool:
        return self.worker.send(Ticket(number, 0, Order(kind), after(monotonic_ns(), expires_in_ms * MS)))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[PtySerialHost]:
    with PtySerialHost(build_bus(MOTORS, STILL, monotonic_ns()), tmp_path / "serial0") as running:
        yield running


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(SerialSpec("serial0", str(tmp_path / "serial0"), 1_000_000), MOTORS, TIMING, realtime=False)


@contextlib.asynccontextmanager
async def working(plan: Plan) -> AsyncIterator[Rig]:
    rig = Rig(plan)
    task = asyncio.create_task(rig.worker.run())
    try:
        yield rig
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_samples_counts_and_answers_come_from_a_real_worker(host: PtySerialHost, plan: Plan) -> None:
    async with working(plan) as rig:
        await until(rig.ear.hears_all)
        assert rig.ear.notices[0] == BusUp()
        assert sorted(notice.motor for notice in rig.ear.of(MotorOnline)) == [0, 1]
        assert rig.give(1, Kind.ENABLE, 60_000)
        await until(lambda: bool(rig.ear.of(OrderDone)))
        assert rig.ear.of(OrderDone)[0].ticket == 1
        await until(lambda: bool(rig.ear.of(CycleStats)))
        assert [counts.motor for counts in rig.ear.of(CycleStats)[0].motors] == [0, 1]
        pid = rig.pid
    assert not alive(pid)
    assert rig.ear.starts == [1]


async def test_ticket_past_its_deadline_is_refused_as_stale(host: PtySerialHost, plan: Plan) -> None:
    async with working(plan) as rig:
        await until(rig.ear.hears_all)
        assert rig.give(1, Kind.ENABLE, -1)
        await until(lambda: bool(rig.ear.of(OrderFailed)))
        assert [(n.ticket, n.reason) for n in rig.ear.of(OrderFailed)] == [(1, "stale")]
        assert rig.ear.of(OrderDone) == []


async def test_killed_worker_is_told_and_replaced(host: PtySerialHost, plan: Plan) -> None:
    async with working(plan) as rig:
        await until(rig.ear.hears_all)
        killed = rig.pid
        os.kill(killed, signal.SIGKILL)
        await until(lambda: bool(rig.ear.gone))
        assert rig.ear.gone == [f"worker {killed} ended with status -9"]
        assert not rig.give(1, Kind.STOP, 1000)
        await until(rig.ear.hears_all)
        assert rig.ear.starts == [1, 2]
        assert rig.pid != killed


async def test_worker_that_hangs_is_killed_and_replaced_and_orders_it_held_are_not_carried_out(
    host: PtySerialHost, plan: Plan
) -> None:
    async with working(plan) as rig:
        await until(rig.ear.hears_all)
        hung = rig.pid
        os.kill(hung, signal.SIGSTOP)
        rig.give(1, Kind.ENABLE, 60_000)
        await until(lambda: bool(rig.ear.gone))
        assert f"worker {hung} said nothing for" in rig.ear.gone[0]
        assert not alive(hung)
        await until(rig.ear.hears_all)
        assert rig.ear.starts == [1, 2]
        assert rig.ear.of(OrderDone) == []


def stop_all(number: int, kind: Kind = Kind.ESTOP) -> Ticket:
    return Ticket(number, ALL, Order(kind), 0)


async def test_emergency_stop_is_told_to_every_new_worker_first_until_it_is_reset(
    host: PtySerialHost, plan: Plan
) -> None:
    async with working(plan) as rig:
        await until(rig.ear.hears_all)
        assert rig.worker.send(stop_all(1))
        await until(lambda: [notice.ticket for notice in rig.ear.of(OrderDone)] == [1])
        os.kill(rig.pid, signal.SIGKILL)
        await until(lambda: bool(rig.ear.gone))
        await until(rig.ear.hears_all)
        assert rig.give(2, Kind.ENABLE, 60_000)
        await until(lambda: bool(rig.ear.of(OrderFailed)))
        assert [(n.ticket, n.reason) for n in rig.ear.of(OrderFailed)] == [(2, "estop_latched")]
        rig.worker.send(stop_all(3, Kind.RESET_ESTOP))
        assert rig.give(4, Kind.ENABLE, 60_000)
        await until(lambda: 4 in [notice.ticket for notice in rig.ear.of(OrderDone)])
        os.kill(rig.pid, signal.SIGKILL)
        await until(lambda: len(rig.ear.gone) == 2)
        await until(rig.ear.hears_all)
        assert rig.give(5, Kind.ENABLE, 60_000)
        await until(lambda: 5 in [notice.ticket for notice in rig.ear.of(OrderDone)])


async def test_worker_that_hangs_and_takes_no_emergency_stop_is_replaced_at_once(
    host: PtySerialHost, plan: Plan
) -> None:
    async with working(plan) as rig:
        await until(rig.ear.hears_all)
        hung = rig.pid
        os.kill(hung, signal.SIGSTOP)
        while rig.give(1, Kind.STOP, 60_000):
            pass
        assert not rig.worker.send(stop_all(2))
        await until(lambda: bool(rig.ear.gone))
        assert rig.ear.gone == [f"worker {hung} ended with status -9"]
        await until(rig.ear.hears_all)
        assert rig.give(3, Kind.ENABLE, 60_000)
        await until(lambda: bool(rig.ear.of(OrderFailed)))
        assert rig.ear.of(OrderFailed)[0].reason == "estop_latched"


async def test_ctrl_c_is_left_to_the_gateway(host: PtySerialHost, plan: Plan) -> None:
    async with working(plan) as rig:
        await until(rig.ear.hears_all)
        os.kill(rig.pid, signal.SIGINT)
        rig.ear.samples.clear()
        await until(rig.ear.hears_all)
        assert rig.ear.gone == []


async def test_worker_ends_by_itself_when_its_gateway_is_gone(host: PtySerialHost, plan: Plan) -> None:
    child = Child("gateway.worker", plan)
    assert await child.ended(DEADLINE_S) == 0


async def test_worker_whose_gateway_is_gone_stops_what_it_drove_before_it_ends(host: PtySerialHost, plan: Plan) -> None:
    servo = host._bus.motors[0].servo
    async with working(plan) as rig:
        await until(rig.ear.hears_all)
        assert rig.give(1, Kind.ENABLE, 60_000)
        assert rig.worker.send(Ticket(2, 0, Order(Kind.VELOCITY, 0.5), after(monotonic_ns(), 60 * SECOND)))
        await until(lambda: servo.moving)
    assert servo.drive is Drive.POSITION


async def test_worker_that_does_not_end_is_killed(host: PtySerialHost, plan: Plan) -> None:
    child = Child("gateway.worker", plan)
    os.kill(child.pid, signal.SIGSTOP)
    assert await child.ended(0.05) == -signal.SIGKILL


async def test_unplugged_bus_is_told_once_with_life_signs_and_found_again(
    host: PtySerialHost, plan: Plan, tmp_path: Path
) -> None:
    async with working(plan) as rig:
        await until(rig.ear.hears_all)
        host.stop()
        await until(lambda: bool(rig.ear.of(BusDown)))
        assert sorted(notice.motor for notice in rig.ear.of(MotorOffline)) == [0, 1]
        assert rig.give(1, Kind.ENABLE, 60_000)
        await until(lambda: bool(rig.ear.of(OrderFailed)))
        assert rig.ear.of(OrderFailed)[0].reason == "motor_offline"
        rig.ear.notices.clear()
        await until(lambda: len(rig.ear.of(CycleStats)) > 2)
        assert rig.ear.of(BusDown) == []
        rig.ear.samples.clear()
        host.start()
        await until(rig.ear.hears_all)
        assert len(rig.ear.of(BusUp)) == 1
        assert rig.ear.starts == [1]


async def test_trouble_on_the_bus_is_told_and_bus_off_takes_it_down_until_it_is_opened_again(tmp_path: Path) -> None:
    """The controller is that of the simulated motors, which can report to everybody on the bus."""
    motors = tuple(make_motor("damiao", bus_id, bus_id - 1) for bus_id in (1, 2))
    faults = tmp_path / "faults.toml"
    hosted = SimulatedBusPlan("virtual", "off", motors, STILL, faults, (), name="can0")
    plan = Plan(CanSpec("can0", "virtual", "off", 1_000_000), motors, TIMING, realtime=False, simulation=hosted)
    async with working(plan) as rig:
        await until(rig.ear.hears_all)
        assert rig.ear.of(BusTrouble) == []
        faults.write_text("[can0]\nbus_off = true\n")
        await until(lambda: bool(rig.ear.of(BusDown)))
        assert rig.ear.of(BusTrouble) == [BusTrouble("error_frame", 1, "bus-off")]
        assert "bus-off" in rig.ear.of(BusDown)[0].reason
        assert rig.ear.of(BusDown)[0].retriable
        faults.unlink()
        rig.ear.samples.clear()
        await until(rig.ear.hears_all)
        assert len(rig.ear.of(BusUp)) == 2
        assert rig.ear.starts == [1]


async def test_packets_spoilt_on_the_wire_are_counted(host: PtySerialHost, plan: Plan) -> None:
    async with working(plan) as rig:
        await until(rig.ear.hears_all)
        host._bus.motors[0].faults.corrupt = 1
        await until(lambda: any(stats.garbage > 0 for stats in rig.ear.of(CycleStats)))


class Counting(Bus[bytes]):
    """A bus of which only the counts matter."""

    def send(self, units: Sequence[bytes], deadline: MonotonicNs) -> None:
        raise NotImplementedError

    def receive(self, deadline: MonotonicNs) -> Received[bytes] | None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def test_trouble_is_told_at_once_and_then_less_and_less_often_but_nothing_is_lost_from_the_count() -> None:
    bus = Counting()
    troubles = Troubles(bus)
    told: list[tuple[int, int]] = []
    for second in range(300):
        bus.note(Trouble.ECHO, "an echo", times=10)
        told += [(second, news.count) for news in troubles.news(MonotonicNs((1 + second) * SECOND))]
    assert told == [(at, 10 * (at + 1)) for at in (0, 1, 3, 7, 15, 31, 63, 123, 183, 243)]


def test_one_trouble_does_not_keep_another_from_being_told_and_none_is_told_without_news() -> None:
    bus = Counting()
    troubles = Troubles(bus)
    now = MonotonicNs(SECOND)
    bus.note(Trouble.ECHO, "an echo")
    assert troubles.news(now) == [BusTrouble("echo", 1, "an echo")]
    bus.note(Trouble.ECHO, "another")
    bus.note(Trouble.TX_FULL, "full")
    assert troubles.news(now) == [BusTrouble("tx_full", 1, "full")]
    assert troubles.news(MonotonicNs(9 * SECOND)) == [BusTrouble("echo", 2, "another")]
    assert troubles.news(MonotonicNs(99 * SECOND)) == []


async def test_bus_that_can_never_work_is_told_as_such_and_the_worker_lives(plan: Plan) -> None:
    bus = CanSpec("can0", "no_such_interface", "can0", 1_000_000)
    async with working(Plan(bus, MOTORS, TIMING, realtime=False)) as rig:
        await until(lambda: len(rig.ear.of(CycleStats)) > 1)
        assert [notice.retriable for notice in rig.ear.of(BusDown)] == [False]
        assert "no_such_interface" in rig.ear.of(BusDown)[0].reason
        assert rig.ear.gone == []


async def test_motors_on_a_virtual_bus_live_in_the_worker(tmp_path: Path) -> None:
    motors = tuple(make_motor("damiao", bus_id, bus_id - 1) for bus_id in (1, 2))
    hosted = SimulatedBusPlan("virtual", "inside", motors, STILL, None, ())
    plan = Plan(CanSpec("can0", "virtual", "inside", 1_000_000), motors, TIMING, realtime=False, simulation=hosted)
    async with working(plan) as rig:
        await until(rig.ear.hears_all)


async def test_child_that_only_has_to_be_there_is_replaced_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.workers.RESTART_FIRST_S", 0.01)
    told: list[str] = []
    task = asyncio.create_task(keep_running("tests.no_such_module", None, told.append))
    await until(lambda: len(told) > 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "(tests.no_such_module) ended with status 1" in told[0]
