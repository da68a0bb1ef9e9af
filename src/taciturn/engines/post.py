"""The line between server and clients: what is sent, what it costs, and what each client is known to hold.

Symbols: m clients `ids` [m] of a block; a payload [m, ..] has one row for each of them. The carrier decides whether rows
pass as they are or as bytes; everything is counted here, in one place, for every engine alike.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from taciturn.core.broadcast import Broadcast
from taciturn.core.state import State, row
from taciturn.core.types import Cast, Payload
from taciturn.core.vector import Layout
from taciturn.wire.format import FRAME, Schema, nbytes
from taciturn.wire.ledger import Ledger


class Carrier(Protocol):
    """How messages cross the line."""

    def introduce(self, schema: Schema) -> int:
        """Make a schema known to the receiver -> bytes of its text."""
        ...

    def move(self, kind: str, payload: Payload, round: int, ids: Tensor) -> tuple[Payload, Tensor]:
        """payload [m, ..] -> what arrives [m, ..], and the bytes of each packed payload [m]."""
        ...


class Post:
    """Messages, acknowledged versions and the ledger.

    copies: each client keeps its own copy of the model, built from nothing but the bytes it got (loopback); else all
    share the server's record of what a receiver of the newest version holds, which is the same by the same text.
    """

    def __init__(self, carrier: Carrier, broadcast: Broadcast, layout: Layout, *, copies: bool) -> None:
        self.ledger, self.carrier = Ledger(), carrier
        self._broadcast, self._layout = broadcast, layout
        self._acks: dict[int, int] = {}  # client -> version of the model it acknowledged
        self._met: dict[str, set[int]] = {}  # what was sent once -> the clients that have it
        self._schemas: dict[str, Schema] = {}  # by way and id, to introduce them again after a restart
        self._copies: dict[int, State] | None = {} if copies else None
        self._arrived: dict[int, State] = {}
        self.round = 0

    def message(self, way: str, kind: str, ids: Tensor, payload: Payload, riders: Payload | None = None) -> Payload:
        """One message of each client -> what arrives. way: "up" or "down"; riders: numbers counted as "stats".

        A schema that a client has not met goes first, as a message of kind "setup" (in an evaluation: "evaluate", so that
        how often one evaluates changes no other figure).
        """
        riders = riders or {}
        whole = payload | riders
        schema = Schema.of(row(whole, 0))
        stage = "evaluate" if kind == "evaluate" else "setup"
        name = f"{way}-{stage}-{schema.id}"
        fresh = self._first_time(name, ids)
        if len(fresh):
            self._schemas[name] = schema
            self.ledger.count(way, stage, fresh, self.carrier.introduce(schema), FRAME)
        received, sizes = self.carrier.move(kind, whole, self.round, ids)
        extra = int(nbytes(row(riders, 0)))
        self.ledger.count(way, kind, ids, sizes - extra, FRAME)
        if riders:
            self.ledger.count(way, "stats", ids, extra, 0, messages=0)
        return received

    def enrol(self, ids: Tensor, samples: Tensor) -> None:
        """A client's first message tells how many samples it has."""
        fresh = self._first_time("enrolled", ids)
        if len(fresh):
            self.message("up", "setup", fresh, {"samples": samples[torch.isin(ids, fresh)]})

    def model(self, kind: str, ids: Tensor, cast: Cast) -> State:
        """Each client gets the frames it lacks (a bare header if none) -> what a client of this block now holds."""
        by_version: dict[int, list[int]] = {}
        for i in ids.tolist():
            by_version.setdefault(self._acks.get(i, -1), []).append(i)
        held = cast.held
        for since, clients in by_version.items():
            copy = self._copies.get(clients[0], {}) if self._copies is not None else {}
            for frame in self._broadcast.frames(cast, since) or [{}]:
                rows = {name: tensor.expand(len(clients), *tensor.shape) for name, tensor in frame.items()}
                received = self.message("down", kind, torch.tensor(clients), rows)
                if self._copies is not None and frame:
                    copy = self._broadcast.apply(copy, row(received, 0), self._layout)
            if self._copies is not None:  # a block of one: this client's own copy
                held = self._arrived[clients[0]] = copy
        return held

    def acknowledge(self, client: int, cast: Cast) -> None:
        """The client answered: from now on it provably holds this version."""
        self._acks[client] = cast.version
        if self._copies is not None and self._broadcast.of == "change":
            self._copies[client] = self._arrived[client]

    def _first_time(self, what: str, ids: Tensor) -> Tensor:
        met = self._met.setdefault(what, set())
        fresh = [i for i in ids.tolist() if i not in met]
        met.update(fresh)
        return torch.tensor(fresh, dtype=torch.int64)

    def export(self) -> State:
        """Acknowledged versions, schemas, who has met them, and copies, as one record."""
        acks = torch.tensor(sorted(self._acks.items()), dtype=torch.int64).reshape(-1, 2)
        met = {what: torch.tensor(sorted(ids), dtype=torch.int64) for what, ids in self._met.items()}
        schemas = {name: torch.tensor(list(schema.text), dtype=torch.uint8) for name, schema in self._schemas.items()}
        copies = {str(i): held for i, held in (self._copies or {}).items()}
        return {"acks": acks, "met": met, "schemas": schemas, "copies": copies}

    def restore(self, state: State) -> None:
        """The inverse of `export`."""
        self._acks = {int(i): int(v) for i, v in state["acks"].tolist()}
        self._met = {what: set(ids.tolist()) for what, ids in state.get("met", {}).items()}
        for name, text in state.get("schemas", {}).items():
            self._schemas[name] = Schema.parse(bytes(text.tolist()))
            self.carrier.introduce(self._schemas[name])
        if self._copies is not None:
            self._copies = {int(i): held for i, held in state.get("copies", {}).items()}
