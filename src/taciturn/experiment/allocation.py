"""Who trains in which mode, decided before the first round: times of the run's clock against penalties of the data.

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
from taciturn.core.payload import nbytes
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Payload
from taciturn.experiment.simulated import Times
from taciturn.method import Method
from taciturn.precision import allocate, coarse, fixed
from taciturn.precision.modes import runnable
from taciturn.precision.penalty import divergence, penalties
from taciturn.precision.policies import told
from taciturn.tasks.built import BuiltTask
from taciturn.wire.format import FRAME

AT_ONCE = 1024  # samples whose labels are read


def allocated(method: Method, work: Work, task: BuiltTask, times: Times, key: Key) -> Method:
    """The method with a policy that can be played: `coarse` becomes `fixed`, one mode a client. key: of the run."""
    policy, sizes = method.precision, task.train.sizes
    if not isinstance(policy, coarse):
        return method
    modes = runnable(policy.modes, "precision.modes")
    knobs = told(policy)
    each = [{name: row[place] for name, row in knobs.items()} for place in range(len(modes))]
    plain = {name: torch.zeros_like(row[0]) for name, row in knobs.items()}
    *seconds, reference = (predicted(method, work, sizes, times, key, one) for one in (*each, plain))
    cost = penalties(method.aggregator.weigh(sizes), divergence(labels(task)), modes, kappa=policy.kappa)
    can = times.fleet.has_kernels([one.dtype for one in modes])[times.clock.device]
    table = torch.where(can, torch.stack(seconds, 1), torch.inf)
    found = allocate.coarse(table, cost, policy.lam, float(reference.max()))
    return method.replace(precision=fixed(tuple(policy.modes[i] for i in found.modes.tolist()), policy.inputs))


def predicted(method: Method, work: Work, sizes: Tensor, times: Times, key: Key, knobs: State) -> Tensor:
    """T(m) [N] of every client, if all were told these knobs of a mode {name: []}."""
    split, ids = work.split, torch.arange(len(sizes))
    steps, _ = method.sync.schedule((sizes + method.batch_size - 1) // method.batch_size, method.sync.init(split.x0))
    cast = method.broadcast.publish(split.x0, 0, None, split.layout, key, kinds=split.kinds)
    down = sum(_size(message) for message in (*method.broadcast.frames(cast, -1), *([knobs] if knobs else [])))
    vector = random.normal(key, work.layout.d).to(split.x0)
    sent, _ = work.codec.encode(vector, work.mine(work.memory()[0]), key, layout=work.layout, knobs=knobs)
    stats = {"loss": split.x0.new_zeros(()), "steps": torch.zeros((), dtype=torch.int32)}
    up = _size(sent) + int(nbytes(stats))
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
