"""FDA as a part: the same on every engine, with every other part; between fixed intervals; what it costs on the wire.

Symbols: M most blocks; n blocks of a round; T steps of a block.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import taciturn
from conftest import Net, make_federation, make_task
from drive import drive
from taciturn import Experiment, Task, aggregation, codecs, fleet, participation, partition, server, solvers, sync
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import ConfigError, MethodError, UnknownName
from taciturn.core.state import equal
from taciturn.method import Method
from taciturn.sync import fda
from taciturn.sync.thresholds import adaptive, fixed, plain, power

METHOD = Method(participation=participation.uniform(count=5), solver=solvers.sgd(lr=0.1), batch_size=8)
SMALL = {"rows": 3, "columns": 40}
CHEAP = fleet.Price.crossing(1.0, model_bytes=4 * 99, epoch_steps=4)
RULES = {
    "adaptive": fda(price=CHEAP),
    "published": replace(fda.published(max_blocks=4), **SMALL),
    "linear": fda(monitor="linear", theta=power(0.5), max_blocks=4),
    "exact": fda(monitor="exact", price=CHEAP),
    "half-blocks": fda(theta=plain(), max_blocks=6, block=0.5),
    "local": fda(monitor="local", price=CHEAP),
    "local-plain": fda(monitor="local", theta=plain(), max_blocks=4, pace="longest"),
}


def blocks(stats) -> list[float]:
    return [stat.sync["blocks"] for stat in stats]


@pytest.mark.parametrize("name", RULES)
def test_engines_agree(name):
    task, method = make_task(lambda: Net(dropout=0.2)), METHOD.replace(sync=RULES[name])
    state, engine, stats, traffic = drive(task, method, rounds=5)
    wired, wire, wired_stats, wire_traffic = drive(task, method, "loopback", rounds=5)
    stacked, _, stacked_stats, stacked_traffic = drive(task, method, "stacked", rounds=5, block=2)
    assert torch.equal(state.x, wired.x) and equal(engine.store.export(), wire.store.export())
    assert equal(state.sync, wired.sync) and [s.sync for s in stats] == [s.sync for s in wired_stats]
    assert float((state.x - stacked.x).norm() / state.x.norm()) <= 1e-5
    assert traffic == wire_traffic == stacked_traffic
    assert blocks(stats) == pytest.approx(blocks(stacked_stats))
    assert len(set(blocks(stats))) > 1, "the rule never changed its mind"


class Wide(nn.Module):
    """Layers so wide that the stacked engine never forms their weights, and clients rest while others go on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 200)
        self.middle = nn.Linear(200, 160)
        self.head = nn.Linear(160, 3)

    def forward(self, x):
        return self.head(torch.relu(self.middle(torch.relu(self.stem(x)))))


@pytest.mark.parametrize(
    "solver",
    [solvers.sgd(lr=0.05), solvers.prox(mu=0.5, solver=solvers.sgd(lr=0.05)), solvers.adamw(lr=0.003)],
    ids=["sgd", "prox", "adamw"],
)
@pytest.mark.parametrize("block", [0.3, 0.7])
def test_clients_that_rest_in_a_stride_go_on_as_they_were(block, solver):
    """With strides of part of an epoch small clients do no step in some of them; layer by layer this was once wrong."""
    task = make_task(Wide)
    rule = fda(theta=fixed(math.inf), max_blocks=5, block=block)
    method = METHOD.replace(sync=rule, solver=solver, batch_size=4, participation=participation.all())
    state, _, stats, _ = drive(task, method, rounds=2)
    stacked, engine, stacked_stats, _ = drive(task, method, "stacked", rounds=2)
    assert engine.crew.trainer.way.__class__.__name__ == "Fused"
    assert all(torch.equal(a.steps, b.steps) for a, b in zip(stats, stacked_stats, strict=True))
    assert float((state.x - stacked.x).norm() / state.x.norm()) <= 1e-5


