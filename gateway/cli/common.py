"""What the commands of the command line share: options, exit statuses, and how they read and print."""

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from gateway import config as configuration
from gateway.config import Config
from gateway.log_reader import TOPICS, Seq, Start, Time, Topic
from gateway.span import ns_of

FAILED, WRONG = 1, 2
A_TIME = "2026-11-21T15:04:05Z"

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration of the arm (TOML).")]
KafkaOption = Annotated[
    list[str] | None,
    typer.Option("--kafka", metavar="HOST:PORT", help="Broker to use instead of the one configured; may be repeated."),
]
SourceArgument = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="The arm's configuration (its journal, or its topics in Kafka), a journal.db, a recording (.mcap) or a "
        "directory of recordings.",
    ),
]
FromKafkaOption = Annotated[bool, typer.Option("--from-kafka", help="Read the topics in Kafka, not the journal.")]
TopicsOption = Annotated[
    list[str] | None, typer.Option("--topic", help=f"One of {', '.join(TOPICS)}; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
FromOption = Annotated[
    str, typer.Option("--from", metavar="beginning|latest|SEQ|TIME", help="Where to begin; TIME is ISO 8601.")
]
ToOption = Annotated[str | None, typer.Option("--to", metavar="TIME", help="Only what came before; TIME is ISO 8601.")]
MotorsOption = Annotated[list[str] | None, typer.Option("--motor", help="Only this motor; may be repeated.")]


def load_config(path: Path, kafka: list[str] | None = None) -> Config:
    """The configuration, with these brokers in place of its own. Raises ConfigError."""
    config = configuration.load(path)
    return configuration.with_kafka(config, kafka) if kafka else config


def brokers(kafka: list[str] | None, *, from_kafka: bool) -> list[str] | None:
    """The brokers for ``open_source``; none named: those configured; None: the journal."""
    return kafka or [] if from_kafka or kafka else None


def parse_topics(words: list[str]) -> list[Topic]:
    """What ``--topic`` names. Raises typer.BadParameter."""
    for word in words:
        if word not in TOPICS:
            raise typer.BadParameter(f"--topic {word}: must be one of {', '.join(TOPICS)}")
    return [topic for topic in TOPICS if topic in words]


def parse_start(word: str) -> Start:
    """Where ``--from`` says to begin. Raises typer.BadParameter."""
    if word == "beginning":
        return "beginning"
    if word == "latest":
        return "end"
    if word.isdecimal() and int(word) > 0:
        return Seq(int(word))
    at_ns = epoch_ns(word)
    if at_ns is None:
        raise typer.BadParameter(
            f"--from {word}: must be beginning, latest, a sequence number from 1, or a time as {A_TIME}"
        )
    return Time(at_ns)


def parse_end(word: str | None) -> int | None:
    """Where ``--to`` says to end, in ns since 1970. Raises typer.BadParameter."""
    at_ns = None if word is None else epoch_ns(word)
    if word is not None and at_ns is None:
        raise typer.BadParameter(f"--to {word}: must be a time as {A_TIME}")
    return at_ns


def epoch_ns(word: str) -> int | None:
    """A time of the command line, in ns since 1970; None if it is none."""
    try:
        return ns_of(datetime.fromisoformat(word))
    except (ValueError, OverflowError):
        return None


def plain_console() -> Console:
    """For tables and words that are not ours."""
    # no markup: what a motor or a library says may hold brackets
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)


def to_json(value: object) -> str:
    """One line of it."""
    return msgspec.json.encode(value).decode()


def print_json(value: object) -> None:
    """Print one line of it."""
    print(to_json(value))
