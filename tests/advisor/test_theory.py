"""The theory against itself: noise at the optimum, the recursion, its limits, and the bounds above it.

Symbols: as in `taciturn.advisor.theory`; d = 6 or 20 features.
"""

from __future__ import annotations

import math

import pytest
import torch

from drive import thinned
from taciturn import codecs
from taciturn.advisor import moments, problems, recursion, theory
from taciturn.advisor.draws import in_law, stabilized
from taciturn.advisor.problems import LeastSquares

BASES = {
    "diagonal": lambda d: problems.rotated(problems.spectrum(d, 1), "identity"),
    "rotated": lambda d: problems.rotated(problems.spectrum(d, 1), "haar"),
    "standardized": lambda d: problems.standardized(problems.rotated(problems.spectrum(d, 1), "haar")),
}


def draws(d: int) -> dict:
    p = 1 / (math.sqrt(d) + 1)
    h = max(1, int(d * p))
    chosen = {"none": codecs.identity(), "PP": codecs.partial(p=p), "sparsification": codecs.sparsify(p=p)}
    chosen |= {"rand-h": codecs.rand_k(k=h), "sketch": codecs.sketch(h=h)}
    return {name: in_law(codec) for name, codec in chosen.items()} | {"stabilized": stabilized()}


def c2_of(draw, d: int):
    return lambda moment: moments.linear(draw.linear_map(d), moment)


def shifted(d: int = 6, clients: int = 3, batch: int = 1, alike: bool = False) -> LeastSquares:
    """Clients with optima of their own, and features of their own unless alike."""
    one = problems.optimum_shift(BASES["rotated"](d), clients, 0.7, batch, scale=1.0, seed=3)
    if alike:
        return one
    own = torch.stack([problems.rotated(problems.spectrum(d, 0.5 + i), "haar", seed=i) for i in range(clients)])
    return LeastSquares(own, one.optima, 0.7, batch)


# ------------------------------------------------------------------------------------------------- noise at the optimum


def test_central_noise_is_c2_of_the_features():
    problem = problems.central(BASES["rotated"](6), sigma=1.5)
    for draw in draws(6).values():
        expected = 1.5**2 * moments.linear(draw.linear_map(6), problem.curvature)
        assert torch.allclose(theory.induced_noise(problem, c2_of(draw, 6)), expected)
    assert theory.asymptotic(theory.induced_noise(problem, lambda m: m), problem.curvature, 100) == pytest.approx(
        1.5**2 * 6 / 200
    )


