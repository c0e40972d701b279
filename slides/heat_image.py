"""A heat map over the slide's overview, with what is needed to read it: colour bar, numbers, scale bar, title."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from slides.files import write_whole
from slides.heat_colours import Scale
from slides.heatmap import HeatMap
from slides.overview import Overview

_INK, _PAPER = (25, 25, 25), (255, 255, 255)
_LEAST_WIDTH = 640


def blend(image: np.ndarray, heat: HeatMap, scale: Scale, alpha: float, *, downsample: float) -> np.ndarray:
    """uint8 (h, w, 3): the map over an image of the whole slide, nothing where there is no patch.

    Args:
        image: uint8 (h, w, 3).
        alpha: how much of the map is seen, 0 to 1.
        downsample: level-0 pixels a pixel of the image.
    """
    return blend_at(image, heat, scale, alpha, x=0, y=0, downsample=downsample)


def blend_at(
    image: np.ndarray, heat: HeatMap, scale: Scale, alpha: float, *, x: int, y: int, downsample: float
) -> np.ndarray:
    """`blend` for an image of a part of the slide, whose upper left corner is pixel (x, y) at `downsample`."""
    height, width = image.shape[:2]
    values, share = heat.sample(x, y, width, height, downsample)
    seen = (alpha * share)[..., None]
    return np.rint(image * (1 - seen) + scale.colour(values) * seen).astype(np.uint8)


def draw(
    seen: Overview, heat: HeatMap, scale: Scale, *, title: str, label: str, alpha: float = 0.6, note: str = ""
) -> Image.Image:
    """The picture for a person: the map over the overview, and the legend on a strip below.

    Args:
        seen: of the slide.
        heat: the map.
        scale: of its colours.
        title: the slide.
        label: what the values are.
        alpha: see `blend`.
        note: more about how it was made (smoothing), for the legend.
    """
    down = heat.size[0] / seen.image.shape[1]
    picture = Image.fromarray(blend(seen.image, heat, scale, alpha, downsample=down))
    width = max(picture.width, _LEAST_WIDTH)
    size = round(min(max(width / 75, 13), 30))
    regular, small, bold = font(size), font(round(size * 0.85)), font(size, True)
    pad = size
    strip = _strip_height(size)
    out = Image.new("RGB", (width, picture.height + strip), _PAPER)
    out.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(out)
    top = picture.height + pad
    room = width - 2 * pad
    pen.text((pad, top), shortened(title, bold, room), _INK, bold)
    pen.text((pad, top + 1.5 * size), shortened(label, regular, room), _INK, regular)
    bar_top = top + round(3.4 * size)
    bar = Image.fromarray(_bar(scale, (width - 4 * pad) // 2, size))
    out.paste(bar, (pad, bar_top))
    pen.rectangle((pad, bar_top, pad + bar.width - 1, bar_top + size - 1), outline=_INK)
    below = bar_top + round(1.2 * size)
    for share, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        value = scale.low + share * (scale.high - scale.low)
        pen.text((pad + share * (bar.width - 1), below), number(value, scale), _INK, small, anchor=anchor)
    said = "; ".join(filter(None, [f"{scale.palette}, {scale.said}", note, f"{alpha:.0%} opaque" if alpha < 1 else ""]))
    pen.text((pad, below + 1.4 * size), shortened(said, small, room), _INK, small)
    _scale_bar(pen, seen.mpp, picture.width, width - pad, bar_top, size)
    return out


def _strip_height(size: int) -> int:
    return round(8.2 * size) + size


def _bar(scale: Scale, width: int, height: int) -> np.ndarray:
    ends = np.linspace(scale.low, scale.high, width)
    return np.repeat(scale.colour(ends)[None], height, 0)


def number(value: float, scale: Scale) -> str:
    """With as many digits as tell the ends of the scale apart."""
    room = scale.high - scale.low
    if max(abs(scale.low), abs(scale.high)) >= 1e5 or room < 1e-4:
        return f"{value:.3g}"
    digits = int(np.clip(2 - np.floor(np.log10(room)), 0, 6))
    return f"{value:.{digits}f}"


def _scale_bar(pen: ImageDraw.ImageDraw, mpp: float, picture: int, right: int, top: int, size: int) -> None:
    """A round length, at most a quarter of the picture, right-aligned, in mm or µm."""
    most = picture / 4 * mpp
    power = 10.0 ** np.floor(np.log10(most))
    length = max(step * power for step in (1, 2, 5) if step * power <= most)
    left = right - length / mpp
    mid = top + size / 2
    pen.line((left, mid, right, mid), _INK, max(2, size // 6))
    for x in (left, right):
        pen.line((x, top, x, top + size), _INK, max(2, size // 8))
    words = f"{length / 1000:g} mm" if length >= 100 else f"{length:g} µm"
    pen.text(((left + right) / 2, top + 1.2 * size), words, _INK, font(size), anchor="ma")


def shortened(words: str, face: ImageFont.FreeTypeFont, room: float) -> str:
    """On one line, cut with an ellipsis where it does not fit."""
    words = " ".join(words.split())
    if face.getlength(words) <= room:
        return words
    while words and face.getlength(words + "…") > room:
        words = words[:-1]
    return words + "…"


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships: Latin, Greek, Cyrillic."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(str(path), size)


def save_png(path: Path, image: Image.Image) -> None:
    """Whole or not at all.

    Raises:
        OutputError: the disk refuses.
    """
    raw = io.BytesIO()
    image.save(raw, "PNG")
    write_whole(path, raw.getvalue())
