"""Write the results table of README.md from benchmarks/results/*.json.

    python benchmarks/tables.py            # write
    python benchmarks/tables.py --check    # exit 1 if the table is not what the results say
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START = "<!-- results: written by benchmarks/tables.py from benchmarks/results/*.json -->\n"
END = "<!-- end of results -->"


def lenet(title: str, data: str) -> Callable[[Any], list[tuple[str, str]]]:
    def rows(found: Any) -> list[tuple[str, str]]:
        runs = found["runs"]
        drops = [run["drop_pp"] for run in runs]
        each = ", ".join(f"{drop['value']:.2f} [{drop['low']:.2f}, {drop['high']:.2f}]" for drop in drops)
        accuracy = f"{100 * found['accuracy_before_median']:.2f} → {100 * found['accuracy_after_median']:.2f} %"
        return [
            (
                f"{title}, {data}, {found['seeds']} seed{'s' * (found['seeds'] > 1)}",
                f"{found['ratio_median']:.1f}x smaller ({found['file_bytes_median'] / 1e3:.1f} kB, everything in it); test "
                f"accuracy {accuracy}, median drop {found['drop_pp_median']:.2f} pp (each seed, 95 % interval: {each})",
            )
        ]

    return rows


def coders(found: Any) -> list[tuple[str, str]]:
    row = found["dense"]["coders"]["rans"]
    return [
        (
            "rANS, 10 M four-bit symbols, one core",
            f"{100 * row['over_entropy']:.4f} % over the entropy; encodes {row['encode_msymbols_per_s']:.0f}, decodes "
            f"{row['decode_msymbols_per_s']:.0f} M symbols/s",
        )
    ]


def damage(found: Any) -> list[tuple[str, str]]:
    return [
        (
            f"Predicted against measured divergence, {net['net'].replace('_', '-')}, {net['n']} layer-options",
            f"rank correlation {net['held_out']['rank_correlation']:.3f}, median ratio {net['held_out']['median_ratio']:.2f} "
            f"on test data; {net['rank_correlation']:.3f}, {net['median_ratio']:.2f} on calibration data as gathered there",
        )
        for net in found["nets"]
    ]


def allocation(found: Any) -> list[tuple[str, str]]:
    return [
        (
            f"Allocation, {found['layers']} layers × {found['options']} options, gap ≤ 1e-4",
            f"{found['one_budget']['seconds_median']:.2f} s for one budget, "
            f"{found['three_budgets']['seconds_median']:.1f} s for three",
        )
    ]


def startup(found: Any) -> list[tuple[str, str]]:
    load = found["load_to_first_output_seconds"]
    files = found["files"]
    return [
        ("`import pared`, beyond `import torch`", f"{found['import_seconds']['clock']:.3f} s; everything is imported on first use"),
        (
            "EfficientNet-Lite0 file to its first output, without its class",
            f"{load['cached']['clock']:.2f} s ({load['cached']['processor']:.2f} s of the processor); cold "
            f"{load['cold']['clock']:.2f} s ({load['cold']['processor']:.2f} s)",
        ),
        (
            "Program in the file, LeNet-5 / EfficientNet-Lite0",
            f"{files['lenet_5']['program_bytes']} B / {files['efficientnet_lite0']['program_bytes']} B",
        ),
    ]


def resnet18(found: Any) -> list[tuple[str, str]]:
    return [
        (
            f"resnet18, default recipe, {found['images']} images, post-training, threads: {found['threads']}",
            f"{found['seconds'] / 60:.1f} min for {found['options']} options",
        )
    ]


def calibration(found: Any) -> list[tuple[str, str]]:
    worst = max(found["cases"], key=lambda case: case["peak_bytes"])
    return [
        (
            f"Calibrating a language model of {worst['parameters'] / 1e6:.0f} M parameters, {worst['examples']} × "
            f"{worst['tokens']} tokens",
            f"{worst['peak_bytes'] / 1e9:.1f} GB at the peak, everything included",
        )
    ]


def efficientnet(found: Any) -> list[tuple[str, str]]:
    rows = []
    for run in found["runs"]:
        agreed = run["agreement"]
        value = f"{100 * agreed['value']:.1f} % [{100 * agreed['low']:.1f}, {100 * agreed['high']:.1f}]"
        rows.append(
            (
                f"EfficientNet-Lite0 to {run['size']}, post-training, on photographs without labels",
                f"{run['ratio']:.1f}x smaller; same class as the original for {value} of {agreed['n']} views of "
                f"{agreed['n_groups']} photographs that no choice was made on",
            )
        )
    return rows


def language(found: Any) -> list[tuple[str, str]]:
    """The language model, each way of coding its linear layers; peers by themselves."""
    base = found["ways"]["original"]["perplexity"]
    ways, peers = [], []
    for way, one in found["ways"].items():
        if one["bits_per_weight"] is None:
            continue
        figures = f"{one['perplexity']:.2f} at {one['bits_per_weight']:.2f}"
        if "version" in one:
            how = f", {one['iters']} iterations, batches of {one['batch']}" if "iters" in one else ""
            peers.append(f"{way} {one['version']}{how}: {figures}")
        else:
            ways.append(f"{way}: {figures}" + (f" ({one['plain_bits']:.4g} uncoded)" if one["plain_bits"] else ""))
    title = f"{found['model'].partition('-Instruct')[0]}, prose, perplexity (original {base:.2f}) and bits per linear weight"
    rows = [(f"{title}, coded", "; ".join(ways))]
    return rows + [(f"{title}, other packages, same model and windows", "; ".join(peers))] if peers else rows


def kill(found: Any) -> list[tuple[str, str]]:
    value = f"{found['same_file']} of {found['kills']} the same file, bit for bit"
    return [("`kill -9` at a random moment, then the same command", value)]


def strangers(found: Any) -> list[tuple[str, str]]:
    tried = found["nets"]
    nets = [net for net in tried if "error" not in net]
    n_met = sum(net["met"] for net in nets)
    n_same = sum(net["largest_difference_without_class"] <= 1e-5 for net in nets)
    worst = max(net["drop_pp"]["value"] for net in nets)
    names = ", ".join(net["net"].replace("_", " ") for net in tried)
    return [
        (
            f"Networks that nothing was tuned for ({names}): 8x, drop at most 1",
            f"{n_met} of {len(tried)} met on validation data, worst drop on test data {worst:.2f}; {n_same} give the same outputs "
            "without their source",
        )
    ]


def int8(found: Any) -> list[tuple[str, str]]:
    rows = []
    peers = {"ours": "pared", "onnxruntime": "onnxruntime.quantization", "nncf": "nncf"}
    for net, figures in found["quality"].items():
        told = []
        for who, name in peers.items():
            if who in figures:
                one = figures[who]
                accuracy = f", accuracy {100 * one['accuracy']:.2f} %" if "accuracy" in one else ""
                told.append(f"{name} {100 * one['agreement']:.1f} %{accuracy}, {one['share_of_fp32']:.3f} of the bytes")
        title = f"int8, {net.replace('_', '-')}, {figures['n']} test images: same class as in floating point"
        rows.append((title, "; ".join(told)))
    for net, figures in found["latency"].items():
        for batch in ("batch_1", "batch_16"):
            times = figures[batch]
            told = [f"{name} {times[who]['faster_than_fp32']:.2f}x" for who, name in
                    (("ours", "pared"), ("onnxruntime", "onnxruntime.quantization"), ("openvino ours", "pared in OpenVINO"),
                     ("openvino nncf", "nncf in OpenVINO")) if who in times]  # fmt: skip
            title = f"int8 against floating point in the same runtime, {net.replace('_', '-')}, {batch.replace('_', ' of ')}"
            rows.append((title, "; ".join(told)))
    return rows


def codec(title: str) -> Callable[[Any], list[tuple[str, str]]]:
    def rows(found: Any) -> list[tuple[str, str]]:
        known = [level for level in found["levels"] if level["ratio"]]
        if not known:
            return []
        each = "; ".join(
            f"{level['pared'] / 1e3:.1f} against {level['nncodec'] / 1e3:.1f} kB at {level['quality']:.4g} "
            f"({100 * (1 - level['ratio']):.0f} % fewer)"
            for level in known
        )
        what = f"{title}: whole file beside nncodec 2.1.3, no training"
        return [(what, f"{found['measure']}, {found['original']:.4g} before: {each}")]

    return rows


def integers(found: Any) -> list[tuple[str, str]]:
    total = found["total"]
    peer = total["nncodec"]
    return [
        (
            f"{title} beside nncodec's, {found['tensors']} tensors of integers",
            f"{total[coder]['bytes'] / peer['bytes']:.4f} of its bytes; encodes {peer['encode_s'] / total[coder]['encode_s']:.1f}, "
            f"decodes {peer['decode_s'] / total[coder]['decode_s']:.1f} times as fast",
        )
        for coder, title in (("context", "Context coder"), ("rans", "rANS"))
    ]


def determinism(found: Any) -> list[tuple[str, str]]:
    def words(versions: Any) -> str:
        return ", ".join(f"{name} {versions[name]}" for name in ("python", "numpy", "numba"))

    rows = [(
        "The same file from two runs",
        f"{found['files'] - len(found['files_that_differ_in_a_second_run'])} of {found['files']} files, with and without training",
    )]  # fmt: skip
    for other in found["others"]:
        files, payloads = (len(other[key]) for key in ("files_that_differ", "payloads_that_differ"))
        what = f"Decoded with {words(other['versions'])} as with {words(found['versions'])}"
        same = f"{found['files'] - files} of {found['files']} files ({found['tensors']} tensors), bit for bit"
        written = f"{found['payloads'] - payloads} of {found['payloads']} payloads of the coders are written the same"
        rows.append((what, f"{same}; {written}"))
    return rows


LOSSLESS_STEPS = ("coder_encode_s", "coder_decode_s", "file_encode_s", "file_decode_s")


def lossless(found: Any) -> list[tuple[str, str]]:
    def line(row: Any) -> str:
        shares = {codec: 100 * row[codec]["bytes"] / row["raw"] for codec in ("pared", "zipnn", "zstd_19")}
        there, back, file_there, file_back = (row["zipnn"][key] / row["pared"][key] for key in LOSSLESS_STEPS)
        sizes = f"{shares['pared']:.2f} % of its bytes (zipnn {shares['zipnn']:.2f} %, zstd -19 {shares['zstd_19']:.2f} %)"
        return (
            f"{sizes}; beside zipnn's speed {there:.2f} times there and {back:.2f} times back, tensors in memory; file to file, "
            f"with seal, digests and reading back, which zipnn has not, {file_there:.2f} and {file_back:.2f} times"
        )

    def command(row: Any) -> str:
        kept, none = row["pared"]["command_s"], row["pared"]["command_without_machine_code_s"]
        return (
            f"{kept:.1f} s of the processor, the start of the process included, {none:.1f} s the first time after installation; "
            f"zipnn's process takes {row['zipnn']['start_s']:.1f} s to start and read the file"
        )

    rows = [(f"Lossless, {row['name']}, {row['kind']}", line(row)) for row in found["rows"]]
    return rows + [(f"Lossless, {row['name']}, the command", command(row)) for row in found["rows"] if row["kind"] == "as it is"]


def rethinking(found: Any) -> list[tuple[str, str]]:
    """The fine-tuned network beside the same architecture from random weights."""
    methods: dict[str, list[float]] = {}
    for run in found["runs"]:
        how = "fine-tuned" if run["epochs"] is None else f"{run['method']}, {run['epochs']} epochs"
        methods.setdefault(how, []).append(100 * run["accuracy"])
    told = [
        f"{how} {sum(values) / len(values):.2f} %" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")
        for how, values in methods.items()
    ]
    name = found["model"].partition(":")[0].removesuffix(".py").replace("_", " ")
    title = f"Worth pruning? Test accuracy of {name} at {found['macs']} fewer MACs (original {100 * found['accuracy']:.2f} %)"
    return [(title, "; ".join(told))]


def channels(found: Any) -> list[tuple[str, str]]:
    """One row per number of epochs and of MACs: every method beside the others."""
    cases: dict[tuple[int, float], dict[str, list[float]]] = {}
    for run in found["runs"]:
        cases.setdefault((run["epochs"], run["macs_asked"]), {}).setdefault(run["method"], []).append(run["drop_pp"])
    rows = []
    for (epochs, share), methods in sorted(cases.items()):
        how = f"{epochs} epochs of recovery" if epochs else "no fine-tuning"
        n = max(len(drops) for drops in methods.values())
        means = {name: sum(drops) / len(drops) for name, drops in methods.items()}
        told = [f"{name} {'gains' if mean < 0 else 'loses'} {abs(mean):.2f} points" for name, mean in means.items()]
        title = f"Channels of the small residual network, {share:g}x fewer MACs, {how}, {n} seed{'s' * (n > 1)}"
        rows.append((title, "; ".join(told)))
    for net, timed in found.get("latency", {}).items():
        told = [f"{row['widths']} {row['faster']:.2f}x" for row in timed if row["widths"] != "original"]
        title = f"Channels, ONNX Runtime, one image, {timed[0]['macs_asked']:g}x fewer MACs: {net}"
        rows.append((title, "; ".join(told)))
    for net, timed in found.get("by_time", {}).items():
        for asked in dict.fromkeys(row["asked"] for row in timed):
            those = [row for row in timed if row["asked"] == asked and row["plan"] != "original"]
            told = [f"{row['plan']} {row['faster']:.2f}x ({row['macs_ratio']:.2f}x fewer MACs)" for row in those]
            title = f"Channels, {asked:g}x faster asked of ONNX Runtime: {net}"
            rows.append((title, "; ".join(told)))
    return rows


def coverage(found: Any) -> list[tuple[str, str]]:
    """Counts by the marks that benchmarks/zoo.py writes into docs/coverage.md."""
    timm = [row for row in found if len(row.get("input", ())) == 4 and row["name"] != "vit"]
    told = []
    for kind, rows in (("families of timm", timm), ("transformers and recurrent nets", [r for r in found if r not in timm])):
        share = [r for r in rows if "after" in r and all(r["after"][k] <= 0.7 * r["before"][k] for k in ("parameters", "macs"))]
        exact = [r for r in share if r["oracle"] <= 1e-4 and isinstance(r["load"], float) and r["load"] <= 1e-4]
        onnx = [r for r in exact if isinstance(r["onnx"], float) and r["onnx"] <= 1e-3]
        told.append(f"{len(share)} of {len(rows)} {kind} lose at least 30 % of parameters and MACs, {len(exact)} come back from "
                    f"their file the same, {len(onnx)} agree in ONNX Runtime")  # fmt: skip
    return [("Half of all channels, random weights, no code per model", "; ".join(told))]


def dynamic(found: Any) -> list[tuple[str, str]]:
    whole, told = found["files"]["fp32"]["file_bytes"], []
    for who, name in (("pared", "pared"), ("onnxruntime", "onnxruntime.quantization")):
        one = found["files"][who]
        speed = " / ".join(f"{one[batch]['faster_than_fp32']:.2f}x" for batch in ("batch_1", "batch_16"))
        told.append(f"{name} cosine {one['cosine']:.4f}, {speed} the speed of fp32, {one['file_bytes'] / whole:.3f} of its bytes")
    return [("Dynamic int8, MiniLM, ONNX Runtime, batch 1 / 16, one thread", "; ".join(told))]


LOW_BITS = {
    "w4a4": "4-bit weights and activations, learned steps, small residual network",
    "w2a2": "2-bit weights and activations, learned steps, small residual network",
    "binary": "Binary weights, LeNet-5",
    "mixed": "Binary to 8 bits by layer, 1.5 bits per weight asked, LeNet-5",
}


def low_bits(found: Any) -> list[tuple[str, str]]:
    return [
        (
            f"{LOW_BITS[name]}, 1 seed",
            f"test accuracy {row['accuracy_before']:.2f} → {row['accuracy_after']:.2f} %; {row['bits_per_weight']:.2f} bits per "
            "weight, the whole file",
        )
        for name, row in found.items()
    ]


SOURCES: dict[str, Callable[[Any], list[tuple[str, str]]]] = {
    "lenet_300_100": lenet("LeNet-300-100", "Fashion-MNIST"),
    "lenet_5": lenet("LeNet-5", "Fashion-MNIST"),
    "lenet_300_100-mnist": lenet("LeNet-300-100", "MNIST"),
    "lenet_5-mnist": lenet("LeNet-5", "MNIST"),
    "channels": channels,
    "rethinking": rethinking,
    "coverage": coverage,
    "coders": coders,
    "damage": damage,
    "allocation": allocation,
    "startup": startup,
    "resnet18": resnet18,
    "calibration": calibration,
    "efficientnet": efficientnet,
    "strangers": strangers,
    "language": language,
    "kill": kill,
    "int8": int8,
    "dynamic": dynamic,
    "low_bits": low_bits,
    "codec-lenet_300_100": codec("LeNet-300-100"),
    "codec-lenet_5": codec("LeNet-5"),
    "codec-small_resnet": codec("Small residual network, Fashion-MNIST"),
    "codec-digits_lstm": codec("LSTM on digits"),
    "codec-efficientnet_lite0": codec("EfficientNet-Lite0, photographs"),
    "codec-minilm": codec("MiniLM, docstrings"),
    "codec-integers": integers,
    "lossless": lossless,
    "determinism": determinism,
}


def table() -> str:
    lines = ["| what | measured |", "|---|---|"]
    for name, rows in SOURCES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += [f"| {what} | {value} |" for what, value in rows(json.loads(path.read_text()))]
    return "\n".join(lines) + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(START)
    written = before + START + table() + END + rest.split(END, 1)[1]
    if "--check" in sys.argv:
        if written != text:
            sys.exit("README.md: the results table is not what benchmarks/results say; run: python benchmarks/tables.py")
        return
    readme.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
