"""A program as a module that runs, and the tree of plain modules that holds its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from pared.errors import ArtifactError, InputError, ParedError
from pared.graph.operators import DEVICE, Ref
from pared.graph.program import (
    UNSUPPLIED,
    Dynamic,
    Input,
    Node,
    Parameter,
    Program,
    Slot,
    leaves,
    map_leaves,
    operator_of,
)  # fmt: skip


@final
class Holder(nn.Module):
    """A module that only holds tensors and further holders."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError("this module only holds tensors; call the module that pared.load gave")


def build_root(program: Program, tensors: Mapping[str, Tensor]) -> nn.Module:
    """See `Program.root`."""
    root = Holder()
    for state in program.states:
        tensor = tensors.get(state.path)
        if tensor is None:
            tensor = program.constants.get(state.path)
        if tensor is None:
            raise ArtifactError(f"the program reads {state.path}, but no tensor of that name was given")
        *owners, name = state.path.split(".")
        module: nn.Module = root
        for owner in owners:
            child = module._modules.get(owner)
            if child is None:
                child = Holder()
                module.add_module(owner, child)
            module = child
        if state.role == "parameter":
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=tensor.requires_grad)
            module.register_parameter(name, own)
        else:
            module.register_buffer(name, tensor, persistent=state.role == "buffer")
    return root.eval()


def read_state(root: nn.Module, path: str) -> Tensor:
    """The tensor at a path, through ordinary attribute access, so that a parametrized one is decoded."""
    *owners, name = path.split(".")
    module: Any = root
    try:
        for owner in owners:
            module = module._modules.get(owner) or getattr(module, owner)
        value = module._parameters.get(name)
        if value is None:
            value = getattr(module, name)
    except AttributeError as error:
        raise ArtifactError(f"the program reads {path}, which the module does not have") from error
    if not isinstance(value, Tensor):
        raise ArtifactError(f"the program reads {path}, which must be a tensor but is a {type(value).__name__}")
    return value


