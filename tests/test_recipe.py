"""Recipes: a list is a choice; what is wrong is named with its place and the nearest right word."""

import pytest
import yaml

from pared import recipe
from pared.errors import RecipeError
from pared.technique import Chain


def test_a_list_is_written_out_as_one_candidate_per_value():
    steps = recipe.load({"steps": [{"quantize.integer": {"bits": [2, 4], "group": [32, 64]}}]}).steps
    assert [(c.bits, c.group) for c in steps[0].candidates] == [(2, 32), (2, 64), (4, 32), (4, 64)]


def test_choices_inside_a_chain_multiply():
    entry = {"chain": [{"prune.magnitude": {"sparsity": [0.5, 0.9]}}, {"quantize.codebook": {"bits": [2, 3, 4]}}]}
    candidates = recipe.load({"steps": [entry]}).steps[0].candidates
    assert len(candidates) == 6
    assert all(isinstance(candidate, Chain) for candidate in candidates)


SHIPPED = ["default", "deep-compression", "entropy-constrained", "low-rank-int8", "smallest", "channels", "int8", "int4"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_survive_a_round_trip_through_yaml(name):
    loaded = recipe.load(name)
    assert recipe.load(yaml.safe_load(loaded.to_yaml())) == loaded


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"step": []}, ["no key step", "did you mean steps"]),
        ({"steps": []}, ["at least one step"]),
        ({"steps": [{"quantize.intger": {}}]}, ["quantize.intger", "did you mean quantize.integer", "step 1"]),
        ({"steps": [{"quantize.integer": {"bit": 4}}]}, ["no setting bit", "did you mean bits"]),
        ({"steps": [{"quantize.integer": {"bits": 16}}]}, ["quantize.integer.bits", "[2, 8]", "got 16", "step 1"]),
        ({"steps": [{"quantize.integer": {"bits": "four"}}]}, ["quantize.integer.bits", "four"]),
        ({"steps": [{"prune.magnitude": {"pattern": "4:2"}}]}, ["n < m", "4:2"]),
        ({"steps": [{"quantize.integer": {}, "train": {"epoch": 3}}]}, ["no setting epoch", "did you mean epochs"]),
        ({"steps": [{"quantize.integer": {}, "train": {"with": [{"quantize.integer": {}}]}}]}, ["adds none"]),
        ({"steps": [{"quantize.integer": {}}], "store": "zip"}, ["store must be one of", "zip"]),
        ({"steps": [{"quantize.integer": {}}], "budget": {"siz": "2x"}}, ["did you mean size"]),
        ({"steps": [{"chain": [{"quantize.integer": {}}, {"factor.low_rank": {"keep": 0.5}}]}]}, ["put it first"]),
        ("quantize", ["mapping"]),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said_in_one_line(document, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_modules_cannot_be_replaced_after_their_tensors_are_coded():
    steps = [{"quantize.codebook": {"bits": 4}}, {"factor.low_rank": {"keep": 0.5}}]
    with pytest.raises(RecipeError, match=r"must come before quantize.codebook.*swap the steps"):
        recipe.load({"steps": steps})


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        recipe.load(tmp_path / "nowhere.yaml")


def test_techniques_for_the_whole_network_stand_at_the_ends_of_a_recipe():
    before, steps, after = recipe.load("int8").parts()
    assert [technique.name for technique in before] == ["structure.fold_batch_norm", "structure.equalise"]
    assert [step.candidates[0].name for step in steps] == ["quantize.integer"]
    assert [technique.name for technique in after] == ["quantize.activations"]
    integer, activations, fold = {"quantize.integer": {}}, {"quantize.activations": {}}, {"structure.fold_batch_norm": {}}
    for wrong, told in (
        ([integer, fold], "structure.fold_batch_norm must come first"),
        ([activations, integer], "quantize.activations must come last"),
        ([integer, {"quantize.activations": {"bits": [4, 8]}}], "its settings must be single values"),
        ([integer, {**activations, "train": {"epochs": 1}}], "trains nothing"),
        ([{"chain": [integer, activations]}], "cannot be part of a chain"),
        ([integer, {"quantize.activations": {"steps": "learned"}}], "trained along with a step before it"),
    ):
        with pytest.raises(RecipeError, match=told):
            recipe.load({"steps": wrong})
