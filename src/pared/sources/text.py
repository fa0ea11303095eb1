"""A plain text file, cut into windows with the model's own tokenizer, for a causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pared.errors import InputError, MissingExtra
from pared.sources.contents import Data, Facts
from pared.sources.loader import ArrayLoader
from pared.task import Task, class_logits

WINDOW = 128


def data(file: str, facts: Facts, batch_size: int | None, seed: int) -> Data:
    """Inputs {"input_ids": (batch, window)}, targets (batch, window): each token's successor.

    The first eight tenths of the text train, the next tenth validates, the last one tests: neighbouring windows
    resemble each other, so the split is not drawn at random. The measure is `log_likelihood`.
    """
    path = Path(file)
    if not path.is_file():
        raise InputError(f"text:FILE must name a file, found no {file!r}; check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} must be UTF-8 text: {error}; convert it") from error
    return windows(_tokens(text, facts), batch_size, seed, file)


def windows(tokens: list[int], batch_size: int | None, seed: int, where: str) -> Data:
    """The task of guessing each next token, with `WINDOW` tokens in a window."""
    n_windows = (len(tokens) - 1) // WINDOW
    if n_windows < 10:
        raise InputError(
            f"{where} must hold at least {10 * WINDOW + 1} tokens (10 windows of {WINDOW}), found {len(tokens)}; "
            "give a longer text"
        )
    ids = torch.from_numpy(np.asarray(tokens[: n_windows * WINDOW + 1], np.int64))
    x, y = ids[:-1].view(n_windows, WINDOW), ids[1:].view(n_windows, WINDOW)
    tenth = n_windows // 10
    bounds = {"train": (0, n_windows - 2 * tenth), "val": (-2 * tenth, n_windows - tenth), "test": (-tenth, n_windows)}
    made = {
        part: ArrayLoader(
            {"input_ids": x[first:last]},
            y[first:last],
            batch_size or 8,
            shuffle=part == "train",
            generator=torch.Generator().manual_seed(seed),
        )
        for part, (first, last) in bounds.items()
    }
    counts = ", ".join(f"{loader.n_examples} {part}" for part, loader in made.items())
    note = f"{len(tokens)} tokens in {n_windows} windows of {WINDOW} ({counts}), in the order of the text"
    task = Task(train=made["train"], val=made["val"], test=made["test"], metric=log_likelihood)
    return Data(task, (note, "perplexity is exp(-log likelihood)"))


def log_likelihood(outputs: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each window in nats, and its number of tokens: perplexity is exp(-their ratio). Higher is better."""
    logits, targets = class_logits(outputs, batch)
    if targets is None:
        raise InputError("the likelihood of text needs targets, the next tokens; give batches of (inputs, targets)")
    pairs = zip(logits, targets, strict=True)  # one window at a time: vocabularies are large
    losses = torch.stack([F.cross_entropy(l.movedim(0, -1).float(), t, reduction="none", ignore_index=-100) for l, t in pairs])
    return -losses.flatten(1).sum(1), (targets != -100).flatten(1).sum(1)


def _tokens(text: str, facts: Facts) -> list[int]:
    tokenizer = loaded_tokenizer(facts)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def loaded_tokenizer(facts: Facts) -> Any:
    """The tokenizer that belongs to the model."""
    if facts.tokenizer is None:
        raise InputError(
            "text needs a model that names its tokenizer, as those of hf:NAME do; "
            "for another model write FILE.py:FUNCTION that returns a pared.Task"
        )
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "models") from error
    try:
        return AutoTokenizer.from_pretrained(facts.tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the tokenizer of {facts.tokenizer} must be in its folder or on the hub: {reason}") from error
