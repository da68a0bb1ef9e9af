"""When to synchronise: cost to target of fixed intervals, of FDA-Opt as published, and of `fda()`, at three prices.

Cost of a run = local steps of the slowest client of each round + bytes over the line's speed + round trips x latency, in
local epochs. Prices: sending the model once, one way, costs as much as 50 local epochs (slow), 5 (balanced) or 0.5 (fast);
a round trip costs 2 % of that. Six tasks, three server optimizers, seeds paired: all methods see the same data, cohorts
and start. Step sizes and targets are those of `bench.fda --tune`: for each task and optimizer the best of its grid at
E = 5, the middle of the sweep, on the clients' validation data and a seed of its own; all methods use them, for what is
measured is a drop-in. Target: 0.95 x the best accuracy (1.05 x the smallest error) of that run, on test data, where all
runs are measured.
A run that has not reached its target after 300 rounds or 480 epochs of the slowest clients has failed.
The best fixed interval of a cell is chosen with hindsight: smallest mean cost over the same seeds. AdaComm (Wang & Joshi
2019) starts from that interval and shortens it with the root of the training loss, so it has the same hindsight; it runs
on the three tasks of --quick.
"""

from __future__ import annotations

import itertools
import json
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import taciturn
from bench.adacomm import adacomm
from bench.common import RESULTS, Cached, finish, parser
from taciturn import StopAt, TaskSpec, data, fleet, models, participation, server, solvers, sync

SHARED = Path(__file__).parents[2] / "shared" / "data"  # real data, where they lie beside the project
PRICES = {"slow": 50.0, "balanced": 5.0, "fast": 0.5}
LATENCY = 0.02
SWEEP = (1, 2, 3, 5, 10, 20, 40)
MOST_ROUNDS, MOST_EPOCHS = 300, 480
TUNING_SEED = 1000
TUNED = RESULTS / "fda_tuned.json"
OPTIMIZERS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "FedAvg": (server.sgd, (1.0,)),
    "FedAvgM": (server.momentum, (0.1, 0.3)),
    "FedAdam": (server.adam, (0.01, 0.03)),
}
CLIENT_LR = (0.05, 0.15, 0.5, 1.0)


def _digits(clients: int, split: Any) -> Any:
    return data.digits(clients=clients, split=split, validation=0.1)


def _mnist(clients: int, split: Any) -> Any:
    return data.mnist5k(clients=clients, split=split, validation=0.1)


def _skew(alpha: float) -> Any:
    return data.dirichlet(alpha=alpha, min_partition_size=10)


# data, model, participation, batch size, folder that it needs
TASKS: dict[str, tuple[Any, Any, Any, int, str]] = {
    "digits-iid": (_digits(20, data.iid()), models.mlp(hidden=(64,)), participation.all(), 16, ""),
    "digits-skew": (_digits(20, _skew(0.3)), models.mlp(hidden=(64,)), participation.uniform(count=8), 16, ""),
    "mnist-skew": (_mnist(50, _skew(0.3)), models.mlp(hidden=(50,)), participation.uniform(count=10), 20, ""),
    "mnist-iid": (_mnist(20, data.iid()), models.mlp(hidden=(50,)), participation.uniform(count=5), 50, ""),
    "activity": (
        data.activity(path=str(SHARED / "hapt"), window=64, step=256, validation=0.1),
        models.temporal(channels=(8, 16)),
        participation.uniform(count=6),
        32,
        "hapt",
    ),
    "air": (
        data.air(path=str(SHARED / "beijing_air"), every_nth=120, validation=0.1),
        models.mlp(hidden=(32,)),
        participation.all(),
        32,
        "beijing_air",
    ),
}
QUICK = ("digits-iid", "digits-skew", "mnist-skew")


def price(crossing: float, d: int, epoch_steps: float) -> fleet.Price:
    """The price of a cell."""
    return fleet.Price.crossing(crossing, model_bytes=4 * d, epoch_steps=epoch_steps, latency=LATENCY)


def experiment(task: str, optimizer: str, setting: tuple[float, float], rule: Any, rounds: int, seed: int) -> Any:
    """A run of a cell of the study."""
    source, model, cohort, batch, _ = TASKS[task]
    solver = solvers.sgd(lr=setting[0], clip=5.0)
    method = taciturn.Method(participation=cohort, solver=solver, batch_size=batch, sync=rule)
    method = method.replace(server=OPTIMIZERS[optimizer][0](lr=setting[1]))
    return taciturn.Experiment(TaskSpec(Cached(source), model), method, rounds=rounds, seed=seed)


