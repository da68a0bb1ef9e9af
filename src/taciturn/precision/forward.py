"""What a client's forward pass computes with, by the knobs that it is told (policies.py): numbers, not branches.

    loss = f(Q(y), Q(v)) with every linear and convolutional layer        R(layer(R(Q'(x)), R(w), R(b)))

Q of "train" levels (fake.py), Q' of "inputs" levels, R by "bfloat16" (half.py); each is the identity, bit for bit, where
its knob is 0, and is not there where no knob of that name is told. A mode uses Q and Q', or R.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from taciturn.core.state import State
from taciturn.core.types import Record
from taciturn.precision import fake, half
from taciturn.precision.layers import Layer, around

KNOBS = ("train", "inputs", "bfloat16")  # those that change what a local step computes


def weights(tensors: Record, knobs: State) -> Record:
    """Q of the named weights that it applies to."""
    return fake.lowered(tensors, knobs["train"]) if "train" in knobs else tensors


def layers(knobs: State) -> AbstractContextManager[None]:
    """Inside, layers compute as they are told."""
    levels, on = knobs.get("inputs"), knobs.get("bfloat16")
    if levels is None and on is None:
        return nullcontext()

    def change(plain: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x if levels is None else fake.taken(x, weight, levels)
        return plain(x, weight, bias) if on is None else half.layer(plain, x, weight, bias, on)

    return around(change)
