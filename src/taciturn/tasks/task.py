"""A task: a model, a loss, metrics and the clients' data.

Symbols: b samples of a batch; output [b, ..] of the model; target [b, ..].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from taciturn.core.errors import ModelError
from taciturn.tasks.built import BuiltTask, Forward, Program, apply_to_input, examine
from taciturn.tasks.data.clients import Federation, LazyClients, Samples, hold_out
from taciturn.tasks.metrics import Metric, accuracy, mae, next_token, per_sample, perplexity, rmse


@dataclass(frozen=True)
class Task:
    """What a user brings.

    model: an `nn.Module`, or a function that makes one (called under the run's seed). data: a `Federation`, or one
    map-style dataset a client (list, or dict by client name), samples (input, target) or dicts of tensors. loss: of
    `torch.nn`, `torch.nn.functional`, or your own that gives one value a sample. metrics: accuracy for cross-entropy,
    root-mean-square error for squared error and perplexity for `next_token` unless given; the first leads.
    test: a dataset that the server holds.
    hold_out, validation: fractions of each client's samples that are its own test and validation data (0.2 for hold_out
    where there is no `test`, else 0); a `Federation` brings its own.
    forward(model, batch): how to call the model, `model(batch["input"])` unless given.
    """

    model: nn.Module | Callable[[], nn.Module]
    data: Federation | Sequence[Samples] | Mapping[str, Samples]
    loss: Callable[..., Tensor] = F.cross_entropy
    metrics: tuple[Metric, ...] | None = None
    test: Samples | None = None
    forward: Forward = apply_to_input
    hold_out: float | None = None
    validation: float = 0.0

    def build(
        self,
        seed: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> BuiltTask:
        """Check everything and move it to the device. prepare: the partition's, on a copy of the model.

        Errors: `DataError`, `ModelError`, each with the remedy.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.model if isinstance(self.model, nn.Module) else self.model()
            if not isinstance(made, nn.Module):
                raise ModelError(f"task.model gave {type(made).__name__}; give an nn.Module or a function that makes one")
            model = prepare(copy.deepcopy(made)).to(device, dtype)
        if not model.training:
            model.train()  # a model in evaluation mode as a whole is to be trained; single frozen parts stay frozen
        tensors = [*model.parameters(), *model.buffers()]
        evaluated = copy.deepcopy(model, {id(t): t for t in tensors}).eval()
        program = Program(self.forward, per_sample(self.loss), dtype)
        data = self._federation(seed).to(device)
        metrics = _default_metrics(self.loss) if self.metrics is None else tuple(self.metrics)
        return BuiltTask(model, evaluated, data, metrics, program, examine(program, model, data.train, device))

    def _federation(self, seed: int) -> Federation:
        if isinstance(self.data, Federation):
            data = self.data
        else:
            share = (0.0 if self.test is not None else 0.2) if self.hold_out is None else self.hold_out
            data = _divided(self.data, share, self.validation, seed)
        return data if self.test is None else replace(data, central=LazyClients(("server",), (self.test,)))


def _divided(data: Sequence[Samples] | Mapping[str, Samples], test: float, validation: float, seed: int) -> Federation:
    """One data set a client -> each client's own training, validation and test samples."""
    if isinstance(data, Mapping):
        named = dict(data)
    else:
        width = len(str(max(0, len(data) - 1)))
        named = {f"client-{i:0{width}d}": dataset for i, dataset in enumerate(data)}
    LazyClients(tuple(named), tuple(named.values()))  # refuses empty clients by name
    owners = {name: range(len(dataset)) for name, dataset in named.items()}
    splits = []
    for rows in hold_out(owners, test=test, validation=validation, seed=seed):
        parts: dict[str, Samples] = {name: Subset(named[name], index.tolist()) for name, index in rows.items()}  # type: ignore[arg-type]
        splits.append(LazyClients(tuple(parts), tuple(parts.values())) if parts else None)
    train, held, final = splits
    assert train is not None
    return Federation(train, "custom", 0, validation=held, test=final)


def _default_metrics(loss: Any) -> tuple[Metric, ...]:
    if loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss):
        return (accuracy,)
    if loss is F.mse_loss or isinstance(loss, nn.MSELoss):
        return (rmse, mae)
    return (perplexity,) if loss is next_token else ()
