"""Curvature against the exact Gauss-Newton form, and against what each operator computes."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.func import functional_call

from pared.budget.calibrate import gather, load, save
from pared.budget.damage import divergence, measure, references
from pared.budget.products import product_of
from pared.errors import InputError
from pared.graph import interpret, trace
from pared.site import tensor_sites
from pared.statistics import Diagonal, Kronecker, Layout
from pared.task import Task


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.randn(6, 16) * 0.5)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.cat([self.first.expand(len(x), -1, -1), x + self.place], 1)
        return self.out(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.rnn = kind(8, 16, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        return self.out(self.rnn(x)[0].mean(1))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + torch.tanh(self.mix(x.cumsum(1))))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=2, dilation=2), nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


def task_of(*inputs, size=None, **more):
    x = inputs[0] if len(inputs) == 1 else inputs
    n = len(inputs[0])
    size = size or n
    batches = [(x[i : i + size], None) for i in range(0, n, size)] if len(inputs) == 1 else [(x, None)]
    return Task(batches, batches, calibration=batches, **more)


def gauss_newton(model, x, path, delta):
    """1/2 E[(J d)^T F (J d)], F the Fisher matrix of the softmax: the second order of the divergence, by a small step."""
    state = {name: t.detach().double() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    x = x.double() if x.is_floating_point() else x
    small = 1e-3

    def logits(step):
        return functional_call(model, {**state, path: state[path] + step * delta}, (x,), tie_weights=True)

    with torch.no_grad():
        p, q = logits(0.0).log_softmax(-1), logits(small).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean()) / small**2


def random_deltas(model, seed=0, n=4):
    generator = torch.Generator().manual_seed(seed)
    for site in tensor_sites(model, buffers=False):
        for _ in range(n):
            yield site.path, torch.randn(site.tensor.shape, generator=generator) * 0.02


def compared(model, x, n=4):
    model.eval()
    statistics = gather(model, task_of(x))
    predicted, exact = [], []
    for path, delta in random_deltas(model, n=n):
        predicted.append(statistics.curvature(path).damage(delta))
        exact.append(gauss_newton(model, x, path, delta))
    return torch.tensor(predicted), torch.tensor(exact)


def test_a_linear_layer_agrees_with_the_exact_form():
    model, x = nn.Linear(12, 5), torch.randn(2048, 12)
    statistics = gather(model, task_of(x), n_examples=2048)
    for seed in range(5):
        delta = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)) * 0.05
        exact = gauss_newton(model, x, "weight", delta)
        assert statistics.curvature("weight").damage(delta) == pytest.approx(exact, rel=0.1)


def test_a_convolutional_net_agrees_within_a_factor():
    predicted, exact = compared(convolutional(), torch.randn(256, 3, 12, 12))
    ratio = (predicted / exact).median()
    assert 0.7 < ratio < 1.4
    assert spearmanr(predicted, exact)[0] > 0.9


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_nets_agree_with_the_exact_form(kind):
    predicted, exact = compared(Recurrent(kind), 2 * torch.randn(256, 12, 8))
    assert 0.6 < (predicted / exact).median() < 1.6
    assert spearmanr(predicted, exact)[0] > 0.85


def test_attention_with_fused_projections_and_bare_parameters_agrees():
    predicted, exact = compared(Attention(), torch.randn(256, 6, 16), n=6)
    assert 0.6 < (predicted / exact).median() < 1.6
    assert spearmanr(predicted, exact)[0] > 0.85


def test_tied_embeddings_have_one_term_per_use_and_agree():
    torch.manual_seed(3)
    model = Language().eval()
    tokens = torch.randint(0, 30, (256, 8))
    statistics = gather(model, task_of(tokens))
    terms = statistics.curvature("embed.weight").terms
    assert sorted(t.inputs.ndim for t in terms) == [2, 3]  # token counts, and the head's inputs
    assert statistics.curvature("head.weight") is None  # one tensor, one path
    delta = torch.randn(30, 16) * 0.02
    assert statistics.curvature("embed.weight").damage(delta) == pytest.approx(
        gauss_newton(model, tokens, "embed.weight", delta), rel=0.5
    )


def test_the_running_statistics_of_batch_norm_count_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)).eval()
    model[0].running_mean.normal_()
    model[0].running_var.uniform_(0.5, 2)
    x = torch.randn(512, 6)
    statistics = gather(model, task_of(x))
    for path in ("0.running_mean", "0.running_var", "0.weight", "0.bias"):
        pairs = []
        for seed in range(40):
            delta = torch.randn(6, generator=torch.Generator().manual_seed(seed)) * 0.02
            pairs.append((statistics.curvature(path).damage(delta), gauss_newton(model, x, path, delta)))
        predicted, exact = torch.tensor(pairs).sum(0)
        assert 0.6 < predicted / exact < 1.6


def test_other_losses_use_the_squared_distance_of_the_outputs():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(512, 8)
    task = task_of(x, loss=lambda outputs, batch: outputs.square().mean(), metric=lambda outputs, batch: outputs.mean(1))
    statistics = gather(model, task)
    originals = references(model, task, [(x, None)])
    for site in tensor_sites(model):
        delta = torch.randn(site.tensor.shape) * 0.02
        shifted = nn.Module()
        shifted.forward = lambda value=site.tensor + delta: value
        measured = measure(model, site, shifted, task, [(x, None)], originals)
        if site.tensor.ndim == 2:
            assert statistics.curvature(site.path).damage(delta) == pytest.approx(measured, rel=0.3)


def test_predicted_damage_is_the_measured_divergence():
    model, x = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5)), torch.randn(512, 12)
    task = task_of(x)
    statistics, originals = gather(model, task), references(model, task, [(x, None)])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    site = next(tensor_sites(model))
    delta = 0.05 * torch.randn(24, 12)
    shifted = nn.Module()
    shifted.forward = lambda value=site.tensor + delta: value
    measured = measure(model, site, shifted, task, [(x, None)], originals)
    assert statistics.curvature("0.weight").damage(delta) == pytest.approx(measured, rel=0.2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Products(nn.Module):
    """Every way in which a tensor of the model is a matrix."""

    def __init__(self):
        super().__init__()
        self.fused = nn.Parameter(torch.randn(12, 6))
        self.right = nn.Parameter(torch.randn(6, 7))
        self.many = nn.Parameter(torch.randn(3, 6, 5))
        self.left = nn.Parameter(torch.randn(4, 9))
        self.conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
        self.same = nn.Conv1d(6, 4, 4, padding="same")
        self.embed = nn.Embedding(9, 5)

    def forward(self, x, image, tokens):
        q, k = self.fused.chunk(2)
        a = torch.nn.functional.linear(x, q) @ k.t()
        b = torch.addmm(torch.ones(7), x.flatten(0, 1), self.right)
        c = torch.matmul(x[:, None], self.many)
        d = torch.matmul(self.left, x)
        e = self.conv(image)
        f = self.same(x.transpose(1, 2))
        return a, b, c, d, e, f, self.embed(tokens)


def test_products_compute_what_the_operator_computes():
    model = Products().eval()
    arguments = torch.randn(2, 9, 6), torch.randn(2, 4, 7, 8), torch.randint(0, 9, (2, 3))
    program = trace(model, arguments)
    state = dict(model.named_parameters())
    seen = []

    def observe(index, node, op, inputs, run):
        output = run()
        product = product_of(op, node, inputs)
        if product is None:
            return output
        path = product.operand.lineage.path
        layout = product.layout(state[path].shape)
        matrix = layout(state[path].detach())
        seen.append(path)
        bias = inputs[2].value if op.split(".")[1] == "conv2d" or op.split(".")[1] == "conv1d" else None
        plain = output.detach() - (bias.detach().reshape(-1, *[1] * (output.ndim - 2)) if bias is not None else 0)
        plain = plain - (1 if op.startswith("aten.addmm") else 0)
        rows = product.gradients(plain, None)
        assert rows.shape[1] == product.n_positions
        if op.startswith("aten.embedding"):
            assert torch.equal(product.inputs(None)[0], torch.bincount(arguments[2].flatten(), minlength=9).float())
            return output
        torch.testing.assert_close(product.inputs(None) @ matrix.transpose(1, 2), rows, atol=1e-5, rtol=1e-5)
        chosen = torch.tensor([product.n_positions - 1, 0, 1])
        torch.testing.assert_close(product.inputs(chosen), product.inputs(None)[:, chosen])
        torch.testing.assert_close(product.gradients(plain, chosen), rows[:, chosen])
        return output

    interpret(program, model, arguments, {}, observe)
    assert sorted(seen) == sorted(["fused", "fused", "right", "many", "left", "conv.weight", "same.weight", "embed.weight"])


def test_a_transposed_convolution_is_a_product_of_its_gradients():
    model = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False).eval()
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    program = trace(model, (x.detach(),))

    def observe(index, node, op, inputs, run):
        output = run()
        product = product_of(op, node, inputs)
        g = torch.randn_like(output)
        matrix = product.layout(model.weight.shape)(model.weight.detach())
        # d loss / d x = W^T g: what the product says about gradients must give the gradient of the inputs
        (expected,) = torch.autograd.grad(output, x, g, retain_graph=True)
        rows = product.gradients(g, None) @ matrix
        torch.testing.assert_close(rows.transpose(0, 1).reshape(2, 25, 4).transpose(1, 2).reshape(2, 4, 5, 5), expected)
        return output

    interpret(program, model, (x,), {}, observe)


def test_statistics_of_a_linear_layer_are_the_moments_of_inputs_and_the_count_of_positions():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Conv1d(5, 3, 2), nn.Flatten(), nn.Linear(9, 3)).eval()
    x = torch.randn(64, 5, 6)
    statistics = gather(model, task_of(x, size=20), shrink=False)
    moments = torch.einsum("bpi,bpj->ij", x, x) / 64
    torch.testing.assert_close(statistics.curvature("0.weight").matrix().inputs[0], moments, rtol=1e-4, atol=1e-4)
    assert statistics.positions == {"0.weight": 5.0, "2.weight": 3.0, "4.weight": 1.0}


def test_a_wide_side_keeps_its_diagonal(monkeypatch):
    monkeypatch.setattr("pared.budget.moments.WIDEST", 10)
    model, x = nn.Linear(12, 5), torch.randn(256, 12)
    term = gather(model, task_of(x), shrink=False).curvature("weight").matrix()
    assert term.inputs.shape == (1, 12) and term.gradients.shape == (1, 5, 5)
    torch.testing.assert_close(term.inputs[0], x.square().mean(0), rtol=1e-4, atol=1e-4)


def test_features_that_the_data_leave_out_keep_a_moment():
    """Two of 40 features are silent: they must not look free."""
    model = nn.Sequential(nn.Linear(40, 3))
    x = torch.randn(64, 40) * torch.logspace(0, -1, 40)
    x[:, :2] = 0
    bare = gather(model, task_of(x), shrink=False).curvature("0.weight").matrix().inputs[0]
    moved = gather(model, task_of(x)).curvature("0.weight").matrix().inputs[0]
    assert float(bare[0, 0]) == 0 and float(moved[0, 0]) > 1e-3 * float(moved.diagonal().mean())
    torch.testing.assert_close(moved.trace(), bare.trace())


def test_moments_that_two_halves_agree_on_stay():
    model = nn.Sequential(nn.Linear(6, 3))
    x = torch.randn(4096, 6) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    bare = gather(model, task_of(x), n_examples=4096, shrink=False).curvature("0.weight").matrix().inputs
    moved = gather(model, task_of(x), n_examples=4096).curvature("0.weight").matrix().inputs
    torch.testing.assert_close(moved, bare, rtol=0.02, atol=0.02)


def test_sampled_positions_estimate_the_same_moments(monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(128, 2, 20, 20)
    model(x)
    exact = gather(model, task_of(x)).curvature("0.weight").matrix().inputs
    monkeypatch.setattr("pared.budget.calibrate._WORK", 8000 * 18**2)
    sampled = gather(model, task_of(x)).curvature("0.weight").matrix().inputs
    assert not torch.equal(exact, sampled)
    assert float((exact - sampled).norm() / exact.norm()) < 0.05


def test_gathering_twice_gives_the_same_and_leaves_the_model_alone():
    model = Attention().eval()
    task = task_of(torch.randn(40, 6, 16))
    flags = [p.requires_grad for p in model.parameters()]
    first, second, other = gather(model, task), gather(model, task), gather(model, task, seed=1)
    for path in first:
        assert first.curvature(path).damage(torch.ones(first.curvature(path).shape)) == second.curvature(path).damage(
            torch.ones(first.curvature(path).shape)
        )
    assert not torch.equal(first.curvature("out.bias").diagonal(), other.curvature("out.bias").diagonal())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


def same_terms(first, second, **within):
    assert list(first) == list(second) and first.positions == second.positions
    for path in first:
        for before, after in zip(first.curvature(path).terms, second.curvature(path).terms, strict=True):
            if isinstance(before, Diagonal):
                torch.testing.assert_close(before.hessian, after.hessian, **within)
            else:
                torch.testing.assert_close(before.inputs, after.inputs, **within)
                torch.testing.assert_close(before.gradients, after.gradients, **within)
                assert before.as_matrix == after.as_matrix


def language():
    return Language(), torch.randint(30, (40, 6))


@pytest.mark.parametrize(
    "made",
    [
        lambda: (convolutional(), torch.randn(40, 3, 12, 12)),
        lambda: (Attention(), torch.randn(40, 6, 16)),
        lambda: (Recurrent(), torch.randn(40, 6, 8)),
        language,
    ],
)
def test_matrices_gathered_some_at_a_time_are_those_gathered_at_once(made, monkeypatch, tmp_path):
    monkeypatch.setattr("pared.budget.calibrate._WORK", 8000)  # positions are sampled
    model, x = made()
    model.eval()
    flags = [p.requires_grad for p in model.parameters()]
    passes = []

    def progress(event):
        passes.append(event["total"] // 40)

    at_once = gather(model, task_of(x, size=8))
    in_parts = gather(model, task_of(x, size=8), held=1, folder=tmp_path, progress=progress)
    same_terms(at_once, in_parts, rtol=1e-4, atol=1e-6)  # attention without gradients has another kernel
    assert max(passes) > 1
    assert flags == [p.requires_grad for p in model.parameters()]


def test_matrices_that_wait_lie_in_files_of_the_folder(tmp_path):
    model, x = convolutional().eval(), torch.randn(40, 3, 12, 12)
    with pytest.raises(InputError, match=f"matrices of .* aside in {tmp_path / 'none'}"):
        gather(model, task_of(x), held=1, folder=tmp_path / "none")


def test_saved_statistics_load_bit_for_bit(tmp_path):
    statistics = gather(Attention().eval(), task_of(torch.randn(40, 6, 16)))
    save(statistics, tmp_path / "s.safetensors")
    same_terms(statistics, load(tmp_path / "s.safetensors"), rtol=0, atol=0)
    (tmp_path / "s.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"s\.safetensors must hold statistics"):
        load(tmp_path / "s.safetensors")


def test_the_diagonal_of_a_curvature_is_what_single_weights_do():
    statistics = gather(convolutional().eval(), task_of(torch.randn(32, 3, 12, 12)))
    for path in statistics:
        curvature = statistics.curvature(path)
        diagonal = curvature.diagonal()
        for index in (0, diagonal.numel() - 1):
            delta = torch.zeros(diagonal.numel())
            delta[index] = 1.0
            alone = curvature.damage(delta.reshape(diagonal.shape))
            assert float(diagonal.flatten()[index]) / 2 == pytest.approx(alone, rel=1e-4, abs=1e-12)


def test_a_layout_reads_tensors_that_lie_anywhere():
    layout = Layout((1, 2, 3), (6, 1, 2), 1)
    whole = torch.arange(20.0)
    assert torch.equal(layout(whole[5:]), whole[5:].as_strided((1, 2, 3), (6, 1, 2), 6))
    assert layout(whole[5:])[0, 1, 2] == 5 + 1 + 1 + 4


def test_a_custom_forward_is_followed():
    model = nn.Sequential(nn.Linear(4, 3))
    batches = [({"features": torch.randn(50, 4), "labels": torch.zeros(50, dtype=torch.long)})]
    task = Task(batches, batches, forward=lambda m, batch: m(batch["features"] * 2))
    term = gather(model, task, shrink=False).curvature("0.weight").matrix()
    assert isinstance(term, Kronecker)
    x = 2 * batches[0]["features"]
    torch.testing.assert_close(term.inputs[0], x.T @ x / 50, rtol=1e-4, atol=1e-4)


def test_divergence_is_the_mean_over_positions_with_a_target():
    outputs, reference = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    targets = torch.tensor([[1, 2, -100, -100], [0, 0, 0, 0], [-100, 5, -100, 6]])
    batch = (torch.zeros(3, 4, dtype=torch.long), targets)
    found = divergence(outputs, reference, Task([batch], [batch]), batch)
    p, q = reference.log_softmax(2), outputs.log_softmax(2)
    each = (p.exp() * (p - q)).sum(2)
    expected = torch.stack([each[0, :2].mean(), each[1].mean(), each[2, [1, 3]].mean()])
    torch.testing.assert_close(found.float(), expected)


class Fixed(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self):
        return self.value


class TwoHeads(nn.Module):
    """Boxes within [0, 1] beside scores of any size."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.boxes, self.scores = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 3)
        self.scale = scale

    def forward(self, x):
        y = torch.tanh(self.body(x))
        return {"boxes": self.boxes(y).sigmoid(), "scores": self.scale * self.scores(y)}


