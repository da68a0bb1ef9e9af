"""Data fields compressed by what their values repeat: coders that a payload's marker "lossless" chooses.

A lane is what travels of one data field: symbols of a radix, one a byte (q > 0), or values of `size` bytes (q = 0).

    0  stored  symbols packed (core/payload.py), bytes as they are
    1  zstd    symbols in groups of one byte, values as byte planes (all first bytes, all second ..); one zstd frame
               over all lanes, without magic number, size and checksum, window at most 2^23 bytes
    2  rans    symbols, and every byte plane, each coded by its own frequencies (entropy.py); an empty lane takes nothing

The forms are what compresses: see docs/wire.md for the measurements. A reader knows the size of every lane before it looks
at the bytes (schema and control fields say it), allocates that and no more, and refuses what ends elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import zstandard

from taciturn.core.errors import WireError
from taciturn.wire.entropy import code_plane, read_plane
from taciturn.wire.packing import Raw, byte_group, pack_symbols, symbol_bytes, unpack_symbols

CODERS = ("stored", "zstd", "rans")
_LEVEL = 1  # higher levels look for repetitions, which codes do not have, and gain nothing on them
_WINDOW = 1 << 23


@dataclass(frozen=True, slots=True)
class Lane:
    """How one data field travels. n: symbols or values; q: symbols of the code, 0 if it is none; size: bytes of a value."""

    n: int
    q: int
    size: int

    @property
    def bytes(self) -> int:
        """Bytes of the lane in memory."""
        return self.n * self.size

    @property
    def stored(self) -> int:
        """Bytes of the lane as it is stored."""
        return symbol_bytes(self.n, self.q) if self.q else self.n * self.size


def store(lane: Lane, raw: Raw) -> Raw:
    """A lane as it is stored."""
    return pack_symbols(raw, lane.q) if lane.q else raw


def load(lane: Lane, raw: Raw) -> Raw:
    """The inverse of `store`. Errors: `WireError`."""
    return unpack_symbols(raw, lane.n, lane.q) if lane.q else raw


def encode(coder: int, lanes: Sequence[tuple[Lane, Raw]], most: int) -> bytes | None:
    """Lanes in fewer than `most` bytes, or None if the coder needs as many."""
    if CODERS[coder] == "zstd":
        plain = b"".join(_byte_groups(lane, raw) for lane, raw in lanes)
        coded = _compressor().compress(plain)[len(zstandard.FRAME_HEADER) :] if plain else b""
    else:
        coded = b"".join(plane for lane, raw in lanes for plane in _planes(lane, raw))
    return coded if len(coded) < most else None


def decode(coder: int, raw: Raw, lanes: Sequence[Lane]) -> list[Raw]:
    """The inverse of `encode`. Errors: `WireError`."""
    if CODERS[coder] == "zstd":
        return _from_byte_groups(_decompress(raw, sum(map(_grouped, lanes))), lanes)
    found, at = [], 0
    for lane in lanes:
        got, at = _from_planes(raw, at, lane)
        found.append(got)
    if at != len(raw):
        raise WireError(f"{len(raw) - at} bytes after the end of the coded body")
    return found


# ------------------------------------------------------------------------------------------------------------- zstd


def _grouped(lane: Lane) -> int:
    """Bytes of a lane as zstd gets it."""
    return symbol_bytes(lane.n, lane.q, byte_group(lane.q)) if lane.q else lane.bytes


def _byte_groups(lane: Lane, raw: Raw) -> bytes:
    if lane.q:
        return pack_symbols(raw, lane.q, byte_group(lane.q)).tobytes()
    return raw.reshape(-1, lane.size).T.tobytes()


def _from_byte_groups(plain: Raw, lanes: Sequence[Lane]) -> list[Raw]:
    found, at = [], 0
    for lane in lanes:
        mine = plain[at : at + _grouped(lane)]
        at += len(mine)
        if lane.q:
            found.append(unpack_symbols(mine, lane.n, lane.q, byte_group(lane.q)))
        else:
            found.append(np.ascontiguousarray(mine.reshape(lane.size, -1).T).reshape(-1))
    return found


def _compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(_LEVEL, write_checksum=False, write_content_size=False, write_dict_id=False)


def _decompress(raw: Raw, size: int) -> Raw:
    """One frame of exactly `size` bytes; what the frame says of itself is only compared."""
    data = zstandard.FRAME_HEADER + raw.tobytes()
    try:
        facts = zstandard.get_frame_parameters(data)
        known = facts.content_size != zstandard.CONTENTSIZE_UNKNOWN
        if known or facts.dict_id or facts.has_checksum or facts.window_size > _WINDOW or not size:
            raise WireError("a zstd frame that this format does not write (size, dictionary, checksum or window)")
        reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        plain = reader.decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise WireError(f"a compressed body that cannot be read: {error}") from error
    if len(plain) != size:
        raise WireError(f"a compressed body of {len(plain)} bytes; its schema and control fields make {size}")
    return np.frombuffer(plain, np.uint8)


# ------------------------------------------------------------------------------------------------------------- rans


def _planes(lane: Lane, raw: Raw) -> list[bytes]:
    if not lane.n or lane.q == 1:
        return []
    if lane.q:
        return [code_plane(raw, lane.q, pack_symbols(raw, lane.q))]
    planes = np.ascontiguousarray(raw.reshape(-1, lane.size).T)
    return [code_plane(plane, 256, plane) for plane in planes]


def _from_planes(raw: Raw, at: int, lane: Lane) -> tuple[Raw, int]:
    """A lane that starts at `at`, and where it ends."""
    if not lane.n or lane.q == 1:
        return np.zeros(lane.bytes, np.uint8), at
    if lane.q:
        coded, found, at = read_plane(raw, at, lane.n, lane.q, lane.stored)
        return found if coded else unpack_symbols(found, lane.n, lane.q), at
    planes = []
    for _ in range(lane.size):
        _, found, at = read_plane(raw, at, lane.n, 256, lane.n)
        planes.append(found)
    return np.ascontiguousarray(np.stack(planes, 1)).reshape(-1), at


def entropy(symbols: Raw) -> float:
    """Bytes that the symbols need by their frequencies alone: n H / 8.

    >>> entropy(np.array([0, 1, 2, 3] * 8, np.uint8))
    8.0
    """
    shares = np.bincount(symbols) / max(1, len(symbols))
    return -len(symbols) / 8 * math.fsum(p * math.log2(p) for p in shares.tolist() if p)
