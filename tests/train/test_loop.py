"""The training loop on small real networks."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from pared.distill.logits import Logits
from pared.errors import InputError
from pared.prune.magnitude import Magnitude
from pared.quantize.codebook import Codebook
from pared.site import install_, tensor_sites
from pared.statistics import Statistics
from pared.task import Task
from pared.technique import Technique
from pared.train import History, train
from pared.train import loop as loop_module
from pared.train.criterion import Criterion
from pared.train.processes import _Share


def relaxed(model: nn.Module, technique: Technique) -> nn.Module:
    for site in list(tensor_sites(model)):
        if site.tensor.ndim >= 2 and not technique.refuse(site):
            install_(site, technique.relax(site, technique.decide(site, Statistics()), Statistics()))
    return model


def same_parameters(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_small_network_learns_digits_from_scratch(net, task, accuracy):
    history = train(net, task, epochs=12, learning_rate=5e-3, validate=accuracy)
    assert accuracy(net) > 0.9
    assert [record.epoch for record in history.epochs] == list(range(1, 13))
    assert history.epochs[-1].loss < history.epochs[0].loss / 4
    assert history.ended == "all epochs"
    assert not net.training


def test_the_kept_weights_score_what_the_history_says(net, task, accuracy):
    history = train(net, task, epochs=6, learning_rate=5e-3, validate=accuracy)
    assert accuracy(net) == history.best_score == max(record.score for record in history.epochs)
    assert history.epochs[history.best_epoch - 1].score == history.best_score


def test_training_that_only_harms_gives_the_weights_before_training(net, task, accuracy):
    train(net, task, epochs=6, learning_rate=5e-3, validate=accuracy)
    before = copy.deepcopy(net.state_dict())
    history = train(net, task, epochs=2, learning_rate=3.0, clip=None, ema=None, validate=accuracy)
    assert history.best_epoch == 0 and history.best_score == history.start_score
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_without_validation_the_last_weights_are_kept(net, task):
    history = train(net, task, epochs=1)
    assert history.best_epoch is None and history.epochs[0].score is None


def test_patience_ends_a_training_that_does_not_improve(net, task):
    history = train(net, task, epochs=10, validate=lambda model: 0.5, patience=3)
    assert history.ended == "patience" and len(history.epochs) == 3


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(net, task, twin):
    nets = [twin(net) for _ in range(3)]
    for model, seed in zip(nets, (1, 1, 2), strict=True):
        torch.rand(1)  # what happened to the global generator before must not matter
        train(model, task, epochs=2, seed=seed)
    assert same_parameters(nets[0], nets[1])
    assert not same_parameters(nets[0], nets[2])


def test_another_step_of_a_recipe_gives_other_randomness(net, task, twin):
    other = twin(net)
    train(net, task, epochs=1, step=0)
    train(other, task, epochs=1, step=1)
    assert not torch.equal(net[0].weight, other[0].weight)


def test_distillation_alone_needs_no_labels(net, task, accuracy, twin):
    teacher = twin(net)
    train(teacher, task, epochs=12, learning_rate=5e-3)
    unlabelled = Task(train=[(x, None) for x, _ in task.train], val=[(x, None) for x, _ in task.val])
    train(net, unlabelled, epochs=12, learning_rate=5e-3, losses=[Logits()], teacher=teacher)
    with torch.no_grad():
        inputs = task.val[0][0]
        assert float((net(inputs).argmax(1) == teacher(inputs).argmax(1)).double().mean()) > 0.85


def test_without_labels_and_losses_there_is_nothing_to_learn_from(net, task):
    unlabelled = Task(train=[(x, None) for x, _ in task.train], val=[(x, None) for x, _ in task.val])
    with pytest.raises(InputError, match="without labels needs a loss"):
        train(net, unlabelled, epochs=1)


def test_the_teacher_is_left_as_it_is(net, task, twin):
    teacher = twin(net).train()
    teacher[0].eval()
    before = copy.deepcopy(teacher.state_dict())
    train(net, task, epochs=1, losses=[Logits()], teacher=teacher)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert teacher.training and not teacher[0].training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())


def test_two_teachers_teach_the_mean_of_their_probabilities(task):
    x, y = next(iter(task.train))
    student, *teachers = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(3))
    loss = Criterion(task, [Logits(temperature=2, hard=0)], teachers, None)(student(x), (x, y))
    seen = torch.autograd.grad(loss, student[1].weight)[0]
    p = sum(torch.softmax(teacher(x) / 2, 1) for teacher in teachers).detach() / 2
    q = torch.log_softmax(student(x) / 2, 1)
    expected = torch.autograd.grad(-4 * (p * q).sum(1).mean(), student[1].weight)[0]
    torch.testing.assert_close(seen, expected)


def test_the_true_label_gets_the_weight_that_distillation_leaves(net, task, twin):
    batch = next(iter(task.train))
    teacher = twin(net).eval()
    logits = net.eval()(batch[0]) * 2
    loss = Criterion(task, [Logits(temperature=3, hard=0.25)], [teacher], None)(logits, batch)
    kl = nn.functional.kl_div(
        (logits / 3).log_softmax(1), (teacher(batch[0]) / 3).softmax(1), reduction="batchmean"
    )
    expected = 0.25 * nn.functional.cross_entropy(logits, batch[1]) + 0.75 * 9 * kl
    torch.testing.assert_close(loss, expected)


def test_a_model_is_not_its_own_teacher(net, task):
    with pytest.raises(InputError, match="must not share parameters"):
        train(net, task, epochs=1, losses=[Logits()], teacher=net)


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_stops_with_epoch_and_batch(net, task):
    batches = list(task.train)
    batches[3] = (batches[3][0] * math.nan, batches[3][1])
    with pytest.raises(InputError, match=r"epoch 1, batch 4 .*lower the learning rate"):
        train(net, Task(train=batches, val=task.val), epochs=2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"schedule": "cosin"}, "schedule must be one of cosine"),
        ({"warmup": 1.0}, "warmup must be a fraction"),
        ({"ema": 1.0}, "ema must be a decay"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"anneal_until": 2.0}, "anneal_until must be a fraction"),
        ({"max_seconds": 0.0}, "max_seconds must be positive"),
    ],
)
def test_arguments_out_of_range_are_named(net, task, wrong, message):
    with pytest.raises(InputError, match=message):
        train(net, task, **{"epochs": 1, **wrong})


def test_a_model_without_trainable_parameters_is_refused(net, task):
    with pytest.raises(InputError, match="require a gradient"):
        train(net.requires_grad_(False), task, epochs=1)


def test_only_parameters_that_require_a_gradient_change(net, task):
    net[0].weight.requires_grad_(False)
    frozen, free = net[0].weight.clone(), net[6].weight.clone()
    train(net, task, epochs=1)
    assert torch.equal(net[0].weight, frozen) and not torch.equal(net[6].weight, free)


def test_frozen_norms_keep_their_running_statistics(net, task, twin):
    other = twin(net)
    train(net, task, epochs=1, freeze_norm=True)
    train(other, task, epochs=1, freeze_norm=False)
    assert torch.equal(net[1].running_mean, torch.zeros(8)) and int(net[1].num_batches_tracked) == 0
    assert not torch.equal(other[1].running_mean, torch.zeros(8))


def test_weight_decay_shrinks_matrices_and_spares_vectors(task):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        net[1].bias.fill_(3.0)

    def flat(outputs, batch):
        return outputs.sum() * 0.0

    before = net[1].weight.norm()
    train(net, Task(task.train, task.val, loss=flat), epochs=3, learning_rate=0.01, weight_decay=1.0, ema=None)
    assert net[1].weight.norm() < 0.95 * before
    assert torch.equal(net[1].bias, torch.full((10,), 3.0))


def test_tables_in_float16_learn_in_float32_and_end_in_float16(net, task, accuracy):
    train(net, task, epochs=10, learning_rate=5e-3)
    coarse = Codebook(bits=2)
    for site in list(tensor_sites(net)):
        if site.tensor.ndim >= 2:
            install_(site, coarse.solve(site, Statistics())[1])
    tables = [p for n, p in net.named_parameters() if n.endswith("table")]
    for table in tables:
        table.requires_grad_()
    before = accuracy(net.eval())
    seen = []

    def validate(model: nn.Module) -> float:
        seen.append([torch.equal(t, t.half().float()) for t in tables])
        return accuracy(model)

    history = train(net, task, epochs=5, learning_rate=1e-3, validate=validate)
    assert len(tables) == 3 and all(table.dtype == torch.float16 for table in tables)
    assert all(all(rounded) for rounded in seen), "validation must see what will be stored"
    assert accuracy(net) == history.best_score > before
    assert all(parameter.grad is None for parameter in net.parameters())


def test_steps_smaller_than_float16_can_hold_add_up(task):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    scale = nn.Parameter(torch.ones(1, dtype=torch.float16))
    net.register_parameter("scale", scale)
    fine = Task(task.train, task.val, loss=lambda out, batch: scale.float().sum(), forward=lambda m, b: m(b[0]))
    train(net, fine, epochs=10, learning_rate=1e-4, schedule="constant", warmup=0, ema=None)
    assert scale.dtype == torch.float16
    assert float(scale.detach()) == pytest.approx(1 - 80e-4, abs=1e-3)


def test_a_network_in_bfloat16_trains_and_stays_bfloat16(net, task):
    half = net.to(torch.bfloat16)
    batches = [(x.to(torch.bfloat16), y) for x, y in task.train]
    seen = []
    history = train(
        half,
        Task(train=batches, val=batches),
        epochs=6,
        learning_rate=5e-3,
        validate=lambda model: seen.append(model(batches[0][0]).dtype) or -len(seen),
    )
    assert history.epochs[-1].loss < history.epochs[0].loss / 2
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
    with torch.no_grad():
        assert half(batches[0][0]).dtype == torch.bfloat16


class Gate(nn.Linear):
    """Records what it is told."""

    def __init__(self) -> None:
        super().__init__(64, 10)
        self.calls: list[float] = []

    def anneal(self, progress: float) -> None:
        self.calls.append(progress)


def test_annealing_rises_to_exactly_one_before_the_end(task):
    gate = Gate()
    train(nn.Sequential(nn.Flatten(), gate), task, epochs=10, anneal_every=20, anneal_until=0.7)
    assert gate.calls == [0.0, pytest.approx(20 / 56), pytest.approx(40 / 56), 1.0]


def test_a_given_annealing_function_takes_the_place_of_the_modules_own(task):
    gate, calls = Gate(), []
    train(nn.Sequential(nn.Flatten(), gate), task, epochs=1, anneal=calls.append)
    assert calls[-1] == 1.0 and gate.calls == []


def test_epochs_before_the_end_of_annealing_are_never_the_best(task):
    scores = iter([0.9, 0.8, 0.7, 0.1, 0.2])
    history = train(
        nn.Sequential(nn.Flatten(), Gate()), task, epochs=5, validate=lambda model: next(scores), anneal_until=0.7
    )
    assert [record.annealed for record in history.epochs] == [False, False, False, True, True]
    assert history.best_epoch == 5 and history.best_score == 0.2 and history.start_score is None


def test_a_sparsity_that_grows_while_training_beats_the_same_cut_at_once(net, task, accuracy, twin):
    train(net, task, epochs=12, learning_rate=5e-3)
    technique = Magnitude(sparsity=0.8)
    cut = twin(net)
    for site in list(tensor_sites(cut)):
        if site.tensor.ndim >= 2:
            install_(site, technique.solve(site, Statistics())[1])
    trained = relaxed(twin(net), technique)
    history = train(trained, task, epochs=12, learning_rate=3e-3, validate=accuracy)
    assert accuracy(trained) == history.best_score > accuracy(cut.eval()) + 0.2
    for module in trained.modules():
        if hasattr(module, "settle"):
            assert float((module.settle()().detach() == 0).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert accuracy(trained.train().eval()) == history.best_score, "settling must not change what was validated"


def test_the_learning_rate_follows_the_schedule(net, task):
    history = train(net, task, epochs=4, learning_rate=0.1, schedule="linear", warmup=0.0)
    assert [record.learning_rate for record in history.epochs] == [
        pytest.approx(0.1 * (1 - (8 * epoch - 1) / 32)) for epoch in (1, 2, 3, 4)
    ]


def test_the_default_learning_rate_falls_with_the_number_of_parameters():
    rate = loop_module.default_learning_rate
    assert rate([torch.empty(1000)]) == 1e-3
    assert rate([torch.empty(100_000_000, device="meta")]) == pytest.approx(1e-4)
    assert rate([torch.empty(10**10, device="meta")]) == 2e-5


def test_a_time_limit_shortens_the_schedule_to_its_end(net, task, monkeypatch):
    now = iter(np.arange(0.0, 1e6, 0.1))  # every look at the clock takes 0.1 s: an epoch of 8 batches about 1 s
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: next(now))
    history = train(net, task, epochs=100, max_seconds=4.5, schedule="linear", warmup=0.0, learning_rate=0.1)
    assert history.ended == "time" and 3 <= len(history.epochs) <= 5
    assert history.epochs[-1].learning_rate < 0.01


def test_a_time_limit_within_the_first_epoch_still_ends_annealed(task, monkeypatch):
    now = iter(np.arange(0.0, 1e6, 0.1))
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: next(now))
    gate = Gate()
    history = train(nn.Sequential(nn.Flatten(), gate), task, epochs=5, max_seconds=0.35, validate=lambda model: 1.0)
    assert history.ended == "time" and gate.calls[-1] == 1.0 and history.best_epoch == 1


def test_progress_reports_each_epoch_with_its_score(net, task, accuracy):
    seen = []
    train(net, task, epochs=2, validate=accuracy, progress=seen.append)
    last = [report for report in seen if report["score"] is not None]
    assert [(r["epoch"], r["epochs"], r["batch"], r["batches"]) for r in last] == [(1, 2, 8, 8), (2, 2, 8, 8)]
    assert all(report["loss"] > 0 and report["seconds"] > 0 for report in seen)


def test_loaders_without_a_length_are_counted(net, task):
    class Stream:
        def __iter__(self):
            return iter(batches)

    batches = list(task.train)
    unsized = Task(train=Stream(), val=task.val)
    history = train(net, unsized, epochs=2, schedule="linear", warmup=0.0, learning_rate=0.16)
    assert history.epochs[-1].learning_rate == pytest.approx(0.01)


def test_the_history_survives_json(net, task, accuracy):
    history = train(net, task, epochs=2, validate=accuracy)
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history


def test_accelerate_in_one_process_gives_the_plain_result(net, task, twin, accuracy, monkeypatch):
    pytest.importorskip("accelerate")
    other = twin(net)
    train(net, task, epochs=2, validate=accuracy)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    train(other, task, epochs=2, validate=accuracy)
    assert same_parameters(net, other)


def test_processes_share_the_batches_without_overlap():
    shares = [list(_Share(range(7), index, 3)) for index in range(3)]
    assert shares == [[0, 3], [1, 4], [2, 5]]
