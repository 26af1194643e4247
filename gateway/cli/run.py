"""A gateway in the foreground: its log or a live view, until it is stopped, or what its motors live through ends."""

import asyncio
import contextlib
import sys

from rich.console import Console

from gateway.app import Gateway, run_gateway
from gateway.cli import live
from gateway.config import Config
from gateway.recordings.motion import Motion
from gateway.source import open_source


def run_shown(config: Config, *, verbose: bool) -> None:
    """Run the arm's gateway; if its motors are to live through a recording, they begin when they are online."""
    recording = config.simulation.recording if config.simulation else None
    motion = Motion(config, open_source(recording, ["telemetry"], "beginning")) if recording else None
    run_in_motion(config, motion, verbose=verbose)


def run_in_motion(config: Config, motion: Motion | None, *, verbose: bool, until_end: bool = False) -> None:
    """As ``run_shown``, with this motion; ``until_end``: no longer than that."""
    console = Console(stderr=not sys.stdout.isatty())

    async def watch(gateway: Gateway) -> None:
        view = live.table(gateway.board, console) if console.is_terminal else live.lines(gateway.board)
        viewing = asyncio.create_task(view)
        try:
            if motion:
                await motion.play(gateway.board)
                if until_end:
                    gateway.stop()
            await viewing
        finally:
            viewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await viewing

    live.configure_logging(console, verbose=verbose)
    asyncio.run(run_gateway(config, watch, motion.prepare if motion else None))
