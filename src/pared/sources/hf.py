"""`hf:NAME`: models of transformers and data sets of the Hugging Face hub, by name or by folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pared.errors import InputError, MissingExtra
from pared.sources.contents import Data, Facts, ImageFormat, facts_of, task_of
from pared.sources.images import CropAndFlip, Normalize, centred
from pared.sources.loader import ArrayLoader, split
from pared.sources.text import loaded_tokenizer, windows
from pared.sources.torchvision_schemas import declare_missing_schemas

MAX_EXAMPLES = 20_000


def model(name: str) -> tuple[nn.Module, Facts]:
    """The architecture that the checkpoint names, with its weights. Reads safetensors only, and no code of the hub."""
    declare_missing_schemas()
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "models") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        known = [getattr(transformers, each, None) for each in getattr(config, "architectures", None) or []]
        architecture = next((each for each in known if each is not None), transformers.AutoModel)
        network = architecture.from_pretrained(name, use_safetensors=True)
    except Exception as error:  # the hub's client raises classes of several libraries
        lines = str(error).strip().splitlines()
        raise InputError(
            f"hf:{name} must be a folder with a transformers model or reachable on the hub: "
            f"{lines[0] if lines else type(error).__name__}; connect, or give a folder"
        ) from error
    facts = facts_of(network, f"hf:{name}")
    if facts.image is not None:
        image = facts.image
        pixels = torch.randn(2, image.channels, image.height, image.width, generator=torch.Generator().manual_seed(0))
        return network, Facts(facts.spec, image, None, (), {"pixel_values": pixels})
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        return network, facts
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    return network, Facts(facts.spec, None, facts.tokenizer, (), {"input_ids": ids})


def data(name: str, facts: Facts, batch_size: int | None, seed: int) -> Data:
    """`hf:NAME` or `hf:NAME?CONFIGURATION`; at most 20,000 examples of a part are read.

    A column of pictures becomes inputs at the model's size, with the column `label` or `labels` as targets; a column
    `text` becomes windows for a causal language model.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtra("datasets", "hub") from error
    path, _, configuration = name.partition("?")
    try:
        parts = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # the hub's client raises classes of several libraries
        lines = str(error).strip().splitlines()
        raise InputError(
            f"hf:{name} must be a folder with a data set or reachable on the hub: "
            f"{lines[0] if lines else type(error).__name__}; connect, or give a folder"
        ) from error
    if "train" not in parts:
        raise InputError(f"hf:{name} must have a part train, it has {', '.join(parts)}")
    columns = parts["train"].features
    pictures = [column for column, kind in columns.items() if isinstance(kind, datasets.Image)]
    if pictures:
        return _pictures(parts, pictures[0], facts, batch_size, seed, name)
    if "text" in columns:
        lines = parts["train"][:MAX_EXAMPLES]["text"]
        tokens = loaded_tokenizer(facts)("\n".join(lines), add_special_tokens=False, verbose=False)["input_ids"]
        return windows(tokens, batch_size, seed, f"hf:{name}")
    raise InputError(f"hf:{name} must have a column of pictures or a column text, it has {', '.join(columns)}")


def _pictures(parts: Any, column: str, facts: Facts, batch_size: int | None, seed: int, name: str) -> Data:
    format = facts.image or ImageFormat()
    label = next((known for known in ("label", "labels") if known in parts["train"].features), None)
    chosen: dict[str, tuple[str, np.ndarray]] = {}
    for part, aliases in {"train": ("train",), "val": ("validation", "val", "valid"), "test": ("test",)}.items():
        for alias in aliases:
            if alias in parts:
                chosen[part] = (alias, np.arange(min(len(parts[alias]), MAX_EXAMPLES)))
    notes = [f"pictures as {format}"]
    if "val" not in chosen:
        alias, rows = chosen["train"]
        cut = split(len(rows), n_val=max(1, len(rows) // 10))
        chosen["train"], chosen["val"] = (alias, rows[cut.train]), (alias, rows[cut.val])
        notes.append("there is no part validation: a tenth of train is split from it at random")
    counts = ", ".join(f"{len(chosen[part][1])} {part}" for part in ("train", "val", "test") if part in chosen)
    notes.append(f"photographs: {counts}")

    made = {}
    for part, (alias, rows) in chosen.items():
        selected = parts[alias].select(rows)
        mode = "L" if format.channels == 1 else "RGB"
        x = np.stack([centred(picture.convert(mode), format, part == "train") for picture in selected[column]])
        if label is not None and np.asarray(selected[label]).ndim != 1:
            raise InputError(f"hf:{name} must have one class per picture in its column {label}; write FILE.py:FUNCTION")
        made[part] = ArrayLoader(
            torch.from_numpy(x),
            None if label is None else torch.tensor(selected[label]).long(),
            batch_size or 32,
            shuffle=part == "train",
            generator=torch.Generator().manual_seed(seed),
            augment=CropAndFlip(format.height, format.width) if part == "train" else None,
            transform=Normalize(format),
            groups=np.arange(len(x)),
        )
    return Data(task_of(made), tuple(notes))
