"""What a run of compress() works on and with: the network, its data, what is asked, and where results are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pared.budget.layer_latency import LatencyTable
from pared.budget.target import Target
from pared.graph import Program
from pared.measurement import example_batch
from pared.place import Progress
from pared.recipe import Recipe, Step
from pared.runfolder import RunFolder
from pared.task import Task
from pared.technique import Edit, Option, Technique


@dataclass(eq=False)
class Job:
    """One run.

    Args:
        original: the network as it came, in eval mode.
        teachers: what is distilled from.
        base: a copy to work on, whose reparametrised weights are plain.
        bakes: the edits that did this.
        program: of the base; None where it has no graph, and so no file of it a program.
        task: data, loss and metric.
        recipe: what may be done.
        asked: the budget as it was written.
        target: the budget in numbers.
        example: one call of the network.
        original_bytes: its size.
        total_macs: multiply-adds per example; 0 where nothing asks for them.
        train: whether training is allowed.
        seed: of everything random.
        store: how the file's coder chooses.
        folder: keeps what is done so far.
        progress: is told what is being done.
        command: the command line, if there was one.
        started: when the run began, by `time.perf_counter`.
        warnings: what the report must say.
        seconds: what each phase took.
    """

    original: nn.Module
    teachers: list[nn.Module]
    base: nn.Module
    bakes: list[Edit]
    program: Program | None
    task: Task
    recipe: Recipe
    asked: dict[str, Any]
    target: Target
    example: tuple[tuple[Any, ...], dict[str, Any]]
    original_bytes: int
    total_macs: float
    train: bool
    seed: int
    store: str
    folder: RunFolder
    progress: Progress
    command: str | None
    started: float
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> list[Step]:
        """The steps among whose candidates is chosen."""
        return self.recipe.parts()[1]

    @property
    def after(self) -> list[Technique]:
        """What acts on the whole network after all of them."""
        return self.recipe.parts()[2]

    @property
    def trains(self) -> bool:
        """Whether any step is to be trained."""
        return self.train and any(step.training and step.training.epochs for step in self.steps)

    @cached_property
    def one(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call of the network with one example, for latency."""
        return self.task.call(self.original, example_batch(self.task, 1))

    @property
    def aside(self) -> Path | None:
        """Where matrices wait that are too many for the memory."""
        return self.folder.file("state/statistics.safetensors").parent if self.folder else None

    @property
    def table(self) -> LatencyTable:
        """How long layers take in the runtime that is asked for, with as many threads as torch has."""
        return LatencyTable(self.target.runtime, threads=torch.get_num_threads())

    def resolved(self, levels: Sequence[Sequence[Option]]) -> str:
        """The recipe with every choice resolved, and what was chosen where."""
        import yaml

        whole = self.recipe.to_dict()
        whole["budget"] = {key: value for key, value in self.asked.items() if value is not None}
        chosen: dict[str, list[str]] = {}
        for level in levels:
            for option in level:
                chosen.setdefault(str(option.technique), []).append(option.site.path)
        text = yaml.safe_dump(whole, sort_keys=False, default_flow_style=None, width=110)
        lines = [f"#   {technique}: {', '.join(paths)}" for technique, paths in chosen.items()]
        return "\n".join([f"# seed {self.seed}; chosen:", *lines, text])

    def timed(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives; its time is kept under this name."""
        self.progress({"phase": name})
        start = time.perf_counter()
        value = make()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return value

    def say(self, text: str) -> None:
        """A line for the log and for whoever watches."""
        self.folder.log(text)
        self.progress({"say": text})
