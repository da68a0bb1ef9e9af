"""CPU seconds of a round of other frameworks over ours, side by side, with equal work shown.

Every framework runs W1 and W2 of `bench.engine` in a process of its own (`bench/peer_programs`), the peers in virtual
environments of their own (build/peers, made on first use): the same images, start weights, cohorts, batch and learning
rate, on its recommended way to simulate, with one computing thread a process. Measured are user + system seconds of the
whole process tree from the end of round 2 to the end of the last round. Before every run of a peer there is one of ours,
and their quotient is one repeat; a published ratio is the median over repeats. A run counts only if it took the expected
number of SGD steps and learned; otherwise the figure is null with a reason. Linux only (/proc).

    W1  1,000 clients, 100 a round, 60 samples, MLP 784-200-200-10, batch 10, one epoch, SGD 0.1
    W2  200 clients, 20 a round, 20 samples, CNN (5x5 convolutions 32 and 64, hidden 512), batch 20, one epoch, SGD 0.1
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.common import arguments, finish
from bench.engine import WORKLOADS, _images
from bench.peer_programs.clock import tree
from bench.peer_programs.environments import ROOT, interpreter
from taciturn import data, participation
from taciturn.core import random

PEERS = ("flwr", "pfl", "fedjax", "fedlab")
NAMES = ("W1", "W2")
PROGRAMS = Path(__file__).parent / "peer_programs"
RATE = 0.1
RUN_SECONDS = 600  # a run that takes longer is stopped
MEMORY_EVERY = 0.5  # seconds between two looks at the memory
MEDIANS = (
    "cpu_seconds", "wall_seconds", "startup_seconds", "peak_mib", "steps", "accuracy_start", "accuracy", "test_loss",
    "load",
)  # fmt: skip
LEARNED = 0.1  # least gain of test accuracy over the start, in a run that counts
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
# XLA sizes its thread pool by NPROC; left alone, its threads cost FedJAX up to half as much CPU again
XLA = {"NPROC": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"}


def write(name: str, file: Path, seeds: int, rounds: int) -> None:
    """The data file of a workload: clients' samples, the 1,000 test images, start weights, and the cohorts that ours draws.

    The images of `bench.engine` come sorted by digit; here they are shuffled once, so that accuracies can be compared.
    """
    work = WORKLOADS[name]
    clients, samples = len(work.sizes), work.sizes[0]
    order = torch.randperm(clients * samples, generator=torch.Generator().manual_seed(0))
    x, y = (part[order] for part in _images(clients * samples))
    central = data.mnist5k(clients=1, test=0.0).load(0).central
    assert central is not None
    rows = central.rows
    test_x, test_y = central.fields["input"][rows], central.fields["target"][rows]
    torch.manual_seed(0)
    weights = {f"w:{key}": value.numpy() for key, value in work.model().state_dict().items()}
    draw, everyone = participation.uniform(count=work.cohort).draw, torch.ones(clients, dtype=torch.bool)
    keys = [[random.fold(random.key(seed), "round", number) for number in range(rounds)] for seed in range(seeds)]
    cohorts = [[draw(number, key, everyone).tolist() for number, key in enumerate(row)] for row in keys]
    np.savez(
        file,
        x=x.reshape(clients, samples, *work.shape).numpy(), y=y.reshape(clients, samples).numpy(),
        test_x=test_x.reshape(-1, *work.shape).numpy(), test_y=test_y.numpy(),
        cohorts=np.array(cohorts), batch=work.batch, lr=RATE, **weights,
    )  # fmt: skip


def _memory(pid: int) -> int:
    """Bytes of a process, shared pages divided among those that share them (PSS); 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def _watch(root: int, ended: threading.Event, peak: list[int]) -> None:
    while not ended.wait(MEMORY_EVERY):
        peak[0] = max(peak[0], sum(map(_memory, tree(root))))


def one_run(name: str, file: Path, workload: str, rounds: int, seed: int) -> dict[str, Any]:
    """One process to its end. Errors: `RuntimeError` with the last line of what it said."""
    python = Path(sys.executable) if name == "ours" else interpreter(name)
    command = [str(python), str(PROGRAMS / f"{name}_run.py"), str(file), workload, str(rounds), str(seed)]
    with tempfile.TemporaryDirectory(prefix="peer") as folder:
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment = kept | ONE_THREAD | QUIET | XLA | {"FLWR_HOME": folder, "HOME": folder}
        if name == "ours":
            environment["PYTHONPATH"] = str(ROOT / "src")
        with open(Path(folder) / "err", "w+") as told:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True, cwd=folder, env=environment)
            ended, peak = threading.Event(), [0]
            watcher = threading.Thread(target=_watch, args=(process.pid, ended, peak), daemon=True)
            watcher.start()
            try:
                said, _ = process.communicate(timeout=RUN_SECONDS)
            except subprocess.TimeoutExpired:
                for pid in tree(process.pid):
                    os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"stopped after {RUN_SECONDS} s") from None
            finally:
                ended.set()
                watcher.join()
            told.seek(0)
            lines, complaints = said.strip().splitlines(), told.read().strip().splitlines()
    if process.returncode or not lines:
        raise RuntimeError(f"exit status {process.returncode}: {(complaints or ['no word'])[-1][:300]}")
    return json.loads(lines[-1]) | {"peak_mib": round(peak[0] / 2**20), "load": os.getloadavg()[0]}


