"""What explains the time of a kernel: its family, the amounts it works through, and where it lies.

Here: `Features` and `features`, a pure function of a runtime operator's type and the
shapes and dtypes that it reads and writes, so that a kernel predicted from an architecture and one
that a runtime reported after running it are described alike. Not here: which kernels there are
(`kernels`), and milliseconds (`profile`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from .access_pattern import inner_and_run, transposed
from .attention_shape import Heads, attention_heads
from .operand import Operand, log_size

LANES = 16
"""Channels to which the amount `padded_macs` rounds up: a blocked layout's block with 512 bits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Features:
    """One kernel as a cost model sees it.

    `family`: what kind of work ("convolution/depthwise"); `type`: the runtime's operator; `dtype`:
    what it computes in. `amounts`: what time grows with, all non-negative: `macs`, `padded_macs`,
    `elements` (written), `read`, `written` and `weights` (bytes), `launch` (1), and what only some
    families have. `coordinates`:
    where the kernel lies among those of its family, in logarithms to base 2 or small numbers;
    every kernel of a family has the same ones.
    """

    family: str
    type: str
    dtype: str
    amounts: Mapping[str, float]
    coordinates: Mapping[str, float]

    def amount(self, name: str) -> float:
        """One of the amounts, or one that follows from the coordinates: `tiled_macs` (products
        in tiles of 64 x 64 x 16), `groups` (of a grouped convolution), `group_written` (bytes
        written, times groups). 0 where a kernel has none."""
        found = self.amounts.get(name)
        if found is not None:
            return found
        derive = _DERIVED.get(name)
        return derive(self) if derive is not None else 0.0

    @property
    def keys(self) -> tuple[str, str]:
        """Classes to look the kernel up in: its own operator first, then its family."""
        return f"{self.family}:{self.type}:{self.dtype}", f"{self.family}:{self.dtype}"


_TILE, _TILE_DEPTH = 64, 16


def _tiled_macs(found: Features) -> float:
    at = {name: 2.0**value for name, value in found.coordinates.items()}
    if found.family.startswith("matmul") and "rows" in at:
        count, rows, columns, depth = at["batch"], at["rows"], at["columns"], at["depth"]
    elif found.family.startswith("convolution") and found.family != "convolution/depthwise":
        if "pixels" not in at:
            return 0.0
        count, rows, columns = at["groups"], at["pixels"], at["out"]
        depth = at["in"] * at["area"]
    else:
        return 0.0
    sizes = ((rows, _TILE), (columns, _TILE), (depth, _TILE_DEPTH))
    return float(count * math.prod(math.ceil(size / tile - 1e-9) * tile for size, tile in sizes))


def _groups(found: Features) -> float:
    if found.family != "convolution/grouped":
        return 0.0
    return float(2.0 ** found.coordinates.get("groups", 0.0))


_DERIVED: Mapping[str, Callable[[Features], float]] = {
    "tiled_macs": _tiled_macs,
    "groups": _groups,
    "group_written": lambda found: _groups(found) * found.amounts.get("written", 0.0),
}

