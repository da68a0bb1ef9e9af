"""How fast this machine is: matrix products, copies, and starting an operator, by the clock.

Every figure is the best of several runs: what the machine can do when nothing else disturbs it. Lines are not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from taciturn.core import random
from taciturn.fleet.profile import DTYPES, Dtype, Profile

SIZES = (128, 512, 1024)  # of a product [n, n] [n, n]
COPIES = (1_000_000, 64_000_000)  # bytes of a copy: one that fits in a cache, one that does not
CHAIN = 200  # operators of one element, in a row
PATIENCE = 0.5  # seconds for a figure


@dataclass(frozen=True)
class Measured:
    """What was measured. gemm: GFLOP/s by dtype and size, None: no such kernel here, or one too slow to wait for; copy:
    GB/s, read and written, by its bytes; launch: seconds of an operator.
    """

    gemm: dict[tuple[Dtype, int], float | None]
    copy: dict[int, float]
    launch: float

    def profile(self, like: Profile) -> Profile:
        """The machine, with the line, share, memory and availability of another profile: of the rates the best over
        sizes; the bandwidth is that of the larger copy.
        """
        found = {dtype: [rate for (one, _), rate in self.gemm.items() if one == dtype and rate] for dtype in DTYPES}
        rates = {dtype: round(max(some), 3) if some else None for dtype, some in found.items()}
        bandwidth = round(self.copy[max(self.copy)], 3)
        return replace(
            like,
            float32=rates["float32"] or like.float32,
            bfloat16=rates["bfloat16"],
            int8=rates["int8"],
            bandwidth=bandwidth,
            launch=round(self.launch, 9),
        )


def measure(device: str = "cpu", patience: float = PATIENCE) -> Measured:
    """Measure a device of this machine, in about twelve times `patience` seconds."""
    where = torch.device(device)
    gemm: dict[tuple[Dtype, int], float | None] = {}
    for dtype in DTYPES:
        rate: float | None = 1e9
        for n in SIZES:  # a size that would take far longer, at the rate of the last one, is left out
            slow = rate is None or _gflop(n) / rate > 2 * patience
            gemm[dtype, n] = rate = None if slow else _product(dtype, n, where, patience)
    copy = {size: _copy(size, where, patience) for size in COPIES}
    return Measured(gemm, copy, _launch(where, patience))


def _best(run: Callable[[], object], device: torch.device, patience: float) -> float:
    """Seconds of the fastest of some runs, after one that warms up; of that one, where it takes longer than `patience`."""

    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    first, end = once(), time.perf_counter() + patience
    if first > patience:
        return first
    best = once()
    while time.perf_counter() < end:
        best = min(best, once())
    return max(best, 1e-9)


def _gflop(n: int) -> float:
    return 2e-9 * n**3


def _product(dtype: Dtype, n: int, device: torch.device, patience: float) -> float | None:
    a, b = (random.normal(random.key(seed), n, n).to(device) for seed in (0, 1))
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    if dtype == "int8":
        multiply, a, b = torch._int_mm, (20 * a).to(torch.int8), (20 * b).to(torch.int8)
    else:
        a, b = a.to(getattr(torch, dtype)), b.to(getattr(torch, dtype))
    try:
        return _gflop(n) / _best(lambda: multiply(a, b), device, patience)
    except RuntimeError:  # this torch has no such kernel for this device
        return None


def _copy(size: int, device: torch.device, patience: float) -> float:
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / _best(lambda: target.copy_(source), device, patience) / 1e9


def _launch(device: torch.device, patience: float) -> float:
    one = torch.ones(1, device=device)

    def chain() -> Tensor:
        x = one
        for _ in range(CHAIN):
            x = x + one
        return x

    return _best(chain, device, patience) / CHAIN
