"""All motor families in one gateway, into a private broker: ``python -m hil.families [--seconds 120]``.

    steady   the simulated arm of config/simulated-families.toml for so long, then ``hil.judge`` on the whole topic
    faults   every fault of a motor or a bus, on one motor of every bus at a time: what a reader of the topics sees

A reader knows only the topics: which motor gave how many samples while the fault lasted, whether any value was wrong,
what events told, and that every other motor went on as before.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from drivers.clock import SECOND, after, epoch_ns, monotonic_ns, sleep_until
from hil.acceptance import HEADER, Phase, Proof, as_json, proof, rate_hz, row, steady
from hil.arm import SAMPLE_CONFIG, Arm
from hil.judge import Sample, read, table
from hil.kafka import Broker

CONFIG = SAMPLE_CONFIG.parent / "simulated-families.toml"
ENABLED, FAULT_TEMPERATURE = 1 << 0, 1 << 9  # config/telemetry.proto
GOES_ON = 0.8  # of the undisturbed rate; a machine with two cores is noisy
GONE = 0.2
SPARSE = 0.05  # a sample takes up to four frames (rmd_x), all of which have to pass, and a motor that missed rests
JUMP_RAD = 0.25  # the simulated motion is slower than this between samples, also where some are lost
SETTLE_S = 0.4  # until a fault is taken up and a silent motor given up
HOT_C = 120.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What the topics say of one motor while it had a fault. Shares are of its rate when nothing was wrong."""

    fault: str
    family: str
    motor: str
    share: float
    others: float  # the smallest share of all motors that had no fault
    slowest: str  # which that is
    events: tuple[str, ...]
    hottest_c: float
    status_before: int
    status_after: int
    status_during: int  # all bits that were set
    largest_step_rad: float
    spread_rad: float
    spread_before_rad: float

    @property
    def faults(self) -> list[str]:
        """What should have been seen, and was not."""
        return [f"{self.fault}, {self.family}: {wrong}" for wrong in FAULTS[self.fault].wrong(self)]


