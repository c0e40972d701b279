"""How much of the accuracy needs the right image: the same questions with grey or another image in its place."""

from __future__ import annotations

from dataclasses import dataclass

from medclip.evals.bootstrap import Difference, Estimate, difference
from medclip.evals.compare import Comparison
from medclip.evals.vqa_outcomes import ACCURACIES

QUESTION_ONLY = "question only"
SHUFFLED = "image shuffled"


@dataclass(frozen=True)
class Without:
    """One accuracy of one checkpoint without the right image, and what the right image adds to it, paired."""

    estimate: Estimate
    added: Difference


def controls(comparison: Comparison, level: float) -> dict[str, dict[str, dict[str, Without]]]:
    """Checkpoint -> control -> accuracy -> what is left without the right image, and what that adds.

    The difference is over the same resamples as all intervals; its verdict is "gain" where the image helps beyond
    chance.

    Args:
        comparison: of questions about images.
        level: of the intervals.
    """
    rows = {row.metric: row for row in comparison.rows}
    found: dict[str, dict[str, dict[str, Without]]] = {}
    for model in comparison.results:
        found[model] = {}
        for control in (QUESTION_ONLY, SHUFFLED):
            for metric in ACCURACIES:
                left, whole = rows.get(f"{metric}:{control}"), rows[metric]
                if left is None:
                    continue
                values = (left.estimates[model].value, whole.estimates[model].value)
                added = difference(*values, left.draws.get(model), whole.draws.get(model), level)
                found[model].setdefault(control, {})[metric] = Without(left.estimates[model], added)
    return found
