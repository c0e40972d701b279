"""Phantoms as a source, and as shards in BIOMEDICA's layout that read back the same."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from medclip.data.captions import CaptionRule
from medclip.data.generated import PhantomSource, Recipe, open_phantoms, run_lengths
from medclip.data.make_shards import make_shards
from medclip.data.sources import open_sources
from medclip.phantoms.generate import generate
from medclip.types import UserError

XRAY = {"kind": "xray", "samples": 13, "seed": 6, "size": 80, "per_patient": 3, "masks": True}


def source(**changes: object) -> PhantomSource:
    return open_phantoms("p", XRAY | changes, CaptionRule())


def decode(code: dict[str, list[int]]) -> np.ndarray:
    """COCO's run lengths read naively: column by column, zeros first."""
    height, width = code["size"]
    values: list[bool] = []
    for turn, count in enumerate(code["counts"]):
        values += [turn % 2 == 1] * count
    return np.asarray(values, bool).reshape(width, height).T


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
@settings(max_examples=300, deadline=None)
def test_run_lengths_decode_to_the_mask(mask: np.ndarray) -> None:
    code = run_lengths(mask)
    assert sum(code["counts"]) == mask.size and all(count > 0 for count in code["counts"][1:])
    assert np.array_equal(decode(code), mask)


def test_run_lengths_of_a_known_mask() -> None:
    mask = np.asarray([[1, 0, 0], [1, 0, 1]], bool)
    assert run_lengths(mask) == {"size": [2, 3], "counts": [0, 2, 3, 1]}  # 11 00 01, by columns, as COCO's tools write


def test_a_sample_is_the_phantom_with_its_truth() -> None:
    opened = source()
    phantoms = generate("xray", 6, range(13), 80, per_patient=3, masks=True)
    for i, phantom in enumerate(phantoms):
        raw = opened.read(i)
        image = np.asarray(Image.open(io.BytesIO(raw.image)).convert("RGB")).astype(int)
        assert image.shape == (80, 80, 3) and np.abs(image - phantom.image).mean() < 3  # JPEG
        assert raw.text == phantom.captions[0] and raw.meta is not None
        truth = raw.meta["phantom"]
        assert truth["label"] == phantom.label and truth["captions"] == phantom.captions
        assert truth["attributes"] == phantom.attributes and truth["patient"] == phantom.patient
        assert [(box["name"], *box["xyxy"]) for box in truth["boxes"]] == phantom.boxes
        assert truth["masks"].keys() == phantom.masks.keys()
        for name, code in truth["masks"].items():
            assert np.array_equal(decode(code), phantom.masks[name])
        assert generate(*(truth["recipe"][k] for k in ("kind", "seed")), [i], truth["recipe"]["size"], per_patient=3)


@pytest.mark.parametrize(("kind", "primary"), [("histology", "Microscopy"), ("xray", "Clinical Imaging")])
def test_metadata_has_biomedicas_fields(kind: str, primary: str) -> None:
    opened = source(kind=kind)
    meta = opened.read(4).meta
    assert meta is not None and meta["image_primary_label"] == [primary] and len(meta["image_secondary_label"]) == 1
    assert meta["image_size"] == [80, 80] and meta["image_panel_type"] == "Single"
    assert meta["article_accession_id"] == meta["phantom"]["patient"] == f"{kind}-6-00001"
    assert meta["article_license"] and meta["article_title"] and meta["image_file_name"].endswith(".jpg")
    assert orjson.loads(orjson.dumps(meta)) == meta  # plain lists, strings and numbers only
    assert opened.fields(4) == {"key": opened.key(4), "caption": opened.read(4).text} | meta


def test_keys_are_unique_over_seeds_and_kinds() -> None:
    sources = [source(kind=kind, seed=seed) for kind in ("histology", "xray") for seed in (0, 1)]
    keys = [opened.key(i) for opened in sources for i in range(13)]
    assert len(set(keys)) == len(keys) == 52
    assert all("-" in key and "." in key and "/" not in key for key in keys)


