"""Linear probe: logistic regression on the frozen image tower (Radford et al. 2021, arXiv:2103.00020, appendix A.3).

As there: scikit-learn's L-BFGS with at most 1,000 iterations and an L2 penalty, whose strength is searched from 1e-6 to
1e6 in steps of an eighth of a decade: seven strengths two decades apart first, then around the best with the step
halved until it is one. It is chosen on validation samples alone, a fifth of the training groups where there is no set
of its own, and the classifier is then fitted on both. Two things differ: features are the unit-norm ones that prompts
are compared with, not those before the projection, and the choice is by balanced accuracy, since medical classes are
uneven. On few validation samples many strengths come out equal; of these the one with the least cross-entropy is taken
(the strongest penalty would be next to no classifier, whose answer is the most frequent class).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from medclip.evals import metrics as m
from medclip.evals.calibration import probabilities, reliability
from medclip.evals.classification import ClassificationOutcomes, classification_result, parse_classes
from medclip.evals.probe_sets import Labelled, SetsOf
from medclip.evals.result import Advance, EvalData, Result, Role
from medclip.types import DualEncoder, UserError

STEPS = 8  # of C a decade
STRENGTHS = 10.0 ** (np.arange(12 * STEPS + 1) / STEPS - 6)  # C, the inverse of the penalty's weight
ITERATIONS = 1000
FOLDS = 5  # one of which is held out to choose C on


def fit(train: Labelled, strength: float) -> LogisticRegression:
    """scikit-learn's logistic regression with C = `strength`; that it may stop at 1,000 iterations is the protocol."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=ITERATIONS).fit(train.features, train.labels)


def logits(probe: LogisticRegression, features: Float[np.ndarray, "n d"], classes: int) -> Float[np.ndarray, "n c"]:
    """Whose softmax is the probe's probability; a class that it never saw gets none."""
    scores = probe.decision_function(features)
    if scores.ndim == 1:
        scores = np.stack([-scores / 2, scores / 2], axis=1)
    found = np.full((len(features), classes), -np.inf)
    found[:, probe.classes_] = scores
    return found


def _merit(found: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> tuple[float, float]:
    """Balanced accuracy over the classes that `labels` have, and minus the cross-entropy."""
    table = m.confusion(labels, found.argmax(axis=1), found.shape[1], np.ones((1, len(labels))))
    own = np.arange(len(labels)), labels
    return round(float(m.macro(m.class_recall(table))[0]), 12), float(log_softmax(found, axis=1)[own].mean())


def choose_strength(train: Labelled, validation: Labelled, classes: int) -> float:
    """C of the highest balanced accuracy on `validation`; of equal ones that of the least cross-entropy."""
    tried: dict[int, tuple[float, float]] = {}

    def best(places: Iterable[int]) -> int:
        for place in places:
            if place not in tried:
                probe = fit(train, STRENGTHS[place])
                tried[place] = _merit(logits(probe, validation.features, classes), validation.labels)
        return max(tried, key=lambda place: (*tried[place], -place))

    found, step = best(range(0, len(STRENGTHS), 2 * STEPS)), STEPS
    while step:
        found = best(place for place in (found - step, found + step) if 0 <= place < len(STRENGTHS))
        step //= 2
    return float(STRENGTHS[found])


class LinearProbe:
    """Classify images by a linear classifier that is trained on the checkpoint's features.

    Args:
        data: labelled samples that are judged; with `train` None a half of their groups, the others being learnt from.
        name: of the evaluation, as reports and messages call it.
        train: labelled samples to learn from, of other patients than `data`.
        validation: samples to choose the penalty on, of other patients again; None holds out a fifth of the training
            groups. Both are learnt from once it is chosen.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
        classes: label in the data -> name or names; None: the labels of the data.
        seed: of the cuts by group.
    """

    def __init__(
        self,
        data: EvalData,
        *,
        name: str,
        train: EvalData | None = None,
        validation: EvalData | None = None,
        role: Role = "domain",
        classes: Mapping[str, str | Sequence[str]] | None = None,
        seed: int = 0,
    ) -> None:
        self.data, self.train, self.validation = data, train, validation
        self.name = name
        self.role: Role = role
        self.seed = seed
        self.sets = SetsOf(name, data, train, validation, parse_classes(name, classes), seed)

    def __call__(
        self, clip: DualEncoder, *, batch_size: int = 64, workers: int = 0, advance: Advance = lambda done: None
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: see `SetsOf.embed`; too few groups to choose the penalty on.
        """
        sets = self.sets.embed(clip, batch_size, workers, advance)
        count = len(sets.classes)
        train, validation = self._parts(sets.train, sets.validation)
        probe = fit(train.join(validation), choose_strength(train, validation, count))
        scores = logits(probe, sets.test.features, count)
        return classification_result(
            "linear_probe",
            self.role,
            sets.found,
            ClassificationOutcomes(sets.found.keys, sets.found.groups, sets.test.labels, scores),
            sets.classes,
            reliability(probabilities(scores), sets.test.labels),
        )

    def _parts(self, train: Labelled, validation: Labelled | None) -> tuple[Labelled, Labelled]:
        if validation is not None:
            return train, validation
        left, held = self.sets.part_for("the penalty", train, FOLDS, self.seed)
        if len(set(left.labels)) < 2:
            raise UserError(
                f"evaluation {self.name!r}: what is left to learn from once the penalty's part is held out has a "
                f"single class: give evals.{self.name}.validation"
            )
        return left, held
