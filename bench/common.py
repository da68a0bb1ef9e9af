"""What all benchmarks share: the --quick switch, where a figure was measured, and where it is written.

Units: seconds, bytes. A result file holds the figures with commit, date, machine and command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@cache
def _loaded(source: Any, seed: int) -> Any:
    return source.load(seed)


@dataclass(frozen=True)
class Cached:
    """A data source that a process reads once for each seed."""

    source: Any

    def load(self, seed: int) -> Any:
        """As the source does."""
        return _loaded(self.source, seed)


def parser(description: str | None) -> argparse.ArgumentParser:
    """With --quick: the same code with fewer seeds and tasks."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="fewer seeds and rounds, same code and keys")
    return options


def arguments(description: str | None) -> argparse.Namespace:
    """The arguments of a benchmark that takes nothing but --quick."""
    return parser(description).parse_args()


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}


def commit() -> str:
    """The commit that was measured, with a + where the tree had changes."""
    try:
        run = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        return name + ("+" if subprocess.run(["git", "status", "--porcelain", "../src"], **run).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


COMMIT = commit()  # when the benchmark starts: the tree may move on while it runs


def finish(name: str, figures: dict[str, Any], quick: bool) -> None:
    """Keep a full run's figures in bench/results, and print the JSON line."""
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        facts = {"command": f"python -m bench.{name}", "date": datetime.now(UTC).date().isoformat(), "commit": COMMIT}
        text = json.dumps(facts | {"machine": machine()} | figures, indent=1)
        (RESULTS / f"{name}.json").write_text(text + "\n")
    sys.stdout.flush()
    print(json.dumps(figures))


def mean_spread(values: list[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation; None if a seed has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "spread": None}
    return {"mean": fmean(known), "spread": stdev(known) if len(known) > 1 else 0.0}
