"""The acceptance of the main job, with a private broker: ``python -m hil.acceptance [--seconds 60]``.

    steady   the simulated arm for so long
    outage   the broker is stopped for a third of it, in the middle
    kills    the gateway is killed (SIGKILL) again and again: starting, running, stopping, draining a
             backlog, and while the broker is away

After each, ``hil.judge`` reads the whole topic, and its last records must be the journal's. System tests run the same
scenarios, shorter.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

from drivers.clock import SECOND, EpochNs, after, epoch_ns, monotonic_ns, sleep_until
from hil.arm import Arm
from hil.judge import Sample, Verdict, judge, table
from hil.kafka import Broker

RATE_KEPT = 0.8  # of the undisturbed rate of the same run; a machine with two cores is noisy
MOMENTS = ("starting", "running", "stopping", "draining", "away")


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a run, in event time."""

    from_ns: int
    to_ns: int


@dataclass(slots=True)
class Proof:
    """What a scenario has shown. Rates are samples a second: {phase: {motor: rate}}."""

    scenario: str
    verdict: Verdict
    samples: dict[str, list[Sample]]
    rates_hz: dict[str, dict[str, float]]
    unpublished: dict[str, int]  # {motor: records of the journal that are not in the topic}

    @property
    def faults(self) -> list[str]:
        """Everything that is wrong."""
        wrong = [str(fault) for fault in self.verdict.faults]
        if self.verdict.total("told_gaps"):
            wrong.append(f"{self.verdict.total('told_gaps')} records lost, and told")
        if (streams := self.verdict.streams) != 1:
            wrong.append(f"{streams} streams instead of one")
        wrong += [f"{motor}: no records" for motor in self.unpublished if not self.samples.get(motor)]
        wrong += [f"{motor}: {count} records not published" for motor, count in self.unpublished.items() if count]
        before = self.rates_hz.get("before", {})
        for phase in ("during", "after"):
            wrong += [
                f"{motor}: {rate:.1f} Hz {phase}, {before[motor]:.1f} Hz before"
                for motor, rate in self.rates_hz.get(phase, {}).items()
                if rate < RATE_KEPT * before[motor]
            ]
        return wrong


def proof(scenario: str, arm: Arm, phases: dict[str, Phase]) -> Proof:
    """Judge the arm's topic, and take the rates of ``phases`` from the samples themselves. The gateway has stopped."""
    assert arm.bootstrap is not None
    samples: dict[str, list[Sample]] = {}
    verdict = asyncio.run(judge(arm.bootstrap, arm.name, lambda s: samples.setdefault(s.motor, []).append(s)))
    rates = {
        name: {motor: rate_hz(samples.get(motor, []), phase) for motor in arm.motors} for name, phase in phases.items()
    }
    published = {partition.motor: partition.last_seq for partition in verdict.partitions}
    unpublished = {motor: seq - published.get(motor, 0) for motor, seq in arm.journal_ends().items()}
    return Proof(scenario, verdict, samples, rates, unpublished)


def rate_hz(samples: Sequence[Sample], phase: Phase) -> float:
    """Samples a second within a phase."""
    count = sum(1 for sample in samples if phase.from_ns <= sample.sampled_at_ns < phase.to_ns)
    return count / ((phase.to_ns - phase.from_ns) / SECOND)


# --- scenarios -----------------------------------------------------------------------------------------------------


def steady(arm: Arm, seconds: float) -> Proof:
    """Undisturbed."""
    arm.start()
    phase = _pass(seconds)
    arm.wait_caught_up()
    arm.stop()
    return proof("steady", arm, {"before": phase})


def outage(arm: Arm, broker: Broker, before_s: float, down_s: float, after_s: float) -> Proof:
    """The broker is stopped for ``down_s`` and comes back."""
    arm.start()
    arm.wait_status(lambda status: status["kafka"]["state"] == "up", "connected to the broker")
    before = _pass(before_s)
    broker.stop()
    during = _pass(down_s)
    broker.start()
    afterwards = _pass(after_s)
    arm.wait_caught_up()
    arm.stop()
    return proof("outage", arm, {"before": before, "during": during, "after": afterwards})


