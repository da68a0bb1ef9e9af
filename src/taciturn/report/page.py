"""The page: one HTML file that opens offline, on a phone, in the dark and on paper.

    read      run folders -> Run                    words     one sentence a method
    tables    Run -> rows of numbers                cells     rows -> text of table cells
    figures, drift, adapters   Run -> plotly figures     page.html.jinja + plotly.js, inlined once -> the file

Every text that comes from a run is escaped by the template; data of figures are embedded as JSON without `<`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.offline
from jinja2 import Environment, StrictUndefined

from taciturn.core.errors import RunError
from taciturn.core.state import write_atomic
from taciturn.report.adapters import adapter_figures
from taciturn.report.consensus import consensus_figures
from taciturn.report.drift import drift_figures, sync_facts
from taciturn.report.figures import figures
from taciturn.report.modes import mode_figures
from taciturn.report.plot import Figure
from taciturn.report.read import Run, read_run
from taciturn.report.tables import (
    Method,
    baselines,
    by_kind,
    human_bytes,
    human_seconds,
    is_fraction,
    methods,
    settings,
    summary,
)
from taciturn.report.timeline import fleet_facts, timeline_figures

TEMPLATE = Path(__file__).with_name("page.html.jinja")
SHOWN = 50  # rows of clients that were left out
NONE = "\u2013"


def write_report(folders: Sequence[Path], out: Path, target: float | None = None) -> Path:
    """Write one HTML page about the runs in `folders` (the first is the baseline) to the file `out`; returns `out`.

    `target` is the value of the metric that all are held to (see `tables.common_target` for the default). The file is
    whole or untouched; its parent folder is made. Raises `RunError` for a folder that cannot be read as a run, for runs
    of different metrics and for a file that cannot be written.
    """
    page = render([read_run(folder) for folder in folders], target)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    write_atomic(out, [page.encode()])
    return out


def render(runs: Sequence[Run], target: float | None = None) -> str:
    """The page as text. Raises `RunError` as `tables.methods` does."""
    groups, rows, fraction = methods(runs), summary(runs, target), is_fraction(runs)
    first = {row["name"]: row for row in rows}
    goals = list(dict.fromkeys(row["target"] for row in rows))
    goal = goals[0] if len(goals) == 1 else None
    plots = (
        figures(groups, goal)
        + timeline_figures(groups)
        + mode_figures(groups)
        + drift_figures(groups)
        + adapter_figures(groups)
        + consensus_figures(groups)
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=_title([group.label for group in groups]),
        sentences=[sentence(row, first[row["baseline"]], fraction) for row in rows],
        target=_target_text(rows, fraction),
        target_source=_target_source(runs, target),
        table=table(rows, fraction),
        measured_on=list(dict.fromkeys(str(run.header.get("measured_on") or "") for run in runs)),
        reasons=[row["ratio_reason"] for row in rows if row["ratio_reason"]],
        figures=plots,
        figure_data=embed(plots),
        left_out=left_out(groups),
        ledgers=[(group.label, ledger(group), ledger_note(group)) for group in groups],
        methods=[details(group, baselines(groups)[group.scenario]) for group in groups],
        plotly_js=plotly.offline.get_plotlyjs(),
    )


def _title(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 4 else f"{', '.join(labels[:3])} and {len(labels) - 3} more"


def embed(plots: Sequence[Figure]) -> str:
    """The figures as JSON that is safe inside a script element: no `<`, `>` or `&`, whatever a name holds."""
    data = {plot.key: json.loads(plot.plot.to_json()) for plot in plots if plot.plot is not None}
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# Words ---------------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    """A fraction as a percentage with one decimal, with an unbreakable space."""
    return f"{100 * value:.1f}\u00a0%"


def metric_value(value: float, fraction: bool) -> str:
    """A value of the metric: a percentage where the metric is a fraction."""
    return percent(value) if fraction else f"{value:.4g}"


def value_text(value: float, metric: str, fraction: bool) -> str:
    """A value of the metric with its name: "95.0 % accuracy", "loss 0.45"."""
    return f"{percent(value)} {metric}" if fraction else f"{metric} {value:.4g}"


def size(value: float) -> str:
    """A number of bytes in three digits, with an unbreakable space."""
    return human_bytes(value).replace(" ", "\u00a0")


def duration(seconds: float) -> str:
    """A time in three digits, with an unbreakable space."""
    return human_seconds(seconds).replace(" ", "\u00a0")


def count(value: float) -> str:
    """A count: whole, or with one decimal where it is a mean over seeds."""
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def sentence(row: Mapping[str, Any], first: Mapping[str, Any], fraction: bool) -> str:
    """What a method reached, in how many rounds and bytes, and against the baseline `first`, in plain words."""
    seeds, reached = len(row["seeds"]), row["reached"]
    name, metric, total = row["name"], row["metric"], row["bytes_up"] + row["bytes_down"]
    ran = f"{count(row['rounds'])} round{'' if row['rounds'] == 1 else 's'} with {size(total)}"
    if row["target"] is None:
        return f"{name} ran {ran}; there is no target to hold it to."
    goal = value_text(row["target"], metric, fraction)
    if reached < seeds:
        some = f"reached {goal} with {reached} of {seeds} seeds only" if reached else f"did not reach {goal}"
        top = "it was never evaluated" if row["best"] is None else f"its best was {metric_value(row['best'], fraction)}"
        return f"{name} {some} in {ran}; {top}."
    rounds = f"{count(row['rounds_to_target'])} round{'' if row['rounds_to_target'] == 1 else 's'}"
    mean = f" (mean of {seeds} seeds)" if seeds > 1 else ""
    text = f"{name} reached {goal} after {rounds} with {size(row['bytes_to_target'])}{mean}"
    if row is first:
        return f"{text}."
    if row["ratio"] is None:
        return f"{text}; {first['name']} did not." if first["reached"] < len(first["seeds"]) else f"{text}."
    saved = row["traffic_saved"]
    if abs(saved) < 0.005:
        return f"{text}, as much as {first['name']}."
    if saved < -1:
        return f"{text}, {1 - saved:.1f} times as much as {first['name']}."
    return f"{text}, {abs(100 * saved):.0f}\u00a0% {'less' if saved > 0 else 'more'} than {first['name']}."


def _target_text(rows: Sequence[Mapping[str, Any]], fraction: bool) -> str | None:
    """The target, or that of each scenario; None if there is none."""
    found = {row["scenario"]: row["target"] for row in rows if row["target"] is not None}
    if not found:
        return None
    if len(set(found.values())) == 1:
        return value_text(next(iter(found.values())), rows[0]["metric"], fraction)
    return "; ".join(f"{value_text(value, rows[0]['metric'], fraction)} where {name}" for name, value in found.items())


def _target_source(runs: Sequence[Run], target: float | None) -> str:
    if target is not None:
        return "given for this report"
    if runs[0].target is not None:
        return f"named by the configuration of {runs[0].name}"
    firsts = dict.fromkeys((group.runs[0].name, group.runs[0].seed) for group in baselines(methods(runs)).values())
    return f"2\u00a0% worse than the best of {' and '.join(f'{name}, seed {seed}' for name, seed in reversed(firsts))}"


# Tables --------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]], fraction: bool) -> dict[str, Any]:
    """Heads and cells of the summary table; mean +/- standard deviation where there are several seeds."""
    metric = rows[0]["metric"]

    def value(number: float) -> str:
        return metric_value(number, fraction)

    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("final", f"final {metric}", value),
        ("final_error", "final error", value),
        ("worst_decile", f"{metric}, worst 10\u00a0% of clients", value),
        ("rounds", "rounds", count),
        ("rounds_to_target", "rounds to target", count),
        ("bytes_up", "sent up", size),
        ("bytes_down", "sent down", size),
        ("bytes_to_target", "bytes to target", size),
        ("ratio", "times fewer bytes", lambda number: f"{number:.3g}\u00d7"),
        ("traffic_saved", "traffic saved", percent),
        ("simulated", "simulated time", duration),
        ("simulated_to_target", "simulated time to target", duration),
        ("seconds", "seconds", lambda number: f"{number:.3g}" if number < 100 else f"{number:.0f}"),
        ("left_out", "left out", count),
    ]
    if not fraction:
        columns = [column for column in columns if column[0] != "final_error"]  # it would repeat the metric
    if all(row["simulated"] is None for row in rows):  # old records
        columns = [column for column in columns if not column[0].startswith("simulated")]
    body = []
    for row in rows:
        cells = []
        for key, _, show in columns:
            cell = NONE if row[key] is None else show(row[key])
            if row["spread"].get(key):
                cell += f" \u00b1\u00a0{show(row['spread'][key])}"
            if key == "traffic_saved" and row[key] is not None and row["traffic_saved_basis"] == "whole run":
                cell += "*"
            cells.append(cell)
        body.append((row["name"], len(row["seeds"]), cells))
    return {"heads": [head for _, head, _ in columns], "rows": body}


def left_out(groups: Sequence[Method]) -> dict[str, Any]:
    """Clients that a round left out of the mean: method, seed, client, why, and in which rounds."""
    found: dict[tuple[str, int, str, str], list[int]] = {}
    for group in groups:
        for run in group.runs:
            for line in run.rounds:
                for entry in line.get("left_out") or []:
                    key = (group.label, run.seed, run.client(entry.get("client")), str(entry.get("why")))
                    found.setdefault(key, []).append(line["round"])
    rows = []
    for key, rounds in found.items():
        shown = ", ".join(map(str, rounds[:8])) + (f" and {len(rounds) - 8} more" if len(rounds) > 8 else "")
        rows.append((*key, shown))
    return {"rows": rows[:SHOWN], "more": max(0, len(rows) - SHOWN)}


def ledger(group: Method) -> list[tuple[str, ...]]:
    """Direction, kind, payload, frames, both, messages of the whole run; means over seeds."""
    totals: dict[str, list[float]] = {}
    for run in group.runs:
        for kind, counts in by_kind(run).items():
            entry = totals.setdefault(kind, [0.0, 0.0, 0.0])
            for index, name in enumerate(("payload", "frame", "messages")):
                entry[index] += counts[name] / len(group.runs)
    rows: list[tuple[str, ...]] = []
    for kind, (payload, frame, messages) in sorted(totals.items(), key=lambda item: -sum(item[1][:2])):
        direction, _, what = kind.partition("/")
        sizes = (exact(payload), exact(frame), exact(payload + frame), size(payload + frame))
        rows.append((direction, what, *sizes, exact(messages)))
    return rows


def ledger_note(group: Method) -> str:
    """Whether the kinds add up to the record's totals, and what evaluation cost."""
    notes = []
    evaluated = sum(run.bytes_evaluate for run in group.runs) / len(group.runs)
    if evaluated:
        notes.append(f"Evaluation moved {size(evaluated)}, which no total and no target counts.")
    for run in group.runs:
        kinds = {kind: counts["payload"] + counts["frame"] for kind, counts in by_kind(run).items()}
        every = sum(kinds.values())
        trained = every - sum(size for kind, size in kinds.items() if kind.endswith("/evaluate"))
        total = run.bytes_up + run.bytes_down
        if kinds and total not in (every, trained):
            notes.append(f"Seed {run.seed}: the kinds add up to {exact(trained)} B, the totals say {exact(total)} B.")
    return " ".join(notes)


