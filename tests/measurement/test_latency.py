import time

import pytest
import torch

from pared.errors import InputError
from pared.measurement import compare, is_faster
from pared.measurement.latency import MIN_RUNS, Latency


def test_calls_alternate():
    order = []
    compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, n_runs=4, n_warmup=2)
    assert "".join(order) == "ab" * 6


def test_warm_up_is_not_timed():
    calls = []

    def slow_at_first():
        calls.append(None)
        time.sleep(0.05 if len(calls) <= 2 else 0.0)

    found = compare({"a": slow_at_first}, n_runs=10, n_warmup=2)["a"]
    assert found.p90 < 25
    assert found.n == 10


def test_the_slower_of_two_is_slower():
    found = compare({"fast": lambda: time.sleep(0.001), "slow": lambda: time.sleep(0.004)}, n_runs=8)
    assert 1 <= found["fast"].median < found["slow"].median
    assert found["slow"].p10 >= 4


def test_time_is_bounded_but_every_callable_is_timed():
    start = time.perf_counter()
    found = compare({"a": lambda: time.sleep(0.02)}, n_runs=1000, seconds=0.1)["a"]
    assert MIN_RUNS <= found.n < 1000
    assert time.perf_counter() - start < 5


def test_quantiles():
    found = Latency.of([float(i) for i in range(11)])
    assert (found.p10, found.median, found.p90, found.n) == (1, 5, 9, 11)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    seen = []
    compare({"a": lambda: seen.append(torch.get_num_threads())}, n_runs=1, threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_small_gains_are_not_called_faster():
    assert is_faster(10.0, 5.0)
    assert not is_faster(10.0, 9.9)
    assert not is_faster(10.0, 11.0)


@pytest.mark.parametrize(
    "arguments", [{"callables": {}}, {"callables": {"a": int}, "n_runs": 0}, {"callables": {"a": int}, "threads": 0}]
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(InputError, match="at least"):
        compare(**arguments)
