"""Data from the user's own files: one file a client, one file with an owner column, or one torch Dataset a client.

Symbols: S rows in all; F input features; a column [S] is a number, a flag (bool), a text, or of a kind that cannot be
used (a date). Frame = {column name: Column} of one client. From frames to a federation (`build`):

    drop rows without a target -> hold out each client's test and validation rows -> encode (text one-hot, flags 0/1)
    -> impute with the mean of the client's training rows, or of all training rows where a client has none
    -> standardize the numbers with mean and std over ALL clients' training rows (a constant column gets std 1)

One-hot and flag columns stay 0/1. The categories, the classes, the means for imputation and the two vectors of mean and
std are statistics over all clients (outline.py): merged here, or read from an outline that sites agreed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from taciturn.core import random
from taciturn.core.errors import DataError, require
from taciturn.core.random import Key
from taciturn.tasks.data.clients import Federation, LazyClients, PartClients, Samples, TableClients, divided
from taciturn.tasks.data.columns import SUFFIXES, Array, Frame, as_texts, by_owner, plain, read, stem
from taciturn.tasks.data.outline import (
    Outline,
    Table,
    check,
    in_order,
    means,
    merge,
    part_text,
    read_outline,
    settings_of,
    survey,
)
from taciturn.tasks.data.splits import federation


@dataclass(frozen=True, slots=True)
class folder:
    """One file a client: every CSV, CSV.gz, Parquet or NPZ file of a folder; the client's name is the file's stem.

    target: the column to predict; inputs: the columns to predict it from, None: all other numbers and flags (texts only
    when named). NPZ files hold one array a column; an array [n, ..] of any rank is one column, and when it is the only
    input it keeps its shape (images).
    kind "classification": the sorted different targets (whole numbers, flags or texts) are the classes 0..C-1;
    "regression": target / `target_scale`, float32 [1]. test, validation: fractions of each client's rows, at random.
    standardize and missing values: see the top of this file; what was done is in `Federation.note`.
    outline: the file on which sites with only their own data agreed (`taciturn deploy outline`); clients without a file
    here are then known by their sizes alone.
    Errors: `DataError` naming file and column.
    """

    path: str
    target: str = "target"
    inputs: tuple[str, ...] | None = None
    kind: Literal["classification", "regression"] = "classification"
    test: float = 0.2
    validation: float = 0.0
    standardize: bool = True
    target_scale: float = 1.0
    delimiter: str = ","
    outline: str | None = None

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        return _loaded(self, seed)

    def frames(self) -> dict[str, Frame]:
        """The files that are here, by client."""
        place = Path(self.path).expanduser()
        if not place.is_dir():
            raise DataError(f"{place} is {'a file, not a folder' if place.exists() else 'not there'}; give a folder")
        found = sorted((file for file in place.iterdir() if stem(file) and file.is_file()), key=lambda file: file.name)
        if not found:
            raise DataError(f"{place} holds no file that ends in {', '.join(SUFFIXES)}; each one would be a client")
        frames: dict[str, Frame] = {}
        for file in found:
            if stem(file) in frames:
                raise DataError(f"{file} and {frames[stem(file)].file} would both be client {stem(file)!r}; rename one")
            frames[stem(file)] = read(file, delimiter=self.delimiter)
        return frames


@dataclass(frozen=True, slots=True)
class table:
    """One file (CSV, CSV.gz, Parquet, NPZ) in which the column `owner` says whose row it is; the rest as in `folder`.

    Clients are the sorted different owners. Errors: `DataError` also for rows without an owner.
    """

    path: str
    owner: str = "owner"
    target: str = "target"
    inputs: tuple[str, ...] | None = None
    kind: Literal["classification", "regression"] = "classification"
    test: float = 0.2
    validation: float = 0.0
    standardize: bool = True
    target_scale: float = 1.0
    delimiter: str = ","
    outline: str | None = None

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        return _loaded(self, seed)

    def frames(self) -> dict[str, Frame]:
        """The rows that are here, by client."""
        return by_owner(read(Path(self.path).expanduser(), delimiter=self.delimiter), self.owner)


def datasets(given: Sequence[Samples], names: Sequence[str] | None = None) -> LazyClients:
    """One torch Dataset a client, read when a batch needs its samples; names: "client-0", .. unless given.

    >>> datasets([[(torch.zeros(2), torch.tensor(1))]], names=["clinic"]).sizes
    tensor([1])
    """
    named = tuple(names) if names is not None else tuple(f"client-{i}" for i in range(len(given)))
    if len(named) != len(given) or len(set(named)) != len(named):
        raise DataError(f"{len(given)} datasets need as many different names; got {len(named)}: {list(named)[:10]}")
    return LazyClients(named, tuple(given))


# ------------------------------------------------------------------------------------------------------ building


def _loaded(source: folder | table, seed: int) -> Federation:
    """The federation of the user's files. With an outline a path where nothing is has no client."""
    settings = settings_of(source, seed)
    outline = None if source.outline is None else read_outline(Path(source.outline).expanduser(), settings)
    nothing = outline is not None and not (source.path and Path(source.path).expanduser().exists())
    frames = {} if nothing else source.frames()
    frames = {name: frames[name] for name in in_order(list(frames), settings)}
    return build(frames, source, _keys(frames, seed), outline)


