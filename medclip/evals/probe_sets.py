"""What a probe learns from and what it is judged on: features of labelled samples, cut by patient.

Each image is embedded once a checkpoint. Who learns and who judges depends on the samples' labels and groups alone, so
every checkpoint gets the same parts.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.model_selection import StratifiedGroupKFold

from medclip.evals.classification import match_classes
from medclip.evals.collect import Collected, collect
from medclip.evals.result import Advance, EvalData
from medclip.types import DualEncoder, UserError


@dataclass(frozen=True)
class Labelled:
    """Unit-norm features, class numbers and groups of samples."""

    features: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    groups: list[str]

    def take(self, rows: Int[np.ndarray, " k"] | Bool[np.ndarray, " n"]) -> Labelled:
        return Labelled(self.features[rows], self.labels[rows], np.asarray(self.groups, dtype=object)[rows].tolist())

    def join(self, other: Labelled) -> Labelled:
        return Labelled(
            np.concatenate([self.features, other.features]),
            np.concatenate([self.labels, other.labels]),
            self.groups + other.groups,
        )


@dataclass(frozen=True)
class ProbeSets:
    """The parts, and the judged samples as they were found."""

    train: Labelled
    validation: Labelled | None
    test: Labelled
    found: Collected
    classes: dict[str, list[str]]


def hold_out(labels: Int[np.ndarray, " n"], groups: list[str], folds: int, seed: int) -> Bool[np.ndarray, " n"]:
    """Which samples are held out: about one in `folds` of every class, whole groups only.

    Raises:
        ValueError: there are too few groups to leave samples on both sides.
    """
    if len(set(groups)) < folds:
        raise ValueError(f"{len(set(groups))} groups cannot be cut into {folds} parts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a rare class is not in every part, which may be so
        cut = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
        _, rows = next(cut)
    held = np.zeros(len(labels), dtype=bool)
    held[rows] = True
    if not held.any() or held.all():
        raise ValueError("one side of the cut is empty")
    return held


@dataclass(frozen=True)
class SetsOf:
    """The sets of one probe, to be embedded by any checkpoint.

    Args:
        name: of the evaluation.
        data: samples that are judged; with `train` None a half of its groups, the other half being learnt from.
        train: samples that are learnt from, of other patients.
        validation: samples that settings are chosen on, of other patients again; None leaves it to the probe to hold
            out some of `train`.
        classes: label -> names; None: the labels that the data has.
        seed: of cuts by group.
    """

    name: str
    data: EvalData
    train: EvalData | None
    validation: EvalData | None
    classes: dict[str, list[str]] | None
    seed: int = 0

    def embed(self, clip: DualEncoder, batch_size: int, workers: int, advance: Advance) -> ProbeSets:
        """The parts as one checkpoint sees them.

        Raises:
            UserError: an empty part, a label that is no class, a class that nothing can be learnt of, a single class,
                or a group that is in two parts.
        """

        def found_in(part: str, data: EvalData, advance: Advance = lambda done: None) -> Collected:
            try:
                return collect(
                    clip, data, self.name, need="label", batch_size=batch_size, workers=workers, advance=advance
                )
            except UserError as error:
                raise UserError(str(error).replace(f"evals.{self.name}.data", f"evals.{self.name}.{part}")) from error

        parts = {"data": found_in("data", self.data, advance)}
        for part, data in (("train", self.train), ("validation", self.validation)):
            if data is not None:
                parts[part] = found_in(part, data)
        self._refuse_shared(parts)
        classes = match_classes(self.name, self.classes, [label for own in parts.values() for label in own.labels])
        found = parts["data"]
        test = _labelled(found, classes)
        if self.train is None:
            try:
                judged = hold_out(test.labels, test.groups, 2, self.seed)
            except ValueError as error:
                raise UserError(
                    f"evaluation {self.name!r}: {error}: give evals.{self.name}.train a set of its own, or more groups"
                ) from error
            train, test, found = test.take(~judged), test.take(judged), _part(found, np.flatnonzero(judged))
        else:
            train = _labelled(parts["train"], classes)
            found.skipped |= {f"{reason} (train)": n for reason, n in parts["train"].skipped.items()}
        there = np.bincount(train.labels, minlength=len(classes))
        if lacking := [label for label, count in zip(classes, there, strict=True) if not count]:
            raise UserError(
                f"evaluation {self.name!r}: nothing to learn {', '.join(map(repr, lacking))} from: leave such samples "
                f"out by a filter, and out of evals.{self.name}.classes, or mend evals.{self.name}.train"
            )
        if len(classes) < 2:
            raise UserError(f"evaluation {self.name!r} has a single class: mend evals.{self.name}.data.label")
        held = _labelled(parts["validation"], classes) if "validation" in parts else None
        return ProbeSets(train, held, test, found, classes)

    def part_for(self, choice: str, train: Labelled, folds: int, seed: int) -> tuple[Labelled, Labelled]:
        """What is left to learn from, and the part of `train` that something is chosen on; see `hold_out`.

        Args:
            choice: what is chosen, for messages.
            train: without a validation set of its own.
            folds: one of which is held out.
            seed: of the cut.

        Raises:
            UserError: there are too few groups.
        """
        try:
            held = hold_out(train.labels, train.groups, folds, seed)
        except ValueError as error:
            raise UserError(
                f"evaluation {self.name!r}: {error} to choose {choice} on: give evals.{self.name}.validation, or more "
                "training groups"
            ) from error
        return train.take(~held), train.take(held)

    def _refuse_shared(self, parts: dict[str, Collected]) -> None:
        of = {part: _named_groups(found) for part, found in parts.items()}
        seen = Counter(group for groups in of.values() for group in groups)
        if shared := [group for group, count in seen.items() if count > 1]:
            where = [f"evals.{self.name}.{part}" for part, groups in of.items() if shared[0] in groups]
            raise UserError(
                f"evaluation {self.name!r}: {len(shared)} groups (patients) are in more than one of its sets, the "
                f"first in {' and '.join(where)}: split by group, or the probe is judged on what it learnt"
            )


def _named_groups(found: Collected) -> set[str]:
    """Groups that the set names; a set without them numbers its samples, which says nothing of another set."""
    numbered = all(group.endswith(f":{key}") for group, key in zip(found.groups, found.keys, strict=True))
    return set() if numbered else set(found.groups)


def _labelled(found: Collected, classes: dict[str, list[str]]) -> Labelled:
    place = {label: i for i, label in enumerate(classes)}
    labels = np.array([place[label] for label in found.labels])
    return Labelled(found.features.double().numpy(), labels, list(found.groups))


def _part(found: Collected, rows: Int[np.ndarray, " k"]) -> Collected:
    lists = ("keys", "groups", "labels", "captions", "thumbnails", "raw")
    own: dict[str, Any] = {name: [getattr(found, name)[i] for i in rows] for name in lists}
    return Collected(found.features[rows], **own, skipped=dict(found.skipped))
