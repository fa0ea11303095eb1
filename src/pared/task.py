"""What "good" means: batches, how to call the model, a loss, and one score per example."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.errors import InputError

Batch = Any
Loss = Callable[[Any, Batch], Tensor]
Scores = Tensor | tuple[Tensor, Tensor]
Metric = Callable[[Any, Batch], Scores]

TARGET_KEYS = ("labels", "label", "targets", "target")
CALIBRATION_EXAMPLES = 512


class Task:
    """Data, loss and metric of a trained model.

    Args:
        train: batches for training and, unless `calibration` is given, for calibration. Anything that can be iterated
            again and again (a DataLoader, a list of batches). A batch is `(inputs, targets)` or a dict; inputs may be
            a tensor, a tuple (positional arguments) or a dict (keyword arguments). Targets may be None: without labels
            the measure is agreement with the original model.
        val: batches on which choices are made.
        test: batches used once, for the final figures; `val` stands in, and the report says so, when it is missing.
        calibration: batches for statistics; default: the first 512 examples of `train`, in evaluation order.
        loss: "cross_entropy", or a function `(outputs, batch) -> scalar`.
        metric: "accuracy", or a function `(outputs, batch) -> one score per example`, higher is better, or a pair
            (numerators, denominators) per example. Scores within [0, 1] drop in points, others in percent of the
            original's mean.
        forward: `(model, batch) -> outputs`, where calling `model(inputs)` is not right.
    """

    def __init__(
        self,
        train: Iterable[Batch],
        val: Iterable[Batch],
        test: Iterable[Batch] | None = None,
        calibration: Iterable[Batch] | None = None,
        loss: str | Loss = "cross_entropy",
        metric: str | Metric = "accuracy",
        forward: Callable[[nn.Module, Batch], Any] | None = None,
    ) -> None:
        for name, loader in {"train": train, "val": val, "test": test, "calibration": calibration}.items():
            if loader is None and name in ("test", "calibration"):
                continue
            if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
                raise InputError(
                    f"Task.{name} must be iterable again and again (a DataLoader, a list of batches), "
                    f"got {type(loader).__name__}; wrap it in a list or a DataLoader"
                )
            if isinstance(loader, Sized) and len(loader) == 0:
                raise InputError(f"Task.{name} must hold at least one batch, got none; check the data it is made from")
        if isinstance(loss, str) and loss != "cross_entropy":
            raise InputError(f'Task.loss must be "cross_entropy" or a function, got "{loss}"')
        if isinstance(metric, str) and metric != "accuracy":
            raise InputError(f'Task.metric must be "accuracy" or a function, got "{metric}"')
        self.train = train
        self.val = val
        self.test = test
        self.loss = loss
        self.metric = metric
        self.forward = forward
        self._calibration = calibration

    @property
    def classifies(self) -> bool:
        """Whether outputs are logits of a softmax (the loss is cross entropy)."""
        return self.loss == "cross_entropy"

    @property
    def metric_name(self) -> str:
        if isinstance(self.metric, str):
            return self.metric if self.labelled else "agreement with the original"
        return getattr(self.metric, "__name__", type(self.metric).__name__)

    @property
    def labelled(self) -> bool:
        batch = next(iter(self.val), None)
        return batch is None or targets_of(batch) is not None

    @property
    def calibration_source(self) -> str:
        """Where calibration data come from, in words, for the report."""
        given = self._calibration is not None
        return "calibration batches given" if given else f"the first {CALIBRATION_EXAMPLES} examples of train"

    @property
    def calibration_groups(self) -> int | None:
        """How many independent groups the calibration examples come from, None where their loader names none."""
        groups = getattr(self.train if self._calibration is None else self._calibration, "groups", None)
        return None if groups is None else len(set(groups.tolist() if hasattr(groups, "tolist") else groups))

    def calibration(self, n_examples: int | None = None) -> Iterator[Batch]:
        """Calibration batches, cut after `n_examples` examples (default: all that were given, or 512 of train)."""
        source, limit = (self._calibration, n_examples) if self._calibration is not None else (
            self.train,
            n_examples or CALIBRATION_EXAMPLES,
        )
        seen = 0
        for batch in in_order(source):
            size = batch_size(batch)
            if limit is not None and seen + size > limit:
                batch = take(batch, limit - seen)
                size = limit - seen
            if size:
                yield batch
            seen += size
            if limit is not None and seen >= limit:
                return

    def outputs(self, model: nn.Module, batch: Batch) -> Any:
        """What the model gives for a batch, which is moved to the model's device."""
        batch = to_device_of(model, batch)
        if self.forward is not None:
            return self.forward(model, batch)
        args, kwargs = call_of(batch)
        return model(*args, **kwargs)

    def batch_loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""
        if callable(self.loss):
            value = self.loss(outputs, _near(outputs, batch))
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise InputError("Task.loss must return one scalar tensor per batch; return the mean over examples")
            return value
        logits, targets = class_logits(outputs, _near(outputs, batch))
        if targets is None:
            raise InputError('the loss "cross_entropy" needs targets; a batch must be (inputs, targets)')
        return F.cross_entropy(logits, targets)

    def scores(self, outputs: Any, batch: Batch, reference: Any = None) -> tuple[Tensor, Tensor | None]:
        """One score per example, or numerators and denominators. Unlabelled batches compare with `reference`, the
        outputs of the original model: 1 where the most probable class is the same."""
        size = batch_size(batch)
        if callable(self.metric):
            given = self.metric(outputs, _near(outputs, batch))
            pair = given if isinstance(given, tuple) else (given, None)
            if len(pair) != 2:
                raise InputError(
                    "Task.metric must return one score per example, or a pair of numerators and denominators, "
                    f"got a tuple of {len(pair)}"
                )
        else:
            logits, targets = class_logits(outputs, _near(outputs, batch))
            if targets is None:
                if reference is None:
                    raise InputError("without targets the metric is agreement with the original, whose outputs are needed")
                targets = class_logits(reference, batch)[0].argmax(1)
            right = (logits.argmax(1) == targets).double().flatten(1) if logits.ndim > 2 else (
                (logits.argmax(1) == targets).double()
            )
            pair = (right.mean(1) if right.ndim > 1 else right, None)
        checked: list[torch.Tensor | None] = []
        for name, part in zip(("score", "denominator"), pair, strict=True):
            if part is None and name == "denominator":
                checked.append(None)
                continue
            part = torch.as_tensor(part).detach().double().cpu()
            if part.ndim != 1 or len(part) != size:
                raise InputError(
                    f"Task.metric must return one {name} per example, here a tensor of shape ({size},), "
                    f"got shape {tuple(part.shape)}; do not average over the batch"
                )
            checked.append(part)
        return cast(Tensor, checked[0]), checked[1]

    def example(self, model: nn.Module | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one call of the model, on its device: those of the first validation batch."""
        batch = next(in_order(self.val), None)
        if batch is None:
            raise InputError("Task.val must hold at least one batch, got none; check the data it is made from")
        return self.call(model, batch) if model is not None else call_of(batch)

    def call(self, model: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the task calls the model for a batch, on the model's device."""
        batch = to_device_of(model, batch)
        if self.forward is None:
            return call_of(batch)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hook = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        try:
            with torch.no_grad():
                self.outputs(model, batch)
        finally:
            hook.remove()
        if len(calls) != 1:
            raise InputError(f"Task.forward must call the model once per batch, it calls it {len(calls)} times; change it")
        return calls[0]

    def check(self, model: nn.Module) -> None:
        """Raise an InputError unless the model runs on the first batch of every loader, and loss and metric accept it."""
        loaders = {"val": self.val, "train": self.train, "test": self.test, "calibration": self._calibration}
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            for name, loader in loaders.items():
                if loader is not None:
                    batches = in_order(loader)
                    batch = next(batches, None)
                    batches.close()
                    self._check_batch(model, batch, name)
        finally:
            for module, mode in modes:
                module.training = mode

    @torch.no_grad()
    def _check_batch(self, model: nn.Module, batch: Batch, name: str) -> None:
        if batch is None:
            raise InputError(f"Task.{name} must hold at least one batch, got none; check the data it is made from")
        size = batch_size(batch)
        targets = targets_of(batch)
        if isinstance(targets, Tensor) and targets.ndim and len(targets) != size:
            raise InputError(
                f"inputs and targets of a batch must have one length, got {size} inputs and {len(targets)} targets in "
                f"{name}; check the loader"
            )
        inputs = [leaf for leaf in pytree.tree_leaves(call_of(batch)) if isinstance(leaf, Tensor)]
        if any(bool(torch.isnan(tensor).any()) for tensor in inputs if tensor.is_floating_point()):
            raise InputError(f"inputs must be finite, found NaN in the first batch of {name}; clean the data")
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        with _told(
            f"the model must run on a batch of {name} (inputs of shape {shapes})",
            "check the data's shape, or give Task(forward=...)",
        ):
            outputs = self.outputs(model, batch)
        if targets is not None or callable(self.loss):
            with _told(
                f"the loss must accept the model's outputs and a batch of {name}",
                "check that outputs and targets belong together",
            ):
                self.batch_loss(outputs, batch)
        if name in ("val", "test"):
            with _told(f"the metric must accept the model's outputs and a batch of {name}", "check Task.metric"):
                self.scores(outputs, batch, None if self.labelled else outputs)


@contextmanager
def _told(must: str, remedy: str) -> Iterator[None]:
    """Whatever fails within becomes an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{must}, but it failed: {type(error).__name__}: {reason}; {remedy}") from error


def inputs_of(batch: Batch) -> Any:
    """The inputs of a batch: without the targets."""
    if isinstance(batch, dict):
        return {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0]
    raise InputError(f"a batch must be (inputs, targets) or a dict, got {_described(batch)}; use (inputs, None) without labels")


def targets_of(batch: Batch) -> Any:
    """The targets of a batch, None if it has none."""
    if isinstance(batch, dict):
        return next((batch[key] for key in TARGET_KEYS if key in batch), None)
    inputs_of(batch)
    return batch[1]


def call_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with which a batch calls the model."""
    inputs = inputs_of(batch)
    if isinstance(inputs, dict):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def batch_size(batch: Batch) -> int:
    for leaf in pytree.tree_leaves(call_of(batch)):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise InputError(f"a batch must hold at least one tensor with a batch axis, got {_described(batch)}")


def take(batch: Batch, n: int) -> Batch:
    """The first n examples of a batch."""
    size = batch_size(batch)
    return pytree.tree_map(lambda leaf: leaf[:n] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf, batch)


def to_device_of(model: nn.Module, batch: Batch) -> Batch:
    tensor: Tensor | None = next(model.parameters(), None)
    if tensor is None:
        tensor = next(model.buffers(), None)
    if tensor is None or all(leaf.device == tensor.device for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)):
        return batch
    return pytree.tree_map(lambda leaf: leaf.to(tensor.device) if isinstance(leaf, Tensor) else leaf, batch)