_WORDS = {
    "elementwise/function": """
        Sigmoid Tanh Erf Exp Log Gelu FastGelu QuickGelu BiasGelu Softplus Mish Elu Celu Selu Swish
        Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Pow QLinearSigmoid Softsign
        RotaryEmbedding""",
    "elementwise/plain": """
        Add Sub Mul Div Relu Clip LeakyRelu HardSigmoid HardSwish Abs Neg Min Max Sqrt Reciprocal
        Where Equal Greater Less GreaterOrEqual LessOrEqual And Or Not Xor Sign Floor Ceil Round
        Mod PRelu ThresholdedRelu Sum Mean QLinearAdd QLinearMul QLinearLeakyRelu QLinearWhere
        Trilu BitShift IsNaN IsInf""",
    "normalization": """
        LayerNormalization SkipLayerNormalization SimplifiedLayerNormalization
        SkipSimplifiedLayerNormalization RMSNormalization InstanceNormalization GroupNormalization
        GroupNorm BatchNormalization LpNormalization LRN MeanVarianceNormalization
        EmbedLayerNormalization""",
    "softmax": "Softmax LogSoftmax Hardmax QLinearSoftmax",
    "reduction": """
        ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceProd ReduceSumSquare
        ReduceLogSumExp ArgMax ArgMin TopK CumSum QLinearReduceMean""",
    "pooling": "MaxPool AveragePool LpPool QLinearAveragePool NhwcMaxPool",
    "pooling/global": "GlobalAveragePool GlobalMaxPool QLinearGlobalAveragePool",
    "movement/transpose": "Transpose DepthToSpace SpaceToDepth",
    "movement/reorder": "ReorderInput ReorderOutput",
    "movement/copy": """
        Concat Split Slice Pad Tile Expand QLinearConcat Reshape Flatten Squeeze Unsqueeze Identity
        ConstantOfShape Range OneHot Compress ScatterND ScatterElements""",
    "gather": "Gather GatherElements GatherND GatherBlockQuantized",
    "resize": "Resize Upsample GridSample RoiAlign",
    "quantization": "QuantizeLinear DequantizeLinear DynamicQuantizeLinear",
    "cast": "Cast CastLike",
    "recurrent": "LSTM GRU RNN DynamicQuantizeLSTM AttnLSTM",
    "attention": """
        Attention MultiHeadAttention GroupQueryAttention QAttention PackedAttention""",
    "matmul/einsum": "Einsum",
}
_POOLS = tuple(f"{way}{kind}" for way in ("", "Global") for kind in ("MaxPool", "AveragePool"))
_FAMILIES: Mapping[str, str] = MappingProxyType(
    {name: family for family, names in _WORDS.items() for name in names.split()}
    | {f"{name}@nchwc": "pooling/global" if "Global" in name else "pooling" for name in _POOLS}
)
_CONVOLUTIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    # operator: positions of data and weight
    {
        "Conv": (0, 1),
        "FusedConv": (0, 1),
        "NhwcFusedConv": (0, 1),
        "ConvInteger": (0, 1),
        "QLinearConv": (0, 3),
        "ConvTranspose": (0, 1),
    }
)
_PRODUCTS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "MatMul": (0, 1),
        "FusedMatMul": (0, 1),
        "FusedMatMulActivation": (0, 1),
        "TransposeMatMul": (0, 1),
        "Gemm": (0, 1),
        "FusedGemm": (0, 1),
        "MatMulInteger": (0, 1),
        "MatMulIntegerToFloat": (0, 1),
        "DynamicQuantizeMatMul": (0, 1),
        "QLinearMatMul": (0, 3),
        "QGemm": (0, 3),
        "MatMulNBits": (0, 1),
        "MatMulFpQ4": (0, 1),
    }
)
_INTEGER = ("int8", "uint8")
_CACHES = {"beyond_1mb": float(1 << 20), "beyond_8mb": float(8 << 20)}
"""Bytes beyond what a core's own and what a shared cache usually hold."""
_LEADING = float(1 << 18)
"""Elements beyond which columns are added up with no line of a cache kept until the next column."""
_FUNCTIONS = ("Sigmoid", "Tanh", "Gelu", "QuickGelu", "FastGelu")
"""Activations that cost a convolution time when merged into it."""
_HARD = ("HardSwish", "HardSigmoid")
"""Activations that cost it less, but are no clipping."""


