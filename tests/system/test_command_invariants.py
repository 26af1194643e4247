"""Random streams of commands, good and bad, with restarts and kills in between, against simulated motors.

The real commander, journal, cycle, codec and simulated servos, in one process; each next one goes on with the same
motors, and with what of the journal and the latches was on the disk. The clock of motors, cycle and commander stands
still but for what the steps take, so that what is seen of positions does not depend on how busy the machine is. Every
setpoint has a value of its own, by which its effect is told from all others'.
"""

import asyncio
import contextlib
import itertools
import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from drivers.buses.memory import MemoryBus
from drivers.clock import MS, SECOND, MonotonicNs, epoch_ns
from drivers.cycle import ALL, Cycle, Ticket, Timing
from drivers.motor import DRIVES, SETPOINTS, Kind, Motor, Status
from drivers.notices import MotorOffline, MotorOnline, OrderDone, OrderFailed
from drivers.sim.build import SimulationSettings, build_bus
from drivers.sim.bus import SimulatedBus
from gateway import commander as commander_module
from gateway.commander import Incoming
from gateway.worker import families
from tests.gateway_parts import ARM, DEADLINE_S
from tests.unit.test_commander import Deaf, Rig
from tests.unit.test_cycle import Clock, make_clock

RANGE_RAD = (-1.0, 1.0)  # of both motors, the narrower of each
PERIOD_NS = 4 * MS
MOTORS = tuple(Motor(n - 1, f"joint{n}", "feetech_sts", n, position_rad=RANGE_RAD) for n in (1, 2))
REST_RAD = 0.002  # an encoder's step
BRAKING_RAD = 0.15  # a few periods at the highest speed here, and the way to a standstill
STILL_RAD_S = 0.01

STEPS = 150  # of a stream; a command is one
POSITION_RAD, SPEED_RAD_S = 0.1, 2.0  # of the first command; each later one has a bit more, and never what another has
MORE = 0.003
BEYOND = 9.0
TTL_MS = 1000
SKEWED = {-3_600_000, 3_600_000, 5_000}

KINDS = {
    Kind.POSITION: 10, Kind.VELOCITY: 10, Kind.ENABLE: 3, Kind.DISABLE: 1, Kind.STOP: 1,
    Kind.ESTOP: 1, Kind.RESET_ESTOP: 3,
}  # fmt: skip
ADDRESSED = {"joint1": 4, "joint2": 4, "*": 4, "elbow": 1}
AGES_MS = {0: 12, 400: 2, -300: 2, 5_000: 1, 3_600_000: 1, -3_600_000: 1}
ENDS = {"restart": 1, "kill gateway": 1, "kill all": 1}
STREAMS = 12


def pick(random: Random, choices: dict[Any, int]) -> Any:
    return random.choices([*choices], [*choices.values()])[0]


