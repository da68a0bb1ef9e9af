"""What of a payload travels, and in how many bytes: the control fields, and the arithmetic of packing.

A payload is {name: tensor} of fixed shapes, so that it stacks and `torch.vmap` can make it. What need not travel is said by
control fields: a field named "X.<control>" governs the field "X" (whose name may hold dots and slashes).

    X.count  int32 []  only X[:count] travels (first axis)
    X.mask   bool, its shape a prefix of X's: only X where the mask is True travels; the mask travels too
    X.radix  uint8 []  X is uint8 of values 0..radix: q = radix + 1 symbols, n of them in B bytes (`GROUP`); q = 1: none
    X.width  uint8 []  X is int16, int32 or int64 of values 0 <= v < 2^width: width bits each; 0: none
    lossless uint8 []  a marker of the whole payload: the data fields are compressed by the coder of that number

What does not travel arrives as zeros. Count and mask select first, both together what both keep; then radix or width packs.
Booleans travel as bits, 8 a byte.

Symbols: q symbols of a code; n of them in a group of B bytes; k rows, values or symbols that travel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from taciturn.core.errors import WireError
from taciturn.core.types import Payload

CONTROLS = ("count", "mask", "radix", "width")
LOSSLESS = "lossless"
WIDEST = {"int16": 15, "int32": 31, "int64": 62}  # bits of the values that `width` can pack
_SIGNS = {"count": "int32", "radix": "uint8", "width": "uint8"}  # dtypes of the controls that are one number


def _best_group(q: int) -> tuple[int, int]:
    """The group (n, B) of most symbols a byte, B <= 8; of equals the smallest."""
    if q == 1:
        return 1, 0
    best = (0, 1)
    for size in range(1, 9):
        n = 0
        while q ** (n + 1) <= 256**size:
            n += 1
        if n * best[1] > best[0] * size:
            best = n, size
    return best


def least_bytes(q: int, n: int) -> int:
    """The fewest bytes that hold n symbols of q.

    >>> least_bytes(3, 5), least_bytes(3, 6), least_bytes(1, 9)
    (1, 2, 0)
    """
    return (int(q**n - 1).bit_length() + 7) // 8


GROUP = (0, 0), *(_best_group(q) for q in range(1, 257))  # q -> (n, B); there is no q = 0
_SYMBOLS = torch.tensor([max(n, 1) for n, _ in GROUP])
_BYTES = torch.tensor([size for _, size in GROUP])
_REST = torch.tensor([[least_bytes(q, n) if n < GROUP[q][0] else 0 for n in range(64)] for q in range(257)])


def governed(name: str) -> tuple[str, str]:
    """The field that a control field governs, and the control; ("", "") if the name is of no control field.

    >>> governed("layer.1/codes.radix"), governed("codes")
    (('layer.1/codes', 'radix'), ('', ''))
    """
    field, dot, control = name.rpartition(".")
    return (field, control) if dot and control in CONTROLS else ("", "")


def controlled(payload: Mapping[str, object]) -> bool:
    """True if the size of a payload depends on its values."""
    return LOSSLESS in payload or any(governed(name)[1] for name in payload)


def check(fields: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Do the control fields make sense? fields: name -> dtype and shape. Errors: `WireError` that says which does not."""
    for name, (dtype, shape) in fields.items():
        if name == LOSSLESS and (dtype, shape) != ("uint8", ()):
            raise WireError(f"payload {LOSSLESS!r} marks what is compressed: uint8 of shape (); got {dtype} of {shape}")
        field, control = governed(name)
        if not control:
            continue
        if field not in fields or field == LOSSLESS or governed(field)[1]:
            raise WireError(f"payload {name!r} governs {field!r}, which is no data field of the payload")
        if control in _SIGNS and (dtype, shape) != (_SIGNS[control], ()):
            raise WireError(f"payload {name!r} must be {_SIGNS[control]} of shape (); got {dtype} of {shape}")
        _check_governed(name, dtype, shape, *fields[field])


def _check_governed(name: str, dtype: str, shape: tuple[int, ...], of: str, of_shape: tuple[int, ...]) -> None:
    """One control field (name, dtype, shape) against the dtype and shape of the field that it governs."""
    field, control = governed(name)
    if control == "mask" and (dtype != "bool" or shape != of_shape[: len(shape)]):
        raise WireError(f"payload {name!r} must be bool, its shape a prefix of {of_shape}; got {dtype} of {shape}")
    if control == "count" and not of_shape:
        raise WireError(f"payload {name!r} counts rows, but {field!r} has shape ()")
    if control == "radix" and of != "uint8":
        raise WireError(f"payload {name!r} packs symbols of uint8, but {field!r} is {of}")
    if control == "width" and of not in WIDEST:
        raise WireError(f"payload {name!r} packs whole numbers ({', '.join(WIDEST)}), but {field!r} is {of}")


def nbytes(payload: Payload) -> Tensor:
    """Bytes of the packed body of one payload: [] int64, under `torch.vmap` [m]. Equals len(wire.pack(..)) - FRAME.

    With the marker `lossless` the size is known only by packing; this is then what it is at most. Values are not looked at:
    a count beyond the rows counts as all of them, and it is `wire.pack` that refuses it.
    """
    fixed, terms = 0, []
    for name, tensor in payload.items():
        size = _field_bytes(payload, name, tensor)
        if isinstance(size, Tensor):
            terms.append(size)
        else:
            fixed += size
    total = torch.tensor(fixed, dtype=torch.int64)
    for term in terms:
        total = total.to(term.device) + term
    return total


def _field_bytes(payload: Payload, name: str, tensor: Tensor) -> Tensor | int:
    """Bytes of one field; a number if no control field decides it."""
    k = travels(payload, name, tensor)
    radix, width = payload.get(f"{name}.radix"), payload.get(f"{name}.width")
    if radix is not None:
        q = radix.long() + 1
        symbols, size, rest = (table.to(q.device) for table in (_SYMBOLS, _BYTES, _REST))
        many = symbols[q]
        return torch.div(torch.as_tensor(k), many, rounding_mode="floor") * size[q] + rest[q, torch.as_tensor(k) % many]
    if width is not None:
        return (k * width.long() + 7) >> 3
    if tensor.dtype == torch.bool:
        return (k + 7) >> 3
    return k * tensor.element_size()


def travels(payload: Payload, name: str, tensor: Tensor) -> Tensor | int:
    """How many values of a field travel; a number if no control field decides it."""
    count, mask = payload.get(f"{name}.count"), payload.get(f"{name}.mask")
    if mask is not None:
        kept = mask if count is None or mask.dim() == 0 else mask & _first(count, mask)
        one = tensor.numel() // max(1, mask.numel())
        if count is None or mask.dim():
            return kept.sum(dtype=torch.int64) * one
        return mask.long() * _rows(count, tensor)
    return tensor.numel() if count is None else _rows(count, tensor)


def _rows(count: Tensor, tensor: Tensor) -> Tensor:
    """Values of the first `count` rows of a tensor."""
    rows = tensor.shape[0]
    return count.long().clamp(0, rows) * (tensor.numel() // max(1, rows))


def _first(count: Tensor, mask: Tensor) -> Tensor:
    """Which entries of a mask stand in the first `count` rows."""
    places = torch.arange(mask.shape[0], device=mask.device)
    return (places < count).reshape(-1, *[1] * (mask.dim() - 1))
