"""Data from the user's own files: one file a client, one file with an owner column, or one torch Dataset a client.

Symbols: S rows in all; F input features; a column [S] is a number, a flag (bool), a text, or of a kind that cannot be
used (a date). Frame = {column name: Column} of one client. From frames to a federation (`build`):

    drop rows without a target -> hold out each client's test and validation rows -> encode (text one-hot, flags 0/1)
    -> impute with the mean of the client's training rows, or of all training rows where a client has none
    -> standardize the numbers with mean and std over ALL clients' training rows (a constant column gets std 1)

One-hot and flag columns stay 0/1. In a deployment the categories, the classes, the means for imputation and the two
vectors of mean and std would be statistics that the clients share before training; here they are computed in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from taciturn.core.errors import DataError, require, unknown
from taciturn.tasks.data.clients import Federation, LazyClients, Samples, hold_out
from taciturn.tasks.data.columns import SUFFIXES, Array, Frame, as_texts, by_owner, plain, read, stem
from taciturn.tasks.data.splits import federation

CATEGORIES = 256  # more different texts in a column are taken for a mistake


@dataclass(frozen=True, slots=True)
class folder:
    """One file a client: every CSV, CSV.gz, Parquet or NPZ file of a folder; the client's name is the file's stem.

    target: the column to predict; inputs: the columns to predict it from, None: all other numbers and flags (texts only
    when named). NPZ files hold one array a column; an array [n, ..] of any rank is one column, and when it is the only
    input it keeps its shape (images).
    kind "classification": the sorted different targets (whole numbers, flags or texts) are the classes 0..C-1;
    "regression": target / `target_scale`, float32 [1]. test, validation: fractions of each client's rows, at random.
    standardize and missing values: see the top of this file; what was done is in `Federation.note`.
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

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        place = Path(self.path).expanduser()
        if not place.is_dir():
            raise DataError(f"{place} is {'a file, not a folder' if place.exists() else 'not there'}; give a folder")
        found = sorted(file for file in place.iterdir() if stem(file) and file.is_file())
        if not found:
            raise DataError(f"{place} holds no file that ends in {', '.join(SUFFIXES)}; each one would be a client")
        frames: dict[str, Frame] = {}
        for file in found:
            if stem(file) in frames:
                raise DataError(f"{file} and {frames[stem(file)].file} would both be client {stem(file)!r}; rename one")
            frames[stem(file)] = read(file, delimiter=self.delimiter)
        return build(frames, self, seed)


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

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        return build(by_owner(read(Path(self.path).expanduser(), delimiter=self.delimiter), self.owner), self, seed)


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


def build(frames: dict[str, Frame], source: Any, seed: int) -> Federation:
    """Frames by client and the fields of a source (target, inputs, kind, test, ..) -> its federation."""
    require(source.kind in ("classification", "regression"), f"kind: classification or regression; got {source.kind!r}")
    require(source.target_scale > 0, f"target_scale: above 0; got {source.target_scale}")
    inputs, notes = _choose(frames, source.target, source.inputs)
    frames, dropped = _with_target(frames, source.target)
    if dropped:
        notes.append(f"{dropped} rows without {source.target!r} dropped")
    ends = np.cumsum([frame.rows for frame in frames.values()])
    owners = {name: np.arange(end - frame.rows, end) for (name, frame), end in zip(frames.items(), ends, strict=True)}
    target, outputs, note = _targets(frames, source)
    parts = hold_out(owners, test=source.test, validation=source.validation, seed=seed)
    blocks = [_encode(frames, name) for name in inputs]
    values = np.concatenate([block for block, _, _ in blocks], axis=1)
    labels = [label for _, names, _ in blocks for label in names]
    scaled = np.array([kind == "number" for _, names, kind in blocks for _ in names])
    values, filled = impute(values, owners, parts[0], labels)
    if filled:
        notes.append(f"{filled} missing values imputed with the mean of the client's training rows, or of all")
    if source.standardize and scaled.any():
        values = np.where(scaled, standardize(values, parts[0]), values)
        notes.append("numbers standardized with mean and std over all clients' training rows")
    shape = frames[next(iter(frames))].column(inputs[0]).values.shape[1:] if len(inputs) == 1 else ()
    shown = ", ".join(labels[:24]) + (", .." if len(labels) > 24 else "")
    notes = [f"{len(frames)} clients, {len(values)} rows", note, f"{len(labels)} inputs: {shown}", *notes]
    fields = {"input": torch.from_numpy(values.astype(np.float32)).reshape(len(values), *(shape or (len(labels),)))}
    fields["target"] = torch.from_numpy(target)
    return federation(fields, parts, kind=source.kind, outputs=outputs, note="; ".join(notes))


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


