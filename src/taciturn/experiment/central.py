"""The server's model on the server's test set, as it is and as it is deployed. Symbols: x [d]; S test samples."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from taciturn.client import Work
from taciturn.core.rounding import levels
from taciturn.core.state import State
from taciturn.core.types import Batch, Clients
from taciturn.engines.frozen import Evaluated
from taciturn.precision import fake
from taciturn.tasks.built import BuiltTask

AT_ONCE = 1024  # samples
_SERVER = torch.zeros(1, dtype=torch.int64)


class Central:
    """Metrics of x on the test set; what frozen layers make of the samples is computed once, in at most `keep` bytes."""

    def __init__(self, task: BuiltTask, work: Work, data: Clients, keep: int) -> None:
        self._task, self._work, self._data = task, work, data
        self._frozen = Evaluated.build(work, task.evaluated, data, keep)

    def __call__(self, held: State, bits: int = 0, inputs: int = 0) -> dict[str, float]:
        """What a receiver of the model would hold -> {"accuracy": .., "loss": ..}. bits: of every weight, as in
        `Result.quantized`; inputs: bits of what their layers are given (precision/fake.py); 0: float.
        """
        split, x = self._work.split, held["x"]
        views = split.layout.views(x), split.personal.views(split.v0), split.buffers.views(split.b0)
        params = self._work.params(held, *views)
        if bits:
            params |= fake.deployed({name: params.get(name, p) for name, p in self._task.model.named_parameters()}, bits)
        frozen = None if bits or inputs else self._frozen  # frozen weights are quantized too
        total: dict[str, float] = {}
        for index in torch.split(torch.arange(int(self._data.sizes[0])), self._task.at_once(AT_ONCE)):
            batch: Batch = {name: t[0] for name, t in self._data.fetch(_SERVER, index.unsqueeze(0)).items()}
            batch["mask"] = torch.ones(len(index), dtype=torch.bool, device=x.device)
            with fake.inputs(torch.tensor(levels(inputs), device=x.device)) if inputs else nullcontext():
                found = self._measure(params, batch, index, frozen)
            total = {name: total.get(name, 0.0) + float(value) for name, value in found.items()}
        return self._task.pool(total)

    def _measure(
        self, params: dict[str, Tensor], batch: Batch, index: Tensor, frozen: Evaluated | None
    ) -> dict[str, Tensor]:
        if frozen is None:
            return self._task.measure(params, batch)
        with torch.no_grad():
            return self._task.sums(frozen(params, batch, index), batch)
