"""Adapters are aggregated layer by layer, by an operator on their factors.

Symbols: B_i [m, r], A_i [r, n] what client i holds at the end of the round, its start plus its decoded update; w_i weights;
(P, Q) the pair that all continue from. A convolution's A is [r, n k k], its B [m, r].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from taciturn.aggregation import factors
from taciturn.aggregation.factors import Factors, Pair
from taciturn.aggregation.lowrank_svd import Backend
from taciturn.aggregation.mean import Weights, weights_of
from taciturn.aggregation.mismatch import mismatch
from taciturn.core import random
from taciturn.core.errors import MethodError, require, unknown
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Block, Change, Merges
from taciturn.core.vector import Layout, Vector

Sides = tuple[str, str]  # names of B and A
Found = tuple[Pair, Pair | None]  # what all continue from, and a product for the base


@dataclass(frozen=True, slots=True)
class Operator:
    """One way to make a pair of many. turns: it comes in another gauge than the clients' factors, or starts anew;
    merges: the base takes a product besides.
    """

    run: Callable[[Factors, Tensor, Key, low_rank], Found]
    turns: bool = False
    merges: bool = False


def _product_svd(held: Factors, share: Tensor, key: Key, part: low_rank) -> Pair:
    return factors.product_svd(held, share, key, backend=part.backend, align=part.align)


def _product_svd_residual(held: Factors, share: Tensor, key: Key, part: low_rank) -> Found:
    pair = _product_svd(held, share, key, part)
    return pair, factors.residual_of(held, share, pair)


OPERATORS = {
    "factor_mean": Operator(lambda f, w, key, part: (factors.factor_mean(f, w), None)),
    "factor_mean_rebalanced": Operator(
        lambda f, w, key, part: (factors.factor_mean_rebalanced(f, w, key), None), turns=True
    ),
    "product_svd": Operator(lambda f, w, key, part: (_product_svd(f, w, key, part), None), turns=True),
    "product_svd_residual": Operator(_product_svd_residual, turns=True, merges=True),
    "tangent": Operator(lambda f, w, key, part: (factors.tangent(f, w), None)),
    "lora_fair_style": Operator(lambda f, w, key, part: (factors.lora_fair_style(f, w), None)),
    "fedex": Operator(lambda f, w, key, part: factors.fedex(f, w, "short"), merges=True),
    "fedex_trunc": Operator(lambda f, w, key, part: factors.fedex_trunc(f, w, part.residual_rank or 1), merges=True),
    "flora": Operator(lambda f, w, key, part: (factors.restart(f, key), factors.flora(f, w)), turns=True, merges=True),
}


def pairs_of(layout: Layout) -> dict[str, Sides]:
    """Layers with both factors in the layout -> the names of B and A, which are those of peft's state dict."""
    found: dict[str, Sides] = {}
    for name in layout.names:
        for left, right in (("lora_B.weight", "lora_A.weight"), ("lora_embedding_B", "lora_embedding_A")):
            other = name.removesuffix(left) + right
            if name.endswith(left) and other in layout.names:
                found[name.removesuffix("." + left)] = (name, other)
    return found


