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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from taciturn.advisor.curvature import FLOOR, Basis, on_grid, spectrum
from taciturn.advisor.horizon import FACTORS, Field, Terrain, at, losses, reached
from taciturn.advisor.pilot import Pilot
from taciturn.core import random
from taciturn.core.random import Key
from taciturn.wire.format import FRAME, Frame, pack

BOOTSTRAP = 60
BINS = 128
WEIGHED = 12  # messages of each codec that are packed
NEGLIGIBLE = 1e-4  # a bias of so much of the squared norm at most counts as noise (float16: 2e-7)
CONFIDENCE = 0.9


@dataclass(frozen=True)
class Forecast:
    """What is expected of one codec. Losses are of the final model at the budget; low, high: 90 % of the bootstrap.

    bytes: of one message, packed, mean; rounds: within the budget; factor: of the server's step; ratio: Q relative to no
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
    """bytes: up, of all clients together; megabits a second and seconds of latency of a client's link, if there is one."""

    bytes: float
    mbit: float | None = None
    latency: float = 0.0

    def seconds(self, pilot: Pilot, up: float) -> float:
        """Of one round: both ways over the client's link, one latency, and the pilot's computing."""
        if self.mbit is None:
            return math.nan
        return (up + pilot.bytes_down + 2 * FRAME) * 8 / (self.mbit * 1e6) + self.latency + pilot.seconds_round


# ------------------------------------------------------------------------------------------------ one codec's noise


def weigh(codec: Any, pilot: Pilot, key: Key) -> float:
    """Mean bytes of the codec's own messages, packed as they would be sent, without the frame."""
    layout = pilot.curvature.work.split.layout
    picked = pilot.messages[_spread(len(pilot.messages), WEIGHED)]
    tx, _ = codec.init(layout)
    sizes = []
    for place, u in enumerate(picked):
        payload, _ = codec.encode(u, tx, random.fold(key, place), layout=layout, knobs={})
        sizes.append(len(pack(Frame("update", payload))) - FRAME)
    return sum(sizes) / len(sizes)


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
    if hasattr(codec, "linear_map"):
        a, b, c = codec.linear_map(d)
        found = torch.zeros(len(u), len(basis.nodes), dtype=torch.float64)
        if abs(a - 1) > 1e-12:
            found = found + (a - 1) * basis.energies(u)
        if b:
            found = found + b * basis.diagonal(u.square())
        if c:
            found = found + c * u.to(torch.float64).square().sum(1, keepdim=True) * basis.flat()
        return found, "closed form"
    if hasattr(codec, "variance"):
        return basis.diagonal(codec.variance(u)), "conditional variance"
    draws = 2 if basis.most > len(u) else 1
    pieces = [basis.energies(residuals(codec, u, pilot, random.fold(key, "draw", r))) for r in range(draws)]
    return sum(pieces[1:], pieces[0]) / draws, f"{draws * len(u)} draws"


def unpredicted(codec: Any, d: int) -> str:
    """Why nothing is predicted of a codec, or ""."""
    if not codec.lossy or getattr(codec, "unbiased", False):
        return ""
    omega = codec.omega(d) if hasattr(codec, "omega") else 0.0 if type(codec).__name__ == "cast" else math.inf
    if omega <= NEGLIGIBLE:
        return ""
    return "biased: its error does not average out, so no covariance predicts it; measure it with a run"


def memory_factor(alpha: float, omega: float) -> float:
    """kappa: what a memory of constant rate alpha adds to the codec's noise on centred messages.

    From 2 S = alpha L(M + S) with L = 1 + omega: [(2/alpha - 1) S - M] / (omega M); 4/3 at alpha = 1/(2 (1 + omega)).
    """
    if omega <= 0:
        return 1.0
    grown = alpha * (1 + omega)
    return ((2 - alpha) * (1 + omega) / (2 - grown) - 1) / omega if grown < 2 else math.inf


# ---------------------------------------------------------------------------------------------------- the pilot's law


