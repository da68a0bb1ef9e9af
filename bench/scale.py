"""Very many clients: memory, start and the cost of a round with 1,000,000 of them against 1,000.

Each client keeps 100 personal floats (the head of a small model), 200 take part in a round, every round ends in a
checkpoint in a run folder, and every tenth evaluates 200 clients. Client i's samples are rows of scikit-learn's digits,
drawn by (i, sample), with labels shifted by i, so that heads must differ; nothing is stored per client but its rows.
Each N runs in a process of its own. Units: seconds (start: wall time from the call to the first draw, without imports;
CPU seconds of rounds after the fifth), MiB = 2^20 bytes (disk: blocks in use; memory: high-water mark of the process).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import taciturn
from bench.common import arguments, finish
from taciturn import Experiment, Method, Task, participation, partition, solvers, sync
from taciturn.core import random
from taciturn.tasks.data.clients import Federation

CLIENTS, FEW, COHORT, PERSONAL = 1_000_000, 1_000, 200, 100
SETTLED = 5  # rounds before the clock starts: first pages, first compilation


@dataclass(frozen=True)
class Names(Sequence):
    """client-0, client-1, .. without keeping them."""

    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < self.n:
            raise IndexError(i)
        return f"client-{i}"


@dataclass(frozen=True)
class Drawn:
    """Clients whose samples are a function of their number: [n, 64] images and labels shared by all."""

    n: int
    split: str
    images: Tensor
    labels: Tensor
    sizes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", 8 + torch.arange(self.n) % 9)

    @property
    def names(self) -> Sequence[str]:
        """By number."""
        return Names(self.n)

    def fetch(self, ids: Tensor, index: Tensor, keys: Tensor | None = None) -> dict[str, Tensor]:
        """Samples `index` [m, b] of clients `ids` [m]."""
        rows = random.fold(random.key(0), self.split, ids.unsqueeze(1), index) % len(self.images)
        return {"input": self.images[rows], "target": (self.labels[rows] + ids.unsqueeze(1)) % 10}


@dataclass
class Clocked:
    """Draws as `part` does, and notes when the first round begins."""

    part: Any
    began: float = 0.0

    def draw(self, round: int, key: Tensor, available: Tensor) -> Tensor:
        """-> ids of the cohort."""
        self.began = self.began or time.perf_counter()
        return self.part.draw(round, key, available)


def measure(n: int, rounds: int) -> None:
    """One run with n clients; prints a JSON line."""
    torch.set_num_threads(1)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    draw, clock = Clocked(participation.uniform(count=COHORT)), []
    with tempfile.TemporaryDirectory() as folder:
        called = time.perf_counter()
        data = Federation(Drawn(n, "train", images, labels), "classification", 10, test=Drawn(n, "test", images, labels))
        task = Task(lambda: nn.Sequential(nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 10)), data)
        method = Method(partition=partition.layers(personal="head"), participation=draw, sync=sync.every(epochs=2))
        method = method.replace(solver=solvers.sgd(lr=0.3), batch_size=8)
        experiment = Experiment(task, method, rounds=rounds, evaluate_every=10, evaluate_count=COHORT)
        result = taciturn.run(
            experiment, out=folder, callbacks=[lambda line: clock.append((time.process_time(), time.perf_counter()))]
        )
        assert result.header["p"] == PERSONAL
        (cpu, wall), (cpu_end, wall_end) = clock[SETTLED - 1], clock[-1]
        files = {path.name: path.stat() for path in Path(folder).iterdir()}
        rows = sum(stat.st_blocks * 512 for name, stat in files.items() if name.startswith("clients."))
        status = Path("/proc/self/status").read_text().split()
        figures = {
            "peak_rss_mib": int(status[status.index("VmHWM:") + 1]) / 1024,
            "start_seconds": draw.began - called,
            "cpu_seconds_per_round": (cpu_end - cpu) / (rounds - SETTLED),
            "wall_seconds_per_round": (wall_end - wall) / (rounds - SETTLED),
            "disk_mib": rows / 2**20,
            "checkpoint_bytes": max(stat.st_size for name, stat in files.items() if name.startswith("checkpoint-")),
            "run_json_bytes": files["run.json"].st_size,
            "took_part": len({i for line in result.history for i in line["cohort"]}),
        }
    print(json.dumps(figures))


def _alone(n: int, rounds: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    code = f"from bench.scale import measure; measure({n}, {rounds})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Run, print."""
    quick = arguments(__doc__).quick
    rounds = 30 if quick else 300
    few, many = (_alone(n, rounds) for n in (FEW, CLIENTS))
    table = Table("", f"{FEW:,} clients", f"{CLIENTS:,} clients")
    for name, value in many.items():
        table.add_row(name, *(f"{v:,.4g}" if isinstance(v, float) else f"{v:,}" for v in (few[name], value)))
    Console(width=100).print(table)
    n = {"clients": CLIENTS, "cohort": COHORT, "personal": PERSONAL, "rounds": rounds, "seeds": 1}
    figures = {"n": n, "clients": CLIENTS, "rounds": rounds} | many
    figures |= {f"{name}_at_1000_clients": value for name, value in few.items()}
    finish("scale", figures, quick)


if __name__ == "__main__":
    main()
