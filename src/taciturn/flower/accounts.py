"""Bytes of a run of Flower, by direction and kind, on `taciturn.wire.Ledger`.

payload: the bytes of all arrays of a message, len(array.data), exact; frame: what else Flower's own count of the message
has (`count_bytes` of its records: names, configs, metrics). Not counted: what Flower puts around it (metadata, HTTP, TLS).
Kinds: "model" and "update" are arrays of train messages and replies, "monitor" train messages and replies without arrays,
"evaluate" and "query" all others.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from taciturn.core.state import write_atomic
from taciturn.flower.between import Between, Messages, Send, app, sizes, trains
from taciturn.wire.ledger import Ledger

Totals = dict[str, dict[str, int]]
LOG = logging.getLogger("flwr")


def kind_of(message: Any, direction: str) -> str:
    """What a message is for."""
    if not trains(message):
        return str(message.metadata.message_type).split(".")[0]
    if not any(len(record) for record in message.content.array_records.values()):
        return "monitor"
    return "model" if direction == "down" else "update"


def text_of(totals: Totals) -> str:
    """Totals as a line.

    >>> text_of({"up/update": {"payload": 10, "frame": 2, "messages": 1}})
    'up/update 10 B of arrays + 2 B in 1 messages'
    """
    lines = (
        f"{name} {e['payload']:,} B of arrays + {e['frame']:,} B in {e['messages']} messages" for name, e in totals.items()
    )
    return "; ".join(lines)


@dataclass
class Ledgered:
    """Around a strategy, outermost: accounts what crosses. Afterwards `totals` has payload, frame and messages by
    "direction/kind", `rounds` a line of each exchange of training and what followed it; `file` gets both as JSON, again
    after each exchange. The totals are logged, and stand as `ledger` in the strategy's result.
    """

    strategy: Any
    file: str | Path | None = None
    totals: Totals = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def start(self, grid: Any, initial_arrays: Any, *more: Any, **told: Any) -> Any:
        """The strategy's `start` -> its result, with `ledger`."""
        ledger, places = Ledger(), dict[int, int]()
        self.rounds.clear()

        def count(message: Any, direction: str, node: int) -> None:
            if not message.has_error():
                payload, frame = sizes(message.content)
                here = torch.tensor([places.setdefault(node, len(places))])
                ledger.count(direction, kind_of(message, direction), here, payload, frame)

        def exchange(messages: Messages, send: Send) -> Messages:
            if messages and kind_of(messages[0], "down") == "model" and ledger.spent(1)[2]:
                self._close(ledger)
            for message in messages:
                count(message, "down", message.metadata.dst_node_id)
            ledger.exchange()
            replies = send(messages)
            for reply in replies:
                count(reply, "up", reply.metadata.src_node_id)
            self.totals = ledger.totals
            self._write()
            return replies

        result = self.strategy.start(Between(grid, exchange), initial_arrays, *more, **told)
        self._close(ledger)
        LOG.info("taciturn: %s", text_of(self.totals))
        result.ledger = self.totals
        return result

    def _close(self, ledger: Ledger) -> None:
        self.rounds.append(ledger.close_round())
        self._write()

    def _write(self) -> None:
        if self.file is not None:
            text = json.dumps({"totals": self.totals, "rounds": self.rounds}, indent=1)
            write_atomic(Path(self.file).expanduser(), [text.encode()])


def ledger_mod() -> Callable[[Any, Any, Any], Any]:
    """A mod, first in `ClientApp(mods=[..])`: the same book for one node, in its `Context`; `totals_of(context)` reads it,
    and it is logged after each message.
    """

    def mod(message: Any, context: Any, call_next: Any) -> Any:
        book = totals_of(context)
        _enter(book, message, "down")
        reply = call_next(message, context)
        if reply.has_content():
            _enter(book, reply, "up")
        context.state[BOOK] = app().ConfigRecord({"json": json.dumps(book)})
        LOG.info("taciturn: node %s: %s", context.node_id, text_of(book))
        return reply

    return mod


BOOK = "taciturn.ledger"


def totals_of(context: Any) -> Totals:
    """What ledger_mod has counted at this node in this run."""
    found: Totals = json.loads(str(context.state[BOOK]["json"])) if BOOK in context.state else {}
    return found


def _enter(book: Totals, message: Any, direction: str) -> None:
    payload, frame = sizes(message.content)
    entry = book.setdefault(f"{direction}/{kind_of(message, direction)}", {"payload": 0, "frame": 0, "messages": 0})
    for name, value in (("payload", payload), ("frame", frame), ("messages", 1)):
        entry[name] += value
