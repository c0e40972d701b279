"""Retrieval of slides: by another slide, and by a text.

A slide's own vector is the renormalised mean of its patches' unit-norm features. Asked by a slide, slides of other
patients of the same class are right: R@k (one is among the first k), mean average precision, and mMV@5 (the class that
most of the first five have, of equals the one of the nearest; Yottixel, doi:10.1016/j.media.2020.101757).
Asked by a class's prompts, slides are ranked by the pooled scores of their patches: mean average precision over the
classes; by their own texts (`data.captions`): R@k. Equal scores count against the query. Intervals resample patients as
queries, and for classes as what is found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medclip.evals.classification import match_classes, parse_classes
from medclip.evals.metrics import macro, weighted_mean
from medclip.evals.multilabel_metrics import ranking
from medclip.evals.ranking import chance_recall
from medclip.evals.result import Advance, EvalData, Result, Role
from medclip.evals.slides import Weights, left_out, own_slides, refuse_none
from medclip.infer import zeroshot_slide as z
from medclip.infer.zeroshot import embed_texts, ensemble, fill, prompt_features
from medclip.types import DualEncoder, UserError

AT = (1, 3, 5)
VOTES = 5


@dataclass(frozen=True)
class SlideRetrievalOutcomes:
    """Of each slide as a query its values (NaN where no other patient's slide is right), and scores by class."""

    keys: list[str]
    groups: list[str]
    queries: dict[str, Float[np.ndarray, " n"]]
    labels: list[str]
    classes: dict[str, Float[np.ndarray, " n"]]  # class -> score of each slide

    def values(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, " b"]]:
        """Every metric under each row of slide weights."""
        found = {}
        for name, own in self.queries.items():
            there = ~np.isnan(own)
            found[name] = weighted_mean(own[there], weights[:, there])
        if self.classes:
            truth = np.asarray(self.labels)
            each = [ranking(s, (truth == name).astype(np.float64), weights)[1] for name, s in self.classes.items()]
            found["class_to_slide_map"] = macro(np.stack(each, axis=1))
        return found


