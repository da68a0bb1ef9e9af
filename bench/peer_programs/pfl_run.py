"""pfl-research: FederatedAveraging on the SimulatedBackend, users' tensors in memory, one process.

Local evaluation is on in round 1 only (it cannot be switched off), which the clock does not see. A user's batches are cut
once and kept in their order, as pfl's datasets do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from clock import Clock, Job, job
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch_parts import Steps, started, tested


class Learner(nn.Module):
    """A network with the two methods that pfl asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of a batch."""
        return nn.functional.cross_entropy(self.net(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Of a user's batch."""
        return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}


class Tell(TrainingProcessCallback):
    """Tells the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> Any:
        """End of a round."""
        self.clock.round_done()
        return False, Metrics()


def users(asked: Job) -> FederatedDataset:
    """Every client's tensors, made once; the sampler goes through the cohorts of all rounds."""
    x, y = torch.from_numpy(asked.x), torch.from_numpy(asked.y)
    held = [PyTorchTensorDataset((x[i], y[i]), user_id=str(i)) for i in range(asked.clients)]
    drawn = [client for cohort in asked.cohorts for client in cohort]
    return FederatedDataset(held.__getitem__, get_user_sampler("minimize_reuse", drawn))


def main() -> None:
    """One run."""
    torch.set_num_threads(1)
    asked = job()
    np.random.seed(asked.seed)
    clock, steps = Clock(asked.rounds), Steps()
    net = started(asked)
    start = tested(net, asked)
    learner = Learner(net)
    model = PyTorchModel(
        learner,
        lambda parameters, lr: steps.watch(torch.optim.SGD(parameters, lr=lr, foreach=True)),
        torch.optim.SGD(learner.parameters(), lr=1.0),
    )
    data = users(asked)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=asked.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=asked.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=asked.lr, local_batch_size=asked.batch),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[Tell(clock)],
    )
    clock.report(("pfl", "torch"), steps.count, start, tested(net, asked))


if __name__ == "__main__":
    main()