@dataclass(frozen=True, slots=True)
class low_rank:
    """(P, Q) of every layer that has both factors, by the operator; the weighted mean of everything else that is shared.

    factor_mean: P = sum w_i B_i, Q = sum w_i A_i (FedIT; PS in the paper). factor_mean_rebalanced: the same product with
    P'P = QQ'. product_svd: the best pair of rank r for sum w_i B_i A_i, balanced (FlexLoRA; SP in the paper). tangent:
    factor_mean with the bias of its product removed to first order, in its gauge. lora_fair_style: A's mean, and B
    corrected for it. These merge products into the frozen base W0, so that nothing of sum w_i B_i A_i is lost; its rank
    grows with the rounds: fedex: factor_mean and R = sum w_i (B_i - Bb)(A_i - Ab) (FedEx-LoRA). fedex_trunc: the best part
    of R of rank residual_rank. product_svd_residual: product_svd and what it leaves out. flora: all of it goes into W0, and
    B = 0 and a random A start anew (FLoRA).
    The mean product is never formed. backend: of the singular values. align: product_svd turned to the clients' gauge.
    told: per layer, what the pair loses of the clients' factors (`mismatch`); diagnostics = False leaves that out, for
    large cohorts. Not linear: it holds every client's factors of a round. State: rounds, for its random draws.
    alpha / r is the same for all clients here and is not folded in, so that what is balanced is what is trained.
    Errors: `MethodError` where no layer has both factors. Source: arXiv 2508.01348.
    """

    linear: ClassVar[bool] = False
    operator: Literal[
        "factor_mean", "factor_mean_rebalanced", "product_svd", "tangent", "lora_fair_style",
        "fedex", "fedex_trunc", "product_svd_residual", "flora",
    ] = "product_svd"  # fmt: skip
    weights: Weights = "samples"
    backend: Backend = "rsvd"
    align: bool = False
    diagnostics: bool = True
    residual_rank: int | None = None

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise unknown("operator", self.operator, OPERATORS, "aggregator.operator")
        require(
            (self.operator == "fedex_trunc") == (self.residual_rank is not None) and (self.residual_rank or 1) >= 1,
            "aggregator.residual_rank: the rank, at least 1, of what fedex_trunc merges, and for no other operator; got "
            f"{self.residual_rank} with {self.operator}",
        )

    @property
    def turns(self) -> bool:
        """True if what is broadcast may be in another gauge than before, so that no optimizer state fits it."""
        return OPERATORS[self.operator].turns

    @property
    def merges(self) -> bool:
        """True if the frozen base takes a product in every round."""
        return OPERATORS[self.operator].merges

    def weigh(self, sizes: Tensor) -> Tensor:
        """[M] samples -> [M] weights."""
        return weights_of(self.weights, sizes)

    def init(self, x: Vector, sizes: Tensor) -> State:
        """No round yet."""
        return {"rounds": torch.zeros((), dtype=torch.int64)}

    def start(self, state: State, x: Vector) -> _Held:
        """Nothing held."""
        return _Held(state, x, (), (), None)

    def add(self, acc: _Held, block: Block) -> _Held:
        """One more block: what its clients hold, and their weights; those that count for nothing are dropped."""
        good = block.weights > 0
        models = (block.start + block.updates)[good]
        return replace(acc, models=(*acc.models, models), weights=(*acc.weights, block.weights[good]), layout=block.layout)

    def finish(self, acc: _Held) -> tuple[Change, State]:
        """-> update [d] float64: to (P, Q) from what the server has."""
        layout, rounds = acc.layout, acc.state["rounds"]
        assert layout is not None
        pairs = pairs_of(layout)
        if not pairs:
            raise MethodError(
                "method.aggregator: low_rank needs layers whose factors A and B are both shared (partition = lora); there "
                'is none. With one of them frozen or personal the mean is exact: aggregator = "weighted"'
            )
        models, weights = torch.cat(acc.models), torch.cat(acc.weights).double()
        share = weights / weights.sum()
        views = layout.views(models)
        new = {name: torch.tensordot(share, view.double(), 1) for name, view in views.items()}
        told: dict[str, Any] = {}
        taken: Merges = {}
        key = random.fold(random.key(0), "low_rank", int(rounds))
        for number, (layer, sides) in enumerate(pairs.items()):
            held = [(_matrix(b, "B"), _matrix(a, "A")) for b, a in zip(*(views[side] for side in sides), strict=True)]
            pair, rest = OPERATORS[self.operator].run(held, share, random.fold(key, number), self)
            new |= {side: factor.double().reshape(new[side].shape) for side, factor in zip(sides, pair, strict=True)}
            taken |= {} if rest is None else {layer: rest}
            if self.diagnostics:
                told[layer] = asdict(mismatch(held, share, pair, rest))
        update = layout.flatten(new, torch.float64) - acc.x.double()
        return Change(update, taken, told), {"rounds": rounds + 1}


@dataclass(frozen=True)
class _Held:
    """The state, the server's x [d], the models of the clients so far, [m, d] each, and their weights."""

    state: State
    x: Vector
    models: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    layout: Layout | None


def _matrix(factor: Tensor, side: str) -> Tensor:
    """A factor of a layer as [m, r] or [r, n]."""
    return factor.flatten(1) if side == "A" else factor.reshape(factor.shape[0], factor.shape[1])
