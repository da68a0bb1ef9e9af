"""Forecasts: closed forms on Gaussian least squares, invariances, memory, and the recursion against simulation."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from advisor.toys import experiment, keep, least_squares, thin
from taciturn import codecs
from taciturn.advisor import Budget, forecasts, law_of, run_pilot
from taciturn.advisor.curvature import Dense
from taciturn.advisor.horizon import Field, Terrain, at, losses, reached
from taciturn.advisor.law import law_of as law
from taciturn.advisor.rank import added, memory_factor, memory_gain, memory_of, unpredicted
from taciturn.core import random

D = 8
H = torch.diag(1 / torch.arange(1.0, D + 1, dtype=torch.float64))
Q = torch.linalg.qr(random.normal(random.key(11), D, D))[0].double()


@lru_cache
def base(d=D):
    task, _ = least_squares(d=d)
    return run_pilot(experiment(task), rounds=1, messages=24)


def gaussian(h, n=1200, clients=4, seed=0, mean=0.0):
    """A pilot whose messages are -gamma times gradients at the optimum of least squares, N(0, H) inputs, noise 1."""
    root = torch.linalg.cholesky(h)
    key = random.key(seed)
    x = random.normal(random.fold(key, "x"), n, len(h)).double() @ root.T
    g = x * random.normal(random.fold(key, "e"), n, 1).double()
    g = g - g.mean(0) + mean
    client = torch.arange(n) % clients
    for i in range(clients):
        g[client == i] -= g[client == i].mean(0) - mean
    weights = torch.full((clients,), 1 / clients, dtype=torch.float64)
    return replace(
        base(), messages=(-0.05 * g).float(), client=client, weights=weights, gamma=0.05, steps=1.0, cohort=4.0,
        share=1.0, cohort_clients=4, whole=True, curve=torch.ones(2, dtype=torch.float64),
    )  # fmt: skip


def ratios(pilot, h, chosen, rounds=10**9):
    known = law(pilot, basis=Dense.of(h))
    rows = forecasts(known, chosen, Budget(1e6), base=codecs.identity(), target_rounds=rounds, factors=(1.0,))
    plain = 4 * D + pilot.overhead
    return {row.name: [value * plain / row.bytes for value in (row.ratio, row.ratio_low, row.ratio_high)] for row in rows}


@pytest.mark.parametrize("basis", [torch.eye(D, dtype=torch.float64), Q], ids=["diagonal", "rotated"])
def test_traces_are_the_closed_forms(basis):
    h = basis @ H @ basis.T
    pilot, inverse = gaussian(h), torch.linalg.inv(h)
    chosen = {
        "sparsify": codecs.sparsify(p=0.25),
        "rand_k": codecs.rand_k(k=2),
        "sketch": codecs.sketch(h=2),
        "qsgd": codecs.qsgd(),
    }
    got = ratios(pilot, h, chosen)
    scattered = float((h.diagonal() * inverse.diagonal()).sum())
    p1, p2 = 2 / D, 1 / (D - 1)
    a, b = 2 * 4 / (D * (D + 2)), 2 * (D - 2) / (D * (D - 1) * (D + 2))
    big = random.normal(random.key(77), 200_000, D).double() @ torch.linalg.cholesky(h).T
    norms = big.norm(dim=1, keepdim=True)
    wanted = {
        "sparsify": D + 3 * scattered,
        "rand_k": (p2 * D + (1 - p2) * scattered) / p1,
        "sketch": (D / 2) ** 2 * ((a - b) * D + b * float(h.trace() * inverse.trace())),
        "qsgd": D - scattered + float(((norms * big.abs()).mean(0) * inverse.diagonal()).sum()),
    }
    for name, value in wanted.items():
        middle, low, high = got[name]
        assert low * 0.97 < value / D < high * 1.03, name
        assert middle == pytest.approx(value / D, rel=0.12), name


@pytest.mark.parametrize("p", [0.9, 0.5, 0.1])
def test_partial_participation_is_neutral_whatever_p(p):
    """Per byte p cancels where clients' means vanish; with a mean at each client the way there costs more."""
    h = Q @ H @ Q.T
    assert p * ratios(gaussian(h), h, {"pp": keep(p)})["pp"][0] == pytest.approx(1, rel=4e-3)  # 1 / R
    shifted = gaussian(h)
    apart = torch.where(shifted.client % 2 == 0, 1.0, -1.0).unsqueeze(1) * 0.05
    unlike = replace(shifted, messages=shifted.messages + apart)
    assert p * ratios(unlike, h, {"pp": keep(p)})["pp"][0] > 1.01


def test_rotations_and_rescaling():
    pilot, turned = gaussian(H), gaussian(H)
    turned = replace(turned, messages=(pilot.messages.double() @ Q.T).float())
    chosen = {"sketch": codecs.sketch(h=2), "pp": keep(0.5), "sparsify": codecs.sparsify(p=0.25)}
    here, there = ratios(pilot, H, chosen), ratios(turned, Q @ H @ Q.T, chosen)
    for name in ("sketch", "pp"):
        assert here[name][0] == pytest.approx(there[name][0], rel=1e-3)
    assert there["sparsify"][0] > 1.2 * here["sparsify"][0]
    scale = torch.linspace(0.5, 3.0, D, dtype=torch.float64)
    wide = replace(turned, messages=(turned.messages.double() * scale).float())
    h = scale.unsqueeze(1) * (Q @ H @ Q.T) * scale
    again = ratios(wide, h, chosen)
    assert again["sparsify"][0] == pytest.approx(there["sparsify"][0], rel=1e-3)
    assert again["sketch"][0] != pytest.approx(there["sketch"][0], rel=1e-2)