class SlideRetrieval:
    """Find slides by slides and by texts.

    Args:
        data: slides with a label each, as `SlideFeatures` gives them; with `captions`, their own texts are asked, too.
        name: of the evaluation, as reports and messages call it.
        weights: makes a checkpoint's fingerprint, which its features must bear.
        classes: label in the data -> name, or several names, to use in prompts.
        templates: prompts with `{c}` or `{}` where the name goes.
        encoder: see `SlideZeroShot`.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
        pool: patches of a slide that speak for it when a text asks; None: all.

    Raises:
        UserError: no class or template.
    """

    def __init__(
        self,
        data: EvalData,
        *,
        name: str,
        weights: Weights,
        classes: Mapping[str, str | Sequence[str]],
        templates: Sequence[str],
        encoder: str | None = None,
        role: Role = "domain",
        pool: int | None = 10,
    ) -> None:
        self.data, self.name, self.weights, self.encoder, self.pool = data, name, weights, encoder, pool
        self.role: Role = role
        parsed = parse_classes(name, classes)
        if parsed is None or not templates:
            raise UserError(f"evaluation {name!r}: give evals.{name}.classes and templates")
        self.classes, self.templates = parsed, list(templates)
        for template in self.templates:
            fill(template, "")

    @torch.inference_mode()
    def __call__(
        self, clip: DualEncoder, *, batch_size: int = 64, workers: int = 0, advance: Advance = lambda done: None
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: fewer than two labelled slides, labels that are no configured class, features of another model.
        """
        texts = ensemble(prompt_features(clip, self.classes, self.templates))
        keys: list[str] = []
        groups: list[str] = []
        labels: list[str] = []
        captions: list[list[str]] = []
        vectors: list[Tensor] = []
        scores: list[np.ndarray] = []
        lacking = 0
        own_texts: dict[str, Tensor] = {}
        if written := self._captions():
            own_texts = dict(zip(written, embed_texts(clip, written), strict=True))
        every = torch.cat([texts, *(own[None] for own in own_texts.values())])
        for slide in own_slides(
            clip, self.data, texts.shape[1], self.weights, self.encoder,
            batch_size=batch_size, workers=workers, advance=advance,
        ):  # fmt: skip
            if slide.meta["label"] is None:
                lacking += 1
                continue
            unit = torch.nn.functional.normalize(slide.features.float(), dim=-1)
            vectors.append(torch.nn.functional.normalize(unit.mean(dim=0), dim=0))
            scores.append(z.pool(z.patch_scores(unit, every), self.pool))
            keys.append(slide.key)
            groups.append(str(slide.meta["group"]))
            labels.append(str(slide.meta["label"]))
            captions.append(list(slide.meta["captions"]))
        skipped = left_out(self.data) | ({"no label": lacking} if lacking else {})
        refuse_none(self.name, len(keys) - 1, skipped)
        match_classes(self.name, self.classes, labels)
        table = np.stack(scores)
        queries, chance = by_slide(torch.stack(vectors).double().numpy(), labels, groups)
        if own_texts:
            found = by_text(table[:, len(texts) :], list(own_texts), captions)
            queries |= found
            chance |= {f"text_to_slide_recall@{k}": chance_recall(np.array([1]), len(keys), k) for k in AT}
        outcomes = SlideRetrievalOutcomes(
            keys, groups, queries, labels, {name: table[:, i] for i, name in enumerate(self.classes)}
        )
        present = Counter(labels)
        chance["class_to_slide_map"] = float(
            np.mean([chance_precision(present[name], len(labels)) for name in self.classes if present[name]])
        )
        return Result(
            task="slide_retrieval",
            role=self.role,
            headline=("slide_to_slide_map", "class_to_slide_map"),
            outcomes=outcomes,
            details=None,
            chance=chance,
            skipped=skipped,
        )

    def _captions(self) -> list[str]:
        """All slides' texts, where the data have some."""
        asked = getattr(self.data, "all_captions", None)
        return list(dict.fromkeys(asked())) if asked is not None else []


def by_slide(
    vectors: Float[np.ndarray, "n d"], labels: Sequence[str], groups: Sequence[str]
) -> tuple[dict[str, Float[np.ndarray, " n"]], dict[str, float]]:
    """Each slide as a query among the slides of other groups: its values (NaN without a right one), and chance's."""
    truth, own_group = np.asarray(labels), np.asarray(groups)
    names = ("slide_to_slide_map", f"slide_to_slide_mmv@{VOTES}", *(f"slide_to_slide_recall@{k}" for k in AT))
    found = {name: np.full(len(truth), np.nan) for name in names}
    luck: dict[str, list[float]] = {name: [] for name in names if "mmv" not in name}
    similarity = vectors @ vectors.T
    for i in range(len(truth)):
        others = np.flatnonzero(own_group != own_group[i])
        right = truth[others] == truth[i]
        if not right.any():
            continue
        order = np.lexsort((right, -similarity[i, others]))  # of equals the wrong ones first
        hits, seen = right[order], truth[others][order]
        found["slide_to_slide_map"][i] = average_precision(hits)
        votes = Counter(seen[:VOTES].tolist())  # in the order of their nearest
        found[f"slide_to_slide_mmv@{VOTES}"][i] = votes.most_common(1)[0][0] == truth[i]
        luck["slide_to_slide_map"].append(chance_precision(int(right.sum()), len(others)))
        for k in AT:
            found[f"slide_to_slide_recall@{k}"][i] = hits[:k].any()
            luck[f"slide_to_slide_recall@{k}"].append(chance_recall(np.array([right.sum()]), len(others), k))
    return found, {name: float(np.mean(values)) for name, values in luck.items() if values}


def by_text(
    scores: Float[np.ndarray, "n t"], texts: Sequence[str], captions: Sequence[Sequence[str]]
) -> dict[str, Float[np.ndarray, " n"]]:
    """R@k of each slide by its own texts, the mean over them; a text finds any slide that bears it."""
    place = {text: i for i, text in enumerate(texts)}
    bears = np.array([[text in own for text in texts] for own in captions])
    found = {f"text_to_slide_recall@{k}": np.full(len(captions), np.nan) for k in AT}
    ranks = np.empty(len(texts))
    for t in range(len(texts)):
        own = bears[:, t]
        best = scores[own, t].max() if own.any() else np.inf
        ranks[t] = 1 + (scores[~own, t] >= best).sum()
    for i, own in enumerate(captions):
        for k in AT if own else ():
            found[f"text_to_slide_recall@{k}"][i] = np.mean([ranks[place[text]] <= k for text in own])
    return found


def average_precision(hits: np.ndarray) -> float:
    """Precision at each right item's place, averaged over the right ones."""
    places = np.flatnonzero(hits) + 1
    return float((np.arange(1, len(places) + 1) / places).mean())


def chance_precision(right: int, total: int) -> float:
    """The expectation of average precision over all orders of `total` items, `right` of them right.

    A right item at place p has p - 1 before it, of which (right - 1) / (total - 1) are right: the mean over p of
    (1 + (p - 1) (right - 1) / (total - 1)) / p.
    """
    share = (right - 1) / (total - 1) if total > 1 else 0.0
    places = np.arange(1, total + 1)
    return float(((1 + (places - 1) * share) / places).mean())
