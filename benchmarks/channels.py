"""Channel pruning of a small residual network on Fashion-MNIST, beside torch-pruning (group Taylor) in the same run.

    python benchmarks/channels.py --peer DIR                     # without any fine-tuning, at 1.43x, 2x and 2.57x fewer MACs
    python benchmarks/channels.py --peer DIR --epochs 10         # the same fine-tuning for both, and from scratch (Scratch-B)

    python benchmarks/channels.py --latency                      # of the pruned networks in ONNX Runtime, batch 1
    python benchmarks/channels.py --by-time                      # planned by the time of layers, and by MACs at the same damage

DIR holds torch-pruning (pip install --no-deps --target DIR torch-pruning). Both get the same trained network, the same
calibration images and the same number of epochs on the labels, trained as Scratch-B is (on validation images that was better
than distillation from the original, by 0.5 points). Accuracy is on the test images, which nothing was chosen on. Scratch-B
trains the network that pared found from random weights for as many epochs as fit into the MACs of training the original.
Figures go to benchmarks/results/channels.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

import pared
from pared import registry, sources
from pared.budget.calibrate import gather
from pared.budget.channels import Removal, channel_options, plan_channels
from pared.budget.probe import correct_
from pared.errors import BudgetError, InputError
from pared.graph.channels import Channels
from pared.measurement import Latency, compare
from pared.measurement.compute import compute
from pared.measurement.quality import drop, evaluate
from pared.site import duplicate, plain
from pared.technique import Option
from pared.train import train

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
SHARES = (1.43, 2.0, 2.57)
KEEP = [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1]


def macs(model: nn.Module) -> float:
    return compute(model, (torch.zeros(2, 1, 28, 28),), {}).macs / 2


def ours(model: nn.Module, task: pared.Task, share: float) -> nn.Module:
    recipe = {"steps": [{"prune.channels": {"keep": KEEP}}]}
    return pared.compress(model, task, recipe=recipe, macs=f"{share}x", train=False).model


def theirs(model: nn.Module, task: pared.Task, share: float) -> nn.Module:
    """torch-pruning: group Taylor importance, global ranking, its own recipe for a target of MACs."""
    import torch_pruning as tp

    model = copy.deepcopy(model).eval()
    example = torch.zeros(2, 1, 28, 28)
    whole = macs(model)
    steps = 200
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=0.95,
        max_pruning_ratio=0.9,
        iterative_steps=steps,
        ignored_layers=[model.head],
    )
    for _ in range(steps):
        model.zero_grad()
        for images, labels in task.calibration(256):
            nn.functional.cross_entropy(model(images), labels).backward()
        pruner.step()
        if macs(model) <= whole / share:
            break
    return model.eval()


def fresh(shape: nn.Module, seed: int) -> nn.Module:
    """The same architecture with random weights, drawn as its layers draw them.

    Raises:
        InputError: a parameter belongs to a module that has no `reset_parameters`.
    """
    model = plain(shape)
    torch.manual_seed(seed)
    for path, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif own := [name for name, _ in module.named_parameters(recurse=False)]:
            raise InputError(f"{type(module).__name__} at {path or 'the root'} must have reset_parameters, since it holds {own[0]}")
    return model.requires_grad_(True)


def scratch(shape: nn.Module, task: pared.Task, epochs: int, seed: int = 0) -> nn.Module:
    """The same architecture, trained from random weights on the labels."""
    model = fresh(shape, seed)
    train(model, task, epochs=epochs, learning_rate=3e-3, weight_decay=0.05, keep_best=False, seed=seed)
    return model


def tuned(model: nn.Module, task: pared.Task, epochs: int, seed: int) -> nn.Module:
    """Trained on as the network was from random weights: on the labels."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    train(model, task, epochs=epochs, learning_rate=3e-3, weight_decay=0.05, keep_best=False, seed=seed)
    return model


def latency(original: nn.Module, task: pared.Task, share: float) -> list[dict[str, Any]]:
    """Milliseconds of one image in ONNX Runtime, one thread, in turns: the original, and what is left of it with widths as
    they come and with widths that are multiples of 8 and 16."""
    rows: dict[str, nn.Module] = {"original": original}
    for multiple in (1, 8, 16):
        recipe = {"steps": [{"prune.channels": {"keep": KEEP, "round_to": multiple}}]}
        try:
            rows[f"multiples of {multiple}"] = pared.compress(original, task, recipe=recipe, macs=f"{share}x", train=False).model
        except BudgetError as error:
            print(f"multiples of {multiple}: {error}", flush=True)
    measured = timed(rows)
    return [
        {
            "widths": name,
            "macs_asked": share,
            "macs_ratio": macs(original) / macs(rows[name]),
            "milliseconds": one.to_json(),
            "faster": measured["original"].median / one.median,
        }
        for name, one in measured.items()
    ]


def timed(models: dict[str, nn.Module]) -> dict[str, Latency]:
    """One image in ONNX Runtime, one thread, in turns."""
    calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            pared.export(model, Path(folder) / "net.onnx", example=torch.zeros(1, 1, 28, 28))
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads, settings.log_severity_level = 1, 3
            session = onnxruntime.InferenceSession(str(Path(folder) / "net.onnx"), settings)
            calls[name] = partial(session.run, None, {session.get_inputs()[0].name: torch.zeros(1, 1, 28, 28).numpy()})
        return compare(calls, n_runs=5000, n_warmup=50, seconds=20)


