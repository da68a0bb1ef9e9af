"""What compression costs averaged SGD on least squares: the noise at the optimum, step rules, upper bounds.

Symbols: as in `problems`; C2: second moment M [d, d] -> that of the compressed vector (`moments`); gamma step size;
K steps; omega the codec's variance factor; R^2 = Tr H; eta = w - w*; w^_K the mean of w_0 .. w_{K-1};
xi = H eta - (what the server steps by), xi_add = xi at eta = 0, xi_mult = xi - xi_add; S_i = Cov(h_i) of client i's memory.

    E F(w^_K) - F(w*)  ~  Tr(C_ania H^-1) / (2 K),   C_ania = E xi_add xi_add'      (K to infinity, then gamma to 0)

Source: Philippenko & Dieuleveut, JMLR 25(288), 2024, for C_ania and the shape of the bounds. Departure: the constants of
the bounds and the fixed point of the memory are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from taciturn.advisor.moments import Map, trace
from taciturn.advisor.problems import LeastSquares

Moment = Callable[[Tensor], Tensor]


def gradient_moment(problem: LeastSquares, i: int, moment: Tensor) -> Tensor:
    """E g g' of client i's gradient when (w - w*_i)(w - w*_i)' has mean S: [.., d, d] -> [.., d, d].

    G(S) = (2 H S H + Tr(H S) H + sigma^2 H) / b + (1 - 1/b) H S H for b Gaussian samples, H S H for full gradients.
    """
    h = problem.moments[i]
    curved = h @ moment @ h
    if problem.batch == 0:
        return curved
    weight = (h * moment).sum((-2, -1)) + problem.sigma**2
    return curved + (curved + weight[..., None, None] * h) / problem.batch


def client_moments(problem: LeastSquares, centered: bool = False) -> list[Tensor]:
    """E g_i g_i' at w* of every client, or their covariances (without the mean H_i delta_i)."""
    found = []
    if centered and problem.batch == 0:
        return [torch.zeros_like(problem.curvature) for _ in problem.offsets]
    for i, offset in enumerate(problem.offsets):
        mean = problem.moments[i] @ offset
        moment = gradient_moment(problem, i, torch.outer(offset, offset))
        found.append(moment - torch.outer(mean, mean) if centered else moment)
    return found


def induced_noise(problem: LeastSquares, c2: Moment) -> Tensor:
    """C_ania without memory: (1/N^2) sum of [C2(E g_i g_i') - H_i delta_i delta_i' H_i]  [d, d].

    Exact for linear codecs, and for `moments.quantized` where all optima agree (then g is a Gaussian times a scalar).
    """
    noise = torch.zeros_like(problem.curvature)
    for moment, offset, h in zip(client_moments(problem), problem.offsets, problem.moments, strict=True):
        noise += c2(moment) - torch.outer(h @ offset, h @ offset)
    return noise / problem.clients**2


def memory_limit(problem: LeastSquares, c2: Moment) -> Tensor:
    """C_ania with memory as its rate goes to 0: (1/N^2) sum of C2(Cov g_i)  [d, d]; 0 for full gradients."""
    return torch.stack([c2(moment) for moment in client_moments(problem, centered=True)]).sum(0) / problem.clients**2


def memory_spread(coefficients: Map, alpha: float, moment: Tensor) -> Tensor:
    """S = Cov(h) of a memory with rate alpha at w*, 2 S = alpha L(M + S), M = Cov g: [d, d] -> [d, d].

    Off the diagonal S = alpha a M / (2 - alpha a); on it by way of Tr S. Errors: `ValueError` if alpha (1 + omega) >= 2.
    """
    a, b, c = coefficients
    d = len(moment)
    whole = a + b + c * d
    if alpha * whole >= 2:
        raise ValueError(f"alpha = {alpha:g}: the memory is unstable; it takes alpha < 2 / (1 + omega) = {2 / whole:g}")
    diagonal = moment.diagonal()
    total = diagonal.sum() * 2 / (2 - alpha * whole)  # Tr(M + S)
    on = alpha * ((a + b) * diagonal + c * total) / (2 - alpha * (a + b))
    off = alpha * a / (2 - alpha * a) * moment
    return off + torch.diag(on - off.diagonal())


def memory_noise(problem: LeastSquares, coefficients: Map, alpha: float) -> Tensor:
    """C_ania with memory of rate alpha, a linear codec: (1/N^2) sum of [L(M_i + S_i) - S_i] = sum of (2/alpha - 1) S_i.

    Given the past, h_i + C(g_i - h_i) has mean E g_i, so the noise is a martingale difference and C_ania decides.
    """
    spreads = [memory_spread(coefficients, alpha, m) for m in client_moments(problem, centered=True)]
    return (2 / alpha - 1) * torch.stack(spreads).sum(0) / problem.clients**2


