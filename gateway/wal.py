"""Who keeps a journal's WAL from being folded into its file: the processes that read an old state of it.

SQLite marks each reader's state with a shared lock on one of five bytes of the WAL index, ``-shm``
(https://sqlite.org/walformat.html, section 2.3: bytes 123 to 127, WAL_READ_LOCK). The kernel tells who holds them
(proc_locks(5)). The file itself must not be opened here: closing it would drop SQLite's own locks on it (fcntl(2)).
"""

import os
from pathlib import Path

READ_LOCKS = range(123, 128)


def wal_path(journal: Path) -> Path:
    """The write-ahead log beside a journal."""
    return journal.with_name(journal.name + "-wal")


def holders(journal: Path) -> str:
    """Other processes that read the journal now, as words to append to a message; empty if none can be seen."""
    try:
        inode = journal.with_name(journal.name + "-shm").stat().st_ino
        locks = Path("/proc/locks").read_text("ascii")
    except OSError:
        return ""
    # 1: POSIX  ADVISORY  READ 4711 fe:00:1442 124 124
    found = set()
    for line in locks.splitlines():
        words = [word for word in line.split() if word != "->"]
        if len(words) != 8 or words[5].rpartition(":")[2] != str(inode) or not words[6].isdigit():
            continue
        if int(words[6]) in READ_LOCKS and int(words[4]) not in {os.getpid(), -1}:
            found.add(int(words[4]))
    return f": {', '.join(_process(pid) for pid in sorted(found))}" if found else ""


def _process(pid: int) -> str:
    try:
        return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    except OSError:
        return f"process {pid}"
