"""How fast a log is recorded, read, replayed and exported: telemetry of six motors, from a journal, on this disk.

Beside it, in the same runs, what others do with as many messages: a plain loop over mcap's writer and its reader
(zstd, as ours), and python-can's Logger and Player with frames of a CAN bus. Their messages lie ready in memory before
the clock starts; ours have to be read from the journal first. Every result is counted: all records, or no figure.
"""

import asyncio
import functools
import secrets
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import can
import numpy as np
from can.io.player import MessageSync
from mcap.reader import make_reader
from mcap.writer import CompressionType, Writer
from rich.console import Console

from drivers.clock import MS, SECOND
from drivers.traffic import from_message
from gateway import telemetry
from gateway.config import kafka_at
from gateway.journal import Batch, Changes, Journal
from gateway.log_reader import LogReader, Samples, Topic
from gateway.recordings import bus_file
from gateway.recordings.export import ExportFile
from gateway.recordings.into_journal import into_journal
from gateway.recordings.into_kafka import into_kafka
from gateway.recordings.pace import Pace
from gateway.recordings.recorder import Recorder
from gateway.recordings.replay import OpenTarget, Played, replay
from gateway.source import open_source
from gateway.state_dir import StateDir
from gateway.telemetry import MESSAGE_SIZE, Records
from hil.bench.report import median, show
from hil.kafka import Broker, RigError

RUNS = 3
MOTORS = 6
RATE_HZ = 200
SPEED_UP = 60  # a log of as many times the seconds that were asked for
ROW = 24  # samples in a row of the journal: what a gateway commits every few ms
ROTATE_BYTES = 1 << 30


class _Bench:
    """The log, and the same as messages and frames in memory."""

    def __init__(self, directory: Path, servers: str, seconds: float) -> None:
        self.directory = directory
        self.servers = servers
        self.journal = directory / "journal.db"
        self.records = make_records(round(seconds * SPEED_UP * RATE_HZ))
        write_journal(self.journal, self.records)
        times = self.records["sampled_at_ns"].tolist()
        motors = self.records["partition"].tolist()
        self.messages = list(zip(motors, times, telemetry.messages(self.records), strict=True))
        self.frames = [
            can.Message(timestamp=at / SECOND, arbitration_id=0x11 + motor, data=message[-8:], is_extended_id=False)
            for motor, at, message in self.messages
        ]
        self.units = [from_message(frame, at) for frame, at in zip(self.frames, times, strict=True)]


