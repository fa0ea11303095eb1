"""What every coder has to keep: bits, names, estimates, preferences, small costs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pared import store
from pared.errors import InputError, StoreError

INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
DTYPES = [*INTEGERS, np.bool_, np.float16, np.float32, np.float64]
PREFERENCES = ["smallest", "fastest", *store.names()]


def same(restored: np.ndarray, values: np.ndarray) -> bool:
    return restored.dtype == values.dtype and restored.shape == values.shape and restored.tobytes() == values.tobytes()


def restored(values: np.ndarray, prefer: str) -> np.ndarray:
    return store.decode(*store.encode(values, prefer), values.shape, values.dtype)


def weights(shape: tuple[int, ...], density: float, scale: float, seed: int = 0) -> np.ndarray:
    """Integers like those of a quantized, pruned layer, int8."""
    rng = np.random.default_rng(seed)
    drawn = np.clip(np.rint(rng.laplace(0, scale, shape)), -127, 127)
    return (drawn * (rng.random(shape) < density)).astype(np.int8)


def clustered(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Weights whose density and scale differ by row and column, as in a pruned first layer."""
    rng = np.random.default_rng(seed)
    density = np.outer(rng.beta(1, 2, rows), rng.beta(0.3, 1.5, columns))
    return (np.rint(rng.laplace(0, 2, (rows, columns))) * (rng.random((rows, columns)) < density)).astype(np.int8)


@pytest.mark.parametrize("prefer", PREFERENCES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_tensor_comes_back_bit_for_bit(prefer, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12))
    values = data.draw(npst.arrays(dtype, shape))
    assert same(restored(values, prefer), values)


@pytest.mark.parametrize("prefer", PREFERENCES)
@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(INTEGERS),
    n=st.sampled_from([1, 2, 7, 8, 9, 100, 1500]),
    alphabet=st.integers(1, 300),
    lowest=st.integers(-(2**62), 2**62),
    seed=st.integers(0, 99),
)
def test_narrow_integers_come_back_wherever_they_lie(prefer, dtype, n, alphabet, lowest, seed):
    bounds = np.iinfo(dtype)
    alphabet = min(alphabet, int(bounds.max) - int(bounds.min))
    lowest = min(max(lowest, int(bounds.min)), int(bounds.max) - alphabet)
    drawn = np.random.default_rng(seed).geometric(0.2, n) % (alphabet + 1)
    values = np.array([lowest + int(step) for step in drawn], dtype)
    assert same(restored(values, prefer), values)


@pytest.mark.parametrize("prefer", PREFERENCES)
@pytest.mark.parametrize(
    "values",
    [
        weights((70, 90), 1.0, 2.0),
        weights((40, 5, 5, 5), 0.1, 2.0),
        clustered(64, 100),
        weights((300, 500), 0.5, 1.5),
        weights((150_003,), 0.02, 2.0),
        weights((200, 200), 0.3, 2.0) != 0,
        (weights((64, 64), 1.0, 9.0).astype(np.int16) * 40 + 7),
        np.random.default_rng(0).normal(0, 0.02, (50, 120)).astype(np.float32),
        np.random.default_rng(0).integers(0, 2**16, 9000).astype(np.uint16),
    ],
    ids=["dense", "conv", "clustered", "large", "sparse", "bits", "wide", "floats", "noise"],
)
def test_layers_come_back_through_compiled_code(prefer, values):
    assert same(restored(values, prefer), values)


