"""FedAPM and its peers: the theory on quadratics, and a fair comparison on clients that are unlike.

Theory: the dual invariant under half participation, lost uploads and a 4-bit codec with memory; descent of the augmented
Lagrangian under the stated rho and sigma; the distance of each method's fixed point from the optimum, solved for.
Comparison: every method tries the same number of settings (a step size of the clients times a second number of its own)
on the clients' validation data with a seed of its own (`--tune`, kept in bench/results); then other seeds, judged on the
clients' test data after the last round. Every method does the same local steps a round with the same cohorts. The second
number of partial methods is which part is personal, the head or the stem; FedAPM's rho is "auto".
Bytes to the target: up and down when a method is first measured there; the target is the level that the best of the
others reaches at the end, less one standard error.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import taciturn
from bench.common import RESULTS, finish, parser
from bench.quadratics import Federated, Quadratics
from taciturn import Experiment, Method, TaskSpec, codecs, data, methods, models, participation, partition, server, solvers
from taciturn.experiment.result import worst_decile

TUNED, TUNING_SEED = RESULTS / "fedapm_tuned.json", 1000
LR, LARGE = (0.03, 0.1, 0.3), (0.1, 0.3, 1.0)
HEAD, STEM = partition.layers(personal="head"), partition.layers(personal="stem")
STEPS = 10


# ------------------------------------------------------------------------------------------------------------- theory


def _admm(rho: float, sigma: float, steps: int, solver: Any = None, **parts: Any) -> Method:
    optimizer = solver or solvers.sgd(lr=0.1)
    half = {"v_steps": steps, "u_steps": steps}
    return methods.fedapm(rho=rho, sigma=sigma, u=optimizer, **half, **parts)


def invariant(rounds: int) -> float:
    """Largest imbalance of the duals: half of the clients, lost uploads, 4 bits."""
    problem, half = Quadratics(clients=8, d=12, p=4), participation.uniform(count=4)
    method = _admm(0.7, 0.4, 3, codec=codecs.quantize4(), participation=half)
    run, worst = Federated(problem, method, lose=lambda r, i: (3 * r + i) % 5 == 0), 0.0
    for _ in range(rounds):
        run.round()
        worst = max(worst, run.imbalance())
    return worst


def descent(rounds: int) -> int:
    """Rounds in which the Lagrangian falls by less than lemma 1 says, blocks solved, all and half of the clients."""
    problem = Quadratics()
    largest = problem.lipschitz()
    rho = 3 * max(largest["u"], largest["uv"])
    exact = _admm(rho, max(1.01 * 8 * rho / 15, largest["v"]), 1, solvers.lbfgs(iterations=12))
    exact = exact.replace(solver=replace(exact.solver, u_start="own"))
    counts = (problem.clients, problem.clients // 2)
    return sum(
        Federated(problem, exact.replace(participation=participation.uniform(count=count))).violations(rounds)
        for count in counts
    )


def bias(steps: int = 5) -> dict[str, float]:
    """Distance of each method's fixed point from the optimum, over |u*|, at `steps` local steps of each block."""
    problem, plain = Quadratics(), solvers.sgd(lr=0.1)
    best = problem.optimum()[0]
    tried = {
        "admm": _admm(0.7, 0.4, steps),
        "fedalt": methods.fedalt(u=plain, v_steps=steps, u_steps=steps),
        "fedsim": methods.fedsim(u=plain, steps=steps),
    }
    return {name: float((Federated(problem, m).fixed_point() - best).norm() / best.norm()) for name, m in tried.items()}


# --------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Case:
    """A task: its source by (validation fraction), model, clients a round, batch, rounds, and what clips gradients."""

    source: Callable[[float], Any]
    model: Any
    count: int
    batch: int
    rounds: int
    clip: float | None = None
    lr: tuple[float, ...] = LR
    seeds: int = 5


SHARED = Path(__file__).parents[2] / "shared" / "data"  # real data, where they lie beside the project

