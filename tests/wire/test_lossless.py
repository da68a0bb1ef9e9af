"""The coders: back comes what went in, in no more than one byte more, and near what the frequencies allow."""

from __future__ import annotations

import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn.core.errors import WireError
from taciturn.core.kernel import without_library
from taciturn.wire import entropy, lossless
from taciturn.wire.format import FRAME, Frame, Schema, pack, unpack
from taciturn.wire.lossless import CODERS, Lane, decode, encode

quick = settings(max_examples=100, deadline=None)
ALWAYS = 1 << 60


def gaussian(q: int, n: int, share: float, seed: int = 0) -> np.ndarray:
    """Codes around the middle: standard deviation share * q."""
    drawn = np.random.default_rng(seed).normal((q - 1) / 2, share * q, n)
    return np.clip(np.rint(drawn), 0, q - 1).astype(np.uint8)


def by_hand(seed: int) -> list[tuple[Lane, np.ndarray]]:
    """Up to three lanes: codes of any radix, or values of any size; some empty, some constant."""
    rng = np.random.default_rng(seed)
    lanes = []
    for _ in range(rng.integers(1, 4)):
        n = int(rng.choice([0, 1, 2, 3, rng.integers(0, 700)]))
        if rng.random() < 0.6:
            q = int(rng.choice([1, 2, 3, 15, 16, 255, 256, rng.integers(1, 257)]))
            codes = gaussian(q, n, float(rng.choice([0.0, 0.01, 0.2, 2.0])), seed)
            lanes.append((Lane(n, q, 1), codes))
        else:
            size = int(rng.choice([1, 2, 4, 8]))
            lanes.append((Lane(n, 0, size), rng.integers(0, rng.choice([1, 3, 256]), n * size).astype(np.uint8)))
    return lanes


@quick
@given(st.sampled_from([1, 2]), st.integers(0, 2**32).map(by_hand))
def test_coders_lose_nothing_in_c_and_python(coder, lanes):
    coded = encode(coder, lanes, ALWAYS)
    with without_library():
        assert encode(coder, lanes, ALWAYS) == coded
    if coder == 1 and not coded:
        return  # nothing to compress: stored
    raw = np.frombuffer(coded, np.uint8)
    for slow in (False, True):
        if slow:
            with without_library():
                back = decode(coder, raw, [lane for lane, _ in lanes])
        else:
            back = decode(coder, raw, [lane for lane, _ in lanes])
        assert all(np.array_equal(a, b) for a, (_, b) in zip(back, lanes, strict=True))
    assert encode(coder, lanes, len(coded)) is None, "as many bytes as allowed are too many"


@quick
@given(st.integers(0, 2**32), st.sampled_from([1, 2]))
def test_a_marker_costs_at_most_its_byte(seed, coder):
    rng = np.random.default_rng(seed)
    payload = {"x": torch.from_numpy(rng.integers(0, 256, int(rng.integers(0, 400))).astype(np.uint8))}
    plain = pack(Frame("update", payload))
    marked = pack(Frame("update", payload | {"lossless": torch.tensor(coder, dtype=torch.uint8)}))
    assert len(marked) == len(plain) + 1 and marked[FRAME] == 0 and marked[FRAME + 1 :] == plain[FRAME:]


@pytest.mark.parametrize("q", [2, 3, 5, 7, 15, 16, 31, 127, 255])
@pytest.mark.parametrize("share", [0.03, 0.15, 0.3])
def test_rans_is_near_the_entropy(q, share):
    codes = gaussian(q, 100_000, share)
    coded = encode(2, [(Lane(len(codes), q, 1), codes)], ALWAYS)
    most = entropy_bytes = entropy_of(codes)
    assert len(coded) <= 1.002 * most + 3 * q + 16, f"{len(coded)} bytes for {entropy_bytes:.0f}"


def entropy_of(codes: np.ndarray) -> float:
    counts = np.bincount(codes)
    return -sum(c * math.log2(c / len(codes)) for c in counts[counts > 0].tolist()) / 8


def test_what_repeats_costs_next_to_nothing():
    for coder in (1, 2):
        payload = {"v": torch.zeros(100_000), "lossless": torch.tensor(coder, dtype=torch.uint8)}
        assert len(pack(Frame("update", payload))) < FRAME + 100


def test_frequencies_add_up():
    """Many symbols that are seen once: what was rounded up comes from the most frequent."""
    for n in (256, 257, 1000, 40_000):
        codes = np.concatenate([np.arange(256), np.zeros(n - 256)]).astype(np.uint8)
        assert int(entropy._frequencies(codes, 256).sum()) == 1 << 14
    half = np.concatenate([np.arange(128), np.repeat(np.arange(128, 256), 10_000)]).astype(np.uint8)
    frequencies = entropy._frequencies(half, 256)
    assert int(frequencies.sum()) == 1 << 14 and frequencies.min() >= 1
    coded = encode(2, [(Lane(len(half), 0, 1), half)], ALWAYS)
    assert np.array_equal(decode(2, np.frombuffer(coded, np.uint8), [Lane(len(half), 0, 1)])[0], half)


# ------------------------------------------------------------------------------------------------------ forged bodies

LANES = [Lane(1000, 0, 1)]
PLAIN = bytes(1000)


def zstd(plain: bytes, **options) -> bytes:
    parameters = {"format": zstandard.FORMAT_ZSTD1_MAGICLESS, "write_content_size": False} | options
    settings = zstandard.ZstdCompressionParameters.from_level(1, **parameters)
    return zstandard.ZstdCompressor(compression_params=settings).compress(plain)


