"""FedOpt on MNIST-5k: server optimizers, FedProx and compressed updates; each optimizer tuned with the same budget.

50 clients, Dirichlet(0.3) labels, 10 a round, MLP 784-100-10, two local epochs, batch 10. Every method tries nine
settings (client step size x server step size, or x mu) on the clients' validation data with a seed that is not among
the test seeds; then five seeds, judged on the server's test set. Target: 0.98 x FedAvg's mean best test accuracy.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import taciturn
from bench.common import arguments, finish, mean_spread
from taciturn import Broadcast, codecs, server, solvers

CLIENT_LR = (0.05, 0.15, 0.5)
GRIDS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "FedAvg": (lambda lr: {"server": server.sgd(lr=lr)}, (0.5, 1.0, 1.5)),
    "FedAvgM": (lambda lr: {"server": server.momentum(lr=lr)}, (0.1, 0.3, 1.0)),
    "FedAdam": (lambda lr: {"server": server.adam(lr=lr)}, (0.003, 0.01, 0.03)),
    "FedAdamW": (lambda lr: {"server": server.adamw(lr=lr)}, (0.003, 0.01, 0.03)),
    "FedAdagrad": (lambda lr: {"server": server.adagrad(lr=lr)}, (0.01, 0.03, 0.1)),
    "FedYogi": (lambda lr: {"server": server.yogi(lr=lr)}, (0.003, 0.01, 0.03)),
    "FedProx": (lambda mu: {"mu": mu}, (0.001, 0.01, 0.1)),
}
EIGHT = Broadcast(codecs.quantize8("block"))
# with the setting that the method without compression was tuned to
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "FedAvg float16": ("FedAvg", {"codec": codecs.cast("float16"), "broadcast": Broadcast(codecs.cast("float16"))}),
    "FedAvg bfloat16": ("FedAvg", {"codec": codecs.cast("bfloat16"), "broadcast": Broadcast(codecs.cast("bfloat16"))}),
    "FedAvg 4 bits up, 8 down": ("FedAvg", {"codec": codecs.quantize4(), "broadcast": EIGHT}),
    "FedAvg 2 bits up, 8 down": ("FedAvg", {"codec": codecs.quantize2(), "broadcast": EIGHT}),
    "FedAvg top 1 % up, 8 bits down": (
        "FedAvg",
        {"codec": codecs.error_feedback(codecs.top_k(share=0.01)), "broadcast": EIGHT},
    ),
    "FedAvgM 4 bits up, 8 down": ("FedAvgM", {"codec": codecs.quantize4(), "broadcast": EIGHT}),
}
TUNING_SEED = 1000


def _experiment(setting: dict[str, Any], rounds: int, seed: int, validate: bool) -> taciturn.Experiment:
    base = taciturn.recipe("mnist")
    parts = dict(setting)
    solver = solvers.sgd(lr=parts.pop("client_lr"))
    mu = parts.pop("mu", None)
    if mu is not None:
        solver = solvers.prox(mu=mu, solver=solver)
    data = taciturn.data.mnist5k(clients=50, split=base.task.data.split, test=0.1, validation=0.1)
    task = taciturn.TaskSpec(data, base.task.model)
    every, on = (rounds // 4, "validation") if validate else (0, "test")
    method = base.method.replace(solver=solver, **parts)
    return base.replace(task=task, method=method, rounds=rounds, seed=seed, evaluate_on=on, evaluate_clients_every=every)


def _run(job: tuple[dict[str, Any], int, int, bool]) -> dict[str, Any]:
    setting, rounds, seed, validate = job
    torch.set_num_threads(1)
    try:
        result = taciturn.run(_experiment(setting, rounds, seed, validate))
    except taciturn.TaciturnError as error:
        return {"failed": str(error)}
    counts, values = (result.history[-1]["spread"][name] for name in ("count", "accuracy"))
    clients = sum(n * a for n, a in zip(counts, values, strict=True)) / sum(counts)
    curve = [(h["metrics"]["accuracy"], h["bytes_up"] + h["bytes_down"]) for h in result.history]
    return {"clients": clients, "curve": curve, "worst_decile": result.summary["worst_decile"]}


def _score(run: dict[str, Any]) -> float:
    return run.get("clients", 0.0)


def main() -> None:
    """Tune, run, print."""
    quick = arguments(__doc__).quick
    rounds, seeds = (12, 2) if quick else (60, 5)
    settings = {
        name: [{"client_lr": lr, **make(value)} for lr, value in itertools.product(CLIENT_LR, values)]
        for name, (make, values) in GRIDS.items()
    }
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [(setting, rounds, TUNING_SEED, True) for group in settings.values() for setting in group]
        tuned = iter(list(pool.map(_run, jobs)))
        best = {name: max((_score(next(tuned)), i) for i in range(len(group)))[1] for name, group in settings.items()}
        chosen = {name: group[best[name]] for name, group in settings.items()}
        chosen |= {name: chosen[base] | parts for name, (base, parts) in COMPRESSED.items()}
        jobs = [(setting, rounds, seed, False) for setting in chosen.values() for seed in range(seeds)]
        outcomes = list(pool.map(_run, jobs))
    runs = {name: outcomes[i * seeds : (i + 1) * seeds] for i, name in enumerate(chosen)}
    target = 0.98 * fmean(max(a for a, _ in run["curve"]) for run in runs["FedAvg"])
    rows = {name: _row(group, target) | {"setting": str(chosen[name])} for name, group in runs.items()}
    base = rows["FedAvg"]["bytes_to_target"]["mean"]
    for row in rows.values():
        mine = row["bytes_to_target"]["mean"]
        row["byte_ratio_FedAvg"] = None if mine is None or base is None else base / mine
    for name, (plain, _) in COMPRESSED.items():
        theirs, mine = (rows[one]["bytes_to_target"]["mean"] for one in (plain, name))
        rows[name]["byte_ratio_uncompressed"] = None if mine is None or theirs is None else theirs / mine
    _print(rows, target)
    n = {"tasks": 1, "seeds": seeds, "rounds": rounds, "settings_per_method": 9}
    finish("fedopt", {"n": n, "target": target, "methods": rows}, quick)


def _row(group: list[dict[str, Any]], target: float) -> dict[str, Any]:
    failed = sum("failed" in run for run in group)
    curves = [run.get("curve", []) for run in group]
    first = [next((r for r, (a, _) in enumerate(curve) if a >= target), None) for curve in curves]
    return {
        "accuracy": mean_spread([curve[-1][0] if curve else None for curve in curves]),
        "worst_decile": mean_spread([run.get("worst_decile") for run in group]),
        "rounds_to_target": mean_spread([None if r is None else r + 1.0 for r in first]),
        "bytes_to_target": mean_spread([None if r is None else float(c[r][1]) for r, c in zip(first, curves, strict=True)]),
        "bytes": mean_spread([float(curve[-1][1]) if curve else None for curve in curves]),
        "reached": sum(r is not None for r in first),
        "failed": failed,
    }


def _print(rows: dict[str, Any], target: float) -> None:
    table = Table("method", "accuracy", "worst decile", f"rounds to {target:.3f}", "MB to target", "reached", "setting")
    for name, row in rows.items():

        def cell(key: str, scale: float = 1.0, places: int = 3, row: dict[str, Any] = row) -> str:
            mean, spread = row[key]["mean"], row[key]["spread"]
            return "-" if mean is None else f"{mean / scale:.{places}f} ± {spread / scale:.{places}f}"

        cells = cell("accuracy"), cell("worst_decile"), cell("rounds_to_target", places=1)
        table.add_row(name, *cells, cell("bytes_to_target", 1e6, 1), str(row["reached"]), row["setting"])
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
