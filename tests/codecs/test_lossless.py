"""Compression around another codec: the same values, fewer bytes, and everything else is the inner codec's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from taciturn.codecs import cast, lossless
from taciturn.core.errors import ConfigError
from taciturn.core.payload import LOSSLESS
from taciturn.core.random import key, normal
from taciturn.core.vector import Layout
from taciturn.wire.format import FRAME, Frame, Schema, nbytes, pack, unpack

D = 5000
LAYOUT = Layout.of({"w": torch.zeros(D)})


@dataclass(frozen=True, slots=True)
class toy:
    """Three symbols, and a counter on both sides."""

    lossy: ClassVar[bool] = True
    unbiased: ClassVar[bool] = False

    def message_bits(self, d):
        return 1.6 * d

    def omega(self, d):
        return 0.5

    def linear_map(self, d):
        return 1.0, 0.0, 0.0

    def init(self, layout):
        return {"sent": torch.tensor(0)}, {"got": torch.tensor(0)}

    def encode(self, u, tx, key, *, layout, knobs):
        codes = (u.sign() * (u.abs() > 1.5) + 1).to(torch.uint8)
        return {"codes": codes, "codes.radix": torch.tensor(2, dtype=torch.uint8)}, {"sent": tx["sent"] + 1}

    def decode(self, payload, rx, *, layout):
        return payload["codes"].float() - 1, {"got": rx["got"] + 1}


@pytest.mark.parametrize("coder", ["zstd", "rans"])
@pytest.mark.parametrize("inner", [cast(), toy()], ids=["cast", "toy"])
def test_same_values_in_fewer_bytes(inner, coder):
    codec, u = lossless(inner, coder), normal(key(3), D)
    tx, rx = codec.init(LAYOUT)
    plain, after = inner.encode(u, tx, key(1), layout=LAYOUT, knobs={})
    payload, tx = codec.encode(u, tx, key(1), layout=LAYOUT, knobs={})
    assert tx == after and payload.keys() == plain.keys() | {LOSSLESS}
    data, schema = pack(Frame("update", payload)), Schema.of(payload)
    assert len(data) < 0.95 * len(pack(Frame("update", plain))) and int(nbytes(payload)) == int(nbytes(plain)) + 1
    got, rx_after = codec.decode(unpack(data, {schema.id: schema}).payload, rx, layout=LAYOUT)
    want, rx_plain = inner.decode(plain, rx, layout=LAYOUT)
    assert torch.equal(got, want) and rx_after == rx_plain and len(data) > FRAME


def test_rans_beats_zstd_on_codes_of_few_bits():
    u = normal(key(4), D)
    sizes = {}
    for coder in ("zstd", "rans"):
        payload, _ = lossless(toy(), coder).encode(u, {"sent": torch.tensor(0)}, key(1), layout=LAYOUT, knobs={})
        sizes[coder] = len(pack(Frame("update", payload)))
    assert sizes["rans"] < 0.97 * sizes["zstd"]


def test_under_vmap():
    codec, u = lossless(toy()), normal(key(5), 3, D)
    tx = {"sent": torch.zeros(3, dtype=torch.int64)}
    payload, _ = torch.vmap(lambda v, t, k: codec.encode(v, t, k, layout=LAYOUT, knobs={}))(u, tx, torch.arange(3))
    assert payload[LOSSLESS].tolist() == [1, 1, 1]


def test_what_theory_knows_is_the_inner_codecs():
    codec = lossless(toy())
    assert codec.lossy and not codec.unbiased and codec.omega(7) == 0.5 and codec.message_bits(10) == 24
    assert codec.linear_map(3) == (1.0, 0.0, 0.0) and hasattr(codec, "linear_map") and not hasattr(codec, "variance")
    assert not hasattr(lossless(cast()), "linear_map") and lossless(toy()) == codec and hash(codec)
    assert repr(lossless(cast())) == "lossless(codec=cast(dtype='float16'), coder='zstd')"


def test_coders_have_names():
    with pytest.raises(ConfigError, match=r"lossless.coder: zstd or rans; got 'gzip'"):
        lossless(cast(), "gzip")
