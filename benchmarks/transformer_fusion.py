"""Nodes and running time of transformers: as exported, by onnxruntime.transformers, by edgepass.

    python benchmarks/transformer_fusion.py [MODEL.onnx ...] [--shapes bert,gpt2,...] [--layers 2]
        [--seconds 3] [--target host]

`--shapes` names architectures that are built from transformers configs with random weights and
exported by torch.onnx.export(dynamo=True); `all` means each of them, and there
`onnxruntime.transformers.optimizer.optimize_model` runs too, with the model type, heads and hidden
size that fit and its other options left alone. Model files are timed against their source only;
absent weights are filled with random numbers.

Every file runs in ONNX Runtime with all of its own optimizations, on one thread. The sessions of a
model take turns in one process; min and median are over their runs, ratios are source over result.
The numeric error is against the source with ONNX Runtime's optimizations off.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

LENGTH = 128
"""Tokens of the text models."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to build a model, and how `optimize_model` is told what it is."""

    build: Callable[[int], tuple[Any, tuple[Any, ...]]]
    model_type: str
    heads: int
    hidden: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--shapes", default="")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--target", default="host")
    arguments = parser.parse_args()
    from host import describe_host

    print(describe_host())
    named = arguments.shapes.split(",") if arguments.shapes else []
    shapes = list(ARCHITECTURES) if named == ["all"] else named
    against_source: list[float] = []
    against_peer: list[float] = []
    with tempfile.TemporaryDirectory(prefix="edgepass-transformers-") as name:
        folder = Path(name)
        for label, source, peer in _sources(arguments.models, shapes, arguments.layers, folder):
            ours = _ours(source, folder / "edgepass.onnx", arguments.target)
            files = {"source": source, "peer": peer, "edgepass": ours}
            ratios = _compare(label, {k: f for k, f in files.items() if f}, arguments.seconds)
            against_source.append(ratios["source"])
            if "peer" in ratios:
                against_peer.append(ratios["peer"])
    for title, ratios_ in (("the source", against_source), ("the peer", against_peer)):
        if ratios_:
            print(
                f"geometric mean over {len(ratios_)}: {_geometric_mean(ratios_):.3f}x of {title}, "
                f"least {min(ratios_):.3f}x"
            )


def _geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(r) for r in ratios))


def _sources(
    models: Sequence[Path], shapes: Sequence[str], layers: int, folder: Path
) -> Iterator[tuple[str, Path, Path | None]]:
    """(label, source file, file of the peer or None)."""
    for path in models:
        import onnx_ir as ir
        from random_weights import with_random_weights

        target = folder / "source.onnx"
        ir.save(with_random_weights(path), target)
        yield f"{path.parent.name}/{path.stem}", target, None
    for shape in shapes:
        target = folder / f"{shape}.onnx"
        architecture = ARCHITECTURES[shape]
        _export(architecture, layers, target)
        yield shape, target, _by_peer(architecture, target, folder / "peer.onnx")


def _ours(source: Path, target: Path, name: str) -> Path:
    import edgepass

    edgepass.optimize(str(source), name).save_onnx(str(target))
    return target


def _by_peer(architecture: Architecture, source: Path, target: Path) -> Path | None:
    from onnxruntime.transformers import optimizer

    try:
        model = optimizer.optimize_model(
            str(source),
            model_type=architecture.model_type,
            num_heads=architecture.heads,
            hidden_size=architecture.hidden,
        )
    except Exception as error:
        print(f"onnxruntime.transformers.optimizer failed: {type(error).__name__}: {error}")
        return None
    model.save_model_to_file(str(target))
    return target


# --- timing -------------------------------------------------------------------------------------


def _session(path: Path, *, optimized: bool = True) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feed(session: Any) -> dict[str, np.ndarray]:
    """Random inputs; masks of ones with a fifth of the last tokens masked."""
    generator = np.random.default_rng(0)
    feed = {}
    for value in session.get_inputs():
        shape = [d if isinstance(d, int) else 1 for d in value.shape]
        if "float" in value.type:
            feed[value.name] = generator.standard_normal(shape).astype(np.float32)
        elif value.name.startswith("mask"):
            feed[value.name] = np.ones(shape, np.int64)
            feed[value.name][..., shape[-1] * 4 // 5 :] = 0
        else:
            feed[value.name] = generator.integers(1, 1000, shape)
    return feed


def _compare(label: str, files: dict[str, Path], seconds: float) -> dict[str, float]:
    """Print one line for each file; the ratios of the least times to edgepass's."""
    sessions = {name: _session(path) for name, path in files.items()}
    feed = _feed(sessions["source"])
    reference = _session(files["source"], optimized=False).run(None, feed)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(None, feed)
    end = time.perf_counter() + seconds * len(sessions)
    while time.perf_counter() < end or len(times["source"]) < 10:
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, feed)
            times[name].append((time.perf_counter() - started) * 1e3)
    print(f"\n{label}")
    for name, session in sessions.items():
        error = _error(reference, session.run(None, feed))
        least, middle = min(times[name]), statistics.median(times[name])
        print(
            f"  {name:9} {_nodes(files[name]):5} nodes  min {least:8.3f} ms "
            f"({min(times['source']) / least:.3f}x)  median {middle:8.3f} ms "
            f"({statistics.median(times['source']) / middle:.3f}x)  error {error:.1e}",
            flush=True,
        )
    return {n: min(t) / min(times["edgepass"]) for n, t in times.items() if n != "edgepass"}


