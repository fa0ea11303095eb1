import numpy as np
import pytest
import torch

from pared.errors import InputError
from pared.sources import ArrayLoader
from pared.sources.loader import split, split_groups


def _order(loader: ArrayLoader) -> list[int]:
    return [value for inputs, _ in loader for value in inputs.tolist()]


def test_every_example_comes_once_per_pass_with_its_own_target():
    loader = ArrayLoader(torch.arange(10), 10 * torch.arange(10), batch_size=4, shuffle=True)
    batches = list(loader)
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 2]
    assert len(loader) == 3
    assert sorted(value for inputs, _ in batches for value in inputs.tolist()) == list(range(10))
    assert all(torch.equal(targets, 10 * inputs) for inputs, targets in batches)


def test_passes_differ_but_the_generator_state_repeats_one_exactly():
    loader = ArrayLoader(torch.arange(100), None, batch_size=7, shuffle=True)
    state = loader.generator.get_state()
    first, second = _order(loader), _order(loader)
    assert first != second
    loader.generator.set_state(state)
    assert _order(loader) == first


def test_the_global_seed_does_not_change_the_order():
    loader = ArrayLoader(torch.arange(50), None, 50, shuffle=True, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    first = _order(loader)
    loader.generator.manual_seed(3)
    torch.manual_seed(2)
    assert _order(loader) == first


def test_without_shuffling_the_generator_is_left_alone():
    loader = ArrayLoader(torch.arange(9), None, batch_size=2)
    state = loader.generator.get_state()
    assert _order(loader) == list(range(9))
    assert torch.equal(loader.generator.get_state(), state)


def test_inputs_may_be_a_dict_and_targets_may_be_missing():
    loader = ArrayLoader({"ids": torch.arange(6).view(3, 2), "mask": torch.ones(3, 2)}, None, batch_size=2)
    inputs, targets = next(iter(loader))
    assert targets is None
    assert inputs["ids"].tolist() == [[0, 1], [2, 3]] and inputs["mask"].shape == (2, 2)


def test_augmentation_is_drawn_from_the_loader_s_generator_and_comes_before_the_transform():
    def noisy(inputs, generator):
        return inputs + torch.randint(1, 100, inputs.shape, generator=generator)

    loader = ArrayLoader(torch.zeros(4), None, 4, augment=noisy, transform=lambda inputs: -inputs)
    state = loader.generator.get_state()
    first = next(iter(loader))[0]
    assert (first < 0).all()
    loader.generator.set_state(state)
    assert torch.equal(next(iter(loader))[0], first)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.zeros(3), "y": torch.zeros(2), "batch_size": 1}, "one length, found \\[2, 3\\]"),
        ({"x": torch.zeros(3), "y": None, "batch_size": 1, "groups": np.zeros(4)}, "one length, found \\[3, 4\\]"),
        ({"x": torch.zeros(3), "y": None, "batch_size": 0}, "at least 1, got 0"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        ArrayLoader(**arguments)


def test_the_split_is_a_partition_and_never_changes():
    parts = split(20, n_val=4, n_test=5)
    assert sorted([*parts.train, *parts.val, *parts.test]) == list(range(20))
    assert (len(parts.val), len(parts.test)) == (4, 5)
    # Written down once: benchmark figures of different versions must be of the same images.
    assert parts.val.tolist() == [18, 1, 19, 8]


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(InputError, match="5 examples must leave some"):
        split(5, n_val=3, n_test=2)


def test_all_views_of_one_photograph_lie_on_one_side():
    groups = np.repeat(np.arange(12), 5)
    parts = split_groups(groups, val=0.25, test=0.25)
    sides = [set(groups[part]) for part in (parts.train, parts.val, parts.test)]
    assert [len(side) for side in sides] == [6, 3, 3]
    assert set.union(*sides) == set(range(12))
    assert len(parts.val) == 15
