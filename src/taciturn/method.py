"""A method is a choice of parts; every field can be changed alone.

what is shared x when to synchronise x how it is encoded, up and down x how clients train x how the server aggregates
and steps x who takes part x in which precision clients train and send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from taciturn.aggregation import controlled, low_rank, mean, private, running, weighted
from taciturn.aggregation.low_rank import OPERATORS, pairs_of
from taciturn.codecs import chain, clip, difference, error_feedback, identity, lossless, lowrank, quantize, quantize4
from taciturn.codecs.memory import starts_apart
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import MethodError, ModelError, require
from taciturn.core.types import (
    Aggregator,
    Codec,
    Participation,
    Partition,
    ServerOptimizer,
    Solver,
    Split,
    SyncRule,
)
from taciturn.core.vector import Layout
from taciturn.participation import all as everyone
from taciturn.participation import poisson
from taciturn.partition import full, lora, twins
from taciturn.precision import all as in_float32
from taciturn.precision import coarse, coarse_fine
from taciturn.precision.policies import Policy
from taciturn.server import momentum, recent
from taciturn.server import sgd as server_sgd
from taciturn.solvers import adamw, ditto, lbfgs, pfedme, scaffold, sgd
from taciturn.sync import every, fda
from taciturn.sync.thresholds import adaptive

# of `Method.lean`: ranks up and down; epochs: that sending the model is worth, of round 1, of any round; of the server
RANK_UP, RANK_DOWN, CROSSING, FIRST, MOST, MOMENTUM = 4, 2, 5000.0, 5.0, 20, 0.5
STARTS_ANYWHERE = (sgd, adamw, lbfgs)  # solvers that do not measure from where they start
_PROBE = Layout(("probe",), ((8, 8),))


def _check_running(codec: Codec, aggregator: Aggregator) -> None:
    """A memory that the server keeps as one mean needs the aggregator that keeps it, at the same rate."""
    apart = isinstance(codec, difference) and codec.memory == "mean"
    if apart != isinstance(aggregator, running):
        raise MethodError(
            'method: codec = difference(.., memory = "mean") and aggregator = running are the two halves of one memory; '
            f"got codec = {type(codec).__name__} and aggregator = {type(aggregator).__name__}"
        )
    if isinstance(codec, difference) and isinstance(aggregator, running) and codec.alpha != aggregator.alpha:
        raise MethodError(f"method: codec.alpha = {codec.alpha} and aggregator.alpha = {aggregator.alpha} must be equal")


def _check_points(solver: Solver, aggregator: Aggregator, server: ServerOptimizer) -> None:
    """Clients that send points, of which the server keeps the mean, need all of what that mean is made of."""
    sends, keeps = bool(getattr(solver, "point", False)), isinstance(aggregator, running) and aggregator.update == "point"
    if sends != keeps:
        raise MethodError(
            'method: a solver that sends points (admm) needs aggregator = running(update = "point") and codec = '
            'difference(codec, alpha = 1, memory = "mean"), and only such a solver does; got solver = '
            f"{type(solver).__name__}, aggregator = {aggregator}"
        )
    if keeps and (getattr(aggregator, "alpha", None) != 1.0 or server != server_sgd(lr=1.0)):
        raise MethodError(
            "method: the mean of the clients' points is the model itself: aggregator.alpha = 1, codec.alpha = 1 and server "
            f"= sgd(lr = 1); got aggregator = {aggregator}, server = {server}"
        )


def _check_gauge(aggregator: Aggregator, server: ServerOptimizer) -> None:
    """An optimizer that remembers directions must not see its coordinates turned."""
    if isinstance(aggregator, low_rank) and aggregator.turns and server != server_sgd(lr=1.0):
        raise MethodError(
            f'method: aggregator = low_rank(operator = "{aggregator.operator}") gives factors in a gauge of their own, and '
            f"server = {server} would step from the old ones to them; use server = sgd(lr = 1), or operator = "
            '"factor_mean" or "tangent"'
        )


def _check_merges(aggregator: Aggregator, server: ServerOptimizer, broadcast: Broadcast, partition: Partition) -> None:
    """Update and merge are two halves of one change: the server applies the first as it is, both arrive exactly, and the
    base holds what it takes.
    """
    if not merges(aggregator):
        return
    bits = getattr(partition, "base_bits", 0)
    if bits:
        raise MethodError(
            f"method: aggregator = {aggregator} merges float products into the frozen base, and partition.base_bits = "
            f"{bits} holds it in {bits} bits, which could not take them; use base_bits = 0, or an operator that does not "
            'merge, such as "product_svd" or "tangent"'
        )
    if server != server_sgd(lr=1.0):
        raise MethodError(
            f"method: aggregator = {aggregator} merges into the frozen base what its pair of factors leaves out, and "
            f"server = {server} would step elsewhere than to that pair; use server = sgd(lr = 1)"
        )
    if broadcast.codec.lossy:
        raise MethodError(
            f"method: aggregator = {aggregator} merges into the frozen base what its pair of factors leaves out, and "
            f"broadcast.codec = {broadcast.codec} would lose a part of the pair; use broadcast.codec = identity"
        )


def _check_twins(partition: Partition, solver: Solver) -> None:
    """With two copies of a model one solver has to move both."""
    if isinstance(partition, twins) and not isinstance(solver, (ditto, pfedme)):
        raise MethodError(
            f"method: with partition = twins, solver = {type(solver).__name__} would train the personal copy alone and "
            "send nothing new; use solver = ditto or pfedme, or partition = full"
        )


def _check_control(solver: Solver, codec: Codec, aggregator: Aggregator, server: ServerOptimizer) -> None:
    """Solver and aggregator are the two ends of one message; its second half is summed up for good, unscaled."""
    if isinstance(solver, scaffold) != isinstance(aggregator, controlled):
        raise MethodError(
            "method: solver = scaffold and aggregator = controlled are the two halves of SCAFFOLD; got solver = "
            f"{type(solver).__name__} and aggregator = {type(aggregator).__name__}"
        )
    if not isinstance(solver, scaffold):
        return
    if server != server_sgd(lr=1.0):
        raise MethodError(
            f"method: server = {server} would move the control variate of scaffold, which is a mean and no direction; use "
            "server = sgd(lr = 1), and aggregator = controlled(lr = ..) for the server's rate"
        )
    inner = codec.codec if isinstance(codec, lossless) else codec
    if inner.lossy and not isinstance(inner, (difference, error_feedback)):
        raise MethodError(
            f"method: the server sums up what arrives of the control variates of scaffold, so what codec = {codec} loses "
            f"stays in them; use identity, or a memory: error_feedback({type(inner).__name__}(..)) or difference(..)"
        )


def _within(codec: Codec) -> Iterator[Codec]:
    """The codecs that a codec is made of."""
    for name in getattr(codec, "__dataclass_fields__", ()):
        part = getattr(codec, name)
        if hasattr(part, "encode"):
            yield part
            yield from _within(part)


def _check_start(solver: Solver, codec: Codec) -> None:
    """A client that trains on from what was lost starts elsewhere than at what it holds."""
    if any(starts_apart(part) for part in _within(codec)):
        raise MethodError(
            f'method: codec = {codec}: error_feedback with into = "start" tells the client where to start, which a codec '
            'around it would change; let it stand outermost, or use into = "message"'
        )
    if starts_apart(codec) and not isinstance(solver, STARTS_ANYWHERE):
        raise MethodError(
            f'method: error_feedback with into = "start" trains on from what was lost, and solver = '
            f'{type(solver).__name__} measures from where it starts; use into = "message", or solver = sgd or adamw'
        )


def _check_private(method: Method) -> None:
    """A guarantee holds for what is clipped and noisy; nothing else of a client's data may steer what is released."""
    codec, aggregator = method.codec, method.aggregator
    if any(isinstance(part, clip) for part in _within(codec)):
        raise MethodError(
            f"method: codec = {codec}: a codec around clip would change what was clipped, and send later what noise took "
            "away; clip stands outermost, codec = clip(codec = ..)"
        )
    if not (isinstance(aggregator, private) or is_silent(codec)):
        return
    said = "method: for aggregator = private" if isinstance(aggregator, private) else "method: for codec = clip with noise"
    if isinstance(aggregator, private) and is_silent(codec):
        raise MethodError("method: aggregator = private and codec = clip with noise both add noise; set clip.noise = 0")
    if not isinstance(aggregator, private) and aggregator != mean(weights="clients"):
        raise MethodError(f"{said}, aggregator = mean, in which every client counts the same; got {aggregator}")
    if not isinstance(method.sync, every) or method.sync.pace != "own":
        raise MethodError(
            f'{said}, sync = every(pace = "own"); got {method.sync}, by which what clients do depends on numbers of the '
            "others, told without noise"
        )
    if isinstance(method.precision, coarse | coarse_fine) or getattr(method.precision, "learns", False):
        raise MethodError(
            f"{said}, precision = all, fixed or random; {type(method.precision).__name__} decides by labels and "
            "measurements of clients, told without noise"
        )
    rate = getattr(aggregator, "rate", None)
    draws = method.participation.rate if isinstance(method.participation, poisson) else 1.0
    if rate is not None and (rate != draws or not isinstance(method.participation, poisson | everyone)):
        raise MethodError(
            f"{said}, participation = poisson(rate = {rate}), or all with rate = 1: the accountant knows no other "
            f"sampling; got {method.participation} and rate = {rate}"
        )


