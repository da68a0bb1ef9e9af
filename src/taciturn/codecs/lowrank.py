"""Matrices as products of two thin ones.

Symbols: a tensor of the model as a matrix W [n, m] (first axis by all others); r its rank; P [n, r], Q [m, r].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from taciturn.core import random
from taciturn.core.errors import require
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Payload
from taciturn.core.vector import Layout, Vector


@dataclass(frozen=True, slots=True)
class lowrank:
    """PowerSGD: P = orth(W Q), Q <- W' P, C(W) = P Q'. One power iteration, from the last Q. Biased, omega = 1.

    A tensor whose factors would be no smaller (vectors, biases) is sent as it is. 4 r (n + m) bytes a matrix.
    On the client: Q of each matrix (warm start); columns that died are drawn anew. Use it under `error_feedback` or `ef21`.
    Source: Vogels et al. 2019, algorithms 1 and 2. Departure: each client has its own Q, where PowerSGD averages P and Q.
    """

    lossy: ClassVar[bool] = True
    unbiased: ClassVar[bool] = False
    rank: int = 4

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lowrank.rank: at least 1; got {self.rank}")

    def message_bits(self, d: int) -> float:
        """32 d: one tensor of d values is a vector. A matrix costs 32 r (n + m)."""
        return 32.0 * d

    def omega(self, d: int) -> float:
        """1: a projection never adds."""
        return 1.0

    def init(self, layout: Layout) -> tuple[State, State]:
        """tx = {"q": {number of the matrix: [m, r]}}, rx = {}."""
        start = random.key(0)
        q = {name: random.normal(random.fold(start, name), m, self.rank) for name, (_, m) in self._matrices(layout).items()}
        return ({"q": q} if q else {}), {}

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> {"NUMBER/p": [n, r], "NUMBER/q": [m, r] of each matrix, "rest": the other values}."""
        matrices, rest = self._matrices(layout), []
        payload: Payload = {}
        kept: State = {}
        for i, part in enumerate(torch.split(u.float(), list(layout.sizes))):
            name = str(i)
            if name not in matrices:
                rest.append(part)
                continue
            w = part.view(matrices[name])
            p = torch.linalg.qr(w @ tx["q"][name])[0]
            q = w.mT @ p
            payload |= {f"{name}/p": p, f"{name}/q": q}
            kept[name] = _alive(q, random.normal(random.fold(key, "lowrank", name), *q.shape))
        return payload | ({"rest": torch.cat(rest)} if rest else {}), {"q": kept} if kept else {}

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """P Q' and the other values, in their order."""
        matrices, parts, at = self._matrices(layout), [], 0
        for i, size in enumerate(layout.sizes):
            if str(i) in matrices:
                parts.append((payload[f"{i}/p"] @ payload[f"{i}/q"].mT).flatten())
            else:
                parts.append(payload["rest"][at : at + size])
                at += size
        return torch.cat(parts), rx

    def _matrices(self, layout: Layout) -> dict[str, tuple[int, int]]:
        """(n, m) of the tensors that are sent as factors, by number."""
        found = {}
        for i, (shape, size) in enumerate(zip(layout.shapes, layout.sizes, strict=True)):
            n = shape[0] if len(shape) > 1 and size else 0
            if n and self.rank * (n + size // n) < size and self.rank <= min(n, size // n):
                found[str(i)] = (n, size // n)
        return found


def _alive(q: Tensor, fresh: Tensor) -> Tensor:
    """q [m, r] with columns that are (next to) zero or not finite replaced: a zero update must not end the search."""
    size = q.norm(dim=-2, keepdim=True)
    good = torch.isfinite(size) & (size > 1e-6 * size.nan_to_num().amax(-1, keepdim=True))
    return torch.where(good, q, fresh)
