"""The clients' half of an engine: what happens where the data are, block by block, without a word on the wire.

A `Job` is a block of clients in a round. The trainer cuts it into parts that suit the processor's cache, trains each on a
`Way` (plain.py, fused.py), and encodes the block's updates. It keeps nothing between rounds, so it can live in another
process (crew.py): lost, it is started again and told the round once more.

Symbols: m clients of a block, k of them still training; d shared parameters; T local steps of a stride; b batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from taciturn import client
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.random import Key
from taciturn.core.state import State, tree_map
from taciturn.core.types import Batch, Clients, Payload, Record, SyncRule
from taciturn.sensitivity import sensitivity

Lift = Callable[[Callable[..., Any]], Callable[..., Any]]
Fetch = Callable[[int, int], tuple[Batch, Tensor, Tensor]]  # step, k -> batches [k, b, ..] with mask, keys [k], places
CHUNK = 256  # samples of a client that are evaluated at once


@dataclass(frozen=True)
class Job:
    """ids [m]; held: the model they hold; own: their records [m, ..] with the knobs of this round; limit [m] steps after
    which each halts, falling; kind: of client, the same for all.
    """

    ids: Tensor
    held: State
    own: State
    limit: Tensor
    kind: int = 0


@dataclass(frozen=True)
class Upload:
    """What a block sends, [m, ..] each: encoded update, stats, and what the client keeps once it is accepted.

    Where a sum is enough, the payload is one message [1, ..] that holds the weighted sum of the updates that are finite,
    and `finite` [m] says which are.
    """

    payload: Payload
    stats: Record
    kept: State
    finite: Tensor | None = None


class Way(Protocol):
    """How a part of a block is trained. A part is any value that the way understands."""

    def width(self, steps: int, batch: int) -> int:
        """How many clients train best at once, for so many steps in the round."""
        ...

    def begin(self, held: State, start: Tensor, own: State, lr_scale: float, steps: int) -> Any:
        """A part at the start of a round: start [m, d] (rows alike), own [m, ..]; steps: the most of a client."""
        ...

    def advance(self, part: Any, todo: list[int], fetch: Fetch) -> Any:
        """Local steps: todo[i] of client i, falling -> the part after them."""
        ...

    def reorder(self, part: Any, order: Tensor) -> Any:
        """The part with its clients in another order."""
        ...

    def drift(self, part: Any, out: Tensor) -> None:
        """Write u = y - start [m, d]."""
        ...

    def total(self, part: Any, weights: Tensor) -> Tensor:
        """Sum of weights [m] times drift -> [d], where that is cheaper than the drifts themselves."""
        ...

    def record(self, part: Any) -> State:
        """The clients' local records (client.py) [m, ..]; y may be missing where weights are kept by layer."""
        ...


@dataclass
class _Part:
    """rows: places in the block of its clients, as the way has them now; value: the way's."""

    rows: Tensor
    way: Way
    value: Any

    @property
    def place(self) -> slice:
        """Where its clients are in the block, once it is settled."""
        return slice(int(self.rows[0]), int(self.rows[-1]) + 1)


@dataclass
class _Open:
    """A job in work. live, done [m]: who still trains, and how many steps each has done."""

    job: Job
    start: Tensor
    live: Tensor
    done: Tensor
    parts: list[_Part] = field(default_factory=list)


