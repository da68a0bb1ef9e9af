"""A checked task: what engines and the runner read, and how the checks are made.

Symbols: b samples of a batch; output [b, ..]; target [b, ..]; mask [b] bool, False marks padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from taciturn.core.errors import ConfigError, DataError, ModelError
from taciturn.core.random import Key, key, seeded
from taciturn.core.types import Batch, Clients, Record
from taciturn.tasks.data.clients import Federation
from taciturn.tasks.metrics import Metric
from taciturn.tasks.randomness import changes_generator, couples_samples, keyed

Forward: TypeAlias = Callable[[Callable[..., Any], Batch], Any]
RANDOMNESS: dict[str, Callable[[Key], AbstractContextManager[None]]] = {
    "none": lambda key: nullcontext(),
    "keyed": keyed,
    "seeded": seeded,
}

OUTPUT_VALUES = 1 << 25  # of the samples that are evaluated at once


def apply_to_input(model: Callable[..., Any], batch: Batch) -> Any:
    """The default forward: model(batch["input"])."""
    return model(batch["input"])


@dataclass(frozen=True)
class Program:
    """How parameters and a batch become values: the user's forward and loss, in the run's precision."""

    forward: Forward
    per_sample: Callable[[Any, Any], Tensor]
    dtype: torch.dtype

    @property
    def plain(self) -> bool:
        """True if the model is called as model(batch["input"])."""
        return self.forward is apply_to_input

    def cast(self, batch: Batch) -> Batch:
        """The batch with its floats in the run's precision."""
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in batch.items()}

    def output(self, model: nn.Module, params: Record, batch: Batch) -> Any:
        """What the model gives."""
        return self.forward(lambda *a, **k: torch.func.functional_call(model, params, a, k), batch)

    def values(self, model: nn.Module, params: Record, batch: Batch) -> Tensor:
        """Loss of each sample [b]."""
        batch = self.cast(batch)
        return self.per_sample(self.output(model, params, batch), batch["target"])


@dataclass(frozen=True)
class Facts:
    """What two samples in training mode showed of a model.

    randomness: "none", "keyed" (dropout that keys replace) or "seeded" (other draws). tracked: float buffers that
    training changes; counters: integer ones, written and never read. couples: samples of a batch influence each other.
    wide: values of the output of one sample.
    """

    randomness: str
    tracked: frozenset[str]
    counters: tuple[str, ...]
    couples: bool
    wide: int


def examine(program: Program, model: nn.Module, train: Clients, device: str) -> Facts:
    """Run two samples of the largest client. Errors: `DataError`, `ModelError` with the remedy."""
    largest = train.sizes.argmax().reshape(1)
    index = torch.tensor([[0, min(1, int(train.sizes.max()) - 1)]])
    batch = {name: t[0] for name, t in train.fetch(largest, index).items()}
    if "target" not in batch:
        raise DataError(f'samples have {sorted(batch)}; a field "target" is needed')
    before = {name: t.clone() for name, t in model.named_buffers()}
    params: Record = dict(model.named_parameters())
    batch = program.cast(batch)

    def run() -> Tensor:
        with torch.no_grad():
            return program.values(model, params, batch)

    try:
        with torch.no_grad():
            output = program.output(model, params, batch)
            values = program.per_sample(output, batch["target"])
        draws = changes_generator(run, torch.device(device))
        with keyed(key(0)):
            other = draws and changes_generator(run, torch.device(device))
    except ConfigError:
        raise
    except Exception as error:
        name = train.names[int(largest)]
        raise ModelError(f"the model or the loss failed on two samples of {name!r}: {error}") from error
    if values.shape != (2,):
        raise ModelError(
            f"the loss gave shape {tuple(values.shape)} for 2 samples; one value a sample [2] is needed: a loss with "
            'reduction="none", or one that takes `reduction`'
        )
    moved = {name: t.is_floating_point() for name, t in model.named_buffers() if not torch.equal(t, before[name])}
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    for name, module in model.named_modules():
        if getattr(module, "momentum", 0.1) is None and any(m.startswith(name + ".") for m in moved):
            raise ModelError(f"{name}: BatchNorm with momentum=None keeps a count that cannot be kept; set a momentum")
    return Facts(
        "seeded" if other else "keyed" if draws else "none",
        frozenset(name for name, floating in moved.items() if floating),
        tuple(sorted(name for name, floating in moved.items() if not floating)),
        couples_samples(model),
        output.numel() // 2 if isinstance(output, Tensor) else 1,
    )


