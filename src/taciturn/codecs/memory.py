"""Combinators with memory: what a codec lost is sent later, or only what is new is sent.

Symbols: u [d] the vector of this round; e [d] what was lost so far; h [d] what the other side knows already; alpha the rate
at which it learns; q = C(u - h); omega of the codec.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from taciturn.codecs.quantize import quantize
from taciturn.codecs.sparsify import top_k
from taciturn.core.errors import MethodError, require
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Codec, Payload
from taciturn.core.vector import Layout, Vector


@dataclass(frozen=True, slots=True)
class error_feedback:
    """Send C(u + e); keep e <- u + e - C(u + e). What is lost in one round is added to the next; biased.

    into: where e goes. "message": it is added to u, as published; right where u is a gradient, or a few steps. "start": the
    client trains on from x + e, and sends C(u), u = y - x, which has in it what became of e; e <- u - C(u). To first order
    in the steps the same, but in rounds so long that a client would learn again what was lost, it is not added twice.
    On the client: e [d] and the codec's state. The client learns that its message was accepted before e moves on. Errors:
    `MethodError` for a codec whose receiver keeps state, for one that is known to add more than it sends (rand_k,
    sparsify, sketch, partial with omega > 1), under which e grows without bound; for "start" within another codec, and with
    a solver that measures from where it starts. Source: Seide et al. 2014; Karimireddy et al. 2019, algorithm 2; "start" is
    ours.
    """

    lossy: ClassVar[bool] = True
    unbiased: ClassVar[bool] = False
    codec: Codec = field(default_factory=top_k)
    into: Literal["message", "start"] = "message"

    def __post_init__(self) -> None:
        require(self.into in ("message", "start"), f"error_feedback.into: message or start; got {self.into!r}")

    def message_bits(self, d: int) -> float:
        """The codec's."""
        return self.codec.message_bits(d)

    def omega(self, d: int) -> float:
        """The codec's, of u + e."""
        return self.codec.omega(d)

    def init(self, layout: Layout) -> tuple[State, State]:
        """tx = {"error": zeros [d], "codec": ..}, rx = {}."""
        tx = _sender(self.codec, layout, "error_feedback")
        omega = self.codec.omega(layout.d)
        if hasattr(self.codec, "linear_map") and omega > 1:  # there omega is no bound but what happens
            raise MethodError(
                f"error_feedback: {type(self.codec).__name__} has omega = {omega:.3g} > 1, so its error would grow; use it "
                "under difference, or a codec that only loses (top_k, sign, lowrank, quantize)"
            )
        return {"error": torch.zeros(layout.d), "codec": tx}, {}

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """C(u + e), and the new e; with into = "start" e is in u."""
        wanted = u + tx["error"].to(u.dtype) if self.into == "message" else u
        payload, inner = self.codec.encode(wanted, tx["codec"], key, layout=layout, knobs=knobs)
        sent, _ = self.codec.decode(payload, {}, layout=layout)
        return payload, {"error": (wanted - sent).float(), "codec": inner}

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """The codec's."""
        return self.codec.decode(payload, rx, layout=layout)


def starts_apart(codec: Codec) -> bool:
    """True if each client trains on from what its codec lost, so that not all start from one point."""
    return isinstance(codec, error_feedback) and codec.into == "start"


@dataclass(frozen=True, slots=True)
class difference:
    """Send q = C(u - h); both sides know h + q as u, and move h <- h + alpha q. DIANA and Artemis; EF21 at alpha = 1.

    Under heterogeneity u does not vanish where training ends, u - h does; so its noise vanishes as well. alpha: 1 /
    (2 (omega + 1)) unless given; it must be given for a biased codec. As unbiased as the codec. On the client: h [d].
    memory "receiver": the server keeps h of each client too, N d in all, and decodes h + q. "mean": the server keeps
    only the mean of all h, in `aggregator = running`, and decodes q. h moves when a message was accepted, on both
    sides. Source: Mishchenko et al. 2019 (DIANA), algorithm 1; Philippenko & Dieuleveut 2020 (Artemis); Richtarik et
    al. 2021 (EF21), algorithm 2. With "mean" h is float64, as the mean is: their roundings would add up.
    Departure: EF21's first message is C(u), not u.
    """

    lossy: ClassVar[bool] = True
    codec: Codec = field(default_factory=quantize)
    alpha: float | None = None
    memory: Literal["receiver", "mean"] = "receiver"

    def __post_init__(self) -> None:
        require(self.alpha is None or 0 < self.alpha <= 1, f"difference.alpha: above 0 and at most 1; got {self.alpha}")
        known = self.alpha is not None or self.codec.unbiased
        require(
            self.memory == "receiver" or self.alpha is not None,
            'difference.alpha: give it with memory = "mean", the same as aggregator.alpha',
        )
        require(known, "difference.alpha: give it for a codec that is biased (1: EF21); the default is for unbiased ones")

    @property
    def unbiased(self) -> bool:
        """As the codec."""
        return self.codec.unbiased

    def message_bits(self, d: int) -> float:
        """The codec's."""
        return self.codec.message_bits(d)

    def omega(self, d: int) -> float:
        """The codec's, of u - h."""
        return self.codec.omega(d)

    def rate(self, d: int) -> float:
        """alpha, for vectors of d values."""
        return 1 / (2 * (self.codec.omega(d) + 1)) if self.alpha is None else self.alpha

    def init(self, layout: Layout) -> tuple[State, State]:
        """tx = {"h": zeros [d], "codec": ..}, rx = {"h": zeros [d]} or {}."""
        exact = torch.float64 if self.memory == "mean" else torch.float32
        tx = {"h": torch.zeros(layout.d, dtype=exact), "codec": _sender(self.codec, layout, "difference")}
        return tx, {"h": torch.zeros(layout.d)} if self.memory == "receiver" else {}

    def known(self, tx: State) -> Vector:
        """h [d]: with alpha = 1, the u that the server knows of this sender."""
        known: Vector = tx["h"]
        return known

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """C(u - h), and the new h."""
        h = tx["h"]
        payload, inner = self.codec.encode((u - h).to(u.dtype), tx["codec"], key, layout=layout, knobs=knobs)
        q, _ = self.codec.decode(payload, {}, layout=layout)
        return payload, {"h": h + self.rate(layout.d) * q.to(h.dtype), "codec": inner}

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """h + q, and the new h; or q."""
        q, _ = self.codec.decode(payload, {}, layout=layout)
        if self.memory == "mean":
            return q, rx
        return rx["h"] + q, {"h": rx["h"] + self.rate(layout.d) * q.float()}


def ef21(codec: Codec | None = None) -> difference:
    """EF21 (Richtarik et al. 2021): `difference(codec, alpha=1)`, of `top_k()` unless another is given."""
    return difference(codec or top_k(), alpha=1.0)


def _sender(codec: Codec, layout: Layout, name: str) -> State:
    """The codec's state at the sender, who must be able to decode what it sends."""
    tx, rx = codec.init(layout)
    if rx:
        raise MethodError(
            f"{name}: the receiver of {type(codec).__name__} keeps state, so the sender cannot know what arrives"
        )
    return tx
