"""Channel pruning on one architecture of every family that timm lists, and on small transformers and recurrent nets.

    python benchmarks/zoo.py                 # what is not in the results yet
    python benchmarks/zoo.py resnet18 bert   # these, again
    python benchmarks/zoo.py --table         # write docs/coverage.md from the results

Random weights, small images, half of the channels, no code per model. Each architecture runs in a process of its own
and must: lose 30 % of its parameters and MACs; equal, to 1e-4, its own original with the same channels silenced operator by
operator; be saved, and loaded without its class; take a training step; agree with its ONNX export in ONNX Runtime to
1e-3. MACs are counted by torch's own counter. Where channels stay, the reasons are kept, and the network is cut again
as its program (`rewrite=True`). Results go to benchmarks/results/coverage.json after every architecture.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import pared
from pared import prune
from pared.budget.channels import Removal, masks
from pared.graph.channels import Channels
from pared.graph.cutting import difference
from pared.place import everywhere
from pared.record import Record, attach_
from pared.site import duplicate
from pared.sources.torchvision_schemas import declare_missing_schemas
from pared.statistics import Statistics
from pared.testing.zeroing import zeroed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
LIMIT_SECONDS = 600
ENOUGH = 0.7

TIMM = """
res2net50_14w_8s poolformer_s12 mobilevit_xxs mobilevitv2_050 pvt_v2_b0 twins_pcpvt_small twins_svt_small coat_lite_tiny
xcit_nano_12_p16_224 crossvit_9_240 cs3darknet_focus_s cspresnet50 dpn48b nf_regnet_b0 nfnet_l0 levit_128s
efficientvit_b0 efficientvit_m0 edgenext_xx_small eva02_tiny_patch14_224 fastvit_t8 cait_xxs24_224 volo_d1_224
gmlp_ti16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 resmlp_12_224
beitv2_base_patch16_224 halonet26t lambda_resnet26t botnet26t_256 repvgg_a0 mobileone_s0 gernet_s convit_tiny
convmixer_768_32 convnext_atto convnextv2_atto cpubone_nano csatv2 cspnext_tiny davit_tiny
deit_tiny_distilled_patch16_224 deit3_small_patch16_224 densenet121 dla46x_c dla34 efficientformer_l1
efficientformerv2_s0 mixnet_s tinynet_e mnasnet_small efficientnet_b0 tf_efficientnetv2_b0 efficientvim_m1
vit_small_patch16_dinov3 fasternet_t0 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 ghostnetv2_100 ghostnetv3_050
hardcorenas_a hgnetv2_b0 hgnet_tiny hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto
inception_v3 inception_v4 inception_resnet_v2 lcnetv2_small lowformer_b0 mambaout_femto coatnet_nano_rw_224
maxvit_pico_rw_256 convformer_s18 caformer_s18 mixer_s32_224 mobilenetv3_small_050 mobilenetv4_conv_small
mobilenetv4_hybrid_medium lcnet_035 fbnetv3_b mvitv2_tiny naflexvit_base_patch16_gap nest_tiny nextvit_small pit_ti_224
qwen3_vit_88m rdnet_tiny regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvit_m0_9 resnest14d resnet18 resnet26
seresnet18 resnetv2_18 resnetv2_50x1_bit rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18
starnet_s050 swiftformer_xs tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m vgg11 vgg11_bn visformer_tiny
vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224
ese_vovnet19b_slim legacy_xception xception41 mobilenetv5_base nasnetalarge pnasnet5large gemma4_vit_167m
deepseek_vit_412m
""".split()
"""A small one of each of timm's families."""


