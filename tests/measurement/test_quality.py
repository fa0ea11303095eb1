import time

import numpy as np
import pytest
import torch
from torch import nn

from pared.errors import InputError
from pared.measurement import Quality, agreement, drop, evaluate
from pared.task import Task


def quality(scores, **fields):
    return Quality("score", np.asarray(scores, dtype=np.float64), **fields)


def task_of(x, y, metric="accuracy", loss="cross_entropy", batch=4):
    batches = [(x[i : i + batch], None if y is None else y[i : i + batch]) for i in range(0, len(x), batch)]
    return Task(batches, batches, loss=loss, metric=metric)


def test_accuracy_is_the_share_of_right_answers():
    x = torch.eye(10)
    y = torch.arange(10)
    y[:3] += 1
    task = task_of(x, y)
    found = evaluate(nn.Identity(), task, task.val)
    assert found.value == pytest.approx(0.7)
    assert found.scores.tolist() == [0.0] * 3 + [1.0] * 7
    low, high = found.interval
    assert 0.3 <= low < 0.7 < high <= 1


def test_the_model_keeps_its_modes():
    model = nn.Sequential(nn.Identity(), nn.Dropout())
    model[0].eval()
    task = task_of(torch.eye(4), torch.arange(4))
    assert evaluate(model, task, task.val).value == 1.0
    assert [m.training for m in model.modules()] == [True, False, True]


def test_a_drop_in_points_has_the_value_of_the_means():
    before, after = quality([1, 1, 1, 0]), quality([1, 1, 0, 0])
    found = drop(before, after)
    assert (found.value, found.unit, found.n) == (pytest.approx(25.0), "pp", 4)


def test_the_paired_interval_matches_the_closed_form():
    generator = np.random.default_rng(1)
    before = (generator.random(5000) < 0.9).astype(float)
    after = np.where(generator.random(5000) < 0.03, 1 - before, before)
    found = drop(quality(before), quality(after))
    spread = 100 * (before - after).std() / np.sqrt(5000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * spread, rel=0.06)
    assert found.low < found.value < found.high


def test_pairing_makes_the_interval_narrow():
    generator = np.random.default_rng(1)
    before = generator.random(1000)
    after = before - 0.01
    found = drop(quality(before), quality(after))
    assert found.low == pytest.approx(1.0) and found.high == pytest.approx(1.0)


def test_drawing_groups_widens_the_interval():
    generator = np.random.default_rng(2)
    harmed = np.repeat(generator.random(20) < 0.3, 50).astype(float)
    before, groups = np.ones(1000), np.repeat(np.arange(20), 50)
    alone = drop(quality(before), quality(before - harmed))
    together = drop(quality(before, groups=groups), quality(before - harmed, groups=groups))
    assert together.value == alone.value
    assert together.n_groups == 20
    assert together.high - together.low > 4 * (alone.high - alone.low)
    spread = 100 * harmed[::50].std() / np.sqrt(20)
    assert (together.high - together.low) / 2 == pytest.approx(1.96 * spread, rel=0.15)


def test_group_names_may_be_strings_in_any_order():
    groups = np.array(["b", "a", "b", "c"])
    found = drop(quality([1, 1, 1, 1], groups=groups), quality([1, 0, 1, 1], groups=groups))
    assert found.n_groups == 3 and found.value == pytest.approx(25)


def test_a_single_group_has_no_interval():
    groups = np.zeros(4)
    found = drop(quality([1, 1, 1, 1], groups=groups), quality([1, 0, 1, 1], groups=groups))
    assert (found.low, found.high) == (None, None)
    assert "n = 4" in str(found)


def test_ratio_metrics_are_ratios_of_sums():
    before = quality([9, 1], denominators=np.array([10.0, 1.0]))
    after = quality([8, 0], denominators=np.array([10.0, 1.0]))
    assert before.value == pytest.approx(10 / 11)
    found = drop(before, after)
    assert found.unit == "pp"
    assert found.value == pytest.approx(100 * 2 / 11)


def test_unbounded_scores_drop_in_percent_of_the_original():
    found = drop(quality([-2.0, -4.0]), quality([-3.0, -6.0]))
    assert found.unit == "%"
    assert found.value == pytest.approx(50.0)
    assert found.low == pytest.approx(50.0) and found.high == pytest.approx(50.0)


