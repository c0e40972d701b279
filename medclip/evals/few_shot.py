"""Few shots: how much a handful of labelled images a class adds to prompts.

For each number of shots, several draws; each draw learns twice, by a linear probe (see `linear_probe`) and by
Tip-Adapter (see `infer.tip`), and is judged on the same samples. Shots of a class come from as many groups (patients)
as there are, one each before a second. In every draw a quarter of the training groups gives no shots: of it up to four
samples a class, and no more than there are shots, choose the probe's penalty and Tip-Adapter's alpha and beta (so many
has CoOp, Zhou et al. 2022, arXiv:2109.01134); nothing is chosen on judged samples. With one shot that is one validation
sample a class: the choice is poor, and the spread over draws says so.

Metrics are balanced accuracies, means over the draws; their bootstrap resamples judged groups, while the standard
deviation over draws (in the details) tells what the choice of shots does. Draws depend on labels and groups alone, so
that every checkpoint learns from the same images.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from medclip.evals.classification import parse_classes
from medclip.evals.linear_probe import choose_strength, fit, logits
from medclip.evals.metrics import macro
from medclip.evals.probe_sets import Labelled, SetsOf
from medclip.evals.result import Advance, EvalData, FewShotDetails, Result, Role, ShotRow
from medclip.infer.tip import Cache, choose, tip_logits
from medclip.infer.zeroshot import LOGIT_SCALE, ensemble, fill, prompt_features
from medclip.types import DualEncoder, UserError

MOST_VALIDATION = 4  # samples a class
FOLDS = 4  # one of which gives no shots
METHODS = ("probe", "tip")
ZERO_SHOT = "zeroshot_balanced_accuracy"


def metric(method: str, shots: int) -> str:
    return f"{method}_balanced_accuracy@{shots}"


@dataclass(frozen=True)
class FewShotOutcomes:
    """Which samples each method got right, in each draw."""

    keys: list[str]
    groups: list[str]
    labels: Int[np.ndarray, " n"]
    right: dict[str, Bool[np.ndarray, "draws n"]]  # by metric

    def values(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, " b"]]:
        """Balanced accuracy of every metric, averaged over its draws, under each row of sample weights."""
        return {name: own.mean(axis=1) for name, own in self.by_draw(weights).items()}

    def by_draw(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, "b draws"]]:
        """The same for each draw."""
        right = np.concatenate(list(self.right.values())).astype(np.float64)
        recall = []
        for label in np.unique(self.labels):
            own = self.labels == label
            total = weights[:, own].sum(axis=1, keepdims=True)
            hits = weights[:, own] @ right[:, own].T
            recall.append(np.divide(hits, total, out=np.full(hits.shape, np.nan), where=total > 0))
        classes = np.stack(recall, axis=-1)  # (b, all draws, c)
        balanced = macro(classes.reshape(-1, classes.shape[-1])).reshape(classes.shape[:2])
        ends = np.cumsum([len(own) for own in self.right.values()])[:-1]
        return dict(zip(self.right, np.split(balanced, ends, axis=1), strict=True))


def draw(
    labels: Int[np.ndarray, " n"], groups: Sequence[str], count: int, rng: np.random.Generator
) -> Int[np.ndarray, " k"]:
    """Up to `count` samples of each class, one of a group before a second of any; more hold those of fewer."""
    order = rng.permutation(len(labels))
    picked: list[int] = []
    for label in np.unique(labels):
        rows = [int(i) for i in order if labels[i] == label]
        seen = Counter[str]()
        turns = []  # how many samples of its group come before each
        for i in rows:
            turns.append(seen[groups[i]])
            seen[groups[i]] += 1
        picked += [rows[place] for place in np.argsort(turns, kind="stable")[:count]]
    return np.array(picked, dtype=int)


class FewShot:
    """Classify images from k labelled ones a class, by a linear probe and by Tip-Adapter, beside prompts alone.

    Args:
        data: labelled samples that are judged; with `train` None a half of their groups, the others giving the shots.
        name: of the evaluation, as reports and messages call it.
        train: labelled samples that shots are drawn from, of other patients than `data`.
        validation: samples for choosing settings, as many as without: up to four a class, no more than there are shots;
            None takes them from a quarter of the training groups, which then give no shots.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
        classes: label in the data -> name, or several names, to use in prompts; None: the labels themselves.
        templates: prompts with `{c}` or `{}` where the name goes.
        shots: images a class.
        draws: of shots, for each number.
        seed: of draws and cuts by group.

    Raises:
        UserError: no template, shots that are no positive numbers, or no draw.
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
        templates: Sequence[str] = ("a photo of {c}.",),
        shots: Sequence[int] = (1, 2, 4, 8, 16),
        draws: int = 5,
        seed: int = 0,
    ) -> None:
        self.data, self.train, self.validation = data, train, validation
        self.name = name
        self.role: Role = role
        self.templates = list(templates)
        self.shots = sorted(set(shots))
        self.draws = draws
        self.seed = seed
        if not self.templates:
            raise UserError(f"evaluation {name!r}: evals.{name}.templates is empty: give at least one")
        for template in self.templates:
            fill(template, "")
        if not self.shots or not all(isinstance(k, int) and k > 0 for k in self.shots):
            raise UserError(f"evaluation {name!r}: evals.{name}.shots={list(shots)}: give numbers from 1 on")
        if not isinstance(draws, int) or draws < 1:
            raise UserError(f"evaluation {name!r}: evals.{name}.draws={draws}: give a number from 1 on")
        self.sets = SetsOf(name, data, train, validation, parse_classes(name, classes), seed)

    @torch.inference_mode()
    def __call__(
        self, clip: DualEncoder, *, batch_size: int = 64, workers: int = 0, advance: Advance = lambda done: None
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: see `SetsOf.embed`; too few groups to choose settings on.
        """
        sets = self.sets.embed(clip, batch_size, workers, advance)
        classes, test = sets.classes, sets.test
        prompts = LOGIT_SCALE * ensemble(prompt_features(clip, classes, self.templates)).double().numpy().T
        right: dict[str, list[np.ndarray]] = {metric(how, k): [] for how in METHODS for k in self.shots}
        samples: dict[int, list[int]] = {k: [] for k in self.shots}
        for number in range(self.draws):
            for k in self.shots:
                shots, validation = self._draw(sets.train, sets.validation, number, k)
                samples[k].append(len(shots.labels))
                for how, found in _answers(shots, validation, test, prompts).items():
                    right[metric(how, k)].append(found.argmax(axis=1) == test.labels)
        outcomes = FewShotOutcomes(
            sets.found.keys,
            sets.found.groups,
            test.labels,
            {ZERO_SHOT: ((test.features @ prompts).argmax(axis=1) == test.labels)[None]}
            | {name: np.stack(own) for name, own in right.items()},
        )
        by_draw = {n: own[0].tolist() for n, own in outcomes.by_draw(np.ones((1, len(test.labels)))).items()}
        most = self.shots[-1]
        return Result(
            task="few_shot",
            role=self.role,
            headline=(ZERO_SHOT, *(metric(how, most) for how in METHODS)),
            outcomes=outcomes,
            details=FewShotDetails(
                classes=classes,
                templates=self.templates,
                zero_shot=by_draw[ZERO_SHOT][0],
                rows=[
                    _row(how, k, statistics.mean(samples[k]), by_draw[metric(how, k)])
                    for how in METHODS
                    for k in self.shots
                ],
            ),
            chance=dict.fromkeys(outcomes.right, 1 / len(classes)),
            skipped=sets.found.skipped,
        )

    def _draw(self, train: Labelled, validation: Labelled | None, number: int, count: int) -> tuple[Labelled, Labelled]:
        """Shots, up to `count` a class, and validation samples of one draw."""
        rng = np.random.default_rng([self.seed, number])
        if validation is None:
            train, validation = self.sets.part_for("settings", train, FOLDS, int(rng.integers(1 << 31)))
        shots = train.take(draw(train.labels, train.groups, count, rng))
        if len(set(shots.labels)) < 2:
            raise UserError(
                f"evaluation {self.name!r}: once the part for choosing settings is held out, shots are of one class: "
                f"give evals.{self.name}.validation, or more training groups"
            )
        least = min(count, MOST_VALIDATION)
        return shots, validation.take(draw(validation.labels, validation.groups, least, rng))


def _answers(
    shots: Labelled, validation: Labelled, test: Labelled, prompts: Float[np.ndarray, "d c"]
) -> dict[str, Float[np.ndarray, "n c"]]:
    """Logits of the judged samples by each method."""
    classes = prompts.shape[1]
    probe = fit(shots, choose_strength(shots, validation, classes))
    cache = Cache(shots.features, shots.labels, classes)
    alpha, beta = choose(validation.features, validation.features @ prompts, validation.labels, cache)
    return {
        "probe": logits(probe, test.features, classes),
        "tip": tip_logits(test.features, test.features @ prompts, cache, alpha, beta),
    }


def _row(method: str, shots: int, samples: float, draws: list[float]) -> ShotRow:
    sd = statistics.stdev(draws) if len(draws) > 1 else float("nan")
    return ShotRow(method, shots, samples, draws, statistics.mean(draws), sd)
