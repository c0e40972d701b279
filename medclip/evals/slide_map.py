"""A text's map of a slide against the region's mask: is the tumour where the words say?

A patch's score is the log-odds that it is of the region's classes among all classes named, at CLIP's usual
temperature. Truth is each patch's share inside the mask, so that pixel values are exact without a pixel being drawn:
every pixel of a patch has its score. For non-overlapping patches, with shares s and the region's area A in patches,

    Dice of the map cut at a threshold = 2 sum over the patches above it of s / (their number + A)

where A also counts what lies on no patch. Given at a fixed threshold, and at the best one of all slides together, which
was chosen on these very slides and is a bound, no result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import logit, logsumexp

from medclip.evals.classification import parse_classes
from medclip.evals.metrics import auroc, weighted_mean
from medclip.evals.result import Advance, EvalData, Result, Role
from medclip.evals.slides import Weights, left_out, own_slides, refuse_none
from medclip.infer import zeroshot_slide as z
from medclip.infer.zeroshot import LOGIT_SCALE, ensemble, fill, prompt_features
from medclip.types import DualEncoder, UserError

_BINS = 2000  # of scores, over which all slides' patches are ranked together
_CUTS = 199  # thresholds among which the best is sought


@dataclass(frozen=True)
class SlideMapOutcomes:
    """Of each slide: AUROC of patches and pixels and Dice (NaN where undefined), and what is summed over slides."""

    keys: list[str]
    groups: list[str]
    each: dict[str, Float[np.ndarray, " n"]]
    cuts: Float[np.ndarray, "n t"]  # Dice at each threshold; NaN of slides without the region
    inside: Float[np.ndarray, "n bins"]  # patches of the region by score, ascending
    outside: Float[np.ndarray, "n bins"]

    def values(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, " b"]]:
        """Means over slides, and AUROC over the patches of all slides, under each row of slide weights."""
        found = {}
        for name, own in self.each.items():
            there = ~np.isnan(own)
            found[name] = weighted_mean(own[there], weights[:, there])
        there = ~np.isnan(self.cuts).any(axis=1)
        total = weights[:, there].sum(axis=1, keepdims=True)
        means = np.divide(
            weights[:, there] @ self.cuts[there],
            total,
            out=np.full((len(weights), self.cuts.shape[1]), np.nan),
            where=total > 0,
        )
        found["best_dice"] = means.max(axis=1)
        gain, loss = weights @ self.inside, weights @ self.outside
        below = np.cumsum(loss, axis=1) - loss
        pairs = gain.sum(axis=1) * loss.sum(axis=1)
        area = (gain * (below + loss / 2)).sum(axis=1)
        found["pooled_patch_auroc"] = np.divide(area, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
        return found


class SlideMap:
    """Score text maps against masks.

    Args:
        data: slides with `truth`, as `SlideFeatures` gives them.
        name: of the evaluation, as reports and messages call it.
        region: classes that the masks show.
        classes: class -> name, or several names, to use in prompts; those of `region`, and others to tell them from.
        templates: prompts with `{c}` or `{}` where the name goes.
        weights: makes a checkpoint's fingerprint, which its features must bear.
        encoder: see `SlideZeroShot`.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
        threshold: probability of the region from which on a patch counts as in it.
        inside: share of a patch that must lie in the mask for the patch to count as in it.
        smooth: neighbours over which a patch's scores are averaged first; 0 for none.

    Raises:
        UserError: a region that is no class, or all of them; no template; a threshold outside 0 to 1.
    """

    def __init__(
        self,
        data: EvalData,
        *,
        name: str,
        region: str | Sequence[str],
        classes: Mapping[str, str | Sequence[str]],
        templates: Sequence[str],
        weights: Weights,
        encoder: str | None = None,
        role: Role = "domain",
        threshold: float = 0.5,
        inside: float = 0.5,
        smooth: int = 0,
    ) -> None:
        self.data, self.name, self.weights, self.encoder = data, name, weights, encoder
        self.role: Role = role
        self.classes, self.templates = parse_classes(name, classes) or {}, list(templates)
        self.region = [region] if isinstance(region, str) else list(map(str, region))
        if not self.region or not set(self.region) < set(self.classes) or not self.templates:
            raise UserError(
                f"evaluation {name!r}: region {self.region} must be some of evals.{name}.classes "
                f"({', '.join(self.classes)}), not all of them, and templates must not be empty"
            )
        for template in self.templates:
            fill(template, "")
        if not 0 < threshold < 1 or not 0 < inside <= 1 or smooth < 0:
            raise UserError(
                f"evals.{name}: threshold={threshold} and inside={inside} lie in 0 to 1, smooth is 0 or more"
            )
        self.threshold, self.inside, self.smooth = threshold, inside, smooth

    @torch.inference_mode()
    def __call__(
        self, clip: DualEncoder, *, batch_size: int = 64, workers: int = 0, advance: Advance = lambda done: None
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: no slide with a mask, or features of another model.
        """
        texts = ensemble(prompt_features(clip, self.classes, self.templates))
        mine = np.array([name in self.region for name in self.classes])
        keys: list[str] = []
        groups: list[str] = []
        scores: list[np.ndarray] = []
        shares: list[np.ndarray] = []
        areas: list[float] = []
        lacking = 0
        for slide in own_slides(
            clip, self.data, texts.shape[1], self.weights, self.encoder,
            batch_size=batch_size, workers=workers, advance=advance,
        ):  # fmt: skip
            if "share" not in slide.meta:
                lacking += 1
                continue
            cosines = z.patch_scores(slide.features, texts)
            if self.smooth:
                cosines = z.smooth(cosines, z.neighbours(slide.coords, self.smooth))
            odds = LOGIT_SCALE * cosines.astype(np.float64)
            keys.append(slide.key)
            groups.append(str(slide.meta["group"]))
            scores.append(logsumexp(odds[:, mine], axis=1) - logsumexp(odds[:, ~mine], axis=1))
            shares.append(np.asarray(slide.meta["share"], np.float64))
            areas.append(float(slide.meta["area"]))
        skipped = left_out(self.data) | ({"no mask": lacking} if lacking else {})
        refuse_none(self.name, len(keys), skipped)
        outcomes = map_outcomes(keys, groups, scores, shares, areas, float(logit(self.threshold)), self.inside)
        whole = [2 * own.sum() / (len(own) + area) for own, area in zip(shares, areas, strict=True) if area > 0]
        chance = dict.fromkeys(("patch_auroc", "pixel_auroc", "pooled_patch_auroc"), 0.5)
        return Result(
            task="slide_maps",
            role=self.role,
            headline=("patch_auroc", "dice"),
            outcomes=outcomes,
            details=None,
            chance=chance | ({"dice": float(np.mean(whole))} if whole else {}),
            skipped=skipped,
        )


