"""The time axis of a run: one local step is counted, and the fleet's clock turns steps and bytes into seconds.

A step is counted in each way that the precision policy has for it: as it is; with the quantizer's operators (precision/
fake.py), all of them; and for bfloat16 under `torch.autocast`, so its products are bfloat16 operators, and the casts that
it runs, of every weight in every step and back, are operators like any other. What emulates bfloat16 (precision/half.py) is
the simulation's own and is not counted. Where a profile has no kernel for it a product takes its time in float32.

Symbols: P profiles; W ways, one row each of [W, 3] bool, which of the knobs `forward.KNOBS` are on; M clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from taciturn import client
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.errors import ConfigError, require
from taciturn.core.random import Key
from taciturn.core.rounding import levels
from taciturn.core.state import State
from taciturn.core.types import Batch, Task
from taciturn.experiment.experiment import Experiment
from taciturn.fleet import Clock, Fleet, Operator, count, named
from taciturn.precision.forward import KNOBS
from taciturn.precision.policies import told
from taciturn.round import RoundStats
from taciturn.tasks.built import BuiltTask
from taciturn.wire.ledger import Ledger

VECTORS = 4  # of what is trained: weights, gradient, message, moments


@dataclass(frozen=True)
class Times:
    """The devices of a run, its clock, and what a local step is made of: plain, and the knobs of each way [W, 3]."""

    fleet: Fleet
    clock: Clock
    step: tuple[Operator, ...]
    ways: Tensor

    @classmethod
    def of(cls, experiment: Experiment, work: Work, key: Key) -> Times:
        """The reference device for all where no fleet is given. key: of the run. Errors: `ConfigError`."""
        found = ways(told(experiment.method.precision))
        require(
            experiment.dtype == "float32" or not bool(found[:, KNOBS.index("bfloat16")].any()),
            f'precision: bfloat16 is emulated in dtype = "float32"; got {experiment.dtype!r}',
        )
        given = experiment.fleet or "reference"
        fleet = named(given) if isinstance(given, str) else given
        _check_memory(fleet, work)
        steps = [counted(work, experiment.method.batch_size, way) for way in found.tolist()]
        clients = len(work.task.train.sizes)
        return cls(fleet, Clock.of(fleet, clients, steps, key, experiment.deadline, experiment.late), steps[0], found)

    def way(self, knobs: State) -> Tensor:
        """In which way clients take their steps: knobs {name: [..]} that they were told by the policy -> [..] int64."""
        on = [torch.as_tensor(knobs[name]).cpu() > 0 if name in knobs else torch.tensor(False) for name in KNOBS]
        row = torch.stack(torch.broadcast_tensors(*on), -1)  # type: ignore[no-untyped-call]
        found: Tensor = (row.unsqueeze(-2) == self.ways).all(-1).to(torch.int64).argmax(-1)
        return found

    def share(self, ids: Tensor, work: Tensor, knobs: State) -> Tensor:
        """What clients count for their time [m] (fleet/clock.py), given the knobs that they were told."""
        return self.clock.share(ids, work, self.way(knobs))

    def arrivals(self, ids: Tensor, work: Tensor, knobs: State) -> Tensor:
        """Seconds until the last answer of each has arrived [m]."""
        return self.clock.arrivals(self.clock.phases(ids, work, self.way(knobs)))

    def round(self, stats: RoundStats, ledger: Ledger, before: float = 0.0) -> dict[str, Any]:
        """The round that was just run, for the record; before the ledger closes it. before: seconds of the earlier ones."""
        line = self.clock.round(stats.ids, ledger.work(stats.ids), stats.status, self.way(stats.knobs))
        return {"total": before + line["round"], **line}

    def facts(self) -> dict[str, Any]:
        """For the header: of each profile its name, its clients, its seconds of a local step, those of the other ways by
        their knobs; the flops of a step.
        """
        names = [" and ".join(name for name, on in zip(KNOBS, way, strict=True) if on) for way in self.ways.tolist()]
        others = dict(zip(names[1:], self.clock.steps[1:].tolist(), strict=True))
        return {
            "profiles": [profile.name for profile in self.fleet.profiles],
            "clients": torch.bincount(self.clock.device, minlength=len(self.fleet.profiles)).tolist(),
            "step_seconds": self.clock.steps[0].tolist(),
            "step_flops": sum(one.flops * one.times for one in self.step),
        } | ({"way_seconds": others} if others else {})


def ways(table: State) -> Tensor:
    """The ways to take a step that modes have [W, 3] bool, the plain one first. table: knobs of each mode {name: [n_m]}."""
    plain = torch.zeros(1, len(KNOBS), dtype=torch.bool)
    off = torch.zeros_like(next(iter(table.values()), torch.zeros(0)))
    found: Tensor = torch.unique(torch.cat([plain, torch.stack([table.get(name, off) > 0 for name in KNOBS], 1)]), dim=0)
    return found


def counted(work: Work, batch_size: int, way: Sequence[bool]) -> tuple[Operator, ...]:
    """The operators of a local step in a way: which of the knobs are on."""
    on = {name for name, told in zip(KNOBS, way, strict=True) if told}
    if "bfloat16" in on:
        return count(one_step(replace(work, task=_lowered(work.task, work.split.x0.device.type)), batch_size))
    return count(one_step(work, batch_size, {name: torch.tensor(levels(8), dtype=torch.uint8) for name in on}))


def _lowered(task: Task, device: str) -> BuiltTask:
    """The task with model and loss under autocast; a weight is cast wherever it is used."""
    assert isinstance(task, BuiltTask)
    program = task.program

    def under(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
                return fn(*arguments)

        return run

    return replace(task, program=replace(program, forward=under(program.forward), per_sample=under(program.per_sample)))


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
