import logging
import sys

import numpy as np
import pytest
import torch
from torch import nn

from pared import runtimes
from pared.errors import ExportError, InputError, MissingExtra
from pared.site import install_, tensor_sites

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Half(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value.half())

    def forward(self):
        return self.value.float()


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()


def test_an_exported_model_agrees_for_every_batch_size(tmp_path):
    model, x = network(), torch.randn(1, 3, 6, 6)
    found = runtimes.export(model, tmp_path / "m.onnx", example=x)
    assert found.dynamic and found.max_abs_error < 1e-5
    assert found.file_bytes == (tmp_path / "m.onnx").stat().st_size
    many = torch.randn(7, 3, 6, 6)
    np.testing.assert_allclose(runtimes.run(tmp_path / "m.onnx", many.numpy()), model(many).detach(), atol=1e-5)


def test_coded_weights_are_exported_decoded(tmp_path):
    model, x = network(), torch.randn(2, 3, 6, 6)
    for site in [*tensor_sites(model)]:
        install_(site, Half(site.tensor))
    wanted = model(x).detach()
    runtimes.export(model, tmp_path / "m.onnx", example=x)
    np.testing.assert_allclose(runtimes.run(tmp_path / "m.onnx", x.numpy()), wanted, atol=1e-5)


def test_keyword_inputs_and_several_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)

        def forward(self, ids, mask, scale=None):
            hidden = self.embed(ids) * mask[..., None]
            return {"hidden": hidden, "mean": hidden.mean(1)}

    ids, mask = torch.randint(0, 10, (2, 5)), torch.ones(2, 5)
    mask[:, 3:] = 0
    model = Two().eval()
    found = runtimes.export(model, tmp_path / "m.onnx", example={"mask": mask, "ids": ids})
    assert found.dynamic and found.max_abs_error < 1e-6


def test_a_parameter_that_is_an_output_keeps_its_type(tmp_path):
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.offset = nn.Linear(4, 3), nn.Parameter(torch.randn(3))

        def forward(self, x):
            return self.layer(x), self.offset

    model, x = Given().eval(), torch.randn(2, 4)
    assert runtimes.export(model, tmp_path / "m.onnx", example=x).max_abs_error < 1e-5
    np.testing.assert_allclose(runtimes.run(tmp_path / "m.onnx", x.numpy())[1], model.offset.detach())


def test_what_operators_do_anyway_is_not_said(tmp_path):
    import onnx

    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2, dilation=2, padding=2, groups=2), nn.ConvTranspose2d(4, 2, 3)
    runtimes.export(nn.Sequential(*layers).eval(), tmp_path / "m.onnx", example=torch.randn(1, 3, 12, 12))
    written = onnx.load(tmp_path / "m.onnx")
    said = [{attribute.name for attribute in node.attribute} for node in written.graph.node]
    assert not {"group", "strides", "dilations", "auto_pad"} & said[0]
    assert {"group", "strides", "dilations"} <= said[1]
    assert not written.graph.metadata_props and not written.graph.value_info


def test_recurrent_and_attention_layers_are_exported(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.encoder(self.lstm(x)[0])[:, -1]

    found = runtimes.export(Mixed().eval(), tmp_path / "m.onnx", example=torch.randn(2, 5, 6))
    assert found.max_relative_error < 1e-4


def test_the_exporter_says_nothing(tmp_path, capfd, recwarn, caplog):
    runtimes.export(network(), tmp_path / "m.onnx", example=torch.randn(2, 3, 6, 6))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not recwarn.list and not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_only_the_file_is_left(tmp_path):
    runtimes.export(network(), tmp_path / "m.onnx", example=torch.randn(2, 3, 6, 6))
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_model_that_cannot_be_exported_keeps_the_old_file(tmp_path):
    class Opaque(nn.Module):
        def forward(self, x):
            return torch.from_numpy(np.sort(x.numpy()))

    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(ExportError, match="cannot be written as ONNX"):
        runtimes.export(Opaque(), tmp_path / "m.onnx", example=torch.randn(2, 3))
    assert (tmp_path / "m.onnx").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_outputs_that_differ_are_refused(tmp_path, monkeypatch):
    from pared.runtimes import onnxruntime

    real = onnxruntime.outputs_of
    monkeypatch.setattr(onnxruntime, "outputs_of", lambda *call: [1.01 * out for out in real(*call)])
    with pytest.raises(ExportError, match="within 0.001"):
        runtimes.export(network(), tmp_path / "m.onnx", example=torch.randn(2, 3, 6, 6))
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'pared\[onnx\]'"):
        runtimes.export(network(), tmp_path / "m.onnx", example=torch.randn(2, 3, 6, 6))


def test_bad_arguments(tmp_path):
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(InputError, match="onnx"):
        runtimes.export(network(), tmp_path / "m", to="onyx", example=x)
    with pytest.raises(InputError, match="folder"):
        runtimes.export(network(), tmp_path / "none" / "m.onnx", example=x)
    with pytest.raises(InputError, match="example"):
        runtimes.export(network(), tmp_path / "m.onnx")
    with pytest.raises(InputError, match="no such file"):
        runtimes.run(tmp_path / "m.onnx", x.numpy())
    with pytest.raises(InputError, match=r"\.pared, \.onnx or \.xml"):
        runtimes.run(tmp_path / "m.pt", x.numpy())


def test_wrong_inputs_of_a_file_are_named(tmp_path):
    runtimes.export(network(), tmp_path / "m.onnx", example=torch.randn(2, 3, 6, 6))
    with pytest.raises(InputError, match="takes 1 inputs"):
        runtimes.run(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="does not run on these inputs"):
        runtimes.run(tmp_path / "m.onnx", np.zeros((2, 3), np.float32))


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot open m.onnx"):
        runtimes.run(tmp_path / "m.onnx", np.zeros(3))


@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention_over_windows_is_exported(masked, tmp_path):
    class Windows(nn.Module):
        def forward(self, x):
            q, k, v = x.chunk(3, -1)
            mask = None if masked is None else torch.ones(5, 5).tril() > 0
            mask = mask if masked != "float" else torch.where(mask, 0.0, -2.0)
            return nn.functional.scaled_dot_product_attention(q, k, v, mask)

    x = torch.randn(2, 3, 4, 5, 12)
    found = runtimes.export(Windows(), tmp_path / "m.onnx", example=x)
    assert found.dynamic and found.max_abs_error < 1e-5
