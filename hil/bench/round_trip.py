"""Whether a log comes back as it was, and when: six motors at 200 Hz, as many minutes as seconds are asked for.

    journal -> recording (its recorder killed again and again) -> journal -> recording -> Kafka -> recording

Every place is read and hashed, motor by motor: one byte or one place that differs fails it. Then a part of it is
replayed at 1x, and the moment at which each sample is handed to the target is compared with the time that it has.
"""

import asyncio
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from drivers.clock import MS, SECOND, after, monotonic_ns, sleep_until
from gateway.config import kafka_at
from gateway.log_reader import Key, LogReader, Missed, Samples, Topic
from gateway.recordings.into_journal import into_journal
from gateway.recordings.into_kafka import into_kafka
from gateway.recordings.pace import Pace
from gateway.recordings.recorder import Recorder
from gateway.recordings.replay import OpenTarget, Played, Run, Tail, Target, replay
from gateway.source import open_source
from gateway.state_dir import StateDir
from hil.bench.logs import MOTORS, RATE_HZ, ROTATE_BYTES, SPEED_UP, make_records, write_journal
from hil.bench.report import show
from hil.kafka import Broker, RigError

KILLS = 5
BYTES = 39  # of a sample in a recording
ARM = "again"

Open = Callable[[Topic], LogReader]


def run(console: Console, seconds: float) -> dict[str, Any]:
    """Prove, measure and tell."""
    with tempfile.TemporaryDirectory(prefix="servo-gateway-bench-") as name, Broker() as broker:
        here = Path(name)
        records = make_records(round(seconds * SPEED_UP * RATE_HZ))
        journal = here / "journal.db"
        write_journal(journal, records)
        kafka, back = kafka_at([broker.bootstrap]), StateDir(here / "back")
        toml = here / "again.toml"
        toml.write_text(TOML.format(state=here / "none", servers=broker.bootstrap))
        found = {"journal": _look(_source(journal))}
        kills = _record_and_kill(journal, here / "first", len(records) * BYTES)
        found[f"recording, its recorder killed {kills} times"] = _look(_source(here / "first"))
        _play(_source(here / "first"), into_journal(back, "back"))
        found["journal of a replay"] = _look(_source(back.journal))
        _record(_source(back.journal), here / "second")
        found["recording of that"] = _look(_source(here / "second"))
        _play(_source(here / "second"), into_kafka(kafka, ARM))
        found["topic of a replay"] = _look(_source(toml, []))
        _record(_source(toml, []), here / "third")
        found["recording of that topic"] = _look(_source(here / "third"))
        errors_ms = _time(_source(here / "third"), seconds)
    return _tell(console, found, len(records), kills, errors_ms)


TOML = """
[arm]
name = "again"
state_dir = "{state}"
[kafka]
bootstrap_servers = ["{servers}"]
[simulation]
[[bus]]
name = "serial0"
type = "serial"
rate_hz = 200
""" + "".join(
    f"""
[[motor]]
name = "joint{at + 1}"
partition = {at}
bus = "serial0"
protocol = "feetech_sts"
id = {at + 1}
position_rad = [-3.0, 3.0]
velocity_rad_s = 5.0
temperature_c = 80.0
"""
    for at in range(MOTORS)
)


def _source(path: Path, kafka: list[str] | None = None) -> Open:
    return lambda topic: open_source(path, [topic], "beginning", kafka=kafka)


def _look(source: Open) -> dict[str, tuple[int, str]]:
    """{motor: how many samples, SHA-256 of all their bytes in order}. Raises RigError for a hole."""

    async def look() -> dict[str, tuple[int, str]]:
        counts: dict[str, int] = {}
        hashes: dict[str, Any] = {}
        async with source("telemetry") as log:
            async for part in log:
                if isinstance(part, Missed):
                    raise RigError(str(part))
                assert isinstance(part, Samples)
                counts[part.motor] = counts.get(part.motor, 0) + len(part.records)
                hashes.setdefault(part.motor, hashlib.sha256()).update(part.records.tobytes())
        return {motor: (counts[motor], hashes[motor].hexdigest()) for motor in sorted(counts)}

    return asyncio.run(look())


