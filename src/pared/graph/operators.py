"""The closed list of operators that a program may contain, and what each argument of one may be.

Nothing outside this list is ever looked up: a name from a file is compared with the names below, and only then with
torch's own operator table. Operators that write into their arguments, draw random numbers, read files, give
uninitialised memory or reinterpret strides are not in the list. A device is written as `DEVICE`: a program runs where
its inputs are.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch

from pared import lowered
from pared.errors import ArtifactError

LARGEST_INT = 2**63 - 1
LARGEST_LIST = 100_000


@final
class _Device:
    """Stands in arguments for the device that the program runs on."""

    def __repr__(self) -> str:
        return "DEVICE"

    def __deepcopy__(self, memo: dict[int, Any]) -> _Device:
        return self

    def __copy__(self) -> _Device:
        return self

    def __reduce__(self) -> str:
        return "DEVICE"


DEVICE = _Device()


@final
@dataclass(frozen=True, slots=True)
class Ref:
    """The value number `index`: inputs first, then states, then the results of the nodes."""

    index: int


DTYPES: Mapping[str, torch.dtype] = {
    "f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8,
    "i16": torch.int16, "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8, "b1": torch.bool,
    "c64": torch.complex64, "c128": torch.complex128,
}  # fmt: skip
MEMORY_FORMATS: Mapping[str, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "preserve": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}

_ATEN = frozenset(
    """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution conv_tbc linear bilinear matmul
    mm bmm mv dot vdot addmm addbmm addmv addr baddbmm inner outer ger einsum tensordot kron chain_matmul
    scaled_dot_product_attention softmax log_softmax _softmax _log_softmax _safe_softmax
    batch_norm layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm
    _weight_norm _weight_norm_interface norm_except_dim
    _native_batch_norm_legit_no_training
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    max_unpool2d max_unpool3d
    embedding lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    relu relu6 leaky_relu prelu _prelu_kernel rrelu elu selu celu gelu silu mish sigmoid log_sigmoid hardsigmoid
    hardswish hardtanh hardshrink softshrink softplus tanh threshold glu logit
    add sub mul div subtract multiply divide true_divide rsub neg negative positive abs absolute sign sgn pow
    float_power square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan atan2
    arctan2 sinh cosh asinh acosh atanh arcsin arccos arctan erf erfc erfinv sinc floor ceil round trunc fix frac fmod
    remainder floor_divide clamp clamp_min clamp_max clip maximum minimum fmax fmin lerp addcmul addcdiv hypot
    copysign heaviside nan_to_num xlogy logaddexp logaddexp2 lgamma digamma i0 deg2rad rad2deg gcd lcm ldexp
    special_expit special_erf special_log_softmax special_softmax special_xlog1py special_entr special_logit
    special_gammaln special_i0 special_ndtr
    eq ne lt le gt ge equal not_equal less less_equal greater greater_equal isnan isinf isfinite isposinf isneginf
    isclose isin signbit logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not
    bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__ where masked_fill
    sum mean prod amax amin aminmax max min median nanmedian var std var_mean std_mean norm frobenius_norm
    nuclear_norm linalg_norm linalg_vector_norm linalg_matrix_norm linalg_cross linalg_multi_dot linalg_matmul
    linalg_vecdot linalg_inv linalg_inv_ex linalg_det linalg_cholesky linalg_diagonal linalg_qr inverse
    logsumexp all any argmax argmin nansum nanmean count_nonzero dist cdist pairwise_distance cosine_similarity
    cumsum cumprod cummax cummin logcumsumexp diff trace
    sort msort argsort topk kthvalue mode unique_consecutive unique_dim _unique2 _unique nonzero nonzero_static
    argwhere searchsorted bucketize bincount histc quantile nanquantile
    view reshape reshape_as view_as flatten unflatten ravel squeeze unsqueeze transpose t numpy_T mT mH matrix_H adjoint
    permute movedim moveaxis swapaxes swapdims expand expand_as broadcast_to broadcast_tensors contiguous clone alias
    detach select slice narrow unbind split split_with_sizes chunk tensor_split hsplit vsplit dsplit unsafe_chunk
    unsafe_split unsafe_split_with_sizes diagonal unfold _unsafe_view _reshape_copy
    select_copy slice_copy view_copy permute_copy transpose_copy expand_copy squeeze_copy unsqueeze_copy unbind_copy
    split_copy split_with_sizes_copy diagonal_copy t_copy alias_copy detach_copy unfold_copy
    select_scatter slice_scatter diagonal_scatter
    view_as_real view_as_complex real imag conj _conj resolve_conj resolve_neg conj_physical complex polar angle
    is_complex is_floating_point
    cat concat concatenate stack hstack vstack dstack column_stack row_stack block_diag meshgrid cartesian_prod
    atleast_1d atleast_2d atleast_3d
    index index_select index_put index_add index_copy index_fill index_reduce gather scatter scatter_add
    scatter_reduce take take_along_dim masked_select masked_scatter put
    flip fliplr flipud roll rot90 repeat repeat_interleave tile tril triu tril_indices triu_indices diag diag_embed
    diagflat one_hot
    pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d _pad_circular _pad_enum
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator
    arange linspace logspace full zeros ones eye full_like zeros_like ones_like new_full new_zeros new_ones
    scalar_tensor fill copy zero
    hann_window hamming_window
    to _to_copy type_as
    sym_size sym_numel item _local_scalar_dense
    fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn
    fft_fftshift fft_ifftshift fft_hfft fft_ihfft stft istft
    """.split()
)

# An overload is used only when each of its arguments and results is of one of these types.
_ARGUMENT_TYPES = frozenset("Tensor int float bool str number ScalarType Device Layout MemoryFormat Generator".split())
_RESULT_KINDS = {"Tensor": "tensor", "List[Tensor]": "list", "int": "scalar", "float": "scalar", "bool": "scalar",
                 "number": "scalar", "SymInt": "scalar"}  # fmt: skip


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Integers of sizes stay within 64 bits, as in torch; without this a hostile file could square one for ever."""

    @functools.wraps(function)
    def apply(*operands: Any) -> Any:
        result = function(*operands)
        if type(result) is int and not -LARGEST_INT - 1 <= result <= LARGEST_INT:
            raise OverflowError("the result does not fit in 64 bits")
        return result

    return apply


