"""Slides as a source: patches are what the slide holds, captions belong to their places, and nothing is lost unsaid."""

from __future__ import annotations

import csv
import io
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from PIL import Image

import medclip.data.slides as opening
from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.decode import read_image
from medclip.data.evalset import EvalSet
from medclip.data.make_shards import make_shards
from medclip.data.slide_source import SlideSource
from medclip.data.slide_table import slide_rows
from medclip.data.slides import open_slides
from medclip.data.sources import open_sources
from medclip.train import train
from medclip.types import Preprocess, UserError
from scripts import make_shards as script
from slides.entry import Entry
from slides.geometry import geometry
from slides.open import open_slide
from slides.patches import read_patches
from slides.pyramid import APERIO, JPEG, LOSSLESS
from tests.data.test_module import data
from tests.data.test_pairs import keys, trace
from tests.slides.toys import break_header, tile_bytes, toy_pixels, toy_slide, truncate
from tests.test_configs import TINY, composed

DATA = Path(__file__).parents[3] / "shared" / "data"
GRID = {"size": 256, "mpp": None, "tissue": "none", "coverage": 0.5, "remove": []}
ENCODINGS = {"a": APERIO, "b": JPEG, "c": LOSSLESS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides of 1100 x 900 pixels at 0.25 µm, a cohort's CSV, and a table of captioned places."""
    folder = tmp_path_factory.mktemp("wsi")
    for seed, (name, encoding) in enumerate(ENCODINGS.items()):
        toy_slide(folder / "slides" / f"{name}.svs", 1100, 900, seed=seed, encoding=encoding, mpp=0.25)
    with (folder / "slides.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label", "patient", "age"))
        rows.writerows([("slides/a.svs", "tumour", "p1", 61), ("slides/b.svs", "normal", "p2", 7)])
        rows.writerow(("slides/c.svs", "tumour", "p1", 61))
    write(folder / "table.jsonl", ROWS)
    return folder


