"""`medclip evaluate` on generated chest X-rays: a classifier, its random twin and a CLIP, from checkpoints to files."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from medclip.evaluate import main
from medclip.models.load import load_clip
from medclip.models.vit import build_vit

FINDINGS = ["pleural effusion", "lung nodule", "pneumothorax", "cardiomegaly", "lung consolidation"]
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "layers": 1, "width": 16, "heads": 2},
}
DATA = "evals.phantom_thorax.data.sources=[{phantoms: {kind: xray, samples: 36, seed: 3, size: 64}}]"
COMMON = ["eval=[phantom_thorax]", DATA, "bootstrap.samples=100", "workers=0", "device=cpu", "output=out"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    clip, vit = load_clip(TINY), build_vit(FINDINGS[1:], image_size=64, dim=32, depth=2, heads=2)
    for name, model in (("clip", clip), ("vit", vit)):
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        torch.save({"medclip": model.description, "state_dict": state}, f"{name}.ckpt")
    torch.save({"medclip": {"kind": "mae"}, "state_dict": {}}, "mae.ckpt")

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["medclip evaluate", *COMMON, *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


def test_three_kinds_of_checkpoint_side_by_side(run, tmp_path: Path, capsys) -> None:
    checkpoints = ["+checkpoints.random=random:vit.ckpt", "+checkpoints.mae=vit.ckpt", "+checkpoints.clip=clip.ckpt"]
    validation = (
        "evals.phantom_thorax.validation={_target_: medclip.data.evalset.EvalSet, group: phantom.patient,"
        " labels: ${evals.phantom_thorax.data.labels},"
        " sources: [{phantoms: {kind: xray, samples: 24, seed: 4, size: 64}}]}"
    )
    assert run(*checkpoints, validation) == 0, capsys.readouterr().err
    records = json.loads((tmp_path / "out/results.json").read_text())
    assert [(r["model"], r["kind"]) for r in records] == [
        ("random", "classifier"), ("mae", "classifier"), ("clip", "zero-shot"),
    ]  # fmt: skip
    assert [r["missing"] for r in records] == [["pleural effusion"]] * 2 + [[]]
    assert all(r["groups"] == 9 and r["samples"] == 36 for r in records)
    assert records[0]["thresholds_from"] == "24 validation samples"
    positives = sum(own["positives"] for own in records[0]["per_class"].values())
    rows = list(csv.DictReader((tmp_path / "out/predictions-phantom_thorax-clip.csv").open()))
    assert len(rows) == 36 and positives == sum(int(row[name]) for row in rows for name in FINDINGS) > 20
    assert "macro AUROC" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=mae.ckpt"], "masked autoencoder, which names no findings"),
        (
            ["checkpoint=vit.ckpt", "evals.phantom_thorax.data.labels.names=[pneumothorax]"],
            "has no labels of 'pleural eff",
        ),
        (["checkpoint=vit.ckpt", "evals.phantom_thorax.data.labels.field=nothing"], "no label column 'nothing'"),
        (["checkpoint=vit.ckpt", "evals.phantom_thorax.data.labels=null"], "has no labels: say evals.phantom_thorax"),
        (["checkpoint=vit.ckpt", "evals.phantom_thorax.prompts=[[x]]"], "is no pair"),
        (
            ["checkpoint=vit.ckpt", "evals.phantom_thorax.validation=${evals.phantom_thorax.data}"],
            "9 groups (patients) of evals.phantom_thorax.validation",
        ),
        (
            [
                "checkpoint=vit.ckpt",
                "eval=[phantom_thorax,phantom_xray]",
                "evals.phantom_xray.data.sources=${evals.phantom_thorax.data.sources}",
            ],
            "'phantom_xray' needs texts",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(run, capsys, arguments: list[str], message: str) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    line = [part for part in error.splitlines() if part.startswith("medclip evaluate:")]
    assert len(line) == 1 and message in line[0], error
    assert "Traceback" not in error
