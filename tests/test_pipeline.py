"""compress() on a real, small, trained net: budgets are met on disk, runs go on after a kill, bad input is one line."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch import nn

import pared
from pared import prune, quantize, sources, trials
from pared.errors import BudgetError, InputError

RECIPE = {
    "steps": [
        {
            "any_of": [
                {"quantize.integer": {"bits": [2, 3, 4, 6, 8]}},
                {"chain": [{"prune.magnitude": {"sparsity": [0.7, 0.9]}}, {"quantize.codebook": {"bits": [2, 3]}}]},
                {"chain": [{"factor.low_rank": {"keep": [0.3, 0.5]}}, {"quantize.integer": {"bits": 6}}]},
            ],
            "train": {"epochs": 2, "with": [{"distill.logits": {"temperature": 2.0}}]},
        }
    ]
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16 * 16, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.hidden(nn.functional.max_pool2d(x, 2).flatten(1))))


@pytest.fixture(scope="module")
def task():
    return sources.data("digits").task


@pytest.fixture(scope="module")
def net(task):
    torch.manual_seed(0)
    model = Net()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(6):
        for batch in task.train:
            optimiser.zero_grad()
            task.batch_loss(task.outputs(model, batch), batch).backward()
            optimiser.step()
    return model.eval()


def first_outputs(model, task):
    with torch.no_grad():
        return task.outputs(model, next(iter(task.test)))


def test_the_file_is_within_the_size_asked_for_and_loads_with_and_without_the_class(net, task, tmp_path):
    result = pared.compress(net, task, RECIPE, size="10x", train=False, out=tmp_path / "run")
    path = tmp_path / "run" / "model.pared"
    original = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    assert path.stat().st_size <= original / 10
    assert result.data["after"]["file_bytes"] == path.stat().st_size
    expected = first_outputs(result.model, task)
    assert torch.equal(first_outputs(pared.load(path), task), expected)
    assert torch.equal(first_outputs(pared.load(path, Net()).eval(), task), expected)


def test_a_run_folder_holds_what_was_promised(net, task, tmp_path):
    pared.compress(net, task, RECIPE, size="6x", train=False, out=tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.pared", "result.json", "report.html", "recipe.yaml", "log.txt", "run.json"} <= names
    data = json.loads((tmp_path / "run" / "result.json").read_text())
    for side in ("before", "after"):
        assert {"file_bytes", "parameters", "macs", "peak_activation_bytes", "latency_ms", "metric"} <= set(data[side])
    assert {"value", "low", "high", "n"} <= set(data["drop_pp"])
    assert data["edits"] and data["met"]
    assert sum(edit["bytes_after"] for edit in data["edits"]) <= data["after"]["file_bytes"]


def test_a_drop_alone_asks_for_the_smallest_file_within_it(net, task):
    loose = pared.compress(net, task, RECIPE, max_drop=10.0, train=False)
    tight = pared.compress(net, task, RECIPE, max_drop=0.0, train=False)
    assert loose.met and tight.met
    assert loose.data["after"]["file_bytes"] < tight.data["after"]["file_bytes"]
    accepted = [trial for trial in tight.data["trials"] if trial["accepted"]]
    assert accepted[0]["drop_pp"] <= 0.0


def test_a_drop_is_accepted_with_a_margin_that_the_report_states(net, task):
    result = pared.compress(net, task, RECIPE, max_drop=1.0, train=False)
    stated = result.data["acceptance"]
    assert 0 < stated["margin"] == min(stated["standard_error"], 0.5)
    assert stated["drop"] + stated["margin"] <= 1.0 + 1e-9
    few = [line for line in result.data["warnings"] if "are few for an accepted drop of 1 pp" in line]
    assert bool(few) == (stated["standard_error"] > 0.5)


def test_training_wins_back_what_a_hard_budget_costs(net, task):
    plain = pared.compress(net, task, RECIPE, size="25x", train=False)
    trained = pared.compress(net, task, RECIPE, size="25x", train=True)
    assert trained.data["training"]
    assert trained.after.metric.value > plain.after.metric.value
    assert trained.data["after"]["file_bytes"] <= trained.data["before"]["file_bytes"] / 25


def test_the_original_model_is_untouched(net, task):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pared.compress(net, task, RECIPE, size="12x", train=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert type(net) is Net


def test_fewer_macs_are_really_fewer(net, task):
    result = pared.compress(net, task, RECIPE, macs="1.3x", train=False)
    assert result.data["after"]["macs"] <= result.data["before"]["macs"] / 1.3


def test_a_budget_that_cannot_be_met_leaves_the_best_found(net, task, tmp_path):
    with pytest.raises(BudgetError, match=r"needs .* but the budget is .*add a smaller option to") as caught:
        pared.compress(net, task, RECIPE, size="5000x", train=False, out=tmp_path / "run")
    assert (tmp_path / "run" / "model.pared").exists()
    assert not caught.value.result.met


def test_a_drop_that_cannot_be_kept_is_said_and_the_best_found_is_kept(net, task):
    with pytest.warns(UserWarning, match="the budget is not met"):
        result = pared.compress(net, task, RECIPE, size="28x", max_drop=0.0, train=False)
    assert not result.met
    assert result.data["warnings"]


def test_without_labels_the_measure_is_agreement_with_the_original(net, task):
    batches = [(inputs, None) for inputs, _ in task.val]
    unlabelled = pared.Task(train=batches, val=batches)
    result = pared.compress(net, unlabelled, RECIPE, size="8x", train=False)
    assert result.data["after"]["metric"]["name"] == "agreement with the original"
    assert result.after.metric.value > 0.9


def test_two_steps_share_one_budget(net, task):
    steps = [
        {"factor.low_rank": {"keep": [0.3, 0.5]}},
        {"quantize.integer": {"bits": [2, 4, 8]}},
    ]
    result = pared.compress(net, task, {"steps": steps}, size="9x", train=False)
    assert result.data["after"]["file_bytes"] <= result.data["before"]["file_bytes"] / 9


def test_equal_runs_give_equal_files(net, task, tmp_path):
    for name in ("a", "b"):
        pared.compress(net, task, RECIPE, size="20x", out=tmp_path / name)
    assert (tmp_path / "a" / "model.pared").read_bytes() == (tmp_path / "b" / "model.pared").read_bytes()


def test_apply_puts_techniques_in_by_hand(net, task, tmp_path):
    chain = pared.Chain(prune.Magnitude(sparsity=0.8), quantize.Codebook(bits=3))
    model = pared.apply(net, task, [chain])
    pared.save(model, tmp_path / "net.pared")
    assert torch.equal(first_outputs(pared.load(tmp_path / "net.pared"), task), first_outputs(model, task))
    assert (model.hidden.weight == 0).float().mean() >= 0.799


def test_apply_in_a_list_acts_on_what_was_built_before(net, task):
    model = pared.apply(net, task, [prune.Magnitude(sparsity=0.8), quantize.Codebook(bits=3)])
    assert len(torch.unique(model.hidden.weight)) <= 8
    assert (model.hidden.weight == 0).float().mean() >= 0.799


def test_a_technique_that_changes_nothing_is_an_error(net, task):
    with pytest.raises(InputError, match="changes nothing"):
        pared.apply(net, task, pared.factor.LowRank(rank=10_000))


def test_weights_that_are_not_finite_are_named(net, task):
    broken = Net()
    with torch.no_grad():
        broken.hidden.weight[3, 3] = float("nan")
    with pytest.raises(InputError, match="hidden.weight"):
        pared.compress(broken, task, RECIPE, size="4x")


def test_a_folder_of_another_run_is_refused(net, task, tmp_path):
    pared.compress(net, task, RECIPE, size="6x", train=False, out=tmp_path / "run")
    with pytest.raises(InputError, match="another run"):
        pared.compress(net, task, RECIPE, size="7x", train=False, out=tmp_path / "run")


SCRIPT = """
import sys, torch, warnings
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
import test_pipeline as t
from pared import sources
import pared
task = sources.data("digits").task
torch.manual_seed(0)
net = t.Net().eval()
print("ready", flush=True)
pared.compress(net, task, t.RECIPE, size="25x", out=sys.argv[1], progress=lambda e: print(e.get("say", "."), flush=True))
"""


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_file(share, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(here=os.path.dirname(__file__)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def start(out):
        return subprocess.Popen([sys.executable, script, out], stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT)

    begin = time.monotonic()
    first = start(whole)
    lines = 0
    for _ in first.stdout:
        lines += 1
    assert first.wait() == 0, time.monotonic() - begin
    killed = start(cut)
    for number, _ in enumerate(killed.stdout):
        if number >= share * lines:
            killed.send_signal(signal.SIGKILL)
            break
    killed.wait()
    again = start(cut)
    output = again.communicate()[0]
    assert again.returncode == 0, output
    assert (cut / "model.pared").read_bytes() == (whole / "model.pared").read_bytes()


def test_warnings_of_a_good_run_are_none(net, task):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pared.compress(net, task, RECIPE, size="6x", train=False)


def test_a_network_without_graph_is_compressed_all_the_same_and_loads_into_its_class(net, task, tmp_path):
    class Early(Net):
        def forward(self, x):
            return super().forward(x) if bool(x.sum() > -1e9) else x.flatten(1)[:, :10]

    early = Early().eval()
    early.load_state_dict(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = pared.compress(early, task, RECIPE, size="8x", train=False)
        result.save(tmp_path / "early.pared")
    assert result.met
    assert any("holds no program" in line and "Early" in line for line in result.data["warnings"])
    with pytest.raises(pared.ArtifactError, match="holds no program"):
        pared.load(tmp_path / "early.pared")
    loaded, x = pared.load(tmp_path / "early.pared", Early().eval()), next(iter(task.val))[0]
    assert torch.equal(loaded(x), result.model(x))


def test_training_learns_from_the_teachers_given(net, task):
    asked = []

    class Teacher(nn.Module):
        def forward(self, x):
            asked.append(len(x))
            return net(x)

    pared.compress(net, task, RECIPE, size="20x", teachers=[Teacher()])
    assert sum(asked) >= 2 * sum(len(batch[1]) for batch in task.train)


def test_entropy_constrained_codes_come_out_of_training_within_the_size_and_close_to_it(net, task):
    recipe = pared.recipe.load("entropy-constrained").to_dict()
    recipe["steps"][0]["train"].update(epochs=30, tune_epochs=1)
    result = pared.compress(net, task, recipe, size="15x")
    ratio = result.data["before"]["file_bytes"] / result.data["after"]["file_bytes"]
    assert 15 <= ratio < 20
    assert result.data["drop_pp"]["value"] < 5


def test_activations_with_learned_steps_are_trained_along_with_the_weights(net, task, tmp_path, monkeypatch):
    loop, trained = trials.train_loop, []

    def watched(model, *args, **kwargs):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("_stretch")}
        history = loop(model, *args, **{**kwargs, "keep_best": False})  # else the best may be what it began with
        trained.append([not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before])
        return history

    monkeypatch.setattr(trials, "train_loop", watched)
    integer = {"quantize.integer": {"bits": [2, 3], "steps": "learned", "tensors": "matrices"}}
    values = {"quantize.activations": {"bits": 2, "places": "products", "steps": "learned"}}
    steps = [{**integer, "train": {"epochs": 4, "tune_epochs": 1}}, values]
    result = pared.compress(net, task, {"steps": steps}, size="6x")
    assert trained[:2] == [[True] * 3] * 2  # of the inputs of three layers, in both parts of the training
    assert result.data["drop_pp"]["value"] < 5
    names = [edit.technique.name for edit in result.edits]
    assert set(names[:-1]) == {"quantize.integer"} and names[-1] == "quantize.activations"
    assert not any(name.endswith("_stretch") for name, _ in result.model.named_parameters())
    path = tmp_path / "net.pared"
    result.save(path)
    expected = first_outputs(result.model, task)
    assert torch.equal(first_outputs(pared.load(path), task), expected)
    assert torch.equal(first_outputs(pared.load(path, Net()).eval(), task), expected)


def test_the_int8_recipe_folds_codes_and_rounds_in_this_order(net, task, tmp_path):
    said = []
    path = tmp_path / "net.pared"
    result = pared.compress(net, task, "int8", size="3.5x", train=False, progress=lambda event: said.append(event.get("say")))
    assert result.met
    names = [edit.technique.name for edit in result.edits]
    assert names[0] == "structure.fold_batch_norm" and names[-1] == "quantize.activations" and "quantize.integer" in names
    result.save(path)
    expected = first_outputs(result.model, task)
    assert torch.equal(first_outputs(pared.load(path), task), expected)
    assert torch.equal(first_outputs(pared.load(path, Net()).eval(), task), expected)
