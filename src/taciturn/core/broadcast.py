"""The way down: what the server publishes and what every client then provably holds.

Symbols: x [d] the server's model; held = {"x": [d]} what a receiver of the newest version holds, the same for all; of
methods that merge products into the frozen base also {"base": {layer: [m, n]}}, their sum (merges.py).

of="model"   each frame is encode(x) itself; a receiver needs no history. Right for lossless codecs and for codecs
             whose error is relative to each value (cast): 4d or 2d bytes for every client, every round.
of="change"  each frame is encode(x - held), and held <- held + decode(frame). A client gets every frame since the
             version it acknowledged, or one float snapshot of `held` if that is smaller. Right for codecs that are only
             good at small vectors (quantize, top-k). One memory shared by receivers that did not all receive it would
             diverge; here nobody is assumed to hold what was not acknowledged. Very sparse frames let `held` lag so
             far behind x that training itself diverges (seen with the largest 1 to 3 of 24 values; 8 were fine).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from taciturn.core.errors import MethodError, WireError, require
from taciturn.core.merges import frame_of, is_base, lacking, logged, take
from taciturn.core.payload import nbytes
from taciturn.core.random import Key, fold
from taciturn.core.state import State
from taciturn.core.types import Cast, Codec, Merges, Payload
from taciturn.core.vector import Kind, Layout, Part, Vector, pieces_of

SNAPSHOT = "snapshot"
PIECE = "piece"


def _newest(log: tuple[tuple[int, Payload], ...]) -> dict[int, tuple[int, Payload]]:
    """The entries of a log of pieces, by number."""
    return {int(payload[PIECE]): (version, payload) for version, payload in log}


def renumbered(cast: Cast, version: int) -> Cast:
    """The same publication under another version, of every kind of client."""
    log = tuple((version, payload) for _, payload in cast.log)
    kinds = tuple(one and renumbered(one, version) for one in cast.kinds)
    return replace(cast, version=version, log=log, kinds=kinds)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """How the model goes down: a codec, and whether it encodes the model or its change.

    start, of changes: "sent", a newcomer is sent the model; "known", it has built the first one itself, from the seed or
    the checkpoint that the experiment names, and is sent the changes since, or a snapshot if that is smaller. Errors:
    `ConfigError`; `MethodError` for a known start of whole models.
    """

    codec: Codec
    of: Literal["model", "change"] = "model"
    start: Literal["sent", "known"] = "sent"

    def __post_init__(self) -> None:
        require(self.of in ("model", "change"), f"method.broadcast.of: model or change; got {self.of!r}")
        require(self.start in ("sent", "known"), f"method.broadcast.start: sent or known; got {self.start!r}")
        if self.start == "known" and self.of == "model":
            raise MethodError(
                'method.broadcast: start = "known" needs of = "change"; of = "model" sends all of it each time'
            )

    def publish(
        self,
        x: Vector,
        source: int,
        cast: Cast | None,
        layout: Layout,
        key: Key,
        merges: Merges | None = None,
        kinds: Sequence[Kind] = (),
    ) -> Cast:
        """x [d] of server round `source` -> the next cast; the same cast if that round is already out.

        merges: what the base takes besides; before the first cast they name all layers that ever will, with K = 0.
        kinds: of clients; those that hold a part of x have a cast of their own. Where all hold x and kinds train different
        tensors of it (`pieces_of`), each piece is a frame, sent to those who have not got it since it changed.
        """
        if cast is not None and cast.source == source:
            return cast
        pieces = pieces_of(layout, kinds) if self.of == "model" else ()
        new = self._pieces(x, source, cast, pieces, layout, key) if pieces else self._encoded(x, source, cast, layout, key)
        if merges:
            new = self._merged(new, cast, merges)
        own: list[Cast | None] = []
        for number, kind in enumerate(kinds):
            part, before = kind.holds, None if cast is None else cast.kinds[number]
            if part is None:
                own.append(None)
                continue
            one = self._encoded(part.cut(x), source, before, part.layout, fold(key, "kind", number))
            own.append(replace(one, held=new.held | one.held, merges=new.merges))
        return replace(new, kinds=tuple(own))

    def _encoded(self, x: Vector, source: int, cast: Cast | None, layout: Layout, key: Key) -> Cast:
        """The next cast of x, without what the base takes."""
        version = 0 if cast is None else cast.version + 1
        tx, _ = self.codec.init(layout)
        if self.of == "model":
            payload, _ = self.codec.encode(x, tx, key, layout=layout, knobs={})
            return Cast(version, source, self.apply({}, payload, layout), ((version, payload),))
        if cast is None:
            return Cast(version, source, {"x": x.clone()}, ())
        payload, _ = self.codec.encode(x - cast.held["x"], tx, key, layout=layout, knobs={})
        log = [*cast.log, (version, payload)]
        while sum(int(nbytes(frame)) for _, frame in log) > x.numel() * x.element_size():
            log.pop(0)  # older receivers are better served by a snapshot
        return Cast(version, source, self.apply(cast.held, payload, layout), tuple(log))

    def _pieces(self, x: Vector, source: int, cast: Cast | None, pieces: Sequence[Part], layout: Layout, key: Key) -> Cast:
        """The next cast of x: the newest frame of each piece."""
        version, held, log = (0, {}, {}) if cast is None else (cast.version + 1, cast.held, _newest(cast.log))
        for number, piece in enumerate(pieces):
            value = piece.cut(x)
            if cast is None or not torch.equal(value, piece.cut(cast.held["x"])):
                tx, _ = self.codec.init(piece.layout)
                payload, _ = self.codec.encode(value, tx, fold(key, number), layout=piece.layout, knobs={})
                log[number] = version, payload | {PIECE: torch.tensor(number, dtype=torch.uint8, device=x.device)}
                held = self.apply(held, log[number][1], layout, pieces)
        return Cast(version, source, held, tuple(sorted(log.values(), key=lambda entry: entry[0])))

    def _merged(self, cast: Cast, before: Cast | None, merges: Merges) -> Cast:
        """The cast with the base after these products, and the frame that leads there."""
        assert self.of == "model", "Method refuses merges with a lossy way down"
        if before is None:
            return replace(cast, held=cast.held | {"base": {layer: x @ y for layer, (x, y) in merges.items()}})
        frame = frame_of(merges, cast.held["x"].dtype)
        base = take(before.held["base"], frame)
        return replace(cast, held=cast.held | {"base": base}, merges=logged(before.merges, cast.version, frame, base))

    def frames(self, cast: Cast, since: int) -> list[Payload]:
        """What a receiver at version `since` (-1: holds nothing) lacks, in order; empty if it is up to date."""
        if since == cast.version:
            return []
        if "base" in cast.held:
            base = lacking(cast.merges, cast.held["base"], cast.version, since)
            return [*base, *(payload for _, payload in cast.log)]  # one frame: who merges trains all that it holds
        behind = since <= cast.version  # else acknowledged to a server that was put back to an older checkpoint
        missing = [payload for version, payload in cast.log if version > since or not behind]
        if self.of == "model":
            return missing
        first = 0 if self.start == "known" else -1  # what a receiver that was sent nothing is at
        whole = behind and max(since, first) >= 0 and len(missing) == cast.version - max(since, first)
        return missing if whole else [{SNAPSHOT: cast.held["x"]}]

    def apply(self, held: State, frame: Payload, layout: Layout, pieces: Sequence[Part] = ()) -> State:
        """What a receiver holds after one frame; server and client run this same text."""
        if is_base(frame):
            return held | {"base": take(held.get("base", {}), frame)}
        if SNAPSHOT in frame:
            return {"x": frame[SNAPSHOT]}
        if PIECE in frame:
            part, frame = pieces[int(frame[PIECE])], {name: t for name, t in frame.items() if name != PIECE}
            value, _ = self.codec.decode(frame, self.codec.init(part.layout)[1], layout=part.layout)
            x = held["x"] if "x" in held else value.new_zeros(layout.d)
            return held | {"x": x.index_copy(0, part.places, value)}
        _, rx = self.codec.init(layout)
        decoded, _ = self.codec.decode(frame, rx, layout=layout)
        if self.of == "model":
            return held | {"x": decoded}
        if "x" not in held:
            raise WireError("a change of the model arrived before any model")
        return {"x": held["x"] + decoded}
