"""Any module as a program: exported by torch.export, then rewritten into the closed list of operators."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from pared.collector import paused
from pared.errors import ArtifactError, InputError, ParedError, TraceError
from pared.graph.exported import Aliased, Graph, Symbols, named_state, numbered, remove_dropout
from pared.graph.program import UNSUPPLIED, Dynamic, Input, Parameter, Program, Slot, map_leaves
from pared.graph.substitutes import Substitutes

AxisKey = int | str | tuple[int | str, ...]


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Mapping[AxisKey, Iterable[int]] | None = None,
) -> Program:
    """The program of `model` in eval mode, from one example call.

    The batch is free in the program unless the model fixes it, which `static_reason` then says: axis 0 of the first
    tensor and of those with the same size there. `dynamic` names further free axes, by position, name or path of the
    input: {0: {2, 3}, "mask": {1}, ("batch", "ids"): {1}}. The model is left as it was. Raises InputError for an
    example that cannot be used, TraceError when there is no graph.
    """
    call = _Call(model, args, dict(kwargs or {}))
    axes = call.axes(dynamic or {})
    with _undisturbed(model), paused():
        expected = _Outputs(_run(model, call, call.tensors))
        errors: list[ParedError] = []
        fixed: Program | None = None
        for attempt in _attempts(model, call, axes):
            if fixed is not None and attempt.leader is None:
                break
            try:
                program, batch_symbol = _traced(model, call, attempt, expected)
            except TraceError as error:
                errors.append(error)
                continue
            if batch_symbol is not None or not call.batch_leaders:
                return program
            fixed = fixed or program
        if fixed is None:
            raise errors[0]
        reason = "the model has no graph for a free batch" if errors else "the model fixes the size of the batch"
        return Program(
            fixed.parameters,
            fixed.inputs,
            fixed.symbols,
            fixed.states,
            fixed.nodes,
            fixed.outputs,
            fixed.constants,
            reason,
        )


@final
@dataclasses.dataclass(frozen=True)
class _Attempt:
    """An example to export with, the axes to leave free, and the input whose axis 0 is taken for the batch."""

    tensors: list[Tensor]
    free: list[set[int]]
    leader: int | None


def _attempts(model: nn.Module, call: _Call, axes: list[set[int]]) -> Iterator[_Attempt]:
    """What to try, the freest first; a batch of one is repeated, for export takes 1 for a constant."""
    for leader in call.batch_leaders:
        tensors = _larger_batch(model, call, leader)
        if tensors is None:
            continue
        size = tensors[leader].shape[0]
        leading = [a | ({0} if t.dim() and t.shape[0] == size else set()) for a, t in zip(axes, tensors, strict=True)]
        yield _Attempt(tensors, leading, leader)
        anywhere = [
            a if k == leader else a | {i for i, n in enumerate(t.shape) if n == size}
            for k, (a, t) in enumerate(zip(leading, tensors, strict=True))
        ]
        if anywhere != leading:
            yield _Attempt(tensors, anywhere, leader)
    if any(axes):
        yield _Attempt(call.tensors, axes, None)
    yield _Attempt(call.tensors, [set() for _ in axes], None)


def _larger_batch(model: nn.Module, call: _Call, leader: int) -> list[Tensor] | None:
    if call.tensors[leader].shape[0] > 1:
        return call.tensors

    def repeat(tensor: Tensor, axis: int) -> Tensor:
        return torch.cat([tensor, tensor], axis)

    along_first = [repeat(t, 0) if t.dim() and t.shape[0] == 1 else t for t in call.tensors]
    states_second = [
        repeat(t, 1) if k != leader and t.dim() == 3 and t.shape[1] == 1 else u
        for k, (t, u) in enumerate(zip(call.tensors, along_first, strict=True))
    ]
    for tensors in (along_first, states_second):
        try:
            _run(model, call, tensors)
        except TraceError:
            continue
        return tensors
    return None


def _run(model: nn.Module, call: _Call, tensors: Sequence[Tensor]) -> Any:
    args, kwargs = call.rebuild([t.clone() for t in tensors])
    try:
        return model(*args, **kwargs)
    except Exception as error:
        raise TraceError(f"{call.model_name} does not run on the example: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients and without fused attention; afterwards the model is exactly as before."""
    modules = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in model.modules()]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, attributes, parameters, own_buffers, children in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            pairs: list[tuple[Any, Any]] = [
                (module._parameters, parameters),
                (module._buffers, own_buffers),
                (module._modules, children),
            ]
            for held, before in pairs:
                if _differ(held, before):
                    held.clear()
                    held.update(before)
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What torch logs about a failed export is in the error that is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _differ(held: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return list(held) != list(before) or any(held[name] is not before[name] for name in before)


@final
class _Call:
    """The example call, bound to the parameters of forward and flattened into tensors and constants."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model_name = type(model).__name__
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"the example does not fit the forward of {self.model_name}: {error}") from error
        self.tensors: list[Tensor] = []
        self.paths: list[tuple[int | str, ...]] = []
        self.parameters: list[Parameter] = []
        self.positions: dict[tuple[int | str, ...], int] = {}
        roles: dict[Any, str] = {
            inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**",
            inspect.Parameter.KEYWORD_ONLY: "keyword",
        }  # fmt: skip
        supplied = [name for name in signature.parameters if name in bound.arguments]
        for i, (name, parameter) in enumerate(signature.parameters.items()):
            if not supplied or i > list(signature.parameters).index(supplied[-1]):
                break
            role: Any = roles.get(parameter.kind, "positional")
            if role == "*":
                self.positions.update({(name, k): i + k for k in range(len(bound.arguments.get(name, ())))})
            elif role == "positional":
                self.positions[(name,)] = i
            tree: Any
            if name in bound.arguments and role == "**":
                tree = {key: self._flatten(value, (key,)) for key, value in bound.arguments[name].items()}
            elif name in bound.arguments:
                tree = self._flatten(bound.arguments[name], (name,))
            elif role in ("*", "**"):
                tree = () if role == "*" else {}
            else:
                default = parameter.default
                tree = default if default is None or type(default) in (bool, int, float, str) else UNSUPPLIED
            self.parameters.append(Parameter(name, role, tree))
        if not self.tensors:
            raise InputError(f"the example for {self.model_name} must hold at least one tensor")
        sizes = {k: t.shape[0] for k, t in enumerate(self.tensors) if t.dim() and t.shape[0]}
        commonest = max(sizes.values(), key=list(sizes.values()).count, default=0)
        likely = [k for k in sizes][:1] + [k for k, size in sizes.items() if size == commonest][:1]
        self.batch_leaders = list(dict.fromkeys(likely))

    def _flatten(self, value: Any, path: tuple[int | str, ...]) -> Any:
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized:
                raise InputError(f"the input {_dotted(path)} must be a dense tensor, got {value.layout}")
            self.tensors.append(value.detach().contiguous())
            self.paths.append(path)
            return Slot(len(self.tensors) - 1)
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (list, tuple):
            return type(value)(self._flatten(v, (*path, i)) for i, v in enumerate(value))
        if isinstance(value, dict) and all(type(key) in (int, str) for key in value):
            return {key: self._flatten(v, (*path, key)) for key, v in value.items()}
        raise InputError(
            f"the input {_dotted(path)} of {self.model_name} must be made of tensors, numbers, texts, tuples, lists "
            f"and dicts, got {type(value).__name__}; pass its tensors instead"
        )

    def axes(self, dynamic: Mapping[AxisKey, Iterable[int]]) -> list[set[int]]:
        """For every tensor, the axes that the caller asked to be free."""
        names: dict[AxisKey, int] = {}
        for k, path in enumerate(self.paths):
            by_position = [(i, *path[len(start) :]) for start, i in self.positions.items() if path[: len(start)] == start]
            for full in (path, *by_position):
                names[full] = k
                names[".".join(map(str, full))] = k
                if len(full) == 1:
                    names[full[0]] = k
        found: list[set[int]] = [set() for _ in self.tensors]
        for key, axes in dynamic.items():
            if key not in names:
                known = ", ".join(_dotted(path) for path in self.paths)
                raise InputError(f"no input tensor is called {key!r}; there are: {known}")
            tensor = self.tensors[names[key]]
            for axis in axes:
                if not -tensor.dim() <= axis < tensor.dim():
                    raise InputError(f"the input {key!r} has {tensor.dim()} axes, so {axis} is none of them")
                found[names[key]].add(axis % tensor.dim())
        return found

    def rebuild(self, tensors: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments with the tensors put in."""

        def fill(tree: Any) -> Any:
            return map_leaves(lambda leaf: tensors[leaf.index] if isinstance(leaf, Slot) else leaf, tree)

        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        by_position = True
        for parameter in self.parameters:
            if parameter.tree is UNSUPPLIED:
                by_position = False
            elif parameter.role == "*":
                args += fill(parameter.tree)
            elif parameter.role == "**":
                kwargs.update(fill(parameter.tree))
            elif parameter.role == "positional" and by_position:
                args.append(fill(parameter.tree))
            else:
                kwargs[parameter.name] = fill(parameter.tree)
        return args, kwargs


def _dotted(path: tuple[int | str, ...]) -> str:
    return str(path[0]) + "".join(f"[{part!r}]" for part in path[1:])


@final
class _Outputs:
    """What a model returned, flattened: `tensors` (and symbolic sizes), and `tree` with a Slot for each.

    Subclasses of dict, dataclasses and other objects become plain dicts.
    """

    def __init__(self, value: Any) -> None:
        self.tensors: list[Any] = []
        self.enclosing: list[int] = []
        self.tree = self._flatten(value)
        if not self.tensors:
            raise TraceError(f"a model must return at least one tensor, got {type(value).__name__}")

    def _flatten(self, value: Any) -> Any:
        if isinstance(value, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
            self.tensors.append(value)
            return Slot(len(self.tensors) - 1)
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Mapping):
            for key in value:
                if type(key) not in (int, str):
                    raise TraceError(f"the keys of returned dicts must be texts or whole numbers, got {key!r}")
            return {key: self._flatten(v) for key, v in value.items()}
        if isinstance(value, list):
            return [self._flatten(v) for v in value]
        if isinstance(value, tuple):
            return tuple(self._flatten(v) for v in value)
        if dataclasses.is_dataclass(value):
            return {field.name: self._flatten(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return self._flatten_object(value)

    def _flatten_object(self, value: Any) -> dict[str, Any]:
        """An object of another class, such as a cache of keys and values: its attributes that hold tensors."""
        held: dict[str, Any] = {}
        self.enclosing.append(id(value))
        for name, attribute in getattr(value, "__dict__", {}).items():
            n_before = len(self.tensors)
            if isinstance(attribute, nn.Module) or id(attribute) in self.enclosing or len(self.enclosing) > 8:
                continue
            try:
                tree = self._flatten(attribute)
            except TraceError:
                del self.tensors[n_before:]
                continue
            if len(self.tensors) > n_before:
                held[name] = tree
        self.enclosing.pop()
        if not held:
            raise TraceError(f"a model must return tensors, numbers, texts, tuples, lists or dicts, got {type(value).__name__}")
        return held


class _Flat(nn.Module):
    """The model as a function from tensors to tensors, so that structures stay outside of the export."""

    def __init__(self, model: nn.Module, call: _Call, record: Callable[[_Outputs], None]) -> None:
        super().__init__()
        self.model = model
        self.rebuild = call.rebuild
        self.record = record

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        args, kwargs = self.rebuild(tensors)
        outputs = _Outputs(self.model(*args, **kwargs))
        self.record(outputs)
        return tuple(outputs.tensors)


def _traced(model: nn.Module, call: _Call, attempt: _Attempt, expected: _Outputs) -> tuple[Program, int | None]:
    """The program of one export, checked against the model, and the symbol of the batch axis if that is free."""
    recorded: list[_Outputs] = []
    flat = _Flat(model, call, recorded.append)
    spec = tuple({axis: torch.export.Dim.AUTO for axis in axes} or None for axes in attempt.free)
    try:
        with Substitutes(), contextlib.redirect_stderr(io.StringIO()):  # a failed export prints its graph
            exported = torch.export.export(
                flat, tuple(t.clone() for t in attempt.tensors), dynamic_shapes={"tensors": spec}, strict=False
            )
            try:
                graph = Graph(exported)
            except Aliased:
                remove_dropout(exported.graph_module)
                exported = exported.run_decompositions({})
                graph = Graph(exported)
    except ParedError:
        raise
    except Exception as error:
        raise TraceError(
            f"{call.model_name} has no graph: {_first_line(error)}. Its forward must not branch in Python on the "
            "values of tensors; rewrite that place (torch.where)"
        ) from error
    symbols = Symbols(exported)
    inputs = [
        Input(_dotted(path), t.dtype, symbols.shape(value))
        for path, t, value in zip(call.paths, attempt.tensors, graph.input_values(), strict=True)
    ]
    outputs = map_leaves(lambda leaf: graph.outputs[leaf.index] if isinstance(leaf, Slot) else leaf, recorded[-1].tree)
    batch = inputs[attempt.leader].shape[0] if attempt.leader is not None else None
    batch_symbol = batch.symbol if isinstance(batch, Dynamic) else None
    constants, states, nodes, tree = numbered(model, graph, outputs, len(inputs))

    def build() -> Program:
        return Program(
            tuple(call.parameters), tuple(inputs), tuple(symbols.table), states, nodes, tree, constants,
            max_bytes=2**62,
        )  # fmt: skip

    try:
        program = build()
    except ArtifactError as error:
        raise TraceError(f"{call.model_name} has no graph that can be stored: {error}") from error
    root = program.root(dict(named_state(model))).to(call.tensors[0].device)
    _verify(program, root, call, call.tensors, expected)
    if batch_symbol is not None and not _works_for_one(program, root, model, call, attempt.tensors, batch_symbol):
        old = symbols.table[batch_symbol]
        symbols.table[batch_symbol] = dataclasses.replace(old, smallest=max(2, old.smallest))
        program = build()
    return program, batch_symbol


def _verify(program: Program, root: nn.Module, call: _Call, tensors: Sequence[Tensor], expected: _Outputs) -> None:
    args, kwargs = call.rebuild([t.clone() for t in tensors])
    try:
        found = _Outputs(program.module(root)(*args, **kwargs))
    except ParedError as error:
        raise TraceError(f"the graph of {call.model_name} does not run: {error}") from error
    if found.tree != expected.tree or not all(map(_agree, found.tensors, expected.tensors)):
        raise TraceError(
            f"the graph of {call.model_name} gives other outputs than the model: its forward depends on more than its "
            "inputs and its state; make it deterministic"
        )


def _agree(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor):
        return bool(found == expected)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


def _works_for_one(
    program: Program, root: nn.Module, model: nn.Module, call: _Call, tensors: Sequence[Tensor], symbol: int
) -> bool:
    """Whether the program is right for one example, which export never tries."""
    single = list(tensors)
    for k, given in enumerate(program.inputs):
        for axis, size in enumerate(given.shape):
            if size == Dynamic(symbol):
                single[k] = single[k].narrow(axis, 0, 1).contiguous()
    try:
        expected = _Outputs(_run(model, call, single))
    except TraceError:
        return True
    try:
        _verify(program, root, call, single, expected)
    except TraceError:
        return False
    return True
