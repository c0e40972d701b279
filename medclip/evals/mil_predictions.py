"""What was said of each slide, as a table for one's own analysis.

Columns: slide, fold (empty for a single model), label, predicted, and the probability of each class (several findings:
`|` between them); for survival time, event, risk. Last the AUROC of attention against the slide's region, where there
are regions. Patients are not written.
"""

from __future__ import annotations

import csv
import io

import numpy as np

from medclip.evals.mil_outcomes import LOCATED, MilOutcomes
from medclip.evals.vqa_predictions import plain


def table(outcomes: MilOutcomes) -> str:
    """The text of the table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    survival, several = outcomes.target == "survival", len(np.unique(outcomes.fold)) > 1
    regions = not np.isnan(outcomes.located).all()
    said = ["time", "event", "risk"] if survival else ["label", "predicted", *outcomes.classes]
    writer.writerow(["slide", "fold", *map(plain, said), *([LOCATED] if regions else [])])
    for i, key in enumerate(outcomes.keys):
        scores = [f"{score:.6g}" for score in outcomes.scores[i]]
        if survival:
            cells = [f"{outcomes.time[i]:g}", f"{outcomes.event[i]:g}", *scores]
        else:
            cells = [*_names(outcomes, i), *scores]
        fold = str(outcomes.fold[i]) if several else ""
        located = "" if np.isnan(outcomes.located[i]) else f"{outcomes.located[i]:.6g}"
        writer.writerow([plain(key), fold, *cells, *([located] if regions else [])])
    return text.getvalue()


def _names(outcomes: MilOutcomes, i: int) -> list[str]:
    names = outcomes.classes
    if outcomes.target != "multilabel":
        return [plain(names[outcomes.truth[i]]), plain(names[outcomes.said[i]])]
    picked = (outcomes.labels[i] == 1, outcomes.scores[i] >= 0.5)
    return [plain("|".join(name for name, own in zip(names, row, strict=True) if own)) for row in picked]
