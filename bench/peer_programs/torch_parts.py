"""The models of the workloads in plain PyTorch, their start weights and their test accuracy."""

from __future__ import annotations

from typing import Any

import torch
from clock import Job, Score, score
from torch import nn


def network(workload: str) -> nn.Module:
    """W1: 784-200-200-10; W2: two 5x5 convolutions, one hidden layer of 512."""
    if workload == "W1":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
        )
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


def started(job: Job) -> nn.Module:
    """The network with the start weights of the data file."""
    model = network(job.workload)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in job.weights.items()})
    return model


def tested(model: nn.Module, job: Job) -> Score:
    """Accuracy and loss on the test images."""
    with torch.no_grad():
        return score(model(torch.from_numpy(job.test_x)).numpy(), job.test_y)


class Steps:
    """Counts the steps that optimizers really take."""

    def __init__(self) -> None:
        self.count = 0

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Count this optimizer's steps too."""
        optimizer.register_step_post_hook(self._step)
        return optimizer

    def _step(self, *_: Any) -> None:
        self.count += 1