def test_what_a_codec_says_is_checked_against_its_draws():
    pilot = gaussian(H, n=400)
    basis, u = Dense.of(H), pilot.messages
    honest, how = added(thin(0.25), u, pilot, basis, random.key(0))
    silent, drawn = added(thin(0.25, told=False), u, pilot, basis, random.key(0))
    _, doubted = added(thin(0.25, scale=2.0), u, pilot, basis, random.key(0))
    assert how == "conditional variance" and drawn == doubted == "800 draws"
    torch.testing.assert_close(silent.mean(0), honest.mean(0), rtol=0.35, atol=0)
    closed, told = added(codecs.sparsify(p=0.25), u, pilot, basis, random.key(0))
    torch.testing.assert_close(closed, honest)
    assert told == "closed form"


def test_biased_codecs_are_told_apart():
    pilot = gaussian(H)
    assert unpredicted(codecs.identity(), pilot, random.key(0)) == unpredicted(codecs.cast(), pilot, random.key(0)) == ""
    assert "biased" in unpredicted(codecs.top_k(share=0.25), pilot, random.key(0))
    rows = forecasts(
        law(pilot, basis=Dense.of(H)),
        {"top_k": codecs.top_k(share=0.25)},
        Budget(1e5),
        base=codecs.identity(),
        target_rounds=9,
    )
    assert rows[0].why and rows[0].loss != rows[0].loss and rows[0].rounds > 0


def test_memory_factor():
    for omega in (0.5, 3.0, 40.0):
        assert memory_factor(1 / (2 * (1 + omega)), omega) == pytest.approx(4 / 3)
        assert memory_factor(1e-6, omega) == pytest.approx(1, abs=1e-3)
    assert memory_factor(1.0, 3.0) == float("inf") and memory_factor(0.1, 0.0) == 1
    assert memory_of(codecs.difference(codecs.sparsify(p=0.5)), 10) == (codecs.sparsify(p=0.5), 0.25)
    assert memory_of(codecs.identity(), 10) is None


@pytest.mark.parametrize(("shift", "batch", "pays"), [(3.0, 60, True), (0.0, 4, False)])
def test_memory_pays_for_unlike_clients_with_full_gradients_and_harms_alike_ones(shift, batch, pays):
    task, _ = least_squares(d=6, clients=6, samples=60, shift=shift)
    known = law_of(run_pilot(experiment(task, batch=batch), rounds=20, messages=240))
    gain = memory_gain(known, codecs.sparsify(p=0.25), 1 / 8)
    assert bool((gain < 0.2).all()) if pays else bool((gain > 1.05).all())
    assert (known.rho > 50) if pays else (known.rho < 0.1)


def test_rho_is_not_fooled_by_the_noise_of_means():
    """Ten messages a client, alike clients: the plain estimate is near 1/10."""
    task, _ = least_squares(d=6, clients=20, samples=400)
    known = law_of(run_pilot(experiment(task, batch=4), rounds=2, messages=200))
    assert known.rho < 0.05


# ------------------------------------------------------------------------------------------------------------ horizon


def flat(value, k=3):
    return torch.full((1, k), value, dtype=torch.float64)


def test_losses_are_the_recursion_and_the_recursion_is_what_happens():
    nodes = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    gamma, steps, s, rounds = 0.3, 3.0, 0.5, 60
    terrain = Terrain(nodes, gamma, steps, 0.0, 10.0)
    g = 1 - (1 - gamma * nodes) ** steps
    torch.testing.assert_close(terrain.contraction(nodes), g)
    start = torch.tensor([1.0, -2.0, 1.5], dtype=torch.float64)
    noise = torch.tensor([0.02, 0.05, 0.01], dtype=torch.float64)
    field = Field((g * start).square().unsqueeze(0), flat(0.0), noise.unsqueeze(0), flat(0.0))
    done, curve = losses(terrain, field, rounds, (s,))
    state = start.expand(20000, -1).clone()
    for k in range(rounds):
        draws = random.normal(random.key(k), 20000, 3).double() * noise.sqrt()
        state = state - s * (g * state + draws)
    excess = 0.5 * (nodes * state.square()).sum(1)
    wanted = 10.0 - 0.5 * float((nodes * start.square()).sum()) + float(excess.mean())
    assert float(at(done, curve, torch.tensor([float(rounds)]))[0, 0]) == pytest.approx(
        wanted, abs=4 * float(excess.std()) / 141
    )


def test_noise_that_grows_with_the_signal_diverges_at_long_steps():
    nodes = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    terrain = Terrain(nodes, 0.5, 1.0, 0.0, 10.0)
    signal = terrain.contraction(nodes).square().unsqueeze(0)
    field = Field(signal, flat(0.0), flat(0.0), 8 * signal)
    done, curve = losses(terrain, field, 300, (1.0, 0.1))
    final = at(done, curve, torch.tensor([300.0, 300.0]))[0]
    assert final[0] > 1e3 and final[1] < 10 - 0.5 * 1.7 + 0.05
    assert torch.isinf(reached(done, curve, 9.2)[0, 0]) and 10 < float(reached(done, curve, 9.2)[0, 1]) < 300


def test_the_quadratic_never_promises_more_than_the_loss():
    nodes = torch.tensor([1e-6, 0.5, 1.0], dtype=torch.float64)
    terrain = Terrain(nodes, 0.1, 1.0, 0.0, 1.0)
    field = Field(flat(1e-4), flat(0.0), flat(0.0), flat(0.0))
    assert float(terrain.raised(field.signal)) > 0
    _, curve = losses(terrain, field, 10**6, (1.0, 2.0))
    assert float(curve.min()) > -1e-6
    assert float(Terrain(nodes, 0.1, 1.0, 0.0, 1e6).raised(field.signal)) == 0
