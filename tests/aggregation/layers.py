"""Cohorts of LoRA factors that tests share. Symbols: N clients, B_i [m, r_i], A_i [r_i, n], w_i, M = sum w_i B_i A_i."""

from __future__ import annotations

import torch
from torch import Tensor

from taciturn import aggregation
from taciturn.core import random

KEY = random.key(3)


def part_of(operator: str, **fields) -> aggregation.low_rank:
    """The aggregator with this operator, and the rank that `fedex_trunc` needs."""
    return aggregation.low_rank(operator=operator, residual_rank=1 if operator == "fedex_trunc" else None, **fields)


def weights(clients: int, seed: int = 0) -> Tensor:
    """Unlike weights that sum to 1: [N] float64."""
    w = random.uniform(random.fold(random.key(seed), "weights"), clients).double() + 0.2
    return w / w.sum()


def cohort(
    m: int = 30,
    n: int = 20,
    ranks: tuple[int, ...] = (4,) * 6,
    eps: float = 0.1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    common: str = "",
) -> list[tuple[Tensor, Tensor]]:
    """Clients that left a common (B, A) of the largest rank by about eps in each factor; those in `common` did not move."""
    key = random.key(seed)
    step = {"B": 0.0 if "B" in common else eps, "A": 0.0 if "A" in common else eps}

    def factor(name: str, rows: int, columns: int, client: int) -> Tensor:
        start = random.normal(random.fold(key, name), rows, columns).double() / max(rows, columns) ** 0.5
        noise = random.normal(random.fold(key, name, client), rows, columns).double() / max(rows, columns) ** 0.5
        return start + step[name] * noise

    top = max(ranks)
    return [
        (factor("B", m, top, i)[:, :r].to(dtype), factor("A", top, n, i)[:r].to(dtype).contiguous())
        for i, r in enumerate(ranks)
    ]


def product(factors, w) -> Tensor:
    """M [m, n] in float64, the matrix that the library never forms."""
    return sum(float(v) * b.double() @ a.double() for (b, a), v in zip(factors, w, strict=True))


def dense(pair) -> Tensor:
    """P Q [m, n] in float64."""
    return pair[0].double() @ pair[1].double()


def best(matrix: Tensor, rank: int) -> Tensor:
    """[M]_r by a dense SVD."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]
