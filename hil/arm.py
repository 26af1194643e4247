"""A gateway with a simulated arm, run as a user runs it: a process with a configuration and a state directory.

For system tests and trials. It ends with the process that started it, also when that is killed.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drivers.clock import SECOND, after, epoch_ns, left_s, monotonic_ns, sleep_until
from hil.guard import guard
from hil.logs import Damage, JournalFile

SAMPLE_CONFIG = Path(__file__).parent.parent / "config" / "simulated-arm.toml"
MARK = "SERVO_GATEWAY_RIG"  # in the environment of every process of an arm, so that none is overlooked
MOTORS = tuple(f"joint{number}" for number in range(1, 7))  # of the sample
COMMAND = (sys.executable, "-m", "gateway.cli.main")
POLL_S = 0.02
CALM_HZ = 50
CALM_OFFLINE_MS = 3000


class ArmError(Exception):
    """The gateway did not do what the rig waits for; the message holds its last log lines."""


class Arm:
    """One arm's gateway. It may be stopped, killed and started again, always on the same state, until ``close``."""

    def __init__(
        self,
        name: str,
        directory: Path,
        bootstrap: str | None = None,
        *,
        encoding: str = "protobuf",
        motion: str = "wave",
        sample: Path = SAMPLE_CONFIG,
        calm: bool = False,
        more: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``directory`` is the arm's own. Without ``bootstrap`` it has no Kafka. Nothing is started yet.

        ``sample`` is the configuration of a simulated arm, of which it runs a copy, with ``more`` tables behind it. A
        ``calm`` one leaves room for others on the machine: it polls slowly, and takes no motor for offline that a
        busy processor kept from answering. ``environment`` is added to that of its processes.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.directory = directory
        self.bootstrap = bootstrap
        self.state = directory / "state"
        self.faults = directory / "faults.toml"
        self.config = directory / "arm.toml"
        self.config.write_text(_config(sample, name, bootstrap, encoding, motion, calm=calm) + more)
        tables = tomllib.loads(self.config.read_text())
        configured = tables["motor"]
        self.can_buses = {bus["name"] for bus in tables["bus"] if bus["type"] == "can"}
        self.motors = {motor["name"]: motor["bus"] for motor in sorted(configured, key=lambda m: m["partition"])}
        self.families = {motor["name"]: motor["protocol"] for motor in configured}
        self._mark = secrets.token_hex(8)
        self._more_environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    # -- its process ---------------------------------------------------------------------------------------------

    def start(self, *, online: bool = True) -> None:
        """Start ``run CONFIG``; return when all motors are online, or at once."""
        if self.running:
            raise ArmError(f"arm {self.name} runs already, process {self.pid}")
        started_at = epoch_ns()
        with (self.directory / "gateway.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*COMMAND, "run", str(self.config)],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a terminal is for the owner
            )
        former, self._guard = self._guard, guard(self._process, self.directory)
        _end(former)
        if online:
            self.wait(
                lambda: self._status_since(started_at, lambda s: all(m["state"] == "online" for m in s["motors"])),
                "all motors online",
            )

    def stop(self, number: signal.Signals = signal.SIGTERM, *, within_s: float = 30) -> tuple[int, float]:
        """Ask it to end; its exit status, and how many seconds that took."""
        process, began = self._running(), monotonic_ns()
        process.send_signal(number)
        try:
            status = process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise ArmError(f"arm {self.name} runs on {within_s} s after {number.name}:\n{self.log_tail}") from None
        return status, (monotonic_ns() - began) / SECOND

    def ask_to_stop(self) -> None:
        """SIGTERM, and do not wait."""
        self._running().terminate()

    def kill(self) -> None:
        """End it at once (SIGKILL); its children find out by themselves."""
        _end(self._process)

    def close(self) -> list[str]:
        """Kill it. What of it still runs ten seconds later is killed too, and returned."""
        self.kill()
        deadline = after(monotonic_ns(), 10 * SECOND)
        while self.processes() and left_s(deadline):
            sleep_until(after(monotonic_ns(), int(POLL_S * SECOND)))
        left = self.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        _end(self._guard)
        return [f"{pid}: {command}" for pid, command in left.items()]

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the gateway's process."""
        return self._running().pid

    @property
    def environment(self) -> dict[str, str]:
        """For any command about this arm."""
        return {**os.environ, **self._more_environment, MARK: self._mark}

    def processes(self) -> dict[int, str]:
        """{pid: command line} of the gateway and all its children that live, however they are related by now."""
        mark = f"{MARK}={self._mark}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                try:
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:  # it ended meanwhile, or is another user's
                    continue
        return {pid: command for pid, command in found.items() if "guard.py" not in command}

    def worker_of(self, serial_bus: str, links: Path | None = None) -> int:
        """Process id of the worker that has this simulated serial bus open, at its own links or at others."""
        terminal = str(((links or self.state / "sim") / serial_bus).readlink())
        for pid, command in self.processes().items():
            if "gateway.worker" in command and terminal in _open_files(pid):
                return pid
        raise ArmError(f"arm {self.name}: no worker has {serial_bus} open:\n{self.log_tail}")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise ArmError(f"arm {self.name} is not running:\n{self.log_tail}")
        return self._process

    # -- commands about it ---------------------------------------------------------------------------------------

    def cli(self, *arguments: str, within_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run ``servo-gateway`` to its end."""
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )

    def order(self, motor: str, kind: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``servo-gateway command ... --wait``."""
        return self.cli("command", str(self.config), motor, kind, *arguments, "--wait")

    def silence(self, *motors: str) -> None:
        """Let exactly these simulated motors answer nothing from now on."""
        self.play(dict.fromkeys(motors, "silent = true"))

    def play(self, faults: Mapping[str, str]) -> None:
        """From now on exactly these faults: {motor or bus: a line of TOML}."""
        fresh = self.faults.with_suffix(".new")
        fresh.write_text("".join(f"[{name}]\n{line}\n" for name, line in faults.items()))
        fresh.replace(self.faults)

    # -- what it says --------------------------------------------------------------------------------------------

    @property
    def log_tail(self) -> str:
        """The last of its log."""
        path = self.directory / "gateway.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(lines[-20:])

    def status(self) -> dict[str, Any]:
        """Its status file."""
        status: dict[str, Any] = json.loads((self.state / "status.json").read_bytes())
        return status

    def wait_status(self, holds: Callable[[dict[str, Any]], bool], what: str) -> None:
        """Return when a status that it wrote from now on satisfies ``holds``."""
        now = epoch_ns()
        self.wait(lambda: self._status_since(now, holds), what)

    def wait_caught_up(self) -> None:
        """Return when the broker has nearly all that the journal has."""
        self.wait_status(
            lambda s: s["kafka"]["state"] == "up" and all(motor["lag"] < 100 for motor in s["motors"]), "caught up"
        )

    def _status_since(self, since_ns: int, holds: Callable[[dict[str, Any]], bool]) -> bool:
        try:
            status = self.status()
        except FileNotFoundError:
            return False
        return status["at_ns"] > since_ns and holds(status)

    def wait(self, holds: Callable[[], bool], what: str, *, within_s: float = 60, every_s: float = POLL_S) -> None:
        """Return when ``holds()``, asked every so often; raises ArmError if the gateway ends or it takes too long."""
        deadline = after(monotonic_ns(), int(within_s * SECOND))
        while not holds():
            self._running()
            if not left_s(deadline):
                raise ArmError(f"arm {self.name}: not within {within_s} s: {what}\n{self.log_tail}")
            sleep_until(after(monotonic_ns(), int(every_s * SECOND)))

    def journal_ends(self) -> dict[str, int]:
        """{motor: its newest sequence number in the journal}."""
        journal = JournalFile(self.state / "journal.db")
        try:
            ends = dict.fromkeys(journal.motors.values(), 0)
            for found in journal.blocks():
                if isinstance(found, Damage):
                    raise ArmError(f"arm {self.name}: journal, row {found.from_id}: {found.why}")
                ends[found.motor] = int(found.values["seq"][-1])
        finally:
            journal.close()
        return ends


def _config(sample: Path, name: str, bootstrap: str | None, encoding: str, motion: str, *, calm: bool) -> str:
    """The sample configuration with a name, a state directory, a faults file and a broker of its own."""
    text = sample.read_text()
    keys = f'name = "{name}"\nstate_dir = "state"'
    if calm:
        text = re.sub("^rate_hz = .*$", f"rate_hz = {CALM_HZ}", text, flags=re.MULTILINE)
        keys += f"\noffline_after_ms = {CALM_OFFLINE_MS}"
    text = _replace(text, r'name = "sim-\w+"', keys)
    text = _replace(text, 'motion = "wave"', f'motion = "{motion}"\nfaults = "faults.toml"')
    if bootstrap:
        servers = json.dumps(bootstrap.split(","))
        text += f'\n[kafka]\nbootstrap_servers = {servers}\nformat = "{encoding}"\n'
    return text


def _replace(text: str, line: str, by: str) -> str:
    changed, count = re.subn(f"^{line}$", lambda _: by, text, flags=re.MULTILINE)
    if count != 1:
        raise ArmError(f"the sample configuration has {count} lines {line!r}")
    return changed


def _open_files(pid: int) -> set[str]:
    found = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            found.add(str(entry.readlink()))
    except OSError:  # the process ended, or closed one meanwhile
        pass
    return found


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.kill()
        process.wait()
