"""What one poll of a bus costs, and how late the cycles of a real worker process start.

Three buses: motors in memory (their replies are computed inside the poll; that part is measured and taken off), STS
servos behind a pseudo-terminal (simulated by another process), Damiao motors on python-can's virtual bus (simulated by
a thread of the same process, which holds the interpreter meanwhile: as in a worker).
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from drivers.bus import Bus
from drivers.buses import BusSpec, CanSpec, SerialSpec, open_bus
from drivers.buses.memory import MemoryBus
from drivers.clock import MS, SECOND, after, left_s, monotonic_ns, sleep_until
from drivers.cycle import Cycle, Timing
from drivers.motor import Motor
from drivers.notices import CycleStats, MotorOnline
from drivers.protocols import load as load_family
from drivers.sim.build import SimulationSettings, build_bus
from gateway import link
from gateway.realtime import set_realtime
from gateway.simulator import SimulatedBusPlan, SimulatorPlan, build_host
from gateway.worker import Plan, families
from hil.bench.meter import Meter, replace
from hil.bench.report import over_runs, show, spread

RUNS = 3
PERIOD_NS = 2 * MS
RATES_HZ = (200, 500)
MOTORS = 3
FIND_S = 5.0
SETTINGS = SimulationSettings()
BUSY_SHARE = 0.6
BITS_PER_S = 1_000_000

Simulated = Callable[[], int]
"""Nanoseconds that simulated motors have taken inside polls so far."""


def make_motors(family: str, count: int) -> tuple[Motor, ...]:
    """Motors 1, 2, 3 ... of a family with its plainest options."""
    options = load_family(family).examples[0]
    return tuple(Motor(number - 1, f"joint{number}", family, number, options) for number in range(1, count + 1))


def run(console: Console, seconds: float) -> dict[str, Any]:
    """Measure and tell."""
    polls = {}
    for name, (family, opened) in _BUSES.items():
        console.print(f"[dim]poll: {name}", highlight=False)
        polls[name] = over_runs([_poll(family, opened, seconds / 2) for _ in range(RUNS)])
    show(
        console,
        f"cycle: one poll of {MOTORS} motors, us",
        ("bus", "median", "p99", "median a motor", "processor a poll", "of it simulation", "processor a motor"),
        [
            (
                name,
                *(poll[key] for key in ("p50", "p99")),
                poll["p50"] / MOTORS,
                poll["cpu_us"],
                poll["simulation_us"],
                (poll["cpu_us"] - poll["simulation_us"]) / MOTORS,
            )
            for name, poll in polls.items()
        ],
        f"One poll every {PERIOD_NS / MS:g} ms, medians of {RUNS} runs; processor: of the polling thread. A median "
        "on a pseudo-terminal or the virtual bus is mostly the wait for the simulated motors.",
    )
    lateness = {}
    for busy in (False, True):
        with _all_cores_busy() if busy else contextlib.nullcontext():
            for rate_hz in RATES_HZ:
                for realtime in (False, True):
                    kind = f"{rate_hz} Hz, {'SCHED_FIFO' if realtime else 'normal'}{', cores busy' if busy else ''}"
                    console.print(f"[dim]lateness: {kind}", highlight=False)
                    lateness[kind] = _lateness(rate_hz, seconds, realtime=realtime)
    show(
        console,
        "cycle: how late a worker's cycles start, us (CycleStats)",
        ("worker", "median", "latest of a second: median", "latest of all", "skipped cycles"),
        [(kind, *figures.values()) for kind, figures in lateness.items()],
        f"STS on a pseudo-terminal. Cores busy: a process on each that computes {100 * BUSY_SHARE:.0f} % of the time."
        + ("" if _fifo_is_allowed() else " SCHED_FIFO is not permitted here: those rows are normal ones."),
    )
    return {"polls_us": polls, "lateness_us": lateness, "sched_fifo": _fifo_is_allowed()}


# -- polls ---------------------------------------------------------------------------------------------------------


def _poll(family: str, opened: Callable[[tuple[Motor, ...]], Any], seconds: float) -> dict[str, float]:
    motors = make_motors(family, MOTORS)
    cycle: Cycle[Any] = Cycle(families(motors), Timing(PERIOD_NS))
    took_us, cpu_us, simulated_us = [], [], []
    with opened(motors) as (bus, simulated):
        cycle.attach(bus)
        find(cycle)
        gc.freeze()
        start = monotonic_ns()
        end = after(start, int(seconds * SECOND))
        while start < end:
            simulated_ns, cpu_ns, began = simulated(), time.thread_time_ns(), monotonic_ns()
            rows = cycle.poll(start)
            took_ns, cpu_ns = monotonic_ns() - began, time.thread_time_ns() - cpu_ns
            if len(rows) == MOTORS:
                took_us.append(took_ns / 1000)
                cpu_us.append(cpu_ns / 1000)
                simulated_us.append((simulated() - simulated_ns) / 1000)
            start = after(start, PERIOD_NS)
            cycle.work(after(start, -PERIOD_NS // 20))
            sleep_until(start)
        gc.unfreeze()
    return spread(took_us) | {
        "cpu_us": float(np.median(cpu_us)),
        "simulation_us": float(np.median(simulated_us)),
        "polls": float(len(took_us)),
    }


def find(cycle: Cycle[Any]) -> None:
    """Until every motor is online. Raises RuntimeError if one does not answer."""
    online: set[int] = set()
    motors = len(cycle.counts())
    until = after(monotonic_ns(), int(FIND_S * SECOND))
    while len(online) < motors:
        if not left_s(until):
            raise RuntimeError(f"only {len(online)} of {motors} simulated motors answered within {FIND_S:g} s")
        cycle.work(after(monotonic_ns(), 10 * MS))
        online |= {notice.motor for notice in cycle.take_notices() if isinstance(notice, MotorOnline)}


@contextlib.contextmanager
def _memory(motors: tuple[Motor, ...]) -> Iterator[tuple[Bus[Any], Simulated]]:
    simulated = build_bus(motors, SETTINGS, monotonic_ns())
    meter = Meter()
    replace(simulated, "respond", functools.partial(meter.wrap, stage=""))
    bus: MemoryBus[Any] = MemoryBus(simulated)
    yield bus, lambda: meter.ns[""]


@contextlib.contextmanager
def _terminal(motors: tuple[Motor, ...]) -> Iterator[tuple[Bus[Any], Simulated]]:
    with simulator(motors) as spec:
        bus = open_bus(spec)
        yield bus, lambda: 0
        bus.close()


@contextlib.contextmanager
def _virtual(motors: tuple[Motor, ...]) -> Iterator[tuple[Bus[Any], Simulated]]:
    plan = SimulatedBusPlan("virtual", "bench", motors, SETTINGS, None, ())
    with build_host(plan):
        bus = open_bus(CanSpec("bench", "virtual", "bench", 1_000_000))
        yield bus, lambda: 0
        bus.close()


_BUSES: dict[str, tuple[str, Callable[[tuple[Motor, ...]], Any]]] = {
    "memory, feetech_sts": ("feetech_sts", _memory),
    "memory, damiao": ("damiao", _memory),
    "pseudo-terminal, feetech_sts": ("feetech_sts", _terminal),
    "virtual CAN, damiao": ("damiao", _virtual),
}


@contextlib.contextmanager
def simulator(motors: tuple[Motor, ...], settings: SimulationSettings = SETTINGS) -> Iterator[BusSpec]:
    """Motors of one family in the gateway's own simulator process, behind a pseudo-terminal."""
    with tempfile.TemporaryDirectory(prefix="servo-gateway-bench-") as directory:
        where = Path(directory, "bus0")
        serial = load_family(motors[0].family).medium == "serial"
        plan = SimulatedBusPlan("serial" if serial else "slcan", str(where), motors, settings, None, (), "bus0")
        ours, process = _child("gateway.simulator", SimulatorPlan((plan,), realtime=True))
        try:
            until = after(monotonic_ns(), int(FIND_S * SECOND))
            while not where.exists() and left_s(until):
                sleep_until(after(monotonic_ns(), 10 * MS))
            slcan = CanSpec("bus0", "slcan", str(where), BITS_PER_S, {"sleep_after_open": 0})
            yield SerialSpec("bus0", str(where), BITS_PER_S) if serial else slcan
        finally:
            ours.close()
            process.wait()


