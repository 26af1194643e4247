"""What damage in the WAL cuts off is found, and joined again."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from gateway.aside import set_aside
from gateway.journal import Changes, Journal
from gateway.wal import commits_cut_off, mend, wal_path
from tests.gateway_parts import MOTORS, Numbering

FRAME = 24 + 4096


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A journal as a killed gateway leaves it: twenty commits in a WAL that a longer one went before."""
    numbering = Numbering()
    path = tmp_path / "journal.db"
    with closing(Journal(tmp_path / "running.db", "arm1", MOTORS, 1 << 30)) as journal:
        for _ in range(40):
            journal.commit(Changes(batch=numbering.batch([0] * 50)))
        journal.fold()
        for _ in range(20):
            journal.commit(Changes(batch=numbering.batch([0] * 50)))
        for suffix in ("", "-wal"):
            shutil.copy(tmp_path / f"running.db{suffix}", tmp_path / f"journal.db{suffix}")
    return path


def rows(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT count(*) FROM telemetry").fetchone()[0])


def flip(path: Path, frame: int, at: int) -> None:
    with wal_path(path).open("r+b") as file:
        file.seek(32 + frame * FRAME + at)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))


def test_whole_wal_is_left_as_it_is(killed: Path) -> None:
    before = wal_path(killed).read_bytes()
    assert commits_cut_off(killed) == 0
    mend(killed)
    assert wal_path(killed).read_bytes() == before
    assert rows(killed) == 60


def test_without_a_wal_nothing_is_cut_off(tmp_path: Path) -> None:
    assert commits_cut_off(tmp_path / "journal.db") == 0
    for rubbish in (b"", b"x" * 32, b"x" * 10_000):
        wal_path(tmp_path / "journal.db").write_bytes(rubbish)
        assert commits_cut_off(tmp_path / "journal.db") == 0
        mend(tmp_path / "journal.db")


@pytest.mark.parametrize("at", [9, 13, 17, 21, 24 + 3000], ids=["salt1", "salt2", "s0", "s1", "page"])
def test_commits_behind_damage_are_found_and_joined_again(killed: Path, at: int) -> None:
    for frame in (4, 11):
        flip(killed, frame, at)
    assert 5 < commits_cut_off(killed) < 20
    mend(killed)
    assert commits_cut_off(killed) == 0
    assert rows(killed) == 60


def test_commit_that_was_being_written_is_not_missed(killed: Path) -> None:
    size = wal_path(killed).stat().st_size
    data = wal_path(killed).read_bytes()
    salts = data[16:24]
    last = max(n for n in range(size // FRAME) if data[32 + n * FRAME + 8 :][:8] == salts)
    flip(killed, last, 3000)
    assert commits_cut_off(killed) == 0


def test_journal_that_is_set_aside_knows_what_lies_behind_the_damage(killed: Path) -> None:
    flip(killed, 5, 3000)
    left = set_aside(killed, "for a test")
    assert left.seqs == {0: 3000}
    assert left.newest_ns == 3000


def test_damage_in_the_first_page_does_not_take_everything_else(killed: Path) -> None:
    data = wal_path(killed).read_bytes()
    frames = [data[at : at + FRAME] for at in range(32, len(data), FRAME)]
    first = [n for n, frame in enumerate(frames) if frame[:4] == b"\0\0\0\1" and frame[8:16] == data[16:24]]
    for number in first:
        flip(killed, number, frames[number].rindex(b"topic TEXT NOT NULL"))
    assert set_aside(killed, "for a test").seqs == {0: 3000}


def test_program_that_found_the_damage_first_does_not_hide_what_lies_behind_it(killed: Path) -> None:
    flip(killed, 5, 3000)
    program = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('BEGIN EXCLUSIVE'); print(); input()"
    command = [sys.executable, "-c", program, str(killed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline()
        assert set_aside(killed, "for a test").seqs == {0: 3000}
        other.kill()
