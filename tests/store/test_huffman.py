"""Huffman: optimal code lengths, gaps, tables that make a complete code."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pared import store
from pared.errors import StoreError
from pared.store import _gaps, huffman
from pared.store._compiled import compiled
from pared.store._symbols import Symbols


def optimal_bits(counts: list[int]) -> int:
    """The cost of a Huffman code is the sum of the weights of its inner nodes."""
    heap, bits = [count for count in counts if count], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        heapq.heappush(heap, merged)
        bits += merged
    return bits


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=200))
def test_code_lengths_are_optimal_and_complete(counts):
    counts = np.array(counts, np.int64)
    if np.count_nonzero(counts) < 2:
        return
    lengths = huffman._code_lengths(counts)
    assert int(lengths @ counts) == optimal_bits(counts.tolist())
    assert sum(2.0 ** -int(length) for length in lengths if length) == 1
    assert ((lengths > 0) == (counts > 0)).all()


def test_no_code_is_longer_than_sixteen_bits():
    counts = np.array([int(1.6**k) for k in range(45)])
    lengths = huffman._code_lengths(counts)
    assert lengths.max() == 16
    assert sum(2.0 ** -int(length) for length in lengths) == 1
    assert lengths @ counts < 1.001 * optimal_bits(counts.tolist())
    assert huffman._code_lengths(np.ones(65_536, np.int64)).tolist() == [16] * 65_536


def test_codewords_are_canonical():
    lengths = np.array([2, 1, 0, 3, 3])
    assert huffman._canonical(lengths).tolist() == [0b10, 0b0, 0, 0b110, 0b111]


def test_the_bytes_are_the_optimal_bits_and_a_small_table():
    values = np.clip(np.rint(np.random.default_rng(0).laplace(0, 2, 30_000)), -8, 7).astype(np.int8)
    bits = optimal_bits(np.unique(values, return_counts=True)[1].tolist())
    assert 0 <= len(store.encode(values, "huffman")[1]) - bits / 8 < 12


def test_gaps_reach_the_entropy_of_a_sparse_layer_where_single_symbols_cannot():
    rng = np.random.default_rng(0)
    values = (rng.random(200_000) < 0.02).astype(np.int8)
    entropy = 200_000 * -(0.02 * np.log2(0.02) + 0.98 * np.log2(0.98)) / 8
    assert len(store.encode(values, "huffman")[1]) < 1.04 * entropy < 0.2 * 200_000 / 8


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.sampled_from(_gaps.LIMITS), st.floats(0.005, 0.5))
def test_gaps_are_joined_as_they_were_split(seed, n, limit, density):
    rng = np.random.default_rng(seed)
    codes = (rng.integers(1, 5, n) * (rng.random(n) < density)).astype(np.uint8)
    counts = np.bincount(codes, minlength=5)
    if not codes.any() or counts.argmax() != 0:
        return
    gaps = _gaps.Gaps(codes, counts)
    tokens, others = gaps.tokens(limit), gaps.others()
    assert np.bincount(tokens, minlength=limit + 1).tolist() == gaps.histogram(limit).tolist()
    assert _gaps.count_others(tokens, limit, n) == len(others) == gaps.counts.sum()
    assert (_gaps.join(tokens, others, limit, gaps.skipped, n) == codes).all()


def test_gaps_are_joined_across_pieces(monkeypatch):
    monkeypatch.setattr(_gaps, "_CHUNK", 7)
    codes = (np.random.default_rng(0).random(1000) < 0.1).astype(np.uint8)
    gaps = _gaps.Gaps(codes, np.bincount(codes))
    assert (_gaps.join(gaps.tokens(15), gaps.others(), 15, 0, 1000) == codes).all()


def test_gaps_that_do_not_fill_the_tensor_are_refused():
    with pytest.raises(StoreError, match="gaps and symbols must fill 10 places, got 9"):
        _gaps.count_others(np.array([3, 4], np.uint8), 7, 10)


def test_python_and_machine_code_write_the_same_stream():
    codes = (np.random.default_rng(1).geometric(0.1, 3000) % 40).astype(np.uint8)
    lengths = huffman._code_lengths(np.bincount(codes, minlength=40))
    words = huffman._canonical(lengths)
    n_words = int(lengths[codes].sum()) // 32 + 1
    room, stream = [0] * n_words, np.zeros(n_words, np.uint32)
    huffman._encode_stream(codes.tolist(), words.tolist(), lengths.tolist(), room)
    compiled(huffman._encode_stream)(codes, words, lengths, stream)
    assert stream.tolist() == room


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 2, 2], [0, 0, 0], [17, 1, 0], [1, 2, 0]])
def test_lengths_that_make_no_complete_code_are_refused(lengths):
    with pytest.raises(StoreError, match="Huffman"):
        huffman._unpack(memoryview(b"abcd"), np.array(lengths), 5)


def test_a_symbol_of_its_own_takes_one_bit():
    codes, rest = huffman._unpack(memoryview(b"\x00\x07"), np.array([0, 1, 0]), 8)
    assert codes.tolist() == [1] * 8 and bytes(rest) == b"\x07"


def test_a_mask_is_coded_by_its_gaps_alone():
    values = np.zeros(4000, bool)
    values[5::8] = True
    symbols = Symbols.of(values)
    assert len(huffman.encode(values, symbols)) < 80
