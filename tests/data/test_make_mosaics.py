"""Mosaics hold the tiles that their truth says, and no group of tiles is in two parts."""

from __future__ import annotations

import csv
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import pytest
import shapely
from shapely.geometry import shape

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_mosaics.py"
_spec = spec_from_file_location("make_mosaics", SCRIPT)
assert _spec and _spec.loader
make_mosaics = module_from_spec(_spec)
sys.modules["make_mosaics"] = make_mosaics  # where its dataclasses look for their annotations
_spec.loader.exec_module(make_mosaics)

SIDE = 64
RECIPE = [*("--background", "benign", "--plant", "adeno", "squamous", "--side", str(SIDE), "--group", "tissue")]
SIZES = [*("--slides", "18", "--cells", "5", "7", "--share", "0.1", "0.2", "--per-patient", "2", "--seed", "3")]
HUES = {"benign": (230, 160, 190), "adeno": (90, 40, 160), "squamous": (40, 120, 60)}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten tissues of each class with two tiles, of one colour but for a mark in a corner."""
    folder = tmp_path_factory.mktemp("tiles")
    lines = []
    for label, hue in HUES.items():
        for number in range(20):
            image = np.full((SIDE, SIDE, 3), hue, np.uint8) - np.uint8(number)
            image[:24, :16] = 255
            name = f"{label}-{number}.png"
            cv2.imwrite(str(folder / name), image[..., ::-1])
            lines.append(json.dumps({"image": name, "label": label, "tissue": f"{label}-{number // 2}"}) + "\n")
    (folder / "labels.jsonl").write_text("".join(lines))
    return folder / "labels.jsonl"


@pytest.fixture(scope="module")
def made(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    assert make_mosaics.main(["--table", str(table), *RECIPE, *SIZES, "--out", str(out)]) == 0
    return out


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def regions(made: Path, slide: str) -> dict[str, Any]:
    features = json.loads((made / "truth" / f"{slide}.geojson").read_text())["features"]
    labels = {feature["properties"]["classification"]["name"] for feature in features}
    return {
        label: shapely.union_all(
            [shape(f["geometry"]) for f in features if f["properties"]["classification"]["name"] == label]
        )
        for label in labels
    }


def test_truth_table_and_pixels_are_of_one_mind(made: Path) -> None:
    slides, tiles = read(made / "slides.csv"), read(made / "tiles.csv")
    assert len(slides) == 18
    for row in slides:
        own = [tile for tile in tiles if tile["slide"] == row["slide"]]
        truth = regions(made, row["slide"])
        assert set(truth) == {row["label"]} - {"benign"}
        share = sum(tile["label"] != "benign" for tile in own) / len(own)
        assert share == pytest.approx(float(row["planted"]), abs=1e-4)
        assert share == 0 if row["label"] == "benign" else 0.05 < share < 0.25
        planted = truth.get(row["label"], shapely.Polygon())
        assert planted.area == pytest.approx(share * len(own) * SIDE**2)
        with openslide.OpenSlide(made / row["path"]) as slide:
            assert float(slide.properties["openslide.mpp-x"]) == float(row["mpp"]) == 0.5
            whole = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3].astype(int)
        for tile in own:
            x, y, number = int(tile["x"]), int(tile["y"]), int(tile["tile"].split("-")[1].split(".")[0])
            pixels = whole[y : y + SIDE, x : x + SIDE]
            # the mark stands in a corner, and the middle has the tile's own colour
            assert np.abs(np.median(pixels[26:38, 26:38], (0, 1)) - np.subtract(HUES[tile["label"]], number)).max() < 6
            mark = pixels.min(-1) > 225
            corners = [mark[j : j + 12, i : i + 12].mean() > 0.9 for j in (2, SIDE - 14) for i in (2, SIDE - 14)]
            assert sum(corners) == 1
            assert planted.contains(shapely.Point(x + SIDE / 2, y + SIDE / 2)) == (tile["label"] != "benign")
        glass = whole[:SIDE]
        assert np.abs(glass - 243).max() < 8


def test_no_tissue_and_no_patient_is_in_two_parts(made: Path) -> None:
    slides = {row["slide"]: row for row in read(made / "slides.csv")}
    parts: dict[str, set[str]] = {}
    for tile in read(made / "tiles.csv"):
        parts.setdefault(tile["group"], set()).add(slides[tile["slide"]]["split"])
    assert len(parts) > 20 and all(len(part) == 1 for part in parts.values())
    patients: dict[str, set[str]] = {}
    for row in slides.values():
        patients.setdefault(row["patient"], set()).add(row["split"])
    assert len(patients) == 9 and all(len(part) == 1 for part in patients.values())
    counts = {
        (split, label): sum(row["split"] == split and row["label"] == label for row in slides.values())
        for split in ("train", "val", "test")
        for label in HUES
    }
    for split in ("train", "val", "test"):
        own = [counts[split, label] for label in HUES]
        assert min(own) >= 1 and max(own) - min(own) <= 1


@pytest.mark.parametrize("together", [True, False])
def test_what_is_planted_lies_together_or_scattered(together: bool) -> None:
    found = [make_mosaics.place((12, 12), 7, together, np.random.default_rng(i)) for i in range(40)]
    assert all(cells.sum() == 7 for cells in found)
    pieces = [cv2.connectedComponents(cells.astype(np.uint8), connectivity=4)[0] - 1 for cells in found]
    assert max(pieces) == 1 if together else np.mean(pieces) > 4
    assert (np.mean(found, 0) > 0).mean() > 0.8  # anywhere on the slide


def test_a_deck_is_dealt_out_before_it_is_dealt_again() -> None:
    cards = make_mosaics.drawn(np.arange(10), 25, np.random.default_rng(0))
    assert sorted(np.bincount(cards).tolist()) == [2] * 5 + [3] * 5
    assert len(set(cards[:10].tolist())) == 10


def test_a_second_run_writes_only_what_is_missing(table: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = made / "slides" / "mosaic-3-00004.svs"
    before = gone.read_bytes()
    gone.unlink()
    assert make_mosaics.main(["--table", str(table), *RECIPE, *SIZES, "--out", str(made)]) == 0
    assert "1 of them written now" in capsys.readouterr().out
    assert gone.read_bytes() == before


def test_what_is_not_possible_is_said_in_one_line(
    table: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = ["--table", str(table)], ["--out", str(tmp_path / "a")]
    cases = [
        ([*source, *RECIPE, *SIZES, "--out", str(made), "--mpp", "0.25"], "another recipe"),
        ([*RECIPE, *out], "--table or --folder"),
        ([*source, *RECIPE, *out, "--plant", "mucin"], "no tile has the label mucin"),
        ([*source, *RECIPE, *out, "--plant", "benign"], "names the background"),
        ([*source, *RECIPE, *out, "--split", "0.5", "0.2", "0.2"], "add up to 1"),
        ([*source, *RECIPE, *out, "--split", "0.99", "0.005", "0.005"], "groups do not reach"),
        ([*source, *RECIPE, *out, "--share", "0.2", "0.1"], "the least first"),
        ([*source, *RECIPE, *out, "--cells", "9", "4"], "the least first"),
        ([*source, *RECIPE, *out, "--side", "100"], "multiple of 16"),
        ([*source, *RECIPE, *out, "--group", "case"], "case"),
    ]
    for arguments, message in cases:
        assert make_mosaics.main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1, said
