"""Adaptive coding in context: what it is for, and that Python and machine code agree."""

import numpy as np
import pytest

from pared import store
from pared.store import context
from pared.store._compiled import compiled
from pared.store._symbols import Symbols


def layer(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Density differs by row and column, as in a pruned first layer."""
    rng = np.random.default_rng(seed)
    density = np.outer(rng.beta(1, 2, rows), rng.beta(0.3, 1.5, columns))
    return (np.rint(rng.laplace(0, 2, (rows, columns))) * (rng.random((rows, columns)) < density)).astype(np.int8)


def test_rows_and_columns_of_different_density_are_a_tenth_smaller_than_by_any_other_coder():
    values = layer(200, 300)
    sizes = {name: len(store.encode(values, name)[1]) for name in store.names()}
    assert sizes["context"] < 0.9 * min(size for name, size in sizes.items() if name != "context")
    assert store.encode(values)[0] == "context"


def test_a_tensor_without_structure_is_within_a_fiftieth_of_its_entropy():
    rng = np.random.default_rng(0)
    values = (rng.integers(-3, 4, (300, 300)) * (rng.random((300, 300)) < 0.1)).astype(np.int8)
    counts = np.unique(values, return_counts=True)[1]
    assert len(store.encode(values, "context")[1]) < 1.02 * float(counts @ np.log2(counts.sum() / counts)) / 8


@pytest.mark.parametrize(
    "values",
    [
        layer(20, 50),
        layer(20, 50) != 0,
        np.abs(layer(16, 40)),
        -np.abs(layer(16, 40)).astype(np.int16) - 1000,
        layer(12, 75).reshape(12, 3, 5, 5),
        np.where(np.arange(900) % 31 == 0, 200, np.arange(900) % 3 - 1).astype(np.int16),
    ],
    ids=["signed", "bits", "positive", "negative", "convolution", "outliers"],
)
def test_python_and_machine_code_write_the_same_stream(values, monkeypatch):
    payload = context.encode(values, Symbols.of(values))
    assert (context.decode(memoryview(payload), values.shape, values.dtype) == values).all()
    monkeypatch.setattr(context, "_SMALL", 0)
    assert context.encode(values, Symbols.of(values)) == payload
    assert (context.decode(memoryview(payload), values.shape, values.dtype) == values).all()


def test_measuring_gives_the_bytes_that_encoding_takes():
    values = layer(100, 200)
    symbols = Symbols.of(values)
    codes, room = symbols.codes.astype(np.uint16), np.zeros(100_000, np.uint8)
    zero = -symbols.lowest
    _, bits = context._run(context._MEASURE, codes, symbols.alphabet, zero, 200, np.zeros(0, np.uint8))
    size, _ = context._run(context._ENCODE, codes, symbols.alphabet, zero, 200, room)
    assert abs(bits - 8 * size) < 0.001 * bits + 16


def test_a_stream_longer_than_expected_is_written_again():
    values = np.zeros((64, 64), np.int8)
    values[::7, ::5] = 90
    values[::9, ::11] = -100
    payload = context.encode(values, Symbols.of(values))
    assert (context.decode(memoryview(payload), values.shape, values.dtype) == values).all()


def test_the_loop_stays_within_its_tables_under_bounds_checks():
    import numba

    checked = numba.njit(context._pass, boundscheck=True)
    rng = np.random.default_rng(0)
    for alphabet in (2, 9, 300, 65_536):
        for columns in (1, 7, 30, 25):
            zero = int(rng.integers(0, alphabet))
            codes, stream = np.zeros(60 * columns, np.uint16), rng.integers(0, 256, 80).astype(np.uint8)
            size, _ = checked(2, codes, alphabet, zero, columns, stream, context._states(columns), context._tables())
            assert size == -1 or codes.max() < alphabet
    assert compiled(context._pass) is compiled(context._pass)
