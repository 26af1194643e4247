"""The log as a table, Parquet or CSV: one topic a file, a row a record, written in row groups with flat memory.

Rows come as the parts of the log come: those of a motor in their order, motors by turns. Time is there twice, as a
timestamp (UTC) and in whole nanoseconds. What a motor does not tell (NaN) is null, and nothing at all in CSV.
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gateway import extras
from gateway.log_reader import Entries, LogError, Samples, Topic, records
from gateway.telemetry import FIELD_NAMES, RECORD, UNITS

ROW_GROUP = 1 << 17  # rows: as many are held in memory, and lie together in the file

_TEXTS: dict[Topic, tuple[str, ...]] = {  # fields of the JSON that have a column of their own
    "events": ("type",),
    "outcomes": ("command_id", "state", "reason", "detail"),
    "commands": ("id", "kind"),
}


class ExportFile:
    """A table in the making: ``path`` leads to it when it is whole. Its format is the suffix, .parquet or .csv."""

    def __init__(self, path: Path, topic: Topic) -> None:
        """Raises LogError for another suffix, ExtraMissing without pyarrow."""
        if path.suffix not in _OPEN:
            raise LogError(f"{path}: must end in {' or '.join(_OPEN)}")
        self._arrow = extras.load("pyarrow", "export")
        self._schema = self._arrow.schema(_fields(self._arrow, topic))
        self.rows = 0
        self._path = path
        self._fresh = path.with_name(f".{path.name}.new")
        self._tables: list[Any] = []  # to be written together,
        self._held = 0  # and how many rows they have

    def __enter__(self) -> Self:
        self._writer = _OPEN[self._path.suffix](self._fresh, self._schema)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._writer:
                if error is None:
                    self._flush()
            if error is None:
                self._fresh.replace(self._path)
        finally:
            self._fresh.unlink(missing_ok=True)

    def add(self, part: Samples | Entries) -> None:
        """Append the records of ``part``, which is of the topic. Raises OSError where they cannot be written."""
        columns = _of_samples(part) if isinstance(part, Samples) else _of_entries(part)
        arrays = [self._arrow.array(columns[field.name], field.type, from_pandas=True) for field in self._schema]
        self._tables.append(self._arrow.Table.from_arrays(arrays, schema=self._schema))  # copies: ``part`` may go
        self._held += len(arrays[0])
        self.rows += len(arrays[0])
        if self._held >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._tables:
            self._writer.write_table(self._arrow.concat_tables(self._tables).unify_dictionaries())
        self._tables, self._held = [], 0


def _fields(arrow: Any, topic: Topic) -> list[Any]:
    name = arrow.dictionary(arrow.int32(), arrow.string())
    time = arrow.timestamp("ns", "UTC")
    if topic == "telemetry":
        fields = [arrow.field("sampled_at", time), arrow.field("motor", name), arrow.field("partition", arrow.uint16())]
        for field in FIELD_NAMES:
            unit = {"unit": UNITS[field]} if field in UNITS else None
            fields.append(arrow.field(field, arrow.from_numpy_dtype(RECORD[field]), metadata=unit))
        return fields
    return [
        arrow.field("at", time),
        arrow.field("motor", name),
        arrow.field("partition", arrow.uint16()),
        arrow.field("offset", arrow.int64()),
        arrow.field("stream", arrow.uint64()),
        arrow.field("seq", arrow.uint64()),
        arrow.field("at_ns", arrow.int64(), metadata={"unit": "ns"}),
        *(arrow.field(text, arrow.string()) for text in _TEXTS[topic]),
        arrow.field("json", arrow.string()),
    ]


def _of_samples(part: Samples) -> dict[str, Any]:
    return {
        "sampled_at": part.records["sampled_at_ns"],
        "motor": [part.motor] * len(part.records),
        "partition": part.records["partition"],
        **{field: part.records[field] for field in FIELD_NAMES},
    }


def _of_entries(part: Entries) -> dict[str, Any]:
    offsets, streams, seqs, times, keys, values = zip(*part.entries, strict=True)
    objects = [record.value for record in records(part)]
    return {
        "at": times,
        "motor": keys,
        "partition": [part.partition] * len(keys),
        "offset": offsets,
        "stream": streams,
        "seq": seqs,
        "at_ns": times,
        **{text: [_text(value.get(text)) for value in objects] for text in _TEXTS[part.topic]},
        "json": [value.decode(errors="replace") for value in values],
    }


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _parquet(path: Path, schema: Any) -> Any:
    return extras.load("pyarrow.parquet", "export").ParquetWriter(path, schema, compression="zstd")


def _csv(path: Path, schema: Any) -> Any:
    return extras.load("pyarrow.csv", "export").CSVWriter(path, schema)


_OPEN: dict[str, Callable[[Path, Any], Any]] = {".parquet": _parquet, ".csv": _csv}