def _power(value: Any, exponent: Any) -> Any:
    if type(exponent) is not int or not 0 <= exponent <= 4:
        raise ValueError(f"the exponent of a size must be 0 to 4, got {exponent}")
    return value**exponent


SCALAR_FUNCTIONS: Mapping[str, tuple[int, Callable[..., Any]]] = {
    name: (arity, _bounded(function))
    for name, arity, function in (
        ("add", 2, operator.add), ("sub", 2, operator.sub), ("mul", 2, operator.mul), ("neg", 1, operator.neg),
        ("floordiv", 2, operator.floordiv), ("truediv", 2, operator.truediv), ("mod", 2, operator.mod),
        ("pow", 2, _power), ("abs", 1, operator.abs), ("eq", 2, operator.eq), ("ne", 2, operator.ne),
        ("lt", 2, operator.lt), ("le", 2, operator.le), ("gt", 2, operator.gt), ("ge", 2, operator.ge),
        ("and", 2, operator.and_), ("or", 2, operator.or_), ("not", 1, torch.sym_not), ("max", 2, torch.sym_max),
        ("min", 2, torch.sym_min), ("float", 1, torch.sym_float), ("int", 1, torch.sym_int), ("ite", 3, torch.sym_ite),
        ("trunc", 1, math.trunc), ("floor", 1, math.floor), ("ceil", 1, math.ceil), ("round", 1, round),
    )
}  # fmt: skip

# What tracing records for each of the functions above.
SCALAR_NAMES: Mapping[Any, str] = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.neg: "neg", operator.floordiv: "floordiv",
    operator.truediv: "truediv", operator.mod: "mod", operator.pow: "pow", operator.abs: "abs", operator.eq: "eq",
    operator.ne: "ne", operator.lt: "lt", operator.le: "le", operator.gt: "gt", operator.ge: "ge",
    operator.and_: "and", operator.or_: "or", torch.sym_not: "not", torch.sym_max: "max", torch.sym_min: "min",
    torch.sym_float: "float", torch.sym_int: "int", torch.sym_ite: "ite", math.trunc: "trunc", math.floor: "floor",
    math.ceil: "ceil", round: "round", abs: "abs",
}  # fmt: skip