def _choose(frames: dict[str, Frame], target: str, inputs: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The names of the inputs, and notes."""
    for frame in frames.values():
        frame.column(target)
    if inputs is not None:
        if not inputs or target in inputs or len(set(inputs)) != len(inputs):
            raise DataError(f"inputs: different columns other than the target {target!r}; got {list(inputs)}")
        for frame in frames.values():
            for name in inputs:
                frame.column(name)
        return list(inputs), []
    names = list(dict.fromkeys(name for frame in frames.values() for name in frame.columns if name != target))
    kinds = {name: {frame.columns[name].kind for frame in frames.values() if name in frame.columns} for name in names}
    chosen = [name for name in names if kinds[name] - {"empty"} and kinds[name] <= {"number", "flag", "empty"}]
    left_out = [name for name in names if name not in chosen]
    for name in chosen:
        for frame in frames.values():
            if name not in frame.columns:
                raise DataError(f"{unknown('column', name, frame.columns, frame.file)}; other files have it: set inputs")
    if not chosen:
        raise DataError(f"no column but {target!r} holds numbers; name the inputs; columns: {', '.join(names) or 'none'}")
    return chosen, [f"columns without numbers left out: {', '.join(left_out)}"] if left_out else []


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


def _kind(frames: dict[str, Frame], name: str) -> str:
    """The kind of a column over all files. Errors: `DataError` naming both files when they disagree."""
    seen: dict[str, Frame] = {}
    for frame in frames.values():
        seen.setdefault(frame.column(name).kind, frame)
    seen.pop("empty", None)
    kinds = set(seen)
    if kinds <= {"number", "flag"}:
        return "flag" if kinds == {"flag"} else "number"
    if kinds == {"text"}:
        return "text"
    other = next((kind for kind in seen if kind not in ("number", "flag", "text")), "")
    if other:
        raise DataError(f"{seen[other].file}: column {name!r} is {other}; make it a number or a text")
    text = seen.pop("text")
    first = next(value for value in text.column(name).values if value is not None)
    raise DataError(
        f"column {name!r} is text in {text.file} (such as {first!r}) but numbers in {next(iter(seen.values())).file}"
    )


def _targets(frames: dict[str, Frame], source: Any) -> tuple[Array, int, str]:
    """-> target ([S] int64, or [S, 1] float32), outputs, a note."""
    name, kind = source.target, _kind(frames, source.target)
    values = np.concatenate([frame.column(name).values.reshape(frame.rows) for frame in frames.values()])
    if kind != "text":
        _check_finite(values, name)
    if source.kind == "regression":
        if kind == "text":
            file = next(frame.file for frame in frames.values() if frame.column(name).kind == "text")
            raise DataError(f"{file}: regression needs numbers; the target {name!r} is text such as {values[0]!r}")
        unit = f" in units of {source.target_scale:g}" if source.target_scale != 1 else ""
        return (values / source.target_scale).astype(np.float32)[:, None], 1, f"target {name!r}{unit}"
    if kind != "text" and (values % 1 != 0).any():
        bad = values[values % 1 != 0][0]
        raise DataError(
            f"the target {name!r} has {bad:g}, which is no class: classes are whole numbers, flags or texts; "
            'for other numbers set kind = "regression"'
        )
    classes, codes = np.unique(values.astype(str) if kind == "text" else values, return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"the target {name!r} is {plain(classes[0])!r} in every row of every client; nothing to learn")
    shown = ", ".join(plain(value) for value in classes[:12]) + (", .." if len(classes) > 12 else "")
    return codes.reshape(-1).astype(np.int64), len(classes), f"target {name!r} with classes {shown}"


def _encode(frames: dict[str, Frame], name: str) -> tuple[Array, list[str], str]:
    """A column of all clients -> (values [S, k] float64 with NaN for missing, k labels, kind)."""
    kind = _kind(frames, name)
    if kind == "text":
        texts = np.concatenate([as_texts(frame.column(name), name, frame.file) for frame in frames.values()])
        found = sorted({text for text in texts if text is not None})
        if len(found) > CATEGORIES:
            raise DataError(
                f"column {name!r} holds {len(found)} different texts (up to {CATEGORIES}); leave it out of inputs"
            )
        one_hot = np.array([[np.nan] * len(found) if t is None else [t == c for c in found] for t in texts], dtype=float)
        return one_hot, [f"{name}={text}" for text in found], kind
    shapes = {frame.column(name).values.shape[1:]: frame.file for frame in frames.values()}
    if len(shapes) > 1:
        raise DataError(
            f"column {name!r} has different shapes: {', '.join(f'{list(s)} in {f}' for s, f in shapes.items())}"
        )
    values = np.concatenate([frame.column(name).values for frame in frames.values()])
    values = values.reshape(len(values), -1)
    _check_finite(values[~np.isnan(values)], name)
    return values, [name] if values.shape[1] == 1 else [f"{name}[{i}]" for i in range(values.shape[1])], kind


def _check_finite(values: Array, name: str) -> None:
    if np.isinf(values).any():
        raise DataError(f"column {name!r} holds infinite values; mark them as missing")
