"""How long a gateway takes from its start to new samples in its journal, with an empty journal and with a full one.

The full one has as much telemetry, events and command ids as its size allows. It is started after a clean stop and
after SIGKILL, with its file in the page cache and without. The time holds the start of Python and of the simulated
motors too: the empty journal shows how much that is.
"""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gateway import telemetry
from gateway.journal import ENTRIES_SHARE, ID_BYTES, IDS_SHARE, Batch, Changes, CommandState, Journal, StoredEntry
from hil.bench.report import median, show
from hil.kafka import RigError

SERVO_GATEWAY = Path(sys.executable).with_name("servo-gateway")
MAX_MB = 2048
FREE_MB = 3000
RUNS = 3
RUN_S = 2.0  # between the first samples of a run and its end
START_S = 60.0
BUDGET_S = 2.0
ENDS = {"stopped": signal.SIGTERM, "killed": signal.SIGKILL}
MOTORS = {partition: f"joint{partition + 1}" for partition in range(6)}
ROW = 24  # samples
EVENT = b'{"type":"motor.late","motor":"joint1","at_ns":1790000000000000000,"detail":"' + b"x" * 160 + b'"}'

ARM = """
[arm]
name = "arm1"
state_dir = "state"
[journal]
max_mb = {max_mb}
[simulation]
[[bus]]
name = "serial0"
type = "serial"
rate_hz = 100
"""
MOTOR = """
[[motor]]
name = "{name}"
partition = {partition}
bus = "serial0"
protocol = "feetech_sts"
id = {number}
position_rad = [-2.0, 2.0]
velocity_rad_s = 5.0
temperature_c = 80.0
"""


def run(console: Console, _: float) -> dict[str, Any]:
    """Measure and tell."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="servo-gateway-bench-") as name:
        directory = Path(name)
        free_mb = shutil.disk_usage(directory).free >> 20
        if free_mb < FREE_MB:
            raise RigError(f"restart needs {FREE_MB} MB in {directory.parent} (TMPDIR), where {free_mb} MB are free")
        motors = [MOTOR.format(name=name, partition=at, number=at + 1) for at, name in MOTORS.items()]
        config = directory / "arm.toml"
        config.write_text(ARM.format(max_mb=MAX_MB) + "".join(motors))
        journal = directory / "state" / "journal.db"
        for _number in range(RUNS):
            shutil.rmtree(journal.parent, ignore_errors=True)
            found.setdefault("empty", []).append(_start(config, journal, signal.SIGTERM))
        shutil.rmtree(journal.parent)
        journal.parent.mkdir()
        console.print(f"[dim]filling {MAX_MB} MB", highlight=False)
        fill(journal, MAX_MB << 20)
        size_mb = journal.stat().st_size >> 20
        for number in range(RUNS):
            for ended, how in ENDS.items():
                for cache in ("warm", "cold"):
                    console.print(f"[dim]run {number + 1} of {RUNS}: full, {ended}, {cache}", highlight=False)
                    _start(config, journal, how)
                    if cache == "cold":
                        _drop_from_cache(journal)
                    found.setdefault(f"full, {ended}, {cache}", []).append(_start(config, journal, signal.SIGTERM))
    return _tell(console, found, size_mb)


def fill(path: Path, max_bytes: int) -> None:
    """Make a journal that is as full as it gets."""
    with closing(Journal(path, "arm1", MOTORS, max_bytes)) as journal:
        entries = max_bytes // ENTRIES_SHARE // (len(EVENT) + 70)
        for first in range(1, entries + 1, 10_000):
            numbers = range(first, min(first + 10_000, entries + 1))
            journal.commit(Changes(entries=[StoredEntry(n, "events", 0, n, n, "joint1", EVENT) for n in numbers]))
        commands = max_bytes // IDS_SHARE // ID_BYTES
        for first in range(0, commands, 10_000):
            states = [CommandState(f"{n:032x}", True, n, "joint1") for n in range(first, first + 10_000)]
            journal.commit(Changes(commands=states))
        records = telemetry.blank(ROW)
        records["partition"] = np.repeat(np.arange(len(MOTORS)), ROW // len(MOTORS))
        records["stream"] = journal.stream
        records["seq"] = np.tile(np.arange(1, 1 + ROW // len(MOTORS)), len(MOTORS))
        row = 0
        while path.stat().st_size < 0.99 * max_bytes:
            batches = []
            for _ in range(1000):
                row += 1
                batches.append(Changes(batch=Batch(row, records.copy())))
                records["seq"] += ROW // len(MOTORS)
                records["sampled_at_ns"] += 1_000_000
            journal.commit(*batches)


def _start(config: Path, journal: Path, end: signal.Signals) -> float:
    """Seconds from the gateway's start to a new row of samples in the journal; the run ends with signal ``end``."""
    before = _newest(journal)
    began = time.monotonic()
    gateway = subprocess.Popen(
        [str(SERVO_GATEWAY), "run", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while _newest(journal) == before:
            if gateway.poll() is not None or time.monotonic() - began > START_S:
                raise RigError(f"the gateway wrote no samples within {START_S:g} s")
            time.sleep(0.005)
        seconds = time.monotonic() - began
        time.sleep(RUN_S)
        return seconds
    finally:
        gateway.send_signal(end)
        gateway.wait(START_S)


def _newest(journal: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True, timeout=5.0)) as db:
            return db.execute("SELECT max(id) FROM telemetry").fetchone()[0] or 0
    except sqlite3.OperationalError:  # not there yet
        return 0


def _drop_from_cache(journal: Path) -> None:
    for path in journal.parent.glob(f"{journal.name}*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _tell(console: Console, found: dict[str, list[float]], size_mb: int) -> dict[str, Any]:
    show(
        console,
        "restart: from the gateway's start to new samples in the journal, s",
        ("journal, how the run before ended, page cache", "median", "slowest"),
        [(kind, median(seconds), max(seconds)) for kind, seconds in found.items()],
        f"{RUNS} runs of each; the full journal has {size_mb:,} MB. Budget: {BUDGET_S:g} s.",
    )
    return {"runs": found, "size_mb": size_mb, "budgets": {"seconds": BUDGET_S}}