def run(console: Console, seconds: float) -> dict[str, Any]:
    """Measure and tell."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="servo-gateway-bench-") as name, Broker() as broker:
        bench = _Bench(Path(name), broker.bootstrap, seconds)
        for number in range(RUNS):
            for what, job in (SAMPLES | FRAMES).items():
                console.print(f"[dim]run {number + 1} of {RUNS}: {what}", highlight=False)
                here = bench.directory / f"run{number}"
                here.mkdir(exist_ok=True)
                began = time.monotonic()
                records = job(bench, here)
                found.setdefault(what, []).append(time.monotonic() - began)
                if records != len(bench.records):
                    raise RigError(f"{what}: {records} of {len(bench.records)} records")
    return _tell(console, found, len(bench.records))


def make_records(count: int) -> Records:
    """``count`` samples of each motor, motors by turns: a slow wave with the noise of an encoder."""
    at, motor = np.divmod(np.arange(count * MOTORS), MOTORS)
    records = telemetry.blank(len(at))
    records["partition"] = motor
    records["seq"] = at + 1
    records["sampled_at_ns"] = 1_790_000_000 * SECOND + at * (SECOND // RATE_HZ) + motor * MS
    phase = at / RATE_HZ + motor
    records["position_rad"] = np.round(np.sin(phase) * 4096) / 4096
    records["velocity_rad_s"] = np.round(np.cos(phase) * 200) / 200
    records["temperature_c"] = 30
    records["round_trip_us"] = np.random.default_rng(1).normal(300, 30, len(at))
    for name in ("voltage_v", "current_a", "torque_nm"):
        records[name] = np.nan
    return records


def write_journal(path: Path, records: Records) -> None:
    """A journal that holds ``records``, and gives them its stream."""
    with closing(Journal(path, "arm1", {n: f"joint{n + 1}" for n in range(MOTORS)}, 1 << 40)) as journal:
        records["stream"] = journal.stream
        rows = [records[first : first + ROW] for first in range(0, len(records), ROW)]
        batches = [
            Changes(batch=Batch(number, row[np.argsort(row["partition"], kind="stable")]))
            for number, row in enumerate(rows, 1)
        ]
        for first in range(0, len(batches), 1000):
            journal.commit(*batches[first : first + 1000])


# --- ours -------------------------------------------------------------------------------------------------------------


def _record(bench: _Bench, here: Path) -> int:
    with Recorder(here / "recording", rotate_bytes=ROTATE_BYTES) as recorder:
        asyncio.run(recorder.record(lambda start: open_source(bench.journal, ["telemetry"], start), "beginning"))
        return recorder.records


def _read_recording(_: _Bench, here: Path) -> int:
    return asyncio.run(_count(here / "recording"))


def _read_journal(bench: _Bench, _: Path) -> int:
    return asyncio.run(_count(bench.journal))


async def _count(source: Path) -> int:
    async with open_source(source, ["telemetry"], "beginning") as log:
        return sum([len(part.records) async for part in log if isinstance(part, Samples)])


def _replay_into_journal(_: _Bench, here: Path) -> int:
    return asyncio.run(_replay(here / "recording", into_journal(StateDir(here / "replayed"), "replayed")))


def _replay_into_kafka(bench: _Bench, here: Path) -> int:
    arm = f"bench-{secrets.token_hex(4)}"
    return asyncio.run(_replay(here / "recording", into_kafka(kafka_at([bench.servers]), arm)))


async def _replay(recording: Path, target: OpenTarget) -> int:
    played = Played()

    def source(topic: Topic) -> LogReader:
        return open_source(recording, [topic], "beginning")

    await replay(source, target, Pace(None), played)
    return played.records["telemetry"]


def _export(suffix: str, _: _Bench, here: Path) -> int:
    async def export() -> int:
        with ExportFile(here / f"log{suffix}", "telemetry") as table:
            async with open_source(here / "recording", ["telemetry"], "beginning") as log:
                async for part in log:
                    if isinstance(part, Samples):
                        table.add(part)
        return table.rows

    return asyncio.run(export())


def _write_frames(bench: _Bench, here: Path) -> int:
    writer = bus_file.Writer(here / "ours.log", "can", "can0")
    for unit in bench.units:
        writer.write(unit)
    writer.close()
    return len(bench.units)


def _read_frames(_: _Bench, here: Path) -> int:
    return sum(1 for _ in bus_file.BusFile(here / "ours.log"))


# --- others' ----------------------------------------------------------------------------------------------------------


def _mcap_writer(bench: _Bench, here: Path) -> int:
    writer = Writer(str(here / "plain.mcap"), compression=CompressionType.ZSTD)
    writer.start()
    schema = writer.register_schema("servo.Telemetry", "protobuf", b"")
    channels = [writer.register_channel(f"/joint{motor + 1}", "protobuf", schema) for motor in range(MOTORS)]
    for sequence, (motor, at_ns, message) in enumerate(bench.messages):
        writer.add_message(channels[motor], at_ns, message, at_ns, sequence)
    writer.finish()
    return len(bench.messages)


def _mcap_reader(_: _Bench, here: Path) -> int:
    with (here / "plain.mcap").open("rb") as file:
        return sum(1 for _ in make_reader(file).iter_messages())


def _can_logger(bench: _Bench, here: Path) -> int:
    with can.Logger(here / "theirs.log") as logger:
        for frame in bench.frames:
            logger(frame)
    return len(bench.frames)


def _can_player(_: _Bench, here: Path) -> int:
    with can.LogReader(here / "theirs.log") as reader:
        return sum(1 for _ in MessageSync(reader, timestamps=False, gap=0))


SAMPLES: dict[str, Callable[[_Bench, Path], int]] = {
    "record the journal (MCAP)": _record,
    "mcap: writer loop": _mcap_writer,
    "read the recording": _read_recording,
    "mcap: reader loop": _mcap_reader,
    "read the journal": _read_journal,
    "replay into a journal": _replay_into_journal,
    "replay into Kafka": _replay_into_kafka,
    "export to Parquet": functools.partial(_export, ".parquet"),
    "export to CSV": functools.partial(_export, ".csv"),
}
FRAMES: dict[str, Callable[[_Bench, Path], int]] = {
    "write raw CAN frames (candump)": _write_frames,
    "python-can: Logger (candump)": _can_logger,
    "read raw CAN frames (candump)": _read_frames,
    "python-can: Player (candump)": _can_player,
}


def _tell(console: Console, found: dict[str, list[float]], records: int) -> dict[str, Any]:
    speeds = {what: records / median(seconds) for what, seconds in found.items()}
    show(
        console,
        f"logs: {records:,} samples of {MOTORS} motors, {records / MOTORS / RATE_HZ / 60:g} minutes at {RATE_HZ} Hz",
        ("", "events/s", "MB/s", "times real time", "s, fastest", "s, slowest"),
        [
            (
                what,
                speed,
                *((speed * MESSAGE_SIZE / 1e6, speed / MOTORS / RATE_HZ) if what in SAMPLES else (None, None)),
                min(found[what]),
                max(found[what]),
            )
            for what, speed in speeds.items()
        ],
        f"Medians of {RUNS} runs. MB: the messages ({MESSAGE_SIZE} bytes each), before any compression; a CAN frame "
        "is an event. Recording into MCAP is "
        f"{speeds['record the journal (MCAP)'] / speeds['mcap: writer loop']:.1f} times as fast as mcap's writer, "
        f"reading it {speeds['read the recording'] / speeds['mcap: reader loop']:.1f} times as fast as its reader.",
    )
    return {"seconds": found, "events_per_s": speeds, "records": records, "message_bytes": MESSAGE_SIZE}