PARTS = {
    "momentum": {"solver": solvers.sgd(lr=0.05, momentum=0.9, clip=1.0)},
    "adamw": {"solver": solvers.adamw(lr=0.01)},
    "prox": {"solver": solvers.prox(mu=0.5, solver=solvers.sgd(lr=0.1))},
    "head": {"partition": partition.layers(personal="head")},
    "norms": {"partition": partition.layers(personal=("norms",))},
    "cast": {"codec": codecs.cast(), "broadcast": Broadcast(codecs.cast())},
    "change": {"codec": codecs.quantize8(), "broadcast": Broadcast(codecs.quantize8(), "change")},
    "quantize4": {"codec": codecs.error_feedback(codecs.quantize4())},
    "top_k": {"codec": codecs.error_feedback(codecs.top_k(share=0.1))},
    "lossless": {"codec": codecs.lossless(codecs.quantize2())},
    "lowrank": {"codec": codecs.error_feedback(codecs.lowrank(rank=2))},
    "running": {
        "codec": codecs.difference(codecs.quantize4(), alpha=0.4, memory="mean"),
        "aggregator": aggregation.running(alpha=0.4),
    },
    "nova": {"aggregator": aggregation.nova()},
    "mean": {"aggregator": aggregation.mean()},
    "averaged": {"server": server.averaged(server.momentum(lr=0.5))},
    "available": {"participation": participation.available(count=4, probability=0.5, swing=1.0, period=3)},
} | {f"FDA-{name}": {"server": getattr(server, name)(lr=0.1)} for name in ("adagrad", "adam", "adamw", "momentum", "yogi")}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rule", ["adaptive", "published", "local"])
def test_works_with_every_other_part(rule, part):
    task, method = make_task(), METHOD.replace(sync=RULES[rule], **PARTS[part])
    state, engine, stats, traffic = drive(task, method, rounds=3)
    wired, wire, _, wire_traffic = drive(task, method, "loopback", rounds=3)
    assert torch.equal(state.x, wired.x) and equal(engine.store.export(), wire.store.export())
    assert traffic == wire_traffic and all(math.isfinite(n) for n in blocks(stats))


@pytest.mark.parametrize("engine", ["sequential", "loopback", "stacked"])
@pytest.mark.parametrize("pace", ["own", "longest"])
def test_between_the_fixed_intervals_that_bound_it(pace, engine):
    """Theta = 0: one block a round, as every(1). Theta without end: M blocks, as every(M). Bit for bit."""
    task = make_task()
    for theta, most, epochs in ((0.0, 4, 1), (math.inf, 3, 3)):
        rule = fda(theta=fixed(theta), max_blocks=most, pace=pace)
        method = METHOD.replace(sync=rule, server=server.adam(lr=0.1))
        state, _, stats, _ = drive(task, method, engine, rounds=3)
        timetable = method.replace(sync=sync.every(epochs=epochs, pace=pace))
        other, _, fixed_stats, _ = drive(task, timetable, engine, rounds=3)
        if engine == "stacked":  # another way through a round: weights are formed to look at them
            assert float((state.x - other.x).norm() / other.x.norm()) <= 1e-6
        else:
            assert torch.equal(state.x, other.x)
        assert all(torch.equal(a.steps, b.steps) for a, b in zip(stats, fixed_stats, strict=True))


@pytest.mark.parametrize("pace", ["own", pytest.param("longest", marks=pytest.mark.slow)])
@pytest.mark.parametrize("monitor", ["naive", "linear", "sketch", "exact", "local"])
def test_the_published_rule_begins_with_one_block_and_stays_within_its_bounds(monitor, pace):
    task = make_task()
    rule = fda(monitor=monitor, theta=plain(), max_blocks=5, pace=pace, **SMALL)
    _, _, stats, _ = drive(task, METHOD.replace(sync=rule, aggregator=aggregation.mean()), rounds=8)
    assert blocks(stats)[0] == 1.0 and all(1 <= n <= 5 for n in blocks(stats)) and max(blocks(stats)) > 1
    for stat in stats:
        epoch = (task.train.sizes[stat.ids] + 7) // 8
        base = epoch.max().expand_as(epoch) if pace == "longest" else epoch
        done = stat.steps / base
        if monitor == "local":
            assert stat.sync["blocks"] == pytest.approx(float(done.mean()))
            assert torch.equal(done, done.round())
        else:
            assert torch.equal(stat.steps, (base * stat.sync["blocks"]).to(torch.int32))


