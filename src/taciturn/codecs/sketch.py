"""Random rotations and projections.

Symbols: u [d]; U a random rotation of R^d; h values are sent; Q [d, h] an orthonormal basis of a random subspace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from taciturn.codecs.quantize import quantize
from taciturn.codecs.sparsify import check_count, count_of, rand_k
from taciturn.core import kernel, random
from taciturn.core.errors import ConfigError, require
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Codec, Payload
from taciturn.core.vector import Layout, Vector

EXACT = 1 << 15  # h d up to which a projection is drawn value by value


@dataclass(frozen=True, slots=True)
class rotated:
    """C(u) = U' codec(U u), U u = H diag(s) u: random signs s, then Walsh and Hadamard's transform. As unbiased as
    the codec.

    It spreads u evenly over its values, so that quantization with one norm loses less. Blocks of powers of two, as many of
    `block` as fit, then the binary digits of the rest: nothing is padded. The codec sees one tensor of d values.
    8 bytes for the seed; the codec's state. Source: Suresh et al. 2017, section 4.
    """

    codec: Codec = field(default_factory=quantize)
    block: int = 4096

    def __post_init__(self) -> None:
        good = self.block >= 1 and self.block & (self.block - 1) == 0
        require(good, f"rotated.block: a power of two; got {self.block}")
        if isinstance(self.codec, rotated):
            raise ConfigError("rotated: the codec is rotated already; once is enough")

    @property
    def lossy(self) -> bool:
        """True: the way back rounds."""
        return True

    @property
    def unbiased(self) -> bool:
        """As the codec."""
        return self.codec.unbiased

    def message_bits(self, d: int) -> float:
        """The codec's, and 64."""
        return self.codec.message_bits(d) + 64.0

    def omega(self, d: int) -> float:
        """The codec's: a rotation keeps lengths. On most vectors the error is far below it."""
        return self.codec.omega(d)

    def init(self, layout: Layout) -> tuple[State, State]:
        """The codec's."""
        return self.codec.init(Layout.flat(layout.d))

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> {"rotation": [] int64} and the codec's payload."""
        seed = random.fold(key, "rotated")
        v = kernel.rotate(u.float(), seed, self.block, False)
        payload, tx = self.codec.encode(v, tx, key, layout=Layout.flat(layout.d), knobs=knobs)
        return {"rotation": seed} | payload, tx

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """The codec's vector, rotated back."""
        inner = {name: t for name, t in payload.items() if name != "rotation"}
        v, rx = self.codec.decode(inner, rx, layout=Layout.flat(layout.d))
        return kernel.rotate(v, payload["rotation"], self.block, True), rx


@dataclass(frozen=True, slots=True)
class sketch:
    """C(u) = (d / h) Q Q' u, Q an orthonormal basis of a random subspace of dimension h. Unbiased, omega = d / h - 1
    exactly.

    The h values Q' u are sent, and the seed of Q in 8 bytes. For h d <= 32,768 the subspace is uniform (QR of Gaussian
    draws); beyond, it is spanned by h rows of a randomised Hadamard transform (`rotated(rand_k(h))`), with the same
    mean and the same omega. h: a number, or `share` of d. Stateless. Not finite: NaN.
    """

    lossy: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    h: int | None = None
    share: float = 0.5

    def __post_init__(self) -> None:
        check_count("sketch", "h", self.h, self.share)

    def message_bits(self, d: int) -> float:
        """32 h + 64; 64 more for the fast one."""
        h = count_of(self.h, self.share, d)
        return 32.0 * h + (64.0 if h * d <= EXACT else 128.0)

    def omega(self, d: int) -> float:
        """d / h - 1."""
        return d / count_of(self.h, self.share, d) - 1

    def linear_map(self, d: int) -> tuple[float, float, float] | None:
        """E C(u)C(u)' for the uniform subspace, and for the fast one where d is a power of two (one block); else None.

        Uniform: (d/h)^2 [(a - b) uu' + b |u|^2 I], a = h (h + 2) / (d (d + 2)), b = h (d - h) / (d (d - 1) (d + 2)).
        Fast: (p2 uu' + (1 - p2) W) / p1, W = |u|^2 I / d + (2 / d) (uu' - Diag(u^2)), p1 = h / d, p2 = (h - 1) / (d - 1).
        """
        h = count_of(self.h, self.share, d)
        if h == d:
            return 1.0, 0.0, 0.0
        if h * d <= EXACT:
            a, b = h * (h + 2) / (d * (d + 2)), h * (d - h) / (d * (d - 1) * (d + 2))
            return (d / h) ** 2 * (a - b), 0.0, (d / h) ** 2 * b
        if d & (d - 1):
            return None
        p1, p2 = h / d, (h - 1) / (d - 1)
        rest = (1 - p2) / p1
        return p2 / p1 + rest * 2 / d, -rest * 2 / d, rest / d

    def init(self, layout: Layout) -> tuple[State, State]:
        """No state on either side."""
        return {}, {}

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> {"values": [h] float32, "seed": [] int64}; the fast one also "rotation": [] int64."""
        d = layout.d
        h = count_of(self.h, self.share, d)
        if h * d > EXACT:
            return _fast(h, d).encode(u, tx, key, layout=layout, knobs=knobs)
        seed = random.fold(key, "sketch")
        return {"seed": seed, "values": (_basis(seed, d, h) * u.float().unsqueeze(-1)).sum(-2)}, tx

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """(d / h) Q values -> [d]."""
        d = layout.d
        h = count_of(self.h, self.share, d)
        if h * d > EXACT:
            return _fast(h, d).decode(payload, rx, layout=layout)
        return (_basis(payload["seed"], d, h) * payload["values"]).sum(-1) * (d / h), rx


def _fast(h: int, d: int) -> rotated:
    """The subsampled randomised Hadamard transform, in one block as large as d allows."""
    return rotated(rand_k(k=h), block=1 << (d.bit_length() - 1))


def _basis(seed: Key, d: int, h: int) -> Tensor:
    """An orthonormal basis [d, h] of a uniform subspace."""
    q: Tensor = torch.linalg.qr(random.normal(seed, d, h))[0]
    return q
