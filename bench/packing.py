"""Packing: how fast, and how near to the entropy the coders of the marker "lossless" come.

Speed: 10^7 values, one thread, milliseconds of CPU time for packing and unpacking (best of seven), in C and in numpy; a
whole message with header, copies and checksum. Coders: 10^6 values drawn from a Gaussian, a Laplace and a Student t
distribution with 3 degrees of freedom (heavy tails), quantized by the library's own codecs. Units: bits of one code;
H: -sum p log2 p of the codes that were drawn, the least for any coder that knows frequencies only. Floats: share of the
bytes that is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import zstandard
from rich.console import Console
from rich.table import Table

from bench.common import arguments, finish
from taciturn import codecs
from taciturn.core import random
from taciturn.core.kernel import without_library
from taciturn.core.vector import Layout
from taciturn.wire.format import FRAME, Frame, Schema, pack, unpack
from taciturn.wire.lossless import Lane, encode, entropy
from taciturn.wire.packing import byte_group, pack_numbers, pack_symbols, unpack_numbers, unpack_symbols

RADIX = (2, 3, 4, 5, 7, 15, 16, 31, 127, 255, 256)
WIDTHS = ((5, "int16"), (7, "int32"), (20, "int32"), (24, "int64"), (33, "int64"), (62, "int64"))
CODECS = {
    "quantize4, tensor": codecs.quantize(bits=4, scale="tensor"),
    "quantize4, blocks of 256": codecs.quantize(bits=4, scale="block"),
    "5 levels, blocks of 256": codecs.quantize(levels=5, scale="block"),
    "3 levels, blocks of 256": codecs.quantize(levels=3, scale="block"),
    "ternary, tensor": codecs.quantize(levels=1, scale="tensor"),
    "ternary, blocks of 256": codecs.quantize(levels=1, scale="block"),
    "ternary, mean, nearest": codecs.quantize(levels=1, scale="tensor", norm="mean", rounding="nearest"),
    "qsgd, levels=1": codecs.qsgd(levels=1),
    "quantize8, tensor": codecs.quantize(bits=8, scale="tensor"),
}
CODED = 1 << 60  # no bound on what a coder may take


def best(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Milliseconds of the fastest run, and what it gave."""
    took = []
    for _ in range(repeats):
        start = time.thread_time()
        found = run()
        took.append(time.thread_time() - start)
    return min(took) * 1e3, found


def speeds(n: int, repeats: int) -> dict[str, dict[str, float]]:
    """{row: {pack, unpack}} in ms."""
    rng, rows = np.random.default_rng(0), {}
    for q in RADIX:
        codes = rng.integers(0, q, n, dtype=np.uint8)
        there, raw = best(lambda codes=codes, q=q: pack_symbols(codes, q), repeats)
        back, got = best(lambda raw=raw, q=q: unpack_symbols(raw, n, q), repeats)
        assert np.array_equal(got, codes)
        rows[f"{q} symbols"] = {"pack": there, "unpack": back, "bits": 8 * len(raw) / n}
    for width, dtype in WIDTHS:
        values = rng.integers(0, 1 << width, n, dtype=dtype)
        there, raw = best(lambda values=values, width=width: pack_numbers(values, width), repeats)
        back, got = best(lambda raw=raw, width=width, dtype=dtype: unpack_numbers(raw, n, width, dtype), repeats)
        assert np.array_equal(got, values)
        rows[f"{width} bits of {dtype}"] = {"pack": there, "unpack": back, "bits": 8 * len(raw) / n}
    return rows


def message(n: int, repeats: int) -> dict[str, float]:
    """A message of n 4-bit codes."""
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 16, n, dtype=np.uint8))
    payload = {"codes": codes, "codes.radix": torch.tensor(15, dtype=torch.uint8)}
    schemas = {(schema := Schema.of(payload)).id: schema}
    there, data = best(lambda: pack(Frame("update", payload)), repeats)
    back, frame = best(lambda: unpack(data, schemas), repeats)
    assert torch.equal(frame.payload["codes"], codes)
    return {"pack": there, "unpack": back, "bits": 8 * len(data) / n}


def draw(kind: str, n: int) -> torch.Tensor:
    """[n] float32."""
    rng = np.random.default_rng(1)
    drawn = {"Gauss": rng.standard_normal, "Laplace": lambda n: rng.laplace(size=n), "t3": lambda n: rng.standard_t(3, n)}
    return torch.from_numpy(drawn[kind](n).astype(np.float32))


def zstd_size(plain: bytes, level: int) -> int:
    """Bytes of plain zstd, without the fields that a message does not need."""
    return len(zstandard.ZstdCompressor(level=level, write_content_size=False).compress(plain))


