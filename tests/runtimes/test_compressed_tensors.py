"""Packed integers as transformers loads them, on a small Llama with grouped queries."""

import json

import pytest
import torch
from typer.testing import CliRunner

import pared
from pared import quantize
from pared.cli import app
from pared.errors import InputError
from pared.runtimes.compressed_tensors import packed
from pared.sources.torchvision_schemas import declare_missing_schemas

pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def language():
    declare_missing_schemas()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=100, num_key_value_heads=2, tie_word_embeddings=True, use_cache=False, **shape)
    ids = torch.randint(0, 100, (8, 12))
    batch = ({"input_ids": ids}, ids)
    return LlamaForCausalLM(config).eval(), pared.Task([batch], [batch])


@pytest.mark.parametrize("settings", [{"bits": 4, "group": 32}, {"bits": 8}, {"bits": 3}], ids=str)
def test_transformers_loads_what_was_written_and_it_is_smaller(language, settings, tmp_path):
    model, task = language
    small = pared.apply(model, task, quantize.Integer(tensors="matrices", **settings))
    written = pared.export(small, tmp_path / "folder", to="compressed-tensors")
    assert written.max_relative_error < 1e-6
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    ids = torch.randint(0, 100, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-5)
    settings = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors" and "lm_head" in settings["ignore"]
    model.save_pretrained(tmp_path / "dense")
    dense = (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert (tmp_path / "folder" / "model.safetensors").stat().st_size < 0.6 * dense


def test_what_is_in_the_folder_stays_and_short_types_are_written(language, tmp_path):
    model, task = language
    small = pared.apply(model.to(torch.bfloat16), task, quantize.Integer(bits=4, group=32, tensors="matrices"))
    model.to(torch.float32)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tokenizer.json").write_text("{}")
    pared.export(small, tmp_path / "folder", to="compressed-tensors")
    assert (tmp_path / "folder" / "tokenizer.json").exists() and (tmp_path / "folder" / "model.safetensors").exists()
    (tmp_path / "folder" / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="holds other weights"):
        pared.export(small, tmp_path / "folder", to="compressed-tensors")


def test_a_file_is_exported_by_command_with_the_class_and_tokenizer_of_its_model(language, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    model, task = language
    model.save_pretrained(tmp_path / "dense")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "dense")
    small = pared.apply(model, task, quantize.Integer(bits=4, group=32, tensors="matrices"))
    pared.save(small, tmp_path / "small.pared")
    arguments = ["export", str(tmp_path / "small.pared"), "--to", "compressed-tensors"]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, InputError) and "--model hf:NAME" in str(refused.exception)
    alone = CliRunner().invoke(app, [*arguments[:3], "safetensors", "--model", "hf:any"])
    assert isinstance(alone.exception, InputError) and "leave --model out" in str(alone.exception)
    done = CliRunner().invoke(app, [*arguments, "--model", f"hf:{tmp_path / 'dense'}"], catch_exceptions=False)
    assert done.exit_code == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    ids = torch.randint(0, 100, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("b")["input_ids"] == [1]


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_as_compressed_tensors_packs_them(bits):
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 37), dtype=torch.int8)
    assert torch.equal(packed(codes, bits), pack_to_int32(codes, bits))


def test_what_is_no_model_of_transformers_or_holds_no_integers_is_one_line(language, tmp_path):
    model, task = language
    with pytest.raises(InputError, match="models of transformers, got Linear; load the file into its class"):
        pared.export(torch.nn.Linear(2, 2), tmp_path / "folder", to="compressed-tensors", example=torch.zeros(1, 2))
    with pytest.raises(InputError, match=r"need linear layers with integer weights, found none; use quantize\.integer"):
        pared.export(model, tmp_path / "folder", to="compressed-tensors", example=task.example(model))
    affine = pared.apply(model, task, quantize.Integer(bits=4, group=32, tensors="matrices", scheme="affine"))
    with pytest.raises(InputError, match=r"reads no zero points of .*, but model\.layers\.0\..*; take scheme: symmetric"):
        pared.export(affine, tmp_path / "folder", to="compressed-tensors")
    assert not (tmp_path / "folder").exists()
