"""One engine for all clients in this process; three ways to run it (modes.py) differ in two functions.

`lift` gives a client function its client axis [m]: by squeezing it away (m = 1) or by `torch.vmap`. `carry` moves a
payload: as it is, with its bytes computed, or packed to bytes and unpacked again. Everything else is this text.

Symbols: M clients of the cohort in plan order; m clients of a block; own, local: the records of client.py, stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from taciturn import client
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.random import Key
from taciturn.core.state import State, row, tree_map
from taciturn.core.types import (
    BAD_LOSS,
    BAD_UPDATE,
    LOST,
    OK,
    Block,
    Cast,
    Clients,
    Observations,
    Payload,
    Plan,
    SyncRule,
)
from taciturn.engines.store import ClientStore
from taciturn.method import Method
from taciturn.wire.format import FRAME, Schema, nbytes
from taciturn.wire.ledger import Ledger

Lift = Callable[[Callable[..., Any]], Callable[..., Any]]
CHUNK = 256  # samples of a client that are evaluated at once


class Carrier(Protocol):
    """How messages cross the line between server and clients."""

    def introduce(self, schema: Schema) -> int:
        """Make a schema known to the receiver -> bytes of its text."""
        ...

    def move(self, kind: str, payload: Payload, round: int, ids: Tensor) -> tuple[Payload, Tensor]:
        """payload [m, ..] -> what arrives [m, ..], and the bytes of each packed payload [m]."""
        ...


@dataclass
class _Group:
    """The clients of a block during a round. `where`: their places in the plan."""

    where: Tensor
    ids: Tensor
    limit: Tensor
    start: Tensor
    held: State
    local: State | None = None
    live: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


class LocalEngine:
    """Runs cohorts block after block; keeps client state, acknowledged versions and the ledger."""

    def __init__(
        self,
        work: Work,
        method: Method,
        key: Key,
        *,
        lift: Lift,
        carry: Carrier,
        block: int,
        copies: bool,
        lose: Callable[[int, int], bool] | None = None,
    ) -> None:
        self.work, self.method, self.block = work, method, block
        self.ledger = Ledger()
        self.store = ClientStore(work.newcomer())
        self._receivers = ClientStore(work.codec.init(work.split.layout)[1])
        self._acks: dict[int, int] = {}
        self._key, self._lift, self._carry, self._lose = random.fold(key, "client"), lift, carry, lose
        self._widest = int(work.task.train.sizes.max())
        self._batch = min(method.batch_size, self._widest)
        self._known: dict[str, set[int]] = {}
        self._copies: dict[int, State] | None = {} if copies else None

    # ---------------------------------------------------------------------------------------------- the round

    def begin(self, cast: Cast, plan: Plan, sync: State) -> None:
        """Send each client the frames it lacks; cut the cohort into blocks."""
        self._cast, self._plan, self._sync = cast, plan, sync
        self._owed = 0  # steps that a silent rule has asked for and that run when the block is collected
        self._pending: list[tuple[Tensor, State, State]] = []
        self._groups = []
        self._plan_round, self._arrived = plan.round, {}
        self._enrol(plan.ids)
        for where in torch.arange(len(plan.ids)).split(self.block):
            ids = plan.ids[where]
            held = self._send_model("model", ids, cast)
            start = held["x"].expand(len(ids), -1)
            self._groups.append(
                _Group(where, ids, plan.limit[where], start, held, None, torch.ones(len(ids), dtype=torch.bool))
            )
        if not self.method.sync.silent and sync:
            self._message("down", "monitor", plan.ids, {n: t.expand(len(plan.ids), *t.shape) for n, t in sync.items()})
        self.ledger.exchange()

    def _enrol(self, ids: Tensor) -> None:
        """A client's first message tells how many samples it has."""
        fresh = ids[torch.tensor([i not in self._known.get("enrolled", ()) for i in ids.tolist()], dtype=torch.bool)]
        if len(fresh):
            self._message("up", "setup", fresh, {"samples": self.work.task.train.sizes[fresh]})
            self._known.setdefault("enrolled", set()).update(fresh.tolist())

    def advance(self, steps: int) -> Observations:
        """Local steps; with a silent rule they are only noted, and run block by block in `collect`."""
        rule: SyncRule = self.method.sync
        everyone = torch.ones(len(self._plan.ids), dtype=torch.bool)
        if rule.silent:
            self._owed += steps
            return Observations({}, everyone, everyone)
        seen, live = [], []
        for group in self._groups:
            self._train(group, steps)
            local = group.local
            payload, go = self._lift(lambda local: rule.observe(client.drift(self.work, local), self._sync))(local)
            seen.append(self._message("up", "monitor", group.ids, payload))
            group.live &= go.cpu() & (local["done"].cpu() < group.limit)  # type: ignore[index]
            live.append(group.live)
        self.ledger.exchange()
        names = seen[0].keys()
        return Observations({n: torch.cat([p[n] for p in seen]) for n in names}, everyone, torch.cat(live))

    def collect(self) -> Iterator[Block]:
        """Upload, decode, check: one block after the other, so that a cohort need not fit in memory."""
        for group in self._groups:
            if self._owed:
                self._train(group, self._owed)
            own = self.store.read(group.ids)
            keys = random.fold(self._key, group.ids.to(self._key.device), "encode", self._plan.round)
            payload, stats, kept = self._lift(lambda *a: client.collect(self.work, *a))(group.local, own, keys)
            group.local = None
            received = self._message(
                "up", "update", group.ids, payload, riders={f"stats.{n}": s for n, s in stats.items()}
            )
            yield self._receive(
                group, {n: received[n] for n in payload}, {n: received[f"stats.{n}"].cpu() for n in stats}, kept
            )

    def _receive(self, group: _Group, payload: Payload, stats: Payload, kept: State) -> Block:
        """The server's half: decode, and set aside what is not finite (0 x NaN is NaN, so rows are zeroed)."""
        rx = self._receivers.read(group.ids)
        layout = self.work.split.layout
        updates, rx = self._lift(lambda p, r: self.work.codec.decode(p, r, layout=layout))(payload, rx)
        status = torch.full((len(group.ids),), OK)
        status[~torch.isfinite(updates).all(1).cpu()] = BAD_UPDATE
        status[~torch.isfinite(stats["loss"]).cpu()] = BAD_LOSS
        for place, i in enumerate(group.ids.tolist()):
            if self._lose is not None and self._lose(self._plan.round, i):
                status[place] = LOST
            else:
                self._acks[i] = self._cast.version
                if i in self._arrived and self._copies is not None:
                    self._copies[i] = self._arrived[i]
        good = (status == OK).to(updates.device)
        if not good.all():
            updates = torch.where(good.unsqueeze(1), updates, 0.0)
        weights = torch.where(good, self._plan.weights[group.where].to(updates.device), 0.0)
        self._pending.append((group.ids, kept, rx))
        return Block(group.ids, group.start, updates, weights, layout, stats, status)

    def commit(self, accepted: Tensor) -> None:
        """Accepted clients own their new state; the others stay as if they had not been drawn."""
        for ids, kept, rx in self._pending:
            places = torch.isin(ids, accepted).nonzero().squeeze(1)
            if len(places):
                self.store.write(ids[places], _rows(kept, places))
                self._receivers.write(ids[places], _rows(rx, places))
        self._pending, self._groups = [], []

    def _train(self, group: _Group, steps: int) -> None:
        """Up to `steps` local steps of every live client of the block; those that are done stay as they are."""
        work, plan = self.work, self._plan
        own = self.store.read(group.ids)
        if group.local is None:
            group.local = self._lift(lambda x, o: client.begin(work, x, o))(group.start, own)
        done = group.local["done"].cpu()
        todo = torch.where(group.live, (group.limit - done).clamp(0, steps), 0)
        keys = random.fold(self._key, group.ids.to(self._key.device))
        sizes = work.task.train.sizes[group.ids]
        first = own["steps"].cpu() + done
        n = int(todo.max())
        index, mask = client.batches(keys.cpu(), sizes, first, n, self._batch, int(sizes.max()))
        lr_scale = torch.tensor(plan.lr_scale, dtype=group.start.dtype, device=group.start.device)
        step = self._lift(lambda *a: client.step(work, group.held, *a, lr_scale))
        step_if = self._lift(lambda a, *rest: client.step_if(a, work, group.held, *rest, lr_scale))
        for t in range(n):
            batch = work.task.train.fetch(group.ids, index[:, t])
            batch["mask"] = mask[:, t].to(self._key.device)
            arguments = (group.local, batch, random.fold(keys, (first + t).to(keys.device)))
            active = (t < todo).to(keys.device)
            group.local = step(*arguments) if bool(active.all()) else step_if(active, *arguments)

    # ---------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, ids: Tensor, cast: Cast, split: str) -> dict[str, Tensor]:
        """Sums [n] per client on its own data of a split, with the published model and the client's own parts.

        The model's way down and the sums' way up are counted as "evaluate"; the client does not keep this model, so an
        evaluation never saves a later round its bytes.
        """
        data = self.work.task.held_out(split)
        found = []
        for part in ids.split(self.block):
            held = self._send_model("evaluate", part, cast)
            sums = self._measure(part, held, self.store.read(part), data)
            found.append(self._message("up", "evaluate", part, sums))
        self.ledger.exchange()
        return {name: torch.cat([sums[name] for sums in found]).cpu() for name in found[0]}

    def _measure(self, ids: Tensor, held: State, own: State, data: Clients) -> dict[str, Tensor]:
        split, task = self.work.split, self.work.task

        def measure(x: Tensor, v: Tensor, b: Tensor, batch: Payload) -> dict[str, Tensor]:
            views = split.layout.views(x), split.personal.views(v), split.buffers.views(b)
            return task.measure(self.work.params(held, *views), batch)

        sizes, total = data.sizes[ids], {}
        width = min(CHUNK, int(sizes.max()))
        x = held["x"].expand(len(ids), -1)
        for first in range(0, int(sizes.max()), width):
            place = torch.arange(first, first + width).expand(len(ids), width)
            batch = data.fetch(ids, torch.minimum(place, sizes.unsqueeze(1) - 1))
            batch["mask"] = (place < sizes.unsqueeze(1)).to(x.device)
            for name, value in self._lift(measure)(x, own["v"], own["b"], batch).items():
                total[name] = total.get(name, 0.0) + value.to(torch.float64)
        return {name: value.to(torch.float32) for name, value in total.items()}

    # ------------------------------------------------------------------------------------------------ messages

    def _send_model(self, kind: str, ids: Tensor, cast: Cast) -> State:
        """Each client gets the frames it lacks; -> what a client of this block now holds."""
        broadcast, layout = self.method.broadcast, self.work.split.layout
        by_version: dict[int, list[int]] = {}
        for i in ids.tolist():
            by_version.setdefault(self._acks.get(i, -1), []).append(i)
        held = cast.held
        for since, clients in by_version.items():
            group = torch.tensor(clients)
            copy = self._copies.get(clients[0], {}) if self._copies is not None else {}
            for frame in broadcast.frames(cast, since) or [{}]:
                rows = {name: tensor.expand(len(group), *tensor.shape) for name, tensor in frame.items()}
                received = self._message("down", kind, group, rows)
                if self._copies is not None:
                    copy = broadcast.apply(copy, row(received, 0), layout) if frame else copy
            if self._copies is not None:
                held = copy
                if broadcast.of == "change" and kind == "model":
                    self._arrived[clients[0]] = copy
        return held

    def _message(
        self, direction: str, kind: str, ids: Tensor, payload: Payload, riders: Payload | None = None
    ) -> Payload:
        """One message of each client: carried, counted; a schema that a client has not seen goes first, as "setup"."""
        riders = riders or {}
        whole = payload | riders
        schema = Schema.of(row(whole, 0))
        seen = self._known.setdefault(f"{direction}-{schema.id}", set())
        fresh = [i for i in ids.tolist() if i not in seen]
        if fresh:
            seen.update(fresh)
            self.ledger.count(direction, "setup", torch.tensor(fresh), self._carry.introduce(schema), FRAME)
        received, sizes = self._carry.move(kind, whole, self._plan_round, ids)
        extra = int(nbytes(row(riders, 0)))
        self.ledger.count(direction, kind, ids, sizes - extra, FRAME)
        if riders:
            self.ledger.count(direction, "stats", ids, extra, 0, messages=0)
        return received

    # ---------------------------------------------------------------------------------------------- checkpoint

    def export(self) -> State:
        """Client state, acknowledged versions, known schemas and (loopback) the copies clients hold."""
        acks = torch.tensor(sorted(self._acks.items()), dtype=torch.int64).reshape(-1, 2)
        state: State = {"clients": self.store.export(), "receivers": self._receivers.export(), "acks": acks}
        state["known"] = {name: torch.tensor(sorted(ids), dtype=torch.int64) for name, ids in self._known.items()}
        return state | {"copies": {str(i): held for i, held in (self._copies or {}).items()}}

    def restore(self, state: State) -> None:
        """The inverse of `export`."""
        self.store.restore(state.get("clients", {}))
        self._receivers.restore(state.get("receivers", {}))
        self._acks = {int(i): int(version) for i, version in state["acks"].tolist()}
        self._known = {name: set(ids.tolist()) for name, ids in state.get("known", {}).items()}
        if self._copies is not None:
            self._copies = {int(i): held for i, held in state.get("copies", {}).items()}


def _rows(state: State, places: Tensor) -> State:
    """Some rows of a stacked record, as copies."""
    chosen: State = tree_map(lambda tensor: tensor[places.to(tensor.device)], state)
    return chosen
