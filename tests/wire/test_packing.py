"""Packing of symbols and numbers: exact at every length, the same in C and numpy, and nothing impossible is read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn.core.errors import WireError
from taciturn.core.kernel import library, without_library
from taciturn.core.payload import GROUP, WIDEST
from taciturn.wire.packing import (
    byte_group,
    number_bytes,
    pack_numbers,
    pack_symbols,
    symbol_bytes,
    unpack_numbers,
    unpack_symbols,
)

quick = settings(max_examples=150, deadline=None)
lengths = st.one_of(st.integers(0, 200), st.integers(4000, 4600))


def test_the_kernels_are_built_here():
    assert library() is not None, "without them half of these tests compare numpy with itself"


@pytest.mark.parametrize("q", range(1, 257))
def test_every_radix_at_lengths_around_its_groups(q):
    rng = np.random.default_rng(q)
    for group in (GROUP[q], byte_group(q)):
        for n in {0, 1, group[0] - 1, group[0], group[0] + 1, 9 * group[0], 9 * group[0] + group[0] // 2, 5001}:
            codes = rng.integers(0, q, n).astype(np.uint8)
            raw = pack_symbols(codes, q, group)
            assert len(raw) == symbol_bytes(n, q, group)
            assert np.array_equal(unpack_symbols(raw, n, q, group), codes)
            with without_library():
                assert np.array_equal(pack_symbols(codes, q, group), raw)
                assert np.array_equal(unpack_symbols(raw, n, q, group), codes)


@quick
@given(st.integers(1, 256), lengths, st.integers(0, 2**32))
def test_bytes_stand_for_symbols_or_are_refused(q, n, seed):
    """Any bytes: C and numpy agree on what they are, and what is read is packed to the same bytes."""
    raw = np.random.default_rng(seed).integers(0, 256, symbol_bytes(n, q)).astype(np.uint8)
    if seed % 2:
        raw[:] = raw % 3  # small numbers are possible groups more often
    found = []
    for slow in (False, True):
        try:
            if slow:
                with without_library():
                    found.append(unpack_symbols(raw, n, q))
            else:
                found.append(unpack_symbols(raw, n, q))
        except WireError as error:
            found.append(str(error))
    if isinstance(found[0], str):
        assert found[0] == found[1]
    else:
        assert np.array_equal(*found) and (not n or found[0].max() < q)
        assert np.array_equal(pack_symbols(found[0], q), raw)


@quick
@given(st.sampled_from(list(WIDEST)), st.data(), lengths, st.integers(0, 2**32))
def test_numbers_of_every_width(dtype, data, n, seed):
    width = data.draw(st.integers(0, WIDEST[dtype]))
    values = np.random.default_rng(seed).integers(0, 1 << width, n).astype(dtype)
    raw = pack_numbers(values, width)
    assert len(raw) == number_bytes(n, width)
    assert np.array_equal(unpack_numbers(raw, n, width, dtype), values)
    with without_library():
        assert np.array_equal(pack_numbers(values, width), raw)
        back = unpack_numbers(raw, n, width, dtype)
    assert np.array_equal(back, values) and back.dtype == values.dtype
    if n * width % 8:
        raw[-1] |= 128
        with pytest.raises(WireError, match="bits that are not zero after the last value"):
            unpack_numbers(raw, n, width, dtype)


def test_all_widths_with_all_bits():
    for dtype, most in WIDEST.items():
        for width in range(1, most + 1):
            values = np.full(131, (1 << width) - 1, dtype)
            raw = pack_numbers(values, width)
            for slow in (False, True):
                if slow:
                    with without_library():
                        assert np.array_equal(unpack_numbers(raw, 131, width, dtype), values)
                else:
                    assert np.array_equal(unpack_numbers(raw, 131, width, dtype), values)
            with pytest.raises(WireError, match="at place 7 of numbers"):
                values[7] = -1
                pack_numbers(values, width)


def test_the_first_symbol_that_does_not_fit_is_named():
    for place in (0, 5, 4095, 4096, 9000):
        codes = np.zeros(9001, np.uint8)
        codes[place:] = 3
        for slow in (False, True):
            with pytest.raises(WireError, match=f"symbol 3 at place {place} of a code with 3 symbols"):
                if slow:
                    with without_library():
                        pack_symbols(codes, 3)
                else:
                    pack_symbols(codes, 3)