class Trainer:
    """Trains and encodes the blocks of a round."""

    def __init__(self, work: Work, sync: SyncRule, batch_size: int, key: Key, way: Way, lift: Lift) -> None:
        self.work = work
        self._rule, self._batch = sync, min(batch_size, int(work.task.train.sizes.max()))
        self._key, self.way, self._lift = key, way, lift
        self._works = work.each_kind()
        self._ways = [way] if len(self._works) == 1 else [replace(way, work=one) for one in self._works]  # type: ignore[type-var]
        self._open: dict[int, _Open] = {}

    def begin(self, held: State, round: int, lr_scale: float, signal: Payload) -> None:
        """A new round; jobs of the last one are forgotten. held: for jobs that do not say what their clients hold."""
        self._held, self._round, self._lr_scale, self._signal, self._open = held, round, lr_scale, signal, {}

    def observe(self, number: int, job: Job | None, steps: Tensor) -> tuple[Payload, Tensor]:
        """Up to `steps` [m] local steps of each live client of a job -> the rule's payload [m, ..], who goes on [m].

        job: where it is not open yet. Rows of clients that had halted before mean nothing.
        """
        opened = self._opened(number, job)
        opened.parts = opened.parts or list(self._parts(opened))
        found = []
        for part in opened.parts:
            self._advance(opened, part, steps)
            found.append(self._look(opened, part))
        payload = {name: torch.cat([one[name] for one in found]) for name in found[0]}
        return payload, opened.live.clone()

    def opened(self, number: int) -> tuple[Tensor, State]:
        """Of an open job of one part: the steps that were done [m], and the clients' local records [m, ..]."""
        (part,) = self._open[number].parts
        return self._open[number].done, part.way.record(part.value)

    def reopen(self, number: int, job: Job, live: Tensor, done: Tensor, restore: Callable[[Any, Any], Any]) -> None:
        """A job as it was in another trainer: who is live, what is done [m]; restore: (way, part that begins) -> part."""
        opened = self._opened(number, job)
        opened.parts, opened.live, opened.done = list(self._parts(opened)), live, done
        for part in opened.parts:
            part.value = restore(part.way, part.value)

    def _look(self, opened: _Open, part: _Part) -> Payload:
        """What the rule sees of a part's clients, once they are back in the order of the block; who is live is noted."""
        self._settle(part)
        u = opened.start.new_empty(len(part.rows), opened.start.shape[1])
        part.way.drift(part.value, u)
        local = part.way.record(part.value)
        told = {name: local[name] for name in ("done", "loss")}
        payload, go = self._lift(lambda u, told: self._rule.observe(u, told, self._signal))(u, told)
        opened.live[part.place] &= go.cpu() & (opened.done < opened.job.limit)[part.place]
        return payload  # type: ignore[no-any-return]

    def collect(self, number: int, job: Job | None, steps: Tensor | None, weights: Tensor | None) -> Upload:
        """Local steps that are owed, then the encoded updates; the job is closed. weights [m]: their sum is enough.

        steps [m]: of a stride; where the clients look at themselves, stride follows stride until all have halted.
        """
        opened = self._opened(number, job)
        del self._open[number]
        m, d = opened.start.shape
        u = opened.start.new_empty(d if weights is not None else (m, d)).expand(m, d)
        total, finite, records, riders = u.new_zeros(d), torch.ones(m, dtype=torch.bool), [], []
        for part in opened.parts or self._parts(opened):
            rode: Payload = {} if steps is None else self._run(opened, part, steps)
            self._settle(part)
            records.append(part.way.record(part.value))
            if weights is None:
                part.way.drift(part.value, u[part.place])
                rode |= self._measured(opened, part, records[-1], u[part.place])
            else:
                found, finite[part.place] = self._total(
                    part, self._lift(client.mean_loss)(records[-1]), weights[part.place], d
                )
                total += found
            riders.append(rode)
            part.value = None  # the next part takes its memory
        local: State = tree_map(lambda *t: torch.cat(t), *records) if len(records) > 1 else records[0]
        keys = random.fold(self._key, opened.job.ids, "encode", self._round).to(u.device)
        work = self._works[opened.job.kind]
        upload = Upload(*self._lift(lambda *a: client.collect(work, *a))(local, u, opened.job.own, keys))
        rode = {name: torch.cat([one[name] for one in riders]) for name in riders[0]}
        upload = replace(upload, stats=upload.stats | rode)
        if weights is None:
            return upload
        payload, _ = self.work.codec.encode(total, {}, keys[0], layout=self.work.split.layout, knobs={})
        return replace(upload, payload={name: t.unsqueeze(0) for name, t in payload.items()}, finite=finite)

    def _measured(self, opened: _Open, part: _Part, local: State, u: Tensor) -> Record:
        """What a policy that learns is told of a part's clients; {} where nobody asks."""
        knobs = opened.job.own.get("knobs", {})
        if "gap" not in knobs:
            return {}
        local = local | {"knobs": {name: told[part.place] for name, told in knobs.items()}}
        batch, keys, _ = self._fetch(opened, part, 1)(0, len(part.rows))
        held, work = opened.job.held, self._works[opened.job.kind]
        return self._lift(lambda *a: sensitivity(work, held, *a))(local, u, batch, keys)  # type: ignore[no-any-return]

    def _run(self, opened: _Open, part: _Part, steps: Tensor) -> Payload:
        """A round of a part in one exchange -> what the rule lets ride on the upload."""
        self._advance(opened, part, steps)
        if self._rule.observer != "client":
            return {}
        payload = self._look(opened, part)
        while opened.live[part.place].any():
            self._advance(opened, part, steps)
            payload = self._look(opened, part)  # a client that has halted stands still: it sees what it saw
        return payload

    def measure(self, number: int, job: Job, split: str) -> dict[str, Tensor]:
        """Sums [m] of the model that clients hold, with their own parts, on their own data of a split."""
        cut, task, own = self.work.split, self.work.task, job.own
        data: Clients = task.held_out(split)

        def measure(x: Tensor, v: Tensor, b: Tensor, batch: Payload) -> dict[str, Tensor]:
            views = cut.layout.views(x), cut.personal.views(v), cut.buffers.views(b)
            return task.measure(self.work.params(job.held, *views), batch)

        sizes = data.sizes[job.ids]
        total: dict[str, Tensor] = {}
        job = self._holding(job)
        x = self._start(job)
        for place in torch.split(torch.arange(int(sizes.max())), CHUNK):
            index = torch.minimum(place.expand(len(job.ids), -1), sizes.unsqueeze(1) - 1)
            batch = data.fetch(job.ids, index) | {"mask": (place < sizes.unsqueeze(1)).to(x.device)}
            sums = self._lift(measure)(x, own["v"], own["b"], batch)
            total = {name: value.double() + total.get(name, 0.0) for name, value in sums.items()}
        return {name: value.float() for name, value in total.items()}

    # ------------------------------------------------------------------------------------------------------ parts

    def _start(self, job: Job) -> Tensor:
        """The model that m clients hold, in the precision they train in: [m, d], one memory."""
        x: Tensor = job.held["x"].to(self.work.split.x0.dtype)
        return x.expand(len(job.ids), -1)

    def _holding(self, job: Job) -> Job:
        """The job with what its clients hold: as it says, or as all of their kind do."""
        return job if job.held else replace(job, held=self._held.get("kinds", {}).get(str(job.kind), self._held))

    def _opened(self, number: int, job: Job | None) -> _Open:
        if job is not None:
            job = self._holding(job)
            m = len(job.ids)
            live, done = torch.ones(m, dtype=torch.bool), torch.zeros(m, dtype=torch.int64)
            self._open[number] = _Open(job, self._start(job), live, done)
        return self._open[number]

    def _parts(self, opened: _Open) -> Iterator[_Part]:
        """The block cut into parts of clients that train alike, the most steps first; each begins when the last is done."""
        job, a, limits = opened.job, 0, opened.job.limit.tolist()
        way = self._ways[job.kind]
        widths = {steps: way.width(steps, self._batch) for steps in set(limits)}
        while a < len(limits):
            steps, width = limits[a], widths[limits[a]]
            b = next((i for i in range(a, len(limits)) if i - a == width or widths[limits[i]] != width), len(limits))
            own: State = tree_map(lambda t, a=a, b=b: t[a:b], job.own)
            yield _Part(torch.arange(a, b), way, way.begin(job.held, opened.start[a:b], own, self._lr_scale, steps))
            a = b

    def _advance(self, opened: _Open, part: _Part, steps: Tensor) -> None:
        """Up to `steps` [m] local steps of the live clients of a part."""
        job, done = opened.job, opened.done
        todo = torch.where(opened.live, torch.minimum(job.limit - done, steps).clamp(min=0), 0)[part.rows]
        n = int(todo.max())
        if not n:
            return
        if bool((todo.diff() > 0).any()):  # some in the middle have halted: those that train come first
            order = torch.argsort(todo, descending=True, stable=True)
            part.value, part.rows, todo = part.way.reorder(part.value, order), part.rows[order], todo[order]
        part.value = part.way.advance(part.value, todo.tolist(), self._fetch(opened, part, n))
        done[part.rows] += todo

    def _fetch(self, opened: _Open, part: _Part, n: int) -> Fetch:
        """The next n batches of a part's clients, each in its own order."""
        job, data, device = opened.job, self.work.task.train, opened.start.device
        ids, first = job.ids[part.rows], (job.own["steps"].cpu() + opened.done)[part.rows]
        keys, sizes = random.fold(self._key, ids), data.sizes[ids]
        index, mask = random.batches(keys, sizes, first, n, self._batch, int(sizes.max()))
        step_keys = random.fold(keys.unsqueeze(1), first.unsqueeze(1) + torch.arange(n))

        def fetch(t: int, k: int) -> tuple[Batch, Tensor, Tensor]:
            """Batches and keys of local step t of the first k clients; and ids before sample numbers [k, 1 + b]."""
            now = step_keys[:k, t]
            batch = data.fetch(ids[:k], index[:k, t], now)
            places = torch.cat([ids[:k].unsqueeze(1), index[:k, t]], 1)
            return batch | {"mask": mask[:k, t].to(device)}, now.to(device), places

        return fetch

    def _settle(self, part: _Part) -> None:
        """Put the part's clients back in the order of the block."""
        if bool((part.rows.diff() < 0).any()):
            order = torch.argsort(part.rows)
            part.value, part.rows = part.way.reorder(part.value, order), part.rows[order]

    def _total(self, part: _Part, loss: Tensor, weights: Tensor, d: int) -> tuple[Tensor, Tensor]:
        """Weighted sum [d] of a part's finite drifts, and which are: looked at one by one only if the sum is not."""
        weights = torch.where(torch.isfinite(loss), weights.to(loss), 0.0)
        total = part.way.total(part.value, weights)
        if bool(torch.isfinite(total).all()):
            return total, torch.ones(len(weights), dtype=torch.bool)
        u = total.new_empty(len(weights), d)
        part.way.drift(part.value, u)
        finite = torch.isfinite(u).all(1)
        return torch.where(finite, weights, 0.0) @ torch.where(finite.unsqueeze(1), u, 0.0), finite.cpu()
