"""Clients of unlike ranks, through whole rounds: what each trains, what travels, and what the server makes of it.

Symbols: client i has rank r_i = RANKS[i mod 3]; it holds the first r_i columns of B [m, r] and rows of A [r, n]; d_k values
of x that clients of kind k hold; w_i weights.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft", reason="partition lora needs peft: pip install 'taciturn[lora]'")

import taciturn
from aggregation.test_merges import Mixed, Spy
from conftest import make_federation
from drive import agree, drive, resumes
from taciturn import Broadcast, Experiment, Task, aggregation, codecs, participation, partition, server, solvers, sync
from taciturn.aggregation.low_rank import OPERATORS, pairs_of
from taciturn.client import Work, begin
from taciturn.core.errors import ConfigError, MethodError
from taciturn.method import Method

RANKS = (2, 4, 1)
PART = partition.lora(rank=4, ranks=RANKS, targets=("table", "conv", "stem"), also="head")
METHOD = Method(
    partition=PART, participation=participation.uniform(count=4), solver=solvers.sgd(lr=0.2), batch_size=16,
    sync=sync.every(epochs=1),
)  # fmt: skip
UNEQUAL = [name for name, operator in OPERATORS.items() if operator.unequal]
AGGREGATORS = {name: aggregation.low_rank(operator=name) for name in UNEQUAL} | {"mean": aggregation.weighted()}


def values(rank):
    """d_k."""
    return rank * (30 + 40 + 24 + 90 + 20 + 24) + 3 * 20 + 3


@pytest.fixture(scope="module")
def task():
    return Task(Mixed, make_federation()).build(0, prepare=PART.prepare)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_engines_agree(name, task):
    agree(task, METHOD.replace(aggregator=AGGREGATORS[name]), block=3)


@pytest.mark.parametrize(
    "parts",
    [
        {"codec": codecs.error_feedback(codecs.quantize4()), "broadcast": Broadcast(codecs.quantize8(), "change")},
        {"codec": codecs.error_feedback(codecs.top_k(share=0.3), into="start")},
        {"codec": codecs.difference(codecs.quantize8()), "solver": solvers.adamw(lr=0.01), "server": server.adam(lr=0.05)},
        {"sync": sync.fda(), "codec": codecs.top_k(share=0.2)},
    ],
    ids=["q4-q8-change", "start", "difference-adamw-adam", "fda-topk"],
)
def test_composes_with_other_parts(parts, task):
    method = METHOD.replace(**parts)
    state, _, _, traffic = drive(task, method, rounds=3)
    wired, _, _, same = drive(task, method, "loopback", rounds=3)
    stacked, *_ = drive(task, method, "stacked", rounds=3, block=3)
    assert torch.equal(state.x, wired.x) and traffic == same
    assert float((state.x - stacked.x).norm() / state.x.norm()) <= 1e-2
    assert torch.isfinite(state.x).all() and not torch.equal(state.x, method.split(task.model, task.tracked).x0)


@pytest.mark.parametrize("operator", UNEQUAL)
def test_bytes_are_those_of_the_table(operator, task):
    """r_i (m + n) a layer up; down the same, and for flora (m + n) sum r_j or m n where that is less."""
    method = METHOD.replace(aggregator=AGGREGATORS[operator], participation=participation.all())
    *_, traffic = drive(task, method, "loopback", rounds=3)
    sent = sum(4 * values(RANKS[i % 3]) for i in range(8))
    columns, merged = sum(RANKS[i % 3] for i in range(8)), 0
    if operator == "flora":
        merged = sum(min(4 * columns * (m + n) + 4, 4 * m * n) for m, n in ((30, 40), (24, 90), (20, 24)))
    for line in traffic[1:]:
        assert line["by_kind"]["up/update"]["payload"] == sent
        assert line["by_kind"]["down/model"]["payload"] == sent + 8 * merged


def test_a_client_trains_its_slices_only(task):
    """Also under decoupled weight decay, which would move what has no gradient."""
    spy = Spy(aggregation.weighted())
    solver = solvers.adamw(lr=0.02, weight_decay=0.1)
    method = METHOD.replace(aggregator=spy, solver=solver, participation=participation.all())
    split = method.split(task.model, task.tracked)
    state, *_ = drive(task, method, rounds=1)
    kinds = split.kind_of(0, torch.arange(8)).tolist()
    assert [sorted(set(RANKS))[k] for k in kinds] == [RANKS[i % 3] for i in range(8)]
    order = sorted(range(8), key=lambda i: kinds[i])  # blocks of one kind after the other
    rows, weights = zip(*spy.rounds[0], strict=True)
    total, owners = torch.zeros(split.layout.d), torch.zeros(split.layout.d)
    for row, w, i in zip(rows, weights, order, strict=True):
        views, rank, part = split.layout.views(row), RANKS[i % 3], split.kinds[kinds[i]].trains
        for b, a in pairs_of(split.layout).values():
            assert not views[b].transpose(0, 1)[rank:].any() and not views[a][rank:].any()
            assert views[b].transpose(0, 1)[:rank].any()
        total += w * row
        owners += w * (1.0 if part is None else part.mask)
    torch.testing.assert_close(state.x, total / owners, rtol=1e-4, atol=1e-6)


def test_the_mean_is_rbla(task):
    one, *_ = drive(task, METHOD.replace(aggregator=AGGREGATORS["rbla"]), rounds=3)
    other, *_ = drive(task, METHOD.replace(aggregator=aggregation.weighted()), rounds=3)
    assert float((one.x - other.x).norm() / other.x.norm()) <= 1e-5


@pytest.mark.parametrize("operator", ["rbla", "hetlora_style"])
def test_slices_of_absent_clients_stay(operator, task):
    method = METHOD.replace(aggregator=AGGREGATORS[operator], participation=participation.cyclic(count=1))
    states = [drive(task, method, rounds=n)[0] for n in (1, 2)]
    split = method.split(task.model, task.tracked)
    before, after = (split.layout.views(x) for x in (split.x0, states[0].x))
    for b, a in pairs_of(split.layout).values():
        assert torch.equal(before[a][2:], after[a][2:]) and torch.equal(before[b][:, 2:], after[b][:, 2:])
        assert not torch.equal(before[b][:, :2], after[b][:, :2]) or not torch.equal(before[a][:2], after[a][:2])


@pytest.mark.parametrize("aggregator", [aggregation.weighted(), aggregation.low_rank(), AGGREGATORS["flora"]])
def test_one_rank_for_all_is_no_kind(aggregator, task):
    same, plain = (PART.__class__(rank=4, ranks=r, targets=PART.targets, also="head") for r in ((4, 4), ()))
    one, _, _, traffic = drive(task, METHOD.replace(partition=same, aggregator=aggregator), rounds=3)
    two, _, _, other = drive(task, METHOD.replace(partition=plain, aggregator=aggregator), rounds=3)
    assert torch.equal(one.x, two.x) and traffic == other


@pytest.fixture(scope="module")
def doubles():
    return Task(Mixed, make_federation()).build(0, prepare=PART.prepare, dtype=torch.float64)


def test_one_client_of_a_small_rank_loses_nothing(doubles):
    """N = 1: the product that the server goes on from, of the largest rank, is the client's; what is beyond can learn."""
    spy = Spy(AGGREGATORS["product_svd"])
    method = METHOD.replace(aggregator=spy, participation=participation.cyclic(count=1))
    state, *_ = drive(doubles, method, rounds=1)
    ((row, _),) = spy.rounds[0]
    now, then = spy.layout.views(state.x), spy.layout.views(row)
    for b, a in pairs_of(spy.layout).values():
        torch.testing.assert_close(*(v[b].flatten(1) @ v[a].flatten(1) for v in (now, then)), rtol=1e-9, atol=1e-12)
        assert (now[a].flatten(1).norm(dim=1) > 0).all()


