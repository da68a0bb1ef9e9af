"""Who trains in which mode: times of the run's clock against penalties of the data.

    T_k(m) = bytes down / down + steps step(m) + bytes up(m) / up + latency        inf: no kernel for m on the device of k

with step(m) as counted in that mode, and the bytes of a round's messages, headers included, without what is sent once;
steps: those that the sync rule plans for the client, at most. It is a function of the experiment alone, so a resumed run
finds the same. After FedHQ (arXiv 2505.11982), its coarse stage: the idea; the formulas are ours.

Symbols: N clients; n_m modes; C classes; T [N, n_m] seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taciturn.client import Work
from taciturn.core import random
from taciturn.core.errors import ConfigError
from taciturn.core.payload import nbytes
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Payload, Record
from taciturn.experiment.simulated import Times
from taciturn.method import Method
from taciturn.precision import allocate, coarse, coarse_fine, fixed
from taciturn.precision.adjust import adjusted
from taciturn.precision.modes import runnable
from taciturn.precision.penalty import divergence, penalties
from taciturn.precision.policies import learns, told
from taciturn.tasks.built import BuiltTask
from taciturn.wire.format import FRAME

AT_ONCE = 1024  # samples whose labels are read


def allocated(method: Method, work: Work, task: BuiltTask, times: Times, key: Key) -> tuple[Method, Record]:
    """(the method with a policy that can be played; what clients tell for it once, {"labels": [N, C]} or {}).

    `coarse` becomes `fixed`, one mode a client, and `coarse_fine` becomes `adjusted`, which begins with them. key: of the
    run.
    """
    policy, sizes = method.precision, task.train.sizes
    if not isinstance(policy, coarse | coarse_fine):
        return method, {}
    modes = runnable(policy.modes, "precision.modes")
    table = told(policy)
    each = [{name: row[place] for name, row in table.items()} for place in range(len(modes))]
    plain = {name: torch.zeros_like(row[0]) for name, row in table.items()}
    *found, reference = (predicted(method, work, sizes, times, key, knobs) for knobs in (*each, plain))
    can = times.fleet.has_kernels([one.dtype for one in modes])[times.clock.device]
    seconds, weights = torch.where(can, torch.stack(found, 1), torch.inf), method.aggregator.weigh(sizes).double()
    once = facts_of(method, task)
    skew = divergence(once["labels"]) if once else torch.zeros(len(sizes), dtype=torch.float64)
    cost = penalties(weights, skew, modes, kappa=policy.kappa)
    chosen = allocate.coarse(seconds, cost, policy.lam, float(reference.max())).modes
    if isinstance(policy, coarse):
        given = tuple(policy.modes[i] for i in chosen.tolist())
        return method.replace(precision=fixed(given, policy.inputs)), once
    epoch = (sizes + method.batch_size - 1) // method.batch_size
    epochs = method.sync.schedule(epoch, method.sync.init(work.split.x0))[0] / epoch
    facts = {"weight": weights, "skew": skew, "log_samples": sizes.double().log(), "epochs": epochs.double()}
    return method.replace(precision=adjusted(policy, seconds, reference, facts, chosen)), once


def facts_of(method: Method, task: BuiltTask) -> Record:
    """What clients tell once of their data for the policy: {"labels": [N, C] int32}, or {} where it asks for nothing."""
    policy = method.precision
    if not isinstance(policy, coarse | coarse_fine) or not policy.kappa:
        return {}
    if task.data.homes:
        raise ConfigError(
            f"precision.{type(policy).__name__}: the server must know how many samples of each class clients have, which "
            "an outline does not say; kappa = 0.0 does without, or choose another policy"
        )
    counts = labels(task)
    return {"labels": counts.to(torch.int32)} if counts.any() else {}


def predicted(method: Method, work: Work, sizes: Tensor, times: Times, key: Key, knobs: State) -> Tensor:
    """T(m) [N] of every client, if all were told these knobs of a mode {name: []}."""
    split, ids = work.split, torch.arange(len(sizes))
    steps, _ = method.sync.schedule((sizes + method.batch_size - 1) // method.batch_size, method.sync.init(split.x0))
    cast = method.broadcast.publish(split.x0, 0, None, split.layout, key, kinds=split.kinds)
    down = sum(_size(message) for message in (*method.broadcast.frames(cast, -1), *([knobs] if knobs else [])))
    vector = random.normal(key, work.layout.d).to(split.x0)
    sent, _ = work.codec.encode(vector, work.mine(work.memory()[0]), key, layout=work.layout, knobs=knobs)
    stats = ["loss", "steps", *(["gap", "quantized", "moved"] if learns(method.precision) else [])]
    up = _size(sent) + 4 * len(stats)
    exchange = torch.stack([torch.full_like(steps, down), steps, torch.full_like(steps, up)])
    return times.clock.arrivals(times.clock.phases(ids, exchange.unsqueeze(0), times.way(knobs)))


def labels(task: BuiltTask) -> Tensor:
    """How many training samples of each class each client has [N, C]; zeros where a target is not one class."""
    train, classes = task.train, task.facts.wide
    counts = torch.zeros(len(train.sizes), classes, dtype=torch.int64)
    for i, size in enumerate(train.sizes.tolist()):
        for index in torch.split(torch.arange(size), AT_ONCE):
            target = train.fetch(torch.tensor([i]), index.unsqueeze(0), random.key(0).expand(1))["target"][0]
            if classes < 2 or target.is_floating_point() or target.dim() != 1:
                return counts
            counts[i] += torch.bincount(target.cpu(), minlength=classes)
    return counts


def _size(message: Payload) -> int:
    return int(nbytes(message)) + FRAME
