"""A run: faults of one kind, or of all, done to one gateway, and what is left of it in the end."""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from drivers.clock import SECOND, after, left_s, monotonic_ns
from hil.arm import ArmError
from hil.cluster import Cluster
from hil.judge import JudgeError
from hil.kafka import RigError
from hil.torture.account import Account, settle
from hil.torture.faults import FAULTS, Fault, NotNow
from hil.torture.rig import Life, Rig

STALL_MOST_MS = 1000.0  # polling that waits for a disk or a broker waits longer; a machine with two cores is noisy
PAUSE_S = (0.5, 3.0)  # between faults of a group
SHORT_MIN = 3.0  # a mix that is shorter has shorter pauses
MIX_PAUSE_S = {"gateway": (5.0, 40.0), "brokers": (3.0, 20.0), "disk": (3.0, 20.0), "clock": (10.0, 60.0)}


@dataclass(frozen=True, slots=True)
class Caused:
    """A fault that happened. ``recover_s``: from its healing until the topic followed live; None if it never did."""

    fault: str
    what: str
    at_s: float
    recover_s: float | None


@dataclass(frozen=True, slots=True)
class Memory:
    """PSS of the gateway's process in its longest life, MB."""

    seconds: float
    start_mb: float
    quarters_mb: list[float]  # medians of its quarters: what is flat ends as it was in the middle
    end_mb: float


@dataclass(slots=True)
class Result:
    """What a run has shown."""

    name: str
    seconds: float = 0.0
    caused: list[Caused] = field(default_factory=list)
    not_caused: list[str] = field(default_factory=list)
    account: Account = field(default_factory=Account)
    memory: Memory | None = None
    lives: int = 0
    wrong: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        return {"ok": not self.wrong, **asdict(self)}


def alone(
    fault: Fault, times: int, scratch: Path, cluster: Cluster, seed: int, tell: Callable[[str], None], keep: Path | None
) -> Result:
    """One fault, so many times, on a gateway of its own."""

    def during(rig: Rig, result: Result) -> None:
        chance = random.Random(f"{seed} {fault.name}")
        for _ in range(times):
            rig.wait(chance.uniform(*PAUSE_S))
            _cause(fault, rig, chance, result, tell)

    return _run(fault.name, scratch, cluster, f"{seed} {fault.name}", during, keep, clock=fault.group == "clock")


def mixed(
    faults: Sequence[Fault],
    minutes: float,
    scratch: Path,
    cluster: Cluster,
    seed: int,
    tell: Callable[[str], None],
    keep: Path | None,
) -> Result:
    """All of ``faults`` at random for so long; one thread a group."""
    groups = {fault.group: [other for other in faults if other.group == fault.group] for fault in faults}

    def during(rig: Rig, result: Result) -> None:
        deadline = after(monotonic_ns(), int(minutes * 60 * SECOND))
        pace = min(1.0, minutes / SHORT_MIN)

        def group(name: str, members: Sequence[Fault]) -> None:
            chance = random.Random(f"{seed} {name}")
            while True:
                rig.wait(min(pace * chance.uniform(*MIX_PAUSE_S.get(name, PAUSE_S)), left_s(deadline)))
                if not left_s(deadline):
                    return
                _cause(chance.choice(members), rig, chance, result, tell)

        threads = [threading.Thread(target=group, args=item, name=item[0], daemon=True) for item in groups.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return _run("mixed", scratch, cluster, f"{seed} mixed", during, keep, clock="clock" in groups)


def _cause(fault: Fault, rig: Rig, chance: random.Random, result: Result, tell: Callable[[str], None]) -> None:
    at_s = (monotonic_ns() - rig.began_ns) / SECOND
    try:
        what = fault.cause(rig, chance)
    except (NotNow, ArmError, RigError, OSError) as error:
        result.not_caused.append(f"{fault.name}: {error}")
        tell(f"{fault.name}: not caused: {error}")
        return
    took_ns = rig.wait_live()
    recover_s = None if took_ns is None else took_ns / SECOND
    if took_ns is None:
        what += f" ({rig.why_not_live()})"
    result.caused.append(Caused(fault.name, what, round(at_s, 3), recover_s))
    tell(
        f"{at_s:7.1f} s  {fault.name} {what}: "
        + ("no recovery" if recover_s is None else f"live {recover_s:.1f} s later")
    )


def _run(
    name: str,
    scratch: Path,
    cluster: Cluster,
    seed: str,
    during: Callable[[Rig, Result], None],
    keep: Path | None,
    *,
    clock: bool,
) -> Result:
    result = Result(name)
    began = monotonic_ns()
    try:
        with Rig(f"torture-{name}", scratch, cluster, seed, clock=clock) as rig:
            during(rig, result)
            result.wrong += rig.finish()
            arm = rig.arm
            places = [arm.state, rig.archive]
            if keep:
                rig.keep(keep)
            result.account = settle(
                cluster.bootstrap, arm.name, places, rig.kept, rig.follower.issued, flipped=rig.flipped
            )
            if rig.left_at_stop:
                result.account.notes.append(
                    f"{rig.left_at_stop} records were left to the next start by a stop in order"
                )
            result.lives, result.memory = len(rig.lives), _memory(rig.lives)
            result.wrong += [f"the gateway ended by itself:\n{tail}" for tail in rig.ended]
    except (ArmError, JudgeError, RigError) as error:
        result.wrong.append(str(error))
    result.seconds = round((monotonic_ns() - began) / SECOND, 1)
    result.wrong += result.account.wrong
    if result.account.stall_ms > STALL_MOST_MS:
        result.wrong.append(f"polling stood still for {result.account.stall_ms:.0f} ms: {result.account.stall_at}")
    result.wrong += [f"{one.fault} {one.what}: no recovery" for one in result.caused if one.recover_s is None]
    return result


def _memory(lives: Sequence[Life]) -> Memory | None:
    looks = [life.memory for life in lives if life.memory]
    if not looks:
        return None
    longest = max(looks, key=lambda look: look[-1][0] - look[0][0])
    mb = [mb for _, mb in longest]
    quarters = [round(float(np.median(quarter)), 1) for quarter in np.array_split(mb, 4) if len(quarter)]
    return Memory((longest[-1][0] - longest[0][0]) / SECOND, mb[0], quarters, mb[-1])


def choose(names: Sequence[str]) -> list[Fault]:
    """The faults with these names; all if there are none. Raises KeyError."""
    return [FAULTS[name] for name in names] if names else list(FAULTS.values())
