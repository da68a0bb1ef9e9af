"""Federations of least squares whose every moment is known, and codecs that say all of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from taciturn import Experiment, Method, solvers, sync
from taciturn.core import random
from taciturn.tasks.data.clients import Federation, TableClients
from taciturn.tasks.task import Task


@dataclass(frozen=True, slots=True)
class keep:
    """u b / p, one draw a message: partial participation."""

    lossy: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    p: float = 0.5

    def message_bits(self, d):
        return 32 * d * self.p

    def omega(self, d):
        return 1 / self.p - 1

    def linear_map(self, d):
        return 1 / self.p, 0.0, 0.0

    def init(self, layout):
        return {}, {}

    def encode(self, u, tx, key, *, layout, knobs):
        return {"values": u * (random.uniform(key, 1) < self.p) / self.p}, tx

    def decode(self, payload, rx, *, layout):
        return payload["values"], rx


@dataclass(frozen=True, slots=True)
class thin:
    """u_i b_i / p; says its variance, or nothing (told = False), or a wrong one."""

    lossy: ClassVar[bool] = True
    p: float = 0.25
    told: bool = True
    unbiased: bool = True
    scale: float = 1.0

    def message_bits(self, d):
        return 32 * d * self.p

    def omega(self, d):
        return 1 / self.p - 1

    def variance(self, u):
        return self.scale * self.omega(1) * u.double().square()

    def __getattribute__(self, name):
        if name == "variance" and not object.__getattribute__(self, "told"):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def init(self, layout):
        return {}, {}

    def encode(self, u, tx, key, *, layout, knobs):
        return {"values": u * (random.uniform(key, u.shape[-1]) < self.p) / self.p}, tx

    def decode(self, payload, rx, *, layout):
        return payload["values"], rx


def zeros(d):
    layer = nn.Linear(d, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def least_squares(d=8, clients=6, samples=200, shift=0.0, noise=1.0, rotate=True, seed=3):
    """-> task, inputs [N, n, d]. y = <x, w_i> + noise, w_i = 1 + shift N(0, I), x ~ N(0, H), eigenvalues 1/i."""
    key = random.key(seed)
    basis = torch.linalg.qr(random.normal(random.fold(key, "q"), d, d))[0] if rotate else torch.eye(d)
    x = (random.normal(random.fold(key, "x"), clients * samples, d) * torch.arange(1.0, d + 1).rsqrt()) @ basis.T
    own = torch.ones(d) + shift * random.normal(random.fold(key, "w"), clients, d)
    clean = (x.view(clients, samples, d) * own.unsqueeze(1)).sum(-1).flatten()
    y = clean + noise * random.normal(random.fold(key, "y"), len(x))
    owners = {f"s{i}": np.arange(i * samples, (i + 1) * samples) for i in range(clients)}
    data = Federation(TableClients.of({"input": x, "target": y.unsqueeze(1)}, owners), "regression", 1)
    return Task(lambda: zeros(d), data, F.mse_loss), x.view(clients, samples, d)


def experiment(task, steps=1, lr=0.05, batch=8, rounds=40, **method):
    """Local SGD on it."""
    parts = {"sync": sync.every(steps=steps), "solver": solvers.sgd(lr=lr), "batch_size": batch} | method
    return Experiment(task, Method(**parts), rounds=rounds)
