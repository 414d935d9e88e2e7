"""Products of integers quantized while the model runs, as ONNX Runtime fuses them.

Here: `fuse_products`. Not here: static pairs (`ort_integer`), writing the products that a plan
stands for (`ort_plan`).
"""

from __future__ import annotations

from .runtime_graph import CONTRIB, Op, RuntimeGraph, Tensor

_ACTIVATIONS = ("Gelu", "FastGelu")


def fuse_products(graph: RuntimeGraph) -> None:
    """MatMulInteger, Cast and the product with both scales: MatMulIntegerToFloat.

    With a bias where one follows; with the DynamicQuantizeLinear before it, where nothing else
    reads that, it is a DynamicQuantizeMatMul.
    """
    found = False
    for op in graph:
        if op in graph and op.is_onnx("MatMulInteger"):
            found = _to_float(graph, op) or found
    if not found:
        return
    for op in graph:
        if op in graph and op.is_onnx("DynamicQuantizeLinear"):
            _quantize_inside(graph, op)
    graph.sort()


def _to_float(graph: RuntimeGraph, op: Op) -> bool:
    cast = graph.only_user(op.outputs[0])
    scaled = graph.only_user(cast.outputs[0]) if cast is not None else None
    if cast is None or not cast.is_onnx("Cast") or scaled is None or not scaled.is_onnx("Mul"):
        return False
    both = _other(scaled, cast.outputs[0])
    product = both.producer if both is not None else None
    if product is None or not product.is_onnx("Mul"):
        return False
    scales = sorted((t for t in product.inputs if t is not None), key=lambda t: t.constant)
    if len(scales) != 2 or not scales[1].constant:
        return False
    points = [*op.inputs[2:4], None, None]
    inputs: list[Tensor | None] = [*op.inputs[:2], *scales, *points[:2]]
    last, bias = scaled, _bias(graph, scaled)
    if bias is not None:
        last = graph.only_user(scaled.outputs[0]) or scaled
        inputs.append(bias)
    result = last.outputs[0]
    for gone in dict.fromkeys((cast, scaled, last)):
        graph.remove(gone)
    if not product.outputs[0].users:
        graph.remove(product)
    set_inputs(graph, op, inputs)
    graph.set_output(op, 0, result)
    op.type, op.domain = "MatMulIntegerToFloat", CONTRIB
    op.origin += tuple(node for gone in (last,) if bias is not None for node in gone.origin)
    graph.renew(op)
    return True


def _other(op: Op, tensor: Tensor) -> Tensor | None:
    return op.inputs[1] if op.inputs[0] is tensor else op.inputs[0]


def _bias(graph: RuntimeGraph, scaled: Op) -> Tensor | None:
    """A row of constants that is added to a product, unless its activation takes it."""
    user = graph.only_user(scaled.outputs[0])
    if user is None or not user.is_onnx("Add"):
        return None
    bias = _other(user, scaled.outputs[0])
    columns = (scaled.outputs[0].shape or (None,))[-1]
    if bias is None or not bias.constant or bias.shape != (columns,):
        return None
    after = graph.only_user(user.outputs[0])
    return None if after is not None and after.type in _ACTIVATIONS else bias


def _quantize_inside(graph: RuntimeGraph, quantize: Op) -> None:
    product = graph.only_user(quantize.outputs[0])
    if product is None or product.type != "MatMulIntegerToFloat":
        return
    scale, point = quantize.outputs[1:3]
    if product.inputs[2] is not scale or product.inputs[4] is not point:
        return
    if graph.only_user(scale) is not product or graph.only_user(point) is not product:
        return
    _, integers, _, scales, _, weight_point, *bias = product.inputs
    set_inputs(graph, product, [quantize.inputs[0], integers, scales, weight_point, *bias])
    graph.remove(quantize)
    product.type = "DynamicQuantizeMatMul"
    product.origin = quantize.origin + product.origin
    graph.renew(product)


def set_inputs(graph: RuntimeGraph, op: Op, inputs: list[Tensor | None]) -> None:
    """Give an operator other inputs, in whole."""
    for index in range(len(op.inputs)):
        graph.set_input(op, index, None)
    op.inputs.clear()
    for index, tensor in enumerate(inputs):
        graph.set_input(op, index, tensor)
