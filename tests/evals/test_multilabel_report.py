"""The report, results.json and the tables of a multi-label classification, from models of bands of unequal skill."""

from __future__ import annotations

import csv
import json
import re
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medclip.evals.bootstrap import Bootstrap
from medclip.evals.gallery import overlay
from medclip.evals.multilabel import MultiLabel
from medclip.evals.multilabel_outcomes import MultiLabelOutcomes
from medclip.evals.report import render, write_report
from medclip.evals.run import Report, run_evaluation
from medclip.models.vit import build_vit
from tests.evals.test_report import Page
from tests.evals.thorax_toys import FINDINGS, BandClassifier, FindingClip, FindingSet


def vit_classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_vit(list(FINDINGS), image_size=32, patch_size=8, dim=32, depth=2, heads=2).eval()


def thorax_report() -> Report:
    """Three checkpoints: a CLIP, a classifier of one class, and a ViT; edema never occurs."""
    data = FindingSet(30, unlabelled=2)
    for _, _, label, _ in data.rows:
        label[2] = np.nan if np.isnan(label[2]) else 0
    evaluation = MultiLabel(data, name="thorax", prompts=[["{}", "no {}"], ["lung <b>{}</b>", "without {}"]])
    models = {"clip": FindingClip(0.4), "part": BandClassifier(0.8, FINDINGS[:1]), "vit": vit_classifier()}
    return run_evaluation(models, {"thorax": evaluation}, settings=Bootstrap(samples=100))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def report() -> Report:
    return thorax_report()


