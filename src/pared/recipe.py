"""Recipes: YAML to steps of techniques and back. A list is a choice; the allocator takes one value per site, or none."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from pared import registry
from pared.errors import RecipeError
from pared.technique import Chain, Settings, Technique, explain, parse

KEYS = ("model", "data", "budget", "steps", "store")
BUDGET_KEYS = ("size", "macs", "latency", "max_drop")
STORES = ("smallest", "fastest", "huffman", "rans")


class Training(Settings):
    """How a step recovers: all settings of the training loop that a recipe may choose."""

    epochs: int = Field(5, ge=0, description="passes over the training data with trainable stand-ins")
    tune_epochs: int | None = Field(
        None, ge=0, description="passes after that with the codes frozen: tables, scales, biases; default a third of epochs"
    )
    learning_rate: float | None = Field(None, gt=0, description="peak learning rate; default: chosen by the loop")
    tune_learning_rate: float | None = Field(None, gt=0, description="peak of those passes; default: a quarter of learning_rate")
    anneal_until: float = Field(0.6, gt=0, le=1, description="share of the epochs after which schedules are at their end")
    average: float = Field(
        0.999, ge=0, lt=1, description="decay of the moving average of the weights that is kept; 0: the last weights themselves"
    )
    keep_best: bool = Field(True, description="keep the epoch that validates best; false: the last one")
    rounds: int = Field(1, ge=1, le=100, description="of channels: cut a little and recover, so many times, on a cubic schedule")
    hard: bool = Field(False, description="add the task's own loss to the losses named in `with`")


@dataclass(frozen=True)
class Step:
    """Candidates of which the allocator takes one per site, or none; then training."""

    candidates: tuple[Technique, ...]
    training: Training | None = None
    losses: tuple[Technique, ...] = ()

    @property
    def replaces(self) -> bool:
        return any(technique.kind is not None for technique in self.candidates)

    @property
    def cuts(self) -> bool:
        """Whether it removes channels."""
        return any(technique.kind == "channels" for technique in self.candidates)

    @property
    def learns(self) -> bool:
        """Whether training finds out which channels go."""
        return self.cuts and any(technique.learns for technique in self.candidates)

    @property
    def is_of_networks(self) -> bool:
        """Whether it acts on the whole network, so that there is nothing to choose."""
        return any(technique.kind == "network" for technique in self.candidates)


@dataclass(frozen=True)
class Recipe:
    steps: tuple[Step, ...]
    document: dict[str, Any]
    store: str = "smallest"

    def parts(self) -> tuple[list[Technique], list[Step], list[Technique]]:
        """Techniques for the whole network that come first, the steps among whose candidates is chosen, and those for
        the whole network that come last."""
        chosen = [number for number, step in enumerate(self.steps) if step.replaces and not step.is_of_networks]
        first, last = (chosen[0], chosen[-1]) if chosen else (len(self.steps), len(self.steps))
        whole = [(number, step.candidates[0]) for number, step in enumerate(self.steps) if step.is_of_networks]
        before = [technique for number, technique in whole if number < first]
        return before, [self.steps[number] for number in chosen], [technique for number, technique in whole if number > last]

    @property
    def budget(self) -> dict[str, Any]:
        return dict(self.document.get("budget") or {})

    def to_dict(self) -> dict[str, Any]:
        """As it was written: `load` of this is the same recipe."""
        return copy.deepcopy(self.document)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=110)


def shipped(name: str) -> Path:
    """The path of a recipe that comes with pared, such as `default`."""
    for folder in (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes"):
        if (path := folder / f"{name}.yaml").is_file():
            return path
    raise RecipeError(f"there is no shipped recipe {name}; give the path of a YAML file")


def load(source: str | Path | dict[str, Any] | Recipe | None) -> Recipe:
    """A recipe from a path, a shipped recipe's name, a dict, or None for the default one."""
    if isinstance(source, Recipe):
        return source
    if isinstance(source, dict):
        return _parse(source, "recipe")
    path = shipped("default") if source is None else Path(source)
    if not path.is_file() and path.suffix == "" and path.parent == Path("."):
        path = shipped(path.name)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"a recipe must be a readable YAML file, but {path} is not: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path} must be valid YAML, but it is not: {reason}") from error
    return _parse(document, path.name)


