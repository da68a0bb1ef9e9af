"""Draws that nobody can repeat: from the operating system's generator, where `random.py` draws from keys that all know.

Noise and cohorts that protect somebody must not follow from the seed of an experiment, which every site has, and the hash
behind `random.py` is fast and no cipher. In a simulation nobody is protected, and keys make runs alike.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from taciturn.core import random
from taciturn.core.random import Key


def uniform(n: int) -> Tensor:
    """Uniform draws in [0, 1) with 53 bits: [n] float64."""
    words = torch.frombuffer(bytearray(os.urandom(8 * max(n, 1))), dtype=torch.int64)[:n]
    return ((words >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def normal(n: int) -> Tensor:
    """Standard normal draws by Box and Muller: [n] float64."""
    u = uniform(2 * n)
    return torch.sqrt(-2.0 * torch.log1p(-u[:n])) * torch.cos(2.0 * math.pi * u[n:])


def gaussian(key: Key | None, d: int) -> Tensor:
    """Standard normal draws of a key, or secret ones where there is none: [d]."""
    return normal(d) if key is None else random.normal(key, d)
