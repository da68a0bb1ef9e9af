"""Compression of what another codec made, without loss.

Symbols: u [d] the vector; the payload is the inner codec's, with one more byte.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from taciturn.codecs.quantize import quantize4
from taciturn.core.errors import require
from taciturn.core.payload import LOSSLESS
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Codec, Payload
from taciturn.core.vector import Layout, Vector

_CODERS = {"zstd": 1, "rans": 2}  # their numbers in a message


@dataclass(frozen=True, slots=True)
class lossless:
    """C(u) = the inner codec's C(u), its payload compressed when it is packed; one byte more where that does not help.

    coder: "zstd" finds what is repeated (equal rows, runs of zeros); "rans" comes closer to the entropy of codes of few
    bits and knows nothing else (docs/wire.md). State and errors of the inner codec. What is saved is known by packing.

    Departure: the sizes of the stacked engine and of one client at a time may differ by a few bytes, as their values differ
    by rounding.
    """

    codec: Codec = field(default_factory=quantize4)
    coder: Literal["zstd", "rans"] = "zstd"

    def __post_init__(self) -> None:
        require(self.coder in _CODERS, f"lossless.coder: {' or '.join(_CODERS)}; got {self.coder!r}")

    def __getattr__(self, name: str) -> Any:
        """What theory knows of the inner codec, where it knows it: linear_map, variance."""
        if name in ("linear_map", "variance"):
            return getattr(self.codec, name)
        raise AttributeError(f"lossless has no {name!r}")

    @property
    def lossy(self) -> bool:
        """As the inner codec."""
        return self.codec.lossy

    @property
    def unbiased(self) -> bool:
        """As the inner codec."""
        return self.codec.unbiased

    def message_bits(self, d: int) -> float:
        """At most: the inner codec's and 8."""
        return self.codec.message_bits(d) + 8

    def omega(self, d: int) -> float:
        """As the inner codec."""
        return self.codec.omega(d)

    def init(self, layout: Layout) -> tuple[State, State]:
        """The inner codec's state on both sides."""
        return self.codec.init(layout)

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> the inner payload with the marker "lossless"."""
        payload, tx = self.codec.encode(u, tx, key, layout=layout, knobs=knobs)
        return payload | {LOSSLESS: torch.tensor(_CODERS[self.coder], dtype=torch.uint8, device=u.device)}, tx

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """The inner codec's, without the marker."""
        inner = {name: tensor for name, tensor in payload.items() if name != LOSSLESS}
        return self.codec.decode(inner, rx, layout=layout)
