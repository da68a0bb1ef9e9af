"""Local training of a block of clients, layer by layer: the fast path of the stacked engine.

The same mathematics as client.py: the weights of m clients lie side by side, layer by layer [m, *shape]; gradients are
kept as factors (late.py), applied (plain SGD and FedProx) or gathered (other solvers) inside the backward pass. Nothing
is believed: `build` compares two steps of two clients with client.py and refuses if they differ.

Symbols: x [d] the model all clients start from; m clients of a part, the first k of them still training; lr, mu of the
affine step y <- y - lr (g + mu (y - x)).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_kernel

from taciturn import client
from taciturn.client import Work
from taciturn.codecs.memory import starts_apart
from taciturn.core import random
from taciturn.core.state import State, flatten, tree_map, unflatten
from taciturn.core.types import Batch
from taciturn.core.vector import Layout
from taciturn.engines.late import Late
from taciturn.engines.layers import Gather, Step, Weights
from taciturn.engines.prefix import Prefix, find, saved_bytes
from taciturn.engines.swap import Program, Refusal, in_model
from taciturn.engines.train import Fetch
from taciturn.solvers import adamw

PART_VALUES = 5_000_000  # floats of the weights that train at once: few for the cache, many for less Python a client
WIDE = 50  # clients that train at once where most weights are not formed
SAVED_BYTES = 1 << 28  # of what autograd keeps of a step


@dataclass
class _Apply:
    """Plain SGD, or with a pull towards x: each gradient is applied as it comes.

    own: weights [k, ..] to write; base: x by name, for the pull, and in a shared first step what own is made from.
    """

    own: Weights
    base: Weights
    lr: float
    mu: float
    first: bool

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """W <- (1 - lr mu) W + lr mu x - lr left @ right."""
        w = self.own[name]
        if self.first:
            torch.baddbmm(self.base[name].flatten(1).expand_as(w.flatten(2)), left, right, alpha=-self.lr, out=w.flatten(2))
            return
        w.flatten(2).baddbmm_(left, right, beta=self._shrink(name), alpha=-self.lr)
        self._pull(name, w)

    def add(self, name: str, gradient: Tensor) -> None:
        """W <- (1 - lr mu) W + lr mu x - lr gradient."""
        w = self.own[name]
        if self.first:  # y = x: the pull is zero
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


def _joined(weights: Weights, layout: Layout, like: Tensor) -> Tensor:
    """Named [k, ..] -> [k, d]; `like` where the layout is empty."""
    return torch.cat([weights[name].reshape(len(like), -1) for name in layout.names], 1) if layout.names else like


@dataclass
class _Part:
    """Clients in work. base: x by name; begun: their records; own: weights [m, *shape] - fresh: not written yet; late:
    those that nobody has formed (affine solvers); moments: of AdamW. Other solvers keep flat vectors in their records.
    """

    start: Tensor
    base: Weights
    begun: State
    lr_scale: float
    losses: Tensor
    done: Tensor
    own: Weights
    late: dict[str, Late]
    moments: dict[str, tuple[Tensor, Tensor]]
    fresh: bool = False


class Fused:
    """One way to train a part of a block (train.py). Errors: `Refusal` where the model cannot be run this way.

    rows: of each linear layer for one sample, saved: bytes that autograd keeps of one; where they are known from another
    `Fused` of the same work.
    """

    def __init__(self, work: Work, rows: dict[str, int] | None = None, saved: int = 0) -> None:
        split, task = work.split, work.task
        if task.sequential_only or split.buffers.d:
            raise Refusal(task.sequential_only or "it keeps running statistics")
        if not task.plain:
            raise Refusal("it is called by a forward of your own")
        if split.base.names or split.kinds:
            why = "its frozen base takes products in every round" if split.base.names else "its clients train unlike parts"
            raise Refusal(why)
        self.work = work
        self._shared, self._personal = in_model(split)
        names = frozenset(self._shared.names + self._personal.names)
        apart = starts_apart(work.codec)
        self._affine = None if apart else work.solver.affine()
        self._adam = work.solver if isinstance(work.solver, adamw) and work.solver.clip is None and not apart else None
        self._flat = self._affine is None and self._adam is None
        self._beside = split.layout.d - self._shared.d  # values that the solver shares after the model's
        if self._beside and not self._flat:
            raise Refusal("its solver shares values beside the model")
        self.program = Program(task.model, names)
        self._base = self._shared.views(split.x0[: self._shared.d])
        known = self.program.linear & set(self._shared.names)
        self.rows = rows or dict.fromkeys(sorted(known), 1)  # of each linear layer, for a sample
        self.saved = saved
        self.prefix: Prefix | None = None

    def width(self, steps: int, batch: int) -> int:
        """As many clients as stay in cache; where most weights are never formed, as many as make the products large."""
        split = self.work.split
        d = split.layout.d + split.personal.d
        late = (w.numel() for name, w in self._base.items() if self._stays(name, steps * batch))
        wide = self._affine is not None and (steps == 1 or 2 * sum(late) > d)
        return max(1, min(WIDE if wide else PART_VALUES // d, SAVED_BYTES // max(1, self.saved * batch)))

    def _stays(self, name: str, samples: int) -> bool:
        if name not in self.rows:
            return False
        o, i = self._base[name].shape
        return samples * self.rows[name] * (o + i) <= o * i

    def begin(self, held: State, start: Tensor, own: State, lr_scale: float, steps: int) -> _Part:
        """Weights by layer, each dense, as a batch of products wants them; for other solvers flat records."""
        m, split = len(start), self.work.split
        base = self._shared.views(start[0, : self._shared.d])
        if self._adam is not None:
            begun: State = {"solver": {"v": own["v"]}, "b": own["b"], "start": start}
        else:
            begun = torch.vmap(lambda x, o: client.begin(self.work, x, o))(start, own)
        part = _Part(start, base, begun, lr_scale, start.new_zeros(m), torch.zeros(m, dtype=torch.int64), {}, {}, {})
        if self._flat:
            dense = {name: t.clone(memory_format=torch.contiguous_format) for name, t in flatten(begun["solver"]).items()}
            begun["solver"] = unflatten(dense)
            return part
        if self._affine is not None:
            lr, mu = self._affine
            part.late = {name: Late(x, m, lr * lr_scale, mu, steps) for name, x in base.items() if name in self.rows}
        v = self._personal.views(begun["solver"]["v"])
        part.own = {name: x.new_empty(m, *x.shape) for name, x in base.items() if name not in part.late}
        part.fresh = not split.personal.d  # then the first step is shared, and writes the weights
        if not part.fresh:
            for name, w in part.own.items():
                w.copy_(base[name])
        part.own |= {name: w.clone(memory_format=torch.contiguous_format) for name, w in v.items()}
        if self._adam is not None:
            part.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in part.own.items()}
        return part

    def advance(self, part: _Part, todo: list[int], fetch: Fetch) -> _Part:
        """Local steps, each on the clients that still train."""
        one = self._general if self._flat else self._fold if self._affine is not None else self._moments
        k = len(todo)
        for t in range(todo[0]):
            while todo[k - 1] <= t:
                k -= 1
            part.losses[:k] += one(part, k, t, *fetch(t, k))
        part.done += torch.tensor(todo)
        return part

    def _fold(self, part: _Part, k: int, t: int, *seen: Any) -> Tensor:
        """y <- y - lr (g + mu (y - x)), inside the backward pass -> losses [k]."""
        assert self._affine is not None
        lr, mu = self._affine[0] * part.lr_scale, self._affine[1]
        for name in [name for name, late in part.late.items() if late.full]:
            part.own[name] = part.late.pop(name).weight()
        mine = part.own if k == len(part.losses) else {name: w[:k] for name, w in part.own.items()}
        sink = _Apply(mine, part.base, lr, mu, part.fresh)
        step = Step(part.base if part.fresh else mine, sink, k, part.fresh, part.late)
        losses = self._backward(step, *seen)
        part.fresh = False
        return losses

    def _moments(self, part: _Part, k: int, t: int, *seen: Any) -> Tensor:
        """AdamW: the gradients of all layers, then torch's fused kernel -> losses [k]."""
        found = Gather({})
        mine = part.own if k == len(part.losses) else {name: w[:k] for name, w in part.own.items()}
        losses = self._backward(Step(part.base if part.fresh else mine, found, k, part.fresh), *seen)
        if part.fresh:
            for name, w in mine.items():
                w.copy_(part.base[name])
            part.fresh = False
        steps = part.done[:k] + t
        for done in sorted(set(steps.tolist())):  # clients that rested in a stride have done fewer
            rows = slice(None) if int((steps == done).sum()) == k else (steps == done).nonzero().squeeze(1)
            self._adamw(part, mine, found.found, k, rows, float(done))
        return losses

    def _adamw(self, part: _Part, mine: Weights, gradients: Weights, k: int, rows: Any, done: float) -> None:
        """Step done + 1 of some of the first k clients, in place."""
        solver = self._adam
        assert solver is not None
        moments = [(part.moments[name][0][:k], part.moments[name][1][:k]) for name in mine]
        whole = [*mine.values(), *(m for m, _ in moments), *(s for _, s in moments)]
        n, chosen = len(mine), [tensor[rows] for tensor in whole]
        found = [gradients[name].reshape(w.shape)[rows].contiguous() for name, w in mine.items()]
        count = whole[0].new_tensor(done, dtype=torch.float32)
        adamw_kernel(
            chosen[:n], found, chosen[n : 2 * n], chosen[2 * n :], [], [count.clone() for _ in mine], fused=True,
            amsgrad=False, beta1=solver.betas[0], beta2=solver.betas[1], lr=solver.lr * part.lr_scale,
            weight_decay=solver.weight_decay, eps=solver.eps, maximize=False,
        )  # fmt: skip
        if not isinstance(rows, slice):
            for tensor, part_of_it in zip(whole, chosen, strict=True):
                tensor[rows] = part_of_it

    def _general(self, part: _Part, k: int, t: int, *seen: Any) -> Tensor:
        """Any solver that asks for one gradient a step, at (y, v): the gradient is gathered, then the solver steps."""
        live: State = tree_map(lambda tensor: tensor[:k], part.begun["solver"])
        own, gradients = live["y"][:, : self._shared.d], Gather({})
        losses = self._backward(Step(self._shared.views(own) | self._personal.views(live["v"]), gradients, k, False), *seen)
        g_y = torch.nn.functional.pad(_joined(gradients.found, self._shared, own), (0, self._beside))
        g_v = _joined(gradients.found, self._personal, live["v"])
        solver, lr_scale = self.work.solver, losses.new_tensor(part.lr_scale)

        def advance(one: State, loss: Tensor, g_y: Tensor, g_v: Tensor) -> State:
            return solver.step(one, {}, lambda y, v, batch: (loss, g_y, g_v), lr_scale)[0]

        tree_map(lambda old, new: old.copy_(new), live, torch.vmap(advance)(live, losses, g_y, g_v))
        return losses

    def note_rows(self, part: _Part, samples: int) -> None:
        """Learn how many rows a sample has in each linear layer."""
        self.rows |= {name: late.rows // samples for name, late in part.late.items()}

    def reorder(self, part: _Part, order: Tensor) -> _Part:
        """Everything of the clients in another order."""
        at = order.to(part.start.device)
        for late in part.late.values():
            late.reorder(order)
        own, begun = ({name: w[at] for name, w in part.own.items()}, tree_map(lambda t: t[at], part.begun))
        moments = {name: (m[at], s[at]) for name, (m, s) in part.moments.items()}
        return replace(part, own=own, begun=begun, moments=moments, losses=part.losses[at], done=part.done[order])

    def drift(self, part: _Part, out: Tensor) -> None:
        """u = y - start: the weights joined, in one pass."""
        if self._flat:
            torch.sub(part.begun["solver"]["y"], part.start, out=out)
            return
        layout = self._shared
        places, sizes = torch.split(out, list(layout.sizes), 1), list(layout.sizes)
        for name, x, place in zip(layout.names, torch.split(part.start[0], sizes), places, strict=True):
            if name in part.late:
                part.late[name].drift(place)
            else:
                torch.sub(part.own[name].reshape(len(out), -1), x, out=place)

    def total(self, part: _Part, weights: Tensor) -> Tensor:
        """Sum of weights [m] times drift -> [d]; what nobody has formed is summed as factors."""
        if self._flat:
            drifts: Tensor = part.begun["solver"]["y"] - part.start
            return weights @ drifts
        sums = [weights.new_zeros(0)]  # nothing may be shared
        for name, x in part.base.items():
            late = part.late.get(name)
            sums.append(weights @ (part.own[name] - x).reshape(len(weights), -1) if late is None else late.total(weights))
        return torch.cat(sums)

    def record(self, part: _Part) -> State:
        """The local records; without y where weights are kept by layer, as `drift` has told it."""
        solver = part.begun["solver"]
        if not self._flat:
            solver = {name: t for name, t in solver.items() if name != "y"}
            solver["v"] = _joined(part.own, self._personal, solver["v"])
        return part.begun | {"solver": solver, "done": part.done.to(part.start.device), "loss": part.losses}

    def _backward(self, step: Step, batch: Batch, keys: Tensor, places: Tensor) -> Tensor:
        """Forward and backward of k clients; the weights' gradients go to the sink -> losses [k]."""
        task, mask = self.work.task, batch["mask"]
        batch = task.cast(batch)
        with torch.enable_grad(), self._kept(places), task.randomness(keys):
            output = self.program(batch["input"].flatten(0, 1), step)
            values = task.values(output, batch["target"].flatten(0, 1))
            share = mask.to(values.dtype)  # of each sample in its client's loss: none of padding
            share /= share.sum(1, keepdim=True).clamp_(min=1)
            torch.autograd.backward(values, share.flatten())
        return (values.detach().view_as(share) * share).sum(1)

    def _kept(self, places: Tensor) -> AbstractContextManager[None]:
        """What the pass of a batch runs under: the features of its samples, where there is a frozen prefix."""
        return nullcontext() if self.prefix is None else self.prefix.given(places[:, 0], places[:, 1:])

    def look(self, bytes: int) -> None:
        """Learn what autograd keeps of a sample, and keep what a frozen prefix makes of samples, in so many bytes."""
        task, x0 = self.work.task, self.work.split.x0
        n = min(2, int(task.train.sizes.max()))
        fetched = task.train.fetch(task.train.sizes.argmax().reshape(1), torch.arange(n).unsqueeze(0))

        def forward(batch: Batch, draw: int = 0) -> Any:
            with task.randomness(torch.full((1,), draw, device=x0.device)):
                return self.program(task.cast(batch)["input"], Step(weights, Gather({}), 1, True))

        weights = self._base | self._personal.views(self.work.split.v0)
        batch = {name: t[0] for name, t in fetched.items()}
        self.saved = saved_bytes(lambda: forward(batch), task.model) // n
        self.prefix = find(self.program, forward, batch, task.train, bytes)


def build(work: Work, bytes: int = 0, tolerance: float = 1e-4) -> Fused | str:
    """The fast path for this work, or why it cannot be taken. bytes: of memory for what a frozen prefix makes.

    Two steps of two copies of the largest client are compared with client.py: y, v and the losses must agree to
    `tolerance` (norm-relative), else the path is refused.
    """
    try:
        fused = Fused(work)
        _compare(work, fused, tolerance)
        fused.look(bytes)
        return fused
    except Refusal as refusal:
        return str(refusal)
    except Exception as error:  # whatever a user's model raises on a flat batch: the plain path still works
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _stirred(own: State) -> State:
    """A newcomer's record with a little noise on its values: who looks at another point than y must be seen to."""

    def noisy(t: Tensor) -> Tensor:
        noise = 0.01 * random.normal(random.key(0), t.numel()).to(t).reshape(t.shape)
        return t + noise if t.is_floating_point() else t

    stirred: State = tree_map(noisy, own)
    return stirred


def _compare(work: Work, fused: Fused, tolerance: float) -> None:
    largest = work.task.train.sizes.argmax().repeat(2)
    n = int(work.task.train.sizes.max())
    index, x0 = torch.arange(4).reshape(2, 2) % n, work.split.x0
    keys, scale = torch.arange(2, device=x0.device), torch.ones((), dtype=x0.dtype, device=x0.device)
    held: Any = {"x": x0}

    def fetch(t: int, k: int) -> tuple[Batch, Tensor, Tensor]:
        places = (index + t)[:k] % n
        batch = work.task.train.fetch(largest[:k], places)
        mask = torch.tensor([[True, True], [True, t == 0]], device=keys.device)
        return batch | {"mask": mask[:k]}, keys[:k] + t, torch.cat([largest[:k].unsqueeze(1), places], 1)

    one = _stirred(work.newcomer())
    part = fused.begin(held, x0.expand(2, -1), tree_map(lambda t: t.expand(2, *t.shape), one), 1.0, 2)
    part = fused.advance(part, [1, 1], fetch)
    fused.program.refuse_idle()
    fused.note_rows(part, 2)
    part = fused.advance(part, [1, 1], lambda t, k: fetch(t + 1, k))
    got, u = fused.record(part), x0.new_empty(2, len(x0))
    fused.drift(part, u)
    for j in range(2):
        local = client.begin(work, x0, one)
        for t in range(2):
            batch, step_keys, _ = fetch(t, 2)
            local = client.step(work, held, local, {name: b[j] for name, b in batch.items()}, step_keys[j], scale)
        moves = (client.drift(work, local), u[j]), (local["solver"]["v"] - one["v"], got["solver"]["v"][j] - one["v"])
        for want, have in moves:
            if want.numel() and not float((want - have).norm()) <= tolerance * max(float(want.norm()), 1e-12):
                raise Refusal("its samples are not independent of each other, or of the size of the batch")
        if abs(float(local["loss"] - got["loss"][j])) > tolerance * max(1.0, abs(float(local["loss"]))):
            raise Refusal("its losses differ on a flat batch")
