"""Differential privacy: what leaves is short, noise is as wide as said, the account is the library's, and what would break
the guarantee is refused.

Symbols: C norm; z noise; q rate; m count; T rounds; d values.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taciturn
from conftest import Net, make_federation, make_task
from drive import agree, drive
from engines.fake_line import line_of, sites_of
from taciturn import Experiment, Method, Task, aggregation, codecs, methods, participation, precision, solvers, sync
from taciturn.codecs import clip
from taciturn.core import random, secret
from taciturn.core.errors import ConfigError, MethodError
from taciturn.core.types import Block
from taciturn.core.vector import Layout
from taciturn.experiment import config, privacy
from taciturn.experiment.deployed import site_of

RDP = pytest.importorskip("opacus.accountants").RDPAccountant
SGD = solvers.sgd(lr=0.5)
CENTRAL = Method(
    aggregator=aggregation.private(norm=0.3, noise=0.8, rate=0.5, delta=1e-3), participation=participation.poisson(0.5),
    solver=SGD, batch_size=8,
)  # fmt: skip
CLIENTS = Method(
    codec=clip(codecs.quantize8(), norm=0.3, noise=1.0, count=4, delta=1e-3), aggregator=aggregation.mean(),
    participation=participation.uniform(count=4), solver=SGD, batch_size=8,
)  # fmt: skip
METHODS = {
    "central": CENTRAL,
    "central, clipped before 4 bits with a memory": CENTRAL.replace(
        codec=clip(codecs.error_feedback(codecs.quantize4()), norm=0.3)
    ),
    "clients": CLIENTS,
}
BAD = st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, 0.0, 1.0, 123.0])


def sent(codec, u, key=0):
    layout = Layout.flat(len(u))
    payload, _ = codec.encode(u, codec.init(layout)[0], random.key(key), layout=layout, knobs={})
    return codec.decode(payload, codec.init(layout)[1], layout=layout)[0]


# ------------------------------------------------------------------------------------------------ lengths and widths


@settings(max_examples=200)
@given(st.lists(BAD, min_size=1, max_size=40), st.floats(0.01, 100.0))
def test_what_leaves_is_no_longer_than_said(values, norm):
    """Whatever the update; with noise one that is not finite counts 0, without it is refused."""
    u = torch.tensor(values)
    got = sent(clip(norm=norm), u)
    if torch.isfinite(u).all():
        assert float(got.double().norm()) <= norm * (1 + 1e-6)
        if float(u.double().norm()) <= norm:
            assert torch.equal(got, u)
    else:
        assert not torch.isfinite(got).any()
    noisy, alone = (sent(clip(norm=norm, noise=1.0), v) for v in (u, torch.zeros(len(u))))
    assert float((noisy.double() - alone.double()).norm()) <= norm * (1 + 1e-5) and torch.isfinite(noisy).all()


@settings(max_examples=50)
@given(st.lists(st.lists(BAD.filter(math.isfinite), min_size=5, max_size=5), min_size=1, max_size=4))
def test_a_sum_depends_on_one_client_by_at_most_the_norm(rows):
    part, x = aggregation.private(norm=0.7, rate=0.25), torch.zeros(5)
    updates, m = torch.tensor(rows), len(rows)

    def found(weights):
        block = Block(torch.arange(m), updates, updates, weights, Layout.flat(5), {}, torch.zeros(m))
        return part.add(part.start(part.init(x, torch.ones(8)), x), block)[0]

    for i in range(m):
        without = torch.ones(m)
        without[i] = 0
        assert float((found(torch.ones(m)) - found(without)).norm()) <= 0.7 * (1 + 1e-6)


@pytest.mark.parametrize("hidden", [False, True], ids=["seed", "secret"])
def test_noise_is_as_wide_as_said_and_new_in_each_round(hidden):
    d, part = 20_000, aggregation.private(norm=2.0, noise=1.5, rate=0.5, secret=hidden)
    state, draws = part.init(torch.zeros(d), torch.ones(10)), []
    for _ in range(2):
        change, state = part.finish(part.start(state, torch.zeros(d)))
        draws.append(change.update)
    wide = 2.0 * 1.5 / (0.5 * 10)
    for one in draws:
        assert abs(float(one.std()) / wide - 1) < 4 / math.sqrt(2 * d) and abs(float(one.mean())) < 4 * wide / math.sqrt(d)
    assert abs(float(torch.corrcoef(torch.stack(draws))[0, 1])) < 4 / math.sqrt(d) and int(state["drawn"]) == 2
    codec = clip(norm=2.0, noise=1.5, count=9, secret=hidden)
    one, other = sent(codec, torch.zeros(d), 1), sent(codec, torch.zeros(d), 2)
    assert abs(float(one.std()) / (2.0 * 1.5 / 3) - 1) < 4 / math.sqrt(2 * d)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 4 / math.sqrt(d)
    assert torch.equal(sent(codec, torch.zeros(d), 1), one) != hidden, "a key repeats it, and the operating system does not"


def test_secret_draws_are_uniform():
    u = secret.uniform(40_000)
    assert float(u.min()) >= 0 and float(u.max()) < 1 and abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * 40_000)
    assert len(secret.uniform(0)) == 0 and not torch.equal(u, secret.uniform(40_000))


def test_poisson_draws_each_client_alone():
    rule, everyone = participation.poisson(rate=0.3), torch.ones(2000, dtype=torch.bool)
    ids = [rule.draw(r, random.fold(random.key(0), r), everyone) for r in range(30)]
    counts = torch.tensor([float(len(one)) for one in ids])
    assert abs(float(counts.mean()) - 600) < 4 * math.sqrt(420 / 30) and 10 < float(counts.std()) < 32  # sqrt(420) = 20
    hidden = participation.poisson(rate=0.3, secret=True)
    assert not torch.equal(*(hidden.draw(0, random.key(0), everyone)[:50] for _ in range(2)))


# ----------------------------------------------------------------------------------------------------------- the account


@pytest.mark.parametrize(
    ("z", "q", "rounds", "delta"), [(1.0, 0.1, 100, 1e-5), (2.0, 1.0, 10, 1e-6), (0.7, 0.02, 500, 1e-4)]
)
def test_epsilon_is_the_librarys(z, q, rounds, delta):
    theirs = RDP()
    for _ in range(rounds):
        theirs.step(noise_multiplier=z, sample_rate=q)
    orders = list(privacy.ORDERS)
    assert privacy.epsilon(((z, q, rounds),), delta) == theirs.get_epsilon(delta, alphas=orders)
    assert privacy.epsilon(((z, q, rounds),), delta) <= theirs.get_epsilon(delta) * (1 + 1e-12), "more orders, no worse"
    assert privacy.guarded(((z, q, rounds),), delta, 10_000) == pytest.approx(theirs.get_epsilon(delta, alphas=orders))


def test_a_gaussian_mechanism_costs_what_theory_says():
    """q = 1, T rounds: RDP a T / (2 z^2); the exact epsilon is below, and the bound close to it."""
    z, delta, rounds = 2.0, 1e-5, 4
    mu = math.sqrt(rounds) / z

    def exact(eps):
        phi = torch.distributions.Normal(0.0, 1.0).cdf
        return float(
            phi(torch.tensor(mu / 2 - eps / mu).double()) - math.exp(eps) * phi(torch.tensor(-mu / 2 - eps / mu).double())
        )

    found = privacy.epsilon(((z, 1.0, rounds),), delta)
    assert exact(found) <= delta <= exact(0.85 * found)


def test_epsilon_grows_with_rounds_and_rate_and_falls_with_noise():
    at = [privacy.epsilon(((1.0, 0.1, rounds),), 1e-5) for rounds in (1, 10, 100)]
    by_rate = [privacy.epsilon(((1.0, q, 10),), 1e-5) for q in (0.01, 0.1, 1.0)]
    by_noise = [privacy.epsilon(((z, 0.1, 10),), 1e-5) for z in (4.0, 1.0, 0.5)]
    for values in (at, by_rate, by_noise):
        assert values == sorted(values) and len(set(values)) == 3
    assert privacy.epsilon(((0.0, 1.0, 1),), 1e-5) == math.inf and privacy.epsilon((), 1e-5) == 0.0


def test_what_is_kept_for_empty_draws():
    """A sampling that often draws nobody gives no guarantee; one that hardly does costs a little more."""
    spent = ((1.0, 0.1, 10),)
    plain = privacy.epsilon(spent, 1e-3)
    assert privacy.guarded(spent, 1e-3, 10) == math.inf
    assert plain < privacy.guarded(spent, 1e-3, 150) < 1.1 * plain
    assert privacy.guarded(spent, 1e-3, 10**6) == plain


def experiment(method, rounds=3, **fields):
    return Experiment(Task(Net, make_federation()), method, rounds=rounds, **fields)


def test_the_record_says_what_was_spent(tmp_path):
    """Lost clients change nothing at a server that adds the noise, and take noise away where clients add it."""
    result = taciturn.run(
        experiment(CENTRAL.replace(participation=participation.all(), aggregator=aggregation.private(norm=0.3, delta=1e-3)))
    )
    for rounds, line in enumerate(result.history, 1):
        assert (
            line["privacy"]["epsilon"] == privacy.epsilon(((1.0, 1.0, rounds),), 1e-3) and line["privacy"]["delta"] == 1e-3
        )
    assert result.summary["epsilon"] == result.history[-1]["privacy"]["epsilon"]
    found = []
    for lose in (lambda r, i: False, lambda r, i: i % 2 == 0):
        line = taciturn.run(experiment(CLIENTS), lose=lose).history[-1]
        kept = [4 - len(one) for one in _lost(CLIENTS, lose)]
        told = line["privacy"]
        assert told["epsilon"] == pytest.approx(privacy.epsilon(tuple((math.sqrt(k / 4), 1.0, 1) for k in kept), 1e-3))
        assert told["epsilon_message"] == privacy.epsilon(((0.5, 1.0, 3),), 1e-3) > told["epsilon"] / 2
        assert line["loss"] == 0.0 and line["traffic"]["by_kind"].keys().isdisjoint({"up/evaluate"})
        found.append(told["epsilon"])
    assert found[1] > found[0]


def _lost(method, lose):
    """Of each of three rounds the clients that are lost."""
    lines = taciturn.run(experiment(method), lose=lose).history
    return [line["left_out"] for line in lines]


def test_a_resumed_simulation_spends_alike_and_secret_runs_count_what_was_released(tmp_path):
    short, whole = (experiment(CENTRAL, rounds=rounds) for rounds in (2, 4))
    taciturn.run(short, out=tmp_path / "a")
    resumed, straight = taciturn.run(whole, out=tmp_path / "a", resume=True), taciturn.run(whole)
    assert [line["privacy"] for line in resumed.history] == [line["privacy"] for line in straight.history]
    hidden = [one.replace(method=CENTRAL.secret()) for one in (short, whole)]
    first = taciturn.run(hidden[0], out=tmp_path / "b")
    assert not torch.equal(first.tensors["stem.weight"], taciturn.run(hidden[0]).tensors["stem.weight"])
    lines = (tmp_path / "b" / "record.jsonl").read_text().splitlines()
    for path in (tmp_path / "b").glob("checkpoint-*2*"):  # the newest checkpoint is lost: the second round is done again
        path.unlink()
    assert len(lines) == 2
    again = taciturn.run(hidden[1], out=tmp_path / "b", resume=True)
    assert again.history[-1]["privacy"]["spent"] == [[0.8, 0.5, 5]], "four rounds, one of them twice"
    kept = json.loads((tmp_path / "b" / privacy.FILE).read_text())
    assert kept["spent"] == [[0.8, 0.5, 5]]


# ------------------------------------------------------------------------------------------------------------- the engines


@pytest.mark.parametrize("name", METHODS)
def test_engines_agree(name):
    agree(make_task(), METHODS[name], block=3)


@pytest.mark.parametrize("name", ["central", "clients"])
def test_sites_agree_and_toml_holds_it(tmp_path, name):
    task, method = make_task(), METHODS[name]
    sites = sites_of(line_of(task, method, tmp_path), method)
    flown = drive(task, method, "flower", rounds=2, sites=lambda *_: sites)
    assert torch.equal(flown[0].x, drive(task, method, "loopback", rounds=2)[0].x)
    whole = taciturn.recipe("quickstart").replace(method=method)
    assert config.from_table(config.to_table(whole)) == whole


def test_a_deployed_run_draws_from_the_operating_system(tmp_path):
    """At the server and at the site, whatever the TOML says; two runs differ, and no key of the run gives the noise."""
    whole = experiment(CLIENTS, rounds=1)
    assert site_of(whole, tmp_path / "site").work.codec.secret
    found = []
    for name, method in (("a", CENTRAL), ("b", CENTRAL), ("c", CLIENTS), ("d", CLIENTS)):
        site = site_of(experiment(method, rounds=1), tmp_path / name)
        line = line_of(site.work.task, method, tmp_path / name)
        line.site = type(site)(site.work, site.method, site.key, site.folder, "exp", site.facts)
        result = taciturn.run(
            experiment(method, rounds=1, engine="flower"),
            sites=lambda work, rule, line=line, method=method: sites_of(line, method),
        )
        found.append(result.tensors["stem.weight"])
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[2], found[3])


# ---------------------------------------------------------------------------------------------------------- what is refused


PRIVATE = aggregation.private(norm=0.3)
NOISY = clip(norm=0.3, noise=1.0)
REFUSED = {
    "looks": (CENTRAL, {"sync": sync.fda()}, "sync = every"),
    "looks, local": (CLIENTS, {"sync": sync.fda(monitor="local")}, "sync = every"),
    "steps of the longest": (CENTRAL, {"sync": sync.every(pace="longest")}, "pace"),
    "labels": (CENTRAL, {"precision": precision.coarse()}, "coarse"),
    "measurements": (CLIENTS, {"precision": precision.coarse_fine()}, "coarse_fine"),
    "a memory around the noise": (CLIENTS, {"codec": codecs.error_feedback(NOISY)}, "outermost"),
    "a difference of it": (CLIENTS, {"codec": codecs.difference(NOISY, alpha=1.0)}, "outermost"),
    "clip within lossless": (CLIENTS, {"codec": codecs.lossless(NOISY)}, "outermost"),
    "noise twice": (CENTRAL, {"codec": NOISY}, "both add noise"),
    "weights by samples": (CLIENTS, {"aggregator": aggregation.weighted()}, "counts the same"),
    "another aggregator": (CLIENTS, {"aggregator": aggregation.nova()}, "counts the same"),
    "a cohort of fixed size": (CENTRAL, {"participation": participation.uniform(count=4)}, "no other sampling"),
    "another rate": (CENTRAL, {"participation": participation.poisson(0.2)}, "no other sampling"),
    "all, and a rate": (CENTRAL, {"participation": participation.all()}, "no other sampling"),
    "available": (CENTRAL, {"participation": participation.available(count=3)}, "no other sampling"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_breaks_the_guarantee_is_refused(what):
    method, parts, said = REFUSED[what]
    with pytest.raises(MethodError, match=said):
        method.replace(**parts)


def test_other_halves_and_lean_are_refused():
    for solver in (solvers.admm(), solvers.scaffold()):
        with pytest.raises(MethodError):
            CENTRAL.replace(solver=solver)
    with pytest.raises(MethodError, match="sync = every"):
        Method.lean(CLIENTS)
    assert CLIENTS.encoded(codecs.quantize4()).codec == clip(codecs.quantize4(), norm=0.3, noise=1.0, count=4, delta=1e-3)


def test_what_an_experiment_would_tell_is_refused():
    from taciturn.experiment.experiment import StopAt

    personal = methods.fedsim(u=SGD).replace(codec=NOISY, aggregator=aggregation.mean())
    with pytest.raises(ConfigError, match="evaluates on clients"):
        taciturn.run(experiment(personal))
    with pytest.raises(ConfigError, match="evaluates on clients"):
        taciturn.run(experiment(CLIENTS, evaluate_clients_every=1))
    with pytest.raises(ConfigError, match=r"stop_at\.metric"):
        central = methods.fedsim(u=SGD).replace(aggregator=PRIVATE)
        taciturn.run(experiment(central, stop_at=StopAt(metric=0.5)))
    with pytest.raises(ConfigError, match="one client at a time"):
        taciturn.run(experiment(CLIENTS.secret()))


def test_without_the_library_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    privacy._epsilon.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'taciturn\[dp\]'"):
        taciturn.run(experiment(CENTRAL))
    privacy._epsilon.cache_clear()