class Over(Exception):
    """The budget is spent."""


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """A run to its target -> what it spent, or that it failed."""
    torch.set_num_threads(1)
    budget = [1.1 * MOST_EPOCHS * job["epoch_steps"]]  # cohorts differ: a tenth more than the epochs of the usual one

    def watch(line: dict[str, Any]) -> None:
        budget[0] -= line["longest"]
        if budget[0] < 0:
            raise Over(f"{MOST_EPOCHS} epochs")

    cell, rule = (job["task"], job["optimizer"]), job["rule"]
    epochs = getattr(rule, "epochs", None)
    rounds = MOST_ROUNDS if epochs is None else max(3, min(MOST_ROUNDS, MOST_EPOCHS // epochs))
    trial = experiment(*cell, job["setting"], rule, rounds, job["seed"]).replace(stop_at=StopAt(metric=job["target"]))
    told = {name: job[name] for name in ("task", "optimizer", "method", "seed", "price")}
    try:
        result = taciturn.run(trial, callbacks=(watch,))
    except (taciturn.TaciturnError, Over) as error:
        return told | {"reached": False, "why": str(error)}
    last, cohort = result.history[-1], len(result.history[0]["cohort"])
    kinds = [entry for line in result.history for entry in line["traffic"]["by_kind"].items()]
    monitor = sum(e["payload"] + e["frame"] for name, e in kinds if name.endswith("/monitor"))
    return told | {
        "reached": result.stopped == "metric",
        "rounds": len(result.history),
        "steps": sum(line["longest"] for line in result.history),
        "up": last["bytes_up"] / cohort,
        "down": last["bytes_down"] / cohort,
        "exchanges": sum(line["traffic"]["exchanges"] for line in result.history),
        "monitor": monitor / cohort,
        "d": result.header["d"],
    }


def cost(run: dict[str, Any], crossing: float, epoch_steps: float) -> float:
    """Of a run at a price, in local epochs; infinite if it did not reach its target."""
    if not run["reached"]:
        return math.inf
    at = price(crossing, run["d"], epoch_steps)
    spent = {name: run[name] for name in ("steps", "up", "down", "exchanges")}
    return at.seconds(**spent) / epoch_steps


# ---------------------------------------------------------------------------------------------------------------- tuning


def _tune(job: tuple[str, str, tuple[float, float]]) -> float:
    """40 rounds of 5 epochs: mean metric on the clients' validation data, larger being better."""
    torch.set_num_threads(1)
    trial = experiment(*job, sync.every(epochs=5), 40, TUNING_SEED)
    try:
        result = taciturn.run(trial.replace(evaluate_on="validation", evaluate_clients_every=4, evaluate_every=4))
    except taciturn.TaciturnError:
        return -math.inf
    goal, name = (result.header["metric"][key] for key in ("goal", "name"))
    sign, power = (1 if goal == "max" else -1), (2 if name == "rmse" else 1)
    curve = []
    for line in result.history:
        if line["spread"]:
            counts, values = line["spread"]["count"], line["spread"][name]
            pooled = sum(n * v**power for n, v in zip(counts, values, strict=True)) / sum(counts)
            curve.append(sign * pooled ** (1 / power))
    return fmean(curve[2:])


def _level(job: tuple[str, str, tuple[float, float]]) -> dict[str, Any]:
    """The same run on test data: the target, and what a price needs to know."""
    torch.set_num_threads(1)
    result = taciturn.run(experiment(*job, sync.every(epochs=5), 40, TUNING_SEED))
    goal, name = (result.header["metric"][key] for key in ("goal", "name"))
    values = [line["metrics"][name] for line in result.history]
    target = 0.95 * max(values) if goal == "max" else 1.05 * min(values)
    steps = sorted(line["longest"] / 5 for line in result.history)[len(result.history) // 2]
    return {"setting": job[2], "target": round(target, 4), "epoch_steps": steps, "d": result.header["d"]}


def tune() -> None:
    """Step sizes and target of every cell, kept in bench/results/fda_tuned.json."""
    cells = list(itertools.product(_available(TASKS), OPTIMIZERS))
    jobs = [(t, o, s) for t, o in cells for s in itertools.product(CLIENT_LR, OPTIMIZERS[o][1])]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        scores = dict(zip(jobs, pool.map(_tune, jobs), strict=True))
        best = [max((job for job in jobs if job[:2] == cell), key=lambda job: scores[job]) for cell in cells]
        levels = list(pool.map(_level, best))
    tried = {cell: " ".join(f"{job[2]}: {scores[job]:.4f};" for job in jobs if job[:2] == cell) for cell in cells}
    chosen = {"/".join(cell): level | {"tried": tried[cell]} for cell, level in zip(cells, levels, strict=True)}
    TUNED.write_text(json.dumps(chosen, indent=1) + "\n")
    print(json.dumps({name: (kept["setting"], kept["target"]) for name, kept in chosen.items()}))


# ------------------------------------------------------------------------------------------------------------- the study


def _available(names: Any) -> list[str]:
    return [name for name in names if not TASKS[name][4] or (SHARED / TASKS[name][4]).exists()]


def _jobs(tasks: list[str], optimizers: list[str], seeds: int, tuned: dict[str, Any]) -> list[dict[str, Any]]:
    jobs = []
    for task, optimizer, seed in itertools.product(tasks, optimizers, range(seeds)):
        cell = tuned[f"{task}/{optimizer}"]
        known = {"task": task, "optimizer": optimizer, "seed": seed} | cell
        rules = [(f"E={e}", None, sync.every(epochs=e)) for e in SWEEP]
        rules.append(("published", None, sync.fda.published()))
        for name, crossing in PRICES.items():
            rules.append(("ours", name, sync.fda(price=price(crossing, cell["d"], cell["epoch_steps"]))))
        jobs += [known | {"method": method, "price": at, "rule": rule} for method, at, rule in rules]
    return jobs


def _adacomm(rows: list[dict[str, Any]], seeds: int, tuned: dict[str, Any]) -> list[dict[str, Any]]:
    """AdaComm from the best fixed interval of each cell and price."""
    jobs = []
    for row, seed in itertools.product((row for row in rows if row["task"] in QUICK), range(seeds)):
        cell = tuned[f"{row['task']}/{row['optimizer']}"]
        job = {name: row[name] for name in ("task", "optimizer", "price")} | {"seed": seed, "method": "AdaComm"}
        rule = adacomm(first=int(row["best"].removeprefix("E=")))
        jobs.append(job | cell | {"rule": rule})
    return jobs


def _ratios(runs: list[dict[str, Any]], tuned: dict[str, Any], seeds: int) -> list[dict[str, Any]]:
    """A row for each cell and price: cost of each method over that of the best fixed interval, seed by seed."""
    rows = []
    for (task, optimizer), (name, crossing) in itertools.product(
        dict.fromkeys((run["task"], run["optimizer"]) for run in runs), PRICES.items()
    ):
        steps = tuned[f"{task}/{optimizer}"]["epoch_steps"]
        mine = [r for r in runs if (r["task"], r["optimizer"]) == (task, optimizer) and r["price"] in (None, name)]
        costs: dict[str, list[float]] = {}
        for run in sorted(mine, key=lambda run: run["seed"]):
            costs.setdefault(run["method"], []).append(cost(run, crossing, steps))
        fixed = {method: fmean(values) for method, values in costs.items() if method.startswith("E=")}
        best = min(fixed, key=lambda method: fixed[method])
        row = {"task": task, "optimizer": optimizer, "price": name, "best": best, "seeds": seeds}
        rows.append(row | {"cost": costs, "solvable": math.isfinite(fixed[best])})
    return rows


def summary(ratio: np.ndarray, draws: int = 2000) -> dict[str, float] | None:
    """ratio [cells, 2, seeds] costs of a method and of its rival -> geometric mean over cells of the ratio of mean costs,
    and its 90 % interval over draws of seeds within each cell (paired).
    """
    if not len(ratio):
        return None
    rng = np.random.default_rng(0)
    cells, _, seeds = ratio.shape
    picks = rng.integers(seeds, size=(draws, cells, seeds))
    drawn = np.take_along_axis(ratio[None].repeat(draws, 0), picks[:, :, None, :].repeat(2, 2), 3).mean(3)
    means = np.exp(np.log(drawn[:, :, 0] / drawn[:, :, 1]).mean(1))
    mean = ratio.mean(2)
    low, high = np.quantile(means, [0.05, 0.95])
    value = math.exp(np.log(mean[:, 0] / mean[:, 1]).mean())
    return {"ratio": round(value, 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def _against(rows: list[dict[str, Any]], method: str, at: str) -> dict[str, float] | None:
    known = [row for row in rows if row["price"] == at and row["solvable"] and method in row["cost"]]
    pairs = [[row["cost"][method], row["cost"][row["best"]]] for row in known]
    return summary(np.array([pair for pair in pairs if np.isfinite(pair).all()]))


def _bytes(runs: list[dict[str, Any]], method: str, at: str | None) -> list[list[list[float]]]:
    pairs = []
    for cell in dict.fromkeys((run["task"], run["optimizer"]) for run in runs):
        mine = [
            [r for r in runs if (r["task"], r["optimizer"], r["method"], r["price"]) == (*cell, name, where)]
            for name, where in ((method, at), ("E=1", None))
        ]
        if all(run["reached"] for group in mine for run in group):
            pairs.append([[r["up"] + r["down"] for r in sorted(group, key=lambda r: r["seed"])] for group in mine])
    return pairs


def main() -> None:
    """Tune, or run the study."""
    options = parser(__doc__)
    options.add_argument("--tune", action="store_true", help="choose step sizes and targets anew")
    chosen = options.parse_args()
    if chosen.tune:
        tune()
        return
    tuned = json.loads(TUNED.read_text())
    tasks, seeds = _available(QUICK if chosen.quick else TASKS), 3 if chosen.quick else 5
    optimizers = ["FedAvg", "FedAdam"] if chosen.quick else list(OPTIMIZERS)
    jobs = _jobs(tasks, optimizers, seeds, tuned)
    jobs.sort(key=lambda job: -getattr(job["rule"], "epochs", 0))  # the long ones first
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(_run, jobs, chunksize=1))
        if not chosen.quick:
            runs += pool.map(_run, _adacomm(_ratios(runs, tuned, seeds), seeds, tuned), chunksize=1)
    rows = _ratios(runs, tuned, seeds)
    _print(rows)
    finish("fda", _figures(tasks, seeds, runs, rows, chosen.quick), chosen.quick)


def _figures(tasks: list[str], seeds: int, runs: list[dict[str, Any]], rows: Any, quick: bool) -> dict[str, Any]:
    solvable = {(row["task"], row["optimizer"]) for row in rows if row["solvable"]}
    failed = [run for run in runs if not run["reached"] and (run["task"], run["optimizer"]) in solvable]
    count = {
        "ours": sum(run["method"] == "ours" for run in failed),
        "published": sum(run["method"] == "published" for run in failed),
        "fixed": sum(run["method"].startswith("E=") for run in failed),
    }
    intervals = {
        "published_bytes_vs_E1": summary(np.array(_bytes(runs, "published", None))),
        "published_vs_best_E": {at: _against(rows, "published", at) for at in PRICES},
        "ours_bytes_vs_E1": summary(np.array(_bytes(runs, "ours", "slow") + _bytes(runs, "ours", "balanced"))),
        "ours_bytes_vs_E1_by_price": {at: summary(np.array(_bytes(runs, "ours", at))) for at in PRICES},
        "ours_vs_best_E": {at: _against(rows, "ours", at) for at in PRICES},
        "adacomm_vs_best_E": None if quick else {at: _against(rows, "AdaComm", at) for at in PRICES},
    } | {f"E{e}_vs_best_E": {at: _against(rows, f"E={e}", at) for at in PRICES} for e in SWEEP}
    mine = [run for run in runs if run["method"] == "ours" and run["reached"]]
    share = sum(run["monitor"] for run in mine) / sum(run["up"] + run["down"] for run in mine)
    plain = {
        name: None
        if value is None
        else value["ratio"]
        if "ratio" in value
        else {at: None if one is None else one["ratio"] for at, one in value.items()}
        for name, value in intervals.items()
    }
    figures = {"tasks": tasks} | plain | {"failures": count, "monitor_bytes_share": round(share, 5)}
    cells = len({(row["task"], row["optimizer"]) for row in rows})
    figures |= {
        "n": {"tasks": len(tasks), "cells": cells, "seeds": seeds, "rounds": MOST_ROUNDS},
        "intervals_90": intervals,
    }
    missing = [name for name in (QUICK if quick else TASKS) if name not in tasks]
    if missing:
        figures["not_run"] = dict.fromkeys(missing, "its data are not beside the project")
    return figures if quick else figures | {"cells": [_cell(row) for row in rows]}


def _cell(row: dict[str, Any]) -> dict[str, Any]:
    """Costs of all seeds, one line a method."""
    costs = {method: " ".join(f"{value:.1f}" for value in values) for method, values in row["cost"].items()}
    return {name: row[name] for name in ("task", "optimizer", "price", "best")} | {"cost": costs}


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("task", "optimizer", "price", *(f"E={e}" for e in SWEEP), "published", "ours", "ours / best E")
    for row in rows:
        best, costs = row["cost"][row["best"]], row["cost"]
        shown = []
        for method in (*(f"E={e}" for e in SWEEP), "published", "ours"):
            value, reached = fmean(costs[method]), sum(map(math.isfinite, costs[method]))
            text = f"{value:.0f}" if math.isfinite(value) else f"{reached} of {row['seeds']}"
            shown.append(f"[bold]{text}[/]" if method == row["best"] else text)
        pair = np.array([[costs["ours"], best]])
        last = summary(pair) if np.isfinite(pair).all() else None
        shown.append(f"{last['ratio']:.2f} ({last['low']:.2f}-{last['high']:.2f})" if last else "-")
        table.add_row(row["task"], row["optimizer"], row["price"], *shown)
    console = Console(width=170)
    console.print("Cost to target in local epochs, mean over seeds; bold: the best fixed interval; (90 % interval)")
    console.print(table)


if __name__ == "__main__":
    main()
