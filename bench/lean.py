"""The method that says the least, `Method.lean`, against FedAdam with tuned steps: bytes to one and the same target.

Reference: FedAdam, float32 both ways, two local epochs a round; client step (4 values) x server step (3 values), tuned on
a seed of its own by the clients' validation data. The user's client step, which FedAvg and the lean method have, is the
best of the same four values for FedAvg; of the lean method nothing is tuned. Target: 0.98 x FedAdam's best metric of that
seed (1.02 x its smallest error) on held-out data, the server's where it has some, else the clients'. The lean method gets
four times the rounds of FedAdam; for robustness, ablation and search twice. Bytes up and down, frames included, without
evaluation; not reached is null, and counted as a failure.
--search: candidates on the five training tasks, by which the parts and constants of `Method.lean` were chosen; these tasks
are not among those that are reported. The full run adds the robustness (a third and three times the client step), and the
ablation: each part as the user had it. --quick: two values of each step, one seed, three tasks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from bench.common import finish, parser
from bench.lean_tasks import PARTS, TASKS, TRAINING, UNSEEN, Job, available, kept
from taciturn import Method, codecs, server, sync
from taciturn.core.types import Codec

TUNING_SEED = 1000
CLIENT_LR, SERVER_LR = (0.03, 0.1, 0.3, 1.0), (0.01, 0.03, 0.1)
QUICK = ("mnist-deep", "mnist-shards", "cancer")
MORE, FEW = 4, 2  # rounds of the lean method for one of FedAdam; where it is changed
LEVELS = (0.95, 0.96, 0.97, 0.98, 0.985)  # of FedAdam's best metric, in the search: one crossing alone is chance
LOST = 0.5  # of the metric, below which a run has diverged


@dataclass(frozen=True)
class Crew:
    """Processes that run jobs. keep: a folder for what is done, which is not done again."""

    processes: int
    keep: Path | None = None

    def all(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The run of each job."""
        with ProcessPoolExecutor(self.processes, mp_context=get_context("spawn")) as pool:
            return _told(jobs, pool.map(kept, jobs, itertools.repeat(self.keep)))


