"""Compressed vectors, many at once, for simulations: the library's codecs as they are, and O(d) draws with the same law.

Symbols: u [n, d] float32, one vector a row; generator of torch, from which all randomness comes, also the codecs' keys.
A draw answers `draw(u, generator)` with C(u) [n, d], independent over rows; `linear_map(d)` (None: there is none)
and `omega(d)` are the codec's. Encoding calls a kernel for each row, and costs O(d h) for a projector,
O(d^2) for a Haar-random basis; a simulation of many small vectors needs the law alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from taciturn import codecs
from taciturn.advisor.moments import Map, sphere, stabilized_map
from taciturn.core.payload import nbytes
from taciturn.core.types import Codec
from taciturn.core.vector import Layout


class Draw(Protocol):
    """A compressor as simulations see it."""

    def draw(self, u: Tensor, generator: Generator) -> Tensor: ...

    def linear_map(self, d: int) -> Map | None: ...

    def omega(self, d: int) -> float: ...


@dataclass(frozen=True, slots=True)
class through:
    """A stateless codec of the library: decode(encode(u)) of every row under `torch.vmap`, each row with its own key."""

    codec: Codec

    def draw(self, u: Tensor, generator: Generator) -> Tensor:
        """u [n, d] -> C(u) [n, d]."""
        n, d = u.shape
        layout = Layout.flat(d)
        tx, rx = self.codec.init(layout)
        keys = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)

        def one(row: Tensor, key: Tensor) -> Tensor:
            payload, _ = self.codec.encode(row, tx, key, layout=layout, knobs={})
            return self.codec.decode(payload, rx, layout=layout)[0]

        compressed: Tensor = torch.vmap(one)(u, keys)
        return compressed

    def linear_map(self, d: int) -> Map | None:
        """The codec's."""
        stated = getattr(self.codec, "linear_map", None)
        return None if stated is None else stated(d)

    def omega(self, d: int) -> float:
        """The codec's."""
        return self.codec.omega(d)


def message_bytes(codec: Codec, d: int, messages: int = 20_000) -> float:
    """Mean bytes on the wire of a Gaussian vector of d values, without the frame's header; encoded, not estimated.

    A codec whose first 100 messages are of one size is taken to send no other.
    """
    layout, generator = Layout.flat(d), torch.Generator().manual_seed(0)
    tx, _ = codec.init(layout)
    keys = torch.randint(-(2**63), 2**63 - 1, (messages,), generator=generator)
    vectors = torch.randn(messages, d, generator=generator)

    def one(row: Tensor, key: Tensor) -> Tensor:
        return nbytes(codec.encode(row, tx, key, layout=layout, knobs={})[0])

    sizes = torch.vmap(one)(vectors[:100], keys[:100])
    return float((sizes if len(set(sizes.tolist())) == 1 else torch.vmap(one)(vectors, keys)).double().mean())