def _parse(document: Any, where: str) -> Recipe:
    if not isinstance(document, dict):
        raise RecipeError(f"a recipe must be a mapping with the key steps, got {type(document).__name__} ({where})")
    for key in document:
        if key not in KEYS:
            raise RecipeError(f"a recipe has no key {key}{_nearest(str(key), KEYS)} ({where})")
    budget = document.get("budget") or {}
    if not isinstance(budget, dict):
        raise RecipeError(f"budget must be a mapping, got {type(budget).__name__} ({where})")
    for key in budget:
        if key not in BUDGET_KEYS:
            raise RecipeError(f"a budget has no key {key}{_nearest(str(key), BUDGET_KEYS)} ({where})")
    store = document.get("store", "smallest")
    if store not in STORES:
        raise RecipeError(f"store must be one of {', '.join(STORES)}, got {store!r} ({where})")
    steps = document.get("steps")
    if not isinstance(steps, list) or not steps:
        raise RecipeError(f"steps must be a list with at least one step, got {steps!r} ({where})")
    read = tuple(_step(step, f"{where}, step {number}") for number, step in enumerate(steps, 1))
    recipe = Recipe(read, copy.deepcopy(document), store)
    check_order(recipe, where)
    return recipe


def check_order(recipe: Recipe, where: str = "recipe") -> None:
    """Techniques that replace modules or cut channels come before those that code tensors; those that rewrite the whole
    network come before all of them, those that change what it computes after."""
    _check_networks(recipe, where)
    coded: tuple[str, int] | None = None
    for number, step in enumerate(recipe.steps, 1):
        for technique in step.candidates:
            if technique.kind in ("module", "channels") and coded is not None:
                what = "modules" if technique.kind == "module" else "channels"
                raise RecipeError(
                    f"{technique.name} changes {what} and must come before {coded[0]}, which codes tensors, but it is "
                    f"step {number} and {coded[0]} is step {coded[1]} ({where}); swap the steps"
                )
        tensors = [technique.name for technique in step.candidates if technique.kind == "tensor"]
        if tensors and coded is None:
            coded = (tensors[0], number)


def _check_networks(recipe: Recipe, where: str) -> None:
    chosen = [number for number, step in enumerate(recipe.steps, 1) if step.replaces and not step.is_of_networks]
    for number, step in enumerate(recipe.steps, 1):
        if not step.is_of_networks:
            continue
        technique = step.candidates[0]
        if technique.in_training and not any(s.training is not None and not s.cuts for s in recipe.steps[: number - 1]):
            raise RecipeError(
                f"{technique} is trained along with a step before it, and none of them has train ({where}, step {number}); "
                "add train to the step that codes the weights"
            )
        if len(step.candidates) > 1:
            raise RecipeError(
                f"{technique.name} acts on the whole network, so its settings must be single values, got a choice of "
                f"{len(step.candidates)} ({where}, step {number}); take one"
            )
        if step.training is not None:
            raise RecipeError(f"{technique.name} trains nothing ({where}, step {number}); train belongs to another step")
        if technique.exact and any(other < number for other in chosen):
            raise RecipeError(f"{technique.name} must come first, but it is step {number} ({where}); move it up")
        if not technique.exact and any(other > number for other in chosen):
            raise RecipeError(f"{technique.name} must come last, but it is step {number} ({where}); move it down")


