"""Multi-label classification: each class by itself present, absent or unknown, as the findings of a chest X-ray.

A classifier answers with the log-odds of its own classes, a CLIP by pairs of prompts (`infer.scorers`). Both end in one
report, so that a fine-tuned classifier, a zero-shot CLIP and a random initialisation stand side by side, judged on the
same samples and resamples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import expit

from medclip.evals import multilabel_curves as curves
from medclip.evals.gallery import Gallery
from medclip.evals.multilabel_metrics import brier, calibration_error, ranking
from medclip.evals.multilabel_outcomes import MultiLabelOutcomes
from medclip.evals.result import Advance, ClassReport, Finding, LabelledData, MultiLabelDetails, PairScore, Result, Role
from medclip.infer.multilabel import parse_pairs
from medclip.infer.scorers import Classifier, Scorer, scorer, seen_rows
from medclip.types import DualEncoder, UserError

PICTURES = 3  # of each class in the report


@dataclass(frozen=True)
class Scored:
    """A set passed over: labels (NaN: unknown) and log-odds of every class, also by each pair of prompts alone."""

    keys: list[str]
    groups: list[str]
    labels: Float[np.ndarray, "n c"]
    log_odds: Float[np.ndarray, "n c"]
    by_pair: Float[np.ndarray, "t n c"]
    skipped: dict[str, int]


class MultiLabel:
    """Classify images into classes that do not exclude each other.

    Args:
        data: labelled samples; those without a known label of any class are counted as skipped.
        name: of the evaluation, as reports and messages call it.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
        classes: class of the data -> name, or several names, to use in prompts and to find a classifier's class by;
            None: all of the data's, by their names.
        prompts: pairs of templates for presence and absence, with `{}` or `{c}` where the name goes.
        validation: samples that the thresholds of operating points are chosen on; None takes the evaluated ones.

    Raises:
        UserError: no class, a class that the data lacks, or prompts that are no pairs.
    """

    takes = ("clip", "classifier")

    def __init__(
        self,
        data: LabelledData,
        *,
        name: str,
        role: Role = "domain",
        classes: Mapping[str, str | Sequence[str]] | None = None,
        prompts: Sequence[Mapping[str, str] | Sequence[str]] = (("{}", "no {}"),),
        validation: LabelledData | None = None,
    ) -> None:
        self.data = data
        self.name = name
        self.role: Role = role
        self.validation = validation
        self.pairs = parse_pairs(prompts)
        for part, own in (("data", data), ("validation", validation)):
            if own is not None and not own.classes:
                raise UserError(
                    f"evaluation {name!r}: evals.{name}.{part} has no labels: say evals.{name}.{part}.labels"
                )
        words = {c: c.replace("_", " ") for c in data.classes} if classes is None else classes
        self.classes = {str(c): [own] if isinstance(own, str) else [str(n) for n in own] for c, own in words.items()}
        if not self.classes or not all(self.classes.values()):
            raise UserError(f"evaluation {name!r}: give evals.{name}.classes at least one class, each with a name")
        for part, own in (("data", data), ("validation", validation)):
            if own is not None and (lacking := [c for c in self.classes if c not in own.classes]):
                raise UserError(
                    f"evaluation {name!r}: evals.{name}.{part} has no labels of {', '.join(map(repr, lacking))} "
                    f"(it has {', '.join(map(repr, own.classes))}): mend evals.{name}.{part}.labels"
                )

    @torch.inference_mode()
    def __call__(
        self,
        clip: DualEncoder | Classifier,
        *,
        batch_size: int = 64,
        workers: int = 0,
        advance: Advance = lambda done: None,
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: no labelled sample, a classifier with none of the classes, or a group that is in both sets.
        """
        ask = scorer(clip, self.classes, self.pairs)
        gallery = Gallery(len(self.classes), PICTURES)
        found = self._score(ask, self.data, batch_size, workers, advance, gallery)
        chosen_on, skipped = found, found.skipped
        if self.validation is not None:
            chosen_on = self._score(ask, self.validation, batch_size, workers)
            self._refuse_shared(found, chosen_on)
            skipped = skipped | {f"{reason} (validation)": n for reason, n in chosen_on.skipped.items()}
        outcomes = MultiLabelOutcomes(found.keys, found.groups, list(self.classes), found.labels, found.log_odds)
        findings, attention = gallery.draw(ask)
        classes = [
            _class_report(
                label,
                words if ask.kind == "zero-shot" else [],
                found.log_odds[:, c],
                found.labels[:, c],
                curves.choose_thresholds(chosen_on.log_odds[:, c], chosen_on.labels[:, c]),
                findings[c],
            )
            for c, (label, words) in enumerate(self.classes.items())
        ]
        undefined = outcomes.undefined
        return Result(
            task="multilabel_classification",
            role=self.role,
            headline=("auroc", "mean_average_precision"),
            outcomes=outcomes,
            details=MultiLabelDetails(
                kind=ask.kind,
                classes=classes,
                missing=outcomes.missing,
                validation=len(chosen_on.keys) if self.validation is not None else 0,
                pairs=self._pair_scores(found),
                attention=attention,
            ),
            chance=outcomes.chance(),
            skipped=skipped,
            lower_is_better=frozenset({"brier"}),
            undefined=dict.fromkeys(("auroc", "mean_average_precision", "brier"), undefined) if undefined else {},
        )

    def _score(
        self,
        ask: Scorer,
        data: LabelledData,
        batch_size: int,
        workers: int,
        advance: Advance = lambda done: None,
        gallery: Gallery | None = None,
    ) -> Scored:
        columns = [list(data.classes).index(label) for label in self.classes]
        keys: list[str] = []
        groups: list[str] = []
        labels, scores = [], []
        lacking = 0
        for batch in data.batches(ask.preprocess, batch_size, workers):
            assert "key" in batch and "meta" in batch and "label" in batch
            rows = len(batch["key"])
            truth = batch["label"][:rows, columns].double().numpy()
            usable = np.flatnonzero(~np.isnan(truth).all(axis=1))
            lacking += rows - len(usable)
            if len(usable):
                part = seen_rows(batch, usable.tolist())
                scored = ask(part).double().cpu().numpy()
                if gallery is not None:
                    gallery.see(part, scored[0], truth[usable])
                keys += [batch["key"][i] for i in usable]
                groups += [str(batch["meta"][i]["group"]) for i in usable]
                labels.append(truth[usable])
                scores.append(scored)
            advance(rows)
        skipped = dict(Counter(reason for _, reason, _ in data.bad)) | ({"no label": lacking} if lacking else {})
        if not keys:
            reasons = ", ".join(f"{count} {why}" for why, count in skipped.items()) or "no sample at all"
            part = "data" if data is self.data else "validation"
            raise UserError(
                f"evaluation {self.name!r} has nothing to evaluate ({reasons}): mend evals.{self.name}.{part}"
            )
        every = np.concatenate(scores, axis=1)
        return Scored(keys, groups, np.concatenate(labels), every[0], every[1:], skipped)

    def _refuse_shared(self, found: Scored, validation: Scored) -> None:
        if shared := set(found.groups) & set(validation.groups):
            raise UserError(
                f"evaluation {self.name!r}: {len(shared)} groups (patients) of evals.{self.name}.validation are in "
                f"evals.{self.name}.data too, so its thresholds would be chosen on what they are judged on: split by "
                "group (both sets need data.group)"
            )

    def _pair_scores(self, found: Scored) -> list[PairScore]:
        ones = np.ones((1, len(found.keys)))
        scores = []
        for pair, odds in zip(self.pairs, found.by_pair, strict=False):  # none of a classifier
            areas = [float(ranking(odds[:, c], found.labels[:, c], ones)[0][0]) for c in range(len(self.classes))]
            scores.append(PairScore(pair.positive, pair.negative, areas))
        return scores


def _class_report(
    label: str,
    words: list[str],
    odds: Float[np.ndarray, " n"],
    labels: Float[np.ndarray, " n"],
    thresholds: curves.Thresholds,
    findings: list[Finding],
) -> ClassReport:
    positives, known = int((labels == 1).sum()), int((~np.isnan(labels)).sum())
    if np.isnan(odds).all():
        return ClassReport(label, words, positives, known, calibration_error=math.nan, brier=math.nan)
    probability, ones = expit(odds), np.ones((1, len(odds)))
    return ClassReport(
        name=label,
        words=words,
        positives=positives,
        known=known,
        calibration_error=calibration_error(probability, labels),
        brier=float(brier(probability[:, None], labels[:, None], ones)[0, 0]),
        roc=curves.roc_curve(odds, labels),
        reliability=curves.reliability(odds, labels),
        operating_points=curves.operating_points(odds, labels, thresholds),
        gallery=findings,
    )
