"""What torch.export gives, rewritten as calls without side effects, numbered values and shared states."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from pared import lowered
from pared.errors import TraceError
from pared.graph.operators import DEVICE, SCALAR_NAMES, Ref, find
from pared.graph.program import CONSTANTS, Dynamic, Node, State, Symbol, leaves, map_leaves


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under each of its paths, parameters first."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@final
class Symbols:
    """The free axes of the inputs, numbered, with what export found to hold for them."""

    def __init__(self, exported: Any) -> None:
        self.ranges = dict(exported.range_constraints)
        self.table: list[Symbol] = []
        self.numbers: dict[Any, int] = {}
        self.remainders: dict[Any, tuple[int, int]] = {}
        for node in exported.graph.nodes:
            environment = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
            if environment is not None:
                for guard in environment.guards:
                    self._note(guard.expr)
                break

    def _note(self, expression: Any) -> None:
        """Remember size % multiple == remainder; the branch of the model that was traced holds for no other size."""
        from sympy import Eq, Integer

        if isinstance(expression, Eq) and isinstance(expression.rhs, Integer) and type(expression.lhs).__name__ in (
            "Mod", "PythonMod",
        ):  # fmt: skip
            size, multiple = expression.lhs.args
            if isinstance(multiple, Integer) and size.is_Symbol:
                self.remainders[size] = (int(multiple), int(expression.rhs))

    def shape(self, value: Tensor) -> tuple[int | Dynamic, ...]:
        return tuple(self._dim(d) for d in value.shape)

    def _dim(self, size: int | torch.SymInt) -> int | Dynamic:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_Integer:
            return int(expression)
        if expression not in self.numbers:
            self.numbers[expression] = len(self.table)
            self.table.append(self._symbol(expression))
        return Dynamic(self.numbers[expression])

    def _symbol(self, expression: Any) -> Symbol:
        bounds = self.ranges.get(expression)
        lower = _plain_int(getattr(bounds, "lower", None), 0)
        upper = _plain_int(getattr(bounds, "upper", None), None)
        multiple, remainder = self.remainders.get(expression, (1, 0))
        return Symbol(lower if lower is not None and lower > 2 else 0, upper, multiple, remainder)


def _plain_int(bound: Any, otherwise: int | None) -> int | None:
    return int(bound) if getattr(bound, "is_Integer", False) and int(bound) < 2**40 else otherwise


class Aliased(Exception):
    """Something is written in place that is visible under another name; torch has to take that apart."""


def _is_inactive_dropout(node: Any) -> bool:
    name = _overload_name(node.target)
    if name.partition(".")[0].rstrip("_") not in (
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
    ):
        return False
    return len(node.args) == 3 and (node.args[2] is False or node.args[1] == 0)


def remove_dropout(graph_module: Any) -> None:
    """Dropout gives back its very input in eval mode, which export does not know."""
    (output,) = [node for node in graph_module.graph.nodes if node.op == "output"]
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and _is_inactive_dropout(node) and output not in node.users:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def _overload_name(target: Any) -> str:
    """The name and overload of an operator of torch's own, such as conv2d.default, otherwise an empty text."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "pared"):
        return f"{target._schema.name.partition('::')[2]}.{target._overloadname}"
    return ""


@final
class Value:
    """An input (op "input"), a state ("state") or a call, during tracing."""

    __slots__ = ("args", "kwargs", "op", "val")

    def __init__(self, op: str, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, val: Any = None) -> None:
        self.op = op
        self.args = args
        self.kwargs = dict(kwargs or {})
        self.val = val


_DROPPED = ("_assert_async", "_assert_tensor_metadata", "_assert_scalar", "_functional_assert", "sym_constrain_range",
            "_functional_sym_constrain_range", "sym_constrain_range_for_size")  # fmt: skip
_IDENTITIES = ("alias", "detach", "detach_", "lift_fresh", "lift_fresh_copy", "lift", "alias_copy", "detach_copy")
_INTO_ZEROS = {
    "empty.memory_format": "aten.zeros.default", "empty_like.default": "aten.zeros_like.default",
    "new_empty.default": "aten.new_zeros.default",
}  # fmt: skip
_RANDOM = frozenset(
    """dropout dropout_ feature_dropout feature_dropout_ alpha_dropout alpha_dropout_ feature_alpha_dropout
    native_dropout rand randn rand_like randn_like randint randint_like randperm bernoulli bernoulli_ normal normal_
    uniform uniform_ multinomial poisson exponential_ random_ cauchy_ geometric_ log_normal_ binomial
    rrelu_with_noise""".split()
)
_KEEP_DTYPE = ("copy_", "fill_", "masked_fill_", "index_fill_", "zero_", "index_put_", "scatter_", "index_copy_")
_CHANGE_DTYPE = frozenset(
    "eq_ ne_ lt_ le_ gt_ ge_ logical_and_ logical_or_ logical_xor_ logical_not_ greater_ less_ not_equal_".split()
)


