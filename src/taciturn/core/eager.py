"""The kernels in torch, for every device: slower than their twins in C (`native/`), and the same in every bit.

Where a sum decides a bit, its order is fixed: lanes of 1024 are halved ten times, and their sums again. Symbols and shapes
are those of `core/kernel.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def signed(value: int) -> int:
    """A 64-bit pattern as the int64 that holds it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


GOLDEN = signed(0x9E3779B97F4A7C15)
STREAM = signed(0xD1B54A32D192ED03)  # keeps the draws of a key apart from its children
_MIX_1 = signed(0xBF58476D1CE4E5B9)
_MIX_2 = signed(0x94D049BB133111EB)
_LANES = 1024
_STRETCH = 1 << 18  # positions hashed at a time, so that what is 64 bits wide for a while stays small
_LARGEST = float(torch.finfo(torch.float32).max)


def shift(x: Tensor, n: int) -> Tensor:
    """Logical right shift of int64 by n bits."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) on int64 with wrap-around."""
    x = (x ^ shift(x, 30)) * _MIX_1
    x = (x ^ shift(x, 27)) * _MIX_2
    return x ^ shift(x, 31)


def words(key: Tensor, n: int) -> Tensor:
    """n words of 64 random bits for each key."""
    counter = torch.arange(1, n + 1, dtype=torch.int64, device=key.device) * GOLDEN
    return mix((key ^ STREAM).unsqueeze(-1) + counter)


# --------------------------------------------------------------------------------------------- narrow and quantize


def narrow(u: Tensor, brain: bool) -> Tensor:
    """To the nearest, saturating."""
    dtype = torch.bfloat16 if brain else torch.float16
    largest = torch.finfo(dtype).max
    return torch.where(torch.isinf(u), u, u.clamp(-largest, largest)).to(dtype)


def _cut(x: Tensor, size: int) -> Tensor:
    """[.., n size] -> [.., n, size]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _tree(x: Tensor) -> Tensor:
    """Sum over the last axis in the fixed order: [.., n] float64 -> [..]."""
    while (n := x.shape[-1]) > 1:
        lanes = min(_LANES, 1 << (n - 1).bit_length())  # zeros that are left out change no bit
        x = _cut(torch.nn.functional.pad(x, (0, -n % lanes)), lanes)
        while x.shape[-1] > 1:
            half = x.shape[-1] // 2
            x = x[..., :half] + x[..., half:]
        x = x.squeeze(-1)
    return x.squeeze(-1)


def _scale(part: Tensor, norm: str) -> Tensor:
    """Norm of each segment: [.., count, size] float32 -> [.., count] float64, NaN where it is not finite."""
    size = part.shape[-1]
    if size == 0:
        return part.new_zeros(part.shape[:-1], dtype=torch.float64)
    if norm == "max":
        scale = part.abs().amax(-1).double()
    elif norm == "l2":
        scale = _tree(part.double() ** 2).sqrt()
        scale = torch.where(torch.isfinite(scale), scale.clamp(max=_LARGEST), scale)
    else:
        scale = _tree(part.double().abs()) / size
    return torch.where(torch.isfinite(scale), scale, torch.nan)


def quantize(u: Tensor, key: Tensor, radix: Tensor, runs: Sequence[int], norm: str, nearest: bool) -> tuple[Tensor, Tensor]:
    """Codes and steps."""
    d, at, segments = u.shape[-1], 0, []
    half = radix.double().unsqueeze(-1) * 0.5
    for count, size in zip(runs[::2], runs[1::2], strict=True):
        part = u[..., at : at + count * size].reshape(*u.shape[:-1], count, size)
        scale = _scale(part, norm)
        segments.append(torch.where((half > 0) | torch.isnan(scale), scale / half, 0.0).float())
        at += count * size
    steps = torch.cat(segments, -1)
    step = by_value(steps, runs)
    q = radix.to(torch.int32).unsqueeze(-1) + 1
    odd, middle = q % 2 == 1, q // 2
    r = (u / step).clamp(-300.0, 300.0)
    if nearest:
        code = torch.where(odd, r.round(), r.floor())
    else:
        r = r - torch.where(odd, 0.0, 0.5)
        halves = words(key, d // 2 + 1).view(torch.int32)[..., :d]
        draw = ((halves >> 8) & 0xFFFFFF).float() * 2.0**-24
        below = r.floor()
        code = below + (draw < r - below).float()
    code = torch.where(step > 0, torch.nan_to_num(code), 0.0).to(torch.int32) + middle
    return torch.minimum(code.clamp(min=0), q - 1).to(torch.uint8), steps


def dequantize(codes: Tensor, steps: Tensor, radix: Tensor, runs: Sequence[int]) -> Tensor:
    """(codes - radix / 2) * step."""
    return (codes.float() - radix.float().unsqueeze(-1) * 0.5) * by_value(steps, runs)


def by_value(steps: Tensor, runs: Sequence[int]) -> Tensor:
    """The step of each value's segment: [.., S] -> [.., d]."""
    parts = torch.split(steps, list(runs[::2]), -1)
    return torch.cat([part.repeat_interleave(size, -1) for part, size in zip(parts, runs[1::2], strict=True)], -1)


# ----------------------------------------------------------------------------------------------------------- select


