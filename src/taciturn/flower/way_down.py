"""The way down: arrays that were float32 at the start go as `core/broadcast.py` has it, all others as they are.

A node that holds nothing yet, or lost what it held, is sent plain arrays: the snapshot. From then on it gets frames of
wire/format.py, one for each version since the one it is known to hold, none if it has the newest (it evaluated that). A
node that answers has applied them; one that answers with an error is taken to hold nothing.
Symbols: x [d] float32 the model; version, the number of a publication.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from taciturn.codecs import cast
from taciturn.core import random
from taciturn.core.broadcast import SNAPSHOT, Broadcast
from taciturn.core.errors import ConfigError, RunError
from taciturn.core.random import Key
from taciturn.core.types import Cast, Codec
from taciturn.core.vector import Layout, Vector
from taciturn.flower.between import (
    Arrays,
    app,
    arrays_of,
    keep,
    layout_of,
    recall,
    record_of,
    the_arrays,
    vector,
    with_records,
)
from taciturn.wire.format import LARGEST, Frame, Schema, pack, unpack

FRAME = "taciturn/model-"
STYPE = "taciturn"


def way_down(down: Codec | Broadcast | None) -> Broadcast | None:
    """A bare codec as a Broadcast: of the model if its error is relative to each value, else of its change.

    Errors: `ConfigError` for a codec whose receivers keep a memory: they hold unlike ones.
    """
    if down is None:
        return None
    if isinstance(down, Broadcast):
        way = down
    else:
        way = Broadcast(down, of="model" if isinstance(down, cast) or not down.lossy else "change")
    if way.codec.init(Layout.flat(8))[1] or way.codec.init(Layout.flat(8))[0]:
        raise ConfigError(f"down: {way.codec} keeps a memory, and the way down has its own; use the codec within it")
    if way.start == "known":
        raise ConfigError('down: start = "known" is not for Flower, whose clients are sent the first model')
    return way


@dataclass
class Down:
    """The server's half. versions: what each node is known to hold; sent: what it was sent in this exchange."""

    way: Broadcast
    layout: Layout
    key: Key
    x: Vector | None = None
    source: int = -1
    cast: Cast | None = None
    versions: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, way: Broadcast, arrays: Arrays, key: Key) -> Down:
        """Before the first round. Errors: `ConfigError` if no array is float32."""
        layout = layout_of(arrays, (name for name, one in arrays.items() if one.dtype == "float32"))
        if not layout.d:
            raise ConfigError("Compressed: no array is float32, so there is nothing for down to encode")
        return cls(way, layout, key)

    def told(self, place: int, arrays: Arrays) -> tuple[Any, dict[str, Any]]:
        """What a node is sent for these arrays: (ArrayRecord, what is told with it)."""
        cast = self._published(vector(arrays, self.layout))
        rest = {name: one for name, one in arrays.items() if name not in self.layout.names}
        self.sent[place], told = cast.version, {"version": cast.version} | ({"plain": [*rest]} if rest else {})
        since = self.versions.get(place, -1)
        frames = self.way.frames(cast, since) if since >= 0 else [{SNAPSHOT: cast.held["x"]}]
        if any(SNAPSHOT in frame for frame in frames):
            held = {name: one.numpy() for name, one in self.layout.views(cast.held["x"]).items()}
            return record_of({name: (held | rest)[name] for name in arrays}), told
        first = cast.version - len(frames) + 1
        packed = {}
        for number, payload in enumerate(frames):
            data = pack(Frame("model", payload, round=first + number))
            packed[f"{FRAME}{number:04d}"] = app().Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
        return app().ArrayRecord(packed | dict(record_of(rest).items())), told

    def _published(self, x: Vector) -> Cast:
        if self.cast is None or self.x is None or not torch.equal(x, self.x):
            self.source, self.x = self.source + 1, x
            key = random.fold(self.key, self.source)
            self.cast = self.way.publish(x, self.source, self.cast, self.layout, key)
        return self.cast

    def heard(self, place: int, fine: bool) -> None:
        """A node answered: it holds what it was sent, or, after an error, nothing."""
        if place in self.sent:
            self.versions[place] = self.sent.pop(place) if fine else -1


def received(content: Any, told: Any, context: Any, way: Broadcast | None) -> Any:
    """On the client: a message's content with plain arrays; what the node holds is kept.

    Errors: `RunError` if frames came for a model that this node does not hold; the server sends it whole next time.
    """
    if way is None or "version" not in told:
        return content
    name, record = the_arrays(content, "compress_mod: a message of the server")
    frames = [record[key] for key in sorted(record) if key.startswith(FRAME)]
    rest, version = {key: array for key, array in record.items() if not key.startswith(FRAME)}, int(told["version"])
    plain = set(told.get("plain", ()))
    if not frames and rest.keys() - plain:  # a snapshot
        arrays = arrays_of(record)
        layout = layout_of(arrays, arrays.keys() - plain)
        keep(context, "held", {"x": vector(arrays, layout)}, _facts(version, layout, list(record)))
        return content
    flat, facts = recall(context, "held")
    if not facts:
        raise RunError(f"this node holds no model, and was sent the changes up to version {version}")
    layout = Layout(tuple(facts["names"]), tuple(tuple(shape) for shape in facts["shapes"]))
    held = _applied(flat, facts["version"], version, [frame.data for frame in frames], layout, way)
    keep(context, "held", held, _facts(version, layout, facts["order"]))
    views = record_of({key: one.numpy() for key, one in layout.views(held["x"]).items()})
    found = dict(views.items()) | rest
    return with_records(content, **{name: app().ArrayRecord({key: found[key] for key in facts["order"]})})


def _facts(version: int, layout: Layout, order: list[str]) -> dict[str, Any]:
    return {"version": version, "names": layout.names, "shapes": layout.shapes, "order": order}


def _applied(held: dict[str, Any], mine: int, newest: int, frames: list[bytes], layout: Layout, way: Broadcast) -> Any:
    """What the node holds at version `newest`. Errors: `RunError` if a frame is missing between."""
    payload, _ = way.codec.encode(torch.zeros(layout.d), {}, random.key(0), layout=layout, knobs={})
    schema = Schema.of(payload)
    for data in frames:
        frame = unpack(data, {schema.id: schema}, LARGEST + 64 * layout.d)
        if frame.round <= mine:
            continue
        if way.of == "change" and frame.round != mine + 1:
            raise RunError(f"this node holds version {mine} of the model, and was sent the change to {frame.round}")
        held, mine = way.apply(held, frame.payload, layout), frame.round
    if mine != newest:
        raise RunError(f"this node holds version {mine} of the model; the server takes it to hold {newest}")
    return held
