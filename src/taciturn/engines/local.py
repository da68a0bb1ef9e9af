"""One engine for all clients in this process; three ways to run it (modes.py) differ in two parts.

`lift` gives a client function its client axis [m]: by squeezing it away (m = 1) or by `torch.vmap`. The post's carrier
moves a payload as it is, with its bytes computed, or packed to bytes and unpacked again. Everything else is this text.

Symbols: M clients of the cohort in plan order; m clients of a block; own, local: the records of client.py, stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taciturn import client
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.random import Key
from taciturn.core.state import State, tree_map
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
    Record,
)
from taciturn.engines.fused import Fused
from taciturn.engines.post import Post
from taciturn.engines.store import ClientStore
from taciturn.method import Method

Lift = Callable[[Callable[..., Any]], Callable[..., Any]]
Lose = Callable[[int, int], bool]  # round, client -> its upload is lost
CHUNK = 256  # samples of a client that are evaluated at once


@dataclass
class _Group:
    """The clients of a block during a round. where: their places in the plan; live: still training."""

    where: Tensor
    ids: Tensor
    start: Tensor
    held: State
    live: Tensor
    local: State | None = None
    u: Tensor | None = None


class LocalEngine:
    """Runs cohorts block after block, and keeps what clients own between rounds."""

    def __init__(
        self,
        work: Work,
        method: Method,
        key: Key,
        post: Post,
        clients: ClientStore,
        *,
        lift: Lift,
        block: int,
        fused: Fused | None = None,
        lose: Lose | None = None,
    ) -> None:
        self.work, self.method, self.post, self.clients, self.block = work, method, post, clients, block
        self.store = clients.table("own", work.newcomer())
        self._receivers = clients.table("receiver", work.codec.init(work.split.layout)[1])
        self._key, self._lift, self._lose = random.fold(key, "client"), lift, lose
        self._batch = min(method.batch_size, int(work.task.train.sizes.max()))
        self._fused = fused if method.sync.silent else None  # a rule that watches needs step after step
        self._groups: list[_Group] = []
        self._pending: list[tuple[Tensor, State, State]] = []

    # ------------------------------------------------------------------------------------------------------ the round

    def begin(self, cast: Cast, plan: Plan, sync: State) -> None:
        """Send each client the frames it lacks; cut the cohort into blocks."""
        self._cast, self._plan, self._sync = cast, plan, sync
        self._owed = 0  # steps that a silent rule has asked for; they run when the block is collected
        self._groups, self._pending = [], []
        self.post.begin(plan.round)
        self.clients.touch(plan.ids)
        self.post.enrol(plan.ids, self.work.task.train.sizes[plan.ids])
        order = torch.argsort(plan.limit, descending=True, stable=True)  # blocks of equal length, the longest first
        for where in torch.split(order, self.block):
            ids = plan.ids[where]
            held = self.post.model("model", ids, cast)
            live = torch.ones(len(ids), dtype=torch.bool)
            self._groups.append(_Group(where, ids, self._start(held, len(ids)), held, live))
        if sync and not self.method.sync.silent:
            rows = {name: value.expand(len(plan.ids), *value.shape) for name, value in sync.items()}
            self.post.message("down", "monitor", plan.ids, rows)
        self.post.ledger.exchange()

    def _start(self, held: State, m: int) -> Tensor:
        """The model that m clients hold, in the precision they train in: [m, d], one memory."""
        x: Tensor = held["x"].to(self.work.split.x0.dtype)
        return x.expand(m, -1)

    def advance(self, steps: int) -> Observations:
        """Local steps; with a silent rule they are only noted, and run block by block in `collect`."""
        if self.method.sync.silent:
            self._owed += steps
            everyone = torch.ones(len(self._plan.ids), dtype=torch.bool)
            return Observations({}, everyone, everyone)
        heard = torch.cat([group.live for group in self._groups])
        seen = [self._observe(group, steps) for group in self._groups]
        self.post.ledger.exchange()
        live = torch.cat([group.live for group in self._groups])
        return Observations({name: torch.cat([payload[name] for payload in seen]) for name in seen[0]}, heard, live)

    def _observe(self, group: _Group, steps: int) -> Payload:
        """Train, then a few bytes from each client that was still training; rows of the others are not to be read."""
        local = self._train(group, steps)
        rule, work = self.method.sync, self.work
        payload: Payload
        payload, go = self._lift(lambda local: rule.observe(client.drift(work, local), self._sync))(local)
        rows = group.live.nonzero().squeeze(1)
        if len(rows):
            received = self.post.message("up", "monitor", group.ids[rows], _rows(payload, rows))
            payload = {name: value.index_copy(0, rows.to(value.device), received[name]) for name, value in payload.items()}
        group.live = group.live & go.cpu() & (local["done"].cpu() < self._plan.limit[group.where])
        return payload

    def collect(self) -> Iterator[Block]:
        """Upload, decode, check: one block after the other, so that a cohort need not fit in memory."""
        for group in self._groups:
            local = self._train(group, self._owed)
            own = self.store.read(group.ids)
            keys = random.fold(self._key, group.ids, "encode", self._plan.round).to(group.start.device)
            u = self._drift(local) if group.u is None else group.u
            payload, stats, kept = self._lift(lambda *a: client.collect(self.work, *a))(local, u, own, keys)
            group.local = group.u = None
            riders = {f"stats.{name}": value for name, value in stats.items()}
            received = self.post.message("up", "update", group.ids, payload, riders)
            stats = {name: received[f"stats.{name}"].cpu() for name in stats}
            yield self._receive(group, {name: received[name] for name in payload}, stats, kept)

    def _drift(self, local: State) -> Tensor:
        u: Tensor = self._lift(lambda local: client.drift(self.work, local))(local)
        return u

    def _receive(self, group: _Group, payload: Payload, stats: Record, kept: State) -> Block:
        """The server's half: decode, and set aside what is not finite (0 x NaN is NaN, so rows are zeroed)."""
        layout = self.work.split.layout
        rx = self._receivers.read(group.ids)
        updates, rx = self._lift(lambda p, r: self.work.codec.decode(p, r, layout=layout))(payload, rx)
        status = torch.full((len(group.ids),), OK)
        suspects = (~torch.isfinite(updates.sum(1))).nonzero().squeeze(1)  # a finite sum has finite terms; large ones may
        if len(suspects):  # still overflow, so that the suspects are looked at value by value
            status[suspects[~torch.isfinite(updates[suspects]).all(1)].cpu()] = BAD_UPDATE
        status[~torch.isfinite(stats["loss"])] = BAD_LOSS
        if self._lose is not None:
            status[torch.tensor([self._lose(self._plan.round, i) for i in group.ids.tolist()])] = LOST
        self.post.acknowledge(group.ids[status != LOST], self._cast)
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

    def _train(self, group: _Group, steps: int) -> State:
        """Up to `steps` local steps of every live client of the block; those that are done stay as they are."""
        work, data, device = self.work, self.work.task.train, group.start.device
        own = self.store.read(group.ids)
        local = group.local
        if local is None:
            local = self._lift(lambda x, o: client.begin(work, x, o))(group.start, own)
        done = local["done"].cpu()
        todo = torch.where(group.live, (self._plan.limit[group.where] - done).clamp(0, steps), 0)
        n = int(todo.max())
        if n:
            keys, sizes, first = random.fold(self._key, group.ids), data.sizes[group.ids], own["steps"].cpu() + done
            index, mask = client.batches(keys, sizes, first, n, self._batch, int(sizes.max()))

            def fetch(t: int, k: int) -> tuple[Payload, Tensor]:
                """Batches and keys of local step t of the first k clients."""
                step_keys = random.fold(keys[:k], first[:k] + t)
                batch = data.fetch(group.ids[:k], index[:k, t], step_keys)
                return batch | {"mask": mask[:k, t].to(device)}, step_keys.to(device)

            if self._fused is not None:
                group.local, group.u = self._fused.train(group.start, own, todo.tolist(), fetch, self._plan.lr_scale)
                return group.local
            lr_scale = torch.tensor(self._plan.lr_scale, dtype=group.start.dtype, device=device)
            step = self._lift(lambda r, s, k: client.step(work, group.held, r, s, k, lr_scale))
            step_if = self._lift(lambda a, r, s, k: client.step_if(a, work, group.held, r, s, k, lr_scale))
            for t in range(n):
                active = t < todo
                arguments = (local, *fetch(t, len(todo)))
                local = step(*arguments) if bool(active.all()) else step_if(active.to(device), *arguments)
        group.local = local
        return local

    # ------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self, ids: Tensor, cast: Cast, split: str) -> dict[str, Tensor]:
        """Sums [n] per client on its own data of a split, with the published model and the client's own parts.

        The model's way down and the sums' way up are counted as "evaluate"; the client does not keep this model, so an
        evaluation never saves a later round its bytes.
        """
        data = self.work.task.held_out(split)
        self.post.expect(ids)
        found = []
        for part in torch.split(ids, self.block):
            held = self.post.model("evaluate", part, cast)
            sums = self._measure(part, held, self.store.read(part), data)
            found.append(self.post.message("up", "evaluate", part, sums))
        self.post.ledger.exchange()
        return {name: torch.cat([sums[name] for sums in found]).cpu() for name in found[0]}

    def _measure(self, ids: Tensor, held: State, own: State, data: Clients) -> dict[str, Tensor]:
        split, task = self.work.split, self.work.task

        def measure(x: Tensor, v: Tensor, b: Tensor, batch: Payload) -> dict[str, Tensor]:
            views = split.layout.views(x), split.personal.views(v), split.buffers.views(b)
            return task.measure(self.work.params(held, *views), batch)

        sizes, longest = data.sizes[ids], int(data.sizes[ids].max())
        total: dict[str, Tensor] = {}
        x = self._start(held, len(ids))
        for place in torch.split(torch.arange(longest), CHUNK):
            index = torch.minimum(place.expand(len(ids), -1), sizes.unsqueeze(1) - 1)
            batch = data.fetch(ids, index) | {"mask": (place < sizes.unsqueeze(1)).to(x.device)}
            sums = self._lift(measure)(x, own["v"], own["b"], batch)
            total = {name: value.double() + total.get(name, 0.0) for name, value in sums.items()}
        return {name: value.float() for name, value in total.items()}

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def export(self) -> State:
        """What a checkpoint must hold: the state of the post. What is kept of each client is in `clients`."""
        return {"post": self.post.export()}

    def restore(self, state: State) -> None:
        """The inverse of `export`."""
        self.post.restore(state["post"])


def _rows(state: State, places: Tensor) -> State:
    """Some rows of a stacked record, as copies."""
    chosen: State = tree_map(lambda tensor: tensor[places.to(tensor.device)], state)
    return chosen
