"""Updates that go up, and models that go down, through a codec, around any strategy and any ClientApp of Flower.

A train message has the record "taciturn.compress": number, which message it is to all nodes of this run; accepted, the
newest number of THIS node whose reply was decoded (0: none); codec, a fingerprint of codec and way down. The client sends
u = y - x, its float32 arrays minus what it received, as one frame of wire/format.py in an `Array` of stype "taciturn"; the
strategy sees the plain arrays x + C(u). A lossless codec sends y itself, so the strategy sees its bits. All other arrays
(counters, float64, ..) travel as they are. Header fields of the frame: round, the number; generation, the number up to
which the client's memory stands.

Memories move on acknowledgement: the client keeps the memory that its reply left behind beside the one before, and the next
message says whether that reply was accepted. One that was lost moves nothing on either side; a node that lost its memory
begins anew, on both sides.
Symbols: x, y, u [d] float32.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from taciturn.codecs.memory import starts_apart
from taciturn.core import random
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import RunError, WireError, require
from taciturn.core.state import State
from taciturn.core.types import Codec
from taciturn.core.vector import Layout, Vector
from taciturn.flower.between import (
    Arrays,
    Between,
    Messages,
    Send,
    app,
    arrays_of,
    change,
    keep,
    layout_of,
    recall,
    record_of,
    shaped,
    the_arrays,
    trains,
    vector,
    with_records,
    without,
)
from taciturn.flower.way_down import Down, received, way_down
from taciturn.wire.format import LARGEST, Frame, Schema, pack, unpack

TOLD = "taciturn.compress"
FRAME = "taciturn/update"
RECEIVED = "taciturn.received"  # arrays of a message that was answered without any: a later reply is relative to them
STYPE = "taciturn"


def fingerprint(codec: Codec, down: Broadcast | None) -> str:
    """8 hexadecimal digits that both sides share if they have the same codec and way down. Errors: `ConfigError`."""
    require(
        not starts_apart(codec),
        'error_feedback with into = "start" decides where a client starts, and here the app does; use into = "message"',
    )
    return f"{zlib.crc32(repr((codec, down)).encode()):08x}"


def _exact(codec: Codec, down: Broadcast | None) -> bool:
    """True if y is sent, not its change: nothing is lost on either way."""
    return not codec.lossy and (down is None or not down.codec.lossy)


# ------------------------------------------------------------------------------------------------------- the client


def compress_mod(codec: Codec, down: Codec | Broadcast | None = None, seed: int = 0) -> Callable[[Any, Any, Any], Any]:
    """A mod for `ClientApp(mods=[..])`: sends the update through `codec`, the same as in the server's `Compressed`.

    It stands before mods that call the handler more than once (fda_mod), and behind ledger_mod. seed: of the codec's random
    draws, with the node's partition-id (else its node id) and the number of the message. State: `keep` in between.py.
    Errors, as error replies: `ConfigError` if the strategy is not wrapped, has another codec, or the reply's arrays are not
    those of the message.
    """
    way = way_down(down)
    mark = fingerprint(codec, way)

    def mod(message: Any, context: Any, call_next: Any) -> Any:
        told = message.content.config_records.get(TOLD)
        if told is None:
            require(not trains(message), _NOT_WRAPPED)
            return call_next(message, context)
        require(str(told["codec"]) == mark, _other(codec, way, mark, str(told["codec"])))
        message.content = received(without(message.content, TOLD), told, context, way)
        if not trains(message):
            return call_next(message, context)
        sent = message.content.array_records
        x = next(iter(sent.values())) if sent else context.state.get(RECEIVED)
        reply = call_next(message, context)
        if not reply.has_content():
            return reply
        if not reply.content.array_records:
            context.state[RECEIVED] = x
            return reply
        if x is None:
            raise RunError("compress_mod: this node was sent no arrays, and has lost those of the message before")
        context.state.pop(RECEIVED, None)
        reply.content = _encoded(reply.content, arrays_of(x), told, context, codec, way, seed)
        return reply

    return mod


def _encoded(content: Any, x: Arrays, told: Any, context: Any, codec: Codec, way: Broadcast | None, seed: int) -> Any:
    """A reply with its float32 arrays in one frame; the memory that it leaves behind is kept, beside the one before."""
    name, record = the_arrays(content, "compress_mod: the train function's reply")
    y = arrays_of(record)
    same = x.keys() == y.keys() and all(x[key].shape == y[key].shape for key in x)
    require(
        same, f"compress_mod: the reply must have the arrays of the message, {sorted(x)}; got {sorted(y)}, or new shapes"
    )
    layout = layout_of(y, (key for key, one in y.items() if one.dtype == "float32"))
    require(layout.d > 0, "compress_mod: the reply has no float32 array to encode; leave compress_mod and Compressed out")
    number, accepted, fresh = int(told["number"]), int(told["accepted"]), codec.init(layout)
    tx, base = _standing(context, accepted, fresh[0], layout.fingerprint)
    who = int(context.node_config.get("partition-id", context.node_id))
    key = random.fold(random.key(seed), "flower", who, number)
    u = vector(y, layout) if _exact(codec, way) else change(y, x, layout)
    payload, after = codec.encode(u, tx, key, layout=layout, knobs={})
    if fresh[0] or fresh[1]:
        facts = {"base": base, "pending": number, "layout": layout.fingerprint}
        keep(context, "memory", {"base": tx, "pending": after}, facts)
    data = pack(Frame("update", payload, round=number, generation=base))
    frame = app().Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
    rest = {key: one for key, one in record.items() if key not in layout.names}
    return with_records(content, **{name: app().ArrayRecord({FRAME: frame} | rest)})


def _standing(context: Any, accepted: int, fresh: State, layout: str) -> tuple[State, int]:
    """The memory as the server knows it, and the number of the reply that left it behind: 0 for a fresh one."""
    flat, facts = recall(context, "memory")
    for name in ("pending", "base"):
        if accepted and facts.get(name) == accepted and facts["layout"] == layout:
            return shaped(fresh, flat, f"{name}/"), accepted
    return fresh, 0


# ------------------------------------------------------------------------------------------------------- the server


@dataclass(frozen=True)
class Compressed:
    """Around a strategy of Flower: the same strategy, its train messages and replies through codecs.

    codec: of the way up, as in the clients' `compress_mod(codec, down)`. down: of the way down, a codec or a
    `taciturn.Broadcast`; None: arrays go down as Flower sends them. A bare codec encodes the model where its error is
    relative to each value (identity, cast), else its change (core/broadcast.py). It is to be the outermost wrapper but for
    `Ledgered`: `Compressed(FdaOpt(FedAdam()), codec)`. A reply that cannot be read or is not finite becomes an error reply,
    which strategies leave out; it moves no memory.
    Errors: `ConfigError`, in `start`, if a ClientApp lacks the mod.
    """

    strategy: Any
    codec: Codec
    down: Codec | Broadcast | None = None
    seed: int = 0

    def start(self, grid: Any, initial_arrays: Any, *more: Any, **told: Any) -> Any:
        """The strategy's `start` -> its result."""
        way = way_down(self.down)
        down = None if way is None else Down.of(way, arrays_of(initial_arrays), random.fold(random.key(self.seed), "down"))
        between = Between(grid, _Server(self.codec, way, down).exchange)
        return self.strategy.start(between, initial_arrays, *more, **told)


