"""FedLab: its standalone pipeline, SyncServerHandler and SGDSerialClientTrainer; a client's batches are cut from tensors.

FedLab imports torchvision for data sets that are not used here; an empty stand-in serves. A client's loader is an iterable
of shuffled slices instead of a DataLoader, which the trainer takes as well and which is cheaper.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from clock import Clock, Job, job
from torch import Tensor
from torch_parts import Steps, started, tested

for name in ("torchvision", "torchvision.transforms", "torchvision.datasets"):
    sys.modules[name] = ModuleType(name)
sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
sys.modules["torchvision"].datasets = sys.modules["torchvision.datasets"]

from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer  # noqa: E402
from fedlab.contrib.algorithm.basic_server import SyncServerHandler  # noqa: E402
from fedlab.core.standalone import StandalonePipeline  # noqa: E402


class Held:
    """Clients' tensors in memory, in the form that FedLab's trainer asks for."""

    def __init__(self, asked: Job) -> None:
        self.x, self.y = torch.from_numpy(asked.x), torch.from_numpy(asked.y)

    def get_dataloader(self, client: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in a fresh order."""
        x, y = self.x[client], self.y[client]
        for index in torch.randperm(len(y)).split(batch):
            yield x[index], y[index]


class Handler(SyncServerHandler):
    """FedLab's synchronous server with the cohorts of the run."""

    cohorts: list[list[int]]

    def sample_clients(self) -> list[int]:
        """The clients of this round."""
        return sorted(self.cohorts[self.round])


class Pipeline(StandalonePipeline):
    """The standalone pipeline; its hook after a round tells the clock."""

    def __init__(self, handler: Handler, trainer: SGDSerialClientTrainer, clock: Clock) -> None:
        super().__init__(handler, trainer)
        self.clock = clock

    def evaluate(self) -> None:
        """End of a round."""
        self.clock.round_done()


def main() -> None:
    """One run."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    asked = job()
    torch.manual_seed(asked.seed)
    clock, steps = Clock(asked.rounds), Steps()
    model = started(asked)
    start = tested(model, asked)
    trainer = SGDSerialClientTrainer(model, asked.clients)
    trainer.setup_dataset(Held(asked))
    trainer.setup_optim(1, asked.batch, asked.lr)
    steps.watch(trainer.optimizer)
    handler = Handler(model, asked.rounds, asked.cohort / asked.clients)
    handler.cohorts = asked.cohorts
    Pipeline(handler, trainer, clock).main()
    clock.report(("fedlab", "torch"), steps.count, start, tested(handler.model, asked))


if __name__ == "__main__":
    main()
