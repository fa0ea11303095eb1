"""rANS: as small as its model allows, the same bytes from Python and machine code, tables that cannot go wrong."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pared import store
from pared.errors import StoreError
from pared.store import _frequencies, _sequences, rans
from pared.store._bits import BitReader, BitWriter
from pared.store._compiled import compiled
from pared.store._symbols import Symbols


def entropy_bytes(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(counts @ np.log2(counts.sum() / counts)) / 8


def table_of(values: np.ndarray) -> _frequencies.Table:
    symbols = Symbols.of(values)
    return _frequencies.choose(symbols.counts, symbols.lowest)


def start_of(table: _frequencies.Table) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(table.frequencies)[:-1]])


@pytest.mark.parametrize("density", [1.0, 0.3, 0.1])
def test_rans_is_within_a_thousandth_of_the_entropy(density):
    rng = np.random.default_rng(0)
    values = (np.clip(np.rint(rng.laplace(0, 2, 1_000_000)), -8, 7) * (rng.random(1_000_000) < density)).astype(np.int8)
    coder, payload = store.encode(values, "rans")
    assert coder == "rans"
    assert entropy_bytes(values) < len(payload) < 1.001 * entropy_bytes(values)


@pytest.mark.parametrize("n", [100, 500, 2000, 20_000])
def test_a_small_tensor_pays_less_for_its_table_than_half_a_byte_per_symbol_of_the_alphabet(n):
    values = np.clip(np.rint(np.random.default_rng(0).laplace(0, 2, n)), -8, 7).astype(np.int8)
    assert len(store.encode(values, "rans")[1]) < entropy_bytes(values) + 8 + 16 * 0.5 * math.log10(n / 10)


def test_a_parametric_table_takes_three_bytes_where_the_density_is_laplace():
    values = np.rint(np.random.default_rng(3).laplace(0, 3, 400)).astype(np.int8)
    table = table_of(values)
    assert sum(width for _, width in table.description) <= 24
    assert 8 * len(store.encode(values, "rans")[1]) < 8 * entropy_bytes(values) + 88


@pytest.mark.parametrize("alphabet", [2, 16, 200, 3000])
def test_python_and_machine_code_write_the_same_stream(alphabet):
    values = (np.random.default_rng(1).geometric(min(0.7, 4 / alphabet), 3000) % alphabet).astype(np.int16)
    symbols, table = Symbols.of(values), table_of(values)
    start, first = start_of(table), 3
    room, stream = bytearray(2 * values.size + 8), np.zeros(2 * values.size + 8, np.uint8)
    lists = (symbols.codes.tolist(), table.frequencies.tolist(), start.tolist())
    used = rans._encode_single(*lists, table.precision, first, room)
    assert compiled(rans._encode_single)(symbols.codes, table.frequencies, start, table.precision, first, stream) == used
    assert bytes(room) == stream.tobytes()
    slots = np.repeat(np.arange(symbols.alphabet, dtype=np.uint16), table.frequencies)
    decoded = np.zeros_like(symbols.codes)
    arrays = (stream[used:], slots, table.frequencies, start)
    assert compiled(rans._decode_single)(*arrays, table.precision, first, decoded)
    assert (decoded == symbols.codes).all()


def test_interleaved_states_agree_with_an_exact_integer_oracle():
    """Eight states of Python integers, divided exactly, give the words that floating division in machine code gives."""
    values = np.clip(np.rint(np.random.default_rng(2).laplace(0, 3, 5003)), -8, 7).astype(np.int8)
    symbols, table = Symbols.of(values), table_of(values)
    start = start_of(table)
    words, states = np.zeros(values.size, np.uint16), np.zeros(8, np.int64)
    used = compiled(rans._encode_lanes)(symbols.codes, table.frequencies, start, table.precision, words, states)
    expected, lanes = [], [1 << 24] * 8
    for i in reversed(range(values.size)):
        symbol = int(symbols.codes[i])
        frequency, state = int(table.frequencies[symbol]), lanes[i % 8]
        if state >= frequency << (40 - table.precision):
            expected.append(state & 0xFFFF)
            state >>= 16
        lanes[i % 8] = (state // frequency << table.precision) + state % frequency + int(start[symbol])
    assert words[used:].tolist() == expected[::-1] and states.tolist() == lanes


@pytest.mark.parametrize("n", [rans.INTERLEAVED_FROM - 1, *range(rans.INTERLEAVED_FROM, rans.INTERLEAVED_FROM + 9)])
def test_every_remainder_of_eight_comes_back_interleaved(n):
    values = (np.arange(n, dtype=np.int64) ** 2 % 11).astype(np.int8)
    assert (rans.decode(memoryview(rans.encode(values, Symbols.of(values))), (n,), values.dtype) == values).all()


def test_clustered_zeros_are_cheaper_as_gaps():
    rng = np.random.default_rng(0)
    rows = rng.random(200) < 0.1
    values = (rng.integers(1, 5, (200, 300)) * rows[:, None] * (rng.random((200, 300)) < 0.8)).astype(np.int8)
    assert len(store.encode(values, "rans")[1]) < 0.9 * entropy_bytes(values)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.just(0), st.integers(1, 2**40)), min_size=1, max_size=300), st.sampled_from([10, 12, 16]))
def test_frequencies_sum_to_a_power_of_two_and_keep_every_symbol(weights, precision):
    weights = np.array(weights, np.int64)
    if not weights.any():
        return
    frequencies = _frequencies.normalise(weights, precision)
    assert frequencies.sum() == 1 << precision
    assert ((frequencies > 0) == (weights > 0)).all()
    order = np.argsort(weights, kind="stable")
    assert (np.diff(frequencies[order]) >= -1).all()


def test_frequencies_that_fall_geometrically_are_normalised_at_once():
    weights = np.maximum(1, (2.0 ** (40 - np.arange(60_000) / 1500)).astype(np.int64))
    assert _frequencies.normalise(weights, 16).sum() == 1 << 16


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=300), st.integers(-200, 50))
def test_a_table_is_read_as_it_was_written(counts, lowest):
    counts = np.array(counts, np.int64)
    if not counts.any():
        return
    table = _frequencies.choose(counts, lowest)
    writer = BitWriter()
    table.write(writer)
    frequencies, precision = _frequencies.read(BitReader(writer.to_bytes()), len(counts), lowest)
    assert precision == table.precision and (frequencies == table.frequencies).all()
    assert (frequencies[counts > 0] > 0).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.just(0), st.integers(0, 20), st.integers(0, _sequences.LARGEST)), min_size=1, max_size=80))
def test_a_sequence_is_read_as_it_was_written_in_the_bits_it_was_said_to_cost(row):
    row = np.array(row, np.int64)
    ways, bits = _sequences.cost(row[None])
    writer = BitWriter()
    for value, width in _sequences.fields(row, int(ways[0])):
        writer.write(value, width)
    assert writer.n_bits == bits[0]
    assert (_sequences.read(BitReader(writer.to_bytes()), len(row)) == row).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**64), st.integers(0, 8)), max_size=60))
def test_bit_fields_are_read_as_they_were_written(numbers):
    writer = BitWriter()
    for value, order in numbers:
        writer.write_gamma(value, order)
        writer.write_signed(-value // 3, order)
    reader = BitReader(writer.to_bytes() + b"rest")
    for value, order in numbers:
        assert reader.read_gamma(order) == value and reader.read_signed(order) == -value // 3
    assert bytes(reader.rest()) == b"rest"


def test_a_number_without_end_is_refused():
    with pytest.raises(StoreError, match="a number in the header must have at most 70 bits"):
        BitReader(bytes(1000)).read_gamma()
    with pytest.raises(StoreError, match="must have 1 bytes or more, got 0"):
        BitReader(b"").read(3)
