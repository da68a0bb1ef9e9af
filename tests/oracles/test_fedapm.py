"""FedAPM, FedAlt and FedSim as naked loops on quadratics, and what theory says of them.

Symbols: N clients, S the cohort; u [d], v_i [p]; p_i duals, z_i = u_i + p_i / rho the cache [N, d] of a naive
server; L the augmented Lagrangian; every quantity in units of a client's own loss.
"""

from __future__ import annotations

import pytest
import torch
from bench.quadratics import Federated, Quadratics

from taciturn import Method, aggregation, codecs, participation, solvers, sync
from taciturn.core.errors import ConfigError, MethodError
from taciturn.solvers.admm import BALANCE

PROBLEM = Quadratics()
N, D, P = PROBLEM.clients, PROBLEM.d, PROBLEM.p
LR, RHO, SIGMA, K = 0.1, 0.7, 0.4, 3
SGD = solvers.sgd(lr=LR)
HALF = participation.uniform(count=N // 2)


def lost(round, client):
    return (3 * round + client) % 5 == 0


def admm(steps=2 * K, codec=None, weights="clients", count=None, **settings):
    settings = {"rho": RHO, "sigma": SIGMA, "v_steps": K, "v": SGD, "u": SGD} | settings
    return Method(
        solver=solvers.admm(**settings), sync=sync.every(steps=steps),
        codec=codecs.difference(codec or codecs.identity(), alpha=1.0, memory="mean"),
        aggregator=aggregation.running(update="point", weights=weights),
        participation=HALF if count is None else participation.uniform(count=count),
    )  # fmt: skip


def exact(**settings):
    """Both blocks solved; rho and sigma as the theorem asks, or rho divided by `below`."""
    found = PROBLEM.lipschitz()
    rho = 3 * max(found["u"], found["uv"]) / settings.pop("below", 1.0)
    sigma = max(1.01 * 8 * rho / 15, found["v"])
    solve = solvers.lbfgs(iterations=12)
    return admm(steps=2, rho=rho, sigma=sigma, v_steps=1, v=solve, u=solve, u_start="own", **settings)


# ------------------------------------------------------------------------------------------------------------ oracles


@pytest.mark.parametrize("v_at", ["own", "server"])
@pytest.mark.parametrize("u_start", ["own", "server"])
def test_admm_is_the_naked_loop(v_at, u_start):
    """With a cache of z_i at the server, half of the clients a round and lost uploads, over 25 rounds."""
    name = "sequential" if v_at == u_start else "stacked"
    run = Federated(PROBLEM, admm(v_at=v_at, u_start=u_start), lose=lost, name=name)
    u, p, v = torch.zeros(N, D).double(), torch.zeros(N, D).double(), torch.zeros(N, P).double()
    z, x = u.clone(), torch.zeros(D).double()
    for _ in range(25):
        for i in run.round().tolist():
            new_v, at = v.clone(), (u if v_at == "own" else x.expand(N, -1))
            for _ in range(K):
                g = PROBLEM.gradient(at, new_v)[1]
                new_v[i] -= LR * (g[i] + SIGMA * (new_v[i] - v[i]))
            new_u = u.clone() if u_start == "own" else x.repeat(N, 1)
            for _ in range(K):
                g = PROBLEM.gradient(new_u, new_v)[0]
                new_u[i] -= LR * (g[i] + p[i] + RHO * (new_u[i] - x))
            v[i], u[i], p[i] = new_v[i], new_u[i], p[i] + RHO * (new_u[i] - x)
            z[i] = u[i] + p[i] / RHO
        x = z.mean(0)
        torch.testing.assert_close(run.server.x, x, rtol=1e-12, atol=1e-13)
    own = run.own()
    for name, mine in (("u", u), ("p", p), ("v", v)):
        torch.testing.assert_close(own[name], mine, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["alternating", "joint"])
def test_fedalt_and_fedsim_are_the_naked_loop(kind):
    solver = solvers.alternating(v_steps=K, v=SGD, u=SGD) if kind == "alternating" else solvers.joint(v=SGD, u=SGD)
    steps = 2 * K if kind == "alternating" else K
    method = Method(solver=solver, sync=sync.every(steps=steps), aggregator=aggregation.mean(), participation=HALF)
    run, v, x = Federated(PROBLEM, method, lose=lost), torch.zeros(N, P).double(), torch.zeros(D).double()
    for _ in range(20):
        ids = run.round()
        u, new = x.repeat(N, 1), v.clone()
        for t in range(steps):
            g_u, g_v = PROBLEM.gradient(u, new)
            moves_v, moves_u = (t < K, t >= K) if kind == "alternating" else (True, True)
            u, new = u - LR * moves_u * g_u, new - LR * moves_v * g_v
        x, v[ids] = u[ids].mean(0), new[ids]
        torch.testing.assert_close(run.server.x, x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(run.own()["v"], v, rtol=1e-12, atol=1e-13)


def test_without_dual_and_penalty_the_client_is_fedalt():
    """rho and sigma near 0 and p = 0: y and v after a first round are those of alternating."""
    one = Federated(PROBLEM, admm(rho=1e-300, sigma=0.0, count=N))
    other = Federated(PROBLEM, Method(solver=solvers.alternating(v_steps=K, v=SGD, u=SGD), sync=sync.every(steps=2 * K)))
    one.round(), other.round()
    assert torch.equal(one.own()["v"], other.own()["v"])
    torch.testing.assert_close(one.own()["u"].mean(0), other.server.x, rtol=1e-14, atol=0)


# --------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize(
    ("codec", "engine"),
    [
        (codecs.identity(), "stacked"),
        (codecs.quantize4(), "stacked"),
        (codecs.quantize4(), "sequential"),
        (codecs.top_k(share=0.4), "stacked"),
    ],
    ids=str,
)
def test_the_duals_balance_whatever_is_lost(codec, engine):
    """sum_i [p_i + rho (u_i - x)] = 0 after every aggregation: half of the clients, lost uploads, lossy codecs."""
    run = Federated(PROBLEM, admm(codec=codec), lose=lost, name=engine)
    for _ in range(20):
        run.round()
        assert run.imbalance() <= 1e-12


def test_weights_of_samples_balance_the_weighted_duals():
    problem = Quadratics(clients=3)
    run = Federated(problem, admm(weights="samples", count=2))
    run.sizes = torch.tensor([1, 2, 5])
    run.server = type(run.server)(0, run.server.x, {}, run.method.aggregator.init(run.server.x, run.sizes), {}, None, {})
    for _ in range(20):
        run.round()
        own = run.own()
        terms = run.sizes.unsqueeze(1) * (own["p"] + RHO * (own["u"] - run.server.x))
        assert float(terms.sum(0).norm() / terms.norm(dim=1).sum()) <= 1e-12


@pytest.mark.parametrize("count", [N, N // 2])
def test_the_lagrangian_falls_under_the_stated_rho_and_sigma(count):
    run = Federated(PROBLEM, exact(count=count))
    assert run.violations(6) == 0


@pytest.mark.slow
def test_a_small_rho_loses_monotone_descent_and_gets_there_sooner():
    u = PROBLEM.optimum()[0]
    small, safe = Federated(PROBLEM, exact(count=N, below=30.0)), Federated(PROBLEM, exact(count=N))
    assert small.violations(8) > 0
    for _ in range(8):
        safe.round()
    assert (small.server.x - u).norm() < 0.8 * (safe.server.x - u).norm()
    own = small.own()
    torch.testing.assert_close(own["p"], -PROBLEM.gradient(own["u"], own["v"])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_no_bias_at_the_fixed_point_for_any_number_of_local_steps(steps):
    """The fixed point of a round, solved for: that of admm is the optimum; those of FedAlt and FedSim only at one step."""
    best = PROBLEM.optimum()[0]

    def bias(method):
        return float((Federated(PROBLEM, method).fixed_point() - best).norm())

    plain = {"aggregator": aggregation.mean()}
    assert bias(admm(steps=2 * steps, v_steps=steps, count=N)) <= 1e-12
    fedalt = Method(solver=solvers.alternating(v_steps=steps, v=SGD, u=SGD), sync=sync.every(steps=2 * steps), **plain)
    fedsim = Method(solver=solvers.joint(v=SGD, u=SGD), sync=sync.every(steps=steps), **plain)
    for other in (fedalt, fedsim):
        assert bias(other) <= 1e-12 if steps == 1 else bias(other) > 0.01


def test_the_inexact_rule_bounds_the_gradient():
    """|g_y f_i + p_i|^2 <= xi_i after a round of the client, xi_i falling to its floor."""
    method = admm(steps=K + 60, xi=1e-2, xi_decay=0.5, xi_floor=2e-3, u=solvers.sgd(lr=0.3))
    run = Federated(PROBLEM, method)
    for _ in range(5):
        ids = run.round()
        own = run.own()
        residual = (PROBLEM.gradient(own["u"], own["v"])[0] + own["p"]).square().sum(1)[ids]
        assert bool((residual <= own["xi"][ids] * (1 + 1e-9)).all())
        assert bool((residual > 1e-9).any()), "the steps rest as soon as they may"
    assert float(own["xi"].min()) == 2e-3


def test_converges_with_half_of_the_clients_lost_uploads_and_four_bits():
    run = Federated(PROBLEM, admm(codec=codecs.quantize4()), lose=lost)
    for _ in range(200):
        run.round()
    own, (u, v) = run.own(), PROBLEM.optimum()
    assert (run.server.x - u).norm() < 1e-4 and (own["v"] - v).norm() < 1e-3 and own["p"].sum(0).norm() < 1e-3


@pytest.mark.parametrize("codec", [codecs.identity(), pytest.param(codecs.quantize8(), marks=pytest.mark.slow)], ids=repr)
def test_rho_is_found_from_the_steps_and_the_end_is_the_optimum(codec):
    """For steps that hardly bend, rho lr K |g + p| = BALANCE |g + p|, whatever it began with; all clients, some unheard."""
    run = Federated(PROBLEM, admm(rho="auto", codec=codec, count=N), lose=lambda r, i: r % 7 == 0 and i == 2)
    for _ in range(200):
        run.round()
    x, rho = run.server.x[:-1], float(run.server.x[-1].exp())
    assert 1 <= rho * LR * K / BALANCE < 1.6
    assert (x - PROBLEM.optimum()[0]).norm() < 2e-3
    own = run.own()
    assert bool((own["p"][:, -1] == 0).all()) and (own["p"] + rho * (own["u"] - run.server.x))[:, :-1].sum(0).norm() < 1e-3


def test_a_client_that_was_not_heard_is_as_if_not_drawn():
    run = Federated(PROBLEM, admm(), lose=lambda r, i: r == 3 and i % 2 == 0)
    for _ in range(3):
        run.round()
    before = {name: t.clone() for name, t in run.own().items()}
    accepted, after = run.round().tolist(), run.own()
    for i in range(N):
        same = all(torch.equal(before[name][i], after[name][i]) for name in before)
        assert same is (i not in accepted)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"aggregator": aggregation.mean(), "codec": codecs.identity()}, r'needs aggregator = running\(update = "point"\)'),
        ({"codec": codecs.quantize4()}, "two halves of one memory"),
        ({"solver": SGD}, "only such a solver does"),
        ({"aggregator": aggregation.running(update="memory")}, r'update = "point"'),
    ],
)
def test_a_part_that_is_missing_is_named(parts, says):
    with pytest.raises(MethodError, match=says):
        admm().replace(**parts)


def test_a_block_without_steps_and_steps_without_a_block():
    with pytest.raises(MethodError, match="with v_steps = 0 the personal parameters would never be trained"):
        Federated(PROBLEM, admm(v_steps=0))
    for solver in (solvers.alternating(), solvers.joint(), admm().solver):
        with pytest.raises(MethodError, match="trains personal parameters, and this partition keeps none"):
            solver.init(Method().split(PROBLEM.task().model, frozenset()))
    with pytest.raises(MethodError, match=r"method\.solver\.u = admm keeps a state"):
        Federated(PROBLEM, Method(solver=solvers.joint(u=admm().solver)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rho": 0.0}, "rho: above 0"),
        ({"rho": "best"}, 'or "auto"; got .best'),
        ({"v_at": "here"}, r"admm\.v_at"),
        ({"xi_decay": 2.0}, "xi_decay"),
    ],
)
def test_values_that_make_no_sense(settings, says):
    with pytest.raises(ConfigError, match=says):
        solvers.admm(**settings)
