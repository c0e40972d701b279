"""`medclip extract` from the command line: awkward slides are rows, what the user can mend is one line."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import tifffile
import torch
import yaml

from medclip.cli import main
from medclip.models.folder import write_folder
from medclip.models.load import load_clip
from slides.files import alone
from tests.slides.runs import contents, leftovers
from tests.slides.toys import (
    AWKWARD_NAME,
    break_header,
    empty_tile,
    grey_slide,
    halve_tile,
    rgba_slide,
    set_mpp,
    sixteen_bit_slide,
    toy_slide,
    truncate,
)  # fmt: skip

Run = Callable[..., tuple[int, str, str]]
SMALL = ["slides.size=64", "slides.coverage=0.2", "slides.min_area=100", "processes=1", "threads=1"]


@pytest.fixture
def medclip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run it here: (status, what it said, what it complained of)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medclip", "extract", *words])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = capfd.readouterr()
        return status, said.out, said.err

    monkeypatch.chdir(tmp_path)
    return run


def manifest(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


def awkward(folder: Path) -> None:
    """A slide for everything that can be wrong with one."""

    def toy(name: str, *size: int, **options) -> Path:
        return toy_slide(folder / name, *(size or (700, 600)), **options).path

    truncate(toy("truncated.svs"), 0.4)
    break_header(toy("header.svs", downsamples=(1,)))
    halve_tile(toy("half.svs", downsamples=(1,)))
    empty_tile(toy("zero.svs", downsamples=(1,)))
    for said in ("0", "nan", "1000", "-1"):
        set_mpp(toy(f"mpp {said}.svs", power=None), said)
    sixteen_bit_slide(folder / "sixteen.tiff")
    grey_slide(folder / "grey.tiff")
    rgba_slide(folder / "rgba.tiff")
    toy("level.svs", downsamples=(1,))
    toy("tiny.svs", 60, 50, downsamples=(1,))
    glass = np.full((500, 600, 3), 244, np.uint8)
    tifffile.imwrite(
        folder / "glass.tiff", glass, tile=(256, 256), photometric="rgb", resolution=(2e4, 2e4), resolutionunit=3
    )
    toy(AWKWARD_NAME)
    (folder / "text.svs").write_text("no slide")
    (folder / "nothing.svs").write_bytes(b"")


EXPECTED = {
    "truncated": ("failed", "truncated.svs"), "header": ("ok", "tile (1, 1) of level 0"),
    "half": ("ok", "tile (1, 1) of level 0"), "zero": ("ok", ""), "mpp 0": ("failed", "its mpp is not known"),
    "mpp nan": ("failed", "its mpp is not known"), "mpp 1000": ("failed", "aperio.MPP is 1000"),
    "mpp -1": ("failed", "is -1"), "sixteen": ("failed", "more than 8 bits"), "grey": ("ok", ""), "rgba": ("ok", ""),
    "level": ("ok", ""), "tiny": ("empty", ""), "glass": ("empty", "no patch has 0.2 of tissue"),
    Path(AWKWARD_NAME).stem: ("ok", ""), "text": ("failed", "text.svs"), "nothing": ("failed", "nothing.svs"),
}  # fmt: skip


def test_every_awkward_slide_is_a_row_that_says_why(medclip: Run, tmp_path: Path) -> None:
    awkward(tmp_path / "slides")
    words = ["cohort=slides", "output=out", "save=[shards,coords,arrays]", "slides.mpp=null", *SMALL]
    status, said, _ = medclip(*words)
    rows = manifest(tmp_path / "out")
    assert status == 0 and set(rows) == set(EXPECTED)
    for name, (outcome, says) in EXPECTED.items():
        row = rows[name]
        assert (row["status"], says in row["reason"]) == (outcome, True), row
        assert (outcome == "ok") == (int(row["patches"]) > 0) and "\n" not in row["reason"]
        assert "Error" not in row["reason"] and "Traceback" not in row["reason"]
        assert (int(row["corrupt"]) > 0) == (name in ("header", "half"))
        assert (int(row["sparse"]) > 0) == (name == "zero"), row
    failed = sum(outcome == "failed" for outcome, _ in EXPECTED.values())
    assert (
        said.startswith(f"17 slides ({15 - failed} ok, 2 empty, {failed} failed)") and "more: see manifest.csv" in said
    )
    assert leftovers(tmp_path / "out") == []
    with h5py.File(tmp_path / "out/arrays/rgba.h5") as file:  # what nobody scanned is white, never black
        assert file["imgs"][:].min(axis=(0, 1, 2)).tolist() > [30, 30, 30]  # type: ignore[index]
    with h5py.File(tmp_path / "out/arrays/grey.h5") as file:
        images = file["imgs"][:]  # type: ignore[index]
        assert np.ptp(images, axis=-1).max() == 0 and images.std() > 10  # type: ignore[arg-type,union-attr]
    before = contents(tmp_path / "out")
    assert medclip(*words)[0] == 0 and contents(tmp_path / "out") == before


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    for name in "ab":
        toy_slide(tmp_path / f"slides/{name}.svs", 700, 600, seed=ord(name))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.svs").write_text("no slide")
    (tmp_path / "file").write_text("")
    (tmp_path / "twice").mkdir()
    for ending in ("svs", "tiff"):
        (tmp_path / f"twice/x.{ending}").write_text("")
    (tmp_path / "table.csv").write_text("slide,mpp\na,zero\n")
    return tmp_path / "slides"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Missing mandatory value: cohort"),
        (["cohort=nowhere"], "no slide in nowhere: give a folder, a pattern or a CSV of paths"),
        (["cohort=twice"], "would have one name: give a CSV"),
        (["cohort=gone.csv"], "gone.csv: cannot be read as CSV"),
        (["cohort=bad"], "no slide could be used, e.g. x: bad/x.svs"),
        (["cohort=slides", "output=file"], "cannot write file"),
        (["cohort=slides", "output=/proc/nothing/here"], "choose another output folder"),
        (["cohort=slides", "slides.sise=3"], "sise"),
        (["cohort=slides", "+slides.sise=3"], "unknown keys ['sise']"),
        (["cohort=slides", "slides.size=0"], "size 0 and overlap 0"),
        (["cohort=slides", "slides.size=big"], "size big and overlap 0: whole pixels"),
        (["cohort=slides", "slides.mpp=nan"], "mpp is nan"),
        (["cohort=slides", "slides.mpp=0.1"], "ask for mpp=0.25 or more, or allow upsample=true"),
        (["cohort=slides", "slides.tissue=magic"], "choose one of robust, otsu, hsv, none"),
        (["cohort=slides", "slides.coverage=70"], "coverage is 70: choose 0 to 1"),
        (["cohort=slides", "slides.remove=[pens]"], "remove names ['pens']"),
        (["cohort=slides", "slides.masks=nowhere"], "no mask in nowhere"),
        (["cohort=slides", "slides.stain=macenko"], "stain_target"),
        (["cohort=slides", "slides=x40_999"], "x40_999"),
        (["cohort=slides", "save=[shard]"], "save is ['shard']: choose of shards"),
        (["cohort=slides", "save=[]"], "save is empty"),
        (["cohort=slides", "save=null"], "save is empty"),
        (["cohort=slides", "layout=qupath"], "layout is 'qupath': choose clam or trident"),
        (["cohort=slides", "engine=dask"], "engine=dask is unknown: local or ray"),
        (["cohort=slides", "part=[2,2]"], "counts from 0 to one below the second"),
        (["cohort=slides", "part=3"], "part=3: give two numbers"),
        (["cohort=slides", "part=[a,b]"], "counts from 0 to one below the second"),
        (["cohort=slides", "per_shard=0"], "per_shard=0: give a whole number"),
        (["cohort=slides", "per_shard=many"], "per_shard=many: give a whole number"),
        (["cohort=slides", "threads=-1"], "threads=-1: give a whole number"),
        (["cohort=slides", "batch_size=null"], "batch_size=None: give a whole number"),
        (["cohort=slides", "slide_mpp=40x"], "slide_mpp=40x: give µm a level-0 pixel"),
        (["cohort=slides", "slide_mpp=0"], "no pixel size"),
        (["cohort=slides", "mpp_table=table.csv"], "line 2 needs columns slide and mpp"),
        (["cohort=slides", "encoding.format=webp"], "choose jpeg or png"),
        (["cohort=slides", "encoding.quality=best"], "encoding: an unknown key, or a value of the wrong type"),
        (["cohort=slides", "+encoding.speed=9"], "encoding: an unknown key"),
        (["cohort=slides", "save=[features]"], "say which model makes them"),
        (["cohort=slides", "encoder=clip", "encoder.checkpoint=x"], "nothing to save of it"),
        (["cohort=slides", "save=[features]", "encoder=clip"], "Missing mandatory value: encoder.checkpoint"),
        (["cohort=slides", "save=[features]", "encoder=clip", "encoder.checkpoint=nowhere"], "nowhere"),
        (["cohort=slides", "save=[features]", "encoder=timm", "encoder.model=vit_vast"], "timm cannot make vit_vast"),
        (["cohort=slides", "coords=x"], "save=[features] alone goes with it"),
    ],
)
def test_one_line_says_what_and_how_to_mend(medclip: Run, slides: Path, words: list[str], says: str) -> None:
    status, _, complaint = medclip(*SMALL, "drawings=false", *words)
    lines = [line for line in complaint.splitlines() if line.strip() and " patches, " not in line]  # and progress
    assert status == 2, complaint
    assert len(lines) == 1 and lines[0].startswith("medclip extract: ") and says in lines[0], complaint


def test_several_processes_write_what_one_writes(medclip: Run, slides: Path, tmp_path: Path) -> None:
    assert medclip("cohort=slides", f"output={tmp_path}/one", *SMALL)[0] == 0
    status, said, complaint = medclip("cohort=slides", f"output={tmp_path}/two", *SMALL, "processes=2")
    assert (status, said.startswith("2 slides (2 ok), ")) == (0, True), complaint
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    del one["config.yaml"], two["config.yaml"]
    assert one == two and any(name.startswith("shards/") for name in one)
    for number in (0, 1):  # an array job's two parts, into one folder
        assert medclip("cohort=slides", f"output={tmp_path}/parts", *SMALL, f"part=[{number},2]")[0] == 0
    assert contents(tmp_path / "parts") | {"config.yaml": b""} == one | {
        "config.yaml": b"", "manifest.csv": contents(tmp_path / "parts")["manifest.csv"],
    }  # fmt: skip
    assert {name: row["status"] for name, row in manifest(tmp_path / "parts").items()} == {"a": "ok", "b": "ok"}


def test_two_runs_on_one_output(medclip: Run, slides: Path, tmp_path: Path) -> None:
    with alone(tmp_path / "out/state/a.lock"):
        status, said, _ = medclip("cohort=slides", "output=out", *SMALL)
        assert status == 0 and "2 slides (1 ok, 1 busy)" in said
        assert "  a: a is being written by another run (process " in said
        status, _, complaint = medclip("cohort=slides/a.svs", "output=out", *SMALL)
        assert status == 2 and "no slide could be used, e.g. a: a is being written by another run" in complaint
    before = contents(tmp_path / "out")
    status, _, complaint = medclip("cohort=slides", "output=out", *SMALL, "slides.size=32")
    assert status == 2 and complaint.count("\n") == 1
    assert "out holds the output of other settings: choose another folder, or remove it" in complaint
    assert contents(tmp_path / "out") == before  # its config.yaml too
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["slides"]["size"] == 64


def test_a_full_disk_ends_it_with_one_line(
    medclip: Run, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slides.files import OutputError
    from slides.save import ShardSaver

    def full(*_: object) -> None:
        raise OutputError("cannot write x.tar (No space left on device): make room and give the same command again")

    with monkeypatch.context() as patch:
        patch.setattr(ShardSaver, "end", full)
        status, _, complaint = medclip("cohort=slides", "output=out", *SMALL)
    lines = [line for line in complaint.splitlines() if " patches, " not in line]
    assert status == 2 and lines == [
        "medclip extract: cannot write x.tar (No space left on device): make room and give the same command again"
    ]
    assert medclip("cohort=slides", "output=out", *SMALL)[0] == 0
    assert {row["status"] for row in manifest(tmp_path / "out").values()} == {"ok"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "patch_size": 32, "layers": 1, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "layers": 1, "width": 16, "heads": 2},
    }
    write_folder(load_clip(cfg), tmp_path / "toy", title="toy")
    return tmp_path / "toy"


def test_features_of_a_clip_and_clam_s_tensors(medclip: Run, slides: Path, tmp_path: Path, model: Path) -> None:
    words = ["cohort=slides", "output=out", *SMALL, "layout=clam", "encoder=clip", f"encoder.checkpoint={model}"]
    status, said, complaint = medclip(*words, "save=[coords,features]", "device=cpu")
    assert status == 0 and "the model waited for patches" in said, complaint
    for name in "ab":
        with h5py.File(tmp_path / f"out/features_toy/h5_files/{name}.h5") as file:
            features, coords = file["features"][:], file["coords"][:]  # type: ignore[index]
        with h5py.File(tmp_path / f"out/patches/{name}.h5") as file:
            assert np.array_equal(file["coords"][:], coords)  # type: ignore[index]
        tensor = torch.load(tmp_path / f"out/features_toy/pt_files/{name}.pt", weights_only=True)
        assert np.array_equal(tensor.numpy(), features) and np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    words = ["cohort=slides", "output=again", *SMALL, "encoder=clip", f"encoder.checkpoint={model}", "save=features"]
    status, _, complaint = medclip(*words, "coords=out/patches", "device=cpu", "layout=clam")
    assert status == 0, complaint
    with (
        h5py.File(tmp_path / "again/features_toy/h5_files/a.h5") as file,
        h5py.File(tmp_path / "out/features_toy/h5_files/a.h5") as first,
    ):
        assert np.array_equal(file["features"][:], first["features"][:])  # type: ignore[index]


def test_the_same_name_with_other_weights_is_refused(medclip: Run, slides: Path, tmp_path: Path, model: Path) -> None:
    words = ["cohort=slides", "output=out", *SMALL, "save=[features]", "encoder=clip", f"encoder.checkpoint={model}"]
    assert medclip(*words)[0] == 0
    before = contents(tmp_path / "out")
    clip = load_clip(pretrained=str(model))
    with torch.no_grad():
        next(clip.parameters()).add_(0.1)
    import shutil

    shutil.rmtree(model)
    write_folder(clip, model, title="toy")
    status, _, complaint = medclip(*words, "batch_size=7")
    assert status == 2 and "features_toy holds the output of other settings" in complaint
    assert contents(tmp_path / "out") == before


def test_a_picture_with_an_mpp_is_a_slide(medclip: Run, slides: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "p.png"), toy_slide(tmp_path / "t.svs", 600, 500).pixels[..., ::-1])
    status, said, complaint = medclip("cohort=p.png", "slide_mpp=0.25", "output=out", *SMALL, "save=shards")
    assert status == 0 and said.startswith("1 slides (1 ok)"), complaint
    status, _, complaint = medclip("cohort=p.png", "output=other", *SMALL)
    assert status == 2 and "p.png: its mpp is not known" in complaint and "slide_mpp=0.5" in complaint
