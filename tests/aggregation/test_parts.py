"""Adapters of which a part is trained at a time: alternating factors, a factor of the server, a core between fixed ones.

Symbols: B [m, r], A [r, n], W0 [m, n]; R [r, r] of a core; w_i weights; x [d].
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft", reason="partition lora needs peft: pip install 'taciturn[lora]'")

import taciturn
from aggregation.test_merges import SHAPES, Mixed, Spy
from conftest import make_federation
from drive import agree, drive, resumes
from taciturn import Broadcast, Experiment, Task, aggregation, codecs, participation, partition, server, solvers, sync
from taciturn.aggregation.low_rank import pairs_of
from taciturn.core.errors import ConfigError, MethodError, UnknownName
from taciturn.method import Method

RANK, ALSO = 2, 3 * 20 + 3
MORE = {"targets": tuple(SHAPES), "also": "head"}
PARTS = {
    "rolora": (partition.lora(rank=RANK, share="alternate", **MORE), aggregation.weighted()),
    "fedsvd": (partition.lora(rank=RANK, share="B", rest="server", **MORE), aggregation.low_rank(operator="fedsvd")),
    "fed_sb": (partition.lora(rank=RANK, share="core", **MORE), aggregation.weighted()),
}
B, A = (RANK * sum(shape[axis] for shape in SHAPES.values()) for axis in (0, 1))


def method_of(name, **parts):
    part, aggregator = PARTS[name]
    method = Method(
        partition=part, aggregator=aggregator, participation=participation.uniform(count=3),
        solver=solvers.sgd(lr=0.2), batch_size=16, sync=sync.every(epochs=1),
    )  # fmt: skip
    return method.replace(**parts)


@pytest.fixture(scope="module")
def tasks():
    return {n: Task(Mixed, make_federation()).build(0, prepare=part.prepare) for n, (part, _) in PARTS.items()}


def products(method, task, x):
    """The product B A of each layer, or B R A, as the model multiplies it: [m, n]."""
    split = method.split(task.model, task.tracked)
    named = dict(task.model.named_parameters()) | split.join({}, split.layout.views(x), {})
    found = {}
    for layer in SHAPES:
        sides = ("lora_embedding_B.default", "lora_embedding_A.default")
        sides = sides if f"{layer}.{sides[0]}" in named else ("lora_B.default.weight", "lora_A.default.weight")
        b, a = (named[f"{layer}.{side}"].detach() for side in sides)
        found[layer] = b.flatten(1) @ a.flatten(1)
    return found


@pytest.mark.parametrize("name", PARTS)
def test_engines_agree(name, tasks):
    wired, wire, _, _ = agree(tasks[name], method_of(name), block=2)
    if wire.post._copies is not None:
        copies = wire.post._copies.export()
        newest = wire.post.versions(copies["ids"]) == wired.cast.version
        assert newest.any() and all(torch.equal(x, wired.cast.held["x"]) for x in copies["rows"]["x"][newest])


@pytest.mark.parametrize("name", PARTS)
def test_bytes_are_those_of_the_table(name, tasks):
    """r m or r n by turns; r m up and r (m + n) down; r^2 a layer: and `also`. A piece costs a byte besides."""
    method = method_of(name, participation=participation.all())
    *_, traffic = drive(tasks[name], method, "loopback", rounds=4)
    core = RANK**2 * len(SHAPES)
    up = {"rolora": [B, A, B, A], "fedsvd": [B] * 4, "fed_sb": [core] * 4}[name]
    down = {"rolora": [A + B, B, A, B], "fedsvd": [A + B] * 4, "fed_sb": [core] * 4}[name]
    for number, (line, sent, got) in enumerate(zip(traffic, up, down, strict=True)):
        marks = 0 if name != "rolora" else 3 if number == 0 else 2
        assert line["by_kind"]["up/update"]["payload"] == 8 * 4 * (sent + ALSO)
        assert line["by_kind"]["down/model"]["payload"] == 8 * (4 * (got + ALSO) + marks)


@pytest.mark.parametrize("name", PARTS)
def test_the_mean_product_is_kept_exactly(name):
    """W0 + s P Q = W0 + s sum w_i B_i A_i to rounding of float64, for one factor is common."""
    part, aggregator = PARTS[name]
    task = Task(Mixed, make_federation()).build(0, prepare=part.prepare, dtype=torch.float64)
    for rounds in (1, 2, 3):
        spy = Spy(aggregator)
        method = method_of(name, aggregator=spy)
        if name == "fedsvd":
            method.split(task.model, task.tracked)
        state, *_ = drive(task, method, rounds=rounds)
        rows, weights = zip(*spy.rounds[-1], strict=True)
        share = torch.stack(weights).double()
        each, now = [products(method, task, x) for x in rows], products(method, task, state.x)
        for layer in SHAPES:
            mean = sum(w * one[layer] for w, one in zip(share / share.sum(), each, strict=True))
            assert float((now[layer] - mean).norm()) <= 1e-13 * max(1.0, float(mean.norm()))
    if name == "fedsvd":
        for _, a in pairs_of(spy.layout).values():
            q = spy.layout.views(state.x)[a].flatten(1)
            torch.testing.assert_close(q @ q.T, torch.eye(RANK, dtype=torch.float64))
    if name == "rolora":
        before, after = (
            {n: v for n, v in spy.layout.views(x).items() if "_A" in n} for x in (spy.rounds[-1][0][0], state.x)
        )
        assert all(torch.equal(before[n], after[n]) for n in before), "the third round trains B"


@pytest.mark.parametrize(
    "parts",
    [
        {"codec": codecs.error_feedback(codecs.quantize4()), "broadcast": Broadcast(codecs.quantize8(), "change")},
        {"solver": solvers.adamw(lr=0.01, weight_decay=0.1), "broadcast": Broadcast(codecs.cast())},
    ],
    ids=["q4-q8-change", "adamw-cast"],
)
def test_alternating_factors_compose(parts, tasks):
    method = method_of("rolora", **parts)
    state, _, _, traffic = drive(tasks["rolora"], method, rounds=4)
    wired, _, _, same = drive(tasks["rolora"], method, "loopback", rounds=4)
    assert torch.equal(state.x, wired.x) and traffic == same


@pytest.mark.parametrize("engine", ["loopback"])
def test_a_resumed_run_ends_in_the_same_bits(engine, tmp_path):
    experiment = Experiment(
        Task(Mixed, make_federation()), method_of("rolora"), rounds=3, engine=engine, evaluate_clients_every=1
    )
    resumes(experiment, tmp_path / "run")


@pytest.mark.parametrize("name", PARTS)
def test_peft_opens_what_was_trained(name, tmp_path):
    result = taciturn.run(Experiment(Task(Mixed, make_federation()), method_of(name), rounds=4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Mixed()
    x = torch.randn(9, 6)
    with torch.no_grad():
        base.head.weight.copy_(result.tensors["head.weight"])
        base.head.bias.copy_(result.tensors["head.bias"])
        before = base(x)
    PARTS[name][0].save(result.tensors, base, tmp_path / "adapter")
    opened = pytest.importorskip("peft").PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(opened(x), result.model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(opened(x), before)


def test_a_table_learns_with_its_other_factor_frozen():
    part = partition.lora(rank=RANK, share="B", targets=("table",))
    task = Task(Mixed, make_federation()).build(0, prepare=part.prepare)
    state, *_ = drive(task, method_of("fed_sb", partition=part), rounds=2)
    assert state.x.any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: partition.lora(share="cores"), UnknownName, "did you mean 'core'"),
        (lambda: partition.lora(share="both", rest="server"), ConfigError, 'beside share = "A" or "B"'),
        (lambda: partition.lora(share="A", rest="server"), MethodError, "nothing is ever learnt"),
        (lambda: method_of("fedsvd", server=server.adam(lr=0.1)), MethodError, "gauge of their own"),
        (
            lambda: method_of("fedsvd", partition=partition.lora()).split(Mixed(), frozenset()),
            MethodError,
            r'lora\(share = "B", rest = "server"\)',
        ),
        (
            lambda: method_of("rolora", aggregator=aggregation.low_rank(operator="flora")).split(
                PARTS["rolora"][0].prepare(Mixed()), frozenset()
            ),
            MethodError,
            'use partition = lora',
        ),
    ],
)  # fmt: skip
def test_refusals_say_the_remedy(make, error, message):
    with pytest.raises(error, match=message):
        make()
