import json

import torch
from torch import nn

from pared.budget import layer_latency
from pared.budget.layer_latency import LatencyTable, seen, slower
from pared.quantize import Activations, Integer


def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


def test_a_figure_is_measured_once_and_kept(tmp_path):
    calls = []

    def measure():
        calls.append(None)
        return 2.0, 1.0

    for _ in range(2):
        assert LatencyTable("torch", tmp_path / "kept" / "table.json").get("a layer", measure) == (2.0, 1.0)
    assert len(calls) == 1
    assert LatencyTable("onnxruntime", tmp_path / "kept" / "table.json").get("a layer", measure) == (2.0, 1.0)
    assert len(calls) == 2 and len(json.loads((tmp_path / "kept" / "table.json").read_text())) == 2


def test_a_table_that_is_not_whole_is_measured_anew(tmp_path):
    (tmp_path / "table.json").write_text('{"torch')
    assert LatencyTable("torch", tmp_path / "table.json").get("a layer", lambda: (1.0, 3.0)) == (1.0, 3.0)


def test_layers_are_seen_with_the_shapes_that_they_read():
    found = seen(network(), ((torch.randn(2, 1, 6, 6),), {}))
    assert {path: tuple(x.shape) for path, (_, x) in found.items()} == {"0": (2, 1, 6, 6), "3": (2, 64)}


def test_only_what_gets_slower_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_latency, "_time", lambda layer, *rest: (1.0, 2.0) if isinstance(layer, nn.Linear) else (2.0, 1.0))
    table = LatencyTable("torch", tmp_path / "table.json")
    found = slower(network(), ((torch.randn(2, 1, 6, 6),), {}), [Integer(), Activations()], table)
    assert found == {"3": (1.0, 2.0)}


def test_what_is_slower_stays_in_floating_point():
    assert Activations(keep="3").leaving(["0", "3"]).keep == "3,0"