CASES = {
    "activity": Case(
        lambda held: data.activity(path=str(SHARED / "hapt"), validation=held), models.temporal(), 6, 16, 30, 5.0, LARGE, 3
    ),
    "turbofan": Case(
        lambda held: data.turbofan(path=str(SHARED / "cmapss"), test=0.2, validation=held),
        models.temporal(channels=(16, 16)), 10, 16, 40, 1.0, seeds=3,
    ),
    "air": Case(
        lambda held: data.air(path=str(SHARED / "beijing_air"), validation=held), models.mlp(hidden=(32,)), 4, 32, 40, 5.0
    ),
    "heart": Case(
        lambda held: data.heart(path=str(SHARED / "heart_disease"), validation=held), models.mlp(hidden=(16,)), 2, 16, 40
    ),
    "digits": Case(
        lambda held: data.digits(
            clients=20, split=data.dirichlet(alpha=0.3, min_partition_size=15), central=0.0, validation=held
        ),
        models.mlp(hidden=(64,)), 4, 16, 40, None, LARGE,
    ),
    "digits-permuted": Case(
        lambda held: data.digits(clients=20, central=0.0, validation=held, permuted=True),
        models.mlp(hidden=(64,)), 4, 16, 40, None, LARGE,
    ),
}  # fmt: skip
QUICK = ("activity", "heart", "digits", "digits-permuted")
Make = Callable[[Any, float], Method]
# name -> (method from an optimizer and a second number, the numbers that are tried)
PEERS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "fedavg": (lambda u, rate: methods.fedavg(u, server=server.sgd(lr=rate)), (1.0, 1.5)),
    "fedprox": (lambda u, mu: methods.fedprox(u, mu=mu), (0.01, 0.1)),
    "scaffold": (lambda u, rate: methods.scaffold(u.lr, rate=rate), (1.0, 1.5)),
    "fedadmm": (lambda u, rho: methods.fedadmm(u, rho=rho), (0.05, 0.3)),
    "fedsim": (lambda u, stem: methods.fedsim(STEM if stem else HEAD, u=u), (0, 1)),
    "fedalt": (lambda u, stem: methods.fedalt(STEM if stem else HEAD, u=u), (0, 1)),
    "admm": (lambda u, stem: methods.fedapm(STEM if stem else HEAD, u=u, sigma=0.05), (0, 1)),
    "ditto": (lambda u, lam: methods.ditto(u, lam=lam), (0.1, 1.0)),
    "pfedme": (lambda u, lam: methods.pfedme(0.2 / lam, lam=lam, local_lr=u.lr), (1.0, 15.0)),
    "local": (lambda u, share: methods.local(u, steps=int(share * STEPS)), (1.0, 3.0)),
}

FIRST, FINE = "fedavg", "fedavg+ft"  # the second goes on from the first: all clients, at home, from the trained model
FINE_STEPS = (10.0, 50.0)


@dataclass(frozen=True)
class _Given:
    """A model source that gives a trained model."""

    model: nn.Module

    def build(self, sample: Tensor, outputs: int) -> nn.Module:
        """The model."""
        return self.model


def experiment(case: Case, method: Method, seed: int, tuning: bool) -> Experiment:
    """A method on a task; tuning: on validation data."""
    method = method.replace(participation=participation.uniform(count=case.count), batch_size=case.batch)
    task = TaskSpec(case.source(0.2 if tuning else 0.0), case.model)
    on = "validation" if tuning else "test"
    return Experiment(
        task, method, rounds=case.rounds, seed=seed, evaluate_on=on, evaluate_every=case.rounds if tuning else 5
    )


def optimizer(case: Case, lr: float) -> solvers.sgd:
    """Plain SGD with the task's clipping."""
    return solvers.sgd(lr=lr, clip=case.clip)


