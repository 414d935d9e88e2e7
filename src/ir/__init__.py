"""The graph (an `onnx_ir.Model`) and what is true of it. See each module."""
