"""Models by name: the module that was meant, and one clear line where there is none."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pared import sources
from pared.errors import InputError, MissingExtra
from pared.measurement.quality import evaluate


@pytest.fixture(autouse=True)
def _import_state():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("mine_"):
            del sys.modules[name]


needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@needs_timm
def test_timm_models_come_untrained_in_evaluation_mode_with_an_example_that_runs():
    model, facts = sources.model("timm:mobilenetv3_small_050")
    assert not model.training
    assert facts.image.height == 224 and facts.image.mean == (0.485, 0.456, 0.406)
    with torch.no_grad():
        assert model(*facts.example).shape == (2, 1000)


@needs_timm
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("timm:resnet118", r"no model 'resnet118'; did you mean resnet"),
        ("timm:resnet18?trained", r"may end in \?pretrained, got \?trained"),
        ("timm:resnet18?pretrained", r"weights of timm:resnet18 must be reachable"),
    ],
)
def test_a_timm_model_that_cannot_be_had_is_one_clear_line(spec, words):
    with pytest.raises(InputError, match=words) as caught:
        sources.model(spec)
    assert "\n" not in str(caught.value)


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"pip install 'pared\[models\]'"):
        sources.model("timm:resnet18")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"transformers.*pared\[models\]"):
        sources.model("hf:anything")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """A tiny causal language model with a word tokenizer, as a folder of transformers."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("language-model")
    words = {word: index for index, word in enumerate(["<unk>", "the", "cat", "sat", "on", "mat"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_folder_of_transformers_gives_the_class_it_names(language_model):
    model, facts = sources.model(f"hf:{language_model}")
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    with torch.no_grad():
        assert model(**facts.example_kwargs).logits.shape == (2, 16, 6)


def test_the_measure_of_text_is_its_log_likelihood(language_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 300)
    model, facts = sources.model(f"hf:{language_model}")
    task = sources.data(f"text:{text}", model, facts=facts).task
    measured = evaluate(model.eval(), task, task.test)
    (inputs, targets) = next(iter(task.test))
    with torch.no_grad():
        logits = model(**inputs).logits
    exact = -float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert measured.name == "log_likelihood"
    assert measured.value == pytest.approx(exact, rel=1e-5)


def test_text_becomes_windows_whose_targets_are_the_next_tokens(language_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 300)
    model, facts = sources.model(f"hf:{language_model}")
    found = sources.data(f"text:{text}", model, facts=facts)
    task = found.task
    inputs, targets = next(iter(task.val))
    assert torch.equal(inputs["input_ids"][:, 1:], targets[:, :-1])
    # 1,800 tokens make 14 windows; the last tenth is the test.
    assert [part.n_examples for part in (task.train, task.val, task.test)] == [12, 1, 1]
    assert "1800 tokens in 14 windows" in found.notes[0]
    task.check(model)
    with torch.no_grad():
        assert task.batch_loss(task.outputs(model, (inputs, targets)), (inputs, targets)).isfinite()


def test_text_needs_a_tokenizer_and_enough_of_it(language_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat")
    with pytest.raises(InputError, match="names its tokenizer"):
        sources.data(f"text:{text}", nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"at least 1281 tokens .* found 2"):
        sources.data(f"text:{text}", sources.model(f"hf:{language_model}")[0])
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="must be UTF-8 text"):
        sources.data(f"text:{text}")


def test_a_name_that_no_hub_gives_is_one_clear_line():
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="hf:nobody/nothing must be a folder .* or reachable on the hub") as caught:
        sources.model("hf:nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_hub_checkpoint_that_is_a_pickle_is_not_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="must be a folder with a transformers model"):
        sources.model(f"hf:{tmp_path}")


def test_a_function_of_a_file_gives_its_module_and_its_task(tmp_path):
    file = tmp_path / "mine_of_models.py"
    (tmp_path / "mine_beside.py").write_text("WIDTH = 5\n")
    file.write_text(
        "import torch\nfrom pared.task import Task\nfrom mine_beside import WIDTH\n"
        "class Net(torch.nn.Linear): pass\n"
        "def build(): return Net(WIDTH, 2)\n"
        "def with_task():\n"
        "    batches = [(torch.zeros(3, WIDTH), torch.zeros(3, dtype=torch.long))]\n"
        "    return build(), Task(train=batches, val=batches)\n"
        "def number(): return 3\n"
    )
    model, facts = sources.model(f"{file}:build")
    assert model.in_features == 5 and not model.training and facts.task is None
    again, facts = sources.model(f"{file}:with_task")
    assert type(again) is type(model), "one file must be imported once"
    assert facts.task is not None and facts.example[0].shape == (3, 5)
    with pytest.raises(InputError, match="must return a torch.nn.Module, .* got int"):
        sources.model(f"{file}:number")
    with pytest.raises(InputError, match=r"must have a function 'buld', found none; did you mean build\?"):
        sources.model(f"{file}:buld")
    with pytest.raises(InputError, match=r"must name the function to call, as in .*:build"):
        sources.model(str(file))


def test_a_file_that_does_not_import_says_which_line(tmp_path):
    file = tmp_path / "mine_broken.py"
    file.write_text("import math\nmath.sqrt('x')\n")
    with pytest.raises(InputError, match=r"it raised TypeError in line 2 of mine_broken.py"):
        sources.model(f"{file}:build")
    file.write_text("def build(: pass\n")
    with pytest.raises(InputError, match="it raised SyntaxError"):
        sources.model(f"{file}:build")
    with pytest.raises(InputError, match="must name a file"):
        sources.model(f"{tmp_path / 'none.py'}:build")


def test_a_file_may_be_called_like_a_module_that_is_already_there(tmp_path):
    file = tmp_path / "json.py"
    file.write_text("import torch\ndef build(): return torch.nn.Linear(2, 2)\n")
    import json

    assert sources.model(f"{file}:build")[0].in_features == 2
    assert sys.modules["json"] is json


def test_an_exported_program_runs_as_before_and_takes_train_and_eval(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).eval()
    example = torch.randn(2, 4)
    torch.export.save(torch.export.export(net, (example,)), tmp_path / "net.pt2")
    model, facts = sources.model(str(tmp_path / "net.pt2"))
    assert torch.equal(facts.example[0], example)
    assert torch.equal(model.train()(example), net(example))
    assert sum(parameter.numel() for parameter in model.eval().parameters()) == 15


def test_a_file_that_is_no_program_is_one_clear_line(tmp_path):
    path = tmp_path / "net.pt2"
    with pytest.raises(InputError, match="must name a file"):
        sources.model(str(path))
    path.write_bytes(b"junk")
    with pytest.raises(InputError, match="must be a program saved by torch.export.save"):
        sources.model(str(path))


def test_an_unknown_name_lists_the_forms():
    with pytest.raises(InputError, match=r"model must be timm:NAME, .* got 'tim:x'; did you mean timm\?"):
        sources.model("tim:x")
    with pytest.raises(InputError, match="digits names no model"):
        sources.model("digits")
