"""What the faults are done to: one gateway with all that it stands on.

It is started again whenever it ends, as a service manager does. Its state lies on a small disk of its own (a tmpfs,
where this process may mount one), from which journals that were set aside are moved away, as whoever looks after the
machine does: the gateway never deletes one. Its wall clock is libfaketime's (where that is installed), and it reaches
the brokers through proxies.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from drivers.clock import SECOND, after, epoch_ns, left_s, monotonic_ns, sleep_until
from hil.arm import Arm, ArmError
from hil.cluster import Cluster
from hil.contract import read_sample
from hil.judge import Block, JudgeError, judge_journal, read
from hil.torture.follower import Follower

SCRATCH = "SERVO_GATEWAY_TORTURE_SCRATCH"  # in the environment inside: the directory for everything
MOUNTS = "SERVO_GATEWAY_TORTURE_MOUNTS"  # and whether it may mount there
DISK_MB = 128
JOURNAL_MB = 24
RATE_HZ = 200.0  # of the sample configuration's buses
RESTART_S = 0.3
LIVE_WITHIN_S = 60.0
MEMORY_EVERY_S = 2.0
STARTED_S = 3
STOPS = 3
SEEN_WITHIN_S = 1.5
FAKED_ALONE = """# Python runs this first.
import os, select, time
os.environ.pop("LD_PRELOAD", None)  # of children
time.sleep = lambda seconds: select.select([], [], [], seconds) and None  # libfaketime 0.9.10 refuses Python's own
"""
MORE = f"\n[journal]\nmax_mb = {JOURNAL_MB}\n"


def faketime() -> Path | None:
    """The library that fakes the clock, where the distribution puts it; None if it is not installed."""
    places = ("lib/*/faketime", "lib/faketime", "lib64/faketime", "local/lib/faketime")
    return next((path for place in places for path in Path("/usr").glob(f"{place}/libfaketimeMT.so.1")), None)


def may_mount() -> bool:
    """Whether this process has a mount namespace of its own, in which it may mount: ``__main__`` makes one."""
    return MOUNTS in os.environ


def aside(directory: Path) -> list[Path]:
    """The journals in a directory that were set aside, oldest first."""
    numbers = {int(path.suffix.removeprefix(".aside-")): path for path in directory.glob("journal.aside-*[0-9]")}
    return [numbers[number] for number in sorted(numbers)]


class Kept:
    """Records as some log held them: when each was sampled, by stream, motor and sequence number."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, str], list[NDArray[np.int64]]] = {}

    def take(self, block: Block) -> None:
        """Remember a block."""
        for stream in np.unique(block.values["stream"]).tolist():
            mine = block.values[block.values["stream"] == stream]
            pair = np.stack([mine["seq"].astype(np.int64), mine["sampled_at_ns"].astype(np.int64)])
            self._blocks.setdefault((stream, block.motor), []).append(pair)

    def records(self) -> dict[tuple[int, str], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """{(stream, motor): (ascending sequence numbers, their times)}; the first of several with the same number."""
        found = {}
        for key, blocks in self._blocks.items():
            seqs, times = np.concatenate(blocks, axis=1)
            seqs, first = np.unique(seqs, return_index=True)
            found[key] = seqs, times[first]
        return found


@dataclass(slots=True)
class Life:
    """One run of the gateway: its memory (PSS, MB) at monotonic times, ns, once it has started up."""

    began_ns: int
    memory: list[tuple[int, float]] = field(default_factory=list)


class Rig:
    """One arm on a cluster, from ``with`` to its end."""

    def __init__(self, name: str, scratch: Path, cluster: Cluster, seed: str, *, clock: bool) -> None:
        """``clock``: whether its wall clock can be set."""
        self.cluster = cluster
        self.began_ns = monotonic_ns()
        self._clock_file = scratch / f"{name}.clock"
        self._offset_ns = 0
        library = faketime() if clock else None
        self.arm = Arm(
            name, scratch / name, cluster.proxied, more=MORE, environment=self._faked(library) if library else {}
        )
        partitions = {motor: number for number, motor in enumerate(self.arm.motors)}
        self.follower = Follower(cluster.bootstrap, name, partitions, RATE_HZ, self.wall_ns, seed)
        self.silent: set[str] = set()
        self.process = threading.RLock()  # held while its process is not to be started
        self.way = threading.RLock()  # held by what disturbs the way to the brokers, or the brokers
        self.lives: list[Life] = []
        self.ended: list[str] = []  # lives that ended by themselves, and the last they said
        self.kept = Kept()
        self.archive = scratch / f"{name}.aside"
        self.left_at_stop = 0  # records that a stop in order left to the next start
        self.flipped = False  # bits of the journal were changed
        self.read_only = False  # the state directory is: a gateway that is started now has to refuse, and end
        self._lives_read_only = False
        self._killed = True
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def _faked(self, library: Path) -> dict[str, str]:
        """For the gateway's process alone: with the library a worker's waits are late, and it needs no wall clock."""
        self._write_clock(0)
        once = self._clock_file.with_suffix(".python")
        once.mkdir()
        (once / "sitecustomize.py").write_text(FAKED_ALONE)
        return {
            "LD_PRELOAD": str(library),
            "PYTHONPATH": os.pathsep.join([str(once), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "FAKETIME_TIMESTAMP_FILE": str(self._clock_file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def __enter__(self) -> Self:
        try:
            self.archive.mkdir()
            if may_mount():
                self.arm.state.mkdir()
                mount("-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self.arm.state))
            self._start()
            self._keeper.start()
            self.arm.wait_status(lambda status: status["kafka"]["state"] == "up", "connected to the brokers")
            self.follower.start()
            if not self.wait_live():
                raise ArmError(f"arm {self.arm.name}: its topic does not follow at the start:\n{self.arm.log_tail}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the gateway ---------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Start it whenever it is not running, and look at its memory."""
        look_at = monotonic_ns()
        while not self._stopping.wait(RESTART_S):
            with self.process, contextlib.suppress(ArmError):
                if not self.arm.running and not self._stopping.is_set():
                    if not (self._killed or self._lives_read_only):
                        self.ended.append(self.arm.log_tail)
                    self._start()
            with contextlib.suppress(OSError, ValueError):  # read-only, or no status: the next time
                self._archive()
            now = monotonic_ns()
            if now >= look_at and now - self.lives[-1].began_ns > STARTED_S * SECOND:
                look_at = after(now, int(MEMORY_EVERY_S * SECOND))
                with contextlib.suppress(OSError, ArmError):
                    self.lives[-1].memory.append((now, pss_mb(self.arm.pid)))

    def _archive(self) -> None:
        """Move away what was set aside and is published, but for the last, which its successor may have to read."""
        published = self.arm.status()["journal"]["set_aside"]
        for path in [path for path in aside(self.arm.state)[:-1] if published.get(path.name)]:
            for part in (path.with_name(path.name + suffix) for suffix in ("-shm", "-wal", "")):
                if part.exists():
                    shutil.move(part, self.archive / part.name)

    def _start(self) -> None:
        self._killed, self._lives_read_only = False, self.read_only
        self.arm.start(online=False)
        self.lives.append(Life(monotonic_ns()))

    def kill(self) -> None:
        """SIGKILL; it comes back by itself unless ``process`` is held."""
        with self.process:
            self._killed = True
            self.arm.kill()

    def wait_ended(self) -> None:
        """Return when no process of it is left. Raises ArmError."""
        deadline = after(monotonic_ns(), 10 * SECOND)
        while left := self.arm.processes():
            if not left_s(deadline):
                raise ArmError(f"arm {self.arm.name}: outlive the gateway by 10 s: {left}")
            self.wait(0.05)

    def keep_for_the_account(self) -> None:
        """Remember what the journal holds, before it is damaged."""
        with contextlib.suppress(JudgeError):
            judge_journal(self.arm.state / "journal.db", watch_block=self.kept.take)

    def wait_live(self) -> int | None:
        """Return when the topic follows live, with how many nanoseconds that took; None if it never did."""
        began = monotonic_ns()
        deadline = after(began, int(LIVE_WITHIN_S * SECOND))
        while self.follower.not_live(began, self.silent):
            if not left_s(deadline):
                return None
            self.wait(0.05)
        return monotonic_ns() - began

    def why_not_live(self) -> str:
        """What is known of it when the topic does not follow."""
        behind = ", ".join(self.follower.not_live(0, self.silent))
        try:
            status = self.arm.status()
            told = f"kafka {status['kafka']}, lag {[motor['lag'] for motor in status['motors']]}"
        except (OSError, ValueError) as error:
            told = f"no status: {error}"
        return f"not live: {behind}; the gateway {'runs' if self.arm.running else 'does not run'}, {told}"

    def finish(self) -> list[str]:
        """Heal, let everything reach the topic, and stop in order; what went wrong with that."""
        self.follower.no_more_commands()
        self.play({})
        self.silent.clear()
        wrong = []
        if self.wait_live() is None:
            wrong.append(f"the topic does not follow {LIVE_WITHIN_S:g} s after the last fault:\n{self.arm.log_tail}")
        self.wait(1.5)  # longer than a command is good for
        with self.process:
            self._stopping.set()
            self._killed = True
            try:
                wrong += self._stop_in_order()
            except ArmError as error:
                wrong.append(str(error))
        return wrong

    def _stop_in_order(self) -> list[str]:
        """A stop may leave records to the next start, since it takes a few seconds at most; then that is needed."""
        for _ in range(STOPS):
            status, _ = self.arm.stop()
            if status:
                return [f"the gateway stopped with status {status}:\n{self.arm.log_tail}"]
            deadline = after(monotonic_ns(), int(SEEN_WITHIN_S * SECOND))
            while (left := self._unpublished()) and left_s(deadline):
                self.wait(0.1)
            if not left:
                return []
            self.left_at_stop += left
            self._start()
            self.wait_live()
        return [f"{left} records were not published after {STOPS} starts and stops"]

    def _unpublished(self) -> int:
        """Records of the journal that the follower has not seen."""
        ends: dict[str, int] = {}
        judge_journal(
            self.arm.state / "journal.db", watch_block=lambda b: ends.update({b.motor: int(b.values["seq"][-1])})
        )
        return sum(max(0, end - self.follower.seq(motor)) for motor, end in ends.items())

    def keep(self, directory: Path) -> None:
        """Copy what the gateway left there: its directory, what was moved away, its topics, the commands it got."""
        mine = directory / self.arm.name
        shutil.copytree(self.arm.directory, mine, dirs_exist_ok=True, ignore=shutil.ignore_patterns("sim", "ballast"))
        shutil.copytree(self.archive, mine / "archive", dirs_exist_ok=True)
        (mine / "issued").write_text("\n".join(self.follower.issued))
        for topic in ("telemetry", "events", "outcomes", "commands"):
            with (mine / f"{topic}.jsonl").open("wb") as file:
                asyncio.run(_dump(self.cluster.bootstrap, f"servo.{self.arm.name}.{topic}", file))

    def close(self) -> None:
        """Kill it, and let its disk go."""
        self._stopping.set()
        if self._keeper.is_alive():
            self._keeper.join()
        self.follower.close()
        self.arm.close()
        if may_mount():
            with contextlib.suppress(OSError):
                run("umount", "--lazy", str(self.arm.state))

    # -- what surrounds it ---------------------------------------------------------------------------------------

    @staticmethod
    def wait(seconds: float) -> None:
        """Let time go by."""
        sleep_until(after(monotonic_ns(), int(seconds * SECOND)))

    def wall_ns(self) -> int:
        """The wall clock as the gateway sees it."""
        return epoch_ns() + self._offset_ns

    def set_clock(self, offset_ns: int) -> None:
        """Step the gateway's wall clock: so far from the true one."""
        if self._clock_file.exists():
            self._write_clock(offset_ns)
            self._offset_ns = offset_ns

    def _write_clock(self, offset_ns: int) -> None:
        fresh = self._clock_file.with_suffix(".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(f"{offset_ns / SECOND:+.3f}")
        fresh.replace(self._clock_file)

    def play(self, faults: dict[str, str]) -> None:
        """Exactly these faults of simulated motors, from now on."""
        self.arm.play(faults)

    @contextlib.contextmanager
    def brokers_away(self) -> Iterator[None]:
        """The way to the brokers is cut."""
        with self.way:
            for proxy in self.cluster.proxies.values():
                proxy.cut()
            try:
                yield
            finally:
                for proxy in self.cluster.proxies.values():
                    proxy.flow()


async def _dump(bootstrap: str, topic: str, file: BinaryIO) -> None:
    """A line for each record: partition, offset, headers, value (of telemetry: stream, seq, time)."""
    async for record in read(bootstrap, topic):
        value = record.value.decode(errors="replace")
        if topic.endswith(".telemetry"):
            sample = read_sample(record.partition, record.offset, record.key, record.value)
            value = f"{sample.stream} {sample.seq} {sample.sampled_at_ns}"
        headers = {name: text.decode() for name, text in record.headers}
        line = json.dumps([record.partition, record.offset, record.timestamp, headers, value])
        file.write(line.encode() + b"\n")


def pss_mb(pid: int) -> float:
    """Proportional set size of a process, MB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def mount(*arguments: str) -> None:
    """``mount``; raises OSError with its words."""
    run("mount", *arguments)


def run(*command: str) -> None:
    """A command of the system; raises OSError with its words."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
