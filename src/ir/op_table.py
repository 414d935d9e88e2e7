"""The operator table: one row of facts for each operator, standard (ONNX) and contrib.

Here: what an operator is, which inputs hold weights, what one element costs. Rows that share a
shape are written together. Not here: the formulas (`op_costs`) and the questions passes ask
about a node (`ops`). A test holds every operator of `onnx.defs` against this table.
"""

from __future__ import annotations

import dataclasses
import enum

from . import op_costs as costs
from .graph import CONTRIB_DOMAIN
from .op_costs import SIGMOID_FLOPS, SOFTMAX_FLOPS, Formula

ML_DOMAIN = "ai.onnx.ml"
PREVIEW_DOMAIN = "ai.onnx.preview"
TRAINING_DOMAIN = "ai.onnx.preview.training"


class Category(enum.StrEnum):
    """What kind of work an operator does."""

    CONVOLUTION = "convolution"
    MATMUL = "matmul"
    ELEMENTWISE = "elementwise"
    REDUCTION = "reduction"
    NORMALIZATION = "normalization"
    POOLING = "pooling"
    DATA_MOVEMENT = "data movement"
    SHAPE_COMPUTATION = "shape computation"
    CONTROL_FLOW = "control flow"
    QUANTIZATION = "quantization"
    RECURRENT = "recurrent"
    ATTENTION = "attention"
    GATHER = "gather"
    RANDOM = "random"
    SEQUENCE = "sequence"
    STRING = "string"
    OTHER = "other"
    UNKNOWN = "unknown"


class Reads(enum.Enum):
    """How much of its inputs an operator reads when it runs."""

    ALL = "all"
    PICKED = "picked"  # of input 0 only as many bytes as it writes: Gather, Slice
    NOTHING = "nothing"  # views, Shape, Constant


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OpFacts:
    """What is true of an operator, whatever its shapes.

    `elementwise`: each output element depends on the elements at the same (broadcast) position.
    `movement_only`: elements are copied, dropped or repeated, never computed.
    `view`: a runtime need not even copy them. `weight_inputs`: where weights may sit.
    `weight_channel_axis`: the axis of the weight that per-channel quantization scales, None when
    there is none. `pure`: equal inputs give equal outputs and nothing else happens; control flow
    is as pure as its bodies, which `ops.is_pure` looks into. `formula`: its arithmetic, None
    for control flow and unknown operators.
    """

    name: str
    domain: str
    category: Category
    elementwise: bool = False
    movement_only: bool = False
    view: bool = False
    weight_inputs: tuple[int, ...] = ()
    weight_channel_axis: int | None = None
    pure: bool = True
    reads: Reads = Reads.ALL
    formula: Formula | None = None


TABLE: dict[tuple[str, str], OpFacts] = {}

# Keyword groups that many rows share.
_VIEW = {"view": True, "movement_only": True, "reads": Reads.NOTHING, "formula": costs.no_work}
_MOVE = {"movement_only": True, "formula": costs.no_work}
_PICK = {"movement_only": True, "reads": Reads.PICKED, "formula": costs.no_work}


def _add(domain: str, category: Category, names: str, **facts: object) -> None:
    for name in names.split():
        key = (domain, name)
        assert key not in TABLE, key
        TABLE[key] = OpFacts(name=name, domain=domain, category=category, **facts)  # type: ignore[arg-type]


def _elementwise(domain: str, flops: float, names: str, **facts: object) -> None:
    _add(
        domain,
        Category.ELEMENTWISE,
        names,
        elementwise=True,
        formula=costs.per_output(flops),
        **facts,
    )


