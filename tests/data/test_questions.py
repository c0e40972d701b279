"""Questions as sources: one form for every layout, the vocabulary, the split by image, and what is refused."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from medclip.config import build
from medclip.data.evalset import EvalSet
from medclip.data.module import PairData
from medclip.data.questions import QuestionSource, report, shared_images, unknown_answers, vocabulary, words
from medclip.data.sources import open_sources
from medclip.types import Preprocess, UserError
from tests.conftest import jpeg
from tests.data.test_pairs import Letters
from tests.test_configs import composed

DATA = Path(__file__).parents[3] / "shared" / "data"
ASK = {"question": "q", "answer": "a", "type": "t", "kind": "k", "organ": None, "modality": {"value": "MR"}, "id": "n"}
ROWS = [
    {"image": "one.jpg", "q": "Is there a mass?", "a": "Yes", "t": "CLOSED ", "k": "PRES", "n": 1},
    {"image": "one.jpg", "q": "Where is the mass?", "a": "The left lung.", "t": "OPEN", "k": "POS", "n": 2},
    {"image": "two.jpg", "q": "Is it on the left?", "a": "yes", "t": "closed", "k": "POS", "n": 3},
    {"image": "two.jpg", "q": "Which side?", "a": "left", "t": "OPEN", "k": None, "n": 4},
    {"image": "two.jpg", "q": "Left or right?", "a": "Left", "t": "CLOSED", "k": "POS", "n": 5},
]


def written(folder: Path, rows: list[dict[str, Any]], name: str = "qa.jsonl") -> dict[str, Any]:
    for image in ("one.jpg", "two.jpg"):
        (folder / image).write_bytes(jpeg(np.random.default_rng(len(image))))
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"table": str(folder / name), "name": "qa", "questions": ASK}


def opened(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> QuestionSource:
    (source,) = open_sources([written(folder, rows) | changes], index=folder / "index")
    assert isinstance(source, QuestionSource)
    return source


def asked(source: QuestionSource, key: str) -> list[str]:
    return [source.about(i)[key] for i in range(len(source))]


# One form


def test_what_a_row_says_in_one_form(tmp_path: Path) -> None:
    source = opened(tmp_path, ROWS)
    assert source.about(1) == {
        "question": "where is the mass",
        "answer": "left lung",
        "type": "open",
        "slot": "open: left lung",
        "kind": "POS",
        "organ": "",
        "modality": "MR",
        "id": "2",
        "image": "one.jpg",
    }
    assert asked(source, "slot") == ["closed: yes", "open: left lung", "closed: yes", "open: left", "closed: left"]
    assert asked(source, "kind") == ["PRES", "POS", "POS", "", "POS"]
    assert [source.key(i) for i in range(5)] == ["1", "2", "3", "4", "5"]
    raw = source.read(3, want_meta=True)
    assert raw.key == "4" and raw.meta is not None
    assert raw.meta["vqa"] == source.about(3) == source.fields(3)["vqa"] and raw.meta["q"] == "Which side?"
    assert raw.image == (tmp_path / "two.jpg").read_bytes()


def test_without_a_type_yes_and_no_are_closed_and_without_an_id_keys_are_counted_on(tmp_path: Path) -> None:
    source = opened(tmp_path, ROWS, questions={"question": "q", "answer": "a"})
    assert asked(source, "type") == ["closed", "open", "closed", "open", "open"]
    assert asked(source, "id") == ["one.jpg", "one.jpg#2", "two.jpg", "two.jpg#2", "two.jpg#3"]
    assert asked(source, "modality") == [""] * 5
    one_without = [row | {"t": None} if row["n"] == 1 else row for row in ROWS]
    assert asked(opened(tmp_path, one_without), "type")[0] == "closed"


def test_selecting_keeps_each_question_with_its_image(tmp_path: Path) -> None:
    whole = opened(tmp_path, ROWS)
    part = whole.select(np.asarray([1, 3, 4])).select(np.asarray([False, True, True]))
    assert asked(part, "id") == ["4", "5"] == [part.read(i).key for i in range(2)]
    assert [part.fields(i)["n"] for i in range(2)] == [4, 5]
    assert len({whole.fingerprint(), part.fingerprint(), whole.select(np.asarray([3, 4])).fingerprint()}) == 2


def test_filters_and_splits_see_the_form(tmp_path: Path) -> None:
    assert asked(opened(tmp_path, ROWS, filter='vqa.type == "closed" and vqa.kind == "POS"'), "id") == ["3", "5"]
    rows = [row | {"image": f"{i}.jpg", "n": 10 * i + row["n"]} for i in range(40) for row in ROWS[:3]]
    for i in range(40):
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
    parts = [
        opened(tmp_path, rows, split={"by": "vqa.image", "part": part, "fraction": 0.3}) for part in ("train", "test")
    ]
    images = [Counter(asked(part, "image")) for part in parts]
    assert not set(images[0]) & set(images[1]) and sum(map(len, images)) == 40
    assert all(set(counts.values()) == {3} for counts in images)
    assert shared_images(parts[:1], parts[1:]) == (0, 0)


# The vocabulary


def test_closed_answers_come_first_and_an_answer_to_both_is_two(tmp_path: Path) -> None:
    source = written(tmp_path, ROWS)
    options = {"storage": {"index": tmp_path / "index"}}
    assert vocabulary([source], **options) == ["closed: yes", "closed: left", "open: left", "open: left lung"]
    assert vocabulary([source], field="vqa.answer", **options) == ["left", "yes", "left lung"]
    assert vocabulary([source], least=2, **options) == ["closed: yes"]
    assert words([source], least=2, **options) == ["is", "left", "mass", "the"]
    assert words([source], least=4, also=[source], **options) == ["is", "left", "mass", "the"]


def test_the_test_sets_answers_are_in_the_vocabulary_only_if_one_says_so(tmp_path: Path) -> None:
    train, test = (
        written(tmp_path, rows, name) for rows, name in ((ROWS[:1], "train.jsonl"), (ROWS[1:], "test.jsonl"))
    )
    options = {"storage": {"index": tmp_path / "index"}}
    alone = vocabulary([train], **options)
    assert alone == ["closed: yes"]
    both = vocabulary([train], also=[test], **options)
    assert set(both) == {"closed: yes", "closed: left", "open: left", "open: left lung"}
    (source,) = open_sources([test], index=tmp_path / "index")
    assert isinstance(source, QuestionSource)
    assert unknown_answers(source, alone) == {"open: left lung": 1, "open: left": 1, "closed: left": 1}
    assert unknown_answers(source, ["yes", "left", "left lung"]) == {}


# Batches


def data(sources: list[dict[str, Any]], val: list[dict[str, Any]], folder: Path, **options: Any) -> PairData:
    storage = {"index": folder / "index", "cache": False}
    names = vocabulary(sources, storage=storage)
    made = PairData(
        sources,
        val_sources=val,
        labels={"names": names, "from": "class", "field": "vqa.slot", "other": "zeros"},
        batch_size=options.pop("batch_size", 5),
        workers=options.pop("workers", 0),
        storage=storage,
        **options,
    )
    model = SimpleNamespace(preprocess=Preprocess(size=(16, 16)), tokenizer=Letters())
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0, world_size=1, lightning_module=SimpleNamespace(model=model)
    )
    made.setup("fit")
    return made


def test_a_batch_has_questions_as_text_and_answers_as_labels(tmp_path: Path) -> None:
    made = data([written(tmp_path, ROWS)], [], tmp_path)
    (batch,) = made.train_dataloader()
    order = [int(key) - 1 for key in batch["key"]]
    questions = ["".join(map(chr, row)).strip() for row in batch["text"].tolist()]
    said = ["is there a mass", "where is the mass", "is it on the left", "which side", "left or right"]
    assert questions == [said[i] for i in order]
    # closed: yes, closed: left, open: left, open: left lung
    assert batch["label"].argmax(1).tolist() == [[0, 3, 0, 2, 1][i] for i in order]
    assert batch["label"].sum(1).tolist() == [1.0] * 5
    (validated,) = EvalSet(
        [written(tmp_path, ROWS)], captions="vqa.question", group="vqa.image", index=tmp_path / "index"
    ).batches(Preprocess(size=(16, 16)))
    assert [meta["captions"][0] for meta in validated["meta"]] == said
    assert [meta["raw"]["vqa"]["id"] for meta in validated["meta"]] == ["1", "2", "3", "4", "5"]
    assert [meta["group"] for meta in validated["meta"]] == ["one.jpg"] * 2 + ["two.jpg"] * 3


def test_shared_images_and_unheard_answers_are_told_and_can_be_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = written(tmp_path, ROWS[:3], "train.jsonl"), written(tmp_path, ROWS[3:], "val.jsonl")
    with caplog.at_level(logging.WARNING):
        made = data([train], [val], tmp_path)
    assert "2 of 2 questions are about 1 images that training has too" in caplog.text
    assert "the answers of 2 of 2 questions are not in the vocabulary and count as wrong" in caplog.text
    assert "open: left" in caplog.text
    (batch,) = made.val_dataloader()[0]
    assert batch["label"][:2].sum() == 0 and len(batch["key"]) == 2  # scored: no answer is right
    with pytest.raises(UserError, match=r"1 of 1 groups by vqa.image in data.val_sources are in data.sources too"):
        data([train], [val], tmp_path, group="vqa.image")
    caplog.clear()
    report(made.sources, made.sources[:0], ["yes"])
    assert not caplog.text


# What is refused


@pytest.mark.parametrize(
    ("rows", "changes", "says"),
    [
        (ROWS, {"questions": {"question": "q"}}, "source qa: questions is .*: write {question: FIELD, answer: FIELD"),
        (ROWS, {"questions": ASK | {"colour": "x"}}, r"unknown keys \['colour'\]"),
        (ROWS, {"questions": ASK | {"type": 3}}, "questions.type is 3: give the name of a field, or null"),
        (ROWS, {"questions": ASK | {"answer": "answer"}}, "names 'answer', which no sample has; the fields are: .*q"),
        (ROWS, {"questions": ASK | {"organ": "o"}}, "names 'o', which no sample has"),
        (ROWS, {"questions": ASK | {"type": "k"}}, "k of one.jpg is 'pres', neither closed nor open: .*or null"),
        ([*ROWS, ROWS[0]], {}, r"1 ids are those of several questions \(1\): name a field"),
        ([row | {"image": "gone.jpg"} for row in ROWS], {}, "no question that can be used: all 5 .*gone.jpg is not in"),
        ([row | {"a": "?"} for row in ROWS], {}, "no question that can be used: .* missing answer: nothing in a"),
        (ROWS, {"filter": 'k == "zh"'}, "none of its 5 samples passes the filter .*the first has k 'PRES'"),
        (
            ROWS,
            {"split": {"by": "vqa.image", "part": "test", "fraction": 1e-9}},
            "into part test .*change its fraction",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        opened(tmp_path, rows, **changes)
    assert "\n" not in str(caught.value)


def test_questions_that_lack_something_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        *ROWS,
        ROWS[0] | {"n": 6, "q": " "},
        ROWS[0] | {"n": 7, "a": None},
        ROWS[0] | {"n": 8, "a": ["left", "right"]},
        ROWS[0] | {"n": 9, "image": "gone.jpg"},
        ROWS[0] | {"n": 10, "image": None},
        ROWS[0] | {"n": 11, "image": "../out.jpg"},
        ROWS[0] | {"n": 12, "a": 2.0},
    ]
    (tmp_path.parent / "out.jpg").write_bytes(b"outside")
    with caplog.at_level(logging.WARNING):
        source = opened(tmp_path, rows)
    assert asked(source, "id") == ["1", "2", "3", "4", "5", "12"] and asked(source, "answer")[-1] == "2"
    reasons = Counter(reason for _, reason, _ in source.problems)
    assert reasons == {"missing question": 1, "missing answer": 1, "bad answer": 1, "missing image": 3}
    assert "6 samples left out (3 × missing image" in caplog.text


def test_ids_may_repeat_where_the_filter_tells_the_rows_apart(tmp_path: Path) -> None:
    both = [row | {"lang": lang} for row in ROWS for lang in ("en", "zh")]
    assert len(opened(tmp_path, both, filter='lang == "en"')) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [({"field": "answer"}, "field is 'answer'"), ({"least": 0}, "least 0"), ({"least": 9}, "no answer is right for 9")],
)
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        vocabulary([written(tmp_path, ROWS)], storage={"index": tmp_path / "index"}, **options)


def test_a_source_without_questions_has_no_vocabulary(tmp_path: Path) -> None:
    source = {"table": written(tmp_path, ROWS)["table"], "caption": False}
    with pytest.raises(UserError, match=r"has no questions: say {question: FIELD"):
        vocabulary([source], storage={"index": tmp_path / "index"})


# The public layouts


def layout(name: str, *words: str, index: Path) -> list[QuestionSource]:
    cfg = OmegaConf.to_container(OmegaConf.create({"data": composed("train", f"data={name}", *words).data}))
    assert isinstance(cfg, dict)
    found: list[QuestionSource] = []
    both = OmegaConf.create({"data": {key: cfg["data"][key] for key in ("sources", "val_sources")}})
    plain = OmegaConf.to_container(both, resolve=True)
    assert isinstance(plain, dict)
    for source in open_sources([*plain["data"]["sources"], *plain["data"]["val_sources"]], index=index):
        assert isinstance(source, QuestionSource)
        found.append(source)
    return found


def test_vqa_meds_files_of_categories(tmp_path: Path) -> None:
    for part, images in (("train", "Train_images"), ("val", "Val_images")):
        root = tmp_path / part
        (root / images).mkdir(parents=True)
        (root / "QAPairsByCategory").mkdir()
        for i in range(2):
            (root / images / f"synpic{part}{i}.jpg").write_bytes(jpeg(np.random.default_rng(i)))
        said = {
            "C1_Modality": ["is this a t1 weighted image?|no", "what imaging modality was used?|us - ultrasound"],
            "C2_Plane": ["in which plane is the image taken?|axial", 'what plane is "seen"?|3d reconstruction'],
            "C3_Organ": ["what part of the body is being imaged?|face, sinuses, and neck", "what organ?|breast"],
            "C4_Abnormality": ['what is abnormal?|"bone within bone', "is the ct scan normal?|yes"],
        }
        for name, lines in said.items():
            text = "".join(f"synpic{part}{i}|{line}\n" for i, line in enumerate(lines))
            (root / "QAPairsByCategory" / f"{name}_{part}.txt").write_text(text)
    found = layout(
        "vqa_med",
        f"data.sources.0.image_root={tmp_path}/train/Train_images",
        f"data.val_sources.0.image_root={tmp_path}/val/Val_images",
        index=tmp_path / "index",
    )
    assert [asked(source, "slot") for source in found[:4]] == [
        ["closed: no", "open: us ultrasound"],
        ["open: axial", "open: 3d reconstruction"],
        ["open: face sinuses and neck", "open: breast"],
        ["open: bone within bone", "closed: yes"],
    ]
    kinds = [set(asked(source, "kind")) for source in found]
    assert kinds == 2 * [{"modality"}, {"plane"}, {"organ"}, {"abnormality"}]
    assert [asked(source, "image")[0] for source in found] == 4 * ["synpictrain0.jpg"] + 4 * ["synpicval0.jpg"]


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")


@needs_data
def test_vqa_rads_layout_on_its_real_questions(tmp_path: Path) -> None:
    root = DATA / "vqa_rad"
    found = layout(
        "vqa_rad",
        f"data.sources.0.table={root}/qa.jsonl",
        f"data.sources.0.image_root={root}/images",
        index=tmp_path / "index",
    )
    assert sum(map(len, found)) == 2291 and not found[0].problems
    kinds = Counter(kind for source in found for kind in asked(source, "type"))
    assert kinds == {"closed": 1324, "open": 967}
    assert len({image for source in found for image in asked(source, "image")}) == 205
    assert shared_images(found[:1], found[1:]) == (0, 0)
    assert set(asked(found[0], "organ")) == {"HEAD", "CHEST", "ABD"}
    # The official test questions are about images of training: SOURCE.md says so, and here they are counted.
    parts = [
        layout(
            "vqa_rad",
            f"data.sources.0.table={root}/qa.jsonl",
            f"data.sources.0.image_root={root}/images",
            "data.sources.0.split=null",
            f"data.sources.0.filter='official_split == \"{part}\"'",
            "data.val_sources=[]",
            index=tmp_path / "index",
        )
        for part in ("train", "test")
    ]
    images, questions = shared_images(parts[0], parts[1])
    assert len(parts[1][0]) == 296 and images > 100 and questions > 250


@needs_data
def test_slakes_layout_on_its_real_questions(tmp_path: Path) -> None:
    table = DATA / "texts" / "slake_validate.json"
    rows = json.loads(table.read_text())
    for image in {row["img_name"] for row in rows}:  # its images are not there
        (tmp_path / image).parent.mkdir(parents=True)
        (tmp_path / image).write_bytes(b"x")
    words_of = [
        f"data.sources.0.table={table}",
        f"data.sources.0.image_root={tmp_path}",
        f"data.val_sources.0.table={table}",
    ]
    (source, _) = layout("slake", *words_of, index=tmp_path / "index")
    assert len(source) == 1053 and not source.problems
    assert all(question.isascii() for question in asked(source, "question"))
    assert set(asked(source, "modality")) == {"CT", "MRI", "X-Ray"}
    english = [row for row in rows if row["q_lang"] == "en"]
    assert Counter(asked(source, "type")) == Counter(row["answer_type"].lower() for row in english)
    with pytest.raises(UserError, match=r"none of its 2099 samples passes the filter .*the first has q_lang 'en'"):
        layout("slake", *words_of, "data.sources.0.filter='q_lang == \"de\"'", index=tmp_path / "index")


@needs_data
def test_a_training_of_vqa_rad_is_built_from_its_yaml(tmp_path: Path) -> None:
    root = DATA / "vqa_rad"
    cfg = composed(
        *("train", "data=vqa_rad", f"data.sources.0.table={root}/qa.jsonl"),
        *(f"data.sources.0.image_root={root}/images", f"+data.storage.index={tmp_path}", f"output={tmp_path}"),
    )
    made = build(cfg.data)
    assert made.classes[:2] == ("closed: no", "closed: yes")
    closed = [name.startswith("closed: ") for name in made.classes]
    assert closed == sorted(closed, reverse=True) and 20 < sum(closed) < 60
    # A model names the same node, and gets the same list.
    cfg.model = {"_target_": "builtins.dict", "answers": "${data.labels.names}", "_convert_": "all"}
    assert build(cfg.model)["answers"] == list(made.classes)
