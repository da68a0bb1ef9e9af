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

    def introduce(self, schema: Schema, way: str, ids: Tensor) -> int:
        """Make a schema known to the receivers of this way; ids [m]: these clients' -> bytes of its text."""
        ...

    def move(self, way: str, kind: str, payload: Payload, round: int, ids: Tensor) -> tuple[Payload, Tensor]:
        """payload [m, ..] -> what arrives [m, ..], and the bytes of each packed payload [m]."""
        ...


def widened(held: State, part: Part | None) -> State:
    """What is held of a part of x, as x [d] with zeros elsewhere."""
    return held if part is None else held | {"x": part.fill(held["x"])}


def narrowed(held: State, part: Part | None) -> State:
    """What is held of x [d], as the part of it that is sent to these clients."""
    return held if part is None or "x" not in held else held | {"x": part.cut(held["x"])}


def nothing_held(base: Layout, x0: Vector, broadcast: Broadcast) -> State:
    """What a client holds before its first message: layers that take products, at zero; the first model, if it is known."""
    held: State = {"base": base.views(x0.new_zeros(base.d))} if base.names else {}
    return held | ({"x": x0} if broadcast.start == "known" else {})


def keeps_copies(broadcast: Broadcast, layout: Layout, base: Layout, kinds: Sequence[Kind]) -> bool:
    """True if a model is built from more than its own frames, so that a client keeps what it holds."""
    return broadcast.of == "change" or bool(base.names) or bool(pieces_of(layout, kinds))


class Post:
    """Messages, acknowledged versions and the ledger.

    copies: each client keeps its own copy of the model, built from nothing but the bytes it got (loopback); else all
    share the server's record of what a receiver of the newest version holds, which is the same by the same text. away: they
    keep it themselves (site.py); here is only the generation of their state that has it. base: layers that take products,
    at zero before the first; kinds: of clients.
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
        away: bool = False,
        base: Layout = Layout((), ()),
        kinds: Sequence[Kind] = (),
    ) -> None:
        self.ledger, self.carrier = Ledger(), carrier
        self._broadcast, self._layout = broadcast, layout
        newcomer = {"version": torch.tensor(-1), "met": torch.tensor(0)}
        self._known = clients.table("post", newcomer)
        self._bits: dict[str, int] = {}  # what is sent once -> its bit of "met"
        self._schemas: dict[str, Schema] = {}  # by way and id, to introduce them again after a restart
        self._apart, self._away = copies, away
        self._newcomer = nothing_held(base, x0, broadcast)
        self._pieces = pieces_of(layout, kinds)
        kept = copies and keeps_copies(broadcast, layout, base, kinds)
        copy = {"generation": torch.tensor(0)} if away else {"x": x0} | self._newcomer
        self._copies = clients.table("copy", copy) if kept or away else None
        self._arrived: dict[int, State] = {}
        self._fresh: list[tuple[Tensor, int]] = []  # what was sent down for the first time in this round: ids, bit
        self.round = 0

    def begin(self, round: int) -> None:
        """A new round: what arrived before and was not acknowledged is forgotten."""
        self.round, self._arrived, self._fresh = round, {}, []

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
            self.ledger.count(way, stage, fresh, self.carrier.introduce(schema, way, fresh), FRAME)
        received, sizes = self.carrier.move(way, kind, whole, self.round, ids)
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
            copy = narrowed(self._copy(clients), part)
            for frame in self._broadcast.frames(cast, since) or [{}]:
                rows = {name: tensor.expand(len(clients), *tensor.shape) for name, tensor in frame.items()}
                received = self.message("down", kind, clients, rows)
                if self._apart and frame:
                    copy = self._broadcast.apply(copy, row(received, 0), layout, self._pieces)
            if self._apart:  # a block of one: this client's own copy
                held = copy
                if kind == "model":
                    self._arrived[int(clients[0])] = widened(copy, part)
            elif self._away and kind == "model":
                self._arrived |= {i: {"generation": torch.tensor(self.round + 1)} for i in clients.tolist()}
        return widened(held, part)

    def _copy(self, clients: Tensor) -> State:
        """What the client of a block of one has built from the bytes it got."""
        if self._copies is None or self._away or not self._copies.written(clients[:1]).all():
            return self._newcomer
        return row(self._copies.read(clients[:1]), 0)

    def versions(self, ids: Tensor) -> Tensor:
        """The version of the model that each client acknowledged; -1: none."""
        known: Tensor = self._known.read(ids)["version"]
        return known

    def expect(self, ids: Tensor, round: int) -> None:
        """An evaluation of all these clients: their rows go to the journal at once instead of block by block."""
        self.round, self._fresh = round, []
        self._known.touch(ids)

    def acknowledge(self, ids: Tensor, cast: Cast) -> None:
        """These clients answered: from now on they provably hold this version."""
        known = self._known.read(ids)
        self._known.write(ids, known | {"version": torch.full_like(known["version"], cast.version)})
        if self._copies is not None:
            for i in ids.tolist():
                self._copies.write(torch.tensor([i]), stack([self._arrived.pop(i)]))

    def copies(self, ids: Tensor) -> Tensor:
        """Of clients that keep their copies: the generation that has what they acknowledged [m]; 0: none."""
        assert self._copies is not None, "clients that are away"
        generation: Tensor = self._copies.read(ids)["generation"]
        return generation

    def met(self, i: int) -> list[str]:
        """What has been sent once between the server and a client, both ways."""
        met = int(self._known.read(torch.tensor([i]))["met"])
        return [name for name, bit in self._bits.items() if met >> bit & 1]

    def forget(self, ids: Tensor) -> None:
        """Nobody knows whether these clients got what was sent to them in this round: it is sent again."""
        for fresh, bit in self._fresh:
            gone = ids[torch.isin(ids, fresh)]
            known = self._known.read(gone)
            self._known.write(gone, known | {"met": known["met"] & ~(1 << bit)})

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
            if what.startswith("down"):
                self._fresh.append((ids[fresh], bit))
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
            self.carrier.introduce(self._schemas[name], name.split("-")[0], torch.zeros(0, dtype=torch.int64))
