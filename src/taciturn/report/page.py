"""The page: one HTML file that opens offline, on a phone, in the dark and on paper, in English and Japanese.

    read      run folders -> Run                    sentences    one about all, one a method
    tables    Run -> rows of numbers                cells        rows -> text of table cells
    figures, frontier, drift, ..   Run -> plotly figures     page.html.jinja + plotly.js, inlined once -> the file

Every text that comes from a run is escaped by the template; data of figures are embedded as JSON without `<`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.offline
from jinja2 import Environment, StrictUndefined

from taciturn.core.errors import RunError
from taciturn.core.state import write_atomic
from taciturn.report.adapters import adapter_figures
from taciturn.report.cells import client_tables, ledger, left_out_table, summary_table, write_tables
from taciturn.report.consensus import consensus_figures
from taciturn.report.drift import drift_figures, sync_facts
from taciturn.report.figures import figures, within
from taciturn.report.frontier import frontier_figures, robustness_figure
from taciturn.report.modes import mode_figures
from taciturn.report.plot import Figure
from taciturn.report.read import Run, read_run
from taciturn.report.sentences import described, lead, sentences, target_words
from taciturn.report.tables import Method, baselines, by_scenario, is_fraction, methods, settings, summary
from taciturn.report.timeline import fleet_facts, timeline_figures
from taciturn.report.words import NONE, Words, exact, known, listed, plain, say

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write_report(folders: Sequence[Path], out: Path, target: float | None = None, tables: Path | None = None) -> Path:
    """Write one HTML page about the runs in `folders` (the first is the baseline) to the file `out`; returns `out`.

    `target` is the value of the metric that all are held to (see `tables.common_target` for the default); `tables`: a
    folder for the same tables as Markdown and CSV. The file is whole or untouched; its parent folder is made. Raises
    `RunError` for a folder that cannot be read as a run, for runs of different metrics and for a file that cannot be
    written.
    """
    runs, out = [read_run(folder) for folder in folders], Path(out)
    page = render(runs, target)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    write_atomic(out, [page.encode()])
    if tables is not None:
        write_tables(summary(runs, target), methods(runs), Path(tables))
    return out


def render(runs: Sequence[Run], target: float | None = None) -> str:
    """The page as text. Raises `RunError` as `tables.methods` does."""
    groups, rows, fraction = methods(runs), summary(runs, target), is_fraction(runs)
    outcome = outcome_figures(groups, {row["scenario"]: row["target"] for row in rows})
    why = diagnostic_figures(groups)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["say"] = say
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=described(rows),
        lead=lead(rows, fraction),
        sentences=sentences(rows, fraction),
        target=target_words(rows, runs, target, fraction),
        table=summary_table(rows, fraction),
        measured=_measured(runs),
        figures=outcome,
        clients=client_tables(groups),
        scenarios=len(by_scenario(groups)),
        diagnostics=why,
        figure_data=embed([*outcome, *why]),
        left_out=left_out_table(groups),
        ledgers=[ledger(group) for group in groups],
        methods=[details(group, baselines(groups)[group.scenario]) for group in groups],
        plotly_js=plotly.offline.get_plotlyjs(),
    )


def _measured(runs: Sequence[Run]) -> Words | None:
    """On which data; None where no run says it."""
    told = list(dict.fromkeys(str(run.header.get("measured_on") or "") for run in runs))
    names = [known("measured", name) if name else say("not_said") for name in told]
    if told == [""]:
        return None
    return say("measured_apart", what=listed(names)) if len(names) > 1 else say("measured", what=names[0])


def outcome_figures(groups: Sequence[Method], targets: Mapping[str, float | None]) -> list[Figure]:
    """What came out, in the order of the page."""
    robust = robustness_figure(groups)
    return [*frontier_figures(groups), *([robust] if robust else []), *figures(groups, targets)]


def diagnostic_figures(groups: Sequence[Method]) -> list[Figure]:
    """How it came, in the first scenario: with more lines these would not be read."""
    tables = by_scenario(groups)
    scenario, mine = next(iter(tables.items()))
    mine = within(mine)
    plots = timeline_figures(mine) + mode_figures(mine) + drift_figures(mine)
    plots += adapter_figures(mine) + consensus_figures(mine)
    if len(tables) > 1 and plots:
        plots.insert(0, Figure("diagnostics", say("diagnostics"), say("diagnostics_note", scenario=scenario), None))
    return plots


def embed(plots: Sequence[Figure]) -> str:
    """The figures as JSON that is safe inside a script element: no `<`, `>` or `&`, whatever a name holds."""
    data = {plot.key: json.loads(plot.plot.to_json()) for plot in plots if plot.plot is not None}
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# Configuration -------------------------------------------------------------------------------------------------------


def details(group: Method, baseline: Method) -> dict[str, Any]:
    """What a method's runs were: configuration, versions, engine, sizes, folders; how seeds and baseline differ."""
    run = group.runs[0]
    head, engine = run.header, run.header.get("engine") or {}
    facts = {
        "note": head.get("note"),
        "seeds": ", ".join(str(each.seed) for each in group.runs),
        "created": ", ".join(str(each.header.get("created", NONE)) for each in group.runs),
        "measured_on": head.get("measured_on"),
        "versions": ", ".join(f"{name} {version}" for name, version in (head.get("versions") or {}).items()),
        "engine": ", ".join(str(engine[key]) for key in ("name", "path") if engine.get(key)),
        "block": say("clients_at_once", n=engine["block"]) if engine.get("block") else None,
        "path": engine.get("why"),
        "threads": head.get("threads"),
        "shared": head.get("d"),
        "personal": head.get("p"),
        "clients": head.get("clients_total") or len(head.get("clients") or []) or None,
        **sync_facts(group),
        **fleet_facts(group),
        "folders": ", ".join(str(each.path) for each in group.runs),
    }
    unfinished = [str(each.seed) for each in group.runs if each.result is None]
    if unfinished:
        facts["unfinished"] = say("no_result", seeds=", ".join(unfinished))
    told = {key: fact for key, fact in facts.items() if fact not in (None, "")}
    return {
        "label": group.label,
        "facts": [(say(f"fact_{key}"), _fact(fact)) for key, fact in told.items()],
        "config": run.config or toml(head.get("experiment") or {}),
        "differences": differences(group.runs),
        "from_baseline": differences([run, baseline.runs[0]]),
    }


def _fact(fact: object) -> Words:
    return fact if isinstance(fact, Words) else plain(exact(fact) if isinstance(fact, int) else str(fact))


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
