"""Server optimizers against naked loops, in float64; and state that can be saved, compared and used twice.

Symbols: x [d] the model; u [d] the aggregate of a round; g = -u the pseudo-gradient; m, s moments; t steps from 1.
"""

from __future__ import annotations

import math

import pytest
import torch

from taciturn import server
from taciturn.core import random
from taciturn.core.errors import ConfigError
from taciturn.core.state import clone, equal, load_state, save_state
from taciturn.server.yogi import Yogi

D, ROUNDS = 6, 10
LR, B1, B2, EPS = 0.3, 0.8, 0.95, 1e-2


def updates(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Changes of unlike size, so that Yogi's second moment rises and falls."""
    scale = torch.tensor([1.0, 3.0, 0.1, 0.01, 2.0, 0.0, 0.5, 0.05, 5.0, 0.2]).unsqueeze(1)
    return list((random.normal(random.key(4), ROUNDS, D) * scale).to(dtype).unbind())


def start(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return random.normal(random.key(5), D).to(dtype)


def run(optimizer, us, x, state=None):
    """-> (x of each round, final state)."""
    state, path = optimizer.init(x) if state is None else state, []
    for u in us:
        x, state = optimizer.step(x, u, state)
        path.append(x)
    return torch.stack(path), state


# ------------------------------------------------------------------------- the boxes, one value at a time, in Python


def box_sgd(x, gs):
    for g in gs:
        x -= LR * g
        yield x


def box_momentum(x, gs, nesterov=False):
    m = 0.0
    for g in gs:
        m = B1 * m + g
        x -= LR * (g + B1 * m if nesterov else m)
        yield x


def box_adam(x, gs, decay=0.0, yogi=False):
    m = s = 0.0
    for t, g in enumerate(gs, 1):
        x *= 1 - LR * decay
        m = B1 * m + (1 - B1) * g
        if yogi:
            s -= (1 - B2) * (s > g * g) * g * g - (1 - B2) * (s < g * g) * g * g
        else:
            s = B2 * s + (1 - B2) * g * g
        x -= LR * (m / (1 - B1**t)) / (math.sqrt(s / (1 - B2**t)) + EPS)
        yield x


def box_adagrad(x, gs):
    s = 0.0
    for g in gs:
        s += g * g
        x -= LR * g / (math.sqrt(s) + EPS)
        yield x


MOMENTS = {"lr": LR, "betas": (B1, B2), "eps": EPS}
BOXES = {
    "sgd": (server.sgd(lr=LR), box_sgd),
    "momentum": (server.momentum(lr=LR, momentum=B1), box_momentum),
    "nesterov": (server.momentum(lr=LR, momentum=B1, nesterov=True), lambda x, gs: box_momentum(x, gs, nesterov=True)),
    "adam": (server.adam(**MOMENTS), box_adam),
    "adamw": (server.adamw(**MOMENTS, weight_decay=0.4), lambda x, gs: box_adam(x, gs, decay=0.4)),
    "adagrad": (server.adagrad(lr=LR, eps=EPS), box_adagrad),
    "yogi": (server.yogi(**MOMENTS), lambda x, gs: box_adam(x, gs, yogi=True)),
}
OPTIMIZERS = {name: optimizer for name, (optimizer, _) in BOXES.items()}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def test_every_optimizer_has_a_row():
    assert {type(optimizer).__name__ for optimizer in OPTIMIZERS.values()} | {"averaged", "recent"} == set(server.__all__)


@pytest.mark.parametrize("name", BOXES)
def test_equals_its_box(name):
    optimizer, box = BOXES[name]
    path, _ = run(optimizer, updates(), start())
    us = torch.stack(updates())
    expected = [list(box(float(start()[i]), [-float(u) for u in us[:, i]])) for i in range(D)]
    torch.testing.assert_close(path, torch.tensor(expected, dtype=torch.float64).T, rtol=1e-12, atol=1e-12)


def test_the_boxes_differ():
    paths = [run(optimizer, updates(), start())[0] for optimizer in OPTIMIZERS.values()]
    assert len(torch.unique(torch.stack(paths)[:, -1], dim=0)) == len(paths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fedavg_adds_the_update_exactly(dtype):
    x, state = start(dtype), {}
    for u in updates(dtype):
        new, state = server.sgd().step(x, u, state)
        assert torch.equal(new, x + u) and state == {}
        x = new


@each_optimizer
def test_a_step_is_pure(optimizer):
    x, state = start(), optimizer.init(start())
    for u in updates():
        kept = clone({"x": x, "u": u, "state": state})
        first, second = (optimizer.step(x, u, state) for _ in range(2))
        assert equal(kept, {"x": x, "u": u, "state": state}), "an input was changed"
        assert torch.equal(first[0], second[0]) and equal(first[1], second[1]), "something is kept elsewhere"
        x, state = first
    assert not x.requires_grad and all(
        isinstance(value, torch.Tensor) and not value.requires_grad for value in state.values()
    )


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_state_goes_on_in_every_bit(optimizer, dtype, tmp_path):
    whole, final = run(optimizer, updates(dtype), start(dtype))
    half, state = run(optimizer, updates(dtype)[:5], start(dtype))
    save_state(tmp_path / "s", {"x": half[-1], "opt": state}, {})
    back, _ = load_state(tmp_path / "s")
    rest, end = run(optimizer, updates(dtype)[5:], back["x"], back.get("opt", {}))
    assert torch.equal(torch.cat([half, rest]), whole) and equal(end, final)


@each_optimizer
def test_x_keeps_its_precision_whatever_the_aggregate_has(optimizer):
    """The mean is accumulated in float64; x and moments stay float32."""
    x = start(torch.float32)
    path, state = run(optimizer, updates(torch.float64), x)
    assert path.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in state.values() if value.dim())
    assert torch.equal(path, run(optimizer, [u.float() for u in updates()], x)[0])


@each_optimizer
def test_no_change_moves_nothing_at_the_start(optimizer):
    x, _ = optimizer.step(start(), torch.zeros(D, dtype=torch.float64), {})
    decay = getattr(optimizer, "weight_decay", 0.0)
    torch.testing.assert_close(x, start() * (1 - LR * decay), rtol=1e-15, atol=0)


def test_states_are_the_documented_ones():
    names = {
        "sgd": set(), "momentum": {"momentum_buffer"}, "nesterov": {"momentum_buffer"}, "adagrad": {"step", "sum"},
        "adam": {"step", "exp_avg", "exp_avg_sq"}, "adamw": {"step", "exp_avg", "exp_avg_sq"},
        "yogi": {"step", "exp_avg", "exp_avg_sq"},
    }  # fmt: skip
    assert {name: set(run(optimizer, updates(), start())[1]) for name, optimizer in OPTIMIZERS.items()} == names


def test_momentum_is_checked():
    for value in (0.0, 1.0, -0.5):
        with pytest.raises(ConfigError, match=rf"momentum: in \(0, 1\); got {value}"):
            server.momentum(momentum=value)


# -------------------------------------------------------------------------------------------------------- Yogi


def test_yogi_starts_like_adam_and_forgets_more_slowly():
    """First step alike; after large gradients s falls by at most (1 - b2) g^2 a step, where Adam's falls by (1 - b2) s."""
    big, small = torch.full((D,), 10.0), torch.full((D,), 0.1)
    first = [optimizer.step(start(), big.double(), {}) for optimizer in (server.yogi(**MOMENTS), server.adam(**MOMENTS))]
    torch.testing.assert_close(first[0][0], first[1][0], rtol=1e-12, atol=1e-12)
    later = [run(o, [big.double()] + [small.double()] * 9, start())[1] for o in (server.yogi(), server.adam())]
    assert (later[0]["exp_avg_sq"] > 1.05 * later[1]["exp_avg_sq"]).all()


def test_yogi_is_a_torch_optimizer():
    """A closure is evaluated with gradients on; a parameter without gradient stays."""
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Yogi([used, unused], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 2.0
    assert (used < 1).all() and torch.equal(unused, torch.ones(2)) and unused not in optimizer.state