class Argument(NamedTuple):
    """One argument of an operator: its name, its type as in torch's schema, and its default if it has one."""

    name: str
    type: str
    has_default: bool
    default: Any
    keyword_only: bool


@final
class Operator:
    """One entry of the closed list: a name, the function that it stands for, and the kinds of its results."""

    __slots__ = ("arguments", "function", "name", "results")

    def __init__(self, name: str, function: Callable[..., Any], arguments: tuple[Argument, ...], results: tuple[str, ...]) -> None:
        self.name = name
        self.function = function
        self.arguments = arguments
        self.results = results

    @property
    def kind(self) -> str | tuple[str, ...]:
        """The kind of value a node gives: "tensor", "scalar", "list" (of tensors), or a tuple of kinds."""
        return self.results[0] if len(self.results) == 1 else self.results

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Every argument by name, defaults filled in."""
        bound = {a.name: a.default for a in self.arguments if a.has_default}
        bound.update(zip((a.name for a in self.arguments), args, strict=False))
        bound.update(kwargs)
        return bound

    def trim(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call in its shortest form: positional where possible, without arguments that equal their default.

        Raises ValueError when an argument is not one of the schema's.
        """
        names = {a.name for a in self.arguments}
        unknown = next((name for name in kwargs if name not in names), None)
        if unknown is not None:
            raise ValueError(f"{self.name} has no argument {unknown}")
        positional = [a for a in self.arguments if not a.keyword_only]
        if len(args) > len(positional):
            raise ValueError(f"{self.name} takes {len(positional)} arguments, got {len(args)}")
        given = dict(zip((a.name for a in positional), args, strict=False)) | dict(kwargs)
        short: list[Any] = []
        for argument in positional:
            if argument.name not in given and not argument.has_default:
                raise ValueError(f"{self.name} needs its argument {argument.name}")
            short.append(given.get(argument.name, argument.default))
        while short and positional[len(short) - 1].has_default and _same(short[-1], positional[len(short) - 1].default):
            short.pop()
        named = {
            a.name: given[a.name]
            for a in self.arguments
            if a.keyword_only and a.name in given and not (a.has_default and _same(given[a.name], a.default))
        }
        return tuple(short), named

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any], kind_of: Callable[[Ref], str | tuple[str, ...]]) -> str | None:
        """What is wrong with such a call, or None. `kind_of` gives the kind of a referenced value."""
        positional = [a for a in self.arguments if not a.keyword_only]
        if len(args) > len(positional):
            return f"takes {len(positional)} arguments, got {len(args)}"
        by_name = {a.name: a for a in self.arguments}
        given = list(zip(positional, args, strict=False))
        for name, value in kwargs.items():
            if name not in by_name or any(a.name == name for a, _ in given):
                return f"has no free argument {name!r}"
            given.append((by_name[name], value))
        present = {a.name for a, _ in given}
        missing = next((a.name for a in self.arguments if not a.has_default and a.name not in present), None)
        if missing is not None:
            return f"needs its argument {missing}"
        for argument, value in given:
            if not _accepts(argument.type, value, kind_of):
                return f"cannot take {_short(value)} for its argument {argument.name} of type {argument.type}"
        return _refusal(self.name, self.bind(args, kwargs)) if not self.name.startswith("operator.") else None


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return len(value) == len(default) and all(map(_same, value, default))
    return type(value) is type(default) and bool(value == default)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _accepts(kind: str, value: Any, kind_of: Callable[[Ref], str | tuple[str, ...]]) -> bool:
    if kind.startswith("Optional["):
        return value is None or _accepts(kind[9:-1], value, kind_of)
    if kind.startswith("List["):
        if isinstance(value, Ref):
            return kind == "List[Tensor]" and kind_of(value) == "list"
        if not isinstance(value, list | tuple):  # torch repeats one number for a list of fixed length
            return kind in ("List[int]", "List[float]") and _accepts(kind[5:-1], value, kind_of)
        return len(value) <= LARGEST_LIST and all(_accepts(kind[5:-1], v, kind_of) for v in value)
    if isinstance(value, Ref):
        found = kind_of(value)
        return found == "scalar" if kind in _SCALARS else kind == "Tensor" and found in ("tensor", "scalar")
    if kind == "int":
        return type(value) is int and abs(value) <= LARGEST_INT
    if kind in ("float", "number", "Tensor"):  # torch makes a tensor of a number
        return type(value) is float or (type(value) in (int, bool) and abs(value) <= LARGEST_INT)
    return isinstance(value, _CONSTANTS.get(kind, ()))


