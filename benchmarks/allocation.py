"""Allocation of 200 layers with 12 options each: seconds and gap for one budget and for three.

    python benchmarks/allocation.py

Layer sizes span four decades, damage falls with the bits like that of quantization, costs are noisy. Figures go to
benchmarks/results/allocation.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from torch import nn

from pared.budget import allocate
from pared.site import Site
from pared.technique import Cost, Option, Technique

ROOT = Path(__file__).resolve().parents[1]


class Level(Technique):
    """Stands for a technique; the allocator sees nothing else of it."""

    level: int


def instance(n_layers: int, n_options: int, seed: int) -> list[Option]:
    rng = np.random.default_rng(seed)
    root = nn.Module()
    options = []
    for place in range(n_layers):
        numel, hurt = 10 ** rng.uniform(3, 7), 10 ** rng.uniform(-3, 2)
        site = Site(root, (f"layer{place}.weight",), "tensor", (f"layer{place}.weight",))
        options.append(Option(site, None, Cost(32 * numel, 100 * numel, 1e-6 * numel), 0.0))
        for level in range(n_options - 1):
            bits, share = rng.uniform(0.5, 9), rng.uniform(0.1, 1)
            damage = hurt * (4**-bits * rng.uniform(0.5, 2) + (1 - share) ** 2)
            cost = Cost(round(numel * bits * share), 100 * numel * share, 1e-6 * numel * rng.uniform(0.2, 1))
            options.append(Option(site, Level(level=level), cost, damage))
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=10)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    allocate(instance(5, 3, 0), size_bits=1e9, macs=1e12)  # imports scipy
    rows: dict[str, list[dict[str, float]]] = {"one_budget": [], "three_budgets": []}
    for seed in range(arguments.instances):
        options = instance(200, 12, seed)
        dense = sum((option.cost for option in options if option.technique is None), Cost())
        for fraction in (1 / 8, 1 / 16):
            limits = {"size_bits": fraction * dense.stored_bits}
            for kind in rows:
                start = time.perf_counter()
                plan = allocate(options, **limits)
                seconds = time.perf_counter() - start
                used = plan.cost.stored_bits / limits["size_bits"]
                rows[kind].append({"seed": seed, "seconds": seconds, "gap": plan.gap, "size_used": used, "damage": plan.damage})
                limits |= {"macs": 0.6 * dense.macs, "latency_ms": 0.6 * dense.latency_ms}
    summary = {
        kind: {
            "n": len(entries),
            "seconds_median": statistics.median(entry["seconds"] for entry in entries),
            "seconds_max": max(entry["seconds"] for entry in entries),
            "gap_max": max(entry["gap"] for entry in entries),
            "size_used_min": min(entry["size_used"] for entry in entries),
        }
        for kind, entries in rows.items()
    }
    print(json.dumps(summary, indent=1))
    path = arguments.results / "allocation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"layers": 200, "options": 12, **summary, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
