"""What a person sees while the gateway runs: a live table on a terminal, log lines elsewhere."""

import asyncio
import logging
import math

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from gateway.board import Board, MotorView
from gateway.events import ARM

log = logging.getLogger(__name__)

FRAMES_PER_S = 5
LINES_EVERY_S = 10


async def table(board: Board, console: Console) -> None:
    """Draw the board several times a second until cancelled. Log lines go above the table."""
    with Live(_render(board), console=console, auto_refresh=False, transient=False) as live:
        try:
            while True:
                await asyncio.sleep(1 / FRAMES_PER_S)
                live.update(_render(board), refresh=True)
        finally:
            live.update(_render(board), refresh=True)


async def lines(board: Board) -> None:
    """Log a line about the arm every ten seconds until cancelled."""
    while True:
        await asyncio.sleep(LINES_EVERY_S)
        views = board.motors.values()
        rates = ", ".join(f"{view.config.name} {view.rate_hz:.0f}" for view in views)
        lag = max(board.lag(view) for view in views)
        kafka = f"; kafka {board.kafka}, lag {lag}" if board.kafka != "not used" else ""
        log.info("samples/s: %s; missed %d%s", rates, sum(view.misses for view in views), kafka)


def configure_logging(console: Console, *, verbose: bool) -> None:
    """Configure logging for the command line: rich lines on a terminal, plain ones elsewhere."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="[%X]")
        form = "%(message)s"
    else:
        handler = logging.StreamHandler(console.file)
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format=form, handlers=[handler], force=True)
    quieten_libraries(logging.WARNING if verbose else logging.CRITICAL)


def quieten_libraries(level: int) -> None:
    """aiokafka's retries while a broker is away come to a hundred lines a second; we tell what matters ourselves."""
    for name in ("aiokafka", "can"):
        logging.getLogger(name).setLevel(level)


def _render(board: Board) -> Group:
    table = Table(title=f"arm {board.arm}", title_justify="left", expand=False)
    table.add_column("motor")
    table.add_column("state")
    for header in ("position rad", "speed rad/s", "temp C", "rate Hz", "age ms", "misses", "lag"):
        table.add_column(header, justify="right")
    for _, view in sorted(board.motors.items()):
        table.add_row(*_row(board, view))
    return Group(table, *_footer(board))


def _row(board: Board, view: MotorView) -> list[Text]:
    state, style = ("late", "yellow") if view.late else ("online", "green") if view.online else ("offline", "bold red")
    if view.fault:
        state, style = f"{state}, fault", "bold red"
    stale = "" if view.online else "dim"  # the last that was heard, not the present
    age_ms = board.age_ms(view)
    return [
        Text(view.config.name),
        Text(state, style),
        Text(_number(view.position_rad, 3), stale),
        Text(_number(view.velocity_rad_s, 2), stale),
        Text(_number(view.temperature_c, 0), "bold red" if view.hot else stale),
        Text(_number(view.rate_hz, 0)),
        Text(_number(age_ms, 0), "yellow" if age_ms > 1000 else ""),
        Text(str(view.misses), "yellow" if view.misses else ""),
        Text(str(board.lag(view)) if board.kafka != "not used" else "-"),
    ]


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _footer(board: Board) -> list[Text]:
    footer = [
        Text(f"{'EMERGENCY STOP' if name == ARM else f'{name} stopped'}: {latch.why}", "bold red")
        for name, latch in board.latches.items()
    ]
    footer += [
        Text(f"{view.config.name} fault: {view.fault}", "bold red" if view.online else "dim")
        for _, view in sorted(board.motors.items())
        if view.fault
    ]
    footer += [
        Text(f"bus {bus.name}: {bus.detail}", "bold red" if bus.worker_starts else "dim")
        for bus in board.buses.values()
        if not bus.up
    ]
    footer.append(
        Text(f"journal {board.journal} {board.journal_detail}", "bold red" if board.journal_detail else "dim")
    )
    if board.motion:
        footer.append(Text(f"recording {board.motion}"))
    if board.kafka != "not used":
        style = "green" if board.kafka == "up" else "bold red"
        footer.append(Text(f"kafka {board.kafka} {board.kafka_detail}", style))
    footer.append(Text("Ctrl-C stops", "dim"))
    return footer
