"""The symmetric quantizer of weights: one scale for each output channel, the largest magnitude on the outermost level.

    Q(w)_rj = s_r k_rj,  k_rj = round(w_rj / s_r),  s_r = max_j |w_rj| / L,  s_r = 1 for a row of zeros

Symbols: w [o, i, ..] a weight, rows r of its first axis; b bits; L = 2^(b-1) - 1 levels on each side of zero; codes k in
-L .. L, so nothing is ever clipped. Training, the deployed model, the frozen base of adapters and exported files use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taciturn.core.errors import require

LEAST = 16  # features of a layer on either side


def levels(bits: int) -> int:
    """L = 2^(b-1) - 1; 0 bits: 0, no quantization. Errors: `ConfigError` for 1 bit, which leaves zero alone.

    >>> levels(8), levels(2), levels(0)
    (127, 1, 0)
    """
    require(bits == 0 or 2 <= bits <= 8, f"precision: 2 to 8 bits, or 0 for none; got {bits}")
    return 2 ** (bits - 1) - 1 if bits else 0


def applies(shape: Sequence[int]) -> bool:
    """True for weights of layers with 16 features or more on both sides; first and depthwise convolutions stay float.

    >>> applies((64, 32, 3, 3)), applies((64, 3, 3, 3)), applies((64,))
    (True, False, False)
    """
    return len(shape) > 1 and min(shape[:2]) >= LEAST


def scales(w: Tensor, levels: Tensor | int, axes: tuple[int, ...] | None = None) -> Tensor:
    """s [o, 1, ..]. axes: of one row, all but the first unless given. A scale below the normal numbers counts as zeros."""
    scale = w.abs().amax(axes or tuple(range(1, w.dim())), keepdim=True) / levels
    return torch.where(scale >= torch.finfo(w.dtype).tiny, scale, 1.0)


def quantized(w: Tensor, levels: Tensor, axes: tuple[int, ...] | None = None) -> Tensor:
    """Q(w) [o, ..] for any number of levels []; |Q(w) - w| <= s_r / 2. 0 levels: w. Five passes over w."""
    scale = scales(w, levels, axes)
    return torch.where(levels > 0, (w / scale).round_().mul_(scale), w)


def codes(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(k [o, ..] int8, s [o]) with k s = Q(w), bit for bit, for 2 to 8 bits."""
    scale = scales(w, levels(bits))
    return (w / scale).round_().to(torch.int8), scale.flatten()
