"""On a GPU: what is fitted there does what is fitted on the processor, and files move between the two."""

import pytest
import torch
from torch import nn

import pared
from pared import registry
from pared.recipe import load
from pared.testing import NETS, declarations, net

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA drives")

TECHNIQUES = [cls(**dict(cls.ladder[len(cls.ladder) // 2] if cls.ladder else {})) for cls in map(registry.get, registry.names())]
REPLACING = [technique for technique in TECHNIQUES if declarations.replaces(type(technique))]


def likeness(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(first.flatten().cpu().double(), second.flatten().cpu().double(), 0))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("technique", REPLACING, ids=str)
def test_it_does_there_what_it_does_here(technique, name):
    trained = net(name)
    here = pared.apply(trained.copy(), trained.task, technique)
    there = pared.apply(trained.copy().cuda(), trained.task, technique)
    with torch.no_grad():
        original, expected = (model(trained.inputs) for model in (trained.model, here))
        found = there(trained.inputs.cuda())
    assert found.is_cuda
    lost, lost_there = 1 - likeness(original, expected), 1 - likeness(original, found)
    assert lost_there < 1.5 * lost + 1e-3, (lost, lost_there)


@pytest.mark.parametrize("recipe", ["", "smallest", "entropy-constrained", "int8", "channels"])
def test_a_run_there_gives_a_file_for_here(recipe, tmp_path):
    trained = net("convolution")
    settings = {"train": False} if recipe == "smallest" else {}
    budget = {"macs": "1.5x"} if "channels" in recipe else {} if recipe == "int8" else {"size": "6x"}
    result = pared.compress(trained.copy().cuda(), trained.task, recipe or None, **budget, **settings, out=tmp_path)
    with torch.no_grad():
        expected = result.model(trained.inputs.cuda())
        for model in (pared.load(tmp_path / "model.pared"), pared.load(tmp_path / "model.pared").cuda()):
            device = next(model.parameters(), torch.zeros(0, device=expected.device)).device
            found = model(trained.inputs.to(device))
            torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-2, atol=1e-2)
    assert result.met, result.data["warnings"]


def test_a_language_model_is_quantized_there(tmp_path):
    from pared.sources.torchvision_schemas import declare_missing_schemas

    pytest.importorskip("transformers")
    declare_missing_schemas()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=100, num_key_value_heads=2, use_cache=False, **shape)
    ids = torch.randint(0, 100, (64, 12))
    task = pared.Task(*[[({"input_ids": ids[part]}, ids[part])] for part in (slice(0, 32), slice(32, 64))])
    model = LlamaForCausalLM(config).eval().cuda()
    result = pared.compress(model, task, load("smallest"), size="5x", train=False, out=tmp_path)
    assert result.met
