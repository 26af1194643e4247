"""Where a log is read from, by one word on the command line: an arm's configuration, a journal, or a recording.

CONFIG.toml          the arm's log: its journal, or its topics in Kafka
journal.db           that file alone; also one that was set aside
X.mcap, DIRECTORY    a recording (``gateway.recordings.recording``), or all that lie in the directory
"""

from collections.abc import Sequence
from pathlib import Path

from gateway import config as configuration
from gateway.config import Config
from gateway.journal_reader import JournalLog
from gateway.kafka_reader import KafkaLog
from gateway.log_reader import TOPICS, LogError, LogReader, Start, Topic
from gateway.recordings.reader import RecordingLog
from gateway.recordings.recording import MAGIC
from gateway.state_dir import StateDir

IN_JOURNAL: tuple[Topic, ...] = ("telemetry", "events", "outcomes")
SQLITE = b"SQLite format 3\0"
KINDS = "a configuration (.toml), a journal (journal.db), a recording (.mcap) or a directory of recordings"


def open_source(
    source: str | Path,
    topics: Sequence[Topic] | None,
    start: Start,
    *,
    follow: bool = False,
    name: str | None = None,
    kafka: Sequence[str] | None = None,
) -> LogReader:
    """A reader of ``source``, of all topics that it has if none are named.

    ``kafka``: read a configuration's topics in Kafka, at these brokers, or with none named at its own. Raises LogError
    that names the place, ConfigError.
    """
    path = Path(source)
    if path.suffix == ".toml":
        return arm_log(configuration.load(path), topics, start, follow=follow, name=name, kafka=kafka)
    if kafka is not None:
        raise LogError(f"source {source}: Kafka needs the arm's configuration (.toml)")
    try:
        begins = b"" if path.is_dir() else _first_bytes(path)
    except OSError as error:
        raise LogError(f"source {source}: {error.strerror}; must be {KINDS}") from error
    if begins.startswith(SQLITE):
        return JournalLog(path, topics or IN_JOURNAL, start, follow=follow, name=name)
    if path.is_dir() or path.suffix == ".mcap" or begins.startswith(MAGIC):
        return RecordingLog(path, topics or TOPICS, start, follow=follow, name=name)
    raise LogError(f"source {source}: is no log; must be {KINDS}")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(SQLITE))


def arm_log(
    config: Config,
    topics: Sequence[Topic] | None,
    start: Start,
    *,
    follow: bool,
    name: str | None = None,
    kafka: Sequence[str] | None = None,
) -> LogReader:
    """The log of an arm: its journal, or with ``kafka`` its topics (see ``open_source``). Raises LogError."""
    if kafka is None:
        return JournalLog(StateDir(config.arm.state_dir), topics or IN_JOURNAL, start, follow=follow, name=name)
    if kafka:
        config = configuration.with_kafka(config, list(kafka))
    if config.kafka is None:
        raise LogError(f"arm {config.arm.name} has no [kafka]; name a broker with --kafka HOST:PORT")
    return KafkaLog(config, topics or TOPICS, start, follow=follow, name=name)
