"""Integer quantization of activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from pared.errors import InputError
from pared.lowered import through_integers
from pared.ports import attach_
from pared.site import Site
from pared.statistics import Flow, Histogram, Operation, Port, Statistics
from pared.technique import Cost, Network, Structure, Technique

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_FUSED = ("relu", "relu6", "hardtanh", "clamp", "clamp_min")
"""What kernels compute along with a convolution or an addition, before they round."""
_JOINING = {"add": 2, "cat": 2, "max_pool2d": 1, "avg_pool2d": 1, "adaptive_avg_pool2d": 1, "mean": 1}
"""Operators before which values stay integers where what they give is one: all but means work on integers themselves. How many
values they read at least."""
_LARGEST = ("max_pool1d", "max_pool2d", "max_pool3d")
_PADDING = ("pad", "constant_pad_nd")
_VIEWS = ("flatten", "view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", *_PADDING)
N_CANDIDATES, SMALLEST = 48, 0.05
"""How many ends of a range are tried, and the smallest, as a share of the largest value seen."""
TINY = 1e-12
"""The smallest magnitude that a token is measured by."""


class Place(BaseModel):
    """A port where values are quantized."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    module: str
    side: Literal["input", "output"]

    @property
    def port(self) -> Port:
        return Port(self.module, self.side)


class ActivationsStructure(Structure):
    places: tuple[Place, ...] = ()


@dataclass
class Rounding:
    """What stands at a port: it rounds values with the scale and the zero point that the module holds; `per_token` in units of
    the largest magnitude along the last axis."""

    side: str
    bits: int
    per_token: bool = False

    def __call__(self, module: nn.Module, value: Tensor) -> Tensor:
        scale, zero_point = (getattr(module, name) for name in names(self.side))
        stretch = module._parameters.get(_stretch(self.side))
        if stretch is not None:
            scale = scale * stretch.exp()
        if not self.per_token:
            return through_integers(value, scale, zero_point, self.bits)
        reach = value.detach().abs().amax(-1, keepdim=True).float().clamp_min(TINY)
        return (through_integers(value / reach, scale, zero_point, self.bits) * reach).to(value.dtype)


