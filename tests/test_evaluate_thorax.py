"""`medclip evaluate` on generated chest X-rays: a classifier, its random twin and a CLIP, from checkpoints to files."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
PHANTOMS = ["eval=[phantom_thorax]", DATA]
COMMON = ["bootstrap.samples=100", "workers=0", "device=cpu", "output=out"]


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
    assert run(*PHANTOMS, *checkpoints, validation) == 0, capsys.readouterr().err
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


def xrays(rows: int) -> list[str]:
    """Pictures of noise; their names."""
    rng = np.random.default_rng(0)
    for i in range(rows):
        folder = Path(f"images/patient{i // 2:05d}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (48, 48), dtype=np.uint8)).save(folder / f"x{i}.png")
    return [f"images/patient{i // 2:05d}/x{i}.png" for i in range(rows)]


def nih14() -> tuple[list[str], list[str]]:
    """The layout of ChestX-ray14, of which a list keeps all but the last picture; and its source in words."""
    names = [Path(name).name for name in xrays(13)]
    found = ["Effusion|Hernia", "No Finding", "Edema", "Pleural_Thickening"] * 4
    rows = [f"{name},{found[i]},0,{i // 2}" for i, name in enumerate(names)]
    Path("nih.csv").write_text("\n".join(["Image Index,Finding Labels,Follow-up #,Patient ID", *rows]))
    Path("test_list.txt").write_text("\n".join(names[:-1]))
    source = "table: nih.csv, image_root: images, keep: test_list.txt, columns: {image: Image Index}, search: true"
    return [f"evals.thorax.data.sources=[{{{source}, statistics: {{mean: 0.5056, std: 0.252}}}}]"], ["Effusion"]


def chexpert() -> tuple[list[str], list[str]]:
    """The layout of CheXpert with a lateral view, and an uncertain label, which is neither right nor wrong."""
    names = xrays(13)
    labels = ["1.0,,-1.0,0.0,", ",1.0,,,1.0", ",,1.0,1.0,0.0"] * 5
    rows = [f"CheXpert/{name},{'Lateral' if i == 12 else 'Frontal'},{labels[i]}" for i, name in enumerate(names)]
    rows = [row.replace("images/", "images/frontal/" if i < 12 else "images/lateral/") for i, row in enumerate(rows)]
    Path("images").rename("frontal")
    Path("CheXpert/images").mkdir(parents=True)
    Path("frontal").rename("CheXpert/images/frontal")
    head = "Path,Frontal/Lateral,Atelectasis,Cardiomegaly,Consolidation,Edema,Pleural Effusion"
    Path("valid.csv").write_text("\n".join([head, *rows]))
    source = (
        "table: valid.csv, image_root: ., columns: {image: Path}, "
        'extract: {patient: {column: Path, pattern: "patient\\d+"}}, filter: "\\"frontal\\" in Path"'
    )
    return [f"evals.thorax_chexpert.data.sources=[{{{source}}}]"], ["Atelectasis", "Pleural Effusion"]


@pytest.mark.parametrize(("name", "write"), [("thorax", nih14), ("thorax_chexpert", chexpert)])
def test_public_layouts(run, tmp_path: Path, capsys, name: str, write) -> None:
    words, classes = write()
    model = build_vit(["Pleural Effusion", "Atelectasis"], image_size=32, dim=32, depth=1, heads=2)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"medclip": model.description, "state_dict": state}, "own.ckpt")
    assert run(f"eval=[{name}]", *words, "checkpoint=own.ckpt") == 0, capsys.readouterr().err
    (record,) = json.loads((tmp_path / "out/results.json").read_text())
    assert (record["samples"], record["groups"]) == (12, 6) and not record["skipped"]
    for own in classes:  # known to the classifier, if by another name
        assert own not in record["missing"] and record["per_class"][own]["auroc"]["value"] is not None
    assert len(record["missing"]) + len(classes) + (name == "thorax") == len(record["per_class"])
    if name == "thorax":
        assert record["per_class"]["Effusion"]["positives"] == 3 == record["per_class"]["Hernia"]["positives"]
        defined = record["per_class"].keys() - set(record["undefined"]["auroc"])
        assert defined == {"Effusion", "Hernia", "Edema", "Pleural_Thickening"}
    else:
        counts = {own: (c["positives"], c["known"]) for own, c in record["per_class"].items()}
        assert counts["Consolidation"] == (4, 8) and counts["Pleural Effusion"] == (4, 12)


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
            "'phantom_xray' is for CLIPs",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(run, capsys, arguments: list[str], message: str) -> None:
    assert run(*PHANTOMS, *arguments) == 2
    error = capsys.readouterr().err
    line = [part for part in error.splitlines() if part.startswith("medclip evaluate:")]
    assert len(line) == 1 and message in line[0], error
    assert "Traceback" not in error