def threshold(key: Tensor, d: int, k: int) -> Tensor:
    """The k-th smallest word, without its last bit."""
    return shift(words(key, d), 1).kthvalue(k, -1).values


def _compact(u: Tensor, chosen: Tensor, room: int) -> Tensor:
    """The chosen values one after the other, zeros behind: [.., d] -> [.., room]."""
    place = torch.where(chosen, chosen.cumsum(-1) - 1, room).clamp(max=room)
    return u.new_zeros(*u.shape[:-1], room + 1).scatter(-1, place, u)[..., :room]


def keep(u: Tensor, key: Tensor, threshold: Tensor, scale: float, room: int) -> tuple[Tensor, Tensor]:
    """Chosen values and how many."""
    chosen = shift(words(key, u.shape[-1]), 1) <= threshold.unsqueeze(-1)
    finite, counts = torch.isfinite(u).all(-1), chosen.sum(-1).clamp(max=room)
    kept = torch.where(finite.unsqueeze(-1), _compact(u * scale, chosen, room), torch.nan)
    return kept, torch.where(finite, counts, room).to(torch.int32)


def spread(values: Tensor, key: Tensor, threshold: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Values in their places, and how many places there are."""
    chosen = shift(words(key, d), 1) <= threshold.unsqueeze(-1)
    place = (chosen.cumsum(-1) - 1).clamp(0, values.shape[-1] - 1)
    return torch.where(chosen, values.gather(-1, place), 0.0), chosen.sum(-1).to(torch.int32)


def largest(u: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k values of largest magnitude, and their places."""
    magnitude = u.contiguous().view(torch.int32) & 0x7FFFFFFF
    edge = magnitude.topk(k, -1).values[..., -1:]
    equal = magnitude == edge
    missing = k - (magnitude > edge).sum(-1, keepdim=True)
    chosen = (magnitude > edge) | (equal & (equal.cumsum(-1) <= missing))
    place = torch.arange(u.shape[-1], device=u.device).expand(u.shape)
    return _compact(u, chosen, k), _compact(place, chosen, k)


# ----------------------------------------------------------------------------------------------------------- rotate


def _signs(key: Tensor, d: int) -> Tensor:
    """d random signs for each key, 64 from a word: [..] -> [.., d] bool, True: minus."""
    bits = words(key, (d + 63) // 64).unsqueeze(-1) >> torch.arange(64, device=key.device)
    return (bits & 1).bool().flatten(-2)[..., :d]


def _hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last axis, a power of two, by butterflies at distances 1, 2, 4 .."""
    n, h = x.shape[-1], 1
    while h < n:
        pairs = x.reshape(*x.shape[:-1], n // (2 * h), 2, h)
        p, q = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([p + q, p - q], -2).flatten(-3)
        h *= 2
    return x * float(torch.tensor(1.0 / math.sqrt(n), dtype=torch.float32))


def rotate(u: Tensor, key: Tensor, block: int, inverse: bool) -> Tensor:
    """The randomised Hadamard transform by blocks, or its inverse."""
    d, at, parts = u.shape[-1], 0, []
    minus = _signs(key, d)
    x = u if inverse else torch.where(minus, -u, u)
    while at < d:
        while block > d - at:
            block //= 2
        count = (d - at) // block
        parts.append(_hadamard(_cut(x[..., at : at + count * block], block)).flatten(-2))
        at += count * block
    out = torch.cat(parts, -1) if parts else x.clone()
    return torch.where(minus, -out, out) if inverse else out


# -------------------------------------------------------------------------------------------------------------- ams


def _hash(a: Tensor, i: Tensor, c: Tensor) -> Tensor:
    """fold(a i + c) with fold(r) = (r XOR (r >> 31)) AND (2^31 - 1), for a, i, c of 0..2^31 - 1."""
    r = a * i + c
    return (r ^ (r >> 31)) & 0x7FFFFFFF


def ams_table(coefficients: Tensor, first: int, d: int, columns: int) -> Tensor:
    """Bucket and sign of each position."""
    f = coefficients.unsqueeze(-1).unbind(-3)
    out = coefficients.new_empty(*coefficients.shape[:-2], coefficients.shape[-1], d, dtype=torch.int16)
    for at in range(0, d, _STRETCH):
        i = torch.arange(first + at, first + min(at + _STRETCH, d), device=coefficients.device)
        sign = _hash(_hash(_hash(f[2], i, f[3]), i, f[4]), i, f[5])
        minus = (~sign >> 15) & 1
        out[..., at : at + len(i)] = _hash(f[0], i, f[1]) % columns - (minus << 15)
    return out


def ams(u: Tensor, table: Tensor, columns: int) -> Tensor:
    """Sums of each bucket in float64, value after value (on a GPU: in the order that it takes)."""
    out = u.new_empty(math.prod(u.shape[:-1]), len(table), columns)
    for j, entries in enumerate(table):
        bucket, minus = (entries & 0x7FFF).long(), entries < 0
        for r, row in enumerate(u.reshape(len(out), u.shape[-1])):
            values = torch.where(minus, -row, row).double()
            out[r, j] = torch.bincount(bucket, values, columns)[:columns]
    return out.view(*u.shape[:-1], len(table), columns)
