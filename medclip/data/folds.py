"""Training, validation and test parts of a cohort, with no patient in two of them.

Folds are scikit-learn's StratifiedGroupKFold: of k folds the `fold`-th is the test part, the one after it validation,
the others are for training; so over all folds each slide is in the test part once. They depend on the bags and on
`split_seed` alone: training and evaluation find the same ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from medclip.data.bag_table import Bag, Cohort
from medclip.data.bag_targets import with_strata
from medclip.data.filters import lookup
from medclip.data.shards import parse_json
from medclip.data.tables import table_rows
from medclip.types import UserError

PARTS = ("train", "val", "test")
Parts = dict[str, np.ndarray]  # part -> int64 numbers of bags, ascending
_KEYS = ("field", "table", "train", "val", "test", "fraction")


def split_cohort(
    cohort: Cohort,
    *,
    folds: int | None = 5,
    fold: int = 0,
    split_seed: int = 0,
    split: Mapping[str, Any] | None = None,
) -> Parts:
    """The three parts; bags that an official split does not name are in none.

    Args:
        cohort: whose bags.
        folds: how many there are.
        fold: which one is the test part, from 0.
        split_seed: of the folds.
        split: an official split instead: {field: column, train: value, val: value, test: value}, where `val` may be
            left out for {fraction: of the training part}; or {table: CLAM's splits_0.csv}.

    Raises:
        UserError: an option out of range, a patient in two parts, or a part with a single class.
    """
    if split is not None:
        parts = _official(cohort, split, split_seed)
    else:
        counts = {"folds": (folds, 3), "fold": (fold, 0), "split_seed": (split_seed, 0)}
        for name, (value, least) in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"data.{name} is {value!r}: give a whole number, {least} or more")
        assert folds is not None
        if fold >= folds:
            raise UserError(f"data.fold is {fold}: of data.folds={folds} the last one is {folds - 1}")
        pieces = _pieces(cohort, np.arange(len(cohort.bags)), folds, split_seed)
        test, val = pieces[fold], pieces[(fold + 1) % folds]
        rest = np.setdiff1d(np.arange(len(cohort.bags)), np.concatenate([test, val]))
        parts = {"train": rest, "val": val, "test": test}
    _check_patients(cohort.bags, parts)
    for name, numbers in parts.items():
        if len(numbers):
            _check_classes(cohort, name, numbers)
    return parts


def _pieces(cohort: Cohort, numbers: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    bags = [cohort.bags[i] for i in numbers]
    patients = np.array([bag.patient for bag in bags])
    if (count := len(np.unique(patients))) < folds:
        raise UserError(f"there are {count} patients, too few for {folds} folds: lower data.folds, or take more data")
    strata = np.array(with_strata([bag.truth for bag in bags], cohort.target))
    if np.unique(strata, return_counts=True)[1].max() < folds:
        strata = np.zeros_like(strata)  # too few of everything to be kept in proportion
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        return [numbers[test] for _, test in splitter.split(np.zeros(len(bags)), strata, patients)]


def _official(cohort: Cohort, split: Mapping[str, Any], seed: int) -> Parts:
    if not isinstance(split, Mapping) or set(split) - set(_KEYS) or ("field" in split) == ("table" in split):
        raise UserError(
            f"data.split is {split!r}: write {{field: split, train: train, val: val, test: test}} or "
            "{table: splits_0.csv}"
        )
    if "table" in split:
        names = _clam(Path(str(split["table"])).expanduser())
        known = {name: part for part, slides in names.items() for name in slides}
        part_of = [
            {part for file in bag.files for name in (file.slide, bag.key) if (part := known.get(name))}
            for bag in cohort.bags
        ]
    else:
        field = str(split["field"])
        said = {part: {str(v) for v in _listed(split.get(part))} for part in PARTS}
        if not any(lookup(bag.row, field) is not None for bag in cohort.bags):
            raise UserError(f"data.split.field={field}: data.table has no such column, or nothing in it")
        part_of = [
            {part for part, values in said.items() if str(lookup(bag.row, field)) in values} for bag in cohort.bags
        ]
    for bag, found in zip(cohort.bags, part_of, strict=True):
        if len(found) > 1:
            raise UserError(f"data.split has {bag.key} in {' and '.join(sorted(found))}: each slide is in one part")
    parts = {part: np.array([i for i, found in enumerate(part_of) if part in found], dtype=np.int64) for part in PARTS}
    if not len(parts["train"]) and not len(parts["test"]):
        values = sorted({str(lookup(bag.row, str(split.get("field")))) for bag in cohort.bags})[:6]
        raise UserError(f"data.split names none of the {len(cohort.bags)} slides (its field says {', '.join(values)})")
    if (fraction := split.get("fraction")) is not None:
        if not isinstance(fraction, int | float) or not 0 < fraction <= 0.5 or len(parts["val"]):
            raise UserError(
                f"data.split.fraction is {fraction!r}: give the share of training for validation, up to 0.5, and no val"
            )
        _check_patients(cohort.bags, parts)
        parts["val"] = _pieces(cohort, parts["train"], max(2, round(1 / fraction)), seed)[0]
        parts["train"] = np.setdiff1d(parts["train"], parts["val"])
    return parts


def _clam(path: Path) -> dict[str, set[str]]:
    """The parts of CLAM's splits_0.csv (a column a part) or splits_0_bool.csv (a row a slide)."""
    rows = [parse_json(raw) for raw in table_rows(path, None, {*PARTS, "Unnamed: 0", ""})]
    if not rows or not set(PARTS) & set(rows[0]):
        raise UserError(f"data.split.table {path} has no column train, val or test: give CLAM's splits_0.csv")
    truths = {"true": True, "false": False}
    values = [str(row.get(part, "")).lower() for row in rows for part in PARTS]
    if all(value in truths for value in values):
        index = next(iter(rows[0]))
        return {p: {str(row[index]) for row in rows if truths[str(row[p]).lower()]} for p in PARTS}
    return {p: {str(row[p]) for row in rows if row.get(p) not in (None, "")} for p in PARTS}


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _check_patients(bags: Sequence[Bag], parts: Parts) -> None:
    where: dict[str, tuple[str, str]] = {}
    for part, numbers in parts.items():
        for i in numbers:
            other, slide = where.setdefault(bags[i].patient, (part, bags[i].key))
            if other != part:
                raise UserError(
                    f"patient {bags[i].patient} is in {other} ({slide}) and in {part} ({bags[i].key}): a split must "
                    "keep a patient's slides together; mend data.split, or data.columns.patient"
                )


def _check_classes(cohort: Cohort, part: str, numbers: np.ndarray) -> None:
    """That something can be learned of a part, and measured on it."""
    truths = [cohort.bags[i].truth for i in numbers]
    target = cohort.target
    if target.kind == "survival":
        if not any(truth.event == 1 for truth in truths):
            raise UserError(
                f"the {part} part ({len(truths)} bags) has no event: choose another data.fold or fewer folds"
            )
        return
    labels = np.stack([truth.label for truth in truths])
    varied = [len(set(column[~np.isnan(column)].tolist())) > 1 for column in labels.T]
    if not any(varied):
        shown = truths[0].shown
        raise UserError(
            f"the {part} part has one class only ({shown}, {len(truths)} bags): choose another data.split_seed, fewer "
            "data.folds, or mend data.split"
        )
