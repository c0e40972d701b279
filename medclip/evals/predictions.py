"""Each sample's labels and predictions, as a table for one's own analysis: `predictions-EVALUATION-CHECKPOINT.csv`.

Of a multi-label classification: the sample's key, then for each class its label (1, 0, or empty where unknown) and its
probability (empty where the checkpoint does not know the class). Patients are not written. Of questions about images:
see `vqa_predictions`, of slides `mil_predictions`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

import numpy as np
from scipy.special import expit

from medclip.evals.mil_outcomes import MilOutcomes
from medclip.evals.mil_predictions import table as mil_table
from medclip.evals.multilabel_outcomes import MultiLabelOutcomes
from medclip.evals.run import Report
from medclip.evals.vqa_outcomes import VqaOutcomes
from medclip.evals.vqa_predictions import table as vqa_table


def predictions(report: Report) -> Iterator[tuple[str, str]]:
    """(file name, text) of each table."""
    for comparison in report.comparisons.values():
        for model, result in comparison.results.items():
            words = (re.sub(r"[^\w.-]+", "-", word) for word in ("predictions", comparison.name, model))
            if isinstance(result.outcomes, MultiLabelOutcomes):
                yield "-".join(words) + ".csv", table(result.outcomes)
            elif isinstance(result.outcomes, VqaOutcomes):
                yield "-".join(words) + ".csv", vqa_table(result.outcomes)
            elif isinstance(result.outcomes, MilOutcomes):
                yield "-".join(words) + ".csv", mil_table(result.outcomes)


def table(outcomes: MultiLabelOutcomes) -> str:
    """The text of one table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", *(column for name in outcomes.classes for column in (name, f"{name}: probability"))])
    for key, labels, odds in zip(outcomes.keys, outcomes.labels, outcomes.log_odds, strict=True):
        cells = [(_label(label), _probability(score)) for label, score in zip(labels, odds, strict=True)]
        writer.writerow([key, *(cell for pair in cells for cell in pair)])
    return text.getvalue()


def _label(value: float) -> str:
    return "" if np.isnan(value) else str(int(value))


def _probability(log_odds: float) -> str:
    return "" if np.isnan(log_odds) else f"{expit(log_odds):.6g}"
