"""Was the pruned network worth having? The same architecture from random weights, beside the fine-tuned one.

    python benchmarks/rethinking.py                                   # small_resnet at half its MACs, Fashion-MNIST, three seeds
    python benchmarks/rethinking.py --recipe l0.yaml --macs 3x        # another way to prune it
    python benchmarks/rethinking.py --pruned net.pared --model FILE.py:FUNCTION --data digits

Liu et al. 2019 (arXiv:1810.05270) found that many pruned networks are no better than the same architecture trained from
scratch. Scratch-E: as many epochs as the original was trained for. Scratch-B: as many epochs as the MACs of those of the
original pay for, so twice as many at half the MACs. With `--count-tuning` both get the epochs of fine-tuning on top. The pruned
network is a .pared file, or what a recipe finds, fine-tuned on the labels for `--epochs`. Accuracy is on the test data,
which nothing was chosen on. Figures go to benchmarks/results/rethinking.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from channels import KEEP, ROOT, scratch, tuned
from torch import nn

import pared
from pared import sources
from pared.errors import InputError, ParedError
from pared.measurement.compute import compute
from pared.measurement.quality import drop, evaluate
from pared.site import plain
from pared.task import batch_size, in_order

DEFAULT = str(ROOT / "examples" / "small_resnet.py:small_resnet_trained")
RECIPE = {"steps": [{"prune.channels": {"keep": KEEP}}]}
RESULTS = ROOT / "benchmarks" / "results" / "rethinking.json"


def macs_of(model: nn.Module, task: pared.Task) -> float:
    """Per example."""
    args, kwargs = task.example(model)
    return compute(model, args, kwargs).macs / batch_size(next(in_order(task.val)))


def pruned_by(recipe: Any, original: nn.Module, task: pared.Task, share: str, epochs: int, seed: int) -> nn.Module:
    """What the recipe finds, and then fine-tuned; a recipe that trains by itself is left as it is."""
    result = pared.compress(original, task, recipe=recipe, macs=share, seed=seed)
    trained = any(trial["epochs"] for trial in result.data["trials"])
    return result.model if trained or not epochs else tuned(plain(result.model), task, epochs, seed)


def rethink(
    pruned: nn.Module, original: nn.Module, task: pared.Task, *, epochs: int, seeds: list[int],
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for the pruned network, and one for each seed of Scratch-E and Scratch-B.

    Args:
        pruned: fine-tuned already.
        epochs: of Scratch-E; Scratch-B gets so many times macs(original) / macs(pruned), rounded.
        seeds: of the random weights and the order of the data.
        keep: called with all rows so far after each.
    """
    reference = evaluate(original.eval(), task, task.test, reference=original)
    ratio = macs_of(original, task) / macs_of(pruned, task)
    rows: list[dict[str, Any]] = []

    def add(method: str, model: nn.Module, n_epochs: int | None, seed: int | None, seconds: float) -> None:
        quality = evaluate(model.eval(), task, task.test, reference=original)
        lost = drop(reference, quality, seed=seed or 0)
        rows.append(
            {
                "method": method, "seed": seed, "epochs": n_epochs, "macs_ratio": ratio,
                "parameters": sum(p.numel() for p in plain(model).parameters()), "accuracy": quality.value,
                "drop_pp": lost.value, "low": lost.low, "high": lost.high, "seconds": round(seconds, 1),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        keep(rows)

    add("fine-tuned", pruned, None, None, 0.0)
    for seed in seeds:
        for method, n_epochs in (("Scratch-E", epochs), ("Scratch-B", max(epochs, round(epochs * ratio)))):
            start = time.perf_counter()
            add(method, scratch(pruned, task, n_epochs, seed), n_epochs, seed, time.perf_counter() - start)
    return rows


def table(rows: list[dict[str, Any]], accuracy: float) -> str:
    """One line per way of training: mean and range of the accuracy over the seeds."""
    lines = ["| | epochs | test accuracy, % | seeds |", "|---|---|---|---|", f"| original | | {100 * accuracy:.2f} | |"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        found = [100 * row["accuracy"] for row in own]
        spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
        lines.append(f"| {method} | {own[0]['epochs'] or ''} | {statistics.mean(found):.2f}{spread} | {len(found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruned", type=Path, help="a .pared file; else the recipe makes one")
    parser.add_argument("--model", default=DEFAULT, help="the trained original, as for pared compress")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--recipe", help="a YAML file or the name of a shipped one; default: prune.channels")
    parser.add_argument("--macs", default="2x", help="what the recipe prunes to")
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning")
    parser.add_argument("--scratch-epochs", type=int, default=10, help="of Scratch-E: those the original was trained for")
    parser.add_argument("--count-tuning", action="store_true", help="give both the epochs of fine-tuning, too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    for name in ("scratch_epochs", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    torch.set_num_threads(given.threads)
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        original, facts = sources.model(given.model)
        task = sources.data(given.data, original, facts=facts).task
        if task.test is None:
            raise InputError(f"{given.data} has no test data, on which accuracy is measured; choose data that have some")
        if given.pruned:
            pruned = pared.load(given.pruned, sources.model(given.model)[0])
        else:
            pruned = pruned_by(given.recipe or RECIPE, original, task, given.macs, given.epochs, given.seeds[0])
        epochs = given.scratch_epochs + (given.epochs if given.count_tuning else 0)
        accuracy = evaluate(original, task, task.test, reference=original).value
        facts_ = {
            "model": Path(given.model).name, "data": given.data, "pruned": given.pruned.name if given.pruned else None,
            "recipe": given.recipe or RECIPE, "macs": given.macs, "epochs": given.epochs, "scratch_epochs": epochs,
            "accuracy": accuracy,
        }  # fmt: skip

        def keep(rows: list[dict[str, Any]]) -> None:
            given.out.write_text(json.dumps({**facts_, "runs": rows}, indent=1) + "\n")

        rows = rethink(pruned, original, task, epochs=epochs, seeds=given.seeds, keep=keep)
    except ParedError as error:
        sys.exit(f"rethinking: {error}")
    print(table(rows, accuracy))


if __name__ == "__main__":
    main()
