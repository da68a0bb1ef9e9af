"""The quantizer is its definition, and what a client trains on is the float model at Q(w)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taciturn
from conftest import make_federation
from taciturn import Experiment, Method, Task, client, codecs, precision, solvers
from taciturn.client import Work
from taciturn.core import random
from taciturn.precision import cost, fake, penalty
from taciturn.precision.allocate import coarse
from taciturn.precision.modes import BITS, levels, mode


def weight(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return random.normal(random.key(5), *shape).to(dtype)


def definition(w, bits):
    top = 2 ** (bits - 1) - 1
    rows = w.flatten(1)
    scale = rows.abs().max(1, keepdim=True).values / top
    scale = torch.where(scale == 0, 1.0, scale)
    return (scale * torch.clip(torch.round(rows / scale), -top, top)).view_as(w), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", BITS)
def test_it_is_its_definition(bits, dtype):
    for w in (weight(40, 64, dtype=dtype), weight(16, 16, 3, 3, dtype=dtype), 1e-30 * weight(20, 20, dtype=dtype)):
        w[3] = 0.0
        want, scale = definition(w, bits)
        got = fake.quantized(w, torch.tensor(levels(bits)))
        assert torch.equal(got, want)
        assert bool(((got - w).abs().flatten(1) <= scale / 2 * (1 + 1e-6)).all())
        torch.testing.assert_close(fake.quantized(got, torch.tensor(levels(bits))), got, rtol=1e-6, atol=0)
        assert torch.equal(fake.quantized(w, torch.tensor(0)), w)


def test_rows_too_small_for_a_scale_are_zeros():
    assert fake.quantized(torch.full((16, 16), 1e-44), torch.tensor(127)).count_nonzero() == 0


def test_every_client_has_its_own_bits_under_vmap():
    w, bits = weight(4, 32, 20), torch.tensor([0, 1, 7, 127], dtype=torch.uint8)
    together = torch.vmap(fake.quantized)(w, bits)
    assert all(torch.equal(one, fake.quantized(w[i], bits[i])) for i, one in enumerate(together))
    grads = torch.vmap(torch.func.grad(lambda w, b: (fake.straight(w, b) ** 2).sum()))(w, bits)
    torch.testing.assert_close(grads, 2 * together)


def test_the_straight_through_gradient_is_the_float_one_at_the_quantized_weight():
    w, b, x = weight(24, 32).requires_grad_(), torch.tensor(3), random.normal(random.key(1), 5, 32)
    F.linear(x, fake.straight(w, b)).tanh().sum().backward()
    q = fake.quantized(w.detach(), b).requires_grad_()
    F.linear(x, q).tanh().sum().backward()
    assert torch.equal(w.grad, q.grad)


def test_a_step_of_a_client_is_that_of_the_float_model_at_the_quantized_weights():
    task = Task(lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3)), make_federation(features=16)).build(
        0
    )
    method = Method(solver=solvers.sgd(lr=0.5))
    split = method.split(task.model, task.tracked)
    work, one = Work(task, split, method.solver, codecs.identity()), torch.ones(())
    batch = {n: t[0] for n, t in task.train.fetch(torch.tensor([3]), torch.arange(8)[None]).items()}
    batch["mask"] = torch.ones(8, dtype=torch.bool)
    own = work.newcomer() | {"knobs": {"train": torch.tensor(3, dtype=torch.uint8)}}
    local = client.step(work, {"x": split.x0}, client.begin(work, split.x0, own), batch, random.key(0), one)
    q = {name: t.requires_grad_() for name, t in fake.deployed(split.layout.views(split.x0), 3).items()}
    assert not torch.equal(q["0.weight"], task.model[0].weight) and torch.equal(q["2.weight"], task.model[2].weight)
    task.loss(q, batch, random.key(0)).backward()
    moved = split.x0 - 0.5 * split.layout.flatten({name: t.grad for name, t in q.items()})
    torch.testing.assert_close(local["solver"]["y"], moved, rtol=0, atol=1e-7)


def test_inputs_are_quantized_by_rows():
    x, image = random.normal(random.key(2), 5, 7, 20), random.normal(random.key(3), 5, 16, 6, 6)
    linear, conv, narrow = nn.Linear(20, 16), nn.Conv2d(16, 16, 3), nn.Linear(20, 3)
    bits = torch.tensor(127)
    with fake.inputs(bits):
        got = linear(x), conv(image), narrow(x)
    assert torch.equal(got[0], linear(definition(x.flatten(0, 1), 8)[0].view_as(x)))
    assert torch.equal(got[1], conv(definition(image, 8)[0])) and torch.equal(got[2], narrow(x))
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    with fake.inputs(torch.tensor(0)):
        assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


def test_the_deployed_model_is_quantized_and_the_result_is_not():
    task = Task(lambda: nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 3)), make_federation(features=16))
    result = taciturn.run(Experiment(task, Method(precision=precision.all("qat2")), rounds=1))
    model = result.quantized(2)
    assert torch.equal(model[0].weight, definition(result.tensors["0.weight"], 2)[0])
    assert torch.equal(model[0].weight, fake.deployed(result.tensors, 2)["0.weight"])
    assert torch.equal(model[2].weight, result.tensors["2.weight"])
    assert not torch.equal(result.model[0].weight, model[0].weight)


def test_an_allocation_is_played():
    """Coarse stage, end to end: device times and penalties -> a mode for each client -> a run that records their bits."""
    names = ("ptq4", "qat4")
    layers = [cost.Layer(8, 16, 24)]
    fast, slow = (cost.Device({"float32": rate}, bandwidth=1e9) for rate in (1e8, 1e6))
    times = torch.tensor([[cost.seconds(layers, d, mode(n), 10) for n in names] for d in [slow, fast, fast, fast] * 2])
    d = penalty.penalties(torch.ones(8), torch.zeros(8), [mode(n) for n in names])
    found = coarse(times, d, 0.01, float(times[:, 0].max()))
    assert found.modes.tolist() == [0, 1, 1, 1] * 2
    method = Method(precision=precision.fixed(modes=tuple(names[m] for m in found.modes)), codec=codecs.quantize8())
    task = Task(lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3)), make_federation(features=16))
    line = taciturn.run(Experiment(task, method, rounds=1)).history[0]
    assert line["knobs"] == {"train": [7 * m for m in found.modes.tolist()], "send": [7] * 8}