def _error(reference: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> float:
    """The largest difference, of the range of each output."""
    return max(
        float(np.abs(a - b).max() / max(float(np.ptp(a)), 1e-30))
        for a, b in zip(reference, results, strict=True)
    )


def _nodes(path: Path) -> int:
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    return sum(node.op_type != "Constant" for node in nodes)


# --- architectures ------------------------------------------------------------------------------


def _export(architecture: Architecture, layers: int, path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model, inputs = architecture.build(layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros would be folded away
                parameter.normal_(std=0.02)
        names = [
            "mask" if getattr(i, "is_mask", False) else f"input{n}" for n, i in enumerate(inputs)
        ]
        torch.onnx.export(
            model.eval(), inputs, str(path), dynamo=True, input_names=names, verbose=False
        )


def _module(model: Any, call: Callable[..., Any]) -> Any:
    import torch

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return call(self.model, *inputs)

    return Module()


def _tokens(length: int = LENGTH) -> Any:
    import torch

    return torch.randint(1, 1000, (1, length))


def _mask() -> Any:
    import torch

    mask = torch.ones(1, LENGTH, dtype=torch.int64)
    mask.is_mask = True  # type: ignore[attr-defined]
    return mask


def _bert(layers: int) -> tuple[Any, tuple[Any, ...]]:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=1000, num_hidden_layers=layers))
    call = _module(model, lambda m, i, k: m(i, attention_mask=k).last_hidden_state)
    return call, (_tokens(), _mask())


def _gpt2(layers: int) -> tuple[Any, tuple[Any, ...]]:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=1000, n_layer=layers))
    call = _module(model, lambda m, i, k: m(i, attention_mask=k, use_cache=False).last_hidden_state)
    return call, (_tokens(), _mask())


def _llama(layers: int) -> tuple[Any, tuple[Any, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    call = _module(
        LlamaForCausalLM(config), lambda m, i, k: m(i, attention_mask=k, use_cache=False).logits
    )
    return call, (_tokens(), _mask())


def _vit(layers: int) -> tuple[Any, tuple[Any, ...]]:
    import torch
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(num_hidden_layers=layers))
    return _module(model, lambda m, x: m(x).last_hidden_state), (torch.randn(1, 3, 224, 224),)


def _swin(layers: int) -> tuple[Any, tuple[Any, ...]]:
    import torch
    from transformers import SwinConfig, SwinModel

    model = SwinModel(SwinConfig(depths=[2, 2, layers, 2]))
    return _module(model, lambda m, x: m(x).last_hidden_state), (torch.randn(1, 3, 224, 224),)


def _whisper(layers: int) -> Any:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=1000,
        encoder_layers=layers,
        decoder_layers=layers,
        d_model=384,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return WhisperModel(config)


def _whisper_encoder(layers: int) -> tuple[Any, tuple[Any, ...]]:
    import torch

    call = _module(_whisper(layers), lambda m, x: m.encoder(x).last_hidden_state)
    return call, (torch.randn(1, 80, 3000),)


def _decoded(m: Any, tokens: Any, encoded: Any) -> Any:
    return m.decoder(tokens, encoder_hidden_states=encoded, use_cache=False).last_hidden_state


def _whisper_decoder(layers: int) -> tuple[Any, tuple[Any, ...]]:
    import torch

    return _module(_whisper(layers), _decoded), (_tokens(64), torch.randn(1, 1500, 384))


def _t5(layers: int) -> Any:
    from transformers import T5Config, T5Model

    return T5Model(
        T5Config(vocab_size=1000, num_layers=layers, num_decoder_layers=layers, d_model=512)
    )


def _t5_encoder(layers: int) -> tuple[Any, tuple[Any, ...]]:
    call = _module(_t5(layers), lambda m, i, k: m.encoder(i, attention_mask=k).last_hidden_state)
    return call, (_tokens(), _mask())


def _t5_decoder(layers: int) -> tuple[Any, tuple[Any, ...]]:
    import torch

    return _module(_t5(layers), _decoded), (_tokens(64), torch.randn(1, LENGTH, 512))


ARCHITECTURES = {
    "bert": Architecture(_bert, "bert", 12, 768),
    "gpt2": Architecture(_gpt2, "gpt2", 12, 768),
    "llama": Architecture(_llama, "gpt2", 8, 512),
    "vit": Architecture(_vit, "vit", 12, 768),
    "swin": Architecture(_swin, "swin", 0, 0),
    "whisper_encoder": Architecture(_whisper_encoder, "bart", 6, 384),
    "whisper_decoder": Architecture(_whisper_decoder, "bart", 6, 384),
    "t5_encoder": Architecture(_t5_encoder, "t5", 8, 512),
    "t5_decoder": Architecture(_t5_decoder, "t5", 8, 512),
}
"""By name. No model type of the peer is for Llama; gpt2 is what its own conversion script says."""


if __name__ == "__main__":
    main()
