"""Data that are drawn, for problems whose solution is known. Every class is a part that can stand in `[data]`.

Symbols: N clients; n samples of each; d features; H_i second moment of client i's features; w*_i what explains its targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from taciturn.core import random
from taciturn.core.errors import require
from taciturn.core.random import Key
from taciturn.tasks.data.clients import Federation, TableClients, hold_out
from taciturn.tasks.data.splits import client_names, federation


@dataclass(frozen=True, slots=True)
class least_squares:
    """Federated least squares: x ~ N(0, H_i) [d], y = <x, w*_i> + noise e [1], e ~ N(0, 1).

        H_i = U_i Diag(k^-power) U_i', k = 1 .. d;   w*_i = (1, .., 1)

    basis: "identity" (U = I) or "haar" (a random rotation). shift: "none": all clients alike; "covariate": each client its
    own rotation, or with basis "identity" its own order of the features; "optimum": w*_i = (1, .., 1) + scale z_i, z_i
    standard normal with the mean over clients taken off, so that the mean of the optima stays (1, .., 1).
    samples: of each client; central: fraction of them that the server keeps as its test set; test, validation: fractions of
    the rest. Everything is drawn from the seed. Same seed, same federation.
    Errors: `ConfigError` for values out of range.
    Source: the synthetic setting of Philippenko & Dieuleveut, JMLR 25(288), 2024.
    """

    d: int = 20
    clients: int = 10
    samples: int = 1000
    power: float = 1.0
    basis: Literal["identity", "haar"] = "haar"
    noise: float = 1.0
    shift: Literal["none", "covariate", "optimum"] = "none"
    scale: float = 1.0
    central: float = 0.2
    test: float = 0.0
    validation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("d", "clients", "samples"):
            require(getattr(self, name) >= 1, f"{name}: at least 1; got {getattr(self, name)}")
        for name in ("power", "noise", "scale"):
            require(getattr(self, name) >= 0, f"{name}: at least 0; got {getattr(self, name)}")
        require(0 <= self.central < 1, f"central: a fraction below 1; got {self.central}")

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        key = random.fold(random.key(seed), "least_squares")
        roots, optima = self.law(seed)
        x = random.normal(random.fold(key, "features"), self.clients, self.samples, self.d).double() @ roots.mT
        noise = self.noise * random.normal(random.fold(key, "noise"), self.clients, self.samples).double()
        y = (x @ optima.unsqueeze(-1)).squeeze(-1) + noise
        fields = {"input": x.flatten(0, 1).float(), "target": y.flatten().float().unsqueeze(1)}
        held = round(self.central * self.samples)
        rows = np.arange(self.clients * self.samples).reshape(self.clients, self.samples)
        owners = dict(zip(client_names(self.clients), rows[:, held:], strict=True))
        central = TableClients.of(fields, {"server": rows[:, :held].ravel()}) if held else None
        parts = hold_out(owners, test=self.test, validation=self.validation, seed=seed)
        note = f"least squares: {self.d} features, spectrum k^-{self.power:g}, {self.basis} basis, shift {self.shift}"
        return federation(fields, parts, kind="regression", outputs=1, central=central, note=note)

    def law(self, seed: int) -> tuple[Tensor, Tensor]:
        """What the samples are drawn from: roots A_i with H_i = A_i A_i' [N, d, d] and w*_i [N, d], float64."""
        key = random.fold(random.key(seed), "least_squares")
        many = self.clients if self.shift == "covariate" else 1
        scale = torch.arange(1, self.d + 1, dtype=torch.float64) ** (-self.power / 2)
        turns = [self._turn(random.fold(key, "basis", i), self.shift == "covariate") for i in range(many)]
        roots = torch.stack(turns) * scale
        optima = torch.ones(self.clients, self.d, dtype=torch.float64)
        if self.shift == "optimum":
            apart = random.normal(random.fold(key, "optima"), self.clients, self.d).double()
            optima = optima + self.scale * (apart - apart.mean(0))
        return roots.expand(self.clients, -1, -1), optima

    def _turn(self, key: Key, own: bool) -> Tensor:
        """An orthogonal matrix [d, d]: Haar; or the identity, for clients of their own a permutation."""
        if self.basis == "identity":
            eye = torch.eye(self.d, dtype=torch.float64)
            return eye[random.permutation(key, self.d)] if own else eye
        q, r = torch.linalg.qr(random.normal(key, self.d, self.d).double())
        turned: Tensor = q * r.diagonal().sign()
        return turned
