"""Each sample's labels and probabilities of a multi-label classification, as a table for one's own analysis.

`predictions-EVALUATION-CHECKPOINT.csv`: the sample's key, then for each class its label (1, 0, or empty where unknown)
and its probability (empty where the checkpoint does not know the class). Patients are not written.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

import numpy as np
from scipy.special import expit

from medclip.evals.multilabel_outcomes import MultiLabelOutcomes
from medclip.evals.run import Report


def predictions(report: Report) -> Iterator[tuple[str, str]]:
    """(file name, text) of each table."""
    for comparison in report.comparisons.values():
        for model, result in comparison.results.items():
            if isinstance(result.outcomes, MultiLabelOutcomes):
                words = (re.sub(r"[^\w.-]+", "-", word) for word in ("predictions", comparison.name, model))
                yield "-".join(words) + ".csv", table(result.outcomes)


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
