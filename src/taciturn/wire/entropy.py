"""Symbols <-> nearly as few bits as their frequencies need: an asymmetric numeral system (rANS), frequencies in front.

A plane of n symbols is one mode byte, then
    0  the bytes as they are
    1  frequencies f_s of all symbols s, sum 2^14, each in groups of 7 bits, the lowest first, high bit: more follow; after
       a 0 one byte says how many more zeros follow. Then two states of 4 bytes, little-endian, and the bytes they shift in.
State k (k = i mod 2) gives symbol i: with slot = x mod 2^14 in [c_s, c_s + f_s), c_s = f_0 + .. + f_(s-1),
    x <- f_s floor(x / 2^14) + slot - c_s;   while x < 2^23: x <- 256 x + the next byte.
Both states start in [2^23, 2^31) and end at 2^23. A symbol of frequency f costs log2(2^14 / f) bits.

C where it was built, else Python, with the same bytes; Python takes a third of a second for a million symbols.

Source: J. Duda, Asymmetric numeral systems, arXiv:1311.2540.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from taciturn.core.errors import WireError
from taciturn.core.kernel import library
from taciturn.wire.packing import Raw

_SCALE = 14
_SUM, _LOW = 1 << _SCALE, 1 << 23
_RAW, _CODED = b"\0", b"\1"


def code_plane(symbols: Raw, alphabet: int, plain: Raw) -> bytes:
    """Symbols [n] below `alphabet` -> a plane; `plain`: the bytes that stand for them if coding does not help."""
    frequencies = _frequencies(symbols, alphabet)
    head = _CODED + _table(frequencies[:alphabet])
    body = _encode(symbols, frequencies)
    if len(head) + len(body) > len(plain):
        return _RAW + plain.tobytes()
    return head + body


def _frequencies(symbols: Raw, alphabet: int) -> NDArray[np.uint32]:
    """Counts scaled to a sum of 2^14, at least 1 where there are any; the most frequent gets what is left."""
    counts = np.bincount(symbols, minlength=256)
    scaled = np.where(counts > 0, np.maximum(counts * _SUM // len(symbols), 1), 0)
    short = _SUM - int(scaled.sum())
    scaled[scaled.argmax()] += max(short, 0)
    for _ in range(-short):
        scaled[scaled.argmax()] -= 1
    return scaled.astype(np.uint32)


def _table(frequencies: NDArray[np.uint32]) -> bytes:
    values, out, at = frequencies.tolist(), bytearray(), 0
    while at < len(values):
        value = values[at]
        at += 1
        out.append(value & 127 | (128 if value > 127 else 0))
        while value > 127:
            value >>= 7
            out.append(value & 127 | (128 if value > 127 else 0))
        if values[at - 1] == 0:
            run = 0
            while at + run < len(values) and values[at + run] == 0:
                run += 1
            out.append(run)  # at most 255 symbols follow the first
            at += run
    return bytes(out)


def _encode(symbols: Raw, frequencies: NDArray[np.uint32]) -> bytes:
    """The states and their bytes."""
    native = library()
    if native is not None:
        room = 2 * len(symbols) + 16  # a symbol shifts out two bytes at most
        out = np.empty(room, np.uint8)
        native.tc_rans_encode.restype = ctypes.c_int64
        arrays = (ctypes.c_void_p(a.ctypes.data) for a in (symbols, frequencies, out))
        first, second, third = arrays
        size = native.tc_rans_encode(first, ctypes.c_int64(len(symbols)), second, third, ctypes.c_int64(room))
        return out[room - size :].tobytes()
    f, starts = frequencies.tolist(), (np.cumsum(frequencies) - frequencies).tolist()
    states, shifted = [_LOW, _LOW], bytearray()
    for i in range(len(symbols) - 1, -1, -1):
        s, x = int(symbols[i]), states[i & 1]
        while x >= ((_LOW >> _SCALE) << 8) * f[s]:
            shifted.append(x & 255)
            x >>= 8
        states[i & 1] = ((x // f[s]) << _SCALE) + x % f[s] + starts[s]
    return b"".join(x.to_bytes(4, "little") for x in states) + bytes(reversed(shifted))


def read_plane(raw: Raw, at: int, n: int, alphabet: int, plain: int) -> tuple[bool, Raw, int]:
    """A plane of n symbols that starts at `at` -> (is it coded?, its symbols or plain bytes, where it ends).

    Errors: `WireError` for what `code_plane` does not write. Nothing is allocated before the frequencies are read.
    """
    if at >= len(raw):
        raise WireError("a coded body that was cut")
    mode, at = bytes(raw[at : at + 1]), at + 1
    if mode == _RAW:
        if at + plain > len(raw):
            raise WireError("a coded body that was cut")
        return False, raw[at : at + plain], at + plain
    if mode != _CODED:
        raise WireError(f"a plane of mode {mode[0]}; modes are 0 and 1")
    frequencies, at = _parse_table(raw, at, alphabet)
    symbols, used = _decode(raw[at:], n, frequencies)
    return True, symbols, at + used


def _parse_table(raw: Raw, at: int, alphabet: int) -> tuple[NDArray[np.uint32], int]:
    """The frequencies [256] that stand at `at`, and where they end."""
    data, start, place, total = raw[at : at + 4 * alphabet].tobytes(), at, 0, 0
    frequencies = np.zeros(256, np.uint32)
    at = 0
    try:
        while place < alphabet:
            value, shift = data[at] & 127, 7
            while data[at] > 127 and shift < 28:
                at += 1
                value |= (data[at] & 127) << shift
                shift += 7
            at += 1
            total += value
            if total > _SUM:
                break
            frequencies[place] = value
            place += 1
            if not value:
                place += data[at]
                at += 1
    except IndexError:
        raise WireError("a table of frequencies that was cut") from None
    if place != alphabet or total != _SUM:
        raise WireError(f"frequencies of {place} symbols with sum {total}; there are {alphabet}, with sum {_SUM}")
    return frequencies, start + at


def _decode(raw: Raw, n: int, frequencies: NDArray[np.uint32]) -> tuple[Raw, int]:
    """n symbols, and how many bytes they took."""
    if len(raw) < 8:
        raise WireError("a coded body that was cut")
    out, native = np.empty(n, np.uint8), library()
    if native is not None:
        native.tc_rans_decode.restype = ctypes.c_int64
        first, second, third = (ctypes.c_void_p(a.ctypes.data) for a in (raw, frequencies, out))
        used = native.tc_rans_decode(first, ctypes.c_int64(len(raw)), ctypes.c_int64(n), second, third)
    else:
        used = _decode_slowly(raw.tobytes(), n, frequencies, out)
    if used < 0:
        raise WireError("a coded body that no coder writes, or that was cut")
    return out, used


def _decode_slowly(data: bytes, n: int, frequencies: NDArray[np.uint32], out: Raw) -> int:
    """`tc_rans_decode` in Python."""
    symbol = np.repeat(np.arange(256), frequencies).tolist()
    f, starts = frequencies.tolist(), (np.cumsum(frequencies) - frequencies).tolist()
    states, at = [int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little")], 8
    if not all(_LOW <= x < _LOW << 8 for x in states):
        return -1
    for i in range(n):
        x = states[i & 1]
        slot = x & (_SUM - 1)
        s = symbol[slot]
        x = f[s] * (x >> _SCALE) + slot - starts[s]
        while x < _LOW:
            if at == len(data):
                return -1
            x = x << 8 | data[at]
            at += 1
        states[i & 1], out[i] = x, s
    return at if states == [_LOW, _LOW] else -1
