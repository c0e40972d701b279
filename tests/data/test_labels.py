"""Labels from columns, lists and class names; what a source declares; how both reach batches and evaluation sets."""

from __future__ import annotations

import json
import logging
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medclip.data.bad import BadSample
from medclip.data.crop import RandomCrop
from medclip.data.declared import Declared, declarations
from medclip.data.evalset import EvalSet
from medclip.data.labels import LabelRule
from medclip.data.module import PairData
from medclip.types import Preprocess, UserError
from tests.conftest import jpeg, write_tar
from tests.data.test_dicom import GREY, dicom
from tests.data.test_pairs import Letters

NAN = math.nan
FIVE = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]


def vector(config: dict[str, Any], fields: dict[str, Any]) -> list[float]:
    found = pickle.loads(pickle.dumps(LabelRule.parse(config))).vector(fields)  # it crosses to reader processes
    assert found.dtype == np.float32
    return found.tolist()


def same(found: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(found, expected)  # NaN equals NaN


# Columns


@pytest.mark.parametrize(
    ("uncertain", "empty", "expected"),
    [
        (None, None, [0, 0, 1, 0, 0]),
        ("zeros", "zeros", [0, 0, 1, 0, 0]),
        ("ones", "zeros", [1, 0, 1, 1, 0]),
        ("ignore", "ignore", [NAN, 0, 1, NAN, NAN]),
        ({"Atelectasis": "ones", "Edema": "ones"}, None, [1, 0, 1, 1, 0]),
        ({"Atelectasis": "ones", "default": "ignore"}, "ignore", [1, 0, 1, NAN, NAN]),
    ],
)
def test_uncertain_and_empty_by_policy(uncertain: Any, empty: Any, expected: list[float]) -> None:
    config = {"names": FIVE, "from": "columns", "uncertain": uncertain, "empty": empty}
    values = [-1, 0, 1, -1, None]
    for written in (values, ["-1.0", "0.0", "1.0", "-1", ""], [-1.0, False, True, "-1", float("nan")]):
        same(vector(config, dict(zip(FIVE, written, strict=True))), expected)


def test_columns_of_other_names_and_nested_ones() -> None:
    config = {"names": ["Edema", "Mass"], "from": "columns", "columns": {"Edema": "truth.oedema"}}
    same(vector(config, {"truth": {"oedema": 1}, "Mass": 0, "Edema": 7}), [1, 0])


@pytest.mark.parametrize("value", [2, -2, 0.5, "yes", "1.5", [1], {"a": 1}, "nan", "inf"])
def test_a_value_that_is_none_of_these(value: Any) -> None:
    with pytest.raises(BadSample, match=r"Mass is .*, not 1, 0, -1 or empty") as caught:
        vector({"names": ["Mass"], "from": "columns"}, {"Mass": value})
    assert caught.value.reason == "bad label" and repr(value)[:10] in caught.value.detail


# Lists and class names

NIH = {"names": ["Atelectasis", "Effusion", "Hernia"], "from": "list", "field": "Finding Labels"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Atelectasis|Effusion", [1, 1, 0]),
        ("Hernia", [0, 0, 1]),
        ("No Finding", [0, 0, 0]),
        (["Effusion", "Atelectasis"], [1, 1, 0]),
        ('["Effusion"]', [0, 1, 0]),
        ([], [NAN] * 3),
        ("", [NAN] * 3),
        (None, [NAN] * 3),
    ],
)
def test_lists(value: Any, expected: list[float]) -> None:
    same(vector(NIH, {"Finding Labels": value}), expected)
    if any(map(math.isnan, expected)):
        same(vector(NIH | {"empty": "zeros"}, {"Finding Labels": value}), [0, 0, 0])


def test_a_name_that_nobody_knows_is_a_bad_sample_unless_it_is_passed_over() -> None:
    fields = {"Finding Labels": "Effusion|Efusion"}
    with pytest.raises(BadSample, match=r"Finding Labels says 'Efusion', which is neither in labels.names"):
        vector(NIH, fields)
    same(vector(NIH | {"other": "zeros"}, fields), [0, 1, 0])
    for value in ("[not json", {"Effusion": 1}, 0.5):
        with pytest.raises(BadSample, match="Finding Labels"):
            vector(NIH, {"Finding Labels": value})


