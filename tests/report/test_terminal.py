import io

import pytest
from rich.console import Console

from pared import report


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=110, color_system=None)


def shown(console):
    return console.file.getvalue()


def test_the_summary_holds_the_headline(result, console):
    result["warnings"] = ["there is no test data"]
    report.terminal(result, console)
    text = shown(console)
    for part in (
        "10.4",
        "not faster",
        "2.11× faster",
        "91.49 %",
        "fc1.weight",
        "quantize.codebook",
        "there is no test data",
    ):
        assert part in text
    assert "met" in text


def test_many_layers_are_cut(large_result, console):
    report.terminal(large_result, console)
    assert "76 smaller layers are in the report" in shown(console)


def test_markup_in_names_is_shown_as_it_is(result, console):
    result["edits"][0]["paths"] = ["[bold red]conv[/]"]
    result["warnings"] = ["[link=x]y[/link]"]
    report.terminal(result, console)
    assert "[bold red]conv[/]" in shown(console) and "[link=x]" in shown(console)


def test_an_empty_result_prints_nothing(console):
    report.terminal({}, console)
    assert shown(console).strip() == ""


def test_the_terminal_is_the_default(result, capsys):
    report.terminal(result)
    assert "10.4" in capsys.readouterr().out


def test_sensitivity_by_layer(result, console):
    report.sensitivity_table(result["sensitivity"], console)
    text = shown(console)
    assert text.count("fc1.weight") == 1 and "prune.magnitude sparsity 0.9 → quantize.codebook bits 3" in text


def test_latencies_against_the_first(console):
    row = {"runtime": "torch", "bytes": 1000, "batch_size": 1, "p10": 1.0, "p90": 3.0, "n": 100}
    rows = [
        {**row, "target": "a", "median": 2.0},
        {**row, "target": "b", "median": 1.0},
        {**row, "target": "c", "median": 2.0},
    ]
    report.bench_table(rows, console)
    lines = shown(console).splitlines()
    assert "2.00× faster" in next(line for line in lines if line.startswith("b"))
    assert "not faster" in next(line for line in lines if line.startswith("c"))


def test_what_is_in_a_file(console):
    row = {"path": "fc.weight", "shape": [10, 20], "dtype": "float32", "bits_per_weight": 2.5, "bytes": 63}
    found = {
        "file_bytes": 39842, "original_bytes": 1724320, "ratio": 43.28, "bits_per_weight": 0.7393, "data_bytes": 38000,
        "program_bytes": 260, "manifest_bytes": 1500,
        "tensors": [{**row, "technique": "quantize.integer(bits=4)"}, {**row, "path": "fc.bias", "technique": None}],
    }  # fmt: skip
    report.inspection(found, console)
    text = shown(console)
    for part in ("39.8 kB, 43.3 times smaller than 1.72 MB", "fc.weight", "quantize.integer bits 4", "10 × 20", "2.50"):
        assert part in text
    assert "of it program 260 B" in text and "as it is, float32" in text


def test_techniques_and_their_settings(console):
    row = {
        "name": "quantize.integer", "summary": "Store each weight as a k-bit integer.", "paper": "Jacob et al. 2018",
        "settings": [{"name": "bits", "type": "int", "range": "from 2 to 8", "default": 8, "help": "per weight"}],
    }  # fmt: skip
    report.techniques_table([row], console=console)
    assert "quantize.integer" in shown(console) and "per weight" not in shown(console)
    report.techniques_table([row], details=True, console=console)
    for part in ("bits", "per weight", "Jacob et al. 2018"):
        assert part in shown(console)
