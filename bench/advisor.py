"""The advisor against what happens: its ranking of codecs at equal bytes, and the ranking that training finds.

Four kinds of task, each with clients alike (iid) and unlike (skew): least squares (d = 128, rotated, spectrum 1/i; unlike:
each client its own optimum), logistic regression, an MLP and a small CNN on digits (unlike: Dirichlet(0.3) labels; the
networks do several local steps). Ten clients, all in every round, server sgd. Every codec trains until its messages have
cost what uncompressed training sends in ROUNDS rounds.

Tuning: every codec tries the same factors of the server's step on a seed of its own; then test seeds at the best. The pilot
runs on the tuning seed and is told the same factors; it never sees a run of a codec.
Measure: training loss of the final model over all clients' samples (least squares: minus its minimum), mean over seeds. The
final model, not an average of iterates: it is what a run hands out, and averages from the start serve no network.
Kendall's tau-b over pairs of codecs, tau = sum a b / sqrt(sum a^2 sum b^2), with a, b in -1, 0, 1 the order that was
measured and predicted: measured 0 where the paired difference over seeds is within 2 standard errors or 1 %; predicted 0
where the advisor calls it a tie. Told too, with every measured difference counted: tau of the advisor's figures, and of two
simpler rankings, by bytes alone and by Q. Regret: measure of the recommended codec over that of the best in hindsight, - 1.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import taciturn
from bench.common import finish
from taciturn import Method, server, solvers, sync
from taciturn.advisor import Budget, candidates, forecasts, law_of, order, run_pilot, tie, weigh
from taciturn.codecs import identity
from taciturn.core import random
from taciturn.tasks.data.clients import Federation, TableClients
from taciturn.tasks.models import cnn, linear, mlp

ROUNDS, CLIENTS, TUNING_SEED = 16, 10, 1000
FACTORS = (1 / 8, 1 / 2, 1.0, 2.0)
LEFT_OUT = ("quantize8 block", "quantize2 block")  # near quantize8 and quantize2, and the time is short
D, SAMPLES = 128, 400


def _least_squares(skew: bool) -> taciturn.Task:
    """Gaussian inputs, one optimum or one of each client; noise of variance 1."""
    key = random.key(7)
    basis, _ = torch.linalg.qr(random.normal(random.fold(key, "basis"), D, D))
    scale = torch.arange(1, D + 1, dtype=torch.float32).rsqrt()
    x = (random.normal(random.fold(key, "x"), CLIENTS * SAMPLES, D) * scale) @ basis.T
    optimum = torch.ones(D) @ basis.T
    own = optimum + (1.0 if skew else 0.0) * random.normal(random.fold(key, "shift"), CLIENTS, D)
    y = (x.view(CLIENTS, SAMPLES, D) * own.unsqueeze(1)).sum(-1).flatten() + random.normal(random.fold(key, "y"), len(x))
    owners = {f"site-{i}": np.arange(i * SAMPLES, (i + 1) * SAMPLES) for i in range(CLIENTS)}
    clients = TableClients.of({"input": x, "target": y.unsqueeze(1)}, owners)
    return taciturn.Task(_zeros, Federation(clients, "regression", 1), F.mse_loss)


def _zeros() -> nn.Module:
    layer = nn.Linear(D, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def _digits(model: Any, skew: bool) -> taciturn.TaskSpec:
    split = taciturn.data.dirichlet(alpha=0.3, min_partition_size=10) if skew else taciturn.data.iid()
    return taciturn.TaskSpec(taciturn.data.digits(clients=CLIENTS, split=split, central=0.0, test=0.0), model)


KINDS: dict[str, tuple[Callable[[bool], Any], float, int, int]] = {  # task, lr, local steps, batch size
    "least squares": (_least_squares, 0.3, 1, 16),
    "logistic": (lambda skew: _digits(linear(), skew), 0.5, 1, 16),
    "MLP": (lambda skew: _digits(mlp(hidden=(16,)), skew), 0.1, 3, 16),
    "CNN": (lambda skew: _digits(cnn(channels=(4, 8), hidden=16), skew), 0.1, 3, 8),
}


def _experiment(kind: str, skew: bool, seed: int, codec: Any, factor: float, rounds: int) -> taciturn.Experiment:
    make, lr, steps, batch = KINDS[kind]
    method = Method(sync=sync.every(steps=steps), solver=solvers.sgd(lr=lr), codec=codec, batch_size=batch)
    method = method.replace(server=server.sgd(lr=factor))
    return taciturn.Experiment(
        make(skew), method, rounds=rounds, seed=seed, evaluate_every=rounds, evaluate_on="train", engine="stacked"
    )


def _minimum(kind: str, skew: bool) -> float:
    """The least training loss, where it is known."""
    if kind != "least squares":
        return 0.0
    fields = _least_squares(skew).data.train.fields  # type: ignore[union-attr]
    x, y = fields["input"].double(), fields["target"].double()
    best = torch.linalg.lstsq(x, y).solution
    return float((x @ best - y).square().mean())


def _train(job: tuple[str, bool, int, Any, float, int]) -> tuple[float, int]:
    """-> training loss of the final model (infinite if it diverged), bytes of all updates."""
    torch.set_num_threads(1)
    try:
        result = taciturn.run(_experiment(*job))
    except taciturn.TaciturnError:
        return math.inf, 0
    last = result.history[-1]
    counts, losses = last["spread"]["count"], last["spread"]["loss"]
    loss = sum(n * value for n, value in zip(counts, losses, strict=True)) / sum(counts)
    return loss if math.isfinite(loss) else math.inf, last["bytes_up"]


def _codecs() -> dict[str, Any]:
    return {name: codec for name, codec in candidates(None).items() if name not in LEFT_OUT}


def _predict(kind: str, skew: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    began = time.perf_counter()
    pilot = run_pilot(_experiment(kind, skew, TUNING_SEED, identity(), 1.0, ROUNDS))
    known = law_of(pilot)
    budget = Budget(weigh(identity(), pilot, random.key(0)) * CLIENTS * ROUNDS)
    rows = forecasts(known, _codecs(), budget, base=identity(), target_rounds=ROUNDS, factors=FACTORS)
    ranked, _ = order(rows, "loss")
    ties = {(a.name, b.name): tie(*((a, b) if a.loss <= b.loss else (b, a)), "loss") for a in rows for b in rows}
    return {
        "rows": rows, "best": ranked[0].name, "ties": ties, "seconds": time.perf_counter() - began, "d": pilot.d,
        "rho": known.rho, "loss": pilot.loss,
    }  # fmt: skip


def _sign(a: list[float], b: list[float]) -> int:
    """-1 where a is lower beyond noise: paired over seeds, 2 standard errors and 1 %."""
    if not all(map(math.isfinite, (*a, *b))):
        return (sum(map(math.isinf, a)) > sum(map(math.isinf, b))) - (sum(map(math.isinf, a)) < sum(map(math.isinf, b)))
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    gap, error = fmean(gaps), stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return 0 if abs(gap) <= max(2 * error, 0.01 * min(fmean(a), fmean(b))) else (1 if gap > 0 else -1)


def _tau(pairs: Iterable[tuple[int, int]]) -> float:
    kept = list(pairs)
    scale = math.sqrt(sum(a * a for a, _ in kept) * sum(b * b for _, b in kept))
    return sum(a * b for a, b in kept) / scale if scale else math.nan


def _compare(predicted: dict[str, Any], measured: dict[str, list[float]]) -> dict[str, Any]:
    rows = {row.name: row for row in predicted["rows"]}
    names = list(rows)
    both = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]

    def say(a: str, b: str) -> int:
        return 0 if predicted["ties"][a, b] else 1 if rows[a].loss > rows[b].loss else -1

    means = {name: fmean(values) for name, values in measured.items()}
    plain = [(1 if means[a] > means[b] else -1, 1 if rows[a].loss > rows[b].loss else -1) for a, b in both]

    def by(value: dict[str, float]) -> float:
        """tau of another ranking; what differs by less than 1 % in it is a tie."""
        told = [0 if abs(value[a] / value[b] - 1) <= 0.01 else 1 if value[a] > value[b] else -1 for a, b in both]
        return _tau((sign, other) for (sign, _), other in zip(plain, told, strict=True))

    best = min(means, key=lambda name: means[name])
    return {
        "kendall_tau": _tau((_sign(measured[a], measured[b]), say(a, b)) for a, b in both),
        "kendall_tau_without_ties": _tau(plain),
        "kendall_tau_of_bytes": by({name: row.bytes for name, row in rows.items()}),
        "kendall_tau_of_Q": by({name: row.ratio for name, row in rows.items()}),
        "recommended": predicted["best"],
        "best": best,
        "regret": means[predicted["best"]] / means[best] - 1,
    }


def main() -> None:
    """Predict, tune, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tasks and seeds, same code")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    given = parser.parse_args()
    kinds = ("least squares", "logistic") if given.quick else tuple(KINDS)
    seeds = 2 if given.quick else 3
    tasks: dict[str, Any] = {}
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        for kind in kinds:
            for skew in (False, True):
                name = f"{kind}, {'skew' if skew else 'iid'}"
                tasks[name] = _task(pool, kind, skew, seeds)
                _print({name: tasks[name]})
    _summarize(tasks)
    tau, regret = ([task[name] for task in tasks.values()] for name in ("kendall_tau", "regret"))
    why = "--quick runs least squares and logistic regression only"
    skipped = {
        f"{kind}, {law}": {"value": None, "reason": why} for kind in KINDS if kind not in kinds for law in ("iid", "skew")
    }
    n = {"tasks": len(tasks), "codecs": len(_codecs()), "seeds": seeds, "factors": len(FACTORS), "rounds": ROUNDS}
    figures = {
        "tasks": tasks | skipped, "mean_kendall_tau": fmean(tau),
        "mean_kendall_tau_of_bytes": fmean(task["kendall_tau_of_bytes"] for task in tasks.values()),
        "mean_kendall_tau_of_Q": fmean(task["kendall_tau_of_Q"] for task in tasks.values()),
        "mean_regret": fmean(regret), "worst_regret": max(regret),
        "n": n,
    }  # fmt: skip
    finish("advisor", figures, given.quick)


