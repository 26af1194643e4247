"""The journal: nothing committed is lost by a crash, damage costs what it touched, and every loss is told exactly."""

import logging
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter, defaultdict
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
    Journal,
    JournalBroken,
    JournalError,
    JournalReader,
    Lost,
    ProducerState,
    Published,
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
    journal.commit(Changes(batch=numbering.batch([0, 0, 1])))
    if number % 3 == 0:
        journal.commit(Changes(save_heads=True))
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
    return list(batches_after(journal.db, 0))


def seqs(batches: list[Batch], partition: int) -> list[int]:
    return [seq for batch in batches if partition in batch.split for seq in batch.split[partition]["seq"].tolist()]


def fail_to_save_head_of(journal: Journal, partition: int) -> None:
    """From now on this journal cannot write down the head of ``partition``."""
    journal.db.execute(
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
            journal.commit(Changes(save_heads=True))
        journal.commit(Changes(batch=numbering.batch([0, 1, 0] if number < 3 else [0])))
    if saved_after == 5:
        journal.commit(Changes(save_heads=True))
    with closing(open_journal(crash(path))) as found:
        assert found.heads == journal.heads == {0: Head(8, 8), 1: Head(3, 3)}
        assert found.stream == journal.stream


def test_crash_while_heads_are_saved_repeats_no_number(path: Path, journal: Journal) -> None:
    numbering = Numbering()
    journal.commit(Changes(batch=numbering.batch([0, 1])))
    journal.commit(Changes(save_heads=True))
    journal.commit(Changes(batch=numbering.batch([0, 1])))
    fail_to_save_head_of(journal, partition=1)
    with pytest.raises(sqlite3.Error, match="disk I/O"):
        journal.commit(Changes(save_heads=True))
    with closing(open_journal(crash(path))) as found:
        assert found.heads == {0: Head(2, 2), 1: Head(2, 2)}


def test_commits_go_on_after_heads_could_not_be_saved(journal: Journal) -> None:
    fail_to_save_head_of(journal, partition=0)
    with pytest.raises(sqlite3.Error, match="disk I/O"):
        journal.commit(Changes(save_heads=True))
    journal.commit(Changes(batch=Numbering().batch([0])))
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
    numbering = Numbering()
    changes = Changes(
        batch=numbering.batch([0]), entries=[numbering.entry()],
        commands=[CommandState("c", False, 1, "joint1")],
    )  # fmt: skip
    journal.db.execute(
        "CREATE TEMP TRIGGER broken BEFORE INSERT ON main.commands BEGIN SELECT RAISE(ABORT, 'disk full'); END"
    )
    with pytest.raises(sqlite3.Error, match="disk full"):
        journal.commit(changes)
    with closing(JournalReader(path)) as reader:
        assert reader.ends() == (0, 0)
        assert journal.heads[0] == Head(0, 0)
        journal.db.execute("DROP TRIGGER broken")
        journal.commit(changes)
        assert (journal.row, journal.entry, journal.entry_heads) == (1, 1, {("events", 0): 1})
        assert reader.ends() == (1, 1)
        assert reader.command("c") == CommandState("c", False, 1, "joint1")
        assert journal.heads[0] == Head(1, 1)


def test_commit_after_an_unexpected_error_still_works(journal: Journal) -> None:
    with pytest.raises(OverflowError):
        journal.commit(Changes(entries=[Numbering().entry()._replace(at_ns=2**70)]))
    journal.commit(Changes(batch=Numbering().batch([0])))
    assert seqs(rows(journal), 0) == [1]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_flipped_byte_loses_that_batch_only(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    numbering = Numbering()
    with closing(open_journal(path)) as journal:
        batches = [numbering.batch([0, 0, 1]) for _ in range(5)]
        for batch in batches:
            journal.commit(Changes(batch=batch))
        heads = dict(journal.heads)
    data = bytearray(path.read_bytes())
    at = data.index(telemetry.messages(batches[2].records)[1])
    data[at + 20] ^= 1
    path.write_bytes(data)
    with closing(open_journal(path)) as journal:
        assert [batch.id for batch in rows(journal)] == [1, 2, 4, 5]
        assert seqs(rows(journal), 0) == [1, 2, 3, 4, 7, 8, 9, 10]
        assert journal.heads == heads
    assert "row 3 is damaged" in caplog.text


@pytest.mark.parametrize("damage", ["whole", "behind the first pages"])
def test_file_that_makes_no_sense_is_refused_as_broken_and_left_as_it_is(path: Path, damage: str) -> None:
    with closing(open_journal(path)) as journal:
        numbering = Numbering()
        for _ in range(200):
            journal.commit(Changes(batch=numbering.batch([0] * 20)))
    data = path.read_bytes()
    kept = 0 if damage == "whole" else 14 * 4096
    data = data[:kept] + b"\xa5" * (len(data) - kept)
    path.write_bytes(data)
    with pytest.raises(JournalBroken, match=r"malformed|not a database"):
        open_journal(path)
    assert path.read_bytes() == data


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
        numbering = Numbering(partitions=[1, 2])
        journal.commit(Changes(batch=numbering.batch([1, 1])))
    with closing(Journal(path, "arm1", {0: "joint1", 2: "joint3"}, ROOMY)) as journal:
        journal.commit(Changes(batch=numbering.batch([2])))
    with closing(open_journal(path)) as journal:
        assert journal.heads == {0: Head(0, 0), 1: Head(2, 2), 2: Head(1, 1)}
    with closing(JournalReader(path)) as reader:
        assert reader.motors() == {0: "joint1", 1: "joint2", 2: "joint3"}


# --- the bound --------------------------------------------------------------------------------------------------------


def trim(journal: Journal, published: Published | None = None) -> list[Lost]:
    """One step of holding the size; what was lost with it."""
    plan, lost = journal.plan_trim(published)
    journal.commit(Changes(trim=plan))
    return lost


def test_trim_holds_the_bound_while_much_comes_in(path: Path) -> None:
    bound = 400_000
    numbering = Numbering()
    with closing(open_journal(path, bound)) as journal:
        for _ in range(60):
            for _ in range(5):  # between two trims a tenth of the bound comes in
                journal.commit(Changes(batch=numbering.batch([0] * 100)))
            trim(journal)
            assert journal._used_bytes() < 1.2 * bound
        assert len(rows(journal)) > 20
        assert seqs(rows(journal), 0)[-1] == journal.heads[0].seq == 60 * 5 * 100


def test_trim_never_deletes_the_newest_row(path: Path) -> None:
    numbering = Numbering()
    with closing(open_journal(path, max_bytes=1)) as journal:
        for _ in range(3):
            journal.commit(Changes(batch=numbering.batch([0])))
        for _ in range(10):
            trim(journal)
        assert [batch.id for batch in rows(journal)] == [3]
    with closing(open_journal(path)) as journal:
        assert (journal.row, journal.heads[0]) == (3, Head(3, 3))


def test_trim_of_an_empty_journal_does_nothing(path: Path) -> None:
    with closing(open_journal(path, max_bytes=1)) as journal:
        assert journal.plan_trim({}) == (None, [])


def test_nothing_is_removed_below_the_bound(journal: Journal) -> None:
    journal.commit(Changes(batch=Numbering().batch([0])))
    assert journal.plan_trim({}) == (None, [])


COMMITS = st.lists(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=6), min_size=2, max_size=25)


@given(COMMITS, st.dictionaries(st.sampled_from([0, 1, 2]), st.floats(0, 1)), st.integers(1, 9))
def test_trim_reports_exactly_what_it_removes_unacknowledged(
    commits: list[list[int]], acknowledged: dict[int, float], at_once: int
) -> None:
    numbering = Numbering(partitions=[0, 1, 2])
    motors = {0: "a", 1: "b", 2: "c"}
    with closing(Journal(Path(":memory:"), "arm1", motors, 1)) as journal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TRIM_ROWS", at_once)
        row_of: dict[tuple[int, int], int] = {}
        for partitions in commits:
            batch = numbering.batch(partitions)
            journal.commit(Changes(batch=batch))
            row_of |= dict.fromkeys(zip(partitions, batch.records["seq"].tolist(), strict=True), batch.id)
        published = {}
        for partition, share in acknowledged.items():
            if seq := int(share * journal.heads[partition].seq):
                published["telemetry", partition] = (seq, row_of[partition, seq] - 1)
        while len(rows(journal)) > 1:
            before = {row.id for row in rows(journal)}
            lost = trim(journal, published)
            removed = before - {row.id for row in rows(journal)}
            expected = defaultdict(list)
            for (partition, seq), row in row_of.items():
                if row in removed and seq > published.get(("telemetry", partition), (0, 0))[0]:
                    expected[partition].append(seq)
            assert sorted(lost) == sorted(Lost(p, min(found), max(found)) for p, found in expected.items())


def test_motor_that_is_away_makes_nobody_elses_acknowledged_records_count_as_lost(path: Path) -> None:
    numbering = Numbering()
    with closing(open_journal(path, max_bytes=1)) as journal:
        journal.commit(Changes(batch=numbering.batch([1])))
        for _ in range(20):
            journal.commit(Changes(batch=numbering.batch([0])))
        assert trim(journal, {("telemetry", 0): (20, 21), ("telemetry", 1): (1, 1)}) == []
        assert len(rows(journal)) < 21


def test_events_are_bounded_in_bytes_but_the_newest_of_each_partition_stays_and_numbers_go_on(path: Path) -> None:
    numbering = Numbering()
    share = 100_000
    with closing(open_journal(path, share * module.ENTRIES_SHARE)) as journal:
        journal.commit(Changes(entries=[numbering.entry("outcomes", 1)]))
        journal.commit(Changes(entries=[numbering.entry(value=b"x" * 500) for _ in range(1000)]))
        lost = trim(journal, {("events", 0): (300, 301)})
        with closing(JournalReader(path)) as reader:
            left = reader.partition_entries("events", 0, 0, 1000)
            assert 0.9 * share < sum(len(entry.value) + len(entry.key) + module.ENTRY_BYTES for entry in left) < share
            assert lost == [Lost(0, 301, left[0].seq - 1, "events")]
            assert [entry.seq for entry in left] == list(range(left[0].seq, 1001))
            assert len(reader.partition_entries("outcomes", 1, 0, 1000)) == 1
        assert journal.plan_trim({}) == (None, [])
    with closing(open_journal(path, 1)) as journal:
        trim(journal)
    with closing(open_journal(path, ROOMY)) as journal:
        assert journal.entry_heads == {("events", 0): 1000, ("outcomes", 1): 1}


def test_wal_counts_as_used_but_for_a_fourth_at_most(path: Path) -> None:
    numbering = Numbering()
    with closing(open_journal(path)) as journal, closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM telemetry").fetchall()
        journal.commit(Changes(batch=numbering.batch([0] * 10_000)))
        in_file = journal.db.execute("PRAGMA page_count").fetchone()[0] * 4096
        assert journal._used_bytes() == in_file + journal.wal_bytes() > in_file + 700_000
        journal.max_bytes = 1000
        assert journal._used_bytes() == in_file + 250


# --- entries, commands, positions -------------------------------------------------------------------------------------


@settings(max_examples=20)  # each opens the journal twice
@given(st.lists(st.tuples(st.sampled_from(["events", "outcomes"]), st.integers(0, 2)), max_size=30), st.data())
def test_entries_are_kept_in_order_and_their_numbers_are_known_to_the_next_run(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[str, int]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("entries") / "journal.db"
    numbering = Numbering()
    entries = [numbering.entry(topic, partition, b"%d" % n) for n, (topic, partition) in enumerate(places)]
    cut = data.draw(st.integers(0, len(entries)))
    for part in (entries[:cut], entries[cut:]):
        with closing(open_journal(path)) as journal:
            journal.commit(Changes(entries=part))
    with closing(open_journal(path)) as journal:
        assert journal.entry == len(entries)
        assert journal.entry_heads == Counter(places)
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


def test_oldest_ids_are_forgotten_beyond_the_bound_but_no_unfinished_one(journal: Journal, path: Path) -> None:
    journal.max_bytes = 3 * module.ID_BYTES * module.IDS_SHARE
    for number in range(6):
        journal.commit(Changes(commands=[CommandState(f"c{number}", number != 1, number, "*")]))
    trim(journal)
    with closing(JournalReader(path)) as reader:
        assert [n for n in range(6) if reader.command(f"c{n}")] == [1, 3, 4, 5]


def test_positions_are_kept(journal: Journal, path: Path) -> None:
    journal.commit(Changes(inbox={("kafka", 3): 17, ("local", 0): 1}, published={("telemetry", 1): (5, 6)}))
    journal.commit(Changes(inbox={("kafka", 3): 18}))
    with closing(JournalReader(path)) as reader:
        assert reader.inbox("kafka") == {3: 18}
        assert reader.inbox("local") == {0: 1}
        assert reader.published() == {("telemetry", 1): (5, 6)}


def test_producers_identity_is_kept_and_the_newest_counts(journal: Journal, path: Path) -> None:
    with closing(JournalReader(path)) as reader:
        assert reader.producer() is None
        for state in (
            ProducerState("cluster", 4000, 1, {("telemetry", 0): 1, ("events", 0): 1}),
            ProducerState("other", 2**40, 0, {("telemetry", 1): 2**40}),
        ):
            journal.commit(Changes(producer=state))
            assert reader.producer() == state


def test_journal_of_version_1_is_taken_over(path: Path) -> None:
    numbering = Numbering()
    with closing(open_journal(path)) as journal:
        stream = journal.stream
        journal.commit(Changes(batch=numbering.batch([0, 1]), entries=[numbering.entry(key="\u00e9", value=b"12345")]))
    with closing(sqlite3.connect(path)) as db:
        db.executescript(
            "DROP TABLE producer; DROP TABLE bases; DROP TABLE damaged; DROP TABLE sizes; DROP VIEW older;"
            "ALTER TABLE entries DROP COLUMN crc;"
            "PRAGMA user_version = 1"
        )
    with closing(open_journal(path)) as journal, closing(JournalReader(path)) as reader:
        assert (journal.stream, journal.heads[0], journal.row) == (stream, Head(1, 1), 1)
        assert journal._entry_bytes == 2 + 5 + module.ENTRY_BYTES
        assert reader.producer() is None


def test_entries_of_version_2_are_read_as_they_are_and_kept(path: Path) -> None:
    numbering = Numbering()
    old, new = numbering.entry(value=b"old"), numbering.entry(value=b"new")
    with closing(open_journal(path)) as journal:
        journal.commit(Changes(entries=[old]))
    with closing(sqlite3.connect(path)) as db:
        db.executescript("ALTER TABLE entries DROP COLUMN crc; PRAGMA user_version = 2")
    with closing(JournalReader(path)) as reader:  # as one that was set aside
        assert reader.entries(0, 10) == [old]
    with closing(open_journal(path)) as journal, closing(JournalReader(path)) as reader:
        journal.commit(Changes(entries=[new]))
        assert reader.entries(0, 10) == [old, new]
        journal.db.execute("UPDATE entries SET value = x'00'")
        assert [entry.seq for entry in reader.entries(0, 10)] == [1]  # an old one has no checksum


def test_numbers_that_no_record_has_are_not_given_again(path: Path) -> None:
    with closing(open_journal(path)) as journal:
        journal.commit(Changes(batch=Numbering().batch([0, 0]), skipped={0: 9, 1: 4}))
        with closing(open_journal(crash(path))) as found:
            assert found.heads == {0: Head(9, 2), 1: Head(4, 0)}
        journal.commit(Changes(skipped={0: 5}))  # an older skip takes none back
        assert journal.heads[0] == Head(9, 2)


def test_reader_pages_through_what_is_there(journal: Journal, path: Path) -> None:
    numbering = Numbering()
    for _ in range(7):
        journal.commit(Changes(batch=numbering.batch([0, 1])))
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
    journal.commit(Changes(batch=numbering.batch([0])))
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as db:
        db.execute("BEGIN")
        assert db.execute("SELECT count(*) FROM telemetry").fetchone() == (1,)
        journal.commit(Changes(batch=numbering.batch([0])))
        journal.commit(Changes(save_heads=True))
        assert db.execute("SELECT count(*) FROM telemetry").fetchone() == (1,)


def test_damaged_rows_are_logged_and_left_out_for_readers_too(
    journal: Journal, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbering = Numbering()
    for _ in range(3):
        journal.commit(Changes(batch=numbering.batch([0])))
    journal.db.execute("UPDATE telemetry SET records = substr(records, 2) WHERE id = 2")
    with closing(JournalReader(path)) as reader, caplog.at_level(logging.ERROR):
        assert [batch.id for batch in reader.batches(0, 10)] == [1, 3]
    assert "row 2 is damaged" in caplog.text
