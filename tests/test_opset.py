# ruff: noqa: E501 - the table of cases reads better one a line
"""Opset conversion: every standard operator's change from opset 6 on, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgepass.errors import InvalidGraphError, UnsupportedOpError, UsageError
from edgepass.frontends import load_model
from edgepass.frontends.opset import _history, to_supported_opset
from edgepass.frontends.opset_adapters import ADAPTERS, NEWEST_CONVERTIBLE, WIDENED
from edgepass.ir.graph import AbsentTensor, all_nodes, opset_of

F = np.float32
RNG = np.random.default_rng(0)


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options).run(None, feeds)


def feeds_of(proto: onnx.ModelProto, free: int = 3) -> dict[str, np.ndarray]:
    """Random inputs; symbolic dimensions take `free`, integers 0..2, bools False and True."""
    given = {tensor.name for tensor in proto.graph.initializer}
    feeds = {}
    for info in proto.graph.input:
        if info.name in given:
            continue
        shape = [d.dim_value if d.dim_value > 0 else free for d in info.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        if dtype == np.bool_:
            feeds[info.name] = RNG.integers(0, 2, shape).astype(bool)
        elif dtype.kind in "iu":
            feeds[info.name] = RNG.integers(0, 3, shape).astype(dtype)
        else:
            feeds[info.name] = np.asarray(RNG.standard_normal(shape) * 2).astype(dtype)
    return feeds


def model(opset: int, text: str, extra: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 7, opset_import: ["": {opset}{extra}]> {text}')


def convert(proto: onnx.ModelProto, minimum: int = 18) -> tuple[onnx.ModelProto, list[str]]:
    graph = ir.from_proto(proto)
    notes = to_supported_opset(graph, minimum)
    return ir.to_proto(graph), notes


def check_same(proto: onnx.ModelProto, minimum: int = 18) -> onnx.ModelProto:
    converted, _ = convert(proto, minimum)
    onnx.checker.check_model(converted)
    assert [i.name for i in converted.graph.input] == [i.name for i in proto.graph.input]
    assert [o.name for o in converted.graph.output] == [o.name for o in proto.graph.output]
    feeds = feeds_of(proto)
    for before, after in zip(run(proto, feeds), run(converted, feeds), strict=True):
        assert before.dtype == after.dtype
        assert before.shape == after.shape
        if before.dtype.kind == "f":
            np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(after, before)
    return converted


X = "float[2,3,4,5] x"
CASES: list[tuple[str, int, str]] = [
    ("softmax-default", 7, f"g({X}) => (float[2,3,4,5] y) {{ y = Softmax(x) }}"),
    ("softmax-0", 11, f"g({X}) => (float[2,3,4,5] y) {{ y = Softmax<axis=0>(x) }}"),
    ("softmax-neg2", 11, f"g({X}) => (float[2,3,4,5] y) {{ y = Softmax<axis=-2>(x) }}"),
    ("softmax-last", 8, f"g({X}) => (float[2,3,4,5] y) {{ y = Softmax<axis=3>(x) }}"),
    ("softmax-dynamic", 9, "g(float[N,3,M] x) => (float[N,3,M] y) { y = Softmax(x) }"),
    ("logsoftmax", 11, f"g({X}) => (float[2,3,4,5] y) {{ y = LogSoftmax<axis=2>(x) }}"),
    ("hardmax", 11, f"g({X}) => (float[2,3,4,5] y) {{ y = Hardmax(x) }}"),
    ("squeeze", 11, "g(float[1,3,1] x) => (float[3] y) { y = Squeeze<axes=[0,-1]>(x) }"),
    ("squeeze-all", 7, "g(float[1,3,1] x) => (float[3] y) { y = Squeeze(x) }"),
    ("unsqueeze", 7, "g(float[3] x) => (float[1,3,1] y) { y = Unsqueeze<axes=[0,2]>(x) }"),
    *[
        (f"reduce{kind}-{opset}", opset,
         f"g({X}) => (float[2,1,4,1] y) {{ a = Abs(x) y = Reduce{kind}<axes=[1,3]>(a) }}")
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum",
                     "SumSquare")
        for opset in (7, 12)
    ],
    ("reduce-neg", 13, f"g({X}) => (float[2,3,4] y) {{ y = ReduceMean<axes=[-1],keepdims=0>(x) }}"),
    ("reduce-all", 11, f"g({X}) => (float y) {{ y = ReduceMax<keepdims=0>(x) }}"),
    ("clip", 7, f"g({X}) => (float[2,3,4,5] y) {{ y = Clip<min=-0.5,max=0.5>(x) }}"),
    ("clip-min", 10, f"g({X}) => (float[2,3,4,5] y) {{ y = Clip<min=0.25>(x) }}"),
    ("clip-none", 7, f"g({X}) => (float[2,3,4,5] y) {{ y = Clip(x) }}"),
    ("clip-12", 12, f"g({X}, float lo) => (float[2,3,4,5] y) {{ y = Clip(x, lo) }}"),
    ("pad", 7, f"g({X}) => (float[2,5,4,8] y) {{ y = Pad<pads=[0,1,0,1,0,1,0,2],value=1.5>(x) }}"),
    ("pad-edge", 10, f"g({X}) => (float[2,5,4,8] y) {{ y = Pad<mode=\"edge\",pads=[0,1,0,1,0,1,0,2]>(x) }}"),
    ("pad-reflect", 7, f"g({X}) => (float[2,5,4,8] y) {{ y = Pad<mode=\"reflect\",pads=[0,1,0,1,0,1,0,2]>(x) }}"),
    ("slice", 9, f"g({X}) => (float[2,2,4,3] y) {{ y = Slice<starts=[1,-3],ends=[3,100],axes=[1,3]>(x) }}"),
    ("slice-no-axes", 7, f"g({X}) => (float[1,2,4,5] y) {{ y = Slice<starts=[1,0],ends=[2,2]>(x) }}"),
    ("topk-1", 9, f"g({X}) => (float[2,3,4,2] v, int64[2,3,4,2] i) {{ v, i = TopK<k=2>(x) }}"),
    ("topk-10", 10, f"g({X}) => (float[2,3,2,5] v, int64[2,3,2,5] i) {{ k = Constant<value=int64[1] {{2}}>() v, i = TopK<axis=2>(x, k) }}"),
    ("upsample-7", 7, "g(float[1,2,3,4] x) => (float[1,2,6,12] y) { y = Upsample<scales=[1.0,1.0,2.0,3.0]>(x) }"),
    ("upsample-7-linear", 8, "g(float[1,2,3,4] x) => (float[1,2,6,12] y) { y = Upsample<mode=\"linear\",scales=[1.0,1.0,2.0,3.0]>(x) }"),
    ("upsample-9", 9, "g(float[1,2,3,4] x) => (float[1,2,6,10] y) { s = Constant<value=float[4] {1.0,1.0,2.0,2.5}>() y = Upsample(x, s) }"),
    ("upsample-9-dynamic", 9, "g(float[1,2,3,4] x, float[4] t) => (float[a,b,c,d] y) { u = Clip<min=1.0,max=2.0>(t) y = Upsample<mode=\"linear\">(x, u) }"),
    ("resize-10-up", 10, "g(float[1,2,3,4] x) => (float[1,2,6,10] y) { s = Constant<value=float[4] {1.0,1.0,2.0,2.5}>() y = Resize(x, s) }"),
    ("resize-10-down", 10, "g(float[1,2,6,7] x) => (float[1,2,3,4] y) { s = Constant<value=float[4] {1.0,1.0,0.5,0.6}>() y = Resize(x, s) }"),
    ("resize-10-mixed", 10, "g(float[1,2,6,7] x) => (float[1,2,3,14] y) { s = Constant<value=float[4] {1.0,1.0,0.5,2.0}>() y = Resize(x, s) }"),
    ("resize-10-dynamic", 10, "g(float[1,2,6,7] x, float[4] t) => (float[a,b,c,d] y) { u = Clip<min=0.4,max=2.3>(t) y = Resize(x, u) }"),
    ("resize-10-linear", 10, "g(float[1,2,6,7] x) => (float[1,2,3,14] y) { s = Constant<value=float[4] {1.0,1.0,0.5,2.0}>() y = Resize<mode=\"linear\">(x, s) }"),
    ("resize-11-sizes", 11, "g(float[1,2,6,7] x) => (float[1,2,9,4] y) { r = Constant<value=float[0] {}>() s = Constant<value=float[0] {}>() z = Constant<value=int64[4] {1,2,9,4}>() y = Resize<mode=\"linear\",coordinate_transformation_mode=\"align_corners\">(x, r, s, z) }"),
    ("resize-11-scales", 11, "g(float[1,2,6,7] x) => (float[1,2,12,14] y) { r = Constant<value=float[0] {}>() s = Constant<value=float[4] {1.0,1.0,2.0,2.0}>() y = Resize<mode=\"cubic\">(x, r, s) }"),
    ("resize-11-nn", 11, "g(float[1,2,6,7] x) => (float[1,2,12,10] y) { r = Constant<value=float[0] {}>() s = Constant<value=float[4] {1.0,1.0,2.0,1.5}>() y = Resize<coordinate_transformation_mode=\"tf_half_pixel_for_nn\",nearest_mode=\"floor\">(x, r, s) }"),
    ("dropout-7", 7, f"g({X}) => (float[2,3,4,5] y) {{ y, m = Dropout<ratio=0.3>(x) }}"),
    ("dropout-10", 10, f"g({X}) => (float[2,3,4,5] y) {{ y = Dropout(x) }}"),
    ("batchnorm-7", 7, f"g({X}, float[3] s, float[3] b, float[3] m, float[3] w) => (float[2,3,4,5] y) {{ v = Abs(w) y = BatchNormalization<epsilon=0.1>(x,s,b,m,v) }}"),
    ("batchnorm-9", 9, f"g({X}, float[3] s, float[3] b, float[3] m, float[3] w) => (float[2,3,4,5] y) {{ v = Abs(w) y = BatchNormalization(x,s,b,m,v) }}"),
    ("split", 7, f"g({X}) => (float[2,1,4,5] a, float[2,2,4,5] b) {{ a, b = Split<axis=1,split=[1,2]>(x) }}"),
    ("split-equal", 11, f"g({X}) => (float[2,3,2,5] a, float[2,3,2,5] b) {{ a, b = Split<axis=2>(x) }}"),
    ("split-13", 13, f"g({X}) => (float[2,3,2,5] a, float[2,3,2,5] b) {{ a, b = Split<axis=2>(x) }}"),
    ("gemm", 7, "g(float[2,3] a, float[3,4] b, float[4] c) => (float[2,4] y) { y = Gemm<alpha=0.5>(a,b,c) }"),
    ("matmul", 7, "g(float[2,3] a, float[3,4] b) => (float[2,4] y) { y = MatMul(a,b) }"),
    ("cast", 7, f"g({X}) => (int64[2,3,4,5] y) {{ y = Cast<to=7>(x) }}"),
    ("maxpool", 7, "g(float[1,2,7,7] x) => (float[1,2,4,4] y) { y = MaxPool<kernel_shape=[3,3],strides=[2,2],pads=[1,1,1,1]>(x) }"),
    ("maxpool-ceil", 10, "g(float[1,2,7,7] x) => (float[1,2,4,4] y, int64[1,2,4,4] i) { y, i = MaxPool<kernel_shape=[2,2],strides=[2,2],ceil_mode=1>(x) }"),
    ("averagepool", 7, "g(float[1,2,7,7] x) => (float[1,2,4,4] y) { y = AveragePool<kernel_shape=[3,3],strides=[2,2],pads=[1,1,1,1]>(x) }"),
    ("averagepool-pad", 10, "g(float[1,2,7,7] x) => (float[1,2,4,4] y) { y = AveragePool<kernel_shape=[3,3],strides=[2,2],pads=[1,1,1,1],count_include_pad=1>(x) }"),
    ("lppool", 7, "g(float[1,2,8,8] x) => (float[1,2,4,4] y) { y = LpPool<kernel_shape=[2,2],strides=[2,2]>(x) }"),
    ("conv", 7, "g(float[1,2,7,7] x, float[4,2,3,3] w) => (float[1,4,7,7] y) { y = Conv<auto_pad=\"SAME_UPPER\">(x,w) }"),
    ("convtranspose", 7, "g(float[1,2,4,4] x, float[2,4,3,3] w) => (float[1,4,8,8] y) { y = ConvTranspose<strides=[2,2],pads=[1,1,1,1],output_padding=[1,1]>(x,w) }"),
    ("flatten", 7, f"g({X}) => (float[6,20] y) {{ y = Flatten<axis=2>(x) }}"),
    ("reshape", 7, f"g({X}) => (float[2,60] y) {{ s = Constant<value=int64[2] {{0,-1}}>() y = Reshape(x, s) }}"),
    ("tile", 7, "g(float[2,3] x) => (float[4,3] y) { r = Constant<value=int64[2] {2,1}>() y = Tile(x, r) }"),
    ("expand", 8, "g(float[2,1] x) => (float[2,3] y) { s = Constant<value=int64[2] {2,3}>() y = Expand(x, s) }"),
    ("onehot", 9, "g(int64[3] x) => (float[3,4] y) { d = Constant<value=int64[1] {4}>() v = Constant<value=float[2] {0.0,2.0}>() y = OneHot(x,d,v) }"),
    ("gather", 7, f"g({X}, int64[2] i) => (float[2,2,4,5] y) {{ y = Gather<axis=1>(x,i) }}"),
    ("scatter", 9, "g(float[3,3] x, int64[1,3] i, float[1,3] u) => (float[3,3] y) { y = Scatter(x,i,u) }"),
    ("argmax", 7, f"g({X}) => (int64[2,1,4,5] y) {{ y = ArgMax<axis=1>(x) }}"),
    ("argmin-12", 12, f"g({X}) => (int64[2,4,5] y) {{ y = ArgMin<axis=1,keepdims=0>(x) }}"),
    ("where", 9, "g(bool[2,3] c, float[2,3] a, float[3] b) => (float[2,3] y) { y = Where(c,a,b) }"),
    ("equal", 7, "g(int64[2,3] a, int64[3] b) => (bool[2,3] y) { y = Equal(a,b) }"),
    ("less-greater", 7, "g(float[2,3] a, float[3] b) => (bool[2,3] y, bool[2,3] z) { y = Less(a,b) z = Greater(a,b) }"),
    ("minmax", 7, "g(float[2,3] a, float[2,3] b) => (float[2,3] y) { p = Min(a,b) q = Max(a,p) r = Sum(p,q) y = Mean(r,a) }"),
    ("unary", 7, f"g({X}) => (float[2,3,4,5] y) {{ a = Abs(x) b = Sqrt(a) c = Exp(b) d = Log(c) e = Tanh(d) f = Sigmoid(e) h = Neg(f) i = Floor(h) j = Ceil(i) k = Elu(j) l = Selu(k) y = Softplus(l) }}"),
    ("arithmetic", 7, "g(float[2,3] a, float[3] b) => (float[2,3] y) { p = Add(a,b) q = Sub(p,b) r = Mul(q,a) c = Abs(b) d = Exp(c) s = Div(r,d) t = Pow(d,c) y = PRelu(s,t) }"),
    ("shapes", 7, f"g({X}) => (int64[4] y, int64 z) {{ y = Shape(x) z = Size(x) }}"),
    ("transpose-concat", 7, "g(float[2,3] a, float[3,2] b) => (float[3,4] y) { t = Transpose(a) y = Concat<axis=1>(t,b) }"),
    ("depth", 7, "g(float[1,8,2,2] x) => (float[1,8,2,2] y) { d = DepthToSpace<blocksize=2>(x) y = SpaceToDepth<blocksize=2>(d) }"),
    ("lrn", 7, f"g({X}) => (float[2,3,4,5] y) {{ y = LRN<size=3>(x) }}"),
    ("instancenorm", 7, f"g({X}, float[3] s, float[3] b) => (float[2,3,4,5] y) {{ y = InstanceNormalization(x,s,b) }}"),
    ("mvn", 9, f"g({X}) => (float[2,3,4,5] y) {{ y = MeanVarianceNormalization(x) }}"),
    ("lstm", 7, "g(float[5,2,3] x, float[1,16,3] w, float[1,16,4] r, float[1,32] b) => (float[5,1,2,4] y, float[1,2,4] h, float[1,2,4] c) { y, h, c = LSTM<hidden_size=4>(x,w,r,b) }"),
    ("gru", 7, "g(float[5,2,3] x, float[2,12,3] w, float[2,12,4] r) => (float[5,2,2,4] y) { y = GRU<hidden_size=4,direction=\"bidirectional\",linear_before_reset=1>(x,w,r) }"),
    ("rnn", 7, "g(float[5,2,3] x, float[1,4,3] w, float[1,4,4] r) => (float[5,1,2,4] y) { y = RNN<hidden_size=4>(x,w,r) }"),
    ("roialign", 10, "g(float[1,2,8,8] x) => (float[2,2,3,3] y) { r = Constant<value=float[2,4] {0.0,0.0,6.0,6.0,1.0,1.5,5.0,7.0}>() b = Constant<value=int64[2] {0,0}>() y = RoiAlign<output_height=3,output_width=3,sampling_ratio=2>(x,r,b) }"),
    ("nms", 10, "g(float[1,4,4] b, float[1,1,4] s) => (int64[n,3] y) { m = Constant<value=int64[1] {3}>() y = NonMaxSuppression<center_point_box=1>(b,s,m) }"),
    ("qdq", 10, "g(float[2,3] x) => (float[2,3] y) { s = Constant<value=float {0.1}>() z = Constant<value=uint8 {128}>() q = QuantizeLinear(x,s,z) y = DequantizeLinear(q,s,z) }"),
    ("cumsum", 11, "g(float[2,3] x) => (float[2,3] y) { a = Constant<value=int64 {1}>() y = CumSum(x,a) }"),
    ("gathernd", 11, "g(float[3,4] x) => (float[2] y) { i = Constant<value=int64[2,2] {0,1,2,3}>() y = GatherND(x,i) }"),
    ("sequence", 11, "g(float[2,3] x) => (float[4,3] y) { s = SequenceConstruct(x,x) y = ConcatFromSequence<axis=0>(s) }"),
    ("unknown-types", 9, "g(float[2,3] x) => (float[a,b] y) { i = Cast<to=1>(x) p = Pad<pads=[0,1,0,1],value=1.0>(i) c = Clip<max=1.0>(p) y = Softmax(c) }"),
    ("double", 11, "g(double[2,3] x) => (double[1,1] y) { c = Cast<to=11>(x) y = ReduceSum<axes=[0,1]>(c) }"),
    ("double-clip", 12, "g(double[2,3] x) => (double[2,3] y) { h = Constant<value=double {1.0}>() y = Clip(x,,h) }"),
    ("if", 11, "g(bool c, float[1,4,3] x) => (float[4,3] y) { y = If(c)<then_branch = t() => (float[4,3] a) { s = Softmax(x) a = Squeeze<axes=[0]>(s) }, else_branch = e() => (float[4,3] b) { u = ReduceMax<axes=[0],keepdims=0>(x) b = Neg(u) }> }"),
    ("if-7", 7, "g(bool c, float[2,3] x) => (float[2,3] y) { y = If(c)<then_branch = t() => (float[2,3] a) { d = Dropout(x) a = Clip<min=0.0>(d) }, else_branch = e() => (float[2,3] b) { u = Unsqueeze<axes=[0]>(x) b = Squeeze<axes=[0]>(u) }> }"),
    ("loop", 11, "g(float[2,3] x) => (float[2,3] y, float[4,2,3] s) { m = Constant<value=int64 {4}>() c = Constant<value=bool {1}>() y, s = Loop(m,c,x)<body = b(int64 i, bool k, float[2,3] v) => (bool k2, float[2,3] v2, float[2,3] o) { k2 = Identity(k) p = Softmax<axis=0>(v) v2 = Clip(p) o = Add(v2,x) }> }"),
    ("scan-9", 9, "g(float[3] s, float[5,3] x) => (float[3] f, float[5,3] y) { f, y = Scan<num_scan_inputs=1, body = b(float[3] a, float[3] e) => (float[3] a2, float[3] o) { t = Add(a,e) a2 = Clip<min=-1.0,max=1.0>(t) o = Identity(a2) }>(s,x) }"),
    ("scan-8", 8, "g(float[2,3] s, float[2,5,3] x) => (float[2,3] f, float[2,5,3] y) { f, y = Scan<num_scan_inputs=1, directions=[1], body = b(float[3] a, float[3] e) => (float[3] a2, float[3] o) { t = Add(a,e) a2 = Clip<min=-1.0,max=1.0>(t) o = Identity(a2) }>(,s,x) }"),
]  # fmt: skip


@pytest.mark.parametrize(("opset", "text"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_conversion_keeps_values_and_interface(opset: int, text: str) -> None:
    converted = check_same(model(opset, text))
    assert converted.opset_import[0].version == 18


def test_every_change_of_every_operator_is_accounted_for() -> None:
    changes = {
        (op, version)
        for op, versions in _history().items()
        for version in versions[1:]
        if 6 < version <= NEWEST_CONVERTIBLE
    }
    widened = {(op, version) for op, versions in WIDENED.items() for version in versions}
    assert not widened & set(ADAPTERS)
    assert widened | set(ADAPTERS) == changes


def test_newer_targets() -> None:
    for text, opset in (
        ("g(float[1,4,5,5] x, float[2] s, float[2] b) => (float[1,4,5,5] y)"
         " { y = GroupNormalization<num_groups=2>(x,s,b) }", 18),
        ("g(float[1,2,4,4] x, float[1,3,3,2] p) => (float[1,2,3,3] y)"
         " { y = GridSample<mode=\"bicubic\">(x,p) }", 16),
        ("g(float[1,4,1] x) => (float[1,4,2] y) { y = DFT(x) }", 17),
        ("g(float[2,6] x) => (float[2,6] y) { y = Softmax<axis=0>(x) }", 9),
    ):  # fmt: skip
        converted = check_same(model(opset, text), minimum=21)
        assert converted.opset_import[0].version == 21


def test_statistics_per_position_of_batch_normalization() -> None:
    proto = model(
        7,
        "g(float[2,3,4] x, float[3,4] s, float[3,4] b, float[3,4] m, float[3,4] w)"
        " => (float[2,3,4] y) { v = Abs(w) y = BatchNormalization<spatial=0>(x,s,b,m,v) }",
    )
    converted, _ = convert(proto)
    feeds = feeds_of(proto)
    x, s, b, m, w = feeds.values()
    expected = (x - m) / np.sqrt(np.abs(w) + 1e-5) * s + b
    np.testing.assert_allclose(run(converted, feeds)[0], expected, rtol=1e-4, atol=1e-5)


def test_half_precision_bounds() -> None:
    check_same(model(11, "g(float16[2,3] x) => (float16[1,3] y) { y = ReduceSum<axes=[0]>(x) }"))
    proto = model(7, "g(float16[2,3] x) => (float16[2,3] y) { y = Clip<min=0.0,max=3.4e38>(x) }")
    converted, _ = convert(proto)
    feeds = feeds_of(proto)
    np.testing.assert_array_equal(run(converted, feeds)[0], np.maximum(feeds["x"], 0))


@pytest.mark.parametrize(
    ("opset", "text", "named"),
    [
        (8, "g(int64[2] n, float[2,3] s, float[2,5,3] x) => (float[2,3] f) {"
            " f = Scan<num_scan_inputs=1, body = b(float[3] a, float[3] e) => (float[3] c)"
            " { c = Add(a,e) }>(n,s,x) }", "sequence_lens"),
        (7, "g(float[2,3] x) => (float[2,3] y, float[2,3] m) { y, m = Dropout(x) }", "mask"),
        (8, "g(float[2,3] x, float[3] s, float[3] b, float[3] m, float[3] v) => (float[2,3] y, "
            "float[3] o) { y, o = BatchNormalization(x,s,b,m,v) }", "training"),
        (11, "g(float[1,1,2,2] x) => (float[1,1,4,4] y) { r = Constant<value=float[0] {}>()"
             " s = Constant<value=float[4] {1.0,1.0,2.0,2.0}>() y = Resize<mode=\"linear\","
             "coordinate_transformation_mode=\"tf_half_pixel_for_nn\">(x,r,s) }", "withdrawn"),
    ],
)  # fmt: skip
def test_refusals_name_the_node(opset: int, text: str, named: str) -> None:
    with pytest.raises(UnsupportedOpError, match="to opset 18") as error:
        convert(model(opset, text))
    assert named in error.value.diagnostic.why
    assert "node " in error.value.diagnostic.where


def test_opsets_out_of_range() -> None:
    identity = "g(float[2] x) => (float[2] y) { y = Identity(x) }"
    for opset in (5, 99):
        with pytest.raises(UnsupportedOpError, match=f"of opset {opset}"):
            convert(model(opset, identity))
    with pytest.raises(UsageError):
        convert(model(11, identity), minimum=17)
    proto = model(11, identity)
    proto.opset_import[0].domain = "com.microsoft"
    with pytest.raises(InvalidGraphError, match="imports no version"):
        convert(proto)


def test_newer_opset_is_left_alone() -> None:
    proto = model(20, "g(float[2] x) => (float[2] y) { y = Gelu(x) }")
    converted, notes = convert(proto)
    assert notes == []
    assert converted.SerializeToString() == ir.to_proto(ir.from_proto(proto)).SerializeToString()


def test_contrib_nodes_metadata_and_doc_strings_stay() -> None:
    proto = model(
        11,
        "g(float[2,3] x) => (float[2,3] y) { z = com.microsoft.Gelu(x) y = Softmax<axis=0>(z) }",
        ', "com.microsoft": 1',
    )
    onnx.helper.set_model_props(proto, {"author": "a person"})
    for node in proto.graph.node:
        node.metadata_props.add(key="origin", value=node.op_type)
    converted = check_same(proto)
    assert converted.metadata_props[0].value == "a person"
    gelu, *others = converted.graph.node
    assert (gelu.domain, gelu.op_type, len(gelu.input)) == ("com.microsoft", "Gelu", 1)
    assert {node.metadata_props[0].value for node in others} == {"Softmax"}


def test_functions_are_converted_in_place() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 10, "loc": 1]>'
        "g(float[2,3] x) => (float[2,3] y) { z = loc.f(x) y = Softmax<axis=0>(z) }"
        '<opset_import: ["": 10], domain: "loc"> f(a) => (b) { c = Clip<min=-1.0>(a)'
        " b = Softmax<axis=0>(c) }"
    )
    converted = check_same(onnx.parser.parse_model(text))
    assert [f.name for f in converted.functions] == ["f"]
    assert converted.functions[0].opset_import[0].version == 18


def test_function_parameter_that_a_rewrite_needs_is_inlined() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 11, "loc": 1]>'
        "g(float[2,3] x) => (float[2,3] y) { y = loc.f<k=0>(x) }"
        '<opset_import: ["": 11], domain: "loc"> f<k>(a) => (b) { b = Softmax<axis: int = @k>(a) }'
    )
    proto = onnx.parser.parse_model(text)
    converted, notes = convert(proto)
    assert not converted.functions
    assert any("inlined" in note for note in notes)
    feeds = feeds_of(proto)
    np.testing.assert_allclose(run(converted, feeds)[0].sum(), 1, rtol=1e-5)


def test_absent_weights_do_not_matter() -> None:
    proto = model(
        11,
        "g(float[2,300] x, float[300,4] w) => (float[2,4] y)"
        " { h = MatMul(x,w) y = Softmax<axis=1>(h) }",
    )
    graph = ir.from_proto(proto)
    weight = graph.graph.inputs.pop()
    weight.const_value = AbsentTensor("w", ir.DataType.FLOAT, [300, 4])
    graph.graph.register_initializer(weight)
    to_supported_opset(graph)
    assert [node.op_type for node in graph.graph] == ["MatMul", "Softmax"]
    assert opset_of(graph) == 18


def test_the_other_spelling_of_the_standard_domain() -> None:
    proto = model(11, "g(float[1,2] x) => (float[2] y) { y = ai.onnx.Squeeze<axes=[0]>(x) }")
    proto.opset_import[0].domain = "ai.onnx"
    graph = ir.from_proto(proto)
    to_supported_opset(graph)
    assert dict(graph.opset_imports) == {"": 18}
    assert all(node.domain == "" for node in all_nodes(graph))


SITE = Path(onnx.__file__).parent.parent
REAL = sorted(
    [
        *SITE.glob("rapidocr/models/*.onnx"),
        *SITE.glob("silero_vad/data/*.onnx"),
        *SITE.glob("magika/models/*/model.onnx"),
    ]
)


@pytest.mark.parametrize(
    "path", REAL, ids=[p.stem if p.stem != "model" else "magika" for p in REAL]
)
def test_real_models(path: Path) -> None:
    proto = onnx.load(path)
    converted, _ = convert(proto)
    feeds = feeds_of(proto, free=1)
    if "rapidocr" in path.parts:
        feeds["x"] = RNG.uniform(-1, 1, (1, 3, 64 if "det" in path.stem else 48, 96)).astype(F)
    if "input" in feeds:
        feeds["input"] = RNG.uniform(-1, 1, (1, 576)).astype(F)
    if "sr" in feeds:
        feeds["sr"] = np.array(16000)
    for before, after in zip(run(proto, feeds), run(converted, feeds), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_broadcasting_of_opset_6() -> None:
    for text, expected in (
        ("g(float[2,3,4] x, float[3] b) => (float[2,3,4] y) { y = Add<broadcast=1,axis=1>(x,b) }",
         lambda x, b: x + b[:, None]),
        ("g(float[2,3,4] x, float[3,4] b) => (float[2,3,4] y) { y = Mul<broadcast=1>(x,b) }",
         lambda x, b: x * b),
        ("g(float[2,3,4] x, float[2,3] b) => (float[2,3,4] y) { y = Sub<broadcast=1,axis=-3>(x,b) }",
         lambda x, b: x - b[..., None]),
        ("g(float[2,3,4] x, float[3] b) => (float[2,3,4] y) { y = PRelu(x,b) }",
         lambda x, b: np.where(x < 0, x * b[:, None], x)),
        ("g(float[1,1,2,2] x) => (float[1,1,4,6] y)"
         " { y = Upsample<height_scale=2.0,width_scale=3.0>(x) }",
         lambda x: x.repeat(2, 2).repeat(3, 3)),
    ):  # fmt: skip
        proto = model(6, text)
        converted, _ = convert(proto)
        feeds = feeds_of(proto)
        np.testing.assert_allclose(run(converted, feeds)[0], expected(*feeds.values()), rtol=1e-6)


STORED = [
    path.parent
    for path in sorted(
        (Path(onnx.__file__).parent / "backend/test/data").glob("pytorch-*/*/model.onnx")
    )
]


@pytest.mark.parametrize("folder", STORED, ids=[folder.name for folder in STORED])
def test_stored_models_of_the_onnx_backend_suite(folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx")
    data = folder / "test_data_set_0"
    arrays = {
        kind: [
            onnx.numpy_helper.to_array(onnx.load_tensor(data / f"{kind}_{i}.pb"))
            for i in range(len(list(data.glob(f"{kind}_*.pb"))))
        ]
        for kind in ("input", "output")
    }
    graph = load_model(proto)
    to_supported_opset(graph)
    names = [value.name for value in graph.graph.inputs]
    results = run(ir.to_proto(graph), dict(zip(names, arrays["input"], strict=True)))
    for result, expected in zip(results, arrays["output"], strict=True):
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-5)