def image_model(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """With the smallest of a few image sizes that it runs on."""
    import timm

    whole = timm.create_model(name, num_classes=1000).eval()
    fixed, full = whole.default_cfg.get("fixed_input_size"), whole.default_cfg["input_size"][-1]
    sizes = [64, 96, 112, 128]
    tries: list[tuple[dict[str, Any], int]] = [({"img_size": size}, size) if fixed else ({}, size) for size in sizes]
    for more, size in [*tries, ({}, 160), ({}, full)]:
        try:
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=1000, **more).eval() if more else whole
            x = torch.randn(2, 3, size, size)
            with torch.no_grad():
                model(x)
        except Exception:  # whatever a size does to a model, the next one is tried
            continue
        return lively(model), (x,), {}
    raise RuntimeError("it runs on none of the image sizes tried")


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Heads, gains and biases that begin at next to nothing are drawn at random: nothing behind them could be seen to go wrong."""
    for parameter in model.parameters():
        if float(parameter.abs().max()) < 1e-2:
            parameter.normal_(0, 0.1)
    return model


class Words(nn.Module):
    """An embedding, a layer over a sequence, a head."""

    def __init__(self, layer: nn.Module, n_out: int) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(100, 64), layer, nn.Linear(n_out, 10)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.layer(self.embed(ids))
        out: Tensor = self.head((found[0] if isinstance(found, tuple) else found).mean(1))
        return out


def hf(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        found: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
        return found

    return make


def whisper() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    found: nn.Module = WhisperEncoder(WhisperConfig(num_mel_bins=20, max_source_positions=24, **sizes))
    return found


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2, enable_nested_tensor=False)


IDS = torch.arange(24).reshape(2, 12) * 7 % 100
SMALL: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "bert": (
        hf(
            "BertForSequenceClassification", "BertConfig", vocab_size=100, hidden_size=64, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=128,
        ),
        IDS,
    ),
    "gpt2": (
        hf("GPT2LMHeadModel", "GPT2Config", vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=32, use_cache=False),
        IDS,
    ),
    "llama": (
        hf(
            "LlamaForCausalLM", "LlamaConfig", vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, use_cache=False,
        ),
        IDS,
    ),
    "vit": (
        hf(
            "ViTForImageClassification", "ViTConfig", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128, image_size=32, patch_size=8,
        ),
        torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    ),
    "whisper encoder": (whisper, torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(0))),
    "t5 encoder": (
        hf("T5EncoderModel", "T5Config", vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
        IDS,
    ),
    "torch.nn.TransformerEncoder": (lambda: Words(encoder(), 64), IDS),
    "LSTM": (lambda: Words(nn.LSTM(64, 64, 2, batch_first=True), 64), IDS),
    "GRU": (lambda: Words(nn.GRU(64, 64, 2, batch_first=True, bidirectional=True), 128), IDS),
}  # fmt: skip


def network(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    if name not in SMALL:
        return image_model(name)
    torch.manual_seed(0)
    make, x = SMALL[name]
    return make().eval(), (x,), {}


def n_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    still = duplicate(model).requires_grad_(False)  # the counter's hooks fail on some parameters that take gradients
    with FlopCounterMode(display=False) as counter:
        still(*args, **kwargs)
    return counter.get_total_flops() / 2


CHECKS = ("save", "load", "onnx", "train")


def one(name: str, checks: Sequence[str] = CHECKS) -> dict[str, Any]:
    """Everything about one architecture; what fails has its message in place of a figure."""
    model, args, kwargs = network(name)
    row: dict[str, Any] = {"name": name, "input": list(args[0].shape), "seconds": {}}
    start = time.perf_counter()
    graph = Channels(model, args, kwargs)
    row["seconds"]["analyse"] = time.perf_counter() - start
    row["groups"], row["trials"] = len(graph.groups), graph.trials
    before = n_parameters(model), macs_of(model, args, kwargs)
    row["before"] = {"parameters": before[0], "macs": before[1]}

    start = time.perf_counter()
    options, _ = everywhere(model, prune.Channels(keep=0.5, importance="l1"), Statistics(), graph)
    small = duplicate(model)
    edits = Removal(small, graph, None).remove_(options)
    row["seconds"]["prune"] = time.perf_counter() - start
    row["after"] = {"parameters": n_parameters(small), "macs": macs_of(small, args, kwargs)}
    gone = masks(options, graph)
    with torch.no_grad():
        row["oracle"] = difference(small(*args, **kwargs), zeroed(graph, gone))
    program = graph.cut_program(graph.going(gone))
    attach_(small, Record(edits=edits, example=(args, kwargs), program=program))
    finish(row, small, args, kwargs, checks)

    if not pruned(row):
        reasons: collections.Counter[str] = collections.Counter()
        for frozen in graph.frozen:
            reasons[frozen.reason] += sum(dict(model.named_parameters())[p].numel() for p in frozen.paths if p in tensors_of(model))
        row["reasons"] = [reason for reason, _ in reasons.most_common(3)]
        row["rewrite"] = rewritten(model, args, kwargs)
    return row


def tensors_of(model: nn.Module) -> set[str]:
    return {path for path, _ in model.named_parameters()}


def rewritten(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same with the code replaced by the cut program."""
    graph = Channels(model, args, kwargs, rewrite=True)
    options, _ = everywhere(model, prune.Channels(keep=0.5, importance="l1"), Statistics(), graph)
    gone = masks(options, graph)
    small = graph.rewritten(gone)
    row: dict[str, Any] = {"seconds": {}, "after": {"parameters": n_parameters(small), "macs": macs_of(small, args, kwargs)}}
    row["before"] = {"parameters": n_parameters(model), "macs": macs_of(model, args, kwargs)}
    with torch.no_grad():
        row["oracle"] = difference(small(*args, **kwargs), zeroed(graph, gone))
    finish(row, small, args, kwargs, CHECKS)
    return row


