"""What a start costs: `import pared`, and an EfficientNet-Lite0 file from disk to the first output, without its class.

    python benchmarks/startup.py

Every figure is the median over processes of their own, as seconds on the clock and as seconds of the processor, which
other processes on the machine disturb less. Cold means an empty cache of compiled code. Figures go to
benchmarks/results/startup.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import pared
from pared import artifact, quantize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

IMPORT = """
import time, torch
start, cpu = time.perf_counter(), time.process_time()
import pared
print(time.perf_counter() - start, time.process_time() - cpu)
"""
LOAD = """
import sys, time, torch
torch.set_num_threads(1)
x = torch.zeros(1, 3, 224, 224)
start, cpu = time.perf_counter(), time.process_time()
import pared
net = pared.load(sys.argv[1])
with torch.no_grad():
    net(x)
print(time.perf_counter() - start, time.process_time() - cpu)
"""


def seconds(code: str, *arguments: str, cache: str | None = None, n: int = 7) -> list[tuple[float, float]]:
    """(by the clock, of the processor) of n processes."""
    environment = {**os.environ, **({"NUMBA_CACHE_DIR": cache} if cache else {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    runs = []
    for _ in range(n):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment
        )
        clock, processor = map(float, done.stdout.split())
        runs.append((clock, processor))
    return runs


def medians(runs: list[tuple[float, float]]) -> dict[str, float]:
    return {name: statistics.median(run) for name, run in zip(("clock", "processor"), zip(*runs))}


def coded(model: torch.nn.Module, x: torch.Tensor, path: Path) -> dict[str, object]:
    task = pared.Task(train=[(x, None)], val=[(x, None)])
    pared.save(pared.apply(model, task, quantize.Integer(bits=4)), path)
    found = artifact.inspect(path)
    return {"file_bytes": found["file_bytes"], "program_bytes": found["program_bytes"], "manifest_bytes": found["manifest_bytes"]}


def main() -> None:
    import lenet
    from efficientnet_lite0 import efficientnet_lite0

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lenet_path, path = Path(folder) / "lenet_5.pared", Path(folder) / "efficientnet_lite0.pared"
        files = {
            "lenet_5": coded(lenet.lenet_5().eval(), torch.zeros(2, 1, 28, 28), lenet_path),
            "efficientnet_lite0": coded(efficientnet_lite0().eval(), torch.zeros(2, 3, 224, 224), path),
        }
        cold = []
        for index in range(3):
            cache = Path(folder) / f"cache-{index}"
            cold += seconds(LOAD, str(path), cache=str(cache), n=1)
        warm = seconds(LOAD, str(path), cache=str(Path(folder) / "cache-0"))
    imports = seconds(IMPORT)
    figures = {
        "import_seconds": medians(imports),
        "load_to_first_output_seconds": {"cold": medians(cold), "cached": medians(warm)},
        "files": files,
    }
    target = ROOT / "benchmarks" / "results" / "startup.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
