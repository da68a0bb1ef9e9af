"""Local training of a block of clients, layer by layer: the fast path of the stacked engine.

The same mathematics as client.py: the weights of m clients lie side by side, layer by layer [m, *shape]; gradients are
applied (plain SGD and FedProx) or gathered (other solvers) inside the backward pass. Nothing is believed: `build`
compares two steps of two clients with client.py and refuses if they differ.

Symbols: x [d] the model all clients start from; k clients still training, the first k of the block
(blocks are sorted by length); lr, mu, of the affine step y <- y - lr (g + mu (y - x)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_kernel

from taciturn import client
from taciturn.client import Work
from taciturn.core.state import State, tree_map
from taciturn.core.types import Batch, Solver
from taciturn.core.vector import Layout
from taciturn.engines.graph import Refusal, rewrite
from taciturn.engines.layers import Step, Weights
from taciturn.solvers import adamw

Fetch = Callable[[int, int], tuple[Batch, Tensor]]  # step, k -> batches [k, b, ..] with mask, keys [k]


@dataclass
class _Apply:
    """Plain SGD, or with a pull towards x: each gradient is applied as it comes.

    own: weights [k, ..] to write; base: x by name, for the pull, and in the first step what own is made from.
    """

    own: Weights
    base: Weights
    lr: float
    mu: float
    first: bool

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """W <- (1 - lr mu) W + lr mu x - lr left @ right."""
        w = self.own[name]
        flat = w.flatten(2)
        if self.first:  # y = x: the pull is zero
            x = self.base[name].reshape(flat.shape[1:]).expand_as(flat)
            torch.baddbmm(x, left, right, alpha=-self.lr, out=flat)
        else:
            flat.baddbmm_(left, right, beta=self._shrink(name), alpha=-self.lr)
            self._pull(name, w)

    def add(self, name: str, gradient: Tensor) -> None:
        """W <- (1 - lr mu) W + lr mu x - lr gradient."""
        w = self.own[name]
        if self.first:
            torch.add(self.base[name], gradient.reshape(w.shape), alpha=-self.lr, out=w)
        else:
            if self._shrink(name) != 1.0:
                w.mul_(self._shrink(name))
            w.add_(gradient.reshape(w.shape), alpha=-self.lr)
            self._pull(name, w)

    def _shrink(self, name: str) -> float:
        return 1.0 - self.lr * self.mu if name in self.base else 1.0

    def _pull(self, name: str, w: Tensor) -> None:
        if self.mu and name in self.base:
            w.add_(self.base[name], alpha=self.lr * self.mu)


@dataclass
class _Gather:
    """Gradients by name, for solvers that need them whole."""

    found: Weights

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """gradient = left @ right."""
        self.found[name] = torch.bmm(left, right)

    def add(self, name: str, gradient: Tensor) -> None:
        """gradient = gradient."""
        self.found[name] = gradient


def _joined(weights: Weights, layout: Layout, like: Tensor, minus: Tensor | None = None) -> Tensor:
    """Named [k, ..] -> [k, d], less a vector [d]; `like` where the layout is empty."""
    if not layout.names:
        return like
    rows = [weights[name].reshape(len(like), -1) for name in layout.names]
    if minus is None:
        return torch.cat(rows, 1)
    joined = torch.empty_like(like, memory_format=torch.contiguous_format)
    for w, x, place in zip(
        rows, torch.split(minus, list(layout.sizes)), torch.split(joined, list(layout.sizes), 1), strict=True
    ):
        torch.sub(w, x, out=place)
    return joined


class Fused:
    """Trains blocks of clients. Errors: `Refusal` where the model cannot be run this way."""

    def __init__(self, work: Work) -> None:
        split, task = work.split, work.task
        if task.sequential_only or split.buffers.d:
            raise Refusal(task.sequential_only or "it keeps running statistics")
        if not task.plain:
            raise Refusal("it is called by a forward of your own")
        names = frozenset(split.layout.names + split.personal.names)
        self.work = work
        self._program = rewrite(task.model, names)
        if set(split.join({}, split.layout.views(split.x0), split.personal.views(split.v0))) != names:
            raise Refusal("its partition joins more than views of the vectors")

    def train(self, start: Tensor, own: State, todo: list[int], fetch: Fetch, lr_scale: float) -> tuple[State, Tensor]:
        """A whole round of local steps of one block -> its local record, as client.py would leave it, and u [m, d].

        start [m, d] (rows alike); todo: steps of each client, falling. Where the solver is affine the record has no y.
        """
        local: State = torch.vmap(lambda x, o: client.begin(self.work, x, o))(start, own)
        losses = start.new_zeros(len(todo))
        affine = self.work.solver.affine()
        if affine is None:
            local["solver"] = self._general(local["solver"], todo, fetch, lr_scale, losses)
            u = local["solver"]["y"] - start
        else:
            lr, mu = affine[0] * lr_scale, affine[1]
            u, local["solver"]["v"] = self._affine(local["solver"]["v"], start, todo, fetch, lr, mu, losses)
            del local["solver"]["y"]
        done = torch.tensor(todo, dtype=torch.int64, device=start.device)
        return local | {"done": done, "loss": losses}, u

    def _affine(
        self, v: Tensor, start: Tensor, todo: list[int], fetch: Fetch, lr: float, mu: float, losses: Tensor
    ) -> tuple[Tensor, Tensor]:
        """y <- y - lr (g + mu (y - x)), inside the backward pass -> u = y - start [m, d], v [m, p].

        Where nothing is personal, the clients share the weights of the first step, and it writes y instead of changing it.
        """
        split, m = self.work.split, len(todo)
        base, alike = split.layout.views(start[0]), not split.personal.d
        own: Weights = {name: x.new_empty(m, *x.shape) for name, x in base.items()}  # a batch of products wants W dense
        own |= {name: w.clone(memory_format=torch.contiguous_format) for name, w in split.personal.views(v).items()}
        if not alike:
            for name, x in base.items():
                own[name].copy_(x)
        for t in range(todo[0]):
            k, first = sum(steps > t for steps in todo), alike and t == 0
            mine = {name: w[:k] for name, w in own.items()}
            step = Step(base if first else mine, _Apply(mine, base, lr, mu, first), k, first)
            losses[:k] += self._backward(step, *fetch(t, k))
        return _joined(own, split.layout, start, minus=start[0]), _joined(own, split.personal, v)

    def _general(self, record: State, todo: list[int], fetch: Fetch, lr_scale: float, losses: Tensor) -> State:
        """Any solver that asks for one gradient a step, at (y, v): the gradient is gathered, then the solver steps."""
        split, update = self.work.split, stepper(self.work.solver, losses.new_tensor(lr_scale))
        record = tree_map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format), record)
        for t in range(todo[0]):
            k = sum(steps > t for steps in todo)
            live: State = tree_map(lambda tensor, k=k: tensor[:k], record)
            weights, gradients = split.layout.views(live["y"]) | split.personal.views(live["v"]), _Gather({})
            loss = self._backward(Step(weights, gradients, k, False), *fetch(t, k))
            g_y = _joined(gradients.found, split.layout, live["y"])
            g_v = _joined(gradients.found, split.personal, live["v"])
            update(live, loss, g_y, g_v, t)
            losses[:k] += loss
        return record

    def _backward(self, step: Step, batch: Batch, keys: Tensor) -> Tensor:
        """Forward and backward of k clients; the weights' gradients go to the sink -> losses [k]."""
        task, mask = self.work.task, batch["mask"]
        batch = task.cast(batch)
        with torch.enable_grad(), task.randomness(keys):
            output = self._program(batch["input"].flatten(0, 1), step)
            values = task.values(output, batch["target"].flatten(0, 1)).view(step.m, -1)
            losses = torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)
            torch.autograd.backward(losses.sum())
        return losses.detach()


