"""Combinators without memory: one codec after another, or one for each tensor.

Symbols: u [d]; k values that the first codec leaves; a payload within a payload has its names prefixed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from taciturn.codecs.identity import identity
from taciturn.codecs.quantize import quantize8
from taciturn.codecs.sparsify import top_k
from taciturn.core.errors import ConfigError, MethodError, require
from taciturn.core.random import Key, fold
from taciturn.core.random import key as root
from taciturn.core.state import State
from taciturn.core.types import Codec, Payload
from taciturn.core.vector import Layout, Vector


@dataclass(frozen=True, slots=True)
class chain:
    """C(u) = C1(u) with its values encoded by C2: `chain(top_k(share=0.01), quantize4())`. Unbiased if both are.

    The first codec's payload must hold its values as "values" [k] float32, all of them sent (rand_k, top_k, sketch,
    identity); they go to the second as one tensor. omega = (1 + omega_1) (1 + omega_2) - 1. The state of both.
    Errors: `MethodError`.
    """

    codec: Codec = field(default_factory=top_k)
    then: Codec = field(default_factory=quantize8)

    def __post_init__(self) -> None:
        _no_marker("chain", self.codec, self.then)

    @property
    def lossy(self) -> bool:
        """If one of them is."""
        return self.codec.lossy or self.then.lossy

    @property
    def unbiased(self) -> bool:
        """If both are."""
        return self.codec.unbiased and self.then.unbiased

    def message_bits(self, d: int) -> float:
        """The first codec's without its values, and the second's."""
        k = _inner(self.codec, Layout.flat(d)).d
        return self.codec.message_bits(d) - 32.0 * k + self.then.message_bits(k)

    def omega(self, d: int) -> float:
        """(1 + a) (1 + b) - 1 if both are unbiased, else (sqrt(a) + (1 + sqrt(a)) sqrt(b))^2, for omegas a, b."""
        first, second = self.codec.omega(d), self.then.omega(_inner(self.codec, Layout.flat(d)).d)
        if self.unbiased:
            return float((1 + first) * (1 + second) - 1)
        return float((first**0.5 + ((1 + first**0.5) ** 2 * second) ** 0.5) ** 2)

    def init(self, layout: Layout) -> tuple[State, State]:
        """{"first": .., "then": ..} on both sides, where either has a state."""
        pairs = self.codec.init(layout), self.then.init(_inner(self.codec, layout))
        return _joined({"first": pairs[0][0], "then": pairs[1][0]}), _joined({"first": pairs[0][1], "then": pairs[1][1]})

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """The first codec's payload, its values replaced by "then/.." of the second."""
        first, tx_first = self.codec.encode(u, tx.get("first", {}), key, layout=layout, knobs=knobs)
        values = first.pop("values")
        inner, key = Layout.flat(values.shape[-1]), fold(key, "then")
        then, tx_then = self.then.encode(values, tx.get("then", {}), key, layout=inner, knobs=knobs)
        return first | {f"then/{name}": t for name, t in then.items()}, _joined({"first": tx_first, "then": tx_then})

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """The second codec's values, put where the first says."""
        then = {name.removeprefix("then/"): t for name, t in payload.items() if name.startswith("then/")}
        values, rx_then = self.then.decode(then, rx.get("then", {}), layout=_inner(self.codec, layout))
        first = {name: t for name, t in payload.items() if not name.startswith("then/")} | {"values": values}
        u, rx_first = self.codec.decode(first, rx.get("first", {}), layout=layout)
        return u, _joined({"first": rx_first, "then": rx_then})


def _inner(codec: Codec, layout: Layout) -> Layout:
    """The layout of the values that a codec leaves. Errors: `MethodError`."""
    return _looked_at(codec, layout)  # type: ignore[arg-type]  # a protocol does not say that its parts are hashable


