"""Which part of an image a model sees, as arithmetic on sizes alone; and what may be done to the pixels afterwards.

A `Fit` says: take `box` of the upright image, resize it to `resized`, look at it through a window of the model's size.
`evaluation_fit` gives open_clip's evaluation transform, `RandomCrop` its training transform: torchvision's
`RandomResizedCrop.get_params` (ten tries, then a central fallback) with every number drawn from the generator that the
caller passes, so that a sample's augmentation depends on nothing else.

One difference from torchvision: the corner of a random box is rounded to a grid of 2, 4 or 8 pixels on images of at
least 256, 512 or 1024 pixels (never more than 1/128 of the shorter side). A JPEG decoded at half, quarter or eighth
scale is then cut on whole pixels; a cut between two pixels costs more drift than all the rest of the fast path. The box
is the same whether decoding is fast or exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from medclip.types import Preprocess, UserError


class Box(NamedTuple):
    """A rectangle in pixels of the upright image."""

    top: int
    left: int
    height: int
    width: int


class Fit(NamedTuple):
    """How an image comes to the model's size.

    `resized` is the (height, width) that `box` is resized to, `offset` the (top, left) of the model's window in it;
    where the window reaches beyond (a negative offset), the fill colour shows.
    """

    box: Box
    resized: tuple[int, int]
    offset: tuple[int, int]


class Augment(Protocol):
    """A change of finished pixels: uint8 (h, w, 3) in and out, random through `rng` only."""

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray: ...


def evaluation_fit(preprocess: Preprocess, height: int, width: int, resize: int | None = None) -> Fit:
    """The box, size and window of open_clip's evaluation transform (`open_clip.transform.image_transform`).

    With `resize`, those of torchvision's `Resize(resize)` and `CenterCrop(size)`, by which classifiers are tested: the
    shorter side becomes `resize` pixels, whatever `preprocess.resize_mode` says.
    """
    target_height, target_width = preprocess.size
    if resize is not None:
        scaled = int(resize * max(height, width) / min(height, width))
        resized = (resize, scaled) if height <= width else (scaled, resize)
    elif preprocess.resize_mode == "squash":
        resized = (target_height, target_width)
    elif preprocess.resize_mode == "shortest" and target_height == target_width:
        # torchvision's Resize(int) cuts the longer side off to an integer where ResizeKeepRatio rounds.
        short, long = min(height, width), max(height, width)
        scaled = int(target_height * long / short)
        resized = (target_height, scaled) if height <= width else (scaled, target_height)
    else:
        pick = max if preprocess.resize_mode == "longest" else min
        ratio = pick(height / target_height, width / target_width)
        resized = (max(1, round(height / ratio)), max(1, round(width / ratio)))
    offset = (_centre(resized[0], target_height), _centre(resized[1], target_width))
    return Fit(Box(0, 0, height, width), resized, offset)


def _centre(length: int, window: int) -> int:
    if window > length:
        return -((window - length) // 2)
    return round((length - window) / 2.0)


@dataclass(frozen=True)
class RandomCrop:
    """Random part of the image, resized to the model's size; open_clip's training transform.

    Args:
        scale: range of the box's share of the image's area.
        ratio: range of width over height, drawn evenly on a log scale.
        then: further augmentations of the cropped image, in order.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    then: Sequence[Augment] = ()

    def __post_init__(self) -> None:
        for name, (low, high), most in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= most:
                raise UserError(
                    f"crop.{name} is [{low}, {high}]: give two numbers in order, above 0 and at most {most:g}"
                )

    def sample(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """Draw a box for an image of this size."""
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(*log_ratio))
            box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < box_width <= width and 0 < box_height <= height:
                grid = _grid(min(height, width))
                top = _on_grid(int(rng.integers(0, height - box_height + 1)), height - box_height, grid)
                left = _on_grid(int(rng.integers(0, width - box_width + 1)), width - box_width, grid)
                return Box(top, left, box_height, box_width)
        box_height, box_width = height, width
        if width / height < self.ratio[0]:
            box_height = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            box_width = round(height * self.ratio[1])
        grid = _grid(min(height, width))
        top = _on_grid((height - box_height) // 2, height - box_height, grid)
        left = _on_grid((width - box_width) // 2, width - box_width, grid)
        return Box(top, left, box_height, box_width)

    def fit(self, preprocess: Preprocess, height: int, width: int, rng: np.random.Generator) -> Fit:
        """A drawn box, resized to the model's size whatever its shape."""
        return Fit(self.sample(height, width, rng), preprocess.size, (0, 0))


def _grid(shorter: int) -> int:
    return 1 << max(0, min(3, (shorter // 128).bit_length() - 1))


def _on_grid(start: int, last: int, grid: int) -> int:
    """The multiple of `grid` nearest to `start` that is at most `last`."""
    return min((start + grid // 2) // grid, last // grid) * grid


@dataclass(frozen=True)
class Flip:
    """Mirror left and right with probability `p`. It moves a chest X-ray's heart to the other side."""

    p: float = 0.5

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return image[:, ::-1] if rng.random() < self.p else image


@dataclass(frozen=True)
class Turn:
    """One of the eight symmetries of the square, evenly drawn; for square images without an up, such as histology."""

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        turned = np.rot90(image, int(rng.integers(4)))
        return turned[:, ::-1] if rng.random() < 0.5 else turned


@dataclass(frozen=True)
class ColourJitter:
    """Brightness, contrast and saturation each scaled by a factor drawn from [1 - x, 1 + x], in that order.

    The blends are Pillow's `ImageEnhance`: towards black, towards the mean grey, towards the image's own grey.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    p: float = 0.8

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        brightness, contrast, saturation = (
            rng.uniform(max(0.0, 1 - x), 1 + x) for x in (self.brightness, self.contrast, self.saturation)
        )
        if rng.random() >= self.p:
            return image
        pixels = np.clip(image * np.float32(brightness), 0, 255)
        pixels = _blend(_grey(pixels).mean().round(), pixels, contrast)
        return np.rint(_blend(_grey(pixels), pixels, saturation)).astype(np.uint8)


def _grey(pixels: np.ndarray) -> np.ndarray:
    return (pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]


def _blend(towards: np.ndarray, pixels: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(towards + np.float32(factor) * (pixels - towards), 0, 255)
