"""The flat vector and its names.

Symbols: d parameters; vec [d] (or [.., d]); views {name: [.., *shape]}. Order is the model's parameter order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Vector = Tensor


@dataclass(frozen=True)
class Part:
    """Some coordinates of x [d]: `mask` [d] bool says which; in their order they are the vector [k] of `layout`."""

    layout: Layout
    mask: Tensor

    @cached_property
    def places(self) -> Tensor:
        """[k] int64, rising."""
        return self.mask.nonzero().squeeze(1)

    def cut(self, x: Vector) -> Vector:
        """[.., d] -> [.., k]."""
        return x.index_select(-1, self.places)

    def fill(self, values: Vector) -> Vector:
        """[.., k] -> [.., d] with zeros elsewhere."""
        return values.new_zeros(*values.shape[:-1], len(self.mask)).index_copy(-1, self.places, values)


@dataclass(frozen=True)
class Kind:
    """Clients that work on the same coordinates of x [d]: `trains`, which they also send, and `holds`, which they are sent;
    None: all of them. What a client does not hold is zero there.
    """

    trains: Part | None = None
    holds: Part | None = None


def pieces_of(layout: Layout, kinds: Sequence[Kind]) -> tuple[Part, ...]:
    """Disjoint parts of an x that all hold and that kinds train different whole tensors of: they change at different times.

    Empty where x changes as a whole.
    """
    masks = [layout.views(kind.trains.mask) for kind in kinds if kind.holds is None and kind.trains is not None]
    if len(masks) < 2 or len(masks) < len(kinds):
        return ()
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name in layout.names:
        groups.setdefault(tuple(bool(mask[name].any()) for mask in masks), []).append(name)
    parts, shapes = [], dict(zip(layout.names, layout.shapes, strict=True))
    for names in groups.values():
        mask = {name: torch.full(shape, name in names) for name, shape in shapes.items()}
        own = Layout(tuple(names), tuple(shapes[name] for name in names))
        parts.append(Part(own, layout.flatten(mask, torch.bool).to(kinds[0].trains.mask.device)))  # type: ignore[union-attr]
    return tuple(parts)


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors that make up a flat vector.

    >>> layout = Layout(("w", "b"), ((2, 3), (2,)))
    >>> layout.d, layout.views(torch.arange(8.0))["b"].tolist()
    (8, [6.0, 7.0])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of named tensors, in their order."""
        return cls(tuple(tensors), tuple(tuple(tensor.shape) for tensor in tensors.values()))

    @classmethod
    def flat(cls, d: int) -> Layout:
        """One tensor of d values."""
        return cls(("values",), ((d,),))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def d(self) -> int:
        """Number of values in all."""
        return sum(self.sizes)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that two layouts share only if names and shapes agree."""
        text = repr((self.names, self.shapes)).encode()
        return hashlib.blake2b(text, digest_size=8).hexdigest()

    def flatten(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Vector:
        """Named tensors -> [d]."""
        if not self.names:
            return torch.zeros(0, dtype=dtype)
        return torch.cat([tensors[name].reshape(-1).to(dtype) for name in self.names])

    def views(self, vec: Vector) -> dict[str, Tensor]:
        """[.., d] -> named tensors that share its memory."""
        parts = torch.split(vec, list(self.sizes), dim=-1)
        lead = vec.shape[:-1]
        return {name: part.view((*lead, *shape)) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}
