"""A model run as it is gives the observer what its program gives, where torch's operators take the tensors themselves."""

import pytest
import torch
from torch import nn

from pared.budget.calibrate import gather
from pared.errors import TraceError
from pared.task import Task


class Branching(nn.Module):
    """The net behind a branch on the values of a tensor, which no program can hold."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.other = nn.Linear(3, 3)

    def forward(self, x):
        if not bool(torch.isfinite(x).all()):
            return self.other(x)
        return self.net(x)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(8, 12, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(24, 5)

    def forward(self, x):
        return self.out(self.rnn(x)[0].mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens) @ torch.eye(16))).mean(1)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 6, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


NETS = {
    "convolutional": (convolutional, lambda: torch.randn(48, 1, 8, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(48, 6, 8)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(48, 6, 8)),
    "tied": (Tied, lambda: torch.randint(30, (48, 7))),
}


@pytest.mark.parametrize("name", list(NETS))
def test_the_curvature_is_that_of_the_program(name):
    torch.manual_seed(0)
    net, x = NETS[name][0]().eval(), NETS[name][1]()
    batches = [(x[i : i + 16], None) for i in range(0, 48, 16)]
    task = Task(batches, batches, calibration=batches)
    branching = Branching(net).eval()
    traced, run = gather(net, task), gather(branching, task)
    paths = set(traced)
    assert paths
    for path in paths:
        expected, found = traced.curvature(path), run.curvature(f"net.{path}")
        assert [type(term) for term in found.terms] == [type(term) for term in expected.terms]
        delta = torch.randn(expected.shape)
        assert found.damage(delta) == pytest.approx(expected.damage(delta), rel=1e-6)
    assert {f"net.{path}": n for path, n in traced.positions.items()} == run.positions
    parts = gather(branching, task, held=1)  # some matrices at a time
    for path in run:
        delta = torch.randn(run.curvature(path).shape)
        assert parts.curvature(path).damage(delta) == pytest.approx(run.curvature(path).damage(delta), rel=1e-4)


def test_some_matrices_at_a_time_are_those_at_once_where_code_works_in_place_and_takes_other_branches_for_parts():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.late, self.out = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.act(self.first(x))
            return self.out(self.act(self.late(x)) if len(x) < 16 and bool(x.sum() > -1e9) else x)

    torch.manual_seed(0)
    model, task = Whole().eval(), task_of(torch.randn(64, 8))
    at_once, in_parts = gather(model, task), gather(model, task, held=1)
    for path in at_once:
        terms = at_once.curvature(path).terms, in_parts.curvature(path).terms
        assert len(terms[0]) == len(terms[1])
        delta = torch.randn(at_once.curvature(path).shape)
        assert in_parts.curvature(path).damage(delta) == pytest.approx(at_once.curvature(path).damage(delta), rel=1e-4)


def test_branches_that_no_example_takes_are_named_and_still_matter():
    torch.manual_seed(0)
    x, said = torch.randn(32, 1, 8, 8), []
    batches = [(x, None)]
    found = gather(Branching(convolutional()).eval(), Task(batches, batches, calibration=batches), progress=said.append)
    assert any("no calibration example feels other.weight, other.bias" in event.get("say", "") for event in said)
    assert found.curvature("other.weight").damage(torch.ones(3, 3)) > 0


def test_weights_that_are_rearranged_before_use_have_squared_gradients():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 5))

        def forward(self, x):
            return x @ self.weight.flip(0) if bool((x == x).all()) else x[:, :5]

    class Straight(Turned):
        def forward(self, x):
            return x @ self.weight.flip(0)

    model, x = Turned().eval(), torch.randn(64, 8)
    straight = Straight().eval()
    straight.load_state_dict(model.state_dict())
    found, traced = (gather(each, task_of(x)).curvature("weight") for each in (model, straight))
    delta = torch.randn(8, 5)
    assert found.damage(delta) == pytest.approx(traced.damage(delta), rel=1e-6)


def task_of(x, size=16):
    batches = [(x[i : i + size], None) for i in range(0, len(x), size)]
    return Task(batches, batches, calibration=batches)


def test_a_second_use_that_only_some_batches_see_does_not_change_what_the_first_is_worth():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x):
            h = torch.relu(self.inner(x)).mean(1)
            return self.out(h) + (0 * self.inner.weight.sum() if bool(x[:, 0, 0].max() > 5) else 0)

    torch.manual_seed(0)
    model, x = Sometimes().eval(), torch.randn(64, 6, 8)
    never = gather(model, task_of(x)).curvature("inner.weight").damage(torch.ones(6, 8))
    x[50, 0, 0] = 6
    late = gather(model, task_of(x)).curvature("inner.weight").damage(torch.ones(6, 8))
    assert late == pytest.approx(never, rel=0.3)


def test_code_that_wants_whole_batches_gets_them():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm, self.out = nn.Linear(8, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 4)

        def forward(self, x):
            return self.out(self.norm(self.inner(x))) if bool(torch.isfinite(x).all()) else x[:, :4]

    found = gather(Whole().eval(), task_of(torch.randn(64, 8)))
    assert all(found.curvature(path) is not None for path in ("inner.weight", "norm.weight", "out.weight"))


@pytest.mark.parametrize("why", ["inference", "numpy", "state"])
def test_what_gradients_do_not_pass_is_one_clear_line(why):
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out, self.seen = nn.Linear(8, 6), nn.Linear(6, 4), torch.zeros(6)

        def forward(self, x):
            if why == "inference":
                with torch.inference_mode():
                    return self.out(self.inner(x)) if bool(torch.isfinite(x).all()) else x
            h = self.inner(x)
            if why == "numpy":
                return self.out(torch.from_numpy(h.numpy()))
            self.seen = 0.9 * self.seen + 0.1 * h.mean(0)
            return self.out(h - self.seen) if bool(torch.isfinite(x).all()) else x

    with pytest.raises(TraceError, match="no gradients reach|cannot be calibrated as it runs"):
        gather(Opaque().eval(), task_of(torch.randn(64, 8)))


def test_tiny_parameters_are_no_obstacle():
    model = Branching(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))).eval()
    with torch.no_grad():
        model.other.weight.fill_(1e-25)
    found = gather(model, task_of(torch.randn(64, 8)))
    assert found.curvature("other.weight") is not None


def test_the_model_is_left_as_it_was():
    model, x = Branching(convolutional()).eval(), torch.randn(16, 1, 8, 8)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    gather(model, Task([(x, None)], [(x, None)], calibration=[(x, None)]))
    assert all(torch.equal(tensor, before[path]) for path, tensor in model.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) and parameter.requires_grad for parameter in model.parameters())