def _standard_elementwise() -> None:
    _elementwise(
        "",
        1,
        "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr "
        "BitwiseXor Ceil Cos Cosh Div Equal Erf Exp Floor Greater GreaterOrEqual IsInf IsNaN Less "
        "LessOrEqual Log Mod Mul Neg Not Or Pow Reciprocal Relu Round Sign Sin Sinh Sqrt Sub Tan "
        "Tanh Xor Where ThresholdedRelu",
    )
    _elementwise("", 1, "Cast CastLike")
    _elementwise("", 2, "Clip LeakyRelu PRelu Softsign Shrink")
    _elementwise("", 3, "Softplus Elu HardSigmoid")
    _elementwise("", 4, "Selu Celu HardSwish")
    _elementwise("", SIGMOID_FLOPS, "Sigmoid")
    _elementwise("", SIGMOID_FLOPS + 2, "Swish")
    _elementwise("", SIGMOID_FLOPS + 3, "SwiGLU")
    _elementwise("", 5, "Gelu Mish")
    _add("", Category.ELEMENTWISE, "Sum Max Min Mean", elementwise=True, formula=costs.variadic)
    # Inference form: the identity. A node with training_mode set is random; see `ops`.
    _add("", Category.ELEMENTWISE, "Dropout", elementwise=True, **_VIEW)


def _standard_compute() -> None:
    conv = {"weight_inputs": (1, 2), "weight_channel_axis": 0}
    _add("", Category.CONVOLUTION, "Conv", formula=costs.convolution(), **conv)
    _add(
        "",
        Category.CONVOLUTION,
        "DeformConv",
        weight_inputs=(1, 3),
        weight_channel_axis=0,
        formula=costs.convolution_deformable,
    )
    _add(
        "",
        Category.CONVOLUTION,
        "ConvTranspose",
        weight_inputs=(1, 2),
        weight_channel_axis=1,
        formula=costs.convolution_transposed,
    )
    _add("", Category.CONVOLUTION, "CausalConvWithState", formula=costs.convolution_causal, **conv)
    _add(
        "",
        Category.CONVOLUTION,
        "ConvInteger",
        weight_inputs=(1,),
        weight_channel_axis=0,
        formula=costs.convolution(bias=None),
    )
    _add(
        "",
        Category.CONVOLUTION,
        "QLinearConv",
        weight_inputs=(3, 8),
        weight_channel_axis=0,
        formula=costs.convolution(weight=3, bias=8, per_element=4),
    )
    _add("", Category.CONVOLUTION, "Col2Im", formula=costs.per_input(1))

    matrix = {"weight_inputs": (0, 1), "weight_channel_axis": -1}
    _add("", Category.MATMUL, "MatMul MatMulInteger", formula=costs.matmul(), **matrix)
    _add(
        "",
        Category.MATMUL,
        "QLinearMatMul",
        weight_inputs=(0, 3),
        weight_channel_axis=-1,
        formula=costs.matmul(per_element=4),
    )
    _add(
        "",
        Category.MATMUL,
        "Gemm",
        weight_inputs=(1, 2),
        weight_channel_axis=1,
        formula=costs.gemm(),
    )
    _add("", Category.MATMUL, "Einsum", weight_inputs=(0, 1), formula=costs.einsum)

    _add(
        "",
        Category.RECURRENT,
        "LSTM GRU RNN",
        weight_inputs=(1, 2, 3),
        weight_channel_axis=1,
        formula=costs.recurrent,
    )
    _add("", Category.ATTENTION, "Attention", formula=costs.attention)
    _add("", Category.ATTENTION, "LinearAttention", formula=costs.attention_linear)
    _add(PREVIEW_DOMAIN, Category.ATTENTION, "FlexAttention", formula=costs.attention_flex)
    _add("", Category.ATTENTION, "RotaryEmbedding", formula=costs.rotary())


