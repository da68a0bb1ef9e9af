"""Local training of a block of clients, layer by layer: the fast path of the stacked engine.

The same mathematics as client.py, in place: the weights of m clients are the rows of one matrix Y [m, d + p], gradients
are applied (plain SGD and FedProx) or gathered (other solvers) inside the backward pass. Nothing is believed: `build`
compares two steps of two clients with client.py and refuses if they differ.

Symbols: Y [m, d]; V [m, p]; x [d] the model all clients start from; k clients still training, the first k of the block
(blocks are sorted by length); lr, mu, of the affine step y <- y - lr (g + mu (y - x)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taciturn import client
from taciturn.client import Work
from taciturn.core.state import State, tree_map
from taciturn.core.types import Batch
from taciturn.engines.graph import Graph, Refusal, trace
from taciturn.engines.layers import Step, Weights

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
        flat = w.flatten(2) if w.dim() > 2 else w.unsqueeze(-1)
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
    """Gradients side by side in one buffer, for solvers that need them whole."""

    into: Weights

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """gradient = left @ right."""
        g = self.into[name]
        torch.bmm(left, right, out=g.flatten(2) if g.dim() > 2 else g.unsqueeze(-1))

    def add(self, name: str, gradient: Tensor) -> None:
        """gradient = gradient."""
        self.into[name].copy_(gradient.reshape(self.into[name].shape))


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
        self.graph: Graph = trace(task.model, names)
        self._must_touch_all()
        if set(split.join({}, split.layout.views(split.x0), split.personal.views(split.v0))) != names:
            raise Refusal("its partition joins more than views of the vectors")

    def _must_touch_all(self) -> None:
        """Every layer must reach the output: the first step writes each weight in its backward pass."""
        reached, todo = set(), [node for node in self.graph.module.graph.nodes if node.op == "output"]
        while todo:
            for node in todo.pop().all_input_nodes:
                if node not in reached:
                    reached.add(node)
                    todo.append(node)
        idle = set(self.graph.layers) - {node.target for node in reached}
        if idle:
            raise Refusal(f"{min(idle)} does not reach the output")

    def train(self, start: Tensor, own: State, todo: list[int], fetch: Fetch, lr_scale: float) -> State:
        """A whole round of local steps of one block -> its local record, as client.py would leave it.

        start [m, d] (rows alike); todo: steps of each client, falling.
        """
        local: State = torch.vmap(lambda x, o: client.begin(self.work, x, o))(start, own)
        losses = start.new_zeros(len(todo))
        affine = self.work.solver.affine()
        if affine is None:
            local["solver"] = self._general(local["solver"], todo, fetch, lr_scale, losses)
        else:
            local["solver"] = self._affine(local["solver"], start, todo, fetch, affine[0] * lr_scale, affine[1], losses)
        done = torch.tensor(todo, dtype=torch.int64, device=start.device)
        return local | {"done": done, "loss": losses}

    def _affine(
        self, record: State, start: Tensor, todo: list[int], fetch: Fetch, lr: float, mu: float, losses: Tensor
    ) -> State:
        """y <- y - lr (g + mu (y - x)), inside the backward pass. Where nothing is personal, the clients share the
        weights of the first step, and it writes y instead of changing it.
        """
        base, alike = self.work.split.layout.views(start[0]), not self.work.split.personal.d
        y, v = (torch.empty(start.shape, dtype=start.dtype) if alike else start.clone()), record["v"].clone()
        for t in range(todo[0]):
            k, first = sum(steps > t for steps in todo), alike and t == 0
            mine = self._views(y[:k], v[:k])
            step = Step(base if first else mine, _Apply(mine, base, lr, mu, first), k, first)
            losses[:k] += self._backward(step, *fetch(t, k))
        return record | {"y": y, "v": v}

    def _general(self, record: State, todo: list[int], fetch: Fetch, lr_scale: float, losses: Tensor) -> State:
        """Any solver that asks for one gradient a step, at (y, v): the gradient is gathered, then the solver steps."""
        solver, scale = self.work.solver, losses.new_tensor(lr_scale)

        def advance(one: State, loss: Tensor, g_y: Tensor, g_v: Tensor) -> State:
            return solver.step(one, {}, lambda y, v, batch: (loss, g_y, g_v), scale)[0]

        record = tree_map(lambda tensor: tensor.contiguous(), record)
        g_y, g_v = torch.empty_like(record["y"]), torch.empty_like(record["v"])
        for t in range(todo[0]):
            k = sum(steps > t for steps in todo)
            live: State = tree_map(lambda tensor, k=k: tensor[:k], record)
            step = Step(self._views(live["y"], live["v"]), _Gather(self._views(g_y[:k], g_v[:k])), k, False)
            loss = self._backward(step, *fetch(t, k))
            moved = torch.vmap(advance)(live, loss, g_y[:k], g_v[:k])
            record = tree_map(lambda new, old, k=k: torch.cat([new, old[k:]]) if k < len(old) else new, moved, record)
            losses[:k] += loss
        return record

    def _backward(self, step: Step, batch: Batch, keys: Tensor) -> Tensor:
        """Forward and backward of k clients; the weights' gradients go to the sink -> losses [k]."""
        task, mask = self.work.task, batch["mask"]
        batch = task.cast(batch)
        with torch.enable_grad(), task.randomness(keys):
            output = self.graph.run(step, batch["input"].flatten(0, 1))
            values = task.values(output, batch["target"].flatten(0, 1)).view(step.m, -1)
            losses = torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)
            torch.autograd.backward(losses.sum())
        return losses.detach()

    def _views(self, y: Tensor, v: Tensor) -> Weights:
        return {**self.work.split.layout.views(y), **self.work.split.personal.views(v)}


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
        got = fused.train(start, own, [2, 2], fetch, 1.0)
        _compare(work, got, start, own, fetch, tolerance)
        return fused
    except Refusal as refusal:
        return str(refusal)
    except Exception as error:  # whatever a user's model raises on a flat batch: the plain path still works
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _compare(work: Work, got: State, start: Tensor, own: State, fetch: Fetch, tolerance: float) -> None:
    scale = torch.ones((), dtype=start.dtype, device=start.device)
    held: Any = {"x": start[0]}
    for j in range(2):
        local = client.begin(work, start[j], tree_map(lambda t, j=j: t[j], own))
        for t in range(2):
            batch, keys = fetch(t, 2)
            local = client.step(work, held, local, {n: b[j] for n, b in batch.items()}, keys[j], scale)
        for name in ("y", "v"):
            want, have = local["solver"][name], got["solver"][name][j]
            moved = float((want - (start[j] if name == "y" else own["v"][j])).norm())
            if want.numel() and float((want - have).norm()) > tolerance * max(moved, 1e-12):
                raise Refusal("its samples are not independent of each other, or of the size of the batch")
        if abs(float(local["loss"] - got["loss"][j])) > tolerance * max(1.0, abs(float(local["loss"]))):
            raise Refusal("its losses differ on a flat batch")