class Activations(Technique):
    """Round activations to k-bit integers wherever that lets a runtime compute with integers.

    x ~ s * (q - z),   q = clamp(round(x / s) + z, 0, 2**k - 1)

    with one scale s and one zero point z for each quantized value, fixed from calibration data. Quantized are the
    inputs of convolutions and linear layers, what convolutions give (after their activation function), and what
    additions, concatenations and pooling between them read and give, so that no value goes back and forth. Codes are
    unsigned, which integer kernels on CPUs prefer. Weights are another technique's affair (`quantize.integer`).

    With `range: per_token` (dynamic quantization) every vector of features that a linear layer reads is rounded in units of its
    own largest magnitude, found as the network runs: s = max |x| / (2**(k-1) - 1), z = 2**(k-1). No range is calibrated, and
    outliers of one token cost the others nothing. Convolutions stay in floating point.

    With `places: products` only what convolutions and linear layers read is rounded: the least that lets them compute with
    integers, for few bits. With `steps: learned` values are rounded while the last step that trains is trained, and scales
    are trained along, from where calibration data put them. For y = s (q - z) of one value x,

    dy/dx = 1 where nothing is clipped, else 0;   dy/ds = q - z - x / s where nothing is clipped, else q - z;   times
    1 / sqrt(n (2**k - 1)) for the n features of an example. Post-training (no step trains, `pared.apply`) they stay, and
    biases give back what rounding took from the mean of each layer's output.

    Acts on   the whole network: places are found in its graph; values that pass through no module's border stay.
    Stores    a scale and a zero point for each place; MACs unchanged.
    Reads     the flow of values, and, unless the range is each token's own, their distribution at every place.
    Refuses   networks without convolutions and linear layers.
    Paper     Jacob et al. 2018, arXiv:1712.05877; ranges: Wu et al. 2020, arXiv:2004.09602; learned steps: Esser et al. 2020,
              arXiv:1902.08153; biases: Nagel et al. 2019, arXiv:1906.04721.
    Differs   learned steps start where calibration puts them and are trained in the logarithm; zero points stay.
    """

    acts_on: ClassVar = Network()
    reads: ClassVar = (Flow, Histogram)
    paper: ClassVar = "arXiv:2004.09602"
    structure_type: ClassVar = ActivationsStructure
    corrects: ClassVar = True
    ladder: ClassVar = ({"bits": 8}, {"bits": 6}, {"bits": 4})

    bits: int = Field(default=8, ge=2, le=8, description="bits per activation")
    range: Literal["min_max", "percentile", "mse", "entropy", "per_token"] = Field(
        default="mse",
        description="how the range is chosen: all values, most of them, least squared error, least divergence; per_token: each "
        "token's own as it runs, of what linear layers read",
    )
    percentile: float = Field(default=99.99, gt=90, le=100, description="share of the values kept by range: percentile")
    scheme: Literal["affine", "symmetric"] = Field(
        default="affine", description="zero point anywhere in the range, or in its middle"
    )
    keep: str = Field(
        default="", pattern=r"^[\w.,]*$", description="modules left in floating point: their paths, with commas between"
    )
    places: Literal["all", "products"] = Field(
        default="all", description="all that a runtime can have as integers, or only what convolutions and linear layers read"
    )
    steps: Literal["fitted", "learned"] = Field(
        default="fitted", description="scales from calibration data alone, or trained along with the weights"
    )

    powers_of_two: bool = Field(default=False, description="scales that are powers of two: fixed point")

    @model_validator(mode="after")
    def _consistent(self) -> Activations:
        if self.powers_of_two and self.steps == "learned":
            raise ValueError("steps: learned gives any scales; leave it or powers_of_two out")
        if self.powers_of_two and self.range == "per_token":
            raise ValueError("range: per_token gives any scales; leave it or powers_of_two out")
        if self.range == "per_token" and self.places != "all":
            raise ValueError(f"range: per_token is for what linear layers read; leave places: {self.places} out")
        if self.range != "percentile" and self.percentile != type(self).model_fields["percentile"].default:
            raise ValueError(f"percentile: {self.percentile:g} is of range: percentile, got range: {self.range}; set that range")
        return self

    @property
    def in_training(self) -> bool:
        return self.steps == "learned"

    def wants(self, statistic: type) -> bool:
        return super().wants(statistic) and not (statistic is Histogram and self.range == "per_token")

    def refuse(self, site: Site) -> str | None:
        layers = (nn.Linear,) if self.range == "per_token" else (nn.modules.conv._ConvNd, nn.Linear)
        if not any(isinstance(module, layers) for module in site.module.modules()):
            return f"there is no {'' if self.range == 'per_token' else 'convolution and no '}linear layer in it"
        return None

    def decide(self, site: Site, statistics: Statistics) -> ActivationsStructure:
        if statistics.flow is None:
            return ActivationsStructure()
        placement = Placement(statistics.flow, tuple(path for path in self.keep.split(",") if path), self.places == "products")
        ports = placement.readers() if self.range == "per_token" else placement.ports()
        return ActivationsStructure(places=tuple(Place(module=port.module, side=port.side) for port in ports))

    def build(self, site: Site, structure: Structure) -> nn.Module:
        root = site.module
        for place in cast(ActivationsStructure, structure).places:
            module, (scale, zero_point) = root.get_submodule(place.module), names(place.side)
            if hasattr(module, scale):
                raise InputError(f"the {place.port} is quantized already; quantize activations once")
            device = next((tensor.device for tensor in root.parameters()), None)
            module.register_buffer(scale, torch.ones((), device=device))
            module.register_buffer(zero_point, torch.zeros((), dtype=torch.uint8, device=device))
            attach_(root, place.port, Rounding(place.side, self.bits, self.range == "per_token"))
        return root

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        own = list(self._own(site, parts, statistics))
        if self.range == "per_token":
            for module, port in own:
                for name, value in zip(names(port.side), self._between(-1.0, 1.0), strict=True):
                    getattr(module, name).fill_(value)
            return
        shared = _shared(statistics.flow, [port for _, port in own])
        for module, port in own:
            seen = statistics.values.get(shared[port])
            if seen is None:
                raise InputError(f"calibration must reach the {port}, but no value passed there; give other data")
            for name, value in zip(names(port.side), self.grid(seen), strict=True):
                getattr(module, name).fill_(value)

    def _own(self, site: Site, parts: nn.Module, statistics: Statistics) -> Iterator[tuple[nn.Module, Port]]:
        """The ports that it rounds at; others may be another one's, with other settings."""
        own = {place.port for place in self.decide(site, statistics).places}
        return ((module, port) for module, port in _quantized(parts) if port in own)

    def relax(self, site: Site, structure: Structure, statistics: Statistics) -> nn.Module | None:
        parts = self.build(site, structure)
        self.fit(site, parts, statistics)
        if self.steps == "learned":
            for module, port in self._own(site, parts, statistics):
                scale = cast(Tensor, getattr(module, names(port.side)[0]))
                module.register_parameter(_stretch(port.side), nn.Parameter(torch.zeros_like(scale)))
        return parts

    def settle(self, parts: nn.Module) -> None:
        for module, port in _quantized(parts):
            stretch = module._parameters.pop(_stretch(port.side), None)
            if stretch is not None:
                cast(Tensor, getattr(module, names(port.side)[0])).mul_(stretch.detach().exp())

    def grid(self, seen: Histogram) -> tuple[float, int]:
        """Scale and zero point for values of this distribution; zero is a value of the grid."""
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        if self.range == "min_max" or low == high:
            return self._between(low, high)
        values, weights = seen.centres(), seen.counts.double()
        if self.range == "percentile":
            share = (100 - self.percentile) / 200
            total = weights.cumsum(0) / weights.sum()
            low = max(low, float(values[int((total < share).sum())])) if low < 0 else low
            high = min(high, float(values[min(int((total < 1 - share).sum()), len(values) - 1)])) if high > 0 else high
            return self._between(min(low, 0.0), max(high, 0.0))
        best: tuple[float, tuple[float, int]] | None = None
        for upper in _shrunk(high):
            for lower in _shrunk(low):
                scale, zero_point = self._between(lower, upper)
                codes = ((values / scale).round() + zero_point).clamp(0, 2**self.bits - 1)
                error = self._error(values, weights, codes, scale, zero_point)
                if best is None or error < best[0]:
                    best = error, (scale, zero_point)
        if best is None:
            raise ValueError("there are no ranges to choose from")
        return best[1]

    def _between(self, low: float, high: float) -> tuple[float, int]:
        """The grid from low to high; one that does not reach above `high`, so that a clip there needs no step of its own."""
        top = 2**self.bits - 1
        if self.scheme == "symmetric" or self.range == "per_token":
            reach = max(-low, high) or 1.0
            return _below(self._wide(reach / (2 ** (self.bits - 1) - 1))), 2 ** (self.bits - 1)
        scale = self._wide((high - low) / top or 1.0)
        return _below(scale), min(max(round(-low / scale), 0), top)

    def _wide(self, scale: float) -> float:
        """The scale, or the next power of two above it, so that the grid reaches as far."""
        return 2.0 ** math.ceil(math.log2(scale)) if self.powers_of_two else scale

    def _error(self, values: Tensor, weights: Tensor, codes: Tensor, scale: float, zero_point: int) -> float:
        if self.range == "mse":
            return float((weights * ((codes - zero_point) * scale - values) ** 2).sum())
        # divergence of the rounded distribution, spread evenly over the values that share a code, from the true one
        mass = torch.zeros(2**self.bits, dtype=torch.float64).index_add_(0, codes.long(), weights)
        present = torch.zeros_like(mass).index_add_(0, codes.long(), (weights > 0).double())
        spread = (mass / present.clamp_min(1))[codes.long()]
        clipped = (codes == 0) | (codes == 2**self.bits - 1)
        seen = (weights > 0) & ~(clipped & (((codes - zero_point) * scale - values).abs() > scale / 2))
        lost = float(weights[(weights > 0) & ~seen].sum()) / float(weights.sum())
        p, q = weights[seen] / weights.sum(), spread[seen] / weights.sum()
        return float((p * (p / q).log()).sum()) + 20 * lost

    def leaving(self, paths: Sequence[str]) -> Activations:
        return self.model_copy(update={"keep": ",".join(dict.fromkeys([*filter(None, self.keep.split(",")), *paths]))})

    def cost(self, site: Site, parts: nn.Module | None = None) -> Cost:
        return Cost()

    def damage(self, site: Site, parts: nn.Module, statistics: Statistics) -> float | None:
        return None


