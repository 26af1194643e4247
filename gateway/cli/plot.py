"""``servo-gateway plot``: a span of the log as a picture, or in the terminal."""

import asyncio
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
    plain_console,
)
from gateway.events import ARM
from gateway.log_reader import Seq, Start, Time, Topic
from gateway.recordings import plot as plotting
from gateway.source import open_source


def plot(
    source: SourceArgument,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The picture to write, .png or .svg; none: in the terminal.")
    ] = None,
    motor: MotorsOption = None,
    start: FromOption = "beginning",
    end: ToOption = None,
    kafka: KafkaOption = None,
    from_kafka: FromKafkaOption = False,
) -> None:
    """Draw position, speed, temperature, lateness and events of a span; a picture needs the extra `plot`."""
    if out:
        plotting.check_picture(out)  # before a long read
    at = brokers(kafka, from_kafka=from_kafka)
    survey = asyncio.run(_survey(source, parse_start(start), parse_end(end), motor, at))
    if out:
        plotting.picture(survey, out)
        return
    for line in plotting.sparklines(survey, plain_console().width):
        print(line)


async def _survey(
    source: Path, start: Start, until_ns: int | None, motors: list[str] | None, kafka: list[str] | None
) -> plotting.Survey:
    survey = plotting.Survey()

    async def look(topic: Topic, names: list[str] | None, start: Start) -> None:
        async with open_source(source, [topic], start, kafka=kafka) as log:
            survey.arm = log.arm
            await bars.read(log, survey.add, motors=names, until_ns=until_ns)

    await look("telemetry", motors, start)
    if isinstance(start, Seq):  # events have numbers of their own
        start = Time(survey.span_ns()[0])
    await look("events", motors and [*motors, ARM], start)
    return survey
