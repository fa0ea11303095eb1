"""Distillation of outputs against the formula, written out."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from pared.distill.logits import Logits
from pared.errors import InputError


def slow_divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T**2 sum_c p_c log(p_c / q_c), the mean over rows, in plain arithmetic; (rows, classes)."""
    total = 0.0
    for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p, q = (torch.tensor(z, dtype=torch.float64).div(temperature).exp() for z in (t, s))
        p, q = p / p.sum(), q / q.sum()
        total += float((p * (p / q).log()).sum())
    return temperature**2 * total / len(student)


def classes(rows: int = 6, n: int = 5, *rest: int) -> tuple[Tensor, Tensor, tuple]:
    student, teacher = torch.randn(rows, n, *rest), torch.randn(rows, n, *rest)
    return student, teacher, (torch.zeros(rows, 3), torch.zeros(rows, *rest, dtype=torch.int64))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_it_is_the_written_out_formula(temperature):
    student, teacher, batch = classes()
    loss = Logits(temperature=temperature, hard=0).loss(batch, student, teacher)
    assert float(loss) == pytest.approx(slow_divergence(student, teacher, temperature), rel=1e-4)


def test_it_is_torchs_divergence_times_the_temperature_squared():
    student, teacher, batch = classes()
    expected = 9 * F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(Logits(temperature=3, hard=0).loss(batch, student, teacher), expected)


def test_the_teacher_gets_what_the_true_label_leaves():
    student, teacher, batch = classes()
    whole = Logits(hard=0).loss(batch, student, teacher)
    torch.testing.assert_close(Logits(hard=0.3).loss(batch, student, teacher), 0.7 * whole)
    assert Logits(hard=1).loss(batch, student, teacher) is None


def test_it_is_zero_exactly_where_the_outputs_agree_up_to_a_constant():
    student, _, batch = classes()
    assert float(Logits().loss(batch, student, student + 7.0)) == pytest.approx(0.0, abs=1e-5)


def test_at_high_temperature_the_gradient_is_that_of_matched_logits():
    student, teacher, batch = classes()
    student = (student - student.mean(1, keepdim=True)).double().requires_grad_()
    teacher = (teacher - teacher.mean(1, keepdim=True)).double()
    Logits(temperature=100, hard=0).loss(batch, student, teacher).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / student.numel(), rtol=0.1, atol=1e-3)


def test_the_gradients_size_does_not_depend_on_the_temperature():
    student, teacher, batch = classes(64)
    norms = []
    for temperature in (4.0, 40.0):
        z = student.clone().requires_grad_()
        Logits(temperature=temperature).loss(batch, z, teacher).backward()
        norms.append(float(z.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.3)


def test_pixels_are_predictions_with_classes_on_axis_one():
    student, teacher, batch = classes(2, 4, 3, 5)
    rows = [z.movedim(1, -1).reshape(-1, 4) for z in (student, teacher)]
    loss = Logits(temperature=2, hard=0).loss(batch, student, teacher)
    assert float(loss) == pytest.approx(slow_divergence(*rows, 2.0), rel=1e-4)


def test_tokens_are_predictions_with_classes_on_the_last_axis():
    student, teacher = torch.randn(2, 7, 11), torch.randn(2, 7, 11)
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    expected = slow_divergence(student.reshape(-1, 11), teacher.reshape(-1, 11), 1.0)
    for batch in ({"input_ids": tokens, "labels": tokens}, {"input_ids": tokens}):
        loss = Logits(temperature=1, hard=0).loss(batch, {"logits": student}, {"logits": teacher})
        assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_without_labels_the_probabilities_are_matched():
    student, teacher, (x, _) = classes()
    loss = Logits(temperature=1, hard=0).loss((x, None), student, teacher)
    assert float(loss) == pytest.approx(slow_divergence(student, teacher, 1.0), rel=1e-4)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((8, 3), torch.rand(8, 3)), ((8, 1), torch.rand(8, 1)), ((8,), torch.rand(8)), ((8, 1), None),
     ((8, 3), [{"boxes": torch.rand(2, 4)}] * 8)],
    ids=["several values", "one value", "no axis", "one value without targets", "a list of boxes"],
)
def test_outputs_that_are_no_logits_are_matched_by_squares(outputs, targets):
    student, teacher = torch.randn(outputs), torch.randn(outputs)
    loss = Logits(hard=0).loss((torch.zeros(8, 2), targets), student, teacher)
    assert float(loss) == pytest.approx(float(((student - teacher) ** 2).mean()), rel=1e-5)