def finish(row: dict[str, Any], small: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], checks: Sequence[str]) -> None:
    """Save, load without the class, ONNX Runtime, a training step: those that are asked for."""
    with torch.no_grad():
        expected = small(*args, **kwargs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.pared"

        def save() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                pared.save(small, path, store="fastest")

        def load() -> float:
            with torch.no_grad():
                return difference(pared.load(path)(*args, **kwargs), expected)

        def onnx() -> float:
            import onnxruntime

            pared.export(path, Path(folder) / "small.onnx")
            session = onnxruntime.InferenceSession(str(Path(folder) / "small.onnx"), providers=["CPUExecutionProvider"])
            names = [given.name for given in session.get_inputs()]
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            found = session.run(None, dict(zip(names, (t.numpy() for t in tensors))))
            wanted = [t for t in tree_leaves(dict(expected) if hasattr(expected, "items") else expected) if isinstance(t, Tensor)]
            return difference([torch.as_tensor(f) for f in found], wanted)

        def train() -> float:
            trained = small.train()
            optimiser = torch.optim.SGD(trained.parameters(), 1e-3)
            outputs = trained(*args, **kwargs)
            leaves = tree_leaves(dict(outputs) if hasattr(outputs, "items") else outputs)
            loss = sum(t.float().square().mean() for t in leaves if isinstance(t, Tensor) and t.requires_grad)
            loss.backward()
            optimiser.step()
            return sum(p.grad is not None for p in trained.parameters()) / len(list(trained.parameters()))

        works = {"save": save, "load": load, "onnx": onnx, "train": train}
        for what, work in ((what, works[what]) for what in checks):
            start = time.perf_counter()
            try:
                row[what] = work() if what != "save" else (work(), path.stat().st_size)[1]
            except Exception as error:  # any failure is a result
                row[what] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            row["seconds"][what] = time.perf_counter() - start


def pruned(row: dict[str, Any]) -> bool:
    return "after" in row and all(row["after"][k] <= ENOUGH * row["before"][k] for k in ("parameters", "macs"))


def marks(row: dict[str, Any]) -> dict[str, bool]:
    """What went well."""
    return {
        "prune": pruned(row),
        "oracle": isinstance(row.get("oracle"), float) and row["oracle"] <= 1e-4,
        "save": isinstance(row.get("save"), int),
        "load": isinstance(row.get("load"), float) and row["load"] <= 1e-4,
        "train": isinstance(row.get("train"), float) and row["train"] > 0,
        "onnx": isinstance(row.get("onnx"), float) and row["onnx"] <= 1e-3,
    }


def run(name: str) -> dict[str, Any]:
    """One architecture in a process of its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        try:
            send.send(one(name))
        except Exception as error:  # any failure is a result
            send.send({"name": name, "error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"})

    process = context.Process(target=work)
    start = time.perf_counter()
    process.start()
    row = receive.recv() if receive.poll(LIMIT_SECONDS) else {"name": name, "error": f"not done after {LIMIT_SECONDS} s"}
    process.join(1)
    if process.is_alive():
        process.kill()
    row.setdefault("seconds", {})["all"] = time.perf_counter() - start
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    done = {row["name"]: marks(row) for row in rows}
    again = {row["name"]: marks(row.get("rewrite", {})) for row in rows}
    return {
        "n": len(rows),
        "whole": sum(all(m.values()) for m in done.values()),
        "whole_with_rewrite": sum(all(done[n].values()) or all(again[n].values()) for n in done),
        **{key: sum(m[key] for m in done.values()) for key in marks({})},
    }


def page(rows: list[dict[str, Any]]) -> str:
    """docs/coverage.md."""
    timm_rows = [row for row in rows if row["name"] not in SMALL]
    others = [row for row in rows if row["name"] in SMALL]
    lines = [
        "# Which networks can lose channels",
        "",
        "Written by `benchmarks/zoo.py --table` from `benchmarks/results/coverage.json`. Every network, with random weights, "
        "was cut to half of its channels (`prune.channels`, keep 0.5) without code of its own. The columns: parameters and MACs "
        "that are left; *equal*: the cut network equals the original with those channels silenced operator by operator (largest "
        "relative error); saved; loaded without its class; took a training step; agrees with ONNX Runtime to 1e-3. Below: why "
        "channels stayed where fewer than 30 % of parameters or MACs went.",
    ]
    for title, part in (("timm, one of every family", timm_rows), ("Language, speech, recurrent", others)):
        if not part:
            continue
        found = summary(part)
        lines += [
            "", f"## {title}", "",
            f"{found['whole']} of {found['n']} pass every column; {found['whole_with_rewrite']} with `rewrite=True` where the code "
            "does not follow.",
            "",
            "| network | parameters left | MACs left | equal | saved | loaded | trained | ONNX | rewrite |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [line(row) for row in part]
    reasons = [row for row in rows if not all(marks(row).values())]
    if reasons:
        lines += ["", "## Reasons", ""]
        lines += [f"* **{row['name']}**: {why(row)}" for row in reasons]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    found = marks(row)
    if "after" not in row:
        return f"| {row['name']} | | | no | no | no | no | no | |"
    shares = [f"{100 * row['after'][k] / row['before'][k]:.0f} %" for k in ("parameters", "macs")]
    again = marks(row["rewrite"]) if "rewrite" in row else {}
    cells = [f"{row['oracle']:.0e}" if found["oracle"] else f"**{row['oracle']:.0e}**"]
    cells += ["yes" if found[key] else "no" for key in ("save", "load", "train", "onnx")]
    cells.append(("yes" if all(again.values()) else "no") if again else "")
    return f"| {row['name']} | {' | '.join([*shares, *cells])} |"


def why(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    said = [f"{key}: {row[key]}" for key in ("save", "load", "onnx", "train") if isinstance(row.get(key), str)]
    if isinstance(row.get("onnx"), float) and row["onnx"] > 1e-3:
        said.append(f"ONNX Runtime differs by {row['onnx']:.1g}")
    return "; ".join([*row.get("reasons", []), *said]) or "the oracle differs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--table", action="store_true", help="only write docs/coverage.md")
    asked = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    if not asked.table:
        declare_missing_schemas()
        np.random.seed(0)
        for name in asked.names or [n for n in (*SMALL, *TIMM) if n not in rows]:
            rows[name] = run(name)
            print(name, marks(rows[name]), {k: round(v, 1) for k, v in rows[name]["seconds"].items()}, flush=True)
            order = {n: k for k, n in enumerate((*SMALL, *TIMM))}
            found = sorted(rows.values(), key=lambda row: order.get(row["name"], len(order)))
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(summary(list(rows.values())))
    PAGE.write_text(page(list(rows.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