class Arm(Rig):
    """The commander's rig, with a cycle and simulated motors in the place of what a worker would answer."""

    def __init__(self, directory: Path, clock: Clock, motors: SimulatedBus[bytes], history: "History") -> None:
        super().__init__(directory, 60 * SECOND, ARM)
        self._clock = clock
        self._motors = motors
        self._history = history
        self.servos = [one.servo for one in motors.motors]
        self._latched: dict[int, Ticket] = {}
        self._start_worker()

    def _start_worker(self) -> None:
        """As ``gateway.workers`` does: latches are told first."""
        self._cycle: Cycle[Any] = Cycle(families(MOTORS), Timing(PERIOD_NS))
        self._cycle.attach(MemoryBus(self._motors))
        for ticket in self._latched.values():
            self._cycle.submit(ticket)
        for view in self.board.motors.values():
            view.online = False

    def kill_worker(self) -> None:
        self._start_worker()
        self.commander.worker_gone([motor.index for motor in MOTORS])

    def leave_worker(self) -> None:
        """Its gateway is gone."""
        self._cycle.leave(MonotonicNs(self._clock.now_ns + 100 * MS))

    def _send(self, bus: str, ticket: Ticket) -> bool:
        kind = ticket.order.kind
        assert not (kind in SETPOINTS and self.latches.estop), "a setpoint passed an emergency stop"
        if kind is Kind.ESTOP:
            self._latched[ticket.motor] = ticket
        elif kind is Kind.RESET_ESTOP:
            self._latched.clear() if ticket.motor == ALL else self._latched.pop(ticket.motor, None)
        self._cycle.submit(ticket)
        return super()._send(bus, ticket)

    async def run(self, periods: int) -> None:
        """Let the bus work for so long."""
        for _ in range(periods):
            start = MonotonicNs(self._clock.now_ns)
            for sample in self._cycle.poll(start):
                self.told({int(sample["motor"]): float(sample["position_rad"])}, Status(int(sample["status"])))
            self._cycle.work(MonotonicNs(start + PERIOD_NS * 9 // 10))
            self._clock.sleep_until(start + PERIOD_NS)
            for notice in self._cycle.take_notices():
                match notice:
                    case OrderDone():
                        self.commander.order_done(notice)
                    case OrderFailed():
                        self.commander.order_failed(notice)
                    case MotorOnline(motor) | MotorOffline(motor):
                        self.board.motors[motor].online = isinstance(notice, MotorOnline)
            self.commander.check_deadlines()
            self._history.went_rad += [servo.position_rad for servo in self.servos]
            await asyncio.sleep(0)
        await asyncio.sleep(0.001)  # for the writer's thread

    def copy_as_killed(self, directory: Path) -> None:
        """What a kill at this moment leaves on the disk."""
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None, timeout=DEADLINE_S)) as db:
            db.execute("BEGIN IMMEDIATE")  # no commit is half done, and none begins
            shutil.copytree(self.path.parent, directory, ignore=shutil.ignore_patterns("*.new"))  # half written


@dataclass(slots=True)
class History:
    """What was done to an arm, over all its restarts."""

    steps: int  # still to come
    effects: Counter[float] = field(default_factory=Counter)  # orders by their value
    values: dict[float, str] = field(default_factory=dict)  # value -> command
    fresh: set[str] = field(default_factory=set)  # ids that may be carried out
    given: dict[str, int] = field(default_factory=dict)  # id -> number of its first record
    records: list[Incoming] = field(default_factory=list)
    went_rad: list[float] = field(default_factory=lambda: [0.0])


@pytest.mark.parametrize("seed", range(STREAMS))  # the same streams everywhere
def test_nothing_moves_but_by_a_fresh_accepted_command_within_limits_once(seed: int) -> None:
    with clock_of_the_arm() as clock:
        asyncio.run(_play(Random(seed), clock))


@contextlib.contextmanager
def clock_of_the_arm() -> Iterator[Clock]:
    with contextlib.contextmanager(make_clock)() as clock, pytest.MonkeyPatch.context() as patch:
        patch.setattr(commander_module, "monotonic_ns", clock.monotonic_ns)
        yield clock


async def _play(random: Random, clock: Clock) -> None:
    history = History(STEPS)
    motors = build_bus(MOTORS, SimulationSettings(motion="still"), MonotonicNs(clock.now_ns))
    with tempfile.TemporaryDirectory() as name:
        for run in itertools.count():
            directory, following = (Path(name, str(number)) for number in (run, run + 1))
            async with _running(directory, clock, motors, history) as arm:
                end = await _live(arm, random, history)
                if end in ("kill gateway", "kill all"):
                    arm.copy_as_killed(following)
                history.effects.update(t.order.value for t in arm.sent if t.order.kind in SETPOINTS)
                if end in ("restart", None):
                    arm.commander.interrupt_all()
                outcomes = await _outcomes(arm)
            if end == "restart":
                shutil.copytree(directory, following)
            if end != "kill all":
                arm.leave_worker()
            if end is None:
                break
    _check(history, outcomes)


