"""`medclip demo`, small: every command of it, on generated pairs and on a user's own."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
from hydra import compose, initialize_config_dir

from medclip.config import CONF
from medclip.demo import demo, own_source
from medclip.types import UserError
from tests.conftest import jpeg

SMALL = [
    *(f"phantoms.{kind}.{part}.samples=24" for kind in ("xray", "histology") for part in ("train", "test")),
    *(f"phantoms.{kind}.{part}.size=64" for kind in ("xray", "histology") for part in ("train", "test")),
    "train_words='model.architecture.text_cfg.layers=1 data.batch_size=8 data.workers=0 max_steps=3'",
]


def run(folder: Path, *words: str) -> Path:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("demo", [f"output={folder}", *SMALL, *words])
    return demo(cfg)


def test_generated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(tmp_path / "demo")
    assert report == tmp_path / "demo" / "report.html" and "Forgetting" in report.read_text()
    printed = capsys.readouterr().out
    assert "$ medclip train" in printed and "done in" in printed
    assert "what was gained" in printed and "what was forgotten" in printed
    records = json.loads((tmp_path / "demo" / "evaluation" / "results.json").read_text())
    assert {record["model"] for record in records} == {"base", "adapted", "wiseft"}
    assert len(records) == 12
    net, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'demo' / 'export'}")
    assert net.visual.image_size == (96, 96)
    with pytest.raises(UserError, match="is not empty"):
        run(tmp_path / "demo")


def test_own_pairs(tmp_path: Path) -> None:
    """A folder of images with captions beside them, in patients' folders."""
    import numpy as np

    rng = np.random.default_rng(0)
    for i in range(30):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / f"{i}.jpg").write_bytes(jpeg(rng))
        (tmp_path / "own" / f"{i}.txt").write_text(f"Case {i}: a mass of {i} mm.")
    run(tmp_path / "demo", f"data_folder={tmp_path / 'own'}")
    records = json.loads((tmp_path / "demo" / "evaluation" / "results.json").read_text())
    own = next(record for record in records if record["dataset"] == "retrieval")
    assert 0 < own["samples"] < 30  # the part that was kept aside


def test_what_a_folder_of_pairs_is(tmp_path: Path) -> None:
    folder = tmp_path / 'my "pairs"'
    (folder / "deep").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no pairs"):
        own_source(folder)
    (folder / "deep" / "a.txt").write_text("x")
    assert own_source(folder).startswith("folder: ")
    (folder / "pairs.jsonl").write_text("{}")
    assert own_source(folder).startswith("table: ")
    (folder / "deep" / "0.tar").write_bytes(b"")
    assert own_source(folder) == 'urls: "' + str(folder).replace('"', '\\"') + '/**/*.tar"'
