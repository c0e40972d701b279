"""One pass over an evaluation set: features, labels or captions, groups, and a thumbnail of every image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from jaxtyping import Float
from torch import Tensor

from medclip.evals.result import Advance, EvalData
from medclip.types import DualEncoder, UserError

THUMBNAIL = 112  # pixels on the longer side: about 3 kB each


@dataclass
class Collected:
    """The usable samples of a set, row by row, and why the others were left out."""

    features: Float[Tensor, "n d"]
    keys: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)
    raw: list[Mapping[str, Any]] = field(default_factory=list)  # metadata as the set has it
    skipped: dict[str, int] = field(default_factory=dict)


@torch.inference_mode()
def collect(
    clip: DualEncoder, data: EvalData, name: str, *, need: str, batch_size: int, workers: int, advance: Advance
) -> Collected:
    """Embed the samples that have what the evaluation needs: `need` is "label" or "captions".

    Raises:
        UserError: nothing is left.
    """
    found = Collected(torch.empty(0, 0))
    rows: list[Tensor] = []
    lacking = 0
    for batch in data.batches(clip.preprocess, batch_size, workers):
        keys, images, meta = batch["key"], batch["image"], batch["meta"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        usable = [i for i, m in enumerate(meta) if (m["label"] is not None if need == "label" else m["captions"])]
        lacking += len(meta) - len(usable)
        if usable:
            seen = images[: len(meta)] if len(usable) == len(meta) else images[usable]  # a view where it will do
            rows.append(clip.encode_image(seen.to(clip.device)).float().cpu())
            found.thumbnails += [thumbnail(images[i]) for i in usable]
            found.keys += [keys[i] for i in usable]
            found.groups += [str(meta[i]["group"]) for i in usable]
            found.labels += [str(meta[i]["label"]) for i in usable]
            found.captions += [list(meta[i]["captions"]) for i in usable]
            found.raw += [meta[i].get("raw") or {} for i in usable]
        advance(len(meta))
    found.skipped = dict(Counter(reason for _, reason, _ in data.bad))
    if lacking:
        found.skipped[f"no {need}"] = lacking
    if not rows:
        reasons = ", ".join(f"{count} {why}" for why, count in found.skipped.items()) or "no sample at all"
        raise UserError(f"evaluation {name!r} has nothing to evaluate ({reasons}): mend evals.{name}.data")
    found.features = torch.cat(rows)
    return found


def thumbnail(image: Tensor) -> bytes:
    """A small JPEG of a uint8 (3, h, w) image."""
    pixels = np.ascontiguousarray(image.cpu().numpy().transpose(1, 2, 0))
    scale = THUMBNAIL / max(pixels.shape[:2])
    if scale < 1:
        height, width = (max(1, round(scale * side)) for side in pixels.shape[:2])
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(pixels, quality=78, colorspace="RGB", colorsubsampling="420", fastdct=True)


def spread_evenly(count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices over the whole of 0..count-1: the same for every checkpoint, and not the first few."""
    return sorted(set(np.linspace(0, count - 1, min(count, wanted)).round().astype(int).tolist())) if count else []
