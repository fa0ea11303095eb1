"""Where a technique acts: a tensor with all its owners, or a module; and how parts are put there."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from pared.cut import Cut, Group
from pared.errors import InputError, RecipeError


@dataclass(frozen=True, eq=False)
class Site:
    """One place that a technique may replace.

    A tensor site is a storage together with all its owners, so tied weights stay tied; a module site is a module
    together with all the paths at which it is found; a channels site is a group of channels that lie in many tensors.

    Args:
        root: the module in which the paths are looked up.
        paths: dotted paths from `root`, the first one in traversal order is the site's name.
        kind: "tensor" (a parameter or a persistent buffer), "module" or "channels".
        covers: first path of every tensor whose value the site replaces; sites that cover a common tensor exclude
            each other.
        positions: at how many positions (pixels, time steps) per example the weight is applied; 0 if unknown.
            MACs of a dense weight = positions * numel.
        group: of a channels site; None where the site comes from a file.
    """

    root: nn.Module
    paths: tuple[str, ...]
    kind: Literal["tensor", "module", "channels"]
    covers: tuple[str, ...]
    positions: float = 0.0
    group: Group | None = field(default=None, repr=False)

    @classmethod
    def of(cls, module: nn.Module, name: str | None = None) -> Site:
        """The site of one module, or of the tensor `name` in it (for experiments by hand and for tests)."""
        if name is None:
            holder = nn.ModuleDict({"module": module})
            return cls(holder, ("module",), "module", tuple(f"module.{n}" for n, _ in module.named_parameters()))
        return cls(module, (name,), "tensor", (name,))

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def owner(self) -> nn.Module:
        """The module that holds the tensor, or the parent of the module."""
        return self.root.get_submodule(self.path.rpartition(".")[0])

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def tensor(self) -> Tensor:
        """The tensor's present value (decoded, if it is held in coded form), detached."""
        if self.kind != "tensor":
            raise TypeError(f"{self.path} is a module, not a tensor")
        return cast(Tensor, getattr(self.owner, self.name)).detach()

    def tensor_at(self, path: str) -> Tensor:
        """The present value of a tensor below the root, detached."""
        parent, _, name = path.rpartition(".")
        return cast(Tensor, getattr(self.root.get_submodule(parent), name)).detach()

    @property
    def module(self) -> nn.Module:
        if self.kind != "module":
            raise TypeError(f"{self.path} is a tensor, not a module")
        return self.root.get_submodule(self.path)

    @property
    def device(self) -> torch.device:
        if self.kind == "tensor":
            return self.tensor.device
        held = self.module if self.kind == "module" else self.root
        tensor = next(itertools.chain(held.parameters(), held.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def covered(self) -> set[int]:
        """The ids of the parameters and buffers whose values the site replaces."""
        found = set()
        for path in self.covers:
            parent, _, name = path.rpartition(".")
            owner = self.root.get_submodule(parent)
            found.add(id(owner._parameters.get(name, owner._buffers.get(name))))
        return found - {id(None)}

    @property
    def is_buffer(self) -> bool:
        return self.kind == "tensor" and self.name in self.owner._buffers

    def on_meta(self) -> Site:
        """The same site with shapes and no values: what `build` may look at."""
        if self.kind == "channels":
            return replace(self, root=meta_copy(self.root))
        if self.kind == "module":
            holder = nn.Module()
            holder.add_module("site", meta_copy(self.module))
            held = [*self.module.named_parameters(), *self.module.named_buffers()]
            covers = tuple(f"site.{name}" for name, tensor in held if id(tensor) in self.covered)
            return Site(holder, ("site",), "module", covers, self.positions)
        value = self.tensor
        meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return self.alone(meta if self.is_buffer else nn.Parameter(meta, requires_grad=False))

    def alone(self, value: Tensor) -> Site:
        """The same tensor site in a bare module of the owner's class that holds `value` and nothing else.

        The class is part of what `build` may look at: which axis counts output channels depends on it.
        """
        shell = _shell(self.owner, self.name, value)
        return Site(shell, (self.name,), "tensor", (self.name,), self.positions)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes and no values."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for item in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(item, Tensor):
                meta = torch.empty_like(item, device="meta")
                memo[id(item)] = nn.Parameter(meta, item.requires_grad) if isinstance(item, nn.Parameter) else meta
    return copy.deepcopy(model, memo)


def _shell(owner: nn.Module, name: str, value: Tensor) -> nn.Module:
    """A module of the owner's class (before parametrization) that holds nothing but a tensor called `name`."""
    cls = type(owner)
    if parametrize.is_parametrized(owner):
        cls = cls.__bases__[0]
    shell = nn.Module()
    if isinstance(value, nn.Parameter):
        shell.register_parameter(name, value)
    else:
        shell.register_buffer(name, value)
    # plain attributes (stride, groups, ...) are kept so that the shell answers the same questions as the owner
    for key, item in vars(owner).items():
        if not key.startswith("_") and key not in shell.__dict__:
            shell.__dict__[key] = item
    shell.__class__ = cls
    return shell


def tensor_sites(model: nn.Module, *, buffers: bool = True) -> Iterator[Site]:
    """Every floating-point parameter and persistent buffer with all its owners, each storage once, in traversal order."""
    owners: dict[int, list[str]] = {}
    seen: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        entries: list[tuple[str, Tensor | None]] = list(module._parameters.items())
        if buffers:
            entries += [(n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]
        for name, tensor in entries:
            if tensor is None or not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):  # an attention mask of infinities
                continue
            if hasattr(nn.ModuleDict, name):  # torch's parametrizations cannot hold a tensor called "keys" or "values"
                continue
            seen[id(tensor)] = tensor
            owners.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    for key in seen:
        paths = tuple(owners[key])
        yield Site(model, paths, "tensor", (paths[0],))


def module_sites(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> Iterator[Site]:
    """Every submodule that is an instance of one of the classes, with all the paths at which it is found."""
    paths: dict[int, list[str]] = {}
    found: dict[int, nn.Module] = {}
    first_owner = {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and isinstance(module, classes):
            paths.setdefault(id(module), []).append(path)
            found[id(module)] = module
    for key, module in found.items():
        covers = tuple(dict.fromkeys(first_owner[id(p)] for p in module.parameters() if id(p) in first_owner))
        yield Site(model, tuple(paths[key]), "module", covers)


def network_site(model: nn.Module) -> Site:
    """The whole network, which covers every tensor in it."""
    return Site(model, ("",), "module", tuple(name for name, _ in model.named_parameters()))


class Decoded(nn.Module):
    """Holds the decoder of a tensor as a parametrization, and the decoded value while in eval mode.

    The held value is bypassed in train mode and while tracing, compiling or exporting, and dropped by `train()`,
    `.to()`, `.half()` and `load_state_dict`.
    """

    def __init__(self, decoder: nn.Module, cache: bool = True) -> None:
        super().__init__()
        self.decoder = decoder
        self.cache = cache
        self._value: Tensor | None = None

    def forward(self, original: Tensor | None = None) -> Tensor:
        if not self.cache or self.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._decode(original)
        if self._value is None:
            # a value made in inference mode could not take part in a later backward pass
            with torch.inference_mode(False), torch.no_grad():
                self._value = self._decode(original)
        return self._value

    def _decode(self, original: Tensor | None) -> Tensor:
        """In the type of the tensor that it stands for, which follows `.half()` and `.double()`."""
        value = self.decoder()
        return value if original is None else value.to(original.dtype)

    def forget_(self) -> None:
        """Drop the held value; the next call decodes again."""
        self._value = None

    def train(self, mode: bool = True) -> Decoded:
        self._value = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._value = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._value = None
        super()._load_from_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoded:
        twin = Decoded(copy.deepcopy(self.decoder, memo), self.cache)
        twin.training = self.training
        memo[id(self)] = twin
        return twin


class _Unflattened:
    """Recurrent modules keep a list of their weights from construction on; decoded ones have to be looked up anew."""

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        return self if module is None else [getattr(module, name, None) for name in module._flat_weights_names]

    def __set__(self, module: Any, value: Any) -> None:
        """The list is derived: what torch assigns to it is already in the attributes."""


def install_(site: Site, parts: nn.Module, *, cache: bool = True) -> None:
    """Put the parts in the place of the site, at every owner.

    Tensor: the parts (a module without inputs that returns the tensor) decode it from then on; the owner stays an
    instance of its class. Module: the parts take the module's place. Channels: the parts (a `Cut`) change the root.
    """
    if isinstance(parts, Cut):
        parts(site.root)
        return
    if site.kind == "module":
        if parts is site.module:  # changed in place; also the one way to change the root itself
            return
        for path in site.paths:
            parent, _, name = path.rpartition(".")
            setattr(site.root.get_submodule(parent), name, parts)
        return
    like = site.tensor
    if site.is_buffer:
        parts.requires_grad_(False)
    decoded = Decoded(parts, cache)
    held: set[tuple[int, str]] = set()  # a module may be known under several paths
    for path in site.paths:
        parent, _, name = path.rpartition(".")
        owner = site.root.get_submodule(parent)
        if (id(owner), name) not in held:
            hold_(owner, name, decoded, like)
        held.add((id(owner), name))


def hold_(owner: nn.Module, name: str, decoded: nn.Module, like: Tensor) -> None:
    """Make `decoded` (called with the original tensor) the source of the attribute `name` of `owner`."""
    if name in owner._buffers:
        owner._buffers[name] = torch.empty(0, dtype=like.dtype, device=like.device)
    elif name in owner._parameters:
        empty = nn.Parameter(torch.empty(0, dtype=like.dtype, device=like.device), requires_grad=False)
        owner._parameters[name] = empty
    else:
        raise InputError(f"{name} must be a parameter or a buffer of {type(owner).__name__}; it is neither")
    parametrize.register_parametrization(owner, name, decoded, unsafe=True)
    lists = cast(nn.ModuleDict, owner.parametrizations)
    lists.training = owner.training
    lists[name].train(owner.training)
    if isinstance(owner, nn.RNNBase) and not isinstance(vars(type(owner)).get("_flat_weights"), _Unflattened):
        owner.__dict__.pop("_flat_weights", None)
        type(owner)._flat_weights = _Unflattened()  # type: ignore[assignment]


class Held(nn.Module):
    """A tensor as it is, in the place of a decoder."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        return cast(Tensor, self.value)


def _recode_(model: nn.Module, coded: Mapping[str, nn.Module]) -> set[int]:
    """Give coded tensors other decoders, in place; the ids of the modules that hold them. A module of which one tensor
    stays coded keeps all: the class that torch gave it cannot be left for some of its tensors only."""
    owners = {path.rpartition(".")[0] for path in coded}
    found: dict[int, nn.Module] = {}
    for prefix, module in list(model.named_modules(remove_duplicate=False)):
        if prefix not in owners:
            continue
        found[id(module)] = module
        for name, chain in cast(nn.ModuleDict, module.parametrizations).items():
            held = cast(Decoded, chain[0])  # type: ignore[index]
            path = f"{prefix}.{name}" if prefix else name
            held.decoder = coded[path] if path in coded else Held(cast(Tensor, getattr(module, name)).detach().clone())
            held.cache = False
    return set(found)


def check_layers(model: nn.Module, patterns: str, setting: str) -> None:
    """Raise a RecipeError unless each of the patterns, with commas between, is the path of a module."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in filter(None, patterns.split(",")):
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise RecipeError(f"{setting} must name layers: no layer is called {pattern}; near it are {', '.join(near)}")


def duplicate(model: nn.Module, *, shares: bool = False) -> nn.Module:
    """A deep copy, also where a forward or a hook has left computed tensors in attributes, which torch refuses to copy.

    Args:
        shares: parameters are the model's own, for copies in which they are replaced and not written to.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()} if shares else {}
    for module in model.modules():
        own = {name: item for name, item in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}
        for item in pytree.tree_leaves(own):
            if isinstance(item, Tensor) and not item.is_leaf:
                memo[id(item)] = item.detach().clone()
    return copy.deepcopy(model, memo)


def plain(model: nn.Module, coded: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """A copy in which every coded tensor is an ordinary parameter or buffer under its own path (tied ones stay tied).

    Args:
        coded: new decoders, by path, of tensors that are to stay coded.
    """
    twin = duplicate(model)
    kept = _recode_(twin, coded or {})
    values: dict[int, Tensor] = {}
    for module in list(twin.modules()):
        if not parametrize.is_parametrized(module) or id(module) in kept:
            continue
        lists = cast(nn.ModuleDict, module.parametrizations)
        found: dict[str, Tensor] = {}
        for name, chain in lists.items():
            key = id(chain[0])  # type: ignore[index]
            if key not in values:
                with torch.no_grad():
                    value = getattr(module, name).detach().clone()
                is_buffer = "original" in chain._buffers
                values[key] = value if is_buffer else nn.Parameter(value, value.is_floating_point())
            found[name] = values[key]
        # deep copies share the class that carries the properties: step back to its base, leave the class as it is
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in found.items():
            if isinstance(value, nn.Parameter):
                module.register_parameter(name, value)
            else:
                module.register_buffer(name, value)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return twin
