"""Leaves nothing behind when a rig's owner is killed: ``guard.py OWNER_FD CHILD_FD DIRECTORY``.

A program of its own, since SIGKILL gives the owner no time to tidy up. Once the owner is gone, it kills the child and
removes the directory. (PR_SET_PDEATHSIG fires when the *thread* that started the child ends, and removes nothing.)
"""

import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def guard(child: subprocess.Popen[bytes], directory: Path) -> subprocess.Popen[bytes]:
    """Tie ``child`` and ``directory`` to the life of this process, until the guard that is returned is killed."""
    fds = (os.pidfd_open(os.getpid()), os.pidfd_open(child.pid))  # unlike numbers, never reused
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *map(str, fds), str(directory)],
            pass_fds=fds,
            start_new_session=True,  # Ctrl-C in a terminal is for the owner
        )
    finally:
        for fd in fds:
            os.close(fd)


def main(owner_fd: int, child_fd: int, directory: Path) -> None:
    """Wait until the owner is gone, then kill and remove."""
    _wait(owner_fd)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(child_fd, signal.SIGKILL)
    _wait(child_fd)
    shutil.rmtree(directory, ignore_errors=True)


def _wait(pidfd: int) -> None:
    select.select([pidfd], [], [])  # readable when the process has ended


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