def stepper(solver: Solver, lr_scale: Tensor) -> Callable[[State, Tensor, Tensor, Tensor, int], None]:
    """(record [k, ..], losses [k], g_y [k, d], g_v [k, p], t) -> nothing: one step of the solver, in place.

    AdamW is one pass of torch's fused kernel; every other solver is its own text under `torch.vmap`.
    """

    def advance(one: State, loss: Tensor, g_y: Tensor, g_v: Tensor) -> State:
        return solver.step(one, {}, lambda y, v, batch: (loss, g_y, g_v), lr_scale)[0]

    def general(live: State, losses: Tensor, g_y: Tensor, g_v: Tensor, t: int) -> None:
        moved = torch.vmap(advance)(live, losses, g_y, g_v)
        tree_map(lambda old, new: old.copy_(new), live, moved)

    def kernel(live: State, losses: Tensor, g_y: Tensor, g_v: Tensor, t: int) -> None:
        names = [name for name in "yv" if live[name].numel()]
        done = [losses.new_tensor(float(t), dtype=torch.float32) for _ in names]
        b1, b2 = solver.betas  # type: ignore[attr-defined]
        adamw_kernel(
            [live[name] for name in names], [{"y": g_y, "v": g_v}[name] for name in names],
            [live[f"m_{name}"] for name in names], [live[f"s_{name}"] for name in names], [],
            done, fused=True, amsgrad=False, beta1=b1, beta2=b2,
            lr=solver.lr * float(lr_scale), weight_decay=solver.weight_decay, eps=solver.eps, maximize=False,  # type: ignore[attr-defined]
        )  # fmt: skip
        live["t"].add_(1)

    return kernel if isinstance(solver, adamw) and solver.clip is None else general


