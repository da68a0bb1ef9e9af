"""The server's half of an engine on this machine: who is sent what, what came back, and whose state is kept.

The clients' half (train.py) does the work, in this process or in others (crew.py). The ways to run it (modes.py) differ in
how a block is trained, and in the post's carrier, which moves a payload as it is, with its bytes computed, or packed
to bytes and unpacked again. Everything else is this text.

Symbols: M clients of the cohort in plan order; m clients of a block; own: the records of client.py, stacked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taciturn.client import Work
from taciturn.core.errors import AllClientsFailed
from taciturn.core.state import State, tree_map
from taciturn.core.types import (
    BAD_LOSS,
    BAD_UPDATE,
    LATE,
    LOST,
    OK,
    Block,
    Cast,
    Observations,
    Payload,
    Plan,
    Record,
    Spent,
)
from taciturn.engines.crew import Crew
from taciturn.engines.post import Post, widened
from taciturn.engines.store import ClientStore
from taciturn.engines.train import Job, Lift, Upload
from taciturn.method import Method

Lose = Callable[[int, int], bool]  # round, client -> its upload is lost
# ids [m], work [S, 3, m], knobs as told -> what each counts for its time [m], 0: too late; or that time [m] in seconds
Timed = Callable[[Tensor, Tensor, State], Tensor]


@dataclass
class _Group:
    """The clients of a block during a round. where: places in the plan; knobs: as told; live: still training; sent: to the
    crew.
    """

    where: Tensor
    ids: Tensor
    held: State
    knobs: State
    live: Tensor
    kind: int = 0
    sent: bool = False


class LocalEngine:
    """Runs cohorts block after block, and keeps what clients own between rounds; own: what it keeps of a newcomer instead,
    where clients keep their records themselves.
    """

    def __init__(
        self,
        work: Work,
        method: Method,
        post: Post,
        clients: ClientStore,
        crew: Crew,
        block: int,
        least: int,
        *,
        lift: Lift,
        summed: bool = False,
        lose: Lose | None = None,
        share: Timed | None = None,
        seconds: Timed | None = None,
        facts: Record | None = None,
        own: State | None = None,
    ) -> None:
        self.work, self.method, self.post, self.clients, self.crew = work, method, post, clients, crew
        self.block, self._least = block, least
        self.store = clients.table("own", work.newcomer() if own is None else own)
        self._receivers = clients.table("receiver", work.memory()[1])
        self._works = work.each_kind()
        self._lift, self._lose, self._share, self._summed = lift, lose, share, summed
        self._arrival = seconds
        self._facts = {"samples": work.task.train.sizes} | (facts or {})
        self._groups: list[_Group] = []
        self._pending: list[tuple[Tensor, State, State]] = []

    # ------------------------------------------------------------------------------------------------------ the round

    def begin(self, cast: Cast, plan: Plan, signal: Payload) -> None:
        """Send each client the frames it lacks and the rule's signal; cut the cohort into blocks."""
        self._cast, self._plan, self._signal = cast, plan, signal
        self._stride: Tensor | None = None
        self._groups, self._pending = [], []
        self._done, self._seconds = torch.zeros_like(plan.limit), 0.0
        self.post.begin(plan.round)
        self.clients.touch(plan.ids)
        self.post.enrol(plan.ids, _rows(self._facts, plan.ids))
        order = torch.argsort(plan.limit, descending=True, stable=True)  # blocks of equal length, the longest first
        for kind, where in self._blocks(self._kinds(plan.round, plan.ids), order):
            ids = plan.ids[where]
            held = self._send("model", ids, cast, kind)
            knobs = self._told(ids, _rows(plan.knobs, where))
            self._groups.append(_Group(where, ids, held, knobs, torch.ones(len(ids), dtype=torch.bool), kind))
        if signal and self.method.sync.observer != "server":  # else it goes with the first stride
            self._say(signal)
        self.crew.begin(self._held(cast), plan.round, plan.lr_scale, signal)
        self.post.ledger.exchange()

    def _say(self, told: Payload, steps: Tensor | None = None) -> None:
        """The rule's word to all that still train: a signal, and how many steps to do until the next look [M]."""
        live = self._live()
        if live.any():
            rows = {name: value.expand(int(live.sum()), *value.shape) for name, value in told.items()}
            rows |= {} if steps is None else {"steps": steps[live].to(torch.int32)}
            self.post.message("down", "monitor", self._plan.ids[live], rows)

    def _told(self, ids: Tensor, knobs: State) -> State:
        """Tell each client its numbers in the plan -> what a record of this round has beside its own."""
        device = self.work.split.x0.device
        told = self.post.message("down", "plan", ids, knobs) if knobs else {}
        return {"knobs": {name: value.to(device) for name, value in told.items()}} if told else {}

    def _kinds(self, round: int, ids: Tensor) -> Tensor:
        """The kind of each client in a round [m]."""
        kind_of = self.work.split.kind_of
        return torch.zeros_like(ids) if kind_of is None else kind_of(round, ids)

    def _blocks(self, kinds: Tensor, order: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Places in this order, cut into blocks of one kind of client each. kinds [m]: by place."""
        for kind in sorted(set(kinds.tolist())):
            for where in torch.split(order[kinds[order] == kind], self._size(len(order))):
                yield kind, where

    def _send(self, why: str, ids: Tensor, cast: Cast, kind: int) -> State:
        """The frames that clients of a kind lack -> what they hold."""
        return self.post.model(why, ids, cast_of(cast, kind), self._works[kind].kind.holds)

    def _held(self, cast: Cast) -> State:
        """What is held, for the crew: of all that hold x, and by kind of those that hold a part."""
        own = {str(k): widened(one.held, self._works[k].kind.holds) for k, one in enumerate(cast.kinds) if one is not None}
        return cast.held | ({"kinds": own} if own else {})

    def _size(self, m: int) -> int:
        """Clients of each block: few and equal blocks, of at most `block` clients, and at least as many as workers."""
        blocks = max(math.ceil(m / self.block), self._least)
        return math.ceil(m / blocks)

    def advance(self, steps: Tensor) -> Observations:
        """Local steps; where nobody looks from here they are only noted, and run block by block in `collect`."""
        first, self._stride = self._stride is None, steps
        if self.method.sync.observer != "server":
            everyone = torch.ones(len(self._plan.ids), dtype=torch.bool)
            return Observations({}, everyone, everyone, self._done, self.spent())
        self._say(self._signal if first else {}, steps)
        heard = self._live()
        calls = ((n, self._job(n), steps[group.where]) for n, group in enumerate(self._groups))
        answers = list(zip(self._groups, self._timed("observe", calls), strict=True))
        heard &= self._in_order([torch.full((len(group.ids),), answer is not None) for group, answer in answers])
        seen = self._whole([self._hear(group, answer) for group, answer in answers], "the looks")
        did = torch.where(heard, torch.minimum(self._plan.limit - self._done, steps), 0)
        self._done = self._done + did
        self.post.ledger.worked(self._plan.ids, did)
        self.post.ledger.exchange()
        payload = {name: self._in_order([payload[name] for payload in seen]) for name in seen[0]}
        return Observations(payload, heard, self._live(), self._done, self.spent())

    def _timed(self, command: str, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The crew's answers; the time that they took is counted."""
        began = time.perf_counter()
        for answer in self.crew.each(command, calls):
            self._seconds += time.perf_counter() - began
            yield answer
            began = time.perf_counter()

    def _live(self) -> Tensor:
        """Who still trains [M]."""
        return self._in_order([group.live for group in self._groups])

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """Rows of the blocks, in the order of the plan."""
        where = torch.cat([group.where for group in self._groups])
        return torch.cat(parts)[torch.argsort(where).to(parts[0].device)]

    def spent(self) -> Spent:
        """Bytes and round trips so far; seconds of a step of one client, by the clock, in one of the workers; where clients
        are elsewhere, of a step there and of a look.
        """
        up, down, exchanges = self.post.ledger.spent(len(self._plan.ids))
        elsewhere = getattr(self.crew, "observed", None)
        if elsewhere is not None and (seen := elsewhere())[0]:
            return Spent(up, down, exchanges, *seen)
        steps = int(self._done.sum())
        return Spent(up, down, exchanges, self.crew.count * self._seconds / steps if steps else 0.0)

    def _whole(self, rows: Sequence[Payload | None], of: str, sizes: Sequence[int] = ()) -> list[Payload]:
        """Rows of each block, with zeros for those that were not heard. Errors: `AllClientsFailed` if none was."""
        like = next((one for one in rows if one is not None), None)
        if like is None:
            raise AllClientsFailed(f"{of}: no client answered; are the sites up?")
        sizes = sizes or [len(group.ids) for group in self._groups]
        return [
            {name: t.new_zeros(m, *t.shape[1:]) for name, t in like.items()} if one is None else one
            for one, m in zip(rows, sizes, strict=True)
        ]

    def _hear(self, group: _Group, answer: tuple[Payload, Tensor] | None) -> Payload | None:
        """A few bytes from each client that was still training; rows of the others are not to be read."""
        if answer is None:
            group.live = torch.zeros_like(group.live)
            return None
        payload, live = answer
        rows = group.live.nonzero().squeeze(1)
        if len(rows):
            received = self.post.message("up", "monitor", group.ids[rows], _rows(payload, rows))
            payload = {name: value.index_copy(0, rows.to(value.device), received[name]) for name, value in payload.items()}
        group.live = live
        return payload

    def _job(self, number: int) -> Job | None:
        """A block's order, the first time it is asked for in a round."""
        group = self._groups[number]
        if group.sent:
            return None
        group.sent = True
        own = self.store.read(group.ids) | group.knobs
        return Job(group.ids, group.held, own, self._plan.limit[group.where], group.kind)

    def collect(self) -> Iterator[Block]:
        """Upload, decode, check: one block after the other, so that a cohort need not fit in memory."""

        def call(number: int) -> tuple[int, Job | None, Tensor | None, Tensor | None]:
            group = self._groups[number]
            weights = self._counted(group) if self._summed else None
            return number, self._job(number), owed if owed is None else owed[group.where], weights

        watched = self.method.sync.observer == "server"
        owed = None if watched else self._stride
        if watched:
            self._say({}, torch.zeros_like(self._plan.ids))  # stop
        found = self._timed("collect", (call(number) for number in range(len(self._groups))))
        silent: list[_Group] = []
        stats: Record = {"loss": torch.zeros(0), "steps": torch.zeros(0, dtype=torch.int32)}
        for group, upload in zip(self._groups, found, strict=True):
            if upload is None:
                silent.append(group)
                continue
            m = len(group.ids)
            payload = {name: t if len(t) == m else t.expand(m, *t.shape[1:]) for name, t in upload.payload.items()}
            riders = {f"stats.{name}": value for name, value in upload.stats.items()}
            received = self.post.message("up", "update", group.ids, payload, riders)
            stats = {name: received[f"stats.{name}"].cpu() for name in upload.stats}
            if not watched:
                self.post.ledger.worked(group.ids, stats["steps"])
            self._done[group.where] = stats["steps"].to(self._done)
            yield self._receive(group, {name: received[name] for name in upload.payload}, stats, upload)
        for group in silent:
            yield self._missing(group, stats)

    def _missing(self, group: _Group, like: Record) -> Block:
        """Of clients that were not heard: nothing, in the shapes of what the others told."""
        m, layout, x0 = len(group.ids), self.work.split.layout, self.work.split.x0
        self.post.forget(group.ids)
        stats = {name: t.new_zeros(m, *t.shape[1:]) for name, t in like.items()}
        start = group.held["x"].to(x0.dtype).expand(m, -1)
        nothing = x0.new_zeros(m)
        status, kind = torch.full((m,), LOST), self._works[group.kind].kind
        return Block(group.ids, start, x0.new_zeros(m, layout.d), nothing, layout, stats, status, None, kind)

    def _counted(self, group: _Group) -> Tensor:
        """Weights of a block's clients whose answer is not lost [m]."""
        return torch.where(self._lost(group), 0.0, self._plan.weights[group.where])

    def _lost(self, group: _Group) -> Tensor:
        """Whose answer is lost [m], by the injected fault."""
        if self._lose is None:
            return torch.zeros(len(group.ids), dtype=torch.bool)
        return torch.tensor([self._lose(self._plan.round, i) for i in group.ids.tolist()])

    def _timed_by(self, clock: Timed | None, group: _Group) -> Tensor:
        """What a clock says of each client of a block [m]; 1 without one."""
        if clock is None:
            return torch.ones(len(group.ids))
        return clock(group.ids, self.post.ledger.work(group.ids), group.knobs.get("knobs", {}))

    def _receive(self, group: _Group, payload: Payload, stats: Record, upload: Upload) -> Block:
        """The server's half: decode, and set aside what is not finite (0 x NaN is NaN, so rows are zeroed)."""
        work, total = self._works[group.kind], None
        layout, kind, memory = self.work.split.layout, work.kind, self._receivers.read(group.ids)
        rx = work.mine(memory)
        if upload.finite is None:
            updates, rx = self._lift(lambda p, r: self.work.codec.decode(p, r, layout=work.layout))(payload, rx)
            updates = updates if kind.trains is None else kind.trains.fill(updates)
            finite = _finite(updates)
        else:
            total, _ = self.work.codec.decode({name: t[0] for name, t in payload.items()}, {}, layout=layout)
            updates, finite = total.new_empty(0, layout.d), upload.finite
        status = torch.full((len(group.ids),), OK)
        status[~finite] = BAD_UPDATE
        status[~torch.isfinite(stats["loss"])] = BAD_LOSS
        share = self._timed_by(self._share, group)
        status[share == 0] = LATE
        if self._arrival is not None:
            stats["seconds"] = self._timed_by(self._arrival, group)
        status[self._lost(group)] = LOST
        self.post.acknowledge(group.ids[status < LOST], self._cast)
        good = (status == OK).to(updates.device)
        if total is None and not good.all():
            updates = torch.where(good.unsqueeze(1), updates, 0.0)
        counted = self._plan.weights[group.where]
        weights = torch.where(good, (counted * share.to(counted.dtype)).to(updates.device), 0.0)
        self._pending.append((group.ids, upload.kept, work.kept(memory, rx)))
        start = group.held["x"].to(updates.dtype).expand(len(group.ids), -1)
        return Block(group.ids, start, updates, weights, layout, stats, status, total, kind)

    def commit(self, accepted: Tensor) -> None:
        """Accepted clients own their new state; the others stay as if they had not been drawn."""
        for ids, kept, rx in self._pending:
            places = torch.isin(ids, accepted).nonzero().squeeze(1)
            if len(places):
                self.store.write(ids[places], _rows(kept, places))
                self._receivers.write(ids[places], _rows(rx, places))
        self._pending, self._groups = [], []

    def evaluate(self, ids: Tensor, cast: Cast, split: str) -> dict[str, Tensor]:
        """Sums [n] per client on its own data of a split, with the published model and the client's own parts.

        The model's way down and the sums' way up are counted as "evaluate"; the client does not keep this model, so an
        evaluation never saves a later round its bytes.
        """
        blocks = list(self._blocks(self._kinds(cast.source, ids), torch.arange(len(ids))))
        self.crew.begin(self._held(cast), cast.source, 1.0, {})
        self.post.expect(ids, cast.source)

        def job(number: int, kind: int, part: Tensor) -> tuple[int, Job, str]:
            held = self._send("evaluate", part, cast, kind)
            return number, Job(part, held, self.store.read(part), torch.zeros_like(part), kind), split

        measured = self.crew.each("measure", (job(n, kind, ids[where]) for n, (kind, where) in enumerate(blocks)))
        heard = [
            None if sums is None else self.post.message("up", "evaluate", ids[at], sums)
            for (_, at), sums in zip(blocks, measured, strict=True)
        ]
        for (_, at), sums in zip(blocks, heard, strict=True):
            if sums is None:
                self.post.forget(ids[at])
        told = self._whole(heard, "the evaluation", [len(at) for _, at in blocks])
        self.post.ledger.exchange()
        order = torch.argsort(torch.cat([where for _, where in blocks]))
        return {name: torch.cat([sums[name] for sums in told]).cpu()[order] for name in told[0]}

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def export(self) -> State:
        """What a checkpoint must hold: the state of the post. What is kept of each client is in `clients`."""
        return {"post": self.post.export()}

    def restore(self, state: State) -> None:
        """The inverse of `export`."""
        self.post.restore(state["post"])


def cast_of(cast: Cast, kind: int) -> Cast:
    """The cast of what clients of a kind hold."""
    own = cast.kinds[kind] if cast.kinds else None
    return cast if own is None else own


def _finite(updates: Tensor) -> Tensor:
    """Which rows [m] of [m, d] are finite. A finite sum has finite terms; one that is not is looked at value by value."""
    finite = torch.isfinite(updates.sum(1))
    suspects = (~finite).nonzero().squeeze(1)
    if len(suspects):  # large terms may overflow
        finite[suspects] = torch.isfinite(updates[suspects]).all(1)
    return finite.cpu()


def _rows(state: State, places: Tensor) -> State:
    """Some rows of a stacked record, as copies."""
    chosen: State = tree_map(lambda tensor: tensor[places.to(tensor.device)], state)
    return chosen
