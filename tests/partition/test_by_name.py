"""What is shared and what stays: every parameter is on exactly one side, and the two sides make the model again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from conftest import Net, make_task
from drive import drive
from taciturn import participation, partition, sync
from taciturn.core.errors import ConfigError, MethodError, ModelError, UnknownName
from taciturn.method import Method

ALL = {"stem.weight", "stem.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}
NONE: frozenset[str] = frozenset()


class Plain(nn.Module):
    """Modules that are not called stem or head; two norms; a scalar of its own at the end."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.mid = nn.Sequential(norm(8), nn.ReLU(), nn.Linear(8, 8), norm(8))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.mid(self.first(x)))


class Tied(nn.Module):
    """dec.weight is enc.weight."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.mid, self.dec = nn.Linear(6, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 6)
        self.dec.weight = self.enc.weight

    def forward(self, x):
        return self.dec(torch.tanh(self.mid(self.enc(x))))[:, :3]


class Scaled(Net):
    """With a parameter of no axes."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return super().forward(x) * self.temperature


def sides(part, model, tracked=NONE) -> tuple[set[str], set[str]]:
    split = part.split(model, tracked)
    return set(split.layout.names), set(split.personal.names)


def personal(*words: str, model=None) -> set[str]:
    return sides(partition.layers(personal=words), model or Net())[1]


# ----------------------------------------------------------------------------------------------------- all splits

PARTS = {
    "full": partition.full(),
    "head": partition.layers(personal="head"),
    "stem": partition.layers(personal="stem"),
    "norms": partition.layers(personal="norms"),
    "shared pattern": partition.layers(shared=("*.weight",)),
}
MODELS = {"plain": Plain, "net": Net, "scalar": Scaled, "bare": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", PARTS)
def test_join_gives_the_model_back(name, model):
    """x0 and v0 hold every trainable value once, in the model's order; join and functional_call make the same function."""
    model = model()
    split = PARTS[name].split(model, NONE)
    trainable = dict(model.named_parameters())
    assert not set(split.layout.names) & set(split.personal.names)
    assert (split.personal.d == 0) == (name == "full") and split.layout.d > 0
    for layout in (split.layout, split.personal):
        assert list(layout.names) == [n for n in trainable if n in layout.names], "in the model's order"
    generator = torch.Generator().manual_seed(0)
    y, v = (z + torch.randn(len(z), generator=generator) for z in (split.x0, split.v0))
    joined = split.join({}, split.layout.views(y), split.personal.views(v))
    assert set(joined) == set(trainable)
    other = copy.deepcopy(model)
    other.load_state_dict({n: t.clone() for n, t in joined.items()})
    x = torch.randn(5, 6, generator=generator)
    assert torch.equal(functional_call(model, joined, (x,)), other(x))
    start = split.join({}, split.layout.views(split.x0), split.personal.views(split.v0))
    assert all(torch.equal(start[n], p) for n, p in trainable.items())


@pytest.mark.parametrize("name", PARTS)
def test_the_split_is_a_copy(name):
    model = Net()
    split = PARTS[name].split(model, NONE)
    x0, v0 = split.x0.clone(), split.v0.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(split.x0, x0) and torch.equal(split.v0, v0)
    assert not split.x0.requires_grad and not split.v0.requires_grad


def test_vectors_have_the_models_precision():
    split = partition.layers(personal="head").split(Net().double(), NONE)
    assert split.x0.dtype == split.v0.dtype == split.b0.dtype == torch.float64


# ----------------------------------------------------------------------------------------------------------- names


def test_helpers_find_the_first_the_last_and_the_norms():
    assert personal("stem", model=Plain()) == {"first.weight", "first.bias"}
    assert personal("head", model=Plain()) == {"last.weight", "last.bias"}
    norms = {"mid.0.weight", "mid.0.bias", "mid.3.weight", "mid.3.bias"}
    assert personal("norms", model=Plain()) == norms
    assert personal("norms", "head", model=Plain()) == norms | {"last.weight", "last.bias"}


@pytest.mark.parametrize(
    "norm", [lambda d: nn.GroupNorm(2, d), nn.RMSNorm, lambda d: nn.BatchNorm1d(d, track_running_stats=False)]
)
def test_norms_of_all_kinds(norm):
    model = Plain(norm)
    assert personal("norms", model=model) == {n for n, _ in model.named_parameters() if n.startswith(("mid.0.", "mid.3."))}


def test_a_module_of_that_name_comes_before_the_helper():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.middle, self.stem = nn.Linear(1, 2), nn.Linear(2, 2), nn.Linear(2, 1)

    assert personal("head", model=Odd()) == {"head.weight", "head.bias"}
    assert personal("stem", model=Odd()) == {"stem.weight", "stem.bias"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("head",), {"head.weight", "head.bias"}),
        (("head.bias",), {"head.bias"}),
        (("*.bias",), {"stem.bias", "norm.bias", "head.bias"}),
        (("st*",), {"stem.weight", "stem.bias"}),
        (("?ead",), {"head.weight", "head.bias"}),
        (("stem", "norm.bias"), {"stem.weight", "stem.bias", "norm.bias"}),
        (("head", "head.bias"), {"head.weight", "head.bias"}),
    ],
)
def test_names_and_patterns(words, found):
    assert personal(*words) == found
    assert sides(partition.layers(shared=words), Net()) == (found, ALL - found)
    assert sides(partition.layers(personal=words), Net()) == (ALL - found, found)


