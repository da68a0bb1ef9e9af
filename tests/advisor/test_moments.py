"""Second moments: closed forms against draws, against each other, and their order.

Symbols: d values; M [d, d]; n draws; z = (mean - expected) / standard error, over coordinates.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from taciturn import codecs
from taciturn.advisor import moments, problems
from taciturn.advisor.draws import in_law, message_bytes, stabilized, through

D = 6
LINEAR = {
    "identity": codecs.identity(),
    "partial": codecs.partial(p=0.3),
    "sparsify": codecs.sparsify(p=0.3),
    "rand_k": codecs.rand_k(k=2),
    "sketch": codecs.sketch(h=2),
}
ROUNDING = {"qsgd 1": codecs.qsgd(levels=1), "qsgd 4": codecs.qsgd(levels=4)}
BOTH = LINEAR | ROUNDING
DRAWS = {name: in_law(codec) for name, codec in BOTH.items()} | {"stabilized": stabilized()}
U = torch.tensor([0.4, -1.3, 0.05, 2.0, 0.7, -0.6])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(d: int = D, power: float = 1.0) -> torch.Tensor:
    return problems.rotated(problems.spectrum(d, power), "haar", seed=3)


def scores(values: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """z of every entry of the mean over the first axis; 0 where nothing varies and it fits."""
    values = values.double()
    gap = values.mean(0) - expected
    error = values.std(0) / math.sqrt(len(values))
    return torch.where(error > 1e-9, gap / error.clamp(min=1e-9), gap * 1e5)


def products(c: torch.Tensor) -> torch.Tensor:
    return c.unsqueeze(2) * c.unsqueeze(1)


def conditional_moment(draw, u: torch.Tensor) -> torch.Tensor:
    """E[C(u) C(u)' | u] in closed form."""
    u = u.double()
    coefficients = draw.linear_map(len(u))
    if coefficients is not None:
        return moments.linear(coefficients, torch.outer(u, u))
    return torch.outer(u, u) + torch.diag(draw.codec.variance(u))


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_unbiased_and_have_the_stated_moments(name):
    draw, n = DRAWS[name], 50_000 if name.startswith("qsgd") else 100_000
    c = draw.draw(U.expand(n, D), generator())
    assert float(scores(c, U.double()).abs().max()) < 4.5
    assert float(scores(products(c), conditional_moment(draw, U)).abs().max()) < 4.5
    error = (c.double() - U.double()).square().sum(1)
    size = float(U.double().square().sum())
    if draw.linear_map(D) is None:
        exact = float(draw.codec.variance(U.double()).sum())
        assert abs(float(scores(error, torch.tensor(exact)))) < 4.5 and exact <= draw.omega(D) * size
    else:
        assert abs(float(scores(error, torch.tensor(draw.omega(D) * size)))) < 4.5
        assert sum(draw.linear_map(D)[:2]) + D * draw.linear_map(D)[2] == pytest.approx(1 + draw.omega(D))


@pytest.mark.parametrize("name", BOTH)
def test_draws_in_law_are_the_codecs(name):
    """The messages of the library have the same first two moments, and the same support."""
    codec, n = BOTH[name], 2000 if name == "sketch" else 5000
    c = through(codec).draw(U.expand(n, D), generator(1))
    assert float(scores(c, U.double()).abs().max()) < 4.5
    assert float(scores(products(c), conditional_moment(in_law(codec), U)).abs().max()) < 4.5
    if name != "sketch":
        mine = in_law(codec).draw(U.expand(n, D), generator(2))
        for column in range(D):
            assert torch.allclose(c[:, column].unique(), mine[:, column].unique(), rtol=1e-5)


@pytest.mark.parametrize("name", DRAWS)
def test_draws_of_nothing_and_of_one_value(name):
    draw = DRAWS[name]
    assert not draw.draw(torch.zeros(50, D), generator()).any()
    if name not in ("rand_k", "sketch"):
        c = draw.draw(torch.full((20_000, 1), -1.5), generator())
        assert abs(float(scores(c[:, 0], torch.tensor(-1.5)))) < 4.5


def test_draws_that_keep_everything():
    u = torch.randn(50, D, generator=generator())
    for codec in (codecs.partial(p=1.0), codecs.sparsify(p=1.0), codecs.rand_k(k=D), codecs.sketch(h=D)):
        assert torch.allclose(in_law(codec).draw(u, generator()), u, atol=1e-5)
    fine = in_law(codecs.qsgd(levels=127)).draw(u, generator())
    assert float((fine - u).abs().max()) <= float(u.norm(dim=1).max()) / 127 * 1.001


def test_other_codecs_are_not_drawn_in_law():
    for codec in (codecs.cast(), codecs.top_k(), codecs.quantize8(), codecs.ternary()):
        with pytest.raises(TypeError, match="no draw in law"):
            in_law(codec)


@pytest.mark.parametrize("name", DRAWS)
def test_empirical_moment_of_gaussians(name):
    """x ~ N(0, M): E C(x) C(x)' = closed form, also for 1-quantization by quadrature, and the estimate without draws."""
    draw, m = DRAWS[name], correlated()
    x = torch.distributions.MultivariateNormal(torch.zeros(D).double(), m)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        samples = x.sample((200_000 if draw.linear_map(D) is not None else 10_000,))
    coefficients = draw.linear_map(D)
    c = draw.draw(samples.float(), generator())
    if coefficients is None:
        estimate = moments.conditional(draw.codec, samples)
        exact = moments.quantized(m) if name == "qsgd 1" else estimate
    else:
        exact = moments.linear(coefficients, m)
        estimate = moments.conditional(draw, samples)
    assert float(scores(products(c), exact).abs().max()) < 4.5
    assert float((estimate - exact).abs().max() / exact.abs().max()) < 0.04


def test_conditional_estimate_needs_a_variance_or_a_map():
    with pytest.raises(TypeError, match="top_k states neither"):
        moments.conditional(codecs.top_k(), torch.zeros(3, 4))


@pytest.mark.parametrize("d", [1, 2, 20, 100])
def test_quadrature_is_exact_for_isotropic_gaussians(d):
    c2 = moments.quantized(torch.eye(d, dtype=torch.float64))
    assert torch.allclose(c2.diagonal(), torch.full((d,), d * moments.sphere(d, 1), dtype=torch.float64), rtol=1e-9)
    scaled = moments.quantized(7e-5 * torch.eye(d, dtype=torch.float64))
    assert torch.allclose(scaled, 7e-5 * c2, rtol=1e-9)


@pytest.mark.parametrize("power", [0, 1, 4])
@pytest.mark.parametrize("basis", ["identity", "haar"])
def test_quadrature_is_below_the_bound_and_converged(power, basis):
    m = problems.rotated(problems.spectrum(12, power), basis)
    exact, finer = moments.quantized(m), moments.quantized(m, points=600)
    assert torch.allclose(exact, finer, rtol=1e-8, atol=1e-12)
    assert float(torch.linalg.eigvalsh(moments.quantized_bound(m) - exact).min()) >= -1e-12
    assert float(torch.linalg.eigvalsh(exact - m).min()) >= -1e-12


def test_sphere_moments():
    for d in (1, 2, 5, 50):
        assert moments.sphere(d, 2) == pytest.approx(1 / d) and moments.sphere(d, 4) == pytest.approx(3 / (d * (d + 2)))


# ------------------------------------------------------------------------------------- projectors and random bases


def test_projector_draw_has_the_moments_of_explicit_projectors():
    n, h = 100_000, 2
    rows = torch.randn(n, h, D, generator=generator(4))
    explicit = (D / h) * (torch.linalg.pinv(rows) @ rows @ U)
    exact = moments.linear(codecs.sketch(h=h).linear_map(D), torch.outer(U, U).double())
    for c in (explicit, in_law(codecs.sketch(h=h)).draw(U.expand(n, D), generator(5))):
        assert float(scores(c, U.double()).abs().max()) < 4.5
        assert float(scores(products(c), exact).abs().max()) < 4.5
    fourth = (explicit.norm(dim=1) ** 4, in_law(codecs.sketch(h=h)).draw(U.expand(n, D), generator(6)).norm(dim=1) ** 4)
    assert fourth[0].mean() == pytest.approx(float(fourth[1].mean()), rel=0.03)


def test_stabilized_draw_has_the_moments_of_explicit_rotations():
    n = 60_000
    q, r = torch.linalg.qr(torch.randn(n, D, D, generator=generator(7)))
    basis = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    turned = in_law(codecs.qsgd(levels=1)).draw(basis @ U, generator(8))
    explicit = (basis.mT @ turned.unsqueeze(2)).squeeze(2)
    exact = moments.linear(moments.stabilized_map(D), torch.outer(U, U).double())
    for c in (explicit, stabilized().draw(U.expand(n, D), generator(9))):
        assert float(scores(c, U.double()).abs().max()) < 4.5
        assert float(scores(products(c), exact).abs().max()) < 4.5


# --------------------------------------------------------------------------------------------------------- traces


def maps(d: int) -> dict[str, moments.Map]:
    p = 1 / (math.sqrt(d) + 1)
    h = max(1, int(d * p))
    rows = {"none": codecs.identity(), "PP": codecs.partial(p=p), "sparsification": codecs.sparsify(p=p)}
    rows |= {"rand-h": codecs.rand_k(k=h), "sketch": codecs.sketch(h=h)}
    return {name: in_law(codec).linear_map(d) for name, codec in rows.items()}


def costs(h: torch.Tensor) -> dict[str, float]:
    """Tr(C2 H^-1) at M = H of every codec, matched in omega."""
    found = {name: moments.trace(moments.linear(row, h), h) for name, row in maps(len(h)).items()}
    return found | {"quantization": moments.trace(moments.quantized(h), h)}


def test_traces_in_closed_form():
    d, h = 20, correlated(20)
    inverse, (p, k) = torch.linalg.inv(h), (1 / (math.sqrt(20) + 1), 3)
    hadamard = float((h.diagonal() * inverse.diagonal()).sum())
    p1, p2 = k / d, (k - 1) / (d - 1)
    a, b = k * (k + 2) / (d * (d + 2)), k * (d - k) / (d * (d - 1) * (d + 2))
    expected = {
        "none": d,
        "PP": d / p,
        "sparsification": d + (1 / p - 1) * hadamard,
        "rand-h": (p2 * d + (1 - p2) * hadamard) / p1,
        "sketch": (d / k) ** 2 * ((a - b) * d + b * float(h.trace() * inverse.trace())),
    }
    found = costs(h)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-8)
    assert hadamard > d and costs(torch.diag(h.diagonal()))["sparsification"] == pytest.approx(d / p)