@dataclass(frozen=True, slots=True)
class Trial:
    """When a fault was tried: undisturbed before it, while it lasted, and until the next one."""

    before: Phase
    during: Phase
    behind: Phase


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of the simulation, and what has to be seen of it.

    ``of_bus``: it is a CAN bus's, not a motor's. ``healing_is_a_step``: the position that is told then really jumps.
    """

    line: str
    expects: Sequence[Callable[[Seen], str]]
    of_bus: bool = False
    healing_is_a_step: bool = False

    def wrong(self, seen: Seen) -> list[str]:
        """The expectations that do not hold."""
        always = (_others_go_on, _no_invented_position)
        return [said for expected in (*always, *self.expects) if (said := expected(seen))]


def _others_go_on(seen: Seen) -> str:
    return "" if seen.others >= GOES_ON else f"{seen.slowest}, without a fault, had {seen.others:.0%} of its rate"


def _no_invented_position(seen: Seen) -> str:
    return "" if seen.largest_step_rad <= JUMP_RAD else f"a step of {seen.largest_step_rad:.2f} rad"


def _goes_on(seen: Seen) -> str:
    return "" if seen.share >= GOES_ON else f"{seen.share:.0%} of its samples"


def _some(seen: Seen) -> str:
    return "" if SPARSE < seen.share < 0.98 else f"{seen.share:.0%} of its samples"


def _gone(seen: Seen) -> str:
    return "" if seen.share <= GONE else f"{seen.share:.0%} of its samples"


def _told(*events: str) -> Callable[[Seen], str]:
    def expected(seen: Seen) -> str:
        missing = [event for event in events if event not in seen.events]
        return f"no {', '.join(missing)} among {', '.join(seen.events) or 'no events'}" if missing else ""

    return expected


def _frozen(seen: Seen) -> str:
    if seen.spread_before_rad < 0.01:
        return f"it did not move before: {seen.spread_before_rad:.4f} rad"
    return "" if seen.spread_rad < 0.001 else f"it moved by {seen.spread_rad:.4f} rad"


def _hot(seen: Seen) -> str:
    if seen.hottest_c < HOT_C - 1:
        return f"at most {seen.hottest_c:.0f} C"
    return "" if seen.status_during & FAULT_TEMPERATURE else "no FAULT_TEMPERATURE"


def _lost_torque(seen: Seen) -> str:
    return "it still says ENABLED" if seen.status_after & ENABLED else ""


AWAY = (_gone, _told("motor.offline", "motor.online"))
FAULTS: Mapping[str, Fault] = {  # in an order in which none spoils the next
    "stuck encoder": Fault("stuck_encoder = true", (_goes_on, _frozen), healing_is_a_step=True),
    "silent": Fault("silent = true", AWAY),
    "15 ms late": Fault("delay_ms = 15", AWAY),
    "wrong id": Fault("wrong_id = 15", AWAY),
    "a third lost": Fault("drop = 0.33", (_some,)),
    "a third corrupt": Fault("corrupt = 0.33", (_some,)),
    "overheated": Fault(f"temperature_c = {HOT_C}", (_hot, _told("motor.fault", "motor.over_temperature"))),
    "rebooted": Fault("reboot = true", (_lost_torque,)),
    "brownout": Fault("voltage_v = 3.0", (*AWAY, _lost_torque)),
    "bus off": Fault("bus_off = true", AWAY, of_bus=True),
}


def play_all(arm: Arm, window_s: float) -> tuple[dict[str, Trial], Proof]:
    """Each fault for ``window_s`` on the second motor of every bus: {fault: when}."""
    arm.start()
    trials = {}
    before = _pass(window_s)
    for name, fault in FAULTS.items():
        faulty = arm.can_buses if fault.of_bus else set(victims(arm).values())
        arm.play(dict.fromkeys(faulty, fault.line))
        during = _pass(window_s)
        arm.play({})
        arm.wait_status(lambda s: all(m["state"] == "online" for m in s["motors"]), f"all online after {name}")
        undisturbed = _pass(window_s)
        trials[name] = Trial(before, during, Phase(during.to_ns, undisturbed.to_ns))
        before = undisturbed
    arm.stop()
    return trials, proof("faults", arm, {})


def victims(arm: Arm) -> dict[str, str]:
    """{bus: its second motor}"""
    found: dict[str, str] = {}
    for bus in dict.fromkeys(arm.motors.values()):
        found[bus] = [motor for motor, on in arm.motors.items() if on == bus][1]
    return found


async def look(arm: Arm, trials: Mapping[str, Trial], samples: Mapping[str, list[Sample]]) -> list[Seen]:
    """What the topics hold of every fault and family."""
    assert arm.bootstrap is not None
    events = [json.loads(record.value) async for record in read(arm.bootstrap, f"servo.{arm.name}.events")]
    found = []
    for name, trial in trials.items():
        for bus, motor in victims(arm).items():
            if FAULTS[name].of_bus and bus not in arm.can_buses:
                continue
            of_bus = {joint for joint, on in arm.motors.items() if on in arm.can_buses}
            faulty = of_bus if FAULTS[name].of_bus else set(victims(arm).values())
            found.append(_look(name, arm, bus, motor, faulty, trial, samples, events))
    return found


def _look(
    fault: str,
    arm: Arm,
    bus: str,
    motor: str,
    faulty: set[str],
    trial: Trial,
    samples: Mapping[str, list[Sample]],
    events: Sequence[Mapping[str, Any]],
) -> Seen:
    settled = Phase(trial.during.from_ns + int(SETTLE_S * SECOND), trial.during.to_ns)
    shares = {
        name: rate_hz(taken, settled) / max(1e-9, rate_hz(taken, trial.before)) for name, taken in samples.items()
    }
    others = {name: share for name, share in shares.items() if name not in faulty}
    slowest = min(others, key=lambda name: others[name])
    mine = samples[motor]
    earlier, now = _within(mine, trial.before), _within(mine, settled)
    around = _within(mine, Phase(trial.before.from_ns, trial.behind.to_ns))
    told = [
        event["type"]
        for event in events
        if trial.during.from_ns <= event["at_ns"] < trial.behind.to_ns
        and (event["motor"] == motor or event.get("bus") == bus)
    ]
    return Seen(
        fault=fault,
        family=arm.families[motor],
        motor=motor,
        share=shares[motor],
        others=others[slowest],
        slowest=slowest,
        events=tuple(dict.fromkeys(told)),
        hottest_c=max((s.temperature_c for s in now), default=0.0),
        status_before=earlier[-1].status if earlier else 0,
        status_after=around[-1].status if around else 0,
        status_during=_bits(now),
        largest_step_rad=_largest_step([*earlier, *now] if FAULTS[fault].healing_is_a_step else around),
        spread_rad=_spread(now),
        spread_before_rad=_spread(earlier),
    )


def _within(samples: Sequence[Sample], phase: Phase) -> list[Sample]:
    return [sample for sample in samples if phase.from_ns <= sample.sampled_at_ns < phase.to_ns]


def _bits(samples: Sequence[Sample]) -> int:
    bits = 0
    for sample in samples:
        bits |= sample.status
    return bits


def _spread(samples: Sequence[Sample]) -> float:
    positions = [sample.position_rad for sample in samples] or [0.0]
    return max(positions) - min(positions)


def _largest_step(samples: Sequence[Sample]) -> float:
    """The largest difference of positions between samples that are at most 100 ms apart."""
    return max(
        (
            abs(b.position_rad - a.position_rad)
            for a, b in pairwise(samples)
            if b.sampled_at_ns - a.sampled_at_ns < SECOND // 10
        ),
        default=0.0,
    )


def _pass(seconds: float) -> Phase:
    from_ns = epoch_ns()
    sleep_until(after(monotonic_ns(), int(seconds * SECOND)))
    return Phase(from_ns, epoch_ns())


# --- the command ---------------------------------------------------------------------------------------------------

SEEN_HEADER = ("fault", "family", "samples", "others", "hottest C", "step rad", "events", "verdict")


def seen_row(seen: Seen) -> list[str]:
    """A line of the matrix."""
    return [
        seen.fault,
        seen.family,
        f"{seen.share:.0%}",
        f"{seen.others:.0%}",
        f"{seen.hottest_c:.0f}",
        f"{seen.largest_step_rad:.3f}",
        " ".join(seen.events) or "-",
        "wrong" if seen.faults else "fine",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both, print both tables; exit status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m hil.families", description="All motor families in one gateway.")
    parser.add_argument("--seconds", type=float, default=120.0, help="length of the steady run (%(default)g)")
    parser.add_argument("--window", type=float, default=3.0, metavar="S", help="length of each fault (%(default)g)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON too")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="servo-gateway-families-", ignore_cleanup_errors=True) as scratch,
        Broker() as broker,
    ):
        arms = [Arm(name, Path(scratch, name), broker.bootstrap, sample=CONFIG) for name in ("steady", "faults")]
        try:
            _tell(f"{len(arms[0].motors)} motors on {len(set(arms[0].motors.values()))} buses, {options.seconds:g} s")
            steadily = steady(arms[0], options.seconds)
            _tell(f"{len(FAULTS)} faults, {options.window:g} s each")
            trials, disturbed = play_all(arms[1], options.window)
            matrix = asyncio.run(look(arms[1], trials, disturbed.samples))
        finally:
            for arm in arms:
                arm.close()
    print(table(SEEN_HEADER, [seen_row(seen) for seen in matrix]))
    print()
    print(table(HEADER, [row(steadily), row(disturbed)]))
    wrong = [fault for seen in matrix for fault in seen.faults] + steadily.faults + disturbed.faults
    for line in wrong:
        print(line)
    if options.json:
        document = {"proofs": [as_json(steadily), as_json(disturbed)], "matrix": [asdict(seen) for seen in matrix]}
        options.json.write_text(json.dumps(document, indent=2))
    return 1 if wrong else 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
