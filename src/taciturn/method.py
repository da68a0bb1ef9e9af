"""A method is a choice of parts; every field can be changed alone.

what is shared x when to synchronise x how it is encoded, up and down x how clients train x how the server aggregates
and steps x who takes part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from taciturn.aggregation import weighted
from taciturn.codecs import identity
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import MethodError, require
from taciturn.core.types import (
    Aggregator,
    Codec,
    Participation,
    Partition,
    ServerOptimizer,
    Solver,
    SyncRule,
)
from taciturn.participation import all as everyone
from taciturn.partition import full
from taciturn.server import sgd as server_sgd
from taciturn.solvers import sgd
from taciturn.sync import every


@dataclass(frozen=True, slots=True)
class Method:
    """The parts of a federated method. The defaults are FedAvg (McMahan et al. 2017) with all clients, one epoch a round.

    batch_size: samples of a local step (a client with fewer uses all it has). Errors: `MethodError` for parts that make
    no sense together.

    >>> Method().replace(batch_size=10).batch_size
    10
    """

    partition: Partition = full()
    participation: Participation = everyone()
    sync: SyncRule = every()
    solver: Solver = sgd()
    codec: Codec = identity()
    aggregator: Aggregator = weighted()
    server: ServerOptimizer = server_sgd()
    broadcast: Broadcast = Broadcast(identity())
    batch_size: int = 32

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"method.batch_size: at least 1 sample; got {self.batch_size}")
        if self.broadcast.of == "change" and not self.broadcast.codec.lossy:
            raise MethodError(
                'method.broadcast: of = "change" with a lossless codec costs what of = "model" costs and needs a log; '
                'use of = "model"'
            )

    def replace(self, **parts: Any) -> Method:
        """The same method with some parts changed."""
        return replace(self, **parts)