def test_workers_hold_what_their_kind_holds(task):
    method = METHOD.replace(aggregator=AGGREGATORS["flora"])
    one, *_ = drive(task, method, rounds=2)
    two, runner, *_ = drive(task, method, rounds=2, workers=2)
    runner.crew.close()
    assert torch.equal(one.x, two.x)


@pytest.mark.parametrize("down", [Broadcast(codecs.identity()), Broadcast(codecs.quantize8(), "change")])
def test_an_average_is_evaluated_at_every_rank(down):
    method = METHOD.replace(server=server.averaged(server.sgd()), broadcast=down)
    experiment = Experiment(Task(Mixed, make_federation()), method, rounds=3, evaluate_clients_every=1, evaluate_on="train")
    one, two = (taciturn.run(experiment.replace(engine=engine)) for engine in ("sequential", "loopback"))
    assert [line["spread"] for line in one.history] == [line["spread"] for line in two.history]
    assert [line["traffic"] for line in one.history] == [line["traffic"] for line in two.history]


def test_flora_loses_nothing_of_unlike_ranks(doubles):
    spy = Spy(AGGREGATORS["flora"])
    state, *_ = drive(doubles, METHOD.replace(aggregator=spy), rounds=1)
    rows, weights = zip(*spy.rounds[0], strict=True)
    share = torch.stack(weights).double()
    share /= share.sum()
    for layer, (b, a) in pairs_of(spy.layout).items():
        each = [(v[b].reshape(len(v[b]), -1), v[a].flatten(1)) for v in map(spy.layout.views, rows)]
        x, y = state.merges[layer]
        mean = sum(w * left @ right for w, (left, right) in zip(share, each, strict=True))
        assert float((x @ y - mean).norm()) < 1e-14 and not spy.layout.views(state.x)[b].any()