@dataclass
class _Node:
    """What the server knows of a node: the newest number accepted, the receiver's memory, and what it was sent last."""

    accepted: int = 0
    rx: State = field(default_factory=dict)
    sent: Arrays = field(default_factory=dict)


@dataclass
class _Server:
    codec: Codec
    way: Broadcast | None
    down: Down | None
    number: int = 0
    nodes: dict[int, _Node] = field(default_factory=dict)
    schemas: dict[str, Schema] = field(default_factory=dict)  # of a payload, by layout

    def exchange(self, messages: Messages, send: Send) -> Messages:
        """Encode, send, decode."""
        self.number += 1
        read: dict[int, Arrays] = {}  # many messages share one record
        asked = {}
        for message in messages:
            asked[message.metadata.dst_node_id] = message
            if trains(message) or (self.down is not None and message.content.array_records):
                self._tell(message, read)
        return [self._taken(reply, asked.get(reply.metadata.src_node_id)) for reply in send(messages)]

    def _tell(self, message: Any, read: dict[int, Arrays]) -> None:
        place, content = message.metadata.dst_node_id, message.content
        node = self.nodes.setdefault(place, _Node())
        told = {"number": self.number, "accepted": node.accepted, "codec": fingerprint(self.codec, self.way)}
        if content.array_records:
            name, record = the_arrays(content, "Compressed: a message of the strategy")
            if id(record) not in read:
                read[id(record)] = arrays_of(record)
            node.sent = read[id(record)]
            if self.down is not None:
                record, more = self.down.told(place, node.sent)
                content, told = with_records(content, **{name: record}), told | more
        message.content = with_records(content, **{TOLD: app().ConfigRecord(told)})

    def _taken(self, reply: Any, message: Any) -> Any:
        place = reply.metadata.src_node_id
        if self.down is not None:
            self.down.heard(place, not reply.has_error())
        if reply.has_error() or message is None or not trains(reply) or not reply.content.array_records:
            return reply
        name, record = the_arrays(reply.content, f"Compressed: the reply of node {place}")
        require(FRAME in record, _NO_MOD.format(place=place, codec=self.codec))
        try:
            plain = self._decoded(self.nodes[place], record)
        except WireError as error:
            return app().Message(app().Error(0, f"taciturn.flower: node {place}: {error}"), reply_to=message)
        reply.content = with_records(reply.content, **{name: plain})
        return reply

    def _decoded(self, node: _Node, record: Any) -> Any:
        """The plain arrays of a reply; the node's memory moves. Errors: `WireError`."""
        rest = {name: array for name, array in record.items() if name != FRAME}
        if not rest.keys() <= node.sent.keys():
            raise WireError(f"arrays that it was not sent: {sorted(rest.keys() - node.sent.keys())}")
        layout = layout_of(node.sent, node.sent.keys() - rest.keys())
        schema = self._schema(layout)
        frame = unpack(record[FRAME].data, {schema.id: schema}, LARGEST + 64 * layout.d)
        fresh = self.codec.init(layout)[1]
        if frame.round != self.number or frame.generation not in (0, node.accepted):
            raise WireError(f"an update of message {frame.round} from memory {frame.generation}; this is {self.number}")
        rx = node.rx if frame.generation else fresh
        u, after = self.codec.decode(frame.payload, rx, layout=layout)
        exact = _exact(self.codec, self.way)
        if not exact and not torch.isfinite(u).all():
            raise WireError("an update that is not finite; most often the client's learning rate is too high")
        node.accepted, node.rx = self.number, after
        got = {name: one.numpy() for name, one in layout.views(u).items()}
        if not exact:
            got = {name: (node.sent[name] + one).astype("float32") for name, one in got.items()}
        found: Mapping[str, Any] = dict(record_of(got).items()) | rest
        return app().ArrayRecord({name: found[name] for name in node.sent})

    def _schema(self, layout: Layout) -> Schema:
        """Of the payload that the codec makes for this layout: no node decides what is allocated."""
        if layout.fingerprint not in self.schemas:
            self.schemas[layout.fingerprint] = schema_of(self.codec, layout)
        return self.schemas[layout.fingerprint]


def schema_of(codec: Codec, layout: Layout) -> Schema:
    """The schema of a codec's payloads, from one that encodes zeros."""
    zeros: Vector = torch.zeros(layout.d)
    return Schema.of(codec.encode(zeros, codec.init(layout)[0], random.key(0), layout=layout, knobs={})[0])


_NOT_WRAPPED = (
    "compress_mod: the server's strategy is not wrapped, so it could not read what this node would send: "
    "Compressed(strategy, codec) in the ServerApp, or no compress_mod here"
)
_NO_MOD = (
    "Compressed: node {place} answered with plain arrays, so its ClientApp lacks the mod: "
    "ClientApp(mods=[compress_mod({codec})])"
)


def _other(codec: Codec, way: Broadcast | None, mine: str, theirs: str) -> str:
    return (
        f"compress_mod: this node has codec = {codec}, down = {way} (fingerprint {mine}), and the server has others "
        f"({theirs}); give compress_mod and Compressed the same codec and down"
    )