@pytest.mark.parametrize("batch", [1, 4, 0])
def test_gradient_moments_are_those_of_gradients(batch):
    problem, n = shifted(batch=batch), 60_000
    generator = torch.Generator().manual_seed(0)
    for i, found in enumerate(theory.client_moments(problem)):
        root = torch.linalg.cholesky(problem.moments[i])
        if batch == 0:
            g = (problem.moments[i] @ problem.offsets[i]).unsqueeze(0)
            assert torch.allclose(g.T @ g, found)
            continue
        x = torch.randn(n // batch, batch, 6, dtype=torch.float64, generator=generator) @ root.T
        noise = problem.sigma * torch.randn(n // batch, batch, dtype=torch.float64, generator=generator)
        g = (x * (x @ problem.offsets[i] - noise).unsqueeze(-1)).mean(1)
        products = g.unsqueeze(2) * g.unsqueeze(1)
        z = (products.mean(0) - found) / (products.std(0) / math.sqrt(len(g)))
        assert float(z.abs().max()) < 4.5


def test_optima_of_a_federation():
    problem = shifted()
    pulled = sum(h @ (problem.optimum - w) for h, w in zip(problem.moments, problem.optima, strict=True))
    assert float(pulled.abs().max()) < 1e-10
    assert float(problem.excess(problem.optimum)) == 0 and float(problem.excess(problem.optimum + 1)) > 0
    with pytest.raises(ValueError, match="moments"):
        LeastSquares(torch.eye(3).expand(2, 3, 3), torch.zeros(2, 4))


def test_covariate_shift_costs_one_nth_through_the_mean_moment_alone():
    problem = problems.covariate_shift(6, 5, sigma=2.0, powers=(0.5, 1.0), seed=1)
    for draw in draws(6).values():
        alone = theory.induced_noise(problems.central(problem.curvature, 2.0), c2_of(draw, 6))
        assert torch.allclose(5 * theory.induced_noise(problem, c2_of(draw, 6)), alone)


def test_partial_participation_is_neutral_per_bit():
    problem = problems.central(BASES["standardized"](20))
    for p in (0.05, 0.3, 1.0):
        draw = in_law(codecs.partial(p=p))
        cost = moments.trace(theory.induced_noise(problem, c2_of(draw, 20)), problem.curvature)
        assert cost == pytest.approx(20 / p)
        values_sent = p * 20
        assert cost * values_sent == pytest.approx(20 * 20)


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", draws(6))
def test_memory_fixed_point(name):
    draw, m = draws(6)[name], BASES["rotated"](6)
    alpha = 1 / (2 * (draw.omega(6) + 1))
    s = theory.memory_spread(draw.linear_map(6), alpha, m)
    assert torch.allclose(2 * s, alpha * moments.linear(draw.linear_map(6), m + s))
    assert float(s.trace() / m.trace()) == pytest.approx(1 / 3)
    assert float(theory.memory_spread(draw.linear_map(6), 1e-6, m).trace()) < 1e-5
    with pytest.raises(ValueError, match="unstable"):
        theory.memory_spread(draw.linear_map(6), 2 / (1 + draw.omega(6)), m)


@pytest.mark.parametrize("batch", [1, 32, 0])
def test_memory_removes_the_mean_and_adds_its_own_noise(batch):
    problem = shifted(batch=batch, alike=True)
    for draw in draws(6).values():
        c2 = c2_of(draw, 6)
        limit = theory.memory_limit(problem, c2)
        slow = theory.memory_noise(problem, draw.linear_map(6), 1e-7)
        assert torch.allclose(slow, limit, rtol=1e-4, atol=1e-9)
        if batch == 0:
            assert not limit.any() and not theory.memory_noise(problem, draw.linear_map(6), 0.01).any()
            continue
        alpha = 1 / (2 * (draw.omega(6) + 1))
        ratio = float(theory.memory_noise(problem, draw.linear_map(6), alpha).trace() / limit.trace())
        assert ratio == pytest.approx(4 / 3 - 1 / (3 * (1 + draw.omega(6))))


def test_memory_can_be_worse_than_none():
    """Nothing to remove, small batches: the memory's own noise stays."""
    problem, draw = problems.central(BASES["rotated"](6), clients=3), draws(6)["sparsification"]
    alpha = 1 / (2 * (draw.omega(6) + 1))
    with_memory = theory.memory_noise(problem, draw.linear_map(6), alpha).trace()
    assert with_memory > 1.2 * theory.induced_noise(problem, c2_of(draw, 6)).trace()
    apart = problems.optimum_shift(BASES["rotated"](6), 3, batch=32, scale=10.0)
    assert (
        theory.memory_noise(apart, draw.linear_map(6), alpha).trace() < theory.induced_noise(apart, c2_of(draw, 6)).trace()
    )


# ----------------------------------------------------------------------------------------------------------- recursion


@pytest.mark.parametrize(("name", "basis"), thinned(draws(6), BASES))
def test_powers_equal_steps(name, basis):
    draw, problem = draws(6)[name], problems.central(BASES[basis](6), 0.8, clients=2)
    gamma, stops = theory.constant_step(draw.omega(6), problem), [1, 2, 3, 150]
    w0 = torch.linspace(-1, 2, 6)
    by_powers = recursion.excess(problem, draw.linear_map(6), gamma, stops, w0)
    by_steps = recursion.blocks(problem, c2_of(draw, 6), gamma, stops, w0, growth=0.0)
    assert by_powers == pytest.approx(by_steps, rel=1e-11)
    assert by_powers[0] == pytest.approx(float(problem.excess(w0)))
    far = [100, 3000]
    grown = recursion.blocks(problem, c2_of(draw, 6), gamma, far, w0, growth=0.01)
    assert grown == pytest.approx(recursion.excess(problem, draw.linear_map(6), gamma, far, w0), rel=1e-3)


@pytest.mark.parametrize("batch", [1, 5, 0])
def test_federated_powers_equal_steps(batch):
    problem = shifted(batch=batch, alike=True)
    for draw in draws(6).values():
        stops = [1, 7, 200]
        by_powers = recursion.excess(problem, draw.linear_map(6), 0.02, stops)
        assert by_powers == pytest.approx(recursion.blocks(problem, c2_of(draw, 6), 0.02, stops, growth=0.0), rel=1e-10)
    with pytest.raises(ValueError, match="share one second moment"):
        recursion.blocks(shifted(batch=batch), c2_of(draw, 6), 0.02, [10])


@pytest.mark.parametrize("name", draws(6))
def test_unlike_clients_follow_the_definition(name):
    """A naked loop over S, m for clients that differ in both."""
    problem, draw, gamma, k = shifted(), draws(6)[name], 0.03, 25
    h, c2 = problem.curvature, c2_of(draw, 6)
    eta, values, vectors = -problem.optimum, *problem.eigen
    s, m, past, total = torch.outer(eta, eta), eta, torch.zeros(6, 6).double(), 0.0
    keep = torch.eye(6).double() - gamma * h
    for _ in range(k):
        total += float((h * (s + past + past.T)).sum())
        past = (past + s) @ keep
        noise = torch.zeros(6, 6).double()
        for i, d in enumerate(problem.offsets):
            seen = s + torch.outer(m, d) + torch.outer(d, m) + torch.outer(d, d)
            mean = problem.moments[i] @ seen @ problem.moments[i]
            noise += c2(theory.gradient_moment(problem, i, seen)) - mean
        s, m = keep @ s @ keep + gamma**2 * noise / 9, keep @ m
    assert recursion.excess(problem, draw.linear_map(6), gamma, [k])[0] == pytest.approx(total / (2 * k * k), rel=1e-10)
    assert len(values) == len(vectors) == 6


@pytest.mark.parametrize("basis", BASES)
def test_limits(basis):
    """K to infinity: the constant-step limit; then gamma to 0: Tr(C_ania H^-1) / 2."""
    problem = problems.central(BASES[basis](6))
    for draw in draws(6).values():
        row = draw.linear_map(6)
        cost = moments.trace(theory.induced_noise(problem, c2_of(draw, 6)), problem.curvature) / 2
        gamma = theory.constant_step(draw.omega(6), problem)
        k = 10**9
        assert k * recursion.excess(problem, row, gamma, [k])[0] == pytest.approx(
            recursion.limit(problem, row, gamma), rel=1e-4
        )
        assert 1.25 < recursion.limit(problem, row, gamma) / cost < 1.6
        small = gamma / 1000
        assert recursion.limit(problem, row, small) == pytest.approx(cost, rel=2e-3)
        assert 10**12 * recursion.excess(problem, row, small, [10**12])[0] == pytest.approx(cost, rel=2e-3)


def test_limit_with_unlike_clients():
    problem, row = shifted(), draws(6)["rand-h"].linear_map(6)
    k = 10**9
    assert k * recursion.excess(problem, row, 0.01, [k])[0] == pytest.approx(recursion.limit(problem, row, 0.01), rel=1e-4)


@pytest.mark.parametrize("p", [1.0, 0.3, 0.05])
def test_multiplier_of_partial_participation(p):
    problem = problems.central(BASES["rotated"](20))
    gamma = p / (2 * float(problem.curvature.trace()))
    found = recursion.limit(problem, (1 / p, 0.0, 0.0), gamma) / (20 / p / 2)
    assert found == pytest.approx(theory.partial_multiplier(problem, p, gamma), rel=1e-10)
    assert 1.33 < found < 1.42
    assert theory.partial_multiplier(problem, p, 3 * p) == math.inf
    assert recursion.limit(problem, (1 / p, 0.0, 0.0), 1.5 * p) == math.inf


def test_a_step_that_is_too_large_is_infinite():
    problem = problems.central(BASES["diagonal"](6))
    assert recursion.excess(problem, (50.0, 0.0, 0.0), 1.0, [10, 10_000])[1] == math.inf


def test_recursion_of_quantization_by_its_bound():
    """On a diagonal H the Cauchy-Schwarz map is monotone: its recursion lies above the stabilized quantizer's on I."""
    problem = problems.central(torch.eye(20, dtype=torch.float64))
    stops, gamma = [10, 1000], 0.003
    bound = recursion.blocks(problem, moments.quantized_bound, gamma, stops)
    exact = recursion.excess(problem, stabilized().linear_map(20), gamma, stops)
    assert all(a > b for a, b in zip(bound, exact, strict=True))


# -------------------------------------------------------------------------------------------------------------- bounds


def test_step_rules():
    problem = problems.central(BASES["standardized"](20))
    assert theory.constant_step(4.0, problem) == pytest.approx(1 / (2 * 5 * 20)) and theory.horizon_step(
        100_000
    ) == pytest.approx(0.01)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_bounds_are_above_the_exact_value(basis, fraction):
    problem, w0 = problems.central(BASES[basis](20)), torch.zeros(20)
    for name, draw in draws(20).items():
        noise = theory.induced_noise(problem, c2_of(draw, 20))
        gamma = fraction * theory.constant_step(draw.omega(20), problem) * (0.1 if name == "stabilized" else 1)
        for k in (10, 1000, 100_000):
            exact = recursion.excess(problem, draw.linear_map(20), gamma, [k])[0]
            if name == "stabilized":
                bound = theory.hoelder_bound(problem, noise, gamma, k, w0)
            else:
                bound = theory.lipschitz_bound(problem, noise, draw.omega(20), gamma, k, w0)
            assert exact <= bound < math.inf
        assert theory.lipschitz_bound(problem, noise, draw.omega(20), 1.0, 10, w0) == math.inf
        assert theory.hoelder_bound(problem, noise, 1.0, 10, w0) == math.inf


def test_the_published_step_is_beyond_the_lipschitz_bound():
    problem = problems.central(BASES["rotated"](20))
    noise = theory.induced_noise(problem, lambda moment: moment)
    assert theory.lipschitz_bound(problem, noise, 0.0, theory.constant_step(0.0, problem), 100, torch.zeros(20)) == math.inf


def test_quantization_is_hoelder():
    """E|C(x) - C(y)|^2 <= sqrt(d) |x-y|^2 + 4 sqrt(d) max(|x|, |y|) |x-y| with shared uniforms, on random pairs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 1, 8, generator=generator)
    y = x + torch.randn(200, 1, 8, generator=generator) * 10.0 ** torch.linspace(-3, 1, 200)[:, None, None]
    r = torch.rand(1, 4000, 8, generator=generator)
    norms = [v.norm(dim=2, keepdim=True) for v in (x, y)]
    sent = [n * v.sign() * (r < v.abs() / n) for v, n in zip((x, y), norms, strict=True)]
    gap = (x - y).norm(dim=2).squeeze(1)
    found = (sent[0] - sent[1]).square().sum(2).mean(1)
    bound = math.sqrt(8) * (gap**2 + 4 * torch.maximum(*norms).squeeze() * gap)
    assert bool((found <= bound).all()) and float((found / bound).max()) > 0.1
