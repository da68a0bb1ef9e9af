"""Counter-based randomness: every draw is a hash of a key and an index, so order of execution never matters.

Symbols: key [] or [m] int64; index, counter: int64. The hash is the finalizer of SplitMix64 (Steele, Lea & Flood,
OOPSLA 2014), on int64 with wrap-around, from operations that `torch.vmap` can batch. The same key gives the same
draws on every engine, block size and device.
"""

from __future__ import annotations

import hashlib
import math
import random as stdlib_random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from taciturn.core import eager, kernel

Key = Tensor
_FEW = 4096  # words of a key that torch makes faster than the call of a kernel takes


def key(seed: int, device: torch.device | str = "cpu") -> Key:
    """The root key of a seed: [] int64.

    >>> int(key(0)) == int(key(0)), int(key(0)) == int(key(1))
    (True, False)
    """
    return eager.mix(torch.tensor(eager.signed(seed), dtype=torch.int64, device=device) + eager.GOLDEN)


def fold(key: Key, *parts: int | str | Tensor) -> Key:
    """A new key from a key and names or counters, one after the other; tensors broadcast.

    key, parts: int64 of any shapes that broadcast -> int64 of the common shape.
    """
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "big", signed=True)
        part = eager.signed(part * eager.GOLDEN) if isinstance(part, int) else part.to(torch.int64) * eager.GOLDEN
        key = eager.mix((key ^ part) + eager.GOLDEN)
    return key


def bits(key: Key, n: int) -> Tensor:
    """n words of 64 random bits for each key: [..] -> [.., n] int64."""
    return eager.words(key, n) if n < _FEW else kernel.words(key, n)


def uniform(key: Key, *shape: int) -> Tensor:
    """Uniform draws in [0, 1) with 24 bits: [] -> [*shape] float32."""
    words = bits(key, math.prod(shape))
    return (eager.shift(words, 40).to(torch.float32) * 2.0**-24).reshape((*key.shape, *shape))


def normal(key: Key, *shape: int) -> Tensor:
    """Standard normal draws by Box and Muller: [] -> [*shape] float32."""
    n = math.prod(shape)
    u = uniform(key, 2 * n)
    radius = torch.sqrt(-2.0 * torch.log1p(-u[..., :n]))
    return (radius * torch.cos(2.0 * math.pi * u[..., n:])).reshape((*key.shape, *shape))


def permutation(key: Key, n: int, size: Tensor | None = None) -> Tensor:
    """A random order of 0..n-1 for each key: [..] -> [.., n] int64.

    With `size` ([..] int64), the first `size` places hold a random order of 0..size-1 that does not depend on n.
    """
    words = eager.shift(bits(key, n), 1)
    if size is not None:
        beyond = torch.arange(n, device=key.device) >= size.unsqueeze(-1)
        words = words.masked_fill(beyond, (1 << 63) - 1)
    return torch.argsort(words, dim=-1, stable=True)


@contextmanager
def seeded(key: Key) -> Iterator[None]:
    """Inside, torch's and Python's global generators are seeded from the key []; afterwards they are as before.

    For code that cannot draw from keys: models with randomness of their own, data sets that augment.
    """
    seed, python = int(key) & ((1 << 63) - 1), stdlib_random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stdlib_random.seed(seed)
        try:
            yield
        finally:
            stdlib_random.setstate(python)


def choice(key: Key, n: int, count: int) -> Tensor:
    """`count` different numbers of 0..n-1, uniform without replacement, in the order drawn: [count] int64.

    For count much smaller than n the cost does not grow with n: draws are made in turn and repeats are skipped.
    """
    if 4 * count > n:
        return permutation(key, n)[:count]
    taken: dict[int, None] = {}
    stream = 0
    while len(taken) < count:
        for word in eager.shift(bits(fold(key, stream), 2 * count), 1).tolist():
            if len(taken) == count:
                break
            taken.setdefault(word % n)
        stream += 1
    return torch.tensor(list(taken), dtype=torch.int64)


def batches(key: Key, size: Tensor, first: Tensor, steps: int, batch: int, widest: int) -> tuple[Tensor, Tensor]:
    """The client's own sample numbers for local steps first .. first + steps - 1, and which of them are real.

    An endless stream of epochs, each a fresh random order of the client's n samples cut into ceil(n / batch) batches;
    a function of (key, n, batch, step counter) only. key, size, first: [m] int64; widest >= all sizes.
    -> index [m, steps, batch] int64 (a padding entry repeats a real sample), mask [m, steps, batch] bool.
    """
    per_epoch = (size + batch - 1) // batch
    t = first.unsqueeze(-1) + torch.arange(steps, device=first.device)
    epoch = t // per_epoch.unsqueeze(-1)
    place = (t - epoch * per_epoch.unsqueeze(-1)).unsqueeze(-1) * batch + torch.arange(batch, device=first.device)
    mask = place < size[:, None, None]
    relative = epoch - epoch[:, :1]
    epochs = epoch[:, :1] + torch.arange(int(relative.max()) + 1, device=first.device)
    keys = fold(fold(key, "batches").unsqueeze(-1), epochs)
    orders = permutation(keys, widest, size.unsqueeze(-1).expand_as(epochs))
    flat = relative.unsqueeze(-1) * widest + torch.minimum(place, size[:, None, None] - 1)
    return orders.flatten(1).gather(1, flat.flatten(1)).view_as(flat), mask
