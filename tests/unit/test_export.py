"""An exported table, read back by pyarrow and by Python's csv, is the log bit for bit; and it is whole or not there."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gateway.extras import ExtraMissing
from gateway.journal import StoredEntry
from gateway.log_reader import Entries, LogEntry, LogError, Position, Samples, Topic
from gateway.recordings import export as module
from gateway.recordings.export import ExportFile
from gateway.source import open_source
from gateway.telemetry import FIELD_NAMES, RECORD, Records
from tests.gateway_parts import MOTORS, Numbering
from tests.log_parts import make_journal, make_records, of_motor

COUNT = 5000  # of each motor
RECORDS = make_records(COUNT)
EVENT = b'{"type":"motor.late","motor":"joint2","detail":"a \\"quoted\\", comma\\n\xc3\xbc"}'
OUTCOME = b'{"command_id":"c1","motor":"joint1","state":"rejected","reason":"stale","detail":null}'


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    numbering = Numbering()
    entries: Sequence[StoredEntry] = [
        numbering.entry(key="*", value=b'{"type":"gateway.started"}'),
        numbering.entry("outcomes", 0, OUTCOME, "joint1"),
        numbering.entry("events", 1, EVENT, "joint2"),
    ]
    return make_journal(tmp_path_factory.mktemp("log") / "journal.db", RECORDS, entries)


async def export(journal: Path, out: Path, topic: Topic = "telemetry") -> int:
    with ExportFile(out, topic) as table:
        async with open_source(journal, [topic], "beginning") as log:
            async for part in log:
                assert isinstance(part, Samples | Entries)
                table.add(part)
    return table.rows


def canonical(values: np.ndarray) -> np.ndarray:
    """As they are stored, but every NaN the same: it says only that the motor does not tell."""
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), np.array(np.nan, values.dtype), values)
    return values.view(f"u{values.dtype.itemsize}")


def assert_same(columns: dict[str, np.ndarray], records: Records) -> None:
    for name in FIELD_NAMES:
        found = columns[name].astype(RECORD[name], copy=False)
        assert np.array_equal(canonical(found), canonical(records[name].copy())), name


async def test_parquet_has_every_bit_of_the_log_in_the_order_of_each_motor(journal: Path, tmp_path: Path) -> None:
    out = tmp_path / "log.parquet"
    assert await export(journal, out) == len(RECORDS)
    table = pyarrow.parquet.read_table(out)
    for partition, motor in MOTORS.items():
        expected = of_motor(RECORDS, partition)
        mine = table.filter(pyarrow.compute.equal(table["motor"], motor))
        assert_same({name: mine[name].to_numpy() for name in FIELD_NAMES}, expected)
        assert set(mine["partition"].to_pylist()) == {partition}
        at = mine["sampled_at"].cast(pyarrow.int64()).to_numpy()
        assert np.array_equal(at, expected["sampled_at_ns"])


async def test_csv_has_every_bit_of_the_log(journal: Path, tmp_path: Path) -> None:
    out = tmp_path / "log.csv"
    await export(journal, out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for partition, motor in MOTORS.items():
        mine = [row for row in rows if row["motor"] == motor]
        columns = {name: np.array([row[name] or "nan" for row in mine]).astype(RECORD[name]) for name in FIELD_NAMES}
        assert_same(columns, of_motor(RECORDS, partition))
    assert rows[0]["sampled_at"] == "2026-09-21 14:13:20.123456789Z"


async def test_columns_say_their_units_and_what_a_motor_does_not_tell_is_null(journal: Path, tmp_path: Path) -> None:
    out = tmp_path / "log.parquet"
    await export(journal, out)
    table = pyarrow.parquet.read_table(out)
    units = {field.name: field.metadata[b"unit"].decode() for field in table.schema if field.metadata}
    assert (units["position_rad"], units["velocity_rad_s"], units["temperature_c"]) == ("rad", "rad/s", "°C")
    assert table.schema.field("sampled_at").type == pyarrow.timestamp("ns", "UTC")
    assert table.schema.field("motor").type == pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    assert table["temperature_c"].null_count == np.isnan(RECORDS["temperature_c"]).sum()


async def test_rows_are_written_as_they_come_and_only_a_row_group_is_held(
    journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROW_GROUP", 1000)
    out = tmp_path / "log.parquet"
    held = []
    with ExportFile(out, "telemetry") as table:
        async with open_source(journal, ["telemetry"], "beginning") as log:
            async for part in log:
                assert isinstance(part, Samples)
                for first in range(0, len(part.records), 300):
                    some = slice(first, first + 300)
                    table.add(Samples(part.partition, part.motor, part.offsets[some], part.records[some], part.next))
                    held.append(table._held)
    assert max(held) < 1000
    groups = pyarrow.parquet.read_metadata(out)
    assert groups.num_rows == len(RECORDS)
    assert max(groups.row_group(number).num_rows for number in range(groups.num_row_groups)) < 1000 + 300


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
async def test_json_topics_have_common_columns_and_the_record_itself(
    journal: Path, tmp_path: Path, suffix: str
) -> None:
    def rows_of(topic: str) -> list[dict[str, Any]]:
        out = tmp_path / f"{topic}{suffix}"
        if suffix == ".parquet":
            found: list[dict[str, Any]] = pyarrow.parquet.read_table(out).drop_columns("at").to_pylist()
            return found
        with out.open(newline="") as file:
            return list(csv.DictReader(file))

    assert await export(journal, tmp_path / f"events{suffix}", "events") == 2
    late = next(row for row in rows_of("events") if row["motor"] == "joint2")
    assert (late["type"], late["json"].encode()) == ("motor.late", EVENT)
    assert [int(late[name]) for name in ("partition", "offset", "seq", "at_ns")] == [1, 0, 1, 3]
    await export(journal, tmp_path / f"outcomes{suffix}", "outcomes")
    (outcome,) = rows_of("outcomes")
    assert (outcome["command_id"], outcome["state"], outcome["reason"]) == ("c1", "rejected", "stale")
    assert outcome["detail"] == (None if suffix == ".parquet" else "")


def test_command_that_is_no_json_is_kept_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "commands.parquet"
    values = (b'{"id":"c1","kind":"stop"}', b'{"id":5}', b"[1]", b"nonsense \xff")
    with ExportFile(out, "commands") as table:
        entries = [LogEntry(offset, 0, 0, 9, "joint1", value) for offset, value in enumerate(values)]
        table.add(Entries("commands", 0, entries, Position(0, 4)))
    found = pyarrow.parquet.read_table(out)
    assert found["id"].to_pylist() == ["c1", None, None, None]
    assert found["json"].to_pylist() == [value.decode(errors="replace") for value in values]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_empty_span_is_a_table_without_rows(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"log{suffix}"
    with ExportFile(out, "telemetry"):
        pass
    if suffix == ".parquet":
        assert pyarrow.parquet.read_table(out).num_rows == 0
    else:
        assert out.read_text().count("\n") == 1


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_export_that_fails_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"log{suffix}"
    out.write_text("mine")
    with pytest.raises(LogError), ExportFile(out, "telemetry"):
        raise LogError
    assert (out.read_text(), [*tmp_path.iterdir()]) == ("mine", [out])


def test_other_suffix_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"log\.xlsx: must end in \.parquet or \.csv"):
        ExportFile(tmp_path / "log.xlsx", "telemetry")


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ExtraMissing, match=r"pyarrow is not installed: pip install 'servo-gateway\[export\]'"):
        ExportFile(tmp_path / "log.csv", "telemetry")
