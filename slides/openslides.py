"""Every format that openslide reads: NDPI, MRXS, SCN, VMS, BIF, DICOM, and TIFFs that `tiff` leaves alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import openslide

from slides.errors import SlideError, TileError
from slides.levels import exact_downsample
from slides.reader import Level


class OpenSlideSlide:
    """A slide through openslide; see `reader.Slide`.

    After an error openslide's handle answers every later call with the same error, so it is opened again.
    """

    def __init__(
        self, path: Path, handle: openslide.OpenSlide, *, mpp: float, mpp_source: str, icc: bytes | None = None
    ) -> None:
        self.path = path
        self.size: tuple[int, int] = handle.dimensions
        self.levels = tuple(
            Level(width, height, exact_downsample(self.size, (width, height)))
            for width, height in handle.level_dimensions
        )
        self.mpp, self.mpp_source, self.icc = mpp, mpp_source, icc
        self.properties: Mapping[str, str] = properties_of(handle)
        self._own_downsamples: tuple[float, ...] = handle.level_downsamples
        self._handle = handle
        self._lock = threading.Lock()

    def scalable(self, level: int) -> bool:
        return False

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        handle, own = self._handle, self._own_downsamples[level]
        place = (round(x * own), round(y * own))
        try:
            region = handle.read_region(place, level, (width, height))
        except openslide.OpenSlideError:
            # It may be another thread's error that the handle repeats: only a handle of one's own tells.
            with self._lock, self._open_again() as own_handle:
                if self._handle is handle:
                    # Not closed: other threads may be reading from it. It goes when they let go of it.
                    self._handle = self._open_again()
                try:
                    region = own_handle.read_region(place, level, (width, height))
                except openslide.OpenSlideError as error:
                    why = " ".join(str(error).split())
                    raise TileError(f"{self.path.name}: level {level} at ({x}, {y}): {why}") from None
        return on_white(np.asarray(region))

    def _open_again(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self.path)
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(f"{self.path}: cannot be opened again after an error ({error})") from None

    def read_tile(self, level: int, column: int, row: int, reduce: int = 1) -> np.ndarray | None:
        raise NotImplementedError("openslide does not hand out tiles")

    def tile_jpeg(self, level: int, column: int, row: int) -> bytes | None:
        return None

    def close(self) -> None:
        self._handle.close()

    def __enter__(self) -> OpenSlideSlide:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def properties_of(handle: openslide.OpenSlide) -> dict[str, str]:
    """What openslide tells of a slide. A name that is no UTF-8 has no value."""
    found = {}
    for name in handle.properties:
        with contextlib.suppress(KeyError):
            found[name] = handle.properties[name]
    return found


def on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 4), colours not multiplied by alpha (as openslide-python gives them), to RGB over white.

    Dropping alpha, as `convert("RGB")` does, leaves black where nothing was scanned.
    """
    rgba = np.ascontiguousarray(rgba)
    # Alpha is the highest byte of a pixel read as a number; this and OpenCV's copy are 25 times as fast as slicing.
    if rgba.view("<u4").min(initial=0xFFFFFFFF) >= 0xFF000000:
        return cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB) if rgba.size else rgba[..., :3]
    cover = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * cover + 255 * (255 - cover) + 127) // 255).astype(np.uint8)
