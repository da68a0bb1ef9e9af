"""Operators that merge products into the frozen base, through whole rounds: exact, counted, and the same on every engine.

Symbols: W0 [m, n] a frozen weight; B_i [m, r], A_i [r, n] what client i holds after training, w_i its weight; M = sum w_i
B_i A_i; (P, Q) what all continue from; base [m, n] the sum of the products that W0 took; K columns of a product.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="partition lora needs peft: pip install 'taciturn[lora]'")

import taciturn
from aggregation.layers import part_of
from conftest import Net, make_federation
from drive import agree, drive, resumes
from taciturn import Broadcast, Experiment, Task, aggregation, codecs, participation, partition, server, solvers, sync
from taciturn.aggregation.low_rank import OPERATORS, pairs_of
from taciturn.core import random
from taciturn.core.errors import ConfigError, MethodError, ModelError
from taciturn.method import Method
from taciturn.wire import nbytes
from taciturn.wire.format import FRAME

RANK = 2
MERGING = [name for name, operator in OPERATORS.items() if operator.merges]


class Mixed(nn.Module):
    """An embedding, a convolution, a linear layer: every shape that a product can have."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 30)
        self.conv = nn.Conv1d(30, 24, 3, padding=1)
        self.stem = nn.Linear(24, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, 6] -> [b, 3]: six tokens of 0..39."""
        tokens = (x.abs() * 16).long().clamp(max=39)
        wide = torch.relu(self.conv(self.table(tokens).transpose(1, 2))).mean(2)
        return self.head(torch.relu(self.stem(wide)))


SHAPES = {"table": (30, 40), "conv": (24, 90), "stem": (20, 24)}
PART = partition.lora(rank=RANK, alpha=6.0, targets=tuple(SHAPES), also="head")
METHOD = Method(
    partition=PART, participation=participation.uniform(count=3), solver=solvers.sgd(lr=0.2), batch_size=16,
    sync=sync.every(epochs=1),
)  # fmt: skip


class Spy:
    """An aggregator that keeps what clients held at the end of each round."""

    def __init__(self, inner):
        self.inner, self.rounds = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def start(self, state, x):
        self.rounds.append([])
        return self.inner.start(state, x)

    def add(self, acc, block):
        good = block.weights > 0
        self.rounds[-1] += list(zip((block.start + block.updates)[good], block.weights[good], strict=True))
        self.layout = block.layout
        return self.inner.add(acc, block)


@pytest.fixture(scope="module")
def task():
    return Task(Mixed, make_federation()).build(0, prepare=PART.prepare)


@pytest.fixture(scope="module")
def doubles():
    return Task(Mixed, make_federation()).build(0, prepare=PART.prepare, dtype=torch.float64)


def published(state, method, layout):
    """What a receiver of the state's x would hold."""
    return method.broadcast.publish(state.x, state.round, state.cast, layout, random.key(0), state.merges).held


def products(layout, x):
    """B A of every layer [m, n]."""
    views = layout.views(x)
    return {n: views[b].reshape(*views[b].shape[:2]) @ views[a].flatten(1) for n, (b, a) in pairs_of(layout).items()}


@pytest.mark.parametrize("operator", MERGING)
def test_engines_agree(operator, task):
    """Partial participation, and every fifth upload lost: bits and bytes of sequential and loopback are the same."""
    wired, wire, _, _ = agree(task, METHOD.replace(aggregator=part_of(operator)), block=2)
    copies = wire.post._copies.export()
    newest = wire.post.versions(copies["ids"]) == wired.cast.version
    assert newest.any() and not newest.all(), "some clients missed the last rounds"
    for layer, total in wired.cast.held["base"].items():
        assert tuple(total.shape) == SHAPES[layer] and float(total.norm()) > 0
        assert all(torch.equal(copy, total) for copy in copies["rows"]["base"][layer][newest])


