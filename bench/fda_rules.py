"""The published threshold, its dampings and its monitors: how the blocks of a round jump, and what it costs.

digits-skew and mnist-skew of `bench.fda` with FedAvg, at most M = 10 blocks a round, 60 rounds. From the second on: mean
and standard deviation of the blocks n, shares of n = 1 and n = M, lag-1 autocorrelation of n; bytes to bench.fda's target.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import taciturn
from bench.common import arguments, finish
from bench.fda import TUNED, experiment
from taciturn.sync import fda
from taciturn.sync.thresholds import ema, plain, power

M = 10
BASE = fda.published(max_blocks=M)
RULES = {
    "plain, sketch (published)": BASE,
    "plain, exact": replace(BASE, monitor="exact"),
    "plain, linear": replace(BASE, monitor="linear"),
    "plain, naive": replace(BASE, monitor="naive"),
    "plain, local": replace(BASE, monitor="local"),
    "power(1/2)": replace(BASE, theta=power(1 / 2)),
    "power(1/3)": replace(BASE, theta=power(1 / 3)),
    "ema(0.5)": replace(BASE, theta=ema(0.5)),
    "ema(0.3)": replace(BASE, theta=ema(0.3)),
}
assert BASE.theta == plain()


def _run(job: tuple[str, str, int, int, dict[str, Any]]) -> dict[str, Any]:
    task, rule, seed, rounds, tuned = job
    torch.set_num_threads(1)
    result = taciturn.run(experiment(task, "FedAvg", tuned["setting"], RULES[rule], rounds, seed))
    n = np.array([line["sync"]["blocks"] for line in result.history[1:]])
    reached = [line for line in result.history if line["metrics"]["accuracy"] >= tuned["target"]]
    kinds = [entry for line in result.history for entry in line["traffic"]["by_kind"].items()]
    monitor = sum(e["payload"] + e["frame"] for name, e in kinds if name.endswith("/monitor"))
    last = result.history[-1]
    return {
        "mean": float(n.mean()),
        "sd": float(n.std()),
        "one": float((n <= 1.0).mean()),
        "cap": float((n >= M - 0.01).mean()),
        "lag1": float(np.corrcoef(n[:-1], n[1:])[0, 1]),
        "rounds": reached[0]["round"] if reached else None,
        "bytes": reached[0]["bytes_up"] + reached[0]["bytes_down"] if reached else None,
        "monitor_share": monitor / (last["bytes_up"] + last["bytes_down"]),
    }


def main() -> None:
    """Run, print."""
    quick = arguments(__doc__).quick
    tasks, seeds, rounds = (("digits-skew",), 1, 30) if quick else (("digits-skew", "mnist-skew"), 5, 60)
    tuned = json.loads(TUNED.read_text())
    jobs = [(t, rule, s, rounds, tuned[f"{t}/FedAvg"]) for t in tasks for rule in RULES for s in range(seeds)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(zip(jobs, pool.map(_run, jobs), strict=True))
    table = Table("task", "rule", "mean n", "sd", "n = 1", f"n = {M}", "lag 1", "rounds", "MB to target", "monitor share")
    rows = []
    for task in tasks:
        for rule in RULES:
            group = [told for (t, r, *_), told in found if (t, r) == (task, rule)]
            row: dict[str, Any] = {"task": task, "rule": rule, "reached": sum(g["rounds"] is not None for g in group)}
            for name in group[0]:
                values = [g[name] for g in group if g[name] is not None]
                row[name] = fmean(values) if values else None
            rows.append(row)
            shown = [f"{row[name]:.2f}" for name in ("mean", "sd", "one", "cap", "lag1")]
            bytes_ = "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"
            rounds_ = "-" if row["rounds"] is None else f"{row['rounds']:.1f}"
            table.add_row(task, rule, *shown, rounds_, bytes_, f"{row['monitor_share']:.4f}")
    Console(width=150).print(table)
    finish("fda_rules", {"n": {"tasks": len(tasks), "seeds": seeds, "rounds": rounds}, "rules": rows}, quick)


if __name__ == "__main__":
    main()
