"""Speed, size and error of every codec on one vector, beside the speed of a memory copy and the codecs of others.

d = 10^7 float32, standard normal, one thread, CPU seconds, the best of several repeats; every repeat times a copy
first, and memory that was freed is kept by the process, as engines do.

    gbps          GB of input a second, encode + decode: the vector -> payload -> the vector
    ratio_copy    that over the speed of a copy into fresh memory
    gbps_wire     the same with the bytes in between: pack with its checksum, unpack with all its checks
    bytes_per_value   of the packed message, header included
    rel_error     |C(u) - u| / |u|; for unbiased codecs its square is what they add to the variance

`round`: CPU seconds of a whole round of W1 of `bench.engine` (FedAvg, 100 clients, MLP of 199,210 parameters) on the
stacked engine with codecs on the way up, each over the same round without compression, side by side.

Peers run in a process of their own, in a virtual environment of their own (build/peers, made on first use), on the
same vector: FedLab, hivemind, bitsandbytes (what hivemind and NVFlare call for blockwise codes; NVFlare itself calls
it on a GPU only) and NVFlare's float16 and AdaQuant. Their `gbps` is compress + decompress as they offer it, to the
objects that they would send.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.common import arguments, finish
from bench.engine import WORKLOADS, Bench
from bench.peer_programs.environments import interpreter
from taciturn import codecs
from taciturn.core import kernel, random
from taciturn.core.types import Codec
from taciturn.core.vector import Layout
from taciturn.engines.memory import keep_freed_memory
from taciturn.engines.modes import LAYERS
from taciturn.wire import Frame, Schema, pack, unpack

D = 10_000_000
LAYOUT = Layout(("u",), ((D,),))
PROGRAM = Path(__file__).parent / "peer_programs" / "codecs_run.py"
CODECS: dict[str, Codec] = {
    "identity": codecs.identity(),
    "cast": codecs.cast(),
    "cast-bfloat16": codecs.cast("bfloat16"),
    "quantize8": codecs.quantize8(),
    "quantize8-block": codecs.quantize8("block"),
    "quantize4": codecs.quantize4(),
    "quantize4-block": codecs.quantize4("block"),
    "quantize8-nearest": codecs.quantize(bits=8, scale="block", block=4096, rounding="nearest"),
    "quantize4-nearest": codecs.quantize(bits=4, scale="block", block=64, rounding="nearest"),
    "quantize2": codecs.quantize2(),
    "qsgd": codecs.qsgd(levels=16),
    "sign": codecs.sign(),
    "rotated-quantize4": codecs.rotated(codecs.quantize4()),
    "sparsify": codecs.sparsify(p=0.5),
    "sparsify-0.01": codecs.sparsify(p=0.01),
    "rand_k": codecs.rand_k(share=0.01),
    "top_k": codecs.top_k(share=0.01),
    "top_k-quantize8": codecs.chain(codecs.top_k(share=0.01), codecs.quantize8()),
    "sketch": codecs.sketch(share=0.1),
    "error_feedback": codecs.error_feedback(codecs.top_k(share=0.01)),
    "lossless-quantize4": codecs.lossless(codecs.quantize4()),
    "lossless-rans-quantize4": codecs.lossless(codecs.quantize4(), "rans"),
}
KEEP = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 30))  # as `keep_freed_memory`
TARGETS = {"cast": 0.5} | dict.fromkeys(("quantize8", "quantize4", "sign", "sparsify", "rand_k"), 0.15)


def clock(call: Any) -> tuple[float, Any]:
    """(CPU seconds, result)."""
    began = time.process_time()
    found = call()
    return time.process_time() - began, found


def measure(name: str, u: torch.Tensor, repeats: int) -> dict[str, Any]:
    """One codec: the best times of each part over the repeats."""
    codec = CODECS[name]
    tx, rx = codec.init(LAYOUT)
    best: dict[str, float] = {}
    for repeat in range(repeats):
        key = random.key(repeat)
        copy, _ = clock(u.clone)
        there, (payload, _) = clock(lambda key=key: codec.encode(u, tx, key, layout=LAYOUT, knobs={}))
        schemas = {Schema.of(payload).id: Schema.of(payload)}
        packing, message = clock(lambda payload=payload: pack(Frame("update", payload)))
        reading, frame = clock(lambda message=message, schemas=schemas: unpack(message, schemas, largest=1 << 30))
        back, (got, _) = clock(lambda frame=frame: codec.decode(frame.payload, rx, layout=LAYOUT))
        for part, seconds in {"copy": copy, "encode": there, "decode": back, "wire": packing + reading}.items():
            best[part] = min(best.get(part, seconds), seconds)
        del payload, frame
    size = 4 * len(u) / 1e9
    alone = best["encode"] + best["decode"]
    return {
        "gbps": size / alone,
        "ratio_copy": best["copy"] / alone,
        "gbps_wire": size / (alone + best["wire"]),
        "bytes_per_value": len(message) / len(u),
        "rel_error": float((got.double() - u.double()).norm() / u.double().norm()),
        "milliseconds": {part: 1e3 * seconds for part, seconds in best.items()},
    }


def topk_ratio(u: torch.Tensor, repeats: int) -> float:
    """Seconds of our top-k (encode) over those of torch.topk of the magnitudes, side by side."""
    codec, ours, theirs = CODECS["top_k"], [], []
    for repeat in range(repeats):
        key = random.key(repeat)
        theirs.append(clock(lambda: torch.topk(u.abs(), D // 100))[0])
        ours.append(clock(lambda key=key: codec.encode(u, {}, key, layout=LAYOUT, knobs={}))[0])
    return min(ours) / min(theirs)


def rounds(count: int) -> dict[str, Any]:
    """CPU seconds of a round with each codec, and over one with identity: medians of `count` rounds in turn."""
    chosen = ("identity", "cast", "quantize8", "quantize4", "rotated-quantize4", "rand_k", "error_feedback")
    engines = {name: Bench(WORKLOADS["W1"], LAYERS, codec=CODECS[name]) for name in chosen}
    for number in range(count + 1):
        for engine in engines.values():
            engine.round()
            if not number:
                engine.seconds.clear()
    plain = engines["identity"].seconds
    return {
        name: {
            "cpu_seconds": median(engine.seconds),
            "ratio_identity": median(a / b for a, b in zip(engine.seconds, plain, strict=True)),
        }
        for name, engine in engines.items()
    }


def peers(u: torch.Tensor, repeats: int) -> dict[str, Any]:
    """The codecs of others on the same vector, or why they could not be run."""
    try:
        python = interpreter("codecs")
    except RuntimeError as error:
        return {"reason": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "u.npy"
        np.save(file, u.numpy())
        command = [str(python), str(PROGRAM), str(file), str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=1200, env={**os.environ, **KEEP})
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Measure, print the table and the JSON line."""
    quick = arguments(__doc__).quick
    torch.set_num_threads(1)
    keep_freed_memory()
    repeats = 5 if quick else 15
    u = random.normal(random.key(0), D)
    copies = [clock(u.clone)[0] for _ in range(3 * repeats)]
    table = Table("codec", "GB/s", "/ copy", "GB/s to bytes", "bytes a value", "relative error", box=None)
    figures: dict[str, Any] = {}
    for name in CODECS:
        row = figures[name] = measure(name, u, repeats)
        cells = [f"{row[part]:.3g}" for part in ("gbps", "ratio_copy", "gbps_wire", "bytes_per_value", "rel_error")]
        table.add_row(name, *cells)
    found = peers(u, max(2, repeats // 3))
    for name, row in found.items():
        if isinstance(row, dict) and row.get("gbps"):
            cells = [f"{row[part]:.3g}" for part in ("gbps", "ratio_copy")]
            table.add_row(name, *cells, "", f"{row['bytes_per_value']:.3g}", f"{row['rel_error']:.3g}")
        else:
            table.add_row(name, str(row["reason"] if isinstance(row, dict) else row), "", "", "", "")
    whole = rounds(3 if quick else 9)
    for name, row in whole.items():
        table.add_row(f"round with {name}", "", "", f"{row['cpu_seconds']:.3f} s", "", f"{row['ratio_identity']:.2f} x")
    Console(width=140).print(table)
    result = {
        "copy_gbps": 4e-9 * D / min(copies),
        "kernels": "compiled" if kernel.library() else "torch",
        "codecs": figures,
        "round": whole,
        "top_k_vs_torch_topk": topk_ratio(u, max(2, repeats // 2)),
        "targets": TARGETS,
        "met": {name: figures[name]["ratio_copy"] >= least for name, least in TARGETS.items()},
        "peers": found,
        "n": {"tasks": 1, "seeds": repeats, "rounds": None},
    }
    finish("codecs", result, quick)


if __name__ == "__main__":
    main()
