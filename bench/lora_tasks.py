"""Tasks, operators and single runs of `bench.lora`.

Both tasks are digits over ten clients, ten classes. What is trained are adapters only; the head is frozen too, so whatever
is learnt is learnt by them.
    random       MNIST-5k averaged to 14 x 14, one hidden layer of 64 with He's random weights, another base with each seed:
                 all that the model comes to know is in the adapter (without it: chance)
    pretrained   two hidden layers of 64 that have learnt scikit-learn's digits (8 x 8, enlarged), adapted to MNIST-5k whose
                 middle 20 x 20 are averaged to 10 x 10: another scanner, other writers (without adapters: 45 %)
alpha = r, so W = W0 + B A. Plain SGD, batch 16, every client in every round.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import taciturn
from taciturn import Experiment, Method, aggregation, data, partition, solvers, sync
from taciturn.tasks.data.clients import Federation, TableClients
from taciturn.tasks.metrics import Metric, accuracy, per_sample
from taciturn.tasks.task import Task

CLIENTS, BATCH, WIDTH = 10, 16, 64
SKEWS = {
    "two classes a client": data.shards(per_client=2),
    "Dirichlet(0.5)": data.dirichlet(alpha=0.5, min_partition_size=20),
}
TASKS = ("random", "pretrained")
LOSS = Metric("loss", per_sample(F.cross_entropy), "min")
LOST = 2 * math.log(10)  # a loss that no model that says "all classes alike" has
FAILURES = taciturn.TaciturnError  # factors that have exploded, models that are not finite
TOLD = ("product", "clients", "raw", "gauge", "truncation", "imbalance")


@dataclass(frozen=True)
class Operator:
    """A row of the comparison. fields: of `low_rank`, or none for the mean of what is shared; adapters: of `lora`."""

    fields: dict[str, Any] | None
    adapters: dict[str, Any]

    @property
    def personal(self) -> bool:
        """True if a client keeps a factor, so that the metric is that of its own model on its own data."""
        return self.adapters.get("rest") == "personal"


def _pairs(operator: str, **fields: Any) -> Operator:
    return Operator({"operator": operator} | fields, {})


OPERATORS = {
    "factor_mean": _pairs("factor_mean"),
    "factor_mean_rebalanced": _pairs("factor_mean_rebalanced"),
    "product_svd": _pairs("product_svd"),
    "tangent": _pairs("tangent"),
    "product_svd, aligned": _pairs("product_svd", align=True),
    "lora_fair_style": _pairs("lora_fair_style"),
    "ffa": Operator(None, {"share": "B"}),
    "rolora": Operator(None, {"share": "alternate"}),
    "fedsvd": Operator({"operator": "fedsvd"}, {"share": "B", "rest": "server"}),
    "fed_sb": Operator(None, {"share": "core"}),
    "fedex (merges)": _pairs("fedex"),
    "product_svd_residual (merges)": _pairs("product_svd_residual"),
    "flora (merges)": _pairs("flora"),
    "fedsa (personal)": Operator(None, {"share": "A", "rest": "personal"}),
}


@dataclass(frozen=True)
class Cell:
    """One place of the grid."""

    operator: str
    task: str
    skew: str
    rank: int
    steps: int
    rounds: int

    @property
    def place(self) -> tuple[Any, ...]:
        """The cell without its operator."""
        return self.task, self.skew, self.rank, self.steps


@cache
def _divided(skew: str, seed: int) -> Federation:
    return data.mnist5k(clients=CLIENTS, split=SKEWS[skew], central=0.2, test=0.2).load(seed)


@cache
def _federation(task: str, skew: str, seed: int, learnt: bool) -> Federation:
    """learnt: the server's test set is what the clients learn from, pooled, for the training loss."""
    found = _divided(skew, seed)
    assert isinstance(found.train, TableClients)
    images = found.train.fields["input"]
    small = F.avg_pool2d(images[..., 4:24, 4:24] if task == "pretrained" else images, 2)
    parts = {name: getattr(found, name) for name in ("train", "test", "central")}
    if learnt:
        parts["central"] = TableClients.of(found.train.fields, {"server": found.train.rows})
    return replace(found, **{n: replace(part, fields=part.fields | {"input": small}) for n, part in parts.items()})


