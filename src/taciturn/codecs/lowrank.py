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
    """PowerSGD: P = orth(W Q), Q <- W' P, C(W) = P Q'. `turns` power iterations, from the last Q. Biased, omega = 1.

    A tensor whose factors would be no smaller (vectors, biases) is sent as it is; 4 r (n + m) bytes a matrix. Columns are
    scaled so that those of P and Q have equal mean squares, |q_j| / sqrt(n m), which makes them one vector that may be
    encoded further: `chain(lowrank(rank=4), quantize(bits=3, scale="block"))`.
    On the client, if warm: Q of each matrix; columns that died are drawn anew. Use it under `error_feedback` or `ef21`. Not
    warm it keeps nothing and begins each time from the same Q, as the way down needs it; two or three turns then pay.
    Source: Vogels et al. 2019, algorithms 1 and 2. Departure: each client has its own Q, where PowerSGD averages P and Q.
    """

    lossy: ClassVar[bool] = True
    unbiased: ClassVar[bool] = False
    rank: int = 4
    turns: int = 1
    warm: bool = True

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lowrank.rank: at least 1; got {self.rank}")
        require(self.turns >= 1, f"lowrank.turns: at least 1; got {self.turns}")

    def message_bits(self, d: int) -> float:
        """32 d: one tensor of d values is a vector. A matrix costs 32 r (n + m)."""
        return 32.0 * d

    def omega(self, d: int) -> float:
        """1: a projection never adds."""
        return 1.0

    def init(self, layout: Layout) -> tuple[State, State]:
        """tx = {"q": {number of the matrix: [m, r]}} if warm, rx = {}."""
        q = self._start(layout) if self.warm else {}
        return ({"q": q} if q else {}), {}

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> {"values": P [n, r] and Q [m, r] of each matrix in turn, then the other values, in one vector}."""
        matrices, factors, rest = self._matrices(layout), [], []
        start, kept = tx["q"] if "q" in tx else self._start(layout), {}
        for i, part in enumerate(torch.split(u.float(), list(layout.sizes))):
            name = str(i)
            if name not in matrices:
                rest.append(part)
                continue
            w, q = part.view(matrices[name]), start[name]
            for _ in range(self.turns):
                p = torch.linalg.qr(w @ q)[0]
                q = w.mT @ p
            n, m = matrices[name]
            size = ((n / m) ** 0.5 * q.norm(dim=-2)).sqrt().clamp(min=torch.finfo(q.dtype).tiny)
            factors += [(p * size).flatten(), (q / size).flatten()]
            kept[name] = _alive(q, random.normal(random.fold(key, "lowrank", name), *q.shape))
        return {"values": torch.cat([*factors, *rest])}, {"q": kept} if kept and self.warm else {}

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """P Q' and the other values, in their order."""
        matrices = self._matrices(layout)
        ends = [self.rank * size for shape in matrices.values() for size in shape]
        whole = [size for i, size in enumerate(layout.sizes) if str(i) not in matrices]
        parts = iter(torch.split(payload["values"], ends + whole))
        found = {i: next(parts).view(n, -1) @ next(parts).view(m, -1).mT for i, (n, m) in matrices.items()}
        return torch.cat(
            [found[str(i)].flatten() if str(i) in found else next(parts) for i in range(len(layout.sizes))]
        ), rx

    def _start(self, layout: Layout) -> State:
        """The first Q of each matrix, the same for all."""
        root = random.key(0)
        return {i: random.normal(random.fold(root, i), m, self.rank) for i, (_, m) in self._matrices(layout).items()}

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
