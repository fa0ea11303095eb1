"""Coupled channels: what is cut equals what is silenced, operator by operator, in the original."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pared
from pared import prune
from pared.graph.channels import Channels
from pared.graph.cutting import difference, held
from pared.graph.interpret import watch
from pared.place import everywhere
from pared.record import Record, attach_
from pared.statistics import Statistics
from pared.testing.zeroing import zeroed


def conv(i, o, k=3, **more):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **more), nn.BatchNorm2d(o), nn.ReLU())


class Image(nn.Module):
    """A stem, a body on 16 channels, a head."""

    def __init__(self, body, n_out=16):
        super().__init__()
        self.stem, self.body, self.head = conv(3, 16), body, nn.Linear(n_out, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.down = conv(16, 12), conv(12, 32), nn.Conv2d(16, 32, 1)

    def forward(self, x):
        return F.relu(self.b(self.a(x)) + self.down(x))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(16, 8), conv(24, 8)

    def forward(self, x):
        x = torch.cat([x, self.a(x)], 1)
        return torch.cat([x, self.b(x)], 1)


class Shuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.deep, self.b = conv(16, 16, groups=4), conv(16, 16, groups=16), conv(16, 16, 1, groups=2)

    def forward(self, x):
        b, c, h, w = x.shape
        x = self.a(x).view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.b(self.deep(x))


class Halves(nn.Module):
    """Works on some channels and hands on the others; then on both halves."""

    def __init__(self):
        super().__init__()
        self.part, self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), conv(16, 24, 1), conv(12, 16, 1)
        self.n_part, self.n_rest = 4, 12

    def forward(self, x):
        a, b = x.split([self.n_part, self.n_rest], 1)
        left, right = self.a(torch.cat([self.part(a), b], 1)).chunk(2, 1)
        return self.b(left * right.sigmoid())


class Excited(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up, self.out = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), conv(16, 16)

    def forward(self, x):
        scale = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return self.out(x * scale.sigmoid())


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Grown(nn.Module):
    """Transposed convolutions and a pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(12, 24, 2, stride=2, groups=3)
        self.wide, self.out = nn.Conv2d(24, 32, 1), conv(8, 16)

    def forward(self, x):
        return self.out(F.pixel_shuffle(self.wide(self.grouped(self.up(x))), 2))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(16, 24, 3), nn.GroupNorm(4, 24), nn.Conv2d(24, 16, 3)
        self.alone = nn.GroupNorm(1, 16)

    def forward(self, x):
        return self.alone(self.b(F.gelu(self.norm(self.a(x)))))


class Tokens(nn.Module):
    """Patches of an image, a body on their 16 features, a head."""

    def __init__(self, *body):
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 16, 16))
        self.body, self.norm, self.head = nn.Sequential(*body), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.body(x)).mean(1))


class Fused(nn.Module):
    """Attention whose code takes sizes from its input, as timm's."""

    def __init__(self, by_hand):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.num_heads, self.scale, self.by_hand = 4, 0.5, by_hand

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v if self.by_hand else F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(b, n, c))


class Inside(nn.Module):
    """The heads are joined in the other order than they were taken apart, and the width is that of the whole network."""

    def __init__(self):
        super().__init__()
        self.inner, self.qkv, self.proj, self.head = nn.Linear(5, 24), nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 4)
        self.num_heads = 3

    def forward(self, x):
        x = self.inner(x)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.proj(y.permute(0, 2, 3, 1).reshape(b, n, c)))