def _standard_reductions() -> None:
    reduction = Category.REDUCTION
    one = "ReduceMax ReduceMin ReduceProd ReduceSum ReduceMean ArgMax ArgMin CumSum CumProd"
    _add("", reduction, one, formula=costs.per_input(1))
    _add(
        "", reduction, "ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum", formula=costs.per_input(2)
    )
    _add("", reduction, "ReduceLogSumExp", formula=costs.per_input(4))
    _add("", reduction, "NegativeLogLikelihoodLoss", formula=costs.per_input(1, 1))
    _add("", reduction, "SoftmaxCrossEntropyLoss", formula=costs.per_input(SOFTMAX_FLOPS + 1))
    _add("", reduction, "TopK Unique", formula=costs.sort)
    _add("", reduction, "Det", formula=costs.determinant)

    norm = Category.NORMALIZATION
    # A runtime folds scale, shift, mean and variance into one multiply and one add a channel.
    _add("", norm, "BatchNormalization", weight_inputs=(1, 2, 3, 4), formula=costs.per_input(2))
    # Mean, centre, square, sum, multiply by 1/sqrt, scale, shift.
    _add(
        "",
        norm,
        "LayerNormalization InstanceNormalization GroupNormalization",
        weight_inputs=(1, 2),
        formula=costs.per_input(7),
    )
    _add("", norm, "RMSNormalization", weight_inputs=(1,), formula=costs.per_input(4))
    # What ONNX Runtime writes in the standard domain for RMS normalization.
    _add("", norm, "SimplifiedLayerNormalization", weight_inputs=(1,), formula=costs.per_input(4))
    _add("", norm, "MeanVarianceNormalization", formula=costs.per_input(5))
    _add("", norm, "LpNormalization", formula=costs.per_input(3))
    _add("", norm, "LRN", formula=costs.local_response)
    _add("", norm, "Softmax LogSoftmax", formula=costs.per_input(SOFTMAX_FLOPS))
    _add("", norm, "Hardmax", formula=costs.per_input(1))

    pool = Category.POOLING
    _add("", pool, "MaxPool AveragePool", formula=costs.pooling())
    _add("", pool, "LpPool", formula=costs.pooling(2))
    _add("", pool, "GlobalMaxPool GlobalAveragePool", formula=costs.per_input(1))
    _add("", pool, "GlobalLpPool", formula=costs.per_input(2))
    _add("", pool, "RoiAlign", formula=costs.roi_align)
    _add("", pool, "MaxRoiPool", formula=costs.unknown("the size of each region is data"))
    _add("", pool, "MaxUnpool", **_MOVE)


def _standard_movement() -> None:
    move = Category.DATA_MOVEMENT
    _add("", move, "Reshape Squeeze Unsqueeze Identity Flatten BitCast", **_VIEW)
    _add(
        "",
        move,
        "Concat DepthToSpace Expand EyeLike OneHot Pad ReverseSequence SpaceToDepth "
        "Split Tile Transpose Trilu Compress",
        **_MOVE,
    )
    _add("", move, "Slice CenterCropPad", **_PICK)
    _add("", move, "NonZero", formula=costs.per_input(1))
    _add("", move, "Scatter ScatterElements ScatterND TensorScatter", formula=costs.scatter)
    _add("", Category.GATHER, "Gather GatherElements GatherND", weight_inputs=(0,), **_PICK)
    _add("", Category.SHAPE_COMPUTATION, "Shape Size", reads=Reads.NOTHING, formula=costs.no_work)
    _add("", Category.SHAPE_COMPUTATION, "Constant", reads=Reads.NOTHING, formula=costs.no_work)
    _add("", Category.SHAPE_COMPUTATION, "ConstantOfShape", **_MOVE)
    _add("", Category.SHAPE_COMPUTATION, "Range", formula=costs.per_output(1))
    _add("", Category.OTHER, "Resize Upsample", formula=costs.interpolation)
    _add("", Category.OTHER, "GridSample", formula=costs.grid_sample)
    _add("", Category.OTHER, "AffineGrid", formula=costs.affine_grid)


