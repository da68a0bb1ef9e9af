"""The pilot's messages, seen in the spectrum of the curvature: signal, noise, differences between clients.

Symbols: u messages of the pilot [n, d], ubar their mean, m_i [d] the mean of client i's R messages, w_i its weight; B
samples of a bootstrap over clients, then their messages; energies as in curvature.py. What m_i and ubar estimate is
corrected for it: ||m_i - mbar||^2 of sample means is too large by about tr Cov_i / R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from taciturn.advisor.curvature import FLOOR, Basis, on_grid, spectrum
from taciturn.advisor.horizon import Terrain
from taciturn.advisor.pilot import Pilot
from taciturn.core import random
from taciturn.core.random import Key

BOOTSTRAP = 60
BINS = 128


def evenly(n: int, most: int) -> Tensor:
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


def bootstrap(client: Tensor, weights: Tensor, whole: bool, key: Key, samples: int = BOOTSTRAP) -> Tensor:
    """Weights [B, n] of messages: clients with replacement, unless all there are were sampled (`whole`), then messages of
    each; row 0 is the sample itself.
    """
    counts = torch.bincount(client, minlength=len(weights)).to(torch.float64)
    base = (weights / counts.clamp(min=1))[client]
    rows = [base]
    for b in range(1, samples):
        own = random.fold(key, "bootstrap", b)
        clients = (random.uniform(random.fold(own, "clients"), len(weights)) * len(weights)).to(torch.int64)
        times = torch.ones_like(counts) if whole else torch.bincount(clients, minlength=len(weights)).to(torch.float64)
        picks = random.uniform(random.fold(own, "messages"), len(client))
        order = torch.argsort(client, stable=True)  # messages of a client stand together
        starts = torch.cat([torch.zeros(1), counts.cumsum(0)[:-1]]).to(torch.int64)
        drawn = order[(starts[client] + (picks * counts[client]).to(torch.int64))]
        many = torch.bincount(drawn, minlength=len(client)).to(torch.float64)
        rows.append(base * times[client] * many)
    boot = torch.stack(rows)
    return boot / boot.sum(1, keepdim=True).clamp(min=1e-300)


def law_of(pilot: Pilot, basis: Basis | None = None, key: Key | None = None) -> Law:
    """Look at the pilot's messages in the spectrum of the curvature."""
    key = random.key(0) if key is None else key
    basis = spectrum(pilot.curvature, random.fold(key, "spectrum")) if basis is None else basis
    sent, client, weights = pilot.messages.to(torch.float32), pilot.client, pilot.weights
    boot = bootstrap(client, weights, pilot.whole, key)
    counts = torch.bincount(client, minlength=len(weights)).to(torch.float64)
    means = torch.zeros(len(weights), pilot.d).index_add_(0, client, sent) / counts.to(torch.float32).unsqueeze(1)
    mean = (boot[:1].to(torch.float32) @ sent).squeeze(0)
    rows = evenly(len(sent), basis.most)
    personal = (counts / (counts - 1).clamp(min=1)).sqrt()[client].unsqueeze(1).to(torch.float32) * (sent - means[client])
    within = basis.energies(personal[rows])
    part = boot[:, rows] / boot[:, rows].sum(1, keepdim=True).clamp(min=1e-300)
    inner = part @ within
    picked = evenly(len(weights), basis.most)
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
    spread = heterogeneity(sent, client, means, boot, counts)
    tails = _tails((sent - means[client]).square().sum(1).to(torch.float64), boot[0])
    return Law(pilot, basis, rows, part, sent - mean, personal, within, outer, signal, *spread, terrain, tails)


def heterogeneity(sent: Tensor, client: Tensor, means: Tensor, boot: Tensor, counts: Tensor) -> tuple[float, float, float]:
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
