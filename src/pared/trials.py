"""Plans carried out: built or trained, weighed as a file, verified on validation data. A trial done is kept and found again."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pared import artifact, registry
from pared.budget.allocate import Plan
from pared.budget.biases import place_on_network
from pared.budget.calibrate import gather
from pared.budget.channels import Layer, Removal, partly
from pared.budget.drift import follow_
from pared.budget.gates import absorb_, closed, gated
from pared.budget.layer_latency import slower
from pared.budget.observe import observe
from pared.budget.options import Offers
from pared.graph.channels import Channels
from pared.job import Job
from pared.measurement.quality import Drop, Quality, drop, evaluate
from pared.place import Progress, place, place_buffers_, relax_, relax_network_, settle_
from pared.recipe import Step, Training
from pared.record import Record, attach_, record_of
from pared.site import Decoded, duplicate, plain
from pared.statistics import Statistics
from pared.task import Task
from pared.technique import Edit, Option, Technique
from pared.train import train as train_loop


@dataclass(frozen=True, eq=False)
class Level:
    """What one step does.

    Args:
        options: the chosen ones.
        graph: of the channels, where the step removes some.
        found: all options of such a step.
        statistics: after it; None where they grow by what the new parts see.
    """

    options: tuple[Option, ...]
    graph: Channels | None = None
    found: tuple[Option, ...] = ()
    statistics: Statistics | None = None


@dataclass(frozen=True, eq=False)
class Way:
    """One way through the steps before the last, and what the last step may do after it.

    Args:
        levels: what each of those steps does.
        options: of the last step.
        model: the network with the levels in place.
        statistics: for it.
        fixed_bits: of what no option covers.
        macs: of the model, per example; 0 where nothing asks for them.
        graph: of its channels, where the last step removes some.
        layers: how long each takes as a function of what the groups keep, where latency is asked for.
        offers: where more options come from.
    """

    levels: tuple[Level, ...]
    options: list[Option]
    model: nn.Module
    statistics: Statistics
    fixed_bits: float
    macs: float = 0.0
    graph: Channels | None = None
    layers: Sequence[Layer] = ()
    offers: Offers | None = None

    @property
    def damage(self) -> float:
        return sum(option.damage for level in self.levels for option in level.options)


@dataclass
class Trial:
    """One plan, carried out and verified on validation data."""

    number: int
    trained: bool
    model: nn.Module
    edits: list[Edit]
    way: Way
    plan: Plan
    file_bytes: int
    quality: Quality
    drop: Drop
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def chosen(self) -> list[Option]:
        """What was done, by all steps in order."""
        return [option for level in self.levels for option in level]

    @property
    def levels(self) -> list[tuple[Option, ...]]:
        """The same, step by step."""
        return [*(level.options for level in self.way.levels), self.plan.options]

    def row(self, accepted: bool) -> dict[str, Any]:
        return {
            "bytes": self.file_bytes,
            "predicted_damage": self.plan.damage,
            "metric": self.quality.value,
            "drop_pp": self.drop.value,
            "standard_error": self.drop.standard_error,
            "accepted": accepted,
            "epochs": len(self.history),
            "seconds": self.seconds,
        }


class Trials:
    """Carries plans out, one after the other, and keeps what came of them.

    Args:
        job: the run.
        statistics: of its base.
        reference: the original's quality on validation data.
    """

    def __init__(self, job: Job, statistics: Statistics, reference: Quality) -> None:
        self.job, self.statistics, self.reference = job, statistics, reference
        self.done: list[Trial] = []
        self.correction = 1.0
        """Bytes of the last file over the bytes that its plan predicted."""

    def carry_out(self, way: Way, plan: Plan, trained: bool) -> Trial:
        """Do what the plan says, with training or without, and see what comes of it."""
        number = len(self.done) + 1
        start = time.perf_counter()
        model = duplicate(self.job.base)
        edits = list(self.job.bakes)
        history: list[dict[str, Any]] = []
        statistics = self.statistics.copy()
        saved = self._saved(number)
        levels = [*way.levels, Level(plan.options, way.graph, tuple(way.options))]
        predicted = plan.cost.stored_bits + way.fixed_bits
        n_edits = sum(len(level.options) for level in levels)
        self.job.say(
            f"trial {number}: {n_edits} edits, {self.correction * predicted / 8e3:.1f} kB expected"
            f"{', training' if trained else ''}"
        )
        if saved is not None:
            model, edits, history = saved
        else:
            after = [technique.leaving(self._slower(plan.options)) for technique in self.job.after]
            training = [trained and step.training is not None and step.training.epochs > 0 for step in self.job.steps]
            last = max((i for i, level in enumerate(levels) if training[i] and level.graph is None), default=-1)
            along: list[Edit] = []
            for index, (step, level) in enumerate(zip(self.job.steps, levels, strict=True)):
                trains = training[index]
                learns = trains and step.learns and bool(level.options)
                if learns:
                    is_last = index == len(levels) - 1
                    new, rows = self._learned(model, level, statistics, step, number * 100 + index, is_last)
                elif level.graph is not None:
                    new, rows = self._cut(model, level, step, number * 100 + index, trains)
                elif trains:
                    network = [technique for technique in after if technique.in_training and index == last]
                    new, rows, along = self._trained(model, level.options, statistics, step, number * 100 + index, network)
                else:
                    follow_(model, level.options, statistics, self.job.task, self.job.progress)
                    new, rows = place(model, level.options, statistics), []
                edits += new
                history += rows
                if learns and not is_last:  # other channels are left than when the plan was made
                    statistics = gather(
                        plain(model), self.job.task, seed=self.job.seed, progress=self.job.progress, folder=self.job.aside
                    )
                elif level.statistics is not None:
                    statistics = level.statistics.copy()
            model.eval()
            edits += along
            for technique in after:
                if technique not in [edit.technique for edit in along]:
                    edits += over_the_network(model, technique, self.job.task, self.job.example, self.job.progress)
        attach_(model, self._record(edits, [level.options for level in levels]))
        file_bytes = self._weigh(model, number)
        self.correction = 8 * file_bytes / max(predicted, 1.0)
        quality = quality_of(model, self.job)
        trial = Trial(
            number, trained, model, edits, way, plan, file_bytes, quality,
            drop(self.reference, quality, seed=self.job.seed), history, time.perf_counter() - start,
        )
        self.done.append(trial)
        for module in model.modules():  # trials stay in memory in their small form
            if isinstance(module, Decoded):
                module.forget_()
        if self.job.folder:
            self.job.folder.memo(f"trial-{number}", lambda: {"history": history})
        self.job.say(
            f"trial {number}: {file_bytes / 1e3:.1f} kB ({self.job.original_bytes / file_bytes:.1f}x), "
            f"drop {trial.drop} on validation"
        )
        return trial

    def _slower(self, options: Sequence[Option]) -> list[str]:
        """Layers that the techniques of this plan make slower in the runtime that is asked for; none where none is."""
        target = self.job.target
        if target.speedup is None:
            return []
        used = list(dict.fromkeys(option.technique for option in options if option.technique is not None))
        found = slower(self.job.base, self.job.one, [*used[:1], *self.job.after], self.job.table)
        for path, (before, after) in found.items():
            self.job.say(f"{path} stays as it is: {after:.3f} ms instead of {before:.3f} ms in {target.runtime}")
        return list(found)

    def _record(self, edits: list[Edit], levels: Sequence[Sequence[Option]]) -> Record:
        facts = {"original_bytes": self.job.original_bytes}
        return Record(edits=edits, example=self.job.example, recipe=self.job.resolved(levels), provenance=facts)

    def _trained(
        self, model: nn.Module, level: Sequence[Option], statistics: Statistics, step: Step, number: int,
        network: Sequence[Technique],
    ) -> tuple[list[Edit], list[dict[str, Any]], list[Edit]]:  # fmt: skip
        """Train stand-ins, let them settle, tune what is left to train with the codes frozen, code the buffers; in between,
        what acts on the whole network along with it is in force. Its edits come apart: they are the last of all."""
        trainable_(model)
        relax_(model, level, statistics)
        seen = observe(model.eval(), self.job.task, network, self.job.example) if network else Statistics()
        relaxed = [relax_network_(model, technique, seen) for technique in network]
        along = [edit for edit in relaxed if edit is not None]
        training = self._training(step)
        rows = self._train(model, step, number, 0, training.epochs, training.learning_rate, training.anneal_until)
        edits = settle_(model, level, statistics)
        rows += self._tuned(model, step, number)
        model.eval()
        for edit in along:
            edit.technique.settle(model)
        edits += place_buffers_(model, level, statistics)
        return edits, rows, along

    def _cut(
        self, model: nn.Module, level: Level, step: Step, number: int, trains: bool
    ) -> tuple[list[Edit], list[dict[str, Any]]]:
        """Remove channels; trained: in rounds on a cubic schedule (Zhu & Gupta 2017, arXiv:1710.01878), with recovery after
        each."""
        if level.graph is None:
            raise ValueError("a step that removes channels needs a graph of them")
        removal = Removal(model, level.graph, self.job.task)
        if not trains:
            return removal.remove_(level.options), []
        training = self._training(step)
        edits: list[Edit] = []
        rows: list[dict[str, Any]] = []
        for part in range(training.rounds):
            progress = 1 - (1 - (part + 1) / training.rounds) ** 3
            edits += removal.remove_(partly(level.options, level.found, progress))
            trainable_(model)
            epochs = training.epochs // training.rounds + (part < training.epochs % training.rounds)
            rows += self._train(model, step, number, part, epochs, training.learning_rate, 1.0)
        return edits, rows

    def _learned(
        self, model: nn.Module, level: Level, statistics: Statistics, step: Step, number: int, is_last: bool
    ) -> tuple[list[Edit], list[dict[str, Any]]]:
        """Train with gates, cut what they closed, tune what is left. Before other steps, every group keeps as many channels as
        was planned, since those were planned for the numbers."""
        if level.graph is None:
            raise ValueError("a step that removes channels needs a graph of them")
        training, target = self._training(step), self.job.target
        asked = {"macs": target.macs is not None or target.speedup is not None, "bits": target.file_bytes is not None}
        measures = [name for name, is_asked in asked.items() if is_asked] or ["bits"]
        twin, gates = gated(model, level.graph, level.options, level.found, statistics, measures, exactly=not is_last)
        trainable_(twin)
        rows = self._train(twin, step, number, 0, training.epochs, training.learning_rate, training.anneal_until)
        absorb_(model, twin)
        edits = Removal(model, level.graph, self.job.task).remove_(closed(gates, level.graph, level.found))
        trainable_(model)
        return edits, rows + self._tuned(model, step, number)

    def _tuned(self, model: nn.Module, step: Step, number: int) -> list[dict[str, Any]]:
        """The passes that follow, at a quarter of the rate."""
        training = self._training(step)
        tune = training.tune_epochs if training.tune_epochs is not None else max(1, training.epochs // 3)
        quarter = training.learning_rate / 4 if training.learning_rate else None
        return self._train(model, step, number, 1, tune, training.tune_learning_rate or quarter, 1.0)

    @staticmethod
    def _training(step: Step) -> Training:
        if step.training is None:
            raise ValueError("a step without training cannot be trained")
        return step.training

    def _train(
        self, model: nn.Module, step: Step, number: int, part: int, epochs: int, rate: float | None, anneal_until: float
    ) -> list[dict[str, Any]]:
        """One training of a step, towards the original."""
        if not epochs:
            return []
        training = self._training(step)
        history = train_loop(
            model,
            self.job.task,
            epochs=epochs,
            losses=list(step.losses) or [registry.get("distill.logits")()],
            teacher=self.job.teachers,
            learning_rate=rate,
            task_weight=1.0 if training.hard else None,
            anneal_until=anneal_until,
            ema=training.average or None,
            keep_best=training.keep_best,
            validate=lambda m: quality_of(m, self.job).value,
            seed=self.job.seed,
            step=2 * number + part,
            checkpoint=self.job.folder.file(f"state/training-{number}-{part}") if self.job.folder else None,
            progress=self.job.progress,
        )
        return [{"step": number, "part": part, **row} for row in history.to_json()["epochs"]]

    def _saved(self, number: int) -> tuple[nn.Module, list[Edit], list[dict[str, Any]]] | None:
        """The model of a trial that an interrupted run has finished."""
        if not self.job.folder:
            return None
        path = self.job.folder.file(f"state/trial-{number}.pared")
        note = self.job.folder.file(f"state/trial-{number}.json")
        if not (path.exists() and note.exists()):
            return None
        model = artifact.load(path, duplicate(self.job.original))
        record = record_of(model)
        if record is None:
            return None
        return model.eval(), list(record.edits), json.loads(note.read_text(encoding="utf-8"))["history"]

    def _weigh(self, model: nn.Module, number: int) -> int:
        if self.job.folder:
            path = self.job.folder.file(f"state/trial-{number}.pared")
            artifact.save(model, path, store=self.job.store, program=self.job.program is not None)
            return path.stat().st_size
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pared"
            artifact.save(model, path, store=self.job.store, program=self.job.program is not None)
            return path.stat().st_size


def over_the_network(
    model: nn.Module, technique: Technique, task: Task, example: tuple[tuple[Any, ...], dict[str, Any]], progress: Progress
) -> list[Edit]:
    """Let a technique act on the whole network, in place; where there is nothing for it to do, that is said."""
    edits, refusals = place_on_network(model, technique, observe(model, task, [technique], example), task)
    for refusal in refusals:
        progress({"say": f"{technique}: {refusal.reason}"})
    return edits


def quality_of(model: nn.Module, job: Job) -> Quality:
    """On validation data."""
    model.eval()
    return evaluate(model, job.task, job.task.val, reference=job.original)


def trainable_(model: nn.Module) -> None:
    """Let gradients reach every parameter."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
