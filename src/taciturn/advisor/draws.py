"""Compressed vectors, many at once, for simulations: the library's codecs, and O(d) draws that never form a message.

Symbols: u [n, d] float32, one vector a row; generator of torch, from which all randomness comes, also the codecs' keys.
A draw answers `draw(u, generator)` with C(u) [n, d], independent over rows; `linear_map(d)`, `omega(d)` and `bits(d)`
are the codec's. A projector on h random dimensions and a quantizer in a Haar-random basis need O(d h) and O(d^2) work to
encode; their law given u depends on |u| alone up to rotations about u, so O(d) draws have exactly that law.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from taciturn.advisor.moments import Map, projector_map, sphere, stabilized_map
from taciturn.core.types import Codec
from taciturn.core.vector import Layout


class Draw(Protocol):
    """A compressor as simulations see it."""

    def draw(self, u: Tensor, generator: Generator) -> Tensor: ...

    def omega(self, d: int) -> float: ...

    def bits(self, d: int) -> float: ...


@dataclass(frozen=True, slots=True)
class through:
    """A stateless codec of the library: decode(encode(u)) of every row under `torch.vmap`, each row with its own key."""

    codec: Codec

    def draw(self, u: Tensor, generator: Generator) -> Tensor:
        """u [n, d] -> C(u) [n, d]."""
        n, d = u.shape
        layout = Layout(("w",), ((d,),))
        tx, rx = self.codec.init(layout)
        keys = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)

        def one(row: Tensor, key: Tensor) -> Tensor:
            payload, _ = self.codec.encode(row, tx, key, layout=layout, knobs={})
            return self.codec.decode(payload, rx, layout=layout)[0]

        compressed: Tensor = torch.vmap(one)(u, keys)
        return compressed

    def omega(self, d: int) -> float:
        """The codec's."""
        return float(_of(self.codec).omega(d))

    def bits(self, d: int) -> float:
        """The codec's."""
        return float(_of(self.codec).bits(d))

    def linear_map(self, d: int) -> Map:
        """The codec's. Errors: `AttributeError` for a codec that has none."""
        a, b, c = _of(self.codec).linear_map(d)
        return float(a), float(b), float(c)


def _of(codec: Codec) -> Any:
    return codec


@dataclass(frozen=True, slots=True)
class projector:
    """(d/h) P u, P the projector on a uniform h-dimensional subspace: P u = r u + sqrt(r (1-r)) |u| v.

    r ~ Beta(h/2, (d-h)/2), drawn as a ratio of sums of squares; v uniform on the unit sphere of u's complement.
    """

    h: int

    def draw(self, u: Tensor, generator: Generator) -> Tensor:
        """u [n, d] -> [n, d]."""
        d = u.shape[1]
        squares = torch.randn(u.shape, generator=generator).square_()
        share = squares[:, : self.h].sum(1, keepdim=True) / squares.sum(1, keepdim=True)
        beside = _beside(u, (share * (1 - share)).clamp(min=0).sqrt(), generator)
        return (d / self.h) * (share * u + beside)

    def omega(self, d: int) -> float:
        """d/h - 1, with equality for every u."""
        return d / self.h - 1

    def bits(self, d: int) -> float:
        """h floats; the projector follows from a shared seed of 64 bits."""
        return 32.0 * self.h + 64

    def linear_map(self, d: int) -> Map:
        """See `moments.projector_map`."""
        return projector_map(d, self.h)


@dataclass(frozen=True, slots=True)
class stabilized:
    """1-quantization in a Haar-random basis, U' Q(U u): q = Q(v) of a uniform unit vector v, then
    |u| (<v, q> u/|u| + sqrt(|q|^2 - <v, q>^2) v'), v' uniform on the unit sphere of u's complement.
    """

    def draw(self, u: Tensor, generator: Generator) -> Tensor:
        """u [n, d] -> [n, d]."""
        v = torch.randn(u.shape, generator=generator)
        v = (v / v.norm(dim=1, keepdim=True)).abs_()  # signs make no difference to <v, q> and |q|
        q = (torch.rand(u.shape, generator=generator) < v).to(u.dtype)
        along = (v * q).sum(1, keepdim=True)
        size = (q.sum(1, keepdim=True) - along.square()).clamp(min=0).sqrt()
        return along * u + _beside(u, size, generator)

    def omega(self, d: int) -> float:
        """d E|u_1| - 1: the mean over bases, with equality for every u."""
        return d * sphere(d, 1) - 1

    def bits(self, d: int) -> float:
        """What QSGD sends, in expectation: a norm, and position and sign of d E|u_1| values at log2(d) + 1 bits."""
        return 32 + d * sphere(d, 1) * (torch.tensor(float(d)).log2().item() + 1)

    def linear_map(self, d: int) -> Map:
        """See `moments.stabilized_map`."""
        return stabilized_map(d)


def _beside(u: Tensor, size: Tensor, generator: Generator) -> Tensor:
    """A uniform direction in u's complement, times size [n, 1] and |u|; 0 where u is 0 or d = 1."""
    if u.shape[1] == 1:
        return torch.zeros_like(u)
    z = torch.randn(u.shape, generator=generator)
    square = u.square().sum(1, keepdim=True)
    z = z - (z * u).sum(1, keepdim=True) / square.clamp(min=1e-38) * u
    return z * (size * square.sqrt() / z.norm(dim=1, keepdim=True))
