"""ClientApps and a grid in this process, on Flower's own records: each message is written to Flower's bytes and read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

app = pytest.importorskip("flwr.app", reason="flwr is not installed: pip install 'taciturn[flower]'")
COUNTER = "norm.num_batches_tracked"


def inflated(one):
    """A record through Flower's bytes: nothing is shared, and what cannot be written fails here."""
    children = {child.object_id: inflated(child) for child in (one.children or {}).values()}
    return type(one).inflate(one.deflate(), children or None)


def copied(message):
    if message.has_error():
        return app.Message(message.error, metadata=message.metadata)
    return app.Message(inflated(message.content), metadata=message.metadata)


@dataclass
class MemoryGrid:
    """Nodes are ClientApps. lost: (exchange, node) whose reply does not arrive; sent, came: messages that crossed."""

    clients: dict[int, Any]
    lost: set[tuple[int, int]] = field(default_factory=set)
    node_config: dict[str, Any] = field(default_factory=dict)
    spoil: Callable[[Any], None] = lambda reply: None
    contexts: dict[int, Any] = field(default_factory=dict)
    sent: list[Any] = field(default_factory=list)
    came: list[Any] = field(default_factory=list)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def get_node_ids(self) -> list[int]:
        return list(self.clients)

    def context(self, node: int):
        place = {"partition-id": list(self.clients).index(node)} | self.node_config
        return self.contexts.setdefault(node, app.Context(1, node, place, app.RecordDict(), {}))

    def send_and_receive(self, messages, *, timeout=None) -> list[Any]:
        number, replies = next(self.numbers), []
        for message in messages:
            node = message.metadata.dst_node_id
            self.sent.append(copied(message))
            try:
                reply = copied(self.clients[node](copied(message), self.context(node)))
            except Exception as error:
                reply = app.Message(app.Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
            self.spoil(reply)
            if (number, node) not in self.lost:
                self.came.append(copied(reply))
                replies.append(reply)
        return replies

    def errors(self) -> list[str]:
        return [reply.error.reason for reply in self.came if reply.has_error()]

    def size(self, messages, kind: str) -> int:
        """Bytes of arrays."""
        contents = [m.content for m in messages if not m.has_error() and m.metadata.message_type == kind]
        return sum(len(one.data) for c in contents for record in c.array_records.values() for one in record.values())


def record_of(arrays) -> Any:
    return app.ArrayRecord({name: app.Array(np.asarray(one)) for name, one in arrays.items()})


def numpy_of(record) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


def random_model(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {"stem.weight": (6, 5), "stem.bias": (6,), COUNTER: None, "head.weight": (3, 6)}
    arrays = {n: np.array(3) if s is None else rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return record_of(arrays)


def moved(node: int, x: dict[str, np.ndarray], step: float = 0.1) -> dict[str, np.ndarray]:
    """y = x + step (a_node - x) in float32, and a counter that counts in int64."""
    rng = np.random.default_rng(100 + node)
    optimum = {name: rng.normal(size=one.shape) for name, one in sorted(x.items())}
    y = {n: np.asarray((one + step * (optimum[n] - one)).astype(np.float32)) for n, one in x.items()}
    return y | ({COUNTER: np.asarray((x[COUNTER] + 1).astype(np.int64))} if COUNTER in x else {})


def client(node: int, mods=(), train=moved, seen=None, strict: bool = True) -> Any:
    """A ClientApp without randomness; its evaluation is the sum of all values. strict: it knows which records there are."""
    from flwr.clientapp import ClientApp

    made = ClientApp(mods=list(mods))

    @made.train()
    def _train(message, context):
        assert set(message.content) == {"arrays", "config"} or not strict, set(message.content)
        x = numpy_of(message.content["arrays"])
        if seen is not None:
            seen.append(x)
        metrics = app.MetricRecord({"num-examples": 10 + node, "node": float(node)})
        content = {"arrays": record_of(train(node, x)), "metrics": metrics}
        return app.Message(app.RecordDict(content), reply_to=message)

    @made.evaluate()
    def _evaluate(message, context):
        assert set(message.content) == {"arrays", "config"} or not strict, set(message.content)
        total = float(sum(one.sum() for one in numpy_of(message.content["arrays"]).values()))
        metrics = app.MetricRecord({"num-examples": 10 + node, "total": total})
        return app.Message(app.RecordDict({"metrics": metrics}), reply_to=message)

    return made


def grid_of(*mods: Any, nodes: int = 3, train=moved, strict: bool = True, **settings) -> MemoryGrid:
    return MemoryGrid({node: client(node, mods, train, strict=strict) for node in range(1, nodes + 1)}, **settings)


def same(a, b) -> bool:
    a, b = numpy_of(a), numpy_of(b)
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


@pytest.fixture(autouse=True)
def ordered(monkeypatch):
    """A ServerApp's process, where messages can be made; Flower samples nodes at random, here in order."""
    import random

    from flwr.supercore.task_identity import TaskIdentity

    monkeypatch.setattr(random, "sample", lambda nodes, k: list(nodes)[:k])
    for name, value in {"_run_id": 1, "_node_id": 1, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value, raising=False)
