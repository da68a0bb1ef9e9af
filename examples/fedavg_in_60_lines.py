"""FedAvg in naked loops (McMahan et al. 2017, Algorithm 1), without any part of taciturn: what the library must equal.

Run: python examples/fedavg_in_60_lines.py
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn


def shuffled(client, epoch, n, batch_size):
    """Sample numbers of one epoch, cut into batches."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(1000 * client + epoch)).split(batch_size)


def local_training(model, x, y, batch_orders, lr):
    """SGD on one client's data; the model is changed in place."""
    for order in batch_orders:
        for index in order:
            model.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= lr * parameter.grad
    return [parameter.detach().clone() for parameter in model.parameters()]


def fedavg(model, clients, cohorts, epochs, batch_size, lr, batches=shuffled):
    """clients: list of (x, y); cohorts: for each round the clients that take part. The model is changed in place."""
    epochs_done = [0] * len(clients)
    for cohort in cohorts:
        local_models, sizes = [], []
        for k in cohort:
            x, y = clients[k]
            orders = [batches(k, epochs_done[k] + e, len(y), batch_size) for e in range(epochs)]
            epochs_done[k] += epochs
            local_models.append(local_training(copy.deepcopy(model), x, y, orders, lr))
            sizes.append(len(y))
        with torch.no_grad():
            for place, parameter in enumerate(model.parameters()):
                weighted = [n * local[place] for n, local in zip(sizes, local_models, strict=True)]
                parameter.copy_(sum(weighted) / sum(sizes))
    return model


if __name__ == "__main__":
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    shares = torch.arange(1400).split(70)
    clients = [(x[rows], y[rows]) for rows in shares]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    cohorts = [[(7 * r + j) % len(clients) for j in range(5)] for r in range(30)]
    fedavg(model, clients, cohorts, epochs=2, batch_size=10, lr=0.1)
    accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean()
    print(f"accuracy on digits that no client has: {accuracy:.3f}")
