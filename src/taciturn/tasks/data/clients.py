"""The data of N clients, in memory or lazy, and the federation they make up.

Symbols: S samples in all; n_i samples of client i; ids [m] clients; index [m, b] sample numbers within each client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from taciturn.core import random
from taciturn.core.errors import DataError, require
from taciturn.core.random import Key
from taciturn.core.types import Batch, Clients


class Samples(Protocol):
    """A map-style dataset, such as `torch.utils.data.Dataset`: sample i is a dict or a tuple of tensors."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def _refuse_empty(names: Sequence[str], sizes: Tensor) -> None:
    if len(names) == 0:
        raise DataError("there is no client")
    empty = [names[i] for i in (sizes == 0).nonzero().squeeze(1).tolist()]
    if empty:
        shown = ", ".join(repr(name) for name in empty[:5])
        raise DataError(f"{len(empty)} of {len(names)} clients have no sample: {shown}; leave them out or give them data")


def _refuse_mask(fields: Mapping[str, Any], where: str) -> None:
    if "mask" in fields:  # of a batch it is [b], which samples are no padding
        raise DataError(f"{where} has a field 'mask', which batches use themselves; call it otherwise, such as 'real'")


@dataclass(frozen=True)
class TableClients:
    """Clients as row numbers into tables that all share: nothing is copied per client.

    fields: {name: [S, ..]}; rows [sum n_i] int64: the row numbers of client 0, then of client 1, ..; offsets [N + 1];
    sizes [N] follow from them.
    Errors: `DataError` naming the clients that have no sample.
    """

    fixed: ClassVar[bool] = True  # a sample is the same whenever it is read
    names: tuple[str, ...]
    fields: dict[str, Tensor]
    rows: Tensor
    offsets: Tensor
    sizes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", self.offsets.diff())
        _refuse_empty(self.names, self.sizes)
        _refuse_mask(self.fields, "the table")

    @classmethod
    def of(cls, fields: dict[str, Tensor], owners: dict[str, Any]) -> TableClients:
        """From {client name: row numbers}."""
        rows = [torch.as_tensor(np.asarray(index), dtype=torch.int64) for index in owners.values()]
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
        offsets[1:] = torch.tensor([len(index) for index in rows]).cumsum(0)
        joined = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        return cls(tuple(owners), fields, joined, offsets)

    def fetch(self, ids: Tensor, index: Tensor, keys: Key | None = None) -> Batch:
        """Samples `index` [m, b] of clients `ids` [m] -> {name: [m, b, ..]}."""
        rows = self.rows[self.offsets[ids].unsqueeze(1) + index]
        flat = rows.flatten()
        chosen = {name: values.index_select(0, flat.to(values.device)) for name, values in self.fields.items()}
        return {name: values.view(*rows.shape, *values.shape[1:]) for name, values in chosen.items()}

    def to(self, device: torch.device | str) -> TableClients:
        """The same clients with their tables on a device."""
        return replace(self, fields={name: values.to(device) for name, values in self.fields.items()})


@dataclass(frozen=True)
class PartClients:
    """Clients of which all sizes are known, and of some the samples are elsewhere: an `example` [..] stands for each.

    here: those whose samples are here, of these sizes; place [N]: their numbers in it, -1 elsewhere. Without an example
    nothing can be fetched of a client that is elsewhere. Errors: `DataError` naming it.
    """

    fixed: ClassVar[bool] = True
    names: tuple[str, ...]
    sizes: Tensor
    place: Tensor
    here: TableClients | None
    example: dict[str, Tensor]

    @classmethod
    def of(cls, sizes: dict[str, int], here: TableClients | None, example: dict[str, Tensor]) -> PartClients:
        """From {client name: samples}, in order."""
        mine = {name: i for i, name in enumerate(here.names)} if here is not None else {}
        place = torch.tensor([mine.get(name, -1) for name in sizes], dtype=torch.int64)
        return cls(tuple(sizes), torch.tensor(list(sizes.values()), dtype=torch.int64), place, here, example)

    def fetch(self, ids: Tensor, index: Tensor, keys: Key | None = None) -> Batch:
        """Samples `index` [m, b] of clients `ids` [m] -> {name: [m, b, ..]}."""
        place = self.place[ids]
        mine = place >= 0
        if self.here is not None and bool(mine.all()):
            return self.here.fetch(place, index, keys)
        if not self.example:
            raise DataError(f"the data of client {self.names[int(ids[~mine][0])]!r} are not here")
        batch = {name: value.expand(*index.shape, *value.shape).clone() for name, value in self.example.items()}
        if self.here is not None and bool(mine.any()):
            for name, values in self.here.fetch(place[mine], index[mine]).items():
                batch[name][mine.to(values.device)] = values
        return batch

    def to(self, device: torch.device | str) -> PartClients:
        """The same clients with their samples on a device."""
        example = {name: value.to(device) for name, value in self.example.items()}
        return replace(self, here=None if self.here is None else self.here.to(device), example=example)


