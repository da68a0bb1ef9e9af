"""What parties that see only their own data must agree on before a run: a federation without its samples.

    survey   of one client: its numbers of samples, its columns with their kinds, sums over its training rows, its classes
    part     the surveys of a site, as JSON: what a site gives away
    outline  merged from parts, as JSON: sizes of every client; inputs, categories, classes; means and deviations over all

One place where all data lie surveys each client and merges as the sites do, in the same order, so both give the same bits.

Symbols: n training rows of a client; k values of a column in a row; F values of all inputs in a row. Over clients i, with
n_i rows of which s_i have a value, t_i the sum of these and m2_i of their squared distances from their mean t_i / s_i:

    fill = sum_i t_i / sum_i s_i       m_i = t_i / s_i, or fill where s_i = 0
    center = sum_i n_i m_i / sum_i n_i
    scale^2 = sum_i (m2_i + n_i (m_i - center)^2) / sum_i n_i           a missing value counts as the m_i of its client
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taciturn.core.errors import DataError, unknown
from taciturn.tasks.data.columns import Array, Frame, as_texts, plain

FORMAT = 1
CATEGORIES = 256  # more different texts in a column are taken for a mistake
LOCAL = ("path", "outline")  # fields of a source that a party has of its own
Table = dict[str, Any]  # what JSON can hold


@dataclass(frozen=True, slots=True)
class Outline:
    """settings: of the source, and the seed; clients {name: {"site", "samples": [train, validation, test]}};
    inputs {column: {"kind", "shape", "texts"}} in order; target {"kind", "classes"}; fill, center, scale [F].
    """

    settings: Table
    clients: Table
    inputs: Table
    left_out: list[str]
    target: Table
    fill: list[float]
    center: list[float]
    scale: list[float]

    @property
    def labels(self) -> list[str]:
        """Names of the values of a row [F]."""
        return [label for name, column in self.inputs.items() for label in _labels(name, column)]

    @property
    def scaled(self) -> Array:
        """Which of them are numbers [F] bool."""
        return np.array([c["kind"] == "number" for name, c in self.inputs.items() for _ in _labels(name, c)], dtype=bool)

    @property
    def shape(self) -> list[int]:
        """Of the input of a sample: [F], or that of the only column."""
        shapes = [column["shape"] for column in self.inputs.values()]
        return shapes[0] if len(shapes) == 1 and shapes[0] else [len(self.labels)]


def settings_of(source: Any, seed: int) -> Table:
    """What parties must have alike of `[data]`, and the seed."""
    mine = {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.name not in LOCAL}
    told: Table = json.loads(json.dumps({"name": type(source).__name__} | mine | {"seed": seed}))
    return told


# -------------------------------------------------------------------------------------------------------- of one client


def survey(frame: Frame, train: Array, samples: Sequence[int], source: Any) -> Table:
    """Of a client: frame, whose rows all have a target; train [n]: its training rows; samples: of its three parts."""
    if source.inputs is not None:
        names = list(source.inputs)
        if not names or source.target in names or len(set(names)) != len(names):
            raise DataError(f"inputs: different columns other than the target {source.target!r}; got {names}")
        columns = {name: _column(frame, name, train) for name in names}
    else:
        names = [name for name in frame.columns if name != source.target]
        number = {name for name in names if frame.columns[name].kind in ("number", "flag", "empty")}
        columns = {n: _column(frame, n, train) if n in number else {"kind": frame.columns[n].kind} for n in names}
    return {"samples": list(samples), "columns": columns, "target": _target(frame, source)}


def _column(frame: Frame, name: str, train: Array) -> Table:
    """kind, shape of a row's values, and over the training rows: how many have a value, their sum and squares [k]; of
    texts: how many rows each category has."""
    column = frame.column(name)
    if column.kind == "text":
        texts = as_texts(column, name, frame.file)
        found = _few(sorted({text for text in texts if text is not None}), name)
        counts = {text: int((texts[train] == text).sum()) for text in found}
        return {"kind": "text", "shape": [], "seen": sum(counts.values()), "texts": counts}
    if column.kind not in ("number", "flag", "empty"):
        raise DataError(f"{frame.file}: column {name!r} is {column.kind}; make it a number or a text")
    values = column.values.reshape(frame.rows, -1)
    check_finite(values[~np.isnan(values)], name)
    values, here = values[train], ~np.isnan(values[train])
    seen, total = here.sum(axis=0), np.where(here, values, 0.0).sum(axis=0, dtype=np.float64)
    squares = np.where(here, values - total / np.maximum(seen, 1), 0.0) ** 2
    told = {"seen": seen.tolist(), "sum": total.tolist(), "squares": squares.sum(axis=0, dtype=np.float64).tolist()}
    return {"kind": column.kind, "shape": list(column.values.shape[1:])} | told


def _few(texts: list[str], name: str) -> list[str]:
    if len(texts) > CATEGORIES:
        raise DataError(f"column {name!r} holds {len(texts)} different texts (up to {CATEGORIES}); leave it out of inputs")
    return texts


def _target(frame: Frame, source: Any) -> Table:
    """kind and classes of a client; a regression has none."""
    name, column = source.target, frame.column(source.target)
    values = column.values.reshape(frame.rows)
    if column.kind == "text":
        if source.kind == "regression":
            raise DataError(f"{frame.file}: regression needs numbers; the target {name!r} is text such as {values[0]!r}")
        return {"kind": "text", "classes": sorted(set(values.tolist()))}
    if column.kind not in ("number", "flag"):
        raise DataError(f"{frame.file}: column {name!r} is {column.kind}; make it a number or a text")
    check_finite(values, name)
    if source.kind == "regression":
        return {"kind": column.kind, "classes": []}
    if (values % 1 != 0).any():
        bad = values[values % 1 != 0][0]
        raise DataError(
            f"the target {name!r} has {bad:g}, which is no class: classes are whole numbers, flags or texts; "
            'for other numbers set kind = "regression"'
        )
    return {"kind": column.kind, "classes": np.unique(values).tolist()}


def check_finite(values: Array, name: str) -> None:
    """Errors: `DataError` naming the column."""
    if np.isinf(values).any():
        raise DataError(f"column {name!r} holds infinite values; mark them as missing")


# ------------------------------------------------------------------------------------------------------------- of all


def in_order(names: Sequence[str], settings: Table) -> list[str]:
    """Clients in the order of their numbers: owners of a table that are all numbers by size, other names as texts."""
    with_owner = "owner" in settings
    try:
        return sorted(names, key=lambda name: (float(name), name)) if with_owner else sorted(names)
    except ValueError:
        return sorted(names)


def merge(surveys: Table, where: dict[str, str], settings: Table, sites: dict[str, int] | None = None) -> Outline:
    """Surveys by client, in order -> what all agree on. where: files of each, for messages. Errors: `DataError`."""
    inputs, left_out = _inputs(surveys, where, settings)
    target = {name: one["target"] for name, one in surveys.items()}
    kind = _kind(target, where, settings["target"])
    classes = sorted({value for one in target.values() for value in one["classes"]})
    if settings["kind"] == "classification" and len(classes) < 2:
        only = plain(classes[0]) if classes else "nothing"
        raise DataError(f"the target {settings['target']!r} is {only!r} in every row of every client; nothing to learn")
    clients = {name: {"site": (sites or {}).get(name, 0), "samples": one["samples"]} for name, one in surveys.items()}
    found = Outline(settings, clients, inputs, left_out, {"kind": kind, "classes": classes}, [], [], [])
    fill, center, scale = _statistics(surveys, found)
    return dataclasses.replace(found, fill=fill.tolist(), center=center.tolist(), scale=scale.tolist())


def _inputs(surveys: Table, where: dict[str, str], settings: Table) -> tuple[Table, list[str]]:
    """The columns that are inputs, and those that are not."""
    told = {name: one["columns"] for name, one in surveys.items()}
    names = list(dict.fromkeys(column for columns in told.values() for column in columns))
    chosen = names
    if settings["inputs"] is None:
        kinds = {name: {columns[name]["kind"] for columns in told.values() if name in columns} for name in names}
        chosen = [name for name in names if kinds[name] - {"empty"} and kinds[name] <= {"number", "flag", "empty"}]
    if not chosen:
        shown = ", ".join(names) or "none"
        raise DataError(f"no column but {settings['target']!r} holds numbers; name the inputs; columns: {shown}")
    inputs: Table = {}
    for name in chosen:
        for client, columns in told.items():
            if name not in columns:
                raise DataError(f"{unknown('column', name, columns, where[client])}; other files have it: set inputs")
        each = {client: columns[name] for client, columns in told.items()}
        kind = _kind(each, where, name)
        shapes = {tuple(one["shape"]): where[client] for client, one in each.items()}
        if len(shapes) > 1:
            shown = ", ".join(f"{list(shape)} in {file}" for shape, file in shapes.items())
            raise DataError(f"column {name!r} has different shapes: {shown}")
        inputs[name] = {"kind": kind, "shape": list(next(iter(shapes)))}
        if kind == "text":
            inputs[name]["texts"] = _few(sorted({t for one in each.values() for t in one.get("texts", ())}), name)
    return inputs, [name for name in names if name not in inputs]


def _kind(each: Table, where: dict[str, str], name: str) -> str:
    """The kind of a column over all clients. Errors: `DataError` naming both files when they disagree."""
    seen = {one["kind"]: client for client, one in reversed(each.items()) if one["kind"] != "empty"}
    if "text" not in seen:
        return "flag" if set(seen) == {"flag"} else "number"
    text = seen.pop("text")
    if seen:
        first = next(iter(each[text].get("texts") or each[text].get("classes")))
        other = where[next(iter(seen.values()))]
        raise DataError(f"column {name!r} is text in {where[text]} (such as {first!r}) but numbers in {other}")
    return "text"


def _labels(name: str, column: Table) -> list[str]:
    if column["kind"] == "text":
        return [f"{name}={text}" for text in column["texts"]]
    k = math.prod(column["shape"])
    return [name] if k == 1 else [f"{name}[{i}]" for i in range(k)]


def sums(one: Table, inputs: Table) -> Array:
    """Of a client's survey: values seen, their sum, their squares [3, F]."""
    rows = []
    for name, told in inputs.items():
        mine = one["columns"][name]
        if told["kind"] == "text":
            counts = [float(mine.get("texts", {}).get(text, 0)) for text in told["texts"]]
            seen = float(mine["seen"]) if mine["kind"] == "text" else 0.0
            rows.append([[seen] * len(counts), counts, [0.0] * len(counts)])
        else:
            rows.append([mine["seen"], mine["sum"], mine["squares"]])
    return np.concatenate([np.array(row, dtype=np.float64) for row in rows], axis=1)


