"""Zero-shot classification: accuracy and its relatives, with the spread over prompts.

The predicted class is the one whose prompt ensemble is most similar to the image; AUROC orders samples by the odds of
a class's softmax probability at CLIP's usual temperature (logits = 100 x cosine). Calibration is that of the model's
own temperature, which it learnt for pairs of image and caption, where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from medclip.evals import metrics as m
from medclip.evals.calibration import probabilities, reliability
from medclip.evals.classification import ClassificationOutcomes, classification_result, match_classes, parse_classes
from medclip.evals.collect import collect
from medclip.evals.result import Advance, EvalData, PromptScore, Result, Role
from medclip.infer.zeroshot import LOGIT_SCALE, by_template, ensemble, fill, own_logit_scale, prompt_features
from medclip.types import DualEncoder, UserError


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
        self.classes = parse_classes(name, classes)
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
        classes = match_classes(self.name, self.classes, found.labels)
        place = {label: i for i, label in enumerate(classes)}
        prompts = prompt_features(clip, classes, self.templates)
        features = found.features.double()
        logits = LOGIT_SCALE * (features @ ensemble(prompts).double().T).numpy()
        labels = np.array([place[label] for label in found.labels])
        alone = LOGIT_SCALE * (features @ by_template(prompts).double().mT).numpy()  # (t, n, c)
        temperature = own_logit_scale(clip)
        ones = np.ones((1, len(labels)))
        return classification_result(
            "zeroshot_classification",
            self.role,
            found,
            ClassificationOutcomes(found.keys, found.groups, labels, logits),
            classes,
            reliability(probabilities(logits * (temperature / LOGIT_SCALE)), labels, temperature),
            templates=self.templates,
            prompts=[_prompt_score(t, own, labels, ones) for t, own in zip(self.templates, alone, strict=True)],
        )


def _prompt_score(template: str, logits: np.ndarray, labels: np.ndarray, ones: np.ndarray) -> PromptScore:
    predicted = logits.argmax(axis=1)
    balanced = m.macro(m.class_recall(m.confusion(labels, predicted, logits.shape[1], ones)))
    return PromptScore(template, float((predicted == labels).mean()), float(balanced[0]))
