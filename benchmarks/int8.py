"""Post-training int8 against onnxruntime.quantization and nncf: quality on the same calibration data, file size, latency.

    python benchmarks/int8.py                     # quality; small_resnet wants examples/small_resnet.py run before
    python benchmarks/int8.py --latency           # on a machine that does nothing else

Peers are measured where they are installed (nncf with openvino), each with the settings that its own documentation gives
for convolutional nets: per-channel weights, unsigned activations, the extremes of the calibration data. Quality is what
runs: the outputs of each exported file in its runtime, against the original in floating point. Calibration data are part
of the training data, choices were made on the validation split (`--split val`), the table is about the test split.
Figures go to benchmarks/results/int8.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import pared
from pared import sources
from pared.errors import InputError
from pared.measurement import compare
from pared.recipe import load as recipe
from pared.task import in_order

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "int8.json"
NETS = {
    "efficientnet_lite0": ("examples/efficientnet_lite0.py:efficientnet_lite0", "photographs", 48),
    "small_resnet": ("examples/small_resnet.py:small_resnet_trained", "fashion-mnist", 512),
    "mobilenetv3": ("examples/timm_on_fashion_mnist.py:mobilenetv3_trained", "fashion-mnist", 512),
    "vit_tiny": ("examples/timm_on_fashion_mnist.py:vit_tiny_trained", "fashion-mnist", 512),
    "resnet18": ("timm:resnet18", None, 32),
}
"""Model, data, and how many examples calibrate. resnet18 has random weights: it is timed only."""
SURE = 0.5

Batches = list[Tensor]


class Subject:
    """A net, its data, and the files that everybody made of it."""

    def __init__(self, name: str, folder: Path) -> None:
        spec, data, n = NETS[name]
        torch.manual_seed(0)
        self.name, self.folder = name, folder
        self.model, facts = sources.model(spec if spec.startswith("timm:") else str(ROOT / spec))
        if data is None:
            self.splits: dict[str, Batches] = {"train": list(torch.randn(n, 3, 224, 224).split(8))}
            self.labels: dict[str, Tensor | None] = {}
        else:
            task = sources.data(data, model=self.model, facts=None if facts.image is None else facts).task
            parts = {"train": task.train, "val": task.val, "test": task.test}
            read = {part: list(in_order(loader)) for part, loader in parts.items()}
            self.splits = {part: [inputs(batch) for batch in batches] for part, batches in read.items()}
            self.labels = {part: labels(batches) for part, batches in read.items()}
        kept = torch.cat(self.splits["train"])
        chosen = torch.linspace(0, len(kept) - 1, min(n, len(kept))).long()
        self.calibration = list(kept[chosen].split(8))
        self.example = self.calibration[0][:1]

    def ours(self) -> Path:
        with torch.no_grad():
            batches = [(x, self.model(x).argmax(1)) for x in self.calibration]
        task = pared.Task(train=batches, val=batches, calibration=batches)
        techniques = [step.candidates[0] for step in recipe("int8").steps]
        for technique in [each for each in techniques if each.exact]:
            try:
                pared.apply(self.model, task, technique)
            except InputError:  # there is nothing to prepare
                techniques.remove(technique)
        model = pared.apply(self.model, task, techniques)
        pared.save(model, self.folder / "ours.pared")
        pared.export(model, self.folder / "ours.onnx", example=self.example)
        return self.folder / "ours.onnx"

    def original(self) -> Path:
        pared.export(self.model, self.folder / "fp32.onnx", example=self.example)
        return self.folder / "fp32.onnx"

    def onnxruntimes(self) -> Path:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        name, batches = _input_name(self.folder / "fp32.onnx"), self.calibration

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.rest: Iterator[Tensor] = iter(batches)

            def get_next(self) -> dict[str, np.ndarray] | None:
                batch = next(self.rest, None)
                return None if batch is None else {name: batch.numpy()}

        prepared, target = self.folder / "prepared.onnx", self.folder / "onnxruntime.onnx"
        quant_pre_process(str(self.folder / "fp32.onnx"), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return target

    def nncfs(self) -> Path:
        import nncf
        import openvino

        model = openvino.convert_model(self.folder / "fp32.onnx")
        images = [batch[i : i + 1].numpy() for batch in self.calibration for i in range(len(batch))]
        quantized = nncf.quantize(model, nncf.Dataset(images), subset_size=len(images))
        openvino.save_model(quantized, self.folder / "nncf.xml", compress_to_fp16=False)
        return self.folder / "nncf.xml"


def inputs(batch: Any) -> Tensor:
    return batch[0] if isinstance(batch, tuple | list) else batch


def labels(batches: list[Any]) -> Tensor | None:
    found = [batch[1] for batch in batches if isinstance(batch, tuple | list) and isinstance(batch[1], Tensor)]
    return torch.cat(found) if len(found) == len(batches) else None


def _input_name(path: Path) -> str:
    import onnx

    return onnx.load(path).graph.input[0].name


def outputs(path: Path, batches: Batches, threads: int) -> Tensor:
    call = opened(path, threads)
    return torch.cat([torch.from_numpy(np.array(call(batch.numpy()))) for batch in batches])


def opened(path: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    if path.suffix == ".xml" or path.name.startswith("openvino-"):
        import openvino

        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        file = path if path.suffix == ".xml" else path.parent / path.name.removeprefix("openvino-")
        request = openvino.Core().compile_model(openvino.convert_model(file) if file.suffix == ".onnx" else file, "CPU", options)
        return lambda x: request(x)[0]
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def quality(subject: Subject, split: str, threads: int) -> dict[str, Any]:
    batches, truth = subject.splits[split], subject.labels[split]
    files = made(subject)
    reference = outputs(files["fp32"], batches, threads)
    sure = reference.softmax(1).amax(1) > SURE
    found: dict[str, Any] = {"split": split, "n": len(reference), "n_calibration": sum(map(len, subject.calibration))}
    full = files["fp32"].stat().st_size
    for who, path in files.items():
        logits = outputs(path, batches, threads)
        same = (logits.argmax(1) == reference.argmax(1)).float()
        divergence = F.kl_div(logits.log_softmax(1), reference.log_softmax(1), log_target=True, reduction="batchmean")
        size = path.stat().st_size + (path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0)
        found[who] = {
            "agreement": float(same.mean()),
            "agreement_where_sure": float(same[sure].mean()),
            "divergence": float(divergence),
            "file_bytes": size,
            "share_of_fp32": size / full,
        }
        if truth is not None:
            found[who]["accuracy"] = float((logits.argmax(1) == truth).float().mean())
        print(subject.name, split, who, {key: round(value, 4) for key, value in found[who].items()}, flush=True)
    found["ours"]["pared_bytes"] = (subject.folder / "ours.pared").stat().st_size
    return found


def made(subject: Subject) -> dict[str, Path]:
    files = {"fp32": subject.original(), "ours": subject.ours(), "onnxruntime": subject.onnxruntimes()}
    try:
        files["nncf"] = subject.nncfs()
    except ImportError:
        print("nncf is not installed: left out", flush=True)
    return files


def latency(subject: Subject, threads: int, seconds: float) -> dict[str, Any]:
    files = made(subject)
    timed = dict(files)
    if "nncf" in files:
        written = {who: path for who, path in files.items() if path.suffix == ".onnx"}
        timed |= {f"openvino {who}": path.with_name(f"openvino-{path.name}") for who, path in written.items()}
        timed["openvino nncf"] = timed.pop("nncf")
    found: dict[str, Any] = {"threads": threads}
    for n in (1, 16):
        batch = torch.cat(subject.calibration)[:n].numpy()
        calls = {who: partial(opened(path, threads), batch) for who, path in timed.items()}
        measured = compare(calls, n_runs=300, seconds=seconds * len(calls))
        found[f"batch_{n}"] = {who: one.to_json() for who, one in measured.items()}
        for who, one in found[f"batch_{n}"].items():
            base = "openvino fp32" if who.startswith("openvino ") else "fp32"
            one["faster_than_fp32"] = found[f"batch_{n}"][base]["median"] / one["median"]
            print(subject.name, n, who, f"{one['median']:.2f} ms, {one['faster_than_fp32']:.2f}x fp32", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", help=f"of {', '.join(NETS)}")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, for each file and batch size")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    timed, judged = ["resnet18", "efficientnet_lite0"], [net for net, (_, data, _) in NETS.items() if data is not None]
    chosen = arguments.nets or (timed if arguments.latency else judged)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"quality": {}, "latency": {}}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(name, Path(folder))
            if arguments.latency:
                results["latency"][name] = latency(subject, arguments.threads, arguments.seconds)
            else:
                figures = quality(subject, arguments.split, arguments.threads)
                if arguments.split == "test":
                    results["quality"][name] = figures
        results["environment"] = {"torch": torch.__version__, "machine": platform.machine()}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
