"""The weights and inputs that quantization-aware training sees: the quantizer Q of core/rounding.py, its bits as data.

The largest magnitude of a row lands on L, so nothing is ever clipped and the straight-through backward is the identity:
the gradient at w is that of the float model at Q(w). A client therefore quantizes the weights, and takes its gradient
there (client.py): no node of autograd and no module is changed.
`straight` is the same as a node, for inputs, and for models that are trained without engines.

Symbols: w [o, i, ..] a weight; levels [] L of this client, 0: Q(w) = w, bit for bit. Tensors of fewer than two axes (norms,
biases) and layers with fewer than 16 input or output features stay as they are. Q(w) is what `quantize(rounding =
"nearest", scale = "channel")` decodes to. After FedHQ (arXiv 2505.11982): the idea; the formulas are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from taciturn.core.rounding import applies, quantized
from taciturn.core.rounding import levels as levels_of
from taciturn.core.types import Record
from taciturn.precision.layers import Told, around, through


def lowered(tensors: Record, levels: Tensor) -> Record:
    """Q of the named weights that it applies to."""
    return {name: quantized(t, levels) if applies(t.shape) else t for name, t in tensors.items()}


def deployed(tensors: Mapping[str, Tensor], bits: int) -> Record:
    """The parameters of the model that is deployed with b bits; 0: the tensors. Errors: `ConfigError`.

    Give parameters, not buffers: a table of positions is no weight.
    """
    device = next(iter(tensors.values()), torch.empty(0)).device
    return lowered(dict(tensors), torch.tensor(levels_of(bits), device=device))


def straight(x: Tensor, levels: Tensor, fn: Told = quantized) -> Tensor:
    """fn(x, levels) with the gradient of x."""
    return through(x, levels, fn, _as_it_is)


def _as_it_is(gradient: Tensor, levels: Tensor) -> Tensor:
    return gradient


def taken(x: Tensor, weight: Tensor, levels: Tensor) -> Tensor:
    """The input of a layer as it sees it: Q by rows where its weight is quantized, straight-through."""
    row = tuple(range(1 - weight.dim(), 0))  # [i] of a linear layer, [c, ..] of a convolution
    return straight(x, levels, partial(quantized, axes=row)) if applies(weight.shape) else x


def inputs(levels: Tensor) -> AbstractContextManager[None]:
    """Inside, the layers whose weights are quantized also see Q of their inputs, with one scale for each row.

    Linear layers: x [.., i] by rows of i; convolutions: x [b, c, ..] by samples (127 levels: 8 bits). By the shape of the
    weight alone, so frozen layers too: that is what a deployed model sees. 0: off, bit for bit.
    """
    return around(lambda plain, x, weight, bias: plain(taken(x, weight, levels), weight, bias))
