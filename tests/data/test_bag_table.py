"""A table and its features joined: what fits becomes a bag, what does not is named with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from medclip.data.bag_memory import BagMemory
from medclip.data.bag_table import Cohort, open_cohort
from medclip.types import UserError
from tests.data.test_bag_files import values, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("abcdef"):
        write(tmp_path / f"features_e/{name}.h5", values(4 + number, 5, seed=number))
    return tmp_path


def cohort(folder: Path, text: str, **options: Any) -> Cohort:
    (folder / "t.csv").write_text(text)
    return open_cohort(features=str(folder), table=str(folder / "t.csv"), **options)


ROWS = "slide,patient,label\n" + "".join(f"{s},p{k // 2},{'xy'[k % 2]}\n" for k, s in enumerate("abcdef"))


def test_what_cannot_be_used_is_named(folder: Path) -> None:
    write(folder / "features_e/none.h5", np.zeros((0, 5), np.float32))
    write(folder / "features_e/wide.h5", values(3, 6))
    write(folder / "features_e/other.h5", values(3, 5), "another")
    write(folder / "features_e/spare.h5", values(3, 5))
    (folder / "features_e/broken.h5").write_bytes(b"nothing")
    with h5py.File(write(folder / "features_e/newer.h5", values(3, 5)), "a") as file:
        file["features"].attrs["weights"] = "0123"
    for name in "ab":
        with h5py.File(folder / f"features_e/{name}.h5", "a") as file:
            file["features"].attrs["weights"] = "4567"
    more = "".join(f"{s},q,x\n" for s in ("none", "wide", "other", "broken", "newer", "gone"))
    found = cohort(folder, ROWS + more + "c2,,x\n,q,x\nd2,q,\ne2,q,z\n", labels={"names": ["x", "y"]})
    assert [bag.key for bag in found.bags] == list("abcdef") and (found.dim, found.encoder) == (5, "e")
    assert found.unlabelled == ["spare"] and found.rows == 16
    assert dict(one[:2] for one in found.bad) == {
        "none": "no patches",
        "wide": "other width",
        "other": "other encoder",
        "newer": "other encoder",
        "broken": "read error",
        "gone": "no features",
        "c2": "no patient",
        "row 14": "no slide",
        "d2": "no label",
        "e2": "bad label",
    }


def test_columns_as_clam_has_them_and_slides_with_their_ending(folder: Path) -> None:
    found = cohort(folder, "case_id,slide_id,label\np,a.svs,x\np,b.svs,y\n")
    assert [(bag.key, bag.patient, bag.truth.shown) for bag in found.bags] == [("a", "p", "x"), ("b", "p", "y")]
    with pytest.raises(UserError, match=r"no column 'patient' or .* say data.columns.patient=slide, where each"):
        cohort(folder, "slide,label\na,x\nb,y\n")
    found = cohort(folder, "slide,label\na,x\nb,y\n", columns={"patient": "slide"})
    assert [bag.patient for bag in found.bags] == ["a", "b"]
    # A number with a leading zero is a name.
    write(folder / "features_e/007.h5", values())
    assert [bag.key for bag in cohort(folder, "slide,patient,label\n007,1,x\na,01,y\n").bags] == ["007", "a"]


def test_the_index_beside_the_features_serves_as_table(folder: Path) -> None:
    import pandas as pd

    pd.DataFrame(
        {"slide": list("ab"), "patient": ["p", "q"], "label": ["x", "y"], "file": ["a.h5", "b.h5"]}
    ).to_parquet(folder / "features_e/index.parquet")
    found = open_cohort(features=str(folder))
    assert [(bag.key, bag.truth.shown) for bag in found.bags] == [("a", "x"), ("b", "y")]


def test_all_slides_of_a_patient_as_one_bag(folder: Path) -> None:
    text = "slide,patient,label\na,p,x\nc,p,x\nb,q,y\n"
    found = cohort(folder, text, bag="patient")
    assert [(bag.key, bag.patches) for bag in found.bags] == [("p", 4 + 6), ("q", 5)]
    whole = np.concatenate([values(4, 5, seed=0), values(6, 5, seed=2)])
    memory = BagMemory.of(found.bags, 0)
    assert np.array_equal(memory.read(0, found.bags[0]), whole)
    rows = np.array([1, 3, 4, 9])  # of both slides
    assert np.array_equal(memory.read(0, found.bags[0], rows), whole[rows])
    for option in ({"bag": "patient"}, {"label_of": "patient"}):
        with pytest.raises(UserError, match="slides a and b of patient p0 have different labels"):
            cohort(folder, ROWS, **option)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("slide,patient,label\na,p,x\na,p,y\nb,q,y\n", {}, "has slide a twice, and says different things"),
        ("slide,patient,label\nz,p,x\nw,p,y\n", {}, "no slide of data.table can be used \\(2 × no features, e.g. z"),
        (ROWS, {"filter": "label == 'q'"}, "leaves no slide"),
        (ROWS, {"bag": "case"}, "data.bag is 'case': choose slide or patient"),
        (ROWS, {"target": "survival"}, "no column 'time'"),
        (ROWS, {"columns": {"slide": "name"}}, "no column 'name' of the slide \\(it has slide, patient, label\\)"),
        ("", {}, "cannot read table"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_a_line(
    folder: Path, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        cohort(folder, text, **options)
    assert "\n" not in str(raised.value)


def test_a_filter_keeps_rows(folder: Path) -> None:
    assert [bag.key for bag in cohort(folder, ROWS, filter="patient != 'p1'").bags] == list("abef")
