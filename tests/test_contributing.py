"""The worked examples of CONTRIBUTING.md, run as they stand there."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import medclip.evals
import medclip.losses
from medclip.config import CONF
from medclip.data.sources import open_sources
from medclip.evaluate import evaluate
from medclip.train import train

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^`(?P<path>[\w/.]+)`[^\n]*\n```(?:python|yaml)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = {match["path"]: match["text"] for match in BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text())}
SMALL = [
    "experiment=tiny",
    "model.architecture.text_cfg.layers=1",
    "data.sources=[{phantoms: {kind: xray, samples: 8, size: 64}}]",
    "data.batch_size=4",
    "data.workers=0",
]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples' files, where Python and Hydra find them beside the real ones."""
    for path, text in BLOCKS.items():
        assert not (ROOT / path).exists(), f"{path} is real by now: choose another example"
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    for package in (medclip.losses, medclip.evals):
        folder = str(tmp_path / package.__name__.replace(".", "/"))
        monkeypatch.setattr(package, "__path__", [*package.__path__, folder])
    importlib.invalidate_caches()
    return tmp_path


def composed(verb: str, folder: Path, *words: str):
    searched = f"hydra.searchpath=[file://{folder}/conf]"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(verb, [searched, *words])


def test_three_one_three_files() -> None:
    kinds = [path.split("/")[:2] for path in BLOCKS]
    assert kinds == [
        *(["medclip", "losses"], ["conf", "loss"], ["tests", "losses"]),
        ["conf", "data"],
        *(["medclip", "evals"], ["conf", "eval"], ["tests", "evals"]),
    ]


@pytest.mark.parametrize("path", [path for path in BLOCKS if path.startswith("tests/")])
def test_the_examples_tests_pass(path: str, written: Path) -> None:
    names: dict[str, object] = {}
    exec(compile(BLOCKS[path], path, "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()  # type: ignore[operator]


def test_the_loss_trains_alone_and_beside_another(written: Path) -> None:
    words = [*SMALL, "loss=[clip,smooth]", "+loss.weights.smooth=0.5", f"output={written}/run"]
    metrics = train(composed("train", written, *words)).callback_metrics
    total, one, two = (float(metrics[f"train/{name}"]) for name in ("loss", "contrastive", "smooth"))
    assert total == pytest.approx(one + 0.5 * two, rel=1e-6)


def test_the_dataset_opens(written: Path) -> None:
    (written / "images").mkdir()
    (written / "images" / "a.jpg").write_bytes(b"\xff\xd8\xff")
    (written / "t.csv").write_text("image_path,caption,subset\na.jpg,A caption.,x\n")
    where = [f"data.sources.0.table={written}/t.csv", f"data.sources.0.image_root={written}/images"]
    cfg = composed("train", written, "data=quilt", *where)
    (source,) = open_sources([dict(cfg.data.sources[0])])
    assert source.fields(0)["caption"] == "A caption."


def test_the_evaluation_reaches_the_report(written: Path) -> None:
    train(composed("train", written, *SMALL, f"output={written}/run"))
    sources = "evals.gap.data.sources=[{phantoms: {kind: xray, samples: 8, size: 64, per_patient: 1}}]"
    words = [f"checkpoint={written}/run/checkpoints/last.ckpt", "eval=[gap]", sources, f"output={written}/out"]
    evaluate(composed("evaluate", written, *words, "workers=0", "device=cpu"))
    (record,) = json.loads((written / "out" / "results.json").read_text())
    low, high = record["intervals"]["modality_gap"]
    assert 0 < low < record["metrics"]["modality_gap"] < high < 2
    assert "modality gap" in (written / "out" / "report.html").read_text()
