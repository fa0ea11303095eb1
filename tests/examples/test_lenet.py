import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import lenet
    import train_fashion_mnist

    yield lenet, train_fashion_mnist
    for name in ("lenet", "train_fashion_mnist"):
        del sys.modules[name]


@pytest.mark.parametrize(("name", "n_parameters"), [("lenet_300_100", 266_610), ("lenet_5", 431_080)])
def test_the_nets_have_the_size_of_the_papers_and_folding_batch_norm_changes_nothing(modules, name, n_parameters):
    lenet, training = modules
    plain = getattr(lenet, name)()
    assert sum(parameter.numel() for parameter in plain.parameters()) == n_parameters
    normed = training.with_batch_norm(plain)
    for _ in range(3):
        normed(torch.rand(32, 1, 28, 28))
    images = torch.rand(8, 1, 28, 28)
    expected = normed.eval()(images)
    folded = training.folded(normed)
    plain.load_state_dict(folded.state_dict())
    assert torch.allclose(plain(images), expected, atol=1e-6)


def test_weights_that_were_never_trained_name_the_command(modules, monkeypatch, tmp_path):
    lenet, _ = modules
    monkeypatch.setattr(lenet, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="train_fashion_mnist.py --net lenet_5"):
        lenet.lenet_5_trained()
