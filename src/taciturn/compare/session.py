"""A comparison from end to end: cells, step sizes tuned with one budget for all, runs, rows, files.

    OUT/tuning/CELL/VALUE    a run for each value of the tuned setting, on a seed of its own
    OUT/runs/CELL/seed-K     the runs that count, with the value that was best of each cell
    OUT/summary.json         rows, what was tuned, what is missing and why
    OUT/report.html          the page; its tables as Markdown and CSV in OUT/tables
    OUT/tables               the tables of the page, as Markdown and CSV

The same call goes on where an earlier one was stopped, and repeats nothing that is done.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taciturn.compare.grid import Cell, Vary, grid
from taciturn.compare.jobs import Job, play
from taciturn.core.errors import ConfigError, RunError, require
from taciturn.core.state import write_atomic
from taciturn.experiment import config
from taciturn.report import read_run, write_report
from taciturn.report.read import Run
from taciturn.report.tables import best, summary

TUNING_SEED = 1000
FACTORS = (1 / 3, 1.0, 3.0)  # of a setting that is tuned without values of its own
COLUMNS = (
    *("method", "scenario", "seeds", "metric", "target", "reached", "bytes_to_target", "rounds_to_target"),
    *("simulated_to_target", "final", "final_error", "worst_decile", "byte_ratio", "bytes", "tuned"),
)


@dataclass(frozen=True)
class Outcome:
    """rows: one a method and scenario, by `COLUMNS`; missing: runs without a result, and why; folders: of the runs."""

    rows: list[dict[str, Any]]
    missing: list[dict[str, str]]
    folders: list[Path]
    out: Path


Tuned = Vary | str  # a setting with its values, or its path alone: a third, one and three times what it is
Progress = Callable[[str, int, int, Mapping[Job, int]], None]  # stage, jobs ended, jobs in all, rounds of those in work


def compare(
    table: Mapping[str, Any],
    varied: Sequence[Vary] = (),
    *,
    out: Path,
    seeds: int = 3,
    tune: Tuned | Mapping[str, Tuned | None] | None = None,
    methods: Mapping[str, dict[str, Any]] | None = None,
    target: float | None = None,
    budget_minutes: float | None = None,
    processes: int | None = None,
    told: Progress | None = None,
) -> Outcome:
    """Run the grid of an experiment's table (`config.to_table`), and write what came out.

    The first method of a scenario is its baseline; the target is given, or named by the experiment, or 0.98 of the
    baseline's best. methods: name -> table [method], such as those of lineup.py, in place of the experiment's own. tune: a
    setting with values, or its path alone: a third, one and three times what it is; or one for each name of `methods`. All
    methods get the same number of values, rounds and seeds. budget_minutes: after them no further run is begun. Errors:
    `ConfigError`, `RunError`.
    """
    require(seeds >= 1, f"--seeds: at least 1; got {seeds}")
    cells = grid(table, varied, methods)
    until = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    setting = {cell.folder: tune.get(cell.base) if isinstance(tune, Mapping) else tune for cell in cells}
    values = {cell.folder: _values(cell, setting[cell.folder]) for cell in cells}
    trials = {
        (cell.folder, place): _job(
            cell, TUNING_SEED, out / "tuning" / cell.folder / f"{place}", setting[cell.folder], value
        )
        for cell in cells
        for place, value in enumerate(values[cell.folder])
        if len(values[cell.folder]) > 1
    }
    lost = play([*trials.values()], processes, until, _stage("tuning", trials, told))
    chosen = {cell.folder: _best(cell, values[cell.folder], trials, lost) for cell in cells}
    runs = {
        (cell.folder, seed): _job(
            cell, seed, out / "runs" / cell.folder / f"seed-{seed}", setting[cell.folder], chosen[cell.folder]
        )
        for seed in range(seeds)
        for cell in cells
    }
    lost |= play([*runs.values()], processes, until, _stage("runs", runs, told))
    rows = _rows(cells, runs, lost, target, chosen, values)
    good = [runs[cell.folder, seed] for cell in cells for seed in range(seeds) if runs[cell.folder, seed] not in lost]
    missing = [{"run": str(job.folder.relative_to(out)), "why": why} for job, why in lost.items()]
    outcome = Outcome(rows, missing, [job.folder for job in good], out)
    _write(outcome, target)
    return outcome


# ------------------------------------------------------------------------------------------------------------ tuning


def _values(cell: Cell, tune: Tuned | None) -> tuple[Any, ...]:
    """What the tuned setting of a cell may be."""
    if tune is None:
        return (None,)
    if isinstance(tune, Vary):
        return tune.values
    now = _now(cell.table, tune)
    require(
        isinstance(now, int | float) and not isinstance(now, bool),
        f"--tune {tune}: of {cell.method!r} it is {now!r}; write the values, for example --tune {tune}=0.03,0.1,0.3",
    )
    return tuple(float(f"{factor * now:.3g}") for factor in FACTORS)


def _now(table: Mapping[str, Any], path: str) -> Any:
    """The present value at a path: what changes in the table where another is put there."""
    mark = object()
    found = config.set_path(copy.deepcopy(dict(table)), path, mark)

    def look(new: Any, old: Any) -> Any:
        if new is mark:
            return old
        pairs = new.items() if isinstance(new, dict) else ()
        return next((hit for k, v in pairs if (hit := look(v, old.get(k))) is not None), None)

    return look(found, table)


def _job(cell: Cell, seed: int, folder: Path, tune: Tuned | None, value: Any) -> Job:
    table = copy.deepcopy(cell.table) | {"seed": seed, "name": cell.label}
    if tune is not None and value is not None:
        config.set_path(table, tune.path if isinstance(tune, Vary) else tune, value)
    return Job(config.to_table(config.from_table(table)), folder)


def _best(cell: Cell, values: Sequence[Any], trials: Mapping[tuple[str, int], Job], lost: Mapping[Job, str]) -> Any:
    """The value whose run has the best metric; the first if none has one."""
    if len(values) == 1:
        return values[0]
    found = []
    for place, value in enumerate(values):
        job = trials[cell.folder, place]
        run = None if job in lost else read_run(job.folder)
        level = None if run is None else best(run)
        if run is not None and level is not None:
            found.append((level if run.goal == "max" else -level, -place, value))
    return max(found)[2] if found else values[0]


# ------------------------------------------------------------------------------------------------------------- result


def _rows(
    cells: Sequence[Cell],
    runs: Mapping[tuple[str, int], Job],
    lost: Mapping[Job, str],
    target: float | None,
    chosen: Mapping[str, Any],
    values: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:
    """A row for each cell; one without any run has nothing but its names."""
    rows: list[dict[str, Any]] = []
    for scenario in dict.fromkeys(cell.scenario for cell in cells):
        mine = [cell for cell in cells if cell.scenario == scenario]
        done: dict[str, list[Run]] = {
            cell.folder: [
                read_run(job.folder) for (name, _), job in runs.items() if name == cell.folder and job not in lost
            ]
            for cell in mine
        }
        with_runs = [cell for cell in mine if done[cell.folder]]
        found = summary([run for cell in with_runs for run in done[cell.folder]], target) if with_runs else []
        by_cell = {cell.folder: row for cell, row in zip(with_runs, found, strict=True)}
        for cell in mine:
            row = dict.fromkeys(COLUMNS) | {"method": cell.method, "scenario": cell.scenario, "seeds": [], "reached": 0}
            known = by_cell.get(cell.folder)
            if known is not None:
                row |= {name: known[name] for name in COLUMNS if name in known}
                row |= {"byte_ratio": known["ratio"], "bytes": known["bytes_up"] + known["bytes_down"]}
                row |= {"spread": known["spread"], "baseline": mine[0].method}
            tried = values[cell.folder]
            if len(tried) > 1:
                row["tuned"] = chosen[cell.folder]
                row["at_edge"] = chosen[cell.folder] in (tried[0], tried[-1])
            rows.append(row)
    return rows


def _stage(name: str, jobs: Mapping[Any, Job], told: Progress | None) -> Callable[[Mapping[Job, int]], None] | None:
    if told is None:
        return None

    def say(active: Mapping[Job, int]) -> None:
        ended = sum((job.folder / "result.json").exists() or bool(job.failed) for job in jobs.values())
        told(name, ended, len(jobs), active)

    return say


def _write(outcome: Outcome, target: float | None) -> None:
    text = json.dumps({"rows": outcome.rows, "missing": outcome.missing}, indent=1)
    try:
        outcome.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {outcome.out}: {error.strerror}") from error
    write_atomic(outcome.out / "summary.json", [text.encode(), b"\n"])
    if not outcome.folders:
        raise ConfigError(
            f"no run has a result: {outcome.missing[0]['why'] if outcome.missing else 'nothing was asked for'}"
        )
    write_report(outcome.folders, outcome.out / "report.html", target, outcome.out / "tables")
