"""How near a cycle comes to what the bus can carry: six motors on a simulated wire, polled as fast as it goes.

The limit is the bit rate over the true bits of the requests and replies of a poll (stuff bits counted); motors answer
at once. What is missing to it is what the cycle takes between the last bit of a poll and the first of the next.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from drivers import protocols
from drivers.bus import Bus, Received
from drivers.buses import open_bus
from drivers.buses.memory import MemoryBus
from drivers.clock import SECOND, MonotonicNs, after, left_s, monotonic_ns
from drivers.cycle import Cycle, Timing
from drivers.motor import Motor
from drivers.sim.build import SimulationSettings, build_bus
from drivers.sim.wire import wire_bits
from gateway.realtime import set_realtime
from gateway.worker import families
from hil.bench.cycle import find, simulator
from hil.bench.report import over_runs, show

RUNS = 3
MOTORS = 6
BUDGET = 0.95
BITS_PER_S = 1_000_000
FAST_BITS_PER_S = {"dynamixel2": 4_000_000}


class Recorded(Bus[Any]):
    """A bus that remembers what passed, for its bits to be counted afterwards."""

    def __init__(self, bus: Bus[Any]) -> None:
        super().__init__()
        self.units: list[Any] = []
        self._bus = bus

    def send(self, units: Sequence[Any], deadline: MonotonicNs) -> None:
        self.units += units
        self._bus.send(units, deadline)

    def receive(self, deadline: MonotonicNs) -> Received[Any] | None:
        received = self._bus.receive(deadline)
        if received is not None:
            self.units.append(received.unit)
        return received

    def close(self) -> None:
        self._bus.close()


def run(console: Console, seconds: float) -> dict[str, Any]:
    """Measure and tell."""
    realtime = set_realtime(20)
    found = {}
    for name, motors, bits_per_s in _cases():
        for where, opened in (("memory", _memory), ("simulator", _terminal)):
            console.print(f"[dim]wire: {name}, {where}", highlight=False)
            runs = [_measure(motors, bits_per_s, opened, seconds / (2 * RUNS)) for _ in range(RUNS)]
            found[f"{name}, {where}"] = over_runs(runs)
    show(
        console,
        f"wire: {MOTORS} motors polled back to back, samples/s of each against the bus limit",
        ("motors, bus", "bits a poll", "limit", "samples/s", "ratio", "between polls us", "misses", "budget"),
        [
            (
                kind,
                *(run[key] for key in ("bits", "limit_hz", "rate_hz", "ratio", "between_us", "misses")),
                BUDGET,
            )
            for kind, run in found.items()
        ],
        f"Medians of {RUNS} runs{'' if realtime else '; SCHED_FIFO is not permitted here'}. memory: simulated in the "
        "polling process; simulator: by the gateway's simulator process, behind a pseudo-terminal (CAN: slcan), so "
        "that two wake-ups from process to process are in every poll.",
    )
    return {"runs": found, "budget": BUDGET, "sched_fifo": realtime}


def _cases() -> Iterator[tuple[str, tuple[Motor, ...], int]]:
    """Every way in which a family polls, at 1 Mbit/s and as fast as its motors can."""
    for name in protocols.family_names():
        family = protocols.load(name)
        known = set()
        for number, options in enumerate(family.examples):
            motors = tuple(Motor(i, f"joint{i}", name, family.bus_ids[i + 1], options) for i in range(MOTORS))
            bits = family.poll_bits(motors)
            if bits in known:
                continue
            known.add(bits)
            for bits_per_s in sorted({BITS_PER_S, FAST_BITS_PER_S.get(name, BITS_PER_S)}):
                yield f"{name}{f'#{number}' if number else ''} {bits_per_s / 1e6:g} Mbit/s", motors, bits_per_s


def _measure(
    motors: tuple[Motor, ...],
    bits_per_s: int,
    opened: Callable[[tuple[Motor, ...], SimulationSettings], Any],
    seconds: float,
) -> dict[str, float]:
    limit_ns = protocols.load(motors[0].family).poll_bits(motors) * SECOND // bits_per_s
    cycle: Cycle[Any] = Cycle(families(motors), Timing(4 * limit_ns))  # so that no poll is cut short
    complete = 0
    with opened(motors, SimulationSettings(bits_per_s=bits_per_s)) as bus:
        recorded = Recorded(bus)
        cycle.attach(recorded)
        find(cycle)
        misses = sum(counts.misses for counts in cycle.counts())
        gc.freeze()
        begin = monotonic_ns()
        end = after(begin, int(seconds * SECOND))
        polled: list[list[Any]] = []
        while left_s(end):
            recorded.units = []
            complete += len(cycle.poll(monotonic_ns())) == len(motors)
            polled.append(recorded.units)
            cycle.work(monotonic_ns())
        took_ns = monotonic_ns() - begin
        gc.unfreeze()
        misses = sum(counts.misses for counts in cycle.counts()) - misses
    polls = len(polled)
    bits = sum(wire_bits(unit) for units in polled for unit in units) / polls
    rate_hz, limit_hz = complete / took_ns * SECOND, bits_per_s / bits
    return {
        "bits": bits,
        "limit_hz": limit_hz,
        "rate_hz": rate_hz,
        "ratio": rate_hz / limit_hz,
        "between_us": took_ns / polls / 1000 - 1e6 * bits / bits_per_s,
        "misses": float(misses),
    }


@contextlib.contextmanager
def _memory(motors: tuple[Motor, ...], settings: SimulationSettings) -> Iterator[Bus[Any]]:
    yield MemoryBus(build_bus(motors, settings, monotonic_ns()))


@contextlib.contextmanager
def _terminal(motors: tuple[Motor, ...], settings: SimulationSettings) -> Iterator[Bus[Any]]:
    with simulator(motors, settings) as spec:
        bus = open_bus(spec)
        yield bus
        bus.close()