def means(one: Table, outline: Outline) -> Array:
    """[F] what stands in for a client's missing values: the mean of its training rows, or of all where it has none."""
    seen, total, _ = sums(one, outline.inputs)
    found: Array = np.where(seen > 0, total / np.maximum(seen, 1), np.array(outline.fill))
    return found


def _statistics(surveys: Table, outline: Outline) -> tuple[Array, Array, Array]:
    """fill, center, scale [F], as at the top; a constant column has scale 1."""
    told = np.stack([sums(one, outline.inputs) for one in surveys.values()])
    seen, total = told[:, 0].sum(axis=0), told[:, 1].sum(axis=0)
    for place in np.flatnonzero(seen == 0).tolist():
        label = outline.labels[place]
        raise DataError(f"column {label!r} has no value in any client's training rows; leave it out of inputs")
    fill = total / seen
    each = np.where(told[:, 0] > 0, told[:, 1] / np.maximum(told[:, 0], 1), fill)
    n = np.array([one["samples"][0] for one in surveys.values()], dtype=np.float64)[:, None]
    center = (n * each).sum(axis=0) / n.sum()
    scale = np.sqrt((told[:, 2] + n * (each - center) ** 2).sum(axis=0) / n.sum())
    return fill, center, np.where(scale > 1e-9 * np.maximum(np.abs(center), 1e-9), scale, 1.0)


