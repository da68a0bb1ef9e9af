"""Workers as actors of a Ray cluster: other processes of this machine, or other machines.

What an actor needs to make its trainer is put into Ray's object store once, the round's model once a round; actors fetch
both themselves. With every block travel its clients' numbers and records, and back come their encoded updates and new
records. Tensors cross as plain bytes, so that a view does not drag its whole storage along, and are copied out of Ray's
memory, whose alignment is not torch's. An actor computes with one torch thread, as a forked worker does.
"""

from __future__ import annotations

import math
import platform
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taciturn.core.errors import ConfigError, RunError, require
from taciturn.core.state import State
from taciturn.engines.crew import Gone, Workers, outcome, walk
from taciturn.engines.memory import keep_freed_memory
from taciturn.engines.train import Trainer

PATIENCE = 60.0  # seconds until an actor must have a CPU and have answered
RETRIES = 3  # deaths that are borne in a round, beyond every worker's first: a machine takes all its actors with it
Found = tuple[bool, Any]  # of crew.outcome


@dataclass(frozen=True)
class Flat:
    """A tensor on its way. data: its bytes [n] uint8."""

    data: np.ndarray[Any, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Flat:
        """The bytes of a tensor: its own memory where that is dense."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return Flat(flat.numpy(), tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """A tensor of its own memory.

        >>> Flat.of(torch.arange(6.0).reshape(2, 3)[:, 1]).tensor()
        tensor([1., 4.])
        """
        assert len(self.data) == math.prod(self.shape) * self.dtype.itemsize
        out = torch.empty(self.shape, dtype=self.dtype)
        if len(self.data):
            out.view(-1).view(torch.uint8).numpy()[:] = self.data
        return out


def _ray() -> Any:
    """The package. Errors: `ConfigError` where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("engine = 'ray' needs Ray: pip install 'taciturn[ray]'") from error
    return ray


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _versions() -> dict[str, str]:
    """What must be the same on all machines, for the same bits and for code that travels."""
    found = {name: version(name) for name in ("taciturn", "torch", "numpy")}
    return found | {"python": ".".join(platform.python_version_tuple()[:2])}


class Actor:
    """In a process of the cluster: a trainer. Errors are answers."""

    def here(self) -> dict[str, str]:
        """A sign of life: the versions there."""
        return _versions()

    def start(self, make: tuple[Any]) -> Found:
        """make: a reference to the function that makes the trainer; in a tuple, else Ray would fetch it unasked."""
        torch.set_num_threads(1)
        keep_freed_memory()
        return outcome(self._start, *make)

    def _start(self, make: Any) -> None:
        self._trainer: Trainer = _ray().get(make)()

    def do(self, command: str, arguments: Any) -> Found:
        """A command of the trainer; references among the arguments are fetched."""
        return outcome(self._do, command, arguments)

    def _do(self, command: str, arguments: Any) -> Any:
        ray = _ray()
        found = walk(walk(arguments, ray.ObjectRef, ray.get), Flat, Flat.tensor)
        return walk(getattr(self._trainer, command)(*found), Tensor, Flat.of)


class Remote:
    """One actor, and the talk with it: a worker of crew.py."""

    def __init__(self, make: Any, cpus: int) -> None:
        self._ray, self.lost, self.closed = _ray(), False, False
        self.actor = self._ray.remote(Actor).options(num_cpus=cpus, max_restarts=0, max_task_retries=0).remote()
        self._here: Any = self.actor.here.remote()
        self._started: Any = self.actor.start.remote((make,))
        self._waiting: deque[Any] = deque()

    def placed(self) -> bool:
        """True if it answers, or has died, within `PATIENCE` seconds; False if no machine had a CPU for it."""
        return bool(self._ray.wait([self._here], timeout=PATIENCE)[0])

    def tell(self, command: str, *arguments: Any) -> None:
        """Send a command. Errors: `Gone`."""
        self._waiting.append(self._try(self.actor.do.remote, command, walk(arguments, Tensor, Flat.of)))

    def answer(self) -> Any:
        """The next answer. Errors: `Gone`, and what the trainer raised."""
        if self._here is not None:
            self._arrive()
        good, found = self._try(self._ray.get, self._waiting.popleft())
        if not good:
            raise found
        return walk(found, Flat, Flat.tensor)

    def close(self) -> None:
        """End the actor."""
        self.closed = True
        if self._ray.is_initialized():
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(self.actor)

    def _arrive(self) -> None:
        """Wait until the actor has its trainer. Errors: `RunError`, `ConfigError` with what is wrong there."""
        if not self.placed():
            total, free = (int(of().get("CPU", 0)) for of in (self._ray.cluster_resources, self._ray.available_resources))
            raise RunError(
                f"no CPU for a worker within {PATIENCE:.0f} s: of the cluster's {total} CPUs {free} are free; start more "
                "machines, end other jobs, or resume with fewer workers"
            )
        there, ours = self._try(self._ray.get, self._here), _versions()
        for name in ours:
            require(there[name] == ours[name], f"a machine of the cluster has {name} {there[name]}, this one {ours[name]}")
        good, found = self._try(self._ray.get, self._started)
        if not good:
            raise found
        self._here = self._started = None

    def _try(self, fn: Callable[..., Any], *arguments: Any) -> Any:
        """Errors: `Gone` where actor or machine are lost, `RunError` for all else that Ray says."""
        known = self._ray.exceptions
        lost = known.RayActorError, known.NodeDiedError, known.WorkerCrashedError, known.ObjectLostError
        try:
            return fn(*arguments)
        except lost as error:
            if getattr(error, "actor_init_failed", False):  # the class could not even be imported
                raise RunError(f"a worker could not start: {str(error).strip().splitlines()[-1]}") from error
            self.lost = True
            raise Gone(str(error)) from error
        except known.RayError as error:
            raise RunError(f"a worker failed: {error}") from error


def workers(make: Callable[[], Trainer], count: int | None, device: torch.device) -> Workers:
    """`count` actors, one for each CPU of the cluster unless given. make: called in each of them.

    Ray is started on this machine unless it runs, or RAY_ADDRESS names a cluster. Errors: `ConfigError`.
    """
    ray = _ray()
    require(device.type == "cpu", f"engine = 'ray' trains on the CPU of each actor; this is {device}")
    if not ray.is_initialized():
        try:
            ray.init(include_dashboard=False, logging_level="warning")
        except Exception as error:  # no cluster at RAY_ADDRESS, another version of Ray there, no token, ..
            raise ConfigError(f"engine = 'ray': Ray cannot be reached or started: {_short(error)}") from error
    cpus = int(ray.cluster_resources().get("CPU", 0))
    count = count or max(1, cpus)
    require(count <= cpus, f"workers = {count}: the cluster has {cpus} CPUs, and each worker takes one")
    try:
        sent = ray.put(make)
    except Exception as error:  # whatever a user's object raises when it is to be pickled
        raise ConfigError(f"engine = 'ray': the task cannot be sent to other processes: {_short(error)}") from error
    hired: list[Remote] = []

    def hire() -> Remote:
        replaces = [worker for worker in hired if worker.lost]
        hired[:] = [worker for worker in hired if not (worker.lost or worker.closed)]
        worker = Remote(sent, cpus=1)
        if replaces and not worker.placed():  # its CPU went with its machine: share one
            worker.close()
            worker = Remote(sent, cpus=0)
        hired.append(worker)
        return worker

    def share(held: State) -> Any:
        return ray.put(walk(held, Tensor, Flat.of))

    return Workers(hire, share, count, lend=True, retries=count + RETRIES)
