"""Multiply-accumulates counted from the graph against torch's own FLOP counter.

    python benchmarks/macs.py [NAME ...]

Each architecture is built without trained weights, exported, and counted by `edgepass.estimate`;
torch counts the same module while it runs (`torch.utils.flop_counter`, two operations a
multiply-accumulate). Transformers' configurations of several modalities, and nets of our own.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from host import describe_host
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import edgepass

Case = tuple[nn.Module, tuple[Any, ...]]


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """Two convolutions and what they add to."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(inputs, outputs, 3, stride), _conv(outputs, outputs))
        self.side = _conv(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.side(x)


class UNet(nn.Module):
    """Down and up again, with transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_conv(3, 16, 3, 2), _conv(16, 32, 3, 2), _conv(32, 64, 3, 2)])
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(64, 16, 2, 2)]
        )
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down[0](x)
        b = self.down[1](a)
        c = self.up[0](self.down[2](b))
        return self.head(torch.cat([self.up[1](torch.cat([b, c], 1)), a], 1))


def _plain() -> Case:
    body = nn.Sequential(
        _conv(3, 32, 3, 2), _conv(32, 64, 3, 2), _conv(64, 128, 3, 2), nn.AdaptiveAvgPool2d(1)
    )
    return nn.Sequential(body, nn.Flatten(), nn.Linear(128, 10)), (torch.randn(1, 3, 96, 96),)


def _residual() -> Case:
    body = [_conv(3, 32, 7, 2), Residual(32, 64, 2), Residual(64, 128, 2), nn.Flatten()]
    return nn.Sequential(*body), (torch.randn(2, 3, 64, 64),)


def _mobile() -> Case:
    blocks: list[nn.Module] = [_conv(3, 16, 3, 2)]
    for inputs, outputs, size in ((16, 24, 3), (24, 40, 5), (40, 80, 7)):
        wide = inputs * 4
        blocks += [
            _conv(inputs, wide, 1),
            _conv(wide, wide, size, 2, wide),
            _conv(wide, outputs, 1),
        ]
    return nn.Sequential(*blocks), (torch.randn(1, 3, 112, 112),)


def _grouped() -> Case:
    body = [
        _conv(3, 32),
        _conv(32, 64, 3, 2, 8),
        _conv(64, 64, 5, 1, 16),
        nn.Conv2d(64, 8, 3, dilation=2),
    ]
    return nn.Sequential(*body), (torch.randn(1, 3, 40, 40),)


def _audio() -> Case:
    body = [
        nn.Conv1d(1, 16, 10, 5),
        nn.GELU(),
        nn.Conv1d(16, 32, 8, 4, groups=4),
        nn.Conv1d(32, 32, 3, padding=1),
    ]
    return nn.Sequential(*body), (torch.randn(1, 1, 4000),)


def _video() -> Case:
    body = [
        nn.Conv3d(3, 8, 3, (1, 2, 2), 1),
        nn.ReLU(),
        nn.Conv3d(8, 16, (1, 3, 3), 2),
        nn.Flatten(),
    ]
    return nn.Sequential(*body), (torch.randn(1, 3, 8, 32, 32),)


def _perceptron() -> Case:
    body = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.Linear(100, 10)]
    return nn.Sequential(*body), (torch.randn(5, 784),)


def _unet() -> Case:
    return UNet(), (torch.randn(1, 3, 64, 64),)


def _transformer(name: str, inputs: Mapping[str, tuple[int, ...]], **options: Any) -> Case:
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    config._attn_implementation = "eager"
    for part in ("text_config", "vision_config"):
        if hasattr(config, part):
            getattr(config, part)._attn_implementation = "eager"
    suffix = "" if hasattr(transformers, f"{name}Model") else "ForSequenceClassification"
    module = getattr(transformers, f"{name}Model{suffix}")(config)
    return _Named(module, tuple(inputs)), tuple(
        torch.randint(0, 90, shape) if key.endswith("ids") else torch.randn(shape)
        for key, shape in inputs.items()
    )


class _Named(nn.Module):
    """A transformers model called with positional tensors; returns the tensors that it returns."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *tensors: torch.Tensor) -> Any:
        extra = {} if "decoder_input_ids" in self.names else {"return_dict": False}
        found = self.module(**dict(zip(self.names, tensors, strict=True)), **extra)
        if not isinstance(found, tuple):
            return found.last_hidden_state
        return tuple(part for part in found if isinstance(part, torch.Tensor))


_TEXT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_IDS = {"input_ids": (1, 24)}
_IMAGE = {"pixel_values": (1, 3, 64, 64)}

CASES: dict[str, Callable[[], Case]] = {
    "own: plain convolutions": _plain,
    "own: residual, batch 2": _residual,
    "own: depthwise": _mobile,
    "own: grouped, dilated": _grouped,
    "own: 1-D": _audio,
    "own: 3-D": _video,
    "own: linear layers, batch 5": _perceptron,
    "own: U-Net, transposed": _unet,
    "text: BERT": lambda: _transformer("Bert", _IDS, **_TEXT),
    "text: DistilBERT": lambda: _transformer(
        "DistilBert", _IDS, vocab_size=100, dim=64, n_layers=2, n_heads=4, hidden_dim=128
    ),
    "text: GPT-2": lambda: _transformer(
        "GPT2", _IDS, vocab_size=100, n_embd=64, n_layer=2, n_head=4, use_cache=False
    ),
    "text: Llama, grouped queries": lambda: _transformer(
        "Llama", _IDS, num_key_value_heads=2, use_cache=False, **_TEXT
    ),
    "text: Qwen2": lambda: _transformer(
        "Qwen2", _IDS, num_key_value_heads=2, use_cache=False, **_TEXT
    ),
    "text: T5 encoder-decoder": lambda: _transformer(
        "T5",
        {"input_ids": (1, 24), "decoder_input_ids": (1, 12)},
        vocab_size=100,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        use_cache=False,
    ),
    "image: ViT": lambda: _transformer(
        "ViT",
        _IMAGE,
        image_size=64,
        patch_size=16,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    ),
    "image: Swin": lambda: _transformer(
        "Swin", _IMAGE, image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
    ),
    "image: ConvNeXt": lambda: _transformer(
        "ConvNext", _IMAGE, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64]
    ),
    "image: SegFormer": lambda: _transformer(
        "Segformer",
        _IMAGE,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 4, 8],
    ),
    "speech: wav2vec2": lambda: _transformer(
        "Wav2Vec2",
        {"input_values": (1, 4000)},
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    ),
    "speech: Whisper": lambda: _transformer(
        "Whisper",
        {"input_features": (1, 80, 100), "decoder_input_ids": (1, 12)},
        vocab_size=100,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
    ),
    "image and text: CLIP": lambda: _transformer(
        "CLIPVision",
        _IMAGE,
        image_size=64,
        patch_size=16,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    ),
    "audio: AST": lambda: _transformer(
        "AST",
        {"input_values": (1, 64, 32)},
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_length=64,
        num_mel_bins=32,
    ),
    "time series: PatchTST": lambda: _transformer(
        "PatchTST",
        {"past_values": (1, 64, 3)},
        num_input_channels=3,
        context_length=64,
        patch_length=8,
        patch_stride=8,
        d_model=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of cases")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(describe_host())
    print(f"{'architecture':32} {'torch':>14} {'edgepass':>14}")
    chosen = [n for n in CASES if not options.names or any(part in n for part in options.names)]
    equal = 0
    for name in chosen:
        torch.manual_seed(0)
        module, inputs = CASES[name]()
        module.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
        truth = counter.get_total_flops() // 2
        macs = edgepass.estimate(module, "arm64", ["fp32"], example_inputs=inputs)["fp32"].macs
        equal += macs == truth
        mark = "" if macs == truth else f"  {(macs or 0) / truth - 1:+.3%}"
        print(f"{name:32} {truth:14} {macs!s:>14}{mark}", flush=True)
    print(f"equal on {equal} of {len(chosen)} architectures")
    sys.exit(0 if equal == len(chosen) else 1)


if __name__ == "__main__":
    main()
