"""EfficientNet-Lite0 with its ImageNet weights, on photographs without labels, post-training, by the command line.

    python benchmarks/efficientnet.py [--sizes 8x 10x]

The measure is agreement with the original's most probable class on photographs that no choice was made on; intervals are
bootstrapped by photograph. Figures go to benchmarks/results/efficientnet.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "efficientnet_lite0.py"


def run(size: str, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        budget = ["--data", "photographs", "--size", size, "--no-train"]
        command = [sys.executable, "-m", "pared.cli", "compress", f"{MODEL}:efficientnet_lite0", *budget, "--out", str(out)]
        start = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        seconds = time.perf_counter() - start
        found = json.loads((out / "result.json").read_text())
    return {
        "size": size,
        "ratio": found["before"]["file_bytes"] / found["after"]["file_bytes"],
        "file_bytes": found["after"]["file_bytes"],
        "agreement": found["agreement"],
        "drop_pp": found["drop_pp"],
        "latency_ms": {side: found[side]["latency_ms"] for side in ("before", "after")},
        "data": found["data"],
        "seconds": seconds,
        "phases": found["seconds"],
        "warnings": found["warnings"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8x", "10x"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    target = ROOT / "benchmarks" / "results" / "efficientnet.json"
    runs = []
    for size in arguments.sizes:
        runs.append(run(size, arguments.threads))
        print(json.dumps(runs[-1], indent=1), flush=True)
        target.write_text(json.dumps({"threads": arguments.threads, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
