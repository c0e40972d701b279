"""Whole-slide files written: tiled, pyramidal TIFFs as scanners leave them, of any size, tile by tile.

For phantoms, tests and benchmarks; never more than a few tiles are in memory. `write_pyramid` takes a function that
gives a tile's pixels or its bytes as they are to be stored; `write_array` takes the level-0 pixels, and `Mosaic` lays
a palette of textures over a map of regions, each tile encoded once, so that a slide of 10^9 pixels takes seconds.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import cv2
import imagecodecs
import numpy as np
import tifffile

from slides.errors import SlideError

Tile = Callable[[int, int, int], "np.ndarray | bytes | None"]
Flavour = Literal["aperio", "generic", "ome"]
_TAG = {"jpeg": "JPEG", "deflate": "ADOBE_DEFLATE", "lzw": "LZW", "none": None, "jpeg2000": "APERIO_JP2000_RGB"}
_SAMPLING = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}
_CLASSIC = 2**32 - 2**24  # bytes that a TIFF with 32-bit offsets holds


@dataclass(frozen=True)
class Encoding:
    """How pixels become the bytes of a tile.

    Args:
        compression: of the tiles.
        quality: of JPEG, 1..100; of JPEG 2000 the same scale as a PSNR in dB (100: lossless).
        photometric: colour space of JPEG's samples: "ycbcr", or "rgb" as Aperio's scanners write.
        subsampling: of JPEG's chroma; "rgb" has none.
        tables: leave quantisation and Huffman tables, and every APP marker, out of the tiles; the TIFF's JPEGTables
            holds them once (TIFF Technical Note 2). Scanners write so: such a tile is no JPEG file by itself, and
            nothing in it says "rgb".
    """

    compression: Literal["jpeg", "deflate", "lzw", "none", "jpeg2000"] = "jpeg"
    quality: int = 80
    photometric: Literal["ycbcr", "rgb"] = "ycbcr"
    subsampling: Literal["444", "422", "420"] = "420"
    tables: bool = True

    def encode(self, tile: np.ndarray) -> bytes:
        """The bytes to store for uint8 (h, w, 3) RGB."""
        tile = np.ascontiguousarray(tile)
        if self.compression == "jpeg":
            return _abbreviated(self._jpeg(tile))[0] if self.tables else self._jpeg(tile)
        if self.compression == "jpeg2000":
            level = None if self.quality >= 100 else self.quality
            return bytes(imagecodecs.jpeg2k_encode(tile, level, codecformat="j2k", reversible=level is None))
        if self.compression == "deflate":
            return zlib.compress(tile.data, 6)
        return bytes(imagecodecs.lzw_encode(tile.tobytes())) if self.compression == "lzw" else tile.tobytes()

    @cached_property
    def jpeg_tables(self) -> bytes | None:
        """The TIFF's JPEGTables: the same for every tile, since libjpeg's Huffman tables are the standard's."""
        if self.compression != "jpeg" or not self.tables:
            return None
        return _abbreviated(self._jpeg(np.zeros((16, 16, 3), np.uint8)))[1]

    def _jpeg(self, tile: np.ndarray) -> bytes:
        rgb = self.photometric == "rgb"
        sampling = "444" if rgb else self.subsampling
        jpeg = imagecodecs.jpeg8_encode(
            tile, self.quality, colorspace="rgb", outcolorspace=self.photometric, subsampling=sampling
        )
        return bytes(jpeg)


JPEG = Encoding()
LOSSLESS = Encoding("deflate")
APERIO = Encoding(quality=70, photometric="rgb")