def test_values_that_mean_several_classes_or_none_or_nothing_known() -> None:
    config = {
        "names": ["Viral", "COVID-19", "No Finding"],
        "from": "list",
        "field": "finding",
        "separator": ", ",
        "values": {"COVID-19": ["Viral", "COVID-19"], "Varicella": "Viral", "ARDS": []},
        "unlabelled": "todo",
    }
    for text, expected in (
        ("COVID-19, ARDS", [1, 1, 0]),
        ("Varicella", [1, 0, 0]),
        ("ARDS", [0, 0, 0]),
        ("No Finding", [0, 0, 1]),  # here it is a class
        ("todo", [NAN] * 3),
    ):
        same(vector(config, {"finding": text}), expected)


def test_class_names_are_not_split() -> None:
    config = {"names": ["Nodule|Mass", "positive"], "from": "class", "field": "label", "values": {"negative": []}}
    same(vector(config, {"label": "Nodule|Mass"}), [1, 0])
    same(vector(config, {"label": "positive"}), [0, 1])
    same(vector(config, {"label": "negative"}), [0, 0])
    same(vector({"names": ["0", "3"], "from": "class", "field": "n"}, {"n": 3}), [0, 1])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "labels.names is"),
        ({"names": ["A", "A"], "from": "columns"}, "name each class once"),
        ({"names": ["A"]}, "labels.from is None: use columns, list or class"),
        ({"names": ["A"], "from": "rows"}, "use columns, list or class"),
        ({"names": ["A"], "from": "list"}, "needs labels.field"),
        ({"names": ["A"], "from": "columns", "field": "x"}, "labels.field does not go with labels.from=columns"),
        ({"names": ["A"], "from": "list", "field": "x", "uncertain": "ones"}, "labels.uncertain does not go with"),
        ({"names": ["A"], "from": "columns", "uncertain": "twos"}, "zeros, ones or ignore"),
        ({"names": ["A"], "from": "columns", "uncertain": {"B": "ones"}}, "labels.uncertain is"),
        ({"names": ["A"], "from": "columns", "columns": {"B": "b"}}, "labels.columns is"),
        ({"names": ["A"], "from": "columns", "empty": "ones"}, "labels.empty is"),
        (
            {"names": ["A"], "from": "class", "field": "x", "values": {"a": "B"}},
            r"names \['B'\], but the classes are A",
        ),
        ({"names": ["A"], "from": "class", "field": "x", "other": "skip"}, "labels.other"),
        ({"names": ["A"], "from": "columns", "name": 1}, r"unknown keys \['name'\]"),
        ("columns", "labels is 'columns'"),
    ],
)
def test_bad_rules_get_one_line(config: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        LabelRule.parse(config)
    assert "\n" not in str(caught.value)


# What a source declares


def test_a_sources_own_labels_come_over_those_for_all() -> None:
    shared = {"names": ["A", "B"], "from": "columns"}
    own = {"from": "list", "field": "f"}
    first, second, third = declarations([{}, {"labels": own}, {"labels": False}], shared, "patient")
    assert first.labels is not None and first.labels.columns == ("A", "B")
    assert second.labels is not None and second.labels.listing == "f" and second.labels.names == ("A", "B")
    assert third.labels is None and third.group == "patient"
    assert declarations([{"group": False}], None, "patient")[0].group is None
    with pytest.raises(UserError, match=r"different labels\.names"):
        declarations([{}, {"labels": {"names": ["B", "A"]}}], shared)


def test_statistics() -> None:
    assert Declared.parse({"statistics": {"mean": 0.5, "std": [0.1, 0.2, 0.3]}}).statistics == (
        (0.5, 0.5, 0.5),
        (0.1, 0.2, 0.3),
    )
    for wrong in (
        {"mean": 0.5},
        {"mean": 128, "std": 0.2},
        {"mean": 0.5, "std": 0},
        {"mean": [1, 0], "std": 1},
        3,
        "x",
    ):
        with pytest.raises(UserError, match=r"statistics is .*0\.\.1 scale"):
            Declared.parse({"statistics": wrong})


# In batches


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A CSV of 24 images of 12 patients with two label columns, a folder of two DICOM classes, and a shard."""
    rng = np.random.default_rng(0)
    lines = ["image,patient,A,B"]
    for i in range(24):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(rng, 40, 40))
        lines.append(f"{i}.jpg,p{i // 2},{i % 2},{-1 if i % 3 else ''}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    for kind in ("A", "none"):
        (tmp_path / "dicom" / kind).mkdir(parents=True)
        (tmp_path / "dicom" / kind / "1.dcm").write_bytes(dicom(GREY))
    samples = [
        {"key": b"s%d" % i, "jpg": jpeg(rng, 40, 40), "json": json.dumps({"f": ["B"]}).encode()} for i in range(3)
    ]
    write_tar(tmp_path / "s.tar", samples)
    return tmp_path


LABELS = {"names": ["A", "B"], "from": "columns", "uncertain": "ones", "empty": "ignore"}
OF_FOLDERS = {"from": "class", "field": "label", "values": {"none": []}, "uncertain": None}


def data(root: Path, sources: list[dict[str, Any]], *, text: bool = False, **options: Any) -> PairData:
    options = {"labels": LABELS, "batch_size": 5, "crop": RandomCrop()} | options
    made = PairData(
        sources, workers=0, storage={"index": root / "index", "cache": False}, output=root / "run", **options
    )
    (root / "run").mkdir(exist_ok=True)
    model = SimpleNamespace(
        preprocess=Preprocess(size=(16, 16), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        tokenizer=Letters() if text else None,
    )
    trainer = SimpleNamespace(global_rank=0, world_size=1, lightning_module=SimpleNamespace(model=model))
    made.trainer = trainer  # type: ignore[assignment]
    made.setup("fit")
    return made


def rows(batches: Any, name: str) -> dict[str, list[float]]:
    return {key: row for batch in batches for key, row in zip(batch["key"], batch[name].tolist(), strict=False)}


def test_sources_of_every_kind_each_with_its_labels_and_statistics(root: Path) -> None:
    sources = [
        {"table": str(root / "t.csv"), "statistics": {"mean": 0.5, "std": 0.25}},
        {"folder": str(root / "dicom"), "labels": OF_FOLDERS},
        {"urls": str(root / "s.tar"), "labels": {"from": "list", "field": "f", "uncertain": None, "empty": None}},
        {"folder": str(root / "dicom" / "A"), "labels": False},
    ]
    made = data(root, sources)
    batches = list(made.train_dataloader())
    assert made.classes == ("A", "B") and all("text" not in batch for batch in batches)
    label = rows(batches, "label")
    assert len(label) == 24 + 2 + 3 + 1
    for i in range(24):
        same(label[f"{i}.jpg"], [i % 2, 1 if i % 3 else NAN])
    same(label["A/1"], [1, 0])
    same(label["none/1"], [0, 0])
    same(label["s2"], [0, 1])
    same(label["1"], [NAN, NAN])
    mean, std = rows(batches, "mean"), rows(batches, "std")
    np.testing.assert_allclose([mean["7.jpg"], std["7.jpg"]], [[0.5] * 3, [0.25] * 3])
    np.testing.assert_allclose([mean["s1"], std["s1"]], [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])


def test_padding_repeats_the_real_rows(root: Path) -> None:
    made = data(root, [{"table": str(root / "t.csv"), "statistics": {"mean": 0.5, "std": 0.25}}], batch_size=16)
    last = list(made.train_dataloader())[-1]
    assert len(last["key"]) == 8 and last["label"].shape == (16, 2) and last["std"].shape == (16, 3)
    for name in ("image", "label", "mean", "std"):
        np.testing.assert_array_equal(last[name][8:], last[name][:8])


def test_a_clip_may_have_labels_too(root: Path) -> None:
    (root / "c.csv").write_text("image,caption,A,B\n" + "\n".join(f"{i}.jpg,c{i},1,0" for i in range(5)))
    (batch,) = data(root, [{"table": str(root / "c.csv")}], text=True).train_dataloader()
    assert batch["label"].tolist() == [[1, 0]] * 5 and batch["text"].shape == (5, 24)
    (plain,) = data(root, [{"table": str(root / "c.csv")}], text=True, labels=None).train_dataloader()
    assert not {"label", "mean", "std"} & set(plain)


def test_no_caption_is_needed_without_a_tokenizer(root: Path) -> None:
    """Whatever `caption` says, and whether there are any."""
    for caption in (None, "nothing", {"field": "B"}):
        made = data(root, [{"table": str(root / "t.csv"), "caption": caption}], labels=None)
        assert len(made.sources[0]) == 24 and len(rows(made.train_dataloader(), "image")) == 24
    with pytest.raises(UserError, match="no column for the text"):
        data(root, [{"table": str(root / "t.csv")}], text=True)


def test_bad_labels_and_flat_pictures_are_skipped_counted_and_listed(root: Path) -> None:
    lines = (root / "t.csv").read_text().splitlines()
    lines[4] = "3.jpg,p1,1,5"
    (root / "t.csv").write_text("\n".join(lines))
    Image.new("RGB", (40, 40), (9, 9, 9)).save(root / "8.jpg")
    made = data(root, [{"table": str(root / "t.csv")}], max_bad_fraction=0.5)
    assert len(rows(made.train_dataloader(), "label")) == 22
    listed = [json.loads(line) for line in (root / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {row["key"]: row["reason"] for row in listed} == {"3.jpg": "bad label", "8.jpg": "zero contrast"}
    assert listed[0]["detail"].startswith(("B is 5", "every pixel is 9"))


def test_a_missing_label_column_is_told_with_those_there_are(root: Path) -> None:
    with pytest.raises(UserError, match=r"no label column 'Mass'; the fields are: key, caption, image, patient, A, B"):
        data(root, [{"table": str(root / "t.csv")}], labels={"names": ["A", "Mass"], "from": "columns"})


def test_counts_and_empty_classes(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = data(root, [{"table": str(root / "t.csv")}])
    assert made.label_counts() == {"A": (12, 12), "B": (16, 0)}  # 8 of B are not known
    with caplog.at_level(logging.WARNING):
        made.train_dataloader()
    assert "no sample with, or none without, B: nothing can be learned of it" in caplog.text


# Patients


def test_a_patient_in_two_parts_is_refused(root: Path) -> None:
    table = {"table": str(root / "t.csv")}
    apart = [table | {"split": {"by": "patient", "part": part}} for part in ("train", "test")]
    assert data(root, apart[:1], val_sources=apart[1:], group="patient").val_sources
    by_image = [table | {"split": {"by": "key", "part": part, "seed": 1}} for part in ("train", "test")]
    with pytest.raises(
        UserError, match=r"\d of \d groups by patient in data\.val_sources are in data\.sources too"
    ) as no:
        data(root, by_image[:1], val_sources=by_image[1:], group="patient")
    assert not any(f"p{i}" in str(no.value).replace("patient", "").replace("parts", "") for i in range(12))
    assert data(root, by_image[:1], val_sources=[by_image[1] | {"group": False}], group="patient").val_sources
    with pytest.raises(UserError, match="24 of 24 samples have no 'case'; the fields are"):
        data(root, [table], val_sources=apart[1:], group="case")


def test_numbers_and_texts_of_the_same_patient_are_the_same(root: Path) -> None:
    """12 in one table and "12" in the other."""
    (root / "a.jsonl").write_text('{"image": "1.jpg", "pid": 12}\n')
    (root / "b.jsonl").write_text('{"image": "2.jpg", "pid": "12"}\n')
    parts = [{"table": str(root / f"{name}.jsonl")} for name in "ab"]
    with pytest.raises(UserError, match="1 of 1 groups by pid"):
        data(root, parts[:1], val_sources=parts[1:], group="pid", labels=None)


# Evaluation sets


def test_evaluation_sets_carry_labels(root: Path) -> None:
    sources = [{"table": str(root / "t.csv"), "statistics": {"mean": 0.5, "std": 0.25}}]
    made = EvalSet(sources, labels=LABELS, group="patient", index=root / "index")
    batches = list(made.batches(Preprocess(size=(16, 16)), 10))
    assert made.classes == ("A", "B") and [batch["label"].shape for batch in batches] == [(10, 2)] * 3
    label = rows(batches, "label")
    for i in range(24):
        same(label[f"{i}.jpg"], [i % 2, 1 if i % 3 else NAN])
    assert batches[0]["meta"][3]["group"] == "p1" and batches[0]["mean"][0].tolist() == [0.5] * 3
    assert np.isnan(batches[2]["label"][4:]).all()
    with pytest.raises(UserError, match="no label column 'C'"):
        EvalSet(sources, labels=LABELS | {"names": ["A", "C"]}, index=root / "index")
    plain = next(
        iter(EvalSet([{"table": str(root / "t.csv")}], index=root / "index").batches(Preprocess(size=(16, 16))))
    )
    assert set(plain) == {"image", "key", "meta"}
