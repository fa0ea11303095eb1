"""Chains, costs, stand-ins and messages, on techniques of five lines and on those that ship."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from pared.errors import RecipeError
from pared.factor import LowRank
from pared.prune import Magnitude
from pared.quantize import Codebook, Integer
from pared.settings import Settings, allowed
from pared.site import Site, install_, tensor_sites
from pared.statistics import Curvature, Diagonal, Kronecker, Statistics
from pared.technique import (
    Chain,
    Cost,
    Edit,
    StraightThrough,
    Structure,
    Technique,
    Tensors,
    as_numpy,
    build,
    parse,
    stored_bits,
)


class Halves(nn.Module):
    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.part = nn.Parameter(torch.zeros(shape), requires_grad=False)

    def forward(self) -> Tensor:
        return 2 * self.part


class Halved(Technique):
    """Stores half of each weight: exact, and no cheaper."""

    acts_on: ClassVar = Tensors(min_axes=2)
    name: ClassVar = "test.halved"  # type: ignore[assignment]

    def build(self, site: Site, structure: Structure) -> Halves:
        return Halves(site.tensor.shape)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        parts.part.data.copy_(site.tensor / 2)


def linear_site(inputs: int = 16, outputs: int = 8) -> Site:
    model = nn.Sequential(nn.Linear(inputs, outputs))
    return next(tensor_sites(model))


# Settings and their messages.


@pytest.mark.parametrize(
    ("annotation", "field", "words"),
    [
        (int, Field(ge=2, le=8), "an int in [2, 8]"),
        (float, Field(gt=0, lt=1), "a number in (0, 1)"),
        (float | None, Field(ge=0), "a number of 0 or more"),
        (float, Field(lt=2), "a number below 2"),
        (int, Field(), "an int"),
        (bool, Field(), "true or false"),
        (Literal["a", "b", "c"], Field(), '"a", "b" or "c"'),
        (Annotated[int, Field(ge=2)] | Literal["all"], Field(), 'an int of 2 or more or "all"'),
        (tuple[int, ...], Field(), "a list of which each is an int"),
    ],
)
def test_what_a_field_takes_is_said_in_words(annotation: Any, field: Any, words: str) -> None:
    assert allowed(annotation, field.metadata) == words


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (Integer, {"bits": 16}, "quantize.integer.bits must be an int in [2, 8], got 16 (recipe.yaml, step 2)"),
        (Integer, {"bits": "many"}, "quantize.integer.bits must be an int in [2, 8], got 'many' (recipe.yaml, step 2)"),
        (Integer, {"group": 1}, 'quantize.integer.group must be an int of 2 or more, "tensor" or "channel", got 1 (rec'),
        (Integer, {"bitz": 4}, "quantize.integer has no setting bitz; did you mean bits? (recipe.yaml, step 2)"),
        (Integer, {"zzz": 4}, "quantize.integer has no setting zzz; its settings are bits, scheme, group, tens"),
        (Magnitude, {}, "prune.magnitude: sparsity must be given with the pattern unstructured (recipe.yaml, step 2)"),
        (LowRank, {"rank": 0}, "factor.low_rank.rank must be an int of 1 or more, got 0 (recipe.yaml, step 2)"),
    ],
)
def test_a_wrong_setting_says_what_must_hold_what_was_found_and_where(
    cls: type[Technique], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(cls, fields, "recipe.yaml, step 2")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_missing_setting_is_asked_for() -> None:
    class Needy(Technique):
        size: int = Field(ge=1, description="size")

    with pytest.raises(RecipeError, match=r"\.size must be given: an int of 1 or more"):
        parse(Needy, {})


def test_settings_cannot_be_changed_and_compare_by_value() -> None:
    assert Integer(bits=4) == Integer(bits=4) != Integer(bits=5)
    assert hash(Integer(bits=4)) == hash(Integer(bits=4))
    with pytest.raises(ValueError, match="frozen"):
        Integer(bits=4).bits = 5
    assert isinstance(Integer(), Settings)


def test_a_technique_shows_what_was_chosen_and_always_its_first_setting() -> None:
    assert str(Integer()) == "quantize.integer(bits=8)"
    assert str(Integer(bits=4, group=64)) == "quantize.integer(bits=4, group=64)"
    assert str(Magnitude(pattern="2:4")) == "prune.magnitude(pattern=2:4)"


# Costs.


def test_costs_add_up() -> None:
    total = sum([Cost(8, 2, 0.5), Cost(1, 1, 0.25), Cost()])
    assert total == Cost(9, 3, 0.75)


def test_bits_by_shapes_are_those_that_the_parts_declare() -> None:
    site = linear_site(64, 32)
    assert Codebook(bits=3).cost(site).stored_bits == 64 * 32 * 3 + 16 * 8
    assert Halved().cost(site).stored_bits == 64 * 32 * 32


def test_a_shared_tensor_is_stored_once() -> None:
    both = nn.ModuleList([nn.Linear(8, 8, bias=False, device="meta"), nn.Linear(8, 8, bias=False, device="meta")])
    assert stored_bits(both) == 2 * 64 * 32
    both[1].weight = both[0].weight
    assert stored_bits(both) == 64 * 32


def test_multiply_adds_of_coded_factors_do_not_count_their_scales() -> None:
    technique = Chain(LowRank(rank=4), Integer(bits=4, group=8))
    model = nn.Sequential(nn.Linear(64, 32))
    site = replace(next(technique.sites(model)), positions=3.0)
    _, parts = technique.solve(site, Statistics())
    assert technique.cost(site, parts).macs == technique.cost(site).macs == 3 * 4 * (64 + 32)


def test_what_a_module_keeps_costs_nothing() -> None:
    technique = LowRank(rank=2)
    for bias in (True, False):
        site = next(technique.sites(nn.Sequential(nn.Linear(32, 16, bias=bias))))
        assert technique.cost(site).stored_bits == 32 * 2 * (32 + 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.int8])
def test_arrays_hold_the_bits_of_any_type(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, -2.0, 0.5, 0.0]).to(dtype)
    again = torch.from_numpy(as_numpy(values).copy()).view(dtype)
    assert torch.equal(again.float(), values.float())


# Damage.


def test_damage_is_the_quadratic_of_the_change() -> None:
    site = linear_site()
    hessian = torch.rand(8, 16)
    statistics = Statistics({site.path: Curvature(torch.Size((8, 16)), [Diagonal(hessian)])})
    technique = Integer(bits=3)
    _, parts = technique.solve(site, statistics)
    expected = 0.5 * float((hessian * (parts().detach() - site.tensor) ** 2).sum())
    assert technique.damage(site, parts, statistics) == pytest.approx(expected, rel=1e-5)
    assert technique.damage(site, parts, Statistics()) is None


def test_a_kronecker_term_is_the_quadratic_written_out() -> None:
    a, g, d = torch.rand(6, 6), torch.rand(4, 4), torch.randn(4, 6)
    a, g = a @ a.T, g @ g.T
    full = Kronecker(a[None], g[None], lambda w: w[None])
    assert full.quadratic(d) == pytest.approx(0.5 * float(torch.trace(g @ d @ a @ d.T)), rel=1e-5)
    assert torch.allclose(full.diagonal()[0], g.diagonal()[:, None] * a.diagonal()[None])


# Chains.


def test_a_chain_needs_techniques_that_replace() -> None:
    from pared.distill import Logits

    for links, message in [
        ((), "at least one technique"),
        (("quantize.integer",), "must hold techniques, got str"),
        ((Logits(),), "replace something; distill.logits does not"),
        ((Integer(), LowRank(keep=0.5)), "factor.low_rank replaces modules and cannot follow quantize.integer"),
    ]:
        with pytest.raises(RecipeError, match=message):
            Chain(*links)  # type: ignore[arg-type]


def test_a_chain_of_chains_is_a_chain() -> None:
    a, b, c = Magnitude(sparsity=0.5), Codebook(bits=3), Integer(bits=4)
    assert Chain(Chain(a, b), c) == Chain(a, Chain(b, c)) == Chain(a, b, c)
    assert str(Chain(a, b)) == "chain(prune.magnitude(sparsity=0.5), quantize.codebook(bits=3))"


def test_the_second_acts_on_what_the_first_built() -> None:
    site = linear_site()
    _, parts = Chain(Halved(), Integer(bits=3)).solve(site, Statistics())
    half = Site.of(nn.Module(), "part")
    half.root.part = nn.Parameter(site.tensor / 2)
    _, alone = Integer(bits=3).solve(half, Statistics())
    assert torch.equal(parts(), 2 * alone())


def test_three_in_a_row_act_one_on_the_other() -> None:
    technique = Chain(LowRank(rank=6), Magnitude(sparsity=0.5), Codebook(bits=3))
    model = nn.Sequential(nn.Linear(64, 48))
    site = next(technique.sites(model))
    assert technique.refuse(site) is None
    _, parts = technique.solve(site, Statistics())
    for name in ("up", "down"):
        value = getattr(parts, name)
        assert len(value.unique()) <= 8
        assert int((value == 0).sum()) == value.numel() // 2
    assert parts.bias is model[0].bias


def test_a_chain_refuses_for_what_any_link_refuses() -> None:
    technique = Chain(LowRank(rank=1), Integer(bits=8, group=2))
    half = nn.Sequential(nn.Linear(64, 64)).half()
    assert "quantize.integer: 8-bit integers" in (technique.refuse(next(technique.sites(half))) or "")
    empty = Chain(Integer(bits=4), Magnitude(sparsity=0.5, pattern="3x3"))
    assert "prune.magnitude" in (empty.refuse(linear_site(63, 64)) or "")


def test_fitting_anew_obeys_the_structure_and_decides_nothing() -> None:
    """A chain that found zeros keeps a code for zero even where none is left; the parts stay loadable."""
    technique = Chain(Magnitude(sparsity=0.5), Codebook(bits=2))
    site = linear_site()
    structure, parts = technique.solve(site, Statistics())
    shapes = {name: value.shape for name, value in parts.state_dict().items()}
    Chain(Magnitude(sparsity=0.0), Codebook(bits=2)).fit(site, parts, Statistics())
    assert {name: value.shape for name, value in parts.state_dict().items()} == shapes
    assert not bool((parts() == 0).any())
    assert {name: value.shape for name, value in build(technique, site, structure).state_dict().items()} == shapes


def test_encoding_in_a_chain_keeps_the_tables() -> None:
    technique = Chain(Magnitude(sparsity=0.5), Codebook(bits=2))
    site, other = linear_site(), linear_site()
    _, parts = technique.solve(site, Statistics())
    table = {name: value.clone() for name, value in parts.state_dict().items() if name.endswith("table")}
    technique.encode(other, parts, Statistics())
    assert table and all(torch.equal(parts.state_dict()[name], value) for name, value in table.items())
    assert torch.equal(parts() == 0, other.tensor.abs() <= other.tensor.abs().flatten().sort().values[63])


def test_a_chain_anneals_link_by_link() -> None:
    chain = Chain(Magnitude(sparsity=0.8), Codebook(bits=2))
    assert chain.at(0.3) == Magnitude(sparsity=0.8 * 0.875)
    assert chain.at(0.6) == Magnitude(sparsity=0.8)
    assert chain.at(1.0) == chain


# Stand-ins.


def stand_in(technique: Technique, site: Site) -> StraightThrough:
    relaxed = technique.relax(site, technique.decide(site, Statistics()), Statistics())
    assert isinstance(relaxed, StraightThrough)
    return relaxed


@pytest.mark.parametrize("technique", [Integer(bits=3), Codebook(bits=2), Chain(Magnitude(sparsity=0.5), Codebook(bits=2))])
@pytest.mark.parametrize("owner", [nn.Linear(16, 8), nn.ConvTranspose2d(8, 6, 3)], ids=["linear", "transposed"])
def test_a_stand_in_shows_what_is_fitted(technique: Technique, owner: nn.Module) -> None:
    site = next(tensor_sites(nn.Sequential(owner)))
    _, parts = technique.solve(site, Statistics())
    relaxed = stand_in(technique, site)
    assert torch.equal(relaxed(), parts())
    assert torch.equal(relaxed.eval()(), parts())
    assert relaxed.settle().state_dict().keys() == parts.state_dict().keys()


def test_a_gradient_passes_through_as_if_nothing_were_coded() -> None:
    relaxed, upstream = stand_in(Integer(bits=2), linear_site()), torch.randn(8, 16)
    (relaxed() * upstream).sum().backward()
    assert torch.equal(relaxed.weight.grad, upstream)


def test_a_stand_in_follows_its_weight() -> None:
    relaxed = stand_in(Integer(bits=4), linear_site())
    relaxed.weight.data.copy_(torch.randn(8, 16))
    for _ in range(StraightThrough.REFIT):
        shown = relaxed()
    assert float((shown - relaxed.weight).detach().abs().max()) < 0.5


def test_a_copied_stand_in_trains_its_own_weight() -> None:
    relaxed = stand_in(Integer(bits=8), linear_site())
    twin = copy.deepcopy(relaxed)
    twin.weight.data.fill_(1.0)
    assert torch.allclose(twin.settle()(), torch.ones(8, 16), atol=0.01)
    assert not torch.allclose(relaxed.settle()(), torch.ones(8, 16), atol=0.5)


def test_a_chain_whose_schedule_starts_without_zeros_can_be_annealed_and_settled() -> None:
    technique = Chain(Magnitude(sparsity=0.75), Codebook(bits=2))
    site = linear_site()
    relaxed = stand_in(technique, site)
    for progress in (0.0, 0.3, 1.0):
        relaxed.anneal(progress)
        relaxed().sum().backward()
    parts = relaxed.settle()
    assert int((parts() == 0).sum()) == 96
    fresh = build(technique, site, technique.decide(site, Statistics()))
    fresh.load_state_dict(parts.state_dict())


def test_a_module_chain_relaxes_the_factors() -> None:
    technique = Chain(LowRank(rank=4), Integer(bits=4))
    site = next(technique.sites(nn.Sequential(nn.Linear(32, 16))))
    structure, fitted = technique.solve(site, Statistics())
    relaxed = technique.relax(site, structure, Statistics())
    assert relaxed is not None
    x = torch.randn(3, 32)
    assert torch.equal(relaxed(x), fitted(x))
    relaxed(x).sum().backward()
    trained = [name for name, p in relaxed.named_parameters() if p.grad is not None]
    assert len([name for name in trained if name.endswith("decoder.weight")]) == 2


# Sites and edits.


def test_a_technique_acts_where_its_class_says() -> None:
    class Wide(Halved):
        acts_on: ClassVar = Tensors(min_axes=2, min_elements=100)

    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    assert [site.path for site in Wide().sites(model)] == ["0.weight"]
    assert [site.path for site in Halved().sites(model)] == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    "technique", [Integer(bits=4, group=8), Chain(Magnitude(sparsity=0.5), Codebook(bits=2)), LowRank(keep=0.4)]
)
def test_an_edit_replayed_takes_the_state_of_the_model_it_was_made_on(technique: Technique) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)).eval()

    done, edits = model(), []
    for site in list(technique.sites(done)):
        if not technique.refuse(site):
            structure, parts = technique.solve(site, Statistics())
            install_(site, parts)
            edits.append(Edit(technique, site.paths, structure))
    assert len(edits) >= 1
    other = model()
    for edit in edits:
        edit.replay_(other)
    other.load_state_dict(done.state_dict())
    x = torch.randn(2, 32)
    assert torch.equal(other.eval()(x), done.eval()(x))


def test_a_technique_that_replaces_nothing_says_so() -> None:
    class Idle(Technique):
        pass

    assert Idle().kind is None
    assert list(Idle().sites(nn.Linear(2, 2))) == []
    with pytest.raises(NotImplementedError, match="Idle replaces nothing"):
        Idle().build(linear_site(), Structure())


def _names(sites: Iterator[Site]) -> list[str]:
    return [site.path for site in sites]


def test_coded_tables_are_sites_of_a_later_technique() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    site = next(tensor_sites(model))
    install_(site, Codebook(bits=8).solve(site, Statistics())[1])
    assert "0.parametrizations.weight.0.decoder.table" in _names(Integer(bits=8).sites(model))
