"""Use 2: compile a model for a device, save it, load it, run it."""

import tempfile

import numpy as np
from digits import build, data

import edgepass

net, example = build()
training, test, _, _ = data()

compiled = edgepass.compile(
    net.eval(),
    target="arm64",
    recipe="int8",
    example_inputs=example,
    dynamic_shapes={"image": {0: "batch"}},
    calibration={"image": training[:100]},
)
print(compiled)

folder = tempfile.mkdtemp(prefix="edgepass-example-")
compiled.save(f"{folder}/digits", formats=("onnx", "ort"))
artifact = edgepass.load(f"{folder}/digits")
outputs = artifact.run({"image": test[:4]})
print({name: np.argmax(array, axis=1).tolist() for name, array in outputs.items()})
print(f"saved in {folder}/digits; its manifest names: {', '.join(artifact.manifest)}")