MONITOR = {"naive": 4, "linear": 8, "sketch": 4 + 4 * 3 * 40, "exact": 4 * 0, "local": 0}


@pytest.mark.parametrize("monitor", MONITOR)
def test_bytes_and_round_trips(monitor):
    """What the formula says: n checks up and as many answers of 4 bytes down, and what is said when the round begins."""
    task = make_task()
    rule = fda(monitor=monitor, theta=plain(), max_blocks=4, **SMALL)
    state, engine, stats, traffic = drive(task, METHOD.replace(sync=rule), "loopback", rounds=5)
    d, cohort, rounds = len(state.x), 5, 5
    totals = engine.post.ledger.totals
    if monitor == "local":
        assert "up/monitor" not in totals and totals["down/monitor"]["payload"] == (4 + 4) * cohort * rounds
        assert totals["up/stats"]["payload"] == (8 + 4) * cohort * rounds
        assert [line["exchanges"] for line in traffic] == [1] * rounds
        return
    checks = [len(stat.sync["looks"]) for stat in stats]
    each = 4 * d if monitor == "exact" else MONITOR[monitor]
    answers = [n if n < 4 else n - 1 for n in checks]  # after the last block clients stop by themselves
    begin = 4 + (-(-d // 8) if monitor == "linear" else 0)
    assert totals["up/monitor"]["payload"] == each * cohort * sum(checks)
    assert totals["down/monitor"]["payload"] == cohort * (begin * rounds + 4 * sum(answers))
    assert totals["down/model"]["payload"] == totals["up/update"]["payload"] == 4 * d * cohort * rounds
    assert [line["exchanges"] for line in traffic] == [1 + n for n in checks]


def test_record_tells_what_was_seen():
    task = make_task()
    _, _, stats, _ = drive(task, METHOD.replace(sync=fda(theta=plain(), max_blocks=4)), rounds=4)
    for before, stat in zip([None, *stats], stats, strict=False):
        told = stat.sync
        *earlier, last = told["looks"]
        assert all(look["estimate"] <= look["threshold"] for look in earlier)
        assert told["blocks"] == last["blocks"] == len(told["looks"])
        assert last["threshold"] is None or last["estimate"] > last["threshold"] or told["blocks"] == 4
        assert len(told["drift"]) == 5
        share = task.train.sizes[stat.ids].double() / task.train.sizes[stat.ids].sum()
        mean = float(share @ torch.tensor(told["drift"], dtype=torch.float64))
        assert told["variance"] == pytest.approx(mean, rel=1e-6) == pytest.approx(last["estimate"], rel=1e-6)
        assert told["next"]["theta"] == pytest.approx(told["variance"] * 2 / told["blocks"])
        if before:
            assert last["threshold"] == before.sync["next"]["theta"]
    assert stats[0].sync["looks"][0]["threshold"] is None, "the first round ends at once"


def test_exact_variance_of_the_published_rule():
    """V = S - |mean drift|^2: what the server holds at the end of the round, whatever the monitor guesses."""
    task, seen = make_task(dtype=torch.float64), []
    rule = fda(monitor="sketch", theta=plain(), max_blocks=3, **SMALL)
    method = METHOD.replace(sync=rule, aggregator=Peek(seen))
    _, _, stats, _ = drive(task, method, rounds=4)
    for stat, (updates, weights) in zip(stats, seen, strict=True):
        share = weights / weights.sum()
        mean = share @ updates
        var = float(share @ (updates - mean).square().sum(1))
        assert stat.sync["variance"] == pytest.approx(var, rel=1e-5)


class Peek:
    """The mean, that keeps what it was given."""

    linear = False

    def __init__(self, seen):
        self.seen, self.mean = seen, aggregation.mean()

    def __getattr__(self, name):
        return getattr(self.mean, name)

    def start(self, state, x):
        self.rows = []
        return self.mean.start(state, x)

    def add(self, acc, block):
        self.rows.append((block.updates.double(), block.weights.double()))
        return self.mean.add(acc, block)

    def finish(self, acc):
        self.seen.append(tuple(torch.cat(parts) for parts in zip(*self.rows, strict=True)))
        return self.mean.finish(acc)


def test_variance_of_drifts_is_not_blown_up_by_the_codec():
    """One bit a value makes updates many times as long; the threshold is built from the drifts themselves."""
    task = make_task()
    rule = fda(monitor="exact", theta=plain(), max_blocks=3)
    _, _, plain_stats, _ = drive(task, METHOD.replace(sync=rule), rounds=1)
    _, _, coded_stats, _ = drive(task, METHOD.replace(sync=rule, codec=codecs.ternary()), rounds=1)
    assert plain_stats[0].sync["drift"] == coded_stats[0].sync["drift"]
    assert coded_stats[0].sync["variance"] <= plain_stats[0].sync["looks"][0]["estimate"] * 1.5


def test_lost_and_bad_clients_leave_the_threshold_alone():
    """A client that diverges, and an upload that is lost: both drop out of S and of the mean drift."""
    task = make_task()
    rule = fda(theta=plain(), max_blocks=3)
    lost = lambda round, i: i == 3  # noqa: E731
    _, _, stats, _ = drive(task, METHOD.replace(sync=rule, participation=participation.all()), rounds=3, lose=lost)
    for stat in stats:
        assert stat.left_out == {3: "no answer"}
        kept = [i for i in range(8) if i != 3]
        share = task.train.sizes[kept].double() / task.train.sizes[kept].sum()
        assert stat.sync["variance"] == pytest.approx(
            float(share @ torch.tensor(stat.sync["drift"])[kept].double()), rel=1e-6
        )


class Fragile(nn.Module):
    """Breaks where an input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x) / (x[:, :1].abs() < 1e6)


@pytest.mark.parametrize(
    "rule", [fda(), fda(theta=plain(), max_blocks=4), fda(monitor="local")], ids=["ours", "plain", "local"]
)
def test_a_client_that_is_not_finite_stops_nobody(rule):
    data = make_federation()
    data.train.fields["input"][int(data.train.rows[0])] = 1e9  # the first client's only sample
    task = Task(Fragile, data).build(0)
    _, _, stats, _ = drive(task, METHOD.replace(sync=rule, participation=participation.all()), rounds=4)
    for stat in stats:
        assert set(stat.left_out) == {0}
        assert stat.sync["drift"][0] is None and math.isfinite(stat.sync["variance"])
    assert max(blocks(stats)) > 1


@pytest.mark.parametrize("monitor", ["linear", "sketch", "exact"])
def test_a_cohort_of_one_has_no_variance(monitor):
    method = METHOD.replace(participation=participation.uniform(count=1), sync=fda(monitor=monitor))
    with pytest.raises(MethodError, match='use monitor = "naive", or draw at least 2 clients'):
        drive(make_task(), method, rounds=1)


@pytest.mark.parametrize("monitor", ["naive", "local"])
def test_a_cohort_of_one_with_a_bound(monitor):
    method = METHOD.replace(participation=participation.uniform(count=1), sync=fda(monitor=monitor))
    _, _, stats, _ = drive(make_task(), method, rounds=3)
    assert all(math.isfinite(n) for n in blocks(stats))


@pytest.mark.parametrize("name", RULES)
def test_resumed_is_bit_identical(tmp_path, name):
    def experiment(rounds):
        method = METHOD.replace(sync=RULES[name], server=server.adam(lr=0.05))
        return Experiment(Task(lambda: Net(dropout=0.2), make_federation()), method, rounds=rounds)

    whole = taciturn.run(experiment(6), out=tmp_path / "whole")
    taciturn.run(experiment(3), out=tmp_path / "cut")
    cut = taciturn.run(experiment(6), out=tmp_path / "cut", resume=True)
    names = ("loss", "steps", "sync", "bytes_up", "bytes_down", "metrics")
    for one, other in zip(whole.history, cut.history, strict=True):
        assert all(one[name] == other[name] for name in names)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "cut/model.safetensors").read_bytes()


# -------------------------------------------------------------------------------------------------------------- price


def test_dear_messages_mean_longer_rounds():
    task, found = make_task(), {}
    for crossing in (0.2, 1.0, 5.0):
        price = fleet.Price.crossing(crossing, model_bytes=4 * 83, epoch_steps=5)
        _, _, stats, _ = drive(task, METHOD.replace(sync=fda(price=price)), rounds=3)
        found[crossing] = sum(blocks(stats))
    assert 3 * found[0.2] < 2 * found[1.0] < found[5.0]


def test_a_codec_that_saves_bytes_shortens_rounds():
    """The price of a round is that of the bytes it sends: a fifth of them is worth less local work."""
    task = make_task()
    _, _, dense, _ = drive(task, METHOD.replace(sync=fda()), rounds=4)
    lean = {"codec": codecs.top_k(share=0.02), "broadcast": Broadcast(codecs.quantize4())}
    _, _, sparse, _ = drive(task, METHOD.replace(sync=fda(), **lean), rounds=4)
    assert sparse[-1].sync["rho"] < 0.8 * dense[-1].sync["rho"]
    assert sum(blocks(sparse)[1:]) < sum(blocks(dense)[1:])


def test_without_a_price_sending_the_model_costs_five_epochs():
    _, _, stats, _ = drive(make_task(), METHOD.replace(sync=fda()), rounds=2)
    assert 10 < stats[-1].sync["rho"] < 18  # there and back, and frames on a model of 83 values
    _, _, dear, _ = drive(make_task(), METHOD.replace(sync=fda(crossing=50.0)), rounds=2)
    assert dear[0].sync["rho"] == pytest.approx(10 * stats[0].sync["rho"], rel=0.1)  # a longer round looks more often


@pytest.mark.parametrize("monitor", ["naive", "local"])
def test_the_step_is_measured_in_the_first_round_and_kept(monitor):
    rule = fda(monitor=monitor, price=fleet.Price(up=1e5, down=1e5, latency=0.001), max_blocks=6)
    _, _, stats, _ = drive(make_task(), METHOD.replace(sync=rule), rounds=3)
    seconds = [stat.sync["price"]["step_seconds"] for stat in stats]
    assert 0 < seconds[0] < 1 and seconds[0] == seconds[1] == seconds[2]
    assert all(math.isfinite(stat.sync["rho"]) and 0 < stat.sync["blocks"] <= 6 for stat in stats)


def test_adaptive_is_the_default_and_published_is_published():
    assert fda() == fda(monitor="naive", theta=adaptive())
    assert fda.published(max_blocks=10) == fda(monitor="sketch", theta=plain(), max_blocks=10, pace="longest")
    assert fda.published().most == 10 and (fda().rows, fda().columns) == (3, 500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"monitor": "nave"}, "there is no monitor 'nave'.*naive"),
        ({"max_blocks": 0}, "max_blocks: at least 1; got 0"),
        ({"block": 0.0}, "block: local epochs, above 0; got 0.0"),
        ({"crossing": 0.0}, "crossing: local epochs, above 0; got 0.0"),
        ({"rows": 0}, "rows: at least 1; got 0"),
        ({"columns": 40_000}, "columns: 1 to 32768; got 40000"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises((ConfigError, UnknownName), match=message):
        fda(**options)