def _quantized(root: nn.Module) -> Iterator[tuple[nn.Module, Port]]:
    """The ports at which values are rounded, each with its module."""
    for path, module in root.named_modules():
        if names("input")[0] in module._buffers:
            yield module, Port(path, "input")
        if names("output")[0] in module._buffers:
            yield module, Port(path, "output")


def _shared(flow: Flow | None, own: Sequence[Port]) -> dict[Port, Port]:
    """For every port the one whose values say how it rounds: the largest of integers is an integer where both sides of a pool
    have one grid. That of what comes out last, as long as nothing else reads what goes in; else of what goes in."""
    found = {port: port for port in own}
    for operation in reversed(flow.operations) if flow is not None else ():
        if flow is None or operation.kind not in _LARGEST:
            continue
        sides = (operation.inputs[0], operation.output)
        before, after = ([port for port, _ in flow.ports.get(value, ()) if port in found] for value in sides)
        if before and after:
            if flow.only_consumer(operation.inputs[0]):
                found.update(dict.fromkeys(before, found[after[0]]))
            else:
                old, new = found[after[0]], before[0]
                found = {port: new if found[port] == old else found[port] for port in found}
    return found


def names(side: str) -> tuple[str, str]:
    """What a module calls the scale and the zero point of what it takes or gives."""
    return f"{side}_scale", f"{side}_zero_point"