def coded(u: torch.Tensor, codec: Any) -> dict[str, float]:
    """Bits of one code: what the frequencies allow, packed, and by each coder and form."""
    layout = Layout(("w",), ((len(u),),))
    payload, _ = codec.encode(u, codec.init(layout)[0], random.key(0), layout=layout, knobs={})
    codes, q = payload["codes"].numpy(), int(payload["codes.radix"]) + 1
    lanes, scale = [(Lane(len(codes), q, 1), codes)], 8 / len(codes)
    grouped = pack_symbols(codes, q, byte_group(q)).tobytes()
    sizes = {
        "packed": len(pack_symbols(codes, q)), "zstd": len(encode(1, lanes, CODED)), "rans": len(encode(2, lanes, CODED)),
        "zstd level 1, a code a byte": zstd_size(codes.tobytes(), 1), "zstd level 3, groups": zstd_size(grouped, 3),
        "zstd level 9, groups": zstd_size(grouped, 9),
    }  # fmt: skip
    return {"H": entropy(codes) * scale} | {name: size * scale for name, size in sizes.items()}


def floats(u: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Share of the bytes that is left of values that are not quantized."""
    raw = u.to(dtype).view(torch.uint8).numpy()
    lanes = [(Lane(len(u), 0, dtype.itemsize), raw)]
    sizes = {"zstd of the values": zstd_size(raw.tobytes(), 1), "zstd": len(encode(1, lanes, CODED))}
    return {name: size / len(raw) for name, size in (sizes | {"rans": len(encode(2, lanes, CODED))}).items()}


def times(n: int, repeats: int) -> dict[str, float]:
    """Milliseconds for a message of n 4-bit codes of a Gaussian vector under each coder."""
    found = {}
    layout = Layout(("w",), ((n,),))
    for coder in ("zstd", "rans"):
        codec = codecs.lossless(codecs.quantize4(), coder)
        payload, _ = codec.encode(draw("Gauss", n), {}, random.key(0), layout=layout, knobs={})
        schemas = {(schema := Schema.of(payload)).id: schema}
        there, data = best(lambda payload=payload: pack(Frame("update", payload)), repeats)
        back, _ = best(lambda data=data, schemas=schemas: unpack(data, schemas), repeats)
        found |= {f"{coder}_pack": there, f"{coder}_unpack": back, f"{coder}_bits": 8 * (len(data) - FRAME) / n}
    return found


def show(title: str, rows: dict[str, dict[str, float]], digits: int) -> None:
    """Rows of equal columns."""
    table = Table(title, *next(iter(rows.values())))
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.{digits}f}" for value in row.values()))
    Console(width=140).print(table)


def main() -> None:
    """Run, print."""
    quick = arguments(__doc__).quick
    n, few, repeats = (1_000_000, 100_000, 3) if quick else (10_000_000, 1_000_000, 7)
    native = speeds(n, repeats)
    with without_library():
        slow = speeds(n, 1)
    whole = message(n, repeats)
    show(f"ms, {n:,} values, C", native | {"message of 4-bit codes": whole}, 1)
    show(f"ms, {n:,} values, numpy", slow, 1)
    sources = {kind: draw(kind, few) for kind in ("Gauss", "Laplace", "t3")}
    table = {f"{name}, {kind}": coded(u, codec) for name, codec in CODECS.items() for kind, u in sources.items()}
    show("bits of one code", table, 4)
    shares = {
        f"{str(dtype).removeprefix('torch.')}, {kind}": floats(u, dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for kind, u in sources.items()
    }
    show("share of the bytes", shares, 3)
    took = times(few, repeats)
    print(f"{few:,} values, quantize4:", ", ".join(f"{name} {value:.2f}" for name, value in took.items()))
    over = {coder: max(row[coder] / row["H"] for row in table.values()) for coder in ("packed", "zstd", "rans")}
    figures = {
        "n": {"values": n, "coded": few, "repeats": repeats, "seeds": 1},
        "four_bit_ms": native["16 symbols"]["pack"] + native["16 symbols"]["unpack"],
        "slowest_radix_ms": max(row["pack"] + row["unpack"] for name, row in native.items() if "symbols" in name),
        "slowest_width_ms": max(row["pack"] + row["unpack"] for name, row in native.items() if "bits" in name),
        "message_ms": whole["pack"] + whole["unpack"],
        "worst_over_entropy": over,
        "c": native, "numpy": slow, "message": whole, "codes": table, "floats": shares, "coder_ms": took,
    }  # fmt: skip
    finish("packing", figures, quick)


if __name__ == "__main__":
    main()
