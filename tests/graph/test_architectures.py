"""Half of the channels of twenty architectures, without code for any of them: benchmarks/zoo.py tries one of every family."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pared.sources.torchvision_schemas import declare_missing_schemas

LANGUAGE = ["bert", "gpt2", "llama", "vit", "whisper encoder", "t5 encoder", "torch.nn.TransformerEncoder", "LSTM", "GRU"]
IMAGES = """
convnext_atto poolformer_s12 edgenext_xx_small resmlp_12_224 mobilevit_xxs pvt_v2_b0 coat_lite_tiny gmlp_ti16_224
xcit_nano_12_p16_224 levit_128s efficientnet_b0
""".split()


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    declare_missing_schemas()
    path = Path(__file__).parents[2] / "benchmarks" / "zoo.py"
    spec = importlib.util.spec_from_file_location("pared_benchmarks_zoo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [*LANGUAGE, *IMAGES])
def test_an_architecture_loses_channels(name: str, zoo: ModuleType) -> None:
    pytest.importorskip("transformers" if name in LANGUAGE else "timm")
    row = zoo.one(name, checks=("save", "load", "train"))
    marks = zoo.marks(row)
    del marks["onnx"]
    assert all(marks.values()), row
