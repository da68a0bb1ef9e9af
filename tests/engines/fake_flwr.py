"""As much of flwr as the server's line and a client's file use, in this process."""

from __future__ import annotations

import itertools
import types
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass
class Array:
    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


class Message:
    def __init__(self, content=None, *, dst_node_id=0, message_type="", ttl=0.0, reply_to=None, error=None) -> None:
        self.content, self.error, self.kind, self.node = content, error, message_type, dst_node_id
        self.metadata = SimpleNamespace(reply_to_message_id=None if reply_to is None else reply_to.number)

    def has_error(self) -> bool:
        return self.error is not None


class App:
    """ServerApp and ClientApp."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def __getattr__(self, kind: str):
        def register():
            def keep(handler):
                self.handlers[kind] = handler
                return handler

            return keep

        return register


def modules() -> dict[str, types.ModuleType]:
    """For sys.modules."""
    names = {"Array": Array, "ArrayRecord": dict, "ConfigRecord": dict, "RecordDict": dict, "Message": Message}
    app, client, server, flwr = (types.ModuleType(n) for n in ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr"))
    vars(app).update(names)
    client.ClientApp, server.ServerApp = App, App
    flwr.app, flwr.clientapp, flwr.serverapp = app, client, server
    return {"flwr": flwr, "flwr.app": app, "flwr.clientapp": client, "flwr.serverapp": server}


@dataclass
class Grid:
    """Nodes are handlers: (message) -> reply. Answers come at the second look."""

    nodes: dict[int, Any]
    waiting: dict[str, Any] = field(default_factory=dict)
    numbers: Any = field(default_factory=itertools.count)

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages) -> list[str]:
        numbers = []
        for message in messages:
            message.number = f"m{next(self.numbers)}"
            numbers.append(message.number)
            self.waiting[message.number] = [2, message]
        return numbers

    def pull_messages(self, numbers) -> list[Message]:
        found = []
        for number in numbers:
            entry = self.waiting.get(number)
            if entry is None:
                continue
            entry[0] -= 1
            if entry[0] <= 0:
                del self.waiting[number]
                reply = self.nodes[entry[1].node](entry[1])
                found += [] if reply is None else [reply]
        return found


def shipped(app):
    """The client's file of a bundle, run as Flower would."""
    space = {"__name__": "taciturn_client", "__file__": str(app / "taciturn_client.py")}
    exec(compile((app / "taciturn_client.py").read_text(), "taciturn_client.py", "exec"), space)
    return space["client"]


def node(app, state, which, of, **told):
    """A node of a grid; told: more of its node config."""
    client = shipped(app)
    config = {"partition-id": which, "num-partitions": of, "state-dir": str(state)} | told
    context = SimpleNamespace(node_config=config, run_config={})
    return lambda message: client.handlers[message.kind](message, context)
