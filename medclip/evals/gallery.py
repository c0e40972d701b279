"""The pictures that score highest for each class, with the checkpoint's attention laid over them."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from scipy.special import expit
from torch import Tensor

from medclip.evals.result import Finding
from medclip.infer.scorers import Scorer, seen_rows
from medclip.types import Batch

SIDE = 168  # pixels of the longer side
OPAQUE = 0.6  # the heat where attention is highest
BATCH = 16


@dataclass(frozen=True)
class _Kept:
    log_odds: float
    truth: bool | None
    row: Batch  # of one row


class Gallery:
    """Keeps the `most` highest-scoring pictures of each class while a set is passed over.

    Args:
        classes: how many classes there are.
        most: pictures of each.
    """

    def __init__(self, classes: int, most: int) -> None:
        self.most = most
        self.kept: list[list[_Kept]] = [[] for _ in range(classes)]

    def see(self, batch: Batch, log_odds: Float[np.ndarray, "b c"], labels: Float[np.ndarray, "b c"]) -> None:
        """Take the best of these rows; among equals the earlier picture stays."""
        assert "key" in batch
        for c, kept in enumerate(self.kept):
            column = log_odds[:, c]
            if np.isnan(column).any():
                continue
            for i in np.argsort(-column, kind="stable")[: self.most]:
                if len(kept) < self.most or column[i] > kept[-1].log_odds:
                    label = labels[i, c]
                    truth = None if np.isnan(label) else bool(label)
                    kept.append(_Kept(float(column[i]), truth, seen_rows(batch, [int(i)])))
                    kept.sort(key=lambda one: -one.log_odds)
                    del kept[self.most :]

    def draw(self, scorer: Scorer) -> tuple[list[list[Finding]], bool]:
        """The pictures of each class, best first, and whether attention could be drawn on them."""
        flat = [one for kept in self.kept for one in kept]
        maps: list[np.ndarray] = []
        for start in range(0, len(flat), BATCH):
            found = scorer.attention(_joined([one.row for one in flat[start : start + BATCH]]))
            if found is None:
                break
            maps += list(found.float().cpu().numpy())
        seen = len(maps) == len(flat) > 0
        findings = []
        for place, one in enumerate(flat):
            assert "image" in one.row and "key" in one.row
            attention = maps[place] if seen else None
            picture = overlay(one.row["image"][0].numpy(), attention)
            peak = None if attention is None else float(attention.max() / attention.mean())
            findings.append(Finding(one.row["key"][0], picture, float(expit(one.log_odds)), one.truth, peak))
        ends = np.cumsum([0, *map(len, self.kept)])
        return [findings[a:b] for a, b in pairwise(ends)], seen


def _joined(rows: list[Batch]) -> Batch:
    tensors = {k: torch.cat([row[k] for row in rows]) for k, v in rows[0].items() if isinstance(v, Tensor)}  # type: ignore[literal-required]
    return Batch(**tensors, key=[key for row in rows for key in row.get("key", [])])  # type: ignore[typeddict-item]


def overlay(image: UInt8[np.ndarray, "3 h w"], attention: Float[np.ndarray, "gh gw"] | None) -> bytes:
    """A JPEG of the picture, warm where attention is high; what is looked at least stays as it is.

    The map is stretched from its lowest to its highest value, so pictures cannot be compared in how much they draw.
    """
    picture = np.ascontiguousarray(image.transpose(1, 2, 0))
    scale = SIDE / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    if attention is not None:
        spread = attention.max() - attention.min()
        heat = (attention - attention.min()) / spread if spread > 0 else np.zeros_like(attention)
        heat = np.clip(cv2.resize(heat.astype(np.float32), size, interpolation=cv2.INTER_CUBIC), 0, 1)
        shades = (64 + 180 * heat).astype(np.uint8)  # neither its black nor its white
        colour = cv2.applyColorMap(shades, cv2.COLORMAP_INFERNO)[..., ::-1]
        alpha = OPAQUE * heat[..., None]
        picture = (picture * (1 - alpha) + colour * alpha).round().astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