def _spread(n: int, most: int) -> Tensor:
    """Up to `most` of 0..n-1, evenly."""
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).round().to(torch.int64)


@dataclass(frozen=True)
class Law:
    """The pilot's messages in the spectrum. rows: which messages; boot [B, n]: their weights, the first row as sampled.

    centred, personal [n, d]: u - ubar; u - m_i times sqrt(R/(R - 1)); within [n, k]: energies of the latter; between [k]:
    of m_i - mbar, without the part that is noise; signal [B, k]; tails: see `_tails`;
    rho: between over within, in traces. fold [k]: nodes -> the terrain's.
    """

    pilot: Pilot
    basis: Basis
    rows: Tensor
    boot: Tensor
    centred: Tensor
    personal: Tensor
    within: Tensor
    between: Tensor
    signal: Tensor
    rho: float
    rho_low: float
    rho_high: float
    terrain: Terrain
    tails: float

    def binned(self, energies: Tensor) -> Tensor:
        """[.., nodes] -> [.., terrain nodes]."""
        return _binned(self.basis.nodes, self.terrain.nodes, energies)


def _binned(nodes: Tensor, to: Tensor, energies: Tensor) -> Tensor:
    if len(nodes) == len(to):
        return energies
    flat = energies.reshape(-1, len(nodes))
    return on_grid(to, nodes.expand(len(flat), -1), flat).reshape(*energies.shape[:-1], len(to))


def _bootstrap(client: Tensor, weights: Tensor, key: Key, samples: int = BOOTSTRAP) -> Tensor:
    """Weights [B, n] of messages: clients with replacement, then messages of each; row 0 is the sample itself."""
    counts = torch.bincount(client, minlength=len(weights)).to(torch.float64)
    base = (weights / counts.clamp(min=1))[client]
    rows = [base]
    for b in range(1, samples):
        own = random.fold(key, "bootstrap", b)
        clients = (random.uniform(random.fold(own, "clients"), len(weights)) * len(weights)).to(torch.int64)
        times = torch.bincount(clients, minlength=len(weights)).to(torch.float64)
        picks = random.uniform(random.fold(own, "messages"), len(client))
        order = torch.argsort(client, stable=True)  # messages of a client stand together
        starts = torch.cat([torch.zeros(1), counts.cumsum(0)[:-1]]).to(torch.int64)
        drawn = order[(starts[client] + (picks * counts[client]).to(torch.int64))]
        many = torch.bincount(drawn, minlength=len(client)).to(torch.float64)
        rows.append(base * times[client] * many)
    boot = torch.stack(rows)
    return boot / boot.sum(1, keepdim=True).clamp(min=1e-300)


def law(pilot: Pilot, basis: Basis | None = None, key: Key | None = None) -> Law:
    """Look at the pilot's messages in the spectrum of the curvature."""
    key = random.key(0) if key is None else key
    basis = spectrum(pilot.curvature, random.fold(key, "spectrum")) if basis is None else basis
    sent, client, weights = pilot.messages.to(torch.float32), pilot.client, pilot.weights
    boot = _bootstrap(client, weights, key)
    counts = torch.bincount(client, minlength=len(weights)).to(torch.float64)
    means = torch.zeros(len(weights), pilot.d).index_add_(0, client, sent) / counts.to(torch.float32).unsqueeze(1)
    mean = (boot[:1].to(torch.float32) @ sent).squeeze(0)
    rows = _spread(len(sent), basis.most)
    personal = (counts / (counts - 1).clamp(min=1)).sqrt()[client].unsqueeze(1).to(torch.float32) * (sent - means[client])
    within = basis.energies(personal[rows])
    part = boot[:, rows] / boot[:, rows].sum(1, keepdim=True).clamp(min=1e-300)
    inner = part @ within
    picked = _spread(len(weights), basis.most)
    share = weights[picked] / weights[picked].sum()
    noise = float((weights.square() / counts).sum())  # of the mean of all messages, in units of `within`
    outer = share @ basis.energies((means - mean)[picked]) - (float((weights / counts).sum()) - noise) * inner[0]
    if basis.most < len(sent):
        signal = basis.energies(mean.unsqueeze(0)).expand(len(boot), -1) - noise * inner
    else:
        extra = torch.full((len(boot), 1), 2 * noise, dtype=torch.float64)
        extra[0] = noise
        signal = basis.energies(boot.to(torch.float32) @ sent) - extra * inner
    nodes = basis.nodes
    if len(nodes) > BINS:
        top = max(float(nodes.max()), 1e-30)
        nodes = torch.logspace(math.log10(FLOOR * top), math.log10(top), BINS, dtype=torch.float64)
    terrain = Terrain(nodes, pilot.gamma, pilot.steps, pilot.decay, pilot.loss)
    signal = _binned(basis.nodes, nodes, signal).clamp(min=0.0)
    spread = _rho(sent, client, means, boot, counts)
    tails = _tails((sent - means[client]).square().sum(1).to(torch.float64), boot[0])
    return Law(pilot, basis, rows, part, sent - mean, personal, within, outer, signal, *spread, terrain, tails)


