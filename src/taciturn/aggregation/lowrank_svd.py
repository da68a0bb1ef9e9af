"""The leading singular triplets of M = X Y from its factors; the m x n matrix M is never formed.

Symbols: X [m, K], Y [K, n], both float32 or both float64; u_k [m], s_k, v_k [n] the triplets of M, s_1 >= s_2 >= ..; r the
rank asked for, at most min(m, n); ' is transpose. What has m or n rows is computed in the dtype of X; Grams and the
decompositions of small matrices in float64. Signs: the largest |entry| of each u_k is positive, whatever LAPACK returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from taciturn.core import random
from taciturn.core.errors import require, unknown
from taciturn.core.random import Key

Backend = Literal["core", "gram", "rsvd"]
FLAT = 0.9  # s_{r+1} / s_r above which random columns do not tell the r-th direction from the next
DEAD = 1e-5  # s_k / s_1 up to which a direction is rounding, not signal
_TWICE, _MOST = 2, 6  # power iterations of rsvd
_TINY = torch.finfo(torch.float64).tiny
_RESTS = 1e-6  # share of the energy that a turn may still add


@dataclass(frozen=True, slots=True)
class Triplets:
    """U [m, r], S [r] float64 (falling), V' [r, n]: [M]_r = U S V'; zeros where M has fewer than r directions."""

    u: Tensor
    s: Tensor
    vt: Tensor


def triplets(x: Tensor, y: Tensor, rank: int, key: Key, backend: Backend = "rsvd") -> Triplets:
    """The r leading triplets of X Y by one of three ways, equal up to rounding where s_r and s_{r+1} are apart.

    "core": exact, O((m + n) K^2 + K^3). "gram": GEMMs and one K x K eigh, for K up to about 100. "rsvd": O((m + n) K r),
    random columns from the key; goes over to core on a flat spectrum. ConfigError: shapes, dtypes, rank or backend.
    """
    require(
        x.ndim == y.ndim == 2 and x.shape[1] == y.shape[0],
        f"lora: X [m, K] and Y [K, n] must agree; got {list(x.shape)} and {list(y.shape)}",
    )
    require(
        x.dtype == y.dtype and x.dtype in (torch.float32, torch.float64),
        f"lora: factors of one dtype, float32 or float64; got {x.dtype} and {y.dtype}",
    )
    most = min(x.shape[0], y.shape[1])
    require(1 <= rank <= most, f"lora: rank from 1 to min(m, n) = {most}; got {rank}")
    if backend not in get_args(Backend):
        raise unknown("backend", backend, get_args(Backend), "lora")
    (x, a), (y, b) = _scaled(x), _scaled(y)
    found = rsvd(x, y, rank, key) if backend == "rsvd" else gram(x, y, rank) if backend == "gram" else core(x, y, rank)
    return Triplets(found.u, found.s * (a * b), found.vt)


def _scaled(factor: Tensor) -> tuple[Tensor, float]:
    """(factor / 2^k, 2^k), the largest value near 1, so that no square overflows; exact."""
    most = float(factor.abs().max()) if factor.numel() else 0.0
    if not 0 < most < math.inf or 1e-3 < most < 1e3:
        return factor, 1.0
    power = 2.0 ** math.floor(math.log2(most))
    return factor / power, power


def core(x: Tensor, y: Tensor, rank: int) -> Triplets:
    """X = Q1 R1, Y' = Q2 R2; SVD(R1 R2') = U S V'; then Q1 U, (Q2 V)'. The reference of the other two."""
    q1, r1 = torch.linalg.qr(x)
    q2, r2 = torch.linalg.qr(y.mT)
    u, s, vt = torch.linalg.svd(r1.double() @ r2.double().mT, full_matrices=False)
    return _settled(q1 @ u[:, :rank].to(x), s[:rank], vt[:rank].to(x) @ q2.mT, rank)


def gram(x: Tensor, y: Tensor, rank: int) -> Triplets:
    """X'X = Vx a Vx', YY' = Vy b Vy'; SVD(a^1/2 Vx' Vy b^1/2) = U S V'; then X Vx a^-1/2 U and V' b^-1/2 Vy' Y.

    Eigenvalues below 1e-12 of the largest are dropped, so a direction is found if sqrt(a_k) > 1e-6 sqrt(a_1). Float64
    throughout: in float32 a^-1/2 would amplify the rounding of X.
    """
    wide, long = x.double(), y.double()
    a, vx = _eigh(wide.mT @ wide)
    b, vy = _eigh(long @ long.mT)
    a, b = a.sqrt(), b.sqrt()
    u, s, vt = torch.linalg.svd(a.unsqueeze(1) * (vx.mT @ vy) * b, full_matrices=False)
    u = wide @ (vx @ (u[:, :rank] / a.clamp(min=_TINY).unsqueeze(1)))
    vt = ((vt[:rank] / b.clamp(min=_TINY)) @ vy.mT) @ long
    return _settled(u.to(x), s[:rank], vt.to(x), rank)


def rsvd(x: Tensor, y: Tensor, rank: int, key: Key) -> Triplets:
    """Z = orth(X Y Om), Om [n, 2r] Gaussian; twice Z <- orth(M M' Z); U S V' = SVD(Z' M), then Z U.

    Goes over to `core` where 2r columns are as many as M has directions, and where s_{r+1} > 0.9 s_r, unless s_{r+1} is
    rounding itself. More than two turns, up to six and then `core`, while a turn still adds 1e-6 to s_1^2 + .. + s_r^2: a
    long tail hides behind a gap at r, and what is left to gain is at most about twice what the last turn gained. Om
    belongs to the columns of Y, so the order of the clients does not matter.
    Source: Halko, Martinsson & Tropp 2011, algorithms 4.3 and 5.1. Departure: turns until the energy rests.
    """
    q = 2 * rank
    if q >= min(*x.shape, y.shape[1]):
        return core(x, y, rank)
    z = random.normal(random.fold(key, "columns"), y.shape[1], q).to(x)
    energy = torch.zeros((), dtype=torch.float64, device=x.device)
    for turn in range(_MOST + 1):
        z = torch.linalg.qr(x @ (y @ z))[0]
        t = y.mT @ (x.mT @ z)
        wide = t.double()
        squares, u = torch.linalg.eigh(wide.mT @ wide)
        before, energy = energy, squares[-rank:].sum()
        if turn >= _TWICE:
            s, u = squares.clamp(min=0).sqrt().flip(0), u.flip(1)
            if s[rank] > FLAT * s[rank - 1] and s[rank] > DEAD * s[0]:
                break
            if energy - before <= _RESTS * energy:
                s, u = s[:rank], u[:, :rank]
                vt = (wide @ (u / s.clamp(min=_TINY))).mT
                return _settled(z @ u.to(x), s, vt.to(x), rank)
        z = t
    return core(x, y, rank)


def product_norm(x: Tensor, y: Tensor) -> Tensor:
    """||X Y||: sqrt tr(X'X YY') by K x K Grams; by QR where they cancel to less than 1e-10. -> [] float64."""
    if not x.shape[1]:
        return x.new_zeros((), dtype=torch.float64)
    x, y = x.double(), y.double()
    terms = (x.mT @ x) * (y @ y.mT)
    square = terms.sum()
    if square > 1e-10 * terms.abs().sum():
        return square.sqrt()
    size: Tensor = (torch.linalg.qr(x)[1] @ torch.linalg.qr(y.mT)[1].mT).norm()
    return size


def _eigh(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [k] above 1e-12 of the largest and their vectors [K, k]; at least one."""
    values, vectors = torch.linalg.eigh(square)
    kept = values > 1e-12 * values[-1]
    kept[-1] = True
    return values[kept].clamp(min=0), vectors[:, kept]


def _settled(u: Tensor, s: Tensor, vt: Tensor, rank: int) -> Triplets:
    """Signs fixed by the largest |entry| of each u_k, and zeros up to the rank."""
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(u)
    u, vt, short = u * sign, vt * sign.mT, rank - len(s)
    if short > 0:
        u, vt = torch.cat([u, u.new_zeros(len(u), short)], 1), torch.cat([vt, vt.new_zeros(short, vt.shape[1])])
        s = torch.cat([s, s.new_zeros(short)])
    return Triplets(u, s, vt)
