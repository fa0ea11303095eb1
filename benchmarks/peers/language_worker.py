"""Runs in the peer's own environment: quantizes a language model that benchmarks/language.py wrote, and saves it as floats.

    python language_worker.py auto-round IN_FOLDER OUT.safetensors '{"group": 32, "sym": false}'
    python language_worker.py gptqmodel  IN_FOLDER OUT.safetensors '{"group": 128, "sym": true, "desc_act": true}'

IN_FOLDER holds a model that transformers loads, its tokenizer, and windows.safetensors: the calibration tokens, a window a row.
OUT gets the linear layers of the blocks as float32 tensors, as the quantized model holds them. Prints one JSON line.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file, save_file

BITS = 4


def auto_round(folder, windows, setting):
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    size = setting.get("batch", 8)  # it wants the data in batches of just that many
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(size)]
    peer = AutoRound(
        model, AutoTokenizer.from_pretrained(folder), bits=BITS, group_size=setting["group"], sym=setting["sym"],
        dataset=batches, nsamples=len(windows), seqlen=windows.shape[1], batch_size=size, device_map=setting["device"],
        iters=setting.get("iters", 200), lr=setting.get("lr"), enable_torch_compile=setting.get("compile", True),
    )  # fmt: skip
    quantized, _ = peer.quantize()
    return dict(quantized.named_modules())


def gptqmodel(folder, windows, setting):
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it always asks for two, which a machine of two cores does not give
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=BITS, group_size=setting["group"], sym=setting["sym"], desc_act=setting["desc_act"], device=setting["device"]
    )
    peer = GPTQModel.load(folder, config, backend=BACKEND.TORCH)
    peer.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows], batch_size=1)
    with tempfile.TemporaryDirectory() as out:
        peer.save(out)
        peer = GPTQModel.load(out, device="cpu", backend=BACKEND.TORCH)
    layers = {}
    for path, module in peer.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            dense = torch.nn.Linear(1, 1, bias=False)
            dense.weight = torch.nn.Parameter(module.dequantize_weight().T.contiguous())
            layers[path] = dense
    return layers


def main():
    who, folder, out, setting = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    windows = load_file(os.path.join(folder, "windows.safetensors"))["windows"]
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        layers = {"auto-round": auto_round, "gptqmodel": gptqmodel}[who](folder, windows, setting)
    seconds = time.perf_counter() - start
    tensors = {
        f"{path}.weight": module.weight.detach().float().contiguous()
        for path, module in layers.items()
        if isinstance(module, torch.nn.Linear) and path.startswith("model.layers.")
    }
    save_file(tensors, out)
    print(json.dumps({"version": importlib.metadata.version(who), "seconds": seconds, "tensors": len(tensors)}))


if __name__ == "__main__":
    main()
