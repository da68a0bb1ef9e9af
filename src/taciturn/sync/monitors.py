"""What a client says of its drift in a few bytes, and what the server makes of it.

    monitor   a client sends                  bytes     energy: the server's estimate of |mean drift|^2
    naive     |u|^2                           4         0
    linear    |u|^2, <xi, u>                  8         (mean <xi, u>)^2, xi a unit vector that all know
    sketch    |u|^2, sk(u) [m, b]             4 + 4 m b M2(mean sk(u)) / (1 + 1 / sqrt(b))
    exact     u                               4 d       |mean u|^2
    local     nothing; |u|^2 on the upload    4 a round 0

The variance of the models is estimated as H = S - energy, S = mean |u|^2. H >= Var for naive and linear (Cauchy-Schwarz),
= Var for exact, and >= Var with some probability for the sketch.
Symbols: u [d] drift of a client; K clients; weights [K] sum to 1; S, energy, H [] float64.
Source: FDA, arXiv 2405.20988, section 3; FDA-Opt, arXiv 2505.04535. Departures: the means are weighted as the aggregate is;
xi is the signs of the last mean drift over sqrt(d), so that it costs d / 8 bytes on the way down (its authors' clients take
part in every round and know it); the first one is drawn from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from taciturn.core import random
from taciturn.core.types import Payload
from taciturn.core.vector import Vector
from taciturn.sync import sketch as ams


@dataclass(frozen=True)
class Sizes:
    """Rows and columns of a sketch, and the seed that all clients share."""

    rows: int
    columns: int
    seed: int


@dataclass(frozen=True)
class Monitor:
    """say(u, signal, sizes) -> payload of a client; energy(payload [K, ..], weights [K], sizes) -> [] float64.

    bound: H is S, an upper bound of the variance, and thresholds are built from S too, not from the variance.
    """

    say: Callable[[Vector, Payload, Sizes], Payload]
    energy: Callable[[Payload, Tensor, Sizes], Tensor]
    bound: bool = False


def norm(u: Vector) -> Tensor:
    """|u|^2 [] float32."""
    return u.square().sum(-1, dtype=torch.float64).float()


def directions(seed: int, d: int) -> Tensor:
    """The first xi: random signs [d] bool."""
    return random.bits(random.fold(random.key(seed), "xi"), d) < 0


def _naive(u: Vector, signal: Payload, sizes: Sizes) -> Payload:
    return {"norm": norm(u)}


def _linear(u: Vector, signal: Payload, sizes: Sizes) -> Payload:
    along = torch.where(signal["xi"].to(u.device), u, -u).float().sum() / math.sqrt(u.shape[-1])
    return {"norm": norm(u), "along": along}


def _sketch(u: Vector, signal: Payload, sizes: Sizes) -> Payload:
    table = ams.table(sizes.seed, u.shape[-1], sizes.rows, sizes.columns).to(u.device)
    return {"norm": norm(u), "sketch": ams.sketch(u.float(), table, sizes.columns)}


def _exact(u: Vector, signal: Payload, sizes: Sizes) -> Payload:
    return {"drift": u.float()}


def _nothing(payload: Payload, weights: Tensor, sizes: Sizes) -> Tensor:
    return weights.new_zeros(())


def _along(payload: Payload, weights: Tensor, sizes: Sizes) -> Tensor:
    return (weights @ payload["along"].double()).square()


def _sketched(payload: Payload, weights: Tensor, sizes: Sizes) -> Tensor:
    mean = torch.tensordot(weights, payload["sketch"].double(), 1)
    return ams.energy(mean) / (1 + 1 / math.sqrt(sizes.columns))


def _mean(payload: Payload, weights: Tensor, sizes: Sizes) -> Tensor:
    return (weights @ payload["drift"].double()).square().sum()


MONITORS = {
    "naive": Monitor(_naive, _nothing, bound=True),
    "linear": Monitor(_linear, _along),
    "sketch": Monitor(_sketch, _sketched),
    "exact": Monitor(_exact, _mean),
    "local": Monitor(_naive, _nothing, bound=True),
}


def drifts(payload: Payload) -> Tensor:
    """|u|^2 of each client [K] float64."""
    if "norm" in payload:
        return payload["norm"].double()
    return payload["drift"].double().square().sum(-1)


def estimate(monitor: Monitor, payload: Payload, weights: Tensor, sizes: Sizes) -> Tensor:
    """H [] float64 >= 0, from those that are finite; NaN if there are none. weights [K], any scale; 0: not heard."""
    found = drifts(payload)
    good = torch.isfinite(found) & (weights > 0)
    share = torch.where(good, weights.double(), 0.0)
    share = share / share.sum()
    clean = {name: torch.where(good.view(-1, *(1,) * (t.dim() - 1)), t, 0.0) for name, t in payload.items()}
    return (share @ drifts(clean) - monitor.energy(clean, share, sizes)).clamp(min=0.0)