_WRITES = ("BUFFER_MUTATION", "PARAMETER_MUTATION")


@final
class Graph:
    """The exported graph as a list of calls without side effects; writes in place become new values.

    Raises Aliased when that needs torch's own functionalisation.
    """

    def __init__(self, exported: Any) -> None:
        self.exported = exported
        self.calls: list[Value] = []
        self.inputs: list[Value] = []
        self.replaced: dict[int, Value] = {}
        self.stale: set[int] = set()
        self.sharing: dict[int, list[Value]] = {}
        self.keep: list[Value] = []
        environment: dict[Any, Any] = {}
        specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs if hasattr(spec.arg, "name")}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                environment[node] = self._placeholder(node, specs[node.name])
        results = self._walk(exported.graph_module, environment)
        results = results if isinstance(results, list) else [results]
        specs_out = exported.graph_signature.output_specs
        self.written_states = [str(spec.target).removeprefix("model.") for spec in specs_out if spec.kind.name in _WRITES]
        self.outputs = [
            self._current(result) for result, spec in zip(results, specs_out, strict=True) if spec.kind.name == "USER_OUTPUT"
        ]

    def input_values(self) -> list[Any]:
        return [value.val for value in self.inputs]

    def _placeholder(self, node: Any, spec: Any) -> Value:
        kind = spec.kind.name
        value: Value
        if kind == "USER_INPUT":
            value = Value("input", (len(self.inputs),), val=node.meta["val"])
            self.inputs.append(value)
        elif kind in ("PARAMETER", "BUFFER"):
            value = Value("state", (spec.target.removeprefix("model."),), val=node.meta["val"])
        elif kind == "CONSTANT_TENSOR":
            value = Value("state", (self.exported.constants[spec.target],), val=node.meta["val"])
        else:
            raise TraceError(f"the model uses an object that is not a tensor in its graph ({kind.lower()})")
        self._register(value)
        return value

    def _register(self, value: Value) -> None:
        self.keep.append(value)
        for tensor in value.val if isinstance(value.val, list | tuple) else [value.val]:
            if isinstance(tensor, Tensor):
                self.sharing.setdefault(_storage(tensor), []).append(value)

    def _current(self, value: Any) -> Any:
        """The value that now stands where `value` was, after writes in place."""
        if isinstance(value, Value):
            while id(value) in self.replaced:
                value = self.replaced[id(value)]
            if id(value) in self.stale:
                raise Aliased
        return value

    def _walk(self, graph_module: Any, environment: dict[Any, Any]) -> Any:
        for node in graph_module.graph.nodes:
            if node.op == "call_function":
                environment[node] = self._call(graph_module, node, environment)
            elif node.op == "get_attr":
                environment[node] = self._attribute(graph_module, node)
            elif node.op == "output":
                return self._argument(node.args[0], environment)
        raise TraceError("the graph has no output")

    def _attribute(self, graph_module: Any, node: Any) -> Any:
        held = operator.attrgetter(node.target)(graph_module)
        if isinstance(held, Tensor):
            value = Value("state", (held,), val=node.meta.get("val", held))
            self._register(value)
            return value
        return held

    def _argument(self, value: Any, environment: Mapping[Any, Any]) -> Any:
        if isinstance(value, torch.fx.Node):
            return self._current(environment[value])
        if isinstance(value, list | tuple):
            return [self._argument(v, environment) for v in value]
        if isinstance(value, torch.device):
            return DEVICE
        if isinstance(value, torch.layout):
            if value != torch.strided:
                raise TraceError(f"the model makes tensors of layout {value}; only dense ones can be stored")
            return None
        return value

    def _call(self, graph_module: Any, node: Any, environment: Mapping[Any, Any]) -> Any:
        target = node.target
        name = _overload_name(target)
        base = name.partition(".")[0]
        if base.startswith(_DROPPED):
            return None
        args = tuple(self._argument(a, environment) for a in node.args)
        kwargs = {key: self._argument(a, environment) for key, a in node.kwargs.items()}
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._inline(target, args)
        if target is operator.getitem:
            if isinstance(args[0], list):
                return args[0][args[1]]
            return self._add(Value("operator.getitem", args, val=node.meta.get("val")))
        if not name:
            scalar = SCALAR_NAMES.get(target) if callable(target) else None
            if scalar is None:
                raise TraceError(f"the model uses {target}, which no program can hold")
            return self._add(Value(f"operator.{scalar}", args, kwargs, node.meta.get("val")))
        if base in _IDENTITIES or (base.rstrip("_").endswith("dropout") and _is_inactive_dropout(node)):
            return args[0]
        if base in _RANDOM:
            raise TraceError(f"the model draws random numbers in eval mode ({base}); make it deterministic when not training")
        val = node.meta.get("val")
        if base == "to" and _is_same(args[0].val, val):
            return args[0]
        if name == "slice.Tensor" and _is_whole_slice(args):
            return args[0]
        if name == "slice_scatter.default" and _is_whole_slice((args[0], *args[2:])) and args[1].val.dtype == args[0].val.dtype:
            return args[1]
        if name == "clone.default" and len(args) == 1 and not kwargs and str(args[0].val.stride()) == str(val.stride()):
            return args[0]
        if target.namespace == "pared" and base in lowered.OPERATORS:
            return self._add(Value(f"pared.{name}", args, kwargs, val))
        if target.namespace == "pared":
            return self._add(Value(f"aten.{base}.input", args, kwargs, val))
        if name == "_native_batch_norm_legit_no_training.default":
            value = self._add(Value("aten.batch_norm.default", (*args[:5], False, args[5], args[6], True), kwargs, val[0]))
            return [value, None, None]
        if name == "batch_norm.default":
            args = (*args[:8], True)  # whether cuDNN may be used depends on where it was traced
        if target._schema.is_mutable:
            return self._write(name, args, kwargs, node)
        return self._add(Value(_INTO_ZEROS.get(name, f"aten.{name}"), args, kwargs, val))

    def _add(self, value: Value) -> Value:
        self.calls.append(value)
        self._register(value)
        return value

    def _inline(self, target: Any, args: tuple[Any, ...]) -> Any:
        """Regions that change nothing in inference: other gradient modes, autocast switched off, checkpointing."""
        name = target.name()
        if name == "wrap_with_set_grad_enabled":
            body, operands = args[1], args[2:]
        elif name == "wrap_with_autocast" and (args[2] is False or args[0] != "cpu"):
            body, operands = args[4], args[5:]
        elif name in ("tag_activation_checkpoint", "wrap_activation_checkpoint"):
            body, operands = args[0], args[1:]
        else:
            raise TraceError(f"the model uses {name}, which no program can hold; write it with plain operators")
        if not isinstance(body, torch.fx.GraphModule):
            raise TraceError(f"the model uses {name}, which no program can hold; write it with plain operators")
        places = [node for node in body.graph.nodes if node.op == "placeholder"]
        return self._walk(body, dict(zip(places, operands, strict=True)))

    def _write(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], node: Any) -> Value:
        base, _, overload = name.partition(".")
        functional = f"aten.{base[:-1]}.{overload}"
        written = args[0]
        if (
            not base.endswith("_") or base in _CHANGE_DTYPE or not isinstance(written, Value) or written.op == "state"
            or find(functional) is None or not isinstance(written.val, Tensor)
            or len(find(functional).arguments) != len(node.target._schema.arguments)  # type: ignore[union-attr]
        ):  # fmt: skip
            raise Aliased
        others = [v for v in leaves([*args[1:], *kwargs.values()]) if isinstance(v, Value)]
        dtype = written.val.dtype
        if base not in _KEEP_DTYPE and any(isinstance(v.val, Tensor) and v.val.dtype != dtype for v in others):
            raise Aliased
        if base not in _KEEP_DTYPE and not dtype.is_floating_point and any(isinstance(a, float) for a in args[1:]):
            raise Aliased
        for value in self.sharing.get(_storage(written.val), []):
            if value is not written and id(value) not in self.replaced:
                if value.op == "state":
                    raise Aliased
                self.stale.add(id(value))
        result = self._add(Value(functional, args, kwargs, node.meta["val"]))
        self.replaced[id(written)] = result
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_same(before: Any, after: Any) -> bool:
    return (
        isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype
        and before.device == after.device and _storage(before) == _storage(after)
    )  # fmt: skip