def by_time(original: nn.Module, task: pared.Task, target: float) -> list[dict[str, Any]]:
    """compress(latency=) beside plans for MACs with as much predicted damage: widths as they come, multiples of 8 and of 16."""
    recipe = {"steps": [{"prune.channels": {"keep": KEEP}}]}
    said: list[str] = []
    start = time.perf_counter()
    found = pared.compress(
        original, task, recipe=recipe, latency=f"{target}x@onnxruntime", train=False,
        progress=lambda event: said.append(event["say"]) if "say" in event else None,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    print("\n".join(line for line in said if "faster" in line or "widths" in line), flush=True)
    kept = next(trial for trial in found.data["trials"] if trial["accepted"])
    rows: dict[str, tuple[nn.Module, float]] = {"original": (original, 0.0), "by time": (found.model, kept["predicted_damage"])}
    statistics = gather(original, task, seed=0, progress=lambda event: None)
    correct_(original, task, statistics)
    graph = Channels(duplicate(original).eval(), *task.example(original))
    for multiple in (1, 8, 16):
        techniques = [registry.get("prune.channels")(keep=keep, round_to=multiple) for keep in KEEP]
        options, _ = channel_options(graph.model, techniques, statistics, graph, task)
        plan = most_within(options, graph, kept["predicted_damage"])
        cut = duplicate(original).eval()
        Removal(cut, graph, task).remove_(plan)
        rows[f"by MACs, multiples of {multiple}"] = cut, sum(option.damage for option in plan)
    measured = timed({name: model for name, (model, _) in rows.items()})
    return [
        {
            "plan": name,
            "asked": target,
            "faster": measured["original"].p10 / one.p10,
            "faster_median": measured["original"].median / one.median,
            "milliseconds": one.to_json(),
            "macs_ratio": macs(original) / macs(rows[name][0]),
            "predicted_damage": rows[name][1],
            "accuracy": evaluate(rows[name][0], task, task.test, reference=original).value,
            "widths": [m.out_channels for m in rows[name][0].modules() if isinstance(m, nn.Conv2d)],
            **({"seconds": round(seconds, 1)} if name == "by time" else {}),
        }
        for name, one in measured.items()
    ]


def most_within(options: list[Option], graph: Channels, damage: float) -> list[Option]:
    """The plan for the fewest MACs whose damage is within the limit."""
    best: list[Option] = []
    low, high = 0.02, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        try:
            plan = plan_channels(options, graph, macs=middle * graph.macs({}))
        except BudgetError:
            low = middle
            continue
        if sum(option.damage for option in plan) <= damage:
            best, high = plan, middle
        else:
            low = middle
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a folder with torch-pruning")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--latency", action="store_true", help="time the pruned networks, on a machine that does nothing else")
    parser.add_argument("--by-time", action="store_true", help="ask for latency, beside plans for MACs")
    parser.add_argument("--targets", type=float, nargs="+", default=[1.5, 2.0], help="of --by-time")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peer:
        sys.path.insert(0, str(given.peer))
    import small_resnet

    path = ROOT / "benchmarks" / "results" / "channels.json"
    results = json.loads(path.read_text()) if path.exists() else {"runs": []}
    found: list[dict[str, Any]] = results["runs"]
    original = small_resnet.small_resnet_trained().eval()
    if given.latency or given.by_time:
        torch.manual_seed(0)
        nets = {"small_resnet": original}
        nets["32 channels, full resolution, random weights"] = small_resnet.SmallResNet(width=32, stride=1).eval()
        task = sources.data("fashion-mnist", original).task
        if given.latency:
            results["latency"] = {name: latency(net, task, given.shares[-1]) for name, net in nets.items()}
        else:
            results["by_time"] = {
                name: [row for target in given.targets for row in by_time(net, task, target)] for name, net in nets.items()
            }
        print(json.dumps(results["latency" if given.latency else "by_time"], indent=1))
        path.write_text(json.dumps(results, indent=1) + "\n")
        return
    for seed in given.seeds:
        task = sources.data("fashion-mnist", original, seed=seed).task
        reference = evaluate(original, task, task.test, reference=original)
        for share in given.shares:
            methods = {"pared": ours, **({"torch-pruning": theirs} if given.peer else {})}
            for name, method in methods.items():
                start = time.perf_counter()
                smaller = method(original, task, share)
                seconds = time.perf_counter() - start
                n_macs = macs(smaller)
                if given.epochs:
                    smaller = tuned(smaller, task, given.epochs, seed)
                found = _add(found, seed, share, given.epochs, name, smaller, n_macs, seconds, task, original, reference)
                if given.epochs and name == "pared":
                    whole = given.epochs + small_resnet.EPOCHS
                    again = scratch(smaller, task, round(whole * macs(original) / n_macs), seed)
                    found = _add(found, seed, share, given.epochs, "Scratch-B", again, n_macs, 0.0, task, original, reference)
                path.write_text(json.dumps({**results, "accuracy": reference.value, "runs": found}, indent=1) + "\n")


def _add(
    found: list[dict[str, Any]], seed: int, share: float, epochs: int, name: str, model: nn.Module, n_macs: float,
    seconds: float, task: pared.Task, original: nn.Module, reference: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    quality = evaluate(model.eval(), task, task.test, reference=original)
    lost = drop(reference, quality, seed=seed)
    row = {
        "seed": seed, "macs_asked": share, "epochs": epochs, "method": name, "macs_ratio": macs(original) / n_macs,
        "parameters": sum(p.numel() for p in model.parameters()), "accuracy": quality.value, "drop_pp": lost.value,
        "low": lost.low, "high": lost.high, "seconds": round(seconds, 1),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    key = ("seed", "macs_asked", "epochs", "method")
    return [other for other in found if any(other[k] != row[k] for k in key)] + [row]


if __name__ == "__main__":
    main()
