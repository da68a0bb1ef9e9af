"""Adapters are aggregated layer by layer, by an operator on their factors.

Symbols: B_i [m, r], A_i [r, n] what client i holds at the end of the round, its start plus its decoded update; w_i weights;
(P, Q) the pair that all continue from. A convolution's A is [r, n k k], its B [m, r].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from taciturn.aggregation import factors
from taciturn.aggregation.factors import Factors, Pair
from taciturn.aggregation.lowrank_svd import Backend
from taciturn.aggregation.mean import Weights, weights_of
from taciturn.aggregation.mismatch import mismatch
from taciturn.core import random
from taciturn.core.errors import MethodError, RunError, require, unknown
from taciturn.core.random import Key
from taciturn.core.state import State
from taciturn.core.types import Block, Change, Merges
from taciturn.core.vector import Kind, Layout, Vector

Sides = tuple[str, str]  # names of B and A
Found = tuple[Pair, Pair | None]  # what all continue from, and a product for the base


@dataclass(frozen=True, slots=True)
class Operator:
    """One way to make a pair of many. turns: it comes in another gauge than the clients' factors, or starts anew;
    merges: the base takes a product besides; unequal: clients may have unlike ranks; common: they must have one factor in
    common, which the server sets.
    """

    run: Callable[[Factors, Tensor, Key, low_rank, int], Found]  # the last: the largest rank of any client there is
    turns: bool = False
    merges: bool = False
    unequal: bool = False
    common: bool = False


def _product_svd(held: Factors, share: Tensor, key: Key, part: low_rank, rank: int) -> Pair:
    return factors.product_svd(held, share, key, rank=rank, backend=part.backend, align=part.align)


def _product_svd_residual(held: Factors, share: Tensor, key: Key, part: low_rank, rank: int) -> Found:
    pair = _product_svd(held, share, key, part, rank)
    return pair, factors.residual_of(held, share, pair)


OPERATORS = {
    "factor_mean": Operator(lambda f, w, key, part, r: (factors.factor_mean(f, w), None)),
    "factor_mean_rebalanced": Operator(
        lambda f, w, key, p, r: (factors.factor_mean_rebalanced(f, w, key), None), turns=True
    ),
    "product_svd": Operator(lambda f, w, key, p, r: (_product_svd(f, w, key, p, r), None), turns=True, unequal=True),
    "product_svd_residual": Operator(_product_svd_residual, turns=True, merges=True),
    "tangent": Operator(lambda f, w, key, part, r: (factors.tangent(f, w), None)),
    "lora_fair_style": Operator(lambda f, w, key, part, r: (factors.lora_fair_style(f, w), None)),
    "fedex": Operator(lambda f, w, key, part, r: factors.fedex(f, w, "short"), merges=True),
    "fedex_trunc": Operator(lambda f, w, key, part, r: factors.fedex_trunc(f, w, part.residual_rank or 1), merges=True),
    "flora": Operator(
        lambda f, w, key, part, r: (factors.restart(f, r, key), factors.flora(f, w)), turns=True, merges=True, unequal=True
    ),
    "hetlora_style": Operator(lambda f, w, key, part, r: (factors.hetlora_style(f, w), None), unequal=True),
    "fedsvd": Operator(lambda f, w, key, part, r: (factors.fedsvd(f, w, key), None), turns=True, common=True),
    "rbla": Operator(lambda f, w, key, part, r: (factors.rbla(f, w), None), unequal=True),
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
    fedsvd: B was trained and A common: their product in another gauge, A with orthonormal rows (FedSVD).
    Where clients have unlike ranks, client i goes on from the first r_i slices of the pair: product_svd and flora take any
    ranks; rbla: the mean of each slice over those who own it (RBLA); hetlora_style: over all, zeros for those who do not
    (after HetLoRA). A slice that nobody of the cohort owns stays, unless the operator sets all.
    The mean product is never formed. backend: of the singular values. align: product_svd turned to the clients' gauge.
    told: per layer, what the pair loses of the clients' factors (`mismatch`); diagnostics = False leaves that out, for
    large cohorts. Not linear: it holds every client's factors of a round. State: rounds, for its random draws.
    alpha / r is the same for all clients here and is not folded in, so that what is balanced is what is trained.
    Errors: `MethodError` where no layer has both factors. Source: arXiv 2508.01348.
    """

    linear: ClassVar[bool] = False
    kinds: ClassVar[bool] = True
    operator: Literal[
        "factor_mean", "factor_mean_rebalanced", "product_svd", "tangent", "lora_fair_style",
        "fedex", "fedex_trunc", "product_svd_residual", "flora", "hetlora_style", "rbla", "fedsvd",
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
        return _Held(state, x)

    def add(self, acc: _Held, block: Block) -> _Held:
        """One more block: what its clients hold, and their weights; those that count for nothing are dropped."""
        good = block.weights > 0
        models, kinds = (block.start + block.updates)[good], [block.kind] * int(good.sum())
        all_models, weights = (*acc.models, models), (*acc.weights, block.weights[good])
        return replace(acc, models=all_models, weights=weights, kinds=(*acc.kinds, *kinds), layout=block.layout)

    def finish(self, acc: _Held) -> tuple[Change, State]:
        """-> update [d] float64: to (P, Q) from what the server has."""
        layout, rounds = acc.layout, acc.state["rounds"]
        pairs = pairs_of(layout)
        if not pairs:
            raise MethodError(
                "method.aggregator: low_rank needs layers whose factors A and B are both shared (partition = lora); there "
                'is none. With one of them frozen or personal the mean is exact: aggregator = "weighted"'
            )
        views, new = layout.views(torch.cat(acc.models)), layout.views(acc.mean())
        told: dict[str, Any] = {}
        taken: Merges = {}
        key = random.fold(random.key(0), "low_rank", int(rounds))
        for number, (layer, sides) in enumerate(pairs.items()):
            held = acc.factors(views, sides)
            before = [_matrix(layout.views(acc.x)[side], name) for side, name in zip(sides, "BA", strict=True)]
            rank = len(before[1])
            try:
                pair, rest = OPERATORS[self.operator].run(held, acc.share, random.fold(key, number), self, rank)
                found = asdict(mismatch(held, acc.share, pair, rest)) if self.diagnostics else {}
            except LinAlgError as error:
                raise RunError(_exploded(layer, held)) from error
            known = pair[0].shape[1]  # slices that nobody of this round owns stay
            whole = torch.cat([pair[0], before[0][:, known:]], 1), torch.cat([pair[1], before[1][known:]])
            new |= {side: factor.double().reshape(new[side].shape) for side, factor in zip(sides, whole, strict=True)}
            taken |= {} if rest is None else {layer: rest}
            if found:
                told[layer] = {name: value for name, value in found.items() if not math.isnan(value)}
        update = layout.flatten(new, torch.float64) - acc.x.double()
        return Change(update, taken, told), {"rounds": rounds + 1}


@dataclass(frozen=True)
class _Held:
    """The state, the server's x [d]; of the clients so far the models [m, d] by block, the weights, and each one's kind."""

    state: State
    x: Vector
    models: tuple[Tensor, ...] = ()
    weights: tuple[Tensor, ...] = ()
    kinds: tuple[Kind, ...] = ()
    layout: Layout = Layout((), ())

    @property
    def share(self) -> Tensor:
        """w [M] float64, of sum 1."""
        weights = torch.cat(self.weights).double()
        return weights / weights.sum()

    def mean(self) -> Tensor:
        """Of each coordinate [d] float64, over those who train it; where nobody does, what the server has."""
        models, share = torch.cat(self.models), self.share
        if all(kind.trains is None for kind in self.kinds):
            return share @ models.double()
        owned = torch.stack(
            [torch.ones_like(models[0]) if k.trains is None else k.trains.mask for k in self.kinds]
        ).double()
        weight = share @ owned
        total = share @ (owned * models.double())
        return torch.where(weight > 0, total / weight.clamp(min=torch.finfo(weight.dtype).tiny), self.x.double())

    def factors(self, views: dict[str, Tensor], sides: Sides) -> Factors:
        """(B_i [m, r_i], A_i [r_i, n]) of a layer; the rank of a client is that of what it holds."""
        pairs = [(_matrix(b, "B"), _matrix(a, "A")) for b, a in zip(*(views[side] for side in sides), strict=True)]
        masks = [None if kind.holds is None else self.layout.views(kind.holds.mask)[sides[1]] for kind in self.kinds]
        ranks = [len(a) if m is None else int(_matrix(m, "A").any(1).sum()) for m, (_, a) in zip(masks, pairs, strict=True)]
        return [factors.leading(pair, rank) for pair, rank in zip(pairs, ranks, strict=True)]


def _matrix(factor: Tensor, side: str) -> Tensor:
    """A factor of a layer as [m, r] or [r, n]."""
    return factor.flatten(1) if side == "A" else factor.reshape(factor.shape[0], factor.shape[1])


def _exploded(layer: str, held: Factors) -> str:
    most = max(float(factor.abs().max()) for pair in held for factor in pair)
    return (
        f"the factors of {layer} have grown to {most:.1e} and cannot be decomposed; most often the client learning rate is "
        "too high: lower method.solver.lr, or set its clip"
    )
