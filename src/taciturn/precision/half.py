"""Matrix products in bfloat16, emulated in float32: one switch, as data.

    y = R(layer(R(x), R(w), R(b))),   R(x) = x rounded to bfloat16 (8 bits of significand, ties to even), kept in float32

and R of the gradient wherever R is passed backward: of y, x, w and b. Products of bfloat16 numbers are summed in float32,
so this is what a layer under `torch.autocast` computes, forward and backward, up to the order of the sums. Left out: the
operators between layers (activations, residual sums) and the products inside attention, which autocast rounds too; their
operands are results of layers, rounded here as there. It is no faster than float32: the simulator gives the numerics, the
clock of a fleet the time (experiment/simulated.py). The weights that are kept, and solvers, stay float32.

Symbols: on [] 1 or 0 of this client; 0: R(x) = x, bit for bit. Source: Kalamkar et al., A study of bfloat16 for deep
learning training, arXiv 1905.12322; torch.autocast's documentation for which operators.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from taciturn.precision.layers import Layer, around, through


def rounded(x: Tensor, on: Tensor) -> Tensor:
    """R(x); |R(x) - x| <= 2^-8 |x| for normal x.

    >>> rounded(torch.tensor([1.0, 1.003]), torch.tensor(1)).tolist()
    [1.0, 1.0]
    """
    return torch.where(on > 0, x.to(torch.bfloat16).to(x.dtype), x)


def both(x: Tensor, on: Tensor) -> Tensor:
    """R of x, and of its gradient."""
    return through(x, on, rounded, rounded)


def layer(plain: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, on: Tensor) -> Tensor:
    """y of a linear layer or a convolution."""
    return both(plain(both(x, on), both(weight, on), None if bias is None else both(bias, on)), on)


def products(on: Tensor) -> AbstractContextManager[None]:
    """Inside, layers compute in bfloat16 where it is on."""
    return around(lambda plain, x, weight, bias: layer(plain, x, weight, bias, on))
