"""``python -m hil.torture [--minutes M] [--seed S] [--only NAME ...] [--json FILE]``; exit status 1: it is not fine.

The rig runs in a mount namespace of its own, where it may mount the gateway's small disk without anybody else seeing
it; a process outside waits for it, and removes what it leaves.
"""

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hil.cluster import Cluster
from hil.guard import guard
from hil.torture.faults import FAULTS
from hil.torture.report import text, write_json
from hil.torture.rig import MOUNTS, SCRATCH, may_mount, mount
from hil.torture.run import Result, alone, choose, mixed


def main(arguments: Sequence[str]) -> int:
    """Inside: each fault alone, then the mix. Outside: make the inside."""
    parser = argparse.ArgumentParser(prog="python -m hil.torture", description="Every fault, alone and at random.")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the mixed run, 0: none (%(default)g)")
    parser.add_argument(
        "--times", type=int, default=3, help="how often each fault is caused alone, 0: none (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of everything that is random (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=sorted(FAULTS), help=", ".join(FAULTS))
    parser.add_argument("--nodes", type=int, default=3, help="brokers (%(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep state directories, logs and topics there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON too")
    options = parser.parse_args(arguments)
    if SCRATCH not in os.environ:
        return _outside(arguments)
    scratch = Path(os.environ[SCRATCH])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if may_mount():  # libfaketime leaves something there for every process that is killed
        mount("-t", "tmpfs", "tmpfs", "/dev/shm")
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # our own readers', while the brokers are away
    results: list[Result] = []
    missing: dict[str, str] = {}
    try:
        with Cluster(options.nodes, proxied=True) as cluster:
            missing = {fault.name: why for fault in choose(options.only) if (why := fault.missing(cluster))}
            chosen = [fault for fault in choose(options.only) if fault.name not in missing]
            for fault in chosen if options.times else ():
                _tell(f"{fault.name}, alone")
                run = alone(fault, options.times, scratch, cluster, options.seed, _tell, options.keep)
                results.append(run)
            if options.minutes:
                _tell(f"mixed, {options.minutes:g} minutes")
                run = mixed(chosen, options.minutes, scratch, cluster, options.seed, _tell, options.keep)
                results.append(run)
    finally:  # also what came before Ctrl-C
        print(text(results, missing))
        if options.json:
            write_json(options.json, options.seed, results, missing)
    return 1 if any(result.wrong for result in results) else 0


def _outside(arguments: Sequence[str]) -> int:
    """Run the rig inside, and wait for it; nothing of it outlives this process."""
    with tempfile.TemporaryDirectory(prefix="servo-gateway-torture-", ignore_cleanup_errors=True) as scratch:
        unshare = _unshare()
        environment = {**os.environ, SCRATCH: scratch} | ({MOUNTS: "yes"} if unshare else {})
        command = [*unshare, sys.executable, "-m", "hil.torture", *arguments]
        with subprocess.Popen(command, env=environment) as inside:
            watch = guard(inside, Path(scratch))
            signal.signal(signal.SIGTERM, lambda *_: inside.terminate())
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the inside, too
            try:
                return inside.wait()
            finally:
                watch.kill()
                watch.wait()


def _unshare() -> list[str]:
    """What makes a mount namespace here; empty if nothing does."""
    program = shutil.which("unshare")
    for options in (["--mount"], ["--mount", "--map-root-user"]) if program else ():
        command = [str(program), *options]
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    return []


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
