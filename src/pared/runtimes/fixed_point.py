"""Fixed point in integers alone: what a network whose scales are all powers of two computes on a machine without floats.

A reference to compare hardware with, in numpy: convolutions and matrix products of integers, shifts, comparisons. The only
floats are the inputs, before the first rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pared.errors import ExportError
from pared.runtimes.lower import lowered

Integers = NDArray[np.int64]
_LARGEST = 2.0**62


@dataclass(frozen=True)
class Fixed:
    """The numbers integers * 2**-fraction. Codes of the operator `quantize`, too: with fraction 0."""

    integers: Integers
    fraction: int

    def at(self, fraction: int) -> Integers:
        """The integers with at least as many fraction bits."""
        return _shifted(self.integers, fraction - self.fraction)

    def numbers(self) -> NDArray[np.float64]:
        return np.ldexp(self.integers.astype(np.float64), -self.fraction)


def compute(model: nn.Module, inputs: Tensor) -> Fixed:
    """The output of a model for a batch, in integers.

    Args:
        model: coded with `quantize.fixed_point` and `quantize.activations(powers_of_two=true)`, batch norms folded.
        inputs: floats; the model rounds them before anything else.

    Raises:
        ExportError: an operator that needs floats, a scale that is no power of two, or an overflow of 64 bits; it is named.
    """
    exported = torch.export.export(lowered(model), (inputs,), strict=False)
    held = {**exported.state_dict, **exported.constants}
    named = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.target is not None}
    values: dict[Any, Any] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            values[node] = held[named[node.name]].detach() if node.name in named else inputs.detach()
        elif node.op == "call_function":
            name = str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))
            if name not in _OPERATORS:
                raise ExportError(f"fixed point has no operator {name}; it has {', '.join(sorted(_OPERATORS))}")
            args = torch.fx.node.map_arg(node.args, values.__getitem__)
            kwargs = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
            try:
                values[node] = _OPERATORS[name](*args, **kwargs)
            except (TypeError, ValueError, AttributeError) as error:
                raise ExportError(f"fixed point cannot compute {name} with these arguments: {error}") from error
        else:
            (result,) = node.args[0]
            return _fixed(values[result])
    raise ExportError("a model in fixed point must give an output, found none")


def exact(value: Tensor) -> Fixed:
    """Floats as integers and one number of fraction bits, without any rounding."""
    mantissa, exponent = np.frexp(value.detach().double().cpu().numpy())
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    zeros = np.where(whole != 0, np.log2((whole & -whole).astype(np.float64).clip(1)).astype(np.int64), 0)
    needed = np.where(whole != 0, 53 - exponent - zeros, -1000)
    fraction = int(needed.max(initial=-1000)) if bool((whole != 0).any()) else 0
    scaled = np.ldexp(value.detach().double().cpu().numpy(), fraction)
    if np.abs(scaled).max(initial=0) >= _LARGEST:
        raise ExportError("weights must lie on a grid of at most 62 bits; code them with quantize.fixed_point")
    return Fixed(scaled.astype(np.int64), fraction)


def rounded(numbers: Integers, bits: int) -> Integers:
    """numbers / 2**bits to the nearest integer, halves to the even one: a shift to the right and a comparison."""
    if bits <= 0:
        return _shifted(numbers, -bits)
    if bits > 62:  # |numbers| < 2**62, so these are less than a half
        return np.zeros_like(numbers)
    down = numbers >> bits
    rest, half = numbers - (down << bits), np.int64(1) << (bits - 1)
    return down + ((rest > half) | ((rest == half) & (down & 1 == 1)))


def _shifted(numbers: Integers, bits: Any) -> Integers:
    """numbers * 2**bits, a shift to the left; bits are whole numbers of at least zero, one or an array."""
    if (_size(numbers) * np.exp2(np.asarray(bits, np.float64))).max(initial=0) >= _LARGEST:
        raise ExportError(f"numbers that are shifted by {int(np.max(bits))} bits must stay below 62 bits; use fewer fraction bits")
    return np.where(numbers == 0, 0, numbers << np.minimum(bits, 62))


def _size(numbers: Integers) -> NDArray[np.float64]:
    return np.abs(numbers.astype(np.float64))


def _check_sums(x: Integers, weight: Integers) -> None:
    """Whether sums of products, a row of the weight with as many inputs, stay below 62 bits."""
    rows = _size(weight).reshape(len(weight), -1).sum(1)
    if _size(x).max(initial=0) * rows.max(initial=0) >= _LARGEST:
        raise ExportError("sums of products must stay below 62 bits; use fewer fraction bits")


def _fixed(value: Any) -> Fixed:
    return value if isinstance(value, Fixed) else exact(value)


def _fraction(scale: Tensor) -> int:
    """f of a scale 2**-f."""
    mantissa, exponent = math.frexp(float(scale))
    if mantissa != 0.5:
        raise ExportError(f"scales must be powers of two in fixed point, found {float(scale):g}; see quantize.fixed_point")
    return 1 - exponent


def _quantize(x: Any, scale: Tensor, zero_point: Tensor, bits: int) -> Fixed:
    fraction = _fraction(scale)
    if isinstance(x, Fixed):
        codes = rounded(x.integers, x.fraction - fraction)
    else:  # the inputs
        codes = np.rint(np.ldexp(x.numpy().astype(np.float64), fraction)).astype(np.int64)
    return Fixed((codes + int(zero_point)).clip(0, 2**bits - 1), 0)


def _dequantize(codes: Any, scale: Tensor, zero_point: Tensor | None, axis: int, group: int, bits: int) -> Fixed:
    whole = codes.integers if isinstance(codes, Fixed) else codes.numpy().astype(np.int64)
    if zero_point is not None and zero_point.numel() > 1:
        raise ExportError("fixed point has no zero points per channel or group; take scheme: symmetric")
    zero = 0 if zero_point is None else int(zero_point)
    if scale.numel() == 1:
        return Fixed(whole - zero, _fraction(scale))
    if group:
        raise ExportError("fixed point has scales per tensor or channel, none for groups of weights")
    fractions = [_fraction(one) for one in scale]
    shifts = np.array([max(fractions) - one for one in fractions], dtype=np.int64)
    return Fixed(_shifted(whole, shifts.reshape([-1 if i == axis else 1 for i in range(whole.ndim)])), max(fractions))


def _with_bias(products: Integers, fraction: int, bias: Any, axis: int) -> Fixed:
    result = Fixed(products, fraction)
    if bias is None:
        return result
    shape = [-1 if i == axis else 1 for i in range(products.ndim)]
    return _add(result, Fixed(_fixed(bias).integers.reshape(shape), _fixed(bias).fraction))


def _linear(x: Any, weight: Any, bias: Any = None) -> Fixed:
    x, weight = _fixed(x), _fixed(weight)
    _check_sums(x.integers, weight.integers)
    return _with_bias(x.integers @ weight.integers.T, x.fraction + weight.fraction, bias, x.integers.ndim - 1)


def _conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Any = (1, 1), padding: Any = (0, 0), dilation: Any = (1, 1), groups: int = 1
) -> Fixed:
    x, weight = _fixed(x), _fixed(weight)
    _check_sums(x.integers, weight.integers)
    (top, left), (down, right), (dy, dx) = _pair(padding), _pair(stride), _pair(dilation)
    padded = np.pad(x.integers, ((0, 0), (0, 0), (top, top), (left, left)))
    n_out, n_in, height, width = weight.integers.shape
    rows = (padded.shape[2] - dy * (height - 1) - 1) // down + 1
    columns = (padded.shape[3] - dx * (width - 1) - 1) // right + 1
    sums = np.zeros((len(padded), n_out, rows, columns), dtype=np.int64)
    for group in range(groups):
        out = slice(group * n_out // groups, (group + 1) * n_out // groups)
        seen = padded[:, group * n_in : (group + 1) * n_in]
        for i in range(height):
            for j in range(width):
                window = seen[:, :, i * dy : i * dy + down * rows : down, j * dx : j * dx + right * columns : right]
                window = window[:, :, :rows, :columns]
                sums[:, out] += np.einsum("ncyx,oc->noyx", window, weight.integers[out, :, i, j])
    return _with_bias(sums, x.fraction + weight.fraction, bias, 1)


def _max_pool2d(x: Any, size: Any, stride: Any = (), padding: Any = (0, 0), dilation: Any = (1, 1), ceil: bool = False) -> Fixed:
    x = _fixed(x)
    (height, width), (down, right), (top, left) = _pair(size), _pair(stride or size), _pair(padding)
    if ceil or _pair(dilation) != (1, 1):
        raise ExportError("fixed point pools without dilation, and whole windows only")
    padded = np.pad(x.integers, ((0, 0), (0, 0), (top, top), (left, left)), constant_values=np.iinfo(np.int64).min)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (2, 3))[:, :, ::down, ::right]
    return Fixed(windows.max((-2, -1)), x.fraction)


def _add(x: Any, y: Any) -> Fixed:
    x, y = _fixed(x), _fixed(y)
    fraction = max(x.fraction, y.fraction)
    return Fixed(x.at(fraction) + y.at(fraction), fraction)


def _relu(x: Any) -> Fixed:
    return Fixed(_fixed(x).integers.clip(0), _fixed(x).fraction)


def _flatten(x: Any, start: int = 0, end: int = -1) -> Fixed:
    whole = _fixed(x).integers
    shape, end = whole.shape, end % whole.ndim
    return Fixed(whole.reshape(*shape[:start], -1, *shape[end + 1 :]), _fixed(x).fraction)


def _reshape(x: Any, shape: Any) -> Fixed:
    return Fixed(_fixed(x).integers.reshape([int(size) for size in shape]), _fixed(x).fraction)


def _same(x: Any, *others: Any, **named: Any) -> Any:
    return x


def _pair(value: Any) -> tuple[int, int]:
    whole = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return whole[0], whole[-1]


_OPERATORS: dict[str, Callable[..., Any]] = {
    "quantize": _quantize, "dequantize": _dequantize, "conv2d": _conv2d, "linear": _linear, "relu": _relu, "relu_": _relu,
    "max_pool2d": _max_pool2d, "add": _add, "flatten": _flatten, "view": _reshape, "reshape": _reshape,
    **dict.fromkeys(("to", "contiguous", "dropout", "clone", "detach", "_assert_tensor_metadata"), _same),
}  # fmt: skip
