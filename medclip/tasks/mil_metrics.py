"""How good a model of slides is on a whole validation set, by what its outputs mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import expit
from sklearn.metrics import cohen_kappa_score, recall_score

from medclip.tasks.auroc import auroc_by_class
from medclip.tasks.cindex import cindex


def classes_metrics(
    logits: Float[np.ndarray, "n c"], label: Float[np.ndarray, "n c"], classes: Sequence[str]
) -> dict[str, float]:
    """`auroc` (macro, one against the rest), `balanced_accuracy` and `accuracy` of one-hot labels without NaN; without
    `auroc` where there is one class alone."""
    truth, said = label.argmax(1), logits.argmax(1)
    # One against the rest needs the class's own probability: logits of two bags are on no common scale.
    shares = np.exp(logits - logits.max(1, keepdims=True))
    areas = auroc_by_class(shares / shares.sum(1, keepdims=True), label, classes)
    found = {"auroc": float(np.mean(list(areas.values())))} if areas else {}
    return found | {
        "balanced_accuracy": _balanced(truth, said),
        "accuracy": float((said == truth).mean()),
    }


def ordinal_metrics(logits: Float[np.ndarray, "n k"], label: Float[np.ndarray, "n k"]) -> dict[str, float]:
    """`kappa` (quadratic weights) and `balanced_accuracy` of the likeliest grade; labels are cumulative, without NaN.

    Without `kappa` where there is one grade alone.
    """
    truth = label.sum(1).astype(int)
    said = grades(expit(logits)).argmax(1)
    found = {"balanced_accuracy": _balanced(truth, said)}
    if len(np.unique(truth)) > 1:
        found["kappa"] = float(cohen_kappa_score(truth, said, weights="quadratic"))
    return found


def multilabel_metrics(
    logits: Float[np.ndarray, "n c"], label: Float[np.ndarray, "n c"], classes: Sequence[str]
) -> dict[str, float]:
    """`auroc`, the mean over the findings that have both values; none where no finding has."""
    areas = auroc_by_class(logits, label, classes)
    return {"auroc": float(np.mean(list(areas.values())))} if areas else {}


def survival_metrics(
    logits: Float[np.ndarray, "n k"], time: Float[np.ndarray, " n"], event: Float[np.ndarray, " n"]
) -> dict[str, float]:
    """`cindex`; none where no two slides can be compared."""
    found = cindex(risk_of(logits), time, event)
    return {} if found is None else {"cindex": found}


def grades(above: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n c"]:
    """Probability of each grade from those of being above each but the last."""
    edges = np.concatenate([np.ones((len(above), 1)), above, np.zeros((len(above), 1))], 1)
    return edges[:, :-1] - edges[:, 1:]


def risk_of(logits: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """One output is the risk; of hazards it is minus the sum of the chances to be without the event after each interval
    (Zadeh & Schmid 2021), which is minus the expected number of intervals lived through."""
    return logits[:, 0] if logits.shape[1] == 1 else -np.cumprod(expit(-logits), 1).sum(1)


def _balanced(truth: np.ndarray, said: np.ndarray) -> float:
    """Mean recall of the classes that there are (scikit-learn's `balanced_accuracy_score` warns of the others)."""
    return float(recall_score(truth, said, labels=np.unique(truth), average="macro"))
