"""The simulator against the recursion, a naked loop, and the library's rounds.

Symbols: as in `taciturn.advisor.simulate`; z = (mean over replicas - exact) / standard error.
"""

from __future__ import annotations

import math

import pytest
import torch

from drive import drive
from taciturn import codecs, participation, solvers, sync
from taciturn.advisor import moments, problems, recursion, theory
from taciturn.advisor.draws import in_law, stabilized, through
from taciturn.advisor.problems import LeastSquares
from taciturn.advisor.simulate import Cell, simulate
from taciturn.core import random
from taciturn.method import Method
from taciturn.tasks import data
from taciturn.tasks.models import linear
from taciturn.tasks.spec import TaskSpec

BASES = ("diagonal", "rotated", "standardized")


def moment(basis: str, d: int) -> torch.Tensor:
    if basis == "diagonal":
        return problems.rotated(problems.spectrum(d, 1), "identity")
    turned = problems.rotated(problems.spectrum(d, 1), "haar")
    return problems.standardized(turned) if basis == "standardized" else turned


def draws(d: int) -> dict:
    p = 1 / (math.sqrt(d) + 1)
    h = max(1, int(d * p))
    chosen = {"none": codecs.identity(), "PP": codecs.partial(p=p), "sparsification": codecs.sparsify(p=p)}
    chosen |= {"rand-h": codecs.rand_k(k=h), "sketch": codecs.sketch(h=h)}
    return {name: in_law(codec) for name, codec in chosen.items()} | {"stabilized": stabilized()}


def scores(cells, draw, stops, replicas, seed=0) -> torch.Tensor:
    """z of every cell and K."""
    d = cells[0].problem.d
    exact = torch.tensor([recursion.excess(c.problem, draw.linear_map(d), c.gamma, stops) for c in cells])
    found = simulate(cells, draw, stops, replicas, seed).excess
    return (found.mean(2) - exact) / (found.std(2) / math.sqrt(replicas))


def cells_of(draw, d: int, factors=(1.0, 0.25)) -> list[Cell]:
    found = []
    for basis in BASES:
        problem = problems.central(moment(basis, d))
        found += [Cell(problem, f * theory.constant_step(draw.omega(d), problem)) for f in factors]
    return found


@pytest.mark.parametrize("name", draws(8))
def test_every_linear_codec_follows_the_recursion(name):
    draw = draws(8)[name]
    assert float(scores(cells_of(draw, 8), draw, [20, 150], 800).abs().max()) < 4


@pytest.mark.slow
@pytest.mark.parametrize("name", draws(20))
def test_every_linear_codec_follows_the_recursion_for_long(name):
    draw = draws(20)[name]
    assert float(scores(cells_of(draw, 20), draw, [1000, 10_000], 400, seed=1).abs().max()) < 4


@pytest.mark.parametrize("name", ["PP", "sparsification", "rand-h", "sketch"])
def test_the_codecs_themselves_follow_the_recursion(name):
    """Through the library's messages."""
    draw = through(draws(6)[name].codec)
    problem = problems.central(moment("rotated", 6))
    cells = [Cell(problem, theory.constant_step(draw.omega(6), problem))]
    assert float(scores(cells, draw, [10, 40], 60 if name == "sketch" else 300).abs().max()) < 4


@pytest.mark.parametrize("batch", [1, 4, 0])
@pytest.mark.parametrize("alike", [True, False])
def test_federations_follow_the_recursion(batch, alike):
    """Unlike features and optima, several clients, mini-batches and full gradients, no memory."""
    one = problems.optimum_shift(moment("rotated", 5), 3, 0.7, batch, scale=1.0, seed=3)
    if not alike:
        own = torch.stack([problems.rotated(problems.spectrum(5, 0.5 + i), "haar", seed=i) for i in range(3)])
        one = LeastSquares(own, one.optima, 0.7, batch)
    draw = in_law(codecs.sparsify(p=0.4))
    assert float(scores([Cell(one, 0.05), Cell(one, 0.15)], draw, [15, 120], 1000).abs().max()) < 4