@dataclass(frozen=True, slots=True)
class in_law:
    """A codec of the library, drawn by its formula: identity, partial, sparsify, rand_k, quantize (l2 norm, one tensor,
    stochastic) and sketch (uniform). Errors: `TypeError` for other codecs: simulate those `through` their messages.

    sketch: (d/h) P u = (d/h) (r u + sqrt(r (1-r)) |u| v), r ~ Beta(h/2, (d-h)/2) as a ratio of sums of squares, v uniform
    on the unit sphere of u's complement: what the projector P on a uniform h-dimensional subspace does to u.
    """

    codec: Codec

    def __post_init__(self) -> None:
        codec, simple = self.codec, (codecs.identity, codecs.partial, codecs.sparsify, codecs.rand_k, codecs.sketch)
        if isinstance(codec, codecs.quantize):
            known = codec.norm == "l2" and codec.scale == "tensor" and codec.unbiased and codec.symbols % 2 == 1
        else:
            known = isinstance(codec, simple)
        if not known:
            raise TypeError(f"there is no draw in law for {codec}; use through(codec)")

    def draw(self, u: Tensor, generator: Generator) -> Tensor:
        """u [n, d] -> [n, d], with the law of C(u)."""
        codec, (n, d) = self.codec, u.shape
        if isinstance(codec, codecs.identity):
            return u
        if isinstance(codec, codecs.partial):
            return u * ((torch.rand(n, 1, generator=generator) < codec.p) / codec.p)
        if isinstance(codec, codecs.sparsify):
            return u * ((torch.rand(n, d, generator=generator) < codec.p) / codec.p)
        if isinstance(codec, codecs.quantize):
            return _quantized(u, (codec.symbols - 1) // 2, generator)
        h = round(d / (1 + codec.omega(d)))
        if isinstance(codec, codecs.rand_k):
            places = torch.rand(n, d, generator=generator).topk(h, dim=1).indices
            return torch.zeros_like(u).scatter_(1, places, u.gather(1, places) * (d / h))
        squares = torch.randn(n, d, generator=generator).square_()
        share = squares[:, :h].sum(1, keepdim=True) / squares.sum(1, keepdim=True)
        beside = _beside(u, (share * (1 - share)).clamp(min=0).sqrt(), generator)
        projected: Tensor = (d / h) * (share * u + beside)
        return projected

    def linear_map(self, d: int) -> Map | None:
        """The codec's."""
        return through(self.codec).linear_map(d)

    def omega(self, d: int) -> float:
        """The codec's."""
        return through(self.codec).omega(d)


def _quantized(u: Tensor, levels: int, generator: Generator) -> Tensor:
    """|u| sign(u_i) (floor r_i + Bernoulli(r_i - floor r_i)) / s, r_i = s |u_i| / |u|; 0 for 0."""
    norm = u.norm(dim=1, keepdim=True) / levels
    r = u.abs() / norm.clamp(min=1e-38)
    rounded = (r + torch.rand(u.shape, generator=generator)).floor_()
    compressed: Tensor = rounded * u.sign() * norm
    return compressed


@dataclass(frozen=True, slots=True)
class stabilized:
    """1-quantization in a Haar-random basis, U' Q(U u): q = Q(v) of a uniform unit vector v, then
    |u| (<v, q> u/|u| + sqrt(|q|^2 - <v, q>^2) v'), v' uniform on the unit sphere of u's complement.

    The library's `rotated(qsgd(1))` does nearly the same with a randomised Hadamard transform.
    """

    def draw(self, u: Tensor, generator: Generator) -> Tensor:
        """u [n, d] -> [n, d]."""
        v = torch.randn(u.shape, generator=generator)
        v = (v / v.norm(dim=1, keepdim=True)).abs_()  # signs make no difference to <v, q> and |q|
        q = (torch.rand(u.shape, generator=generator) < v).to(u.dtype)
        along = (v * q).sum(1, keepdim=True)
        size = (q.sum(1, keepdim=True) - along.square()).clamp(min=0).sqrt()
        compressed: Tensor = along * u + _beside(u, size, generator)
        return compressed

    def linear_map(self, d: int) -> Map | None:
        """See `moments.stabilized_map`."""
        return stabilized_map(d)

    def omega(self, d: int) -> float:
        """d E|u_1| - 1: the mean over bases, with equality for every u."""
        return d * sphere(d, 1) - 1


def _beside(u: Tensor, size: Tensor, generator: Generator) -> Tensor:
    """A uniform direction in u's complement, times size [n, 1] and |u|; 0 where u is 0 or d = 1."""
    if u.shape[1] == 1:
        return torch.zeros_like(u)
    z = torch.randn(u.shape, generator=generator)
    square = u.square().sum(1, keepdim=True)
    z = z - (z * u).sum(1, keepdim=True) / square.clamp(min=1e-38) * u
    beside: Tensor = z * (size * square.sqrt() / z.norm(dim=1, keepdim=True))
    return beside
