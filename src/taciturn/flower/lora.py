"""Adapters through taciturn's operators, around any strategy; what else is shared goes through the strategy.

The strategy never sees the factors: they are put into its messages, and taken out of the replies, on the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from taciturn.aggregation.low_rank import OPERATORS, low_rank, pairs_of
from taciturn.core.errors import ConfigError, unknown
from taciturn.core.types import OK, Block
from taciturn.core.vector import Layout
from taciturn.flower.between import (
    Arrays,
    Between,
    Messages,
    Send,
    app,
    arrays_of,
    record_of,
    the_arrays,
    trains,
    vector,
    weight_of,
    weights_key,
    with_records,
)

USABLE = [name for name, operator in OPERATORS.items() if not operator.merges and not operator.common]
_NAMED = re.compile(r"\.(lora_[AB]|lora_embedding_[AB])\.(?!weight$)([^.]+)(\.weight)?$")


def canonical(name: str) -> str:
    """A name of peft's state dict, where the adapter's own name stands before the factor.

    >>> canonical("q.lora_A.default.weight"), canonical("q.lora_A.weight"), canonical("e.lora_embedding_B.default")
    ('q.default.lora_A.weight', 'q.lora_A.weight', 'e.default.lora_embedding_B')
    """
    return _NAMED.sub(r".\2.\1\3", name)


@dataclass(frozen=True)
class LoraAggregation:
    """Around a strategy: (P, Q) of each layer with factors lora_A and lora_B, by `low_rank(operator)`; the rest by the
    strategy, which gets no factors, not even in its server optimizer.

    operator: product_svd, tangent, factor_mean, ..: those that need nothing of the frozen base. Clients count as the
    strategy weighs them. `told` has, after each round, what the pairs lose of the clients' factors, by layer.
    Errors: `ConfigError` for another operator, or if no layer has both factors. Source: docs/lora.md.
    """

    strategy: Any
    operator: str = "product_svd"
    told: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise unknown("operator", self.operator, USABLE, "LoraAggregation.operator")
        if self.operator not in USABLE:
            raise ConfigError(
                f"LoraAggregation.operator: {self.operator} changes what stays on the clients (the frozen base, a factor "
                f"in common), and Flower's messages do not reach it; allowed: {', '.join(USABLE)}"
            )

    def start(
        self, grid: Any, initial_arrays: Any, *more: Any, evaluate_fn: Callable[[int, Any], Any] | None = None, **told: Any
    ) -> Any:
        """The strategy's `start`, of the arrays that are no factors -> its result, of all arrays. evaluate_fn sees all."""
        arrays = arrays_of(initial_arrays)
        sides = {name for pair in pairs_of(layout_by(arrays)).values() for name in pair}
        if not sides:
            raise ConfigError(
                "LoraAggregation: no array is named as peft's factors are (layer.lora_A.weight and layer.lora_B.weight); "
                f"got {sorted(arrays)[:4]}"
            )
        adapters = {name: one for name, one in arrays.items() if canonical(name) in sides}
        server = _Server(self, low_rank(self.operator), list(arrays), adapters)  # type: ignore[arg-type]
        server.begin()
        self.told.clear()
        rest = app().ArrayRecord({name: array for name, array in initial_arrays.items() if name not in adapters})
        if evaluate_fn is not None:
            whole = evaluate_fn
            told["evaluate_fn"] = lambda round, record: whole(round, server.joined(record))
        result = self.strategy.start(Between(grid, server.exchange), rest, *more, **told)
        result.arrays = server.joined(result.arrays)
        return result


def layout_by(arrays: Arrays) -> Layout:
    """The layout of factors, by their canonical names."""
    found = {canonical(name): tuple(one.shape) for name, one in arrays.items()}
    return Layout(tuple(found), tuple(found.values()))


@dataclass
class _Server:
    part: LoraAggregation
    rule: low_rank
    order: list[str]
    adapters: Arrays
    state: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> None:
        self.state = self.rule.init(self._flat(self.adapters), torch.ones(1))

    def joined(self, record: Any) -> Any:
        """The strategy's arrays and the factors, in the order of the first arrays."""
        found = dict(record.items()) | dict(record_of(self.adapters).items())
        return app().ArrayRecord({name: found[name] for name in self.order if name in found})

    def exchange(self, messages: Messages, send: Send) -> Messages:
        """Factors into the messages, and out of the replies."""
        whole: dict[int, Any] = {}
        for message in messages:
            if message.content.array_records:
                name, record = the_arrays(message.content, "LoraAggregation: a message of the strategy")
                whole.setdefault(id(record), self.joined(record))
                message.content = with_records(message.content, **{name: whole[id(record)]})
        replies = send(messages)
        good = [r for r in replies if not r.has_error() and trains(r) and r.content.array_records]
        found = []
        for reply in good:
            name, record = the_arrays(reply.content, f"LoraAggregation: the reply of node {reply.metadata.src_node_id}")
            missing = sorted(self.adapters.keys() - record.keys())
            if missing:
                raise ConfigError(f"LoraAggregation: node {reply.metadata.src_node_id} sent no {', '.join(missing[:4])}")
            found.append({key: record[key].numpy() for key in self.adapters})
            rest = {key: array for key, array in record.items() if key not in self.adapters}
            reply.content = with_records(reply.content, **{name: app().ArrayRecord(rest)})
        if good:
            weights = [weight_of(reply, weights_key(self.part.strategy)) for reply in good]
            self._aggregate(found, torch.tensor(weights, dtype=torch.float64))
        return replies

    def _flat(self, arrays: Arrays) -> Tensor:
        return vector({canonical(name): one for name, one in arrays.items()}, layout_by(self.adapters))

    def _aggregate(self, found: list[Arrays], weights: Tensor) -> None:
        """The next pairs, from the factors of m clients and their weights [m]."""
        x, m, layout = self._flat(self.adapters), len(found), layout_by(self.adapters)
        models = torch.stack([self._flat(one) for one in found])  # what clients hold: from zero, so that no bit is lost
        block = Block(torch.arange(m), torch.zeros_like(models), models, weights, layout, {}, torch.full((m,), OK))
        change, self.state = self.rule.finish(self.rule.add(self.rule.start(self.state, x), block))
        self.part.told.append(change.told)
        views = layout.views(x.double() + change.update)
        self.adapters = {n: views[canonical(n)].numpy().astype(one.dtype) for n, one in self.adapters.items()}