@lru_cache(maxsize=256)
def _looked_at(codec: Codec, layout: Layout) -> Layout:
    tx, _ = codec.init(layout)
    payload, _ = codec.encode(torch.zeros(layout.d), tx, root(0), layout=layout, knobs={})
    values = payload.get("values")
    if values is None or values.dtype != torch.float32 or {"values.count", "values.mask"} & payload.keys():
        name = type(codec).__name__
        raise MethodError(f"chain: {name} leaves no fixed number of float32 values; first may be rand_k, top_k or sketch")
    return Layout.flat(values.shape[-1])


@dataclass(frozen=True, slots=True)
class per_tensor:
    """C(u) = codec of each tensor of the model on its own; `other` for those of fewer than `least` values.

    Small tensors (biases, norms) are cheap to send exactly and dear to lose: `per_tensor(top_k(), least=1000)`.
    Payload names get the tensor's number as a prefix. Unbiased if both codecs are; the state of each tensor's codec.
    """

    codec: Codec = field(default_factory=top_k)
    other: Codec = field(default_factory=identity)
    least: int = 0

    def __post_init__(self) -> None:
        require(self.least >= 0, f"per_tensor.least: at least 0 values; got {self.least}")
        _no_marker("per_tensor", self.codec, self.other)

    @property
    def lossy(self) -> bool:
        """If one of them is."""
        return self.codec.lossy or self.other.lossy

    @property
    def unbiased(self) -> bool:
        """If both are."""
        return self.codec.unbiased and self.other.unbiased

    def message_bits(self, d: int) -> float:
        """The codec's, of one tensor of d values."""
        return self._of(d).message_bits(d)

    def omega(self, d: int) -> float:
        """The codec's, of one tensor of d values."""
        return self._of(d).omega(d)

    def init(self, layout: Layout) -> tuple[State, State]:
        """{number of the tensor: the codec's state}, where it has one."""
        pairs = {name: codec.init(one) for name, codec, one in self._parts(layout)}
        return tuple(_joined({name: pair[side] for name, pair in pairs.items()}) for side in (0, 1))  # type: ignore[return-value]

    def encode(self, u: Vector, tx: State, key: Key, *, layout: Layout, knobs: State) -> tuple[Payload, State]:
        """The codecs' payloads, names prefixed with the tensor's number."""
        payload: Payload = {}
        state: State = {}
        for (name, codec, one), part in zip(self._parts(layout), torch.split(u, list(layout.sizes)), strict=True):
            mine, state[name] = codec.encode(part, tx.get(name, {}), fold(key, name), layout=one, knobs=knobs)
            payload |= {f"{name}/{field}": t for field, t in mine.items()}
        return payload, _joined(state)

    def decode(self, payload: Payload, rx: State, *, layout: Layout) -> tuple[Vector, State]:
        """The tensors, one after the other."""
        parts, state = [], {}
        for name, codec, one in self._parts(layout):
            mine = {field.removeprefix(f"{name}/"): t for field, t in payload.items() if field.startswith(f"{name}/")}
            part, state[name] = codec.decode(mine, rx.get(name, {}), layout=one)
            parts.append(part)
        return torch.cat(parts), _joined(state)

    def _of(self, d: int) -> Codec:
        return self.codec if d >= self.least else self.other

    def _parts(self, layout: Layout) -> list[tuple[str, Codec, Layout]]:
        """(number, codec, layout) of each tensor that holds values."""
        cut = zip(layout.names, layout.shapes, layout.sizes, strict=True)
        return [(str(i), self._of(size), Layout((name,), (shape,))) for i, (name, shape, size) in enumerate(cut)]


def _joined(states: State) -> State:
    """States by name; those that are empty are left out."""
    return {name: state for name, state in states.items() if state}


def _no_marker(name: str, *codecs: Codec) -> None:
    """The lossless stage runs over a whole message, so its codec stands outermost."""
    if any(type(codec).__name__ == "lossless" for codec in codecs):
        raise ConfigError(f"{name}: lossless works on the whole message; write lossless({name}(..)) instead")
