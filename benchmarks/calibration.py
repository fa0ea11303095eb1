"""Peak memory of calibrating a causal language model of 135 million parameters (random weights, the shape of a small Llama).

    python benchmarks/calibration.py

Each case runs in a process of its own; its peak is the resident set, weights and torch itself included. Figures go to
benchmarks/results/calibration.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES = ((2, 128), (4, 128), (4, 256))
"""(examples, tokens in each)."""


def measured(examples: int, tokens: int, threads: int) -> dict[str, Any]:
    import resource

    import torch

    import pared
    from pared.budget import gather
    from pared.sources.torchvision_schemas import declare_missing_schemas

    declare_missing_schemas()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=49152, tie_word_embeddings=True, use_cache=False, **shape, **heads)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (examples, tokens + 1))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    task = pared.Task(train=[batch], val=[batch])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    statistics = gather(model, task)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "examples": examples,
        "tokens": tokens,
        "tensors": len(list(statistics)),
        "bytes_before": before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=2, type=int, metavar=("EXAMPLES", "TOKENS"), help="one case, in this process")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measured(*arguments.case, arguments.threads)))
        return
    found = []
    for case in CASES:
        command = [sys.executable, __file__, "--case", *map(str, case), "--threads", str(arguments.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(found[-1]), flush=True)
    target = ROOT / "benchmarks" / "results" / "calibration.json"
    target.write_text(json.dumps({"threads": arguments.threads, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
