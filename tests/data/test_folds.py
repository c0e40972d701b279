"""Folds: no patient in two parts, every slide tested once, proportions kept, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from medclip.data.bag_files import GeneratedBag
from medclip.data.bag_table import Bag, Cohort
from medclip.data.bag_targets import Target
from medclip.data.folds import Parts, split_cohort
from medclip.phantoms.bags import BagRecipe
from medclip.types import UserError

RECIPE = BagRecipe(slides=1, patches=4, dim=2)


def cohort(labels: list[str], patients: list[Any] | None = None, splits: list[str] | None = None) -> Cohort:
    rule = Target.parse("classes", {"names": sorted(set(labels) | {"x", "y"})})
    patients = patients or [i // 2 for i in range(len(labels))]
    bags = [
        Bag(f"s{i}", f"p{p}", (GeneratedBag(RECIPE, 0),), rule.of({"label": one}), {"split": s})
        for i, (one, p, s) in enumerate(zip(labels, patients, splits or [""] * len(labels), strict=True))
    ]
    return Cohort(bags, rule, 2, None, [], [], len(bags))


def names(found: Cohort, parts: Parts) -> dict[str, list[str]]:
    return {part: [found.bags[i].key for i in numbers] for part, numbers in parts.items()}


def test_over_all_folds_each_slide_is_tested_once_and_no_patient_leaks() -> None:
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 60, 200).tolist()
    found = cohort(["xxxxy"[i % 5] for i in range(200)], patients)
    tested, validated = [], []
    for fold in range(5):
        parts = split_cohort(found, folds=5, fold=fold)
        of = {part: {found.bags[i].patient for i in numbers} for part, numbers in parts.items()}
        assert not (of["train"] & of["val"] or of["train"] & of["test"] or of["val"] & of["test"])
        assert sum(map(len, parts.values())) == 200
        for numbers in parts.values():
            rare = np.mean([found.bags[i].truth.shown == "y" for i in numbers])
            assert abs(rare - 0.2) < 0.06  # in proportion, which chance alone would miss by more (sd of 0.063 in 40)
        tested += parts["test"].tolist()
        validated += parts["val"].tolist()
    assert sorted(tested) == sorted(validated) == list(range(200))


def test_folds_are_scikit_learn_s() -> None:
    found = cohort(list("xyxyyxyyxyxxyyxx"))
    splitter = StratifiedGroupKFold(4, shuffle=True, random_state=3)
    strata, groups = [b.truth.stratum for b in found.bags], [b.patient for b in found.bags]
    reference = [test.tolist() for _, test in splitter.split(np.zeros(16), strata, groups)]
    parts = split_cohort(found, folds=4, fold=2, split_seed=3)
    assert parts["test"].tolist() == reference[2] and parts["val"].tolist() == reference[3]


def test_an_official_split() -> None:
    found = cohort(list("xxyyxxyyxx"), splits=["train"] * 4 + ["tune"] * 2 + ["test"] * 2 + ["spare"] * 2)
    split = {"field": "split", "train": "train", "test": ["test", "spare"]}
    parts = split_cohort(found, split=split)
    assert names(found, parts) == {"train": ["s0", "s1", "s2", "s3"], "val": [], "test": ["s6", "s7", "s8", "s9"]}
    with pytest.raises(UserError, match=r"the val part has one class only \(x, 2 bags\)"):
        split_cohort(found, split=split | {"val": "tune"})
    more = cohort(list("xxyy") * 10, splits=["train"] * 36 + ["test"] * 4)
    parts = split_cohort(more, split={"field": "split", "train": "train", "test": "test", "fraction": 0.25})
    assert [len(parts[part]) for part in ("train", "val", "test")] in ([26, 10, 4], [28, 8, 4])
    with pytest.raises(UserError, match="names none of the 10 slides"):
        split_cohort(found, split={"field": "split", "train": "TRAIN"})
    with pytest.raises(UserError, match="no such column"):
        split_cohort(found, split={"field": "part", "train": "train"})


@pytest.mark.parametrize("form", ["columns", "bool"])
def test_clam_s_splits(form: str, tmp_path: Path) -> None:
    found = cohort(list("xyxyxyxy"), patients=[0, 0, 1, 1, 2, 2, 3, 3])
    path = tmp_path / "splits_0.csv"
    if form == "columns":
        path.write_text(",train,val,test\n0,s0,s4,s6\n1,s1,s5,s7\n2,s2,,\n3,s3,,\n")
    else:
        part = {**dict.fromkeys("0123", "train"), **dict.fromkeys("45", "val"), **dict.fromkeys("67", "test")}
        rows = [f"s{k}," + ",".join(str(part[k] == one) for one in ("train", "val", "test")) for k in part]
        path.write_text(",train,val,test\n" + "\n".join(rows) + "\n")
    parts = split_cohort(found, split={"table": str(path)})
    wanted = {"train": ["s0", "s1", "s2", "s3"], "val": ["s4", "s5"], "test": ["s6", "s7"]}
    assert names(found, parts) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 2}, "data.folds is 2: give a whole number, 3 or more"),
        ({"folds": None}, "data.folds is None"),
        ({"fold": 5}, "of data.folds=5 the last one is 4"),
        ({"folds": 9}, "5 patients, too few for 9 folds"),
        ({"split": {"field": "split", "trian": "x"}}, "data.split is"),
        (
            {"split": {"field": "split", "train": "a", "test": "b"}},
            "patient p0 is in train \\(s0\\) and in test \\(s1\\)",
        ),
        ({"split": {"field": "split", "train": "a", "test": "a"}}, "s0 in test and train: each slide is in one part"),
    ],
)
def test_what_cannot_be_split_is_refused_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        split_cohort(cohort(list("xyxyxyxyxy"), splits=list("ab" * 5)), **options)
    assert "\n" not in str(raised.value)


def test_one_class_in_a_fold_is_refused() -> None:
    with pytest.raises(UserError, match=r"part has one class only \(x, "):
        split_cohort(cohort(list("x" * 18 + "yy")))