def level_sizes(
    size: tuple[int, int], downsamples: Sequence[int], rounding: Literal["floor", "ceil"] = "floor"
) -> list[tuple[int, int]]:
    """(width, height) of each level. Rounded up, a level's apparent downsample is a little below the true one."""
    up = 0 if rounding == "floor" else 1
    return [(max((size[0] - up) // d + up, 1), max((size[1] - up) // d + up, 1)) for d in downsamples]


def write_pyramid(
    path: str | Path,
    size: tuple[int, int],
    tile: Tile,
    *,
    mpp: float | None,
    downsamples: Sequence[int] = (1, 4, 16),
    tile_size: int = 256,
    encoding: Encoding = JPEG,
    flavour: Flavour = "aperio",
    power: float | None = None,
    icc: bytes | None = None,
    associated: Mapping[str, np.ndarray] | None = None,
    rounding: Literal["floor", "ceil"] = "floor",
    bigtiff: bool | None = None,
) -> Path:
    """Write a slide; it bears its name only once it is complete.

    Args:
        path: of the file.
        size: (width, height) of level 0.
        tile: (level, column, row) to uint8 (h, w, 3) RGB of at most `tile_size` a side (padded by repeating its
            border), or to bytes that `encoding` made, or to None for a tile that was not scanned (no bytes). Called
            once for each tile, level by level, row by row.
        mpp: micrometres a level-0 pixel, as it is written, sensible or not; None: not written.
        downsamples: of the levels, the first 1.
        tile_size: in pixels, a multiple of 16.
        encoding: of the tiles.
        flavour: "aperio" (SVS: levels and thumbnail in a chain of IFDs, an ImageDescription that names the mpp),
            "generic" (a chain of IFDs, mpp as TIFF resolution) or "ome" (OME-XML, lower levels as SubIFDs).
        power: of the objective; "aperio" only.
        icc: colour profile of the pixels.
        associated: uint8 (h, w, 3) images by name, "thumbnail", "label" or "macro"; "aperio" only.
        rounding: of the lower levels' sizes.
        bigtiff: 64-bit offsets; None: where the file might not fit into 32 bits.

    Returns:
        The path.

    Raises:
        SlideError: the arguments fit no slide, or the file cannot be written.
    """
    path = Path(path)
    if not downsamples or downsamples[0] != 1 or list(downsamples) != sorted(set(downsamples)) or min(size) < 1:
        raise SlideError(f"{path}: size {size} with levels {tuple(downsamples)} is no pyramid: begin at 1, and ascend")
    if tile_size < 16 or tile_size % 16:
        raise SlideError(f"{path}: tiles of {tile_size} pixels are not possible: choose a multiple of 16")
    sizes = level_sizes(size, downsamples, rounding)
    if bigtiff is None:
        most = 3 * sum(w * h for w, h in sizes) // (2 if encoding.compression.startswith("jpeg") else 1)
        bigtiff = most > _CLASSIC
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with tifffile.TiffWriter(part, bigtiff=bigtiff, ome=flavour == "ome", shaped=False) as tiff:
            extra = dict(associated or {}) if flavour == "aperio" else {}
            for level, (width, height) in enumerate(sizes):
                tiff.write(
                    _stored(tile, level, (width, height), tile_size, encoding),
                    shape=(height, width, 3),
                    dtype="uint8",
                    tile=(tile_size, tile_size),
                    iccprofile=icc,
                    **_layout(encoding),
                    **_header(flavour, level, sizes, tile_size, mpp, power, encoding),
                )
                if level == 0 and "thumbnail" in extra:
                    _associate(tiff, "thumbnail", extra.pop("thumbnail"), size)
            for name, image in extra.items():
                _associate(tiff, name, image, size)
        part.replace(path)
    except struct.error:
        raise SlideError(f"{path}: does not fit into 4 GB: write it with bigtiff=True") from None
    except OSError as error:
        raise SlideError(f"{path}: cannot be written ({error.strerror or error}): choose another folder") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def write_array(
    path: str | Path,
    array: np.ndarray,
    *,
    downsamples: Sequence[int] = (1, 4, 16),
    tile_size: int = 256,
    rounding: Literal["floor", "ceil"] = "floor",
    **options: Any,
) -> Path:
    """Write level-0 pixels, uint8 (h, w, 3), in memory or mapped, as a slide; lower levels by area averaging.

    At most `tile_size` x downsample pixels a side are read at a time. `options` are `write_pyramid`'s; an Aperio file
    gets a thumbnail.
    """
    height, width = array.shape[:2]
    sizes = level_sizes((width, height), downsamples, rounding)

    def tile(level: int, column: int, row: int) -> np.ndarray:
        d, (w, h) = downsamples[level], sizes[level]
        x, y = column * tile_size, row * tile_size
        x1, y1 = min(x + tile_size, w), min(y + tile_size, h)
        return shrink(array[y * d : y1 * d, x * d : x1 * d], d)

    if options.get("flavour", "aperio") == "aperio":
        scale = min(1.0, 1024 / max(width, height))
        small = (max(round(width * scale), 1), max(round(height * scale), 1))
        thumbnail = cv2.resize(np.asarray(array), small, interpolation=cv2.INTER_AREA)
        options["associated"] = {"thumbnail": thumbnail} | (options.get("associated") or {})
    return write_pyramid(
        path, (width, height), tile, downsamples=downsamples, tile_size=tile_size, rounding=rounding, **options
    )


def shrink(pixels: np.ndarray, downsample: int) -> np.ndarray:
    """Means over `downsample` x `downsample` pixels of uint8 (h, w, 3); what is left at the end repeats its border."""
    if downsample == 1:
        return pixels
    height, width = pixels.shape[:2]
    down, right = -height % downsample, -width % downsample
    if down or right:
        pixels = cv2.copyMakeBorder(pixels, 0, down, 0, right, cv2.BORDER_REPLICATE)
    size = (pixels.shape[1] // downsample, pixels.shape[0] // downsample)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def mirrored(window: np.ndarray) -> np.ndarray:
    """A window (h, w, 3) and its reflections, (2h, 2w, 3): repeats without a seam."""
    row = np.concatenate([window, window[:, ::-1]], 1)
    return np.concatenate([row, row[::-1]], 0)


@dataclass(frozen=True)
class Mosaic:
    """Textures laid over a map of regions: a `tile` function for `write_pyramid` whose tiles are encoded only once.

    A texture repeats over the whole slide and shows wherever the map has its index, at every level, so levels agree
    with each other to the rounding of a mean.

    Args:
        regions: (rows, columns) index of the texture, one value for each `cell` x `cell` level-0 pixels; beyond the
            map its border goes on.
        cell: level-0 pixels; a multiple of every downsample.
        textures: uint8 (h, w, 3) each, sides a multiple of every downsample; None: not scanned, which holds for tiles
            that nothing else touches (elsewhere it is white).
        size: (width, height) of level 0.
        downsamples: as in `write_pyramid`; also `tile_size`, `encoding` and `rounding`.
    """

    regions: np.ndarray
    cell: int
    textures: Sequence[np.ndarray | None]
    size: tuple[int, int]
    downsamples: Sequence[int] = (1, 4, 16)
    tile_size: int = 256
    encoding: Encoding = JPEG
    rounding: Literal["floor", "ceil"] = "floor"
    _kept: dict[tuple[int, ...], bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        sides = {self.cell} | {side for t in self.textures if t is not None for side in t.shape[:2]}
        if any(side % d for side in sides for d in self.downsamples):
            raise SlideError(f"cells and textures of {sorted(sides)} pixels: every downsample must divide them")

    @cached_property
    def _levels(self) -> list[list[np.ndarray | None]]:
        """The textures at each level, continued by a tile to the right and below, so that every tile is a slice."""
        more = ((0, self.tile_size), (0, self.tile_size), (0, 0))
        return [
            [t if t is None else np.pad(shrink(t, d), more, "wrap") for t in self.textures] for d in self.downsamples
        ]

    def __call__(self, level: int, column: int, row: int) -> bytes | None:
        """The bytes of a tile, for `write_pyramid`."""
        d, side = self.downsamples[level], self.tile_size
        (top, bottom), (left, right) = (
            (min(at * side * d // self.cell, n - 1), min(((at + 1) * side * d - 1) // self.cell, n - 1))
            for at, n in zip((row, column), self.regions.shape, strict=True)
        )
        labels = np.unique(self.regions[top : bottom + 1, left : right + 1])
        if len(labels) > 1:
            return self.encoding.encode(self._mixed(level, column, row, labels))
        label = int(labels[0])
        texture = self._cut(label, level, column, row)
        if texture is None:
            return None
        key = (level, label, *self._offset(label, level, column, row))
        if key not in self._kept:
            self._kept[key] = self.encoding.encode(texture)
        return self._kept[key]

    def _offset(self, label: int, level: int, column: int, row: int) -> tuple[int, int]:
        """Where in its texture the tile begins: (x, y)."""
        texture, d, side = self.textures[label], self.downsamples[level], self.tile_size
        if texture is None:
            return 0, 0
        return column * side % (texture.shape[1] // d), row * side % (texture.shape[0] // d)

    def _cut(self, label: int, level: int, column: int, row: int) -> np.ndarray | None:
        plane, side = self._levels[level][label], self.tile_size
        x, y = self._offset(label, level, column, row)
        return None if plane is None else plane[y : y + side, x : x + side]

    def _mixed(self, level: int, column: int, row: int, labels: np.ndarray) -> np.ndarray:
        """Pixels of a tile in which regions meet."""
        d, side = self.downsamples[level], self.tile_size
        ys, xs = (
            np.minimum(np.arange(at * side, (at + 1) * side) * d // self.cell, n - 1)
            for at, n in zip((row, column), self.regions.shape, strict=True)
        )
        shown = self.regions[np.ix_(ys, xs)]
        out = np.full((side, side, 3), 255, np.uint8)
        for label in labels.tolist():
            texture = self._cut(label, level, column, row)
            if texture is not None:
                cv2.copyTo(texture, (shown == label).astype(np.uint8), out)
        return out

    def thumbnail(self, longest: int = 1024) -> np.ndarray:
        """uint8 (h, w, 3): the regions in their textures' mean colours."""
        means = [(255,) * 3 if t is None else np.rint(cv2.mean(t)[:3]) for t in self.textures]
        width, height = self.size
        scale = min(1.0, longest / max(self.size))
        small = (max(round(width * scale), 1), max(round(height * scale), 1))
        ys, xs = ((np.arange(n) + 0.5) / scale // self.cell for n in (small[1], small[0]))
        rows, columns = (
            np.minimum(at, n - 1).astype(np.intp) for at, n in zip((ys, xs), self.regions.shape, strict=True)
        )
        return np.asarray(means, np.uint8)[self.regions[np.ix_(rows, columns)]]

    def write(self, path: str | Path, *, mpp: float | None, **options: Any) -> Path:
        """Write the slide; `options` are `write_pyramid`'s."""
        options.setdefault("associated", {"thumbnail": self.thumbnail()})
        own = {name: getattr(self, name) for name in ("downsamples", "tile_size", "encoding", "rounding")}
        return write_pyramid(path, self.size, self, mpp=mpp, **own, **options)


def _stored(tile: Tile, level: int, size: tuple[int, int], side: int, encoding: Encoding) -> Iterator[bytes]:
    """Bytes of a level's tiles, row by row."""
    for row in range(-(-size[1] // side)):
        for column in range(-(-size[0] // side)):
            pixels = tile(level, column, row)
            if pixels is None:
                yield b""
            elif isinstance(pixels, bytes):
                yield pixels
            else:
                yield encoding.encode(_padded(pixels, side))


def _padded(tile: np.ndarray, side: int) -> np.ndarray:
    down, right = side - tile.shape[0], side - tile.shape[1]
    if tile.dtype != np.uint8 or tile.shape[2:] != (3,) or down < 0 or right < 0 or not tile.size:
        raise SlideError(f"a tile is {tile.dtype} {tile.shape}: give uint8 (h, w, 3), sides 1 to {side}")
    return cv2.copyMakeBorder(tile, 0, down, 0, right, cv2.BORDER_REPLICATE) if down or right else tile


def _layout(encoding: Encoding) -> dict[str, Any]:
    """The TIFF tags that say how tiles are encoded, as tifffile's arguments."""
    layout: dict[str, Any] = {"photometric": "rgb", "compression": _TAG[encoding.compression]}
    if encoding.compression == "jpeg":
        # Aperio's RGB files claim 4:2:0 too; libtiff goes by the JPEG's own header
        layout["subsampling"] = _SAMPLING[encoding.subsampling]
        layout["compressionargs"] = {"outcolorspace": encoding.photometric}
        layout["jpegtables"] = encoding.jpeg_tables
    return layout


def _header(
    flavour: Flavour,
    level: int,
    sizes: list[tuple[int, int]],
    side: int,
    mpp: float | None,
    power: float | None,
    encoding: Encoding,
) -> dict[str, Any]:
    """The TIFF tags of a level that bear its meaning, as tifffile's arguments."""
    header: dict[str, Any] = {"metadata": None, "software": False}
    if flavour == "ome":
        header["subfiletype"] = int(level > 0)
        if level == 0:
            micrometres = {f"PhysicalSize{axis}": mpp for axis in "XY"} | {f"PhysicalSize{a}Unit": "µm" for a in "XY"}
            header["metadata"] = {"axes": "YXS"} | (micrometres if mpp is not None else {})
            header["subifds"] = len(sizes) - 1
        return header
    if flavour == "generic":
        header["subfiletype"] = int(level > 0)
        if mpp is not None:
            down = sizes[0][0] / sizes[level][0]
            header |= {"resolution": (1e4 / (mpp * down),) * 2, "resolutionunit": "CENTIMETER"}
        return header
    (w, h), (width, height) = sizes[0], sizes[level]
    kind = (
        "J2K/KDU" if encoding.compression == "jpeg2000" else f"JPEG/{'RGB' if encoding.photometric == 'rgb' else 'YCC'}"
    )
    lines = f"Aperio Image Library v12.0.15\n{w}x{h} [0,0 {w}x{h}] ({side}x{side})"
    if level:
        lines += f" -> {width}x{height}"
    lines += f" {kind} Q={encoding.quality}"
    if level == 0:
        lines += f"|AppMag = {power:g}" if power is not None else ""
        lines += f"|MPP = {mpp:.6g}" if mpp is not None else ""
        lines += f"|OriginalWidth = {w}|OriginalHeight = {h}"
    return header | {"description": lines, "subfiletype": 0}


def _associate(tiff: tifffile.TiffWriter, name: str, image: np.ndarray, size: tuple[int, int]) -> None:
    """An image in strips, named as Aperio names it: openslide takes the first for the thumbnail."""
    height, width = image.shape[:2]
    told = f"{size[0]}x{size[1]} -> {width}x{height} - " if name == "thumbnail" else f"{name} {width}x{height}"
    tiff.write(
        np.ascontiguousarray(image),
        photometric="rgb",
        compression="JPEG",
        compressionargs={"level": 90},
        rowsperstrip=16,
        description=f"Aperio Image Library v12.0.15\n{told}",
        subfiletype={"thumbnail": 0, "label": 1, "macro": 9}.get(name, 0),
        metadata=None,
        software=False,
    )


def _abbreviated(jpeg: bytes) -> tuple[bytes, bytes]:
    """A JPEG file without tables and APP markers, and its tables (ISO/IEC 10918-1, B.4 and B.5).

    Components that are called R, G, B, which tells decoders the colour space, are renamed 0, 1, 2 as in Aperio's files.
    """
    image, tables, at = [b"\xff\xd8"], [b"\xff\xd8"], 2
    while True:
        marker, length = struct.unpack_from(">HH", jpeg, at)
        segment = jpeg[at : at + 2 + length]
        at += 2 + length
        if marker in (0xFFDB, 0xFFC4):
            tables.append(segment)
        elif marker in (0xFFC0, 0xFFDA):
            start, step = (10, 3) if marker == 0xFFC0 else (5, 2)
            names = bytearray(segment)
            if bytes(names[start : start + 3 * step : step]) == b"RGB":
                names[start : start + 3 * step : step] = b"\0\1\2"
            image.append(bytes(names))
        if marker == 0xFFDA:
            return b"".join([*image, jpeg[at:]]), b"".join([*tables, b"\xff\xd9"])
