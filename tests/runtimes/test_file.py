"""What runtimes and measurements do with files and models that pared wrote."""

import numpy as np
import pytest
import torch
from torch import nn

import pared
from pared import quantize, runtimes
from pared.errors import InputError
from pared.measurement import bench, compute, measure, original_bytes
from pared.runtimes.example import example_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(144, 5)

    def forward(self, x):
        return {"logits": self.head(self.norm(self.conv(x)).relu().flatten(1))}


@pytest.fixture
def task():
    x, y = torch.randn(24, 1, 8, 8), torch.randint(0, 5, (24,))
    batches = [(x[:16], y[:16]), (x[16:], y[16:])]
    return pared.Task(batches, batches)


@pytest.fixture
def compressed(task):
    return pared.apply(Net().eval(), task, quantize.Integer(bits=8))


@pytest.fixture
def file(compressed, tmp_path):
    pared.save(compressed, tmp_path / "net.pared")
    return tmp_path / "net.pared"


def test_a_compressed_model_weighs_what_its_file_weighs(compressed, task, file):
    found = measure(compressed, task, runtimes=())
    assert found.file_bytes == file.stat().st_size
    assert measure(compressed, task, runtimes=(), file=file).file_bytes == found.file_bytes


def test_a_model_without_its_class_costs_the_same(compressed, task, file):
    loaded = pared.load(file)
    x = torch.randn(3, 1, 8, 8)
    assert compute(loaded, (x,)).macs_by_path == compute(compressed, (x,)).macs_by_path != {}
    first, second = (measure(model, task, runtimes=()) for model in (loaded, compressed))
    assert (first.macs, first.parameters) == (second.macs, second.parameters)
    assert first.metric.value == second.metric.value


def test_a_file_is_run_and_exported_without_an_example(file, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    found = pared.export(file, tmp_path / "net.onnx")
    assert found.dynamic and found.max_relative_error < 1e-4
    x = np.random.rand(5, 1, 8, 8).astype(np.float32)
    np.testing.assert_allclose(pared.run(tmp_path / "net.onnx", x), pared.run(file, x), atol=1e-4)


def test_an_example_is_made_from_the_program_with_as_many_examples_as_asked(compressed, file):
    (x,), kwargs = example_of(pared.load(file), n=7)
    assert x.shape == (7, 1, 8, 8) and kwargs == {}
    assert example_of(compressed, n=3)[0][0].shape == (3, 1, 8, 8)
    with pytest.raises(InputError, match="an example of the inputs is needed"):
        example_of(Net())


def test_files_are_timed_against_models(file, tmp_path):
    (tmp_path / "source.py").write_text("from torch import nn\n\ndef build():\n    return nn.Conv2d(1, 4, 3)\n")
    model = f"{tmp_path / 'source.py'}:build"
    rows = bench([model, str(file)], ("torch",), batch_size=2, seconds=0.1, input_shape=(1, 8, 8))
    assert [row["target"] for row in rows] == [model, str(file)]
    assert rows[0]["ratio"] == 1.0
    assert rows[1]["ratio"] == pytest.approx(rows[0]["median"] / rows[1]["median"])
    assert rows[0]["bytes"] == original_bytes(nn.Conv2d(1, 4, 3)) and rows[1]["bytes"] == file.stat().st_size
    with pytest.raises(InputError, match="give their shape"):
        bench([model], seconds=0.1)
    with pytest.raises(InputError, match="twice"):
        bench([model, model], seconds=0.1, input_shape=(1, 8, 8))


def test_an_unknown_runtime_is_named_before_anything_runs(compressed):
    with pytest.raises(InputError, match="must be one of torch, compile, onnxruntime, openvino"):
        runtimes.session(compressed, "tensor", example_of(compressed))
