"""From what a source says of a sample to a vector of labels: 1 present, 0 absent, NaN not known (no loss, no score).

    labels:
      names: [Atelectasis, Cardiomegaly, Edema]    # the classes, in the order of the vector
      from: columns                                # a column each: 1, 0, -1 (uncertain) or empty (CheXpert, MIMIC-CXR)
      columns: {Edema: edema_label}                # where a column is not called as its class
      uncertain: {Edema: ones, default: zeros}     # zeros | ones | ignore, for all or by class
      empty: zeros                                 # zeros | ignore

    labels: {names: [Effusion, Hernia], from: list, field: Finding Labels, separator: "|"}   # NIH ChestX-ray14
    labels: {names: [COVID-19], from: class, field: class, values: {positive: COVID-19, negative: []}}   # COVIDx

| key | meaning, for `list` and `class` |
|---|---|
| `field` | holds the names of the classes that are present: a text or a list; a class folder is `label` |
| `separator` | between names in a text (`list`: "\\|") |
| `values` | {what the field says: class, several, or [] for none}; "No Finding" is none unless it is a class |
| `unlabelled` | what the field says where nobody has looked: all labels are NaN |
| `other` | a name that is neither class nor value: `error` (a bad sample) or `zeros` (passed over) |
| `empty` | the field is empty: `ignore` (all NaN) or `zeros` |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from jaxtyping import Float32

from medclip.data.bad import BadSample
from medclip.data.filters import lookup
from medclip.data.raw import Source
from medclip.data.selection import missing_fields, there_are
from medclip.types import UserError

_POLICIES = {"zeros": 0.0, "ones": 1.0, "ignore": math.nan}
_KEYS = ("names", "from", "columns", "field", "separator", "values", "unlabelled", "other", "uncertain", "empty")


@dataclass(frozen=True)
class LabelRule:
    """How a source's labels are made; see the module's first lines.

    Args:
        names: the classes.
        columns: one for each class, or empty where one field lists the classes that are present.
        listing: the field that lists them.
        separator: in its text; None takes the whole text.
        values: what the field may say -> classes that this means.
        unlabelled: what the field says where nothing is known.
        strict: an unknown name makes a bad sample.
        uncertain: what -1 becomes, for each class: 0, 1 or NaN.
        empty: what an empty column or field becomes: 0 or NaN.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...] = ()
    listing: str = ""
    separator: str | None = None
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unlabelled: frozenset[str] = frozenset()
    strict: bool = True
    uncertain: tuple[float, ...] = ()
    empty: float = 0.0

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> LabelRule:
        """From a config.

        Raises:
            UserError: an unknown or missing key or value.
        """
        if not isinstance(config, Mapping):
            raise UserError(f"labels is {config!r}: write {{names: […], from: columns | list | class, …}}")
        if unknown := set(config) - set(_KEYS):
            raise UserError(f"labels has unknown keys {sorted(map(str, unknown))}: use {', '.join(_KEYS)}")
        names, kind = tuple(map(str, _listed(config.get("names")))), config.get("from")
        if not names or len(set(names)) < len(names):
            raise UserError(f"labels.names is {list(names)}: name each class once")
        if kind not in ("columns", "list", "class"):
            raise UserError(f"labels.from is {kind!r}: use columns, list or class")
        unfit = (
            ("field", "separator", "values", "unlabelled", "other") if kind == "columns" else ("columns", "uncertain")
        )
        if given := [key for key in unfit if config.get(key) is not None]:
            raise UserError(f"labels.{given[0]} does not go with labels.from={kind}")
        empty = config.get("empty") or ("zeros" if kind == "columns" else "ignore")
        if empty not in ("zeros", "ignore"):
            raise UserError(f"labels.empty is {empty!r}: use zeros or ignore")
        if kind == "columns":
            return cls(
                names,
                columns=_columns(names, config.get("columns") or {}),
                uncertain=_uncertain(names, config.get("uncertain")),
                empty=_POLICIES[empty],
            )
        if not config.get("field"):
            raise UserError(f"labels.from={kind} needs labels.field: the field that names the classes")
        other = config.get("other") or "error"
        if other not in ("error", "zeros"):
            raise UserError(f"labels.other is {other!r}: use error or zeros")
        return cls(
            names,
            listing=str(config["field"]),
            separator=str(config.get("separator") or "|") if kind == "list" else None,
            values=_values(names, config.get("values") or {}),
            unlabelled=frozenset(map(str, _listed(config.get("unlabelled")))),
            strict=other == "error",
            empty=_POLICIES[empty],
        )

    def vector(self, fields: Mapping[str, Any]) -> Float32[np.ndarray, " c"]:
        """The labels of one sample.

        Raises:
            BadSample: a value that is not allowed.
        """
        if self.columns:
            return np.array([self._value(fields, k) for k in range(len(self.names))], dtype=np.float32)
        found = self._present(lookup(fields, self.listing))
        if found is None:
            return np.full(len(self.names), math.nan, dtype=np.float32)
        return np.array([name in found for name in self.names], dtype=np.float32)

    def _value(self, fields: Mapping[str, Any], k: int) -> float:
        value = lookup(fields, self.columns[k])
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            return self.empty
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.inf
        if number == -1:
            return self.uncertain[k]
        if number not in (0, 1):
            raise BadSample("bad label", f"{self.columns[k]} is {_short(value)}, not 1, 0, -1 or empty")
        return number

    def _present(self, value: Any) -> set[str] | None:
        """The classes that are present; None where that is not known."""
        items = self._items(value)
        if not items:
            return None if math.isnan(self.empty) else set()
        if self.unlabelled & set(items):
            return None
        found: set[str] = set()
        for item in items:
            if (classes := self.values.get(item)) is not None:
                found.update(classes)
            elif self.strict:
                raise BadSample(
                    "bad label",
                    f"{self.listing} says {_short(item)}, which is neither in labels.names nor in labels.values",
                )
        return found

    def _items(self, value: Any) -> list[str]:
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = orjson.loads(value)
            except orjson.JSONDecodeError:
                raise BadSample("bad label", f"{self.listing} is {_short(value)}, no JSON list") from None
        if isinstance(value, str):
            value = value.split(self.separator) if self.separator else [value]
        if value is None:
            return []
        if isinstance(value, Mapping | float):
            raise BadSample("bad label", f"{self.listing} is {_short(value)}, not the names of classes")
        return [text for item in (value if isinstance(value, list) else [value]) if (text := str(item).strip())]

    def check(self, source: Source) -> None:
        """Refuse a source that lacks a column or field.

        Raises:
            UserError: none of its first samples has it.
        """
        if missing := missing_fields(source, self.columns or (self.listing,)):
            columns = ", ".join(map(repr, missing))
            raise UserError(f"source {source.name}: no label column {columns}; {there_are(source)}")


