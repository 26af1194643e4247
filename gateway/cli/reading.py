"""A progress bar on a terminal while a log is read: how much of it, how fast, and up to which time."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from drivers.clock import SECOND
from gateway.log_reader import Entries, LogReader, Samples

_WORDS = "{task.fields[records]:,} records, {task.fields[rate]:,.0f}/s, up to {task.fields[upto]}"


@contextlib.contextmanager
def shown(log: LogReader) -> Iterator[Callable[[Samples | Entries], None]]:
    """Draw it on standard error meanwhile; to be told each part that ``log`` (entered) has handed out."""
    console = Console(stderr=True)
    whole = log.left()
    records = 0
    with Progress(
        BarColumn(), TaskProgressColumn(), TextColumn(_WORDS),
        console=console, disable=not console.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=whole, records=0, rate=0.0, upto="")

        def told(part: Samples | Entries) -> None:
            nonlocal records
            of = part.records["sampled_at_ns"] if isinstance(part, Samples) else [e.at_ns for e in part.entries]
            records += len(of)
            progress.update(
                task,
                completed=(whole or 0) - (log.left() or 0),
                records=records,
                rate=records / (progress.tasks[0].elapsed or 1),
                upto=f"{datetime.fromtimestamp(int(of[-1]) // SECOND, UTC):%F %T}",
            )

        yield told
