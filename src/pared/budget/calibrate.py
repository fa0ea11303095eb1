"""Statistics from calibration data: how much the loss feels each tensor of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pared.budget.moments import Matrix, Moment, aside, is_wide, rescaled
from pared.budget.products import Product, Rows, product_of
from pared.errors import InputError, ParedError, TraceError
from pared.graph import Eager, Interpreted, Node, Operand, Program, trace
from pared.graph.operators import find
from pared.graph.program import Dynamic
from pared.site import duplicate, tensor_sites
from pared.statistics import Curvature, Diagonal, Kronecker, Layout, Statistics, load, save
from pared.task import Batch, Task, batch_size, class_logits, float_outputs, output_weights, to_device_of

__all__ = ["gather", "load", "save"]

N_EXAMPLES = 512
IGNORED = -100
"""The target that cross entropy leaves out."""

HELD = 2**30
"""Numbers in the matrices of one pass over the calibration data. Where there are more, there are more passes, each for some
neighbouring layers, and what is done waits in a file."""

_PART = 4
_FLOATS = 2**28
_MACS = 2e11
_WORK = 2e10
"""Multiply-adds spent on one matrix: of wide ones a sample of the positions is used, never fewer than 4 per column."""

Progress = Callable[[dict[str, Any]], None]


def gather(
    model: nn.Module,
    task: Task,
    *,
    program: Program | None = None,
    n_examples: int | None = None,
    seed: int = 0,
    shrink: bool = True,
    progress: Progress | None = None,
    held: int = HELD,
    folder: Path | None = None,
) -> Statistics:
    """Curvature of the task's loss for every tensor of the model, from calibration data.

    Uses as a matrix (linear, convolution, embedding, each gate of a recurrent layer): A = the mean over examples of the
    sum over positions of x x^T, G = the mean over examples and positions of g g^T. All other uses (biases, gains,
    norms, bare parameters): the squared gradient. Gradients start at the outputs from random vectors whose second
    moment is the Fisher matrix diag(p) - p p^T of the model's own prediction, at every position: sqrt(p) s - p (sqrt(p)
    . s) with random signs s. A label drawn from p has the same moment, but a confident model nearly always draws the
    one label that tells nothing. For losses other than cross entropy the outputs are moved by a standard normal, each in
    units of its own variance. Where
    a weight is used at several positions, G is scaled so that the trace is that of the whole gradient.

    Args:
        model: in eval mode, without coded tensors (`pared.site.plain`); it is not changed.
        program: its graph; traced from the first calibration batch when None. A model without graph is run as it is: then
            parameters that it rearranges before use, and those within Python functions of torch (multi-head attention,
            packed sequences), have squared gradients only.
        n_examples: at most so many examples; when None 512, fewer (not below 32) where one takes more than 4e8 MACs.
        seed: of the random signs and positions.
        shrink: move the moments towards the same for all directions, as far as two halves of the data disagree; where the
            data come in one part only, they stay as they are.
        held: numbers of matrices that are in memory at a time; more need more passes, which give the same.
        folder: for files of matrices that wait, if there are several passes; default: that of the system's temporary files.

    Raises:
        TraceError: the model has no graph, and gradients do not pass through it as it runs either.
        InputError: a batch does not fit the graph.
    """
    batches = list(task.calibration(n_examples or N_EXAMPLES))
    if not batches:
        raise InputError("calibration data must hold at least one example, got none; check Task.calibration")
    if program is None:
        args, kwargs = task.call(model, _slice(batches[0], 0, 2))
        try:
            program = trace(model, args, kwargs)
        except TraceError as reason:
            program, unseen = None, reason
    calibration = _Calibration(model, task, program, batches, seed, shrink, n_examples is None, held, folder)
    say = progress or (lambda event: None)
    return calibration.run(say) if program is not None else _eagerly(calibration, say, unseen)


def _eagerly(calibration: _Calibration, progress: Progress, reason: TraceError) -> Statistics:
    """Of a model without graph, for which anything may go wrong that does not where there is one."""
    try:
        return calibration.run(progress)
    except ParedError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TraceError(f"{reason}; and it cannot be calibrated as it runs: {said}") from error


class _Calibration:
    def __init__(
        self, model: nn.Module, task: Task, program: Program | None, batches: list[Batch], seed: int, shrink: bool, thrifty: bool,
        held: int, folder: Path | None,
    ) -> None:  # fmt: skip
        self.task, self.program, self.batches = task, program, batches
        self.held, self.folder = held, folder
        self.seed, self.random = seed, torch.Generator()
        self.shrink = shrink
        self.total = sum(batch_size(batch) for batch in batches)
        self.thrifty = thrifty
        self.n_seen = self.n_parts = 0
        # leaves of their own: the model's parameters keep their gradients and flags
        if program is None:
            self.root = duplicate(model)
            state = dict(_named(self.root))
            for leaf in state.values():
                leaf.grad = None
                leaf.requires_grad_(isinstance(leaf, nn.Parameter) and leaf.is_floating_point())
        else:
            state = _leaves(model)
            self.root = program.root(state)
        self.names = {path: site.path for site in tensor_sites(model) for path in site.paths}
        self.leaves = {path: state[path] for path in dict.fromkeys(self.names.values())}
        for path, leaf in self.leaves.items():
            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(lambda leaf, path=path: self._see_whole(path, leaf))
        self.device = next((leaf.device for leaf in state.values()), torch.device("cpu"))
        self.matrices: dict[tuple[str, Layout], Matrix] = {}
        self.squares: dict[str, Moment] = {}
        self.slopes: dict[str, Tensor] = {}
        self.norms: dict[str, _Norm] = {}
        self.positions: dict[str, float] = {}
        self.mixed: set[str] = set()
        self.products: set[str] = set()
        self.energy: dict[str, float] = {}
        self.sizes: dict[str, int] = {}
        """Numbers in the matrices of every tensor, in the order of their first use."""
        self.block: set[str] = set()
        """Tensors whose matrices this pass gathers; the first one also those that the scout did not see."""
        self.is_first = True
        self.n_floats = self.n_now = 0
        self.scouting = False
        self.weights = [] if task.classifies else _weights(model, task, batches[0])

    @property
    def static_reason(self) -> str | None:
        """Why the batch is fixed, if it is."""
        return self.program.static_reason if self.program is not None else None

    @property
    def half(self) -> int:
        """Which half of the data this part belongs to: about eight runs of neighbours, which may be alike, in turn."""
        return self.n_parts // max(1, self.total // (8 * (self.part_size or batch_size(self.batches[0])))) % 2

    def run(self, progress: Progress) -> Statistics:
        if self.program is None:
            twin: nn.Module = Eager(self.root, self._observe)
        else:
            twin = Interpreted(self.program, self.root, self._observe)
        self._scout(twin.eval())
        terms: dict[str, list[Kronecker | Diagonal]] = {path: [] for path in self.leaves}
        blocks = self._blocks()
        for number, block in enumerate(blocks):
            self.block, self.is_first = block, number == 0
            self._pass(twin, number, len(blocks), progress)
            for path, found in self._terms().items():
                terms[path] += found if len(blocks) == 1 else (aside(term, self.folder) for term in found)
            if self.is_first:  # all but matrices is known
                feeling = [leaf.requires_grad_(False) for leaf in self.leaves.values() if leaf.requires_grad]
        for leaf in feeling:
            leaf.requires_grad_()
        return self._statistics(terms, progress)

    def _blocks(self) -> list[set[str]]:
        """Neighbouring tensors whose matrices are gathered in one pass."""
        blocks: list[set[str]] = [set()]
        room = self.held
        for path, size in self.sizes.items():
            if size > room and blocks[-1]:
                blocks.append(set())
                room = self.held
            blocks[-1].add(path)
            room -= size
        return blocks

    def _pass(self, twin: nn.Module, number: int, of: int, progress: Progress) -> None:
        """Over all calibration data, with the same random numbers each time."""
        self.random.manual_seed(self.seed)
        self.n_seen = self.n_parts = 0
        self.positions.clear()
        for batch in self.batches:
            for part in self._parts(batch):
                self.n_now = batch_size(part)
                self._propagate(self.task.outputs(twin, part), part)
                if self.is_first:
                    self._collect()
                self.n_seen += self.n_now
                self.n_parts += 1
                done = number * self.total + min(self.n_seen, self.total)
                progress({"doing": "calibrating", "done": done, "total": of * self.total})
                if self.n_seen >= self.total:
                    return
        if not self.n_seen:
            raise InputError(
                f"the model fixes the batch at {self.part_size} ({self.static_reason}), but no calibration "
                "batch holds so many examples; use that batch size"
            )

    def _scout(self, twin: nn.Module) -> None:
        """One forward pass that finds out how large parts may be, and which tensors are also used otherwise."""
        fixed, free = self._leading_axes()
        size = batch_size(self.batches[0])
        self.part_size: int | None = fixed if fixed is not None else (1 if free else None)
        if fixed is not None and fixed > size:
            return
        self.scouting = True
        floating = [leaf.requires_grad_(False) for leaf in self.leaves.values() if leaf.requires_grad]
        whole = to_device_of(self.root, self.batches[0])
        first = whole if self.part_size in (None, size) else _slice(whole, 0, self.part_size or size)
        try:
            outputs = self.task.outputs(twin, first)
        except Exception:  # code without graph may want whole batches; if it is something else, it comes up again
            if self.program is not None:
                raise
            self.part_size, free, first = None, False, whole
            self.n_floats, self.positions = 0, {}
            outputs = self.task.outputs(twin, first)
        if self.program is None:  # other batches may take other branches
            floats, positions = self.n_floats, dict(self.positions)
            for batch in self.batches[1:]:
                self.task.outputs(twin, to_device_of(self.root, batch))
            self.n_floats, self.positions = floats, positions
        logits = 4 * class_logits(outputs, first)[0].numel() if self.task.classifies else 0
        self.scouting = False
        for leaf in floating:
            leaf.requires_grad_()
        if self.thrifty:
            macs = sum(n * self.leaves[path].numel() for path, n in self.positions.items()) / batch_size(first)
            self.total = min(self.total, max(32, int(_MACS / max(macs, 1.0))))
        self.matrices.clear()
        if free:
            self.part_size = max(1, min(_PART, int(_FLOATS / max(1, self.n_floats + logits))))

    def _leading_axes(self) -> tuple[int | None, bool]:
        """The batch size if the program fixes it; whether the batch is free and the first axis of every input."""
        if self.program is None:
            return None, True
        shapes = [given.shape for given in self.program.inputs if given.shape]
        leading = {shape[0] for shape in shapes}
        if len(leading) != 1:
            return None, False
        (axis,) = leading
        if not isinstance(axis, Dynamic):
            return axis, False
        return None, not any(axis in shape[1:] for shape in shapes)

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """Small batches: each gives one sample of the gradients that are not kept per example."""
        batch = to_device_of(self.root, batch)
        size = batch_size(batch)
        if self.part_size is None or self.part_size == size:
            yield batch
            return
        for start in range(0, size, self.part_size):
            stop = min(start + self.part_size, size)
            if self.static_reason is None or stop - start == self.part_size:
                yield _slice(batch, start, stop)

    # -- forward: inputs -----------------------------------------------------------------------------------------------

    def _observe(self, index: int, node: Node, op: str, inputs: list[Any], run: Callable[..., Any]) -> Any:
        product = product_of(op, node, inputs)
        if product is not None:
            return self._observe_product(product, inputs, run)
        if op.split(".")[1] in ("batch_norm", "_native_batch_norm_legit_no_training") and find(op) is not None:
            return self._observe_batch_norm(op, node, inputs, run)
        self._note_other_uses(inputs)
        try:
            return run()
        except (RuntimeError, NotImplementedError) as error:
            if "derivative" not in str(error) and "require" not in str(error):
                raise
            return run(*_values(inputs, detach=lambda operand: operand.lineage is not None))

    def _observe_product(self, product: Product, inputs: list[Any], run: Callable[..., Any]) -> Any:
        lineage = product.operand.lineage
        path = self.names.get(lineage.path) if lineage is not None else None
        layout = product.layout(self.leaves[path].shape) if path is not None else None
        self._note_other_uses(inputs, product.operand)
        if path is None or layout is None:
            self._note_other_uses([product.operand])
            return run()
        mixed = path in self.mixed
        output = run(*_values(inputs, detach=lambda operand: mixed and operand is product.operand))
        if not (output.requires_grad or self.scouting or self._is_left(path)):
            output = output.detach().requires_grad_().clone()  # what comes next may work in place
        if product.counts_macs:
            share = math.prod(layout.size) / self.leaves[path].numel()
            self.positions[path] = self.positions.get(path, 0.0) + product.n_positions * share
        self.products.add(path)
        if self.scouting:
            self.n_floats += output.numel()
            if (path, layout) not in self.matrices:
                self.sizes[path] = self.sizes.get(path, 0) + Matrix.n_numbers(layout)
            self.matrices[path, layout] = Matrix(layout)
            return output
        rows, chosen = (self._sample(product.n_positions, layout.size[axis]) for axis in (2, 1))
        if self._is_left(path):
            return output
        matrix = self.matrices.setdefault((path, layout), Matrix(layout))
        with torch.no_grad():
            matrix.see_inputs(product, rows, self.half)
        gradients = product.gradients
        output.register_hook(lambda g: matrix.see_gradients(gradients(g, chosen), self.half))
        return output

    def _note_other_uses(self, inputs: list[Any], product: Operand | None = None) -> None:
        """Tensors used otherwise than as a matrix: their gradient is kept, so it must not hold that of products."""
        for operand in inputs:
            if isinstance(operand, list):
                self._note_other_uses(operand)
            elif operand is not product and operand.lineage is not None and operand.lineage.path in self.names:
                self.mixed.add(self.names[operand.lineage.path])

    def _sample(self, n_positions: int, side: int) -> Rows:
        """Numbers of the positions to use for a matrix with this side, None for all."""
        if is_wide(side):
            return None
        share = self.n_now / self.total
        most = math.ceil(max(4 * side, _WORK / side**2) * share)
        if n_positions <= most:
            return None
        return torch.randint(n_positions, (most,), generator=self.random).to(self.device)

    def _observe_batch_norm(self, op: str, node: Node, inputs: list[Any], run: Callable[..., Any]) -> Any:
        """y = gain (x - mean) / sqrt(var + eps) + bias. Torch gives no gradient of mean and variance; those of gain and
        bias tell it: d/d mean = -gain / std * d/d bias, d/d var = -gain / (2 var) * d/d gain."""
        operator = find(op)
        bound = operator.bind(inputs, node.kwargs) if operator is not None else {}
        gain, bias, mean, var = (self._whole(bound[n]) for n in ("weight", "bias", "running_mean", "running_var"))
        if gain is not None and bias is not None and mean is not None and var is not None:
            eps = bound["eps"].value if isinstance(bound["eps"], Operand) else bound["eps"]
            self.norms[mean] = _Norm(gain, bias, mean, var, float(eps))
        self._note_other_uses(inputs)
        statistics = [bound[name] for name in ("running_mean", "running_var")]
        return run(*_values(inputs, detach=lambda operand: any(operand is each for each in statistics)))

    def _whole(self, operand: Any) -> str | None:
        """The path of the tensor that an operand is, if it is one of the model's and not a view of one."""
        if not isinstance(operand, Operand) or operand.lineage is None or operand.lineage.views:
            return None
        return self.names.get(operand.lineage.path)

    # -- backward: gradients -------------------------------------------------------------------------------------------

    def _propagate(self, outputs: Any, batch: Batch) -> None:
        """One backward pass from random slopes of the outputs, summed over the examples of the batch."""
        if not self.task.classifies:
            found, size = float_outputs(outputs), batch_size(batch)
            scales = [math.sqrt(weight * size / max(len(found) * t.numel(), 1)) for t, weight in zip(found, self.weights)]
            pairs = [(t, scale * self._normal(t)) for t, scale in zip(found, scales) if t.requires_grad]
            if pairs:
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
            return
        logits, targets = class_logits(outputs, batch)
        if not logits.requires_grad:
            return
        torch.autograd.backward([logits], [self._slopes(logits.detach(), targets)])

    def _slopes(self, logits: Tensor, targets: Tensor | None) -> Tensor:
        """Random vectors with the second moment diag(p) - p p^T, over the square root of the number of positions."""
        rows = logits.float().movedim(1, -1).reshape(-1, logits.shape[1])
        p = rows.softmax(1)
        signs = torch.randint(0, 2, p.shape, generator=self.random, dtype=torch.int8)
        slopes = p.sqrt().mul_(signs.mul_(2).sub_(1).to(p.device))
        slopes.addcmul_(p, slopes.sum(1, keepdim=True), value=-1)
        slopes /= math.sqrt(len(rows) / len(logits))
        if logits.ndim > 2 and targets is not None and bool((targets == IGNORED).any()):
            counted = (targets != IGNORED).flatten(1)
            n_counted = counted.sum(1, keepdim=True).clamp_min(1)
            weight = counted * (counted.shape[1] / n_counted).sqrt()
            slopes *= weight.reshape(-1, 1).to(slopes.dtype)
        return slopes.reshape(len(logits), *logits.shape[2:], -1).movedim(-1, 1).to(logits.dtype)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.random).to(like.device, like.dtype)

    def _see_whole(self, path: str, leaf: Tensor) -> None:
        """The gradient of a tensor that is used as a matrix alone: its size is noted, and it is given back at once."""
        if path in self.products and path not in self.mixed and leaf.grad is not None:
            self.energy[path] = self.energy.get(path, 0.0) + float(torch.linalg.vector_norm(leaf.grad.float())) ** 2
            leaf.grad = None

    def _collect(self) -> None:
        """Square what came back. Sampled gradients of different examples are independent and have mean zero, so the
        square of a batch's sum is, in the mean, the sum of the squares."""
        for path, leaf in self.leaves.items():
            if leaf.grad is not None:
                self.slopes[path] = self.slopes.get(path, 0) + leaf.grad.float()
                leaf.grad = None
        for norm in self.norms.values():
            if norm.gain in self.slopes and norm.bias in self.slopes:
                scale = (self.leaves[norm.var].detach() + norm.eps).rsqrt()
                step = self.leaves[norm.gain].detach() * scale
                self.slopes[norm.mean] = -step * self.slopes[norm.bias]
                self.slopes[norm.var] = -0.5 * step * scale * self.slopes[norm.gain]
        for path, slope in self.slopes.items():
            self.squares.setdefault(path, Moment()).add(slope.square().flatten()[None], self.half)
        self.slopes.clear()

    def _is_left(self, path: str) -> bool:
        """Whether another pass gathers the matrices of a tensor."""
        return path not in self.block and (path in self.sizes or not self.is_first)

    def _terms(self) -> dict[str, list[Kronecker]]:
        """What the matrices of a pass come to."""
        terms: dict[str, list[Kronecker]] = {}
        while self.matrices:  # one by one: they are the better part of the memory
            path, _ = key = next(iter(self.matrices))
            terms.setdefault(path, []).append(self.matrices.pop(key).term(self.n_seen, self.shrink))
        for path in terms:
            if path in self.energy and self.positions.get(path, 0.0) > self.n_seen:
                terms[path] = rescaled(terms[path], self.energy[path] / self.n_seen)
        return terms

    def _statistics(self, terms: dict[str, list[Kronecker | Diagonal]], progress: Progress) -> Statistics:
        curvatures: dict[str, Curvature] = {}
        for path, square in self.squares.items():
            shape = self.leaves[path].shape
            terms[path].append(Diagonal(square.total((1, shape.numel()), self.shrink).div_(self.n_seen).reshape(shape).cpu()))
        for path, found in terms.items():
            if found and all(_is_finite(term) for term in found):
                curvatures[path] = Curvature(self.leaves[path].shape, found)
        if self.program is None:
            unfelt = self._assume_(curvatures)
            if unfelt:
                say = f"no calibration example feels {', '.join(unfelt)}: they are taken to matter as much as other weights do"
                progress({"say": f"{say}; add examples that take every branch"})
        return Statistics(curvatures, {path: n / self.n_seen for path, n in self.positions.items()})


    def _assume_(self, curvatures: dict[str, Curvature]) -> list[str]:
        """Parameters of branches that no example took: as if a small relative change of each did what it does to the median
        weight. Gives their paths."""
        relative: dict[str, float] = {}
        sizes: dict[str, float] = {}
        for path, leaf in self.leaves.items():
            if leaf.requires_grad:
                terms = curvatures[path].terms if path in curvatures else []
                sizes[path] = float(leaf.detach().double().square().mean()) if leaf.numel() else 0.0
                relative[path] = sizes[path] * sum(term.trace() for term in terms) / max(leaf.numel(), 1)
        felt = sorted(each for each in relative.values() if each > 0)
        if not felt:
            raise TraceError("no gradients reach the parameters; its forward must run without no_grad and inference_mode")
        unfelt = [path for path, size in sizes.items() if size > 0 and not self._is_felt(curvatures.get(path))]
        for path in unfelt:
            shape = self.leaves[path].shape
            curvatures[path] = Curvature(shape, [Diagonal(torch.full(shape, min(felt[len(felt) // 2] / sizes[path], 1e30)))])
        return unfelt

    @staticmethod
    def _is_felt(curvature: Curvature | None) -> bool:
        return curvature is not None and any(term.trace() > 0 for term in curvature.terms)


@dataclass(frozen=True)
class _Norm:
    """The paths of the tensors of one batch norm."""

    gain: str
    bias: str
    mean: str
    var: str
    eps: float


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _leaves(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, by path, as leaves that share its memory and nothing else; one tensor, one leaf."""
    leaves: dict[int, Tensor] = {}
    for _, tensor in _named(model):
        if id(tensor) not in leaves:
            leaf = tensor.detach()
            if isinstance(tensor, nn.Parameter):
                leaf = nn.Parameter(leaf, requires_grad=False)
            leaves[id(tensor)] = leaf.requires_grad_(leaf.is_floating_point())
    return {path: leaves[id(tensor)] for path, tensor in _named(model)}


def _is_finite(term: Kronecker | Diagonal) -> bool:
    held = (term.hessian,) if isinstance(term, Diagonal) else (term.inputs, term.gradients)
    return all(bool(torch.isfinite(tensor).all()) for tensor in held)


def _values(inputs: list[Any], detach: Callable[[Operand], bool]) -> list[Any]:
    """The operands' values, some of them cut off from the gradient."""
    found: list[Any] = []
    for operand in inputs:
        if isinstance(operand, list):
            found.append(_values(operand, detach))
        else:
            cut = isinstance(operand.value, Tensor) and detach(operand)
            found.append(operand.value.detach() if cut else operand.value)
    return found


def _weights(model: nn.Module, task: Task, batch: Batch) -> list[float]:
    """What each output of the model counts, from one batch."""
    with torch.no_grad():
        return output_weights(float_outputs(task.outputs(model, batch)), batch_size(batch))


def _slice(batch: Batch, start: int, stop: int) -> Batch:
    size = batch_size(batch)
    return pytree.tree_map(
        lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf, batch
    )