def two_heads(scale):
    model = TwoHeads(scale).eval()
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    task = Task([(x, None)], [(x, None)], loss=lambda outputs, batch: outputs["boxes"].mean(), metric=lambda o, b: o["boxes"][:, 0])
    return model, task, gather(model, task)


def test_every_output_counts_the_same_whatever_its_unit():
    shares = []
    for scale in (1.0, 1000.0):
        model, task, statistics = two_heads(scale)
        found = {}
        for head in ("boxes", "scores"):
            weight = getattr(model, head).weight.detach()
            found[head] = statistics.curvature(f"{head}.weight").damage(0.05 * weight)
        shares.append(found["boxes"] / sum(found.values()))
    assert shares[0] == pytest.approx(shares[1], rel=0.1)
    assert 0.1 < shares[0] < 0.9


def test_with_several_outputs_predicted_damage_is_the_measured_one():
    model, task, statistics = two_heads(30.0)
    batches = list(task.calibration())
    originals = references(model, task, batches)
    for site in tensor_sites(model):
        delta = 0.02 * torch.randn(site.tensor.shape, generator=torch.Generator().manual_seed(2))
        measured = measure(model, site, Fixed(site.tensor.detach() + delta), task, batches, originals)
        assert statistics.curvature(site.path).damage(delta) == pytest.approx(measured, rel=0.5)
