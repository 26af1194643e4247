"""The journal: nothing committed is lost by a crash, damage costs what it touched, and every loss is told exactly."""

import logging
import shutil
import sqlite3
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import journal as module
from gateway import telemetry
from gateway.journal import (
    Batch,
    Changes,
    CommandState,
    Entry,
    Journal,
    JournalError,
    JournalReader,
    Lost,
    batches_after,
)
from gateway.stamp import Head
from tests.gateway_parts import MOTORS, Numbering

ROOMY = 1 << 30
COMMITTER = """
import sys
from pathlib import Path
from gateway.journal import Changes, Journal
from tests.gateway_parts import MOTORS, Numbering
journal, numbering = Journal(Path(sys.argv[1]), "arm1", MOTORS, 1 << 30), Numbering()
for number in range(1_000_000):
    journal.commit(Changes(telemetry=numbering.records([0, 0, 1])))
    if number % 3 == 0:
        journal.save_heads()
    print(number + 1, flush=True)
"""


def open_journal(path: Path, max_bytes: int = ROOMY, arm: str = "arm1") -> Journal:
    return Journal(path, arm, MOTORS, max_bytes)


def crash(path: Path) -> Path:
    """The files as a killed process leaves them: a copy, while the journal is open."""
    left = path.with_name("left")
    left.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        shutil.copy(file, left / file.name)
    return left / path.name


def rows(journal: Journal) -> list[Batch]:
    return list(batches_after(journal._db, 0))


def seqs(batches: list[Batch], partition: int) -> list[int]:
    return [seq for _, records in batches for seq in records["seq"][records["partition"] == partition].tolist()]


