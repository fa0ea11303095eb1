"""Byte planes: bit-exact floats, and never much larger than raw."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pared import store
from pared.errors import StoreError


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


def weights(n: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Normal weights as their bits: f2, f4 or f8, or bfloat16 as u2."""
    drawn = np.random.default_rng(seed).normal(0, 0.02, n)
    return (drawn.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) if dtype == "u2" else drawn.astype(dtype)


def restored(values: np.ndarray) -> tuple[np.ndarray, int]:
    coder, payload = store.encode(values, "planes")
    assert coder == "planes"
    return store.decode(coder, payload, values.shape, values.dtype), len(payload)


def entropy_bytes(plane: np.ndarray) -> float:
    counts = np.bincount(plane)
    counts = counts[counts > 0]
    return float(counts @ np.log2(plane.size / counts)) / 8


@pytest.mark.parametrize("dtype", ["u2", "f2", "f4", "f8", "i4", "i8"])
@pytest.mark.parametrize("n", [4097, 16_383, 16_384, 16_385, 16_387, 16 * 16_384 + 2])
def test_large_tensors_come_back_wherever_their_blocks_end(dtype, n):
    values = (weights(n, "f8") * 2**32).astype(dtype) if dtype[0] == "i" else weights(n, dtype)
    values[::1001] = 0
    again, _ = restored(values)
    assert again.dtype == values.dtype and again.tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_the_exponents_of_a_large_tensor_take_their_entropy(dtype):
    values = weights(300_000, dtype)
    words = values.view(f"u{values.itemsize}").astype(np.uint64)
    exponents = (words >> np.uint64(8 * values.itemsize - 9) & np.uint64(255)).astype(np.int64)
    _, n_bytes = restored(values)
    least = (values.itemsize - 1) * values.size + entropy_bytes(exponents)
    assert least < n_bytes < least + 0.004 * entropy_bytes(exponents) + 200


def test_rows_that_come_from_a_shorter_type_are_stored_as_such():
    values = weights(20 * 16_384, "f4").reshape(20, -1)
    _, all_noise = restored(values)
    values[5:15] = values[5:15].astype(np.float16)
    again, n_bytes = restored(values)
    assert again.tobytes() == values.tobytes()
    assert n_bytes < all_noise - 1.5 * values[5:15].size


def test_parts_of_different_scale_get_tables_of_their_own():
    first, second = weights(5 * 16_384, "f4"), weights(5 * 16_384, "f4", 1)
    alone = restored(first)[1] + restored(second)[1]
    assert restored(np.concatenate([first, second * np.float32(2.0**-60)]))[1] < alone + 400


def test_what_is_the_same_in_a_plane_takes_no_room():
    whole = np.random.default_rng(0).integers(-128, 128, 50_000).astype(np.float32) * np.float32(2.0**40)
    again, n_bytes = restored(whole)
    assert again.tobytes() == whole.tobytes() and n_bytes < 1.5 * whole.size
    assert restored(np.full(50_000, 1 << 50))[1] < 100


def test_a_large_tensor_that_is_noise_is_left_raw():
    noise = np.random.default_rng(0).integers(0, 2**32, 40_000, np.uint32).view(np.float32)
    assert store.encode(noise)[0] == "raw"


def test_a_flipped_bit_in_the_exponents_is_noticed():
    values = weights(70_000, "u2")
    coder, payload = store.encode(values, "planes")
    for place in range(len(payload) - 9, len(payload) - 20_000, -137):
        damaged = bytearray(payload)
        damaged[place] ^= 16
        with pytest.raises(StoreError):
            store.decode(coder, bytes(damaged), values.shape, values.dtype)


def test_a_table_must_give_away_all_its_slots():
    values = weights(20_000, "u2")
    coder, payload = store.encode(values, "planes")
    for place in range(3, 40):  # behind the modes and the first symbol
        damaged = bytearray(payload)
        damaged[place] ^= 1
        with pytest.raises(StoreError):
            store.decode(coder, bytes(damaged), values.shape, values.dtype)
