"""The table of the encoder protocol: costs by hand, runs of a sweep found, evaluations joined to their towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medclip.models.load import load_clip
from medclip.types import UserError
from scripts.encoder_table import find_runs, macs, main, named, tower_name

TEXT = {"context_length": 16, "vocab_size": 49408, "layers": 1, "width": 32, "heads": 2}
VIT = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 64, "head_width": 32}
RESNET = {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}


def test_macs_of_a_vit_by_hand() -> None:
    clip = load_clip({"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT}).eval()
    patches, d = 16, 64
    n = patches + 1
    block = n * 3 * d * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d  # qkv, scores and their sum, out, MLP
    assert macs(clip) == patches * d * 3 * 8 * 8 + 3 * block + d * 32
    assert torch.backends.mha.get_fastpath_enabled()


def test_macs_of_convolutions_grow_with_the_area() -> None:
    small, large = (
        macs(load_clip({"embed_dim": 32, "vision_cfg": RESNET | {"image_size": size}, "text_cfg": TEXT}).eval())
        for size in (32, 64)
    )
    head = 512 * 32
    assert large - head == 4 * (small - head)


@pytest.mark.parametrize(
    "vision, name",
    [(VIT, "vit_p8_l3_w64"), (RESNET, "resnet10t"), ({"layers": [1, 2, 1, 1], "width": 16}, "resnet_1-2-1-1_w16")],
)
def test_names_of_towers(vision: dict[str, Any], name: str) -> None:
    assert tower_name({"vision_cfg": vision}) == name


def test_each_row_has_a_name_of_its_own() -> None:
    def row(tower: str, seen: int, run: str) -> dict[str, Any]:
        return {"tower": tower, "samples_seen": seen, "run": run}

    assert list(named([row("a", 1, "x"), row("b", 1, "y")])) == ["a", "b"]
    assert list(named([row("a", 1, "x"), row("a", 2, "y")])) == ["a@1", "a@2"]
    assert list(named([row("a", 1, "x"), row("a", 1, "y")])) == ["a@x", "a@y"]
    with pytest.raises(UserError, match="the same run was given twice"):
        named([row("a", 1, "x"), row("a", 1, "x")])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two towers as a multirun leaves them, the second as job 10, after job 9 which has not come to a checkpoint."""
    folder = tmp_path_factory.mktemp("sweep")
    for job, vision in (("2", VIT), ("9", None), ("10", RESNET)):
        (folder / job / "checkpoints").mkdir(parents=True)
        if vision is not None:
            torch.manual_seed(0)
            clip = load_clip({"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT})
            state = {f"model.{key}": value for key, value in clip.state_dict().items()}
            content = {
                "state_dict": state,
                "medclip": clip.description,
                "lineage": {"seen": {"steps": 3, "samples": 192}},
            }
            torch.save(content, folder / job / "checkpoints" / "last.ckpt")
    return folder


def test_runs_of_a_sweep_in_their_order(sweep: Path, tmp_path: Path) -> None:
    assert [run.name for run in find_runs([sweep])] == ["2", "10"]
    assert find_runs([sweep / "10", sweep / "2"]) == [sweep / "10", sweep / "2"]
    with pytest.raises(UserError, match="holds no run"):
        find_runs([tmp_path])


def test_the_table(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = "{phantoms: {kind: xray, samples: 24, size: 64, seed: 3}}"
    words = ["eval=[phantom_xray]", f"evals.phantom_xray.data.sources=[{data}]", "workers=0", "bootstrap.samples=100"]
    assert main([str(sweep), "--output", str(tmp_path / "out"), "--batch=2", "--repeats=1", "device=cpu", *words]) == 0
    rows = json.loads((tmp_path / "out" / "encoders.json").read_text())
    assert list(rows) == ["vit_p8_l3_w64", "resnet10t"]
    records = {r["model"]: r for r in json.loads((tmp_path / "out" / "results.json").read_text())}
    lines = (tmp_path / "out" / "encoders.md").read_text().splitlines()
    for line, (name, row) in zip(lines[2:], rows.items(), strict=True):
        value = records[name]["metrics"]["mean_per_class_recall"]
        assert row["results"]["phantom_xray"]["mean_per_class_recall"]["value"] == value
        assert f"{row['parameters'] / 1e6:.2f}" in line and f"| 192 | {value:.3f} [" in line
        assert row["images_per_second"] > 0
    assert lines[0] in capsys.readouterr().out


def test_one_line_for_what_is_missing(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        [str(sweep)],
        ["eval=[phantom_xray]"],
        [str(tmp_path), "eval=[phantom_xray]"],
        [str(sweep), "eval=[x]"],
    ):
        assert main([*words, "--output", str(tmp_path / "out"), "--batch=1", "--repeats=1"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("encoder_table: ") and error.count("\n") == 1