def _standard_rest() -> None:
    quantize = Category.QUANTIZATION
    # Divide, round, add the zero point, saturate; and subtract, multiply on the way back.
    _add("", quantize, "QuantizeLinear", elementwise=True, formula=costs.per_output(4))
    _add("", quantize, "DequantizeLinear", elementwise=True, formula=costs.per_output(2))
    _add("", quantize, "DynamicQuantizeLinear", formula=costs.per_output(6))

    _add("", Category.CONTROL_FLOW, "If Loop Scan SequenceMap")
    rand = {"pure": False, "formula": costs.per_output(1)}  # a draw counts as one
    _add(
        "",
        Category.RANDOM,
        "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike",
        **rand,
    )

    _add(
        "",
        Category.SEQUENCE,
        "SequenceAt SequenceConstruct SequenceEmpty SequenceErase "
        "SequenceInsert SequenceLength ConcatFromSequence SplitToSequence Optional "
        "OptionalGetElement OptionalHasElement",
        **_MOVE,
    )
    text = costs.unknown("work on strings depends on their lengths")
    _add(
        "",
        Category.STRING,
        "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
        formula=text,
    )

    _add("", Category.OTHER, "DFT STFT", formula=costs.fourier)
    _add("", Category.OTHER, "BlackmanWindow", formula=costs.per_output(8))
    _add("", Category.OTHER, "HammingWindow HannWindow", formula=costs.per_output(4))
    _add("", Category.OTHER, "MelWeightMatrix", formula=costs.per_output(4))
    _add(
        "",
        Category.OTHER,
        "NonMaxSuppression",
        formula=costs.unknown("how many boxes are compared depends on the scores"),
    )
    _add(
        "",
        Category.OTHER,
        "ImageDecoder",
        formula=costs.unknown("decoding depends on the compressed data"),
    )

    update = Category.ELEMENTWISE
    _add(TRAINING_DOMAIN, update, "Adagrad", formula=costs.optimizer(8))
    _add(TRAINING_DOMAIN, update, "Adam", formula=costs.optimizer(12))
    _add(TRAINING_DOMAIN, update, "Momentum", formula=costs.optimizer(6))
    _add(
        TRAINING_DOMAIN,
        Category.OTHER,
        "Gradient",
        formula=costs.unknown("it costs what the graph it differentiates costs"),
    )


def _classical_ml() -> None:
    _elementwise(ML_DOMAIN, 1, "Binarizer Imputer")
    _elementwise(ML_DOMAIN, 2, "Scaler")
    _add(ML_DOMAIN, Category.NORMALIZATION, "Normalizer", formula=costs.per_input(3))
    _add(ML_DOMAIN, Category.MATMUL, "LinearClassifier LinearRegressor", formula=costs.linear_model)
    _add(ML_DOMAIN, Category.MATMUL, "SVMClassifier SVMRegressor", formula=costs.support_vectors)
    _add(ML_DOMAIN, Category.GATHER, "ArrayFeatureExtractor", **_PICK)
    _add(ML_DOMAIN, Category.DATA_MOVEMENT, "FeatureVectorizer OneHotEncoder", **_MOVE)
    _add(
        ML_DOMAIN,
        Category.OTHER,
        "TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor",
        formula=costs.unknown("the path through each tree depends on the data"),
    )
    _add(
        ML_DOMAIN,
        Category.OTHER,
        "LabelEncoder CategoryMapper CastMap DictVectorizer ZipMap",
        formula=costs.unknown("table look-ups on keys are not modelled"),
    )


