"""What is to be told of a bag: one of several classes, one of ordered classes, several at once, or a time to an event.

| target | `label` of a bag |
|---|---|
| classes | (c,) 1 for its class |
| ordinal | (c - 1,) 1 for each class that it is above: cumulative (Frank & Hall 2001) |
| multilabel | (c,) 1 present, 0 absent, NaN not known |
| survival | (bins,) 1 for the bin of its time; the bins are those of `data.labels.bins` |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as made
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float32

from medclip.data.bad import BadSample
from medclip.data.filters import lookup
from medclip.data.labels import LabelRule
from medclip.phantoms.bags import CLASSES
from medclip.types import UserError

KINDS = ("classes", "ordinal", "multilabel", "survival")
_KEYS = ("names", "field", "values", "separator", "columns", "thresholds", "time", "event", "bins")


@dataclass(frozen=True)
class Truth:
    """Of one bag.

    Args:
        label: float32 as in the module's table; empty for survival, whose bins training decides.
        shown: class, list of classes, or None (survival), for reports.
        stratum: whole number that splits keep in proportion, and that balancing goes by.
        time: until the event, or until the last that is known; NaN for other targets.
        event: 1 seen, 0 censored; NaN for other targets.
    """

    label: Float32[np.ndarray, " c"]
    shown: str | list[str] | None
    stratum: int
    time: float = math.nan
    event: float = math.nan

    def same(self, other: Truth) -> bool:
        """Whether both say the same, unknown labels included."""
        return (
            np.array_equal(self.label, other.label, equal_nan=True)
            and np.array_equal([self.time, self.event], [other.time, other.event], equal_nan=True)
        )  # fmt: skip


@dataclass(frozen=True)
class Target:
    """How truth is read from a row of the table.

    Args:
        kind: classes, ordinal, multilabel or survival.
        names: the classes; of survival, the bins.
        rule: of labels; None for survival and thresholds.
        field: column of the number that thresholds cut, or of the class.
        thresholds: ascending; empty without.
        time: column of the time.
        event: column of the event.
        values: of the event: {what the column says: 0 or 1}.
        edges: inner edges of the bins; empty where the training part decides.
    """

    kind: str
    names: tuple[str, ...]
    rule: LabelRule | None = None
    field: str = "label"
    thresholds: tuple[float, ...] = ()
    time: str = "time"
    event: str = "event"
    values: Mapping[str, float] = made(default_factory=dict)
    edges: tuple[float, ...] = ()

    @classmethod
    def parse(cls, kind: str, labels: Mapping[str, Any]) -> Target:
        """From `data.target` and `data.labels`, whose `names` are given.

        Raises:
            UserError: an unknown key or value.
        """
        if kind not in KINDS:
            raise UserError(f"data.target is {kind!r}: choose of {', '.join(KINDS)}")
        if unknown := set(labels) - set(_KEYS):
            raise UserError(f"data.labels has unknown keys {sorted(map(str, unknown))}: use {', '.join(_KEYS)}")
        names = tuple(map(str, labels.get("names") or ()))
        where = str(labels.get("field") or "label")
        if kind == "survival":
            events = {str(key): value for key, value in (labels.get("values") or {}).items()}
            if not all(value in (0, 1) for value in events.values()):
                raise UserError(f"data.labels.values is {events!r}: for target=survival write {{Dead: 1, Alive: 0}}")
            time, event = (str(labels.get(key) or key) for key in ("time", "event"))
            names = names or bin_names(labels.get("bins", 4))
            return cls(kind, names, time=time, event=event, values=events, edges=edges_of(labels.get("bins", 4)))
        if len(set(names)) < len(names) or len(names) < (1 if kind == "multilabel" else 2):
            least = "one class or more" if kind == "multilabel" else "two classes or more"
            raise UserError(f"data.labels.names is {list(names)}: data.target={kind} needs {least}, each named once")
        if labels.get("thresholds") is not None:
            cuts = _cuts("thresholds", labels["thresholds"])
            if kind == "multilabel" or len(cuts) + 1 != len(names):
                raise UserError(
                    f"data.labels.thresholds has {len(cuts)} cuts, data.labels.names {len(names)} classes: give one "
                    "cut fewer than classes, with data.target=classes or ordinal"
                )
            return cls(kind, names, field=where, thresholds=cuts)
        if kind == "multilabel" and labels.get("columns"):
            columns = labels["columns"] if isinstance(labels["columns"], Mapping) else None
            config = {"names": names, "from": "columns", "columns": columns}
            rule = LabelRule.parse(config | {"uncertain": "ignore", "empty": "ignore"})
            return cls(kind, names, rule=rule, field=where)
        config = {"names": names, "field": where, "values": labels.get("values") or None}
        several = {"from": "list", "separator": labels.get("separator"), "empty": "zeros"}
        rule = LabelRule.parse(config | (several if kind == "multilabel" else {"from": "class"}))
        return cls(kind, names, rule=rule, field=where)

    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        if self.kind == "survival":
            return self.time, self.event
        return self.rule.columns if self.rule is not None and self.rule.columns else (self.field,)

    def of(self, row: Mapping[str, Any]) -> Truth:
        """The truth of a row.

        Raises:
            BadSample: it says none, or nothing that is allowed.
        """
        if self.kind == "survival":
            return self._survival(row)
        if self.rule is None:
            place = int(np.searchsorted(self.thresholds, _number(row, self.field), side="right"))
            return self._one(place)
        label = self.rule.vector(row)
        if self.kind == "multilabel":
            if np.isnan(label).all():
                raise BadSample("no label", "none of its labels is known")
            return Truth(label, [name for name, value in zip(self.names, label, strict=True) if value == 1], 0)
        if np.isnan(label).any():
            raise BadSample("no label", f"{self.field} is empty")
        places = np.flatnonzero(label)
        if len(places) != 1:
            raise BadSample("bad label", f"{self.field} names {len(places)} classes, not one")
        return self._one(int(places[0]))

    def _one(self, place: int) -> Truth:
        classes = np.arange(len(self.names))
        label = classes == place if self.kind == "classes" else classes[:-1] < place
        return Truth(label.astype(np.float32), self.names[place], place)

    def _survival(self, row: Mapping[str, Any]) -> Truth:
        time = _number(row, self.time)
        said = lookup(row, self.event)
        event = self.values.get(str(said)) if self.values else _number(row, self.event)
        if event not in (0, 1):
            raise BadSample("bad label", f"{self.event} is {said!r}, not 1 or 0: say data.labels.values={{Dead: 1, …}}")
        if time < 0:
            raise BadSample("bad label", f"{self.time} is {time:g}")
        return Truth(np.zeros(0, np.float32), None, int(event), time, float(event))


def with_strata(truths: Sequence[Truth], target: Target) -> list[int]:
    """What splits keep in proportion: class, the rarest label that is present, or event and third of the time."""
    if target.kind == "multilabel" and truths:
        present = np.stack([truth.label for truth in truths]) == 1
        rare_first = np.argsort(present.sum(axis=0), kind="stable")
        return [int(next((k for k in rare_first if row[k]), len(target.names))) for row in present]
    if target.kind == "survival" and truths:
        cuts = np.quantile([truth.time for truth in truths], [1 / 3, 2 / 3])
        return [truth.stratum * 3 + int(np.searchsorted(cuts, truth.time, side="right")) for truth in truths]
    return [truth.stratum for truth in truths]


def time_bins(truths: Sequence[Truth], bins: int) -> tuple[float, ...]:
    """Inner edges of the bins: quantiles of the uncensored times (as Chen et al. 2021, arXiv:2107.10859 have it).

    Raises:
        UserError: there are too few events.
    """
    times = [truth.time for truth in truths if truth.event == 1]
    if bins == 1:
        return ()
    edges = np.quantile(times, np.linspace(0, 1, bins + 1)[1:-1]) if len(times) >= bins else np.zeros(bins)
    if len(times) < bins or len(np.unique(edges)) < bins - 1:
        raise UserError(
            f"the training part has {len(times)} events at {len(set(times))} times, too few for "
            f"data.labels.bins={bins}: lower it, or give the inner edges: data.labels.bins=[12,24,60]"
        )
    return tuple(map(float, edges))


def bin_label(time: float, edges: Sequence[float]) -> Float32[np.ndarray, " bins"]:
    """1 for the bin [edge, next edge) that a time lies in."""
    label = np.zeros(len(edges) + 1, np.float32)
    label[int(np.searchsorted(edges, time, side="right"))] = 1
    return label


def edges_of(bins: Any) -> tuple[float, ...]:
    """The edges that `data.labels.bins` gives, () where it is a number of bins."""
    if isinstance(bins, bool) or not isinstance(bins, int | Sequence) or isinstance(bins, str):
        raise UserError(f"data.labels.bins is {bins!r}: give a number of bins, or their inner edges")
    if isinstance(bins, int):
        if bins < 1:
            raise UserError(f"data.labels.bins is {bins}: give 1 (no bins, for a Cox risk) or more")
        return ()
    return _cuts("bins", bins)


def bin_names(bins: Any) -> tuple[str, ...]:
    """What the bins are called."""
    edges = edges_of(bins)
    return tuple(f"bin {k}" for k in range(1, (len(edges) + 1 if edges else bins) + 1))


def class_names(
    features: Any = None,
    table: str | None = None,
    phantoms: Mapping[str, Any] | None = None,
    target: str = "classes",
    field: str = "label",
    values: Mapping[str, Any] | None = None,
    separator: str | None = "|",
    thresholds: Sequence[float] | None = None,
    bins: Any = 4,
) -> list[str]:
    """The classes that a table has, in the order of their names (of numbers: by size); what a config gives the model.

    Args:
        features: where `table` is None, the folder whose index.parquet it is.
        table: of slides.
        phantoms: generated bags instead of both.
        target: classes, ordinal, multilabel or survival.
        field: column of the class.
        values: {what the column says: class}, which are then the classes.
        separator: between the classes of a slide, for multilabel.
        thresholds: cuts of a number.
        bins: of survival.

    Raises:
        UserError: the table has no such column, or the classes have no order that is known.
    """
    if target not in KINDS:
        raise UserError(f"data.target is {target!r}: choose of {', '.join(KINDS)}")
    if target == "survival":
        return list(bin_names(bins))
    if phantoms is not None:
        return list(CLASSES[target])
    if thresholds is not None:
        cuts = _cuts("thresholds", thresholds)
        inner = [f"{low:g} to {high:g}" for low, high in pairwise(cuts)]
        return [f"under {cuts[0]:g}", *inner, f"{cuts[-1]:g} or more"]
    from medclip.data.bag_table import table_of  # here: it reads targets

    said: dict[str, None] = {}
    rows = table_of(features, table, {field})
    for row in rows:
        text = lookup(row, field)
        parts = str(text).split(separator) if target == "multilabel" and separator else [str(text)]
        said |= dict.fromkeys(part.strip() for part in parts if text is not None and part.strip())
    if values:
        named = [name for value in values.values() for name in ([value] if isinstance(value, str) else value)]
        said = dict.fromkeys([*map(str, named), *(name for name in said if name not in map(str, values))])
    if not said:
        there = ", ".join(map(str, list(rows[0])[:12])) if rows else "no row"
        raise UserError(f"data.table has no class in the column {field!r} (it has {there}): set data.labels.field")
    if len(said) > 200:
        raise UserError(
            f"data.labels.field={field} has {len(said)} different values: name the classes, data.labels.names"
        )
    if all(_is_number(name) for name in said):
        return sorted(said, key=float)
    if target == "ordinal":
        raise UserError(
            f"data.target=ordinal: say the order of the classes, data.labels.names=[{', '.join(sorted(said))}]"
        )
    return sorted(said)


def _number(row: Mapping[str, Any], name: str) -> float:
    value = lookup(row, name)
    if value is None or value == "":
        raise BadSample("no label", f"{name} is empty")
    if not _is_number(value):
        raise BadSample("bad label", f"{name} is {str(value)[:40]!r}, no number")
    return float(value)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _cuts(name: str, values: Any) -> tuple[float, ...]:
    fits = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    cuts = tuple(float(value) if _is_number(value) else math.nan for value in values) if fits else ()
    if not cuts or not all(low < high for low, high in pairwise(cuts)) or math.isnan(cuts[0]):
        raise UserError(f"data.labels.{name} is {values!r}: give ascending numbers")
    return cuts
