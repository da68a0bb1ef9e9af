"""Values <-> as few bits as they need: symbols of a radix, numbers of a width, booleans, and what a selection leaves.

symbols  groups of n symbols s_i of q are the number sum s_i q^i in B bytes, little-endian; n, B: core/payload.py, `GROUP`.
         The last group takes as few bytes as hold it. q = 2, 4, 16, 256 are plain bits, the first symbol in the lowest.
numbers  value i stands in bits [i w, (i + 1) w) of a little-endian string of bits; the last byte is filled up with zeros.

C where it was built (core/native/pack.c), else numpy, with the same bytes. A reader refuses what no writer makes: a group's
number of q^n or more, bits after the last value that are not zero. Arrays are numpy, one axis, contiguous; bytes are uint8.
"""

from __future__ import annotations

import ctypes
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from taciturn.core.errors import WireError
from taciturn.core.kernel import library
from taciturn.core.payload import GROUP, WIDEST, least_bytes

Raw: TypeAlias = NDArray[np.uint8]
Numbers: TypeAlias = NDArray[Any]


def _call(function: Any, *arguments: Any) -> int:
    """A C function of arrays and int64 numbers -> its int64."""
    function.restype = ctypes.c_int64
    found = function(
        *(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in arguments)
    )
    return int(found)


def byte_group(q: int) -> tuple[int, int]:
    """The group of one byte: as many symbols of q as it holds.

    >>> byte_group(3), byte_group(7), byte_group(255)
    ((5, 1), (2, 1), (1, 1))
    """
    if q == 1:
        return 1, 0
    n = 1
    while q ** (n + 1) <= 256:
        n += 1
    return n, 1


def symbol_bytes(n: int, q: int, group: tuple[int, int] | None = None) -> int:
    """Bytes of n symbols of q."""
    many, size = group or GROUP[q]
    return n // many * size + least_bytes(q, n % many)


def number_bytes(n: int, width: int) -> int:
    """Bytes of n numbers of `width` bits."""
    return (n * width + 7) // 8


# --------------------------------------------------------------------------------------------------------- symbols


def pack_symbols(codes: Raw, q: int, group: tuple[int, int] | None = None) -> Raw:
    """Symbols [n] of q -> bytes. Errors: `WireError` for a symbol that is not below q."""
    many, size = group or GROUP[q]
    n, native = len(codes), library()
    if native is None:
        wrong = n if not n or codes.max() < q else int((codes >= q).argmax())
    else:
        wrong = n if q == 256 else _call(native.tc_first_wrong, codes, n, q)
    if wrong < n:
        raise WireError(f"symbol {codes[wrong]} at place {wrong} of a code with {q} symbols (radix {q - 1})")
    out = np.empty(symbol_bytes(n, q, group), np.uint8)
    groups = n // many
    if native is None:
        out[: groups * size] = _group_bytes(codes[: groups * many].reshape(groups, many), q, size)
    elif size:
        _call(native.tc_pack_symbols, codes, groups, many, size, q, out)
    rest = codes[groups * many :].reshape(1, -1)
    if len(out) > groups * size:
        out[groups * size :] = _group_bytes(rest, q, len(out) - groups * size)
    return out


def _group_bytes(codes: Raw, q: int, size: int) -> Raw:
    """Groups [g, n] -> their bytes [g B]."""
    wide: type[np.unsignedinteger[Any]] = np.uint8 if size <= 1 else np.uint64
    numbers: Numbers = np.zeros(len(codes), wide)
    for column in reversed(range(codes.shape[1])):
        numbers = numbers * wide(q % 256 if size <= 1 else q) + codes[:, column]  # one symbol of 256: 0 times anything
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(len(codes), numbers.itemsize)[:, :size]).reshape(-1)


def unpack_symbols(raw: Raw, n: int, q: int, group: tuple[int, int] | None = None) -> Raw:
    """Bytes -> symbols [n] of q. Errors: `WireError` for a group that no writer makes."""
    many, size = group or GROUP[q]
    groups, native = n // many, library()
    out = np.empty(n, np.uint8)
    if native is None or not size:
        good = _split(raw[: groups * size], q, many, size, out[: groups * many])
    else:
        good = _call(native.tc_unpack_symbols, raw, groups, many, size, q, out)
    if good == groups and n > groups * many:
        rest = raw[groups * size :]
        good += _split(rest, q, n - groups * many, len(rest), out[groups * many :])
        groups += 1
    if good < groups:
        raise WireError(f"group {good} of a code with {q} symbols holds a number that stands for no symbols")
    return out


def _split(raw: Raw, q: int, many: int, size: int, out: Raw) -> int:
    """Bytes [g B] -> symbols [g n], written to `out`; how many groups are possible before the first that is not."""
    groups = len(out) // many
    if not size:
        out[:] = 0
        return groups
    wide = np.zeros((groups, 1 if size == 1 else 8), np.uint8)
    wide[:, :size] = raw.reshape(groups, size)
    numbers: Numbers = wide.view(np.uint8 if size == 1 else np.uint64).reshape(-1)
    codes = out.reshape(groups, many)
    if q == 256:
        codes[:, 0] = numbers
        return groups
    for column in range(many):
        numbers, codes[:, column] = np.divmod(numbers, numbers.dtype.type(q))
    return int((numbers > 0).argmax()) if numbers.any() else groups


