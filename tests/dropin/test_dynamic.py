"""FDA around Flower's strategies: rounds that end by drift, with taciturn's own rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dropin.nodes import COUNTER, grid_of, moved, numpy_of, ordered, random_model, same
from taciturn import codecs, sync
from taciturn.core.errors import ConfigError
from taciturn.core.price import Price
from taciturn.core.types import OK, Change, Observations, Plan, Spent
from taciturn.flower import Compressed, FdaOpt, Ledgered, compress_mod, fda_mod, ledger_mod
from taciturn.flower.accounts import totals_of
from taciturn.sync import thresholds

strategies = pytest.importorskip("flwr.serverapp.strategy")
used = ordered
SETTINGS = {"min_train_nodes": 3, "min_evaluate_nodes": 3, "min_available_nodes": 3}
NAMES = ["FedAvg", "FedAvgM", "FedAdam", "FedMedian"]


def strategy(name: str = "FedAvg", **more):
    return getattr(strategies, name)(**SETTINGS | more)


def rule(monitor="local", theta=None, **more):
    return sync.fda(monitor=monitor, theta=theta or thresholds.plain(), **more)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("monitor", ["local", "naive"])
def test_with_theta_0_a_round_is_one_block_and_the_strategy_the_plain_one(name, monitor):
    plain, wrapped = grid_of(), grid_of(fda_mod())
    a = strategy(name).start(plain, random_model(), num_rounds=3)
    one = FdaOpt(strategy(name), rule(monitor, thresholds.fixed(0.0)))
    b = one.start(wrapped, random_model(), num_rounds=3)
    assert not wrapped.errors() and same(a.arrays, b.arrays)
    assert a.train_metrics_clientapp == b.train_metrics_clientapp
    assert [told["blocks"] for told in one.told] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("monitor", ["local", "naive"])
def test_without_a_bound_on_drift_a_round_is_max_blocks_of_the_train_function(monitor):
    def many(node, x):
        for _ in range(4):
            x = moved(node, x)
        return x

    plain, wrapped = grid_of(train=many), grid_of(fda_mod())
    a = strategy().start(plain, random_model(), num_rounds=3)
    b = FdaOpt(strategy(), rule(monitor, thresholds.fixed(1e9), max_blocks=4)).start(wrapped, random_model(), num_rounds=3)
    assert not wrapped.errors() and same(a.arrays, b.arrays)


def drift(y, x) -> torch.Tensor:
    names = sorted(name for name in x if np.issubdtype(y[name].dtype, np.floating))
    return torch.cat([torch.from_numpy(np.asarray(y[n] - x[n])).flatten().float() for n in names])


RULES = [("local", thresholds.plain()), ("local", thresholds.power(0.5)), ("local", thresholds.adaptive())]
RULES += [("naive", thresholds.ema(0.5)), ("naive", thresholds.adaptive())]


@pytest.mark.parametrize(("monitor", "theta"), RULES)
def test_blocks_and_thresholds_are_those_of_the_rule_in_a_naked_loop(theta, monitor):
    price = Price(step_seconds=1.0, up=1e30, down=1e30, latency=4.0)  # bytes cost nothing, round trips do
    mine, x = rule(monitor, theta, max_blocks=6, price=price), numpy_of(random_model())
    one, grid = FdaOpt(strategy(), mine), grid_of(fda_mod())
    seen: list[int] = []
    found = one.start(grid, random_model(), num_rounds=5)
    state, told = mine.init(torch.zeros(54)), []
    for t in range(5):
        state, x, blocks = naked_round(mine, state, x, t)
        seen.append(blocks)
        told.append(mine.tell(state))
    assert all(np.array_equal(numpy_of(found.arrays)[n], x[n]) for n in x)
    assert [line["blocks"] for line in one.told] == [line["blocks"] for line in told] and max(max(b) for b in seen) > 1
    assert [line["drift"] for line in one.told] == [line["drift"] for line in told]
    assert [line["next"] for line in one.told] == [line["next"] for line in told]


def naked_round(mine, state, x, t):
    """One round of FedAvg by the rule, client after client -> state, model, blocks of each."""
    epoch = torch.ones(3, dtype=torch.int64)
    limit, stride = mine.schedule(epoch, state)
    y, blocks = dict.fromkeys((1, 2, 3), x), [0, 0, 0]
    weights = torch.tensor([11.0, 12.0, 13.0], dtype=torch.float64)
    norms, exchanges = torch.zeros(3, dtype=torch.float64), 1
    if mine.observer == "client":
        for i, node in enumerate((1, 2, 3)):
            while True:
                y[node], blocks[i] = moved(node, y[node]), blocks[i] + 1
                payload, go = mine.observe(drift(y[node], x), {}, mine.signal(state))
                if blocks[i] >= int(limit[0]) or not go:
                    break
            norms[i] = float(payload["norm"])
    else:
        plan, more = Plan(t, torch.arange(3), epoch, limit, torch.ones(3)), stride
        while more is not None:
            for i, node in enumerate((1, 2, 3)):
                for _ in range(int(more[i])):
                    y[node], blocks[i] = moved(node, y[node]), blocks[i] + 1
                norms[i] = float(mine.observe(drift(y[node], x), {}, {})[0]["norm"])
            exchanges += 1
            heard, done = torch.ones(3, dtype=torch.bool), torch.tensor(blocks)
            more, state = mine.watch(Observations({"norm": norms}, heard, done < limit, done, Spent()), plan, state)
            more = more if bool((done < limit).any()) else None
    plan = Plan(t, torch.arange(3), epoch, limit, weights)
    stats = {"norm": norms, "steps": torch.tensor(blocks).double(), "status": torch.full((3,), OK)}
    state = mine.update(state, plan, stats, Spent(exchanges=exchanges), Change(torch.zeros(0)))
    factors = [float(w / weights.sum()) for w in weights]
    mean = {n: y[1][n] * factors[0] for n in x}
    for factor, node in zip(factors[1:], (2, 3), strict=True):
        mean = {n: one + y[node][n] * factor for n, one in mean.items()}
    return state, {n: np.asarray(one) for n, one in mean.items()}, blocks


@pytest.mark.parametrize("monitor", ["local", "naive"])
def test_it_composes_with_codecs_and_the_ledger(monitor):
    """FDA and compression around FedAdam: the codec encodes once a round, however many blocks it has."""
    codec = codecs.error_feedback(codecs.top_k(share=0.3))
    mods = ledger_mod(), compress_mod(codec, codecs.quantize8()), fda_mod()
    grid, one = grid_of(*mods), FdaOpt(strategy("FedAdam"), rule(monitor, thresholds.fixed(2.0), max_blocks=5))
    outer = Ledgered(Compressed(one, codec, codecs.quantize8()))
    result = outer.start(grid, random_model(), num_rounds=4)
    assert not grid.errors() and len(one.told) == 4 and max(line["blocks"] for line in one.told) > 1
    assert outer.totals["up/update"]["messages"] == 12 and result.ledger == outer.totals
    for node in grid.clients:
        assert totals_of(grid.context(node))["up/update"]["messages"] == 4
    trained = [m for m in grid.came if m.metadata.message_type == "train" and m.content.array_records]
    assert all("taciturn/update" in m.content["arrays"] for m in trained) and len(trained) == 12
    looks = outer.totals.get("up/monitor", {"messages": 0, "payload": 0})
    assert (looks["messages"] > 0) == (monitor == "naive") and looks["payload"] == 0


def test_lossless_codecs_change_nothing_of_it():
    settings = {"max_blocks": 5}
    for monitor in ("local", "naive"):
        one, two = (FdaOpt(strategy(), rule(monitor, thresholds.fixed(2.0), **settings)) for _ in range(2))
        plain, coded = grid_of(fda_mod()), grid_of(compress_mod(codecs.identity()), fda_mod())
        a = one.start(plain, random_model(), num_rounds=3)
        b = Compressed(two, codecs.identity()).start(coded, random_model(), num_rounds=3)
        assert same(a.arrays, b.arrays) and not coded.errors()


def test_a_node_that_fails_in_mid_round_is_left_out():
    calls = []

    def fails(node, x):
        calls.append(node)
        if node == 2 and calls.count(2) == 3:
            raise ValueError("the disk is full")
        return moved(node, x)

    for monitor in ("local", "naive"):
        calls.clear()
        one, grid = FdaOpt(strategy(), rule(monitor, thresholds.fixed(1e9), max_blocks=2)), grid_of(fda_mod(), train=fails)
        found = one.start(grid, random_model(), num_rounds=3)
        assert any("the disk is full" in error for error in grid.errors()) and len(one.told) == 3
        assert all(np.isfinite(array.numpy()).all() for array in found.arrays.values())


def test_a_price_that_is_measured_and_one_that_is_given():
    priced = sync.fda(monitor="local", price=Price(latency=6.5))
    one = FdaOpt(strategy(), priced)
    one.start(grid_of(fda_mod()), random_model(), num_rounds=2)
    assert one.told[0]["price"]["step_seconds"] > 0 and one.told[0]["rho"] > 1


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_client_without_the_mod_is_named():
    for monitor in ("local", "naive"):
        with pytest.raises(ConfigError, match=r"node 1 says nothing of its drift.*fda_mod\(\)"):
            FdaOpt(strategy(), rule(monitor)).start(grid_of(strict=False), random_model(), num_rounds=1)


def test_a_server_without_the_wrapper_is_named():
    grid = grid_of(fda_mod())
    strategy().start(grid, random_model(), num_rounds=1)
    assert len(grid.errors()) == 3 and all("FdaOpt(strategy)" in error for error in grid.errors())


def test_mods_in_the_wrong_order_are_named():
    grid = grid_of(fda_mod(), compress_mod(codecs.quantize4()))
    Compressed(FdaOpt(strategy()), codecs.quantize4()).start(grid, random_model(), num_rounds=1)
    assert all("fda_mod stands before compress_mod" in error for error in grid.errors()) and grid.errors()


@pytest.mark.parametrize("wrong", [sync.fda(monitor="sketch"), sync.fda(monitor="local", block=0.5)])
def test_rules_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ConfigError, match=r'FdaOpt.rule: monitor = "local" or "naive", and block = 1'):
        FdaOpt(strategy(), wrong)


def test_the_counter_counts_blocks():
    grid = grid_of(fda_mod())
    found = FdaOpt(strategy(), rule("local", thresholds.fixed(1e9), max_blocks=4)).start(grid, random_model(), num_rounds=1)
    assert found.arrays[COUNTER].numpy() == 7.0
