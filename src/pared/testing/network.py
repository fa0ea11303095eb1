"""What holds for every technique that acts on the whole network."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import SkipTest

import torch
import torch.nn.functional as F
from torch import nn

from pared.budget.observe import observe
from pared.errors import InputError, MissingExtra
from pared.record import record_of
from pared.site import network_site
from pared.technique import Edit, Technique
from pared.testing.nets import Net, new
from pared.testing.observing import equal, is_registered, must
from pared.testing.replacing import GENTLE_DIVERGENCE


def _applied(technique: Technique, trained: Net) -> nn.Module | None:
    """The net with the technique in it; None where there is nothing for it to do."""
    from pared import apply

    if technique.refuse(network_site(trained.copy())):
        return None
    try:
        return apply(trained.copy(), trained.task, technique)
    except InputError as refusal:
        must("changes nothing" in str(refusal), f"{technique} on {trained.name}: {refusal}")
        return None


def _edit(model: nn.Module) -> Edit:
    record = record_of(model)
    if record is None:
        raise ValueError("a model to which a technique was applied carries its edits")
    return record.edits[-1]


def it_has_one_site(technique: Technique, trained: Net) -> None:
    sites = list(technique.sites(trained.copy()))
    must(len(sites) == 1 and sites[0].path == "", f"{technique} must have the network as its one site, got {sites}")
    reason = technique.refuse(sites[0])
    must(reason is None or len(reason.split()) > 2, f"{technique} must refuse {trained.name} with a reason, got {reason!r}")


def it_acts_on_a_copy(technique: Technique, trained: Net) -> None:
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    _applied(technique, trained)
    must(equal(before, trained.model.state_dict()), f"{technique} changes the original {trained.name}")


def it_is_deterministic(technique: Technique, trained: Net) -> None:
    first, second = _applied(technique, trained), _applied(technique, trained)
    if first is not None and second is not None:
        must(equal(first.state_dict(), second.state_dict()), f"{technique}, applied twice to {trained.name}, differs")
        again = technique.structure_type.model_validate_json(_edit(first).structure.model_dump_json())
        must(again == _edit(first).structure, f"the structure of {technique} changes on its way through JSON")


def it_keeps_the_type(technique: Technique, trained: Net) -> None:
    """In half and double precision outputs stay in that type, and finite; gradients reach the weights."""
    model = _applied(technique, trained)
    if model is None:
        return
    for dtype in (torch.float64, torch.float16):
        with torch.no_grad():
            outputs = model.to(dtype)(trained.inputs.to(dtype))
        must(outputs.dtype == dtype and bool(outputs.isfinite().all()), f"with {technique}, a net in {dtype} gives {outputs.dtype}")
    model.float().requires_grad_(True)
    F.cross_entropy(model(trained.inputs), torch.zeros(len(trained.inputs), dtype=torch.int64)).backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.is_floating_point() and p.numel() > 64]
    must(any(reached), f"with {technique}, gradients must reach the weights of {trained.name}; none arrives")


def it_computes_nearly_the_same(technique: Technique, trained: Net) -> None:
    model = _applied(technique, trained)
    if model is None:
        return
    with torch.no_grad():
        theirs, ours = trained.model(trained.inputs), model(trained.inputs)
    if technique.exact:
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        must(error < 1e-4, f"{technique} must rewrite {trained.name} exactly, but outputs move by {error:.2g}")
    elif technique in (type(technique)(), type(technique)(**(technique.ladder or ({},))[0])):
        lost = float(F.kl_div(F.log_softmax(ours, 1), F.log_softmax(theirs, 1), log_target=True, reduction="batchmean"))
        must(lost < 4 * GENTLE_DIVERGENCE, f"{technique} must be nearly lossless, but moves {trained.name} by {lost:.3f} nats")


def it_saves_and_loads_both_ways(technique: Technique, trained: Net) -> None:
    """Bit for bit into a new instance of the class, and from the program in the file."""
    from pared import load, save

    if not is_registered(technique):
        raise SkipTest(f"{technique.name} is not in the registry, and files go by its names; give it an entry point")
    model = _applied(technique, trained)
    if model is None:
        return
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / "net.pared"
            expected = model(trained.inputs)
            save(model, path)
            for way, again in {"into the class": load(path, new(trained.name)), "without the class": load(path)}.items():
                same = torch.equal(again.eval()(trained.inputs), expected)
                must(same, f"{technique} on {trained.name}: outputs change when loaded {way}")
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def its_export_agrees(technique: Technique, trained: Net) -> None:
    from pared import export

    model = _applied(technique, trained)
    if model is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            export(model, Path(folder) / "net.onnx", example=trained.inputs)
        except MissingExtra as missing:
            raise SkipTest(str(missing)) from missing


def it_reads_what_it_says(technique: Technique, trained: Net) -> None:
    """With nothing but what it `reads`, it finds the same places."""
    model = trained.copy()
    site = network_site(model)
    if technique.refuse(site):
        return
    statistics = observe(model, trained.task, [technique])
    structure = technique.decide(site, statistics)
    applied = _applied(technique, trained)
    found = technique.structure_type() if applied is None else _edit(applied).structure
    must(structure == found, f"{technique} decides otherwise than it is applied on {trained.name}")
