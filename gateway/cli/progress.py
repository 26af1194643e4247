"""A line on a terminal while motors are on their way: where they are, and where they go."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gateway.log_reader import LogReader, Samples

FRAMES_PER_S = 10


@contextlib.asynccontextmanager
async def shown(telemetry: LogReader | None, goals_rad: Mapping[str, float]) -> AsyncIterator[None]:
    """Draw the line meanwhile; nothing without ``telemetry``. A log that cannot be read only ends the line."""
    if telemetry is None:
        yield
        return
    drawing = asyncio.create_task(_draw(telemetry, goals_rad))
    try:
        yield
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)


async def _draw(telemetry: LogReader, goals_rad: Mapping[str, float]) -> None:
    at_rad: dict[str, float] = {}
    with Live(console=Console(highlight=False), refresh_per_second=FRAMES_PER_S, transient=True) as live:
        async with telemetry:
            async for part in telemetry:
                if isinstance(part, Samples) and part.motor in goals_rad:
                    at_rad[part.motor] = float(part.records["position_rad"][-1])
                    live.update(Text(line(at_rad, goals_rad), overflow="ellipsis", no_wrap=True))


def line(at_rad: Mapping[str, float], goals_rad: Mapping[str, float]) -> str:
    """Of each motor that has told its position: where it is and where it goes."""
    ways = [f"{motor} {at_rad[motor]:.3f} -> {goal:.3f} rad" for motor, goal in goals_rad.items() if motor in at_rad]
    return ", ".join(ways)
