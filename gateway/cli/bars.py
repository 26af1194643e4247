"""Progress bars on standard error, where that is a terminal: of a log that is read, and of what is played."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from drivers.clock import SECOND
from gateway.log_reader import Entries, LogReader, Missed, Samples
from gateway.span import cut

LOOK_S = 0.1


async def read(
    log: LogReader, take: Callable[[Samples | Entries], None], *, motors: Collection[str] | None, until_ns: int | None
) -> None:
    """Give ``take`` every part of a span of ``log`` (entered), and tell what is missed."""
    whole = log.left()
    records = 0
    with _bar("{task.fields[records]:,} records, {task.fields[rate]:,.0f}/s, up to {task.fields[upto]}") as progress:
        task = progress.add_task("", total=whole, records=0, rate=0.0, upto="")
        async for part in cut(log, motors=motors, until_ns=until_ns):
            if isinstance(part, Missed):
                print(part, file=sys.stderr)
                continue
            take(part)
            of = part.records["sampled_at_ns"] if isinstance(part, Samples) else [e.at_ns for e in part.entries]
            records += len(of)
            progress.update(
                task,
                completed=(whole or 0) - (log.left() or 0),
                records=records,
                rate=records / (progress.tasks[0].elapsed or 1),
                upto=moment(int(of[-1])),
            )


@contextlib.asynccontextmanager
async def drawn(look: Callable[[], Mapping[str, Any]]) -> AsyncIterator[None]:
    """Meanwhile draw what ``look`` tells: total, completed, description."""
    with _bar("{task.description}") as progress:
        task = progress.add_task("", total=None)

        async def draw() -> None:
            while True:
                progress.update(task, **look())
                await asyncio.sleep(LOOK_S)

        drawing = asyncio.create_task(draw())
        try:
            yield
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)


def moment(at_ns: int) -> str:
    """A time as it stands in a bar."""
    return f"{datetime.fromtimestamp(at_ns // SECOND, UTC):%F %T}"


def _bar(words: str) -> Progress:
    console = Console(stderr=True)
    return Progress(
        BarColumn(), TaskProgressColumn(), TextColumn(words), console=console, disable=not console.is_terminal,
        transient=True,
    )  # fmt: skip
