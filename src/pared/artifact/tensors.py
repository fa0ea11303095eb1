"""The tensors of a model as the file sees them: each once, coded ones with what their decoders hold."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils import parametrize

from pared.errors import ArtifactError, InputError
from pared.site import Decoded

Role = Literal["parameter", "buffer", "constant"]
"""A constant belongs to the program alone: a buffer that state_dict() leaves out, or a tensor that the model's code makes."""

DTYPES: dict[str, torch.dtype] = {
    "f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16,
    "f8e4m3fn": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
    "f8e4m3fnuz": torch.float8_e4m3fnuz, "f8e5m2fnuz": torch.float8_e5m2fnuz, "f8e8m0fnu": torch.float8_e8m0fnu,
    "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
    "u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32, "u64": torch.uint64, "b1": torch.bool,
    "c64": torch.complex64, "c128": torch.complex128,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_CARRIERS = {  # what numpy lacks travels as numbers of the same bits; complex numbers as pairs
    torch.bfloat16: np.uint16, torch.complex64: np.float32, torch.complex128: np.float64,
    **{dtype: np.uint8 for name, dtype in DTYPES.items() if name.startswith("f8")},
}  # fmt: skip
_NATIVE = {
    torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16, torch.bool: np.bool_,
    torch.int8: np.int8, torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64,
    torch.uint8: np.uint8, torch.uint16: np.uint16, torch.uint32: np.uint32, torch.uint64: np.uint64,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Kind:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def carrier(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape of the array that goes to the coder."""
        pair = (2,) if self.dtype.is_complex else ()
        return np.dtype(_CARRIERS.get(self.dtype) or _NATIVE[self.dtype]), (*self.shape, *pair)

    def __str__(self) -> str:
        return f"{NAMES.get(self.dtype, self.dtype)} {list(self.shape)}"


@dataclass(frozen=True)
class Entry:
    """One tensor of the network as its program sees it: coded ones decoded, shared ones once.

    `transposed`: it is coded, and is the weight of a transposed convolution, whose output channels are on the second axis.
    """

    path: str
    role: Role
    kind: Kind
    aliases: tuple[str, ...] = ()
    transposed: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)


@dataclass
class Place:
    """Where a model holds an entry: a tensor, or what decodes it."""

    path: str
    role: Role
    held: Tensor | Decoded
    aliases: list[str]

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)

    def stored(self) -> list[tuple[tuple[str, ...], Tensor]]:
        """What the file stores for it: all paths from the root of the model, and tensors, in the order of the file."""
        if isinstance(self.held, Tensor):
            return [(self.paths, self.held)]
        prefixes = [inside(path) for path in self.paths]
        return [(tuple(prefix + name for prefix in prefixes), part) for name, part in parts_of(self.held.decoder)]


def inside(path: str) -> str:
    """The prefix of the paths of what the decoder of a tensor holds."""
    owner, _, name = path.rpartition(".")
    return f"{owner}{'.' if owner else ''}parametrizations.{name}.0.decoder."


def places(root: nn.Module) -> list[Place]:
    """Every tensor of a model, coded ones as one; shared ones once, with all their paths, in traversal order."""
    found: dict[Any, Place] = {}
    for path, role, held in _walk(root, ""):
        key = id(held) if isinstance(held, Decoded) else _identity(held)
        place = found.setdefault(key, Place(path, role, held, []))
        if path != place.path:
            place.aliases.append(path)
            if role == "parameter" or place.role == "constant":
                place.role = role
    return list(found.values())


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Role, Tensor | Decoded]]:
    coded = coded_in(module)
    for name, (decoded, role) in coded.items():
        yield prefix + name, role, decoded
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, "parameter", parameter
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield prefix + name, "constant" if name in module._non_persistent_buffers_set else "buffer", buffer
    for name, child in module._modules.items():
        if child is None:
            continue
        if name == "parametrizations" and coded:
            for own, chain in child._modules.items():
                if own not in coded and chain is not None:
                    yield from _walk(chain, f"{prefix}{name}.{own}.")
        else:
            yield from _walk(child, f"{prefix}{name}.")


def coded_in(module: nn.Module) -> dict[str, tuple[Decoded, Role]]:
    """The module's own tensors that are held in coded form."""
    if not parametrize.is_parametrized(module):
        return {}
    found: dict[str, tuple[Decoded, Role]] = {}
    for name, chain in cast(nn.ModuleDict, module.parametrizations).items():
        first = chain._modules.get("0")
        if isinstance(first, Decoded):
            found[name] = first, "buffer" if "original" in chain._buffers else "parameter"
    return found


def parts_of(decoder: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a decoder by path, each once, sorted by path."""
    found: dict[int, tuple[str, Tensor]] = {}
    for place in places(decoder):
        if place.role != "constant":
            for paths, tensor in place.stored():
                found.setdefault(id(tensor), (paths[0], tensor))
    return sorted(found.values(), key=lambda part: part[0])


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that are the same memory read in the same way."""
    if isinstance(tensor, UninitializedTensorMixin) or tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def check_storable(path: str, tensor: Tensor) -> None:
    """Raise an InputError unless a file can hold the tensor."""
    fault = None
    if isinstance(tensor, UninitializedTensorMixin):
        fault = "has no shape yet; run the model once"
    elif tensor.layout != torch.strided:
        fault = f"has layout {tensor.layout}, and only dense tensors can be stored; use to_dense()"
    elif tensor.dtype not in NAMES:
        fault = f"has type {tensor.dtype}, which a file cannot hold; convert it to one of {', '.join(DTYPES)}"
    elif tensor.is_meta:
        fault = "is on the meta device and has no values; give it values first"
    if fault:
        raise InputError(f"{path} {fault}")


def to_array(tensor: Tensor) -> np.ndarray:
    """The tensor's bits as an array that the coders take."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor.resolve_conj()).contiguous()
    elif tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    elif tensor.dtype in _CARRIERS:
        tensor = tensor.view(torch.uint8)
    return tensor.resolve_neg().numpy()


def from_array(array: np.ndarray, kind: Kind) -> Tensor:
    """The inverse of `to_array`."""
    if not kind.numel:
        return torch.empty(kind.shape, dtype=kind.dtype)
    if not (array.flags.writeable and array.flags.c_contiguous):
        array = np.array(array, order="C")
    tensor = torch.from_numpy(array)
    if kind.dtype.is_complex:
        return torch.view_as_complex(tensor.reshape(*kind.shape, 2))
    return (tensor.view(kind.dtype) if kind.dtype in _CARRIERS else tensor).reshape(kind.shape)


def digest(arrays: Iterable[tuple[Kind, np.ndarray]]) -> bytes:
    """One digest of all tensors, 16 bytes: of the sha256 of each over its type, its shape and its bits."""
    over_all = hashlib.sha256()
    for kind, array in arrays:
        each = hashlib.sha256(f"{kind}:".encode())
        each.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data)
        over_all.update(each.digest())
    return over_all.digest()[:16]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in type, shape and every bit (torch.equal finds NaN unequal to itself)."""
    if Kind.of(a) != Kind.of(b):
        return False
    first, second = (to_array(tensor).reshape(-1) for tensor in (a, b))
    words = f"u{first.dtype.itemsize}"
    return first.size == 0 or bool((first.view(words) == second.view(words)).all())


def check_total(kinds: Iterable[Kind], max_bytes: int) -> None:
    """Raise an ArtifactError if tensors would take more bytes than allowed."""
    total = sum(kind.n_bytes for kind in kinds)
    if total > max_bytes:
        raise ArtifactError(
            f"the tensors of the file would take {total} bytes, {max_bytes} are allowed; "
            "if you trust the file, pass a larger max_bytes"
        )