ROWS: list[dict[str, Any]] = [
    {"wsi_id": "b", "position": ["600", "301"], "caption": "third of b"},
    {"wsi_id": "a.svs", "position": ["5", "3"], "caption": "of a"},
    {"wsi_id": "b", "position": ["10", "20"], "caption": "first of b"},
    {"wsi_id": "b", "position": ["300", "20"], "caption": "second of b"},
    {"wsi_id": "b", "position": ["10", "20"], "caption": "first of b, again"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(folder: Path, index: Path | None = None, **config: Any) -> SlideSource:
    (source,) = open_sources([config], index=index or folder / "index")
    assert isinstance(source, SlideSource)
    return source


def cohort(folder: Path, index: Path | None = None, /, **config: Any) -> SlideSource:
    slides = GRID | {"cohort": str(folder / "slides.csv")} | config.pop("slides", {})
    return opened(folder, index, slides=slides, **{"caption": "label"} | config)


def table(folder: Path, path: Path | None = None, **slides: Any) -> SlideSource:
    slides = {"table": str(path or folder / "table.jsonl"), "root": str(folder / "slides")} | slides
    return opened(folder, slides={"size": 128, "mpp": 0.5} | slides)


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


# A cohort


def test_a_stored_tile_passes_through_and_others_are_encoded_finely(folder: Path) -> None:
    source = cohort(folder)
    assert len(source) == 3 * 16  # of 5 x 4 those of which half is inside: all but the last column's
    for i in range(len(source)):
        raw = source.read(i, want_meta=True)
        assert raw.meta is not None
        name, x, y = (raw.meta[k] for k in ("slide", "x", "y"))
        path = folder / "slides" / f"{name}.svs"
        with open_slide(path) as slide:
            truth = slide.read(0, x, y, 256, 256)
        whole = x + 256 <= 1100 and y + 256 <= 900
        if ENCODINGS[name] is not LOSSLESS and whole:
            scan = tile_bytes(path, 0, x // 256, y // 256)
            assert raw.image[-200:] == scan[-200:]  # its compressed pixels, not ones that were compressed twice
            assert np.array_equal(read_image(raw.image, Preprocess(size=(256, 256)), exact=True), truth)
        else:
            assert 0 < np.abs(pixels(raw.image).astype(int) - truth).mean() < 1.5
        # The fast path looks at the colour marker too: an RGB tile that is taken for YCbCr is 50 levels off.
        small = read_image(raw.image, Preprocess(size=(64, 64)))
        area = truth.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(small - area).mean() < 2.5


def test_exact_pixels_are_png_of_the_slides_own(folder: Path) -> None:
    source = cohort(folder, slides={"size": 100, "mpp": 0.5, "exact": True})
    raw = source.read(7, want_meta=True)
    assert raw.meta is not None and raw.image[:4] == b"\x89PNG"
    with open_slide(folder / "slides" / f"{raw.meta['slide']}.svs") as slide:
        one = geometry(slide, size=100, mpp=0.5)
        coords = np.asarray([[raw.meta["x"], raw.meta["y"]]])
        (chunk,) = read_patches(slide, one, coords, lambda pixels, status: pixels, exact=True)
    assert np.array_equal(pixels(raw.image), chunk.value[0])


def test_recoloured_tiles_do_not_pass_through(folder: Path, tmp_path: Path) -> None:
    Image.fromarray(toy_pixels(300, 200, seed=9)[0][..., ::-1]).save(tmp_path / "target.png")
    stain = {"stain": "reinhard", "stain_target": str(tmp_path / "target.png"), "exact": True}
    asis, stained = cohort(folder, slides={"exact": True}), cohort(folder, slides=stain)
    assert asis.read(5).image[:2] == b"\xff\xd8"  # the stored tile is exact by itself
    before, after = (pixels(source.read(5).image).astype(int) for source in (asis, stained))
    tissue = before.min(-1) < 200
    assert tissue.sum() > 1000 and before[tissue].mean(0)[2] < before[tissue].mean(0)[0]
    assert after[tissue].mean(0)[2] > after[tissue].mean(0)[0]  # blue, as the target
    assert asis.fingerprint() != stained.fingerprint()


def test_metadata_is_provenance_and_the_tables_columns(folder: Path) -> None:
    source = cohort(folder, slides={"mpp": 0.5, "size": 100})
    raw = source.read(1, want_meta=True)
    assert raw.meta is not None
    assert raw.meta == {
        "label": "tumour", "patient": "p1", "age": 61, "slide": "a", "x": 200, "y": 0, "mpp": 0.5, "level": 0,
        "read_size": 200, "size": 100, "coverage": 1.0,
    }  # fmt: skip
    assert (raw.key, source.read(1).meta) == ("a_200_0", None)
    assert source.fields(1) == {"key": "a_200_0", "caption": None, **raw.meta}
    assert source.caption.all(raw) == ["tumour"]
    assert len({source.key(i) for i in range(len(source))}) == len(source)


def test_tissue_is_what_a_cohort_gives(folder: Path) -> None:
    toy = toy_slide(folder / "toy" / "t.svs", 1600, 1200, mpp=0.5)
    source = opened(folder, slides={"cohort": str(folder / "toy"), "size": 64, "mpp": 0.5}, caption=False)
    shares = [
        float(toy.tissue[meta["y"] : meta["y"] + 64, meta["x"] : meta["x"] + 64].mean())
        for meta in (source.fields(i) for i in range(len(source)))
    ]
    missed = sum(
        toy.tissue[y : y + 64, x : x + 64].mean() > 0.7 for y in range(0, 1200, 64) for x in range(0, 1600, 64)
    ) - sum(share > 0.7 for share in shares)
    assert np.mean(np.asarray(shares) > 0.2) > 0.97 and np.mean(shares) > 0.85 and missed == 0


def test_filter_split_and_keep(folder: Path, tmp_path: Path) -> None:
    whole = cohort(folder)
    grown = cohort(folder, filter="age > 18 and x >= 512")
    assert [grown.key(i) for i in range(len(grown))] == [
        whole.key(i) for i in range(len(whole)) if whole.fields(i)["age"] == 61 and whole.fields(i)["x"] >= 512
    ]
    parts = [cohort(folder, split={"by": "patient", "part": p, "seed": 0}) for p in ("train", "test")]
    assert sorted(len(part) for part in parts) == [16, 32]
    patients = [{part.fields(i)["patient"] for i in range(len(part))} for part in parts]
    assert not patients[0] & patients[1]
    (tmp_path / "keep.txt").write_text("c_256_512\na_0_0\n")
    kept = cohort(folder, keep=str(tmp_path / "keep.txt"))
    assert [kept.key(i) for i in range(len(kept))] == ["a_0_0", "c_256_512"]
    assert kept.read(1) == whole.read([whole.key(i) for i in range(48)].index("c_256_512"))
    assert len({source.fingerprint() for source in (whole, grown, *parts, kept)}) == 5
    assert cohort(folder).fingerprint() == whole.fingerprint()


def test_chunks_keep_neighbours_together_in_runs_of_one_slide(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medclip.data.slide_source._RUN", 5)
    source = cohort(folder)
    assert source.chunks.tolist() == [0, 5, 10, 15, 16, 21, 26, 31, 32, 37, 42, 47]
    rows = [source.fields(i) for i in range(16)]
    assert [(row["y"], row["x"]) for row in rows] == sorted((row["y"], row["x"]) for row in rows)
    assert source.select(np.asarray([3, 4, 7, 40])).chunks.tolist() == [0, 2, 3]
    assert source.select(np.asarray([], np.int64)).chunks.tolist() == []


def test_plans_are_made_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = opening.make_plan

    def counted(slide: Any, name: str, request: Any) -> Any:
        made.append(name)
        return original(slide, name, request)

    monkeypatch.setattr(opening, "make_plan", counted)
    first = cohort(folder, tmp_path)
    again = cohort(folder, tmp_path)
    assert sorted(made) == ["a", "b", "c"] and again.fingerprint() == first.fingerprint()
    cohort(folder, tmp_path, slides={"coverage": 0.9})
    assert len(made) == 6  # another question
    for path in tmp_path.glob("*.plan.npz"):
        path.write_bytes(path.read_bytes()[:300])
    assert cohort(folder, tmp_path).fingerprint() == first.fingerprint() and len(made) == 9
    path = folder / "slides" / "b.svs"
    path.touch()
    cohort(folder, tmp_path)
    assert made[9:] == ["b"]


def test_a_changed_mask_is_another_plan(folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()

    def left(share: float) -> int:
        mask = np.zeros((90, 110), np.uint8)
        mask[:, : int(110 * share)] = 255
        for name in "abc":
            Image.fromarray(mask).save(masks / f"{name}.png")
        return len(cohort(folder, tmp_path / "index", slides={"masks": str(masks), "size": 100, "tissue": "robust"}))

    assert (left(1.0), left(0.5)) == (3 * 99, 3 * 54)  # 11 x 9; half of 1100 is 5.5 columns, half of one is enough


def test_a_broken_slide_is_left_out_and_named(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    truncate(toy_slide(tmp_path / "s" / "cut.svs", 700, 500).path, 0.3)
    toy_slide(tmp_path / "s" / "whole.svs", 700, 500)
    config = {"slides": GRID | {"cohort": str(tmp_path / "s")}, "caption": False}
    with caplog.at_level(logging.WARNING):
        source = opened(tmp_path, **config)
    assert {source.fields(i)["slide"] for i in range(len(source))} == {"whole"}
    ((slide, reason, detail),) = source.problems
    assert (slide, reason) == ("cut", "broken slide") and "cut.svs" in detail and "cut.svs" in caplog.text
    (tmp_path / "s" / "whole.svs").unlink()
    with pytest.raises(UserError, match=r"source slides is empty: of 1 slides .*cut\.svs"):
        opened(tmp_path, **config)


def test_a_broken_tile_is_a_bad_sample(tmp_path: Path) -> None:
    for name, breaking in (("tile", 256), ("part", 200)):
        path = break_header(toy_slide(tmp_path / name / "s.svs", 1100, 900).path, 0, 1, 2)
        config = {"slides": GRID | {"cohort": str(path.parent), "size": breaking}, "caption": False}
        source = opened(tmp_path, **config)
        bad = []
        for i in range(len(source)):
            try:
                source.read(i)
            except BadSample as failure:
                assert failure.reason == "broken image" and "s.svs: tile (1, 2) of level 0" in failure.detail
                bad.append(source.key(i))
        expected = [
            f"s_{x}_{y}"
            for y in range(0, 900, breaking)
            for x in range(0, 1100, breaking)
            if 256 - breaking < x < 512 and 512 - breaking < y < 768 and x + breaking / 2 <= 1100 and y + 100 <= 900
        ]
        assert sorted(bad) == sorted(expected)


def test_a_slide_that_went_away_is_a_read_error(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "s.svs", 700, 500).path
    source = opened(tmp_path, slides=GRID | {"cohort": str(path)}, caption=False)
    path.unlink()
    with pytest.raises(BadSample, match=r"read error: .*s\.svs: no such file"):
        source.read(0)


# A table


def test_a_rows_caption_goes_with_the_field_at_its_place(folder: Path) -> None:
    source = table(folder)
    texts = ["of a", "first of b", "first of b, again", "second of b", "third of b"]
    assert [source.read(i).text for i in range(5)] == texts and not source.problems
    assert [source.key(i) for i in range(5)] == ["a_5_3", "b_10_20", "b_10_20_1", "b_300_20", "b_600_301"]
    for i in range(5):
        raw = source.read(i, want_meta=True)
        assert raw.meta is not None and (raw.meta["mpp"], raw.meta["size"]) == (0.5, 128)
        x, y = map(int, raw.meta["position"])
        assert (raw.meta["x"], raw.meta["y"], raw.meta["caption"]) == (x, y, texts[i])
        with open_slide(folder / "slides" / f"{raw.meta['slide']}.svs") as slide:
            field = slide.read(0, x, y, 256, 256)  # 128 pixels of 0.5 µm, the slide's are of 0.25
        area = field.reshape(128, 2, 128, 2, 3).mean((1, 3))
        assert np.abs(pixels(raw.image) - area).mean() < 2


def test_pathgens_own_code_reads_level_0_pixels_whatever_they_measure(folder: Path) -> None:
    official = table(folder, side=400, size=200)
    raw = official.read(3, want_meta=True)
    assert raw.meta is not None and (raw.meta["mpp"], raw.meta["read_size"]) == (0.5, 400)
    with open_slide(folder / "slides" / "b.svs") as slide:
        field = slide.read(0, 300, 20, 400, 400)
    assert np.abs(pixels(raw.image) - field.reshape(200, 2, 200, 2, 3).mean((1, 3))).mean() < 2
    coarse = table(folder, slide_mpp=0.5, size=200, side=400)
    assert coarse.read(3) == raw or coarse.read(3).image == raw.image  # the same field, though its mpp is another
    assert coarse.fields(3)["mpp"] == 1.0


@pytest.mark.parametrize("ending", ["json", "csv", "tsv", "parquet", "xy"])
def test_tables_of_all_kinds_say_the_same(folder: Path, tmp_path: Path, ending: str) -> None:
    frame = pd.DataFrame(ROWS)
    path = tmp_path / f"table.{ending}"
    if ending == "json":
        path.write_text(json.dumps(ROWS))
    elif ending == "parquet":
        frame.to_parquet(path)
    elif ending == "xy":
        path = tmp_path / "xy.csv"
        frame["x"], frame["y"] = zip(*frame["position"], strict=True)
        frame.drop(columns="position").rename(columns={"wsi_id": "slide"}).to_csv(path, index=False)
    else:
        frame["position"] = [f"[{x}, {y}]" for x, y in frame["position"]]
        frame.to_csv(path, index=False, sep="," if ending == "csv" else "\t")
    plain, other = table(folder), table(folder, path)
    assert [other.read(i) for i in range(5)] == [plain.read(i) for i in range(5)]


def test_rows_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        [
            *ROWS,
            {"wsi_id": "z", "position": [1, 2], "caption": "none such"},
            {"wsi_id": "a", "position": [1, 2]},
            {"wsi_id": "a", "position": [1, 2], "caption": None},
            {"position": [1, 2], "caption": "whose?"},
            {"wsi_id": "a", "position": "here", "caption": "where?"},
            {"wsi_id": "a", "caption": "nowhere"},
            {"wsi_id": "a", "position": [1100, 2], "caption": "outside"},
            {"wsi_id": "a", "position": [-1, 2], "caption": "outside too"},
            {"wsi_id": "a", "position": [float("inf"), 2], "caption": "far"},
        ],
    )
    source = table(folder, path)
    assert len(source) == 5
    assert [(key, reason) for key, reason, _ in source.problems] == [
        ("z_1_2", "missing slide"),
        ("a_1_2", "missing caption"),
        ("a_1_2", "missing caption"),
        ("row 9", "missing slide"),
        ("row 10", "missing position"),
        ("row 11", "missing position"),
        ("row 14", "missing position"),
        ("a_1100_2", "outside the slide"),
        ("a_-1_2", "outside the slide"),
    ]
    assert "z is not among the slides" in source.problems[0][2] and "here" in source.problems[4][2]
    write(path, [{"wsi_id": "z", "position": [1, 2], "caption": "none such"}])
    with pytest.raises(UserError, match=r"no patch of table .* can be used, e.g. z is not among the slides"):
        table(folder, path)
    write(path, [{"wsi_id": "a", "position": [5000, 2], "caption": "far"}])
    with pytest.raises(UserError, match=r"no patch of table .* can be read, e.g. \(5000, 2\) is not in"):
        table(folder, path)


def test_a_table_finer_than_its_slides_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no patch of table .* can be read, e.g. .\.svs: its finest pixels are 0.25"):
        table(folder, mpp=0.1)
    assert table(folder, mpp=0.1, upsample=True).fields(0)["mpp"] == pytest.approx(0.1, rel=0.02)


def test_the_slides_of_a_table_may_come_from_a_csv(folder: Path) -> None:
    source = table(folder, root=str(folder / "slides.csv"))
    assert source.fields(1)["patient"] == "p2" and source.read(1).text == "first of b"


def test_a_file_name_of_two_slides_is_nobodys(tmp_path: Path) -> None:
    named = [{"slide": name, "position": [1, 2]} for name in ("s", "one", "two", "t.svs", "t")]
    entries = [Entry("one", "x/s.svs"), Entry("two", "y/s.svs"), Entry("three", "y/t.svs")]
    rows, text, problems = slide_rows(str(write(tmp_path / "t.jsonl", named)), entries, CaptionRule(wanted=False))
    assert {number: len(found) for number, (found, _) in rows.items()} == {0: 1, 1: 1, 2: 2}
    assert text is None and [problem[:2] for problem in problems] == [("s_1_2", "missing slide")]


# In use


def test_it_is_cheap_to_copy_and_reads_the_same_elsewhere(folder: Path) -> None:
    source = cohort(folder)
    source.read(0)
    blob = pickle.dumps(source)
    assert len(blob) < 20_000
    assert pickle.loads(blob).read(20) == source.read(20)


def test_shards_hold_what_the_slides_hold(folder: Path, tmp_path: Path) -> None:
    source = table(folder)
    done = make_shards(source, tmp_path / "shards", samples_per_shard=2)
    assert (done.shards, done.samples, done.skipped) == (3, 5, 0)
    (back,) = open_sources([{"urls": f"{tmp_path}/shards"}], index=tmp_path / "index")
    assert [back.read(i, want_meta=True) for i in range(5)] == [source.read(i, want_meta=True) for i in range(5)]


def test_the_script_writes_shards_of_slides(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["--size", "128", "--mpp", "0.5", "--out"]
    table = ["--table", str(folder / "table.jsonl"), "--slide-root", str(folder / "slides"), *common]
    slides = ["--slides", str(folder / "slides.csv"), "--caption", "label", *common]
    for words, out, count in ((table, "a", 5), (slides, "b", 0)):
        monkeypatch.setattr("sys.argv", ["make_shards", *words, str(tmp_path / out)])
        assert script.main() == 0
        (back,) = open_sources([{"urls": f"{tmp_path / out}"}], index=tmp_path / "index")
        (source,) = open_sources(
            [{"slides": {"cohort": str(folder / "slides.csv"), "size": 128, "mpp": 0.5}, "caption": "label"}],
            index=tmp_path / "index",
        )
        assert len(back) == (count or len(source)) > 0
    assert {str(back.read(i).text) for i in range(len(back))} == {"tumour", "normal"}
    monkeypatch.setattr("sys.argv", ["make_shards", *slides, str(tmp_path / "c"), "--slide-root", "x"])
    with pytest.raises(SystemExit):
        script.main()


def test_evaluation_sets_have_labels_and_groups(folder: Path) -> None:
    config = {"slides": GRID | {"cohort": str(folder / "slides.csv")}, "filter": "x == 256"}
    found = EvalSet([config], label="label", group="patient", index=folder / "index")
    about = [meta for batch in found.batches(Preprocess(size=(32, 32)), 8) for meta in batch.get("meta", [])]
    assert len(about) == 12 and not found.bad
    assert {(meta["label"], meta["group"]) for meta in about} == {("tumour", "p1"), ("normal", "p2")}


def mixed(folder: Path) -> list[dict[str, Any]]:
    return [
        {"slides": GRID | {"cohort": str(folder / "slides.csv")}, "caption": "label", "weight": 0.5},
        {
            "slides": {"table": str(folder / "table.jsonl"), "root": str(folder / "slides"), "size": 128, "mpp": 0.5},
            "weight": 2,
        },
        {"phantoms": {"kind": "histology", "samples": 6, "size": 64}},
    ]


def test_slides_are_weighted_among_other_sources_and_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    whole = [trace(b) for b in data("", tmp_path, sources=mixed(folder), epochs=2).train_dataloader()]
    assert len(keys(data("", tmp_path, sources=mixed(folder)).train_dataloader())) == 24 + 10 + 6
    first = data("", tmp_path, sources=mixed(folder), epochs=2)
    batches = iter(first.train_dataloader())
    before = [trace(next(batches)) for _ in range(6)]
    second = data("", tmp_path, sources=mixed(folder), epochs=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [trace(b) for b in second.train_dataloader()] == whole


def test_training_takes_steps_on_slides(folder: Path, tmp_path: Path) -> None:
    words = [word for word in TINY if not word.startswith("data.sources")]
    cfg = composed("train", "experiment=tiny", *words, f"output={tmp_path / 'run'}", "max_steps=2", "data.workers=1")
    OmegaConf.update(cfg, "data.sources", mixed(folder), force_add=True)
    OmegaConf.update(cfg, "data.storage", {"index": str(tmp_path / "index")}, force_add=True)
    trainer = train(cfg)
    assert trainer.global_step == 2 and np.isfinite(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("slides/*.svs", "slides is 'slides/.*', not a mapping"),
        ({}, "slides needs one of cohort and table"),
        ({"cohort": "x", "table": "y"}, "slides needs one of cohort and table"),
        ({"cohort": "nowhere/*.svs"}, "no slide in nowhere"),
        ({"cohort": "x", "root": "y"}, r"has keys \['root'\] that do not fit: use cohort, slide_mpp, size"),
        ({"cohort": "x", "colour": 1}, r"has keys \['colour'\]"),
        (
            {"table": "x", "root": "y", "coverage": 0.5},
            r"has keys \['coverage'\] that do not fit: use table, root, side",
        ),
        ({"table": "x"}, "slides.root is missing: the folder that holds the slides of x"),
        ({"table": "x", "root": "y", "side": "wide"}, "slides.side is 'wide': give level-0 pixels"),
        ({"cohort": "x", "mpp": -1}, "mpp is -1: choose"),
        ({"cohort": "x", "size": "large"}, "size"),
        ({"cohort": "x", "slide_mpp": "half"}, "half"),
    ],
)
def test_configs_that_do_not_fit_get_one_line(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_slides("s", config, CaptionRule(), folder=tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("source s")


def test_a_cohort_without_captions_says_which_columns_there_are(folder: Path) -> None:
    with pytest.raises(UserError, match=r"set caption to a column of its CSV \(there are: label, patient, age\)"):
        cohort(folder, caption=None)
    with pytest.raises(UserError, match="no sample has the field 'grade'"):
        cohort(folder, filter="grade > 1")


@pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")
def test_a_real_slides_patches_are_openslides_own(tmp_path: Path) -> None:
    import openslide

    path = DATA / "wsi" / "CMU-1-Small-Region.svs"
    config = {"slides": {"cohort": str(path), "size": 200, "mpp": None, "exact": True}, "caption": False}
    source = opened(tmp_path, **config)
    assert len(source) > 50
    with openslide.OpenSlide(path) as slide:
        for i in range(0, len(source), 7):
            raw = source.read(i, want_meta=True)
            assert raw.meta is not None and 0.49 < raw.meta["mpp"] < 0.51
            x, y = raw.meta["x"], raw.meta["y"]
            inside = (slice(0, slide.dimensions[1] - y), slice(0, slide.dimensions[0] - x))
            own = np.asarray(slide.read_region((x, y), 0, (200, 200)).convert("RGB"))
            assert np.array_equal(pixels(raw.image)[inside], own[inside])