def _keys(frames: dict[str, Frame], seed: int) -> dict[str, Key]:
    """Of each client's draw of held-out rows: by its name, so that who else takes part changes nothing."""
    return {name: random.fold(random.key(seed), "hold_out", name) for name in frames}


def part_of(source: Any, seed: int) -> str:
    """What a site gives away for an outline (outline.py), from its own files, as JSON. Errors: `DataError`."""
    if not isinstance(source, folder | table):
        raise DataError(f"an outline is of data.folder or data.table; got {type(source).__name__}")
    frames = source.frames()
    _, surveys, _, _ = surveyed(frames, source, _keys(frames, seed))
    return part_text(surveys, settings_of(source, seed))


def build(frames: dict[str, Frame], source: Any, keys: dict[str, Key], outline: Outline | None = None) -> Federation:
    """Frames by client and the fields of a source (target, inputs, kind, test, ..) -> its federation.

    keys: of each client's draw of held-out rows. outline: agreed on, of more clients than are here.
    """
    frames, surveys, parts, dropped = surveyed(frames, source, keys)
    where = {name: frame.file for name, frame in frames.items()}
    if outline is None:
        fields = ("target", "inputs", "kind")
        outline = merge(surveys, where, {name: getattr(source, name) for name in fields})
    else:
        check(surveys, where, outline, Path(source.outline))
    values, target, filled = _encoded(frames, surveys, outline, source)
    labels, clients = outline.labels, outline.clients
    if source.standardize and outline.scaled.any():
        values = np.where(outline.scaled, (values - np.array(outline.center)) / np.array(outline.scale), values)
    rows = sum(sum(one["samples"]) for one in clients.values())
    shown = ", ".join(labels[:24]) + (", .." if len(labels) > 24 else "")
    notes = [f"{len(clients)} clients, {rows} rows", _told(source, outline), f"{len(labels)} inputs: {shown}"]
    notes += [f"columns without numbers left out: {', '.join(outline.left_out)}"] if outline.left_out else []
    notes += [f"{dropped} rows without {source.target!r} dropped"] if dropped else []
    if filled:
        notes.append(f"{filled} missing values imputed with the mean of the client's training rows, or of all")
    if source.standardize and outline.scaled.any():
        notes.append("numbers standardized with mean and std over all clients' training rows")
    outputs = len(outline.target["classes"]) or 1
    tables = {"input": torch.from_numpy(values.astype(np.float32)).reshape(len(values), *outline.shape)}
    tables["target"] = torch.from_numpy(target)
    if outline.clients.keys() <= frames.keys():
        found = federation(tables, parts, kind=source.kind, outputs=outputs, note="; ".join(notes))
    else:
        found = _partly(tables, parts, outline, kind=source.kind, outputs=outputs, note="; ".join(notes))
    return replace(found, homes=tuple(one["site"] for one in clients.values()) if getattr(source, "outline", None) else ())


def surveyed(
    frames: dict[str, Frame], source: Any, keys: dict[str, Key]
) -> tuple[dict[str, Frame], Table, tuple[dict[str, Any], dict[str, Any], dict[str, Any]], int]:
    """-> (frames of the rows that have a target, surveys, rows of (train, validation, test) by client, rows dropped).

    Rows are numbered through all frames.
    """
    require(source.kind in ("classification", "regression"), f"kind: classification or regression; got {source.kind!r}")
    require(source.target_scale > 0, f"target_scale: above 0; got {source.target_scale}")
    frames, dropped = _with_target(frames, source.target)
    parts: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = ({}, {}, {})
    surveys: Table = {}
    first = 0
    for name, frame in frames.items():
        cut = divided(np.arange(frame.rows), keys[name], test=source.test, validation=source.validation)
        surveys[name] = survey(frame, cut[0], [len(rows) for rows in cut], source)
        for part, rows in zip(parts, cut, strict=True):
            if len(rows):
                part[name] = rows + first
        first += frame.rows
    return frames, surveys, parts, dropped


def _encoded(frames: dict[str, Frame], surveys: Table, outline: Outline, source: Any) -> tuple[Array, Array, int]:
    """-> inputs without gaps [S, F] float64, targets ([S] int64, or [S, 1] float32), how many values were missing."""
    values, targets, filled = [np.zeros((0, len(outline.labels)))], [], 0
    classes = np.array(outline.target["classes"])
    for name, frame in frames.items():
        blocks = [_encode(frame, column, told) for column, told in outline.inputs.items()]
        block = np.concatenate(blocks, axis=1)
        missing = np.isnan(block)
        values.append(np.where(missing, means(surveys[name], outline), block))
        filled += int(missing.sum())
        mine = frame.column(source.target).values.reshape(frame.rows)
        mine = mine.astype(str) if outline.target["kind"] == "text" else mine
        regression = source.kind == "regression"
        targets.append(mine / source.target_scale if regression else np.searchsorted(classes, mine))
    joined = np.concatenate(targets) if targets else np.zeros(0)
    target = joined.astype(np.float32)[:, None] if source.kind == "regression" else joined.astype(np.int64)
    return np.concatenate(values), target, filled