def kills(arm: Arm, broker: Broker, moments: Sequence[str], seed: int, tell: Callable[[str], None] = print) -> Proof:
    """The gateway is killed at each of ``moments``, then runs once more and stops in order."""
    chance = random.Random(seed)
    for number, moment in enumerate(moments, start=1):
        tell(f"kill {number} of {len(moments)}, {moment}: {_kill(arm, broker, moment, chance)}")
    arm.start()
    _pass(2)
    arm.wait_caught_up()
    arm.stop()
    return proof("kills", arm, {})


def _kill(arm: Arm, broker: Broker, moment: str, chance: random.Random) -> str:
    """Start the gateway and kill it; how long after what."""
    arm.start(online=moment != "starting")
    longest_s = {"starting": 2.0, "running": 2.0, "stopping": 0.3, "draining": 1.5, "away": 2.0}[moment]
    if moment == "stopping":
        _pass(1)
        arm.ask_to_stop()
    elif moment == "draining":
        broker.stop()
        _pass(2)
        broker.start()
    elif moment == "away":
        broker.stop()
    delay_s = chance.uniform(0, longest_s)
    _pass(delay_s)
    had_ended = not arm.running
    arm.kill()
    if moment == "away":  # once more, in a run that has never seen the broker
        arm.start()
        _pass(1)
        arm.kill()
        broker.start()
    return f"after {delay_s * 1000:.0f} ms{', when it had ended' if had_ended else ''}"


def _pass(seconds: float) -> Phase:
    """Let time go by; when that was."""
    from_ns: EpochNs = epoch_ns()
    sleep_until(after(monotonic_ns(), int(seconds * SECOND)))
    return Phase(from_ns, epoch_ns())


# --- the command ---------------------------------------------------------------------------------------------------

HEADER = (
    *("scenario", "records/motor", "gaps", "repeats", "disorder", "streams"),
    *("Hz before", "during", "after", "verdict"),
)


def row(proven: Proof) -> list[str]:
    """A line of the table. Rates are the slowest motor's."""
    verdict = proven.verdict
    records = [partition.records for partition in verdict.partitions] or [0]
    least, most = min(records), max(records)
    rates = [
        f"{min(proven.rates_hz[phase].values()):.1f}" if phase in proven.rates_hz else "-"
        for phase in ("before", "during", "after")
    ]
    return [
        proven.scenario,
        f"{least}" if least == most else f"{least}..{most}",
        f"{verdict.total('gaps') + verdict.total('told_gaps')}",
        f"{verdict.total('repeats')}",
        f"{verdict.total('disorders')}",
        f"{verdict.streams}",
        *rates,
        "wrong" if proven.faults else "fine",
    ]


def as_json(proven: Proof) -> dict[str, object]:
    """For a program."""
    return {
        "scenario": proven.scenario,
        "ok": not proven.faults,
        "faults": proven.faults,
        "rates_hz": proven.rates_hz,
        "unpublished": proven.unpublished,
        "verdict": asdict(proven.verdict),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all scenarios and print the table; exit status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m hil.acceptance", description="Acceptance of the main job.")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the steady run (%(default)g)")
    parser.add_argument("--kills", type=int, default=10, help="how often the gateway is killed (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON too")
    options = parser.parse_args(arguments)
    third = options.seconds / 3
    scenarios: list[Callable[[Arm, Broker], Proof]] = [
        lambda arm, _: steady(arm, options.seconds),
        lambda arm, broker: outage(arm, broker, third, third, third),
        lambda arm, broker: kills(arm, broker, list(islice(cycle(MOMENTS), options.kills)), options.seed, _tell),
    ]
    proofs: list[Proof] = []
    with tempfile.TemporaryDirectory(prefix="servo-gateway-acceptance-", ignore_cleanup_errors=True) as scratch:
        for number, scenario in enumerate(scenarios, start=1):
            _tell(f"scenario {number} of {len(scenarios)}")
            with Broker() as broker:
                arm = Arm(f"arm{number}", Path(scratch, f"arm{number}"), broker.bootstrap)
                try:
                    proofs.append(scenario(arm, broker))
                finally:
                    arm.close()
    print(table(HEADER, [row(proven) for proven in proofs]))
    for proven in proofs:
        for line in proven.faults:
            print(f"{proven.scenario}: {line}")
    if options.json:
        options.json.write_text(json.dumps([as_json(proven) for proven in proofs], indent=2))
    return 1 if any(proven.faults for proven in proofs) else 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