# ------------------------------------------------------------------------------------------------- numbers and bits


def pack_numbers(values: Numbers, width: int) -> Raw:
    """Whole numbers [n] below 2^width -> bytes. Errors: `WireError` for a value or a width that does not fit."""
    n, native = len(values), library()
    require_width(width, values.dtype.name)
    if not width:
        wrong = int(values.astype(bool).argmax()) if values.any() else n
        out = np.empty(0, np.uint8)
    elif native is None:
        outside = (values < 0) | (values >> width > 0)
        wrong = int(outside.argmax()) if outside.any() else n
        out = _interleave(values.astype(np.uint64), width)
    else:
        out = np.empty(number_bytes(n, width), np.uint8)
        wrong = _call(getattr(native, f"tc_pack_width_{values.dtype.name}"), values, n, width, out)
    if wrong < n:
        raise WireError(f"value {values[wrong]} at place {wrong} of numbers of {width} bits")
    return out


def require_width(width: int, dtype: str) -> None:
    """Errors: `WireError` for a width that values of this dtype do not have."""
    if width > WIDEST[dtype]:
        raise WireError(f"numbers of {width} bits in a field of {dtype}; at most {WIDEST[dtype]} fit")


def _interleave(values: NDArray[np.uint64], width: int) -> Raw:
    """64 values of w bits are w words: each of the 64 stands at the same place of all such runs."""
    runs = -(-len(values) // 64)
    padded = np.zeros((runs, 64), np.uint64)
    padded.reshape(-1)[: len(values)] = values
    words = np.zeros((runs, width), np.uint64)
    for i in range(64):
        word, shift = divmod(i * width, 64)
        words[:, word] |= padded[:, i] << np.uint64(shift)
        if shift + width > 64:
            words[:, word + 1] |= padded[:, i] >> np.uint64(64 - shift)
    return words.view(np.uint8).reshape(-1)[: number_bytes(len(values), width)]


def unpack_numbers(raw: Raw, n: int, width: int, dtype: str) -> Numbers:
    """Bytes -> whole numbers [n]. Errors: `WireError` for a width that does not fit, or bits after the last value."""
    require_width(width, dtype)
    if not width:
        return np.zeros(n, dtype)
    spare = -n * width % 8
    if spare and raw[-1] >> (8 - spare):
        raise WireError("bits that are not zero after the last value")
    native = library()
    out = np.empty(n, dtype)
    if native is not None:
        _call(getattr(native, f"tc_unpack_width_{dtype}"), raw, len(raw), n, width, out)
        return out
    runs = -(-n // 64)
    words = np.zeros((runs, width), np.uint64)
    words.view(np.uint8).reshape(-1)[: len(raw)] = raw
    values = np.empty((runs, 64), np.uint64)
    for i in range(64):
        word, shift = divmod(i * width, 64)
        values[:, i] = words[:, word] >> np.uint64(shift)
        if shift + width > 64:
            values[:, i] |= words[:, word + 1] << np.uint64(64 - shift)
    values &= np.uint64((1 << width) - 1)
    out[:] = values.reshape(-1)[:n]
    return out


# -------------------------------------------------------------------------------------------------------- selection

Selection: TypeAlias = tuple[NDArray[np.bool_], int] | int  # which entries, and values of each; or the first so many values


def chosen(selection: Selection) -> int:
    """How many values travel."""
    return selection if isinstance(selection, int) else int(np.count_nonzero(selection[0])) * selection[1]


def _blocks(flat: Raw, mask: NDArray[np.bool_]) -> NDArray[Any]:
    """Bytes as one item for each entry of the mask, of the widest type that fits."""
    size = len(flat) // max(1, len(mask))
    return flat.view(f"u{size}") if size in (1, 2, 4, 8) and len(mask) else flat.reshape(len(mask), size)


def select(flat: Raw, selection: Selection, size: int) -> Raw:
    """The bytes of a tensor whose values have `size` bytes -> those of the values that travel."""
    if isinstance(selection, int):
        return flat[: selection * size]
    mask, _ = selection
    return np.ascontiguousarray(_blocks(flat, mask)[mask]).view(np.uint8).reshape(-1)


def spread(kept: Raw, selection: Selection, total: int) -> Raw:
    """The inverse of `select`: bytes [total], zeros where nothing traveled."""
    if isinstance(selection, int):
        if len(kept) == total:
            return kept if kept.flags.writeable else kept.copy()  # what may be written to was made here
        flat = np.zeros(total, np.uint8)
        flat[: len(kept)] = kept
        return flat
    mask, _ = selection
    flat = np.zeros(total, np.uint8)
    blocks = _blocks(flat, mask)
    blocks[mask] = kept.view(blocks.dtype).reshape(np.count_nonzero(mask), *blocks.shape[1:])
    return flat