def features(
    op_type: str,
    domain: str,
    inputs: Sequence[Operand | None],
    outputs: Sequence[Operand],
    attributes: Mapping[str, Any] | None = None,
    macs: float = 0.0,
) -> Features:
    """Describe one kernel. Inputs left out are None; `domain` is the runtime's ("" for ONNX).

    `attributes` are used where shapes do not tell (transposed products, permutations); a runtime's
    report has none, and then the common case is taken. `macs`: of operators whose arithmetic their
    shapes do not tell here (attention, recurrent, unknown ones).
    """
    attributes = attributes or {}
    present = [operand for operand in inputs if operand is not None]
    if op_type in _CONVOLUTIONS and outputs:
        found = _convolution(op_type, domain, inputs, outputs, attributes)
        if found is not None:
            return found
    if op_type in _PRODUCTS and outputs:
        found = _product(op_type, inputs, outputs, attributes)
        if found is not None:
            return found
    if _FAMILIES.get(op_type) == "attention" and outputs:
        heads = attention_heads(op_type, domain, inputs, outputs, attributes)
        if heads is not None:
            return _attention(op_type, present, outputs, heads)
    if domain.endswith("nchwc") and op_type in _POOLS:
        op_type = f"{op_type}@nchwc"
    return _other(op_type, present, outputs, attributes, macs)


def _amounts(
    present: Sequence[Operand], outputs: Sequence[Operand], weights: float, **more: float
) -> dict[str, float]:
    read = sum(operand.nbytes for operand in present)
    written = sum(operand.nbytes for operand in outputs)
    return {
        "launch": 1.0,
        "read": max(0.0, read - weights),
        "weights": weights,
        "written": written,
        **{name: max(0.0, read + written - size) for name, size in _CACHES.items()},
        **more,
    }


def _leftover(columns: int, steps: float) -> float:
    """Steps with columns left over that fill no vector: many kernels handle them apart."""
    return float(steps) if columns % LANES else 0.0


def _alignment(extent: int, most: int = 64) -> float:
    """The largest power of two, up to `most`, that divides an extent, as a logarithm."""
    return log_size(math.gcd(extent, most))


