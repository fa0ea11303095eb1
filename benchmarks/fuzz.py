"""Load thousands of damaged and hostile versions of a .pared file: each must be refused, or give a valid model.

    python benchmarks/fuzz.py [FILE] [--mutations 10000] [--seed 0] [--out fuzz.json]

Half of the mutations are to the bytes of the file, as a bad disk makes them; they must be refused, or change nothing. The
other half are to what is inside, with all digests computed anew, as an attacker makes them, so that parsers and
decoders are reached. Without FILE, a small residual network is coded by several techniques.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pared import artifact, factor, prune, quantize, registry, store
from pared.artifact import container
from pared.artifact.body import DIGEST_BYTES, VERSION, Body, Reader, seal
from pared.artifact.manifest import KEYS
from pared.artifact.read import Contents
from pared.artifact.tensors import digest, same_bits
from pared.errors import ArtifactError, ParedError
from pared.place import apply
from pared.technique import Chain

MAX_BYTES = 1 << 25
SECONDS_PER_LOAD = 60


@dataclass
class Opened:
    """The inside of a file, to be changed and sealed again."""

    manifest: Any
    streams: list[tuple[int, bytes]]
    digest: bytes
    text: bytes | None = None

    @classmethod
    def of(cls, file: bytes) -> Opened:
        contents = Contents(file)
        reader = Reader(container.unwrap(memoryview(file)))
        return cls(json.loads(reader.manifest), [(coder, bytes(data)) for coder, data in contents.payloads], contents.digest)

    def sealed(self) -> bytes:
        """The file, with the digest of the tensors computed anew where they can be decoded at all."""
        file = self._wrapped()
        try:
            contents = Contents(file, MAX_BYTES)
            kinds = [kind for _, kind in contents.stored]
            self.digest = digest(zip(kinds, contents.arrays(), strict=True))
        except Exception:  # whatever is wrong with it is for `load` to say
            return file
        return self._wrapped()

    def _wrapped(self) -> bytes:
        coders = self.manifest.get("coders") if isinstance(self.manifest, dict) else None
        n_coders = max(1, len(coders)) if isinstance(coders, list) else 1
        text = self.text or json.dumps(self.manifest, separators=(",", ":"), ensure_ascii=False).encode()
        return bytes(container.wrap(Body(self.digest, text, self.streams).parts(n_coders)))


# -- mutations -------------------------------------------------------------------------------------------------------------


def damaged(file: bytes, rng: random.Random) -> bytes:
    """The file with a few bytes changed, lost, added or moved."""
    data = bytearray(file)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 50))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 200))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.choice((1, 1, 8, 100))]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 1, 8, 100)))
        elif kind == 4:
            start = rng.randrange(len(data))
            data[at : at + 16] = data[start : start + 16]
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def hostile(file: bytes, rng: random.Random) -> bytes:
    """The file with something changed inside and sealed again."""
    if rng.random() < 0.15:
        return _resealed(file, rng)
    opened = Opened.of(file)
    if rng.random() < 0.1:
        text = Reader(container.unwrap(memoryview(file))).manifest
        opened.text = damaged(text, rng) if rng.random() < 0.9 else text[:50] + b"[" * 100_000
        return opened.sealed()
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if rng.random() < 0.6:
            opened.manifest = _changed(opened.manifest, rng)
        else:
            _change_streams(opened, rng)
    return opened.sealed()


def _resealed(file: bytes, rng: random.Random) -> bytes:
    """Bytes changed anywhere behind the seal, and the seal made to fit."""
    body = bytes(container.unwrap(memoryview(file)))
    inside = damaged(body[1 + DIGEST_BYTES :], rng)
    return bytes(container.wrap([bytes([VERSION]) + seal(inside), inside]))


def _change_streams(opened: Opened, rng: random.Random) -> None:
    streams = opened.streams
    if not streams:
        return
    at = rng.randrange(len(streams))
    coder, payload = streams[at]
    kind = rng.randrange(6)
    if kind == 0:
        streams[at] = (rng.randrange(8), payload)
    elif kind == 1:
        streams[at] = streams[rng.randrange(len(streams))]
    elif kind == 2:
        del streams[at]
    elif kind == 3:
        streams[at] = (coder, rng.randbytes(len(payload)))
    elif payload:
        streams[at] = (coder, damaged(payload, rng))


_STRANGE: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 64, 65536, 2**31, 2**40, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, "", "x", ".", "/", "a.b/c", "__class__",
    "weight.weight", None, True, False, [], {}, [[]], [{}], {"version": 2}, ":f64", "!:i8", "\u2028", "=",
)  # fmt: skip


def _changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts changed."""
    value = copy.deepcopy(value)
    holders = [holder for holder in _holders(value) if holder]
    if not holders:
        return rng.choice(_STRANGE)
    holder = rng.choice(holders)
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    kind = rng.randrange(8)
    if kind == 0:
        holder[key] = rng.choice(_STRANGE)
    elif kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(rng.choice(holder)))
    elif kind == 3 and isinstance(holder, list):
        other = rng.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == 4 and isinstance(holder, dict):
        holder[rng.choice([*KEYS, "bits", "group", "rank", "version", "zero", "table", "scales", "x"])] = rng.choice(_STRANGE)
    elif kind == 5:
        for _ in range(rng.choice((3, 30, 100))):
            holder[key] = [holder[key]]
    elif isinstance(holder[key], bool):
        holder[key] = not holder[key]
    elif isinstance(holder[key], int):
        holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, holder[key] * 2, holder[key] * 1000, -holder[key]))
    elif isinstance(holder[key], str):
        texts = [text for each in _holders(value) for text in _members(each) if isinstance(text, str)]
        holder[key] = rng.choice([*texts, *store.names(), *registry.names()])
    else:
        holder[key] = copy.deepcopy(rng.choice(_members(rng.choice(holders))))
    return value


