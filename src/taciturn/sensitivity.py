"""What a client measures for a policy that learns: how much its model loses when it is quantized as it will be deployed.

    gap = L(Q(y), Q(v)) - L(y, v),  quantized = L(Q(y), Q(v)),  moved = |u| / |start|

L: loss of one local batch, the next one in the client's order; two forward passes. Symbols: y = start + u [d] after local
training, v [p] personal parameters; Q of precision/fake.py, at the levels of the "gap" knob.
"""

from __future__ import annotations

import torch

from taciturn.client import Work
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Batch, Record
from taciturn.core.vector import Vector
from taciturn.precision.fake import lowered

MEASURED = ("gap", "quantized", "moved")


def sensitivity(work: Work, held: State, local: State, u: Vector, batch: Batch, key: Key) -> Record:
    """{"gap", "quantized", "moved"} [] float32 of a client that has trained; pure, without a client axis."""
    split, start, levels = work.split, local["start"], local["knobs"]["gap"]
    y, v = split.layout.views(start + u), split.personal.views(local["solver"]["v"])

    def loss(y: Record, v: Record) -> torch.Tensor:
        return work.task.loss(work.params(held, y, v, split.buffers.views(local["b"])), batch, key)

    low = loss(lowered(y, levels), lowered(v, levels))
    moved = u.norm() / start.norm().clamp(min=torch.finfo(start.dtype).tiny)
    found = zip(MEASURED, (low - loss(y, v), low, moved), strict=True)
    return {name: value.detach().to(torch.float32) for name, value in found}