def run_one(
    task: str, name: str, setting: tuple[float, float], seed: int, tuning: bool, base: Any = None
) -> dict[str, Any]:
    """One method on one task -> where it ended, worst decile, and the curve of (value, bytes); base: of fedavg+ft."""
    case, job = CASES[task], {"task": task, "method": name, "setting": list(setting), "seed": seed}
    lr, second = setting
    try:
        first = PEERS[FIRST][0](optimizer(case, base[0]), base[1]) if base else None
        method = first or PEERS[name][0](optimizer(case, lr), second)
        result = taciturn.run(experiment(case, method, seed, tuning))
        if base:
            fine = methods.local(optimizer(case, lr), steps=int(second), batch_size=case.batch)
            start = TaskSpec(case.source(0.2 if tuning else 0.0), _Given(result.model))
            on = "validation" if tuning else "test"
            done = taciturn.run(Experiment(start, fine, rounds=1, seed=seed, evaluate_on=on))
            result = replace(result, history=[*result.history[:-1], result.history[-1] | {
                name: done.history[-1][name] for name in ("metrics", "spread")
            }])  # fmt: skip
    except taciturn.TaciturnError as error:
        return job | {"failed": str(error)}
    metric, goal = result.header["metric"]["name"], result.header["metric"]["goal"]
    lines = [line for line in result.history if line["metrics"]]
    rows = lines[-1]["spread"][metric]
    curve = [(fmean(line["spread"][metric]), line["bytes_up"] + line["bytes_down"], line["round"]) for line in lines]
    return job | {"value": fmean(rows), "worst": worst_decile(rows, goal), "goal": goal, "metric": metric, "curve": curve}


def each(work: Callable[..., dict[str, Any]], jobs: list[tuple[Any, ...]], processes: int) -> list[dict[str, Any]]:
    """Runs in processes of one thread; each is printed when it ends."""
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), **one_thread) as pool:
        runs = []
        for future in as_completed([pool.submit(work, *job) for job in jobs]):
            runs.append(future.result())
            print(*(value for name, value in runs[-1].items() if name not in ("curve", "goal", "worst")), flush=True)
        return runs


def _better(run: dict[str, Any]) -> float:
    """Larger is better."""
    return -1e9 if "failed" in run else run["value"] * (1 if run["goal"] == "max" else -1)


def tune(tasks: list[str], names: list[str], processes: int) -> None:
    """The best setting of each method on each task, into bench/results, beside those of other tasks and methods."""
    found = json.loads(TUNED.read_text()) if TUNED.exists() else {"seed": TUNING_SEED, "chosen": {}, "tried": []}

    def settle(jobs: list[tuple[Any, ...]]) -> None:
        runs = each(run_one, jobs, processes)
        tried = {(one["task"], one["method"]) for one in runs}
        for task, name in tried:
            mine = [one for one in runs if (one["task"], one["method"]) == (task, name)]
            found["chosen"].setdefault(task, {})[name] = max(mine, key=_better)["setting"]
        kept = [one for one in found["tried"] if (one["task"], one["method"]) not in tried]
        keys = ("task", "method", "setting", "value", "failed")
        found["tried"] = kept + [{key: one.get(key) for key in keys} for one in runs]
        TUNED.write_text(json.dumps(found, indent=1) + "\n")

    for task in tasks:
        grids = {name: list(itertools.product(CASES[task].lr, PEERS[name][1])) for name in PEERS if name in names}
        settle([(task, name, s, TUNING_SEED, True) for name, grid in grids.items() for s in grid])
        if FINE in names:
            grid = list(itertools.product(CASES[task].lr, FINE_STEPS))
            settle([(task, FINE, s, TUNING_SEED, True, found["chosen"][task][FIRST]) for s in grid])


