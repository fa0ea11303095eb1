"""A made-up result with everything in it: figures that nobody measured, shaped like those of real runs."""

import math
import random

import pytest

OPTIONS = (
    [f"quantize.integer(bits={b}, group=64)" for b in (2, 3, 4, 5, 6, 8)]
    + [f"quantize.codebook(bits={b})" for b in (1, 2, 3, 4)]
    + [f"chain(prune.magnitude(sparsity={s}), quantize.codebook(bits={b}))" for s, b in ((0.8, 3), (0.9, 3), (0.95, 4))]
)


def made_up(n_layers=3, options=OPTIONS, seed=0):
    generator = random.Random(seed)
    if n_layers == 3:
        names, sizes = ["conv1.weight", "fc1.weight", "fc2.weight"], [500, 400_000, 5_000]
    else:
        names = [
            f"backbone.stages.{k // 10}.blocks.{k % 10}.attention_with_relative_position.query_key_value.weight"
            if k % 3 == 0
            else f"backbone.stages.{k // 10}.blocks.{k % 10}.mlp.fc{k % 2}.weight"
            for k in range(n_layers)
        ]
        sizes = [int(10 ** generator.uniform(3, 6)) for _ in names]
    edits, sensitivity, pairs = [], [], []
    for name, size in zip(names, sizes):
        hurt = 10 ** generator.uniform(-5, -1)
        for option in options:
            bits = int(option.rpartition("bits=")[2].strip(")").split(",")[0])
            damage = hurt * 4.0**-bits * 10 ** generator.uniform(-0.4, 0.4) * (30 if "prune" in option else 1)
            sensitivity.append({"path": name, "technique": option, "stored_bits": size * bits * 0.9, "damage": damage})
        chosen = generator.choice(options)
        bits = generator.uniform(0.5, 3.5)
        predicted = hurt * 0.02
        edits.append({
            "paths": [name, "decoder.tied.weight"] if name == names[-1] else [name],
            "technique": chosen, "settings": {}, "shape": [size // 20, 20], "bits_per_weight": bits,
            "bytes_before": 4 * size, "bytes_after": int(size * bits / 8), "damage_predicted": predicted,
            "damage_measured": None,
        })  # fmt: skip
        pairs.append({
            "path": name, "technique": chosen, "predicted": predicted,
            "measured": predicted * 10 ** generator.uniform(-0.5, 0.3),
        })  # fmt: skip
    before, after = sum(4 * s for s in sizes), sum(e["bytes_after"] for e in edits) + 900
    side = {"parameters": sum(sizes), "macs": 2_293_000, "batch_size": 1}
    return {
        "pared": "0.1.0", "created": "2026-01-02T03:04:05+00:00",
        "model": {"name": "LeNet5", "class": "nets.LeNet5", "parameters": sum(sizes)},
        "data": {
            "name": "fashion-mnist", "n_train": 55000, "n_val": 5000, "n_test": 10000, "n_groups": 10000,
            "calibration": "the first 512 examples of train",
        },
        "budget": {"size": "40x", "macs": None, "latency": None, "max_drop": 0.3}, "seed": 0,
        "before": {
            **side, "file_bytes": before, "peak_activation_bytes": 58_000,
            "latency_ms": {
                "torch": {"median": 0.412, "p10": 0.401, "p90": 0.463, "n": 100},
                "onnxruntime": {"median": 0.150, "p10": 0.148, "p90": 0.161, "n": 100},
            },
            "metric": {"name": "accuracy", "value": 0.9162, "low": 0.9107, "high": 0.9216, "n": 10000},
        },
        "after": {
            **side, "file_bytes": after, "peak_activation_bytes": 58_000, "macs": 1_010_000,
            "latency_ms": {
                "torch": {"median": 0.418, "p10": 0.405, "p90": 0.471, "n": 100},
                "onnxruntime": {"median": 0.071, "p10": 0.069, "p90": 0.080, "n": 100},
            },
            "metric": {"name": "accuracy", "value": 0.9149, "low": 0.9093, "high": 0.9203, "n": 10000},
        },
        "drop_pp": {
            "value": 0.13, "low": -0.08, "high": 0.34, "n": 10000, "n_groups": 10000, "unit": "pp", "on": "test",
        },
        "agreement": {"name": "same class as the original", "value": 0.971, "low": 0.968, "high": 0.974},
        "edits": edits,
        "refusals": [
            {"path": path, "technique": "factor.low_rank", "reason": "a rank of 16 makes it larger", "bytes": n_bytes}
            for path, n_bytes in [*((f"conv{k}.bias", 80) for k in range(9)), ("fc2.weight", 20_000)]
        ],
        "untouched": [
            {"path": "conv1.bias", "bytes": 80, "reason": "left as it is by the plan"},
            {"path": "bn.num_batches_tracked", "bytes": 8, "reason": "not a floating-point tensor"},
        ],
        "sensitivity": sensitivity,
        "predicted_measured": pairs + [{"path": "x", "technique": "y", "predicted": 1e-4, "measured": -2e-6}],
        "curve": [{"bytes": before / r, "damage": 1e-5 * r**1.7} for r in (4, 8, 12, 16, 24, 32, 48, 64, 96, 128)],
        "trials": [
            {
                "bytes": before / r, "predicted_damage": 1e-5 * r**1.7, "metric": 0.915 - d / 100, "drop_pp": d,
                "accepted": r == 42, "epochs": e, "seconds": 12.5 * (1 + e),
            }
            for r, d, e in ((16, 0.02, 0), (30, 0.71, 0), (42, 0.13, 20), (60, 0.55, 20))
        ],
        "training": [
            {
                "step": 300, "part": int(k >= 15), "epoch": k + 1, "loss": 0.9 * math.exp(-k / 6) + 0.2,
                "score": 0.9162 - 0.02 * math.exp(-k / 4), "learning_rate": 1e-3, "annealed": True, "seconds": 2.0,
            }
            for k in range(20)
        ],
        "recipe": "# seed 0\nbudget: {size: 40x, max_drop: 0.3}\nsteps:\n- quantize.integer: {bits: [2, 4, 8]}\n",
        "command": "pared compress nets.py:lenet5 --data fashion-mnist --size 40x --max-drop 0.3 --out lenet5",
        "seconds": {"calibrate": 4.1, "options": 12.0, "total": 431.0},
        "environment": {"torch": "2.13.0", "python": "3.11.2", "cpu": "x86_64", "threads": 2},
        "warnings": [], "met": True,
    }  # fmt: skip


@pytest.fixture
def result():
    return made_up()


@pytest.fixture
def large_result():
    return made_up(100, [*OPTIONS, *(f"quantize.codebook(bits={bits}, group=16)" for bits in range(1, 7))])
