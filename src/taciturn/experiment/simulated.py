"""The time axis of a run: one local step is counted, and the fleet's clock turns steps and bytes into seconds.

A step on quantized weights takes longer by q of precision/cost.py: 36 bytes a weight, operator after operator, at the
device's bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taciturn import client
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.errors import ConfigError
from taciturn.core.random import Key
from taciturn.core.rounding import applies
from taciturn.core.state import State
from taciturn.core.types import Batch
from taciturn.experiment.experiment import Experiment
from taciturn.fleet import Clock, Fleet, Operator, count, named
from taciturn.precision import cost
from taciturn.round import RoundStats
from taciturn.wire.ledger import Ledger

VECTORS = 4  # of what is trained: weights, gradient, message, moments


@dataclass(frozen=True)
class Times:
    """The devices of a run, its clock, and what a local step is made of."""

    fleet: Fleet
    clock: Clock
    step: tuple[Operator, ...]

    @classmethod
    def of(cls, experiment: Experiment, work: Work, key: Key) -> Times:
        """The reference device for all where no fleet is given. key: of the run. Errors: `ConfigError`."""
        given = experiment.fleet or "reference"
        fleet = named(given) if isinstance(given, str) else given
        _check_memory(fleet, work)
        step, clients = count(one_step(work, experiment.method.batch_size)), len(work.task.train.sizes)
        extra = _extra(fleet, work)
        return cls(fleet, Clock.of(fleet, clients, step, key, experiment.deadline, experiment.late, extra), step)

    def share(self, ids: Tensor, work: Tensor, knobs: State) -> Tensor:
        """What clients count for their time [m] (fleet/clock.py), given the knobs that they were told."""
        return self.clock.share(ids, work, knobs["train"].cpu() > 0 if "train" in knobs else None)

    def round(self, stats: RoundStats, ledger: Ledger, before: float = 0.0) -> dict[str, Any]:
        """The round that was just run, for the record; before the ledger closes it. before: seconds of the earlier ones."""
        aware = torch.tensor(stats.knobs["train"]) > 0 if "train" in stats.knobs else None
        line = self.clock.round(stats.ids, ledger.work(stats.ids), stats.status, aware)
        return {"total": before + line["round"], **line}

    def facts(self) -> dict[str, Any]:
        """For the header: of each profile its name, its clients, its seconds of a local step; the flops of a step."""
        return {
            "profiles": [profile.name for profile in self.fleet.profiles],
            "clients": torch.bincount(self.clock.device, minlength=len(self.fleet.profiles)).tolist(),
            "step_seconds": self.clock.step.tolist(),
            "step_flops": sum(one.flops * one.times for one in self.step),
        }


def one_step(work: Work, batch_size: int, knobs: State | None = None) -> Callable[[], object]:
    """A local step of the largest client, to be run: forward, backward and the solver. knobs: that it was told."""
    split, sizes = work.split, work.task.train.sizes
    largest = int(sizes.argmax())
    samples = torch.arange(min(batch_size, int(sizes[largest]))).unsqueeze(0)
    found = work.task.train.fetch(torch.tensor([largest]), samples, random.key(0).expand(1))
    batch: Batch = {name: tensor[0] for name, tensor in found.items()}
    batch["mask"] = torch.ones(samples.shape[1], dtype=torch.bool, device=split.x0.device)
    held = {"x": split.x0} | ({"base": split.base.views(split.x0.new_zeros(split.base.d))} if split.base.names else {})
    local = client.begin(work, split.x0, work.newcomer() | {"knobs": knobs or {}})
    lr_scale = torch.ones((), dtype=split.x0.dtype, device=split.x0.device)
    key = random.key(0, split.x0.device)
    return lambda: client.step(work, held, local, batch, key, lr_scale)


def _extra(fleet: Fleet, work: Work) -> Tensor:
    """Seconds of quantizing the weights that are trained, once, on each profile [P]."""
    shapes = [*work.split.layout.shapes, *work.split.personal.shapes]
    weights = sum(math.prod(shape) for shape in shapes if applies(shape))
    seconds = [cost.quantizing(weights, profile.bandwidth * 1e9, cost.EAGER) for profile in fleet.profiles]
    return torch.tensor(seconds, dtype=torch.float64)


def _check_memory(fleet: Fleet, work: Work) -> None:
    """A device must hold the model, and four vectors of what it trains; activations are not counted."""
    trained = 4 * VECTORS * (work.split.layout.d + work.split.personal.d)
    needed = trained + sum(4 * parameter.numel() for parameter in work.task.model.parameters())
    for place, profile in enumerate(fleet.profiles):
        if profile.memory is not None and profile.memory < needed:
            raise ConfigError(
                f"fleet.profiles[{place}].memory: {profile.name!r} has {profile.memory:.3g} bytes; this model with what is "
                f"trained of it needs {needed:.3g}: use lora, a smaller model, or a fleet of larger devices"
            )
