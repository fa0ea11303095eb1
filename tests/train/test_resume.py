"""Interrupted trainings go on bit by bit, or say why they cannot."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pared.distill.logits import Logits
from pared.errors import InputError
from pared.prune.magnitude import Magnitude
from pared.quantize.codebook import Codebook
from pared.quantize.entropy_constrained import EntropyConstrained
from pared.site import install_, tensor_sites
from pared.statistics import Statistics
from pared.task import Task
from pared.technique import Chain
from pared.train import train
from pared.train.state import state_of


class Killed(Exception):
    """What ends a run before its time."""


def kill_after(epoch: int):
    def progress(report: dict) -> None:
        if report["epoch"] == epoch and report["score"] is not None:
            raise Killed

    return progress


class Fragile(nn.Module):
    """A network that fails in its nth training step."""

    def __init__(self, net: nn.Module, step: int | None) -> None:
        super().__init__()
        self.net = net
        self.left = step

    def forward(self, x):
        if self.training and self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Killed
        return self.net(x)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    own, other = state_of(a), state_of(b)
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


@pytest.fixture
def generated(digits):
    """A loader with its own generator."""
    x, y = digits
    data = torch.utils.data.TensorDataset(x[:400], y[:400])
    loader = torch.utils.data.DataLoader(data, 50, shuffle=True, generator=torch.Generator().manual_seed(5))
    return Task(train=loader, val=[(x[400:800], y[400:800])])


@pytest.mark.parametrize("epoch", [1, 3, 5])
def test_a_run_killed_after_any_epoch_ends_with_the_same_bits(net, task, twin, accuracy, tmp_path, epoch):
    whole, cut = twin(net), twin(net)
    settings = {"epochs": 5, "validate": accuracy, "weight_decay": 0.01, "seed": 3}
    reference = train(whole, task, **settings)
    with pytest.raises(Killed):
        train(cut, task, **settings, checkpoint=tmp_path, progress=kill_after(epoch))
    torch.rand(7)
    resumed = twin(net)
    history = train(resumed, task, **settings, checkpoint=tmp_path)
    assert same_bits(whole, resumed)
    assert [r.loss for r in history.epochs] == [r.loss for r in reference.epochs]
    assert (history.best_epoch, history.best_score) == (reference.best_epoch, reference.best_score)


def test_a_run_killed_within_an_epoch_ends_with_the_same_bits(net, generated, twin, tmp_path):
    whole = Fragile(twin(net), None)
    train(whole, generated, epochs=4)
    next(iter(generated.train))  # leaves the loader's generator anywhere
    with pytest.raises(Killed):
        train(Fragile(twin(net), 21), generated, epochs=4, checkpoint=tmp_path)
    resumed = Fragile(twin(net), None)
    history = train(resumed, generated, epochs=4, checkpoint=tmp_path)
    assert len(history.epochs) == 4
    assert same_bits(whole, resumed)


@pytest.mark.parametrize("technique", [Chain(Magnitude(sparsity=0.8), Codebook(bits=3)), EntropyConstrained(bits=0.5)], ids=str)
@pytest.mark.parametrize("epoch", [1, 2, 5])
def test_relaxed_techniques_go_on_with_the_same_tables(net, task, twin, accuracy, tmp_path, epoch, technique):
    train(net, task, epochs=4, learning_rate=5e-3)

    def student() -> nn.Module:
        model = twin(net)
        for site in list(tensor_sites(model)):
            if site.tensor.ndim >= 2:
                install_(site, technique.relax(site, technique.decide(site, Statistics()), Statistics()))
        return model

    settings = {"epochs": 6, "losses": [Logits()], "teacher": twin(net), "validate": accuracy, "anneal_every": 5}
    whole = student()
    train(whole, task, **settings)
    with pytest.raises(Killed):
        train(student(), task, **settings, checkpoint=tmp_path, progress=kill_after(epoch))
    resumed = student()
    train(resumed, task, **settings, checkpoint=tmp_path)
    assert same_bits(whole, resumed)


def test_float16_tables_go_on_with_the_same_bits(net, task, twin, accuracy, tmp_path):
    train(net, task, epochs=4, learning_rate=5e-3)
    for site in list(tensor_sites(net)):
        if site.tensor.ndim >= 2:
            install_(site, Codebook(bits=2).solve(site, Statistics())[1])
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.endswith("table"))
    whole, cut, resumed = twin(net), twin(net), twin(net)
    train(whole, task, epochs=4, validate=accuracy)
    with pytest.raises(Killed):
        train(cut, task, epochs=4, validate=accuracy, checkpoint=tmp_path, progress=kill_after(2))
    train(resumed, task, epochs=4, validate=accuracy, checkpoint=tmp_path)
    assert same_bits(whole, resumed)


def test_a_finished_training_returns_at_once(net, task, twin, accuracy, tmp_path):
    first, again = twin(net), twin(net)
    one = train(first, task, epochs=3, validate=accuracy, checkpoint=tmp_path)

    def never(model: nn.Module) -> float:
        raise AssertionError("a finished training must not validate")

    two = train(again, task, epochs=3, validate=never, checkpoint=tmp_path)
    assert same_bits(first, again) and one == two


def test_a_finished_training_without_validation_keeps_the_average(net, task, twin, tmp_path):
    first, again, plain = twin(net), twin(net), twin(net)
    train(first, task, epochs=2, checkpoint=tmp_path)
    train(again, task, epochs=2, checkpoint=tmp_path)
    train(plain, task, epochs=2)
    assert same_bits(first, again) and same_bits(first, plain)


def test_every_flipped_byte_is_noticed(net, task, twin, tmp_path):
    train(twin(net), task, epochs=1, checkpoint=tmp_path)
    file = tmp_path / "training.safetensors"
    whole = file.read_bytes()
    for place in range(9, len(whole), len(whole) // 60):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match="damaged|version|another training"):
            train(twin(net), task, epochs=1, checkpoint=tmp_path)
    for length in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="damaged"):
            train(twin(net), task, epochs=1, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"epochs": 3}, "epochs"), ({"seed": 1}, "seed"), ({"step": 2}, "step"), ({"weight_decay": 0.1}, "weight decay"),
     ({"losses": [Logits(temperature=2)]}, "losses"), ({"clip": None}, "clip")],
)
def test_a_checkpoint_of_another_training_is_refused(net, task, twin, tmp_path, change, named):
    settings = {"epochs": 2, "losses": [Logits()], "teacher": twin(net)}
    train(twin(net), task, **settings, checkpoint=tmp_path)
    with pytest.raises(InputError, match=f"another training: {named} is"):
        train(twin(net), task, **{**settings, **change}, checkpoint=tmp_path)


def test_a_checkpoint_of_other_starting_weights_is_refused(net, task, twin, tmp_path):
    train(twin(net), task, epochs=1, checkpoint=tmp_path)
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(InputError, match="starting weights"):
        train(net, task, epochs=1, checkpoint=tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(net, task, twin, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="could not be written"):
        train(net, task, epochs=1, checkpoint=tmp_path / "file" / "folder")


def test_a_failed_write_leaves_the_old_checkpoint_whole(net, task, twin, accuracy, tmp_path, monkeypatch):
    from pared.train import checkpoint as module

    with pytest.raises(Killed):
        train(twin(net), task, epochs=3, validate=accuracy, checkpoint=tmp_path, progress=kill_after(1))
    before = (tmp_path / "training.safetensors").read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        train(twin(net), task, epochs=3, validate=accuracy, checkpoint=tmp_path)
    assert (tmp_path / "training.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["training.safetensors"]


def test_the_checkpoint_is_safetensors_with_json(net, task, tmp_path):
    train(net, task, epochs=1, checkpoint=tmp_path)
    with safe_open(tmp_path / "training.safetensors", "pt") as file:
        state = json.loads(file.metadata()["state"])
        assert state["facts"]["history"]["ended"] == "all epochs"
        assert "best/0.weight" in file.keys()  # noqa: SIM118


def test_a_safetensors_file_of_something_else_is_refused(net, task, tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "training.safetensors")
    with pytest.raises(InputError, match="must be a whole checkpoint"):
        train(net, task, epochs=1, checkpoint=tmp_path)