def fail_to_save_head_of(journal: Journal, partition: int) -> None:
    """From now on this journal cannot write down the head of ``partition``."""
    journal._db.execute(
        f"CREATE TEMP TRIGGER broken BEFORE INSERT ON main.heads WHEN NEW.partition = {partition} "
        "BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END"
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with closing(open_journal(path)) as opened:
        yield opened


# --- what a crash leaves ----------------------------------------------------------------------------------------------


def test_new_journal_has_no_heads_and_an_identity_of_its_own(tmp_path: Path) -> None:
    streams = set()
    for number in range(3):
        with closing(open_journal(tmp_path / f"{number}.db")) as journal:
            assert journal.heads == {0: Head(0, 0), 1: Head(0, 0)}
            streams.add(journal.stream)
    assert len(streams) == 3


@pytest.mark.parametrize("saved_after", [None, 0, 1, 4, 5])
def test_heads_after_a_crash_are_those_of_the_last_commit(
    path: Path, journal: Journal, saved_after: int | None
) -> None:
    numbering = Numbering()
    for number in range(5):
        if number == saved_after:
            journal.save_heads()
        journal.commit(Changes(telemetry=numbering.records([0, 1, 0] if number < 3 else [0])))
    if saved_after == 5:
        journal.save_heads()
    with closing(open_journal(crash(path))) as found:
        assert found.heads == journal.heads == {0: Head(8, 8), 1: Head(3, 3)}
        assert found.stream == journal.stream


def test_crash_while_heads_are_saved_repeats_no_number(path: Path, journal: Journal) -> None:
    numbering = Numbering()
    journal.commit(Changes(telemetry=numbering.records([0, 1])))
    journal.save_heads()
    journal.commit(Changes(telemetry=numbering.records([0, 1])))
    fail_to_save_head_of(journal, partition=1)
    with pytest.raises(sqlite3.Error, match="disk I/O"):
        journal.save_heads()
    with closing(open_journal(crash(path))) as found:
        assert found.heads == {0: Head(2, 2), 1: Head(2, 2)}


def test_commits_go_on_after_heads_could_not_be_saved(journal: Journal) -> None:
    fail_to_save_head_of(journal, partition=0)
    with pytest.raises(sqlite3.Error, match="disk I/O"):
        journal.save_heads()
    journal.commit(Changes(telemetry=Numbering().records([0])))
    assert seqs(rows(journal), 0) == [1]


@pytest.mark.parametrize("commits", [1, 7, 30])
def test_killed_writer_loses_nothing_that_was_committed(path: Path, commits: int) -> None:
    with subprocess.Popen([sys.executable, "-c", COMMITTER, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        told = 0
        while told < commits:
            told = int(child.stdout.readline())
        child.kill()
        told += len(child.stdout.readlines())
    with closing(open_journal(path)) as found:
        done = len(rows(found))
        assert done >= told - 1  # a last line may be half
        assert seqs(rows(found), 0) == list(range(1, 2 * done + 1))
        assert seqs(rows(found), 1) == list(range(1, done + 1))
        assert found.heads == {0: Head(2 * done, 2 * done), 1: Head(done, done)}


def test_commit_that_failed_wrote_nothing_and_is_good_again(journal: Journal, path: Path) -> None:
    changes = Changes(
        telemetry=Numbering().records([0]), entries=[Entry("events", 0, "*", b"{}", 1)],
        commands=[CommandState("c", False, 1, "joint1")],
    )  # fmt: skip
    journal._db.execute(
        "CREATE TEMP TRIGGER broken BEFORE INSERT ON main.commands BEGIN SELECT RAISE(ABORT, 'disk full'); END"
    )
    with pytest.raises(sqlite3.Error, match="disk full"):
        journal.commit(changes)
    with closing(JournalReader(path)) as reader:
        assert reader.ends() == (0, 0)
        assert journal.heads[0] == Head(0, 0)
        journal._db.execute("DROP TRIGGER broken")
        assert journal.commit(changes) == 1
        assert reader.ends() == (1, 1)
        assert reader.command("c") == CommandState("c", False, 1, "joint1")
        assert journal.heads[0] == Head(1, 1)


def test_commit_after_an_unexpected_error_still_works(journal: Journal) -> None:
    with pytest.raises(OverflowError):
        journal.commit(Changes(entries=[Entry("events", 0, "*", b"", 2**70)]))
    journal.commit(Changes(telemetry=Numbering().records([0])))
    assert seqs(rows(journal), 0) == [1]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_flipped_byte_loses_that_batch_only(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    numbering = Numbering()
    with closing(open_journal(path)) as journal:
        batches = [numbering.records([0, 0, 1]) for _ in range(5)]
        for records in batches:
            journal.commit(Changes(telemetry=records))
        heads = dict(journal.heads)
    data = bytearray(path.read_bytes())
    at = data.index(telemetry.messages(batches[2])[1])
    data[at + 20] ^= 1
    path.write_bytes(data)
    with closing(open_journal(path)) as journal:
        assert [batch.id for batch in rows(journal)] == [1, 2, 4, 5]
        assert seqs(rows(journal), 0) == [1, 2, 3, 4, 7, 8, 9, 10]
        assert journal.heads == heads
    assert "row 3 is damaged" in caplog.text


@pytest.mark.parametrize("damage", ["whole", "behind the first pages"])
def test_unreadable_file_is_set_aside_whole_and_a_new_stream_begins(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2):
        with closing(open_journal(path)) as journal:
            stream = journal.stream
            numbering = Numbering()
            for _ in range(200):
                journal.commit(Changes(telemetry=numbering.records([0] * 20)))
        data = path.read_bytes()
        kept = 0 if damage == "whole" else 14 * 4096
        data = data[:kept] + b"\xa5" * (len(data) - kept)
        path.write_bytes(data)
        with closing(open_journal(path)) as journal:
            assert journal.stream != stream
            assert journal.heads[0] == Head(0, 0)
        assert path.with_name(f"journal.aside-{number}").read_bytes() == data
        assert f"journal.aside-{number}" in caplog.text
        path.unlink()


def test_empty_file_becomes_a_journal(path: Path) -> None:
    path.write_bytes(b"")
    with closing(open_journal(path)) as journal:
        assert journal.heads[0] == Head(0, 0)


def test_directory_in_its_place_is_told_with_its_path(path: Path) -> None:
    path.mkdir()
    with pytest.raises(JournalError, match=r"journal\.db"):
        open_journal(path)


def test_file_of_another_version_is_refused_and_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    before = path.stat().st_size
    with pytest.raises(JournalError, match="not a journal of this version"):
        open_journal(path)
    assert path.stat().st_size == before


# --- whose journal it is ----------------------------------------------------------------------------------------------


def test_journal_of_another_arm_is_refused_naming_both(path: Path, journal: Journal) -> None:
    with pytest.raises(JournalError, match="belongs to arm 'arm1', not 'arm2'"):
        open_journal(path, arm="arm2")


@pytest.mark.parametrize(
    ("motors", "said"),
    [
        ({0: "other"}, "partition 0 belongs to 'joint1', not 'other'"),
        ({5: "joint1"}, "'joint1' sits on partition 0, not 5"),
        ({0: "joint2", 1: "joint1"}, "partition 1 belongs to 'joint2', not 'joint1'"),
    ],
)
def test_motor_that_moved_to_another_partition_is_refused_naming_both(
    path: Path, journal: Journal, motors: dict[int, str], said: str
) -> None:
    with pytest.raises(JournalError, match=said):
        Journal(path, "arm1", motors, ROOMY)


def test_motor_that_left_and_came_back_goes_on_where_it_was(path: Path) -> None:
    with closing(open_journal(path)) as journal:
        journal.commit(Changes(telemetry=Numbering().records([1, 1])))
    with closing(Journal(path, "arm1", {0: "joint1", 2: "joint3"}, ROOMY)) as journal:
        journal.commit(Changes(telemetry=Numbering(partitions=[2]).records([2])))
    with closing(open_journal(path)) as journal:
        assert journal.heads == {0: Head(0, 0), 1: Head(2, 2), 2: Head(1, 1)}
    with closing(JournalReader(path)) as reader:
        assert reader.motors() == {0: "joint1", 1: "joint2", 2: "joint3"}


# --- the bound --------------------------------------------------------------------------------------------------------


def test_trim_holds_the_bound_while_much_comes_in(path: Path) -> None:
    bound = 400_000
    numbering = Numbering()
    with closing(open_journal(path, bound)) as journal:
        for _ in range(60):
            for _ in range(5):  # between two trims a tenth of the bound comes in
                journal.commit(Changes(telemetry=numbering.records([0] * 100)))
            journal.trim(published=False)
            assert journal._used_bytes() < 1.2 * bound
        assert len(rows(journal)) > 20
        assert seqs(rows(journal), 0)[-1] == journal.heads[0].seq == 60 * 5 * 100


def test_trim_never_deletes_the_newest_row(path: Path) -> None:
    numbering = Numbering()
    with closing(open_journal(path, max_bytes=1)) as journal:
        for _ in range(3):
            journal.commit(Changes(telemetry=numbering.records([0])))
        for _ in range(10):
            journal.trim(published=False)
        assert [batch.id for batch in rows(journal)] == [3]
        assert journal.commit(Changes(telemetry=numbering.records([0]))) == 4


def test_trim_of_an_empty_journal_does_nothing(path: Path) -> None:
    with closing(open_journal(path, max_bytes=1)) as journal:
        assert journal.trim(published=True) == []


def test_nothing_is_removed_below_the_bound(journal: Journal) -> None:
    journal.commit(Changes(telemetry=Numbering().records([0])))
    assert journal.trim(published=True) == []
    assert len(rows(journal)) == 1


COMMITS = st.lists(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=6), min_size=2, max_size=25)


@given(COMMITS, st.dictionaries(st.sampled_from([0, 1, 2]), st.floats(0, 1)), st.integers(1, 9))
def test_trim_reports_exactly_what_it_removed_unacknowledged(
    commits: list[list[int]], acknowledged: dict[int, float], at_once: int
) -> None:
    numbering = Numbering(partitions=[0, 1, 2])
    motors = {0: "a", 1: "b", 2: "c"}
    with closing(Journal(Path(":memory:"), "arm1", motors, 1)) as journal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TRIM_ROWS", at_once)
        row_of: dict[tuple[int, int], int] = {}
        for partitions in commits:
            records = numbering.records(partitions)
            row = journal.commit(Changes(telemetry=records))
            assert row is not None
            row_of |= dict.fromkeys(zip(partitions, records["seq"].tolist(), strict=True), row)
        published = {}
        for partition, share in acknowledged.items():
            if seq := int(share * journal.heads[partition].seq):
                published["telemetry", partition] = (seq, row_of[partition, seq] - 1)
        journal.commit(Changes(published=published))
        while len(rows(journal)) > 1:
            before = {row.id for row in rows(journal)}
            lost = journal.trim(published=True)
            removed = before - {row.id for row in rows(journal)}
            expected = defaultdict(list)
            for (partition, seq), row in row_of.items():
                if row in removed and seq > published.get(("telemetry", partition), (0, 0))[0]:
                    expected[partition].append(seq)
            assert sorted(lost) == sorted(Lost(p, min(found), max(found)) for p, found in expected.items())


def test_motor_that_is_away_makes_nobody_elses_acknowledged_records_count_as_lost(path: Path) -> None:
    numbering = Numbering()
    with closing(open_journal(path, max_bytes=1)) as journal:
        journal.commit(Changes(telemetry=numbering.records([1])))
        for _ in range(20):
            journal.commit(Changes(telemetry=numbering.records([0])))
        journal.commit(Changes(published={("telemetry", 0): (20, 21), ("telemetry", 1): (1, 1)}))
        assert journal.trim(published=True) == []


# --- entries, commands, positions -------------------------------------------------------------------------------------


@settings(max_examples=20)  # each opens the journal twice
@given(st.lists(st.tuples(st.sampled_from(["events", "outcomes"]), st.integers(0, 2)), max_size=30), st.data())
def test_entries_count_from_one_for_each_topic_and_partition(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[str, int]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("entries") / "journal.db"
    entries = [Entry(topic, partition, "*", b"%d" % n, n) for n, (topic, partition) in enumerate(places)]
    cut = data.draw(st.integers(0, len(entries)))
    for part in (entries[:cut], entries[cut:]):
        with closing(open_journal(path)) as journal:
            journal.commit(Changes(entries=part))
    with closing(JournalReader(path)) as reader:
        stored = reader.entries(0, 1000)
        assert [entry.value for entry in stored] == [entry.value for entry in entries]
        for place in set(places):
            mine = [entry for entry in stored if (entry.topic, entry.partition) == place]
            assert [entry.seq for entry in mine] == list(range(1, len(mine) + 1))
            assert reader.partition_entries(*place, 0, 1000) == mine
            assert reader.partition_entries(*place, 1, 2) == mine[1:3]
            assert reader.newest_entries()[place] == len(mine)
        assert reader.entries(0, 1000, "events") == [entry for entry in stored if entry.topic == "events"]


def test_what_is_remembered_of_a_command_is_the_newest(journal: Journal, path: Path) -> None:
    first, last = CommandState("c", False, 1, "joint1"), CommandState("c", True, 2, "joint1")
    with closing(JournalReader(path)) as reader:
        journal.commit(Changes(commands=[first, CommandState("d", False, 1, "*")]))
        assert reader.command("c") == first
        journal.commit(Changes(commands=[last]))
        assert reader.command("c") == last
        assert reader.command("unknown") is None
        assert [state.id for state in reader.unfinished_commands()] == ["d"]


def test_oldest_ids_are_forgotten_beyond_the_bound_but_no_unfinished_one(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDS_KEPT", 3)
    for number in range(6):
        journal.commit(Changes(commands=[CommandState(f"c{number}", number != 1, number, "*")]))
    journal.save_heads()
    with closing(JournalReader(path)) as reader:
        assert [n for n in range(6) if reader.command(f"c{n}")] == [1, 3, 4, 5]


def test_positions_are_kept(journal: Journal, path: Path) -> None:
    journal.commit(Changes(inbox={("kafka", 3): 17, ("local", 0): 1}, published={("telemetry", 1): (5, 6)}))
    journal.commit(Changes(inbox={("kafka", 3): 18}))
    with closing(JournalReader(path)) as reader:
        assert reader.inbox("kafka") == {3: 18}
        assert reader.inbox("local") == {0: 1}
        assert reader.published() == {("telemetry", 1): (5, 6)}


def test_reader_pages_through_what_is_there(journal: Journal, path: Path) -> None:
    numbering = Numbering()
    for _ in range(7):
        journal.commit(Changes(telemetry=numbering.records([0, 1])))
    with closing(JournalReader(path)) as reader:
        assert [batch.id for batch in reader.batches(2, 3)] == [3, 4, 5]
        assert reader.batches(7, 3) == []
        assert seqs(reader.batches(0, 100), 1) == list(range(1, 8))
        assert (reader.stream, reader.arm) == (journal.stream, "arm1")


def test_reader_without_a_journal_is_told_so(path: Path) -> None:
    with pytest.raises(JournalError, match="there is none"):
        JournalReader(path)


def test_reader_of_something_else_is_told_so(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(JournalError, match="not a database"):
        JournalReader(path)


def test_long_reading_holds_up_no_commit(journal: Journal, path: Path) -> None:
    numbering = Numbering()
    journal.commit(Changes(telemetry=numbering.records([0])))
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as db:
        db.execute("BEGIN")
        assert db.execute("SELECT count(*) FROM telemetry").fetchone() == (1,)
        journal.commit(Changes(telemetry=numbering.records([0])))
        journal.save_heads()
        assert db.execute("SELECT count(*) FROM telemetry").fetchone() == (1,)


def test_damaged_rows_are_logged_and_left_out_for_readers_too(
    journal: Journal, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbering = Numbering()
    for _ in range(3):
        journal.commit(Changes(telemetry=numbering.records([0])))
    journal._db.execute("UPDATE telemetry SET records = substr(records, 2) WHERE id = 2")
    with closing(JournalReader(path)) as reader, caplog.at_level(logging.ERROR):
        assert [batch.id for batch in reader.batches(0, 10)] == [1, 3]
    assert "row 2 is damaged" in caplog.text
