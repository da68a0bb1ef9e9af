"""The curvature: products, the matrix, Lanczos quadrature and conjugate gradients say the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import Net, make_task
from taciturn.advisor.curvature import Curvature, Dense, Krylov, lanczos, on_grid, spectrum
from taciturn.client import Work
from taciturn.codecs import identity
from taciturn.core import random
from taciturn.core.errors import ModelError
from taciturn.partition import full
from taciturn.solvers import sgd


def made(model=Net, n=30, **data):
    task = make_task(model, **data)
    split = full().split(task.model, task.tracked)
    ids, index = torch.tensor([3]), torch.arange(n).unsqueeze(0)
    batch = {name: t[0] for name, t in task.train.fetch(ids, index).items()}
    weights = random.uniform(random.key(1), n) + 0.5
    return Curvature(Work(task, split, sgd(), identity()), split.x0, batch, weights / weights.sum())


def explicit(curvature):
    """sum_s w_s J_s' (Diag(p) - pp') J_s for softmax cross-entropy, sample by sample."""
    total = torch.zeros(len(curvature.x), len(curvature.x), dtype=torch.float64)
    for s, w in enumerate(curvature.weights):
        one = {name: t[s : s + 1] for name, t in curvature.batch.items()}
        j = torch.autograd.functional.jacobian(lambda y, one=one: curvature._outputs(y, one)[0], curvature.x).double()
        p = torch.softmax(curvature._outputs(curvature.x, one)[0], -1).detach().double()
        total += float(w) * j.T @ (torch.diag(p) - torch.outer(p, p)) @ j
    return total


def test_products_are_those_of_the_explicit_matrix():
    c = made()
    h = explicit(c)
    v = random.normal(random.key(5), 4, len(c.x))
    torch.testing.assert_close(c.products(v).double(), v.double() @ h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(c.matrix(), h, rtol=1e-4, atol=1e-6)


def test_matrix_from_products_where_outputs_are_many(monkeypatch):
    c = made()
    h = c.matrix()
    monkeypatch.setattr("taciturn.advisor.curvature.OUTPUTS", 1)
    torch.testing.assert_close(c.matrix(), h, rtol=1e-4, atol=1e-5)


def test_gradient_and_loss():
    c = made()
    y = c.x.clone().requires_grad_()
    task = c.work.task
    loss = (c.weights * task.program.per_sample(c._outputs(y, c.batch), c.batch["target"])).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, y)[0], c.gradient())
    assert abs(c.loss() - loss.item()) < 1e-6


def test_thinned_samples():
    c = made()
    few = c.thinned(10)
    assert len(few.weights) == len(few.batch["target"]) == 10 and float(few.weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(c.thinned(99).matrix(), c.matrix())


def conjugate_gradients(h, b, damping, steps=300):
    """(H + damping I)^-1 b, the textbook."""
    x, r = torch.zeros_like(b), b.clone()
    p, old = r.clone(), float(r @ r)
    for _ in range(steps):
        hp = h @ p + damping * p
        a = old / float(p @ hp)
        x, r = x + a * p, r - a * hp
        new = float(r @ r)
        if new < 1e-22:
            break
        p, old = r + (new / old) * p, new
    return x


def trace(basis, energies, damping: float):
    """Tr(C (H + damping I)^-1) from the energies [.., k] of C."""
    return (energies / (basis.nodes + damping)).sum(-1)


def test_quadrature_is_conjugate_gradients_and_the_dense_trace():
    c = made()
    dense, d = Dense.of(c.matrix()), len(c.x)
    krylov = Krylov.of(c.products, d, random.key(2), torch.float32, size=400)
    u = random.normal(random.key(6), 5, d)
    for damping in (1e-2, 1e-1):
        exact = trace(dense, dense.energies(u), damping)
        cg = torch.stack([v.double() @ conjugate_gradients(c.matrix(), v.double(), damping) for v in u])
        torch.testing.assert_close(cg, exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(trace(krylov, krylov.energies(u), damping), exact, rtol=2e-2, atol=0)
    for basis in (dense, krylov):
        torch.testing.assert_close(basis.energies(u).sum(1), u.double().square().sum(1), rtol=1e-4, atol=0)


def test_probes_estimate_diagonals_and_the_identity():
    c = made()
    dense, d = Dense.of(c.matrix()), len(c.x)
    krylov = Krylov.of(c.products, d, random.key(2), torch.float32, size=200)
    v = random.uniform(random.key(8), d).double().expand(48, d)
    damping = 0.05
    estimates = trace(krylov, krylov.diagonal(v), damping)
    exact = float(trace(dense, dense.diagonal(v[:1]), damping))
    assert abs(float(estimates.mean()) - exact) < 4 * float(estimates.std()) / 48**0.5 + 0.02 * exact
    matrix = c.matrix() + damping * torch.eye(d)
    assert exact == pytest.approx(float((v[0].double() * torch.linalg.inv(matrix).diagonal()).sum()), rel=1e-6)
    assert float(dense.flat().sum()) == d and float(krylov.flat().sum()) == pytest.approx(d, rel=1e-3)


def test_lanczos_ends_early_and_takes_zero_vectors():
    h = torch.diag(torch.tensor([3.0, 3.0, 1.0, 0.0], dtype=torch.float64))
    start = torch.tensor([[1.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    theta, weight = lanczos(lambda v: v @ h, start, 4)
    torch.testing.assert_close((theta * weight).sum(1), torch.tensor([10.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(
        (weight / (theta + 1)).sum(1), torch.tensor([2 / 4 + 4 / 2 + 1, 0, 0.5], dtype=torch.float64)
    )
    nodes = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    told = on_grid(nodes, torch.tensor([[3.0, 0.5, 9.0]]), torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(told, torch.tensor([[1.0, 0.5, 2.5]], dtype=torch.float64))


def test_the_tool_follows_the_size(monkeypatch):
    c = made()
    assert isinstance(spectrum(c, random.key(0)), Dense)
    monkeypatch.setattr("taciturn.advisor.curvature.DENSE", 10)
    assert isinstance(spectrum(c, random.key(0)), Krylov)


class Odd(nn.Module):
    """An operation without a forward derivative."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return _Square.apply(self.layer(x))


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_models_that_cannot_be_differentiated_are_refused():
    c = made(Odd)
    with pytest.raises(ModelError, match=r"torch\.func cannot differentiate"):
        c.products(torch.ones(1, len(c.x)))
