"""Area under the ROC curve, finding by finding; a finding with one value only has none, and counts as none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from sklearn.metrics import roc_auc_score


def auroc_by_class(
    scores: Float[np.ndarray, "n c"], labels: Float[np.ndarray, "n c"], names: Sequence[str]
) -> dict[str, float]:
    """AUROC of each class whose known labels (0 or 1; NaN is unknown) have both values; others are not in it.

    The chest X-ray recipe's own code (arXiv:2210.12843) takes 0 for such a class, and the mean with it.
    """
    found = {}
    for column, name in enumerate(names):
        known = np.isfinite(labels[:, column])
        if len(np.unique(labels[known, column])) == 2:
            found[name] = float(roc_auc_score(labels[known, column], scores[known, column]))
    return found
