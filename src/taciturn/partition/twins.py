"""Two copies of the model: one that is shared, one that stays on the client.

Symbols: y [d] the shared copy, v [p] the personal one; p = d, of one layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from taciturn.core.types import Split
from taciturn.partition.by_name import cut, refuse_tracked


@dataclass(frozen=True, slots=True)
class twins:
    """Every trainable parameter is shared, and each client has a copy of its own besides: x0 = v0 [d].

    The model that runs is the personal one: join(held, y, v) = v, so a solver gets the gradient at any point w [d] as g_v
    of oracle(y, w, batch). For solvers that move both, `ditto` and `pfedme`; others would train v alone and send nothing
    new. v lies on the client and is in no message. Clients are evaluated with v, which is v0 until they are first drawn; a
    run's result is x.
    Errors: `ModelError` for a model with running statistics, or without trainable parameters.
    """

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as it is."""
        return model

    def split(self, model: nn.Module, tracked: frozenset[str]) -> Split:
        """All of the model, twice."""
        refuse_tracked(tracked, lambda name: False)
        split = cut(model, tracked, lambda name: False)
        return replace(split, personal=split.layout, v0=split.x0, join=lambda held, y, v: dict(v))
