"""How long the default recipe takes on resnet18: 500 images, post-training, every shipped technique.

    python benchmarks/resnet18.py

Weights and images are random: this times the engine and says nothing of quality. Figures go to
benchmarks/results/resnet18.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import pared
from pared import sources

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, _ = sources.model("timm:resnet18")
    images = torch.randn(arguments.images, 3, 224, 224)
    batches = [(images[i : i + 20], None) for i in range(0, arguments.images, 20)]
    task = pared.Task(train=batches, val=batches[:10])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = pared.compress(model, task, "default", size="8x", train=False, out=Path(folder) / "run", progress=say)
    figures = {
        "images": arguments.images,
        "threads": arguments.threads,
        "seconds": time.perf_counter() - start,
        "phases": result.data["seconds"],
        "ratio": result.data["before"]["file_bytes"] / result.data["after"]["file_bytes"],
        "options": len(result.data["sensitivity"]),
    }
    target = ROOT / "benchmarks" / "results" / "resnet18.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def say(event: dict[str, object]) -> None:
    if "say" in event:
        print(event["say"], flush=True)


if __name__ == "__main__":
    main()
