"""What each codec would cost: bytes of its own messages, the noise it would add, and the loss at equal bytes.

Symbols: u messages of the pilot [n, d], ubar their mean, m_i the mean of client i; C a codec, E C(u) = u; V(u) = Cov(C(u) |
u) its conditional covariance; (lambda, q) eigenpairs of the curvature; M messages averaged in a round; B samples of the
bootstrap (over clients, then over their messages); s factor of the server's step.

Noise of a round, at each eigenvalue:  n = (1/M) [ mean_i Cov(u | i) + mean V(u) ] + (1 - M/N)/M Cov(m_i)
V from what the codec says of itself (`linear_map`, `variance`: no draws, no Monte Carlo error), else from draws of the
codec. V is taken at u - ubar (the law at the optimum, n_still) and at u (what the signal adds now, n_moving). With memory
(`difference`) it is taken at u - m_i and grows by kappa (`memory_factor`).
Forecast: `horizon.losses` with K = budget / (M bytes) rounds, at the best s for each codec. Q = bytes T, T = sum phi n / M:
the leading term of the averaged iterate's excess at equal bytes, told relative to no compression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from taciturn.advisor.curvature import Basis
from taciturn.advisor.horizon import FACTORS, Field, at, losses, reached
from taciturn.advisor.law import Law, evenly
from taciturn.advisor.pilot import Pilot
from taciturn.core import random
from taciturn.core.random import Key
from taciturn.wire.format import FRAME, Frame, pack

WEIGHED = 12  # messages of each codec that are packed
NEGLIGIBLE = 1e-4  # a bias of so much of the squared norm at most counts as noise (float16: 2e-7)
CONFIDENCE = 0.9
LONGEST = 20  # times the rounds of the reference, in which a codec may reach the target on a link


@dataclass(frozen=True)
class Forecast:
    """What is expected of one codec. Losses are of the final model at the budget; low, high: 90 % of the bootstrap.

    bytes: up for one message, mean; rounds: within the budget; factor: of the server's step; ratio: Q relative to no
    compression (low, high likewise), at the damping and at a quarter and four times of it; to_target: rounds; seconds: the
    same on the link; noise: the codec's part of a message's noise; paired, paired_seconds [B]: of the bootstrap; why: not
    predicted.
    """

    name: str
    codec: Any
    bytes: float
    rounds: int
    factor: float = math.nan
    loss: float = math.nan
    low: float = math.nan
    high: float = math.nan
    ratio: float = math.nan
    ratio_low: float = math.nan
    ratio_high: float = math.nan
    ratio_damping: tuple[float, float] = (math.nan, math.nan)
    to_target: float = math.nan
    seconds: float = math.nan
    noise: float = math.nan
    how: str = ""
    memory: bool = False
    paired: Tensor | None = field(default=None, repr=False)
    paired_seconds: Tensor | None = field(default=None, repr=False)
    why: str = ""


@dataclass(frozen=True)
class Budget:
    """bytes: up, of all clients together; megabits a second and seconds of latency of a client's link, if there is one;
    work: seconds of a round's local work by the fleet's clock (None: those of the pilot on this machine).
    """

    bytes: float
    mbit: float | None = None
    latency: float = 0.0
    work: float | None = None

    def seconds(self, pilot: Pilot, up: float) -> float:
        """Of one round: both ways over the client's link, one latency, and local work."""
        if self.mbit is None:
            return math.nan
        work = pilot.seconds_round if self.work is None else self.work
        return (up + pilot.bytes_down) * 8 / (self.mbit * 1e6) + self.latency + work


# ------------------------------------------------------------------------------------------------ one codec's noise