def _rho(sent: Tensor, client: Tensor, means: Tensor, boot: Tensor, counts: Tensor) -> tuple[float, float, float]:
    """rho = mean ||m_i - mbar||^2 / mean tr Cov_i, corrected for the noise of m_i, and 90 % of the bootstrap."""
    unbias = (counts / (counts - 1).clamp(min=1))[client]
    own = (sent - means[client]).square().sum(1).to(torch.float64) * unbias
    found = []
    for weight in boot:
        mass = torch.zeros(len(means), dtype=torch.float64).index_add_(0, client, weight)
        center = (mass.to(means) @ means).unsqueeze(0)
        far = (mass * (means - center).square().sum(1).to(torch.float64)).sum()
        near = (weight * own).sum()
        live = mass > 0
        noise = (mass[live] * (1 - mass[live]) / counts[live]).sum() * near
        found.append(float((far - noise).clamp(min=0.0) / near.clamp(min=1e-300)))
    low, high = torch.quantile(torch.tensor(found), torch.tensor([0.05, 0.95])).tolist()
    return found[0], low, high


def _tails(norms: Tensor, weights: Tensor, groups: int = 8) -> float:
    """Median of means over mean of the messages' squared norms: far below 1 where tails are heavy."""
    order = random.permutation(random.key(0), len(norms))
    norms, mean = (len(norms) * weights * norms)[order], float((weights * norms).sum())
    part = [norms[g::groups].mean() for g in range(groups)]
    return float(torch.stack(part).median()) / mean if mean > 0 else 1.0


# ---------------------------------------------------------------------------------------------------------- forecasts


def forecasts(
    known: Law,
    codecs: Mapping[str, Any],
    budget: Budget,
    *,
    base: Any,
    target_rounds: int,
    memory: Callable[[Any], tuple[Any, float] | None] = lambda codec: None,
    factors: tuple[float, ...] = FACTORS,
    key: Key | None = None,
) -> list[Forecast]:
    """One forecast a codec, in the order given. base: the codec that ratios and the target refer to (identity).

    target_rounds: the target of the time is what `base` is predicted to reach in so many rounds. memory: codec -> (inner
    codec, alpha) if it keeps a memory.
    """
    key = random.key(1) if key is None else key
    plain = _forecast(known, "", base, budget, None, factors, key, target_rounds, None)
    assert plain.paired is not None
    target = _value(known, base, key, target_rounds, factors, memory(base))
    found = []
    for name, codec in codecs.items():
        if why := unpredicted(codec, known.pilot.d):
            size = weigh(codec, known.pilot, key)
            found.append(Forecast(name, codec, size, _rounds(known.pilot, budget, size), why=why))
        else:
            found.append(_forecast(known, name, codec, budget, memory(codec), factors, key, target_rounds, target, plain))
    return found


def _rounds(pilot: Pilot, budget: Budget, size: float) -> int:
    return int(min(1e6, budget.bytes / max(1e-9, pilot.cohort_clients * size)))


