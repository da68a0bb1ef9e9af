"""Files of columns: CSV, CSV.gz, Parquet and NPZ, read into one form.

Symbols: n rows of a file. A column [n] is a number, a flag (bool), a text, empty, or of a kind that cannot be used (a
date). Frame = {column name: Column}: the data of one client, before anything is drawn, filled or scaled. The texts of
`MISSING` count as missing values, in columns of every kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taciturn.core.errors import DataError, unknown

Array = NDArray[Any]
SUFFIXES = (".csv", ".csv.gz", ".parquet", ".npz")
MISSING = ["", "?", "NA", "N/A", "#N/A", "n/a", "NaN", "nan", "-nan", "NULL", "null", "None"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of one client. kind: "number" or "flag" (values float64 [n, ..], NaN: missing), "text" (values [n] of
    str or None), "empty" (all missing, fits every kind), or what it is instead, such as "timestamp[s]"."""

    kind: str
    values: Array


@dataclass(frozen=True, slots=True)
class Frame:
    """The columns of one client, all of n rows, and the file they came from (for messages)."""

    columns: dict[str, Column]
    file: str
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        lengths = {name: len(column.values) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{self.file}: columns of different length: {lengths}")
        object.__setattr__(self, "rows", next(iter(lengths.values()), 0))

    def take(self, rows: Array) -> Frame:
        """Some of the rows."""
        columns = {name: Column(column.kind, column.values[rows]) for name, column in self.columns.items()}
        return Frame(columns, self.file)

    def column(self, name: str) -> Column:
        """A column by name. Errors: `DataError` naming the file and the nearest columns."""
        if name not in self.columns:
            raise DataError(str(unknown("column", name, self.columns, self.file)))
        return self.columns[name]


def read(file: Path, *, delimiter: str = ",") -> Frame:
    """A CSV, CSV.gz, Parquet or NPZ file -> its columns. Errors: `DataError` naming the file."""
    if not file.is_file():
        raise DataError(f"{file} is {'not a file' if file.exists() else 'not there'}")
    if not stem(file):
        raise DataError(f"{file}: files end in {', '.join(SUFFIXES)}")
    try:
        columns = _read_npz(file) if file.suffix == ".npz" else _read_arrow(file, delimiter)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read: {error}") from error
    frame = Frame(columns, str(file))
    if frame.rows == 0:
        raise DataError(f"{file} has no row; remove it, or give this client data")
    return frame


def by_owner(frame: Frame, owner: str) -> dict[str, Frame]:
    """The rows of each owner, owners sorted."""
    column = frame.column(owner)
    if column.kind in ("number", "flag"):
        missing = np.isnan(column.values)
        values = column.values
    else:
        values = as_texts(column, owner, frame.file)
        missing = np.array([value is None for value in values])
    if missing.any():
        raise DataError(f"{frame.file}: {int(missing.sum())} rows have no {owner!r} (the first is row {missing.argmax()})")
    kept = Frame({name: column for name, column in frame.columns.items() if name != owner}, frame.file)
    found = np.unique(values)
    return {plain(value): kept.take(np.flatnonzero(values == value)) for value in found}


def stem(file: Path) -> str:
    """The name without its suffix, clinic.csv.gz -> "clinic"; "" if this is no file of ours."""
    suffix = next((suffix for suffix in sorted(SUFFIXES, key=len) if file.name.endswith(suffix)), "")
    return "" if file.name.startswith(".") or not suffix else file.name.removesuffix(suffix)


def _read_npz(file: Path) -> dict[str, Column]:
    columns = {}
    with np.load(file, allow_pickle=False) as arrays:
        for name in arrays.files:
            values = np.atleast_1d(arrays[name])
            if values.dtype.kind in "biuf":
                columns[name] = Column("flag" if values.dtype.kind == "b" else "number", values.astype(np.float64))
            elif values.dtype.kind == "U" and values.ndim == 1:
                columns[name] = Column("text", np.array([v if v not in MISSING else None for v in values], dtype=object))
            else:
                columns[name] = Column(f"{values.dtype} of rank {values.ndim}", np.zeros(len(values)))
    return columns


def _read_arrow(file: Path, delimiter: str) -> dict[str, Column]:
    try:
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file} is read with pyarrow, which is not here; pip install 'taciturn[tables]'") from error

    if file.suffix == ".parquet":
        arrow = pyarrow.parquet.read_table(file)
    else:
        arrow = pyarrow.csv.read_csv(
            file,
            read_options=pyarrow.csv.ReadOptions(block_size=1 << 26),  # the kinds are judged from the first 64 MiB
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter),
            convert_options=pyarrow.csv.ConvertOptions(null_values=MISSING, strings_can_be_null=True),
        )
    double = [name for name in arrow.column_names if arrow.column_names.count(name) > 1]
    if double:
        raise DataError(f"{file}: the column name {double[0]!r} occurs twice")
    return {name: _column(arrow[name]) for name in arrow.column_names}


def _column(values: Any) -> Column:
    """A pyarrow column -> Column."""
    from pyarrow import types

    kind = values.type
    if types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    if types.is_null(kind):
        return Column("empty", np.full(len(values), np.nan))
    if types.is_boolean(kind):
        return Column("flag", np.array([np.nan if v is None else float(v) for v in values.to_pylist()]))
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return Column("number", values.cast("float64", safe=False).to_numpy(zero_copy_only=False).astype(np.float64))
    if types.is_string(kind) or types.is_large_string(kind):
        texts = (None if v is None or v in MISSING else v for v in values.to_pylist())
        return Column("text", np.array(list(texts), dtype=object))
    return Column(str(kind), np.zeros(len(values)))


def as_texts(column: Column, name: str, file: str) -> Array:
    """The values of a text column, [n] of str or None. Errors: `DataError` for other kinds."""
    if column.kind not in ("text", "empty"):
        raise DataError(f"{file}: column {name!r} is {column.kind}; make it a number or a text")
    return column.values if column.kind == "text" else np.full(len(column.values), None, dtype=object)


def plain(value: Any) -> str:
    """A class or an owner as text: 3.0 -> "3"."""
    return str(int(value)) if not isinstance(value, str) and float(value).is_integer() else str(value)