def test_mini_batch_draws_have_the_law_of_mini_batches():
    """b = 3 by d + 2 b draws: the same excess as averaging three clients' single samples, for the identity."""
    h = moment("rotated", 5)
    together, apart = problems.central(h, batch=3), problems.central(h, clients=3)
    one = simulate([Cell(together, 0.1)], in_law(codecs.identity()), [100], 3000, seed=0).excess[0, 0]
    three = simulate([Cell(apart, 0.1)], in_law(codecs.identity()), [100], 3000, seed=1).excess[0, 0]
    assert float((one.mean() - three.mean()) / (one.var() / 3000 + three.var() / 3000).sqrt()) == pytest.approx(0, abs=4)
    assert float(one.std() / three.std()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize("batch", [1, 2])
def test_naked_loop(alpha, batch):
    """The boxes of the method, one replica and one client at a time."""
    d, clients, steps, gamma = 4, 2, 12, 0.1
    h = torch.stack([moment("rotated", d), moment("standardized", d)])
    problem = LeastSquares(h, torch.randn(clients, d, generator=torch.Generator().manual_seed(1)).double(), 0.5, batch)
    width = d + (1 if batch == 1 else 2 * batch)
    noise = torch.randn(steps, 1, 3, clients, width, generator=torch.Generator().manual_seed(2))
    found = simulate([Cell(problem, gamma, alpha)], _halves(), [5, steps], 3, noise=noise)
    roots = [v @ torch.diag(e.sqrt()) @ v.T for e, v in map(torch.linalg.eigh, problem.moments)]
    for r in range(3):
        w, total, memory = torch.zeros(d).double(), torch.zeros(d).double(), [torch.zeros(d).double()] * clients
        for k in range(steps):
            if k == 5:
                assert float(problem.excess(total / 5)) == pytest.approx(float(found.excess[0, 0, r]), rel=1e-4)
            total += w
            sent = []
            for i in range(clients):
                n = noise[k, 0, r, i].double()
                z, v = n[:d], roots[i] @ (w - problem.optima[i])
                if batch == 1:
                    g = roots[i] @ z * (z @ v - 0.5 * n[d])
                else:
                    e, t, eps = v / v.norm(), n[d : d + batch], n[d + batch :]
                    rows = t * v.norm() - 0.5 * eps
                    g = roots[i] @ (e * (t * rows).mean() + rows.norm() / batch * (z - e * (e @ z)))
                q = (g - memory[i]) / 2
                sent.append(q + memory[i])
                memory[i] = memory[i] + alpha * q
            w = w - gamma * sum(sent) / clients
        assert float(problem.excess(total / steps)) == pytest.approx(float(found.excess[0, 1, r]), rel=1e-4)
        assert torch.allclose(found.last[0, r], w, atol=1e-5)
        if alpha:
            assert torch.allclose(found.memory[0, r].double(), torch.stack(memory), atol=1e-5)
    assert (found.memory is None) == (alpha == 0)


class _halves:
    """C(u) = u / 2: nothing random, and not what was given."""

    def draw(self, u, generator):
        return u / 2


def test_cells_must_fit_together():
    one, two = problems.central(moment("diagonal", 4)), problems.central(moment("diagonal", 5))
    with pytest.raises(ValueError, match="agree in clients"):
        simulate([Cell(one, 0.1), Cell(two, 0.1)], stabilized(), [3], 2)


def test_covariate_shift_averages_over_clients():
    """Ten clients' excess is a tenth of one's, at a small step with sigma alike."""
    shifted = problems.covariate_shift(6, 10, powers=(0.5, 1.0), seed=2)
    alone = problems.central(shifted.curvature)
    draw, gamma, k = in_law(codecs.sparsify(p=0.4)), 0.03, 800
    ones = torch.ones(6)
    many = simulate([Cell(shifted, gamma)], draw, [k], 100, w0=ones).excess.mean()
    one = simulate([Cell(alone, gamma)], draw, [k], 400, w0=ones).excess.mean()
    assert float(one / many) == pytest.approx(10, rel=0.25)
    cost = theory.induced_noise(shifted, lambda m: moments.linear(draw.linear_map(6), m))
    assert float(many) == pytest.approx(theory.asymptotic(cost, shifted.curvature, k), rel=0.25)


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["sparsification", "rand-h", "sketch", "PP", "quantization"])
def test_memory_with_full_gradients_converges_linearly(name):
    """Without memory the iterates keep a distance; with it they and h_i reach w* and H delta_i."""
    d = 6
    draw = in_law(codecs.qsgd(levels=1)) if name == "quantization" else draws(d)[name]
    problem = problems.optimum_shift(moment("rotated", d), 4, batch=0, scale=1.0)
    gamma, alpha = 0.2, 1 / (2 * (draw.omega(d) + 1))
    with_memory = simulate([Cell(problem, gamma, alpha)], draw, [400, 1200], 4)
    without = simulate([Cell(problem, gamma)], draw, [1200], 4)
    gap = (with_memory.last - problem.optimum).norm(dim=-1)
    assert float(gap.max()) < 1e-4 < 0.01 < float((without.last - problem.optimum).norm(dim=-1).min())
    target = (problem.moments @ problem.offsets.unsqueeze(-1)).squeeze(-1).float()
    assert float((with_memory.memory - target).abs().max()) < 1e-3
    ratio = with_memory.excess[0, 0] / with_memory.excess[0, 1]  # only the start is left: 1 / K^2
    assert float(ratio.mean()) == pytest.approx(9, rel=0.1)


