"""Techniques are found by their files, and only when they are asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

import pared
from pared import registry
from pared.errors import RecipeError
from pared.technique import Technique


def test_every_file_of_a_family_is_a_technique_of_that_name() -> None:
    root = Path(pared.__file__).parent
    files = {
        f"{family}.{path.stem}" for family in registry.FAMILIES for path in (root / family).glob("*.py") if path.stem != "__init__"
    }
    assert files <= set(registry.names())
    for name in files:
        cls = registry.get(name)
        assert issubclass(cls, Technique)
        assert cls.__module__ == f"pared.{name}"


def test_names_correspond_to_classes() -> None:
    from pared import factor, prune, quantize

    assert registry.get("factor.low_rank") is factor.LowRank
    assert registry.get("prune.magnitude") is prune.Magnitude
    assert {"Integer", "Codebook"} <= set(dir(quantize))
    assert quantize.Integer(bits=4).name == "quantize.integer"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("quantize.interger", "did you mean quantize.integer"),
        ("prune.magnitud", "did you mean prune.magnitude"),
        ("xyz", "there are: .*quantize.integer"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=f"there is no technique {name}; {hint}"):
        registry.get(name)


def test_an_unknown_class_of_a_family_is_answered_with_those_that_there_are() -> None:
    from pared import quantize

    with pytest.raises(AttributeError, match=r"pared.quantize has no technique Interger; it has .*Integer"):
        _ = quantize.Interger


def test_a_file_without_its_class_is_an_error() -> None:
    with pytest.raises(RecipeError, match="pared/errors.py must define the technique class Errors"):
        registry.technique_in("pared.errors")


def test_a_description_holds_every_setting_in_words() -> None:
    described = registry.describe("quantize.integer")
    bits = next(setting for setting in described["settings"] if setting["name"] == "bits")
    assert bits["range"] == "an int in [2, 8]" and bits["default"] == 8 and bits["help"]
    assert described["does"] == ["replaces"]
    assert described["paper"].startswith("arXiv:")


def test_importing_pared_and_listing_names_imports_no_technique() -> None:
    code = (
        "import sys, pared\nfrom pared import registry\nregistry.names()\n"
        "loaded = [m for m in sys.modules if m in {f'pared.{n}' for n in registry.names()}]\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