def test_a_percentage_of_zero_is_refused():
    with pytest.raises(InputError, match="must not be 0"):
        drop(quality([-1.0, 1.0]), quality([1.0, 1.0]))


def test_a_better_model_has_a_negative_drop():
    assert drop(quality([0, 1]), quality([1, 1])).value == pytest.approx(-50)


def test_seeds_decide_the_interval():
    generator = np.random.default_rng(0)
    before, after = quality(generator.random(100)), quality(generator.random(100))
    assert drop(before, after, seed=1) == drop(before, after, seed=1)
    assert drop(before, after, seed=1) != drop(before, after, seed=2)


def test_two_thousand_resamples_of_ten_thousand_examples_are_quick():
    generator = np.random.default_rng(0)
    before, after = quality(generator.random(10_000)), quality(generator.random(10_000))
    start = time.perf_counter()
    drop(before, after)
    assert time.perf_counter() - start < 5


def test_different_examples_are_not_paired():
    x, y = torch.eye(8), torch.arange(8)
    task, other = task_of(x, y), task_of(x.flip(0), y.flip(0))
    with pytest.raises(InputError, match="same examples in the same order"):
        drop(evaluate(nn.Identity(), task, task.val), evaluate(nn.Identity(), other, other.val))


def test_a_shuffled_loader_is_read_in_one_order():
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 4, (64,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    task = Task(loader, loader)
    first, second = (evaluate(nn.Identity(), task, loader) for _ in range(2))
    assert drop(first, second).value == 0


def test_a_score_that_is_not_a_number_is_named():
    def metric(outputs, batch):
        return torch.where(batch[1] == 5, float("nan"), 1.0)

    task = task_of(torch.eye(8), torch.arange(8), metric)
    with pytest.raises(InputError, match="at example 5 of 8"):
        evaluate(nn.Identity(), task, task.val)


def test_a_metric_of_one_number_per_batch_is_refused():
    task = task_of(torch.eye(8), torch.arange(8), lambda outputs, batch: outputs.mean())
    with pytest.raises(InputError, match="one score per example"):
        evaluate(nn.Identity(), task, task.val)


def test_an_empty_loader_is_refused():
    class Empty:
        def __iter__(self):
            return iter(())

    task = task_of(torch.eye(4), torch.arange(4))
    with pytest.raises(InputError, match="at least one batch"):
        evaluate(nn.Identity(), task, Empty())


def test_groups_must_fit():
    class Grouped(list):
        groups = np.zeros(3)

    task = task_of(torch.eye(4), torch.arange(4))
    with pytest.raises(InputError, match="one group per example"):
        evaluate(nn.Identity(), task, Grouped(task.val))


def test_groups_of_a_loader_are_used():
    class Grouped(list):
        groups = np.array([0, 0, 1, 1])

    task = task_of(torch.eye(4), torch.arange(4))
    assert evaluate(nn.Identity(), task, Grouped(task.val)).n_groups == 2


def test_without_targets_the_score_is_agreement_with_the_original():
    x = torch.eye(4)
    task = task_of(x, None)
    original, changed = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    original.weight.data, changed.weight.data = torch.eye(4), torch.eye(4)
    changed.weight.data[0, 0] = -1.0
    assert evaluate(original, task, task.val).value == 1.0
    assert evaluate(changed, task, task.val, reference=original).value == pytest.approx(0.75)
    assert agreement(changed, original, task, task.val).value == pytest.approx(0.75)


def test_agreement_of_other_outputs_is_closeness():
    x = torch.randn(6, 3)
    task = task_of(x, x, metric=lambda o, b: -(o - b[1]).square().mean(1), loss=lambda o, b: (o - b[1]).square().mean())
    original, changed = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    changed.weight.data = 0.9 * original.weight.data
    assert agreement(original, original, task, task.val).value == 1.0
    assert agreement(changed, original, task, task.val).value == pytest.approx(0.9, abs=1e-5)


def test_entries_of_the_result_are_json_numbers():
    import json

    before, after = quality([1, 1, 0]), quality([1, 0, 0])
    assert set(json.loads(json.dumps(drop(before, after).to_json()))) >= {"value", "low", "high", "n", "unit"}
    assert set(json.loads(json.dumps(before.to_json()))) >= {"name", "value", "low", "high"}
