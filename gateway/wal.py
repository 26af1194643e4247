"""A journal's write-ahead log (WAL): what damage cuts off from it, and who keeps it from being folded.

Each frame of it is a page, with a checksum that goes on from the frame before. SQLite takes the first frame whose
checksum is wrong for the end: a flipped bit silently takes back every commit behind it. Frames of this WAL are known by
its two salts, so those behind the damage can be told from what an earlier, longer WAL left there, and be joined again
(https://sqlite.org/fileformat2.html, section 4.1 and 4.2).

SQLite marks each reader's state with a shared lock on one of five bytes of the WAL index, ``-shm``
(https://sqlite.org/walformat.html, section 2.3: bytes 123 to 127, WAL_READ_LOCK). The kernel tells who holds them
(proc_locks(5)). The file itself must not be opened here: closing it would drop SQLite's own locks on it (fcntl(2)).
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

READ_LOCKS = range(123, 128)
_HEADER = np.dtype(
    [(name, ">u4") for name in ("magic", "version", "page_size", "number", "salt1", "salt2", "s0", "s1")]
)
_FRAME = [(name, ">u4") for name in ("page", "commit", "salt1", "salt2", "s0", "s1")]
_BIG_ENDIAN = {0x377F0682: False, 0x377F0683: True}  # of the words that are summed up, by magic
_AT_ONCE = 1024  # frames
_FIRST = 1
_MAGIC = b"SQLite format 3\0"  # its first bytes
_SIZE = slice(28, 32)  # its bytes that tell how many pages there are


def wal_path(journal: Path) -> Path:
    """The write-ahead log beside a journal."""
    return journal.with_name(journal.name + "-wal")


class _Wal(NamedTuple):
    """The frames that carry the salts of a WAL's header up to the last such one, and what is wrong with them."""

    frames: NDArray[Any]
    header: Any
    word: str  # how its words are stored
    cut: int  # how many of them SQLite takes at most
    damaged: NDArray[np.bool_]  # whose page, or sum, or the sum before it, is not what was written


def _look(path: Path, mode: Any) -> _Wal | None:
    """None if there is no WAL, or an empty one, or one whose header makes no sense."""
    if not path.exists() or path.stat().st_size <= _HEADER.itemsize:
        return None
    header = np.fromfile(path, _HEADER, 1)[0]
    page_size, big_endian = int(header["page_size"]), _BIG_ENDIAN.get(int(header["magic"]))
    if big_endian is None or page_size not in {1 << bits for bits in range(9, 17)}:
        return None
    frame = np.dtype([*_FRAME, ("data", "u1", (page_size,))])
    count = (path.stat().st_size - _HEADER.itemsize) // frame.itemsize
    if not count:
        return None
    frames: NDArray[Any] = np.memmap(path, frame, mode, _HEADER.itemsize, (count,))
    ours = np.flatnonzero((frames["salt1"] == header["salt1"]) & (frames["salt2"] == header["salt2"]))
    frames = frames[: ours[-1] + 1 if len(ours) else 0]
    word = ">u4" if big_endian else "<u4"
    sums, damaged = _sums(frames, header, word)
    good = (frames["s0"] == sums[:, 0]) & (frames["s1"] == sums[:, 1])
    good[np.setdiff1d(np.arange(len(frames)), ours)] = False
    return _Wal(frames, header, word, len(frames) if good.all() else int(np.argmin(good)), damaged)


def _sums(frames: NDArray[Any], header: Any, word: str) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """The running checksum behind each frame, of its first eight bytes and its page; and which frames are damaged.

    A step is s0 += x0 + s1; s1 += x1 + s0, modulo 2^32. All steps of a frame together are linear in what they begin
    with and in each word, so they are one product with weights that are the same for all frames.
    """
    pairs = (8 + frames.dtype["data"].itemsize) // 8
    weights = np.zeros((2 * pairs, 2), np.uint32)
    (a, b), (c, d) = (1, 0), (0, 1)  # what the steps behind this one make of s0 and s1
    for pair in reversed(range(pairs)):
        weights[2 * pair] = (a + b) % 2**32, (c + d) % 2**32
        weights[2 * pair + 1] = b, d
        a, b, c, d = ((a + b) % 2**32, (a + 2 * b) % 2**32, (c + d) % 2**32, (c + 2 * d) % 2**32)
    sums = np.zeros((len(frames), 2), np.uint32)
    s0, s1 = int(header["s0"]), int(header["s1"])
    for first in range(0, len(frames), _AT_ONCE):
        some = frames[first : first + _AT_ONCE]
        raw = np.ascontiguousarray(some).view(np.uint8).reshape(len(some), -1)
        words = np.concatenate([raw[:, :8], raw[:, 24:]], axis=1).view(word).astype(np.uint32)
        for number, (x0, x1) in enumerate((words @ weights).tolist(), start=first):
            s0, s1 = (a * s0 + b * s1 + x0) % 2**32, (c * s0 + d * s1 + x1) % 2**32
            sums[number] = s0, s1
    told = np.stack([frames["s0"], frames["s1"]], axis=1).astype(np.uint32)
    off = np.zeros_like(told)  # by how much a frame's sum would differ if it went on from the one that stands before it
    off[1:] = (told - sums)[:-1] @ np.array([[a, c], [b, d]], np.uint32)
    return sums, (sums + off != told).any(axis=1)


def commits_cut_off(journal: Path) -> int:
    """How many commits lie behind damage in the WAL, where SQLite will not find them. Raises OSError."""
    found = _look(wal_path(journal), "r")
    return int(np.count_nonzero(found.frames["commit"][found.cut + 1 :])) if found else 0


def mend(journal: Path) -> None:
    """Give damaged frames, and those behind them, checksums that are right. Nobody may use the journal. Raises OSError.

    What was damaged stays as it is, and has to be told by other means. Only the first page, without which nothing can
    be read, becomes what it was before: what changes in it are the size of the file, and what of it is free.
    """
    found = _look(wal_path(journal), "r+")
    if found and np.any(found.frames["commit"][found.cut + 1 :]):
        page = np.fromfile(journal, np.uint8, found.frames.dtype["data"].itemsize)
        for number in np.flatnonzero(found.frames["page"] == _FIRST):
            if not found.damaged[number]:
                page = found.frames["data"][number]
            elif bytes(page[: len(_MAGIC)]) == _MAGIC:
                sizes = found.frames["commit"][number:]  # of the whole file, in pages, where a commit ends
                found.frames["data"][number] = page
                found.frames["data"][number, _SIZE] = np.frombuffer(int(sizes[sizes > 0][0]).to_bytes(4), np.uint8)
        sums, _ = _sums(found.frames, found.header, found.word)
        found.frames["salt1"], found.frames["salt2"] = found.header["salt1"], found.header["salt2"]
        found.frames["s0"], found.frames["s1"] = sums[:, 0], sums[:, 1]


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
