"""A shared vector that holds more than the model: values of a solver's own, such as control variates.

Symbols: d values of the model in x, e values besides.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from taciturn.core.errors import MethodError
from taciturn.core.state import State
from taciturn.core.types import Record, Split
from taciturn.core.vector import Layout


def extended(split: Split, extra: Record) -> Split:
    """The split with the named tensors `extra` [e] after the model's: x0 [d + e]. `join` does not see them.

    Errors: `MethodError` for a name that the model has, and for splits whose clients train unlike parts of x or whose
    frozen base takes products: there a coordinate of x is not everybody's, or x is not all that is shared.
    """
    if split.kinds or split.base.names:
        why = "its clients train unlike parts of the model" if split.kinds else "its frozen base takes products"
        raise MethodError(
            f"method: the solver shares tensors ({next(iter(extra))}, ..), and this partition has no place for them: "
            f'{why}; use partition = full, layers, or lora(share = "both") without ranks and with aggregator = mean'
        )
    taken = sorted(set(split.layout.names) & set(extra))
    if taken:
        raise MethodError(f"method: the solver shares {', '.join(taken)}, and the model has parameters of these names")
    names, own = frozenset(split.layout.names), Layout.of(extra)

    def join(held: State, y: Record, v: Record) -> Record:
        return split.join(held, {name: tensor for name, tensor in y.items() if name in names}, v)

    layout = Layout(split.layout.names + own.names, split.layout.shapes + own.shapes)
    x0 = torch.cat([split.x0, own.flatten(extra, split.x0.dtype).to(split.x0.device)])
    return replace(split, layout=layout, x0=x0, join=join, merging=None)
