"""Averaged compressed SGD on Gaussian least squares: many replicas and many cells at once, in the main memory.

    w <- w - gamma/N sum over i of [C(g_i - h_i) + h_i];   h_i <- h_i + alpha C(g_i - h_i)   (alpha = 0: h_i = 0, no memory)
    w^_K = (w_0 + .. + w_{K-1}) / K

Symbols: c cells (a problem and a step size each), r replicas, N clients, d features; w [c, r, d] and its sum float64,
gradients [c, r, N, d] float32. A gradient of b samples takes d + 2 b draws, not d b: with v = H^1/2 (w - w*_i), e = v/|v|,
z_j = H^-1/2 x_j = t_j e + (part beside e) and r_j = |v| t_j - sigma e_j,

    (1/b) sum x_j r_j = H^1/2 [e (1/b) sum t_j r_j + |r|/b (I - e e') z],   t, e [b] and z [d] standard normal

has exactly the law of the mini-batch gradient, because the parts beside e are independent of r.
Departure: randomness comes from torch's generator of the seed, not from keys: nothing here runs on a client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from taciturn.advisor.draws import Draw
from taciturn.advisor.problems import LeastSquares


@dataclass(frozen=True)
class Cell:
    """One problem at one step size, with (alpha > 0) or without memory. Cells that run together share N, d and b."""

    problem: LeastSquares
    gamma: float
    alpha: float = 0.0


@dataclass(frozen=True)
class Trajectories:
    """excess [cells, stops, r] of w^_K; last [cells, r, d] = w_K; memory [cells, r, N, d] = h_i, or None."""

    excess: Tensor
    last: Tensor
    memory: Tensor | None


def simulate(
    cells: Sequence[Cell],
    codec: Draw,
    stops: Sequence[int],
    replicas: int,
    seed: int = 0,
    w0: Tensor | None = None,
    noise: Tensor | None = None,
) -> Trajectories:
    """Run all cells from w_0 (default 0) with independent draws, and look at w^_K at every K of the ascending `stops`.

    noise: the standard normals of the gradients [steps, cells, r, N, d + 2 b], for tests (b = 1: [.., d + 1]).
    Errors: `ValueError` for cells that do not fit together.
    """
    if len({(c.problem.clients, c.problem.d, c.problem.batch, c.alpha > 0) for c in cells}) != 1:
        raise ValueError("simulate: cells run together if they agree in clients, features, batch and in having a memory")
    problem = cells[0].problem
    generator = torch.Generator().manual_seed(seed)
    field = _Field(cells)
    optimum = torch.stack([c.problem.optimum for c in cells]).unsqueeze(1)
    w = (torch.zeros(problem.d) if w0 is None else w0).double().expand(len(cells), replicas, problem.d)
    gamma = torch.tensor([c.gamma for c in cells], dtype=torch.float64)[:, None, None]
    alpha = torch.tensor([c.alpha for c in cells])[:, None, None, None]
    shape = (len(cells), replicas, problem.clients, problem.d)
    memory = torch.zeros(shape) if cells[0].alpha > 0 else None
    total, found, k = torch.zeros_like(w), [], 0
    gap = w - optimum
    draws = _normals((len(cells), replicas, problem.clients, field.width), generator, stops[-1] if noise is None else 0)
    for stop in stops:
        while k < stop:
            total += gap
            g = field.gradient(gap.float(), next(draws) if noise is None else noise[k])
            if memory is None:
                sent = codec.draw(g.view(-1, problem.d), generator).view(shape)
                step = sent
            else:
                sent = codec.draw((g - memory).view(-1, problem.d), generator).view(shape)
                step = sent + memory
                memory = memory + alpha * sent
            gap = gap - gamma * (step.mean(2) if problem.clients > 1 else step.squeeze(2))
            k += 1
        found.append(torch.stack([c.problem.excess(c.problem.optimum + m) for c, m in zip(cells, total / k, strict=True)]))
    return Trajectories(torch.stack(found, 1), optimum + gap, memory)


class _Field:
    """Mini-batch gradients of all cells and clients."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        problem = cells[0].problem
        self.batch, self.d = problem.batch, problem.d
        self.width = {0: 0, 1: self.d + 1}.get(self.batch, self.d + 2 * self.batch)
        self.sigma = torch.tensor([c.problem.sigma for c in cells])[:, None, None, None]
        self.offsets = torch.stack([c.problem.offsets for c in cells]).float().unsqueeze(1)  # [c, 1, N, d]
        self.near = not bool(self.offsets.any())
        moments = torch.stack([c.problem.moments for c in cells])
        diagonal = moments.diagonal(dim1=-2, dim2=-1)
        self.straight = bool((moments == torch.diag_embed(diagonal)).all())
        if self.straight:
            self.curvature, self.root = diagonal.float().unsqueeze(1), diagonal.sqrt().float().unsqueeze(1)  # [c, 1, N, d]
        else:
            values, vectors = torch.linalg.eigh(moments)
            self.curvature = moments.float()  # [c, N, d, d]
            self.root = ((vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT).float()

    def _times(self, matrix: Tensor, v: Tensor) -> Tensor:
        """Symmetric matrix of each client times v [c, r, N, d]."""
        if self.straight:
            return matrix * v
        if v.shape[2] == 1:
            return (v.squeeze(2) @ matrix[:, 0]).unsqueeze(2)
        return (v.transpose(1, 2) @ matrix).transpose(1, 2)

    def gradient(self, gap: Tensor, normals: Tensor) -> Tensor:
        """w - w* [c, r, d] and normals [c, r, N, width] -> g_i [c, r, N, d] float32."""
        away = gap.unsqueeze(2) if self.near else gap.unsqueeze(2) + self.offsets
        away = away.expand(*away.shape[:2], self.offsets.shape[2], self.d)
        if self.batch == 0:
            return self._times(self.curvature, away).contiguous()
        v, z = self._times(self.root, away), normals[..., : self.d]
        if self.batch == 1:
            residual = (v * z).sum(-1, keepdim=True) - self.sigma * normals[..., self.d :]
            return self._times(self.root, residual * z).contiguous()
        norm = v.norm(dim=-1, keepdim=True)
        unit = v / norm.clamp(min=1e-38)
        t, e = normals[..., self.d : self.d + self.batch], normals[..., self.d + self.batch :]
        residuals = norm * t - self.sigma * e
        along = (t * residuals).mean(-1, keepdim=True)
        across = residuals.norm(dim=-1, keepdim=True) / self.batch
        inner = across * z + (along - across * (unit * z).sum(-1, keepdim=True)) * unit
        return self._times(self.root, inner).contiguous()


def _normals(shape: tuple[int, ...], generator: Generator, steps: int) -> Iterator[Tensor]:
    """Standard normals of `shape`, `steps` times, drawn in chunks that fit the cache."""
    size = max(1, torch.Size(shape).numel())
    chunk = max(1, 2**16 // size)
    for first in range(0, steps, chunk):
        yield from torch.randn(min(chunk, steps - first), *shape, generator=generator)