def summary(runs: list[dict[str, Any]], tasks: list[str]) -> dict[str, Any]:
    """Per task: mean, standard error and worst decile of each method; rounds and bytes to the target; who is best."""
    told: dict[str, Any] = {name: {} for name in ("tasks", "standard_error", "worst_decile", "bytes_to_target")}
    told |= {"rounds_to_target": {}, "best": {}, "target": {}, "byte_ratio_admm": {}}
    for task in tasks:
        rows: dict[str, list[dict[str, Any]]] = {}
        for one in runs:
            if one["task"] == task and "failed" not in one:
                rows.setdefault(one["method"], []).append(one)
        sign = 1 if next(iter(rows.values()))[0]["goal"] == "max" else -1
        mean = {name: fmean(one["value"] for one in many) for name, many in rows.items()}
        error = {name: stdev(o["value"] for o in many) / len(many) ** 0.5 if len(many) > 1 else None
                 for name, many in rows.items()}  # fmt: skip
        order = sorted(mean, key=lambda name: -sign * mean[name])
        rival = next(name for name in order if name not in ("admm", "local"))
        target = mean[rival] - sign * (error[rival] or 0.0)
        reached = {name: [_reached(one["curve"], target, sign) for one in many] for name, many in rows.items()}
        to = {
            name: [fmean(hit[k] for hit in many if hit) if all(many) else None for k in (1, 2)]
            for name, many in reached.items()
        }
        told["tasks"][task], told["standard_error"][task], told["best"][task] = mean, error, order[0]
        told["worst_decile"][task] = {name: fmean(one["worst"] for one in many) for name, many in rows.items()}
        told["target"][task] = {"value": target, "of": rival}
        told["bytes_to_target"][task] = {name: spent for name, (spent, _) in to.items()}
        told["rounds_to_target"][task] = {name: rounds for name, (_, rounds) in to.items()}
        ours, theirs = to["admm"][0], to[rival][0]
        told["byte_ratio_admm"][task] = theirs / ours if ours and theirs else None
    return told


def _reached(curve: list[Any], target: float, sign: int) -> Any:
    return next((point for point in curve if sign * point[0] >= sign * target), None)


def _show(figures: dict[str, Any], tasks: list[str]) -> None:
    names = list(figures["tasks"][tasks[0]])
    for key, title in (("tasks", "mean over clients after the last round"), ("worst_decile", "worst decile of clients")):
        table = Table("method", *tasks, title=title)
        for name in names:
            cells = []
            for task in tasks:
                error = figures["standard_error"][task].get(name) if key == "tasks" else None
                value = figures[key][task].get(name)
                spread = "" if error is None else f" ± {error:.4f}"
                cells.append("failed" if value is None else f"{value:.4f}{spread}")
            table.add_row(name, *cells)
        Console(width=40 + 22 * len(tasks)).print(table)
    table = Table("method", *tasks, title="kB to the target")
    for name in names:
        spent = [figures["bytes_to_target"][task].get(name) for task in tasks]
        table.add_row(name, *("-" if one is None else f"{one / 1e3:,.0f}" for one in spent))
    Console(width=40 + 22 * len(tasks)).print(table)


def main() -> None:
    """Tune, or run and print."""
    options = parser(__doc__)
    options.add_argument("--tune", action="store_true", help="choose the settings on a seed of its own")
    options.add_argument("--tasks", nargs="*", choices=CASES, help="some of the tasks")
    options.add_argument("--methods", nargs="*", choices=[*PEERS, FINE], help="with --tune: some of the methods")
    options.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = options.parse_args()
    there = [t for t in CASES if t.startswith("digits") or SHARED.is_dir()]
    tasks = chosen.tasks or [t for t in there if t in QUICK or not chosen.quick]
    if chosen.tune:
        tune(tasks, chosen.methods or [*PEERS, FINE], chosen.processes)
        return
    settings = json.loads(TUNED.read_text())["chosen"]
    tasks = [task for task in tasks if task in settings]
    seeds = {task: 1 if chosen.quick else CASES[task].seeds for task in tasks}
    theory = {
        "invariant_max": invariant(20 if chosen.quick else 100),
        "descent_violations": descent(4 if chosen.quick else 25),
        "fixed_point_bias": bias(),
    }
    jobs = [
        (task, name, tuple(setting), seed, False, settings[task][FIRST] if name == FINE else None)
        for task in tasks
        for seed in range(seeds[task])
        for name, setting in settings[task].items()
    ]
    runs = each(run_one, jobs, chosen.processes)
    figures = theory | summary(runs, tasks)
    _show(figures, tasks)
    missing = {task: "not run: --quick, or no data folder" for task in CASES if task not in tasks}
    n = {"tasks": len(tasks), "seeds": seeds, "rounds": {task: CASES[task].rounds for task in tasks}}
    figures |= {"not_run": missing, "n": n}
    finish("fedapm", figures | ({} if chosen.quick else {"runs": runs}), chosen.quick)


if __name__ == "__main__":
    main()
