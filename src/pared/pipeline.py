"""compress(): one budget over all techniques. Options, plan, training, measuring, in this order; resumable."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import pared
from pared import artifact
from pared import recipe as recipes
from pared.budget.calibrate import gather
from pared.budget.options import n_tried
from pared.budget.probe import correct_
from pared.budget.target import Target, parse_drop, parse_latency, parse_macs, parse_size
from pared.errors import BudgetError, InputError, TraceError
from pared.graph import Program, trace
from pared.job import Job
from pared.measurement import Measurement, measure
from pared.measurement.compute import compute
from pared.measurement.quality import Drop
from pared.measurement.size import original_bytes
from pared.outcome import count, describe
from pared.place import Progress, Refusal, check_finite, prepared
from pared.recipe import Recipe
from pared.record import record_of
from pared.report import report as write_report
from pared.runfolder import RunFolder, write_whole
from pared.runtimes import session
from pared.search import MAX_TRIALS, Search
from pared.site import duplicate, plain
from pared.statistics import Statistics
from pared.task import Task, batch_size, in_order
from pared.technique import Edit, as_numpy
from pared.trials import Trial, Trials, over_the_network, quality_of, trainable_


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
        store: how the file's coder chooses.
        program: whether the file holds the program; False where the model has no graph.
    """

    model: nn.Module
    edits: list[Edit]
    before: Measurement
    after: Measurement
    refusals: list[Refusal]
    met: bool
    data: dict[str, Any]
    store: str = "smallest"
    program: bool = True

    def save(self, path: str | Path) -> None:
        """Write the compressed model as one file."""
        artifact.save(self.model, path, store=self.store, program=self.program)

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
    teachers: Sequence[nn.Module] | None = None,
    store: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result:
    """Make a trained model smaller within a budget, and measure what it costs.

    Args:
        model: a trained network; it is not changed.
        task: its data, loss and metric.
        recipe: a YAML file, the name of a shipped recipe, or a dict; None is the default recipe, but `channels` where
            macs or latency are asked for and no size, and `smallest` where neither is and there is no training.
        size: of the whole file: "20x", "5%", "1.2MB".
        macs: multiply-adds: "2x", "50%", "300M".
        latency: "3x" or "3x@onnxruntime", one example at a time.
        max_drop: accepted drop of the metric in points (in % of its value where scores are not within [0, 1], as of text), with
            a margin for chance (see `pared.search.margin`); alone, it
            asks for the smallest file within it.
        train: recover by distillation from the original; False: post-training only.
        out: folder for the results and for going on after an interruption.
        seed: of everything random.
        teachers: models to distil from, with outputs like the original's; None: the original. Drops are always against
            the original.
        store: how the file's coder chooses, instead of the recipe's word.
        progress: called with dicts that tell what is being done.
        command: the command line, for the report.

    Raises:
        InputError: model, data or recipe cannot be used; one line says why.
        BudgetError: even the smallest plan is above the budget; it was carried out, and the error's `result` holds it.
    """
    started = time.perf_counter()
    faster = macs is not None or latency is not None
    if recipe is None and (faster or not train):
        recipe = "smallest" if not faster else "channels" if size is None else None
    chosen = recipes.load(recipe)
    asked = {"size": size, "macs": macs, "latency": latency, "max_drop": max_drop}
    job = _job(model, task, chosen, asked, train, out, seed, teachers, store or chosen.store, progress, command, started)
    job.say(f"budget: {', '.join(f'{k} {v}' for k, v in job.asked.items() if v is not None)}")
    job.say(f"recipe:\n{job.recipe.to_yaml()}")
    for line in job.warnings:
        job.say(line)
    reference = job.timed("evaluate", lambda: quality_of(job.original, job))
    statistics = job.timed("calibrate", lambda: _statistics(job))
    if not job.steps:
        raise InputError("a recipe must have at least one step that replaces something, got none; add quantize.integer")
    _estimate(job)
    search = Search(job, statistics, Trials(job, statistics, reference))
    try:
        best, met, reason = search.find()
    except BudgetError as error:
        # the best found is saved all the same, and said
        job.warnings.append(str(error))
        error.result = _finish(job, search, search.nearest(), False)  # type: ignore[attr-defined]
        raise
    if reason:
        job.warnings.append(reason)
        warnings.warn(reason, stacklevel=2)
    return _finish(job, search, best, met)