def flatten_arguments(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The input tensors of a call, in order; InputError when the call does not fit the traced one."""
    tensors: list[Tensor] = []
    remaining = list(args)
    named = dict(kwargs)
    for parameter in program.parameters:
        tensors += _match(parameter.name, parameter.tree, _take(parameter, remaining, named))
    if remaining:
        raise InputError(f"the model takes {len(args) - len(remaining)} positional inputs, got {len(args)}")
    if named:
        known = ", ".join(p.name for p in program.parameters)
        raise InputError(f"the model has no input {next(iter(named))!r}; its inputs are: {known}")
    _check_shapes(program, tensors)
    return tensors


_ABSENT = object()


def _take(parameter: Parameter, remaining: list[Any], named: dict[str, Any]) -> Any:
    if parameter.role == "*":
        taken = tuple(remaining)
        remaining.clear()
        return taken
    if parameter.role == "**":
        rest = dict(named)
        named.clear()
        return rest
    if parameter.role == "positional" and remaining:
        if parameter.name in named:
            raise InputError(f"the input {parameter.name} was given twice, by position and by name")
        return remaining.pop(0)
    return named.pop(parameter.name, _ABSENT)


def _match(name: str, tree: Any, value: Any) -> Iterator[Tensor]:
    if value is _ABSENT:
        if any(isinstance(leaf, Slot) for leaf in leaves(tree)):
            raise InputError(f"the input {name} is missing")
        return
    if isinstance(tree, Slot):
        if not isinstance(value, Tensor):
            raise InputError(f"the input {name} must be a tensor, got {type(value).__name__}")
        yield value.contiguous()  # as traced; a program does not hold copies that changed nothing then
    elif isinstance(tree, dict):
        if not isinstance(value, Mapping) or set(value) != set(tree):
            found = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise InputError(f"the input {name} must be a dict with the keys {sorted(map(str, tree))}, got {found}")
        for key, branch in tree.items():
            yield from _match(f"{name}[{key!r}]", branch, value[key])
    elif isinstance(tree, tuple | list):
        if not isinstance(value, tuple | list) or len(value) != len(tree):
            found = f"{len(value)}" if isinstance(value, tuple | list) else type(value).__name__
            raise InputError(f"the input {name} must be a {type(tree).__name__} of {len(tree)}, got {found}")
        for i, (branch, element) in enumerate(zip(tree, value, strict=True)):
            yield from _match(f"{name}[{i}]", branch, element)
    elif tree is UNSUPPLIED:
        raise InputError(f"the input {name} was not given when the model was traced; leave it out")
    elif type(value) is not type(tree) or value != tree:
        raise InputError(f"the input {name} was {tree!r} when the model was traced and cannot change, got {_brief(value)}")


def _brief(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)[:60]


def _check_shapes(program: Program, tensors: list[Tensor]) -> None:
    sizes: dict[int, Any] = {}
    for expected, tensor in zip(program.inputs, tensors, strict=True):
        fits = tensor.dim() == len(expected.shape)
        if fits:
            for axis, size in zip(expected.shape, tensor.shape, strict=True):
                if not isinstance(axis, Dynamic):
                    fits = fits and bool(size == axis)
                elif axis.symbol in sizes:
                    if size != sizes[axis.symbol]:
                        raise InputError(
                            f"the input {expected.name} must have shape {_shape(expected)}, {_letter(axis.symbol)} = "
                            f"{sizes[axis.symbol]} as elsewhere in the call, got {tuple(tensor.shape)}"
                        )
                else:
                    sizes[axis.symbol] = size
        if not fits:
            raise InputError(f"the input {expected.name} must have shape {_shape(expected)}, got {tuple(tensor.shape)}")
    for number, size in sizes.items():
        symbol = program.symbols[number]
        if symbol.smallest and size < symbol.smallest:
            raise InputError(f"the axis {_letter(number)} must be at least {symbol.smallest}, got {size}")
        if symbol.largest is not None and size > symbol.largest:
            raise InputError(f"the axis {_letter(number)} must be at most {symbol.largest}, got {size}")
        if symbol.multiple > 1 and size % symbol.multiple != symbol.remainder:
            rule = f"leave {symbol.remainder} when divided by {symbol.multiple}"
            raise InputError(f"the axis {_letter(number)} must {rule}, got {size}")


def _letter(symbol: int) -> str:
    return "NTUVWXYZABCDEFGHIJKLMOPQRS"[symbol] if symbol < 26 else f"N{symbol}"


def _shape(expected: Input) -> str:
    return "(" + ", ".join(_letter(d.symbol) if isinstance(d, Dynamic) else str(d) for d in expected.shape) + ")"


def rebuild(tree: Any, values: list[Any]) -> Any:
    """The outputs in their original structure, from the values of a program."""
    return map_leaves(lambda leaf: values[leaf.index] if isinstance(leaf, Ref) else leaf, tree)


class Step(NamedTuple):
    """One node made ready to run: states to read before it, how to fill its arguments, values to forget after it."""

    node: Node
    function: Callable[..., Any]
    reads: tuple[int, ...]
    forgets: tuple[int, ...]
    constants: tuple[Any, ...]
    direct: tuple[tuple[int, int], ...]
    nested: tuple[int, ...]
    plain_kwargs: bool
    in_place: Callable[..., Any] | None

    def arguments(self, values: list[Any], device: torch.device) -> tuple[list[Any], Mapping[str, Any]]:
        """Positional and keyword arguments with references and DEVICE replaced."""
        args = list(self.constants)
        for position, index in self.direct:
            args[position] = values[index]
        for position in self.nested:
            args[position] = resolve(args[position], values, device)
        kwargs = self.node.kwargs
        return args, kwargs if self.plain_kwargs else {name: resolve(a, values, device) for name, a in kwargs.items()}


# Operators whose result never shares memory with an argument, and those with a form that writes the same values into
# their first argument.
_FRESH = frozenset(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear batch_norm layer_norm group_norm
    add mul relu relu6 hardtanh silu hardswish hardsigmoid leaky_relu elu""".split()
)
_IN_PLACE = frozenset("relu relu6 hardtanh silu hardswish hardsigmoid leaky_relu elu add.Tensor".split())


def _in_place_form(program: Program, k: int, users: list[list[int]], kept: Mapping[int, None]) -> Callable[..., Any] | None:
    """The form of node k that writes into its first argument, if nothing else can ever see that argument."""
    node = program.nodes[k]
    name = node.op.removeprefix("aten.").removesuffix(".default")
    if name not in _IN_PLACE or not node.args or not isinstance(node.args[0], Ref):
        return None
    written = node.args[0]
    source = program.node_of(written)
    if source is None or program.nodes[source].op.split(".")[1] not in _FRESH:
        return None
    if users[written.index] != [k] or list(node.refs()).count(written) != 1 or written.index in kept:
        return None
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base + "_"), overload or "default")