@pytest.mark.parametrize("operator", MERGING)
def test_nothing_of_the_mean_product_is_lost(operator, doubles):
    """W0 + base' + P Q = W0 + base + M to rounding of float64; fedex_trunc up to the tail of R."""
    spy, states = Spy(part_of(operator)), []
    method = METHOD.replace(aggregator=spy)
    for rounds in (1, 2, 3):
        spy.rounds = []
        states.append(drive(doubles, method, rounds=rounds)[0])
    before, layout = {name: torch.zeros(shape) for name, shape in SHAPES.items()}, spy.layout
    for state, held in zip(states, spy.rounds, strict=True):
        share = torch.stack([w for _, w in held]).double()
        share /= share.sum()
        after = published(state, method, layout)["base"]
        each = [products(layout, x) for x, _ in held]
        for layer, product in products(layout, state.x).items():
            m = sum(w * one[layer] for w, one in zip(share, each, strict=True))
            error = float((after[layer] + product - before[layer] - m).norm() / m.norm())
            if operator == "fedex_trunc":
                means = products(layout, sum(w * x for w, (x, _) in zip(share, held, strict=True)))
                tail = torch.linalg.svdvals(m - means[layer])[1:].norm() / m.norm()
                assert abs(error - float(tail)) < 1e-8
            else:
                assert error < 1e-12, layer
        before = after


@pytest.mark.parametrize("operator", MERGING)
def test_bytes_are_those_of_the_table(operator, task):
    """Down, a client that missed nothing: the pair and `also`, and K (m + n) values a layer or m n where that is less."""
    method = METHOD.replace(aggregator=part_of(operator, diagnostics=False), participation=participation.all())
    cohort, rounds = 8, 3
    state, _, _, traffic = drive(task, method, "loopback", rounds=rounds)
    columns = {"fedex": (cohort - 1) * RANK, "fedex_trunc": 1, "flora": cohort * RANK}.get(operator, (cohort + 1) * RANK)
    values = len(state.x) + sum(min(columns * (m + n), m * n) for m, n in SHAPES.values())
    counts = sum(4 for m, n in SHAPES.values() if columns * (m + n) < m * n)  # one number beside each pair
    assert counts or operator != "fedex_trunc"
    for line in traffic[1:]:
        sent = line["by_kind"]["down/model"]
        assert sent == {"payload": cohort * (4 * values + counts), "frame": 2 * cohort * FRAME, "messages": 2 * cohort}
        assert line["by_kind"]["up/update"]["payload"] == cohort * 4 * len(state.x)
    assert traffic[0]["by_kind"]["down/model"]["payload"] == cohort * 4 * len(state.x), "nothing to merge yet"


@pytest.mark.parametrize("operator", MERGING)
def test_one_client_loses_nothing(operator, doubles):
    """N = 1: the function after the round is the one that the client had; only flora moves it into the base."""
    spy = Spy(part_of(operator))
    method = METHOD.replace(aggregator=spy, participation=participation.uniform(count=1))
    state, *_ = drive(doubles, method, rounds=1)
    (x, _), base = spy.rounds[0][0], published(state, method, spy.layout)["base"]
    now, want = products(spy.layout, state.x), products(spy.layout, x)
    for layer in SHAPES:
        torch.testing.assert_close(base[layer] + now[layer], want[layer], rtol=1e-9, atol=1e-13)
        assert (float(now[layer].norm()) == 0) == (operator == "flora")
        assert (float(base[layer].norm()) < 1e-9) == (operator != "flora")


