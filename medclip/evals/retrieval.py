"""Image-text retrieval both ways: recall at 1, 5 and 10, and the median rank, with several captions an image.

An image finds its text if any of its captions is among the first k distinct captions; a caption finds its image if any
image bearing exactly that caption is among the first k (`ranking` says how duplicates and ties count). Intervals
resample the queries by group; the gallery stays as it is, for a smaller one would be an easier one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from medclip.evals.collect import Collected, collect, spread_evenly
from medclip.evals.metrics import weighted_mean, weighted_median
from medclip.evals.ranking import best_items, chance_median_rank, chance_recall, own_ranks
from medclip.evals.result import Advance, EvalData, Hit, Query, Result, RetrievalDetails, Role
from medclip.infer.zeroshot import embed_texts
from medclip.types import DualEncoder

AT = (1, 5, 10)
QUERIES, HITS = 6, 5  # of the report's gallery


@dataclass(frozen=True)
class RetrievalOutcomes:
    """Ranks (1 = first): one an image as a query, and one a caption of an image as a query."""

    keys: list[str]
    groups: list[str]
    text_rank: Int[np.ndarray, " n"]  # of the best own caption, for each image
    image_rank: Int[np.ndarray, " p"]  # of the best image that bears the caption, for each (image, caption)
    bearer: Int[np.ndarray, " p"]  # the image of each such pair, whose weight it shares

    def values(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, " b"]]:
        """Every metric under each row of image weights."""
        found = {}
        sides = (("text", self.text_rank, weights), ("image", self.image_rank, weights[:, self.bearer]))
        for side, ranks, own_weights in sides:
            for k in AT:
                found[f"{side}_retrieval_recall@{k}"] = weighted_mean(ranks <= k, own_weights)
            found[f"{side}_retrieval_median_rank"] = weighted_median(ranks, own_weights)
        return found


class Retrieval:
    """Find texts by images and images by texts.

    Args:
        data: samples with one or more captions; those without are counted as skipped.
        name: of the evaluation, as reports and messages call it.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
    """

    def __init__(self, data: EvalData, *, name: str, role: Role = "domain") -> None:
        self.data = data
        self.name = name
        self.role: Role = role

    @torch.inference_mode()
    def __call__(
        self, clip: DualEncoder, *, batch_size: int = 64, workers: int = 0, advance: Advance = lambda done: None
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: no sample with a caption.
        """
        found = collect(
            clip, self.data, self.name, need="captions", batch_size=batch_size, workers=workers, advance=advance
        )
        texts = list(dict.fromkeys(caption for own in found.captions for caption in own))
        place = {text: i for i, text in enumerate(texts)}
        pairs = np.unique([(i, place[c]) for i, own in enumerate(found.captions) for c in own], axis=0)
        images = found.features.to(clip.device)
        captions = embed_texts(clip, texts, batch_size).to(clip.device)
        text_rank = own_ranks(images, captions, pairs)
        image_rank = own_ranks(captions, images, pairs[:, ::-1])
        owned_texts, bearers = np.bincount(pairs[:, 0]), np.bincount(pairs[:, 1])
        chance = {}
        for side, owned, size in (("text", owned_texts, len(texts)), ("image", bearers[pairs[:, 1]], len(images))):
            chance |= {f"{side}_retrieval_recall@{k}": chance_recall(owned, size, k) for k in AT}
            chance[f"{side}_retrieval_median_rank"] = chance_median_rank(owned, size)
        return Result(
            task="zeroshot_retrieval",
            role=self.role,
            headline=("text_retrieval_recall@10", "image_retrieval_recall@10"),
            outcomes=RetrievalOutcomes(found.keys, found.groups, text_rank, image_rank[pairs[:, 1]], pairs[:, 0]),
            details=RetrievalDetails(
                images=len(images),
                captions=len(pairs),
                distinct_captions=len(texts),
                image_queries=_image_queries(found, texts, images, captions, text_rank),
                text_queries=_text_queries(found, texts, images, captions, image_rank),
            ),
            chance=chance,
            skipped=found.skipped,
            lower_is_better=frozenset({"text_retrieval_median_rank", "image_retrieval_median_rank"}),
        )


def _image_queries(
    found: Collected, texts: list[str], images: Tensor, captions: Tensor, ranks: np.ndarray
) -> list[Query]:
    queries = []
    for i in spread_evenly(len(images), QUERIES):
        best, scores = best_items(images[i], captions, HITS)
        hits = [Hit(texts[t], float(s), own=texts[t] in found.captions[i]) for t, s in zip(best, scores, strict=True)]
        queries.append(Query(found.captions[i][0], int(ranks[i]), hits, found.thumbnails[i]))
    return queries


def _text_queries(
    found: Collected, texts: list[str], images: Tensor, captions: Tensor, ranks: np.ndarray
) -> list[Query]:
    queries = []
    for t in spread_evenly(len(texts), QUERIES):
        best, scores = best_items(captions[t], images, HITS)
        hits = [
            Hit(found.keys[i], float(s), own=texts[t] in found.captions[i], thumbnail=found.thumbnails[i])
            for i, s in zip(best, scores, strict=True)
        ]
        queries.append(Query(texts[t], int(ranks[t]), hits))
    return queries
