"""Rounding to a narrower float.

Symbols: u [d] float32; values [d] float16 or bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from taciturn.core import kernel
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Payload
from taciturn.core.vector import Layout, Vector


@dataclass(frozen=True, slots=True)
class cast:
    """C(u) = round-to-nearest-even(u) in float16 or bfloat16. 2 d bytes. Stateless, biased.

    Relative error of a normal value: at most 2^-11 (float16), 2^-8 (bfloat16). Finite values beyond +-65504 saturate in
    float16; NaN and infinity pass, so that the server sees them.
    """

    lossy: ClassVar[bool] = True
    unbiased: ClassVar[bool] = False
    dtype: Literal["float16", "bfloat16"] = "float16"

    def message_bits(self, d: int) -> float:
        """16 d."""
        return 16.0 * d

    def omega(self, d: int) -> float:
        """1, when all values underflow or saturate; 2^-22 (float16), 2^-16 (bfloat16) for normal values."""
        return 1.0

    def init(self, layout: Layout) -> tuple[State, State]:
        """No state on either side."""
        return {}, {}

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> {"values": [d] float16 or bfloat16}."""
        return {"values": kernel.narrow(u.float(), self.dtype == "bfloat16")}, tx

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """{"values": [d]} -> [d] float32."""
        return payload["values"].to(torch.float32), rx
