"""Operators on LoRA factors compared: accuracy, bytes, mismatch; and what the decomposition of one layer costs.

Two tasks (`bench.lora_tasks`), ten clients, plain SGD. The grid is fractional: ranks 1 to 16 at 20 local steps and local
steps 1 to 50 at rank 4, both with two classes a client, for the ablation (factor_mean, factor_mean_rebalanced, product_svd,
tangent); three of these places for the other operators, and for the ablation with Dirichlet(0.5) labels.
Step size: for each cell, by steps of 2 from a start value downhill in the training loss until the best lies inside what was
tried, with one seed; then the best and its half with a second seed, and the smaller mean. Neither is among the five that
are reported. A run falls apart if no client returns a finite update, if a decomposition fails, if the loss is not finite,
or if it ends below half of its best accuracy; the first three count as chance. As one step size too far decides about that
on few seeds, operators are compared by the median over seeds.
Full runs keep finished cells in build/lora_cells.jsonl and go on from there with --resume.
Milliseconds are CPU time on one thread, the median of repeats, of factors near each other (B_i = B + noise).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.common import COMMIT, RESULTS, finish, mean_spread, parser
from bench.lora_tasks import OPERATORS, SKEWS, TASKS, TOLD, Cell, base_accuracy, outcome, train_loss
from taciturn.aggregation import factors
from taciturn.core import random

KEPT = Path(__file__).parents[1] / "build" / "lora_cells.jsonl"
ROUNDS = {1: 48, 5: 24, 20: 12, 50: 6}  # by local steps
QUICK_ROUNDS = {1: 16, 20: 8}
ABLATION = ("factor_mean", "factor_mean_rebalanced", "product_svd", "tangent")
MIDDLE = (4, 20)  # (rank, local steps)
FEW = (MIDDLE, (1, 20), (4, 50))
SOME, REST = (*FEW, (16, 20), (4, 1)), ((2, 20), (8, 20), (4, 5))
ONCE = ("product_svd, aligned",)  # the same run as without, under plain SGD: checked at one place
START, TRIES, TUNING, CHANCE = {1: 0.8, 5: 0.4, 20: 0.2, 50: 0.1}, 14, (1000, 1001), 0.1


def grid(quick: bool) -> Iterator[Cell]:
    """The cells, the important ones first."""
    strong, mild = SKEWS
    if quick:
        for task, (rank, steps), name in ((t, p, o) for t in TASKS for p in (MIDDLE, (4, 1), (1, 20)) for o in OPERATORS):
            if name not in ONCE or (rank, steps) == MIDDLE:
                yield Cell(name, task, strong, rank, steps, QUICK_ROUNDS[steps])
        return
    for skew, places in ((strong, SOME), (mild, FEW), (strong, REST)):
        for place in places:
            for task in TASKS:
                wide = OPERATORS if skew == strong and place in FEW else ABLATION
                for name in wide:
                    if name not in ONCE or place == MIDDLE:
                        yield Cell(name, task, skew, *place, ROUNDS[place[1]])


def tuned(cell: Cell) -> tuple[float | None, dict[str, float | None]]:
    """-> the step size, None if every one fell apart; and the training losses that were seen."""
    first, second = TUNING
    at = {0: train_loss(cell, START[cell.steps], first)}
    while len(at) < TRIES:
        best = min(at, key=lambda power: (at[power], power))
        todo = [power for power in (best + 1, best - 1) if power not in at]
        if not todo:
            break
        if math.isinf(at[best]):  # all too large: down
            todo = [min(at) - 1]
        at[todo[0]] = train_loss(cell, START[cell.steps] * 2.0 ** todo[0], first)
    found = {power: value for power, value in at.items() if math.isfinite(value)}
    told = {f"{START[cell.steps] * 2.0**power:.4g}": found.get(power) for power in sorted(at)}
    if not found:
        return None, told
    best = min(found, key=lambda power: found[power])
    both = {p: found.get(p, math.inf) + train_loss(cell, START[cell.steps] * 2.0**p, second) for p in (best - 1, best)}
    best = min(both, key=lambda power: (both[power], power))
    return START[cell.steps] * 2.0**best, told


def run_cell(job: tuple[Cell, int]) -> dict[str, Any]:
    """Tune, then the reported seeds."""
    torch.set_num_threads(1)
    (cell, seeds), began = job, time.process_time()
    lr, tried = tuned(cell)
    runs = [outcome(cell, lr, seed) for seed in range(seeds)] if lr is not None else [{"diverged": "any step size"}] * seeds
    return asdict(cell) | {"lr": lr, "tried": tried, "runs": runs, "cpu_seconds": round(time.process_time() - began, 1)}


def _finished() -> dict[Cell, dict[str, Any]]:
    """Summed rows of the last full run, and of one that was stopped."""
    last = RESULTS / "lora.json"
    rows = json.loads(last.read_text())["rows"] if last.exists() else []
    rows += [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []
    return {Cell(**{name: row[name] for name in Cell.__dataclass_fields__}): row for row in rows}


def measured(cells: list[Cell], seeds: int, processes: int, kept: Path | None, resume: bool) -> list[dict[str, Any]]:
    """All cells summed, in the order of the grid; finished ones are appended to `kept`."""
    done: dict[Cell, dict[str, Any]] = {}
    if kept is not None and resume:
        done = _finished()
    elif kept is not None:
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("")
    todo = [cell for cell in cells if cell not in done]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for cell, found in zip(todo, pool.map(run_cell, [(cell, seeds) for cell in todo]), strict=True):
            row = done[cell] = summed(found) | {"commit": COMMIT}
            if kept is not None:
                kept.parent.mkdir(exist_ok=True)
                with kept.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return [done[cell] for cell in cells]


# ------------------------------------------------------------------------------------------------------------- summaries


def summed(row: dict[str, Any]) -> dict[str, Any]:
    """A cell's runs as means and spreads over seeds; a run that diverged counts as chance."""
    lost = [run for run in row["runs"] if "diverged" in run or run["final"] < 0.5 * run["best"]]
    good = [run for run in row["runs"] if "diverged" not in run]
    out = {name: row[name] for name in (*Cell.__dataclass_fields__, "lr", "tried", "cpu_seconds")}
    out |= {"lost": len(lost), "bytes": good[0]["bytes"] if good else None}
    out |= {name: mean_spread([run.get(name, CHANCE) for run in row["runs"]]) for name in ("final", "best")}
    curves = [run["curve"] for run in good]
    out["half"] = mean_spread([curve[len(curve) // 2 - 1] for curve in curves]) if curves else None
    for when in ("end", "mean"):
        told = [run[when] for run in good if when in run]
        out[when] = {name: fmean(one[name] for one in told) for name in TOLD} if told else None
    return out | {"seeds": [run.get("final") for run in row["runs"]]}


def error(row: dict[str, Any], seed: int | None = None) -> float:
    """1 - final accuracy, of a seed or the median over seeds."""
    values = [CHANCE if value is None else float(value) for value in row["seeds"]]
    return 1 - (median(values) if seed is None else values[seed])


def ratio(rows: list[dict[str, Any]], name: str, other: str = "factor_mean") -> dict[str, float] | None:
    """Geometric mean over places of error of one operator / error of another; least and greatest of single seeds."""
    places = {(row["operator"], *_place(row)): row for row in rows}
    pairs = [
        (row, places[other, *at]) for (operator, *at), row in places.items() if operator == name and (other, *at) in places
    ]
    if not pairs:
        return None

    def mean(seed: int | None) -> float:
        return math.exp(fmean(math.log(max(1e-3, error(a, seed)) / max(1e-3, error(b, seed))) for a, b in pairs))

    single = [mean(seed) for seed in range(len(pairs[0][0]["seeds"]))]
    return {"mean": mean(None), "low": min(single), "high": max(single), "places": len(pairs)}


def groups(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The places by task, by skew, and, with two classes a client, by local steps at rank 4 and by rank at 20 steps."""
    strong, mild = SKEWS
    found = {"all": rows} | {task: [row for row in rows if row["task"] == task] for task in TASKS}
    found |= {skew: [row for row in rows if row["skew"] == skew] for skew in (strong, mild)}
    hard = [row for row in rows if row["skew"] == strong]
    for steps in ROUNDS:
        found[f"{steps} steps, rank 4"] = [row for row in hard if (row["rank"], row["steps"]) == (4, steps)]
    for rank in (1, 2, 4, 8, 16):
        found[f"rank {rank}, 20 steps"] = [row for row in hard if (row["rank"], row["steps"]) == (rank, 20)]
    return {name: part for name, part in found.items() if part}


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["skew"], row["rank"], row["steps"]


def predictors(rows: list[dict[str, Any]], alike: bool = False) -> dict[str, float]:
    """Spearman's correlation of the error with each diagnostic (mean over rounds), both against their mean in the place.

    Among the operators of the ablation, in logarithms; cells in which a run fell apart are left out. alike: only those that
    were tuned to the step size of factor_mean, for a smaller step makes every diagnostic smaller.
    """
    steps = {_place(row): row["lr"] for row in rows if row["operator"] == "factor_mean"}
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        same = not alike or row["lr"] == steps.get(_place(row))
        if row["operator"] in ABLATION and row["mean"] and not row["lost"] and same:
            places.setdefault(_place(row), []).append(row)
    groups = [group for group in places.values() if len(group) > 1]

    def against_mean(value: Any) -> torch.Tensor:
        logs = [torch.tensor([math.log(max(value(row), 1e-9)) for row in group]) for group in groups]
        return torch.cat([part - part.mean() for part in logs]).argsort().argsort().double()

    if not groups:
        return {}
    errors = against_mean(error)
    return {"cells": len(errors)} | {
        name: round(float(torch.corrcoef(torch.stack([errors, against_mean(lambda row, n=name: row["mean"][n])]))[0, 1]), 3)
        for name in TOLD
    }


def show(rows: list[dict[str, Any]]) -> None:
    """One table a task and skew."""
    for title in dict.fromkeys((row["task"], row["skew"]) for row in rows):
        heads = ("rank", "steps", "operator", "final", "best", "fell apart", "kB", "lr")
        table = Table(*heads, "product", "gauge", "truncation", "imbalance", title=", ".join(title))
        for row in sorted((r for r in rows if (r["task"], r["skew"]) == title), key=lambda r: (r["steps"], r["rank"])):
            cells = [f"{row[n]['mean']:.3f} ± {row[n]['spread']:.3f}" for n in ("final", "best")]
            cells += [str(row["lost"] or ""), f"{(row['bytes'] or 0) / 1e3:.0f}", f"{row['lr'] or 0:.3g}"]
            end = row["end"] or {}
            cells += [f"{end[n]:.2g}" if end else "-" for n in ("product", "gauge", "truncation", "imbalance")]
            table.add_row(str(row["rank"]), str(row["steps"]), row["operator"], *cells)
        Console(width=150).print(table)


def compared(against: dict[str, dict[str, Any]]) -> None:
    """Errors over those of factor_mean, with the least and the greatest of single seeds."""
    table = Table("places", *against["all"], title="final error / that of factor_mean, geometric mean over places")
    for title, row in against.items():
        table.add_row(title, *(f"{f['mean']:.3f} ({f['low']:.2f} to {f['high']:.2f})" if f else "" for f in row.values()))
    Console(width=150).print(table)


# ----------------------------------------------------------------------------------------------------------------- costs


def _near(size: int, clients: int, rank: int = 8) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    key = random.key(0)
    b, a = (random.normal(random.fold(key, n), size, rank) for n in ("b", "a"))
    noise = [[0.2 * random.normal(random.fold(key, n, i), size, rank) for n in ("b", "a")] for i in range(clients)]
    return [(b + left, (a + right).mT.contiguous()) for left, right in noise], torch.full((clients,), 1 / clients)


def milliseconds(run: Any, repeats: int) -> float:
    """CPU time."""
    took = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        took.append(1e3 * (time.process_time() - began))
    return median(took)


def costs() -> dict[str, float]:
    """product_svd with its default backend, and forming the product and its SVD instead, r = 8."""
    torch.set_num_threads(1)
    small, large, key = _near(768, 10), _near(4096, 50), random.key(1)
    x, y = factors.stacked(*small)

    def dense() -> None:
        torch.linalg.svd(x @ y, full_matrices=False)

    factors.product_svd(*small, key)
    out = {
        "ms_768_10": milliseconds(lambda: factors.product_svd(*small, key), 15),
        "ms_4096_50": milliseconds(lambda: factors.product_svd(*large, key), 7),
        "ms_dense_768_10": milliseconds(dense, 5),
    }
    return out | {"svd_vs_dense_speedup_768_10": out["ms_dense_768_10"] / out["ms_768_10"]}


def main() -> None:
    """Measure, run, print."""
    options = parser(__doc__)
    options.add_argument(
        "--resume", action="store_true", help="keep the finished cells: of bench/results, and of a run that was stopped"
    )
    options.add_argument("--processes", type=int, default=2)
    asked = options.parse_args()
    seeds, spent = (2 if asked.quick else 5), costs()
    cells = list(grid(asked.quick))
    rows = measured(cells, seeds, asked.processes, None if asked.quick else KEPT, asked.resume)
    show(rows)
    shared = [name for name, operator in OPERATORS.items() if not operator.personal]
    against = {title: {name: ratio(part, name) for name in shared[1:]} for title, part in groups(rows).items()}
    compared(against)
    known = {name: found["mean"] for name, found in against["all"].items() if found and name not in ONCE} | {
        "factor_mean": 1.0
    }
    n = {"tasks": len(TASKS), "seeds": seeds, "rounds": QUICK_ROUNDS if asked.quick else ROUNDS, "cells": len(rows)}
    figures = {
        "operators": len(OPERATORS), "best": min(known, key=lambda name: known[name]),
        "tangent_vs_factor_mean": known["tangent"], **spent, "n": n, "error_vs_factor_mean": against,
        "lost": {name: sum(row["lost"] for row in rows if row["operator"] == name) for name in OPERATORS},
        "predictors": {"all": predictors(rows), "one step size": predictors(rows, alike=True)},
        "base_accuracy": base_accuracy(seeds),
    }  # fmt: skip
    finish("lora", figures | ({} if asked.quick else {"rows": rows}), asked.quick)


if __name__ == "__main__":
    main()