def weigh(codec: Any, pilot: Pilot, key: Key) -> float:
    """Mean bytes up for one of the codec's own messages, packed as it would be sent, with frame and statistics."""
    layout = pilot.curvature.work.split.layout
    picked = pilot.messages[evenly(len(pilot.messages), WEIGHED)]
    tx, _ = codec.init(layout)
    sizes = []
    for place, u in enumerate(picked):
        payload, _ = codec.encode(u, tx, random.fold(key, place), layout=layout, knobs={})
        sizes.append(len(pack(Frame("update", payload))) - FRAME)
    return sum(sizes) / len(sizes) + pilot.overhead


def residuals(codec: Any, u: Tensor, pilot: Pilot, key: Key) -> Tensor:
    """C(u) - u for each row, one draw of the codec each: [n, d]."""
    layout = pilot.curvature.work.split.layout
    tx, rx = codec.init(layout)

    def there(u: Tensor, key: Key) -> Tensor:
        payload, _ = codec.encode(u, tx, key, layout=layout, knobs={})
        decoded: Tensor = codec.decode(payload, rx, layout=layout)[0]
        return decoded - u

    keys = random.fold(key, torch.arange(len(u)))
    try:
        part = max(1, (1 << 24) // u.shape[1])
        pieces = [torch.vmap(there)(a, k) for a, k in zip(torch.split(u, part), torch.split(keys, part), strict=True)]
    except RuntimeError:
        pieces = [there(v, k).unsqueeze(0) for v, k in zip(u, keys, strict=True)]
    return torch.cat(pieces)


def added(codec: Any, u: Tensor, pilot: Pilot, basis: Basis, key: Key) -> tuple[Tensor, str]:
    """Energies of V(u) for each row of u [n, d] -> [n, k], and how they were found."""
    d = u.shape[1]
    if not codec.lossy:
        return torch.zeros(len(u), len(basis.nodes), dtype=torch.float64), "exact"
    terms = codec.linear_map(d) if hasattr(codec, "linear_map") else None
    if terms is not None:
        a, b, c = terms
        found = torch.zeros(len(u), len(basis.nodes), dtype=torch.float64)
        if abs(a - 1) > 1e-12:
            found = found + (a - 1) * basis.energies(u)
        if b:
            found = found + b * basis.diagonal(u.square())
        if c:
            found = found + c * u.to(torch.float64).square().sum(1, keepdim=True) * basis.flat()
        return found, "closed form"
    drawn = residuals(codec, u, pilot, random.fold(key, "draw"))
    for said in _said(codec, u, pilot):
        gap = said.sum(1) - drawn.to(torch.float64).square().sum(1)
        if abs(float(gap.mean())) <= 5 * float(gap.std()) / math.sqrt(len(u)) + 1e-9 * float(said.sum(1).mean()):
            return basis.diagonal(said), "conditional variance"
    if basis.most < len(u):
        return basis.energies(drawn), f"{len(u)} draws"
    more = residuals(codec, u, pilot, random.fold(key, "again"))
    return (basis.energies(drawn) + basis.energies(more)) / 2, f"{2 * len(u)} draws"


def _said(codec: Any, u: Tensor, pilot: Pilot) -> list[Tensor]:
    """The conditional variance [n, d] that the codec states of one tensor: of each tensor of the model, or of the vector.

    Which of them holds depends on the codec's scale; `added` believes the one that its draws bear out.
    """
    if not hasattr(codec, "variance"):
        return []
    parts = torch.split(u, list(pilot.curvature.work.split.layout.sizes), dim=1)
    said = torch.cat([codec.variance(part) for part in parts], dim=1)
    return [said, codec.variance(u)] if len(parts) > 1 else [said]


def unpredicted(codec: Any, pilot: Pilot, key: Key) -> str:
    """Why nothing is predicted of a codec, or ""."""
    if not codec.lossy or codec.unbiased:
        return ""
    picked = pilot.messages[evenly(len(pilot.messages), WEIGHED)]
    lost = float(residuals(codec, picked, pilot, key).square().sum() / picked.square().sum().clamp(min=1e-30))
    if lost <= NEGLIGIBLE:
        return ""
    return f"biased: what it loses ({100 * lost:.2g} % of a message) does not average out; measure it with a run"


def memory_of(codec: Any, d: int) -> tuple[Any, float] | None:
    """(inner codec, rate) of a codec that sends what is new against a memory (`difference`); else None."""
    return (codec.codec, codec.rate(d)) if hasattr(codec, "rate") else None


def memory_factor(alpha: float, omega: float) -> float:
    """kappa: what a memory of constant rate alpha adds to the codec's noise on centred messages.

    From 2 S = alpha L(M + S) with L = 1 + omega: [(2/alpha - 1) S - M] / (omega M); 4/3 at alpha = 1/(2 (1 + omega)).
    """
    if omega <= 0:
        return 1.0
    grown = alpha * (1 + omega)
    return ((2 - alpha) * (1 + omega) / (2 - grown) - 1) / omega if grown < 2 else math.inf


# ---------------------------------------------------------------------------------------------------------- forecasts


def forecasts(
    known: Law,
    codecs: Mapping[str, Any],
    budget: Budget,
    *,
    base: Any,
    target_rounds: int,
    factors: tuple[float, ...] = FACTORS,
    key: Key | None = None,
) -> list[Forecast]:
    """One forecast a codec, in the order given. base: the codec that ratios and the target refer to (identity).

    target_rounds: the target of the time is what `base` is predicted to reach in so many rounds.
    """
    key, pilot = random.key(1) if key is None else key, known.pilot
    field, total, _ = _noise(known, base, key)
    plain = _final(pilot, *_curves(known, field, target_rounds, factors), target_rounds, factors)
    reference = _Reference(weigh(base, pilot, key), total, float(plain[0].min()), target_rounds)
    found = []
    for name, codec in codecs.items():
        size = weigh(codec, pilot, key)
        row = Forecast(name, codec, size, _rounds(pilot, budget, size), why=unpredicted(codec, pilot, key))
        found.append(row if row.why else _forecast(known, row, budget, reference, factors, key))
    return found


@dataclass(frozen=True)
class _Reference:
    """What codecs are compared with: bytes and noise [B, k] of a message, and the loss it is predicted to reach."""

    bytes: float
    total: Tensor
    target: float
    rounds: int


def _rounds(pilot: Pilot, budget: Budget, size: float) -> int:
    return int(min(1e6, budget.bytes / max(1e-9, pilot.cohort_clients * size)))


def _noise(known: Law, codec: Any, key: Key, memory: tuple[Any, float] | None = None) -> tuple[Field, Tensor, str]:
    """-> the round's noise for the horizon, energies of one message's noise at the optimum [B, k], how it was found.

    memory: (codec, rate), where the codec is to be seen under a memory that it does not hold itself.
    """
    pilot, basis, rows = known.pilot, known.basis, known.rows
    memory = memory or memory_of(codec, pilot.d)
    inner = known.boot @ known.within
    if memory is None:
        still, how = added(codec, known.centred[rows], pilot, basis, key)
        now, _ = added(codec, pilot.messages[rows], pilot, basis, key)
        still, now = known.boot @ still, known.boot @ now
    else:
        still, how = added(memory[0], known.personal[rows], pilot, basis, key)
        still = known.boot @ still
        omega = float(still[0].sum() / inner[0].sum().clamp(min=1e-300))
        still = memory_factor(memory[1], omega) * still
        now, how = still, f"{how}, with memory"
    total = inner + still
    clients = (1 - pilot.share) / pilot.cohort * known.between.clamp(min=0.0).expand(len(total), -1)
    parts = (known.binned(t) for t in (total / pilot.cohort, clients, (now - still) / pilot.cohort))
    return Field(known.signal, *parts), total, how


def _early(pilot: Pilot, rounds: Tensor) -> Tensor:
    """The pilot's own loss after so many of its rounds (a step of s counts as s rounds)."""
    places = torch.arange(len(pilot.curve), dtype=torch.float64)
    return at(places, pilot.curve.reshape(1, 1, -1).expand(1, len(rounds), -1), rounds).squeeze(0)


def _curves(known: Law, field: Field, rounds: int, factors: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds after the pilot's end [T], losses there [B, S, T], and the rounds that lead to it at each factor [S]."""
    lead = (len(known.pilot.curve) - 1) / torch.tensor(factors, dtype=torch.float64)
    done, curve = losses(known.terrain, field, max(1, rounds - int(lead.min())), factors)
    return done, curve, lead


def _final(pilot: Pilot, done: Tensor, curve: Tensor, lead: Tensor, rounds: int, factors: tuple[float, ...]) -> Tensor:
    """Losses [B, S] after `rounds` rounds from the start, from `_curves` that reach so far."""
    later = at(done, curve, (rounds - lead).clamp(min=0.0))
    speed = torch.tensor(factors, dtype=torch.float64)
    return torch.where(rounds >= lead, later, _early(pilot, rounds * speed).expand_as(later))


def _forecast(
    known: Law, row: Forecast, budget: Budget, reference: _Reference, factors: tuple[float, ...], key: Key
) -> Forecast:
    """The row, filled in. Every sample of the bootstrap tunes its own step, as a run would."""
    pilot, ends = known.pilot, torch.tensor([0.05, 0.95], dtype=torch.float64)
    field, total, how = _noise(known, row.codec, key)
    longest = max(row.rounds, LONGEST * reference.rounds if budget.mbit is not None else 0)
    done, curve, lead = _curves(known, field, longest, factors)
    every = _final(pilot, done, curve, lead, row.rounds, factors)
    best, paired = int(every[0].argmin()), every.min(1).values
    low, high = torch.quantile(paired, ends).tolist()
    noise = 1 - float((known.boot[0] @ known.within).sum() / total[0].sum().clamp(min=1e-300))
    ratios = [_ratio(known, row.bytes, total, reference, scale) for scale in (1.0, 0.25, 4.0)]
    bounds = torch.quantile(ratios[0], ends).tolist()
    when = (reached(done, curve, reference.target) + lead).min(1).values
    seconds = when * budget.seconds(pilot, row.bytes)
    return replace(
        row, factor=factors[best], loss=float(every[0, best]), low=low, high=high, noise=noise, how=how, paired=paired,
        memory=memory_of(row.codec, pilot.d) is not None, ratio=float(ratios[0][0]), ratio_low=bounds[0],
        ratio_high=bounds[1], ratio_damping=(float(ratios[1][0]), float(ratios[2][0])), to_target=float(when[0]),
        seconds=float(seconds[0]), paired_seconds=seconds,
    )  # fmt: skip


def memory_gain(known: Law, codec: Any, alpha: float, key: Key | None = None) -> Tensor:
    """Noise of the codec with memory over without [B], weighed by the inverse curvature: below 1 it pays."""
    key = random.key(1) if key is None else key
    _, without, _ = _noise(known, codec, key)
    _, held, _ = _noise(known, codec, key, (codec, alpha))
    pilot = known.pilot
    phi = replace(known.terrain, nodes=known.basis.nodes).weight(max(pilot.decay, 0.01 / (pilot.gamma * pilot.steps)))
    return (held @ phi) / (without @ phi).clamp(min=1e-300)


def _ratio(known: Law, size: float, total: Tensor, reference: _Reference, scale: float) -> Tensor:
    """Q(codec) / Q(base) [B], with the damping max(weight decay, scale / (gamma tau K))."""
    pilot = known.pilot
    damping = max(pilot.decay, scale / (pilot.gamma * pilot.steps * max(1, reference.rounds)))
    phi = replace(known.terrain, nodes=known.basis.nodes).weight(damping)
    return size * (total @ phi) / (reference.bytes * (reference.total @ phi)).clamp(min=1e-300)
