"""The state directory: one gateway an arm, and a status that is whole whenever it is read."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gateway.state_dir import RESERVE_BYTES, StateDir, StateDirError


def test_second_gateway_is_refused_naming_the_process_of_the_first(tmp_path: Path) -> None:
    first, second = StateDir(tmp_path), StateDir(tmp_path)
    with first.locked(), pytest.raises(StateDirError, match=rf"process {os.getpid()}\b"), second.locked():
        pass


def test_lock_is_free_again_afterwards_and_after_an_error(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    with pytest.raises(ZeroDivisionError), state.locked():
        raise ZeroDivisionError
    with state.locked():
        pass
    with state.locked():
        assert state.running_pid() == os.getpid()
    assert state.running_pid() is None


def test_lock_of_a_killed_gateway_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, threading; from gateway.state_dir import StateDir\n"
        "with StateDir(pathlib.Path(sys.argv[1])).locked(): print('held', flush=True); threading.Event().wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        state = StateDir(tmp_path)
        assert state.running_pid() == holder.pid
        with pytest.raises(StateDirError, match=rf"process {holder.pid}\b"), state.locked():
            pass
        holder.kill()
        holder.wait()
    with state.locked():
        assert state.running_pid() == os.getpid()


def test_nobody_runs_where_nothing_is(tmp_path: Path) -> None:
    assert StateDir(tmp_path / "none").running_pid() is None


def test_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "a" / "b")
    state.make()
    state.make()
    assert state.path.is_dir()


def test_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    state = StateDir(tmp_path / "file" / "below")
    with pytest.raises(StateDirError, match="below"):
        state.make()


def test_status_is_read_as_it_was_written_and_nan_is_none(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    state.write_status({"arm": "a", "value": float("nan")})
    assert state.read_status() == {"arm": "a", "value": None}


@pytest.mark.parametrize("content", [None, b"", b"{half"])
def test_missing_or_damaged_status_is_a_state_dir_error(tmp_path: Path, content: bytes | None) -> None:
    state = StateDir(tmp_path)
    if content is not None:
        state.status.write_bytes(content)
    with pytest.raises(StateDirError, match=r"status\.json"):
        state.read_status()


def test_status_is_never_read_by_halves(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    state.write_status({"number": 0, "padding": ""})
    done = threading.Event()

    def write() -> None:
        for number in range(300):
            state.write_status({"number": number, "padding": "x" * (100_000 * (number % 2))})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not done.is_set():
            status = state.read_status()
            assert len(status["padding"]) == 100_000 * (status["number"] % 2)
    finally:
        writer.join()
    assert state.read_status()["number"] == 299


def test_what_is_kept_back_of_the_disk_takes_room_and_is_given_back_once(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    state.keep_reserve()
    (reserve,) = tmp_path.iterdir()
    assert reserve.stat().st_blocks * 512 >= RESERVE_BYTES
    assert state.release_reserve()
    assert list(tmp_path.iterdir()) == []
    assert not state.release_reserve()
