"""A checkpoint comes back bit for bit, whatever its types, and takes fewer bytes."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import pared
from pared import artifact, quantize
from pared.cli import app
from pared.errors import ArtifactError, InputError


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype and x.shape == b[name].shape and torch.equal(x.view(torch.uint8), b[name].view(torch.uint8))
        for name, x in a.items()
        if x.ndim
    )


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    wide = torch.randn(64, 96) * 0.02
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    return {
        "encoder.0.weight": wide,
        "encoder.0.half": wide.half(),
        "encoder.0.brain": wide.bfloat16(),
        "encoder.1.codes": torch.randint(-8, 8, (50, 60), dtype=torch.int8),
        "special": special,
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "mask": torch.rand(30, 30) > 0.5,
    }


def test_every_bit_and_the_metadata_come_back(tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    artifact.pack(tmp_path / "a.safetensors", tmp_path / "a.pared")
    artifact.unpack(tmp_path / "a.pared", tmp_path / "b.safetensors")
    assert same(tensors, load_file(tmp_path / "b.safetensors"))
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_weights_in_bfloat16_take_less_than_three_quarters(tmp_path):
    torch.manual_seed(0)
    save_file({"weight": (torch.randn(512, 512) * 0.02).bfloat16()}, tmp_path / "a.safetensors")
    artifact.pack(tmp_path / "a.safetensors", tmp_path / "a.pared")
    assert (tmp_path / "a.pared").stat().st_size < 0.72 * (tmp_path / "a.safetensors").stat().st_size


def test_the_command_line_packs_and_unpacks(tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    run = CliRunner().invoke(app, ["compress", str(tmp_path / "a.safetensors"), "--lossless", "--out", str(tmp_path / "a.pared")])
    assert run.exit_code == 0 and "every bit is kept" in run.output
    run = CliRunner().invoke(app, ["export", str(tmp_path / "a.pared"), "--to", "safetensors"])
    assert run.exit_code == 0
    assert same(tensors, load_file(tmp_path / "a.safetensors"))


def test_the_weights_of_a_compressed_model_are_written_as_they_decode(tmp_path):
    model = pared.apply(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4)), None, quantize.Integer(bits=4))
    pared.save(model, tmp_path / "a.pared", example=torch.zeros(1, 32))
    artifact.unpack(tmp_path / "a.pared", tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["0.weight"], model[0].weight) and torch.equal(found["1.bias"], model[1].bias)


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no such thing")
    with pytest.raises(InputError, match="must be a safetensors file"):
        artifact.pack(tmp_path / "a.safetensors", tmp_path / "a.pared")
    (tmp_path / "a.pared").write_bytes(b"no such thing")
    with pytest.raises(ArtifactError):
        artifact.unpack(tmp_path / "a.pared", tmp_path / "b.safetensors")
