"""Write the files of tests/artifact/golden anew: once per version of the format, never over files of a released one.

    python tests/artifact/make_golden.py

Each file `vN-NAME.pared` comes with `vN-NAME.json`: the sha256 of every tensor as it decodes, and the outputs, rounded, for an
input that a fixed formula gives.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from pared import artifact, factor, prune, quantize
from pared.artifact.body import VERSION
from pared.artifact.tensors import to_array
from pared.place import apply
from pared.site import plain
from pared.technique import Chain, Technique

FOLDER = Path(__file__).parent / "golden"


class Small(nn.Module):
    """A convolution, batch norm, a recurrent layer, tied weights, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 8, 2, 2)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.norm(self.stem(x)).relu()).transpose(1, 2)
        return self.second(self.first(self.cell(x)[0][:, -1]).relu())


TECHNIQUES: dict[str, list[Technique]] = {
    "plain": [],
    "integer": [quantize.Integer(bits=5, group=8)],
    "deep": [Chain(prune.Magnitude(sparsity=0.6), quantize.Codebook(bits=3)), quantize.Integer(bits=8)],
    "low-rank": [Chain(factor.LowRank(rank=2), quantize.Integer(bits=6))],
}


def example() -> Tensor:
    """(2, 2, 6): multiples of 1/16, the same on every machine."""
    return ((torch.arange(24) * 7 % 33) - 16).reshape(2, 2, 6) / 16


def facts(model: nn.Module) -> dict[str, str]:
    """sha256 of every tensor, coded ones decoded, by path."""
    root = plain(model.root) if hasattr(model, "root") else plain(model)
    return {
        path: hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + to_array(value).tobytes()).hexdigest()
        for path, value in sorted(root.state_dict().items())
    }


def main() -> None:
    torch.manual_seed(0)
    for name, techniques in TECHNIQUES.items():
        model: nn.Module = Small().eval()
        model.norm.running_mean.normal_()
        if techniques:
            model = apply(model, None, techniques)
        path = FOLDER / f"v{VERSION}-{name}.pared"
        if path.exists() and "--force" not in sys.argv:
            raise SystemExit(f"{path} exists; files of a released version stay as they are (--force before the first release)")
        FOLDER.mkdir(exist_ok=True)
        artifact.save(model, path, example=example(), provenance={"name": name})
        with torch.no_grad():
            outputs = artifact.load(path)(example())
        told = {"tensors": facts(model), "outputs": [round(value, 3) for value in outputs.flatten().tolist()]}
        path.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
