"""An experiment: task, method and how long, as one frozen record.

Units: rounds; seconds of wall time, simulated ones where it is said; bytes up and down together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from taciturn.aggregation import controlled, running
from taciturn.core.errors import ConfigError, require
from taciturn.fleet import Fleet, named
from taciturn.fleet.clock import LATE
from taciturn.method import Method
from taciturn.tasks.spec import TaskSpec
from taciturn.tasks.task import Task

DTYPES = {"float32": torch.float32, "float64": torch.float64}
Callback = Callable[[dict[str, Any]], None]  # is called with the record's line after every round


@dataclass(frozen=True, slots=True)
class StopAt:
    """End a run early: when the leading metric is reached, after so many bytes (up + down), or seconds."""

    metric: float | None = None
    bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run.

    engine: auto | sequential | loopback | stacked | ray; flower is what `taciturn deploy` sets.
    block: clients of a stacked block (None: by the model's size).
    workers: processes that train, on CPUs (None: one, or with ray all CPUs of the cluster); same blocks, same bits.
    keep_gib: memory of each process for what frozen layers below the first trained one make of the training samples, which
    is then computed once; the oldest make room (0: computed every time). Only where nothing is drawn there (dropout).
    evaluate_every: rounds between two evaluations of the leading metric, on the server's test set where there is one and
    nothing is personal, else on the clients' own held-out data. evaluate_clients_every: rounds between two evaluations of
    the clients' own data (0: at the end only; it costs traffic, counted apart). evaluate_on: which of their splits.
    evaluate_count: at most so many clients in each of them, drawn anew each time (None: all that hold such data).
    target: a level of the leading metric that the report marks.
    fleet: the devices and lines that the clients are imagined to have, which give the run an axis of simulated time: a name
    (reference, phones, factory, datacentre, mixed) or a `Fleet`; None: the reference device for all.
    deadline: simulated seconds of a round after which a client is late (None: the round waits for all). late: "drop": its
    update is not used, and its state is as if it had not been drawn; "discount": it counts deadline / its time as much.
    Errors: `ConfigError` where they make no sense with the method.
    """

    task: Task | TaskSpec
    method: Method = Method()
    rounds: int = 20
    seed: int = 0
    name: str = "run"
    engine: str = "auto"
    block: int | None = None
    workers: int | None = None
    keep_gib: float = 1.0
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    evaluate_every: int = 1
    evaluate_clients_every: int = 0
    evaluate_on: Literal["test", "validation", "train"] = "test"
    evaluate_count: int | None = None
    checkpoint_every: int = 1
    target: float | None = None
    fleet: Fleet | str | None = None
    deadline: float | None = None
    late: Literal["drop", "discount"] = "drop"
    stop_at: StopAt = StopAt()

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"rounds: at least 1; got {self.rounds}")
        require(self.workers is None or self.workers >= 1, f"workers: at least 1 process; got {self.workers}")
        require(self.keep_gib >= 0, f"keep_gib: at least 0; got {self.keep_gib}")
        require(self.evaluate_every >= 1, f"evaluate_every: at least 1 round; got {self.evaluate_every}")
        require(self.evaluate_clients_every >= 0, f"evaluate_clients_every: at least 0; got {self.evaluate_clients_every}")
        count = self.evaluate_count
        require(count is None or count >= 1, f"evaluate_count: at least 1 client; got {count}")
        require(self.checkpoint_every >= 1, f"checkpoint_every: at least 1 round; got {self.checkpoint_every}")
        if isinstance(self.fleet, str):
            named(self.fleet)
        _check_deadline(self.deadline, self.late, self.method)

    def replace(self, **fields: Any) -> Experiment:
        """The same experiment with some fields changed."""
        return replace(self, **fields)


def _check_deadline(deadline: float | None, late: str, method: Method) -> None:
    """A deadline needs a round that can end without some, and a discount weights that may differ from round to round."""
    require(deadline is None or 0 < deadline < math.inf, f"deadline: simulated seconds above 0; got {deadline}")
    require(late in LATE, f"late: {' or '.join(LATE)}; got {late!r}")
    if deadline is None:
        return
    if method.sync.observer == "server":
        raise ConfigError(
            f"deadline: with method.sync = {method.sync} all clients wait for the slowest at every look of the server, so "
            'one that is late makes all late; use sync = every or fda(monitor = "local"), or no deadline'
        )
    if late == "discount" and isinstance(method.aggregator, (running, controlled)):
        raise ConfigError(
            f'late: "discount" changes the weights of clients from round to round, and method.aggregator = '
            f'{type(method.aggregator).__name__} adds up what it knows of them with fixed ones; use late = "drop"'
        )
