"""Small slides with known pixels and tissue for the slide tests, and the ways to break one.

`toy_slide` writes; each breaker takes the path of such a file, changes it in place and gives the path back. The
content tells places apart: red rises to the right, green downwards, and coarse blobs lie over both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import openslide
import tifffile
from PIL import Image

from slides.pyramid import JPEG, Encoding, write_array

AWKWARD_NAME = "Fall 7 – Übersicht 胃 (2).svs"
GLASS = 243


@dataclass(frozen=True)
class Toy:
    """A slide on disk and the truth about it."""

    path: Path
    pixels: np.ndarray  # uint8 (h, w, 3): level 0 before it was encoded
    tissue: np.ndarray  # bool (h, w)
    ellipses: list[tuple[float, float, float, float]]  # tissue: centre x, y and half axes a, b in level-0 pixels
    mpp: float


def toy_pixels(
    width: int, height: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[tuple[float, float, float, float]]]:
    """Two pieces of pink tissue on white glass: pixels uint8 (h, w, 3), tissue bool (h, w), the ellipses."""
    rng = np.random.default_rng(seed)
    ellipses = [
        (width * cx, height * cy, width * a, height * b)
        for cx, cy, a, b in ((0.30, 0.42, 0.21, 0.33), (0.74, 0.60, 0.15, 0.27))
    ]
    x, y = np.arange(width)[None, :] + 0.5, np.arange(height)[:, None] + 0.5
    inside = [((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 <= 1 for cx, cy, a, b in ellipses]
    tissue = inside[0] | inside[1]
    blobs = rng.standard_normal((max(height // 40, 2), max(width // 40, 2))).astype(np.float32)
    blobs = 22 * cv2.resize(blobs, (width, height), interpolation=cv2.INTER_CUBIC)
    right, down = 60 * (x / width - 0.5), 60 * (y / height - 0.5)
    stained = np.stack([190 + right + 0 * y + blobs, 100 + down + 0 * x + blobs, 165 - blobs + 0 * (x + y)], -1)
    glass = np.broadcast_to(GLASS + 4 * (x / width - y / height), (height, width))[..., None]
    pixels = np.where(tissue[..., None], stained, glass)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), tissue, ellipses


def toy_slide(
    path: str | Path,
    width: int = 1000,
    height: int = 800,
    *,
    mpp: float = 0.25,
    seed: int = 0,
    encoding: Encoding = JPEG,
    **options: Any,
) -> Toy:
    """Write one. `options` are `write_pyramid`'s: `downsamples`, `flavour`, `tile_size`, `rounding`, `power`…

    Encodings (slides.pyramid): `JPEG` (YCbCr 4:2:0), `APERIO` (RGB without any marker that says so), `LOSSLESS`, or
    any `Encoding`. The file's folder is made.
    """
    pixels, tissue, ellipses = toy_pixels(width, height, seed)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    done = write_array(path, pixels, mpp=mpp, encoding=encoding, **options)
    return Toy(done, pixels, tissue, ellipses, mpp)


def grey_slide(path: Path, width: int = 600, height: int = 500, dtype: str = "uint8") -> Path:
    """One sample a pixel, uint8 or uint16; mpp 0.5 as TIFF resolution."""
    grey = toy_pixels(width, height)[0].mean(-1)
    return _plain(path, (grey * (257 if dtype == "uint16" else 1)).astype(dtype), photometric="minisblack")


def sixteen_bit_slide(path: Path, width: int = 600, height: int = 500) -> Path:
    """RGB, uint16 over its whole range; mpp 0.5 as TIFF resolution."""
    return _plain(path, toy_pixels(width, height)[0].astype(np.uint16) * 257, photometric="rgb")


def rgba_slide(path: Path, width: int = 600, height: int = 500) -> Path:
    """RGBA: glass is transparent black, as stitching software leaves it; mpp 0.5 as TIFF resolution."""
    pixels, tissue, _ = toy_pixels(width, height)
    alpha = np.where(tissue, 255, 0).astype(np.uint8)
    return _plain(
        path, np.dstack([np.where(tissue[..., None], pixels, 0), alpha]), photometric="rgb", extrasamples=["unassalpha"]
    )


def _plain(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(
        path, pixels, tile=(256, 256), compression="zlib", resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
        metadata=None, **options,
    )  # fmt: skip
    return path


def truncate(path: Path, keep: float = 0.5) -> Path:
    """The file ends early: a download that broke off."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(int(size * keep))
    return path