def _job(
    model: nn.Module, task: Task, recipe: Recipe, given: dict[str, Any], train: bool, out: Any, seed: int,
    teachers: Sequence[nn.Module] | None, store: str, progress: Progress | None, command: str | None, started: float,
) -> Job:  # fmt: skip
    """Check everything that can be checked at once, and open the run folder."""
    asked = {key: value if value is not None else recipe.budget.get(key) for key, value in given.items()}
    asked = {key: getattr(value, "item", lambda value=value: value)() for key, value in asked.items()}
    if all(value is None for value in asked.values()):
        asked["max_drop"] = 0.5
    if record_of(model) is not None:
        raise InputError("compress takes an original model, got one that pared has compressed; give it the original")
    if any(technique.rewrites for step in recipe.parts()[1] for technique in step.candidates):
        raise InputError("rewrite: true gives a network without its code, whose later steps compress cannot plan; use pared.apply")
    check_finite(model)
    task.check(model)
    original = duplicate(model).eval().requires_grad_(False)
    base, bakes = prepared(model)
    n_bytes, example = original_bytes(original), task.example(original)
    say = progress or (lambda event: None)
    for technique in recipe.parts()[0]:
        bakes += over_the_network(base, technique, task, example, say)
    trainable_(base)
    program, reason = _program(base, example)
    target, total_macs = _target(asked, original, n_bytes, task, example)
    teachers = [duplicate(teacher).eval().requires_grad_(False) for teacher in teachers or ()] or [original]
    identity = _identity(original, teachers, task, recipe, asked, train, seed, store)
    return Job(
        original=original,
        teachers=teachers,
        base=base,
        bakes=bakes,
        program=program,
        task=task,
        recipe=recipe,
        asked=asked,
        target=target,
        example=example,
        original_bytes=n_bytes,
        total_macs=total_macs,
        train=train,
        seed=seed,
        store=store,
        folder=RunFolder(out, identity),
        progress=say,
        command=command,
        started=started,
        warnings=[f"the file holds no program and loads into the model's class only: {reason}"] if reason else [],
    )


def _program(base: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Program | None, str | None]:
    """The program of the network, or why it has none: it is compressed all the same."""
    try:
        return trace(plain(base), *example), None
    except TraceError as error:
        return None, str(error)


