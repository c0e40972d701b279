"""Evaluation sets: every sample with its label, captions and group, in file order; what was skipped is listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from medclip.data.decode import read_image
from medclip.data.evalset import EvalSet
from medclip.types import Preprocess, UserError
from tests.conftest import jpeg, write_tar

SMALL = Preprocess(size=(16, 16))
RNG = np.random.default_rng(0)
IMAGES = [jpeg(RNG) for _ in range(10)]


def shard(path: Path, **changes: dict[str, bytes]) -> str:
    """Ten samples k0…k9 of two classes and three patients; `changes` replaces members, None leaves one out."""
    samples = []
    for i in range(10):
        meta = {
            "label": ["lung", "skin"][i % 2],
            "patient": f"p{i % 3}",
            "others": ["x", "y"],
            "one": ["z"],
            "alt": [f"a{i}"],
        }
        sample = {"key": b"k%d" % i, "jpg": IMAGES[i], "txt": b"caption %d" % i, "json": orjson.dumps(meta)}
        samples.append({k: v for k, v in (sample | changes.get(f"k{i}", {})).items() if v is not None})
    write_tar(path, samples)
    return str(path)


def opened(folder: Path, changes: dict[str, dict[str, Any]] | None = None, **options: Any) -> EvalSet:
    return EvalSet([{"urls": shard(folder / "0.tar", **(changes or {}))}], index=folder / "index", **options)


def rows(data: EvalSet, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    return [pair for batch in data.batches(SMALL, **options) for pair in zip(batch["key"], batch["meta"], strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_in_order_with_everything(tmp_path: Path, workers: int) -> None:
    data = opened(tmp_path, label="label", captions=True, group="patient")
    found = rows(data, batch_size=4, workers=workers)
    assert [key for key, _ in found] == [f"k{i}" for i in range(10)]
    for i, (_, meta) in enumerate(found):
        assert (meta["label"], meta["captions"], meta["group"]) == (
            ["lung", "skin"][i % 2],
            [f"caption {i}"],
            f"p{i % 3}",
        )
        assert meta["raw"]["others"] == ["x", "y"]
    assert data.bad == [] and len(data) == 10


def test_pixels_and_padding(tmp_path: Path) -> None:
    batches = list(opened(tmp_path).batches(SMALL, batch_size=4))
    assert [len(batch["key"]) for batch in batches] == [4, 4, 2]
    assert all(batch["image"].shape == (4, 3, 16, 16) for batch in batches)
    assert not batches[2]["image"][2:].any()
    expected = read_image(IMAGES[9], SMALL, exact=True)
    assert np.array_equal(batches[2]["image"][1].permute(1, 2, 0).numpy(), expected)


def test_a_second_pass_is_the_same(tmp_path: Path) -> None:
    data = opened(tmp_path, {"k3": {"jpg": b"broken"}})
    assert rows(data) == rows(data)
    assert len(data.bad) == 1  # and is not counted twice


def test_labels_and_captions_from_fields_and_lists(tmp_path: Path) -> None:
    found = rows(opened(tmp_path, label="one", captions="alt"))
    assert {meta["label"] for _, meta in found} == {"z"}  # a list of one is that one
    assert [meta["captions"] for _, meta in found] == [[f"a{i}"] for i in range(10)]
    several = rows(opened(tmp_path, captions={"fields": ["txt", "others"]}))
    assert several[4][1]["captions"] == ["caption 4", "x", "y"]


def test_label_that_is_a_list_of_several_is_skipped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all 10 samples were skipped, the first \(k0\) for missing label"):
        rows(opened(tmp_path, label="others"))


def test_without_a_group_each_sample_is_its_own(tmp_path: Path) -> None:
    """Also where two sources, or two shards, number their keys alike."""
    one, two = (tmp_path / name for name in ("one", "two"))
    sources = []
    for folder in (one, two):
        folder.mkdir()
        sources.append({"urls": shard(folder / "0.tar")})
    found = rows(EvalSet(sources, index=tmp_path / "index"))
    assert len(found) == 20 and len({meta["group"] for _, meta in found}) == 20
    assert len({key for key, _ in found}) == 10


def test_skipped_are_listed(tmp_path: Path) -> None:
    changes = {
        "k1": {"jpg": IMAGES[1][:200]},
        "k2": {"json": b"{"},
        "k4": {"txt": b" No caption found. "},
        "k5": {"txt": None},
        "k6": {"json": orjson.dumps({"patient": "p0"})},
        "k8": {"jpg": None},
    }
    data = opened(tmp_path, changes, label="label", captions=True, group="patient")
    assert [key for key, _ in rows(data)] == ["k0", "k3", "k7", "k9"]
    assert {key: reason for key, reason, _ in data.bad} == {
        "k1": "broken image",
        "k2": "broken metadata",
        "k4": "empty caption",
        "k5": "missing caption",
        "k6": "missing label",
        "k8": "missing image",
    }


def test_limit_is_spread_and_the_same_every_time(tmp_path: Path) -> None:
    first, again = (opened(tmp_path, limit=4) for _ in range(2))
    keys = [key for key, _ in rows(first)]
    assert len(first) == len(keys) == 4 and keys == [key for key, _ in rows(again)]
    assert keys == sorted(keys) and keys != ["k0", "k1", "k2", "k3"]
    assert len(opened(tmp_path, limit=100)) == 10


def test_over_limit_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="over pixel limit"):
        rows(opened(tmp_path, max_pixels=1000))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"label": "lable"}, r"no field 'lable' for the label; the fields are: key, caption, label, patient"),
        ({"group": "case"}, "no field 'case' for the group"),
        ({"captions": "text"}, "no field 'text' for the captions"),
        ({"storage": {"retries": 1}}, "unknown keys"),
        ({"limit": 0}, "is empty"),
    ],
)
def test_bad_options_get_one_line(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        opened(tmp_path, **options)


def test_no_source_at_all() -> None:
    with pytest.raises(UserError, match="is empty"):
        EvalSet([])


def test_settings_of_training_serve(tmp_path: Path) -> None:
    url = shard(tmp_path / "0.tar")
    data = EvalSet([{"urls": url}], storage={"index": tmp_path / "here", "tries": 2, "cache": False})
    assert len(data) == 10 and list((tmp_path / "here").iterdir())


def test_class_folders_and_filters(tmp_path: Path) -> None:
    for name in ("skin/a", "lung/b", "lung/c"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / f"{name}.jpg").write_bytes(IMAGES[0])
    found = rows(EvalSet([{"folder": str(tmp_path / "f")}], label="label", index=tmp_path / "index"))
    assert [(key, meta["label"]) for key, meta in found] == [("lung/b", "lung"), ("lung/c", "lung"), ("skin/a", "skin")]
    lungs = [{"folder": str(tmp_path / "f"), "filter": 'label == "lung"'}]
    assert len(EvalSet(lungs, label="label", index=tmp_path / "index")) == 2
