"""Who trains in which mode: the exact minimum of time against accuracy.

    min over q of J(q) = max_k T_k(q_k) / T_ref + lam sum_k d_k(q_k)

Given the makespan tau the clients are independent, and tau is one of the K n_m times: sort them, sweep upward, let a client
change to a mode only for a strictly lower penalty (ties stay with the faster one), and keep the running sum. The best tau
is where J is least; O(K n_m log(K n_m)). After FedHQ (arXiv 2505.11982), its coarse stage: the idea; problem and proof are
ours.

Symbols: K clients, n_m modes; times T [K, n_m] seconds, inf where a client cannot run a mode; penalties d [K, n_m].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taciturn.core.errors import require


@dataclass(frozen=True)
class Allocation:
    """modes [K] int64; makespan [s]; penalty: sum of d; objective: J."""

    modes: Tensor
    makespan: float
    penalty: float
    objective: float


def objective(times: Tensor, penalties: Tensor, modes: Tensor, lam: float, reference: float) -> Allocation:
    """J of modes [K], and its parts."""
    pick = modes.unsqueeze(1)
    makespan, penalty = float(times.gather(1, pick).max()), float(penalties.gather(1, pick).sum())
    return Allocation(modes, makespan, penalty, makespan / reference + lam * penalty)


def coarse(times: Tensor, penalties: Tensor, lam: float, reference: float) -> Allocation:
    """The exact minimum. reference: T_ref > 0, the makespan with all clients in float. Errors: `ConfigError`.

    Each pair (client, mode), in the order of time, is worth the least penalty that its client has seen so far; the sum of
    these over clients, at each time, is a running sum of drops. lam = 0: the least makespan, all else equal the least
    penalty; lam = inf is not a number: take a large one.
    """
    _check(times, penalties, lam, reference)
    runs = torch.isfinite(times)
    times, penalties = times.double(), torch.where(runs, penalties.double(), torch.inf)
    by_time, modes = torch.sort(torch.where(runs, times, torch.inf), dim=1, stable=True)
    least = torch.cummin(penalties.gather(1, modes), dim=1).values  # of what each client can reach by then
    place = _earliest(least)
    first_time = by_time[:, 0].max()  # from here on everybody has a mode
    drop = torch.where(torch.isfinite(by_time[:, 1:]), least[:, 1:] - least[:, :-1], 0.0)
    late = by_time[:, 1:].clamp(min=first_time)
    taus, order = torch.sort(torch.cat([first_time.reshape(1), late.flatten()]), stable=True)
    sums = torch.cat([least[:, 0].sum().reshape(1), drop.flatten()])[order].cumsum(0)
    last = torch.cat([taus[1:] > taus[:-1], torch.ones(1, dtype=torch.bool)]) & torch.isfinite(taus)
    found = torch.where(last, taus / reference + lam * sums, torch.inf)
    tau = taus[found.argmin()]
    column = (by_time <= tau).sum(1) - 1
    chosen = modes.gather(1, place.gather(1, column.unsqueeze(1))).squeeze(1)
    return objective(times, penalties, chosen, lam, reference)


def _earliest(least: Tensor) -> Tensor:
    """Of each column [K, n_m], the first one with the same running minimum: ties stay with the faster mode."""
    fresh = torch.cat([torch.ones_like(least[:, :1], dtype=torch.bool), least[:, 1:] < least[:, :-1]], 1)
    return torch.where(fresh, torch.arange(least.shape[1]), 0).cummax(1).values


def _check(times: Tensor, penalties: Tensor, lam: float, reference: float) -> None:
    require(
        times.dim() == 2 and times.shape == penalties.shape and times.numel() > 0,
        f"allocate: times and penalties [clients, modes]; got {tuple(times.shape)} and {tuple(penalties.shape)}",
    )
    require(
        0 <= lam < float("inf") and reference > 0, f"allocate: lam at least 0, reference above 0; got {lam}, {reference}"
    )
    stuck = (~torch.isfinite(times).any(1)).nonzero().squeeze(1).tolist()
    require(not stuck, f"allocate: client {stuck[0] if stuck else 0} can run no mode; give it a finite time for one")
    require(bool(torch.isfinite(penalties[torch.isfinite(times)]).all()), "allocate: a penalty is not finite")