def map_outcomes(
    keys: list[str],
    groups: list[str],
    scores: Sequence[Float[np.ndarray, " n"]],
    shares: Sequence[Float[np.ndarray, " n"]],
    areas: Sequence[float],
    threshold: float,
    inside: float,
) -> SlideMapOutcomes:
    """What comes of slides' maps.

    Args:
        keys: of the slides.
        groups: of the slides.
        scores: of each slide's patches.
        shares: of each slide's patches inside the region.
        areas: of each slide's region, in patches.
        threshold: a score from which on a patch counts as in the region.
        inside: share from which on it truly is.
    """
    joined = np.concatenate(scores)
    edges = np.unique(np.quantile(joined, np.linspace(0, 1, _BINS + 1)))[1:-1]
    cuts = np.unique([threshold, *np.quantile(joined, np.linspace(0, 1, _CUTS + 2)[:-1])])
    each = {name: np.full(len(keys), np.nan) for name in ("patch_auroc", "pixel_auroc", "dice")}
    dice = np.full((len(keys), len(cuts)), np.nan)
    counts = np.zeros((2, len(keys), len(edges) + 1))
    for i, (own, share, area) in enumerate(zip(scores, shares, areas, strict=True)):
        truth = share >= inside
        each["patch_auroc"][i] = auroc(own, truth, np.ones((1, len(own))))[0]
        both = np.concatenate([share, 1 - share])[None]
        each["pixel_auroc"][i] = auroc(np.tile(own, 2), np.arange(2 * len(own)) < len(own), both)[0]
        place = np.searchsorted(edges, own, side="right")
        for side, wanted in enumerate((truth, ~truth)):
            counts[side, i] = np.bincount(place[wanted], minlength=len(edges) + 1)
        if area > 0:
            each["dice"][i] = dice_at(own, share, area, np.array([threshold]))[0]
            dice[i] = dice_at(own, share, area, cuts)
    return SlideMapOutcomes(keys, groups, each, dice, counts[0], counts[1])


def dice_at(
    scores: Float[np.ndarray, " n"], share: Float[np.ndarray, " n"], area: float, cuts: Float[np.ndarray, " t"]
) -> Float[np.ndarray, " t"]:
    """Dice of the map cut at each of `cuts` (a score equal to it is in)."""
    order = np.argsort(scores)
    first = np.searchsorted(scores[order], cuts, side="left")
    beyond = np.concatenate([np.cumsum(share[order][::-1])[::-1], [0.0]])
    return 2 * beyond[first] / (len(scores) - first + area)