@pytest.mark.parametrize("prefer", PREFERENCES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_extremes_of_an_integer_type_come_back(prefer, dtype):
    bounds = np.iinfo(dtype)
    values = np.array([bounds.min, bounds.max, 0, bounds.max, bounds.min], dtype)
    assert same(restored(values, prefer), values)


@pytest.mark.parametrize("prefer", PREFERENCES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_payloads_negative_zeros_and_denormals_come_back(prefer, dtype):
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    top = 8 * unsigned.itemsize - 1
    exponent = int(np.array(np.inf, dtype).view(unsigned))
    bits = [0, 1, 1 << top, (1 << top) | 1, exponent, exponent | 5, (1 << top) | exponent | 77, 3, 1 << (top - 1)]
    values = np.array(bits * 40, unsigned).view(dtype)
    assert same(restored(values, prefer), values)


@pytest.mark.parametrize("layout", ["swapped", "strided", "transposed", "readonly"])
def test_the_layout_in_memory_does_not_matter(layout):
    values = np.arange(-3000, 3000, dtype=np.int32).reshape(60, 100) // 100
    arrangements = {
        "swapped": values.astype(">i4"),
        "strided": values[::2, ::3],
        "transposed": values.T,
        "readonly": np.frombuffer(values.tobytes(), np.int32).reshape(values.shape),
    }
    arranged = arrangements[layout]
    coder, payload = store.encode(arranged)
    assert payload == store.encode(np.array(arranged, np.int32, order="C"))[1]
    assert same(store.decode(coder, payload, arranged.shape, arranged.dtype), np.ascontiguousarray(arranged))


def test_a_coder_is_a_file_of_its_name():
    folder = Path(store.__file__).parent
    assert store.names() == sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    assert {"raw", "packed", "huffman", "rans", "planes"} <= set(store.names())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_without_elements_has_no_bytes(dtype):
    for prefer in PREFERENCES:
        assert store.encode(np.zeros((3, 0), dtype), prefer)[1] == b""
        assert store.estimate_bits(np.zeros((3, 0), dtype), prefer) == 0


@pytest.mark.parametrize("value", [0, 1, -1, 100, -128, 1.0, -2.5, True, np.float16(0.5)])
def test_a_constant_tensor_takes_at_most_three_bytes(value):
    values = np.full((300, 100), value)
    assert len(store.encode(values)[1]) <= 3
    assert store.estimate_bits(values) <= 24


@pytest.mark.parametrize(
    "values",
    [
        weights((120, 100), 1.0, 2.0),
        weights((120, 100), 0.05, 2.0),
        clustered(100, 200),
        weights((200, 800), 1.0, 1.0),
        clustered(300, 700),
        weights((20, 1, 5, 5), 0.6, 3.0),
        weights((30,), 1.0, 2.0),
        weights((90, 90), 0.5, 1.0) != 0,
        np.random.default_rng(1).normal(0, 0.1, 5000).astype(np.float32),
        np.random.default_rng(1).normal(0, 0.1, 3000).astype(np.float16),
        np.random.default_rng(1).integers(-(2**40), 2**40, 2000),
        weights((100, 100), 1.0, 4.0).astype(np.int32) * 100,
    ],
)
def test_the_estimate_is_within_a_hundredth_or_sixteen_bytes(values):
    for prefer in PREFERENCES:
        bits = 8 * len(store.encode(values, prefer)[1])
        assert abs(store.estimate_bits(values, prefer) - bits) <= max(0.01 * bits, 128), prefer


def test_smallest_is_no_larger_than_any_quick_coder_and_takes_a_slow_one_for_three_hundredths():
    for values in (weights((80, 80), 0.1, 2.0), clustered(100, 200), weights((4000,), 1.0, 2.0)):
        sizes = {name: len(store.encode(values, name)[1]) for name in store.names()}
        slow = sizes.pop("context")
        smallest = len(store.encode(values, "smallest")[1])
        assert smallest == (slow if slow < 0.97 * min(sizes.values()) else min(sizes.values()))


def test_fastest_stays_within_five_hundredths_of_the_smallest_quick_coder():
    for values in (weights((80, 80), 0.1, 2.0), clustered(100, 200), np.arange(4096) % 16):
        sizes = [len(store.encode(values, name)[1]) for name in store.names() if name != "context"]
        assert len(store.encode(values, "fastest")[1]) <= 1.05 * min(sizes)
    assert store.encode(np.random.default_rng(0).integers(0, 16, 9000), "fastest")[0] == "packed"


def test_a_named_coder_that_does_not_apply_gives_way():
    floats = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert store.encode(floats, "huffman")[0] == "planes"
    noise = np.random.default_rng(0).integers(0, 2**63, 50).view(np.float64)
    assert store.encode(noise, "packed")[0] == "raw"


def test_the_same_tensor_gives_the_same_bytes():
    values = clustered(64, 100)
    for prefer in PREFERENCES:
        assert store.encode(values, prefer) == store.encode(values.copy(), prefer)


def test_small_tensors_do_not_import_numba():
    program = (
        "import sys, numpy as np; from pared import store\n"
        "for values in (np.arange(4000) % 13 - 6, np.sin(np.arange(900, dtype=np.float32)), np.arange(900) % 3 == 0):\n"
        "    for prefer in ('rans', 'huffman', 'planes', 'packed'):\n"
        "        values2 = store.decode(*store.encode(values, prefer), values.shape, values.dtype)\n"
        "        assert (values2 == values).all()\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_coder_is_named_with_those_that_there_are():
    with pytest.raises(InputError, match="store must be smallest, fastest or one of .*rans.*; got 'zip'"):
        store.encode(np.arange(3), "zip")
    with pytest.raises(StoreError, match="a coder must be one of .*; got 'zip'"):
        store.decode("zip", b"", (3,), np.dtype(np.int8))


@pytest.mark.parametrize("dtype", [np.complex64, np.dtype("U3"), np.dtype("V2"), np.dtype(object)])
def test_types_that_cannot_be_stored_are_refused(dtype):
    with pytest.raises(InputError, match="a stored tensor must be of integers, bool or floats"):
        store.encode(np.zeros(3, dtype))
    with pytest.raises(StoreError, match="a coded tensor must be of integers, bool or floats"):
        store.decode("raw", b"", (3,), np.dtype(dtype))


def test_every_coder_has_a_section_of_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "coders.md").read_text(encoding="utf-8")
    assert [name for name in store.names() if f"\n## {name}\n" not in page] == []
