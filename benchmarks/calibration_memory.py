"""Peak memory of calibrating on few and on many samples, for each observer and form of samples.

    python benchmarks/calibration_memory.py [--few 10] [--many 10000] [--model MODEL.onnx]

Each line is from processes of their own: by how much the peak of resident memory grew from before
calibration to after it, on few samples and on many. Samples are random, of 48 kB each for the small
convolutional net that is used where no model is given; held together, 10,000 take 490 MB. Whatever
is held by mistake shows as growth with the number of samples.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from host import describe_host

from edgepass.cost.microbench_builder import NetBuilder
from edgepass.frontends import load_model
from edgepass.ir.random_weights import fill_random_weights
from edgepass.ir.shapes import infer_shapes
from edgepass.npz import write_npz
from edgepass.passes.quantize.calibrate import Observer, ObserverOptions, observe
from edgepass.samples import as_feeds
from edgepass.targets.feed import TensorSpec, input_specs

FORMS = ("function", "generator", "npz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--model", type=Path, help="an ONNX file with float32 inputs")
    parser.add_argument("--size", type=int, default=64, help="of its dynamic dimensions")
    parser.add_argument("--child", nargs=3, metavar=("OBSERVER", "FORM", "COUNT"))
    options = parser.parse_args()
    if options.child:
        observer, form, count = options.child
        print(json.dumps(grown(options.model, options.size, observer, form, int(count))))
        return
    print(describe_host())
    print(f"{'observer':12}{'samples as':12}{options.few:>12}{options.many:>12}   growth, MB")
    cases = [(o.value, "function") for o in Observer]
    cases += [(Observer.MINMAX.value, form) for form in FORMS[1:]]
    for observer, form in cases:
        few, many = (child(options, observer, form, count) for count in (options.few, options.many))
        print(f"{observer:12}{form:12}{few:12.1f}{many:12.1f}   {many - few:+6.1f}", flush=True)


def child(options: argparse.Namespace, observer: str, form: str, count: int) -> float:
    """Megabytes that the peak grew by, in a process of its own."""
    command = [sys.executable, __file__, "--size", str(options.size)]
    if options.model is not None:
        command += ["--model", str(options.model)]
    command += ["--child", observer, form, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def grown(path: Path | None, size: int, observer: str, form: str, count: int) -> float:
    """Calibrate here; megabytes that the peak of resident memory grew by meanwhile."""
    model = small_net() if path is None else load_model(path)
    infer_shapes(model)
    values = [
        value
        for node in model.graph
        for value in node.outputs
        if value.dtype == ir.DataType.FLOAT and node.op_type != "Constant"
    ]
    specs = input_specs(model)
    with tempfile.TemporaryDirectory() as folder:
        data = samples(specs, size, form, count, Path(folder))
        next(draws(specs, size, 1))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seen = observe(
            model, values, as_feeds(data, specs), options=ObserverOptions(observer=observer)
        )
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert seen.samples == count
    return (after - before) / 1024


def small_net() -> ir.Model:
    """Three convolutions on 64 x 64 pixels."""
    net = NetBuilder("small", seed=1)
    x = net.input((1, 3, 64, 64))
    for channels in (8, 16, 16):
        x = net.unary("Relu", net.conv(x, channels, 3, 2))
    model = load_model(net.model(x), weights_required=False)
    fill_random_weights(model)
    return model


def samples(specs: tuple[TensorSpec, ...], size: int, form: str, count: int, folder: Path) -> Any:
    """Random samples in one of `FORMS`."""
    if form == "function":
        return lambda: draws(specs, size, count)
    if form == "generator":
        return draws(specs, size, count)
    path = folder / "data.npz"
    # written in a process of its own: it holds all of them
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import calibration_memory as m; "
        "m.write(*sys.argv[2:])"
    )
    arguments = [str(path), json.dumps([spec.as_dict() for spec in specs]), str(size), str(count)]
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, here, *arguments], check=True)
    return path


def write(path: str, specs: str, size: str, count: str) -> None:
    """Samples as stacks in an `.npz`."""
    wanted = tuple(TensorSpec.from_dict(spec) for spec in json.loads(specs))
    feeds = list(draws(wanted, int(size), int(count)))
    write_npz(Path(path), {s.name: np.stack([f[s.name] for f in feeds]) for s in wanted})


def draws(specs: tuple[TensorSpec, ...], size: int, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Normal numbers; a dynamic batch is 1, other dynamic dimensions are `size`."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        feed = {}
        for spec in specs:
            dims = spec.shape or ()
            shape = [d if isinstance(d, int) else size if i else 1 for i, d in enumerate(dims)]
            feed[spec.name] = rng.standard_normal(shape, np.float32)
        yield feed


if __name__ == "__main__":
    main()