def refused(row: dict[str, Any], workload: str, rounds: int) -> str:
    """Why a run does not count, or ""."""
    work = WORKLOADS[workload]
    steps = rounds * work.cohort * -(-work.sizes[0] // work.batch)
    if row["steps"] != steps:
        return f"took {row['steps']} SGD steps instead of {steps}"
    if row["accuracy"] < row["accuracy_start"] + LEARNED:
        return f"did not learn: test accuracy {row['accuracy_start']:.3f} before, {row['accuracy']:.3f} after"
    return ""


class Book:
    """Runs of one workload by name, quotients by peer, and reasons where there is none."""

    def __init__(self, workload: str, rounds: int, missing: dict[str, str]) -> None:
        self.workload, self.rounds, self.reasons = workload, rounds, dict(missing)
        self.runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *PEERS)}
        self.ratios: dict[str, list[float]] = {name: [] for name in PEERS}

    def pair(self, peer: str, file: Path, seed: int) -> None:
        """Ours, then the peer; a peer that failed once is not tried again."""
        if peer in self.reasons:
            return
        rows = []
        for name in ("ours", peer):
            try:
                row = one_run(name, file, self.workload, self.rounds, seed)
            except RuntimeError as error:
                if name == "ours":
                    raise
                self.reasons[peer] = str(error)
                return
            why = refused(row, self.workload, self.rounds)
            if why and name == "ours":
                raise RuntimeError(f"ours {why}")
            if why:
                self.reasons[peer] = why
            rows.append(row)
            print(self.workload, name, json.dumps({k: v for k, v in row.items() if k != "round_ends"}), file=sys.stderr)
        self.runs["ours"].append(rows[0])
        self.runs[peer].append(rows[1])
        self.ratios[peer].append(rows[1]["cpu_seconds"] / rows[0]["cpu_seconds"])

    def ratio(self, peer: str) -> float | None:
        """Median quotient; None with a reason in `reasons`."""
        return None if peer in self.reasons else median(self.ratios[peer])

    def details(self) -> dict[str, Any]:
        """Medians and ranges of every framework."""
        found: dict[str, Any] = {"reasons": self.reasons}
        for name, rows in self.runs.items():
            if rows:
                found[name] = {key: median(row[key] for row in rows) for key in MEDIANS}
                cpu = [row["cpu_seconds"] for row in rows]
                found[name] |= {"cpu_seconds_range": [min(cpu), max(cpu)], "runs": len(rows)}
                found[name] |= {key: rows[-1][key] for key in ("processes", "processes_ended")}
                if name in PEERS:
                    found[name]["ratio_range"] = [min(self.ratios[name]), max(self.ratios[name])]
        return found


def prepared() -> dict[str, str]:
    """Make the peers' environments; -> {peer: why it has none}."""
    reasons = {}
    for peer in PEERS:
        try:
            interpreter(peer)
        except RuntimeError as error:
            reasons[peer] = str(error)
    return reasons


def show(books: dict[str, Book]) -> None:
    """The table for people."""
    table = Table("workload", "framework", "CPU s a round", "/ ours", "range", "wall s", "start s", "peak MiB", "accuracy")
    for workload, book in books.items():
        details = book.details()
        for name in ("ours", *PEERS):
            row, ratio = details.get(name), book.ratio(name) if name in PEERS else 1.0
            if row is None or ratio is None:
                table.add_row(workload, name, "-", "-", book.reasons.get(name, ""))
                continue
            low, high = row.get("ratio_range", (1.0, 1.0))
            table.add_row(
                workload, name, f"{row['cpu_seconds']:.3f}", f"{ratio:.2f}", f"{low:.2f}-{high:.2f}",
                f"{row['wall_seconds']:.2f}", f"{row['startup_seconds']:.1f}", f"{row['peak_mib']:.0f}",
                f"{row['accuracy']:.3f}",
            )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    """Both workloads, all peers."""
    quick = arguments(__doc__).quick
    repeats, rounds = (1, {"W1": 6, "W2": 8}) if quick else (5, {"W1": 10, "W2": 20})
    missing = prepared()
    books = {workload: Book(workload, rounds[workload], missing) for workload in NAMES}
    with tempfile.TemporaryDirectory(prefix="peers") as folder:
        for workload in NAMES:
            write(workload, Path(folder) / f"{workload}.npz", repeats, rounds[workload])
        for repeat in range(repeats):
            for workload, book in books.items():
                for peer in PEERS:
                    book.pair(peer, Path(folder) / f"{workload}.npz", repeat)
    show(books)
    versions = {name: rows[-1]["versions"] for book in books.values() for name, rows in book.runs.items() if rows}
    figures: dict[str, Any] = {"n": {"tasks": len(NAMES), "seeds": repeats, "rounds": rounds}}
    figures |= {workload: {peer: book.ratio(peer) for peer in PEERS} for workload, book in books.items()}
    figures |= {"versions": versions, "details": {workload: book.details() for workload, book in books.items()}}
    finish("peers", figures, quick)


if __name__ == "__main__":
    main()
