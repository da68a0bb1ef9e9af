"""Records: everything that survives a step is a nested dict of tensors that can be stacked, compared and saved.

State = {name: Tensor or State}. A stacked state has a leading client axis [m] on every tensor.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from taciturn.core.errors import RunError

State: TypeAlias = dict[str, Any]  # of Tensor or State


def tree_map(fn: Callable[..., Tensor], first: Any, *rest: Any) -> Any:
    """fn applied to the tensors that stand at the same place of every record."""
    if isinstance(first, dict):
        return {name: tree_map(fn, value, *(other[name] for other in rest)) for name, value in first.items()}
    return fn(first, *rest)


def leaves(state: Any) -> list[Tensor]:
    """All tensors of a record, in order."""
    if isinstance(state, dict):
        return [leaf for value in state.values() for leaf in leaves(value)]
    return [state]


def flatten(state: State, prefix: str = "") -> dict[str, Tensor]:
    """{"a": {"b": t}} -> {"a/b": t}."""
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: dict[str, Tensor]) -> State:
    """{"a/b": t} -> {"a": {"b": t}}."""
    state: State = {}
    for path, tensor in flat.items():
        *parents, name = path.split("/")
        place: Any = state
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = tensor
    return state


def stack(states: Sequence[State]) -> State:
    """m records of equal shape -> one record with a leading axis [m]."""
    result: State = tree_map(lambda *tensors: torch.stack(tensors), *states)
    return result


def row(state: State, i: int) -> State:
    """Record i of a stacked record (views)."""
    result: State = tree_map(lambda tensor: tensor[i], state)
    return result


def where(mask: Tensor, new: State, old: State) -> State:
    """The new record where the mask ([] bool) holds, else the old one, over the WHOLE record."""
    result: State = tree_map(lambda a, b: torch.where(mask, a, b), new, old)
    return result


def clone(state: State) -> State:
    """A copy that shares no memory."""
    result: State = tree_map(lambda tensor: tensor.clone(), state)
    return result


def equal(a: Any, b: Any) -> bool:
    """True if both records have the same names, shapes, dtypes and bits."""
    if isinstance(a, dict) or isinstance(b, dict):
        return isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw = (torch.as_tensor(t).contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return bool(torch.equal(*raw))


def sync_folder(folder: Path) -> None:
    """See the names of a folder to the disk: what was made, renamed or deleted there."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomic(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part of it."""
    temporary, kept = path.with_name(path.name + ".part"), "what was there before is kept"
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        kept = "it is written, but may not survive a power cut"
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; {kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _checksum(flat: dict[str, Tensor]) -> int:
    """CRC-32 of names and bits, in the order of the names."""
    total = 0
    for name in sorted(flat):
        raw = flat[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        total = zlib.crc32(raw.data, zlib.crc32(name.encode(), total))
    return total


def save_state(path: Path, state: State, meta: dict[str, Any]) -> None:
    """Write a record and its JSON part as ONE safetensors file, atomically: one rename commits both.

    Errors: `RunError` when the disk is full or the folder cannot be written; the former file is kept.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in flatten(state).items()}
    facts = {"taciturn": json.dumps(meta), "crc32": str(_checksum(tensors))}
    write_atomic(path, [save(tensors, metadata=facts)])


def load_state(path: Path) -> tuple[State, dict[str, Any]]:
    """Read what `save_state` wrote. Errors: `RunError` if the file is missing, not such a file, or changed since."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            meta, checksum = json.loads(facts["taciturn"]), int(facts["crc32"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise RunError(f"cannot read {path}: {error}") from error
    if _checksum(tensors) != checksum:
        raise RunError(f"cannot read {path}: its checksum does not fit; the file was changed or damaged")
    return unflatten(tensors), meta
