"""A classification into classes that exclude each other, however it was made: outcomes, tables and calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from medclip.evals import metrics as m
from medclip.evals.calibration import Reliability
from medclip.evals.collect import Collected, spread_evenly
from medclip.evals.result import ClassificationDetails, Confusion, Example, PromptScore, Result, Role, Showcase
from medclip.evals.showcase import confusions, surest
from medclip.types import UserError

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


def classification_result(
    task: str,
    role: Role,
    found: Collected,
    outcomes: ClassificationOutcomes,
    classes: dict[str, list[str]],
    reliability: Reliability,
    *,
    templates: Sequence[str] = (),
    prompts: Sequence[PromptScore] = (),
) -> Result:
    """Everything that reports show of it. `found` are the samples of `outcomes`, `classes` their columns."""
    labels, logits, names = outcomes.labels, outcomes.logits, list(classes)
    ones = np.ones((1, len(labels)))
    table = m.confusion(labels, logits.argmax(axis=1), len(classes), ones)
    recall, f1 = m.class_recall(table)[0], m.class_f1(table)[0]
    auroc = m.class_auroc(m.log_odds(logits), labels, ones)[0]
    per_class = {"mean_per_class_recall": recall, "macro_f1": f1, "auroc": auroc}
    count = len(classes)
    even = {"acc1": 1 / count, "mean_per_class_recall": 1 / count, "auroc": 0.5}
    return Result(
        task=task,
        role=role,
        headline=("mean_per_class_recall", "auroc"),
        outcomes=outcomes,
        details=ClassificationDetails(
            classes=classes,
            templates=list(templates),
            support=table[0].sum(axis=1).astype(int).tolist(),
            recall=recall.tolist(),
            f1=f1.tolist(),
            auroc=auroc.tolist(),
            confusion=table[0].astype(int).tolist(),
            prompts=list(prompts),
            examples=[_example(found, names, logits, i) for i in spread_evenly(len(found.keys), EXAMPLES)],
            showcase=_showcase(found, names, outcomes),
        ),
        chance=even | ({"acc5": 5 / count} if count > 5 else {}),
        skipped=found.skipped,
        undefined={k: left for k, v in per_class.items() if (left := m.undefined(v, names))},
        reliability=reliability,
    )


def parse_classes(name: str, classes: Mapping[str, str | Sequence[str]] | None) -> dict[str, list[str]] | None:
    """Label -> its names, from a config's label -> name or names; None stays None.

    Raises:
        UserError: no class, or one without a name.
    """
    if classes is None:
        return None
    found = {str(k): [v] if isinstance(v, str) else [str(n) for n in v] for k, v in classes.items()}
    if not found or not all(found.values()):
        raise UserError(f"evaluation {name!r}: give evals.{name}.classes at least one class, each with a name")
    return found


def match_classes(name: str, classes: dict[str, list[str]] | None, labels: Sequence[str]) -> dict[str, list[str]]:
    """The configured classes; where there are none, the labels of the data by their own names, sorted.

    Raises:
        UserError: the data has a label that is no configured class.
    """
    present = sorted(set(labels))
    if classes is None:
        return {label: [label] for label in present}
    if unknown := [label for label in present if label not in classes]:
        raise UserError(
            f"evaluation {name!r}: the data has labels {_names(unknown)} that are no configured class "
            f"(configured: {_names(list(classes))}; in the data: {_names(present)}): "
            f"mend evals.{name}.classes, or leave those samples out by a filter"
        )
    return classes


def _names(labels: list[str], most: int = 12) -> str:
    return ", ".join(map(repr, labels[:most])) + (f" and {len(labels) - most} more" if len(labels) > most else "")


def _example(found: Collected, names: list[str], logits: np.ndarray, i: int) -> Example:
    odds = np.exp(logits[i] - logits[i].max())
    guesses = [(names[c], float(odds[c] / odds.sum())) for c in np.argsort(-logits[i], kind="stable")[:3]]
    return Example(found.keys[i], found.thumbnails[i], found.labels[i], guesses)


def _showcase(found: Collected, names: list[str], outcomes: ClassificationOutcomes) -> Showcase:
    logits, labels = outcomes.logits, outcomes.labels

    def shown(places: Sequence[int]) -> list[Example]:
        return [_example(found, names, logits, i) for i in places]

    return Showcase(
        right=shown(surest(logits, labels, right=True)),
        wrong=shown(surest(logits, labels, right=False)),
        confused=[
            Confusion(names[c.truth], names[c.said], c.count, shown(c.places)) for c in confusions(logits, labels)
        ],
    )
