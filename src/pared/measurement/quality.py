"""Scores per example, and the drop between two models with a paired bootstrap interval."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.errors import InputError
from pared.measurement.mode import evaluating
from pared.task import Batch, Task, batch_size, call_of, class_logits, in_order

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Quality:
    """How good a model is on a set of examples.

    Args:
        name: of the metric.
        scores: (n,) one score per example, or numerators.
        denominators: (n,) where the metric is a ratio of sums, None where it is a mean of scores.
        groups: (n,) which examples are not independent of each other (crops of one photograph), None if all are.
        fingerprint: of the inputs and their order: two qualities are paired only if it is the same.
    """

    name: str
    scores: np.ndarray
    denominators: np.ndarray | None = None
    groups: np.ndarray | None = None
    fingerprint: int = 0

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def n_groups(self) -> int:
        """How many independent units there are: examples, or groups of them."""
        import numpy as np

        return self.n if self.groups is None else len(np.unique(self.groups))

    @property
    def value(self) -> float:
        """The mean score, or the ratio of sums."""
        return float(self.scores.sum() / (self.n if self.denominators is None else self.denominators.sum()))

    @property
    def in_points(self) -> bool:
        """Whether scores (or every numerator over its denominator) lie within [0, 1]."""
        top = 1.0 if self.denominators is None else self.denominators
        return bool(((self.scores >= 0) & (self.scores <= top)).all())

    @cached_property
    def interval(self) -> tuple[float | None, float | None]:
        """The 95 % bootstrap interval of `value`; None where there is a single independent unit."""
        weights = self.scores * 0 + 1 if self.denominators is None else self.denominators
        sums = _sums([self.scores, weights], self.groups, RESAMPLES, seed=0)
        return _limits(None if sums is None else sums[:, 0] / sums[:, 1])

    @property
    def low(self) -> float | None:
        return self.interval[0]

    @property
    def high(self) -> float | None:
        return self.interval[1]

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "value", "low", "high", "n", "n_groups")}


@dataclass(frozen=True)
class Drop:
    """How much worse the compressed model is; negative where it is better.

    Args:
        value: in `unit`.
        low, high: the 95 % interval, None where there is a single independent unit.
        n: examples.
        n_groups: independent units among them.
        unit: "pp", points of a score within [0, 1], or "%" of the original's value.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    n_groups: int
    unit: str

    @property
    def standard_error(self) -> float | None:
        """A quarter of the 95 % interval, near enough; None where there is no interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / (2 * 1.96)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f} {self.unit} (n = {self.n})"
        return f"{self.value:.2f} {self.unit} [{self.low:.2f}, {self.high:.2f}]"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(model: nn.Module, task: Task, loader: Iterable[Batch], reference: nn.Module | None = None) -> Quality:
    """The task's score of every example of the loader.

    Args:
        loader: batches; its attribute `groups` (examples,), if it has one, tells which examples belong together.
        reference: the original model, with which examples without targets are compared; default: the model itself.

    Raises:
        InputError: no batch, a score that is not finite, or groups that do not fit the examples.
    """
    import numpy as np

    scores: list[Tensor] = []
    denominators: list[Tensor] = []
    fingerprint = 0
    original = model if reference is None else reference
    needs_reference = not callable(task.metric) and not task.labelled
    with evaluating(model), evaluating(original), torch.no_grad():
        for batch in in_order(loader):
            outputs = task.outputs(model, batch)
            shown = task.outputs(original, batch) if needs_reference and original is not model else outputs
            score, denominator = task.scores(outputs, batch, shown)
            scores.append(score)
            if denominator is not None:
                denominators.append(denominator)
            fingerprint = _fingerprint(batch, fingerprint)
    if not scores:
        raise InputError("the loader must give at least one batch, got none; check the data it is made from")
    if denominators and len(denominators) != len(scores):
        raise InputError("Task.metric must return a pair for every batch or for none, got both; return one form")
    values = torch.cat(scores).numpy()
    weights = torch.cat(denominators).numpy() if denominators else None
    for what, part in (("score", values), ("denominator", weights)):
        if part is not None and not np.isfinite(part).all():
            at = int(np.flatnonzero(~np.isfinite(part))[0])
            raise InputError(
                f"every {what} of {task.metric_name} must be finite, found {part[at]} at example {at} of {len(part)}; "
                "check the metric and the model's outputs there"
            )
    if weights is not None and not weights.sum() > 0:
        raise InputError(f"the denominators of {task.metric_name} must have a positive sum, got {weights.sum()}")
    return Quality(task.metric_name, values, weights, _groups(loader, len(values)), fingerprint)


def drop(original: Quality, compressed: Quality, n_resamples: int = RESAMPLES, seed: int = 0) -> Drop:
    """The drop from one model to another on the same examples, with a paired bootstrap interval.

    Examples, or groups of them, are drawn with replacement, the same for both models; ratio metrics are ratios of the
    drawn sums. The unit is points where the original's scores lie within [0, 1], else percent of its value.
    Source: Efron & Tibshirani 1993, percentile interval.
    """
    import numpy as np

    if original.n != compressed.n or original.fingerprint != compressed.fingerprint:
        raise InputError(
            f"a drop compares two models on the same examples in the same order, got {original.n} and {compressed.n} "
            "examples or a different order; the loader must give the same batches every time"
        )
    in_points = original.in_points
    if not in_points and original.value == 0:
        raise InputError(
            f"the original's {original.name} must not be 0, since the drop is a percentage of it; "
            "give a metric with scores within [0, 1]"
        )
    ones = np.ones(original.n)
    parts = [
        original.scores, ones if original.denominators is None else original.denominators,
        compressed.scores, ones if compressed.denominators is None else compressed.denominators,
    ]  # fmt: skip

    def of(sums: np.ndarray) -> np.ndarray:
        before, after = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
        return 100 * (before - after) / (1.0 if in_points else np.abs(before))

    value = float(of(np.array([[part.sum() for part in parts]]))[0])
    sums = _sums(parts, original.groups, n_resamples, seed)
    low, high = _limits(None if sums is None else of(sums))
    return Drop(value, low, high, original.n, original.n_groups, "pp" if in_points else "%")


def agreement(model: nn.Module, original: nn.Module, task: Task, loader: Iterable[Batch]) -> Quality:
    """How far the outputs of two models agree, example by example.

    Classifiers: 1 where the most probable class is the same (its mean over positions, if there are many). Others:
    1 - |z - z0| / |z0|, with z all floating-point outputs of an example, not below 0.
    """
    scores: list[Tensor] = []
    fingerprint = 0
    with evaluating(model), evaluating(original), torch.no_grad():
        for batch in in_order(loader):
            found, wanted = task.outputs(model, batch), task.outputs(original, batch)
            scores.append(_same_class(found, wanted, batch) if task.classifies else _closeness(found, wanted, batch))
            fingerprint = _fingerprint(batch, fingerprint)
    if not scores:
        raise InputError("the loader must give at least one batch, got none; check the data it is made from")
    name = "same class as the original" if task.classifies else "closeness to the original's outputs"
    values = torch.cat(scores).numpy()
    return Quality(name, values, None, _groups(loader, len(values)), fingerprint)


def _same_class(found: Any, wanted: Any, batch: Batch) -> Tensor:
    same = class_logits(found, batch)[0].argmax(1) == class_logits(wanted, batch)[0].argmax(1)
    return same.double().reshape(len(same), -1).mean(1).cpu()


def _closeness(found: Any, wanted: Any, batch: Batch) -> Tensor:
    size = batch_size(batch)
    rows = [_rows(outputs, size) for outputs in (found, wanted)]
    error, scale = (rows[0] - rows[1]).norm(dim=1), rows[1].norm(dim=1)
    return (1 - error / scale.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0)


def _rows(outputs: Any, size: int) -> Tensor:
    """(examples, everything that the model says of one)."""
    leaves = [
        leaf.detach().double().cpu().reshape(size, -1)
        for leaf in pytree.tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim and len(leaf) == size
    ]
    if not leaves:
        raise InputError(f"the model must return a tensor with one row per example ({size} here); it returns none")
    return torch.cat(leaves, 1)


def _fingerprint(batch: Batch, before: int) -> int:
    for leaf in pytree.tree_leaves(call_of(batch)):
        if isinstance(leaf, Tensor):
            data = leaf.detach().cpu().contiguous().flatten().view(torch.uint8)
            before = zlib.crc32(data.numpy().data, before)
    return before


def _groups(loader: Iterable[Batch], n: int) -> np.ndarray | None:
    import numpy as np

    given = getattr(loader, "groups", None)
    if given is None:
        return None
    groups = np.asarray(given)
    if groups.shape != (n,):
        raise InputError(f"the loader's groups must name one group per example, shape ({n},), got shape {groups.shape}")
    if getattr(loader, "shuffle", False):
        raise InputError("a loader with groups must give its examples in their own order; turn shuffling off")
    return groups


def _sums(parts: list[np.ndarray], groups: np.ndarray | None, n_resamples: int, seed: int) -> np.ndarray | None:
    """(n_resamples, parts): sums over drawn examples or groups; None if there is a single one."""
    import numpy as np

    rows = np.stack(parts, axis=1).astype(np.float64)
    if groups is not None:
        index = np.unique(groups, return_inverse=True)[1].ravel()
        rows = np.stack([np.bincount(index, weights=column) for column in rows.T], axis=1)
    n = len(rows)
    if n < 2:
        return None
    generator = np.random.default_rng(seed)
    drawn = np.empty((n_resamples, rows.shape[1]))
    for i in range(n_resamples):
        drawn[i] = np.bincount(generator.integers(0, n, size=n), minlength=n) @ rows
    # a ratio whose drawn denominators sum to zero is not defined: such a draw says nothing
    kept = (drawn[:, 1] > 0) & (drawn[:, -1] > 0)
    return drawn[kept]


def _limits(values: np.ndarray | None) -> tuple[float | None, float | None]:
    import numpy as np

    if values is None or not len(values):
        return None, None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
