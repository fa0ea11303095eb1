"""Files of every version of the format load for ever, to the same bits."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from pared import artifact
from pared.record import record_of

HERE = Path(__file__).parent
FILES = sorted((HERE / "golden").glob("*.pared"))


@pytest.fixture(scope="module")
def golden():
    spec = importlib.util.spec_from_file_location("pared_make_golden", HERE / "make_golden.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_golden_files():
    assert len(FILES) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_of_every_version_load_to_the_same_bits(path, golden):
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    loaded = artifact.load(path)
    assert golden.facts(loaded) == told["tensors"]
    with torch.no_grad():
        outputs = loaded(golden.example()).flatten()
    assert torch.allclose(outputs, torch.tensor(told["outputs"]), atol=2e-3)
    own = artifact.load(path, golden.Small())
    assert golden.facts(own) == told["tensors"]
    assert record_of(own).provenance == {"name": path.stem.partition("-")[2]}
    assert artifact.inspect(path)["file_bytes"] == path.stat().st_size