def _encode(frame: Frame, name: str, told: Table) -> Array:
    """A column -> [n, k] float64 with NaN for missing; texts one-hot."""
    if told["kind"] != "text":
        return frame.column(name).values.reshape(frame.rows, -1)
    found, texts = told["texts"], as_texts(frame.column(name), name, frame.file)
    rows = [[np.nan] * len(found) if t is None else [t == c for c in found] for t in texts]
    return np.array(rows, dtype=float).reshape(frame.rows, len(found))


def _told(source: Any, outline: Outline) -> str:
    """The target, for the note."""
    if source.kind == "regression":
        return f"target {source.target!r}" + (f" in units of {source.target_scale:g}" if source.target_scale != 1 else "")
    classes = outline.target["classes"]
    shown = ", ".join(plain(value) for value in classes[:12]) + (", .." if len(classes) > 12 else "")
    return f"target {source.target!r} with classes {shown}"


def _partly(fields: dict[str, Tensor], parts: Sequence[dict[str, Any]], outline: Outline, **facts: Any) -> Federation:
    """The federation of an outline, of whose clients some have their samples here."""
    example = {"input": torch.linspace(0.5, 1.5, len(outline.labels)).reshape(outline.shape)}  # its mean is not 0
    example["target"] = torch.zeros(() if facts["kind"] == "classification" else (1,), dtype=fields["target"].dtype)
    splits: list[PartClients | None] = []
    for place, part in enumerate(parts):
        sizes = {name: one["samples"][place] for name, one in outline.clients.items() if one["samples"][place]}
        here = TableClients.of(fields, part) if part else None
        splits.append(PartClients.of(sizes, here, {} if place else example) if sizes else None)
    train, validation, test = splits
    if train is None:
        raise DataError("there is no client")
    absent = tuple(name for name in outline.clients if name not in parts[0])
    return Federation(train, validation=validation, test=test, absent=absent, **facts)


def impute(values: Array, owners: dict[str, Any], train: dict[str, Any], labels: Sequence[str]) -> tuple[Array, int]:
    """values [S, F] with NaN -> without, and how many there were.

    A missing value becomes the mean of its client's training rows, or of all training rows if the client has none.
    Errors: `DataError` for a column without any value in the training rows.
    """
    missing = np.isnan(values)
    if not missing.any():
        return values, 0
    total, seen = _sums(values[np.concatenate(list(train.values()))])
    for f in np.flatnonzero((seen == 0) & missing.any(axis=0)).tolist():
        raise DataError(f"column {labels[f]!r} has no value in any client's training rows; leave it out of inputs")
    values = values.copy()
    for name, rows in owners.items():
        part, count = _sums(values[train[name]])
        mean = np.where(count > 0, part / np.maximum(count, 1), total / np.maximum(seen, 1))
        values[rows] = np.where(missing[rows], mean, values[rows])
    return values, int(missing.sum())


def standardize(values: Array, train: dict[str, Any]) -> Array:
    """(values - mean) / std over all clients' training rows, [S, .., F] -> the same; constant columns get std 1."""
    seen = values[np.concatenate(list(train.values()))].reshape(-1, values.shape[-1])
    mean, std = seen.mean(axis=0, dtype=np.float64), seen.std(axis=0, dtype=np.float64)
    std = np.where(std > 1e-9 * np.maximum(np.abs(mean), 1e-9), std, 1.0)
    result: Array = ((values - mean) / std).astype(values.dtype)
    return result


def _sums(values: Array) -> tuple[Array, Array]:
    """Sum and count [F] of what is not missing."""
    return np.where(np.isnan(values), 0.0, values).sum(axis=0, dtype=np.float64), (~np.isnan(values)).sum(axis=0)


def _with_target(frames: dict[str, Frame], target: str) -> tuple[dict[str, Frame], int]:
    """The rows that have a target, and how many have none."""
    kept, dropped = {}, 0
    for name, frame in frames.items():
        values = frame.column(target).values
        if values.ndim > 1 and values[0].size != 1:
            raise DataError(
                f"{frame.file}: the target {target!r} has shape {list(values.shape[1:])} a row; one number is needed"
            )
        values = values.reshape(len(values))
        here = np.array([v is not None for v in values]) if values.dtype == object else ~np.isnan(values.astype(float))
        if not here.any():
            raise DataError(f"{frame.file}: no row of client {name!r} has a {target!r}; leave the client out")
        kept[name] = frame if here.all() else frame.take(np.flatnonzero(here))
        dropped += int((~here).sum())
    return kept, dropped
