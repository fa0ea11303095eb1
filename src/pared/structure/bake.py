"""Reparametrisations undone: weight norm, spectral norm and the like become plain weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.spectral_norm import remove_spectral_norm as remove_spectral_norm_
from torch.nn.utils.weight_norm import WeightNorm

from pared.errors import InputError
from pared.site import Decoded, Site, duplicate, module_sites
from pared.statistics import Statistics
from pared.technique import Cost, Modules, Structure, Technique, stored_bits


class BakeStructure(Structure):
    """The tensors that become plain, by their names in the module."""

    names: tuple[str, ...] = ()


class Bake(Technique):
    """Replace a weight that is computed from others at every call by its value, so that techniques can act on it.

    w = g * v / ||v||   (weight norm),   w = v / sigma(v)   (spectral norm),   w = mask * v   (torch's pruning)

    becomes w. Undone are all of `torch.nn.utils.parametrize` and the older hooks of `torch.nn.utils.weight_norm`,
    `spectral_norm` and `prune`. What the network computes in evaluation mode stays the same; the module stays the same
    object.

    Acts on   modules that carry a reparametrisation which is not pared's own.
    Stores    the plain weight.
    Reads     nothing.
    Refuses   modules of which another tensor is coded already.
    Paper     Salimans & Kingma 2016, arXiv:1602.07868; Miyato et al. 2018, arXiv:1802.05957.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    >>> model = Bake().prepare(nn.Sequential(layer), None, Statistics())
    >>> [name for name, _ in model.named_parameters()]
    ['0.weight', '0.bias']
    """

    acts_on: ClassVar = Modules((nn.Module,))
    paper: ClassVar = "arXiv:1602.07868"
    structure_type: ClassVar = BakeStructure

    def sites(self, model: nn.Module, graph: Any = None) -> Iterator[Site]:
        if reparametrised(model):
            yield Site(model, ("",), "module", tuple(name for name, _ in model.named_parameters(recurse=False)))
        for site in module_sites(model, (nn.Module,)):
            if reparametrised(site.module):
                yield site

    def refuse(self, site: Site) -> str | None:
        if parametrize.is_parametrized(site.module) and any(map(_is_coded, _chains(site.module).values())):
            return "a tensor of the module is coded already; reparametrisations have to be undone first"
        return None

    def decide(self, site: Site, statistics: Statistics) -> BakeStructure:
        return BakeStructure(names=reparametrised(site.module))

    def build(self, site: Site, structure: Structure) -> nn.Module:
        """The module itself, changed in place; of a module whose tensors are plain already, nothing changes.

        Raises:
            InputError: the module has no tensor of a name in the structure, or the technique refuses it.
        """
        module = site.module
        if reason := self.refuse(site):
            raise InputError(f"{site.path}: {reason}")
        bake_(module)
        for name in cast(BakeStructure, structure).names:
            if name not in module._parameters and name not in module._buffers:
                raise InputError(
                    f"{site.path} must have the tensor {name}, but {type(module).__name__} has none; use the class "
                    "that the file was made from"
                )
        return module

    def fit(self, site: Site, parts: nn.Module, statistics: Statistics) -> None:
        """The values are there."""

    def cost(self, site: Site, parts: nn.Module | None = None) -> Cost:
        if parts is None:
            parts = bake_(duplicate(site.module).to("meta"))
        return Cost(stored_bits(parts), site.positions * sum(p.numel() for p in parts.parameters() if p.ndim >= 2))

    def damage(self, site: Site, parts: nn.Module, statistics: Statistics) -> float | None:
        return 0.0

    def prepare(self, model: nn.Module, graph: Any, statistics: Statistics) -> nn.Module | None:
        """Bake the model in place; None if there is nothing to bake."""
        sites = [site for site in self.sites(model) if not self.refuse(site)]
        for site in sites:
            self.build(site, self.decide(site, statistics))
        return model if sites else None


def reparametrised(module: nn.Module) -> tuple[str, ...]:
    """The module's own tensors that are computed from others by something that is not pared's."""
    hooks = module._forward_pre_hooks.values()
    names = [name for hook in hooks if (name := _target(hook)) is not None]
    if parametrize.is_parametrized(module):
        names += [name for name, chain in _chains(module).items() if not _is_coded(chain)]
    return tuple(dict.fromkeys(names))


def bake_(module: nn.Module) -> nn.Module:
    """Undo every reparametrisation of the module's own tensors, in place; they come first among its parameters."""
    names = reparametrised(module)
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, SpectralNorm):
            remove_spectral_norm_(module, hook.name)
            # torch registers this one wrapped and then does not find it: without this no state dict could be loaded
            for other, held in list(module._load_state_dict_pre_hooks.items()):
                if isinstance(getattr(held, "hook", held), SpectralNormLoadStateDictPreHook):
                    del module._load_state_dict_pre_hooks[other]
        elif isinstance(hook, (WeightNorm, BasePruningMethod)):
            hook.remove(module)
            del module._forward_pre_hooks[key]
    if parametrize.is_parametrized(module):
        values = {name: _value(module, name) for name in names if name in _chains(module)}
        # copies of a model share the class that carries the properties: step back to its base, leave that class alone
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in values.items():
            if isinstance(value, nn.Parameter):
                module.register_parameter(name, value)
            else:
                module.register_buffer(name, value)
    first = {name: module._parameters[name] for name in names if name in module._parameters}
    module._parameters = {**first, **module._parameters}
    if isinstance(module, nn.RNNBase) and names:
        module._init_flat_weights()
    return module


def _chains(module: nn.Module) -> dict[str, nn.Module]:
    return dict(cast(nn.ModuleDict, module.parametrizations).items())


def _is_coded(chain: nn.Module) -> bool:
    return any(isinstance(link, Decoded) for link in chain.children())


def _value(module: nn.Module, name: str) -> Tensor:
    """The tensor as evaluation mode gives it (in training mode spectral norm would go on iterating)."""
    chain = _chains(module)[name]
    chain.eval()
    with torch.no_grad():
        value = cast(Tensor, getattr(module, name)).detach().clone()
    own = [tensor for key, tensor in chain._parameters.items() if key.startswith("original") and tensor is not None]
    return nn.Parameter(value, any(tensor.requires_grad for tensor in own)) if own else value


def _target(hook: Any) -> str | None:
    """The name of the tensor that one of torch's older hooks computes before each call."""
    if isinstance(hook, (WeightNorm, SpectralNorm)):
        return hook.name
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else None
