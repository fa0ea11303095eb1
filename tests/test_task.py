"""What a task accepts, and what it says to data, losses and metrics that cannot be used."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pared.errors import InputError
from pared.task import Task, batch_size, call_of, take, targets_of


def batches(n: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 4), torch.randint(0, 3, (size,))) for _ in range(n)]


def task(**changes: Any) -> Task:
    return Task(**{"train": batches(), "val": batches(), **changes})


MODEL = nn.Linear(4, 3)


# Bad input: one line each, that says what must hold and what was found.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": []}, "Task.val must hold at least one batch, got none"),
        ({"train": []}, "Task.train must hold at least one batch, got none"),
        ({"val": iter(batches())}, "Task.val must be iterable again and again .* got list_iterator"),
        ({"val": (b for b in batches())}, "Task.val must be iterable again and again .* got generator"),
        ({"train": None}, "Task.train must be iterable again and again .* got NoneType"),
        ({"train": 3}, "Task.train must be iterable again and again .* got int"),
        ({"loss": "mse"}, 'Task.loss must be "cross_entropy" or a function, got "mse"'),
        ({"metric": "f1"}, 'Task.metric must be "accuracy" or a function, got "f1"'),
    ],
)
def test_a_task_that_cannot_be_is_refused_when_it_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        task(**changes)
    assert "\n" not in str(caught.value)


class Silent:
    """Iterable again and again, without length, and empty."""

    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": Silent()}, "Task.val must hold at least one batch, got none"),
        ({"train": Silent()}, "Task.train must hold at least one batch, got none"),
        ({"val": [(torch.randn(8, 5), None)]}, r"the model must run on a batch of val \(inputs of shape \(8, 5\)\)"),
        ({"train": [(torch.randn(8, 5), torch.zeros(8).long())]}, "the model must run on a batch of train"),
        ({"test": [(torch.randn(8, 5), torch.zeros(8).long())]}, "the model must run on a batch of test"),
        ({"calibration": [(torch.randn(8, 5), None)]}, "the model must run on a batch of calibration"),
        ({"val": [(torch.randn(8, 4), torch.zeros(7).long())]}, "got 8 inputs and 7 targets in val; check the loader"),
        ({"val": [(torch.full((8, 4), torch.nan), None)]}, "inputs must be finite, found NaN in .* val"),
        ({"val": [(torch.randn(8, 4), torch.full((8,), 9))]}, "the loss must accept .* a batch of val, but it failed"),
        ({"val": [torch.randn(8, 4)]}, r"a batch must be \(inputs, targets\) or a dict, got a Tensor; use \(inputs, None\)"),
        ({"val": [(torch.randn(8, 4),)]}, r"a batch must be \(inputs, targets\) or a dict, got a tuple of 1"),
        ({"val": [("text", None)]}, "a batch must hold at least one tensor with a batch axis, got a tuple of 2"),
        ({"metric": lambda o, b: 0.9}, r"Task.metric must return one score per example, here .* \(8,\), got shape \(\)"),
        ({"metric": lambda o, b: o}, r"Task.metric must return one score per example, here .* got shape \(8, 3\)"),
        ({"metric": lambda o, b: (torch.ones(8), torch.ones(1))}, r"one denominator per example, .* got shape \(1,\)"),
        ({"metric": lambda o, b: (o, o, o)}, "a pair of numerators and denominators, got a tuple of 3"),
        ({"metric": lambda o, b: None}, "the metric must accept the model's outputs and a batch of val, but it failed"),
        ({"metric": lambda o, b: 1 / 0}, "the metric must accept .* ZeroDivisionError"),
        ({"loss": lambda o, b: o}, "Task.loss must return one scalar tensor per batch; return the mean"),
        ({"loss": lambda o, b: 0.5}, "Task.loss must return one scalar tensor per batch"),
        ({"loss": lambda o, b: b["labels"]}, "the loss must accept the model's outputs and a batch of val, but it failed"),
        ({"forward": lambda m, b: m(b["x"])}, "the model must run on a batch of val"),
        ({"forward": lambda m, b: {"boxes": m(b[0])}}, "cross entropy and accuracy need logits: .* got a dict with keys boxes"),
    ],
)
def test_bad_input_gives_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        task(**changes).check(MODEL)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_good_task_passes_and_leaves_every_mode_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task(test=batches(), calibration=batches()).check(model)
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modes_are_as_they_were_after_a_failure_too() -> None:
    model = nn.Sequential(nn.Linear(5, 3)).train()
    with pytest.raises(InputError):
        task().check(model)
    assert model.training and model[0].training


# Forms of batches.


@pytest.mark.parametrize(
    ("batch", "args", "kwargs"),
    [
        ((torch.ones(2, 4), torch.zeros(2)), 1, []),
        ([torch.ones(2, 4), None], 1, []),
        (((torch.ones(2, 4), torch.ones(2, 3)), torch.zeros(2)), 2, []),
        (({"x": torch.ones(2, 4), "mask": torch.ones(2, 3)}, torch.zeros(2)), 0, ["x", "mask"]),
        ({"x": torch.ones(2, 4), "labels": torch.zeros(2)}, 0, ["x"]),
    ],
)
def test_inputs_may_be_a_tensor_a_tuple_or_a_dict(batch: Any, args: int, kwargs: list[str]) -> None:
    found = call_of(batch)
    assert len(found[0]) == args and list(found[1]) == kwargs
    assert batch_size(batch) == 2
    assert batch_size(take(batch, 1)) == 1
    targets = targets_of(batch)
    assert targets is None or len(targets) == 2
    assert targets is None or len(targets_of(take(batch, 1))) == 1


def test_taking_examples_leaves_what_has_no_batch_axis() -> None:
    inputs, scale = take(((torch.ones(4, 2), torch.ones(3)), None), 2)[0]
    assert inputs.shape == (2, 2) and scale.shape == (3,)


# Scores.


def test_accuracy_is_one_score_per_example() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    scores, denominators = task().scores(logits, (torch.zeros(3, 1), torch.tensor([0, 0, 0])))
    assert scores.tolist() == [1, 0, 1] and denominators is None


def test_of_sequences_and_images_accuracy_is_the_mean_over_positions() -> None:
    tokens, logits = torch.tensor([[0, 1, 2]]), F.one_hot(torch.tensor([[0, 1, 0]]), 3).float()
    assert task().scores(logits, (torch.zeros(1, 3, dtype=torch.int64), tokens))[0].tolist() == pytest.approx([2 / 3])
    pixels, maps = torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 3, 2, 2)
    maps[0, 1, 0, 0] = 1
    assert task().scores(maps, (torch.zeros(1, 1, 2, 2), pixels))[0].tolist() == [0.75]


def test_without_labels_the_measure_is_agreement_with_the_original() -> None:
    unlabelled = task(val=[(torch.randn(8, 4), None)])
    assert not unlabelled.labelled and unlabelled.metric_name == "agreement with the original"
    unlabelled.check(MODEL)
    ours, theirs = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    batch = (torch.zeros(2, 4), None)
    assert unlabelled.scores(ours, batch, theirs)[0].tolist() == [1, 0]
    with pytest.raises(InputError, match="agreement with the original, whose outputs are needed"):
        unlabelled.scores(ours, batch)
    with pytest.raises(InputError, match='the loss "cross_entropy" needs targets'):
        unlabelled.batch_loss(ours, batch)


def test_a_metric_may_give_numerators_and_denominators() -> None:
    def correct_tokens(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return outputs.sum(1), torch.full((len(outputs),), 3.0)

    scores, denominators = task(metric=correct_tokens).scores(torch.ones(2, 3), (torch.zeros(2, 4), None))
    assert scores.tolist() == [3, 3] and denominators is not None and denominators.tolist() == [3, 3]
    assert task(metric=correct_tokens).metric_name == "correct_tokens"


@pytest.mark.parametrize(
    "wrap", [lambda z: z, lambda z: {"logits": z}, lambda z: SimpleNamespace(logits=z), lambda z: (z, "state")]
)
def test_logits_are_found_in_common_outputs(wrap: Any) -> None:
    inputs, targets = batches()[0]
    logits = MODEL(inputs)
    assert torch.equal(task().batch_loss(wrap(logits), (inputs, targets)), F.cross_entropy(logits, targets))


def test_the_given_forward_calls_the_model() -> None:
    doubled = task(forward=lambda model, batch: model(2 * batch[0]))
    batch = batches()[0]
    assert torch.equal(doubled.outputs(MODEL, batch), MODEL(2 * batch[0]))


# Calibration.


def test_calibration_is_the_first_512_examples_of_train() -> None:
    long = task(train=batches(100, 10))
    assert sum(batch_size(b) for b in long.calibration()) == 512
    assert [batch_size(b) for b in long.calibration(25)] == [10, 10, 5]
    assert long.calibration_source == "the first 512 examples of train"
    given = task(train=batches(100, 10), calibration=batches(2, 10))
    assert sum(batch_size(b) for b in given.calibration()) == 20
    assert given.calibration_source == "calibration batches given"


@pytest.mark.parametrize("own_generator", [True, False])
def test_calibrating_and_checking_do_not_change_what_training_sees(own_generator: bool) -> None:
    data = TensorDataset(torch.arange(400.0).reshape(100, 4), torch.zeros(100, dtype=torch.int64))

    def order(touch: bool) -> list[float]:
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(5) if own_generator else None
        shuffled = Task(DataLoader(data, 10, shuffle=True, generator=generator), batches())
        if touch:
            list(shuffled.calibration(30))
            shuffled.check(MODEL)
        return [float(x[0, 0]) for x, _ in shuffled.train]

    assert order(True) == order(False)


def test_calibration_sees_the_same_examples_every_time() -> None:
    data = TensorDataset(torch.randn(100, 4), torch.zeros(100, dtype=torch.int64))
    shuffled = Task(DataLoader(data, 10, shuffle=True), batches())
    torch.manual_seed(1)
    first = [x for x, _ in shuffled.calibration(30)]
    torch.manual_seed(2)
    again = [x for x, _ in shuffled.calibration(30)]
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(first, again))