def _task(pool: ProcessPoolExecutor, kind: str, skew: bool, seeds: int) -> dict[str, Any]:
    predicted = pool.submit(_predict, kind, skew).result()
    rows = predicted["rows"]
    tuned = iter(pool.map(_train, [(kind, skew, TUNING_SEED, r.codec, f, r.rounds) for r in rows for f in FACTORS]))
    chosen = {row.name: min((next(tuned)[0], factor) for factor in FACTORS)[1] for row in rows}
    jobs = [(kind, skew, seed, row.codec, chosen[row.name], row.rounds) for row in rows for seed in range(seeds)]
    runs, least = list(pool.map(_train, jobs)), _minimum(kind, skew)
    measured = {row.name: [loss - least for loss, _ in runs[i * seeds : (i + 1) * seeds]] for i, row in enumerate(rows)}
    spent = {row.name: runs[i * seeds][1] for i, row in enumerate(rows)}
    codecs = {
        row.name: {
            "bytes": row.bytes, "rounds": row.rounds, "predicted": row.loss - least, "predicted_factor": row.factor,
            "measured": fmean(measured[row.name]), "spread": stdev(measured[row.name]), "factor": chosen[row.name],
            "bytes_up": spent[row.name], "how": row.how, "Q": row.ratio, "seeds": measured[row.name],
        }
        for row in rows
    }  # fmt: skip
    facts = {name: predicted[name] for name in ("d", "rho", "seconds")} | {"least": least, "pilot_loss": predicted["loss"]}
    return facts | _compare(predicted, measured) | {"codecs": codecs}