def _stretch(side: str) -> str:
    """What a module calls the parameter that is trained: scale * exp(stretch)."""
    return f"{side}_stretch"


def _shrunk(end: float) -> list[float]:
    """Ends of the range that are tried: all of it, and less, by equal factors."""
    if end == 0:
        return [0.0]
    n = N_CANDIDATES if end > 0 else N_CANDIDATES // 2
    return [end * SMALLEST ** (number / (n - 1)) for number in range(n)]


def _below(scale: float) -> float:
    """The float32 that is no larger."""
    rounded = torch.tensor(scale, dtype=torch.float64).float()
    if float(rounded) > scale:
        rounded = torch.nextafter(rounded, torch.zeros(()))
    return float(rounded)


class Placement:
    """Which values of a flow are quantized, and at which ports."""

    def __init__(self, flow: Flow, keep: tuple[str, ...] = (), only_read: bool = False) -> None:
        self.flow, self.keep, self.only_read = flow, keep, only_read

    def ports(self) -> list[Port]:
        """In the order in which values pass them."""
        wanted: dict[int, None] = {}
        for operation in self.flow.operations:
            if not self._computes(operation):
                continue
            # a linear layer may give floating-point numbers, a convolution in integers gives integers
            gives = operation.kind in _CONVOLUTIONS and not self.only_read
            touched = [self._source(operation), *([self._end(operation)] if gives else [])]
            if all(self._cover(value) is not None for value in touched):
                wanted.update(dict.fromkeys(touched))
        grown = not self.only_read
        while grown:
            before = len(wanted)
            for operation in reversed(self.flow.operations):
                if operation.states or len(operation.inputs) < _JOINING.get(operation.kind, 99):
                    continue
                if operation.kind == "mean" and not self._is_from_kernel(operation.inputs[0]):
                    continue
                if self._leads_to(self._end(operation), wanted) and all(map(self._cover, operation.inputs)):
                    wanted.update(dict.fromkeys(operation.inputs))
            grown = len(wanted) > before
        found: dict[Port, None] = {}
        for value in sorted(wanted):
            found.update(dict.fromkeys(self._cover(value) or ()))
        return list(found)

    def readers(self) -> list[Port]:
        """Where linear layers read, and nothing else does: as few ports as can be, in the order in which values pass them."""
        reading: dict[int, set[int]] = {}
        for number, operation in enumerate(self.flow.operations):
            if operation.kind == "linear" and self._computes(operation):
                reading.setdefault(operation.inputs[0], set()).add(number)
        found: dict[Port, None] = {}
        for value, readers in reading.items():
            for port, seen_by in sorted(self.flow.ports.get(value, ()), key=lambda pair: -len(pair[1])):
                is_seen = port.side == "output" and value in self.flow.results
                if seen_by and seen_by <= readers and not is_seen:
                    found[port] = None
                    readers -= seen_by
        return list(found)

    def _computes(self, operation: Operation) -> bool:
        """Whether it multiplies a value by a weight that the network holds."""
        kept = any(f"{operation.module}.".startswith(f"{path}.") for path in self.keep)
        products = operation.kind in (*_CONVOLUTIONS, "linear") and 1 in operation.states and len(operation.inputs) == 1
        return products and not kept

    def _source(self, operation: Operation) -> int:
        """The value that the operation reads, before it is padded with zeros, which every grid holds."""
        value = operation.inputs[0]
        while (number := self.flow.producers.get(value)) is not None:
            before = self.flow.operations[number]
            by_constant = before.kind == "constant_pad_nd" or before.constants.get(2, "constant") == "constant"
            fill = before.constants.get(3 if before.kind == "pad" else 2)
            if before.kind not in _PADDING or not by_constant or fill or not self.flow.only_consumer(value):
                break
            value = before.inputs[0]
        return value

    def _end(self, operation: Operation) -> int:
        """The value after the operation and what is fused with it."""
        value = operation.output
        while (after := self.flow.only_consumer(value)) is not None and after.kind in (*_FUSED, "batch_norm"):
            value = after.output
        return value

    def _is_from_kernel(self, value: int) -> bool:
        """Whether an operator that computes with integers gives the value, perhaps through what is fused with it."""
        number = self.flow.producers.get(value)
        if number is None:
            return False
        made = self.flow.operations[number]
        return self._is_from_kernel(made.inputs[0]) if made.kind in _FUSED else made.kind in (*_CONVOLUTIONS, *_JOINING)

    def _leads_to(self, value: int, wanted: dict[int, None]) -> bool:
        """Whether the value, but for a change of its shape, is one that is quantized."""
        after = self.flow.only_consumer(value)
        return value in wanted or (after is not None and after.kind in _VIEWS and self._leads_to(after.output, wanted))

    def _cover(self, value: int) -> tuple[Port, ...] | None:
        """The fewest ports through which everybody who reads the value sees it quantized; None if there are none."""
        missing = set(self.flow.consumers.get(value, ()))
        at = sorted(self.flow.ports.get(value, ()), key=lambda pair: (pair[0].side == "input", pair[0].module.count(".")))
        if value in self.flow.results:
            at = [pair for pair in at if pair[0].side == "output"]
        chosen: list[Port] = []
        while missing or not chosen:
            port, seen_by = max(at, key=lambda pair: len(pair[1] & missing), default=(None, frozenset()))
            if port is None or (missing and not seen_by & missing):
                return None
            chosen.append(port)
            missing -= seen_by
        return tuple(chosen)

