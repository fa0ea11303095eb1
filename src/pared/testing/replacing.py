"""What holds for every technique that replaces tensors or modules."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import SkipTest

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pared import registry, store
from pared.errors import MissingExtra, RecipeError
from pared.place import place_everywhere, relax_, settle_
from pared.site import install_
from pared.technique import Chain, Cost, Option, Technique, as_numpy, build, kept_of, stored_tensors
from pared.testing.declarations import settings_survive_a_recipe
from pared.testing.nets import NETS, Net, net, new
from pared.testing.observing import alone, divergence, equal, graph_of, is_registered, must, placed, shapes, solved

GENTLE_DIVERGENCE = 0.05
"""So many nats the gentlest settings at one site may move the outputs, on average over sites and examples."""


def its_ladder_gets_harsher(cls: type[Technique]) -> None:
    """The gentlest rung is nearly lossless; down the ladder bits fall and damage grows, predicted and measured."""
    must(len(cls.ladder) >= 2, f"{cls.__name__}.ladder must give two settings or more, from gentle to harsh")
    rungs = [cls(**rung) for rung in cls.ladder]
    names = [name for name in NETS if solved(rungs[0], name)]
    must(bool(names), f"{cls.__name__} must act on at least one of the nets {', '.join(NETS)}; it acts on none")
    for name in names:
        _must_fall("stored bits", rungs, [_bits(rung, name) for rung in rungs], name)
        _must_fall("minus the predicted damage", rungs, [-_predicted(rung, name) for rung in rungs], name)
        _must_fall("minus the divergence", rungs, [-divergence(rung, name) for rung in rungs], name)
        loss = divergence(rungs[0], name)
        must(loss <= GENTLE_DIVERGENCE, f"{rungs[0]} must be nearly lossless, but moves {name} by {loss:.3f} nats")


def sites_do_not_overlap(technique: Technique, trained: Net) -> None:
    """No tensor is covered twice; of channels, no position of an axis belongs to two groups."""
    seen: dict[str, str] = {}
    for site in technique.sites(trained.copy(), graph_of(technique, trained.name)):
        for piece in site.group.slices if site.group is not None else ():
            for position in np.flatnonzero(piece.channel >= 0).tolist():
                where = f"{piece.path}, axis {piece.axis}, position {position}"
                must(where not in seen, f"{technique.name}: {seen.get(where)} and {site.path} both cover {where}")
                seen[where] = site.path
        if site.group is not None:
            continue
        must(bool(site.covers), f"{technique.name}: the site {site.path} must cover a tensor")
        for path in site.covers:
            must(path not in seen, f"{technique.name}: two sites cover {path}, {seen.get(path)} and {site.path}")
            seen[path] = site.path


def refusals_have_reasons(technique: Technique, trained: Net) -> None:
    for site in technique.sites(trained.copy(), graph_of(technique, trained.name)):
        reason = technique.refuse(site)
        said = reason is None or (isinstance(reason, str) and len(reason.split()) > 2 and "\n" not in reason)
        must(said, f"{technique.name} must refuse {site.path} with a line that says why, got {reason!r}")


def build_reads_no_weights(technique: Technique, trained: Net) -> None:
    """On the meta device the same shapes come out; and on other weights the same values."""
    for one in solved(technique, trained.name):
        real = build(technique, one.site, one.structure)
        onto_meta = build(technique, one.site.on_meta(), one.structure)
        must(
            shapes(real) == shapes(onto_meta) == shapes(one.parts),
            f"{technique} builds other parts on the meta device than on the weights of {one.site.path}",
        )
        spoilt = replace(one.site, root=copy.deepcopy(one.site.root))
        for tensor in [*spoilt.root.parameters(), *spoilt.root.buffers()]:
            if tensor.is_floating_point():
                tensor.data.fill_(float("nan"))
        blind = build(technique, spoilt, one.structure)
        kept = kept_of(spoilt)
        added = {name: value for name, value in blind.state_dict(keep_vars=True).items() if id(value) not in kept}
        same = equal(added, {name: value for name, value in real.state_dict().items() if name in added})
        must(same, f"{technique} reads the weights of {one.site.path} in build; fit is the place for that")


def the_structure_survives_json(technique: Technique, trained: Net) -> None:
    for one in solved(technique, trained.name):
        again = technique.structure_type.model_validate_json(one.structure.model_dump_json())
        must(again == one.structure, f"the structure of {technique} at {one.site.path} changes on its way through JSON")


def fit_is_deterministic(technique: Technique, trained: Net) -> None:
    for one in solved(technique, trained.name):
        parts = build(technique, one.site, one.structure)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12345)
            technique.fit(one.site, parts, trained.statistics())
        same = equal(parts.state_dict(), one.parts.state_dict())
        must(same, f"{technique}, fitted twice at {one.site.path}, gives different parts")


def shape_type_and_device_are_kept(technique: Technique, trained: Net) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        model = trained.copy().to(dtype)
        before = {path: (t.shape, t.dtype, t.device) for path, t in model.state_dict().items()}
        edits, _ = place_everywhere(model, technique, trained.statistics(), graph_of(technique, trained.name))
        for path in [edit.paths[0] for edit in edits if technique.kind == "tensor"]:
            parent, _, name = path.rpartition(".")
            value = getattr(model.get_submodule(parent), name)
            found = (value.shape, value.dtype, value.device)
            must(found == before[path], f"{technique} must keep {before[path]} of {path}, but makes it {found}")
        with torch.no_grad():
            outputs = model.eval()(trained.inputs.to(dtype))
        must(outputs.dtype == dtype, f"with {technique}, outputs of a net in {dtype} are {outputs.dtype}")
        must(bool(outputs.isfinite().all()), f"with {technique}, outputs of a net in {dtype} are not finite")


def predicted_bits_are_coded_bytes(technique: Technique, trained: Net) -> None:
    """Within the precision of the coder's estimate, 1 % and 16 bytes a tensor; coded bytes keep to declared bits. Where
    channels go, exactly the bits of the tensors that are left of those that the group lies in."""
    for one in solved(technique, trained.name):
        if technique.kind == "channels":
            left = dict(alone(one, trained).state_dict())
            bits = sum(8 * left[path].numel() * left[path].element_size() for path in one.site.covers)
            predicted = technique.cost(one.site, one.parts).stored_bits
            must(abs(predicted - bits) < 0.5, f"{technique} at {one.site.path}: predicted {predicted:.0f} bits, left {bits}")
            continue
        predicted, kept = technique.cost(one.site, one.parts).stored_bits, kept_of(one.site)
        tensors = [(tensor, bits) for _, tensor, bits in stored_tensors(one.parts) if id(tensor) not in kept]
        coded = sum(8 * len(store.encode(as_numpy(tensor))[1]) for tensor, _ in tensors)
        close = abs(predicted - coded) <= 0.01 * coded + 128 * len(tensors)
        must(close, f"{technique} at {one.site.path}: predicted {predicted:.0f} bits, coded {coded}")
        declared = sum(t.numel() * (8 * t.element_size() if bits is None else bits) for t, bits in tensors)
        must(
            coded <= 1.02 * declared + 256 * len(tensors),
            f"{technique} at {one.site.path} declares {declared:.0f} bits, but the coder needs {coded}",
        )


def cost_is_known_from_shapes(technique: Technique, trained: Net) -> None:
    for one in solved(technique, trained.name):
        by_shapes, fitted = technique.cost(one.site), technique.cost(one.site, one.parts)
        must(by_shapes.stored_bits > 0, f"{technique} must cost something at {one.site.path}, got {by_shapes}")
        same = by_shapes.macs == fitted.macs
        must(same, f"{technique} at {one.site.path} has {by_shapes.macs} MACs by shapes, but {fitted.macs} fitted")


def the_original_is_untouched(technique: Technique, trained: Net) -> None:
    from pared import apply

    if not solved(technique, trained.name):
        return
    model = trained.copy()
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    smaller = apply(model, trained.task, technique)
    same = equal(before, model.state_dict()) and kinds == [type(module) for module in model.modules()]
    must(same, f"{technique} changes the original {trained.name}")
    must(not smaller.training, f"a model to which {technique} was applied must come in eval mode")


def relax_equals_fit(technique: Technique, trained: Net) -> None:
    """Trainable stand-ins compute, in both modes, bit for bit what the fitted parts compute; gradients reach their
    weights; trained and settled, they load into what `build` makes."""
    found = [one for one in solved(technique, trained.name) if not one.site.is_buffer]
    if not found or technique.kind == "channels":  # channels go before the training begins
        return
    options = [Option(one.site, technique, Cost(), 0.0, one.structure) for one in found]
    still, moving = trained.copy(), trained.copy()
    for one in found:
        install_(replace(one.site, root=still), copy.deepcopy(one.parts))
    relax_(moving, options, trained.statistics())
    for mode in (False, True):
        with torch.no_grad():
            expected, got = (_running_statistics(m.train(mode))(trained.inputs) for m in (still, moving))
        must(torch.equal(expected, got), f"relaxed, {technique} must compute what it does fitted, but outputs differ")
    moving.train()
    F.cross_entropy(moving(trained.inputs), expected.argmax(1).roll(1)).backward()
    weights = {name: p for name, p in moving.named_parameters() if p.requires_grad and p.numel()}
    for path in [path for one in found for path in one.site.paths]:
        inside = [weight for name, weight in weights.items() if _is_within(name, path)]
        must(bool(inside), f"relaxed, {technique} must have a trainable weight at {path}, found none")
        reached = all(weight.grad is not None for weight in inside)
        must(reached, f"relaxed, {technique} must pass gradients on to {path}; none arrives")
    torch.optim.SGD(weights.values(), lr=0.01).step()
    edits = settle_(moving, options, trained.statistics())
    twin = trained.copy()
    for edit in edits:
        edit.replay_(twin)
    twin.load_state_dict(moving.state_dict())
    with torch.no_grad():
        same = torch.equal(twin.eval()(trained.inputs), moving.eval()(trained.inputs))
    must(same, f"trained and settled, {technique} must load into what build makes, but outputs differ")


def it_saves_and_loads(technique: Technique, trained: Net) -> None:
    """Bit for bit into a new instance of the class."""
    _save_and_load(technique, trained, program=False)


def it_loads_without_the_class(technique: Technique, trained: Net) -> None:
    """Bit for bit from the program in the file, and into a new instance of the class."""
    _save_and_load(technique, trained, program=True)


def it_chains(technique: Technique, trained: Net) -> None:
    """With three partners, before and after: the chain builds, saves and loads, or refuses with a reason."""
    for partner in partners():
        for links in ((partner, technique), (technique, partner)):
            try:
                chain = Chain(*links)
            except RecipeError as refusal:
                told = str(refusal)
                must(len(told.split()) > 4, f"{links[0]} then {links[1]} must be refused with a reason, got {told!r}")
                continue
            refusals_have_reasons(chain, trained)
            if not solved(chain, trained.name):
                continue
            build_reads_no_weights(chain, trained)
            fit_is_deterministic(chain, trained)
            if is_registered(chain):
                settings_survive_a_recipe(chain)
                _save_and_load(chain, trained, program=False)


def the_export_agrees(technique: Technique, trained: Net) -> None:
    """ONNX Runtime gives the outputs of the compressed model."""
    from pared import export, run

    if not solved(technique, trained.name):
        return
    model = placed(technique, trained)
    with torch.no_grad():
        expected = model(trained.inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        try:
            export(model, path, example=trained.inputs)
            got = torch.as_tensor(run(path, trained.inputs.numpy()))
        except MissingExtra as missing:
            raise SkipTest(str(missing)) from missing
    error = float((got - expected).abs().max() / expected.abs().max())
    must(error < 1e-3, f"{technique} on {trained.name}: exported outputs differ by {error:.2g} of the largest")


@cache
def partners() -> tuple[Technique, ...]:
    """With whom every technique has to get along: one that prunes, one that codes, one that changes modules."""
    settings: dict[str, dict[str, Any]] = {
        "prune.magnitude": {"sparsity": 0.5},
        "quantize.integer": {"bits": 6},
        "factor.low_rank": {"keep": 0.5},
    }
    return tuple(registry.get(name)(**fields) for name, fields in settings.items())


def _must_fall(measure: str, rungs: list[Technique], values: list[float], name: str) -> None:
    told = ", ".join(f"{rung}: {value:.4g}" for rung, value in zip(rungs, values, strict=True))
    falls = values == sorted(values, reverse=True)
    must(falls, f"{measure} must not rise down the ladder, but on {name} it does: {told}")


def _bits(technique: Technique, name: str) -> float:
    return sum(technique.cost(one.site, one.parts).stored_bits for one in solved(technique, name))


def _predicted(technique: Technique, name: str) -> float:
    """The sum of the sites' predicted damages; 0 if the technique wants them to be measured."""
    statistics = net(name).statistics()
    damages = [technique.damage(one.site, one.parts, statistics) for one in solved(technique, name)]
    known = [damage for damage in damages if damage is not None]
    harms = all(damage > -1e-6 for damage in known)
    must(harms, f"{technique} must not promise a gain, but on {name} predicts {damages}")
    return sum(known) if len(known) == len(damages) else 0.0


def _save_and_load(technique: Technique, trained: Net, program: bool) -> None:
    from pared import load, save

    if not is_registered(technique):
        raise SkipTest(f"{technique.name} is not in the registry, and files go by its names; give it an entry point")
    if not solved(technique, trained.name):
        return
    model = placed(technique, trained)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused kernel that no program has, and that rounds otherwise
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / "net.pared"
            expected = model(trained.inputs)
            save(model, path, program=program)
            loaded = {"into the class": load(path, new(trained.name))}
            if program:
                loaded["without the class"] = load(path)
            got = {way: again.eval()(trained.inputs) for way, again in loaded.items()}
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for way, outputs in got.items():
        must(torch.equal(outputs, expected), f"{technique} on {trained.name}: outputs change when loaded {way}")


def _running_statistics(model: nn.Module) -> nn.Module:
    """The model with its batch-norms in eval mode, so that train and eval mode compute the same."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def _is_within(name: str, path: str) -> bool:
    """Whether a parameter belongs to what stands at a site: within the module, or in the tensor's parametrization."""
    parent, _, leaf = path.rpartition(".")
    held = f"{parent}.parametrizations.{leaf}." if parent else f"parametrizations.{leaf}."
    return name.startswith((f"{path}.", held))
