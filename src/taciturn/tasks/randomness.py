"""What a model does besides computing: dropout, other randomness, running statistics, coupling between samples.

Dropout (modules, `F.dropout`, attention dropout) is replaced by one whose masks are a hash of (client, step, call,
position), on every engine: while a model runs inside `keyed(key)`, torch's dropout functions are ours. Models that draw
in other ways are found by watching torch's generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taciturn.core import random
from taciturn.core.random import Key

_VF: Any = torch._VF
_attention = F.scaled_dot_product_attention


class _Stream:
    """The key of the running step, and how many dropouts it has served."""

    def __init__(self, key: Key) -> None:
        self.key, self.calls = key, 0

    def keep(self, shape: torch.Size, p: float, like: Tensor) -> Tensor:
        """Mask of this call: 1 / (1 - p) with probability 1 - p, else 0.

        With keys [m], the first axis holds the samples of m clients, one client after the other.
        """
        self.calls += 1
        key = random.fold(self.key, "dropout", self.calls)
        clients = key.numel()
        draw = random.uniform(key, shape[0] // clients, *shape[1:]).reshape(shape)
        return (draw >= p).to(like.dtype) / (1.0 - p) if p < 1 else torch.zeros(shape, dtype=like.dtype, device=like.device)

    def dropout(self, x: Tensor, p: float, train: bool) -> Tensor:
        return x * self.keep(x.shape, p, x) if train and p > 0 else x

    def dropout_(self, x: Tensor, p: float, train: bool) -> Tensor:
        return x.mul_(self.keep(x.shape, p, x)) if train and p > 0 else x

    def feature_dropout(self, x: Tensor, p: float, train: bool) -> Tensor:
        """Whole channels: one draw for x[n, c, ...]."""
        if not train or p == 0:
            return x
        shape = torch.Size((*x.shape[:2], *(1 for _ in x.shape[2:])))
        return x * self.keep(shape, p, x)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """softmax(q k' / sqrt(d) + mask) with dropout, times v: the reference of torch's documentation."""
        if dropout_p == 0.0:
            return _attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa:
            key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -math.inf)
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
        return self.dropout(torch.softmax(scores, -1), dropout_p, True) @ value


@contextmanager
def keyed(key: Key) -> Iterator[None]:
    """Inside, torch's dropout functions draw from the key. Not for several threads at once."""
    stream = _Stream(key)
    ours: dict[tuple[Any, str], Callable[..., Tensor]] = {
        (_VF, "dropout"): stream.dropout,
        (_VF, "dropout_"): stream.dropout_,
        (_VF, "feature_dropout"): stream.feature_dropout,
        (F, "scaled_dot_product_attention"): stream.attention,
    }
    before = {(place, name): getattr(place, name) for place, name in ours}
    try:
        for (place, name), fn in ours.items():
            setattr(place, name, fn)
        yield
    finally:
        for (place, name), fn in before.items():
            setattr(place, name, fn)


def changes_generator(run: Callable[[], object], device: torch.device) -> bool:
    """True if running draws from torch's global generator; the generator is put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
        run()
        after = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return not all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


def couples_samples(model: nn.Module) -> bool:
    """True if a sample's output depends on the others of its batch in training (BatchNorm without frozen statistics)."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules())
