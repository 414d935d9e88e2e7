"""The text form is stable, and differences show what changed."""

import onnx_ir as ir

from edgepass.ir.shapes import infer_shapes
from edgepass.ir.text import diff_models, format_model, format_node

TEXT = """
<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
g (bool flag, float[N,3] x) => (float[N,3] y)
<float two = {2.0}, float[10] long = {0.0,1.0,2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0}>
{
  a = Mul(x, two)
  b = com.microsoft.Gelu(a)
  y = If(flag) <then_branch = t () => (float[N,3] p) { p = Softmax<axis = 1>(b) },
                else_branch = e () => (float[N,3] q) { q = Neg(b) }>
}
"""

EXPECTED = """\
opset ai.onnx 18, com.microsoft 1
graph g
  input flag: BOOL[]
  input x: FLOAT[N,3]
  weight long: FLOAT[10] = sha256:143de3a0e041
  weight two: FLOAT[] = 2
  a: FLOAT[N,3] = Mul(x, two=2)
  b: FLOAT[N,3] = com.microsoft.Gelu(a)
  y: FLOAT[N,3] = If(flag)
    else_branch e
      q: FLOAT[N,3] = Neg(b)
      output q: FLOAT[N,3]
    then_branch t
      p: FLOAT[N,3] = Softmax{axis=1}(b)
      output p: FLOAT[N,3]
  output y: FLOAT[N,3]
"""


def load() -> ir.Model:
    model = ir.from_onnx_text(TEXT)
    infer_shapes(model)
    return model


def test_the_text_form():
    assert format_model(load()) == EXPECTED


def test_a_difference_shows_the_changed_line_only():
    before, after = load(), load()
    assert diff_models(before, after) == ""
    after.graph[0].op_type = "Add"
    changed = [
        line
        for line in diff_models(before, after).splitlines()
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert changed == ["-  a: FLOAT[N,3] = Mul(x, two=2)", "+  a: FLOAT[N,3] = Add(x, two=2)"]


def test_source_lines_on_request():
    model = load()
    own = 'File "/home/me/net.py", line 7, in forward'
    frames = own + '\n  File "/x/site-packages/torch/nn.py", line 1, in g'
    model.graph[0].metadata_props["pkg.torch.onnx.stack_trace"] = frames
    assert "Mul(x, two=2)  # net.py:7 in forward" in format_model(model, sources=True)
    assert "net.py" not in format_model(model)


def test_a_node_on_one_line():
    assert format_node(load().graph[0]) == "a: FLOAT[N,3] = Mul(x, two=2)"