def test_every_floating_point_output_of_a_detector_counts():
    student = {"boxes": torch.randn(2, 5, 4), "scores": [torch.randn(2, 5)], "n": torch.tensor([5, 5])}
    teacher = {"boxes": torch.randn(2, 5, 4), "scores": [torch.randn(2, 5)], "n": torch.tensor([4, 5])}
    batch = (torch.zeros(2, 3), [{"boxes": 0}, {"boxes": 1}])
    pairs = [(student["boxes"], teacher["boxes"]), (student["scores"][0], teacher["scores"][0])]
    spreads = [(b - b.mean(0)).square().mean() for _, b in pairs]
    expected = sum(sum(spreads) / 2 / spread * F.mse_loss(a, b) for spread, (a, b) in zip(spreads, pairs))
    torch.testing.assert_close(Logits(hard=0).loss(batch, student, teacher), expected)


def test_outputs_beside_the_logits_of_a_detector_count_in_whatever_unit_they_are():
    batch = (torch.zeros(4, 3), {"boxes": torch.zeros(4, 2), "kind": torch.zeros(4, dtype=torch.long)})
    teacher = {"boxes": torch.randn(4, 2), "logits": torch.randn(4, 3)}
    student = {"boxes": teacher["boxes"] + 0.1 * torch.randn(4, 2), "logits": teacher["logits"].clone()}
    other = [{**outputs, "boxes": 1000 * outputs["boxes"]} for outputs in (student, teacher)]
    relative = []
    for pair in ((student, teacher), other):
        spreads = [(pair[1][key] - pair[1][key].mean(0)).square().mean() for key in ("boxes", "logits")]
        relative.append(float(Logits(hard=0).loss(batch, *pair) / (sum(spreads) / 2)))
    assert relative[0] > 0.001
    assert relative[0] == pytest.approx(relative[1], rel=1e-4)


def test_the_user_may_say_what_the_outputs_are():
    student, teacher, batch = classes()
    squares = Logits(hard=0, softmax=False).loss(batch, student, teacher)
    torch.testing.assert_close(squares, F.mse_loss(student, teacher))
    soft = Logits(temperature=1, hard=0, softmax=True).loss((batch[0], torch.rand(6, 5)), student, teacher)
    assert float(soft) == pytest.approx(slow_divergence(student, teacher, 1.0), rel=1e-4)


def test_small_probabilities_survive_half_precision():
    student, teacher, batch = classes()
    loss = Logits(temperature=1, hard=0).loss(batch, student.half() * 8, teacher.half() * 8)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(slow_divergence(student.half() * 8, teacher.half() * 8, 1.0), rel=1e-3)


def test_outputs_of_another_shape_are_refused():
    student, _, batch = classes()
    with pytest.raises(InputError, match=r"one shape, got \(6, 5\) and \(6, 4\)"):
        Logits().loss(batch, student, torch.randn(6, 4))
    with pytest.raises(InputError, match="as many floating-point outputs"):
        Logits(softmax=False).loss(batch, (student, student), student)


def test_it_needs_a_teacher():
    student, _, batch = classes()
    with pytest.raises(InputError, match="needs a teacher"):
        Logits().loss(batch, student, None)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"temperature": 101}, {"hard": -0.1}, {"hard": 1.1}, {"heat": 1}], ids=str
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Logits(**wrong)
