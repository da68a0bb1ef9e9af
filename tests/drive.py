"""A few rounds without the runner: what the laws of engines look at."""

from __future__ import annotations

import torch

from taciturn.client import Work
from taciturn.core import random
from taciturn.engines import build
from taciturn.round import fed_round, start


def drive(task, method, engine="sequential", rounds=5, block=None, seed=0, **faults):
    """-> (final server state, engine, per-round statistics, per-round traffic)."""
    split = method.split(task.model, task.tracked)
    work = Work(task, split, method.solver, method.codec)
    key = random.key(seed)
    runner, path = build(engine, work, method, key, block=block, **faults)
    assert engine in ("auto", path.name), path
    server, stats, traffic = start(split.x0, task.train.sizes, method, split.base), [], []
    sizes = task.train.sizes
    for r in range(rounds):
        round_key = random.fold(key, "round", r)
        ids = method.participation.draw(r, round_key, torch.ones(len(sizes), dtype=torch.bool))
        server, stat = fed_round(server, ids, sizes[ids], method, runner, split, round_key)
        stats.append(stat)
        traffic.append(runner.post.ledger.close_round())
    return server, runner, stats, traffic
