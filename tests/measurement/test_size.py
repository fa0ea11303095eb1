import pytest
import torch
from torch import nn

from pared.errors import InputError
from pared.measurement import file_bytes, original_bytes, parameters
from pared.site import Site, install_, tensor_sites


class Halved(nn.Module):
    """Holds a tensor in half precision."""

    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value.half())

    def forward(self):
        return self.value.float()


def test_parameters_and_persistent_buffers_count_at_their_types():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).half()
    model.register_buffer("cache", torch.zeros(1000), persistent=False)
    # weight 12, bias 3, norm weight, bias, mean, variance 3 each in two bytes; the batch count in eight
    assert original_bytes(model) == 2 * (12 + 3 + 4 * 3) + 8


def test_tied_weights_count_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    assert original_bytes(model) == 64
    assert parameters(model) == 16


def test_views_of_one_storage_count_at_most_the_storage():
    model = nn.Module()
    shared = torch.zeros(10)
    model.a = nn.Parameter(shared[:6])
    model.b = nn.Parameter(shared[4:])
    assert original_bytes(model) == 40
    model.b = nn.Parameter(shared[8:])
    assert original_bytes(model) == 32


def test_coded_tensors_count_as_decoded_in_the_number_of_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    wanted = parameters(model)
    site = next(site for site in tensor_sites(model) if site.path == "0.weight")
    install_(site, Halved(site.tensor))
    assert parameters(model) == wanted == 16 + 4 + 4


def test_a_coded_buffer_is_no_parameter():
    model = nn.Module()
    model.register_buffer("table", torch.zeros(8))
    install_(Site(model, ("table",), "tensor", ("table",)), Halved(model.table))
    assert parameters(model) == 0


def test_file_bytes_are_those_of_the_file(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert file_bytes(tmp_path / "file") == 5
    with pytest.raises(InputError, match="must be a file"):
        file_bytes(tmp_path / "none")