def _step(step: Any, where: str) -> Step:
    if not isinstance(step, dict):
        raise RecipeError(f"a step must be a mapping such as 'quantize.integer: {{bits: 8}}', got {step!r} ({where})")
    names = [key for key in step if key != "train"]
    if len(names) > 1:
        raise RecipeError(f"a step must name one technique, any_of or chain, got {', '.join(map(str, names))} ({where})")
    candidates = _candidates({names[0]: step[names[0]]}, where) if names else []
    if not candidates:
        found = "only train" if "train" in step else "nothing"
        raise RecipeError(f"a step must name a technique, got {found} ({where}); train belongs to the step that it recovers")
    kinds = {technique.kind is None for technique in candidates}
    if len(kinds) > 1:
        raise RecipeError(f"the candidates of a step must all replace something, or none of them ({where}); split the step")
    if len({technique.kind == "channels" for technique in candidates}) > 1:
        raise RecipeError(f"the candidates of a step must all remove channels, or none of them ({where}); split the step")
    training, losses = _training(step["train"], where) if "train" in step else (None, ())
    whole = Step(tuple(candidates), training, losses)
    _check_learned(whole, where)
    return whole


def _check_learned(step: Step, where: str) -> None:
    """Gates share one price, and channels go at once: one technique, one round."""
    if not step.learns:
        return
    names = list(dict.fromkeys(technique.name for technique in step.candidates))
    if len(names) > 1:
        raise RecipeError(f"{names[0]} learns which channels go and must be alone in its step, got {' and '.join(names)} ({where})")
    if step.training is not None and step.training.rounds > 1:
        rounds = step.training.rounds
        raise RecipeError(f"{names[0]} learns which channels go, all in one round, got rounds {rounds} ({where}); drop it")


def _candidates(entry: Any, where: str) -> list[Technique]:
    """One entry with its lists written out."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise RecipeError(f"a technique must be written as 'name: {{settings}}', got {entry!r} ({where})")
    ((name, value),) = entry.items()
    if name == "any_of":
        if not isinstance(value, list) or not value:
            raise RecipeError(f"any_of must be a list of techniques, got {value!r} ({where})")
        return [technique for item in value for technique in _candidates(item, where)]
    if name == "chain":
        if not isinstance(value, list) or not value:
            raise RecipeError(f"chain must be a list of techniques, got {value!r} ({where})")
        links = [_candidates(item, where) for item in value]
        try:
            return [Chain(*choice) for choice in itertools.product(*links)]
        except RecipeError as error:
            raise RecipeError(f"{error} ({where})") from error
    try:
        cls = registry.get(str(name))
    except RecipeError as error:
        raise RecipeError(f"{error} ({where})") from error
    settings = value or {}
    if not isinstance(settings, dict):
        raise RecipeError(f"the settings of {name} must be a mapping, got {settings!r} ({where})")
    for key, value in settings.items():
        if value == []:
            raise RecipeError(f"{name}.{key} must be a value or a list of choices, got an empty list ({where})")
    choices = [value if isinstance(value, list) else [value] for value in settings.values()]
    return [parse(cls, dict(zip(settings, choice, strict=True)), where) for choice in itertools.product(*choices)]


def _training(value: Any, where: str) -> tuple[Training, tuple[Technique, ...]]:
    settings = dict(value or {}) if isinstance(value, dict | None) else None
    if settings is None:
        raise RecipeError(f"train must be a mapping such as {{epochs: 5}}, got {value!r} ({where})")
    entries = settings.pop("with", [])
    if not isinstance(entries, list):
        raise RecipeError(f"train.with must be a list of techniques, got {entries!r} ({where})")
    losses = [technique for entry in entries for technique in _candidates(entry, where)]
    for technique in losses:
        if type(technique).loss is Technique.loss:
            raise RecipeError(f"train.with takes techniques that add a loss; {technique.name} adds none ({where})")
    for key in settings:
        if key not in Training.model_fields:
            raise RecipeError(f"train has no setting {key}{_nearest(str(key), (*Training.model_fields, 'with'))} ({where})")
    try:
        return Training(**settings), tuple(losses)
    except ValidationError as error:
        raise RecipeError(explain(Training, error, where)) from error


def _nearest(key: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    near = difflib.get_close_matches(key, keys, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(keys)}"


def to_entry(technique: Technique) -> dict[str, Any]:
    """A technique as it is written in a recipe; defaults are left out."""
    if isinstance(technique, Chain):
        return {"chain": [to_entry(link) for link in technique.techniques]}
    return {technique.name: technique.model_dump(exclude_defaults=True)}
