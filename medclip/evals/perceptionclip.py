"""Zero-shot classification that infers circumstances first (`infer.perceptionclip`), beside what it is to improve on.

Beside the usual metrics stand those of plain zero-shot (`plain_…`, the template without attributes) and of the average
of all states' texts (`averaged_…`, prompt ensembling). Where samples say what an attribute truly is, the worst group is
given for each way, a group being a class with one value of one attribute, and how often the attribute is inferred
right. Groups of few samples are left out, since the worst of many small ones says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from medclip.evals import metrics as m
from medclip.evals.calibration import probabilities, reliability
from medclip.evals.classification import ClassificationOutcomes, classification_result, match_classes, parse_classes
from medclip.evals.collect import collect
from medclip.evals.result import Advance, EvalData, Result, Role
from medclip.infer.perceptionclip import Variant, compose, marginal, parse_factors, perception, states
from medclip.infer.zeroshot import fill, own_logit_scale
from medclip.types import DualEncoder, UserError


@dataclass(frozen=True)
class PerceptionOutcomes(ClassificationOutcomes):
    """`logits` are log p(y | x); beside them those of other ways, groups, and which attributes were inferred right."""

    others: dict[str, Float[np.ndarray, "n c"]]
    cells: list[Int[np.ndarray, " n"]]  # of each attribute: group of each sample, -1 where it is in none
    inferred: dict[str, Float[np.ndarray, " n"]]  # attribute -> 1 right, 0 wrong, NaN not known

    def values(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, " b"]]:
        """Every metric under each row of sample weights."""
        found = super().values(weights)
        ways = {"": self.logits} | {f"{name}_": logits for name, logits in self.others.items()}
        for way, logits in ways.items():
            if self.cells:
                found[f"{way}worst_group_accuracy"] = worst_group(logits.argmax(1) == self.labels, self.cells, weights)
            if way:
                table = m.confusion(self.labels, logits.argmax(axis=1), logits.shape[1], weights)
                found[f"{way}balanced_accuracy"] = m.macro(m.class_recall(table))
        for name, right in self.inferred.items():
            known = ~np.isnan(right)
            found[f"inferred_{name}"] = m.weighted_mean(right[known], weights[:, known])
        return found


def worst_group(
    right: np.ndarray, cells: Sequence[Int[np.ndarray, " n"]], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, " b"]:
    """The lowest accuracy over the groups that have weight; samples of group -1 are in none. NaN without any."""
    each = [m.weighted_mean(right[own == c], weights[:, own == c]) for own in cells for c in np.unique(own[own >= 0])]
    if not each:
        return np.full(len(weights), np.nan)
    table = np.stack(each, axis=1)
    return np.where(np.isnan(table).all(axis=1), np.nan, np.where(np.isnan(table), np.inf, table).min(axis=1))


class PerceptionClassification:
    """Classify images given what is inferred of their circumstances.

    Args:
        data: samples with a label each; those without are counted as skipped.
        name: of the evaluation, as reports and messages call it.
        factors: attribute -> value -> description, or several; "" says nothing ("not sure").
        classes: label in the data -> name, or several names, to use in prompts; None: the labels themselves.
        template: one prompt with `{c}` or `{}` where the name goes; the attributes come after it.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
        generic: a word for any class, for `variant` without_y.
        variant: with_y (ClassAttr) or without_y (PureAttr): how attributes are inferred.
        temperature: of the attributes' probabilities.
        attributes: attribute -> field of the metadata that says its true value, named as in `factors`; {} for none.
        least: samples of a group that counts as one.

    Raises:
        UserError: a template without a place for the name, no factors, attributes that are no factors, or a temperature
            that is none.
    """

    def __init__(
        self,
        data: EvalData,
        *,
        name: str,
        factors: Mapping[str, Mapping[str, str | Sequence[str]]],
        classes: Mapping[str, str | Sequence[str]] | None = None,
        template: str = "a photo of {c}.",
        role: Role = "domain",
        generic: str = "object",
        variant: Variant = "with_y",
        temperature: float = 1.0,
        attributes: Mapping[str, str] | None = None,
        least: int = 10,
    ) -> None:
        self.data, self.name = data, name
        self.role: Role = role
        fill(template, "")
        self.factors = parse_factors(factors, f"evals.{name}.factors")
        self.states = states(self.factors)
        self.classes = parse_classes(name, classes)
        self.attributes = dict(attributes or {})
        if unknown := sorted(set(self.attributes) - set(self.factors)):
            raise UserError(
                f"evals.{name}.attributes: {unknown[0]} is none of the factors ({', '.join(self.factors)}): name those"
            )
        if not isinstance(temperature, int | float) or not temperature > 0:
            raise UserError(f"evals.{name}.temperature={temperature}: give a number above 0")
        self.template, self.generic, self.temperature, self.least = template, generic, float(temperature), least
        self.variant: Variant = variant

    @torch.inference_mode()
    def __call__(
        self, clip: DualEncoder, *, batch_size: int = 64, workers: int = 0, advance: Advance = lambda done: None
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: no labelled sample, labels that are no configured class, or an unknown variant.
        """
        found = collect(
            clip, self.data, self.name, need="label", batch_size=batch_size, workers=workers, advance=advance
        )
        classes = match_classes(self.name, self.classes, found.labels)
        place = {label: i for i, label in enumerate(classes)}
        labels = np.array([place[label] for label in found.labels])
        scale = own_logit_scale(clip)

        def built(known: Any) -> Any:
            return perception(
                clip,
                classes,
                self.template,
                known,
                generic=self.generic,
                variant=self.variant,
                temperature=self.temperature,
                scale=scale,
            )

        seeing, plain = built(self.states), built(states({"": {"": [""]}}))
        features = found.features.double()
        log_states = seeing.log_states(features)
        averaged = torch.nn.functional.normalize(seeing.joint.mean(dim=0), dim=-1).double()
        logits = seeing.given(features, log_states).numpy()
        true = {factor: self._true(found.raw, field) for factor, field in self.attributes.items()}
        outcomes = PerceptionOutcomes(
            found.keys,
            found.groups,
            labels,
            logits,
            {
                "plain": plain.log_classes(features).numpy(),
                "averaged": (scale * features @ averaged.T).numpy(),
            },
            [_cells(labels, values, self.least) for values in true.values()],
            {factor: self._right(log_states, factor, values) for factor, values in true.items()},
        )
        result = classification_result(
            "perceptionclip",
            self.role,
            found,
            outcomes,
            classes,
            reliability(probabilities(logits), labels, scale),
            templates=[compose(self.template, "{c}", text) for state in self.states for text in state.texts],
        )
        even = 1 / len(classes)
        chance = {f"{way}_balanced_accuracy": even for way in outcomes.others}
        chance |= {f"inferred_{factor}": 1 / len(self.factors[factor]) for factor in true}
        return replace(result, chance=result.chance | chance)

    def _true(self, raw: Sequence[Mapping[str, Any]], field: str) -> list[str | None]:
        values = [_lookup(own, field) for own in raw]
        if all(value is None for value in values):
            raise UserError(f"evals.{self.name}.attributes: no sample has the field {field!r}")
        return values

    def _right(self, log_states: torch.Tensor, factor: str, values: Sequence[str | None]) -> np.ndarray:
        """1 where the likeliest value is the true one; NaN where that is not known, or none of the values."""
        by_value = marginal(log_states, self.states, list(self.factors).index(factor))
        names = list(by_value)
        said = torch.stack(list(by_value.values()), dim=1).argmax(dim=1).tolist()
        return np.array(
            [np.nan if v not in by_value else float(names[i] == v) for i, v in zip(said, values, strict=True)]
        )


def _cells(labels: Int[np.ndarray, " n"], values: Sequence[str | None], least: int) -> Int[np.ndarray, " n"]:
    """A number for each class with each value; -1 where that is not known, or of fewer than `least` samples."""
    pairs = list(zip(labels.tolist(), values, strict=True))
    counts = Counter(pairs)
    place = {pair: i for i, pair in enumerate(counts)}
    return np.array([-1 if p[1] is None or counts[p] < least else place[p] for p in pairs])


def _lookup(raw: Any, path: str) -> str | None:
    for name in path.split("."):
        raw = raw.get(name) if isinstance(raw, Mapping) else None
    return None if raw is None else str(raw)
