"""The door to the compiled kernels: what codecs, sketches and draws spend their time on, in C where it was built.

C and torch give the same bits, so which of them ran is nobody's business: a run goes on where the other began. The C
library is built when the package is installed; without a compiler, on another device than the CPU, or with
TACITURN_KERNELS=torch in the environment, the twins in `core/eager.py` do the work. Every function takes any leading axes
[..], and is an operator of torch, so that it runs under `torch.vmap` as one call over all rows.

Symbols: d values of a vector u; key [..] int64; word i: the i-th draw of the key (random.bits); runs: (count, size, count,
size ..) of equal segments that lie one after the other, d values in all; S segments; q symbols, radix = q - 1.
"""

from __future__ import annotations

import ctypes
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taciturn.core import eager
from taciturn.core.errors import WireError

NORMS = ("max", "l2", "mean")
NEEDED = "tc_kernels_3"  # a name that the library exports; it counts up when a kernel comes, goes or changes
_forced: list[None] = []


@cache
def _load() -> ctypes.CDLL | None:
    for path in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            found = ctypes.CDLL(str(path))
        except OSError:
            continue
        if getattr(found, NEEDED, None) is not None:
            return found
        warnings.warn(
            f"{path} was built from an older source; install taciturn again, until then torch does its work", stacklevel=2
        )
    return None


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or are not wanted."""
    return None if _forced or os.environ.get("TACITURN_KERNELS") == "torch" else _load()


@contextmanager
def without_library() -> Iterator[None]:
    """Inside, everything runs on torch alone."""
    _forced.append(None)
    try:
        yield
    finally:
        _forced.pop()


def _native(tensor: Tensor) -> ctypes.CDLL | None:
    return library() if tensor.device.type == "cpu" else None


# ------------------------------------------------------------------------------------------------------- operators


def _batched(op: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Every function takes leading axes, so a mapped axis is one more of them."""
    moved = []
    for dim, value in zip(in_dims, arguments, strict=True):
        if isinstance(value, Tensor):
            value = value.movedim(dim, 0) if dim is not None else value.expand(info.batch_size, *value.shape)
        moved.append(value)
    found = op(*moved)
    return found, tuple(0 for _ in found) if isinstance(found, tuple) else 0


def _one_table(op: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, int]:
    """A table that all rows share stays one; `_batched` would copy it for each of them."""
    u, table, columns = arguments
    if in_dims[1] is None:
        return op(u.movedim(in_dims[0], 0), table, columns), 0
    us = [u] * info.batch_size if in_dims[0] is None else u.unbind(in_dims[0])
    return torch.stack([op(*pair, columns) for pair in zip(us, table.unbind(in_dims[1]), strict=True)]), 0