async def _live(arm: Arm, random: Random, history: History) -> str | None:
    """From a start to an end: which; None if there are no steps left, and nothing runs on."""
    arm.commander.finish_interrupted()
    arm.commander.tell_latched()
    known = arm.reader.inbox("local").get(0, 1)
    await arm.run(10)
    await arm.commander.handle([record for record in history.records if record.next > known])  # read, not kept: again
    while history.steps:
        history.steps -= 1
        match pick(random, {"command": 20, "time": 10, "kill worker": 1, "end": 1}):
            case "command":
                await arm.commander.handle([_record(random, history)])
            case "time":
                await arm.run(random.choice([random.randrange(1, 12), random.randrange(20, 150)]))
            case "kill worker":
                arm.kill_worker()
            case _:
                return str(pick(random, ENDS))
    await arm.writer.durable()  # a setpoint that waits for the disk still has its time to run
    await arm.run(300)
    assert all(abs(servo.velocity_rad_s) < STILL_RAD_S for servo in arm.servos), "it runs on without a setpoint"
    return None


def _record(random: Random, history: History) -> Incoming:
    number = len(history.records) + 1
    again = history.given and random.random() < 0.1
    command_id = random.choice(list(history.given)) if again else f"c{number:03}"
    kind, motor, age_ms = pick(random, KINDS), pick(random, ADDRESSED), pick(random, AGES_MS)
    beyond = kind in SETPOINTS and random.random() < 0.1
    if kind in (Kind.ESTOP, Kind.RESET_ESTOP) and motor != "elbow":
        motor = "*"
    fields: dict[str, Any] = {
        "id": command_id,
        "motor": motor,
        "kind": kind,
        "ttl_ms": TTL_MS,
        "issued_at_ns": epoch_ns() - age_ms * MS,
    }
    if kind in SETPOINTS:
        first = BEYOND if beyond else SPEED_RAD_S if kind in DRIVES else POSITION_RAD
        value = (first + MORE * number) * random.choice([-1, 1])
        history.values[value] = command_id
        if motor == "*" and random.random() < 0.8:
            other = value + MORE / 2
            history.values[other] = command_id
            fields["targets"] = {"joint1": value, "joint2": other}
        else:
            fields["value"] = value
    if command_id not in history.given:
        history.given[command_id] = number
        if age_ms not in SKEWED and not beyond:
            history.fresh.add(command_id)
    history.records.append(Incoming(json.dumps(fields).encode(), "local", 0, number + 1))
    return history.records[-1]


async def _outcomes(arm: Arm) -> list[dict[str, Any]]:
    await arm.writer.durable()
    return [json.loads(entry.value) for entry in arm.reader.entries(0, 10_000, "outcomes")]


def _check(history: History, outcomes: list[dict[str, Any]]) -> None:
    accepted = [outcome["command_id"] for outcome in outcomes if outcome["state"] == "accepted"]
    ended = Counter(
        outcome["command_id"] for outcome in outcomes if outcome["state"] in ("done", "failed", "superseded")
    )
    told = {outcome["command_id"] for outcome in outcomes}
    assert told == set(history.given)  # everybody heard something
    assert Counter(accepted) == ended, "an accepted command ends exactly once"
    assert set(ended.values()) <= {1}, "an id is accepted once"
    for value, times in history.effects.items():
        assert times == 1, f"{value} was sent {times} times"
        assert history.values[value] in accepted
        assert history.values[value] in history.fresh
        assert abs(value) < BEYOND
    low, high = RANGE_RAD
    assert low - BRAKING_RAD <= min(history.went_rad)
    assert max(history.went_rad) <= high + BRAKING_RAD
    if not history.effects:
        assert all(abs(position) <= REST_RAD for position in history.went_rad), "it moved by itself"


@contextlib.asynccontextmanager
async def _running(directory: Path, clock: Clock, motors: SimulatedBus[bytes], history: History) -> AsyncIterator[Arm]:
    arm = Arm(directory, clock, motors, history)
    arm.writer.start(Deaf(), asyncio.get_running_loop())
    try:
        yield arm
        await asyncio.gather(*arm.commander._saving, *arm.commander._recording, return_exceptions=True)
    finally:
        assert await asyncio.to_thread(arm.writer.stop, DEADLINE_S)
        arm.reader.close()
        arm.memory.close()