def tile_place(path: Path, level: int, column: int, row: int) -> tuple[int, int, int]:
    """(index, offset, byte count) of a stored tile."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.series[0].levels[level].keyframe
        index = row * -(-page.imagewidth // page.tilewidth) + column
        return index, page.dataoffsets[index], page.databytecounts[index]


def tile_bytes(path: Path, level: int, column: int, row: int) -> bytes:
    """A tile as it is stored."""
    _, offset, count = tile_place(path, level, column, row)
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def break_header(path: Path, level: int = 0, column: int = 1, row: int = 1) -> Path:
    """The first bytes of a tile are zeros."""
    _, offset, count = tile_place(path, level, column, row)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(min(20, count)))
    return path


def halve_tile(
    path: Path, level: int = 0, column: int = 1, row: int = 1, how: Literal["zeros", "short"] = "zeros"
) -> Path:
    """Only half of a tile's bytes are there: the rest is zeros, or is not counted ("short")."""
    index, offset, count = tile_place(path, level, column, row)
    if how == "short":
        return _set_tile(path, level, index, offset, count // 2)
    with path.open("r+b") as file:
        file.seek(offset + count // 2)
        file.write(bytes(count - count // 2))
    return path


def empty_tile(path: Path, level: int = 0, column: int = 1, row: int = 1) -> Path:
    """A tile has no bytes: it was not scanned."""
    return _set_tile(path, level, tile_place(path, level, column, row)[0], 0, 0)


def misplace_tile(path: Path, level: int = 0, column: int = 1, row: int = 1) -> Path:
    """A tile is said to lie beyond the end of the file."""
    index, _, count = tile_place(path, level, column, row)
    return _set_tile(path, level, index, path.stat().st_size + 1000, count)


def set_mpp(path: Path, said: str | None) -> Path:
    """An Aperio file says another mpp: any text ("0", "nan", "1000", "-1", "0,25", ""), or None for no such key."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages.first.tags["ImageDescription"]
        fields = [field for field in tag.value.split("|") if not field.startswith("MPP")]
        tag.overwrite("|".join(fields + ([f"MPP = {said}"] if said is not None else [])))
    return path


def _set_tile(path: Path, level: int, index: int, offset: int, count: int) -> Path:
    """Rewrite a tile's entry in the tables of offsets and byte counts."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        page = tiff.series[0].levels[level].keyframe
        for name, value in (("TileOffsets", offset), ("TileByteCounts", count)):
            tag = page.tags[name]
            values = list(tag.value) if isinstance(tag.value, tuple) else [tag.value]
            values[index] = value
            tag.overwrite(values if len(values) > 1 else values[0])
    return path


def openslide_level(path: Path, level: int = 0) -> np.ndarray:
    """A whole level as openslide reads it, uint8 (h, w, 3), transparent pixels white.

    Read in one piece: a corner that is no whole pixel of the level would be blended by openslide.
    """
    with openslide.OpenSlide(path) as slide:
        rgba = slide.read_region((0, 0), level, slide.level_dimensions[level])
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def rectangle(pixels: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    """A part of an image; white where it reaches beyond."""
    margin = width + height + abs(x) + abs(y)
    padded = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), constant_values=255)
    return padded[y + margin : y + margin + height, x + margin : x + margin + width]


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    """In dB."""
    return float(10 * np.log10(255**2 / max(((one.astype(float) - two) ** 2).mean(), 1e-9)))
