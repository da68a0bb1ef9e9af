"""A device and its line, as numbers; and how long a local step takes on it (a roofline).

Symbols: F floating point operations of an operator; M bytes that it moves; pi GFLOP/s; beta GB/s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from taciturn.core.errors import require
from taciturn.core.price import Price

Dtype = Literal["float32", "bfloat16", "int8"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "int8")


@dataclass(frozen=True, slots=True)
class Operator:
    """Work of one kind in a local step: F flops and M bytes, done `times` times. dtype: of its arithmetic."""

    dtype: Dtype
    flops: int
    bytes: int
    times: int = 1


@dataclass(frozen=True, slots=True)
class Profile:
    """A device and its line. The defaults are the reference device: a small computer at home, on `Price`'s thin line.

    float32, bfloat16, int8: GFLOP/s (1e9 multiplications and additions a second) of matrix products; None: no kernel for
    it, the work is done in float32. bandwidth: GB/s, 1e9 bytes read and written a second. launch: seconds of starting an
    operator. up, down: bytes a second. latency: seconds of a round trip, half of it each way. memory: bytes for training
    (None: enough). availability: probability that it can be reached in a round, in (0, 1].
    share: how many of a fleet's devices are such ones, relative to the others'.

    >>> Profile(float32=1.0, bandwidth=1.0, launch=0.5).step_seconds([Operator("float32", 2 * 10**9, 10**9, times=2)])
    5.0
    """

    name: str = "reference"
    share: float = 1.0
    float32: float = 50.0
    bfloat16: float | None = None
    int8: float | None = None
    bandwidth: float = 10.0
    launch: float = 5e-6
    up: float = 1.25e6
    down: float = 6.25e6
    latency: float = 0.05
    memory: float | None = None
    availability: float = 1.0

    def __post_init__(self) -> None:
        for field in ("share", *DTYPES, "bandwidth", "up", "down", "memory"):
            value = getattr(self, field)
            good = value is None or 0 < value < math.inf
            require(good, f"{field}: a finite number above 0; got {value} (profile {self.name!r})")
        for field in ("launch", "latency"):
            value = getattr(self, field)
            require(0 <= value < math.inf, f"{field}: seconds, at least 0; got {value} (profile {self.name!r})")
        good = 0 < self.availability <= 1
        require(good, f"availability: in (0, 1]; got {self.availability} (profile {self.name!r})")

    @property
    def kernels(self) -> tuple[Dtype, ...]:
        """The dtypes that it has fast matrix products for."""
        return tuple(dtype for dtype in DTYPES if getattr(self, dtype) is not None)

    def rate(self, dtype: Dtype) -> float:
        """GFLOP/s in this dtype, or in float32 where there is no kernel for it."""
        return float(getattr(self, dtype) or self.float32)

    def step_seconds(self, operators: Iterable[Operator]) -> float:
        """A local step: the sum over operators of max(F / pi, M / beta) + launch."""
        return sum(
            one.times * (max(one.flops / self.rate(one.dtype), one.bytes / self.bandwidth) * 1e-9 + self.launch)
            for one in operators
        )

    def price(self, operators: Iterable[Operator]) -> Price:
        """What a round costs on this device, for a rule that weighs work against messages."""
        return Price(self.step_seconds(operators), self.up, self.down, self.latency)