def exact(value: float) -> str:
    """A whole number with unbreakable thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")


# Configuration -------------------------------------------------------------------------------------------------------


def details(group: Method, baseline: Method) -> dict[str, Any]:
    """What a method's runs were: configuration, versions, engine, sizes, folders; how seeds and baseline differ."""
    run = group.runs[0]
    head, engine = run.header, run.header.get("engine") or {}
    facts = {
        "note": head.get("note"),
        "seeds": ", ".join(str(each.seed) for each in group.runs),
        "created": ", ".join(str(each.header.get("created", NONE)) for each in group.runs),
        "measured on": head.get("measured_on"),
        "versions": ", ".join(f"{name} {version}" for name, version in (head.get("versions") or {}).items()),
        "engine": ", ".join(str(engine[key]) for key in ("name", "path") if engine.get(key)),
        "block": f"{engine['block']} clients at once" if engine.get("block") else None,
        "why this path": engine.get("why"),
        "threads": head.get("threads"),
        "shared parameters": head.get("d"),
        "personal parameters": head.get("p"),
        "clients": head.get("clients_total") or len(head.get("clients") or []) or None,
        **sync_facts(group),
        **fleet_facts(group),
        "folders": ", ".join(str(each.path) for each in group.runs),
    }
    unfinished = [str(each.seed) for each in group.runs if each.result is None]
    if unfinished:
        facts["not finished"] = f"seed {', '.join(unfinished)}: no result.json (still running, or interrupted)"
    return {
        "label": group.label,
        "facts": {key: exact(v) if isinstance(v, int) else str(v) for key, v in facts.items() if v not in (None, "")},
        "config": run.config or toml(head.get("experiment") or {}),
        "differences": differences(group.runs),
        "from_baseline": differences([run, baseline.runs[0]]),
    }


