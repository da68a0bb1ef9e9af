"""Which client trains in which mode. Client code sees the result as numbers, not as branches.

Symbols: M clients of the cohort; ids [M]; n_m modes; knobs {name: [M] uint8}: for the forward pass (forward.py) "train", L
of the weights, "inputs", L of the layers' inputs, and "bfloat16", 1 where products are in it; "send", L of the upload
where the codec quantizes; "gap", L of the deployed model where the policy learns what that costs (sensitivity.py). 0: off
(float; as the codec is set).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from taciturn.core.errors import ConfigError, require
from taciturn.core.random import Key, fold, permutation
from taciturn.core.rounding import levels
from taciturn.core.state import State
from taciturn.core.types import Plan, Record
from taciturn.precision.modes import runnable


class Policy(Protocol):
    """WHICH precision. One that learns from rounds (adjust.py) has `learns = True`, `init() -> State` of the server,
    `update(state, ids [M], drawn [M], stats) -> State`, and `tell(state)`, plain numbers for the record.
    """

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that clients may get."""
        ...

    @property
    def inputs(self) -> int:
        """Bits of the layers' inputs, in training of the modes qat and in the deployed model; 0: float."""
        ...

    def draw(self, ids: Tensor, key: Key, state: State) -> Tensor:
        """Of each client of a cohort, the number of its mode: [M] int64."""
        ...


def learns(policy: Policy) -> bool:
    """True if rounds teach the policy, and clients measure for it."""
    return getattr(policy, "learns", False)


def start(policy: Policy) -> State:
    """The server's state of a policy before the first round."""
    state: State = policy.init() if learns(policy) else {}  # type: ignore[attr-defined]
    return state


def learned(policy: Policy, state: State, plan: Plan, stats: Record) -> State:
    """The state after a round. stats [M]: what rode on the uploads, "status", and "seconds" until each had arrived."""
    if not learns(policy):
        return state
    rows = torch.stack([row.unsqueeze(0) == plan.knobs[name].unsqueeze(1) for name, row in told(policy).items()])
    state = policy.update(state, plan.ids, rows.all(0).int().argmax(1), stats)  # type: ignore[attr-defined]
    return state


def tell(policy: Policy, state: State) -> dict[str, Any]:
    """What the record keeps of the policy's state."""
    told: dict[str, Any] = policy.tell(state) if learns(policy) else {}  # type: ignore[attr-defined]
    return told


def knobs(policy: Policy, ids: Tensor, key: Key, state: State) -> State:
    """What clients are told: those that differ from 0 for some mode; {} where all is float."""
    table = told(policy)
    drawn = policy.draw(ids, fold(key, "precision"), state) if table else ids
    return {name: row[drawn] for name, row in table.items()}


def told(policy: Policy) -> State:
    """The knobs of each mode: {name: [n_m] uint8}, those that differ from 0 for some mode."""
    found, inputs = runnable(policy.modes, "precision.modes"), levels(policy.inputs)
    table = {
        "train": [one.trained for one in found],
        "send": [one.sent for one in found],
        "inputs": [inputs if one.trained else 0 for one in found],
        "bfloat16": [int(one.train == "bfloat16") for one in found],
        "gap": [levels(deployed_bits(policy)) if learns(policy) else 0] * len(found),
    }
    return {name: torch.tensor(row, dtype=torch.uint8) for name, row in table.items() if any(row)}


def apart(policy: Policy) -> str:
    """What keeps clients from training layer by layer in float32, or ""."""
    table = told(policy)
    where = [said for knob, said in (("train", "on quantized weights"), ("bfloat16", "in bfloat16")) if knob in table]
    return f"clients train {' or '.join(where)}" if where else ""


def deployed_bits(policy: Policy) -> int:
    """Bits of the model that is deployed: the fewest of the modes that have some; 0 where all are float."""
    return min((one.bits for one in runnable(policy.modes, "precision.modes") if one.bits), default=0)


def _check(policy: Policy, where: str = "precision.modes") -> None:
    """Errors: `UnknownName`, `ConfigError`."""
    runnable(policy.modes, where)
    bits = policy.inputs
    require(bits == 0 or 2 <= bits <= 8, f"precision.inputs: 2 to 8 bits for the inputs of layers, or 0; got {bits}")
    for name in ("lam", "kappa"):
        value = getattr(policy, name, 0.0)
        require(0 <= value < float("inf"), f"precision.{name}: a number of at least 0; got {value}")


@dataclass(frozen=True, slots=True)
class all:
    """Every client in the same mode. inputs: bits, as in `Policy`. Errors: `UnknownName`, `ConfigError`."""

    mode: str = "float32"
    inputs: int = 0

    def __post_init__(self) -> None:
        _check(self, "precision.mode")

    @property
    def modes(self) -> tuple[str, ...]:
        """The one."""
        return (self.mode,)

    def draw(self, ids: Tensor, key: Key, state: State) -> Tensor:
        """Zeros."""
        return torch.zeros_like(ids)


