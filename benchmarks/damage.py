"""Predicted against measured damage: every layer and option of the default recipe, on three small trained nets.

    python benchmarks/damage.py [--nets lenet_5 transformer lstm]

Each net is trained here (a minute or two). Curvature is gathered on 512 training examples and scaled by one factor, found
on validation examples. The divergence from the original's outputs is measured on 500 test examples, which none of this has
seen; and on the calibration examples, with the curvature as it was gathered. "Gentle" options move the outputs by less than
0.1 nat. Figures go to benchmarks/results/damage.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from pared import recipe, sources
from pared.budget import gather
from pared.budget.damage import measure, references
from pared.budget.options import candidates
from pared.budget.probe import correct_
from pared.task import Task

ROOT = Path(__file__).resolve().parents[1]
N_HELD_OUT = 500
GENTLE = 0.1


class Transformer(nn.Module):
    """Two encoder layers over the eight rows of a digit, with a learnt class token and places."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.place = nn.Parameter(torch.randn(9, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.flatten(1, 2))
        rows = torch.cat([self.token.expand(rows.shape[0], -1, -1), rows], 1) + self.place
        return self.head(self.norm(self.layers(rows)[:, 0]))


class Recurrent(nn.Module):
    """A two-layer LSTM over the eight rows of a digit."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, width, 2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.flatten(1, 2))[0][:, -1])


def lenet_5() -> nn.Module:
    sys.path.insert(0, str(ROOT / "examples"))
    import lenet

    return lenet.lenet_5()


NETS: dict[str, tuple[Callable[[], nn.Module], str, int, int]] = {
    "lenet_5": (lenet_5, "fashion-mnist", 3, 256),
    "transformer": (Transformer, "digits", 40, 64),
    "lstm": (Recurrent, "digits", 40, 64),
}


def trained(make: Callable[[], nn.Module], task: Task, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = make().train()
    batches = [(x, y) for x, y in task.train]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for _ in range(epochs):
        for index in torch.randperm(len(batches)).tolist():
            x, y = batches[index]
            optimizer.zero_grad()
            F.cross_entropy(model(x + 0.15 * torch.randn_like(x)), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module, task: Task) -> float:
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) == y for x, y in task.val])
    return float(right.float().mean())


def first(loader: Any, n: int) -> list[tuple[Tensor, Tensor]]:
    x, y = (torch.cat(parts)[:n] for parts in zip(*loader))
    return [(x, y)]


def compared(rows: list[dict[str, Any]], prediction: str, measured: str) -> dict[str, float]:
    """Rank correlation, and the ratio predicted / measured: median and the middle 80 %."""
    table = np.array([(row[prediction], row[measured]) for row in rows])
    predicted, found = table[(table > 0).all(1)].T
    ratio = predicted / found
    gentle = found < GENTLE
    return {
        "rank_correlation": float(spearmanr(*table.T)[0]),
        "median_ratio": float(np.median(ratio)),
        "ratio_p10": float(np.quantile(ratio, 0.1)),
        "ratio_p90": float(np.quantile(ratio, 0.9)),
        "n_gentle": int(gentle.sum()),
        "rank_correlation_gentle": float(spearmanr(predicted[gentle], found[gentle])[0]),
        "median_ratio_gentle": float(np.median(ratio[gentle])),
    }


def one(name: str) -> dict[str, Any]:
    make, spec, epochs, size = NETS[name]
    task = sources.data(spec, make(), batch_size=size, seed=0).task
    model = trained(make, task, epochs)
    start = time.perf_counter()
    statistics = gather(model, task)
    factor = correct_(model, task, statistics)
    end = time.perf_counter()
    data = {"measured": list(task.calibration()), "measured_held_out": first(task.test, N_HELD_OUT)}
    originals = {key: references(model, task, batches) for key, batches in data.items()}
    techniques = recipe.load(None).steps[0].candidates
    rows = []
    for candidate in candidates(model, techniques, statistics, task, {}):
        option = candidate.option
        if option.technique is not None:
            row = {"site": option.site.path, "technique": str(option.technique), "predicted": option.damage / factor}
            row["corrected"] = option.damage
            for key, batches in data.items():
                row[key] = measure(model, option.site, candidate.parts, task, batches, originals[key])
            rows.append(row)
    return {
        "net": name,
        "validation_accuracy": accuracy(model, task),
        "n": len(rows),
        "n_sites": len({row["site"] for row in rows}),
        "factor": factor,
        **compared(rows, "predicted", "measured"),
        "held_out": compared(rows, "corrected", "measured_held_out"),
        "held_out_uncorrected": compared(rows, "predicted", "measured_held_out"),
        "gather_seconds": round(end - start, 2),
        "measure_seconds": round(time.perf_counter() - end, 2),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.results / "damage.json"
    found = {entry["net"]: entry for entry in json.loads(path.read_text())["nets"]} if path.exists() else {}
    for name in arguments.nets:
        found[name] = one(name)
        print(json.dumps({key: value for key, value in found[name].items() if key != "rows"}, indent=1), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"nets": [found[name] for name in NETS if name in found]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
