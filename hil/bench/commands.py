"""How long a command takes from its producer to the frame on the bus, and an emergency stop to each bus.

A gateway as a user runs it, three Damiao motors behind slcan and three STS servos on a serial line, both on
pseudo-terminals; the motors live in this process and note when the unit that gave them their goal arrived. Commands
come one at a time through a real broker, or through the state directory. At rest the motors are polled at 50 Hz;
under load they bring 3,000 events a second through journal and broker. The time begins before the producer's ``send``.
Beside it a plain consumer (``hil.bench.arrivals``) notes when it gets the same records: the peer, on the same machine
at the same moment.

Emergency stops find all motors running, and one bus's worker stopped (SIGSTOP): the other bus's time is the claim, its
own counts from the moment that it is let go on. A worker that is stopped for longer than its motors' watchdogs wait
finds them without torque, and has nothing to stop: those are counted by themselves. So are motors that had to be told
again to run, because they did not answer in time: all are told once, right behind the reset.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

from aiokafka import AIOKafkaProducer
from rich.console import Console

from drivers.clock import SECOND, MonotonicNs, after, epoch_ns, left_s, monotonic_ns
from drivers.motor import Kind, Motor
from drivers.protocols import load as load_family
from drivers.sim.build import SimulationSettings, build_bus
from drivers.sim.hosts import PtySerialHost, SlcanHost
from drivers.sim.servo import Drive, Servo
from drivers.sim.spread import GoalTimes
from gateway import local_commands
from gateway.commands import Command, encode_command
from gateway.events import ARM
from gateway.kafka import running
from gateway.state_dir import StateDir, StateDirError
from hil.bench import processes
from hil.bench.processes import Scheduled
from hil.bench.report import show, spread
from hil.kafka import Broker, RigError

SERVO_GATEWAY = Path(sys.executable).with_name("servo-gateway")
REST_HZ, LOAD_HZ = 50, 500
BUDGET_MS = 10.0
BUSES = {"can0": ("damiao", (1, 2, 3)), "serial0": ("feetech_sts", (4, 5, 6))}
START_S, ANSWER_S, SETTLE_S = 30.0, 5.0, 2.0
PAUSE_S = 0.01  # at most, at random: so that commands meet every phase of a cycle
LOOK_S = 0.002
SWITCH_S = 0.0005  # the motors of this process note a goal when it comes; usual are 5 ms
GROUPS = 50
STOPS = 6  # with each bus frozen, and with none
AGAIN_S = 2.0
SPEED_RAD_S = 0.1
TTL_MS = 10_000

CONFIG = """
[arm]
name = "{name}"
state_dir = "{directory}/state"
setpoint_timeout_ms = 60_000
{kafka}
[[bus]]
name = "can0"
type = "can"
interface = "slcan"
channel = "{directory}/can0"
options = {{ sleep_after_open = 0 }}
rate_hz = {rate}
[[bus]]
name = "serial0"
type = "serial"
port = "{directory}/serial0"
rate_hz = {rate}
"""
MOTOR = """
[[motor]]
name = "joint{number}"
partition = {index}
bus = "{bus}"
protocol = "{family}"
id = {number}
position_rad = [-2.5, 2.5]
velocity_rad_s = 5.0
temperature_c = 80.0
"""

Send = Callable[[Command], Awaitable[None]]


@dataclass(slots=True)
class _Arm:
    """A gateway that runs, and its motors."""

    send: Send
    goals: dict[str, GoalTimes]  # by bus
    servos: dict[int, Servo]
    pid: int
    ports: dict[str, str]
    arrivals: Path
    begun: dict[str, MonotonicNs] = field(default_factory=dict)  # by command id
    motors: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {bus: tuple(n - 1 for n in numbers) for bus, (_, numbers) in BUSES.items()}
    )

    async def command(self, motor: str, kind: Kind, value: float | None = None, **more: Any) -> MonotonicNs:
        """Give a command; when that began."""
        command = Command(secrets.token_hex(8), motor, kind, TTL_MS, epoch_ns(), value, **more)
        began = self.begun[command.id] = monotonic_ns()
        await self.send(command)
        return began

    def peer_ms(self) -> list[float]:
        """How long each command took to a plain consumer; none without Kafka."""
        lines = [line.split() for line in self.arrivals.read_text().splitlines()]
        return [(int(at_ns) - self.begun[name]) / 1e6 for name, at_ns in lines if name in self.begun]

    async def taken(self, since: MonotonicNs, motors: Collection[int]) -> dict[int, float]:
        """{motor: ms from ``since`` to the unit that brought it a goal}, of those that got one in time."""
        deadline = after(monotonic_ns(), int(ANSWER_S * SECOND))
        while True:
            at_ns = {index: at for goals in self.goals.values() for index, at in goals.at_ns.items()}
            found = {index: (at_ns[index] - since) / 1e6 for index in motors if at_ns.get(index, 0) > since}
            if len(found) == len(motors) or not left_s(deadline):
                return found
            await asyncio.sleep(LOOK_S)

    def worker(self, bus: str) -> int:
        """Process id of the worker that has this bus open."""
        for pid in processes.children(self.pid):
            with contextlib.suppress(OSError):
                if self.ports[bus] in {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}:
                    return pid
        raise RigError(f"no worker has {bus} open")


def run(console: Console, seconds: float) -> dict[str, Any]:
    """Measure and tell."""
    found: dict[str, dict[str, Any]] = {}
    stops: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()
    sys.setswitchinterval(SWITCH_S)
    with Broker() as broker:
        for servers in (broker.bootstrap, ""):
            for rate_hz in (REST_HZ, LOAD_HZ):
                way = "Kafka" if servers else "state directory"
                kind = f"{way}, {6 * rate_hz:,} events/s"
                console.print(f"[dim]{kind}", highlight=False)
                found[kind] = asyncio.run(_measure(servers, rate_hz, seconds))
                if rate_hz == LOAD_HZ:
                    times = asyncio.run(_stops(servers, rate_hz, counts))
                    stops |= {f"{way}, {name}": ms for name, ms in times.items()}
    return _tell(console, found, stops, counts)


async def _measure(servers: str, rate_hz: int, seconds: float) -> dict[str, Any]:
    random = Random(1)
    took_ms: list[float] = []
    lost = 0
    async with _running(servers, rate_hz) as arm:
        began = monotonic_ns()
        end, before = after(began, int(seconds * SECOND)), Scheduled.of(arm.pid)
        number = 0
        while left_s(end):
            number += 1
            motor = number % 6
            side = 1 if number // 6 % 2 else -1  # no goal is the one before
            given = await arm.command(f"joint{motor + 1}", Kind.POSITION, side * (0.1 + random.random()))
            found = await arm.taken(given, [motor])
            lost += not found
            took_ms += found.values()
            await asyncio.sleep(PAUSE_S * random.random())
        scheduled, took_ns = Scheduled.of(arm.pid) - before, monotonic_ns() - began
        peer_ms = arm.peer_ms()
        apart_us = []
        end = after(monotonic_ns(), int(seconds * SECOND))
        for _ in takewhile(lambda _: left_s(end), range(GROUPS)):
            targets = {f"joint{n}": 0.1 + random.random() for n in range(1, 7)}
            began = await arm.command(ARM, Kind.POSITION, targets=targets)
            times = await arm.taken(began, range(6))
            if len(times) == len(targets):
                apart_us.append(1000 * (max(times.values()) - min(times.values())))
            await asyncio.sleep(PAUSE_S * random.random())
    return {
        "ms": spread(took_ms),
        "peer_ms": spread(peer_ms) if peer_ms else {},
        "commands": number,
        "lost": lost,
        "apart_us": spread(apart_us),
        "gateway_runs": scheduled.ran_ns / took_ns,
        "gateway_waits": scheduled.waited_ns / took_ns,
        "gateway_waits_us": scheduled.waited_ns / scheduled.times / 1000,
    }


async def _stops(servers: str, rate_hz: int, counts: Counter[str]) -> dict[str, list[float]]:
    """{bus and what was frozen: ms of its last motor, for each stop}; ``counts`` takes what was out of the ordinary."""
    found: dict[str, list[float]] = {}
    async with _running(servers, rate_hz) as arm:
        for frozen in (None, *BUSES) * STOPS:
            counts["told again to run"] += await _set_going(arm)
            others = [bus for bus in BUSES if bus != frozen]
            worker = arm.worker(frozen) if frozen else None
            if worker:
                os.kill(worker, signal.SIGSTOP)
            try:
                began = await arm.command(ARM, Kind.ESTOP)
                for bus in others:
                    times = await arm.taken(began, arm.motors[bus])
                    state = f"{frozen} frozen" if frozen else "none frozen"
                    _note(found, f"{bus}, {state}", times, arm.motors[bus])
            finally:
                let_go = monotonic_ns()
                if worker:
                    os.kill(worker, signal.SIGCONT)
            if frozen:
                driven = [motor for motor in arm.motors[frozen] if arm.servos[motor].enabled]
                counts["stopped by their own watchdogs"] += len(arm.motors[frozen]) - len(driven)
                if driven:
                    _note(found, f"{frozen}, let go on", await arm.taken(let_go, driven), driven)
    return found


def _note(found: dict[str, list[float]], what: str, times: dict[int, float], motors: Collection[int]) -> None:
    last = max(times.values()) if len(times) == len(motors) else float("inf")
    found.setdefault(what, []).append(last)


async def _set_going(arm: _Arm) -> int:
    """Take an emergency stop back, and let every motor run at a speed, towards the middle of its range.

    How many had to be told again.
    """
    await asyncio.sleep(SETTLE_S / 4)  # until they stand
    await arm.command(ARM, Kind.RESET_ESTOP)
    deadline = after(monotonic_ns(), int(START_S * SECOND))
    again = -len(arm.servos)
    while waiting := [index for index, servo in arm.servos.items() if not _runs(servo)]:
        if not left_s(deadline):
            raise RigError(f"motors {waiting} do not run within {START_S:g} s")
        again += len(waiting)
        for index in waiting:
            kinds = [Kind.ENABLE] if arm.servos[index].enabled else [Kind.CLEAR_FAULT, Kind.ENABLE]
            for kind in kinds:
                await arm.command(f"joint{index + 1}", kind)
            speed = -SPEED_RAD_S if arm.servos[index].position_rad > 0 else SPEED_RAD_S
            await arm.command(f"joint{index + 1}", Kind.VELOCITY, speed)
        pause = after(monotonic_ns(), int(AGAIN_S * SECOND))
        while left_s(pause) and not all(_runs(arm.servos[index]) for index in waiting):  # noqa: ASYNC110  physics
            await asyncio.sleep(PAUSE_S)
    return again


def _runs(servo: Servo) -> bool:
    return servo.drive is Drive.VELOCITY and servo.moving


@contextlib.asynccontextmanager
async def _running(servers: str, rate_hz: int) -> AsyncIterator[_Arm]:
    with tempfile.TemporaryDirectory(prefix="servo-gateway-bench-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        goals: dict[str, GoalTimes] = {}
        ports: dict[str, str] = {}
        servos: dict[int, Servo] = {}
        for bus, (family, numbers) in BUSES.items():
            options = load_family(family).examples[0]
            motors = tuple(Motor(n - 1, f"joint{n}", family, n, options) for n in numbers)
            simulated = build_bus(motors, SimulationSettings(motion="still"), monotonic_ns())
            goals[bus] = GoalTimes(simulated)
            servos |= {one.motor.index: one.servo for one in simulated.motors}
            host = (SlcanHost if family == "damiao" else PtySerialHost)(simulated, directory / bus)
            stack.enter_context(host)
            ports[bus] = host.port
        pid = stack.enter_context(_gateway(directory, servers, rate_hz))
        await _all_online(StateDir(directory / "state"), kafka=bool(servers))
        async with _way(servers, directory) as send:
            arrivals = stack.enter_context(_peer(directory, servers))
            await asyncio.sleep(SETTLE_S)
            yield _Arm(send, goals, servos, pid, ports, arrivals)


@contextlib.contextmanager
def _gateway(directory: Path, servers: str, rate_hz: int) -> Iterator[int]:
    kafka = f'[kafka]\nbootstrap_servers = ["{servers}"]' if servers else ""
    text = CONFIG.format(name=directory.name, directory=directory, kafka=kafka, rate=rate_hz)
    for bus, (family, numbers) in BUSES.items():
        text += "".join(MOTOR.format(number=n, index=n - 1, bus=bus, family=family) for n in numbers)
    config = directory / "arm.toml"
    config.write_text(text)
    gateway = subprocess.Popen(
        [str(SERVO_GATEWAY), "run", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield gateway.pid
    finally:
        gateway.send_signal(signal.SIGTERM)
        gateway.wait(START_S)


@contextlib.contextmanager
def _peer(directory: Path, servers: str) -> Iterator[Path]:
    """A plain consumer of the commands, if they go through Kafka; the file that it writes."""
    path = directory / "arrivals"
    command = [sys.executable, "-m", "hil.bench.arrivals", servers, f"servo.{directory.name}.commands"]
    with path.open("w") as file, contextlib.ExitStack() as stack:
        if servers:
            peer = stack.enter_context(subprocess.Popen(command, stdout=file))
            stack.callback(peer.kill)
        yield path


async def _all_online(state: StateDir, *, kafka: bool) -> None:
    deadline = after(monotonic_ns(), int(START_S * SECOND))
    while left_s(deadline):
        await asyncio.sleep(0.1)
        with contextlib.suppress(StateDirError):  # not written yet
            status = state.read_status()
            online = all(motor["state"] == "online" for motor in status["motors"])
            if online and (not kafka or status["kafka"]["state"] == "up"):
                return
    raise RigError(f"the gateway is not ready after {START_S:g} s")


@contextlib.asynccontextmanager
async def _way(servers: str, directory: Path) -> AsyncIterator[Send]:
    """How commands are given. All through one partition, so that their order is kept."""
    if not servers:
        path = directory / "state" / "commands.db"

        async def append(command: Command) -> None:
            local_commands.append(path, encode_command(command))

        yield append
        return
    topic = f"servo.{directory.name}.commands"
    async with running(AIOKafkaProducer(bootstrap_servers=servers, acks="all")) as producer:
        await producer.partitions_for(topic)

        async def produce(command: Command) -> None:
            await producer.send(topic, encode_command(command), command.motor.encode(), 0)

        yield produce


def _tell(
    console: Console, found: dict[str, dict[str, Any]], stops: dict[str, list[float]], counts: Counter[str]
) -> dict[str, Any]:
    percentiles = ("p50", "p99", "p99.9", "max")
    show(
        console,
        "commands: produced to frame on the bus, ms",
        ("way, telemetry", "commands", "without a frame", *percentiles, "budget p99", "plain consumer p50", "p99"),
        [
            (
                kind,
                run["commands"],
                run["lost"],
                *(run["ms"].get(p) for p in percentiles),
                BUDGET_MS,
                *(run["peer_ms"].get(p) for p in ("p50", "p99")),
            )
            for kind, run in found.items()
        ],
        "The plain consumer gets the same records in the same run, and does nothing with them.",
    )
    show(
        console,
        "commands: six motors on two buses in one command, from the first motor's goal to the last one's, us",
        ("way, telemetry", *percentiles),
        [(kind, *(run["apart_us"].get(p) for p in percentiles)) for kind, run in found.items()],
        f"{GROUPS} commands each. On a wire with its true speed the frames themselves take time, too.",
    )
    show(
        console,
        "commands: the gateway's own process meanwhile, and what it waited for a processor",
        ("way, telemetry", "runs, % of a core", "waits, % of the time", "each time, us"),
        [
            (kind, 100 * run["gateway_runs"], 100 * run["gateway_waits"], run["gateway_waits_us"])
            for kind, run in found.items()
        ],
        "All its threads together; broker, motors and this bench run on the same processors.",
    )
    told = {kind: spread(ms, (50, 90)) for kind, ms in stops.items()}
    show(
        console,
        f"commands: emergency stop, produced to the stop of a bus's last motor, ms, {6 * LOAD_HZ:,} events/s",
        ("way, bus, state", "p50", "p90", "max"),
        [(kind, *figures.values()) for kind, figures in told.items()],
        f"{STOPS} stops each. Let go on: from SIGCONT of its own worker. "
        f"Motors {'; '.join(f'{what}: {count}' for what, count in counts.items())}.",
    )
    return {"runs": found, "estop_ms": told, "estop_motors": counts, "budgets": {"p99_ms": BUDGET_MS}}
