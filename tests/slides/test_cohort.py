"""Cohorts: folders, patterns and tables name each slide once, or say in one line why they cannot."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slides.cohort import name_of, read_cohort, take_part
from slides.entry import Entry
from slides.errors import SlideError
from tests.slides.runs import ROOT

DATA = ROOT.parent / "shared" / "data" / "wsi"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.svs", "a.ndpi", "deep/c.ome.tif", "deep/d.tiff", "deep/thumb.png", "notes.txt", ".hidden.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


def named(entries: list[Entry]) -> dict[str, str]:
    return {entry.slide: Path(entry.path).name for entry in entries}


def test_a_folder_s_slides_and_no_pictures(folder: Path) -> None:
    assert named(read_cohort(str(folder))) == {"a": "a.ndpi", "b": "b.svs", "c": "c.ome.tif", "d": "d.tiff"}


def test_patterns_and_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(read_cohort(f"{folder}/*.svs")) == {"b": "b.svs"}
    assert named(read_cohort([f"{folder}/**/*.tif*", f"{folder}/b.svs", f"{folder}/*.svs"])) == {
        "c": "c.ome.tif", "d": "d.tiff", "b": "b.svs",
    }  # fmt: skip
    assert named(read_cohort(f"{folder}/deep/*.png")) == {"thumb": "thumb.png"}  # named, so meant
    monkeypatch.chdir(folder)
    assert [entry.path for entry in read_cohort("deep")] == ["deep/c.ome.tif", "deep/d.tiff"]
    (folder / "x[1].svs").write_text("")  # a file whose name looks like a pattern
    assert named(read_cohort("x[1].svs")) == {"x[1]": "x[1].svs"}


def test_a_table_s_columns(folder: Path) -> None:
    table = folder / "lists" / "cohort.csv"
    table.parent.mkdir()
    lines = ["slide,path,mpp,patient,label", "S 1,../b.svs,0.25,p1,tumour", f",{folder}/a.ndpi,,p2,"]
    table.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")  # as Excel saves it
    one, two = read_cohort(str(table), mpp=0.5)
    assert (one.slide, one.mpp, one.extra) == ("S 1", 0.25, {"patient": "p1", "label": "tumour"})
    assert Path(one.path).resolve() == folder / "b.svs"
    assert (two.slide, two.path, two.mpp, two.extra) == ("a", f"{folder}/a.ndpi", 0.5, {"patient": "p2"})
    (folder / "t.tsv").write_text("wsi\tslide_id\tsite\nb.svs\tB\tLung, left\n")
    (entry,) = read_cohort(str(folder / "t.tsv"))
    assert (entry.slide, entry.path, entry.extra) == ("B", str(folder / "b.svs"), {"site": "Lung, left"})


def test_the_mpp_of_a_table_goes_before_that_of_all(folder: Path) -> None:
    entries = read_cohort(str(folder), mpp=1.0, mpp_table={"a": 0.1, "b.svs": 0.2, str(folder / "deep/d.tiff"): 0.3})
    assert {entry.slide: entry.mpp for entry in entries} == {"a": 0.1, "b": 0.2, "c": 1.0, "d": 0.3}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("slide,file_path\na,b\n", "has the columns slide, file_path, none of them path or wsi or file"),
        ("", "none of them path"),
        ("path,mpp\na.svs,0\n", "line 2 has mpp '0'"),
        ("path,mpp\na.svs,0.5\nb.svs,nan\n", "line 3 has mpp 'nan'"),
        ("path,mpp\na.svs,1000\n", "line 2 has mpp '1000'"),
        ("path,mpp\na.svs,half\n", "line 2 has mpp 'half'"),
        ("slide,path\na,x.svs\nb\n", "line 3 has no path"),
        ("slide,path\na,\n", "line 2 has no path"),
        ("path\n", "no slide in"),
        ("slide,path\n.a,x.svs\n", "'.a' is no name for a slide"),
        ("slide,path\na/b,x.svs\n", "'a/b' is no name for a slide"),
        ("slide,path\na,x.svs\nA,y.svs\n", "x.svs and "),
        ("slide,path\na.1,x.svs\na-1,y.svs\n", "y.svs would have one name: give a CSV with the columns slide"),
    ],
)
def test_a_broken_table_is_one_line_with_the_place(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "c.csv").write_text(content)
    with pytest.raises(SlideError) as error:
        read_cohort(str(tmp_path / "c.csv"))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_table_or_no_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(b"path\n\xff\xfe\n")
    with pytest.raises(SlideError, match=r"c\.csv: cannot be read as CSV"):
        read_cohort(str(tmp_path / "c.csv"))
    with pytest.raises(SlideError, match=r"gone\.csv: cannot be read as CSV"):
        read_cohort(str(tmp_path / "gone.csv"))
    for nothing in (str(tmp_path / "gone"), f"{tmp_path}/*.svs", str(tmp_path)):
        with pytest.raises(SlideError, match=r"^no slide in .*: give a folder, a pattern or a CSV of paths$"):
            read_cohort(nothing)


def test_two_slides_of_one_name_are_refused_by_both_files(folder: Path) -> None:
    (folder / "deep/b.tif").write_text("")
    with pytest.raises(SlideError, match=r"/b\.svs and .*/deep/b\.tif would have one name"):
        read_cohort(str(folder))


@pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")
def test_a_dicom_slide_of_two_files_counts_once(tmp_path: Path) -> None:
    for name in ("boxes_0.dcm", "boxes_1.dcm"):
        shutil.copy(DATA / name, tmp_path)
    (tmp_path / "broken.dcm").write_text("no DICOM")
    assert named(read_cohort(str(tmp_path))) == {"boxes_0": "boxes_0.dcm", "broken": "broken.dcm"}
    assert named(read_cohort(f"{tmp_path}/boxes_1.dcm")) == {"boxes_1": "boxes_1.dcm"}


@given(count=st.integers(0, 60), parts=st.integers(1, 12))
def test_parts_are_the_cohort_once(count: int, parts: int) -> None:
    entries = [Entry(f"s{n}", f"{n}.svs") for n in range(count)]
    shares = [take_part(entries, number, parts) for number in range(parts)]
    assert Counter(entry.slide for share in shares for entry in share) == Counter(entry.slide for entry in entries)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("part", [(8, 8), (-1, 8), (0, 0), (0.0, 2), ("0", "2"), (None, None)])
def test_a_part_that_is_none_is_refused(part: tuple) -> None:
    with pytest.raises(SlideError, match="counts from 0 to one below the second"):
        take_part([], *part)


@pytest.mark.parametrize(
    ("file", "name"),
    [("a.svs", "a"), ("a.b.svs", "a.b"), ("a.ome.tif", "a"), ("a.OME.TIFF", "a"), ("Fall 7 (2).mrxs", "Fall 7 (2)")],
)
def test_names_of_files(file: str, name: str) -> None:
    assert name_of(Path("x") / file) == name
