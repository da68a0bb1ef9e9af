"""LoraAggregation: factors by taciturn's operators, all else by the strategy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dropin.nodes import grid_of, numpy_of, ordered, record_of, same
from taciturn import codecs
from taciturn.aggregation import factors
from taciturn.aggregation.low_rank import low_rank
from taciturn.core.errors import ConfigError
from taciturn.core.types import OK, Block
from taciturn.core.vector import Layout
from taciturn.flower import Compressed, LoraAggregation, compress_mod
from taciturn.flower.lora import USABLE

strategies = pytest.importorskip("flwr.serverapp.strategy")
used = ordered
SETTINGS = {"min_train_nodes": 3, "min_evaluate_nodes": 3, "min_available_nodes": 3}
SHAPES = {"q.lora_A{}.weight": (2, 5), "q.lora_B{}.weight": (4, 2), "head.bias": (3,), "v.lora_A{}.weight": (2, 3),
          "v.lora_B{}.weight": (6, 2)}  # fmt: skip
NAMED = ("", ".default")


def adapters(name: str = ""):
    rng = np.random.default_rng(7)
    return record_of({key.format(name): rng.normal(size=s).astype(np.float32) for key, s in SHAPES.items()})


def local(node, x):
    """Each client's own factors, near the model's."""
    rng = np.random.default_rng(node)
    return {n: (one + 0.3 * rng.normal(size=one.shape)).astype(np.float32) for n, one in x.items()}


def own(operator: str, x: dict[str, np.ndarray], state) -> tuple[dict[str, np.ndarray], object]:
    """A round of taciturn's aggregator on the same factors."""
    names = [name for name in x if "lora" in name]
    layout, rule = Layout(tuple(names), tuple(x[n].shape for n in names)), low_rank(operator)
    flat = layout.flatten({n: torch.from_numpy(x[n]) for n in names})
    state = rule.init(flat, torch.ones(3)) if state is None else state
    models = torch.stack([layout.flatten({n: torch.from_numpy(local(i, x)[n]) for n in names}) for i in (1, 2, 3)])
    weights, nothing = torch.tensor([11.0, 12.0, 13.0]), torch.zeros_like(models)
    block = Block(torch.arange(3), nothing, models, weights, layout, {}, torch.full((3,), OK))
    change, state = rule.finish(rule.add(rule.start(state, flat), block))
    views = layout.views((flat.double() + change.update).float())
    return {n: views[n].numpy() for n in names}, state


@pytest.mark.parametrize("operator", USABLE)
@pytest.mark.parametrize("name", NAMED)
def test_factors_are_those_of_taciturns_own_operator(operator, name):
    if name and operator != "product_svd":
        pytest.skip("the name of the adapter is nothing to the operator")
    grid = grid_of(train=local)
    found = LoraAggregation(strategies.FedAvg(**SETTINGS), operator).start(grid, adapters(name), num_rounds=3)
    x, state = {key.replace(name, ""): one for key, one in numpy_of(adapters(name)).items()}, None
    for _ in range(3):
        bias = np.asarray(sum(local(i, x)["head.bias"] * ((10 + i) / 36) for i in (1, 2, 3)))
        new, state = own(operator, x, state)
        x = {n: new.get(n, bias) for n in x}
    got = {key.replace(name, ""): one for key, one in numpy_of(found.arrays).items()}
    assert list(found.arrays) == list(adapters(name)) and not grid.errors()
    for key, one in x.items():
        np.testing.assert_allclose(got[key], one, rtol=1e-5, atol=1e-6)


def test_the_product_is_the_best_of_its_rank_and_the_rest_the_strategys():
    grid, one = grid_of(train=local), LoraAggregation(strategies.FedAdam(**SETTINGS), "product_svd")
    x = numpy_of(adapters())
    got = numpy_of(one.start(grid, adapters(), num_rounds=1).arrays)
    plain = numpy_of(strategies.FedAdam(**SETTINGS).start(grid_of(train=local), adapters(), num_rounds=1).arrays)
    assert np.array_equal(got["head.bias"], plain["head.bias"]), "the server optimizer has the head"
    for layer in ("q", "v"):
        b, a = ([torch.from_numpy(local(i, x)[f"{layer}.lora_{s}.weight"]) for i in (1, 2, 3)] for s in "BA")
        mean = sum(w / 36 * b_i.double() @ a_i.double() for w, b_i, a_i in zip((11, 12, 13), b, a, strict=True))
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        best = (u[:, :2] * s[:2] @ v[:2]).numpy()
        np.testing.assert_allclose(got[f"{layer}.lora_B.weight"] @ got[f"{layer}.lora_A.weight"], best, atol=1e-4)
    assert one.told[0]["q"]["product"] > 0


def test_clients_and_evaluation_have_all_arrays_and_codecs_go_around():
    seen, codec = [], codecs.identity()
    grid, other = grid_of(compress_mod(codec), train=local), grid_of(train=local)
    coded = Compressed(LoraAggregation(strategies.FedAvg(**SETTINGS)), codec)
    plain = LoraAggregation(strategies.FedAvg(**SETTINGS))
    a = coded.start(grid, adapters(), num_rounds=2, evaluate_fn=lambda round, arrays: seen.append(list(arrays)))
    b = plain.start(other, adapters(), num_rounds=2)
    assert same(a.arrays, b.arrays) and seen == [list(adapters())] * 3
    assert a.evaluate_metrics_clientapp == b.evaluate_metrics_clientapp
    assert all(list(m.content["arrays"]) == list(adapters()) for m in other.sent)


def test_adapters_alone_are_enough():
    arrays = record_of({n: one for n, one in numpy_of(adapters()).items() if "lora" in n})
    found = LoraAggregation(strategies.FedAvg(**SETTINGS), "tangent").start(grid_of(train=local), arrays, num_rounds=1)
    x = numpy_of(arrays)
    held = [[torch.from_numpy(local(i, x)[f"q.lora_{s}.weight"]) for s in "BA"] for i in (1, 2, 3)]
    b, a = factors.tangent([tuple(pair) for pair in held], torch.tensor([11.0, 12.0, 13.0], dtype=torch.float64) / 36)
    np.testing.assert_allclose(found.arrays["q.lora_B.weight"].numpy(), b.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.arrays["q.lora_A.weight"].numpy(), a.numpy(), rtol=1e-5, atol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="did you mean 'product_svd'"):
        LoraAggregation(strategies.FedAvg(), "product_svx")
    with pytest.raises(ConfigError, match="fedex changes what stays on the clients"):
        LoraAggregation(strategies.FedAvg(), "fedex")
    with pytest.raises(ConfigError, match="no array is named as peft's factors"):
        LoraAggregation(strategies.FedAvg()).start(grid_of(), record_of({"w": np.zeros(2, np.float32)}))
    missing = grid_of(train=lambda node, x: {"head.bias": x["head.bias"]})
    with pytest.raises(ConfigError, match=r"node 1 sent no q\.lora_A"):
        LoraAggregation(strategies.FedAvg(**SETTINGS)).start(missing, adapters(), num_rounds=1)
