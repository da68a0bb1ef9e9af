"""What the loss will be after K rounds, with noise of a known spectrum: the quadratic around the pilot's end.

Symbols, at each eigenvalue lambda of the curvature H: tau local steps of size gamma; contraction of a round G(lambda) =
1 - (1 - gamma lambda)^tau (gamma lambda at tau = 1); s factor of the server's step; a = 1 - s G; e energy of the mean
message (the round's signal); S second moment of the distance to the optimum; n energy of the round's noise (the covariance
of the averaged message); F loss, F_0 at the pilot's end.

    S_0 = e / G^2;   S_{k+1} = a^2 S_k + s^2 n_k;   F_k = F_0 + 1/2 sum lambda (S_k - S_0)
    n_k = (F_k / F_0) n_still + n_clients + (sum G^2 S_k / sum e) n_moving

n_still: noise of the law of messages around their mean, which shrinks with the loss as gradients do (exact for least
squares); n_clients: of drawing clients; n_moving: what the codec adds because the mean message is not zero yet. A codec
whose noise grows with the signal faster than a round contracts it diverges here as it does in the run. Where the quadratic
promises more than the whole loss, its curvature is raised by the least mu that keeps F >= 0 (Levenberg & Marquardt).
K log-spaced blocks of rounds are done in closed form. For averaged iterates `asymptotic` is the leading term instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTORS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
LEAST = 0.02  # gradients' noise does not fall below that of a loss LEAST times the pilot's
HUGE = 1e12


@dataclass(frozen=True)
class Field:
    """Energies at the nodes [k], one row a bootstrap sample [B, k]; everything in units of messages."""

    signal: Tensor
    still: Tensor
    clients: Tensor
    moving: Tensor


@dataclass(frozen=True)
class Terrain:
    """nodes [k] eigenvalues of H; gamma, steps: the local training; loss: F_0."""

    nodes: Tensor
    gamma: float
    steps: float
    decay: float
    loss: float

    def contraction(self, nodes: Tensor) -> Tensor:
        """G(lambda + decay), in (0, 2)."""
        base = (1 - self.gamma * (nodes + self.decay)).clamp(min=-0.999)
        sign = torch.where(base < 0, (-1.0) ** round(self.steps), 1.0)
        small = -torch.expm1(self.steps * torch.log(base.clamp(min=1e-9)))
        return torch.where(base > 0.5, small, 1 - sign * base.abs() ** self.steps).clamp(min=1e-30)

    def weight(self, damping: float) -> Tensor:
        """phi [k]: averaged excess of K rounds = 1/(2 K) sum phi n, with lambda + damping for lambda."""
        nodes = self.nodes + damping
        return nodes / self.contraction(nodes).square()

    def raised(self, signal: Tensor) -> Tensor:
        """The least mu >= 0 [B, 1] for which the quadratic promises at most the whole loss."""

        def promise(mu: Tensor) -> Tensor:
            nodes = self.nodes + mu
            return 0.5 * (nodes * signal / self.contraction(nodes).square()).sum(1, keepdim=True)

        top = float(self.nodes.max()) or 1.0
        low = torch.full((len(signal), 1), 1e-9 * top, dtype=torch.float64)
        high = torch.full_like(low, 10 * top)
        fits = promise(torch.zeros_like(low)) <= self.loss
        for _ in range(50):
            middle = (low * high).sqrt()
            good = promise(middle) <= self.loss
            low, high = torch.where(good, low, middle), torch.where(good, middle, high)
        return torch.where(fits, 0.0, high)


def _blocks(rounds: int) -> list[int]:
    """Lengths of blocks of rounds that sum to `rounds`: ones, then about a twelfth of what is done."""
    lengths, done = [], 0
    while done < rounds:
        lengths.append(min(rounds - done, max(1, done // 12)))
        done += lengths[-1]
    return lengths


def losses(terrain: Terrain, field: Field, rounds: int, factors: tuple[float, ...] = FACTORS) -> tuple[Tensor, Tensor]:
    """-> rounds done [T + 1], loss there [B, S, T + 1] for each factor of the server's step."""
    mu = terrain.raised(field.signal)
    nodes = terrain.nodes + mu
    g = terrain.contraction(nodes).unsqueeze(1)
    s = torch.tensor(factors, dtype=torch.float64).reshape(1, -1, 1)
    a = 1 - s * g
    first = (field.signal.unsqueeze(1) / g.square()).expand(-1, len(factors), -1)
    lam, total = nodes.unsqueeze(1), field.signal.sum(1).clamp(min=1e-300).reshape(-1, 1, 1)
    still, clients, moving = (t.unsqueeze(1) for t in (field.still, field.clients, field.moving))
    state, loss, square = first, torch.full(first.shape[:2], terrain.loss, dtype=torch.float64), a.square()
    curve, done = [loss], [0]
    for length in _blocks(rounds):
        calm = (loss / terrain.loss).clamp(LEAST, HUGE).unsqueeze(-1)
        ratio = (g.square() * state).sum(-1, keepdim=True) / total
        noise = calm * still + clients + ratio.clamp(max=HUGE) * moving
        power = square**length
        gathered = torch.where((1 - square).abs() > 1e-12, (1 - power) / (1 - square), float(length))
        state = (power * state + s.square() * noise.clamp(min=0.0) * gathered).clamp(max=1e30)
        loss = terrain.loss + 0.5 * (lam * (state - first)).sum(-1)
        curve.append(loss)
        done.append(done[-1] + length)
    return torch.tensor(done, dtype=torch.float64), torch.stack(curve, -1).clamp(max=HUGE * terrain.loss)


def at(done: Tensor, curve: Tensor, rounds: Tensor) -> Tensor:
    """The curve [B, S, T] at rounds [S], linearly between: [B, S]."""
    right = torch.searchsorted(done, rounds.clamp(0, float(done[-1]))).clamp(1, len(done) - 1)
    share = ((rounds - done[right - 1]) / (done[right] - done[right - 1])).clamp(0, 1)
    index = right.reshape(1, -1, 1).expand(len(curve), -1, 1)
    high, low = curve.gather(2, index).squeeze(2), curve.gather(2, index - 1).squeeze(2)
    return low + share * (high - low)


def reached(done: Tensor, curve: Tensor, target: float) -> Tensor:
    """The first round [B, S] at which the curve [B, S, T] is at most the target; infinity if it never is."""
    below = curve <= target
    place = below.to(torch.int64).argmax(-1)
    before = (place - 1).clamp(min=0)
    high, low = (curve.gather(2, where.unsqueeze(2)).squeeze(2) for where in (place, before))
    share = torch.where(place > 0, (low - target) / (low - high).clamp(min=1e-300), 1.0).clamp(0, 1)
    found = done[before] + share * (done[place] - done[before])
    return torch.where(below.any(-1), found, float("inf"))