def test_who_was_away_gets_frames_or_the_sum_whichever_is_smaller(task):
    """fedex_trunc merges one column a round: after many rounds a newcomer is sent the dense sum."""
    method = METHOD.replace(aggregator=part_of("fedex_trunc", diagnostics=False))
    state, *_ = drive(task, method, rounds=9)
    cast, down = state.cast, method.broadcast
    whole = sum(4 * m * n for m, n in SHAPES.values())
    one = sum(4 * (m + n) + 4 for m, n in SHAPES.values())
    assert len(cast.merges) == min(8, whole // one)
    for since in range(-1, cast.version):
        frames = [int(nbytes(frame)) for frame in down.frames(cast, since)]
        assert frames[-1] == 4 * len(state.x)
        lacks = cast.version - max(since, 0)
        assert frames[:-1] == ([one] * lacks if lacks * one <= whole else [whole])
    ahead = down.frames(cast, cast.version + 1)  # of a server that was put back to an older checkpoint
    assert [int(nbytes(frame)) for frame in ahead] == [whole, 4 * len(state.x)]


@pytest.mark.parametrize("operator", ["fedex", "flora"])
def test_the_result_is_what_clients_hold_and_peft_opens_it(operator, tmp_path):
    method = METHOD.replace(aggregator=part_of(operator))
    experiment = Experiment(Task(Mixed, make_federation()), method, rounds=4, evaluate_clients_every=2)
    result = taciturn.run(experiment, out=tmp_path / "run")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Mixed()
    weights = {name: base.get_parameter(f"{name}.weight") for name in SHAPES}
    assert all(not torch.equal(result.tensors[f"{n}.base_layer.weight"], w) for n, w in weights.items())
    with torch.no_grad():
        base.head.weight.copy_(result.tensors["head.weight"])
        base.head.bias.copy_(result.tensors["head.bias"])
    PART.save(result.tensors, base, tmp_path / "adapter")
    opened = pytest.importorskip("peft").PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    x = torch.randn(9, 6)
    torch.testing.assert_close(opened(x), result.model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["loopback", "stacked"])
def test_a_resumed_run_ends_in_the_same_bits(engine, tmp_path):
    method = METHOD.replace(aggregator=part_of("fedex"))
    experiment = Experiment(Task(Mixed, make_federation()), method, rounds=2, engine=engine, evaluate_clients_every=1)
    resumes(experiment, tmp_path / "run")


def test_workers_hold_the_base_too(task):
    method = METHOD.replace(aggregator=part_of("fedex", diagnostics=False))
    one, *_ = drive(task, method, "sequential", rounds=3)
    two, runner, *_ = drive(task, method, "sequential", rounds=3, workers=2)
    runner.crew.close()
    assert torch.equal(one.x, two.x)


class Tied(nn.Module):
    """A table that is the head too, and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.stem, self.head = nn.Embedding(3, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.conv = nn.Conv1d(6, 6, 1, groups=2)
        self.head.weight = self.table.weight


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("layer", ["table", "conv"])
def test_a_layer_that_cannot_take_products_is_refused(layer):
    part = partition.lora(rank=2, targets=("stem", layer))
    method = METHOD.replace(partition=part, aggregator=part_of("fedex"))
    with pytest.raises(ModelError, match=f"^{layer}: a grouped convolution, or a weight that another layer uses too"):
        method.split(part.prepare(Tied()), frozenset())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: METHOD.replace(aggregator=part_of("fedex"), server=server.sgd(lr=0.5)), r"use server = sgd\(lr = 1\)"),
        (lambda: METHOD.replace(aggregator=part_of("flora"), server=server.adam(lr=0.5)), r"use server = sgd\(lr = 1\)"),
        (
            lambda: METHOD.replace(aggregator=part_of("fedex"), broadcast=Broadcast(codecs.cast())),
            "broadcast.codec = identity",
        ),
        (
            lambda: drive(
                Task(Net, make_federation()).build(0, prepare=partition.lora(share="B").prepare),
                METHOD.replace(aggregator=part_of("fedex"), partition=partition.lora(share="B")),
                rounds=1,
            ),
            r"has none; use partition = lora\(share = \"both\"\)",
        ),
        (lambda: aggregation.low_rank(operator="fedex_trunc"), "residual_rank: the rank, at least 1"),
        (lambda: aggregation.low_rank(operator="fedex", residual_rank=2), "for no other operator; got 2 with fedex"),
    ],
)
def test_refusals_say_the_remedy(make, message):
    with pytest.raises((MethodError, ConfigError), match=message):
        make()
