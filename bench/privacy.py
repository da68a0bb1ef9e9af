"""Client-level differential privacy on digits: epsilon against accuracy against bytes.

100 clients of some 14 samples each (iid), a linear model of 650 parameters, 40 rounds of 5 local epochs, Poisson sampling
at 0.3, updates clipped to 0.5, delta 1e-3 (a tenth of 1 / N). Rows: FedAvg of uniform weights, with clipping, with noise at
the server (float32 and 4 bits up), with noise at the clients (all of them, for nothing is amplified there). Nothing is
tuned but the client step of plain FedAvg, by hand. --quick: one seed, ten rounds.
"""

from __future__ import annotations

from typing import Any

import taciturn
from bench.common import arguments, finish
from taciturn import Experiment, Method, aggregation, codecs, participation, solvers, sync
from taciturn.core.types import Codec
from taciturn.tasks import data
from taciturn.tasks.models import linear
from taciturn.tasks.spec import TaskSpec

CLIENTS, RATE, NORM, DELTA = 100, 0.3, 0.5, 1e-3
Z = (0.5, 1.0, 2.0, 4.0)


def _central(z: float, seed: int, codec: Codec) -> Method:
    part = aggregation.private(norm=NORM, noise=z, rate=RATE, delta=DELTA, seed=seed)
    return _base().replace(aggregator=part, codec=codec)


def _base() -> Method:
    return Method(
        participation=participation.poisson(RATE), solver=solvers.sgd(lr=0.1), sync=sync.every(epochs=5), batch_size=8,
        aggregator=aggregation.mean(),
    )  # fmt: skip


def _everyone(z: float) -> Method:
    codec = codecs.clip(norm=NORM, noise=z, count=CLIENTS, delta=DELTA)
    return _base().replace(codec=codec, participation=participation.all())


def methods(seed: int) -> dict[str, Method]:
    """The rows."""
    rows = {"none": _base(), "clipped": _base().replace(codec=codecs.clip(norm=NORM))}
    rows |= {f"server {z}": _central(z, seed, codecs.identity()) for z in Z}
    rows |= {f"server {z}, 4 bits": _central(z, seed, codecs.clip(codecs.quantize4(), norm=NORM)) for z in (1.0, 2.0)}
    return rows | {f"clients {z}": _everyone(z) for z in (2.0, 4.0, 20.0)}


def main(quick: bool) -> None:
    """Run the table."""
    figures: dict[str, list[dict[str, Any]]] = {}
    for seed in range(1 if quick else 2):
        task = TaskSpec(data.digits(clients=CLIENTS, split=data.iid()), linear())
        for name, method in methods(seed).items():
            experiment = Experiment(task, method, rounds=10 if quick else 40, seed=seed, evaluate_every=10)
            found = taciturn.run(experiment).summary
            kept = {key: found.get(key) for key in ("accuracy", "epsilon", "epsilon_message", "bytes_up", "bytes_down")}
            figures.setdefault(name, []).append(kept)
            print(f"{name:20} seed {seed} {kept}", flush=True)
    finish("privacy", {"runs": figures}, quick)


if __name__ == "__main__":
    main(arguments(__doc__).quick)
