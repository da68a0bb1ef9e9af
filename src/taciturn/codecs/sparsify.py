"""A few of the values: at random with places from a shared seed, or the largest with their places.

Symbols: u [d]; k values are sent; p the probability of a value; word_i: draw i of the seed (random.bits), without its
last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from taciturn.core import kernel
from taciturn.core.errors import require
from taciturn.core.random import Key, fold
from taciturn.core.state import State
from taciturn.core.types import Payload
from taciturn.core.vector import Layout, Vector


def count_of(k: int | None, share: float, d: int) -> int:
    """k if it is given, else share of d; at least 1, at most d (0 of 0)."""
    return min(d, max(1, math.floor(share * d) if k is None else k))


def check_count(name: str, field: str, k: int | None, share: float) -> None:
    """Errors: `ConfigError`."""
    require(k is None or k >= 1, f"{name}.{field}: at least 1 value; got {k}")
    require(0 < share <= 1, f"{name}.share: above 0 and at most 1; got {share}")


@dataclass(frozen=True, slots=True)
class sparsify:
    """C(u)_i = u_i b_i / p, b_i independent Bernoulli(p). Unbiased, omega = (1 - p) / p exactly.

    The seed says which values are sent (word_i below p 2^63), so places cost 8 bytes in all, and the count 4 more.
    Stateless. A vector that is not finite is sent whole, as NaN.
    """

    lossy: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    p: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.p <= 1, f"sparsify.p: above 0 and at most 1; got {self.p}")

    def message_bits(self, d: int) -> float:
        """32 p d + 96, expected."""
        return 32.0 * self.p * d + 96.0

    def omega(self, d: int) -> float:
        """(1 - p) / p."""
        return (1 - self.p) / self.p

    def linear_map(self, d: int) -> tuple[float, float, float]:
        """E C(u)C(u)' = uu' + ((1 - p) / p) Diag(u^2)."""
        return 1.0, self.omega(d), 0.0

    def variance(self, u: Tensor) -> Tensor:
        """((1 - p) / p) u_i^2: [.., d] -> [.., d]."""
        return self.omega(u.shape[-1]) * u.double() ** 2

    def init(self, layout: Layout) -> tuple[State, State]:
        """No state on either side."""
        return {}, {}

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> {"seed": [] int64, "values": [d] float32, of which "values.count": [] int32 are sent}."""
        seed = fold(key, "sparsify")
        values, count = kernel.keep(u.float(), seed, self._threshold(seed), 1.0 / self.p, layout.d)
        return {"seed": seed, "values": values, "values.count": count}, tx

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """Values in their places, zeros elsewhere. Errors: `WireError` if there are more or fewer than the seed says."""
        seed = payload["seed"]
        sent = payload["values"], seed, self._threshold(seed), payload["values.count"]
        return kernel.spread(*sent, layout.d), rx

    def _threshold(self, seed: Key) -> Tensor:
        return torch.full_like(seed, kernel.fraction(self.p))


