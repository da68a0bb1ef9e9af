"""The fast path of the stacked engine: every known layer equals the plain path; what it cannot do is refused, with why."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drive import drive, thinned
from taciturn import Task, participation, partition, solvers, sync
from taciturn.client import Work
from taciturn.core import random
from taciturn.engines.fused import Fused, build
from taciturn.engines.modes import choose, trainer
from taciturn.method import Method
from taciturn.tasks.data.clients import Federation, TableClients

SIZES = (1, 9, 16, 5, 12)
BASE = Method(participation=participation.all(), sync=sync.every(epochs=2), batch_size=4)


def task_of(make, shape, integers=False, dtype=torch.float64):
    n = sum(SIZES)
    x = random.normal(random.fold(random.key(0), "x"), n, *shape)
    x = (x.abs() * 10).long().clamp(max=9) if integers else x
    rows = torch.arange(n).split(SIZES)
    fields = {"input": x, "target": torch.arange(n) % 3}
    clients = TableClients.of(fields, {f"c{i}": part for i, part in enumerate(rows)})
    return Task(make, Federation(clients, "classification", 3)).build(0, dtype=dtype)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(10, 8, padding_idx=0), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x)
        h = h + self.down(F.gelu(F.dropout(self.up(self.norm(h)), 0.3, self.training)))
        return self.head(h.mean(1))


class Causal(nn.Module):
    """Attention called by hand, with the sequence first and a mask; the weights it also returns are not used."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, dropout=0.2, bias=False), nn.Linear(6, 3)
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).triu(1))

    def forward(self, x):
        h = x.transpose(0, 1)
        h, _ = self.attention(h, h, h, attn_mask=self.mask, need_weights=False)
        return self.head(h.mean(0))


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 3, 8, batch_first=True, **options)
        norm = nn.LayerNorm(6) if options.get("norm_first") else None
        self.layers = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 3, bias=False)), (6,), False),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)), (6,), False),
    "wide": (lambda: nn.Sequential(nn.Linear(40, 200), nn.ReLU(), nn.Linear(200, 60), nn.Linear(60, 3)), (40,), False),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)), (5, 6), False),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2, stride=2, groups=2, bias=False),
            nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(24, 3),
        ),
        (2, 8, 8), False,
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)), (2, 9), False,
    ),
    "norms": (
        lambda: nn.Sequential(nn.LayerNorm((5, 6)), nn.Flatten(), nn.LayerNorm(30, bias=False), nn.Linear(30, 3)), (5, 6),
        False,
    ),
    "group-norm-flat": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(4, 8), nn.Linear(8, 3)), (6,), False),
    "residual": (Residual, (5,), True),
    "encoder": (lambda: Encoder(dropout=0.2, activation=F.gelu), (5, 6), False),
    "encoder-norm-first": (lambda: Encoder(norm_first=True, dropout=0.0), (5, 6), False),
    "attention": (Causal, (5, 6), False),
}  # fmt: skip
SOLVERS = {
    "sgd": solvers.sgd(lr=0.1),
    "prox": solvers.prox(mu=0.7, solver=solvers.sgd(lr=0.1)),
    "momentum": solvers.sgd(lr=0.1, momentum=0.9, clip=0.5, weight_decay=0.01),
    "adamw": solvers.adamw(lr=0.01, weight_decay=0.1),
    # the bias of keys has gradient zero but for rounding, which a small eps would blow up
    "prox-adamw": solvers.prox(mu=0.7, solver=solvers.adamw(lr=0.01, eps=1e-3)),
}


def path_of(task, method=BASE):
    split = method.partition.split(task.model, task.tracked)
    return choose("auto", Work(task, split, method.solver, method.codec), None)


