"""Six networks that nothing was tuned for, through compress(size="8x", max_drop=1.0), saved, and run without their source.

    python benchmarks/strangers.py [--nets detector unet language conv_lstm siamese nested]

Each is trained here for a minute or less on synthetic data with ground truth. The file is loaded in a process that cannot import
this one, and its outputs are compared with those of the compressed model. Figures go to benchmarks/results/strangers.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pared
from pared.errors import ParedError

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = """
import sys, torch, pared
from torch.utils import _pytree as pytree
torch.set_num_threads(1)
net = pared.load(sys.argv[1])
call = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    outputs = net(*call["args"], **call["kwargs"])
torch.save([leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)], sys.argv[3])
"""


class Case(NamedTuple):
    """A net, its task, and how long it is trained."""

    model: nn.Module
    task: pared.Task
    epochs: int


def batches(make: Callable[[int, torch.Generator], Any], n: int, seed: int, size: int = 32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [make(size, generator) for _ in range(n)]


def parts(make: Callable[[int, torch.Generator], Any], n_train: int = 30) -> dict[str, list[Any]]:
    return {"train": batches(make, n_train, 1), "val": batches(make, 10, 2), "test": batches(make, 16, 3)}


# -- a detector ------------------------------------------------------------------------------------------------------------


class Detector(nn.Module):
    """One box and its class per picture, from a strided net with a residual and two heads over a soft attention map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.BatchNorm2d(32), nn.SiLU(), nn.Conv2d(32, 32, 1))
        self.score = nn.Conv2d(32, 1, 1)
        self.register_buffer("grid", torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")) / 8)
        self.box = nn.Linear(34, 4)
        self.kind = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.down(self.stem(x))
        y = F.relu_(y + self.body(y))
        attention = self.score(y).flatten(2).softmax(2)
        seen = (y.flatten(2) * attention).sum(2)
        centre = (self.grid.flatten(1)[None] * attention).sum(2)
        boxes = self.box(torch.cat([seen, centre], 1)).sigmoid()
        return {"boxes": boxes, "logits": self.kind(seen)}


def pictures(size: int, generator: torch.Generator) -> Any:
    """A textured rectangle on noise: its middle and sides are the box, its texture the class."""
    x = 0.3 * torch.rand(size, 1, 32, 32, generator=generator)
    kind = torch.randint(0, 3, (size,), generator=generator)
    boxes = torch.zeros(size, 4)
    for index in range(size):
        h, w = (int(v) for v in torch.randint(8, 18, (2,), generator=generator))
        top, left = (int(torch.randint(0, 32 - side, (1,), generator=generator)) for side in (h, w))
        patch = torch.ones(h, w)
        if kind[index] == 1:
            patch[::2] = 0.2
        elif kind[index] == 2:
            patch[:, ::2] = 0.2
        x[index, 0, top : top + h, left : left + w] += patch
        boxes[index] = torch.tensor([top + h / 2, left + w / 2, h, w]) / 32
    return x, {"boxes": boxes, "kind": kind}


def detection_loss(outputs: Any, batch: Any) -> Tensor:
    return 20 * F.smooth_l1_loss(outputs["boxes"], batch[1]["boxes"]) + F.cross_entropy(outputs["logits"], batch[1]["kind"])


def found(outputs: Any, batch: Any) -> Tensor:
    """Right class, and an overlap of at least one half."""
    a, b = outputs["boxes"], batch[1]["boxes"]
    top = torch.maximum(a[:, :2] - a[:, 2:] / 2, b[:, :2] - b[:, 2:] / 2)
    bottom = torch.minimum(a[:, :2] + a[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2)
    common = (bottom - top).clamp_min(0).prod(1)
    overlap = common / (a[:, 2:].prod(1) + b[:, 2:].prod(1) - common)
    return ((overlap >= 0.5) & (outputs["logits"].argmax(1) == batch[1]["kind"])).float()


def detector() -> Case:
    return Case(Detector(), pared.Task(**parts(pictures), loss=detection_loss, metric=found), 50)


# -- a U-Net ---------------------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Three levels, transposed convolutions up, skip connections by concatenation, group norm."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.enter = self._block(1, width)
        self.first = self._block(width, 2 * width)
        self.second = self._block(2 * width, 4 * width)
        self.up_second = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join_second = self._block(4 * width, 2 * width)
        self.up_first = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join_first = self._block(2 * width, width)
        self.leave = nn.Conv2d(width, 4, 1)

    @staticmethod
    def _block(n_in: int, n_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(4, n_out), nn.LeakyReLU(0.1, inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        a = self.enter(x)
        b = self.first(F.max_pool2d(a, 2))
        c = self.second(F.avg_pool2d(b, 2))
        b = self.join_second(torch.cat([self.up_second(c), b], 1))
        return self.leave(self.join_first(torch.cat([self.up_first(b), a], 1)))


def masks(size: int, generator: torch.Generator) -> Any:
    """The pictures of the detector; the class of every pixel, 0 for the background."""
    x, target = pictures(size, generator)
    y = torch.zeros(size, 32, 32, dtype=torch.long)
    for index, (row, column, h, w) in enumerate((target["boxes"] * 32).tolist()):
        top, left = round(row - h / 2), round(column - w / 2)
        y[index, top : top + round(h), left : left + round(w)] = 1 + target["kind"][index]
    return x, y


def unet() -> Case:
    return Case(UNet(), pared.Task(**parts(masks, 20)), 10)


# -- a language model ------------------------------------------------------------------------------------------------------


class Language(nn.Module):
    """A causal transformer over symbols, with learned places, hand-made attention and a head tied to the embedding."""

    def __init__(self, n: int = 24, width: int = 48, length: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width, bias=False) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.mlp = nn.ModuleList([nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width)) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(5)])
        self.head = nn.Linear(width, n, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.place[: tokens.shape[1]]
        for i in range(2):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out[i](y.transpose(1, 2).flatten(2))
            x = x + self.mlp[i](self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x))


def sentences(size: int, generator: torch.Generator) -> Any:
    """Every symbol is the sum of the two before it, modulo 12 or 24, with one symbol in ten at random."""
    rows = torch.randint(0, 24, (size, 25), generator=generator)
    for t in range(2, 25):
        ruled = (rows[:, t - 1] + rows[:, t - 2]) % 12
        chance = torch.rand(size, generator=generator) < 0.1
        rows[:, t] = torch.where(chance, rows[:, t], ruled)
    return rows[:, :-1], rows[:, 1:]


def language() -> Case:
    return Case(Language(), pared.Task(**parts(sentences, 60)), 30)


# -- a convolutional recurrent net -----------------------------------------------------------------------------------------


class ConvLSTM(nn.Module):
    """Reads a film frame by frame in a loop and says the next frame; its state is made inside."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.gates = nn.Conv2d(1 + width, 4 * width, 3, padding=1)
        self.peephole = nn.Parameter(torch.zeros(width, 1, 1))
        self.frame = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, film: Tensor) -> Tensor:
        h = film.new_zeros(film.shape[0], self.width, film.shape[3], film.shape[4])
        c = torch.zeros_like(h)
        for t in range(film.shape[1]):
            i, f, g, o = self.gates(torch.cat([film[:, t], h], 1)).chunk(4, 1)
            c = torch.sigmoid(f + 1 + self.peephole * c) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.frame(h)


def films(size: int, generator: torch.Generator) -> Any:
    """A bright square that moves one pixel per frame, and wraps round."""
    x = torch.zeros(size, 5, 1, 12, 12)
    for index in range(size):
        row, column, direction = (int(torch.randint(0, n, (1,), generator=generator)) for n in (12, 12, 4))
        step = [(0, 1), (1, 0), (0, -1), (-1, 0)][direction]
        for t in range(5):
            square = torch.zeros(12, 12)
            square[:3, :3] = 1
            x[index, t, 0] = square.roll((row + t * step[0], column + t * step[1]), (0, 1))
    return x[:, :4], x[:, 4]


def frame_loss(outputs: Any, batch: Any) -> Tensor:
    return F.mse_loss(outputs, batch[1])


def explained(outputs: Any, batch: Any) -> Tensor:
    """The share of the next frame's variance that is explained."""
    y = batch[1].flatten(1)
    error = (outputs.flatten(1) - y).square().mean(1)
    return (1 - error / y.var(1, unbiased=False)).clamp(0, 1)


def conv_lstm() -> Case:
    return Case(ConvLSTM(), pared.Task(**parts(films, 20), loss=frame_loss, metric=explained), 15)


# -- a Siamese net ---------------------------------------------------------------------------------------------------------


class Siamese(nn.Module):
    """One encoder, called twice; weight norm on its last layer; the answer is a learned function of the distance."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = nn.Conv2d(1, 16, 5, 2, 2), nn.PReLU(16), nn.Conv2d(16, 16, 3, 2, 1), nn.Hardswish(), nn.Flatten()
        self.encoder = nn.Sequential(*convolutions, nn.utils.parametrizations.weight_norm(nn.Linear(256, 24)))
        self.scale = nn.Parameter(torch.tensor([4.0, 2.0]))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.encoder(a), self.encoder(b)
        distance = (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(1)
        return self.scale[1] - self.scale[0] * distance, torch.stack([first, second], 1)


def pairs(size: int, generator: torch.Generator) -> Any:
    """Two pictures of oriented waves: of one orientation, or of two."""
    same = torch.rand(size, generator=generator) < 0.5
    angle = torch.rand(size, generator=generator) * torch.pi
    other = torch.where(same, angle, angle + torch.pi * (0.2 + 0.6 * torch.rand(size, generator=generator)))
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")

    def waves(theta: Tensor) -> Tensor:
        phase = 2 * torch.pi * torch.rand(size, 1, 1, generator=generator)
        x = torch.sin(rows * theta.cos()[:, None, None] + columns * theta.sin()[:, None, None] + phase)
        return (x + 0.2 * torch.randn(size, 16, 16, generator=generator))[:, None]

    return (waves(angle), waves(other)), same.float()


def pair_loss(outputs: Any, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs[0], batch[1])


def right(outputs: Any, batch: Any) -> Tensor:
    return ((outputs[0] > 0) == (batch[1] > 0.5)).float()


def siamese() -> Case:
    return Case(Siamese(), pared.Task(**parts(pairs, 60), loss=pair_loss, metric=right), 20)


# -- nested inputs and outputs ---------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """A GRU over a series, numbers and categories, in nested dicts and lists; outputs of the same kind."""

    def __init__(self) -> None:
        super().__init__()
        self.series = nn.GRU(3, 24, batch_first=True, bidirectional=True)
        self.words = nn.EmbeddingBag(40, 12, mode="mean")
        self.tables = nn.ModuleDict({"place": nn.Embedding(7, 6), "time": nn.Embedding(24, 6)})
        self.mix = nn.Bilinear(48, 12, 32)
        self.tail = nn.Sequential(nn.Linear(44, 32), nn.ELU(), nn.Linear(32, 5))
        self.amount = nn.Linear(32, 1)

    def forward(self, series: Tensor, words: Tensor, context: dict[str, list[Tensor]]) -> dict[str, Any]:
        seen = self.series(series)[0].mean(1)
        mixed = torch.tanh(self.mix(seen, self.words(words)))
        places = [self.tables[name](context[name][0]) * context[name][1][:, None] for name in ("place", "time")]
        return {"answer": {"logits": self.tail(torch.cat([mixed, *places], 1))}, "others": [self.amount(mixed), seen]}


def records(size: int, generator: torch.Generator) -> Any:
    """The class follows from the place, the slope of the series and how many words are high."""
    slope = torch.randn(size, 1, 1, generator=generator)
    series = slope * torch.arange(10.0)[None, :, None] / 5 + 0.3 * torch.randn(size, 10, 3, generator=generator)
    words = torch.randint(0, 40, (size, 8), generator=generator)
    place, hour = (torch.randint(0, n, (size,), generator=generator) for n in (7, 24))
    y = (place // 3 + (slope.flatten() > 0) + (words >= 20).float().mean(1).gt(0.5)) % 5
    context = {"place": [place, torch.ones(size)], "time": [hour, torch.rand(size, generator=generator)]}
    return {"series": series, "words": words, "context": context, "labels": y.long()}


def answer_loss(outputs: Any, batch: Any) -> Tensor:
    amount = batch["series"].mean((1, 2))
    return F.cross_entropy(outputs["answer"]["logits"], batch["labels"]) + F.mse_loss(outputs["others"][0].flatten(), amount)


def answered(outputs: Any, batch: Any) -> Tensor:
    return (outputs["answer"]["logits"].argmax(1) == batch["labels"]).float()


def nested() -> Case:
    return Case(Nested(), pared.Task(**parts(records, 60), loss=answer_loss, metric=answered), 25)


NETS: dict[str, Callable[[], Case]] = {
    "detector": detector, "unet": unet, "language": language, "conv_lstm": conv_lstm, "siamese": siamese, "nested": nested,
}  # fmt: skip


def train(case: Case) -> nn.Module:
    model, task = case.model.train(), case.task
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=case.epochs * len(task.train))  # type: ignore[arg-type]
    for _ in range(case.epochs):
        for batch in task.train:
            optimiser.zero_grad()
            task.batch_loss(task.outputs(model, batch), batch).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def one(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    case = NETS[name]()
    start = time.perf_counter()
    model = train(case)
    trained = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        result = pared.compress(model, case.task, size="8x", max_drop=1.0)
    compressed = time.perf_counter()
    batch = next(iter(case.task.test))  # type: ignore[arg-type]
    args, kwargs = case.task.call(result.model, batch)
    with torch.no_grad():
        expected = [leaf for leaf in pytree.tree_leaves(result.model(*args, **kwargs)) if isinstance(leaf, Tensor)]
    with tempfile.TemporaryDirectory() as folder:
        path, call, there = (Path(folder) / file for file in ("net.pared", "call.pt", "outputs.pt"))
        result.save(path)
        torch.save({"args": args, "kwargs": kwargs}, call)
        subprocess.run([sys.executable, "-c", ELSEWHERE, path, call, there], check=True, cwd=folder)
        outputs = torch.load(there, weights_only=True)
        own = pared.load(path, NETS[name]().model).eval()
        with torch.no_grad():
            again = [leaf for leaf in pytree.tree_leaves(own(*args, **kwargs)) if isinstance(leaf, Tensor)]
    drop = result.data["drop_pp"]
    return {
        "net": name,
        "parameters": result.data["before"]["parameters"],
        "metric": {side: result.data[side]["metric"]["value"] for side in ("before", "after")},
        "ratio": result.data["before"]["file_bytes"] / result.data["after"]["file_bytes"],
        "met": result.met,
        "drop_pp": {key: drop[key] for key in ("value", "low", "high", "n")},
        "acceptance": result.data["acceptance"],
        "largest_difference_without_class": difference(outputs, expected),
        "largest_difference_with_class": difference(again, expected),
        "untouched": len(result.data["untouched"]),
        "refusals": len(result.data["refusals"]),
        "warnings": [str(each.message) for each in said],
        "seconds": {"train": round(trained - start, 1), "compress": round(compressed - trained, 1)},
    }


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, over the largest output."""
    if len(found) != len(expected):
        raise SystemExit(f"{len(found)} outputs came back instead of {len(expected)}")
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(found, expected))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target = ROOT / "benchmarks" / "results" / "strangers.json"
    rows = {row["net"]: row for row in json.loads(target.read_text())["nets"]} if target.exists() else {}
    for name in arguments.nets:
        try:
            rows[name] = one(name)
        except ParedError as error:  # a net that cannot be compressed at all counts, too
            rows[name] = {"net": name, "error": str(error)}
        print(json.dumps(rows[name], indent=1), flush=True)
        target.write_text(json.dumps({"nets": [rows[each] for each in NETS if each in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