def _target(
    asked: dict[str, Any], original: nn.Module, n_bytes: int, task: Task, example: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[Target, float]:
    """The budget in numbers, and the original's MACs per example where it is about them."""
    speedup, runtime = parse_latency(asked["latency"]) if asked["latency"] else (None, "torch")
    total_macs = 0.0
    if asked["macs"] is not None or speedup is not None:
        batch = next(in_order(task.val))
        args, kwargs = example
        total_macs = compute(original, args, kwargs).macs / batch_size(batch)
        if speedup is not None:
            session(original, runtime, (args, kwargs))  # a runtime that is missing is said at once
    target = Target(
        parse_size(asked["size"], n_bytes) if asked["size"] is not None else None,
        parse_macs(asked["macs"], total_macs) if asked["macs"] is not None else None,
        speedup,
        runtime,
        parse_drop(asked["max_drop"]) if asked["max_drop"] is not None else None,
    )
    return target, total_macs


def _identity(
    original: nn.Module, teachers: Sequence[nn.Module], task: Task, recipe: Recipe, asked: dict[str, Any], train: bool,
    seed: int, store: str,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the result depends on."""
    return {
        "pared": pared.__version__,
        "recipe": recipe.to_dict()["steps"],
        "store": store,
        "budget": asked,
        "train": train,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "device": next((tensor.device.type for tensor in (*original.parameters(), *original.buffers())), "cpu"),
        "torch": torch.__version__,
        "metric": task.metric_name,
        "data": _data_digest(task),
        "model": _digest(original),
        "teachers": [_digest(teacher) for teacher in teachers],
    }


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(path.encode())
        digest.update(as_numpy(tensor).tobytes())
    return digest.hexdigest()


def _data_digest(task: Task) -> str:
    """Of the first batch of every loader, in evaluation order."""
    digest = hashlib.sha256()
    for loader in (task.train, task.val, task.test):
        batch = next(in_order(loader), None) if loader is not None else None
        for leaf in tree_leaves(batch):
            digest.update(as_numpy(leaf).tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
    return digest.hexdigest()


def _statistics(job: Job) -> Statistics:
    """Of the base; those of an interrupted run, if there are any."""
    from pared.budget import calibrate

    if job.folder:
        path = job.folder.file("state/statistics.safetensors")
        if path.exists():
            return calibrate.load(path)
    bare = plain(job.base)
    statistics = gather(bare, job.task, program=job.program, seed=job.seed, progress=job.progress, folder=job.aside)
    factor = correct_(bare, job.task, statistics, job.progress)
    job.say(f"validation data feel {factor:.3g} of the damage that calibration data predict; all predictions are corrected by it")
    if job.folder:
        write_whole(path, lambda temporary: calibrate.save(statistics, temporary))
        return calibrate.load(path)  # the same numbers whether the run was interrupted or not
    return statistics


def _estimate(job: Job) -> None:
    """Say how long it will take, from one timed batch and the number of candidates."""
    batch = next(iter(job.task.val))
    start = time.perf_counter()
    with torch.no_grad():
        job.task.outputs(job.original, batch)
    forward = (time.perf_counter() - start) / batch_size(batch)
    numel = sum(p.numel() for p in job.base.parameters())
    *before, last = job.steps
    n_candidates = sum(len(step.candidates) for step in before)
    n_candidates += len(last.candidates) if last.cuts else n_tried(job.base, last.candidates)
    fitting = numel * n_candidates * 4e-7
    n_val = sum(batch_size(b) for b in job.task.val)
    per_trial = n_val * forward
    epochs = sum((s.training.epochs + (s.training.tune_epochs or s.training.epochs // 3)) for s in job.steps if s.training)
    text = f"about {_duration(fitting + 4 * per_trial)} for {n_candidates} candidates per site"
    if job.train and epochs:
        n_train = _length(job.task)
        text += f", then {_duration(epochs * n_train * forward * 4)} for each of 1 to {MAX_TRIALS} trainings of {epochs} epochs"
    job.say(f"estimate: {text}")


def _finish(job: Job, search: Search, best: Trial, met: bool) -> Result:
    """Measure what is kept on test data, and write the results."""
    job.say("measuring")
    if job.task.test is None:
        job.warnings.append("there is no test data: final figures are on validation data, on which choices were made")
    if job.target.max_drop:
        job.warnings += _too_few(best.drop, job.target.max_drop)
    runtimes = tuple(dict.fromkeys(("torch", job.target.runtime)))
    with tempfile.TemporaryDirectory() as scratch:
        file = job.folder.file("model.pared") if job.folder else Path(scratch) / "model.pared"
        artifact.save(best.model, file, store=job.store, program=job.program is not None)
        after = measure(best.model, job.task, job.original, runtimes, threads=torch.get_num_threads(), file=file, seconds=3.0)
    before = after.against
    if before is None:
        raise ValueError("measuring against the original must measure the original")
    met = met and (job.target.macs is None or after.macs <= 1.001 * job.target.macs)
    data = describe(job, search, best, met, before, after)
    result = Result(best.model, best.edits, before, after, search.refusals, met, data, job.store, job.program is not None)
    if job.folder:
        folder = job.folder
        folder.write("recipe.yaml", job.resolved(best.levels))
        folder.write("result.json", json.dumps(data, indent=1))
        write_whole(folder.file("report.html"), lambda path: result.report(path))
        folder.log(f"done: {best.file_bytes} bytes, drop {best.drop.value:.3f} on validation")
        folder.clear_state()
    return result


def _too_few(drop: Drop, max_drop: float) -> list[str]:
    """A sentence where the validation data cannot tell a drop of this size from chance."""
    error = drop.standard_error
    if error is not None and error <= max_drop / 2:
        return []
    kind = "examples" if drop.n_groups == drop.n else "independent groups of examples"
    spread = "cannot be known" if error is None else f"is {error:.2g} {drop.unit}"
    return [
        f"{drop.n_groups} {kind} of validation data are few for an accepted drop of {max_drop:g} {drop.unit}: the standard "
        f"error of the drop {spread}; a margin of {max_drop / 2:g} was kept instead of it"
    ]


def _length(task: Task) -> int:
    return count(task.train) or sum(batch_size(batch) for batch in task.val)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
