"""compress(): one budget over all techniques. Options, plan, training, measuring, in this order; resumable."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import pared
from pared import artifact, registry
from pared import recipe as recipes
from pared.budget import damage
from pared.budget.allocate import Plan, allocate, curve, smallest
from pared.budget.calibrate import gather
from pared.budget.layer_latency import LatencyTable, slower
from pared.budget.observe import observe
from pared.budget.options import fixed_bits, options
from pared.budget.target import Target, parse_drop, parse_latency, parse_macs, parse_size
from pared.errors import BudgetError, InputError
from pared.measurement import Measurement, measure
from pared.measurement.compute import compute
from pared.measurement.latency import compare
from pared.measurement.quality import Drop, Quality, drop, evaluate
from pared.measurement.size import original_bytes
from pared.place import (
    Progress,
    Refusal,
    check_finite,
    place,
    place_buffers_,
    place_everywhere,
    prepared,
    relax_,
    settle_,
)
from pared.recipe import Recipe, Step
from pared.record import Record, attach_, record_of
from pared.report import report as write_report
from pared.runfolder import RunFolder, write_whole
from pared.runtimes import session
from pared.site import Decoded, duplicate, plain
from pared.statistics import Statistics
from pared.task import Task, batch_size, in_order
from pared.technique import Edit, Option, Technique, as_numpy, value_at
from pared.train import train as train_loop

MAX_TRIALS = 6
"""How many plans are trained and verified at most while the accepted drop is used up."""
MAX_CHEAP_TRIALS = 16
"""The same for plans that need no training."""
SIZE_TOLERANCE = 0.01
"""A plan this close below the size asked for is close enough."""


@dataclass(frozen=True, eq=False)
class Way:
    """One way through the steps before the last, and what the last step may do after it.

    Args:
        levels: what each of those steps does.
        options: of the last step.
        model: the network with the levels in place.
        statistics: for it.
        fixed_bits: of what no option covers.
    """

    levels: tuple[tuple[Option, ...], ...]
    options: list[Option]
    model: nn.Module
    statistics: Statistics
    fixed_bits: float

    @property
    def damage(self) -> float:
        return sum(option.damage for level in self.levels for option in level)


@dataclass
class Trial:
    """One plan, carried out and verified on validation data."""

    number: int
    target_bytes: float
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

    def row(self, accepted: bool) -> dict[str, Any]:
        return {
            "bytes": self.file_bytes,
            "predicted_damage": self.plan.damage,
            "metric": self.quality.value,
            "drop_pp": self.drop.value,
            "accepted": accepted,
            "epochs": len(self.history),
            "seconds": self.seconds,
        }


@dataclass
class Result:
    """What compress() found.

    Args:
        model: the compressed model, in eval mode; `pared.save` writes it, `save` does, too.
        edits: what was done, in order.
        before, after: measurements of the original and of the compressed model on the test data.
        refusals: sites that techniques left alone, with reasons.
        met: whether the whole budget is met.
        data: everything that the report shows, with the keys of docs/report.md.
    """

    model: nn.Module
    edits: list[Edit]
    before: Measurement
    after: Measurement
    refusals: list[Refusal]
    met: bool
    data: dict[str, Any]
    store: str = "smallest"

    def save(self, path: str | Path) -> None:
        """Write the compressed model as one file."""
        artifact.save(self.model, path, store=self.store)

    def report(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML page."""
        write_report(self.data, path)


