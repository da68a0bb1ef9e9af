"""Names of the modes in which a client can train and be deployed.

float32            nothing is quantized.
bfloat16           local steps with matrix products in bfloat16 (half.py); nothing is quantized.
ptq{b}             local steps in float32; what is sent and deployed has b bits (quantization after training).
qat{b}             every forward pass uses Q_b of the weights (fake.py), and so do the upload and the deployed model; where
                   the policy says so also Q of the layers' inputs.

Symbols: b bits; L = 2^(b-1) - 1 levels on each side of zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from taciturn.core.errors import require, unknown
from taciturn.core.rounding import levels

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Mode:
    """train: what the local steps compute in; bits: of what is sent and deployed, 0 for float."""

    train: Literal["float32", "bfloat16", "qat"]
    bits: int = 0

    @property
    def sent(self) -> int:
        """L of the upload; 0: as the codec is set."""
        return levels(self.bits)

    @property
    def trained(self) -> int:
        """L of the weights in the forward pass; 0: float."""
        return self.sent if self.train == "qat" else 0

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Of its matrix products: a device should have a kernel for it (`Fleet.has_kernels`)."""
        return "bfloat16" if self.train == "bfloat16" else "float32"


MODES: dict[str, Mode] = {
    "float32": Mode("float32"),
    "bfloat16": Mode("bfloat16"),
    **{f"ptq{b}": Mode("float32", b) for b in BITS},
    **{f"qat{b}": Mode("qat", b) for b in BITS},
}


def mode(name: str, where: str = "precision.mode") -> Mode:
    """The mode of a name. Errors: `UnknownName` with the names there are.

    >>> mode("qat4").trained, mode("ptq4").trained, mode("ptq4").sent
    (7, 0, 7)
    """
    if name not in MODES:
        raise unknown("mode", name, MODES, where)
    return MODES[name]


def runnable(names: Iterable[str], where: str) -> tuple[Mode, ...]:
    """The modes of some names, at least one. Errors: `ConfigError`, `UnknownName`."""
    found = tuple(mode(name, where) for name in names)
    require(len(found) > 0, f"{where}: at least one mode")
    return found
