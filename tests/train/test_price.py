"""One price for all bits, steered to the size asked for."""

import math

import pytest
import torch
from torch import Tensor, nn

from pared.quantize.entropy_constrained import EntropyConstrained, Priced
from pared.site import install_, tensor_sites
from pared.statistics import Statistics
from pared.train import train
from pared.train.price import Price


class Squared(nn.Module):
    """Bits that fall with the weight's size; the loss pulls it to 1."""

    def __init__(self, aim: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))
        self.aim_bits = aim

    def coded_bits(self) -> Tensor:
        return 100 * self.weight.square().sum()


def relaxed(model: nn.Module, bits: float) -> nn.Module:
    technique = EntropyConstrained(bits=bits)
    for site in list(tensor_sites(model)):
        if site.tensor.ndim >= 2:
            install_(site, technique.relax(site, technique.decide(site, Statistics()), Statistics()))
    return model


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_bits_come_to_their_aim_whatever_the_scale_of_the_loss(scale: float) -> None:
    modules = nn.ModuleList([Squared(300.0), Squared(100.0)])
    optimiser = torch.optim.Adam(modules.parameters(), lr=0.02)
    price = Price(modules, 600)
    for _ in range(600):
        loss = scale * sum((module.weight - 1).square().sum() for module in modules)
        total = loss + price.of_bits(float(loss.detach()))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    bits = [module.coded_bits().item() for module in modules]
    assert sum(bits) == pytest.approx(400, rel=0.05)
    assert bits[0] == pytest.approx(bits[1], rel=0.05), "equal modules must get equal bits at one price"


def test_a_model_without_priced_stand_ins_has_no_price(net) -> None:
    assert not Price(net, 10)


def test_training_ends_at_the_size_asked_for(net, task, accuracy) -> None:
    train(net, task, epochs=6, learning_rate=5e-3)
    before = accuracy(net)
    relaxed(net, 1.5)
    train(net, task, epochs=60, learning_rate=5e-3, ema=None)
    priced = [module for module in net.modules() if isinstance(module, Priced)]
    bits, aim = sum(m.coded_bits().item() for m in priced), sum(m.aim_bits for m in priced)
    assert math.log(bits / aim) == pytest.approx(0, abs=0.2)
    assert accuracy(net) > before - 0.1
