"""What rounds teach the allocator: two regressions, and the rules that keep their mistakes cheap.

    g = P x / (f + x'P x);  e = y - th'x;  th <- th + g e;  P <- (P - g x'P) / f;  P_0 = I / ridge
    width = 2 sqrt(s2 x'P x), s2 the forgetting mean of e (y - th_new'x)

Recursive least squares with forgetting f: with f = 1 it is ridge regression of all that was seen. A state is a record of
float64 tensors for a checkpoint; every function is pure. After FedHQ (arXiv 2505.11982), its fine stage: the idea;
the features, the rules and their constants are ours.

Symbols: n features; x [.., n]; K clients, n_m modes; tau [s] the makespan; lam the weight of penalty against time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taciturn.core.errors import require
from taciturn.core.state import State
from taciturn.precision.allocate import Allocation, objective

FEATURES = ("one", "skew", "log_samples", "weight", "epochs", "log_lr", "progress", "gap", "moved", "log_factor", "slack")


def features(**known: Tensor | float) -> Tensor:
    """The vectors [K, 11] of values [K] or numbers, by the names of `FEATURES` ("one" is added). Errors: `ConfigError`.

    skew: h; log_samples: log n_k; progress: round / planned rounds; gap: smoothed; moved: |Delta| / |W|; log_factor: log
    of the calibration; slack: to the deadline, as a share of it.
    """
    require(
        set(known) == set(FEATURES[1:]),
        f"precision.learn: features {', '.join(FEATURES[1:])}; got {', '.join(sorted(known))}",
    )
    columns = [torch.as_tensor(known.get(name, 1.0), dtype=torch.float64) for name in FEATURES]
    return torch.stack(torch.broadcast_tensors(*columns), -1)  # type: ignore[no-untyped-call]


# --------------------------------------------------------------------------------------------------------- regression


def fresh(n: int = len(FEATURES), ridge: float = 0.1, variance: float = 1.0) -> State:
    """A regression that knows nothing: {"P": [n, n], "theta": [n], "rss": [], "count": []}.

    variance: of the residuals before any was seen; it counts as one observation, so that nothing seen is nothing sure.
    """
    identity = torch.eye(n, dtype=torch.float64)
    seen = {"rss": identity.new_tensor(variance), "count": identity.new_tensor(1.0)}
    return {"P": identity / ridge, "theta": identity.new_zeros(n)} | seen


def learn(state: State, x: Tensor, y: Tensor | float, forget: float = 0.98) -> State:
    """The regression after one more observation: x [n], y []. With f < 1, P grows where nothing new is seen."""
    x, y = x.double(), torch.as_tensor(y, dtype=torch.float64)
    px = _dot(state["P"], x)
    gain = px / (forget + _dot(x, px))
    error = y - _dot(state["theta"], x)
    theta = state["theta"] + gain * error
    covariance = (state["P"] - torch.outer(gain, px)) / forget
    return {
        "P": (covariance + covariance.mT) / 2,
        "theta": theta,
        "rss": forget * state["rss"] + error * (y - _dot(theta, x)),
        "count": forget * state["count"] + 1,
    }


def predict(state: State, x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, width of 95 %) at x [.., n] -> [..] each."""
    x = x.double()
    variance = state["rss"] / state["count"]
    spread = _dot(_dot(x.unsqueeze(-2), state["P"]), x)
    return _dot(x, state["theta"]), 2 * (variance * spread).clamp(min=0).sqrt()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Over the last axis; unlike a matrix product, the same in every bit wherever the tensors lie in memory."""
    return (a * b).sum(-1)


# -------------------------------------------------------------------------------------------------------------- rules


def settled(before: Tensor, found: Allocation, times: Tensor, penalties: Tensor, lam: float, reference: float,
            least: float = 0.02) -> Allocation:  # fmt: skip
    """Hysteresis: the modes of `before` [K], judged by today's tables, unless `found` is better by more than `least`."""
    kept = objective(times, penalties, before, lam, reference)
    return found if found.objective < (1 - least) * kept.objective else kept


def explore(modes: Tensor, upper: Tensor, widths: Tensor, weights: Tensor, tau: float, share: float = 0.05) -> Tensor:
    """Modes [K], some changed to the mode of which least is known: free, for its upper time [s] is at most tau.

    upper [K, n_m]: times that are not exceeded, inf where a client cannot run a mode; widths [K, n_m] of the penalties;
    weights [K]: at most `share` of their sum changes, the least known first. The round's makespan stays as it was.
    """
    free = (upper <= tau).scatter(1, modes.unsqueeze(1), False)
    width, other = torch.where(free, widths.double(), -torch.inf).max(1)
    weight = weights.double() / weights.double().sum()
    order = torch.argsort(width, descending=True, stable=True)
    order = order[(width[order] > 0) & (weight[order] <= share)]
    order = order[weight[order].cumsum(0) <= share + 1e-12]
    return modes.index_copy(0, order, other[order])


def watchful(lam: float) -> State:
    """The state of the safety rule: {"lam", "smooth", "best", "below"}, [] each."""
    value = {"lam": lam, "smooth": -torch.inf, "best": -torch.inf, "below": 0.0}
    return {name: torch.tensor(number, dtype=torch.float64) for name, number in value.items()}


def guarded(state: State, accuracy: float, seconds: float, tau: float, drop: float = 0.01, a: float = 0.3) -> State:
    """lam after a round: doubled once the smoothed accuracy of the deployed model has been more than `drop` below its best
    for three rounds, else halved where the round took more than 1.1 tau [s].
    """
    now = torch.tensor(accuracy, dtype=torch.float64)
    smooth = torch.where(torch.isfinite(state["smooth"]), (1 - a) * state["smooth"] + a * now, now)
    best = torch.maximum(state["best"], smooth)
    below = torch.where(smooth < best - drop, state["below"] + 1, 0.0)
    factor = 2.0 if bool(below >= 3) else 0.5 if seconds > 1.1 * tau else 1.0
    return {"lam": state["lam"] * factor, "smooth": smooth, "best": best, "below": torch.where(below >= 3, 0.0, below)}