def test_trace_invariances():
    h = correlated(20)
    scale = torch.linspace(0.1, 3, 20, dtype=torch.float64)
    basis = problems.haar(20, 11)
    rescaled, turned = costs(h * scale * scale.unsqueeze(1)), costs(basis @ h @ basis.T)
    base = costs(h)
    for name in ("none", "PP", "sparsification", "rand-h"):
        assert rescaled[name] == pytest.approx(base[name], rel=1e-7)
    for name in ("none", "PP", "sketch"):
        assert turned[name] == pytest.approx(base[name], rel=1e-7)
    for name in ("quantization", "sketch"):
        assert abs(rescaled[name] / base[name] - 1) > 0.01
    for name in ("quantization", "sparsification", "rand-h"):
        assert abs(turned[name] / base[name] - 1) > 1e-3


def test_orderings():
    diagonal, turned = problems.rotated(problems.spectrum(20, 1), "identity"), correlated(20)
    flat, steep = costs(diagonal), costs(problems.rotated(problems.spectrum(20, 4), "identity"))
    assert flat["none"] < flat["PP"] and flat["PP"] == pytest.approx(flat["sparsification"]) and flat["PP"] < flat["rand-h"]
    assert steep["rand-h"] < steep["quantization"] < steep["sketch"]
    cost = costs(turned)
    order = ["none", "PP", "quantization", "sparsification", "rand-h"]
    assert all(cost[a] < cost[b] for a, b in itertools.pairwise(order))
    assert cost["rand-h"] == pytest.approx(cost["sketch"], rel=0.15)
    standard = problems.standardized(turned)
    bound = moments.quantized_bound(standard)
    sparse = moments.linear(maps(20)["sparsification"], standard)
    assert float(torch.linalg.eigvalsh(sparse - bound).min()) > 0


def test_message_bytes_are_what_codecs_say():
    for codec in BOTH.values():
        assert message_bytes(codec, 100) == pytest.approx(codec.message_bits(100) / 8, rel=0.03)
