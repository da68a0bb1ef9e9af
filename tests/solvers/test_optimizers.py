"""Local optimizers against torch.optim, in float64, on a regression whose batch changes with every step.

Symbols: y [d], v [p] parameters; A [n, d], B [n, p], b [n] with loss |A y + B v - b|^2 / (2 n) on the rows of a batch.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from taciturn import solvers
from taciturn.core import random
from taciturn.core.errors import ConfigError
from taciturn.core.state import clone, equal, leaves, row, stack
from taciturn.solvers import adamw, prox, sgd
from taciturn.solvers.schedules import constant, cosine, exponential

D, P, STEPS, ROWS = 5, 3, 20, 8
ONE = torch.ones((), dtype=torch.float64)


def normal(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    return random.normal(random.fold(random.key(seed), name), *shape).double()


def batches(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    shapes = {"A": (ROWS, D), "B": (ROWS, P), "b": (ROWS,)}
    return [{name: normal(f"{name}{t}", *shape, seed=seed) for name, shape in shapes.items()} for t in range(STEPS)]


def value(y, v, batch):
    return (batch["A"] @ y + batch["B"] @ v - batch["b"]).square().mean() / 2


def oracle(y, v, batch):
    """Loss and gradient, by hand."""
    residual = batch["A"] @ y + batch["B"] @ v - batch["b"]
    return residual.square().mean() / 2, batch["A"].T @ residual / ROWS, batch["B"].T @ residual / ROWS


def train(solver, seed: int = 0, steps: int = STEPS, lr_scale=ONE):
    """-> (final record, losses)."""
    local = solver.begin(normal("x", D, seed=seed), normal("v", P, seed=seed), {})
    losses = []
    for batch in batches(seed)[:steps]:
        local, loss = solver.step(local, batch, oracle, lr_scale)
        losses.append(loss)
    return local, torch.stack(losses)


def by_torch(make, *, clip=None, mu=0.0):
    """The same training with a torch optimizer on both parameters, and mu/2 |y - x|^2 in the loss."""
    x = normal("x", D)
    y, v = (torch.nn.Parameter(t.clone()) for t in (x, normal("v", P)))
    optimizer, losses = make([y, v]), []
    for batch in batches():
        optimizer.zero_grad()
        loss = value(y, v, batch)
        losses.append(loss.detach())
        (loss + mu / 2 * (y - x).square().sum()).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([y, v], clip)
        optimizer.step()
    return y.detach(), v.detach(), torch.stack(losses)


def torch_sgd(lr=0.1, **options):
    return lambda parameters: torch.optim.SGD(parameters, lr, **options)


def torch_adamw(lr=0.05, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    return lambda parameters: torch.optim.AdamW(parameters, lr, betas, eps, weight_decay)


ORACLES = {
    "sgd": (sgd(lr=0.1), torch_sgd(), {}),
    "sgd lr 0": (sgd(lr=0.0), torch_sgd(lr=0.0), {}),
    "sgd decay": (sgd(lr=0.1, weight_decay=0.3), torch_sgd(weight_decay=0.3), {}),
    "sgd clip": (sgd(lr=0.1, clip=0.5), torch_sgd(), {"clip": 0.5}),
    "sgd clip never": (sgd(lr=0.1, clip=1e6), torch_sgd(), {"clip": 1e6}),
    "momentum": (sgd(lr=0.1, momentum=0.9), torch_sgd(momentum=0.9), {}),
    "nesterov": (sgd(lr=0.1, momentum=0.7, nesterov=True), torch_sgd(momentum=0.7, nesterov=True), {}),
    "all of sgd": (
        sgd(lr=0.1, momentum=0.7, nesterov=True, weight_decay=0.3, clip=0.5),
        torch_sgd(momentum=0.7, nesterov=True, weight_decay=0.3),
        {"clip": 0.5},
    ),
    "adamw": (adamw(lr=0.05), torch_adamw(), {}),
    "adamw decay": (adamw(lr=0.05, weight_decay=0.3), torch_adamw(weight_decay=0.3), {}),
    "adamw betas": (adamw(lr=0.05, betas=(0.5, 0.8), eps=1e-2), torch_adamw(betas=(0.5, 0.8), eps=1e-2), {}),
    "adamw betas 0": (adamw(lr=0.05, betas=(0.0, 0.0)), torch_adamw(betas=(0.0, 0.0)), {}),
    "adamw clip": (adamw(lr=0.05, clip=0.1, weight_decay=0.1), torch_adamw(weight_decay=0.1), {"clip": 0.1}),
    "prox": (prox(mu=0.4, solver=sgd(lr=0.1)), torch_sgd(), {"mu": 0.4}),
    "prox 0": (prox(mu=0.0, solver=sgd(lr=0.1)), torch_sgd(), {}),
    "prox clip": (prox(mu=0.4, solver=sgd(lr=0.1, clip=0.5)), torch_sgd(), {"mu": 0.4, "clip": 0.5}),
    "prox momentum": (prox(mu=0.4, solver=sgd(lr=0.1, momentum=0.9)), torch_sgd(momentum=0.9), {"mu": 0.4}),
    "prox adamw": (prox(mu=0.4, solver=adamw(lr=0.05)), torch_adamw(), {"mu": 0.4}),
    "prox prox": (prox(mu=0.4, solver=prox(mu=0.5, solver=sgd(lr=0.1))), torch_sgd(), {"mu": 0.9}),
}
SOLVERS = {name: solver for name, (solver, _, _) in ORACLES.items()}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def test_every_solver_has_a_row():
    here = {name for name in solvers.__all__ if getattr(solvers, name).__module__.endswith(".optimizers")}
    assert {type(solver).__name__ for solver in SOLVERS.values()} == here


@pytest.mark.parametrize("name", ORACLES)
def test_equals_torch(name):
    """20 steps; the loss that is reported is f at the point before the step, without the penalty."""
    solver, make, options = ORACLES[name]
    local, losses = train(solver)
    y, v, expected = by_torch(make, **options)
    for got, want in ((local["y"], y), (local["v"], v), (losses, expected)):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_prox_is_the_hand_formula():
    x = normal("x", D)
    y, v = x, normal("v", P)
    for batch in batches():
        _, g_y, g_v = oracle(y, v, batch)
        y, v = y - 0.1 * (g_y + 0.4 * (y - x)), v - 0.1 * g_v
    local, _ = train(prox(mu=0.4, solver=sgd(lr=0.1)))
    torch.testing.assert_close(local["y"], y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(local["v"], v, rtol=1e-12, atol=1e-12)


@each_solver
def test_a_scaled_rate_is_another_rate(solver):
    def with_rate(part, factor):
        return (
            replace(part, solver=with_rate(part.solver, factor))
            if isinstance(part, prox)
            else replace(part, lr=part.lr * factor)
        )

    scaled, _ = train(solver, lr_scale=torch.tensor(0.25, dtype=torch.float64))
    plain, _ = train(with_rate(solver, 0.25))
    torch.testing.assert_close(scaled["y"], plain["y"], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(scaled["v"], plain["v"], rtol=1e-13, atol=1e-13)
    still, _ = train(solver, lr_scale=torch.zeros((), dtype=torch.float64))
    assert torch.equal(still["y"], normal("x", D)) and torch.equal(still["v"], normal("v", P))


@pytest.mark.parametrize("name", [name for name in ORACLES if not name.startswith("prox")])
def test_personal_parameters_take_the_same_step(name):
    """Exchange the roles of y and v: the same numbers at the other place."""
    solver = SOLVERS[name]
    y, v = solver.begin(normal("x", D), normal("v", P), {}), solver.begin(normal("v", P), normal("x", D), {})
    for batch in batches():
        y, _ = solver.step(y, batch, oracle, ONE)
        v, _ = solver.step(v, batch | {"A": batch["B"], "B": batch["A"]}, oracle, ONE)
    torch.testing.assert_close((y["y"], y["v"]), (v["v"], v["y"]), rtol=1e-12, atol=1e-12)


@each_solver
def test_a_step_is_pure_and_keeps_the_shape_of_the_record(solver):
    x, v = normal("x", D), normal("v", P)
    local = solver.begin(x, v, {})
    assert torch.equal(local["y"], x) and torch.equal(local["v"], v)
    before, batch = clone(local), batches()[0]
    first, loss = solver.step(local, batch, oracle, ONE)
    second, again = solver.step(local, batch, oracle, ONE)
    assert equal(local, before) and equal(first, second) and torch.equal(loss, again)
    assert list(first) == list(local), "where() needs the same names"
    assert [(t.shape, t.dtype) for t in leaves(first)] == [(t.shape, t.dtype) for t in leaves(local)]


@each_solver
def test_the_message_is_the_change_and_rounds_start_afresh(solver):
    local, _ = train(solver)
    u = local["y"] - normal("start", D)
    if solver.affine() is not None:
        del local["y"]  # an engine that fuses the steps has none
    message, state = solver.message(local, u)
    assert torch.equal(message, u) and state == {} == solver.init(None)
    fresh, _ = solver.step(solver.begin(normal("x", D), normal("v", P), state), batches()[0], oracle, ONE)
    assert equal(fresh, train(solver, steps=1)[0])


AFFINE = {
    "sgd": (0.1, 0.0), "sgd lr 0": (0.0, 0.0), "prox": (0.1, 0.4), "prox 0": (0.1, 0.0), "prox prox": (0.1, 0.9),
}  # fmt: skip


@pytest.mark.parametrize("name", ORACLES)
def test_affine_tells_the_truth(name):
    """Where it says (lr, mu), y <- y - lr (g + mu (y - x)) is the step; exactly the plain solvers say so."""
    solver = SOLVERS[name]
    said = solver.affine()
    assert said == (pytest.approx(AFFINE[name], rel=1e-15) if name in AFFINE else None)
    if said is None:
        return
    lr, mu = said
    x, scale = normal("x", D), torch.tensor(0.5, dtype=torch.float64)
    y, v, local = x, normal("v", P), solver.begin(x, normal("v", P), {})
    for batch in batches():
        _, g_y, g_v = oracle(y, v, batch)
        y, v = y - lr * scale * (g_y + mu * (y - x)), v - lr * scale * g_v
        local, _ = solver.step(local, batch, oracle, scale)
    torch.testing.assert_close((local["y"], local["v"]), (y, v), rtol=1e-13, atol=1e-13)


@each_solver
def test_vmap_is_a_loop(solver):
    m = 4
    local = stack([solver.begin(normal("x", D, seed=i), normal("v", P, seed=i), {}) for i in range(m)])
    rows = [batches(i) for i in range(m)]
    for t in range(5):
        local, loss = torch.vmap(lambda r, b: solver.step(r, b, oracle, ONE))(local, stack([rows[i][t] for i in range(m)]))
    for i in range(m):
        alone, losses = train(solver, seed=i, steps=5)
        for got, want in zip(leaves(row(local, i)), leaves(alone), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(loss[i], losses[-1], rtol=1e-12, atol=1e-12)


BAD = {
    "sgd: lr at least 0; got -0.1": lambda: sgd(lr=-0.1),
    "sgd: lr at least 0; got nan": lambda: sgd(lr=float("nan")),
    "adamw: lr at least 0; got -1": lambda: adamw(lr=-1),
    "sgd: weight_decay at least 0; got -1": lambda: sgd(weight_decay=-1),
    "adamw: weight_decay at least 0; got -0.5": lambda: adamw(weight_decay=-0.5),
    "sgd: clip above 0; got 0": lambda: sgd(clip=0),
    "adamw: clip above 0; got -1": lambda: adamw(clip=-1),
    r"sgd: momentum in \[0, 1\); got 1": lambda: sgd(momentum=1),
    r"sgd: momentum in \[0, 1\); got -0.1": lambda: sgd(momentum=-0.1),
    r"adamw: betas in \[0, 1\); got \(0.9, 1\)": lambda: adamw(betas=(0.9, 1)),
    r"adamw: betas in \[0, 1\); got \(-0.1, 0.9\)": lambda: adamw(betas=(-0.1, 0.9)),
    "adamw: eps above 0; got 0": lambda: adamw(eps=0),
    "prox: mu at least 0; got -0.1": lambda: prox(mu=-0.1),
    "constant: warmup at least 0 rounds; got -1": lambda: constant(warmup=-1),
    "cosine: warmup at least 0 rounds; got -1": lambda: cosine(rounds=3, warmup=-1),
    "cosine: rounds at least 1; got 0": lambda: cosine(rounds=0),
    r"cosine: floor in \[0, 1\]; got 1.5": lambda: cosine(rounds=3, floor=1.5),
    r"cosine: floor in \[0, 1\]; got -0.5": lambda: cosine(rounds=3, floor=-0.5),
    r"exponential: decay in \(0, 1\]; got 0": lambda: exponential(decay=0),
    r"exponential: decay in \(0, 1\]; got 1.1": lambda: exponential(decay=1.1),
    "exponential: every at least 1 round; got 0": lambda: exponential(decay=0.5, every=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_refused_by_name(message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        BAD[message]()


SCHEDULES = {
    "constant": (constant(), [1, 1, 1, 1, 1, 1]),
    "warm-up": (constant(warmup=4), [0.25, 0.5, 0.75, 1, 1, 1]),
    "cosine": (cosine(rounds=4), [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0, 0]),
    "cosine floor": (cosine(rounds=2, floor=0.2), [1, 0.6, 0.2, 0.2, 0.2, 0.2]),
    "cosine warm-up": (cosine(rounds=4, warmup=2), [0.5, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0, 0]),
    "exponential": (exponential(decay=0.5), [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
    "exponential stairs": (exponential(decay=0.1, every=3), [1, 1, 1, 0.1, 0.1, 0.1]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    schedule, factors = SCHEDULES[name]
    assert [schedule(r) for r in range(6)] == pytest.approx(factors, abs=1e-12)


def test_prox_has_the_schedule_of_its_solver():
    schedule = exponential(decay=0.5)
    assert prox(solver=prox(solver=sgd(schedule=schedule))).schedule is schedule


def test_adamw_keeps_its_digits_in_float32():
    """1 - 0.999^t by subtraction has an error of 5e-5 in float32; the step must be good to rounding."""
    g = random.normal(random.key(0), 1000) + 0.1
    steps = {}
    for dtype in (torch.float32, torch.float64):
        solver, x = solvers.adamw(lr=1.0), torch.zeros(1000, dtype=dtype)
        local = solver.begin(x, x[:0], {})
        for _ in range(3):
            oracle = lambda y, v, batch, dtype=dtype: (y.sum(), g.to(dtype), v)  # noqa: E731
            local, _ = solver.step(local, {}, oracle, torch.ones((), dtype=dtype))
        steps[dtype] = local["y"].double()
    error = (steps[torch.float32] - steps[torch.float64]).norm() / steps[torch.float64].norm()
    assert float(error) < 1e-6
