"""One communication round of federated learning. Read this first.

Symbols: x [d] the server's model; M clients of the cohort; u_i [d] the update of client i; key [] of this round.
What a client does is in `client.py`; where it does it, in `engines/`; every part is a field of `Method`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from taciturn.core.errors import AllClientsFailed, require
from taciturn.core.random import Key, fold
from taciturn.core.state import State
from taciturn.core.types import LATE, LOST, OK, STATUS, Cast, Engine, Merges, Plan, Record, Split, SyncRule
from taciturn.core.vector import Layout, Vector
from taciturn.method import Method
from taciturn.precision import policies


@dataclass(frozen=True)
class ServerState:
    """All that the server carries from round to round: rounds done, model, and the state of its parts.

    merges: what the frozen base takes with the publication of this round's x; precision: what a policy has learned.
    """

    round: int
    x: Vector
    opt: State
    agg: State
    sync: State
    cast: Cast | None = None
    merges: Merges = field(default_factory=dict)
    precision: State = field(default_factory=dict)

    @property
    def model(self) -> Vector:
        """What is evaluated and kept [d]: x, or the average where the server optimizer keeps one."""
        average: Vector | None = self.opt.get("average")
        return self.x if average is None else average.to(self.x.dtype)


@dataclass(frozen=True)
class RoundStats:
    """What a round tells the record: per client [M]; what failed; what the parts saw; knobs told."""

    ids: Tensor
    loss: Tensor
    steps: Tensor
    status: Tensor
    exchanges: int
    left_out: dict[int, str] = field(default_factory=dict)
    sync: dict[str, Any] = field(default_factory=dict)
    aggregate: dict[str, Any] = field(default_factory=dict)
    knobs: dict[str, list[int]] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)


def start(x0: Vector, sizes: Tensor, method: Method, base: Layout = Layout((), ())) -> ServerState:
    """The server before the first round. sizes [N]: samples of every client; base: layers [m, n] that take products."""
    nothing = {
        layer: (x0.new_zeros(m, 0), x0.new_zeros(0, n)) for layer, (m, n) in zip(base.names, base.shapes, strict=True)
    }
    parts = method.server.init(x0), method.aggregator.init(x0, sizes), method.sync.init(x0)
    return ServerState(0, x0, *parts, merges=nothing, precision=policies.start(method.precision))


def plan_round(server: ServerState, ids: Tensor, sizes: Tensor, method: Method, key: Key) -> tuple[Plan, Tensor]:
    """Who does how much, in what precision, and counts how much: sizes [M] samples -> (plan, steps before a look [M])."""
    require(len(ids) > 0, "method.participation drew no client; at least one must take part")
    epoch_steps = (sizes + method.batch_size - 1) // method.batch_size
    limit, stride = method.sync.schedule(epoch_steps, server.sync)
    weights, knobs = method.aggregator.weigh(sizes), policies.knobs(method.precision, ids, key, server.precision)
    return Plan(server.round, ids, epoch_steps, limit, weights, method.solver.schedule(server.round), knobs), stride


def train(engine: Engine, rule: SyncRule, sync: State, cast: Cast, plan: Plan, stride: Tensor) -> State:
    """Local training until the sync rule ends it -> the rule's state."""
    engine.begin(cast, plan, rule.signal(sync))  # send each client what it lacks
    more: Tensor | None = stride
    while more is not None:
        seen = engine.advance(more)  # some local steps on every client; a few bytes come back
        more, sync = rule.watch(seen, plan, sync)  # until the rule says so ...
        more = more if seen.live.any() else None  # ... or all have halted by themselves
    return sync


def fed_round(
    server: ServerState, ids: Tensor, sizes: Tensor, method: Method, engine: Engine, split: Split, key: Key
) -> tuple[ServerState, RoundStats]:
    """Server state and a cohort -> the next server state. Errors: `AllClientsFailed`; the state is as before."""
    plan, stride = plan_round(server, ids, sizes, method, key)  # 1 work of each client
    down_key = fold(key, "broadcast")
    cast = method.broadcast.publish(  # 2 encode the model once for each kind, and what the base takes
        server.x, server.round, server.cast, split.layout, down_key, server.merges, split.kinds
    )
    sync = train(engine, method.sync, server.sync, cast, plan, stride)  # 3-5 send it; local training on every client
    total = method.aggregator.start(server.agg, server.x)
    blocks = []
    for block in engine.collect():  # 6 encoded updates arrive, are decoded, checked finite ...
        total = method.aggregator.add(total, block)  # 7 ... and aggregated
        blocks.append((block.ids, block.stats, block.status))
    found, spent = _gather(blocks, ids), engine.spent()
    stats = _told(ids, found, spent.exchanges)
    accepted = ids[found["status"] == OK]
    if not len(accepted):
        raise AllClientsFailed(_obituary(server.round, stats))
    change, agg = method.aggregator.finish(total)
    x, opt = method.server.step(server.x, change.update, server.opt)  # 8 server optimizer (FedOpt)
    sync = method.sync.update(sync, plan, found, spent, change)  # 9 the rule's next threshold
    bits = policies.learned(method.precision, server.precision, plan, found)  # ... and who trains in which precision
    engine.commit(accepted)  # 10 accepted clients keep their new state
    knobs = {name: told.tolist() for name, told in plan.knobs.items()}
    told = policies.tell(method.precision, bits)
    stats = replace(stats, sync=method.sync.tell(sync), aggregate=change.told, knobs=knobs, precision=told)
    return ServerState(server.round + 1, x, opt, agg, sync, cast, change.merges, bits), stats


def _gather(blocks: list[tuple[Tensor, Record, Tensor]], ids: Tensor) -> Record:
    """What rode on the uploads, and their status, in the order of the cohort: {name: [M]}."""
    arrived = torch.cat([ids for ids, _, _ in blocks])
    order = torch.argsort(arrived)[torch.argsort(torch.argsort(ids))]
    found = {name: torch.cat([stats[name] for _, stats, _ in blocks])[order] for name in blocks[0][1]}
    return found | {"status": torch.cat([status for _, _, status in blocks])[order]}


def _told(ids: Tensor, found: Record, exchanges: int) -> RoundStats:
    left_out = {int(i): STATUS[int(s)] for i, s in zip(ids, found["status"], strict=True) if s != OK}
    return RoundStats(ids, found["loss"], found["steps"], found["status"], exchanges, left_out)


def _obituary(round: int, stats: RoundStats) -> str:
    why = sorted(set(stats.left_out.values()))
    if why == [STATUS[LATE]]:
        said = "answered before the deadline"
        remedy = "Raise deadline, or send and compute less: a codec, fewer local steps, a smaller model"
    else:
        said = f"returned a finite update ({', '.join(why)})"
        remedy = "Most often the client learning rate is too high: lower method.solver.lr, or set its clip"
        if why == [STATUS[LOST]]:
            remedy = "Are the sites up, and is their deadline long enough? The run can be resumed when they are"
    return f"round {round + 1}: none of the {len(stats.ids)} clients {said}; the model is as before this round. {remedy}"