def _print(tasks: dict[str, Any]) -> None:
    console = Console(width=150)
    for name, task in tasks.items():
        table = Table("codec", "bytes", "rounds", "predicted", "step", "measured", "spread", "step", title=name, box=None)
        for codec, row in sorted(task["codecs"].items(), key=lambda item: item[1]["measured"]):
            table.add_row(
                codec, f"{row['bytes']:.0f}", str(row["rounds"]), f"{row['predicted']:.4g}", f"{row['predicted_factor']:g}",
                f"{row['measured']:.4g}", f"{row['spread']:.2g}", f"{row['factor']:g}",
            )  # fmt: skip
        console.print(table)


def _summarize(tasks: dict[str, Any]) -> None:
    table = Table(
        "task",
        "d",
        "tau-b",
        "tau without ties",
        "by bytes",
        "by Q",
        "recommended",
        "best",
        "regret",
        "advisor's seconds",
        box=None,
    )
    for name, task in tasks.items():
        names = ("kendall_tau", "kendall_tau_without_ties", "kendall_tau_of_bytes", "kendall_tau_of_Q")
        told = (*(f"{task[key]:.2f}" for key in names), task["recommended"], task["best"])
        table.add_row(name, str(task["d"]), *told, f"{100 * task['regret']:.1f} %", f"{task['seconds']:.0f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