def _told(jobs: Sequence[Job], done: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    runs = []
    for job, run in zip(jobs, done, strict=True):
        spent = run["curve"][-1][1] if run["curve"] else 0
        name = f"{job.method} {job.name}".strip()
        line = f"best {_best(run):.4f}  {spent / 1e6:9.3f} MB  {run['cpu_seconds']:4.0f} CPU s  {run.get('failed', '')}"
        print(f"{job.task:12} {name:30} seed {job.seed:4}  lr {job.lr:<5.3g} {job.server_lr:<5.3g}  {line}", flush=True)
        runs.append(run)
    return runs


def tuned(tasks: Sequence[str], quick: bool, crew: Crew) -> dict[str, dict[str, Any]]:
    """The steps of each task: {"client": FedAvg's best, "fedadam": (client, server)}, and what was tried."""
    client, steps = (CLIENT_LR[1:3], SERVER_LR[:2]) if quick else (CLIENT_LR, SERVER_LR)
    jobs = []
    for task in tasks:
        known: dict[str, Any] = {"task": task, "seed": TUNING_SEED, "rounds": TASKS[task][4], "tuning": True}
        jobs += [Job(method="fedavg", lr=lr, **known) for lr in client]
        pairs = itertools.product(client, steps)
        jobs += [Job(method="fedadam", lr=lr, server_lr=at, **known) for lr, at in pairs]
    runs = list(zip(jobs, crew.all(jobs), strict=True))
    found = {}
    for task in tasks:
        best = {
            method: max((run["score"], -place, job) for place, (job, run) in enumerate(runs)
                        if (job.task, job.method) == (task, method))[2]
            for method in ("fedavg", "fedadam")
        }  # fmt: skip
        tried = {f"{job.method} {job.lr} {job.server_lr}": run["score"] for job, run in runs if job.task == task}
        found[task] = {
            "client": best["fedavg"].lr,
            "fedadam": (best["fedadam"].lr, best["fedadam"].server_lr),
            "tried": tried,
        }
    return found


# --------------------------------------------------------------------------------------------------------------- rows


def _best(run: dict[str, Any]) -> float:
    values = [value for value, _, _ in run["curve"] if math.isfinite(value)]
    return max(values, default=-math.inf)


def _to(run: dict[str, Any], target: float, place: int) -> float | None:
    """Bytes (1) or simulated seconds (2) until the target is first measured."""
    return next((point[place] for point in run["curve"] if point[0] >= target), None)


def _target(best: float, level: float = 0.98) -> float:
    return level * best if best > 0 else (2 - level) * best


def _row(task: str, seed: int, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A task and seed: who reached the target, and with what."""
    adam, lean, avg = (runs[name] for name in ("fedadam", "lean", "fedavg"))
    target = _target(_best(adam))
    spent = {name: _to(run, target, 1) for name, run in runs.items()}
    seconds = {name: _to(run, target, 2) for name, run in runs.items()}
    ratio = None if spent["lean"] is None else spent["fedadam"] / spent["lean"]
    time = None if seconds["lean"] is None else seconds["lean"] / seconds["fedadam"]
    last = lean["curve"][-1][0] if lean["curve"] else -math.inf
    sane = _best(avg) > -math.inf and avg["curve"][-1][0] >= _floor(_best(adam))
    return {
        "task": task,
        "seed": seed,
        "d": adam["d"],
        "target": round(target, 4),
        "bytes_fedadam": spent["fedadam"],
        "bytes_lean": spent["lean"],
        "byte_ratio": ratio,
        "points_lost": 100 * (_best(adam) - _best(lean)) if _best(lean) > -math.inf else None,
        "time_ratio": time,
        "best_fedadam": _best(adam),
        "best_fedavg": _best(avg),
        "best_lean": _best(lean),
        "steps_lean": lean.get("steps"),
        "fedavg_reached": spent["fedavg"] is not None,
        "diverged": last < _floor(_best(adam)) and sane,
    }


def _floor(best: float) -> float:
    """Half of the metric, or twice the error, of FedAdam: what falls below has diverged."""
    return LOST * best if best > 0 else best / LOST


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known, None if none is: a run without a finite metric counts as a failure instead."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _geomean(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def study(tasks: Sequence[str], seeds: range, quick: bool, crew: Crew) -> dict[str, Any]:
    """All rows, and what they come to."""
    steps = tuned(tasks, quick, crew)
    jobs: dict[tuple[Any, ...], Job] = {}
    for task, seed in itertools.product(tasks, seeds):
        lr, (adam_lr, server_lr), rounds = steps[task]["client"], steps[task]["fedadam"], TASKS[task][4]
        jobs[task, seed, "fedadam"] = Job(task, "fedadam", adam_lr, server_lr, seed, rounds)
        jobs[task, seed, "fedavg"] = Job(task, "fedavg", lr, 1.0, seed, rounds)
        jobs[task, seed, "lean"] = Job(task, "lean", lr, 1.0, seed, MORE * rounds)
    if not quick:
        for task in tasks:
            lr, rounds = steps[task]["client"], FEW * TASKS[task][4]
            for factor in (1 / 3, 3.0):
                jobs[task, 0, f"lr x {factor:.2g}"] = Job(task, "lean", factor * lr, rounds=rounds)
                jobs[task, 0, f"fedavg, lr x {factor:.2g}"] = Job(task, "fedavg", factor * lr, rounds=rounds // FEW)
            for part in PARTS:
                jobs[task, 0, f"without {part}"] = Job(task, "lean", lr, rounds=rounds, off=part, name=f"without {part}")
    runs = dict(zip(jobs, crew.all([*jobs.values()]), strict=True))
    methods = ("fedadam", "fedavg", "lean")
    rows = [_row(task, seed, {m: runs[task, seed, m] for m in methods}) for task, seed in itertools.product(tasks, seeds)]
    return _figures(rows, seeds, steps, runs, quick)


def _figures(
    rows: list[dict[str, Any]], seeds: range, steps: dict[str, Any], runs: dict[tuple[Any, ...], Any], quick: bool
) -> dict[str, Any]:
    per_task = {}
    for task in steps:
        mine = [row for row in rows if row["task"] == task]
        reached = [row["byte_ratio"] for row in mine if row["byte_ratio"] is not None]
        times = [row["time_ratio"] for row in mine if row["time_ratio"] is not None]
        per_task[task] = {
            "d": mine[0]["d"],
            "byte_ratio": _geomean(reached),
            "reached": len(reached),
            "points_lost": _mean([row["points_lost"] for row in mine]),
            "time_ratio": _geomean(times),
            "fedavg_reached": sum(row["fedavg_reached"] for row in mine),
            "diverged": sum(row["diverged"] for row in mine),
            "client_lr": steps[task]["client"],
            "fedadam_lr": steps[task]["fedadam"],
        }
    ratios = [one["byte_ratio"] for one in per_task.values() if one["byte_ratio"] is not None]
    failures = sum(row["byte_ratio"] is None or row["diverged"] for row in rows)
    figures: dict[str, Any] = {
        "tasks": per_task,
        "byte_ratio_geomean": _geomean(ratios),
        "points_lost_mean": _mean([one["points_lost"] for one in per_task.values()]),
        "failures": failures,
        "diverged": sum(row["diverged"] for row in rows),
        "n": {"tasks": len(per_task), "seeds": len(seeds), "rounds": {task: TASKS[task][4] for task in per_task}},
    }
    if not quick:
        figures |= {"more": _more(rows, runs), "rows": rows, "tuning": steps}
    return figures


def _more(rows: list[dict[str, Any]], runs: dict[tuple[Any, ...], Any]) -> dict[str, dict[str, Any]]:
    """Of seed 0: robustness and ablation, each against the target of that task."""
    targets = {row["task"]: row["target"] for row in rows if row["seed"] == 0}
    found: dict[str, dict[str, Any]] = {}
    for (task, seed, name), run in runs.items():
        if seed == 0 and name not in ("fedadam", "fedavg"):
            best = _best(run)
            found.setdefault(task, {})[name] = {
                "bytes": _to(run, targets[task], 1),
                "best": best if math.isfinite(best) else None,
                "failed": run.get("failed"),
            }
    return found


# ------------------------------------------------------------------------------------------------------------- search


def _sent(up: Codec, down: Codec) -> Method:
    """The lean method with other codecs, up under its memory."""
    lean = Method.lean()
    return lean.replace(codec=replace(lean.codec, codec=up), broadcast=replace(lean.broadcast, codec=down))


def _largest(share: float) -> Method:
    """The largest values both ways, in 3 bits."""
    sent = codecs.chain(codecs.top_k(share=share, least=64), codecs.quantize(bits=3, rounding="nearest"))
    return _sent(sent, sent)


def _factors(up: int = 4, down: int = 2, *, coder: Literal["zstd", "rans"] = "rans", **how: Any) -> Method:
    """Factors of rank `up` and `down`, quantized, then without loss."""
    values = codecs.quantize(**{"bits": 3, "rounding": "nearest", "scale": "block"} | how)
    ways = codecs.lowrank(up), codecs.lowrank(down, turns=3, warm=False)
    return _sent(*(codecs.lossless(codecs.chain(factors, values), coder) for factors in ways))


def candidates() -> dict[str, Method]:
    """What was tried: the lean method with one thing changed. "any step": its steps are not bounded."""
    lean = Method.lean()
    ranks = ((4, 4), (2, 2), (8, 2), (4, 1), (4, 3))
    servers = {
        "no momentum": server.recent(),
        "momentum 0.3": server.recent(server.momentum(momentum=0.3)),
        "momentum 0.9, step 0.3": server.recent(server.momentum(lr=0.3, momentum=0.9)),
        "no momentum, order 20": server.recent(order=20.0),
        "the last model": server.momentum(momentum=0.5),
        "the last model, no momentum": server.sgd(),
    }
    rules = {f"every {n} epochs": sync.every(epochs=n) for n in (2, 5, 10)}
    rules |= {f"crossing {n:.0f}": replace(lean.sync, crossing=n) for n in (2500.0, 10000.0)}
    memories = {"memory added": replace(lean.codec, into="message"), "no memory": lean.codec.codec}
    return (
        {"as it is": lean, "any step": lean}
        | {f"rank {up}, {down}": _factors(up, down) for up, down in ranks}
        | {"zstandard": _factors(coder="zstd"), "4 bits": _factors(bits=4), "2 bits": _factors(bits=2, norm="mean")}
        | {f"{100 * share:.1g} % largest": _largest(share) for share in (0.005, 0.01)}
        | {name: lean.replace(codec=codec) for name, codec in memories.items()}
        | {name: lean.replace(server=one) for name, one in servers.items()}
        | {
            name: lean.replace(sync=rule)
            for name, rule in (rules | {"10 epochs at most": replace(lean.sync, max_blocks=10)}).items()
        }
    )


def search(crew: Crew, names: Sequence[str]) -> dict[str, Any]:
    """Bytes of FedAdam / bytes of a candidate on the training tasks: geometric mean over LEVELS of FedAdam's best, and
    seeds; null where one of the levels is not reached.
    """
    tasks = available(TRAINING)
    steps, tried = tuned(tasks, True, crew), {n: m for n, m in candidates().items() if not names or n in names}
    jobs: dict[tuple[str, int, str], Job] = {}
    for task, seed in itertools.product(tasks, range(2)):
        (lr, at), rounds = steps[task]["fedadam"], TASKS[task][4]
        jobs[task, seed, ""] = Job(task, "fedadam", lr, at, seed, rounds)
        for name, method in tried.items():
            lr = steps[task]["client"]
            off = "bound" if name == "any step" else ""
            jobs[task, seed, name] = Job(task, "tried", lr, 1.0, seed, FEW * rounds, off, chosen=method, name=name)
    runs = dict(zip(jobs, crew.all([*jobs.values()]), strict=True))
    table = Table("candidate", *(f"{task}: times fewer" for task in tasks), "all", "best metric")
    found: dict[str, Any] = {}
    for name in tried:
        means, best = [], []
        for task in tasks:
            ratios = []
            for seed, level in itertools.product(range(2), LEVELS):
                adam = runs[task, seed, ""]
                target = _target(_best(adam), level)
                spent = _to(runs[task, seed, name], target, 1)
                ratios.append(None if spent is None else (_to(adam, target, 1) or 0.0) / spent)
            means.append(_geomean([r for r in ratios if r]) if all(ratios) else None)
            best.append(sum(_best(runs[task, seed, name]) for seed in range(2)) / 2)
        every = _geomean([m for m in means if m]) if all(means) else None
        found[name] = {"byte_ratio": dict(zip(tasks, means, strict=True)), "all": every, "best": best}
        cells = ["-" if mean is None else f"{mean:.0f}" for mean in (*means, every)]
        table.add_row(name, *cells, " ".join(f"{value:.3f}" for value in best))
    Console(width=140).print(table)
    command = " ".join(["python -m bench.lean --search", *(["--tried", *names] if names else [])])
    return {
        "command": command,
        "candidates": found,
        "levels": LEVELS,
        "n": {"tasks": len(tasks), "seeds": 2, "rounds": FEW},
    }


# ------------------------------------------------------------------------------------------------------------- report


def _print(figures: dict[str, Any], seeds: int) -> None:
    table = Table(
        "task", "d", "times fewer bytes", "reached", "points lost", "simulated time", "FedAvg reached", "diverged"
    )
    for name, row in figures["tasks"].items():
        ratio, time, lost = row["byte_ratio"], row["time_ratio"], row["points_lost"]
        table.add_row(
            name, f"{row['d']:,}", "-" if ratio is None else f"{ratio:.1f}", f"{row['reached']}/{seeds}",
            "-" if lost is None else f"{lost:+.2f}", "-" if time is None else f"{time:.2f}",
            f"{row['fedavg_reached']}/{seeds}", str(row["diverged"]),
        )  # fmt: skip
    console = Console(width=140)
    console.print(table)
    for task, rows in figures.get("more", {}).items():
        for name, row in rows.items():
            spent = "-" if row["bytes"] is None else f"{row['bytes']:,.0f}"
            console.print(f"{task:12} {name:22} bytes {spent:>14}  best {row['best']}")


def main() -> None:
    """Search, or tune, run and print."""
    options = parser(__doc__)
    options.add_argument("--search", action="store_true", help="the candidates on the training tasks")
    options.add_argument("--tried", nargs="*", default=[], help="names of candidates; all without")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--tasks", nargs="*", default=None)
    options.add_argument("--keep", type=Path, default=None, help="a folder for runs, which are then not done again")
    chosen = options.parse_args()
    crew = Crew(chosen.processes, chosen.keep)
    if chosen.search:
        finish("lean_search", search(crew, chosen.tried), chosen.quick)
        return
    names = chosen.tasks or (QUICK if chosen.quick else UNSEEN)
    seeds = range(1 if chosen.quick else 2)
    figures = study(available(names), seeds, chosen.quick, crew)
    missing = [name for name in names if name not in available(names)]
    if missing:
        figures["not_run"] = dict.fromkeys(missing, "its data are not beside the project")
    _print(figures, len(seeds))
    finish("lean", figures, chosen.quick)


if __name__ == "__main__":
    main()
