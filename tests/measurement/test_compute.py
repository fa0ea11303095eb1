import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pared.measurement import compute, macs
from pared.site import install_, tensor_sites


class Half(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value.half())

    def forward(self):
        return self.value.float()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Parameter(torch.randn(24, 8))

    def forward(self, x):
        q, k, v = F.linear(x, self.project).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


CASES = {
    "linear": (nn.Linear(8, 4), (3, 8), 3 * 8 * 4),
    "linear on a sequence": (nn.Linear(8, 4), (3, 5, 8), 3 * 5 * 8 * 4),
    "convolution": (nn.Conv2d(4, 8, 3, padding=1), (2, 4, 5, 5), 2 * 25 * 8 * 4 * 9),
    "grouped convolution": (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 5, 5), 2 * 9 * 8 * 2 * 9),
    "strided convolution over time": (nn.Conv1d(4, 8, 2, stride=2), (1, 4, 10), 5 * 8 * 4 * 2),
    "transposed convolution": (nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 5), 2 * 25 * 3 * 4 * 9),
    "bilinear": (nn.Bilinear(3, 4, 5), None, 2 * 3 * 4 * 5),
    "lstm": (nn.LSTM(10, 20, 2, bidirectional=True), (7, 3, 10), 7 * 3 * 2 * 80 * (30 + 60)),
    "gru": (nn.GRU(10, 20, batch_first=True), (3, 7, 10), 7 * 3 * 60 * 30),
    "rnn": (nn.RNN(10, 20), (7, 3, 10), 7 * 3 * 20 * 30),
    "attention": (Attention(), (2, 5, 8), 2 * (5 * 8 * 24 + 2 * 2 * 5 * 5 * 4)),
    "encoder layer": (
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 5, 16),
        2 * (5 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 2 * 5 * 5 * 16),
    ),
    "element-wise": (nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), (3, 8), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_macs_are_those_of_the_closed_form(name):
    model, shape, wanted = CASES[name]
    inputs = (torch.randn(2, 3), torch.randn(2, 4)) if shape is None else (torch.randn(shape),)
    assert macs(model.eval(), *inputs) == wanted


def test_macs_agree_with_half_of_torchs_flops_on_a_residual_network():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)

        def forward(self, x):
            return x + self.b(self.a(x))

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), Block(), Block(), *head)
    x = torch.randn(2, 3, 17, 17)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    assert 2 * macs(model, x) == counter.get_total_flops() > 0


def test_products_belong_to_the_module_that_owns_the_weight():
    model = nn.Sequential(nn.Linear(4, 4), Attention().requires_grad_(False))
    model[1].project.data = torch.randn(24, 8)
    model[0] = nn.Linear(4, 8)
    found = compute(model, (torch.randn(1, 5, 4),)).macs_by_path
    assert found == {"0": 5 * 4 * 8, "1": 5 * 8 * 24 + 2 * 2 * 5 * 5 * 4}


def test_a_module_called_twice_counts_twice():
    layer = nn.Linear(4, 4)
    assert compute(nn.Sequential(layer, layer), (torch.randn(1, 4),)).macs_by_path == {"0": 32}


def test_decoding_weights_is_no_part_of_the_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 5)).eval()
    x = torch.randn(1, 3, 5, 5)
    before = compute(model, (x,))
    for site in [*tensor_sites(model)]:
        install_(site, Half(site.tensor), cache=False)
    assert compute(model, (x,)) == before


def test_peak_of_a_chain_is_the_largest_pair_of_neighbours():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 100), nn.Linear(100, 2))
    assert compute(model, (torch.randn(1, 8),)).peak_activation_bytes == 4 * (16 + 100)


def test_what_is_freed_late_by_python_is_freed_after_its_last_use():
    class Hoarder(nn.Module):
        def forward(self, x):
            kept = [x]
            for _ in range(10):
                kept.append(kept[-1] + 1)
            return kept[-1].sum()

    assert compute(Hoarder(), (torch.randn(1, 100),)).peak_activation_bytes == 2 * 400


def test_a_skip_connection_stays_alive():
    class Skip(nn.Module):
        def forward(self, x):
            return (x * 2).sum() + (x + 1).sum()

    # x, x * 2 together; then x, the first sum and x + 1
    assert compute(Skip(), (torch.randn(1, 100),)).peak_activation_bytes == 2 * 400 + 4


def test_in_place_operators_need_no_memory():
    inplace = nn.Sequential(nn.Linear(4, 64), nn.ReLU(inplace=True))
    plain = nn.Sequential(nn.Linear(4, 64), nn.ReLU())
    x = torch.randn(1, 4)
    assert compute(inplace, (x,)).peak_activation_bytes == 4 * 68
    assert compute(plain, (x,)).peak_activation_bytes == 4 * 128


def test_the_model_keeps_its_modes_and_has_no_hooks_left():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].eval()
    compute(model, (torch.randn(1, 4),))
    assert [m.training for m in model.modules()] == [True, True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_fails_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        compute(model, (torch.randn(1, 5),))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_keyword_arguments_reach_the_model():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x, *, scale):
            return {"y": self.linear(x) * scale}

    assert macs(Named(), torch.randn(3, 4), scale=torch.ones(2)) == 24