_SCALARS = ("int", "float", "bool", "number")
_CONSTANTS: Mapping[str, type | tuple[type, ...]] = {
    "bool": bool, "str": str, "ScalarType": torch.dtype, "MemoryFormat": torch.memory_format,
    "Device": _Device,
}  # fmt: skip


def _refusal(name: str, bound: Mapping[str, Any]) -> str | None:
    """Operators of the list that, with some arguments, would draw random numbers or write into a state."""
    base = name.split(".")[1]
    if base == "batch_norm" and bound["training"] is not False and bound["running_mean"] is not None:
        return "would write into the running mean"
    if base == "instance_norm" and bound["use_input_stats"] is not False and bound["running_mean"] is not None:
        return "would write into the running mean"
    if base in ("lstm", "gru", "rnn_tanh", "rnn_relu") and bound["train"] is not False:
        return "would drop values at random"
    if base == "rrelu" and bound["training"] is not False:
        return "would draw random slopes"
    if base == "scaled_dot_product_attention" and not _same(bound["dropout_p"], 0.0):
        return "would drop attention at random"
    return None


_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # not their forms for packed sequences: export cannot give them


@functools.cache
def find(name: str) -> Operator | None:
    """The operator called `name` ("aten.conv2d.default", "pared.quantize.default", "operator.add", "operator.getitem"),
    or None if not listed."""
    family, _, rest = name.partition(".")
    if family == "operator":
        if rest == "getitem":
            pair = (Argument("value", "", False, None, False), Argument("index", "int", False, None, False))
            return Operator(name, operator.getitem, pair, ("tensor",))
        if rest not in SCALAR_FUNCTIONS:
            return None
        arity, function = SCALAR_FUNCTIONS[rest]
        operands = tuple(Argument(f"operand{i}", "number", False, None, False) for i in range(arity))
        return Operator(name, function, operands, ("scalar",))
    base, _, overload = rest.partition(".")
    listed_names = {"aten": _ATEN, "pared": lowered.OPERATORS}.get(family, ())
    if base not in listed_names:
        return None
    packet = getattr(getattr(torch.ops, family), base, None)
    if (
        packet is None
        or overload not in packet.overloads()
        or overload.startswith("prim")
        or (overload == "data" and base in _RECURRENT)
    ):
        return None
    function = getattr(packet, overload)
    schema = function._schema
    if schema.is_mutable or any(_innermost(str(a.real_type)) not in _ARGUMENT_TYPES for a in schema.arguments):
        return None
    if any("List[str]" in str(a.real_type) for a in schema.arguments):
        return None
    results = tuple(_RESULT_KINDS.get(str(r.type), "") for r in schema.returns)
    types = [str(v.type) for v in (*schema.arguments, *schema.returns)]
    if not results or "" in results or not any("Tensor" in t for t in types):
        return None
    arguments = tuple(
        Argument(a.name, str(a.real_type), a.has_default_value(), a.default_value, a.kwarg_only) for a in schema.arguments
    )
    return Operator(name, _GUARDED.get(name, function), arguments, results)