def _listed(value: Any) -> Iterable[Any]:
    if value is None:
        return ()
    return value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _columns(names: tuple[str, ...], given: Any) -> tuple[str, ...]:
    if not isinstance(given, Mapping) or not set(given) <= set(names):
        raise UserError(f"labels.columns is {given!r}: write {{CLASS: column}}, for some of {', '.join(names)}")
    return tuple(str(given.get(name, name)) for name in names)


def _uncertain(names: tuple[str, ...], given: Any) -> tuple[float, ...]:
    if given is None:
        given = "zeros"
    policies = dict(given) if isinstance(given, Mapping) else {"default": given}
    if not set(policies) <= {*names, "default"} or not all(p in _POLICIES for p in map(str, policies.values())):
        raise UserError(
            f"labels.uncertain is {given!r}: zeros, ones or ignore, or {{CLASS: one of these, default: one of these}}"
        )
    rest = policies.get("default", "zeros")
    return tuple(_POLICIES[policies.get(name, rest)] for name in names)


def _values(names: tuple[str, ...], given: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(given, Mapping):
        raise UserError(f"labels.values is {given!r}: write {{what the field says: CLASS, [CLASS, CLASS] or []}}")
    values = {"No Finding": ()} | {name: (name,) for name in names}
    for value, classes in given.items():
        values[str(value)] = tuple(map(str, _listed(classes)))
        if unknown := set(values[str(value)]) - set(names):
            raise UserError(f"labels.values names {sorted(unknown)}, but the classes are {', '.join(names)}")
    return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
