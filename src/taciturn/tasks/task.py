"""A task: a model, a loss, metrics and the clients' data, checked once and then read only.

Symbols: b samples of a batch; output [b, ..]; target [b, ..]; mask [b] bool, False marks padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taciturn.core.errors import ConfigError, DataError, ModelError
from taciturn.core.random import Key, key, seeded
from taciturn.core.types import Batch, Clients, Record
from taciturn.tasks.data.clients import Federation, LazyClients, Samples, TableClients
from taciturn.tasks.metrics import Metric, accuracy, mae, per_sample, rmse
from taciturn.tasks.randomness import changes_generator, couples_samples, keyed

Forward: TypeAlias = Callable[[Callable[..., Any], Batch], Any]


def apply_to_input(model: Callable[..., Any], batch: Batch) -> Any:
    """The default forward: model(batch["input"])."""
    return model(batch["input"])


@dataclass(frozen=True)
class Task:
    """What a user brings.

    model: an `nn.Module`, or a function that makes one (called under the run's seed). data: a `Federation`, or one
    map-style dataset a client (list, or dict by client name), samples (input, target) or dicts of tensors. loss: of
    `torch.nn`, `torch.nn.functional`, or your own that gives one value a sample. metrics: accuracy for cross-entropy and
    root-mean-square error for squared error unless given; the first leads. test: a dataset that the server holds.
    forward(model, batch): how to call the model, `model(batch["input"])` unless given.
    """

    model: nn.Module | Callable[[], nn.Module]
    data: Federation | Sequence[Samples] | Mapping[str, Samples]
    loss: Callable[..., Tensor] = F.cross_entropy
    metrics: tuple[Metric, ...] | None = None
    test: Samples | None = None
    forward: Forward = apply_to_input

    def build(self, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> BuiltTask:
        """Check everything and move it to the device. Errors: `DataError`, `ModelError`, each with the remedy."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.model if isinstance(self.model, nn.Module) else self.model()
        if not isinstance(made, nn.Module):
            raise ModelError(f"task.model gave {type(made).__name__}; give an nn.Module or a function that makes one")
        model = copy.deepcopy(made).to(device, dtype)
        if not model.training:
            model.train()  # a model in evaluation mode as a whole is to be trained; single frozen parts stay frozen
        metrics = (_default_metrics(self.loss) if self.metrics is None else tuple(self.metrics)) or ()
        return BuiltTask(model, self._federation().to(device), per_sample(self.loss), metrics, self.forward, device, dtype)

    def _federation(self) -> Federation:
        if isinstance(self.data, Federation):
            data = self.data
        elif isinstance(self.data, Mapping):
            data = Federation(LazyClients(tuple(self.data), tuple(self.data.values())), "custom", 0)
        else:
            width = len(str(max(0, len(self.data) - 1)))
            names = tuple(f"client-{i:0{width}d}" for i in range(len(self.data)))
            data = Federation(LazyClients(names, tuple(self.data)), "custom", 0)
        return data if self.test is None else replace(data, central=LazyClients(("server",), (self.test,)))


def _default_metrics(loss: Any) -> tuple[Metric, ...]:
    if loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss):
        return (accuracy,)
    if loss is F.mse_loss or isinstance(loss, nn.MSELoss):
        return (rmse, mae)
    return ()


