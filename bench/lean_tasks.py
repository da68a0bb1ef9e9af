"""Tasks, methods and one run of `bench.lean`.

Every task has a `Method` as its user would write it: FedAvg, two local epochs a round, SGD. FedAdam, FedAvg and the lean
method are made of it; the lean one by `Method.lean` alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import taciturn
from bench.common import Cached
from taciturn import Broadcast, Experiment, Method, TaskSpec, codecs, data, models, participation, server, solvers, sync
from taciturn.core.state import write_atomic
from taciturn.tasks.data.sources import divide

SHARED = Path(__file__).parents[2] / "shared" / "data"  # real data, where they lie beside the project
EPOCHS = 2


@dataclass(frozen=True)
class Cancer:
    """Breast cancer of scikit-learn (UCI Wisconsin): 569 tumours, 30 standardized features, 2 classes."""

    clients: int = 8
    split: Any = data.dirichlet(alpha=0.5, min_partition_size=20)
    central: float = 0.2
    test: float = 0.0
    validation: float = 0.1
    limit: int | None = None

    def load(self, seed: int) -> Any:
        """-> the federation of this seed."""
        from sklearn.datasets import load_breast_cancer

        values, labels = load_breast_cancer(return_X_y=True)
        values = (values - values.mean(0)) / values.std(0)
        inputs = torch.from_numpy(values).float()
        return divide(inputs, torch.from_numpy(labels).long(), 2, self, seed, "breast cancer", "standardized")


def _skew(alpha: float) -> Any:
    return data.dirichlet(alpha=alpha, min_partition_size=10)


def _mnist(clients: int, split: Any) -> Any:
    return data.mnist5k(clients=clients, split=split, validation=0.1)


def _digits(split: Any) -> Any:
    return data.digits(clients=20, split=split, validation=0.1)


Row = tuple[Any, Any, Any, int, int, str]
# data, model, participation, batch size, rounds of FedAdam, folder that it needs
TRAINING: dict[str, Row] = {
    "mnist-skew": (_mnist(50, _skew(0.3)), models.mlp(hidden=(100,)), participation.uniform(count=10), 10, 40, ""),
    "digits-skew": (_digits(_skew(0.3)), models.mlp(hidden=(64,)), participation.uniform(count=8), 16, 40, ""),
    "digits-cnn": (
        _digits(data.iid()),
        models.cnn(channels=(8, 16), hidden=64),
        participation.uniform(count=8),
        16,
        30,
        "",
    ),
    "activity": (
        data.activity(path=str(SHARED / "hapt"), window=64, step=256, validation=0.1),
        models.temporal(channels=(16, 32)),
        participation.uniform(count=6),
        32,
        30,
        "hapt",
    ),
    "air": (
        data.air(path=str(SHARED / "beijing_air"), every_nth=120, validation=0.1),
        models.mlp(hidden=(64,)),
        participation.all(),
        32,
        30,
        "beijing_air",
    ),
}
UNSEEN: dict[str, Row] = {
    "mnist-deep": (_mnist(25, data.iid()), models.mlp(hidden=(200, 100)), participation.uniform(count=5), 32, 30, ""),
    "mnist-shards": (
        _mnist(30, data.shards(per_client=3)),
        models.mlp(hidden=(64,)),
        participation.uniform(count=8),
        20,
        30,
        "",
    ),
    "cancer": (Cancer(), models.mlp(hidden=(64, 32)), participation.uniform(count=4), 16, 30, ""),
    "turbofan": (
        data.turbofan(path=str(SHARED / "cmapss"), validation=0.1),
        models.temporal(channels=(16, 32)),
        participation.uniform(count=10),
        32,
        30,
        "cmapss",
    ),
    "heart": (
        data.heart(path=str(SHARED / "heart_disease"), validation=0.1),
        models.mlp(hidden=(32,)),
        participation.all(),
        16,
        30,
        "heart_disease",
    ),
}
TASKS = TRAINING | UNSEEN


def available(names: Any) -> list[str]:
    """The tasks whose data are here."""
    return [name for name in names if not TASKS[name][5] or (SHARED / TASKS[name][5]).exists()]


def users(task: str, lr: float) -> Method:
    """What the user of a task has: FedAvg with a step size."""
    _, _, cohort, batch, _, _ = TASKS[task]
    return Method(participation=cohort, solver=solvers.sgd(lr=lr), batch_size=batch, sync=sync.every(epochs=EPOCHS))


def without(method: Method, part: str, base: Method) -> Method:
    """The lean method with one of its parts as the user had it; "" for none."""
    memory, down = method.codec, method.broadcast
    others = {
        "up": lambda: method.encoded(codecs.identity()),
        "down": lambda: method.replace(broadcast=Broadcast(codecs.identity())),
        "start": lambda: method.replace(broadcast=replace(down, start="sent")),
        "rounds": lambda: method.replace(sync=base.sync),
        "memory": lambda: method.encoded(memory.codec),
        "training on": lambda: method.encoded(replace(memory, into="message")),
        "momentum": lambda: method.replace(server=server.recent()),
        "recent": lambda: method.replace(server=method.server.server),
        "bound": lambda: method.replace(solver=base.solver),
        "lossless": lambda: method.encoded(replace(memory, codec=memory.codec.codec)).replace(
            broadcast=replace(down, codec=down.codec.codec)
        ),
    }  # of "training on" the memory stays, as published: added to the message
    return others[part]() if part else method


PARTS = ("up", "down", "start", "rounds", "memory", "training on", "momentum", "recent", "bound", "lossless")


@dataclass(frozen=True)
class Job:
    """A run: which method, "fedavg", "fedadam", "lean" or one that is tried; steps of client and server; what is off."""

    task: str
    method: str
    lr: float
    server_lr: float = 1.0
    seed: int = 0
    rounds: int = 30
    off: str = ""
    tuning: bool = False
    chosen: Method | None = None  # a candidate of the search
    name: str = ""


def made(job: Job) -> Method:
    """The method of a job."""
    base = users(job.task, job.lr)
    if job.chosen is not None:
        solver = base.solver if job.off == "bound" else Method.lean(base).solver
        return job.chosen.replace(participation=base.participation, solver=solver, batch_size=base.batch_size)
    if job.method == "fedadam":
        return base.replace(server=server.adam(lr=job.server_lr))
    return without(Method.lean(base), job.off, base) if job.method == "lean" else base


def play(job: Job) -> dict[str, Any]:
    """-> curve of (metric, bytes, simulated seconds), larger metric being better (errors: negative); or why it failed."""
    torch.set_num_threads(1)
    began = time.process_time()
    source, model, *_ = TASKS[job.task]
    trial = Experiment(TaskSpec(Cached(source), model), made(job), rounds=job.rounds, seed=job.seed)
    if job.tuning:
        every = max(1, job.rounds // 6)
        trial = trial.replace(evaluate_on="validation", evaluate_clients_every=every, evaluate_every=every)
    try:
        result = taciturn.run(trial)
    except taciturn.TaciturnError as error:
        return {"failed": str(error), "curve": [], "score": -math.inf, "cpu_seconds": time.process_time() - began}
    goal, name = (result.header["metric"][key] for key in ("goal", "name"))
    sign = 1 if goal == "max" else -1
    curve = [
        (sign * line["metrics"][name], line["bytes_up"] + line["bytes_down"], line["simulated"]["total"])
        for line in result.history
        if line["metrics"]
    ]
    steps = sum(line["steps"] for line in result.history) / len(result.history)
    score = _score(result, name, sign) if job.tuning else None
    told = {"steps": steps, "name": name, "d": result.header["d"], "cpu_seconds": time.process_time() - began}
    return told | {"curve": curve, "score": score}


def kept(job: Job, folder: Path | None) -> dict[str, Any]:
    """`play`, or what a folder has of it."""
    if folder is None:
        return play(job)
    file = folder / f"{hashlib.sha256(repr(job).encode()).hexdigest()[:16]}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        done = json.dumps({"job": repr(job), "run": play(job)}).encode()
        write_atomic(file, [done])
    run: dict[str, Any] = json.loads(file.read_bytes())["run"]
    return run


def _score(result: Any, name: str, sign: int) -> float:
    """Mean over the last two looks at the clients' validation data, pooled."""
    power, looks = (2 if name == "rmse" else 1), []
    for line in result.history:
        if line["spread"]:
            counts, values = line["spread"]["count"], line["spread"][name]
            pooled = sum(n * v**power for n, v in zip(counts, values, strict=True)) / sum(counts)
            looks.append(sign * pooled ** (1 / power))
    return sum(looks[-2:]) / 2 if looks and all(map(math.isfinite, looks[-2:])) else -math.inf