def build(work: Work, tolerance: float = 1e-4) -> Fused | str:
    """The fast path for this work, or why it cannot be taken.

    Two steps of two copies of the largest client are compared with client.py: y, v and the losses must agree to
    `tolerance` (norm-relative), else the path is refused.
    """
    try:
        fused = Fused(work)
        largest = work.task.train.sizes.argmax().repeat(2)
        n = int(work.task.train.sizes.max())
        index = torch.arange(4).reshape(2, 2) % n
        keys = torch.arange(2, device=work.split.x0.device)

        def fetch(t: int, k: int) -> tuple[Batch, Tensor]:
            batch = work.task.train.fetch(largest[:k], (index + t)[:k] % n)
            mask = torch.tensor([[True, True], [True, t == 0]], device=keys.device)
            return batch | {"mask": mask[:k]}, keys[:k] + t

        own = tree_map(lambda t: t.expand(2, *t.shape), work.newcomer())
        start = work.split.x0.expand(2, -1)
        got, u = fused.train(start, own, [2, 2], fetch, 1.0)
        _compare(work, got, u, start, own, fetch, tolerance)
        return fused
    except Refusal as refusal:
        return str(refusal)
    except Exception as error:  # whatever a user's model raises on a flat batch: the plain path still works
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _compare(work: Work, got: State, u: Tensor, start: Tensor, own: State, fetch: Fetch, tolerance: float) -> None:
    scale = torch.ones((), dtype=start.dtype, device=start.device)
    held: Any = {"x": start[0]}
    for j in range(2):
        local = client.begin(work, start[j], tree_map(lambda t, j=j: t[j], own))
        for t in range(2):
            batch, keys = fetch(t, 2)
            local = client.step(work, held, local, {n: b[j] for n, b in batch.items()}, keys[j], scale)
        before = own["v"][j]
        moves = (client.drift(work, local), u[j]), (local["solver"]["v"] - before, got["solver"]["v"][j] - before)
        for want, have in moves:
            if want.numel() and float((want - have).norm()) > tolerance * max(float(want.norm()), 1e-12):
                raise Refusal("its samples are not independent of each other, or of the size of the batch")
        if abs(float(local["loss"] - got["loss"][j])) > tolerance * max(1.0, abs(float(local["loss"]))):
            raise Refusal("its losses differ on a flat batch")