class Grouped(nn.Module):
    """Queries share keys and values, which are repeated."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.proj, self.head_dim, self.share = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16), 8, 2

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, -1, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = (t[:, :, None].expand(-1, -1, self.share, -1, -1).flatten(1, 2) for t in (k, v))
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """Attention in shifted windows of a grid, with learnt biases looked up by number."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.num_heads, self.window = nn.Linear(16, 48), nn.Linear(16, 16), 4, 2
        self.table = nn.Parameter(torch.randn(9, 4))
        self.register_buffer("index", torch.arange(16).reshape(4, 4) % 9, persistent=False)

    def forward(self, x):
        b, n, c = x.shape
        w = self.window
        x = torch.roll(x.view(b, 4, 4, c), (-1, -1), (1, 2)).view(b, 2, w, 2, w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, c)
        q, k, v = self.qkv(x).reshape(x.shape[0], w * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(w * w, w * w, -1).permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).transpose(1, 2).reshape(-1, w * w, c)
        y = self.proj(y).view(b, 2, 2, w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(b, 4, 4, c)
        return torch.roll(y, (1, 1), (1, 2)).reshape(b, n, c)


class Summed(nn.Module):
    """Attention over features with einsum."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(16, 4, 6)) for _ in range(3))
        self.o = nn.Parameter(torch.randn(4, 6, 16))

    def forward(self, x):
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
        return torch.einsum("bhnd,hdc->bnc", torch.einsum("bhnm,bhmd->bhnd", scores, v), self.o)


class Mixed(nn.Module):
    """Layers across tokens, then across features, with a gate."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.up, self.down, self.scale = nn.Linear(16, 40), nn.Linear(20, 16), nn.Parameter(torch.ones(16))

    def forward(self, x):
        x = x + self.b(F.gelu(self.a(x.transpose(1, 2)))).transpose(1, 2)
        return x + self.scale * self.down(F.glu(self.up(F.layer_norm(x, x.shape[-1:])), -1))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class Words(nn.Module):
    """A recurrent layer between an embedding and a head."""

    def __init__(self, layer, n_out):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(30, 12), layer, nn.Linear(n_out, 5)

    def forward(self, x):
        return self.head(self.layer(self.embed(x))[0][:, -1])


class Tied(nn.Module):
    """The embedding is the output layer too."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.a, self.b = nn.Embedding(30, 16), nn.RMSNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.out = nn.Linear(16, 30, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        return self.out(self.norm(x + self.b(F.silu(self.a(x)))))


def encoder(**more):
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, **more)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETS = {
    "residual": lambda: Image(Residual(), 32),
    "concatenation": lambda: Image(Dense(), 32),
    "shuffle and groups": lambda: Image(Shuffled()),
    "split, chunk and gate": lambda: Image(Halves()),
    "squeeze and excitation": lambda: Image(Excited()),
    "computed weights": lambda: Image(nn.Sequential(Standardised(16, 24, 3), nn.ReLU(), Standardised(24, 16, 3))),
    "transposed and pixel shuffle": lambda: Image(Grown()),
    "group norm": lambda: Image(Normed()),
    "fused attention": lambda: Tokens(Fused(False), Fused(True)),
    "grouped-query attention": lambda: Tokens(Grouped()),
    "windows": lambda: Tokens(Windows()),
    "einsum": lambda: Tokens(Summed()),
    "mixer and glu": lambda: Tokens(Mixed()),
    "multi-head attention": lambda: Tokens(Attending()),
    "encoder": lambda: Tokens(encoder()),
    "encoder, norm first": lambda: Tokens(encoder(norm_first=True, activation="gelu")),
    "lstm": lambda: Words(nn.LSTM(12, 20, 2, batch_first=True, bidirectional=True), 40),
    "projected lstm": lambda: Words(nn.LSTM(12, 20, 2, batch_first=True, proj_size=8), 8),
    "gru": lambda: Words(nn.GRU(12, 20, 2, batch_first=True), 20),
    "tied embeddings": Tied,
}


def made(name):
    torch.manual_seed(0)
    model = NETS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    words = isinstance(model, Words | Tied)
    return model, torch.randint(0, 30, (3, 7)) if words else torch.randn(3, 3, 16, 16)


def n_values(model):
    return sum(p.numel() for p in model.parameters())


def shape_of(value):
    if isinstance(value, list | tuple):
        return [shape_of(each) for each in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


def halves(graph, seed):
    """Half of the channels of every group, drawn."""
    rng = np.random.default_rng(seed)
    return {i: rng.permutation(g.n) < g.n // 2 for i, g in enumerate(graph.groups)}


@pytest.mark.parametrize("name", NETS)
def test_a_cut_network_equals_the_original_with_those_channels_silenced(name):
    model, x = made(name)
    graph = Channels(model, (x,))
    before = model(x)
    shapes = {}
    watch(graph.program, held(model, graph.program), (x,), {}, lambda number, value: shapes.update({number: shape_of(value)}))
    assert graph.axes.shapes == [shapes.get(number) for number in range(len(graph.axes.shapes))]
    for masks in (halves(graph, 0), {i: m for i, m in halves(graph, 1).items() if i % 2}):
        twin = copy.deepcopy(model)
        graph.cut_(twin, masks)
        assert difference(twin(x), zeroed(graph, masks)) < 1e-4
        if len(masks) == len(graph.groups):
            assert n_values(twin) <= 0.7 * n_values(model)
            assert graph.macs(masks) <= 0.7 * graph.macs({})
            twin.train()(x).sum().backward()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["shuffle and groups", "fused attention", "gru"])
def test_a_rewritten_network_gives_the_same_without_its_code_trains_and_is_saved(name, tmp_path):
    model, x = made(name)
    graph = Channels(model, (x,), rewrite=True)
    masks = halves(graph, 0)
    small = graph.rewritten(masks)
    assert difference(small(x), zeroed(graph, masks)) < 1e-4
    assert n_values(small) < n_values(model)
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    pared.save(small, tmp_path / "small.pared", example=x)
    assert difference(pared.load(tmp_path / "small.pared")(x), small(x)) < 1e-6


def test_hooks_of_the_model_see_real_tensors():
    model, x = made("residual")
    devices = set()
    model.stem.register_forward_hook(lambda module, args, output: devices.add(output.device.type))
    assert Channels(model, (x,)).groups
    assert devices == {"cpu"}


class Stubborn(nn.Module):
    """The size is a number in the code."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu().view(-1, 16))


@pytest.mark.parametrize("heads", [False, True])
def test_heads_are_told_from_their_slots_whatever_the_order_in_which_they_are_joined(heads):
    torch.manual_seed(0)
    model, x = Inside().eval(), torch.randn(2, 6, 5)
    graph = Channels(model, (x,))
    assert sorted(group.n for group in graph.groups if group.whole) == [3]
    options, _ = everywhere(model, prune.Channels(keep=0.5, importance="l1", heads=heads), Statistics(), graph)
    assert [option.site.group.n for option in options] == [3 if heads else 8]


def test_what_the_code_does_not_follow_stays_whole_with_a_reason_and_the_rest_goes():
    graph = Channels(Stubborn().eval(), (torch.randn(3, 8),))
    assert [group.name for group in graph.groups] == ["a"]
    assert next(f for f in graph.frozen if f.name == "b").reason

    rewritten = Channels(Stubborn().eval(), (torch.randn(3, 8),), rewrite=True)
    assert {group.name for group in rewritten.groups} == {"a", "b"}


def test_channels_that_reach_an_operator_without_a_rule_stay_with_its_name():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, x):
            return self.c(torch.fft.rfft(self.b(self.a(x).relu())).abs().repeat(1, 2)[:, :12])

    graph = Channels(Unknown().eval(), (torch.randn(3, 8),))
    assert [group.name for group in graph.groups] == ["a"]
    assert "rfft" in next(f for f in graph.frozen if f.name == "b").reason


def test_a_network_that_lost_channels_is_saved_without_being_traced_again(tmp_path, monkeypatch):
    model, x = made("residual")
    attach_(model, Record(example=((x,), {})))
    small = pared.apply(model, None, prune.Channels(keep=0.5, importance="l1"))
    monkeypatch.setattr("pared.artifact.write.trace", None)
    pared.save(small, tmp_path / "small.pared")
    assert difference(pared.load(tmp_path / "small.pared")(x), small(x)) < 1e-6