def _is_whole_slice(args: tuple[Any, ...]) -> bool:
    start, end, step = (list(args) + [0, None, None, 1][len(args) - 1 :])[2:]
    return start in (None, 0) and (end is None or (type(end) is int and end == 2**63 - 1)) and step == 1


def numbered(
    model: nn.Module, graph: Graph, outputs: Any, n_inputs: int
) -> tuple[dict[str, Tensor], tuple[State, ...], tuple[Node, ...], Any]:
    """Calls that an output needs, as nodes; states in order of first use, shared ones once."""
    needed = _needed(graph.calls, outputs)
    calls = [call for call in graph.calls if id(call) in needed]
    table = StateTable(model)
    for value in leaves([*(v for c in calls for v in (list(c.args), list(c.kwargs.values()))), outputs]):
        if isinstance(value, Value) and value.op == "state":
            table.add(value)
    first_node = n_inputs + len(table.states)
    numbers = {id(value): value.args[0] for value in graph.inputs}
    numbers.update({key: n_inputs + k for key, k in table.numbers.items()})
    numbers.update({id(call): first_node + k for k, call in enumerate(calls)})

    def refer(leaf: Any) -> Any:
        return Ref(numbers[id(leaf)]) if isinstance(leaf, Value) else leaf

    nodes = [_node(k, c.op, map_leaves(refer, c.args), map_leaves(refer, c.kwargs)) for k, c in enumerate(calls)]
    used = {state.path for state in table.states}
    carried = next((path for path in graph.written_states if table.canonical.get(path) in used), None)
    if carried is not None:
        raise TraceError(
            f"the model writes into its state {carried} in eval mode and reads it, so its outputs depend on earlier "
            "calls; pass that state in and out instead"
        )
    return table.constants, tuple(table.states), tuple(nodes), map_leaves(refer, outputs)


