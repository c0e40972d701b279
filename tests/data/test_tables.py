"""Tables of every kind as sources, and what a hostile one cannot do; folders of images."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pytest

from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.folders import FolderSource
from medclip.data.raw import Source
from medclip.data.sources import open_sources
from medclip.types import UserError

ROWS = [{"image": f"im/{i}.jpg", "caption": f"Caption, {i}", "case": f"p{i % 2}", "age": 40 + i} for i in range(4)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "im").mkdir()
    for i in range(6):
        (tmp_path / "im" / f"{i}.jpg").write_bytes(b"image %d" % i)
    return tmp_path


def opened(path: Path, **config: Any) -> Source:
    return open_sources([{"table": str(path)} | config], index=path.parent / "index")[0]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    frame = pd.DataFrame(rows)
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".tsv" | ".txt":
            frame.to_csv(path, index=False, sep="\t")
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".parquet":
            frame.to_parquet(path)
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt", "jsonl", "json", "parquet"])
def test_every_kind_reads_the_same(root: Path, ending: str) -> None:
    found = opened(write(root / f"t.{ending}", ROWS))
    assert [found.key(i) for i in range(4)] == [f"im/{i}.jpg" for i in range(4)]
    for i in range(4):
        raw = found.read(i)
        assert (raw.image, raw.text) == (b"image %d" % i, f"Caption, {i}")
        assert raw.meta == ROWS[i]  # numbers are numbers
        assert found.fields(i) == {"key": f"im/{i}.jpg"} | ROWS[i]
    old = opened(root / f"t.{ending}", filter='age > 41 and case == "p1"')
    assert [old.key(i) for i in range(len(old))] == ["im/3.jpg"]
    again = pickle.loads(pickle.dumps(found))
    assert again.read(2).image == b"image 2" and again.fingerprint() == found.fingerprint()


# Their conventions


def test_roco(root: Path) -> None:
    (root / "radiologytraindata.csv").write_text('id,name,caption\nROCO_1,1.jpg,"A, quoted\nscan"\nROCO_2,2.jpg, CT \n')
    found = opened(root / "radiologytraindata.csv", image_root=str(root / "im"))
    assert [(found.key(i), found.read(i).image, found.read(i).text) for i in range(2)] == [
        ("ROCO_1", b"image 1", "A, quoted\nscan"),
        ("ROCO_2", b"image 2", " CT "),
    ]


def test_rocov2(root: Path) -> None:
    """Names without an ending; those that look like numbers are names all the same."""
    for name in ("ROCOv2_1", "0012", "1e5", "123456789012345678901"):
        (root / "im" / f"{name}.jpg").write_bytes(name.encode())
    for ids in (["ROCOv2_1"], ["1e5", "123456789012345678901"], ["0012", "1"]):
        (root / "train_captions.csv").write_text("ID,Caption\n" + "".join(f"{k},text of {k}\n" for k in ids))
        found = opened(
            root / "train_captions.csv",
            image_root=str(root / "im"),
            columns={"image": "ID", "text": "Caption", "key": "ID"},
            suffix=".jpg",
        )
        assert [found.key(i) for i in range(len(found))] == ids
        assert [found.read(i).text for i in range(len(found))] == [f"text of {k}" for k in ids]
        assert found.read(0).image == ids[0].encode()


def test_pmc_oa(root: Path) -> None:
    rows = [{"image": f"{i}.jpg", "caption": f"c{i}", "alignment_type": "x", "pmc_id": f"PMC{i}"} for i in range(3)]
    found = opened(write(root / "pmc_oa.jsonl", rows), image_root=str(root / "im"))
    assert found.key(1) == "1.jpg" and found.read(2).image == b"image 2" and found.fields(2)["pmc_id"] == "PMC2"


def test_several_captions_a_row(root: Path) -> None:
    found = opened(write(root / "t.jsonl", [{"image": "im/1.jpg", "captions": ["one", "two", None]}]))
    assert CaptionRule().all(found.read(0)) == ["one", "two"]


@pytest.mark.filterwarnings("ignore:Length of header")
def test_headerless_and_overlong_lines(root: Path) -> None:
    (root / "t.csv").write_text("im/1.jpg,one,\nim/2.jpg,two,\n")  # a comma too many at the end of each line
    found = opened(root / "t.csv", header=["image", "caption"])
    assert [(found.key(i), found.read(i).text) for i in range(2)] == [("im/1.jpg", "one"), ("im/2.jpg", "two")]
    (root / "u.csv").write_text("image,caption\nim/1.jpg,one,\nim/2.jpg,two,\n")
    assert opened(root / "u.csv").read(1).text == "two"


def test_types_of_csv_columns(root: Path) -> None:
    frame = {
        "image": ["im/1.jpg", "im/2.jpg"],
        "caption": ["12", "13"],
        "score": ["0.123456789012", ""],
        "long": ["0.12345678901234567", "-2.5e-3"],  # as numpy writes them
        "zip": ["00123", "4"],
        "case": ["1234567890123456789012345", "1234567890123456789012346"],  # as floats the same
        "word": ["", "x"],
    }
    pd.DataFrame(frame).to_csv(root / "t.csv", index=False)
    found = opened(root / "t.csv")
    expected = {
        "caption": ["12", "13"],
        "score": [0.123456789012, None],
        "long": [pytest.approx(0.12345678901234567, abs=1e-14), -0.0025],
        "zip": ["00123", "4"],
        "case": frame["case"],
        "word": [None, "x"],
    }
    assert {name: [found.fields(i)[name] for i in range(2)] for name in expected} == expected


def test_byte_order_mark_and_blank_lines(root: Path) -> None:
    (root / "t.csv").write_text("\ufeffimage,caption\nim/1.jpg,ä\n", "utf-8")
    assert opened(root / "t.csv").read(0).text == "ä"
    (root / "t.jsonl").write_text('\ufeff{"image": "im/1.jpg", "caption": "ä"}\n\n  \n', "utf-8")
    assert len(opened(root / "t.jsonl")) == 1


# What is left out


def test_rows_that_are_no_pair_are_listed(root: Path) -> None:
    rows = [
        b'{"image": "im/0.jpg", "id": 7}',  # the first row lacks what others have
        b'{"image": "im/1.jpg", "caption": "good", "id": 0}',
        b'{"image": null, "caption": "x", "id": "no"}',
        b'{"image": ["a"], "caption": "x"}',
        b'{"image": "im/2.jpg", "caption": "x", "id": null}',
        b'{"image": "im/3.jpg", "caption": ',
        b"[]",
    ]
    (root / "t.jsonl").write_bytes(b"\n".join(rows))
    found = opened(root / "t.jsonl")
    assert [found.key(i) for i in range(len(found))] == ["0", "im/2.jpg"]
    assert [(k, r) for k, r, _ in found.problems] == [
        ("7", "missing caption"),
        ("no", "missing image"),
        ("['a']", "missing image"),
        ("row 6", "broken metadata"),
        ("row 7", "broken metadata"),
    ]
    assert len(opened(root / "t.jsonl", caption=False)) == 3


def test_images_that_are_not_there_are_met_when_read(root: Path) -> None:
    found = opened(write(root / "t.jsonl", [{"image": "im/9.jpg", "caption": "x"}, *ROWS]))
    assert len(found) == 5
    with pytest.raises(BadSample) as caught:
        found.read(0)
    assert caught.value.reason == "missing image" and "im/9.jpg" in caught.value.detail
    assert found.read(1).image == b"image 0"


# What a hostile table cannot do


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(b"secret")
    return outside / "secret.jpg"


def test_nothing_outside_is_read(tmp_path: Path, secret: Path) -> None:
    inside = tmp_path / "inside"
    (inside / "im").mkdir(parents=True)
    (inside / "im" / "a.jpg").write_bytes(b"fine")
    (inside / "link.jpg").symlink_to(secret)
    (inside / "folder").symlink_to(secret.parent)
    (inside / "near.jpg").symlink_to("im/a.jpg")
    (tmp_path / "inside-out").mkdir()
    (tmp_path / "inside-out" / "x.jpg").write_bytes(b"secret")
    os.mkfifo(inside / "pipe")
    bad = [
        "../outside/secret.jpg",
        str(secret),
        "im/../../outside/secret.jpg",
        "link.jpg",
        "folder/secret.jpg",
        "../inside-out/x.jpg",  # a name that begins like the root's
        "/etc/passwd",
        "pipe",
        "im",
        ".",
        "a\0b",
        "im/a.jpg/x",
        "x" * 5000,
        "file:///etc/passwd",
    ]
    good = ["im/a.jpg", "near.jpg", "im/../im/a.jpg", str(inside / "im" / "a.jpg")]
    rows = [{"image": name, "caption": "x"} for name in [*bad, *good]]
    found = opened(write(inside / "t.jsonl", rows))
    for i, name in enumerate(bad):
        with pytest.raises(BadSample) as caught:
            found.read(i)
        assert caught.value.reason in ("unsafe path", "missing image", "read error"), name
    assert [found.read(len(bad) + i).image for i in range(len(good))] == [b"fine"] * len(good)
    with pytest.raises(BadSample, match="unsafe path"):
        found.read(3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        for i in range(len(bad)):
            with pytest.raises(BadSample):
                found.read(i)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@pytest.mark.parametrize(
    ("name", "content", "config", "says"),
    [
        ("t.ods", "x", {}, "unknown ending"),
        ("t.pkl", "x", {}, "cannot read table .*a pickle can run any program.*take the same data as .parquet"),
        ("t.csv", "a,b\n1,2\n", {}, "no column for the image; the columns are: a, b: set columns.image"),
        ("t.csv", "image,b\nx,2\n", {}, "no column for the text; .*: set columns.text"),
        ("t.csv", "image,caption\nx,2\n", {"columns": {"image": "img"}}, "no column 'img'"),
        ("t.csv", "image,caption\nx,2\n", {"columns": {"picture": "image"}}, "unknown keys .*picture"),
        ("t.csv", "image,caption\nx,2\n", {"image_root": "/nowhere"}, "image folder /nowhere is not there"),
        ("t.csv", "image,caption\n", {}, "no usable row"),
        ("t.csv", "", {}, "cannot read table"),
        ("t.jsonl", "", {}, "no usable row"),
        ("t.jsonl", "not json\n", {}, "no usable row"),
        ("t.json", "{}", {}, "not a list"),
        ("t.parquet", "PAR1 is not all", {}, "cannot read table"),
        ("t.csv", "image,caption\nx,\n", {}, r"no usable row \(1 are bad\)"),
    ],
)
def test_bad_tables_get_one_line(tmp_path: Path, name: str, content: str, config: dict[str, Any], says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        opened(tmp_path / name, **config)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read table"):
        opened(tmp_path / f"missing-{name}", **{k: v for k, v in config.items() if k == "none"})


# Sources are data


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "exactly one of urls, table, folder, phantoms, slides, arrays, arrow; this one has none"),
        ({"table": "a", "folder": "b"}, "table and folder"),
        ({"folder": "a", "wieght": 2}, "unknown keys.*wieght"),
        ({"folder": "a", "suffix": ".jpg"}, "suffix belongs to tables"),
        ({"folder": "a", "weight": 0}, "not a positive number"),
        ({"folder": "a", "weight": "much"}, "not a positive number"),
        ({"folder": "/nowhere"}, "folder /nowhere is not there"),
        ({"urls": []}, "empty"),
    ],
)
def test_bad_sources_get_one_line(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_sources([config])


# Folders


def picture_folder(root: Path) -> Path:
    for name in (
        "b/1.jpg",
        "b/2.PNG",
        "a/x.y.webp",
        "top.jpg",
        "a/notes.md",
        ".hidden/z.jpg",
        "b/.thumb.jpg",
        "b/bare.jpg",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
        if not name.startswith("b/bare"):
            (root / f"{name.rpartition('.')[0]}.txt").write_text(f"\ufeffabout {name}", "utf-8")
    return root


def folder(path: Path, **config: Any) -> Source:
    return open_sources([{"folder": str(path)} | config], index=path.parent / "index")[0]


def test_folder_of_pairs(tmp_path: Path) -> None:
    found = folder(picture_folder(tmp_path / "f"))
    assert [found.key(i) for i in range(len(found))] == ["top", "a/x.y", "b/1", "b/2"]
    assert found.read(1).image == b"a/x.y.webp" and found.read(1).text == "about a/x.y.webp"
    assert found.fields(3) == {"key": "b/2", "caption": "about b/2.PNG", "image": "b/2.PNG", "label": "b"}
    assert found.fields(0)["label"] is None
    assert [(k, r) for k, r, _ in found.problems] == [("b/bare", "missing caption")]
    again: FolderSource = pickle.loads(pickle.dumps(found))  # pyright: ignore[reportAssignmentType]
    assert again.read(2).image == b"b/1.jpg"


def test_folder_of_classes(tmp_path: Path) -> None:
    found = folder(picture_folder(tmp_path / "f"), caption=False, filter='label == "b"')
    assert [found.key(i) for i in range(len(found))] == ["b/1", "b/2", "b/bare"]
    named = folder(tmp_path / "f", caption="label")
    assert CaptionRule(("label",)).all(named.read(1)) == ["a"]


def test_folders_without_pairs(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    with pytest.raises(UserError, match="no image below it"):
        folder(tmp_path / "e")
    (tmp_path / "e" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of its 1 images has a \.txt caption: set caption=false"):
        folder(tmp_path / "e")


def test_links_out_of_a_folder_are_not_followed(tmp_path: Path, secret: Path) -> None:
    root = picture_folder(tmp_path / "f")
    (root / "b" / "link.jpg").symlink_to(secret)
    found = folder(root, caption=False)
    place = [found.key(i) for i in range(len(found))].index("b/link")
    with pytest.raises(BadSample, match="unsafe path"):
        found.read(place)


def test_file_that_went_away(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "f")
    found = folder(root)
    (root / "b" / "1.jpg").unlink()
    (root / "b" / "2.txt").unlink()
    for i, reason in ((2, "missing image"), (3, "missing caption")):
        with pytest.raises(BadSample, match=reason):
            found.read(i)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "f")
    Path(os.fsdecode(os.fsencode(root) + b"/b/\xff.jpg")).write_bytes(b"x")
    found = folder(root, caption=False)
    orjson.dumps([found.key(i) for i in range(len(found))])
    listed = folder(root).problems
    assert len(listed) == 2


def test_order_of_files_is_the_same_everywhere(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"{rng.integers(5)}/{rng.integers(1000)}.jpg" for _ in range(60)]
    for folder_name, order in (("one", names), ("two", names[::-1])):
        for name in order:
            (tmp_path / folder_name / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder_name / name).write_bytes(b"x")
    one, two = (folder(tmp_path / name, caption=False) for name in ("one", "two"))
    assert [one.key(i) for i in range(len(one))] == [two.key(i) for i in range(len(two))]


# Reshaped


def shaped(root: Path, rows: list[dict[str, Any]], **config: Any) -> Source:
    return opened(write(root / "t.csv", rows), caption=False, **config)


def test_search_finds_files_in_whatever_folders(root: Path) -> None:
    for name in ("a/x.png", "b/c/y.png", "a/z.png", "b/z.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    rows = [{"image": name, "n": k} for k, name in enumerate(("x", "y", "z", "gone"))]
    found = shaped(root, rows, search=True, suffix=".png")
    assert [found.read(i).image for i in range(len(found))] == [b"a/x.png", b"b/c/y.png"]
    assert [found.key(i) for i in range(2)] == ["x", "y"] and found.fields(1)["n"] == 1
    assert found.problems == [
        ("z", "missing image", f"z.png is in 2 folders below {root}"),
        ("gone", "missing image", f"gone.png is in no folder below {root}"),
    ]


def test_join_keeps_a_rows_own_columns_and_rows_without_a_partner(root: Path) -> None:
    write(root / "other.csv", [{"pid": "007", "case": "theirs", "site": "A"}, {"pid": "7", "case": "x", "site": "B"}])
    rows = [{"image": "im/1.jpg", "pid": p, "case": "mine"} for p in ("7", "007", "8")]
    found = shaped(root, rows, join={"table": str(root / "other.csv"), "by": "pid"})
    assert [found.fields(i).get("site") for i in range(3)] == ["B", "A", None]  # numbers with zeros are names
    assert [found.fields(i)["case"] for i in range(3)] == ["mine"] * 3
    with pytest.raises(UserError, match=r"other\.csv has no column 'image'; they are: pid, case, site"):
        shaped(root, rows, join={"table": str(root / "other.csv"), "by": ["pid", "image"]})
    write(root / "other.csv", [{"pid": "7", "site": "A"}, {"pid": "7", "site": "B"}])
    with pytest.raises(UserError, match="two rows of the same pid"):
        shaped(root, rows, join=[{"table": str(root / "other.csv"), "by": "pid"}])


def test_majority(root: Path) -> None:
    votes = {"im/1.jpg": ["110", "100", "001"], "im/2.jpg": ["10", "11"], "im/3.jpg": ["1"]}
    rows = [
        {"image": image, "rad": f"R{k}", "A": int(v[0]), "B": int(v[1]) if len(v) > 1 else 0}
        for image, each in votes.items()
        for k, v in enumerate(each)
    ]
    found = shaped(root, rows[::-1], majority="image")
    seen = {found.key(i): (found.fields(i)["A"], found.fields(i)["B"]) for i in range(len(found))}
    assert seen == {"im/1.jpg": (1, 0), "im/2.jpg": (1, 0), "im/3.jpg": (1, 0)}  # a tie is no majority
    with pytest.raises(UserError, match="majority: no column 'who'; the columns are: image, rad, A, B"):
        shaped(root, rows, majority="who")


def test_extract_and_image_path(root: Path) -> None:
    rows = [{"Path": f"x/patient0000{k}/v.jpg", "n": k, "ok": "yes"} for k in (1, 2)] + [
        {"Path": "y", "n": "", "ok": "n"}
    ]
    extract = {
        "patient": {"column": "Path", "pattern": r"patient\d+"},
        "digit": {"column": "Path", "pattern": r"0(\d)/"},
    }
    found = shaped(root, rows, extract=extract, image_path="im/{n}.jpg")
    assert [(found.read(i).image, found.fields(i)["patient"]) for i in range(2)] == [
        (b"image 1", "patient00001"),
        (b"image 2", "patient00002"),
    ]
    assert found.fields(0)["digit"] == "1" and [why for _, why, _ in found.problems] == ["missing image"]
    assert shaped(root, rows, image_path="im/{n}.{ok:.1}").fields(0)["image_path"] == "im/1.y"


def test_a_made_path_cannot_leave_the_root(root: Path) -> None:
    found = shaped(root, [{"n": "../../etc/passwd"}], image_path="im/{n}")
    with pytest.raises(BadSample, match=r"unsafe path|missing image"):
        found.read(0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"join": {"table": "x.csv"}}, r"join is .*: write \{table: other.csv, by:"),
        ({"join": ["x.csv"]}, "join is"),
        ({"extract": {"a": "b"}}, "extract is"),
        ({"extract": {"a": {"column": "c", "pattern": "("}}}, "extract is"),
        ({"image_path": "no columns"}, "image_path is"),
        ({"image_path": "{image.__class__}"}, "image_path is"),
        ({"image_path": "{image[0]}"}, "image_path is"),
        ({"image_path": "{}"}, "image_path is"),
        ({"image_path": "{image"}, "image_path is"),
    ],
)
def test_bad_shapes_get_one_line(root: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        shaped(root, [{"image": "im/1.jpg"}], **config)
    assert "\n" not in str(caught.value)