def _child(module: str, plan: object) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = link.pair()
    with theirs:
        fd = theirs.fileno()
        process = subprocess.Popen([sys.executable, "-m", module, str(fd)], pass_fds=[fd])
    ours.send(pickle.dumps(plan))
    return ours, process


# -- lateness ------------------------------------------------------------------------------------------------------


def _lateness(rate_hz: int, seconds: float, *, realtime: bool) -> dict[str, float]:
    motors = make_motors("feetech_sts", MOTORS)
    told: list[CycleStats] = []
    with simulator(motors) as spec:
        ours, process = _child("gateway.worker", Plan(spec, motors, Timing(SECOND // rate_hz), realtime))
        end = link.GatewayEnd(ours)
        until = after(monotonic_ns(), int((seconds + 2) * SECOND))
        try:
            while select.select([end], [], [], left_s(until))[0]:
                message = end.receive()
                if message is None:
                    raise RuntimeError("the worker ended")
                if isinstance(message, CycleStats):
                    told.append(message)
        finally:
            end.close()
            process.wait()
    told = told[1:]  # the first second found the motors
    return {
        "p50": float(np.median([stats.late_p50_us for stats in told])),
        "max_of_a_second": float(np.median([stats.late_max_us for stats in told])),
        "max": max(stats.late_max_us for stats in told),
        "skipped": float(told[-1].skipped - told[0].skipped),
    }


@contextlib.contextmanager
def _all_cores_busy() -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_compute, daemon=True) for _ in os.sched_getaffinity(0)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _compute() -> None:
    while True:
        until = after(monotonic_ns(), int(BUSY_SHARE * 10 * MS))
        while left_s(until):
            pass
        sleep_until(after(until, int((1 - BUSY_SHARE) * 10 * MS)))


def _fifo_is_allowed() -> bool:
    """Asked of a process of its own, so that this one stays as it is."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(set_realtime, (1,))
