"""The format "compressed-tensors": a folder of transformers whose linear layers hold packed integers; vLLM loads it, too."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared.errors import ExportError, InputError, MissingExtra
from pared.lowered import Dequantized
from pared.runtimes.example import on_the_processor
from pared.runtimes.lower import lowered
from pared.runtimes.quiet import first_line
from pared.site import Decoded, plain

if TYPE_CHECKING:
    from pared.runtimes.onnx import Exported

TOLERANCE = 1e-3
"""Of the largest output, in float32; in shorter types eight of their steps."""


def export(model: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], opset: int | None = None) -> Exported:
    """Write config.json and model.safetensors into a folder, load it with transformers, and compare the outputs.

    Linear layers whose weights are integers of 4 or 8 bits, with one scale for each row or for groups in a row, are stored
    packed; all else, and a head that is also the embedding, as it is, decoded.

    Raises:
        InputError: the model is none of transformers, no layer holds integers, or one has zero points.
        ExportError: what transformers loads gives other outputs.
        MissingExtra: compressed-tensors or transformers is not installed.
    """
    from pared.runtimes.onnx import Exported, folder_of

    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"compressed-tensors are a folder, but {path} is a file; give another name")
    if opset is not None:
        raise InputError("opset is a matter of ONNX; leave it out for compressed-tensors")
    if not (hasattr(model, "config") and hasattr(model, "save_pretrained")):
        name = type(model).__name__
        raise InputError(f"compressed-tensors are for models of transformers, got {name}; load the file into its class")
    _transformers()
    model_plain = plain(model).eval().cpu()
    args, kwargs = on_the_processor((args, kwargs))
    times = Counter(id(weight) for _, weight in model_plain.named_parameters(remove_duplicate=False))
    held = {}
    for name, module in lowered(model).cpu().named_modules():
        integers = _integers(module)
        if integers is not None and times[id(model_plain.get_submodule(name).weight)] == 1:  # not tied to an embedding
            held[name] = integers
    if affine := [name for name, integers in held.items() if integers.zero is not None]:
        raise InputError(
            f"transformers reads no zero points of packed integers, but {affine[0]} has some; take scheme: symmetric for "
            'compressed-tensors, or to="onnx"'
        )
    if not held:
        raise InputError(
            "compressed-tensors need linear layers with integer weights, found none; use quantize.integer, within a smaller size "
            "if it left them as they are"
        )
    with tempfile.TemporaryDirectory(prefix=".pared-", dir=folder_of(path)) as scratch:
        draft = Path(scratch) / "draft"
        tensors = {k: v for k, v in model_plain.state_dict().items() if k.removesuffix(".weight") not in held}
        for name, integers in held.items():
            tensors |= {f"{name}.{key}": value for key, value in _packed(integers, _type_of(model_plain)).items()}
        model_plain.save_pretrained(draft, state_dict={k: v.contiguous() for k, v in tensors.items()})  # type: ignore[operator]
        config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
        ignored = [name for name, module in model_plain.named_modules() if isinstance(module, nn.Linear) and name not in held]
        config["quantization_config"] = _settings(held, ignored)
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        error, relative = _compared(type(model), draft, model_plain, args, kwargs)
        if not relative <= max(TOLERANCE, 8 * torch.finfo(_type_of(model_plain)).eps):
            raise ExportError(f"what transformers loads must give the model's outputs, but is off by {relative:.2g} of their size")
        written = {file.name: file.stat().st_size for file in draft.iterdir()}
        held_before = [file.name for file in path.glob("*.safetensors*")] if path.exists() else []
        if others := [name for name in held_before if name not in written]:
            raise InputError(f"{path} holds other weights, {others[0]}; give another folder")
        path.mkdir(exist_ok=True)
        for name in written:  # what else is there, such as a tokenizer, stays
            (draft / name).replace(path / name)
        size = sum(written.values())
    return Exported(path, size, error, relative, dynamic=True, rounds=False)


def _integers(module: nn.Module) -> Dequantized | None:
    if not (isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight")):
        return None
    held = cast(Decoded, module.parametrizations["weight"][0]).decoder  # type: ignore[index]
    by_rows = isinstance(held, Dequantized) and held.axis == 0 and held.group == 0
    return held if isinstance(held, Dequantized) and (by_rows or (held.axis == 1 and held.group > 0)) else None


def _packed(held: Dequantized, dtype: torch.dtype) -> dict[str, Tensor]:
    codes, scale = cast(Tensor, held.codes), cast(Tensor, held.scale)
    rows = len(codes)
    scale = scale.expand(rows) if scale.ndim == 0 else scale
    return {
        "weight_packed": packed(codes, held.bits),
        "weight_scale": scale.reshape(rows, -1).to(dtype),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def packed(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (rows, columns) as unsigned ones in words of 32 bits along the columns, the first in the lowest bits."""
    per_word = 32 // bits
    columns = codes.shape[1]
    unsigned = codes.to(torch.int64) + 2 ** (bits - 1)
    unsigned = nn.functional.pad(unsigned, (0, -columns % per_word)).view(len(codes), -1, per_word)
    words = (unsigned << (bits * torch.arange(per_word))).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _settings(held: dict[str, Dequantized], others: list[str]) -> dict[str, Any]:
    """What transformers reads of the layers: one group of them for each number of bits and size of groups."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for name, integers in held.items():
        kinds.setdefault((integers.bits, integers.group), []).append(name)
    groups = {
        f"group_{number}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if group else "channel",
                "group_size": group or None,
            },
        }
        for number, ((bits, group), names) in enumerate(kinds.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": others,
    }


def _type_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _compared(kind: type, folder: Path, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of the logits (of the first output) on the example, and the same over the largest logit."""
    try:
        loaded = kind.from_pretrained(folder, dtype=_type_of(model)).eval()  # type: ignore[attr-defined]
        with torch.no_grad():
            found, expected = loaded(*args, **kwargs)[0], model(*args, **kwargs)[0]
    except Exception as error:
        raise ExportError(f"transformers must load what was written: {first_line(error)}") from error
    worst = float((found - expected).abs().max())
    return worst, worst / max(float(expected.abs().max()), math.ulp(1.0))


def _transformers() -> Any:
    from pared.sources.torchvision_schemas import declare_missing_schemas

    declare_missing_schemas()
    try:
        import compressed_tensors  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra("compressed-tensors", "language") from error
    return transformers
