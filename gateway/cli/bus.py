"""Raw bus traffic: ``servo-gateway record CONFIG --bus NAME`` and ``servo-gateway replay --bus FILE``."""

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import typer
from rich.console import Console

from drivers.clock import SECOND
from drivers.traffic import Mark
from gateway.cli import bars
from gateway.cli.common import A_TIME, epoch_ns
from gateway.config import Config
from gateway.realtime import set_realtime
from gateway.recordings.bus_file import SERIAL, BusFile, Writer
from gateway.recordings.bus_log import BusRecorder
from gateway.recordings.bus_replay import Moment, Player
from gateway.recordings.pace import Pace, controlled
from gateway.recordings.virtual_bus import NotVirtual, open_virtual
from gateway.state_dir import StateDir
from gateway.tap import Listener

REALTIME_PRIORITY = 21  # as that of simulated motors: it stands for a bus
WAYS = {"sent": int(Mark.SENT), "heard": 0}


def record_bus(config: Config, name: str, out: Path) -> None:
    """Record the traffic of a bus until Ctrl-C or SIGTERM, into ``out``, or a new file in that directory."""
    bus = next((bus for bus in config.buses if bus.name == name), None)
    if bus is None:
        raise typer.BadParameter(f"--bus {name}: there are {', '.join(bus.name for bus in config.buses)}")
    if out.is_dir() or not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
        suffix = SERIAL if bus.type == "serial" else ".log"
        out /= f"{config.arm.name}-{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}{suffix}"
    state = StateDir(config.arm.state_dir)
    state.make()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    console = Console(stderr=True, highlight=False)
    with _named(out), contextlib.ExitStack() as stack:
        listener = stack.enter_context(Listener(state.taps / name))
        writer = Writer(out, bus.type, name)
        stack.callback(writer.close)
        recorder = BusRecorder(listener, writer)
        status = stack.enter_context(console.status("")) if console.is_terminal else None

        def told() -> str:
            waits = "" if listener.workers else "; waiting for the gateway of this arm"
            return f"{out}: {recorder.written:,} units, {listener.missed:,} went past the recorder{waits}"

        recorder.run(stop, lambda: status.update(told()) if status else None)
    print(told(), file=sys.stderr)


@contextlib.contextmanager
def _named(out: Path) -> Iterator[None]:
    """Put the file's name to what the system says of a write."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{out}: {error.strerror or error}; what was written before can be read") from error


def replay_bus(
    source: Path,
    *,
    onto: str | None,
    link: Path | None,
    pace: Pace,
    start: str,
    end: str | None,
    only: str | None,
    channel: str | None,
) -> None:
    """Play a file of traffic onto a virtual bus: a pseudo-terminal, unless ``onto`` names another."""
    if only is not None and only not in WAYS:
        raise typer.BadParameter(f"--only {only}: must be sent or heard")
    if onto is not None and link is not None:
        raise typer.BadParameter("--onto and --link: a link leads to a pseudo-terminal, in place of another bus")
    file = BusFile(source, channel)
    begin = None if start == "beginning" else _moment("--from", start)
    until = None if end is None else _moment("--to", end)
    way = None if only is None else WAYS[only]
    if pace.paced:
        set_realtime(REALTIME_PRIORITY)
    try:
        bus = open_virtual(file.medium, onto, link)
    except NotVirtual as error:
        raise typer.BadParameter(f"--onto {error}") from None
    with bus:
        player = Player(file, bus, pace, start=begin, end=until, way=way)
        print(f"{source} -> {bus.where}" + ("" if bus.is_ready() else ": begins when it is opened"), file=sys.stderr)
        try:
            asyncio.run(_play(player, pace, file))
        finally:
            if player.played or not file.broken:  # else the error says it all
                _print_summary(player, file)


def _moment(option: str, word: str) -> Moment:
    """A time, or seconds from the first frame on."""
    with contextlib.suppress(ValueError, OverflowError):
        if (offset_ns := round(float(word) * SECOND)) >= 0:
            return lambda first_ns: first_ns + offset_ns
    at_ns = epoch_ns(word)
    if at_ns is None:
        raise typer.BadParameter(f"{option} {word}: must be seconds from the first frame on, or a time as {A_TIME}")
    return lambda _: at_ns


async def _play(player: Player, pace: Pace, file: BusFile) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, player.stop)
    with controlled(pace.toggle):
        async with bars.drawn(lambda: _look(player, pace, file)):
            try:
                await asyncio.to_thread(player.run)
            finally:
                player.stop()


def _print_summary(player: Player, file: BusFile) -> None:
    words = [f"{player.played:,} played"]
    if player.lost:
        words.append(f"{player.lost:,} lost: they were not taken in time")
    if player.left_out:
        words.append(f"{player.left_out:,} left out, the first: {player.first_left_out}")
    if file.broken:
        words.append(f"{file.broken:,} could not be read, the first: {file.first_broken}")
    if len(file.channels) > 1:
        words.append(f"channels {', '.join(sorted(file.channels))}: --channel chooses one")
    print("\n".join(words), file=sys.stderr)


def _look(player: Player, pace: Pace, file: BusFile) -> dict[str, object]:
    at = bars.moment(player.at_ns) if player.at_ns else ""
    words = "paused" if pace.paused else "waiting until it is opened" if player.waits else ""
    return {"total": 1.0, "completed": file.fraction, "description": f"{at} {player.played:,} {words}"}
