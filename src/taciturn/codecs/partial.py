"""All or nothing: a client that takes part by chance, written as a codec.

Symbols: u [d]; p the probability that the message is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from taciturn.core import random
from taciturn.core.errors import require
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Payload
from taciturn.core.vector import Layout, Vector


@dataclass(frozen=True, slots=True)
class partial:
    """C(u) = u b / p, one b ~ Bernoulli(p) for the message. Unbiased, omega = (1 - p) / p exactly.

    1 byte, and 4 d with probability p. Stateless. A vector that is not finite is always sent.
    """

    lossy: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    p: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.p <= 1, f"partial.p: above 0 and at most 1; got {self.p}")

    def message_bits(self, d: int) -> float:
        """32 p d + 8, expected."""
        return 32.0 * self.p * d + 8.0

    def omega(self, d: int) -> float:
        """(1 - p) / p."""
        return (1 - self.p) / self.p

    def linear_map(self, d: int) -> tuple[float, float, float]:
        """E C(u)C(u)' = uu' / p."""
        return 1.0 / self.p, 0.0, 0.0

    def init(self, layout: Layout) -> tuple[State, State]:
        """No state on either side."""
        return {}, {}

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> {"values": [d] float32, "values.mask": [] bool}."""
        sent = (random.uniform(random.fold(key, "partial"), 1)[0] < self.p) | ~torch.isfinite(u.amax() - u.amin())
        return {"values": torch.where(sent, u.float() / self.p, 0.0), "values.mask": sent}, tx

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """The values, or zeros."""
        return torch.where(payload["values.mask"], payload["values"], 0.0), rx
