"""The curvature of the training loss at a point, and how vectors lie in its spectrum.

Symbols: x [d] the point; n samples with weights w [n] (they sum to 1); f(x) outputs [n, c]; J [n c, d] their Jacobian;
R [c, c] the Hessian of a sample's loss in its outputs; H = sum_s w_s J_s' R_s J_s the generalized Gauss-Newton matrix
(positive semi-definite; for cross-entropy it is the Fisher matrix under the model's own labels); (lambda_j, q_j) its
eigenpairs. The ENERGY of a vector u at lambda_j is (q_j' u)^2, and u' phi(H) u = sum_j phi(lambda_j) energy_j for every
function phi. All that the advisor asks of the curvature are such sums.

Two tools, the same questions: `Dense` (d <= DENSE) decomposes H, exactly; `Krylov` runs m Lanczos steps from each vector
(Gauss quadrature, Golub & Meurant 2010): what conjugate gradients would find for (H + lambda I)^-1, for every phi and
lambda at once. Matrices that are known by their diagonal v are probed by sqrt(v) z, z = +-1 (Hutchinson 1990).
A diagonal approximation of H is never used: it cannot tell sparsification, rand-k and partial participation apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from taciturn.client import Work
from taciturn.core import random
from taciturn.core.errors import ModelError
from taciturn.core.random import Key
from taciturn.core.types import Batch
from taciturn.core.vector import Vector
from taciturn.tasks.built import BuiltTask

DENSE = 2000  # values of the model up to which H is decomposed
CHUNK = 64  # samples whose Jacobian is formed at once
OUTPUTS = 64  # outputs of a sample up to which its Jacobian is formed
STEPS = 20  # Lanczos steps
THIN = 512  # samples that Lanczos sees
FLOOR = 1e-7  # eigenvalues below FLOOR times the largest count as that


@dataclass(frozen=True)
class Curvature:
    """H at x as products. batch: n samples without client axis; weights [n]; clients' personal parts are a newcomer's."""

    work: Work
    x: Vector
    batch: Batch
    weights: Tensor

    @property
    def _task(self) -> BuiltTask:
        task = self.work.task
        assert isinstance(task, BuiltTask)
        return task

    def _outputs(self, y: Vector, batch: Batch) -> Tensor:
        """[d] -> [n, c ..], in evaluation mode."""
        split, task = self.work.split, self._task
        views = split.layout.views(y), split.personal.views(split.v0), split.buffers.views(split.b0)
        output = task.program.output(task.evaluated, self.work.params({"x": self.x}, *views), batch)
        if not isinstance(output, Tensor):
            raise ModelError(f"advise: the curvature needs a model whose output is one tensor; got {type(output).__name__}")
        return output

    def _parts(self, size: int) -> list[tuple[Batch, Tensor]]:
        batch, n = self._task.program.cast(self.batch), len(self.weights)
        places = torch.split(torch.arange(n), size)
        return [({name: t[place] for name, t in batch.items()}, self.weights[place]) for place in places]

    def loss(self) -> float:
        """sum_s w_s loss_s at x."""
        total = 0.0
        with torch.no_grad():
            for batch, weights in self._parts(256):
                values = self._task.program.per_sample(self._outputs(self.x, batch), batch["target"])
                total += float((weights.to(values) * values).sum())
        return total

    def gradient(self) -> Vector:
        """Of `loss` at x: [d]."""
        total = torch.zeros_like(self.x)
        for batch, weights in self._parts(256):

            def value(y: Vector, batch: Batch = batch, weights: Tensor = weights) -> Tensor:
                values = self._task.program.per_sample(self._outputs(y, batch), batch["target"])
                return (weights.to(values) * values).sum()

            total += torch.func.grad(value)(self.x)
        return total

    def products(self, vectors: Tensor) -> Tensor:
        """[p, d] -> H times each [p, d]. Errors: `ModelError` where the model has no forward derivative."""
        total = torch.zeros_like(vectors)
        for batch, weights in self._parts(256):
            multiply = partial(self._product, batch, weights)
            total += _guarded(torch.func.vmap(multiply, chunk_size=20), vectors)
        return total.detach()

    def _product(self, batch: Batch, weights: Tensor, v: Vector) -> Vector:
        """H of one part of the samples, times v."""

        def outputs(y: Vector) -> Tensor:
            return self._outputs(y, batch)

        def value(out: Tensor) -> Tensor:
            return (weights.to(out) * self._task.program.per_sample(out, batch["target"])).sum()

        out, jv = torch.func.jvp(outputs, (self.x,), (v,))  # type: ignore[misc]
        _, pull = torch.func.vjp(outputs, self.x)  # type: ignore[misc]
        _, pushed = torch.func.jvp(torch.func.grad(value), (out,), (jv,))  # type: ignore[misc]
        found: Tensor = pull(pushed)[0]
        return found

    def thinned(self, most: int) -> Curvature:
        """The same of `most` samples, evenly taken, weighted anew."""
        n = len(self.weights)
        picked = torch.linspace(0, n - 1, min(n, most)).round().to(torch.int64)
        weights = self.weights[picked]
        batch = {name: t[picked.to(t.device)] for name, t in self.batch.items()}
        return Curvature(self.work, self.x, batch, weights / weights.sum())

    def matrix(self) -> Tensor:
        """H [d, d] float64: from the samples' Jacobians, or from products where a sample has many outputs."""
        d = len(self.x)
        sample = {name: t[:1] for name, t in self._task.program.cast(self.batch).items()}
        with torch.no_grad():
            outputs = self._outputs(self.x, sample).numel()
        if outputs > OUTPUTS:
            return self.products(torch.eye(d, dtype=self.x.dtype)).to(torch.float64)
        total = torch.zeros(d, d, dtype=torch.float64)
        for batch, weights in self._parts(CHUNK):
            j, r = _guarded(torch.func.vmap(self._sample), batch)
            weighted = (weights.to(j)[:, None, None] * r) @ j
            total += (j.flatten(0, 1).T @ weighted.flatten(0, 1)).to(torch.float64)
        return (total + total.T) / 2

    def _sample(self, sample: Batch) -> tuple[Tensor, Tensor]:
        """One sample -> its Jacobian [c, d] and the Hessian [c, c] of its loss in the outputs."""
        one = {name: t.unsqueeze(0) for name, t in sample.items()}
        shape: list[torch.Size] = []

        def outputs(y: Vector) -> tuple[Tensor, Tensor]:
            out = self._outputs(y, one)
            shape[:] = [out.shape]
            return out.reshape(-1), out.reshape(-1)

        def value(out: Tensor) -> Tensor:
            return self._task.program.per_sample(out.reshape(shape[0]), one["target"])[0]

        j, out = torch.func.jacrev(outputs, has_aux=True)(self.x)
        return j.detach(), torch.func.hessian(value)(out).detach()


