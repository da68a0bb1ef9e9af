"""What runs on a client: begin, step, collect. Pure functions without a client axis; the stacked engine adds it.

Symbols: x [d] the model the client holds; y [d], v [p], b [q] its local shared parameters, personal parameters and
tracked buffers; own = what it keeps between rounds {v, b, solver, tx, steps}, and the knobs that it is told in this one, if
any ([] each, precision/policies.py); local = what it keeps within a round {solver: {y, v, ..}, b, start [d], done [], loss
[], knobs}; key [] of this client; t [] its persistent step counter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from taciturn.codecs.memory import starts_apart
from taciturn.core.random import Key
from taciturn.core.state import State, where
from taciturn.core.types import Batch, Codec, Payload, Record, Solver, Split, Task
from taciturn.core.vector import Kind, Layout, Vector
from taciturn.precision import forward


@dataclass(frozen=True)
class Work:
    """The static part of a client's work: the same for all clients of a kind and all rounds of a run.

    number: of the kind in `split.kinds`. What a codec keeps is a record by kind where there are several.
    """

    task: Task
    split: Split
    solver: Solver
    codec: Codec
    number: int = 0

    @property
    def kind(self) -> Kind:
        """Which coordinates these clients train and hold."""
        return self.split.kinds[self.number] if self.split.kinds else Kind()

    @property
    def layout(self) -> Layout:
        """Of the vector that they send."""
        return self.split.layout if self.kind.trains is None else self.kind.trains.layout

    def each_kind(self) -> list[Work]:
        """The work of every kind."""
        return [replace(self, number=k) for k in range(len(self.split.kinds))] or [self]

    def memory(self) -> tuple[State, State]:
        """What the codec keeps at the sender and at the receiver, fresh, of all kinds."""
        found = [self.codec.init(work.layout) for work in self.each_kind()]
        tx, rx = ({str(k): one[side] for k, one in enumerate(found)} for side in (0, 1))
        return (tx, rx) if self.split.kinds else found[0]

    def mine(self, memory: State) -> State:
        """This kind's part of a memory."""
        return memory[str(self.number)] if self.split.kinds else memory

    def kept(self, memory: State, mine: State) -> State:
        """The memory with a new part of this kind."""
        return memory | {str(self.number): mine} if self.split.kinds else mine

    def newcomer(self) -> State:
        """What a client owns before its first round."""
        split, steps = self.split, torch.zeros((), dtype=torch.int64, device=self.split.x0.device)
        return {"v": split.v0, "b": split.b0, "solver": self.solver.init(split), "tx": self.memory()[0], "steps": steps}

    def params(self, held: State, y: Record, v: Record, b: Record) -> Record:
        """Named views -> everything `functional_call` needs; buffers are copies, for the model writes to them."""
        return self.split.join(held, y, v) | {name: buffer.clone() for name, buffer in b.items()}


def begin(work: Work, start: Vector, own: State) -> State:
    """Take up the model: start [d] is what the client holds, y = start unless solver or codec say otherwise."""
    part, first = work.kind.trains, start
    if starts_apart(work.codec):
        lost = work.mine(own["tx"])["error"].to(start.dtype)
        first = start + (lost if part is None else part.fill(lost))
    return {
        "solver": work.solver.begin(first, own["v"], own["solver"]),
        "b": own["b"],
        "start": start,
        "done": torch.zeros_like(own["steps"]),
        "loss": start.new_zeros(()),
        "knobs": own.get("knobs", {}),
    }


def step(work: Work, held: State, local: State, batch: Batch, key: Key, lr_scale: Tensor) -> State:
    """One local step: y, v, b and the sum of losses move on; the forward pass is that of the precision told."""
    split, knobs = work.split, local["knobs"]
    buffers: list[Tensor] = []

    def oracle(y: Vector, v: Vector, batch: Batch) -> tuple[Tensor, Vector, Vector]:
        def loss(y: Record, v: Record) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            params = work.params(held, y, v, split.buffers.views(local["b"]))
            with forward.layers(knobs):
                value = work.task.loss(params, batch, key)
            return value, (value.detach(), split.buffers.flatten(params, local["b"].dtype).detach())

        views = (forward.weights(part, knobs) for part in (split.layout.views(y), split.personal.views(v)))
        (g_y, g_v), (value, b) = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(*views)
        buffers.append(b)
        g = split.layout.flatten(g_y, y.dtype)
        g = g if work.kind.trains is None else torch.where(work.kind.trains.mask, g, 0.0)
        return value, g, split.personal.flatten(g_v, v.dtype)

    solver, loss = work.solver.step(local["solver"], batch, oracle, lr_scale)
    if work.kind.trains is not None:
        solver = solver | {"y": torch.where(work.kind.trains.mask, solver["y"], local["start"])}
    b = buffers[-1] if split.buffers.d else local["b"]
    return local | {"solver": solver, "b": b, "done": local["done"] + 1, "loss": local["loss"] + loss}


def step_if(active: Tensor, work: Work, held: State, local: State, batch: Batch, key: Key, lr_scale: Tensor) -> State:
    """`step` where active [] bool holds; else the WHOLE record stays as it is (momentum alone would move it)."""
    return where(active, step(work, held, local, batch, key, lr_scale), local)


def drift(work: Work, local: State) -> Vector:
    """u = y - start [d]: what a sync rule looks at, and what the update is made of."""
    return local["solver"]["y"] - local["start"]  # type: ignore[no-any-return]


def mean_loss(local: State) -> Tensor:
    """Mean [] over the steps of the round; NaN where v is no longer finite, which nobody else sees."""
    whole = torch.isfinite(local["solver"]["v"]).all()
    return torch.where(whole, local["loss"] / local["done"].clamp(min=1), torch.nan)


def collect(work: Work, local: State, u: Vector, own: State, key: Key) -> tuple[Payload, Record, State]:
    """(encoded update, stats that ride on it, what the client owns once the upload is accepted), given its drift u."""
    message, solver = work.solver.message(local["solver"], u)
    message = message if work.kind.trains is None else work.kind.trains.cut(message)
    origin = work.split.x0 if getattr(work.solver, "point", False) else None  # a point is sent as seen from x0
    message = message if origin is None else message - origin
    payload, tx = work.codec.encode(message, work.mine(own["tx"]), key, layout=work.layout, knobs=own.get("knobs", {}))
    loss = torch.zeros_like(local["loss"]) if getattr(work.codec, "silent", False) else mean_loss(local)
    stats = {"loss": loss, "steps": local["done"].to(torch.int32)}
    if origin is not None:
        stats |= work.solver.tell(local["solver"])  # type: ignore[attr-defined]
        solver = work.solver.settle(solver, origin + work.codec.known(tx))  # type: ignore[attr-defined]
    kept = {"v": local["solver"]["v"], "b": local["b"], "solver": solver, "steps": own["steps"] + local["done"]}
    return payload, stats, kept | {"tx": work.kept(own["tx"], tx)}
