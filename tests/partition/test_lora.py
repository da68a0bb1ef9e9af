"""Adapters: what is trained and shared, under which names, and that the base stays what it was.

Symbols: W0 [m, n] frozen; B [m, r], A [r, n]; d shared values.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="partition lora needs peft: pip install 'taciturn[lora]'")

import taciturn  # noqa: E402
from conftest import Net, make_federation  # noqa: E402
from drive import agree, drive  # noqa: E402
from taciturn import (  # noqa: E402
    Experiment,
    Task,
    aggregation,
    codecs,
    participation,
    partition,
    precision,
    server,
    solvers,
    sync,
)
from taciturn.core.errors import ConfigError, MethodError, ModelError, UnknownName  # noqa: E402
from taciturn.core.rounding import applies  # noqa: E402
from taciturn.experiment import config  # noqa: E402
from taciturn.method import Method  # noqa: E402
from taciturn.precision import fake  # noqa: E402

METHOD = Method(participation=participation.uniform(count=4), solver=solvers.sgd(lr=0.02), batch_size=8)


class Mixed(nn.Module):
    """An embedding, a convolution, two linear layers: every kind that can have an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1)
        self.stem = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, 6] -> [b, 3]: six tokens of 0..6."""
        tokens = (x.abs() * 3).long().clamp(max=6)
        wide = torch.relu(self.conv(self.table(tokens).transpose(1, 2))).mean(2)
        return self.head(self.norm(torch.relu(self.stem(wide))))


PARTS = {
    "linear": (partition.lora(rank=2), ["stem.lora_A.weight", "stem.lora_B.weight"]),
    "all": (
        partition.lora(rank=2, targets=("table", "conv", "stem", "head")),
        ["table.lora_embedding_A", "table.lora_embedding_B", "conv.lora_A.weight", "conv.lora_B.weight",
         "stem.lora_A.weight", "stem.lora_B.weight", "head.lora_A.weight", "head.lora_B.weight"],
    ),
    "and-more": (
        partition.lora(rank=3, targets="st*", also=("norms", "head")),
        ["stem.lora_A.weight", "stem.lora_B.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"],
    ),
}  # fmt: skip


def build(part, model=Mixed, **data):
    return Task(model, make_federation(**data)).build(0, prepare=part.prepare)


@pytest.mark.parametrize("name", PARTS)
def test_what_is_shared_and_under_which_names(name):
    part, names = PARTS[name]
    task = build(part)
    split = part.split(task.model, task.tracked)
    assert sorted(split.layout.names) == sorted(names) and split.personal.d == 0
    saved = peft.get_peft_model_state_dict(task.model)
    assert set(saved) == {n for n in names if "lora" in n}, "peft's own names"
    assert all(tuple(saved[n].shape) == shape for n, shape in zip(split.layout.names, split.layout.shapes, strict=True)
               if n in saved)  # fmt: skip


@pytest.mark.parametrize("share", ["both", "A"])
def test_adapters_are_shared_and_the_head_is_kept(share):
    part = partition.lora(rank=2, share=share, rest="frozen" if share == "both" else "personal", personal="head")
    task = build(part)
    split = part.split(task.model, task.tracked)
    both = {"stem.lora_A.weight", "stem.lora_B.weight"}
    assert set(split.layout.names) == (both if share == "both" else {"stem.lora_A.weight"})
    assert {"head.weight", "head.bias"} <= set(split.personal.names)
    parts = {"partition": part, "codec": codecs.difference(codecs.quantize4(), alpha=1.0, memory="mean")}
    duals = {"solver": solvers.admm(v_steps=2), "aggregator": aggregation.running(update="point")}
    agree(task, Method(**parts, **duals, participation=participation.uniform(count=5), sync=sync.every(steps=5)), block=3)


@pytest.mark.parametrize("name", PARTS)
def test_it_starts_as_the_model_and_the_base_never_moves(name):
    part, _ = PARTS[name]
    plain = Task(Mixed, make_federation()).build(0)
    task = build(part)
    x = torch.randn(5, 6)
    torch.testing.assert_close(task.model(x), plain.model(x))
    before = {n: p.clone() for n, p in task.model.named_parameters() if not p.requires_grad}
    result = taciturn.run(Experiment(Task(Mixed, make_federation()), METHOD.replace(partition=part), rounds=3))
    after = result.tensors
    assert all(torch.equal(after[n], p) for n, p in before.items())
    moved = [n for n, p in task.model.named_parameters() if p.requires_grad and not torch.equal(after[n], p)]
    assert moved, "nothing was learnt"
    assert not torch.allclose(result.model(x), plain.model(x))


@pytest.mark.parametrize("name", PARTS)
def test_engines_agree_and_only_adapters_travel(name):
    part, _ = PARTS[name]
    task, method = build(part), METHOD.replace(partition=part)
    state, _, _, traffic = drive(task, method, rounds=3)
    wired, wire, _, wire_traffic = drive(task, method, "loopback", rounds=3)
    stacked, _, _, stacked_traffic = drive(task, method, "stacked", rounds=3, block=2)
    assert torch.equal(state.x, wired.x) and traffic == wire_traffic == stacked_traffic
    assert float((state.x - stacked.x).norm() / state.x.norm()) <= 1e-5
    assert wire.post.ledger.totals["up/update"]["payload"] == 4 * len(state.x) * 12


@pytest.mark.parametrize(
    "parts",
    [
        {"sync": sync.fda(), "codec": codecs.error_feedback(codecs.quantize4())},
        {"server": server.adam(lr=0.01), "solver": solvers.adamw(lr=0.01)},
    ],
    ids=["fda-q4", "adam"],
)
def test_composes_with_other_parts(parts):
    part, _ = PARTS["and-more"]
    task, method = build(part), METHOD.replace(partition=part, **parts)
    state, _, stats, traffic = drive(task, method, rounds=4)
    wired, _, _, same = drive(task, method, "loopback", rounds=4)
    assert torch.equal(state.x, wired.x) and traffic == same
    assert float(stats[-1].loss.mean()) < float(stats[0].loss.mean())


def test_scale_is_alpha_over_rank():
    part = partition.lora(rank=2, alpha=6.0)
    task = build(part)
    named = dict(task.model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            if "lora_B" in name:
                parameter.normal_()
    x = torch.randn(4, 5)
    a, b = (named[f"stem.lora_{side}.default.weight"] for side in "AB")
    base = named["stem.base_layer.weight"] + 3.0 * b @ a
    torch.testing.assert_close(task.model.stem(x), x @ base.T + named["stem.base_layer.bias"])


def test_saved_adapters_open_in_peft(tmp_path):
    part = partition.lora(rank=2, targets=("table", "conv", "stem"))
    result = taciturn.run(Experiment(Task(Mixed, make_federation()), METHOD.replace(partition=part), rounds=2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Mixed()
    part.save(result.tensors, copy.deepcopy(base), tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    x = torch.randn(5, 6)
    torch.testing.assert_close(opened(x), result.model(x))


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (lambda: partition.lora(rank=0), ConfigError, "rank: at least 1; got 0"),
        (lambda: partition.lora(alpha=0.0), ConfigError, "alpha: above 0; got 0.0"),
        (lambda: partition.lora(dropout=1.0), ConfigError, "dropout: at least 0, below 1; got 1.0"),
        (
            lambda: partition.lora(targets=("norm",)).prepare(Mixed()),
            ModelError,
            r"norm \(LayerNorm\) cannot have an adapter",
        ),
        (
            lambda: partition.lora(targets=("stem.weight",)).prepare(Mixed()),
            ModelError,
            "stem.weight cannot have an adapter",
        ),
        (lambda: partition.lora(targets=("stm",)).prepare(Mixed()), UnknownName, "there is no module or parameter 'stm'"),
        (lambda: partition.lora(targets=("head",), also="head").prepare(Mixed()), MethodError, "choose one"),
        (lambda: partition.lora(also="head", personal=("head",)).prepare(Mixed()), MethodError, "shared .* and personal"),
        (lambda: partition.lora(share="core", personal="head"), ConfigError, "only R is trained"),
        (lambda: partition.lora().prepare(nn.Sequential(nn.Linear(2, 2))), ModelError, "no linear layer but its head"),
    ],
)
def test_errors(part, error, message):
    with pytest.raises(error, match=message):
        part()


def test_the_users_model_is_left_alone():
    model = Mixed()
    names = [name for name, _ in model.named_parameters()]
    Task(model, make_federation()).build(0, prepare=partition.lora().prepare)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())


def test_net_of_the_other_tests_too():
    """A second architecture, traced layer by layer without adapters; with them it is batched by vmap."""
    part = partition.lora(rank=2)
    state, *_ = drive(build(part, Net), METHOD.replace(partition=part), rounds=2)
    assert len(state.x) == 2 * (6 + 8)


# --------------------------------------------------------------------------------------------- a base in few bits


class Wide(nn.Module):
    """A table, a convolution and linear layers with 16 features and more on both sides; the head has fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(24, 16), nn.Conv1d(16, 20, 3, padding=1)
        self.stem, self.head = nn.Linear(20, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, 6] -> [b, 3]: six tokens of 0..23."""
        tokens = (x.abs() * 8).long().clamp(max=23)
        return self.head(torch.relu(self.stem(torch.relu(self.conv(self.table(tokens).transpose(1, 2))).mean(2))))


EVERYWHERE = {"targets": ("table", "conv", "stem", "head"), "rank": 2}


@pytest.mark.parametrize("bits", [4, 8])
def test_the_base_is_the_quantized_one_from_start_to_end(bits):
    plain, part = build(partition.lora(**EVERYWHERE), Wide).model, partition.lora(**EVERYWHERE, base_bits=bits)
    task = build(part, Wide)
    given, held = dict(plain.named_parameters()), dict(task.model.named_parameters())
    want = {name: fake.deployed({name: p.detach()}, bits)[name] for name, p in given.items() if "base_layer" in name}
    assert all(torch.equal(held[name], w) for name, w in want.items())
    changed = {name.split(".")[0] for name in want if not torch.equal(held[name], given[name])}
    assert changed == {"table", "conv", "stem"}, "the head has 3 outputs and stays float"
    assert all(torch.equal(held[name], given[name]) for name in given if "lora_" in name)
    result = taciturn.run(Experiment(Task(Wide, make_federation()), METHOD.replace(partition=part), rounds=2))
    assert all(torch.equal(result.tensors[name], w) for name, w in want.items())
    assert any(not torch.equal(result.tensors[name], held[name]) for name in held if "lora_B" in name)
    again = dict(result.quantized(bits).named_parameters())
    for name, w in want.items():
        torch.testing.assert_close(again[name], w, rtol=1e-6, atol=0)  # deployment changes the base no more


COMPOSED = {
    "qat": {"precision": precision.fixed(("qat3", "float32")), "codec": codecs.quantize(bits=4, rounding="nearest")},
    "codec": {"codec": codecs.error_feedback(codecs.quantize4())},
    "product": {"aggregator": aggregation.low_rank(operator="product_svd")},
    "tangent": {"aggregator": aggregation.low_rank(operator="tangent")},
    "personal": {"partition": partition.lora(**EVERYWHERE | {"targets": ("stem",)}, personal="head", base_bits=8)},
    "core": {"partition": partition.lora(**EVERYWHERE, share="core", base_bits=4)},
}


SLOW = ("codec", "tangent", "core")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in COMPOSED])
def test_a_base_in_few_bits_composes(name):
    method = METHOD.replace(**{"partition": partition.lora(**EVERYWHERE, base_bits=4)} | COMPOSED[name])
    task = build(method.partition, Wide)
    before = {n: p.clone() for n, p in task.model.named_parameters() if "base_layer.weight" in n}
    state, _, _, traffic = drive(task, method, rounds=2)
    wired, _, _, same = drive(task, method, "loopback", rounds=2)
    stacked, _, _, _ = drive(task, method, "stacked", rounds=2, block=2)
    assert torch.equal(state.x, wired.x) and traffic == same
    assert float((state.x - stacked.x).norm() / state.x.norm()) <= 1e-4
    assert all(torch.equal(dict(task.model.named_parameters())[n], p) for n, p in before.items())
    if name == "qat":
        assert not any(applies(shape) for shape in method.split(task.model, task.tracked).layout.shapes), "rank 2"


@pytest.mark.parametrize("operator", ["fedex", "flora", "product_svd_residual"])
def test_products_do_not_go_into_a_base_of_few_bits(operator):
    with pytest.raises(MethodError, match="base_bits = 4 holds it in 4 bits"):
        Method(partition=partition.lora(base_bits=4), aggregator=aggregation.low_rank(operator=operator))
    Method(partition=partition.lora(), aggregator=aggregation.low_rank(operator=operator))


def test_wrong_bits_and_a_base_that_is_trained_whole_are_refused():
    with pytest.raises(ConfigError, match=r"lora\.base_bits: 8, 4, or 0"):
        partition.lora(base_bits=3)

    class Tied(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Linear(20, 24)
            self.twin.weight = self.stem.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    with pytest.raises(MethodError, match=r"twin\.weight in few bits, and it is tied to stem\.weight"):
        build(partition.lora(targets="twin", also="stem", base_bits=8), Tied)


def test_saved_adapters_belong_on_the_quantized_base(tmp_path):
    part = partition.lora(**EVERYWHERE | {"targets": ("conv", "stem")}, base_bits=4)
    torch.manual_seed(3)
    base = Wide()
    result = taciturn.run(Experiment(Task(base, make_federation()), METHOD.replace(partition=part), rounds=2))
    folder = part.save(result.tensors, base, tmp_path / "adapters")
    assert json.loads((folder / "adapter_config.json").read_text())["rank_pattern"] == {}, "W0 has not moved"
    low = copy.deepcopy(base)
    with torch.no_grad():
        for layer in (low.conv, low.stem):
            layer.weight.copy_(part.held(layer.weight))
    opened = peft.PeftModel.from_pretrained(low, folder).eval()
    x = torch.randn(7, 6)
    torch.testing.assert_close(opened(x), result.model(x))


def test_base_bits_are_in_the_configuration_and_come_back():
    toml = {"name": "lora", "rank": 2, "base_bits": 4}
    part = config.build_part("partition", toml, "method.partition")
    assert part == partition.lora(rank=2, base_bits=4)
    with pytest.raises(ConfigError, match=r"method\.partition\.base_bits"):
        config.build_part("partition", toml | {"base_bits": 5}, "method.partition")


@pytest.mark.slow
def test_accuracy_with_a_base_in_few_bits():
    """Digits, MLP 64-64 of random base: neither 8 nor 4 bits cost accuracy."""
    task = taciturn.TaskSpec(taciturn.data.digits(clients=8), taciturn.models.mlp(hidden=(64, 64)))
    found = {}
    for bits in (0, 8, 4):
        part = partition.lora(rank=4, alpha=8, also="head", base_bits=bits)
        method = Method(partition=part, solver=solvers.adamw(lr=0.01), batch_size=16)
        found[bits] = taciturn.run(Experiment(task, method, rounds=10, evaluate_every=10)).metrics["accuracy"]
    assert found[0] > 0.75 and min(found[8], found[4]) > found[0] - 0.05, found
