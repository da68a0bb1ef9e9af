"""A table of records of fixed shape, one row a client, in memory that is mapped: from a sparse file, or from nothing.

A row is 8 bytes (the first is 1 once the row was written) and the bytes of the record's tensors, each from a multiple
of 8. A row that was never written costs neither memory nor disk and reads as the newcomer's record, which is row N.

Symbols: N clients in all; m clients `ids` [m] of a block; w bytes of a row.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taciturn.core.errors import MethodError, RunError
from taciturn.core.state import State, flatten, tree_map
from taciturn.engines.memory import reserve

Ids: TypeAlias = NDArray[np.int64]
Raw: TypeAlias = NDArray[Any]  # [m] of w bytes each (dtype V)

_HEAD = 8  # bytes before the first tensor of a row


@dataclass(frozen=True)
class _Field:
    """Where a tensor of the record lies in a row: bytes start .. stop."""

    name: str
    start: int
    stop: int
    like: Tensor

    def get(self, rows: Tensor) -> Tensor:
        """Bytes [m, w] -> the tensors [m, ..], in memory of their own."""
        like = self.like
        part = torch.empty((len(rows), *like.shape), dtype=like.dtype)
        if part.numel():
            part.view(len(rows), -1).view(torch.uint8).copy_(rows[:, self.start : self.stop])
        return part.to(like.device)

    def put(self, rows: Tensor, value: Tensor, table: str) -> Tensor:
        """Tensors [m, ..] -> into the bytes [m, w]. Errors: `MethodError` for another shape or dtype."""
        if value.shape[1:] != self.like.shape or value.dtype != self.like.dtype:
            raise MethodError(
                f"a client's record ({table}/{self.name}) must keep its shape and dtype: it began as "
                f"{list(self.like.shape)} {self.like.dtype} and is now {list(value.shape[1:])} {value.dtype}"
            )
        if value.numel():
            flat = value.detach().reshape(len(rows), -1).contiguous()
            rows[:, self.start : self.stop] = flat.view(torch.uint8).cpu()
        return value


class Rows:
    """N rows of one kind of record. `before(table, ids)` is called with ids whose rows are about to change."""

    def __init__(self, name: str, newcomer: State, clients: int, before: Callable[[Rows, Ids], None]) -> None:
        self.name, self._clients, self._before = name, clients, before
        fields, end = [], _HEAD
        for path, tensor in flatten(newcomer).items():
            stop = end + tensor.numel() * tensor.element_size()
            fields.append(_Field(path, end, stop, tensor.detach()))
            end = -(-stop // 8) * 8
        self.width = end if end > _HEAD else 0  # nothing to keep, no row
        parts = iter(fields)
        self._fields: State = tree_map(lambda _: cast(Any, next(parts)), newcomer)  # the record, with fields for tensors
        self._newcomer = self._packed(tree_map(lambda t: t.unsqueeze(0), newcomer), 1)
        self._newcomer[0, 0] = 0
        self._path: Path | None = None
        self._dirty = False
        self._map(self._anonymous())
        self._fill()

    # ---------------------------------------------------------------------------------------------------- the memory

    def _anonymous(self) -> mmap.mmap:
        """Pages that exist once they are written."""
        area = reserve(max(1, self._size), mmap.MAP_PRIVATE)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # or every row would cost 2 MiB
            area.madvise(mmap.MADV_NOHUGEPAGE)
        return area

    @property
    def _size(self) -> int:
        return (self._clients + 1) * self.width

    def open(self, path: Path, create: bool) -> None:
        """Keep the rows in a file from now on: an empty one, or one that was written before. Errors: `RunError`."""
        if not self.width:
            return
        try:
            file = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0), 0o644)
            try:
                if create:
                    os.ftruncate(file, self._size)
                elif os.fstat(file).st_size != self._size:
                    raise RunError(f"{path} has {os.fstat(file).st_size} bytes instead of {self._size}; it was cut by hand")
                area = mmap.mmap(file, self._size)
            finally:
                os.close(file)
        except OSError as error:
            raise RunError(f"cannot open {path}, where the clients' rows are kept: {error.strerror}") from error
        area.madvise(mmap.MADV_RANDOM)
        self._path = path
        self._map(area)
        if create:
            self._fill()

    def _map(self, area: mmap.mmap) -> None:
        self._area = area
        size = self._size
        self._rows: Raw = np.frombuffer(area, dtype=f"V{self.width or 1}", count=self._clients + 1 if size else 0)
        self._flags = np.frombuffer(area, dtype=np.uint8, count=size).reshape(-1, self.width or 1)[:, 0]

    def _fill(self) -> None:
        if self.width:
            self.put(np.array([self._clients]), self._newcomer.view(f"V{self.width}")[:, 0])

    def describe(self) -> dict[str, Any]:
        """What a row looks like, as plain JSON."""
        shapes = {name: [str(f.dtype), list(f.shape)] for name, f in sorted(flatten(self.like).items())}
        return {"bytes": self.width, "tensors": shapes}

    @property
    def like(self) -> State:
        """A record of the right names, shapes and dtypes."""
        pattern: State = tree_map(lambda field: field.like, self._fields)
        return pattern

    # ---------------------------------------------------------------------------------------------------------- rows

    def raw(self, ids: Ids) -> Raw:
        """The bytes of rows: a copy."""
        return self._rows[ids]

    def put(self, ids: Ids, rows: Raw) -> None:
        """Replace the bytes of rows."""
        self._reserve(ids)
        self._dirty = True
        self._rows[ids] = rows

    def renew(self, ids: Ids) -> None:
        """These clients are newcomers again; `before` is not told, so nothing puts the old rows back."""
        if self.width:
            self.put(ids, np.zeros(len(ids), dtype=f"V{self.width}"))

    def _reserve(self, ids: Ids) -> None:
        """Disk for rows that have none yet: on a full disk this is an error, writing to the map would be a signal."""
        new = ids[self._flags[ids] == 0]
        if self._path is None or not len(new) or not hasattr(os, "posix_fallocate"):
            return
        page = mmap.PAGESIZE
        first, last = new * self.width // page, ((new + 1) * self.width - 1) // page
        spans = np.unique(np.concatenate([first, last]) if self.width <= page else _spans(first, last))
        cuts = np.flatnonzero(np.diff(spans) > 1) + 1
        file = os.open(self._path, os.O_RDWR)
        try:
            for run in np.split(spans, cuts):
                begin = int(run[0]) * page
                os.posix_fallocate(file, begin, min(self._size, (int(run[-1]) + 1) * page) - begin)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # a file system that cannot promise
                raise RunError(f"cannot write {self._path}: {error.strerror}; the last good checkpoint is kept") from error
        finally:
            os.close(file)

    def _packed(self, own: State, m: int) -> NDArray[np.uint8]:
        rows = torch.zeros(m, self.width or 1, dtype=torch.uint8)
        rows[:, 0] = 1
        tree_map(lambda field, value: field.put(rows, value, self.name), self._fields, own)
        return rows.numpy()

    def touch(self, ids: Tensor) -> None:
        """Say that these rows are about to change."""
        self._before(self, ids.cpu().numpy())

    def read(self, ids: Tensor) -> State:
        """Stacked records [m, ..] of these clients."""
        places = ids.cpu().numpy()
        if self.width:
            places = np.where(self._flags[places] != 0, places, self._clients)
            rows = torch.from_numpy(self._rows[places].view(np.uint8).reshape(len(places), self.width))
        else:
            rows = torch.zeros(len(places), _HEAD, dtype=torch.uint8)
        own: State = tree_map(lambda field: field.get(rows), self._fields)
        return own

    def write(self, ids: Tensor, own: State) -> None:
        """Replace the records of these clients (each once) by the rows of a stacked record."""
        if not self.width or not len(ids):
            return
        places = ids.cpu().numpy()
        rows = self._packed(own, len(places))
        self._before(self, places)
        self.put(places, rows.view(f"V{self.width}")[:, 0])

    def written(self, ids: Tensor | None = None) -> Tensor:
        """Which of these clients have a row of their own: [m] bool; of all N without ids."""
        flags = self._flags[: self._clients] if ids is None else self._flags[ids.cpu().numpy()]
        return torch.from_numpy(flags != 0)

    def export(self) -> State:
        """All rows that were written, as one record: {"ids": [n], "rows": stacked}. Looks at all N clients."""
        ids = self.written().nonzero().squeeze(1)
        return {"ids": ids, "rows": self.read(ids)}

    def flush(self) -> None:
        """See what was written to the disk, and let go of the pages."""
        if self._path is None or not self._dirty:
            return
        try:
            self._area.flush()
        except OSError as error:
            raise RunError(f"cannot write {self._path}: {error.strerror}; the last good checkpoint is kept") from error
        self._area.madvise(mmap.MADV_DONTNEED)  # the system keeps them as long as it likes; they are not this process's
        self._dirty = False


def _spans(first: Ids, last: Ids) -> Ids:
    """All numbers of the intervals first .. last."""
    lengths = last - first + 1
    ends = np.cumsum(lengths)
    pages: Ids = np.arange(ends[-1]) + np.repeat(first - (ends - lengths), lengths)
    return pages
