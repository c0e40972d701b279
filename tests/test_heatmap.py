"""`medclip heatmap` from the command line: three sources, resuming, and what does not belong together refused."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from medclip.cli import main
from medclip.heads.abmil import Abmil
from medclip.infer.zeroshot import embed_texts
from medclip.models.folder import write_folder
from medclip.models.load import load_clip
from medclip.models.mil import MilModel
from medclip.models.patches import clip_encoder
from slides.entry import Entry
from slides.feature_work import FeatureOutput
from slides.features import extract_features
from slides.h5 import read_features
from slides.request import Request
from tests.slides.runs import quiet
from tests.slides.toys import toy_slide

Run = Callable[..., tuple[int, str, str]]
FEATURES = "feats/20x_64px_0px_overlap/features_toy"
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "patch_size": 32, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "layers": 1, "width": 16, "heads": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides, a CLIP, its features of them, and a slide model on these."""
    root = tmp_path_factory.mktemp("maps")
    for name in ("toy", "other"):
        torch.manual_seed(len(name))
        write_folder(load_clip(CLIP), root / name, title=name)
    entries = [Entry(n, str(toy_slide(root / f"slides/{n}.svs", 700, 600, seed=ord(n)).path)) for n in "ab"]
    request = Request(size=64, coverage=0.2, min_area=100.0)
    encoder = clip_encoder(str(root / "toy"))
    extract_features(entries, request, FeatureOutput(str(root / "feats")), encoder, threads=1, meter=quiet(2))
    model = MilModel(partial(Abmil, hidden=8, attention=4), 16, ["benign", "malignant"], encoder="toy")
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"medclip": model.description, "state_dict": state}, root / "mil.ckpt")
    return root


@pytest.fixture
def heatmap(monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run it here: (status, what it said, what it complained of)."""

    def run(*words: str) -> tuple[int, str, str]:
        own = ["cohort=slides", f"features={FEATURES}", f"output={tmp_path}/out", "device=cpu", "png.longest=200"]
        monkeypatch.setattr(sys, "argv", ["medclip", "heatmap", *own, *words])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = capfd.readouterr()
        return status, said.out, said.err

    monkeypatch.chdir(place)
    return run


def values(tmp_path: Path, slide: str) -> np.ndarray:
    return np.asarray(pq.read_table(tmp_path / f"out/values/{slide}.parquet")["value"])


def test_text(heatmap: Run, place: Path, tmp_path: Path) -> None:
    words = ["checkpoint=toy", "source.prompts=[glands]", "save=[png,geojson,tiff,parquet]", "regions.percentile=80"]
    status, said, complaint = heatmap(*words)
    assert status == 0 and "2 slides (2 ok)" in said, complaint
    text = embed_texts(load_clip(pretrained=str(place / "toy")), ["glands"])[0].numpy()
    for slide in "ab":
        found = read_features(place / FEATURES / f"{slide}.h5")[0]
        assert np.allclose(values(tmp_path, slide), found @ text, atol=1e-5)
        for kind in ("png", "geojson", "tiff"):
            assert (tmp_path / f"out/{kind}/{slide}.{kind}").stat().st_size > 500
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*g*") if "state" not in str(path)}
    before = {path: then for path, then in before.items() if path.suffix in (".png", ".geojson")}
    assert heatmap(*words)[0] == 0 and len(before) == 4
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    status, _, complaint = heatmap(*words, "smooth=1")
    assert status == 2 and "holds the output of other settings" in complaint


def test_attention_and_class(heatmap: Run, place: Path, tmp_path: Path) -> None:
    assert heatmap("source=attention", "checkpoint=mil.ckpt", "save=parquet")[0] == 0
    assert values(tmp_path, "a").mean() == pytest.approx(1, abs=1e-5)
    status, _, complaint = heatmap(
        "source=class", "checkpoint=mil.ckpt", "save=parquet", f"output={tmp_path}/class/out", "source.of=benign"
    )
    assert status == 0, complaint
    benign = values(tmp_path / "class", "a")
    assert ((benign > 0) & (benign < 1)).all() and benign.std() > 0


def test_a_bad_slide_is_a_row(heatmap: Run, place: Path, tmp_path: Path) -> None:
    toy_slide(tmp_path / "more/b.svs", 700, 600, seed=7)  # another slide of b's name and size
    words = ["checkpoint=mil.ckpt", "source=attention", "save=parquet"]
    status, said, complaint = heatmap(*words, f"cohort=[slides/a.svs,{tmp_path}/more]")
    assert status == 0 and "2 slides (1 ok, 1 failed)" in said and "another file than" in said, complaint
    with (tmp_path / "out/manifest.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["ok", "failed"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["checkpoint=other", "source.prompts=[x]"], "features of other weights (toy,"),
        (["checkpoint=toy"], "source.prompts"),
        (["checkpoint=toy", "source.prompts=[x]", "source.score=softmax"], "give source.negative"),
        (["checkpoint=toy", "source.prompts=[x]", "features=nowhere"], "features=nowhere is no folder"),
        (["checkpoint=toy", "source.prompts=[x]", "palette=jet"], "choose one of viridis"),
        (["checkpoint=toy", "source.prompts=[x]", "smooth=much"], "wrong type"),
        (["checkpoint=toy", "source.prompts=[x]", "save=[]"], "choose of png"),
        (["checkpoint=toy", "source=attention"], "is no slide model"),
        (["checkpoint=mil.ckpt", "source=class", "source.of=x"], "benign, malignant"),
        (["checkpoint=mil.ckpt", "source=attention", "source.branch=3"], "the model has 1 attentions"),
    ],
)
def test_what_the_user_can_mend_is_one_line(heatmap: Run, words: list[str], says: str) -> None:
    status, _, complaint = heatmap(*words)
    lines = [line for line in complaint.splitlines() if " patches, " not in line]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("medclip heatmap: ") and says in lines[0], complaint
