"""Federated Gaussian least squares, the problem on which the theory is exact.

Symbols: N clients; d features; x ~ N(0, H_i), y = <x, w*_i> + sigma e, e ~ N(0, 1) on client i; H = mean of H_i;
w* the minimiser of F = mean of F_i, F_i(w) = E (<x, w> - y)^2 / 2; delta_i = w* - w*_i; batch b: samples of one gradient,
0 for the full (deterministic) gradient H_i (w - w*_i). All tensors float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from taciturn.core.errors import require

Basis = Literal["identity", "haar"]


@dataclass(frozen=True)
class LeastSquares:
    """N clients with second moments [N, d, d], optima [N, d], noise sigma and b samples a gradient.

    Errors: `ConfigError` for shapes that do not fit or a negative batch.
    """

    moments: Tensor
    optima: Tensor
    sigma: float = 1.0
    batch: int = 1

    def __post_init__(self) -> None:
        clients, d = self.optima.shape
        require(tuple(self.moments.shape) == (clients, d, d), f"moments {tuple(self.moments.shape)}: not {(clients, d, d)}")
        require(self.batch >= 0, f"batch: at least 1 sample, or 0 for full gradients; got {self.batch}")

    @property
    def clients(self) -> int:
        """N."""
        return self.optima.shape[0]

    @property
    def d(self) -> int:
        """Features."""
        return self.optima.shape[1]

    @cached_property
    def curvature(self) -> Tensor:
        """H = mean of H_i [d, d]."""
        return self.moments.mean(0)

    @cached_property
    def optimum(self) -> Tensor:
        """w* [d]: H w* = mean of H_i w*_i."""
        if bool((self.optima == self.optima[0]).all()):
            return self.optima[0]
        pulled = (self.moments @ self.optima.unsqueeze(-1)).squeeze(-1).mean(0)
        solved: Tensor = torch.linalg.solve(self.curvature, pulled)
        return solved

    @cached_property
    def offsets(self) -> Tensor:
        """delta_i = w* - w*_i [N, d]."""
        return self.optimum - self.optima

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [d] and eigenvectors [d, d] (columns) of H; the identity for a diagonal H, in its own order."""
        if bool((self.curvature == torch.diag(self.curvature.diagonal())).all()):
            return self.curvature.diagonal(), torch.eye(self.d, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(self.curvature)
        return values.clamp(min=0), vectors

    @cached_property
    def alike(self) -> bool:
        """True if all clients share one H_i."""
        return bool((self.moments == self.moments[0]).all())

    def excess(self, w: Tensor) -> Tensor:
        """F(w) - F(w*) = (w - w*)' H (w - w*) / 2: [.., d] -> [..]."""
        gap = w.double() - self.optimum
        return 0.5 * (gap @ self.curvature * gap).sum(-1)


def spectrum(d: int, power: float) -> Tensor:
    """lambda_i = i^-power [d]."""
    return torch.arange(1, d + 1, dtype=torch.float64) ** -power


def haar(d: int, seed: int) -> Tensor:
    """A uniformly random orthogonal matrix [d, d]: QR of a Gaussian one, with the signs of R put right."""
    gaussian = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    turned: Tensor = q * r.diagonal().sign()
    return turned


def rotated(values: Tensor, basis: Basis, seed: int = 5) -> Tensor:
    """U Diag(values) U' with U the identity or Haar [d, d]."""
    if basis == "identity":
        return torch.diag(values)
    u = haar(len(values), seed)
    moment = (u * values) @ u.T
    return (moment + moment.T) / 2


def standardized(moment: Tensor) -> Tensor:
    """The same features scaled to unit second moment: H_ij / sqrt(H_ii H_jj)."""
    scale = moment.diagonal().rsqrt()
    scaled = moment * scale * scale.unsqueeze(1)
    return scaled - torch.diag(scaled.diagonal() - 1)


def central(moment: Tensor, sigma: float = 1.0, batch: int = 1, clients: int = 1) -> LeastSquares:
    """N clients that share H and w* = (1, .., 1)."""
    d = len(moment)
    ones = torch.ones(clients, d, dtype=torch.float64)
    return LeastSquares(moment.double().expand(clients, d, d), ones, sigma, batch)


def covariate_shift(
    d: int, clients: int, sigma: float = 1.0, batch: int = 1, powers: tuple[float, ...] = (3, 4, 5, 6), seed: int = 10
) -> LeastSquares:
    """Each client its own power of {3, 4, 5, 6} and its own Haar basis; one w* = (1, .., 1)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(powers), (clients,), generator=generator).tolist()
    moments = [rotated(spectrum(d, powers[k]), "haar", 1000 * seed + i) for i, k in enumerate(drawn)]
    return LeastSquares(torch.stack(moments), torch.ones(clients, d, dtype=torch.float64), sigma, batch)


def optimum_shift(
    moment: Tensor, clients: int, sigma: float = 1.0, batch: int = 1, scale: float = 10.0, seed: int = 10
) -> LeastSquares:
    """One H, and w*_i ~ N(0, scale^2 I) on client i."""
    d = len(moment)
    optima = scale * torch.randn(clients, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return LeastSquares(moment.double().expand(clients, d, d), optima, sigma, batch)