@dataclass(frozen=True, slots=True)
class rand_k:
    """C(u)_i = (d / k) u_i for k places drawn without replacement, else 0. Unbiased, omega = d / k - 1 exactly.

    The places are those of the k smallest words of the seed, so they cost 8 bytes in all. k: a number, or `share` of d,
    rounded down, at least 1. Stateless. A vector that is not finite arrives as NaN.
    """

    lossy: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    k: int | None = None
    share: float = 0.01

    def __post_init__(self) -> None:
        check_count("rand_k", "k", self.k, self.share)

    def message_bits(self, d: int) -> float:
        """32 k + 64."""
        return 32.0 * count_of(self.k, self.share, d) + 64.0

    def omega(self, d: int) -> float:
        """d / k - 1."""
        return d / count_of(self.k, self.share, d) - 1

    def linear_map(self, d: int) -> tuple[float, float, float]:
        """E C(u)C(u)' = (p2 uu' + (1 - p2) Diag(u^2)) / p1, p1 = k / d, p2 = (k - 1) / (d - 1)."""
        k = count_of(self.k, self.share, d)
        p1, p2 = k / d, (k - 1) / (d - 1) if d > 1 else 1.0
        return p2 / p1, (1 - p2) / p1, 0.0

    def init(self, layout: Layout) -> tuple[State, State]:
        """No state on either side."""
        return {}, {}

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> {"seed": [] int64, "values": [k] float32}."""
        seed, k = fold(key, "rand_k"), count_of(self.k, self.share, layout.d)
        values, _ = kernel.keep(u.float(), seed, kernel.threshold(seed, layout.d, k), layout.d / k, k)
        return {"seed": seed, "values": values}, tx

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """Values in their places, zeros elsewhere."""
        seed, values = payload["seed"], payload["values"]
        edge = kernel.threshold(seed, layout.d, values.shape[-1])
        return kernel.spread(values, seed, edge, torch.full_like(seed, values.shape[-1]), layout.d), rx


@dataclass(frozen=True, slots=True)
class top_k:
    """C(u)_i = u_i for the k largest magnitudes (of equals the first), else 0. Biased, omega = 1 - k / d.

    Places cost about log2(d / k) + 2 bits each (Elias and Fano: the low l bits of each, and the high parts in unary, a bit
    vector of k + d / 2^l). k: a number, or `share` of d, but no fewer than `least` (or d), so that what is sent of a small
    vector is not all frame. Stateless; use it under `error_feedback` or `ef21`. NaN is largest.
    """

    lossy: ClassVar[bool] = True
    unbiased: ClassVar[bool] = False
    k: int | None = None
    share: float = 0.01
    least: int = 1

    def __post_init__(self) -> None:
        check_count("top_k", "k", self.k, self.share)
        require(self.least >= 1, f"top_k.least: at least 1 value; got {self.least}")

    def message_bits(self, d: int) -> float:
        """32 k, and k (l + 1) + d / 2^l for the places."""
        k = self._count(d)
        low = _low_bits(k, d)
        return 8.0 * (4 * k + 1 + math.ceil(k * low / 8) + math.ceil((k + (d - 1 >> low) + 1) / 8))

    def omega(self, d: int) -> float:
        """1 - k / d."""
        return 1 - self._count(d) / d

    def init(self, layout: Layout) -> tuple[State, State]:
        """No state on either side."""
        return {}, {}

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> {"values": [k] float32, "low": [k] int32 of "low.width" bits, "high": [k + (d - 1 >> l) + 1] bool}."""
        k = self._count(layout.d)
        values, places = kernel.largest(u.float(), k)
        return {"values": values} | _elias_fano(places, layout.d), tx

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """Values in their places, zeros elsewhere. Errors: `WireError` for places that are not there or do not rise."""
        return kernel.put(payload["values"], _places(payload, layout.d), layout.d), rx

    def _count(self, d: int) -> int:
        return min(d, max(self.least, count_of(self.k, self.share, d)))


def _low_bits(k: int, d: int) -> int:
    return max(0, math.floor(math.log2(d / k)))


def _elias_fano(places: Tensor, d: int) -> Payload:
    """Rising places [k] of 0..d-1 -> their low bits, and a bit vector with a one at (place >> l) + rank."""
    k = places.shape[-1]
    width = _low_bits(k, d)
    ones = (places >> width) + torch.arange(k, device=places.device)
    high = torch.zeros(k + (d - 1 >> width) + 1, dtype=torch.bool, device=places.device)
    low = (places & ((1 << width) - 1)).to(torch.int32)
    return {
        "low": low,
        "low.width": torch.tensor(width, dtype=torch.uint8, device=places.device),
        "high": high.scatter(-1, ones, torch.ones_like(ones, dtype=torch.bool)),
    }


def _places(payload: Payload, d: int) -> Tensor:
    """The inverse; a bit vector that does not hold k ones gives places that are out of range."""
    low, high = payload["low"].to(torch.int64), payload["high"]
    k = low.shape[-1]
    rank = high.to(torch.int64).cumsum(-1)
    upper = torch.arange(high.shape[-1], device=high.device) - (rank - 1)
    slot = torch.where(high, rank - 1, k).clamp(max=k)
    found = torch.full((k + 1,), d, device=high.device).scatter(-1, slot, upper)[..., :k]
    places = (found << _low_bits(k, d)) + low
    return torch.where(rank[..., -1] == k, places, d)
