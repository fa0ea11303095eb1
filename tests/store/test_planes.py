"""Byte planes: bit-exact floats, and never much larger than raw."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pared import store


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_bit_pattern_comes_back(data):
    unsigned = data.draw(st.sampled_from([np.uint16, np.uint32, np.uint64]))
    bits = data.draw(npst.arrays(unsigned, npst.array_shapes(max_dims=3, max_side=10)))
    for values in (bits, bits.view(f"f{bits.itemsize}"), bits.view(f"i{bits.itemsize}")):
        coder, payload = store.encode(values, "planes")
        assert store.decode(coder, payload, values.shape, values.dtype).tobytes() == values.tobytes()


@pytest.mark.parametrize(("dtype", "saved"), [(np.float16, 0.08), (np.float32, 0.14), (np.float64, 0.07)])
def test_normal_weights_shrink_by_the_waste_in_their_exponents(dtype, saved):
    values = np.random.default_rng(0).normal(0, 0.02, 20_000).astype(dtype)
    coder, payload = store.encode(values)
    assert coder == "planes" and len(payload) < (1 - saved) * values.nbytes


def test_bfloat16_shrinks_to_eleven_bits():
    """A normal weight has about 2.6 bits of exponent, and eight of sign and mantissa (arXiv:2504.11651)."""
    bits = np.random.default_rng(0).normal(0, 0.02, 100_000).astype(np.float32).view(np.uint32)
    values = (bits >> 16).astype(np.uint16)
    coder, payload = store.encode(values, "planes")
    assert coder == "planes" and 8 * len(payload) / values.size < 11


def test_noise_costs_two_bytes_more_than_raw_at_most():
    values = np.random.default_rng(0).integers(0, 2**64, 500, np.uint64, endpoint=False)
    assert len(store.encode(values, "planes")[1]) <= values.nbytes + 2


def test_floats_that_are_short_floats_take_no_more_than_these():
    short = np.random.default_rng(0).normal(0, 0.1, 5000).astype(np.float16)
    assert len(store.encode(short.astype(np.float32))[1]) < 1.1 * short.nbytes
