"""Dies at every point at which a run touches its folder, in turn; resumes; and compares. Run by test_killed.py.

    python killed.py FOLDER ENGINE STRIDE

A point lies before and after each call that changes a file or a name, in the middle of each write, and in the middle of
each change of rows. Every death is a SIGKILL of a forked process. The first resumption is killed too, at a point of its
own; the second ends the run. What is left must be what an undisturbed run leaves.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import taciturn
from conftest import Net, make_federation
from taciturn import Broadcast, Experiment, Method, Task, codecs, participation, partition, solvers
from taciturn.core.state import equal, load_state
from taciturn.engines.rows import Rows
from taciturn.experiment.record import read_lines

METHOD = Method(
    partition=partition.layers(personal="head"),
    participation=participation.uniform(count=3),
    solver=solvers.sgd(lr=0.1, momentum=0.5),
    codec=codecs.cast(),
    broadcast=Broadcast(codecs.cast("bfloat16"), "change"),
    batch_size=8,
)
CALLS = ("write", "fsync", "replace", "rename", "unlink", "ftruncate", "posix_fallocate")


def experiment(engine: str) -> Experiment:
    task = Task(Net, make_federation(sizes=(3, 9, 4, 5, 2, 6, 1)))
    return Experiment(task, METHOD, rounds=4, engine=engine, evaluate_every=2, evaluate_count=3)


class Fuse:
    """Kills this process at the n-th point."""

    def __init__(self, n: int) -> None:
        self.left = n

    def point(self, torn: Callable[[], object] = lambda: None) -> None:
        """One more point; `torn` leaves half of the work behind."""
        self.left -= 1
        if self.left == 0:
            torn()
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, fn: Callable, half: Callable | None = None) -> Callable:
        """The function with a point before, in the middle and after."""

        def guarded(*arguments, **named):
            self.point()
            if half is not None:
                self.point(lambda: half(*arguments))
            result = fn(*arguments, **named)
            self.point()
            return result

        return guarded

    def light(self) -> None:
        """Put points around all that changes a file."""
        write, put = os.write, Rows.put
        for name in CALLS:
            half = (lambda file, data: write(file, data[: len(data) // 2])) if name == "write" else None
            setattr(os, name, self.around(getattr(os, name), half))
        Rows.put = self.around(put, lambda rows, ids, raw: put(rows, ids[: len(ids) // 2], raw[: len(ids) // 2]))
        Rows.flush = self.around(Rows.flush)


def go(folder: Path, engine: str, point: int) -> bool:
    """Begin or resume in a process of its own that dies at that point; True if it came to the end."""
    child = os.fork()
    if not child:
        try:
            Fuse(point).light()
            taciturn.run(experiment(engine), out=folder, resume=(folder / "run.json").exists())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, f"point {point}: status {status}"
    return status == 0


def left(folder: Path) -> tuple:
    """All that a run leaves, without times."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(folder)]
    rows = {path.name: path.read_bytes() for path in folder.glob("clients.*") if "journal" not in path.name}
    return lines, rows, (folder / "model.safetensors").read_bytes()


def main(base: Path, engine: str, stride: int) -> None:
    """All points 1, 1 + stride, .. until a run is not killed any more."""
    torch.set_num_threads(1)
    whole = base / "whole"
    taciturn.run(experiment(engine), out=whole)
    last = "checkpoint-000004.safetensors"
    expected, state = left(whole), load_state(whole / last)[0]
    chance, point, ended = random.Random(engine), 1, False
    while not ended:
        folder = base / str(point)
        ended = go(folder, engine, point)
        if not ended:
            go(folder, engine, chance.randint(1, 60))
            assert go(folder, engine, -1)
        assert left(folder) == expected, f"point {point}: another run came out"
        assert equal(load_state(folder / last)[0], state), f"point {point}: another checkpoint"
        shutil.rmtree(folder)
        point += stride
    print(point - stride)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