def is_silent(codec: Codec) -> bool:
    """True if clients add noise of their own, and tell nothing without it."""
    return bool(getattr(codec, "silent", False))


def _check_alone(method: Method, split: Split) -> None:
    """Where nothing is shared there is no vector to encode and no drift to look at."""
    if not split.layout.d and (method.codec.lossy or method.broadcast.codec.lossy or method.sync.observer != "nobody"):
        raise MethodError(
            f"method: partition = {method.partition} shares nothing, so codec = {method.codec}, broadcast.codec = "
            f"{method.broadcast.codec} and sync = {method.sync} have nothing to work on; use codec = identity, "
            "broadcast = Broadcast(identity) and sync = every"
        )


def _check_kinds(aggregator: Aggregator, split: Split) -> None:
    """Only some aggregators, and operators, know that a coordinate is not everybody's."""
    knows = getattr(aggregator, "kinds", False)
    if isinstance(aggregator, low_rank) and any(kind.holds is not None for kind in split.kinds):
        knows = OPERATORS[aggregator.operator].unequal and not aggregator.align
    if not knows:
        raise MethodError(
            f"method: aggregator = {aggregator} takes every coordinate for everybody's, and the clients of this partition "
            "work on unlike parts; use mean, weighted, or low_rank, for unlike ranks without align and with operator = "
            + ", ".join(f'"{name}"' for name, operator in OPERATORS.items() if operator.unequal)
        )


