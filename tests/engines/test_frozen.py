"""Models with a frozen base in the stacked engine: adapters equal the plain path; what is computed once changes no result.

Symbols: n samples; features of the frozen prefix.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="partition lora needs peft: pip install 'taciturn[lora]'")

import taciturn
from drive import drive
from taciturn import Experiment, Method, Task, codecs, participation, partition, solvers, sync
from taciturn.client import Work
from taciturn.core import random
from taciturn.engines.fused import Fused, build
from taciturn.engines.modes import choose, trainer
from taciturn.engines.prefix import CHUNK
from taciturn.tasks.data.clients import Federation, TableClients

SIZES = (3, 40, 70, 9)
KEEP = 1 << 20
TARGETS = ("layers.2.up", "layers.3.up", "layers.3.down")


class Layer(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))


class Tower(nn.Module):
    """Layers with residuals; `skip` reads the first one again at the end, `peeps` looks at weights from outside."""

    def __init__(self, dropout=0.0, odd=""):
        super().__init__()
        self.odd, self.embed = odd, nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Layer(dropout if i < 2 else 0.0) for i in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        states = [self.embed(ids)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        last = states[-1] + (states[1] if self.odd == "skip" else 0.0)
        if self.odd == "peeps":
            last = torch.where(self.head.weight.detach().abs().max() > 1e3, torch.nan, last)  # not in the first steps
        return self.head(last.mean(1))


def task_of(part, dropout=0.0, odd="", central=False):
    n = sum(SIZES)
    x = (random.normal(random.fold(random.key(0), "x"), n, 5).abs() * 10).long().clamp(max=9)
    fields = {"input": x, "target": torch.arange(n) % 3}
    rows = torch.arange(n).split(SIZES)
    clients = TableClients.of(fields, {f"c{i}": own for i, own in enumerate(rows)})
    held = TableClients.of(fields, {"server": torch.arange(40)}) if central else None
    data = Federation(clients, "classification", 3, central=held)
    return Task(lambda: Tower(dropout, odd), data), part


def built(task, part):
    made = task.build(0, dtype=torch.float64, prepare=part.prepare)
    return made, part.split(made.model, made.tracked)


def lora(**options):
    return partition.lora(rank=2, alpha=3.0, targets=TARGETS, also="head", **options)


METHOD = Method(participation=participation.all(), sync=sync.every(epochs=1), batch_size=8)
SOLVERS = {
    "sgd": solvers.sgd(lr=0.1),
    "prox": solvers.prox(mu=0.5, solver=solvers.sgd(lr=0.1)),
    "momentum": solvers.sgd(lr=0.05, momentum=0.9, clip=1.0),
    "adamw": solvers.adamw(lr=0.01),
}
PARTS = {
    "both": lora(),
    "B": lora(share="B"),
    "A-personal": lora(share="A", rest="personal"),
    "dropout": lora(dropout=0.3),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("part", PARTS)
def test_adapters_equal_the_plain_path(part, solver):
    task, chosen = task_of(PARTS[part], dropout=0.2 if part == "dropout" else 0.0)
    made, _ = built(task, chosen)
    method = METHOD.replace(partition=chosen, solver=SOLVERS[solver])
    plain, _, _, _ = drive(made, method, "sequential", rounds=2)
    fast, engine, _, _ = drive(made, method, "stacked", rounds=2, block=3, keep=KEEP)
    assert choose("auto", engine.work, None).path == "layer by layer"
    assert float((plain.x - fast.x).norm() / plain.x.norm()) < 1e-10


def work_of(**odd):
    task, part = task_of(lora(), **odd)
    made, split = built(task, part)
    return Work(made, split, solvers.sgd(lr=0.1), codecs.identity())


def test_the_frozen_prefix_is_found_and_computed_once():
    fused = build(work_of(), KEEP)
    assert isinstance(fused, Fused) and fused.prefix is not None
    assert fused.prefix.layers == ("embed", "layers.0", "layers.1")  # the norm of layer 2 alone is not all of its input
    ids, index = torch.tensor([1, 2]), torch.tensor([[0, 39, 3], [69, 1, 1]])
    first = fused.prefix(ids, index)
    count = fused.prefix.computed
    assert torch.equal(first, fused.prefix(ids, index)) and fused.prefix.computed == count


@pytest.mark.parametrize("odd", ["skip", "peeps"])
def test_what_reads_skipped_layers_or_weights_is_caught(odd):
    fused = build(work_of(odd=odd), KEEP)
    if odd == "peeps":
        assert isinstance(fused, str)  # the weight is each client's own, and no value of it is shown
    else:
        assert isinstance(fused, Fused) and (fused.prefix is None or fused.prefix.layers[-1] in ("embed", "layers.0"))


def test_no_features_are_kept_where_dropout_is_active_or_nothing_may_be():
    assert build(work_of(dropout=0.2), KEEP).prefix.layers == ("embed",)  # dropout begins above it
    assert build(work_of(), 0).prefix is None


def test_features_do_not_depend_on_what_was_kept():
    """The oldest make room; a value is the same whether it was kept, computed again, or asked for in another batch."""
    roomy = build(work_of(), KEEP).prefix
    one = roomy.like.numel() * roomy.like.element_size()
    tight = build(work_of(), (CHUNK + 5) * one).prefix
    assert tight.most == CHUNK + 5
    for seed in range(6):
        key = random.key(seed)
        ids = torch.tensor([1, 2])
        index = (random.uniform(key, 2, 7) * torch.tensor([[40.0], [70.0]])).long()
        assert torch.equal(roomy(ids, index), tight(ids, index))
    assert tight.computed > roomy.computed


def test_a_way_made_elsewhere_keeps_features_too():
    work = work_of()
    path = choose("auto", work, None, KEEP)
    there = trainer(work, METHOD.sync, 8, random.key(0), replace(path, fused=None)).way
    assert there.prefix.layers == path.fused.prefix.layers and there.saved == path.fused.saved > 0


def test_the_servers_test_set_is_measured_alike_with_and_without():
    task, part = task_of(lora(), central=True)
    method = METHOD.replace(partition=part, solver=solvers.sgd(lr=0.1))
    experiment = Experiment(task, method, rounds=2)
    kept = taciturn.run(experiment)
    plain = taciturn.run(experiment.replace(keep_gib=0.0, engine="sequential"))
    assert kept.metrics["accuracy"] == pytest.approx(plain.metrics["accuracy"], abs=0.03)
    assert kept.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-4)
    assert kept.bytes_up == plain.bytes_up


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    task, part = task_of(lora(), central=True)
    experiment = Experiment(task, METHOD.replace(partition=part, solver=solvers.sgd(lr=0.1)), rounds=4)
    whole = taciturn.run(experiment, out=tmp_path / "a")
    taciturn.run(experiment.replace(rounds=2), out=tmp_path / "b")
    resumed = taciturn.run(experiment, out=tmp_path / "b", resume=True)
    assert all(torch.equal(t, resumed.tensors[name]) for name, t in whole.tensors.items())
