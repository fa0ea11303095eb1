"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pared.errors import InputError
from pared.task import Batch, Task
from pared.technique import Technique
from pared.train.anneal import Annealing
from pared.train.checkpoint import Checkpoint, digest_of
from pared.train.criterion import Criterion
from pared.train.ema import Average, decay_for
from pared.train.history import EpochRecord, History
from pared.train.precision import NARROW, Precision
from pared.train.price import Price
from pared.train.processes import Alone, Launched, processes
from pared.train.schedule import Schedule, Shape, default_learning_rate
from pared.train.seeds import seed_epoch
from pared.train.state import copy_of, restore_, state_of

Progress = Callable[[dict[str, Any]], None]
PROGRESS_SECONDS = 0.1


def train(
    model: nn.Module,
    task: Task,
    *,
    epochs: int,
    losses: Sequence[Technique] = (),
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    task_weight: float | None = None,
    learning_rate: float | None = None,
    schedule: str | Shape = "cosine",
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    ema: float | None = 0.999,
    anneal: Callable[[float], None] | None = None,
    anneal_every: int = 20,
    anneal_until: float = 0.7,
    freeze_norm: bool = False,
    keep_best: bool = True,
    patience: int | None = None,
    seed: int = 0,
    step: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    max_seconds: float | None = None,
) -> History:
    """Train a model in place; it ends in evaluation mode, with the weights that were kept.

    The loss is the task's own, times `task_weight`, plus the terms of `losses`, plus the price of the bits of stand-ins that
    know them, see `Price`. The optimiser is AdamW (Loshchilov &
    Hutter 2019, arXiv:1711.05101) over the parameters that require a gradient. On the CPU, the result is a function of
    the arguments and the number of threads alone, also where a run was interrupted and went on from its checkpoint;
    only `max_seconds`, where it cuts a training short, makes it depend on the machine.

    Args:
        epochs: passes over `task.train`.
        losses: techniques whose `loss` is added.
        teacher: the model or models that `losses` compare with; left as they are, run in evaluation mode.
        validate: gives a model's score, higher is better; called after each epoch on a model in evaluation mode.
        task_weight: of the task's own loss. None: the sum of the fields `hard` of `losses`; 1 without losses.
        learning_rate: the peak. None: from the number of trained parameters, see `default_learning_rate`.
        schedule: "cosine", "linear", "constant" or a function of the fraction of the way, see `Schedule`.
        warmup: fraction of the steps.
        weight_decay: of parameters with two axes or more; biases, norms, scales, gates and tables have none.
        clip: the largest norm of the gradient; None: any.
        ema: decay of the average of the weights that is validated and kept, lowered for short trainings so that the
            average spans at most the last tenth; None: the weights themselves.
        anneal: called with the progress in [0, 1]. None: every module's own `anneal`, where it has one.
        anneal_every: steps between these calls.
        anneal_until: fraction of the training from which the progress is exactly 1.
        freeze_norm: keep running statistics of normalisation as they are (for short recoveries).
        keep_best: keep the weights of the epoch with the best score, the later one of equals. Epochs before the
            progress is 1 do not count; the weights before training do, where nothing is annealed.
        patience: end after so many counted epochs without a better score; None: never.
        seed: of the run. Seeds of each epoch come from (seed, step, epoch).
        step: which step of the recipe this is.
        checkpoint: folder for the state after each epoch; a training found there goes on, a finished one returns.
        progress: called ten times a second and after each epoch, with epoch, epochs, batch, batches, loss,
            seconds, score.
        max_seconds: the epochs become fewer after the first one if all would take longer; and training ends there.

    Raises:
        InputError: an argument out of range, no trainable parameter, a loss that is not finite, a checkpoint that is
            damaged or of another training.
    """
    teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher or ())
    _check(model, teachers, epochs, anneal_every, anneal_until, seed, step, learning_rate, clip, ema, max_seconds)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
    if not trained:
        raise InputError("training needs parameters that require a gradient, found none; call requires_grad_() on some")
    peak = learning_rate if learning_rate is not None else default_learning_rate(trained)
    run = _Run(
        model=model,
        task=task,
        criterion=Criterion(task, losses, teachers, task_weight),
        trained=trained,
        validate=validate,
        schedule=Schedule(schedule, warmup),
        annealing=Annealing(model, anneal, anneal_every, anneal_until),
        history=History(learning_rate=peak),
        epochs=epochs,
        weight_decay=weight_decay,
        clip=clip,
        ema=ema,
        freeze_norm=freeze_norm,
        keep_best=keep_best and validate is not None,
        patience=patience,
        seed=seed,
        step=step,
        folder=checkpoint,
        progress=progress,
        max_seconds=max_seconds,
    )
    modes = [(module, module.training) for one in teachers for module in one.modules()]
    for one in teachers:
        one.eval()
    try:
        return run.go()
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(eq=False)
class _Run:
    """One training: the loop over epochs, what is kept, and what is saved."""

    model: nn.Module
    task: Task
    criterion: Criterion
    trained: list[nn.Parameter]
    validate: Callable[[nn.Module], float] | None
    schedule: Schedule
    annealing: Annealing
    history: History
    epochs: int
    weight_decay: float
    clip: float | None
    ema: float | None
    freeze_norm: bool
    keep_best: bool
    patience: int | None
    seed: int
    step: int
    folder: str | Path | None
    progress: Progress | None
    max_seconds: float | None

    def __post_init__(self) -> None:
        self.processes: Alone | Launched = processes()
        self.loader: Iterable[Batch] = self.processes.share(self.task.train)
        given = _length(self.task.train)
        self.n_batches = given // self.processes.count
        if self.n_batches == 0:
            raise InputError(
                f"Task.train must hold at least one batch per process, got {given} for {self.processes.count}; "
                "start fewer processes, or make the batches smaller"
            )
        if not self.processes.is_main:
            self.progress = None
        self.asked_epochs = self.epochs
        self.best: dict[str, Tensor] | None = None
        self.n_without_gain = 0
        self.checkpoint = Checkpoint(self.folder, self._identity()) if self.folder is not None else None
        self.precision = Precision(self.model, self.trained)
        self.precision.widen_()
        self.runner = self.processes.prepare(self.model, self.criterion.teachers)
        self.optimiser = _optimiser(self.trained, self.history.learning_rate, self.weight_decay)
        followed = [*self.trained, *_running(self.model)]
        self.average = Average(followed, decay_for(self.ema, self.n_steps)) if self.ema is not None else None
        self.price = Price(self.model, self.n_steps)

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for an interrupted training to go on."""
        return {
            "starting_weights": digest_of(state_of(self.model)),
            "epochs": self.epochs,
            "batches_per_epoch": self.n_batches,
            "processes": self.processes.count,
            "losses": [str(technique) for technique in self.criterion.losses],
            "task_weight": self.criterion.task_weight,
            "teachers": [digest_of(state_of(one)) for one in self.criterion.teachers],
            "learning_rate": self.history.learning_rate,
            "schedule": f"{self.schedule.name}, warmup {self.schedule.warmup}",
            "weight_decay": self.weight_decay,
            "clip": self.clip,
            "ema": self.ema,
            "anneal": [bool(self.annealing), self.annealing.every, self.annealing.until],
            "freeze_norm": self.freeze_norm,
            "keep_best": self.keep_best,
            "patience": self.patience,
            "seed": self.seed,
            "step": self.step,
        }

    def go(self) -> History:
        resumed = self.checkpoint.load() if self.checkpoint is not None else None
        self.processes.wait()
        if resumed is not None:
            self._resume(*resumed)
        elif self.keep_best and not self.annealing:
            self.history.start_score = self._judge(0)
        while not self.history.ended:
            self._epoch()
        return self._finish()

    @property
    def n_steps(self) -> int:
        return self.epochs * self.n_batches

    def _epoch(self) -> None:
        epoch = len(self.history.epochs) + 1
        start = time.perf_counter()
        seed_epoch(self.task.train, self.seed, self.step, epoch)
        self._train_mode()
        # attribute look-ups cost as much as the arithmetic of a small network's step
        outputs_of, criterion, runner, average = self.task.outputs, self.criterion, self.runner, self.average
        optimiser, trained, annealing, clip = self.optimiser, self.trained, self.annealing, self.clip
        price = self.price
        groups = optimiser.param_groups
        backward = self.processes.backward
        index = (epoch - 1) * self.n_batches
        total, n_done, shown, rate = 0.0, 0, start, 0.0
        out_of_time = False
        for batch in self.loader:
            at = min(index + n_done, self.n_steps - 1)
            if not annealing.finished:
                annealing.before(at, self.n_steps)
            rate = self.history.learning_rate * self.schedule.factor(at, self.n_steps)
            for group in groups:
                group["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
            with self.precision.autocast():
                loss = criterion(outputs_of(runner, batch), batch)
            if price:
                loss = loss + price.of_bits(loss.item())
            backward(loss)
            gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
            total_norm = nn.utils.get_total_norm(gradients)
            value, norm = loss.item(), total_norm.item()
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise InputError(
                    f"the training loss and its gradient must be finite, got a loss of {value:g} and a gradient of "
                    f"norm {norm:g} in epoch {epoch}, batch {n_done + 1} (step {self.step} of the recipe); lower the "
                    f"learning rate (it was {rate:.2g})"
                )
            if clip is not None and norm > clip:
                nn.utils.clip_grads_with_norm_(trained, clip, total_norm)
            optimiser.step()
            if average is not None:
                average.update()
            total += value
            n_done += 1
            now = time.perf_counter()
            if self.progress is not None and now - shown >= PROGRESS_SECONDS:
                shown = now
                self._report(epoch, n_done, total / n_done, self.history.seconds + now - start, None)
            if self.max_seconds is not None and self.processes.count == 1:
                out_of_time = self.history.seconds + now - start > self.max_seconds
                if out_of_time:
                    break
        if n_done == 0:
            raise InputError(f"Task.train must give its batches again and again, got none in epoch {epoch}; use a list")
        if epoch == 1:
            self._fit_into_time(time.perf_counter() - start)
        if (out_of_time or epoch >= self.epochs) and not self.annealing.finished:
            self.annealing.go_to(1.0)  # a training that ends early ends in the final state all the same
        score = self._judge(epoch)
        seconds = time.perf_counter() - start
        self.history.epochs.append(
            EpochRecord(epoch, total / n_done, score, rate, self.annealing.finished, round(seconds, 3))
        )
        self.history.seconds += seconds
        self._decide_end(out_of_time)
        self._save()
        if self.progress is not None:
            self._report(epoch, self.n_batches, total / n_done, self.history.seconds, score)

    def _train_mode(self) -> None:
        self.runner.train()
        if self.freeze_norm:
            for module in self.model.modules():
                if isinstance(module._buffers.get("running_mean"), Tensor):
                    module.eval()

    def _judge(self, epoch: int) -> float | None:
        """Validate what would be kept, note whether it is the best, and put the weights back."""
        if self.validate is None:
            return None
        raw = copy_of(self.model)
        self._show_kept(average=self.annealing.finished)
        with self.precision.autocast():
            score = self.processes.agree(float(self.validate(self.model)))
        if math.isnan(score):
            raise InputError(f"the validation score must be a number, got NaN after epoch {epoch}; check the metric")
        if self.annealing.finished:
            better = self.history.best_score is None or score > self.history.best_score
            self.n_without_gain = 0 if better else self.n_without_gain + 1
            if self.keep_best and (better or score == self.history.best_score):
                self.best = copy_of(self.model)
                self.history.best_epoch = epoch
            if better:
                self.history.best_score = score
        restore_(self.model, raw)
        return score

    def _show_kept(self, average: bool) -> None:
        """Bring the model into the state that would be kept if training ended here."""
        if average:
            if self.average is not None:
                self.average.copy_to_model_()
            self.annealing.settle()
        self.precision.round_()
        self.model.eval()

    def _fit_into_time(self, seconds: float) -> None:
        """Make the epochs fewer if they would take longer than `max_seconds`: the schedule still comes to its end."""
        if self.max_seconds is not None:
            affordable = max(1, int(self.max_seconds / max(seconds, 1e-9)))
            self.epochs = int(self.processes.agree(min(self.epochs, affordable)))

    def _decide_end(self, out_of_time: bool) -> None:
        if self.patience is not None and self.n_without_gain >= self.patience:
            self.history.ended = "patience"
        elif out_of_time or len(self.history.epochs) >= self.epochs:
            self.history.ended = "time" if out_of_time or self.epochs < self.asked_epochs else "all epochs"

    def _finish(self) -> History:
        if self.best is not None:
            restore_(self.model, self.best)
        self.processes.equalise_(state_of(self.model).values())
        self.precision.restore_()
        for parameter in self.trained:
            parameter.grad = None
        self.model.eval()
        return self.history

    # -- what is saved -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.history.ended and self.best is None:
            self._show_kept(average=True)
            self.best = copy_of(self.model)
        if self.checkpoint is None or not self.processes.is_main:
            return
        tensors = {f"best/{name}": tensor for name, tensor in (self.best or {}).items()}
        if not self.history.ended:
            tensors |= {f"model/{name}": tensor for name, tensor in state_of(self.model).items()}
            for parameter, held in self.optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser/{parameter}/{key}": tensor for key, tensor in held.items()}
            if self.average is not None:
                tensors |= {f"average/{number}": tensor for number, tensor in enumerate(self.average.values)}
        facts = {
            "history": self.history.to_json(),
            "epochs": self.epochs,
            "progress": self.annealing.progress,
            "price": self.price.state,
            "n_without_gain": self.n_without_gain,
            "n_averaged": self.average.n_steps if self.average is not None else 0,
        }
        self.checkpoint.save(tensors, facts)

    def _resume(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.history = History.from_json(facts["history"])
        self.epochs = facts["epochs"]
        self.n_without_gain = facts["n_without_gain"]
        # annealing fits tables anew; the saved ones come after it
        if self.annealing:
            self.annealing.go_to(facts["progress"])
        self.price.state = facts["price"]
        own = state_of(self.model)
        self.best = {name: tensors[f"best/{name}"].to(t.device) for name, t in own.items() if f"best/{name}" in tensors}
        self.best = self.best or None
        if self.history.ended:
            return
        restore_(self.model, {name: tensors[f"model/{name}"] for name in own})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser/"):
                _, parameter, key = name.split("/")
                state.setdefault(int(parameter), {})[key] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        if self.average is not None:
            self.average.n_steps = facts["n_averaged"]
            for number, value in enumerate(self.average.values):
                value.copy_(tensors[f"average/{number}"])

    def _report(self, epoch: int, batch: int, loss: float, seconds: float, score: float | None) -> None:
        if self.progress is not None:
            self.progress(
                {
                    "epoch": epoch,
                    "epochs": self.epochs,
                    "batch": batch,
                    "batches": self.n_batches,
                    "loss": loss,
                    "seconds": seconds,
                    "score": score,
                }
            )


def _check(
    model: nn.Module,
    teachers: Sequence[nn.Module],
    epochs: int,
    anneal_every: int,
    anneal_until: float,
    seed: int,
    step: int,
    learning_rate: float | None,
    clip: float | None,
    ema: float | None,
    max_seconds: float | None,
) -> None:
    counts = (("epochs", epochs, 1), ("anneal_every", anneal_every, 1), ("seed", seed, 0), ("step", step, 0))
    for name, value, least in counts:
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    for name, number in (("learning_rate", learning_rate), ("clip", clip), ("max_seconds", max_seconds)):
        if number is not None and not number > 0:
            raise InputError(f"{name} must be positive, got {number}")
    if not 0 <= anneal_until <= 1:
        raise InputError(f"anneal_until must be a fraction of the training in [0, 1], got {anneal_until}")
    if ema is not None and not 0 <= ema < 1:
        raise InputError(f"ema must be a decay in [0, 1) or None, got {ema}")
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for one in teachers for parameter in one.parameters()):
        raise InputError("the teacher must not share parameters with the model, but it does; give a deep copy")


def _length(loader: Iterable[Batch]) -> int:
    if isinstance(loader, Sized):
        try:
            return len(loader)
        except TypeError:  # a DataLoader over an iterable data set has __len__ but no length
            pass
    return sum(1 for _ in loader)


def _running(model: nn.Module) -> list[Tensor]:
    """Running means and variances of normalisation: averaged with the weights that they belong to."""
    names = ("running_mean", "running_var")
    found = [module._buffers.get(name) for module in model.modules() for name in names]
    return [buffer for buffer in found if isinstance(buffer, Tensor) and buffer.dtype not in NARROW]


def _optimiser(trained: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") and p.dtype in (torch.float32, torch.float64) for p in trained)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=fused)
