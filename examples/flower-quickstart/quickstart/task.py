"""Model, data and training: nothing of it knows that it is federated."""

from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """64 pixels -> 10 classes; 33,910 values."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10))

    def forward(self, x):
        return self.layers(x)


@lru_cache
def load_data(partition: int, of: int) -> tuple[TensorDataset, TensorDataset]:
    """(training data of one owner, with unlike labels; the test data of all)."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(y))
    held_out, rest = order[:400], order[400:]
    owner = np.zeros(len(rest), dtype=int)
    for label in range(10):
        mine = np.flatnonzero(y[rest] == label)
        owner[mine] = rng.choice(of, size=len(mine), p=rng.dirichlet(np.full(of, 1.0)))
    owner[:of] = np.arange(of)  # nobody is without data
    rows = rest[owner == partition]
    data = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    return TensorDataset(*(t[rows] for t in data)), TensorDataset(*(t[held_out] for t in data))


def train(net: nn.Module, data: TensorDataset, seed: int) -> float:
    """One epoch of SGD -> mean loss."""
    torch.manual_seed(seed)
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.2), []
    for x, y in DataLoader(data, batch_size=16, shuffle=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def accuracy(net: nn.Module, data: TensorDataset) -> float:
    """Share of the data that is classified rightly."""
    x, y = data.tensors
    with torch.no_grad():
        return (net(x).argmax(1) == y).float().mean().item()