def _contrib_compute() -> None:
    ms = CONTRIB_DOMAIN
    conv = {"weight_inputs": (1, 2), "weight_channel_axis": 0}
    _add(
        ms,
        Category.CONVOLUTION,
        "FusedConv NhwcFusedConv",
        formula=costs.convolution_fused,
        **conv,
    )
    _add(ms, Category.CONVOLUTION, "NhwcConv", formula=costs.convolution(), **conv)
    _add(
        ms,
        Category.CONVOLUTION,
        "QLinearConv",
        weight_inputs=(3, 8),
        weight_channel_axis=0,
        formula=costs.convolution(weight=3, bias=8, per_element=4),
    )
    _add(
        ms,
        Category.CONVOLUTION,
        "ConvTransposeWithDynamicPads",
        weight_inputs=(1, 3),
        weight_channel_axis=1,
        formula=costs.convolution_transposed,
    )

    matrix = {"weight_inputs": (0, 1), "weight_channel_axis": -1}
    names = "FusedMatMul TransposeMatMul MatMulInteger16 SparseToDenseMatMul"
    _add(ms, Category.MATMUL, names, formula=costs.matmul(), **matrix)
    _add(
        ms, Category.MATMUL, "FusedMatMulActivation", formula=costs.matmul(per_element=1), **matrix
    )
    # Scale, and quantize A first where it is dynamic (counted with the output's elements).
    _add(
        ms,
        Category.MATMUL,
        "DynamicQuantizeMatMul",
        formula=costs.matmul(bias=4, per_element=2),
        **matrix,
    )
    _add(
        ms,
        Category.MATMUL,
        "MatMulIntegerToFloat",
        formula=costs.matmul(bias=6, per_element=2),
        **matrix,
    )
    _add(
        ms,
        Category.MATMUL,
        "FusedGemm",
        weight_inputs=(1, 2),
        weight_channel_axis=1,
        formula=costs.gemm(per_element=1),
    )
    _add(
        ms,
        Category.MATMUL,
        "GemmFastGelu",
        weight_inputs=(1, 2),
        weight_channel_axis=-1,
        formula=costs.matmul(bias=2, per_element=7),
    )
    _add(
        ms,
        Category.MATMUL,
        "GemmFloat8",
        weight_inputs=(1, 2),
        weight_channel_axis=1,
        formula=costs.gemm(per_element=1),
    )
    _add(
        ms,
        Category.MATMUL,
        "QGemm",
        weight_inputs=(3, 6),
        weight_channel_axis=1,
        formula=costs.gemm(per_element=4, bias=6),
    )
    _add(
        ms,
        Category.MATMUL,
        "MatMulNBits MatMulBnb4 MatMulFpQ4",
        weight_inputs=(1,),
        weight_channel_axis=0,
        formula=costs.matmul_blockwise,
    )

    _add(
        ms,
        Category.RECURRENT,
        "DynamicQuantizeLSTM",
        weight_inputs=(1, 2, 3),
        weight_channel_axis=2,
        formula=costs.recurrent,
    )
    projected = {"weight_inputs": (1, 2), "weight_channel_axis": -1}
    _add(
        ms,
        Category.ATTENTION,
        "Attention",
        formula=costs.attention_with_projection(past=4),
        **projected,
    )
    _add(
        ms,
        Category.ATTENTION,
        "QAttention",
        formula=costs.attention_with_projection(past=8),
        **projected,
    )
    _add(ms, Category.ATTENTION, "MultiHeadAttention", formula=costs.attention_multi_head)
    _add(
        ms,
        Category.ATTENTION,
        "DecoderMaskedMultiHeadAttention",
        formula=costs.unknown("the filled length of the cache is data"),
    )
    _add(ms, Category.ATTENTION, "GroupQueryAttention", formula=costs.attention_grouped_query)
    _add(
        ms,
        Category.ATTENTION,
        "SparseAttention PackedAttention PackedMultiHeadAttention "
        "PagedAttention LongformerAttention",
        formula=costs.unknown("its sparsity or packing is data"),
    )
    _add(ms, Category.ATTENTION, "RotaryEmbedding GemmaRotaryEmbedding", formula=costs.rotary())
    _add(ms, Category.MATMUL, "MoE QMoE", formula=costs.unknown("the routing to experts is data"))
    _add(ms, Category.OTHER, "CDist", formula=costs.pairwise_distance)
    _add(ms, Category.OTHER, "Inverse", formula=costs.inverse)
    _add(
        ms,
        Category.OTHER,
        "Rfft Irfft",
        formula=costs.unknown("contrib transforms are not modelled"),
    )