def test_a_text_is_a_list_of_one():
    assert sides(partition.layers(personal="head"), Net()) == sides(partition.layers(personal=("head",)), Net())


def test_a_name_covers_what_is_below_it_and_not_what_starts_alike():
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "ab": nn.Linear(1, 1), "c": nn.Sequential(nn.Linear(1, 1))})
    assert personal("a", model=model) == {"a.weight", "a.bias"}
    assert personal("c", model=model) == {"c.0.weight", "c.0.bias"}


@pytest.mark.parametrize(
    ("word", "near"),
    [("haed", "; did you mean 'head'?"), ("head.wieght", "; did you mean 'head.weight' or "), ("layer*", ".")],
)
def test_unknown_names(word, near):
    with pytest.raises(UnknownName) as error:
        partition.layers(personal=("stem", word)).split(Net(), NONE)
    start = f"method.partition: there is no module or parameter {word!r}{near}"
    assert str(error.value).startswith(start) and "Allowed: dropout, head, head.bias, head.weight, " in str(error.value)


def test_no_norms_to_keep():
    with pytest.raises(ModelError, match="no normalisation layer"):
        partition.layers(personal="norms").split(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), NONE)


@pytest.mark.parametrize(
    ("options", "side"),
    [({"personal": "*"}, "shared"), ({"shared": "*"}, "personal"), ({"shared": ("stem", "norm", "head")}, "personal")],
)
def test_an_empty_side_is_refused(options, side):
    with pytest.raises(MethodError, match=rf"no trainable parameter is {side} under layers.*full\(\) shares all"):
        partition.layers(**options).split(Net(), NONE)


def test_one_of_the_two_is_given():
    for options in ({}, {"personal": "head", "shared": "stem"}, {"personal": ()}):
        with pytest.raises(ConfigError, match="give personal or shared, one of the two"):
            partition.layers(**options)


# ---------------------------------------------------------------------------------------------- frozen, tied, tracked


def test_frozen_parameters_are_on_no_side():
    model = Net()
    model.stem.requires_grad_(False)
    shared, mine = sides(partition.layers(personal="head"), model)
    assert (shared, mine) == ({"norm.weight", "norm.bias"}, {"head.weight", "head.bias"})
    assert personal("stem.weight", "norm", model=model) == {"norm.weight", "norm.bias"}
    split, x = partition.full().split(model, NONE), torch.randn(4, 6)
    assert torch.equal(functional_call(model, split.join({}, split.layout.views(split.x0), {}), (x,)), model(x))
    with pytest.raises(MethodError, match="no trainable parameter is personal"):
        partition.layers(personal="stem").split(model, NONE)
    with pytest.raises(ModelError, match="no parameter that requires a gradient"):
        partition.full().split(model.requires_grad_(False), NONE)