# ------------------------------------------------------------------------------------------------------ between parties


def part_text(surveys: Table, settings: Table) -> str:
    """What a site gives away, as JSON."""
    told = {"format": FORMAT, "part": True, "settings": settings, "clients": surveys}
    return json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False)


def merged_text(parts: Sequence[Path]) -> str:
    """The parts of sites 0, 1, .. -> the outline, as JSON. Errors: `DataError` naming the files that disagree."""
    if not parts:
        raise DataError("an outline is merged from the parts of all sites; none was given")
    told = [_json(path, part=True) for path in parts]
    where: dict[str, str] = {}
    sites: dict[str, int] = {}
    for site, (path, one) in enumerate(zip(parts, told, strict=True)):
        if differ := differing(told[0]["settings"], one["settings"]):
            raise DataError(f"{path} was made with other settings than {parts[0]}: {differ}; give all the same TOML")
        for name in one["clients"]:
            if name in where:
                raise DataError(f"{path} and {where[name]} both have a client {name!r}; rename one")
            where[name], sites[name] = str(path), site
    settings, all_of = told[0]["settings"], {name: one for part in told for name, one in part["clients"].items()}
    try:
        outline = merge({name: all_of[name] for name in in_order(list(all_of), settings)}, where, settings, sites)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{', '.join(map(str, parts))}: not parts of an outline: {error!r}") from error
    classes = settings["kind"] == "classification"
    fields = {
        "input": {"shape": outline.shape, "dtype": "float32"},
        "target": {"shape": [] if classes else [1], "dtype": "int64" if classes else "float32"},
    }
    whole = {"format": FORMAT, "part": False} | dataclasses.asdict(outline) | {"fields": fields}
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)


