"""A log as the motion of simulated motors: a trace for each motor, which whoever hosts it maps into its memory.

    source --samples, by the motor's name--> <state_dir>/motion/<partition>.trace --> simulated motors --> whole gateway
                                                        playhead: one for all of them

What a trace and a playhead are, ``drivers.sim.trace`` says.
"""

import asyncio
import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from drivers.clock import MS, SECOND
from drivers.sim.trace import TRACE, Playhead
from gateway.board import Board
from gateway.config import Arm, CanBus, Config, Simulation
from gateway.log_reader import LogError, LogReader, Samples
from gateway.recordings.pace import controlled
from gateway.span import cut
from gateway.state_dir import StateDir
from gateway.telemetry import Records

log = logging.getLogger(__name__)

ONLINE_S = 10.0  # a motor that is not online by then misses the beginning
LOOK_S = 0.1
REST_NS = 100 * MS  # behind its last sample a motor stands


def as_virtual(config: Config, arm: Arm, recording: Path) -> Config:
    """The same motors as another arm, simulated behind pseudo-terminals: no bus of it leads to anything else."""
    nowhere: dict[str, Any] = {"interface": "slcan", "channel": None, "options": {}, "fd": False}
    buses = tuple(bus.model_copy(update=nowhere) if isinstance(bus, CanBus) else bus for bus in config.buses)
    simulation = (config.simulation or Simulation()).model_copy(update={"recording": recording})
    return config.model_copy(update={"arm": arm, "buses": buses, "simulation": simulation})


class Motion:
    """What the simulated motors of an arm live through."""

    def __init__(self, config: Config, source: LogReader, *, until_ns: int | None = None, speed: float = 1.0) -> None:
        """``source``: a reader of telemetry; ``speed``: recorded seconds in a second."""
        self._arm = config.arm.name
        self._partitions = {motor.name: motor.partition for motor in config.motors}
        self._directory = StateDir(config.arm.state_dir).motion
        self._source = source
        self._until_ns = until_ns
        self._speed = speed
        self._first_ns = 1 << 62
        self._newest: dict[int, NDArray[Any]] = {}  # partition -> its last row

    async def prepare(self) -> None:
        """Write the traces, before the gateway is made; the state directory must be locked.

        Raises LogError for the log of the same arm, and for one that has none of its motors.
        """
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        async with self._source as source:
            if source.arm == self._arm:
                raise LogError(
                    f"arm {self._arm!r}: is the one that was recorded; what lives it again needs another name"
                )
            with contextlib.ExitStack() as files:
                opened: dict[int, BinaryIO] = {}
                async for part in cut(source, until_ns=self._until_ns):
                    partition = self._partitions.get(part.motor) if isinstance(part, Samples) else None
                    if not isinstance(part, Samples) or partition is None:
                        continue
                    if partition not in opened:
                        path = self._directory / f"{partition}.trace"
                        opened[partition] = files.enter_context(path.open("wb"))
                        self._first_ns = min(self._first_ns, int(part.records["sampled_at_ns"][0]))
                    opened[partition].write(self._rows(partition, part.records).tobytes())
                for partition, file in opened.items():
                    file.write(self._rest(partition).tobytes())
        if not self._newest:
            raise LogError(f"arm {source.arm!r}: no samples of {', '.join(self._partitions)} in this span")
        if still := [name for name, partition in self._partitions.items() if partition not in self._newest]:
            log.warning("no samples of %s: stands still", ", ".join(still))
        Playhead.make(self._directory / "playhead", self._first_ns, self._speed)

    def _rows(self, partition: int, records: Records) -> NDArray[Any]:
        rows = np.empty(len(records), TRACE)
        for name in set(TRACE.fields or ()) - {"at_ns"}:
            rows[name] = records[name]
        rows["at_ns"] = np.maximum.accumulate(records["sampled_at_ns"])
        if partition in self._newest:
            rows["at_ns"] = np.maximum(rows["at_ns"], self._newest[partition]["at_ns"])
        self._newest[partition] = rows[-1:]
        return rows

    def _rest(self, partition: int) -> NDArray[Any]:
        """The row behind the last: it stands where it was."""
        rest = self._newest[partition].copy()
        rest["at_ns"] += REST_NS
        for name in ("velocity_rad_s", "current_a", "torque_nm"):
            rest[name] = 0.0
        return rest

    async def play(self, board: Board) -> None:
        """Begin when all motors are online, and return at the end. Space or SIGUSR1 pause meanwhile."""
        playhead = Playhead(self._directory / "playhead")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ONLINE_S):
                while not all(board.motors[partition].online for partition in self._newest):  # noqa: ASYNC110
                    await asyncio.sleep(LOOK_S)
        last_ns = max(int(row["at_ns"][0]) for row in self._newest.values())
        if playhead.stands:
            playhead.toggle()
        with controlled(playhead.toggle):
            while (now_ns := playhead.now_ns()) < last_ns:
                at_s, of_s = (now_ns - self._first_ns) / SECOND, (last_ns - self._first_ns) / SECOND
                board.motion = f"{at_s:.1f} s of {of_s:.1f} s{', paused' if playhead.stands else ''}"
                await asyncio.sleep(LOOK_S)
        board.motion = "ended"
