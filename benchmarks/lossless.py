"""Checkpoints bit for bit: bytes and seconds of `pared compress FILE --lossless` beside zipnn and zstd -19.

    python benchmarks/lossless.py --peer PYTHON FILE.safetensors [...]

PYTHON is the interpreter of an environment with zipnn and zstandard. Every file is coded as it is, and again with its
float32 tensors in bfloat16. Of pared and zipnn two things are timed, one thread each, turn by turn:

coder   from tensors in memory to bytes and back, nothing else. zipnn gets one tensor after the other, with its type named.
file    from the safetensors file to the small file and back. pared seals, reads back what it wrote, and compares digests;
        zipnn has no file of its own, so its bytes are written one after the other, and nothing is checked.

Seconds are processor time, so that other work on the machine matters less: the median of the turns, after one that
counts for nothing, in which numba loads its machine code. Beside them stand the seconds of the whole command from
the start of the process: with machine code kept from before, and with none, as after an installation; of zipnn only
those to start and to read the file. zstd gets the whole file, once. Figures go to benchmarks/results/lossless.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pared import artifact
from pared.artifact import streams
from pared.artifact.tensors import Kind, to_array

RESULTS = Path(__file__).resolve().parent / "results" / "lossless.json"
STEPS = ("coder_encode_s", "coder_decode_s", "file_encode_s", "file_decode_s")
PEER = """
import json, sys, time
import torch, zstandard
from safetensors.torch import load_file, save_file
from zipnn import ZipNN

torch.set_num_threads(1)
path, folder = sys.argv[1:]
tensors = load_file(path)

def coder():
    return ZipNN(input_format="torch", threads=1)

def encoded(tensors):
    parts = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            parts[name] = coder().compress(tensor)
        else:  # it has no way for these: they count as they are
            parts[name] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return parts

def decoded(parts, like):
    back = {}
    for name, (dtype, shape) in like.items():
        if dtype.is_floating_point and len(parts[name]):
            back[name] = coder().decompress(parts[name])
        else:
            held = bytearray(parts[name])
            back[name] = torch.frombuffer(held, dtype=dtype).reshape(shape) if held else torch.empty(shape, dtype=dtype)
    return back

def turn():
    like = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    given = {name: tensor.clone() for name, tensor in tensors.items()}  # it writes into what it is given
    clock = [time.process_time()]
    parts = encoded(given)
    clock.append(time.process_time())
    back = decoded(parts, like)
    clock.append(time.process_time())
    for name, tensor in tensors.items():
        if tensor.numel() and not torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)):
            raise SystemExit("zipnn did not give a tensor back")
    del back, given
    times = [clock[1] - clock[0], clock[2] - clock[1]]
    start = time.process_time()
    parts = encoded(load_file(path))
    with open(folder + "/peer.bin", "wb") as file:
        for part in parts.values():
            file.write(part)
    middle = time.process_time()
    sizes = {name: len(part) for name, part in parts.items()}
    again = time.process_time()
    raw, place, parts = memoryview(open(folder + "/peer.bin", "rb").read()), 0, {}
    for name, size in sizes.items():
        parts[name] = bytes(raw[place : place + size])
        place += size
    save_file(decoded(parts, like), folder + "/peer.safetensors")
    end = time.process_time()
    return {"bytes": sum(sizes.values()), "times": [*times, middle - start, end - again]}

for line in sys.stdin:
    if line.strip() == "zstd":
        raw = open(path, "rb").read()
        start = time.process_time()
        packed = zstandard.ZstdCompressor(level=19).compress(raw)
        middle = time.process_time()
        zstandard.ZstdDecompressor().decompress(packed)
        print(json.dumps({"bytes": len(packed), "encode_s": middle - start, "decode_s": time.process_time() - middle}), flush=True)
    else:
        print(json.dumps(turn()), flush=True)
"""
PEER_START = "import sys; from safetensors.torch import load_file; from zipnn import ZipNN; load_file(sys.argv[1])"


def turn(path: Path, folder: Path) -> dict[str, Any]:
    """One turn of ours, with the same steps as the peer's."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    kinds = [Kind.of(tensor) for tensor in tensors.values()]
    clock = [time.process_time()]
    coded = streams.Streams([(name, to_array(tensor)) for name, tensor in tensors.items()], "smallest")
    clock.append(time.process_time())
    payloads = [(coder, memoryview(payload)) for coder, payload in coded.payloads]
    arrays = streams.decode(payloads, kinds, list(tensors), coded.coders, coded.groups)
    clock.append(time.process_time())
    for array, tensor in zip(arrays, tensors.values(), strict=True):
        if array.tobytes() != to_array(tensor).tobytes():
            raise SystemExit("pared did not give a tensor back")
    del arrays, payloads, coded, tensors
    times = [clock[1] - clock[0], clock[2] - clock[1]]
    start = time.process_time()
    artifact.pack(path, folder / "a.pared")
    middle = time.process_time()
    artifact.unpack(folder / "a.pared", folder / "back.safetensors")
    times += [middle - start, time.process_time() - middle]
    return {"bytes": (folder / "a.pared").stat().st_size, "times": times}


def summed(turns: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes, and the median of each step, without the first turn."""
    columns = zip(*(found["times"] for found in turns[1:]), strict=True)
    return {"bytes": turns[0]["bytes"], **dict(zip(STEPS, map(statistics.median, columns), strict=True))}


def process_s(command: list[str], cache: Path | None = None, runs: int = 3) -> float:
    """The least processor time of a command, its start included; with a folder for numba's machine code, that of one run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"NUMBA_CACHE_DIR": str(cache)} if cache else {})}

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def once() -> float:
        start = spent()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return spent() - start

    return once() if cache else min(once() for _ in range(runs))


def row(path: Path, folder: Path, peer: str, turns: int) -> dict[str, Any]:
    with subprocess.Popen([peer, "-c", PEER, path, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise SystemExit("the peer must be spoken to")

        def ask(what: str, process: Any = process) -> Any:
            process.stdin.write(what + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        steps: list[Callable[[], Any]] = [lambda: turn(path, folder), lambda: ask("turn")]
        found = [[step() for step in steps] for _ in range(turns + 1)]
        zstd = ask("zstd")
        process.stdin.close()
    ours, theirs = (summed([pair[side] for pair in found]) for side in (0, 1))
    command = [sys.executable, "-m", "pared.cli", "compress", str(path), "--lossless", "--out", str(folder / "c.pared")]
    ours["command_s"] = process_s(command)
    with tempfile.TemporaryDirectory() as cache:
        ours["command_without_machine_code_s"] = process_s(command, Path(cache))
    theirs["start_s"] = process_s([peer, "-c", PEER_START, str(path)])
    return {"pared": ours, "zipnn": theirs, "zstd_19": zstd}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--peer", required=True, help="the interpreter of an environment with zipnn and zstandard")
    parser.add_argument("--turns", type=int, default=9)
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
                found = row(file, folder, arguments.peer, arguments.turns)
                rows.append({"name": path.stem, "kind": kind, "raw": file.stat().st_size, **found})
                ours, theirs = found["pared"], found["zipnn"]
                ratios = {key: round(theirs[key] / ours[key], 2) for key in STEPS}
                print(path.stem, kind, round(ours["bytes"] / theirs["bytes"], 4), ratios, json.dumps(found), flush=True)
    RESULTS.write_text(json.dumps({"turns": arguments.turns, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
