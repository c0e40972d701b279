"""Zero-shot classification: accuracy and its relatives, with the spread over prompts.

The predicted class is the one whose prompt ensemble is most similar to the image; AUROC orders samples by the odds of
a class's softmax probability at CLIP's usual temperature (logits = 100 x cosine). Calibration is that of the model's
own temperature, which it learnt for pairs of image and caption, where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from medclip.evals import metrics as m
from medclip.evals.calibration import probabilities, reliability
from medclip.evals.collect import Collected, collect, spread_evenly
from medclip.evals.result import Advance, ClassificationDetails, EvalData, Example, PromptScore, Result, Role
from medclip.infer.zeroshot import LOGIT_SCALE, by_template, ensemble, fill, own_logit_scale, prompt_features
from medclip.types import DualEncoder, UserError

EXAMPLES = 12


@dataclass(frozen=True)
class ClassificationOutcomes:
    """Labels, and the logits of every class, of each sample."""

    keys: list[str]
    groups: list[str]
    labels: Int[np.ndarray, " n"]
    logits: Float[np.ndarray, "n c"]

    def values(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, " b"]]:
        """Every metric under each row of sample weights. Top-5 accuracy is given where there are more than five."""
        table = m.confusion(self.labels, self.logits.argmax(axis=1), self.logits.shape[1], weights)
        found = {
            "acc1": m.weighted_mean(self.logits.argmax(axis=1) == self.labels, weights),
            "mean_per_class_recall": m.macro(m.class_recall(table)),
            "macro_f1": m.macro(m.class_f1(table)),
            "auroc": m.macro(m.class_auroc(m.log_odds(self.logits), self.labels, weights)),
        }
        if self.logits.shape[1] > 5:
            in_five = (m.top_k(self.logits, 5) == self.labels[:, None]).any(axis=1)
            found["acc5"] = m.weighted_mean(in_five, weights)
        return found


class ZeroShotClassification:
    """Classify images by prompts alone.

    Args:
        data: samples with a label each; those without are counted as skipped.
        name: of the evaluation, as reports and messages call it.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
        classes: label in the data -> name, or several names, to use in prompts; None: the labels themselves.
        templates: prompts with `{c}` or `{}` where the name goes.
    """

    def __init__(
        self,
        data: EvalData,
        *,
        name: str,
        role: Role = "domain",
        classes: Mapping[str, str | Sequence[str]] | None = None,
        templates: Sequence[str] = ("a photo of {c}.",),
    ) -> None:
        self.data = data
        self.name = name
        self.role: Role = role
        self.templates = list(templates)
        self.classes: dict[str, list[str]] | None = None
        if classes is not None:
            self.classes = {str(k): [v] if isinstance(v, str) else [str(n) for n in v] for k, v in classes.items()}
            if not self.classes or not all(self.classes.values()):
                raise UserError(f"evaluation {name!r}: give evals.{name}.classes at least one class, each with a name")
        if not self.templates:
            raise UserError(f"evaluation {name!r}: evals.{name}.templates is empty: give at least one")
        for template in self.templates:
            fill(template, "")

    @torch.inference_mode()
    def __call__(
        self, clip: DualEncoder, *, batch_size: int = 64, workers: int = 0, advance: Advance = lambda done: None
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: no labelled sample, or labels that are no configured class.
        """
        found = collect(
            clip, self.data, self.name, need="label", batch_size=batch_size, workers=workers, advance=advance
        )
        classes = self._match(found.labels)
        place = {label: i for i, label in enumerate(classes)}
        prompts = prompt_features(clip, classes, self.templates)
        features = found.features.double()
        logits = LOGIT_SCALE * (features @ ensemble(prompts).double().T).numpy()
        labels = np.array([place[label] for label in found.labels])
        outcomes = ClassificationOutcomes(found.keys, found.groups, labels, logits)
        alone = LOGIT_SCALE * (features @ by_template(prompts).double().mT).numpy()  # (t, n, c)

        temperature = own_logit_scale(clip)
        ones = np.ones((1, len(labels)))
        table = m.confusion(labels, logits.argmax(axis=1), len(classes), ones)
        recall, f1 = m.class_recall(table)[0], m.class_f1(table)[0]
        auroc = m.class_auroc(m.log_odds(logits), labels, ones)[0]
        names = list(classes)
        per_class = {"mean_per_class_recall": recall, "macro_f1": f1, "auroc": auroc}
        details = ClassificationDetails(
            classes=classes,
            templates=self.templates,
            support=table[0].sum(axis=1).astype(int).tolist(),
            recall=recall.tolist(),
            f1=f1.tolist(),
            auroc=auroc.tolist(),
            confusion=table[0].astype(int).tolist(),
            prompts=[_prompt_score(t, own, labels, ones) for t, own in zip(self.templates, alone, strict=True)],
            examples=_examples(found, names, logits),
        )
        count = len(classes)
        even = {"acc1": 1 / count, "mean_per_class_recall": 1 / count, "auroc": 0.5}
        return Result(
            task="zeroshot_classification",
            role=self.role,
            headline=("mean_per_class_recall", "auroc"),
            outcomes=outcomes,
            details=details,
            chance=even | ({"acc5": 5 / count} if count > 5 else {}),
            skipped=found.skipped,
            undefined={k: left for k, v in per_class.items() if (left := m.undefined(v, names))},
            reliability=reliability(probabilities(logits * (temperature / LOGIT_SCALE)), labels, temperature),
        )

    def _match(self, labels: Sequence[str]) -> dict[str, list[str]]:
        present = sorted(set(labels))
        if self.classes is None:
            return {label: [label] for label in present}
        if unknown := [label for label in present if label not in self.classes]:
            raise UserError(
                f"evaluation {self.name!r}: the data has labels {_names(unknown)} that are no configured class "
                f"(configured: {_names(list(self.classes))}; in the data: {_names(present)}): "
                f"mend evals.{self.name}.classes, or leave those samples out by a filter"
            )
        return self.classes


def _names(labels: list[str], most: int = 12) -> str:
    return ", ".join(map(repr, labels[:most])) + (f" and {len(labels) - most} more" if len(labels) > most else "")


def _prompt_score(template: str, logits: np.ndarray, labels: np.ndarray, ones: np.ndarray) -> PromptScore:
    predicted = logits.argmax(axis=1)
    balanced = m.macro(m.class_recall(m.confusion(labels, predicted, logits.shape[1], ones)))
    return PromptScore(template, float((predicted == labels).mean()), float(balanced[0]))


def _examples(found: Collected, names: list[str], logits: np.ndarray) -> list[Example]:
    examples = []
    for i in spread_evenly(len(found.keys), EXAMPLES):
        odds = np.exp(logits[i] - logits[i].max())
        guesses = [(names[c], float(odds[c] / odds.sum())) for c in np.argsort(-logits[i], kind="stable")[:3]]
        examples.append(Example(found.keys[i], found.thumbnails[i], found.labels[i], guesses))
    return examples
