"""Masks and patches drawn over a slide's overview, for a person to check what was taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from slides.files import write_whole

_SHIFT = 4  # cv2 draws at 1/16 pixel


def draw(
    image: np.ndarray,
    masks: Sequence[tuple[np.ndarray, Sequence[int]]] = (),
    *,
    coords: np.ndarray | None = None,
    side: float | None = None,
    downsample: float = 1.0,
    legend: Sequence[str] = (),
    grid_color: Sequence[int] = (40, 40, 40),
) -> np.ndarray:
    """Outline and lightly tint masks over an overview, and draw the squares of a grid.

    Args:
        image: uint8 RGB (h, w, 3).
        masks: bool (h', w') of any resolution, each stretched over the whole image, and its RGB colour; later ones lie
            on top.
        coords: (N, 2) x and y of squares' top-left corners, in level-0 pixels.
        side: of the squares, in level-0 pixels.
        downsample: level-0 pixels per pixel of the image.
        legend: a line of text for each mask, then one for the squares, as far as given.
        grid_color: RGB of the squares.

    Returns:
        uint8 RGB (h, w, 3); `image` is not changed.
    """
    height, width = image.shape[:2]
    line = max(1, round(max(height, width) / 700))
    out = image.copy()
    for array, colour in masks:
        whole = cv2.resize(array.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        tinted = cv2.addWeighted(out, 0.85, np.full_like(out, np.array(colour, np.uint8)), 0.15, 0)
        out = np.where(whole[..., None] > 0, tinted, out)
    if coords is not None and side is not None and len(coords):
        out = _squares(out, np.asarray(coords, np.float64) / downsample, side / downsample, grid_color)
    for array, colour in masks:
        # Outlines are found in the mask itself and stretched, so that a coarse mask has smooth corners.
        contours, _ = cv2.findContours(array.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        scale = np.array([width / array.shape[1], height / array.shape[0]])
        rings = [np.round(((ring + 0.5) * scale - 0.5) * (1 << _SHIFT)).astype(np.int32) for ring in contours]
        cv2.polylines(out, rings, True, [int(value) for value in colour], line, cv2.LINE_AA, _SHIFT)
    colours = [colour for _, colour in masks] + [grid_color]
    return _legend(out, [(text, colour) for text, colour in zip(legend, colours, strict=False) if text])


def _squares(image: np.ndarray, corners: np.ndarray, side: float, colour: Sequence[int]) -> np.ndarray:
    """Thin half-transparent squares; below four pixels, where lines would hide everything, filled ones."""
    x, y = corners[:, 0], corners[:, 1]
    rings = np.stack([x, y, x + side, y, x + side, y + side, x, y + side], axis=1).reshape(-1, 4, 1, 2) - 0.5
    fixed = np.round(rings * (1 << _SHIFT)).astype(np.int32)
    drawn = image.copy()
    rgb = [int(value) for value in colour]
    if side < 4:
        for ring in fixed:
            cv2.fillConvexPoly(drawn, ring, rgb, cv2.LINE_AA, _SHIFT)
        return cv2.addWeighted(drawn, 0.3, image, 0.7, 0)
    cv2.polylines(drawn, list(fixed), True, rgb, 1, cv2.LINE_AA, _SHIFT)
    return cv2.addWeighted(drawn, 0.6, image, 0.4, 0)


def _legend(image: np.ndarray, lines: list[tuple[str, Sequence[int]]]) -> np.ndarray:
    """Colour keys and text on a white plate at the top left, as large as the image allows to be read."""
    if not lines:
        return image
    scale = max(0.4, max(image.shape[:2]) / 2400)
    font, thick = cv2.FONT_HERSHEY_SIMPLEX, max(1, round(2 * scale))
    sizes = [cv2.getTextSize(text, font, scale, thick)[0] for text, _ in lines]
    row = round(max(size[1] for size in sizes) * 2)
    width = max(size[0] for size in sizes) + 3 * row
    plate = image[: row * (len(lines) + 1), :width]
    plate[:] = cv2.addWeighted(plate, 0.15, np.full_like(plate, 255), 0.85, 0)
    for number, (text, colour) in enumerate(lines, 1):
        base = row * number + row // 4
        rgb = [int(value) for value in colour]
        cv2.rectangle(image, (row // 2, base - row // 2), (row + row // 2, base), rgb, -1)
        cv2.putText(image, text, (2 * row, base), font, scale, (20, 20, 20), thick, cv2.LINE_AA)
    return image


def save_jpeg(path: Path, image: np.ndarray, quality: int = 90) -> None:
    """Write uint8 RGB (h, w, 3) as a JPEG, whole or not at all.

    Raises:
        OutputError: the disk refuses.
    """
    write_whole(path, simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "444"))