def differences(runs: Sequence[Run]) -> list[str]:
    """The configuration values, seeds and name aside, in which runs differ, a value a run; empty if they are alike."""
    flats = [settings(run) for run in runs]
    keys = sorted({key for flat in flats for key in flat if key.rpartition(".")[2] != "seed" and key != "name"})
    shown = {key: [json.dumps(flat[key], default=str) if key in flat else NONE for flat in flats] for key in keys}
    return [f"{key}: {', '.join(values)}" for key, values in shown.items() if len(set(values)) > 1]


def toml(tree: Mapping[str, Any], prefix: str = "") -> str:
    """A nested dict as TOML text; None, which TOML cannot say, becomes a comment.

    >>> print(toml({"rounds": 3, "codec": {"name": "cast", "to": None}}))
    rounds = 3
    <BLANKLINE>
    [codec]
    name = "cast"
    # to is not set
    """
    lines, tables = [], []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            path = f"{prefix}{_key(key)}"
            inner = toml(value, f"{path}.")
            only_tables = bool(value) and all(isinstance(each, Mapping) for each in value.values())
            tables.append(inner if only_tables else f"[{path}]\n{inner}".rstrip())
        else:
            lines.append(f"# {_key(key)} is not set" if value is None else f"{_key(key)} = {_value(value)}")
    return "\n\n".join(part for part in ["\n".join(lines), *tables] if part)


def _key(key: object) -> str:
    return str(key) if re.fullmatch(r"[A-Za-z0-9_-]+", str(key)) else json.dumps(str(key))


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value if item is not None)}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items() if item is not None)
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, float):
        return str(value)  # nan and inf are TOML too
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")
