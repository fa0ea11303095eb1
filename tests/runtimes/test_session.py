import sys

import numpy as np
import pytest
import torch
from torch import nn

from pared import runtimes
from pared.errors import ExportError, InputError, MissingExtra


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


def test_torch_gives_the_model_s_outputs_without_gradients():
    model, x = network(), torch.randn(3, 6)
    found = runtimes.session(model.train(), "torch", ((x,), {}))()
    assert torch.equal(found, model(x)) and not found.requires_grad


def test_onnxruntime_gives_the_model_s_outputs():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, x = network(), torch.randn(3, 6)
    once = runtimes.session(model, "onnxruntime", ((x,), {}), threads=1)
    np.testing.assert_allclose(once()[0], model(x).detach(), atol=1e-5)


def test_openvino_gives_the_model_s_outputs():
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    model, x = network(), torch.randn(3, 6)
    once = runtimes.session(model, "openvino", ((x,), {}), threads=1)
    np.testing.assert_allclose(once()[0], model(x).detach(), atol=1e-4)


@pytest.mark.slow
def test_compile_gives_the_model_s_outputs():
    model, x = network(), torch.randn(3, 6)
    try:
        once = runtimes.session(model, "compile", ((x,), {}))
    except ExportError:
        pytest.skip("torch.compile does not work here")
    assert torch.allclose(once(), model(x), atol=1e-5)


def test_a_compiler_that_fails_is_one_line(monkeypatch):
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no C++ compiler\nlong explanation")

    monkeypatch.setattr(torch, "compile", lambda model, **options: Broken())
    with pytest.raises(ExportError, match="^torch.compile cannot compile the model: no C\\+\\+ compiler; leave"):
        runtimes.session(network(), "compile", ((torch.randn(3, 6),), {}))


def test_openvino_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pared\[openvino\]'"):
        runtimes.session(network(), "openvino", ((torch.randn(3, 6),), {}))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_task_that_calls_the_model_itself_cannot_be_exported(runtime):
    with pytest.raises(ExportError, match="forward"):
        runtimes.session(network(), runtime, ((), {}), call=lambda model: model(torch.zeros(1, 6)))


def test_an_unknown_runtime_is_named():
    with pytest.raises(InputError, match="did you mean openvino"):
        runtimes.session(network(), "openvin0", ((torch.randn(3, 6),), {}))


def test_nothing_heavy_is_imported_before_it_is_needed():
    import subprocess

    code = "import sys, pared.runtimes, pared.measurement, pared.report; print([m for m in sys.modules if m in " \
           "('onnx', 'onnxscript', 'onnxruntime', 'openvino', 'jinja2', 'rich', 'scipy', 'numba')])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
