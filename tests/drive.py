"""A few rounds without the runner: what the laws of engines look at."""

from __future__ import annotations

import itertools

import pytest
import torch

import taciturn
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.state import equal
from taciturn.engines import build
from taciturn.round import fed_round, start


def drive(task, method, engine="sequential", rounds=5, block=None, seed=0, tap=None, **faults):
    """-> (final server state, engine, per-round statistics, per-round traffic). tap: is given every message's bytes."""
    split = method.split(task.model, task.tracked)
    work = Work(task, split, method.solver, method.codec)
    key = random.key(seed)
    runner, path = build(engine, work, method, key, block=block, **faults)
    assert engine in ("auto", path.name), path
    if tap is not None:
        runner.post.carrier.tap = tap
    server, stats, traffic = start(split.x0, task.train.sizes, method, split.base), [], []
    sizes = task.train.sizes
    for r in range(rounds):
        round_key = random.fold(key, "round", r)
        there = runner.crew.there()
        everyone = torch.ones(len(sizes), dtype=torch.bool)
        ids = method.participation.draw(r, round_key, everyone if there is None else there)
        server, stat = fed_round(server, ids, sizes[ids], method, runner, split, round_key)
        stats.append(stat)
        traffic.append(runner.post.ledger.close_round())
    return server, runner, stats, traffic


def agree(task, method, block, rounds=4):
    """The laws of engines over some rounds where every fifth upload is lost -> what `drive` gives for "loopback".

    Sequential = loopback in every bit and byte; stacked = sequential to rounding, in every byte.
    """
    faults = {"lose": lambda r, i: (3 * r + i) % 5 == 0}
    state, _, stats, traffic = drive(task, method, rounds=rounds, **faults)
    wired = drive(task, method, "loopback", rounds=rounds, **faults)
    stacked, _, _, stacked_traffic = drive(task, method, "stacked", rounds=rounds, block=block, **faults)
    assert torch.equal(state.x, wired[0].x) and traffic == wired[3] == stacked_traffic
    assert equal(state.cast.held, wired[0].cast.held) and any(stat.left_out for stat in stats)
    assert float((state.x - stacked.x).norm() / state.x.norm()) <= 1e-3
    assert [s.aggregate for s in stats] == [s.aggregate for s in wired[2]]
    assert not torch.equal(state.x, method.split(task.model, task.tracked).x0)
    return wired


def resumes(experiment, folder, rounds=5):
    """A run that stops where the experiment says and goes on to `rounds` ends like one that was never stopped."""
    taciturn.run(experiment, out=folder)
    resumed = taciturn.run(experiment.replace(rounds=rounds), out=folder, resume=True)
    whole = taciturn.run(experiment.replace(rounds=rounds))
    assert all(torch.equal(resumed.tensors[name], t) for name, t in whole.tensors.items())
    for one, other in zip(resumed.history, whole.history, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    return whole


def thinned(rows, columns):
    """All pairs as parameters, every other of them slow; each row and each column keeps some for `make test`."""
    return [
        pytest.param(row, column, marks=[pytest.mark.slow] if (i + j) % 2 else [])
        for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns))
    ]
