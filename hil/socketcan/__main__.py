"""Run the suites where the kernel has vcan: ``python -m hil.socketcan [--on here|machine] [pytest's arguments]``.

Arguments that name no file are added to the suites; one that does takes their place.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from drivers.clock import SECOND, monotonic_ns
from hil.socketcan.machine import ENVIRONMENT, MachineError, run_in_machine

INSIDE = Path(__file__).with_name("inside")
ROOT = Path(__file__).parents[2]
LOG = ROOT / "build" / "socketcan.log"
SUITES = ("tests/socketcan", "tests/conformance/test_buses.py", "tests/unit/test_can_bus.py")
WITHIN_S = 900.0


def unshare() -> list[str]:
    """The beginning of a command that runs in a network namespace of its own, as root there."""
    return ["unshare", "--net", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def has_vcan() -> bool:
    """Whether this kernel has virtual CAN links, and lets us make one."""
    probe = [*unshare(), "ip", "link", "add", "vcan0", "type", "vcan"]
    try:
        return subprocess.run(probe, env=ENVIRONMENT, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def run_here(command: Sequence[str], tell: Callable[[str], None]) -> int:
    """Run ``command`` in a network namespace of its own; its exit status."""
    with subprocess.Popen(
        [*unshare(), *command], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tell(line.rstrip())
    return process.returncode


def main() -> int:
    """Choose where, run, and say where it was and how it went; the exit status is pytest's."""
    parser = argparse.ArgumentParser(prog="python -m hil.socketcan", description="The suites that need SocketCAN.")
    parser.add_argument("--on", choices=("here", "machine"), help="this kernel, or Debian's in QEMU (what is possible)")
    options, arguments = parser.parse_known_args()
    here = options.on == "here" or (options.on is None and has_vcan())
    where = f"this kernel ({os.uname().release})" if here else "Debian's kernel in QEMU"
    chosen = any((ROOT / argument.split("::")[0]).exists() for argument in arguments)
    command = [str(INSIDE), sys.executable, *arguments, *(() if chosen else SUITES)]
    LOG.parent.mkdir(exist_ok=True)
    began = monotonic_ns()
    with LOG.open("w") as log:

        def tell(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        tell(f"SocketCAN on {where}")
        try:
            status = run_here(command, tell) if here else run_in_machine(command, tell, within_s=WITHIN_S)
        except MachineError as error:
            tell(str(error))
            status = 1
        passed = (monotonic_ns() - began) / SECOND
        tell(f"SocketCAN on {where}: {'passed' if status == 0 else 'FAILED'} in {passed:.0f} s; log: {LOG}")
    return status


if __name__ == "__main__":
    sys.exit(main())
