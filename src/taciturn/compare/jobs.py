"""Many runs on all cores, each in a folder of its own: done ones are kept, begun ones go on, and time can end the rest.

A worker is a process that was started afresh, with one thread; it is told an experiment's table and writes the run folder,
from which progress and results are read.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from taciturn.core.errors import AllClientsFailed, RunError, TaciturnError
from taciturn.core.state import write_atomic
from taciturn.experiment import config
from taciturn.experiment.record import read_header, read_lines, same_experiment
from taciturn.experiment.runner import run

POLL = 0.5  # seconds between two looks at the record
FAILED = "failed.txt"  # why a run cannot be finished; without it, it is tried again


@dataclass(frozen=True, eq=False)
class Job:
    """A run: the experiment's table, and its folder."""

    table: dict[str, Any]
    folder: Path

    @property
    def rounds(self) -> int:
        """Asked for."""
        return int(self.table["rounds"])

    @property
    def done(self) -> int:
        """Rounds in the record."""
        return len(read_lines(self.folder)) if (self.folder / "record.jsonl").exists() else 0

    @property
    def finished(self) -> bool:
        """True if all of it was run, with this configuration. Errors: `RunError` if with another."""
        if not (self.folder / "run.json").exists():
            return False
        same_experiment(read_header(self.folder)["experiment"], self.table, self.folder)
        result = self.folder / "result.json"
        if not result.exists():
            return False
        return self.done >= self.rounds or bool(json.loads(result.read_text())["stopped"] != "rounds")

    @property
    def failed(self) -> str:
        """Why it failed before; "" if it did not."""
        note = self.folder / FAILED
        return note.read_text() if note.exists() else ""


Told = Callable[[Mapping[Job, int]], None]  # rounds done of the jobs in work


def play(
    jobs: Sequence[Job], processes: int | None = None, until: float | None = None, told: Told | None = None
) -> dict[Job, str]:
    """Run what is not finished, in this order -> of those that have no result, why.

    until: `time.monotonic()` after which no other run is begun; those in work are run to their end. Errors: `RunError` for
    a folder that holds another experiment.
    """
    lost = {job: job.failed for job in jobs if job.failed}
    waiting: Iterator[Job] = iter([job for job in jobs if not job.failed and not job.finished])
    active: dict[Future[str], Job] = {}
    count = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        more = True
        while more or active:
            while more and len(active) < count:
                job = next(waiting, None)
                more = job is not None
                if job is None:
                    break
                if until is not None and time.monotonic() > until:
                    lost[job] = "no time was left"
                    continue
                active[pool.submit(_work, job)] = job
            if not active:
                continue
            ended, _ = wait(active, timeout=POLL, return_when=FIRST_COMPLETED)
            for future in ended:
                job = active.pop(future)
                said = future.result()
                if said:
                    lost[job] = said
            if told is not None:
                told({job: job.done for job in active.values()})
    return lost


def _work(job: Job) -> str:
    """Run a job in this process -> "", or why it failed."""
    torch.set_num_threads(1)
    resume = (job.folder / "run.json").exists()
    try:
        run(config.from_table(job.table), out=job.folder, resume=resume)
    except TaciturnError as error:
        if isinstance(error, RunError) and not isinstance(error, AllClientsFailed):
            raise
        write_atomic(job.folder / FAILED, [str(error).encode()])
        return str(error)
    return ""