def _guarded(fn: Callable[[Any], Any], argument: Any) -> Any:
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when forward derivatives are first used
            return fn(argument)
    except RuntimeError as error:
        raise ModelError(
            f"advise: torch.func cannot differentiate this model twice ({str(error).splitlines()[0]}); the advisor needs "
            "a model of operations that have forward derivatives and that torch.vmap can batch"
        ) from error


# ------------------------------------------------------------------------------------------------------- spectrum


class Basis(Protocol):
    """Where vectors lie in the spectrum of H. nodes [k] float64: the eigenvalues that energies are told at."""

    @property
    def nodes(self) -> Tensor: ...

    @property
    def most(self) -> int:
        """Vectors that are worth asking about at once."""
        ...

    @property
    def note(self) -> str:
        """How the spectrum was found, in words."""
        ...

    def energies(self, u: Tensor) -> Tensor:
        """[n, d] -> [n, k]: of each vector. Their sum is ||u||^2."""
        ...

    def diagonal(self, v: Tensor) -> Tensor:
        """[n, d], at least 0 -> [n, k]: q_j' Diag(v) q_j."""
        ...

    def flat(self) -> Tensor:
        """[k]: of the identity; the sum is d."""
        ...


@dataclass(frozen=True)
class Dense:
    """By eigendecomposition: exact, k = d. nodes [d] ascending; vectors [d, d], columns."""

    nodes: Tensor
    vectors: Tensor
    most: int = 1 << 30
    note: str = "generalized Gauss-Newton matrix, decomposed exactly"

    @classmethod
    def of(cls, matrix: Tensor) -> Dense:
        """Of a symmetric matrix [d, d]; what is negative by rounding counts as 0."""
        nodes, vectors = torch.linalg.eigh(matrix)
        return cls(nodes.clamp(min=0.0), vectors)

    def energies(self, u: Tensor) -> Tensor:
        """(u Q)^2."""
        return (u.to(torch.float64) @ self.vectors).square()

    def diagonal(self, v: Tensor) -> Tensor:
        """v Q^2."""
        return v.to(torch.float64) @ self.vectors.square()

    def flat(self) -> Tensor:
        """Ones."""
        return torch.ones_like(self.nodes)


