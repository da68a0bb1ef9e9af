"""The two analyses: time by a roofline, and what a mode costs in accuracy."""

from __future__ import annotations

import math

import pytest
import torch

from taciturn.core.errors import ConfigError, UnknownName
from taciturn.precision import cost, penalty
from taciturn.precision.modes import MODES, levels, mode

DEVICE = cost.Device({"float32": 80e9, "bfloat16": 240e9}, bandwidth=20e9, up=1e6, down=2e6)
WIDE = [cost.Layer(1024, 384, 384)] * 3


def test_a_compute_bound_layer_follows_the_closed_form():
    plain, aware = (cost.step(WIDE, DEVICE, mode(name), inputs=True) for name in ("float32", "qat4"))
    assert aware / plain - 1 == pytest.approx(cost.overhead(80e9, 20e9, 1024, 384, inputs=True))
    assert plain == pytest.approx(3 * 6 * 1024 * 384 * 384 / 80e9)
    assert cost.step(WIDE, DEVICE, mode("ptq4")) == plain
    assert cost.step(WIDE, DEVICE, mode("bfloat16")) == pytest.approx(plain / 3)


def test_a_memory_bound_layer_is_bound_by_bytes():
    thin = [cost.Layer(1, 1000, 1000, operators=2)]
    slow = cost.Device({"float32": 1e15}, bandwidth=1e9, overhead=1e-3)
    assert cost.step(thin, slow, mode("float32")) == pytest.approx(12 * (2000 + 1e6) / 1e9 + 2e-3)
    ratio = cost.step(thin, cost.Device({"float32": 1e15}, 1e9), mode("qat8")) / (12 * (2000 + 1e6) / 1e9)
    assert ratio == pytest.approx(2.0, abs=0.01)  # at most twice, as one kernel moves 12 bytes a weight
    with pytest.raises(ConfigError, match="no rate for bfloat16; it has float32"):
        cost.step(thin, slow, mode("bfloat16"))


def test_a_round_counts_the_line():
    weights = 3 * 384 * 384
    sent = {name: cost.seconds(WIDE, DEVICE, mode(name), 0) for name in ("float32", "ptq8", "qat2")}
    assert sent["float32"] == pytest.approx(weights * 4 / 1e6 + weights * 4 / 2e6)
    assert sent["ptq8"] == pytest.approx(weights / 1e6 + weights * 4 / 2e6)
    assert sent["qat2"] == pytest.approx(weights / 4e6 + weights * 4 / 2e6)


def test_calibration_ends_at_the_ratio():
    factor = 1.0
    for _ in range(60):
        factor = cost.calibrated(factor, 3.0, 2.0)
    assert factor == pytest.approx(1.5)


def test_divergence_by_hand():
    same = penalty.divergence(torch.tensor([[5, 5], [50, 50]]))
    assert same.tolist() == [0.0, 0.0]
    counts = torch.tensor([[98, 0], [0, 98]])
    p = torch.tensor([0.99, 0.01]).double()
    m = (p + 0.5) / 2
    js = ((p * (p / m).log()).sum() + (0.5 * (0.5 / m).log()).sum()) / (2 * math.log(2))
    torch.testing.assert_close(penalty.divergence(counts), js.expand(2))
    assert float(penalty.divergence(torch.eye(1000) * 1e6).min()) > 0.98


def test_penalties_by_hand():
    found = penalty.penalties(torch.tensor([1, 3]), torch.tensor([0.0, 0.5]), [mode("float32"), mode("ptq2"), mode("qat2")])
    want = torch.tensor([[0, 0.25 / 4, 0.0625 / 4], [0, 1.5 * 0.75 * 0.25, 1.5 * 0.75 * 0.0625]]).double()
    torch.testing.assert_close(found, want)
    measured = torch.tensor([[0.0, 1.0, 2.0]]).expand(2, 3)
    found = penalty.penalties(torch.tensor([1, 1]), torch.zeros(2), [mode("float32")] * 3, measured)
    assert found[0].tolist() == [0.0, 0.5, 1.0]


def test_modes_have_names():
    assert [MODES[f"qat{b}"].trained for b in (2, 3, 4, 8)] == [1, 3, 7, 127] == [levels(b) for b in (2, 3, 4, 8)]
    with pytest.raises(
        UnknownName, match=r"method\.precision: there is no mode 'qat5'; did you mean .*Allowed: bfloat16, float32"
    ):
        mode("qat5", "method.precision")
    with pytest.raises(ConfigError, match="got 1"):
        levels(1)
