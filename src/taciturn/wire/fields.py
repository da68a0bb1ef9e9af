"""One field of a payload: how much of it travels, in which form, and how it is put together again.

Symbols: raw: the bytes of a tensor (uint8 [n size]); controls: the raw bytes of all control fields of the payload, by name.
What a control field means is said in core/payload.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taciturn.core.errors import WireError
from taciturn.core.payload import LOSSLESS, governed
from taciturn.wire.lossless import Lane
from taciturn.wire.packing import (
    Raw,
    Selection,
    chosen,
    number_bytes,
    pack_numbers,
    pack_symbols,
    require_width,
    select,
    spread,
    unpack_numbers,
    unpack_symbols,
)

DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Field:
    """One field, with what packing asks of it. control: the field says what travels; size: bytes of a value."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    size: int
    control: bool

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...]) -> Field:
        """The field of a schema's row."""
        control = name == LOSSLESS or bool(governed(name)[1])
        return cls(name, dtype, shape, math.prod(shape), DTYPES[dtype].itemsize, control)

    @property
    def sent(self) -> int:
        """Bytes of a control field."""
        return number_bytes(self.numel, 1) if self.dtype == "bool" else self.numel * self.size


def bytes_of(tensor: Tensor) -> Raw:
    """The bytes of a tensor, in order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # one value, of an expanded tensor
        flat = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
    raw: Raw = flat.view(torch.uint8).numpy()
    return raw


def tensor_of(field: Field, raw: Raw) -> Tensor:
    """The inverse of `bytes_of`; it keeps the memory."""
    if not field.numel:
        return torch.empty(field.shape, dtype=DTYPES[field.dtype])
    return torch.from_numpy(raw).view(DTYPES[field.dtype]).reshape(field.shape)


def plan(field: Field, controls: Mapping[str, Raw]) -> tuple[Selection, Lane]:
    """Which values of a field travel, and how. Errors: `WireError` for a count or a width that the field does not have."""
    selection = _selection(field, controls)
    n = chosen(selection)
    radix, width = controls.get(f"{field.name}.radix"), controls.get(f"{field.name}.width")
    if radix is not None:
        return selection, Lane(n, int(radix[0]) + 1, 1)
    if width is not None:
        require_width(int(width[0]), field.dtype)
        return selection, Lane(number_bytes(n, int(width[0])), 0, 1)
    return selection, Lane(number_bytes(n, 1), 0, 1) if field.dtype == "bool" else Lane(n, 0, field.size)


def _selection(field: Field, controls: Mapping[str, Raw]) -> Selection:
    count, mask = controls.get(f"{field.name}.count"), controls.get(f"{field.name}.mask")
    kept = field.numel
    if count is not None:
        rows, many = field.shape[0], int.from_bytes(count.tobytes(), "little", signed=True)
        if not 0 <= many <= rows:
            raise WireError(f"a count of {many}; there are {rows} rows")
        kept = many * (field.numel // max(1, rows))
    if mask is None:
        return kept
    where = mask.view(np.bool_)
    if len(where) == 1:
        return kept if where[0] else 0
    each = field.numel // max(1, len(where))
    if kept < field.numel:
        where = where.copy()
        where[kept // each :] = False
    return where, each


def send(field: Field, controls: Mapping[str, Raw], raw: Raw) -> tuple[Lane, Raw]:
    """The bytes of a field -> what of them travels. Errors: `WireError` for a value that does not fit its form."""
    selection, lane = plan(field, controls)
    kept = select(raw, selection, field.size)
    width = controls.get(f"{field.name}.width")
    if width is not None:
        return lane, pack_numbers(kept.view(field.dtype), int(width[0]))
    return lane, pack_symbols(kept, 2) if field.dtype == "bool" else kept


def receive(field: Field, controls: Mapping[str, Raw], selection: Selection, raw: Raw) -> Raw:
    """The inverse of `send`: all bytes of the field. Errors: `WireError` for bits that no writer makes."""
    width = controls.get(f"{field.name}.width")
    if width is not None:
        raw = unpack_numbers(raw, chosen(selection), int(width[0]), field.dtype).view(np.uint8)
    elif field.dtype == "bool":
        raw = unpack_symbols(raw, chosen(selection), 2)
    return spread(raw, selection, field.numel * field.size)
