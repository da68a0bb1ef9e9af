"""The quantizer of the library: QSGD, TernGrad, sign and n-bit codes are its settings.

Symbols: u [d]; a segment of it with its norm; q symbols, h = (q - 1) / 2, radix = q - 1; step = norm / h, the
distance of two levels; the levels are (c - h) step for c = 0 .. q - 1; r = u_i / step + h; f = r - floor(r).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from taciturn.core import kernel
from taciturn.core.eager import by_value
from taciturn.core.errors import require
from taciturn.core.payload import GROUP
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Payload
from taciturn.core.vector import Layout, Vector


@dataclass(frozen=True, slots=True)
class quantize:
    """C(u)_i = (c_i - h) step, c_i = floor(r) + Bernoulli(f): unbiased; rounding = "nearest": c_i = round(r), biased.

    bits: 1 to 8, q = 2^bits - 1 levels with a zero among them (bits = 1: q = 2 without). levels: s >= 1 of each sign beside
    zero, q = 2 s + 1 <= 255. Neither: 4 bits. A symbol costs log2(q) bits and what packing loses (docs/wire.md).
    scale: a norm for each "tensor" of the model, for each "block" of `block` values, or for each "channel" (first axis).
    norm: "max" (largest magnitude), "l2" (QSGD), "mean" (mean magnitude, for nearest rounding; values beyond it are cut).
    Stateless; 4 bytes a segment and 1 more. A segment that is not finite arrives as NaN. With a policy of `precision` that
    sends, each client has bits of its own instead.

    omega for stochastic rounding, the exact supremum over u: with s = h and q odd, max norm (sqrt(1 + (d - 1) / s^2)
    - 1) / 2; l2 norm sqrt(d) / s - 1 for s <= sqrt(d) / 2, else d / (4 s^2). Source: Alistarh et al. 2017 (QSGD),
    section 3.1; Wen et al. 2017 (TernGrad); Karimireddy et al. 2019 (scaled sign). Departure: QSGD's entropy code is
    left to `lossless`.
    """

    lossy: ClassVar[bool] = True
    bits: int | None = None
    levels: int | None = None
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    scale: Literal["tensor", "block", "channel"] = "tensor"
    norm: Literal["max", "l2", "mean"] = "max"
    block: int = 256

    def __post_init__(self) -> None:
        require(self.bits is None or self.levels is None, "quantize: give bits or levels, not both")
        require(self.bits is None or 1 <= self.bits <= 8, f"quantize.bits: 1 to 8; got {self.bits}")
        require(self.levels is None or 1 <= self.levels <= 127, f"quantize.levels: 1 to 127; got {self.levels}")
        require(self.block >= 1, f"quantize.block: at least 1 value; got {self.block}")
        require(
            self.norm != "mean" or self.rounding == "nearest",
            'quantize: norm = "mean" cuts large values, so stochastic rounding would be biased; use norm = "max" or "l2"',
        )

    @property
    def unbiased(self) -> bool:
        """With stochastic rounding."""
        return self.rounding == "stochastic"

    @property
    def symbols(self) -> int:
        """q."""
        if self.levels is not None:
            return 2 * self.levels + 1
        bits = 4 if self.bits is None else self.bits
        return 2 if bits == 1 else 2**bits - 1

    def message_bits(self, d: int) -> float:
        """About d log2(q), 32 a segment, and 8: the symbols are packed in groups of whole bytes."""
        steps = math.ceil(d / self.block) if self.scale == "block" else 1
        symbols, size = GROUP[self.symbols]
        return 8.0 * size * d / symbols + 32.0 * steps + 8.0

    def omega(self, d: int) -> float:
        """The supremum for a segment of d values (blocks: of `block` values)."""
        d = min(d, self.block) if self.scale == "block" else d
        h = (self.symbols - 1) / 2
        if self.symbols % 2 == 0:
            nearest_sign = 1.0 if self.norm == "mean" else math.inf
            return min(d / (4 * h * h), nearest_sign)
        if self.rounding == "nearest":
            return 1.0
        if self.norm == "max":
            return (math.sqrt(1 + (d - 1) / (h * h)) - 1) / 2
        return math.sqrt(d) / h - 1 if h <= math.sqrt(d) / 2 else d / (4 * h * h)

    def variance(self, u: Tensor) -> Tensor:
        """Var C(u)_i = f (1 - f) step^2 for one tensor: [.., d] -> [.., d]; the values are independent given u."""
        runs = self._runs(Layout.flat(u.shape[-1]))
        key = torch.zeros_like(u[..., 0], dtype=torch.int64)
        radix = torch.full_like(key, self.symbols - 1, dtype=torch.uint8)
        _, steps = kernel.quantize(u.float(), key, radix, runs, self.norm, False)
        step = by_value(steps, runs).double()
        r = u.double() / torch.where(step > 0, step, 1.0) + (self.symbols - 1) / 2
        f = r - r.floor()
        found: Tensor = f * (1 - f) * step**2 * float(self.unbiased)
        return found

    def init(self, layout: Layout) -> tuple[State, State]:
        """No state on either side."""
        return {}, {}

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """u [d] -> {"codes": [d] uint8, "codes.radix": [] uint8, "steps": [S] float32}.

        The knob "send" [] gives this client its own levels of each sign; 0: those of the codec.
        """
        radix = torch.tensor(self.symbols - 1, dtype=torch.uint8, device=u.device)
        if "send" in knobs:
            radix = torch.where(knobs["send"] > 0, 2 * knobs["send"], radix)
        nearest = self.rounding == "nearest"
        codes, steps = kernel.quantize(u.float(), key, radix, self._runs(layout), self.norm, nearest)
        return {"codes": codes, "codes.radix": radix, "steps": steps}, tx

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """(codes - radix / 2) step -> [d] float32."""
        runs = self._runs(layout)
        return kernel.dequantize(payload["codes"], payload["steps"], payload["codes.radix"], runs), rx

    def _runs(self, layout: Layout) -> list[int]:
        """(count, size) of equal segments, one after the other."""
        if self.scale == "block":
            whole, rest = divmod(layout.d, self.block)
            return [whole, self.block] * (whole > 0) + [1, rest] * (rest > 0)
        runs: list[int] = []
        for shape, size in zip(layout.shapes, layout.sizes, strict=True):
            count = shape[0] if self.scale == "channel" and len(shape) > 1 else 1
            if size:
                runs += [count, size // count]
        return runs


def quantize8(scale: Literal["tensor", "block", "channel"] = "tensor") -> quantize:
    """`quantize(bits=8)`."""
    return quantize(bits=8, scale=scale)


def quantize4(scale: Literal["tensor", "block", "channel"] = "tensor") -> quantize:
    """`quantize(bits=4)`."""
    return quantize(bits=4, scale=scale)


def quantize2(scale: Literal["tensor", "block", "channel"] = "tensor") -> quantize:
    """`quantize(bits=2)`: -1, 0, 1."""
    return quantize(bits=2, scale=scale)


def qsgd(levels: int = 1) -> quantize:
    """QSGD (Alistarh et al. 2017): `quantize(levels=levels, norm="l2")`."""
    return quantize(levels=levels, norm="l2")


def ternary() -> quantize:
    """TernGrad (Wen et al. 2017): `quantize(levels=1)`, values -max, 0, max of each tensor."""
    return quantize(levels=1)


def sign() -> quantize:
    """Scaled sign: mean magnitude times the sign, 1 bit a value; biased: use it under `error_feedback`."""
    return quantize(bits=1, rounding="nearest", norm="mean")