def _noise(known: Law, codec: Any, memory: tuple[Any, float] | None, key: Key) -> tuple[Field, Tensor, str]:
    """-> the round's noise for the horizon, energies of one message's noise at the optimum [B, k], how it was found."""
    pilot, basis, rows = known.pilot, known.basis, known.rows
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


def _final(known: Law, field: Field, rounds: int, factors: tuple[float, ...]) -> Tensor:
    """Losses [B, S] after `rounds` rounds from the start."""
    done, curve, lead = _curves(known, field, rounds, factors)
    later = at(done, curve, (rounds - lead).clamp(min=0.0))
    speed = torch.tensor(factors, dtype=torch.float64)
    return torch.where(rounds >= lead, later, _early(known.pilot, rounds * speed).expand_as(later))


def _value(known: Law, codec: Any, key: Key, rounds: int, factors: tuple[float, ...], memory: Any) -> float:
    field, _, _ = _noise(known, codec, memory, key)
    return float(_final(known, field, rounds, factors)[0].min())


def _forecast(
    known: Law,
    name: str,
    codec: Any,
    budget: Budget,
    memory: tuple[Any, float] | None,
    factors: tuple[float, ...],
    key: Key,
    target_rounds: int,
    target: float | None,
    plain: Forecast | None = None,
) -> Forecast:
    pilot = known.pilot
    size = weigh(codec, pilot, key)
    rounds = _rounds(pilot, budget, size)
    field, total, how = _noise(known, codec, memory, key)
    every = _final(known, field, rounds, factors)
    best = int(every[0].argmin())
    paired = every.min(1).values  # every sample of the bootstrap tunes its own step, as the run would
    low, high = torch.quantile(paired, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    noise = float((total[0].sum() - (known.boot[0] @ known.within).sum()) / total[0].sum().clamp(min=1e-300))
    found = Forecast(
        name, codec, size, rounds, factors[best], float(every[0, best]), low, high, noise=noise, how=how,
        memory=memory is not None, paired=paired,
    )  # fmt: skip
    if plain is None:
        return found
    ratios = [_ratio(known, size, total, plain, key, scale, target_rounds) for scale in (1.0, 0.25, 4.0)]
    bounds = torch.quantile(ratios[0], torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    found = replace(
        found, ratio=float(ratios[0][0]), ratio_low=bounds[0], ratio_high=bounds[1],
        ratio_damping=(float(ratios[1][0]), float(ratios[2][0])),
    )  # fmt: skip
    if target is None:
        return found
    done, curve, lead = _curves(known, field, max(rounds, 20 * target_rounds), factors)
    when = (reached(done, curve, target) + lead).min(1).values
    seconds = when * budget.seconds(pilot, size)
    return replace(found, to_target=float(when[0]), seconds=float(seconds[0]), paired_seconds=seconds)


def memory_gain(known: Law, codec: Any, alpha: float, key: Key | None = None) -> Tensor:
    """Noise of the codec with memory over without [B], weighed by the inverse curvature: below 1 it pays."""
    key = random.key(1) if key is None else key
    _, without, _ = _noise(known, codec, None, key)
    _, held, _ = _noise(known, codec, (codec, alpha), key)
    pilot = known.pilot
    phi = replace(known.terrain, nodes=known.basis.nodes).weight(max(pilot.decay, 0.01 / (pilot.gamma * pilot.steps)))
    return (held @ phi) / (without @ phi).clamp(min=1e-300)


def _ratio(known: Law, size: float, total: Tensor, plain: Forecast, key: Key, scale: float, rounds: int) -> Tensor:
    """Q(codec) / Q(base) [B], with the damping max(weight decay, scale / (gamma tau K))."""
    pilot = known.pilot
    damping = max(pilot.decay, scale / (pilot.gamma * pilot.steps * max(1, rounds)))
    phi = replace(known.terrain, nodes=known.basis.nodes).weight(damping)
    _, base, _ = _noise(known, plain.codec, None, key)
    return size * (total @ phi) / (plain.bytes * (base @ phi)).clamp(min=1e-300)