def differing(before: Table, now: Table) -> str:
    """The settings that are not alike, with both values; or ""."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} = {now.get(name)!r} instead of {before.get(name)!r}" for name in changed)


def _json(path: Path, *, part: bool) -> Table:
    wanted = "a part of an outline, as `taciturn deploy outline FILE.toml` writes it" if part else "a merged outline"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {wanted} is needed") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not {wanted}: {error}") from error
    if not isinstance(told, dict) or (told.get("format"), told.get("part")) != (FORMAT, part):
        raise DataError(f"{path} is not {wanted} (format {FORMAT})")
    if not isinstance(told.get("settings"), dict) or not isinstance(told.get("clients"), dict) or not told["clients"]:
        raise DataError(f"{path} is not {wanted}: settings or clients are missing")
    return told


def read_outline(path: Path, settings: Table) -> Outline:
    """A file that `merged_text` wrote. settings: of who reads it. Errors: `DataError` naming file and setting."""
    told = _json(path, part=False)
    if differ := differing(told["settings"], settings):
        raise DataError(f"{path} was agreed on with other settings: now {differ}")
    try:
        found = Outline(**{field.name: told[field.name] for field in dataclasses.fields(Outline)})
        whole = len(found.labels) == len(found.fill) == len(found.center) == len(found.scale)
        whole &= all(len(one["samples"]) == 3 and one["site"] >= 0 for one in found.clients.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no outline that can be used: {error!r}") from error
    if not whole:
        raise DataError(f"{path} is no outline that can be used: statistics of {len(found.labels)} values are needed")
    return found


def content(path: Path) -> str:
    """A hash of what an outline says, whatever its layout."""
    return hashlib.sha256(json.dumps(_json(path, part=False), sort_keys=True).encode()).hexdigest()


def check(surveys: Table, where: dict[str, str], outline: Outline, path: Path) -> None:
    """Are the clients that are here as the outline says? Errors: `DataError` naming file, client and what differs."""
    for name, one in surveys.items():
        if name not in outline.clients:
            raise DataError(f"{where[name]}: {path} knows no client {name!r}; it has {', '.join(outline.clients)[:200]}")
        parts = list(zip(("training", "validation", "test"), one["samples"], outline.clients[name]["samples"], strict=True))
        if wrong := [f"{mine} {part} samples instead of {theirs}" for part, mine, theirs in parts if mine != theirs]:
            raise DataError(f"{where[name]}: client {name!r} has {', '.join(wrong)} in {path}: agree on an outline again")
        for column, told in outline.inputs.items():
            if column not in one["columns"]:
                raise DataError(f"{unknown('column', column, one['columns'], where[name])}; {path} has it")
            mine = one["columns"][column]
            fits = {"text": ("text",), "number": ("number", "flag"), "flag": ("flag",)}[told["kind"]]
            if mine["kind"] not in (*fits, "empty") or mine.get("shape") != told["shape"]:
                raise DataError(
                    f"{where[name]}: column {column!r} is {mine['kind']} {mine.get('shape', '')}, and {path} says "
                    f"{told['kind']} {told['shape']}"
                )
            if new := sorted(mine.get("texts", {}).keys() - set(told.get("texts", ()))):
                raise DataError(f"{where[name]}: column {column!r} has {new[0]!r}, which {path} does not know")
        if new := [value for value in one["target"]["classes"] if value not in outline.target["classes"]]:
            raise DataError(f"{where[name]}: the target has the class {plain(new[0])!r}, which {path} does not know")