def _check_common(aggregator: Aggregator, split: Split) -> None:
    """FedSVD turns a factor that nobody trains; and every layer must be able to take its product, where there are any."""
    if not isinstance(aggregator, low_rank):
        return
    one = len(split.kinds) == 1 and split.kinds[0].trains is not None
    if OPERATORS[aggregator.operator].common and not one:
        raise MethodError(
            f'method: operator = "{aggregator.operator}" is for clients that train B and are sent A; use partition = '
            'lora(share = "B", rest = "server")'
        )
    if merges(aggregator) and split.merging is not None:
        bad = sorted(set(pairs_of(split.layout)) - set(split.merging.base.names))
        if bad:
            raise ModelError(
                f"{', '.join(bad)}: a grouped convolution, or a weight that another layer uses too, cannot take the "
                f"products of {aggregator}; leave it out of lora.targets, or choose an operator that does not merge"
            )


def merges(aggregator: Aggregator) -> bool:
    """True if the changes of this aggregator have products for the frozen base."""
    return bool(getattr(aggregator, "merges", False))


@dataclass(frozen=True, slots=True)
class Method:
    """The parts of a federated method. The defaults are FedAvg (McMahan et al. 2017) with all clients, one epoch a round.

    batch_size: samples of a local step (a client with fewer uses all it has). Errors: `MethodError` for parts that make
    no sense together.

    >>> Method().replace(batch_size=10).batch_size
    10
    """

    partition: Partition = full()
    participation: Participation = everyone()
    sync: SyncRule = every()
    solver: Solver = sgd()
    codec: Codec = identity()
    aggregator: Aggregator = weighted()
    server: ServerOptimizer = server_sgd()
    broadcast: Broadcast = Broadcast(identity())
    precision: Policy = in_float32()
    batch_size: int = 32

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"method.batch_size: at least 1 sample; got {self.batch_size}")
        if self.broadcast.of == "change" and not self.broadcast.codec.lossy:
            raise MethodError(
                'method.broadcast: of = "change" with a lossless codec costs what of = "model" costs and needs a log; '
                'use of = "model"'
            )
        if self.broadcast.codec.init(_PROBE) != ({}, {}):
            raise MethodError(
                f"method.broadcast: {type(self.broadcast.codec).__name__} keeps a memory for one receiver, and a broadcast "
                'has many; of = "change" with the codec inside it is the memory of the way down'
            )
        _check_twins(self.partition, self.solver)
        _check_points(self.solver, self.aggregator, self.server)
        _check_running(self.codec, self.aggregator)
        _check_gauge(self.aggregator, self.server)
        _check_control(self.solver, self.codec, self.aggregator, self.server)
        _check_merges(self.aggregator, self.server, self.broadcast, self.partition)
        _check_start(self.solver, self.codec)
        _check_private(self)

    def split(self, model: nn.Module, tracked: frozenset[str]) -> Split:
        """The partition's split, that for methods that merge where the aggregator does, with what the solver adds to it."""
        split = self.partition.split(model, tracked)
        _check_alone(self, split)
        if split.kinds:
            _check_kinds(self.aggregator, split)
        _check_common(self.aggregator, split)
        if merges(self.aggregator):
            if split.merging is None:
                raise MethodError(
                    f"method: aggregator = {self.aggregator} merges into layers with adapters whose factors are both "
                    f'shared, and partition = {self.partition} has none; use partition = lora(share = "both")'
                )
            split = split.merging
        extend: Callable[[Split], Split] | None = getattr(self.solver, "extend", None)
        return split if extend is None else extend(split)

    def encoded(self, codec: Codec) -> Method:
        """The same method with another codec on the way up, inside the clip of the old one; `running` goes with the codec
        whose memory it kept.
        """
        aggregator = mean(self.aggregator.weights) if isinstance(self.aggregator, running) else self.aggregator
        codec = replace(self.codec, codec=codec) if isinstance(self.codec, clip) else codec
        return replace(self, codec=codec, aggregator=aggregator)

    def secret(self) -> Method:
        """The same method with noise and cohorts of the operating system, as real sites need; most methods have none."""
        parts = {name: getattr(self, name) for name in ("codec", "aggregator", "participation")}
        return replace(self, **{name: replace(one, secret=True) for name, one in parts.items() if hasattr(one, "secret")})

    @classmethod
    def lean(cls, base: Method | None = None) -> Method:
        """What says the least, made of the user's method; nothing of it is to be tuned.

            values   of each matrix two thin factors, of rank RANK_UP and RANK_DOWN, in 3 bits, compressed once more without
                     loss. What is left out is sent later: up by a memory of each client, down as the change of what all
                     hold (Vogels et al. 2019; Seide et al. 2014)
            start    each site builds the first model itself; it is never sent
            memory   clients train on from what was left out (`error_feedback`, into = "start"): in rounds so long it would
                     else be learnt again, and added twice
            rounds   each client stops at its own drift (`fda`, local monitor), with sending the model once worth CROSSING
                     local epochs: some ten epochs, at most MOST, and about FIRST in the first round
            steps    of `sgd` without a clip: gradients are clipped at 1 / lr, so that, but for momentum, no step moves a
                     model further than 1; most are far shorter
            server   some momentum, MOMENTUM, against unlike cohorts; the result is the mean of the recent models (`recent`)

        With partition = lora all values in 4 bits, and `fda()`: there are few, and they all move. Partition, participation,
        aggregator, batch size and, but for that bound, solver stay: a client step that is right for FedAvg is the one to
        use. The constants come from five tasks, the figures from others (`python -m bench.lean`). Not where local work or
        rounds are dear: it takes several times as many; nor below some thousand values, where frames are most of it.
        Errors: `MethodError` for a solver, aggregator or partition that its codecs do not fit (admm, merges, local).
        """
        base = cls() if base is None else base
        if isinstance(base.partition, lora):
            small = quantize4()
            return base.encoded(error_feedback(small)).replace(
                broadcast=Broadcast(small, of="change", start="known"), sync=fda(), server=server_sgd()
            )
        values = quantize(bits=3, rounding="nearest", scale="block")
        up, down = (
            lossless(chain(factors, values), "rans")
            for factors in (lowrank(RANK_UP), lowrank(RANK_DOWN, turns=3, warm=False))
        )
        rule = fda(monitor="local", crossing=CROSSING, theta=adaptive(start=FIRST), max_blocks=MOST)
        solver = base.solver
        apart = isinstance(solver, STARTS_ANYWHERE) and not isinstance(base.codec, clip)
        if isinstance(solver, sgd) and solver.clip is None and solver.lr > 0:
            solver = replace(solver, clip=1 / solver.lr)
        return base.encoded(error_feedback(up, into="start" if apart else "message")).replace(
            broadcast=Broadcast(down, of="change", start="known"),
            sync=rule,
            server=recent(momentum(momentum=MOMENTUM)),
            solver=solver,
        )

    def replace(self, **parts: Any) -> Method:
        """The same method with some parts changed."""
        return replace(self, **parts)
