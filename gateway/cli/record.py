"""``servo-gateway record``: a log into MCAP files, as it grows; or the raw traffic of a bus."""

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from drivers.clock import SECOND, epoch_ns
from gateway.cli import live
from gateway.cli.bus import record_bus
from gateway.cli.common import (
    FromKafkaOption,
    FromOption,
    KafkaOption,
    SourceArgument,
    TopicsOption,
    brokers,
    load_config,
    parse_start,
    parse_topics,
)
from gateway.log_reader import LogReader, Start
from gateway.recordings.recorder import Recorder
from gateway.source import open_source

MINUTE = 60 * SECOND
MB = 1_000_000
TELL_S = 1.0


def record_command(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the files are; one recording a directory.")] = Path(
        "recordings"
    ),
    topic: TopicsOption = None,
    start: FromOption = "beginning",
    follow: Annotated[bool, typer.Option(help="Wait for more at the end of the log.")] = True,
    rotate_mb: Annotated[int, typer.Option(min=1, help="Begin another file when one has so many megabytes.")] = 250,
    rotate_min: Annotated[
        float | None, typer.Option(min=0.01, help="Begin another file when one spans so many minutes.")
    ] = None,
    kafka: KafkaOption = None,
    from_kafka: FromKafkaOption = False,
    bus: Annotated[
        str | None,
        typer.Option(
            "--bus", metavar="NAME", help="The raw traffic of this bus, in place of the log; --out may be a file."
        ),
    ] = None,
) -> None:
    """Record a log into MCAP files (Foxglove, PlotJuggler), until Ctrl-C or SIGTERM.

    What is in DIR already is gone on with, without gap or repeat, wherever --from points.
    """
    if bus is not None:
        record_bus(load_config(source), bus, out)
        return
    topics = parse_topics(topic) if topic else None
    begin, at = parse_start(start), brokers(kafka, from_kafka=from_kafka)
    console = Console(stderr=True, highlight=False, markup=False)
    live.configure_logging(console, verbose=False)

    def open_log(start: Start) -> LogReader:
        return open_source(source, topics, start, follow=follow, kafka=at)

    rotate_ns = None if rotate_min is None else round(rotate_min * MINUTE)
    with Recorder(out, rotate_bytes=rotate_mb * MB, rotate_ns=rotate_ns) as recorder:
        try:
            asyncio.run(_record(recorder, open_log, begin, console))
        finally:
            if recorder.records:
                print(_told(recorder), file=sys.stderr)


async def _record(recorder: Recorder, open_log: Callable[[Start], LogReader], start: Start, console: Console) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, recorder.stop)
    telling = asyncio.create_task(_tell(recorder, console))
    try:
        await recorder.record(open_log, start)
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def _tell(recorder: Recorder, console: Console) -> None:
    """Every second what was written, on a terminal."""
    if not console.is_terminal:
        return
    with console.status("") as status:
        while True:
            before = recorder.records
            await asyncio.sleep(TELL_S)
            behind_s = (epoch_ns() - recorder.newest_ns) / SECOND
            status.update(
                f"{_told(recorder)}; {(recorder.records - before) / TELL_S:,.0f}/s"
                + (f", newest {behind_s:.1f} s ago" if recorder.records else "")
            )


def _told(recorder: Recorder) -> str:
    return f"{recorder.directory}: {recorder.records:,} records, {recorder.bytes / MB:,.1f} MB"