def _record_and_kill(journal: Path, directory: Path, whole_bytes: int) -> int:
    """Record as a user does, SIGKILL that a few times as it grows, and let the last one end; how often it was hit."""
    command = [str(Path(sys.executable).with_name("servo-gateway")), "record", str(journal), "--out", str(directory)]
    command += ["--topic", "telemetry", "--no-follow"]
    chance, hit = random.Random(1), 0
    for number in range(KILLS):
        enough = whole_bytes * (number + chance.random()) / (KILLS + 1)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and sum(path.stat().st_size for path in directory.glob("*.mcap")) < enough:
            sleep_until(after(monotonic_ns(), MS))
        process.kill()
        hit += process.wait() == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RigError(f"record: {done.stderr}")
    return hit


def _record(source: Open, directory: Path) -> None:
    with Recorder(directory, rotate_bytes=ROTATE_BYTES) as recorder:
        asyncio.run(recorder.record(lambda _: source("telemetry"), "beginning"))


def _play(source: Open, target: OpenTarget) -> None:
    asyncio.run(replay(source, target, Pace(None), Played()))


class _Watch(Target):
    """Takes a replay and notes when."""

    def __init__(self) -> None:
        self.off_ns: dict[str, list[NDArray[np.int64]]] = {}

    def tail(self, key: Key) -> Tail | None:  # noqa: ARG002
        return None

    async def write(self, runs: Sequence[Run]) -> None:
        now = monotonic_ns()
        for part in (run.part for run in runs):
            assert isinstance(part, Samples)
            self.off_ns.setdefault(part.motor, []).append(now - part.records["sampled_at_ns"])


def _time(source: Open, seconds: float) -> NDArray[np.float64]:
    """How far samples of a replay at 1x are off their time, ms: against the median of their motor."""
    watch = _Watch()

    @asynccontextmanager
    async def target(arm: str, keys: Collection[Key]) -> AsyncIterator[Target]:  # noqa: ARG001
        yield watch

    async def play() -> None:
        async with source("telemetry") as log:
            first_ns = int((await anext(aiter(log))).records["sampled_at_ns"][0])  # type: ignore[union-attr]
        await replay(source, target, Pace(1.0), Played(), until_ns=first_ns + round(seconds * SECOND))

    asyncio.run(play())
    motors = [np.concatenate(off_ns) for off_ns in watch.off_ns.values()]
    return np.concatenate([np.abs(off_ns - np.median(off_ns)) for off_ns in motors]) / MS


def _tell(
    console: Console,
    found: dict[str, dict[str, tuple[int, str]]],
    records: int,
    kills: int,
    errors_ms: NDArray[np.float64],
) -> dict[str, Any]:
    first = found["journal"]
    same = {place: looked == first for place, looked in found.items()}
    off = {name: float(np.percentile(errors_ms, at)) for name, at in {"p50": 50, "p99": 99, "p99.9": 99.9}.items()}
    show(
        console,
        f"round trip: {records:,} samples of {MOTORS} motors, {records / MOTORS / RATE_HZ / 60:g} minutes",
        ("", "samples", "SHA-256 of joint1", "as the journal"),
        [
            (
                place,
                sum(count for count, _ in looked.values()),
                looked["joint1"][1][:16],
                "same" if same[place] else "NOT",
            )
            for place, looked in found.items()
        ],
        "A replay at 1x hands samples over off their time by "
        + ", ".join(f"{name} {ms:.2f} ms" for name, ms in off.items())
        + f" ({len(errors_ms):,} samples).",
    )
    if not all(same.values()):
        raise RigError("the log did not come back as it was")
    return {"records": records, "kills": kills, "off_ms": off, "places": {p: dict(v) for p, v in found.items()}}
