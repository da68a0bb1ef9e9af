"""The line between server and clients: what is sent, what it costs, and what each client is known to hold.

Symbols: m clients `ids` [m] of a block; a payload [m, ..] has one row for each of them. The carrier decides whether rows
pass as they are or as bytes; everything is counted here, in one place, for every engine alike. What the server knows of a
client is a row of the store: the version it acknowledged (-1: none) and a bit for each thing that is sent to it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import WireError
from taciturn.core.payload import nbytes
from taciturn.core.state import State, row, stack, tree_map
from taciturn.core.types import Cast, Payload
from taciturn.core.vector import Kind, Layout, Part, Vector, pieces_of
from taciturn.engines.store import ClientStore
from taciturn.wire.format import FRAME, Schema
from taciturn.wire.ledger import Ledger

_BITS = 63


class Carrier(Protocol):
    """How messages cross the line."""

    def introduce(self, schema: Schema) -> int:
        """Make a schema known to the receiver -> bytes of its text."""
        ...

    def move(self, kind: str, payload: Payload, round: int, ids: Tensor) -> tuple[Payload, Tensor]:
        """payload [m, ..] -> what arrives [m, ..], and the bytes of each packed payload [m]."""
        ...


def widened(held: State, part: Part | None) -> State:
    """What is held of a part of x, as x [d] with zeros elsewhere."""
    return held if part is None else held | {"x": part.fill(held["x"])}


class Post:
    """Messages, acknowledged versions and the ledger.

    copies: each client keeps its own copy of the model, built from nothing but the bytes it got (loopback); else all
    share the server's record of what a receiver of the newest version holds, which is the same by the same text. base:
    layers that take products, at zero before the first; kinds: of clients.
    """

    def __init__(
        self,
        carrier: Carrier,
        broadcast: Broadcast,
        layout: Layout,
        clients: ClientStore,
        x0: Vector,
        *,
        copies: bool,
        base: Layout = Layout((), ()),
        kinds: Sequence[Kind] = (),
    ) -> None:
        self.ledger, self.carrier = Ledger(), carrier
        self._broadcast, self._layout = broadcast, layout
        newcomer = {"version": torch.tensor(-1), "met": torch.tensor(0)}
        self._known = clients.table("post", newcomer)
        self._bits: dict[str, int] = {}  # what is sent once -> its bit of "met"
        self._schemas: dict[str, Schema] = {}  # by way and id, to introduce them again after a restart
        self._apart = copies
        self._newcomer: State = {"base": base.views(x0.new_zeros(base.d))} if base.names else {}
        self._newcomer |= {"x": x0} if broadcast.start == "known" else {}
        self._pieces = pieces_of(layout, kinds)
        kept = copies and (broadcast.of == "change" or self._newcomer or self._pieces)
        self._copies = clients.table("copy", {"x": x0} | self._newcomer) if kept else None
        self._arrived: dict[int, State] = {}
        self.round = 0

    def begin(self, round: int) -> None:
        """A new round: what arrived before and was not acknowledged is forgotten."""
        self.round, self._arrived = round, {}

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
        extra = sizes.clamp(max=int(nbytes(row(riders, 0))))  # a message that was compressed may be smaller than that
        self.ledger.count(way, kind, ids, sizes - extra, FRAME)
        if riders:
            self.ledger.count(way, "stats", ids, extra, 0, messages=0)
        return received

    def enrol(self, ids: Tensor, facts: Payload) -> None:
        """A client's first message tells what the method needs of its data: facts [m, ..], how many samples it has."""
        fresh = self._first_time("enrolled", ids)
        if len(fresh):
            self.message("up", "setup", fresh, {name: row[torch.isin(ids, fresh)] for name, row in facts.items()})

    def model(self, kind: str, ids: Tensor, cast: Cast, part: Part | None = None) -> State:
        """Each client gets the frames it lacks (a bare header if none) -> what a client of this block now holds.

        part: of x, which the cast is of and these clients hold.
        """
        versions, held = self.versions(ids), cast.held
        layout = self._layout if part is None else part.layout
        for since in dict.fromkeys(versions.tolist()):
            clients = ids[versions == since]
            copy = self._copy(clients)
            copy = copy | {"x": part.cut(copy["x"])} if part is not None and "x" in copy else copy
            for frame in self._broadcast.frames(cast, since) or [{}]:
                rows = {name: tensor.expand(len(clients), *tensor.shape) for name, tensor in frame.items()}
                received = self.message("down", kind, clients, rows)
                if self._apart and frame:
                    copy = self._broadcast.apply(copy, row(received, 0), layout, self._pieces)
            if self._apart:  # a block of one: this client's own copy
                held = copy
                if kind == "model":
                    self._arrived[int(clients[0])] = widened(copy, part)
        return widened(held, part)

    def _copy(self, clients: Tensor) -> State:
        """What the client of a block of one has built from the bytes it got."""
        if self._copies is None or not self._copies.written(clients[:1]).all():
            return self._newcomer
        return row(self._copies.read(clients[:1]), 0)

    def versions(self, ids: Tensor) -> Tensor:
        """The version of the model that each client acknowledged; -1: none."""
        known: Tensor = self._known.read(ids)["version"]
        return known

    def expect(self, ids: Tensor) -> None:
        """Messages to these clients follow: their rows go to the journal at once instead of block by block."""
        self._known.touch(ids)

    def acknowledge(self, ids: Tensor, cast: Cast) -> None:
        """These clients answered: from now on they provably hold this version."""
        known = self._known.read(ids)
        self._known.write(ids, known | {"version": torch.full_like(known["version"], cast.version)})
        if self._copies is not None:
            for i in ids.tolist():
                self._copies.write(torch.tensor([i]), stack([self._arrived.pop(i)]))

    def _first_time(self, what: str, ids: Tensor) -> Tensor:
        """The clients that have not met it; from now on they have."""
        bit = self._bits.setdefault(what, len(self._bits))
        if bit >= _BITS:
            raise WireError(f"messages of more than {_BITS} schemas; the payloads of a codec must keep their shapes")
        known = self._known.read(ids)
        fresh = (known["met"] >> bit) & 1 == 0
        if fresh.any():
            known = tree_map(lambda tensor: tensor[fresh], known)
            self._known.write(ids[fresh], known | {"met": known["met"] | (1 << bit)})
        return ids[fresh]

    def export(self) -> State:
        """Schemas and the bits of what clients have met; the clients' rows are in the store."""
        schemas = {name: torch.tensor(list(schema.text), dtype=torch.uint8) for name, schema in self._schemas.items()}
        return {"schemas": schemas, "bits": {name: torch.tensor(bit) for name, bit in self._bits.items()}}

    def restore(self, state: State) -> None:
        """The inverse of `export`."""
        self._bits = {name: int(bit) for name, bit in state.get("bits", {}).items()}
        for name, text in state.get("schemas", {}).items():
            self._schemas[name] = Schema.parse(bytes(text.tolist()))
            self.carrier.introduce(self._schemas[name])