def compress(
    model: nn.Module,
    task: Task,
    recipe: str | Path | dict[str, Any] | Recipe | None = None,
    size: str | float | None = None,
    macs: str | float | None = None,
    latency: str | None = None,
    max_drop: float | None = None,
    train: bool = True,
    out: str | Path | None = None,
    seed: int = 0,
    *,
    store: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result:
    """Make a trained model smaller within a budget, and measure what it costs.

    Args:
        model: a trained network; it is not changed.
        task: its data, loss and metric.
        recipe: a YAML file, the name of a shipped recipe, or a dict; None is the default recipe.
        size: of the whole file: "20x", "5%", "1.2MB".
        macs: multiply-adds: "2x", "50%", "300M".
        latency: "3x" or "3x@onnxruntime".
        max_drop: accepted drop of the metric in points; alone, it asks for the smallest file within it.
        train: recover by distillation from the original; False: post-training only.
        out: folder for the results and for going on after an interruption.
        seed: of everything random.
        store: how the file's coder chooses, instead of the recipe's word.
        progress: called with dicts that tell what is being done.
        command: the command line, for the report.

    Raises:
        InputError: model, data or recipe cannot be used; one line says why.
        BudgetError: even the smallest plan is above the budget; it was carried out, and the error's `result` holds it.
    """
    return _Run(model, task, recipe, size, macs, latency, max_drop, train, out, seed, store, progress, command).compress()


class _Run:
    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Any,
        size: Any,
        macs: Any,
        latency: Any,
        max_drop: Any,
        train: bool,
        out: Any,
        seed: int,
        store: str | None,
        progress: Progress | None,
        command: str | None,
    ) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.recipe = recipes.load(recipe)
        self.store = store or self.recipe.store
        budget = self.recipe.budget
        self.asked = {
            "size": size if size is not None else budget.get("size"),
            "macs": macs if macs is not None else budget.get("macs"),
            "latency": latency if latency is not None else budget.get("latency"),
            "max_drop": max_drop if max_drop is not None else budget.get("max_drop"),
        }
        self.asked = {key: getattr(value, "item", lambda value=value: value)() for key, value in self.asked.items()}
        if all(value is None for value in self.asked.values()):
            self.asked["max_drop"] = 0.5
        self.task, self.train, self.seed, self.command = task, train, seed, command
        self.progress = progress or (lambda event: None)
        if record_of(model) is not None:
            raise InputError("compress takes an original model, got one that pared has compressed; give it the original")
        check_finite(model)
        task.check(model)
        self.original = duplicate(model).eval().requires_grad_(False)
        self.base, self.bakes = prepared(model)
        self.before, self.steps, self.after = self.recipe.parts()
        self.example = task.example(self.original)
        for technique in self.before:
            self.bakes += self._over_the_network(self.base, technique)
        _trainable_(self.base)
        self.original_bytes = original_bytes(self.original)
        self.target = self._target()
        self.folder = RunFolder(out, self._identity())
        self.correction = 1.0
        self.trials: list[Trial] = []

    def _over_the_network(self, model: nn.Module, technique: Technique) -> list[Edit]:
        """Let a technique act on the whole network, in place; where there is nothing for it to do, that is said."""
        edits, refusals = place_everywhere(model, technique, observe(model, self.task, [technique], self.example))
        for refusal in refusals:
            self.progress({"say": f"{technique}: {refusal.reason}"})
        return edits

    # -- what is asked -------------------------------------------------------------------------------------------------

    def _target(self) -> Target:
        speedup, runtime = parse_latency(self.asked["latency"]) if self.asked["latency"] else (None, "torch")
        total_macs = 0.0
        if self.asked["macs"] is not None or speedup is not None:
            batch = next(in_order(self.task.val))
            args, kwargs = self.example
            total_macs = compute(self.original, args, kwargs).macs / batch_size(batch)
            if speedup is not None:
                session(self.original, runtime, (args, kwargs))  # a runtime that is missing is said at once
        self.total_macs = total_macs
        return Target(
            parse_size(self.asked["size"], self.original_bytes) if self.asked["size"] is not None else None,
            parse_macs(self.asked["macs"], total_macs) if self.asked["macs"] is not None else None,
            speedup,
            runtime,
            parse_drop(self.asked["max_drop"]) if self.asked["max_drop"] is not None else None,
        )

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path, tensor in [*self.original.named_parameters(), *self.original.named_buffers()]:
            digest.update(path.encode())
            digest.update(as_numpy(tensor).tobytes())
        return {
            "pared": pared.__version__,
            "recipe": self.recipe.to_dict()["steps"],
            "store": self.store,
            "budget": self.asked,
            "train": self.train,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "metric": self.task.metric_name,
            "data": self._data_digest(),
            "model": digest.hexdigest(),
        }

    def _data_digest(self) -> str:
        """Of the first batch of every loader, in evaluation order."""
        digest = hashlib.sha256()
        for loader in (self.task.train, self.task.val, self.task.test):
            batch = next(in_order(loader), None) if loader is not None else None
            for leaf in tree_leaves(batch):
                digest.update(as_numpy(leaf).tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
        return digest.hexdigest()

    # -- the order of the diagram --------------------------------------------------------------------------------------

    def compress(self) -> Result:
        self._say(f"budget: {', '.join(f'{k} {v}' for k, v in self.asked.items() if v is not None)}")
        self._say(f"recipe:\n{self.recipe.to_yaml()}")
        self.reference = self._timed("evaluate", lambda: self._evaluate(self.original))
        self.statistics = self._timed("calibrate", self._gather)
        if not self.steps:
            raise InputError("a recipe must have at least one step that replaces something, got none; add quantize.integer")
        self._estimate(self.steps)
        try:
            best, met, reason = self._search()
        except BudgetError as error:
            # the best found is saved all the same, and said: the smallest within the drop, or the smallest there is
            self.warnings.append(str(error))
            within = self._within_drop(None) if self.target.max_drop is not None and self.target.speedup is None else None
            best = within or self._carry_out(self._smallest_plan(), 0.0, trained=False)
            error.result = self._finish(best, False)  # type: ignore[attr-defined]
            raise
        if reason:
            self.warnings.append(reason)
            warnings.warn(reason, stacklevel=3)
        return self._finish(best, met)

    def _gather(self) -> Statistics:
        from pared.budget import calibrate

        if self.folder:
            path = self.folder.file("state/statistics.safetensors")
            if path.exists():
                return calibrate.load(path)
        statistics = gather(plain(self.base), self.task, seed=self.seed, progress=self.progress)
        if self.folder:
            write_whole(path, lambda temporary: calibrate.save(statistics, temporary))
            return calibrate.load(path)  # the same numbers whether the run was interrupted or not
        return statistics

    def _estimate(self, steps: Sequence[Step]) -> None:
        """Say how long it will take, from one timed batch and the number of candidates."""
        batch = next(iter(self.task.val))
        start = time.perf_counter()
        with torch.no_grad():
            self.task.outputs(self.original, batch)
        forward = (time.perf_counter() - start) / batch_size(batch)
        numel = sum(p.numel() for p in self.base.parameters())
        n_candidates = sum(len(step.candidates) for step in steps)
        fitting = numel * n_candidates * 4e-7
        n_val = sum(batch_size(b) for b in self.task.val)
        per_trial = n_val * forward
        epochs = sum((s.training.epochs + (s.training.tune_epochs or s.training.epochs // 3)) for s in steps if s.training)
        text = f"about {_duration(fitting + 4 * per_trial)} for {n_candidates} candidates per site"
        if self.train and epochs:
            n_train = _length(self.task)
            text += f", then {_duration(epochs * n_train * forward * 4)} for each of 1 to {MAX_TRIALS} trainings of {epochs} epochs"
        self._say(f"estimate: {text}")

    # -- options and plans ---------------------------------------------------------------------------------------------

    @cached_property
    def ways(self) -> list[Way]:
        """Every way through the steps; one, if there is one step."""
        return self._timed("options", lambda: list(self._explore(0, self.base, self.statistics, ())))

    def _explore(
        self, index: int, model: nn.Module, statistics: Statistics, levels: tuple[tuple[Option, ...], ...]
    ) -> Iterator[Way]:
        found, refusals = options(model, list(self.steps[index].candidates), statistics, self.task, progress=self.progress)
        if index == 0:
            self.refusals = refusals
            self.first_options = found
        if index == len(self.steps) - 1:
            covered = {path for option in found for path in option.site.covers}
            yield Way(levels, found, model, statistics, fixed_bits(model, covered))
            return
        for level in _levels(found):
            twin, grown = copy.deepcopy(model), statistics.copy()
            place(twin, level, grown)
            yield from self._explore(index + 1, twin, grown, (*levels, level))

    def _plan(self, file_bytes: float | None, macs: float | None) -> tuple[Way, Plan]:
        """The least damage within a budget, over all ways through the steps."""
        found: list[tuple[Way, Plan]] = []
        failure: BudgetError | None = None
        for way in self.ways:
            limits: dict[str, float] = {}
            if file_bytes is not None:
                limits["size_bits"] = 8 * file_bytes / self.correction - way.fixed_bits
            if macs is not None:
                dense = sum(option.cost.macs for option in self.first_options if option.technique is None)
                limits["macs"] = macs - max(0.0, self.total_macs - dense)
            try:
                found.append((way, allocate(way.options, **limits)))
            except BudgetError as error:
                failure = error
        if not found:
            raise failure or BudgetError("no plan was found")
        return min(found, key=lambda pair: pair[0].damage + pair[1].damage)

    def _smallest_plan(self) -> tuple[Way, Plan]:
        lighter = self.target.file_bytes is None and (self.target.macs is not None or self.target.speedup is not None)
        measure_name = "macs" if lighter else "stored_bits"
        plans = [(way, smallest(way.options, measure_name)) for way in self.ways]
        return min(plans, key=lambda pair: pair[0].fixed_bits + getattr(pair[1].cost, measure_name))

    # -- trials --------------------------------------------------------------------------------------------------------

    def _search(self) -> tuple[Trial, bool, str]:
        """The trial to keep, whether the budget is met, and what is to be said if it is not."""
        target = self.target
        if target.speedup is not None:
            return self._search_latency()
        if target.max_drop is None:
            best = self._at_size(target.file_bytes, target.macs, self._trains)
            return best, True, ""
        if target.file_bytes is not None or target.macs is not None:
            best = self._at_size(target.file_bytes, target.macs, trained=False)
            if self._trains and best.drop.value > target.max_drop / 2:  # near the limit, luck on validation data decides
                best = self._at_size(target.file_bytes, target.macs, trained=True)
            if self._accepts(best):
                return best, True, ""
            if target.file_bytes is None:
                return best, False, self._miss(best)
            fallback = self._within_drop(target.file_bytes)
            return (fallback, False, self._miss(fallback, best)) if fallback else (best, False, self._miss(best))
        best_within = self._within_drop(None)
        if best_within is None:
            if not self.trials:
                raise BudgetError("no plan makes the file smaller than the original; add techniques to the recipe")
            worst = min(self.trials, key=lambda trial: trial.drop.value)
            return worst, False, self._miss(worst)
        return best_within, True, ""

    @property
    def _trains(self) -> bool:
        return self.train and any(step.training and step.training.epochs for step in self.steps)

    def _accepts(self, trial: Trial) -> bool:
        return self.target.max_drop is None or trial.drop.value <= self.target.max_drop + 1e-9

    def _at_size(self, file_bytes: float | None, macs: float | None, trained: bool) -> Trial:
        """A trial whose file is within the size: the estimate is corrected by what files of earlier trials weighed."""
        fitting: list[Trial] = []
        aim, before = file_bytes, None
        for _ in range(4):
            chosen = self._plan(aim, macs)
            if before is not None and chosen[0] is before[0] and chosen[1].options == before[1].options:
                break
            before = chosen
            trial = self._carry_out(chosen, aim or 0.0, trained=False)
            if file_bytes is None or trial.file_bytes <= file_bytes:
                fitting.append(trial)
            if file_bytes is None or self._fits(trial, file_bytes):
                break
            aim = file_bytes * (1 - SIZE_TOLERANCE / 2)
        for shrink in (0.9, 0.84) if trained else ():  # training spreads the codes: files grow by up to a tenth
            aim = file_bytes * shrink if file_bytes is not None else None
            try:
                trial = self._carry_out(self._plan(aim, macs), aim or 0.0, trained=True)
            except BudgetError:
                break
            if file_bytes is None or trial.file_bytes <= file_bytes:
                fitting.append(trial)
                break
        if fitting:
            return min(fitting, key=lambda trial: trial.drop.value)
        nearest = min(self.trials, key=lambda trial: trial.file_bytes)
        worst = ", ".join(option.site.path for option in self._largest(nearest))
        raise BudgetError(
            f"the plan nearest to the budget needs {nearest.file_bytes / 1e6:.3g} MB but the budget is "
            f"{(file_bytes or 0) / 1e6:.3g} MB; raise the budget, or add a smaller option to: {worst}"
        )

    @staticmethod
    def _largest(trial: Trial, n: int = 3) -> list[Option]:
        return sorted(trial.plan.options, key=lambda option: -option.cost.stored_bits)[:n]

    def _fits(self, trial: Trial, file_bytes: float) -> bool:
        return trial.file_bytes <= file_bytes and (
            trial.file_bytes >= file_bytes * (1 - 4 * SIZE_TOLERANCE) or trial.plan.damage <= 0
        )

    def _within_drop(self, at_least: float | None) -> Trial | None:
        """The smallest trial within the accepted drop; first without training, then with it where that is allowed."""
        low = max(self._smallest_bytes(), at_least or 0.0)
        high = max(float(self.original_bytes), 1.1 * low)
        best, low, high = self._bisect(low, high, trained=False, n=MAX_CHEAP_TRIALS, best=None)
        if self._trains:
            # training reaches further down than the plan without it: go on from there
            top = float(best.file_bytes) if best else high
            bottom = max(top / 16, self._smallest_bytes(), at_least or 0.0)
            best, _, _ = self._bisect(bottom, top, trained=True, n=MAX_TRIALS, best=best, start=top / 2.5)
        return best

    def _bisect(
        self, low: float, high: float, *, trained: bool, n: int, best: Trial | None, start: float | None = None
    ) -> tuple[Trial | None, float, float]:
        """Bisection of the size on a logarithmic scale between one that is too small and one that is large enough."""
        for step in range(n):
            if high / low < (1.06 if trained else 1.03):
                break
            aim = max(low, start) if step == 0 and start is not None else math.sqrt(low * high)
            try:
                trial = self._carry_out(self._plan(aim, self.target.macs), aim, trained)
            except BudgetError:
                low = aim
                continue
            if self._accepts(trial):
                if best is None or trial.file_bytes < best.file_bytes:
                    best = trial
                high = min(aim, float(trial.file_bytes))
            else:
                low = aim
            if high <= low:
                break
        return best, low, high

    def _smallest_bytes(self) -> float:
        sizes = [way.fixed_bits + smallest(way.options).cost.stored_bits for way in self.ways]
        return 1.02 * self.correction * min(sizes) / 8

    def _search_latency(self) -> tuple[Trial, bool, str]:
        wanted = self.target.speedup or 1.0
        macs = self.target.macs or self.total_macs / wanted
        trial, speedup = None, 0.0
        if self.after and self.target.file_bytes is None:  # integers are faster at the same number of MACs
            plans = [(way, smallest(way.options)) for way in self.ways]
            chosen = min(plans, key=lambda pair: pair[0].fixed_bits + pair[1].cost.stored_bits)
            trial = self._carry_out(chosen, 0.0, trained=False)
            speedup = self.folder.memo(f"speedup-{trial.number}", partial(self._speedup, trial.model))
            self._say(f"{speedup:.2f}x faster in {self.target.runtime} at all of the MACs")
            if speedup >= wanted:
                return trial, self._accepts(trial), "" if self._accepts(trial) else self._miss(trial)
        for _ in range(4):
            trial = self._at_size(self.target.file_bytes, macs, trained=False)
            speedup = self.folder.memo(f"speedup-{trial.number}", partial(self._speedup, trial.model))
            self._say(f"{speedup:.2f}x faster in {self.target.runtime} at {macs / self.total_macs:.0%} of the MACs")
            if speedup >= wanted:
                break
            macs *= max(0.5, 0.95 * speedup / wanted)
        if trial is None:
            raise BudgetError("no plan was found")
        if self._trains:
            trial = self._at_size(self.target.file_bytes, macs, trained=True)
        met = speedup >= wanted and self._accepts(trial)
        reason = "" if met else (
            f"the budget is not met: {speedup:.2f}x faster in {self.target.runtime} (asked {wanted:g}x), "
            f"drop {trial.drop.value:.2f}; the best found is kept"
        )
        return trial, met, reason

    def _speedup(self, model: nn.Module) -> float:
        pair = {"original": self.original, "compressed": model}
        times = compare({name: session(each, self.target.runtime, self.example) for name, each in pair.items()})
        return times["original"].median / times["compressed"].median

    def _carry_out(self, chosen: tuple[Way, Plan], target_bytes: float, trained: bool) -> Trial:
        way, plan = chosen
        number = len(self.trials) + 1
        start = time.perf_counter()
        model = copy.deepcopy(self.base)
        edits = list(self.bakes)
        history: list[dict[str, Any]] = []
        statistics = self.statistics.copy()
        saved = self._saved(number)
        levels = [*way.levels, plan.options]
        predicted = plan.cost.stored_bits + way.fixed_bits
        self._say(
            f"trial {number}: {sum(map(len, levels))} edits, {self.correction * predicted / 8e3:.1f} kB expected"
            f"{', training' if trained else ''}"
        )
        if saved is not None:
            model, edits, history = saved
        else:
            for index, (step, level) in enumerate(zip(self.steps, levels, strict=True)):
                if trained and step.training is not None and step.training.epochs:
                    new, rows = self._trained(model, level, statistics, step, number * 100 + index)
                    history += rows
                else:
                    new = place(model, level, statistics)
                edits += new
            model.eval()
            for technique in self.after:
                edits += self._over_the_network(model, technique.leaving(self._slower(plan.options)))
        attach_(model, self._record(edits, levels))
        file_bytes = self._weigh(model, number)
        self.correction = 8 * file_bytes / max(predicted, 1.0)
        quality = self._evaluate(model)
        trial = Trial(
            number, target_bytes, trained, model, edits, way, plan, file_bytes, quality,
            drop(self.reference, quality, seed=self.seed), history, time.perf_counter() - start,
        )
        self.trials.append(trial)
        for module in model.modules():  # trials stay in memory in their small form
            if isinstance(module, Decoded):
                module.forget_()
        if self.folder:
            self.folder.memo(f"trial-{number}", lambda: {"history": history})
        self._say(
            f"trial {number}: {file_bytes / 1e3:.1f} kB ({self.original_bytes / file_bytes:.1f}x), "
            f"drop {trial.drop.value:.2f} {trial.drop.unit} on validation"
        )
        return trial

    def _slower(self, options: Sequence[Option]) -> list[str]:
        """Layers that the techniques of this plan make slower in the runtime that is asked for; none where none is."""
        if self.target.speedup is None:
            return []
        used = list(dict.fromkeys(option.technique for option in options if option.technique is not None))
        table = LatencyTable(self.target.runtime)
        found = slower(self.base, self.example, [*used[:1], *self.after], table)
        for path, (before, after) in found.items():
            self._say(f"{path} stays as it is: {after:.3f} ms instead of {before:.3f} ms in {self.target.runtime}")
        return list(found)

    def _record(self, edits: list[Edit], levels: Sequence[Sequence[Option]]) -> Record:
        facts = {"original_bytes": self.original_bytes}
        return Record(edits=edits, example=self.example, recipe=self._recipe_of(levels), provenance=facts)

    def _trained(
        self, model: nn.Module, level: Sequence[Option], statistics: Statistics, step: Step, number: int
    ) -> tuple[list[Edit], list[dict[str, Any]]]:
        """Train stand-ins, let them settle, tune what is left to train with the codes frozen, code the buffers."""
        training = step.training
        if training is None:
            raise ValueError("a step without training cannot be trained")
        losses = list(step.losses) or [registry.get("distill.logits")()]
        tune = training.tune_epochs if training.tune_epochs is not None else max(1, training.epochs // 3)

        def run(part: int, epochs: int, rate: float | None, anneal_until: float) -> list[dict[str, Any]]:
            if not epochs:
                return []
            history = train_loop(
                model,
                self.task,
                epochs=epochs,
                losses=losses,
                teacher=self.original,
                learning_rate=rate,
                task_weight=1.0 if training.hard else None,
                anneal_until=anneal_until,
                validate=lambda m: self._evaluate(m).value,
                seed=self.seed,
                step=2 * number + part,
                checkpoint=self.folder.file(f"state/training-{number}-{part}") if self.folder else None,
                progress=self.progress,
            )
            return [{"step": number, "part": part, **row} for row in history.to_json()["epochs"]]

        _trainable_(model)
        relax_(model, level, statistics)
        rows = run(0, training.epochs, training.learning_rate, training.anneal_until)
        edits = settle_(model, level, statistics)
        rows += run(1, tune, training.learning_rate / 4 if training.learning_rate else None, 1.0)
        model.eval()
        edits += place_buffers_(model, level, statistics)
        return edits, rows

    def _saved(self, number: int) -> tuple[nn.Module, list[Edit], list[dict[str, Any]]] | None:
        """The model of a trial that an interrupted run has finished."""
        if not self.folder:
            return None
        path = self.folder.file(f"state/trial-{number}.pared")
        note = self.folder.file(f"state/trial-{number}.json")
        if not (path.exists() and note.exists()):
            return None
        model = artifact.load(path, duplicate(self.original))
        record = record_of(model)
        if record is None:
            return None
        return model.eval(), list(record.edits), json.loads(note.read_text(encoding="utf-8"))["history"]

    def _weigh(self, model: nn.Module, number: int) -> int:
        if self.folder:
            path = self.folder.file(f"state/trial-{number}.pared")
            artifact.save(model, path, store=self.store)
            return path.stat().st_size
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pared"
            artifact.save(model, path, store=self.store)
            return path.stat().st_size

    def _evaluate(self, model: nn.Module) -> Quality:
        model.eval()
        return evaluate(model, self.task, self.task.val, reference=self.original)

    def _miss(self, kept: Trial, asked: Trial | None = None) -> str:
        unit = kept.drop.unit
        text = f"the budget is not met: the accepted drop is {self.target.max_drop:g} {unit}"
        if asked is not None:
            text += f", but at {asked.file_bytes / 1e6:.3g} MB the drop is {asked.drop.value:.2f}"
        ratio = self.original_bytes / kept.file_bytes
        text += f"; kept is {kept.file_bytes / 1e6:.3g} MB ({ratio:.1f}x) with {kept.drop.value:.2f}"
        worst = sorted(kept.plan.options, key=lambda option: -option.damage)[:3]
        if worst:
            text += f"; most damage comes from {', '.join(option.site.path for option in worst)}"
        return text

    # -- the result ----------------------------------------------------------------------------------------------------

    def _finish(self, best: Trial, met: bool) -> Result:
        self._say("measuring")
        if self.task.test is None:
            self.warnings.append("there is no test data: final figures are on validation data, on which choices were made")
        runtimes = tuple(dict.fromkeys(("torch", self.target.runtime)))
        with tempfile.TemporaryDirectory() as scratch:
            file = self.folder.file("model.pared") if self.folder else Path(scratch) / "model.pared"
            artifact.save(best.model, file, store=self.store)
            after = measure(best.model, self.task, self.original, runtimes, file=file, seconds=3.0)
        before = after.against
        if before is None:
            raise ValueError("measuring against the original must measure the original")
        met = met and (self.target.macs is None or after.macs <= 1.001 * self.target.macs)
        data = self._data(best, met, before, after)
        result = Result(best.model, best.edits, before, after, self.refusals, met, data, self.store)
        if self.folder:
            folder = self.folder
            folder.write("recipe.yaml", self._recipe_of([*best.way.levels, best.plan.options]))
            folder.write("result.json", json.dumps(data, indent=1))
            write_whole(folder.file("report.html"), lambda path: result.report(path))
            folder.log(f"done: {best.file_bytes} bytes, drop {best.drop.value:.3f} on validation")
            folder.clear_state()
        return result

    def _data(self, best: Trial, met: bool, before: Measurement, after: Measurement) -> dict[str, Any]:
        measured = after.to_json()
        sources = {"n_train": self.task.train, "n_val": self.task.val, "n_test": self.task.test}
        found = {"pared": pared.__version__, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        return {
            **found,
            "model": {
                "name": type(self.original).__name__,
                "class": f"{type(self.original).__module__}.{type(self.original).__qualname__}",
                "parameters": sum(p.numel() for p in self.original.parameters()),
            },
            "data": {
                **{name: _count(loader) for name, loader in sources.items()},
                "n_groups": after.metric.n_groups,
                "calibration": self.task.calibration_source,
            },
            "budget": self.asked,
            "seed": self.seed,
            "before": before.to_json(),
            "after": {key: value for key, value in measured.items() if key not in ("drop_pp", "agreement")},
            "drop_pp": measured.get("drop_pp"),
            "agreement": measured.get("agreement"),
            "edits": self._edit_rows(best),
            "refusals": [vars(refusal) for refusal in self.refusals],
            "untouched": self._untouched(best),
            "sensitivity": [
                {
                    "path": option.site.path,
                    "technique": str(option.technique),
                    "stored_bits": option.cost.stored_bits,
                    "damage": option.damage,
                }
                for option in self.first_options
                if option.technique is not None
            ],
            "predicted_measured": self._predicted_measured(best),
            "curve": [{"bytes": bits / 8, "damage": damage} for bits, damage in curve(best.way.options)],
            "trials": [trial.row(trial is best) for trial in self.trials],
            "training": best.history,
            "recipe": self._recipe_of([*best.way.levels, best.plan.options]),
            "command": self.command,
            "seconds": {**self.seconds, "total": time.perf_counter() - self.start},
            "environment": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cpu": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
            },
            "warnings": self.warnings,
            "met": met,
        }

    def _edit_rows(self, best: Trial) -> list[dict[str, Any]]:
        sizes = _coded_bytes(best.model, self.store)
        chosen = {option.site.path: option for option in self._chosen(best)}
        rows = []
        for edit in best.edits:
            option = chosen.get(edit.paths[0])
            value = value_at(option.site.root, option.site.covers[0]) if option is not None and option.site.covers else None
            shape = list(value.shape) if value is not None else []
            numel = math.prod(shape) if shape else 0
            coded = sizes(edit.paths[0], edit.technique.kind)
            rows.append(
                {
                    "paths": list(edit.paths),
                    "technique": str(edit.technique),
                    "settings": edit.technique.model_dump(mode="json"),
                    "shape": shape,
                    "bits_per_weight": 8 * coded / numel if numel else None,
                    "bytes_before": numel * value.element_size() if value is not None else 0,
                    "bytes_after": coded,
                    "damage_predicted": option.damage if option is not None else None,
                }
            )
        return rows

    @staticmethod
    def _chosen(best: Trial) -> list[Option]:
        return [option for level in (*best.way.levels, best.plan.options) for option in level]

    def _untouched(self, best: Trial) -> list[dict[str, Any]]:
        covered = {path for option in self._chosen(best) for path in option.site.covers}
        reasons = {refusal.path: refusal.reason for refusal in self.refusals}
        rows = []
        for path, tensor in [*self.base.named_parameters(), *self.base.named_buffers()]:
            if path not in covered:
                reason = reasons.get(path) or (
                    "left as it is by the plan" if tensor.is_floating_point() else "not a floating-point tensor"
                )
                rows.append({"path": path, "bytes": tensor.numel() * tensor.element_size(), "reason": reason})
        return rows

    def _predicted_measured(self, best: Trial, most: int = 48) -> list[dict[str, Any]]:
        chosen = sorted(best.plan.options, key=lambda option: -option.damage)[:most]
        batches = list(self.task.calibration(64))
        references = damage.references(best.way.model, self.task, batches)
        twin = copy.deepcopy(best.way.model)
        rows = []
        for option in chosen:
            if option.technique is None:
                continue
            site = replace(option.site, root=twin)
            parts = option.technique.solve(site, best.way.statistics)[1]
            rows.append(
                {
                    "path": option.site.path,
                    "technique": str(option.technique),
                    "predicted": option.damage,
                    "measured": damage.measure(twin, site, parts, self.task, batches, references),
                }
            )
        return rows

    def _recipe_of(self, levels: Sequence[Sequence[Option]]) -> str:
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

    def _timed(self, name: str, make: Callable[[], Any]) -> Any:
        self.progress({"phase": name})
        start = time.perf_counter()
        value = make()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return value

    def _say(self, text: str) -> None:
        self.folder.log(text)
        self.progress({"say": text})


def _trainable_(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def _levels(found: list[Option], n: int = 3) -> list[tuple[Option, ...]]:
    """A few plans of a step that others follow: nothing, and some points along its own trade-off."""
    points = curve(found, n=24)
    if len(points) < 2:
        return [()]
    most, least = points[0][0], points[-1][0]
    most, least = max(most, least), min(most, least)
    plans: list[tuple[Option, ...]] = [()]
    for share in [(index + 1) / (n + 1) for index in range(n)]:
        try:
            plans.append(allocate(found, size_bits=most - share * (most - least)).options)
        except BudgetError:
            continue
    return plans


def _coded_bytes(model: nn.Module, store: str) -> Callable[[str, str | None], int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pared"
        artifact.save(model, path, store=store, program=False)
        rows = artifact.inspect(path)["tensors"]

    def coded(path: str, kind: str | None) -> int:
        return sum(row["bytes"] for row in rows if row["path"] == path or row["path"].startswith(f"{path}."))

    return coded


def _count(loader: Any) -> int | None:
    if loader is None:
        return None
    if hasattr(loader, "dataset") and hasattr(loader.dataset, "__len__"):
        return len(loader.dataset)
    if hasattr(loader, "n_examples"):
        return int(loader.n_examples)
    return sum(batch_size(batch) for batch in loader) if isinstance(loader, list) else None


def _length(task: Task) -> int:
    return _count(task.train) or sum(batch_size(batch) for batch in task.val)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