def test_records_hold_what_the_page_shows(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    clip, part, vit = json.loads((tmp_path / "results.json").read_text())
    assert clip["task"] == "multilabel_classification" and clip["metrics"].keys() == {
        "auroc", "mean_average_precision", "brier",
    }  # fmt: skip
    assert (clip["kind"], part["kind"]) == ("zero-shot", "classifier") and clip["thresholds_from"] == "these samples"
    assert part["missing"] == ["Lung_Nodule", "Edema"] and clip["undefined"]["auroc"] == ["Edema"]
    own = clip["per_class"]["Effusion"]
    comparison = report.comparisons["thorax"]
    outcomes = comparison.results["clip"].outcomes
    assert isinstance(outcomes, MultiLabelOutcomes)
    assert own["positives"] == np.nansum(outcomes.labels[:, 0]) and own["auroc"]["chance"] == 0.5
    assert own["auroc"]["interval"][0] <= own["auroc"]["value"] <= own["auroc"]["interval"][1]
    assert clip["metrics"]["auroc"] == own["auroc"]["value"]  # of all checkpoints' classes, the only defined one
    change = vit["per_class"]["Effusion"]["auroc"]["difference"]
    assert change["value"] == pytest.approx(vit["per_class"]["Effusion"]["auroc"]["value"] - own["auroc"]["value"])
    assert part["per_class"]["Lung_Nodule"]["auroc"]["value"] is None
    point = own["operating_points"][0]
    assert point["sensitivity"] == point["tp"] / own["positives"] and point["rule"] == "Youden's J"
    assert sum(b["count"] for b in own["reliability"]) == own["known"]
    assert vit["per_class"]["Edema"]["operating_points"] == [] and own["words"] == ["Effusion"]
    assert [pair["negative"] for pair in clip["prompts"]] == ["no {}", "without {}"]


def test_predictions_are_the_outcomes(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.csv"))
    assert names == [f"predictions-thorax-{model}.csv" for model in ("clip", "part", "vit")]
    rows = list(csv.DictReader(StringIO((tmp_path / "predictions-thorax-part.csv").read_text())))
    outcomes = report.comparisons["thorax"].results["part"].outcomes
    assert isinstance(outcomes, MultiLabelOutcomes)
    assert [row["key"] for row in rows] == outcomes.keys
    for i, row in enumerate(rows):
        label = outcomes.labels[i, 0]
        assert row["Effusion"] == ("" if np.isnan(label) else str(int(label)))
        want = 1 / (1 + np.exp(-outcomes.log_odds[i, 0]))
        assert float(row["Effusion: probability"]) == pytest.approx(want, rel=1e-5)
        assert row["Edema: probability"] == ""
    assert not any(group in (tmp_path / "predictions-thorax-part.csv").read_text() for group in ("0:1,", "0:29"))


def test_the_page_is_well_formed_escapes_and_says_what_is_missing(report: Report) -> None:
    text = render(report)
    page = Page(text)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert all(a.startswith(("data:image/jpeg;base64,", "#")) for a in page.addresses)
    assert "http" not in text and "script" not in page.tags
    assert "part does not know Lung_Nodule, Edema" in text and text.count("No metric is defined for Edema") == 1
    assert "lung &lt;b&gt;{}&lt;/b&gt;" in text and "<b>{}</b>" not in text
    assert "chosen on these very samples" in text and "No attention to show of clip, part." in text
    words = re.sub(r"<[^>]+>", " ", text)
    assert not re.search(r"\bnan\b", words)
    # Drawn points: as many as the curve has, and within the square.
    drawn = re.findall(r'<polyline class="m\d" points="([^"]*)"', text)
    details = report.comparisons["thorax"].results.values()
    own = [own for result in details for own in result.details.classes if own.roc]  # type: ignore[union-attr]
    for curve in [c.roc for c in own]:
        assert " ".join(f"{100 * x:.1f},{100 * (1 - y):.1f}" for x, y in curve) in drawn
    numbers = [float(x) for curve in drawn for x in re.split("[ ,]", curve)]
    assert min(numbers) >= 0 and max(numbers) <= 100


def test_attention_is_laid_over_the_vits_pictures_alone(report: Report) -> None:
    results = report.comparisons["thorax"].results
    colour = {}
    for model in ("clip", "vit"):
        details = results[model].details
        pictures = [Image.open(BytesIO(f.thumbnail)) for own in details.classes for f in own.gallery]  # type: ignore[union-attr]
        colour[model] = [np.asarray(p).astype(int)[..., 0] - np.asarray(p).astype(int)[..., 2] for p in pictures]
    assert results["vit"].details.attention and not results["clip"].details.attention  # type: ignore[union-attr]
    peaks = [f.peak for own in results["vit"].details.classes for f in own.gallery]  # type: ignore[union-attr]
    assert all(1 < peak < 16 for peak in peaks)  # of 16 patches
    assert all(np.abs(c).max() < 12 for c in colour["clip"])  # grey as they were, but for JPEG's rounding
    assert all(c.max() > 60 for c in colour["vit"])


def test_the_overlay_is_warm_where_attention_is_and_leaves_the_rest() -> None:
    grey = np.full((3, 32, 32), 100, dtype=np.uint8)
    attention = np.zeros((4, 4))
    attention[0, 3] = 1.0  # top right
    picture = np.asarray(Image.open(BytesIO(overlay(grey, attention)))).astype(int)
    warmth = picture[..., 0] - picture[..., 2]
    assert np.unravel_index(warmth.argmax(), warmth.shape)[0] < 60 < 110 < warmth.argmax() % 168
    assert np.abs(picture[80:, :80] - 100).max() <= 3
    assert np.abs(np.asarray(Image.open(BytesIO(overlay(grey, np.ones((4, 4)))))).astype(int) - 100).max() <= 3


def test_one_checkpoint_with_validation_makes_a_page_too() -> None:
    evaluation = MultiLabel(FindingSet(20), name="thorax", validation=FindingSet(20, seed=1))
    text = render(run_evaluation({"vit": vit_classifier()}, {"thorax": evaluation}, settings=Bootstrap(samples=100)))  # type: ignore[dict-item]
    assert re.search(r"Thresholds were chosen on \d+ validation samples", text) and Page(text).open == []
    assert "The warmer, the more attention" in text and "No attention to show" not in text
