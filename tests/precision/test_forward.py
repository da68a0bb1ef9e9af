"""What a forward pass computes with: quantized inputs by definition and by hand, bfloat16 products beside autocast."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taciturn
from conftest import make_federation
from taciturn import Experiment, Method, Task, client, codecs, precision, solvers
from taciturn.client import Work
from taciturn.core import random
from taciturn.precision import fake, forward, half, layers

ZERO, ONE, TOP = (torch.tensor(n, dtype=torch.uint8) for n in (0, 1, 127))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return random.normal(random.key(seed), *shape)


def q(x, top, dims):
    """The definition: a scale for each row."""
    scale = x.abs().amax(dims, keepdim=True) / top
    return scale * torch.clip(torch.round(x / torch.where(scale == 0, 1.0, scale)), -top, top)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 20, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(20, 16, 2), nn.Flatten(), nn.Linear(16 * 49, 3)
    )


def encoder() -> nn.Module:
    block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(5 * 32, 3))


def sequences() -> nn.Module:
    return nn.Sequential(nn.Conv1d(16, 24, 3), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 3))


MODELS = {"mlp": (mlp, (20,)), "cnn": (cnn, (16, 6, 6)), "encoder": (encoder, (5, 32)), "sequences": (sequences, (16, 9))}


def built(name: str):
    make, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    x, target = normal(6, *shape, seed=1), torch.arange(6) % 3
    params = {name: t.detach() for name, t in model.named_parameters()}

    def loss(params, knobs):
        with forward.layers(knobs):
            return F.cross_entropy(torch.func.functional_call(model, params, (x,)), target)

    return model, x, target, params, loss


# ---------------------------------------------------------------------------------------------------------------- off


@pytest.mark.parametrize("name", MODELS)
def test_zero_is_off_bit_for_bit(name):
    *_, params, loss = built(name)
    plain = torch.func.grad_and_value(loss)(params, {})
    for knobs in ({"inputs": ZERO}, {"bfloat16": ZERO}, {"inputs": ZERO, "bfloat16": ZERO}):
        found = torch.func.grad_and_value(loss)(params, knobs)
        assert torch.equal(found[1], plain[1]) and all(torch.equal(g, plain[0][key]) for key, g in found[0].items())
    for knobs in ({"inputs": TOP}, {"bfloat16": ONE}):
        assert not torch.equal(loss(params, knobs), plain[1]), "and not zero is on"


@pytest.mark.parametrize("name", MODELS)
def test_each_client_of_a_block_has_its_own_knobs(name):
    *_, params, loss = built(name)
    knobs = {"inputs": torch.tensor([0, 7, 127, 0], dtype=torch.uint8), "bfloat16": torch.tensor([0, 0, 0, 1])}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        together = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, knobs)
        for i in range(4):
            alone = torch.func.grad(loss)(params, {key: value[i] for key, value in knobs.items()})
            for key, g in alone.items():
                far = 2e-2 if i else 1e-6  # a sum in another order may land on the other side of a rounding
                assert float((together[key][i] - g).norm()) <= far * float(g.norm()) + 1e-6, (key, i)


# ----------------------------------------------------------------------------------------------------- quantized inputs


@pytest.mark.parametrize("top", [1, 7, 127])
def test_a_step_by_hand(top):
    """Loss and gradients of three layers, the last one narrow: the float ones at Q(W), Q(x), passed straight through Q."""
    model, x, target, params, _ = built("mlp")
    w1, w2 = (q(params[f"{i}.weight"], 3, 1) for i in (0, 2))
    b1, b2, w3, b3 = params["0.bias"], params["2.bias"], params["4.weight"], params["4.bias"]
    x1 = q(x, top, 1)
    h1 = torch.tanh(x1 @ w1.T + b1)
    x2 = q(h1, top, 1)
    h2 = torch.tanh(x2 @ w2.T + b2)
    out = h2 @ w3.T + b3
    g3 = (out.softmax(1) - F.one_hot(target, 3)) / 6
    g2 = (g3 @ w3) * (1 - h2**2)
    g1 = (g2 @ w2) * (1 - h1**2)
    want = {"0.weight": g1.T @ x1, "0.bias": g1.sum(0), "2.weight": g2.T @ x2, "2.bias": g2.sum(0)}
    want |= {"4.weight": g3.T @ h2, "4.bias": g3.sum(0)}

    task = Task(lambda: model, make_federation(features=20)).build(0)
    method = Method(solver=solvers.sgd(lr=1.0))
    split = method.split(task.model, task.tracked)
    work = Work(task, split, method.solver, codecs.identity())
    knobs = {"train": torch.tensor(3, dtype=torch.uint8), "inputs": torch.tensor(top, dtype=torch.uint8)}
    local = client.begin(work, split.x0, work.newcomer() | {"knobs": knobs})
    batch = {"input": x, "target": target, "mask": torch.ones(6, dtype=torch.bool)}
    after = client.step(work, {"x": split.x0}, local, batch, random.key(0), torch.ones(()))
    moved = split.layout.views(split.x0 - after["solver"]["y"])
    for name, g in want.items():
        torch.testing.assert_close(moved[name], g, rtol=1e-4, atol=2e-7)
    torch.testing.assert_close(after["loss"], F.cross_entropy(out, target), rtol=1e-5, atol=0)


def test_rows_of_inputs_are_samples_whatever_their_shape():
    image, line, vector = normal(5, 16, 6, 6), normal(2, 3, 7, 20), normal(20)
    conv, linear, up = nn.Conv2d(16, 16, 3), nn.Linear(20, 16), nn.ConvTranspose2d(16, 17, 3)
    with fake.inputs(TOP):
        got = conv(image), conv(image[0]), linear(line), linear(vector), up(image)
    assert torch.equal(got[0], conv(q(image, 127, (1, 2, 3)))) and torch.equal(got[1], conv(q(image[0], 127, (0, 1, 2))))
    assert torch.equal(got[2], linear(q(line, 127, -1))) and torch.equal(got[3], linear(q(vector, 127, -1)))
    assert torch.equal(got[4], up(q(image, 127, (1, 2, 3))))
    assert torch.equal(F.linear(vector, linear.weight, linear.bias), linear(vector))


def test_the_deployed_model_is_measured_with_the_inputs_that_it_sees():
    task = Task(lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3)), make_federation(features=16))
    for mode in ("qat2", "ptq2"):
        result = taciturn.run(Experiment(task, Method(precision=precision.all(mode, inputs=2)), rounds=1))
        model, test = result.quantized(2), make_federation(features=16).central
        batch = test.fetch(torch.zeros(1, dtype=torch.int64), torch.arange(int(test.sizes[0]))[None])
        with torch.no_grad(), fake.inputs(ONE):
            right = F.cross_entropy(model(batch["input"][0]), batch["target"][0])
        assert result.history[0]["deployed"]["loss"] == pytest.approx(float(right), rel=1e-5)
        with torch.no_grad():
            assert float(F.cross_entropy(model(batch["input"][0]), batch["target"][0])) != pytest.approx(float(right))


# ------------------------------------------------------------------------------------------------------------ bfloat16


def test_rounding_is_that_of_the_type_in_both_directions():
    x, g = normal(40, 30).requires_grad_(), normal(40, 30, seed=2)
    y = half.both(x, ONE)
    y.backward(g)
    assert torch.equal(y, x.detach().bfloat16().float()) and torch.equal(x.grad, g.bfloat16().float())
    assert bool(((y - x).abs() <= 2.0**-8 * x.abs()).all())
    big = torch.tensor([3e38, -3.4e38])
    assert torch.equal(half.rounded(big, ZERO), big)


@pytest.mark.parametrize("shape", [(40, 64, 48), (7, 100, 10)])
def test_a_layer_is_that_of_autocast(shape):
    """Value and gradients: equal but where a float32 sum in another order falls on the other side of a rounding."""
    n, i, o = shape
    g = normal(n, o, seed=3)

    def run(context):
        x, w, b = normal(n, i).requires_grad_(), normal(o, i, seed=1).requires_grad_(), normal(o, seed=2).requires_grad_()
        with context:
            y = F.linear(x, w, b)
        y.backward(g.to(y.dtype))
        return y.detach().float(), x.grad, w.grad, b.grad

    mine, theirs = run(half.products(ONE)), run(torch.autocast("cpu", dtype=torch.bfloat16))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, one.bfloat16().float()), "what leaves a layer is in bfloat16"
        torch.testing.assert_close(one, other, rtol=2.0**-7, atol=1e-2)
        assert float((one != other).float().mean()) <= 0.05


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_autocast(name):
    """As near to autocast as autocast is to float32, or nearer; a float gradient at rounded weights would not be."""
    model, x, target, params, loss = built(name)

    def cast(params):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            return F.cross_entropy(torch.func.functional_call(model, params, (x,)), target)

    mine, value = torch.func.grad_and_value(loss)(params, {"bfloat16": ONE})
    theirs, other = torch.func.grad_and_value(cast)(params)
    assert float((value - other).abs()) <= 2.0**-7 * float(other)
    vectors = [torch.cat([g.flatten() for g in found.values()]) for found in (mine, theirs)]
    assert float((vectors[0] - vectors[1]).norm() / vectors[1].norm()) <= 2.0**-6


# -------------------------------------------------------------------------------------------------------------- the seam


def test_the_seam_closes_whatever_happens():
    before = {name: getattr(F, name) for name in layers.NAMES}
    fast = torch.backends.mha.get_fastpath_enabled()
    x, w = normal(4, 20), normal(16, 20, seed=1)
    with pytest.raises(RuntimeError, match="inside"), fake.inputs(TOP):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise RuntimeError("inside")
    with fake.inputs(TOP):
        once = F.linear(x, w)
        with fake.inputs(ONE):
            torch.testing.assert_close(F.linear(x, w), q(x, 1, 1) @ w.T, msg="the inner one counts")
        assert torch.equal(F.linear(x, w), once)
    assert {name: getattr(F, name) for name in layers.NAMES} == before
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_other_threads_see_nothing():
    x, w = normal(4, 20), normal(16, 20, seed=1)
    plain, found = F.linear(x, w), []
    with fake.inputs(ONE):
        thread = Thread(target=lambda: found.append(F.linear(x, w)))
        thread.start()
        thread.join()
        assert not torch.equal(F.linear(x, w), plain)
    assert torch.equal(found[0], plain)


def test_attention_in_evaluation_is_not_fused_past_the_seam():
    model, x, *_ = built("encoder")
    model.eval()
    with torch.no_grad(), fake.inputs(TOP):
        inside = model(x)
    with fake.inputs(TOP):
        assert torch.allclose(inside, model(x), atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(inside, model(x), atol=1e-6)