@dataclass(frozen=True)
class Krylov:
    """By Lanczos quadrature, told at a fixed grid of nodes [k]; `products` gives H times vectors [p, d]."""

    products: Callable[[Tensor], Tensor]
    d: int
    nodes: Tensor
    key: Key
    dtype: torch.dtype = torch.float32
    steps: int = STEPS
    most: int = 20
    note: str = f"generalized Gauss-Newton products, {STEPS} Lanczos steps a vector"

    @classmethod
    def of(cls, products: Callable[[Tensor], Tensor], d: int, key: Key, dtype: torch.dtype, size: int = 96) -> Krylov:
        """The grid reaches from FLOOR times the largest eigenvalue, in equal factors."""
        start = random.normal(random.fold(key, "largest"), 1, d).to(dtype)
        theta, _ = lanczos(products, start, min(STEPS, d))
        top = max(1.05 * float(theta.max()), 1e-30)
        nodes = torch.logspace(math.log10(FLOOR * top), math.log10(top), size, dtype=torch.float64)
        return cls(products, d, nodes, key, dtype)

    def energies(self, u: Tensor) -> Tensor:
        """Quadrature weights, divided over the two nodes next to them."""
        part = max(1, (1 << 26) // (self.steps * self.d))
        found = [lanczos(self.products, piece, min(self.steps, self.d)) for piece in torch.split(u.to(self.dtype), part)]
        return torch.cat([on_grid(self.nodes, theta, weight) for theta, weight in found])

    def _signs(self, n: int) -> Tensor:
        return 1 - 2 * (random.uniform(random.fold(self.key, "signs", torch.arange(n)), self.d) < 0.5).to(self.dtype)

    def diagonal(self, v: Tensor) -> Tensor:
        """One probe sqrt(v) z a row; row i has the same signs z in every call, so that codecs are compared fairly."""
        return self.energies(v.clamp(min=0.0).sqrt() * self._signs(len(v)))

    def flat(self) -> Tensor:
        """The mean over probes z."""
        return self.energies(self._signs(self.most)).mean(0)


def lanczos(products: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gauss quadrature of u' phi(H) u for each row u of start [p, d] -> nodes [p, m], weights [p, m] (sum ||u||^2).

    Full reorthogonalization. Where the Krylov space ends early, the remaining nodes have weight 0.
    """
    p, d = start.shape
    norm = start.to(torch.float64).norm(dim=1)
    q = torch.zeros(p, steps, d, dtype=start.dtype)
    q[:, 0] = start / norm.clamp(min=1e-300).unsqueeze(1).to(start.dtype)
    t = torch.zeros(p, steps, steps, dtype=torch.float64)
    alive = norm > 0
    for k in range(steps):
        w = products(q[:, k])
        t[:, k, k] = (w.to(torch.float64) * q[:, k].to(torch.float64)).sum(1) * alive
        if k + 1 == steps:
            break
        for _ in range(2):
            w = w - torch.einsum("pk,pkd->pd", torch.einsum("pkd,pd->pk", q[:, : k + 1], w), q[:, : k + 1])
        beta = w.to(torch.float64).norm(dim=1)
        scale = t.diagonal(dim1=1, dim2=2).abs().amax(1)
        alive = alive & (beta > 1e-6 * scale)
        beta = torch.where(alive, beta, 0.0)
        t[:, k, k + 1] = t[:, k + 1, k] = beta
        q[:, k + 1] = torch.where(alive.unsqueeze(1), w / beta.clamp(min=1e-300).unsqueeze(1).to(w.dtype), 0.0)
    theta, vectors = torch.linalg.eigh(t)
    return theta.clamp(min=0.0), vectors[:, 0, :].square() * norm.square().unsqueeze(1)


def on_grid(nodes: Tensor, theta: Tensor, weight: Tensor) -> Tensor:
    """Weights [p, m] at theta [p, m] -> [p, k] at ascending nodes: each is divided between the two next to it."""
    theta = theta.to(torch.float64).clamp(float(nodes[0]), float(nodes[-1])).contiguous()
    right = torch.searchsorted(nodes, theta).clamp(1, len(nodes) - 1)
    low, high = nodes[right - 1], nodes[right]
    share = ((theta - low) / (high - low)).clamp(0.0, 1.0)
    grid = torch.zeros(len(theta), len(nodes), dtype=torch.float64)
    return grid.scatter_add_(1, right, share * weight).scatter_add_(1, right - 1, (1 - share) * weight)


def spectrum(curvature: Curvature, key: Key) -> Basis:
    """The tool that suits the size of the model."""
    d = len(curvature.x)
    if d <= DENSE:
        return Dense.of(curvature.matrix())
    return Krylov.of(curvature.thinned(THIN).products, d, key, curvature.x.dtype)
