"""CPU seconds of a round on the stacked engine, against a loop without federation and against plain `torch.vmap`.

One thread, one process, MNIST-5k (4,000 training images, shifted by a pixel or two to fill the pool). Rounds of the three
are interleaved; the figure is the median over repeats of CPU seconds a round, as a ratio. (a) central: the same number of
SGD steps of the same batch on one model, tensors in memory, foreach optimizer. (b) vmap: the same round text through
`torch.vmap`. `max_rel_diff_sequential`: norm-relative difference to the sequential engine after two rounds.
two_workers_wall_ratio: W1 with two worker processes, wall time over that of one process.

    W1  FedAvg, 1,000 clients, 100 a round, 60 samples, MLP 784-200-200-10, batch 10, one epoch, SGD
    W2  20 clients a round, 20 samples, batch 20, CNN (5x5 convolutions 32 and 64, hidden 512)
    W3  10 clients, 64 samples, batch 16, transformer encoder (2 layers, width 128, 4 heads, 32 tokens)
    W4  W1 with FedProx; W5 W1 with AdamW on the clients; W6 W1 with Dirichlet(0.1) sizes of 5 to 600 samples
"""

from __future__ import annotations

import resource
import time
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.common import arguments, finish
from taciturn import Federation, Method, TableClients, Task, data, models, participation, solvers
from taciturn.client import Work
from taciturn.core import random
from taciturn.engines import build
from taciturn.engines.modes import SINGLE, VMAP
from taciturn.round import fed_round, start


class Encoder(nn.Module):
    """Tokens [b, 32, 24] -> classes: 2 layers, width 128, 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.embed, self.layers = nn.Linear(24, 128), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 32, 24] -> [b, 10]."""
        return self.head(self.layers(self.embed(x)).mean(1))


@dataclass(frozen=True)
class Workload:
    """sizes [N] samples; cohort clients a round."""

    sizes: tuple[int, ...]
    cohort: int
    batch: int
    shape: tuple[int, ...]
    model: Any
    solver: Any
    optimizer: Any


def _mlp() -> nn.Module:
    return models.mlp(hidden=(200, 200)).build(torch.zeros(784), 10)


def _cnn() -> nn.Module:
    return models.cnn().build(torch.zeros(1, 28, 28), 10)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, foreach=True)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, foreach=True)


def _skewed(n: int) -> tuple[int, ...]:
    share = np.random.default_rng(0).dirichlet(np.full(n, 0.1)) * 60 * n
    return tuple(int(s) for s in np.clip(share, 5, 600))


PLAIN = solvers.sgd(lr=0.1)
WORKLOADS = {
    "W1": Workload((60,) * 1000, 100, 10, (784,), _mlp, PLAIN, _sgd),
    "W2": Workload((20,) * 200, 20, 20, (1, 28, 28), _cnn, PLAIN, _sgd),
    "W3": Workload((64,) * 100, 10, 16, (32, 24), Encoder, PLAIN, _sgd),
    "W4": Workload((60,) * 1000, 100, 10, (784,), _mlp, solvers.prox(mu=0.01, solver=PLAIN), _sgd),
    "W5": Workload((60,) * 1000, 100, 10, (784,), _mlp, solvers.adamw(lr=1e-3), _adamw),
    "W6": Workload(_skewed(1000), 100, 10, (784,), _mlp, PLAIN, _sgd),
}


@cache
def _images(count: int) -> tuple[Tensor, Tensor]:
    """`count` images [count, 784] and labels: 4,000 of MNIST-5k, then the same shifted by a pixel or two."""
    source = data.mnist5k(clients=1, test=0.0).load(0).train
    x, y = source.fields["input"][source.rows], source.fields["target"][source.rows]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # the source is sorted by digit
    parts = [torch.roll(x[order], (dy, dx), (2, 3)) for dy in (0, 1, -1, 2) for dx in (0, 1, -1, 2)]
    return torch.cat(parts)[:count].flatten(1), y[order].repeat(len(parts))[:count]