def asymptotic(noise: Tensor, curvature: Tensor, steps: float) -> float:
    """Tr(C_ania H^-1) / (2 K)."""
    return trace(noise, curvature) / (2 * steps)


# ------------------------------------------------------------------------------------------------------- step sizes


def constant_step(omega: float, problem: LeastSquares) -> float:
    """gamma = 1 / (2 (omega + 1) R^2), R^2 = Tr H."""
    return 1 / (2 * (omega + 1) * float(problem.curvature.trace()))


def horizon_step(steps: int) -> float:
    """gamma = K^(-2/5), the same for every codec."""
    return float(steps**-0.4)


def partial_multiplier(problem: LeastSquares, p: float, gamma: float) -> float:
    """Limit of K E[excess] over Tr(C_ania H^-1) / 2 at a constant step: one client, b = 1, codec partial(p) (p = 1: none).

    (1 + (2 - p) phi / d) / (1 - phi), phi = sum of g lambda_i / (2 (1 - g lambda_i)), g = gamma / p; infinite from phi = 1.
    Departure: ours, from the diagonal of the stationary covariance.
    """
    values = problem.eigen[0] * gamma / p
    phi = float((values / (2 * (1 - values))).sum())
    if phi >= 1 or float(values.max()) >= 1:
        return math.inf
    return (1 + (2 - p) * phi / problem.d) / (1 - phi)


# ----------------------------------------------------------------------------------------------------- upper bounds


def lipschitz_bound(problem: LeastSquares, noise: Tensor, omega: float, gamma: float, steps: int, w0: Tensor) -> float:
    """At least E F(w^_K) - F(w*), for C(x) = A x with random A: partial, sparsify, rand_k, sketch; one client, b = 1.

        (1/2K) ([|H^-1/2 eta_0| + |H^-1/2 eta_K|] / (gamma sqrt K) + sqrt Tr(C_ania H^-1) + sqrt(M2 u / mu))^2
        M2 = (1 + omega) (Tr H + 2 lambda_1);  u = |eta_0|^2 / (gamma K) + 2 gamma Tr C_ania

    noise = C_ania. Infinite unless gamma (lambda_1 + 2 M2) <= 1. The published step 1 / (2 (omega + 1) R^2) is too large.
    """
    top, second, start = _constants(problem, omega, w0)
    if gamma * (top + 2 * second) > 1:
        return math.inf
    drift = 2 * gamma * float(noise.trace())
    u = start / (gamma * steps) + drift
    return _bound(problem, noise, gamma, steps, w0, drift, second * u)


def hoelder_bound(problem: LeastSquares, noise: Tensor, gamma: float, steps: int, w0: Tensor) -> float:
    """The same for 1-quantization, plain or in a random basis: E|xi_mult|^2 <= M1 |H^1/2 eta| + M3 |H^1/2 eta|^2.

        M1 = 4 sqrt(d) sigma sqrt(k) R^2, M3 = 5 sqrt(d) k R^2, k R^2 = Tr H + 2 lambda_1 (Gaussian features)
        u = |eta_0|^2 / (gamma K) + 2 gamma Tr C_ania + 2 gamma^2 M1^2;  third term sqrt((M1 sqrt u + M3 u) / mu)

    Infinite unless gamma (lambda_1 + 2 M3) <= 1/2.
    """
    top, second, start = _constants(problem, 0.0, w0)
    root = math.sqrt(problem.d)
    third = 5 * root * second
    first = 4 * root * problem.sigma * math.sqrt(second * float(problem.curvature.trace()))
    if gamma * (top + 2 * third) > 0.5:
        return math.inf
    drift = 2 * gamma * float(noise.trace()) + 2 * gamma**2 * first**2
    u = start / (gamma * steps) + drift
    return _bound(problem, noise, gamma, steps, w0, drift, first * math.sqrt(u) + third * u)


def _constants(problem: LeastSquares, omega: float, w0: Tensor) -> tuple[float, float, float]:
    """lambda_1, (1 + omega)(Tr H + 2 lambda_1), |eta_0|^2."""
    top = float(problem.eigen[0].max())
    start = float((w0.double() - problem.optimum).square().sum())
    return top, (1 + omega) * (float(problem.curvature.trace()) + 2 * top), start


def _bound(
    problem: LeastSquares, noise: Tensor, gamma: float, steps: int, w0: Tensor, drift: float, multiplied: float
) -> float:
    values, vectors = problem.eigen
    low = float(values.min())
    eta = vectors.T @ (w0.double() - problem.optimum)
    first = float((eta.square() / values).sum()) ** 0.5
    last = (((1 - gamma * low) ** steps * float(eta.square().sum()) + drift / low) / low) ** 0.5
    noise_term = trace(noise, problem.curvature) ** 0.5
    root = (first + last) / (gamma * math.sqrt(steps)) + noise_term + math.sqrt(multiplied / low)
    return float(root**2 / (2 * steps))
