"""Batches from arrays in memory, and the split into train, validation and test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pared.errors import InputError

Inputs = Tensor | dict[str, Tensor]


class ArrayLoader:
    """Batches `(inputs, targets)` from arrays in memory, again and again.

    The order is a function of `generator` alone, so setting its state repeats an epoch exactly.

    Args:
        x: inputs, (examples, ...); a dict of such tensors becomes keyword arguments of the model.
        y: targets, (examples, ...), or None where there are no labels.
        batch_size: examples per batch; the last batch may be smaller.
        shuffle: draw a new order at every pass.
        generator: source of that order and of `augment`'s randomness.
        augment: `(inputs, generator) -> inputs`, new at every pass.
        transform: `(inputs) -> inputs`, the same at every pass, after `augment`.
        groups: (examples,) the photograph, speaker or document that each example comes from; examples of one group
            are not independent.

    >>> loader = ArrayLoader(torch.arange(5), torch.arange(5), batch_size=2)
    >>> len(loader), [inputs.tolist() for inputs, targets in loader]
    (3, [[0, 1], [2, 3], [4]])
    """

    def __init__(
        self,
        x: Inputs,
        y: Tensor | None,
        batch_size: int,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        augment: Callable[[Inputs, torch.Generator], Inputs] | None = None,
        transform: Callable[[Inputs], Inputs] | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        lengths = {len(tensor) for tensor in (x.values() if isinstance(x, dict) else [x])}
        lengths |= {len(part) for part in (y, groups) if part is not None}
        if len(lengths) != 1:
            raise InputError(f"inputs, targets and groups must have one length, found {sorted(lengths)}")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.x = x
        self.y = y
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.augment = augment
        self.transform = transform
        self.groups = groups
        self.n_examples = lengths.pop()

    def __len__(self) -> int:
        return -(-self.n_examples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor | None]]:
        if self.shuffle:
            order = torch.randperm(self.n_examples, generator=self.generator)
        else:
            order = torch.arange(self.n_examples)
        for chosen in order.split(self.batch_size):
            inputs: Inputs
            if isinstance(self.x, dict):
                inputs = {name: tensor[chosen] for name, tensor in self.x.items()}
            else:
                inputs = self.x[chosen]
            if self.augment is not None:
                inputs = self.augment(inputs, self.generator)
            if self.transform is not None:
                inputs = self.transform(inputs)
            yield inputs, None if self.y is None else self.y[chosen]


@dataclass(frozen=True)
class Split:
    """Indices of the examples of each part."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def split(n_examples: int, n_val: int, n_test: int = 0) -> Split:
    """The same split for everybody: it depends on the three counts and on nothing else.

    Each part is in random order, so the first examples of any part are a fair sample of it. RandomState's stream is
    frozen by NumPy's compatibility policy (NEP 19); that of its successors is not.
    """
    if n_val < 1 or n_test < 0 or n_val + n_test >= n_examples:
        raise InputError(
            f"{n_examples} examples must leave some for training after {n_val} for validation and {n_test} for the "
            "test; give more examples"
        )
    order = np.random.RandomState(0).permutation(n_examples)
    parts = np.split(order, [n_val, n_val + n_test])
    return Split(train=parts[2], val=parts[0], test=parts[1])


def split_groups(groups: np.ndarray, val: float, test: float) -> Split:
    """A split in which all examples of one group lie on one side; `val` and `test` are fractions of the groups."""
    names = np.unique(groups)
    if len(names) < 3:
        raise InputError(f"a split into train, validation and test needs at least 3 photographs, found {len(names)}")
    counts = [max(1, round(fraction * len(names))) for fraction in (val, test)]
    by_name = split(len(names), *counts)
    parts = [np.flatnonzero(np.isin(groups, names[part])) for part in (by_name.train, by_name.val, by_name.test)]
    return Split(*parts)


def loaders(
    x: Inputs,
    y: Tensor | None,
    parts: Mapping[str, np.ndarray],
    batch_size: int,
    seed: int,
    transform: Callable[[Inputs], Inputs] | None = None,
) -> dict[str, ArrayLoader]:
    """One loader per part of the same arrays; only `train` is shuffled."""
    made = {}
    for name, chosen in parts.items():
        index = torch.from_numpy(chosen)
        part = {key: tensor[index] for key, tensor in x.items()} if isinstance(x, dict) else x[index]
        made[name] = ArrayLoader(
            part,
            None if y is None else y[index],
            batch_size,
            shuffle=name == "train",
            generator=torch.Generator().manual_seed(seed),
            transform=transform,
        )
    return made


def scaled(pixels: Inputs) -> Inputs:
    """Bytes 0…255 as float32 in [0, 1]."""
    if isinstance(pixels, dict):
        raise InputError("pixels must be one tensor, got a dict")
    return pixels.float() / 255
