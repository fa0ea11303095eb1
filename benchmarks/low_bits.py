"""Few bits: learned steps on a small residual network, signs on LeNet-5, and both mixed by the allocator; on Fashion-MNIST.

    python benchmarks/low_bits.py            # all rows that are not in benchmarks/results/low_bits.json yet
    python benchmarks/low_bits.py w4a4       # one of them

Wants examples/small_resnet.py and examples/train_fashion_mnist.py --net lenet_5 to have been run. Choices (epochs, rates,
clips) were made on the validation split of the training data; a row reads the test images once, at its end. Training is
distillation from the original. First and last layer of the residual network have 8 bits, as in the paper of learned steps;
of LeNet-5, with signs, all layers but the last are binary, and the last keeps 8 bits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pared
from pared import distill, quantize, sources
from pared.budget.observe import observe
from pared.place import everywhere, relax_, relax_network_, settle_
from pared.record import Record, attach_
from pared.technique import Technique
from pared.train import train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "low_bits.json"
sys.path.insert(0, str(ROOT / "examples"))


@dataclass(frozen=True)
class Row:
    """What is asked of one figure.

    Args:
        weights: techniques for tensors; the first that does not refuse a site takes it.
        network: techniques for the whole network, in force while it trains.
        bits_per_weight: instead of the two: of the whole file, for the allocator to share out.
        allowed: points of accuracy that may be lost.
    """

    net: str
    allowed: float
    epochs: int
    rate: float
    weights: tuple[Technique, ...] = ()
    network: tuple[Technique, ...] = ()
    bits_per_weight: float | None = None


def learned(bits: int) -> dict[str, Any]:
    ends = quantize.Integer(bits=8, tensors="matrices", steps="learned", keep="stages")
    middle = quantize.Integer(bits=bits, tensors="matrices", steps="learned", keep="stem,head")
    values = {"places": "products", "steps": "learned"}
    network = (quantize.Activations(bits=8, keep="stages", **values), quantize.Activations(bits=bits, keep="stem,head", **values))
    return {"weights": (middle, ends), "network": network}


ROWS = {
    "w4a4": Row("small_resnet", 0.5, 6, 2e-3, **learned(4)),
    "w2a2": Row("small_resnet", 2.0, 10, 3e-3, **learned(2)),
    "binary": Row("lenet_5", 1.0, 8, 1e-3, (quantize.Binary(), quantize.Integer(bits=8, tensors="matrices"))),
    "mixed": Row("lenet_5", 0.4, 6, 1e-3, bits_per_weight=1.5),
}
MIXED = {
    "steps": [
        {
            "any_of": [
                {"quantize.binary": {}},
                {"quantize.ternary": {}},
                {"quantize.integer": {"bits": [2, 3, 4, 6, 8]}},
            ],
            "train": {"epochs": 6, "tune_epochs": 1, "with": [{"distill.logits": {"temperature": 2, "hard": 0.3}}]},
        }
    ]
}


def mirrored(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    chosen = torch.rand(len(inputs), generator=generator) < 0.5
    return torch.where(chosen[:, None, None, None], inputs.flip(3), inputs)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Any) -> float:
    """In percent."""
    model.eval()
    right = [(model(images).argmax(1) == labels).float() for images, labels in batches]
    return 100 * float(torch.cat(right).mean())


def original(net: str) -> nn.Module:
    import lenet
    import small_resnet

    found = lenet.lenet_5_trained() if net == "lenet_5" else small_resnet.small_resnet_trained()
    return found.eval().to(memory_format=torch.channels_last)


def by_hand(row: Row, model: nn.Module, task: pared.Task, validate: Callable[[nn.Module], float]) -> nn.Module:
    """All weights and activations with the bits that the row says, trained."""
    student = original(row.net)
    statistics = observe(student, task, row.weights)
    options = {}
    for technique in reversed(row.weights):
        options |= {option.site.path: option for option in everywhere(student, technique, statistics)[0]}
    if row.net == "lenet_5":  # the layer that gives the classes is not hidden
        options["7.weight"] = next(o for o in everywhere(student, row.weights[1], statistics)[0] if o.site.path == "7.weight")
    chosen = list(options.values())
    seen = observe(student, task, row.network)
    relax_(student, chosen, statistics)
    edits = [edit for t in row.network if (edit := relax_network_(student, t, seen)) is not None]
    print(f"  before training: validation {validate(student):.2f}", flush=True)
    loss = distill.Logits(temperature=2, hard=0.3)
    train(
        student, task, epochs=row.epochs, losses=[loss], teacher=model, validate=validate, learning_rate=row.rate,
        anneal_until=0.6, progress=say,
    )  # fmt: skip
    coded = settle_(student, chosen, statistics)
    for edit in edits:
        edit.technique.settle(student)
    attach_(student.eval(), Record(edits=[*coded, *edits], example=task.example(student)))
    return student


def say(event: dict[str, Any]) -> None:
    if "say" in event:
        print(event["say"], flush=True)
    elif event.get("score") is not None:
        print(f"  epoch {event['epoch']}: loss {event['loss']:.4f}, validation {event['score']:.4f}", flush=True)


def trained(name: str, row: Row) -> dict[str, Any]:
    torch.manual_seed(0)
    model = original(row.net)
    task = sources.data("fashion-mnist", model, seed=0).task
    task.train.augment = mirrored
    start = time.perf_counter()
    if row.bits_per_weight is None:
        smaller = by_hand(row, model, task, lambda m: accuracy(m, task.val))
    else:
        n = sum(p.numel() for p in model.parameters())
        size = int(row.bits_per_weight * n / 8)
        smaller = pared.compress(model, task, MIXED, size=size, seed=0, progress=say).model
    found = {
        "net": row.net,
        "allowed_pp": row.allowed,
        "epochs": row.epochs,
        "seconds": round(time.perf_counter() - start),
        "validation_drop_pp": accuracy(model, task.val) - accuracy(smaller, task.val),
    }
    path = kept_at(name)
    path.parent.mkdir(exist_ok=True)
    pared.save(smaller, path)
    found["file_bytes"] = path.stat().st_size
    found["bits_per_weight"] = 8 * path.stat().st_size / sum(p.numel() for p in model.parameters())
    path.with_suffix(".json").write_text(json.dumps(found))
    return found


def kept_at(name: str) -> Path:
    return ROOT / "runs" / f"low_bits-{name}.pared"


def tested(name: str, row: Row) -> dict[str, Any]:
    """With the test images, which the file that was trained last sees now for the first time."""
    model = original(row.net)
    task = sources.data("fashion-mnist", model, seed=0).task
    before, after = (accuracy(m, task.test) for m in (model, pared.load(kept_at(name)).eval()))
    found = json.loads(kept_at(name).with_suffix(".json").read_text())
    figures = {"accuracy_before": before, "accuracy_after": after, "drop_pp": before - after}
    return {**found, **figures, "met": before - after <= row.allowed}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; default: all that have no figures yet")
    parser.add_argument("--only", choices=("train", "test"), help="train without a look at the test images; or only that look")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in given.rows or [name for name in ROWS if name not in results]:
        if given.only != "test":
            print(name, json.dumps(trained(name, ROWS[name])), flush=True)
        if given.only != "train":
            results[name] = tested(name, ROWS[name])
            print(name, json.dumps(results[name]), flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
