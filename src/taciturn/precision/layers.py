"""Where a forward pass is changed without touching a model: around the linear and convolutional layers.

    y = change(layer, x, w, b)        in place of        y = layer(x, w, b)

`around` replaces the functions of `torch.nn.functional` that such layers call, attention's projections included, while some
thread is inside; only threads that are inside see a change, and of several the inner one counts. Code that took a
function by another name before (`from torch.nn.functional import linear`), and products of other operators (`@`,
recurrent layers), are not seen. `through` is a node of autograd whose two directions are functions of numbers told.

Symbols: x [.., i] of a linear layer, [b, c, ..] or [c, ..] of a convolution; w [o, i, ..] its weight; b [o] or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Layer: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Change: TypeAlias = Callable[[Layer, Tensor, Tensor, Tensor | None], Tensor]
Told: TypeAlias = Callable[[Tensor, Tensor], Tensor]

CONVOLUTIONS = tuple(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))
NAMES = ("linear", *CONVOLUTIONS)

_CHANGE: ContextVar[Change | None] = ContextVar("change", default=None)
_LOCK = Lock()
_inside, _before = 0, dict[str, Any]()


@contextmanager
def around(change: Change) -> Iterator[None]:
    """Inside, and in this thread, layers compute `change(layer, x, w, b)`; torch's fused encoder layers are off."""
    _enter()
    token = _CHANGE.set(change)
    try:
        yield
    finally:
        _CHANGE.reset(token)
        _leave()


def _enter() -> None:
    global _inside
    with _LOCK:
        _inside += 1
        if _inside == 1:
            _before.update({name: getattr(F, name) for name in NAMES}, fast=torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)  # it would not call these functions
            for name in NAMES:
                setattr(F, name, _seen(_before[name]))


def _leave() -> None:
    global _inside
    with _LOCK:
        _inside -= 1
        if _inside == 0:
            torch.backends.mha.set_fastpath_enabled(_before["fast"])
            for name in NAMES:
                setattr(F, name, _before[name])


def _seen(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def layer(input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
        change = _CHANGE.get()
        if change is None:
            return plain(input, weight, bias, *rest, **options)
        return change(lambda x, w, b: plain(x, w, b, *rest, **options), input, weight, bias)

    return layer


class _Through(torch.autograd.Function):
    """Forward ahead(x, told), backward back(gradient, told)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, told: Tensor, ahead: Told, back: Told) -> Tensor:
        return ahead(x, told)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, told, _, ctx.back = inputs
        ctx.save_for_backward(told)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(gradients[0], ctx.saved_tensors[0]), None, None, None


def through(x: Tensor, told: Tensor, ahead: Told, back: Told) -> Tensor:
    """ahead(x, told), with the gradient back(g, told) for g of what it gives. told: numbers of this client."""
    found: Tensor = _Through.apply(x, told, ahead, back)  # type: ignore[no-untyped-call]
    return found