def _needed(calls: Sequence[Value], outputs: Any) -> set[int]:
    needed = {id(v) for v in leaves(outputs) if isinstance(v, Value)}
    for call in reversed(calls):
        if id(call) in needed:
            needed.update(id(v) for v in leaves([list(call.args), list(call.kwargs.values())]) if isinstance(v, Value))
    return needed


def _node(k: int, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    listed = find(op)
    if listed is None:
        raise TraceError(f"the model uses the operator {op.removesuffix('.default')}, which no program can hold")
    if op == "operator.getitem":
        return Node(op, args, {})
    if kwargs.get("pin_memory") is False:
        del kwargs["pin_memory"]
    if op == "aten.slice.Tensor":
        args = (
            *args[:2],
            *(None if a == end else a for a, end in zip(args[2:4], (0, 2**63 - 1), strict=False)),
            *args[4:],
        )
    try:
        return Node(op, *listed.trim(args, kwargs))
    except ValueError as error:
        raise TraceError(f"node {k} of the graph cannot be stored: {error}") from error


@final
class StateTable:
    """States in order of first use. Owners of one storage share a number; constants of the code get a path."""

    def __init__(self, model: nn.Module) -> None:
        self.states: list[State] = []
        self.numbers: dict[int, int] = {}
        self.constants: dict[str, Tensor] = {}
        self.by_path: dict[str, int] = {}
        self.by_content: dict[Any, str] = {}
        self.tensors = dict(named_state(model))
        self.parameters = {path for path, _ in model.named_parameters(remove_duplicate=False)}
        self.persistent = set(model.state_dict(keep_vars=True))
        self.first: dict[Any, str] = {}
        self.canonical = {path: self.first.setdefault(_identity(t), path) for path, t in self.tensors.items()}
        if CONSTANTS in dict(model.named_children()):
            raise TraceError(f"the model has a child called {CONSTANTS}, which is reserved; rename it")

    def add(self, value: Value) -> None:
        held = value.args[0]
        path = self.canonical[held] if isinstance(held, str) else self._constant(held)
        if path not in self.by_path:
            self.by_path[path] = len(self.states)
            self.states.append(State(path, self._role(path)))
        self.numbers[id(value)] = self.by_path[path]

    def _role(self, path: str) -> Any:
        if path in self.parameters:
            return "parameter"
        if path in self.persistent:
            return "buffer"
        if path in self.tensors:
            self.constants[path] = self.tensors[path].detach().clone()
        return "constant"

    def _constant(self, tensor: Tensor) -> str:
        known = self.first.get(_identity(tensor))
        if known is not None:
            return known
        tensor = tensor.detach().contiguous().cpu()
        content = (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        if content not in self.by_content:
            path = f"{CONSTANTS}.{len(self.by_content)}"
            self.by_content[content] = path
            self.constants[path] = tensor.clone()
        return self.by_content[content]


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that are the same memory read in the same way."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
