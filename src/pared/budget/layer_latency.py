"""How long single layers take in a runtime on this machine: measured once, then kept. Which get slower by techniques."""

from __future__ import annotations

import copy
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pared.errors import MissingExtra, ParedError
from pared.measurement.latency import compare
from pared.place import apply
from pared.runtimes import session
from pared.site import plain
from pared.task import Task
from pared.technique import Technique

SECONDS = 1.0
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)

Call = tuple[tuple[Any, ...], dict[str, Any]]


class LatencyTable:
    """Milliseconds of single layers, by a description of the layer and what is done to it, the runtime and the machine.

    Args:
        runtime: in which they are measured.
        path: the JSON file in which the figures are kept; default: in the user's cache folder.
        threads: of the runtime; default: its own choice.
    """

    def __init__(self, runtime: str, path: Path | None = None, threads: int | None = None) -> None:
        self.runtime, self.threads = runtime, threads
        self.path = path or cache_folder() / "layer-latency.json"

    def knows(self, key: str) -> bool:
        """Whether there are figures under a key."""
        return self._full(key) in self._read()

    def get(self, key: str, measure: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        """The figures under a key, measured now if they were not before on this machine."""
        full = self._full(key)
        known = self._read()
        if full not in known:
            figures = list(measure())
            known = {**self._read(), full: figures}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(draft, self.path)
        return tuple(known[full])

    def _full(self, key: str) -> str:
        threads = "" if self.threads is None else f", {self.threads} threads"
        return f"{self.runtime} | {machine()}{threads} | {key}"

    def _read(self) -> dict[str, list[float]]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or not whole: measured anew
            return {}
        return found if isinstance(found, dict) else {}


def cache_folder() -> Path:
    """Where figures of this machine are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pared"


def machine() -> str:
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {platform.processor()} {kernels} x{os.cpu_count()}, torch {torch.__version__}"


def slower(model: nn.Module, example: Call, techniques: Sequence[Technique], table: LatencyTable) -> dict[str, tuple[float, float]]:
    """Convolutions and linear layers that take longer with the techniques than without, by path: milliseconds before, after.

    Each layer is measured alone, on values of the shape that it sees in the example.
    """
    found: dict[str, tuple[float, float]] = {}
    for path, (layer, x) in seen(plain(model).eval(), example).items():
        settings = " then ".join(map(str, techniques))
        where = "" if x.device.type == "cpu" else f" of {x.device.type}"
        key = f"{layer} on {tuple(x.shape)}{where} | {settings}"
        before, after = table.get(key, partial(_time, layer, x, techniques, table))
        if after > before:
            found[path] = before, after
    return found


def seen(model: nn.Module, example: Call) -> dict[str, tuple[nn.Module, Tensor]]:
    """Every layer that runs, by path, with the shape of what it reads (the values are random)."""
    inputs: dict[str, tuple[nn.Module, Tensor]] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, LAYERS):

            def look(layer: nn.Module, args: Any, path: str = path) -> None:
                if args and isinstance(args[0], Tensor):
                    values = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0))
                    inputs.setdefault(path, (layer, values.to(args[0].device)))

            handles.append(module.register_forward_pre_hook(look))
    with torch.no_grad():
        model(*example[0], **example[1])
    for handle in handles:
        handle.remove()
    return inputs


def _time(layer: nn.Module, x: Tensor, techniques: Sequence[Technique], table: LatencyTable) -> tuple[float, float]:
    alone = nn.Sequential(copy.deepcopy(layer)).eval()
    alone[0]._forward_pre_hooks.clear()
    task = Task([(x, x)], [(x, x)], loss=lambda outputs, _: _mean(outputs).sum(), metric=lambda outputs, _: _mean(outputs))
    try:
        changed = apply(alone, task, list(techniques))
        pair = {"before": alone, "after": changed}
        calls = {name: session(each, table.runtime, ((x,), {}), table.threads) for name, each in pair.items()}
    except MissingExtra:
        raise
    except ParedError:  # what cannot be changed or exported alone is not known to be slower
        return 0.0, 0.0
    times = compare(calls, n_runs=200, seconds=SECONDS)
    return times["before"].median, times["after"].median


def _mean(outputs: Tensor) -> Tensor:
    """One number per example, whatever a layer gives."""
    return outputs.flatten(1).mean(1)
