"""Samples of the sampled clients that choices are tried on: their validation data, else training samples set aside.

Test data are never read: what is chosen on them would flatter itself. Symbols: S clients of those sampled; n, m samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taciturn.advisor.pilot import Pilot
from taciturn.core import random
from taciturn.core.errors import DataError
from taciturn.core.types import Batch, Clients
from taciturn.precision import fake
from taciturn.tasks.built import BuiltTask

LEARN, HOLD = 200, 100  # samples of a client, at most
LEAST = 8  # samples of a client that has no validation data, below which it is left out


@dataclass(frozen=True)
class Held:
    """places [S]: of the pilot's sampled clients; learn, hold: a batch [n, ..], [m, ..] of each; note: what they are."""

    places: tuple[int, ...]
    learn: tuple[Batch, ...]
    hold: tuple[Batch, ...]
    note: str


def task_of(pilot: Pilot) -> BuiltTask:
    """The pilot's task."""
    task = pilot.curvature.work.task
    assert isinstance(task, BuiltTask)
    return task


def held_out(pilot: Pilot) -> Held:
    """Draw them. Without validation data a quarter of each client's training samples is set aside: the model has seen them,
    heads that are fitted have not.
    """
    task, key = task_of(pilot), random.key(17)
    try:
        other: Clients | None = task.held_out("validation")
    except DataError:
        other = None
    places, learn, hold = [], [], []
    for place, i in enumerate(pilot.end.ids.tolist()):
        order = random.permutation(random.fold(key, i), int(task.train.sizes[i]))
        if other is None:
            cut = len(order) // 4
            if len(order) < LEAST:
                continue
            mine, apart = _read(task.train, i, order[cut : cut + LEARN]), _read(task.train, i, order[: min(cut, HOLD)])
        else:
            count = min(HOLD, int(other.sizes[i]))
            if not count:
                continue
            mine, apart = _read(task.train, i, order[:LEARN]), _read(other, i, torch.arange(count))
        places.append(place)
        learn.append(mine)
        hold.append(apart)
    note = "validation data" if other is not None else "training samples set aside, which the shared model has seen"
    return Held(tuple(places), tuple(learn), tuple(hold), note)


def _read(clients: Clients, i: int, index: Tensor) -> Batch:
    batch = {n: t[0] for n, t in clients.fetch(torch.tensor([i]), index.unsqueeze(0), random.key(0).expand(1)).items()}
    return batch | {"mask": torch.ones(len(index), dtype=torch.bool, device=batch["target"].device)}


def params_of(pilot: Pilot, place: int, bits: int = 0) -> dict[str, Tensor]:
    """Everything the model of a sampled client needs where the pilot ended; bits: of every weight, 0: float."""
    work, end = pilot.curvature.work, pilot.end
    split = work.split
    v, b = (end.own[name][place] if name in end.own else start for name, start in (("v", split.v0), ("b", split.b0)))
    views = split.layout.views(end.server.model), split.personal.views(v), split.buffers.views(b)
    params = work.params({"x": end.server.model}, *views)
    if not bits:
        return params
    return params | fake.deployed({n: params.get(n, p.detach()) for n, p in task_of(pilot).model.named_parameters()}, bits)


def measured(pilot: Pilot, held: Held, bits: int = 0) -> dict[str, float]:
    """Loss and metrics of the clients' models on what is held out, pooled; and its "count" of samples."""
    task, total = task_of(pilot), dict[str, float]()
    for place, batch in zip(held.places, held.hold, strict=True):
        sums = task.measure(params_of(pilot, place, bits), batch)
        total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
    return task.pool(total) | {"count": total["count"]}
