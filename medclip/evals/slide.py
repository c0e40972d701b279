"""Zero-shot classification of slides (MI-Zero, arXiv 2306.07831): several poolings, and the spread over prompt draws.

The headline pooling is fixed beforehand (`pool`); the others stand beside it, so that nobody needs to pick the best k
on the judged slides. Intervals resample patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from jaxtyping import Float

from medclip.evals import metrics as m
from medclip.evals.calibration import probabilities, reliability
from medclip.evals.classification import ClassificationOutcomes, classification_result, match_classes, parse_classes
from medclip.evals.collect import Collected
from medclip.evals.result import Advance, ClassificationDetails, EvalData, PromptScore, Result, Role
from medclip.evals.slides import Weights, left_out, own_slides, picture, refuse_none
from medclip.infer import zeroshot_slide as z
from medclip.infer.zeroshot import LOGIT_SCALE, by_template, ensemble, fill, own_logit_scale, prompt_features
from medclip.types import DualEncoder, UserError

POOLS = (1, 5, 10, 50, 100, None)


@dataclass(frozen=True)
class SlideOutcomes(ClassificationOutcomes):
    """`logits` are those of the headline pooling; `pooled` by the name of each pooling, `drawn` of each prompt draw."""

    pooled: dict[str, Float[np.ndarray, "n c"]] = field(default_factory=dict)
    drawn: Float[np.ndarray, "draws n c"] = field(default_factory=lambda: np.zeros((0, 0, 0)))

    def values(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, " b"]]:
        """Every metric under each row of slide weights; and for each pooling, `METRIC_POOLING`."""
        found = super().values(weights)
        if len(self.drawn):
            draws = np.stack([self.balanced(own, weights) for own in self.drawn])
            quarters = np.percentile(draws, [50, 25, 75], axis=0)
            names = ("median_over_prompts", "lower_quartile_over_prompts", "upper_quartile_over_prompts")
            found |= dict(zip(names, quarters, strict=True))
        for name, logits in self.pooled.items():
            found[f"balanced_accuracy_{name}"] = self.balanced(logits, weights)
            found[f"auroc_{name}"] = m.macro(m.class_auroc(m.log_odds(logits), self.labels, weights))
        return found

    def balanced(self, logits: Float[np.ndarray, "n c"], weights: Float[np.ndarray, "b n"]) -> np.ndarray:
        return m.macro(m.class_recall(m.confusion(self.labels, logits.argmax(axis=1), logits.shape[1], weights)))


@dataclass(frozen=True)
class Draw:
    """One draw of prompts, and the balanced accuracy that it reaches by the headline pooling."""

    names: list[str]  # of each class
    templates: list[str]
    mean_per_class_recall: float


@dataclass(frozen=True)
class SlideDetails(ClassificationDetails):
    """Tables of a classification of slides."""

    pool: str = ""
    smoothing: int = 0
    draws: list[Draw] = field(default_factory=list)


def pool_name(k: int | None) -> str:
    """top-5 for 5, mean for None."""
    return "mean" if k is None else f"top-{k}"


class SlideZeroShot:
    """Classify slides by prompts alone.

    Args:
        data: slides with a label each, as `SlideFeatures` or `SlidePixels` gives them.
        name: of the evaluation, as reports and messages call it.
        classes: label in the data -> name, or several names, to use in prompts.
        templates: prompts with `{c}` or `{}` where the name goes.
        weights: makes a checkpoint's fingerprint, which its features must bear.
        encoder: features of this encoder's name are taken as the checkpoint's where they do not say whose they are.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
        pool: patches of each class that speak for the slide; None: all.
        pools: other poolings to show beside it.
        smooth: neighbours over which a patch's scores are averaged first; 0 for none.
        draws: random choices of names and templates whose spread is told; 0 for none.
        seed: of the draws.

    Raises:
        UserError: no class, no template, one without a place for the name, or a pooling that is none.
    """

    def __init__(
        self,
        data: EvalData,
        *,
        name: str,
        classes: Mapping[str, str | Sequence[str]],
        templates: Sequence[str],
        weights: Weights,
        encoder: str | None = None,
        role: Role = "domain",
        pool: int | None = 10,
        pools: Sequence[int | None] = POOLS,
        smooth: int = 0,
        draws: int = 50,
        seed: int = 0,
    ) -> None:
        self.data, self.name, self.weights, self.encoder = data, name, weights, encoder
        self.role: Role = role
        parsed = parse_classes(name, classes)
        if parsed is None or len(parsed) < 2 or not templates:
            raise UserError(f"evaluation {name!r}: give evals.{name}.classes two classes or more, and templates")
        self.classes, self.templates = parsed, list(templates)
        for template in self.templates:
            fill(template, "")
        if bad := [k for k in (pool, *pools) if k is not None and (not isinstance(k, int) or k < 1)]:
            raise UserError(f"evals.{name}: pooling over {bad[0]} patches: give whole numbers from 1, or null for all")
        if smooth < 0 or draws < 0:
            raise UserError(f"evals.{name}: smooth={smooth}, draws={draws}: give numbers from 0")
        self.pool, self.pools, self.smooth, self.draws, self.seed = pool, list(pools), smooth, draws, seed

    @torch.inference_mode()
    def __call__(
        self, clip: DualEncoder, *, batch_size: int = 64, workers: int = 0, advance: Advance = lambda done: None
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: no labelled slide, labels that are no configured class, or features of another model.
        """
        prompts = prompt_features(clip, self.classes, self.templates)
        chosen = z.draw_prompts([own.shape[1] for own in prompts], len(self.templates), self.draws, self.seed)
        count = len(self.classes)
        # Of the ensemble, of each template alone, of each draw: all against every patch at once.
        texts = torch.cat(
            [ensemble(prompts), *by_template(prompts), *(z.drawn_classifier(prompts, own) for own in chosen)]
        )
        found = Collected(torch.empty(0, 0))
        pooled: list[np.ndarray] = []  # (texts,) of each slide
        others: list[np.ndarray] = []  # (pools, c)
        lacking = 0
        for slide in own_slides(
            clip, self.data, texts.shape[1], self.weights, self.encoder,
            batch_size=batch_size, workers=workers, advance=advance,
        ):  # fmt: skip
            if slide.meta["label"] is None:
                lacking += 1
                continue
            if str(slide.meta["label"]) not in self.classes:
                match_classes(self.name, self.classes, [str(slide.meta["label"])])  # which says so
            scores = z.patch_scores(slide.features, texts)
            if self.smooth:
                scores = z.smooth(scores, z.neighbours(slide.coords, self.smooth))
            pooled.append(z.pool(scores, self.pool))
            others.append(np.stack([z.pool(scores[:, :count], k) for k in self.pools] or [np.zeros(count)]))
            found.keys.append(slide.key)
            found.groups.append(str(slide.meta["group"]))
            found.labels.append(str(slide.meta["label"]))
            own = probabilities(LOGIT_SCALE * scores[:, :count])[:, list(self.classes).index(found.labels[-1])]
            found.thumbnails.append(picture(own, slide.coords, slide.meta["side"]))
        found.skipped = left_out(self.data) | ({"no label": lacking} if lacking else {})
        refuse_none(self.name, len(found.keys), found.skipped)
        return self._result(clip, found, LOGIT_SCALE * np.stack(pooled), LOGIT_SCALE * np.stack(others), chosen)

    def _result(
        self, clip: DualEncoder, found: Collected, pooled: np.ndarray, others: np.ndarray, chosen: list[z.Drawn]
    ) -> Result:
        count = len(self.classes)
        by_text = pooled.reshape(len(pooled), -1, count).transpose(1, 0, 2)  # (texts, slides, classes)
        alone, drawn = np.split(by_text[1:], [len(self.templates)])
        place = {label: i for i, label in enumerate(self.classes)}
        labels = np.array([place[label] for label in found.labels])
        outcomes = SlideOutcomes(
            found.keys,
            found.groups,
            labels,
            by_text[0],
            {pool_name(k): others[:, i] for i, k in enumerate(self.pools)},
            drawn,
        )
        temperature = own_logit_scale(clip)
        ones = np.ones((1, len(labels)))
        balanced = [float(outcomes.balanced(own, ones)[0]) for own in (*alone, *drawn)]
        result = classification_result(
            "zeroshot_slides",
            self.role,
            found,
            outcomes,
            self.classes,
            reliability(probabilities(by_text[0] * (temperature / LOGIT_SCALE)), labels, temperature),
            templates=self.templates,
            prompts=[
                PromptScore(text, float((own.argmax(axis=1) == labels).mean()), value)
                for text, own, value in zip(self.templates, alone, balanced[: len(alone)], strict=True)
            ],
        )
        assert isinstance(result.details, ClassificationDetails)
        names = list(self.classes.values())
        details = SlideDetails(
            **{f.name: getattr(result.details, f.name) for f in fields(ClassificationDetails)},
            pool=pool_name(self.pool),
            smoothing=self.smooth,
            draws=[
                Draw(
                    [own[i] for own, i in zip(names, d.names, strict=True)], [self.templates[t] for t in d.templates], v
                )
                for d, v in zip(chosen, balanced[len(alone) :], strict=True)
            ],
        )
        even = {"balanced_accuracy": 1 / count, "auroc": 0.5}
        chance = {f"{metric}_{name}": value for metric, value in even.items() for name in outcomes.pooled}
        return replace(result, details=details, chance=result.chance | chance)