def logits_of(outputs: Any) -> Tensor:
    """The logits in a model's outputs: the outputs themselves, or their entry `logits`."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise InputError(
        f"cross entropy and accuracy need logits: a tensor, or an entry 'logits', got {_described(outputs)}; "
        "give Task(loss=..., metric=...) as functions of (outputs, batch)"
    )


def class_logits(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Logits with the classes on axis 1, (batch, classes, ...), and the targets (batch, ...), or None."""
    logits = logits_of(outputs)
    targets = targets_of(batch)
    sequence = logits.ndim == 3 and (
        (isinstance(targets, Tensor) and targets.shape == logits.shape[:2])
        or (targets is None and any(_is_token_ids(t, logits) for t in pytree.tree_leaves(call_of(batch))))
    )
    if sequence:
        logits = logits.transpose(1, 2)
    return logits, targets if isinstance(targets, Tensor) else None


def float_outputs(outputs: Any) -> list[Tensor]:
    """All floating-point tensors of a model's outputs (model output classes are mappings that pytree may not know)."""
    tree = dict(outputs.items()) if hasattr(outputs, "items") else outputs
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def output_weights(reference: list[Tensor], size: int) -> list[float]:
    """What the squared error of each output counts, where there are several and no softmax tells their scale.

    Every output counts the same in units of its own variance over the examples: boxes within [0, 1] as much as scores of
    any size. The weights are the mean variance over the output's own, so a single output has weight 1.
    """
    if len(reference) < 2:
        return [1.0] * len(reference)
    spreads = []
    for leaf in reference:
        values = leaf.detach().double()
        varied = size > 1 and values.ndim > 0 and len(values) == size
        spreads.append(float((values - values.mean(0)).square().mean() if varied else values.square().mean()))
    known = [spread for spread in spreads if math.isfinite(spread) and spread > 0]
    mean = sum(known) / len(known) if known else 1.0
    return [mean / spread if math.isfinite(spread) and spread > 1e-12 * mean else 1.0 for spread in spreads]


def _is_token_ids(leaf: Any, logits: Tensor) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_floating_point() and leaf.shape == logits.shape[:2]


def _near(outputs: Any, batch: Batch) -> Batch:
    """The batch on the device of the outputs."""
    leaf = next((t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)), None)
    if leaf is None:
        return batch
    return pytree.tree_map(lambda t: t.to(leaf.device) if isinstance(t, Tensor) else t, batch)


def in_order(loader: Iterable[Batch]) -> Generator[Batch, None, None]:
    """The loader's batches without moving its random generator (statistics must not change what training sees)."""
    generator = getattr(loader, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    global_state = torch.get_rng_state()
    try:
        if isinstance(generator, torch.Generator):
            generator.manual_seed(0)
        torch.manual_seed(0)
        yield from islice(loader, None)
    finally:
        torch.set_rng_state(global_state)
        if isinstance(generator, torch.Generator) and state is not None:
            generator.set_state(state)


def _described(thing: Any) -> str:
    if isinstance(thing, (tuple, list)):
        return f"a {type(thing).__name__} of {len(thing)}"
    if isinstance(thing, dict):
        return f"a dict with keys {', '.join(map(str, thing))}"
    return f"a {type(thing).__name__}"
