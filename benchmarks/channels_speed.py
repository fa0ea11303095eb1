"""Seconds to analyse a network and remove half of its channels, pared against torch-pruning.

    pip install --target FOLDER --no-deps torch-pruning
    python benchmarks/channels_speed.py --peer FOLDER

The same networks (random weights, 224 pixels, batch 2, one thread), taking turns, each run a process of its own. pared's
seconds hold the tracing and the trial in which a cut copy is compared with its program; they are given apart. Figures go
to benchmarks/results/channels_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NETS = ("resnet50", "densenet121", "vit_small_patch16_224")

START = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
model = timm.create_model(sys.argv[1]).eval()
x = torch.randn(2, 3, 224, 224)
before = sum(p.numel() for p in model.parameters())
"""
OURS = """
import pared
from pared import prune
from pared.budget.channels import Removal
from pared.graph import channels
from pared.place import everywhere
from pared.statistics import Statistics
seconds = {}
def timed(name, function):
    def run(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    return run
channels.trace = timed("trace", channels.trace)
channels.Channels._settle = timed("trial", channels.Channels._settle)
start = time.perf_counter()
graph = channels.Channels(model, (x,))
options, _ = everywhere(model, prune.Channels(keep=0.5, importance="l2"), Statistics(), graph)
Removal(model, graph, None).remove_(options)
seconds["all"] = time.perf_counter() - start
"""
THEIRS = """
import torch_pruning as tp
kept = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
start = time.perf_counter()
pruner = tp.pruner.MetaPruner(
    model, x, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=kept, num_heads=heads,
)
pruner.step()
seconds = {"all": time.perf_counter() - start}
"""
END = """
after = sum(p.numel() for p in model.parameters())
print(json.dumps({"seconds": seconds, "parameters_left": after / before}))
"""


def run(code: str, net: str, peer: str = "") -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), peer)))}
    done = subprocess.run([sys.executable, "-c", START + code + END, net], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{net} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="the folder that holds torch-pruning")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    rows = []
    for net in NETS:
        runs = [(run(OURS, net), run(THEIRS, net, asked.peer)) for _ in range(asked.runs)]
        row: dict[str, Any] = {"net": net}
        for name, own in zip(("pared", "torch_pruning"), zip(*runs)):
            row[name] = {
                "seconds": {key: statistics.median(r["seconds"][key] for r in own) for key in own[0]["seconds"]},
                "parameters_left": own[0]["parameters_left"],
            }
        print(json.dumps(row), flush=True)
        rows.append(row)
    (ROOT / "benchmarks" / "results" / "channels_speed.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