def _weight_norm_guard(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch reads past the end when the norms do not fit the directions."""

    @functools.wraps(function)
    def apply(v: Any, g: Any, dim: Any = 0) -> Any:
        expected = [size if axis == dim else 1 for axis, size in enumerate(v.shape)]
        if v.numel() == 0 or v.dtype != g.dtype or (list(g.shape) != expected and (dim != -1 or g.numel() != 1)):
            raise ValueError(f"the norms {tuple(g.shape)} do not fit directions {tuple(v.shape)} with axis {dim}")
        return function(v, g, dim)

    return apply


def _recurrent_guard(function: Callable[..., Any], n_gates: int) -> Callable[..., Any]:
    """torch checks the shapes of recurrent layers in Python only; below that, wrong ones are read past their end."""

    @functools.wraps(function)
    def apply(
        x: Any, hx: Any, params: Any, has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        states = [hx] if isinstance(hx, torch.Tensor) else hx
        batch, features, n_directions = x.shape[0 if batch_first else 1], x.shape[2], 2 if bidirectional else 1
        out, hidden = states[0].shape[2], states[-1].shape[2]
        expected: list[tuple[Any, ...]] = []
        for layer in range(min(num_layers, len(params))):
            weights = [(n_gates * hidden, features if layer == 0 else out * n_directions), (n_gates * hidden, out)]
            biases = [(n_gates * hidden,)] * 2 if has_biases else []
            expected += (weights + biases + ([(out, hidden)] if out != hidden else [])) * n_directions
        shape = (num_layers * n_directions, batch)
        if (
            x.dim() != 3 or num_layers < 1 or len(states) != (2 if n_gates == 4 else 1)
            or any(h.dim() != 3 or tuple(h.shape[:2]) != shape for h in states)
            or [tuple(p.shape) for p in params] != expected or (n_gates != 4 and out != hidden)
            or any(t.dtype != x.dtype for t in (*states, *params)) or not x.is_floating_point()
        ):  # fmt: skip
            raise ValueError("the shapes or types of the input, the state and the weights do not fit each other")
        return function(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)

    return apply


_GUARDED: Mapping[str, Callable[..., Any]] = {
    "aten._weight_norm.default": _weight_norm_guard(torch.ops.aten._weight_norm.default),
    "aten._weight_norm_interface.default": _weight_norm_guard(torch.ops.aten._weight_norm_interface.default),
    "aten.lstm.input": _recurrent_guard(torch.ops.aten.lstm.input, 4),
    "aten.gru.input": _recurrent_guard(torch.ops.aten.gru.input, 3),
    "aten.rnn_tanh.input": _recurrent_guard(torch.ops.aten.rnn_tanh.input, 1),
    "aten.rnn_relu.input": _recurrent_guard(torch.ops.aten.rnn_relu.input, 1),
}


def _innermost(type_name: str) -> str:
    while type_name.endswith("]"):
        type_name = type_name.partition("[")[2][:-1]
    return type_name


def listed() -> list[str]:
    """Every operator of the closed list that this torch has, by name."""
    names = [f"operator.{name}" for name in ("getitem", *SCALAR_FUNCTIONS)]
    for base in sorted(_ATEN):
        packet = getattr(torch.ops.aten, base, None)
        names += [f"aten.{base}.{overload}" for overload in (packet.overloads() if packet is not None else ())]
    return [name for name in names if find(name) is not None]


# The number arguments that say how many elements there will be; lists of numbers are always looked at.
_COUNTS: Mapping[str, tuple[str, ...]] = {
    "eye": ("n", "m"), "linspace": ("steps",), "logspace": ("steps",), "one_hot": ("num_classes",),
    "tril_indices": ("row", "col"), "triu_indices": ("row", "col"), "repeat_interleave": ("repeats", "output_size"),
    "bincount": ("minlength",), "histc": ("bins",), "nonzero_static": ("size",), "hann_window": ("window_length",),
    "hamming_window": ("window_length",), "diag": ("diagonal",), "diag_embed": ("offset",), "diagflat": ("offset",),
    "pixel_shuffle": ("upscale_factor",), "fft_fft": ("n",), "fft_ifft": ("n",), "fft_rfft": ("n",),
    "fft_irfft": ("n",), "fft_hfft": ("n",), "fft_ihfft": ("n",),
    "stft": ("n_fft",), "istft": ("n_fft", "length"),
}  # fmt: skip


def check_size(name: str, bound: Mapping[str, Any], max_bytes: int) -> None:
    """Raise ArtifactError if the constants of a call alone ask for more than `max_bytes` elements."""
    base = name.split(".")[1]
    numbers: list[float] = []
    for value in bound.values():
        if isinstance(value, list | tuple):
            numbers.append(math.prod(abs(v) for v in value if type(v) in (int, float) and abs(v) > 1))
    counts = [abs(bound[n]) for n in _COUNTS.get(base, ()) if type(bound.get(n)) in (int, float)]
    numbers.append(math.prod(c for c in counts if c > 1))
    if base == "arange":
        start, end, step = bound.get("start", 0), bound.get("end", 0), bound.get("step", 1)
        if all(type(v) in (int, float) for v in (start, end, step)) and step:
            numbers.append(abs((end - start) / step))
    if any(not number <= max_bytes for number in numbers):
        raise ArtifactError(f"{name} asks for more than max_bytes = {max_bytes} bytes")
