"""A short run of the user's own method, and a sample of what its clients would send where it ends.

Symbols: N clients, M a round; d shared parameters; x [d] where the pilot ends; u_ir [d] message r of client i: the drift
after its local steps, from x, before any codec; m_i = mean_r u_ir; w_i weight of client i in the average.
The messages are drawn as the deployed method would make them: its batch size, its local steps, its solver. Each draw of
all sampled clients has a key of its own, so minibatches are independent between draws. Nothing is sent anywhere and no
client keeps anything of it; the cost is stated in `Pilot.cost`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from taciturn.advisor.curvature import Curvature
from taciturn.client import Work
from taciturn.codecs import identity
from taciturn.core import random
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import ConfigError, MethodError, RunError, require
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import OK, Block, Cast
from taciturn.core.vector import Vector
from taciturn.engines import build
from taciturn.engines.crew import Alone
from taciturn.engines.modes import trainer
from taciturn.experiment.experiment import Experiment
from taciturn.experiment.runner import prepare
from taciturn.experiment.simulated import Times
from taciturn.method import Method
from taciturn.round import ServerState, fed_round, plan_round, train
from taciturn.sync import every

CLIENTS = 40  # clients that are sampled at most
MESSAGES = 320  # messages in all
VALUES = 200_000_000  # floats of all messages (0.8 GB)
FEWEST = 24  # messages below which nothing is predicted
SAMPLES = 2048  # samples of the curvature


@dataclass(frozen=True)
class End:
    """Where the pilot ended, for the parts of a method. method: the user's; ids [S] of the sampled
    clients, own: what each keeps, rows [S, ..]; cohorts: ids of each pilot round; drift: (k, mean |u|^2 after k local
    steps, the same after 2 k), k half of a round's, minibatches alike.
    """

    method: Method
    server: ServerState
    times: Times
    ids: Tensor
    own: State
    cohorts: tuple[Tensor, ...]
    drift: tuple[int, float, float]


@dataclass(frozen=True)
class Pilot:
    """What the advisor knows of a task.

    messages [n, d]; client [n]: which of the S sampled clients sent each; weights [S], sum 1; curve [P + 1]: training loss
    after 0 .. P pilot rounds, on the samples of the curvature; steps: local steps of a
    round, mean; gamma: step size of a local step; cohort: messages averaged in a round, as an effective number; share:
    cohort over all clients; whole: all clients were sampled; bytes_down: of a client and round; overhead:
    bytes up beside the packed update (frame, statistics); cost: what the pilot took, as a record; end: what is left.
    """

    x: Vector
    messages: Tensor
    client: Tensor
    weights: Tensor
    curve: Tensor
    curvature: Curvature = field(repr=False)
    steps: float
    gamma: float
    gamma_note: str
    decay: float
    cohort: float
    share: float
    cohort_clients: int
    whole: bool
    bytes_down: float
    overhead: float
    seconds_round: float
    cost: dict[str, float]
    end: End = field(repr=False)

    @property
    def d(self) -> int:
        """Shared parameters."""
        return len(self.x)

    @property
    def loss(self) -> float:
        """Training loss where the pilot ended."""
        return float(self.curve[-1])


def run_pilot(experiment: Experiment, rounds: int | None = None, messages: int = MESSAGES) -> Pilot:
    """Train `rounds` rounds without compression (a quarter of the experiment's, 2 to 10, unless given), then sample.

    Errors: `ConfigError`, `DataError`, `ModelError` of the experiment; `ConfigError` for a model whose messages do not fit
    in memory; `RunError` if the pilot diverges.
    """
    rounds = max(2, min(10, experiment.rounds // 4)) if rounds is None else rounds
    require(rounds >= 1, f"--pilot: at least 1 round; got {rounds}")
    began = time.perf_counter()
    solver = experiment.method.solver
    if getattr(solver, "point", False) or hasattr(solver, "extend"):
        raise MethodError(
            f"advise: solver = {type(solver).__name__} sends more than the change of a model, which the theory behind the "
            "ranking does not know; advise the same task with solver = sgd, and difference(codec, alpha = 1, memory = "
            '"mean") of what it finds is what admm takes'
        )
    run = prepare(experiment.replace(method=experiment.method.encoded(identity()), evaluate_on="train"))
    work, sizes, method, key = run.work, run.task.train.sizes, run.method, run.key
    if work.split.kinds:
        raise MethodError(
            "advise: clients of this partition work on unlike parts of x, or on one that changes by rounds, "
            'so their messages are not alike; advise lora(share = "both") with one rank'
        )
    if work.split.base.names:
        raise MethodError(
            f"advise: {method.aggregator} merges into the frozen base, which moves under the pilot's messages; advise "
            'the same method with operator = "factor_mean", whose uploads are alike'
        )
    ids = _sampled(len(sizes), random.fold(key, "pilot"))
    draws = _draws(work.split.layout.d, len(ids), messages)
    with closing(run.engine.crew):
        path, server, seconds, (up, down), cohorts = _train(run, rounds)
        cohort = len(cohorts[-1])
        keys = [random.fold(key, "pilot", r) for r in range(draws)]
        sent, client, did = _draw(_blocks(run, server, method.sync, ids, keys), ids, draws)
        share = (weights := method.aggregator.weigh(sizes))[ids].to(torch.float64)
        share = share / share.sum()
        drift = _drift(run, server, ids, share, float((did * share).sum()), random.fold(key, "drift"))
        end = End(experiment.method, server, run.times, ids, run.engine.store.read(ids), cohorts, drift)
    curvature = _curvature(work, server.x, ids, weights[ids], random.fold(key, "curvature"))
    curve = torch.tensor([replace(curvature, x=x).loss() for x in path], dtype=torch.float64)
    steps = float((did * share).sum())
    gamma, note = _step_size(method, method.solver.schedule(server.round), sent.mean(0), curvature, steps)
    effective = float(weights.sum() ** 2 / weights.square().sum()) * cohort / len(sizes)
    cost = {"rounds": float(rounds), "messages": float(len(sent)), "samples": float(len(curvature.weights))}
    cost |= {"seconds": time.perf_counter() - began}
    decay = float(getattr(method.solver, "weight_decay", 0.0))
    return Pilot(
        server.x, sent, client, share, curve, curvature, steps, gamma, note, decay, effective,
        cohort / len(sizes), cohort, len(ids) == len(sizes), down,
        up - work.split.x0.element_size() * work.split.layout.d, seconds, cost, end,
    )  # fmt: skip


def _draws(d: int, clients: int, messages: int) -> int:
    """Messages of each client. Errors: `ConfigError` with the remedy where too few fit in memory."""
    require(d > 0, "advise: the method shares no values (method.partition), so there is nothing to compress")
    most = VALUES // d
    if most < max(FEWEST, 2 * clients):
        raise ConfigError(
            f"advise: the model shares {d} values; a sample of {max(FEWEST, 2 * clients)} messages does not fit the memory "
            f"that the advisor allows itself (at most {VALUES // max(FEWEST, 2 * clients)} values). Share less "
            "(method.partition), or advise a smaller model of the same kind"
        )
    return max(2, math.ceil(FEWEST / clients), min(messages, most) // clients)


def _train(run: Any, rounds: int) -> tuple[list[Vector], ServerState, float, tuple[float, float], tuple[Tensor, ...]]:
    """-> models along the way, server, seconds of the fastest round, bytes of a client in the last (up, down), cohorts."""
    server, sizes, method = run.server, run.task.train.sizes, run.method
    path, seconds, cohorts, kinds = [server.x], [], [], {}
    for r in range(rounds):
        key = random.fold(run.key, "round", r)
        ids = method.participation.draw(r, key, torch.ones(len(sizes), dtype=torch.bool))
        start = time.perf_counter()
        server, _ = fed_round(server, ids, sizes[ids], method, run.engine, run.work.split, key)
        seconds.append(time.perf_counter() - start)
        path.append(server.x)
        cohorts.append(ids)
        kinds = run.engine.post.ledger.close_round()["by_kind"]
    if not torch.isfinite(server.x).all():
        raise RunError("advise: the pilot diverged without compression; lower method.solver.lr")
    sent = [
        sum(e["payload"] + e["frame"] for k, e in kinds.items() if k.startswith(way) and not k.endswith("/setup"))
        / len(cohorts[-1])
        for way in ("up/", "down/")
    ]
    return path, server, min(seconds), (sent[0], sent[1]), tuple(cohorts)


def _sampled(n: int, key: Key) -> Tensor:
    return torch.arange(n) if n <= CLIENTS else random.choice(key, n, CLIENTS).sort().values


def _blocks(run: Any, server: ServerState, rule: Any, ids: Tensor, keys: Sequence[Key]) -> Iterator[Block]:
    """Uploads of the sampled clients, trained from x as long as the sync rule says, once with each key; nothing is kept."""
    work, experiment = run.work, run.experiment
    single = run.method.replace(broadcast=Broadcast(identity()), sync=rule)
    cast = Cast(0, server.round, {"x": server.x}, ((0, {"values": server.x}),))
    plan, stride = plan_round(server, ids, work.task.train.sizes[ids], single, run.key)
    name = "stacked" if experiment.engine == "ray" else experiment.engine
    other, path = build(name, work, single, run.key, block=experiment.block, each=True)
    other.store.write(ids, run.engine.store.read(ids))
    for key in keys:
        other.crew = Alone(trainer(work, rule, single.batch_size, key, path))
        train(other, rule, server.sync, cast, plan, stride)
        yield from other.collect()


def _draw(blocks: Iterator[Block], ids: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> messages [n, d] float32, client [n], local steps of each client in the mean [m], of what is finite."""
    rows: list[Tensor] = []
    owners: list[Tensor] = []
    steps: list[Tensor] = []
    for block in blocks:
        good = block.status == OK
        rows.append(block.updates[good].to(torch.float32).cpu())
        owners.append(torch.searchsorted(ids, block.ids[good]))
        steps.append(block.stats["steps"][good].to(torch.float64))
    sent, client = torch.cat(rows), torch.cat(owners)
    counts = torch.bincount(client, minlength=len(ids))
    if len(sent) < FEWEST or int((counts == 0).sum()):
        raise RunError(
            f"advise: {len(sent)} of {draws * len(ids)} messages of the pilot are finite; lower method.solver.lr, or set "
            "its clip"
        )
    return sent, client, torch.bincount(client, torch.cat(steps), len(ids)) / counts


def _drift(run: Any, server: ServerState, ids: Tensor, share: Tensor, steps: float, key: Key) -> tuple[int, float, float]:
    """(k, mean |u|^2 after k local steps, after 2 k) from x, k half of a round's: FEWEST drifts or one of each client."""
    k, draws = max(1, round(steps / 2)), math.ceil(FEWEST / len(ids))
    found = []
    for n in (k, 2 * k):
        squares = torch.zeros(len(ids), dtype=torch.float64)
        for block in _blocks(run, server, every(steps=n), ids, [random.fold(key, r) for r in range(draws)]):
            squares[torch.searchsorted(ids, block.ids)] += block.updates.to(torch.float64).square().sum(1).cpu()
        found.append(float((share * squares).sum()) / draws)
    return k, found[0], found[1]


def _curvature(work: Work, x: Vector, ids: Tensor, weights: Tensor, key: Key) -> Curvature:
    """Up to SAMPLES training samples, as many of each client as its weight asks for."""
    sizes = work.task.train.sizes[ids]
    share = weights / weights.sum()
    counts = torch.minimum(sizes, (SAMPLES * share).ceil().to(torch.int64).clamp(min=1))
    parts, importance = [], []
    for place, (i, n, size) in enumerate(zip(ids.tolist(), counts.tolist(), sizes.tolist(), strict=True)):
        index = random.choice(random.fold(key, i), size, n).unsqueeze(0)
        step = random.fold(key, "fetch", torch.tensor([i]))
        parts.append({name: t[0] for name, t in work.task.train.fetch(torch.tensor([i]), index, step).items()})
        importance.append(torch.full((n,), float(share[place]) / n))
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Curvature(work, x, batch, torch.cat(importance))


def _step_size(method: Method, scale: float, mean: Vector, curvature: Curvature, steps: float) -> tuple[float, str]:
    """The gamma for which a local step moves like y - gamma g."""
    plain = method.solver.affine()
    if plain is not None and plain[1] == 0.0:
        return plain[0] * scale, "the solver's lr"
    gradient = curvature.gradient()
    fitted = -float(mean @ gradient) / (steps * float(gradient @ gradient))
    if fitted <= 0:
        raise MethodError(
            "advise: at the end of the pilot the clients' mean message does not point down the training loss; run more "
            "pilot rounds (--pilot), or lower method.solver.lr"
        )
    return fitted, "fitted to the messages (the solver is not plain SGD)"
