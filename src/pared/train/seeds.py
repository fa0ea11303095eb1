"""Randomness that depends on nothing but (seed, step, epoch)."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_epoch(loader: Any, seed: int, step: int, epoch: int) -> None:
    """Seed torch, numpy, random, and the loader's or its sampler's own generator, if there is one.

    Args:
        seed: of the whole run.
        step: of the recipe, so that two trainings of one run differ.
        epoch: within the training.
    """
    value = int(np.random.SeedSequence((seed, step, epoch)).generate_state(1, np.uint64)[0]) >> 1
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    for holder in (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(value)
        if callable(set_epoch := getattr(holder, "set_epoch", None)):
            set_epoch(epoch)
