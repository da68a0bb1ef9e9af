"""Letters over Flower: the one module that imports flwr, and only `flwr.app` and `flwr.serverapp`.

A message to a node holds the letters of the clients that live there: frames as `Array(stype="taciturn")`, whose bytes are
what the ledger accounts, and orders as JSON in a `ConfigRecord`. Client i lives at the node whose `partition-id` is i mod
`num-partitions`: with as many nodes as clients the partition is the client. Where sites agreed on an outline, the number of
the client's site stands in place of i. No Strategy: a round is our own text, with push_messages and pull_messages beneath
it. Needs `pip install 'taciturn[flower]'`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from taciturn.core.errors import ConfigError, RunError, WireError
from taciturn.engines.letters import Letter, order_of, order_text

STYPE = "taciturn"
TYPES = {"hello": "query", "observe": "train", "collect": "train", "measure": "evaluate"}  # of Flower's messages
SHORTEST, LONGEST = 0.05, 0.5  # seconds between two looks for answers
Serve = Callable[["FlowerLine", dict[str, Any]], None]  # line, run config


def modules(what: str = 'engine = "flower"') -> tuple[Any, Any]:
    """flwr.app and flwr.serverapp, for what asks. Errors: `ConfigError` if flwr is not installed."""
    try:
        from flwr import app, serverapp
    except ImportError as error:
        raise ConfigError(f"{what} needs flwr ({error}): pip install 'taciturn[flower]'") from error
    return app, serverapp


def at_home(client: int, homes: Sequence[int], which: int, of: int) -> bool:
    """True if the node `which` of `of` has this client; homes [N]: site of each client, empty: its number."""
    return (homes[client] if 0 <= client < len(homes) else client) % of == which


def content_of(letters: Sequence[Letter]) -> Any:
    """Letters -> the content of one message."""
    app, _ = modules()
    orders = app.ConfigRecord({"clients": [letter.client for letter in letters]})
    records: dict[str, Any] = {"orders": orders}
    for place, letter in enumerate(letters):
        orders[f"order-{place}"] = order_text(letter.order)
        if letter.frames:
            arrays = {
                f"{number:04d}": app.Array(dtype="uint8", shape=(len(frame),), stype=STYPE, data=frame)
                for number, frame in enumerate(letter.frames)
            }
            records[f"frames-{place}"] = app.ArrayRecord(arrays)
    return app.RecordDict(records)


def letters_of(content: Any) -> list[Letter]:
    """The inverse of `content_of`. Errors: `WireError` for content that is none of ours."""
    letters = []
    try:
        orders = content["orders"]
        for place, i in enumerate(orders["clients"]):
            record = content.get(f"frames-{place}", {})
            if any(array.stype != STYPE for array in record.values()):
                raise WireError("frames of another kind than ours")
            frames = tuple(bytes(record[name].data) for name in sorted(record))
            letters.append(Letter(int(i), order_of(orders[f"order-{place}"]), frames))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise WireError(f"a message without letters: {error}") from error
    return letters


@dataclass
class FlowerLine:
    """Letters over a grid. least: nodes to wait for, at most `patience` seconds; nodes: of each node, which of how many.

    homes [N]: the site of each client, where that was agreed on. seconds: of every exchange so far; broken: what nodes
    answered that could not be read, and Flower's own errors.
    """

    grid: Any
    clients: int = 0
    homes: Sequence[int] = ()
    least: int = 1
    patience: float = 600.0
    nodes: dict[int, tuple[int, int]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def there(self) -> list[int]:
        """Clients at nodes that are connected, once enough nodes are. Errors: `RunError` if they do not come."""
        began = time.monotonic()
        while True:
            online = set(self.grid.get_node_ids())
            self._ask(sorted(online - self.nodes.keys()))
            here = [self.nodes[node] for node in sorted(online & self.nodes.keys())]
            if len(here) >= self.least:
                return [i for i in range(self.clients) if any(at_home(i, self.homes, *part) for part in here)]
            if time.monotonic() - began > self.patience:
                raise RunError(
                    f"{len(here)} nodes after {self.patience:.0f} s, and min-available-nodes is {self.least}: "
                    f"start the others, and resume the run. {'; '.join(self.broken[-3:])}".rstrip()
                )
            time.sleep(LONGEST)

    def _ask(self, nodes: list[int]) -> None:
        """New nodes say which part of the clients they have."""
        for node, content in self._talk({node: ("query", content_of(())) for node in nodes}, self.patience):
            try:
                here = content["node"]
                which, of = int(here["partition-id"]), int(here["num-partitions"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                self.broken.append(f"node {node} says nothing of its partition: {error}")
                continue
            if 0 <= which < of:
                self.nodes = {other: part for other, part in self.nodes.items() if part != (which, of)}  # it was replaced
                self.nodes[node] = which, of

    def place(self, client: int) -> int:
        """The node of a client; -1 if there is none."""
        return next((node for node, part in self.nodes.items() if at_home(client, self.homes, *part)), -1)

    def exchange(self, letters: Sequence[Letter], seconds: float) -> Iterator[Letter]:
        """One message to each node that has letters, and the letters in the answers as they come."""
        began, bundles = time.monotonic(), dict[int, list[Letter]]()
        for letter in letters:
            if (node := self.place(letter.client)) >= 0:
                bundles.setdefault(node, []).append(letter)
        told = {node: (TYPES[str(bundle[0].order["command"])], content_of(bundle)) for node, bundle in bundles.items()}
        for node, content in self._talk(told, seconds):
            try:
                found = letters_of(content)
            except WireError as error:
                self.broken.append(f"node {node}: {error}")
                continue
            part = self.nodes[node]
            yield from (
                letter for letter in found if at_home(letter.client, self.homes, *part)
            )  # a node speaks for its own
        self.seconds.append(time.monotonic() - began)

    def _talk(self, told: dict[int, tuple[str, Any]], seconds: float) -> Iterator[tuple[int, Any]]:
        """Messages {node: (type, content)} -> (node, content) of each answer in time; a node that fails gives none."""
        app, _ = modules()
        end, pause = time.monotonic() + seconds, SHORTEST
        ttl = max(seconds, 1.0)
        messages = [
            app.Message(content, dst_node_id=node, message_type=kind, ttl=ttl) for node, (kind, content) in told.items()
        ]
        waiting = {number: node for number, node in zip(self.grid.push_messages(messages), told, strict=True) if number}
        while waiting and time.monotonic() < end:
            for reply in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is None:
                    continue
                pause = SHORTEST
                if reply.has_error():
                    self.broken.append(f"node {node}: {reply.error.code} {reply.error.reason}"[:500])
                else:
                    yield node, reply.content
            time.sleep(min(pause, max(0.0, end - time.monotonic())))
            pause = min(LONGEST, 1.5 * pause)


def server_app(serve: Serve) -> Any:
    """The server's app of a bundle: `serve` runs the rounds over a line."""
    _, serverapp = modules()
    server = serverapp.ServerApp()

    def main(grid: Any, context: Any) -> None:
        serve(FlowerLine(grid), dict(context.run_config))

    server.main()(main)
    return server
