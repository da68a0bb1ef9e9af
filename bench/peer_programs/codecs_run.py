"""The codecs of other libraries on the vector of a file: one JSON line. Runs in an environment of its own.

Each is used as its documentation says, on one thread; `bytes` are those of the tensors and buffers that it would send.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable

os.environ["QUANTIZATION_THREADS"] = "1"

import numpy as np
import torch

logging.disable(logging.WARNING)


def fedlab(u: torch.Tensor):
    """QSGD with n bits, as int32 intervals with signs apart: counted as n + 1 bits a value; top-k with int64 places."""
    from fedlab.contrib.compressor.quantization import QSGDCompressor
    from fedlab.contrib.compressor.topk import TopkCompressor

    d = u.numel()
    for bits in (3, 7):
        codec = QSGDCompressor(n_bit=bits)
        yield f"fedlab-qsgd{bits + 1}", codec.compress, codec.decompress, lambda _, bits=bits: d * (bits + 1) / 8 + 4
    codec = TopkCompressor(compress_ratio=0.01)
    yield "fedlab-topk", codec.compress, lambda m: codec.decompress(*m, (d,)), lambda m: m[0].nbytes + m[1].nbytes


def hivemind(u: torch.Tensor):
    """float16, scaled float16, 8 bits with a code book (uniform, quantile), blockwise 8 bits."""
    from hivemind.compression import (
        BlockwiseQuantization,
        CompressionInfo,
        Float16Compression,
        Quantile8BitQuantization,
        ScaledFloat16Compression,
        Uniform8BitQuantization,
    )

    info = CompressionInfo.from_tensor(u)
    kinds = (
        Float16Compression, ScaledFloat16Compression, Uniform8BitQuantization, Quantile8BitQuantization,
        BlockwiseQuantization,
    )  # fmt: skip
    for kind in kinds:
        codec = kind()
        yield f"hivemind-{kind.__name__}", lambda v, c=codec: c.compress(v, info), codec.extract, lambda m: len(m.buffer)


def bitsandbytes(u: torch.Tensor):
    """Blockwise 8-bit codes, and 4-bit (normal float), on the CPU."""
    from bitsandbytes import functional

    def size(message):
        codes, state = message
        return codes.nbytes + state.absmax.nbytes

    def nf4(v):
        return functional.quantize_4bit(v, quant_type="nf4")

    yield "bitsandbytes-blockwise8", functional.quantize_blockwise, lambda m: functional.dequantize_blockwise(*m), size
    yield "bitsandbytes-nf4", nf4, lambda m: functional.dequantize_4bit(*m), size


def nvflare(u: torch.Tensor):
    """float16 and AdaQuant through its filters; its blockwise and 4-bit types call a GPU."""
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer
    from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer

    context = FLContext()
    for kind in ("float16", "adaquant"):
        codec, back = ModelQuantizer(kind), ModelDequantizer()

        def there(v, codec=codec):
            return codec.quantization({"u": v}, context)

        def again(message, back=back, kind=kind):
            params, state, source = message
            return back.dequantization(params, state, kind, source, context)["u"]

        def size(message):
            params, state = message[:2]
            extra = sum(getattr(t, "nbytes", 0) for t in state.get("u", {}).values())
            return params["u"].nbytes + extra

        yield f"nvflare-{kind}", there, again, size


def best(call: Callable, argument: object, repeats: int):
    """(least CPU seconds, last result)."""
    seconds, found = [], None
    for _ in range(repeats):
        began = time.process_time()
        found = call(argument)
        seconds.append(time.process_time() - began)
    return min(seconds), found


def main() -> None:
    """Every codec of every library, or the reason why not."""
    torch.set_num_threads(1)
    u, repeats = torch.from_numpy(np.load(sys.argv[1])), int(sys.argv[2])
    result: dict[str, object] = {}
    copy, _ = best(torch.clone, u, 3 * repeats)
    for library in (fedlab, hivemind, bitsandbytes, nvflare):
        try:
            for name, compress, decompress, size in library(u):
                try:
                    there, message = best(compress, u, repeats)
                    sent = size(message)
                    back, got = best(decompress, message, repeats)
                    error = float((got.double() - u.double()).norm() / u.double().norm())
                    if not math.isfinite(error):
                        raise ValueError("what comes back is not finite")
                    result[name] = {
                        "gbps": 4e-9 * u.numel() / (there + back), "ratio_copy": copy / (there + back),
                        "bytes_per_value": sent / u.numel(), "rel_error": error,
                    }  # fmt: skip
                except Exception as error:
                    result[name] = {"gbps": None, "reason": f"{type(error).__name__}: {error}"[:200]}
        except Exception as error:
            result[library.__name__] = {"gbps": None, "reason": f"{type(error).__name__}: {error}"[:200]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
