"""The operators of `pared.lowered` in ONNX, and an exported graph brought into the form that runtimes compute fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pared.errors import ExportError

OPSET = 21
"""The first with scales for groups of weights and with 4-bit integers."""
UINT8, INT32, BOOL = 2, 6, 9
"""ONNX's numbers of the types."""
DOMAIN = "pared.lowered"
_RESHAPING = ("Pad", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool")
_PRODUCTS = ("Conv", "Gemm", "MatMul", "ConvTranspose")


def table(opset: int) -> dict[Any, Callable[..., Any]]:
    """What the exporter writes for each operator."""
    import onnxscript

    op = getattr(onnxscript, f"opset{min(max(opset, 13), OPSET)}")

    def quantize(input: Any, scale: Any, zero_point: Any, bits: int) -> Any:
        codes = op.QuantizeLinear(input, scale, zero_point)
        largest: Any = op.Cast(op.Constant(value_int=2**bits - 1), to=UINT8)
        return codes if bits == 8 else op.Min(codes, largest)

    def dequantize(codes: Any, scale: Any, zero_point: Any, axis: int, group: int, bits: int) -> Any:
        if group and opset < OPSET:
            raise ExportError(f"scales for groups of weights need ONNX's opset {OPSET} or newer, got {opset}; leave it out")
        return op.DequantizeLinear(codes, scale, zero_point, axis=axis, **({"block_size": group} if group else {}))

    # under a name of its own until `tidy_`: the exporter would compute the Gather and store its result
    later = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), "Lookup", _schema())

    def lookup(table: Any, codes: Any) -> Any:
        return later(table, codes)

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        """The exporter's own form takes four axes only, and this one any number."""
        rank = len(query.shape)
        if rank == 4:
            return four_axes(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if is_causal or enable_gqa:
            raise ExportError(f"causal or grouped attention over {rank} axes has no form in ONNX; it needs four axes")
        transposed = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = op.Mul(op.MatMul(query, transposed), op.CastLike(op.Constant(value_float=factor), query))
        if attn_mask is not None and attn_mask.dtype == BOOL:
            scores = op.Where(attn_mask, scores, op.CastLike(op.Constant(value_float=float("-inf")), query))
        elif attn_mask is not None:
            scores = op.Add(scores, attn_mask)
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention as four_axes

    operators = torch.ops.pared
    return {
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        operators.quantize.default: quantize,
        operators.dequantize.default: dequantize,
        operators.lookup.default: lookup,
    }


def _schema() -> Any:
    """What the exporter wants to know of an operator that ONNX has not."""
    from onnx.defs import OpSchema

    given = [OpSchema.FormalParameter("table", "T"), OpSchema.FormalParameter("codes", "I")]
    types = [("T", ["tensor(float)"], ""), ("I", ["tensor(uint8)"], "")]
    result = [OpSchema.FormalParameter("value", "T")]
    return OpSchema("Lookup", DOMAIN, 1, inputs=given, outputs=result, type_constraints=types)


def tidy_(model: Any) -> None:
    """Rewrite the graph in place.

    Integer weights stay behind a DequantizeLinear where a kernel computes with them as integers: where the other operand
    is quantized, too, or in 4-bit matrix products. Elsewhere the runtime would dequantize them again in every call, since
    it folds no DequantizeLinear; a Cast and a Mul give the same numbers and are folded when the file is opened.
    """
    for node in list(model.graph):
        if node.domain == DOMAIN:
            _gather(model, node)
    model.opset_imports.pop(DOMAIN, None)
    for node in list(model.graph):
        if node.op_type == "Transpose":
            _transpose(model, node)
    for node in list(model.graph):
        if node.op_type in ("Gemm", "MatMul"):
            _scale_after(model, node)
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and _constant(node.inputs[0]) is not None:
            products = [use for use, _ in node.outputs[0].uses()]
            if any(_has_integers(use, node) for use in products):
                continue
            if node.attributes.get_int("block_size", 0) and all(use.op_type in ("MatMul", "Gemm", "Transpose") for use in products):
                _pack(model, node)
                continue
            _unfold(model, node)
    for node in list(model.graph):
        if node.op_type == "Gemm":
            _round_bias(model, node)
        if node.op_type in ("Gemm", "MatMul"):
            for value in node.inputs[1:]:
                _spell_zero(model, value.producer() if value is not None else None)
    model.graph.sort()  # the exporter's own rewriting can leave a node before what it reads
    _strip(model)


def rounds(path: Any) -> bool:
    """Whether a file quantizes activations."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in graph.node)


def _constant(value: Any) -> np.ndarray | None:
    held = None if value is None else value.const_value
    return None if held is None else held.numpy()


def _has_integers(product: Any, weight: Any) -> bool:
    """Whether what is multiplied with the weight comes from integers."""
    if product.op_type == "Transpose":
        return any(_has_integers(use, product) for use, _ in product.outputs[0].uses())
    if product.op_type not in _PRODUCTS or product.inputs[0] is None:
        return False
    other = product.inputs[0] if product.inputs[0] is not weight.outputs[0] else product.inputs[1]
    producer = other.producer()
    while producer is not None and producer.op_type in _RESHAPING:
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _scale_after(model: Any, node: Any) -> None:
    """Rows of integers times one factor each, times a matrix: the factors come after the product, which then has integers."""
    import onnx_ir as ir

    scaled = node.inputs[0].producer() if node.inputs[0] is not None else None
    if scaled is None or scaled.op_type != "Mul":
        return
    rows, factors = scaled.inputs
    made = rows.producer()
    if made is None or made.op_type != "DequantizeLinear" or not _is_reach(factors):
        return
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    if any(node.attributes[name].value != usual for name, usual in plain.items() if name in node.attributes):
        return
    product = ir.node("MatMul", [rows, node.inputs[1]])
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0):
        transposed = ir.node("Transpose", [node.inputs[1]], {"perm": [1, 0]})
        model.graph.insert_before(node, [transposed])
        product = ir.node("MatMul", [rows, transposed.outputs[0]])
    nodes = [product, ir.node("Mul", [product.outputs[0], factors])]
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], node.inputs[2]]))
    _replace(model, node, nodes)


def _is_reach(value: Any) -> bool:
    """Whether it is the largest magnitude along the last axis, which is kept, of something."""
    for kinds in (("Max", "Clip"), ("ReduceMax",), ("Abs",)):
        node = value.producer() if value is not None else None
        if node is None or node.op_type not in kinds:
            return False
        if node.op_type == "ReduceMax":
            axes = _constant(node.inputs[1]) if len(node.inputs) > 1 else None
            if axes is None or axes.tolist() != [-1] or not node.attributes.get_int("keepdims", 1):
                return False
        value = node.inputs[0]
    return True


def _gather(model: Any, node: Any) -> None:
    """Cast and Gather in the place of a lookup."""
    import onnx_ir as ir

    table, codes = node.inputs
    cast = ir.node("Cast", [codes], {"to": ir.DataType.INT32})
    _replace(model, node, [cast, ir.node("Gather", [table, cast.outputs[0]])])


def _replace(model: Any, node: Any, nodes: list[Any]) -> None:
    """Put nodes in the place of one; the output of the last is that of the one."""
    model.graph.insert_before(node, nodes)
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.name = f"{old.name}_before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _unfold(model: Any, node: Any) -> None:
    """Cast, Sub where there are zero points, and Mul in the place of a DequantizeLinear."""
    import onnx_ir as ir

    codes, scale, zero = _constant(node.inputs[0]), _constant(node.inputs[1]), _zero_of(node)
    if codes is None or scale is None or (zero is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        return
    axis, group = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)

    def spread(part: np.ndarray) -> np.ndarray:
        if group:
            return np.repeat(part, group, axis).take(range(codes.shape[axis]), axis)
        return part.reshape([-1 if place == axis else 1 for place in range(codes.ndim)]) if part.ndim else part

    name = node.outputs[0].name
    nodes = [ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT})]
    if zero is not None:
        shift = _kept(model, f"{name}_zero", spread(zero).astype(np.float32))
        nodes.append(ir.node("Sub", [nodes[-1].outputs[0], shift]))
    factor = _kept(model, f"{name}_scale", spread(scale))
    _replace(model, node, [*nodes, ir.node("Mul", [nodes[-1].outputs[0], factor])])


def _zero_of(node: Any) -> np.ndarray | None:
    """The zero points of a DequantizeLinear."""
    return _constant(node.inputs[2]) if len(node.inputs) > 2 else None


def _transpose(model: Any, node: Any) -> None:
    """Transposed codes instead of codes that are decoded and transposed."""
    import onnx_ir as ir

    before = node.inputs[0].producer()
    if before is None or before.op_type != "DequantizeLinear" or len(before.outputs[0].uses()) != 1:
        return
    codes, scale = _constant(before.inputs[0]), _constant(before.inputs[1])
    if codes is None or scale is None or codes.ndim != 2 or list(node.attributes.get_ints("perm", [1, 0])) != [1, 0]:
        return
    grouped = before.attributes.get_int("block_size", 0)
    before.replace_input_with(0, _kept(model, f"{before.inputs[0].name}_transposed", np.ascontiguousarray(codes.T)))
    if grouped:
        before.replace_input_with(1, _kept(model, f"{before.inputs[1].name}_transposed", np.ascontiguousarray(scale.T)))
        if (zero := _zero_of(before)) is not None:
            before.replace_input_with(2, _kept(model, f"{before.inputs[2].name}_transposed", np.ascontiguousarray(zero.T)))
    before.attributes["axis"] = ir.AttrInt64("axis", 1 - before.attributes.get_int("axis", 1))
    before.outputs[0].shape = ir.Shape(codes.T.shape)
    node.outputs[0].replace_all_uses_with(before.outputs[0])
    model.graph.remove(node, safe=True)


def _spell_zero(model: Any, node: Any) -> None:
    """A zero point that is left out as zeros: kernels of matrix products ask for one."""
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) > 2:
        return
    codes, scale = _constant(node.inputs[0]), _constant(node.inputs[1])
    if codes is None or scale is None:
        return
    zero = _kept(model, f"zeros_{codes.dtype}_{'x'.join(map(str, scale.shape))}", np.zeros(scale.shape, codes.dtype))
    node.resize_inputs(3)
    node.replace_input_with(2, zero)


def _kept(model: Any, name: str, array: np.ndarray) -> Any:
    """The initializer of this name."""
    import onnx_ir as ir

    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    model.graph.register_initializer(value)
    return value


def _strip(model: Any) -> None:
    """Drop what no runtime reads: where in the code each node comes from, what follows from the rest, unused numbers."""
    results = set(model.graph.outputs)
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        _spare(node, model.opset_imports.get(node.domain))
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in results:
                value.shape, value.type = None, None
    for name, value in list(model.graph.initializers.items()):
        value.metadata_props.clear()
        if value in results:
            continue
        value.shape, value.type = None, None
        if not value.uses():
            del model.graph.initializers[name]
        elif (short := _short(name)) not in model.graph.initializers:
            value.name = short
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _spare(node: Any, opset: int | None) -> None:
    """Drop attributes that say what the operator does without them."""
    import onnx

    if opset is None or not onnx.defs.has(node.op_type, opset, node.domain):
        return
    known = onnx.defs.get_schema(node.op_type, opset, node.domain).attributes
    rounds = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    scale = _constant(node.inputs[1]) if rounds else None
    if rounds:
        node.name = ""
    for name, attribute in list(node.attributes.items()):
        default = known[name].default_value if name in known else None
        value = attribute.value.encode() if isinstance(attribute.value, str) else attribute.value
        implied = default is not None and default.type and onnx.helper.get_attribute_value(default) == value
        ones = name in ("strides", "dilations") and node.op_type.startswith("Conv") and set(value) == {1}
        if implied or ones or (name == "axis" and scale is not None and scale.ndim == 0):
            del node.attributes[name]


def _short(name: str) -> str:
    """root.conv.parametrizations.weight.0.decoder.codes is known as conv.weight_codes."""
    owner, coded, rest = name.removeprefix("root.").partition("parametrizations.")
    return f"{owner}{rest.replace('.0.decoder.', '_')}" if coded else owner


def _round_bias(model: Any, node: Any) -> None:
    """The bias of a product of integers as 32-bit integers in the unit of the products: kernels ask for that."""
    import onnx_ir as ir

    if len(node.inputs) < 3 or (bias := _constant(node.inputs[2])) is None:
        return
    scales = []
    for value in node.inputs[:2]:
        producer = value.producer()
        scale = _constant(producer.inputs[1]) if producer is not None and producer.op_type == "DequantizeLinear" else None
        if scale is None or scale.ndim > 1:
            return
        scales.append(scale.astype(np.float64))
    scale = np.broadcast_to(scales[0] * scales[1], bias.shape).astype(np.float32)
    codes = np.round(bias.astype(np.float64) / scale)
    if bias.ndim != 1 or np.abs(codes).max(initial=0) >= 2**31:
        return
    name = node.inputs[2].name
    kept = [_kept(model, f"{name}_codes", codes.astype(np.int32)), _kept(model, f"{name}_scale", scale)]
    decoded = ir.node("DequantizeLinear", kept, {"axis": 0})
    model.graph.insert_before(node, [decoded])
    decoded.outputs[0].type, decoded.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(bias.shape)
    node.replace_input_with(2, decoded.outputs[0])


def _pack(model: Any, node: Any) -> None:
    """Codes of 4 bits as half bytes."""
    import ml_dtypes
    import onnx_ir as ir

    value = node.inputs[0]
    codes = _constant(value)
    zero = _zero_of(node)
    held = [part for part in (codes, zero) if part is not None]
    if codes is None or any(part.dtype != np.int8 or not part.size or part.min() < -8 or part.max() > 7 for part in held):
        return
    value.const_value = ir.tensor(codes.astype(ml_dtypes.int4), dtype=ir.DataType.INT4, name=value.name)
    value.type = ir.TensorType(ir.DataType.INT4)
    if zero is not None:  # others may read the same zero points as bytes
        node.replace_input_with(2, _kept(model, f"{node.inputs[2].name}_4bit", zero.astype(ml_dtypes.int4)))