@dataclass(frozen=True)
class LazyClients:
    """One map-style dataset a client; samples are read when a batch needs them.

    A sample is a dict of tensors, or a tuple (input, target). A data set that draws at random while it is read
    (augmentation) does so under a seed of this client and step, so that every engine sees the same samples.
    Errors: `DataError` for empty clients and for samples of other shapes.
    """

    names: tuple[str, ...]
    datasets: tuple[Samples, ...]
    device: torch.device | str = "cpu"
    sizes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", torch.tensor([len(dataset) for dataset in self.datasets], dtype=torch.int64))
        _refuse_empty(self.names, self.sizes)

    def fetch(self, ids: Tensor, index: Tensor, keys: Key | None = None) -> Batch:
        """Samples `index` [m, b] of clients `ids` [m] -> {name: [m, b, ..]}."""
        m, b = index.shape
        samples = []
        for place, client in enumerate(ids.tolist()):
            with random.seeded(keys[place]) if keys is not None else nullcontext():
                samples += [_named(self.datasets[client][i], self.names[client]) for i in index[place].tolist()]
        try:
            stacked = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        except (KeyError, RuntimeError) as error:
            raise DataError(f"samples of clients {[self.names[i] for i in ids.tolist()]} do not stack: {error}") from error
        return {name: values.reshape(m, b, *values.shape[1:]).to(self.device) for name, values in stacked.items()}

    def to(self, device: torch.device | str) -> LazyClients:
        """The same clients, with batches on a device."""
        return replace(self, device=device)


def _named(sample: Any, client: str) -> dict[str, Tensor]:
    if isinstance(sample, dict):
        _refuse_mask(sample, f"a sample of client {client!r}")
        return {name: torch.as_tensor(value) for name, value in sample.items()}
    if isinstance(sample, (tuple, list)) and len(sample) == 2:
        return {"input": torch.as_tensor(sample[0]), "target": torch.as_tensor(sample[1])}
    raise DataError(f"a sample of client {client!r} is {type(sample).__name__}; give (input, target) or a dict of tensors")


@dataclass(frozen=True)
class Federation:
    """Everything that is known of the data: the clients' splits and, where there is one, a test set of the server.

    kind: "classification" (targets int64, `outputs` classes), "regression" (targets float32 [outputs]) or "text" (targets
    int64 [l], the next of `outputs` tokens at each place, -100 for padding). A split is any `Clients`; one with a method
    `to(device)` is moved, others make their batches where they are needed. absent: names of clients whose samples are not
    here; homes [N]: the site of each client, where an outline says it.
    """

    train: Clients
    kind: str
    outputs: int
    validation: Clients | None = None
    test: Clients | None = None
    central: Clients | None = None
    note: str = ""
    absent: tuple[str, ...] = ()
    homes: tuple[int, ...] = ()

    def to(self, device: torch.device | str) -> Federation:
        """The same federation on a device."""
        parts = {name: getattr(self, name) for name in ("train", "validation", "test", "central")}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if hasattr(part, "to")})


def hold_out(
    owners: dict[str, Any], *, test: float = 0.0, validation: float = 0.0, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Each client's rows -> (train, validation, test) rows, drawn at random within the client.

    A client keeps at least one training sample; one with too few samples has no held-out part (left out of that split).
    """
    parts: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = ({}, {}, {})
    for number, (name, rows) in enumerate(owners.items()):
        key = random.fold(random.key(seed), "hold_out", number)
        for part, index in zip(parts, divided(rows, key, test=test, validation=validation), strict=True):
            if len(index):
                part[name] = index
    return parts


def divided(rows: Any, key: Key, *, test: float = 0.0, validation: float = 0.0) -> tuple[Any, Any, Any]:
    """One client's rows -> (train, validation, test) rows, each ascending, drawn at random from a key []."""
    require(0 <= test < 1 and 0 <= validation < 1 and test + validation < 1, f"{test=}, {validation=}: fractions below 1")
    rows = np.asarray(rows)
    order = rows[random.permutation(key, len(rows)).numpy()]
    n_test, n_val = int(test * len(rows)), int(validation * len(rows))
    cut = order[n_test + n_val :], order[n_test : n_test + n_val], order[:n_test]
    return np.sort(cut[0]), np.sort(cut[1]), np.sort(cut[2])
