"""``servo-gateway export``: a span of the log as a Parquet or CSV file."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli import bars
from gateway.cli.common import (
    FromKafkaOption,
    FromOption,
    KafkaOption,
    MotorsOption,
    SourceArgument,
    ToOption,
    brokers,
    parse_end,
    parse_start,
    parse_topics,
)
from gateway.log_reader import TOPICS, LogReader
from gateway.recordings.export import ExportFile
from gateway.source import open_source


def export(
    source: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .parquet or .csv.")],
    topic: Annotated[str, typer.Option(help=f"One of {', '.join(TOPICS)}.")] = "telemetry",
    motor: MotorsOption = None,
    start: FromOption = "beginning",
    end: ToOption = None,
    kafka: KafkaOption = None,
    from_kafka: FromKafkaOption = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
) -> None:
    """Write a span of the log into a table, Parquet or CSV; needs the extra `export`."""
    if out.exists() and not force:
        raise typer.BadParameter(f"{out}: exists; --force overwrites it")
    (one,) = parse_topics([topic])
    table = ExportFile(out, one)
    log = open_source(source, [one], parse_start(start), kafka=brokers(kafka, from_kafka=from_kafka))
    rows = asyncio.run(_export(log, table, motor, parse_end(end)))
    print(f"{out}: {rows:,} rows, {out.stat().st_size / 1e6:,.1f} MB", file=sys.stderr)


async def _export(log: LogReader, table: ExportFile, motors: list[str] | None, until_ns: int | None) -> int:
    async with log:
        with table:
            await bars.read(log, table.add, motors=motors, until_ns=until_ns)
    return table.rows
