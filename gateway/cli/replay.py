"""``servo-gateway replay``: what a log holds, once more, into the log of another arm or as the motion of its motors."""

import asyncio
import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from gateway import config as configuration
from gateway.cli import bars
from gateway.cli.bus import replay_bus
from gateway.cli.common import (
    FromKafkaOption,
    FromOption,
    KafkaOption,
    SourceArgument,
    ToOption,
    load_config,
    parse_end,
    parse_start,
)
from gateway.cli.run import run_in_motion
from gateway.log_reader import LogReader, Start, Topic
from gateway.recordings.bus_file import READ, SERIAL
from gateway.recordings.into_journal import into_journal
from gateway.recordings.into_kafka import into_kafka
from gateway.recordings.motion import Motion, as_virtual
from gateway.recordings.pace import Pace, controlled
from gateway.recordings.replay import OpenTarget, Played, replay
from gateway.recordings.virtual_bus import CHOICES
from gateway.source import open_source
from gateway.state_dir import StateDir

Reader = Callable[[Topic], LogReader]

SLOWEST = 0.1


def replay_command(
    source: SourceArgument,
    into: Annotated[
        str | None, typer.Option("--into", metavar="ARM", help="Into the log of this arm: its journal, or its topics.")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="State directory of ARM; else where its gateway would have it.")
    ] = None,
    kafka: KafkaOption = None,
    as_motors: Annotated[
        Path | None, typer.Option(metavar="CONFIG", help="Run the gateway of CONFIG on simulated motors that move so.")
    ] = None,
    speed: Annotated[str, typer.Option(metavar="N|max", help="Times as fast as it was, from 0.1.")] = "1",
    start: FromOption = "beginning",
    end: ToOption = None,
    from_kafka: FromKafkaOption = False,
    bus: Annotated[
        bool, typer.Option("--bus", help=f"SOURCE is raw bus traffic ({', '.join(READ)}, {SERIAL}), for a virtual bus.")
    ] = False,
    link: Annotated[
        Path | None, typer.Option(metavar="PATH", help="With --bus: a link to the pseudo-terminal (serial, slcan).")
    ] = None,
    onto: Annotated[
        str | None, typer.Option(metavar="INTERFACE:CHANNEL", help=f"With --bus, in place of that: {CHOICES}.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="sent|heard", help="With --bus: only what was that.")] = None,
    channel: Annotated[str | None, typer.Option(help="With --bus: only this channel of the file.")] = None,
) -> None:
    """Replay a log into the log of another arm, original times and numbers and all; what is there already stays.

    With --as-motors the whole gateway of CONFIG runs, as ARM, on simulated motors that live through the log.

    With --bus a file of raw traffic onto a virtual bus; --from and --to may then be seconds from its first frame on.

    Space, or SIGUSR1, pauses and goes on. With --kafka into the topics of ARM there; commands are never written.
    """
    if bus:
        pace = Pace(parse_speed(speed))
        replay_bus(source, pace=pace, onto=onto, link=link, start=start, end=end, only=only, channel=channel)
        return
    if into is None:
        raise typer.BadParameter("--into ARM is missing: the name of the arm that the replay is to be")
    arm = _arm(into, state_dir)
    reader = functools.partial(_reader, source, parse_start(start), (kafka or []) if from_kafka else None)
    if as_motors:
        _run_as_motors(load_config(as_motors, kafka), arm, source, reader, parse_end(end), parse_speed(speed))
        return
    if kafka and state_dir:
        raise typer.BadParameter("--state-dir and --kafka: one of the two is where the log of ARM lies")
    target = into_kafka(_settings(source, kafka), into) if kafka else into_journal(StateDir(arm.state_dir), into)
    asyncio.run(_replay(reader, target, Pace(parse_speed(speed)), parse_end(end)))


def _arm(name: str, state_dir: Path | None) -> configuration.Arm:
    place = {"state_dir": str(state_dir)} if state_dir else {}
    try:
        return configuration.Arm.model_validate({"name": name, **place})
    except ValidationError as error:
        raise typer.BadParameter(f"--into {name}: {error.errors()[0]['msg']}") from None


def _run_as_motors(
    config: configuration.Config, arm: configuration.Arm, source: Path, reader: Reader, until_ns: int | None,
    speed: float | None,
) -> None:  # fmt: skip
    if speed is None:
        raise typer.BadParameter("--speed max: motors need a number")
    named = config.arm.model_copy(update={"name": arm.name, "state_dir": arm.state_dir})
    config = as_virtual(config, named, source)
    motion = Motion(config, reader("telemetry"), until_ns=until_ns, speed=speed)
    run_in_motion(config, motion, verbose=False, until_end=True)


def _reader(source: Path, start: Start, kafka: list[str] | None, topic: Topic) -> LogReader:
    return open_source(source, [topic], start, kafka=kafka)


def _settings(source: Path, kafka: list[str]) -> configuration.Kafka:
    """How to talk to the broker: as the source's configuration says, if it is one."""
    if source.suffix != ".toml":
        return configuration.kafka_at(kafka)
    found = configuration.with_kafka(configuration.load(source), kafka).kafka
    return found or configuration.kafka_at(kafka)


def parse_speed(word: str) -> float | None:
    """What ``--speed`` means to ``Pace``. Raises typer.BadParameter."""
    if word == "max":
        return None
    with contextlib.suppress(ValueError):
        if SLOWEST <= (speed := float(word)) < float("inf"):
            return speed
    raise typer.BadParameter(f"--speed {word}: must be a number from {SLOWEST}, or max")


async def _replay(reader: Reader, target: OpenTarget, pace: Pace, until_ns: int | None) -> None:
    played = Played()
    with controlled(pace.toggle):
        async with bars.drawn(lambda: _look(played, pace)):
            await replay(reader, target, pace, played, until_ns=until_ns, failed=_tell_failed)
    for missed in played.missed:
        print(missed, file=sys.stderr)
    print(_summary(played), file=sys.stderr)


def _tell_failed(error: Exception) -> None:
    print(f"kafka: {str(error) or type(error).__name__}; trying again", file=sys.stderr)


def _summary(played: Played) -> str:
    words = ", ".join(f"{count:,} of {topic}" for topic, count in played.records.items())
    left_out = {"commands": played.commands, "records without a number": played.unnumbered}
    words += "".join(f"; {count:,} {what} left out" for what, count in left_out.items() if count)
    return f"replayed: {words}"


def _look(played: Played, pace: Pace) -> dict[str, object]:
    at = bars.moment(played.at_ns) if played.at_ns else ""
    words = "paused" if pace.paused else f"late {played.late_ns / 1e6:.1f} ms" if pace.paced else ""
    return {"total": played.whole, "completed": played.taken, "description": f"{at} {words}"}