def _layers(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between, He's start."""
    parts: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layer = nn.Linear(before, after)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


@cache
def _pretrained() -> nn.Module:
    """The base of the second task: 600 steps of Adam on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.float32)).reshape(-1, 1, 8, 8) / 16
    images, target = F.interpolate(images, size=(10, 10), mode="bilinear", align_corners=False), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _layers(100, WIDTH, WIDTH, 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(600):
            rows = torch.randint(len(target), (64,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), target[rows]).backward()
            optimizer.step()
    return model


def base_accuracy(seeds: int) -> float:
    """Of the pretrained base without adapters, on the server's test sets."""
    found, base = [], _pretrained()
    for seed in range(seeds):
        central = _federation("pretrained", next(iter(SKEWS)), seed, False).central
        assert isinstance(central, TableClients)
        fields = {name: values[central.rows] for name, values in central.fields.items()}
        with torch.no_grad():
            found.append(float((base(fields["input"]).argmax(1) == fields["target"]).float().mean()))
    return fmean(found)


def experiment(cell: Cell, lr: float, seed: int, tuning: bool) -> Experiment:
    """A run of a cell. tuning: the metric is the loss on the clients' training data, and nothing is diagnosed."""
    operator = OPERATORS[cell.operator]
    aggregator: Any = aggregation.weighted()
    if operator.fields is not None:
        aggregator = aggregation.low_rank(diagnostics=not tuning, **operator.fields)
    method = Method(
        partition=partition.lora(rank=cell.rank, alpha=float(cell.rank), **operator.adapters),
        aggregator=aggregator, solver=solvers.sgd(lr=lr), batch_size=BATCH, sync=sync.every(steps=cell.steps),
    )  # fmt: skip
    model: Any = _pretrained() if cell.task == "pretrained" else lambda: _layers(196, WIDTH, 10)
    federation = _federation(cell.task, cell.skew, seed, tuning and not operator.personal)
    metrics = (LOSS,) if tuning else (accuracy, LOSS)
    every = max(1, cell.rounds // 12) if tuning else 1
    trial = Experiment(Task(model, federation, F.cross_entropy, metrics), method, rounds=cell.rounds, seed=seed)
    return trial.replace(evaluate_on="train" if tuning else "test", evaluate_every=every)


def train_loss(cell: Cell, lr: float, seed: int) -> float:
    """Mean over what was evaluated in the last quarter of the rounds; infinite where the run fell apart or is lost."""
    try:
        history = taciturn.run(experiment(cell, lr, seed, True)).history
    except FAILURES:
        return math.inf
    values = [line["metrics"]["loss"] for line in history if line["metrics"] and line["round"] > 0.75 * cell.rounds]
    loss = fmean(values)
    return loss if loss < LOST else math.inf


def outcome(cell: Cell, lr: float, seed: int) -> dict[str, Any]:
    """Accuracy (final, best), loss, bytes and, for operators on pairs, the mismatch at the end and over the rounds."""
    try:
        history = taciturn.run(experiment(cell, lr, seed, False)).history
    except FAILURES as error:
        return {"diverged": str(error)[:120]}
    curve = [line["metrics"]["accuracy"] for line in history]
    last = history[-1]
    if not math.isfinite(last["metrics"]["loss"]):
        return {"diverged": "the loss is not finite"}
    told = [_over_layers(line["aggregate"]) for line in history if line.get("aggregate")]
    found = {"final": curve[-1], "best": max(curve), "loss": last["metrics"]["loss"], "curve": curve}
    found["bytes"] = last["bytes_up"] + last["bytes_down"]
    if told:
        found["end"] = told[-1]
        found["mean"] = {name: fmean(row[name] for row in told) for name in TOLD}
    return found


def _over_layers(aggregate: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: fmean(layer[name] for layer in aggregate.values()) for name in TOLD}
