"""Workers as forked processes of this machine, with shared memory between them: Linux.

A child is a copy of this process at the moment of the fork, so data and model are there without being copied. Tensors
cross in shared memory (`Arena`): the round's model is written once, on a board that all workers read; an answer lies in
one of the worker's slots until it has been used. Only names and numbers go through the pipe.
"""

from __future__ import annotations

import math
import mmap
import multiprocessing
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from taciturn.core.errors import ConfigError, RunError
from taciturn.core.state import State
from taciturn.engines.crew import AHEAD, Gone, Workers, outcome, walk
from taciturn.engines.memory import keep_freed_memory, reserve
from taciturn.engines.train import Trainer

RESERVE = 1 << 36  # bytes of address space of an arena; memory is taken when it is written
_ALIGN = 64


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in an arena; shared: on the board."""

    shared: bool
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Arena:
    """Memory that a process shares with the children it forks."""

    def __init__(self, slots: int = 1, shared: bool = False) -> None:
        self.shared = shared
        self._memory, self._slot = reserve(RESERVE * slots, mmap.MAP_SHARED), 0
        self._slots, self._end = slots, 0

    def turn(self) -> None:
        """Write to the next slot, over what was there."""
        self._slot = (self._slot + 1) % self._slots
        self._end = 0

    def put(self, tensor: Tensor) -> _Place:
        """Copy a tensor in. Errors: `RunError` if it does not fit."""
        size = tensor.numel() * tensor.element_size()
        if self._end + size > RESERVE:
            raise RunError(f"a block's tensors exceed {RESERVE} bytes; a smaller block helps")
        place = _Place(self.shared, self._slot * RESERVE + self._end, tensor.dtype, tuple(tensor.shape))
        if size:
            self.get(place).copy_(tensor)
        self._end += math.ceil(size / _ALIGN) * _ALIGN
        return place

    def get(self, place: _Place) -> Tensor:
        """The tensor there: the memory itself."""
        count = math.prod(place.shape)
        if not count:
            return torch.empty(place.shape, dtype=place.dtype)
        flat = torch.frombuffer(self._memory, dtype=place.dtype, count=count, offset=place.offset)
        return flat.view(place.shape)


class Forked:
    """One child, and the talk with it: a worker of crew.py."""

    def __init__(self, trainer: Trainer, board: Arena, ours: list[Connection]) -> None:
        self._board, self._orders, self._answers = board, Arena(AHEAD + 1), Arena(AHEAD + 1)
        self._line, theirs = multiprocessing.Pipe()
        ours.append(self._line)
        self._ours = ours
        context = multiprocessing.get_context("fork")
        job = (trainer, board, self._orders, self._answers, theirs, list(ours))
        self.process = context.Process(target=_serve, args=job, daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, command: str, *arguments: Any) -> None:
        """Send a command. Errors: `Gone`."""
        self._orders.turn()
        light = walk(arguments, Tensor, self._orders.put)
        try:
            self._line.send((command, light))
        except OSError as error:
            raise Gone from error

    def answer(self) -> Any:
        """The next answer; its tensors are shared memory. Errors: `Gone`, and what the trainer raised."""
        try:
            good, found = self._line.recv()
        except (OSError, EOFError) as error:
            raise Gone from error
        if not good:
            raise found
        return walk(found, _Place, self._answers.get)

    def close(self) -> None:
        """End the child."""
        with suppress(ValueError):
            self._ours.remove(self._line)
        self._line.close()
        self.process.join(1.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(
    trainer: Trainer, board: Arena, orders: Arena, answers: Arena, line: Connection, others: list[Connection]
) -> None:
    """The child: do what is told until the line closes."""
    for other in others:
        other.close()  # else a dead parent would not be noticed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the round, and then the line
    torch.set_num_threads(1)
    keep_freed_memory()

    def tensor(place: _Place) -> Tensor:
        return board.get(place) if place.shared else orders.get(place).clone()

    def do(command: str, arguments: Any) -> Any:
        result = getattr(trainer, command)(*walk(arguments, _Place, tensor))
        answers.turn()
        return walk(result, Tensor, answers.put)

    while True:
        try:
            command, arguments = line.recv()
        except (OSError, EOFError):
            return
        line.send(outcome(do, command, arguments))


def workers(trainer: Trainer, count: int, lend: bool) -> Workers:
    """`count` forked workers. Errors: `ConfigError` where processes cannot be forked."""
    device = trainer.work.split.x0.device
    if not sys.platform.startswith("linux") or device.type != "cpu":
        raise ConfigError(f"workers = {count}: worker processes need Linux and the CPU; this is {sys.platform}, {device}")
    board = Arena(shared=True)
    ours: list[Connection] = []

    def share(held: State) -> Any:
        board.turn()
        return walk(held, Tensor, board.put)

    return Workers(lambda: Forked(trainer, board, ours), share, count, lend)
