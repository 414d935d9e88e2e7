"""Architectures built with torch, weights random: nets of our own and transformers configs.

    python benchmarks/architectures.py FOLDER [NAME ...]

Exports them to ONNX files (torch.onnx.export(dynamo=True), weights left out where large), for the
other benchmarks. `macs.py` counts them against torch.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from own_nets import NETS
from torch import nn

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

_SPEECH = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}

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
    "speech: wav2vec2": lambda: _transformer("Wav2Vec2", {"input_values": (1, 4000)}, **_SPEECH),
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

_VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_VIT = {"image_size": 64, "patch_size": 16, **_VISION}

MORE: dict[str, Callable[[], Case]] = {
    **{f"own: {name}": build for name, build in NETS.items()},
    "text: MobileBERT": lambda: _transformer(
        "MobileBert",
        _IDS,
        embedding_size=32,
        true_hidden_size=32,
        intra_bottleneck_size=32,
        **_TEXT,
    ),
    "text: ALBERT": lambda: _transformer("Albert", _IDS, embedding_size=32, **_TEXT),
    "text: DeBERTa": lambda: _transformer(
        "DebertaV2", _IDS, relative_attention=True, pos_att_type=["p2c", "c2p"], **_TEXT
    ),
    "text: RoBERTa": lambda: _transformer("Roberta", _IDS, **_TEXT),
    "text: SqueezeBERT": lambda: _transformer("SqueezeBert", _IDS, embedding_size=64, **_TEXT),
    "text: ConvBERT": lambda: _transformer("ConvBert", _IDS, embedding_size=64, **_TEXT),
    "text: FNet": lambda: _transformer("FNet", _IDS, **_TEXT),
    "text: GPT-NeoX": lambda: _transformer("GPTNeoX", _IDS, use_cache=False, **_TEXT),
    "text: OPT": lambda: _transformer(
        "OPT", _IDS, use_cache=False, ffn_dim=128, word_embed_proj_dim=64, **_TEXT
    ),
    "text: Mistral": lambda: _transformer(
        "Mistral", _IDS, num_key_value_heads=2, use_cache=False, **_TEXT
    ),
    "text: Gemma": lambda: _transformer(
        "Gemma", _IDS, num_key_value_heads=2, head_dim=16, use_cache=False, **_TEXT
    ),
    "text: Phi": lambda: _transformer("Phi", _IDS, use_cache=False, **_TEXT),
    "text: BLOOM": lambda: _transformer(
        "Bloom", _IDS, vocab_size=100, hidden_size=64, n_layer=2, n_head=4, use_cache=False
    ),
    "text: BART": lambda: _transformer(
        "Bart",
        {"input_ids": (1, 24), "decoder_input_ids": (1, 12)},
        vocab_size=100,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        use_cache=False,
    ),
    "text: Llama, tied head": lambda: _causal(
        "Llama", num_key_value_heads=2, **{**_TEXT, "vocab_size": 500}
    ),
    "text: OPT, tied head": lambda: _causal(
        "OPT", ffn_dim=128, word_embed_proj_dim=64, **{**_TEXT, "vocab_size": 500}
    ),
    "image: BEiT": lambda: _transformer("Beit", _IMAGE, **_VIT),
    "image: DINOv2": lambda: _transformer("Dinov2", _IMAGE, **_VIT),
    "image: YOLOS": lambda: _transformer(
        "Yolos", _IMAGE, patch_size=16, num_detection_tokens=10, **_VISION
    ),
    "image: ResNet": lambda: _transformer(
        "ResNet", _IMAGE, embedding_size=16, hidden_sizes=[32, 48, 64, 96], depths=[1, 1, 2, 1]
    ),
    "image: RegNet": lambda: _transformer(
        "RegNet",
        _IMAGE,
        embedding_size=16,
        hidden_sizes=[32, 48, 64, 96],
        depths=[1, 1, 2, 1],
        groups_width=16,
    ),
    "image: MobileNetV2": lambda: _transformer("MobileNetV2", _IMAGE, depth_multiplier=0.35),
    "image: MobileViT": lambda: _transformer(
        "MobileViT",
        _IMAGE,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 96],
    ),
    "image: EfficientNet": lambda: _transformer(
        "EfficientNet", _IMAGE, image_size=64, width_coefficient=0.5, depth_coefficient=0.3
    ),
    "image: PoolFormer": lambda: _transformer(
        "PoolFormer", _IMAGE, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64]
    ),
    "image: PVT": lambda: _transformer(
        "Pvt",
        _IMAGE,
        image_size=64,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 3, 4],
    ),
    "image: LeViT": lambda: _transformer(
        "Levit",
        _IMAGE,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "image: CvT": lambda: _transformer(
        "Cvt", _IMAGE, embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 1, 2]
    ),
    "image: GLPN": lambda: _transformer(
        "GLPN",
        _IMAGE,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 4, 8],
    ),
    "image: Swin v2": lambda: _transformer(
        "Swinv2",
        _IMAGE,
        image_size=64,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    "image: FocalNet": lambda: _transformer(
        "FocalNet",
        _IMAGE,
        image_size=64,
        embed_dim=16,
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        hidden_sizes=[16, 32],
    ),
    "image: ConvNeXt v2": lambda: _transformer(
        "ConvNextV2", _IMAGE, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64]
    ),
    "image: BiT": lambda: _transformer(
        "Bit", _IMAGE, embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1]
    ),
    "image: DETR": lambda: _transformer(
        "Detr",
        {"pixel_values": (1, 3, 128, 128)},
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_resnet_config(),
        num_queries=10,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
    ),
    "speech: HuBERT": lambda: _transformer("Hubert", {"input_values": (1, 4000)}, **_SPEECH),
    "speech: SEW": lambda: _transformer(
        "SEW", {"input_values": (1, 4000)}, squeeze_factor=2, **_SPEECH
    ),
    "video: VideoMAE": lambda: _transformer(
        "VideoMAE", {"pixel_values": (1, 4, 3, 64, 64)}, num_frames=4, **_VIT
    ),
    "video: TimeSformer": lambda: _transformer(
        "Timesformer", {"pixel_values": (1, 4, 3, 64, 64)}, num_frames=4, **_VIT
    ),
    "image: SAM's encoder": lambda: _transformer(
        "SamVision",
        _IMAGE,
        window_size=2,
        global_attn_indexes=[1],
        output_channels=32,
        mlp_dim=128,
        **{k: v for k, v in _VIT.items() if k != "intermediate_size"},
    ),
}
"""Beside `CASES`: what the mirror of the runtime was not built on."""


def _causal(name: str, **options: Any) -> Case:
    """A language model with its head, tied to the embeddings."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        tie_word_embeddings=True, use_cache=False, **options
    )
    config._attn_implementation = "eager"
    module = getattr(transformers, f"{name}ForCausalLM")(config)
    return _Named(module, ("input_ids",)), (torch.randint(0, 90, (1, 24)),)


def _resnet_config() -> Any:
    import transformers

    return transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 48, 64, 96],
        depths=[1, 1, 2, 1],
        out_features=["stage4"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="parts of the names of architectures")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, build in {**CASES, **MORE}.items():
        if options.names and not any(part in name for part in options.names):
            continue
        path = options.folder / f"{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}.onnx"
        torch.manual_seed(0)
        try:
            module, inputs = build()
            torch.onnx.export(module.eval(), inputs, str(path), dynamo=True, verbose=False)
        except Exception as error:  # of any library that builds or exports
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
            continue
        print(f"{name}: {path}", flush=True)


if __name__ == "__main__":
    main()