@pytest.mark.parametrize("engine", ["loopback", "stacked"])
def test_a_resumed_run_ends_in_the_same_bits(engine, tmp_path):
    parts = {"codec": codecs.error_feedback(codecs.quantize4()), "broadcast": Broadcast(codecs.quantize8(), "change")}
    parts = parts if engine == "loopback" else {"aggregator": AGGREGATORS["flora"]}
    task = Task(Mixed, make_federation())
    experiment = Experiment(task, METHOD.replace(**parts), rounds=2, engine=engine, evaluate_clients_every=1)
    whole = resumes(experiment, tmp_path / "run", rounds=4)
    small = dict(whole.client("site-2").named_parameters())["stem.lora_A.default.weight"]
    assert small[:1].any() and not small[1:].any(), "rank 1"
    assert whole.history[-1]["spread"]["ids"] == list(range(8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: partition.lora(rank=8, ranks=(2, 4)), r"the largest being rank = 8; got \(2, 4\)"),
        (lambda: partition.lora(rank=2, ranks=(0, 2)), "lora.ranks: at least 1"),
        (lambda: partition.lora(rank=2, ranks=(1, 2), share="B"), 'with share = "both"'),
    ],
)
def test_wrong_ranks(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "aggregator",
    [
        aggregation.low_rank(operator="fedex"),
        aggregation.low_rank(operator="tangent"),
        aggregation.low_rank(align=True),
        aggregation.nova(),
        aggregation.running(),
    ],
    ids=lambda part: getattr(part, "operator", type(part).__name__),
)
def test_who_needs_equal_ranks_is_refused(aggregator, task):
    parts = (
        {"codec": codecs.difference(codecs.identity(), memory="mean", alpha=1.0)}
        if isinstance(aggregator, aggregation.running)
        else {}
    )
    with pytest.raises(MethodError, match="for unlike ranks without align and with operator"):
        drive(task, METHOD.replace(aggregator=aggregator, **parts), rounds=1)


@pytest.mark.parametrize("number", range(3))
def test_what_a_kind_lost_is_trained_on_in_its_own_coordinates(number, task):
    method = METHOD.replace(codec=codecs.error_feedback(codecs.top_k(share=0.3), into="start"))
    work = Work(task, method.split(task.model, task.tracked), method.solver, method.codec, number)
    own, x0, part = work.newcomer(), work.split.x0, work.kind.trains
    lost = torch.arange(1.0, work.layout.d + 1)
    own["tx"] = work.kept(own["tx"], work.mine(own["tx"]) | {"error": lost})
    y = begin(work, x0, own)["solver"]["y"]
    places = slice(None) if part is None else part.places
    wanted = torch.zeros_like(x0)
    wanted[places] = lost.to(x0.dtype)
    assert torch.equal(y, x0 + wanted)
