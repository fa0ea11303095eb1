import torch
import torch.nn.functional as F
from torch import nn

import pared
from pared import structure
from pared.budget.observe import observe
from pared.graph.flow import flow_of
from pared.site import network_site
from pared.structure.equalise import coupled


class Residual(nn.Module):
    """A stem, two residual blocks without activation after the sum, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 1)
        self.first, self.second = (nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1)) for _ in range(2))
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x)


def task_of(x):
    y = torch.zeros(len(x), dtype=torch.int64)
    loss, metric = (lambda outputs, batch: outputs.square().mean()), (lambda outputs, batch: outputs.mean((1, 2, 3)))
    return pared.Task([(x, y)], [(x, y)], loss=loss, metric=metric)


def groups(model, x):
    return [(set(group.makers), set(group.readers)) for group, _ in coupled(model, flow_of(model, (x,)))]


def uneven(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                n = module.out_channels
                module.weight *= torch.logspace(-2, 2, n)[torch.randperm(n)][:, None, None, None]
    return model.eval()


def test_a_residual_stream_is_scaled_as_a_whole():
    found = groups(Residual().eval(), torch.randn(2, 2, 4, 4))
    assert ({"stem", "first.2", "second.2"}, {"first.0", "second.0", "head"}) in found
    assert ({"first.0"}, {"first.2"}) in found and len(found) == 3


def test_channels_reach_equally_far_at_full_strength():
    torch.manual_seed(0)
    model, x = uneven(nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))), torch.randn(8, 2, 4, 4)
    expected = model(x)
    even = pared.apply(model, task_of(x), structure.Equalise(strength=1.0))
    torch.testing.assert_close(even(x), expected, rtol=1e-3, atol=1e-4)
    reach = even[:2](x).amax((0, 2, 3))
    before = model[:2](x).amax((0, 2, 3))
    assert before.max() / before.min() > 100
    inside = (before / before.max()) > 1 / 64  # no channel is scaled by more than that
    assert reach[inside].max() / reach[inside].min() < 1.01


def test_a_clipped_activation_is_left_alone():
    x = torch.randn(2, 2, 4, 4)
    assert groups(nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU6(), nn.Conv2d(6, 3, 1)).eval(), x) == []


def test_grouped_convolutions_read_their_own_channels():
    torch.manual_seed(0)
    model = uneven(nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 2, 1)))
    x = torch.randn(4, 2, 5, 5)
    expected = model(x)
    torch.testing.assert_close(pared.apply(model, task_of(x), structure.Equalise())(x), expected, rtol=1e-3, atol=1e-3)


def test_layer_norm_is_scaled_with_the_layers_that_read_it():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q, self.k = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            y = self.norm(x)
            return F.softmax(self.q(y) @ self.k(y).mT, -1)

    found = groups(Attend().eval(), torch.randn(2, 5, 8))
    assert found == [({"norm"}, {"q", "k"})]


def test_tied_and_reused_layers_are_left_alone():
    layer = nn.Conv2d(4, 4, 1)
    assert groups(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), torch.randn(2, 4, 3, 3)) == []


def test_decide_needs_no_more_than_what_is_observed():
    model, x = Residual().eval(), torch.randn(2, 2, 4, 4)
    statistics = observe(model, task_of(x), [structure.Equalise()])
    assert len(structure.Equalise().decide(network_site(model), statistics).groups) == 3
