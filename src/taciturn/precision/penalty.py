"""What a mode costs in accuracy, before and after it was measured.

    h_k = JS(p_k || p) / ln 2 in [0, 1],  p_k = (counts + 1) / (n_k + classes),  p = sum_k n_k p_k / sum_k n_k
    gap(ptq b) = 4^-(b-1),  gap(qat b) = 4^-(b-1) / 4,  gap(float) = 0        the prior: error ~ the square of a step
    d_k(m) = a_k (1 + kappa h_k) gap_k(m)

Symbols: K clients, C classes; counts [K, C]; h [K]; a [K] weights in the average, of sum 1; gaps [K, n_m]. After FedHQ
(arXiv 2505.11982): the idea of an analysis of the data; the formulas are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from taciturn.core.errors import require
from taciturn.precision.modes import Mode

TRAINED = 0.25  # gap of quantization-aware training, of that of quantization after it


def divergence(counts: Tensor) -> Tensor:
    """h [K] of label counts [K, C]: 0 where all clients have the same histogram, towards 1 where nothing is shared."""
    n = counts.double().sum(1, keepdim=True)
    p = (counts.double() + 1) / (n + counts.shape[1])
    mean = (n * p).sum(0) / n.sum() if bool(n.sum() > 0) else p.mean(0)
    middle = (p + mean) / 2
    js = (p * (p / middle).log()).sum(1) + (mean * (mean / middle).log()).sum(1)
    return (js / (2 * math.log(2))).clamp(0, 1)


def prior(mode: Mode) -> float:
    """The gap of a mode that nobody has measured.

    >>> prior(Mode("float32")), prior(Mode("float32", 2)), prior(Mode("qat", 2))
    (0.0, 0.25, 0.0625)
    """
    return (4.0 ** -(mode.bits - 1) if mode.bits else 0.0) * (TRAINED if mode.trained else 1.0)


def penalties(
    weights: Tensor, skew: Tensor, modes: Sequence[Mode], gaps: Tensor | None = None, kappa: float = 1.0
) -> Tensor:
    """d [K, n_m]. weights: samples or shares [K]; skew: h [K]; gaps [K, n_m]: the prior unless measured."""
    require(kappa >= 0, f"precision.kappa: at least 0; got {kappa}")
    gaps = torch.tensor([[prior(mode) for mode in modes]], dtype=torch.float64) if gaps is None else gaps.double()
    share = weights.double() / weights.double().sum()
    return (share * (1 + kappa * skew.double())).unsqueeze(1) * gaps