def _holders(value: Any) -> list[Any]:
    if not isinstance(value, list | dict):
        return []
    return [value] + [holder for member in _members(value) for holder in _holders(member)]


def _members(holder: Any) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else list(holder)


# -- judging ---------------------------------------------------------------------------------------------------------------


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {path: value for path, value in model.state_dict().items() if value.numel()}


def judge(file: bytes, path: Path, same_as: dict[str, Tensor], make: Callable[[], nn.Module] | None = None) -> str:
    """What became of a file: "refused", "same" or "other". Exceptions other than those a file may cause go through.

    Args:
        file: its bytes.
        path: where to put it.
        same_as: the tensors of the file before it was changed.
        make: load into such a model, rather than without one.
    """
    path.write_bytes(file)
    try:
        loaded = artifact.load(path, None if make is None else make(), max_bytes=MAX_BYTES)
    except ArtifactError:
        return "refused"
    except ParedError:
        if make is None:
            raise
        return "refused"
    found = tensors_of(loaded)
    agree = set(found) == set(same_as) and all(same_bits(found[key], same_as[key]) for key in found)
    return "same" if agree else "other"


def peak_bytes() -> int:
    """The most memory that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Residual(nn.Module):
    """A small residual network with batch norm, as the file to be damaged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Linear(8, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.body(x).relu()
        return self.head(self.wide(x.mean((2, 3))).relu())


def real_file(path: Path) -> None:
    """A file in which every technique and most coders occur."""
    torch.manual_seed(0)
    model = apply(Residual().eval(), None, Chain(factor.LowRank(rank=6), quantize.Integer(bits=5)))
    model = apply(model, None, Chain(prune.Magnitude(sparsity=0.5), quantize.Codebook(bits=3)))
    artifact.save(model, path, example=torch.randn(2, 1, 8, 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        original = options.file or Path(folder) / "original.pared"
        if options.file is None:
            real_file(original)
        figures = run(original, Path(folder) / "mutated.pared", options.mutations, options.seed)
    print(json.dumps(figures, indent=1))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    sys.exit(bool(figures["failures"]))


def run(
    original: Path, scratch: Path, n_mutations: int, seed: int, kinds: tuple[str, ...] = ("damaged", "hostile")
) -> dict[str, Any]:
    """Counts of outcomes, the slowest load, the growth of memory, and every failure with the seed that repeats it."""
    file, expected = original.read_bytes(), tensors_of(artifact.load(original))
    found: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    failures: list[str] = []
    slowest, before = 0.0, peak_bytes()
    for number in range(n_mutations):
        kind = kinds[number % len(kinds)]
        rng = random.Random(f"{seed}-{number}")
        data = hostile(file, rng) if kind == "hostile" else damaged(file, rng)
        faulthandler.dump_traceback_later(SECONDS_PER_LOAD, exit=True)
        start = time.perf_counter()
        try:
            outcome = judge(data, scratch, expected)
        except Exception as error:
            outcome = "failed"
            failures.append(f"{kind} {seed}-{number}: {type(error).__name__}: {error}"[:300])
        slowest = max(slowest, time.perf_counter() - start)
        faulthandler.cancel_dump_traceback_later()
        found[kind][outcome] += 1
        if kind == "damaged" and outcome == "other":
            failures.append(f"{kind} {seed}-{number}: other tensors were loaded")
    return {
        "file_bytes": len(file),
        "mutations": n_mutations,
        "outcomes": {kind: dict(counts) for kind, counts in found.items()},
        "slowest_load_s": round(slowest, 3),
        "memory_growth_mb": round((peak_bytes() - before) / 1e6, 1),
        "failures": failures,
    }


if __name__ == "__main__":
    main()