@pytest.mark.parametrize(("model", "solver"), thinned(MODELS, SOLVERS))
def test_layers_equal_the_plain_path(model, solver):
    make, shape, integers = MODELS[model]
    task, method = task_of(make, shape, integers), BASE.replace(solver=SOLVERS[solver])
    assert path_of(task, method).path == "layer by layer", path_of(task, method).why
    plain, _, stats, _ = drive(task, method, "sequential", rounds=2)
    fast, _, fast_stats, _ = drive(task, method, "stacked", rounds=2, block=3)
    assert float((plain.x - fast.x).norm() / plain.x.norm()) < 1e-11
    for one, other in zip(stats, fast_stats, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.allclose(one.loss, other.loss)


@pytest.mark.parametrize("personal", ["head", "stem", "norms"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_personal_layers_equal_the_plain_path(personal, solver):
    task = task_of(Residual, (5,), True)
    method = BASE.replace(solver=SOLVERS[solver], partition=partition.layers(personal=personal))
    assert path_of(task, method).path == "layer by layer"
    plain, one, _, _ = drive(task, method, "sequential", rounds=2)
    fast, other, _, _ = drive(task, method, "stacked", rounds=2, block=3)
    assert float((plain.x - fast.x).norm() / plain.x.norm()) < 1e-11
    ids = torch.arange(len(SIZES))
    assert torch.allclose(one.store.read(ids)["v"], other.store.read(ids)["v"], rtol=1e-10, atol=1e-12)


class Odd(nn.Module):
    """A small model that is odd in one way."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.head = how, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        if how == "tied":
            self.b.weight = self.a.weight
        elif how == "hook":
            self.a.register_forward_hook(lambda module, args, output: output * 2)
        elif how == "partly":
            self.a.bias.requires_grad_(False)
        elif how == "raw":
            self.scale = nn.Parameter(torch.ones(6))
        elif how == "unknown":
            self.b = nn.Bilinear(6, 6, 6)
        elif how == "parametrized":
            torch.nn.utils.parametrizations.weight_norm(self.a)

    def forward(self, x):
        x = self.a(x)
        if self.how == "unknown":
            return self.head(self.b(x, x))
        if self.how == "raw":
            x = x * self.scale
        if self.how == "coupled":
            x = x - x.mean(0)
        if self.how == "twice":
            x = self.a(x)
        return self.head(x if self.how == "idle" else self.b(x))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("tied", "tied weights"),
        ("hook", "a has hooks"),
        ("partly", "a is partly frozen"),
        ("raw", "scale is trained outside any layer"),
        ("unknown", "b.* is trained in a Bilinear, which is not a known layer"),
        ("twice", "a is called 2 times"),
        ("coupled", "not independent"),
        ("idle", "b is called 0 times"),
        ("parametrized", "parametri"),
    ],
)
def test_what_cannot_be_done_is_refused_and_still_runs(how, why):
    task = task_of(lambda: Odd(how), (6,))
    split = BASE.partition.split(task.model, task.tracked)
    reason = build(Work(task, split, BASE.solver, BASE.codec))
    assert isinstance(reason, str)
    assert re.search(why, reason), reason
    path = path_of(task)
    assert (path.path == "vmap" and reason in path.why) or "torch.vmap cannot batch this model" in path.why
    if how != "coupled":  # padding changes a model that couples samples, on every engine alike
        plain, *_ = drive(task, BASE, "sequential", rounds=1)
        auto, *_ = drive(task, BASE, "auto", rounds=1)
        assert float((plain.x - auto.x).norm() / plain.x.norm()) < 1e-11


def test_a_wrong_layer_would_be_caught():
    """The check before the run is what makes the path safe: break a layer, and it is refused."""
    from taciturn.engines.layers import Linear

    task = task_of(MODELS["mlp"][0], (6,))
    split = BASE.partition.split(task.model, task.tracked)
    work = Work(task, split, BASE.solver, BASE.codec)
    assert isinstance(build(work), Fused)
    right = Linear.backward

    def wrong(self, step, x, g, needs_x):
        return right(self, step, x, g * 1.01, needs_x)

    try:
        Linear.backward = wrong
        assert isinstance(build(work), str)
    finally:
        Linear.backward = right


def test_own_forwards_are_refused():
    data = task_of(MODELS["mlp"][0], (6,)).data
    task = Task(MODELS["mlp"][0], data, forward=lambda model, batch: model(batch["input"])).build(0)
    split = BASE.partition.split(task.model, task.tracked)
    assert "forward of your own" in build(Work(task, split, BASE.solver, BASE.codec))


@pytest.mark.parametrize("model", ["encoder", "wide", "conv2d"])
def test_a_way_made_elsewhere_cuts_and_trains_alike(model):
    """Another process makes its way from the path alone: what the check learnt of the model's rows goes with it."""
    make, shape, integers = MODELS[model]
    task = task_of(make, shape, integers)
    path = path_of(task)
    assert path.fused is not None and (model != "encoder" or set(path.rows.values()) == {1, 5})
    work = path.fused.work
    there = trainer(work, BASE.sync, BASE.batch_size, random.key(0), replace(path, fused=None)).way
    assert there is not path.fused and there.rows == path.fused.rows
    assert [there.width(n, 4) for n in (1, 2, 50)] == [path.fused.width(n, 4) for n in (1, 2, 50)]
