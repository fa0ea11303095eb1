"""The one noun: a technique makes one part of a network cheaper. Chains, costs, options and edits of techniques."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import SerializeAsAny, ValidationError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared import store
from pared.cut import Cut, CutStructure
from pared.errors import RecipeError
from pared.settings import Settings, Structure, explain
from pared.site import Decoded, Site, install_, module_sites, network_site, tensor_sites
from pared.statistics import Statistics

if TYPE_CHECKING:
    from pared.task import Batch

ENTRY_BITS = 8 * 28
"""What naming one more tensor costs in the file, on average over the files of the benchmark: manifest entry and digest."""


@dataclass(frozen=True)
class Tensors:
    """Acts on floating-point parameters and persistent buffers with at least so many axes and elements."""

    min_axes: int = 1
    min_elements: int = 1


@dataclass(frozen=True)
class Modules:
    """Acts on instances of these classes."""

    classes: tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Groups:
    """Acts on groups of channels that lie in many tensors; its parts are a `pared.cut.Cut`."""


@dataclass(frozen=True)
class Network:
    """Acts on the network as a whole, wherever it is named: what it does follows from how values flow, and it is no
    choice of the allocator, since it saves no bits by itself."""



@dataclass(frozen=True)
class Cost:
    """What a part of the network costs. Costs add up.

    Args:
        stored_bits: bits in the file, tables and names included.
        macs: multiply-adds per example.
        latency_ms: of one call, where a table of measured latencies is at hand.
    """

    stored_bits: float = 0.0
    macs: float = 0.0
    latency_ms: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.stored_bits + other.stored_bits, self.macs + other.macs, self.latency_ms + other.latency_ms
        )

    def __radd__(self, other: int | Cost) -> Cost:
        return self if isinstance(other, int) else other + self


Kind = Literal["tensor", "module", "channels", "network"]
"""What a technique changes."""


class Technique(Settings):
    """Replaces tensors by codes or modules by cheaper modules; or shapes training; or prepares a model by an exact rewrite."""

    acts_on: ClassVar[Tensors | Modules | Groups | Network | None] = None
    reads: ClassVar[tuple[type, ...]] = ()
    corrects: ClassVar[bool] = False
    """Whether layers are fitted anew to what they gave before it, in order: weights by least squares after a cut or before
    they are coded, biases by their means after it changed the network."""
    paper: ClassVar[str] = ""
    structure_type: ClassVar[type[Structure]] = Structure
    keeps_size: ClassVar[bool] = False
    """Whether what it leaves comes out of training at the size that was planned."""
    ladder: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Settings from gentle to harsh, with which the conformance suite runs."""
    exact: ClassVar[bool] = False
    """Whether it only rewrites: the network computes the same before and after. Such techniques come first in a recipe."""

    @property
    def rewrites(self) -> bool:
        """Of channels: whether the network may run as its graph from then on, so that sizes in its code are no obstacle."""
        return False

    @property
    def name(self) -> str:
        """The name in recipes: family and file, such as `quantize.integer`."""
        return ".".join(type(self).__module__.split(".")[-2:])

    @property
    def kind(self) -> Kind | None:
        """What it changes; None if it changes nothing."""
        kinds: dict[type, Kind] = {Tensors: "tensor", Modules: "module", Groups: "channels", Network: "network"}
        return kinds.get(type(self.acts_on))

    def __str__(self) -> str:
        """Name and settings; of those at their default only the first, which is the one that matters most."""
        changed, first = self.model_dump(exclude_defaults=True), next(iter(type(self).model_fields), None)
        fields = {k: v for k, v in self.model_dump().items() if k in changed or (k == first and v is not None)}
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in fields.items())})"

    @property
    def learns(self) -> bool:
        """Whether it acts on channels, and training finds out which of them go."""
        return self.kind == "channels" and type(self).relax is not Technique.relax

    def wants(self, statistic: type) -> bool:
        """Whether it reads such statistics with the settings that it has."""
        return statistic in self.reads

    # -- it replaces ---------------------------------------------------------------------------------------------------

    def sites(self, model: nn.Module, graph: Any = None) -> Iterator[Site]:
        """Where it may act; sites of one technique never overlap."""
        if isinstance(self.acts_on, Tensors):
            for site in tensor_sites(model):
                value = site.tensor
                if value.ndim >= self.acts_on.min_axes and value.numel() >= self.acts_on.min_elements:
                    yield site
        elif isinstance(self.acts_on, Modules):
            yield from module_sites(model, self.acts_on.classes)
        elif isinstance(self.acts_on, Groups) and graph is not None:
            for group in graph.groups:
                covers = tuple(dict.fromkeys(piece.path for piece in group.slices))
                yield Site(model, (group.name,), "channels", covers, group=group)
        elif isinstance(self.acts_on, Network):
            yield network_site(model)

    def refuse(self, site: Site) -> str | None:
        """The reason why it leaves the site alone, or None."""
        return None

    def decide(self, site: Site, statistics: Statistics) -> Structure:
        """What `build` cannot know from shapes and settings."""
        return Structure()

    def build(self, site: Site, structure: Structure) -> nn.Module:
        """The cheaper parts, from shapes, settings and structure alone; values are arbitrary until `fit`.

        Tensor site: a module without inputs that returns the tensor. Module site: a module that takes its place.
        Channels: the `Cut` of the structure. The whole network: the network, changed in place.
        """
        if isinstance(structure, CutStructure):
            return Cut(structure)
        raise NotImplementedError(f"{type(self).__name__} replaces nothing")

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        """Fill the parts from the trained weights at the site."""
        raise NotImplementedError(f"{type(self).__name__} replaces nothing")

    def encode(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        """Express the site's present weights with the tables that the parts already hold; default: fit anew."""
        self.fit(site, parts, statistics)

    def solve(self, site: Site, statistics: Statistics) -> tuple[Structure, nn.Module]:
        """Decide, build and fit."""
        structure = self.decide(site, statistics)
        parts = build(self, site, structure)
        self.fit(site, parts, statistics)
        return structure, parts

    def weight(self, site: Site, parts: nn.Module) -> Tensor | None:
        """The dense tensor that the parts stand for, comparable with the first tensor that the site covers."""
        if site.kind != "tensor":
            return None
        with torch.no_grad():
            return cast(Tensor, parts())

    def inner(self, site: Site, parts: nn.Module, statistics: Statistics) -> Statistics:
        """Statistics for the tensors inside the parts, by their paths in the parts. Default: a single tensor of the
        site's own shape sees what the site sees."""
        curvature = statistics.curvature(site.covers[0]) if site.covers else None
        if curvature is None:
            return Statistics()
        same = [n for n, p in parts.named_parameters() if p.shape == curvature.shape]
        return Statistics({same[0]: curvature}) if len(same) == 1 else Statistics()

    def cost(self, site: Site, parts: nn.Module | None = None) -> Cost:
        """Bits in the file and MACs. Fitted parts: what the file's coder will make of them; without parts: by shapes."""
        if parts is None:
            meta = site.on_meta()
            parts = build(self, meta, self.decide(meta, Statistics()))
            site = meta
        bits = stored_bits(parts, kept_of(site))
        if site.kind == "tensor":
            numel = site.tensor.numel()
        else:
            kept = kept_of(site)
            numel = sum(p.numel() for p in _values(parts) if p.ndim >= 2 and id(p) not in kept)
        return Cost(bits, site.positions * numel)

    def damage(self, site: Site, parts: nn.Module, statistics: Statistics) -> float | None:
        """The predicted increase of the loss; None means: measure it."""
        weight = self.weight(site, parts)
        curvature = statistics.curvature(site.covers[0]) if site.covers else None
        if weight is None or curvature is None:
            return None
        return curvature.damage(weight.float().cpu() - value_at(site.root, site.covers[0]).float().cpu())

    def lower(self, parts: nn.Module) -> nn.Module | None:
        """For export, the decoder written in the operators of `pared.lowered`; None means the decoded dense tensor."""
        return None

    def leaving(self, paths: Sequence[str]) -> Technique:
        """Of the whole network: the same but for these modules, which it is to leave as they are. Default: itself."""
        return self

    def widths(self) -> Sequence[Technique]:
        """Of channels, where latency is asked: itself, and the same with numbers of channels that runtimes may run faster.
        Default: itself alone."""
        return (self,)

    # -- it shapes training --------------------------------------------------------------------------------------------

    def relax(self, site: Site, structure: Structure, statistics: Statistics) -> nn.Module | None:
        """A trainable stand-in whose forward equals build and fit. Tensor sites: straight through; module sites: the parts.

        A stand-in may have `anneal(progress)`, called on the way; `settle()`, which gives the parts with what was trained; and
        `coded_bits()` with `aim_bits`, which give its bits a price in the loss, see `pared.train.price`.

        Channels: by default they go before the training begins. A technique that lets training find out which go gives a
        gate, a module for n channels with

            gate(price, draws)    a factor per channel for its `pieces`, 0 where it is shut; at random if `draws`
            gate.pieces           slices of parameters that are multiplied: of the layers that read the channels
            gate.kept(price)      how far each channel is there, in [0, 1], falling with the price; with or without a gradient
            gate.scores()         which channels go first, the lowest; comparable between groups
            gate.draw_()          called after every step
            gate.adopt_(price)    called when the price was solved anew, every few steps

        The price is one for the whole network, see `pared.budget.gates`.
        """
        if site.kind == "tensor":
            return StraightThrough(self, site, structure, statistics)
        parts = build(self, site, structure)
        self.fit(site, parts, statistics)
        return parts

    @property
    def in_training(self) -> bool:
        """Of the whole network: whether it is to be in force, through `relax`, while what comes before it is trained."""
        return False

    def settle(self, parts: nn.Module) -> None:
        """Of the whole network: end its training; in place, `relax` gives way to what `build` makes."""

    def at(self, progress: float) -> Technique:
        """The technique at a fraction of its way in training, such as a sparsity that grows; at(1.0) is itself."""
        return self

    def passes(self, parts: nn.Module) -> Tensor | None:
        """Where a straight-through gradient reaches the weight: 1 or 0, of its shape; None: everywhere."""
        return None

    def loss(self, batch: Batch, student: Any, teacher: Any) -> Tensor | None:
        """A term of the training loss from the outputs of student and teacher (None: it adds none)."""
        return None

    # -- it prepares ---------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, graph: Any, statistics: Statistics) -> nn.Module | None:
        """The same function in a form that other techniques handle better; None if there is nothing to rewrite."""
        return None


def build(technique: Technique, site: Site, structure: Structure) -> nn.Module:
    """The technique's parts on the site's device."""
    with site.device:
        return technique.build(site, structure)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, passes: Tensor | None) -> Tensor:
        ctx.passes = passes
        return value.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient if ctx.passes is None else gradient * ctx.passes, None, None


