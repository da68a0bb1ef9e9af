"""Profiles, fleets and the count of a step: numbers by hand. Units: GFLOP/s, GB/s, seconds, bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from taciturn.core import random
from taciturn.core.errors import ConfigError, UnknownName
from taciturn.fleet import Fleet, Operator, Profile, count, named
from taciturn.fleet.fleets import FLEETS
from taciturn.fleet.machine import COPIES, SIZES, Measured

TOY = Profile("toy", float32=2.0, bfloat16=8.0, bandwidth=4.0, launch=0.25, up=10.0, down=20.0, latency=0.5)


def test_a_step_is_the_roofline_of_its_operators():
    compute, memory = Operator("float32", 6 * 10**9, 10**9), Operator("float32", 10**9, 8 * 10**9, times=2)
    assert TOY.step_seconds([compute]) == 3.0 + 0.25, "compute-bound"
    assert TOY.step_seconds([memory]) == 2 * (2.0 + 0.25), "memory-bound"
    assert TOY.step_seconds([dataclasses.replace(compute, dtype="bfloat16")]) == 0.75 + 0.25
    assert TOY.step_seconds([dataclasses.replace(compute, dtype="int8")]) == 3.0 + 0.25, "no kernel: in float32"
    assert TOY.kernels == ("float32", "bfloat16") and TOY.rate("int8") == 2.0


def test_the_price_of_a_round_is_that_of_the_device():
    price = TOY.price([Operator("float32", 6 * 10**9, 0)])
    assert price.seconds(steps=2, up=30, down=40, exchanges=3) == 2 * 3.25 + 3 + 2 + 1.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"up": 0.0}, r"up: a finite number above 0; got 0.0 \(profile 'x'\)"),
        ({"float32": -1.0}, "float32: a finite number above 0; got -1.0"),
        ({"int8": float("inf")}, "int8: a finite number above 0; got inf"),
        ({"launch": -1.0}, "launch: seconds, at least 0; got -1.0"),
        ({"availability": 0.0}, r"availability: in \(0, 1\]; got 0.0"),
        ({"availability": 1.5}, r"availability: in \(0, 1\]; got 1.5"),
    ],
)
def test_bad_profiles(fields, message):
    with pytest.raises(ConfigError, match=message):
        Profile(name="x", **fields)


def test_bad_fleets():
    with pytest.raises(ConfigError, match="profiles: at least one"):
        Fleet(())
    with pytest.raises(ConfigError, match="each has a name of its own; got toy more than once"):
        Fleet((TOY, TOY))
    with pytest.raises(UnknownName, match="fleet: there is no fleet 'phone'; did you mean 'phones'"):
        named("phone")


@pytest.mark.parametrize("name", FLEETS)
def test_named_fleets_are_built_and_explained(name):
    assert named(name).profiles and FLEETS[name].__doc__


def test_mixed_is_the_grid_of_factors_and_lines():
    profiles = named("mixed").profiles
    assert sorted({round(50 / profile.float32) for profile in profiles}) == [1, 2, 4, 8]
    assert sorted({profile.up * 8 / 1e6 for profile in profiles}) == [5, 20, 100] and len(profiles) == 12


def test_devices_are_dealt_by_shares_and_key():
    fleet = Fleet((dataclasses.replace(TOY, share=3.0), Profile("other", share=1.0)))
    one, same, other = (fleet.assign(100, random.key(seed)) for seed in (0, 0, 1))
    assert torch.bincount(one).tolist() == torch.bincount(other).tolist() == [75, 25]
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert Fleet().assign(3, random.key(0)).tolist() == [0, 0, 0]


def test_a_fleet_says_who_has_kernels():
    plain = Profile("plain", int8=3.0)
    assert Fleet((TOY, plain)).has_kernels(("float32", "bfloat16", "int8")).tolist() == [
        [True, True, False],
        [True, False, True],
    ]


def test_a_linear_layer_is_counted():
    x, w, b = torch.ones(4, 5), torch.ones(3, 5), torch.ones(3)
    found = count(lambda: torch.nn.functional.linear(x, w, b))
    assert found == (Operator("float32", 2 * 4 * 5 * 3, 4 * (20 + 15 + 3 + 12)),)
    doubles = count(lambda: torch.nn.functional.linear(x.double(), w.double(), b.double()))
    assert found[0] in doubles, "double precision counts as single"
    half = count(lambda: w.bfloat16() @ w.bfloat16().T)
    assert [one for one in half if one.flops] == [Operator("bfloat16", 2 * 3 * 3 * 5, 2 * (15 + 15 + 9))]


def test_a_gradient_has_the_products_that_it_needs():
    x, w = torch.ones(4, 5), torch.ones(3, 5)

    def flops(fn, *arguments):
        return sum(one.flops * one.times for one in count(lambda: torch.func.grad(fn)(*arguments)))

    assert flops(lambda w: (x @ w.T).sum(), w) == 2 * 120, "the input is data: no gradient of it"
    assert flops(lambda x: (x @ w.T).sum(), x) == 2 * 120, "the weight is frozen"
    assert flops(lambda x: ((x @ w.T) @ w).sum(), x) == 4 * 120


def test_what_is_not_work_is_not_counted():
    ids, table = torch.arange(3), torch.ones(1000, 8)
    assert count(lambda: ids * 7 + 1) == () and count(lambda: table.view(-1, 4).T[2:]) == ()
    assert count(lambda: torch.nn.functional.embedding(ids, table)) == (Operator("float32", 0, 2 * 3 * 8 * 4),)


def test_attention_and_convolution_have_flops():
    q = torch.ones(2, 2, 6, 8)
    assert max(one.flops for one in count(lambda: scaled_dot_product_attention(q, q, q))) == 2 * 2 * (2 * 2 * 6 * 6 * 8)
    image, kernel = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3)
    assert count(lambda: torch.conv2d(image, kernel))[0].flops == 2 * 2 * 4 * 36 * 27


def test_what_was_measured_becomes_a_profile():
    gemm = {("float32", n): 10.0 + n for n in SIZES} | {("bfloat16", n): None for n in SIZES}
    gemm |= {("int8", n): 5.0 for n in SIZES}
    found = Measured(gemm, {COPIES[0]: 90.0, COPIES[1]: 9.0}, 2e-6).profile(TOY)
    assert (found.float32, found.bfloat16, found.int8) == (10.0 + max(SIZES), None, 5.0)
    assert (found.bandwidth, found.launch, found.up, found.name) == (9.0, 2e-6, 10.0, "toy")
