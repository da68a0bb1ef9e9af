"""What the drop-in parts stand on: a grid with something in between, and records of Flower as tensors.

Flower has mods on the client, `mod(message, context, call_next) -> reply`, and none on the server. `Between` is one there:
`exchange(messages, send) -> replies` around the grid that a strategy speaks over. So a strategy of anybody runs its own
`start`, and sees plain arrays in its messages and replies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taciturn.core.errors import ConfigError, require
from taciturn.core.state import State, flatten, load_state, save_state
from taciturn.core.vector import Layout, Vector
from taciturn.engines.flower import modules

Messages = list[Any]  # of flwr.app.Message
Send = Callable[[Messages], Messages]
Exchange = Callable[[Messages, Send], Messages]
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class Between:
    """A grid whose exchanges go through `exchange`; all else is the grid's own.

    crossed: bytes up and down so far, as they are nearest to the wire: grids within each other share the innermost's.
    Errors: `ConfigError` for push_messages and pull_messages, which would go around it.
    """

    grid: Any
    exchange: Exchange
    crossed: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        if isinstance(self.grid, Between):
            self.crossed = self.grid.crossed

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Messages:
        """The replies to these messages; each exchange that is made of them may take `timeout` seconds."""

        def send(some: Messages) -> Messages:
            replies = list(self.grid.send_and_receive(some, timeout=timeout))
            if not isinstance(self.grid, Between):
                self.crossed[0] += sum(sum(sizes(reply.content)) for reply in replies if not reply.has_error())
                self.crossed[1] += sum(sum(sizes(message.content)) for message in some)
            return replies

        return self.exchange(list(messages), send)

    def __getattr__(self, name: str) -> Any:
        if name in ("push_messages", "pull_messages"):
            raise ConfigError(f"taciturn.flower: {name} goes around the wrapped exchange; use grid.send_and_receive")
        return getattr(self.grid, name)


def app() -> Any:
    """flwr.app. Errors: `ConfigError`."""
    return modules("taciturn.flower")[0]


def sizes(content: Any) -> tuple[int, int]:
    """(bytes of the arrays, bytes of all else that Flower counts) of a content."""
    payload = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    return payload, sum(_counted(record) for record in content.values()) - payload


def _counted(record: Any) -> int:
    """Flower's count of a record's bytes, which knows no empty strings and lists; then those of its serialization."""
    try:
        return int(record.count_bytes())
    except (IndexError, ValueError):
        return len(record.deflate())


def trains(message: Any) -> bool:
    """True for "train" and "train.name"."""
    return str(message.metadata.message_type).split(".")[0] == "train"


def without(content: Any, *names: str) -> Any:
    """A content without these records; the records themselves are shared."""
    return app().RecordDict({name: record for name, record in content.items() if name not in names})


def with_records(content: Any, **records: Any) -> Any:
    """A content with more records, or others; `content` stays as it is, for strategies share one among many messages."""
    return app().RecordDict(dict(content.items()) | records)


def the_arrays(content: Any, where: str) -> tuple[str, Any]:
    """Name and record of the arrays of a content. Errors: `ConfigError` if there is not exactly one ArrayRecord."""
    found = content.array_records
    require(len(found) == 1, f"{where}: exactly one ArrayRecord is expected; got {sorted(found) or 'none'}")
    name = next(iter(found))
    return name, found[name]


def arrays_of(record: Any) -> Arrays:
    """An ArrayRecord -> named arrays."""
    return {name: array.numpy() for name, array in record.items()}


def record_of(arrays: Mapping[str, Any]) -> Any:
    """Named NumPy arrays -> an ArrayRecord."""
    made = app()
    return made.ArrayRecord(
        {name: made.Array(np.ascontiguousarray(one).reshape(one.shape)) for name, one in arrays.items()}
    )


def layout_of(arrays: Arrays, names: Iterable[str]) -> Layout:
    """The layout of these arrays, in the order of their names."""
    names = sorted(names)
    return Layout(tuple(names), tuple(tuple(arrays[name].shape) for name in names))


def vector(arrays: Arrays, layout: Layout) -> Vector:
    """Named arrays -> [d] float32."""
    return layout.flatten({name: torch.from_numpy(np.array(arrays[name])) for name in layout.names})


def change(new: Arrays, old: Arrays, layout: Layout) -> Vector:
    """new - old [d] float32, the difference taken in the wider of their dtypes."""
    return vector({name: np.asarray(new[name] - old[name]) for name in layout.names}, layout)


def weights_key(strategy: Any) -> str:
    """The metric that weighs replies, of the strategy within all wrappers."""
    while not hasattr(strategy, "weighted_by_key") and hasattr(strategy, "strategy"):
        strategy = strategy.strategy
    return str(getattr(strategy, "weighted_by_key", "num-examples"))


def weight_of(reply: Any, key: str) -> float:
    """What a reply counts. Errors: `ConfigError` if its metrics do not say."""
    for metrics in reply.content.metric_records.values():
        if key in metrics:
            return float(metrics[key])
    raise ConfigError(f"the reply of node {reply.metadata.src_node_id} has no metric {key!r}, which weighs it")


# ----------------------------------------------------------------------------------------- what a node keeps of a run


def _file(context: Any, name: str) -> Path | None:
    folder = context.node_config.get("state-dir")
    return None if folder is None else Path(str(folder)) / f"flower-{name}-{context.run_id}-{context.node_id}.safetensors"


def recall(context: Any, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `keep` was given last in this run, flat, and its JSON part; ({}, {}) if that is nothing, or was lost."""
    file = _file(context, name)
    if file is not None:
        state, facts = load_state(file) if file.exists() else ({}, {})
        return flatten(state), facts
    kept, place = context.state, f"taciturn.{name}"
    if place not in kept:
        return {}, {}
    found = {path: torch.from_numpy(one) for path, one in arrays_of(kept[place]).items()}
    return found, json.loads(str(kept[f"{place}.facts"]["json"]))


def keep(context: Any, name: str, state: State, facts: dict[str, Any]) -> None:
    """Keep a state for the next message to this node: in a file below the node config's `state-dir`, written atomically,
    if there is one; else in the `Context`, which travels between the node and its processes at every message.
    """
    file = _file(context, name)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_state(file, state, facts)
        return
    context.state[f"taciturn.{name}"] = record_of({path: t.numpy() for path, t in flatten(state).items()})
    context.state[f"taciturn.{name}.facts"] = app().ConfigRecord({"json": json.dumps(facts)})


def shaped(template: State, flat: Mapping[str, Tensor], prefix: str) -> State:
    """The state of the form of `template` whose tensors stand in `flat` below a prefix."""
    return {
        name: shaped(value, flat, f"{prefix}{name}/") if isinstance(value, dict) else flat[prefix + name]
        for name, value in template.items()
    }