def _convolution(
    op_type: str,
    domain: str,
    inputs: Sequence[Operand | None],
    outputs: Sequence[Operand],
    attributes: Mapping[str, Any],
) -> Features | None:
    data_index, weight_index = _CONVOLUTIONS[op_type]
    if len(inputs) <= weight_index:
        return None
    data, weight, result = inputs[data_index], inputs[weight_index], outputs[0]
    if data is None or weight is None or len(weight.shape) < 3 or len(data.shape) < 3:
        return None
    area = math.prod(weight.shape[2:])
    transposed = op_type == "ConvTranspose"
    channels_last = op_type == "NhwcFusedConv" or (
        op_type == "QLinearConv" and domain == "com.microsoft"
    )
    spatial = slice(1, -1) if channels_last else slice(2, None)
    channels_in = data.shape[-1] if channels_last else data.shape[1]
    channels_out = result.shape[-1] if channels_last else result.shape[1]
    pixels_in = math.prod(data.shape[spatial]) * data.shape[0]
    pixels = math.prod(result.shape[spatial]) * result.shape[0]
    per_group = weight.shape[0] if transposed else weight.shape[1]
    groups = 1 if transposed else max(1, channels_in // max(1, per_group))
    group_out = max(1, channels_out // groups)
    macs = (
        float(channels_in * weight.shape[1] * area * pixels_in)
        if transposed
        else float(pixels * channels_out * per_group * area)
    )
    if transposed:
        kind = "transposed"
    elif groups > 1 and per_group == 1 and group_out == 1:
        kind = "depthwise"
    elif groups > 1:
        kind = "grouped"
    elif channels_in < LANES // 2:
        kind = "first"
    else:
        kind = "pointwise" if area == 1 else "spatial"
    padded = float(
        pixels
        * area
        * groups
        * math.ceil(group_out / LANES)
        * LANES
        * (1 if kind in ("depthwise", "first") else per_group)
    )
    if kind == "depthwise":
        padded = float(pixels * area * math.ceil(channels_out / LANES) * LANES)
    elif kind == "first":
        padded *= per_group
    present = [operand for operand in inputs if operand is not None]
    wide = channels_out if kind == "depthwise" else group_out
    activation = str(attributes.get("activation", ""))
    by_table, hard = activation in _FUNCTIONS, activation in _HARD
    return Features(
        f"convolution/{kind}",
        _convolution_type(op_type, domain, len(weight.shape) - 2),
        "int8" if data.dtype in _INTEGER else data.dtype,
        MappingProxyType(
            _amounts(
                present,
                outputs,
                weight.nbytes,
                macs=macs,
                padded_macs=padded,
                elements=float(result.elements),
                unrolled=float(pixels * area * channels_in) if area > 1 else 0.0,
                leftover=_leftover(
                    wide, pixels * area * (1 if kind == "depthwise" else channels_in)
                ),
                activated=float(result.elements) if by_table else 0.0,
                hard_activated=float(result.elements) if hard else 0.0,
                **_unevenness(attributes.get("pads"), data.nbytes, macs),
            )
        ),
        MappingProxyType(
            {
                "in": log_size(per_group),
                "out": log_size(group_out),
                "groups": log_size(groups),
                "pixels": log_size(pixels),
                "area": log_size(area),
                "stride": log_size(pixels_in / max(1, pixels)) / 2,
                "fill": channels_out / (math.ceil(channels_out / LANES) * LANES),
                "aligned": _alignment(wide),
                "depth_aligned": _alignment(per_group),
                "square": _squareness(weight.shape[2:]),
                "function": 1.0 if by_table else 0.5 if hard else 0.0,
            }
        ),
    )


def _unevenness(pads: Sequence[int] | None, read: float, macs: float) -> dict[str, float]:
    """What a runtime may do apart where padding before and behind differ; cuDNN has none such."""
    half = len(pads or ()) // 2
    if pads is None or list(pads)[:half] == list(pads)[half:]:
        return {}
    return {"uneven_launch": 1.0, "uneven_read": read, "uneven_macs": macs}


def _convolution_type(op_type: str, domain: str, rank: int) -> str:
    """The operator, told apart by layout and by three axes, for which runtimes have other code."""
    if domain.endswith("nchwc"):
        return f"{op_type}@nchwc"
    return f"{op_type}@3d" if rank > 2 else op_type


def _squareness(extents: Sequence[int]) -> float:
    """0 for k x k, 1 for 1 x k."""
    if len(extents) < 2 or max(extents) == 1:
        return 0.0
    return (max(extents) - min(extents)) / (max(extents) - 1)


def _product(
    op_type: str,
    inputs: Sequence[Operand | None],
    outputs: Sequence[Operand],
    attributes: Mapping[str, Any],
) -> Features | None:
    left_index, right_index = _PRODUCTS[op_type]
    if len(inputs) <= right_index:
        return None
    left, right, result = inputs[left_index], inputs[right_index], outputs[0]
    if left is None or right is None or not left.shape or not right.shape or not result.shape:
        return None
    rows, columns = (result.shape[-2] if len(result.shape) > 1 else 1), result.shape[-1]
    depth = left.shape[-1]
    if attributes.get("transA") and len(left.shape) > 1:
        depth = left.shape[-2]
    elif op_type != "MatMulNBits" and len(right.shape) > 1 and depth not in right.shape:
        depth = left.shape[-2] if len(left.shape) > 1 else depth
    shared = op_type == "MatMulNBits" or right.constant or len(right.shape) <= 2
    batch = math.prod(result.shape[:-2])
    if shared:
        rows, batch = rows * batch, 1
    macs = float(batch * rows * columns * depth)
    present = [operand for operand in inputs if operand is not None]
    dtype = "int8" if left.dtype in _INTEGER or op_type == "DynamicQuantizeMatMul" else left.dtype
    if op_type == "MatMulNBits":
        dtype = f"int{int(attributes.get('bits', 4))}"
    return Features(
        "matmul/weights" if shared else "matmul/batched",
        op_type,
        dtype,
        MappingProxyType(
            _amounts(
                present,
                outputs,
                right.nbytes if shared else 0.0,
                macs=macs,
                padded_macs=float(batch * rows * math.ceil(columns / LANES) * LANES * depth),
                leftover=_leftover(columns, batch * rows * depth),
                elements=float(result.elements),
            )
        ),
        MappingProxyType(
            {
                "rows": log_size(rows),
                "columns": log_size(columns),
                "depth": log_size(depth),
                "batch": log_size(batch),
                "fill": columns / (math.ceil(columns / LANES) * LANES),
                "aligned": _alignment(columns),
                "depth_aligned": _alignment(depth),
            }
        ),
    )


def _attention(
    op_type: str, present: Sequence[Operand], outputs: Sequence[Operand], heads: Heads
) -> Features:
    weights = sum(o.nbytes for o in present if o.constant and len(o.shape) == 2)
    first = present[0].dtype
    return Features(
        "attention",
        op_type,
        "int8" if first in _INTEGER else first,
        MappingProxyType(
            _amounts(
                present,
                outputs,
                weights,
                macs=heads.score_macs + heads.projection_macs,
                score_macs=heads.score_macs,
                scores=heads.scores,
                score_rows=heads.rows,
            )
        ),
        MappingProxyType(
            {
                "heads": log_size(heads.count),
                "queries": log_size(heads.queries),
                "keys": log_size(heads.keys),
                "width": log_size(heads.width),
                "biased": 1.0 if heads.biased else 0.0,
            }
        ),
    )


def _other(
    op_type: str,
    present: Sequence[Operand],
    outputs: Sequence[Operand],
    attributes: Mapping[str, Any],
    macs: float,
) -> Features:
    family = _FAMILIES.get(op_type, f"other/{op_type}")
    result = outputs[0] if outputs else Operand(())
    first = present[0] if present else result
    largest = max(present, key=lambda o: o.elements, default=result)
    weights = sum(o.nbytes for o in present[1:] if o.constant and len(o.shape) > 1)
    reads = present
    if family == "gather" and present:  # only what is picked is read
        reads = [Operand(result.shape, first.dtype), *present[1:]]
        weights = 0.0
    elements = float(max(result.elements, first.elements if family != "gather" else 0))
    if family == "elementwise/plain":
        full = [o for o in present if o.elements == result.elements and o.elements > 1]
        if len(present) > 1 and len(full) < 2:
            family = "elementwise/broadcast"
    inner, run = inner_and_run(family, present, first, result, attributes)
    more: dict[str, float] = {}
    coordinates: dict[str, float] = {}
    if family == "movement/transpose":
        coordinates = transposed(first, attributes)
    elif family == "movement/reorder" and len(result.shape) > 2:
        channels = result.shape[-1] if attributes.get("channels_last") else result.shape[1]
        coordinates = {
            "channels": log_size(channels),
            "pixels": log_size(result.elements / max(1, channels)),
        }
    elif family == "softmax":
        more = {
            "rows": elements / max(1, inner),
            "strided": elements if run > 1 else 0.0,
        }
    elif family == "normalization":
        more = {"rows": elements / max(1, inner)}
    elif family == "reduction":
        leading = inner > 1 and inner == result.elements  # nothing is kept before what is reduced
        coordinates = {"aligned": _alignment(inner, 1024)}  # columns that meet in a cache's lines
        more = {
            "rows": float(result.elements),
            "strided": elements if inner > 1 else 0.0,
            "leading": elements if leading else 0.0,
            "leading_beyond": max(0.0, elements - _LEADING) if leading else 0.0,
        }
    elif family == "pooling":
        area = math.prod(attributes.get("kernel_shape") or (1,))
        coordinates = {"area": log_size(area)}
        more = {"unrolled": float(result.elements * area)}
    dtype = "int8" if first.dtype in _INTEGER else first.dtype
    return Features(
        family,
        op_type,
        dtype,
        MappingProxyType(
            _amounts(
                reads,
                outputs,
                min(weights, sum(o.nbytes for o in reads)),
                macs=macs,
                padded_macs=macs,
                elements=elements,
                pieces=elements / max(1, run) * (1.0 - coordinates.get("single", 0.0)),
                **more,
            )
        ),
        MappingProxyType(
            {
                **coordinates,
                "elements": log_size(elements),
                "inner": log_size(inner),
                "run": log_size(run),
                "inputs": float(min(8, len(present))),
                "outputs": float(min(8, len(outputs))),
                "shrink": log_size(largest.elements / max(1, result.elements)),
            }
        ),
    )
