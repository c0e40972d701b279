"""What a source declares about its images beyond how they are read: labels, statistics, burned-in text, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from medclip.data.labels import LabelRule
from medclip.types import Batch, Preprocess, UserError

KEYS = ("labels", "statistics", "burned_in", "group")
Three = tuple[float, float, float]


@dataclass(frozen=True)
class Declared:
    """One source's declarations.

    Args:
        labels: how its labels are made; None where it has none (they are NaN beside other sources' labels).
        statistics: mean and standard deviation of its RGB channels on a 0..1 scale; None for the model's.
        burned_in: take DICOM pictures that say they hold burned-in annotation.
        group: field of what may be in one part only (the patient); None where that is not checked.
    """

    labels: LabelRule | None = None
    statistics: tuple[Three, Three] | None = None
    burned_in: bool = False
    group: str | None = None

    @classmethod
    def parse(
        cls, source: Mapping[str, Any], labels: Mapping[str, Any] | None = None, group: str | None = None
    ) -> Declared:
        """From a source's config.

        Args:
            source: of which `labels`, `statistics`, `burned_in` and `group` count.
            labels: for all sources; a source's own keys come first, `labels: false` says that it has none.
            group: for all sources; `group: false` leaves one out.

        Raises:
            UserError: an unknown key or value.
        """
        own = source.get("labels")
        config = None if own is False else {**(labels or {}), **_mapping("labels", own)}
        burned_in = source.get("burned_in", False)
        if not isinstance(burned_in, bool):
            raise UserError(f"burned_in is {burned_in!r}: choose true or false")
        by = group if source.get("group") is None else source["group"]
        if by is not None and by is not False and not isinstance(by, str):
            raise UserError(f"group is {by!r}: give the name of a field, or false")
        return cls(
            LabelRule.parse(config) if config else None, _statistics(source.get("statistics")), burned_in, by or None
        )


def declarations(
    sources: Sequence[Mapping[str, Any]], labels: Mapping[str, Any] | None = None, group: str | None = None
) -> list[Declared]:
    """Each source's declarations, and that their classes are the same.

    Raises:
        UserError: an unknown key or value, or sources whose classes differ.
    """
    found = [Declared.parse(source, labels, group) for source in sources]
    classes(found)
    return found


def classes(declared: Sequence[Declared]) -> tuple[str, ...]:
    """The classes of the labels, () without any.

    Raises:
        UserError: two sources have different ones.
    """
    names = list(dict.fromkeys(one.labels.names for one in declared if one.labels is not None))
    if len(names) > 1:
        raise UserError(
            f"sources have different labels.names, {list(names[0])} and {list(names[1])}: set data.labels.names once"
        )
    return names[0] if names else ()


class Rows:
    """Labels and statistics of a batch's rows: not known, and the model's, until they are set."""

    def __init__(self, rows: int, declared: Sequence[Declared], preprocess: Preprocess) -> None:
        names = classes(declared)
        self.label = np.full((rows, len(names)), np.nan, dtype=np.float32) if names else None
        three = np.array([preprocess.mean, preprocess.std], dtype=np.float32)
        self.statistics = np.tile(three[:, None], (1, rows, 1)) if any(one.statistics for one in declared) else None

    def set(self, row: int, label: Float32[np.ndarray, " c"] | None, declared: Declared) -> None:
        if self.label is not None and label is not None:
            self.label[row] = label
        if self.statistics is not None and declared.statistics is not None:
            self.statistics[:, row] = declared.statistics

    def into(self, batch: Batch) -> None:
        """Put what the sources declare into the batch: `label`, `mean` and `std`."""
        if self.label is not None:
            batch["label"] = torch.from_numpy(self.label)
        if self.statistics is not None:
            batch["mean"], batch["std"] = torch.from_numpy(self.statistics).unbind(0)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{name} of a source is {value!r}: give a mapping, or false")
    return value or {}


def _statistics(value: Any) -> tuple[Three, Three] | None:
    if value is None:
        return None
    try:
        mean, std = (np.broadcast_to(np.asarray(value[k], dtype=np.float64), 3) for k in ("mean", "std"))
        right = set(value) == {"mean", "std"} and (mean >= 0).all() and (mean <= 1).all() and (std > 0).all()
    except (KeyError, TypeError, ValueError):
        right = False
        mean = std = np.zeros(3)
    if not right or not (std <= 1).all():
        raise UserError(
            f"statistics is {value!r}: write {{mean: 0.5056, std: 0.252}} or three numbers each, on a 0..1 scale"
        )
    return _three(mean), _three(std)


def _three(values: np.ndarray) -> Three:
    red, green, blue = values.tolist()
    return red, green, blue
