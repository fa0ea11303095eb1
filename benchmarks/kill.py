"""kill -9 at random moments of a run of the command line with training, then the same command: the same file, bit for bit.

    python benchmarks/kill.py [--kills 10]

A small net on the digits is compressed once without interruption. Then, again and again, a run in a folder of its own is killed
at a random moment (uniform over the time that a whole run takes; one that was over by then does not count) and the same command
is given once more. Figures go to benchmarks/results/kill.json.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NET = """
from pathlib import Path

import torch
from torch import nn


def net():
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )
    weights = Path(__file__).with_name("weights.pt")
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()
"""
RECIPE = """
steps:
  - any_of:
      - quantize.integer: {bits: [2, 3, 4, 8]}
      - chain:
          - prune.magnitude: {sparsity: [0.7, 0.9]}
          - quantize.codebook: {bits: [2, 3]}
    train: {epochs: 3, with: [distill.logits: {temperature: 2}]}
"""


def prepare(folder: Path) -> None:
    """The net, trained, and a recipe that trains."""
    import torch

    from pared import sources

    (folder / "net.py").write_text(NET)
    (folder / "recipe.yaml").write_text(RECIPE)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, _ = sources.model(f"{folder / 'net.py'}:net")
    task = sources.data("digits", model).task
    optimiser = torch.optim.AdamW(model.train().parameters(), 3e-3)
    for _ in range(15):
        for batch in task.train:
            optimiser.zero_grad()
            task.batch_loss(task.outputs(model, batch), batch).backward()
            optimiser.step()
    torch.save(model.state_dict(), folder / "weights.pt")


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pared.cli", "compress", f"{folder / 'net.py'}:net", "--data", "digits"]
    command += ["--size", "20x", "--recipe", str(folder / "recipe.yaml"), "--out", str(out), "--quiet"]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def killed(folder: Path, out: Path, after: float) -> dict[str, Any] | None:
    """One run that is killed, and the same command again; None if the run was over before."""
    begun = time.perf_counter()
    process = start(folder, out)
    while process.poll() is None and time.perf_counter() - begun < after:
        time.sleep(0.01)
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    log = (out / "log.txt").read_text().splitlines() if (out / "log.txt").exists() else []
    said = [line[20:] for line in log if re.match(r"\d{4}-\d\d-\d\d ", line)] or ["nothing written yet"]
    again = start(folder, out).wait()
    return {"killed_after_seconds": round(after, 2), "last_line": said[-1], "exit_code": again, "sha256": digest(out)}


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model.pared").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        begun = time.perf_counter()
        if start(folder, folder / "whole").wait():
            sys.exit("the run that is not interrupted failed")
        seconds, expected = time.perf_counter() - begun, digest(folder / "whole")
        rows: list[dict[str, Any]] = []
        for number in itertools.count():
            row = killed(folder, folder / f"killed-{number}", chance.uniform(0, seconds))
            if row is None:
                continue
            rows.append(row)
            rows[-1]["same"] = rows[-1].pop("sha256") == expected
            print(json.dumps(rows[-1]), flush=True)
            if len(rows) == arguments.kills:
                break
    figures = {"seconds_uninterrupted": seconds, "kills": len(rows), "same_file": sum(row["same"] for row in rows), "rows": rows}
    target = ROOT / "benchmarks" / "results" / "kill.json"
    target.write_text(json.dumps(figures, indent=1) + "\n")
    if figures["same_file"] != len(rows):
        sys.exit(f"{len(rows) - figures['same_file']} of {len(rows)} runs ended with another file")


if __name__ == "__main__":
    main()
