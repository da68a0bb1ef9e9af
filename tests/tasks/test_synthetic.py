"""The drawn federation has the moments it states."""

from __future__ import annotations

import pytest
import torch

from taciturn.core.errors import ConfigError
from taciturn.tasks import data


def features(federation, client: int):
    rows = federation.train.rows.split(federation.train.sizes.tolist())[client]
    return federation.train.fields["input"][rows].double(), federation.train.fields["target"][rows].double()


@pytest.mark.parametrize("basis", ["identity", "haar"])
@pytest.mark.parametrize("shift", ["none", "covariate", "optimum"])
def test_moments_and_optima(basis, shift):
    source = data.least_squares(d=4, clients=3, samples=20_000, basis=basis, shift=shift, noise=0.5, central=0.0)
    federation, (roots, optima) = source.load(1), source.law(1)
    for i in range(3):
        x, y = features(federation, i)
        h = roots[i] @ roots[i].T
        assert torch.allclose(x.T @ x / len(x), h, atol=0.05)
        assert torch.allclose(torch.linalg.eigvalsh(h), 1 / torch.tensor([4.0, 3.0, 2.0, 1.0]).double())
        found = torch.linalg.lstsq(x, y).solution.squeeze(1)
        assert torch.allclose(found, optima[i], atol=0.05)
        assert float((y.squeeze(1) - x @ optima[i]).std()) == pytest.approx(0.5, rel=0.03)
    assert torch.allclose(optima.mean(0), torch.ones(4).double()) and bool((optima == 1).all()) == (shift != "optimum")
    assert bool((roots[0] == roots[1]).all()) == (shift != "covariate")


def test_same_seed_same_federation_and_parts():
    source = data.least_squares(d=3, clients=2, samples=50, central=0.2, test=0.25)
    one, two, other = source.load(5), source.load(5), source.load(6)
    assert torch.equal(one.train.fields["input"], two.train.fields["input"])
    assert not torch.equal(one.train.fields["input"], other.train.fields["input"])
    assert int(one.central.sizes[0]) == 20 and one.train.sizes.tolist() == [30, 30] and one.test.sizes.tolist() == [10, 10]
    assert one.kind == "regression" and one.outputs == 1 and one.train.fields["target"].shape == (100, 1)


@pytest.mark.parametrize("wrong", [{"d": 0}, {"samples": 0}, {"noise": -1.0}, {"central": 1.0}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        data.least_squares(**wrong)
