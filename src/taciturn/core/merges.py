"""Products that the frozen base takes, on their way down: base <- base + X Y, layer by layer.

Symbols: X [m, K], Y [K, n] of a layer; base {layer: [m, n]} the sum of all products so far, the same for all receivers.
A frame has one of these fields for a layer:

    base:LAYER:rows  [K', m + n]  rows (X' | Y), of which the first K travel (control field "count", 4 bytes)
    base:LAYER:plus  [m, n]       X Y, where that is not larger
    base:LAYER:is    [m, n]       the whole sum, in a snapshot

K' is the next power of two, so that cohorts of many sizes need few schemas; rows that do not travel are zeros. Server and
client run the same `take`.
"""

from __future__ import annotations

import torch

from taciturn.core.errors import WireError
from taciturn.core.payload import nbytes
from taciturn.core.types import Merges, Payload, Record

PREFIX = "base:"
Log = tuple[tuple[int, Payload], ...]


def is_base(frame: Payload) -> bool:
    """True for a frame of the base, False for one of the model."""
    return any(name.startswith(PREFIX) for name in frame)


def frame_of(merges: Merges, dtype: torch.dtype) -> Payload:
    """X, Y by layer -> what travels: K (m + n) values, or m n where that is not more."""
    frame: Payload = {}
    for layer, (x, y) in merges.items():
        (m, k), n, name = x.shape, y.shape[1], f"{PREFIX}{layer}"
        if k * (m + n) >= m * n:
            frame[f"{name}:plus"] = (x @ y).to(dtype)
            continue
        rows = x.new_zeros(1 << max(0, k - 1).bit_length(), m + n, dtype=dtype)
        rows[:k, :m], rows[:k, m:] = x.mT, y
        frame |= {f"{name}:rows": rows, f"{name}:rows.count": torch.tensor(k, dtype=torch.int32, device=x.device)}
    return frame


def snapshot(base: Record) -> Payload:
    """The whole sum."""
    return {f"{PREFIX}{layer}:is": total for layer, total in base.items()}


def take(base: Record, frame: Payload) -> Record:
    """The base after a frame. Errors: `WireError` for a layer that the base does not have."""
    base = dict(base)
    for name, tensor in frame.items():
        layer, _, what = name.removeprefix(PREFIX).rpartition(":")
        if layer not in base:
            raise WireError(f"a product arrived for the layer {layer!r}; this base has {', '.join(base) or 'none'}")
        m = len(base[layer])
        if what == "is":
            base[layer] = tensor
        elif what == "plus":
            base[layer] = base[layer] + tensor
        elif what == "rows":
            base[layer] = base[layer] + tensor[:, :m].mT @ tensor[:, m:]
    return base


def logged(log: Log, version: int, frame: Payload, base: Record) -> Log:
    """The log with one more frame, as far back as it is not larger than a snapshot."""
    whole, frames = int(nbytes(snapshot(base))), [*log, (version, frame)]
    while sum(int(nbytes(frame)) for _, frame in frames) > whole:
        frames.pop(0)
    return tuple(frames)


def lacking(log: Log, base: Record, version: int, since: int) -> list[Payload]:
    """What a receiver at version `since` lacks of the base at `version`. -1: it has none, which is that of version 0.

    A receiver of a later version (the server was put back to an older checkpoint) gets the whole sum.
    """
    missing = [frame for number, frame in log if number > since]
    if since <= version and len(missing) == version - max(since, 0):
        return missing
    return [snapshot(base)]
