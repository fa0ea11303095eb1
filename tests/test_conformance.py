"""Every technique that ships keeps every promise; the suite catches those that break one; the worked example keeps them."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import SkipTest

import pytest
import torch
from pydantic import Field
from torch import nn

from pared import Structure, Technique, quantize, recipe, registry
from pared.errors import RecipeError
from pared.site import Site
from pared.technique import Cost, Tensors
from pared.testing import Case, Nonconformance, cases, conformance, declarations, net, replacing

DOCS = Path(__file__).parents[1] / "docs"
SHIPPED = [registry.get(name) for name in registry.names()]


@pytest.mark.parametrize("case", cases(*SHIPPED), ids=str)
def test_conformance(case: Case) -> None:
    case()


@pytest.mark.parametrize("name", registry.names())
def test_every_technique_has_a_page_that_names_its_paper(name: str) -> None:
    page = (DOCS / "techniques" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    assert registry.get(name).paper.split(":")[1] in page
    for setting in registry.describe(name)["settings"]:
        assert f"`{setting['name']}`" in page or f"{{{{ settings {name} }}}}" in page


def test_the_table_of_settings_is_made_from_the_fields() -> None:
    spec = importlib.util.spec_from_file_location("docs_settings", DOCS / "settings.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    asked = "before\n\n{{ settings quantize.integer }}\n\nafter"
    pages = [SimpleNamespace(file=SimpleNamespace(src_uri=uri)) for uri in ("techniques/quantize.integer.md", "index.md")]
    page, other = (hook.on_page_markdown(asked, page, None, None) for page in pages)
    assert "| `bits` | an int in [2, 8] | `8` | bits per weight |" in page
    assert page.startswith("before\n\n| setting") and page.endswith("|\n\nafter")
    assert other == asked


# A technique that keeps its promises, and variants that break one each.


class Held(nn.Module):
    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

    def forward(self) -> torch.Tensor:
        return self.value


class Rounded(Technique):
    """Round weights to multiples of a step.

    Acts on   matrices.
    Reads     nothing.
    Refuses   nothing.
    Paper     nobody, arXiv:0000.00000.
    """

    acts_on: ClassVar = Tensors(min_axes=2)
    paper: ClassVar = "arXiv:0000.00000"
    ladder: ClassVar = ({"step": 0.01}, {"step": 0.1}, {"step": 0.5})
    step: float = Field(0.1, gt=0, le=1, description="step")

    def build(self, site: Site, structure: Structure) -> Held:
        return Held(site.tensor.shape, site.tensor.dtype)

    def fit(self, site: Site, parts: nn.Module, statistics: Any) -> None:
        parts.value.data.copy_((site.tensor / self.step).round() * self.step)


def variant(**overrides: Any) -> type[Technique]:
    own = {key: vars(Rounded)[key] for key in ("acts_on", "paper", "ladder", "build", "fit")}
    fields = {"__annotations__": {"step": float}, "step": Field(0.1, gt=0, le=1, description="step")}
    text = {"__doc__": Rounded.__doc__, "__module__": __name__}
    return type("Variant", (Technique,), {**text, **own, **fields, **overrides})


def reads_weights(self: Any, site: Site, structure: Structure) -> Held:
    parts = Held(site.tensor.shape, site.tensor.dtype)
    if not site.tensor.is_meta:
        parts.value.data.copy_(site.tensor)
    return parts


def is_random(self: Any, site: Site, parts: Any, statistics: Any) -> None:
    parts.value.data.copy_(site.tensor + 0.01 * torch.randn(site.tensor.shape))


def overlaps(self: Any, model: nn.Module, graph: Any = None) -> Iterator[Site]:
    yield from Technique.sites(self, model)
    yield from Technique.sites(self, model)


def is_not_what_is_fitted(self: Any, site: Site, structure: Structure, statistics: Any) -> nn.Module:
    free = Held(site.tensor.shape, site.tensor.dtype)
    free.value.data.copy_(site.tensor)
    return free.requires_grad_(True)


def cannot_be_trained(self: Any, site: Site, structure: Structure, statistics: Any) -> nn.Module:
    parts = self.build(site, structure)
    self.fit(site, parts, statistics)
    return parts


def understates(self: Any, site: Site, parts: nn.Module | None = None) -> Cost:
    return Cost(0.5 * Technique.cost(self, site, parts).stored_bits)


def forgets_macs(self: Any, site: Site, parts: nn.Module | None = None) -> Cost:
    return Cost(1.0, 0.0 if parts is None else 1.0)


BROKEN = {
    replacing.build_reads_no_weights: {"build": reads_weights},
    replacing.fit_is_deterministic: {"fit": is_random},
    replacing.sites_do_not_overlap: {"sites": overlaps},
    replacing.refusals_have_reasons: {"refuse": lambda self, site: "no"},
    replacing.relax_equals_fit: {"relax": is_not_what_is_fitted},
    replacing.predicted_bits_are_coded_bytes: {"cost": understates},
    replacing.cost_is_known_from_shapes: {"cost": forgets_macs},
    replacing.its_ladder_gets_harsher: {"ladder": ({"step": 0.5}, {"step": 0.01})},
    declarations.it_has_a_capability: {"acts_on": None},
    declarations.it_names_its_paper: {"paper": "a good one"},
    declarations.every_setting_is_described: {"step": Field(0.1, gt=0, le=1)},
    declarations.every_setting_rejects_bad_values: {"step": Field(0.1, gt=0, description="no upper end: takes infinity")},
}


@pytest.mark.parametrize("check", BROKEN, ids=lambda check: check.__name__)
def test_a_broken_promise_is_caught_and_a_kept_one_is_not(check: Any) -> None:
    broken, kept = variant(**BROKEN[check]), variant()
    if check.__module__.endswith("declarations") or check is replacing.its_ladder_gets_harsher:
        subjects: list[tuple[Any, ...]] = [(kept,), (broken,)]
    else:
        subjects = [(kept(step=0.25), net("perceptron")), (broken(step=0.25), net("perceptron"))]
    check(*subjects[0])
    with pytest.raises(Nonconformance):
        check(*subjects[1])


def test_a_stand_in_without_gradient_is_caught() -> None:
    with pytest.raises((Nonconformance, RuntimeError)):
        replacing.relax_equals_fit(variant(relax=cannot_be_trained)(step=0.25), net("perceptron"))


def test_a_technique_that_inherits_from_another_is_caught() -> None:
    with pytest.raises(Nonconformance, match="inherit from Technique alone"):
        declarations.it_is_final(type("Finer", (Rounded,), {"__module__": __name__}))


def test_conformance_lists_every_broken_promise() -> None:
    broken = variant(paper="", refuse=lambda self, site: "no")
    with pytest.raises(Nonconformance, match=r"(?s)promises are broken:.*it_names_its_paper.*refusals_have_reasons"):
        conformance(broken, nets=["perceptron"])


def test_saving_an_unregistered_technique_is_skipped_not_passed() -> None:
    with pytest.raises(SkipTest, match="not in the registry"):
        replacing.it_saves_and_loads(Rounded(step=0.25), net("perceptron"))


# The worked example of docs/add-a-technique.md.

PAGE = (DOCS / "add-a-technique.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```(?:python|markdown)\n(?:# |<!-- )(\S+?)(?: -->)?\n(.*?)```", PAGE, re.DOTALL))


def forget() -> None:
    registry.names.cache_clear()
    registry.get.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Path]:
    """The three files of the page, where the registry looks for techniques."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    quantize.__path__.append(str(tmp_path / "src/pared/quantize"))
    forget()
    yield tmp_path
    quantize.__path__.pop()
    sys.modules.pop("pared.quantize.logarithmic", None)
    vars(quantize).pop("logarithmic", None)
    forget()


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_technique_is_three_files_and_edits_none(example: Path) -> None:
    assert sorted(FILES) == [
        "docs/techniques/quantize.logarithmic.md",
        "src/pared/quantize/logarithmic.py",
        "tests/quantize/test_logarithmic.py",
    ]
    assert "quantize.logarithmic" in registry.names()
    assert quantize.Logarithmic is registry.get("quantize.logarithmic")
    steps = [{"quantize.logarithmic": {"bits": [3, 5]}}]
    assert [t.bits for t in recipe.load({"steps": steps}).steps[0].candidates] == [3, 5]
    with pytest.raises(RecipeError, match=r"quantize.logarithmic.bits must be an int in \[3, 8\], got 9"):
        recipe.load({"steps": [{"quantize.logarithmic": {"bits": 9}}]})


def test_the_tests_of_the_worked_example_pass(example: Path) -> None:
    module = loaded(example / "tests/quantize/test_logarithmic.py")
    module.test_powers_of_two_are_exact()
    for case in cases(registry.get("quantize.logarithmic")):
        module.test_conformance(case)


def test_a_technique_of_another_package_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/__init__.py").touch()
    (tmp_path / "shop/logarithmic.py").write_text(FILES["src/pared/quantize/logarithmic.py"], encoding="utf-8")
    about = tmp_path / "shop-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: shop\nVersion: 1.0\n", encoding="utf-8")
    entries = '[pared.techniques]\nshop.logarithmic = shop.logarithmic:Logarithmic\nshop.log = shop.logarithmic:Logarithmic\n'
    (about / "entry_points.txt").write_text(entries, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    try:
        (technique,) = recipe.load({"steps": [{"shop.logarithmic": {"bits": 4}}]}).steps[0].candidates
        replacing.it_loads_without_the_class(technique, net("perceptron"))
        with pytest.raises(RecipeError, match="must be called shop.logarithmic"):
            registry.get("shop.log")
    finally:
        sys.modules.pop("shop.logarithmic", None)
        sys.modules.pop("shop", None)
        monkeypatch.undo()
        forget()
