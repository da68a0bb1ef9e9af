"""The weights that quantization-aware training sees: the quantizer Q of core/rounding.py, its bits as data.

The largest magnitude of a row lands on L, so nothing is ever clipped and the straight-through backward is the identity:
the gradient at w is that of the float model at Q(w). A client therefore quantizes the weights, and takes its gradient
there (client.py): no node of autograd and no module is changed.
`straight` is the same as a node, for models that are trained without engines.

Symbols: w [o, i, ..] a weight; levels [] L of this client, 0: Q(w) = w, bit for bit. Tensors of fewer than two axes (norms,
biases) and layers with fewer than 16 input or output features stay as they are. Q(w) is what `quantize(rounding =
"nearest", scale = "channel")` decodes to. After FedHQ (arXiv 2505.11982): the idea; the formulas are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taciturn.core.rounding import applies, quantized
from taciturn.core.rounding import levels as levels_of
from taciturn.core.types import Record

_LAYERS = ("linear", "conv1d", "conv2d", "conv3d")


def lowered(tensors: Record, levels: Tensor) -> Record:
    """Q of the named weights that it applies to."""
    return {name: quantized(t, levels) if applies(t.shape) else t for name, t in tensors.items()}


def deployed(tensors: Mapping[str, Tensor], bits: int) -> Record:
    """The parameters of the model that is deployed with b bits; 0: the tensors. Errors: `ConfigError`.

    Give parameters, not buffers: a table of positions is no weight.
    """
    device = next(iter(tensors.values()), torch.empty(0)).device
    return lowered(dict(tensors), torch.tensor(levels_of(bits), device=device))


class _Straight(torch.autograd.Function):
    """Forward fn(x, levels), backward the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, levels: Tensor, fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return fn(x, levels)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def straight(x: Tensor, levels: Tensor, fn: Callable[[Tensor, Tensor], Tensor] = quantized) -> Tensor:
    """fn(x) with the gradient of x."""
    found: Tensor = _Straight.apply(x, levels, fn)  # type: ignore[no-untyped-call]
    return found


@contextmanager
def inputs(levels: Tensor) -> Iterator[None]:
    """Inside, the layers whose weights are quantized also see Q of their inputs, with one scale for each sample's row.

    Linear layers: x [.., i] by rows of i; convolutions: x [b, c, ..] by samples (127 levels: 8 bits). It replaces
    `linear` and the convolutions of `torch.nn.functional`. Not for several threads at once.
    """
    before = {name: getattr(F, name) for name in _LAYERS}

    def seen(name: str) -> Callable[..., Tensor]:
        def layer(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
            if applies(weight.shape):
                rows = x.flatten(0, -2) if name == "linear" else x
                x = straight(rows, levels).view(x.shape)
            result: Tensor = before[name](x, weight, *rest, **options)
            return result

        return layer

    try:
        for name in _LAYERS:
            setattr(F, name, seen(name))
        yield
    finally:
        for name, fn in before.items():
            setattr(F, name, fn)
