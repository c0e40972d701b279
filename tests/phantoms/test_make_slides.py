"""The script's folder holds the slides, the truth and the captions that it says, and a run can be taken up again."""

from __future__ import annotations

import csv
import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import openslide
import pytest
import shapely
from shapely.geometry import shape

from medclip.phantoms.captions import facts_stated
from medclip.phantoms.slide import slide_phantom

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_slides.py"
_spec = spec_from_file_location("make_slides", SCRIPT)
assert _spec and _spec.loader
make_slides = module_from_spec(_spec)
_spec.loader.exec_module(make_slides)

OPTIONS = ["--slides", "3", "--size", "1100", "900", "--mpp", "0.5", "--seed", "4", "--per-patient", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    assert make_slides.main([*OPTIONS, "--out", str(out), "--captions", "6", "--patch", "200"]) == 0
    return out


def test_slides_open_with_their_mpp_and_pixels(folder: Path) -> None:
    with (folder / "slides.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["slide"] for row in rows] == [f"slide-4-{i:05d}" for i in range(3)]
    assert rows[0]["patient"] == rows[1]["patient"] != rows[2]["patient"]
    for index, row in enumerate(rows):
        phantom = slide_phantom(4, index, (1100, 900), 0.5, slides_per_patient=2)
        assert (row["label"], float(row["mpp"]), row["patient"]) == (phantom.label, 0.5, phantom.patient)
        with openslide.OpenSlide(folder / row["path"]) as slide:
            assert slide.properties["openslide.vendor"] == "aperio" and slide.dimensions == (1100, 900)
            assert (slide.properties["openslide.mpp-x"], slide.properties["aperio.AppMag"]) == ("0.5", "20")
            tile = phantom.painter()(0, 1, 1).astype(float)
            seen = np.asarray(slide.read_region((256, 256), 0, (256, 256)))[..., :3]
        assert np.sqrt(((seen - tile) ** 2).mean()) < 8 and np.abs((seen - tile).mean()) < 1


def test_truth_and_captions_are_the_phantoms(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(lines) == 18 and all({"wsi_id", "position", "caption", "file_id"} < set(line) for line in lines)
    assert len({line["file_id"] for line in lines}) == 3
    for line in lines:
        regions = json.loads((folder / "truth" / f"{line['wsi_id']}.geojson").read_text())["features"]
        x, y = map(int, line["position"])
        square = shapely.box(x, y, x + 200, y + 200)
        covers = {
            region["properties"]["classification"]["name"]: shape(region["geometry"]).intersection(square).area / 200**2
            for region in regions
        }
        (label,) = facts_stated("histology", line["caption"])["label"]
        assert line["label"] == label and covers[label] >= 0.75


def test_a_second_run_writes_only_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone, kept = folder / "slides" / "slide-4-00001.svs", folder / "slides" / "slide-4-00002.svs"
    before, stamp = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    assert make_slides.main([*OPTIONS, "--out", str(folder)]) == 0
    assert "1 of them written now" in capsys.readouterr().out
    assert gone.read_bytes() == before and kept.stat().st_mtime_ns == stamp


def test_what_is_not_possible_is_said_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    cases = [
        (["--out", str(folder), "--seed", "5"], "another recipe"),
        (["--out", str(tmp_path / "file" / "a")], "cannot write to"),
        (["--out", str(tmp_path), "--size", "10", "10"], "not possible"),
        (["--out", str(tmp_path), "--slides", "0"], "must be at least 1"),
    ]
    for arguments, message in cases:
        assert make_slides.main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1


def test_planted_tumours_are_in_table_and_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--slides", "5", "--size", "700", "600", "--seed", "1", "--out", str(tmp_path)]
    assert make_slides.main([*size, "--planted", "0.06", "0.03"]) == 2
    assert "least share first" in capsys.readouterr().err
    assert make_slides.main([*size, "--planted", "0.03", "0.06"]) == 0
    with (tmp_path / "slides.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] == "benign glandular epithelium" for row in rows} == {True, False}
    for row in rows:
        regions = json.loads((tmp_path / "truth" / f"{row['slide']}.geojson").read_text())["features"]
        areas = {r["properties"]["classification"]["name"]: shape(r["geometry"]).area for r in regions}
        areas.pop("pen", None)
        tumour = sum(area for label, area in areas.items() if "carcinoma" in label) / sum(areas.values())
        assert tumour == pytest.approx(float(row["planted"]), rel=0.1)
        assert (tumour > 0) == (row["label"] != "benign glandular epithelium")
