"""Bytes to one and the same accuracy: a pretrained sentence encoder, fine-tuned whole and by adapters, by ten clients.

Task: are the openings of two BBC articles about one topic (`data.bbc_pairs`)? Clients meet unlike topics. Methods: full
FedAdam in float32; only the head; LoRA in all layers; LoRA of rank 1 that synchronises by drift (FDA) with 4 bits a value
and error feedback both ways (`lora-lean`). Target = head_only + 0.5 (full - head_only), with the best accuracy of each; a
method's bytes are those, up and down, when it is first measured at the target or above.
Step sizes: those of the recipes, found by a few runs by hand, or where `--tune` has run each method's grid on a seed of
its own, the best of that.
Speed: samples a CPU second of local training, one thread, beside a plain loop over the same model, batches and steps.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import taciturn
from bench.common import RESULTS, finish, mean_spread, parser
from taciturn import Experiment, Method, TaskSpec, data, models, partition, solvers, sync
from taciturn.experiment.runner import _round, prepare

TUNED, TUNING_SEED = RESULTS / "finetune_tuned.json", 1000
METHODS = {"head_only": "pairs-head", "full_fedadam": "pairs-full", "lora": "pairs-lora", "lora_fda_q4": "lora-lean"}
ROUNDS = {"head_only": 100, "full_fedadam": 8, "lora": 12, "lora_fda_q4": 6}
EVERY = {"head_only": 5, "full_fedadam": 1, "lora": 2, "lora_fda_q4": 1}
GRID: dict[str, dict[str, tuple[float, ...]]] = {
    "head_only": {"lr": (0.1, 0.3, 1.0)},
    "full_fedadam": {"lr": (0.1,), "server": (5e-4, 1e-3, 2e-3)},
    "lora": {"lr": (1e-3, 2e-3, 4e-3)},
    "lora_fda_q4": {"lr": (1e-3, 2e-3, 4e-3)},
}


def _experiment(name: str, seed: int, settings: dict[str, float]) -> Experiment:
    """A recipe with the step sizes of the settings."""
    recipe = taciturn.recipe(METHODS[name])
    method = recipe.method
    for part, field in (("solver", "lr"), ("server", "server")):
        if field in settings:
            method = method.replace(**{part: replace(getattr(method, part), lr=settings[field])})
    return recipe.replace(method=method, seed=seed, rounds=ROUNDS[name], evaluate_every=EVERY[name], name=name, target=None)


def _run(name: str, seed: int, settings: dict[str, float]) -> dict[str, Any]:
    """Accuracy and bytes at each evaluation, and what it cost."""
    torch.set_num_threads(1)
    began = time.process_time()
    result = taciturn.run(_experiment(name, seed, settings))
    curve = [
        (line["metrics"]["accuracy"], line["bytes_up"] + line["bytes_down"]) for line in result.history if line["metrics"]
    ]
    steps = fmean(line["steps"] for line in result.history)
    return {"method": name, "seed": seed, "settings": settings, "curve": curve, "steps": steps,
            "cpu_seconds": time.process_time() - began}  # fmt: skip


def _all(jobs: list[tuple[str, int, dict[str, float]]], processes: int) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        runs = []
        for future in as_completed([pool.submit(_run, *job) for job in jobs]):
            run = future.result()
            best = max(accuracy for accuracy, _ in run["curve"])
            print(f"{run['method']:14} seed {run['seed']}  best {best:.3f}  {run['cpu_seconds']:.0f} CPU s", flush=True)
            runs.append(run)
        return runs


def _tune(processes: int) -> None:
    """The best of each grid on the tuning seed, written where the bench reads it."""
    jobs = []
    for name, grid in GRID.items():
        jobs += [(name, TUNING_SEED, dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
    runs = _all(sorted(jobs, key=lambda job: job[0] == "head_only"), processes)
    best: dict[str, Any] = {}
    for run in runs:
        run["best"] = max(accuracy for accuracy, _ in run["curve"])
        if run["best"] > best.get(run["method"], {"best": -1.0})["best"]:
            best[run["method"]] = {key: run[key] for key in ("settings", "best")}
    tried = [{key: run[key] for key in ("method", "settings", "best")} for run in runs]
    TUNED.write_text(json.dumps({"seed": TUNING_SEED, "rounds": ROUNDS, "chosen": best, "tried": tried}, indent=1) + "\n")


def _to(run: dict[str, Any], target: float) -> int | None:
    """Bytes until the target is first measured."""
    return next((spent for accuracy, spent in run["curve"] if accuracy >= target), None)


# ------------------------------------------------------------------------------------------------------------- speed


def _speed(layers: range, repeats: int, clients: int) -> tuple[float, float]:
    """Samples a CPU second: (ours, a plain loop), side by side; adapters on queries and values of these layers."""
    torch.set_num_threads(1)
    names = tuple(f"body.encoder.layer.{i}.attention.self.{n}" for i in layers for n in ("query", "value"))
    part = partition.lora(rank=4, alpha=8, targets=names, also="head")
    method = Method(partition=part, solver=solvers.sgd(lr=0.1), sync=sync.every(steps=4), batch_size=16)
    run = prepare(
        Experiment(TaskSpec(data.bbc(clients=clients, split=data.iid(), limit=80 * clients), models.encoder()), method)
    )
    model, train = run.task.model, run.task.train
    weights = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in weights]
    optimizer = torch.optim.SGD(weights, lr=0.1)

    def plain() -> None:
        for client in range(clients):
            with torch.no_grad():
                for weight, value in zip(weights, start, strict=True):
                    weight.copy_(value)
            for step in range(4):
                batch = train.fetch(torch.tensor([client]), torch.arange(16 * step, 16 * step + 16).unsqueeze(0))
                optimizer.zero_grad()
                F.cross_entropy(model(batch["input"][0]), batch["target"][0]).backward()
                optimizer.step()

    for _ in range(2 if layers[0] else 1):  # features of the frozen prefix are computed in these, where there is one
        _round(run)
    best = [0.0, 0.0]
    for _ in range(repeats):
        for place, work in enumerate((lambda: _round(run), plain)):
            began = time.process_time()
            work()
            best[place] = max(best[place], clients * 4 * 16 / (time.process_time() - began))
    return best[0], best[1]


# ------------------------------------------------------------------------------------------------------------- report


def _figures(runs: list[dict[str, Any]], seeds: range) -> dict[str, Any]:
    """Target and bytes to it, seed by seed; means of those that got there."""
    found: dict[str, Any] = {"task": "bbc_pairs"}
    rows: dict[str, list[Any]] = {"target": [], "head_only": [], "full": [], **{f"bytes_{n}": [] for n in METHODS}}
    for seed in seeds:
        mine = {run["method"]: run for run in runs if run["seed"] == seed}
        best = {name: max(accuracy for accuracy, _ in run["curve"]) for name, run in mine.items()}
        rows["head_only"].append(best["head_only"])
        rows["full"].append(best["full_fedadam"])
        rows["target"].append((best["head_only"] + best["full_fedadam"]) / 2)
        for name, run in mine.items():
            rows[f"bytes_{name}"].append(_to(run, rows["target"][-1]))
            rows.setdefault(f"best_{name}", []).append(best[name])
    for key in ("target", "head_only", "full"):
        found[key] = fmean(rows[key])
    for name in METHODS:
        found[f"bytes_{name}"] = mean_spread(rows[f"bytes_{name}"])["mean"]
        found[f"best_{name}"] = mean_spread(rows[f"best_{name}"])
    full = found["bytes_full_fedadam"]
    for key, name in (("ratio_lora", "lora"), ("ratio", "lora_fda_q4")):
        ours = found[f"bytes_{name}"]
        found[key] = full / ours if full and ours else None
    found["per_seed"] = rows
    return found


def main() -> None:
    """Tune, or run and print."""
    options = parser(__doc__)
    options.add_argument("--tune", action="store_true", help="choose the step sizes on a seed of its own")
    options.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = options.parse_args()
    if chosen.tune:
        _tune(chosen.processes)
        return
    found = json.loads(TUNED.read_text())["chosen"] if TUNED.exists() else {}
    tuned = {name: found.get(name, {"settings": {}})["settings"] for name in METHODS}
    seeds = range(1 if chosen.quick else 3)
    jobs = [(name, seed, tuned[name]) for seed in seeds for name in ("lora_fda_q4", "full_fedadam", "lora", "head_only")]
    runs = _all(jobs, chosen.processes)
    figures = _figures(runs, seeds)
    repeats, clients = (1, 4) if chosen.quick else (5, 8)
    ours, plain = _speed(range(4, 6), repeats, clients)
    everywhere, plain_everywhere = _speed(range(6), repeats, clients)
    figures |= {
        "samples_per_cpu_second": ours,
        "samples_per_cpu_second_plain_loop": plain,
        "samples_per_cpu_second_all_layers": everywhere,
        "samples_per_cpu_second_plain_loop_all_layers": plain_everywhere,
        "n": {"tasks": 1, "seeds": len(seeds), "rounds": ROUNDS},
    }
    table = Table(
        "method", "best accuracy", "bytes to the target", "fewer than full FedAdam", "local steps a round", "CPU s"
    )
    for name in METHODS:
        mine = [run for run in runs if run["method"] == name]
        spent, full = figures[f"bytes_{name}"], figures["bytes_full_fedadam"]
        ratio = f"{full / spent:,.0f} x" if spent and full else "-"
        table.add_row(
            name, f"{figures[f'best_{name}']['mean']:.3f}", f"{spent:,.0f}" if spent else "not reached", ratio,
            f"{fmean(run['steps'] for run in mine):.1f}", f"{fmean(run['cpu_seconds'] for run in mine):.0f}",
        )  # fmt: skip
    Console(width=120).print(table)
    print(
        f"target {figures['target']:.3f}; samples a CPU second, adapters in the last third: {ours:.0f}, plain "
        f"loop {plain:.0f}; in all layers: {everywhere:.0f}, plain loop {plain_everywhere:.0f}"
    )
    finish("finetune", figures | {"runs": runs} if not chosen.quick else figures, chosen.quick)


if __name__ == "__main__":
    main()