def window_of_a_gibibyte(content: bytes) -> bytes:
    """A frame header by hand: no checksum, no size, window 2^30; one last raw block."""
    return bytes([0x00, (30 - 10) << 3]) + struct.pack("<I", len(content) << 3 | 1)[:3] + content


FRAMES = {
    "size": zstd(PLAIN, write_content_size=True),
    "checksum": zstd(PLAIN, write_checksum=True),
    "magic": zstd(PLAIN, format=zstandard.FORMAT_ZSTD1),
    "window": window_of_a_gibibyte(PLAIN),
    "too long": zstd(bytes(1001)),
    "much too long": zstd(bytes(1 << 24)),
    "too short": zstd(bytes(999)),
    "tail": zstd(PLAIN) + b"\0",
    "two frames": zstd(PLAIN[:500]) + zstd(PLAIN[:500]),
    "cut": zstd(PLAIN)[:-1],
    "empty": b"",
    "one byte": b"\0",
    "not zstd": b"\xff" * 40,
}


@pytest.mark.parametrize("name", FRAMES)
def test_forged_zstd(name):
    assert len(decode(1, np.frombuffer(zstd(PLAIN), np.uint8), LANES)[0]) == 1000
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode(1, np.frombuffer(FRAMES[name], np.uint8), LANES)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def table(*frequencies: int) -> bytes:
    """Frequencies by hand, without runs: symbols of frequency 0 must not stand among them."""
    return b"".join(bytes([f & 127 | 128, f >> 7 & 127 | 128, f >> 14]) for f in frequencies)


STATES = struct.pack("<II", 1 << 23, 1 << 23)
PLANES = {
    "empty": (b"", "was cut"),
    "mode": (b"\2" + table(1 << 14, 0) + STATES, "a plane of mode 2"),
    "raw, cut": (b"\0", "was cut"),
    "no table": (b"\1", "a table of frequencies that was cut"),
    "half a table": (b"\1" + table(1 << 13), "a table of frequencies that was cut"),
    "sum": (b"\1" + table(1 << 13, 1 << 12) + STATES, "frequencies of 2 symbols with sum 12288"),
    "too much": (b"\1" + table(1 << 14, 1) + STATES, "with sum 16385"),
    "run beyond the alphabet": (b"\1\0\5" + STATES, "frequencies of 6 symbols with sum 0"),
    "no states": (b"\1" + table(1 << 13, 1 << 13) + STATES[:-1], "was cut"),
    "low state": (b"\1" + table(1 << 13, 1 << 13) + struct.pack("<II", 1, 1 << 23), "no coder writes"),
    "high state": (b"\1" + table(1 << 13, 1 << 13) + struct.pack("<II", 1 << 31, 1 << 23), "no coder writes"),
    "cut bytes": (b"\1" + table(1 << 13, 1 << 13) + STATES, "no coder writes, or that was cut"),
    "wrong end": (b"\1" + table(1 << 13, 1 << 13) + STATES + b"\1\1", "no coder writes"),
    "endless number": (b"\1" + b"\xff" * 50, "frequencies of 0 symbols"),
}


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("name", PLANES)
def test_forged_rans(name, slow):
    data, message = PLANES[name]
    raw = np.frombuffer(data, np.uint8)
    if slow:
        with without_library(), pytest.raises(WireError, match=message):
            decode(2, raw, [Lane(9, 2, 1)])
    else:
        with pytest.raises(WireError, match=message):
            decode(2, raw, [Lane(9, 2, 1)])


def test_bytes_after_the_end_of_the_planes():
    coded = encode(2, [(Lane(500, 2, 1), np.zeros(500, np.uint8))], ALWAYS)
    with pytest.raises(WireError, match="1 bytes after the end"):
        decode(2, np.frombuffer(coded + b"\0", np.uint8), [Lane(500, 2, 1)])


def test_a_bomb_is_refused_before_anything_is_allocated():
    """A few bytes that stand for 2^38 of zeros: by a count, by a mask, by a coder."""
    n = 1 << 36
    bombs = {
        "count": ([["x", "float32", [n]], ["x.count", "int32", []]], bytes(4)),
        "mask": ([["x", "float32", [n]], ["x.mask", "bool", []]], b"\0"),
        "rans": (
            [["lossless", "uint8", []], ["x", "float32", [n]]],
            b"\2" + (b"\1" + b"\x80\x80\1" + b"\0\xfe" + STATES) * 4,
        ),
        "zstd": ([["lossless", "uint8", []], ["x", "float32", [n]]], b"\1" + zstd(bytes(1 << 20))),
        "radix": ([["x", "uint8", [n]], ["x.radix", "uint8", []]], b"\0"),
        "width": ([["x", "int64", [n]], ["x.width", "uint8", []]], b"\0"),
    }
    for rows, body in bombs.values():
        schema = Schema.parse(str(rows).replace("'", '"').encode())
        head = b"tc\2\3" + struct.pack("<I", schema.id) + bytes(16)
        data = head + struct.pack("<I", zlib.crc32(head + body)) + body
        tracemalloc.start()
        try:
            with pytest.raises(WireError, match="bytes; at most 268435456 are rebuilt here"):
                unpack(data, {schema.id: schema})
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()


def test_entropy_and_numbers_of_coders():
    codes = gaussian(15, 10_000, 0.2)
    assert lossless.entropy(codes) == pytest.approx(entropy_of(codes)) and lossless.entropy(codes[:0]) == 0
    assert CODERS == ("stored", "zstd", "rans"), "numbers in messages: only ever added to"