@pytest.mark.parametrize("name", ["sparsification", pytest.param("sketch", marks=pytest.mark.slow)])
def test_memory_settles_at_the_stated_noise(name):
    """Stochastic gradients: Cov(h_i) at a small step is the fixed point, and the excess follows its trace."""
    d, alpha, gamma, k = 5, 0.1, 0.03, 1500
    draw = draws(d)[name]
    problem = problems.optimum_shift(moment("rotated", d), 2, batch=8, scale=2.0)
    found = simulate([Cell(problem, gamma, alpha)], draw, [k], 400, w0=problem.optimum)
    cost = theory.memory_noise(problem, draw.linear_map(d), alpha)
    mean, error = found.excess.mean(), found.excess.std() / 20
    expected = theory.asymptotic(cost, problem.curvature, k)
    assert float(mean) == pytest.approx(expected, rel=0.1, abs=4 * float(error))
    spread = found.memory[0].double()
    spread = (spread - spread.mean(0)).square().mean((0, 1))
    stated = torch.stack([theory.memory_spread(draw.linear_map(d), alpha, m) for m in
                          theory.client_moments(problem, centered=True)]).mean(0)  # fmt: skip
    assert float(spread.sum()) == pytest.approx(float(stated.trace()), rel=0.2)


# -------------------------------------------------------------------------------------------------------- quantization


def test_quantization_stays_below_its_bounds():
    """The Cauchy-Schwarz recursion on a diagonal H, and the Hoelder bound where its step allows; above no compression."""
    draw, d, stops = in_law(codecs.qsgd(levels=1)), 8, [50, 500]
    problem = problems.central(moment("diagonal", d))
    for factor in (1.0, 0.1):
        gamma = factor * theory.constant_step(draw.omega(d), problem) / 2
        found = simulate([Cell(problem, gamma)], draw, stops, 1000).excess[0]
        mean, error = found.mean(1), found.std(1) / math.sqrt(1000)
        surrogate = torch.tensor(recursion.blocks(problem, moments.quantized_bound, gamma, stops))
        plain = torch.tensor(recursion.excess(problem, moments.IDENTITY, gamma, stops))
        assert bool((mean - 4 * error < surrogate).all()) and bool((mean + 4 * error > plain).all())
        noise = theory.induced_noise(problem, moments.quantized)
        for k, value in zip(stops, mean.tolist(), strict=True):
            assert value < theory.hoelder_bound(problem, noise, gamma, k, torch.zeros(d))


# ---------------------------------------------------------------------------------------------------- the whole library


class _keyed:
    """A codec under the keys that the library's rounds use: client i, round k."""

    def __init__(self, codec, clients: int, gamma: float) -> None:
        self.inner, self.clients, self.gamma, self.round = codec, clients, gamma, 0

    def draw(self, u, generator):
        from taciturn.core.vector import Layout

        layout = Layout(("weight", "bias"), ((1, u.shape[1] - 1), (1,)))
        base, rows = random.fold(random.key(0), "client"), []
        for i, row in enumerate(u):
            key = random.fold(base, torch.tensor(i), "encode", self.round)
            payload, _ = self.inner.encode(-self.gamma * row, {}, key, layout=layout, knobs={})
            rows.append(self.inner.decode(payload, {}, layout=layout)[0] / -self.gamma)
        self.round += 1
        return torch.stack(rows)


@pytest.mark.parametrize("codec", [codecs.identity(), codecs.sparsify(p=0.4), codecs.rand_k(k=3)])
def test_fifty_rounds_of_the_library(codec):
    """One full gradient a round through client, codec, bytes and server = the simulator on the same samples."""
    clients, d, gamma, rounds = 4, 6, 0.04, 50
    source = data.least_squares(d=d, clients=clients, samples=40, shift="optimum", central=0.0)
    task = TaskSpec(source, linear()).build(0)
    method = Method(
        participation=participation.all(), sync=sync.every(steps=1), solver=solvers.sgd(lr=gamma), batch_size=40
    )
    state, *_ = drive(task, method.replace(codec=codec), rounds=rounds)
    table = task.train
    x = torch.cat([table.fields["input"], torch.ones(clients * 40, 1)], 1).double().view(clients, 40, d + 1)
    y = table.fields["target"].double().view(clients, 40, 1)
    moment_ = 2 * x.mT @ x / 40  # the loss is the square, not its half
    optima = torch.linalg.solve(moment_, 2 * x.mT @ y / 40).squeeze(2)
    problem = LeastSquares(moment_, optima, 1.0, batch=0)
    start = method.partition.split(task.model, task.tracked).x0
    same = simulate([Cell(problem, gamma)], _keyed(codec, clients, gamma), [rounds], 1, w0=start)
    assert float((same.last[0, 0] - state.x).norm() / state.x.norm()) < 1e-5
    assert float((state.x - start).norm()) > 0.1