@dataclass(frozen=True)
class BuiltTask:
    """A task that was checked; what engines and the runner read. randomness: "none", "keyed" (dropout) or "seeded"."""

    model: nn.Module
    data: Federation
    per_sample: Callable[[Any, Any], Tensor]
    metrics: tuple[Metric, ...]
    forward: Forward
    device: str
    dtype: torch.dtype
    randomness: str = field(init=False)
    tracked: frozenset[str] = field(init=False)
    couples: bool = field(init=False)
    _counters: tuple[str, ...] = field(init=False, repr=False)
    _evaluated: nn.Module = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        evaluated = copy.deepcopy(self.model, {id(t): t for t in tensors}).eval()
        for name, value in (("_evaluated", evaluated), ("couples", couples_samples(self.model))):
            object.__setattr__(self, name, value)
        randomness, tracked = self._probe()
        object.__setattr__(self, "randomness", randomness)
        object.__setattr__(self, "tracked", tracked)

    def _probe(self) -> tuple[str, frozenset[str]]:
        """Two samples forward: shapes, randomness and buffers that move."""
        n = min(2, int(self.train.sizes[0]))
        index = torch.arange(n).unsqueeze(0)
        batch = {name: t[0] for name, t in self.train.fetch(torch.zeros(1, dtype=torch.int64), index).items()}
        if "target" not in batch:
            raise DataError(f'samples have {sorted(batch)}; a field "target" is needed')
        batch["mask"] = torch.ones(n, dtype=torch.bool, device=self.device)
        object.__setattr__(self, "randomness", "none")
        object.__setattr__(self, "_counters", ())
        before = {name: t.clone() for name, t in self.model.named_buffers()}

        def run() -> Tensor:
            with torch.no_grad():
                return self._values(self.model, dict(self.model.named_parameters()), batch)

        try:
            device = torch.device(self.device)
            plain = changes_generator(run, device)
            with keyed(key(0)):
                other = plain and changes_generator(run, device)
            values = run()
        except ConfigError:
            raise
        except Exception as error:
            raise ModelError(f"the model or the loss failed on two samples of {self.train.names[0]!r}: {error}") from error
        if values.shape != (n,):
            raise ModelError(
                f"the loss gave shape {tuple(values.shape)} for {n} samples; one value a sample [{n}] is needed: a loss "
                'with reduction="none" or one that takes `reduction`'
            )
        moved = {name for name, t in self.model.named_buffers() if not torch.equal(t, before[name])}
        for name, t in self.model.named_buffers():
            t.copy_(before[name])
        for name, module in self.model.named_modules():
            if getattr(module, "momentum", 0.1) is None and any(m.startswith(name + ".") for m in moved):
                raise ModelError(
                    f"{name}: BatchNorm with momentum=None keeps a count that cannot be kept here; set a momentum"
                )
        floating = frozenset(n for n, t in self.model.named_buffers() if n in moved and t.is_floating_point())
        object.__setattr__(self, "_counters", tuple(sorted(moved - floating)))  # num_batches_tracked: written, never read
        return ("seeded" if other else "keyed" if plain else "none"), floating

    @property
    def train(self) -> Clients:
        """The clients' training data."""
        return self.data.train

    @property
    def sequential_only(self) -> str:
        """Why clients cannot be stacked, or ""."""
        if self.randomness == "seeded":
            return "the model draws random numbers outside dropout: one client at a time, under a seed per client and step"
        if self.couples:
            return "BatchNorm couples the samples of a batch, so batches cannot be padded: one client at a time"
        return ""

    def held_out(self, split: str) -> Clients:
        """The clients' own data of a split, in the order of the training clients (size 0: none held out)."""
        part = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}.get(split)
        if part is None:
            raise DataError(f"there is no split {split!r} of the clients' data; hold some out (test = 0.2)")
        return part if part.names == self.train.names else Aligned(part, self.train.names)

    def loss(self, params: Record, batch: Batch, key: Key) -> Tensor:
        """Mean loss [] over the samples that are not padding."""
        if self.couples:
            batch = {name: t[batch["mask"]] for name, t in batch.items()}
        counters = {name: self.model.get_buffer(name).clone() for name in self._counters}
        with self._under(key):
            values = self._values(self.model, params | counters, batch)
        mask = batch["mask"]
        return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)

    def measure(self, params: Record, batch: Batch) -> dict[str, Tensor]:
        """Sums [] over the samples that are not padding: "count", "loss" and each metric."""
        with torch.no_grad():
            output = self._output(self._evaluated, params, batch)
            mask = batch["mask"]
            values = {"loss": self.per_sample(output, batch["target"])}
            values |= {metric.name: metric.values(output, batch["target"]) for metric in self.metrics}
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

    def _output(self, model: nn.Module, params: Record, batch: Batch) -> Any:
        batch = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in batch.items()}
        return self.forward(lambda *a, **k: torch.func.functional_call(model, params, a, k), batch)

    def _values(self, model: nn.Module, params: Record, batch: Batch) -> Tensor:
        target = batch["target"]
        target = target.to(self.dtype) if target.is_floating_point() else target
        return self.per_sample(self._output(model, params, batch), target)

    def _under(self, key: Key) -> Any:
        if self.randomness == "keyed":
            return keyed(key)
        return seeded(key) if self.randomness == "seeded" else nullcontext()


class Aligned:
    """A split that only some clients have, in the order of all clients."""

    def __init__(self, part: TableClients | LazyClients, names: Sequence[str]) -> None:
        self.names, self._part = names, part
        place = {name: i for i, name in enumerate(part.names)}
        self._place = torch.tensor([place.get(name, -1) for name in names])
        self.sizes = torch.where(self._place >= 0, part.sizes[self._place.clamp(min=0)], 0)

    def fetch(self, ids: Tensor, index: Tensor, keys: Key | None = None) -> Batch:
        """Samples `index` [m, b] of clients `ids` [m], which must have some."""
        return self._part.fetch(self._place[ids], index, keys)
