"""What evaluations of slides share: features that are the checkpoint's own, slide after slide, and a map's picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medclip.evals.collect import THUMBNAIL
from medclip.evals.result import Advance, EvalData
from medclip.infer.memory import Remembering
from medclip.infer.zeroshot_slide import check_features
from medclip.types import DualEncoder, Preprocess, UserError

Weights = Callable[[nn.Module, Preprocess], str]  # fingerprint of a checkpoint, as its features name it


@dataclass(frozen=True)
class Slide:
    """A slide's patches: features, and the level-0 corners (x, y) of squares of `meta["side"]` pixels."""

    key: str
    features: Float[Tensor, "n d"]
    coords: Int[np.ndarray, "n 2"]
    meta: dict[str, Any]


def own_slides(
    clip: DualEncoder,
    data: EvalData,
    dim: int,
    weights: Weights,
    trust: str | None,
    *,
    batch_size: int,
    workers: int,
    advance: Advance,
) -> Iterator[Slide]:
    """Slides of `data`, one after the other: features as they are stored, or of patches that are read now.

    Args:
        clip: the checkpoint.
        data: yields `bag`, `coords` and `meta` a slide; or `image` and `coords` of some patches of a slide at a time,
            the last of which says so in `meta`.
        dim: width of the checkpoint's features.
        weights: makes the checkpoint's fingerprint.
        trust: see `check_features`.
        batch_size: patches embedded at a time.
        workers: that read.
        advance: told of each slide.

    Raises:
        UserError: features of another model.
    """
    model = clip.encoder if isinstance(clip, Remembering) else clip
    assert isinstance(model, nn.Module)
    mark = ""
    rows: list[Tensor] = []
    places: list[Tensor] = []
    for batch in data.batches(clip.preprocess, batch_size, workers):
        assert "key" in batch and "meta" in batch and "coords" in batch
        [key], [meta] = batch["key"], batch["meta"]
        if "bag" in batch:
            features, coords = batch["bag"][0], batch["coords"][0]
            mark = mark or weights(model, model.preprocess)  # pyright: ignore[reportArgumentType]
            check_features(meta, key, mark, features.shape[1], dim, trust)
        else:
            assert "image" in batch
            rows.append(clip.encode_image(batch["image"].to(clip.device)).float().cpu())
            places.append(batch["coords"][0])
            if not meta["last"]:
                continue
            features, coords = torch.cat(rows), torch.cat(places)
            rows, places = [], []
        yield Slide(key, features, coords.numpy(), meta)
        advance(1)


def refuse_none(name: str, found: int, skipped: dict[str, int]) -> None:
    """Raises: UserError where no slide was left."""
    if not found:
        reasons = ", ".join(f"{count} {why}" for why, count in skipped.items()) or "no slide at all"
        raise UserError(f"evaluation {name!r} has nothing to evaluate ({reasons}): mend evals.{name}.data")


def left_out(data: EvalData) -> dict[str, int]:
    """Why slides were left out, and how many."""
    return dict(Counter(reason for _, reason, _ in data.bad))


def picture(values: Float[np.ndarray, " n"], coords: Int[np.ndarray, "n 2"], side: float) -> bytes:
    """A small JPEG of a slide's map, values 0 to 1 from dark to bright on white: what the report shows of a slide."""
    least, most = coords.min(axis=0), coords.max(axis=0) + side
    span = float((most - least).max())
    scale = THUMBNAIL / span
    start = (least + most - span) / 2  # of a square around all of them
    colours = cv2.cvtColor(
        cv2.applyColorMap((np.clip(values, 0, 1) * 255).astype(np.uint8)[:, None], cv2.COLORMAP_VIRIDIS),
        cv2.COLOR_BGR2RGB,
    )[:, 0]
    pixels = np.full((THUMBNAIL, THUMBNAIL, 3), 255, np.uint8)
    for (x, y), colour in zip((coords - start) * scale, colours, strict=True):
        left, top = round(float(x)), round(float(y))
        right, bottom = max(left + 1, round(float(x + side * scale))), max(top + 1, round(float(y + side * scale)))
        pixels[top:bottom, left:right] = colour
    return simplejpeg.encode_jpeg(pixels, quality=80, colorspace="RGB", colorsubsampling="444")