@dataclass(frozen=True, slots=True)
class fixed:
    """Client i in mode modes[i mod n_m], in every round; one name for each client plays an allocation (allocate.py).

    inputs: bits, as in `Policy`. Errors: `UnknownName`, `ConfigError`.
    """

    modes: tuple[str, ...] = ("ptq8", "qat8")
    inputs: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def draw(self, ids: Tensor, key: Key, state: State) -> Tensor:
        """i mod n_m."""
        return ids % len(self.modes)


@dataclass(frozen=True, slots=True)
class coarse:
    """One mode for each client for the whole run, decided before it: the least J = max_k T_k / T_ref + lam sum_k d_k.

    T_k [s]: the round of client k on the run's fleet, predicted; T_ref: the longest with all in float32; d_k: the penalty
    a_k (1 + kappa h_k) gap of penalty.py, at its prior. lam: how many T_ref a penalty of 1 is worth; 0: the shortest round,
    and of all such the least penalty. After FedHQ (arXiv 2505.11982), its coarse stage: the idea; the formulas are ours.
    h_k needs a histogram of labels from each client, sent once and counted; with kappa = 0, or without classes, h_k = 0 and
    nothing is sent. A client gets no mode that its device has no kernel for. inputs: bits, as in `Policy`. Errors:
    `UnknownName`, `ConfigError`.
    """

    modes: tuple[str, ...] = ("ptq3", "qat3")
    lam: float = 1.0
    kappa: float = 1.0
    inputs: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def draw(self, ids: Tensor, key: Key, state: State) -> Tensor:
        """Errors: `ConfigError`; an experiment plays the allocation as `fixed` (experiment/allocation.py)."""
        raise ConfigError("precision = coarse is decided from the fleet and data of an experiment: use taciturn.run")


@dataclass(frozen=True, slots=True)
class coarse_fine:
    """`coarse` at first; then each round the best modes of its cohort, by what earlier rounds have taught (adjust.py).

    Every upload carries three numbers: the rise of the client's loss from quantizing its model (its gap), that loss, and
    how far it moved; the server sees when each arrives. Two regressions a mode learn the gap and the time. After `settle`
    rounds the modes of a cohort change where J then falls by over 2 %, and clients that have time to spare try what
    little is known of: it costs no time. lam doubles while the deployed model gets worse, and halves where rounds take too
    long. After FedHQ (arXiv 2505.11982), its fine stage: the idea; formulas, rules and constants are ours. inputs: bits, as
    in `Policy`. Errors: `UnknownName`, `ConfigError`.
    """

    modes: tuple[str, ...] = ("ptq3", "qat3")
    lam: float = 1.0
    kappa: float = 1.0
    settle: int = 5
    inputs: int = 0

    def __post_init__(self) -> None:
        _check(self)
        require(deployed_bits(self) > 0, f"precision.modes: one with bits at least, to learn its gap; got {self.modes}")
        require(self.settle >= 1, f"precision.settle: rounds, at least 1; got {self.settle}")

    def draw(self, ids: Tensor, key: Key, state: State) -> Tensor:
        """Errors: `ConfigError`; an experiment plays it as `adjusted` (experiment/allocation.py)."""
        raise ConfigError("precision = coarse_fine begins with the fleet and data of an experiment: use taciturn.run")


@dataclass(frozen=True, slots=True)
class random:
    """In each round a random part of the cohort in each mode: round(M share) clients, up to rounding of the sums.

    share: of each mode, positive, of sum 1; equal unless given. inputs: bits, as in `Policy`. Errors: `UnknownName`,
    `ConfigError`.
    """

    modes: tuple[str, ...] = ("ptq8", "qat8")
    share: tuple[float, ...] | None = None
    inputs: int = 0

    def __post_init__(self) -> None:
        _check(self)
        share = self.share or ()
        good = len(share) == len(self.modes) and min(share) > 0 and abs(sum(share) - 1) < 1e-6
        require(
            self.share is None or good,
            f"precision.share: a positive number for each of {len(self.modes)} modes, 1 in all; got {self.share}",
        )

    def draw(self, ids: Tensor, key: Key, state: State) -> Tensor:
        """Places in a random order, cut at M times the running sum of the shares."""
        n = len(self.modes)
        share = torch.tensor(self.share or [1 / n] * n, dtype=torch.float64)
        edges = (len(ids) * share.cumsum(0)[:-1]).round()
        return torch.bucketize(permutation(key, len(ids)), edges, right=True)
