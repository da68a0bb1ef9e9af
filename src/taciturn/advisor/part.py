"""What is said of one part of a method: the choice, the numbers that it rests on, and how sure that is.

A round's seconds are those of the fleet's clock (fleet/clock.py), over the cohorts of the pilot:

    seconds = max over the cohort of (down / line + steps x step + up / line + latency)       work = max of (steps x step)

share = 1 - work / seconds: what a round would be shorter by if nothing were sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from taciturn.advisor.pilot import Pilot
from taciturn.fleet import Clock, Profile
from taciturn.fleet.fleets import MBIT
from taciturn.method import Method
from taciturn.sync import every

MEASURED = "measured in the pilot"
PREDICTED = "predicted"


def keep(method: Method) -> Method:
    """The method as it is."""
    return method


@dataclass(frozen=True)
class Part:
    """name: sync, codec, rank, ..; choice: in words; sure: how it is known; numbers: plain, for JSON; said: sentences.

    rows: a table, the first row its head; gain: what a run would cost with the choice over without (1: nothing is gained);
    change: what the choice does to a method.
    """

    name: str
    choice: str
    sure: str
    numbers: Mapping[str, Any]
    said: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    gain: float = 1.0
    change: Callable[[Method], Method] = field(default=keep, repr=False)

    @property
    def changes(self) -> bool:
        """True if the choice is another than what the method has."""
        return self.change is not keep

    def table(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "choice": self.choice, "certainty": self.sure, "changes": self.changes, "gain": self.gain,
            "numbers": dict(self.numbers), "said": list(self.said),
        }  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Devices and lines that a run is judged on. clock: of the fleet, with the link's line where one is given; profile: the
    device that rounds wait for; told: what it is, in words; given: False where nobody said and the reference is taken.
    """

    clock: Clock
    profile: Profile
    told: str
    given: bool


@dataclass(frozen=True)
class Timing:
    """Mean seconds of a round over the pilot's cohorts; work: without messages; epoch: of a local epoch of the slowest."""

    seconds: float
    work: float
    epoch: float

    @property
    def share(self) -> float:
        """Of a round's time that messages take."""
        return 1 - self.work / self.seconds if self.seconds > 0 else 0.0

    @property
    def epochs(self) -> float:
        """Local epochs of a round, of the slowest."""
        return self.work / self.epoch

    @property
    def rho(self) -> float:
        """What a round's messages cost, in local epochs."""
        return (self.seconds - self.work) / self.epoch


def line_of(pilot: Pilot, mbit: float | None, latency: float, fleet: str) -> Line:
    """The line. mbit, latency: of the link, each way, in place of the fleet's lines; fleet: its name, "" where none is."""
    times = pilot.end.times
    clock, told = times.clock, f"fleet {fleet}" if fleet else "the reference device"
    if mbit is not None:
        flat = torch.full_like(clock.up, mbit * MBIT)
        clock = replace(clock, up=flat, down=flat, latency=torch.full_like(flat, latency))
        told = f"{told} on {mbit:g} Mbit/s each way, {1000 * latency:g} ms"
    elif not fleet:
        profile = times.fleet.profiles[0]
        told += (
            f" on its line: {profile.up / MBIT:g} Mbit/s up, {profile.down / MBIT:g} down, {1000 * profile.latency:g} ms"
        )
    spent = [_arrival(pilot, clock, place) for place in range(len(times.fleet.profiles))]
    slowest = int(torch.tensor(spent).argmax())
    profile = times.fleet.profiles[slowest]
    if mbit is not None:
        profile = replace(profile, up=mbit * MBIT, down=mbit * MBIT, latency=latency)
    return Line(clock, profile, told, mbit is not None or bool(fleet))


def timing(pilot: Pilot, clock: Clock, up: float, down: float, way: int = 0) -> Timing:
    """Seconds of a round in which each client sends `up` bytes and gets `down`."""
    task, method = pilot.curvature.work.task, pilot.end.method
    found = []
    for ids in pilot.end.cohorts:
        sizes = task.train.sizes[ids]
        epoch = (sizes + method.batch_size - 1) // method.batch_size
        steps = _steps(pilot, epoch)
        work = torch.stack([torch.full_like(steps, down), steps, torch.full_like(steps, up)]).unsqueeze(0)
        step = clock.steps[way, clock.device[ids]]
        total = clock.arrivals(clock.phases(ids, work, way)).max()
        found.append(torch.stack([total, (steps * step).max(), (epoch * step).max()]))
    seconds, spent, pass_ = torch.stack(found).mean(0).tolist()
    return Timing(seconds, spent, pass_)


def _steps(pilot: Pilot, epoch: Tensor) -> Tensor:
    """Local steps of a round [M] float64: the rule's where it is fixed, else the pilot's mean for all."""
    rule = pilot.end.method.sync
    if isinstance(rule, every):
        return rule.schedule(epoch, {})[0].to(torch.float64)
    return torch.full(epoch.shape, pilot.steps, dtype=torch.float64)


def _arrival(pilot: Pilot, clock: Clock, place: int) -> float:
    """Seconds of a round on one device, with the pilot's messages."""
    up = pilot.overhead + 4 * pilot.d
    messages = up / float(clock.up[place]) + pilot.bytes_down / float(clock.down[place])
    return float(messages + clock.latency[place] + pilot.steps * clock.steps[0, place])
