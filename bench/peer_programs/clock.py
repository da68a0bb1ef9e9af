"""What every program shares: its arguments, the data file, and the clock. Standard library and NumPy only.

The clock reads the CPU seconds (user + system) of the whole process tree at the end of round 2 and at the end of the last
round: of every living process under this one its own seconds and those of its ended children. This process adopts orphans
(Linux PR_SET_CHILD_SUBREAPER), so that daemons stay in the tree. A process that ends without being waited for drops out of
the sum, which flatters the measured program; how many ended is part of the result.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

WARM = 2  # rounds before the clock starts
TICK = os.sysconf("SC_CLK_TCK")
Score = tuple[float, float]  # accuracy and mean cross-entropy on the test images


class Job:
    """One run: x [clients, samples, ...] float32, y [clients, samples], the test images, the start weights by name.

    cohorts [rounds, cohort]: the clients of each round, the same for every framework.
    """

    def __init__(self, file: str, workload: str, rounds: int, seed: int) -> None:
        with np.load(file) as held:
            arrays = {name: held[name] for name in held.files}
        self.file, self.workload, self.rounds, self.seed = file, workload, rounds, seed
        self.x, self.y, self.test_x, self.test_y = (arrays[name] for name in ("x", "y", "test_x", "test_y"))
        self.clients, self.samples = self.y.shape
        self.cohorts: list[list[int]] = arrays["cohorts"][seed, :rounds].tolist()
        self.cohort, self.batch, self.lr = arrays["cohorts"].shape[2], int(arrays["batch"]), float(arrays["lr"])
        self.weights = {name[2:]: array for name, array in arrays.items() if name.startswith("w:")}


def job() -> Job:
    """The run that the command line asks for."""
    parser = argparse.ArgumentParser(description="one run of bench.peers")
    parser.add_argument("file")
    parser.add_argument("workload")
    parser.add_argument("rounds", type=int)
    parser.add_argument("seed", type=int)
    given = parser.parse_args()
    return Job(given.file, given.workload, given.rounds, given.seed)


def processes() -> dict[int, tuple[int, float]]:
    """pid -> (parent, CPU seconds with those of its ended children) of every process of the machine."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            found[int(folder.name)] = int(fields[1]), sum(map(int, fields[11:15])) / TICK
    return found


def tree(root: int) -> dict[int, float]:
    """pid -> CPU seconds of `root` and everything under it."""
    found = processes()
    below: dict[int, list[int]] = {}
    for pid, (parent, _) in found.items():
        below.setdefault(parent, []).append(pid)
    members, ahead = {}, [root]
    while ahead:
        pid = ahead.pop()
        if pid in found:
            members[pid] = found[pid][1]
            ahead += below.get(pid, [])
    return members


def launched() -> float:
    """When this process began, in seconds since boot."""
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / TICK


def score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """Accuracy and mean cross-entropy."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    return float((logits.argmax(1) == labels).mean()), float(loss.mean())


class Clock:
    """Call `round_done` at the end of every round."""

    def __init__(self, rounds: int) -> None:
        if rounds <= WARM:
            raise SystemExit(f"at least {WARM + 1} rounds; got {rounds}")
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        self.rounds, self.ends, self.readings, self.began = rounds, [], {}, launched()

    def round_done(self) -> None:
        """Note the time; at the two ends of the measured stretch, the CPU seconds of the tree."""
        number = len(self.ends) + 1
        if number in (WARM, self.rounds):
            self.readings[number] = tree(os.getpid())
        self.ends.append(time.clock_gettime(time.CLOCK_BOOTTIME) - self.began)

    def report(self, packages: tuple[str, ...], steps: int, start: Score, end: Score, **facts: Any) -> None:
        """Print the JSON line. steps: SGD steps of all rounds; start, end: on the test images, before and after."""
        if len(self.ends) != self.rounds:
            raise SystemExit(f"{len(self.ends)} rounds ended, {self.rounds} were asked for")
        before, after = self.readings[WARM], self.readings[self.rounds]
        measured = self.rounds - WARM
        wall = (self.ends[-1] - self.ends[WARM - 1]) / measured
        line = {
            "cpu_seconds": (sum(after.values()) - sum(before.values())) / measured,
            "wall_seconds": wall,
            "startup_seconds": self.ends[WARM - 1] - WARM * wall,
            "round_ends": [round(moment, 3) for moment in self.ends],
            "processes": len(after),
            "processes_ended": len(before.keys() - after.keys()),
            "steps": steps,
            "accuracy_start": start[0],
            "accuracy": end[0],
            "test_loss": end[1],
            "versions": {name: version(name) for name in packages},
        }
        print(json.dumps(line | facts), flush=True)