@dataclass(frozen=True)
class BuiltTask:
    """A task that was checked. `evaluated` is the model in evaluation mode, on the same tensors."""

    model: nn.Module
    evaluated: nn.Module
    data: Federation
    metrics: tuple[Metric, ...]
    program: Program
    facts: Facts
    _aligned: dict[str, Clients] = field(default_factory=dict, repr=False, compare=False)

    @property
    def train(self) -> Clients:
        """The clients' training data."""
        return self.data.train

    @property
    def tracked(self) -> frozenset[str]:
        """Buffers that a training step changes."""
        return self.facts.tracked

    @property
    def sequential_only(self) -> str:
        """Why clients cannot be stacked, or ""."""
        if self.facts.randomness == "seeded":
            return "the model draws random numbers outside dropout: one client at a time, under a seed per client and step"
        if self.facts.couples:
            return "BatchNorm couples the samples of a batch, so batches cannot be padded: one client at a time"
        return ""

    def held_out(self, split: str) -> Clients:
        """The clients' own data of a split, in the order of the training clients (size 0: none held out)."""
        part = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}.get(split)
        if part is None:
            raise DataError(f"there is no split {split!r} of the clients' data; hold some out (test = 0.2)")
        if split not in self._aligned:  # comparing and placing N names is done once
            same = part is self.train or part.names == self.train.names
            self._aligned[split] = part if same else Aligned(part, self.train.names)
        return self._aligned[split]

    def loss(self, params: Record, batch: Batch, key: Key) -> Tensor:
        """Mean loss [] over the samples that are not padding."""
        if self.facts.couples:
            batch = {name: t[batch["mask"]] for name, t in batch.items()}
            if len(batch["mask"]) == 1:
                raise ModelError(
                    "BatchNorm cannot train on one sample, and a client's last batch holds one; choose another "
                    "method.batch_size, or GroupNorm"
                )
        counters = {name: self.model.get_buffer(name).clone() for name in self.facts.counters}
        with self.randomness(key):
            values = self.program.values(self.model, params | counters, batch)
        mask = batch["mask"]
        return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)

    def randomness(self, key: Key) -> AbstractContextManager[None]:
        """What a training step of the model runs under: key [], or [m] for the samples of m clients in a row."""
        return RANDOMNESS[self.facts.randomness](key)

    @property
    def plain(self) -> bool:
        """True if the model is called as model(batch["input"])."""
        return self.program.plain

    def values(self, output: Any, target: Tensor) -> Tensor:
        """Loss of each sample [n]."""
        return self.program.per_sample(output, target)

    def cast(self, batch: Batch) -> Batch:
        """The batch with its floats in the run's precision."""
        return self.program.cast(batch)

    def at_once(self, samples: int) -> int:
        """How many of these samples to evaluate at once: at least 1, at most as many as have 2^25 values of output."""
        return max(1, min(samples, OUTPUT_VALUES // max(1, self.facts.wide)))

    def measure(self, params: Record, batch: Batch) -> dict[str, Tensor]:
        """Sums [] over the samples that are not padding: "count", "loss" and each metric."""
        n, sums = len(batch["mask"]), []
        chunk = self.at_once(n)
        with torch.no_grad():
            for first in range(0, max(1, n), chunk):
                part = {name: t[first : first + chunk] for name, t in batch.items()}
                sums.append(self.sums(self.program.output(self.evaluated, params, self.program.cast(part)), part))
        return {name: torch.stack([one[name] for one in sums]).sum(0) for name in sums[0]}

    def sums(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """The same of an output of the model in evaluation mode."""
        target, mask = self.program.cast(batch)["target"], batch["mask"]
        values = {"loss": self.program.per_sample(output, target)}
        values |= {metric.name: metric.values(output, target) for metric in self.metrics}
        sums = {name: torch.where(mask, value, 0.0).sum() for name, value in values.items()}
        return {"count": mask.sum().to(torch.float32)} | sums

    def pool(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums -> means, finished: {"accuracy": .., "loss": ..}."""
        count = max(1.0, sums["count"])
        finish = {metric.name: metric.finish for metric in self.metrics}
        return {name: finish.get(name, float)(value / count) for name, value in sums.items() if name != "count"}

    def model_with(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the model that holds these tensors, in evaluation mode."""
        model = copy.deepcopy(self.model).eval()
        model.load_state_dict({name: t.detach().clone() for name, t in tensors.items()})
        return model


class Aligned:
    """A split that only some clients have, in the order of all clients."""

    def __init__(self, part: Clients, names: Sequence[str]) -> None:
        self.names, self._part = names, part
        place = {name: i for i, name in enumerate(part.names)}
        self._place = torch.tensor([place.get(name, -1) for name in names])
        self.sizes = torch.where(self._place >= 0, part.sizes[self._place.clamp(min=0)], 0)

    def fetch(self, ids: Tensor, index: Tensor, keys: Key | None = None) -> Batch:
        """Samples `index` [m, b] of clients `ids` [m], which must have some."""
        return self._part.fetch(self._place[ids], index, keys)
