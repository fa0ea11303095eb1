"""The coders of the file: bytes over the entropy, and symbols per second on one core.

    python benchmarks/coders.py [--symbols 10000000] [--runs 7]

Ten million 4-bit symbols are drawn from a rounded Laplace density, the shape of quantized weights, dense and with nine
tenths of them zero. Time is the median of several runs of the whole of pared.store.encode and decode, histograms and
tables included, from an int8 array to bytes and back; compiled code is loaded before. It is processor time, of one
thread, so that other work on the machine matters less. DEFLATE and LZMA from Python's library, on two symbols per byte,
stand beside. Figures go to benchmarks/results/coders.json.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np

from pared import store

RESULTS = Path(__file__).resolve().parent / "results" / "coders.json"
CODERS = ("rans", "huffman", "packed", "context")


def symbols(n: int, density: float) -> np.ndarray:
    """(n / 1000, 1000) int8 in [-8, 7]."""
    rng = np.random.default_rng(0)
    drawn = np.clip(np.rint(rng.laplace(0, 2, n)), -8, 7) * (rng.random(n) < density)
    return drawn.astype(np.int8).reshape(-1, 1000)


def entropy_bytes(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(counts @ np.log2(counts.sum() / counts)) / 8


def median_s(work: Callable[[], object], runs: int) -> float:
    def once() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return statistics.median(once() for _ in range(runs))


def measured(values: np.ndarray, runs: int, encode: Callable[[], bytes], decode: Callable[[bytes], object]) -> dict[str, float]:
    payload = encode()
    decode(payload)
    return {
        "bytes": len(payload),
        "over_entropy": len(payload) / entropy_bytes(values) - 1,
        "encode_msymbols_per_s": values.size / median_s(encode, runs) / 1e6,
        "decode_msymbols_per_s": values.size / median_s(lambda: decode(payload), runs) / 1e6,
    }


def of_coder(values: np.ndarray, coder: str, runs: int) -> dict[str, float]:
    name, payload = store.encode(values, coder)
    if name != coder or not np.array_equal(store.decode(name, payload, values.shape, values.dtype), values):
        raise SystemExit(f"{coder} must give back what it was given, and {name} did not")
    figures = measured(
        values,
        runs,
        lambda: store.encode(values, coder)[1],
        lambda payload: store.decode(coder, payload, values.shape, values.dtype),
    )
    return {**figures, "estimate_s": median_s(lambda: store.estimate_bits(values, coder), runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--symbols", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    report: dict[str, object] = {
        "machine": {
            "processor": processor(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
        },
        "symbols": arguments.symbols,
        "runs": arguments.runs,
    }
    for label, density in (("dense", 1.0), ("sparse", 0.1)):
        values = symbols(arguments.symbols, density)
        rows = {coder: of_coder(values, coder, arguments.runs) for coder in CODERS}
        nibbles = ((values[:, ::2] & 15) | (values[:, 1::2] & 15) << 4).astype(np.uint8).tobytes()
        rows["deflate"] = measured(values, 1, lambda: zlib.compress(nibbles, 9), zlib.decompress)  # noqa: B023
        rows["lzma"] = measured(values, 1, lambda: lzma.compress(nibbles), lzma.decompress)  # noqa: B023
        report[label] = {"entropy_bytes": entropy_bytes(values), "coders": rows}
        for coder, row in rows.items():
            print(
                f"{label:7} {coder:8} {row['bytes']:>9,} bytes  {100 * row['over_entropy']:8.4f} % over"
                f"  encode {row['encode_msymbols_per_s']:7.1f} M/s  decode {row['decode_msymbols_per_s']:7.1f} M/s"
            )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


def processor() -> str:
    """As the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
