"""How one set of samples is divided over N clients. Every class here is a part that can stand in `split`.

Symbols: S samples; N clients; C classes; n_c samples of class c; labels [S] int64; key [] int64.
A split answers `assign(labels, clients, key)` with {client name: row numbers, ascending}: every sample belongs to
exactly one client, every client has at least one sample, and the same key gives the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taciturn.core import random
from taciturn.core.errors import DataError, require
from taciturn.core.random import Key
from taciturn.tasks.data.clients import Federation, TableClients

Rows = NDArray[np.int64]
ATTEMPTS = 1000  # draws of `dirichlet` before it gives up


def client_names(clients: int) -> list[str]:
    """Names of equal width, at least three digits.

    >>> client_names(2)
    ['client-000', 'client-001']
    """
    width = max(3, len(str(clients - 1)))
    return [f"client-{i:0{width}d}" for i in range(clients)]


@dataclass(frozen=True, slots=True)
class iid:
    """All samples in random order, cut into N parts of equal size (up to one sample). Targets of any kind."""

    def assign(self, labels: Tensor, clients: int, key: Key) -> dict[str, Rows]:
        """labels [S] or [S, outputs] -> {client name: rows}. Errors: `DataError` when clients > samples."""
        _check_counts(len(labels), clients, 1, "iid")
        order = random.permutation(random.fold(key, "iid"), len(labels)).numpy()
        return _named(np.array_split(order, clients))


@dataclass(frozen=True, slots=True)
class dirichlet:
    """Label skew: the samples of each class are divided over the clients in proportions p_c ~ Dirichlet(alpha 1_N).

        client i gets the samples floor(n_c sum_{j<i} p_cj) .. floor(n_c sum_{j<=i} p_cj) of class c, in random order

    alpha -> infinity: every client has the mixture of the whole; alpha -> 0: each class lies with one client. The sizes
    of the clients differ too. All proportions are drawn again (up to 1000 times) until every client has
    `min_partition_size` samples.
    Source: Yurochkin et al., ICML 2019, arXiv 1905.12022, section 4, as in the DirichletPartitioner of flwr-datasets.
    Departure: no self-balancing. Hsu, Qi & Brown, arXiv 1909.06335 draw the classes of each client instead, which gives
    clients of equal size; the skew means the same.
    Errors: `DataError` when the smallest size is not met, or the targets are not classes.
    """

    alpha: float = 0.5
    min_partition_size: int = 1

    def __post_init__(self) -> None:
        require(0 < self.alpha < float("inf"), f"alpha: a finite number above 0; got {self.alpha}")
        require(self.min_partition_size >= 1, f"min_partition_size: at least 1 sample; got {self.min_partition_size}")

    def assign(self, labels: Tensor, clients: int, key: Key) -> dict[str, Rows]:
        """labels [S] int64 -> {client name: rows}."""
        _check_classes(labels, "dirichlet")
        _check_counts(len(labels), clients, self.min_partition_size, "dirichlet")
        counts = torch.unique(labels, return_counts=True)[1].numpy()
        cuts = self._draw(counts, clients, key)
        parts: list[list[Rows]] = [[] for _ in range(clients)]
        for rows, cut in zip(_by_class(labels, random.fold(key, "dirichlet")), cuts, strict=True):
            for part, chunk in zip(parts, np.split(rows, cut[:-1]), strict=True):
                part.append(chunk)
        return _named(np.concatenate(part) for part in parts)

    def _draw(self, counts: NDArray[np.int64], clients: int, key: Key) -> NDArray[np.int64]:
        """counts [C] -> the place in each class where client i ends, [C, N]."""
        generator = np.random.Generator(np.random.Philox(key=int(random.fold(key, "proportions")) % 2**64))
        best = 0
        for _ in range(ATTEMPTS):
            shares = generator.dirichlet(np.full(clients, self.alpha), size=len(counts))
            cuts = np.floor(np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
            cuts[:, -1] = counts
            cuts = np.minimum(cuts, counts[:, None])
            smallest = int(np.diff(cuts, axis=1, prepend=0).sum(axis=0).min())
            if smallest >= self.min_partition_size:
                return cuts
            best = max(best, smallest)
        raise DataError(
            f"dirichlet: {ATTEMPTS} draws of alpha = {self.alpha:g} for {clients} clients and {counts.sum()} samples "
            f"gave no split with {self.min_partition_size} samples for every client (best: {best}); "
            "raise alpha, lower min_partition_size, or take fewer clients"
        )


@dataclass(frozen=True, slots=True)
class shards:
    """Samples sorted by label are cut into N `per_client` shards of equal size; a client gets `per_client` at random.

    With two shards most clients see two classes. Samples of one class are in random order before the cut.
    Source: McMahan et al., AISTATS 2017, section 3 ("pathological non-IID").
    Errors: `DataError` when there are more shards than samples, or the targets are not classes.
    """

    per_client: int = 2

    def __post_init__(self) -> None:
        require(self.per_client >= 1, f"per_client: at least 1 shard; got {self.per_client}")

    def assign(self, labels: Tensor, clients: int, key: Key) -> dict[str, Rows]:
        """labels [S] int64 -> {client name: rows}."""
        _check_classes(labels, "shards")
        _check_counts(len(labels), clients, self.per_client, "shards")
        pieces = np.array_split(np.concatenate(_by_class(labels, random.fold(key, "shards"))), clients * self.per_client)
        order = random.permutation(random.fold(key, "deal"), len(pieces)).reshape(clients, -1).tolist()
        return _named(np.concatenate([pieces[i] for i in hand]) for hand in order)


Split = iid | dirichlet | shards


def stratified(labels: Tensor, fraction: float, key: Key) -> tuple[Rows, Rows]:
    """Rows in two: (the fraction of every class, the rest), each ascending; [S] int64 -> rows, rows."""
    taken = [rows[: round(fraction * len(rows))] for rows in _by_class(labels, random.fold(key, "stratified"))]
    first = np.sort(np.concatenate(taken))
    return first, np.setdiff1d(np.arange(len(labels)), first, assume_unique=True)


def federation(
    fields: dict[str, Tensor],
    parts: tuple[dict[str, Any], dict[str, Any], dict[str, Any]],
    *,
    kind: str,
    outputs: int,
    central: TableClients | None = None,
    note: str = "",
) -> Federation:
    """Tables [S, ..] and the clients' (train, validation, test) rows -> federation; a split without rows is None."""
    train, validation, test = (TableClients.of(fields, part) if part else None for part in parts)
    if train is None:
        raise DataError("there is no client")
    return Federation(train, kind, outputs, validation=validation, test=test, central=central, note=note)


def _by_class(labels: Tensor, key: Key) -> list[Rows]:
    """The rows of each class, in random order."""
    order = random.permutation(key, len(labels))
    order = order[torch.argsort(labels[order], stable=True)]
    counts = torch.unique(labels, return_counts=True)[1]
    return np.split(order.numpy(), counts.cumsum(0)[:-1].numpy())


def _named(parts: Iterable[Rows]) -> dict[str, Rows]:
    listed = [np.sort(part) for part in parts]
    return dict(zip(client_names(len(listed)), listed, strict=True))


def _check_counts(samples: int, clients: int, each: int, part: str) -> None:
    require(clients >= 1, f"clients: at least 1; got {clients}")
    if clients * each > samples:
        need = f"{clients} clients" if each == 1 else f"{clients} clients times {each}"
        raise DataError(f"{part}: {need} cannot be served from {samples} samples; take fewer clients or more data")


def _check_classes(labels: Tensor, part: str) -> None:
    if labels.is_floating_point() or labels.ndim != 1:
        raise DataError(
            f"{part} divides by class, and these targets are {labels.dtype} {list(labels.shape)} (regression); use iid"
        )