def test_selecting_keeps_the_samples_and_changes_the_fingerprint() -> None:
    whole = source()
    part = whole.select(np.asarray([2, 7, 12]))
    assert len(part) == 3 and [part.key(i) for i in range(3)] == [whole.key(i) for i in (2, 7, 12)]
    assert part.read(1) == whole.read(7)
    assert len({whole.fingerprint(), part.fingerprint(), source(seed=7).fingerprint()}) == 3
    assert pickle.loads(pickle.dumps(part)).read(1) == part.read(1)


@pytest.mark.parametrize("kind", ["histology", "xray"])
def test_shards_read_back_the_same(kind: str, tmp_path: Path) -> None:
    (drawn,) = open_sources([{"phantoms": XRAY | {"kind": kind}}], index=tmp_path / "index")
    done = make_shards(drawn, tmp_path / "shards", samples_per_shard=5, processes=1)
    assert (done.shards, done.samples, done.skipped) == (3, 13, 0)
    (stored,) = open_sources([{"urls": str(tmp_path / "shards" / "*.tar")}], index=tmp_path / "index")
    assert len(stored) == 13
    for i in range(13):
        before, after = drawn.read(i, want_meta=True), stored.read(i, want_meta=True)
        assert (after.key, after.text, after.image) == (before.key, before.text, before.image)
        assert after.meta == before.meta


def test_shards_are_filtered_and_split_by_patient(tmp_path: Path) -> None:
    (drawn,) = open_sources([{"phantoms": XRAY | {"masks": False}}], index=tmp_path / "index")
    make_shards(drawn, tmp_path / "shards", samples_per_shard=13, processes=1)
    config = {"urls": str(tmp_path / "shards" / "*.tar"), "filter": 'phantom.attributes.view == "AP"'}
    views = [drawn.read(i, want_meta=True).meta["phantom"]["attributes"]["view"] for i in range(13)]
    (chosen,) = open_sources([config], index=tmp_path / "index")
    assert [chosen.key(i) for i in range(len(chosen))] == [drawn.key(i) for i in range(13) if views[i] == "AP"]
    split = {"by": "phantom.patient", "fraction": 0.4, "seed": 0}
    parts = [
        open_sources([{"urls": config["urls"], "split": split | {"part": part}}], index=tmp_path / "index")[0]
        for part in ("train", "test")
    ]
    patients = [{part.read(i, want_meta=True).meta["phantom"]["patient"] for i in range(len(part))} for part in parts]
    assert not patients[0] & patients[1] and sum(map(len, parts)) == 13


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "ct", "samples": 3}, "phantoms.kind is 'ct': choose one of histology, xray"),
        ({"kind": "xray"}, "phantoms lacks samples"),
        ({}, "phantoms lacks kind and samples"),
        ({"kind": "xray", "samples": 3, "colour": 1}, r"unknown keys \['colour'\]: use kind, samples, seed"),
        ({"kind": "xray", "samples": 0}, "phantoms.samples is 0: choose 1 to"),
        ({"kind": "xray", "samples": "many"}, "phantoms.samples is 'many': choose 1 to"),
        ({"kind": "xray", "samples": 2.5}, "phantoms.samples is 2.5"),
        ({"kind": "xray", "samples": 3, "seed": -1}, "phantoms.seed is -1: choose 0 to"),
        ({"kind": "xray", "samples": 3, "size": 4000}, "phantoms.size is 4000: choose 64 to 1024"),
        ({"kind": "xray", "samples": 3, "per_patient": 0}, "phantoms.per_patient is 0: choose 1 to"),
        ({"kind": "xray", "samples": 3, "quality": 101}, "phantoms.quality is 101: choose 1 to 100"),
        ({"kind": "xray", "samples": 3, "masks": "yes"}, "phantoms.masks is 'yes': choose true or false"),
        ("xray", "phantoms is 'xray', not a mapping"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_in_one_line(config: dict, message: str) -> None:
    for attempt in (lambda: Recipe.parse(config), lambda: open_sources([{"phantoms": config}])):
        with pytest.raises(UserError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