class StraightThrough(nn.Module):
    """A trainable weight that shows its coded value forward and takes the gradient as if it were not coded.

    Source: Bengio, Léonard & Courville 2013, arXiv:1308.3432. Tables are fitted anew every `REFIT` steps; the weights
    are encoded anew in every step (a code four steps old saves time and loses two points on LeNet-300-100). What is
    validated and kept is freshly fitted, see `settle`.
    """

    REFIT: ClassVar[int] = 20

    def __init__(self, technique: Technique, site: Site, structure: Structure, statistics: Statistics) -> None:
        super().__init__()
        self.technique = technique
        self.active = technique
        self.structure = structure
        curvature = statistics.curvature(site.covers[0])
        self.statistics = Statistics({site.name: curvature} if curvature is not None else {})
        self.weight = nn.Parameter(site.tensor.clone())
        self.site = site.alone(self.weight)
        self.parts = build(technique, self.site, structure).requires_grad_(False)
        start = technique.at(0.0)
        is_part = isinstance(technique, Chain) and not isinstance(start, Chain)
        self.early = build(start, self.site, start.decide(self.site, self.statistics)).requires_grad_(False) if is_part else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._fit()

    @property
    def shown(self) -> nn.Module:
        """The parts that the weight is seen through now: of the whole chain, or of what of it is in force."""
        return self.parts if self.early is None or isinstance(self.active, Chain) else self.early

    def anneal(self, progress: float) -> None:
        """Go on to the technique's state at this fraction of the training."""
        active = self.technique.at(progress)
        if active != self.active:
            self.active = active
            self._fit()

    def _fit(self) -> None:
        with torch.no_grad():
            self.active.fit(self.site, self.shown, self.statistics)

    def forward(self, original: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            if self.training:
                step = int(cast(Tensor, self.steps).add_(1))
                if step % self.REFIT == 0:
                    self._fit()
                else:
                    self.active.encode(self.site, self.shown, self.statistics)
            value, passes = self.shown(), self.active.passes(self.shown)
        return cast(Tensor, _Through.apply(self.weight, value, passes))

    def settle(self) -> nn.Module:
        """The parts, fitted to the trained weight."""
        self.anneal(1.0)
        self._fit()
        return self.parts

    def __deepcopy__(self, memo: dict[int, Any]) -> StraightThrough:
        twin = StraightThrough.__new__(StraightThrough)
        nn.Module.__init__(twin)
        memo[id(self)] = twin
        twin.technique, twin.active, twin.structure, twin.statistics = (
            self.technique, self.active, self.structure, self.statistics,
        )
        twin.weight = copy.deepcopy(self.weight, memo)
        twin.site = self.site.alone(twin.weight)
        twin.parts = copy.deepcopy(self.parts, memo)
        twin.early = copy.deepcopy(self.early, memo)
        twin.register_buffer("steps", cast(Tensor, self.steps).clone())
        twin.training = self.training
        return twin


class ChainStructure(Structure):
    """The structures along a chain: of the first technique, then of each later one by path in the parts."""

    first: dict[str, Any]
    rest: tuple[tuple[tuple[str, dict[str, Any]], ...], ...]


class Chain(Technique):
    """Techniques one after the other: each acts on what the ones before it built. A chain is a technique.

    >>> from pared import prune, quantize
    >>> print(Chain(prune.Magnitude(sparsity=0.9), quantize.Codebook(bits=4)))
    chain(prune.magnitude(sparsity=0.9), quantize.codebook(bits=4))
    """

    FIRST: ClassVar[float] = 0.6
    """The share of the way after which the first technique of a chain on a tensor is in full force."""

    techniques: tuple[SerializeAsAny[Technique], ...]
    structure_type: ClassVar[type[Structure]] = ChainStructure

    def __init__(self, *techniques: Technique, **fields: Any) -> None:
        given = techniques or tuple(fields.pop("techniques", ()))
        if not given:
            raise RecipeError("a chain must hold at least one technique, got none")
        links: list[Technique] = []
        for technique in given:
            if not isinstance(technique, Technique):
                raise RecipeError(f"a chain must hold techniques, got {type(technique).__name__}")
            links += technique.techniques if isinstance(technique, Chain) else (technique,)
        for technique in links:
            if technique.kind is None:
                raise RecipeError(f"a chain must hold techniques that replace something; {technique.name} does not")
            if technique.kind == "channels" and len(links) > 1:
                raise RecipeError(f"{technique.name} acts on many tensors and cannot stand in a chain; make it a step of its own")
            if technique.kind == "network":
                raise RecipeError(
                    f"{technique.name} acts on the whole network and cannot be part of a chain; give it a step of its own"
                )
        for later in links[1:]:
            if later.kind == "module":
                raise RecipeError(
                    f"{later.name} replaces modules and cannot follow {links[0].name} in a chain; put it first"
                )
        super().__init__(**{"techniques": tuple(links), **fields})

    @property
    def name(self) -> str:
        return "chain"

    @property
    def first(self) -> Technique:
        return self.techniques[0]

    @property
    def kind(self) -> Kind | None:
        return self.first.kind

    def __str__(self) -> str:
        return f"chain({', '.join(map(str, self.techniques))})"

    def sites(self, model: nn.Module, graph: Any = None) -> Iterator[Site]:
        return self.first.sites(model, graph)

    def refuse(self, site: Site) -> str | None:
        if reason := self.first.refuse(site):
            return reason
        meta = site.on_meta()
        parts = build(self.first, meta, self.first.decide(meta, Statistics()))
        for technique in self.techniques[1:]:
            inner = list(_inner_sites(technique, parts, kept_of(meta)))
            if not inner:
                return f"{technique.name} finds nothing to act on after {self.first.name}"
            if reasons := [reason for s in inner if (reason := technique.refuse(s))]:
                return f"{technique.name}: {reasons[0]}"
        return None

    def solve(self, site: Site, statistics: Statistics) -> tuple[Structure, nn.Module]:
        structure, parts = self.first.solve(site, statistics)
        rest = []
        for technique in self.techniques[1:]:
            inner_statistics = self.first.inner(site, parts, statistics)
            links = []
            for inner in list(_inner_sites(technique, parts, kept_of(site))):
                inner_structure, inner_parts = technique.solve(inner, inner_statistics)
                install_(inner, inner_parts)
                links.append((inner.path, inner_structure.model_dump()))
            rest.append(tuple(links))
        whole = ChainStructure(first=structure.model_dump(), rest=tuple(rest))
        return whole, _remember(parts, whole)

    def decide(self, site: Site, statistics: Statistics) -> Structure:
        if site.covers and value_at(site.root, site.covers[0]).is_meta:
            return self._decide_by_shapes(site)
        return self.solve(site, statistics)[0]

    def _decide_by_shapes(self, site: Site) -> Structure:
        structure = self.first.decide(site, Statistics())
        parts = build(self.first, site, structure)
        rest = []
        for technique in self.techniques[1:]:
            links = []
            for inner in list(_inner_sites(technique, parts, kept_of(site))):
                inner_structure = technique.decide(inner, Statistics())
                install_(inner, build(technique, inner, inner_structure))
                links.append((inner.path, inner_structure.model_dump()))
            rest.append(tuple(links))
        return ChainStructure(first=structure.model_dump(), rest=tuple(rest))

    def _links(self, structure: ChainStructure) -> Iterator[tuple[Technique, list[tuple[str, Structure]]]]:
        for technique, links in zip(self.techniques[1:], structure.rest, strict=True):
            yield technique, [(path, technique.structure_type.model_validate(inner)) for path, inner in links]

    def _build_first(self, site: Site, structure: ChainStructure) -> nn.Module:
        return build(self.first, site, self.first.structure_type.model_validate(structure.first))

    def build(self, site: Site, structure: Structure) -> nn.Module:
        chained = cast(ChainStructure, structure)
        parts = self._build_first(site, chained)
        for technique, links in self._links(chained):
            for path, inner_structure in links:
                inner = Site(parts, (path,), "tensor", (path,))
                install_(inner, build(technique, inner, inner_structure))
        return _remember(parts, chained)

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        structure = cast(ChainStructure, parts.chain_structure)
        fitted = self._build_first(site, structure)
        self.first.fit(site, fitted, statistics)
        for technique, links in self._links(structure):
            inner_statistics = self.first.inner(site, fitted, statistics)
            for path, inner_structure in links:
                inner = Site(fitted, (path,), "tensor", (path,))
                inner_parts = build(technique, inner, inner_structure)
                technique.fit(inner, inner_parts, inner_statistics)
                install_(inner, inner_parts)
        parts.load_state_dict(fitted.state_dict())

    def encode(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        if len(self.techniques) != 2:
            self.fit(site, parts, statistics)
            return
        bare = self._build_first(site, cast(ChainStructure, parts.chain_structure))
        self.first.encode(site, bare, statistics)
        inner_statistics = self.first.inner(site, bare, statistics)
        own = dict(parts.state_dict())
        for name, value in bare.state_dict().items():
            held = _held_at(parts, name)
            if held is None:
                own[name].copy_(value)
            else:
                self.techniques[1].encode(Site(bare, (name,), "tensor", (name,)), held.decoder, inner_statistics)

    def passes(self, parts: nn.Module) -> Tensor | None:
        return self.first.passes(parts)

    def weight(self, site: Site, parts: nn.Module) -> Tensor | None:
        return self.first.weight(site, parts)

    def relax(self, site: Site, structure: Structure, statistics: Statistics) -> nn.Module | None:
        if site.kind == "tensor":
            return StraightThrough(self, site, structure, statistics)
        chain_structure = cast(ChainStructure, structure)
        parts = self._build_first(site, chain_structure)
        self.first.fit(site, parts, statistics)
        inner_statistics = self.first.inner(site, parts, statistics)
        rest = self.techniques[1:]
        if rest:
            later = Chain(*rest) if len(rest) > 1 else rest[0]
            for path, _ in chain_structure.rest[0]:
                inner = Site(parts, (path,), "tensor", (path,))
                inner_structure = later.decide(inner, inner_statistics)
                relaxed = later.relax(inner, inner_structure, inner_statistics)
                if relaxed is not None:
                    install_(inner, relaxed)
        return parts

    def at(self, progress: float) -> Technique:
        """Before its end a chain on a tensor is its first technique alone: prune, train on, and only then cluster."""
        if progress >= 1 or self.kind == "module":
            return self
        return self.first.at(min(1.0, progress / self.FIRST))


def _remember(parts: nn.Module, structure: ChainStructure) -> nn.Module:
    """The parts know by which structure they were built, so that `fit` and `encode` obey it and decide nothing anew."""
    parts.chain_structure = structure  # type: ignore[assignment]
    return parts


def _inner_sites(technique: Technique, parts: nn.Module, kept: set[int]) -> Iterator[Site]:
    for site in technique.sites(parts):
        tensor = site.owner._parameters.get(site.name)
        if tensor is not None and id(tensor) not in kept:
            yield site


def _held_at(parts: nn.Module, name: str) -> Decoded | None:
    parent, _, leaf = name.rpartition(".")
    owner = parts.get_submodule(parent)
    if not parametrize.is_parametrized(owner, leaf):
        return None
    return cast(Decoded, owner.parametrizations[leaf][0])  # type: ignore[index]


def value_at(root: nn.Module, path: str) -> Tensor:
    """The present value of the tensor at a path (decoded, if it is coded), detached."""
    parent, _, name = path.rpartition(".")
    return cast(Tensor, getattr(root.get_submodule(parent), name)).detach()


def kept_of(site: Site) -> set[int]:
    """Tensors that the site's module keeps as they are (a bias): they are no part of what a technique adds."""
    if site.kind != "module":
        return set()
    return {id(t) for t in [*site.module.parameters(), *site.module.buffers()]} - site.covered


def _values(parts: nn.Module) -> list[Tensor]:
    """Parameters and coded tensors at their full size, for counting MACs; what decoders hold is not multiplied with."""
    decoders = {id(inner) for m in parts.modules() if isinstance(m, Decoded) for inner in m.modules()}
    found: list[Tensor] = []
    for module in parts.modules():
        if id(module) in decoders:
            continue
        found += [p for p in module._parameters.values() if p is not None and p.numel()]
        if parametrize.is_parametrized(module):
            found += [getattr(module, name).detach() for name in module.parametrizations]  # type: ignore[union-attr]
    return found


def stored_tensors(parts: nn.Module) -> Iterator[tuple[str, Tensor, float | None]]:
    """(path, tensor, bits per element if the parts declare them) of everything that the file must hold, each once."""
    seen: set[int] = set()
    for prefix, module in parts.named_modules():
        declared = getattr(module, "code_bits", {})
        entries = list(module._parameters.items())
        entries += [(n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]
        for name, tensor in entries:
            if tensor is None or tensor.numel() == 0 or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield (f"{prefix}.{name}" if prefix else name), tensor, declared.get(name)


def stored_bits(parts: nn.Module, kept: set[int] | frozenset[int] = frozenset(), names: bool = False) -> float:
    """Bits of the parts in the file. On meta tensors: the bits that the parts declare; else the coder's estimate.

    Args:
        kept: ids of tensors that are not counted.
        names: count what naming each tensor in the file costs.
    """
    total: float = 0
    for _, tensor, bits in stored_tensors(parts):
        if id(tensor) in kept:
            continue
        if tensor.is_meta:
            total += tensor.numel() * (bits if bits is not None else 8 * tensor.element_size())
        else:
            total += store.estimate_bits(as_numpy(tensor))
        total += ENTRY_BITS if names else 0
    return total


def as_numpy(tensor: Tensor) -> Any:
    """The tensor as an array of the same bits (bfloat16 and float8 as integers)."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


@dataclass(frozen=True)
class Option:
    """One technique at one site, with what it costs and what it harms: all that the allocator ever sees.

    The technique is None where the site is left as it is.
    """

    site: Site
    technique: Technique | None
    cost: Cost
    damage: float
    structure: Structure = field(default_factory=Structure, compare=False)


@dataclass(frozen=True)
class Edit:
    """One line of a file's manifest: this technique, at these paths, with this structure."""

    technique: Technique
    paths: tuple[str, ...]
    structure: Structure

    def site(self, model: nn.Module) -> Site:
        kind = self.technique.kind
        if kind == "channels":
            return Site(model, self.paths, kind, ())
        if kind == "network":
            return network_site(model)
        if kind == "module":
            target = model.get_submodule(self.paths[0])
            match = [s for s in self.technique.sites(model) if s.path == self.paths[0]]
            covers = match[0].covers if match else tuple(f"{self.paths[0]}.{n}" for n, _ in target.named_parameters())
            return Site(model, self.paths, "module", covers)
        return Site(model, self.paths, "tensor", (self.paths[0],))

    def replay_(self, model: nn.Module, *, cache: bool = True) -> nn.Module:
        """Build the parts on a model of the original class, in place; returns the parts, whose values are still arbitrary."""
        site = self.site(model)
        parts = build(self.technique, site, self.structure)
        install_(site, parts, cache=cache)
        return parts


def parse(cls: type[Technique], fields: dict[str, Any], where: str = "") -> Technique:
    """A technique from its settings; a wrong one gives a RecipeError that names the range and the value."""
    try:
        return cls(**fields)
    except ValidationError as error:
        raise RecipeError(explain(cls, error, where)) from error