def _operator(schema: str, batched: Callable[..., Any] = _batched) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"taciturn::{function.__name__}", function, mutates_args=(), schema=schema)
        op.register_vmap(partial(batched, op))
        return op

    return define


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _i64(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def _runs(runs: Sequence[int]) -> tuple[Any, ctypes.c_int64]:
    return (ctypes.c_int64 * len(runs))(*runs), ctypes.c_int64(len(runs) // 2)


# ------------------------------------------------------------------------------------------------------------- hash


@_operator("(Tensor key, int n) -> Tensor")
def words(key: Tensor, n: int) -> Tensor:
    """n words of 64 random bits for each key: [..] -> [.., n] int64."""
    native = _native(key)
    if native is None:
        return eager.words(key, n)
    keys, out = key.contiguous(), torch.empty(*key.shape, n, dtype=torch.int64)
    native.tc_words(_at(keys), *_i64(keys.numel(), n), _at(out))
    return out


# --------------------------------------------------------------------------------------------- narrow and quantize


@_operator("(Tensor u, bool brain) -> Tensor")
def narrow(u: Tensor, brain: bool) -> Tensor:
    """u [..] float32 -> float16, or bfloat16: to the nearest, ties to even; finite values beyond the largest become it."""
    native = _native(u)
    if native is None:
        return eager.narrow(u, brain)
    flat = u.contiguous()
    out = torch.empty(u.shape, dtype=torch.bfloat16 if brain else torch.float16)
    native.tc_narrow(_at(flat), *_i64(flat.numel()), ctypes.c_int(brain), _at(out))
    return out


@_operator("(Tensor u, Tensor key, Tensor radix, int[] runs, str norm, bool nearest) -> (Tensor, Tensor)")
def quantize(u: Tensor, key: Tensor, radix: Tensor, runs: Sequence[int], norm: str, nearest: bool) -> tuple[Tensor, Tensor]:
    """u [.., d] float32, radix [..] uint8 -> codes [.., d] uint8 of 0..radix, steps [.., S] float32.

    step = norm of the segment / h, h = radix / 2; the code of a value v is one of the two neighbors of v / step + h, the
    upper one with the probability of the remainder (24 random bits), or the nearest. Not finite: step NaN.
    """
    native = _native(u)
    if native is None:
        return eager.quantize(u, key, radix, runs, norm, nearest)
    u, key, radix = u.contiguous(), key.contiguous(), radix.contiguous()
    segments, options = sum(runs[::2]), (ctypes.c_int(NORMS.index(norm)), ctypes.c_int(nearest))
    codes, steps = torch.empty(u.shape, dtype=torch.uint8), torch.empty(*u.shape[:-1], segments)
    sizes, listed = _i64(key.numel(), u.shape[-1]), _runs(runs)
    native.tc_quantize(_at(u), *sizes, _at(key), _at(radix), *listed, *_i64(segments), *options, _at(codes), _at(steps))
    return codes, steps


@_operator("(Tensor codes, Tensor steps, Tensor radix, int[] runs) -> Tensor")
def dequantize(codes: Tensor, steps: Tensor, radix: Tensor, runs: Sequence[int]) -> Tensor:
    """(codes - radix / 2) * step: [.., d] uint8, [.., S], [..] -> [.., d] float32."""
    native = _native(codes)
    if native is None:
        return eager.dequantize(codes, steps, radix, runs)
    codes, steps, radix = codes.contiguous(), steps.contiguous(), radix.contiguous()
    out, segments = torch.empty(codes.shape), _i64(steps.shape[-1])
    native.tc_dequantize(
        _at(codes), _at(steps), *_i64(radix.numel(), codes.shape[-1]), _at(radix), *_runs(runs), *segments, _at(out)
    )
    return out


# ----------------------------------------------------------------------------------------------------------- select


@_operator("(Tensor key, int d, int k) -> Tensor")
def threshold(key: Tensor, d: int, k: int) -> Tensor:
    """The k-th smallest of the first d words of a key, without their last bit: [..] -> [..] int64."""
    native = _native(key)
    if native is None:
        return eager.threshold(key, d, k)
    keys, out = key.contiguous(), torch.empty(key.shape, dtype=torch.int64)
    native.tc_threshold(_at(keys), *_i64(keys.numel(), d, k), _at(out))
    return out


@_operator("(Tensor u, Tensor key, Tensor threshold, float scale, int room) -> (Tensor, Tensor)")
def keep(u: Tensor, key: Tensor, threshold: Tensor, scale: float, room: int) -> tuple[Tensor, Tensor]:
    """u_i * scale where word i >> 1 <= threshold, one after the other: [.., d] -> [.., room], how many [..] int32.

    A vector that is not finite gives `room` times NaN.
    """
    native = _native(u)
    if native is None:
        return eager.keep(u, key, threshold, scale, room)
    u, key, threshold = u.contiguous(), key.contiguous(), threshold.contiguous()
    out, counts = torch.empty(*u.shape[:-1], room), torch.empty(key.shape, dtype=torch.int32)
    sizes, options = _i64(key.numel(), u.shape[-1]), (_at(key), _at(threshold), ctypes.c_float(scale))
    native.tc_keep(_at(u), *sizes, *options, _at(out), *_i64(room), _at(counts))
    return out, counts


@_operator("(Tensor values, Tensor key, Tensor threshold, Tensor count, int d) -> Tensor")
def spread(values: Tensor, key: Tensor, threshold: Tensor, count: Tensor, d: int) -> Tensor:
    """The inverse of `keep`, zeros elsewhere: [.., room], count [..] of them sent -> [.., d]. All d sent: they themselves.

    Errors: `WireError` if more or fewer were sent than there are places.
    """
    native = _native(values)
    if native is None:
        out, places = eager.spread(values, key, threshold, d)
    else:
        values, key, threshold = values.contiguous(), key.contiguous(), threshold.contiguous()
        out, places = torch.empty(*values.shape[:-1], d), torch.empty(key.shape, dtype=torch.int32)
        sizes = _i64(key.numel(), values.shape[-1])
        native.tc_spread(_at(values), *sizes, _at(key), _at(threshold), _at(out), *_i64(d), _at(places))
    whole = (count == d) & (values.shape[-1] == d)
    wrong = (count != places) & ~whole
    if bool(wrong.any()):
        raise WireError(f"{int(count[wrong][0])} values; the seed of this message says {int(places[wrong][0])}")
    return torch.where(whole.unsqueeze(-1), values, out) if bool(whole.any()) else out


@_operator("(Tensor u, int k) -> (Tensor, Tensor)")
def largest(u: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k values of largest magnitude (of equals those that come first) in the order of their places; NaN is largest.

    u [.., d] -> values [.., k], places [.., k] int64, rising.
    """
    native = _native(u)
    if native is None:
        return eager.largest(u, k)
    u = u.contiguous()
    values, places = torch.empty(*u.shape[:-1], k), torch.empty(*u.shape[:-1], k, dtype=torch.int64)
    if native.tc_largest(_at(u), *_i64(u[..., 0].numel(), u.shape[-1], k), _at(values), _at(places)):
        raise MemoryError("no memory for half a megabyte of counts")
    return values, places


@_operator("(Tensor values, Tensor places, int d) -> Tensor")
def put(values: Tensor, places: Tensor, d: int) -> Tensor:
    """values [.., k] at places [.., k] of zeros [.., d]. Errors: `WireError` for places not there or not rising."""
    if places.numel() and (int(places.min()) < 0 or int(places.max()) >= d):
        raise WireError(f"indices from {int(places.min())} to {int(places.max())}; the vector has {d} values")
    if places.shape[-1] > 1 and not bool((places.diff() > 0).all()):
        raise WireError("indices that do not rise: each place of the vector is named at most once, in order")
    return values.new_zeros(*values.shape[:-1], d).scatter(-1, places, values)


# ----------------------------------------------------------------------------------------------------------- rotate


@_operator("(Tensor u, Tensor key, int block, bool inverse) -> Tensor")
def rotate(u: Tensor, key: Tensor, block: int, inverse: bool) -> Tensor:
    """H diag(s) u with random signs s and the normalized Walsh-Hadamard transform H, or its inverse: [.., d] -> [.., d].

    Over blocks of powers of two: as many of `block` as fit, then the binary digits of what is left, so nothing is padded.
    """
    native = _native(u)
    if native is None:
        return eager.rotate(u, key, block, inverse)
    u, key, out = u.contiguous(), key.contiguous(), torch.empty(u.shape)
    sizes = _i64(key.numel(), u.shape[-1])
    native.tc_rotate(_at(u), *sizes, _at(key), *_i64(block), ctypes.c_int(inverse), _at(out))
    return out


# -------------------------------------------------------------------------------------------------------------- ams


@_operator("(Tensor coefficients, int first, int d, int columns) -> Tensor")
def ams_table(coefficients: Tensor, first: int, d: int, columns: int) -> Tensor:
    """Where each position goes in each of m rows: [.., 6, m] int64 of 0..2^31 - 2 -> [.., m, d] int16.

    Positions i = first .. first + d - 1, below 2^31. Low 15 bits: the bucket h(i; F0, F1) mod columns, columns <= 2^15;
    top bit set (negative): minus, where bit 15 of h(h(h(F2; i, F3); i, F4); i, F5) is 0, with h(a; i, c) = fold(a i + c)
    and fold(r) = (r XOR (r >> 31)) AND (2^31 - 1).
    """
    native = _native(coefficients)
    if native is None:
        return eager.ams_table(coefficients, first, d, columns)
    coefficients = coefficients.contiguous()
    *sets, _, m = coefficients.shape
    out = torch.empty(*sets, m, d, dtype=torch.int16)
    native.tc_ams_table(_at(coefficients), *_i64(math.prod(sets), m, first, d, columns), _at(out))
    return out


@_operator("(Tensor u, Tensor table, int columns) -> Tensor", _one_table)
def ams(u: Tensor, table: Tensor, columns: int) -> Tensor:
    """Sums of u, with the sign of each position, over each bucket: [.., d] float32, [m, d] int16 -> [.., m, columns].

    In float64, in the order of the positions, then rounded to float32. The table is never copied.
    """
    native = _native(u)
    if native is None:
        return eager.ams(u, table, columns)
    u, table = u.contiguous(), table.contiguous()
    m, d = table.shape
    out = torch.empty(*u.shape[:-1], m, columns)
    if native.tc_ams(_at(u), *_i64(math.prod(u.shape[:-1]), d), _at(table), *_i64(m, columns), _at(out)):
        raise MemoryError("no memory for 768 KiB of sums")
    return out


def fraction(p: float) -> int:
    """The threshold that a word passes with probability p: p 2^63 - 1.

    >>> fraction(1.0) == 2**63 - 1
    True
    """
    return max(-1, min(math.floor(p * 2.0**63), 1 << 63) - 1)