def _may_write(args: list[Any]) -> bool:
    """Whether the result has the shape and type of the first argument."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    first = tensors[0]
    return first.is_floating_point() and all(t.shape == first.shape and t.dtype == first.dtype for t in tensors[1:])


def _step(node: Node, reads: list[int], forgets: list[int], in_place: Callable[..., Any] | None) -> Step:
    direct = tuple((i, a.index) for i, a in enumerate(node.args) if isinstance(a, Ref))
    nested = tuple(i for i, a in enumerate(node.args) if not isinstance(a, Ref) and not _is_plain(a))
    plain_kwargs = all(map(_is_plain, node.kwargs.values()))
    function = operator_of(node).function
    return Step(node, function, tuple(reads), tuple(forgets), node.args, direct, nested, plain_kwargs, in_place)


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else not isinstance(value, Ref) and value is not DEVICE


class Plan(NamedTuple):
    """A program made ready to run: the steps, and the states that only an output reads."""

    steps: tuple[Step, ...]
    late_reads: tuple[int, ...]


def plan(program: Program) -> Plan:
    """The nodes in order; each state is read just before its first use, each value forgotten after its last."""
    last_use = dict.fromkeys(range(len(program.inputs)), -1)
    first_use: dict[int, int] = {}
    for k, node in enumerate(program.nodes):
        last_use[program.first_node + k] = k
        for ref in node.refs():
            last_use[ref.index] = k
            first_use.setdefault(ref.index, k)
    kept = dict.fromkeys(leaf.index for leaf in leaves(program.outputs) if isinstance(leaf, Ref))
    reads: list[list[int]] = [[] for _ in program.nodes]
    forgets: list[list[int]] = [[] for _ in program.nodes]
    for index, k in first_use.items():
        if program.is_state(index):
            reads[k].append(index)
    for index, k in last_use.items():
        if k >= 0 and index not in kept:
            forgets[k].append(index)
    users = program.users()
    steps = (_step(node, reads[k], forgets[k], _in_place_form(program, k, users, kept)) for k, node in enumerate(program.nodes))
    return Plan(tuple(steps), tuple(i for i in kept if program.is_state(i) and i not in first_use))


def resolve(value: Any, values: list[Any], device: torch.device) -> Any:
    """An argument with its references and DEVICE replaced."""
    if isinstance(value, Ref):
        return values[value.index]
    if isinstance(value, list):
        return [resolve(element, values, device) for element in value]
    return device if value is DEVICE else value


def start(program: Program, late_reads: tuple[int, ...], tensors: list[Tensor], root: nn.Module) -> list[Any]:
    """The list of all values, with the inputs and the states that only an output reads filled in."""
    values: list[Any] = [None] * len(program.kinds)
    values[: len(tensors)] = tensors
    for index in late_reads:
        values[index] = read_state(root, program.states[index - len(program.inputs)].path)
    return values


def device_of(tensors: list[Tensor], root: nn.Module) -> torch.device:
    """Where a call runs: where its first input is, or without inputs the first parameter or buffer."""
    first = tensors[0] if tensors else next(root.parameters(), next(root.buffers(), None))
    return torch.device("cpu") if first is None else first.device


@final
class ProgramModule(nn.Module):
    """Runs a program on the tensors of `root`; called as the traced model was, it gives what that gave, bit for bit.

    Named outputs (a dataclass, an output class of the transformers package) come back as plain dicts. There is no
    training mode, the operators are those of eval mode; with `trains` it can be trained as it is: nothing is dropped and
    batch statistics stay. Where nobody can see the difference, element-wise operators
    write into their argument. Raises InputError for a call that does not fit, ArtifactError when an operator fails.
    """

    def __init__(self, program: Program, root: nn.Module, *, trains: bool = False) -> None:
        super().__init__()
        self.program = program
        self.root = root
        self.trains = trains
        self._plan = plan(program)
        self.training = False
        if any(module.training for module in root.modules()):
            root.eval()  # only where it is needed: it makes decoded tensors forget their values

    def train(self, mode: bool = True) -> ProgramModule:
        if mode and not self.trains:
            raise InputError("a model loaded without its class has no training mode; use pared.load(path, MyNet())")
        super().train(False)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program = self.program
        tensors = flatten_arguments(program, args, kwargs)
        self._check_dtypes(tensors)
        device = device_of(tensors, self.root)
        values = start(program, self._plan.late_reads, tensors, self.root)
        del tensors, args, kwargs
        n_inputs = len(program.inputs)
        write = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())
        for k, step in enumerate(self._plan.steps):
            for index in step.reads:
                values[index] = read_state(self.root, program.states[index - n_inputs].path)
            operands, named = step.arguments(values, device)
            function = step.function
            if write and step.in_place is not None and _may_write(operands):
                function = step.in_place
            try:
                values[program.first_node + k] = function(*operands, **named)
            except ParedError:
                raise
            except Exception as error:
                raise operator_failed(k, step.node, error) from error
            del operands, named
            for index in step.forgets:
                values[index] = None
        return rebuild(program.outputs, values)

    def _check_dtypes(self, tensors: list[Tensor]) -> None:
        for expected, tensor in zip(self.program.inputs, tensors, strict=True):
            if tensor.dtype != expected.dtype and not (
                tensor.is_floating_point() and expected.dtype.is_floating_point and tensor.dtype in self._own_dtypes()
            ):
                raise InputError(f"the input {expected.name} must be {expected.dtype}, got {tensor.dtype}")

    def _own_dtypes(self) -> set[torch.dtype]:
        """After half(), double() and the like, inputs of the new type fit."""
        return {t.dtype for t in (*self.root.parameters(), *self.root.buffers()) if t.is_floating_point()}


def operator_failed(k: int, node: Node, error: Exception) -> ArtifactError:
    """The error for a node whose operator raised."""
    lines = str(error).strip().splitlines()
    return ArtifactError(f"node {k} ({node.op}) failed: {lines[0] if lines else type(error).__name__}")
