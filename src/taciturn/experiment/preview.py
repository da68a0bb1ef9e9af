"""What a run would cost, before it is run.

Units: bytes; seconds of one local step, measured; M clients of a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from taciturn.core.state import leaves
from taciturn.experiment.experiment import Experiment
from taciturn.experiment.runner import prepare
from taciturn.round import fed_round

_SHARES: tuple[Callable[[str], bool], ...] = (
    lambda kind: kind.startswith("up/") and not kind.endswith("/setup"),
    lambda kind: kind.startswith("down/") and not kind.endswith("/setup"),
    lambda kind: kind.endswith("/setup"),
)


def preview(experiment: Experiment) -> dict[str, Any]:
    """One round is run on a copy and thrown away: sizes, bytes of that round, memory of a block, seconds.

    bytes_up / bytes_down: of the first round without what is sent once a run; bytes_once: schemas and sizes.
    seconds: of the second of two trial rounds; simulated: of the first, on the devices of the fleet. memory_bytes: an
    estimate, four vectors [d] (weights, gradient, message, moments) for the server and for each client of a block, and what
    a client owns.
    """
    run = prepare(experiment)
    method, sizes, split = run.method, run.task.train.sizes, run.work.split
    key, ids = run.draw(0)
    with closing(run.engine.crew):
        _, stats = fed_round(run.server, ids, sizes[ids], method, run.engine, split, key)
        simulated = run.times.round(stats, run.engine.post.ledger)["round"]
        kinds = run.engine.post.ledger.close_round()["by_kind"]
        began = time.perf_counter()
        fed_round(run.server, ids, sizes[ids], method, run.engine, split, key)
        seconds = time.perf_counter() - began
    up, down, once = (sum(e["payload"] + e["frame"] for k, e in kinds.items() if belongs(k)) for belongs in _SHARES)
    vectors = 4 * split.x0.numel() * split.x0.element_size()
    owned = sum(t.numel() * t.element_size() for t in leaves(run.work.newcomer()))
    return {
        "name": experiment.name,
        "clients": len(sizes),
        "cohort": len(ids),
        "samples": int(sizes.sum()),
        "d": split.layout.d,
        "p": split.personal.d,
        "engine": f"{run.path.name} ({run.path.why})",
        "randomness": run.task.facts.randomness,
        "steps_mean": float(stats.steps.to(torch.float64).mean()),
        "bytes_up": up,
        "bytes_down": down,
        "bytes_once": once,
        "bytes_all_rounds": once + (up + down) * experiment.rounds,
        "memory_bytes": vectors + (vectors + owned) * min(run.path.block, len(ids)),
        "seconds_per_round": seconds,
        "seconds_all_rounds": seconds * experiment.rounds,
        "simulated_seconds_per_round": simulated,
    }
