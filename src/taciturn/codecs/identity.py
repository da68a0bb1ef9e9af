"""No compression.

Symbols: u [d] the vector, in the precision of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Payload
from taciturn.core.vector import Layout, Vector


@dataclass(frozen=True, slots=True)
class identity:
    """C(u) = u. 4 d bytes in float32. Stateless, lossless, omega = 0."""

    lossy: ClassVar[bool] = False
    unbiased: ClassVar[bool] = True

    def message_bits(self, d: int) -> float:
        """32 d."""
        return 32.0 * d

    def omega(self, d: int) -> float:
        """0."""
        return 0.0

    def linear_map(self, d: int) -> tuple[float, float, float]:
        """C(u)C(u)' = uu'."""
        return 1.0, 0.0, 0.0

    def init(self, layout: Layout) -> tuple[State, State]:
        """No state on either side."""
        return {}, {}

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> {"values": [d]}."""
        return {"values": u}, tx

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """{"values": [d]} -> [d]."""
        return payload["values"], rx
