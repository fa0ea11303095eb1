"""k-bit packing: exact sizes, exact bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pared import store
from pared.store import packed


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 16), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_packing_agrees_with_shifting_one_big_integer(width, n, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << width, n).astype(np.uint16)
    low, high = min(width, 8), max(width - 8, 0)
    expected = b""
    for part, bits in ((codes & 0xFF if high else codes, low), (codes >> 8, high)):
        whole = sum(int(code) << (bits * i) for i, code in enumerate(part)) if bits else 0
        expected += whole.to_bytes((n * bits + 7) // 8, "little")
    assert packed._pack(codes, width) == expected
    assert (packed._unpack(np.frombuffer(expected, np.uint8), n, width) == codes).all()


@pytest.mark.parametrize("width", range(1, 17))
def test_a_value_of_k_bits_takes_k_bits_and_the_tensor_at_most_four_bytes_more(width):
    values = np.random.default_rng(0).integers(-(1 << width >> 1), 1 << width >> 1, 5000)
    values[:2] = -(1 << width >> 1), (1 << width >> 1) - 1
    coder, payload = store.encode(values.astype(np.int32), "packed")
    assert coder == "packed" and 0 < len(payload) - 5000 * width / 8 <= 4
    assert (store.decode(coder, payload, (5000,), np.dtype(np.int32)) == values).all()


def test_packing_goes_on_across_pieces(monkeypatch):
    monkeypatch.setattr(packed, "_CHUNK", 4)
    values = np.random.default_rng(0).integers(0, 8, 1000).astype(np.uint8)
    coder, payload = store.encode(values, "packed")
    monkeypatch.undo()
    assert payload == store.encode(values, "packed")[1]
    monkeypatch.setattr(packed, "_CHUNK", 4)
    assert (store.decode(coder, payload, (1000,), values.dtype) == values).all()


def test_the_smallest_value_may_lie_anywhere():
    for lowest in (0, 1, -8, -7, -9, 100, -(2**63), 2**63 - 16):
        values = lowest + np.arange(16, dtype=np.int64)
        coder, payload = store.encode(values, "packed")
        assert (store.decode(coder, payload, (16,), values.dtype) == values).all()