def _shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images [n, 784] as a workload wants them."""
    return (x[:, :768] if shape == (32, 24) else x).reshape(-1, *shape)


def _accuracy(work: Workload, model: nn.Module) -> float:
    """On the 1,000 images of MNIST-5k that nobody trains on."""
    central = data.mnist5k(clients=1, test=0.0).load(0).central
    assert central is not None
    x, y = central.fields["input"][central.rows], central.fields["target"][central.rows]
    with torch.no_grad():
        return float((model(_shaped(x.flatten(1), work.shape)).argmax(1) == y).float().mean())


class Bench:
    """One workload on one path of the engine. parts: of the method, other than the defaults."""

    def __init__(self, work: Workload, path: str, workers: int = 1, **parts: Any) -> None:
        x, y = _images(sum(work.sizes))
        began = time.perf_counter()
        x = _shaped(x, work.shape)
        rows = torch.arange(len(x)).split(work.sizes)
        clients = TableClients.of({"input": x, "target": y}, {f"c{i}": part for i, part in enumerate(rows)})
        torch.manual_seed(0)
        own = {"forward": lambda model, batch: model(batch["input"])} if path == VMAP else {}  # not traced, so not stacked
        task = Task(work.model, Federation(clients, "classification", 10), **own).build(0)
        self.method = Method(
            participation=participation.uniform(count=work.cohort), solver=work.solver, batch_size=work.batch, **parts
        )
        self.split = self.method.partition.split(task.model, task.tracked)
        built = Work(task, self.split, work.solver, self.method.codec)
        name = "sequential" if path == SINGLE else "stacked"
        self.engine, self.path = build(name, built, self.method, random.key(0), workers=workers)
        self.sizes, self.server, self.steps, self.seconds = (
            task.train.sizes,
            start(self.split.x0, task.train.sizes, self.method),
            0,
            [],
        )
        self.start_seconds = time.perf_counter() - began

    def round(self) -> None:
        """One round; its CPU seconds are kept."""
        key = random.fold(random.key(0), "round", self.server.round)
        ids = self.method.participation.draw(self.server.round, key, torch.ones(len(self.sizes), dtype=torch.bool))
        began = time.process_time()
        sizes = self.sizes[ids]
        self.server, stats = fed_round(self.server, ids, sizes, self.method, self.engine, self.split, key)
        self.engine.post.ledger.close_round()
        self.seconds.append(time.process_time() - began)
        self.steps = int(stats.steps.sum())


def _central(work: Workload, model: nn.Module, optimizer: Any, steps: int) -> float:
    """CPU seconds of `steps` steps on one model."""
    x, y = _images(4000)
    x = _shaped(x, work.shape)
    order = torch.randint(0, 4000, (steps, work.batch), generator=torch.Generator().manual_seed(0))
    began = time.process_time()
    for index in order:
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return time.process_time() - began


def measure(work: Workload, repeats: int) -> dict[str, Any]:
    """The figures of one workload."""
    ours, vmap, plain = Bench(work, ""), Bench(work, VMAP), Bench(work, SINGLE)
    model = work.model()
    optimizer, central = work.optimizer(model.parameters()), []
    for i in range(repeats + 1):  # the first round warms up
        ours.round()
        vmap.round()
        central.append(_central(work, model, optimizer, ours.steps))
        if i < 2:
            plain.round()
            if i == 1:
                difference = float((ours.server.x - plain.server.x).norm() / plain.server.x.norm())
    trained = work.model()
    trained.load_state_dict({**trained.state_dict(), **ours.split.layout.views(ours.server.x)})
    mine, stacked, alone = (median(values[1:]) for values in (ours.seconds, vmap.seconds, central))
    return {
        "cpu_ratio_central": mine / alone,
        "cpu_ratio_vmap": mine / stacked,
        "max_rel_diff_sequential": difference,
        "cpu_seconds": mine,
        "cpu_seconds_central": alone,
        "cpu_seconds_vmap": stacked,
        "steps": ours.steps,
        "rounds": repeats + 1,
        "accuracy": _accuracy(work, trained),
        "accuracy_central": _accuracy(work, model),
        "start_seconds": ours.start_seconds,
        "path": f"{ours.path.path}: {ours.path.why}",
    }


def two_workers(repeats: int) -> dict[str, Any]:
    """Wall seconds of W1's rounds with two worker processes over those with none, rounds in turn."""
    alone, both = Bench(WORKLOADS["W1"], ""), Bench(WORKLOADS["W1"], "", workers=2)
    seconds: dict[str, list[float]] = {"alone": [], "both": []}
    with closing(both.engine.crew):
        for _ in range(repeats + 1):
            for name, one in (("alone", alone), ("both", both)):
                began = time.perf_counter()
                one.round()
                seconds[name].append(time.perf_counter() - began)
    ratio = median(b / a for a, b in zip(seconds["alone"][1:], seconds["both"][1:], strict=True))
    return {
        "two_workers_wall_ratio": ratio,
        "two_workers_wall_seconds": median(seconds["both"][1:]),
        "one_worker_wall_seconds": median(seconds["alone"][1:]),
        "two_workers_same_bits": torch.equal(alone.server.x, both.server.x),
    }


def main() -> None:
    """All workloads."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    repeats = 3 if quick else 9
    figures: dict[str, Any] = {}
    table = Table("workload", "CPU s a round", "/ central", "/ vmap", "difference to sequential", "path")
    for name, work in WORKLOADS.items():
        row = figures[name] = measure(work, repeats)
        table.add_row(
            name, f"{row['cpu_seconds']:.3f}", f"{row['cpu_ratio_central']:.2f}", f"{row['cpu_ratio_vmap']:.2f}",
            f"{row['max_rel_diff_sequential']:.1e}", row["path"],
        )  # fmt: skip
    Console(width=150).print(table)
    figures |= two_workers(9 if quick else 25)
    figures["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"two workers: wall time {figures['two_workers_wall_ratio']:.2f} of one process")
    finish("engine", {"n": {"tasks": len(WORKLOADS), "seeds": 1, "rounds": repeats}} | figures, quick)


if __name__ == "__main__":
    main()