def _contrib_rest() -> None:
    ms = CONTRIB_DOMAIN
    _elementwise(ms, 5, "Gelu QuickGelu")
    _elementwise(ms, 6, "BiasGelu")
    _elementwise(ms, 7, "FastGelu")
    _elementwise(ms, 3, "ComplexMul ComplexMulConj")
    _elementwise(ms, 1, "BiasAdd MulInteger GatedAdd")
    _elementwise(ms, 7, "BiasSplitGelu")
    _elementwise(ms, SIGMOID_FLOPS + 3, "SwiGLU")
    _elementwise(ms, 2, "BiasDropout BitmaskDropout BitmaskBiasDropout")

    norm = Category.NORMALIZATION
    _add(ms, norm, "SkipLayerNormalization", weight_inputs=(2, 3, 4), formula=costs.per_input(8))
    _add(
        ms,
        norm,
        "SkipSimplifiedLayerNormalization",
        weight_inputs=(2, 3),
        formula=costs.per_input(5),
    )
    _add(ms, norm, "LayerNormalization", weight_inputs=(1, 2), formula=costs.per_input(7))
    _add(ms, norm, "SimplifiedLayerNormalization", weight_inputs=(1,), formula=costs.per_input(4))
    _add(ms, norm, "GroupNorm", weight_inputs=(1, 2), formula=costs.per_input(7))
    _add(ms, norm, "SkipGroupNorm", weight_inputs=(1, 2, 4), formula=costs.per_input(8))
    _add(ms, norm, "BiasSoftmax", formula=costs.per_input(SOFTMAX_FLOPS + 1))
    # Two or three rows looked up and added, then LayerNormalization.
    _add(
        ms,
        Category.GATHER,
        "EmbedLayerNormalization",
        weight_inputs=(2, 3, 4, 5, 6),
        formula=costs.per_output(9),
    )
    _add(
        ms,
        Category.GATHER,
        "QEmbedLayerNormalization",
        weight_inputs=(2, 3, 4, 5, 6),
        formula=costs.per_output(15),
    )
    _add(ms, Category.GATHER, "GatherND", weight_inputs=(0,), **_PICK)
    _add(
        ms,
        Category.GATHER,
        "GatherBlockQuantized",
        weight_inputs=(0,),
        reads=Reads.PICKED,
        formula=costs.per_output(2),
    )

    quantize = Category.QUANTIZATION
    _add(ms, quantize, "QuantizeLinear", elementwise=True, formula=costs.per_output(4))
    _add(ms, quantize, "DequantizeLinear", elementwise=True, formula=costs.per_output(2))
    # Dequantize each operand (2), compute, requantize (4).
    _elementwise(ms, 9, "QLinearAdd QLinearMul")
    _elementwise(ms, 8, "QLinearLeakyRelu QLinearWhere")
    _elementwise(ms, 6 + SIGMOID_FLOPS, "QLinearSigmoid")
    _add(ms, norm, "QLinearSoftmax", formula=costs.per_input(6 + SOFTMAX_FLOPS))
    _add(ms, Category.POOLING, "QLinearAveragePool", formula=costs.pooling())
    _add(ms, Category.POOLING, "NhwcMaxPool MaxpoolWithMask", formula=costs.pooling())
    _add(ms, Category.POOLING, "QLinearGlobalAveragePool", formula=costs.per_input(1))
    _add(ms, Category.REDUCTION, "QLinearReduceMean ReduceSumInteger", formula=costs.per_input(1))
    _add(ms, Category.DATA_MOVEMENT, "QLinearConcat", formula=costs.per_output(6))

    _add(ms, Category.DATA_MOVEMENT, "ExpandDims", **_VIEW)
    _add(ms, Category.DATA_MOVEMENT, "Pad Trilu RemovePadding RestorePadding UnfoldTensor", **_MOVE)
    _add(ms, Category.REDUCTION, "Unique", formula=costs.sort)
    _add(ms, Category.SHAPE_COMPUTATION, "Range", formula=costs.per_output(1))
    _add(ms, Category.OTHER, "GridSample", formula=costs.grid_sample)
    _add(ms, Category.OTHER, "CropAndResize", formula=costs.per_output(8))
    _add(ms, Category.OTHER, "IsAllFinite", formula=costs.per_input(1))
    _add(
        ms,
        Category.STRING,
        "Tokenizer MurmurHash3",
        formula=costs.unknown("work on strings depends on their lengths"),
    )
    _add(
        ms,
        Category.CONTROL_FLOW,
        "BeamSearch GreedySearch Sampling WhisperBeamSearch",
        pure=False,
        formula=costs.unknown("the number of decoding steps is data"),
    )
    _add(
        ms,
        Category.OTHER,
        "EPContext",
        formula=costs.unknown("a compiled blob for one accelerator"),
    )


for _section in (
    _standard_elementwise,
    _standard_compute,
    _standard_reductions,
    _standard_movement,
    _standard_rest,
    _classical_ml,
    _contrib_compute,
    _contrib_rest,
):
    _section()
