"""The same file from two runs, and the same tensors from a file with other versions of numpy, numba and Python.

    python benchmarks/determinism.py [--others PYTHON ...]

Every file below is made twice, by two processes one after the other, and read by each of the other interpreters, which
need torch and what pared needs, but not pared itself. What is compared: SHA-256 of the files; SHA-256 of every decoded
tensor; payloads of all coders on the same integers and floats, which every interpreter writes and reads. Figures go to
benchmarks/results/determinism.json. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pared
from pared import Task, artifact, sources, store
from pared.artifact.tensors import to_array
from pared.errors import StoreError
from pared.factor import LowRank
from pared.prune import Magnitude
from pared.quantize import Binary, Codebook, Float, Hqq, Integer, RateDistortion, Ternary
from pared.site import plain
from pared.technique import Chain

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "determinism.json"
TRAINED = {"steps": [{"quantize.integer": {"bits": [3, 4]}, "train": {"epochs": 1, "with": [{"distill.logits": {}}]}}]}


def network(module: str, name: str, data: str) -> tuple[torch.nn.Module, Task]:
    sys.path.insert(0, str(ROOT / "examples"))
    net = getattr(__import__(module), f"{name}_trained")().eval()
    return net, sources.data(data, net).task


def make(folder: Path) -> None:
    """Every kind of decoder and every coder, by hand, after calibration, and by whole runs with and without training."""
    lenet, clothes = network("lenet", "lenet_300_100", "fashion-mnist")
    resnet, _ = network("small_resnet", "small_resnet", "fashion-mnist")
    lstm, digits = network("digits_lstm", "digits_lstm", "digits")
    example = clothes.example(resnet)
    for slope in (1e-8, 1e-6):
        pared.save(pared.apply(lenet, clothes, RateDistortion(slope=slope)), folder / f"lenet-{slope}.pared")
    fine = pared.apply(resnet, clothes, RateDistortion(slope=2e-7))
    for coder in (*store.names(), "smallest", "fastest"):
        pared.save(fine, folder / f"resnet-{coder}.pared", store=coder)
    by_hand = {
        "integer": Integer(bits=4, group=16), "codebook": Chain(Magnitude(sparsity=0.8), Codebook(bits=3)),
        "low-rank": Chain(LowRank(rank=8), Integer(bits=8)), "float": Float(), "hqq": Hqq(),
        "ternary": Ternary(), "binary": Binary(),
    }  # fmt: skip
    for name, technique in by_hand.items():
        pared.save(pared.apply(resnet, None, technique), folder / f"resnet-{name}.pared", example=example)
    pared.save(pared.compress(lstm, digits, size="12x", train=False).model, folder / "lstm-12x.pared")
    pared.save(pared.compress(lstm, digits, TRAINED, size="8x").model, folder / "lstm-8x-trained.pared")
    weights = ROOT / "examples" / "weights" / "vit_tiny-seed0.safetensors"
    artifact.pack(weights, folder / "vit-lossless.pared")


def arrays() -> dict[str, np.ndarray]:
    """By integer arithmetic alone, so that every machine has the same."""
    state, drawn = 1, []
    for _ in range(60_000):
        state = state * 6364136223846793005 + 1442695040888963407 & 0xFFFFFFFFFFFFFFFF
        drawn.append(state >> 33)
    noise = np.array(drawn, np.int64)
    bell = sum((noise >> shift) % 16 for shift in (0, 5, 10, 15, 20)) - 37
    matrix = bell.reshape(200, 300)
    return {
        "wide": (matrix * (noise.reshape(200, 300) % 7 + 1)).astype(np.int16),
        "narrow": (matrix // 8).astype(np.int8),
        "sparse": (matrix // 24).astype(np.int8),
        "bits": matrix > 10,
        "small": (matrix[:4, :60] // 8).astype(np.int8),
        "floats": (matrix.astype(np.float32) / 64),
        "halves": (matrix.astype(np.float16) / 64),
    }


def payloads() -> dict[str, str]:
    """What every coder writes, by its SHA-256, read back once."""
    found = {}
    for name, values in arrays().items():
        for coder in (*store.names(), "smallest", "fastest"):
            used, payload = store.encode(values, coder)
            if not np.array_equal(store.decode(used, payload, values.shape, values.dtype), values):
                raise StoreError(f"{name} does not come back from {used}")
            found[f"{name}/{coder}"] = f"{used} {hashlib.sha256(payload).hexdigest()}"
    return found


def tensors(path: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a file, decoded."""
    if "lossless" in path.name:
        back = path.with_suffix(f".{os.getpid()}.safetensors")
        artifact.unpack(path, back)
        digest = hashlib.sha256(back.read_bytes()).hexdigest()
        back.unlink()
        return {"safetensors": digest}
    state = plain(pared.load(path).root).state_dict()  # type: ignore[arg-type]
    return {
        name: hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + to_array(value).tobytes()).hexdigest()
        for name, value in state.items()
    }


def read(folder: Path) -> dict[str, Any]:
    return {"payloads": payloads(), "files": {path.name: tensors(path) for path in sorted(folder.glob("*.pared"))}}


def asked(python: str, mode: str, folder: Path) -> Any:
    command = [python, __file__, f"--{mode}", str(folder)]
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{python} --{mode} failed")
    return json.loads(done.stdout.strip().splitlines()[-1])


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "numba", "torch")}}


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def compared(others: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        for number in range(2):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            asked(sys.executable, "make", folder)
            runs.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())})
        size = sum(path.stat().st_size for path in folder.iterdir())
        here = asked(sys.executable, "read", folder)
        rows = []
        for python in others:
            there = asked(python, "read", folder)
            rows.append({
                "versions": there["versions"], "files_that_differ": differing(here["files"], there["files"]),
                "payloads_that_differ": differing(here["payloads"], there["payloads"]),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return {
        "versions": here["versions"], "files": len(runs[0]), "bytes": size,
        "tensors": sum(map(len, here["files"].values())), "payloads": len(here["payloads"]),
        "files_that_differ_in_a_second_run": differing(*runs), "others": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", nargs="*", default=[], help="interpreters with other versions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    modes: list[tuple[Path | None, Callable[[Path], Any]]] = [(arguments.make, make), (arguments.read, read)]
    for folder, work in modes:
        if folder is not None:
            print(json.dumps({**(work(folder) or {}), "versions": versions()}))
            return
    found = compared(arguments.others)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    differs = [found["files_that_differ_in_a_second_run"]]
    differs += [row[key] for row in found["others"] for key in ("files_that_differ", "payloads_that_differ")]
    if any(differs):
        sys.exit("something differs")


if __name__ == "__main__":
    main()
