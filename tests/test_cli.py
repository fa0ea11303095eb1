"""The command line: exit codes, one clear line, nothing lost."""

import json
import os
import subprocess
import sys

import pytest

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

def wrong_shape():
    return nn.Sequential(nn.Linear(7, 3))

def not_finite():
    net = build()
    net[1].weight.data[0, 0] = float("inf")
    return net

def one_score_per_batch():
    import pared
    from pared import sources
    task = sources.data("digits").task
    task.metric = lambda outputs, batch: (outputs.argmax(1) == batch[1]).float().mean()
    return task

def empty():
    import pared
    return pared.Task(train=[], val=[])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "net.py").write_text(NET)
    return folder


def pared(folder, *arguments, code=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pared.cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def compress(folder, *arguments, model="net.py:build", data="digits", code=0):
    return pared(folder, "compress", model, "--data", data, "--no-train", *arguments, code=code)


def test_one_command_compresses_and_the_others_read_its_file(folder):
    done = compress(folder, "--size", "8x", "--out", "run", "--json")
    data = json.loads(done.stdout)
    file = folder / "run" / "model.pared"
    assert file.stat().st_size == data["after"]["file_bytes"] <= data["before"]["file_bytes"] / 8
    found = json.loads(pared(folder, "inspect", "run/model.pared", "--json").stdout)
    assert found["file_bytes"] == file.stat().st_size
    assert "3.bias" in pared(folder, "inspect", "run/model.pared").stdout
    assert "report.html" in pared(folder, "report", "run").stdout
    timing = ("--seconds", "0.3", "--input-size", "1,8,8", "--json")
    rows = json.loads(pared(folder, "bench", "net.py:build", "run/model.pared", *timing).stdout)
    assert len(rows) == 2


def test_a_resolved_recipe_of_a_run_can_be_run_again(folder):
    compress(folder, "--size", "8x", "--out", "first")
    compress(folder, "--recipe", "first/recipe.yaml", "--out", "second")
    assert (folder / "first" / "model.pared").read_bytes() == (folder / "second" / "model.pared").read_bytes()


def test_a_budget_that_cannot_be_met_is_exit_code_1_and_leaves_the_best_found(folder):
    done = compress(folder, "--size", "9000x", "--out", "impossible", code=1)
    assert done.stderr.strip().splitlines()[-1].startswith("BudgetError: ")
    assert "1.weight" in done.stderr
    assert (folder / "impossible" / "model.pared").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "net.py:wrong_shape"}, ["must run on a batch of val"]),
        ({"model": "net.py:not_finite"}, ["must be finite", "1.weight"]),
        ({"model": "net.py:nothing"}, ["nothing"]),
        ({"model": "missing.py:build"}, ["missing.py"]),
        ({"model": "tim:resnet18"}, ["did you mean timm"]),
        ({"data": "digit"}, ["did you mean digits"]),
        ({"data": "net.py:one_score_per_batch"}, ["one score per example"]),
        ({"data": "net.py:empty"}, ["at least one batch"]),
        ({"data": "fashion-mnist:nowhere"}, ["nowhere"]),
        ({"size": "twenty"}, ["size must be like"]),
        ({"recipe": "absent.yaml"}, ["absent.yaml"]),
        ({"store": "zip"}, ["store must be one of", "zip"]),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line(folder, arguments, words):
    given = dict(arguments)
    named = {key: given.pop(key) for key in ("model", "data") if key in given}
    given = {"size": "8x", "out": "unused", **given}
    flags = [part for key, value in given.items() for part in (f"--{key}", value)]
    done = compress(folder, *flags, **named, code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last


def test_a_key_that_no_recipe_has_is_named_with_the_nearest(folder):
    (folder / "bad.yaml").write_text("steps:\n  - quantize.integer: {bit: 4}\n")
    done = compress(folder, "--size", "8x", "--out", "unused", "--recipe", "bad.yaml", code=2)
    assert "did you mean bits" in done.stderr


def test_an_altered_file_is_an_artifact_error(folder):
    compress(folder, "--size", "8x", "--out", "altered")
    file = folder / "altered" / "model.pared"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "broken.pared").write_bytes(data)
    done = pared(folder, "inspect", "broken.pared", code=2)
    assert done.stderr.startswith("ArtifactError: ")


def test_techniques_are_listed_with_their_settings(folder):
    names = {row["name"] for row in json.loads(pared(folder, "techniques", "--json").stdout)}
    assert {"prune.magnitude", "quantize.integer", "quantize.codebook", "factor.low_rank", "distill.logits"} <= names
    assert "bits" in pared(folder, "techniques", "quantize.integer").stdout


def test_sensitivity_ranks_layers(folder):
    rows = json.loads(pared(folder, "sensitivity", "net.py:build", "--data", "digits", "--json").stdout)
    assert {row["path"] for row in rows} >= {"1.weight", "3.weight"}


def test_importing_pared_loads_nothing_heavy():
    code = (
        "import torch, sys; before = set(sys.modules); import pared; "
        "heavy = [m for m in set(sys.modules) - before if m.split('.')[0] in "
        "('numba', 'scipy', 'rich', 'typer', 'sklearn', 'jinja2', 'onnx') or m.startswith(('pared.prune', 'pared.quantize'))]; "
        "print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
