"""Checkpoints bit for bit: bytes and seconds of `pared compress FILE --lossless` beside zipnn and zstd -19.

    python benchmarks/lossless.py --peer PYTHON FILE.safetensors [...]

PYTHON is the interpreter of an environment with zipnn and zstandard. Every file is coded as it is, and again with its
float32 tensors in bfloat16. zipnn gets each tensor's bytes with its type named, zstd the whole file. One thread each; the better
of two runs. Figures go to benchmarks/results/lossless.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pared import artifact

RESULTS = Path(__file__).resolve().parent / "results" / "lossless.json"
WORKER = """
import json, sys, time
import torch, zstandard
from safetensors.torch import load_file
from zipnn import ZipNN

tensors, seconds, size = load_file(sys.argv[1]), [1e9, 1e9], 0
for _ in range(2):
    spent, size = [0.0, 0.0], 0
    for tensor in tensors.values():
        if not tensor.is_floating_point():  # it has no way for these: they count as they are
            size += tensor.numel() * tensor.element_size()
            continue
        if not tensor.numel():
            continue
        coder, given = ZipNN(input_format="torch", threads=1), tensor.clone()  # it writes into what it is given
        start = time.perf_counter()
        coded = coder.compress(given)
        middle = time.perf_counter()
        back = coder.decompress(coded)
        end = time.perf_counter()
        if not torch.equal(back, tensor):
            raise SystemExit("zipnn did not give a tensor back")
        size += len(coded)
        spent[0] += middle - start
        spent[1] += end - middle
    seconds = [min(a, b) for a, b in zip(seconds, spent)]
raw = open(sys.argv[1], "rb").read()
start = time.perf_counter()
packed = zstandard.ZstdCompressor(level=19).compress(raw)
middle = time.perf_counter()
zstandard.ZstdDecompressor().decompress(packed)
end = time.perf_counter()
print(json.dumps({
    "zipnn": {"bytes": size, "encode_s": seconds[0], "decode_s": seconds[1]},
    "zstd_19": {"bytes": len(packed), "encode_s": middle - start, "decode_s": end - middle},
}))
"""


def ours(path: Path, folder: Path) -> dict[str, float]:
    target, back = folder / "a.pared", folder / "back.safetensors"
    seconds = [1e9, 1e9]
    for _ in range(2):
        start = time.perf_counter()
        artifact.pack(path, target)
        middle = time.perf_counter()
        artifact.unpack(target, back)
        end = time.perf_counter()
        seconds = [min(seconds[0], middle - start), min(seconds[1], end - middle)]
    return {"bytes": target.stat().st_size, "encode_s": seconds[0], "decode_s": seconds[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--peer", required=True, help="the interpreter of an environment with zipnn and zstandard")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for path in arguments.files:
            tensors = load_file(path)
            short = {k: v.bfloat16().contiguous() if v.dtype == torch.float32 else v for k, v in tensors.items()}
            save_file(short, folder / "bf16.safetensors")
            for kind, file in (("as it is", path), ("bfloat16", folder / "bf16.safetensors")):
                done = subprocess.run([arguments.peer, "-c", WORKER, file], capture_output=True, text=True, check=True)
                row = {"name": path.stem, "kind": kind, "raw": file.stat().st_size}
                row |= {"pared": ours(file, folder), **json.loads(done.stdout)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