def test_helpers_pass_over_frozen_modules():
    model = Plain()
    model.first.requires_grad_(False)
    model.last.requires_grad_(False)
    assert personal("stem", model=model) == {"mid.0.weight", "mid.0.bias"}
    assert personal("head", model=model) == {"mid.3.weight", "mid.3.bias"}


@pytest.mark.parametrize(
    "part",
    [partition.full(), partition.layers(personal=("enc", "dec.weight")), partition.layers(shared=("enc", "dec.weight"))],
    ids=["full", "mine", "ours"],
)
def test_tied_weights_are_one_parameter(part):
    """Listed once, under the first name; functional_call ties the second, and the gradient is of both uses."""
    model = Tied()
    split, x = part.split(model, NONE), torch.randn(5, 6)
    names = split.layout.names + split.personal.names
    assert sorted(names) == ["dec.bias", "enc.weight", "mid.bias", "mid.weight"]
    assert split.layout.d + split.personal.d == sum(p.numel() for p in model.parameters())
    joined = {n: 2 * t for n, t in split.join({}, split.layout.views(split.x0), split.personal.views(split.v0)).items()}
    gradient = grad(lambda p: functional_call(model, p, (x,)).square().sum())(joined)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    other(x).square().sum().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad)


@pytest.mark.parametrize("model", [Tied, Scaled])
def test_tied_and_scalar_parameters_train_alike_on_all_engines(model):
    task = make_task(model)
    method = Method(participation=participation.uniform(count=3), sync=sync.every(steps=2), batch_size=8)
    ends = {engine: drive(task, method, engine, rounds=2)[0].x for engine in ("sequential", "loopback", "stacked")}
    assert torch.equal(ends["sequential"], ends["loopback"])
    torch.testing.assert_close(ends["stacked"], ends["sequential"], rtol=1e-5, atol=1e-6)
    x0 = partition.full().split(task.model, task.tracked).x0
    assert (ends["sequential"] != x0).float().mean() > 0.9


@pytest.mark.parametrize("side", [{"personal": "head"}, {"personal": "enc"}, {"shared": "dec"}])
def test_a_tied_weight_cannot_be_shared_and_personal(side):
    with pytest.raises(ModelError, match=r"enc\.weight and dec\.weight are one tensor"):
        partition.layers(**side).split(Tied(), NONE)


def test_running_statistics_are_refused_with_the_remedy():
    model = Net(norm=nn.BatchNorm1d(8))
    tracked = frozenset({"norm.running_mean", "norm.running_var"})
    for part in (partition.full(), partition.layers(personal="head"), partition.layers(shared=("stem", "norm"))):
        with pytest.raises(ModelError, match=r"buffers norm.running_mean, norm.running_var .*FedBN.*GroupNorm.*freeze"):
            part.split(model, tracked)


@pytest.mark.parametrize(
    "part", [partition.layers(personal="norms"), partition.layers(shared=("stem", "head"))], ids=["mine", "ours"]
)
def test_running_statistics_stay_with_personal_norms(part):
    model = Net(norm=nn.BatchNorm1d(8))
    model.norm.running_mean.fill_(3.0)
    split = part.split(model, frozenset({"norm.running_mean", "norm.running_var"}))
    assert set(split.personal.names) == {"norm.weight", "norm.bias"}
    assert split.buffers.names == ("norm.running_mean", "norm.running_var")
    assert split.b0.tolist() == [3.0] * 8 + [1.0] * 8
    assert "norm.num_batches_tracked" not in split.buffers.names


def test_the_message_about_many_statistics_is_short():
    model = Plain(nn.BatchNorm1d)
    tracked = frozenset(n for n, b in model.named_buffers() if b.is_floating_point())
    with pytest.raises(ModelError, match=r"buffers mid.0.running_mean, mid.0.running_var, mid.3.running_mean \.\. \("):
        partition.full().split(model, tracked)
